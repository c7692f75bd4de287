"""The difference of mask and truth, the estimated truth, and error extraction (paper, sections 3.1 and 3.3)."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from segqc.types import BoolArray, FloatArray

ErrorT = TypeVar("ErrorT", BoolArray, FloatArray)
ArrayT = TypeVar("ArrayT", bound=npt.NDArray[np.generic])
Box = tuple[slice, slice, slice]

_NEIGHBOURS = ndimage.generate_binary_structure(3, 3)
_NEIGHBOURS[[0, 2]] = False  # of the same slice only
_TOLERANCE = 1e-6  # a radius of 2 mm reaches the tenth voxel of 0.2 mm


@dataclass(frozen=True, slots=True)
class ExtractionSettings:
    """How errors are told from observer variability along the contour.

    The defaults were chosen on one half of two experts' masks of 35 scans (``benchmarks/observers.py``). They are
    relative to the structure's size, with bounds in mm for large ones.

    Attributes:
        band_mm: radius of the dilation and of the erosion; the band between them is left out.
        max_band_share: bound on the radius: the erosion may take this share of the structure's mask at most, as a band
            of a large structure's width would cover most of a small one.
        min_component_mm2: connected components with a smaller area in their slice are dropped (the paper's t_size). The
            area is taken after the component has grown back by the band's radius into the error it was part of, so
            that a compact error counts with about its own size; without ``regrow``, it is the area outside the band.
        max_component_share: bound on that area: this share of the mask's mean area, over the slices that hold it; None
            for no bound.
        regrow: how far the components that are left grow back in the end, in radii of the band; at most 1. 0 leaves
            the band out altogether.
        threshold: error probability from which a voxel belongs to a component.
        structure_band_mm: radii of single structures, by name, in place of ``band_mm``.
    """

    band_mm: float = 3.0
    max_band_share: float = 0.5
    min_component_mm2: float = 80.0
    max_component_share: float | None = 0.3
    regrow: float = 0.7
    threshold: float = 0.5
    structure_band_mm: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        bound = 0.0 if self.max_component_share is None else self.max_component_share
        values = (self.band_mm, self.min_component_mm2, bound, *self.structure_band_mm.values())
        if not all(0 <= value < math.inf for value in values):
            raise ValueError(
                "error extraction: band_mm, structure_band_mm, min_component_mm2 and max_component_share must be "
                "finite, and not negative"
            )
        if not (0 <= self.max_band_share <= 1 and 0 <= self.regrow <= 1 and 0 < self.threshold <= 1):
            raise ValueError("error extraction: max_band_share and regrow must lie in [0, 1] and threshold in (0, 1]")

    def for_structure(self, name: str) -> ExtractionSettings:
        """Return the settings with the named structure's own radius, if it has one."""
        return replace(self, band_mm=self.structure_band_mm.get(name, self.band_mm))


PLAIN_EXTRACTION = ExtractionSettings(
    band_mm=2.0, max_band_share=1.0, min_component_mm2=20.0, max_component_share=None, regrow=0.0
)
"""The paper's three steps alone: a band of one width for all structures, and nothing grows back."""


def difference(mask: BoolArray, truth: BoolArray) -> BoolArray:
    """Return D = |T - M|: errors and observer variability together, of the masks' shape."""
    return np.logical_xor(mask, truth)


def entropy_map(probability: FloatArray) -> FloatArray:
    """Voxel-wise entropy (nats) of a structure being there or not, of the probability's shape; 0 where it is sure."""
    p = np.clip(probability, 1e-6, 1.0)
    q = np.clip(1.0 - probability, 1e-6, 1.0)
    return np.asarray(-(p * np.log(p)) - q * np.log(q), np.float32)


def estimated_truth(mask: BoolArray, error: FloatArray) -> FloatArray:
    """Return M(1 - E) + (1 - M)E: the truth's probability in every voxel, of the mask's shape."""
    return np.where(mask, 1 - error, error)


def extract_errors(
    error: ErrorT, mask: BoolArray, axis: int, spacing_mm: Sequence[float], settings: ExtractionSettings
) -> ErrorT:
    """Keep the part of an error map that is more than observer variability, slice by slice (paper, section 3.3).

    The band around the mask's contour is set to zero. What is left of the likely errors grows back into the components
    (8 neighbours) it belonged to, and those that are too small are dropped. An error that is deeper than observers
    differ gets most of its rim back in this way; the rest of the band stays out. What lies outside the band and below
    the threshold stays. The border of the volume is no contour.

    Args:
        error: error probabilities, or the difference D, of shape (n0, n1, n2).
        mask: one structure's mask, of the same shape.
        axis: the through-plane axis.
        spacing_mm: the voxel spacing, three numbers.
        settings: the band's radius, the smallest component, their bounds, and how far components grow back.

    Returns:
        A new array of the error's shape and type.

    Raises:
        ValueError: if the arrays are not 3-D or differ in shape.
    """
    if error.ndim != 3 or error.shape != mask.shape:
        raise ValueError(f"error extraction needs two 3-D arrays of one shape, got {error.shape} and {mask.shape}")
    axis %= 3
    result = error.copy()
    first, second = (a for a in range(3) if a != axis)
    plane = (spacing_mm[first], spacing_mm[second])
    smallest = settings.min_component_mm2
    radius = 0.0
    box = bounding_box(mask)
    if box is not None:
        if settings.max_component_share is not None:
            voxels = np.count_nonzero(mask[box], axis=(first, second))
            mean_area_mm2 = float(voxels[voxels > 0].mean()) * plane[0] * plane[1]
            smallest = min(smallest, settings.max_component_share * mean_area_mm2)
        reach = [math.floor(settings.band_mm / spacing_mm[a] + _TOLERANCE) if a != axis else 0 for a in range(3)]
        box = padded_box(box, reach, mask.shape)
        inside = slices_first(mask[box], axis)
        radius = _band_radius(inside, plane, settings)
        if radius > 0:
            band = dilate_in_plane(inside, radius, plane) & dilate_in_plane(~inside, radius, plane)
            slices_first(result[box], axis)[band] = 0
    _keep_components(slices_first(result, axis), slices_first(error, axis), plane, radius, smallest, settings)
    return result


def likely_wrong(error: BoolArray | FloatArray, threshold: float) -> BoolArray:
    """Return the voxels whose error probability reaches the threshold; a true error as it is."""
    return error.astype(bool, copy=False) if error.dtype == bool else np.asarray(error >= threshold)


def bounding_box(mask: BoolArray) -> Box | None:
    """Return the slices of the smallest box that holds a mask (n0, n1, n2); None for an empty mask."""
    planes = mask.any(axis=(1, 2))
    if not planes.any():
        return None
    first = _extent(planes)
    seen = mask[first].any(axis=0)  # over the first axis NumPy is fastest by far
    return first, _extent(seen.any(axis=1)), _extent(seen.any(axis=0))


def _extent(along: BoolArray) -> slice:
    return slice(int(along.argmax()), len(along) - int(along[::-1].argmax()))


def slices_first(array: ArrayT, axis: int) -> ArrayT:
    """A view of (n0, n1, n2) with the through-plane axis first; `np.moveaxis` takes many times as long."""
    return array if axis == 0 else array.transpose(axis, *(a for a in range(3) if a != axis))


def padded_box(box: Box, margin: Sequence[int], shape: Sequence[int]) -> Box:
    """Widen a box by a margin in voxels on all sides, within an array of a shape."""
    first, second, third = (
        slice(max(part.start - m, 0), min(part.stop + m, n)) for part, m, n in zip(box, margin, shape, strict=True)
    )
    return first, second, third


def label_slices(mask: BoolArray, axis: int) -> tuple[npt.NDArray[np.int32], int]:
    """Label the connected components (8 neighbours) of every slice in one call.

    Args:
        mask: (n0, n1, n2).
        axis: the through-plane axis; components do not reach across it.

    Returns:
        The labels, of the mask's shape, 0 outside; and the number of components.
    """
    # SciPy follows lines of the last axis, and is slow where neighbours in them have nothing to do with each other
    labels, count = ndimage.label(slices_first(mask, axis), structure=_NEIGHBOURS)
    return labels if axis == 0 else np.moveaxis(labels, 0, axis), int(count)


def _band_radius(mask: BoolArray, plane_mm: tuple[float, float], settings: ExtractionSettings) -> float:
    """The band's radius in mm, 0 for no band; the in-plane axes are the last two."""
    background = ~mask
    allowed = settings.max_band_share * np.count_nonzero(mask)
    # only the distances between voxels make a difference: the largest of them that keeps the bound
    radii = _distances(plane_mm, settings.band_mm)
    kept = bisect.bisect_right(
        radii, allowed, key=lambda r: np.count_nonzero(dilate_in_plane(background, r, plane_mm) & mask)
    )
    return radii[kept - 1] if kept else 0.0


def _distances(plane_mm: tuple[float, float], longest_mm: float) -> list[float]:
    """The distances between voxel centres of a slice, up to a length, ascending."""
    steps = [np.arange(math.floor(longest_mm / spacing + _TOLERANCE) + 1) * spacing for spacing in plane_mm]
    distances = np.unique(np.hypot(steps[0][:, None], steps[1][None, :]).round(6))
    return [float(d) for d in distances if 0 < d <= longest_mm * (1 + _TOLERANCE)]


def dilate_in_plane(mask: BoolArray, radius_mm: float, plane_mm: tuple[float, float]) -> BoolArray:
    """Dilate every slice by a disk.

    Args:
        mask: (through-plane, in-plane, in-plane).
        radius_mm: the disk's radius; voxels at exactly this distance are reached.
        plane_mm: spacing along the two in-plane axes.

    Returns:
        A new mask; beyond the border there is nothing.
    """
    reach = radius_mm * (1 + _TOLERANCE)
    rows = range(math.floor(reach / plane_mm[0]) + 1)
    # the disk is a stack of row segments: widen one step at a time, and shift to the rows of that width
    widths = [math.floor(math.sqrt(max(reach**2 - (row * plane_mm[0]) ** 2, 0.0)) / plane_mm[1]) for row in rows]
    result, widened = mask.copy(), mask.copy()
    _, length, breadth = mask.shape
    for width in range(min(widths[0], breadth) + 1):
        if width:
            widened[..., width:] |= mask[..., :-width]
            widened[..., :-width] |= mask[..., width:]
        for row in (r for r in rows if min(widths[r], breadth) == width and r < length):
            result[:, row:] |= widened[:, : length - row]
            result[:, : length - row] |= widened[:, row:]
    return result


def _keep_components(
    extracted: ErrorT,
    error: ErrorT,
    plane_mm: tuple[float, float],
    radius_mm: float,
    smallest_mm2: float,
    settings: ExtractionSettings,
) -> None:
    """Grow components back into the error and drop small ones, in place; the in-plane axes are the last two."""
    core = likely_wrong(extracted, settings.threshold)
    box = bounding_box(core)
    if box is None:
        return
    slices = box[0]
    wrong = likely_wrong(error[slices], settings.threshold)
    box = bounding_box(wrong)
    assert box is not None  # what the band left was wrong before
    extracted, error, core, wrong = extracted[slices][box], error[slices][box], core[slices][box], wrong[box]
    measured = kept = core
    if settings.regrow > 0 and radius_mm > 0:
        labels, count = label_slices(wrong, 0)
        survives = np.zeros(count + 1, bool)
        survives[labels[core]] = True
        own = survives[labels]
        measured = own & dilate_in_plane(core, radius_mm, plane_mm)
        kept = own & dilate_in_plane(core, settings.regrow * radius_mm, plane_mm)
    if smallest_mm2 > 0:
        labels, _ = label_slices(measured, 0)
        large = np.bincount(labels.ravel()) * plane_mm[0] * plane_mm[1] >= smallest_mm2 * (1 - _TOLERANCE)
        large[0] = False
        kept = kept & large[labels]
    extracted[core & ~kept] = 0
    extracted[kept] = error[kept]
