"""A run folder: the settings and the split that made it, and every intermediate result; what is there is not redone.

::

    run.json               data set, structures, settings: another evaluation is refused in the same folder
    split.json             the scans with their patients, sides, folds and labels' hashes: what changes is refused
    seconds.json           what each step took
    mask-sources/          networks that make masks: checkpoints and model files
    test-masks/            the masks that are assessed, and manifest.json, which fixes them by hash
    training-masks/        masks of the training side, by networks that have not seen their scans
    networks/<method>/     what is compared: checkpoints
    predictions/           each method's numbers for every mask (.npz)
    results/               every experiment's scores, comparisons, curves and detections
    report/                report.html, and the same as CSV, Markdown, LaTeX and SVG
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import platform
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from segqc.evaluation.data.cohort import (
    SPLIT_RECORDS,
    Cohort,
    CohortError,
    SplitRecord,
    read_labelled,
    record_of,
    split,
    verify,
)
from segqc.evaluation.data.settings import EvaluationSettings
from segqc.evaluation.data.storage import Format, as_json
from segqc.networks.device import name_of_device
from segqc.processes import die_with_parent
from segqc.training import Progress
from segqc.volumes import atomic_write

T = TypeVar("T")
Task = TypeVar("Task")
AnyRun = TypeVar("AnyRun")


@dataclass(frozen=True, slots=True)
class Description:
    """What a run folder is of; ``masks`` names a folder of masks whose corrections the labels of the test side are."""

    dataset: str
    structures: dict[str, tuple[int, ...]]
    settings: EvaluationSettings
    masks: str | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """When and where a run's numbers were made."""

    date: str
    machine: str
    cores: int


SECONDS = "seconds.json"
NETWORKS = "networks"  # of the methods that are compared
_MADE = TypeAdapter(Made)
_SECONDS = TypeAdapter(dict[str, float])
_DESCRIPTIONS: TypeAdapter[Description] = TypeAdapter(Description)


@dataclass(frozen=True)
class Run:
    """A run folder and what it is of."""

    folder: Path
    description: Description

    @classmethod
    def open(
        cls,
        folder: Path,
        dataset: Path,
        structures: dict[str, tuple[int, ...]],
        settings: EvaluationSettings,
        masks: Path | None = None,
    ) -> Run:
        """Start a run, or continue the one that the folder holds.

        A run that is refused leaves nothing behind: the folder is made when all that it needs is there.

        Raises:
            CohortError: if the folder holds a run of another data set or of other settings, the masks are missing, the
                groups' pattern is none, or a new run has too few labelled patients.
            DatasetError: if the data set is none, or its split can't be used.
        """
        if masks is not None and not masks.is_dir():
            raise CohortError(f"{masks}: no such folder of masks")
        try:
            re.compile(settings.group_pattern or "")
        except re.error as error:
            raise CohortError(
                f"the groups' pattern {settings.group_pattern!r} is no regular expression: {error}"
            ) from error
        path = folder / "run.json"
        wanted = Description(str(dataset.resolve()), structures, settings, str(masks.resolve()) if masks else None)
        if path.is_file():
            try:
                found = _DESCRIPTIONS.validate_json(path.read_bytes())
            except ValidationError as error:
                raise CohortError(f"{path}: is no description of an evaluation; name another run folder") from error
            if _comparable(found) != _comparable(wanted):
                raise CohortError(
                    f"{folder}: holds an evaluation of other data or settings (see run.json); name another run folder"
                )
            return cls(folder.resolve(), wanted)
        if folder.exists() and not folder.is_dir():
            raise CohortError(f"{folder}: is no folder; name another run folder")
        run = cls(folder.resolve(), wanted)
        begun = run.begin()
        for name, content in (
            ("split.json", SPLIT_RECORDS.dump_json(begun, indent=1)),
            ("run.json", _DESCRIPTIONS.dump_json(wanted, indent=1)),
        ):
            with atomic_write(folder / name) as temporary:
                temporary.write_bytes(content + b"\n")
        return run

    @property
    def settings(self) -> EvaluationSettings:
        """The run's settings."""
        return self.description.settings

    @functools.cached_property
    def cohort(self) -> Cohort:
        """The cases and their split, as they were when the run began.

        Raises:
            CohortError: if there are too few labelled patients, or a label is no longer what it was.
        """
        labelled = read_labelled(Path(self.description.dataset), self.description.structures)
        return verify(self.cached("split.json", as_json(SPLIT_RECORDS), self.begin), labelled)

    def begin(self) -> SplitRecord:
        """The split of a new run.

        Raises:
            CohortError: if there are too few labelled patients.
            DatasetError: if the data set is none, or its split can't be used.
        """
        s, labelled = self.settings, read_labelled(Path(self.description.dataset), self.description.structures)
        drawn = split(labelled, folds=s.folds, seed=s.seed, test_share=s.test_share, max_cases=s.max_cases)
        return record_of(drawn)

    def made(self) -> Made:
        """When and where the run's numbers were made: noted at the first call, then read."""

        def now() -> Made:
            machine = f"{platform.platform(terse=True)}, {platform.machine()}, {name_of_device()}"
            return Made(datetime.date.today().isoformat(), machine, os.cpu_count() or 1)

        return self.cached("results/made.json", as_json(_MADE), now)

    def groups_of(self, patients: Sequence[str]) -> list[str]:
        """The group of each patient, by the settings' pattern; all alike where there is none."""
        pattern = re.compile(self.settings.group_pattern or "$")
        found = [pattern.search(patient) for patient in patients]
        return ["" if m is None else (m.group(1) if m.re.groups else m.group()) for m in found]

    def cached(self, name: str | Path, stored: Format[T], make: Callable[[], T]) -> T:
        """Read a result from the run folder; make and store it where it is not there yet.

        Args:
            name: its file, in the run folder.
            stored: its format.
            make: makes it.
        """
        return self.cached_all([name], stored, lambda: [make()])[0]

    def cached_all(self, names: Sequence[str | Path], stored: Format[T], make: Callable[[], Sequence[T]]) -> list[T]:
        """As `cached`, for results that are made together: all are made anew where one is missing."""
        paths = [self.folder / name for name in names]
        if not all(path.is_file() for path in paths):
            for path, value in zip(paths, make(), strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                stored.save(value, path)
        return [stored.load(path) for path in paths]


def parallel_map(run: Run, work: Callable[[Run, Task], object], tasks: Iterable[Task], progress: Progress) -> None:
    """Do each task of a run, see `in_processes`."""
    in_processes(run, work, tasks, progress, workers=run.settings.workers)


def in_processes(
    run: AnyRun,
    work: Callable[[AnyRun, Task], object],
    tasks: Iterable[Task],
    progress: Progress,
    *,
    workers: int,
    unit: str = "tasks",
) -> None:
    """Do each task, in processes of one thread each; each stores what it makes in the run folder.

    Networks of the size that a CPU can train gain little from a second thread, and everything from a second process.
    """
    tasks, step = list(tasks), work.__name__.replace("_", " ")
    if workers < 2 or len(tasks) < 2:
        with _one_thread():
            for i, task in enumerate(tasks):
                progress.step(i, len(tasks), step, str(task), unit=unit)
                work(run, task)
        progress.step(len(tasks), len(tasks), step, "done", unit=unit)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_worker, initargs=(os.getpid(),))
    with pool:
        waiting = [pool.submit(_do, work, run, task) for task in tasks]
        for i, (task, future) in enumerate(zip(tasks, waiting, strict=True)):
            progress.step(i, len(tasks), step, str(task), unit=unit)
            future.result()
    progress.step(len(tasks), len(tasks), step, "done", unit=unit)


def _do(work: Callable[[AnyRun, Task], object], run: AnyRun, task: Task) -> None:
    """Do a task; its result is in the run folder and need not travel to the other process."""
    work(run, task)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker: with other numbers of threads sums are added up in another order, and numbers differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _begin_worker(parent: int) -> None:
    # a killed evaluation must not go on half: nobody would take its results, and the next one would do the same work
    die_with_parent(signal.SIGKILL, parent)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@contextlib.contextmanager
def timed(run: Run, step: str) -> Iterator[None]:
    """Add what a step takes to what the run folder has noted of it; a step that is killed is not noted."""
    started = time.perf_counter()
    yield
    noted = seconds_of(run)
    noted[step] = noted.get(step, 0.0) + time.perf_counter() - started
    with atomic_write(run.folder / SECONDS) as temporary:
        temporary.write_bytes(_SECONDS.dump_json(noted, indent=1) + b"\n")


def seconds_of(run: Run) -> dict[str, float]:
    """What each step took, by name."""
    path = run.folder / SECONDS
    return _SECONDS.validate_json(path.read_bytes()) if path.is_file() else {}


def _comparable(description: Description) -> Description:
    return replace(description, settings=description.settings.numbers())
