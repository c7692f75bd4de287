"""Among the scans with the most volume of likely errors the one that is most unlike what is labelled or handed out."""

from __future__ import annotations

from typing import Final

from segqc.selection import expected_gain
from segqc.selection.diversity import farthest_of_worst
from segqc.selection.lowest_score import lowest_first
from segqc.selection.strategy import Strategy

STRATEGY: Final = Strategy(
    name="expected-gain-diverse",
    description="Of the tenth with the most likely errors, the scan most unlike what is labelled or handed out",
    order=farthest_of_worst((lowest_first, {"method": expected_gain.EXPECTED_GAIN}), expected_gain.STRATEGY),
    follows_report_card=True,
    needs_rounds=True,
)
