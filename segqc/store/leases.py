"""Leases: a scan is handed out to one annotator for a while, so that no two work on the same one unknowingly."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    String,
    and_,
    bindparam,
    case,
    exists,
    func,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.orm import aliased

from segqc.store import assessments, events, labels, orders, pseudo_labels, scans
from segqc.store.database import Parameters, StoreError, Transaction
from segqc.store.orders import Choice, Order, Waiting
from segqc.store.records import Actor, Cost, Draw, JsonObject, LeaseRecord, LeaseState
from segqc.store.schema import ActorRow, Event, LabelVersion, LeaseRow, Scan, UtcDateTime

# written out and not bound: SQLite uses a partial index only where it can read its condition in the query
_OPEN: ColumnElement[str] = literal_column("'open'", String)
_EXPLAINED: Final = "skip explained"  # the event of a reason that is given later
_MAX_MINUTES: Final = 366 * 24 * 60  # of a lease: a year
_MAX_ATTENTION_CHECKS: Final = 0.2  # whoever expects an error in each mask works otherwise


@dataclass(frozen=True, slots=True)
class LeaseRules:
    """How scans are handed out; the table ``[annotation]`` of the settings.

    Attributes:
        lease_minutes: after that long without a submission a scan goes back into the queue.
        cookie_lease_minutes: the same, for clients that are known by a browser's cookie only.
        repeat_seconds: a second request within that time gets the same scan; a later one skips it.
        skip_hours: for that long a skipped scan is not offered again to whoever skipped it, if there is another.
        audit_share: share of the suggestions that are drawn uniformly at random from all waiting scans.
        validation_share: share of the suggestions that are scans of validating patients, drawn likewise.
        readers: how many annotators label each scan.
        seed: of the random draws.
        approved_version_is_final: whether a version that a reviewer approves in MONAI Label's Reviewer
            (``version_1``, ...) becomes the final label.
        slices: how many slices of a scan that the strategy chose are asked for, those with the most likely errors; 0
            for whole scans. Audits, validation scans and scans without an assessment are always asked for as a whole.
        check_submissions: whether SegQC-Net checks what a person has submitted, and says where to look again.
        attention_checks: share of the network's masks that are handed out with a planted error.
    """

    lease_minutes: float = 240.0
    cookie_lease_minutes: float = 30.0
    repeat_seconds: float = 30.0
    skip_hours: float = 24.0
    audit_share: float = 0.10
    validation_share: float = 0.15
    readers: int = 1
    seed: int = 0
    approved_version_is_final: bool = True
    slices: int = 0
    check_submissions: bool = True
    attention_checks: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        shares = (self.audit_share, self.validation_share)
        if not all(0 <= share <= 1 for share in shares) or sum(shares) > 1:
            raise ValueError("audit_share and validation_share must be 0 or more and together 1 at most")
        if not all(0 < minutes <= _MAX_MINUTES for minutes in (self.lease_minutes, self.cookie_lease_minutes)):
            raise ValueError(f"lease_minutes and cookie_lease_minutes must be above 0 and at most {_MAX_MINUTES}")
        if not (0 <= self.repeat_seconds <= 60 * _MAX_MINUTES and 0 <= self.skip_hours <= _MAX_MINUTES / 60):
            raise ValueError("repeat_seconds and skip_hours must be 0 or more and at most a year")
        if not 1 <= self.readers <= 100 or self.seed < 0:
            raise ValueError("readers must be from 1 to 100, and seed 0 or more")
        if self.slices < 0:
            raise ValueError("slices must be 0 or more")
        if not 0 <= self.attention_checks <= _MAX_ATTENTION_CHECKS:
            raise ValueError(f"attention_checks must be from 0 to {_MAX_ATTENTION_CHECKS}")


def acquire(
    transaction: Transaction,
    actor: Actor,
    strategy: str,
    order: Order,
    rules: LeaseRules,
    *,
    skip_reason: str | None = None,
    pseudo_audits: bool = True,
) -> LeaseRecord | None:
    """Hand out the next scan to an annotator; None where no scan is left for this one.

    An annotator has one open lease. Asked again soon, the answer is the same scan; asked later, or with a reason to
    skip it, the scan is released as skipped (`skipped_for` tells). Scans whose label a reviewer has rejected come
    before all others. An audit draw is taken from all waiting scans, a validation draw from those of validating
    patients, and the strategy chooses among those of training patients (method, "Leaks": scans chosen worst-first are a
    biased sample). Audits of pseudo-labels come before its choices, unless ``pseudo_audits`` is false, as where
    pseudo-labels are turned off.
    """
    actor_id = events.actor_id(transaction, actor)
    overdue, held, last = transaction.rows(_STANDING, {"actor": actor_id, "now": transaction.now}).one()
    if overdue is not None:
        expire(transaction)
        held = transaction.rows(_OPEN_OF, {"actor": actor_id}).scalar()
    if held is not None:
        mine = transaction.get_one(LeaseRow, held)
        scan = transaction.get_one(Scan, mine.scan_id)
        if scan.queue is None:
            _close(transaction, mine, "released", actor)  # labelled or excluded by another way meanwhile
        elif skip_reason is None and (transaction.now - mine.handed_out_at).total_seconds() <= rules.repeat_seconds:
            return get(transaction, mine.id)
        else:
            _close(transaction, mine, "skipped", actor, skip_reason)
        transaction.flush()
    rng = np.random.default_rng((rules.seed, last or 0))
    chosen = _choose(transaction, actor_id, order, rules, rng, pseudo_audits=pseudo_audits)
    if chosen is None:
        return None
    draw, probability, choice = chosen
    return _open(transaction, actor, actor_id, strategy, draw, probability, choice, rules)


Pool: TypeAlias = Literal["anyone", "train", "validation", "pseudo-audit", "rejected"]


_POOLS: Final[Mapping[Pool, ColumnElement[bool]]] = {
    "anyone": Scan.queue.is_not(None),
    "train": Scan.queue == "train",
    "validation": Scan.queue == "validation",
    "pseudo-audit": pseudo_labels.is_to_be_audited(),
    "rejected": and_(Scan.state == "rejected", Scan.queue.is_not(None)),
}


def _choose(
    transaction: Transaction,
    actor_id: int,
    order: Order,
    rules: LeaseRules,
    rng: np.random.Generator,
    *,
    pseudo_audits: bool,
) -> tuple[Draw, float | None, Choice] | None:
    """Draw the kind of suggestion, then the scan; what was skipped lately only where nothing else is left."""
    lot = rng.random()
    # somebody waits for it
    wanted: list[tuple[Draw, float | None, Order, Pool]] = [("rejected", None, _own_first, "rejected")]
    if lot < rules.audit_share:
        wanted.append(("audit", rules.audit_share, orders.uniform, "anyone"))
    elif lot < rules.audit_share + rules.validation_share:
        wanted.append(("validation", rules.validation_share, orders.uniform, "validation"))
    # few, and before all others: they tell what the others are worth
    if pseudo_audits and pseudo_labels.has_audits(transaction):
        wanted.append(("pseudo-audit", 1.0, orders.uniform, "pseudo-audit"))
    wanted.append(("strategy", None, order, "train"))
    wanted.append(("validation", 1.0, orders.uniform, "validation"))  # nothing else is left
    skipped_since = transaction.now - dt.timedelta(hours=rules.skip_hours)
    parameters: Parameters = {"actor": actor_id, "skipped_since": skipped_since, "readers": rules.readers}
    for lately_skipped in (False, True):
        for draw, probability, pick, pool in wanted:
            waiting = _waiting(pool, several_readers=rules.readers > 1, lately_skipped=lately_skipped)
            choice = pick(transaction, waiting, parameters, rng)
            if choice is not None:
                return draw, probability, choice
    return None


def _own_first(
    transaction: Transaction, waiting: Waiting, parameters: Parameters, rng: np.random.Generator
) -> Choice | None:
    """The rejected scan that has waited longest, of those whose label the annotator has made where there are any."""
    found = transaction.scalar(_rejected(waiting), parameters)
    return None if found is None else Choice(found)


@functools.cache
def _rejected(waiting: Waiting) -> Select[int]:
    returned, rejected = aliased(LabelVersion), aliased(LabelVersion)
    maker = (
        select(rejected.actor_id)
        .join(returned, returned.parent_id == rejected.id)
        .where(returned.id == labels.START_OF_SCAN)
        .correlate(Scan)
        .scalar_subquery()
    )
    is_anothers = case((maker == bindparam("actor"), 0), else_=1)
    return select(Scan.id).where(waiting.pool, *waiting.free).order_by(is_anothers, Scan.opened_at, Scan.id).limit(1)


@functools.cache
def _waiting(pool: Pool, *, several_readers: bool, lately_skipped: bool) -> Waiting:
    """The scans of a pool with a free reader's place, and nothing on them of whoever asks (the parameter "actor")."""
    lease = aliased(LeaseRow)
    held = and_(lease.scan_id == Scan.id, lease.state == _OPEN)
    own = and_(lease.scan_id == Scan.id, lease.actor_id == bindparam("actor"))
    free: list[ColumnElement[bool]]
    if several_readers:
        reading = select(func.count()).where(held).scalar_subquery()
        read = exists().where(own, lease.state == "submitted", lease.closed_at >= Scan.opened_at)
        free = [Scan.readings + reading < bindparam("readers"), ~read]
    else:
        free = [~exists().where(held)]
    if not lately_skipped:
        since = bindparam("skipped_since", type_=UtcDateTime())
        free.append(~exists().where(own, lease.state == "skipped", lease.closed_at > since))
    return Waiting(_POOLS[pool], tuple(free))


def _open(
    transaction: Transaction,
    actor: Actor,
    actor_id: int,
    strategy: str,
    draw: Draw,
    probability: float | None,
    choice: Choice,
    rules: LeaseRules,
) -> LeaseRecord:
    begun = _begin(transaction, choice.scan_id, actor, rules)
    lease = LeaseRecord(
        id=0,
        scan=begun.scan,
        actor=actor,
        slot=begun.slot,
        state="open",
        handed_out_at=transaction.now,
        expires_at=begun.expires_at,
        closed_at=None,
        strategy=choice.order or strategy,
        score=choice.score if draw == "strategy" else begun.ranking_dice,
        draw=draw,
        probability=probability,
        pool=choice.pool,
        label_version=begun.label_version_id,
        assessment=begun.assessment_id,
        slices=_asked_slices(transaction, draw, begun, rules),
    )
    number = transaction.insert(
        LeaseRow,
        scan_id=choice.scan_id,
        actor_id=actor_id,
        state=lease.state,
        slot=lease.slot,
        handed_out_at=lease.handed_out_at,
        expires_at=lease.expires_at,
        strategy=lease.strategy,
        score=lease.score,
        draw=lease.draw,
        probability=lease.probability,
        pool=lease.pool,
        label_version_id=lease.label_version,
        assessment_id=lease.assessment,
        slices=None if lease.slices is None else list(lease.slices),
    )
    events.record(transaction, actor, "handed out", "scan", choice.scan_id, {"lease": number})
    return replace(lease, id=number)


@dataclass(frozen=True, slots=True)
class _Begun:
    """A lease that begins: its place among the scan's readers, its end, and the current mask with its estimate."""

    scan: str
    ranking_dice: float | None
    slot: int
    expires_at: dt.datetime
    label_version_id: int | None
    assessment_id: int | None


def _begin(transaction: Transaction, scan_id: int, actor: Actor, rules: LeaseRules) -> _Begun:
    # whoever labels a scan alone has got it because nobody else holds it
    taken = set(transaction.rows(_SLOTS, {"scan": scan_id}).scalars()) if rules.readers > 1 else set()
    shown = transaction.rows(_SHOWN, {"scan": scan_id}).one()
    minutes = rules.cookie_lease_minutes if actor.identified_by == "cookie" else rules.lease_minutes
    return _Begun(
        shown.name,
        shown.ranking_dice,
        next(i for i in range(len(taken) + 1) if i not in taken),
        transaction.now + dt.timedelta(minutes=minutes),
        shown.start,
        shown.assessment,
    )


def _asked_slices(transaction: Transaction, draw: Draw, begun: _Begun, rules: LeaseRules) -> tuple[int, ...] | None:
    """The slices that an annotator is asked for, ascending; None for the whole scan.

    What was rejected or reopened is asked for as a whole: somebody wants to have it done.
    """
    if not rules.slices or draw != "strategy" or begun.assessment_id is None or begun.label_version_id is None:
        return None
    assessment = assessments.read(transaction, begun.assessment_id)
    if assessment is None or labels.get(transaction, begun.label_version_id).tag == labels.RETURNED:
        return None
    worst = assessment.worst_slices(rules.slices)
    return tuple(sorted(worst)) if 0 < len(worst) < assessment.shape[assessment.through_plane_axis] else None


def skipped_for(transaction: Transaction, lease: LeaseRecord) -> LeaseRecord | None:
    """The lease that was put aside as skipped when this one was handed out, if there was one."""
    row = transaction.rows(_SKIPPED_AT, {"closed_at": lease.handed_out_at, **_named(lease.actor)}).first()
    return _record(row) if row is not None else None


def skip(transaction: Transaction, scan: str, actor: Actor, reason: str) -> LeaseRecord:
    """Put a scan aside for an annotator who says why, or note why it was put aside before.

    Raises:
        UnknownScan: if there is no such scan.
        StoreError: if the annotator neither has nor skipped it.
    """
    row = _last(transaction, scan, actor)
    if row.state == "open":
        _close(transaction, row, "skipped", actor, reason)
    elif row.state == "skipped":
        events.record(transaction, actor, _EXPLAINED, "scan", row.scan_id, {"lease": row.id, "reason": reason})
    else:
        raise StoreError(f"the scan {scan!r} was not skipped by {actor.name!r}: its lease is {row.state}")
    transaction.flush()
    return get(transaction, row.id)


def resume(transaction: Transaction, scan: str, actor: Actor, rules: LeaseRules) -> LeaseRecord:
    """Hand a scan out again to an annotator who had it and did not submit it; what this one has instead is released.

    It stays the same lease, with the draw that it came by: one draw is one lease. Who has submitted the scan gets it
    again, with a lease of its own, where a reviewer has rejected or reopened it since: it waits for its correction.

    Raises:
        UnknownScan: if there is no such scan.
        StoreError: if the annotator never had it, has submitted it, or it is no longer waiting or free.
    """
    expire(transaction)
    row = _last(transaction, scan, actor)
    if row.state == "open":
        return get(transaction, row.id)
    there = transaction.get_one(Scan, row.scan_id)
    is_answered = row.state == "submitted"
    if is_answered and row.closed_at is not None and row.closed_at >= there.opened_at:
        raise StoreError(f"the scan {scan!r} was submitted by {actor.name!r} already")
    if there.queue is None:
        raise StoreError(f"the scan {scan!r} does not wait for a label any more")
    waiting = _waiting("anyone", several_readers=rules.readers > 1, lately_skipped=True)
    is_free = select(Scan.id).where(Scan.id == row.scan_id, *waiting.free)
    if transaction.scalar(is_free, {"actor": row.actor_id, "readers": rules.readers}) is None:
        raise StoreError(f"the scan {scan!r} is handed out to another annotator by now")
    mine = LeaseRow.actor_id == row.actor_id, LeaseRow.state == _OPEN
    for other in transaction.scalars(select(LeaseRow).where(*mine)).all():
        _close(transaction, other, "released", actor)
    transaction.flush()
    if is_answered:
        again = Choice(row.scan_id)
        draw: Draw = "rejected" if there.state == "rejected" else "strategy"
        return _open(transaction, actor, row.actor_id, row.strategy, draw, None, again, rules)
    begun = _begin(transaction, row.scan_id, actor, rules)
    row.state, row.handed_out_at, row.closed_at = "open", transaction.now, None
    row.slot, row.expires_at = begun.slot, begun.expires_at
    row.label_version_id, row.assessment_id = begun.label_version_id, begun.assessment_id
    asked = _asked_slices(transaction, row.draw, begun, rules)
    row.slices = None if asked is None else list(asked)
    transaction.flush()
    events.record(transaction, actor, "resumed", "scan", row.scan_id, {"lease": row.id})
    return get(transaction, row.id)


def _last(transaction: Transaction, scan: str, actor: Actor) -> LeaseRow:
    """The last lease of a scan to an annotator."""
    wanted = scans.number_of(transaction, scan), events.actor_id(transaction, actor)
    query = select(LeaseRow).where(LeaseRow.scan_id == wanted[0], LeaseRow.actor_id == wanted[1])
    row = transaction.scalar(query.order_by(LeaseRow.id.desc()).limit(1))
    if row is None:
        raise StoreError(f"the scan {scan!r} was never handed out to {actor.name!r}")
    return row


def expire(transaction: Transaction) -> int:
    """Take back all leases whose time is over; returns how many."""
    over = transaction.rows(_OVER, {"now": transaction.now}).scalars().all()
    for number in over:
        _close(transaction, transaction.get_one(LeaseRow, number), "expired", events.SERVER)
    if over:
        transaction.flush()
    return len(over)


def _close(transaction: Transaction, row: LeaseRow, state: LeaseState, actor: Actor, reason: str | None = None) -> None:
    row.state, row.closed_at = state, transaction.now
    detail: JsonObject = {"lease": row.id, **({"reason": reason} if reason is not None else {})}
    events.record(transaction, actor, state, "scan", row.scan_id, detail)


def submitted(transaction: Transaction, lease: LeaseRecord) -> LeaseRecord | None:
    """Close the lease that an annotator's submission answers; None if it was answered before.

    A submission after its lease has ended is as good: the scan was handed out to this annotator, with that estimate.
    """
    if not transaction.change(_SUBMITTED, {"lease": lease.id, "closed_at": transaction.now}):
        return None
    transaction.change(_READ_ONCE_MORE, {"scan": lease.scan})
    return replace(lease, state="submitted", closed_at=transaction.now)


def last_of(transaction: Transaction, scan: str, actor: Actor) -> LeaseRecord | None:
    """The last hand-out of a scan to an annotator that was not answered yet, whether its lease is over or not.

    Raises:
        ScanReplaced: if the scan's file has another content now than the one that was handed out.
    """
    rows = transaction.rows(_LAST_OF, {"scan": scan, **_named(actor)}).all()
    if rows and rows[0].former_name is not None and rows[0].state not in ("submitted", "skipped"):
        at = f"it was handed out to you ({rows[0].handed_out_at:%Y-%m-%d %H:%M} UTC)"
        raise scans.ScanReplaced(scans.drawn_on_another(scan, at))
    last = next((row for row in rows if row.scan == scan), None)
    return None if last is None or last.state == "submitted" else _record(last)


def answered(transaction: Transaction, scan: str, actor: Actor) -> LeaseRecord | None:
    """The last lease of a scan that an annotator has answered since the scan waits, or waited, for its label."""
    row = transaction.rows(_ANSWERED, {"scan": scan, **_named(actor)}).first()
    return None if row is None else _record(row)


def _named(actor: Actor) -> dict[str, str]:
    """The parameters of `_IS`."""
    return {"kind": actor.kind, "name": actor.name, "identified_by": actor.identified_by}


def held_by(transaction: Transaction, actor: Actor) -> LeaseRecord | None:
    """The open lease of an annotator whose time is not over; None without one."""
    row = transaction.rows(_HELD_BY, {"now": transaction.now, **_named(actor)}).first()
    return None if row is None else _record(row)


def release(transaction: Transaction, scan: str, actor: Actor) -> int:
    """Take back all open leases of a scan; returns how many."""
    rows = transaction.scalars(
        select(LeaseRow).join(Scan, LeaseRow.scan_id == Scan.id).where(Scan.name == scan, LeaseRow.state == _OPEN)
    ).all()
    for row in rows:
        _close(transaction, row, "released", actor)
    return len(rows)


def get(transaction: Transaction, lease: int) -> LeaseRecord:
    """A lease by its number."""
    return _record(transaction.rows(_LEASE, {"lease": lease}).one())


def listing(transaction: Transaction, *, state: LeaseState | None = None, scan: str | None = None) -> list[LeaseRecord]:
    """All leases, those in a state (open: and not over), or those of a scan, oldest first."""
    query = _leases().order_by(LeaseRow.id)
    if state is not None:
        query = query.where(LeaseRow.state == state)
    if state == "open":
        query = query.where(LeaseRow.expires_at > transaction.now)  # whose time is over is taken back at the next take
    if scan is not None:
        query = query.where(Scan.name == scan)
    return [_record(row) for row in transaction.rows(query)]


def skip_reasons(transaction: Transaction) -> dict[int, str]:
    """Why scans were put aside, by lease, the last word of each annotator who gave one."""
    query = select(Event.detail).where(Event.object_kind == "scan", Event.verb.in_(("skipped", _EXPLAINED)))
    reasons: dict[int, str] = {}
    for detail in transaction.scalars(query.order_by(Event.id)):
        if detail is not None and isinstance(lease := detail.get("lease"), int) and "reason" in detail:
            reasons[lease] = str(detail["reason"])
    return reasons


def costs(transaction: Transaction) -> list[Cost]:
    """What annotation has cost, by what scans were chosen by: audit draws and validation scans are work, too."""
    query = select(LeaseRow.draw, LeaseRow.state, LeaseRow.handed_out_at, LeaseRow.closed_at)
    rows = transaction.execute(query).all()
    found = []
    for draw in get_args(Draw):
        own = [row for row in rows if row.draw == draw]
        done = [row for row in own if row.state == "submitted" and row.closed_at is not None]
        seconds = sum((row.closed_at - row.handed_out_at).total_seconds() for row in done)
        skipped = sum(row.state == "skipped" for row in own)
        found.append(Cost(draw=draw, handed_out=len(own), submitted=len(done), skipped=skipped, hours=seconds / 3600))
    return found


def _leases() -> Select[*tuple[Any, ...]]:
    """The fields of a LeaseRecord."""
    lease = LeaseRow
    return (
        select(
            lease.id, Scan.name.label("scan"), ActorRow.kind, ActorRow.name.label("actor_name"),
            ActorRow.identified_by, lease.slot,
            lease.state, lease.handed_out_at, lease.expires_at, lease.closed_at, lease.strategy, lease.score,
            lease.draw, lease.probability, lease.pool, lease.label_version_id, lease.assessment_id, lease.slices,
        )
        .join(Scan, lease.scan_id == Scan.id)
        .join(ActorRow, lease.actor_id == ActorRow.id)
    )  # fmt: skip


# built once: building a query takes longer than running it
_OPEN_OF: Final = select(LeaseRow.id).where(LeaseRow.actor_id == bindparam("actor"), LeaseRow.state == _OPEN)
_SHOWN: Final = select(
    Scan.name,
    Scan.ranking_dice,
    labels.START_OF_SCAN.label("start"),
    assessments.latest_number(labels.START_OF_SCAN).correlate(Scan).scalar_subquery().label("assessment"),
).where(Scan.id == bindparam("scan"))
_SUBMITTED: Final = (
    update(LeaseRow)
    .where(LeaseRow.id == bindparam("lease"), LeaseRow.state != "submitted")
    .values(state="submitted", closed_at=bindparam("closed_at"))
)
_READ_ONCE_MORE: Final = update(Scan).where(Scan.name == bindparam("scan")).values(readings=Scan.readings + 1)
_SLOTS: Final = select(LeaseRow.slot).where(LeaseRow.scan_id == bindparam("scan"), LeaseRow.state == _OPEN)
_OVER: Final = select(LeaseRow.id).where(
    LeaseRow.state == _OPEN, LeaseRow.expires_at <= bindparam("now", type_=UtcDateTime())
)
# whether the time of some lease is over, the actor's open lease, and the last lease of all
_STANDING: Final = select(
    _OVER.limit(1).scalar_subquery(),
    _OPEN_OF.scalar_subquery(),
    select(func.max(LeaseRow.id)).scalar_subquery(),
)
_LEASE: Final = _leases().where(LeaseRow.id == bindparam("lease"))
_IS: Final = and_(
    ActorRow.kind == bindparam("kind"),
    ActorRow.name == bindparam("name"),
    ActorRow.identified_by == bindparam("identified_by"),
)
_SKIPPED_AT: Final = (
    _leases()
    .where(_IS, LeaseRow.state == "skipped", LeaseRow.closed_at == bindparam("closed_at", type_=UtcDateTime()))
    .order_by(LeaseRow.id.desc())
    .limit(1)
)
_HELD_BY: Final = _leases().where(
    _IS, LeaseRow.state == _OPEN, LeaseRow.expires_at > bindparam("now", type_=UtcDateTime()), Scan.queue.is_not(None)
)
_ANSWERED: Final = (
    _leases()
    .where(Scan.name == bindparam("scan"), _IS, LeaseRow.state == "submitted", LeaseRow.closed_at >= Scan.opened_at)
    .order_by(LeaseRow.id.desc())
    .limit(1)
)
_LAST_OF: Final = (
    _leases()
    .add_columns(Scan.former_name)
    .where(or_(Scan.name == bindparam("scan"), Scan.former_name == bindparam("scan")), _IS)
    .order_by(LeaseRow.id.desc())
)


def _record(row: Row[*tuple[Any, ...]]) -> LeaseRecord:
    return LeaseRecord(
        id=row.id,
        scan=row.scan,
        actor=Actor(kind=row.kind, name=row.actor_name, identified_by=row.identified_by),
        slot=row.slot,
        state=row.state,
        handed_out_at=row.handed_out_at,
        expires_at=row.expires_at,
        closed_at=row.closed_at,
        strategy=row.strategy,
        score=row.score,
        draw=row.draw,
        probability=row.probability,
        pool=row.pool,
        label_version=row.label_version_id,
        assessment=row.assessment_id,
        slices=None if row.slices is None else tuple(row.slices),
    )
