"""Estimates without a network: the constant, and a regression on the mask's size (method, "The baselines")."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from segqc.evaluation.methods.averages import average_metrics
from segqc.evaluation.methods.estimates import AssessedMask, Estimate
from segqc.evaluation.methods.features import FeatureRegression, fit_features
from segqc.quality.metrics import METRIC_NAMES, SliceMetrics, Values, true_metrics, true_slice_metrics
from segqc.training.cases import label_values, read_case
from segqc.training.crossfit import MaskSet
from segqc.types import BoolArray, Metrics, Structure
from segqc.volumes import Volume, through_plane_axis


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredMask:
    """A mask with the true metrics of each of its structures, in 3D and per slice: what simple estimates learn from."""

    mask: AssessedMask
    metrics: tuple[Metrics, ...]
    slices: tuple[SliceMetrics, ...]


def measured_masks(sets: Iterable[MaskSet], structures: Sequence[Structure]) -> Iterator[MeasuredMask]:
    """Read each case once and compare its masks with its truth; one case is in memory at a time."""
    values = label_values(structures)
    for mask_set in sets:
        scan, truth = read_case(mask_set.case, values)
        axis = through_plane_axis(scan)
        truths = [s.mask(truth.array) for s in structures]
        for array in mask_set.masks:
            pairs = [(s.mask(array), t) for s, t in zip(structures, truths, strict=True)]
            yield MeasuredMask(
                AssessedMask(scan, Volume(array, scan.affine, scan.acquisition_axis), None),
                tuple(true_metrics(m, t) for m, t in pairs),
                tuple(true_slice_metrics(m, t, axis) for m, t in pairs),
            )


class Constant:
    """The same numbers for every mask: the means of given true values, one per structure, in 3D and over slices."""

    def __init__(
        self, structures: Sequence[Structure], metrics: Sequence[Metrics], slices: Sequence[Metrics], *,
        name: str = "constant",
    ) -> None:  # fmt: skip
        self.name = name
        self.structures = tuple(structures)
        self.metrics = tuple(metrics)
        self.slices = tuple(slices)

    def estimate(self, mask: AssessedMask) -> tuple[Estimate, ...]:
        """The constants; a slice counts where the mask is in it, and no order is given."""
        axis = through_plane_axis(mask.scan)
        masks = [s.mask(mask.labels.array) for s in self.structures]
        return tuple(
            Estimate(metrics, _everywhere(slices, m, axis), None, None)
            for m, metrics, slices in zip(masks, self.metrics, self.slices, strict=True)
        )


def fit_constant(measured: Iterable[MeasuredMask], structures: Sequence[Structure]) -> Constant:
    """Average true metrics over masks, and 2D metrics over all their slices in which mask or truth is non-empty."""
    metrics: list[list[Metrics]] = [[] for _ in structures]
    slices: list[list[SliceMetrics]] = [[] for _ in structures]
    for one in measured:
        for k in range(len(structures)):
            metrics[k].append(one.metrics[k])
            slices[k].append(one.slices[k])
    means_2d = [
        average_metrics([s.at(int(i)) for s in of_one for i in np.flatnonzero(s.counted)], "mean") for of_one in slices
    ]
    return Constant(structures, [average_metrics(m, "mean") for m in metrics], means_2d)


class SizeRegression:
    """Each 3D metric as a linear function of the logarithm of the mask's volume, and of its surface's, if asked for."""

    def __init__(
        self, structures: Sequence[Structure], lines: Sequence[FeatureRegression], *, surface: bool = False,
        name: str = "",
    ) -> None:  # fmt: skip
        self.name = name or ("size and surface" if surface else "size")
        self.structures = tuple(structures)
        self.lines = tuple(lines)
        self.surface = surface

    def estimate(self, mask: AssessedMask) -> tuple[Estimate, ...]:
        """Estimate from the size of each structure's mask."""
        return tuple(
            Estimate(line.at(size_features(s.mask(mask.labels.array), mask.scan, surface=self.surface)), *(None,) * 3)
            for s, line in zip(self.structures, self.lines, strict=True)
        )


def fit_size_regression(
    measured: Iterable[MeasuredMask], structures: Sequence[Structure], *, surface: bool = False
) -> SizeRegression:
    """Fit the regression on masks with known metrics; ``surface`` adds the surface-to-volume ratio."""
    features: list[list[Values | None]] = [[] for _ in structures]
    metrics: list[list[Metrics]] = [[] for _ in structures]
    for one in measured:
        for k, structure in enumerate(structures):
            mask = structure.mask(one.mask.labels.array)
            features[k].append(size_features(mask, one.mask.scan, surface=surface))
            metrics[k].append(one.metrics[k])
    lines = [fit_features(f, m) for f, m in zip(features, metrics, strict=True)]
    return SizeRegression(structures, lines, surface=surface)


def size_features(mask: BoolArray, scan: Volume, *, surface: bool) -> Values | None:
    """Logarithms of the volume in ml and, if asked for, of surface over volume in 1/mm; None for an empty mask.

    Args:
        mask: (n0, n1, n2).
        scan: for the spacing.
        surface: whether to give the second number; the surface is that of the voxels' faces.
    """
    volume_mm3 = float(np.count_nonzero(mask)) * scan.voxel_volume_mm3
    if not volume_mm3:
        return None
    features = [np.log(volume_mm3 / 1000.0)]
    if surface:
        features.append(np.log(surface_mm2(mask, scan.spacing_mm) / volume_mm3))
    return np.array(features, np.float64)


def surface_mm2(mask: BoolArray, spacing_mm: Sequence[float]) -> float:
    """Area of the faces between a mask's voxels and what is outside, the volume's border included."""
    padded = np.pad(mask, 1)
    faces = [int(np.count_nonzero(np.diff(padded, axis=axis))) for axis in range(3)]
    area = float(np.prod(spacing_mm))
    return sum(count * area / spacing for count, spacing in zip(faces, spacing_mm, strict=True))


def _everywhere(metrics: Metrics, mask: BoolArray, axis: int) -> SliceMetrics:
    voxels = np.count_nonzero(mask, axis=tuple(a for a in range(3) if a != axis))
    columns = {n: np.full(len(voxels), np.nan if (v := getattr(metrics, n)) is None else v) for n in METRIC_NAMES}
    return SliceMetrics(**columns, truth_voxels=voxels.astype(np.float64), counted=voxels > 0)
