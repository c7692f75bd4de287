"""A trained SegQC-Net: load it, compute the error map of a mask, turn it into an `Assessment`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from segqc.networks.augmentation import tta_group
from segqc.networks.cache import LatestCache
from segqc.networks.card import ModelCard
from segqc.networks.inference import network_input
from segqc.networks.model import ModelError, TrainedNetwork
from segqc.quality.boxes import BoxSettings, find_boxes
from segqc.quality.calibration import MapCalibration, StructureCalibration
from segqc.quality.error_maps import ExtractionSettings, extract_errors
from segqc.quality.intervals import LEVEL
from segqc.quality.metrics import EmptyRule, estimated_metrics, estimated_slice_metrics, truth_is_empty
from segqc.types import (
    Assessment,
    BoolArray,
    ErrorView,
    FloatArray,
    MetricIntervals,
    Metrics,
    SliceQuality,
    StructureQuality,
)
from segqc.volumes import Volume, VolumeError, through_plane_axis, to_native

ERROR_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class AssessmentResult:
    """The assessment of a mask and the error maps it was read from, one per structure: (L, n0, n1, n2)."""

    assessment: Assessment
    errors: FloatArray


@dataclass(frozen=True, slots=True)
class AssessmentSettings:
    """How an error map becomes numbers and boxes; `method.md`'s defaults."""

    extraction: ExtractionSettings = field(default_factory=ExtractionSettings)
    boxes: BoxSettings = field(default_factory=BoxSettings)
    empty_under_mm3: float = 10.0
    interval_level: float = LEVEL


def mask_sha256(labels: Volume) -> str:
    """The content address of a label map: its voxels and its grid, whatever the file format."""
    digest = hashlib.sha256(np.ascontiguousarray(labels.array, np.uint8).tobytes())
    digest.update(np.asarray(labels.array.shape, np.int64).tobytes())
    digest.update(np.round(labels.affine, 4).astype(np.float64).tobytes())
    return digest.hexdigest()


class Assessor(TrainedNetwork):
    """SegQC-Net with its calibration."""

    kind = "segqc"

    def __init__(self, card: ModelCard, network: nn.Module, settings: AssessmentSettings | None = None) -> None:
        super().__init__(card, network)
        if card.plan.in_channels != 1 + len(card.structures):
            raise ModelError(
                f"the card names {len(card.structures)} structures, the network takes {card.plan.in_channels - 1}"
            )
        self.settings = settings or AssessmentSettings()
        self._hidden: LatestCache[list[torch.Tensor]] = LatestCache()

    @classmethod
    def load(cls, path: Path, settings: AssessmentSettings | None = None) -> Assessor:
        """Read a model file.

        Raises:
            ModelError: if the file is missing, foreign or damaged.
        """
        card, network = cls._read(path)
        return cls(card, network, settings)

    def error_maps(self, scan: Volume, labels: Volume) -> FloatArray:
        """The probability that each voxel of each structure's mask is wrong: (L, n0, n1, n2), on the scan's grid.

        Raises:
            VolumeError: if the label map does not lie on the scan's grid.
        """
        return sigmoid(self.error_logits(scan, labels))

    def error_logits(self, scan: Volume, labels: Volume) -> FloatArray:
        """The logits of `error_maps`; where several networks judge one mask, these are what to average.

        Raises:
            VolumeError: if the label map does not lie on the scan's grid.
        """
        logits = self.output_logits(scan, labels)
        if self.card.output_form == "truth":
            logits = truth_as_error(logits, np.stack([s.mask(labels.array) for s in self.structures]))
        return calibrated_maps(logits, self.card.map_calibration)

    def output_logits(self, scan: Volume, labels: Volume) -> FloatArray:
        """The network's own logits, of truth or error as its card says, before any calibration: (L, n0, n1, n2).

        They are brought back to the scan's grid by linear interpolation and meet the mask only there (method,
        "Frames").

        Raises:
            VolumeError: if the label map does not lie on the scan's grid.
        """
        if labels.shape != scan.shape:
            raise VolumeError(
                f"the label map has shape {labels.shape}, its scan {scan.shape}; they must share one grid"
            )
        masks = np.stack([s.mask(labels.array) for s in self.structures])
        frame = self.frame(scan)
        x = network_input(scan, masks, frame)
        hidden = self._answers_without_mask(scan, x) if self.card.hide_mask else None
        logits = mean_over_flips(self.run, x, hidden=hidden) if self.card.average_flips else self.run(x)
        return np.array(to_native(logits[0].numpy(), frame, order=1), np.float32)

    def _answers_without_mask(self, scan: Volume, x: torch.Tensor) -> list[torch.Tensor]:
        known = self._hidden.get(scan)
        return self._hidden.keep(answers_without_mask(self.run, x), scan) if known is None else known

    def assess(
        self, scan: Volume, labels: Volume, *, scan_id: str, segmenter_version: str | None = None
    ) -> AssessmentResult:
        """Assess a mask: metrics in 3D and per slice, error sums and boxes, before and after error extraction.

        Args:
            scan: the scan.
            labels: its label map, on the same grid.
            scan_id: the name that the assessment carries.
            segmenter_version: the version of the network that made the mask, if one did.

        Raises:
            VolumeError: if the label map does not lie on the scan's grid.
        """
        errors = self.error_maps(scan, labels)
        axis = through_plane_axis(scan)
        qualities = tuple(
            self._quality(i, structure.mask(labels.array), errors[i], axis, scan)
            for i, structure in enumerate(self.structures)
        )
        shape = scan.array.shape
        assessment = Assessment(
            scan=scan_id,
            mask_sha256=mask_sha256(labels),
            segmenter_version=segmenter_version,
            assessor_version=self.version,
            through_plane_axis=axis,
            shape=(shape[0], shape[1], shape[2]),
            spacing_mm=scan.spacing_mm,
            structures=qualities,
        )
        return AssessmentResult(assessment, errors)

    def map_metrics(self, scan: Volume, labels: Volume) -> tuple[Metrics, ...]:
        """The 3D metrics of each structure as read off its error map: `assess`'s raw ones, without all the rest.

        Raises:
            VolumeError: if the label map does not lie on the scan's grid.
        """
        empty = self._empty_rule(scan)
        errors = self.error_maps(scan, labels)
        return tuple(
            estimated_metrics(structure.mask(labels.array), error, empty=empty)
            for structure, error in zip(self.structures, errors, strict=True)
        )

    def _empty_rule(self, scan: Volume) -> EmptyRule:
        return EmptyRule(max_sum_mm3=self.settings.empty_under_mm3, voxel_volume_mm3=scan.voxel_volume_mm3)

    def _quality(self, index: int, mask: BoolArray, error: FloatArray, axis: int, scan: Volume) -> StructureQuality:
        name = self.structures[index].name
        extraction = self.settings.extraction.for_structure(name)
        extracted = extract_errors(error, mask, axis, scan.spacing_mm, extraction)
        calibration = self.card.calibration[index] if self.card.calibration else None
        boxes = self.settings.boxes
        if calibration is not None and calibration.largest_box_mm2 is not None and boxes.max_area_mm2 is None:
            boxes = replace(boxes, max_area_mm2=2 * calibration.largest_box_mm2)
        raw = self._view(mask, error, axis, scan, boxes)
        estimated = _calibrated(raw.metrics, calibration)
        made_of = calibration.intervals if calibration is not None else None
        return StructureQuality(
            name=name,
            present=bool(mask.any()) or not truth_is_empty(mask, error, empty=self._empty_rule(scan)),
            mask_volume_ml=float(mask.sum()) * scan.voxel_volume_mm3 / 1000.0,
            estimated=estimated,
            raw=raw,
            extracted=self._view(mask, extracted, axis, scan, boxes),
            intervals=made_of.of(raw.metrics, estimated, level=self.settings.interval_level)
            if made_of is not None
            else MetricIntervals(),
        )

    def _view(self, mask: BoolArray, error: FloatArray, axis: int, scan: Volume, boxes: BoxSettings) -> ErrorView:
        rule = self._empty_rule(scan)
        per_slice = estimated_slice_metrics(mask, error, axis, empty=rule)
        sums = error.sum(axis=tuple(a for a in range(3) if a != axis), dtype=np.float64)
        return ErrorView(
            metrics=estimated_metrics(mask, error, empty=rule),
            slices=tuple(SliceQuality(i, per_slice.at(i), float(s)) for i, s in enumerate(sums)),
            boxes=find_boxes(error, axis, scan.spacing_mm, boxes),
        )

    def likely_errors(self, result: AssessmentResult, scan: Volume) -> Volume:
        """The labelmap of likely errors: 1 where any structure's error probability is at least one half."""
        wrong = (result.errors >= ERROR_THRESHOLD).any(axis=0)
        return Volume(wrong.astype(np.uint8), scan.affine, scan.acquisition_axis)


def mean_over_flips(
    run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *, hidden: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """A network's mean logits over the in-plane flips of its input (N, C, a, b, c), each brought back.

    Args:
        run: the network.
        x: the scan, and channels that have to do with the mask.
        hidden: `answers_without_mask`, to take in place of the answers to the two flips along one axis. What that is
            worth on a data set, ``segqc evaluate ablation`` measures.
    """
    one = _answers_to_flips(run, x, (1,)) if hidden is None else hidden
    return torch.stack([*_answers_to_flips(run, x, (0, 2)), *one]).mean(dim=0)


def answers_without_mask(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """The logits of the two flips along one axis of (N, C, a, b, c), all channels but the scan empty, brought back.

    For a network of the truth's logits that has trained from empty masks: its mean over flips then leans less on masks
    of networks that it has not met.
    """
    return _answers_to_flips(run, torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], dim=1), (1,))


def _answers_to_flips(
    run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, along: tuple[int, ...]
) -> list[torch.Tensor]:
    """The logits of the flips along so many axes, brought back; two at once: `segqc.networks.sliding_window`."""
    members = [m for m in tta_group(transposes=False) if sum(m.flips) in along]
    answers = run(torch.cat([m.apply(x) for m in members])).split(len(x))
    return [m.invert(answer) for m, answer in zip(members, answers, strict=True)]


def truth_as_error(logits: FloatArray, masks: BoolArray) -> FloatArray:
    """The truth's logits z read as the error's, (1 - 2M) z; of the masks' shape."""
    return np.where(masks, -logits, logits)


def calibrated_maps(logits: FloatArray, maps: Sequence[MapCalibration]) -> FloatArray:
    """Error logits (L, n0, n1, n2) after calibration; without one, as they are."""
    return np.stack([c.apply(z) for c, z in zip(maps, logits, strict=True)]) if maps else logits


def sigmoid(logits: FloatArray) -> FloatArray:
    """Probabilities of logits of any shape; beyond 30 they are cut, so that none overflows."""
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(logits, -30, 30))), np.float32)


def _calibrated(metrics: Metrics, calibration: StructureCalibration | None) -> Metrics:
    if calibration is None:
        return metrics
    values = {name: getattr(metrics, name) for name in ("dice", "iou", "arvd", "rvd")}
    return Metrics(**{n: None if v is None else float(getattr(calibration, n).apply(v)) for n, v in values.items()})
