"""What the store keeps of judged labels and of marks, on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from segqc.store import assessments, events, label_verdicts, labels, scans
from segqc.store.database import StoreError
from segqc.store.label_verdicts import AuditView, LabelVerdict
from segqc.store.labels import NewLabel
from segqc.store.records import LabelRecord
from segqc.store.store import Store
from tests.server_kit import make_assessment
from tests.store_kit import ANNA, BERT, Clock, bundle, label_map, make_scans, save_final, save_mask, sync_scans

COUNT = 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_scans(tmp_path / "studies", COUNT)
    return tmp_path / "studies"


@pytest.fixture
def store(folder: Path, url: str | None, clock: Clock) -> Iterator[Store]:
    opened = Store.open(folder, url, clock=clock)
    sync_scans(opened)
    yield opened
    opened.close()


def judge(store: Store, label: LabelRecord, dice: float, number: int | None = None, volume_ml: float = 5.0) -> None:
    number = bundle(store).id if number is None else number
    verdict = LabelVerdict(assessment=make_assessment(label.scan, dice, volume_ml=volume_ml), networks=2)
    with store.write() as transaction:
        label_verdicts.write(transaction, label.id, number, verdict)


def listed(store: Store, view: AuditView = "all") -> list[str]:
    with store.read() as transaction:
        return [found.scan for found in label_verdicts.listing(transaction, view)]


def mark(store: Store, scan: str, version: int | None = None) -> None:
    with store.write() as transaction:
        label_verdicts.mark_right(transaction, scan, ANNA, version=version)


def test_the_worst_label_comes_first_and_those_not_judged_come_last(store: Store, tmp_path: Path) -> None:
    finals = [save_final(store, tmp_path, f"scan_{i}", i + 1) for i in range(4)]
    for label, dice in zip(finals, (0.9, 0.4, 0.7), strict=False):
        judge(store, label, dice)
    assert listed(store) == ["scan_1", "scan_2", "scan_0", "scan_3"], "scan_4 has no final label"
    with store.read() as transaction:
        first, *_, last = label_verdicts.listing(transaction)
        assert [found.scan for found in label_verdicts.listing(transaction, start=1, limit=2)] == ["scan_2", "scan_0"]
        assert label_verdicts.counts(transaction).by_view == {"open": 3, "right": 0, "not judged": 1, "all": 4}
    assert first.verdict == LabelVerdict(assessment=make_assessment("scan_1", 0.4), networks=2)
    assert first.worst is not None and first.worst.name == "liver"
    assert first.slices == (2, 0) and first.worst_slice == 2, "the boxes' slices, the larger error sum first"
    assert last.verdict is None and last.message == label_verdicts.NOT_JUDGED and last.worst_slice is None


def test_what_has_likely_errors_comes_before_what_has_none(store: Store, tmp_path: Path) -> None:
    number = bundle(store).id
    for i, dice in enumerate((0.9, 0.5, 0.8)):
        label = save_final(store, tmp_path, f"scan_{i}", i + 1)
        made = make_assessment(label.scan, dice)
        if i == 1:
            quality = made.structures[0]
            made = replace(made, structures=(replace(quality, raw=replace(quality.raw, boxes=())),))
        with store.write() as transaction:
            label_verdicts.write(transaction, label.id, number, LabelVerdict(assessment=made, networks=1))
    assert listed(store) == ["scan_2", "scan_0", "scan_1"]


def test_of_equal_estimates_the_larger_error_comes_first(store: Store, tmp_path: Path) -> None:
    number = bundle(store).id
    for i in range(2):
        label = save_final(store, tmp_path, f"scan_{i}", i + 1)
        made = make_assessment(label.scan, 0.5)
        quality = made.structures[0]
        larger = tuple(replace(s, error_sum=s.error_sum * (1 + i)) for s in quality.raw.slices)
        made = replace(made, structures=(replace(quality, raw=replace(quality.raw, slices=larger)),))
        with store.write() as transaction:
            label_verdicts.write(transaction, label.id, number, LabelVerdict(assessment=made, networks=1))
    assert listed(store) == ["scan_1", "scan_0"]


def test_another_bundle_s_word_does_not_count(store: Store, tmp_path: Path) -> None:
    label = save_final(store, tmp_path, "scan_0", 1)
    judge(store, label, 0.4)
    bundle(store, "seg2", "qc2")
    assert listed(store, "open") == [] and listed(store, "not judged") == ["scan_0"]
    judge(store, label, 0.6)  # by the first one again, as it serves again
    assert listed(store, "open") == ["scan_0"]
    number = bundle(store).id
    with store.read() as transaction:
        assert label_verdicts.judged(transaction, number) == {label.id}


def test_a_mark_stays_until_the_label_changes(store: Store, tmp_path: Path, clock: Clock) -> None:
    label = save_final(store, tmp_path, "scan_0", 1)
    judge(store, label, 0.4)
    mark(store, "scan_0", label.id)
    made_at = clock.now
    clock.pass_(hours=1)
    mark(store, "scan_0")
    with store.read() as transaction:
        found = label_verdicts.of_scan(transaction, "scan_0")
        history = [e.verb for e in events.history(transaction, "scan", scans.get(transaction, "scan_0").id)]
    assert found is not None and found.mark is not None
    assert (found.mark.actor, found.mark.made_at) == (ANNA, made_at), "the first mark stays"
    assert history.count("label found right") == 1
    bundle(store, "seg2", "qc2")
    assert listed(store, "right") == ["scan_0"], "of whatever bundle"
    save_final(store, tmp_path, "scan_0", 2, BERT)
    assert listed(store, "right") == [] and listed(store, "not judged") == ["scan_0"]
    with pytest.raises(StoreError, match="by now, not"):
        mark(store, "scan_0", label.id)


def test_a_mark_is_taken_back(store: Store, tmp_path: Path) -> None:
    label = save_final(store, tmp_path, "scan_0", 1)
    judge(store, label, 0.4)
    mark(store, "scan_0")
    with store.write() as transaction:
        assert label_verdicts.remove_mark(transaction, "scan_0", BERT).mark is None
        label_verdicts.remove_mark(transaction, "scan_0", BERT)
    assert listed(store, "open") == ["scan_0"]


@pytest.mark.parametrize("state", ["rejected", "excluded"])
def test_labels_that_do_not_train_are_not_listed_nor_marked(store: Store, tmp_path: Path, state: str) -> None:
    judge(store, save_final(store, tmp_path, "scan_0", 1), 0.4)
    store.review("scan_0", state, ANNA, "blurred")  # type: ignore[arg-type]
    assert listed(store) == []
    with pytest.raises(StoreError, match="no final label that trains"):
        mark(store, "scan_0")


def test_a_label_that_cannot_be_judged_says_why(store: Store, tmp_path: Path) -> None:
    label = save_final(store, tmp_path, "scan_0", 1)
    number = bundle(store).id
    with store.write() as transaction:
        label_verdicts.write_problem(transaction, label.id, number, "Not judged: for a reason.")
        assert label_verdicts.judged(transaction, number) == set(), "it is tried again"
        found = label_verdicts.of_scan(transaction, "scan_0")
    assert found is not None and found.message == "Not judged: for a reason."
    judge(store, label, 0.5)
    assert listed(store, "open") == ["scan_0"]


def test_only_checked_slices_are_looked_at(store: Store, tmp_path: Path) -> None:
    label = NewLabel("scan_0", "final", "annotator", ANNA, checked_slices=(0, 1))
    kept = store.save_label(label, label_map(tmp_path / "incoming.nii.gz", 1))
    judge(store, kept, 0.4)
    with store.read() as transaction:
        found = label_verdicts.of_scan(transaction, "scan_0")
    assert found is not None and found.slices == (0,) and found.worst_slice == 0
    assert "slice 0:" in found.message and "2" not in found.message


def test_the_order_of_the_waiting_scans_stays_as_it_is(store: Store, tmp_path: Path) -> None:
    mask = save_mask(store, tmp_path, "scan_0", 1)
    number = bundle(store).id
    with store.write() as transaction:
        kept = assessments.write(transaction, make_assessment("scan_0", 0.3), mask.id, number)
    judge(store, save_final(store, tmp_path, "scan_1", 2), 0.1)
    label = save_final(store, tmp_path, "scan_0", 3)
    judge(store, label, 0.8)
    with store.read() as transaction:
        assert assessments.read(transaction, kept) == replace(
            make_assessment("scan_0", 0.3), segmenter_version="seg1", assessor_version="qc"
        ), "it is not thinned"
        assert scans.get(transaction, "scan_1").ranking_dice is None
        assert labels.current(transaction, "scan_0", "final") == label


def test_a_word_on_another_scan_s_label_is_refused(store: Store, tmp_path: Path) -> None:
    label = save_final(store, tmp_path, "scan_0", 1)
    verdict, number = LabelVerdict(assessment=make_assessment("scan_1", 0.5), networks=1), bundle(store).id
    with store.write() as transaction, pytest.raises(StoreError, match="is of the scan 'scan_0'"):
        label_verdicts.write(transaction, label.id, number, verdict)
