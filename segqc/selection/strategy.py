"""What a strategy is: an order of the waiting scans, a score where the order needs one, and the words for both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from segqc.errors import SegqcError
from segqc.store.orders import Order

if TYPE_CHECKING:  # torch takes seconds to import, and an order does without
    from segqc.networks.segmenter import TtaPrediction
    from segqc.types import Structure

# A number from the segmentation network's predictions of a scan under test-time augmentation.
ScoreFunction: TypeAlias = "Callable[[TtaPrediction, Sequence[Structure]], float]"


class StrategyError(SegqcError):
    """A strategy is not there, has no score, or cannot be registered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A number for each waiting scan, stored under the strategy's name; the lowest is the worst.

    Attributes:
        description: what clients show for the scoring method.
        legend: a line below ``segqc rank``'s table that explains its columns.
        function: computes it; None for SegQC-Net's estimates, which are stored as assessments.
        is_dice: whether it estimates the Dice, so that true Dice and estimate can be subtracted.
    """

    description: str
    legend: str
    function: ScoreFunction | None
    is_dice: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """A way to choose the next scan.

    Attributes:
        name: what clients ask for, and what leases record.
        description: what clients show.
        order: chooses one of the waiting scans, in the transaction that leases it.
        score: what the order needs to know of each scan beforehand, where it needs anything.
    """

    name: str
    description: str
    order: Order
    score: Score | None = None
