"""The plan of an anisotropic U-Net: one function for the segmentation network and SegQC-Net."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

NetworkSize: TypeAlias = Literal["small", "medium", "paper"]
Triple: TypeAlias = tuple[int, int, int]
Spacing: TypeAlias = tuple[float, float, float]
_NEAR_ISOTROPIC = 2.0  # axes within this factor of the finest spacing are pooled together (nnU-Net's rule)
_OVERLAP = 1 / 8  # neighbouring windows share this part of their extent at least
_FLEXIBILITY = 1.35  # how far an axis of the patch may be from what is balanced, so that windows overlap less
_MIN_LEVELS = 3  # DynUNet's own minimum


@dataclass(frozen=True, slots=True)
class NetworkPlan:
    """What a network looks like, in the canonical frame (through-plane axis last).

    ``stem`` is a space-to-depth factor per axis in front of the U-Net (and its inverse behind it): the cheap way to a
    large field of view on a CPU. ``(1, 1, 1)`` means none. With ``mask_skip`` the channels after the scan are a mask
    for each output, which begins at it: `segqc.networks.unet.MaskSkip`.
    """

    in_channels: int
    out_channels: int
    spacing_mm: Spacing
    patch: Triple
    stem: Triple
    kernels: tuple[Triple, ...]
    strides: tuple[Triple, ...]
    filters: tuple[int, ...]
    mask_skip: bool = False


@dataclass(frozen=True, slots=True)
class _SizeRule:
    base_filters: int
    max_filters: int
    levels: int
    stem: bool
    in_plane_limit: int
    patch_voxels: int


_SIZES: dict[NetworkSize, _SizeRule] = {
    "small": _SizeRule(24, 96, 3, True, 128, 112_000),
    "medium": _SizeRule(32, 256, 4, False, 256, 600_000),
    "paper": _SizeRule(32, 320, 6, False, 256, 256 * 256 * 48),
}


def window_starts(size: int, window: int) -> tuple[int, ...]:
    """Where windows start along an axis: as few as overlap by an eighth at least, evenly spread.

    Example:
        >>> window_starts(128, 72), window_starts(36, 40)
        ((0, 56), (0,))
    """
    if size <= window:
        return (0,)
    count = math.ceil((size - window) / (window * (1 - _OVERLAP))) + 1
    return tuple(round(i * (size - window) / (count - 1)) for i in range(count))


def _pooled_axes(spacing: Sequence[float], shape: Sequence[int]) -> Triple:
    """Factor 2 along the axes to pool next: the finest ones first, and none that would fall under 4 voxels."""
    finest = min(s for s, n in zip(spacing, shape, strict=True) if n >= 8) if max(shape) >= 8 else math.inf
    factors = [2 if n >= 8 and s < _NEAR_ISOTROPIC * finest else 1 for s, n in zip(spacing, shape, strict=True)]
    return factors[0], factors[1], factors[2]


def plan_network(
    spacing_mm: Spacing,
    shape: Triple,
    *,
    in_channels: int,
    out_channels: int,
    size: NetworkSize = "small",
    patch: Triple | None = None,
) -> NetworkPlan:
    """Plan a network for scans of a typical spacing and shape, both in the canonical frame.

    In-plane axes are pooled first, until the voxel is near isotropic; a kernel is 1 along an axis as long as its
    spacing is at least twice the finest. The ``small`` plan also coarsens the in-plane spacing of large slices.

    Args:
        spacing_mm: median spacing of the training scans.
        shape: median shape of the training scans, in voxels.
        in_channels: scan, or scan and one mask per structure.
        out_channels: one per class or structure.
        size: "small" (CPU, minutes), "medium" or "paper" (the paper's blocks, section 4.2).
        patch: training patch and prediction window; by default as much of the scan as the size allows.

    Raises:
        ValueError: if a spacing or an extent is not positive.
    """
    if min(spacing_mm) <= 0 or min(shape) <= 0:
        raise ValueError(f"spacing {spacing_mm} and shape {shape} must be positive")
    rule = _SIZES[size]
    coarsen = max(1.0, max(shape[:2]) / rule.in_plane_limit)
    spacing = (spacing_mm[0] * coarsen, spacing_mm[1] * coarsen, spacing_mm[2])
    extent = (round(shape[0] / coarsen), round(shape[1] / coarsen), shape[2])
    window = list(patch or extent)
    while patch is None and math.prod(window) > rule.patch_voxels:
        longest = int(np.argmax([n * s for n, s in zip(window, spacing, strict=True)]))
        window[longest] = math.ceil(window[longest] * 0.9) - 1

    stem = _pooled_axes(spacing, window) if rule.stem else (1, 1, 1)
    current = [s * f for s, f in zip(spacing, stem, strict=True)]
    extent_now = [max(1, n // f) for n, f in zip(window, stem, strict=True)]
    strides: list[Triple] = [(1, 1, 1)]
    kernels: list[Triple] = [_kernel(current)]
    while len(strides) < rule.levels:
        stride = _pooled_axes(current, extent_now)
        if max(stride) == 1:
            if len(strides) >= _MIN_LEVELS:
                break
            stride = (2, 2, 1)  # a tiny scan: the patch grows to fit
        current = [s * f for s, f in zip(current, stride, strict=True)]
        extent_now = [max(1, n // f) for n, f in zip(extent_now, stride, strict=True)]
        strides.append(stride)
        kernels.append(_kernel(current))
    total = np.prod([stem, *strides], axis=0)
    fitted = [int(math.ceil(n / t) * t) for n, t in zip(window, total, strict=True)]
    if patch is None:
        fitted = _tiling(fitted, extent, total.tolist())
    filters = tuple(min(rule.max_filters, rule.base_filters * 2**level) for level in range(len(strides)))
    return NetworkPlan(
        in_channels=in_channels,
        out_channels=out_channels,
        spacing_mm=spacing,
        patch=(fitted[0], fitted[1], fitted[2]),
        stem=stem,
        kernels=tuple(kernels),
        strides=tuple(strides),
        filters=filters,
    )


def _tiling(patch: Sequence[int], extent: Sequence[int], factors: Sequence[int]) -> list[int]:
    """The patch, near a balanced one and no larger, whose windows over the extent hold the fewest voxels in all."""
    choices = [
        [
            size
            for size in range(factor, math.ceil(length / factor) * factor + 1, factor)
            if balanced / _FLEXIBILITY <= size <= balanced * _FLEXIBILITY
        ]
        for balanced, length, factor in zip(patch, extent, factors, strict=True)
    ]

    def voxels(sizes: Iterable[int]) -> int:
        return math.prod(size * len(window_starts(length, size)) for size, length in zip(sizes, extent, strict=True))

    def distance(sizes: Iterable[int]) -> float:
        return sum(abs(math.log(size / balanced)) for size, balanced in zip(sizes, patch, strict=True))

    largest = math.prod(patch)
    fitting = [sizes for sizes in itertools.product(*choices) if math.prod(sizes) <= largest]
    return list(min(fitting, key=lambda sizes: (voxels(sizes), distance(sizes))))


def _kernel(spacing: Sequence[float]) -> Triple:
    finest = min(spacing)
    k = [3 if s < _NEAR_ISOTROPIC * finest else 1 for s in spacing]
    return k[0], k[1], k[2]
