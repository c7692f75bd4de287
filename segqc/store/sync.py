"""Taking in what lies in the dataset folder: scans, and labels that people put there, changed or removed.

Every file passes the store's intake once for each content; what does not is kept aside as a finding (`findings`). A
file's signature (size, times, inode) tells whether it has to be read again, and its hash decides. Large folders are
taken in batch by batch: what is committed stays, whenever the process dies.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from segqc.split import SplitConfig
from segqc.store import findings, labels, leases, scans
from segqc.store.database import StoreError, Transaction
from segqc.store.events import FOLDER
from segqc.store.files import contents_of, raw_signature, sha256_of, signature_of
from segqc.store.findings import Finding
from segqc.store.misplaced import UNPRINTABLE, beside_tags, folders_beside_scans, misplaced, visible_files
from segqc.store.records import Actor, LabelRecord, ScanRecord
from segqc.store.scans import FoundScan, Known
from segqc.store.sources import ScanChanges
from segqc.store.store import Store
from segqc.store.sync_labels import sync_labels, tag_folders, unmounted_folders
from segqc.text import caseless, nfc, printable
from segqc.volumes import VolumeError, label_id, scan_id, scan_suffix

logger = logging.getLogger(__name__)

_BATCH: Final = 500
_BATCH_SECONDS: Final = 2.0  # of reading, at most, are lost when the process dies
_SAME_NAME: Final = (
    "has the name of another scan file, {other}, but for the way in which accents are stored (Unicode's NFC and NFD); "
    "rename one, or remove the copy"
)

PatientOf: TypeAlias = Callable[[Path], str]
PatientNow: TypeAlias = Callable[[Path, str], str]
Stop: TypeAlias = Callable[[], bool]


class ScanExists(StoreError):  # noqa: N818 - the finding, not the exception, is what callers name
    """There is a scan of this name already, or a file that would be one.

    Attributes:
        name: its name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"there is a scan {name!r} already; choose another id, or remove its file first")
        self.name = name


@dataclass(frozen=True, slots=True)
class SyncResult:
    """What was found: scans and labels that were new, replaced, or gone."""

    new_scans: int = 0
    missing_scans: int = 0
    new_labels: int = 0
    removed_labels: int = 0
    replaced_scans: int = 0


@dataclass(frozen=True, slots=True)
class Added:
    """The name of an uploaded scan, and whether it is new: the same content under the same name is not."""

    name: str
    new: bool


def _never() -> bool:
    return False


def sync(store: Store, patient_of: PatientOf, split_config: SplitConfig, *, stop: Stop = _never) -> SyncResult:
    """Bring the store in line with its folder; costs a system call for each file where nothing has changed.

    Scans are never moved nor changed. A scan whose file is gone keeps its history and waits for the file to return. A
    file that holds another content is another scan: the old one is retired with all that was made for it, under
    another name, until its content returns. A label file that a person put below ``labels/<tag>/`` becomes a version;
    one that a person removed becomes a removal. Files that do not pass the intake are kept aside, each with a reason.

    Args:
        store: the store.
        patient_of: the patient that a scan file is of. A new scan for which it raises a VolumeError is kept aside until
            it does so no more: fold and role are given once, and a wrong patient would share neither.
        split_config: how new patients get their fold and role.
        stop: asked after each batch of files whether to leave the rest for the next time.

    Nothing is taken in where the folder is read-only.
    """
    if not store.is_writable:
        return SyncResult()
    with store.read() as transaction:
        noted = findings.noted(transaction, store.intake.version)
        outdated = findings.files(transaction) - noted.keys()
    if outdated:  # by the settings of before: these files are looked at again
        with store.write() as transaction:
            findings.clear(transaction, outdated)
    if store.source is None:
        scans_now = _sync_scans(store, patient_of, split_config, noted, stop)
    else:
        scans_now = store.source.sync(store, split_config, noted, stop)
    changed = set(map(nfc, scans_now.changed))
    noted = {file: finding for file, finding in noted.items() if finding.scan not in changed}
    added = removed = 0
    folders = tag_folders(store)
    for folder in folders:
        if not stop():
            more, fewer = sync_labels(store, folder, noted, stop)
            added, removed = added + more, removed + fewer
    tags = {f"labels/{folder.name}" for folder in folders}
    astray = unmounted_folders(store) | beside_tags(store.files.views)
    gone = {file for file in noted if "/" in file and os.path.dirname(file) not in tags} - astray.keys()
    fresh = [finding for file, finding in astray.items() if noted.get(file) != finding]
    if gone or fresh:
        with store.write() as transaction:
            findings.clear(transaction, gone)
            findings.record(transaction, fresh, store.intake.version)
    return SyncResult(scans_now.new, scans_now.missing, added, removed, scans_now.replaced)


def regroup(store: Store, patient_now: PatientNow, split_config: SplitConfig) -> list[str]:
    """Give scans the patients that the settings name by now, where these were written after the scans came.

    A scan that is handed out stays where it is, and so does one that networks may have been trained with, by a label or
    a pseudo-label that it has or had, if it would change its fold or split: what they were judged by would be among
    what they have trained.

    Args:
        store: the store.
        patient_now: the patient that a scan file should be of, given the one that it is of.
        split_config: how new patients get their fold and role.

    Returns:
        A sentence for each scan that stays with another patient.
    """
    with store.read() as transaction:
        found = [scan for scan in scans.listing(transaction) if scan.former_name is None]
        handed_out = {lease.scan for lease in leases.listing(transaction, state="open")}
        # a label that was taken back may have trained networks before that, and a pseudo-label that ended, too
        labelled = labels.ever_labelled(transaction, (labels.FINAL, labels.PSEUDO))
    moving: list[tuple[ScanRecord, str]] = []
    for scan in found:
        with contextlib.suppress(VolumeError, OSError):  # its side-car cannot be read: nothing new is known
            if (patient := patient_now(store.dataset / scan.file, scan.patient)) != scan.patient:
                moving.append((scan, patient))
    if not moving:
        return []
    places = {scan.patient: (scan.fold, scan.split) for scan in found}
    trained = any((store.own / name).is_dir() for name in ("models", "training"))
    messages: list[str] = []
    free: list[tuple[ScanRecord, str]] = []
    for scan, patient in moving:
        stays = f"{scan.file}: stays with the patient {scan.patient!r}, and not {patient!r} as the settings say"
        if scan.name in handed_out:
            messages.append(f"{stays}, while it is handed out; open the folder again when it is submitted")
        elif trained and scan.name in labelled and places.get(patient) != places[scan.patient]:
            messages.append(
                f"{stays}, as networks may have been trained with it; move segqc/models and segqc/training away to "
                "begin anew"
            )
        elif store.is_writable:
            free.append((scan, patient))
    if free:
        with store.write() as transaction:
            for scan, patient in free:
                scans.assign_patient(transaction, scan.name, patient, split_config, FOLDER)
        logger.warning("%d scans are of other patients now, as the settings say", len(free))
    return messages


def is_unchanged(store: Store, scan: ScanRecord, patient_of: PatientOf, split_config: SplitConfig) -> bool:
    """Tell by a system call whether a scan's file is as it was when it was read; take the file in where it is not.

    Raises:
        SourceUnavailable: if the scan comes from elsewhere, and nobody can tell now.
    """
    if store.source is not None:
        return store.source.is_unchanged(store, scan, split_config)
    try:
        signature = signature_of((store.dataset / scan.file).stat())
    except FileNotFoundError:
        with store.write() as transaction:
            scans.mark_missing(transaction, [scan.file], FOLDER)
        return False
    missing = scan.missing_since is not None
    if not missing and signature and scan.signature == signature:
        return True
    known = Known(scan.id, scan.name, scan.sha256, scan.signature, missing)
    _sync_files(store, [scan.file], {scan.file: known}, set(), patient_of, split_config, _never)
    return False


def add_scan(
    store: Store, source: Path, name: str, suffix: str, patient_of: PatientOf, split_config: SplitConfig
) -> Added:
    """Put a new scan into the folder under a name; a file that is there already is never replaced.

    Args:
        store: the store.
        source: the file; it is copied.
        name: the name that the scan should have.
        suffix: of the file.
        patient_of: see `sync`.
        split_config: see `sync`.

    Raises:
        ScanExists: if the name is taken, by whatever the store knows or by a file that it has not seen yet.
        VolumeError: if it is no scan that can be used.
        OSError: if it can't be written; nothing has changed then.
    """
    content = store.intake.scan(source, "the scan")
    target = store.dataset / f"{name}{suffix}"
    for warning in content.warnings:
        logger.warning("%s: %s", target.name, warning)
    hidden = Path(tempfile.mkdtemp(prefix=".writing-", dir=store.dataset))
    linked = False
    try:
        copy = hidden / target.name
        with source.open("rb") as read, copy.open("wb") as written:
            shutil.copyfileobj(read, written)
            written.flush()
            os.fsync(written.fileno())
        with store.write() as transaction:  # alone: nobody else adds a file of this name, with whatever suffix
            for scan in _named_alike(transaction, name):
                usable = scan.missing_since is None and scan.state != "excluded"
                if usable and (nfc(scan.name), scan.sha256) == (nfc(name), content.sha256):
                    return Added(scan.name, new=False)
                raise ScanExists(scan.name)
            for found_name in os.listdir(store.dataset):
                if scan_suffix(found_name) is not None and _alike(scan_id(found_name), name):
                    raise ScanExists(scan_id(found_name))
            try:
                _link(copy, target)
            except FileExistsError as error:
                raise ScanExists(name) from error
            linked = True
            signature = signature_of(target.stat())
            found = FoundScan(
                name, target.name, patient_of(target), content.sha256, signature, content.warnings, content.appearance
            )
            scans.sync(transaction, [found], split_config, FOLDER)
            findings.clear(transaction, [target.name])
            findings.clear_labels_of(transaction, [name])
    except BaseException:
        if linked:
            target.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return Added(name, new=True)


def _link(ready: Path, target: Path) -> None:
    """Give a file its name, unless the name is taken (FileExistsError)."""
    try:
        os.link(ready, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(ready, target)


def _named_alike(transaction: Transaction, name: str) -> list[ScanRecord]:
    """Scans whose names differ from another one in case or in the form of an accent at most, the very name first."""
    alike = [found for found in scans.names(transaction, missing=True) if _alike(found, name)]
    return sorted(scans.listing(transaction, names=alike), key=lambda scan: scan.name != name) if alike else []


def _alike(one: str, other: str) -> bool:
    """Whether two names would be one on some file systems."""
    return caseless(one) == caseless(other)


# ------------------------------------------------------------------------------------------------------------- scans


@dataclass(frozen=True, slots=True)
class Looked:
    """What came of reading a scan's file; ``patient`` is None where the content is the known one."""

    file: str
    signature: str
    sha256: str = ""
    patient: str | None = None
    remarks: tuple[str, ...] = ()
    appearance: tuple[float, ...] | None = None
    finding: Finding | None = None


def _sync_scans(
    store: Store, patient_of: PatientOf, split_config: SplitConfig, noted: Mapping[str, Finding], stop: Stop
) -> ScanChanges:
    with store.read() as transaction:
        marks = scans.marks(transaction)
    unsettled: set[str] = set()
    present: set[str] = set()
    signatures: dict[str, str] = {}
    refused: set[str] = set()  # with a name that may be another scan's
    aside: dict[str, Finding] = {}
    unreadable: dict[str, str] = {}
    settled = 0
    for entry, status in visible_files(store.dataset, unreadable):
        name = printable(entry.name)
        present.add(name)
        if name != entry.name:
            aside[name] = Finding(name, "other", f"{name}: {UNPRINTABLE}", "")
        elif scans.mark(name, raw_signature(status)) in marks:
            settled += 1
        elif scan_suffix(name) is not None:
            signatures[name] = signature_of(status)
            if not findings.is_still(noted, name, signatures[name]):
                unsettled.add(name)
            elif not name.isascii():
                refused.add(name)
        elif (finding := misplaced(name)) is not None:
            aside[name] = finding
    for name, why in unreadable.items():
        if scan_suffix(name) is not None:
            aside[name] = Finding(name, "scan", f"{name}: {why}", "")
    aside |= folders_beside_scans(store.dataset, present)
    gone: list[str] = []
    known: dict[str, Known] = {}
    if unsettled or settled < len(marks):
        with store.read() as transaction:
            known = scans.known_files(transaction)
        if settled < len(marks):
            unsettled |= refused  # the file of that name may be gone
        respelled, twins = _respelled(unsettled - known.keys(), known, present)
        if respelled:
            with store.write() as transaction:
                for name, scan in respelled.items():
                    scans.rename_file(transaction, scan, name)
            known = {file: scan for file, scan in known.items() if scan not in respelled.values()} | respelled
        for name, other in twins.items():
            aside[name] = Finding(name, "scan", f"{name}: {_SAME_NAME.format(other=other)}", signatures[name])
        unsettled -= twins.keys()
        # whoever has uploaded a scan since has put its file there
        absent = (file for file, scan in known.items() if not scan.missing and file not in present)
        gone = [file for file in absent if not os.path.isfile(store.dataset / file)]
    labelled = labelled_scans(store) if unsettled - known.keys() else set()
    new, lost, replaced, changed = _sync_files(store, unsettled, known, labelled, patient_of, split_config, stop)
    over = {file for file in noted if "/" not in file and file not in present and file not in aside}
    fresh = [finding for file, finding in aside.items() if noted.get(file) != finding]
    missing = 0
    if gone or over or fresh:
        with store.write() as transaction:
            missing = scans.mark_missing(transaction, gone, FOLDER)
            findings.clear(transaction, over)
            findings.record(transaction, fresh, store.intake.version)
    return ScanChanges(new, missing + lost, replaced, frozenset(changed))


def _respelled(
    new: Collection[str], known: Mapping[str, Known], present: Collection[str]
) -> tuple[dict[str, Known], dict[str, str]]:
    """Tell new files from known ones whose names differ in their Unicode form only.

    Returns:
        The scans that new files are of, as the file of the known name is gone (a copy made by macOS has other forms);
        and the files that are left aside, each with the one that has the name already.
    """
    names = {nfc(file): file for file in known}
    respelled: dict[str, Known] = {}
    twins: dict[str, str] = {}
    for name in sorted(new, key=lambda name: (name != nfc(name), name)):
        other = names.get(nfc(name))
        if other is None:
            names[nfc(name)] = name
        elif other in present:
            twins[name] = other
        else:
            respelled[name] = known[other]
            names[nfc(name)] = name
    return respelled, twins


def labelled_scans(store: Store) -> set[str]:
    """Names of scans that have a file among the final labels, in the form in which names are compared."""
    final = store.files.views / labels.FINAL
    return {nfc(label_id(name)) for name in os.listdir(final)} if final.is_dir() else set()


def _sync_files(
    store: Store,
    files: Collection[str],
    known: Mapping[str, Known],
    labelled: Collection[str],
    patient_of: PatientOf,
    split_config: SplitConfig,
    stop: Stop,
) -> tuple[int, int, int, set[str]]:
    """Look at scan files that are new, changed or back.

    Returns:
        How many scans are new, missing and replaced, and the names of all whose content is another one now.
    """
    # patients of labelled scans are placed first, so that the few of the start are spread over both roles
    work = sorted(files, key=lambda file: (nfc(scan_id(file)) not in labelled, scans.natural_key(file)))
    new = lost = replaced = done = 0
    changed: set[str] = set()
    while done < len(work) and not stop():
        batch: list[str] = []
        looked: list[Looked] = []
        until = time.monotonic() + _BATCH_SECONDS
        while done + len(batch) < len(work) and len(batch) < _BATCH and time.monotonic() < until:
            batch.append(work[done + len(batch)])
            if (look := _look(store, batch[-1], known.get(batch[-1]), patient_of)) is not None:
                looked.append(look)
        for look in looked:
            before = known.get(look.file)
            if look.patient is not None and before is not None and before.sha256 is not None:
                part_from_labels(store, before.name)
        with store.write() as transaction:
            counts = note_scans(transaction, store, looked, set(batch), labelled, split_config)
        new, lost, replaced, changed = new + counts[0], lost + counts[1], replaced + counts[2], changed | counts[3]
        done += len(batch)
        if done < len(work) or len(work) > _BATCH:
            logger.info("taking in scans: %d of %d", done, len(work))
    return new, lost, replaced, changed


def _look(store: Store, file: str, known: Known | None, patient_of: PatientOf) -> Looked | None:
    """Read a scan's file; None if it is gone, or is being written this moment."""
    path = store.dataset / file
    try:
        before = path.stat()
        signature = signature_of(before)
        try:
            if known is not None and known.sha256 is not None and sha256_of(path) == known.sha256:
                looked = Looked(file, signature, known.sha256)
            else:
                try:
                    patient = patient_of(path)
                except VolumeError as error:  # of a side-car, perhaps: looked at again each time
                    return Looked(
                        file, "", finding=Finding(file, "scan", findings.sentence_about(path, file, error), "")
                    )
                content = store.intake.scan(path, file)
                looked = Looked(file, signature, content.sha256, patient, content.warnings, content.appearance)
                for warning in content.warnings:
                    logger.warning("%s: %s", file, warning)
        except FileNotFoundError:
            raise
        except Exception as error:  # one file must not keep all others out, whatever is wrong with it
            looked = Looked(
                file, signature, finding=Finding(file, "scan", findings.sentence_about(path, file, error), signature)
            )
        after = path.stat()
    except FileNotFoundError:
        return None
    return looked if raw_signature(before) == raw_signature(after) else None


def note_scans(
    transaction: Transaction,
    store: Store,
    looked: Sequence[Looked],
    files: Collection[str],
    labelled: Collection[str],
    split_config: SplitConfig,
    actor: Actor = FOLDER,
) -> tuple[int, int, int, set[str]]:
    """Write down what came of a batch of files, as the rows are now."""
    known = scans.known_files(transaction, files)
    unusable = [look.finding for look in looked if look.finding is not None]
    findings.record(transaction, unusable, store.intake.version)
    # the file of a known scan holds something that is no scan: its own content is gone, like a removed file's
    lost = scans.mark_missing(transaction, {finding.file for finding in unusable}, actor)
    new: list[FoundScan] = []
    touched: list[tuple[Known, str, str]] = []
    changed: set[str] = set()
    replaced = 0
    for look in looked:
        scan = known.get(look.file)
        if look.finding is not None:
            continue
        if scan is not None and scan.sha256 in (None, look.sha256):
            if scan.missing:
                changed.add(scan.name)
            if scan.missing or (scan.sha256, scan.signature) != (look.sha256, look.signature):
                touched.append((scan, look.sha256, look.signature))
        elif look.patient is not None:
            name = scan.name if scan is not None else scan_id(look.file)
            found = FoundScan(name, look.file, look.patient, look.sha256, look.signature, look.remarks, look.appearance)
            changed.add(name)
            if scan is None:
                new.append(found)
            else:
                replaced += 1
                _replace(transaction, store, scan, found, split_config, actor)
    scans.note_contents(transaction, touched, actor)
    count = scans.sync(transaction, new, split_config, actor, labelled=labelled)
    findings.clear(transaction, {look.file for look in looked if look.finding is None})
    findings.clear_labels_of(transaction, changed)
    return count, lost, replaced, changed


def _replace(
    transaction: Transaction, store: Store, scan: Known, found: FoundScan, split_config: SplitConfig, actor: Actor
) -> None:
    """Retire a scan whose file holds another content now, with its labels, and add or bring back the other scan."""
    for file, view in labels.forget_views(transaction, scan.id):
        label = labels.get(transaction, view.version)
        with contextlib.suppress(FileNotFoundError):
            # what is not kept is a label that was put there for the new content
            if sha256_of(store.files.views / file) in _addresses(label):
                (store.files.views / file).unlink()
    leases.release(transaction, scan.name, actor)
    labels.end_pseudo_label(transaction, scan.id, "another scan has taken the place of its file")
    retired = scans.retire(transaction, scan.id, actor)
    logger.warning(
        "%s holds another scan now; what was made for the one before is kept with it, under the name %s",
        found.file,
        retired,
    )
    if scans.revive(transaction, found, actor) is None:
        scans.sync(transaction, [found], split_config, actor)
        return
    for label in labels.tags(transaction, found.name).values():
        if not store.files.lying(label.scan, label.tag):
            store.show(transaction, label)


def _addresses(label: LabelRecord) -> set[str]:
    return {
        sha256 for sha256, _ in contents_of(label.sha256, label.suffix, label.submitted_sha256, label.submitted_suffix)
    }


def part_from_labels(store: Store, name: str) -> None:
    """Before a scan is retired, make versions of its label files that were edited and do not fit the new content.

    An edited file that fits belongs to the new content.
    """
    with store.read() as transaction:
        scan = scans.get(transaction, name)
        shown = labels.views_of(transaction, scan.id)
        kept = {view.version: _addresses(labels.get(transaction, view.version)) for _, view in shown}
    with tempfile.TemporaryDirectory(prefix="segqc-") as work:
        for file, view in shown:
            tag, base = os.path.split(file)
            with contextlib.suppress(FileNotFoundError):
                if sha256_of(store.files.views / file) in kept[view.version]:
                    continue
                try:
                    store.label_from_file(scan, tag, base, Path(work))
                except VolumeError as error:
                    change = store.unchecked_label(name, tag, base, str(error), Path(work))
                    with store.change_labels([change]):
                        pass
