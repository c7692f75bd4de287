"""One network for the error map and the Dice: a small form of QCResUNet (Qiu et al. 2023), on SegQC-Net's plan.

Scan and mask go through one encoder. A decoder gives the error map directly, a head on the coarsest features gives
the Dice of each structure; both are trained together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from monai.losses import DiceLoss
from torch import nn

from segqc.evaluation.methods.estimates import (
    EMPTY_UNDER_MM3,
    AssessedMask,
    Estimate,
    empty_rule,
    estimate_from_error_map,
    structure_masks,
)
from segqc.evaluation.methods.learned import (
    PooledHead,
    around_masks,
    batch_metrics,
    encoder_blocks,
    flipped,
    mask_job,
    plan_unet,
    scan_and_mask_input,
    scan_and_masks,
)
from segqc.networks.assessor import mean_over_flips, sigmoid
from segqc.networks.device import device_of_choice
from segqc.networks.inference import sliding_window
from segqc.networks.plan import NetworkPlan
from segqc.networks.unet import depth_to_space, space_to_depth
from segqc.progress import Progress
from segqc.split import PatientSplit
from segqc.training.crossfit import MaskSet
from segqc.training.engine import fit
from segqc.training.patches import Patch
from segqc.training.segmentation import plan_for
from segqc.training.spec import TrainingSettings
from segqc.types import Structure
from segqc.volumes import canonical_frame, through_plane_axis, to_native

_FIRST_BIAS = -3.0  # errors are rare


class MapAndScoreNetwork(nn.Module):
    """A U-Net of the plan with a second head on its coarsest features."""

    def __init__(self, plan: NetworkPlan) -> None:
        super().__init__()
        self.stem = plan.stem
        unet = plan_unet(plan)
        self.down = encoder_blocks(unet)
        self.up = nn.ModuleList(unet.upsamples)
        self.map_head = unet.output_block
        self.score_head = PooledHead(plan.filters[-1], plan.out_channels)
        nn.init.constant_(self.map_head.conv.conv.bias, _FIRST_BIAS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the error map and of the Dice, one row per item: (N, L * a * b * c + L)."""
        features = self._features(x)
        return torch.cat([self._map(features).flatten(1), self.score_head(features[-1])], dim=1)

    def error_logits(self, x: torch.Tensor) -> torch.Tensor:
        """The error map's logits (N, L, a, b, c) of a batch (N, 1 + L, a, b, c)."""
        return self._map(self._features(x))

    def dice_logits(self, x: torch.Tensor) -> torch.Tensor:
        """The Dice's logits (N, L) of a batch (N, 1 + L, a, b, c)."""
        return torch.as_tensor(self.score_head(self._features(x)[-1]))

    def _features(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = [space_to_depth(x, self.stem)]
        for block in self.down:
            features.append(block(features[-1]))
        return features[1:]

    def _map(self, features: list[torch.Tensor]) -> torch.Tensor:
        x = features[-1]
        for block, skip in zip(self.up, reversed(features[:-1]), strict=True):
            x = block(x, skip)
        return depth_to_space(self.map_head(x), self.stem)


class MapAndScore:
    """Dice from the score head, and IoU with it; ARVD, RVD, slices and the error map from the map head."""

    def __init__(
        self,
        network: MapAndScoreNetwork,
        plan: NetworkPlan,
        structures: Sequence[Structure],
        *,
        average_flips: bool = False,
        name: str = "map and score",
        empty_under_mm3: float = EMPTY_UNDER_MM3,
    ) -> None:
        self.name = name
        self.device = device_of_choice()
        self.network = network.to(self.device).eval()
        self.plan = plan
        self.structures = tuple(structures)
        self.average_flips = average_flips
        self.empty_under_mm3 = empty_under_mm3

    def estimate(self, mask: AssessedMask) -> tuple[Estimate, ...]:
        """Estimate from both heads."""
        x = scan_and_mask_input(mask, self.plan, self.structures)
        batch = flipped(around_masks(x, x[:, 1:], self.plan), average_flips=self.average_flips)
        with torch.inference_mode():
            scores = self.network.dice_logits(batch.to(self.device)).sigmoid().mean(dim=0).cpu().tolist()
        logits = mean_over_flips(self._error_logits, x) if self.average_flips else self._error_logits(x)
        frame = canonical_frame(mask.scan, spacing_mm=self.plan.spacing_mm)
        errors = sigmoid(to_native(logits[0].numpy(), frame, order=1))
        axis, empty = through_plane_axis(mask.scan), empty_rule(mask.scan, self.empty_under_mm3)
        masks = structure_masks(mask.labels.array, self.structures)
        return tuple(
            _with_dice(estimate_from_error_map(m, e, axis, empty), dice)
            for m, e, dice in zip(masks, errors, scores, strict=True)
        )

    def _error_logits(self, x: torch.Tensor) -> torch.Tensor:
        return sliding_window(self.network.error_logits, x, self.plan.patch, self.device)


def train_map_and_score(
    sets: Sequence[MaskSet],
    structures: Sequence[Structure],
    patient_splits: dict[str, PatientSplit],
    settings: TrainingSettings,
    folder: Path,
    progress: Progress,
) -> MapAndScore:
    """Train both heads on given masks, or return the training of the same data found in ``folder``.

    The loss is Dice and cross-entropy of the error map and the absolute error of the Dice, in equal parts; the Dice is
    that of the augmented patch. Arguments as in `train_regression`.
    """
    cases = [s.case for s in sets]
    plan = plan_for(cases, settings, in_channels=1 + len(structures), out_channels=len(structures))

    def prepare(batch: Patch) -> tuple[torch.Tensor, torch.Tensor]:
        x, masks, truths = scan_and_masks(batch, structures)
        return x, torch.cat([(masks != truths).float().flatten(1), batch_metrics(masks, truths)[..., 0]], dim=1)

    overlap = DiceLoss(sigmoid=True, batch=True)

    def loss(predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        maps, errors = (t[:, : -len(structures)].unflatten(1, (len(structures), -1)) for t in (predicted, true))
        scores, dice = predicted[:, -len(structures) :].sigmoid(), true[:, -len(structures) :]
        of_map = overlap(maps, errors) + nn.functional.binary_cross_entropy_with_logits(maps, errors)
        return torch.as_tensor(of_map + nn.functional.l1_loss(scores, dice))

    job = mask_job(
        "map-and-score",
        sets,
        structures,
        patient_splits,
        settings,
        plan,
        MapAndScoreNetwork,
        prepare,
        loss,
        around=False,
    )
    network = fit(job, folder, progress).network
    assert isinstance(network, MapAndScoreNetwork)
    return MapAndScore(network, plan, structures, average_flips=settings.average_flips)


def _with_dice(estimate: Estimate, dice: float) -> Estimate:
    """The estimate with another Dice, and the IoU that goes with it."""
    return replace(estimate, metrics=replace(estimate.metrics, dice=dice, iou=dice / (2 - dice)))
