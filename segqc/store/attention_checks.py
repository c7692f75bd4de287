"""Attention checks: errors that were planted into masks which were handed out, and whether annotators found them.

A lease has one at most. The mask with the error is a label version that is nobody's current label, never trains and is
never assessed; the lease goes on naming the network's mask, and what is measured is measured against that.
"""

from __future__ import annotations

from sqlalchemy import Integer, cast, exists, func, select, update

from segqc.store import events, labels, leases
from segqc.store.database import Transaction
from segqc.store.labels import ORIGINAL
from segqc.store.records import Actor, Attention, AttentionCheck, JsonObject, LabelRecord, LeaseRecord
from segqc.store.schema import ActorRow, AttentionCheckRow, Correction, LeaseRow, Scan


def add(transaction: Transaction, lease: LeaseRecord, shown: LabelRecord, kind: str) -> None:
    """Record that a lease's annotator gets the mask with a planted error.

    Args:
        transaction: what to write in.
        lease: the lease.
        shown: the mask with the error, made of the lease's own.
        kind: of the error.
    """
    transaction.insert(AttentionCheckRow, lease_id=lease.id, label_version_id=shown.id, kind=kind, found=None)


def of_lease(transaction: Transaction, lease: int) -> AttentionCheck | None:
    """The planted error of a lease, by the lease's number; None without one."""
    row = transaction.get(AttentionCheckRow, lease)
    if row is None:
        return None
    shown = labels.get(transaction, row.label_version_id)
    assert shown.parent is not None  # it was made of the network's mask
    return AttentionCheck(
        lease=leases.get(transaction, lease),
        served=labels.get(transaction, shown.parent),
        shown=shown,
        kind=row.kind,
        found=row.found,
    )


def of_submission(transaction: Transaction, scan: str, actor: Actor) -> AttentionCheck | None:
    """The planted error that a label of a scan may hold, whoever submits it.

    It is that of the annotator's own last lease of the scan. Who never had one may have got the mask of another
    annotator's, from a client that does not say who asks: then it is the last one that was not answered.
    """
    own = _last_lease(transaction, scan, actor)
    if own is not None:
        return of_lease(transaction, own)
    query = select(AttentionCheckRow.lease_id).join(LeaseRow, LeaseRow.id == AttentionCheckRow.lease_id)
    query = query.join(Scan, Scan.id == LeaseRow.scan_id).where(Scan.name == scan, AttentionCheckRow.found.is_(None))
    number = transaction.scalar(query.order_by(LeaseRow.id.desc()).limit(1))
    return None if number is None else of_lease(transaction, number)


def shown_to(transaction: Transaction, label: LabelRecord, actor: Actor | None) -> LabelRecord:
    """What an annotator gets in the place of a label: the mask with a planted error, until they have submitted.

    Args:
        transaction: what to read in.
        label: the label that is asked for.
        actor: who asks; None for a client that does not say. It gets what the one open lease of the scan shows.
    """
    if label.tag != ORIGINAL:
        return label
    if actor is None:
        is_open = leases.listing(transaction, state="open", scan=label.scan)
        number = is_open[0].id if len(is_open) == 1 else None
    else:
        number = _last_lease(transaction, label.scan, actor)
    check = None if number is None else of_lease(transaction, number)
    if check is None or check.found is not None or not _is_shown(check) or check.served.id != label.id:
        return label
    return check.shown


def answer(transaction: Transaction, check: AttentionCheck, actor: Actor, *, found: bool) -> None:
    """Record whether the annotator has corrected the error they got; it is in the scan's history from now on."""
    if not _is_shown(check):
        return
    where = AttentionCheckRow.lease_id == check.lease.id
    transaction.execute(update(AttentionCheckRow).where(where).values(found=found))
    scan_id = transaction.scalars(select(LeaseRow.scan_id).where(LeaseRow.id == check.lease.id)).one()
    verb = "planted error corrected" if found else "planted error overlooked"
    detail: JsonObject = {"lease": check.lease.id, "version": check.shown.id, "kind": check.kind}
    events.record(transaction, actor, verb, "scan", scan_id, detail)


def by_annotator(transaction: Transaction) -> list[Attention]:
    """How many planted errors each annotator got and found, by name; simulated annotators are left out."""
    row = AttentionCheckRow
    simulated = exists().where(Correction.lease_id == row.lease_id, Correction.simulated)
    query = (
        select(ActorRow, func.count(), func.count(row.found), func.coalesce(func.sum(cast(row.found, Integer)), 0))
        .select_from(row)
        .join(LeaseRow, LeaseRow.id == row.lease_id)
        .join(ActorRow, ActorRow.id == LeaseRow.actor_id)
        .where(~simulated)
        .group_by(ActorRow.id)
        .order_by(ActorRow.name, ActorRow.id)
    )
    return [
        Attention(actor=events.actor_of(actor), planted=planted, submitted=submitted, found=found)
        for actor, planted, submitted, found in transaction.execute(query)
    ]


def _is_shown(check: AttentionCheck) -> bool:
    """Whether the lease hands out the mask with the error: one that is resumed may hand out a newer mask."""
    return check.lease.label_version == check.served.id


def _last_lease(transaction: Transaction, scan: str, actor: Actor) -> int | None:
    """The number of an annotator's last lease of a scan; None without one."""
    query = (
        select(func.max(LeaseRow.id))
        .join(Scan, Scan.id == LeaseRow.scan_id)
        .join(ActorRow, ActorRow.id == LeaseRow.actor_id)
        .where(
            Scan.name == scan,
            ActorRow.kind == actor.kind,
            ActorRow.name == actor.name,
            ActorRow.identified_by == actor.identified_by,
        )
    )
    return transaction.scalar(query)
