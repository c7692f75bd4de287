"""Pseudo-labels in rounds: tiny networks, and intervals as the tests want them."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from segqc.cli.main import app
from segqc.io.tables import write_tables
from segqc.loop import jobs as work
from segqc.loop import scoring
from segqc.loop.dataset import Dataset, DatasetError
from segqc.loop.pseudo_labels import (
    make_pseudo_labels,
    plan_in_words,
    plan_pseudo_labels,
    pseudo_cases,
    pseudo_label_audits,
)
from segqc.loop.requests import RoundResult, plan_of
from segqc.loop.rounds import summaries
from segqc.loop.scoring import score
from segqc.loop.submission import submit_label
from segqc.loop.training import train
from segqc.networks.assessor import AssessmentResult
from segqc.progress import NoProgress
from segqc.quality.pseudo_labels import AuditBound
from segqc.store import events, jobs, labels, leases, orders, pseudo_labels, scans
from segqc.store.events import SERVER
from segqc.store.labels import FINAL, ORIGINAL, PSEUDO, NewLabel
from segqc.store.leases import LeaseRules
from segqc.store.records import LeaseRecord, PseudoLabelRecord
from segqc.types import MetricIntervals, PredictionInterval
from segqc.volumes import Volume, read_labels, read_scan, temporary_labels, write_labels, write_scan
from tests.store_kit import ANNA, BERT
from tests.test_loop import SETTINGS, Lines, perturbed
from tests.test_loop import trained as trained  # a fixture

RULES = '\n[pseudo_labels]\nmode = "threshold"\n'


class Said:
    """The lower ends that the intervals of scans have; no interval without one."""

    def __init__(self) -> None:
        self.lows: dict[str, float] = {}

    def change(self, result: AssessmentResult) -> AssessmentResult:
        low = self.lows.get(result.assessment.scan)
        interval = None if low is None else PredictionInterval(low, 1.0, 0.9)
        qualities = tuple(
            replace(
                q, present=True, intervals=MetricIntervals(dice=interval), estimated=replace(q.estimated, dice=0.95)
            )
            for q in result.assessment.structures
        )
        return replace(result, assessment=replace(result.assessment, structures=qualities))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    said, assess = Said(), scoring.assess
    monkeypatch.setattr(scoring, "assess", lambda *a, **k: said.change(assess(*a, **k)))
    return said


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, trained: Dataset) -> Dataset:
    """The folder with both networks, and two more scans that wait; no seed decides that all patients validate."""
    folder = tmp_path_factory.mktemp("pool") / "s"
    shutil.copytree(trained.folder, folder)
    for name in ("c5", "c6"):
        shutil.copy(folder / f"{name}.nii.gz", folder / f"other-{name}.nii.gz")
    (folder / "segqc.toml").write_text(SETTINGS + RULES)
    return Dataset(folder)


def copied(pool: Dataset, folder: Path, rules: str = RULES) -> Dataset:
    shutil.copytree(pool.folder, folder)
    (folder / "segqc.toml").write_text(SETTINGS + rules)
    return Dataset(folder)


def waiting(dataset: Dataset) -> list[str]:
    """The scans that wait and may train."""
    dataset.refresh()
    with dataset.store.read() as transaction:
        return [s.name for s in scans.listing(transaction, states=("unlabelled",)) if s.split == "train"]


def accepted(dataset: Dataset, *, ended: bool = False) -> dict[str, PseudoLabelRecord]:
    with dataset.store.read() as transaction:
        return {r.label.scan: r for r in pseudo_labels.listing(transaction, ended=ended)}


def make_now(dataset: Dataset) -> None:
    """What a round does at its beginning."""
    score(dataset, "segqc", NoProgress())
    make_pseudo_labels(dataset, plan_pseudo_labels(dataset), NoProgress())


@contextlib.contextmanager
def quick(dataset: Dataset) -> Iterator[None]:
    """SegQC-Net's training gives a new version at once; the segmentation network's is a real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segqc.loop.training.train_assessor", lambda *_: perturbed(dataset.assessor()))
        patch.setattr("segqc.loop.training.draw_curve", lambda *_: None)
        yield


def run_round(dataset: Dataset, die_at: str | None = None) -> RoundResult:
    with dataset.store.write() as transaction:
        job = jobs.enqueue(transaction, "round", {"serve": True}, SERVER)
    with quick(dataset):
        if die_at is not None:
            with pytest.raises(KeyboardInterrupt):
                work.run(dataset, job, Lines(die_at))
            dataset = Dataset(dataset.folder)
        result = work.run(dataset, job, NoProgress())
    assert isinstance(result, RoundResult)
    return result


def test_a_round_chooses_trains_and_drops_pseudo_labels(pool: Dataset, tmp_path: Path, said: Said) -> None:
    dataset = copied(pool, tmp_path / "s")
    names = waiting(dataset)
    assert len(names) >= 3
    sinks, stays, low = names[:3]
    said.lows = {sinks: 0.8, stays: 0.9, low: 0.6}
    first = run_round(dataset)
    plan = plan_of(first.steps["choose pseudo-labels"])
    assert [p.scan for p in plan.chosen] == [stays, sinks], "best first"
    assert plan.refused["its estimate is below the rule"] == 1
    assert first.steps["make pseudo-labels"] == {"made": 2, "failed": {}}
    assert first.steps["train segmentation"]["pseudo_labels"] == 2
    assert first.steps["train segmentation"]["used"] == 5, "labels are counted by themselves"
    assert first.steps["train segqc"]["pseudo_labels"] == 0
    # at the end the new bundle has made and accepted them anew
    bundle = dataset.bundle()
    assert bundle is not None
    assert {p.scan for p in plan_of(first.steps["choose next pseudo-labels"]).chosen} == {stays, sinks}
    records = accepted(dataset)
    assert set(records) == {stays, sinks}
    for name, record in records.items():
        mask = dataset.mask(name)
        assert mask is not None
        assert (record.label.source, record.label.tag, record.label.parent) == ("pseudo-label", PSEUDO, mask.id)
        assert record.label.bundle is not None
        assert record.label.bundle.id == bundle.number
        assert record.label.sha256 == mask.sha256
        assert (record.dice, record.low, record.level) == (0.95, said.lows[name], 0.9)
        assert record.rule == "lower end of the estimated Dice's interval at least 0.75"
        assert (dataset.folder / "labels" / PSEUDO / f"{name}.nii.gz").is_file()
    segmenter = dataset.segmenter()
    assert segmenter is not None
    with dataset.store.read() as transaction:
        assert [(summary.labelled, summary.pseudo_labels) for summary in summaries(transaction)] == [(5, 2)]
        patients = {scans.get(transaction, name).patient for name in records}
    assert patients <= {*segmenter.card.seen}
    # an estimate sinks, and a person labels the other scan
    said.lows[sinks] = 0.5
    mask = dataset.mask(stays)
    assert mask is not None
    dataset.store.save_label(NewLabel(stays, FINAL, "annotator", ANNA), dataset.store.label_file(mask))
    assert set(accepted(dataset)) == {sinks}, "a person's label ends it at once"
    second = run_round(dataset)
    assert second.steps["train segmentation"]["pseudo_labels"] == 1
    assert second.steps["train segmentation"]["used"] == 6
    assert plan_of(second.steps["choose pseudo-labels"]).dropped == {
        stays: "a person has labelled the scan, or it waits for no label"
    }
    assert plan_of(second.steps["choose next pseudo-labels"]).dropped == {sinks: "its estimate is below the rule"}
    assert accepted(dataset) == {}
    every = accepted(dataset, ended=True)
    assert every[sinks].ended_because == "its estimate is below the rule"
    assert every[stays].ended_because == "the scan has a final label"
    with dataset.store.read() as transaction:
        versions = [v for v in labels.history(transaction, sinks) if v.tag == PSEUDO]
        told = [e.detail for e in events.history(transaction, "scan", scans.number_of(transaction, sinks))]
    assert [v.source for v in versions] == ["pseudo-label", "pseudo-label", "removal"]
    assert {"reason": "its estimate is below the rule"} in told
    assert not list((dataset.folder / "labels" / PSEUDO).glob("*.nii.gz"))


def pseudo_steps(result: RoundResult) -> dict[str, Any]:
    return {name: step for name, step in result.steps.items() if "pseudo-labels" in name}


@pytest.fixture(scope="module")
def undisturbed(pool: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, list[str]]:
    """What comes of a round that nothing interrupts."""
    said, assess = Said(), scoring.assess
    dataset = copied(pool, tmp_path_factory.mktemp("undisturbed") / "s")
    said.lows = dict.fromkeys(waiting(dataset), 0.9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "assess", lambda *a, **k: said.change(assess(*a, **k)))
        result = run_round(dataset)
    segmenter = dataset.segmenter()
    assert segmenter is not None
    return pseudo_steps(result), segmenter.version, sorted(accepted(dataset))


@pytest.mark.parametrize(
    "die_at",
    [
        "scoring by segqc: c6",
        "round: make pseudo-labels",
        "pseudo-labels: c6",
        "round: train segmentation",
        "round: choose next pseudo-labels",
        "pseudo-labels: done",
    ],
)
def test_a_killed_round_ends_with_the_same_choices_and_weights(
    pool: Dataset, tmp_path: Path, said: Said, undisturbed: tuple[dict[str, Any], str, list[str]], die_at: str
) -> None:
    dataset = copied(pool, tmp_path / "s")
    said.lows = dict.fromkeys(waiting(dataset), 0.9)
    result = run_round(dataset, die_at)
    segmenter = dataset.segmenter()
    assert segmenter is not None
    assert (pseudo_steps(result), segmenter.version, sorted(accepted(dataset))) == undisturbed


def test_turned_off_they_are_dropped_and_nothing_is_chosen(pool: Dataset, tmp_path: Path, said: Said) -> None:
    dataset = copied(pool, tmp_path / "s")
    said.lows = dict.fromkeys(waiting(dataset), 0.9)
    make_now(dataset)
    assert accepted(dataset)
    (dataset.folder / "segqc.toml").write_text(SETTINGS)
    dataset = Dataset(dataset.folder)
    assert pseudo_cases(dataset).cases == ()
    plan = plan_pseudo_labels(dataset)
    assert plan.chosen == ()
    assert {*plan.dropped.values()} == {"pseudo-labels are turned off"}
    make_pseudo_labels(dataset, plan, NoProgress())
    assert accepted(dataset) == {}


def test_without_intervals_none_is_chosen_and_it_is_told(pool: Dataset, tmp_path: Path, said: Said) -> None:
    dataset = copied(pool, tmp_path / "s")
    score(dataset, "segqc", NoProgress())
    plan = plan_pseudo_labels(dataset)
    assert (plan.chosen, plan.kept) == ((), ())
    assert plan.refused["its estimate has no interval"] == len(waiting(dataset))
    assert "no scan can be one" in plan_in_words(plan)
    assert "its estimate has no interval" in plan_in_words(plan)


def test_never_a_validation_patient_and_never_more_than_the_cap(pool: Dataset, tmp_path: Path, said: Said) -> None:
    dataset = copied(pool, tmp_path / "s", '\n[pseudo_labels]\nmode = "full"\ncap = 0.5\n')
    with dataset.store.read() as transaction:
        every = [s.name for s in scans.listing(transaction, states=("unlabelled",))]
    said.lows = dict.fromkeys(every, 0.9)
    score(dataset, "segqc", NoProgress())
    plan = plan_pseudo_labels(dataset)
    assert [p.scan for p in plan.chosen] == sorted(waiting(dataset))[: plan.supervised // 2]
    assert plan.refused.get("its patient validates", 0) == len(every) - len(waiting(dataset))


def test_ignored_voxels_are_those_that_are_probably_wrong(pool: Dataset, tmp_path: Path, said: Said) -> None:
    dataset = copied(pool, tmp_path / "s", RULES + "max_error = 0.3\n")
    name = waiting(dataset)[0]
    said.lows = {name: 0.9}
    make_now(dataset)
    (case,) = pseudo_cases(dataset).cases
    assert (case.id, case.weight) == (name, 0.95)
    bundle = dataset.bundle()
    assert bundle is not None
    assert case.ignored is not None
    scan = dataset.read_scan(dataset.scan(name))
    mask, shown, prediction = scoring.current_mask(dataset, dataset.scan(name), scan, bundle)
    assert mask.bundle is not None
    errors = scoring.assess(
        bundle, scan, shown, prediction, scan_id=name, origin=scoring.origin_of(dataset, mask, scan)
    ).errors
    np.testing.assert_array_equal(read_labels(case.ignored).array, (errors > 0.3).any(axis=0))
    assert pseudo_cases(dataset).seen == tuple(sorted({*bundle.card("segmentation").seen, *bundle.card("segqc").seen}))


def test_a_reading_ends_a_pseudo_label_and_its_scan_gets_none(pool: Dataset, tmp_path: Path, said: Said) -> None:
    dataset = copied(pool, tmp_path / "s")
    name = waiting(dataset)[0]
    said.lows = {name: 0.9}
    make_now(dataset)
    mask = dataset.mask(name)
    assert mask is not None
    dataset.store.save_label(NewLabel(name, "reader-1", "annotator", ANNA), dataset.store.label_file(mask))
    assert accepted(dataset) == {}
    plan = plan_pseudo_labels(dataset)
    assert (plan.chosen, [*plan.dropped]) == ((), [name])


def test_a_scan_that_is_labelled_after_the_plan_gets_none(pool: Dataset, tmp_path: Path, said: Said) -> None:
    dataset = copied(pool, tmp_path / "s")
    first, second = waiting(dataset)[:2]
    said.lows = {first: 0.9, second: 0.9}
    score(dataset, "segqc", NoProgress())
    plan = plan_pseudo_labels(dataset)
    mask = dataset.mask(first)
    assert mask is not None
    dataset.store.save_label(NewLabel(first, FINAL, "annotator", ANNA), dataset.store.label_file(mask))
    result = make_pseudo_labels(dataset, plan, NoProgress())
    assert result.made == 1
    assert list(result.failed) == [first]
    assert set(accepted(dataset)) == {second}


def test_a_file_that_somebody_edits_is_no_pseudo_label_any_more(pool: Dataset, tmp_path: Path, said: Said) -> None:
    dataset = copied(pool, tmp_path / "s")
    removed, edited = waiting(dataset)[:2]
    said.lows = {removed: 0.9, edited: 0.9}
    make_now(dataset)
    (dataset.folder / "labels" / PSEUDO / f"{removed}.nii.gz").unlink()
    file = dataset.folder / "labels" / PSEUDO / f"{edited}.nii.gz"
    mask = read_labels(file)
    file.unlink()
    write_labels(Volume(np.roll(mask.array, 1, axis=0), mask.affine), file)
    dataset.sync()
    assert accepted(dataset) == {}
    ended = accepted(dataset, ended=True)
    assert {record.ended_because for record in ended.values()} == {"its file was edited or removed"}
    make_now(dataset)
    assert set(accepted(dataset)) == {removed}, "the next choice may accept it again, but not over a person's work"
    np.testing.assert_array_equal(read_labels(file).array, np.roll(mask.array, 1, axis=0))


def correct(dataset: Dataset, lease: LeaseRecord, *, spoiled: bool) -> None:
    """Submit what was handed out as it is, or something else."""
    mask = dataset.mask(lease.scan)
    assert mask is not None
    start = read_labels(dataset.store.label_file(mask))
    array = np.roll(start.array, 8, axis=0) if spoiled else start.array
    submit_label(dataset, lease.scan, Volume(array, start.affine), FINAL, lease.actor)


def test_audits_go_to_people_and_bound_the_share_of_bad_ones(pool: Dataset, tmp_path: Path, said: Said) -> None:
    dataset = copied(pool, tmp_path / "s", RULES + "audit_share = 1\n")
    first, second, *_ = names = waiting(dataset)
    said.lows = {first: 0.9, second: 0.8}
    make_now(dataset)
    rules, order = dataset.settings.pseudo_labels, LeaseRules(audit_share=0, validation_share=0)
    assert pseudo_label_audits(dataset, rules) == AuditBound(0, 0, 1.0)
    found = []
    for actor, spoiled in ((ANNA, False), (BERT, True)):
        with dataset.store.write() as transaction:
            lease = leases.acquire(transaction, actor, "sequential", orders.uniform, order)
        assert lease is not None
        assert lease.draw == "pseudo-audit"
        found.append(lease.scan)
        correct(dataset, lease, spoiled=spoiled)
    assert sorted(found) == sorted([first, second])
    bound = pseudo_label_audits(dataset, rules)
    assert (bound.audited, bound.bad) == (2, 1)
    assert 0.9 < bound.bound < 1
    with dataset.store.write() as transaction:
        lease = leases.acquire(transaction, ANNA, "sequential", orders.uniform, order)
    assert lease is None or lease.draw != "pseudo-audit", "there is none left"
    assert len(names) > 2


def test_an_audit_is_of_the_very_mask_that_was_accepted(pool: Dataset, tmp_path: Path, said: Said) -> None:
    dataset = copied(pool, tmp_path / "s", RULES + "audit_share = 1\n")
    name = waiting(dataset)[0]
    said.lows = {name: 0.9}
    make_now(dataset)
    mask = dataset.mask(name)
    assert mask is not None
    start = read_labels(dataset.store.label_file(mask))
    with dataset.store.read() as transaction:
        assert pseudo_labels.has_audits(transaction)
    with temporary_labels(Volume(np.roll(start.array, 1, axis=0), start.affine)) as path:
        dataset.store.save_label(NewLabel(name, ORIGINAL, "import", SERVER), path)
    with dataset.store.write() as transaction:
        lease = leases.acquire(
            transaction, ANNA, "sequential", orders.uniform, LeaseRules(audit_share=0, validation_share=0)
        )
    assert lease is None or lease.draw == "strategy"


def test_why_a_mask_is_trusted_is_shown_and_exported(pool: Dataset, tmp_path: Path, said: Said) -> None:
    dataset = copied(pool, tmp_path / "s")
    stays, ends = waiting(dataset)[:2]
    said.lows = {stays: 0.9, ends: 0.8}
    make_now(dataset)
    mask = dataset.mask(ends)
    assert mask is not None
    dataset.store.save_label(NewLabel(ends, FINAL, "annotator", ANNA), dataset.store.label_file(mask))

    def run(*args: str) -> Any:
        result = CliRunner().invoke(app, ["pseudo-labels", str(dataset.folder), *args])
        assert result.exit_code == 0, result.output
        return result.stdout

    shown = json.loads(run("--json"))
    (row,) = shown["pseudo_labels"]
    assert (row["scan"], row["lower end"], row["bundle"]) == (stays, 0.9, 2)
    assert (shown["audited"], shown["bound"]) == (0, 1.0)
    assert "none is corrected yet" in run()
    missing = dict(shown["not_accepted"])
    assert set(waiting(dataset)) - {stays} <= set(missing) and not {stays, ends} & set(missing)
    assert shown["reasons"] == dict(Counter(missing.values()))
    for text in (run(), run("--ended")):
        assert f"{len(missing)} waiting scans have none (" in text
        assert all(f"{count}: {reason}" in text for reason, count in shown["reasons"].items())
    reasons = {row["scan"]: row["ended because"] for row in json.loads(run("--json", "--ended"))["pseudo_labels"]}
    assert reasons == {stays: None, ends: "the scan has a final label"}
    write_tables(dataset.store, tmp_path / "t", "csv")
    rows = {row["scan"]: row for row in csv.DictReader((tmp_path / "t" / "pseudo_labels.csv").open())}
    assert rows[ends]["ended_because"] == "the scan has a final label"
    assert (rows[stays]["ended_at"], rows[stays]["estimated_dice_low"], rows[stays]["mask"] != "") == ("", "0.9", True)
    sources = {row["tag"]: row["source"] for row in csv.DictReader((tmp_path / "t" / "label_versions.csv").open())}
    assert (sources["final"], sources["pseudo-label"]) == ("annotator", "pseudo-label")


def test_what_people_do_between_plan_and_make_is_never_replaced(pool: Dataset, tmp_path: Path, said: Said) -> None:
    dataset = copied(pool, tmp_path / "s")
    read, synced, unseen = waiting(dataset)[:3]
    said.lows = dict.fromkeys((read, synced, unseen), 0.9)
    score(dataset, "segqc", NoProgress())
    plan = plan_pseudo_labels(dataset)
    assert len(plan.chosen) == 3
    mask = dataset.mask(read)
    assert mask is not None
    dataset.store.save_label(NewLabel(read, "reader-1", "annotator", ANNA), dataset.store.label_file(mask))
    own = read_labels(dataset.store.label_file(mask))
    folder = dataset.folder / "labels" / PSEUDO
    folder.mkdir(parents=True)
    write_labels(Volume(np.roll(own.array, 3, axis=0), own.affine), folder / f"{synced}.nii.gz")
    dataset.sync()
    dataset.watched = True  # the watcher has not seen the next file yet
    write_labels(Volume(np.roll(own.array, 2, axis=0), own.affine), folder / f"{unseen}.nii.gz")
    before = {name: (folder / f"{name}.nii.gz").read_bytes() for name in (synced, unseen)}
    result = make_pseudo_labels(dataset, plan, NoProgress())
    assert (result.made, {*result.failed}) == (0, {read, synced, unseen})
    assert "label of their own" in result.failed[unseen]
    assert {name: (folder / f"{name}.nii.gz").read_bytes() for name in before} == before
    assert (accepted(dataset), pseudo_cases(dataset).cases) == ({}, ())


def test_turned_off_between_plan_and_make_none_is_made(pool: Dataset, tmp_path: Path, said: Said) -> None:
    dataset = copied(pool, tmp_path / "s")
    said.lows = dict.fromkeys(waiting(dataset), 0.9)
    score(dataset, "segqc", NoProgress())
    plan = plan_pseudo_labels(dataset)
    (dataset.folder / "segqc.toml").write_text(SETTINGS)
    result = make_pseudo_labels(Dataset(dataset.folder), plan, NoProgress())
    assert (result.made, {*result.failed.values()}) == (0, {"pseudo-labels are turned off."})
    assert plan.chosen


def test_a_label_that_comes_into_the_folder_trains_alone(
    pool: Dataset, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = copied(pool, tmp_path / "s")
    name, other = waiting(dataset)[:2]
    said.lows = {name: 0.9, other: 0.9}
    make_now(dataset)
    mask = dataset.mask(name)
    assert mask is not None
    shutil.copy(dataset.store.label_file(mask), dataset.folder / "labels" / FINAL / f"{name}.nii.gz")
    trained_on: list[set[str]] = []

    def fake(cases: Any, *args: Any) -> None:
        trained_on.extend([{c.id for c in cases}, {c.id for c in args[-1].cases}])
        raise KeyboardInterrupt

    monkeypatch.setattr("segqc.loop.training.train_segmentation", fake)
    with pytest.raises(KeyboardInterrupt):
        train(dataset, "segmentation", NoProgress())
    assert name in trained_on[0]
    assert trained_on[1] == {other}


def test_a_mask_that_was_deleted_and_made_anew_is_accepted_anew(pool: Dataset, tmp_path: Path, said: Said) -> None:
    dataset = copied(pool, tmp_path / "s")
    name = waiting(dataset)[0]
    said.lows = {name: 0.9}
    make_now(dataset)
    before = accepted(dataset)[name]
    (dataset.folder / "labels" / ORIGINAL / f"{name}.nii.gz").unlink()
    dataset.sync()
    make_now(dataset)
    now, mask = accepted(dataset)[name], dataset.mask(name)
    assert mask is not None
    assert (now.label.parent, now.label.sha256) == (mask.id, before.label.sha256)
    assert now.label.id != before.label.id


def test_another_scan_in_its_place_ends_it_also_where_the_first_one_is_back(
    pool: Dataset, tmp_path: Path, said: Said
) -> None:
    dataset = copied(pool, tmp_path / "s")
    name = waiting(dataset)[0]
    said.lows = {name: 0.9}
    make_now(dataset)
    file = dataset.folder / f"{name}.nii.gz"
    old, scan = file.read_bytes(), read_scan(file)
    write_scan(Volume(scan.array + 5, scan.affine), file)
    dataset.sync()
    score(dataset, "segqc", NoProgress())
    plan = plan_pseudo_labels(dataset)
    assert any(retired.startswith(f"{name}@") for retired in plan.dropped)
    file.write_bytes(old)  # while the round is interrupted
    dataset.sync()
    make_pseudo_labels(dataset, replace(plan, chosen=()), NoProgress())
    assert accepted(dataset) == {}
    assert accepted(dataset, ended=True)[name].ended_because == "another scan has taken the place of its file"
    assert not (dataset.folder / "labels" / PSEUDO / f"{name}.nii.gz").exists()


def test_a_network_s_masks_do_not_take_the_place_of_pseudo_labels(pool: Dataset, tmp_path: Path, said: Said) -> None:
    dataset = copied(pool, tmp_path / "s")
    name = waiting(dataset)[0]
    said.lows = {name: 0.9}
    make_now(dataset)
    request = {"model": "segmentation", "images": "unlabeled", "label_tag": PSEUDO}
    with dataset.store.write() as transaction:
        job = jobs.enqueue(transaction, "batch_infer", request, SERVER)
    with pytest.raises(DatasetError, match="the server keeps its own there"):
        work.run(dataset, job, NoProgress())
    assert set(accepted(dataset)) == {name}
    mask = dataset.mask(name)
    assert mask is not None
    network = NewLabel(name, PSEUDO, "network", SERVER, bundle=2)  # nobody's work, wherever it comes from
    dataset.store.save_label(network, dataset.store.label_file(mask))
    assert accepted(dataset) == {}
    make_now(dataset)
    assert set(accepted(dataset)) == {name}


def test_a_person_s_file_in_the_place_of_one_that_is_dropped_stays(pool: Dataset, tmp_path: Path, said: Said) -> None:
    dataset = copied(pool, tmp_path / "s")
    name = waiting(dataset)[0]
    said.lows = {name: 0.9}
    make_now(dataset)
    said.lows = {}
    dataset.watched = True  # the watcher has not seen it yet
    file = dataset.folder / "labels" / PSEUDO / f"{name}.nii.gz"
    mask = read_labels(file)
    file.unlink()
    write_labels(Volume(np.roll(mask.array, 1, axis=0), mask.affine), file)
    own = file.read_bytes()
    score(dataset, "segqc", NoProgress(), force=True)
    plan = plan_pseudo_labels(dataset)
    assert [*plan.dropped] == [name]
    make_pseudo_labels(dataset, plan, NoProgress())
    assert file.read_bytes() == own
    assert accepted(dataset) == {}


def test_settings_that_change_reach_what_is_accepted_already(pool: Dataset, tmp_path: Path, said: Said) -> None:
    dataset = copied(pool, tmp_path / "s", RULES + "max_error = 1.0\naudit_share = 0\n")
    name = waiting(dataset)[0]
    said.lows = {name: 0.9}
    make_now(dataset)
    before = accepted(dataset)[name]
    assert plan_pseudo_labels(dataset).kept == (name,)
    settings = dataset.folder / "segqc.toml"
    settings.write_text(SETTINGS + '[pseudo_labels]\nmode = "full"\nmax_error = 0.0\naudit_share = 1\n')
    dataset = Dataset(dataset.folder)
    make_now(dataset)
    now = accepted(dataset)[name]
    assert (before.is_audited, now.is_audited) == (False, True)
    assert (before.max_error, now.max_error, now.rule) == (1.0, 0.0, "all eligible scans")
    ignored = [read_labels(dataset.store.label_file(record.ignored)).array.sum() for record in (before, now)]
    assert ignored[0] == 0 < ignored[1]
    plan = plan_pseudo_labels(dataset)
    assert (plan.chosen, plan.kept) == ((), (name,))


def test_a_mask_that_lacks_a_structure_is_not_accepted(pool: Dataset, tmp_path: Path, said: Said) -> None:
    dataset = copied(pool, tmp_path / "s", '\n[pseudo_labels]\nmode = "full"\n')
    name = waiting(dataset)[0]
    said.lows = {name: 0.9}
    score(dataset, "segqc", NoProgress())
    assert [planned.scan for planned in plan_pseudo_labels(dataset).chosen] == [name]
    whole = dataset.assessment(name)
    assert whole is not None
    absent = replace(whole.structures[0], name="other", present=False, intervals=MetricIntervals())
    lacking = replace(whole, structures=(*whole.structures, absent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segqc.loop.pseudo_labels.assessments.latest_of_all", lambda _: {name: lacking})
        plan = plan_pseudo_labels(dataset)
    assert plan.chosen == ()
    assert plan.refused["its mask lacks a structure"] == 1
