"""Answers that wait for jobs: what MONAI Label's clients ask for by ``run_sync``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

import anyio
import anyio.to_thread
from fastapi import Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from segqc.loop.requests import KINDS, JobKind
from segqc.server.errors import RequestError
from segqc.server.job_answers import to_json
from segqc.store import jobs
from segqc.store.database import utc_now
from segqc.store.records import JobRecord, JsonObject
from segqc.store.store import Store

POLL_SECONDS: Final = 1.0
NO_WORKER_SECONDS: Final = 30.0
MAX_SECONDS: Final = 24 * 3600.0


class JobsDone(Response):
    """The jobs of one kind, sent when all have ended; it takes no thread meanwhile.

    Nobody is answered who has gone away; the jobs are done all the same. After a day they are sent as they are.
    """

    def __init__(self, store: Store, kind: JobKind, names: dict[str, str], *, single: bool = False) -> None:
        """Take the jobs.

        Args:
            store: where they are.
            kind: their kind.
            names: their public ids, by what they are called in the answer.
            single: whether the one job is the whole answer.
        """
        super().__init__()
        self._store = store
        self._kind = kind
        self._names = names
        self._single = single

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wait and answer.

        Raises:
            RequestError: 503 if no worker takes the jobs.
        """
        started = last_seen = time.monotonic()
        while True:
            found, alive = await anyio.to_thread.run_sync(self._look)
            now = time.monotonic()
            if all(job.ended_at is not None for job in found.values()) or now - started > MAX_SECONDS:
                break
            last_seen = now if alive else last_seen
            if now - last_seen > NO_WORKER_SECONDS:
                raise RequestError(
                    503, "no worker takes the job: start one with 'segqc worker'. The job waits in the queue."
                )
            with anyio.move_on_after(POLL_SECONDS):
                # the body was read before: what still comes is the client's leaving
                if (await receive())["type"] == "http.disconnect":
                    return
        answers: dict[str, JsonObject] = {name: to_json(found[public]) for name, public in self._names.items()}
        answer = (
            next(iter(answers.values())) if self._single else {name: {"result": job} for name, job in answers.items()}
        )
        await JSONResponse(answer)(scope, receive, send)

    def _look(self) -> tuple[dict[str, JobRecord], bool]:
        """The jobs as they are now, by their public ids, and whether any worker is at work."""
        wanted = set(self._names.values())
        with self._store.read() as transaction:
            found = {job.public_id: job for job in jobs.listing(transaction, self._kind) if job.public_id in wanted}
            is_open = [job for kind in KINDS for job in jobs.open_jobs(transaction, kind)]
        return found, any(job.state == "running" and _is_alive(job) for job in is_open)


def described(store: Store, job: JsonObject, kind: JobKind, *, wait: bool) -> JsonObject | Response:
    """A job as it is now, or, where the client asks for it, when it has ended."""
    return JobsDone(store, kind, {"job": str(job["id"])}, single=True) if wait else job


def all_described(store: Store, put: Mapping[str, JsonObject], kind: JobKind, *, wait: bool) -> JsonObject | Response:
    """Jobs as they are now, or, where the client asks for it, when they have ended."""
    if wait:
        return JobsDone(store, kind, {name: str(job["id"]) for name, job in put.items()})
    return {name: {"result": job} for name, job in put.items()}


def _is_alive(job: JobRecord) -> bool:
    """Whether a running job's worker has shown itself lately."""
    return job.heartbeat_at is not None and (utc_now() - job.heartbeat_at).total_seconds() < jobs.DEAD_AFTER_SECONDS
