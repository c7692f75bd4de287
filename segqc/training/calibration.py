"""From a network's logits to calibrated maps, and from estimates and truths to calibrated estimates with intervals.

The map first: Platt scaling of the error's logits moves estimates of all qualities, each metric and each slice, the way
that a line through one metric's estimates can't. Then a line per 3D metric takes what is left, where it does so for
patients that it was not fitted on (method, "Calibration").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares
from scipy.stats import spearmanr

from segqc.quality.calibration import MapCalibration, StructureCalibration
from segqc.quality.intervals import StructureIntervals, jackknife_plus
from segqc.quality.metrics import METRIC_NAMES, MIN_CALIBRATION_CASES, Values, fit_calibration, true_metrics
from segqc.types import BoolArray, FloatArray, Metrics

LogitCounts: TypeAlias = npt.NDArray[np.int64]

_EDGE, _STEP = 20.0, 0.05  # logits are counted from -_EDGE to _EDGE, those beyond with the last ones
_CENTRES = np.arange(-_EDGE, _EDGE, _STEP) + _STEP / 2
# what is believed before a mask is seen: with few masks the map stays what the network made it
_NOISE, _LOG_SCALE, _SHIFT = 0.03, 0.3, 0.5
_PARTS = 5  # of a cross-validation over patients
_ERRORS = 2.0  # standard errors that are noise


@dataclass(frozen=True, slots=True, eq=False)
class KnownMap:
    """The error's logits around one structure of a mask, counted, and the mask's true Dice (None: undefined).

    ``counts`` is (2, steps): outside the mask, and inside. ``patient`` is whose mask it is.
    """

    counts: LogitCounts
    dice: float | None
    patient: str


def known_map(logits: FloatArray, mask: BoolArray, truth: BoolArray, patient: str) -> KnownMap:
    """Count voxels by logit, outside and inside a mask: all that an estimated Dice depends on.

    Args:
        logits: of the error, (n0, n1, n2), before any calibration.
        mask: one structure's, of the same shape.
        truth: its truth.
        patient: whose they are.
    """
    step = np.clip((logits + np.float32(_EDGE)) / np.float32(_STEP), 0, len(_CENTRES) - 1).astype(np.int32)
    table = np.bincount((step + len(_CENTRES) * mask.astype(np.int32)).ravel(), minlength=2 * len(_CENTRES))
    return KnownMap(np.asarray(table.reshape(2, -1), np.int64), true_metrics(mask, truth).dice, patient)


def fit_map(known: Sequence[KnownMap]) -> MapCalibration:
    """Fit the Platt scaling of a structure's error logits, by the squared error of the estimated Dice of known masks.

    The network must not have trained from their patients. It is used where, in a cross-validation over patients, it
    lowers the mean absolute error of patients that it was not fitted on, and does not lower the rank correlation of
    their masks beyond its noise: scans are handed out in this order. Else, and with fewer than three masks, it is the
    identity.

    Args:
        known: what the network says of masks whose true Dice is known.
    """
    usable = [k for k in known if k.dice is not None]
    if len(usable) < MIN_CALIBRATION_CASES:
        return MapCalibration()
    maps = _Maps(
        outside=np.stack([k.counts[0] for k in usable]).astype(np.float64),
        inside=np.stack([k.counts[1] for k in usable]).astype(np.float64),
        true=np.array([k.dice for k in usable], np.float64),
        patients=np.asarray(np.unique([k.patient for k in usable], return_inverse=True)[1], np.int64),
    )
    return maps.fit() if maps.are_helped_by_a_fit() else MapCalibration()


@dataclass(frozen=True, slots=True, eq=False)
class _Maps:
    """Known maps as arrays over masks: counts (masks, steps), true Dice, and the number of the patient (masks,)."""

    outside: Values
    inside: Values
    true: Values
    patients: npt.NDArray[np.int64]

    def where(self, chosen: BoolArray) -> _Maps:
        return _Maps(self.outside[chosen], self.inside[chosen], self.true[chosen], self.patients[chosen])

    def dice(self, scale: float, shift: float) -> Values:
        """The estimated Dice of each mask, with the logits scaled."""
        p = 1 / (1 + np.exp(-np.clip(scale * _CENTRES + shift, -30, 30)))
        shared = self.inside @ (1 - p)
        truth = shared + self.outside @ p
        return np.asarray(2 * shared / np.maximum(self.inside.sum(axis=1) + truth, 1e-9), np.float64)

    def fit(self) -> MapCalibration:
        def residuals(parameters: Values) -> Values:
            log_scale, shift = parameters
            prior = [_NOISE * log_scale / _LOG_SCALE, _NOISE * shift / _SHIFT]
            return np.concatenate([self.dice(np.exp(log_scale), shift) - self.true, prior])

        log_scale, shift = least_squares(residuals, np.zeros(2), bounds=([-1.5, -3.0], [1.5, 3.0])).x
        return MapCalibration(float(np.exp(log_scale)), float(shift))

    def are_helped_by_a_fit(self) -> bool:
        """Whether a fit is of use for patients that it was not made on, see `fit_map`."""
        count = int(self.patients.max()) + 1
        if count < 2:
            return False
        gains, changes = np.zeros(self.true.size), list[float]()
        for part in range(min(_PARTS, count)):
            left_out = self.patients % _PARTS == part
            fitted, tested = self.where(~left_out).fit(), self.where(left_out)
            before, after = tested.dice(1.0, 0.0), tested.dice(fitted.scale, fitted.shift)
            gains[left_out] = np.abs(before - tested.true) - np.abs(after - tested.true)
            orders = [_rank_correlation(estimated, tested.true) for estimated in (before, after)]
            if not np.isnan(orders).any():
                changes.append(orders[1] - orders[0])
        error = np.std(changes, ddof=1) / np.sqrt(len(changes)) if len(changes) > 1 else np.inf
        keeps_order = not changes or np.mean(changes) + _ERRORS * error >= 0
        by_patient = np.bincount(self.patients, gains) / np.bincount(self.patients)
        return bool(by_patient.mean() > 0 and keeps_order)


def _rank_correlation(estimated: Values, true: Values) -> float:
    """Spearman's correlation within one part, as between parts the fits differ; NaN where one side is flat."""
    if true.size < MIN_CALIBRATION_CASES or np.ptp(true) == 0 or np.ptp(estimated) == 0:
        return np.nan
    return float(spearmanr(estimated, true).statistic)


def fit_structure(
    estimates: Sequence[Metrics], truths: Sequence[Metrics], patients: Sequence[str]
) -> StructureCalibration:
    """Calibrate one structure's four 3D metrics and their intervals (method, "Calibration"; `segqc.quality.intervals`).

    The network must not have trained from these patients: they validate, or each estimate is of the fold network that
    has not seen its patient. The line is fitted on all masks, each patient's residuals are against a line without it;
    the two numbers of the map's scaling before it are of all patients.

    Args:
        estimates: as read off the error maps, one per mask.
        truths: the true metrics, in the same order.
        patients: whose mask it is.

    Returns:
        The calibration, without a largest error box.

    Raises:
        ValueError: if the three differ in length.
    """
    columns = {
        name: ([getattr(e, name) for e in estimates], [getattr(t, name) for t in truths]) for name in METRIC_NAMES
    }
    lines = {name: fit_calibration(x, truth, metric=name, patients=patients) for name, (x, truth) in columns.items()}
    made = {name: jackknife_plus(x, truth, patients, name) for name, (x, truth) in columns.items()}
    intervals = StructureIntervals(made["dice"], made["iou"], made["arvd"], made["rvd"])
    return StructureCalibration(**lines, largest_box_mm2=None, intervals=intervals)
