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

from segqc.quality.calibration import MapCalibration, StructureCalibration
from segqc.quality.intervals import StructureIntervals, jackknife_plus
from segqc.quality.metrics import METRIC_NAMES, MIN_CALIBRATION_CASES, fit_calibration, true_metrics
from segqc.types import BoolArray, FloatArray, Metrics

LogitCounts: TypeAlias = npt.NDArray[np.int64]

_EDGE, _STEP = 20.0, 0.05  # logits are counted from -_EDGE to _EDGE, those beyond with the last ones
_CENTRES = np.arange(-_EDGE, _EDGE, _STEP) + _STEP / 2
# what is believed before a mask is seen: with few masks the map stays what the network made it
_NOISE, _LOG_SCALE, _SHIFT = 0.03, 0.3, 0.5


@dataclass(frozen=True, slots=True, eq=False)
class KnownMap:
    """The error's logits around one structure of a mask, counted, and the mask's true Dice (None: undefined).

    ``counts`` is (2, steps): outside the mask, and inside.
    """

    counts: LogitCounts
    dice: float | None


def known_map(logits: FloatArray, mask: BoolArray, truth: BoolArray) -> KnownMap:
    """Count voxels by logit, outside and inside a mask: all that an estimated Dice depends on.

    Args:
        logits: of the error, (n0, n1, n2), before any calibration.
        mask: one structure's, of the same shape.
        truth: its truth.
    """
    step = np.clip((logits + np.float32(_EDGE)) / np.float32(_STEP), 0, len(_CENTRES) - 1).astype(np.int32)
    table = np.bincount((step + len(_CENTRES) * mask.astype(np.int32)).ravel(), minlength=2 * len(_CENTRES))
    return KnownMap(np.asarray(table.reshape(2, -1), np.int64), true_metrics(mask, truth).dice)


def fit_map(known: Sequence[KnownMap]) -> MapCalibration:
    """Fit the Platt scaling of a structure's error logits, by the squared error of the estimated Dice of known masks.

    The network must not have trained from their patients. With fewer than three masks it is the identity.

    Args:
        known: what the network says of masks whose true Dice is known.
    """
    usable = [k for k in known if k.dice is not None]
    if len(usable) < MIN_CALIBRATION_CASES:
        return MapCalibration()
    outside, inside = (np.stack([k.counts[i] for k in usable]).astype(np.float64) for i in (0, 1))
    size, true = inside.sum(axis=1), np.array([k.dice for k in usable], np.float64)

    def residuals(parameters: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        log_scale, shift = parameters
        p = 1 / (1 + np.exp(-np.clip(np.exp(log_scale) * _CENTRES + shift, -30, 30)))
        shared = inside @ (1 - p)
        truth = shared + outside @ p
        dice = 2 * shared / np.maximum(size + truth, 1e-9)
        return np.concatenate([dice - true, [_NOISE * log_scale / _LOG_SCALE, _NOISE * shift / _SHIFT]])

    log_scale, shift = least_squares(residuals, np.zeros(2), bounds=([-1.5, -3.0], [1.5, 3.0])).x
    return MapCalibration(float(np.exp(log_scale)), float(shift))


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
