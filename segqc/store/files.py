"""The files of label versions: kept for ever under their sha256, and shown as ``labels/<tag>/<scan>.nii.gz``.

Files and rows change together, whenever the process dies: new files wait in a folder of their own with a plan and a
lock; with the write lock in hand they are renamed into place, then the rows are committed, and when all is on the disk
the folder goes. A folder whose lock is free belongs to a process that died: `Arrival.plan` says what has to be looked
after. Files that people put below ``labels/`` stay as they are, and nothing is written over one that no version holds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter

from segqc.text import nfc
from segqc.volumes import LABEL_SUFFIXES, as_spelled, atomic_write, label_suffix, sync

_CHUNK: Final = 1 << 20
_CLOCK_TICK_NS: Final = 50_000_000
_PAST_NS: Final = 1_000_000_000
_FURTHEST_NS: Final = 2**63 - 1  # from 1970; in the year 2262
_SURELY_OVER_SECONDS: Final = 3600.0
_WAITING: Final = ("object", "source")  # the names of new contents, in the order of `Plan.contents`


@dataclass(frozen=True, slots=True)
class Plan:
    """What is about to change: a scan's label under a tag, and the addresses of the new contents.

    ``submitted_sha256`` is that of the file that a label map was read from, where that is another file. ``found`` is
    the file, relative to ``labels/``, that a person put there and that stays as it is; None where the label's file is
    written by us. ``is_shown`` says whether there is such a file at all.
    """

    scan: str
    tag: str
    sha256: str | None
    suffix: str | None
    submitted_sha256: str | None = None
    submitted_suffix: str | None = None
    found: str | None = None
    is_shown: bool = True

    def contents(self) -> list[tuple[str, str]]:
        """Address and suffix of each new content."""
        return contents_of(self.sha256, self.suffix, self.submitted_sha256, self.submitted_suffix)


_PLAN: TypeAdapter[Plan] = TypeAdapter(Plan)


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells quickly that a file is still as it was left; a difference is looked into by its hash."""

    size: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """That of a file whose status was asked for; a time that no database keeps counts as the nearest one."""
        return cls(status.st_size, max(-_FURTHEST_NS, min(status.st_mtime_ns, _FURTHEST_NS)))


@dataclass(frozen=True, slots=True)
class FoundLabel:
    """A label file that a person put below ``labels/``, as it was when it was read.

    Attributes:
        file: its path relative to ``labels/``.
        state: its size and time before it was read.
        source: a copy of it, where the label map had to be read from it into another file.
        submitted_suffix: the end of its name, in its own spelling, in that case.
    """

    file: str
    state: FileState
    source: Path | None = None
    submitted_suffix: str | None = None


@dataclass(frozen=True, slots=True)
class Arrival:
    """New content that waits, written to the disk, to be put into place."""

    folder: Path
    plan: Plan


class LabelFiles:
    """The label files of one dataset folder."""

    def __init__(self, dataset: Path, own: Path) -> None:
        """Take the folders: ``labels/`` lies in the dataset folder, all else in SegQC's own."""
        self.views = dataset / "labels"
        self.objects = own / "labels"
        self._incoming = own / "incoming"

    def object_path(self, sha256: str, suffix: str) -> Path:
        """Where content lies, for ever."""
        return self.objects / sha256[:2] / f"{sha256}{suffix}"

    def view_name(self, scan: str, tag: str, suffix: str) -> str:
        """The path of a label relative to ``labels/``; a file that is there keeps its Unicode form."""
        return f"{tag}/{as_spelled(self.views / tag / f'{scan}{suffix}').name}"

    @contextlib.contextmanager
    def arriving(
        self,
        source: Path | None,
        scan: str,
        tag: str,
        suffix: str | None,
        found: FoundLabel | None = None,
        *,
        is_shown: bool = True,
    ) -> Iterator[Arrival]:
        """Copy content (None for a removal) to the disk and hold its place until the block ends.

        The folder stays if the block fails: whoever recovers finds it.

        Args:
            source: the file with the content.
            scan: the scan's name.
            tag: the label's tag.
            suffix: the suffix that the content is kept under.
            found: the file below ``labels/`` that shows the label already; without it one will be written.
            is_shown: whether one will be.

        Raises:
            OSError: if the disk is full or read-only; nothing is left then.
        """
        name = uuid.uuid4().hex
        beginning, folder = self._incoming / f".{name}", self._incoming / name
        beginning.mkdir(parents=True)
        lock = os.open(beginning / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            beginning.rename(folder)  # whoever looks for abandoned arrivals sees it with its lock taken, or not at all
            try:
                sha256 = original = None
                if source is not None:
                    copies = [folder / "object"] + ([folder / "view"] if found is None and is_shown else [])
                    sha256 = _copy_to(source, copies)
                if found is not None and found.source is not None:
                    original = _copy_to(found.source, [folder / "source"])
                for kept in _WAITING:
                    with contextlib.suppress(FileNotFoundError):
                        (folder / kept).chmod(0o444)  # kept content is never written again
                plan = Plan(
                    scan,
                    tag,
                    sha256,
                    suffix,
                    original,
                    found.submitted_suffix if found is not None and original is not None else None,
                    found.file if found is not None else None,
                    is_shown,
                )
                _write(folder / "plan.json", _PLAN.dump_json(plan))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            yield Arrival(folder, plan)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)

    def put(self, arrival: Arrival, others: Collection[Path] = ()) -> FileState | None:
        """Move the new files into place; the caller holds the write lock and commits right after.

        Args:
            arrival: what waits.
            others: the files that showed the label until now.

        Returns:
            How the label's file was left; None for a removal, a label that is not shown, and for a file that a person
            put there.
        """
        plan = arrival.plan
        for waiting, kept in self._contents(arrival):
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.replace(waiting, kept)
        written = plan.found
        state = None
        if plan.suffix is not None and plan.found is None and plan.is_shown:
            written = self.view_name(plan.scan, plan.tag, plan.suffix)
            state = self._show(arrival.folder / "view", written)
        for path in others:
            if written is None or path != self.views / written:
                path.unlink(missing_ok=True)
        return state

    def sync(self, arrivals: Collection[Arrival]) -> None:
        """Make what was put into place outlast a power failure; the write lock is not needed for it.

        Until then the arrivals stay, and `keep` mends what a failure undid.
        """
        folders = {kept.parent for arrival in arrivals for _, kept in self._contents(arrival)}
        folders |= {self.views / arrival.plan.tag for arrival in arrivals if arrival.plan.found is None}
        for folder in sorted(folders):
            with contextlib.suppress(FileNotFoundError):  # no label is shown under the tag
                sync(folder)

    def keep(self, arrival: Arrival, known: Collection[str]) -> None:
        """Put the contents of an abandoned arrival into place that rows speak of, where they are not."""
        for (sha256, _), (waiting, kept) in zip(arrival.plan.contents(), self._contents(arrival), strict=True):
            if sha256 in known and waiting.is_file() and not kept.is_file():
                kept.parent.mkdir(parents=True, exist_ok=True)
                os.replace(waiting, kept)
                sync(kept.parent)

    def _contents(self, arrival: Arrival) -> list[tuple[Path, Path]]:
        """Where each new content waits, and where it is kept."""
        contents = arrival.plan.contents()
        return [(arrival.folder / name, self.object_path(*c)) for name, c in zip(_WAITING, contents, strict=False)]

    def show(self, file: str, content: Path) -> FileState:
        """Make a file below ``labels/`` a copy of another one."""
        self._incoming.mkdir(parents=True, exist_ok=True)
        temporary = self._incoming / f"{uuid.uuid4().hex}.view"
        try:
            _copy_to(content, [temporary])
            state = self._show(temporary, file)
            sync((self.views / file).parent)
            return state
        finally:
            temporary.unlink(missing_ok=True)

    def _show(self, ready: Path, file: str) -> FileState:
        target = self.views / file
        target.parent.mkdir(parents=True, exist_ok=True)
        # a time in the past: whatever is written into the file from now on gives it another one
        before = time.time_ns() - _PAST_NS
        os.utime(ready, ns=(before, before))
        try:
            os.replace(ready, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            with atomic_write(target) as beside:  # labels/ lies on another disk
                shutil.copy2(ready, beside)
        return state_of(target)

    def lying(self, scan: str, tag: str, *also: str) -> list[str]:
        """The files below ``labels/`` that show, or may show, a scan's label under a tag, in any format."""
        names = dict.fromkeys([*self._names(scan, tag), *also])
        return [name for name in names if os.path.isfile(os.path.join(self.views, name))]

    def _names(self, scan: str, tag: str) -> list[str]:
        names = [f"{scan}{suffix}" for suffix in LABEL_SUFFIXES]
        if not scan.isascii() and (self.views / tag).is_dir():  # in any Unicode form
            wanted = {nfc(name) for name in names}
            names += sorted(name for name in os.listdir(self.views / tag) if nfc(name) in wanted)
        return [f"{tag}/{name}" for name in names]

    def abandoned(self) -> list[Arrival]:
        """Arrivals whose process died, each with its plan; those without a whole plan never began and are removed."""
        if not self._incoming.is_dir():
            return []
        found = []
        for folder in sorted(self._incoming.iterdir()):
            if not folder.is_dir() or is_locked(folder / "lock") or _is_beginning(folder):
                continue
            try:
                found.append(Arrival(folder, _PLAN.validate_json((folder / "plan.json").read_bytes())))
            except (OSError, ValueError):
                shutil.rmtree(folder, ignore_errors=True)
        # what people put there comes back after what we wrote over it is undone
        return sorted(found, key=lambda arrival: arrival.plan.found is not None)

    def stale(self) -> list[Path]:
        """What dead processes left among the arrivals, untouched: unlocked folders, and old ones without a lock."""
        if not self._incoming.is_dir():
            return []
        found = []
        for path in sorted(self._incoming.iterdir()):
            lock = path / "lock"
            with contextlib.suppress(FileNotFoundError):  # its process has just ended cleanly
                if not _is_beginning(path) and (not is_locked(lock) if lock.exists() else _is_old(path)):
                    found.append(path)
        return found

    def original(self, arrival: Arrival) -> Path | None:
        """The content of the file that a person put below ``labels/``, wherever an interrupted change has left it."""
        plan = arrival.plan
        if plan.found is None or not plan.contents():
            return None
        name = "object" if plan.submitted_sha256 is None else "source"
        return next((p for p in (self.object_path(*plan.contents()[-1]), arrival.folder / name) if p.is_file()), None)

    def discard(self, arrival: Arrival, *, keep: Collection[str]) -> None:
        """Clean up after an abandoned arrival; its contents go, too, but those that rows speak of."""
        for sha256, suffix in arrival.plan.contents():
            if sha256 not in keep:
                self.object_path(sha256, suffix).unlink(missing_ok=True)
        self.drop(arrival)

    def drop(self, arrival: Arrival) -> None:
        """Clean up after an arrival of which nothing was put into place."""
        shutil.rmtree(arrival.folder, ignore_errors=True)

    def all_objects(self) -> Iterator[Path]:
        """All kept files."""
        if self.objects.is_dir():
            yield from (path for path in sorted(self.objects.rglob("*")) if path.is_file())


def holds_labels(folder: Path) -> bool:
    """Whether a tag's folder is there and holds a file of labels; one that does not may just not be mounted."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as found:
        return any(label_suffix(entry.name) is not None for entry in found if not entry.name.startswith("."))


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to put files into; one that is not there appears with all of them at once.

    So it never looks like a folder that has lost some.
    """
    if folder.is_dir():
        yield folder
        return
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        yield temporary


def _is_beginning(arrival: Path) -> bool:
    """Whether another process is about to take the arrival's lock."""
    return arrival.name.startswith(".") and not _is_old(arrival)


def _is_old(path: Path) -> bool:
    try:
        return path.stat().st_mtime < time.time() - _SURELY_OVER_SECONDS
    except FileNotFoundError:  # it has just begun, or ended cleanly
        return False


def contents_of(
    sha256: str | None, suffix: str | None, submitted_sha256: str | None, submitted_suffix: str | None
) -> list[tuple[str, str]]:
    """Address and suffix of a label version's content, and of the file that it was read from."""
    pairs = ((sha256, suffix), (submitted_sha256, submitted_suffix))
    return [(address, end) for address, end in pairs if address is not None and end is not None]


def signature_of(status: os.stat_result) -> str:
    """What tells quickly that a file still holds what it held; empty if it was written a moment ago.

    A further change within the clock's tick would go unseen then.
    """
    now = time.time_ns()
    recent = any(abs(now - at) <= _CLOCK_TICK_NS for at in (status.st_mtime_ns, status.st_ctime_ns))
    return "" if recent else raw_signature(status)


def raw_signature(status: os.stat_result) -> str:
    """The signature that a file has once it was written long enough ago.

    Programs may set the time of the last modification back, but not that of the last change.
    """
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_ino}"


def state_of(path: Path) -> FileState:
    """Size and time of a file."""
    return FileState.of(path.stat())


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


def _copy_to(source: Path, targets: Sequence[Path]) -> str:
    """Copy a file to several places, on the disk when this returns, and return the address of its content."""
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        content = stack.enter_context(source.open("rb"))
        copies = [stack.enter_context(target.open("wb")) for target in targets]
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
            for copy in copies:
                copy.write(chunk)
        for copy in copies:
            copy.flush()
            os.fsync(copy.fileno())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock of a file."""
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
