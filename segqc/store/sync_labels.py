"""Taking in the labels that people put into the folders of tags, changed there or removed."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Final, TypeVar

from segqc.store import findings, labels, scans
from segqc.store.database import Transaction
from segqc.store.events import FOLDER
from segqc.store.files import FileState, holds_labels, sha256_of, signature_of
from segqc.store.findings import Finding
from segqc.store.labels import NewLabel
from segqc.store.misplaced import UNPRINTABLE, visible_files
from segqc.store.sources import SourceUnavailable
from segqc.store.store import LabelChange, Store
from segqc.text import nfc, printable
from segqc.volumes import LABEL_SUFFIXES, label_id, label_suffix

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LABEL_BATCH: Final = 50


def sync_labels(store: Store, folder: Path, noted: Mapping[str, Finding], stop: Callable[[], bool]) -> tuple[int, int]:
    """Bring the labels of a tag in line with its folder.

    Args:
        store: the store.
        folder: the tag's, below ``labels/``.
        noted: what was not taken in before, by file.
        stop: asked after each batch of files whether to leave the rest for the next time.

    Returns:
        How many labels are new, and how many were removed.
    """
    tag = folder.name
    with store.read() as transaction:
        marks = labels.view_marks(transaction, tag)
    states: dict[str, FileState] = {}
    signatures: dict[str, str] = {}
    own = {file for file in noted if os.path.dirname(file) == f"labels/{tag}"}
    passed: set[str] = set()
    unsettled: set[str] = set()
    unreadable: dict[str, str] = {}
    settled = 0
    for entry, status in visible_files(folder, unreadable) if folder.is_dir() else ():
        name = entry.name
        if name != printable(name):
            unreadable[printable(name)] = UNPRINTABLE
            continue
        state = states[name] = FileState.of(status)
        if labels.view_mark(f"{tag}/{name}", state.size, state.modified_ns) in marks:
            settled += 1
            if own and f"labels/{tag}/{name}" in own:
                passed.add(f"labels/{tag}/{name}")  # a good one was written in its place
            continue
        signatures[name] = signature_of(status)
        if not findings.is_still(noted, f"labels/{tag}/{name}", signatures[name]):
            unsettled.add(name)
    passed |= {file for file in own if os.path.basename(file) not in states}
    files = {name: f"labels/{tag}/{name}" for name in unreadable}
    found = [Finding(file, "label", f"{file}: {unreadable[name]}", "") for name, file in files.items()]
    added = removed = 0
    if unsettled or settled < len(marks):
        pass_ = _LabelPass(store, tag, states, signatures)
        added, removed, unusable = pass_.run(unsettled, unreadable, stop)
        found += unusable
        passed |= {f"labels/{tag}/{name}" for name in unsettled} & own
    passed -= {finding.file for finding in found}
    fresh = [finding for finding in found if noted.get(finding.file) != finding]
    if passed or fresh:
        with store.write() as transaction:
            findings.clear(transaction, passed)
            findings.record(transaction, fresh, store.intake.version)
    return added, removed


class _LabelPass:
    """One look through the labels of a tag, as the folder and the rows were when it began."""

    def __init__(self, store: Store, tag: str, states: Mapping[str, FileState], signatures: Mapping[str, str]) -> None:
        self.store, self.tag, self.states, self.signatures = store, tag, states, signatures
        with store.read() as transaction:
            self.left = labels.views(transaction, tag)
            self.scans = {scan.name: scan for scan in scans.listing(transaction) if scan.missing_since is None}
        self.alike = {nfc(name): name for name in self.scans}
        self.shown = {self._scan_of(file): file for file in self.left}
        self.findings: list[Finding] = []

    def run(
        self, unsettled: Collection[str], unreadable: Collection[str], stop: Callable[[], bool]
    ) -> tuple[int, int, list[Finding]]:
        """Take in files that are new or were changed, and note removed ones; what cannot be read now is not removed."""
        by_scan: dict[str, list[str]] = {}
        known = [name for name in unsettled if self._has_scan(name)]
        touched = self._only_touched([name for name in known if self._was_shown(name)])
        for name in sorted(set(known) - touched, key=lambda name: -self.states[name].modified_ns):
            by_scan.setdefault(self._scan_of(name), []).append(name)
        added = done = 0
        for batch in _batches(list(by_scan.items())):
            if stop():
                break
            with tempfile.TemporaryDirectory(prefix="segqc-") as work:
                # of several files for one scan the newest counts; the others become versions before it
                read = (self._read(names, Path(work)) for _, names in batch)
                added += len(self._commit([change for change in read if change is not None]))
            done += len(batch)
            if len(by_scan) > _LABEL_BATCH:
                logger.info("taking in labels/%s: %d of %d", self.tag, done, len(by_scan))
        # a file that cannot be used, whatever its suffix, has taken the label's place: it stays, and nothing is removed
        lying = {self._scan_of(name) for name in (*self.states, *unreadable) if label_suffix(name) is not None}
        gone = [
            scan
            for scan, file in self.shown.items()
            if scan not in lying and not os.path.isfile(self.store.files.views / file)
        ]
        if not lying and may_be_unmounted(self.tag, len(self.shown)):
            gone = []
        removals = [
            LabelChange(NewLabel(scan, self.tag, "removal", FOLDER), None) for scan in gone if scan in self.scans
        ]
        removed = sum(len(self._commit(batch)) for batch in _batches(removals))
        return added, removed, self.findings

    def _find(self, name: str, sentence: str, scan: str | None = None) -> None:
        file = f"labels/{self.tag}/{name}"
        self.findings.append(Finding(file, "label", sentence, self.signatures[name], scan))

    def _scan_of(self, file: str) -> str:
        """The name of the scan that a label file is of, in whatever Unicode form, or that it would be of."""
        name = label_id(file)
        return name if name in self.scans else self.alike.get(nfc(name), name)

    def _was_shown(self, name: str) -> bool:
        """Whether a file shows, or may show, what was shown by a file of this name in this or another Unicode form."""
        shown = os.path.basename(self.shown.get(self._scan_of(name), ""))
        return name == shown or (nfc(name) == nfc(shown) and shown not in self.states)

    def _has_scan(self, name: str) -> bool:
        file, scan = f"labels/{self.tag}/{name}", self._scan_of(name)
        if label_suffix(name) is None:
            self._find(name, f"{file}: is of no format that labels are read from; use {', '.join(LABEL_SUFFIXES)}")
        elif scan not in self.scans:
            self._find(name, f"{file}: there is no scan {scan!r} that can be used; add it, or rename the label", scan)
        else:
            return True
        return False

    def _only_touched(self, names: Sequence[str]) -> set[str]:
        """Which files have another time and still show the current version, as in a copy of the folder; noted so."""
        touched: set[str] = set()
        for batch in _batches(names):
            held: dict[str, str] = {}
            for name in batch:
                with contextlib.suppress(OSError):
                    held[name] = sha256_of(self.store.files.views / self.tag / name)
            with self.store.write() as transaction:
                for name, sha256 in held.items():
                    label = labels.current(transaction, self._scan_of(name), self.tag)
                    if label is not None and sha256 in (label.sha256, label.submitted_sha256):
                        state = self.states[name]
                        labels.note_view(transaction, label, f"{self.tag}/{name}", state.size, state.modified_ns)
                        touched.add(name)
        return touched

    def _read(self, names: Sequence[str], work: Path) -> LabelChange | None:
        """The first of a scan's files that passes, as a change; the others before it are noted as findings."""
        for number, name in enumerate(names, 1):
            scan = self.scans[self._scan_of(name)]
            try:
                change = self.store.label_from_file(scan, self.tag, name, work)
            except FileNotFoundError:
                continue  # gone again before it could be read
            except SourceUnavailable:
                raise  # nothing is known of the label before its scan is there
            except Exception as error:  # one file must not keep all others out, whatever is wrong with it
                path = self.store.files.views / self.tag / name
                self._find(name, findings.sentence_about(path, f"labels/{self.tag}/{name}", error), scan.name)
            else:
                if older := names[number:]:
                    logger.warning(
                        "labels/%s/%s: is the newest of several labels of one scan, and counts; kept as earlier "
                        "versions (segqc labels): %s",
                        self.tag,
                        name,
                        ", ".join(older),
                    )
                return change
        return None

    def _commit(self, changes: Sequence[LabelChange]) -> list[LabelChange]:
        """Make the changes, but those of scans whose label or content is not the one any more that the look showed.

        A file that another process has just saved looks like a person's edit to whoever read the rows before.
        """
        left = list(changes)
        while left:
            try:
                with self.store.change_labels(left) as change:
                    self._refuse_overtaken(change.transaction, {c.label.scan for c in left})
            except _Overtaken as found:
                left = [change for change in left if change.label.scan not in found.scans]
            except FileNotFoundError:
                return []  # gone again before it could be taken in
            else:
                break
        return left

    def _refuse_overtaken(self, transaction: Transaction, names: Set[str]) -> None:
        overtaken = set()
        rows = {scan.name: scan.id for scan in scans.listing(transaction, names=sorted(names))}
        for name in names:
            last = labels.current(transaction, name, self.tag)
            shown = self.shown.get(name)
            same = (last.id if last is not None else None) == (self.left[shown].version if shown is not None else None)
            if not same or rows.get(name) != self.scans[name].id:
                overtaken.add(name)
        if overtaken:
            raise _Overtaken(overtaken)


class _Overtaken(Exception):  # noqa: N818 - not an error
    """Other processes have changed these scans or their labels since the folder was looked through."""

    def __init__(self, scans_: set[str]) -> None:
        super().__init__()
        self.scans = scans_


def tag_folders(store: Store) -> list[Path]:
    """The folders of the tags.

    Pseudo-labels go with their whole folder, which is therefore among them though it is gone: without their files
    nobody would see what trains.
    """
    if not store.files.views.is_dir():
        return []
    with os.scandir(store.files.views) as found:
        folders = {Path(entry.path) for entry in found if entry.is_dir() and not entry.name.startswith(".")}
    return sorted(folders | {store.files.views / labels.PSEUDO})


def may_be_unmounted(tag: str, shown: int) -> bool:
    """Whether a tag's folder without a label file may just not be mounted, so that no label is removed by that.

    Args:
        tag: the tag; pseudo-labels do go with their folder.
        shown: how many labels of it had files; the file of a single one is more likely removed.
    """
    return tag != labels.PSEUDO and shown > 1


def unmounted_folders(store: Store) -> dict[str, Finding]:
    """Folders of tags that hold no label file any more, where the labels stay nevertheless."""
    with store.read() as transaction:
        counts = labels.counts(transaction)
    found: dict[str, Finding] = {}
    for tag, count in counts.items():
        if may_be_unmounted(tag, count) and not holds_labels(store.files.views / tag):
            folder = f"labels/{tag}"
            sentence = (
                f"{folder}: is gone or holds no label file, as if it were not mounted; its {count} labels stay as they "
                "are until the files are back. To remove them, let one file lie there until the others are removed"
            )
            found[folder] = Finding(folder, "label", sentence, "")
    return found


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[start : start + _LABEL_BATCH] for start in range(0, len(items), _LABEL_BATCH))
