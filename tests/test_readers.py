"""Several annotators on one scan: who gets what, how far they agree, and the label that is made of theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segqc.loop.dataset import Dataset
from segqc.loop.readers import add_reading, inter_rater, majority, make_consensus, readings, staple
from segqc.loop.submission import Opened, OpenedError, measure_change, submit_label
from segqc.quality.metrics import true_metrics, true_slice_metrics
from segqc.selection import segqc as worst_first
from segqc.store import corrections, events, labels, leases, scans
from segqc.store.database import StoreError
from segqc.store.records import Actor, ScanState
from segqc.types import Structure
from segqc.volumes import Volume, VolumeError, read_labels, write_labels
from tests.server_kit import AFFINE, SHAPE, assess, draw_case, make_dataset
from tests.store_kit import ANNA, BERT

LIVER = Structure("liver", (1,))
CONFIG = """
[structures]
liver = [1]
spleen = [4]
[training]
validation_share = 0.0
[annotation]
audit_share = 0.0
validation_share = 0.0
readers = 2
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    made = Dataset(make_dataset(tmp_path / "studies", scans=2, finals=0, config=CONFIG))
    for i in range(2):
        assess(made, f"scan_{i}", 0.4 + i / 10)
    return made


def hand_out(dataset: Dataset, actor: Actor) -> str:
    with dataset.store.write() as transaction:
        lease = leases.acquire(transaction, actor, "segqc", worst_first.order, dataset.settings.annotation)
    assert lease is not None
    return lease.scan


@pytest.mark.parametrize("decision", ["rejected", "unlabelled"])
def test_who_submitted_a_scan_takes_it_up_again_once_it_waits_again(tmp_path: Path, decision: ScanState) -> None:
    dataset = Dataset(make_dataset(tmp_path / "alone", scans=2, finals=0))
    dataset.refresh()
    rules = dataset.settings.annotation

    def resume() -> str:
        with dataset.store.write() as transaction:
            return leases.resume(transaction, scan, ANNA, rules).scan

    scan = hand_out(dataset, ANNA)
    submit_label(dataset, scan, shifted(0, 0), "final", ANNA)
    with pytest.raises(StoreError, match="submitted by 'anna' already"):
        resume()
    dataset.store.review(scan, decision, BERT, "again")
    assert resume() == scan
    submit_label(dataset, scan, shifted(0, 1), "final", ANNA)
    with pytest.raises(StoreError, match="submitted by 'anna' already"):
        resume()
    dataset.store.close()


def shifted(index: int, by: int) -> Volume:
    truth = draw_case(index)[1]
    return Volume(np.roll(truth.array, by, axis=0), truth.affine)


def test_two_readers_of_a_scan_are_compared_and_a_consensus_is_the_final_label(dataset: Dataset) -> None:
    assert hand_out(dataset, ANNA) == hand_out(dataset, BERT) == "scan_0"
    first = submit_label(dataset, "scan_0", shifted(0, 0), "final", ANNA)
    assert hand_out(dataset, ANNA) == "scan_1", "a reader gets a scan once"
    second = submit_label(dataset, "scan_0", shifted(0, 1), "final", BERT)
    assert [first.label.tag, second.label.tag] == ["reader-1", "reader-2"]
    with dataset.store.read() as transaction:
        assert labels.current(transaction, "scan_0", "final") is None
        assert len(corrections.listing(transaction, "scan_0")) == 2
        log = events.history(transaction, "scan", scans.get(transaction, "scan_0").id)
    compared = next(e.detail for e in log if e.verb == "readers compared")
    expected = [true_metrics(s.mask(shifted(0, 0).array), s.mask(shifted(0, 1).array)).dice for s in dataset.structures]
    assert compared == {
        "pairs": [["anna", "bert", s.name, d] for s, d in zip(dataset.structures, expected, strict=True)]
    }
    assert hand_out(dataset, Actor(kind="person", name="cleo", identified_by="client-id")) == "scan_1", (
        "two readers are enough"
    )
    made = make_consensus(dataset, "scan_0", "staple", ANNA)
    assert (made.tag, made.source) == ("final", "consensus")
    assert [c.id for c in dataset.cases()] == ["scan_0"]
    dataset.store.review("scan_0", "rejected", ANNA, "neither of them")
    assert readings(dataset, "scan_0") == []
    with dataset.store.read() as transaction:
        assert scans.get(transaction, "scan_0").state == "rejected"
        assert len(labels.history(transaction, "scan_0")) == 8, "nothing is forgotten"


def test_a_readers_own_label_can_be_chosen(dataset: Dataset, tmp_path: Path) -> None:
    for actor, by in ((ANNA, 0), (BERT, 2), (BERT, 1)):
        write_labels(shifted(0, by), tmp_path / "reading.nii.gz")
        add_reading(dataset, "scan_0", tmp_path / "reading.nii.gz", actor)
    assert [r.actor for r in readings(dataset, "scan_0")] == [ANNA, BERT]
    chosen = make_consensus(dataset, "scan_0", "bert", ANNA)
    assert np.array_equal(read_labels(dataset.store.label_file(chosen)).array, shifted(0, 1).array)
    with pytest.raises(StoreError, match="anna, bert"):
        make_consensus(dataset, "scan_0", "nobody", ANNA)
    with pytest.raises(StoreError, match="two readings"):
        make_consensus(dataset, "scan_1", "majority", ANNA)
    assert {p.structure for p in inter_rater(dataset, "scan_0")} == {"liver", "spleen"}
    write_labels(Volume(np.full(SHAPE, 7, np.uint8), AFFINE), tmp_path / "foreign.nii.gz")
    with pytest.raises(VolumeError):
        add_reading(dataset, "scan_0", tmp_path / "foreign.nii.gz", ANNA)


def test_majority_and_staple_of_three() -> None:
    truth = (np.indices((12, 12, 6)).sum(axis=0) < 12).astype(np.uint8) * 4
    rng = np.random.default_rng(0)
    readers = np.stack([np.where(rng.random(truth.shape) < error, 4 - truth, truth) for error in (0.02, 0.05, 0.3)])
    readers = readers.astype(np.uint8)
    votes = (readers == 4).sum(axis=0)
    assert np.array_equal(majority(readers), np.where(votes >= 2, 4, 0))
    wrong = [int((found != truth).sum()) for found in (majority(readers), staple(readers), readers[2])]
    assert wrong[1] <= wrong[0] < wrong[2], "STAPLE learns whom to trust"
    assert np.array_equal(majority(readers[:2]), np.where((readers[:2] == 4).all(axis=0), 4, 0)), "a tie is background"
    assert np.array_equal(staple(np.stack([truth] * 3)), truth)


def test_a_change_is_the_start_against_the_end() -> None:
    start, end = shifted(0, 0), shifted(0, 2)
    change = measure_change(start, end, (LIVER,))
    mask, truth = start.array == 1, end.array == 1
    (part,) = change.structures
    assert part.metrics == true_metrics(mask, truth)
    assert part.voxels_changed == change.voxels_changed == int((mask != truth).sum())
    assert change.slices_changed == int((mask != truth).any(axis=(0, 1)).sum())
    by_slice = true_slice_metrics(mask, truth, 2)
    assert part.slices == tuple(by_slice.at(i) for i in range(SHAPE[2]))


def test_only_what_was_opened_counts() -> None:
    start, end = shifted(0, 0), shifted(0, 2)
    spleen = Structure("spleen", (4,))
    change = measure_change(start, end, (LIVER, spleen), Opened((5, 4), ("liver",)))
    mask, truth = start.array[..., 4:6] == 1, end.array[..., 4:6] == 1
    assert [p.name for p in change.structures] == ["liver"]
    assert change.structures[0].metrics == true_metrics(mask, truth)
    assert (change.opened_slices, change.opened_structures) == ((4, 5), ("liver",))
    for opened in (Opened((SHAPE[2],)), Opened(()), Opened(None, ("kidney",))):
        with pytest.raises(OpenedError):
            measure_change(start, end, (LIVER,), opened)
