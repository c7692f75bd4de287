"""Linear regression from a few numbers of a mask to its metrics: the last step of the size and shape baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segqc.evaluation.methods.averages import average_metrics
from segqc.quality.metrics import METRIC_NAMES, METRIC_RANGES, Values
from segqc.types import Metrics

# an empty mask has no features; a structure that is asked for is mostly there, and then this is true
ALL_MISSED = Metrics(dice=0.0, iou=0.0, arvd=1.0, rvd=-1.0)


@dataclass(frozen=True, slots=True)
class Line:
    """``intercept + slopes . features``."""

    slopes: tuple[float, ...]
    intercept: float

    def at(self, features: Values) -> float:
        """The line's value at the features (f,)."""
        return float(np.dot(self.slopes, features)) + self.intercept


@dataclass(frozen=True, slots=True)
class FeatureRegression:
    """The four metrics of one structure as linear functions of its mask's features; None where nothing was trained.

    ``empty`` is the answer for an empty mask.
    """

    dice: Line | None
    iou: Line | None
    arvd: Line | None
    rvd: Line | None
    empty: Metrics

    def at(self, features: Values | None) -> Metrics:
        """The metrics at the features (f,), within each metric's range; None is an empty mask."""
        if features is None:
            return self.empty
        values: dict[str, float | None] = {}
        for name in METRIC_NAMES:
            line: Line | None = getattr(self, name)
            low, high = METRIC_RANGES[name]
            values[name] = None if line is None else float(np.clip(line.at(features), low, high))
        return Metrics(**values)


def fit_features(features: Sequence[Values | None], truths: Sequence[Metrics]) -> FeatureRegression:
    """Fit by least squares.

    Args:
        features: of each mask (f,), or None for an empty mask.
        truths: the true metrics, in the same order.

    Raises:
        ValueError: if the two differ in length.
    """
    rows = [(f, t) for f, t in zip(features, truths, strict=True) if f is not None]
    x = np.array([f for f, _ in rows], np.float64)
    lines = {n: fit_line(x, np.array([getattr(t, n) for _, t in rows], np.float64)) for n in METRIC_NAMES}
    of_empty = [t for f, t in zip(features, truths, strict=True) if f is None]
    return FeatureRegression(**lines, empty=average_metrics(of_empty, "mean") if of_empty else ALL_MISSED)


def fit_line(features: Values, values: Values) -> Line | None:
    """Fit a line by least squares.

    Args:
        features: (n, f).
        values: (n,), NaN where undefined; such rows are left out.

    Returns:
        The line; a constant, the mean, with fewer rows than two more than features; None without any row.
    """
    defined = np.isfinite(values)
    y = values[defined]
    if not y.size:
        return None
    x = features[defined]
    if y.size < x.shape[1] + 2:
        return Line((0.0,) * x.shape[1], float(y.mean()))
    # centred: features that do not vary get slope 0 from the smallest solution
    centre = x.mean(axis=0)
    slopes = np.linalg.lstsq(x - centre, y - y.mean(), rcond=None)[0]
    return Line(tuple(float(s) for s in slopes), float(y.mean() - slopes @ centre))
