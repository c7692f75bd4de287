"""Corrections: edges between label versions with what changed and what had been estimated."""

from __future__ import annotations

import zlib
from typing import Final

from pydantic import TypeAdapter
from sqlalchemy import select

from segqc.store import events, leases, scans
from segqc.store.assessments import structure_ids
from segqc.store.database import Transaction
from segqc.store.schema import Actor, Correction, CorrectionStructure, Scan, StructureName
from segqc.store.values import Change, CorrectionRecord, LabelRecord, LeaseRecord, StructureChange, Who
from segqc.types import Metrics

_SLICES: Final = TypeAdapter(tuple[Metrics, ...])


def add(
    transaction: Transaction,
    start: LabelRecord,
    end: LabelRecord,
    change: Change,
    who: Who,
    *,
    lease: LeaseRecord | None = None,
    simulated: bool = False,
) -> int:
    """Record that a person made one label version out of another.

    With a lease, the assessment is the one that was shown at hand-out (method, "Leaks"), never a later one.
    """
    scan = scans.find(transaction, end.scan)
    row = Correction(
        scan_id=scan.id,
        from_version_id=start.id,
        to_version_id=end.id,
        assignment_id=lease.id if lease is not None else None,
        assessment_id=lease.assessment if lease is not None else None,
        actor_id=events.actor_id(transaction, who),
        made_at=transaction.now,
        seconds=(transaction.now - lease.handed_out_at).total_seconds() if lease is not None else None,
        opened_slices=list(change.opened_slices) if change.opened_slices is not None else None,
        opened_structures=list(change.opened_structures) if change.opened_structures is not None else None,
        through_plane_axis=change.through_plane_axis,
        voxels_changed=change.voxels_changed,
        slices_changed=change.slices_changed,
        simulated=simulated,
    )
    transaction.add(row)
    transaction.flush()
    ids = structure_ids(transaction, [s.name for s in change.structures])
    transaction.add_all(_structure(row.id, ids[s.name], i, s) for i, s in enumerate(change.structures))
    detail = {"from": start.id, "to": end.id, "correction": row.id}
    events.record(transaction, who, "corrected", "scan", scan.id, {**detail})
    return row.id


def _structure(correction_id: int, structure_id: int, position: int, part: StructureChange) -> CorrectionStructure:
    return CorrectionStructure(
        correction_id=correction_id,
        structure_id=structure_id,
        position=position,
        dice=part.metrics.dice,
        iou=part.metrics.iou,
        arvd=part.metrics.arvd,
        rvd=part.metrics.rvd,
        voxels_changed=part.voxels_changed,
        slices=zlib.compress(_SLICES.dump_json(part.slices)),
    )


def listing(transaction: Transaction, scan: str | None = None) -> list[CorrectionRecord]:
    """All corrections, or one scan's, oldest first."""
    query = (
        select(Correction, Scan.name, Actor)
        .join(Scan, Correction.scan_id == Scan.id)
        .join(Actor, Correction.actor_id == Actor.id)
        .order_by(Correction.id)
    )
    if scan is not None:
        query = query.where(Scan.name == scan)
    return [_record(transaction, row, name, actor) for row, name, actor in transaction.execute(query)]


def _record(transaction: Transaction, row: Correction, scan: str, actor: Actor) -> CorrectionRecord:
    parts = transaction.execute(
        select(CorrectionStructure, StructureName.name)
        .join(StructureName, CorrectionStructure.structure_id == StructureName.id)
        .where(CorrectionStructure.correction_id == row.id)
        .order_by(CorrectionStructure.position)
    )
    structures = tuple(
        StructureChange(
            name,
            Metrics(part.dice, part.iou, part.arvd, part.rvd),
            part.voxels_changed,
            _SLICES.validate_json(zlib.decompress(part.slices)),
        )
        for part, name in parts
    )
    change = Change(
        row.through_plane_axis,
        row.voxels_changed,
        row.slices_changed,
        structures,
        tuple(row.opened_slices) if row.opened_slices is not None else None,
        tuple(row.opened_structures) if row.opened_structures is not None else None,
    )
    return CorrectionRecord(
        row.id,
        scan,
        row.from_version_id,
        row.to_version_id,
        leases.get(transaction, row.assignment_id) if row.assignment_id is not None else None,
        row.assessment_id,
        events.who_is(actor),
        row.made_at,
        row.seconds,
        row.simulated,
        change,
    )
