"""The scan with the largest estimated volume of errors first: where a correction is likely to change most.

The estimated Dice is relative: a small structure that is half wrong comes before a large one that is a little wrong all
around. Who counts corrected tissue looks at volumes.
"""

from __future__ import annotations

from typing import Final

from segqc.selection.lowest_score import lowest_score
from segqc.selection.strategy import Strategy

EXPECTED_GAIN: Final = "expected-gain"

STRATEGY: Final = Strategy(
    name=EXPECTED_GAIN,
    description="The mask with the largest volume of likely errors first, by SegQC-Net",
    order=lowest_score(EXPECTED_GAIN),
    needs_rounds=True,
)
