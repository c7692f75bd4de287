"""Other witnesses of how good a mask is than SegQC-Net's map: lower for worse masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from segqc.quality.metrics import true_metrics
from segqc.types import LabelArray, Structure


def tta_agreement(labels: LabelArray, members: Sequence[LabelArray], structures: Iterable[Structure]) -> float:
    """The worst structure's median Dice between each member's mask and the median mask; 1 where none has one.

    Args:
        labels: the median mask of predictions under test-time augmentation, (n0, n1, n2).
        members: each member's own mask, of the same shape.
        structures: the structures to compare.
    """
    medians = []
    for structure in structures:
        median = structure.mask(labels)
        dice = [true_metrics(median, structure.mask(member)).dice for member in members]
        known = [value for value in dice if value is not None]
        if known:
            medians.append(float(np.median(known)))
    return min(medians, default=1.0)
