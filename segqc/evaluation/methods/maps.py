"""Estimates read off an error map: SegQC's own, and those of truths estimated without looking at the mask.

With T the estimated truth's probability, a mask's error probability is M(1 - T) + (1 - M)T (method, "Notation").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from segqc.evaluation.methods.estimates import (
    EMPTY_UNDER_MM3,
    SILENT,
    AssessedMask,
    Estimate,
    empty_rule,
    estimate_from_error_map,
    structure_masks,
)
from segqc.networks.assessor import Assessor, calibrated_maps, sigmoid, truth_as_error
from segqc.networks.cache import LatestCache
from segqc.networks.segmenter import Segmenter
from segqc.progress import Progress
from segqc.quality.error_maps import ExtractionSettings, estimated_truth, extract_errors
from segqc.split import PatientSplit
from segqc.training.assessor import train_on_masks
from segqc.training.crossfit import MaskSet
from segqc.training.spec import TrainingSettings
from segqc.types import FloatArray, Structure
from segqc.volumes import Volume, through_plane_axis


class MapEstimator:
    """SegQC-Net: one `Assessor`, or several of the same structures whose error logits are averaged.

    The numbers are the map's own, before the assessor's calibration: all methods are calibrated alike, elsewhere.
    With ``extraction`` they are read off the map after error extraction (the paper's SegQC-EE).
    """

    def __init__(
        self,
        assessors: Sequence[Assessor],
        *,
        extraction: ExtractionSettings | None = None,
        name: str = "",
        empty_under_mm3: float = EMPTY_UNDER_MM3,
    ) -> None:
        self.name = name or ("SegQC" if extraction is None else "SegQC-EE")
        self.assessors = tuple(assessors)
        self.extraction = extraction
        self.structures = _common([a.structures for a in assessors])
        self.empty_under_mm3 = empty_under_mm3

    def estimate(self, mask: AssessedMask) -> tuple[Estimate, ...]:
        """Estimate from the mean of the assessors' error logits."""
        errors = sigmoid(_mean([a.error_logits(mask.scan, mask.labels) for a in self.assessors]))
        if self.extraction is not None:
            axis, spacing = through_plane_axis(mask.scan), mask.scan.spacing_mm
            for i, structure in enumerate(self.structures):
                settings = self.extraction.for_structure(structure.name)
                errors[i] = extract_errors(errors[i], structure.mask(mask.labels.array), axis, spacing, settings)
        return _estimates(mask, self.structures, errors, self.empty_under_mm3)


class ScanOnly:
    """The truth from the scan alone: assessors of output form "truth" that are shown an empty mask.

    Their logits do not depend on the mask; read as an error's, they are calibrated and averaged. See `train_scan_only`.

    Raises:
        ValueError: if there is no assessor, their structures differ, or one's output is not the truth's logit.
    """

    def __init__(
        self, assessors: Sequence[Assessor], *, name: str = "scan only", empty_under_mm3: float = EMPTY_UNDER_MM3
    ) -> None:
        if any(a.card.output_form != "truth" for a in assessors):
            raise ValueError("the truth can be read off assessors of output form 'truth' only")
        self.name = name
        self.assessors = tuple(assessors)
        self.structures = _common([a.structures for a in assessors])
        self.empty_under_mm3 = empty_under_mm3
        self._last: LatestCache[list[FloatArray]] = LatestCache()

    def truth_logits(self, scan: Volume) -> list[FloatArray]:
        """Each assessor's logits of the truth, before calibration: (L, n0, n1, n2), on the scan's grid."""
        known = self._last.get(scan)
        if known is not None:
            return known
        empty = Volume(np.zeros(scan.shape, np.uint8), scan.affine, scan.acquisition_axis)
        return self._last.keep([a.output_logits(scan, empty) for a in self.assessors], scan)

    def estimate(self, mask: AssessedMask) -> tuple[Estimate, ...]:
        """Compare the mask with the truth estimated from the scan."""
        masks = structure_masks(mask.labels.array, self.structures)
        errors = [
            calibrated_maps(truth_as_error(logits, masks), assessor.card.map_calibration)
            for assessor, logits in zip(self.assessors, self.truth_logits(mask.scan), strict=True)
        ]
        return _estimates(mask, self.structures, sigmoid(_mean(errors)), self.empty_under_mm3)


class CrossFittedMean:
    """The truth as the mean softmax of several segmentation networks, of different folds.

    With ``average_flips`` each network's softmax is the mean over the symmetries of its test-time augmentation.

    Raises:
        ValueError: if there is no network, or their structures differ.
    """

    def __init__(
        self,
        segmenters: Sequence[Segmenter],
        *,
        average_flips: bool = False,
        name: str = "cross-fitted mean",
        empty_under_mm3: float = EMPTY_UNDER_MM3,
    ) -> None:
        self.name = name
        self.average_flips = average_flips
        self.segmenters = tuple(segmenters)
        self.structures = _common([s.structures for s in segmenters])
        self.empty_under_mm3 = empty_under_mm3
        self._last: LatestCache[FloatArray] = LatestCache()

    def truth(self, scan: Volume) -> FloatArray:
        """The estimated truth's probability, one per structure: (L, n0, n1, n2), on the scan's grid."""
        known = self._last.get(scan)
        if known is not None:
            return known
        soft = [structure_probabilities(s, self._softmax(s, scan), self.structures) for s in self.segmenters]
        return self._last.keep(_mean(soft), scan)

    def _softmax(self, segmenter: Segmenter, scan: Volume) -> FloatArray:
        return (
            segmenter.predict_tta(scan).mean_probabilities
            if self.average_flips
            else segmenter.predict(scan).probabilities
        )

    def estimate(self, mask: AssessedMask) -> tuple[Estimate, ...]:
        """Compare the mask with the networks' mean."""
        return _estimates_of_truth(mask, self.structures, self.truth(mask.scan), self.empty_under_mm3)


class SoftOutput:
    """The truth as the softmax of the network that made the mask; says nothing of a mask that no network made."""

    def __init__(
        self,
        structures: Sequence[Structure],
        *,
        name: str = "soft output",
        empty_under_mm3: float = EMPTY_UNDER_MM3,
    ) -> None:
        self.name = name
        self.structures = tuple(structures)
        self.empty_under_mm3 = empty_under_mm3
        self._last: LatestCache[FloatArray] = LatestCache()

    def truth(self, scan: Volume, source: Segmenter) -> FloatArray:
        """The probability of each structure, (L, n0, n1, n2); the last one is kept for the next mask of the same."""
        known = self._last.get(scan, source.version)
        if known is not None:
            return known
        soft = structure_probabilities(source, source.predict(scan).probabilities, self.structures)
        return self._last.keep(soft, scan, source.version)

    def estimate(self, mask: AssessedMask) -> tuple[Estimate, ...]:
        """Compare the mask with its source network's soft output."""
        if mask.source is None:
            return (SILENT,) * len(self.structures)
        return _estimates_of_truth(mask, self.structures, self.truth(mask.scan, mask.source), self.empty_under_mm3)


def train_scan_only(
    sets: Sequence[MaskSet],
    structures: Sequence[Structure],
    patient_splits: dict[str, PatientSplit],
    settings: TrainingSettings,
    folder: Path,
    progress: Progress,
) -> Assessor:
    """Train the network for `ScanOnly`: SegQC-Net's plan, cases, length and loss, but every mask is empty.

    Of the sets only the cases count. The assessor's calibration is of empty masks and means nothing.
    """
    cases = {s.case.id: s for s in sets}
    blank = [MaskSet(s.case, np.zeros_like(s.masks[:1]), (0.0,)) for s in cases.values()]
    plain = replace(settings, output_form="truth", scan_only_share=0.0, empty_mask_share=0.0, hide_mask=False)
    return train_on_masks(blank, structures, patient_splits, plain, folder, progress)


def structure_probabilities(
    segmenter: Segmenter, probabilities: FloatArray, structures: Sequence[Structure]
) -> FloatArray:
    """Sum class probabilities (1 + V, n0, n1, n2) to the probability of each structure: (L, n0, n1, n2).

    Classes exclude each other, so that the probability of a union of label values is the sum of theirs.

    Raises:
        ValueError: if the network does not know a structure's label value.
    """
    classes = {value: i for i, value in enumerate(segmenter.values, start=1)}
    unknown = sorted({v for s in structures for v in s.values} - classes.keys())
    if unknown:
        raise ValueError(f"the segmentation network knows the label values {segmenter.values}, not {unknown}")
    sums = [probabilities[[classes[v] for v in s.values]].sum(axis=0) for s in structures]
    return np.asarray(np.clip(np.stack(sums), 0.0, 1.0), np.float32)


def _estimates_of_truth(
    mask: AssessedMask, structures: Sequence[Structure], truth: FloatArray, empty_under_mm3: float
) -> tuple[Estimate, ...]:
    # M(1-T) + (1-M)T is its own inverse
    errors = estimated_truth(structure_masks(mask.labels.array, structures), truth)
    return _estimates(mask, structures, errors, empty_under_mm3)


def _estimates(
    mask: AssessedMask, structures: Sequence[Structure], errors: FloatArray, empty_under_mm3: float
) -> tuple[Estimate, ...]:
    axis, empty = through_plane_axis(mask.scan), empty_rule(mask.scan, empty_under_mm3)
    masks = structure_masks(mask.labels.array, structures)
    return tuple(estimate_from_error_map(m, e, axis, empty) for m, e in zip(masks, errors, strict=True))


def _common(structures: Sequence[tuple[Structure, ...]]) -> tuple[Structure, ...]:
    if len(set(structures)) != 1:
        raise ValueError(f"one network or more of the same structures is needed, got {len(structures)} networks")
    return structures[0]


def _mean(arrays: Sequence[FloatArray]) -> FloatArray:
    total = arrays[0].copy()
    for array in arrays[1:]:
        total += array
    return np.asarray(total / np.float32(len(arrays)), np.float32)
