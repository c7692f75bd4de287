"""A network over a whole scan: its input in the canonical frame, and the windows it looks at."""

from __future__ import annotations

import functools
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
_SAMPLED = 4096  # voxels that say about where a scan's quantiles are


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
    every = all_windows(shape, patch)
    chosen = every if windows is None else windows
    before = [max(0, w - n) // 2 for w, n in zip(patch, shape, strict=True)]
    after = [max(0, w - n) - b for w, n, b in zip(patch, shape, before, strict=True)]
    if any(before) or any(after):
        x = F.pad(x, [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair])
    moved = [_moved(window, before) for window in chosen]
    places = [(n, slice(None), *window) for n in range(len(x)) for window in moved]
    step = window_batch_size(patch, _CPU_BATCH_VOXELS if device.type == "cpu" else _BATCH_VOXELS)
    inside = (..., *_moved((slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2])), before))

    def answers_to(batch: Sequence[tuple[int | slice, ...]]) -> torch.Tensor:
        return predictor(torch.stack([x[place] for place in batch]).to(device)).float().cpu()

    with torch.inference_mode(), in_device_memory(patch):
        batches = [places[begin : begin + step] for begin in range(0, len(places), step)]
        if places and tuple(x.shape[2:]) == patch:  # a window covers all
            return torch.cat([answers_to(batch) for batch in batches])[inside].contiguous()
        sums, weight = torch.zeros(0), _importance(patch)
        for batch in batches:
            answers = answers_to(batch)
            if not len(sums):
                sums = torch.zeros(len(x), answers.shape[1], *x.shape[2:])
            for place, answer in zip(batch, answers, strict=True):
                sums[place].addcmul_(answer, weight)
        if not len(sums):
            sums = torch.zeros(len(x), len(elsewhere), *x.shape[2:])
        weights = torch.zeros(x.shape[2:])
        for window in moved:
            weights[window] += weight
        nowhere = weights == 0 if len(chosen) < len(every) else None
        sums /= weights.clamp_(min=torch.finfo(torch.float32).tiny)
        if nowhere is not None:
            for channel, value in enumerate(elsewhere):
                sums[:, channel].masked_fill_(nowhere, value)
        return sums[inside]


def _moved(window: Window, by: Sequence[int]) -> Window:
    a, b, c = (slice(side.start + n, side.stop + n) for side, n in zip(window, by, strict=True))
    return a, b, c


@functools.lru_cache(maxsize=8)
def _importance(patch: Triple) -> torch.Tensor:
    """The weight of a window's voxels, largest in its middle (nnU-Net's Gaussian). Not to be changed."""
    return torch.as_tensor(compute_importance_map(patch, mode="gaussian", sigma_scale=0.125, device="cpu"))


def normalise(array: FloatArray) -> FloatArray:
    """Clip to the 0.5th and 99.5th percentile, subtract the mean, divide by the standard deviation."""
    sample = array[::2, ::2] if array.size > 4_000_000 else array
    low, high = outer_values(sample.ravel(), 0.005)
    result = np.clip(array, low, high).astype(np.float32, copy=False)
    result -= result.mean()
    deviation = math.sqrt(np.square(result).mean())
    result /= np.float32(deviation if deviation > 1e-6 else 1.0)
    return result


def outer_values(values: FloatArray, share: float) -> tuple[float, float]:
    """The quantiles at a small share from both ends of (n,), as `np.quantile` interpolates them.

    Only the tails are put in order: what is as low, or as high, as twice that share of some voxels. Where these are no
    picture of the rest, so that a tail is too short, it is all voxels.
    """
    position = (len(values) - 1) * share
    rank = int(position)
    some = np.sort(values[:: max(1, len(values) // _SAMPLED)])
    bound = min(math.ceil(2 * share * len(some)), len(some) - 1)
    lows, highs = values[values <= some[bound]], values[values >= some[-1 - bound]]
    found = []
    for tail, sign in ((lows, 1), (highs, -1)):
        ends = sign * (tail if len(tail) > rank + 1 else values)
        next_to = min(rank + 1, len(ends) - 1)
        ends.partition((rank, next_to))
        one, other = float(ends[rank]), float(ends[next_to])
        found.append(sign * (one + (other - one) * (position - rank)))
    return found[0], found[1]


_SCANS: LatestCache[FloatArray] = LatestCache()


def canonical_scan(scan: Volume, frame: CanonicalFrame) -> FloatArray:
    """The scan as networks see it: in the canonical frame, normalised; shape ``frame.canonical_shape``.

    Not to be changed: whoever asks for the same scan and frame next, as SegQC-Net after the segmenter, gets the same
    array.
    """
    known = _SCANS.get(scan, frame)
    if known is None:
        known = _SCANS.keep(normalise(to_canonical(scan.array, frame, order=1)), scan, frame)
    return known


def network_input(scan: Volume, masks: BoolArray, frame: CanonicalFrame) -> torch.Tensor:
    """Scan and masks (L, n0, n1, n2) as channels in the canonical frame: (1, 1 + L, a, b, c)."""
    image = canonical_scan(scan, frame)
    channels = to_canonical(masks, frame, order=0)
    return torch.from_numpy(np.concatenate([image[None], channels], dtype=np.float32))[None]
