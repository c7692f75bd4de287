"""Many masks of one scan in a row: what depends on the scan alone is computed once."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Generic, TypeVar

from segqc.volumes import Volume

ResultT = TypeVar("ResultT")


class LatestCache(Generic[ResultT]):
    """Remembers what was computed last, as long as its scan is in use.

    The scan is known again as the same `Volume` object, not by its contents. Threads may share it.
    """

    def __init__(self) -> None:
        self._kept: tuple[weakref.ref[Volume], Hashable, ResultT] | None = None

    def get(self, scan: Volume, key: Hashable = None) -> ResultT | None:
        """The result for this scan and key (what else it depends on), if it was the last one kept."""
        kept = self._kept
        return kept[2] if kept is not None and kept[0]() is scan and kept[1] == key else None

    def keep(self, result: ResultT, scan: Volume, key: Hashable = None) -> ResultT:
        """Remember a result in place of the one before; return it."""

        def forget(gone: weakref.ref[Volume]) -> None:
            if self._kept is not None and self._kept[0] is gone:
                self._kept = None

        self._kept = (weakref.ref(scan, forget), key, result)
        return result
