"""The store of one studies folder: its database and its label files, changed together."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias

from filelock import FileLock

from segqc.store import labels, leases, scans
from segqc.store.database import (
    DATABASE_FILE,
    PATIENCE_SECONDS,
    REVISION,
    Clock,
    Database,
    StoreError,
    Transaction,
    sqlite_url,
    utc_now,
)
from segqc.store.files import Arrival, LabelFiles
from segqc.store.labels import FINAL, RETURNED, NewLabel
from segqc.store.schema import OPEN_STATES
from segqc.store.values import LabelRecord, ScanState, Who

logger = logging.getLogger(__name__)

OWN_FOLDER: Final = "segqc"


@dataclass(frozen=True, slots=True)
class LabelChange:
    """A new label version and the file that holds its content; None for a removal."""

    label: NewLabel
    source: Path | None


First: TypeAlias = Callable[[Transaction], None]
Then: TypeAlias = Callable[[Transaction, list[LabelRecord]], None]


class Store:
    """Rows and files of one studies folder. Safe for threads and for many processes."""

    def __init__(
        self,
        studies: Path,
        url: str | None = None,
        *,
        clock: Clock = utc_now,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """Prepare a store; `open` makes it ready.

        Args:
            studies: the studies folder; label files are kept in it.
            url: the database; by default an SQLite file in the folder.
            clock: gives the time, in UTC.
            patience_seconds: how long to wait for a database that is locked or does not answer.

        Raises:
            StoreError: if the URL names no database that a store can be kept in.
        """
        self.studies = studies.resolve()
        self.own = self.studies / OWN_FOLDER
        self.database = Database(url or sqlite_url(self.own / DATABASE_FILE), clock, patience_seconds)
        self.files = LabelFiles(self.studies, self.own)

    @classmethod
    def open(
        cls,
        studies: Path,
        url: str | None = None,
        *,
        clock: Clock = utc_now,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> Store:
        """Open the store of a folder: make it where there is none, and clean up after processes that died.

        Raises:
            StoreError: if the database cannot be reached or is of another version of this program.
        """
        store = cls(studies, url, clock=clock, patience_seconds=patience_seconds)
        store.own.mkdir(parents=True, exist_ok=True)
        store._check_revision()
        store.recover()
        return store

    def _check_revision(self) -> None:
        found = self.database.revision()
        if found is None:
            with FileLock(self.own / "store.lock"):  # only one of several processes makes the tables
                if self.database.revision() is None:
                    self.database.upgrade()
            return
        if found != REVISION:
            newer = found > REVISION
            remedy = "use the newer version of segqc" if newer else "back it up, then run 'segqc db upgrade'"
            raise StoreError(
                f"{self.database.shown}: the store's tables are of revision {found}, wanted {REVISION}; {remedy}"
            )

    def read(self) -> contextlib.AbstractContextManager[Transaction]:
        """A transaction that reads one state and changes nothing."""
        return self.database.read()

    def write(self) -> contextlib.AbstractContextManager[Transaction]:
        """A transaction alone with the pen: committed at the end, taken back on any error."""
        return self.database.write()

    def close(self) -> None:
        """Close the database's connections."""
        self.database.close()

    # ---------------------------------------------------------------------------------------------------- label files

    def save_label(self, label: NewLabel, source: Path, then: Then | None = None) -> LabelRecord:
        """Keep a label map: its content for ever, its version in the history, its file under ``labels/<tag>/``.

        Args:
            label: what is known of it; ``sha256`` and ``suffix`` are filled in.
            source: the file; it is copied.
            then: what else belongs to the same transaction, called with the new version.

        Raises:
            UnknownScan: if there is no such scan.
            OSError: if the disk is full or read-only; nothing has changed then.
        """
        return self.change_labels([LabelChange(label, source)], then)[0]

    def remove_label(self, scan: str, tag: str, who: Who) -> None:
        """Take a label away; its history and content stay.

        Raises:
            StoreError: if there is none.
        """
        with self.read() as transaction:
            last = labels.current(transaction, scan, tag)
        if last is None:
            raise StoreError(f"the scan {scan!r} has no label with the tag {tag!r}")
        self.change_labels([LabelChange(NewLabel(scan, tag, "removal", who, parent=last.id), None)])

    def restore_label(self, version: int, who: Who, tag: str | None = None) -> LabelRecord:
        """Make an earlier version the current one of its tag, or of another, again; it becomes a version of its own.

        Raises:
            StoreError: if there is no such version, or it was a removal.
        """
        with self.read() as transaction:
            old = labels.get(transaction, version)
        if old.sha256 is None or old.suffix is None:
            raise StoreError(f"the label version {version} is a removal: there is nothing to restore")
        label = NewLabel(old.scan, tag or old.tag, "restored", who, parent=old.id)
        return self.save_label(label, self.files.object_path(old.sha256, old.suffix))

    def label_file(self, label: LabelRecord) -> Path:
        """The file with a version's content; it never changes.

        Raises:
            StoreError: for a removal.
        """
        if label.sha256 is None or label.suffix is None:
            raise StoreError(f"the label version {label.id} is a removal and has no file")
        return self.files.object_path(label.sha256, label.suffix)

    def view_file(self, label: LabelRecord) -> Path:
        """The file ``labels/<tag>/<scan>`` that shows a current version."""
        return self.files.views / self.files.view_name(label.scan, label.tag, label.suffix or "")

    def change_labels(
        self, changes: Sequence[LabelChange], then: Then | None = None, *, first: First | None = None
    ) -> list[LabelRecord]:
        """Change several labels in one transaction, files and rows together; see `save_label`.

        ``first`` and ``then`` are what else belongs to the transaction, before and after the new versions.
        """
        arrivals: list[Arrival] = []
        with contextlib.ExitStack() as stack:
            for change in changes:
                suffix = suffix_of(change.source) if change.source is not None else None
                held = self.files.arriving(change.source, change.label.scan, change.label.tag, suffix)
                arrivals.append(stack.enter_context(held))
            try:
                with self.write() as transaction:
                    if first is not None:
                        first(transaction)
                    versions = [
                        labels.add(transaction, replace(c.label, sha256=a.plan.sha256, suffix=a.plan.suffix))[0]
                        for c, a in zip(changes, arrivals, strict=True)
                    ]
                    if then is not None:
                        then(transaction, versions)
                    transaction.flush()  # what the constraints refuse is refused before files move
                    for version, arrival in zip(versions, arrivals, strict=True):
                        self._put(transaction, version, arrival)
            except BaseException:
                for arrival in arrivals:
                    # a full disk may forbid even this: what stays behind is settled when the store is opened next
                    with contextlib.suppress(OSError, StoreError):
                        self._settle(arrival)
                raise
        return versions

    def _put(self, transaction: Transaction, version: LabelRecord, arrival: Arrival) -> None:
        state = self.files.put(arrival)
        if state is None or version.suffix is None:
            labels.forget_view(transaction, version.scan, version.tag)
        else:
            name = self.files.view_name(version.scan, version.tag, version.suffix)
            labels.note_view(transaction, version, name, state.size, state.modified_ns)

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
            keep = plan.sha256 is not None and labels.known_content(transaction, plan.sha256)
            self._show(transaction, plan.scan, plan.tag)
            self.files.discard(arrival, keep_object=keep)

    def _show(self, transaction: Transaction, scan: str, tag: str) -> None:
        label = labels.current(transaction, scan, tag)
        if label is None or label.sha256 is None or label.suffix is None:
            self.files.clear_view(scan, tag)
            with contextlib.suppress(scans.UnknownScan):
                labels.forget_view(transaction, scan, tag)
            return
        state = self.files.show(scan, tag, label.sha256, label.suffix)
        name = self.files.view_name(scan, tag, label.suffix)
        labels.note_view(transaction, label, name, state.size, state.modified_ns)

    # --------------------------------------------------------------------------------------------------------- review

    def review(self, scan: str, state: ScanState, who: Who, reason: str | None = None) -> None:
        """Approve, reject, exclude or reopen a scan (`scans.review`).

        The final label of a scan that goes back into the queue is final no more: it stays as ``labels/returned/``,
        where the next annotator starts. The readings of several annotators are over, too.

        Raises:
            UnknownScan: if there is none of this name.
            StoreError: if the scan is not in a state that allows it, or a reason is wanted and missing.
        """

        def decide(transaction: Transaction) -> None:
            scans.review(transaction, scan, state, who, reason)
            if state != "approved":
                leases.release(transaction, scan, who)

        with self.read() as transaction:
            final = labels.current(transaction, scan, FINAL)
            read = labels.readings(transaction, scan)
        changes = []
        if state in OPEN_STATES:
            if final is not None:
                back = NewLabel(scan, RETURNED, "restored", who, parent=final.id)
                changes.append(LabelChange(back, self.label_file(final)))
            over = [*([final] if final is not None else []), *read]
            changes += [LabelChange(NewLabel(scan, f.tag, "removal", who, parent=f.id), None) for f in over]
        self.change_labels(changes, first=decide)


def suffix_of(path: Path) -> str:
    """The suffix that label files keep; ``.nii.gz`` is one."""
    return ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
