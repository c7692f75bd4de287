"""The drift alarm of a folder: from corrections of audit draws to whoever relies on the estimates."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from segqc.cli import main
from segqc.loop.dataset import Dataset
from segqc.loop.drift import StructureDrift, alarm_of, drift, watch_serving
from segqc.loop.recalibration import audit, use
from segqc.loop.review import review
from segqc.loop.submission import submit_label
from segqc.networks.assessor import Assessor
from segqc.quality.calibration import MaskCalibration, StructureCalibration
from segqc.quality.drift import drift_sentence
from segqc.quality.intervals import StructureIntervals, split_conformal
from segqc.selection import segqc as worst_first
from segqc.store import bundles, events, leases
from segqc.store.database import utc_now
from segqc.store.events import SERVER
from tests.report_kit import good_card
from tests.server_kit import add_models, draw_case, make_dataset, serving
from tests.test_recalibration import ANNA, AUDIT, WORST, correct, judge, model
from tests.test_strategies import ask

SCANS = 16
CALIBRATING = 40
NO_TESTS = "\n[annotation]\naudit_share = 0.0\nvalidation_share = 0.0\n"


def folder_of(folder: Path, residual: float) -> Path:
    """A folder whose calibrating patients have residuals up to this size; all scans wait, with a mask and estimates."""
    make_dataset(folder, scans=SCANS, finals=0)
    (folder / "segqc.toml").write_text((folder / "segqc.toml").read_text() + NO_TESTS)
    add_models(folder)
    made = Dataset(folder)
    assessor = model(made)
    truth = 0.7 + residual * np.linspace(-1, 1, CALIBRATING)
    patients = [f"p{i}" for i in range(CALIBRATING)]
    dice, arvd, rvd = (split_conformal([0.7] * CALIBRATING, truth, patients, m) for m in ("dice", "arvd", "rvd"))
    served = MaskCalibration(intervals=StructureIntervals(dice, arvd, rvd))
    known = StructureCalibration({"served": served, "strange": MaskCalibration()})
    card = replace(assessor.card, calibration=(known, known), seen=(), report=good_card())
    with made.bundles.workspace() as work:
        Assessor(card, assessor.network).save(work / "segqc.pt")
        made.bundles.publish({"segqc": work / "segqc.pt"}, SERVER, "a test")
    for i in range(SCANS):
        judge(made, f"scan_{i}", 0.3 + i / 1000)  # their true Dice is far from it
    made.store.close()
    return folder


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("narrow"), 0.01)


@pytest.fixture
def dataset(narrow: Path, tmp_path: Path) -> Dataset:
    return Dataset(shutil.copytree(narrow, tmp_path / "s"))


def streams(dataset: Dataset, *, simulated: bool = False) -> tuple[StructureDrift, ...]:
    watched = watch_serving(dataset)
    assert watched is not None
    with dataset.store.read() as transaction:
        return drift(transaction, watched, simulated=simulated)


def told(dataset: Dataset) -> list[str]:
    """What happened to the bundle that serves because of drift."""
    bundle = dataset.bundle()
    assert bundle is not None
    with dataset.store.read() as transaction:
        return [e.verb for e in events.history(transaction, "bundle", bundle.number) if e.verb.startswith("drift")]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main.app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_an_alarm_begins_once_and_is_told_wherever_estimates_are(dataset: Dataset) -> None:
    folder = str(dataset.folder)
    assert "Do not rely" not in run("intervals", folder)
    correct(dataset, AUDIT, 12)
    assert told(dataset) == ["drift alarm"]
    alarm = dataset.drift_alarm()
    assert alarm is not None
    assert alarm == alarm_of(streams(dataset))
    assert alarm.structures == ("liver", "spleen")
    assert alarm.patients == 12
    sentence = drift_sentence(alarm)

    for _ in range(2):  # looking at it changes nothing
        shown = json.loads(run("intervals", folder, "--json"))
        assert shown["drift_alarm"]["message"] == sentence
        liver = shown["structures"][0]
        assert (liver["calibrating patients"], liver["patients tested"]) == (CALIBRATING, 12)
        assert 2 < liver["alarm at patient"] < 12
        assert liver["evidence of drift"] >= liver["alarm from"] == 40, "the level is shared by the two structures"
        assert sentence in " ".join(run("intervals", folder).split())
    ranked = run("rank", folder)
    assert sentence in ranked and "better than chance" in ranked
    assert "better than a constant" not in ranked, "the card was made before"
    assert json.loads(run("rank", folder, "--json"))["drift_alarm"]["patients"] == 12
    assert sentence in run("models", "show", folder, "2")
    assert json.loads(run("models", "show", folder, "1", "--json"))["drift_alarm"] is None

    answer = ask(dataset)
    worth = answer["reliability"]
    assert isinstance(worth, dict)
    assert (worth["estimate"], worth["order"]) == ("drift alarm", "better than chance")
    assert worth["messages"][0] == sentence
    assert sentence in str(answer["note"])
    assert ", unreliable)" in str(answer["name"])
    assert answer["strategy"] == "segqc", "the order stays"
    with serving(dataset.folder) as client:
        assert client.get("/info/").json()["drift_alarm"]["structures"] == ["liver", "spleen"]
    assert told(dataset) == ["drift alarm"]


def test_errors_like_those_that_calibrate_raise_none(tmp_path: Path) -> None:
    dataset = Dataset(folder_of(tmp_path / "wide", 0.9))
    correct(dataset, AUDIT, 12)
    assert [(t.test.audited, t.test.alarm) for t in streams(dataset)] == [(12, None)] * 2
    assert dataset.drift_alarm() is None
    assert told(dataset) == []
    assert ", unreliable" not in str(ask(dataset)["name"])


def test_scans_that_came_worst_first_raise_none(dataset: Dataset) -> None:
    correct(dataset, WORST, 12)
    assert [t.test.audited for t in streams(dataset)] == [0, 0]
    assert told(dataset) == []


def test_simulated_corrections_raise_none_but_can_be_looked_at(dataset: Dataset) -> None:
    for _ in range(12):
        with dataset.store.write() as transaction:
            lease = leases.acquire(transaction, ANNA, "segqc", worst_first.order, AUDIT)
        assert lease is not None
        truth = draw_case(int(lease.scan.removeprefix("scan_")))[1]
        submit_label(dataset, lease.scan, truth, "final", ANNA, simulated=True)
    assert (alarm_of(streams(dataset)), told(dataset)) == (None, [])
    assert alarm_of(streams(dataset, simulated=True)) is not None
    assert "drift alarm since" in " ".join(run("intervals", str(dataset.folder), "--simulated").split())


def test_what_calibrates_cannot_raise_the_alarm(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    correct(dataset, AUDIT, 12)
    assert dataset.drift_alarm() is not None
    use(dataset, model(dataset), audit(dataset, model(dataset)), ANNA)
    assert dataset.drift_alarm() is None
    assert [(t.test.calibrating, t.test.audited) for t in streams(dataset)] == [(12, 0)] * 2
    assert told(dataset) == []
    monkeypatch.setattr(dataset.store.database, "clock", lambda: utc_now() - dt.timedelta(hours=5))  # is set back
    correct(dataset, AUDIT, 4)
    assert [(t.test.audited, t.test.alarm) for t in streams(dataset)] == [(4, None)] * 2, "as bad as those before"
    assert dataset.drift_alarm() is None
    with dataset.store.read() as transaction:
        assert bundles.get(transaction, 2).drift_alarm is not None, "it was true of the bundle before"


def test_an_alarm_ends_where_the_corrections_behind_it_were_wrong(dataset: Dataset) -> None:
    wrong = correct(dataset, AUDIT, 12)
    for scan in wrong:
        review(dataset, scan, "rejected", ANNA, "not good")
    assert dataset.drift_alarm() is None
    assert told(dataset) == ["drift alarm", "drift alarm ended"]


def test_an_alarm_is_told_nowhere_where_none_is_wanted(dataset: Dataset) -> None:
    correct(dataset, AUDIT, 12)
    settings = dataset.folder / "segqc.toml"
    settings.write_text(f"{settings.read_text()}\n[models]\ndrift_level = 0.0\n")
    for command in (("rank",), ("intervals",), ("models", "show")):
        last = ["2"] if command[0] == "models" else []
        assert json.loads(run(*command, str(dataset.folder), *last, "--json"))["drift_alarm"] is None
    assert Dataset(dataset.folder).drift_alarm() is None


def test_a_patient_counts_once(narrow: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(narrow, tmp_path / "s")
    scans = ", ".join(f'"scan_{i}"' for i in range(SCANS))
    settings = folder / "segqc.toml"
    settings.write_text(f"{settings.read_text()}\n[patients]\none = [{scans}]\n")
    dataset = Dataset(folder)
    dataset.refresh()
    correct(dataset, AUDIT, 6)
    assert [t.test.audited for t in streams(dataset)] == [1, 1]


def test_a_submission_does_not_depend_on_the_bundle_s_card(dataset: Dataset) -> None:
    correct(dataset, AUDIT, 1)
    card = dataset.bundles.folder / "2" / "segqc.json"
    card.chmod(0o644)
    card.write_text("junk")
    correct(dataset, AUDIT, 1)
    assert told(dataset) == []
