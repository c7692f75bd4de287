"""What a network's encoder makes of a scan: a few numbers that tell scans of one scanner and body part from others.

The scan alone is shown, without any mask, in one part around where the mask is. Each block of the encoder ends with an
instance normalisation and a rectifier: means and deviations of a channel behind these say how its values are
distributed. The fine levels see noise and contrast, the coarse ones another anatomy or orientation. What to take was
measured (``docs/measurements.md``).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from segqc.networks.device import in_device_memory
from segqc.networks.plan import NetworkPlan, Triple
from segqc.networks.unet import MeanOfNetworks, StemUNet
from segqc.quality.error_maps import bounding_box
from segqc.quality.metrics import Values
from segqc.types import BoolArray, FloatArray
from segqc.volumes import CanonicalFrame

_TINY = 1e-6


def encoders(network: nn.Module) -> tuple[StemUNet, ...]:
    """The networks of an ensemble that have an encoder to look into; none where they are of another kind."""
    members = tuple(network.members) if isinstance(network, MeanOfNetworks) else (network,)
    return tuple(member for member in members if isinstance(member, StemUNet))


def part_extent(plan: NetworkPlan) -> Triple:
    """The extent of the part that is looked at: half the patch, as more would take long for what it tells."""
    factors = np.prod([plan.stem, *plan.strides], axis=0).tolist()
    a, b, c = (math.ceil(size / 2 / factor) * factor for size, factor in zip(plan.patch, factors, strict=True))
    return a, b, c


def part_around(image: FloatArray, mask: BoolArray, frame: CanonicalFrame, extent: Triple) -> torch.Tensor:
    """The part of a scan around the middle of a mask; of the scan, where the mask is empty.

    Args:
        image: the scan in the canonical frame, (a, b, c).
        mask: on the scan's own grid, (n0, n1, n2).
        frame: the canonical frame.
        extent: of the part; what it reaches beyond the scan is zero.

    Returns:
        (1, 1, *extent).
    """
    box = bounding_box(mask)
    window, padding = list[slice](), list[int]()
    for axis, flip, size, width in zip(frame.permutation, frame.flips, image.shape, extent, strict=True):
        middle = 0.5 if box is None else (box[axis].start + box[axis].stop) / (2 * frame.native_shape[axis])
        first = round((1 - middle if flip else middle) * size - width / 2)
        start = min(max(0, first), max(0, size - width))
        window.append(slice(start, start + width))
        before = max(0, width - size) // 2
        padding = [before, max(0, width - size) - before, *padding]  # PyTorch's order: the last axis first
    part = np.ascontiguousarray(image[tuple(window)])
    return F.pad(torch.from_numpy(part)[None, None], padding)


def encoder_features(networks: tuple[StemUNet, ...], scan: torch.Tensor, in_channels: int) -> Values:
    """The features of a part of a scan by each network: mean and log deviation of each channel of each level.

    Args:
        networks: of one plan, on the device of ``scan``.
        scan: (1, 1, a, b, c).
        in_channels: of the networks; all but the first are empty.

    Returns:
        (networks, features).
    """
    x = F.pad(scan, (0, 0, 0, 0, 0, 0, 0, in_channels - 1))
    found = []
    with torch.inference_mode(), in_device_memory((scan.shape[2], scan.shape[3], scan.shape[4])):
        for network in networks:
            moments = [part for level in network.encode(x) for part in _moments(level[0].float().flatten(1))]
            found.append(torch.cat(moments).cpu().double().numpy())
    return np.stack(found)


def _moments(level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log deviation of each channel of (channels, voxels); `torch.std` takes ten times as long."""
    mean, square = level.mean(dim=1), torch.linalg.vector_norm(level, dim=1) ** 2 / level.shape[1]
    return mean, (square - mean**2).clamp(min=_TINY).log() / 2
