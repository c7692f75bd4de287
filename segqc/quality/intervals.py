"""Prediction intervals of estimated metrics: conformal, on cross-fitted residuals, with the patient as unit.

The residuals are ``truth - estimate``. Each patient k has a model that was chosen and fitted without it, and the scores
``|truth - model_k(x)| / scale`` of its masks, x being what is known of a mask: the metric as read off the error map
and the other witnesses (`segqc.quality.stacking`). The interval of a new x is between the weighted quantiles of
``model_k(x) - score * scale`` and of ``model_k(x) + score * scale`` over all patients: the jackknife+ of Barber,
Candes, Ramdas & Tibshirani ("Predictive inference with the jackknife+", Annals of Statistics 49, 2021), in its form for
groups (Lee, Barber & Willett, "Distribution-free inference with hierarchical data", 2023; Dunn, Wasserman & Ramdas,
"Distribution-free prediction sets for two-layer hierarchical models", JASA 118, 2023). A patient's n masks weigh 1/n
each, so that a patient counts once however many masks it has, and one patient more, the new one, is thought to lie at
infinity.

What is promised, for a random mask of a new patient exchangeable with the calibrating ones, whatever the network:

* all models alike, because none was fitted on these patients (split conformal): coverage of at least ``level``;
* models chosen and fitted without their patient (jackknife+): at least ``2 level - 1``, in practice about ``level``.

Where the x of calibrating patients are of fold networks and the new one is of all of them together, nothing is proven:
it has to be measured (`segqc.evaluation.statistics.coverage`). An ensemble should err less than its members, and the
intervals then be rather too wide.

The promise holds on average over patients, not in every stratum, and not for other patients than the calibrating ones,
nor for masks of another kind (`segqc.types.MaskKind`).
Bad masks have larger residuals: ``scale`` is a floor plus the estimate's distance from a perfect mask. The floor is
fitted with the model, without patient k too, so that it costs nothing of the promise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np

from segqc.quality.metrics import (
    METRIC_RANGES,
    MIN_CALIBRATION_CASES,
    MetricName,
    Values,
    fit_calibration,
)
from segqc.quality.stacking import (
    AS_IT_IS,
    EstimateModel,
    KnownMasks,
    WitnessName,
    WitnessValues,
    iou_of_dice,
    known_masks,
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
        model: what makes estimates, chosen and fitted without this patient.
        floor: of the residuals' scale, fitted likewise.
        scores: of its masks, ``|truth - estimate|`` over the scale there, ascending.
    """

    model: EstimateModel
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

    @property
    def typical_floor(self) -> float:
        """The median floor of the patients' scales."""
        return float(np.median([p.floor for p in self.patients])) if self.patients else DEFAULT_FLOOR

    def score(self, estimated: float, true: float) -> float:
        """The size of another mask's residual, over its scale at the typical floor."""
        scale = _scale(np.array(estimated, np.float64), self.typical_floor, self.metric)
        return float(abs(true - estimated) / scale)

    def one_score_each(self, generator: np.random.Generator) -> Values:
        """The score of one mask of each patient, drawn at random: an array over patients."""
        return np.array([p.scores[int(generator.integers(len(p.scores)))] for p in self.patients], np.float64)

    def interval(
        self, x: float | Mapping[WitnessName, float], *, level: float = LEVEL, shown: float | None = None
    ) -> PredictionInterval | None:
        """The prediction interval of one mask; None where there are too few patients for the level.

        Args:
            x: the metric as read off the error map, before any calibration; or what each witness says.
            level: wanted coverage, over 0 and under 1.
            shown: the estimate that the interval stands beside; it is widened to hold it, should it not.

        Raises:
            ValueError: if the level is not between 0 and 1.
        """
        said: Mapping[WitnessName, float] = x if isinstance(x, Mapping) else {"map": x}
        values = {name: np.array([value], np.float64) for name, value in said.items()}
        low, high = (float(v[0]) for v in self.bounds(values, level=level))
        if math.isnan(low):
            return None
        if shown is not None:
            low, high = min(low, shown), max(high, shown)
        return PredictionInterval(low, high, level)

    def bounds(self, x: Values | WitnessValues, *, level: float = LEVEL) -> tuple[Values, Values]:
        """Lower and upper ends for many masks: NaN where the error map's metric is, or with too few patients.

        Args:
            x: the metric as read off the error maps, an array over masks; or an array of each witness.
            level: wanted coverage.

        Raises:
            ValueError: if the level is not between 0 and 1.
        """
        values: WitnessValues = x if isinstance(x, Mapping) else {"map": x}
        unknown = np.isnan(values["map"])
        if len(self.patients) < patients_needed(level):
            return np.full(unknown.shape, np.nan), np.full(unknown.shape, np.nan)
        counts = [len(p.scores) for p in self.patients]
        weights = np.repeat(1.0 / np.array(counts, np.float64), counts)
        scores = np.concatenate([p.scores for p in self.patients])
        floors = np.repeat([p.floor for p in self.patients], counts)
        lowest, highest = METRIC_RANGES[self.metric]
        centres = np.stack([p.model.apply(values) for p in self.patients], axis=1)
        centres = np.clip(centres, lowest, highest).repeat(counts, axis=1)  # (masks, scores)
        reach = scores * _scale(centres, floors, self.metric)
        rank = level * (len(self.patients) + 1)
        low = -_weighted_quantile(reach - centres, weights, rank)
        high = _weighted_quantile(centres + reach, weights, rank)
        low, high = (np.where(unknown, np.nan, np.clip(v, lowest, highest)) for v in (low, high))
        return low, high


@dataclass(frozen=True, slots=True)
class StructureIntervals:
    """What intervals of one structure's 3D metrics are made of; the Dice's give those of the IoU.

    ``drawn`` says whose residuals they are: those of patients that a network has not seen in training, or of audit
    draws.
    """

    dice: ConformalCalibration
    arvd: ConformalCalibration
    rvd: ConformalCalibration
    drawn: Literal["validation", "audit"] = "validation"

    def of(
        self, said: Mapping[MetricName, Mapping[WitnessName, float]], estimated: Metrics, *, level: float = LEVEL
    ) -> MetricIntervals:
        """The intervals of one mask.

        Args:
            said: what each witness says of each metric; nothing where the metric is undefined.
            estimated: the numbers shown.
            level: wanted coverage.
        """

        def of_metric(made: ConformalCalibration, shown: float | None) -> PredictionInterval | None:
            known = said[made.metric]
            return made.interval(known, level=level, shown=shown) if known else None

        dice = of_metric(self.dice, estimated.dice)
        return MetricIntervals(
            dice=dice,
            iou=None if dice is None else PredictionInterval(iou_of_dice(dice.low), iou_of_dice(dice.high), level),
            arvd=of_metric(self.arvd, estimated.arvd),
            rvd=of_metric(self.rvd, estimated.rvd),
        )


def mixed_intervals(one: MetricIntervals, other: MetricIntervals, share: float) -> MetricIntervals:
    """Between the intervals of two estimates of one mask, of which a share is of the first one's kind.

    Nothing is proven of these; how often they held was measured. None where one of both is.
    """

    def between(first: PredictionInterval | None, second: PredictionInterval | None) -> PredictionInterval | None:
        if first is None or second is None:
            return None
        low, high = (share * a + (1 - share) * b for a, b in ((first.low, second.low), (first.high, second.high)))
        return PredictionInterval(low, high, first.level)

    dice = between(one.dice, other.dice)
    return MetricIntervals(
        dice=dice,
        iou=None if dice is None else PredictionInterval(iou_of_dice(dice.low), iou_of_dice(dice.high), dice.level),
        arvd=between(one.arvd, other.arvd),
        rvd=between(one.rvd, other.rvd),
    )


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

    The network must not have trained from these patients. Pairs with an undefined number are left out. What is fitted
    is a line, see `fit_calibration`.

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
    masks = known_masks({"map": x}, truth, patients)

    def line(without: int) -> EstimateModel:
        known = masks.where(masks.patients != without)
        fitted = fit_calibration(known.values["map"], known.true, metric=metric, patients=known.patients)
        return EstimateModel("identity", fitted.intercept, {"map": fitted.slope})

    return jackknife(masks, metric, line)


def jackknife(masks: KnownMasks, metric: MetricName, fit: Callable[[int], EstimateModel]) -> ConformalCalibration:
    """Calibrate intervals around any estimate, chosen and fitted once without each patient.

    Args:
        masks: of patients that the network has not trained from.
        metric: the metric.
        fit: makes the model that is chosen and fitted without a patient, of this number.
    """
    found = []
    for patient in np.unique(masks.patients):
        own = masks.where(masks.patients == patient)
        others = masks.where(masks.patients != patient)
        model = fit(int(patient))
        floor = _fit_floor(_estimates(model, others.values, metric), others.true, metric)
        found.append(_scores(_estimates(model, own.values, metric), own.true, model, floor, metric))
    return ConformalCalibration(metric, tuple(found))


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """What is said of masks whose patient had no part in it: estimates and ends of intervals, arrays over masks."""

    estimates: Values
    low: Values
    high: Values


def held_out(calibration: ConformalCalibration, masks: KnownMasks, *, level: float = LEVEL) -> HeldOut:
    """The estimate of each mask by its patient's own model, and the interval around it by the others' scores.

    Args:
        calibration: what `jackknife` made of the masks.
        masks: the same masks.
        level: wanted coverage.
    """
    estimates, low, high = (np.full(masks.true.shape, np.nan) for _ in range(3))
    for patient, scores in zip(np.unique(masks.patients), calibration.patients, strict=True):
        own = masks.patients == patient
        values = masks.where(own).values
        others = (replace(p, model=scores.model, floor=scores.floor) for p in calibration.patients if p is not scores)
        estimates[own] = _estimates(scores.model, values, calibration.metric)
        low[own], high[own] = replace(calibration, patients=tuple(others)).bounds(values, level=level)
    return HeldOut(estimates, low, high)


def split_conformal(
    estimates: Sequence[float | None] | Values,
    truth: Sequence[float | None] | Values,
    patients: Sequence[str],
    metric: MetricName,
    model: EstimateModel = AS_IT_IS,
    floor: float = DEFAULT_FLOOR,
) -> ConformalCalibration:
    """Calibrate intervals on patients that neither the network nor the calibration has trained from.

    Args:
        estimates: the estimates as they are shown, one per mask.
        truth: the true metric of each.
        patients: whose mask it is.
        metric: the metric.
        model: what makes these estimates out of the witnesses; by default they are read off the error map.
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
    masks = known_masks({"map": estimates}, truth, patients)
    parts = (masks.where(masks.patients == patient) for patient in np.unique(masks.patients))
    found = (_scores(own.values["map"], own.true, model, floor, metric) for own in parts)
    return ConformalCalibration(metric, tuple(found))


def _estimates(model: EstimateModel, values: WitnessValues, metric: MetricName) -> Values:
    return np.asarray(np.clip(model.apply(values), *METRIC_RANGES[metric]), np.float64)


def _scores(estimates: Values, true: Values, model: EstimateModel, floor: float, metric: MetricName) -> PatientScores:
    scores = np.sort(np.abs(true - estimates) / _scale(estimates, floor, metric))
    return PatientScores(model, floor, tuple(scores.tolist()))


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
