"""What every quality estimator gets and gives: a mask to assess, and an estimate for each of its structures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from segqc.networks.segmenter import Segmenter
from segqc.quality.metrics import EmptyRule, SliceMetrics, Values, estimated_metrics, estimated_slice_metrics
from segqc.types import BoolArray, FloatArray, LabelArray, Metrics, Structure
from segqc.volumes import Volume, VolumeError

EMPTY_UNDER_MM3 = 10.0  # an estimated truth with a smaller sum counts as empty; as `AssessmentSettings` has it


@dataclass(frozen=True, slots=True, eq=False)
class AssessedMask:
    """A mask whose quality is asked for.

    Attributes:
        scan: the scan, on its file's grid.
        labels: the label map under assessment, on the scan's grid.
        source: the network that made the mask, where one did; test-time augmentation and soft outputs are its own.
    """

    scan: Volume
    labels: Volume
    source: Segmenter | None

    def __post_init__(self) -> None:
        if self.labels.shape != self.scan.shape:
            raise VolumeError(
                f"the label map has shape {self.labels.shape}, its scan {self.scan.shape}; they must share one grid"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """What a method says of one structure of one mask; None where it says nothing.

    Attributes:
        metrics: in 3D; a field is None where the method has no estimate of it.
        slices: in every slice along the scan's through-plane axis.
        slice_error_score: (slices,), larger means look there first: sums of error probability, or of entropy.
        error: error probabilities (n0, n1, n2), on the scan's grid.
        scan_error_score: one number to order scans by, larger means look there first: the error map's sum, an entropy.
    """

    metrics: Metrics
    slices: SliceMetrics | None
    slice_error_score: Values | None
    error: FloatArray | None
    scan_error_score: float | None = None


NO_METRICS = Metrics(None, None, None, None)
SILENT = Estimate(NO_METRICS, None, None, None)


class Estimator(Protocol):
    """A method that estimates the quality of masks; ``name`` is short, for tables."""

    name: str

    def estimate(self, mask: AssessedMask) -> tuple[Estimate, ...]:
        """Return one estimate per structure, in the order of the structures that the estimator was made with."""


def estimate_from_error_map(mask: BoolArray, error: FloatArray, axis: int, empty: EmptyRule) -> Estimate:
    """Read an estimate off an error map (paper, section 3.2): the same way for all methods that give one.

    Args:
        mask: one structure's mask (n0, n1, n2).
        error: the probability that each voxel of it is wrong, of its shape.
        axis: the through-plane axis.
        empty: when the estimated truth counts as empty.

    Raises:
        ValueError: if the arrays are not 3-D or differ in shape.
    """
    error_score = slice_sums(error, axis)
    return Estimate(
        metrics=estimated_metrics(mask, error, empty=empty),
        slices=estimated_slice_metrics(mask, error, axis, empty=empty),
        slice_error_score=error_score,
        error=error,
        scan_error_score=float(error_score.sum()),
    )


def slice_sums(volume: FloatArray, axis: int) -> Values:
    """Sum a volume (n0, n1, n2) over each slice along ``axis``: (slices,)."""
    return np.asarray(volume.sum(axis=tuple(a for a in range(3) if a != axis % 3), dtype=np.float64))


def structure_masks(labels: LabelArray, structures: Sequence[Structure]) -> BoolArray:
    """One mask per structure of a label map (n0, n1, n2): (L, n0, n1, n2)."""
    return np.stack([structure.mask(labels) for structure in structures])


def empty_rule(scan: Volume, empty_under_mm3: float) -> EmptyRule:
    """The rule of an empty estimated truth on the scan's grid."""
    return EmptyRule(max_sum_mm3=empty_under_mm3, voxel_volume_mm3=scan.voxel_volume_mm3)
