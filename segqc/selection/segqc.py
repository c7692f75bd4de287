"""The lowest estimated Dice first, by SegQC-Net: the default."""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
from sqlalchemy import Select, select

from segqc.selection.strategy import Score, Strategy
from segqc.store.database import Parameters, Transaction
from segqc.store.orders import Choice, Waiting, otherwise_uniform
from segqc.store.schema import Scan


def order(
    transaction: Transaction, waiting: Waiting, parameters: Parameters, rng: np.random.Generator
) -> Choice | None:
    """The lowest estimated Dice; while nothing is assessed, a uniform draw."""
    row = transaction.rows(_query(waiting), parameters).first()
    return Choice(row[0], row[1]) if row is not None else otherwise_uniform(transaction, waiting, parameters, rng)


@functools.cache
def _query(waiting: Waiting) -> Select[int, float | None]:
    return (
        select(Scan.id, Scan.ranking_dice)
        .where(waiting.pool, *waiting.free, Scan.ranking_dice.is_not(None))
        .order_by(Scan.ranking_dice, Scan.id)
        .limit(1)
    )


STRATEGY: Final = Strategy(
    name="segqc",
    description="Worst mask first, by its Dice as estimated by SegQC-Net",
    order=order,
    score=Score(
        description="Masks and SegQC-Net's assessments; the order of the default strategy",
        legend="estimated Dice: of the scan's worst structure, without a true mask; 1 is best. worst slices: to "
        "look at first, by their sums of error probabilities.",
        function=None,
        is_dice=True,
    ),
)
