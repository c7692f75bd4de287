"""Any scan whose mask is not empty (the paper's "random non-empty")."""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
from sqlalchemy import and_

from segqc.selection.strategy import Strategy
from segqc.store.database import Parameters, Transaction
from segqc.store.orders import Choice, Waiting, otherwise_uniform, uniform
from segqc.store.schema import Scan


def order(
    transaction: Transaction, waiting: Waiting, parameters: Parameters, rng: np.random.Generator
) -> Choice | None:
    """Any scan whose mask is not empty, each with the same probability; while no mask is known, any scan."""
    choice = uniform(transaction, _with_foreground(waiting), parameters, rng)
    return choice if choice is not None else otherwise_uniform(transaction, waiting, parameters, rng)


@functools.cache
def _with_foreground(waiting: Waiting) -> Waiting:
    return Waiting(and_(waiting.pool, Scan.foreground.is_(True)), waiting.free)


STRATEGY: Final = Strategy(
    name="foreground-random",
    description="Any scan whose mask is not empty, with equal probability",
    order=order,
)
