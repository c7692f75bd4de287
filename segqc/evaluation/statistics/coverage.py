"""How often prediction intervals hold the truth: over resplits of patients, in strata, and under a shift."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segqc.quality.intervals import LEVEL, jackknife_plus
from segqc.quality.metrics import MetricName, Values
from segqc.types import BoolArray

RESPLITS = 20
ALL = "all"
QUALITY_EDGES = (0.6, 0.75, 0.85, 0.9)  # of Dice or IoU
Names = npt.NDArray[np.str_]


@dataclass(frozen=True, slots=True)
class Coverage:
    """How often intervals hold the truth; the numbers are None where no split had enough patients to calibrate on.

    Attributes:
        coverage: mean over the resplits of the share of covered masks, each tested patient counting once.
        error: its binomial standard error with the patients as trials; resplits of the same patients lessen it no
            further. One hit and one miss are added (Laplace), so that a full coverage has an error too.
        spread: standard deviation of the coverage over the resplits.
        width: mean width of the intervals, weighted as the coverage.
        patients: how many different patients were tested.
        masks: how many different masks were tested.
        resplits: how many splits the means are over.
        level: the coverage that was wanted.
    """

    coverage: float | None
    error: float | None
    spread: float | None
    width: float | None
    patients: int
    masks: int
    resplits: int
    level: float


def resplit_coverage(
    x: Values,
    truth: Values,
    patients: Sequence[str],
    metric: MetricName,
    *,
    rng: np.random.Generator,
    level: float = LEVEL,
    resplits: int = RESPLITS,
    test_share: float = 0.5,
    strata: Mapping[str, BoolArray] | None = None,
) -> dict[str, Coverage]:
    """Coverage of intervals calibrated on some patients and tested on the others, over random splits of the patients.

    Calibration line and residuals are made anew in each split (`segqc.quality.intervals.jackknife_plus`).

    Args:
        x: the metric as read off the error maps, one per mask, by networks that have seen none of these patients.
        truth: the true metric of each mask; masks with an undefined number are left out.
        patients: whose mask it is.
        metric: the metric.
        rng: draws the splits.
        level: wanted coverage.
        resplits: the number of splits.
        test_share: share of the patients that are tested.
        strata: named subsets of the masks to report besides; calibration is always on all masks.

    Returns:
        "all" and each stratum, by name.

    Raises:
        ValueError: if arrays differ in length, or there is nothing to split.
    """
    masks = _Masks.of(x, truth, patients, metric)
    every = np.ones(masks.x.size, bool)
    subsets = {ALL: every, **{name: chosen[masks.kept] for name, chosen in (strata or {}).items()}}
    splits = _splits(masks.patients, every, every, rng, resplits, test_share)
    return _measure(masks, splits, subsets, level)


def shift_coverage(
    x: Values,
    truth: Values,
    patients: Sequence[str],
    source: BoolArray,
    target: BoolArray,
    metric: MetricName,
    *,
    rng: np.random.Generator,
    level: float = LEVEL,
    resplits: int = RESPLITS,
    test_share: float = 0.5,
    strata: Mapping[str, BoolArray] | None = None,
) -> dict[str, Coverage]:
    """Coverage under shift: calibrated on some masks, tested on others.

    No patient is on both sides of a split. Patients with masks on both sides (two structures of one organ) are split at
    random, all others are always on their own; where no patient is on both, there is one split.

    Args:
        x: the metric as read off the error maps, one per mask, by networks that have seen none of these patients.
        truth: the true metric of each mask; masks with an undefined number are left out.
        patients: whose mask it is.
        source: which masks calibrate.
        target: which masks are tested.
        metric: the metric.
        rng: draws the splits.
        level: wanted coverage.
        resplits: the number of splits of patients with masks on both sides.
        test_share: share of these patients that are tested.
        strata: named subsets of the tested masks to report besides.

    Returns:
        "all" and each stratum, by name.
    """
    masks = _Masks.of(x, truth, patients, metric)
    subsets = {ALL: np.ones(masks.x.size, bool), **{name: of[masks.kept] for name, of in (strata or {}).items()}}
    splits = _splits(masks.patients, source[masks.kept], target[masks.kept], rng, resplits, test_share)
    return _measure(masks, splits, subsets, level)


def quality_strata(values: Values, edges: Sequence[float] = QUALITY_EDGES) -> dict[str, BoolArray]:
    """Strata of masks by a metric: under the first edge, between edges (the lower one included), from the last on.

    Args:
        values: the true metric, or the estimate: intervals promise less for the first, users see only the second.
        edges: ascending.
    """
    bins = np.digitize(values, edges)
    named = [f"< {edges[0]:g}", *(f"{a:g}-{b:g}" for a, b in itertools.pairwise(edges)), f">= {edges[-1]:g}"]
    return {name: (bins == i) & ~np.isnan(values) for i, name in enumerate(named)}


@dataclass(frozen=True, slots=True, eq=False)
class _Masks:
    x: Values
    truth: Values
    patients: Names
    metric: MetricName
    kept: BoolArray

    @classmethod
    def of(cls, x: Values, truth: Values, patients: Sequence[str], metric: MetricName) -> _Masks:
        names = np.array(patients, np.str_)
        if not x.shape == truth.shape == names.shape or x.ndim != 1:
            raise ValueError(f"coverage needs as many estimates, truths and patients, got {x.shape}, {truth.shape}")
        kept = np.isfinite(x) & np.isfinite(truth)
        return cls(x[kept], truth[kept], names[kept], metric, kept)


def _splits(
    patients: Names, source: BoolArray, target: BoolArray, rng: np.random.Generator, resplits: int, test_share: float
) -> Iterator[tuple[BoolArray, BoolArray]]:
    """Masks to calibrate on and masks to test, for each split."""
    both = np.intersect1d(patients[source], patients[target])
    for _ in range(resplits if both.size else 1):
        tested = rng.permutation(both)[: round(both.size * test_share)]
        calibrating = np.setdiff1d(both, tested)
        yield source & ~np.isin(patients, tested), target & ~np.isin(patients, calibrating)


def _measure(
    masks: _Masks, splits: Iterator[tuple[BoolArray, BoolArray]], subsets: Mapping[str, BoolArray], level: float
) -> dict[str, Coverage]:
    hits: dict[str, list[float]] = {name: [] for name in subsets}
    widths: dict[str, list[float]] = {name: [] for name in subsets}
    tested = np.zeros(masks.x.size, bool)
    for calibrate, test in splits:
        names = masks.patients[calibrate].tolist()
        made = jackknife_plus(masks.x[calibrate], masks.truth[calibrate], names, masks.metric)
        low, high = made.bounds(masks.x, level=level)
        if np.isnan(low).all():
            continue
        tested |= test
        covered = (low <= masks.truth) & (masks.truth <= high)
        for name, subset in subsets.items():
            if (chosen := test & subset).any():
                hits[name].append(_patient_mean(covered[chosen], masks.patients[chosen]))
                widths[name].append(_patient_mean((high - low)[chosen], masks.patients[chosen]))
    found = {}
    for name, subset in subsets.items():
        patients = np.unique(masks.patients[tested & subset]).size
        share = float(np.mean(hits[name])) if hits[name] else None
        error = None
        if share is not None:
            smoothed = (share * patients + 1) / (patients + 2)
            error = float(np.sqrt(smoothed * (1 - smoothed) / patients))
        found[name] = Coverage(
            coverage=share,
            error=error,
            spread=float(np.std(hits[name])) if hits[name] else None,
            width=float(np.mean(widths[name])) if widths[name] else None,
            patients=int(patients),
            masks=int((tested & subset).sum()),
            resplits=len(hits[name]),
            level=level,
        )
    return found


def _patient_mean(values: BoolArray | Values, patients: Names) -> float:
    """Mean over patients of the mean over their masks."""
    _, owner = np.unique(patients, return_inverse=True)
    return float(np.mean(np.bincount(owner, weights=values) / np.bincount(owner)))
