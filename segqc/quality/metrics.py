"""Dice, IoU, ARVD and RVD of a mask: against a truth, or estimated from error probabilities (paper, section 3.2).

With M the mask, T the truth, E the error probability and T^ = M(1 - E) + (1 - M)E the estimated truth, per structure:

| metric | estimate | truth |
| --- | --- | --- |
| Dice | `2 sum(M(1-E)) / (sum M + sum T^)` | `2 sum(MT) / (sum M + sum T)` |
| IoU | `sum(M(1-E)) / (sum M + sum T^ - sum(M(1-E)))` | `sum(MT) / sum(M or T)` |
| ARVD | `sum E / sum T^` | `sum abs(M-T) / sum T` |
| RVD | `(sum M - sum T^) / sum T^` | `(sum M - sum T) / sum T` |

Empty masks: both empty is perfect (1, 1, 0, 0) and not counted in averages over slices; only T empty gives Dice and
IoU 0 and leaves ARVD and RVD undefined; only M empty gives Dice and IoU 0, ARVD 1, RVD -1. Where E = |T - M|, the
estimates equal the true metrics.

ARVD is the paper's: the summed difference over the size of T. It is not the size of RVD, |RVD|, in which what is missed
and what is wrongly included cancel out, and which it is never below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from segqc.quality.error_maps import bounding_box
from segqc.types import BoolArray, FloatArray, Metrics

MetricName: TypeAlias = Literal["dice", "iou", "arvd", "rvd"]
Values: TypeAlias = npt.NDArray[np.float64]
Axes: TypeAlias = tuple[int, ...]

METRIC_NAMES: tuple[MetricName, ...] = ("dice", "iou", "arvd", "rvd")
METRIC_RANGES: Mapping[MetricName, tuple[float, float | None]] = MappingProxyType(
    {"dice": (0.0, 1.0), "iou": (0.0, 1.0), "arvd": (0.0, None), "rvd": (-1.0, None)}
)
PEAK_OF_A_TRUTH = 0.5
MIN_CALIBRATION_CASES = 3
MIN_SLOPE = 0.01
_TOLERANCE = 1e-12
_PARTS = 5  # of a cross-validation over patients
_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class EmptyRule:
    """When an estimated truth counts as empty: no voxel reaches one half, and its sum is under a volume.

    Probabilities never sum to zero; without the rule a structure that is absent would seem to have been missed.

    Attributes:
        max_sum_mm3: the volume that the sum of an empty estimated truth stays under (in a slice: that slice's sum).
        voxel_volume_mm3: the volume of one voxel.
    """

    max_sum_mm3: float = 10.0
    voxel_volume_mm3: float = 1.0

    def __post_init__(self) -> None:
        if not (self.max_sum_mm3 >= 0 and self.voxel_volume_mm3 > 0):
            raise ValueError(f"an empty rule needs a volume >= 0 mm3 and a voxel volume > 0 mm3, got {self}")


@dataclass(frozen=True, slots=True)
class SliceMeans:
    """Means of 2D metrics: each over the counted slices where it is defined; ``counted`` is their number (the n)."""

    metrics: Metrics
    counted: int


@dataclass(frozen=True, slots=True, eq=False)
class SliceMetrics:
    """2D metrics of every slice: arrays over slices, NaN where undefined.

    Attributes:
        dice, iou, arvd, rvd: the metrics.
        truth_voxels: sum of the (estimated) truth in each slice, 0 where it counts as empty.
        counted: slices where mask or truth is non-empty, the ones that averages are over.
    """

    dice: Values
    iou: Values
    arvd: Values
    rvd: Values
    truth_voxels: Values
    counted: BoolArray

    def __len__(self) -> int:
        return len(self.counted)

    def at(self, index: int) -> Metrics:
        """Return one slice's metrics, None where undefined."""
        return Metrics(*(_number(values[index]) for values in (self.dice, self.iou, self.arvd, self.rvd)))

    def each(self) -> tuple[Metrics, ...]:
        """Return all slices' metrics, as `at` does a slice's."""
        table = np.stack([self.dice, self.iou, self.arvd, self.rvd], axis=1)
        undefined = np.isnan(table)
        values = table.astype(object)
        values[undefined] = None
        return tuple(Metrics(*row) for row in values.tolist())

    def mean(self, where: BoolArray | None = None) -> SliceMeans:
        """Average over the counted slices.

        Args:
            where: a further choice of slices, for example ``truth_voxels >= 20`` for the ARVD.
        """
        chosen = self.counted if where is None else self.counted & where
        columns = [values[chosen] for values in (self.dice, self.iou, self.arvd, self.rvd)]
        defined = [values[~np.isnan(values)] for values in columns]
        return SliceMeans(Metrics(*(float(v.mean()) if v.size else None for v in defined)), int(chosen.sum()))


def true_metrics(mask: BoolArray, truth: BoolArray) -> Metrics:
    """Compare a mask with the truth, in 3D.

    Args:
        mask: (n0, n1, n2).
        truth: of the mask's shape.

    Raises:
        ValueError: if the arrays are not 3-D or differ in shape.

    Example:
        The mask lacks one of three slices of the truth.

        >>> truth = np.zeros((4, 4, 3), bool)
        >>> truth[:, :2] = True
        >>> mask = truth.copy()
        >>> mask[:, :, 2] = False
        >>> true_metrics(mask, truth)
        Metrics(dice=0.8, iou=0.666..., arvd=0.333..., rvd=-0.333...)
    """
    return _true(mask, truth, (0, 1, 2)).at(0)


def true_slice_metrics(mask: BoolArray, truth: BoolArray, axis: int) -> SliceMetrics:
    """Compare a mask with the truth in every slice along ``axis``; arguments and errors as `true_metrics`.

    Example:
        >>> truth = np.ones((4, 4, 3), bool)
        >>> mask = truth.copy()
        >>> mask[:, :, 2] = False
        >>> slices = true_slice_metrics(mask, truth, axis=2)
        >>> slices.dice.tolist()
        [1.0, 1.0, 0.0]
        >>> slices.at(2)
        Metrics(dice=0.0, iou=0.0, arvd=1.0, rvd=-1.0)
        >>> slices.mean().counted
        3
    """
    return _true(mask, truth, _in_plane(axis))


def true_metrics_with_slices(mask: BoolArray, truth: BoolArray, axis: int) -> tuple[Metrics, SliceMetrics]:
    """What `true_metrics` and `true_slice_metrics` return, for one look at the voxels; errors as theirs."""
    counts = _overlap(mask, truth, _in_plane(axis))
    return _of_counts(*(count.sum(keepdims=True) for count in counts)).at(0), _of_counts(*counts)


def estimated_metrics(mask: BoolArray, error: FloatArray, *, empty: EmptyRule) -> Metrics:
    """Estimate a mask's metrics from the probability that each of its voxels is wrong, in 3D.

    Args:
        mask: (n0, n1, n2).
        error: probabilities, of the mask's shape.
        empty: when the estimated truth counts as empty.

    Raises:
        ValueError: if the arrays are not 3-D or differ in shape.

    Example:
        Each of the mask's 20 voxels is wrong with a probability of one quarter: 15 are expected to be right.

        >>> mask = np.ones((2, 2, 5), bool)
        >>> error = np.full((2, 2, 5), 0.25)
        >>> estimated_metrics(mask, error, empty=EmptyRule())
        Metrics(dice=0.857..., iou=0.75, arvd=0.333..., rvd=0.333...)
    """
    return _from_sums(_error_sums(mask, error, 2).total(), mask, error, (0, 1, 2), empty).at(0)


def estimated_slice_metrics(mask: BoolArray, error: FloatArray, axis: int, *, empty: EmptyRule) -> SliceMetrics:
    """Estimate a mask's metrics in every slice along ``axis``; arguments and errors as `estimated_metrics`."""
    return _from_sums(_error_sums(mask, error, axis), mask, error, _in_plane(axis), empty)


def estimated_metrics_and_slices(
    mask: BoolArray,
    error: FloatArray,
    axis: int,
    *,
    empty: EmptyRule,
    elsewhere: Values | float = 0.0,
    slices: slice = _ALL,
) -> tuple[Metrics, SliceMetrics, Values]:
    """Both `estimated_metrics` and `estimated_slice_metrics`, and the slices' error sums, by one look at each voxel.

    Args:
        mask: (n0, n1, n2).
        error: probabilities, of the mask's shape.
        axis: the through-plane axis.
        empty: when the estimated truth counts as empty.
        elsewhere: the error's sum in the rest of each slice of a scan, where the arrays are a part of it; the rest
            holds no voxel of the mask, and none that is wrong with a probability of one half.
        slices: the scan's slices that the arrays have a part of; all of them by default.

    Raises:
        ValueError: if the arrays are not 3-D or differ in shape.
    """
    sums = _error_sums(mask, error, axis, elsewhere, slices)
    whole = _from_sums(sums.total(), mask, error, (0, 1, 2), empty)
    return whole.at(0), _from_sums(sums, mask, error, _in_plane(axis), empty, slices), sums.wrong


def slice_sums(values: FloatArray, axis: int) -> Values:
    """The sums of all slices of (n0, n1, n2) along an axis, in double precision."""
    first, second = _in_plane(axis)  # over both at once NumPy takes twice as long
    return np.asarray(values.sum(axis=first, dtype=np.float64).sum(axis=second - 1))


def truth_is_empty(mask: BoolArray, error: FloatArray, *, empty: EmptyRule, elsewhere: float = 0.0) -> bool:
    """Whether the estimated truth counts as empty in the whole volume; arguments and errors as `estimated_metrics`.

    ``elsewhere`` is the error's sum in the rest of a scan, see `estimated_metrics_and_slices`.

    Example:
        48 voxels that are wrong with a probability of 0.01 add up to half a cubic millimetre.

        >>> mask = np.zeros((4, 4, 3), bool)
        >>> truth_is_empty(mask, np.full((4, 4, 3), 0.01), empty=EmptyRule(max_sum_mm3=10, voxel_volume_mm3=1))
        True
    """
    total = _error_sums(mask, error, 2).total()
    total = replace(total, wrong=total.wrong + elsewhere)
    return not _from_sums(total, mask, error, (0, 1, 2), empty).truth_voxels[0]


def _true(mask: BoolArray, truth: BoolArray, over: Axes) -> SliceMetrics:
    return _of_counts(*_overlap(mask, truth, over))


def _overlap(mask: BoolArray, truth: BoolArray, over: Axes) -> tuple[Values, Values, Values]:
    """Voxels of the mask, of the truth, and of both."""
    _check(mask, truth)
    mask, truth = mask.astype(bool, copy=False), truth.astype(bool, copy=False)
    return _counts(mask, over), _counts(truth, over), _counts(mask & truth, over)


def _of_counts(in_mask: Values, in_truth: Values, in_both: Values) -> SliceMetrics:
    return _ratios(in_mask, in_truth, in_both, in_mask + in_truth - 2 * in_both)


@dataclass(frozen=True, slots=True, eq=False)
class _ErrorSums:
    """Voxels of the mask, and the error's sums everywhere and in the mask; arrays over slices, or of one number."""

    in_mask: Values
    wrong: Values
    wrong_in_mask: Values

    def total(self) -> _ErrorSums:
        return _ErrorSums(*(values.sum(keepdims=True) for values in (self.in_mask, self.wrong, self.wrong_in_mask)))


def _error_sums(
    mask: BoolArray, error: FloatArray, axis: int, elsewhere: Values | float = 0.0, slices: slice = _ALL
) -> _ErrorSums:
    _check(mask, error)
    wrong = np.array(elsewhere) if isinstance(elsewhere, np.ndarray) else np.full(mask.shape[axis], elsewhere)
    wrong[slices] += slice_sums(error, axis)
    in_mask, wrong_in_mask = np.zeros_like(wrong), np.zeros_like(wrong)
    box = bounding_box(mask)
    if box is not None:
        in_mask[slices][box[axis]] = _counts(mask[box], _in_plane(axis))
        wrong_in_mask[slices][box[axis]] = slice_sums(np.where(mask[box], error[box], 0), axis)
    return _ErrorSums(in_mask, wrong, wrong_in_mask)


def _from_sums(
    sums: _ErrorSums, mask: BoolArray, error: FloatArray, over: Axes, empty: EmptyRule, slices: slice = _ALL
) -> SliceMetrics:
    right = sums.in_mask - sums.wrong_in_mask
    in_truth = np.maximum(right + (sums.wrong - sums.wrong_in_mask), 0.0)  # rounding may leave -1e-16
    blank = in_truth * empty.voxel_volume_mm3 < empty.max_sum_mm3
    if blank.any():
        # M(1-E) + (1-M)E reaches one half where E is at most one half inside the mask, or at least that outside it
        peaks = np.where(mask, error <= PEAK_OF_A_TRUTH, error >= PEAK_OF_A_TRUTH)
        blank[slices] &= ~peaks.any(axis=over)
    in_both, in_truth = np.where(blank, 0.0, right), np.where(blank, 0.0, in_truth)
    return _ratios(sums.in_mask, in_truth, in_both, sums.wrong)


def _ratios(in_mask: Values, in_truth: Values, in_both: Values, wrong: Values) -> SliceMetrics:
    """The four metrics from sums: of the mask, of the truth, of their overlap and of their difference."""
    counted = (in_mask > 0) | (in_truth > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        dice = np.where(counted, 2 * in_both / (in_mask + in_truth), 1.0)
        iou = np.where(counted, in_both / (in_mask + in_truth - in_both), 1.0)
        arvd = np.where(in_truth > 0, wrong / in_truth, np.where(counted, np.nan, 0.0))
        rvd = np.where(in_truth > 0, (in_mask - in_truth) / in_truth, np.where(counted, np.nan, 0.0))
    return SliceMetrics(dice, iou, arvd, rvd, in_truth, counted)


def _check(mask: BoolArray, other: BoolArray | FloatArray) -> None:
    if mask.ndim != 3 or mask.shape != other.shape:
        raise ValueError(f"metrics need two 3-D arrays of one shape, got {mask.shape} and {other.shape}")


def _in_plane(axis: int) -> Axes:
    if not -3 <= axis < 3:
        raise ValueError(f"the through-plane axis of a 3-D array is 0, 1 or 2, got {axis}")
    return tuple(a for a in range(3) if a != axis % 3)


def _counts(mask: BoolArray, over: Axes) -> Values:
    if len(over) == mask.ndim:
        return np.array([np.count_nonzero(mask)], np.float64)
    first, *others = over
    counts = np.count_nonzero(mask, axis=first)  # over several axes at once NumPy takes several times as long
    return np.array(counts.sum(axis=tuple(axis - 1 for axis in others)), np.float64)


def _number(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)


@dataclass(frozen=True, slots=True)
class LinearCalibration:
    """``slope * estimate + intercept``, clipped to [low, high] where those are given (method, "Calibration")."""

    slope: float = 1.0
    intercept: float = 0.0
    low: float | None = None
    high: float | None = None

    @overload
    def apply(self, values: float) -> float: ...
    @overload
    def apply(self, values: Values) -> Values: ...
    def apply(self, values: float | Values) -> float | Values:
        """Calibrate one estimate or an array of them; NaN stays NaN."""
        low = -np.inf if self.low is None else self.low
        high = np.inf if self.high is None else self.high
        calibrated = np.asarray(values, np.float64) * self.slope + self.intercept
        if not isinstance(values, np.ndarray):
            return float(np.clip(calibrated, low, high))
        return np.asarray(np.clip(calibrated, low, high), np.float64)


def fit_calibration(
    estimated: Sequence[float | None] | Values,
    true: Sequence[float | None] | Values,
    *,
    metric: MetricName | None = None,
    patients: Sequence[str] | npt.NDArray[np.str_ | np.int64] | None = None,
) -> LinearCalibration:
    """Fit the line of least absolute errors, on estimates of networks that have not seen these truths.

    The absolute error is what estimates are judged by, and a few slices with a truth of two voxels, whose ARVD may be
    100, do not turn this line. Its error is convex in the slope; the best intercept of a slope is a median.

    Pairs with an undefined number are left out. With fewer than 3 pairs, or estimates that are all alike, the
    calibration is the identity. The slope is at least 0.01: a flat line would lose the order of the scans, a falling
    one turn it around.

    Args:
        estimated: one metric's estimates.
        true: the true values, in the same order.
        metric: the metric whose range bounds calibrated values; None leaves them unbounded.
        patients: whose mask or slice each is. Then there is a line only where it lowers the mean absolute error of
            patients that it was not fitted on, by cross-validation: an error map that is calibrated itself may need
            none.

    Raises:
        ValueError: if they differ in length.
    """
    low, high = METRIC_RANGES[metric] if metric is not None else (None, None)
    x, y = np.array(estimated, np.float64), np.array(true, np.float64)
    if x.shape != y.shape or x.ndim != 1 or (patients is not None and len(patients) != x.size):
        of = "" if patients is None else f", of {len(patients)} masks' patients"
        raise ValueError(f"a calibration needs as many estimates as true values, got {x.size} and {y.size}{of}")
    defined = np.isfinite(x) & np.isfinite(y)
    x, y = x[defined], y[defined]
    whose = None if patients is None else np.unique(np.asarray(patients)[defined], return_inverse=True)[1]
    if not _spread(x) or (whose is not None and not _of_use(x, y, whose, low, high)):
        return LinearCalibration(low=low, high=high)
    return _least_absolute_errors(x, y, low, high)


def _spread(x: Values) -> bool:
    """Whether estimates are enough for a line, and not all alike."""
    return x.size >= MIN_CALIBRATION_CASES and float(np.ptp(x)) > 1e-9 * max(1.0, float(np.abs(x).max()))


def _of_use(x: Values, y: Values, patients: npt.NDArray[np.int64], low: float | None, high: float | None) -> bool:
    """Whether a line lowers the error of patients that it was not fitted on, each patient counting once.

    Args:
        x: estimates.
        y: truths.
        patients: the number of each one's patient.
        low: the least calibrated value.
        high: the largest one.
    """
    count = int(patients.max()) + 1
    gains = np.abs(LinearCalibration(low=low, high=high).apply(x) - y)
    for part in range(min(_PARTS, count)):
        left_out = patients % _PARTS == part
        if not _spread(x[~left_out]):
            return False  # too few patients to tell
        line = _least_absolute_errors(x[~left_out], y[~left_out], low, high)
        gains[left_out] -= np.abs(line.apply(x[left_out]) - y[left_out])
    mean = np.bincount(patients, gains) / np.bincount(patients)
    return bool(mean.mean() > 0)


@dataclass(frozen=True, slots=True)
class _Tangent:
    """The sum of absolute errors of the best line of a slope, and how fast it grows with the slope."""

    slope: float
    error: float
    growth: float


def _least_absolute_errors(x: Values, y: Values, low: float | None, high: float | None) -> LinearCalibration:
    """The line, by Kelley's method: the error is convex in the slope and lies above each of its tangents.

    The next slope to look at is where two tangents meet; the lowest error is found when it lies there itself.
    """
    half = x.size // 2

    def tangent(slope: float) -> _Tangent:
        # distances from the median add up to the upper half less the lower one
        left = y - slope * x
        order = np.argpartition(left, (half, x.size - half))
        lower, upper = order[:half], order[x.size - half :]
        error = left[upper].sum() - left[lower].sum()
        return _Tangent(slope, float(error), float(x[lower].sum() - x[upper].sum()))

    falling, rising = tangent(MIN_SLOPE), tangent(1.0)
    while falling.growth < 0 and rising.growth < 0:
        falling, rising = rising, tangent(2 * rising.slope)
    best = falling if falling.growth >= 0 else rising
    while falling.growth < 0 < rising.growth:
        step = (rising.slope - falling.slope) * rising.growth - (rising.error - falling.error)
        middle = tangent(falling.slope + step / (rising.growth - falling.growth))
        best = min(falling, middle, rising, key=lambda t: t.error)
        bound = falling.error + falling.growth * (middle.slope - falling.slope)
        if not falling.slope < middle.slope < rising.slope or middle.error <= bound + _TOLERANCE * falling.error:
            break
        falling, rising = (middle, rising) if middle.growth < 0 else (falling, middle)
    return LinearCalibration(best.slope, float(np.median(y - best.slope * x)), low, high)
