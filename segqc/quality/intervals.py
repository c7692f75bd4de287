"""Prediction intervals of estimated metrics: conformal, on cross-fitted residuals, with the patient as unit.

The residuals are ``truth - estimate``. Each patient k has a calibration line that was fitted without it, and the scores
``|truth - line_k(x)| / scale`` of its masks, x being the metric as read off the error map. The interval of a new x is
between the weighted quantiles of ``line_k(x) - score * scale`` and of ``line_k(x) + score * scale`` over all patients:
the jackknife+ of Barber, Candes, Ramdas & Tibshirani ("Predictive inference with the jackknife+", Annals of
Statistics 49, 2021), in its form for groups (Lee, Barber & Willett, "Distribution-free inference with hierarchical
data", 2023; Dunn, Wasserman & Ramdas, "Distribution-free prediction sets for two-layer hierarchical models", JASA
118, 2023). A patient's n masks weigh 1/n each, so that a patient counts once however many masks it has, and one patient
more, the new one, is thought to lie at infinity.

What is promised, for a random mask of a new patient exchangeable with the calibrating ones, whatever the network:

* all lines alike, because none was fitted on these patients (split conformal): coverage of at least ``level``;
* lines fitted without their patient (jackknife+): at least ``2 level - 1``, and in practice about ``level``.

Where the x of calibrating patients are of fold networks and the new one is of all of them together, nothing is proven:
it has to be measured (`segqc.evaluation.statistics.coverage`). An ensemble should err less than its members, and the
intervals then be rather too wide.

The promise holds on average over patients, not in every stratum, and not for other patients than the calibrating ones.
Bad masks have larger residuals: ``scale`` is a floor plus the estimate's distance from a perfect mask. The floor is
fitted with the line, without patient k too, so that it costs nothing of the promise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from segqc.quality.metrics import (
    METRIC_RANGES,
    MIN_CALIBRATION_CASES,
    LinearCalibration,
    MetricName,
    Values,
    fit_calibration,
)
from segqc.types import MetricIntervals, Metrics, PredictionInterval

LEVEL = 0.9
PERFECT: Mapping[MetricName, float] = MappingProxyType({"dice": 1.0, "iou": 1.0, "arvd": 0.0, "rvd": 0.0})
SCALE_FLOORS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)  # to choose from; with the last, all residuals are nearly alike
DEFAULT_FLOOR = 0.1
_TOLERANCE = 1e-9  # 1 - 0.9 is a little less than 0.1


@dataclass(frozen=True, slots=True)
class PatientScores:
    """One patient's part of a calibration.

    Attributes:
        slope, intercept: the calibration line that was fitted without this patient.
        floor: of the residuals' scale, fitted likewise.
        scores: of its masks, ``|truth - line(x)|`` over the scale there, ascending.
    """

    slope: float
    intercept: float
    floor: float
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ConformalCalibration:
    """What intervals of one metric are made of; small enough to lie on a model's card.

    Attributes:
        metric: the metric; its range bounds the intervals.
        patients: one entry per patient with a defined residual.
    """

    metric: MetricName
    patients: tuple[PatientScores, ...]

    def interval(self, x: float, *, level: float = LEVEL, shown: float | None = None) -> PredictionInterval | None:
        """The prediction interval of one mask; None where there are too few patients for the level.

        Args:
            x: the metric as read off the error map, before any calibration.
            level: wanted coverage, over 0 and under 1.
            shown: the estimate that the interval stands beside; it is widened to hold it, should it not.

        Raises:
            ValueError: if the level is not between 0 and 1.
        """
        low, high = (float(v[0]) for v in self.bounds(np.array([x], np.float64), level=level))
        if math.isnan(low):
            return None
        if shown is not None:
            low, high = min(low, shown), max(high, shown)
        return PredictionInterval(low, high, level)

    def bounds(self, x: Values, *, level: float = LEVEL) -> tuple[Values, Values]:
        """Lower and upper ends for many masks: arrays of the length of ``x``, NaN where x is, or with too few patients.

        Raises:
            ValueError: if the level is not between 0 and 1.
        """
        if len(self.patients) < patients_needed(level):
            return np.full(x.shape, np.nan), np.full(x.shape, np.nan)
        counts = [len(p.scores) for p in self.patients]
        weights = np.repeat(1.0 / np.array(counts, np.float64), counts)
        scores = np.concatenate([p.scores for p in self.patients])
        fitted = np.array([(p.slope, p.intercept, p.floor) for p in self.patients], np.float64)
        slopes, intercepts, floors = fitted.repeat(counts, axis=0).T
        lowest, highest = METRIC_RANGES[self.metric]
        centres = np.clip(x[:, None] * slopes + intercepts, lowest, highest)  # (masks, scores)
        reach = scores * _scale(centres, floors, self.metric)
        rank = level * (len(self.patients) + 1)
        low = -_weighted_quantile(reach - centres, weights, rank)
        high = _weighted_quantile(centres + reach, weights, rank)
        unknown = np.isnan(x)
        low, high = (np.where(unknown, np.nan, np.clip(v, lowest, highest)) for v in (low, high))
        return low, high


@dataclass(frozen=True, slots=True)
class StructureIntervals:
    """What intervals of one structure's four 3D metrics are made of.

    ``drawn`` says whose residuals they are: those of patients that validate a training, or of audit draws.
    """

    dice: ConformalCalibration
    iou: ConformalCalibration
    arvd: ConformalCalibration
    rvd: ConformalCalibration
    drawn: Literal["validation", "audit"] = "validation"

    def of(self, raw: Metrics, estimated: Metrics, *, level: float = LEVEL) -> MetricIntervals:
        """The intervals of one mask: ``raw`` is read off the error map, ``estimated`` are the numbers shown."""
        return MetricIntervals(
            dice=_interval(self.dice, raw.dice, estimated.dice, level),
            iou=_interval(self.iou, raw.iou, estimated.iou, level),
            arvd=_interval(self.arvd, raw.arvd, estimated.arvd, level),
            rvd=_interval(self.rvd, raw.rvd, estimated.rvd, level),
        )


def _interval(
    made: ConformalCalibration, raw: float | None, estimated: float | None, level: float
) -> PredictionInterval | None:
    return None if raw is None else made.interval(raw, level=level, shown=estimated)


def patients_needed(level: float = LEVEL) -> int:
    """The least number of patients that can say anything at this level: 9 for 90%, 19 for 95%.

    With fewer, the new patient at infinity weighs more than ``1 - level``, and the interval has no end.

    Raises:
        ValueError: if the level is not between 0 and 1.

    Example:
        >>> patients_needed(0.9), patients_needed(0.95)
        (9, 19)
    """
    if not 0 < level < 1:
        raise ValueError(f"an interval's level lies between 0 and 1, got {level}")
    return math.ceil(1 / (1 - level) - _TOLERANCE) - 1


def jackknife_plus(
    x: Sequence[float | None] | Values,
    truth: Sequence[float | None] | Values,
    patients: Sequence[str],
    metric: MetricName,
) -> ConformalCalibration:
    """Calibrate intervals on masks that line and scale are fitted on as well: once without each patient.

    The network must not have trained from these patients. Pairs with an undefined number are left out.

    Args:
        x: the metric as read off the error map, one per mask.
        truth: the true metric of each.
        patients: whose mask it is.
        metric: the metric.

    Raises:
        ValueError: if the three differ in length.

    Example:
        >>> estimates = [0.80, 0.82, 0.84, 0.86, 0.88, 0.90, 0.92, 0.94, 0.96]
        >>> truths = [0.78, 0.85, 0.83, 0.89, 0.86, 0.90, 0.90, 0.95, 0.95]
        >>> patients = [f"patient {number}" for number in range(9)]
        >>> str(jackknife_plus(estimates, truths, patients, "dice").interval(0.9))
        '0.88-0.93'
        >>> jackknife_plus(estimates[1:], truths[1:], patients[1:], "dice").interval(0.9) is None  # only eight patients
        True
    """
    values, true, names = _defined(x, truth, patients)
    found = []
    for name in np.unique(names):
        own = names == name
        line = fit_calibration(values[~own], true[~own], metric=metric, patients=names[~own])
        floor = _fit_floor(line.apply(values[~own]), true[~own], metric)
        found.append(_scores(line.apply(values[own]), true[own], line, floor, metric))
    return ConformalCalibration(metric, tuple(found))


def split_conformal(
    estimates: Sequence[float | None] | Values,
    truth: Sequence[float | None] | Values,
    patients: Sequence[str],
    metric: MetricName,
    line: LinearCalibration | None = None,
    floor: float = DEFAULT_FLOOR,
) -> ConformalCalibration:
    """Calibrate intervals on patients that neither the network nor the calibration line has trained from.

    Args:
        estimates: the estimates as they are shown, one per mask.
        truth: the true metric of each.
        patients: whose mask it is.
        metric: the metric.
        line: what makes these estimates out of the metric that is read off the error map; by default nothing does.
        floor: of the residuals' scale, chosen without these patients too.

    Raises:
        ValueError: if the three differ in length.

    Example:
        >>> estimates = [0.90] * 9
        >>> truths = [0.86, 0.87, 0.88, 0.89, 0.90, 0.91, 0.92, 0.93, 0.94]
        >>> calibration = split_conformal(estimates, truths, [f"patient {n}" for n in range(9)], "dice")
        >>> str(calibration.interval(0.90)), str(calibration.interval(0.60))  # worse masks have wider intervals
        ('0.86-0.94', '0.50-0.70')
    """
    values, true, names = _defined(estimates, truth, patients)
    line = line or LinearCalibration()
    found = (_scores(values[names == name], true[names == name], line, floor, metric) for name in np.unique(names))
    return ConformalCalibration(metric, tuple(found))


def _defined(
    x: Sequence[float | None] | Values, truth: Sequence[float | None] | Values, patients: Sequence[str]
) -> tuple[Values, Values, np.ndarray[tuple[int, ...], np.dtype[np.str_]]]:
    values, true, names = np.array(x, np.float64), np.array(truth, np.float64), np.array(patients, np.str_)
    if not values.shape == true.shape == names.shape or values.ndim != 1:
        raise ValueError(
            f"an interval needs an estimate, a truth and a patient of each mask, got {values.size}, {true.size} and "
            f"{names.size}"
        )
    defined = np.isfinite(values) & np.isfinite(true)
    return values[defined], true[defined], names[defined]


def _scores(
    estimates: Values, true: Values, line: LinearCalibration, floor: float, metric: MetricName
) -> PatientScores:
    scores = np.sort(np.abs(true - estimates) / _scale(estimates, floor, metric))
    return PatientScores(line.slope, line.intercept, floor, tuple(scores.tolist()))


def _scale(estimates: Values, floor: float | Values, metric: MetricName) -> Values:
    return np.asarray(floor + np.abs(estimates - PERFECT[metric]), np.float64)


def _fit_floor(estimates: Values, true: Values, metric: MetricName) -> float:
    """The likeliest floor, were the residuals over their scale a Laplace distribution."""
    residuals = np.abs(true - estimates)
    if residuals.size < MIN_CALIBRATION_CASES or not residuals.any():
        return DEFAULT_FLOOR
    scales = [_scale(estimates, floor, metric) for floor in SCALE_FLOORS]
    losses = [np.log(scale).mean() + np.log((residuals / scale).mean()) for scale in scales]
    return SCALE_FLOORS[int(np.argmin(losses))]


def _weighted_quantile(values: Values, weights: Values, rank: float) -> Values:
    """Of each row of (masks, scores), the least value that values of a weight of ``rank`` do not exceed."""
    order = np.argsort(values, axis=1, kind="stable")
    reached = np.cumsum(weights[order], axis=1) >= rank - _TOLERANCE
    return np.asarray(np.take_along_axis(values, order, axis=1)[np.arange(len(values)), reached.argmax(axis=1)])
