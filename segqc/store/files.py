"""The files of label versions: kept for ever under their sha256, and shown as ``labels/<tag>/<scan>.nii.gz``.

Files and rows change together, whenever the process dies: new files wait in a folder of their own with a plan and a
lock; with the pen in hand they are renamed into place, then the rows are committed, then the folder goes. A folder
whose lock is free belongs to a process that died: `Arrival.plan` says what has to be looked after.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter

_CHUNK: Final = 1 << 20
_SURELY_OVER_SECONDS: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is about to change: a scan's label under a tag, and the address of the new content."""

    scan: str
    tag: str
    sha256: str | None
    suffix: str | None


_PLAN: TypeAdapter[Plan] = TypeAdapter(Plan)


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells quickly that a file is still as it was left; a difference is looked into by its hash."""

    size: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """New content that waits, written to the disk, to be put into place."""

    folder: Path
    plan: Plan


class LabelFiles:
    """The label files of one studies folder."""

    def __init__(self, studies: Path, own: Path) -> None:
        """Take the folders: ``labels/`` lies in the studies folder, all else in SegQC's own."""
        self.views = studies / "labels"
        self.objects = own / "labels"
        self._incoming = own / "incoming"

    def object_path(self, sha256: str, suffix: str) -> Path:
        """Where content lies, for ever."""
        return self.objects / sha256[:2] / f"{sha256}{suffix}"

    def view_name(self, scan: str, tag: str, suffix: str) -> str:
        """The path of a label relative to ``labels/``."""
        return f"{tag}/{scan}{suffix}"

    @contextlib.contextmanager
    def arriving(self, source: Path | None, scan: str, tag: str, suffix: str | None) -> Iterator[Arrival]:
        """Copy content (None for a removal) to the disk and hold its place until the block ends.

        The folder stays if the block fails: whoever recovers finds it.

        Raises:
            OSError: if the disk is full or read-only; nothing is left then.
        """
        folder = self._incoming / uuid.uuid4().hex
        folder.mkdir(parents=True)
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                sha256 = _copy_twice(source, folder / "object", folder / "view") if source is not None else None
                plan = Plan(scan, tag, sha256, suffix)
                _write(folder / "plan.json", _PLAN.dump_json(plan))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            yield Arrival(folder, plan)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)

    def put(self, arrival: Arrival) -> FileState | None:
        """Rename the new files into place; the caller holds the pen and commits right after."""
        plan = arrival.plan
        if plan.sha256 is None or plan.suffix is None:
            self.clear_view(plan.scan, plan.tag)
            return None
        kept = self.object_path(plan.sha256, plan.suffix)
        kept.parent.mkdir(parents=True, exist_ok=True)
        os.replace(arrival.folder / "object", kept)
        _sync_folder(kept.parent)
        return self._show(arrival.folder / "view", plan.scan, plan.tag, plan.suffix)

    def show(self, scan: str, tag: str, sha256: str, suffix: str) -> FileState:
        """Make ``labels/<tag>/<scan>`` the content of this address again."""
        self._incoming.mkdir(parents=True, exist_ok=True)
        temporary = self._incoming / f"{uuid.uuid4().hex}.view"
        try:
            shutil.copyfile(self.object_path(sha256, suffix), temporary)
            return self._show(temporary, scan, tag, suffix)
        finally:
            temporary.unlink(missing_ok=True)

    def _show(self, ready: Path, scan: str, tag: str, suffix: str) -> FileState:
        target = self.views / self.view_name(scan, tag, suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(ready, target)
        self.clear_view(scan, tag, but=suffix)
        _sync_folder(target.parent)
        return state_of(target)

    def clear_view(self, scan: str, tag: str, *, but: str | None = None) -> None:
        """Remove what ``labels/<tag>/`` shows of a scan, in any format but one."""
        for suffix in VIEW_SUFFIXES:
            if suffix != but:
                (self.views / self.view_name(scan, tag, suffix)).unlink(missing_ok=True)

    def abandoned(self) -> list[Arrival]:
        """Arrivals whose process died, each with its plan; those without a whole plan never began and are removed."""
        if not self._incoming.is_dir():
            return []
        found = []
        for folder in sorted(self._incoming.iterdir()):
            if not folder.is_dir():
                continue
            if _is_locked(folder / "lock"):
                continue
            try:
                found.append(Arrival(folder, _PLAN.validate_json((folder / "plan.json").read_bytes())))
            except (OSError, ValueError):
                shutil.rmtree(folder, ignore_errors=True)
        return found

    def leftovers(self) -> list[Path]:
        """What dead processes left among the arrivals, untouched: unlocked folders, and old ones without a lock."""
        if not self._incoming.is_dir():
            return []
        old = time.time() - _SURELY_OVER_SECONDS
        found = []
        for path in sorted(self._incoming.iterdir()):
            lock = path / "lock"
            with contextlib.suppress(FileNotFoundError):  # its process has just ended orderly
                if not _is_locked(lock) if lock.exists() else path.stat().st_mtime < old:
                    found.append(path)
        return found

    def discard(self, arrival: Arrival, *, keep_object: bool) -> None:
        """Clean up after an abandoned arrival; its object goes, too, unless a row speaks of it."""
        plan = arrival.plan
        if not keep_object and plan.sha256 is not None and plan.suffix is not None:
            self.object_path(plan.sha256, plan.suffix).unlink(missing_ok=True)
        shutil.rmtree(arrival.folder, ignore_errors=True)

    def all_objects(self) -> Iterator[Path]:
        """All kept files."""
        if self.objects.is_dir():
            yield from (path for path in sorted(self.objects.rglob("*")) if path.is_file())


VIEW_SUFFIXES: Final = (".nii.gz", ".nii", ".nrrd")


def state_of(path: Path) -> FileState:
    """Size and time of a file."""
    status = path.stat()
    return FileState(status.st_size, status.st_mtime_ns)


def sha256_of(path: Path) -> str:
    """The address of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_with_sha256(source: Path, target: Path) -> str:
    """Copy a file and return the address of what was copied."""
    digest = hashlib.sha256()
    with source.open("rb") as content, target.open("wb") as copy:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
            copy.write(chunk)
    return digest.hexdigest()


def _copy_twice(source: Path, first: Path, second: Path) -> str:
    digest = hashlib.sha256()
    with source.open("rb") as content, first.open("wb") as one, second.open("wb") as two:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
            one.write(chunk)
            two.write(chunk)
        for file in (one, two):
            file.flush()
            os.fsync(file.fileno())
    first.chmod(0o444)  # kept content is never written again
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename in a folder outlast a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_locked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True  # being made, or being removed, this very moment
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
