"""Random errors of a mask's contour that no network made, so that SegQC-Net learns to look at the scan for it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from segqc.networks.plan import Triple

CORRELATION_VOXELS = 6  # of the shortest side: so far apart are displacements that are drawn, not interpolated


def sampling_grid(
    shape: Triple, spacing_mm: Sequence[float], largest_mm: float, rng: np.random.Generator
) -> torch.Tensor:
    """Where a smoothly deformed volume is read: the grid of `torch.nn.functional.grid_sample`, (1, a, b, c, 3).

    Displacements are normal, with one standard deviation for the whole volume, drawn up to the largest. They are
    lengths, so that thick slices hardly move along their axis and each deforms on its own.

    Args:
        shape: of the volume, voxels.
        spacing_mm: of its voxels.
        largest_mm: the largest standard deviation of a displacement along an axis.
        rng: the source of the draws.
    """
    spacing = np.asarray(spacing_mm)
    apart = CORRELATION_VOXELS * spacing.min()
    nodes = [max(2, round(n * s / apart) + 1) for n, s in zip(shape, spacing, strict=True)]
    drawn = rng.standard_normal((1, 3, *nodes), dtype=np.float32) * np.float32(largest_mm * rng.random())
    field = functional.interpolate(torch.from_numpy(drawn), size=shape, mode="trilinear", align_corners=True)
    # from mm to the grid's units, in which a volume is 2 long; the last axis comes first
    units = torch.tensor([2 / (max(n - 1, 1) * s) for n, s in zip(shape, spacing, strict=True)], dtype=torch.float32)
    return _undeformed(shape) + (field.permute(0, 2, 3, 4, 1) * units).flip(-1)


@functools.lru_cache(maxsize=1)
def _undeformed(shape: Triple) -> torch.Tensor:
    """The grid that reads a volume as it is: the same for all patches of a training."""
    return functional.affine_grid(torch.eye(3, 4)[None], [1, 1, *shape], align_corners=True)


def deformed(volume: torch.Tensor, grid: torch.Tensor, *, labels: bool) -> torch.Tensor:
    """The volume (channels, a, b, c) as read at a sampling grid; what lies outside is zero.

    Args:
        volume: what is deformed.
        grid: from `sampling_grid`.
        labels: whether its values are labels, which can't be interpolated.
    """
    mode = "nearest" if labels else "bilinear"
    return functional.grid_sample(volume[None], grid, mode=mode, padding_mode="zeros", align_corners=True)[0]
