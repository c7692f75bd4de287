"""The command `segqc`, as a person and as a script meet it: what is printed, what is written, and exit codes."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import pytest
import typer
from scipy import stats

from segqc.cli import main
from segqc.loop.agreement import agreement
from segqc.loop.dataset import Dataset
from segqc.networks.assessor import Assessor
from segqc.phantom import draw_phantom
from segqc.quality.calibration import StructureCalibration
from segqc.quality.metrics import true_metrics
from segqc.quality.unlikeness import HeldOutPatient, NetworkReference, UnlikenessReference
from segqc.server.client_labels import to_client
from segqc.store import bundles, jobs
from segqc.store.events import SERVER
from segqc.training.calibration import KnownMask, fit_masks
from segqc.types import Assessment, Metrics, Unlikeness, label_names
from segqc.volumes import Volume, VolumeError, read_labels, read_scan, write_labels
from tests.report_kit import good_card, worthless_card
from tests.server_kit import (
    CHECKED,
    CONFIG,
    STRUCTURES,
    add_models,
    assess,
    draw_case,
    knowing_the_truth,
    make_dataset,
    without_liver,
    write_segmentation,
)

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Call the command as its console script does."""
    handlers = list(logging.root.handlers)

    def call(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["segqc", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        out, err = capsys.readouterr()
        return Said(code, out, err)

    yield call
    logging.root.handlers[:] = handlers  # the command's writes to a stream that ends with the test


def commands(group: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    children = getattr(group, "commands", None)
    if children is None:
        yield path, group
        return
    for name, child in children.items():
        yield from commands(child, (*path, name))


ALL = dict(commands(typer.main.get_command(main.app)))


# ---- help and usage ------------------------------------------------------------------------------------------------


PROBE = """
import sys
from segqc.cli import main as cli

def imported(*names):
    return set(names) & set(sys.modules)

for arguments in sys.argv[1:]:
    assert not imported("torch", "monai", "numpy" if arguments == "--help" else "matplotlib")
    cli.app(arguments.split(), standalone_mode=False)
assert not imported("torch", "monai", "matplotlib")
"""


def test_help_names_all_commands_and_neither_it_nor_listings_need_torch(tmp_path: Path) -> None:
    (tmp_path / "segqc.toml").touch()
    listings = [f"{command} {tmp_path}" for command in ("scans", "leases", "costs", "models list")]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "--help", *listings],
        capture_output=True, text=True, cwd=ROOT, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in {path[0] for path in ALL}:
        assert name in done.stdout


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_each_command_and_each_option_explains_itself(path: tuple[str, ...], run: Run) -> None:
    command = ALL[path]
    assert len(command.help or "") > 20
    for parameter in command.params:
        assert getattr(parameter, "help", None) or parameter.name == "help", f"{path}: {parameter.name}"
        # rich takes words in square brackets for markup, and leaves them out
        assert "[" not in (getattr(parameter, "help", None) or ""), f"{path}: {parameter.name}"
    assert run(*path, "--help").code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["rank"],
        ["rank", ".", "--bogus"],
        ["score", ".", "--method", "guess"],
        ["train", "segmentation", ".", "--epochs", "0"],
        ["phantom", "x", "--scans", "2", "--labelled", "3"],
        ["prepare", "a", "b", "--structure", "liver"],
        ["prepare", "a", "b", "--structure", "liver=0"],
        ["predict", "a.nii.gz", "b.nii.gz", "-o", "mask.nii.gz"],
        ["serve", ".", "--port", "70000"],
    ],
)
def test_wrong_usage_ends_with_2(run: Run, arguments: list[str]) -> None:
    messages = run(*arguments)
    assert messages.code == 2
    assert "Traceback" not in messages.err


def test_what_cannot_be_done_ends_with_1_and_one_sentence(run: Run, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "segqc.toml").touch()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "segqc.toml").write_text("[server]\nport = 'x'\n")
    scan = make_dataset(tmp_path / "s", scans=1, finals=0) / "scan_0.nii.gz"
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(scan.read_bytes()[:200])
    for arguments, said_of in [
        (["rank", tmp_path / "none"], "none"),
        (["rank", empty], "is no dataset folder"),
        (["rank", bare], "no scan waits for a label"),
        (["rank", empty, "--truth", tmp_path / "none"], "none"),
        (["score", bare], "segqc train segmentation"),
        (["train", "segmentation", tmp_path / "s"], "labelled"),
        (["train", "segqc", tmp_path / "bad"], "server.port"),
        (["predict", scan, "-o", tmp_path / "o"], "--model"),
        (["predict", scan, tmp_path / "none.nii", "-o", tmp_path / "o"], "none.nii: there is no such file"),
        (["assess", scan, scan], "--model"),
        (["assess", tmp_path / "no" / "scan.nii", scan], "scan.nii: there is no such file"),
        (["assess", scan, tmp_path / "no" / "mask.nii"], "mask.nii: there is no such file"),
        (["assess", broken, scan], "broken.nii.gz"),
        (["assess", scan, scan, "--model", broken], "broken.nii.gz"),
        (["prepare", empty, tmp_path / "new"], "images/"),
        (["simulate", "annotator", bare], "truth"),
    ]:
        messages = run(*arguments)
        assert messages.code == 1, arguments
        assert messages.err.startswith("segqc: "), messages.err
        assert len(messages.err.strip().splitlines()) == 1, messages.err
        assert said_of in messages.err, messages.err


@pytest.mark.parametrize(
    "command",
    [
        "scans FOLDER",
        "rank FOLDER",
        "score FOLDER",
        "train segmentation FOLDER",
        "round FOLDER --put",
        "worker FOLDER --until-idle",
        "costs FOLDER",
        "labels FOLDER scan",
        "review FOLDER scan approve",
        "pseudo-labels FOLDER",
        "certify FOLDER --dice 0.8",
        "audit FOLDER",
        "rounds FOLDER",
        "models list FOLDER",
        "pacs FOLDER",
        "users list FOLDER",
        "db check FOLDER",
        "db upgrade FOLDER",
        "db restore-views FOLDER",
        "export archive FOLDER TARGET",
        "evaluate labels FOLDER",
        # these may begin in an empty folder
        "serve FOLDER",
        "users add FOLDER anna --elsewhere",
        "db restore BACKUP FOLDER",
    ],
)
def test_a_folder_named_by_mistake_is_refused_and_stays_as_it_is(run: Run, tmp_path: Path, command: str) -> None:
    home = tmp_path / "home"
    for name in ("notes.txt", "Pictures/holiday.jpg", "segqc/pyproject.toml"):  # the last: a checkout of this program
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    before = sorted(tmp_path.rglob("*"))
    places = {"FOLDER": home, "TARGET": tmp_path / "target", "BACKUP": tmp_path / "backup"}
    messages = run(*(places.get(word, word) for word in command.split()))
    assert messages.code == 1
    assert f"{home}: is no dataset folder: it holds no scan" in messages.err
    assert len(messages.err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_may_become_a_dataset_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").touch()
    assert run("users", "list", tmp_path).code == 1
    assert run("users", "add", tmp_path, "anna", "--elsewhere").code == 0
    assert "anna" in run("users", "list", tmp_path).out


@pytest.mark.parametrize("sign", ["a.nii.gz", "B.NRRD", "segqc.toml", "labels/final/a.nii.gz", "segqc/models/card.pt"])
def test_a_dataset_folder_is_known_by_what_it_holds(run: Run, tmp_path: Path, sign: str) -> None:
    (tmp_path / sign).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / sign).touch()
    assert run("scans", tmp_path).code == 0


@pytest.mark.parametrize("misplaced", ["a.mha", "b.seg.nrrd", "inside/a.nii.gz"])
def test_a_folder_whose_files_are_of_no_use_is_no_mistake_and_they_are_named(
    run: Run, tmp_path: Path, misplaced: str
) -> None:
    (tmp_path / misplaced).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / misplaced).touch()
    listed = run("scans", tmp_path)
    assert listed.code == 0
    assert misplaced.split("/", maxsplit=1)[0] in listed.out


def test_where_networks_are_looked_for_no_store_is_made(run: Run, tmp_path: Path) -> None:
    scan = make_dataset(tmp_path, scans=1, finals=0) / "scan_0.nii.gz"
    (tmp_path / "segqc.toml").unlink(missing_ok=True)
    assert "no SegQC network" in run("assess", scan, scan).err
    assert "no segmentation network" in run("predict", scan, "-o", tmp_path / "mask.nii.gz").err
    assert not (tmp_path / "segqc").exists()


def test_what_is_refused_leaves_nothing_behind(run: Run, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "s", scans=2, finals=0)
    add_models(folder)
    damaged = folder / "damaged.nii.gz"
    damaged.write_bytes(b"no scan")
    names = [f"case{i}" for i in range(9)]
    source = labelled_data(tmp_path / "d", names, {"train": names, "test": names[6:]})
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    for arguments in (
        ["predict", damaged, "--dataset", folder, "-o", out],
        ["predict", folder / "scan_0.nii.gz", folder / "scan_0.nii.gz", "--dataset", folder, "-o", out],
        ["predict", folder / "scan_0.nii.gz", "--model", damaged, "-o", out],
        ["prepare", source, out, "--labelled", 2, "--unlabelled", 20],
        ["prepare", source, out, "--split", "validation"],
        ["evaluate", "all", source, "--out", out],
        ["evaluate", "all", source, "--out", out, "--observers", tmp_path / "none"],
        ["export", "nnunet", tmp_path / "none", out],
        ["import", "nnunet", tmp_path / "none", out],
        ["train", "segmentation", tmp_path / "none"],
    ):
        messages = run(*arguments)
        assert messages.code == 1, (arguments, messages)
        assert len(messages.err.strip().splitlines()) >= 1
        assert "Traceback" not in messages.err
        assert outside_of_the_store(sorted(tmp_path.rglob("*"))) == outside_of_the_store(before), arguments


def outside_of_the_store(paths: list[Path]) -> list[Path]:
    """What lies beside the store, which any command may open."""
    return [path for path in paths if "segqc" not in path.parts and path.name != "segqc"]


def test_one_scan_that_cannot_be_read_does_not_keep_the_others_from_their_masks(run: Run, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "s", scans=3, finals=0)
    add_models(folder)
    (folder / "scan_1.nii.gz").write_bytes(b"no scan")
    messages = run(
        "predict", *(folder / f"scan_{i}.nii.gz" for i in range(3)), "--dataset", folder, "-o", tmp_path / "o"
    )
    assert messages.code == 1
    assert names_in(tmp_path / "o") == {"scan_0.nii.gz", "scan_2.nii.gz"}
    assert "scan_1.nii.gz" in messages.err
    assert "1 of 3 scans" in messages.err


def test_a_mistake_of_ours_is_not_dressed_up_as_the_user_s(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segqc.phantom.write_datastore", lambda *_, **__: [][1])
    with pytest.raises(IndexError):
        run("phantom", "x")


# ---- make a folder -------------------------------------------------------------------------------------------------


def labelled_data(folder: Path, names: list[str], splits: dict[str, list[str]] | None = None) -> Path:
    for i, name in enumerate(names):
        scan, labels = draw_case(i)
        write_labels(labels, folder / "labels" / f"{name}.nii.gz")
        write_labels(
            Volume(np.clip(scan.array, 0, 255).astype(np.uint8), scan.affine), folder / "images" / f"{name}.nii.gz"
        )
    if splits is not None:
        (folder / "splits.json").write_text(json.dumps(splits))
    return folder


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.nii.gz")}


def test_prepare_hides_the_truth_of_the_unlabelled_scans(run: Run, tmp_path: Path) -> None:
    names = [f"case.{i}" for i in range(9)]
    source = labelled_data(tmp_path / "d", names, {"train": names[:6], "test": names[6:]})
    options = [
        "--labelled",
        2,
        "--unlabelled",
        3,
        "--split",
        "train",
        "--structure",
        "liver=1",
        "--structure",
        "other=2,4",
    ]
    messages = run("prepare", source, tmp_path / "s", *options, "--seed", 5)
    assert messages.code == 0, messages.err
    dataset = Dataset(tmp_path / "s")
    final = {e.id for e in dataset.scans() if e.final is not None}
    hidden = {name.removesuffix(".nii.gz") for name in names_in(tmp_path / "s" / "truth")}
    assert (len(final), len(hidden), len(dataset.scans())) == (2, 3, 5)
    assert not final & hidden
    assert final | hidden <= set(names[:6])
    assert dataset.settings.structures == {"liver": (1,), "other": (2, 4)}
    for name in hidden:
        assert (tmp_path / "s/truth" / f"{name}.nii.gz").read_bytes() == (
            source / "labels" / f"{name}.nii.gz"
        ).read_bytes()
    run("prepare", source, tmp_path / "again", *options, "--seed", 5)
    assert names_in(tmp_path / "again" / "truth") == names_in(tmp_path / "s" / "truth")
    assert run("prepare", source, tmp_path / "s", *options).code == 1  # never into a folder in use
    assert "9 labelled" in run("prepare", source, tmp_path / "t", "--labelled", 9, "--split", "train").err


def test_prepare_keeps_a_patient_s_scans_on_one_side(run: Run, tmp_path: Path) -> None:
    patients = [f"P-{i}" for i in range(1, 12)]
    scans = [f"{p}_{phase}" for p in patients for phase in ("ED", "ES")]
    source = labelled_data(tmp_path / "d", scans, {"train_patients": patients})
    options = ["--unlabelled", 8, "--split", "train"]
    assert run("prepare", source, tmp_path / "s", "--labelled", 6, *options).code == 0
    dataset = Dataset(tmp_path / "s")
    sides = [{e.id.split("_")[0] for e in dataset.scans() if (e.final is None) is side} for side in (True, False)]
    assert not sides[0] & sides[1]
    assert all(dataset.settings.patient_of(e.image) == e.id.split("_")[0] for e in dataset.scans())
    assert "both sides" in run("prepare", source, tmp_path / "t", "--labelled", 5, *options).err


def test_phantom_makes_a_studies_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = draw_phantom(0, 0.5)
    monkeypatch.setattr("segqc.phantom.draw_phantom", lambda *_: drawn)  # drawing takes a second
    assert run("phantom", tmp_path / "s", "--scans", 2, "--labelled", 1).code == 0
    entries = Dataset(tmp_path / "s").scans()
    assert [e.final is not None for e in entries].count(True) == 1


# ---- rank ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ranked(tmp_path: Path) -> Path:
    """Four scans with masks of falling quality, estimates that order them but for one pair, and truths."""
    folder = make_dataset(tmp_path / "s", scans=5, finals=1)
    dataset = Dataset(folder)
    for i, (estimate, shift) in enumerate([(0.9, 0), (0.5, 3), (0.6, 2), (0.55, 1)], start=1):
        _, labels = draw_case(i)
        write_labels(labels, folder / "truth" / f"scan_{i}.nii.gz")
        shifted = Volume(np.roll(labels.array, shift, axis=0), labels.affine)
        assess(dataset, f"scan_{i}", estimate, worst=i, mask=shifted, half_width=0.1 if i == 2 else None)
    return folder


def test_rank_prints_the_worst_estimate_first(run: Run, ranked: Path) -> None:
    messages = run("rank", ranked, "--csv")
    rows = list(csv.DictReader(io.StringIO(messages.out)))
    assert [row["scan"] for row in rows] == ["scan_2", "scan_4", "scan_3", "scan_1"]
    assert [float(row["estimated Dice"]) for row in rows] == [0.5, 0.55, 0.6, 0.9]
    assert rows[0]["worst slices"].split()[0] == "2"
    assert [rows[0][f"estimated Dice {what}"] for what in ("low", "high", "level")] == ["0.4", "0.6", "0.9"]
    assert rows[1]["estimated Dice low"] == ""
    assert "worst structure" not in messages.out
    table = run("rank", ranked).out
    assert "estimated Dice: of the scan's worst structure" in table
    assert "in brackets: 90% prediction intervals" in table
    assert "0.50 (0.40-0.60)" in table
    assert table.count("(not enough data)") == 3
    output = {r["scan"]: r["estimated Dice interval"] for r in json.loads(run("rank", ranked, "--json").out)["scans"]}
    assert output == {"scan_2": {"low": 0.4, "high": 0.6, "level": 0.9}, "scan_4": None, "scan_3": None, "scan_1": None}
    listed = run("scans", ranked).out
    assert "0.50 (0.40-0.60)" in listed
    assert listed.count("(not enough data)") == 3
    assert table.index("scan_2") < table.index("scan_4") < table.index("scan_3") < table.index("scan_1")


def test_no_table_shows_the_interval_of_a_scan_that_is_unlike_the_training_s(run: Run, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "studies", scans=3, finals=0)
    number = add_models(folder, report=worthless_card(unlikeness=Unlikeness(1.0, 0.5)))
    found = {"scan_0": Unlikeness(1.0, 0.5), "scan_1": Unlikeness(2.75, 0.05), "scan_2": Unlikeness(1.5, 0.2)}
    for name, unlikeness in found.items():
        assess(Dataset(folder), name, 0.5, number=number, half_width=0.1, unlikeness=unlikeness)
    table, listed = run("rank", folder).out, run("scans", folder).out
    for text in (table, listed):
        assert "0.50 (unlike the training scans)" in text and text.count("0.50 (0.40-0.60)") == 2
        assert "unlike the training scans: interval does not apply" in text
    assert "most unlike the training scans first" in table and "Ordered by how unlike" in table
    assert table.index("scan_1") < table.index("scan_2") < table.index("scan_0") and "2.75" in table
    rows = {row["scan"]: row for row in json.loads(run("rank", folder, "--json").out)["scans"]}
    marked = rows["scan_1"]
    assert marked["estimated Dice interval"] is None
    assert marked["remark"] == "unlike the training scans: interval does not apply"
    assert (marked["unlikeness"], marked["unlikeness p-value"], marked["ordered by"]) == (2.75, 0.05, "unlikeness")
    assert rows["scan_0"]["estimated Dice interval"] is not None and rows["scan_0"]["remark"] is None
    for command in ("rank", "scans"):
        read = {row["scan"]: row for row in csv.DictReader(io.StringIO(run(command, folder, "--csv").out))}
        assert (read["scan_1"]["estimated Dice low"], read["scan_0"]["estimated Dice low"]) == ("", "0.4")
        assert read["scan_1"]["remark"] == "unlike the training scans: interval does not apply"


@pytest.mark.parametrize("worthless", [False, True])
def test_rank_says_what_the_order_is_worth_and_uses_none_that_is_noise(
    run: Run, tmp_path: Path, worthless: bool
) -> None:
    orders = []
    for seed in range(3):
        folder = make_dataset(tmp_path / f"s{seed}", scans=5, finals=0)
        (folder / "segqc.toml").write_text(f"{CONFIG}\n[annotation]\nseed = {seed}\n")
        number = add_models(folder, report=worthless_card() if worthless else good_card())
        dataset = Dataset(folder)
        for i in range(5):
            assess(dataset, f"scan_{i}", 0.5 + i / 10, number=number)
        listed = run("rank", folder, "--csv")
        rows = list(csv.DictReader(io.StringIO(listed.out)))
        orders.append([row["scan"] for row in rows])
        assert {row["ordered by"] for row in rows} == {"uniform-random" if worthless else "segqc"}
        assert run("rank", folder, "--csv").out == listed.out, "the same each time"
        wanted = "Ordered at random: the estimates' order is not better than chance on 30 patients"
        for text in (run("rank", folder).out, listed.err):
            assert (wanted in text) is worthless
            assert ("Do not rely on the estimated Dice" in text) is worthless
        assert ("in random order" in run("rank", folder).out) is worthless
        card = json.loads(run("rank", folder, "--json").out)["report_card"]
        assert (card["order"] == "not better than chance") is worthless
    by_estimate = [[f"scan_{i}" for i in range(5)]] * 3
    assert (orders == by_estimate) is not worthless
    assert (len({tuple(order) for order in orders}) > 1) is worthless, "another seed is another order"


def test_rank_with_truths_tells_how_well_both_agree(run: Run, ranked: Path) -> None:
    messages = run("rank", ranked, "--truth", ranked / "truth", "--json")
    output = json.loads(messages.out)
    true = {}
    for i in (1, 2, 3, 4):
        mask = read_labels(ranked / "labels/original" / f"scan_{i}.nii.gz").array
        truth = read_labels(ranked / "truth" / f"scan_{i}.nii.gz").array
        true[f"scan_{i}"] = min(true_metrics(s.mask(mask), s.mask(truth)).dice or 0.0 for s in STRUCTURES)
    assert {row["scan"]: row["true Dice"] for row in output["scans"]} == pytest.approx(true)
    estimated = {row["scan"]: row["estimated Dice"] for row in output["scans"]}
    x, y = [estimated[n] for n in true], list(true.values())
    assert output["agreement"]["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert output["agreement"]["mae"] == pytest.approx(np.mean(np.abs(np.subtract(x, y))))
    text = run("rank", ranked, "--truth", ranked / "truth").out
    assert "Spearman" in text
    assert "constant" in text


def test_rank_says_how_far_the_scoring_is_and_what_goes_on_with_it(run: Run, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "s", scans=5, finals=1)
    assert "its networks are not trained yet; run segqc round first" in run("rank", folder).err
    number, dataset = add_models(folder), Dataset(folder)
    told = run("rank", folder)
    assert told.code == 1
    assert "0 of 4 waiting scans are scored by bundle 1, which serves; a worker (segqc serve," in told.err
    by_hand = run("rank", folder, "--method", "tta").err
    assert "bundle 1, which serves; segqc score --method tta does the rest" in by_hand
    with dataset.store.write() as transaction:
        (job,) = jobs.open_jobs(transaction, "scoring")
        jobs.claim(transaction, "w1", ["scoring"])
    for i in (1, 2, 3):
        assess(dataset, f"scan_{i}", 0.5, number=number)
    told = run("rank", folder)
    assert "The list is not complete: 3 of 4 waiting scans are scored by bundle 1" in told.out
    assert "a worker is at it, and the rest follows." in told.out
    assert run("rank", folder, "--csv").out.count("\n") == 4
    body = json.loads(run("rank", folder, "--json").out)
    assert (body["waiting"], body["unscored"]) == (4, 1)
    with dataset.store.write() as transaction:
        jobs.finish(transaction, job.id, "w1", "done")
    assess(dataset, "scan_4", 0.5, number=number)
    assert "not complete" not in run("rank", folder).out
    dataset.bundles.serve(add_models(folder), SERVER)
    dataset.bundles.serve(number, SERVER)
    assert "not complete" not in run("rank", folder).out, "a bundle that serves again is known by its estimates"
    other = add_models(folder)
    assert f"0 of 4 waiting scans are scored by bundle {other}" in run("rank", folder).err, "as after a rollback"


def test_whoever_lets_a_bundle_serve_is_told_what_that_does(run: Run, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "studies", scans=3, finals=2)
    first, second = add_models(folder), add_models(folder)
    dataset = Dataset(folder)

    def told(number: int) -> list[str]:
        return run("models", "serve", folder, number).out.splitlines()

    assert told(second) == [f"{folder}: bundle {second} serves already"]
    assert told(first) == [f"{folder}: bundle {first} serves, in the place of bundle {second}"]
    with dataset.store.write() as transaction:
        bundles.hold(transaction, second, "its estimates are worse", SERVER)
        waiting = jobs.enqueue(transaction, "round", {}, SERVER)
    assert told(second) == [
        f"{folder}: bundle {second} serves, in the place of bundle {first}",
        "it was held: its estimates are worse",
    ], "a round that only waits will begin with this choice"
    with dataset.store.write() as transaction:
        assert jobs.claim(transaction, "w1", ("round",)) is not None
    assert told(second) == [
        f"{folder}: bundle {second} serves already",
        f"the round that runs now (job {waiting.public_id}) will have its bundle held, as you chose this one by hand "
        f"meanwhile; segqc models serve {folder} BUNDLE lets it serve then",
    ]


def test_rank_lists_finished_scans_only_when_asked(run: Run, ranked: Path) -> None:
    _, labels = draw_case(2)
    write_labels(labels, ranked / "labels" / "final" / "scan_2.nii.gz")
    assert "scan_2" not in run("rank", ranked, "--csv").out
    assert "scan_2" in run("rank", ranked, "--csv", "--all").out


def test_json_and_csv_exclude_each_other(run: Run, ranked: Path) -> None:
    assert run("rank", ranked, "--csv", "--json").code == 2


def test_the_constant_is_the_best_that_a_constant_can_do() -> None:
    rng = np.random.default_rng(3)
    true = rng.beta(5, 2, 41)
    found = agreement(rng.permutation(true).tolist(), true.tolist())
    others = [np.abs(true - c).mean() for c in np.linspace(0, 1, 501)]
    assert found.constant_mae <= min(others) + 1e-12
    assert agreement([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]).spearman is None
    assert agreement([0.5, 0.6], [0.1, 0.2]).pearson is None
    with pytest.raises(ValueError, match="as many"):
        agreement([0.5], [])


# ---- with networks -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_dataset(tmp_path_factory.mktemp("cli") / "s", scans=3, finals=1, config=CONFIG)
    add_models(folder)
    return folder


def test_predict_writes_masks_on_the_scans_grids(run: Run, dataset: Path, tmp_path: Path) -> None:
    scans = [dataset / "scan_1.nii.gz", dataset / "scan_2.nii.gz"]
    assert run("predict", *scans, "-o", tmp_path / "masks").code == 0
    for path in scans:
        labels = read_labels(tmp_path / "masks" / path.name, scan=read_scan(path), values=(1, 4))
        assert labels.array.dtype == np.uint8
    model = Dataset(dataset).model_path("segmentation")
    assert run("predict", scans[0], "-o", tmp_path / "one.nrrd", "--model", model).code == 0
    before = scans[0].read_bytes()
    for taken in (scans[0], tmp_path / "one.nrrd", tmp_path / "masks"):
        messages = run("predict", scans[0], "-o", taken, "--model", model)
        assert messages.code != 0
        assert "exists already; name a new file" in messages.err
    assert scans[0].read_bytes() == before
    messages = run("predict", scans[0], "-o", tmp_path / "mask.mha", "--model", model)
    assert messages.code != 0
    assert "masks are written as" in messages.err
    assert not (tmp_path / "mask.mha").exists()
    assert np.array_equal(
        read_labels(tmp_path / "one.nrrd").array, read_labels(tmp_path / "masks" / scans[0].name).array
    )


def test_assess_prints_draws_and_writes_the_likely_errors(run: Run, dataset: Path, tmp_path: Path) -> None:
    scan, mask = dataset / "scan_0.nii.gz", dataset / "labels" / "final" / "scan_0.nii.gz"
    picture, errors = tmp_path / "a.png", tmp_path / "e.nii.gz"
    messages = run("assess", scan, mask, "--json", "--picture", picture, "--errors", errors)
    assert messages.code == 0, messages.err
    output = Assessment.from_json(messages.out)
    expected = Dataset(dataset).assessor()
    assert expected is not None
    result = expected.assess(read_scan(scan), read_labels(mask), scan_id="scan_0")
    assert output == result.assessment
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = read_labels(errors, scan=read_scan(scan)).array
    assert np.array_equal(written > 0, (result.errors >= 0.5).any(axis=0))
    before = scan.read_bytes(), mask.read_bytes()
    for option, taken in (("--errors", scan), ("--errors", mask), ("--picture", mask)):
        messages = run("assess", scan, mask, option, taken)
        assert messages.code != 0
        assert "exists already; name a new file" in messages.err
    assert (scan.read_bytes(), mask.read_bytes()) == before


@pytest.mark.parametrize("option", ["--picture", "--errors"])
@pytest.mark.parametrize("name", ["a.xyz", "a", "a.nii.png.gz"])
def test_assess_refuses_suffixes_that_it_cannot_write_before_it_begins(
    run: Run, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, name: str
) -> None:
    scan, mask = dataset / "scan_0.nii.gz", dataset / "labels" / "final" / "scan_0.nii.gz"
    monkeypatch.setattr(Assessor, "assess", None)
    messages = run("assess", scan, mask, "--no-picture", option, tmp_path / name)
    assert messages.code == 1
    assert f"{name}: " in messages.err and "choose one of these suffixes" in messages.err
    assert not list(tmp_path.glob("a*"))


def test_a_persons_mask_is_judged_by_the_network_for_people(
    run: Run, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_dataset(tmp_path / "s", scans=1, finals=0, config=CHECKED)
    add_models(folder, people=True)
    knowing_the_truth(monkeypatch)
    scan, mask = folder / "scan_0.nii.gz", tmp_path / "mask.nii.gz"
    write_labels(without_liver(), mask)
    sentence = "Look again at slices 4 and 5: part of the liver seems to be missing."
    assert sentence in run("assess", scan, mask, "--no-picture", "--source", "person").out
    assert sentence not in run("assess", scan, mask, "--no-picture").out
    kinds = [
        Assessment.from_json(run("assess", scan, mask, "--json", "--no-picture", "--source", source).out).mask_kind
        for source in ("person", "network")
    ]
    assert kinds == ["person", "strange"]
    other = dataset / "labels" / "final" / "scan_0.nii.gz"
    messages = run("assess", dataset / "scan_0.nii.gz", other, "--no-picture", "--json", "--source", "person")
    assert Assessment.from_json(messages.out).mask_kind == "strange"
    assert "was not trained to judge people's masks" in messages.err


def test_assess_reads_named_segments_by_their_names(run: Run, dataset: Path, tmp_path: Path) -> None:
    scan, mask = dataset / "scan_0.nii.gz", dataset / "labels" / "final" / "scan_0.nii.gz"
    expected = run("assess", scan, mask, "--json", "--no-picture")
    named = tmp_path / "mask.seg.nrrd"
    write_segmentation(named, ("Segment_1", "spleen", "liver"))
    assert run("assess", scan, named, "--json", "--no-picture").out == expected.out
    write_segmentation(named, ("spleen", "liver"), {"liver": "Segment_1"})
    found = run("assess", scan, named, "--no-picture")
    assert found.code == 1
    assert "has the segment 'Segment_1', which is none of the structures liver, spleen" in found.err


def test_assess_gives_one_csv_line_for_each_structure_and_slice(run: Run, dataset: Path) -> None:
    scan, mask = dataset / "scan_0.nii.gz", dataset / "labels" / "final" / "scan_0.nii.gz"
    rows = list(csv.DictReader(io.StringIO(run("assess", scan, mask, "--csv", "--no-picture").out)))
    slices = read_scan(scan).shape[2]
    assert len(rows) == len(STRUCTURES) * (1 + slices)
    assert [row["slice"] for row in rows if row["structure"] == "liver"] == ["", *map(str, range(slices))]


def test_assess_tells_intervals_or_that_there_is_not_enough_data(run: Run, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "s", scans=1, finals=1, config=CONFIG)  # of its own: bundles are published
    add_models(dataset)
    scan, mask = dataset / "scan_0.nii.gz", dataset / "labels/final/scan_0.nii.gz"
    messages = run("assess", scan, mask, "--no-picture").out
    assert "in brackets: prediction intervals" in messages
    assert all(term in messages for term in ("Estimates, made without a true mask", "ARVD:", "RVD:", "error sum:"))
    assert messages.count("(not enough data)") == 8  # four metrics of two structures
    opened = Dataset(dataset)
    model = opened.assessor()
    assert model is not None
    known = [Metrics(d, d, 0.1, 0.0) for d in np.linspace(0.3, 0.9, 9)]
    masks = [KnownMask(f"p{i}", f"s{i}", *pair) for i, pair in enumerate(zip(known, known[::-1], strict=True))]
    calibration = StructureCalibration({"strange": fit_masks("strange", [masks])[0]})
    with opened.bundles.workspace() as work:
        Assessor(replace(model.card, calibration=(calibration, calibration)), model.network).save(work / "segqc.pt")
        opened.bundles.publish({"segqc": work / "segqc.pt"}, SERVER, "a test")
    calibrated = opened.assessor()
    assert calibrated is not None
    expected = calibrated.assess(read_scan(scan), read_labels(mask), scan_id="scan_0").assessment
    messages = run("assess", scan, mask, "--no-picture").out
    assert "in brackets: 90% prediction intervals" in messages
    assert "not enough data" not in messages
    lines = csv.DictReader(io.StringIO(run("assess", scan, mask, "--no-picture", "--csv").out))
    whole = [line for line in lines if not line["slice"]]
    for quality, row in zip(expected.structures, whole, strict=True):
        interval = quality.intervals.dice
        assert interval is not None
        assert f"{quality.estimated.dice:.2f} ({interval.low:.2f}-{interval.high:.2f})" in messages
        assert (float(row["dice_low"]), float(row["dice_high"])) == pytest.approx((interval.low, interval.high))
        assert row["interval_level"] == "0.9"
    features = calibrated.scan_features(read_scan(scan), read_labels(mask))
    assert features is not None
    held_out = tuple(HeldOutPatient(f"p{i}", (1.0,)) for i in range(9))
    count = features.shape[1]
    reference = UnlikenessReference((NetworkReference((99.0,) * count, (1.0,) * count, 1.0, held_out),))
    with opened.bundles.workspace() as work:
        card = replace(calibrated.card, unlikeness=reference)
        Assessor(card, calibrated.network).save(work / "segqc.pt")
        opened.bundles.publish({"segqc": work / "segqc.pt"}, SERVER, "a test")
    messages = run("assess", scan, mask, "--no-picture").out
    assert messages.count("(unlike the training scans)") == 8
    assert "unlike the training scans: interval does not apply" in messages
    lines = csv.DictReader(io.StringIO(run("assess", scan, mask, "--no-picture", "--csv").out))
    assert {(row["dice_low"], row["remark"]) for row in lines if not row["slice"]} == {
        ("", "unlike the training scans: interval does not apply")
    }


def test_assess_lists_as_many_worst_slices_as_asked(run: Run, dataset: Path) -> None:
    scan, mask = dataset / "scan_0.nii.gz", dataset / "labels" / "final" / "scan_0.nii.gz"
    messages = run("assess", scan, mask, "--no-picture", "--slices", 2)
    worst = messages.out.split("slices to look at first")[1]
    assert len(re.findall(r"\bspleen\b", worst)) == 2


def test_score_continues_where_it_stopped(run: Run, dataset: Path) -> None:
    first = json.loads(run("score", dataset, "--json").out)
    assert first["rows"] == [{"scored": 2, "had a current score": 0, "failed": 0}]
    again = json.loads(run("score", dataset, "--json").out)
    assert again["rows"] == [{"scored": 0, "had a current score": 2, "failed": 0}]
    assert json.loads(run("score", dataset, "--json", "--force").out)["rows"][0]["scored"] == 2


def test_a_scan_that_cannot_be_scored_makes_the_exit_code_1(
    run: Run, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bool:
        raise VolumeError("scan_3.nii.gz: is gone")

    monkeypatch.setattr("segqc.loop.scoring._score_segqc", fail)
    messages = run("score", dataset)
    assert messages.code == 1
    assert "scan_3.nii.gz: is gone" in messages.err


# ---- the simulated annotator ----------------------------------------------------------------------------------------


class FakeServer:
    """Hands out scans in a fixed order with an estimate, and keeps what is submitted."""

    def __init__(self, folder: Path, order: list[str]) -> None:
        self.folder, self.order = folder, order
        self.submitted: dict[str, tuple[bytes, str]] = {}

    def client(self, url: str, tmpdir: str, client_id: str) -> FakeServer:
        return self

    def get_server_url(self) -> str:
        return "http://fake"

    def next_sample(self, strategy: str, params: dict[str, str]) -> dict[str, object]:
        left = [name for name in self.order if name not in self.submitted]
        interval = {"low": 0.1, "high": 0.4, "level": 0.9}
        output = {"estimated_dice": 0.25, "estimated_dice_interval": interval, "worst_slices": [3, 1]}
        return {"id": left[0], "strategy": strategy, **output} if left else {}

    def download_label(self, scan: str, tag: str) -> str:
        from segqc.server.monailabel.client import MONAILabelClientException

        if tag != "original":
            raise MONAILabelClientException(404, "there is no label with this tag")
        stored = read_labels(self.folder / "labels" / tag / f"{scan}.nii.gz")
        path = self.folder / f".{scan}-{tag}.nii.gz"
        write_labels(to_client(stored, label_names(Dataset(self.folder).structures)), path)
        return str(path)

    def save_label(self, scan: str, path: str, tag: str, params: dict[str, str]) -> None:
        self.submitted[scan] = (Path(path).read_bytes(), tag)


def test_simulate_submits_the_truth_and_compares_the_estimate_shown(
    run: Run, ranked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotator = pytest.importorskip("segqc.server.annotator", reason="MONAI Label is not installed")
    server = FakeServer(ranked, ["scan_3", "scan_2"])
    monkeypatch.setattr(annotator, "MONAILabelClient", server.client)
    rows = json.loads(run("simulate", "annotator", ranked, "--count", 9, "--json").out)["corrections"]
    assert [(row["scan"], row["estimated Dice"], row["worst slices"]) for row in rows] == [
        ("scan_3", 0.25, "3 1"),
        ("scan_2", 0.25, "3 1"),
    ]
    assert rows[0]["estimated Dice interval"] == {"low": 0.1, "high": 0.4, "level": 0.9}
    truths = json.loads(run("rank", ranked, "--truth", ranked / "truth", "--json").out)["scans"]
    expected = {row["scan"]: row["true Dice"] for row in truths}
    assert {row["scan"]: row["true Dice"] for row in rows} == {n: expected[n] for n in ("scan_3", "scan_2")}
    for name, (content, tag) in server.submitted.items():
        assert (content, tag) == ((ranked / "truth" / f"{name}.nii.gz").read_bytes(), "final")
    assert run("simulate", "annotator", ranked).code == 1  # nothing is left


def test_simulate_says_when_no_server_answers(run: Run, ranked: Path) -> None:
    pytest.importorskip("monailabel", reason="MONAI Label is not installed")
    messages = run("simulate", "annotator", ranked, "--server", "http://127.0.0.1:9")
    assert messages.code == 1
    assert "is the server running?" in messages.err


# ---- the documentation ---------------------------------------------------------------------------------------------


def documented_commands() -> list[str]:
    """All lines that call segqc in the shell blocks of the README and the docs."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.strip().startswith("segqc ")]


def test_the_documentation_shows_commands() -> None:
    assert len(documented_commands()) > 20


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_are_understood(line: str) -> None:
    words = shlex.split(line)[1:]
    if words[0] == "simulate" and tuple(words[:2]) not in ALL:
        words.insert(1, "study")  # which is left out
    depth = 1 if (words[0],) in ALL else 2
    command = ALL[tuple(words[:depth])]
    command.make_context(" ".join(words[:depth]), words[depth:])  # fails where an option or argument is unknown
