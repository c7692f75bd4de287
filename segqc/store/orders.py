"""Which waiting scan comes next: each order is one query on an index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from sqlalchemy import ColumnElement, and_, func, select

from segqc.store.database import Transaction
from segqc.store.schema import Scan, Score

Condition: TypeAlias = ColumnElement[bool]
Conditions: TypeAlias = Sequence[ColumnElement[bool]]

_MOST_TRIES: Final = 50


@dataclass(frozen=True, slots=True)
class Choice:
    """A scan's row, the score it was chosen by, and out of how many waiting scans it was drawn, where it was drawn.

    ``order`` is set where the wanted order had nothing to go by and another one chose.
    """

    scan_id: int
    score: float | None = None
    pool: int | None = None
    order: str | None = None


# Of a transaction, the pool to choose from, what a scan in it must fulfil, and the generator of random draws.
Order: TypeAlias = Callable[[Transaction, Condition, Conditions, np.random.Generator], Choice | None]


def worst_estimate(
    transaction: Transaction, pool: Condition, free: Conditions, rng: np.random.Generator
) -> Choice | None:
    """The lowest estimated Dice; while nothing is assessed, a uniform draw."""
    row = transaction.execute(
        select(Scan.id, Scan.ranking_dice)
        .where(pool, *free, Scan.ranking_dice.is_not(None))
        .order_by(Scan.ranking_dice, Scan.id)
        .limit(1)
    ).first()
    return Choice(row[0], row[1]) if row is not None else _otherwise_uniform(transaction, pool, free, rng)


def worst_score(method: str) -> Order:
    """The lowest score of a baseline; while nothing is scored, a uniform draw."""

    def order(transaction: Transaction, pool: Condition, free: Conditions, rng: np.random.Generator) -> Choice | None:
        row = transaction.execute(
            select(Scan.id, Score.value)
            .join(Score, Score.scan_id == Scan.id)
            .where(pool, *free, Score.method == method)
            .order_by(Score.value, Scan.id)
            .limit(1)
        ).first()
        return Choice(row[0], row[1]) if row is not None else _otherwise_uniform(transaction, pool, free, rng)

    return order


def uniform(transaction: Transaction, pool: Condition, free: Conditions, rng: np.random.Generator) -> Choice | None:
    """Any scan, each with the same probability.

    Scans are drawn from the whole pool, which an index counts, until one is free: that keeps the draw uniform without
    looking at the leases of every scan. Where almost none is free, the free ones are listed.
    """
    count = transaction.scalar(select(func.count()).select_from(Scan).where(pool)) or 0
    for _ in range(min(count, _MOST_TRIES)):
        # the order of an index, so that the database counts entries and sorts nothing
        at = select(Scan.id).where(pool).order_by(Scan.queue, Scan.foreground, Scan.id).offset(int(rng.integers(count)))
        drawn = at.limit(1).scalar_subquery()
        found = transaction.scalar(select(Scan.id).where(Scan.id == drawn, *free))
        if found is not None:
            return Choice(found, pool=count)
    left = transaction.scalars(select(Scan.id).where(pool, *free).order_by(Scan.id)).all()
    return Choice(left[int(rng.integers(len(left)))], pool=count) if left else None


def uniform_foreground(
    transaction: Transaction, pool: Condition, free: Conditions, rng: np.random.Generator
) -> Choice | None:
    """Any scan whose mask is not empty (the paper's "random non-empty"); while no mask is known, any."""
    choice = uniform(transaction, and_(pool, Scan.foreground.is_(True)), free, rng)
    return choice if choice is not None else _otherwise_uniform(transaction, pool, free, rng)


def by_name(transaction: Transaction, pool: Condition, free: Conditions, rng: np.random.Generator) -> Choice | None:
    """The first by name."""
    found = transaction.scalar(select(Scan.id).where(pool, *free).order_by(Scan.sort_key).limit(1))
    return None if found is None else Choice(found)


def _otherwise_uniform(
    transaction: Transaction, pool: Condition, free: Conditions, rng: np.random.Generator
) -> Choice | None:
    choice = uniform(transaction, pool, free, rng)
    return None if choice is None else Choice(choice.scan_id, pool=choice.pool, order="uniform-random")
