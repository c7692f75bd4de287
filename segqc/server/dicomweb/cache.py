"""What was read from files, kept up to a bound, and read once however many ask for it at the same time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)
ValueT = TypeVar("ValueT")


class BoundedCache(Generic[KeyT, ValueT]):
    """Values by key; those that were not asked for longest give way. Threads may share it."""

    def __init__(self, max_size: float, size_of: Callable[[ValueT], float] = lambda _: 1) -> None:
        """Begin empty.

        Args:
            max_size: of all values together; the one that was loaded last stays, even where it is larger.
            size_of: the size of a value.
        """
        self._max_size = max_size
        self._size_of = size_of
        self._size = 0.0
        self._entries: OrderedDict[KeyT, Future[ValueT]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: KeyT, load: Callable[[], ValueT]) -> ValueT:
        """The value of a key, which the first one who asks loads; the others wait. An error is nobody's value."""
        with self._lock:
            entry = self._entries.get(key)
            is_first = entry is None
            if entry is None:
                entry = self._entries[key] = Future()
            self._entries.move_to_end(key)
        if is_first:
            self._load(key, entry, load)
        return entry.result()

    def _load(self, key: KeyT, entry: Future[ValueT], load: Callable[[], ValueT]) -> None:
        try:
            value = load()
        except BaseException as error:
            with self._lock:
                del self._entries[key]
            entry.set_exception(error)
            return
        entry.set_result(value)
        with self._lock:
            self._size += self._size_of(value)
            self._entries.move_to_end(key)
            loaded = [k for k, other in self._entries.items() if other.done() and k != key]
            for oldest in loaded:
                if self._size <= self._max_size:
                    break
                self._size -= self._size_of(self._entries.pop(oldest).result())
