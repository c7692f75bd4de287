"""Patches for training: drawn and augmented as a function of (seed, draw) alone, so that a training can resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandRotate90d,
    RandScaleIntensityd,
)
from torch.utils.data import Dataset, Sampler

from segqc.networks.plan import NetworkPlan, Triple
from segqc.quality.error_maps import bounding_box
from segqc.training.cases import Example
from segqc.training.corruptions import deformed, sampling_grid
from segqc.training.intensities import with_other_intensities
from segqc.training.spec import TrainingSettings
from segqc.types import BoolArray, FloatArray, LabelArray

Indices: TypeAlias = npt.NDArray[np.intp]

FOREGROUND_SHARE = 0.7  # of the patches are centred on a voxel of the truth or of the mask's error

Patch = dict[Literal["image", "truth", "mask", "soft", "ignored"], torch.Tensor]


class Draws(Sampler[int]):
    """The numbers of the draws: an endless sequence from ``start`` on."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        draw = self.start
        while True:
            yield draw
            draw += 1


class PatchDataset(Dataset[Patch]):
    """Augmented patches; item ``draw`` depends on the seed, the draw and the examples only.

    Tensors: image (1, a, b, c) float, truth and mask (1, a, b, c) float label maps, soft (L, a, b, c) where there is
    one; it is empty where the mask is. Where any example has voxels to ignore, ignored (1, a, b, c) is 1 at these.
    """

    def __init__(
        self, examples: Sequence[Example], plan: NetworkPlan, settings: TrainingSettings, *, empty_until: int = 0
    ) -> None:
        """Take the examples; before draw ``empty_until`` all masks are empty, then some (see `TrainingSettings`)."""
        self.examples = examples
        self.patch = plan.patch
        self.seed = settings.seed
        self.empty_until = empty_until
        self.empty_share = settings.empty_mask_share
        self.spacing_mm = plan.spacing_mm
        self.deformation_mm = settings.mask_deformation * min(plan.spacing_mm)
        weights = np.array([e.weight for e in examples])
        self.cumulated = np.cumsum(weights / weights.sum())
        self.masked = examples[0].mask is not None
        self.ignoring = any(e.ignored is not None for e in examples)
        intensities = settings.segqc_intensities if self.masked else settings.segmentation_intensities
        self.strong = intensities == "strong"
        self.augment = _augmentation(
            settings,
            plan,
            masked=self.masked,
            soft=examples[0].soft is not None,
            ignoring=self.ignoring,
            intensities=not self.strong,
        )
        self.interesting = [_interesting(e) for e in examples]
        self.known = [None if e.ignored is None else _subsampled(e.ignored == 0) for e in examples]

    def __getitem__(self, draw: int) -> Patch:
        rng = np.random.default_rng((self.seed, draw))
        index = min(int(np.searchsorted(self.cumulated, rng.random())), len(self.examples) - 1)
        example = self.examples[index]
        start = self._start(example.image.shape, self.interesting[index], self.known[index], rng)
        item: Patch = {"image": cut(example.image, start, self.patch), "truth": cut(example.truth, start, self.patch)}
        if example.mask is not None:
            mask = cut(example.mask, start, self.patch)
            empty = rng.random() < self.empty_share or draw < self.empty_until
            item["mask"] = torch.zeros_like(mask) if empty else mask
            if example.soft is not None:
                soft = cut_channels(example.soft, start, self.patch)
                item["soft"] = torch.zeros_like(soft) if empty else soft
        if self.ignoring:  # all patches of a batch have the same tensors
            item["ignored"] = ignored_in(example, start, self.patch)
        self.augment.set_random_state(seed=int(rng.integers(2**31)))
        augmented = self.augment(item)
        # plain tensors: with MONAI's metadata every operation of a training would take longer
        patch: Patch = {key: augmented[key].as_subclass(torch.Tensor) for key in item}
        if self.strong:
            patch["image"] = torch.from_numpy(with_other_intensities(patch["image"][0].numpy(), rng))[None]
        if self.deformation_mm and "mask" in patch:
            grid = sampling_grid(self.patch, self.spacing_mm, self.deformation_mm, rng)
            patch["mask"] = deformed(patch["mask"], grid, labels=True)
            if "soft" in patch:
                patch["soft"] = deformed(patch["soft"], grid, labels=False)
        return patch

    def _start(
        self, shape: tuple[int, ...], interesting: Indices, known: Indices | None, rng: np.random.Generator
    ) -> Triple:
        if len(interesting) and rng.random() < FOREGROUND_SHARE:
            centre = np.array(np.unravel_index(int(rng.choice(interesting)), shape))
        elif known is not None:  # a patch in which nothing is known would be a wasted step
            centre = np.array(np.unravel_index(int(rng.choice(known)), shape))
        else:
            centre = rng.integers(0, shape)
        room = np.array(shape) - self.patch
        start = np.clip(centre - np.array(self.patch) // 2, np.minimum(room, 0), np.maximum(room, 0))
        start = np.where(room < 0, room // 2, start)
        return int(start[0]), int(start[1]), int(start[2])


def cut(array: FloatArray | LabelArray, start: Triple, patch: Triple) -> torch.Tensor:
    """Cut a patch (1, a, b, c) that may reach over the borders, where it is zero."""
    result = np.zeros((1, *patch), np.float32)
    source = tuple(slice(max(s, 0), min(s + p, n)) for s, p, n in zip(start, patch, array.shape, strict=True))
    target = tuple(slice(max(-s, 0), max(-s, 0) + c.stop - c.start) for s, c in zip(start, source, strict=True))
    result[(0, *target)] = array[source]
    return torch.from_numpy(result)


def ignored_in(example: Example, start: Triple, patch: Triple) -> torch.Tensor:
    """What of a patch (1, a, b, c) is left out of the loss: 1 there, 0 elsewhere."""
    return torch.zeros((1, *patch)) if example.ignored is None else cut(example.ignored, start, patch)


def cut_channels(array: FloatArray, start: Triple, patch: Triple) -> torch.Tensor:
    """Cut a patch (L, a, b, c) as `cut` does, of each channel."""
    return torch.cat([cut(channel, start, patch) for channel in array])


def centred(example: Example, patch: Triple, *, ignoring: bool) -> Patch:
    """The patch around the centre of the truth's bounding box, without augmentation: what validation looks at.

    It says which voxels are ignored where any example of its batch has some (``ignoring``).
    """
    at = centred_start(example.truth, patch)
    item: Patch = {"image": cut(example.image, at, patch), "truth": cut(example.truth, at, patch)}
    if example.mask is not None:
        item["mask"] = cut(example.mask, at, patch)
    if example.soft is not None:
        item["soft"] = cut_channels(example.soft, at, patch)
    if ignoring:
        item["ignored"] = ignored_in(example, at, patch)
    return item


def centred_start(labels: LabelArray, patch: Triple) -> Triple:
    """Where a patch starts that has the bounding box of a label map (a, b, c) in its middle, as far as there is room.

    Without a label it is the middle of the array; along an axis shorter than the patch, too, and then negative.
    """
    box = bounding_box(labels > 0)
    centre = np.array(labels.shape if box is None else [part.start + part.stop - 1 for part in box]) // 2
    room = np.array(labels.shape) - patch
    start = np.where(room < 0, room // 2, np.clip(centre - np.array(patch) // 2, 0, np.maximum(room, 0)))
    return int(start[0]), int(start[1]), int(start[2])


def _interesting(example: Example) -> Indices:
    """Flat indices of the voxels worth centring a patch on; at most 5000 of them, evenly subsampled."""
    interest = example.truth > 0
    if example.mask is not None:
        interest = interest | (example.mask > 0)
    if example.ignored is not None:
        interest = interest & (example.ignored == 0)
    return _subsampled(interest)


def _subsampled(where: BoolArray) -> Indices:
    indices = np.flatnonzero(where)
    return indices[:: max(1, len(indices) // 5000)]


def _augmentation(
    settings: TrainingSettings, plan: NetworkPlan, *, masked: bool, soft: bool, ignoring: bool, intensities: bool
) -> Compose:
    keys = ["image", "truth", *["mask"] * masked, *["soft"] * soft, *["ignored"] * ignoring]
    modes = ["bilinear" if key in ("image", "soft") else "nearest" for key in keys]
    near_isotropic = max(plan.spacing_mm) < 2 * min(plan.spacing_mm)
    tilt = 0.15 if near_isotropic else 0.0  # thick slices are not tilted out of plane
    steps = [
        RandAffined(
            keys,
            prob=0.7,
            rotate_range=(tilt, tilt, 0.26),
            scale_range=(0.15, 0.15, 0.15 if near_isotropic else 0.0),
            mode=modes,
            padding_mode="zeros",
        ),
    ]
    if intensities:
        steps += [
            RandAdjustContrastd("image", prob=0.3, gamma=(0.6, 1.6)),
            RandScaleIntensityd("image", factors=0.25, prob=0.5),
            RandGaussianNoised("image", prob=0.3, std=0.15),
        ]
    if settings.flips:
        steps += [RandFlipd(keys, prob=0.5, spatial_axis=0), RandFlipd(keys, prob=0.5, spatial_axis=1)]
    if settings.transposes and plan.patch[0] == plan.patch[1]:
        steps.append(RandRotate90d(keys, prob=0.5, max_k=3, spatial_axes=(0, 1)))
    return Compose(steps)
