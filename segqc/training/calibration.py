"""From a network's logits to calibrated maps, and from estimates and truths to calibrated estimates with intervals.

The map first: Platt scaling of the error's logits moves estimates of all qualities, each metric and each slice, the way
that a line through one metric's estimates can't. Then what is left is taken by an estimate per kind of mask and metric,
where it does so for patients that it was not fitted on (`segqc.quality.stacking`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares
from scipy.stats import spearmanr

from segqc.quality.calibration import MapCalibration, MaskCalibration, said_of
from segqc.quality.intervals import LEVEL, ConformalCalibration, StructureIntervals, held_out, jackknife
from segqc.quality.metrics import MIN_CALIBRATION_CASES, MetricName, Values, true_metrics
from segqc.quality.stacking import (
    ARVD_CHOICES,
    DICE_OF_OTHERS,
    DICE_OF_PEOPLE,
    DICE_OF_SERVED,
    RVD_CHOICES,
    Choice,
    ChosenEstimate,
    KnownMasks,
    WitnessName,
    fit_estimates,
    iou_of_dice,
    known_masks,
)
from segqc.types import NO_WITNESSES, BoolArray, FloatArray, MaskKind, Metrics, PredictionInterval, Witnesses

LogitCounts: TypeAlias = npt.NDArray[np.int64]

_EDGE, _STEP = 20.0, 0.05  # logits are counted from -_EDGE to _EDGE, those beyond with the last ones
_CENTRES = np.arange(-_EDGE, _EDGE, _STEP) + _STEP / 2
# what is believed before a mask is seen: with few masks the map stays what the network made it
_NOISE, _LOG_SCALE, _SHIFT = 0.03, 0.3, 0.5
_METRICS: Final[tuple[MetricName, ...]] = ("dice", "arvd", "rvd")  # the IoU follows from the Dice
_WITNESSES: Final[Mapping[MetricName, tuple[WitnessName, ...]]] = MappingProxyType(
    {"dice": ("map", "soft", "entropy", "size"), "arvd": ("map", "dice"), "rvd": ("map",)}
)
_DICE_CHOICES: Final[Mapping[MaskKind, Sequence[Choice]]] = MappingProxyType(
    {"served": DICE_OF_SERVED, "strange": DICE_OF_OTHERS, "person": DICE_OF_PEOPLE}
)
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


@dataclass(frozen=True, slots=True)
class KnownMask:
    """One structure of a mask whose truth is known, and what is said of it.

    Attributes:
        patient, scan: whose mask it is.
        raw: the metrics as read off the error map of a network that has not seen the patient.
        true: the true ones.
        witnesses: what speaks of the mask beside the map.
    """

    patient: str
    scan: str
    raw: Metrics
    true: Metrics
    witnesses: Witnesses = NO_WITNESSES


def fit_masks(kind: MaskKind, structures: Sequence[Sequence[KnownMask]]) -> tuple[MaskCalibration, ...]:
    """Calibrate the metrics of one kind of masks, and their intervals (`segqc.quality.stacking`, `.intervals`).

    Each estimate is chosen and fitted on all patients; each patient's residuals are against one that was chosen and
    fitted without it. The two numbers of the map's scaling before it are of all patients.

    Args:
        kind: the kind of masks.
        structures: of each structure, the same masks, of patients that neither of the networks has trained from.

    Returns:
        One of each structure.
    """
    dice, arvd, rvd = (_fit(kind, metric, structures) for metric in _METRICS)
    return tuple(
        MaskCalibration(d.chosen, a.chosen, r.chosen, StructureIntervals(d.intervals, a.intervals, r.intervals))
        for d, a, r in zip(dice, arvd, rvd, strict=True)
    )


@dataclass(frozen=True, slots=True)
class HeldOutMask:
    """The final estimates of a mask and the interval of its Dice, chosen and fitted without its patient."""

    known: KnownMask
    estimated: Metrics
    interval: PredictionInterval | None


def held_out_masks(kind: MaskKind, known: Sequence[KnownMask], calibration: MaskCalibration) -> tuple[HeldOutMask, ...]:
    """What is said of the masks that a calibration was fitted on, each time without the mask's own patient.

    Args:
        kind: the kind of masks.
        known: the masks, of one structure.
        calibration: what `fit_masks` made of them.
    """
    if calibration.intervals is None:
        raise ValueError("estimates of held-out patients need a calibration with intervals")
    columns: dict[MetricName, list[float | None]] = {}
    ends: list[PredictionInterval | None] = [None] * len(known)
    for metric in _METRICS:
        made: ConformalCalibration = getattr(calibration.intervals, metric)
        masks, rows = _known_masks(kind, metric, known)
        found = held_out(made, masks)
        columns[metric] = [None] * len(known)
        for row, estimate, low, high in zip(rows, found.estimates, found.low, found.high, strict=True):
            columns[metric][row] = float(estimate)
            if metric == "dice" and not np.isnan(low):
                ends[row] = PredictionInterval(float(low), float(high), LEVEL)
    dice = columns["dice"]
    return tuple(
        HeldOutMask(
            mask,
            Metrics(dice[i], None if (d := dice[i]) is None else iou_of_dice(d), columns["arvd"][i], columns["rvd"][i]),
            ends[i],
        )
        for i, mask in enumerate(known)
    )


def _choices(kind: MaskKind, metric: MetricName) -> Sequence[Choice]:
    if metric == "rvd":
        return RVD_CHOICES
    if metric == "arvd":
        return ARVD_CHOICES
    return _DICE_CHOICES[kind]


@dataclass(frozen=True, slots=True)
class _Fitted:
    """One metric of one structure."""

    chosen: ChosenEstimate
    intervals: ConformalCalibration


def _fit(kind: MaskKind, metric: MetricName, structures: Sequence[Sequence[KnownMask]]) -> list[_Fitted]:
    masks = [_known_masks(kind, metric, known)[0] for known in structures]
    choices = _choices(kind, metric)
    without = {
        int(patient): fit_estimates([m.where(m.patients != patient) for m in masks], metric, choices)
        for patient in np.unique(np.concatenate([m.patients for m in masks]))
    }
    return [
        _Fitted(chosen, jackknife(m, metric, {p: of_all[k].model for p, of_all in without.items()}.__getitem__))
        for k, (chosen, m) in enumerate(zip(fit_estimates(masks, metric, choices), masks, strict=True))
    ]


def _known_masks(kind: MaskKind, metric: MetricName, known: Sequence[KnownMask]) -> tuple[KnownMasks, list[int]]:
    """The masks whose truth and witnesses are known, and which they are."""
    wanted = _WITNESSES[metric] if kind == "served" or metric != "dice" else ("map",)
    said = [said_of(metric, k.raw, k.witnesses) for k in known]
    # of one or two patients nobody knows the others' sizes
    names = [name for name in wanted if name == "map" or any(name in values for values in said)]
    true: list[float | None] = [getattr(k.true, metric) for k in known]
    rows = [i for i, values in enumerate(said) if values.keys() >= set(names) and true[i] is not None]
    masks = known_masks({name: [s.get(name) for s in said] for name in names}, true, [k.patient for k in known])
    return masks, rows
