"""Who did what to which object: actors and the log that only grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sqlalchemy import bindparam, insert, select

from segqc.store.database import Transaction
from segqc.store.schema import Actor, Event
from segqc.store.values import EventRecord, JsonObject, Who

SERVER = Who("system", "server", "program")
FOLDER = Who("system", "folder", "folder")
"""Whoever puts files into the studies folder, changes or removes them."""

# built once: building a query takes longer than running it
_ACTOR: Final = select(Actor.id).where(
    Actor.kind == bindparam("kind"),
    Actor.name == bindparam("name"),
    Actor.identified_by == bindparam("identified_by"),
)


def actor_id(transaction: Transaction, who: Who) -> int:
    """The row of an actor, added when it acts for the first time."""
    known: dict[Who, int] = transaction.info.setdefault("actors", {})
    if who not in known:
        named = {"kind": who.kind, "name": who.name, "identified_by": who.identified_by}
        found = transaction.rows(_ACTOR, named).scalar()
        known[who] = found if found is not None else transaction.insert(Actor, **named, added_at=transaction.now)
    return known[who]


def who_is(actor: Actor) -> Who:
    """The record of an actor's row."""
    return Who(actor.kind, actor.name, actor.identified_by)


def record(
    transaction: Transaction,
    who: Who,
    verb: str,
    object_kind: str,
    object_id: int,
    detail: JsonObject | None = None,
) -> None:
    """Add to the log, in the transaction that does it."""
    transaction.insert(
        Event,
        at=transaction.now,
        actor_id=actor_id(transaction, who),
        verb=verb,
        object_kind=object_kind,
        object_id=object_id,
        detail=detail,
    )


def record_all(transaction: Transaction, who: Who, verb: str, object_kind: str, object_ids: Sequence[int]) -> None:
    """Add the same to the log for many objects."""
    if not object_ids:
        return
    same = {"at": transaction.now, "actor_id": actor_id(transaction, who), "verb": verb, "object_kind": object_kind}
    transaction.execute(insert(Event), [{**same, "object_id": i} for i in object_ids])


def history(transaction: Transaction, object_kind: str, object_id: int) -> list[EventRecord]:
    """What happened to an object, oldest first."""
    rows = transaction.execute(
        select(Event, Actor)
        .join(Actor, Event.actor_id == Actor.id)
        .where(Event.object_kind == object_kind, Event.object_id == object_id)
        .order_by(Event.id)
    )
    return [EventRecord(e.at, who_is(a), e.verb, e.object_kind, e.object_id, e.detail) for e, a in rows]
