"""What the learned baselines share: an encoder of SegQC-Net's plan, examples cut around the mask, the scan-mask input.

They train on the same masks, patches, augmentation and number of steps as SegQC-Net, through the same `fit`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from monai.networks.nets import DynUNet
from torch import nn

from segqc.evaluation.methods.estimates import AssessedMask, structure_masks
from segqc.networks.augmentation import tta_group
from segqc.networks.inference import network_input
from segqc.networks.plan import NetworkPlan, Triple
from segqc.networks.unet import space_to_depth
from segqc.quality.error_maps import bounding_box
from segqc.split import PatientSplit
from segqc.training.assessor_calibration import VALIDATION_MASKS
from segqc.training.assessor_network import mask_channels, mask_examples
from segqc.training.cases import Example, label_values
from segqc.training.crossfit import MaskSet, subsample
from segqc.training.engine import Job, Loss, NetworkBuilder, PrepareBatch
from segqc.training.patches import Patch, centred_start, cut
from segqc.training.spec import TrainingSettings
from segqc.types import LabelArray, Structure
from segqc.volumes import canonical_frame


def plan_unet(plan: NetworkPlan) -> DynUNet:
    """The plan's U-Net behind its stem, with batch instead of instance normalisation.

    Normalised by itself, an input with a large mask pools to the same numbers as one with a small mask: the regression
    then hardly told masks apart (Pearson .02 with groups of channels normalised, .93 with batches, in one short trial).
    """
    blocks = math.prod(plan.stem)
    return DynUNet(
        spatial_dims=3,
        in_channels=plan.in_channels * blocks,
        out_channels=plan.out_channels * blocks,
        kernel_size=plan.kernels,
        strides=plan.strides,
        upsample_kernel_size=plan.strides[1:],
        filters=plan.filters,
        norm_name="batch",
    )


def encoder_blocks(unet: DynUNet) -> nn.ModuleList:
    """The way down of a U-Net, from the finest to the coarsest level."""
    return nn.ModuleList([unet.input_block, *unet.downsamples, unet.bottleneck])


class PlanEncoder(nn.Module):
    """The way down of the plan's U-Net, behind its space-to-depth stem."""

    def __init__(self, plan: NetworkPlan) -> None:
        super().__init__()
        self.stem = plan.stem
        self.blocks = encoder_blocks(plan_unet(plan))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The coarsest level's features (N, filters[-1], a', b', c') of a batch (N, in_channels, a, b, c)."""
        x = space_to_depth(x, self.stem)
        for block in self.blocks:
            x = block(x)
        return x


class PooledHead(nn.Module):
    """Numbers from a feature map: its mean and its maximum over the voxels, then one linear layer."""

    def __init__(self, channels: int, numbers: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * channels, numbers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Numbers (N, numbers) of features (N, channels, a, b, c)."""
        pooled = torch.cat([features.mean(dim=(2, 3, 4)), features.amax(dim=(2, 3, 4))], dim=1)
        return torch.as_tensor(self.linear(pooled))


def total_stride(plan: NetworkPlan) -> Triple:
    """Voxels of the canonical frame per voxel of the coarsest level."""
    first, second, third = (math.prod(s[a] for s in plan.strides) * plan.stem[a] for a in range(3))
    return first, second, third


def scan_and_mask_input(mask: AssessedMask, plan: NetworkPlan, structures: Sequence[Structure]) -> torch.Tensor:
    """Scan and masks as channels in the plan's canonical frame: (1, 1 + L, a, b, c)."""
    frame = canonical_frame(mask.scan, spacing_mm=plan.spacing_mm)
    return network_input(mask.scan, structure_masks(mask.labels.array, structures), frame)


def around_masks(x: torch.Tensor, masks: torch.Tensor, plan: NetworkPlan) -> torch.Tensor:
    """Cut the window around all masks' bounding box that a pooling network looks at, padded with zeros.

    It has the patch's shape, as in training, or along axes where the masks are longer the next larger that the
    network's strides divide: no part of a mask goes unseen.

    Args:
        x: (1, C, a, b, c).
        masks: the channels of x, or of something on its grid, that hold the masks: (1, L, a, b, c).
        plan: the network's plan.
    """
    union = union_of(masks)
    box = bounding_box(union > 0)
    extents = [1, 1, 1] if box is None else [part.stop - part.start for part in box]
    size = [
        p if p >= n else math.ceil(n / s) * s for p, n, s in zip(plan.patch, extents, total_stride(plan), strict=True)
    ]
    shape: Triple = (size[0], size[1], size[2])
    return cut_window(x, centred_start(union, shape), shape)


def union_of(masks: torch.Tensor) -> LabelArray:
    """The union of masks (1, L, a, b, c) as a label map (a, b, c)."""
    return np.asarray((masks[0] > 0.5).any(dim=0).numpy(), np.uint8)


def cut_window(x: torch.Tensor, start: Triple, shape: Triple) -> torch.Tensor:
    """Cut a window that may reach over the borders out of (1, C, a, b, c)."""
    return torch.cat([cut(channel, start, shape) for channel in x[0].numpy()])[None]


def flipped(x: torch.Tensor, *, average_flips: bool) -> torch.Tensor:
    """The batch of an input (1, C, a, b, c) and, if asked for, its in-plane flips, to average numbers over."""
    return torch.cat([m.apply(x) for m in tta_group(transposes=False)]) if average_flips else x


def mask_job(
    name: str,
    sets: Sequence[MaskSet],
    structures: Sequence[Structure],
    patient_splits: dict[str, PatientSplit],
    settings: TrainingSettings,
    plan: NetworkPlan,
    build: NetworkBuilder,
    prepare: PrepareBatch,
    loss: Loss,
    *,
    around: bool,
) -> Job:
    """Describe a training on scan-mask pairs like SegQC-Net's: its masks, weights and validation.

    Args:
        name: of the baseline.
        sets: cases with their masks.
        structures: the structures to assess.
        patient_splits: fold and role of each patient.
        settings: how to train.
        plan: the network's plan.
        build: makes the network.
        prepare: makes input and target of a batch.
        loss: of output and target.
        around: whether all patches are cut around the mask, for networks that give numbers of it only; a map must be
            right far from the mask as well.
    """
    values = label_values(structures)
    train = [s for s in sets if patient_splits[s.case.patient].split == "train"]
    validation = [subsample(s, VALIDATION_MASKS) for s in sets if patient_splits[s.case.patient].split == "validation"]
    examples = [mask_examples(part, values, plan) for part in (train, validation)]
    if around:
        examples = [[cut_around_mask(e, plan.patch) for e in part] for part in examples]
    return Job(
        name=name,
        plan=plan,
        settings=settings,
        epochs=settings.epochs,
        train=examples[0],
        validation=examples[1],
        prepare=prepare,
        loss=loss,
        build=build,
        variant=f"{name} {tuple(structures)}",
    )


def cut_around_mask(example: Example, patch: Triple) -> Example:
    """Cut an example to the patch around its mask, or its truth where it has none; views, not copies."""
    start = centred_start(example.truth if example.mask is None else example.mask, patch)
    first, second, third = (slice(max(s, 0), max(s, 0) + p) for s, p in zip(start, patch, strict=True))
    box = (first, second, third)
    mask = None if example.mask is None else example.mask[box]
    return replace(example, image=example.image[box], truth=example.truth[box], mask=mask)


def scan_and_masks(batch: Patch, structures: Sequence[Structure]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input (N, 1 + L, a, b, c), masks and truths (N, L, a, b, c) of a batch."""
    masks, truths = mask_channels(batch["mask"], structures), mask_channels(batch["truth"], structures)
    return torch.cat([batch["image"], masks], dim=1), masks, truths


def batch_metrics(masks: torch.Tensor, truths: torch.Tensor) -> torch.Tensor:
    """True Dice, IoU, ARVD and RVD of binary masks (N, L, a, b, c): (N, L, 4), NaN where undefined.

    What `segqc.quality.metrics.true_metrics` gives, for the patches of a batch.
    """
    over = (2, 3, 4)
    in_mask, in_truth, in_both = masks.sum(over), truths.sum(over), (masks * truths).sum(over)
    either, counted = in_mask + in_truth - in_both, in_mask + in_truth > 0
    undefined = torch.where(counted, torch.nan, 0.0)
    columns = [
        torch.where(counted, 2 * in_both / (in_mask + in_truth), 1.0),
        torch.where(counted, in_both / either, 1.0),
        torch.where(in_truth > 0, (either - in_both) / in_truth, undefined),
        torch.where(in_truth > 0, (in_mask - in_truth) / in_truth, undefined),
    ]
    return torch.stack(columns, dim=-1)
