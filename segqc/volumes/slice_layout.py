"""How a scan's voxels are shown, slice by slice, and the way back to the file's own voxel order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from nibabel.orientations import io_orientation

from segqc.volumes.frame import through_plane_axis
from segqc.volumes.volume import AffineArray, Array, Grid


@dataclass(frozen=True, slots=True)
class SliceLayout:
    """Where a scan's axes run in images that are shown one slice at a time.

    Attributes:
        column_axis: the array axis along which the columns of an image are counted, from left to right.
        row_axis: the array axis along which its rows are counted, from top to bottom.
        slice_axis: the array axis across the images; they are in the order of the file's voxels.
        flip_columns: whether the columns are counted from the last voxel to the first.
        flip_rows: whether the rows are.
    """

    column_axis: int
    row_axis: int
    slice_axis: int
    flip_columns: bool
    flip_rows: bool

    def to_images(self, array: Array) -> Array:
        """A view of an array in the file's voxel order as images, ``(slices, rows, columns)``."""
        images = array.transpose(self.slice_axis, self.row_axis, self.column_axis)
        return np.flip(images, self._flipped)

    def from_images(self, images: Array) -> Array:
        """A view of images, ``(slices, rows, columns)``, in the file's voxel order: the inverse of `to_images`."""
        order = np.argsort((self.slice_axis, self.row_axis, self.column_axis))
        return np.flip(images, self._flipped).transpose(order)

    def affine_of_images(self, grid: Grid) -> AffineArray:
        """Column, row and slice to RAS millimetres, ``(4, 4)``."""
        index = np.zeros((4, 4))
        index[3, 3] = 1
        axes = (self.column_axis, self.row_axis, self.slice_axis)
        for image_axis, (axis, flip) in enumerate(zip(axes, (self.flip_columns, self.flip_rows, False), strict=True)):
            index[axis, image_axis] = -1 if flip else 1
            index[axis, 3] = grid.shape[axis] - 1 if flip else 0
        affine: AffineArray = grid.affine @ index
        return affine

    def to_image_rectangle(
        self, start: tuple[int, int], stop: tuple[int, int], shape: tuple[int, int, int]
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """A rectangle of voxels in one slice, as its columns and its rows in the image; all intervals are half-open.

        Args:
            start: its first voxel along the two in-plane axes, which are in ascending order.
            stop: the one after its last voxel along them.
            shape: voxels along each array axis.

        Example:
            >>> SliceLayout(0, 1, 2, True, False).to_image_rectangle((1, 2), (3, 4), (10, 20, 5))
            ((7, 9), (2, 4))
        """
        first = min(self.column_axis, self.row_axis)

        def interval(axis: int, flip: bool) -> tuple[int, int]:
            low, high = (end[0 if axis == first else 1] for end in (start, stop))
            return (shape[axis] - high, shape[axis] - low) if flip else (low, high)

        return interval(self.column_axis, self.flip_columns), interval(self.row_axis, self.flip_rows)

    @property
    def _flipped(self) -> list[int]:
        return [axis for axis, flip in ((1, self.flip_rows), (2, self.flip_columns)) if flip]


def slice_layout(grid: Grid) -> SliceLayout:
    """Plan how a scan is shown: across its through-plane axis, as radiologists look at it.

    Columns run to the patient's left, in sagittal slices to the back; rows run to the back, in coronal and sagittal
    slices to the feet. Axes are those of the patient that the scan's are nearest to; no voxel is interpolated.

    Example:
        >>> from segqc.volumes import Volume
        >>> slice_layout(Volume(np.zeros((4, 5, 2)), affine=np.diag([0.5, 0.5, 3.0, 1.0])))
        SliceLayout(column_axis=0, row_axis=1, slice_axis=2, flip_columns=True, flip_rows=True)
    """
    through = through_plane_axis(grid)
    orientation = io_orientation(grid.affine)  # per array axis: the RAS axis it is nearest to, and its sign
    in_ras_order = np.argsort(orientation[:, 0]).tolist()
    column_axis, row_axis = (axis for axis in in_ras_order if axis != through)
    ascends = (orientation[:, 1] > 0).tolist()
    return SliceLayout(column_axis, row_axis, through, ascends[column_axis], ascends[row_axis])
