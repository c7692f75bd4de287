"""Who did what to which object: actors and the log that only grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sqlalchemy import bindparam, func, insert, select

from segqc.store.database import Transaction
from segqc.store.records import Actor, EventRecord, JsonObject
from segqc.store.schema import ActorRow, Event

SERVER = Actor(kind="system", name="server", identified_by="program")
FOLDER = Actor(kind="system", name="folder", identified_by="folder")
"""Whoever puts files into the dataset folder, changes or removes them."""

# built once: building a query takes longer than running it
_ACTOR: Final = select(ActorRow.id).where(
    ActorRow.kind == bindparam("kind"),
    ActorRow.name == bindparam("name"),
    ActorRow.identified_by == bindparam("identified_by"),
)


def actor_id(transaction: Transaction, actor: Actor) -> int:
    """The row of an actor, added when it acts for the first time."""
    known: dict[Actor, int] = transaction.info.setdefault("actors", {})
    if actor not in known:
        named = {"kind": actor.kind, "name": actor.name, "identified_by": actor.identified_by}
        found = transaction.rows(_ACTOR, named).scalar()
        known[actor] = found if found is not None else transaction.insert(ActorRow, **named, added_at=transaction.now)
    return known[actor]


def actor_of(actor: ActorRow) -> Actor:
    """The record of an actor's row."""
    return Actor(kind=actor.kind, name=actor.name, identified_by=actor.identified_by)


def record(
    transaction: Transaction,
    actor: Actor,
    verb: str,
    object_kind: str,
    object_id: int,
    detail: JsonObject | None = None,
) -> None:
    """Add to the log, in the transaction that does it."""
    transaction.insert(
        Event,
        at=transaction.now,
        actor_id=actor_id(transaction, actor),
        verb=verb,
        object_kind=object_kind,
        object_id=object_id,
        detail=detail,
    )


def record_all(transaction: Transaction, actor: Actor, verb: str, object_kind: str, object_ids: Sequence[int]) -> None:
    """Add the same to the log for many objects."""
    if not object_ids:
        return
    same = {"at": transaction.now, "actor_id": actor_id(transaction, actor), "verb": verb, "object_kind": object_kind}
    transaction.execute(insert(Event), [{**same, "object_id": i} for i in object_ids])


def newest(transaction: Transaction) -> int:
    """The number of the newest event; 0 without one."""
    return transaction.scalar(select(func.max(Event.id))) or 0


def history(transaction: Transaction, object_kind: str, object_id: int | None = None) -> list[EventRecord]:
    """What happened to an object, or to all of a kind, oldest first."""
    wanted = Event.object_kind == object_kind
    if object_id is not None:
        wanted &= Event.object_id == object_id
    query = select(Event, ActorRow).join(ActorRow, Event.actor_id == ActorRow.id).where(wanted).order_by(Event.id)
    rows = transaction.execute(query)
    return [
        EventRecord(
            at=e.at, actor=actor_of(a), verb=e.verb, object_kind=e.object_kind, object_id=e.object_id, detail=e.detail
        )
        for e, a in rows
    ]
