"""Which waiting scan comes next: each order is one query on an index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from sqlalchemy import ColumnElement, func, select

from segqc.store.database import Transaction
from segqc.store.schema import Scan, Score

Conditions: TypeAlias = Sequence[ColumnElement[bool]]


@dataclass(frozen=True, slots=True)
class Choice:
    """A scan's row, the score it was chosen by, and out of how many it was drawn, where it was drawn.

    ``order`` is set where the wanted order had nothing to go by and another one chose.
    """

    scan_id: int
    score: float | None = None
    pool: int | None = None
    order: str | None = None


Order: TypeAlias = Callable[[Transaction, Conditions, np.random.Generator], Choice | None]


def worst_estimate(transaction: Transaction, conditions: Conditions, rng: np.random.Generator) -> Choice | None:
    """The lowest estimated Dice; while nothing is assessed, a uniform draw."""
    row = transaction.execute(
        select(Scan.id, Scan.ranking_dice)
        .where(*conditions, Scan.ranking_dice.is_not(None))
        .order_by(Scan.ranking_dice, Scan.id)
        .limit(1)
    ).first()
    return Choice(row[0], row[1]) if row is not None else _otherwise_uniform(transaction, conditions, rng)


def worst_score(method: str) -> Order:
    """The lowest score of a baseline; while nothing is scored, a uniform draw."""

    def order(transaction: Transaction, conditions: Conditions, rng: np.random.Generator) -> Choice | None:
        row = transaction.execute(
            select(Scan.id, Score.value)
            .join(Score, Score.scan_id == Scan.id)
            .where(*conditions, Score.method == method)
            .order_by(Score.value, Scan.id)
            .limit(1)
        ).first()
        return Choice(row[0], row[1]) if row is not None else _otherwise_uniform(transaction, conditions, rng)

    return order


def uniform(transaction: Transaction, conditions: Conditions, rng: np.random.Generator) -> Choice | None:
    """Any scan, each with the same probability."""
    count = transaction.scalar(select(func.count()).select_from(Scan).where(*conditions)) or 0
    if count == 0:
        return None
    offset = int(rng.integers(count))
    found = transaction.scalar(select(Scan.id).where(*conditions).order_by(Scan.id).offset(offset).limit(1))
    return None if found is None else Choice(found, pool=count)


def uniform_foreground(transaction: Transaction, conditions: Conditions, rng: np.random.Generator) -> Choice | None:
    """Any scan whose mask is not empty (the paper's "random non-empty"); while no mask is known, any."""
    choice = uniform(transaction, [*conditions, Scan.foreground.is_(True)], rng)
    return choice if choice is not None else _otherwise_uniform(transaction, conditions, rng)


def by_name(transaction: Transaction, conditions: Conditions, rng: np.random.Generator) -> Choice | None:
    """The first by name."""
    found = transaction.scalar(select(Scan.id).where(*conditions).order_by(Scan.sort_key).limit(1))
    return None if found is None else Choice(found)


def _otherwise_uniform(transaction: Transaction, conditions: Conditions, rng: np.random.Generator) -> Choice | None:
    choice = uniform(transaction, conditions, rng)
    return None if choice is None else Choice(choice.scan_id, pool=choice.pool, order="uniform-random")
