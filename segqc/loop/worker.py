"""The worker: takes jobs out of the store and runs each in a process of its own.

It meets the server in the store only, so that it may run beside it or on another machine, and either may die at any
moment. A job whose process is killed is tried again, a limited number of times; so is one whose worker has died: at
once where its successor runs on the same machine and can see that, else when the heartbeats have been missing for long.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Final, TypeVar

from pydantic import TypeAdapter, ValidationError

from segqc.errors import SegqcError, sentence
from segqc.loop.dataset import Dataset
from segqc.loop.due import put_due_round
from segqc.loop.locks import hold, is_abandoned
from segqc.loop.requests import KINDS, result_to_json
from segqc.processes import death_by_signal
from segqc.progress import LineProgress, step_line
from segqc.quality.stopping import StopReason, outlook_sentence
from segqc.settings import Settings, SettingsError, load_settings
from segqc.store import jobs
from segqc.store.database import StoreDamaged, StoreError, StoreUnavailable, Transaction
from segqc.store.jobs import HEARTBEAT_SECONDS, JobLost
from segqc.store.records import JobRecord, JobState, JsonObject

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS: Final = 1.0
DUE_SECONDS: Final = 10.0
"""How often a worker that waits looks for work, and at least that far apart for rounds that are due."""
_GRACE_SECONDS: Final = 10.0
_NICENESS: Final = 5
_UNEXPECTED: Final = 70  # exit status of a job that met a mistake of ours (sysexits.h: EX_SOFTWARE)


@dataclass(frozen=True, slots=True)
class _Step:
    """What a job's process says of its progress, as one line of JSON."""

    done: int
    total: int
    message: str


@dataclass(frozen=True, slots=True)
class _Result:
    """The last line of a job's process that did its work."""

    result: JsonObject


_LINE: TypeAdapter[_Step | _Result] = TypeAdapter(_Step | _Result)


def _say(line: _Step | _Result) -> None:
    sys.stdout.write(json.dumps(asdict(line), default=str) + "\n")
    sys.stdout.flush()


class _JobProgress(LineProgress):
    """Progress as lines of JSON for the worker, whose child this process is."""

    def write(self, done: int, total: int, message: str) -> None:
        _say(_Step(done, total, message))


def run_job(folder: Path, number: int, config: Path | None = None) -> int:
    """Do one job in this process; the exit status is 0 if it is done, 1 for a problem that a user can solve.

    A mistake of ours is logged with its traceback; the last line is what it was.

    Args:
        folder: the dataset folder.
        number: the job's.
        config: the settings file to read in the place of the folder's own.
    """
    try:
        dataset = Dataset(folder, load_settings(folder, config))
        from segqc.loop import jobs as work  # with PyTorch and MONAI, which a worker itself does without

        with dataset.store.read() as transaction:
            job = jobs.get(transaction, number)
        result = work.run(dataset, job, _JobProgress())
    except (SegqcError, OSError) as error:
        sys.stdout.write(f"{_one_line(error)}\n")
        return error.exit_code if isinstance(error, SegqcError) else SegqcError.exit_code
    except MemoryError:
        sys.stdout.write(
            "memory ran out: set a smaller patch, batch or size in [training] of segqc.toml, or give the machine or "
            "container more memory.\n"
        )
        return SegqcError.exit_code
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        sys.stdout.write(f"unexpected {type(error).__name__}: {_one_line(error)} (the log has the traceback).\n")
        return _UNEXPECTED
    _say(_Result(result_to_json(result)))
    return 0


def _one_line(error: Exception) -> str:
    return sentence(" ".join(str(error).split()))


class Worker:
    """Takes jobs of some kinds, one at a time, until it is told to end."""

    def __init__(
        self,
        dataset: Dataset,
        kinds: Collection[str] = KINDS,
        *,
        config: Path | None = None,
        command: Callable[[JobRecord], list[str]] | None = None,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        settings: Callable[[], Settings] | None = None,
    ) -> None:
        """Take jobs of a folder.

        Args:
            dataset: the folder.
            kinds: of the jobs.
            config: the settings file that jobs' processes read in the place of the folder's own.
            command: starts a job's process; by default this program's own.
            heartbeat_seconds: how often a running job's worker shows that it is alive.
            settings: reads the folder's settings; asked each time whether a round is due, so that a change counts at
                once. By default they stay as the dataset has them.
        """
        self.dataset = dataset
        self.kinds = tuple(kinds)
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._config = config
        self._command = command or self._job_command
        self._heartbeat = heartbeat_seconds
        # no Event: its lock cannot be taken twice, and one signal's handler may interrupt another's
        self._ending = False
        self._next_look = 0.0  # by the monotonic clock, for a round that is due
        self._stopped: StopReason | None = None  # why no round begins by itself
        self._settings = settings or (lambda: dataset.settings)
        self._unusable: str | None = None  # what was last said of the settings

    def _job_command(self, job: JobRecord) -> list[str]:
        arguments = [str(self.dataset.folder), str(job.id), str(os.getpid())]
        if self._config is not None:
            arguments.append(str(self._config))
        return [sys.executable, "-u", "-m", "segqc.loop.job_process", *arguments]

    def end(self, *_: int | FrameType | None) -> None:
        """Take no more; the running job is stopped and put back into the queue. Serves as a signal's handler."""
        self._ending = True

    def serve(self, *, until_idle: bool = False) -> None:
        """Work until `end` is called, or, if ``until_idle``, until no job waits; puts the rounds that are due."""
        self._serve(lambda idle: until_idle and idle, puts_rounds="round" in self.kinds)

    def serve_until_ended(self, job: int) -> JobRecord:
        """Work until a job has ended, whoever does it, or `end` is called; returns what became of it."""
        reported: str | None = None

        def ended(_: bool) -> bool:
            nonlocal reported
            now = self._job(job)
            if now.worker not in (None, self.name, reported):
                reported = now.worker
                logger.info(
                    "the worker %s does this %s; waiting for it. It is taken over at once if it dies on this machine, "
                    "or %.0f s after its last sign of life", now.worker, now.kind, jobs.DEAD_AFTER_SECONDS,
                )  # fmt: skip
            return now.ended_at is not None

        self._serve(ended)
        return self._job(job)

    def _job(self, job: int) -> JobRecord:
        with self.dataset.store.read() as transaction:
            return jobs.get(transaction, job)

    def _serve(self, enough: Callable[[bool], bool], *, puts_rounds: bool = False) -> None:
        """Take jobs until it is enough; that is asked after each, with whether none waited."""
        logger.info("the worker %s takes jobs of %s", self.name, self.dataset.folder)
        own = self._lock_file(self.name)
        left_behind = [path for path in own.parent.glob("*.lock") if is_abandoned(path)]
        # successors on this machine see by it at once that this worker has died
        with hold(own, "a worker"):
            while not self._ending:
                if puts_rounds:
                    self._put_due_round()
                job = self._take()
                if job is not None:
                    self._run(job)
                while left_behind:  # no job is theirs any more
                    left_behind.pop().unlink(missing_ok=True)
                if enough(job is None):
                    break
                if job is None:
                    time.sleep(POLL_SECONDS)
        own.unlink(missing_ok=True)

    def _put_due_round(self) -> None:
        """Put a round if one is due, looking from time to time; says once why one that would be due is not worth it."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + DUE_SECONDS
        try:
            due = put_due_round(self.dataset.store, self._settings())
            self._unusable = None
        except SettingsError as error:
            if str(error) != self._unusable:
                logger.warning("no round begins by itself: %s", error)
            self._unusable = str(error)
            return
        except StoreDamaged:
            raise  # it does not mend by itself
        except StoreUnavailable as error:
            logger.warning("%s", error)
            return
        if due.job is not None:
            logger.info("a round begins, %s", due.job.reason)
        stop = due.stopped.stop if due.stopped is not None else None
        if due.stopped is not None and stop != self._stopped:
            logger.info("no round begins by itself: %s", outlook_sentence(due.stopped))
        self._stopped = stop

    def _take(self) -> JobRecord | None:
        try:
            with self.dataset.store.write() as transaction:
                return jobs.claim(transaction, self.name, self.kinds, self._is_dead)
        except StoreDamaged:
            raise  # it does not mend by itself
        except StoreUnavailable as error:
            # a database that is away for a while must not end the worker
            logger.warning("%s", error)
            return None

    def _lock_file(self, worker: str) -> Path:
        return self.dataset.own / "workers" / f"{worker}.lock"

    def _is_dead(self, worker: str) -> bool:
        return is_abandoned(self._lock_file(worker))

    def _run(self, job: JobRecord) -> None:
        logger.info("%s starts (attempt %d of %d): %s", job.kind, job.attempts, jobs.MAX_ATTEMPTS, job.request)
        output = _JobOutput()
        try:
            process = self._start(job)
        except OSError as error:
            output.take(sentence(f"could not be started: {error}"), job)
            self._finish(job, "failed", output)
            return
        os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)  # annotators wait for the server, not for it
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(process, lines), daemon=True).start()
        try:
            self._follow(job, lines, output)
        except JobLost as lost:
            logger.info("%s ends: %s", job.kind, lost)
            _stop(process)
            self._finish(job, "stopped", output)
            return
        if self._ending and process.poll() is None:
            logger.info(
                "%s is being stopped; it goes on from its last finished step when a worker runs again", job.kind
            )
            _stop(process)
            self._write(lambda transaction: jobs.give_back(transaction, self.name))
            return
        code = process.wait()
        death = death_by_signal(code)
        if death is not None:
            self._retry(job, f"the job's process was {death}.", output)
            return
        done = code == 0 and output.result is not None
        if code == 0 and not done:
            output.take("the job's process ended before its work was done; put the job again.", job)
        elif code != 0 and not output.has_reason:
            output.take(f"the job's process ended with exit status {code} and no message.", job)
        self._finish(job, "done" if done else "failed", output)

    def _start(self, job: JobRecord) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command(job),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # all cores, when the server does not want them: a thread that waits for another one must not spin meanwhile
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
            start_new_session=True,  # one signal reaches it and its children; Ctrl-C reaches it through us only
        )

    def _follow(self, job: JobRecord, lines: queue.SimpleQueue[str | None], output: _JobOutput) -> None:
        """Pass on what the process says, and show that it is alive, until it has said all.

        Raises:
            JobLost: if the job shall stop, or was given to another worker.
        """
        last = 0.0
        while not self._ending:
            try:
                line = lines.get(timeout=min(POLL_SECONDS, self._heartbeat))
                if line is None:
                    return
                output.take(line, job)
            except queue.Empty:
                pass
            if time.monotonic() - last >= min(POLL_SECONDS, self._heartbeat):
                last = time.monotonic()
                try:
                    with self.dataset.store.write() as transaction:
                        jobs.heartbeat(
                            transaction, job.id, self.name, messages=output.new_messages(), steps=output.steps
                        )
                except JobLost:
                    raise
                except StoreError as error:
                    logger.warning("%s", error)

    def _finish(self, job: JobRecord, state: JobState, output: _JobOutput) -> None:
        messages = output.new_messages()

        def finish(transaction: Transaction) -> JobRecord:
            jobs.finish(transaction, job.id, self.name, state, output.result, messages=messages, steps=output.steps)
            return jobs.get(transaction, job.id)

        ended = self._write(finish)
        if ended is not None:
            reason = f" ({ended.messages[-1]})" if ended.state == "failed" and ended.messages else ""
            logger.info("%s ended: %s%s", job.kind, ended.state, reason)

    def _retry(self, job: JobRecord, reason: str, output: _JobOutput) -> None:
        messages = output.new_messages()

        def retry(transaction: Transaction) -> JobRecord:
            jobs.retry(transaction, job.id, self.name, reason, messages=messages, steps=output.steps)
            return jobs.get(transaction, job.id)

        now = self._write(retry)
        again = " It is tried again." if now is not None and now.state == "queued" else ""
        logger.warning("%s, attempt %d of %d: %s%s", job.kind, job.attempts, jobs.MAX_ATTEMPTS, reason, again)

    def _write(self, change: Callable[[Transaction], T]) -> T | None:
        """Change the store, as soon as its database is there; None where this worker ends and it stays away."""
        tries_at_end = math.ceil(_GRACE_SECONDS / POLL_SECONDS)
        while True:
            try:
                with self.dataset.store.write() as transaction:
                    return change(transaction)
            except StoreDamaged:
                raise
            except StoreUnavailable as error:
                logger.warning("%s", error)
                time.sleep(POLL_SECONDS)
                if not self._ending:
                    continue
                if tries_at_end == 0:
                    return None
                tries_at_end -= 1
                time.sleep(POLL_SECONDS)


class _JobOutput:
    """What a job's process has said so far."""

    def __init__(self) -> None:
        self._new: list[str] = []
        self.steps: tuple[int, int] | None = None
        self.result: JsonObject | None = None
        self.has_reason = False  # whether the last line is text: where a job fails, why

    def take(self, line: str, job: JobRecord) -> None:
        try:
            messages = _LINE.validate_json(line)
        except ValidationError:
            self.has_reason = True
            self._tell(line, job)
            return
        self.has_reason = False
        if isinstance(messages, _Result):
            self.result = messages.result
            return
        self.steps = (messages.done, messages.total)
        self._tell(step_line(messages.done, messages.total, messages.message), job)

    def _tell(self, text: str, job: JobRecord) -> None:
        logging.getLogger(f"task_{job.kind}").info("%s", text)
        self._new.append(text)

    def new_messages(self) -> list[str]:
        """What was said since the last call."""
        messages, self._new = self._new, []
        return messages


def _listen(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    if process.stdout is not None:
        with process.stdout:
            for line in process.stdout:
                if text := line.rstrip():
                    lines.put(text)
    process.wait()
    lines.put(None)


def _stop(process: subprocess.Popen[str]) -> None:
    """Ask the process and its children to end, and end them if they do not."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        # the leader may end at once: what it left behind gets the second signal
        try:
            process.wait(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
