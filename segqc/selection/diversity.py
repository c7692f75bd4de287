"""Among the worst scans the one most unlike what is labelled or handed out: no ten near-identical scans in a row.

The worst tenth of the waiting scans are candidates, at least 10 and at most 200 of them. By the features that the
serving segmentation network has of each scan, the candidate is chosen that is farthest from its nearest scan among
those that are labelled, and train, or handed out; the first time, where there are none, the worst candidate.

Candidates by uncertainty first, and the representative ones among these, is the order of Yang et al. ("Suggestive
annotation", MICCAI 2017); the second step is one step of k-center greedy (`segqc.selection.distances`). Scans are
handed out one by one, to several annotators at once, so that there is no batch: what is handed out stands for the part
of the batch that is chosen already. Kirsch et al. ("BatchBALD", NeurIPS 2019) show what batches of the top scores
alone lose to redundancy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeAlias

import numpy as np
from sqlalchemy import Select, bindparam, func, select

from segqc.selection import segqc
from segqc.selection.distances import nearest, standardised
from segqc.selection.strategy import Strategy
from segqc.store import bundles, features
from segqc.store.assessments import SERVING_SEGMENTER
from segqc.store.database import Parameters, Transaction
from segqc.store.features import HAS_FEATURES
from segqc.store.orders import Choice, Order, Waiting
from segqc.store.schema import FeatureRow, Scan

CANDIDATES: Final = 0.1
"""The share of the waiting scans, the worst ones, that are candidates."""
MIN_CANDIDATES: Final = 10
MAX_CANDIDATES: Final = 200

# A query for waiting scans and their scores, worst first, and the parameters that it has beside those of all orders.
Ranked: TypeAlias = tuple[Callable[[Waiting], "Select[int, float | None] | Select[int, float]"], Mapping[str, str]]
_COVERED: Final = features.covered()


def farthest_of_worst(ranked: Ranked, plain: Strategy) -> Order:
    """The order of a strategy with diversity.

    Where the report card says that the estimates' order is noise, it is that of the strategy ``segqc``; where no
    candidate has features yet, that of the strategy without diversity.

    Args:
        ranked: the worst scans.
        plain: the strategy without diversity.
    """
    query_of, more = ranked

    @functools.cache
    def worst(waiting: Waiting) -> Select[int, float, bytes]:
        query = query_of(waiting).add_columns(FeatureRow.numbers).outerjoin(FeatureRow, HAS_FEATURES)
        return query.limit(bindparam("candidates"))

    def order(
        transaction: Transaction, waiting: Waiting, parameters: Parameters, rng: np.random.Generator
    ) -> Choice | None:
        if bundles.ranked_by(transaction) is not None:
            return segqc.order(transaction, waiting, parameters, rng)
        of_segmenter = {"kind": "segmenter", "version": transaction.rows(SERVING_SEGMENTER).scalar()}
        count = transaction.rows(_count(waiting), parameters).scalar() or 0
        own = {**parameters, **more, **of_segmenter, "candidates": _candidates(count)}
        rows = [row for row in transaction.rows(worst(waiting), own) if row[2] is not None]
        if not rows:
            choice = plain.order(transaction, waiting, parameters, rng)
            return choice if choice is None or choice.order is not None else replace(choice, order=plain.name)
        known = transaction.rows(_COVERED, {**parameters, **of_segmenter}).scalars().all()
        scan, score, _ = rows[_farthest([row[2] for row in rows], known)]
        return Choice(scan, score)

    return order


def _candidates(waiting: int) -> int:
    return min(max(MIN_CANDIDATES, math.ceil(CANDIDATES * waiting)), MAX_CANDIDATES)


def _farthest(candidates: Sequence[bytes], known: Sequence[bytes]) -> int:
    """The place of the candidate that is farthest from what is known; the first one where nothing is."""
    if not known:
        return 0
    scaled = standardised(features.unpacked([*candidates, *known]))
    return int(np.argmax(nearest(scaled[: len(candidates)], scaled[len(candidates) :])))


@functools.cache
def _count(waiting: Waiting) -> Select[int]:
    return select(func.count()).select_from(Scan).where(waiting.pool)
