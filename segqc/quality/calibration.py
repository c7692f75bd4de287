"""Calibrations of error maps and of estimated metrics (method, "Calibration")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from segqc.quality.intervals import StructureIntervals
from segqc.quality.metrics import LinearCalibration
from segqc.types import FloatArray

OutputForm: TypeAlias = Literal["truth", "direct"]


@dataclass(frozen=True, slots=True)
class StructureCalibration:
    """Linear calibration of the four 3D metrics of one structure, and the largest error box seen in training.

    ``intervals`` is None in model files from before there were intervals. They are no part of a model's version: they
    are made anew from audit draws, and the estimates stay what they were.
    """

    dice: LinearCalibration
    iou: LinearCalibration
    arvd: LinearCalibration
    rvd: LinearCalibration
    largest_box_mm2: float | None
    intervals: StructureIntervals | None = None


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
