"""Calibrations of error maps and of estimated metrics (method, "Calibration")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from segqc.quality.intervals import LEVEL, StructureIntervals
from segqc.quality.metrics import METRIC_NAMES, METRIC_RANGES, MetricName
from segqc.quality.stacking import NOTHING_CHOSEN, ChosenEstimate, WitnessName, arvd_of_dice, iou_of_dice
from segqc.types import BoolArray, FloatArray, MaskKind, MetricIntervals, Metrics, Witnesses

OutputForm: TypeAlias = Literal["truth", "direct"]
_MIN_DEVIATION = 1e-3


@dataclass(frozen=True, slots=True)
class TrainingSizes:
    """The sizes of a structure in the training: mean and standard deviation of the logarithm of its mm^3."""

    mean: float
    deviation: float

    def witness(self, mask: BoolArray, voxel_volume_mm3: float) -> float:
        """Minus the distance of a mask's size from the mean, in standard deviations."""
        return -abs(log_volume(mask, voxel_volume_mm3) - self.mean) / self.deviation


def training_sizes(log_volumes: Sequence[float]) -> TrainingSizes | None:
    """The mean and spread of sizes, see `log_volume`; None with fewer than two."""
    if len(log_volumes) < 2:
        return None
    return TrainingSizes(float(np.mean(log_volumes)), max(float(np.std(log_volumes)), _MIN_DEVIATION))


def log_volume(mask: BoolArray, voxel_volume_mm3: float) -> float:
    """The logarithm of a mask's volume in mm^3; an empty mask counts as half a voxel."""
    return float(np.log(max(float(np.count_nonzero(mask)), 0.5) * voxel_volume_mm3))


@dataclass(frozen=True, slots=True)
class MaskCalibration:
    """How one kind of masks of one structure is estimated.

    ``intervals`` are no part of a model's version: they are made anew from audit draws, and the estimates stay what
    they were.

    ``least_evidence`` is what error boxes of a right mask reach, but for a few of them: a box of a likely error has
    more (`ErrorBox.evidence`). None where boxes are bounded by their area.
    """

    dice: ChosenEstimate = NOTHING_CHOSEN
    arvd: ChosenEstimate = NOTHING_CHOSEN
    rvd: ChosenEstimate = NOTHING_CHOSEN
    intervals: StructureIntervals | None = None
    least_evidence: float | None = None

    def estimates(self, raw: Metrics, witnesses: Witnesses) -> Metrics:
        """The numbers to show of a mask; None where the error map's metric is undefined.

        Args:
            raw: as read off the error map.
            witnesses: what speaks of the mask beside it.
        """
        dice = _estimate("dice", self.dice, said_of("dice", raw, witnesses))
        return Metrics(
            dice=dice,
            iou=None if dice is None else iou_of_dice(dice),
            arvd=_estimate("arvd", self.arvd, said_of("arvd", raw, witnesses)),
            rvd=_estimate("rvd", self.rvd, said_of("rvd", raw, witnesses)),
        )

    def intervals_of(
        self, raw: Metrics, witnesses: Witnesses, estimated: Metrics, *, level: float = LEVEL
    ) -> MetricIntervals:
        """The intervals of these estimates; undefined ones without `intervals`."""
        if self.intervals is None:
            return MetricIntervals()
        said = {metric: said_of(metric, raw, witnesses) for metric in METRIC_NAMES}
        return self.intervals.of(said, estimated, level=level)


def mixed_estimates(one: Metrics, other: Metrics, share: float) -> Metrics:
    """Between two estimates of one mask, of which a share is of the first one's kind; None where one is undefined."""
    dice, arvd, rvd = (
        _between(*pair, share) for pair in ((one.dice, other.dice), (one.arvd, other.arvd), (one.rvd, other.rvd))
    )
    return Metrics(dice=dice, iou=None if dice is None else iou_of_dice(dice), arvd=arvd, rvd=rvd)


def _between(one: float | None, other: float | None, share: float) -> float | None:
    return None if one is None or other is None else share * one + (1 - share) * other


def said_of(metric: MetricName, raw: Metrics, witnesses: Witnesses) -> dict[WitnessName, float]:
    """What is known of one metric of a mask, by witness; nothing where it is undefined on the error map.

    Args:
        metric: the metric.
        raw: as read off the error map.
        witnesses: what speaks of the mask beside it.
    """
    of_map: float | None = getattr(raw, metric)
    if of_map is None:
        return {}
    said: dict[WitnessName, float | None] = {"map": of_map}
    if metric == "dice":
        said |= {"soft": witnesses.soft, "entropy": witnesses.entropy, "size": witnesses.size}
    elif metric == "arvd":
        said["dice"] = None if raw.dice is None else arvd_of_dice(raw.dice)
    return {name: value for name, value in said.items() if value is not None}


def _estimate(metric: MetricName, chosen: ChosenEstimate, said: Mapping[WitnessName, float]) -> float | None:
    if "map" not in said:
        return None
    values = {name: np.array([value], np.float64) for name, value in said.items()}
    return float(np.clip(chosen.model.apply(values), *METRIC_RANGES[metric])[0])


@dataclass(frozen=True, slots=True)
class StructureCalibration:
    """What is known of one structure from masks of unseen patients.

    Attributes:
        kinds: the calibration of each kind of masks; "strange" is always there.
        sizes: the sizes of the structure in the training.
        largest_box_mm2: the area of the largest error box in the training.
    """

    kinds: Mapping[MaskKind, MaskCalibration]
    sizes: TrainingSizes | None = None
    largest_box_mm2: float | None = None

    def of(self, kind: MaskKind) -> MaskCalibration:
        """The calibration of a kind of masks: that of strange masks where the kind has none of its own, or else none.

        A training without masks of unseen patients has nothing to calibrate on.
        """
        return self.kinds.get(kind, self.kinds.get("strange", MaskCalibration()))

    def with_intervals(self, kind: MaskKind, intervals: StructureIntervals) -> StructureCalibration:
        """The same estimates with other intervals of one kind of masks."""
        return replace(self, kinds={**self.kinds, kind: replace(self.of(kind), intervals=intervals)})


@dataclass(frozen=True, slots=True)
class MapCalibration:
    """Platt scaling of the error's logits of one structure, before they are read as probabilities.

    Of the error's and not of the truth's: a shift makes errors likelier inside and outside the mask alike, and not the
    estimated truth larger or smaller.
    """

    scale: float = 1.0
    shift: float = 0.0

    def apply(self, logits: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
        """The calibrated logits of errors, of any shape; ``out`` may be the logits themselves."""
        scaled = np.multiply(logits, np.float32(self.scale), out=out, dtype=np.float32)
        return np.add(scaled, np.float32(self.shift), out=scaled)
