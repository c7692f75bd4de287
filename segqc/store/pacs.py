"""What the store knows of a PACS: of which series scans are, and which label versions lie there as DICOM SEG."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Final

from sqlalchemy import ColumnElement, Select, and_, bindparam, delete, or_, select, true

from segqc.store import events, labels
from segqc.store.database import Transaction
from segqc.store.labels import FINAL
from segqc.store.records import Actor, JsonObject, ScanRecord, SegmentationRecord, SegmentationState, SeriesRecord
from segqc.store.schema import LabelVersion, Scan, SegmentationRow, SeriesRow

PACS: Final = Actor(kind="system", name="PACS", identified_by="program")
"""Whoever stores series in the PACS, changes or removes them, and what is done there for label versions."""

_MAX_PAUSE_SECONDS: Final = 300.0
_SERIES: Final = select(
    SeriesRow.file,
    SeriesRow.study_uid,
    SeriesRow.series_uid,
    SeriesRow.description,
    SeriesRow.modality,
    SeriesRow.images,
)
_ALL: Final = (
    select(SegmentationRow, Scan.name)
    .join(LabelVersion, SegmentationRow.label_version_id == LabelVersion.id)
    .join(Scan, LabelVersion.scan_id == Scan.id)
)
_OF_LABEL: Final = select(SegmentationRow).where(SegmentationRow.label_version_id == bindparam("label"))
_VERBS: Final[dict[SegmentationState, str]] = {
    "empty": "no segmentation",
    "stored": "segmentation stored",
    "withdrawn": "segmentation withdrawn",
    "left": "segmentation left",
}


def series(transaction: Transaction) -> dict[str, SeriesRecord]:
    """The series of all scans, by the scans' files."""
    return {row.file: SeriesRecord(**row._asdict()) for row in transaction.execute(_SERIES)}


def series_of(transaction: Transaction, file: str) -> SeriesRecord | None:
    """The series of a scan by its file; None where it is of none."""
    row = transaction.execute(_SERIES.where(SeriesRow.file == file)).first()
    return None if row is None else SeriesRecord(**row._asdict())


def title(scan: str, patient: str, series_uid: str | None, description: str | None) -> str:
    """What people call a scan: by its own name, and one of a PACS by its patient and its series' description.

    >>> title("1.2.3_echo-1", "P7", "1.2.3", "T2 axial"), title("brain", "P7", None, None)
    ('P7, T2 axial, echo-1', 'brain')
    """
    if series_uid is None:
        return scan
    part = scan.removeprefix(series_uid).lstrip("_")
    return ", ".join(filter(None, (patient, description or "a series without a description", part)))


def title_of(transaction: Transaction, scan: ScanRecord) -> str:
    """What people call a scan; see `title`."""
    found = series_of(transaction, scan.file)
    return title(scan.name, scan.patient, *((found.series_uid, found.description) if found else (None, None)))


def note_series(transaction: Transaction, found: Sequence[SeriesRecord]) -> None:
    """Note of which series scans are, in the place of what was noted before."""
    for record in found:
        transaction.merge(SeriesRow(**asdict(record)))


def forget_series(transaction: Transaction, files: Collection[str]) -> None:
    """Forget series that are gone."""
    for file in files:
        transaction.execute(delete(SeriesRow).where(SeriesRow.file == file))


def readable_series(transaction: Transaction, study_uid: str | None = None) -> dict[str, SeriesRecord]:
    """The series of the scans that are there, by their UIDs: all of them, or those of one study."""
    query = _SERIES.join(Scan, Scan.file == SeriesRow.file).where(Scan.missing_since.is_(None))
    if study_uid is not None:
        query = query.where(SeriesRow.study_uid == study_uid)
    return {row.series_uid: SeriesRecord(**row._asdict()) for row in transaction.execute(query)}


def scans_of(transaction: Transaction, uid: str) -> list[str]:
    """The names of the scans that are there of a series, or of a study, by its identifier."""
    query = select(Scan.name).join(SeriesRow, SeriesRow.file == Scan.file).where(Scan.missing_since.is_(None))
    return list(transaction.scalars(query.where(or_(SeriesRow.series_uid == uid, SeriesRow.study_uid == uid))))


# ------------------------------------------------------------------------------------------------------ segmentations


def known_segmentations(transaction: Transaction) -> set[str]:
    """The series of all SEGs that were made of label versions, or that label versions were made of."""
    return set(transaction.scalars(select(SegmentationRow.series_uid)))


def segmentations(transaction: Transaction, scan: str | None = None) -> list[SegmentationRecord]:
    """All label versions that lie in the PACS or should, or a scan's, oldest first."""
    return _records(transaction, _ALL if scan is None else _ALL.where(Scan.name == scan))


def last_failure(transaction: Transaction) -> str | None:
    """Why the last step that failed did, of those that are tried again; None without one."""
    waits = SegmentationRow.next_try_at.is_not(None)
    query = select(SegmentationRow.problem).where(waits).order_by(SegmentationRow.changed_at.desc()).limit(1)
    return transaction.scalar(query)


def segmentation_of(transaction: Transaction, label: int) -> SegmentationRecord | None:
    """The SEG of a label version; None where nobody has begun to store one."""
    found = _records(transaction, _ALL.where(SegmentationRow.label_version_id == label))
    return found[0] if found else None


def _records(transaction: Transaction, query: Select[SegmentationRow, str]) -> list[SegmentationRecord]:
    return [
        SegmentationRecord(
            id=row.id,
            scan=scan,
            label=row.label_version_id,
            origin=row.origin,
            state=row.state,
            study_uid=row.study_uid,
            series_uid=row.series_uid,
            attempts=row.attempts,
            problem=row.problem,
            changed_at=row.changed_at,
        )
        for row, scan in transaction.execute(query.order_by(SegmentationRow.id))
    ]


def left_sentence(segmentation: SegmentationRecord) -> str:
    """What a user should know of a SEG that should be withdrawn and cannot be."""
    return (
        f"{segmentation.scan}: the SEG of label version {segmentation.label}, which is final no more, stays in the "
        f"PACS, which removes none for this program; remove the series {segmentation.series_uid} there"
    )


def left(transaction: Transaction) -> list[str]:
    """A sentence for each SEG that should be withdrawn and cannot be."""
    return [left_sentence(s) for s in _records(transaction, _ALL.where(SegmentationRow.state == "left"))]


def to_be_done(transaction: Transaction) -> int:
    """How many label versions are to be stored or withdrawn, those that are tried again later included."""
    return len(to_store(transaction, later=True)) + len(to_withdraw(transaction, later=True))


def to_store(transaction: Transaction, *, later: bool = False) -> list[int]:
    """The final label versions of scans of the PACS that are not stored there yet, oldest first.

    ``later``: also those whose next try has time.
    """
    query = (
        select(LabelVersion.id)
        .join(Scan, LabelVersion.scan_id == Scan.id)
        .join(SeriesRow, SeriesRow.file == Scan.file)
        .outerjoin(SegmentationRow, SegmentationRow.label_version_id == LabelVersion.id)
        .where(LabelVersion.id.in_(labels.current_versions((FINAL,))), Scan.missing_since.is_(None))
        .where(
            or_(SegmentationRow.id.is_(None), and_(SegmentationRow.state == "storing", _is_time(transaction, later)))
        )
        .order_by(LabelVersion.id)
    )
    return list(transaction.scalars(query))


def to_withdraw(transaction: Transaction, *, later: bool = False) -> list[SegmentationRecord]:
    """The SEGs of versions that are final no more, where what has taken their place is stored.

    Those of a scan whose content is another one now are among them, and those whose final label was taken back.
    ``later``: also those whose next try has time.
    """
    current = (
        select(LabelVersion.id, LabelVersion.scan_id, SegmentationRow.state)
        .join(Scan, LabelVersion.scan_id == Scan.id)
        .outerjoin(SegmentationRow, SegmentationRow.label_version_id == LabelVersion.id)
        .where(LabelVersion.id.in_(labels.current_versions((FINAL,))), Scan.former_name.is_(None))
        .subquery()
    )
    is_settled = or_(current.c.scan_id.is_(None), current.c.state.in_(("empty", "stored")))
    return _records(
        transaction,
        _ALL.outerjoin(current, current.c.scan_id == LabelVersion.scan_id)
        .where(SegmentationRow.origin == "own", SegmentationRow.state.in_(("storing", "stored")))
        .where(or_(current.c.id.is_(None), current.c.id != LabelVersion.id), is_settled, _is_time(transaction, later)),
    )


def _is_time(transaction: Transaction, later: bool) -> ColumnElement[bool]:
    return (
        true() if later else or_(SegmentationRow.next_try_at.is_(None), SegmentationRow.next_try_at <= transaction.now)
    )


def begin(transaction: Transaction, label: int, study_uid: str, series_uid: str) -> None:
    """Note that the SEG of a label version is about to be stored, maybe once more."""
    row = _row(transaction, label)
    if row is None:
        _add(transaction, label, "own", "storing", study_uid, series_uid)


def found(transaction: Transaction, label: int, study_uid: str, series_uid: str) -> None:
    """Note that a label version was made of a SEG of the PACS."""
    if _row(transaction, label) is None:
        _add(transaction, label, "found", "stored", study_uid, series_uid)


def settle(transaction: Transaction, label: int, state: SegmentationState, *, problem: str | None = None) -> None:
    """Note what became of the SEG of a label version; an event of its scan says so.

    Args:
        transaction: one that writes.
        label: the version.
        state: what became of it.
        problem: why it was left.
    """
    row = transaction.execute(_OF_LABEL, {"label": label}).scalar_one()
    row.state, row.problem, row.attempts, row.next_try_at, row.changed_at = state, problem, 0, None, transaction.now
    scan = transaction.get_one(LabelVersion, label).scan_id
    detail: JsonObject = {"version": label, "series": row.series_uid, **({"reason": problem} if problem else {})}
    events.record(transaction, PACS, _VERBS[state], "scan", scan, detail)


def note_failure(transaction: Transaction, label: int, problem: str) -> None:
    """Note that a step failed; it is tried again after a while, later each time."""
    row = _row(transaction, label)
    if row is not None:
        pause = min(2.0**row.attempts, _MAX_PAUSE_SECONDS)
        row.attempts, row.problem = row.attempts + 1, problem
        row.next_try_at, row.changed_at = transaction.now + dt.timedelta(seconds=pause), transaction.now


def _row(transaction: Transaction, label: int) -> SegmentationRow | None:
    return transaction.scalar(_OF_LABEL, {"label": label})


def _add(
    transaction: Transaction, label: int, origin: str, state: SegmentationState, study_uid: str, series_uid: str
) -> SegmentationRow:
    row = SegmentationRow(
        label_version_id=label,
        origin=origin,
        state=state,
        study_uid=study_uid,
        series_uid=series_uid,
        attempts=0,
        changed_at=transaction.now,
    )
    transaction.add(row)
    transaction.flush()
    return row
