"""Bringing backups back: over whatever lies in the folder, whenever the process dies."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from segqc.store import labels, maintenance
from segqc.store.database import StoreError, StoreReadOnly
from segqc.store.restore import RestoredBackup, restore
from segqc.store.store import Store
from tests.store_kit import make_scans, save_final, sync_scans


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_scans(tmp_path / "studies", 3)
    return tmp_path / "studies"


@pytest.fixture
def backup(folder: Path, tmp_path: Path) -> Iterator[Path]:
    """A backup with one label; the folder's store goes on and is left with its write-ahead log, as by a kill."""
    store = Store.open(folder)
    sync_scans(store)
    save_final(store, tmp_path, "scan_0", 3)
    maintenance.backup(store, tmp_path / "backup")
    save_final(store, tmp_path, "scan_0", 4)
    save_final(store, tmp_path, "scan_1", 5)
    assert (folder / "segqc" / "store.sqlite-wal").stat().st_size > 0
    yield tmp_path / "backup"
    store.close()


def bring_back(backup: Path, folder: Path) -> RestoredBackup:
    return restore(backup, folder, settings_file="segqc.toml")


def versions(folder: Path) -> list[int]:
    """How many versions each scan has; everything in the folder fits together."""
    store = Store.open(folder)
    assert maintenance.check(store) == []
    with store.read() as transaction:
        found = [len(labels.history(transaction, f"scan_{i}")) for i in range(3)]
    store.close()
    return found


def _leave(_folder: Path) -> None:
    pass


def _edit_a_label(folder: Path) -> None:
    (folder / "labels" / "final" / "scan_0.nii.gz").write_bytes(b"edited")


def _damage_the_database(folder: Path) -> None:
    (folder / "segqc" / "store.sqlite").write_bytes(b"noise")


def _lose_the_database(folder: Path) -> None:
    (folder / "segqc" / "store.sqlite").unlink()


@pytest.mark.parametrize("befall", [_leave, _edit_a_label, _damage_the_database, _lose_the_database])
def test_the_folder_holds_what_the_backup_holds(folder: Path, backup: Path, befall: Callable[[Path], None]) -> None:
    befall(folder)
    before = {path.relative_to(folder): path.read_bytes() for path in folder.glob("labels/*/*")}
    done = bring_back(backup, folder)
    assert versions(folder) == [1, 0, 0]
    assert (done.contents, done.shown) == (1, 1)
    assert done.aside is not None
    assert {path.relative_to(done.aside): path.read_bytes() for path in done.aside.glob("labels/*/*")} == before


def test_a_folder_of_scans_only(backup: Path, tmp_path: Path) -> None:
    make_scans(tmp_path / "other", 3)
    assert bring_back(backup, tmp_path / "other").aside is None
    assert versions(tmp_path / "other") == [1, 0, 0]


def test_what_was_set_aside_is_whole(folder: Path, backup: Path, tmp_path: Path) -> None:
    aside = bring_back(backup, folder).aside
    assert aside is not None
    make_scans(aside, 3)
    assert versions(aside) == [2, 1, 0]


def test_label_files_that_the_backup_does_not_know_are_named(folder: Path, backup: Path) -> None:
    for file in ("labels/final/nobody.nii.gz", "labels/stray.nii.gz"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"anything")
    done = bring_back(backup, folder)
    assert {"labels/final/nobody.nii.gz", "labels/stray.nii.gz"} <= set(done.not_in_backup)
    assert done.aside is not None
    assert all((done.aside / file).is_file() and not (folder / file).exists() for file in done.not_in_backup)


def test_a_studies_folder_is_no_backup(folder: Path, backup: Path) -> None:
    before = versions(folder)
    with pytest.raises(StoreError, match="holds scans, so it is a dataset folder and no backup"):
        bring_back(folder, backup)
    assert versions(folder) == before
    assert not list(backup.glob("segqc-before-restore-*"))


@pytest.mark.parametrize("renames", range(8))
def test_a_restore_that_dies_is_run_again(
    folder: Path, backup: Path, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = 0
    rename = Path.rename

    def dying(self: Path, target: Path) -> Path:
        nonlocal done
        if "studies" in self.parts and ".segqc-restoring" not in target.parts:
            if done == renames:
                raise KeyboardInterrupt
            done += 1
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", dying)
        try:
            bring_back(backup, folder)
        except KeyboardInterrupt:
            with pytest.raises(StoreError, match="run 'segqc db restore' again"):
                Store.open(folder)
    aside = bring_back(backup, folder).aside
    assert versions(folder) == [1, 0, 0]
    assert aside is not None


def test_a_folder_in_use_is_refused(folder: Path, backup: Path) -> None:
    with FileLock(folder / "segqc" / "server.lock"), pytest.raises(StoreError, match="end the server"):
        bring_back(backup, folder)
    assert not list(folder.glob("segqc-before-restore-*"))


def test_a_folder_in_use_is_refused_while_folders_in_it_come_and_go(
    folder: Path, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "segqc" / "incoming" / "gone").mkdir(parents=True)
    scandir = os.scandir

    def found(path: str | Path) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "gone":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return scandir(path)

    with monkeypatch.context() as patched:  # no longer than that: what removes the folder lists it, too
        patched.setattr(os, "scandir", found)
        with FileLock(folder / "segqc" / "worker.lock"), pytest.raises(StoreError, match="end the server"):
            bring_back(backup, folder)


def test_a_read_only_folder_is_refused(folder: Path, backup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the rights of files would not keep root from it
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK and Path(path).is_relative_to(folder)))
    with pytest.raises(StoreReadOnly, match="studies: is read-only"):
        bring_back(backup, folder)
    assert not list(folder.glob("*segqc-*"))


def _no_database(backup: Path) -> None:
    (backup / "segqc" / "store.sqlite").unlink()


def _noise(backup: Path) -> None:
    (backup / "segqc" / "store.sqlite").write_bytes(b"noise" * 1000)


def _empty(backup: Path) -> None:
    (backup / "segqc" / "store.sqlite").write_bytes(b"")


def _lose_a_content(backup: Path) -> None:
    next((backup / "segqc" / "labels").glob("*/*")).unlink()


def _change_a_content(backup: Path) -> None:
    path = next((backup / "segqc" / "labels").glob("*/*"))
    path.chmod(0o644)
    path.write_bytes(b"other")


@pytest.mark.parametrize("damage", [_no_database, _noise, _empty, _lose_a_content, _change_a_content])
def test_a_damaged_backup_changes_nothing(folder: Path, backup: Path, damage: Callable[[Path], None]) -> None:
    damage(backup)
    with pytest.raises(StoreError, match="backup"):
        bring_back(backup, folder)
    assert not list(folder.glob("*segqc-*"))
    assert versions(folder) == [2, 1, 0]
