"""Trainings that do not need each other, side by side in processes of their own, where a CPU computes.

A network that a CPU can train gains little from a second thread, and much from a second process. A training keeps all
that it makes in its folder, so that a process which has done one need hand nothing back: the training is then called
once more here, and takes over what is done.
"""

from __future__ import annotations

import logging
import logging.handlers
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import torch

from segqc.networks.device import device_of_choice
from segqc.processes import death_by_signal, die_with_parent, exit_by_signals
from segqc.progress import NO_PROGRESS, Progress
from segqc.training.spec import TrainingSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")
Training: TypeAlias = Callable[[Progress], T]

_BYTES_OF_A_PROCESS: Final = 1 << 30  # PyTorch, and a small network at work
_COPIES: Final = 4  # what a training makes of the data that it is handed, in times of their size


def side_by_side(trainings: Sequence[Training[T]], settings: TrainingSettings, progress: Progress) -> Iterator[T]:
    """Do trainings, several at a time where that is faster, and give what each has made, in their order.

    They go one after the other on a GPU, with one thread, without `TrainingSettings.side_by_side`, or where the memory
    that is free would not hold all of them. So do those that could not be done in a process of their own, whatever the
    reason: what it was is found here then.

    Args:
        trainings: functions that can be pickled. Each keeps its work in a folder of its own, and when called again
            takes over what is done there.
        settings: of the trainings.
        progress: reports after each step of each of them.
    """
    if _is_wanted(len(trainings), settings) and _train_ahead(trainings, progress):
        progress = NO_PROGRESS  # all has been said
    return (training(progress) for training in trainings)


def _is_wanted(trainings: int, settings: TrainingSettings) -> bool:
    is_possible = device_of_choice().type == "cpu" and torch.get_num_threads() > 1
    return settings.side_by_side and is_possible and trainings > 1


def _train_ahead(trainings: Sequence[Training[T]], progress: Progress) -> bool:
    """Do all trainings at once, each in a process; returns whether all are done."""
    sent = [pickle.dumps(training) for training in trainings]
    needed, free = sum(_BYTES_OF_A_PROCESS + _COPIES * len(content) for content in sent), _free_bytes()
    if free is not None and needed > free:
        progress.message(
            f"{len(sent)} trainings go one after the other, as {free / 2**30:.0f} GiB of free memory may not hold them "
            "side by side."
        )
        return False
    threads = max(1, torch.get_num_threads() // len(sent))
    progress.message(f"{len(sent)} trainings go side by side, each with {threads} thread{'s' if threads > 1 else ''}.")
    context = multiprocessing.get_context("spawn")  # a forked process would lack the threads of PyTorch
    running: dict[Connection, BaseProcess] = {}
    try:
        for content in sent:
            here, there = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(
                target=_train, args=(content, threads, os.getpid(), there), daemon=True
            )
            process.start()
            there.close()
            running[here] = process
        return _follow(running, progress)
    finally:
        for process in running.values():
            process.kill()
        for connection, process in running.items():
            process.join()
            connection.close()


def _follow(running: dict[Connection, BaseProcess], progress: Progress) -> bool:
    """Pass on what the processes say until all have done their work, or one has not."""
    open_ones = set(running)
    while open_ones:
        for ready in wait(list(open_ones)):
            assert isinstance(ready, Connection)
            try:
                said = ready.recv()
            except EOFError:
                open_ones.remove(ready)
                process = running[ready]
                process.join()
                if process.exitcode:
                    ended = death_by_signal(process.exitcode) or "not able to do it"
                    progress.message(f"The trainings go one after the other now: a process of one was {ended}.")
                    return False
                continue
            if isinstance(said, logging.LogRecord):
                logging.getLogger(said.name).handle(said)
            elif isinstance(said, _Step):
                progress.step(said.done, said.total, said.task, said.detail, unit=said.unit)
            else:
                progress.message(said)
    return True


def _free_bytes() -> int | None:
    """The memory that new processes may take; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * found[0] if found else None


@dataclass(frozen=True, slots=True)
class _Step:
    """A step of a training, as its process reports it."""

    done: int
    total: int
    task: str
    detail: str
    unit: str


class _Said(logging.handlers.QueueHandler):
    """Sends what a training reports, and what it logs, to the process that waits for it."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)  # type: ignore[arg-type]
        self._connection = connection

    def enqueue(self, record: logging.LogRecord) -> None:
        self._connection.send(record)

    def step(self, done: int, total: int, task: str, detail: str = "", *, unit: str = "scans") -> None:
        self._connection.send(_Step(done, total, task, detail, unit))

    def message(self, text: str) -> None:
        self._connection.send(text)


def _train(content: bytes, threads: int, parent: int, connection: Connection) -> None:
    """What the process of a training does; where it fails, whoever waits does the training again, and meets the reason.

    Args:
        content: the training.
        threads: with which it computes.
        parent: the process that waits.
        connection: to it.
    """
    die_with_parent(signal.SIGKILL, parent)  # nobody would take the results, and the next one would do the same work
    exit_by_signals()
    torch.set_num_threads(threads)
    said = _Said(connection)
    root = logging.getLogger()
    root.addHandler(said)
    root.setLevel(logging.INFO)
    training: Training[object] = pickle.loads(content)  # our parent's
    try:
        training(said)
    except Exception:
        os._exit(1)
