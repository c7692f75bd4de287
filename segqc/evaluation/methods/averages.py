"""Averages of metrics that may be undefined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np

from segqc.quality.metrics import METRIC_NAMES, SliceMetrics, Values
from segqc.types import Metrics

Average: TypeAlias = Literal["mean", "median"]

_OF_KNOWN: MappingProxyType[Average, Callable[..., Values]] = MappingProxyType(
    {"mean": np.nanmean, "median": np.nanmedian}
)


def average_metrics(found: Sequence[Metrics], average: Average) -> Metrics:
    """Average each metric where it is defined; None where it never is."""
    columns = {n: np.array([getattr(m, n) for m in found], np.float64) for n in METRIC_NAMES}
    known = {n: values[~np.isnan(values)] for n, values in columns.items()}
    return Metrics(**{n: float(_OF_KNOWN[average](v)) if v.size else None for n, v in known.items()})


def average_slices(found: Sequence[SliceMetrics], average: Average) -> SliceMetrics:
    """Average each metric and the truth's voxels slice by slice, over one entry or more for the same slices.

    A slice counts where it does in at least half of the entries.
    """
    columns = {n: _known(np.stack([getattr(m, n) for m in found]), average) for n in METRIC_NAMES}
    return SliceMetrics(
        **columns,
        truth_voxels=_known(np.stack([m.truth_voxels for m in found]), average),
        counted=np.mean([m.counted for m in found], axis=0) >= 0.5,
    )


def _known(values: Values, average: Average) -> Values:
    """Average over the first axis of what is not NaN; NaN where all are."""
    result = np.full(values.shape[1:], np.nan)
    some = ~np.isnan(values).all(axis=0)
    if some.any():
        result[some] = _OF_KNOWN[average](values[:, some], axis=0)
    return result
