"""Taking in what lies in the studies folder: new scans, and labels that people put there, changed or removed."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from segqc.placement import Placing
from segqc.store import labels, scans
from segqc.store.database import Transaction
from segqc.store.files import VIEW_SUFFIXES, sha256_of
from segqc.store.labels import NewLabel
from segqc.store.scans import FoundScan
from segqc.store.schema import Keeping
from segqc.store.store import LabelChange, Store
from segqc.store.values import Who
from segqc.volumes import VolumeError, is_scan_path, scan_id

logger = logging.getLogger(__name__)

FOLDER: Final = Who("system", "folder", "folder")
_CLOCK_TICK_NS: Final = 50_000_000
_AT_ONCE: Final = 100

PatientOf: TypeAlias = Callable[[Path], str]


@dataclass(frozen=True, slots=True)
class Taken:
    """What was found: new scans, scans whose file is gone, labels that were new, changed or removed."""

    new_scans: int = 0
    missing_scans: int = 0
    new_labels: int = 0
    removed_labels: int = 0


def take_in(store: Store, patient_of: PatientOf, placing: Placing) -> Taken:
    """Bring the store in line with its folder; costs a few system calls where nothing has changed.

    Files are never moved nor changed. A scan whose file is gone keeps its history and waits for the file to return. A
    label file that a person put below ``labels/<tag>/`` becomes a version; one that a person removed becomes a removal.

    Args:
        store: the store.
        patient_of: the patient that a scan file is of. A new scan for which it raises a VolumeError is left alone, with
            a warning, until it does so no more: fold and role are given once, and a wrong patient would share neither.
        placing: how new patients get their fold and role.
    """
    new, missing = _take_in_scans(store, patient_of, placing)
    added = removed = 0
    for folder in _tag_folders(store):
        more, fewer = _take_in_labels(store, folder)
        added, removed = added + more, removed + fewer
    return Taken(new, missing, added, removed)


def take_in_scan(store: Store, file: str, patient_of: PatientOf, placing: Placing) -> None:
    """Take in one scan file of the folder, named relative to it, without looking at the others.

    Raises:
        VolumeError: if its patient can't be told.
    """
    path = store.studies / file
    found = [FoundScan(scan_id(path), file, patient_of(path))]
    with store.write() as transaction:
        scans.take_in(transaction, found, placing, FOLDER)
        scans.mark_returned(transaction, {file}, FOLDER)


def _take_in_scans(store: Store, patient_of: PatientOf, placing: Placing) -> tuple[int, int]:
    with store.read() as transaction:
        if _unchanged(transaction, store.studies, "scans"):
            return 0, 0
        # before the folder is looked through: a scan that is uploaded meanwhile is not missing
        present, known = scans.files(transaction), scans.files(transaction, missing=True)
    mark = _mark(store.studies)
    files = {entry.name for entry in _files(store.studies) if is_scan_path(Path(entry.path))}
    unknown = sorted(files - present - known)
    found = [scan for file in unknown if (scan := _found(store.studies / file, patient_of)) is not None]
    final = store.files.views / labels.FINAL
    labelled = {_stem(entry.name) for entry in _files(final)} if final.is_dir() else set()
    with store.write() as transaction:
        new = scans.take_in(transaction, found, placing, FOLDER, labelled=labelled)
        scans.mark_returned(transaction, files, FOLDER)
        missing = scans.mark_missing(transaction, present - files, FOLDER)
        _remember(transaction, "scans", mark if len(found) == len(unknown) else "")
    return new, missing


def _found(path: Path, patient_of: PatientOf) -> FoundScan | None:
    try:
        return FoundScan(scan_id(path), path.name, patient_of(path))
    except VolumeError as error:
        _warn_once(f"{path.name} is not taken in, as its patient cannot be told: {error}")
        return None


@functools.lru_cache(maxsize=1000)  # a server looks every few seconds
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _take_in_labels(store: Store, folder: Path) -> tuple[int, int]:
    tag, key = folder.name, f"labels/{folder.name}"
    with store.read() as transaction:
        if _unchanged(transaction, folder, key):
            return 0, 0
        left = labels.views(transaction, tag)
        known = set(scans.names(transaction))
    mark = _mark(folder)
    changed: list[LabelChange] = []
    seen: set[str] = set()
    for entry in _files(folder):
        file, scan = f"{tag}/{entry.name}", _stem(entry.name)
        seen.add(file)
        status = entry.stat()
        if file in left and (left[file].size, left[file].modified_ns) == (status.st_size, status.st_mtime_ns):
            continue
        if scan not in known or not entry.name.endswith(VIEW_SUFFIXES):
            continue
        if file not in left or not _only_touched(store, tag, entry):
            changed.append(LabelChange(NewLabel(scan, tag, "import", FOLDER), Path(entry.path)))
    gone = [_stem(Path(file).name) for file in left.keys() - seen]
    changed += [LabelChange(NewLabel(scan, tag, "removal", FOLDER), None) for scan in gone]
    versions = {_stem(Path(file).name): state.version for file, state in left.items()}
    done = [c for start in range(0, len(changed), _AT_ONCE)
            for c in _take_in_batch(store, changed[start : start + _AT_ONCE], versions)]  # fmt: skip
    with store.write() as transaction:
        # what was overtaken is looked at again next time
        _remember(transaction, key, mark if len(done) == len(changed) else "")
    removed = sum(change.source is None for change in done)
    return len(done) - removed, removed


class _Overtaken(Exception):  # noqa: N818 - not an error
    """Other processes have changed labels of these scans since the folder was looked through."""

    def __init__(self, scans_: set[str]) -> None:
        super().__init__()
        self.scans = scans_


def _take_in_batch(store: Store, changes: list[LabelChange], versions: Mapping[str, int]) -> list[LabelChange]:
    """Take in label files, but those of scans whose label is not the version any more that the folder showed.

    A file that another process has just saved looks like a person's edit to whoever read the rows before.
    """

    def check(transaction: Transaction) -> None:
        overtaken = set()
        for change in changes:
            last = labels.current(transaction, change.label.scan, change.label.tag)
            if (last.id if last is not None else None) != versions.get(change.label.scan):
                overtaken.add(change.label.scan)
        if overtaken:
            raise _Overtaken(overtaken)

    while changes:
        try:
            store.change_labels(changes, first=check)
        except _Overtaken as found:
            changes = [change for change in changes if change.label.scan not in found.scans]
        except FileNotFoundError:
            return []  # gone again before it could be read
        else:
            break
    return changes


def _only_touched(store: Store, tag: str, entry: os.DirEntry[str]) -> bool:
    """Whether a file that has another time still shows the current version, as a copy of the folder does."""
    status, sha256 = entry.stat(), sha256_of(Path(entry.path))
    with store.write() as transaction:
        label = labels.current(transaction, _stem(entry.name), tag)
        if label is None or label.sha256 != sha256:
            return False
        labels.note_view(transaction, label, f"{tag}/{entry.name}", status.st_size, status.st_mtime_ns)
    return True


def _tag_folders(store: Store) -> list[Path]:
    if not store.files.views.is_dir():
        return []
    with os.scandir(store.files.views) as found:
        return sorted(Path(entry.path) for entry in found if entry.is_dir() and not entry.name.startswith("."))


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        for entry in found:
            if not entry.name.startswith(".") and entry.is_file():
                yield entry


def _stem(file: str) -> str:
    for suffix in VIEW_SUFFIXES:
        if file.endswith(suffix):
            return file.removesuffix(suffix)
    return file


def _mark(folder: Path) -> str:
    """What the folder's own entry says now; empty if it changed so lately that a further change could go unseen."""
    modified = folder.stat().st_mtime_ns
    return str(modified) if time.time_ns() - modified > _CLOCK_TICK_NS else ""


def _unchanged(transaction: Transaction, folder: Path, key: str) -> bool:
    row = transaction.get(Keeping, key)
    return row is not None and row.value != "" and row.value == str(folder.stat().st_mtime_ns)


def _remember(transaction: Transaction, key: str, mark: str) -> None:
    transaction.merge(Keeping(key=key, value=mark))
