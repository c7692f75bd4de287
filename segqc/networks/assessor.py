"""A trained SegQC-Net: load it, compute the error map of a mask, turn it into an `Assessment`."""

from __future__ import annotations

import functools
import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from segqc.networks.augmentation import tta_group
from segqc.networks.cache import LatestCache
from segqc.networks.card import ModelCard
from segqc.networks.inference import (
    NOWHERE,
    Predictor,
    Window,
    all_windows,
    box_around,
    network_input,
    not_air,
    windows_near,
)
from segqc.networks.model import ModelError, TrainedNetwork, version_of
from segqc.networks.segmenter import SoftOutput
from segqc.networks.unet import MeanOfNetworks
from segqc.quality.boxes import BoxSettings, find_boxes
from segqc.quality.calibration import MapCalibration, MaskCalibration, TrainingSizes, mixed_estimates
from segqc.quality.error_maps import ExtractionSettings, bounding_box, extract_errors, padded_box
from segqc.quality.intervals import LEVEL, mixed_intervals
from segqc.quality.metrics import (
    PEAK_OF_A_TRUTH,
    EmptyRule,
    Values,
    estimated_metrics,
    estimated_metrics_and_slices,
    slice_sums,
    truth_is_empty,
)
from segqc.types import (
    Assessment,
    BackendName,
    BoolArray,
    ErrorView,
    FloatArray,
    MaskKind,
    MaskSource,
    Metrics,
    SliceQuality,
    StructureQuality,
    Unlikeness,
    Witnesses,
)
from segqc.volumes import (
    Box,
    CanonicalFrame,
    Volume,
    VolumeError,
    native_support,
    through_plane_axis,
    to_native,
    touched,
)
from segqc.volumes.slices import Slices

ERROR_THRESHOLD = 0.5
MARGIN_MM = 10.0
"""How far from a mask and from plausible voxels SegQC-Net looks at least."""


@dataclass(frozen=True, slots=True, eq=False)
class AssessmentResult:
    """The assessment of a mask, and the error maps that it was read from.

    Attributes:
        assessment: the assessment.
        looked_at: the maps where SegQC-Net looked, one per structure: (L, ...).
        box: the part of the scan's grid that this is.
    """

    assessment: Assessment
    looked_at: FloatArray
    box: Box

    @property
    def errors(self) -> FloatArray:
        """The error maps on the scan's whole grid, zero where SegQC-Net did not look: (L, n0, n1, n2)."""
        return _on_grid(self.looked_at, self.box, self.assessment.shape)


@dataclass(frozen=True, slots=True)
class AssessmentSettings:
    """How an error map becomes numbers and boxes; `method.md`'s defaults."""

    extraction: ExtractionSettings = field(default_factory=ExtractionSettings)
    boxes: BoxSettings = field(default_factory=BoxSettings)
    empty_under_mm3: float = 10.0
    interval_level: float = LEVEL


def mask_sha256(labels: Volume) -> str:
    """The content address of a label map: its voxels and its grid, whatever the file format."""
    digest = hashlib.sha256(np.ascontiguousarray(labels.array, np.uint8).data)
    digest.update(np.asarray(labels.array.shape, np.int64).tobytes())
    digest.update(np.round(labels.affine, 4).astype(np.float64).tobytes())
    return digest.hexdigest()


class Assessor(TrainedNetwork):
    """SegQC-Net with its calibration, and the one for people's masks where it has one."""

    kind = "segqc"

    def __init__(
        self,
        card: ModelCard,
        network: nn.Module,
        settings: AssessmentSettings | None = None,
        backend: BackendName = "pytorch",
        *,
        people: nn.Module | None = None,
    ) -> None:
        if (people is None) != (card.people is None):
            raise ModelError("a network for people's masks and its card belong together")
        super().__init__(card, network, backend)
        if card.plan.in_channels != 1 + len(card.structures):
            raise ModelError(
                f"the card names {len(card.structures)} structures, the network takes {card.plan.in_channels - 1}"
            )
        self.settings = settings or AssessmentSettings()
        self._hidden: LatestCache[torch.Tensor] = LatestCache()
        self._people_network = people
        self._lock = threading.Lock()
        self._people: Assessor | None = None
        self._parts: dict[tuple[int, ...], Assessor] = {}
        if card.people is not None and people is not None:
            self.version = version_of(card.people, people, beside=self.version)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """SegQC-Net, and the network for people's masks where it has one."""
        return (self.network,) if self._people_network is None else (self.network, self._people_network)

    @property
    def people(self) -> Assessor | None:
        """What judges people's masks, made ready when it is first asked for; None without one."""
        if self.card.people is None or self._people_network is None:
            return None
        with self._lock:
            if self._people is None:
                own = Assessor(self.card.people, self._people_network, self.settings, self.wanted_backend)
                own.version = self.version
                self._people = own.ready()
            return self._people

    def with_card(self, card: ModelCard) -> Assessor:
        """The same networks with another card, and the same backend."""
        other = Assessor(card, self.network, self.settings, self.wanted_backend, people=self._people_network)
        other.backend = self.backend
        return other

    def with_settings(self, settings: AssessmentSettings) -> Assessor:
        """The same networks whose error maps become other numbers and boxes."""
        return Assessor(self.card, self.network, settings, self.wanted_backend, people=self._people_network)

    def with_people(self, people: Assessor) -> Assessor:
        """The same SegQC-Net with a network for people's masks."""
        card = replace(self.card, people=people.card)
        return Assessor(card, self.network, self.settings, self.wanted_backend, people=people.network)

    def judge_of(self, source: MaskSource) -> Assessor:
        """What judges masks of a source: itself, but for people's masks where it has a network for them."""
        return (self.people or self) if source == "person" else self

    def unseen_by(self, patient: str) -> Assessor | None:
        """Its members that have not trained from a patient's labels, as one with its calibration.

        Itself for a patient that none has trained from; None where all have. Each member was calibrated as it judges
        here: alone, on patients that it had not trained from. What scans are compared with is left out of a part: there
        the patient is one of those.
        """
        cards = (self.card,) if self.card.people is None else (self.card, self.card.people)
        # a member of the network for people's masks began at SegQC-Net's member of the same number
        unseen = tuple(i for i in range(self.card.members) if all(patient not in card.seen_by(i) for card in cards))
        if not unseen or len(unseen) == self.card.members:
            return self if unseen else None
        with self._lock:
            if unseen not in self._parts:
                self._parts[unseen] = self._part(unseen)
            return self._parts[unseen]

    def _part(self, members: Sequence[int]) -> Assessor:
        people = self.card.people
        card = _card_of(members, replace(self.card, people=None if people is None else _card_of(members, people)))
        networks = [_network_of(members, network) for network in self.networks]
        people_network = networks[1] if people else None
        part = Assessor(card, networks[0], self.settings, self.wanted_backend, people=people_network)
        part.version = self.version
        return part.ready()

    @classmethod
    def load(cls, path: Path, settings: AssessmentSettings | None = None, backend: BackendName = "pytorch") -> Assessor:
        """Read a model file.

        Args:
            path: the file.
            settings: how an error map becomes numbers and boxes.
            backend: what is to compute it.

        Raises:
            ModelError: if the file is missing, foreign or damaged.
            BackendError: if the backend is not there, or wrong on this machine.
        """
        card, (network, *people) = cls._read(path)
        return cls(card, network, settings, backend, people=people[0] if people else None).ready()

    def error_maps(
        self,
        scan: Volume,
        labels: Volume,
        plausible: BoolArray | None = None,
        *,
        source: MaskSource = "network",
        network_slices: Slices = (),
    ) -> FloatArray:
        """The probability that each voxel of each structure's mask is wrong: (L, n0, n1, n2), on the scan's grid.

        Arguments and errors as `assess`.
        """
        by_people = self._by_people(source, network_slices, scan.shape[through_plane_axis(scan)])
        errors, looked = self._error_maps_by_source(scan, self._masks(scan, labels), plausible, by_people)
        return _on_grid(errors, looked, scan.shape)

    def error_logits(self, scan: Volume, labels: Volume, plausible: BoolArray | None = None) -> FloatArray:
        """The logits of `error_maps`; where several networks judge one mask, these are what to average.

        Arguments and errors as `output_logits`.
        """
        z, box = self._error_logits(scan, self._masks(scan, labels), plausible)
        return _on_grid(z, box, scan.shape, NOWHERE)

    def output_logits(self, scan: Volume, labels: Volume, plausible: BoolArray | None = None) -> FloatArray:
        """The network's own logits, of truth or error as its card says, before any calibration: (L, n0, n1, n2).

        They are brought back to the scan's grid by linear interpolation and meet the mask only there (method,
        "Frames").

        Windows of air without a mask are not looked at, and there no structure is expected (a logit of `NOWHERE`).
        With ``plausible``, neither are those without a mask or a plausible voxel in or near them (`MARGIN_MM`). So
        what is never found is a structure that has no such voxel within that distance. Where one of the structures
        has no mask at all, every window is looked at.

        Args:
            scan: the scan.
            labels: the label map.
            plausible: where the segmenter holds a structure possible (`Prediction.plausible`).

        Raises:
            VolumeError: if the label map does not lie on the scan's grid.
        """
        z, box = self._output_logits(scan, self._masks(scan, labels), plausible)
        return _on_grid(z, box, scan.shape, NOWHERE)

    def _masks(self, scan: Volume, labels: Volume) -> BoolArray:
        if labels.shape != scan.shape:
            raise VolumeError(
                f"the label map has shape {labels.shape}, its scan {scan.shape}; they must share one grid"
            )
        masks = np.empty((len(self.structures), *labels.shape), bool)
        for mask, structure in zip(masks, self.structures, strict=True):
            structure.mask(labels.array, out=mask)
        return masks

    def _by_people(self, source: MaskSource, network_slices: Slices, count: int) -> BoolArray:
        """The slices that the network for people's masks judges: (count,)."""
        found = np.full(count, source == "person" and self.people is not None)
        found[list(network_slices)] = False
        return found

    def _error_maps_by_source(
        self, scan: Volume, masks: BoolArray, plausible: BoolArray | None, by_people: BoolArray
    ) -> tuple[FloatArray, Box]:
        """`_error_maps`, in some slices by the network for people's masks."""
        people = self.people
        if people is None or not by_people.any():
            return self._error_maps(scan, masks, plausible)
        by_them, looked_by_them = people._error_maps(scan, masks, plausible)
        if by_people.all():
            return by_them, looked_by_them
        own, looked_by_own = self._error_maps(scan, masks, plausible)
        axis, both = through_plane_axis(scan), _box_of_both(looked_by_them, looked_by_own)
        errors, others = (part_of(*maps, both) for maps in ((by_them, looked_by_them), (own, looked_by_own)))
        by_network = ~by_people[both[axis]]
        np.moveaxis(errors, 1 + axis, 0)[by_network] = np.moveaxis(others, 1 + axis, 0)[by_network]
        return errors, both

    def _error_maps(self, scan: Volume, masks: BoolArray, plausible: BoolArray | None) -> tuple[FloatArray, Box]:
        """The error maps where was looked, and the part of the grid that this is: beyond it they are zero."""
        z, box = self._error_logits(scan, masks, plausible)
        return torch.from_numpy(z).sigmoid_().numpy(), box

    def _error_logits(self, scan: Volume, masks: BoolArray, plausible: BoolArray | None) -> tuple[FloatArray, Box]:
        """The error's logits where was looked, and the part of the grid that this is."""
        z, box = self._output_logits(scan, masks, plausible)
        if self.card.output_form == "truth":
            for of_structure, mask in zip(z, masks[(slice(None), *box)], strict=True):
                inside = bounding_box(mask)
                if inside is not None:
                    of_structure[inside] = truth_as_error(of_structure[inside], mask[inside])
        if self.card.map_calibration:
            for of_structure, calibration in zip(z, self.card.map_calibration, strict=True):
                calibration.apply(of_structure, out=of_structure)
        return z, box

    def _output_logits(self, scan: Volume, masks: BoolArray, plausible: BoolArray | None) -> tuple[FloatArray, Box]:
        frame = self.frame(scan)
        x = network_input(scan, masks, frame)
        windows = self._windows(x[0].numpy(), masks, frame, plausible)
        hidden = self._answers_without_mask(scan, x) if self.card.hide_mask else None
        predictor = functools.partial(mean_over_flips, self.backend) if self.card.average_flips else self.backend
        if hidden is None:
            logits = self._look(predictor, x, windows)
        else:
            shown = functools.partial(_answers_to_flips, self.backend, along=(0, 2))
            logits = (self._look(lambda w: torch.stack(shown(w)).mean(dim=0), x, windows) + hidden) / 2
        box = native_support(box_around(windows), frame)
        return np.asarray(to_native(logits[0].numpy(), frame, order=1, box=box), np.float32), box

    def _look(self, predictor: Predictor, x: torch.Tensor, windows: Sequence[Window]) -> torch.Tensor:
        return self.run(x, predictor, windows=windows, elsewhere=[NOWHERE] * len(self.structures))

    def _windows(
        self, x: FloatArray, masks: BoolArray, frame: CanonicalFrame, plausible: BoolArray | None
    ) -> list[Window]:
        """The windows to look at, see `output_logits`.

        Args:
            x: scan and masks in the canonical frame: (1 + L, a, b, c).
            masks: the masks on the scan's grid: (L, n0, n1, n2).
            frame: the canonical frame.
            plausible: where structures are possible, in the segmenter's canonical frame.
        """
        windows = all_windows(frame.canonical_shape, self.card.plan.patch)
        masked = touched(functools.reduce(np.logical_or, masks), frame) | (x[1:] > 0).any(axis=0)
        # a segmenter of another spacing saw another grid
        if plausible is not None and plausible.shape == frame.canonical_shape and all(mask.any() for mask in masks):
            m0, m1, m2 = (math.ceil(MARGIN_MM / spacing) for spacing in frame.canonical_spacing_mm)
            windows = windows_near(windows, masked | plausible, (m0, m1, m2))
        return windows_near(windows, masked | not_air(x[0]))

    def _answers_without_mask(self, scan: Volume, x: torch.Tensor) -> torch.Tensor:
        """The mean of the two answers, see `answers_without_mask`, in all windows but those of air."""
        known = self._hidden.get(scan)
        if known is None:
            windows = windows_near(all_windows(x.shape[2:], self.card.plan.patch), not_air(x[0, 0].numpy()))
            answers = functools.partial(answers_without_mask, self.backend)
            known = self._hidden.keep(self._look(lambda w: torch.stack(answers(w)).mean(dim=0), x, windows), scan)
        return known

    def assess(
        self,
        scan: Volume,
        labels: Volume,
        *,
        scan_id: str,
        segmenter_version: str | None = None,
        plausible: BoolArray | None = None,
        soft: Sequence[SoftOutput] | None = None,
        source: MaskSource = "network",
        network_slices: Slices = (),
    ) -> AssessmentResult:
        """Assess a mask: metrics in 3D and per slice, error sums and boxes, before and after error extraction.

        A person's mask is judged by the network for people's masks, but for the slices that a network made and that
        the person let be: these are judged as that network's. Estimates and intervals lie between those of both kinds,
        by the share of these slices in the volume of the mask and the estimated truth.

        Args:
            scan: the scan.
            labels: its label map, on the same grid.
            scan_id: the name that the assessment carries.
            segmenter_version: the version of the network that made the mask, if one did.
            plausible: where that network holds a structure possible, see `output_logits`.
            soft: what the segmentation network of the same bundle says of each structure of its mask, if it is the one
                that made the mask, or the ``network_slices``: these are then a served one's, and else a strange one's.
            source: who made the mask. Without a network for people's masks, a person's is taken for a strange one.
            network_slices: of a person's mask, the slices across the through-plane axis, ascending, in which it still
                holds what a network made (`segqc.volumes.slices.unchanged`).

        Raises:
            VolumeError: if the label map does not lie on the scan's grid.
        """
        masks, axis = self._masks(scan, labels), through_plane_axis(scan)
        by_people = self._by_people(source, network_slices, scan.shape[axis])
        if source == "person" and not by_people.any() and len(network_slices) < len(by_people):
            soft = None  # a strange mask: nothing judges the rest of it as a person's
        kind: MaskKind = "strange" if soft is None else "served"
        errors, looked = self._error_maps_by_source(scan, masks, plausible, by_people)
        unlikeness = self._unlikeness(scan, masks)
        qualities = tuple(
            self._quality_by_source(i, mask, error, looked, axis, scan, kind, soft[i] if soft else None, by_people)
            for i, (mask, error) in enumerate(zip(masks, errors, strict=True))
        )
        if unlikeness is not None:
            qualities = tuple(replace(q, intervals=q.intervals.of_scan(unlikeness)) for q in qualities)
        assessment = Assessment(
            scan=scan_id,
            mask_sha256=mask_sha256(labels),
            segmenter_version=segmenter_version,
            assessor_version=self.version,
            through_plane_axis=axis,
            shape=scan.shape,
            spacing_mm=scan.spacing_mm,
            structures=qualities,
            backend=self.judge_of(source).backend.name,
            mask_kind="person" if source == "person" and self.people is not None else kind,
            unlikeness=unlikeness,
        )
        return AssessmentResult(assessment, errors, looked)

    def scan_features(self, scan: Volume, labels: Volume) -> Values | None:
        """The features that tell this scan from others, see `segqc.networks.encoder`: (networks, features).

        None where the network is of a kind that has none.

        Raises:
            VolumeError: if the label map does not lie on the scan's grid.
        """
        return self.features(scan, self._masks(scan, labels).any(axis=0))

    def _unlikeness(self, scan: Volume, masks: BoolArray) -> Unlikeness | None:
        reference = self.card.unlikeness
        features = None if reference is None else self.features(scan, masks.any(axis=0))
        return None if reference is None or features is None else reference.of(features)

    def map_metrics(self, scan: Volume, labels: Volume, errors: FloatArray | None = None) -> tuple[Metrics, ...]:
        """The 3D metrics of each structure as read off its error map: `assess`'s raw ones, without all the rest.

        Args:
            scan: the scan.
            labels: the label map.
            errors: its `error_maps`, where they are known.

        Raises:
            VolumeError: if the label map does not lie on the scan's grid.
        """
        empty = self._empty_rule(scan)
        errors = self.error_maps(scan, labels) if errors is None else errors
        return tuple(
            estimated_metrics(structure.mask(labels.array), error, empty=empty)
            for structure, error in zip(self.structures, errors, strict=True)
        )

    def _empty_rule(self, scan: Volume) -> EmptyRule:
        return EmptyRule(max_sum_mm3=self.settings.empty_under_mm3, voxel_volume_mm3=scan.voxel_volume_mm3)

    def _quality_by_source(
        self,
        index: int,
        mask: BoolArray,
        error: FloatArray,
        looked: Box,
        axis: int,
        scan: Volume,
        kind: MaskKind,
        soft: SoftOutput | None,
        by_people: BoolArray,
    ) -> StructureQuality:
        """`_quality`, of a mask of which the network for people's masks judged some slices."""
        people = self.people
        if people is None or not by_people.any():
            return self._quality(index, mask, error, looked, axis, scan, kind, soft)
        as_people_s = people._quality(index, mask, error, looked, axis, scan, "person", None)
        if by_people.all():
            return as_people_s
        as_network_s = self._quality(index, mask, error, looked, axis, scan, kind, soft)
        sizes = _sizes_of_slices(mask, error, looked, axis)
        share = float(sizes[~by_people].sum() / sizes.sum()) if sizes.any() else 0.0
        return replace(
            as_network_s,
            estimated=mixed_estimates(as_network_s.estimated, as_people_s.estimated, share),
            intervals=mixed_intervals(as_network_s.intervals, as_people_s.intervals, share),
            raw=_boxes_by_slice(as_network_s.raw, as_people_s.raw, by_people),
            extracted=_boxes_by_slice(as_network_s.extracted, as_people_s.extracted, by_people),
        )

    def _quality(
        self,
        index: int,
        mask: BoolArray,
        error: FloatArray,
        looked: Box,
        axis: int,
        scan: Volume,
        kind: MaskKind,
        soft: SoftOutput | None,
    ) -> StructureQuality:
        name = self.structures[index].name
        extraction = self.settings.extraction.for_structure(name)
        calibration = self.card.calibration[index] if self.card.calibration else None
        of_kind = calibration.of(kind) if calibration is not None else MaskCalibration()
        largest = calibration.largest_box_mm2 if calibration is not None else None
        boxes = self.settings.boxes.bounded(largest_mm2=largest, evidence=of_kind.least_evidence)
        least = min(extraction.threshold, boxes.threshold, PEAK_OF_A_TRUTH)
        part = _part_of_slices(mask, error, looked, axis, scan, least, extraction.band_mm)
        boxes = boxes.for_mask(part.mask, 0, part.spacing_mm)
        raw = self._view(part, part.error, boxes, scan)
        extracted = extract_errors(part.error, part.mask, 0, part.spacing_mm, extraction)
        voxels = np.count_nonzero(part.mask)
        witnesses = witnesses_of(part.mask, scan, soft, calibration.sizes if calibration is not None else None)
        estimated = of_kind.estimates(raw.metrics, witnesses)
        return StructureQuality(
            name=name,
            present=voxels > 0 or not part.truth_is_empty(self._empty_rule(scan)),
            mask_volume_ml=voxels * scan.voxel_volume_mm3 / 1000.0,
            estimated=estimated,
            raw=raw,
            extracted=self._view(part, extracted, boxes, scan),
            intervals=of_kind.intervals_of(raw.metrics, witnesses, estimated, level=self.settings.interval_level),
            witnesses=witnesses,
        )

    def _view(self, part: _PartOfSlices, error: FloatArray, boxes: BoxSettings, scan: Volume) -> ErrorView:
        metrics, per_slice, sums = estimated_metrics_and_slices(
            part.mask, error, 0, empty=self._empty_rule(scan), elsewhere=part.elsewhere, slices=part.box[0]
        )
        return ErrorView(
            metrics=metrics,
            slices=tuple(
                SliceQuality(i, of_slice, error_sum)
                for i, (of_slice, error_sum) in enumerate(zip(per_slice.each(), sums.tolist(), strict=True))
            ),
            boxes=find_boxes(error, 0, part.spacing_mm, boxes, mask=part.mask, part=part.box, shape=part.shape),
        )

    def likely_errors(self, result: AssessmentResult, scan: Volume) -> Volume:
        """The labelmap of likely errors: 1 where any structure's error probability is at least one half."""
        wrong = np.zeros(scan.shape, np.uint8)
        wrong[result.box] = (result.looked_at >= ERROR_THRESHOLD).any(axis=0)
        return Volume(wrong, scan.affine, scan.acquisition_axis)


def _card_of(members: Sequence[int], card: ModelCard) -> ModelCard:
    """The card of some members of an ensemble."""
    seen = tuple(card.seen_by(i) for i in members)
    every = tuple(sorted({patient for of_member in seen for patient in of_member}))
    return replace(card, members=len(members), members_seen=seen, seen=every, unlikeness=None)


def _network_of(members: Sequence[int], network: nn.Module) -> nn.Module:
    assert isinstance(network, MeanOfNetworks)
    chosen = [network.members[i] for i in members]
    return chosen[0] if len(chosen) == 1 else MeanOfNetworks(chosen)


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
    return np.negative(logits, out=logits.copy(), where=masks)


def calibrated_maps(logits: FloatArray, maps: Sequence[MapCalibration]) -> FloatArray:
    """Error logits (L, n0, n1, n2) after calibration; without one, as they are."""
    return np.stack([c.apply(z) for c, z in zip(maps, logits, strict=True)]) if maps else logits


def sigmoid(logits: FloatArray) -> FloatArray:
    """Probabilities of logits of any shape."""
    return np.asarray(torch.sigmoid(torch.from_numpy(np.asarray(logits, np.float32))).numpy(), np.float32)


def witnesses_of(mask: BoolArray, scan: Volume, soft: SoftOutput | None, sizes: TrainingSizes | None) -> Witnesses:
    """What speaks of a mask beside its error map.

    Args:
        mask: of one structure, or the part of it that has voxels.
        scan: for the size of its voxels.
        soft: what the network says that made the mask, if one did.
        sizes: the structure's sizes in the training, where they are known.
    """
    return Witnesses(
        soft=None if soft is None else soft.dice,
        entropy=None if soft is None else -soft.entropy,
        size=None if sizes is None else sizes.witness(mask, scan.voxel_volume_mm3),
    )


def _boxes_by_slice(one: ErrorView, other: ErrorView, by_other: BoolArray) -> ErrorView:
    """A view of an error map with the boxes of another in some slices: each judge has bounds of its own for them."""
    boxes = [box for box in one.boxes if not by_other[box.slice_index]]
    boxes += [box for box in other.boxes if by_other[box.slice_index]]
    return replace(one, boxes=tuple(sorted(boxes, key=lambda box: box.slice_index)))


def _sizes_of_slices(mask: BoolArray, error: FloatArray, looked: Box, axis: int) -> Values:
    """The sizes of a mask and of its estimated truth together, in voxels, in each slice of the scan."""
    sizes = np.zeros(mask.shape[axis])
    sizes[looked[axis]] = slice_sums(np.where(mask[looked], 2 - error, error), axis)
    return sizes


def _box_of_both(one: Box, other: Box) -> Box:
    i, j, k = (slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return i, j, k


def _on_grid(values: FloatArray, box: Box, shape: tuple[int, int, int], elsewhere: float = 0.0) -> FloatArray:
    """Values (L, ...) of a part of a grid, with another one in the rest: (L, n0, n1, n2)."""
    whole = (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))
    return part_of(values, box, whole, elsewhere)


def part_of(values: FloatArray, box: Box, part: Box, elsewhere: float = 0.0) -> FloatArray:
    """Of values (L, ...) of a box, those of another part of the same grid, with another value beyond the box."""
    if part == box:
        return values
    result = np.full((len(values), *(side.stop - side.start for side in part)), elsewhere, np.float32)
    there, here = (slice(None), *_within(part, box)), (slice(None), *_within(box, part))
    result[here] = values[there]
    return result


def _within(one: Box, other: Box) -> Box:
    """The part of a box that lies in another one, counted from where that begins."""
    i, j, k = (
        slice(max(a.start, b.start) - b.start, max(min(a.stop, b.stop), max(a.start, b.start)) - b.start)
        for a, b in zip(one, other, strict=True)
    )
    return i, j, k


@dataclass(frozen=True, slots=True)
class _PartOfSlices:
    """The part of the slices where a structure's mask and likely errors are: the slices first, then their own axes.

    Attributes:
        mask: of the part.
        error: of the part.
        elsewhere: the error's sum in the rest of each slice of the scan.
        box: the part's place in the scan.
        shape: the scan's.
        spacing_mm: the voxels'.
    """

    mask: BoolArray
    error: FloatArray
    elsewhere: Values
    box: Box
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]

    def truth_is_empty(self, empty: EmptyRule) -> bool:
        """Whether the structure's estimated truth counts as empty in the whole scan."""
        return truth_is_empty(self.mask, self.error, empty=empty, elsewhere=float(self.elsewhere.sum()))


def _part_of_slices(
    mask: BoolArray, error: FloatArray, looked: Box, axis: int, scan: Volume, least: float, reach_mm: float
) -> _PartOfSlices:
    """Find the part around a mask and errors.

    Args:
        mask: the mask, on the scan's grid.
        error: its error map, where was looked.
        looked: the part of the grid that this is.
        axis: the through-plane axis.
        scan: the scan.
        least: the error probability from which a voxel belongs to the part.
        reach_mm: how far around the mask the part reaches in its slices.
    """
    inside, likely = bounding_box(mask), bounding_box(error >= least)
    boxes = [] if inside is None else [inside]
    if likely is not None:
        i, j, k = (slice(side.start + o.start, side.stop + o.start) for side, o in zip(likely, looked, strict=True))
        boxes.append((i, j, k))
    box = functools.reduce(_box_of_both, boxes) if boxes else (slice(0, 0), slice(0, 0), slice(0, 0))
    margin = [0 if a == axis else 1 + int(reach_mm / spacing) for a, spacing in enumerate(scan.spacing_mm)]
    box = padded_box(box, margin, scan.shape)
    found = part_of(error[None], looked, box)[0]
    elsewhere = np.zeros(scan.shape[axis])
    elsewhere[looked[axis]] += slice_sums(error, axis)
    elsewhere[box[axis]] -= slice_sums(found, axis)
    order = (axis, *(a for a in range(3) if a != axis))
    i, j, k = (box[a] for a in order)
    return _PartOfSlices(
        np.ascontiguousarray(mask[box].transpose(order)),
        np.ascontiguousarray(found.transpose(order)),
        elsewhere,
        (i, j, k),
        (scan.shape[order[0]], scan.shape[order[1]], scan.shape[order[2]]),
        (scan.spacing_mm[order[0]], scan.spacing_mm[order[1]], scan.spacing_mm[order[2]]),
    )
