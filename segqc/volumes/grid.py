"""Where a label map lies on its scan's grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segqc.volumes.inputs import InputFile
from segqc.volumes.volume import AffineArray, Array, Grid, Source, distance_of_grids, grid_tolerance


@dataclass(frozen=True)
class GridPlacement:
    """How an array goes onto a scan's grid, voxel by voxel.

    Attributes:
        order: for each axis of the scan, the array's axis that runs along it.
        flips: for each axis of the scan, whether the array's axis runs the other way.
        start: for each axis of the scan, the first of its voxels that the array covers.
        shape: voxels along each axis of the scan.
        is_own_affine: whether this is by the scan's affine, and not by an alternative.
    """

    order: tuple[int, ...]
    flips: tuple[bool, ...]
    start: tuple[int, ...]
    shape: tuple[int, int, int]
    is_own_affine: bool

    def keeps_voxels(self, shape: Sequence[int]) -> bool:
        """Whether an array of a shape stays as it is."""
        return tuple(shape) == self.shape and self.order == (0, 1, 2) and not any(self.flips)

    def apply(self, array: Array) -> Array:
        """Return an array of the scan's shape; zero where the given one does not reach."""
        turned = np.flip(array.transpose(self.order), [axis for axis, flip in enumerate(self.flips) if flip])
        if turned.shape == self.shape:
            return turned
        whole = np.zeros(self.shape, array.dtype)
        whole[tuple(slice(s, s + n) for s, n in zip(self.start, turned.shape, strict=True))] = turned
        return whole


def place_labels(file: InputFile, source: Source, scan: Grid) -> GridPlacement:
    """Find out how labels lie on their scan's grid.

    They must lie on whole voxels of it, by any of the affines that the scan's file states, in whatever order and
    direction of axes. They must cover it, but for segmentations that name their segments: these may be cropped.

    Raises:
        VolumeError: if they do not lie so.
    """
    found = _place(source, scan.affine, scan)
    if found is not None:
        return found
    for affine in scan.find_alternatives():
        found = _place(source, affine, scan)
        if found is not None:
            return found
    if source.shape != scan.shape:
        raise file.error(
            f"the labels have the shape {source.shape} and the scan {scan.shape}; resample them to the scan."
        )
    apart = distance_of_grids(source.affine, scan.affine, scan.shape)
    raise file.error(
        f"the labels' grid is up to {apart:.3g} mm away from the scan's (origin, spacing or orientation differ); "
        "resample them to the scan."
    )


def _place(source: Source, affine: AffineArray, scan: Grid) -> GridPlacement | None:
    to_scan = np.linalg.solve(affine, source.affine)
    if not np.abs(to_scan).max() < 1e6:
        return None
    steps = np.rint(to_scan[:3, :3]).astype(int)
    if not ((np.abs(steps).sum(axis=0) == 1).all() and (np.abs(steps).sum(axis=1) == 1).all()):
        return None
    on_lattice = np.eye(4)
    on_lattice[:3, :3], on_lattice[:3, 3] = steps, np.rint(to_scan[:3, 3])
    apart = distance_of_grids(affine @ on_lattice, source.affine, source.shape)
    if apart > grid_tolerance(affine, scan.shape):
        return None
    order = [int(axis) for axis in np.abs(steps).argmax(axis=1)]
    flips = [bool(steps[i, axis] < 0) for i, axis in enumerate(order)]
    sizes = [source.shape[axis] for axis in order]
    ends = on_lattice[:3, 3].astype(int).tolist()
    start = [end - (size - 1 if flip else 0) for end, size, flip in zip(ends, sizes, flips, strict=True)]
    is_inside = all(s >= 0 and s + n <= whole for s, n, whole in zip(start, sizes, scan.shape, strict=True))
    is_whole = is_inside and tuple(sizes) == scan.shape
    if not (is_whole or (is_inside and source.segments is not None)):
        return None
    return GridPlacement(tuple(order), tuple(flips), tuple(start), scan.shape, affine is scan.affine)
