"""Corrections: edges between label versions with what changed and what had been estimated."""

from __future__ import annotations

import zlib
from typing import Final

from pydantic import TypeAdapter
from sqlalchemy import and_, func, insert, select
from sqlalchemy import true as always
from sqlalchemy.orm import aliased, defer

from segqc.store import attention_checks, events, labels, leases, scans
from segqc.store.assessments import intervals_of, structure_ids, unlikeness_of
from segqc.store.database import Transaction
from segqc.store.records import (
    Actor,
    AnnotatorWork,
    Change,
    CheckedEstimate,
    CorrectionLine,
    CorrectionRecord,
    Draw,
    JsonObject,
    LabelRecord,
    LeaseRecord,
    StructureChange,
)
from segqc.store.schema import (
    ActorRow,
    AssessmentRow,
    AssessmentStructure,
    Bundle,
    Correction,
    CorrectionStructure,
    LabelVersion,
    LeaseRow,
    Patient,
    ProposalUse,
    Scan,
    StructureName,
)
from segqc.types import MaskDice, Metrics

_SLICES: Final = TypeAdapter(tuple[Metrics, ...])
_ADD_STRUCTURES: Final = insert(CorrectionStructure.__table__)  # type: ignore[arg-type]  # a Table, though it is not said


def add(
    transaction: Transaction,
    start: LabelRecord,
    end: LabelRecord,
    change: Change,
    actor: Actor,
    *,
    lease: LeaseRecord | None = None,
    simulated: bool = False,
) -> int:
    """Record that a person made one label version out of another.

    With a lease, the assessment is the one that was shown at hand-out (method, "Leaks"), never a later one.
    """
    scan_id = scans.number_of(transaction, end.scan)
    number = transaction.insert(
        Correction,
        scan_id=scan_id,
        from_version_id=start.id,
        to_version_id=end.id,
        lease_id=lease.id if lease is not None else None,
        assessment_id=lease.assessment if lease is not None else None,
        actor_id=events.actor_id(transaction, actor),
        made_at=transaction.now,
        seconds=(transaction.now - lease.handed_out_at).total_seconds() if lease is not None else None,
        opened_slices=list(change.opened_slices) if change.opened_slices is not None else None,
        opened_structures=list(change.opened_structures) if change.opened_structures is not None else None,
        through_plane_axis=change.through_plane_axis,
        voxels_changed=change.voxels_changed,
        slices_changed=change.slices_changed,
        simulated=simulated,
    )
    ids = structure_ids(transaction, [s.name for s in change.structures])
    parts = [_structure(number, ids[part.name], i, part) for i, part in enumerate(change.structures)]
    if parts:
        transaction.core.execute(_ADD_STRUCTURES, parts)
    detail: JsonObject = {"from": start.id, "to": end.id, "correction": number}
    events.record(transaction, actor, "corrected", "scan", scan_id, detail)
    return number


def has(transaction: Transaction, end: LabelRecord) -> bool:
    """Whether a label version is known to be a correction."""
    return transaction.scalar(select(Correction.id).where(Correction.to_version_id == end.id)) is not None


def _structure(correction_id: int, structure_id: int, position: int, part: StructureChange) -> dict[str, object]:
    return {
        "correction_id": correction_id,
        "structure_id": structure_id,
        "position": position,
        "dice": part.metrics.dice,
        "iou": part.metrics.iou,
        "arvd": part.metrics.arvd,
        "rvd": part.metrics.rvd,
        "voxels_changed": part.voxels_changed,
        "slices": zlib.compress(_SLICES.dump_json(part.slices)),
    }


def listing(transaction: Transaction, scan: str | None = None) -> list[CorrectionRecord]:
    """All corrections, or one scan's, oldest first."""
    query = (
        select(Correction, Scan.name, ActorRow)
        .join(Scan, Correction.scan_id == Scan.id)
        .join(ActorRow, Correction.actor_id == ActorRow.id)
        .order_by(Correction.id)
    )
    if scan is not None:
        query = query.where(Scan.name == scan)
    return [_record(transaction, row, name, actor) for row, name, actor in transaction.execute(query)]


def by_annotator(transaction: Transaction) -> list[AnnotatorWork]:
    """What each annotator has corrected, the busiest first; simulated corrections are no work."""
    part = CorrectionStructure
    worst = select(func.min(part.dice)).where(part.correction_id == Correction.id).correlate(Correction)
    number = func.count()
    query = (
        select(
            ActorRow, number, func.count(Correction.seconds), func.coalesce(func.sum(Correction.seconds), 0.0),
            func.sum(Correction.voxels_changed), func.sum(Correction.slices_changed),
            func.avg(worst.scalar_subquery()), func.max(Correction.made_at),
        )
        .join(ActorRow, Correction.actor_id == ActorRow.id)
        .where(~Correction.simulated)
        .group_by(ActorRow.id)
        .order_by(number.desc(), ActorRow.name)
    )  # fmt: skip
    attention = {found.actor: found for found in attention_checks.by_annotator(transaction)}
    return [
        AnnotatorWork(
            actor=events.actor_of(actor),
            corrections=count,
            timed=timed,
            seconds=float(seconds),
            voxels_changed=int(voxels),
            slices_changed=int(slices),
            mean_dice_before=dice,
            last_at=last,
            attention=attention.get(events.actor_of(actor)),
        )
        for actor, count, timed, seconds, voxels, slices, dice, last in transaction.execute(query)
    ]


def lines(transaction: Transaction, *, most: int | None = None) -> list[CorrectionLine]:
    """The last corrections, newest first; all of them without a limit."""
    part = CorrectionStructure
    worst = select(func.min(part.dice)).where(part.correction_id == Correction.id).correlate(Correction)
    query = (
        select(
            Scan.name, ActorRow, Correction.made_at, Correction.seconds, Correction.voxels_changed,
            Correction.slices_changed, worst.scalar_subquery(), AssessmentRow.dice, LeaseRow.draw,
            Correction.simulated, Correction.from_version_id, Correction.to_version_id,
            ProposalUse.boxes_offered, ProposalUse.boxes_taken,
        )
        .join(Scan, Correction.scan_id == Scan.id)
        .join(ActorRow, Correction.actor_id == ActorRow.id)
        .outerjoin(AssessmentRow, Correction.assessment_id == AssessmentRow.id)
        .outerjoin(LeaseRow, Correction.lease_id == LeaseRow.id)
        .outerjoin(ProposalUse, ProposalUse.label_version_id == Correction.to_version_id)
        .order_by(Correction.id.desc())
    )  # fmt: skip
    found = transaction.execute(query if most is None else query.limit(most))
    return [
        CorrectionLine(
            scan=scan,
            actor=events.actor_of(actor),
            made_at=at,
            seconds=took,
            voxels_changed=voxels,
            slices_changed=slices,
            dice_before=before,
            estimated_dice=shown,
            draw=draw,
            simulated=simulated,
            from_version=start,
            to_version=end,
            boxes_offered=offered,
            boxes_taken=taken,
        )
        for scan, actor, at, took, voxels, slices, before, shown, draw, simulated, start, end, offered, taken in found
    ]


def audited(transaction: Transaction, *, simulated: bool = False) -> list[CheckedEstimate]:
    """What audit draws show of the estimates: `checked_estimates` of these alone.

    Audit draws are uniform at random among the scans that waited; scans chosen worst-first would be a biased sample
    (method, "Leaks").

    Args:
        transaction: what to read in.
        simulated: whether simulated corrections are wanted, instead of people's.
    """
    return checked_estimates(transaction, draw="audit", simulated=simulated)


def checked_estimates(
    transaction: Transaction, *, draw: Draw | None = None, simulated: bool = False
) -> list[CheckedEstimate]:
    """What corrections show of the estimates, a row per correction and structure, oldest first.

    Left out are corrections of a part of the scan, those of labels that were rejected since, and excluded scans.

    Args:
        transaction: what to read in.
        draw: how the scans were chosen; None for all.
        simulated: whether simulated corrections are wanted, instead of people's.
    """
    shown, true, source = AssessmentStructure, CorrectionStructure, aliased(Bundle)
    versions = (source.segmenter_version, Bundle.assessor_version)
    unlikeness = (AssessmentRow.unlikeness, AssessmentRow.unlikeness_p_value)
    query = (
        select(
            Patient.name, Scan.name, Correction.made_at, Correction.to_version_id, StructureName.name,
            *versions, *unlikeness, shown, true,
        )
        .options(defer(shown.detail), defer(true.slices))
        .select_from(Correction)
        .join(LeaseRow, LeaseRow.id == Correction.lease_id)
        .join(AssessmentRow, AssessmentRow.id == Correction.assessment_id)
        .join(Bundle, Bundle.id == AssessmentRow.bundle_id)
        .join(LabelVersion, LabelVersion.id == Correction.from_version_id)
        .outerjoin(source, source.id == LabelVersion.bundle_id)
        .join(Scan, Scan.id == Correction.scan_id)
        .join(Patient, Patient.id == Scan.patient_id)
        .join(true, true.correction_id == Correction.id)
        .join(shown, and_(shown.assessment_id == AssessmentRow.id, shown.structure_id == true.structure_id))
        .join(StructureName, StructureName.id == true.structure_id)
        .where(
            LeaseRow.draw == draw if draw is not None else always(),
            AssessmentRow.label_version_id == Correction.from_version_id,
            Correction.simulated == simulated,
            Correction.opened_slices.is_(None),
            Correction.to_version_id > Scan.newest_label,
            Scan.state != "excluded",
            shown.present,
        )
        .order_by(Correction.id, true.position)
    )  # fmt: skip
    return [
        CheckedEstimate(
            patient=patient,
            scan=scan,
            made_at=made_at,
            label=label,
            structure=structure,
            segmenter_version=segmenter,
            assessor_version=assessor,
            estimated=Metrics(said.dice, said.iou, said.arvd, said.rvd),
            intervals=intervals_of(said, unlikeness_of(score, p_value)),
            true=Metrics(found.dice, found.iou, found.arvd, found.rvd),
        )
        for patient, scan, made_at, label, structure, segmenter, assessor, score, p_value, said, found in (
            transaction.execute(query)
        )
    ]


def audited_masks(transaction: Transaction, segmenter_version: str, *, simulated: bool = False) -> list[MaskDice]:
    """The true Dice of a segmentation network's masks that were audit draws, a scan each, oldest first.

    Of several structures the worst counts, and one that the mask lacks has a Dice of 0. Masks count with or without an
    estimate; left out is what `audited` leaves out.

    Args:
        transaction: what to read in.
        segmenter_version: of the network that made the masks.
        simulated: whether simulated corrections are wanted, instead of people's.
    """
    worst = func.min(CorrectionStructure.dice)
    query = (
        select(Patient.name, Scan.name, worst)
        .select_from(Correction)
        .join(CorrectionStructure, CorrectionStructure.correction_id == Correction.id)
        .join(LeaseRow, LeaseRow.id == Correction.lease_id)
        .join(LabelVersion, LabelVersion.id == Correction.from_version_id)
        .join(Bundle, Bundle.id == LabelVersion.bundle_id)
        .join(Scan, Scan.id == Correction.scan_id)
        .join(Patient, Patient.id == Scan.patient_id)
        .where(
            LeaseRow.draw == "audit",
            Bundle.segmenter_version == segmenter_version,
            Correction.simulated == simulated,
            Correction.opened_slices.is_(None),
            Correction.to_version_id > Scan.newest_label,
            Scan.state != "excluded",
        )
        .group_by(Correction.id, Patient.name, Scan.name)
        .order_by(Correction.id)
    )
    found = transaction.execute(query)
    return [MaskDice(patient=patient, scan=scan, dice=dice) for patient, scan, dice in found if dice is not None]


def _record(transaction: Transaction, row: Correction, scan: str, actor: ActorRow) -> CorrectionRecord:
    parts = transaction.execute(
        select(CorrectionStructure, StructureName.name)
        .join(StructureName, CorrectionStructure.structure_id == StructureName.id)
        .where(CorrectionStructure.correction_id == row.id)
        .order_by(CorrectionStructure.position)
    )
    structures = tuple(
        StructureChange(
            name=name,
            metrics=Metrics(part.dice, part.iou, part.arvd, part.rvd),
            voxels_changed=part.voxels_changed,
            slices=_SLICES.validate_json(zlib.decompress(part.slices)),
        )
        for part, name in parts
    )
    change = Change(
        through_plane_axis=row.through_plane_axis,
        voxels_changed=row.voxels_changed,
        slices_changed=row.slices_changed,
        structures=structures,
        opened_slices=tuple(row.opened_slices) if row.opened_slices is not None else None,
        opened_structures=tuple(row.opened_structures) if row.opened_structures is not None else None,
    )
    return CorrectionRecord(
        id=row.id,
        scan=scan,
        from_version=row.from_version_id,
        to_version=row.to_version_id,
        lease=leases.get(transaction, row.lease_id) if row.lease_id is not None else None,
        assessment=row.assessment_id,
        actor=events.actor_of(actor),
        made_at=row.made_at,
        seconds=row.seconds,
        simulated=row.simulated,
        change=change,
        proposal=labels.taken_proposal(transaction, row.to_version_id),
    )
