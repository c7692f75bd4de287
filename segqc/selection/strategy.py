"""What a strategy is: an order of the waiting scans, a score where the order needs one, and the words for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from segqc.errors import SegqcError
from segqc.store.orders import Order

if TYPE_CHECKING:  # torch takes seconds to import, and an order does without
    from segqc.networks.segmenter import TtaPrediction
    from segqc.types import LabelArray, Structure

# A number from the segmentation network's predictions of a scan under test-time augmentation.
ScoreFunction: TypeAlias = "Callable[[TtaPrediction, Sequence[Structure]], float]"
# The same of each structure, by its name; those that the function says nothing of are left out.
StructureScores: TypeAlias = "Callable[[TtaPrediction, Sequence[Structure]], Mapping[str, float]]"
# A number from the label maps of a scan by the fold networks, each (n0, n1, n2).
EnsembleScore: TypeAlias = "Callable[[Sequence[LabelArray], Sequence[Structure]], float]"


class StrategyError(SegqcError):
    """A strategy is not there, has no score, or cannot be registered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A number for each waiting scan, stored under the strategy's name; the lowest is the worst.

    At most one of ``function`` and ``of_ensemble`` is given; without either it is SegQC-Net's estimate.

    Attributes:
        description: what clients show for the scoring method.
        legend: a line below ``segqc rank``'s table that explains its columns.
        function: computes it from predictions under test-time augmentation.
        by_structure: computes a number for each structure from the same, where the order wants them, too.
        of_ensemble: computes it from the label maps of the bundle's fold networks.
        is_dice: whether it estimates the Dice, so that true Dice and estimate can be subtracted.
    """

    description: str
    legend: str
    function: ScoreFunction | None = None
    by_structure: StructureScores | None = None
    of_ensemble: EnsembleScore | None = None
    is_dice: bool = False

    @property
    def is_estimate(self) -> bool:
        """Whether it is SegQC-Net's estimate, which is stored as an assessment."""
        return self.function is None and self.of_ensemble is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """A way to choose the next scan.

    Attributes:
        name: what clients ask for, and what leases record.
        description: what clients show.
        order: chooses one of the waiting scans, in the transaction that leases it.
        score: what the order needs to know of each scan beforehand, where it needs anything.
        follows_report_card: whether another order stands in for this one where the serving bundle's report card says
            that the order of its estimates is noise.
        needs_rounds: whether it goes by what whole rounds bring, beyond a segmentation network: SegQC-Net, the fold
            networks, or their number.
    """

    name: str
    description: str
    order: Order
    score: Score | None = None
    follows_report_card: bool = False
    needs_rounds: bool = False
