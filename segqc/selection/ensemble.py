"""The least agreement of the fold networks first: the segmentation networks that SegQC-Net's masks came from.

Each has learned from other patients. They are a committee whose disagreement says how unsure a mask is (query by
committee: Seung, Opper & Sompolinsky, COLT 1992): the mean Dice of their masks over all pairs.
"""

from __future__ import annotations

from typing import Final

from segqc.quality.witnesses import ensemble_agreement
from segqc.selection.lowest_score import lowest_score
from segqc.selection.strategy import Score, Strategy

STRATEGY: Final = Strategy(
    name="ensemble",
    description="Worst mask first, by the agreement of the networks of the folds",
    order=lowest_score("ensemble"),
    score=Score(
        description="Baseline: agreement of the masks of the folds' networks",
        legend="estimated Dice: how well the masks of one scan by the folds' networks agree, the mean over all pairs.",
        of_ensemble=ensemble_agreement,
        is_dice=True,
    ),
    needs_rounds=True,
)
