"""The commands on scans and labels, as a person types them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from segqc.cli import main
from segqc.cli.common import CommandError
from segqc.loop.checking import check_label
from segqc.loop.dataset import Dataset
from segqc.loop.submission import submit_label
from segqc.selection import segqc as worst_first
from segqc.store import leases
from segqc.store.database import StoreError
from segqc.text import visible
from segqc.volumes import read_labels, write_labels, write_scan
from tests.server_kit import (
    CHECKED,
    CONFIG,
    add_models,
    assess,
    draw_case,
    knowing_the_truth,
    make_dataset,
    without_liver,
)
from tests.store_kit import ANNA

PLAIN = "validation_share = 0.0\n[annotation]\naudit_share = 0.0\nvalidation_share = 0.0\n"


def run(*words: object) -> str:
    done = CliRunner().invoke(main.app, [str(w) for w in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = make_dataset(tmp_path / "s", scans=3, finals=0, config=CONFIG + PLAIN)
    dataset = Dataset(made)
    for i in range(3):
        assess(dataset, f"scan_{i}", 0.5 + i / 10)
    with dataset.store.write() as transaction:
        leases.acquire(transaction, ANNA, "segqc", worst_first.order, dataset.settings.annotation)
    return made


def test_the_history_says_what_the_check_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_dataset(tmp_path / "s", scans=1, finals=0, config=CHECKED)
    number = add_models(folder, people=True)
    knowing_the_truth(monkeypatch)
    dataset = Dataset(folder)
    bundle = dataset.bundle()
    assert bundle is not None
    check = check_label(dataset, submit_label(dataset, "scan_0", without_liver(), "final", ANNA).label, bundle)
    submit_label(dataset, "scan_0", draw_case(0)[1], "final", ANNA)
    first, second = json.loads(run("labels", folder, "scan_0", "--json"))["versions"]
    assert (first["by bundle"], first["check"]) == (number, check.sentence)
    assert first["estimated Dice"] == check.assessment.dice
    assert (second["by bundle"], second["check"], second["estimated Dice"]) == (None, None, None)
    assert check.sentence in run("labels", folder, "scan_0", "--csv")
    told = f"version {first['version']}, checked by bundle {number}: {check.sentence}"
    assert told in run("labels", folder, "scan_0").splitlines()


def test_validation_scans_and_audit_draws_count_as_cost(folder: Path) -> None:
    submit_label(Dataset(folder), "scan_0", draw_case(1)[1], "final", ANNA)
    rules = replace(Dataset(folder).settings.annotation, audit_share=1.0)
    with Dataset(folder).store.write() as transaction:
        leases.acquire(transaction, ANNA, "segqc", worst_first.order, rules)
    costs = {row.pop("draw"): row for row in json.loads(run("costs", folder, "--json"))["costs"]}
    handed_out = {draw: row["handed_out"] for draw, row in costs.items()}
    assert handed_out == {"strategy": 1, "audit": 1, "validation": 0, "pseudo-audit": 0, "rejected": 0}
    assert (costs["strategy"]["submitted"], costs["audit"]["submitted"]) == (1, 0)
    assert costs["strategy"]["hours"] > 0


def test_leases_that_are_over_say_why_a_scan_was_skipped(folder: Path) -> None:
    with Dataset(folder).store.write() as transaction:
        leases.skip(transaction, "scan_0", ANNA, "blurred")
        leases.skip(transaction, "scan_0", ANNA, "moved")
    (lease,) = json.loads(run("leases", folder, "--all", "--json"))["leases"]
    assert (lease["state"], lease["skipped because"]) == ("skipped", "moved")
    assert "skipped because" not in run("leases", folder, "--json")


def test_who_changed_this_mask(folder: Path, tmp_path: Path) -> None:
    states = {s["scan"]: s["state"] for s in json.loads(run("scans", folder, "--json"))["scans"]}
    assert states == {"scan_0": "in progress", "scan_1": "unlabelled", "scan_2": "unlabelled"}
    (lease,) = json.loads(run("leases", folder, "--json"))["leases"]
    assert (lease["scan"], lease["to"], lease["draw"]) == ("scan_0", "anna", "strategy")
    submit_label(Dataset(folder), "scan_0", draw_case(1)[1], "final", ANNA)
    first, second = json.loads(run("labels", folder, "scan_0", "--json"))["versions"]
    assert (second["made by"], second["as"], second["known by"], second["from"]) == (
        "anna", "annotator", "client-id", first["version"],
    )  # fmt: skip
    assert second["voxels changed"] == int((draw_case(0)[1].array != draw_case(1)[1].array).sum())
    assert "submitted" in run("scans", folder, "--csv")
    run("review", folder, "scan_0", "reject", "--reason", "a gap")
    assert "a gap" in run("scans", folder)
    restored = run("labels", folder, "scan_0", "--restore", second["version"])
    assert f"version {second['version']} is the current label 'final' again" in restored
    run("review", folder, "scan_0", "approve")
    run("labels", folder, "scan_0", "--export", first["version"], "--out", tmp_path / "old.nii.gz")
    assert np.array_equal(read_labels(tmp_path / "old.nii.gz").array, draw_case(0)[1].array)
    with pytest.raises(CommandError, match=r"old\.nii\.gz: exists already"):
        run("labels", folder, "scan_0", "--export", second["version"], "--out", tmp_path / "old.nii.gz")
    with pytest.raises(CommandError, match=f"no label version 99; it has {first['version']}, "):
        run("labels", folder, "scan_0", "--restore", 99)
    with pytest.raises(StoreError, match="no scan 'nobody'"):
        run("labels", folder, "nobody")
    with pytest.raises(StoreError, match="a reason is wanted"):
        run("review", folder, "scan_0", "exclude")


def test_readers_are_compared_and_united(folder: Path, tmp_path: Path) -> None:
    for reader, case in (("berta", 0), ("cleo", 1)):
        write_labels(draw_case(case)[1], tmp_path / reader / "scan_2.nii.gz")
        said = run("readings", folder, "--add", tmp_path / reader, "--reader", reader)
    assert "berta" in said
    assert "dice: overlap of the two readers' labels" in run("readings", folder)
    assert "overlap" not in run("readings", folder, "--csv")
    told = json.loads(run("readings", folder, "scan_2", "--json"))
    assert [(p["first"], p["second"]) for p in told["pairs"]] == [("berta", "cleo")] * 2
    assert {s["structure"] for s in told["structures"]} == {"liver", "spleen"}
    assert "by cleo" in run("consensus", folder, "scan_2", "--by", "cleo")
    assert [c.id for c in Dataset(folder).cases()] == ["scan_2"]
    with pytest.raises(CommandError, match="named as a scan"):
        run("readings", folder, "--add", tmp_path, "--reader", "dora")


def test_scans_tells_what_is_not_taken_in_and_what_was_replaced(folder: Path) -> None:
    write_labels(draw_case(0)[1], folder / "labels" / "final" / "nobody.nii.gz")
    (folder / "bad.nii.gz").write_bytes(b"no scan")
    before = Dataset(folder).scan("scan_1").sha256 or ""
    write_scan(draw_case(7)[0], folder / "scan_1.nii.gz")
    told = json.loads(run("scans", folder, "--json"))
    assert [f["file"] for f in told["findings"]] == ["bad.nii.gz", "labels/final/nobody.nii.gz"]
    rows = {row["scan"]: row for row in told["scans"]}
    assert (rows["scan_1"]["state"], rows["scan_1"]["estimated Dice"]) == ("unlabelled", None)
    old = rows[f"scan_1@{before[:8]}"]
    assert (old["state"], old["estimated Dice"], old["patient"]) == ("replaced", None, "scan_1")
    table = run("scans", folder)
    assert "2 files were not accepted" in table
    assert table.index("scan_0") < table.index("labels/final/nobody.nii.gz")
    done = CliRunner().invoke(main.app, ["scans", str(folder), "--csv"])
    assert "nobody" not in done.stdout
    assert "nobody" in done.stderr


@pytest.mark.parametrize(
    ("words", "terms"),
    [
        (["labels", "scan_0"], ("tags: original", "final =", "returned =", "reader-1", "version_1")),
        (["leases"], ("draw: strategy", "probability:")),
        (["costs"], ("draw: strategy", "hours:")),
    ],
)
def test_tables_tell_what_their_columns_mean_and_data_do_not(
    folder: Path, words: list[str], terms: tuple[str, ...]
) -> None:
    command, *scan = words
    table = run(command, folder, *scan)
    assert all(term in table for term in terms)
    as_json, as_csv = run(command, folder, *scan, "--json"), run(command, folder, *scan, "--csv")
    assert json.loads(as_json)
    assert not any(term in text for term in terms for text in (as_json, as_csv))


@pytest.mark.parametrize(
    "name", ["[/b]", "[bold]x[/bold]", "\x1b[31mred", "\x1b]0;title\x07", "a\rb", "\x9b2J", "\u202egnp.exe", "=1+1"]
)
def test_a_name_is_shown_as_it_is_and_reaches_no_terminal_s_controls(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "read").mkdir()
    write_labels(draw_case(1)[1], tmp_path / "read" / "scan_0.nii.gz")
    told = run("readings", folder, "scan_0", "--add", tmp_path / "read", "--reader", name)
    told += run("labels", folder, "scan_0") + run("labels", folder, "scan_0", "--csv")
    told += run("review", folder, "scan_1", "exclude", "--reason", name) + run("scans", folder)
    assert visible(name) in told
    assert not set(told) & set("\x1b\x07\r\x9b\u202e")
