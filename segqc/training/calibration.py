"""From estimates and truths to calibrated estimates with intervals."""

from __future__ import annotations

from collections.abc import Sequence

from segqc.intervals import StructureIntervals, jackknife_plus
from segqc.metrics import METRIC_NAMES, fit_calibration
from segqc.networks import StructureCalibration
from segqc.types import Metrics


def fit_structure(
    estimates: Sequence[Metrics], truths: Sequence[Metrics], patients: Sequence[str]
) -> StructureCalibration:
    """Calibrate one structure's four 3D metrics and their intervals (method, "Calibration"; `segqc.intervals`).

    The network must not have learnt from these patients: they validate, or each estimate is of the fold network that
    has not seen its patient. The line is fitted on all masks, each patient's residuals are against a line without it.

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
    lines = {name: fit_calibration(x, truth, metric=name) for name, (x, truth) in columns.items()}
    made = {name: jackknife_plus(x, truth, patients, name) for name, (x, truth) in columns.items()}
    intervals = StructureIntervals(made["dice"], made["iou"], made["arvd"], made["rvd"])
    return StructureCalibration(**lines, largest_box_mm2=None, intervals=intervals)
