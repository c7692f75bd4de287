"""Among the scans with the lowest estimated Dice the one that is most unlike what is labelled or handed out."""

from __future__ import annotations

from typing import Final

from segqc.selection import segqc
from segqc.selection.diversity import farthest_of_worst
from segqc.selection.strategy import Strategy

STRATEGY: Final = Strategy(
    name="segqc-diverse",
    description="Of the worst tenth by estimated Dice, the scan most unlike what is labelled or handed out",
    order=farthest_of_worst((segqc.worst_first, {}), segqc.STRATEGY),
    follows_report_card=True,
    needs_rounds=True,
)
