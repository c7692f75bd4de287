"""The most uncertain prediction first: the entropy of the mean prediction under test-time augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from segqc.selection.lowest_score import lowest_score
from segqc.selection.strategy import Score, Strategy

if TYPE_CHECKING:
    from segqc.networks.segmenter import TtaPrediction
    from segqc.types import Structure


def entropy(prediction: TtaPrediction) -> float:
    """Summed voxel-wise entropy (nats) of the mean prediction, over the number of voxels in the median mask."""
    p = np.clip(prediction.mean_probabilities, 1e-6, 1.0)
    total = float(-(p * np.log(p)).sum(dtype=np.float64))
    return total / max(1, int((prediction.labels.array > 0).sum()))


def negative_entropy(prediction: TtaPrediction, structures: Sequence[Structure]) -> float:
    """Minus `entropy`, so that the lowest is the worst; of all structures together."""
    return -entropy(prediction)


STRATEGY: Final = Strategy(
    name="entropy",
    description="Most uncertain mask first, by the entropy of the mean prediction under test-time augmentation",
    order=lowest_score("entropy"),
    score=Score(
        description="Baseline: entropy of the mean prediction under test-time augmentation",
        legend="score: minus the mean entropy of the segmentation network's answers; 0 is the surest.",
        function=negative_entropy,
    ),
)
