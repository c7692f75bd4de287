"""Trainings as runs of MLflow: what they hold, that there is one a training, and that nothing depends on them."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from segqc.cli import main
from segqc.loop.dataset import Dataset
from segqc.loop.requests import NETWORKS, RoundRequest, TrackedRun, TrainResult, enqueue, result_to_json
from segqc.loop.round import run_round
from segqc.loop.tracking import TrackedTraining, note, track
from segqc.loop.training import train
from segqc.settings import SettingsError, TrackingSettings, load_settings
from segqc.store import jobs
from segqc.training import NoProgress, TrainingSettings
from tests.server_kit import make_dataset
from tests.store_kit import ANNA

IN_FOLDER = TrackingSettings(uri="runs")
DOWN = "http://anna:secret@127.0.0.1:9/tracking"  # nobody listens on the port of "discard"


CONFIG = """
[structures]
liver = [1]
spleen = [4]

[inference]
backend = "pytorch"

[training]
epochs = 1
fold_epochs = 2
people_epochs = 1
steps_per_epoch = 1
gammas = []
ensemble = false
mixed_precision = false
folds = 2

[tracking]
uri = "{uri}"
"""


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database without runs: its migrations take a second."""
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}")
    return path


@pytest.fixture
def client(tmp_path: Path, empty_database: Path) -> Any:
    """MLflow's client for the runs below the folder of a test."""
    import mlflow

    (tmp_path / "runs").mkdir()
    shutil.copyfile(empty_database, tmp_path / "runs" / "mlflow.db")
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")


def runs(client: Any, experiment: str = "segqc") -> list[Any]:
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else list(client.search_runs([found.experiment_id]))


def training(folder: Path, **others: Any) -> TrackedTraining:
    curve = folder / "curve.json"
    points = [{"epoch": 1, "train_loss": 0.5, "validation_loss": None}]
    points += [{"epoch": 2, "train_loss": 0.25, "validation_loss": 0.75}]
    curve.write_text(json.dumps(points))
    one = TrackedTraining(
        network="segmentation",
        version="abc",
        settings=TrainingSettings(epochs=2),
        counts={"scans": 7},
        scores={"dice left/rechte Größe+": 0.875},
        curve=curve,
        started_at=1000.0,
        tags={"segqc.round": "3"},
    )
    return replace(one, **others)


def test_a_run_holds_settings_curve_scores_and_tags(tmp_path: Path, client: Any) -> None:
    tracked = track(IN_FOLDER, tmp_path, training(tmp_path))
    assert tracked is not None and tracked.url is None
    (run,) = runs(client)
    assert (run.info.run_id, run.info.status, run.info.start_time) == (tracked.id, "FINISHED", 1_000_000)
    assert run.info.artifact_uri.startswith((tmp_path / "runs").as_uri())
    assert (run.data.params["epochs"], run.data.params["start"], run.data.params["scans"]) == ("2", "scratch", "7")
    losses = {name: client.get_metric_history(run.info.run_id, name) for name in ("train_loss", "validation_loss")}
    assert [(point.step, point.value) for point in losses["train_loss"]] == [(1, 0.5), (2, 0.25)]
    assert [(point.step, point.value) for point in losses["validation_loss"]] == [(2, 0.75)]
    assert run.data.metrics["dice left_rechte Größe_"] == 0.875
    own = {name: value for name, value in run.data.tags.items() if name.startswith("segqc.")}
    assert own == {
        "segqc.network": "segmentation", "segqc.version": "abc", "segqc.folder": tmp_path.name, "segqc.round": "3"
    }  # fmt: skip
    note(IN_FOLDER, tmp_path, tracked, {"segqc.bundle": "5"})
    assert runs(client)[0].data.tags["segqc.bundle"] == "5"


def test_a_training_has_one_run_however_often_it_is_told_of(tmp_path: Path, client: Any) -> None:
    first = track(IN_FOLDER, tmp_path, training(tmp_path))
    again = track(IN_FOLDER, tmp_path, training(tmp_path, tags={"segqc.round": "4"}))
    assert first == again
    assert [run.data.tags["segqc.round"] for run in runs(client)] == ["4"]
    other = track(replace_experiment("others"), tmp_path, training(tmp_path))
    assert other is not None and len(runs(client, "others")) == 1
    track(IN_FOLDER, tmp_path, training(tmp_path, version="another"))
    assert len(runs(client)) == 2


def replace_experiment(name: str) -> TrackingSettings:
    return TrackingSettings(uri="runs", experiment=name)


def test_by_default_nothing_is_tracked_nor_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert load_settings(tmp_path).tracking == TrackingSettings()
    assert track(TrackingSettings(), tmp_path, training(tmp_path)) is None
    note(TrackingSettings(), tmp_path, TrackedRun(id="a"), {"segqc.bundle": "5"})
    note(IN_FOLDER, tmp_path, None, {"segqc.bundle": "5"})


@pytest.mark.parametrize("uri", ["localhost:5000", "htps://mlflow.example.org", "sqlite:///mlflow.db"])
def test_what_is_neither_a_servers_address_nor_a_folder_is_refused(tmp_path: Path, uri: str) -> None:
    (tmp_path / "segqc.toml").write_text(f"[tracking]\nuri = {uri!r}\n")
    with pytest.raises(SettingsError, match=r"segqc.toml: tracking.uri: wanted a server's address.*or a folder, got"):
        load_settings(tmp_path)


def test_without_mlflow_there_is_one_clear_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert track(IN_FOLDER, tmp_path, training(tmp_path)) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "pip install 'segqc[tracking]'" in caplog.text


def test_a_server_that_is_down_costs_a_warning_without_the_password(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed")
    caplog.set_level(logging.WARNING, "segqc")
    settings = TrackingSettings(uri=DOWN)
    assert track(settings, tmp_path, training(tmp_path)) is None
    note(settings, tmp_path, TrackedRun(id="a"), {"segqc.bundle": "5"})
    told = [record.message for record in caplog.records if record.name.startswith("segqc")]
    assert len(told) == 2
    assert all("MLflow at http://127.0.0.1:9/tracking cannot be used" in sentence for sentence in told)
    assert "secret" not in "".join(told)


def test_rounds_show_their_runs(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "s")
    store = Dataset(folder).store
    with store.write() as transaction:
        job = enqueue(transaction, RoundRequest(), ANNA)
        jobs.claim(transaction, "w1", ("round",))
        number, _ = jobs.begin_round(transaction, job.id, 4)
        for network, run in zip(
            NETWORKS, (TrackedRun(id="a", url="http://it/#/runs/a"), TrackedRun(id="b")), strict=True
        ):
            result = TrainResult(network=network, scores={}, used=4, left_out={}, tracked=run)
            jobs.finish_step(transaction, number, f"train {network}", result_to_json(result))
    (shown,) = json.loads(CliRunner().invoke(main.app, ["rounds", str(folder), "--json"]).stdout)["rounds"]
    assert (shown["segmentation run"], shown["segqc run"]) == ("http://it/#/runs/a", "b")


def test_a_round_s_trainings_are_runs_with_its_number_and_bundle(tmp_path: Path, client: Any) -> None:
    folder = make_dataset(tmp_path / "s", scans=6, finals=5, config=CONFIG.format(uri=tmp_path / "runs"))
    dataset = Dataset(folder)
    with dataset.store.write() as transaction:
        enqueue(transaction, RoundRequest(), ANNA)
        job = jobs.claim(transaction, "w1", ("round",))
    assert job is not None
    result = run_round(dataset, job, RoundRequest(), NoProgress())
    found = {run.data.tags["segqc.network"]: run for run in runs(client)}
    assert {*found} == {*NETWORKS}
    for network, run in found.items():
        assert result.steps[f"train {network}"]["tracked"] == {"id": run.info.run_id, "url": None}
        assert (run.data.tags["segqc.round"], run.data.tags["segqc.bundle"]) == ("1", "1")
        assert "train_loss" in run.data.metrics
    words = " ".join(str(run.data.to_dictionary()) for run in found.values())
    assert not any(f"scan_{i}" in words for i in range(6)), "no scan, and no patient, is named"


def test_a_training_goes_on_where_its_run_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    folder = make_dataset(tmp_path / "s", scans=4, finals=4, config=CONFIG.format(uri=DOWN))
    trained = train(Dataset(folder), "segmentation", NoProgress())
    assert (trained.bundle, trained.tracked) == (1, None)
    assert caplog.text.count("the training is not tracked") == 1
