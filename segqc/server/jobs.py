"""Jobs as MONAI Label's clients see them; a worker does them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from segqc.loop.jobs import JobKind
from segqc.server.checks import JsonObject
from segqc.server.errors import RequestError
from segqc.store import jobs
from segqc.store.store import Store
from segqc.store.values import JobRecord, JobState, Who

_STATUS: Final[dict[JobState, str]] = {
    "queued": "SUBMITTED",
    "running": "RUNNING",
    "done": "DONE",
    "failed": "ERROR",
    "stopped": "STOPPED",
}
_STOP_SECONDS: Final = 15.0


def submit(store: Store, who: Who, kind: JobKind, request: JsonObject, *, enqueue: bool = False) -> JsonObject:
    """Put a job into the store.

    Raises:
        RequestError: 429 if one of its kind is open already, unless ``enqueue`` says that it may wait.
    """
    with store.write() as transaction:
        if jobs.open_jobs(transaction, kind) and not enqueue:
            raise RequestError(429, f"a {kind} job is running already; stop it, wait for it, or ask with enqueue=true.")
        return to_json(jobs.put(transaction, kind, request, who))


def status(store: Store, kind: JobKind, *, every: bool, only_running: bool) -> JsonObject | list[JsonObject]:
    """Tell how the last job of a kind is, the one that is open, or all.

    Raises:
        RequestError: 404 if there is none.
    """
    with store.read() as transaction:
        if only_running:
            running = jobs.open_jobs(transaction, kind)
            if not running:
                raise RequestError(404, f"no {kind} job is running.")
            return to_json(running[0])
        found: Sequence[JobRecord] = jobs.listing(transaction, kind)
    if not found:
        raise RequestError(404, f"no {kind} job was ever started.")
    return [to_json(job) for job in found] if every else to_json(found[-1])


def stop(store: Store, who: Who, kind: JobKind) -> JsonObject | None:
    """Stop the open job of a kind, wait a little for its end, and tell how it is; None if there is none."""
    with store.write() as transaction:
        found = jobs.open_jobs(transaction, kind)
        if not found:
            return None
        job = jobs.stop(transaction, found[0].id, who)
    until = time.monotonic() + _STOP_SECONDS
    while job.state == "running" and time.monotonic() < until:
        time.sleep(0.2)
        with store.read() as transaction:
            job = jobs.get(transaction, job.id)
    return to_json(job)


def to_json(job: JobRecord) -> JsonObject:
    """The fields of MONAI Label's task, and what the store knows beside them."""
    told: JsonObject = {
        "id": job.public_id,
        "status": _STATUS[job.state],
        "request": job.request,
        "start_ts": _local(job.started_at or job.put_at),
        "details": list(job.said),
        "progress": [job.done_steps, job.all_steps],
        "attempts": job.attempts,
        "put_by": job.who.name,
    }
    if job.result is not None:
        told["result"] = job.result
    if job.ended_at is not None:
        told["end_ts"] = _local(job.ended_at)
    return told


def _local(at: datetime) -> str:
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
