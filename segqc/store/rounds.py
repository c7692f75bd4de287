"""Rounds as the store knows them, and the labels that wait for the next one."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from sqlalchemy import case, func, select

from segqc.store import bundles, jobs
from segqc.store.database import Transaction
from segqc.store.labels import FINAL, NOT_BY_PEOPLE, current_versions
from segqc.store.records import JsonObject, LabelledSince, RoundRecord
from segqc.store.schema import LABELLED_STATES, Correction, JobRow, LabelVersion, RoundRow, RoundStep, Scan

_IS_LABELLED: Final = (
    LabelVersion.id.in_(current_versions((FINAL,))),
    Scan.state.in_(LABELLED_STATES),
    Scan.missing_since.is_(None),
)

_FINISHED: Final = select(func.count()).select_from(RoundRow).where(RoundRow.ended_at.is_not(None))


def listing(transaction: Transaction) -> list[RoundRecord]:
    """All rounds that have begun, oldest first."""
    steps: dict[int, dict[str, JsonObject]] = defaultdict(dict)
    for step in transaction.scalars(select(RoundStep)):
        steps[step.round_id][step.name] = step.result
    return [
        RoundRecord(
            number=row.id,
            job=jobs.get(transaction, row.job_id),
            bundle=row.bundle_id,
            labelled=row.labelled,
            started_at=row.started_at,
            ended_at=row.ended_at,
            steps=steps[row.id],
        )
        for row in transaction.scalars(select(RoundRow).order_by(RoundRow.id)).all()
    ]


def newest_label(transaction: Transaction) -> int:
    """The newest label version when the last round, or the later of the trainings of a bundle's networks, began.

    0 without any. A round that failed or was stopped before it began counts from when it was taken, or put.
    """
    of_rounds = transaction.scalar(select(func.max(JobRow.newest_label)).where(JobRow.kind == "round")) or 0
    return max(of_rounds, bundles.newest_trained_label(transaction))


def finished(transaction: Transaction) -> int:
    """How many rounds have come to their end."""
    return transaction.rows(_FINISHED).scalar() or 0


def last_number(transaction: Transaction) -> int | None:
    """The number of the last round that has begun; None without one."""
    return transaction.scalar(select(func.max(RoundRow.id)))


def labelled_since(transaction: Transaction, newest: int) -> LabelledSince:
    """The scans whose final label people gave or changed after a label version, and nobody rejected; 0 for ever.

    Simulated corrections count, too: who simulates an annotator wants to see what a person would.
    """
    simulated = func.count(case((Correction.simulated, 1)))
    imported = func.count(case((LabelVersion.source == "import", 1)))
    query = select(func.count(), func.min(LabelVersion.made_at), simulated, imported).select_from(LabelVersion)
    query = query.join(Scan, Scan.id == LabelVersion.scan_id)
    query = query.outerjoin(Correction, Correction.to_version_id == LabelVersion.id)
    query = query.where(*_IS_LABELLED, LabelVersion.source.not_in(NOT_BY_PEOPLE), LabelVersion.id > newest)
    count, first_at, of_program, from_outside = transaction.execute(query).one()
    return LabelledSince(scans=count, first_at=first_at, simulated=of_program, imported=from_outside)


def labelled_patients(transaction: Transaction) -> int:
    """The number of patients of scans with a final label that nobody rejected."""
    query = select(func.count(Scan.patient_id.distinct())).select_from(LabelVersion)
    query = query.join(Scan, Scan.id == LabelVersion.scan_id).where(*_IS_LABELLED)
    return transaction.scalar(query) or 0
