"""How long work reports how far it is: one protocol for all of it."""

from __future__ import annotations

import logging
from typing import Final, Protocol

logger = logging.getLogger(__name__)

_BAR_WIDTH = 20


class Progress(Protocol):
    """What long work calls after each step."""

    def step(self, done: int, total: int, task: str, detail: str = "") -> None:
        """Report that ``done`` of ``total`` steps of a task are finished.

        Args:
            done: finished steps.
            total: all steps.
            task: what is done; the same words in each step of it.
            detail: what this step is about: a scan's name, a loss.
        """


class NoProgress:
    """Reports nothing."""

    def step(self, done: int, total: int, task: str, detail: str = "") -> None:
        """Do nothing."""


NO_PROGRESS: Final[Progress] = NoProgress()


class LineProgress:
    """Progress as log lines, at most one per percent of a task; a subclass may write them elsewhere."""

    def __init__(self) -> None:
        self._last: tuple[str, int] = ("", -1)

    def step(self, done: int, total: int, task: str, detail: str = "") -> None:
        """Write a line, unless there was one for this percentage."""
        key = (task, 100 * done // max(1, total))
        if key != self._last:
            self._last = key
            self.write(done, total, described(task, detail))

    def write(self, done: int, total: int, message: str) -> None:
        """Write a step to the log."""
        logger.info("%s", step_line(done, total, message))


def described(task: str, detail: str) -> str:
    """A task with the detail of its step, where there is one."""
    return f"{task}: {detail}" if detail else task


def step_line(done: int, total: int, message: str) -> str:
    """A step as one line of text."""
    filled = _BAR_WIDTH * done // max(1, total)
    return f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {done}/{total} {message}"
