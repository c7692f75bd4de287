"""What a scan looks like, in a few numbers that need no network: by them scans are compared before any is labelled.

Intensities are scaled robustly, from the 1st to the 99th percentile, as those of MR have no unit. Nine deciles say how
they are distributed, four numbers how steep they are within slices and across, and five how large field of view and
voxels are. Nothing depends on the order of a file's voxels. What a scan shows where is not looked at.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from segqc.types import FloatArray
from segqc.volumes.frame import through_plane_axis
from segqc.volumes.volume import Volume

APPEARANCE_VERSION: Final = "1"
"""Another one when the same scan would get other numbers."""
_MOST_PER_AXIS: Final = 64  # voxels that are looked at: more tell nothing new, and cost time when scans are taken in
_DECILES: Final = tuple(i / 10 for i in range(1, 10))
_TINY: Final = 1e-4  # of the intensity range, per mm


def appearance(scan: Volume) -> FloatArray:
    """The numbers of a scan.

    Returns:
        (18,): the deciles of the scaled intensities; the logarithms of the mean and of the last decile of their
        steepness (per mm), within slices and across them; the logarithms of the extents (mm), of the two axes in the
        slices the smaller one first, and of the voxels' edges (mm) within slices and across them.
    """
    across = through_plane_axis(scan)
    within = sorted((axis for axis in range(3) if axis != across), key=lambda a: scan.shape[a] * scan.spacing_mm[a])
    axes = (*within, across)
    strides = [math.ceil(scan.shape[axis] / _MOST_PER_AXIS) for axis in axes]
    part = scan.array.transpose(axes)[tuple(slice(None, None, stride) for stride in strides)]
    low, high = np.percentile(part, [1, 99])
    scaled = np.clip((part - low) / max(float(high - low), np.finfo(np.float32).tiny), 0, 1)
    steepness = [
        _steepness(scaled, i, scan.spacing_mm[axis] * stride)
        for i, (axis, stride) in enumerate(zip(axes, strides, strict=True))
    ]
    edges = [scan.spacing_mm[axis] for axis in axes]
    extents = [edge * scan.shape[axis] for edge, axis in zip(edges, axes, strict=True)]
    numbers = [
        *np.quantile(scaled, _DECILES),
        *np.mean(steepness[:2], axis=0),
        *steepness[2],
        *np.log(extents),
        math.log(edges[0] * edges[1]) / 2,
        math.log(edges[2]),
    ]
    return np.array(numbers, np.float32)


def _steepness(scaled: FloatArray, axis: int, distance_mm: float) -> tuple[float, float]:
    """The logarithms of the mean and of the last decile of the differences of neighbours along an axis, per mm."""
    differences = np.abs(np.diff(scaled, axis=axis)) / distance_mm
    if not differences.size:
        return math.log(_TINY), math.log(_TINY)
    return math.log(float(differences.mean()) + _TINY), math.log(float(np.quantile(differences, 0.9)) + _TINY)
