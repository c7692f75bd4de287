"""A scan or a label map in memory: an array with its place in the world (RAS millimetres)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from segqc.errors import SegqcError

Array: TypeAlias = npt.NDArray[Any]
AffineArray: TypeAlias = npt.NDArray[np.float64]


LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_CORNERS = np.indices((2, 2, 2)).reshape(3, 8)


class VolumeError(SegqcError):
    """A file, or an array with its geometry, is no usable scan or label map; the message says why and what to do."""

    status = 422


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3-D array with its place in the world.

    Attributes:
        array: voxels, shape ``(n0, n1, n2)``, in the file's voxel order.
        affine: ``(4, 4)`` float64, voxel index to RAS millimetres.
        acquisition_axis: the array axis that slices were acquired along, where the file says it.
        alternative_affines: what other programs may take for the affine, where the file states several.

    Raises:
        VolumeError: if the array is not 3-D or empty, or if the affine is not an invertible ``(4, 4)`` map.

    Example:
        >>> volume = Volume(np.zeros((4, 5, 2)), affine=np.diag([-0.5, 0.5, 3.0, 1.0]))
        >>> volume.shape, volume.spacing_mm, round(volume.voxel_volume_mm3, 6)
        ((4, 5, 2), (0.5, 0.5, 3.0), 0.75)
        >>> Volume(np.zeros((4, 5)), affine=np.eye(4))
        Traceback (most recent call last):
        segqc.volumes.volume.VolumeError: A volume needs three non-empty axes, not the shape (4, 5).
    """

    array: Array
    affine: AffineArray
    acquisition_axis: int | None = None
    alternative_affines: tuple[AffineArray, ...] = ()

    def __post_init__(self) -> None:
        """Check the array and the affine, and take a float64 copy of the affine."""
        if self.array.ndim != 3 or 0 in self.array.shape:
            raise VolumeError(f"A volume needs three non-empty axes, not the shape {self.array.shape}.")
        finding = affine_finding(np.asarray(self.affine))
        if finding:
            raise VolumeError(f"The volume's affine {finding}; give an invertible 4 x 4 matrix.")
        object.__setattr__(self, "affine", np.array(self.affine, dtype=np.float64))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along each array axis."""
        n0, n1, n2 = self.array.shape
        return (n0, n1, n2)

    def find_alternatives(self) -> tuple[AffineArray, ...]:
        """What other programs may take for the affine."""
        return self.alternative_affines

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along each array axis, in millimetres."""
        return spacing_of(self.affine)

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel in cubic millimetres (right for sheared grids too)."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))


@dataclass(frozen=True)
class Segment:
    """A segment that a file names: voxels of a value in a layer."""

    name: str
    value: int
    layer: int


@dataclass(frozen=True)
class Source:
    """A file's geometry, known before its voxels are loaded, so that a wrong grid is refused cheaply.

    Attributes:
        shape: voxels along each array axis.
        affine: voxel index to RAS millimetres, as ITK reads it.
        acquisition_axis: the array axis that slices were acquired along, where the file says it.
        voxels: loads the voxels, of the shape, or ``(layers, *shape)`` where the file names its segments.
        find_alternatives: what other programs may take for the affine.
        step: the step that stored whole numbers stand for, where they are scaled.
        segments: those that the file names; None where it names none.
        find_warnings: sentences about what was decided where the file contradicts itself.
        is_for_itk: whether ITK, and so 3D Slicer, reads such files.
    """

    shape: tuple[int, int, int]
    affine: AffineArray
    acquisition_axis: int | None
    voxels: Callable[[], Array]
    find_alternatives: Callable[[], tuple[AffineArray, ...]] = tuple
    step: float = 0.0
    segments: tuple[Segment, ...] | None = None
    find_warnings: Callable[[], tuple[str, ...]] = tuple
    is_for_itk: bool = True


class Grid(Protocol):
    """Where a scan lies: what a `Volume` and an opened `Source` have in common."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along each array axis."""

    @property
    def affine(self) -> AffineArray:
        """Voxel index to RAS millimetres."""

    @property
    def acquisition_axis(self) -> int | None:
        """The array axis that slices were acquired along, where the file says it."""

    def find_alternatives(self) -> tuple[AffineArray, ...]:
        """What other programs may take for the affine."""


def affine_finding(affine: Array) -> str | None:
    """Return what is wrong with an affine, or None.

    Example:
        >>> affine_finding(np.diag([1.0, 0.0, 1.0, 1.0]))
        'has an axis of length zero'
        >>> affine_finding(np.eye(4)) is None
        True
    """
    if affine.shape != (4, 4):
        return f"has the shape {affine.shape}"
    # plain numbers: NumPy takes several times as long for so few
    if not all(map(math.isfinite, affine.ravel().tolist())):
        return "holds NaN or infinite numbers"
    axes = affine[:3, :3].T.tolist()
    lengths = [math.sqrt(x * x + y * y + z * z) for x, y, z in axes]
    if 0 in lengths:
        return "has an axis of length zero"
    (a, b, c), (d, e, f), (g, h, i) = ([x / n for x in axis] for axis, n in zip(axes, lengths, strict=True))
    if abs(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)) < 1e-4:
        return "is singular (its axes lie in one plane)"
    return None


def checked_affine(shown: Path | str, affine: Array) -> AffineArray:
    """Return a usable affine as float64.

    Raises:
        VolumeError: if it is not usable; the message begins with what the file is shown as.
    """
    finding = affine_finding(affine)
    if finding:
        raise VolumeError(f"{shown}: the file's affine {finding}; repair the header's orientation and spacing.")
    return np.array(affine, dtype=np.float64)


def checked_shape(shown: Path | str, shape: Sequence[int]) -> tuple[int, int, int]:
    """Return three positive sizes, allowing further axes of length one at the end.

    Raises:
        VolumeError: for other shapes; the message begins with what the file is shown as.
    """
    if len(shape) < 3 or any(size != 1 for size in shape[3:]):
        raise VolumeError(f"{shown}: is {len(shape)}-D, of shape {tuple(shape)}; give one 3-D volume a file.")
    if min(shape) < 1:
        raise VolumeError(f"{shown}: has the empty or negative shape {tuple(shape)}; the header is damaged.")
    return (int(shape[0]), int(shape[1]), int(shape[2]))


def spacing_of(affine: AffineArray) -> tuple[float, float, float]:
    """Distance between neighbouring voxel centres along each array axis, in millimetres."""
    s0, s1, s2 = np.linalg.norm(affine[:3, :3], axis=0)
    return (float(s0), float(s1), float(s2))


def corners(affine: AffineArray, shape: tuple[int, int, int]) -> AffineArray:
    """Centres of a grid's eight corner voxels, ``(3, 8)``, in millimetres.

    Example:
        >>> corners(np.diag([0.5, 0.5, 3.0, 1.0]), (4, 5, 2)).max(axis=1).tolist()
        [1.5, 2.0, 3.0]
    """
    index = _CORNERS * (np.array(shape, dtype=np.float64)[:, None] - 1)
    return cast(AffineArray, affine[:3, :3] @ index + affine[:3, 3:])


def grid_tolerance(affine: AffineArray, shape: tuple[int, int, int]) -> float:
    """How far apart corners may lie, in millimetres, for two grids to be the same one.

    It covers what rounding in headers costs: 1 % of the smallest voxel edge, and, near half a turn, where a quaternion
    of single precision is least precise, 7e-4 rad over the field of view; half the smallest edge at most.

    Example:
        >>> grid_tolerance(np.diag([0.5, 0.5, 3.0, 1.0]), (4, 5, 2))
        0.005
        >>> round(grid_tolerance(np.diag([0.5, 0.5, 3.0, 1.0]), (512, 512, 40)), 3)  # half the smallest edge
        0.25
    """
    smallest = min(spacing_of(affine))
    found = corners(affine, shape)
    field_of_view = float(np.linalg.norm(found.max(axis=1) - found.min(axis=1)))
    return max(1e-3, 0.01 * smallest, min(7e-4 * field_of_view, 0.5 * smallest))


def distance_of_grids(one: AffineArray, other: AffineArray, shape: tuple[int, int, int]) -> float:
    """The largest distance between corresponding corners of two grids of a shape, in millimetres.

    Example:
        >>> moved = np.eye(4)
        >>> moved[0, 3] = 0.25
        >>> distance_of_grids(np.eye(4), moved, (4, 5, 2))
        0.25
    """
    return float(np.linalg.norm(corners(one, shape) - corners(other, shape), axis=0).max())


def nearest_orthogonal(affine: AffineArray) -> AffineArray:
    """The affine with its axes turned to the nearest orthogonal ones; spacing and origin stay."""
    spacing = np.array(spacing_of(affine))
    u, _, v = np.linalg.svd(affine[:3, :3] / spacing)
    orthogonal = affine.copy()
    orthogonal[:3, :3] = (u @ v) * spacing
    return orthogonal
