"""What an order of the waiting scans is, and the uniform draw; the other orders are in `segqc.selection`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from sqlalchemy import ColumnElement, Select, bindparam, func, select

from segqc.store.database import Parameters, Transaction
from segqc.store.schema import Scan

_MAX_TRIES: Final = 50


@dataclass(frozen=True, eq=False)
class Waiting:
    """Which scans may be chosen: those in a pool that are also free. The conditions may have bound parameters.

    The queries of an instance are built once: building one takes longer than running it.
    """

    pool: ColumnElement[bool]
    free: tuple[ColumnElement[bool], ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """A scan's row, the score it was chosen by, and out of how many waiting scans it was drawn, where it was drawn.

    ``order`` is set where the wanted order had nothing to go by, or is known to be noise, and another one chose.
    """

    scan_id: int
    score: float | None = None
    pool: int | None = None
    order: str | None = None


# Of a transaction, the scans to choose from, their conditions' parameters, and the generator of random draws.
Order: TypeAlias = Callable[[Transaction, Waiting, Parameters, np.random.Generator], Choice | None]


def uniform(
    transaction: Transaction, waiting: Waiting, parameters: Parameters, rng: np.random.Generator
) -> Choice | None:
    """Any scan, each with the same probability.

    Scans are drawn from the whole pool, which an index counts, until one is free: that keeps the draw uniform without
    looking at the leases of every scan. Where almost none is free, the free ones are listed.
    """
    queries = _uniform(waiting)
    count = transaction.rows(queries.count, parameters).scalar() or 0
    for _ in range(min(count, _MAX_TRIES)):
        found = transaction.scalar(queries.drawn, {**parameters, "place": int(rng.integers(count))})
        if found is not None:
            return Choice(found, pool=count)
    left = transaction.rows(queries.all, parameters).scalars().all()
    return Choice(left[int(rng.integers(len(left)))], pool=count) if left else None


@dataclass(frozen=True)
class _Uniform:
    """The size of a pool, the scan at a place in it if it is free, and all free scans."""

    count: Select[int]
    drawn: Select[int]
    all: Select[int]


@functools.cache
def _uniform(waiting: Waiting) -> _Uniform:
    # the order of an index, so that the database counts entries and sorts nothing
    at = select(Scan.id).where(waiting.pool).order_by(Scan.queue, Scan.foreground, Scan.id).offset(bindparam("place"))
    return _Uniform(
        select(func.count()).select_from(Scan).where(waiting.pool),
        select(Scan.id).where(Scan.id == at.limit(1).scalar_subquery(), *waiting.free),
        select(Scan.id).where(waiting.pool, *waiting.free).order_by(Scan.id),
    )


def otherwise_uniform(
    transaction: Transaction, waiting: Waiting, parameters: Parameters, rng: np.random.Generator
) -> Choice | None:
    """What an order answers that has nothing to go by: a uniform draw that says so."""
    choice = uniform(transaction, waiting, parameters, rng)
    return None if choice is None else Choice(choice.scan_id, pool=choice.pool, order="uniform-random")
