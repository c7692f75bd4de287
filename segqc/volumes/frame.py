"""The frame that networks work in, and the way there and back."""

from __future__ import annotations

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
from segqc.volumes.volume import Array, Volume, VolumeError

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


def through_plane_axis(volume: Volume) -> int:
    """Return the array axis across the slices.

    It is the axis whose spacing exceeds 1.2 times both others; otherwise the acquisition axis that the file names;
    otherwise the last (method, canonical frame).
    """
    spacing = np.array(volume.spacing_mm)
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
    leading = tuple(range(array.ndim - 3))
    view = array.transpose(*leading, *(array.ndim - 3 + axis for axis in frame.permutation))
    view = np.flip(view, _flipped_axes(frame))
    return _resample(view, frame.canonical_shape, order)


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
    n0, n1, n2 = (frame.native_shape[axis] for axis in frame.permutation)
    wanted = None
    if box is not None:
        sides = [box[axis].indices(frame.native_shape[axis])[:2] for axis in frame.permutation]
        w0, w1, w2 = (
            slice(n - stop, n - start) if flip else slice(start, stop)
            for (start, stop), n, flip in zip(sides, (n0, n1, n2), frame.flips, strict=True)
        )
        wanted = (w0, w1, w2)
    resampled = _resample(array, (n0, n1, n2), order, wanted)
    view = np.flip(resampled, _flipped_axes(frame))
    leading = tuple(range(array.ndim - 3))
    inverse = np.argsort(frame.permutation).tolist()
    return np.ascontiguousarray(view.transpose(*leading, *(array.ndim - 3 + axis for axis in inverse)))


def native_support(where: BoolArray, frame: CanonicalFrame) -> Box | None:
    """The box of native voxels that voxels of the canonical frame have a part in, by `to_native` of order 1.

    Args:
        where: the canonical voxels, of shape ``frame.canonical_shape``.
        frame: from `canonical_frame`.

    Returns:
        The box in native axis order; None where there is no voxel.

    Raises:
        ValueError: if the array is not of the frame's canonical shape.
    """
    _check_spatial(where, frame.canonical_shape, 1)
    if not where.any():
        return None
    box = [slice(0)] * 3
    for k, axis in enumerate(frame.permutation):
        old, new = frame.canonical_shape[k], frame.native_shape[axis]
        there = np.flatnonzero(where.any(axis=tuple(a for a in range(3) if a != k)))
        # an interpolated value depends on the two nearest voxels, and on more where it is smoothed before
        reach = 1 + (math.ceil(_GAUSSIAN_REACH * _deviation(old, new)) + 1 if old / new > SMOOTHING_RATIO else 0)
        centres = _centres(old, new)
        near = np.flatnonzero((centres > there[0] - reach) & (centres < there[-1] + reach))
        start, stop = (int(near[0]), int(near[-1]) + 1) if len(near) else (0, 0)
        box[axis] = slice(new - stop, new - start) if frame.flips[k] else slice(start, stop)
    return (box[0], box[1], box[2])


def touched(where: BoolArray, frame: CanonicalFrame) -> BoolArray:
    """The canonical voxels that hold the centre of a native voxel: none is lost, as by resampling small things are.

    Args:
        where: the native voxels, of shape ``frame.native_shape``.
        frame: from `canonical_frame`.

    Raises:
        ValueError: if the array is not of the frame's native shape.
    """
    _check_spatial(where, frame.native_shape, 0)
    result = np.zeros(frame.canonical_shape, bool)
    there = np.flatnonzero(where.any(axis=(1, 2)))
    if len(there):
        native = np.nonzero(where[there[0] : there[-1] + 1])
        native[0][:] += there[0]
        sizes = [frame.native_shape[axis] for axis in frame.permutation]
        indices = [native[axis] for axis in frame.permutation]
        result[
            tuple(
                ((2 * (old - 1 - index if flip else index) + 1) * new) // (2 * old)
                for index, old, new, flip in zip(indices, sizes, frame.canonical_shape, frame.flips, strict=True)
            )
        ] = True
    return result


def _flipped_axes(frame: CanonicalFrame) -> tuple[int, ...]:
    return tuple(axis - 3 for axis, flip in enumerate(frame.flips) if flip)


def _check_spatial(array: Array, shape: tuple[int, int, int], order: int) -> None:
    if array.shape[-3:] != shape:
        raise ValueError(f"The array's last three axes must be {shape}, the whole shape is {array.shape}.")
    if order not in (0, 1):
        raise ValueError(f"The order of interpolation must be 0 (nearest) or 1 (linear), not {order}.")


def _resample(array: Array, shape: tuple[int, int, int], order: int, box: Box | None = None) -> Array:
    """Resample the last three axes to a shape over the same field of view, one axis after the other; always a copy.

    Of the result only a box is made, where one is given.
    """
    out = array if order == 0 else array.astype(np.result_type(array.dtype, np.float32), copy=False)
    # Shrinking axes first keeps what the later axes work on small.
    wanted = [slice(0, n) for n in shape] if box is None else list(box)
    for axis in sorted(range(3), key=lambda a: (wanted[a].stop - wanted[a].start) / array.shape[a - 3]):
        out = _resample_axis(out, axis - 3, shape[axis], order, wanted[axis])
    return np.array(out, order="C", copy=True)


def _resample_axis(array: Array, axis: int, size: int, order: int, wanted: slice) -> Array:
    """Resample one axis; voxel ``i`` of the result is centred at ``(i + 1/2) * old / new - 1/2`` of the old grid."""
    old = array.shape[axis]
    if size == old:
        return array[(slice(None),) * (array.ndim + axis) + (wanted,)]
    if order == 0:
        # Whole-number arithmetic: no centre falls on the wrong side of a voxel's edge.
        return np.take(array, ((2 * np.arange(wanted.start, wanted.stop) + 1) * old) // (2 * size), axis=axis)
    weights = _weights(old, size)[wanted].astype(np.result_type(array.dtype, np.float32))
    after = array.shape[array.ndim + axis + 1 :]
    flat = array.reshape(-1, old, math.prod(after)) if after else array.reshape(-1, old)
    result = np.empty((len(flat), len(weights), *flat.shape[2:]), weights.dtype)
    for begin in range(0, len(weights), _ROWS):  # a few rows of the matrix have zeros but in a narrow band
        rows = weights[begin : begin + _ROWS]
        there = np.flatnonzero(rows.any(axis=0))
        band = slice(int(there[0]), int(there[-1]) + 1)
        if after:
            np.matmul(rows[:, band], flat[:, band], out=result[:, begin : begin + _ROWS])
        else:
            result[:, begin : begin + _ROWS] = flat[:, band] @ rows[:, band].T
    return result.reshape(*array.shape[: array.ndim + axis], len(weights), *after)


def _weights(old: int, new: int) -> npt.NDArray[np.float64]:
    """The matrix (new, old) of linear interpolation, after a Gaussian where it shrinks by more than `SMOOTHING_RATIO`.

    A product with a banded matrix is many times as fast as filtering and picking voxels.
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
