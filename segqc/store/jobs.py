"""Long work as rows: put by the server or a person, taken by a worker, taken again when its worker has died."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable, Collection, Sequence
from typing import Final

from sqlalchemy import Select, func, select, update

from segqc.store import events
from segqc.store.database import StoreError, Transaction
from segqc.store.records import Actor, Begun, JobRecord, JobState, JsonObject
from segqc.store.schema import ActorRow, Event, JobRow, LabelVersion, RoundRow, RoundStep

HEARTBEAT_SECONDS: Final = 5.0
DEAD_AFTER_SECONDS: Final = 60.0
MAX_ATTEMPTS: Final = 3
_LINES_KEPT: Final = 20
_OPEN: Final[tuple[JobState, ...]] = ("queued", "running")
_TAKEN: Final = "taken"  # the event of a job that a worker does from then on


class JobLost(StoreError):  # noqa: N818 - the finding, not the exception, is what callers name
    """The job is another worker's by now, or was stopped: this one must not go on."""


def enqueue(
    transaction: Transaction,
    kind: str,
    request: JsonObject,
    actor: Actor,
    *,
    messages: Sequence[str] = (),
    reason: str | None = None,
) -> JobRecord:
    """Put a job at the end of its kind's queue.

    Args:
        transaction: one that writes.
        kind: the queue.
        request: what is asked for.
        actor: who asks for it.
        messages: its first lines, such as what it waits for.
        reason: why it was put where nobody asked for it.
    """
    row = JobRow(
        public_id=str(uuid.uuid4()),
        kind=kind,
        request=request,
        state="queued",
        attempts=0,
        done_steps=0,
        all_steps=0,
        messages=list(messages),
        stop_wanted=False,
        reason=reason,
        newest_label=_newest_label(transaction),
        actor_id=events.actor_id(transaction, actor),
        enqueued_at=transaction.now,
    )
    transaction.add(row)
    transaction.flush()
    events.record(transaction, actor, "put", "job", row.id, {"kind": kind})
    return get(transaction, row.id)


def claim(
    transaction: Transaction,
    worker: str,
    kinds: Collection[str],
    is_dead: Callable[[str], bool] = lambda _: False,
) -> JobRecord | None:
    """Take the oldest job of these kinds; one of a kind runs at a time.

    A running job whose worker is dead is taken again, and given up after a few attempts: what kills its workers would
    kill the next one, too.

    Args:
        transaction: one that writes.
        worker: the name of the worker that takes it.
        kinds: the kinds that it takes.
        is_dead: tells of a worker's name whether it is known to be dead; of all others a missing heartbeat tells.
    """
    _requeue_lost(transaction, is_dead)
    running = select(JobRow.kind).where(JobRow.state == "running")
    row = transaction.scalar(
        select(JobRow)
        .where(JobRow.state == "queued", JobRow.kind.in_(kinds), JobRow.kind.not_in(running))
        .order_by(JobRow.id)
        .limit(1)
    )
    if row is None:
        return None
    row.state, row.worker, row.attempts = "running", worker, row.attempts + 1
    row.heartbeat_at = transaction.now
    if row.started_at is None:
        row.started_at, row.newest_label = transaction.now, _newest_label(transaction)
    transaction.flush()
    events.record(
        transaction,
        Actor(kind="system", name=worker, identified_by="program"),
        _TAKEN,
        "job",
        row.id,
        {"attempt": row.attempts},
    )
    return get(transaction, row.id)


def _newest_label(transaction: Transaction) -> int:
    """The number of the newest label version; 0 without one."""
    return transaction.scalar(select(func.max(LabelVersion.id))) or 0


def begun(transaction: Transaction, job: int) -> Begun:
    """When a job began: when it was first taken, or put where nobody has; what is done again after a kill is the same.

    Raises:
        StoreError: if there is none of this number.
    """
    row = transaction.get(JobRow, job)
    if row is None:
        raise StoreError(f"there is no job {job}")
    own = select(func.min(Event.id)).where(Event.object_kind == "job", Event.object_id == job)
    event = transaction.scalar(own.where(Event.verb == _TAKEN)) or transaction.scalar(own) or 0
    return Begun(event=event, label=row.newest_label)


def begun_now(transaction: Transaction) -> Begun:
    """What work on networks that begins now knows."""
    return Begun(event=events.newest(transaction), label=_newest_label(transaction))


def _requeue_lost(transaction: Transaction, is_dead: Callable[[str], bool]) -> None:
    patience = dt.timedelta(seconds=DEAD_AFTER_SECONDS)
    silent_since = transaction.now - patience
    for row in transaction.scalars(select(JobRow).where(JobRow.state == "running")).all():
        if (
            row.heartbeat_at is None
            or row.heartbeat_at < silent_since
            or (row.worker is not None and is_dead(row.worker))
        ):
            _retry(transaction, row, "its worker died")
        elif row.heartbeat_at > transaction.now + patience:
            # by another clock: from now on this one counts, until the worker, if it lives, shows it again
            row.heartbeat_at = transaction.now
    transaction.flush()


def _retry(transaction: Transaction, row: JobRow, reason: str) -> None:
    """Queue a job again whose process or worker has died, a limited number of times."""
    if row.stop_wanted:
        _end(transaction, row, "stopped", None)
    elif row.attempts >= MAX_ATTEMPTS:
        row.messages = _last([*row.messages, f"given up after {row.attempts} attempts: {reason}"])
        _end(transaction, row, "failed", None)
    else:
        row.messages = _last([*row.messages, f"attempt {row.attempts} of {MAX_ATTEMPTS} ended: {reason}"])
        row.state, row.worker = "queued", None
        events.record(transaction, events.SERVER, "attempt lost", "job", row.id, {"reason": reason})


def heartbeat(
    transaction: Transaction,
    job: int,
    worker: str,
    *,
    messages: Sequence[str] = (),
    steps: tuple[int, int] | None = None,
) -> None:
    """Show that a job's worker is alive, and how far it is.

    Raises:
        JobLost: if the job is not this worker's any more, or shall stop.
    """
    row = _mine(transaction, job, worker)
    row.heartbeat_at = transaction.now
    _tell(row, messages, steps)
    transaction.flush()


def _mine(transaction: Transaction, job: int, worker: str) -> JobRow:
    row = _if_mine(transaction, job, worker)
    if row is None:
        raise JobLost(f"the job {job} is not the worker {worker}'s any more")
    if row.stop_wanted:
        raise JobLost(f"the job {job} shall stop")
    return row


def finish(
    transaction: Transaction,
    job: int,
    worker: str,
    state: JobState,
    result: JsonObject | None = None,
    *,
    messages: Sequence[str] = (),
    steps: tuple[int, int] | None = None,
) -> None:
    """End a job: done, failed or stopped; what is not this worker's any more is left alone."""
    row = _if_mine(transaction, job, worker)
    if row is None:
        return
    _tell(row, messages, steps)
    _end(transaction, row, "stopped" if row.stop_wanted and state != "done" else state, result)


def retry(
    transaction: Transaction,
    job: int,
    worker: str,
    reason: str,
    *,
    messages: Sequence[str] = (),
    steps: tuple[int, int] | None = None,
) -> None:
    """Queue a job again whose process has died, or fail it after `MAX_ATTEMPTS`.

    What is not this worker's any more is left alone.
    """
    row = _if_mine(transaction, job, worker)
    if row is None:
        return
    _tell(row, messages, steps)
    _retry(transaction, row, reason)
    transaction.flush()


def _if_mine(transaction: Transaction, job: int, worker: str) -> JobRow | None:
    row = transaction.get(JobRow, job)
    return row if row is not None and row.state == "running" and row.worker == worker else None


def _tell(row: JobRow, messages: Sequence[str], steps: tuple[int, int] | None) -> None:
    if messages:
        row.messages = _last([*row.messages, *messages])
    if steps is not None:
        row.done_steps, row.all_steps = steps


def _end(transaction: Transaction, row: JobRow, state: JobState, result: JsonObject | None) -> None:
    row.state, row.result, row.ended_at = state, result, transaction.now
    transaction.flush()
    actor = Actor(kind="system", name=row.worker, identified_by="program") if row.worker else events.SERVER
    events.record(transaction, actor, state, "job", row.id)


def stop(transaction: Transaction, job: int, actor: Actor) -> JobRecord:
    """Ask for a job's end: at once if it waits, at its worker's next heartbeat if it runs."""
    row = transaction.get(JobRow, job)
    if row is None:
        raise StoreError(f"there is no job {job}")
    if row.state in _OPEN and not row.stop_wanted:
        row.stop_wanted = True
        events.record(transaction, actor, "stop wanted", "job", row.id)
        if row.state == "queued":
            _end(transaction, row, "stopped", None)
    return get(transaction, job)


def give_back(transaction: Transaction, worker: str) -> None:
    """Put the jobs of a worker that ends cleanly back into the queue; the attempt does not count."""
    transaction.execute(
        update(JobRow)
        .where(JobRow.state == "running", JobRow.worker == worker)
        .values(state="queued", worker=None, attempts=JobRow.attempts - 1)
    )


def get(transaction: Transaction, job: int) -> JobRecord:
    """A job by its number.

    Raises:
        StoreError: if there is none.
    """
    for record in _records(transaction, select(JobRow, ActorRow).where(JobRow.id == job)):
        return record
    raise StoreError(f"there is no job {job}")


def listing(
    transaction: Transaction, kind: str, *, states: Collection[JobState] | None = None, most: int = 200
) -> list[JobRecord]:
    """The last jobs of a kind, oldest first."""
    query = select(JobRow, ActorRow).where(JobRow.kind == kind).order_by(JobRow.id.desc()).limit(most)
    if states is not None:
        query = query.where(JobRow.state.in_(states))
    return _records(transaction, query)[::-1]


def open_jobs(transaction: Transaction, kind: str) -> list[JobRecord]:
    """The jobs of a kind that wait or run, oldest first."""
    return listing(transaction, kind, states=_OPEN)


def running_since(transaction: Transaction) -> dt.datetime | None:
    """When the oldest job that runs now was first started; None where none runs."""
    return transaction.scalar(select(func.min(JobRow.started_at)).where(JobRow.state == "running"))


def _records(transaction: Transaction, query: Select[JobRow, ActorRow]) -> list[JobRecord]:
    rows = transaction.execute(query.join(ActorRow, JobRow.actor_id == ActorRow.id))
    return [
        JobRecord(
            id=j.id,
            public_id=j.public_id,
            kind=j.kind,
            request=j.request,
            state=j.state,
            attempts=j.attempts,
            worker=j.worker,
            done_steps=j.done_steps,
            all_steps=j.all_steps,
            messages=tuple(j.messages),
            result=j.result,
            stop_wanted=j.stop_wanted,
            reason=j.reason,
            actor=events.actor_of(actor),
            enqueued_at=j.enqueued_at,
            started_at=j.started_at,
            heartbeat_at=j.heartbeat_at,
            ended_at=j.ended_at,
        )
        for j, actor in rows
    ]


def _last(lines: list[str]) -> list[str]:
    return lines[-_LINES_KEPT:]


def begin_round(transaction: Transaction, job: int, labelled: int) -> tuple[int, dict[str, JsonObject]]:
    """The round of a job, begun now if it is new, and the results of the steps that are finished."""
    row = transaction.scalar(select(RoundRow).where(RoundRow.job_id == job))
    if row is None:
        row = RoundRow(job_id=job, labelled=labelled, started_at=transaction.now)
        transaction.add(row)
        transaction.get_one(JobRow, job).newest_label = _newest_label(transaction)
        transaction.flush()
    steps = transaction.scalars(select(RoundStep).where(RoundStep.round_id == row.id))
    return row.id, {step.name: step.result for step in steps}


def bundle_of_round(transaction: Transaction, job: int) -> int | None:
    """The bundle that came of a job's round; None before it was published, or where the job is no round."""
    return transaction.scalar(select(RoundRow.bundle_id).where(RoundRow.job_id == job))


def finish_step(
    transaction: Transaction, round_id: int, name: str, result: JsonObject, *, bundle: int | None = None
) -> None:
    """Note that a step of a round is done, maybe once more, and which bundle came of it, if one did."""
    row = transaction.get_one(RoundRow, round_id)
    row.bundle_id = bundle if bundle is not None else row.bundle_id
    transaction.merge(RoundStep(round_id=round_id, name=name, result=result, ended_at=transaction.now))
    events.record(transaction, events.SERVER, "step finished", "job", row.job_id, {"step": name})


def finish_round(transaction: Transaction, round_id: int) -> None:
    """Note that a round is done."""
    row = transaction.get_one(RoundRow, round_id)
    row.ended_at = transaction.now
    events.record(transaction, events.SERVER, "finished", "round", round_id)
