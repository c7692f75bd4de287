"""One scan after the other, by name."""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
from sqlalchemy import Select, select

from segqc.selection.strategy import Strategy
from segqc.store.database import Parameters, Transaction
from segqc.store.orders import Choice, Waiting
from segqc.store.schema import Scan


def order(
    transaction: Transaction, waiting: Waiting, parameters: Parameters, rng: np.random.Generator
) -> Choice | None:
    """The first by name."""
    found = transaction.rows(_query(waiting), parameters).scalar()
    return None if found is None else Choice(found)


@functools.cache
def _query(waiting: Waiting) -> Select[int]:
    return select(Scan.id).where(waiting.pool, *waiting.free).order_by(Scan.sort_key).limit(1)


STRATEGY: Final = Strategy(
    name="sequential",
    description="The scans one after the other, by name",
    order=order,
)
