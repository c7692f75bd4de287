"""Where the marks of the charts lie; the templates draw them as SVG, in the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np

from segqc.types import PredictionInterval

PointKind: TypeAlias = Literal["check", "audit", "other"]

_WIDTH, _HEIGHT = 440.0, 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 12.0, 12.0, 44.0
_BAND_STEP: Final = 0.05
_MIN_IN_BIN: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatePoint:
    """An estimated Dice beside the true one.

    Attributes:
        scan, structure: whose it is; "worst structure" where the scan's worst one is meant.
        kind: of a mask that was checked when the networks were trained, of an audit draw, or of another correction.
        interval: that was shown with the estimate.
    """

    scan: str
    structure: str
    kind: PointKind
    estimated: float
    true: float
    interval: PredictionInterval | None = None

    @property
    def is_held(self) -> bool | None:
        """Whether the interval holds the truth; None without one that applies."""
        if self.interval is None or not self.interval.applies:
            return None
        return self.interval.low <= self.true <= self.interval.high


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark of an axis: where it lies, and what it says."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A point, and the ends of its interval where it has one."""

    x: float
    y: float
    point: EstimatePoint
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Scatter:
    """Estimated against true Dice.

    Attributes:
        width, height: of the drawing.
        left, right, top, bottom: of the axes.
        ticks_x, ticks_y: marks of the axes.
        marks: the points.
        band: where the true Dice lies at an estimate, as the corners of an area; empty without enough intervals.
        diagonal: of exact estimates: x and y of both ends.
    """

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    ticks_x: tuple[Tick, ...]
    ticks_y: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    band: tuple[tuple[float, float], ...]
    diagonal: tuple[float, float, float, float]


def scatter(points: Sequence[EstimatePoint], intervals: Sequence[tuple[float, PredictionInterval]]) -> Scatter:
    """Lay out estimated against true Dice.

    Args:
        points: estimates whose truth is known.
        intervals: estimates with their intervals, known truth or not: the band is their median.
    """
    known = [v for p in points for v in (p.estimated, p.true)]
    low = min(0.9, math.floor(10 * min(known, default=0.5)) / 10)
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM

    def x(value: float) -> float:
        return round(left + (right - left) * (min(max(value, low), 1.0) - low) / (1 - low), 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * (min(max(value, low), 1.0) - low) / (1 - low), 1)

    step = 0.1 if low >= 0.4 else 0.2
    values = [round(1 - step * i, 2) for i in range(round((1 - low) / step + 1e-6) + 1)]
    lower = [(x(e), y(low_end)) for e, low_end, _ in _band(intervals) if e >= low]
    upper = [(x(e), y(high_end)) for e, _, high_end in _band(intervals) if e >= low]
    return Scatter(
        _WIDTH, _HEIGHT, left, right, top, bottom,
        tuple(Tick(x(v), f"{v:.1f}") for v in values),
        tuple(Tick(y(v), f"{v:.1f}") for v in values),
        tuple(
            Mark(
                x(p.estimated), y(p.true), p,
                y(p.interval.low) if p.interval is not None and p.interval.applies else None,
                y(p.interval.high) if p.interval is not None and p.interval.applies else None,
            )
            for p in points
        ),
        (*lower, *reversed(upper)) if len(lower) > 1 else (),
        (x(low), y(low), x(1), y(1)),
    )  # fmt: skip


def _band(intervals: Sequence[tuple[float, PredictionInterval]]) -> list[tuple[float, float, float]]:
    """The median interval of the estimates in steps: estimate, low, high."""
    bins: dict[int, list[tuple[float, PredictionInterval]]] = {}
    for estimate, interval in intervals:
        if interval.applies:
            bins.setdefault(int(estimate / _BAND_STEP), []).append((estimate, interval))
    return [
        (
            float(np.median([e for e, _ in found])),
            float(np.median([i.low for _, i in found])),
            float(np.median([i.high for _, i in found])),
        )
        for _, found in sorted(bins.items())
        if len(found) >= _MIN_IN_BIN
    ]


@dataclass(frozen=True, slots=True)
class LinePoint:
    """A value of a line: where it lies, and what it says."""

    x: float
    y: float
    label: str
    value: float


@dataclass(frozen=True, slots=True)
class Line:
    """Values over rounds."""

    width: float
    height: float
    left: float
    right: float
    bottom: float
    ticks_y: tuple[Tick, ...]
    points: tuple[LinePoint, ...]

    @property
    def path(self) -> str:
        """The line through the points."""
        return " ".join(f"{p.x},{p.y}" for p in self.points)


def line(values: Sequence[tuple[str, float]]) -> Line:
    """Lay out values from 0 to 1, such as a Dice of each round."""
    width, height, left, right, top, bottom = 440.0, 180.0, 48.0, 428.0, 12.0, 150.0
    known = [v for _, v in values]
    low = max(0.0, math.floor(10 * min(known, default=0.5) - 1e-9) / 10)
    high = min(1.0, math.ceil(10 * max(known, default=1.0) + 1e-9) / 10)
    high = high if high > low else min(1.0, low + 0.1)
    low = low if high > low else high - 0.1

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * (value - low) / (high - low), 1)

    gap = (right - left - 40) / max(1, len(values) - 1)
    points = tuple(
        LinePoint(round(left + 20 + gap * i if len(values) > 1 else (left + right) / 2, 1), y(value), label, value)
        for i, (label, value) in enumerate(values)
    )
    steps = round((high - low) * 10)
    ticks = tuple(Tick(y(low + i / 10), f"{low + i / 10:.1f}") for i in range(steps + 1))
    return Line(width, height, left, right, bottom, ticks, points)
