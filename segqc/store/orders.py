"""Which waiting scan comes next: each order is one query on an index."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from sqlalchemy import ColumnElement, Select, and_, bindparam, func, select

from segqc.store.database import Parameters, Transaction
from segqc.store.schema import Scan, Score

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

    ``order`` is set where the wanted order had nothing to go by and another one chose.
    """

    scan_id: int
    score: float | None = None
    pool: int | None = None
    order: str | None = None


# Of a transaction, the scans to choose from, their conditions' parameters, and the generator of random draws.
Order: TypeAlias = Callable[[Transaction, Waiting, Parameters, np.random.Generator], Choice | None]


def worst_estimate(
    transaction: Transaction, waiting: Waiting, parameters: Parameters, rng: np.random.Generator
) -> Choice | None:
    """The lowest estimated Dice; while nothing is assessed, a uniform draw."""
    row = transaction.rows(_worst_estimate(waiting), parameters).first()
    return Choice(row[0], row[1]) if row is not None else _otherwise_uniform(transaction, waiting, parameters, rng)


@functools.cache
def _worst_estimate(waiting: Waiting) -> Select[int, float | None]:
    return (
        select(Scan.id, Scan.ranking_dice)
        .where(waiting.pool, *waiting.free, Scan.ranking_dice.is_not(None))
        .order_by(Scan.ranking_dice, Scan.id)
        .limit(1)
    )


def worst_score(method: str) -> Order:
    """The lowest score of a baseline; while nothing is scored, a uniform draw."""

    def order(
        transaction: Transaction, waiting: Waiting, parameters: Parameters, rng: np.random.Generator
    ) -> Choice | None:
        row = transaction.rows(_worst_score(waiting), {**parameters, "method": method}).first()
        return Choice(row[0], row[1]) if row is not None else _otherwise_uniform(transaction, waiting, parameters, rng)

    return order


@functools.cache
def _worst_score(waiting: Waiting) -> Select[int, float]:
    return (
        select(Scan.id, Score.value)
        .join(Score, Score.scan_id == Scan.id)
        .where(waiting.pool, *waiting.free, Score.method == bindparam("method"))
        .order_by(Score.value, Scan.id)
        .limit(1)
    )


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


def uniform_foreground(
    transaction: Transaction, waiting: Waiting, parameters: Parameters, rng: np.random.Generator
) -> Choice | None:
    """Any scan whose mask is not empty (the paper's "random non-empty"); while no mask is known, any."""
    choice = uniform(transaction, _with_foreground(waiting), parameters, rng)
    return choice if choice is not None else _otherwise_uniform(transaction, waiting, parameters, rng)


@functools.cache
def _with_foreground(waiting: Waiting) -> Waiting:
    return Waiting(and_(waiting.pool, Scan.foreground.is_(True)), waiting.free)


def by_name(
    transaction: Transaction, waiting: Waiting, parameters: Parameters, rng: np.random.Generator
) -> Choice | None:
    """The first by name."""
    found = transaction.rows(_by_name(waiting), parameters).scalar()
    return None if found is None else Choice(found)


@functools.cache
def _by_name(waiting: Waiting) -> Select[int]:
    return select(Scan.id).where(waiting.pool, *waiting.free).order_by(Scan.sort_key).limit(1)


def _otherwise_uniform(
    transaction: Transaction, waiting: Waiting, parameters: Parameters, rng: np.random.Generator
) -> Choice | None:
    choice = uniform(transaction, waiting, parameters, rng)
    return None if choice is None else Choice(choice.scan_id, pool=choice.pool, order="uniform-random")
