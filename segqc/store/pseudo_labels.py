"""Pseudo-labels: masks that were accepted to train networks, why, until when, and what audits show of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import ColumnElement, and_, exists, func, or_, select
from sqlalchemy.orm import aliased

from segqc.store import events, labels, scans
from segqc.store.database import Transaction
from segqc.store.labels import ORIGINAL, PSEUDO, RETURNED
from segqc.store.records import LabelRecord, PseudoLabelRecord
from segqc.store.schema import (
    Correction,
    CorrectionStructure,
    LabelVersion,
    LeaseRow,
    Patient,
    PseudoLabelRow,
    Scan,
)

_OPEN: Final = PseudoLabelRow.ended_at.is_(None)
_TO_AUDIT: Final = (
    select(LabelVersion.scan_id)
    .join(PseudoLabelRow, PseudoLabelRow.label_version_id == LabelVersion.id)
    .where(_OPEN, PseudoLabelRow.is_audited)
)
_ANY_AUDIT: Final = _TO_AUDIT.limit(1)


def add(
    transaction: Transaction,
    label: LabelRecord,
    ignored: LabelRecord,
    *,
    dice: float,
    low: float,
    level: float,
    rule: str,
    max_error: float,
    is_audited: bool,
) -> None:
    """Record why a label version was accepted as a pseudo-label; the fields are those of `PseudoLabelRecord`."""
    transaction.insert(
        PseudoLabelRow,
        label_version_id=label.id,
        ignored_version_id=ignored.id,
        dice=dice,
        low=low,
        level=level,
        rule=rule,
        max_error=max_error,
        is_audited=is_audited,
    )


def end(transaction: Transaction, scan: str, reason: str) -> None:
    """End the pseudo-label of a scan, if it has one.

    Raises:
        UnknownScan: if there is no such scan.
    """
    number = scans.number_of(transaction, scan)
    if labels.end_pseudo_label(transaction, number, reason):
        events.record(transaction, events.SERVER, "pseudo-label ended", "scan", number, {"reason": reason})


def listing(transaction: Transaction, *, scan: str | None = None, ended: bool = False) -> list[PseudoLabelRecord]:
    """The accepted pseudo-labels, or those of one scan, oldest first; with ``ended`` those that were, too.

    A scan that got a person's label, was excluded, or whose file is gone, has none.
    """
    query = (
        select(PseudoLabelRow)
        .join(LabelVersion, LabelVersion.id == PseudoLabelRow.label_version_id)
        .join(Scan, Scan.id == LabelVersion.scan_id)
        .order_by(PseudoLabelRow.label_version_id)
    )
    if not ended:
        query = query.where(_OPEN, Scan.state == "unlabelled", Scan.missing_since.is_(None))
    if scan is not None:
        query = query.where(Scan.name == scan)
    return [_record(transaction, row) for row in transaction.scalars(query)]


def of_people(transaction: Transaction) -> set[str]:
    """The scans that get no pseudo-label as a person has worked on them; see `is_of_people`."""
    shown = labels.current_of_all(transaction, PSEUDO)
    return labels.read_scans(transaction) | {scan for scan, label in shown.items() if _is_a_persons(label)}


def is_of_people(transaction: Transaction, scan: str) -> bool:
    """Whether a person has read a scan, or has put a label of their own in its pseudo-label's place.

    Raises:
        UnknownScan: if there is no such scan.
    """
    shown = labels.current(transaction, scan, PSEUDO)
    return (shown is not None and _is_a_persons(shown)) or bool(labels.readings(transaction, scan))


def _is_a_persons(label: LabelRecord) -> bool:
    return label.source not in labels.NOT_BY_PEOPLE


def left_over(transaction: Transaction) -> dict[str, list[LabelRecord]]:
    """The labels that scans still have under the tags of pseudo-labels though these train no more, by scan."""
    accepted = {record.label.scan for record in listing(transaction)}
    found: dict[str, list[LabelRecord]] = {}
    for tag in (PSEUDO, labels.IGNORED):
        for scan, label in labels.current_of_all(transaction, tag).items():
            if scan not in accepted and not _is_a_persons(label):
                found.setdefault(scan, []).append(label)
    return found


@dataclass(frozen=True, slots=True)
class AuditedPseudoLabel:
    """A pseudo-label that was drawn at random and corrected: the true Dice of its worst structure."""

    scan: str
    patient: str
    true_dice: float


def audited(transaction: Transaction, *, simulated: bool = False, rule: str | None = None) -> list[AuditedPseudoLabel]:
    """What random draws among the pseudo-labels showed of them, oldest first.

    These are the pseudo-labels' own audits, and audit draws of all waiting scans that met one. Left out are corrections
    of a part of the scan, those of labels that were rejected since, and excluded scans. A mask that several annotators
    have corrected counts once, with the least Dice.

    Args:
        transaction: what to read in.
        simulated: whether simulated corrections are wanted, instead of people's.
        rule: the rule that the masks were accepted by; None for all.
    """
    made = aliased(LabelVersion)
    was_accepted = exists().where(
        PseudoLabelRow.label_version_id == made.id,
        made.parent_id == Correction.from_version_id,
        made.id < Correction.to_version_id,
        # most end with the very correction: at the same time, whatever the clock was when the scan was handed out
        or_(_OPEN, PseudoLabelRow.ended_at == Correction.made_at, PseudoLabelRow.ended_at >= LeaseRow.handed_out_at),
    )
    if rule is not None:
        was_accepted = was_accepted.where(PseudoLabelRow.rule == rule)
    query = (
        select(Scan.name, Patient.name, func.min(CorrectionStructure.dice))
        .select_from(Correction)
        .join(LeaseRow, LeaseRow.id == Correction.lease_id)
        .join(Scan, Scan.id == Correction.scan_id)
        .join(Patient, Patient.id == Scan.patient_id)
        .outerjoin(CorrectionStructure, CorrectionStructure.correction_id == Correction.id)
        .where(
            LeaseRow.draw.in_(("audit", "pseudo-audit")),
            Correction.simulated == simulated,
            Correction.opened_slices.is_(None),
            Correction.opened_structures.is_(None),
            Correction.to_version_id > Scan.newest_label,
            Scan.state != "excluded",
            was_accepted,
        )
        .group_by(Correction.from_version_id, Scan.name, Patient.name)
        .order_by(func.min(Correction.id))
    )
    # without a structure in mask and truth there is nothing wrong with it
    rows = transaction.execute(query)
    return [AuditedPseudoLabel(scan, patient, 1.0 if dice is None else dice) for scan, patient, dice in rows]


def has_audits(transaction: Transaction) -> bool:
    """Whether any pseudo-label shall be checked by a person."""
    return transaction.rows(_ANY_AUDIT).first() is not None


def is_to_be_audited() -> ColumnElement[bool]:
    """In a query of scans: whether a person shall check its pseudo-label, and would start from the very mask."""
    newer = aliased(LabelVersion)
    changed = exists().where(
        newer.scan_id == LabelVersion.scan_id,
        newer.tag.in_((ORIGINAL, RETURNED)),
        newer.id > LabelVersion.parent_id,
    )
    return and_(Scan.queue == "train", Scan.id.in_(_TO_AUDIT.where(~changed)))


def _record(transaction: Transaction, row: PseudoLabelRow) -> PseudoLabelRecord:
    return PseudoLabelRecord(
        label=labels.get(transaction, row.label_version_id),
        ignored=labels.get(transaction, row.ignored_version_id),
        dice=row.dice,
        low=row.low,
        level=row.level,
        rule=row.rule,
        max_error=row.max_error,
        is_audited=row.is_audited,
        ended_at=row.ended_at,
        ended_because=row.ended_because,
    )
