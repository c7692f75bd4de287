"""Attention checks: an error planted into a mask that is handed out, what becomes of it, and what is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from segqc.cli import main
from segqc.io.local_datastore import write_datastore
from segqc.loop import planted_errors
from segqc.loop.dataset import Dataset
from segqc.loop.history import versions
from segqc.loop.planted_errors import plant_error
from segqc.loop.submission import submit_label
from segqc.selection import sequential
from segqc.store import attention_checks, corrections, events, labels, leases, maintenance, scans
from segqc.store.database import StoreError
from segqc.store.events import SERVER
from segqc.store.labels import ATTENTION_CHECK, FINAL, ORIGINAL, NewLabel
from segqc.store.leases import LeaseRules
from segqc.store.records import Actor, AttentionCheck, Change, LabelRecord, LeaseRecord, StructureChange
from segqc.store.schema import LabelVersion
from segqc.store.store import LabelChange, Store
from segqc.types import LabelArray, Metrics
from segqc.volumes import Volume, read_labels
from tests.server_kit import CONFIG, assess, draw_case, make_dataset
from tests.store_kit import ANNA, BERT, Clock, label_map, make_scans, save_final, save_mask, sync_scans

NO_DRAWS = LeaseRules(audit_share=0, validation_share=0, repeat_seconds=0)


def hit(lease: int, share: float = 0.2) -> int:
    """A seed by which a lease's mask gets a planted error."""
    return next(seed for seed in range(1000) if np.random.default_rng((seed, lease, 1)).random() < share)


def settings(lease: int = 1, more: str = "") -> str:
    return CONFIG + (
        "\nvalidation_share = 0.0\n[annotation]\naudit_share = 0.0\nvalidation_share = 0.0\nattention_checks = 0.2\n"
        f"seed = {hit(lease)}\n{more}"
    )


# -------------------------------------------------------------------------------------------------------- in the store


@pytest.fixture
def store(url: str | None, clock: Clock, tmp_path: Path) -> Iterator[Store]:
    make_scans(tmp_path / "s", 8)
    opened = Store.open(tmp_path / "s", url, clock=clock)
    sync_scans(opened)
    yield opened
    opened.close()


def lend(store: Store, actor: Actor = ANNA) -> LeaseRecord:
    """The next scan with its network's mask, to an annotator."""
    with store.write() as transaction:
        lease = leases.acquire(transaction, actor, "sequential", sequential.order, NO_DRAWS)
    assert lease is not None
    return lease


def planted(store: Store, folder: Path, actor: Actor = ANNA) -> AttentionCheck:
    """A lease whose mask has an error."""
    with store.read() as transaction:
        waiting = [scan.name for scan in scans.listing(transaction) if scan.split == "train"]
    for scan in waiting:
        with store.read() as transaction:
            is_there = labels.current(transaction, scan, ORIGINAL) is not None
        if not is_there:
            save_mask(store, folder, scan, 5)
    lease = lend(store, actor)
    label = NewLabel(lease.scan, ATTENTION_CHECK, "attention check", SERVER, parent=lease.label_version)
    with store.change_labels([LabelChange(label, label_map(folder / "error.nii.gz", 7))]) as change:
        attention_checks.add(change.transaction, lease, change.versions[0], "leak")
    with store.read() as transaction:
        found = attention_checks.of_lease(transaction, lease.id)
    assert found is not None
    return found


def correct(store: Store, folder: Path, check: AttentionCheck, *, found: bool, simulated: bool = False) -> LabelRecord:
    """Answer the lease of a planted error."""
    kept = save_final(store, folder, check.lease.scan, 9, check.lease.actor)
    change = Change(
        through_plane_axis=2,
        voxels_changed=1,
        slices_changed=1,
        structures=(StructureChange(name="liver", metrics=Metrics(0.9, 0.8, 0.1, 0.0), voxels_changed=1, slices=()),),
    )
    with store.write() as transaction:
        answered = leases.submitted(transaction, check.lease)
        assert answered is not None
        attention_checks.answer(transaction, check, check.lease.actor, found=found)
        corrections.add(transaction, check.served, kept, change, check.lease.actor, lease=answered, simulated=simulated)
    return kept


def test_a_mask_with_a_planted_error_is_nobodys_label(store: Store, tmp_path: Path) -> None:
    check = planted(store, tmp_path)
    scan = check.lease.scan
    with store.read() as transaction:
        assert labels.current(transaction, scan, ORIGINAL) == check.served
        assert set(labels.tags(transaction, scan)) == {ORIGINAL}
        assert labels.all_tags(transaction) == [ORIGINAL]
        assert labels.current(transaction, scan, ATTENTION_CHECK) is None
        assert labels.current_of_all(transaction, ATTENTION_CHECK) == {}
        assert labels.mask_source(transaction, check.shown) == "network"
        assert labels.checked_slices(check.shown) == ()
        # whoever is to find it may read all this
        assert check.shown.id not in [label.id for label in labels.history(transaction, scan)]
        told = events.history(transaction, "scan", scans.number_of(transaction, scan))
        assert all((event.detail or {}).get("version") != check.shown.id for event in told)
    assert not (store.dataset / "labels" / ATTENTION_CHECK).exists()
    assert store.label_file(check.shown).is_file()
    assert [finding for finding in maintenance.check(store) if finding.is_damage] == []
    for tag in (None, FINAL):
        with pytest.raises(StoreError, match="holds an error that was planted"):
            store.restore_label(check.shown.id, ANNA, tag)


def test_only_its_annotator_gets_the_error_and_only_until_it_is_answered(store: Store, tmp_path: Path) -> None:
    check = planted(store, tmp_path)
    nobody = Actor(kind="person", name="browser 1", identified_by="cookie")
    with store.read() as transaction:
        assert attention_checks.shown_to(transaction, check.served, ANNA) == check.shown
        assert attention_checks.shown_to(transaction, check.served, BERT) == check.served
        # a client that does not say who asks: there is one open lease
        assert attention_checks.shown_to(transaction, check.served, None) == check.shown
        # nobody's label keeps the error, whoever has got it
        assert attention_checks.of_submission(transaction, check.lease.scan, nobody) == check
    kept = correct(store, tmp_path, check, found=False)
    with store.read() as transaction:
        for actor in (ANNA, BERT, None):
            assert attention_checks.shown_to(transaction, check.served, actor) == check.served
            assert attention_checks.shown_to(transaction, kept, actor) == kept
        assert attention_checks.of_submission(transaction, check.lease.scan, nobody) is None
        history = {version.label.id: version for version in versions(transaction, check.lease.scan)}
        assert not history[check.shown.id].is_current
        assert history[check.shown.id].label.source == "attention check"
        last = events.history(transaction, "scan", scans.number_of(transaction, check.lease.scan))
    told = {event.verb: event for event in last}["planted error overlooked"]
    assert told.actor == ANNA
    assert told.detail == {"lease": check.lease.id, "version": check.shown.id, "kind": "leak"}


@pytest.mark.parametrize("way", ["skipped", "expired"])
def test_an_error_that_nobody_answered_goes_to_no_other_annotator(
    store: Store, clock: Clock, tmp_path: Path, way: str
) -> None:
    check = planted(store, tmp_path)
    with store.write() as transaction:
        if way == "skipped":
            leases.skip(transaction, check.lease.scan, ANNA, "blurred")
        else:
            clock.pass_(hours=5)
            leases.expire(transaction)
    again = lend(store, BERT)
    assert again.scan == check.lease.scan
    assert again.label_version == check.served.id
    with store.read() as transaction:
        for actor in (BERT, None):
            assert attention_checks.shown_to(transaction, check.served, actor) == check.served
        assert attention_checks.of_submission(transaction, check.lease.scan, BERT) is None
        # who submits what was handed out before still submits it with the error
        assert attention_checks.shown_to(transaction, check.served, ANNA) == check.shown
        now = attention_checks.of_submission(transaction, check.lease.scan, ANNA)
        assert now is not None
        assert (now.shown, now.lease.state) == (check.shown, way)
        (attention,) = attention_checks.by_annotator(transaction)
    assert (attention.planted, attention.submitted, attention.found) == (1, 0, 0)


def test_a_lease_that_is_resumed_with_a_newer_mask_shows_that(store: Store, tmp_path: Path) -> None:
    check = planted(store, tmp_path)
    with store.write() as transaction:
        leases.skip(transaction, check.lease.scan, ANNA, "later")
    newer = save_mask(store, tmp_path, check.lease.scan, 6)
    with store.write() as transaction:
        lease = leases.resume(transaction, check.lease.scan, ANNA, NO_DRAWS)
        assert (lease.id, lease.label_version) == (check.lease.id, newer.id)
        assert attention_checks.shown_to(transaction, newer, ANNA) == newer
        assert attention_checks.shown_to(transaction, check.served, ANNA) == check.served
        now = attention_checks.of_lease(transaction, lease.id)
        assert now is not None
        attention_checks.answer(transaction, now, ANNA, found=True)
        (attention,) = attention_checks.by_annotator(transaction)
    assert attention.submitted == 0, "the annotator did not get it"


def test_what_was_found_is_counted_by_annotator(store: Store, tmp_path: Path) -> None:
    for actor, found, simulated in (
        (ANNA, True, False),
        (ANNA, False, False),
        (BERT, True, False),
        (BERT, True, True),
    ):
        correct(store, tmp_path, planted(store, tmp_path, actor), found=found, simulated=simulated)
    planted(store, tmp_path, ANNA)
    with store.read() as transaction:
        counted = attention_checks.by_annotator(transaction)
        work = {w.actor: w for w in corrections.by_annotator(transaction)}
    assert [(a.actor, a.planted, a.submitted, a.found) for a in counted] == [(ANNA, 3, 2, 1), (BERT, 1, 1, 1)]
    assert work[ANNA].attention == counted[0]


def test_an_exported_folder_is_without_the_error(store: Store, tmp_path: Path) -> None:
    check = planted(store, tmp_path)
    correct(store, tmp_path, check, found=False)
    assert maintenance.rebuild_views(store).written == 0
    assert not (store.dataset / "labels" / ATTENTION_CHECK).exists()
    write_datastore(store, tmp_path / "local")
    assert not (tmp_path / "local" / "labels" / ATTENTION_CHECK).exists()
    assert (tmp_path / "local" / "labels" / FINAL).exists()


def test_an_interrupted_change_leaves_nothing_of_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_mask(store, tmp_path, "scan_0", 5)
    label = NewLabel("scan_0", ATTENTION_CHECK, "attention check", SERVER)
    put = store.files.put

    def killed(*arguments: Any) -> None:
        put(*arguments)
        raise OSError("the disk is full")

    monkeypatch.setattr(store.files, "put", killed)
    before = set(store.files.all_objects())
    with (
        pytest.raises(OSError, match="full"),
        store.change_labels([LabelChange(label, label_map(tmp_path / "error.nii.gz", 7))]),
    ):
        pass
    assert set(store.files.all_objects()) == before
    assert not (store.dataset / "labels" / ATTENTION_CHECK).exists()


# ---------------------------------------------------------------------------------------------- planted, and undone


def dataset_with(tmp_path: Path, config: str) -> Dataset:
    dataset = Dataset(make_dataset(tmp_path / "scans", scans=2, finals=0, config=config))
    for scan in range(2):
        assess(dataset, f"scan_{scan}", 0.6 + scan / 10, worst=4, mask=draw_case(scan)[1])
    return dataset


def hand_out(dataset: Dataset, actor: Actor = ANNA) -> tuple[LeaseRecord, AttentionCheck | None]:
    with dataset.store.write() as transaction:
        lease = leases.acquire(transaction, actor, "sequential", sequential.order, dataset.settings.annotation)
    assert lease is not None
    for _ in range(2):  # twice is once
        plant_error(dataset, lease)
    with dataset.store.read() as transaction:
        return lease, attention_checks.of_lease(transaction, lease.id)


def both(dataset: Dataset, check: AttentionCheck) -> tuple[Volume, Volume]:
    """The network's mask, and the same with the error."""
    served, shown = (read_labels(dataset.store.label_file(label)) for label in (check.served, check.shown))
    return served, shown


def kept_array(dataset: Dataset, label: LabelRecord) -> LabelArray:
    array: LabelArray = read_labels(dataset.store.label_file(label)).array
    return array


def with_stroke(volume: Volume) -> LabelArray:
    """A label map with a corner marked that no error is near."""
    array = volume.array.copy()
    array[0, 0, 0] = 4
    return array


def submit(dataset: Dataset, scan: str, array: LabelArray, actor: Actor = ANNA, tag: str = FINAL) -> Any:
    return submit_label(dataset, scan, Volume(array, draw_case(0)[1].affine), tag, actor)


def test_an_error_is_planted_by_a_draw_of_the_lease(tmp_path: Path) -> None:
    dataset = dataset_with(tmp_path, settings())
    lease, check = hand_out(dataset)
    assert check is not None
    assert check.kind in planted_errors.KINDS
    served, shown = both(dataset, check)
    changed = np.count_nonzero(served.array != shown.array)
    assert 0.02 * np.count_nonzero(served.array) <= changed <= 0.5 * np.count_nonzero(served.array)
    np.testing.assert_allclose(served.affine, shown.affine)
    assert lease.label_version == check.served.id
    # the same lease of another folder gets the same error
    other = dataset_with(tmp_path / "other", settings())
    again = hand_out(other)[1]
    assert again is not None
    np.testing.assert_array_equal(both(other, again)[1].array, shown.array)


@pytest.mark.parametrize("is_same", [True, False], ids=["the same mask", "another"])
def test_a_lease_that_is_handed_out_twice_at_once_has_one_mask_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_same: bool
) -> None:
    dataset = dataset_with(tmp_path, settings())
    with dataset.store.write() as transaction:
        lease = leases.acquire(transaction, ANNA, "sequential", sequential.order, dataset.settings.annotation)
    assert lease is not None
    plan = planted_errors._planted

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(planted_errors, "_planted", plan)
        plant_error(dataset, lease)
        made = plan(*arguments)
        assert made is not None
        return made if is_same else (with_stroke(Volume(made[0], np.eye(4))), made[1])

    monkeypatch.setattr(planted_errors, "_planted", overtaken)
    plant_error(dataset, lease)
    with dataset.store.read() as transaction:
        check = attention_checks.of_lease(transaction, lease.id)
        query = select(LabelVersion.id).where(LabelVersion.source == "attention check")
        assert check is not None
        assert list(transaction.scalars(query)) == [check.shown.id]
    assert dataset.store.label_file(check.shown).is_file()
    assert len(set(dataset.store.files.all_objects())) == 3, "of two masks and the error"
    assert [finding for finding in maintenance.check(dataset.store) if finding.is_damage] == []


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_without_a_hit_the_mask_is_as_it_was(tmp_path: Path, share: float) -> None:
    seed = next(s for s in range(1000) if np.random.default_rng((s, 1, 1)).random() >= 0.1)
    config = settings().replace("attention_checks = 0.2", f"attention_checks = {share}")
    dataset = dataset_with(tmp_path, config.replace(f"seed = {hit(1)}", f"seed = {seed}"))
    assert hand_out(dataset)[1] is None


@pytest.mark.parametrize("share", [-0.1, 0.21, float("nan")])
def test_a_share_that_cannot_be_meant_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"attention_checks must be from 0 to 0\.2"):
        LeaseRules(attention_checks=share)


def test_what_measures_is_measured_on_masks_without_errors(tmp_path: Path) -> None:
    dataset = dataset_with(tmp_path, settings().replace("audit_share = 0.0", "audit_share = 1.0"))
    lease, check = hand_out(dataset)
    assert (lease.draw, check) == ("audit", None)


def test_a_label_of_a_person_gets_no_error(tmp_path: Path) -> None:
    dataset = Dataset(make_dataset(tmp_path / "scans", scans=1, finals=1, config=settings()))
    dataset.refresh()
    dataset.store.review("scan_0", "rejected", BERT, "half of it")
    lease, check = hand_out(dataset)
    assert lease.label_version is not None
    assert check is None


def test_an_error_lies_in_the_slices_that_are_asked_for(tmp_path: Path) -> None:
    dataset = dataset_with(tmp_path, settings(more="slices = 2\n"))
    lease, check = hand_out(dataset)
    assert check is not None
    assert lease.slices is not None
    served, shown = both(dataset, check)
    assert set(np.flatnonzero((served.array != shown.array).any(axis=(0, 1)))) <= set(lease.slices)
    done = submit(dataset, lease.scan, with_stroke(served))
    assert done.label.checked_slices == tuple(sorted({0, *lease.slices}))


def test_an_error_that_is_overlooked_is_undone_in_what_is_kept(tmp_path: Path) -> None:
    dataset = dataset_with(tmp_path, settings())
    lease, check = hand_out(dataset)
    assert check is not None
    served, shown = both(dataset, check)
    done = submit(dataset, lease.scan, with_stroke(shown))
    np.testing.assert_array_equal(kept_array(dataset, done.label), with_stroke(served))
    assert done.label.parent == check.served.id
    with dataset.store.read() as transaction:
        now = attention_checks.of_lease(transaction, lease.id)
        (correction,) = corrections.listing(transaction)
    assert now is not None
    assert now.found is False
    assert (correction.from_version, correction.change.voxels_changed) == (check.served.id, 1)
    # a client that missed the answer, or goes on with what it has
    assert submit(dataset, lease.scan, with_stroke(shown)).label == done.label
    further = with_stroke(shown)
    further[0, 1, 0] = 4
    more = submit(dataset, lease.scan, further)
    assert np.count_nonzero(kept_array(dataset, more.label) != served.array) == 2
    beside = submit(dataset, lease.scan, with_stroke(shown), tag="version_1")
    np.testing.assert_array_equal(kept_array(dataset, beside.label), with_stroke(served))


def test_an_error_that_is_found_counts_as_found_and_changes_nothing(tmp_path: Path) -> None:
    dataset = dataset_with(tmp_path, settings())
    lease, check = hand_out(dataset)
    assert check is not None
    truth = draw_case(0)[1].array
    done = submit(dataset, lease.scan, truth)
    np.testing.assert_array_equal(kept_array(dataset, done.label), truth)
    with dataset.store.read() as transaction:
        now = attention_checks.of_lease(transaction, lease.id)
        (correction,) = corrections.listing(transaction)
    assert now is not None
    assert now.found is True
    assert correction.change.voxels_changed == 0, "the network's mask was right"


def slices_corrected(served: LabelArray, shown: LabelArray, slices: Sequence[int]) -> LabelArray:
    """The mask with the error, in which all but one of the error's voxels were corrected in some slices."""
    array = shown.copy()
    for index in slices:
        array[..., index] = served[..., index]
        one = tuple(np.argwhere(served[..., index] != shown[..., index])[0])
        array[(*one, index)] = shown[(*one, index)]
    return array


def test_what_an_annotator_has_drawn_over_an_error_stands_slice_by_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planted_errors, "KINDS", ("missing slices",))
    monkeypatch.setattr(planted_errors, "_TARGET_DICE", (0.6, 0.7))
    dataset = dataset_with(tmp_path, settings())
    lease, check = hand_out(dataset)
    assert check is not None
    served, shown = (volume.array for volume in both(dataset, check))
    counts = np.count_nonzero(served != shown, axis=(0, 1))
    slices = [int(index) for index in np.flatnonzero(counts)]
    assert len(slices) > 1, "the test needs an error in several slices"
    smallest = min(slices, key=lambda index: counts[index])
    drawn = slices_corrected(served, shown, [smallest])
    done = submit(dataset, lease.scan, drawn)
    kept = kept_array(dataset, done.label)
    np.testing.assert_array_equal(kept[..., smallest], drawn[..., smallest])
    assert np.count_nonzero(kept != served) == 1
    with dataset.store.read() as transaction:
        now = attention_checks.of_lease(transaction, lease.id)
    assert now is not None
    assert now.found is False, "most of it was overlooked"


def test_a_scan_that_nothing_can_be_planted_into_is_handed_out_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = dataset_with(tmp_path, settings())
    monkeypatch.setattr(planted_errors, "read_scan", lambda *_, **__: (_ for _ in ()).throw(StoreError("it is gone")))
    assert hand_out(dataset)[1] is None
    assert "no error is planted into the mask of 'scan_0': it is gone" in caplog.text


def test_costs_say_how_often_errors_were_found(tmp_path: Path) -> None:
    dataset = dataset_with(tmp_path, settings())
    run = CliRunner()
    assert "planted" not in run.invoke(main.app, ["costs", str(dataset.folder)]).output
    lease, check = hand_out(dataset)
    assert check is not None
    submit(dataset, lease.scan, draw_case(0)[1].array)
    told = json.loads(run.invoke(main.app, ["costs", str(dataset.folder), "--json"]).output)
    assert told["attention_checks"] == [
        {"annotator": "anna", "known by": "client-id", "planted": 1, "submitted": 1, "found": 1}
    ]
    assert "1 of 1 planted errors found" in run.invoke(main.app, ["costs", str(dataset.folder)]).output
