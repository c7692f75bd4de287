"""Learning curves of a study's units: areas below them, and what it costs to reach a Dice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.integrate import trapezoid

from segqc.evaluation.simulation.unit import Point, Unit

Values: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Spread:
    """A number over the seeds: its mean and, of two or more, the standard deviation."""

    seeds: int
    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one or more values."""
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(len(values), float(np.mean(values)), deviation)


def test_dice(points: Sequence[Point]) -> Values:
    """The mean Dice of the test scans, (points,)."""
    return np.array([point.mean_test_dice for point in points])


def labels_dice(points: Sequence[Point]) -> Values:
    """The mean Dice of the pool's labels, (points,)."""
    return np.array([point.labels_dice for point in points])


def shares(points: Sequence[Point]) -> Values:
    """The share of the pool's slices that were opened, (points,)."""
    return np.array([point.share for point in points])


def at(points: Sequence[Point], values: Values, share: float) -> float | None:
    """A curve's value at a cost, between its points on a line; None before its first.

    After its last point a curve stays as it is: nothing was left to annotate.
    """
    x = shares(points)
    return float(np.interp(share, x, values)) if share >= x[0] - 1e-9 else None


def area(points: Sequence[Point], values: Values, first: float, last: float) -> float:
    """The mean height of a curve between two costs: the area below it over their distance.

    Args:
        points: the curve's, ascending in their costs.
        values: its heights, (points,).
        first: the lower cost; before its first point a curve has the height of that.
        last: the higher cost.
    """
    x = shares(points)
    inner = x[(x > first) & (x < last)]
    grid = np.concatenate([[first], inner, [last]])
    return float(trapezoid(np.interp(grid, x, values), grid) / (last - first))


def cost_of(points: Sequence[Point], values: Values, wanted: float) -> float | None:
    """The least cost at which a curve reaches a height; None where it never does."""
    x = shares(points)
    for i, (cost, value) in enumerate(zip(x, values, strict=True)):
        if value >= wanted:
            if not i:
                return float(cost)
            before, low = x[i - 1], values[i - 1]
            return float(before + (cost - before) * (wanted - low) / (value - low))
    return None


def by_arm(units: Sequence[Unit]) -> Mapping[str, tuple[Unit, ...]]:
    """The units of each arm, in the order in which the arms come first, by seed."""
    arms = dict.fromkeys(unit.arm for unit in units)
    return {arm: tuple(sorted((u for u in units if u.arm == arm), key=lambda u: u.seed)) for arm in arms}
