"""The way back: a dataset folder's store as a backup holds it.

The whole store is made anew beside the one that is there and checked; only then both change places by renames. What was
there is moved to a folder of its own, and nothing is deleted. While they change places a file marks the folder: a
restore that dies there is found by `Store.open`, and run again.
"""

from __future__ import annotations

import datetime as dt
import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from segqc.progress import NO_PROGRESS, Progress
from segqc.store import labels, maintenance
from segqc.store.database import DATABASE_FILE, REVISION, StoreDamaged, StoreError, StoreReadOnly
from segqc.store.files import LabelFiles, is_locked, sha256_of
from segqc.store.store import MODELS_FOLDER, OWN_FOLDER, RESTORING_FILE, Store
from segqc.volumes import atomic_write, scan_suffix

_STAGING: Final = ".segqc-restoring"
_ASIDE: Final = "segqc-before-restore-{:%Y%m%dT%H%M%S}"


@dataclass(frozen=True, slots=True)
class RestoredBackup:
    """What a restore did.

    Attributes:
        contents: how many label contents the backup holds.
        shown: how many label files were written below ``labels/``.
        aside: the folder that holds what was there before; None where nothing was.
        upgraded_from: the revision of the backup's tables where it was an earlier one.
        not_in_backup: label files of before that the backup knows nothing of, relative to the folder aside.
    """

    contents: int
    shown: int
    aside: Path | None
    upgraded_from: str | None
    not_in_backup: tuple[str, ...] = ()


def restore(backup: Path, dataset: Path, *, settings_file: str, progress: Progress = NO_PROGRESS) -> RestoredBackup:
    """Put a backup's database and labels in the place of those of a dataset folder, which stay in a folder aside.

    Scans stay as they are, and so do the settings where the folder has some. The bundle that served when the backup was
    made comes back; another one of its number is set aside, all others stay.

    Args:
        backup: a folder that `maintenance.backup` made; it is only read.
        dataset: the dataset folder, whose store lies in it.
        settings_file: the name of the settings file, copied where the folder has none.
        progress: called for each copied file.

    Raises:
        StoreError: if the backup is none or is damaged, or somebody works on the folder. Nothing has changed then.
    """
    dataset = dataset.resolve()
    own = dataset / OWN_FOLDER
    if not (backup / OWN_FOLDER / DATABASE_FILE).is_file():
        raise StoreError(f"{backup}: no backup ({OWN_FOLDER}/{DATABASE_FILE} is missing); 'segqc db backup' makes one")
    if any(scan_suffix(name) is not None for name in os.listdir(backup)):
        raise StoreError(f"{backup}: holds scans, so it is a dataset folder and no backup; name the backup first")
    if backup.resolve() == dataset:
        raise StoreError(f"{backup}: is the dataset folder itself; name the backup's folder first")
    if any(path.exists() and not os.access(path, os.W_OK) for path in (dataset, own)):
        raise StoreReadOnly(f"{dataset}: is read-only, and a restore has to write; make it writable, or name a copy")
    own.mkdir(parents=True, exist_ok=True)
    _refuse_live(own)
    lock = FileLock(own / "server.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StoreError(f"{dataset}: a server serves this folder; end it first") from error
    with lock:
        staging = dataset / _STAGING
        shutil.rmtree(staging, ignore_errors=True)
        try:
            contents, shown, before = _prepare(backup, staging, progress)
            aside = _change_places(staging, dataset)
            if not (dataset / settings_file).exists() and (backup / settings_file).is_file():
                shutil.copy2(backup / settings_file, dataset / settings_file)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    earlier = before if before != REVISION else None
    return RestoredBackup(contents, shown, aside, earlier, _not_in_backup(dataset, aside))


def _not_in_backup(dataset: Path, aside: Path | None) -> tuple[str, ...]:
    """The label files that were set aside and have no successor."""
    if aside is None:
        return ()
    files = (path.relative_to(aside) for path in sorted(aside.glob("labels/**/*")) if path.is_file())
    return tuple(str(file) for file in files if not (dataset / file).exists())


def _refuse_live(own: Path) -> None:
    # what works there makes folders and removes them meanwhile: `os.walk` passes over those that are gone
    locks = [Path(folder, name) for folder, _, names in os.walk(own) for name in names if name.endswith(".lock")]
    for path in sorted(locks):
        if path.is_file() and is_locked(path):
            raise StoreError(
                f"{own.parent}: a process works on this folder (it holds {path.relative_to(own.parent)}); "
                "end the server, workers and trainings first"
            )


def _prepare(backup: Path, staging: Path, progress: Progress) -> tuple[int, int, str]:
    """Make the whole store in a folder of its own; returns its contents, its shown labels, and the revision before."""
    own = staging / OWN_FOLDER
    own.mkdir(parents=True)
    for path in _database_files(backup / OWN_FOLDER):
        shutil.copyfile(path, own / path.name)
    store = Store(staging)
    try:
        before = store.database.revision()
        if before is None:
            raise StoreError(f"{backup}: its database is none of SegQC's")
        with store.read() as transaction:
            damage = next(maintenance.damages(transaction), None)
        if damage is not None:
            raise StoreError(f"its database is damaged ({damage}); take an earlier backup")
        maintenance.upgrade(store)
        with store.read() as transaction:
            contents = sorted(labels.contents(transaction))
        maintenance.copy_contents(LabelFiles(backup, backup / OWN_FOLDER), contents, store.files, progress)
        shown = maintenance.rebuild_views(store, progress=progress).written
        if (backup / OWN_FOLDER / MODELS_FOLDER).is_dir():
            shutil.copytree(backup / OWN_FOLDER / MODELS_FOLDER, own / MODELS_FOLDER)
    except StoreDamaged as error:
        raise StoreError(
            f"{backup}: this backup cannot be restored: its database is damaged; take an earlier one; "
            "nothing was changed"
        ) from error
    except StoreError as error:
        raise StoreError(f"{backup}: this backup cannot be restored: {error.clause}; nothing was changed") from error
    finally:
        store.close()  # the write-ahead log goes with the last connection
    return len(contents), shown, before


def _database_files(own: Path) -> Iterator[Path]:
    """The database, and its write-ahead log; its index of the log is made anew."""
    for name in (DATABASE_FILE, f"{DATABASE_FILE}-wal"):
        if (own / name).is_file():
            yield own / name


def _change_places(staging: Path, dataset: Path) -> Path | None:
    """Set aside what is there and put the new store into its place; returns the folder aside, if anything is in it."""
    own = dataset / OWN_FOLDER
    marker = own / RESTORING_FILE
    # what a restore that died has set aside belongs with the rest: a database and its log above all
    aside = dataset / marker.read_text(encoding="utf-8") if marker.exists() else _unused(dataset)
    with atomic_write(marker) as temporary:
        temporary.write_text(aside.name, encoding="utf-8")
    database = [own / DATABASE_FILE, *sorted(own.glob(f"{DATABASE_FILE}-*"))]
    for path in [*database, own / "labels", own / "incoming", dataset / "labels"]:
        if path.exists():
            target = aside / path.relative_to(dataset)
            if target.exists():  # what is there is of the restore that died
                target = _unused(dataset) / path.relative_to(dataset)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    for name in ("labels", f"{OWN_FOLDER}/labels", f"{OWN_FOLDER}/{DATABASE_FILE}"):
        if (staging / name).exists():
            (staging / name).rename(dataset / name)
    for bundle in sorted((staging / OWN_FOLDER / MODELS_FOLDER).glob("*")):
        target = own / MODELS_FOLDER / bundle.name
        if target.exists() and not _is_same_bundle(bundle, target):
            kept = aside / target.relative_to(dataset)
            kept.parent.mkdir(parents=True, exist_ok=True)
            target.rename(kept)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            bundle.rename(target)
    marker.unlink()
    return aside if aside.exists() else None


def _is_same_bundle(one: Path, other: Path) -> bool:
    """Whether all files of a bundle are in the other folder, too."""
    return all(
        (other / path.name).is_file() and sha256_of(other / path.name) == sha256_of(path) for path in one.iterdir()
    )


def _unused(dataset: Path) -> Path:
    wanted = dataset / _ASIDE.format(dt.datetime.now(dt.UTC))
    names = (wanted if n == 1 else wanted.with_name(f"{wanted.name}-{n}") for n in itertools.count(1))
    return next(path for path in names if not path.exists())
