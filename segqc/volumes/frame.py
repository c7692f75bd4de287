"""The frame that networks work in, and the way there and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from nibabel.orientations import io_orientation
from scipy.ndimage import gaussian_filter1d

from segqc.types import BoolArray
from segqc.volumes.volume import Array, Grid, Volume, VolumeError, spacing_of

Box: TypeAlias = tuple[slice, slice, slice]

THROUGH_PLANE_RATIO = 1.2
"""An axis is through-plane by its spacing when it exceeds this times both others (method, canonical frame)."""

SMOOTHING_RATIO = 1.5
"""Linear downsampling by more than this is preceded by a Gaussian, against aliasing."""

_GAUSSIAN_REACH = 4.0  # in standard deviations
_ROWS = 16  # of a resampling matrix that are multiplied at once

MAX_CANONICAL_VOXELS: Final = 1 << 30
"""More voxels than networks and memory can take: a scan's spacing is wrong, or does not go with the target's."""


@dataclass(frozen=True)
class CanonicalFrame:
    """How a scan's array maps to the frame that networks work in, and back.

    Canonical axes ascend towards right, anterior and superior, in that order, but with the through-plane axis moved
    last. Both grids cover the same field of view (voxel corners coincide, not voxel centres).

    Attributes:
        permutation: the native axis that each canonical axis comes from.
        flips: for each canonical axis, whether the native axis runs the other way.
        native_shape: voxels, in native axis order.
        native_spacing_mm: in native axis order.
        canonical_shape: voxels, in canonical axis order.
        canonical_spacing_mm: in canonical axis order; the spacing that the whole-voxel shape really gives.
        through_plane_axis: the native axis that is last in the canonical frame.
    """

    permutation: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    native_shape: tuple[int, int, int]
    native_spacing_mm: tuple[float, float, float]
    canonical_shape: tuple[int, int, int]
    canonical_spacing_mm: tuple[float, float, float]
    through_plane_axis: int


def through_plane_axis(volume: Grid) -> int:
    """Return the array axis across the slices.

    It is the axis whose spacing exceeds 1.2 times both others; otherwise the acquisition axis that the file names;
    otherwise the last (method, canonical frame).
    """
    spacing = np.array(spacing_of(volume.affine))
    largest = int(np.argmax(spacing))
    if spacing[largest] > THROUGH_PLANE_RATIO * np.delete(spacing, largest).max():
        return largest
    return 2 if volume.acquisition_axis is None else volume.acquisition_axis


_find_through_plane_axis = through_plane_axis  # within canonical_frame the name is an argument


def canonical_frame(
    volume: Volume, *, spacing_mm: Sequence[float | None] | None = None, through_plane_axis: int | None = None
) -> CanonicalFrame:
    """Plan the canonical frame of a volume.

    Args:
        volume: the scan.
        spacing_mm: target spacing in canonical axis order; None keeps an axis, or all.
        through_plane_axis: the native axis to put last; None finds it (see the function of that name).

    Returns:
        The frame. Its shape is ``round(shape * spacing / target)``, at least 1, along each axis.

    Raises:
        ValueError: if a target spacing is not positive, or the axis is not 0, 1 or 2.
        VolumeError: if the frame would have more than `MAX_CANONICAL_VOXELS` voxels.
    """
    through = _find_through_plane_axis(volume) if through_plane_axis is None else through_plane_axis
    if through not in (0, 1, 2):
        raise ValueError(f"The through-plane axis must be 0, 1 or 2, not {through}.")
    targets = (None, None, None) if spacing_mm is None else tuple(spacing_mm)
    if len(targets) != 3 or any(t is not None and not (0 < t < np.inf) for t in targets):
        raise ValueError(f"The target spacing must be three positive numbers or None, not {targets}.")
    orientation = io_orientation(volume.affine)  # per native axis: the RAS axis it is nearest to, and its sign
    reverse = (orientation[:, 1] < 0).tolist()
    in_ras_order = np.argsort(orientation[:, 0]).tolist()
    order = [axis for axis in in_ras_order if axis != through] + [through]
    extents = [volume.shape[axis] * volume.spacing_mm[axis] for axis in order]
    shape = [
        volume.shape[axis] if target is None else max(1, round(extent / target))
        for axis, extent, target in zip(order, extents, targets, strict=True)
    ]
    if prod(shape) > MAX_CANONICAL_VOXELS:
        covered = " x ".join(f"{extent:.4g}" for extent in extents)
        raise VolumeError(
            f"The scan covers {covered} mm, which makes {' x '.join(map(str, shape))} voxels of the networks' spacing; "
            "repair its spacing, or crop it."
        )
    return CanonicalFrame(
        permutation=(order[0], order[1], order[2]),
        flips=(reverse[order[0]], reverse[order[1]], reverse[order[2]]),
        native_shape=volume.shape,
        native_spacing_mm=volume.spacing_mm,
        canonical_shape=(shape[0], shape[1], shape[2]),
        canonical_spacing_mm=(extents[0] / shape[0], extents[1] / shape[1], extents[2] / shape[2]),
        through_plane_axis=through,
    )


def to_canonical(array: Array, frame: CanonicalFrame, *, order: int) -> Array:
    """Bring an array from the native grid into the canonical frame.

    Args:
        array: shape ``(..., *frame.native_shape)``; leading axes (channels) are kept.
        frame: from `canonical_frame`.
        order: 1 for linear interpolation (scans, probabilities, logits), after a Gaussian along axes that shrink by
            more than 1.5; 0 for the nearest voxel (labels).

    Returns:
        A new C-ordered array of shape ``(..., *frame.canonical_shape)``: the same type for order 0, a float type
        for order 1. Without resampling the values are the same, bit for bit.

    Raises:
        ValueError: if the array's last three axes are not the frame's native shape, or the order is neither 0 nor 1.
    """
    _check_spatial(array, frame.native_shape, order)
    samplings = [np.empty(0)] * 3
    for axis, size, flip in zip(frame.permutation, frame.canonical_shape, frame.flips, strict=True):
        old = frame.native_shape[axis]
        sampling = _sampling(old, size, order)
        if flip:
            sampling = sampling[:, ::-1] if sampling.ndim == 2 else old - 1 - sampling
        samplings[axis] = sampling
    return _copied(_resample(array, samplings, order).transpose(_axes(array, frame.permutation)), array)


def to_native(array: Array, frame: CanonicalFrame, *, order: int, box: Box | None = None) -> Array:
    """Bring an array from the canonical frame back to the native grid: the inverse of `to_canonical`.

    Args:
        array: shape ``(..., *frame.canonical_shape)``; leading axes (channels) are kept.
        frame: from `canonical_frame`.
        order: as in `to_canonical`.
        box: the part of the native grid that is wanted, in native axis order; all of it by default.

    Returns:
        A new C-ordered array of shape ``(..., *frame.native_shape)``, or of the box's shape; the exact inverse where
        nothing is resampled.

    Raises:
        ValueError: if the array's last three axes are not the frame's canonical shape, or the order is neither 0
            nor 1.
    """
    _check_spatial(array, frame.canonical_shape, order)
    samplings = [np.empty(0)] * 3
    for axis, old, flip in zip(frame.permutation, frame.canonical_shape, frame.flips, strict=True):
        sampling = _sampling(old, frame.native_shape[axis], order)
        sampling = sampling[::-1] if flip else sampling
        samplings[axis] = sampling if box is None else sampling[box[axis]]
    in_native_order = array.transpose(_axes(array, np.argsort(frame.permutation).tolist()))
    return _copied(_resample(in_native_order, samplings, order), array)


def native_support(box: Box, frame: CanonicalFrame) -> Box:
    """The native voxels that the voxels of a canonical box have a part in, by `to_native` of order 1.

    Args:
        box: in canonical axis order; it may reach beyond the frame.
        frame: from `canonical_frame`.

    Returns:
        Their box, in native axis order.
    """
    result = [slice(0)] * 3
    for part, axis, old, flip in zip(box, frame.permutation, frame.canonical_shape, frame.flips, strict=True):
        new = frame.native_shape[axis]
        # an interpolated value depends on the two nearest voxels, and on more where it is smoothed before
        reach = 1 + (math.ceil(_GAUSSIAN_REACH * _deviation(old, new)) + 1 if old / new > SMOOTHING_RATIO else 0)
        centres = _centres(old, new)
        near = np.flatnonzero((centres > part.start - reach) & (centres < part.stop - 1 + reach))
        start, stop = (int(near[0]), int(near[-1]) + 1) if len(near) else (0, 0)
        result[axis] = slice(new - stop, new - start) if flip else slice(start, stop)
    return (result[0], result[1], result[2])


def touched(where: BoolArray, frame: CanonicalFrame) -> BoolArray:
    """The canonical voxels that hold the centre of a native voxel: none is lost, as by resampling small things are.

    Args:
        where: the native voxels, of shape ``frame.native_shape``.
        frame: from `canonical_frame`.

    Returns:
        An array of shape ``frame.canonical_shape``; without resampling, a view.

    Raises:
        ValueError: if the array is not of the frame's native shape.
    """
    _check_spatial(where, frame.native_shape, 0)
    result = where
    for axis, new, flip in zip(frame.permutation, frame.canonical_shape, frame.flips, strict=True):
        old = where.shape[axis]
        result = np.moveaxis(result, axis, 0)
        result = result[::-1] if flip else result
        if new != old:
            holders = ((2 * np.arange(old) + 1) * new) // (2 * old)
            first, last = np.flatnonzero(np.diff(holders, prepend=-1)), np.flatnonzero(np.diff(holders, append=new))
            held = result[first]
            for step in range(1, int((last - first).max()) + 1):  # np.logical_or.reduceat takes ten times as long
                held |= result[np.minimum(first + step, last)]
            result = np.zeros((new, *held.shape[1:]), bool)
            result[holders[first]] = held
        result = np.moveaxis(result, 0, axis)
    return result.transpose(frame.permutation)


def _axes(array: Array, spatial: Sequence[int]) -> tuple[int, ...]:
    """An order of all axes that moves the last three only."""
    leading = array.ndim - 3
    return (*range(leading), *(leading + axis for axis in spatial))


def _check_spatial(array: Array, shape: tuple[int, int, int], order: int) -> None:
    if array.shape[-3:] != shape:
        raise ValueError(f"The array's last three axes must be {shape}, the whole shape is {array.shape}.")
    if order not in (0, 1):
        raise ValueError(f"The order of interpolation must be 0 (nearest) or 1 (linear), not {order}.")


def _sampling(old: int, new: int, order: int) -> Array:
    """How an axis is resampled: the voxels to pick (new,), or the matrix of their weights (new, old)."""
    if new == old:
        return np.arange(old)
    if order == 0:
        # Whole-number arithmetic: no centre falls on the wrong side of a voxel's edge.
        return ((2 * np.arange(new) + 1) * old) // (2 * new)
    return _weights(old, new)


def _resample(array: Array, samplings: Sequence[Array], order: int) -> Array:
    """Resample the last three axes, one after the other; where voxels are only cut out or flipped, it is a view."""
    parts = [_part(sampling) for sampling in samplings]
    a, b, c = parts
    out = array[..., a, b, c]
    out = out if order == 0 else out.astype(np.result_type(array.dtype, np.float32), copy=False)
    # Shrinking axes first keeps what the later axes work on small.
    for axis in sorted(range(3), key=lambda a: len(samplings[a]) / out.shape[a - 3]):
        if samplings[axis].ndim == 2:
            out = _resample_axis(out, axis - 3, samplings[axis][:, parts[axis]])
        elif parts[axis] == slice(None):
            out = np.take(out, samplings[axis], axis=axis - 3)
    return out


def _part(sampling: Array) -> slice:
    """The part of an axis that is looked at, all that is to do where neighbours are picked in a row."""
    if sampling.ndim == 2:
        used = np.flatnonzero(sampling.any(axis=0))
        return slice(int(used[0]), int(used[-1]) + 1)
    first, last = int(sampling[0]), int(sampling[-1])
    step = 1 if last >= first else -1
    if np.array_equal(sampling, np.arange(first, last + step, step)):
        return slice(first, last + step if last + step >= 0 else None, step)
    return slice(None)


def _resample_axis(array: Array, axis: int, sampling: Array) -> Array:
    """Resample one axis by a matrix of weights (new, old)."""
    old, new = array.shape[axis], len(sampling)
    weights = sampling.astype(array.dtype)
    after = array.shape[array.ndim + axis + 1 :]
    flat = array.reshape(-1, old, math.prod(after)) if after else array.reshape(-1, old)
    result = np.empty((len(flat), new, *flat.shape[2:]), array.dtype)
    for begin in range(0, new, _ROWS):  # a few rows of the matrix have zeros but in a narrow band
        rows = weights[begin : begin + _ROWS]
        there = np.flatnonzero(rows.any(axis=0))
        band = slice(int(there[0]), int(there[-1]) + 1)
        if after:
            np.matmul(rows[:, band], flat[:, band], out=result[:, begin : begin + _ROWS])
        else:
            result[:, begin : begin + _ROWS] = flat[:, band] @ rows[:, band].T
    return result.reshape(*array.shape[: array.ndim + axis], new, *after)


def _copied(result: Array, array: Array) -> Array:
    """A C-ordered result that shares no memory with what it was made from."""
    result = np.ascontiguousarray(result)
    return result.copy() if np.may_share_memory(result, array) else result


@functools.lru_cache(maxsize=32)
def _weights(old: int, new: int) -> npt.NDArray[np.float64]:
    """The matrix (new, old) of linear interpolation, after a Gaussian where it shrinks by more than `SMOOTHING_RATIO`.

    A product with a banded matrix is many times as fast as filtering and picking voxels. Not to be changed: scans of
    one size share it.
    """
    matrix = np.eye(old)
    if old / new > SMOOTHING_RATIO:
        matrix = gaussian_filter1d(matrix, _deviation(old, new), axis=0, mode="nearest", truncate=_GAUSSIAN_REACH)
    centres = _centres(old, new)
    below = np.minimum(centres.astype(np.intp), max(old - 2, 0))
    weight = (centres - below)[:, None]
    return cast(
        "npt.NDArray[np.float64]", matrix[below] * (1 - weight) + matrix[np.minimum(below + 1, old - 1)] * weight
    )


def _centres(old: int, new: int) -> npt.NDArray[np.float64]:
    """Where the voxels of a resampled axis are centred on the old one."""
    return np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)


def _deviation(old: int, new: int) -> float:
    """Of the Gaussian, in old voxels, that precedes linear downsampling."""
    return (old / new - 1) / 2
