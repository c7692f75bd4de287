"""The rounds of a folder as a table: what each was made of, what came of it, and why it began."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from segqc.loop.due import masks_of
from segqc.loop.requests import NETWORKS, TrackedRun, train_result_of, training_step
from segqc.settings import NetworkName
from segqc.store import bundles, corrections, jobs, rounds
from segqc.store.database import Transaction
from segqc.store.records import Actor, CheckedEstimate, JobRecord, JobState, PublishedBundle, RoundRecord

BundleState: TypeAlias = Literal["serves", "served", "held"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSummary:
    """One round, or a job that has not begun one.

    Attributes:
        number: the round's number; None before it has begun.
        actor: who asked for it.
        reason: why it began where nobody asked for it.
        put_at, started_at, ended_at: when it was put, began, and ended, in whatever state; None before that.
        state: of its job.
        labelled: scans with a final label, when it began.
        pseudo_labels: how many of these trained; None before that.
        validation_dice: of its masks of the validation scans, the mean over structures.
        audited: scans that were audit draws, and shown with its estimates.
        audit_error: how far the estimated Dice of these was off, on average, of each scan's worst structure.
        bundle: the number of its bundle.
        bundle_state: what became of its bundle; "served" where another one serves by now.
        held_because: why its bundle is held.
        problem: why it failed.
        tracked: the runs of its trainings in MLflow.
    """

    number: int | None
    actor: Actor
    reason: str | None
    put_at: dt.datetime
    started_at: dt.datetime | None
    ended_at: dt.datetime | None
    state: JobState
    labelled: int | None = None
    pseudo_labels: int | None = None
    validation_dice: float | None = None
    audited: int = 0
    audit_error: float | None = None
    bundle: int | None = None
    bundle_state: BundleState | None = None
    held_because: str | None = None
    problem: str | None = None
    tracked: Mapping[NetworkName, TrackedRun] = field(default_factory=dict)

    @property
    def minutes(self) -> float | None:
        """How long it took, pauses after a kill included; None before its end."""
        if self.started_at is None or self.ended_at is None:
            return None
        return (self.ended_at - self.started_at).total_seconds() / 60


def summaries(transaction: Transaction, *, simulated: bool = False) -> list[RoundSummary]:
    """All rounds, oldest first, and the jobs that have not begun one yet, or ended before they did.

    Args:
        transaction: what to read in.
        simulated: whether a simulated annotator's audits are wanted, instead of people's.
    """
    begun = {record.job.id: record for record in rounds.listing(transaction)}
    published = {p.bundle.id: p for p in bundles.listing(transaction)}
    audits = _by_pair(corrections.audited(transaction, simulated=simulated))
    found = {job.id: _not_begun(job) for job in jobs.listing(transaction, "round") if job.id not in begun}
    for number, record in begun.items():
        bundle = published[record.bundle] if record.bundle is not None else None
        pair = (bundle.bundle.segmenter_version, bundle.bundle.assessor_version) if bundle is not None else None
        found[number] = _begun(record, bundle, audits.get(pair, []) if pair is not None else [])
    return [found[number] for number in sorted(found)]


_Pair: TypeAlias = tuple[str | None, str | None]


def _by_pair(audits: Sequence[CheckedEstimate]) -> dict[_Pair, list[CheckedEstimate]]:
    """Audits by the networks that made and assessed the mask: a bundle with these networks showed them."""
    found: dict[_Pair, list[CheckedEstimate]] = defaultdict(list)
    for audit in audits:
        found[audit.segmenter_version, audit.assessor_version].append(audit)
    return found


def _not_begun(job: JobRecord) -> RoundSummary:
    return RoundSummary(
        number=None,
        actor=job.actor,
        reason=job.reason,
        put_at=job.enqueued_at,
        started_at=None,
        ended_at=job.ended_at,
        state=job.state,
        problem=_problem(job),
    )


def _begun(record: RoundRecord, bundle: PublishedBundle | None, audits: Sequence[CheckedEstimate]) -> RoundSummary:
    errors = _errors(audits)
    trained = masks_of(record)
    return RoundSummary(
        number=record.number,
        actor=record.job.actor,
        reason=record.job.reason,
        put_at=record.job.enqueued_at,
        started_at=record.started_at,
        ended_at=record.ended_at or record.job.ended_at,
        state=record.job.state,
        labelled=record.labelled,
        pseudo_labels=trained.pseudo_labels if trained is not None else None,
        validation_dice=trained.scores.get("dice") if trained is not None else None,
        audited=len(errors),
        audit_error=sum(errors) / len(errors) if errors else None,
        bundle=record.bundle,
        bundle_state=_state(bundle) if bundle is not None else None,
        held_because=bundle.held_because if bundle is not None else None,
        problem=_problem(record.job),
        tracked=_tracked(record),
    )


def _tracked(record: RoundRecord) -> dict[NetworkName, TrackedRun]:
    steps = {network: record.steps.get(training_step(network)) for network in NETWORKS}
    results = {network: train_result_of(step) for network, step in steps.items() if step is not None}
    return {network: result.tracked for network, result in results.items() if result.tracked is not None}


def _state(bundle: PublishedBundle) -> BundleState:
    if bundle.held_because is not None:
        return "held"
    return "serves" if bundle.is_serving else "served"


def _problem(job: JobRecord) -> str | None:
    return job.messages[-1] if job.state == "failed" and job.messages else None


def _errors(audits: Sequence[CheckedEstimate]) -> list[float]:
    """How far the estimated Dice of each audited scan's worst structure was off."""
    estimated: dict[tuple[str, dt.datetime], float] = {}
    true: dict[tuple[str, dt.datetime], float] = {}
    for audit in audits:
        key = (audit.scan, audit.made_at)
        if audit.estimated.dice is not None and audit.true.dice is not None:
            estimated[key] = min(audit.estimated.dice, estimated.get(key, 1.0))
            true[key] = min(audit.true.dice, true.get(key, 1.0))
    return [abs(estimated[key] - true[key]) for key in estimated]


def _tracked_run(network: NetworkName) -> Callable[[RoundSummary], Cell]:
    return lambda summary: _run(summary.tracked.get(network))


Cell: TypeAlias = str | int | float | None

ROUND_COLUMNS: Final[Mapping[str, Callable[[RoundSummary], Cell]]] = {
    "round": lambda summary: summary.number,
    "put": lambda summary: _utc(summary.put_at),
    "began": lambda summary: _utc(summary.started_at),
    "ended": lambda summary: _utc(summary.ended_at),
    "by": lambda summary: summary.actor.name,
    "reason": lambda summary: summary.reason,
    "state": lambda summary: summary.state,
    "problem": lambda summary: summary.problem,
    "labels": lambda summary: summary.labelled,
    "pseudo-labels": lambda summary: summary.pseudo_labels,
    "validation Dice": lambda summary: summary.validation_dice,
    "audited": lambda summary: summary.audited,
    "audit error": lambda summary: summary.audit_error,
    "minutes": lambda summary: summary.minutes,
    "bundle": lambda summary: summary.bundle,
    "bundle state": lambda summary: summary.bundle_state,
    "held because": lambda summary: summary.held_because,
    **{f"{network} run": _tracked_run(network) for network in NETWORKS},
}
"""A round for programs: one fact a column, times in UTC."""


def _run(tracked: TrackedRun | None) -> str | None:
    """Where a training's run in MLflow is: its page, else its number."""
    return None if tracked is None else tracked.url or tracked.id


def _utc(at: dt.datetime | None) -> str | None:
    return None if at is None else at.isoformat(timespec="seconds")
