"""Bundles: which pairs of networks were published, by whom and why, and which one serves.

A bundle's files are the business of whoever publishes it; here are its number, the versions of its networks, and the
rule that at most one bundle serves.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Final

from sqlalchemy import case, func, select, update

from segqc.store import assessments, events
from segqc.store.database import StoreError, Transaction
from segqc.store.records import Actor, BundleRecord, JsonObject, PublishedBundle
from segqc.store.schema import ActorRow, Bundle, Event, LabelVersion
from segqc.types import DriftAlarm

_MAX_NUMBER: Final = 2**31 - 1  # that a column can hold
_SERVED: Final = "served"  # the event of a bundle that serves from then on
_CHOSEN: Final = "chosen"  # the event of a bundle that a person wants to serve
_RECORDS: Final = select(Bundle, ActorRow).join(ActorRow, Bundle.actor_id == ActorRow.id)
_SERVING: Final = _RECORDS.where(Bundle.serving)
_RANKED_BY: Final = select(Bundle.ranked_by).where(Bundle.serving)
_DRIFT: Final = select(Bundle.drift_since, Bundle.drift_structures, Bundle.drift_patients).where(Bundle.serving)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBundle:
    """What is known of a bundle before it is one."""

    id: int  # the number of its folder; larger than that of every earlier bundle
    segmenter_version: str | None = None
    assessor_version: str | None = None
    manifest_sha256: str  # of the manifest in its folder
    parent: int | None = None  # the bundle that it was made of
    reason: str
    ranked_by: str | None = None  # see `PublishedBundle`
    published_at: dt.datetime | None = None  # None for now
    segmenter_newest_label: int | None = None  # when its training began; None where nobody knows
    assessor_newest_label: int | None = None  # likewise


def add(transaction: Transaction, new: NewBundle, actor: Actor) -> PublishedBundle:
    """Record a bundle; it does not serve yet.

    Raises:
        IntegrityError: if there is a bundle of this number, or the new one has no network.
    """
    transaction.add(
        Bundle(
            id=new.id,
            segmenter_version=new.segmenter_version,
            assessor_version=new.assessor_version,
            manifest_sha256=new.manifest_sha256,
            parent_id=new.parent,
            reason=new.reason,
            actor_id=events.actor_id(transaction, actor),
            published_at=new.published_at or transaction.now,
            newest_label=transaction.scalar(select(func.max(LabelVersion.id))) or 0,
            serving=False,
            ranked_by=new.ranked_by,
            segmenter_newest_label=new.segmenter_newest_label,
            assessor_newest_label=new.assessor_newest_label,
        )
    )
    transaction.flush()
    events.record(transaction, actor, "published", "bundle", new.id, {"parent": new.parent, "reason": new.reason})
    return get(transaction, new.id)


def hold(transaction: Transaction, number: int, reason: str, actor: Actor) -> None:
    """Note why a bundle that was published does not serve by itself; `serve` lets it.

    Raises:
        StoreError: if there is no such bundle.
    """
    get(transaction, number)
    transaction.execute(
        update(Bundle)
        .where(Bundle.id == number)
        .values(held_because=reason)
        .execution_options(synchronize_session=False)
    )
    transaction.expire_all()
    events.record(transaction, actor, "held", "bundle", number, {"reason": reason})


def serve(transaction: Transaction, number: int, actor: Actor) -> bool:
    """Let a bundle serve from now on, held or not; returns whether it did not before.

    Scans are ranked, and estimates shown, by the serving bundle alone: scans that another bundle ranked have no
    estimate until this one has assessed them.

    Raises:
        StoreError: if there is no such bundle.
    """
    if get(transaction, number).is_serving:
        return False
    for others, values in (
        (Bundle.serving, {"serving": False}),
        (Bundle.id == number, {"serving": True, "held_because": None}),
    ):
        transaction.execute(update(Bundle).where(others).values(values).execution_options(synchronize_session=False))
    transaction.expire_all()  # what was read before is not what these rows hold now
    events.record(transaction, actor, _SERVED, "bundle", number)
    assessments.rank_anew(transaction)
    return True


def choose(transaction: Transaction, number: int, actor: Actor) -> None:
    """Note that a person wants a bundle to serve, see `is_chosen_since`."""
    events.record(transaction, actor, _CHOSEN, "bundle", number)


def is_chosen_since(transaction: Transaction, number: int, event: int) -> bool:
    """Whether a person has chosen a bundle to serve after an event, by the event's number."""
    chosen = select(Event.id).where(Event.object_kind == "bundle", Event.object_id == number, Event.verb == _CHOSEN)
    return transaction.scalar(chosen.where(Event.id > event).limit(1)) is not None


def newest_labels(transaction: Transaction, number: int) -> tuple[int | None, int | None]:
    """The newest label version when the trainings of a bundle's networks began: the segmenter's, SegQC-Net's.

    None where there is no such network, or nobody knows.
    """
    query = select(Bundle.segmenter_newest_label, Bundle.assessor_newest_label).where(Bundle.id == number)
    segmenter, assessor = transaction.execute(query).one()
    return segmenter, assessor


def newest_trained_label(transaction: Transaction) -> int:
    """The newest label version that both networks of some bundle were trained with; 0 where nobody knows one."""
    segmenter, assessor = Bundle.segmenter_newest_label, Bundle.assessor_newest_label
    earlier = case((segmenter < assessor, segmenter), else_=assessor)
    return transaction.scalar(select(func.max(earlier)).where(segmenter.is_not(None), assessor.is_not(None))) or 0


def set_drift_alarm(transaction: Transaction, number: int, alarm: DriftAlarm | None) -> None:
    """Note the drift alarm that audit draws give now; its beginning and its end are events, all else is none.

    Raises:
        StoreError: if there is no such bundle.
    """
    before = get(transaction, number).drift_alarm
    if alarm == before:
        return
    values = {
        "drift_since": alarm.began_at if alarm is not None else None,
        "drift_structures": list(alarm.structures) if alarm is not None else None,
        "drift_patients": alarm.patients if alarm is not None else None,
    }
    transaction.execute(
        update(Bundle).where(Bundle.id == number).values(values).execution_options(synchronize_session=False)
    )
    transaction.expire_all()
    if before is None and alarm is not None:
        detail: JsonObject = {"structures": list(alarm.structures), "patients": alarm.patients}
        events.record(transaction, events.SERVER, "drift alarm", "bundle", number, detail)
    elif alarm is None:
        events.record(transaction, events.SERVER, "drift alarm ended", "bundle", number)


def drift_alarm(transaction: Transaction) -> DriftAlarm | None:
    """The drift alarm of the bundle that serves; None where there is none."""
    row = transaction.rows(_DRIFT).first()
    return None if row is None else _alarm(*row)


def _alarm(since: dt.datetime | None, structures: list[str] | None, patients: int | None) -> DriftAlarm | None:
    if since is None or structures is None or patients is None:
        return None
    return DriftAlarm(since, tuple(structures), patients)


def serving(transaction: Transaction) -> PublishedBundle | None:
    """The bundle that serves; None before the first one."""
    row = transaction.execute(_SERVING).first()
    return None if row is None else _record(*row)


def serving_number(transaction: Transaction) -> int | None:
    """The number of the bundle that serves; None before the first one."""
    return transaction.rows(assessments.SERVING_BUNDLE).scalar()


def ranked_by(transaction: Transaction) -> str | None:
    """The strategy whose order the estimates' order of the serving bundle is replaced by; None for their own."""
    return transaction.rows(_RANKED_BY).scalar()


def get(transaction: Transaction, number: int) -> PublishedBundle:
    """A bundle by its number.

    Raises:
        StoreError: if there is none.
    """
    row = transaction.execute(_RECORDS.where(Bundle.id == number)).first() if number <= _MAX_NUMBER else None
    if row is None:
        raise StoreError(f"there is no bundle {number}; 'segqc models list FOLDER' shows those that there are")
    return _record(*row)


def listing(transaction: Transaction) -> list[PublishedBundle]:
    """All bundles, oldest first."""
    return [_record(*row) for row in transaction.execute(_RECORDS.order_by(Bundle.id))]


def last_number(transaction: Transaction) -> int:
    """The number of the newest bundle; 0 where there is none."""
    return transaction.scalar(select(func.max(Bundle.id))) or 0


def served_since(transaction: Transaction, time: dt.datetime) -> set[int]:
    """The bundles that served at a time or later."""
    served = select(Event.object_id).where(Event.object_kind == "bundle", Event.verb == _SERVED)
    before = transaction.scalar(served.where(Event.at < time).order_by(Event.id.desc()).limit(1))
    return {*transaction.scalars(served.where(Event.at >= time)), *([] if before is None else [before])}


def _record(row: Bundle, actor: ActorRow) -> PublishedBundle:
    return PublishedBundle(
        bundle=BundleRecord(id=row.id, segmenter_version=row.segmenter_version, assessor_version=row.assessor_version),
        manifest_sha256=row.manifest_sha256,
        parent=row.parent_id,
        reason=row.reason,
        actor=events.actor_of(actor),
        published_at=row.published_at,
        newest_label=row.newest_label,
        is_serving=row.serving,
        ranked_by=row.ranked_by,
        held_because=row.held_because,
        drift_alarm=_alarm(row.drift_since, row.drift_structures, row.drift_patients),
    )
