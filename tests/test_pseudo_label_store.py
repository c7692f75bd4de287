"""What the store knows of pseudo-labels, on both databases."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from segqc.store import corrections, labels, leases, orders, pseudo_labels, scans
from segqc.store.events import SERVER
from segqc.store.labels import FINAL, IGNORED, PSEUDO, NewLabel
from segqc.store.leases import LeaseRules
from segqc.store.records import Change, LabelRecord, LeaseRecord, StructureChange
from segqc.store.store import LabelChange, Store
from segqc.types import Metrics
from tests.store_kit import ANNA, BERT, Clock, answer_lease, label_map, make_scans, save_final, save_mask, sync_scans

NO_DRAWS = LeaseRules(audit_share=0, validation_share=0, repeat_seconds=0)


@pytest.fixture
def store(url: str | None, clock: Clock, tmp_path: Path) -> Iterator[Store]:
    make_scans(tmp_path / "s", 8)
    opened = Store.open(tmp_path / "s", url, clock=clock)
    sync_scans(opened)
    yield opened
    opened.close()


def training(store: Store) -> list[str]:
    with store.read() as transaction:
        return [scan.name for scan in scans.listing(transaction) if scan.split == "train"]


def accept(store: Store, folder: Path, scan: str, *, is_audited: bool) -> LabelRecord:
    """A mask of the scan, as a pseudo-label; returns the mask."""
    mask = save_mask(store, folder, scan, 5)
    assert mask.bundle is not None
    changes = [
        LabelChange(
            NewLabel(scan, tag, "pseudo-label", SERVER, parent=mask.id, bundle=mask.bundle.id),
            label_map(folder / f"{tag}.nii.gz", value),
        )
        for tag, value in ((PSEUDO, 5), (IGNORED, 1))
    ]
    with store.change_labels(changes) as change:
        label, ignored = change.versions
        pseudo_labels.add(
            change.transaction,
            label,
            ignored,
            dice=0.9,
            low=0.8,
            level=0.9,
            rule="a rule",
            max_error=0.5,
            is_audited=is_audited,
        )
    return mask


def accepted(store: Store) -> list[str]:
    with store.read() as transaction:
        return [record.label.scan for record in pseudo_labels.listing(transaction)]


def next_sample(store: Store, rules: LeaseRules = NO_DRAWS, actor: object = ANNA) -> LeaseRecord:
    with store.write() as transaction:
        lease = leases.acquire(transaction, actor, "uniform-random", orders.uniform, rules)  # type: ignore[arg-type]
    assert lease is not None
    return lease


def submit(
    store: Store, folder: Path, lease: LeaseRecord, dice: float | None, opened: tuple[int, ...] | None = None
) -> None:
    """A correction that shows a true Dice of the mask."""
    end = save_final(store, folder, lease.scan, 7, lease.actor)
    metrics = Metrics(dice, None, None, None)
    part = StructureChange(name="liver", metrics=metrics, voxels_changed=2, slices=(metrics,))
    better = StructureChange(name="spleen", metrics=Metrics(1.0, None, None, None), voxels_changed=0, slices=(metrics,))
    change = Change(
        through_plane_axis=2, voxels_changed=2, slices_changed=1, structures=(part, better), opened_slices=opened
    )
    with store.write() as transaction:
        answered = answer_lease(transaction, lease.scan, lease.actor)
        assert lease.label_version is not None
        corrections.add(
            transaction, labels.get(transaction, lease.label_version), end, change, lease.actor, lease=answered
        )


def audited(store: Store, rule: str | None = None) -> list[tuple[str, float]]:
    with store.read() as transaction:
        found = pseudo_labels.audited(transaction, rule=rule)
    return [(audit.scan, audit.true_dice) for audit in found]


def test_a_person_s_label_ends_it_and_its_exclusion_hides_it(store: Store, tmp_path: Path) -> None:
    first, second, third, *_ = training(store)
    for scan in (first, second, third):
        accept(store, tmp_path, scan, is_audited=False)
    assert accepted(store) == [first, second, third]
    save_final(store, tmp_path, first, 6)
    store.review(second, "excluded", ANNA, "blurred")
    assert accepted(store) == [third]
    with store.write() as transaction:
        pseudo_labels.end(transaction, third, "enough")
        pseudo_labels.end(transaction, third, "a second time changes nothing")
    with store.read() as transaction:
        every = pseudo_labels.listing(transaction, ended=True)
        assert {*pseudo_labels.left_over(transaction)} == {first, second, third}
        assert [label.tag for label in pseudo_labels.left_over(transaction)[third]] == [PSEUDO, IGNORED]
    assert [record.ended_because for record in every] == ["the scan has a final label", None, "enough"]
    # a label that is taken back does not bring it back
    store.remove_label(first, FINAL, ANNA)
    assert accepted(store) == []


def test_audits_come_before_the_strategy_s_choices_one_for_each_annotator(store: Store, tmp_path: Path) -> None:
    first, second, third, *_ = training(store)
    for scan in (first, second, third):
        accept(store, tmp_path, scan, is_audited=scan != third)
    found = [next_sample(store, actor=actor) for actor in (ANNA, BERT)]
    assert {lease.scan for lease in found} == {first, second}
    assert [(lease.draw, lease.probability) for lease in found] == [("pseudo-audit", 1.0)] * 2
    submit(store, tmp_path, found[0], 0.6)
    assert next_sample(store).draw == "strategy", "the other one is taken"
    submit(store, tmp_path, found[1], None)
    assert audited(store) == [(found[0].scan, 0.6), (found[1].scan, 1.0)]
    assert audited(store, "a rule") == audited(store)
    assert audited(store, "another rule") == [], "which may accept masks of another kind"
    with store.read() as transaction:
        assert not pseudo_labels.has_audits(transaction)


def test_a_part_of_a_scan_tells_nothing_of_the_whole(store: Store, tmp_path: Path) -> None:
    (scan, *_) = training(store)
    accept(store, tmp_path, scan, is_audited=True)
    submit(store, tmp_path, next_sample(store), 0.6, opened=(1,))
    assert audited(store) == []


def test_an_audit_is_of_the_mask_that_was_accepted(store: Store, tmp_path: Path) -> None:
    (scan, *_) = training(store)
    accept(store, tmp_path, scan, is_audited=True)
    save_mask(store, tmp_path, scan, 9, "seg2")
    assert next_sample(store).draw == "strategy", "another mask would be corrected"


def test_only_random_draws_are_audits_also_those_of_all_scans(store: Store, tmp_path: Path, clock: Clock) -> None:
    names = training(store)
    for scan in names:
        accept(store, tmp_path, scan, is_audited=False)
    by_choice = next_sample(store)
    submit(store, tmp_path, by_choice, 0.1)
    assert audited(store) == []
    drawn = next_sample(store, LeaseRules(audit_share=1.0, validation_share=0, repeat_seconds=0))
    while drawn.scan not in names:  # an audit draw of all scans may meet one without a pseudo-label
        clock.pass_(seconds=1)
        drawn = next_sample(store, LeaseRules(audit_share=1.0, validation_share=0, repeat_seconds=0))
    submit(store, tmp_path, drawn, 0.7)
    assert audited(store) == [(drawn.scan, 0.7)], "an audit draw that meets one counts, too"
    store.review(drawn.scan, "rejected", ANNA, "wrong")
    assert audited(store) == [], "a label that was rejected since says nothing"


def test_a_clock_that_is_set_back_loses_no_audit(store: Store, tmp_path: Path, clock: Clock) -> None:
    (scan, *_) = training(store)
    accept(store, tmp_path, scan, is_audited=True)
    clock.pass_(hours=-5)
    lease = next_sample(store)
    assert (lease.scan, lease.draw) == (scan, "pseudo-audit")
    clock.pass_(hours=-5)
    submit(store, tmp_path, lease, 0.7)
    assert audited(store) == [(scan, 0.7)]


def test_a_mask_that_two_annotators_correct_is_one_audit(store: Store, tmp_path: Path) -> None:
    (scan, *_) = training(store)
    accept(store, tmp_path, scan, is_audited=True)
    rules = LeaseRules(audit_share=0, validation_share=0, repeat_seconds=0, readers=2)
    found = [next_sample(store, rules, actor) for actor in (ANNA, BERT)]
    assert [(lease.scan, lease.draw) for lease in found] == [(scan, "pseudo-audit")] * 2
    submit(store, tmp_path, found[0], 0.9)
    submit(store, tmp_path, found[1], 0.6)
    assert audited(store) == [(scan, 0.6)]


def test_turned_off_they_are_not_audited(store: Store, tmp_path: Path) -> None:
    (scan, *_) = training(store)
    accept(store, tmp_path, scan, is_audited=True)
    with store.write() as transaction:
        lease = leases.acquire(transaction, ANNA, "uniform-random", orders.uniform, NO_DRAWS, pseudo_audits=False)
    assert lease is not None
    assert lease.draw == "strategy"


def test_their_whole_folder_may_be_removed(store: Store, tmp_path: Path) -> None:
    first, second, *_ = training(store)
    for scan in (first, second):
        accept(store, tmp_path, scan, is_audited=False)
    shutil.rmtree(tmp_path / "s" / "labels" / PSEUDO)
    sync_scans(store)
    assert accepted(store) == []
