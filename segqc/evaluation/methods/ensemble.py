"""Several networks of one trained baseline, as one method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from segqc.evaluation.methods.averages import average_metrics, average_slices
from segqc.evaluation.methods.estimates import AssessedMask, Estimate, Estimator, slice_sums
from segqc.volumes import through_plane_axis


class MeanOfEstimators:
    """The mean of what several estimators of the same structures say; of their error maps, the mean probability."""

    def __init__(self, members: Sequence[Estimator], *, name: str) -> None:
        if not members:
            raise ValueError(f"{name}: no estimator to take the mean of")
        self.name = name
        self.members = tuple(members)

    def estimate(self, mask: AssessedMask) -> tuple[Estimate, ...]:
        """Return one estimate per structure."""
        axis = through_plane_axis(mask.scan)
        by_structure = zip(*(member.estimate(mask) for member in self.members), strict=True)
        return tuple(_mean(found, axis) for found in by_structure)


def _mean(found: Sequence[Estimate], axis: int) -> Estimate:
    maps = [e.error for e in found if e.error is not None]
    slices = [e.slices for e in found if e.slices is not None]
    error = np.mean(maps, axis=0, dtype=np.float32) if len(maps) == len(found) else None
    error_score = [e.scan_error_score for e in found if e.scan_error_score is not None]
    return Estimate(
        metrics=average_metrics([e.metrics for e in found], "mean"),
        slices=average_slices(slices, "mean") if len(slices) == len(found) else None,
        slice_error_score=None if error is None else slice_sums(error, axis),
        error=error,
        scan_error_score=float(np.mean(error_score)) if len(error_score) == len(found) else None,
    )
