"""What a network's encoder makes of a scan: a few numbers that tell scans of one scanner and body part from others.

The scan alone is shown, without any mask, in one window around where the mask is. Each block of the encoder ends with
an instance normalisation and a rectifier: means and deviations of a channel behind these say how its values are
distributed, whatever contrast the scan has. What to take was measured (``docs/measurements.md``).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from segqc.networks.device import in_device_memory
from segqc.networks.plan import Triple
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


def window_around(image: FloatArray, mask: BoolArray, frame: CanonicalFrame, patch: Triple) -> torch.Tensor:
    """The part of a scan around the middle of a mask; of the scan, where the mask is empty.

    Args:
        image: the scan in the canonical frame, (a, b, c).
        mask: on the scan's own grid, (n0, n1, n2).
        frame: the canonical frame.
        patch: the extent of the part; what it reaches beyond the scan is zero.

    Returns:
        (1, 1, *patch).
    """
    box = bounding_box(mask)
    window, padding = list[slice](), list[int]()
    for axis, flip, size, width in zip(frame.permutation, frame.flips, image.shape, patch, strict=True):
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
    patch = (scan.shape[2], scan.shape[3], scan.shape[4])
    x = F.pad(scan, (0, 0, 0, 0, 0, 0, 0, in_channels - 1))
    found = []
    with torch.inference_mode(), in_device_memory(patch):
        for network in networks:
            levels = [level.float().flatten(2)[0] for level in network.encode(x)]
            moments = [(of.mean(dim=1), (of.std(dim=1) + _TINY).log()) for of in levels]
            found.append(torch.cat([part for pair in moments for part in pair]).cpu().double().numpy())
    return np.stack(found)
