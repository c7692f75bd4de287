"""How long work reports how far it is: one protocol for all of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

logger = logging.getLogger(__name__)

Clock: TypeAlias = Callable[[], float]

_BAR_WIDTH: Final = 20
_MIN_SECONDS: Final = 5.0  # of a task, before its length is estimated
_MEASURED_STEPS: Final = 10


class Progress(Protocol):
    """What long work calls after each step."""

    def step(self, done: int, total: int, task: str, detail: str = "", *, unit: str = "scans") -> None:
        """Report that ``done`` of ``total`` steps of a task are finished.

        Args:
            done: finished steps.
            total: all steps.
            task: what is done; the same words in each step of it.
            detail: what this step is about: a scan's name, a loss.
            unit: what the steps are, in the plural.
        """

    def message(self, text: str) -> None:
        """Report what is about to be done, or how long it will take: one sentence or two."""


class NoProgress:
    """Reports nothing."""

    def step(self, done: int, total: int, task: str, detail: str = "", *, unit: str = "scans") -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""


NO_PROGRESS: Final[Progress] = NoProgress()


class LineProgress:
    """Progress as log lines, at most one per percent of a task; a subclass may write them elsewhere.

    Steps of several tasks may come in turn.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._last: dict[str, int] = {}
        self._time = TimeLeft(clock)

    def step(self, done: int, total: int, task: str, detail: str = "", *, unit: str = "scans") -> None:
        """Write a line, unless there was one for this percentage."""
        left = self._time.after(done, total, task)
        percent = 100 * done // max(1, total)
        if percent != self._last.get(task):
            self._last[task] = percent
            self.write(done, total, f"{', '.join(filter(None, (unit, left)))}: {described(task, detail)}")

    def write(self, done: int, total: int, message: str) -> None:
        """Write a step to the log; the message begins with the unit."""
        logger.info("%s", step_line(done, total, message))

    def message(self, text: str) -> None:
        """Write a line."""
        logger.info("%s", text)


class TimeLeft:
    """How long tasks will still take, by what their steps have taken since the first one that was reported."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._first: dict[str, tuple[int, float]] = {}  # done by then, and when

    def after(self, done: int, total: int, task: str) -> str:
        """Return the time left as text; empty at the end, and where it is too early to tell."""
        now = self._clock()
        if task not in self._first or done <= self._first[task][0]:  # a task may be done again
            self._first[task] = done, now
        first, begun = self._first[task]
        steps, seconds = done - first, now - begun
        if steps < 1 or seconds < _MIN_SECONDS or done >= total:
            return ""
        return f"{duration(seconds / steps * (total - done))} left"


class WholeEstimate:
    """Progress of several tasks which says once, after some of their steps, how long all of them will take.

    Only tasks that count in the unit are measured.
    """

    def __init__(self, progress: Progress, total: int, unit: str, clock: Clock = time.monotonic) -> None:
        """Pass on to another progress.

        Args:
            progress: what is reported to.
            total: the steps of all tasks together, at most.
            unit: what these steps are.
            clock: gives the time in seconds.
        """
        self._progress, self._total, self._unit, self._clock = progress, total, unit, clock
        self._done: dict[str, int] = {}
        self._started: tuple[int, float] | None = None
        self._is_over = False

    def step(self, done: int, total: int, task: str, detail: str = "", *, unit: str = "scans") -> None:
        """Pass the step on."""
        self._progress.step(done, total, task, detail, unit=unit)
        if unit != self._unit or self._is_over:
            return
        is_more = task in self._done
        self._done[task] = done
        finished, now = sum(self._done.values()), self._clock()
        if self._started is None or not is_more:  # what an earlier run has done took no time now
            self._started = finished, now
        steps, seconds = finished - self._started[0], now - self._started[1]
        if steps >= _MEASURED_STEPS and seconds >= _MIN_SECONDS:
            self._is_over = True
            left = duration(seconds / steps * max(0, self._total - finished))
            self.message(f"All of it takes about {left} more at this speed, less where trainings stop early.")

    def message(self, text: str) -> None:
        """Pass the text on."""
        self._progress.message(text)


def duration(seconds: float) -> str:
    """A length of time in words, roughly.

    Examples:
        >>> [duration(seconds) for seconds in (3, 50, 100, 1500, 5400, 200_000)]
        ['3 s', '50 s', '2 min', '25 min', '1 h 30 min', '55 h 33 min']
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def described(task: str, detail: str) -> str:
    """A task with the detail of its step, where there is one."""
    return f"{task}: {detail}" if detail else task


def step_line(done: int, total: int, message: str) -> str:
    """A step as one line of text."""
    filled = _BAR_WIDTH * done // max(1, total)
    return f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {done}/{total} {message}"
