"""A structure at random, and a scan that the network is unsure of there, by a draw that becomes greedy with the rounds.

The idea is that of ClaSP PE (Lüth, Traub et al., "Finally outshining the random baseline", arXiv 2601.13677, TMLR),
for whole scans. Every structure has the same probability to be the one that is looked at, however small
it is. The uncertainty u of a scan is the entropy of the mean prediction under test-time augmentation, in nats, averaged
over the voxels that the median mask gives to this structure. A scan is drawn with a probability proportional to

    u ** (2 ** r)

where r is the number of finished rounds: in proportion to u at first, when the networks know little of what they do not
know, and the largest u almost surely after some rounds. This is power sampling (Kirsch et al., "Stochastic batch
acquisition", TMLR 2023): noise of a Gumbel distribution on log u, whose scale is halved by each round.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from sqlalchemy import Select, bindparam, select

from segqc.selection.strategy import Score, Strategy
from segqc.store import rounds
from segqc.store.assessments import SCORE_COUNTS, STRUCTURE_NAMES, structure_score
from segqc.store.database import Parameters, Transaction
from segqc.store.orders import Choice, Waiting, otherwise_uniform
from segqc.store.schema import Scan
from segqc.store.schema import Score as ScoreRow

if TYPE_CHECKING:
    from segqc.networks.segmenter import TtaPrediction
    from segqc.types import FloatArray, Structure

CLASS_STRATIFIED: Final = "class-stratified"
_LAST_ROUND: Final = 20  # from which on the exponent stays: draws have long been greedy
_TINY: Final = 1e-12


def order(
    transaction: Transaction, waiting: Waiting, parameters: Parameters, rng: np.random.Generator
) -> Choice | None:
    """A draw by the uncertainty in a structure; of another structure where no waiting scan has this one."""
    names = sorted(transaction.rows(STRUCTURE_NAMES).scalars())
    for i in rng.permutation(len(names)).tolist():
        method = structure_score(CLASS_STRATIFIED, names[i])
        rows = transaction.rows(_query(waiting), {**parameters, "method": method}).all()
        if rows:
            drawn = _draw(np.array([-value for _, value in rows]), rounds.finished(transaction), rng)
            return Choice(rows[drawn][0], rows[drawn][1])
    return otherwise_uniform(transaction, waiting, parameters, rng)


def _draw(uncertainty: FloatArray, finished_rounds: int, rng: np.random.Generator) -> int:
    logs = 2.0 ** min(finished_rounds, _LAST_ROUND) * np.log(np.maximum(uncertainty, _TINY))
    weights = np.exp(logs - logs.max())
    return int(rng.choice(len(weights), p=weights / weights.sum()))


@functools.cache
def _query(waiting: Waiting) -> Select[int, float]:
    return (
        select(Scan.id, ScoreRow.value)
        .join(ScoreRow, ScoreRow.scan_id == Scan.id)
        .where(waiting.pool, *waiting.free, ScoreRow.method == bindparam("method"), SCORE_COUNTS)
        .order_by(Scan.id)
    )


def structure_certainties(prediction: TtaPrediction, structures: Sequence[Structure]) -> dict[str, float]:
    """Minus the mean entropy (nats) of the mean prediction over each structure's voxels in the median mask, by name.

    A structure without voxels has none.
    """
    p = np.clip(prediction.mean_probabilities, 1e-6, 1.0)
    entropy = -(p * np.log(p)).sum(axis=0)
    masks = {structure.name: structure.mask(prediction.labels.array) for structure in structures}
    return {name: -float(entropy[mask].mean(dtype=np.float64)) for name, mask in masks.items() if mask.any()}


def least_certainty(prediction: TtaPrediction, structures: Sequence[Structure]) -> float:
    """The lowest of the structures' certainties; 0 where the mask is empty."""
    return min(structure_certainties(prediction, structures).values(), default=0.0)


STRATEGY: Final = Strategy(
    name=CLASS_STRATIFIED,
    description="A structure at random, and a scan that is uncertain there, drawn more greedily with each round",
    order=order,
    score=Score(
        description="Baseline: entropy of the mean prediction under test-time augmentation within the structures",
        legend="score: minus the mean entropy of the network's answers within the structure where it is largest; 0 is "
        "the surest. Scans are drawn by the score of one structure at a time, and not in this order.",
        function=least_certainty,
        by_structure=structure_certainties,
    ),
    needs_rounds=True,
)
