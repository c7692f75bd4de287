"""Numbers, times and people as the pages show them."""

from __future__ import annotations

import datetime as dt
from typing import Final

from segqc.store.records import Actor

NOTHING: Final = "\u2013"
"""What stands where there is no number."""
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def number(value: float | None, digits: int = 2) -> str:
    """A number with a fixed count of digits behind the point, with a real minus sign.

    >>> number(0.8765), number(None)
    ('0.88', '\u2013')
    """
    return NOTHING if value is None else f"{value:,.{digits}f}".replace("-", "\u2212")


def count(value: int | None) -> str:
    """A whole number, its thousands apart.

    >>> count(12345)
    '12,345'
    """
    return NOTHING if value is None else f"{value:,}"


def share(value: float | None) -> str:
    """A share as percent.

    >>> share(0.914)
    '91%'
    """
    return NOTHING if value is None else f"{value:.0%}"


def duration(seconds: float | None) -> str:
    """How long something took, in the largest unit that fits twice, or the next smaller one.

    >>> duration(45), duration(600), duration(9000), duration(400000)
    ('45 s', '10 min', '2.5 h', '5 d')
    """
    if seconds is None:
        return NOTHING
    seconds = max(0.0, seconds)
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 2 * _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    if seconds < 2 * _DAY:
        return f"{seconds / _HOUR:.1f} h" if seconds < 10 * _HOUR else f"{seconds / _HOUR:.0f} h"
    return f"{seconds / _DAY:.0f} d"


def age(since: dt.datetime | None, now: dt.datetime) -> str:
    """How long ago something was."""
    return duration(None if since is None else (now - since).total_seconds())


def moment(at: dt.datetime | None) -> str:
    """A time, in the server's zone."""
    return NOTHING if at is None else f"{at.astimezone():%Y-%m-%d %H:%M}"


def person(actor: Actor) -> str:
    """Who it was: a name, or which browser or network."""
    return f"network {actor.name}" if actor.kind == "network" else actor.name
