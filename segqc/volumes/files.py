"""Scans and label maps on disk, whatever their format."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Final, Literal

import numpy as np

from segqc.volumes.atomic import atomic_write
from segqc.volumes.dicom import open_dicom, write_dicom
from segqc.volumes.inputs import InputFile
from segqc.volumes.labelmaps import load_labels
from segqc.volumes.limits import ReadLimits
from segqc.volumes.metaimage import open_metaimage
from segqc.volumes.nifti import open_nifti, write_nifti
from segqc.volumes.nrrd import open_nrrd, write_nrrd
from segqc.volumes.suffixes import (
    LABEL_SUFFIXES,
    NIFTI_SUFFIXES,
    SCAN_SUFFIXES,
    label_suffix,
    scan_suffix,
)
from segqc.volumes.volume import (
    Grid,
    Source,
    Volume,
    VolumeError,
    distance_of_grids,
    grid_tolerance,
    nearest_orthogonal,
    spacing_of,
)

MIN_SPACING_MM: Final = 0.005
MAX_SPACING_MM: Final = 100.0
"""A voxel edge outside of these means that a header's spacing or unit is wrong."""
MAX_EXTENT_MM: Final = 3000.0
MAX_CONTENT_MM3: Final = 1e9
"""A scan of more than 3 m or a cubic metre cannot be meant, and no grid of usual spacing over it fits in memory."""
MAX_INTENSITY: Final = 1e12
"""Beyond it no intensity is meant, but the padding of some program, such as the lowest number that float32 holds."""


def read_scan(
    path: str | os.PathLike[str], *, limits: ReadLimits | None = None, memory_order: Literal["C", "K"] = "C"
) -> Volume:
    """Read a scan: a ``.nii``, ``.nii.gz`` or ``.nrrd`` file, or a folder of one DICOM series.

    Intensity scaling of the file (NIfTI scl_slope, DICOM rescale) is applied. Files are placed in the world as ITK
    places them.

    Args:
        path: the file or folder.
        limits: bounds on its size and on the time that reading it takes; None for the defaults.
        memory_order: how the array lies in memory, whose axes are the file's: C-ordered, or as in the file ("K"),
            which is faster for whoever goes on with slices.

    Returns:
        The scan as float32, in the file's voxel order. A DICOM series has columns first, rows second, and slices
        last, ascending along the normal ``row x column`` of its image orientation.

    Raises:
        VolumeError: if there is no such file, it is truncated or damaged, not 3-D, without usable geometry, larger
            than the limits, or has voxels that are NaN, infinite or beyond `MAX_INTENSITY`; for a DICOM folder also if
            it holds several series, or slices that are missing, doubled, unevenly spaced or of mixed orientation.
    """
    file = InputFile(Path(path), limits)
    return load_scan(file, open_scan(file), memory_order)


def read_grid(path: str | os.PathLike[str], *, limits: ReadLimits | None = None) -> Grid:
    """Read where a scan lies, at the cost of a header.

    Raises:
        VolumeError: as `read_scan`, but for what is wrong with the voxels.
    """
    return open_scan(InputFile(Path(path), limits))


def open_scan(file: InputFile) -> Source:
    """Open a scan and check its geometry.

    Raises:
        VolumeError: as `read_grid`.
    """
    if file.path.is_dir():
        source = open_dicom(file)
    else:
        suffix = _known_suffix(file, scan_suffix(file.path.name), SCAN_SUFFIXES, "a folder of one DICOM series")
        source = open_nifti(file) if suffix in NIFTI_SUFFIXES else open_nrrd(file)
    if source.segments is not None:
        raise file.error("is a segmentation by its header, and no scan; put it among the labels, as .seg.nrrd.")
    file.check_size(source.shape)
    edges = spacing_of(source.affine)
    extents = [n * edge for n, edge in zip(source.shape, edges, strict=True)]
    if min(edges) < MIN_SPACING_MM or max(edges) > MAX_SPACING_MM:
        raise file.error(
            f"has voxels of {_product(edges)} mm, which cannot be meant; repair the header's spacing or its unit."
        )
    if max(extents) > MAX_EXTENT_MM or prod(extents) > MAX_CONTENT_MM3:
        raise file.error(
            f"covers {_product(extents)} mm, which cannot be meant; repair the header's spacing or its unit."
        )
    sheared = distance_of_grids(source.affine, nearest_orthogonal(source.affine), source.shape)
    if sheared > grid_tolerance(source.affine, source.shape):
        raise file.error(
            f"has sheared axes (up to {sheared:.3g} mm), which masks for 3D Slicer cannot have; resample it to "
            "orthogonal axes."
        )
    return source


def load_scan(file: InputFile, source: Source, memory_order: Literal["C", "K"] = "C") -> Volume:
    """Read an opened scan's voxels.

    Raises:
        VolumeError: as `read_scan`.
    """
    with file.within_memory(), np.errstate(over="ignore", invalid="ignore"):
        array = np.asarray(source.voxels(), dtype=np.float32, order=memory_order)
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise file.error(f"{bad} of {array.size} voxels are NaN or infinite; replace them by numbers first.")
    low, high = float(array.min()), float(array.max())
    if max(-low, high) > MAX_INTENSITY:
        raise file.error(
            f"has intensities from {low:.3g} to {high:.3g}, which cannot be meant; replace what is padding by the "
            "intensity of air."
        )
    return Volume(array, source.affine, source.acquisition_axis, source.find_alternatives())


def read_labels(
    path: str | os.PathLike[str],
    *,
    scan: Grid | None = None,
    values: Collection[int] | None = None,
    names: Mapping[str, int] | None = None,
    limits: ReadLimits | None = None,
) -> Volume:
    """Read a label map: a NIfTI, NRRD or MetaImage file of whole numbers from 0 to 255.

    Numbers that went through floats or a scaling of the file are rounded, where they lie as near to whole numbers as
    that way of storing them allows.

    Args:
        path: the file.
        scan: the scan the labels belong to. They must lie on its voxels, by any of the grids that the scan's file
            states and in whatever voxel order, within the formats' precision (see `grid_tolerance`).
        values: the label values allowed besides 0 (background); None allows all.
        names: the structures' names and label values. In a file that names its segments (3D Slicer's ``.seg.nrrd``)
            they are matched by name, in any case; such a file may also be cropped. None for the file's own values.
        limits: bounds on its size and on the time that reading it takes; None for the defaults.

    Returns:
        The label map as uint8, on the scan's own grid where a scan is given.

    Raises:
        VolumeError: as `read_scan`, and for a DICOM folder, labels that are not whole numbers from 0 to 255, values
            outside `values`, segments that are no structure or overlap, or a grid that is not the scan's.
    """
    file = InputFile(Path(path), limits)
    return load_labels(file, open_labels(file), scan, values, names).volume


def open_labels(file: InputFile) -> Source:
    """Open a label map.

    Raises:
        VolumeError: if its header cannot be used.
    """
    if file.path.is_dir():
        raise file.error(f"is a folder; labels are read from files, {', '.join(LABEL_SUFFIXES)}.")
    suffix = _known_suffix(file, label_suffix(file.path.name), LABEL_SUFFIXES)
    if suffix in NIFTI_SUFFIXES:
        return open_nifti(file, is_label=True)
    return open_metaimage(file) if suffix == ".mha" else open_nrrd(file)


def _known_suffix(file: InputFile, suffix: str | None, known: tuple[str, ...], *others: str) -> str:
    if not file.path.is_file():
        raise file.error("there is no such file; check the path.")
    if suffix is None:
        raise file.error(f"is of no known format; give {', '.join((*known, *others))}.")
    return suffix


def _product(lengths: Iterable[float]) -> str:
    return " x ".join(f"{length:.4g}" for length in lengths)


def write_scan(volume: Volume, path: str | os.PathLike[str]) -> None:
    """Write a scan: ``.nii``, ``.nii.gz`` or ``.nrrd``, or, to a path without suffix, a new folder of one DICOM series.

    Integers of up to 32 bits and float32 keep their type in files, all else becomes float32. DICOM pixels are
    16-bit: whole numbers of a range under 65,536 come back exactly, other values to half a 65,535th of their range.
    DICOM readers sort slices along the normal ``row x column``: a volume whose last axis points the other way comes
    back with that axis reversed, each voxel at its place in the world.

    Raises:
        VolumeError: if the suffix is unknown, voxels are NaN or infinite, a DICOM folder exists and is not empty, or
            the geometry does not fit into DICOM.
    """
    path = Path(path)
    array = volume.array
    if array.dtype not in (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise VolumeError(f"{path}: the scan to write holds NaN or infinite voxels; replace them by numbers first.")
    _write(Volume(array, volume.affine, volume.acquisition_axis), path)


def write_labels(volume: Volume, path: str | os.PathLike[str]) -> None:
    """Write a label map as uint8, to ``.nii``, ``.nii.gz`` or ``.nrrd``.

    Raises:
        VolumeError: if the suffix is another, or the array holds anything but whole numbers from 0 to 255.
    """
    path = Path(path)
    if scan_suffix(path.name) is None:
        raise VolumeError(f"{path}: labels are written to .nii, .nii.gz or .nrrd; choose one of these suffixes.")
    _write(_as_labels(volume, path), path)


def _as_labels(volume: Volume, path: Path) -> Volume:
    if volume.array.dtype == np.uint8:
        return volume
    with np.errstate(invalid="ignore"):
        labels = volume.array.astype(np.uint8)
    if not (labels == volume.array).all():
        raise VolumeError(f"{path}: the labels to write are not whole numbers from 0 to 255; convert them first.")
    return Volume(labels, volume.affine, volume.acquisition_axis)


@contextlib.contextmanager
def temporary_labels(volume: Volume) -> Iterator[Path]:
    """A label map as a compressed NIfTI file, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="segqc-") as folder:
        path = Path(folder) / "labels.nii.gz"
        write_nifti(_as_labels(volume, path), path, path)  # not atomically: nobody else looks here
        yield path


def _write(volume: Volume, path: Path) -> None:
    suffix = scan_suffix(path.name)
    if suffix is None and path.suffix:
        raise VolumeError(f"{path}: is of no known format; write .nii, .nii.gz, .nrrd or, without suffix, DICOM.")
    if suffix is None and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise VolumeError(f"{path}: exists already; give a new or empty folder for a DICOM series.")
    with atomic_write(path) as temporary:
        if suffix is None:
            write_dicom(volume, temporary, path)
        elif suffix in NIFTI_SUFFIXES:
            write_nifti(volume, temporary, path)
        else:
            write_nrrd(volume, temporary)
