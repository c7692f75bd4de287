"""The scans as the page lists them: searched, sorted, and a page at a time, in one read of a few milliseconds."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, get_args

from sqlalchemy import ColumnElement, Select, and_, case, func, literal_column, or_, select
from sqlalchemy.orm import aliased

from segqc.store import assessments, labels, pacs
from segqc.store.database import Transaction
from segqc.store.records import Actor, ScanState
from segqc.store.schema import LABELLED_STATES, ActorRow, LabelVersion, LeaseRow, Patient, Scan, Score, SeriesRow
from segqc.types import PredictionInterval

ShownState: TypeAlias = Literal[
    "unlabelled", "in progress", "rejected", "submitted", "approved", "excluded", "missing", "replaced"
]
QueueView: TypeAlias = Literal["open", "in progress", "rejected", "submitted", "approved", "excluded", "missing", "all"]
SortKey: TypeAlias = Literal["dice", "volume", "scan", "patient", "state", "age"]
# written out and not bound: SQLite uses a partial index only where it can read its condition in the query
_IS_OPEN: Final = LeaseRow.state == literal_column("'open'")
_IN_ONE_QUERY: Final = 500
VIEWS: Final[tuple[QueueView, ...]] = get_args(QueueView)
SORT_KEYS: Final[tuple[SortKey, ...]] = get_args(SortKey)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which scans are listed, and how.

    Attributes:
        view: those that wait for a label ("open", handed out or not), those in one state, or all.
        search: a part of the scan's or the patient's name, or of a series' description, whatever its case; empty for
            all.
        sort: what they are sorted by; scans without such a number come last. By "dice", rejected scans come first, as
            they are handed out.
        descending: whether the largest comes first.
        start: how many are left out at the beginning.
        limit: how many are listed at most; None for all.
    """

    view: QueueView = "open"
    search: str = ""
    sort: SortKey = "dice"
    descending: bool = False
    start: int = 0
    limit: int | None = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLease:
    """To whom a scan is handed out, and until when."""

    actor: Actor
    expires_at: dt.datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedScan:
    """A scan as it is listed.

    Attributes:
        name, patient: what it is called, and whose it is.
        title: what people call it, see `pacs.title`.
        state: as people are told; `reason` is why it was rejected or excluded.
        dice, interval: the estimate that it is ranked by; None without one.
        error_volume_ml: the estimated volume of the errors; None without an assessment.
        assessment: the number of this assessment.
        since: when it began to wait, or, where it has a final label, when that came.
        leases: to whom it is handed out.
    """

    name: str
    title: str
    patient: str
    state: ShownState
    reason: str | None
    dice: float | None
    interval: PredictionInterval | None
    error_volume_ml: float | None
    assessment: int | None
    since: dt.datetime
    leases: tuple[OpenLease, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuePage:
    """A part of the scans that are wanted, and how many these are."""

    scans: tuple[QueuedScan, ...]
    total: int


@dataclass(frozen=True, slots=True)
class QueueCounts:
    """How many scans each view lists."""

    by_view: Mapping[QueueView, int] = field(default_factory=dict)

    def __getitem__(self, view: QueueView) -> int:
        """The number of one view."""
        return self.by_view.get(view, 0)


def page(transaction: Transaction, wanted: Wanted, *, volume_score: str) -> QueuePage:
    """List a part of the scans.

    Args:
        transaction: what to read in.
        wanted: which ones.
        volume_score: the method whose score is minus the volume of the errors.
    """
    chosen = select(Scan.id).where(_condition(wanted.view, transaction.now))
    if wanted.search or wanted.sort == "patient":
        chosen = chosen.join(Patient, Scan.patient_id == Patient.id).where(*_search(wanted.search))
    total = transaction.scalar(select(func.count()).select_from(chosen.subquery())) or 0
    ordered = _ordered(chosen, wanted, volume_score).offset(wanted.start)
    numbers = list(transaction.scalars(ordered if wanted.limit is None else ordered.limit(wanted.limit)))
    found = {row.id: row for row in _in_parts(transaction, _details(volume_score), numbers)}
    held = _leases(transaction, numbers)
    judged = [row.assessment for row in found.values() if row.assessment is not None]
    intervals = assessments.dice_intervals(transaction, judged)
    return QueuePage(
        scans=tuple(
            QueuedScan(
                name=row.name,
                title=pacs.title(row.name, row.patient, row.series_uid, row.description),
                patient=row.patient,
                state=shown_state(row.state, row.missing_since, row.former_name, is_held=number in held),
                reason=row.reason,
                dice=row.ranking_dice,
                interval=intervals.get(row.assessment) if row.assessment is not None else None,
                error_volume_ml=None if row.score is None else -row.score,
                assessment=row.assessment,
                since=row.since,
                leases=tuple(held.get(number, ())),
            )
            for number in numbers
            if (row := found.get(number)) is not None
        ),
        total=total,
    )


def counts(transaction: Transaction) -> QueueCounts:
    """How many scans each view lists."""
    there = and_(Scan.former_name.is_(None), Scan.missing_since.is_(None))
    query = select(Scan.state, func.count()).where(there).group_by(Scan.state)
    of_state: dict[ScanState, int] = {state: count for state, count in transaction.execute(query)}
    handed_out = select(func.count()).select_from(Scan).where(_condition("in progress", transaction.now))
    missing = select(func.count()).select_from(Scan).where(_condition("missing", transaction.now))
    return QueueCounts(
        {
            "open": of_state.get("unlabelled", 0) + of_state.get("rejected", 0),
            "in progress": transaction.scalar(handed_out) or 0,
            "rejected": of_state.get("rejected", 0),
            "submitted": of_state.get("submitted", 0),
            "approved": of_state.get("approved", 0),
            "excluded": of_state.get("excluded", 0),
            "missing": transaction.scalar(missing) or 0,
            "all": sum(of_state.values()),
        }
    )


def shown_state(
    state: ScanState, missing_since: dt.datetime | None, former_name: str | None, *, is_held: bool
) -> ShownState:
    """The state of a scan as people are told."""
    if former_name is not None:
        return "replaced"
    if missing_since is not None:
        return "missing"
    return "in progress" if is_held else state


def _is_held(now: dt.datetime) -> ColumnElement[bool]:
    # few scans are: they are looked up, and not the leases of all scans
    return Scan.id.in_(select(LeaseRow.scan_id).where(_IS_OPEN, LeaseRow.expires_at > now))


def _condition(view: QueueView, now: dt.datetime) -> ColumnElement[bool]:
    there = and_(Scan.former_name.is_(None), Scan.missing_since.is_(None))
    if view == "all":
        return there
    if view == "open":
        return Scan.queue.is_not(None)
    if view == "in progress":
        return and_(there, _is_held(now))
    if view == "missing":
        return Scan.missing_since.is_not(None)
    return and_(there, Scan.state == view)


def _search(text: str) -> list[ColumnElement[bool]]:
    if not text:
        return []
    described = select(SeriesRow.file).where(SeriesRow.description.icontains(text, autoescape=True))
    return [
        or_(
            Scan.name.icontains(text, autoescape=True),
            Patient.name.icontains(text, autoescape=True),
            Scan.file.in_(described),
        )
    ]


def _ordered(chosen: Select[int], wanted: Wanted, volume_score: str) -> Select[int]:
    by: dict[SortKey, ColumnElement[Any]] = {
        "dice": Scan.ranking_dice.expression,
        "scan": Scan.sort_key.expression,
        "patient": Patient.name.expression,
        "state": Scan.state.expression,
    }
    if wanted.sort == "volume":
        key: ColumnElement[Any] = -_volume_score(volume_score)
    elif wanted.sort == "age":
        key = _since()
    else:
        key = by[wanted.sort]
    # the longest age is the earliest time
    falls = wanted.descending != (wanted.sort == "age")
    first = [Scan.state != "rejected"] if wanted.sort == "dice" and not falls else []
    return chosen.order_by(*first, key.is_(None), key.desc() if falls else key, Scan.sort_key)


def _volume_score(method: str) -> ColumnElement[float | None]:
    counting = Score.scan_id == Scan.id, Score.method == method, assessments.SCORE_COUNTS
    return select(Score.value).where(*counting).correlate(Scan).scalar_subquery()


def _since() -> ColumnElement[dt.datetime]:
    made = aliased(LabelVersion)
    final = select(made.made_at).where(made.id == labels.FINAL_OF_SCAN).correlate(Scan).scalar_subquery()
    return func.coalesce(case((Scan.state.in_(LABELLED_STATES), final)), Scan.opened_at)


def _details(volume_score: str) -> Select[*tuple[Any, ...]]:
    return select(
        Scan.id, Scan.name, Patient.name.label("patient"), Scan.state, Scan.reason, Scan.ranking_dice,
        SeriesRow.series_uid, SeriesRow.description,
        Scan.missing_since, Scan.former_name, _since().label("since"), _volume_score(volume_score).label("score"),
        assessments.latest_number(labels.START_OF_SCAN).correlate(Scan).scalar_subquery().label("assessment"),
    ).join(Patient, Scan.patient_id == Patient.id).outerjoin(SeriesRow, SeriesRow.file == Scan.file)  # fmt: skip


def _leases(transaction: Transaction, numbers: Sequence[int]) -> dict[int, list[OpenLease]]:
    query = (
        select(LeaseRow.scan_id, LeaseRow.expires_at, ActorRow.kind, ActorRow.name, ActorRow.identified_by)
        .join(ActorRow, LeaseRow.actor_id == ActorRow.id)
        .join(Scan, LeaseRow.scan_id == Scan.id)
        .where(_IS_OPEN, LeaseRow.expires_at > transaction.now)
        .order_by(LeaseRow.slot)
    )
    found: dict[int, list[OpenLease]] = {}
    for row in _in_parts(transaction, query, numbers):
        actor = Actor(kind=row.kind, name=row.name, identified_by=row.identified_by)
        found.setdefault(row.scan_id, []).append(OpenLease(actor=actor, expires_at=row.expires_at))
    return found


def _in_parts(transaction: Transaction, query: Select[*tuple[Any, ...]], numbers: Sequence[int]) -> list[Any]:
    """The rows of a query of some scans, by their numbers."""
    return [
        row
        for start in range(0, len(numbers), _IN_ONE_QUERY)
        for row in transaction.execute(query.where(Scan.id.in_(numbers[start : start + _IN_ONE_QUERY])))
    ]
