"""The store of one dataset folder: its database and its label files, changed together."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from filelock import FileLock
from sqlalchemy import select

from segqc.store import labels, leases, scans
from segqc.store.database import (
    DATABASE_FILE,
    PATIENCE_SECONDS,
    REVISION,
    Clock,
    Database,
    StoreDamaged,
    StoreError,
    StoreReadOnly,
    Transaction,
    sqlite_url,
    utc_now,
)
from segqc.store.events import FOLDER, SERVER
from segqc.store.files import (
    Arrival,
    FoundLabel,
    LabelFiles,
    Plan,
    appearing,
    contents_of,
    holds_labels,
    sha256_of,
    state_of,
)
from segqc.store.intake import AnyContent, Intake
from segqc.store.labels import FINAL, PROPOSAL, PSEUDO, RETURNED, NewLabel
from segqc.store.records import Actor, LabelRecord, ScanRecord, ScanState
from segqc.store.schema import OPEN_STATES, Folder
from segqc.store.sources import ScanSource
from segqc.volumes import (
    SCAN_SUFFIXES,
    Volume,
    VolumeError,
    atomic_write,
    label_id,
    label_suffix,
    read_labels,
    write_labels,
)
from segqc.volumes.volume import Grid

logger = logging.getLogger(__name__)

OWN_FOLDER: Final = "segqc"
MODELS_FOLDER: Final = "models"  # below it: a folder a bundle, named by the bundle's number
_FOLDER_ID: Final = "folder-id"  # the file that tells a database outside of the folder whose it is
RESTORING_FILE: Final = "restoring"  # is there while a restore puts the store into place
_ANY: Final = AnyContent()
_NOT_TAKEN_IN: Final = "not_taken_in"  # in the notes of a version that keeps a file which is no label map
_TRIES: Final = 5


@dataclass(frozen=True, slots=True)
class LabelChange:
    """A new label version and the file that holds its content; None for a removal.

    ``found`` is the file below ``labels/`` that a person put there, where the version is made of such a one: it stays
    as it is, and nothing else is written there.
    """

    label: NewLabel
    source: Path | None
    found: FoundLabel | None = None

    @property
    def is_shown(self) -> bool:
        """Whether a file below ``labels/`` shows the version; of a mask with a planted error none does."""
        return self.label.source != "attention check"


class _Unseen(Exception):  # noqa: N818 - not an error
    """Files lie where labels are about to be written that no version holds."""

    def __init__(self, files: dict[str, tuple[str, str]]) -> None:
        super().__init__()
        self.files = files


class _Outdated(Exception):  # noqa: N818 - not an error
    """Labels are about to change that proposals were made of; these go with them."""

    def __init__(self, removals: list[LabelChange]) -> None:
        super().__init__()
        self.removals = removals


class _Overtaken(Exception):  # noqa: N818 - not an error
    """The labels that are about to change are others by now."""


class LabelTransaction:
    """A transaction in which labels change: alone with the write lock, and the new files have arrived.

    Before the changes that are asked for come those of files that somebody has edited, after them removals of
    proposals.
    """

    def __init__(self, transaction: Transaction, new: Sequence[NewLabel], edits: int, wanted: int) -> None:
        self.transaction = transaction
        self._new = new
        self._edits = edits
        self._wanted = wanted

    @property
    def replaces_edits(self) -> bool:
        """Whether somebody's files lie where the changes go; they become versions before the new ones."""
        return self._edits > 0

    @property
    def versions(self) -> list[LabelRecord]:
        """The new versions, in the order of the changes.

        Their rows are added when they are first asked for, at the latest at the end of the transaction: what is checked
        before sees the labels as they were.
        """
        return self.all_versions[self._edits : self._edits + self._wanted]

    @functools.cached_property
    def all_versions(self) -> list[LabelRecord]:
        """The same, with those that nobody asked for."""
        return [labels.add(self.transaction, label)[0] for label in self._new]


class LabelLost(StoreError, VolumeError):  # noqa: N818 - the finding, not the exception, is what callers name
    """The kept content of a label version is gone or damaged: not the caller's fault.

    Whoever works through many scans meets it as any label that can't be used.
    """

    status = 500

    def __init__(self, label: LabelRecord, what: str) -> None:
        super().__init__(
            f"the label version {label.id} of the scan {label.scan!r} ({label.tag}) is {what} {OWN_FOLDER}/labels; "
            "'segqc db check' names all such files: copy them from a backup, or submit the label once more"
        )


class Store:
    """Rows and files of one dataset folder. Safe for threads and for many processes."""

    def __init__(
        self,
        dataset: Path,
        url: str | None = None,
        *,
        clock: Clock = utc_now,
        patience_seconds: float = PATIENCE_SECONDS,
        intake: Intake = _ANY,
        source: ScanSource | None = None,
    ) -> None:
        """Prepare a store; `open` makes it ready.

        Args:
            dataset: the dataset folder; label files are kept in it.
            url: the database; by default an SQLite file in the folder.
            clock: gives the time, in UTC.
            patience_seconds: how long to wait for a database that is locked or does not answer.
            intake: what files that people put into the folder have to pass; by default their names alone.
            source: where scans come from; by default they are files of the folder.

        Raises:
            StoreError: if the URL names no database that a store can be kept in.
        """
        self.dataset = dataset.resolve()
        self.own = self.dataset / OWN_FOLDER
        self.database = Database(url or sqlite_url(self.own / DATABASE_FILE), clock, patience_seconds)
        self.files = LabelFiles(self.dataset, self.own)
        self.intake = intake
        self.source = source

    @classmethod
    def open(
        cls,
        dataset: Path,
        url: str | None = None,
        *,
        clock: Clock = utc_now,
        patience_seconds: float = PATIENCE_SECONDS,
        intake: Intake = _ANY,
        source: ScanSource | None = None,
    ) -> Store:
        """Open the store of a folder: make it where there is none, and clean up after processes that died.

        Raises:
            StoreError: if the database cannot be reached or is of another version of this program.
        """
        store = cls(dataset, url, clock=clock, patience_seconds=patience_seconds, intake=intake, source=source)
        if store.is_writable:
            try:
                store.own.mkdir(parents=True, exist_ok=True)
            except FileExistsError as error:
                raise StoreError(
                    f"{store.own}: is a file, or a link that leads nowhere, where the store's folder belongs; "
                    "move it away"
                ) from error
        if (store.own / RESTORING_FILE).exists():
            raise StoreError(f"{store.dataset}: a restore did not come to its end; run 'segqc db restore' again")
        store._check_revision()
        if url is not None:
            store._claim_database()
        if store.is_writable:
            store.recover()
        else:
            logger.warning("%s: is read-only; what changed in it since is not taken in", store.dataset)
        return store

    @property
    def is_writable(self) -> bool:
        """Whether both the database and the folder can be written."""
        return self.database.is_writable and os.access(self.dataset, os.W_OK)

    def revision(self) -> str | None:
        """The revision of the database's tables; None where there are none, and nothing else of a store.

        Raises:
            StoreError: if the database is another program's.
            StoreDamaged: if the database is lost, but label contents are there.
        """
        found = self.database.revision()
        if found is None and any(self.files.all_objects()):
            remedy = "a backup (segqc db restore BACKUP FOLDER)" if self.database.is_sqlite else "a dump of it"
            raise StoreDamaged(
                f"{self.database.shown}: the database is missing or empty, but {self.files.objects} holds label "
                f"versions; restore {remedy}, or move that folder away to begin anew"
            )
        return found

    def _check_revision(self) -> None:
        found = self.revision()
        if found is None and not self.is_writable:
            raise StoreReadOnly(f"{self.dataset}: is read-only and has no store yet; make it writable, or copy it")
        if found is None:
            with FileLock(self.own / "store.lock"):  # only one of several processes makes the tables
                if self.revision() is None:
                    self.database.upgrade()
            return
        if found != REVISION:
            newer = found > REVISION
            remedy = "use the newer version of segqc" if newer else "back it up, then run 'segqc db upgrade'"
            raise StoreError(
                f"{self.database.shown}: the store's tables are of revision {found}, wanted {REVISION}; {remedy}"
            )

    def _claim_database(self) -> None:
        """Make a database outside of the folder this folder's.

        Raises:
            StoreError: if it is another folder's: each would take the other's scans for missing.
        """
        marker = self.own / _FOLDER_ID
        mine = marker.read_text(encoding="utf-8") if marker.is_file() else None
        with self.read() as transaction:
            owner = transaction.scalar(select(Folder))
        if owner is not None and (owner.id != mine or _is_another(owner, self.dataset)):
            raise StoreError(
                f"{self.database.shown}: is the database of the dataset folder {owner.path}; name another one for "
                f"{self.dataset} ([store] url), or, if that folder was moved here, bring its segqc/{_FOLDER_ID} along"
            )
        if not self.is_writable or (owner is not None and owner.path == str(self.dataset)):
            return
        with self.write() as transaction:
            row = transaction.scalar(select(Folder))
            if row is None:
                row = Folder(id=mine or uuid.uuid4().hex, path="")
                transaction.add(row)
                with atomic_write(marker) as temporary:
                    temporary.write_text(row.id, encoding="utf-8")
            row.path = str(self.dataset)

    def read(self) -> contextlib.AbstractContextManager[Transaction]:
        """A transaction that reads one state and changes nothing."""
        return self.database.read()

    def write(self) -> contextlib.AbstractContextManager[Transaction]:
        """A transaction alone with the write lock: committed at the end, taken back on any error."""
        return self.database.write()

    def scan_file(self, scan: ScanRecord) -> Path:
        """The file of a scan; one that comes from elsewhere is fetched where it is not here, and may go again.

        Raises:
            UnknownScan: if the scan is gone from where it came from.
            ScanReplaced: if another content has taken its place there.
            SourceUnavailable: if it cannot be fetched now.
        """
        return self.dataset / scan.file if self.source is None else self.source.file(self, scan)

    def close(self) -> None:
        """Close the database's connections."""
        self.database.close()

    # ---------------------------------------------------------------------------------------------------- label files

    def save_label(self, label: NewLabel, source: Path) -> LabelRecord:
        """Keep a label map: its content for ever, its version in the history, its file under ``labels/<tag>/``.

        Args:
            label: what is known of it; ``sha256`` and ``suffix`` are filled in.
            source: the file; it is copied.

        Raises:
            UnknownScan: if there is no such scan.
            ScanReplaced: if the scan has another content than the one that the label was made for.
            OSError: if the disk is full or read-only; nothing has changed then.
        """
        with self.change_labels([LabelChange(label, source)]) as change:
            return change.versions[0]

    def remove_label(self, scan: str, tag: str, actor: Actor) -> None:
        """Take a label away; its history and content stay.

        Raises:
            StoreError: if there is none.
        """
        with self.read() as transaction:
            last = labels.current(transaction, scan, tag)
        if last is None:
            raise StoreError(f"the scan {scan!r} has no label with the tag {tag!r}")
        with self.change_labels([LabelChange(NewLabel(scan, tag, "removal", actor, parent=last.id), None)]):
            pass

    def restore_label(self, version: int, actor: Actor, tag: str | None = None) -> LabelRecord:
        """Make an earlier version the current one of its tag, or of another, again; it becomes a version of its own.

        Raises:
            StoreError: if there is no such version, or it was a removal.
        """
        with self.read() as transaction:
            old = labels.get(transaction, version)
            noted = labels.info(transaction, version)
        if old.sha256 is None or old.suffix is None:
            raise StoreError(f"the label version {version} is a removal: there is nothing to restore")
        if old.source == "attention check":
            raise StoreError(f"the label version {version} cannot be a label: it holds an error that was planted")
        if _NOT_TAKEN_IN in noted:
            raise StoreError(f"the label version {version} cannot be a label again: {noted[_NOT_TAKEN_IN]}")
        label = NewLabel(old.scan, tag or old.tag, "restored", actor, parent=old.id, checked_slices=old.checked_slices)
        return self.save_label(label, self.files.object_path(old.sha256, old.suffix))

    def label_file(self, label: LabelRecord) -> Path:
        """The file with a version's content; it never changes.

        Raises:
            StoreError: for a removal.
        """
        if label.sha256 is None or label.suffix is None:
            raise StoreError(f"the label version {label.id} is a removal and has no file")
        return self.files.object_path(label.sha256, label.suffix)

    def kept_file(self, label: LabelRecord) -> Path:
        """The same, and it is there.

        Raises:
            StoreError: for a removal.
            LabelLost: if it is gone.
        """
        path = self.label_file(label)
        if not path.is_file():
            raise LabelLost(label, "gone from")
        return path

    def read_label(
        self, label: LabelRecord, *, scan: Grid | None = None, values: Collection[int] | None = None
    ) -> Volume:
        """Read a version's content, as `segqc.volumes.read_labels` does.

        Args:
            label: the version.
            scan: the scan that it is to lie on; None for the label's own grid.
            values: the label values allowed besides 0; None allows all.

        Raises:
            StoreError: for a removal.
            LabelLost: if the content is gone, or is not what was kept.
            VolumeError: if it does not lie on the scan's grid, or has other values.
        """
        path = self.kept_file(label)
        try:
            return read_labels(path, scan=scan, values=values, limits=self.intake.limits)
        except (VolumeError, OSError) as error:
            with contextlib.suppress(OSError):
                if sha256_of(path) == label.sha256:
                    raise
            raise LabelLost(label, "damaged in") from error

    def view_file(self, label: LabelRecord) -> Path:
        """The file ``labels/<tag>/<scan>`` that shows a current version."""
        return self.files.views / self.files.view_name(
            label.scan, label.tag, label.submitted_suffix or label.suffix or ""
        )

    @contextlib.contextmanager
    def change_labels(self, changes: Sequence[LabelChange]) -> Iterator[LabelTransaction]:
        """Change several labels in one transaction, files and rows together.

        The block is the transaction: what it writes belongs to the change, and nothing has changed if it raises. The
        new contents have arrived before, and files below ``labels/`` are changed after it. A file that somebody has
        edited since it was written becomes a version first, in the same transaction, if it is about to be replaced or
        removed. A proposal is removed with the label that annotators went on from.

        Args:
            changes: the new versions.

        Yields:
            The transaction, and the new versions in it.

        Raises:
            StoreReadOnly: if the folder cannot be written.
            StoreError: if somebody writes the same files all the time.
            UnknownScan: if there is no such scan.
            ScanReplaced: if a scan has another content than the one that its label was made for.
            OSError: if the disk is full or read-only; nothing has changed then.
        """
        if not self.is_writable:
            raise StoreReadOnly(f"{self.dataset}: is read-only, and this has to write; make it writable, or copy it")
        edits: list[LabelChange] = []
        outdated: list[LabelChange] = []
        with contextlib.ExitStack() as stack:
            # both are found when the transaction begins: what is tried again has not come to the block yet
            for _ in range(_TRIES):
                try:
                    every = [*edits, *changes, *outdated]
                    change = stack.enter_context(self._change(every, len(edits), len(changes)))
                except _Outdated as found:
                    outdated = found.removals
                except _Unseen as unseen:
                    edits, work = [], stack.enter_context(tempfile.TemporaryDirectory(prefix="segqc-"))
                    for file, (scan, tag) in unseen.files.items():
                        with contextlib.suppress(FileNotFoundError):  # removed since
                            edits.append(self._edit(scan, tag, Path(file).name, Path(work)))
                else:
                    yield change
                    return
        names = ", ".join(sorted({f"labels/{edit.found.file}" for edit in edits if edit.found is not None}))
        raise StoreError(f"{names}: somebody is writing this file; try again when it is done")

    @contextlib.contextmanager
    def _change(self, changes: Sequence[LabelChange], edits: int, wanted: int) -> Iterator[LabelTransaction]:
        """Make the changes, of which only some after somebody's edits are asked for; see `LabelTransaction`.

        Raises:
            _Outdated: at the beginning, if proposals have to go that are not among the changes.
            _Unseen: at the beginning, if there are more edits.
        """
        arrivals: list[Arrival] = []
        is_moving = False
        with contextlib.ExitStack() as stack:
            for change in changes:
                suffix = suffix_of(change.source) if change.source is not None else None
                label = change.label
                held = self.files.arriving(
                    change.source, label.scan, label.tag, suffix, change.found, is_shown=change.is_shown
                )
                arrivals.append(stack.enter_context(held))
            try:
                with self.write() as transaction:
                    _check_proposals(transaction, changes)
                    lying = self._lying(transaction, changes)
                    new = [_complete(change.label, arrival) for change, arrival in zip(changes, arrivals, strict=True)]
                    changing = LabelTransaction(transaction, new, edits, wanted)
                    yield changing
                    versions = changing.all_versions
                    transaction.flush()  # what the constraints refuse is refused before files move
                    self._bring_back(transaction, changes)
                    is_moving = True
                    for number, (change, version, arrival) in enumerate(zip(changes, versions, arrivals, strict=True)):
                        # an edit's file goes with the others when the change that it precedes is put
                        key = (change.label.scan, change.label.tag)
                        others = lying[key] if number >= edits and change.is_shown else ()
                        self._put(transaction, change, version, arrival, others)
            except BaseException:
                for arrival in sorted(arrivals, key=lambda arrival: arrival.plan.found is not None):
                    # a full disk may forbid even this: what stays behind is settled when the store is opened next
                    with contextlib.suppress(OSError, StoreError):
                        if is_moving:
                            self._settle(arrival)
                        else:  # a file that holds the same as an arrival is somebody's
                            self.files.drop(arrival)
                raise
            self.files.sync(arrivals)

    def _lying(self, transaction: Transaction, changes: Sequence[LabelChange]) -> dict[tuple[str, str], list[Path]]:
        """The files that show the labels which are about to change, by scan and tag.

        Raises:
            _Unseen: if some of them are nobody's version yet, nor about to become one.
        """
        taken_in = {change.found.file: change.found.state for change in changes if change.found is not None}
        found: dict[tuple[str, str], list[Path]] = {}
        unseen: dict[str, tuple[str, str]] = {}
        shown = [change for change in changes if change.is_shown]
        for key in dict.fromkeys((change.label.scan, change.label.tag) for change in shown):
            view = labels.view_of(transaction, *key)
            files = self.files.lying(*key, *([view[0]] if view is not None else []))
            found[key] = [self.files.views / file for file in files]
            for file, path in zip(files, found[key], strict=True):
                with contextlib.suppress(FileNotFoundError):  # removed this moment
                    if file in taken_in:
                        known = taken_in[file] == state_of(path)
                    else:
                        known = self._is_known(transaction, key, file)
                    if not known:
                        unseen[file] = key
        if unseen:
            raise _Unseen(unseen)
        return found

    def _bring_back(self, transaction: Transaction, changes: Sequence[LabelChange]) -> None:
        """Show the other labels of a tag again whose folder is gone or emptied, before a file is written into it.

        It may just not be mounted (`holds_labels`). One that came back with a single file would look as if
        somebody had removed all others.
        """
        written = {(c.label.scan, c.label.tag) for c in changes if c.is_shown and c.found is None and c.source}
        for tag in {tag for _, tag in written} - {PSEUDO}:
            folder = self.files.views / tag
            if holds_labels(folder) or not (shown := labels.views(transaction, tag)):
                continue
            if folder.is_dir():
                if len(shown) == 1:
                    continue  # somebody has removed it
                with contextlib.suppress(OSError):  # it is mounted, or holds other files
                    folder.rmdir()
            logger.warning("labels/%s is gone or empty; its %d labels are shown there again", tag, len(shown))
            with appearing(folder) as new:
                for file, view in shown.items():
                    label = labels.get(transaction, view.version)
                    if (label.scan, tag) in written:
                        continue
                    content = contents_of(label.sha256, label.suffix, label.submitted_sha256, label.submitted_suffix)
                    copy = new / Path(file).name
                    shutil.copyfile(self.files.object_path(*content[-1]), copy)
                    os.utime(copy, ns=(view.modified_ns, view.modified_ns))  # the row stays true as it is

    def _is_known(self, transaction: Transaction, key: tuple[str, str], file: str) -> bool:
        """Whether a file holds what the current version of its label does.

        Its content tells: an edit may keep size and time.
        """
        label = labels.current(transaction, *key)
        return label is not None and sha256_of(self.files.views / file) in (label.sha256, label.submitted_sha256)

    def _edit(self, scan: str, tag: str, name: str, work: Path) -> LabelChange:
        """Make a version of a file that is about to be replaced, also where it is no label map."""
        try:
            with self.read() as transaction:
                return self.label_from_file(scans.get(transaction, scan), tag, name, work)
        except FileNotFoundError:
            raise
        except Exception as error:  # whatever is wrong with the file, it must not be lost
            logger.warning("labels/%s/%s is kept as a version of its own, but it is no label: %s", tag, name, error)
            return self.unchecked_label(scan, tag, name, str(error), work)

    def label_from_file(self, scan: ScanRecord, tag: str, name: str, work: Path) -> LabelChange:
        """Read a file that a person put below ``labels/<tag>/``, as the change that makes a version of it.

        Args:
            scan: its scan.
            tag: the tag.
            name: the file's name.
            work: a folder for what the change needs, as long as it is not made.

        Raises:
            VolumeError: if it is no label map of the scan.
            OSError: if it can't be read.
        """
        copy, found = self._copied(tag, name, work)
        content = self.intake.labels(copy, self.scan_file(scan), f"labels/{tag}/{name}")
        label = self._label_of_content(scan.name, tag, sha256_of(copy))
        end = name[len(label_id(name)) :]
        if content.is_plain and end in SCAN_SUFFIXES:  # what everybody reads by its values
            return LabelChange(label, copy, found)
        read = copy.with_name(f"{uuid.uuid4().hex}.nii.gz")
        write_labels(content.labels, read)
        return LabelChange(label, read, replace(found, source=copy, submitted_suffix=end))

    def _label_of_content(self, scan: str, tag: str, sha256: str) -> NewLabel:
        """What is known of a file that a person put there: it may be an earlier version's, and come from a backup."""
        with self.read() as transaction:
            old = labels.last_with_content(transaction, scan, tag, sha256)
            if old is None or _NOT_TAKEN_IN in labels.info(transaction, old.id):
                return NewLabel(scan, tag, "import", FOLDER)
        return NewLabel(scan, tag, "restored", FOLDER, parent=old.id, checked_slices=old.checked_slices)

    def unchecked_label(self, scan: str, tag: str, name: str, why: str, work: Path) -> LabelChange:
        """A change that keeps a file below ``labels/<tag>/`` which is no label map of its scan; the version notes why.

        Such a version is never the last: another one takes its place in the same transaction, or its scan is retired.
        """
        copy, found = self._copied(tag, name, work)
        return LabelChange(NewLabel(scan, tag, "import", FOLDER, info={_NOT_TAKEN_IN: why}), copy, found)

    def _copied(self, tag: str, name: str, work: Path) -> tuple[Path, FoundLabel]:
        path = self.files.views / tag / name
        found = FoundLabel(f"{tag}/{name}", state_of(path))
        copy = work / f"{uuid.uuid4().hex}{label_suffix(name) or path.suffix}"
        shutil.copyfile(path, copy)
        return copy, found

    def _put(
        self,
        transaction: Transaction,
        change: LabelChange,
        version: LabelRecord,
        arrival: Arrival,
        others: Sequence[Path],
    ) -> None:
        state = self.files.put(arrival, others)
        if not change.is_shown:
            return
        if change.found is not None:
            left = change.found.state
            labels.note_view(transaction, version, change.found.file, left.size, left.modified_ns)
        elif state is not None and version.suffix is not None:
            name = self.files.view_name(version.scan, version.tag, version.suffix)
            labels.note_view(transaction, version, name, state.size, state.modified_ns)
        else:
            labels.forget_view(transaction, version.scan, version.tag)

    def sync_edits(self, scan: str, tags: Collection[str]) -> None:
        """Make versions of a scan's label files that somebody has edited; what is no label map is left as it is."""
        with self.read() as transaction:
            record = scans.get(transaction, scan)
            try:
                self._lying(transaction, [LabelChange(NewLabel(scan, tag, "import", FOLDER), None) for tag in tags])
            except _Unseen as unseen:
                files = unseen.files
            else:
                return
        with tempfile.TemporaryDirectory(prefix="segqc-") as work:
            for file, (_, tag) in files.items():
                try:
                    with self.change_labels([self.label_from_file(record, tag, Path(file).name, Path(work))]):
                        pass
                except (VolumeError, OSError) as error:
                    logger.warning("labels/%s is left as it is: %s", file, error)

    def recover(self) -> int:
        """Bring files in line with the rows where a process died in between; returns how many changes it left."""
        abandoned = self.files.abandoned()
        for arrival in abandoned:
            self._settle(arrival)
        if abandoned:
            logger.warning("%d unfinished label changes of a process that died were cleaned up", len(abandoned))
        return len(abandoned)

    def _settle(self, arrival: Arrival) -> None:
        """After an interrupted change: content without a row goes, and the file shows what the rows say."""
        plan = arrival.plan
        with self.write() as transaction:
            keep = {sha256 for sha256, _ in plan.contents() if labels.known_content(transaction, sha256)}
            self.files.keep(arrival, keep)
            if plan.found is None:
                if plan.is_shown:
                    self._undo(transaction, plan)
            elif plan.sha256 is not None and not labels.has_content(transaction, plan.scan, plan.tag, plan.sha256):
                self._give_back(transaction, arrival, plan.found)
            self.files.discard(arrival, keep=keep)

    def _undo(self, transaction: Transaction, plan: Plan) -> None:
        """Show the current version where an interrupted change has shown its own or nothing; edits stay."""
        label = labels.current(transaction, plan.scan, plan.tag)
        view = labels.view_of(transaction, plan.scan, plan.tag)
        target = self.view_file(label) if label is not None else None
        for file in self.files.lying(plan.scan, plan.tag, *([view[0]] if view is not None else [])):
            path = self.files.views / file
            if path != target and sha256_of(path) == plan.sha256:
                path.unlink(missing_ok=True)
        if label is None or target is None:
            with contextlib.suppress(scans.UnknownScan):
                labels.forget_view(transaction, plan.scan, plan.tag)
            return
        file = str(target.relative_to(self.files.views))
        if target.is_file():
            state, sha256 = state_of(target), sha256_of(target)
            if sha256 in (label.sha256, label.submitted_sha256):
                labels.note_view(transaction, label, file, state.size, state.modified_ns)
                return
            if sha256 != plan.sha256:
                return  # somebody's edit
        self.show(transaction, label)

    def _give_back(self, transaction: Transaction, arrival: Arrival, file: str) -> None:
        """Put a person's file back that an interrupted change has taken away."""
        path, original = self.files.views / file, self.files.original(arrival)
        key = (arrival.plan.scan, arrival.plan.tag)
        if original is not None and (not path.is_file() or self._is_known(transaction, key, file)):
            self.files.show(file, original)

    def show(self, transaction: Transaction, label: LabelRecord) -> None:
        """Write the file below ``labels/`` that shows a version, as it came from where it came."""
        content = contents_of(label.sha256, label.suffix, label.submitted_sha256, label.submitted_suffix)[-1]
        file = str(self.view_file(label).relative_to(self.files.views))
        state = self.files.show(file, self.files.object_path(*content))
        labels.note_view(transaction, label, file, state.size, state.modified_ns)

    # --------------------------------------------------------------------------------------------------------- review

    def review(
        self, scan: str, state: ScanState, actor: Actor, reason: str | None = None, *, seen: int | None = None
    ) -> None:
        """Approve, reject, exclude or reopen a scan (`scans.review`).

        The final label of a scan that goes back into the queue is final no more: it stays as ``labels/returned/``,
        where the next annotator starts. Which slices of it were checked counts on if it was reopened, and not if it was
        rejected. The readings of several annotators are over, too.

        Args:
            scan: its name.
            state: what it becomes.
            actor: the reviewer.
            reason: why.
            seen: the newest label version that there was when the reviewer looked (`labels.newest`): nobody decides of
                a label that came later.

        Raises:
            UnknownScan: if there is none of this name.
            StoreError: if the scan is not in a state that allows it, a reason is wanted and missing, or its final label
                is newer than what was seen.
        """
        with self.read() as transaction:
            read = labels.readings(transaction, scan)
        self.sync_edits(scan, [FINAL, *(reading.tag for reading in read)])
        for _ in range(_TRIES):
            with contextlib.suppress(_Overtaken):
                self._review(scan, state, actor, reason, seen)
                return
        raise StoreError(f"the scan {scan!r} gets new labels all the time; try again when that is over")

    def _review(self, scan: str, state: ScanState, actor: Actor, reason: str | None, seen: int | None) -> None:
        """Review it as its labels are now.

        Raises:
            _Overtaken: if these change before the transaction has begun; nothing has changed then.
        """
        with self.read() as transaction:
            final = labels.current(transaction, scan, FINAL)
            read = labels.readings(transaction, scan)
        changes = []
        if state in OPEN_STATES:
            if final is not None:
                # what was rejected was checked in vain
                checked = () if state == "rejected" else final.checked_slices
                back = NewLabel(scan, RETURNED, "restored", actor, parent=final.id, checked_slices=checked)
                changes.append(LabelChange(back, self.label_file(final)))
            over = [*([final] if final is not None else []), *read]
            changes += [LabelChange(NewLabel(scan, f.tag, "removal", actor, parent=f.id), None) for f in over]
        with self.change_labels(changes) as change:
            now = labels.current(change.transaction, scan, FINAL), labels.readings(change.transaction, scan)
            if now != (final, read):
                raise _Overtaken
            if final is not None and seen is not None and final.id > seen:
                newer = f"has a newer final label, version {final.id} by {final.actor.name}"
                raise StoreError(f"the scan {scan!r} {newer}: look at it first")
            scans.review(change.transaction, scan, state, actor, reason)
            if state != "approved":
                leases.release(change.transaction, scan, actor)


def has_store(dataset: Path) -> bool:
    """Whether a folder holds a store, or label versions or networks of one whose database lies elsewhere or is lost."""
    own = dataset / OWN_FOLDER
    kept = [own / name for name in (DATABASE_FILE, MODELS_FOLDER, _FOLDER_ID, RESTORING_FILE)]
    return any(path.exists() for path in [*kept, LabelFiles(dataset, own).objects])


def _is_another(owner: Folder, dataset: Path) -> bool:
    """Whether the folder that a database belongs to is there, and is not this one: this one is a copy of it then."""
    path = Path(owner.path)
    marker = path / OWN_FOLDER / _FOLDER_ID
    return marker.is_file() and marker.read_text(encoding="utf-8") == owner.id and not path.samefile(dataset)


def suffix_of(path: Path) -> str:
    """The suffix that files of scans and labels are kept under, in lower case; ``.nii.gz`` is one."""
    return label_suffix(path.name) or path.suffix


def _check_proposals(transaction: Transaction, changes: Sequence[LabelChange]) -> None:
    """Have the proposals removed whose labels change.

    Raises:
        _Outdated: if some of them stay.
    """
    kept = {change.label.scan for change in changes if change.label.tag == PROPOSAL}
    moved_on = {change.label.scan for change in changes if labels.is_worked_on(change.label.tag)} - kept
    proposals = [labels.current(transaction, scan, PROPOSAL) for scan in sorted(moved_on)]
    removals = [NewLabel(p.scan, PROPOSAL, "removal", SERVER, parent=p.id) for p in proposals if p is not None]
    if removals:
        raise _Outdated([LabelChange(removal, None) for removal in removals])


def _complete(label: NewLabel, arrival: Arrival) -> NewLabel:
    plan = arrival.plan
    return replace(
        label,
        sha256=plan.sha256,
        suffix=plan.suffix,
        submitted_sha256=plan.submitted_sha256,
        submitted_suffix=plan.submitted_suffix,
    )
