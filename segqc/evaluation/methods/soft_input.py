"""SegQC-Net that sees what the mask's source network was sure of: one more channel per structure, its soft output.

An ablation: a mask that a person has drawn or corrected has no such channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from segqc.evaluation.methods.estimates import (
    SILENT,
    AssessedMask,
    Estimate,
    empty_rule,
    estimate_from_error_map,
    structure_masks,
)
from segqc.evaluation.methods.maps import structure_probabilities
from segqc.networks.assessor import (
    answers_without_mask,
    calibrated_maps,
    mean_over_flips,
    sigmoid,
    truth_as_error,
)
from segqc.networks.device import device_of_choice
from segqc.networks.inference import network_input, sliding_window
from segqc.networks.plan import NetworkPlan
from segqc.networks.segmenter import Segmenter
from segqc.progress import Progress
from segqc.quality.calibration import MapCalibration
from segqc.training.assessor_network import assessor_job, mask_examples
from segqc.training.cases import label_values, read_case
from segqc.training.crossfit import MaskSet
from segqc.training.engine import fit
from segqc.training.segmentation import plan_for
from segqc.training.spec import TrainingSettings
from segqc.types import FloatArray, Structure
from segqc.volumes import CanonicalFrame, Volume, canonical_frame, through_plane_axis, to_canonical, to_native


@dataclass(frozen=True, slots=True)
class SourcedMasks:
    """The masks of a case with the networks that made them, and for each mask the number of its network."""

    masks: MaskSet
    sources: tuple[Segmenter, ...]
    source_of: tuple[int, ...]


class SoftInput:
    """A SegQC-Net of output form "truth" with soft outputs as inputs; says nothing of a mask that no network made."""

    def __init__(
        self,
        network: nn.Module,
        plan: NetworkPlan,
        structures: Sequence[Structure],
        empty_under_mm3: float,
        settings: TrainingSettings,
        maps: Sequence[MapCalibration] = (),
    ) -> None:
        self.name = "soft input"
        self.device = device_of_choice()
        self.network = network.to(self.device).eval()
        self.plan = plan
        self.structures = tuple(structures)
        self.empty_under_mm3 = empty_under_mm3
        self.settings = settings
        self.maps = tuple(maps)

    def with_maps(self, maps: tuple[MapCalibration, ...]) -> SoftInput:
        """The same network with calibrated maps, one per structure."""
        return SoftInput(self.network, self.plan, self.structures, self.empty_under_mm3, self.settings, maps)

    def estimate(self, mask: AssessedMask) -> tuple[Estimate, ...]:
        """Estimate from scan, mask and the source network's soft output."""
        if mask.source is None:
            return (SILENT,) * len(self.structures)
        logits = self.truth_logits(mask, mask.source)
        masks = structure_masks(mask.labels.array, self.structures)
        errors = sigmoid(calibrated_maps(truth_as_error(logits, masks), self.maps))
        axis, empty = through_plane_axis(mask.scan), empty_rule(mask.scan, self.empty_under_mm3)
        return tuple(estimate_from_error_map(m, e, axis, empty) for m, e in zip(masks, errors, strict=True))

    def truth_logits(self, mask: AssessedMask, source: Segmenter) -> FloatArray:
        """The network's logits of the truth, before calibration: (L, n0, n1, n2)."""
        frame = canonical_frame(mask.scan, spacing_mm=self.plan.spacing_mm)
        masks = structure_masks(mask.labels.array, self.structures)
        soft = torch.from_numpy(_soft_output(source, mask.scan, self.structures, frame))[None]
        x = torch.cat([network_input(mask.scan, masks, frame), soft], dim=1)
        hidden = answers_without_mask(self._run, x) if self.settings.hide_mask else None
        logits = mean_over_flips(self._run, x, hidden=hidden) if self.settings.average_flips else self._run(x)
        return np.asarray(to_native(logits[0].numpy(), frame, order=1), np.float32)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        return sliding_window(self.network, x, self.plan.patch, self.device)


def train_soft_input(
    made: Sequence[SourcedMasks],
    structures: Sequence[Structure],
    settings: TrainingSettings,
    empty_under_mm3: float,
    folder: Path,
    progress: Progress,
) -> SoftInput:
    """Train it as SegQC-Net is, or take over the training of the same data found in ``folder``.

    Args:
        made: masks and their source networks, none of which has seen the scan's label.
        structures: what is assessed.
        settings: SegQC-Net's, of output form "truth".
        empty_under_mm3: an estimated truth with a smaller sum counts as empty.
        folder: for the checkpoint.
        progress: reports after each step.
    """
    sets, count = [m.masks for m in made], len(structures)
    plan = plan_for([s.case for s in sets], settings, in_channels=1 + 2 * count, out_channels=count)
    soft = (output for m in made for output in _soft_outputs(m, structures, plan))
    examples = [
        replace(example, soft=output)
        for example, output in zip(mask_examples(sets, label_values(structures), plan), soft, strict=True)
    ]
    job = assessor_job("soft input", plan, examples, [], structures, settings)
    return SoftInput(fit(job, folder, progress).network, plan, structures, empty_under_mm3, settings)


def _soft_outputs(made: SourcedMasks, structures: Sequence[Structure], plan: NetworkPlan) -> list[FloatArray]:
    """One per mask; masks of one network share one array."""
    scan, _ = read_case(made.masks.case, label_values(structures))
    frame = canonical_frame(scan, spacing_mm=plan.spacing_mm)
    outputs = [_soft_output(source, scan, structures, frame) for source in made.sources]
    return [outputs[number] for number in made.source_of]


def _soft_output(source: Segmenter, scan: Volume, structures: Sequence[Structure], frame: CanonicalFrame) -> FloatArray:
    """Each structure's probability in the canonical frame: (L, a, b, c)."""
    probabilities = structure_probabilities(source, source.predict(scan).probabilities, structures)
    return np.asarray(to_canonical(probabilities, frame, order=1), np.float32)
