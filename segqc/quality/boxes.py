"""Error boxes: where in a slice to look, and how well predicted boxes meet the true ones (paper, section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.special import logit

from segqc.quality.error_maps import Box, bounding_box, label_slices, likely_wrong, slices_first
from segqc.types import BoolArray, ErrorBox, FloatArray

# rows of (start0, start1, stop0, stop1), half-open, in one slice
Corners = npt.NDArray[np.int32]

_MAX_EVIDENCE = 16.0  # beyond it, probabilities in single precision are 0 or 1
_TOLERANCE = 1e-6
_PORTION = 256


@dataclass(frozen=True, slots=True)
class BoxSettings:
    """How the voxels of an error map become boxes; the paper's values.

    Attributes:
        threshold: error probability from which a voxel counts as wrong.
        min_distance_voxels: boxes of one slice nearer than this are united.
        min_area_mm2: boxes with a smaller area are dropped.
        max_area_mm2: a box is dropped as no help in finding the error if it is larger than ``max_slice_share`` of its
            slice and larger than this area (the paper: twice the largest true box); None bounds by the slice only.
        max_slice_share: see ``max_area_mm2``.
        min_evidence: boxes whose evidence (`ErrorBox`) is not above this are dropped; None for no bound.
        min_area_share: bound on ``min_area_mm2`` where the mask is known (`for_mask`): this share of its mean area over
            the slices that hold it, as what is small in a large structure is much of a small one; None for no bound.
    """

    threshold: float = 0.5
    min_distance_voxels: float = 5.0
    min_area_mm2: float = 100.0
    max_area_mm2: float | None = None
    max_slice_share: float = 0.5
    min_evidence: float | None = None
    min_area_share: float | None = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"boxes: threshold must lie in (0, 1], got {self.threshold}")
        sizes = (self.min_distance_voxels, self.min_area_mm2, self.max_slice_share, self.min_area_share or 0)
        if not all(0 <= size < math.inf for size in sizes) or not (self.max_area_mm2 or 0) >= 0:
            raise ValueError("boxes: distances, areas and shares must be finite, and not negative")

    def bounded(self, *, largest_mm2: float | None, evidence: float | None) -> BoxSettings:
        """These settings with the bounds that come from a training, where they have none of their own.

        Args:
            largest_mm2: the area of the training's largest error box; None where it is not known.
            evidence: what boxes of right masks have, in the place of the smallest area: what people miss may be small.
        """
        found = self
        if largest_mm2 is not None and self.max_area_mm2 is None:
            found = replace(found, max_area_mm2=2 * largest_mm2)
        if evidence is not None and self.min_evidence is None:
            found = replace(found, min_area_mm2=0.0, min_evidence=evidence)
        return found

    def for_mask(self, mask: BoolArray, axis: int, spacing_mm: Sequence[float]) -> BoxSettings:
        """These settings with the bound on the smallest area that a mask (n0, n1, n2) sets."""
        voxels = mask.sum(axis=tuple(a for a in range(3) if a != axis))
        if self.min_area_share is None or not voxels.any():
            return self
        voxel_mm2 = math.prod(s for a, s in enumerate(spacing_mm) if a != axis)
        bound = self.min_area_share * float(voxels[voxels > 0].mean()) * voxel_mm2
        return replace(self, min_area_mm2=min(self.min_area_mm2, bound))


def find_boxes(
    error: FloatArray | BoolArray,
    axis: int,
    spacing_mm: Sequence[float],
    settings: BoxSettings,
    *,
    mask: BoolArray | None = None,
    part: Box | None = None,
    shape: Sequence[int] | None = None,
) -> tuple[ErrorBox, ...]:
    """Find the boxes of likely errors in every slice (paper, section 3.4).

    Threshold, connected components (8 neighbours), bounding boxes, union of near boxes until none is near another,
    then the bounds on area and evidence.

    Args:
        error: error probabilities, or a true error, of shape (n0, n1, n2).
        axis: the through-plane axis.
        spacing_mm: the voxel spacing, three numbers.
        settings: thresholds.
        mask: the mask whose error it is, of the same shape; without it, boxes have no ``mask_share``.
        part: the box of a scan that the array is, where it is not all of it.
        shape: that scan's.

    Returns:
        Boxes by slice, then by their first corner. A box's area is the rectangle's; mean and peak error are over all
        its voxels.

    Raises:
        ValueError: if the array is not 3-D.

    Example:
        Two errors in slice 1, three voxels apart, become one box.

        >>> error = np.zeros((40, 40, 2))
        >>> error[5:15, 5:25, 1] = 1
        >>> error[18:20, 5:25, 1] = 1
        >>> find_boxes(error, axis=2, spacing_mm=(1, 1, 3), settings=BoxSettings(min_distance_voxels=5))
        (ErrorBox(slice_index=1, start=(5, 5), stop=(20, 25), area_mm2=300, mean_error=0.8, ...),)
    """
    if error.ndim != 3:
        raise ValueError(f"error boxes need a 3-D array, got shape {error.shape}")
    axis %= 3
    first, second = (a for a in range(3) if a != axis)
    voxel_mm2 = spacing_mm[first] * spacing_mm[second]
    whole = error.shape if shape is None else shape
    upper = _largest_area(whole[first] * whole[second] * voxel_mm2, settings)
    begin = (0, 0, 0) if part is None else tuple(side.start for side in part)
    slices, corners = _component_boxes(error, axis, settings.threshold)
    if not len(slices):
        return ()
    # slices side by side in one plane, too far from each other to be united: one call for many slices
    apart = error.shape[first] + math.ceil(settings.min_distance_voxels)
    order = np.argsort(slices, kind="stable")
    slices, corners = slices[order], corners[order]
    corners[:, [0, 2]] += (slices * apart)[:, None]
    planes = slices_first(error, axis)
    masks = None if mask is None else slices_first(mask, axis)
    boxes = []
    for portion in np.split(corners, _portions(slices)):
        for a0, a1, b0, b1 in unite_boxes(portion, settings.min_distance_voxels).tolist():
            index, a0 = divmod(a0, apart)
            b0 -= index * apart
            area = (b0 - a0) * (b1 - a1) * voxel_mm2
            if settings.min_area_mm2 * (1 - _TOLERANCE) <= area <= upper * (1 + _TOLERANCE):
                where = index, slice(a0, b0), slice(a1, b1)
                evidence = _evidence(planes[index], (a0, b0), (a1, b1))
                if settings.min_evidence is not None and evidence <= settings.min_evidence:
                    continue
                inside = planes[where]
                mean, peak = float(inside.sum(dtype=np.float64)) / inside.size, float(inside.max())
                share = None if masks is None else _share(masks[where], likely_wrong(inside, settings.threshold))
                start, stop = ((a + begin[first], b + begin[second]) for a, b in ((a0, a1), (b0, b1)))
                boxes.append(ErrorBox(index + begin[axis], start, stop, area, mean, peak, share, evidence))
    return tuple(boxes)


def largest_box_area_mm2(
    error: FloatArray | BoolArray, axis: int, spacing_mm: Sequence[float], settings: BoxSettings | None = None
) -> float | None:
    """Return the area of the largest box in a true error map, however large; None where there is none.

    Twice the largest over all training cases is what `BoxSettings.max_area_mm2` is set to. Arguments as `find_boxes`;
    the paper's settings by default.
    """
    unbounded = replace(settings or BoxSettings(), max_area_mm2=math.inf)
    return max((box.area_mm2 for box in find_boxes(error, axis, spacing_mm, unbounded)), default=None)


def unite_boxes(corners: Corners, min_distance: float) -> Corners:
    """Unite the boxes of one slice that are nearer than a distance, until none is near another.

    The distance of two boxes is the Euclidean length of the gaps between them in voxels, 0 where they touch or overlap.

    Args:
        corners: (n, 4) rows of start0, start1, stop0, stop1, half-open.
        min_distance: boxes at this distance stay apart.

    Returns:
        (m, 4) rows, sorted. The order of the input does not matter.

    Example:
        The first two boxes are 2 voxels apart, the third is 14 voxels from them.

        >>> unite_boxes(np.array([[0, 0, 2, 2], [4, 0, 6, 2], [20, 0, 22, 2]]), min_distance=5).tolist()
        [[0, 0, 6, 2], [20, 0, 22, 2]]
    """
    united = corners[:0]
    if min_distance <= 0:
        united = corners
    else:
        # in portions: a noisy map has more components in a slice than fit a matrix of all their distances
        for begin in range(0, len(corners), _PORTION):
            united = _united(np.concatenate([united, corners[begin : begin + _PORTION]]), min_distance)
    return np.asarray(united[np.lexsort((united[:, 3], united[:, 2], united[:, 1], united[:, 0]))])


def _portions(slices: npt.NDArray[np.int32]) -> npt.NDArray[np.intp]:
    """Where to split components, sorted by slice, into whole slices of about `_PORTION` components together."""
    starts = np.flatnonzero(np.diff(slices)) + 1
    return starts[np.diff(starts // _PORTION, prepend=0) > 0]


def _united(corners: Corners, min_distance: float) -> Corners:
    far = math.ceil(min_distance)
    while True:
        start, stop = corners[:, :2], corners[:, 2:]
        squared = np.zeros((len(corners), len(corners)), np.int32)
        for side in (0, 1):
            gap = start[:, None, side] - stop[None, :, side]
            squared += np.clip(np.maximum(gap, gap.T), 0, far) ** 2
        near = squared < min_distance**2
        if np.count_nonzero(near) == len(corners):  # each is near itself only
            return corners
        count, group = _groups(near)
        united = np.empty((count, 4), np.int32)
        united[:, :2], united[:, 2:] = np.iinfo(np.int32).max, -1
        np.minimum.at(united[:, :2], group, start)
        np.maximum.at(united[:, 2:], group, stop)
        corners = united


def _groups(near: BoolArray) -> tuple[int, npt.NDArray[np.intp]]:
    """Connected components of a small graph, given by its matrix: how many, and the one that each node is in.

    Each node takes the least number among its neighbours until none changes: many times as fast here as SciPy's, which
    makes a sparse matrix first.
    """
    group = np.arange(len(near))
    while True:
        least = np.where(near, group, len(near)).min(axis=1)
        least = least[least]  # a neighbour's number names a node of the same component
        if np.array_equal(least, group):
            numbers, group = np.unique(group, return_inverse=True)
            return len(numbers), group
        group = least


def box_iou(a: ErrorBox, b: ErrorBox) -> float:
    """Intersection over union of two boxes; 0 where they lie in different slices.

    Example:
        >>> a = ErrorBox(3, start=(0, 0), stop=(10, 10), area_mm2=100.0, mean_error=0.9, peak_error=1.0)
        >>> b = replace(a, start=(0, 5), stop=(10, 15))
        >>> box_iou(a, b)
        0.333...
        >>> box_iou(a, replace(b, slice_index=4))
        0.0
    """
    return float(_ious([a], [b])[0, 0])


@dataclass(frozen=True, slots=True)
class Detection:
    """Counts of a comparison of boxes; add those of several scans to pool them.

    Attributes:
        predicted: number of predicted boxes.
        true: number of true boxes.
        matched: number of pairs.
    """

    predicted: int = 0
    true: int = 0
    matched: int = 0

    @property
    def precision(self) -> float | None:
        """Matched share of the predicted boxes; None without any."""
        return self.matched / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        """Matched share of the true boxes; None without any."""
        return self.matched / self.true if self.true else None

    def __add__(self, other: Detection) -> Detection:
        return Detection(self.predicted + other.predicted, self.true + other.true, self.matched + other.matched)


def match_boxes(predicted: Sequence[ErrorBox], true: Sequence[ErrorBox], min_iou: float) -> Detection:
    """Pair predicted and true boxes of one scan, each with one of the other at most, as many as can be.

    Args:
        predicted: boxes of an error map.
        true: boxes of the true error.
        min_iou: a pair's IoU is at least this (the paper: 0.05, 0.10, 0.15, 0.20).

    Raises:
        ValueError: if ``min_iou`` is not in (0, 1].

    Example:
        >>> found = ErrorBox(3, start=(0, 0), stop=(10, 10), area_mm2=100.0, mean_error=0.9, peak_error=1.0)
        >>> elsewhere = replace(found, slice_index=7)
        >>> counts = match_boxes([found, elsewhere], true=[found], min_iou=0.1)
        >>> counts
        Detection(predicted=2, true=1, matched=1)
        >>> counts.precision, counts.recall
        (0.5, 1.0)
    """
    return match_boxes_at(predicted, true, (min_iou,))[0]


def match_boxes_at(
    predicted: Sequence[ErrorBox], true: Sequence[ErrorBox], min_ious: Sequence[float]
) -> tuple[Detection, ...]:
    """Pair boxes as `match_boxes` does, at several IoUs: one result for each.

    Raises:
        ValueError: if one of ``min_ious`` is not in (0, 1].
    """
    for min_iou in min_ious:
        if not 0 < min_iou <= 1:
            raise ValueError(f"boxes are matched at an IoU in (0, 1], got {min_iou}")
    if not predicted or not true:
        return tuple(Detection(len(predicted), len(true)) for _ in min_ious)
    ious = _ious(predicted, true)
    found = []
    for min_iou in min_ious:
        pairs = maximum_bipartite_matching(csr_array(ious >= min_iou), perm_type="column")
        found.append(Detection(len(predicted), len(true), int(np.count_nonzero(pairs >= 0))))
    return tuple(found)


def _component_boxes(
    error: FloatArray | BoolArray, axis: int, threshold: float
) -> tuple[npt.NDArray[np.int32], Corners]:
    """Slice index (n,) and in-plane corners (n, 4) of every component of the thresholded map."""
    wrong = likely_wrong(error, threshold)
    around = bounding_box(wrong)
    if around is None:
        return np.empty(0, np.int32), np.empty((0, 4), np.int32)
    labels, _ = label_slices(wrong[around], axis)
    found = [[side for part in of for side in (part.start, part.stop)] for of in ndimage.find_objects(labels)]
    sides = np.array(found, np.int32).reshape(-1, 3, 2) + np.array([part.start for part in around], np.int32)[:, None]
    in_plane = [a for a in range(3) if a != axis]
    return sides[:, axis, 0], sides[:, in_plane].transpose(0, 2, 1).reshape(-1, 4)


def largest_evidence(error: FloatArray | BoolArray, axis: int) -> float:
    """The largest evidence of a likely error anywhere, see `ErrorBox`: how surely there is one at all.

    Args:
        error: error probabilities (n0, n1, n2).
        axis: the through-plane axis.
    """
    planes = slices_first(error, axis)
    return max(_evidence(plane, (0, plane.shape[0]), (0, plane.shape[1])) for plane in planes)


def _evidence(plane: FloatArray | BoolArray, first: tuple[int, int], second: tuple[int, int]) -> float:
    """The evidence of a box in a slice, see `ErrorBox`; ``first`` and ``second`` are its half-open sides."""
    around = plane[max(first[0] - 1, 0) : first[1] + 1, max(second[0] - 1, 0) : second[1] + 1]
    core = around.copy()  # the least of a voxel and its four neighbours: many times as fast as by SciPy in a small box
    for one, other in ((core, around), (core.T, around.T)):
        np.minimum(one[1:], other[:-1], out=one[1:])
        np.minimum(one[:-1], other[1:], out=one[:-1])
    inner = core[first[0] > 0 :, second[0] > 0 :][: first[1] - first[0], : second[1] - second[0]]
    return min(max(float(logit(float(inner.max()))), -_MAX_EVIDENCE), _MAX_EVIDENCE)


def _share(mask: BoolArray, wrong: BoolArray) -> float:
    """The part of the wrong voxels that lies in the mask."""
    return np.count_nonzero(mask & wrong) / np.count_nonzero(wrong)


def _largest_area(slice_mm2: float, settings: BoxSettings) -> float:
    """The area up to which boxes are kept: those dropped exceed both bounds."""
    by_slice = settings.max_slice_share * slice_mm2
    return by_slice if settings.max_area_mm2 is None else max(by_slice, settings.max_area_mm2)


def _ious(first: Sequence[ErrorBox], second: Sequence[ErrorBox]) -> npt.NDArray[np.float64]:
    """IoU of every pair: (len(first), len(second))."""
    a, b = (np.array([(x.slice_index, *x.start, *x.stop) for x in boxes]) for boxes in (first, second))
    a, b = a[:, None], b[None, :]
    sides = np.minimum(a[..., 3:], b[..., 3:]) - np.maximum(a[..., 1:3], b[..., 1:3])
    shared = np.maximum(sides, 0).prod(axis=-1) * (a[..., 0] == b[..., 0])
    areas = [(box[..., 3:] - box[..., 1:3]).prod(axis=-1) for box in (a, b)]
    return np.asarray(shared / (areas[0] + areas[1] - shared), np.float64)
