"""How long work tells how far it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """What long work calls after each step."""

    def step(self, done: int, total: int, message: str) -> None:
        """Tell that ``done`` of ``total`` steps of the work named by ``message`` are finished."""


def step_line(done: int, total: int, message: str) -> str:
    """A step as one line of text."""
    filled = 20 * done // max(1, total)
    return f"[{'#' * filled}{'.' * (20 - filled)}] {done}/{total} {message}"


def log_step(done: int, total: int, message: str) -> None:
    """Log a step."""
    logger.info("%s", step_line(done, total, message))


class LineProgress:
    """Progress as lines, at most one per percent of a piece of work; they are log lines unless told otherwise."""

    def __init__(self, tell: Callable[[int, int, str], None] = log_step) -> None:
        self._tell = tell
        self._last: tuple[str, int] = ("", -1)

    def step(self, done: int, total: int, message: str) -> None:
        """Tell the step, unless its percentage was told before."""
        key = (message.split(":")[0], 100 * done // max(1, total))
        if key != self._last:
            self._last = key
            self._tell(done, total, message)


class NoProgress:
    """Silence."""

    def step(self, done: int, total: int, message: str) -> None:
        """Do nothing."""
