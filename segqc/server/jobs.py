"""Long work in processes of its own: one queue a kind (train, scoring, batch_infer), as MONAI Label has them.

It differs from MONAI Label's runner in this: a job that waits counts as running, so that nobody starts it twice; all
that a job says is kept to its last line; a finished training can start what follows from it; and nothing outlives
the server.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, TypeAlias

from pydantic import JsonValue

from segqc.server.checks import JsonObject

logger = logging.getLogger(__name__)

JobKind: TypeAlias = Literal["train", "scoring", "batch_infer"]
JobStatus: TypeAlias = Literal["SUBMITTED", "RUNNING", "DONE", "ERROR", "STOPPED"]
Command: TypeAlias = Callable[["Job"], list[str]]

_LINES_KEPT = 20
_ENDED_KEPT = 200
_GRACE_SECONDS = 5.0
_NICENESS = 5


def _now() -> str:
    return datetime.now().strftime("%Y-%m-%d %H:%M:%S")


@dataclass(slots=True)
class Job:
    """One piece of long work; ``to_json`` has the fields of MONAI Label's task."""

    kind: JobKind
    request: JsonObject
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    status: JobStatus = "SUBMITTED"
    start_ts: str = field(default_factory=_now)
    end_ts: str | None = None
    details: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES_KEPT))
    process: subprocess.Popen[str] | None = None

    def to_json(self) -> JsonObject:
        """What clients are told."""
        lines: list[JsonValue] = list(self.details)
        told: JsonObject = {
            "id": self.id,
            "status": self.status,
            "request": self.request,
            "start_ts": self.start_ts,
            "details": lines,
        }
        if self.end_ts is not None:
            told["end_ts"] = self.end_ts
        return told


def job_command(job: Job) -> list[str]:
    """The process that does a job."""
    return [sys.executable, "-u", "-m", "segqc.server.job", job.kind, json.dumps(job.request, separators=(",", ":"))]


class Jobs:
    """The queues and what ran in them."""

    def __init__(
        self,
        *,
        command: Command = job_command,
        environment: Mapping[str, str] | None = None,
        on_done: Callable[[Job], None] | None = None,
    ) -> None:
        self._command = command
        self._environment = dict(environment or {})
        self._on_done = on_done
        self._changed = threading.Condition()
        self._jobs: dict[JobKind, list[Job]] = {"train": [], "scoring": [], "batch_infer": []}
        self._threads: dict[JobKind, threading.Thread] = {}
        self._closed = False

    def submit(self, kind: JobKind, request: JsonObject) -> Job:
        """Put a job at the end of its queue."""
        job = Job(kind, request)
        with self._changed:
            if self._closed:
                raise RuntimeError("the server is ending; no new job is taken")
            jobs = self._jobs[kind]
            jobs.append(job)
            ended = [j for j in jobs if j.end_ts is not None]
            for old in ended[: max(0, len(ended) - _ENDED_KEPT)]:
                jobs.remove(old)
            if kind not in self._threads:
                thread = threading.Thread(target=self._work, args=(kind,), name=f"jobs-{kind}", daemon=True)
                self._threads[kind] = thread
                thread.start()
            self._changed.notify_all()
        return job

    def all(self, kind: JobKind) -> list[Job]:
        """All jobs of a kind that are remembered, oldest first."""
        with self._changed:
            return list(self._jobs[kind])

    def open(self, kind: JobKind) -> list[Job]:
        """Jobs that wait or run, the running one first."""
        with self._changed:
            return [job for job in self._jobs[kind] if job.end_ts is None]

    def stop(self, kind: JobKind) -> Job | None:
        """Stop the job that runs, or else the first that waits; None where there is neither."""
        with self._changed:
            job = next((j for j in self._jobs[kind] if j.end_ts is None), None)
            if job is None:
                return None
            job.status = "STOPPED"
            if job.process is None:
                job.end_ts = _now()
                return job
        _end(job.process)
        with self._changed:
            self._changed.wait_for(lambda: job.end_ts is not None, timeout=_GRACE_SECONDS)
        return job

    def close(self) -> None:
        """End all jobs and take no more; returns when their processes are gone."""
        with self._changed:
            self._closed = True
            left = [job for jobs in self._jobs.values() for job in jobs if job.end_ts is None]
            for job in left:
                job.status = "STOPPED"
            self._changed.notify_all()
        for job in left:
            if job.process is not None:
                _end(job.process)
        for thread in list(self._threads.values()):
            thread.join(timeout=_GRACE_SECONDS)

    def _work(self, kind: JobKind) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next(kind) is not None)
                job = self._next(kind)
                if self._closed or job is None:
                    return
                try:
                    self._start(job)
                except (OSError, ValueError) as error:
                    self._finish(job, f"could not be started: {error}")
                    continue
            self._follow(job)
            if job.status == "DONE" and self._on_done is not None and not self._closed:
                try:
                    self._on_done(job)
                except Exception:
                    # what follows a job must not end the queue of those behind it
                    logger.exception("what should follow the %s job %s failed", kind, job.id)

    def _next(self, kind: JobKind) -> Job | None:
        return next((job for job in self._jobs[kind] if job.status == "SUBMITTED"), None)

    def _start(self, job: Job) -> None:
        logger.info("%s starts: %s", job.kind, json.dumps(job.request))
        job.status = "RUNNING"
        job.process = subprocess.Popen(
            self._command(job),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **self._environment},
            start_new_session=True,  # one signal reaches it and its children; Ctrl-C reaches it through us only
        )
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, job.process.pid, _NICENESS)  # annotators wait for the server, not for it

    def _follow(self, job: Job) -> None:
        """Pass on what the process says until it has ended."""
        process = job.process
        if process is None or process.stdout is None:
            raise RuntimeError(f"the job {job.id} has no process to follow")
        voice = logging.getLogger(f"task_{job.kind}")
        with process.stdout:
            for line in process.stdout:
                if text := line.rstrip():
                    voice.info("%s", text)
                    job.details.append(text)
        code = process.wait()
        with self._changed:
            if job.status == "RUNNING":
                job.status = "DONE" if code == 0 else "ERROR"
            self._finish(job, None)

    def _finish(self, job: Job, problem: str | None) -> None:
        if problem is not None:
            job.status = "ERROR"
            job.details.append(problem)
        job.end_ts = _now()
        reason = f" ({job.details[-1]})" if job.status == "ERROR" and job.details else ""
        logger.info("%s ended: %s%s", job.kind, job.status, reason)
        self._changed.notify_all()


def _end(process: subprocess.Popen[str]) -> None:
    """Ask the process and its children to end, and end them if they do not."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        # the leader may end at once: what it left behind gets the second signal
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE_SECONDS)
