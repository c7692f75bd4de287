"""Guessing slowed: how long to wait before the next password is looked at.

Counted in memory, of one server process: an attacker's tries must not write to the database, and a restart is nothing
that an attacker can bring about.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Final, TypeAlias

FREE_OF_USER: Final = 5
"""Wrong passwords in a row after which a user's next one has to wait."""
FREE_OF_ADDRESS: Final = 20
"""The same for an address: many people may sit behind one."""
FIRST_PAUSE_SECONDS: Final = 2.0
LONGEST_PAUSE_SECONDS: Final = 300.0
FORGOTTEN_SECONDS: Final = 3600.0
MAX_COUNTED: Final = 10_000

_Key: TypeAlias = tuple[str, ...]


@dataclass(slots=True)
class _Count:
    failures: int
    last: float
    until: float


class Throttle:
    """Counts of wrong passwords, by user and by address.

    Where a user has signed in from an address before, wrong passwords from there are counted apart: nobody can keep
    them out by guessing from somewhere else.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: dict[_Key, _Count] = {}
        self._familiar: dict[_Key, None] = {}

    def begin(self, user: str, address: str) -> float:
        """Count a try as a failure, before it is known what it is: many at once are no way around the count.

        Args:
            user: the name that was given, as names are compared.
            address: where the request comes from.

        Returns:
            How many seconds to wait before the next try; 0 where this one may be looked at.
        """
        now = self._clock()
        keys = self._keys(user, address)
        waits = [count.until - now for key, _ in keys if (count := self._counts.get(key)) is not None]
        if (wait := max(waits, default=0.0)) > 0:
            return wait
        for key, free in keys:
            count = self._counts.pop(key, None)
            if count is None or now - count.last > FORGOTTEN_SECONDS:
                count = _Count(0, now, now)
            failures = count.failures + 1
            over = failures - free
            pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(over, 20)) if over >= 0 else 0.0
            self._counts[key] = _Count(failures, now, now + pause)  # the last one now: the oldest ones are dropped
        self._drop(self._counts)
        return 0.0

    def succeed(self, user: str, address: str) -> None:
        """Take back the last try of a user and address: it was right."""
        of_user, of_address = (key for key, _ in self._keys(user, address))
        self._counts.pop(of_user, None)
        if (count := self._counts.get(of_address)) is not None:
            count.failures, count.until = count.failures - 1, self._clock()
        self._familiar.pop(self._pair(user, address), None)
        self._familiar[self._pair(user, address)] = None
        self._drop(self._familiar)

    def _keys(self, user: str, address: str) -> tuple[tuple[_Key, int], tuple[_Key, int]]:
        """What is counted of a user and of an address, each with how many failures are free."""
        pair = self._pair(user, address)
        of_user = pair if pair in self._familiar else (user,)
        return (of_user, FREE_OF_USER), (("address", _network(address), ""), FREE_OF_ADDRESS)

    @staticmethod
    def _pair(user: str, address: str) -> _Key:
        return user, _network(address)

    @staticmethod
    def _drop(counted: dict[_Key, _Count] | dict[_Key, None]) -> None:
        while len(counted) > MAX_COUNTED:
            del counted[next(iter(counted))]


def _network(address: str) -> str:
    """What stands for an address: one household or machine has a whole /64 of IPv6 addresses."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    return str(ip_network(f"{parsed}/64", strict=False)) if isinstance(parsed, IPv6Address) else str(parsed)
