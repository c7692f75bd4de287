"""The scan that looks most unlike what is labelled or handed out: before there is any label or network.

Scans are compared by what they look like (`segqc.volumes.appearance`), which is noted when their files are taken in.
The first one is the most central, the next ones are farthest-first (`segqc.selection.distances`). A network that is
trained with few labels gains most from typical ones (Hacohen, Dekel & Weinshall, "Active learning on a budget", ICML
2022), and farthest-first tends to outliers: it is for the first handful of scans, and for comparison.
"""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
from sqlalchemy import Select, select

from segqc.selection.distances import nearest, standardised
from segqc.selection.strategy import Strategy
from segqc.store import features
from segqc.store.database import Parameters, Transaction
from segqc.store.features import HAS_FEATURES
from segqc.store.orders import Choice, Waiting, otherwise_uniform
from segqc.store.schema import FeatureRow, Scan
from segqc.types import FloatArray
from segqc.volumes.appearance import APPEARANCE_VERSION

_OF_APPEARANCE: Final = {"kind": "appearance", "version": APPEARANCE_VERSION}
_COVERED: Final = features.covered()


def order(
    transaction: Transaction, waiting: Waiting, parameters: Parameters, rng: np.random.Generator
) -> Choice | None:
    """The waiting scan farthest from what is labelled or handed out; where nothing is, the one next to the mean."""
    rows = transaction.rows(_query(waiting), {**parameters, **_OF_APPEARANCE}).all()
    if not rows:
        return otherwise_uniform(transaction, waiting, parameters, rng)
    known = transaction.rows(_COVERED, {**parameters, **_OF_APPEARANCE}).scalars().all()
    scaled = standardised(features.unpacked([*(numbers for _, numbers in rows), *known]))
    candidates, others = scaled[: len(rows)], scaled[len(rows) :]
    if not known:
        return Choice(rows[_most_central(candidates)][0])
    distances = nearest(candidates, others)
    first = int(np.argmax(distances))
    return Choice(rows[first][0], -float(distances[first]))


def _most_central(candidates: FloatArray) -> int:
    return int(np.argmin(np.einsum("sf,sf->s", candidates, candidates)))


@functools.cache
def _query(waiting: Waiting) -> Select[int, bytes]:
    return (
        select(Scan.id, FeatureRow.numbers)
        .join(FeatureRow, HAS_FEATURES)
        .where(waiting.pool, *waiting.free)
        .order_by(Scan.id)
    )


STRATEGY: Final = Strategy(
    name="cold-start",
    description="The scan that looks most unlike what is labelled or handed out; needs no network and no label",
    order=order,
)
