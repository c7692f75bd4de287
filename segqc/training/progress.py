"""How long work tells how far it is."""

from __future__ import annotations

import logging
from typing import Protocol

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """What long work calls after each step."""

    def step(self, done: int, total: int, message: str) -> None:
        """Tell that ``done`` of ``total`` steps of the work named by ``message`` are finished."""


class LogProgress:
    """Progress as log lines, at most one per percent of a piece of work."""

    def __init__(self) -> None:
        self._last: tuple[str, int] = ("", -1)

    def step(self, done: int, total: int, message: str) -> None:
        """Log the step, unless its percentage was logged before."""
        key = (message.split(":")[0], 100 * done // max(1, total))
        if key != self._last:
            self._last = key
            filled = 20 * done // max(1, total)
            logger.info("[%s%s] %d/%d %s", "#" * filled, "." * (20 - filled), done, total, message)


class NoProgress:
    """Silence."""

    def step(self, done: int, total: int, message: str) -> None:
        """Do nothing."""
