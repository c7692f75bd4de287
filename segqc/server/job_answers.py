"""Jobs as MONAI Label's clients see them; a worker does them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from segqc.loop.requests import (
    BatchRequest,
    JobKind,
    JobRequest,
    RoundRequest,
    TrainRequest,
    enqueue,
    request_of,
    request_to_json,
    title,
)
from segqc.server.errors import RequestError
from segqc.store import jobs
from segqc.store.records import Actor, JobRecord, JobState, JsonObject
from segqc.store.store import Store

_STATUS: Final[dict[JobState, str]] = {
    "queued": "SUBMITTED",
    "running": "RUNNING",
    "done": "DONE",
    "failed": "ERROR",
    "stopped": "STOPPED",
}
_STOP_SECONDS: Final = 15.0


def submit(
    store: Store,
    actor: Actor,
    request: JobRequest,
    *,
    wait: bool = False,
    messages: Sequence[str] = (),
) -> JsonObject:
    """Put a job into the store, or join one that is open and does the same.

    Args:
        store: the store.
        actor: who asks for it.
        request: what a worker is asked for.
        wait: put it in any case.
        messages: what the job says at once, such as which parameters were ignored.

    Raises:
        RequestError: 429 if a training of the same network, or a round, is open with other parameters, unless
            ``wait`` says that this one may wait.
    """
    with store.write() as transaction:
        ahead = [job for job in jobs.open_jobs(transaction, request.kind) if not job.stop_wanted]
        same = [job for job in ahead if _same_work(request_of(job), request)]
        if same and not wait:
            if request_of(same[-1]) != request:
                raise RequestError(
                    429,
                    f"{title(request)} is {_open_state(same[-1])} already, with other parameters "
                    f"(job {same[-1].public_id}); stop it, wait for it, or ask with enqueue=true.",
                )
            joined = to_json(same[-1])
            return {**joined, "note": f"{title(request)} is {_open_state(same[-1])} already: this is that job."}
        waits = [f"waits for {title(request_of(job))}" for job in ahead[-1:]]
        return to_json(enqueue(transaction, request, actor, messages=[*messages, *waits]))


def _same_work(one: JobRequest, other: JobRequest) -> bool:
    """Whether two jobs of a kind should not wait side by side: a network is trained, and a round done, once."""
    if isinstance(one, TrainRequest) and isinstance(other, TrainRequest):
        return one.model == other.model
    return isinstance(one, RoundRequest) or one == other


def _open_state(job: JobRecord) -> str:
    return "running" if job.state == "running" else "queued"


def status(store: Store, kind: JobKind, *, every: bool, only_running: bool) -> JsonObject | list[JsonObject]:
    """Tell how the last job of a kind is, the one that is open, or all.

    Raises:
        RequestError: 404 if there is none.
    """
    with store.read() as transaction:
        found: Sequence[JobRecord] = jobs.listing(transaction, kind)
        going = jobs.open_jobs(transaction, kind)
        if kind == "train":  # a round trains, too
            going += jobs.open_jobs(transaction, "round")
    if only_running and not going:
        raise RequestError(404, f"no {kind} job is running.")
    # a training that waits is one in progress to 3D Slicer and OHIF, which would stop watching it otherwise
    if going and (only_running or (kind == "train" and not every)):
        return _as_running(min(going, key=lambda job: job.state != "running"))
    if not found:
        raise RequestError(404, f"no {kind} job was ever started.")
    return [to_json(job) for job in found] if every else to_json(found[-1])


def stop(store: Store, actor: Actor, kind: JobKind) -> JsonObject | None:
    """Stop the open job of a kind, wait a little for its end, and tell how it is; None if there is none."""
    with store.write() as transaction:
        found = jobs.open_jobs(transaction, kind)
        if not found:
            return None
        job = jobs.stop(transaction, found[0].id, actor)
    until = time.monotonic() + _STOP_SECONDS
    while job.state == "running" and time.monotonic() < until:
        time.sleep(0.2)
        with store.read() as transaction:
            job = jobs.get(transaction, job.id)
    return to_json(job)


def _as_running(job: JobRecord) -> JsonObject:
    return {**to_json(job), "status": "RUNNING"} if job.kind in ("train", "round") else to_json(job)


def summary(job: JobRecord) -> JsonObject:
    """An open job in the list of all: what it is, how far, and why it was put where nobody asked for it."""
    return {
        "id": job.public_id,
        "kind": job.kind,
        "status": _STATUS[job.state],
        "title": title(request_of(job)),
        "progress": [job.done_steps, job.all_steps],
        "message": job.messages[-1] if job.messages else None,
        "put_by": job.actor.name,
        "reason": job.reason,
    }


def to_json(job: JobRecord) -> JsonObject:
    """The fields of MONAI Label's task, and what the store knows beside them."""
    request = request_of(job)
    body: JsonObject = {
        "id": job.public_id,
        "status": _STATUS[job.state],
        "request": _as_asked(request),
        "start_ts": _local(job.started_at or job.enqueued_at),
        # clients show the last line, and fail where there is none
        "details": list(job.messages) or [f"{title(request)}: {job.state}"],
        "model": request.model if isinstance(request, TrainRequest | BatchRequest) else None,
        "epoch": job.done_steps,
        "total_epochs": job.all_steps,
        "progress": [job.done_steps, job.all_steps],
        "attempts": job.attempts,
        "put_by": job.actor.name,
    }
    if job.reason is not None:
        body["reason"] = job.reason
    if job.result is not None:
        body["result"] = job.result
    if job.ended_at is not None:
        body["end_ts"] = _local(job.ended_at)
    return body


def _as_asked(request: JobRequest) -> JsonObject:
    """A request as clients send it: a training's settings beside its model."""
    if isinstance(request, TrainRequest):
        return {"model": request.model, **request.settings}
    return request_to_json(request)


def _local(at: datetime) -> str:
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
