"""Any scan, each with the same probability: the draw that audits use, too."""

from __future__ import annotations

from typing import Final

from segqc.selection.strategy import Strategy
from segqc.store.orders import uniform

STRATEGY: Final = Strategy(
    name="uniform-random",
    description="Any scan without a final label, with equal probability",
    order=uniform,
)
