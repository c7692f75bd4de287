"""The least agreement of predictions under test-time augmentation first (the paper's baseline)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from segqc.quality.witnesses import tta_agreement
from segqc.selection.lowest_score import lowest_score
from segqc.selection.strategy import Score, Strategy

if TYPE_CHECKING:
    from segqc.networks.segmenter import TtaPrediction
    from segqc.types import Structure


def tta_dice(prediction: TtaPrediction, structures: Sequence[Structure]) -> float:
    """The worst structure's median Dice between each member's mask and the median mask; 1 where none has one."""
    labels = np.asarray(prediction.labels.array, np.uint8)
    return tta_agreement(labels, prediction.members, structures)


STRATEGY: Final = Strategy(
    name="tta",
    description="Worst mask first, by the agreement of predictions under test-time augmentation",
    order=lowest_score("tta"),
    score=Score(
        description="Baseline: agreement of the predictions under test-time augmentation",
        legend="estimated Dice: how well the network's masks of one scan agree under flips and other contrasts.",
        function=tta_dice,
        is_dice=True,
    ),
)
