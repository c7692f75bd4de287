"""Backups, checks and repairs of a store."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text, update
from typer.testing import CliRunner

from segqc.cli import main
from segqc.store import labels, maintenance
from segqc.store.database import REVISION, StoreDamaged, StoreError
from segqc.store.records import LabelRecord
from segqc.store.schema import Bundle
from segqc.store.store import LabelLost, Store
from segqc.store.sync import SyncResult, sync
from segqc.volumes import VolumeError, scan_id
from tests.store_kit import ANNA, PLACING, Clock, Steps, label_map, make_scans, save_final, save_mask, sync_scans


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_scans(tmp_path / "studies", 4)
    (tmp_path / "studies" / "segqc.toml").write_text("[structures]\nliver = [1]\n")
    return tmp_path / "studies"


@pytest.fixture
def store(folder: Path, url: str | None, clock: Clock) -> Iterator[Store]:
    opened = Store.open(folder, url, clock=clock)
    sync_scans(opened)
    yield opened
    opened.close()


@pytest.fixture
def final(store: Store, folder: Path) -> LabelRecord:
    """A scan with a mask and two versions of a final label; gives the last."""
    save_mask(store, folder.parent, "scan_1", 5)
    save_final(store, folder.parent, "scan_1", 7)
    return save_final(store, folder.parent, "scan_1", 8)


def history(store: Store) -> list[LabelRecord]:
    with store.read() as transaction:
        return labels.history(transaction, "scan_1")


def whats(store: Store) -> list[str]:
    return [finding.what for finding in maintenance.check(store)]


def only(store: Store) -> maintenance.Finding:
    found = maintenance.check(store)
    assert len(found) == 1, found
    return found[0]


# ------------------------------------------------------------------------------------------------------------ backup


def sqlite_only(store: Store) -> None:
    if not store.database.is_sqlite:
        with pytest.raises(StoreError, match="pg_dump"):
            maintenance.backup(store, store.dataset.parent / "backup")
        assert not (store.dataset.parent / "backup").exists()
        pytest.skip("PostgreSQL brings its own backup")


def test_a_backup_can_be_restored(store: Store, folder: Path, final: LabelRecord, tmp_path: Path) -> None:
    sqlite_only(store)
    steps = Steps()
    backup = tmp_path / "backups" / "monday"
    assert maintenance.backup(store, backup, also=["segqc.toml"], progress=steps) == 3
    assert steps.seen[-1][:2] == (3, 3)
    save_final(store, tmp_path, "scan_1", 9)  # after the backup: not in it
    assert sorted(p.name for p in backup.iterdir()) == ["segqc", "segqc.toml"]
    assert [p.name for p in (backup / "segqc").iterdir() if p.is_file()] == ["store.sqlite"]

    make_scans(tmp_path / "again", 4)
    shutil.copytree(backup, tmp_path / "again", dirs_exist_ok=True)
    again = Store.open(tmp_path / "again")
    assert maintenance.rebuild_views(again) == maintenance.Restored(2, ())
    assert sync(again, scan_id, PLACING) == SyncResult()
    assert history(again) == history(store)[:-1]
    assert maintenance.check(again) == []
    assert again.view_file(final).read_bytes() == again.label_file(final).read_bytes()
    again.close()


def test_a_backup_made_while_others_work_is_consistent(folder: Path, tmp_path: Path) -> None:
    busy = Store.open(folder)
    sync_scans(busy)
    save_final(busy, tmp_path, "scan_1", 1)
    stop = threading.Event()

    def work() -> None:
        value = 0
        while not stop.is_set():
            value += 1
            save_final(busy, tmp_path, f"scan_{value % 4}", value % 40 + 1)

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            for i in range(3):
                assert maintenance.backup(busy, tmp_path / f"backup_{i}") > 0
        finally:
            stop.set()
        working.result()
    for i in range(3):
        make_scans(tmp_path / f"backup_{i}", 4)
        again = Store.open(tmp_path / f"backup_{i}")
        maintenance.rebuild_views(again)
        assert maintenance.check(again) == []
        again.close()
    busy.close()


def test_a_damaged_database_is_not_backed_up(store: Store, folder: Path, final: LabelRecord, tmp_path: Path) -> None:
    sqlite_only(store)
    path = Path(store.database.shown)
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (page_size,) = connection.execute("PRAGMA page_size").fetchone()
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'job'").fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * page_size)
        file.write(b"\xff" * page_size)
    with pytest.raises(StoreDamaged, match=rf"{re.escape(str(path))}: the database is damaged .*segqc db restore"):
        maintenance.backup(Store.open(folder), tmp_path / "backup")
    assert not (tmp_path / "backup").exists()


def test_a_backup_is_whole_or_not_there(store: Store, folder: Path, final: LabelRecord, tmp_path: Path) -> None:
    sqlite_only(store)
    (tmp_path / "there").mkdir()
    with pytest.raises(StoreError, match="there: exists already"):
        maintenance.backup(store, tmp_path / "there")
    damage(store.label_file(final))
    with pytest.raises(StoreError, match="damaged"):
        maintenance.backup(store, tmp_path / "backup")
    store.label_file(final).unlink()
    with pytest.raises(StoreError, match="missing"):
        maintenance.backup(store, tmp_path / "backup")
    assert sorted(p.name for p in tmp_path.iterdir() if "backup" in p.name or p.name.startswith(".")) == []


# ------------------------------------------------------------------------------------------------------------- check


def damage(path: Path) -> None:
    """Change a byte but neither size nor time, as a failing disk does."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_store_in_order_has_no_findings(store: Store, final: LabelRecord) -> None:
    store.remove_label("scan_1", "original", ANNA)
    assert maintenance.check(store) == []


def test_contents_are_looked_at(store: Store, final: LabelRecord) -> None:
    stray = store.files.objects / "ab" / "stray.nii.gz"
    stray.parent.mkdir(exist_ok=True)
    stray.touch()
    assert "no label version" in only(store).what
    stray.unlink()
    damage(store.label_file(final))
    assert f"{store.label_file(final)}: this label content is damaged" in whats(store)
    store.label_file(final).unlink()
    assert f"{store.label_file(final)}: this label content is missing" in whats(store)


def test_content_that_is_gone_or_damaged_is_said_to_be_when_it_is_read(store: Store, final: LabelRecord) -> None:
    with pytest.raises(VolumeError) as misfit:
        store.read_label(final, values=())
    assert not isinstance(misfit.value, LabelLost)
    damage(store.label_file(final))
    told = rf"the label version {final.id} of the scan 'scan_1' \(final\) is {{}} segqc/labels; 'segqc db check' names"
    with pytest.raises(LabelLost, match=told.format("damaged in")):
        store.read_label(final)
    store.label_file(final).unlink()
    for read in (store.read_label, store.kept_file):
        with pytest.raises(LabelLost, match=told.format("gone from")):
            read(final)


def test_files_that_cannot_be_read_are_named_and_the_others_looked_at(
    store: Store, final: LabelRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = {store.label_file(final), store.files.views / "final" / "scan_1.nii.gz"}
    read = maintenance.sha256_of

    def refusing(path: Path) -> str:
        if path in refused:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return read(path)

    monkeypatch.setattr(maintenance, "sha256_of", refusing)
    damaged = store.files.views / "original" / "scan_1.nii.gz"
    damage(damaged)
    assert sorted(whats(store)) == sorted(
        [*(f"{path}: cannot be read (Permission denied)" for path in refused), f"{damaged}: this label file is damaged"]
    )


def test_a_view_that_is_gone_or_damaged_is_repaired(store: Store, final: LabelRecord) -> None:
    view = store.view_file(final)
    before = view.stat().st_mtime_ns
    damage(view)
    assert "damaged" in only(store).what
    assert maintenance.repair(store) == maintenance.Restored(1, ())
    view.unlink()
    assert "missing" in only(store).what
    maintenance.repair(store)
    assert maintenance.check(store) == []
    assert view.stat().st_mtime_ns == before
    assert sync(store, scan_id, PLACING) == SyncResult()
    assert history(store)[-1] == final


def test_an_edited_view_is_left_to_its_editor(store: Store, final: LabelRecord) -> None:
    view = label_map(store.view_file(final), 11)
    assert "was changed" in only(store).what
    assert maintenance.repair(store) == maintenance.Restored(0, (view,))
    assert view.read_bytes() != store.label_file(final).read_bytes()
    assert maintenance.rebuild_views(store, overwrite=True) == maintenance.Restored(1, ())
    assert maintenance.check(store) == []


def test_label_files_without_a_row_are_found(store: Store, folder: Path, final: LabelRecord) -> None:
    label_map(folder / "labels" / "final" / "scan_2.nii.gz", 1)
    assert "not in the store yet" in only(store).what
    sync_scans(store)
    assert maintenance.check(store) == []
    label_map(folder / "labels" / "final" / "nobody.nii.gz", 1)
    assert "no scan" in only(store).what


def test_a_view_whose_row_is_gone_is_noted_again(store: Store, final: LabelRecord) -> None:
    with store.write() as transaction:
        labels.forget_view(transaction, "scan_1", "final")
    assert any("did not note" in what for what in whats(store))
    maintenance.repair(store)
    assert maintenance.check(store) == []
    assert sync(store, scan_id, PLACING) == SyncResult()


def test_scans_are_compared_with_their_files(store: Store, folder: Path) -> None:
    (folder / "scan_0.nii.gz").rename(folder / "other.nii.gz")
    assert [what.split("/")[-1] for what in whats(store)] == [
        "other.nii.gz: this scan is not in the store yet",
        "scan_0.nii.gz: this scan's file is gone",
    ]
    sync_scans(store)
    assert whats(store) == []
    (folder / "other.nii.gz").rename(folder / "scan_0.nii.gz")
    assert "has come back" in whats(store)[1]


def test_states_are_compared_with_labels(store: Store, final: LabelRecord) -> None:
    with store.write() as transaction:
        transaction.execute(text("UPDATE scan SET state = 'submitted', queue = NULL WHERE name = 'scan_2'"))
        transaction.execute(text(
            "UPDATE scan SET state = 'unlabelled', queue = (SELECT split FROM patient WHERE patient.id = patient_id) "
            "WHERE name = 'scan_1'"
        ))  # fmt: skip
    assert sorted(whats(store)) == [
        "the scan 'scan_1' is unlabelled, but has a final label",
        "the scan 'scan_2' is submitted, but has no final label",
    ]


def test_leftovers_of_dead_processes_are_found_and_cleaned_up(store: Store, folder: Path, final: LabelRecord) -> None:
    source = label_map(folder.parent / "next.nii.gz", 4)
    with pytest.raises(KeyboardInterrupt), store.files.arriving(source, "scan_1", "final", ".nii.gz"):
        assert maintenance.check(store) == []  # still at work
        raise KeyboardInterrupt
    early = store.own / "incoming" / "died-before-its-lock"
    early.mkdir()
    os.utime(early, (0, 0))
    assert len(whats(store)) == 2
    maintenance.repair(store)
    assert maintenance.check(store) == []


def test_a_damaged_database_is_found(store: Store) -> None:
    if not store.database.is_sqlite:
        pytest.skip("SQLite's own check")
    with store.database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
        connection.exec_driver_sql("UPDATE scan SET patient_id = 99, queue = NULL, state = 'submitted' WHERE id = 1")
        connection.exec_driver_sql("PRAGMA foreign_keys=ON")
    assert "refers to a row of patient" in whats(store)[0]


@pytest.mark.parametrize("damage", ["DROP TABLE feature", "UPDATE scan SET added_at = 'yesterday'"])
def test_rows_that_cannot_be_read_are_found(store: Store, damage: str) -> None:
    if not store.database.is_sqlite:
        pytest.skip("PostgreSQL keeps no such cell")
    with store.write() as transaction:
        transaction.connection().exec_driver_sql(damage)
    (found,) = maintenance.check(store)
    assert "the database is damaged" in found.what


# ----------------------------------------------------------------------------------------------------------- upgrade


def test_upgrade_makes_the_tables_and_refuses_later_ones(folder: Path, url: str | None) -> None:
    unopened = Store(folder, url)
    assert maintenance.upgrade(unopened) == (None, REVISION)
    assert maintenance.upgrade(unopened) == (REVISION, REVISION)
    with unopened.write() as transaction:
        transaction.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match="newer version of segqc"):
        maintenance.upgrade(unopened)
    unopened.close()


# ---------------------------------------------------------------------------------------------------------- commands


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main.app, ["db", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_commands(folder: Path, tmp_path: Path) -> None:
    assert f"revision {REVISION}, was empty" in run("upgrade", folder)
    opened = Store.open(folder)
    sync_scans(opened)
    label = save_final(opened, tmp_path, "scan_0", 3)
    assert "1 label contents" in run("backup", folder, tmp_path / "backup")
    assert (tmp_path / "backup" / "segqc.toml").is_file()
    assert "nothing is wrong" in run("check", folder)
    opened.view_file(label).unlink()
    result = CliRunner().invoke(main.app, ["db", "check", str(folder)])
    assert "label file is missing" in result.output
    assert "1 of 1 findings are damage" in str(result.exception)
    assert "1 label files" in run("restore-views", folder)
    opened.view_file(label).unlink()
    assert "nothing is wrong" in run("check", folder, "--repair")
    opened.close()


def test_files_that_harm_nothing_are_told_and_are_no_failure(store: Store, folder: Path, final: LabelRecord) -> None:
    (folder / "late.nii.gz").touch()
    label_map(folder / "labels" / "final" / "nobody.nii.gz", 1)
    label_map(store.view_file(final), 11)
    stray = store.files.objects / "ab" / "stray.nii.gz"
    stray.parent.mkdir(exist_ok=True)
    stray.touch()
    with store.write() as transaction:
        transaction.execute(update(Bundle).values(serving=False))  # one that serves needs its files
    assert {finding.is_damage for finding in maintenance.check(store)} == {False}
    if store.database.is_sqlite:
        said = run("check", folder)
        assert "nothing is damaged" in said
        assert all(name in said for name in ("late.nii.gz", "nobody.nii.gz", "scan_1.nii.gz: was changed", "stray"))
    store.label_file(final).unlink()
    assert sum(finding.is_damage for finding in maintenance.check(store)) == 1


def test_the_commands_use_the_database_of_the_settings(folder: Path, tmp_path: Path) -> None:
    (folder / "segqc.toml").write_text(f'[store]\nurl = "sqlite:///{tmp_path}/elsewhere.sqlite"\n')
    run("upgrade", folder)
    assert (tmp_path / "elsewhere.sqlite").is_file()
    assert not (folder / "segqc" / "store.sqlite").exists()
    assert "by its url" in run("backup", folder, tmp_path / "backup")
    assert (tmp_path / "backup" / "segqc" / "store.sqlite").is_file()
