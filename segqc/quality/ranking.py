"""The orders in which scans and slices are offered for correction (paper, section 3.5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from segqc.quality.metrics import MetricName

_BADNESS: Mapping[MetricName, Callable[[float], float]] = {
    "dice": lambda value: -value,
    "iou": lambda value: -value,
    "arvd": lambda value: value,
    "rvd": abs,  # signed: too large and too small are as bad
}


def order_scans(scores: Mapping[str, float] | Mapping[str, float | None], *, metric: MetricName = "dice") -> list[str]:
    """Order scans by an estimated 3D metric, worst first, ties by id.

    An undefined score (None or NaN) comes first: it stands for a mask over an empty estimated truth.

    Args:
        scores: the metric's value by scan id.
        metric: which metric it is; for Dice and IoU the lowest is worst, for ARVD the highest, for RVD the farthest
            from zero.
    """
    error_score = _BADNESS[metric]

    def key(scan: str) -> tuple[float, str]:
        value = scores[scan]
        return (-math.inf if value is None or math.isnan(value) else -error_score(value), scan)

    return sorted(scores, key=key)


def order_slices(error_sums: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Order slices by the sum of their error probabilities, largest first, ties by index.

    Args:
        error_sums: one sum per slice, in voxels or mm3. Sums, as 2D metrics are undefined without the structure.

    Returns:
        Slice indices, of the length of ``error_sums``.
    """
    return np.argsort(-np.asarray(error_sums, np.float64), kind="stable")
