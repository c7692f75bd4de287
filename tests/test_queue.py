"""The list of scans that the page shows, and what annotators have corrected, on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from segqc.split import SplitConfig
from segqc.store import assessments, corrections, labels, leases, queue, scans
from segqc.store.labels import NewLabel
from segqc.store.leases import LeaseRules
from segqc.store.orders import uniform
from segqc.store.queue import QueueView, Wanted
from segqc.store.records import Actor, Change, StructureChange
from segqc.store.store import Store
from segqc.store.sync import sync
from segqc.types import Metrics
from segqc.volumes import scan_id
from tests.server_kit import make_assessment
from tests.store_kit import ANNA, BERT, Clock, label_map, make_scans, serve_pair

VOLUME = "expected-gain"
DICE = (0.7, 0.2, None, 0.9, 0.5, None)
RULES = LeaseRules(audit_share=0.0, validation_share=0.0, repeat_seconds=0)


@pytest.fixture
def store(tmp_path: Path, url: str | None, clock: Clock) -> Iterator[Store]:
    """Six waiting scans; four have estimates with intervals."""
    make_scans(tmp_path / "data", len(DICE))
    opened = Store.open(tmp_path / "data", url, clock=clock)
    sync(opened, lambda file: f"Patient {scan_id(file)}", SplitConfig(folds=3, validation_share=0.0))
    with opened.write() as transaction:
        bundle = serve_pair(transaction, "seg", "qc")
    network = Actor(kind="network", name="seg", identified_by="program")
    for i, dice in enumerate(DICE):
        if dice is None:
            continue
        label = NewLabel(f"scan_{i}", "original", "network", network, bundle=bundle.id)
        mask = opened.save_label(label, label_map(tmp_path / f"{i}.nii.gz", i + 1))
        made = make_assessment(f"scan_{i}", dice, half_width=0.1)
        with opened.write() as transaction:
            assessments.write(transaction, made, mask.id, bundle.id)
            assessments.write_score(transaction, f"scan_{i}", VOLUME, -10 * dice, "qc", bundle=bundle.id)
    yield opened
    opened.close()


def listed(store: Store, **wanted: object) -> list[str]:
    with store.read() as transaction:
        found = queue.page(transaction, Wanted(**wanted), volume_score=VOLUME)  # type: ignore[arg-type]
    return [scan.name for scan in found.scans]


def names(*numbers: int) -> list[str]:
    return [f"scan_{i}" for i in numbers]


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [
        ({}, (1, 4, 0, 3, 2, 5)),
        ({"descending": True}, (3, 0, 4, 1, 2, 5)),
        ({"sort": "volume"}, (1, 4, 0, 3, 2, 5)),
        ({"sort": "volume", "descending": True}, (3, 0, 4, 1, 2, 5)),
        ({"sort": "scan", "descending": True}, (5, 4, 3, 2, 1, 0)),
        ({"sort": "patient"}, (0, 1, 2, 3, 4, 5)),
        ({"start": 1, "limit": 2}, (4, 0)),
        ({"start": 99}, ()),
        ({"limit": None, "search": "CAN_4"}, (4,)),
        ({"search": "patient scan_2"}, (2,)),
        ({"search": "_"}, (1, 4, 0, 3, 2, 5)),
        ({"search": "%"}, ()),
        ({"view": "submitted"}, ()),
    ],
)
def test_scans_are_listed_as_wanted(store: Store, wanted: dict[str, object], numbers: tuple[int, ...]) -> None:
    assert listed(store, **wanted) == names(*numbers)


def test_a_page_tells_of_all_that_are_wanted(store: Store) -> None:
    with store.read() as transaction:
        found = queue.page(transaction, Wanted(limit=1), volume_score=VOLUME)
    assert found.total == len(DICE)
    (scan,) = found.scans
    assert (scan.name, scan.patient, scan.state, scan.dice) == ("scan_1", "Patient scan_1", "unlabelled", 0.2)
    assert scan.interval is not None and (scan.interval.low, scan.interval.high) == pytest.approx((0.1, 0.3))
    assert scan.error_volume_ml == 2.0 and scan.assessment is not None


def test_states_and_leases_are_told_and_counted(store: Store, tmp_path: Path, clock: Clock) -> None:
    with store.write() as transaction:
        lease = leases.acquire(transaction, ANNA, "segqc", uniform, RULES)
    assert lease is not None
    clock.pass_(hours=1)
    taken = lease.scan
    others = [name for name in names(*range(6)) if name != taken]
    store.save_label(NewLabel(others[0], "final", "annotator", BERT), label_map(tmp_path / "a.nii.gz", 9))
    store.save_label(NewLabel(others[1], "final", "annotator", BERT), label_map(tmp_path / "b.nii.gz", 10))
    store.review(others[1], "approved", BERT)
    store.review(others[2], "excluded", BERT, "blurred")
    (tmp_path / "data" / f"{others[3]}.nii.gz").unlink()
    sync(store, scan_id, SplitConfig())
    assert listed(store, view="in progress") == [taken]
    assert listed(store, view="submitted") == [others[0]]
    assert listed(store, view="approved") == [others[1]]
    assert listed(store, view="excluded") == [others[2]]
    assert listed(store, view="missing") == [others[3]]
    with store.read() as transaction:
        counts = queue.counts(transaction)
        for view in get_args(QueueView):
            wanted = Wanted(view=view, limit=None)
            assert counts[view] == queue.page(transaction, wanted, volume_score=VOLUME).total, view
        page = queue.page(transaction, Wanted(view="all", sort="age", descending=True), volume_score=VOLUME)
    by_name = {scan.name: scan for scan in page.scans}
    assert by_name[taken].state == "in progress" and by_name[taken].leases[0].actor == ANNA
    assert (by_name[others[2]].state, by_name[others[2]].reason) == ("excluded", "blurred")
    assert (clock.now - by_name[others[0]].since).total_seconds() == 0, "since its label came"
    assert page.scans[-1].name in others[:2] and (clock.now - page.scans[0].since).total_seconds() == 3600
    clock.pass_(hours=10)
    assert listed(store, view="in progress") == [], "the lease is over"


def test_rejected_scans_are_listed_first_as_they_are_handed_out_first(store: Store, tmp_path: Path) -> None:
    store.save_label(NewLabel("scan_3", "final", "annotator", BERT), label_map(tmp_path / "a.nii.gz", 9))
    store.review("scan_3", "rejected", ANNA, "a gap")
    assert listed(store) == names(3, 1, 4, 0, 2, 5)
    assert listed(store, descending=True) == names(0, 4, 1, 2, 3, 5)
    assert listed(store, sort="scan") == names(0, 1, 2, 3, 4, 5)


def correct(store: Store, tmp_path: Path, actor: Actor, dice: float, *, simulated: bool = False) -> None:
    with store.write() as transaction:
        lease = leases.acquire(transaction, actor, "segqc", uniform, RULES)
        assert lease is not None and lease.label_version is not None
        start = labels.get(transaction, lease.label_version)
    value = 11 + int(100 * dice)
    label = NewLabel(lease.scan, "final", "annotator", actor, parent=start.id)
    end = store.save_label(label, label_map(tmp_path / f"{value}.nii.gz", value))
    found = Metrics(dice, dice, 0.1, 0.0)
    part = StructureChange(name="liver", metrics=found, voxels_changed=40, slices=(found,))
    change = Change(through_plane_axis=2, voxels_changed=40, slices_changed=2, structures=(part,))
    with store.write() as transaction:
        answered = leases.submitted(transaction, lease)
        corrections.add(transaction, start, end, change, actor, lease=answered, simulated=simulated)


def test_corrections_are_summed_by_annotator(store: Store, tmp_path: Path, clock: Clock) -> None:
    for i in (2, 5):  # without a mask there is nothing to correct
        with store.write() as transaction:
            scans.review(transaction, f"scan_{i}", "excluded", ANNA, "no mask")
    for actor, dice in ((ANNA, 0.5), (ANNA, 0.7), (BERT, 0.9)):
        correct(store, tmp_path, actor, dice)
        clock.pass_(minutes=1)
    robot = Actor(kind="person", name="robot", identified_by="client-id")
    correct(store, tmp_path, robot, 0.3, simulated=True)
    with store.read() as transaction:
        anna, bert = corrections.by_annotator(transaction)
        found = corrections.lines(transaction)
        assert corrections.lines(transaction, most=1) == found[:1]
        checked = corrections.checked_estimates(transaction)
        assert corrections.audited(transaction) == []
    assert (anna.actor, anna.corrections, anna.timed, anna.voxels_changed, anna.slices_changed) == (ANNA, 2, 2, 80, 4)
    assert anna.mean_dice_before == pytest.approx(0.6) and bert.mean_dice_before == pytest.approx(0.9)
    assert [line.actor for line in found] == [robot, BERT, ANNA, ANNA] and found[0].simulated
    assert (
        found[1].dice_before == pytest.approx(0.9) and found[1].estimated_dice in DICE and found[1].draw == "strategy"
    )
    assert [c.true.dice for c in checked] == pytest.approx([0.5, 0.7, 0.9])
