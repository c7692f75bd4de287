"""The store's contract, on SQLite and on PostgreSQL."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError

from segqc.selection import segqc as worst_first
from segqc.selection import sequential, strategies
from segqc.split import SplitConfig, split_patients
from segqc.store import assessments, bundles, corrections, events, jobs, labels, leases, orders, scans
from segqc.store import sync_labels as label_pass
from segqc.store.database import StoreError
from segqc.store.events import SERVER
from segqc.store.labels import NewLabel
from segqc.store.leases import LeaseRules
from segqc.store.records import Actor, Change, LabelRecord, LeaseRecord, ScanState, StructureChange, TakenProposal
from segqc.store.scans import UnknownScan
from segqc.store.schema import OPEN_STATES, LeaseRow, RoundRow, Scan
from segqc.store.store import LabelChange, LabelTransaction, Store
from segqc.store.sync import sync
from segqc.types import Metrics, PredictionInterval, Unlikeness, Witnesses
from segqc.volumes import scan_id
from tests.server_kit import make_assessment
from tests.store_kit import (
    ANNA,
    BERT,
    PLACING,
    Clock,
    answer_lease,
    bundle,
    fork,
    label_map,
    make_scans,
    save_final,
    save_mask,
    sync_scans,
    write_assessment,
)

COUNT = 12
PLAIN = LeaseRules(audit_share=0.0, validation_share=0.0)


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


def take(store: Store, actor: Actor, rules: LeaseRules = PLAIN, order: orders.Order = worst_first.order) -> LeaseRecord:
    with store.write() as transaction:
        lease = leases.acquire(transaction, actor, "segqc", order, rules)
    assert lease is not None
    return lease


def in_queue(store: Store, split: str = "train") -> list[str]:
    with store.read() as transaction:
        return [s.name for s in scans.listing(transaction, states=OPEN_STATES) if s.split == split]


# ------------------------------------------------------------------------------------------------- schema and folder


def test_the_tables_are_those_of_the_classes(store: Store) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from segqc.store.schema import Base

    with store.database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_a_store_of_another_revision_is_refused(store: Store, folder: Path, url: str | None) -> None:
    with store.write() as transaction:
        transaction.execute(text("UPDATE alembic_version SET version_num = '0000'"))
    with pytest.raises(StoreError, match="segqc db upgrade"):
        Store.open(folder, url)


def test_a_read_sees_one_state(store: Store, folder: Path) -> None:
    with store.read() as transaction:
        before = scans.get(transaction, "scan_0")
        save_final(store, folder.parent, "scan_0", 3)
        transaction.expire_all()
        assert scans.get(transaction, "scan_0") == before
        assert labels.current(transaction, "scan_0", "final") is None


@pytest.mark.parametrize("address", ["mysql://root@here/store", "no url", "sqlite://"])
def test_other_databases_are_refused(folder: Path, address: str) -> None:
    with pytest.raises(StoreError):
        Store(folder, address)


def test_an_unreachable_server_is_one_sentence(folder: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError, match=r"postgresql.*cannot be used"):
        Store.open(folder, "postgresql://segqc:secret@127.0.0.1:1/store")


@pytest.mark.migrates
def test_many_processes_may_open_a_new_store_at_once(folder: Path, url: str | None) -> None:
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: Store.open(folder, url), range(8)))
    for opened in stores:
        sync_scans(opened)
        with opened.read() as transaction:
            assert len(scans.names(transaction)) == COUNT
        opened.close()


def test_scans_are_found_once(store: Store, folder: Path) -> None:
    assert sync(store, scan_id, PLACING).new_scans == 0
    (folder / "late.nrrd").touch()
    assert sync(store, scan_id, PLACING).new_scans == 1
    with store.read() as transaction:
        found = scans.listing(transaction)
    assert [s.name for s in found] == ["late", *(f"scan_{i}" for i in range(COUNT))]
    assert all(s.state == "unlabelled" for s in found)


def test_ids_do_not_collide(store: Store, folder: Path) -> None:
    for name in ("scan.nii.gz", "scan.v1.2.nii.gz", "scan.nrrd"):
        (folder / name).touch()
    sync_scans(store)
    with store.read() as transaction:
        assert {s.name for s in scans.listing(transaction)} >= {"scan", "scan.v1.2", "scan.nrrd"}


def test_a_scan_whose_file_is_gone_keeps_its_history_and_comes_back(store: Store, folder: Path) -> None:
    save_mask(store, folder.parent, "scan_3", 1)
    (folder / "scan_3.nii.gz").rename(folder.parent / "away.nii.gz")
    assert sync(store, scan_id, PLACING).missing_scans == 1
    with store.read() as transaction:
        assert scans.get(transaction, "scan_3").missing_since is not None
        assert len(labels.history(transaction, "scan_3")) == 1
    (folder.parent / "away.nii.gz").rename(folder / "scan_3.nii.gz")
    sync_scans(store)
    with store.read() as transaction:
        assert scans.get(transaction, "scan_3").missing_since is None


def test_patients_are_placed_once(store: Store, folder: Path) -> None:
    with store.read() as transaction:
        before = {s.name: (s.fold, s.split) for s in scans.listing(transaction)}
    assert Counter(split for _, split in before.values()) == {"train": 9, "validation": 3}
    (folder / "more.nii").touch()
    sync(store, scan_id, SplitConfig(folds=2, validation_share=0.9, seed=5))
    with store.read() as transaction:
        after = {s.name: (s.fold, s.split) for s in scans.listing(transaction)}
    assert {k: v for k, v in after.items() if k != "more"} == before


def test_scans_of_a_patient_share_fold_and_role(tmp_path: Path, url: str | None) -> None:
    make_scans(tmp_path / "s", 12)
    with Store.open(tmp_path / "s", url).write() as transaction:
        found = [scans.FoundScan(f"scan_{i}", f"scan_{i}.nii.gz", f"patient {i // 3}") for i in range(12)]
        scans.sync(transaction, found, PLACING, ANNA)
        groups = {(s.patient, s.fold, s.split) for s in scans.listing(transaction)}
    assert len(groups) == 4


def test_a_queue_that_is_not_the_patients_role_is_refused_by_the_database(store: Store) -> None:
    with pytest.raises(IntegrityError), store.write() as transaction:
        transaction.execute(
            text("UPDATE scan SET queue = CASE queue WHEN 'train' THEN 'validation' ELSE 'train' END WHERE id = 1")
        )


@pytest.mark.parametrize("share", [0.0, 0.15, 0.5])
def test_the_validating_share_is_kept_from_the_start(share: float) -> None:
    placed = list(split_patients([f"p{i}" for i in range(40)], split_config=SplitConfig(3, share)).values())
    for count in range(1, 41):
        validating = sum(p.split == "validation" for p in placed[:count])
        assert abs(validating - count * share) <= 0.5
    assert Counter(p.fold for p in placed) == {0: 14, 1: 13, 2: 13}


# ------------------------------------------------------------------------------------------------------------ labels


def test_a_label_is_kept_shown_and_remembered(store: Store, folder: Path) -> None:
    first = save_mask(store, folder.parent, "scan_1", 5)
    second = save_final(store, folder.parent, "scan_1", 9)
    with store.read() as transaction:
        assert labels.current(transaction, "scan_1", "original") == first
        assert labels.tags(transaction, "scan_1") == {"original": first, "final": second}
        assert scans.get(transaction, "scan_1").state == "submitted"
        assert labels.current_of_all(transaction, "final") == {"scan_1": second}
    for label in (first, second):
        assert store.label_file(label).read_bytes() == store.view_file(label).read_bytes()
    assert store.view_file(second) == folder / "labels" / "final" / "scan_1.nii.gz"


def test_every_version_stays(store: Store, folder: Path) -> None:
    versions = [save_final(store, folder.parent, "scan_0", i) for i in range(1, 5)]
    store.remove_label("scan_0", "final", BERT)
    with store.read() as transaction:
        history = labels.history(transaction, "scan_0")
        assert labels.current(transaction, "scan_0", "final") is None
        assert scans.get(transaction, "scan_0").state == "unlabelled"
    assert [h.id for h in history[:-1]] == [v.id for v in versions]
    assert (history[-1].source, history[-1].actor, history[-1].parent) == ("removal", BERT, versions[-1].id)
    assert not (folder / "labels" / "final" / "scan_0.nii.gz").exists()
    restored = store.restore_label(versions[1].id, ANNA)
    assert (restored.parent, restored.sha256) == (versions[1].id, versions[1].sha256)
    assert store.view_file(restored).read_bytes() == store.label_file(versions[1]).read_bytes()
    with store.read() as transaction:
        assert scans.get(transaction, "scan_0").state == "submitted"


def test_the_same_submission_twice_is_one_version(store: Store, folder: Path) -> None:
    first = save_final(store, folder.parent, "scan_0", 3)
    assert save_final(store, folder.parent, "scan_0", 3) == first
    assert save_final(store, folder.parent, "scan_0", 3, BERT).id != first.id


def save_proposal(store: Store, folder: Path, made_of: LabelRecord, value: int = 7) -> LabelRecord:
    network = Actor(kind="network", name="qc", identified_by="program")
    number = bundle(store, "seg1").id
    label = NewLabel(made_of.scan, "proposal", "network", network, parent=made_of.id, bundle=number)
    return store.save_label(label, label_map(folder / "incoming.nii.gz", value))


@pytest.mark.parametrize("tag", ["original", "returned", "final", "reader-2"])
def test_a_proposal_goes_with_the_label_that_it_was_made_of(store: Store, folder: Path, tag: str) -> None:
    mask, other = (save_mask(store, folder.parent, scan, 5) for scan in ("scan_0", "scan_1"))
    proposal, stays = save_proposal(store, folder.parent, mask), save_proposal(store, folder.parent, other)
    assert save_proposal(store, folder.parent, mask) == proposal, "the same once more"
    beside = NewLabel("scan_0", "version_1", "annotator", ANNA)
    store.save_label(beside, label_map(folder.parent / "incoming.nii.gz", 2))
    with store.read() as transaction:
        assert labels.current(transaction, "scan_0", "proposal") == proposal
    new = NewLabel("scan_0", tag, "annotator", ANNA)
    with store.change_labels([LabelChange(new, label_map(folder.parent / "incoming.nii.gz", 3))]) as change:
        (kept,) = change.versions
    assert (kept.tag, kept.actor) == (tag, ANNA)
    with store.read() as transaction:
        history = labels.history(transaction, "scan_0")
        assert "proposal" not in labels.tags(transaction, "scan_0")
        assert labels.tags(transaction, "scan_0")[tag] == kept
        assert labels.current(transaction, "scan_1", "proposal") == stays
    assert (history[-1].tag, history[-1].source, history[-1].actor, history[-1].parent) == (
        "proposal", "removal", SERVER, proposal.id,
    )  # fmt: skip
    assert not (folder / "labels" / "proposal" / "scan_0.nii.gz").exists()
    # the same proposal for another label is another version
    assert save_proposal(store, folder.parent, kept).parent == kept.id


def test_a_proposal_goes_with_a_removed_label(store: Store, folder: Path) -> None:
    final = save_final(store, folder.parent, "scan_0", 5)
    save_proposal(store, folder.parent, final)
    store.remove_label("scan_0", "final", ANNA)
    with store.read() as transaction:
        assert labels.tags(transaction, "scan_0") == {}


def test_what_was_taken_of_a_proposal_is_kept_with_the_label(store: Store, folder: Path) -> None:
    mask = save_mask(store, folder.parent, "scan_0", 5)
    proposal = save_proposal(store, folder.parent, mask)
    final = save_final(store, folder.parent, "scan_0", 7)
    told = TakenProposal(proposal=proposal.id, boxes_offered=3, boxes_taken=2)
    with store.write() as transaction:
        labels.note_proposal(transaction, final.id, told)
    with store.write() as transaction:  # by a client that missed the answer
        labels.note_proposal(transaction, final.id, TakenProposal(proposal=proposal.id, boxes_offered=3, boxes_taken=0))
    with store.read() as transaction:
        assert labels.taken_proposal(transaction, final.id) == told
        assert labels.taken_proposal(transaction, mask.id) is None
    with pytest.raises(IntegrityError), store.write() as transaction:
        wrong = TakenProposal(proposal=proposal.id, boxes_offered=3, boxes_taken=4)
        labels.note_proposal(transaction, mask.id, wrong)


def test_a_patient_that_is_told_later_brings_its_role_and_fold(store: Store, folder: Path) -> None:
    save_final(store, folder.parent, "scan_11", 3)
    for of in (in_queue(store)[0], in_queue(store, "validation")[0]):
        with store.read() as transaction:
            known = scans.get(transaction, of)
        for name in ("scan_5", "scan_6", "scan_11"):
            for _ in range(2):
                with store.write() as transaction:
                    scans.assign_patient(transaction, name, known.patient, PLACING, ANNA)
            with store.read() as transaction:
                scan = scans.get(transaction, name)
                (output,) = [
                    event.detail
                    for event in events.history(transaction, "scan", scan.id)
                    if event.verb == "patient assigned" and event.detail == {"patient": known.patient}
                ] or [None]
            assert (scan.patient, scan.fold, scan.split) == (known.patient, known.fold, known.split)
            assert output is not None or scan.name == of
            assert (name in in_queue(store, known.split)) == (name != "scan_11")
    with store.write() as transaction:
        scans.assign_patient(transaction, "scan_5", "nobody before", PLACING, ANNA)
        assert scans.get(transaction, "scan_5").patient == "nobody before"
        with pytest.raises(UnknownScan):
            scans.assign_patient(transaction, "unknown", "P1", PLACING, ANNA)


def test_another_final_label_of_a_submitted_scan_keeps_it_out_of_the_queue(store: Store, folder: Path) -> None:
    for value in (1, 2, 3):
        save_final(store, folder.parent, "scan_0", value)
        with store.read() as transaction:
            assert scans.get(transaction, "scan_0").state == "submitted"
    assert "scan_0" not in in_queue(store)


@pytest.mark.parametrize("table", ["event", "label_version"])
def test_history_cannot_be_changed(store: Store, folder: Path, table: str) -> None:
    save_final(store, folder.parent, "scan_0", 3)
    for statement in (f"UPDATE {table} SET actor_id = 2", f"DELETE FROM {table}"):
        with pytest.raises(DBAPIError, match="never changed"), store.write() as transaction:
            transaction.execute(text(statement))


def test_another_format_takes_the_place_of_the_first(store: Store, folder: Path) -> None:
    save_final(store, folder.parent, "scan_0", 3)
    other = label_map(folder.parent / "label.nrrd", 4)
    store.save_label(NewLabel("scan_0", "final", "annotator", BERT), other)
    assert [p.name for p in (folder / "labels" / "final").iterdir()] == ["scan_0.nrrd"]


def test_a_change_of_labels_that_fails_in_its_block_leaves_all_as_it_was(store: Store, folder: Path) -> None:
    before = save_final(store, folder.parent, "scan_0", 3)
    shown = store.view_file(before).read_bytes()
    change = LabelChange(NewLabel("scan_0", "final", "annotator", BERT), label_map(folder.parent / "next.nii.gz", 4))
    with pytest.raises(RuntimeError), store.change_labels([change]) as changing:
        assert changing.versions[0].actor == BERT
        raise RuntimeError
    with store.read() as transaction:
        assert labels.current(transaction, "scan_0", "final") == before
    assert store.view_file(before).read_bytes() == shown
    assert len(list(store.files.all_objects())) == 1


def test_what_is_checked_first_sees_the_labels_as_they_were(store: Store, folder: Path) -> None:
    before = save_final(store, folder.parent, "scan_0", 3)
    change = LabelChange(NewLabel("scan_0", "final", "annotator", BERT), label_map(folder.parent / "next.nii.gz", 4))
    with store.change_labels([change]) as changing:
        assert labels.current(changing.transaction, "scan_0", "final") == before
        (version,) = changing.versions
        assert changing.versions == [version], "a row is added once"
        assert labels.current(changing.transaction, "scan_0", "final") == version


def test_a_block_runs_once_though_somebody_has_edited_the_file(store: Store, folder: Path) -> None:
    before = save_final(store, folder.parent, "scan_0", 3)
    shutil.copyfile(label_map(folder.parent / "edit.nii.gz", 5), store.view_file(before))
    change = LabelChange(NewLabel("scan_0", "final", "annotator", BERT), label_map(folder.parent / "next.nii.gz", 4))
    runs = 0
    with store.change_labels([change]) as changing:
        runs += 1
        assert [version.actor for version in changing.versions] == [BERT], "the edit is not what was asked for"
    with store.read() as transaction:
        assert [version.source for version in labels.history(transaction, "scan_0")] == [
            "annotator", "import", "annotator",
        ]  # fmt: skip
    assert runs == 1


def test_an_arrival_whose_lock_is_about_to_be_taken_is_left_alone(store: Store) -> None:
    beginning = store.own / "incoming" / ".0123"
    beginning.mkdir(parents=True)
    (beginning / "lock").touch()
    store.recover()
    assert beginning.is_dir() and store.files.stale() == []
    os.utime(beginning, (0, 0))
    assert store.files.stale() == [beginning]
    store.recover()
    assert not beginning.exists()


def test_labels_of_unknown_scans_are_refused_and_leave_nothing(store: Store, folder: Path) -> None:
    def files() -> set[Path]:
        return {path for path in store.own.rglob("*") if path.is_file() and not path.name.startswith("store.sqlite-")}

    before = files()
    with pytest.raises(UnknownScan):
        save_final(store, folder.parent, "nobody", 3)
    assert not list(store.files.all_objects())
    assert files() == before


def test_labels_put_into_the_folder_become_versions(store: Store, folder: Path) -> None:
    label_map(folder / "labels" / "final" / "scan_2.nii.gz", 7)
    label_map(folder / "labels" / "final" / "foreign.nii.gz", 7)
    assert sync(store, scan_id, PLACING).new_labels == 1
    assert sync(store, scan_id, PLACING).new_labels == 0
    label_map(folder / "labels" / "final" / "scan_2.nii.gz", 8)
    assert sync(store, scan_id, PLACING).new_labels == 1
    (folder / "labels" / "final" / "scan_2.nii.gz").unlink()
    assert sync(store, scan_id, PLACING).removed_labels == 1
    with store.read() as transaction:
        assert [v.source for v in labels.history(transaction, "scan_2")] == ["import", "import", "removal"]
        assert scans.get(transaction, "scan_2").state == "unlabelled"


def test_a_label_file_that_was_only_touched_is_no_new_version(store: Store, folder: Path) -> None:
    label = save_final(store, folder.parent, "scan_2", 7)
    store.review("scan_2", "approved", BERT)
    os.utime(store.view_file(label), (0, 0))  # as a copy of the folder does
    assert sync(store, scan_id, PLACING).new_labels == 0
    with store.read() as transaction:
        assert labels.history(transaction, "scan_2") == [label]
        assert scans.get(transaction, "scan_2").state == "approved"


def test_a_label_that_another_process_saves_meanwhile_is_not_taken_for_a_persons(
    store: Store, folder: Path, url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save_mask(store, folder.parent, "scan_1", 5)
    save_mask(store, folder.parent, "scan_2", 5)
    other = Store.open(folder, url)
    real = store.files.views  # looked at between the rows and the files
    saved = []

    def files(place: Path, unreadable: dict[str, str]) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
        if place.name == "original" and not saved:
            saved.append(save_mask(other, folder.parent, "scan_1", 6, segmenter="seg2"))
            saved.append(save_mask(other, folder.parent, "scan_3", 7, segmenter="seg2"))
            other.remove_label("scan_2", "original", BERT)
        return listed(place, unreadable)

    listed = label_pass.visible_files
    monkeypatch.setattr(label_pass, "visible_files", files)
    (real / "original" / "x").touch()
    sync_scans(store)
    (real / "original" / "x").unlink()
    sync_scans(store)
    with store.read() as transaction:
        assert [v.id for v in labels.history(transaction, "scan_1")] == [first.id, saved[0].id]
        assert labels.history(transaction, "scan_3") == [saved[1]]
        assert [v.source for v in labels.history(transaction, "scan_2")] == ["network", "removal"]
    other.close()


@pytest.mark.parametrize("when", ["before the files", "between the files", "before the commit", "after the commit"])
def test_a_process_that_dies_in_a_submission_leaves_all_or_nothing(
    store: Store, folder: Path, url: str | None, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save_final(store, folder.parent, "scan_0", 3)
    source = label_map(folder.parent / "next.nii.gz", 4)
    dying = Store(folder, url)
    real_put, real_show = dying.files.put, dying.files._show

    def put(*arguments: object) -> object:
        if when == "before the files":
            os._exit(9)
        state = real_put(*arguments)  # type: ignore[arg-type]
        if when == "before the commit":
            os._exit(9)
        return state

    def show(*arguments: object) -> object:
        if when == "between the files":
            os._exit(9)
        return real_show(*arguments)  # type: ignore[arg-type]

    child = fork()
    if child == 0:
        try:
            dying.files.put, dying.files._show = put, show  # type: ignore[assignment,method-assign]
            if when == "after the commit":
                monkeypatch.setattr("segqc.store.files.shutil.rmtree", lambda *_, **__: os._exit(9))
            dying.save_label(NewLabel("scan_0", "final", "annotator", BERT), source)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    store.close()
    again = Store.open(folder, url)
    sync_scans(again)
    with again.read() as transaction:
        now = labels.current(transaction, "scan_0", "final")
        assert now is not None
        kept = {sha256 for sha256, _ in labels.contents(transaction)}
        assert len(labels.history(transaction, "scan_0")) == (2 if when == "after the commit" else 1)
    assert (now.id == before.id) == (when != "after the commit")
    assert again.view_file(now).read_bytes() == again.label_file(now).read_bytes()
    assert {p.name.split(".")[0] for p in again.files.all_objects()} == kept
    assert not list((again.own / "incoming").iterdir())
    again.close()


def test_content_whose_move_a_power_failure_undid_is_put_back(store: Store, folder: Path, url: str | None) -> None:
    source = label_map(folder.parent / "next.nii.gz", 4)
    with store.files.arriving(source, "scan_0", "final", ".nii.gz") as arrival:
        left = shutil.copytree(arrival.folder, arrival.folder.with_name("left"))  # of a process that is gone
    saved = store.save_label(NewLabel("scan_0", "final", "annotator", BERT), source)
    store.label_file(saved).unlink()
    store.view_file(saved).unlink()
    store.close()
    again = Store.open(folder, url)
    assert again.label_file(saved).read_bytes() == source.read_bytes() == again.view_file(saved).read_bytes()
    assert not left.exists()
    again.close()


def test_labels_may_lie_on_another_disk(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def replace_on_one_disk(source: Path, target: Path) -> None:
        if (store.files.views in Path(target).parents) != (store.files.views in Path(source).parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_on_one_disk)
    for value in (3, 4):
        saved = save_final(store, folder.parent, "scan_0", value)
        assert store.view_file(saved).read_bytes() == store.label_file(saved).read_bytes()
    sync_scans(store)
    with store.read() as transaction:
        assert labels.current(transaction, "scan_0", "final") == saved
    assert {path.name for path in (store.files.views / "final").iterdir()} == {"scan_0.nii.gz"}


def test_a_change_that_is_still_going_on_is_not_cleaned_up(store: Store, folder: Path, url: str | None) -> None:
    source = label_map(folder.parent / "next.nii.gz", 4)
    with store.files.arriving(source, "scan_0", "final", ".nii.gz") as arrival:
        Store.open(folder, url).close()
        assert (arrival.folder / "object").is_file()


# ------------------------------------------------------------------------------------------- assessments and scores


def test_an_assessment_comes_back_without_loss(store: Store, folder: Path) -> None:
    mask = save_mask(store, folder.parent, "scan_1", 5)
    written = replace(make_assessment("scan_1", 0.7, half_width=0.1), segmenter_version="seg1", backend="openvino")
    known = replace(written.structures[0], witnesses=Witnesses(0.9, -0.2, -1.5))
    written = replace(written, structures=(known, *written.structures[1:]), mask_kind="served")
    written = replace(written, unlikeness=Unlikeness(1.25, 0.4))
    assert written.structures[0].intervals.rvd is None
    with store.write() as transaction:
        number = write_assessment(transaction, written, mask.id)
    with store.read() as transaction:
        assert assessments.ranking_intervals(transaction) == {"scan_1": written.dice_interval}
        assert assessments.read(transaction, number) == written
        assert assessments.latest(transaction, "scan_1") == (number, written)
        assert scans.get(transaction, "scan_1").ranking_dice == 0.7
        assert mask.bundle is not None
        assert assessments.of_bundle(transaction, mask.id, mask.bundle.id) == written
        assert assessments.of_bundle(transaction, mask.id, mask.bundle.id + 1) is None


def test_the_interval_of_a_marked_scan_comes_back_as_one_that_does_not_apply(store: Store, folder: Path) -> None:
    mask = save_mask(store, folder.parent, "scan_1", 5)
    written = make_assessment("scan_1", 0.7, half_width=0.1, unlikeness=Unlikeness(2.5, 0.05))
    with store.write() as transaction:
        number = write_assessment(transaction, written, mask.id)
    with store.read() as transaction:
        back = assessments.read(transaction, number)
        assert back is not None and (back.structures, back.unlikeness) == (written.structures, written.unlikeness)
        assert assessments.marked(transaction) == {"scan_1"}
        shown = [assessments.ranking_intervals(transaction)["scan_1"], back.dice_interval]
        shown += assessments.dice_intervals(transaction, [number]).values()
    assert shown == [PredictionInterval(pytest.approx(0.6), pytest.approx(0.8), 0.9, applies=False)] * 3


def test_the_interval_is_that_of_the_ranking_estimate_not_of_an_equal_one(store: Store, folder: Path) -> None:
    mask = save_mask(store, folder.parent, "scan_1", 5)
    final = save_final(store, folder.parent, "scan_1", 6)
    ranking, other = (make_assessment("scan_1", 0.7, half_width=width) for width in (0.1, 0.2))
    with store.write() as transaction:
        write_assessment(transaction, ranking, mask.id)
        write_assessment(transaction, other, final.id)
    with store.read() as transaction:
        assert assessments.ranking_intervals(transaction) == {"scan_1": ranking.dice_interval}


def test_a_new_mask_is_not_ranked_by_the_old_ones_estimate(store: Store, folder: Path) -> None:
    mask = save_mask(store, folder.parent, "scan_1", 5)
    with store.write() as transaction:
        write_assessment(transaction, make_assessment("scan_1", 0.7), mask.id)
    save_mask(store, folder.parent, "scan_1", 6, segmenter="seg2")
    with store.read() as transaction:
        assert scans.get(transaction, "scan_1").ranking_dice is None
        assert assessments.latest(transaction, "scan_1") is None


def test_old_assessments_are_thinned_unless_they_were_shown(store: Store, folder: Path) -> None:
    mask = save_mask(store, folder.parent, "scan_1", 5)
    versions = [replace(make_assessment("scan_1", 0.5), assessor_version=f"qc{i}") for i in range(3)]
    with store.write() as transaction:
        first = write_assessment(transaction, versions[0], mask.id)
    assert take(store, ANNA).assessment == first
    with store.write() as transaction:
        second = write_assessment(transaction, versions[1], mask.id)
        third = write_assessment(transaction, versions[2], mask.id)
    with store.read() as transaction:
        assert [assessments.read(transaction, i) is not None for i in (first, second, third)] == [True, False, True]


def test_what_is_said_of_peoples_labels_stays_whole_and_ranks_nothing(store: Store, folder: Path) -> None:
    mask = save_mask(store, folder.parent, "scan_1", 5)
    of_mask, of_label = make_assessment("scan_1", 0.5), replace(make_assessment("scan_1", 0.9), mask_kind="person")
    with store.write() as transaction:
        write_assessment(transaction, of_mask, mask.id)
    first, second = (save_final(store, folder.parent, "scan_1", value) for value in (6, 7))
    with store.write() as transaction:
        numbers = [write_assessment(transaction, of_label, label.id) for label in (first, second)]
        later = write_assessment(transaction, replace(of_label, assessor_version="qc2"), first.id)
    with store.read() as transaction:
        found = assessments.of_people(transaction, "scan_1")
        assert all(assessments.read(transaction, number) is not None for number in (*numbers, later))
        assert {version: assessment.assessor_version for version, (_, assessment) in found.items()} == {
            first.id: "qc2",
            second.id: of_label.assessor_version,
        }
        assert assessments.of_people(transaction, "scan_2") == {}
        kept = assessments.of_bundle(transaction, mask.id, found[second.id][0])
        assert kept is not None and kept.mask_kind == "strange", "a label's assessment thins no other"
        assert 0.9 not in (scans.get(transaction, "scan_1").ranking_dice,)


def test_the_interval_of_a_scan_is_the_worst_present_structures(store: Store, folder: Path) -> None:
    narrow = make_assessment("scan_1", 0.8, half_width=0.05).structures[0]
    wide = make_assessment("scan_1", 0.6, half_width=0.3).structures[0]
    absent = replace(make_assessment("scan_1", 0.1, half_width=0.01).structures[0], name="spleen", present=False)
    parts = (narrow, replace(wide, name="kidney"), absent)
    output, silent = save_mask(store, folder.parent, "scan_1", 5), save_mask(store, folder.parent, "scan_2", 6)
    written = replace(make_assessment("scan_1", 0.8), structures=parts)
    with store.write() as transaction:
        numbers = [
            write_assessment(transaction, written, output.id),
            write_assessment(transaction, make_assessment("scan_2", 0.7), silent.id),
        ]
    with store.read() as transaction:
        assert assessments.ranking_intervals(transaction) == {"scan_1": wide.intervals.dice, "scan_2": None}
        assert assessments.dice_intervals(transaction, numbers) == dict(
            zip(numbers, (written.dice_interval, None), strict=True)
        )
        assert assessments.dice_intervals(transaction, []) == {}
    assert written.dice_interval == wide.intervals.dice


def test_an_assessment_of_another_scans_mask_is_refused(store: Store, folder: Path) -> None:
    mask = save_mask(store, folder.parent, "scan_1", 5)
    with pytest.raises(StoreError, match="scan_1"), store.write() as transaction:
        write_assessment(transaction, make_assessment("scan_2", 0.7), mask.id)


def test_scores_are_replaced(store: Store) -> None:
    bundle(store, "b")
    for value, version in ((0.4, "a"), (0.6, "b")):
        with store.write() as transaction:
            assessments.write_score(transaction, "scan_1", "tta", value, version)
    with store.read() as transaction:
        assert assessments.scores(transaction, "tta") == {"scan_1": (0.6, "b")}


def test_only_scores_of_the_serving_bundle_and_of_the_current_mask_order_scans(store: Store, folder: Path) -> None:
    old = bundle(store, "seg1")
    save_mask(store, folder.parent, "scan_1", 5)
    with store.write() as transaction:
        assessments.write_score(transaction, "scan_1", "tta", 0.4, "seg1")
        assessments.write_score(transaction, "scan_1", "expected-gain", -0.4, "qc", bundle=old.id)

    def scored() -> list[bool]:
        with store.read() as transaction:
            listed = [bool(assessments.scores(transaction, method)) for method in ("tta", "expected-gain")]
            assert listed == [assessments.has_score(transaction, "scan_1", m) for m in ("tta", "expected-gain")]
        for (method, actor), expected in zip((("tta", ANNA), ("expected-gain", BERT)), listed, strict=True):
            with store.write() as transaction:
                lease = leases.acquire(transaction, actor, method, strategies()[method].order, PLAIN)
                assert lease is not None
                assert lease.strategy == (method if expected else "uniform-random")
                leases.release(transaction, lease.scan, SERVER)
        return listed

    assert scored() == [True, True]
    bundle(store, "seg1", "qc2")
    assert scored() == [True, False], "the same segmentation network serves"
    bundle(store, "seg2", "qc2")
    assert scored() == [False, False]
    with store.write() as transaction:
        bundles.serve(transaction, old.id, SERVER)
    assert scored() == [True, True]
    save_final(store, folder.parent, "scan_1", 3)
    store.remove_label("scan_1", "final", ANNA)
    assert scored() == [True, True], "the mask is the same"
    store.save_label(NewLabel("scan_1", "original", "import", ANNA), label_map(folder.parent / "incoming.nii.gz", 7))
    assert scored() == [True, False], "another mask"


# ------------------------------------------------------------------------------------------------------------ leases


def assess_all(store: Store, folder: Path) -> None:
    """Estimates that fall with the scan's number: the last one is the worst."""
    for i in range(COUNT):
        mask = save_mask(store, folder.parent, f"scan_{i}", i + 1)
        with store.write() as transaction:
            write_assessment(transaction, make_assessment(f"scan_{i}", 0.9 - i / 100), mask.id)


def test_two_annotators_get_different_scans_worst_first(store: Store, folder: Path) -> None:
    assess_all(store, folder)
    worst = in_queue(store)[::-1]
    a, b = take(store, ANNA), take(store, BERT)
    assert [a.scan, b.scan] == worst[:2]
    assert (a.draw, a.probability, a.score) == ("strategy", None, pytest.approx(0.9 - int(a.scan[5:]) / 100))
    with store.read() as transaction:
        shown = assessments.read(transaction, a.assessment or 0)
    assert shown is not None
    assert shown.dice == a.score


def test_asked_again_soon_it_is_the_same_scan_and_later_it_is_a_skip(store: Store, folder: Path, clock: Clock) -> None:
    assess_all(store, folder)
    first = take(store, ANNA)
    clock.pass_(seconds=29)
    assert take(store, ANNA) == first
    clock.pass_(seconds=2)
    second = take(store, ANNA)
    assert second.scan != first.scan
    assert take(store, BERT).scan == first.scan  # others may have it at once
    with store.read() as transaction:
        assert [lease.state for lease in leases.listing(transaction, scan=first.scan)] == ["skipped", "open"]


def test_a_skipped_scan_comes_back_after_the_others_or_after_its_time(store: Store, clock: Clock) -> None:
    seen = []
    for _ in range(COUNT + 1):
        seen.append(take(store, ANNA, order=sequential.order).scan)
        clock.pass_(minutes=1)
    assert len(set(seen[:COUNT])) == COUNT
    assert seen[COUNT] in seen[:COUNT]
    clock.pass_(hours=25)
    assert take(store, ANNA, order=sequential.order).scan == in_queue(store)[0]


def test_an_expired_lease_goes_back(store: Store, clock: Clock) -> None:
    first = take(store, ANNA, order=sequential.order)
    clock.pass_(minutes=PLAIN.lease_minutes + 1)
    assert take(store, BERT, order=sequential.order).scan == first.scan
    cookie = Actor(kind="person", name="browser 1", identified_by="cookie")
    short = take(store, cookie, order=sequential.order)
    assert (short.expires_at - short.handed_out_at).total_seconds() == PLAIN.cookie_lease_minutes * 60


def test_with_nothing_left_there_is_no_lease(store: Store, folder: Path) -> None:
    for i in range(COUNT):
        save_final(store, folder.parent, f"scan_{i}", i + 1)
    with store.write() as transaction:
        assert leases.acquire(transaction, ANNA, "segqc", worst_first.order, PLAIN) is None


def test_many_at_once_never_share_a_scan(store: Store) -> None:
    people = [Actor(kind="person", name=f"annotator {i}", identified_by="client-id") for i in range(8)]
    start = threading.Barrier(8)

    def ask(actor: Actor) -> str:
        start.wait()
        return take(store, actor).scan

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, people))) == 8


def test_two_open_leases_of_one_place_are_refused_by_the_database(store: Store) -> None:
    lease = take(store, ANNA)
    with pytest.raises(IntegrityError), store.write() as transaction:
        first = transaction.get_one(LeaseRow, lease.id)
        values = {c.key: getattr(first, c.key) for c in LeaseRow.__table__.columns if c.key != "id"}
        transaction.add(LeaseRow(**{**values, "actor_id": events.actor_id(transaction, BERT)}))
        transaction.flush()


def test_every_reader_gets_a_scan_once(store: Store, folder: Path) -> None:
    rules = replace(PLAIN, readers=2)
    a, b = take(store, ANNA, rules, sequential.order), take(store, BERT, rules, sequential.order)
    assert (a.scan, a.slot, b.slot) == (b.scan, 0, 1)
    third = Actor(kind="person", name="cleo", identified_by="client-id")
    assert take(store, third, rules, sequential.order).scan != a.scan
    with store.write() as transaction:
        assert answer_lease(transaction, a.scan, ANNA) is not None
    assert take(store, ANNA, rules, sequential.order).scan != a.scan


def test_a_hand_out_is_answered_once(store: Store) -> None:
    """Of two submissions that were measured at the same time one closes the lease, whatever both have read before."""
    lease = take(store, ANNA, PLAIN, sequential.order)
    with store.write() as transaction:
        first = leases.submitted(transaction, lease)
    assert first is not None
    assert first.state == "submitted"
    with store.write() as transaction:
        assert leases.submitted(transaction, lease) is None
        assert transaction.get_one(Scan, scans.number_of(transaction, lease.scan)).readings == 1


def test_a_change_is_seen_by_objects_of_the_same_transaction(store: Store) -> None:
    with store.write() as transaction:
        row = transaction.get_one(Scan, scans.number_of(transaction, "scan_1"))
        assert row.ranking_dice is None
        scans.rank(transaction, row.id, 0.25, True)
        assert (row.ranking_dice, row.foreground) == (0.25, True)
        row.ranking_dice = 0.5
        scans.set_state(transaction, scans.get(transaction, "scan_1"), "excluded", ANNA, "a test")
        assert (row.ranking_dice, row.state, row.queue) == (0.5, "excluded", None)


def test_audit_draws_are_uniform_among_all_waiting_scans(store: Store, clock: Clock) -> None:
    rules = LeaseRules(audit_share=1.0, validation_share=0.0, repeat_seconds=0, skip_hours=0)
    drawn = Counter()
    for _ in range(120):
        lease = take(store, ANNA, rules)
        assert (lease.draw, lease.probability, lease.pool) == ("audit", 1.0, COUNT)
        drawn[lease.scan] += 1
        clock.pass_(seconds=1)
    assert len(drawn) == COUNT
    expected = 120 / COUNT
    # chi-square with 11 degrees of freedom: above 31.3 once in a thousand; the draws are seeded
    assert sum((n - expected) ** 2 / expected for n in drawn.values()) < 31.3


def test_shares_of_audits_and_validation_scans_are_kept(store: Store, folder: Path, clock: Clock) -> None:
    assess_all(store, folder)
    rules = LeaseRules(audit_share=0.2, validation_share=0.3, repeat_seconds=0, skip_hours=0)
    draws = Counter()
    validating = set(in_queue(store, "validation"))
    for _ in range(150):
        lease = take(store, ANNA, rules)
        draws[lease.draw] += 1
        assert lease.draw == "audit" or (lease.scan in validating) == (lease.draw == "validation")
        clock.pass_(seconds=1)
    assert 18 <= draws["audit"] <= 42
    assert 30 <= draws["validation"] <= 60


def test_draws_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    def run(name: str, seed: int) -> list[str]:
        make_scans(tmp_path / name, COUNT)
        clock = Clock()
        opened = Store.open(tmp_path / name, clock=clock)
        sync_scans(opened)
        rules = LeaseRules(audit_share=0.5, validation_share=0.3, repeat_seconds=0, seed=seed)
        seen = []
        for _ in range(COUNT):
            seen.append(take(opened, ANNA, rules).scan)
            clock.pass_(seconds=1)
        return seen

    assert run("a", 1) == run("b", 1) != run("c", 2)


@pytest.mark.parametrize("rules", [{"audit_share": 0.9, "validation_share": 0.2}, {"readers": 0}, {"lease_minutes": 0}])
def test_rules_that_cannot_be_meant_are_refused(rules: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        LeaseRules(**rules)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ corrections and review


def change(dice: float) -> Change:
    metrics = Metrics(dice, dice / (2 - dice), None, -0.1)
    part = StructureChange(
        name="liver", metrics=metrics, voxels_changed=40, slices=(metrics, Metrics(None, None, None, None))
    )
    return Change(through_plane_axis=2, voxels_changed=40, slices_changed=1, structures=(part,), opened_slices=(0, 1))


PART = change(0.8)


def submit(store: Store, folder: Path, scan: str, actor: Actor, value: int, change: Change = PART) -> int:
    source = label_map(folder.parent / "submitted.nii.gz", value)
    with store.change_labels([LabelChange(NewLabel(scan, "final", "annotator", actor), source)]) as changing:
        lease = answer_lease(changing.transaction, scan, actor)
        assert lease is not None
        start = labels.get(changing.transaction, lease.label_version or 0)
        return corrections.add(changing.transaction, start, changing.versions[0], change, actor, lease=lease)


def test_only_audit_draws_of_whole_scans_check_the_estimates(store: Store, folder: Path, clock: Clock) -> None:
    for i in range(COUNT):
        mask = save_mask(store, folder.parent, f"scan_{i}", i + 1)
        with store.write() as transaction:
            write_assessment(transaction, make_assessment(f"scan_{i}", 0.5 + i / 100, half_width=0.1), mask.id)
    audits = LeaseRules(audit_share=1.0, validation_share=0.0)
    whole = replace(PART, opened_slices=None)
    audited = [take(store, ANNA, audits).scan]
    submit(store, folder, audited[0], ANNA, 21, whole)
    part = take(store, ANNA, audits).scan
    submit(store, folder, part, ANNA, 22)
    audited.append(take(store, ANNA, audits).scan)
    submit(store, folder, audited[1], ANNA, 23, whole)
    with store.read() as transaction:
        found = corrections.audited(transaction)
        assert corrections.audited(transaction, simulated=True) == []
    assert [c.scan for c in found] == audited
    for checked in found:
        dice = 0.5 + int(checked.scan.removeprefix("scan_")) / 100
        said = make_assessment(checked.scan, dice, half_width=0.1).structures[0]
        assert (checked.patient, checked.structure) == (checked.scan, "liver")
        assert (checked.segmenter_version, checked.assessor_version) == ("seg1", "qc")
        assert (checked.estimated, checked.intervals) == (said.estimated, said.intervals)
        assert checked.true == PART.structures[0].metrics
    store.review(audited[0], "rejected", ANNA, "not good")  # in the same second
    store.review(audited[1], "excluded", ANNA, "moved")
    with store.read() as transaction:
        assert corrections.audited(transaction) == []


def test_a_clock_that_is_set_back_loses_no_audit(store: Store, folder: Path, clock: Clock) -> None:
    for i in range(COUNT):
        save_mask(store, folder.parent, f"scan_{i}", i + 1)
        if i:
            store.review(f"scan_{i}", "excluded", ANNA, "one is enough")
    audits, whole = LeaseRules(audit_share=1.0, validation_share=0.0), replace(PART, opened_slices=None)
    for value in (21, 22):
        clock.pass_(hours=-5)
        submit(store, folder, take(store, ANNA, audits).scan, ANNA, value, whole)
        with store.read() as transaction:
            assert [mask.scan for mask in corrections.audited_masks(transaction, "seg1")] == ["scan_0"]
        store.remove_label("scan_0", "final", ANNA)  # in the same second
        with store.read() as transaction:
            assert corrections.audited_masks(transaction, "seg1") == [], "it waits again"


def test_a_correction_remembers_what_was_shown_at_hand_out(store: Store, folder: Path, clock: Clock) -> None:
    assess_all(store, folder)
    lease = take(store, ANNA)
    clock.pass_(minutes=12)
    with store.write() as transaction:  # a later estimate must not take the place of the one that was shown
        later = replace(make_assessment(lease.scan, 0.99), assessor_version="later")
        write_assessment(transaction, later, lease.label_version or 0)
    submit(store, folder, lease.scan, ANNA, 40)
    with store.read() as transaction:
        (found,) = corrections.listing(transaction)
        end = labels.current(transaction, lease.scan, "final")
    assert end is not None
    assert (found.scan, found.from_version, found.to_version) == (lease.scan, lease.label_version, end.id)
    assert (found.assessment, found.seconds, found.actor) == (lease.assessment, 720.0, ANNA)
    assert found.change == change(0.8)
    assert found.lease is not None
    assert found.lease.state == "submitted"


def test_what_was_checked_of_a_label_stays_with_it(store: Store, folder: Path) -> None:
    def save(value: int, checked: tuple[int, ...] | None) -> LabelRecord:
        label = NewLabel("scan_0", "final", "annotator", ANNA, checked_slices=checked)
        return store.save_label(label, label_map(folder.parent / "next.nii.gz", value))

    def current(tag: str) -> LabelRecord:
        with store.read() as transaction:
            found = labels.current(transaction, "scan_0", tag)
        assert found is not None
        return found

    first = save(1, (0, 2))
    assert first == current("final")
    assert first.checked_slices == (0, 2)
    assert save(1, (0, 2)).id == first.id, "the same once more"
    more = save(1, (0, 1, 2))
    assert more.id != first.id, "nothing was changed, and more was looked at"
    whole = save(1, None)
    assert (whole.id > more.id, current("final").checked_slices) == (True, None)
    assert store.restore_label(first.id, BERT).checked_slices == (0, 2)
    store.review("scan_0", "unlabelled", BERT)
    assert (current("returned").source, current("returned").checked_slices) == ("restored", (0, 2))
    with store.read() as transaction:
        checked = [version.checked_slices for version in labels.history(transaction, "scan_0")]
    assert checked == [(0, 2), (0, 1, 2), None, (0, 2), (0, 2), None], "a removal has none"
    mask = save_mask(store, folder.parent, "scan_0", 3)
    assert labels.checked_slices(mask) == (), "nobody has looked at a mask"
    with pytest.raises(IntegrityError), store.write() as transaction:
        labels.add(transaction, NewLabel("scan_0", "x", "network", SERVER, "0", ".nii", None, 1, checked_slices=(1,)))


def test_a_lease_asks_for_the_slices_with_the_most_likely_errors(store: Store, folder: Path, clock: Clock) -> None:
    rules = replace(PLAIN, slices=3)
    assert take(store, ANNA, rules, sequential.order).slices is None, "nothing is known of any slice"
    clock.pass_(minutes=1)
    assess_all(store, folder)
    lease = take(store, ANNA, rules)
    assert lease.slices == (2, 8, 9)
    with store.read() as transaction:
        assert leases.listing(transaction, state="open") == [lease]
    with store.write() as transaction:
        leases.skip(transaction, lease.scan, ANNA, "later")
        assert leases.resume(transaction, lease.scan, ANNA, rules).slices == (2, 8, 9)
        assert leases.resume(transaction, lease.scan, ANNA, rules).slices == (2, 8, 9)
    assert take(store, BERT, replace(rules, slices=10)).slices is None, "these are all of them"
    for draws in (replace(rules, audit_share=1.0), replace(rules, validation_share=1.0)):
        clock.pass_(minutes=1)
        assert take(store, BERT, draws).slices is None, "a test is of the whole scan"
    with pytest.raises(ValueError, match="slices"):
        replace(PLAIN, slices=-1)


@pytest.mark.parametrize("state", ["unlabelled", "rejected"])
def test_what_was_sent_back_is_asked_for_as_a_whole(store: Store, folder: Path, state: ScanState) -> None:
    scan, rules = in_queue(store)[0], replace(PLAIN, slices=2)
    label = NewLabel(scan, "final", "annotator", BERT, checked_slices=(2, 9))
    store.save_label(label, label_map(folder.parent / "next.nii.gz", 3))
    store.review(scan, state, BERT, "the upper pole is missing")
    with store.write() as transaction:
        start = labels.start_of(transaction, scan)
        assert start is not None
        write_assessment(transaction, make_assessment(scan, 0.01), start.id)
    lease = take(store, ANNA, rules)
    assert (lease.scan, lease.label_version, lease.slices) == (scan, start.id, None)


def test_a_late_submission_counts_for_its_lease(store: Store, folder: Path, clock: Clock) -> None:
    save_mask(store, folder.parent, in_queue(store)[0], 2)
    lease = take(store, ANNA, order=sequential.order)
    clock.pass_(days=1)
    with store.write() as transaction:
        assert leases.expire(transaction) == 1
    submit(store, folder, lease.scan, ANNA, 40)
    with store.read() as transaction:
        assert corrections.listing(transaction)[0].seconds == 86400.0


def test_a_rejected_label_goes_back_to_the_queue_and_is_the_start_of_the_next(
    store: Store, folder: Path, clock: Clock
) -> None:
    assess_all(store, folder)
    lease = take(store, ANNA)
    submit(store, folder, lease.scan, ANNA, 40)
    with pytest.raises(StoreError, match="reason"):
        store.review(lease.scan, "rejected", BERT)
    store.review(lease.scan, "rejected", BERT, "the upper pole is missing")
    with store.read() as transaction:
        scan = scans.get(transaction, lease.scan)
        start = labels.start_of(transaction, lease.scan)
        assert labels.current(transaction, lease.scan, "final") is None
    assert (scan.state, scan.reason) == ("rejected", "the upper pole is missing")
    assert start is not None
    assert start.tag == "returned"
    assert not (folder / "labels" / "final" / f"{lease.scan}.nii.gz").exists()
    again = take(store, ANNA)
    assert (again.scan, again.draw, again.label_version) == (lease.scan, "rejected", start.id)
    submit(store, folder, again.scan, ANNA, 41)
    store.review(again.scan, "approved", BERT)
    with store.read() as transaction:
        assert scans.get(transaction, lease.scan).state == "approved"
        history = events.history(transaction, "scan", scan.id)
    verbs = [e.verb for e in history]
    decisions = [v for v in verbs if v in ("submitted", "rejected", "approved", "corrected")]
    assert decisions == ["submitted", "corrected", "rejected", "submitted", "corrected", "approved"]
    assert next(e.actor for e in history if e.verb == "rejected") == BERT


def reject_three(store: Store, folder: Path, clock: Clock) -> list[str]:
    """Reject labels of Anna, Bert and Bert, one after the other."""
    assess_all(store, folder)
    rejected = []
    for value, actor in ((40, ANNA), (41, BERT), (42, BERT)):
        rejected.append(take(store, actor).scan)
        submit(store, folder, rejected[-1], actor, value)
    for scan in rejected:
        clock.pass_(minutes=1)
        store.review(scan, "rejected", SERVER, "the upper pole is missing")
    return rejected


@pytest.mark.parametrize("rules", [PLAIN, LeaseRules(audit_share=1.0, validation_share=0.0), LeaseRules(slices=2)])
def test_rejected_scans_come_before_all_others_and_first_to_whoever_labelled_them(
    store: Store, folder: Path, clock: Clock, rules: LeaseRules
) -> None:
    of_anna, of_bert, of_bert_later = reject_three(store, folder, clock)
    assert take(store, BERT, rules).scan == of_bert, "what was rejected first"
    lease = take(store, ANNA, rules)
    assert (lease.scan, lease.draw, lease.probability, lease.slices) == (of_anna, "rejected", None, None)
    clock.pass_(minutes=1)
    with store.write() as transaction:
        leases.skip(transaction, of_anna, ANNA, "I cannot see it")
    cleo = Actor(kind="person", name="cleo", identified_by="client-id")
    assert [take(store, ANNA, rules).scan, take(store, cleo, rules).scan] == [of_bert_later, of_anna]
    dora = Actor(kind="person", name="dora", identified_by="client-id")
    assert take(store, dora, rules).draw != "rejected", "none is left"
    with store.read() as transaction:
        cost = next(cost for cost in leases.costs(transaction) if cost.draw == "rejected")
    assert (cost.handed_out, cost.skipped, cost.submitted) == (4, 1, 0)


def test_a_rejected_scan_whose_file_is_missing_is_not_handed_out(store: Store, folder: Path, clock: Clock) -> None:
    of_anna, of_bert, _ = reject_three(store, folder, clock)
    (folder / f"{of_anna}.nii.gz").unlink()
    sync_scans(store)
    assert take(store, ANNA).scan == of_bert


def test_a_correction_is_known_by_its_result(store: Store, folder: Path) -> None:
    assess_all(store, folder)
    lease = take(store, ANNA)
    submit(store, folder, lease.scan, ANNA, 40)
    with store.read() as transaction:
        versions = {label.tag: label for label in labels.history(transaction, lease.scan)}
        assert {tag: corrections.has(transaction, label) for tag, label in versions.items()} == {
            "original": False, "final": True,
        }  # fmt: skip


def test_an_excluded_scan_is_not_handed_out_and_can_be_reopened(store: Store) -> None:
    lease = take(store, ANNA, order=sequential.order)
    store.review(lease.scan, "excluded", ANNA, "the wrong patient")
    assert lease.scan not in in_queue(store)
    with store.read() as transaction:
        assert leases.listing(transaction, state="open") == []
    store.review(lease.scan, "unlabelled", ANNA)
    assert lease.scan in in_queue(store)


def test_reviews_that_do_not_fit_are_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="unlabelled"):
        store.review("scan_0", "approved", ANNA)
    with pytest.raises(UnknownScan):
        store.review("nobody", "approved", ANNA)


def test_nobody_decides_of_a_label_that_came_after_a_look(store: Store, folder: Path) -> None:
    assess_all(store, folder)
    lease = take(store, ANNA)
    submit(store, folder, lease.scan, ANNA, 40)
    with store.read() as transaction:
        seen = labels.newest(transaction)
    later = save_final(store, folder.parent, lease.scan, 41, BERT)
    for state, reason in (("approved", None), ("rejected", "a leak"), ("excluded", "the wrong patient")):
        with pytest.raises(StoreError, match=f"has a newer final label, version {later.id} by {BERT.name}"):
            store.review(lease.scan, state, ANNA, reason, seen=seen)
    with store.read() as transaction:
        assert scans.get(transaction, lease.scan).state == "submitted"
    store.review(lease.scan, "approved", ANNA, seen=later.id)


def test_a_label_that_comes_while_a_scan_is_rejected_is_returned(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assess_all(store, folder)
    lease = take(store, ANNA)
    submit(store, folder, lease.scan, ANNA, 40)
    change_labels, later = store.change_labels, []

    def overtaken(changes: Sequence[LabelChange]) -> AbstractContextManager[LabelTransaction]:
        if not later:
            monkeypatch.setattr(store, "change_labels", change_labels)
            later.append(save_final(store, folder.parent, lease.scan, 41, BERT))
        return change_labels(changes)

    monkeypatch.setattr(store, "change_labels", overtaken)
    store.review(lease.scan, "rejected", ANNA, "a leak")
    with store.read() as transaction:
        returned = labels.current(transaction, lease.scan, "returned")
        assert labels.current(transaction, lease.scan, "final") is None
    assert returned is not None and returned.parent == later[0].id


# -------------------------------------------------------------------------------------------------------------- jobs


def put(store: Store, kind: str = "train") -> int:
    with store.write() as transaction:
        return jobs.enqueue(transaction, kind, {"model": "segqc"}, ANNA).id


def claim_job(store: Store, worker: str, kinds: tuple[str, ...] = ("train", "scoring")) -> int | None:
    with store.write() as transaction:
        job = jobs.claim(transaction, worker, kinds)
    return None if job is None else job.id


def on_job(store: Store, function: Callable[..., object], *arguments: object, **more: object) -> None:
    with store.write() as transaction:
        function(transaction, *arguments, **more)


def test_one_job_of_a_kind_runs_at_a_time(store: Store) -> None:
    first, second, other = put(store), put(store), put(store, "scoring")
    assert claim_job(store, "w1") == first
    assert claim_job(store, "w2") == other
    assert claim_job(store, "w3") is None
    on_job(store, jobs.finish, first, "w1", "done", {"dice": 0.9})
    assert claim_job(store, "w3") == second
    with store.read() as transaction:
        assert jobs.get(transaction, first).result == {"dice": 0.9}


def test_a_job_whose_worker_died_is_taken_again(store: Store, clock: Clock) -> None:
    job = put(store)
    assert claim_job(store, "w1") == job
    clock.pass_(seconds=jobs.DEAD_AFTER_SECONDS - 1)
    on_job(store, jobs.heartbeat, job, "w1", messages=["epoch 1"], steps=(1, 10))
    clock.pass_(seconds=jobs.DEAD_AFTER_SECONDS - 1)
    assert claim_job(store, "w2") is None
    clock.pass_(seconds=2)
    assert claim_job(store, "w2") == job
    with pytest.raises(jobs.JobLost), store.write() as transaction:
        jobs.heartbeat(transaction, job, "w1")
    on_job(store, jobs.finish, job, "w1", "failed")  # the dead one's last word does not count
    with store.read() as transaction:
        found = jobs.get(transaction, job)
    assert (found.state, found.worker, found.attempts, found.messages, found.done_steps) == (
        "running",
        "w2",
        2,
        ("epoch 1", "attempt 1 of 3 ended: its worker died"),
        1,
    )


@pytest.mark.parametrize("hours", [1, 9000])
def test_a_worker_whose_clock_is_ahead_keeps_its_job_while_it_lives_and_not_for_long_after(
    store: Store, clock: Clock, hours: int
) -> None:
    job = put(store)
    assert claim_job(store, "w1") == job
    for _ in range(20):  # it lives
        clock.pass_(hours=hours)
        on_job(store, jobs.heartbeat, job, "w1")
        clock.pass_(hours=-hours)
        assert claim_job(store, "w2") is None
        clock.pass_(seconds=jobs.HEARTBEAT_SECONDS)
    clock.pass_(seconds=jobs.DEAD_AFTER_SECONDS - 1 - jobs.HEARTBEAT_SECONDS)
    assert claim_job(store, "w2") is None
    clock.pass_(seconds=2)
    assert claim_job(store, "w2") == job, "it has died"


def test_a_job_that_kills_its_workers_is_given_up(store: Store, clock: Clock) -> None:
    job = put(store)
    for i in range(jobs.MAX_ATTEMPTS):
        assert claim_job(store, f"w{i}") == job
        clock.pass_(seconds=jobs.DEAD_AFTER_SECONDS + 1)
    assert claim_job(store, "last") is None
    with store.read() as transaction:
        assert jobs.get(transaction, job).state == "failed"


def test_a_waiting_job_stops_at_once_and_a_running_one_at_its_heartbeat(store: Store) -> None:
    running, waiting = put(store), put(store)
    claim_job(store, "w1")
    on_job(store, jobs.stop, waiting, ANNA)
    on_job(store, jobs.stop, running, ANNA)
    with pytest.raises(jobs.JobLost, match="stop"), store.write() as transaction:
        jobs.heartbeat(transaction, running, "w1")
    on_job(store, jobs.finish, running, "w1", "failed")
    with store.read() as transaction:
        assert [jobs.get(transaction, i).state for i in (running, waiting)] == ["stopped", "stopped"]


def test_a_worker_that_ends_orderly_gives_its_job_back(store: Store) -> None:
    job = put(store)
    claim_job(store, "w1")
    on_job(store, jobs.give_back, "w1")
    assert claim_job(store, "w2") == job
    with store.read() as transaction:
        assert jobs.get(transaction, job).attempts == 1


def test_a_round_continues_after_its_finished_steps(store: Store) -> None:
    job = put(store, "round")
    pair = bundle(store)
    with store.write() as transaction:
        number, steps = jobs.begin_round(transaction, job, 12)
        assert steps == {}
        jobs.finish_step(transaction, number, "train segmentation", {"dice": 0.8})
    with store.write() as transaction:
        assert jobs.begin_round(transaction, job, 12) == (number, {"train segmentation": {"dice": 0.8}})
        jobs.finish_step(transaction, number, "publish", {"bundle": pair.id}, bundle=pair.id)
        jobs.finish_step(transaction, number, "score", {})
        jobs.finish_round(transaction, number)
    with store.read() as transaction:
        row = transaction.get_one(RoundRow, number)
        assert (row.bundle_id, row.ended_at is not None) == (pair.id, True)


def test_the_last_assessments_of_all_scans_are_those_of_each(store: Store, folder: Path) -> None:
    first = save_mask(store, folder.parent, "scan_0", 1)
    second = save_mask(store, folder.parent, "scan_0", 2)
    returned = save_mask(store, folder.parent, "scan_1", 3)
    save_mask(store, folder.parent, "scan_2", 4)  # nobody assessed it
    thinned = save_mask(store, folder.parent, "scan_3", 5)
    removed = save_mask(store, folder.parent, "scan_4", 6)
    with store.write() as transaction:
        for i, mask in enumerate((first, second, second, returned, thinned, removed)):
            write_assessment(transaction, make_assessment(mask.scan, 0.1 * i), mask.id)
        transaction.execute(
            text("UPDATE assessment_structure SET detail = NULL WHERE assessment_id IN "
                 "(SELECT id FROM assessment WHERE label_version_id = :version)"),
            {"version": thinned.id},
        )  # fmt: skip
    save_final(store, folder.parent, "scan_1", 7)
    store.review("scan_1", "rejected", ANNA, "a gap")  # starts from what was sent back, which nobody assessed
    store.remove_label("scan_4", "original", ANNA)
    with store.read() as transaction:
        names = scans.names(transaction)
        each = {name: found[1] for name in names if (found := assessments.latest(transaction, name)) is not None}
        assert assessments.latest_of_all(transaction) == each
    assert set(each) == {"scan_0"}
    assert each["scan_0"].dice == pytest.approx(0.2)
