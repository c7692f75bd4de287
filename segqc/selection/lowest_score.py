"""The lowest stored score first: the order of every strategy whose score is a function."""

from __future__ import annotations

import functools

import numpy as np
from sqlalchemy import Select, bindparam, select

from segqc.store.assessments import SCORE_COUNTS
from segqc.store.database import Parameters, Transaction
from segqc.store.orders import Choice, Order, Waiting, otherwise_uniform
from segqc.store.schema import Scan
from segqc.store.schema import Score as ScoreRow


def lowest_score(method: str) -> Order:
    """The lowest score of a strategy, by its name; while the serving bundle has scored nothing, a uniform draw."""

    def order(
        transaction: Transaction, waiting: Waiting, parameters: Parameters, rng: np.random.Generator
    ) -> Choice | None:
        row = transaction.rows(_first(waiting), {**parameters, "method": method}).first()
        return Choice(row[0], row[1]) if row is not None else otherwise_uniform(transaction, waiting, parameters, rng)

    return order


def lowest_first(waiting: Waiting) -> Select[int, float]:
    """A query for the waiting scans with a score of the parameter "method", the lowest first, and their scores."""
    return (
        select(Scan.id, ScoreRow.value)
        .join(ScoreRow, ScoreRow.scan_id == Scan.id)
        .where(waiting.pool, *waiting.free, ScoreRow.method == bindparam("method"), SCORE_COUNTS)
        .order_by(ScoreRow.value, Scan.id)
    )


@functools.cache
def _first(waiting: Waiting) -> Select[int, float]:
    return lowest_first(waiting).limit(1)
