"""A network over a whole scan: its input in the canonical frame, and sliding windows."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from monai.inferers import sliding_window_inference

from segqc.networks.device import in_device_memory
from segqc.networks.plan import Triple
from segqc.types import BoolArray, FloatArray
from segqc.volumes import CanonicalFrame, Volume, to_canonical

_BATCH_VOXELS = 400_000  # of windows that go through a network together; a larger window goes alone


def window_batch_size(patch: Triple) -> int:
    """How many windows of a size go through a network together: of small ones a few, see `sliding_window`."""
    return max(1, _BATCH_VOXELS // math.prod(patch))


def sliding_window(
    predictor: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, patch: Triple, device: torch.device
) -> torch.Tensor:
    """Logits of a batch (N, C, a, b, c) by sliding window, a quarter overlapping, with Gaussian blending.

    Small windows go through the network a few at a time: on a CPU PyTorch does not give the convolutions of one alone
    to oneDNN, and it takes three times as long (``benchmarks/results/windows.json``). So the last one goes twice, if it
    is left alone. Memory beside the result: these windows' activations and one count map.

    Args:
        predictor: the network, or the part of it that makes a map.
        x: the batch.
        patch: the window.
        device: where the predictor is.

    Raises:
        DeviceMemoryError: if the GPU's memory does not hold the windows.
    """
    batch_size = window_batch_size(patch)

    def in_company(windows: torch.Tensor) -> torch.Tensor:
        alone = len(windows) == 1 and batch_size > 1 and device.type == "cpu"
        return predictor(windows.repeat(2, 1, 1, 1, 1))[:1] if alone else predictor(windows)

    with torch.inference_mode(), in_device_memory(patch):
        logits = sliding_window_inference(
            x,
            roi_size=patch,
            sw_batch_size=batch_size,
            predictor=in_company,
            overlap=0.25,
            mode="gaussian",
            sw_device=device,
            device=torch.device("cpu"),
        )
    return torch.as_tensor(logits)


def normalise(array: FloatArray) -> FloatArray:
    """Clip to the 0.5th and 99.5th percentile, subtract the mean, divide by the standard deviation."""
    sample = array[::2, ::2] if array.size > 4_000_000 else array
    low, high = np.percentile(sample, (0.5, 99.5))
    clipped = np.clip(array, low, high).astype(np.float32)
    deviation = float(clipped.std())
    clipped -= clipped.mean()
    return clipped / np.float32(deviation if deviation > 1e-6 else 1.0)


def canonical_scan(scan: Volume, frame: CanonicalFrame) -> FloatArray:
    """The scan as networks see it: in the canonical frame, normalised; shape ``frame.canonical_shape``."""
    return normalise(to_canonical(scan.array, frame, order=1).astype(np.float32))


def network_input(scan: Volume, masks: BoolArray, frame: CanonicalFrame) -> torch.Tensor:
    """Scan and masks (L, n0, n1, n2) as channels in the canonical frame: (1, 1 + L, a, b, c)."""
    image = canonical_scan(scan, frame)
    channels = to_canonical(masks.astype(np.float32), frame, order=0)
    return torch.from_numpy(np.concatenate([image[None], channels]).astype(np.float32))[None]
