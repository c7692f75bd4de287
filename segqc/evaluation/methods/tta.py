"""Test-time augmentation and softmax entropy: what the network that made a mask says of it without any training.

The paper compares each augmented prediction with their median (method, "The baselines"). Here the median is the mask
under assessment and each augmented prediction stands for the truth: it is what ARVD and RVD are relative to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from segqc.evaluation.methods.averages import average_metrics, average_slices
from segqc.evaluation.methods.estimates import (
    NO_METRICS,
    SILENT,
    AssessedMask,
    Estimate,
    slice_sums,
)
from segqc.evaluation.methods.maps import structure_probabilities
from segqc.networks.cache import LatestCache
from segqc.networks.segmenter import Segmenter, TtaPrediction
from segqc.quality.error_maps import entropy_map
from segqc.quality.metrics import SliceMetrics, true_metrics, true_slice_metrics
from segqc.types import FloatArray, LabelArray, Metrics, Structure
from segqc.volumes import Volume, through_plane_axis


class Tta:
    """The paper's baseline: each metric is the median over the augmented predictions of it against their median.

    It assesses the source network on the scan: two masks of one source and scan get the same numbers. Slices are
    ordered by the voxel-wise entropy of the mean prediction, summed over the slice; so can scans be, per voxel of the
    median mask. It gives no estimate of a mask that no network made.

    Args:
        structures: what it assesses.
        gammas: of the augmentation group, beside flips and transposes (`Segmenter.predict_tta`).
        name: in tables.
    """

    def __init__(self, structures: Sequence[Structure], gammas: Sequence[float] = (), *, name: str = "TTA") -> None:
        self.name = name
        self.structures = tuple(structures)
        self.gammas = tuple(gammas)
        self._last: LatestCache[TtaPrediction] = LatestCache()

    def predict(self, scan: Volume, source: Segmenter) -> TtaPrediction:
        """The augmentation group's prediction; the last one is kept for the next mask of the same scan and source."""
        known = self._last.get(scan, source.version)
        if known is not None:
            return known
        return self._last.keep(source.predict_tta(scan, self.gammas), scan, source.version)

    def estimate(self, mask: AssessedMask) -> tuple[Estimate, ...]:
        """Estimate from the source network's augmentation group."""
        if mask.source is None:
            return (SILENT,) * len(self.structures)
        prediction = self.predict(mask.scan, mask.source)
        axis = through_plane_axis(mask.scan)
        soft = structure_probabilities(mask.source, prediction.mean_probabilities, self.structures)
        ordering = _entropy_estimates(soft, prediction.labels.array, self.structures, axis)
        return tuple(
            replace(
                order,
                metrics=tta_metrics(prediction, structure),
                slices=tta_slice_metrics(prediction, structure, axis),
            )
            for structure, order in zip(self.structures, ordering, strict=True)
        )


class SoftmaxEntropy:
    """Orders of scans and slices only: entropy of the source network's softmax, per voxel of the mask under assessment.

    It says nothing of a mask that no network made.
    """

    def __init__(self, structures: Sequence[Structure], *, name: str = "softmax entropy") -> None:
        self.name = name
        self.structures = tuple(structures)

    def estimate(self, mask: AssessedMask) -> tuple[Estimate, ...]:
        """Order by the entropy of the source network's plain prediction."""
        if mask.source is None:
            return (SILENT,) * len(self.structures)
        soft = structure_probabilities(mask.source, mask.source.predict(mask.scan).probabilities, self.structures)
        return _entropy_estimates(soft, mask.labels.array, self.structures, through_plane_axis(mask.scan))


def tta_metrics(prediction: TtaPrediction, structure: Structure) -> Metrics:
    """Median over the members of each metric of the median mask against the member; None where no member has it."""
    median = structure.mask(prediction.labels.array)
    return average_metrics([true_metrics(median, structure.mask(member)) for member in prediction.members], "median")


def tta_slice_metrics(prediction: TtaPrediction, structure: Structure, axis: int) -> SliceMetrics:
    """`tta_metrics` in every slice along ``axis``.

    ``truth_voxels`` is the median over the members. A slice counts where the median mask or at least half of the
    members are non-empty.
    """
    median = structure.mask(prediction.labels.array)
    members = [true_slice_metrics(median, structure.mask(member), axis) for member in prediction.members]
    return average_slices(members, "median")


def _entropy_estimates(
    soft: FloatArray, labels: LabelArray, structures: Sequence[Structure], axis: int
) -> tuple[Estimate, ...]:
    estimates = []
    for structure, probability in zip(structures, soft, strict=True):
        sums = slice_sums(entropy_map(probability), axis)
        size = max(1, int(structure.mask(labels).sum()))
        estimates.append(Estimate(NO_METRICS, None, sums, None, scan_error_score=float(sums.sum()) / size))
    return tuple(estimates)
