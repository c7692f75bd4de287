"""The lowest estimated Dice first, by SegQC-Net: the default.

Where the report card of the serving bundle says that this order is not better than chance, the best witness that is
better orders, and without one how unlike the training's a scan is, or else the draw is uniform: see
`segqc.quality.report_card`.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Final

import numpy as np
from sqlalchemy import Select, select

from segqc.quality.report_card import AT_RANDOM
from segqc.selection.lowest_score import lowest_score
from segqc.selection.strategy import Score, Strategy
from segqc.store import bundles
from segqc.store.database import Parameters, Transaction
from segqc.store.orders import Choice, Waiting, otherwise_uniform
from segqc.store.schema import Scan


def order(
    transaction: Transaction, waiting: Waiting, parameters: Parameters, rng: np.random.Generator
) -> Choice | None:
    """The lowest estimated Dice; while nothing is assessed, or where its order is known to be noise, another order."""
    ranked_by = bundles.ranked_by(transaction)
    if ranked_by == AT_RANDOM:
        return otherwise_uniform(transaction, waiting, parameters, rng)
    if ranked_by is not None:
        choice = lowest_score(ranked_by)(transaction, waiting, parameters, rng)
        return choice if choice is None or choice.order is not None else replace(choice, order=ranked_by)
    row = transaction.rows(_first(waiting), parameters).first()
    return Choice(row[0], row[1]) if row is not None else otherwise_uniform(transaction, waiting, parameters, rng)


def worst_first(waiting: Waiting) -> Select[int, float | None]:
    """A query for the waiting scans with an estimated Dice, the lowest first, and their estimates."""
    return (
        select(Scan.id, Scan.ranking_dice)
        .where(waiting.pool, *waiting.free, Scan.ranking_dice.is_not(None))
        .order_by(Scan.ranking_dice, Scan.id)
    )


@functools.cache
def _first(waiting: Waiting) -> Select[int, float | None]:
    return worst_first(waiting).limit(1)


STRATEGY: Final = Strategy(
    name="segqc",
    description="Worst mask first, by its Dice as estimated by SegQC-Net",
    order=order,
    score=Score(
        description="Masks and SegQC-Net's assessments; the order of the default strategy",
        legend="estimated Dice: of the scan's worst structure, without a true mask; 1 is best; in brackets its "
        "interval (pseudo-labels go by the least lower end over all structures). unlikeness: how far the scan is from "
        "the training's; 1 is usual. worst slices: to look at first, by sums of error probabilities.",
        is_dice=True,
    ),
    follows_report_card=True,
    needs_rounds=True,
)
