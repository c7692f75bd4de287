"""Scans and patients: taking them in, the fold and role that each patient gets once, and the states of a scan."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sqlalchemy import bindparam, func, insert, select, update

from segqc.split import Split, SplitConfig, split_patients
from segqc.store import events, features
from segqc.store.database import Parameters, StoreError, Transaction, json_array
from segqc.store.records import Actor, ScanRecord, ScanState
from segqc.store.schema import OPEN_STATES, LabelVersion, Patient, Scan
from segqc.text import nfc
from segqc.volumes import scan_suffix
from segqc.volumes.appearance import APPEARANCE_VERSION

# From which states a scan may come into another by hand; a submission is `labels`' business.
_BEFORE: Final[Mapping[ScanState, tuple[ScanState, ...]]] = {
    "approved": ("submitted",),
    "rejected": ("submitted", "approved"),
    "excluded": ("unlabelled", "rejected", "submitted", "approved"),
    "unlabelled": ("excluded", "submitted", "approved", "rejected"),
}
_IN_ONE_QUERY: Final = 500

# The fields of a ScanRecord, by their names.
# Columns and no rows of tables: with 100,000 scans that takes a quarter of the time.
_RECORD: Final = (
    Scan.id,
    Scan.name,
    Scan.file,
    Patient.name.label("patient"),
    Patient.fold,
    Patient.split,
    Scan.state,
    Scan.reason,
    Scan.ranking_dice,
    Scan.info,
    Scan.added_at,
    Scan.missing_since,
    Scan.sha256,
    Scan.signature,
    Scan.former_name,
)

# built once: building a query takes longer than running it
_ID: Final = select(Scan.id).where(Scan.name == bindparam("name"))
_RECORD_OF: Final = select(*_RECORD).join(Patient, Scan.patient_id == Patient.id).where(Scan.name == bindparam("name"))
_CHANGE: Final = update(Scan).where(Scan.id == bindparam("scan"))
_SET_STATE: Final = _CHANGE.values(state=bindparam("state"), reason=bindparam("reason"), queue=bindparam("queue"))
_NEWEST_LABEL: Final = select(func.coalesce(func.max(LabelVersion.id), 0)).scalar_subquery()
_OPEN: Final = _SET_STATE.values(opened_at=bindparam("opened_at"), newest_label=_NEWEST_LABEL, readings=0)
_RANK: Final = _CHANGE.values(ranking_dice=bindparam("ranking_dice"), foreground=bindparam("foreground"))


class UnknownScan(StoreError):  # noqa: N818 - the finding, not the exception, is what callers name
    """There is no scan of this name."""

    status = 404


class ScanReplaced(StoreError):  # noqa: N818 - the finding, not the exception, is what callers name
    """Another content has taken the place of the one that something was made for."""


def drawn_on_another(name: str, since: str) -> str:
    """What to tell an annotator whose label is of a scan that another one has taken the place of.

    Args:
        name: the scan's name.
        since: what happened before: ``you opened it``.
    """
    return (
        f"the scan {name!r} was replaced by another one since {since}: your label was drawn on the older one, and is "
        "not kept for the one that is there now; ask for the scan again, and keep a copy of your label if you need it"
    )


@dataclass(frozen=True, slots=True)
class FoundScan:
    """A scan file found in the folder: its path relative to it, the id it should have, and its patient.

    Where two files would have the same id (``a.nii`` and ``a.nrrd``), the later one's id is its whole file name.
    ``sha256`` and ``signature`` are of its content, where that is known (see `files.signature_of`), ``remarks`` what
    the intake said of it, and ``appearance`` what it looks like (see `segqc.volumes.appearance`).
    """

    name: str
    file: str
    patient: str
    sha256: str | None = None
    signature: str | None = None
    remarks: tuple[str, ...] = ()
    appearance: tuple[float, ...] | None = None


def number_of(transaction: Transaction, name: str) -> int:
    """The number of a scan.

    Raises:
        UnknownScan: if there is none.
    """
    number = transaction.rows(_ID, {"name": name}).scalar()
    if number is None:
        raise UnknownScan(f"there is no scan {name!r}")
    return number


def get(transaction: Transaction, name: str) -> ScanRecord:
    """A scan, by its name in any Unicode form; see `text.nfc`.

    Raises:
        UnknownScan: if there is none.
    """
    for row in transaction.rows(_RECORD_OF, {"name": name}):
        return ScanRecord(**row._asdict())
    if not name.isascii():
        wanted = nfc(name)
        alike = [other for other in names(transaction, missing=True) if nfc(other) == wanted]
        if len(alike) == 1:
            return get(transaction, alike[0])
    raise UnknownScan(f"there is no scan {name!r}")


def names_of(transaction: Transaction, numbers: Sequence[int]) -> dict[int, str]:
    """The names of scans, by their numbers."""
    query = select(Scan.id, Scan.name)
    return {
        number: name
        for start in range(0, len(numbers), _IN_ONE_QUERY)
        for number, name in transaction.execute(query.where(Scan.id.in_(numbers[start : start + _IN_ONE_QUERY])))
    }


def listing(
    transaction: Transaction, *, states: Collection[ScanState] | None = None, names: Sequence[str] | None = None
) -> list[ScanRecord]:
    """All scans, those in some states, or those of some names, in the order of their names."""
    query = select(*_RECORD).join(Patient, Scan.patient_id == Patient.id).order_by(Scan.sort_key)
    if states is not None:
        query = query.where(Scan.state.in_(states))
    if names is not None:
        query = query.where(Scan.name.in_(names))
    return [ScanRecord(**row._asdict()) for row in transaction.execute(query)]


def names(transaction: Transaction, *, states: Collection[ScanState] | None = None, missing: bool = False) -> list[str]:
    """The names of the scans whose files are there, or of all, in no particular order."""
    # one JSON array: a row for each of 100,000 scans takes five times as long
    query = select(json_array(Scan.name))
    if not missing:
        query = query.where(Scan.missing_since.is_(None))
    if states is not None:
        query = query.where(Scan.state.in_(states))
    return transaction.scalar(query) or []


def marks(transaction: Transaction) -> set[str]:
    """The files of all scans that are there, each with its signature as one text; see `mark`."""
    query = select(json_array(Scan.file + "/" + func.coalesce(Scan.signature, ""))).where(Scan.missing_since.is_(None))
    return set(transaction.scalar(query) or [])


def mark(file: str, signature: str) -> str:
    """A file of `marks`."""
    return f"{file}/{signature}"


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of the content of a scan's file."""

    id: int
    name: str
    sha256: str | None
    signature: str | None
    missing: bool


def known_files(transaction: Transaction, only: Collection[str] | None = None) -> dict[str, Known]:
    """What is known of the content of all scans' files, or of some files, by file."""
    query = select(Scan.file, Scan.id, Scan.name, Scan.sha256, Scan.signature, Scan.missing_since)
    if only is not None and len(only) <= _IN_ONE_QUERY:
        query = query.where(Scan.file.in_(only))
    return {
        row.file: Known(row.id, row.name, row.sha256, row.signature, row.missing_since is not None)
        for row in transaction.execute(query)
    }


def expect(transaction: Transaction, name: str, sha256: str | None) -> ScanRecord:
    """A scan, if its content is still the one that something was made for; None expects nothing.

    Raises:
        UnknownScan: if there is none of this name.
        ScanReplaced: if it has another content.
    """
    scan = get(transaction, name)
    if sha256 is not None and scan.sha256 is not None and scan.sha256 != sha256:
        raise ScanReplaced(f"the file of the scan {name!r} was replaced meanwhile")
    return scan


def counts(transaction: Transaction) -> dict[ScanState, int]:
    """How many scans are in each state; retired ones are none of them."""
    query = select(Scan.state, func.count()).where(Scan.former_name.is_(None)).group_by(Scan.state)
    rows = transaction.execute(query)
    return {state: count for state, count in rows}


def sync(
    transaction: Transaction,
    found: Sequence[FoundScan],
    split_config: SplitConfig,
    actor: Actor,
    *,
    labelled: Collection[str] = (),
) -> int:
    """Add scans that are not known yet; returns how many are new.

    Args:
        transaction: where to write.
        found: the files; those that are known are left as they are.
        split_config: how new patients get fold and role; patients of ``labelled`` scans first, so that the few that are
            labelled at the start are spread over both roles.
        actor: the event's actor.
        labelled: ids of scans that have a final label already, in Unicode's form NFC.
    """
    files = select(Scan.file)
    if len(found) <= _IN_ONE_QUERY:
        files = files.where(Scan.file.in_([f.file for f in found]))
    known = set(transaction.scalars(files)) if found else set()
    new = _named_apart(transaction, [f for f in found if f.file not in known])
    if not new:
        return 0
    patients = _placed(transaction, new, split_config, set(labelled))
    transaction.execute(
        insert(Scan),
        [
            {
                "name": f.name,
                "file": f.file,
                "sort_key": natural_key(f.name),
                "patient_id": patients[f.patient][0],
                "state": "unlabelled",
                "queue": patients[f.patient][1],
                "opened_at": transaction.now,
                "newest_label": 0,
                "readings": 0,
                "info": {},
                "added_at": transaction.now,
                "sha256": f.sha256,
                "signature": f.signature,
                "remarks": list(f.remarks) or None,
            }
            for f in new
        ],
    )
    ids = _ids(transaction, [f.name for f in new])
    looks = {f.name: f.appearance for f in new if f.appearance is not None}
    found_looks = {i: looks[name] for i, name in ids.items() if name in looks}
    features.add(transaction, "appearance", APPEARANCE_VERSION, found_looks)
    events.record_all(transaction, actor, "found", "scan", list(ids))
    return len(new)


def _named_apart(transaction: Transaction, new: Sequence[FoundScan]) -> list[FoundScan]:
    wanted = select(Scan.name)
    if len(new) <= _IN_ONE_QUERY and all(f.file.isascii() for f in new):
        wanted = wanted.where(Scan.name.in_([name for f in new for name in (f.name, f.file)]))
    taken = set(map(nfc, transaction.scalars(wanted))) if new else set()
    apart = []
    for f in sorted(new, key=lambda f: f.file):
        name = f.file if nfc(f.name) in taken else f.name
        taken.add(nfc(name))
        apart.append(replace(f, name=name))
    return apart


def _ids(transaction: Transaction, wanted: Sequence[str]) -> dict[int, str]:
    found: dict[int, str] = {}
    for start in range(0, len(wanted), _IN_ONE_QUERY):
        part = wanted[start : start + _IN_ONE_QUERY]
        found.update(transaction.execute(select(Scan.id, Scan.name).where(Scan.name.in_(part))).all())
    return found


def _placed(
    transaction: Transaction, new: Sequence[FoundScan], split_config: SplitConfig, labelled: set[str]
) -> dict[str, tuple[int, Split]]:
    """Row and role of each patient of the new scans; patients seen for the first time are placed."""
    wanted = {f.patient for f in new}
    known = _patients(transaction, wanted)
    first = sorted({f.patient for f in new if nfc(f.name) in labelled} - known.keys())
    others = sorted(wanted - known.keys() - set(first))
    if first or others:
        already = transaction.scalar(select(func.count()).select_from(Patient)) or 0
        placed = split_patients(first, others, already=already, split_config=split_config)
        transaction.execute(
            insert(Patient),
            [
                {"name": name, "fold": p.fold, "split": p.split, "assigned_at": transaction.now}
                for name, p in placed.items()
            ],
        )
        known = _patients(transaction, wanted)
    return known


def _patients(transaction: Transaction, wanted: set[str]) -> dict[str, tuple[int, Split]]:
    query = select(Patient.name, Patient.id, Patient.split)
    if len(wanted) <= _IN_ONE_QUERY:
        query = query.where(Patient.name.in_(wanted))
    return {name: (i, split) for name, i, split in transaction.execute(query)}


def assign_patient(transaction: Transaction, name: str, patient: str, split_config: SplitConfig, actor: Actor) -> None:
    """Note whose scan it is, where that became known after the scan came; a patient seen for the first time is placed.

    Raises:
        UnknownScan: if there is none of this name.
    """
    scan = transaction.get_one(Scan, number_of(transaction, name))
    row, split = _placed(transaction, [FoundScan(scan.name, scan.file, patient)], split_config, set())[patient]
    if scan.patient_id == row:
        return
    # in one statement: the queue refers to the patient's role
    scan.patient_id, scan.queue = row, split if scan.queue is not None else None
    transaction.flush()
    events.record(transaction, actor, "patient assigned", "scan", scan.id, {"patient": patient})


def rename_file(transaction: Transaction, scan: Known, file: str) -> None:
    """Note that a scan's file has its name in another Unicode form now; the scan's own name stays."""
    transaction.get_one(Scan, scan.id).file = file


def mark_missing(transaction: Transaction, files: Collection[str], actor: Actor) -> int:
    """Note that scan files are gone from the folder: their history stays, they are not handed out any more."""
    gone = [known for file, known in known_files(transaction, files).items() if file in files and not known.missing]
    for known in gone:
        _set_missing(transaction, known.id, True, actor)
    return len(gone)


def note_contents(transaction: Transaction, found: Sequence[tuple[Known, str, str]], actor: Actor) -> None:
    """Note what scans' files hold, each by its sha256 and signature; a scan whose file was gone is there again."""
    if found:
        rows = [{"id": scan.id, "sha256": sha256, "signature": signature} for scan, sha256, signature in found]
        transaction.execute(update(Scan), rows)
    for scan, _, _ in found:
        if scan.missing:
            # put back under the name that it got when it was retired
            transaction.get_one(Scan, scan.id).former_name = None
            _set_missing(transaction, scan.id, False, actor)


def retire(transaction: Transaction, scan_id: int, actor: Actor) -> str:
    """Set a scan's row aside, as its file holds another content now; returns the name that it has from now on.

    What belongs to the old content (labels, assessments, leases, corrections) stays with the row.
    """
    scan = transaction.get_one(Scan, scan_id)
    name, length = scan.name, 8
    end = scan_suffix(scan.file) or ""
    while transaction.scalar(select(Scan.id).where(Scan.name == f"{name}@{(scan.sha256 or '')[:length]}")) is not None:
        length += 1
    scan.name = f"{name}@{(scan.sha256 or '')[:length]}"
    scan.file, scan.sort_key, scan.former_name = f"{scan.name}{end}", natural_key(scan.name), name
    if scan.missing_since is None:
        scan.missing_since, scan.queue = transaction.now, None
    events.record(transaction, actor, "replaced", "scan", scan_id, {"name": name, "now": scan.name})
    transaction.flush()
    return scan.name


def revive(transaction: Transaction, found: FoundScan, actor: Actor) -> str | None:
    """Bring back the retired row of a content that has returned to its file; None if there is none.

    Returns:
        The name that the row had until now.
    """
    scan = transaction.scalar(select(Scan).where(Scan.former_name == found.name, Scan.sha256 == found.sha256))
    if scan is None:
        return None
    before = scan.name
    scan.name, scan.file, scan.former_name, scan.signature = found.name, found.file, None, found.signature
    scan.sort_key = natural_key(scan.name)
    _set_missing(transaction, scan.id, False, actor)
    transaction.flush()
    return before


def _set_missing(transaction: Transaction, scan_id: int, missing: bool, actor: Actor) -> None:
    scan = transaction.get_one(Scan, scan_id)
    since = transaction.now if missing else None
    split = transaction.get_one(Patient, scan.patient_id).split
    scan.missing_since, scan.queue = since, _queue(split, scan.state, since)
    events.record(transaction, actor, "missing" if missing else "returned", "scan", scan.id)


def _queue(split: Split, state: ScanState, missing_since: dt.datetime | None) -> Split | None:
    return split if state in OPEN_STATES and missing_since is None else None


def set_state(
    transaction: Transaction, scan: ScanRecord, state: ScanState, actor: Actor, reason: str | None = None
) -> None:
    """Put a scan into a state, and into or out of the queue; an event says who did it."""
    queue = _queue(scan.split, state, scan.missing_since)
    values: Parameters = {"scan": scan.id, "state": state, "reason": reason, "queue": queue}
    if state in OPEN_STATES:
        transaction.change(_OPEN, {**values, "opened_at": transaction.now})
    else:
        transaction.change(_SET_STATE, values)
    events.record(transaction, actor, state, "scan", scan.id, {"before": scan.state, "reason": reason})


def rank(transaction: Transaction, scan: int, ranking_dice: float | None, foreground: bool | None) -> None:
    """Note the estimate of the mask that would be handed out; None where there is none."""
    transaction.change(_RANK, {"scan": scan, "ranking_dice": ranking_dice, "foreground": foreground})


def review(transaction: Transaction, name: str, state: ScanState, actor: Actor, reason: str | None = None) -> None:
    """Approve, reject, exclude or reopen ("unlabelled") a scan.

    Raises:
        UnknownScan: if there is none of this name.
        StoreError: if the scan is not in a state that allows it, or a reason is wanted and missing.
    """
    scan = get(transaction, name)
    before = _BEFORE.get(state, ())
    if scan.state not in before:
        raise StoreError(f"the scan {name!r} is {scan.state}; only scans that are {' or '.join(before)} can be {state}")
    if state in ("rejected", "excluded") and not (reason and reason.strip()):
        raise StoreError(f"say why the scan {name!r} is {state}: a reason is wanted")
    set_state(transaction, scan, state, actor, reason.strip() if reason else None)


def update_info(transaction: Transaction, name: str, info: Mapping[str, object]) -> None:
    """Add to what clients noted of a scan.

    Raises:
        UnknownScan: if there is none of this name.
    """
    scan = get(transaction, name)
    transaction.execute(update(Scan).where(Scan.id == scan.id).values(info={**scan.info, **info}))


def natural_key(name: str) -> str:
    """A key that sorts names with their numbers as numbers: ``scan_2`` before ``scan_10``."""
    return re.sub(r"\d+", lambda m: m.group().lstrip("0").zfill(12), name)
