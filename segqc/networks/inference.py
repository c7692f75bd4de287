"""A network over a whole scan: its input in the canonical frame, and the windows it looks at."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map

from segqc.networks.cache import LatestCache
from segqc.networks.device import in_device_memory
from segqc.networks.plan import Triple, window_starts
from segqc.types import BoolArray, FloatArray
from segqc.volumes import CanonicalFrame, Volume, to_canonical

Predictor: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
Window: TypeAlias = tuple[slice, slice, slice]

NOWHERE: Final = -60.0
"""The logit where no window was looked at: millions of such voxels add up to nothing, calibrated or not."""

_AIR = 0.05  # part of a scan's intensity range above its darkest: what is darker is air
_BATCH_VOXELS = 400_000  # of windows that go through a network together; a larger window goes alone
_CPU_BATCH_VOXELS = 50_000  # on a CPU only small windows gain by company


def window_batch_size(patch: Triple, limit: int = _BATCH_VOXELS) -> int:
    """How many windows of a size go through a network together."""
    return max(1, limit // math.prod(patch))


def all_windows(shape: Sequence[int], patch: Triple) -> list[Window]:
    """The windows that cover a volume. Along an axis that is shorter than the patch the only one reaches beyond it."""
    starts = [window_starts(size, window) for size, window in zip(shape, patch, strict=True)]
    before = [max(0, window - size) // 2 for size, window in zip(shape, patch, strict=True)]
    windows = []
    for corner in itertools.product(*starts):
        a, b, c = (slice(s - o, s - o + w) for s, o, w in zip(corner, before, patch, strict=True))
        windows.append((a, b, c))
    return windows


def box_around(windows: Sequence[Window]) -> Window:
    """The smallest box that holds all windows."""
    a, b, c = (
        slice(min(side.start for side in sides), max(side.stop for side in sides))
        for sides in zip(*windows, strict=True)
    )
    return a, b, c


def windows_near(windows: Sequence[Window], where: BoolArray, margin: Triple = (0, 0, 0)) -> list[Window]:
    """The windows that hold a voxel of ``where`` (a, b, c), or come as near to one as ``margin`` voxels."""
    return [
        window
        for window in windows
        if where[
            tuple(slice(max(0, w.start - m), max(0, w.stop + m)) for w, m in zip(window, margin, strict=True))
        ].any()
    ]


def not_air(image: FloatArray) -> BoolArray:
    """Where a normalised scan is brighter than its darkest twentieth; everywhere in a scan without any contrast.

    In a window that has no such voxel there is nothing to see but noise.
    """
    low, high = float(image.min()), float(image.max())
    return image > low + _AIR * (high - low) if high > low else np.ones(image.shape, bool)


def sliding_window(
    predictor: Predictor,
    x: torch.Tensor,
    patch: Triple,
    device: torch.device,
    *,
    windows: Sequence[Window] | None = None,
    elsewhere: Sequence[float] = (),
) -> torch.Tensor:
    """Logits of a batch (N, C, a, b, c) by sliding window, with Gaussian blending.

    A window has the same logits whichever other ones are looked at. Memory beside the result: some windows'
    activations and one count map.

    Args:
        predictor: the network, or the part of it that makes a map; called with (n, C, *patch).
        x: the batch.
        patch: the window.
        device: where the predictor is.
        windows: those of `all_windows` to look at; all by default.
        elsewhere: the logits of the predictor's channels where none is looked at; wanted only with ``windows``.

    Raises:
        DeviceMemoryError: if the GPU's memory does not hold the windows.
    """
    shape = x.shape[2:]
    chosen = all_windows(shape, patch) if windows is None else windows
    before = [max(0, w - n) // 2 for w, n in zip(patch, shape, strict=True)]
    after = [max(0, w - n) - b for w, n, b in zip(patch, shape, before, strict=True)]
    if any(before) or any(after):
        x = F.pad(x, [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair])
    places = [(n, slice(None), *_moved(window, before)) for n in range(len(x)) for window in chosen]
    step = window_batch_size(patch, _CPU_BATCH_VOXELS if device.type == "cpu" else _BATCH_VOXELS)
    one_covers_all = tuple(x.shape[2:]) == patch
    weight = torch.ones(patch) if one_covers_all else _importance(patch)
    sums = torch.zeros(0)
    weights = torch.zeros(len(x), 1, *x.shape[2:])
    with torch.inference_mode(), in_device_memory(patch):
        for begin in range(0, len(places), step):
            batch = places[begin : begin + step]
            inputs = torch.stack([x[place] for place in batch])
            answers = predictor(inputs.to(device)).float().cpu()
            if not len(sums):
                sums = torch.zeros(len(x), answers.shape[1], *x.shape[2:])
            for place, answer in zip(batch, answers, strict=True):
                if one_covers_all:
                    sums[place] = answer
                else:
                    sums[place].addcmul_(answer, weight)
                weights[place] += weight
        if not len(sums):
            sums = torch.zeros(len(x), len(elsewhere), *x.shape[2:])
        if not one_covers_all:
            sums /= weights.clamp(min=torch.finfo(torch.float32).tiny)
        if windows is not None:
            nowhere = weights[:, 0] == 0
            for channel, value in enumerate(elsewhere):
                sums[:, channel][nowhere] = value
        a, b, c = _moved((slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2])), before)
        return sums[:, :, a, b, c]


def _moved(window: Window, by: Sequence[int]) -> Window:
    a, b, c = (slice(side.start + n, side.stop + n) for side, n in zip(window, by, strict=True))
    return a, b, c


def _importance(patch: Triple) -> torch.Tensor:
    """The weight of a window's voxels, largest in its middle (nnU-Net's Gaussian)."""
    return torch.as_tensor(compute_importance_map(patch, mode="gaussian", sigma_scale=0.125, device="cpu"))


def normalise(array: FloatArray) -> FloatArray:
    """Clip to the 0.5th and 99.5th percentile, subtract the mean, divide by the standard deviation."""
    sample = array[::2, ::2] if array.size > 4_000_000 else array
    low, high = np.percentile(sample, (0.5, 99.5))
    clipped = np.clip(array, low, high).astype(np.float32)
    deviation = float(clipped.std())
    clipped -= clipped.mean()
    return clipped / np.float32(deviation if deviation > 1e-6 else 1.0)


_SCANS: LatestCache[FloatArray] = LatestCache()


def canonical_scan(scan: Volume, frame: CanonicalFrame) -> FloatArray:
    """The scan as networks see it: in the canonical frame, normalised; shape ``frame.canonical_shape``.

    Not to be changed: whoever asks for the same scan and frame next, as SegQC-Net after the segmenter, gets the same
    array.
    """
    known = _SCANS.get(scan, frame)
    if known is None:
        known = _SCANS.keep(normalise(to_canonical(scan.array, frame, order=1).astype(np.float32)), scan, frame)
    return known


def network_input(scan: Volume, masks: BoolArray, frame: CanonicalFrame) -> torch.Tensor:
    """Scan and masks (L, n0, n1, n2) as channels in the canonical frame: (1, 1 + L, a, b, c)."""
    image = canonical_scan(scan, frame)
    channels = to_canonical(masks, frame, order=0)
    return torch.from_numpy(np.concatenate([image[None], channels], dtype=np.float32))[None]
