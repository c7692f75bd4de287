"""The scan that is most unlike the training's first: what the networks know least."""

from __future__ import annotations

from typing import Final

from segqc.quality.witnesses import UNLIKENESS
from segqc.selection.lowest_score import lowest_score
from segqc.selection.strategy import Strategy

STRATEGY: Final = Strategy(
    name=UNLIKENESS,
    description="The scan that is most unlike the training scans first, by features of SegQC-Net",
    order=lowest_score(UNLIKENESS),
    needs_rounds=True,
)
