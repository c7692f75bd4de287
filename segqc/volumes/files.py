"""Scans and label maps on disk, whatever their format."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from segqc.volumes.atomic import atomic_write
from segqc.volumes.dicom import open_dicom, write_dicom
from segqc.volumes.grid import check_grid
from segqc.volumes.limits import ReadLimits
from segqc.volumes.nifti import open_nifti, write_nifti
from segqc.volumes.nrrd import open_nrrd, write_nrrd
from segqc.volumes.suffixes import NIFTI_SUFFIXES, scan_suffix
from segqc.volumes.volume import Source, Volume, VolumeError


def read_scan(path: str | os.PathLike[str], *, limits: ReadLimits | None = None) -> Volume:
    """Read a scan: a ``.nii``, ``.nii.gz`` or ``.nrrd`` file, or a folder of one DICOM series.

    Intensity scaling of the file (NIfTI scl_slope, DICOM rescale) is applied.

    Returns:
        The scan as float32, in the file's voxel order. A DICOM series has columns first, rows second, and slices
        last, ascending along the normal ``row x column`` of its image orientation.

    Raises:
        VolumeError: if there is no such file, it is truncated or damaged, not 3-D, without usable geometry, or has
            NaN or infinite voxels; for a DICOM folder also if it holds several series, or slices that are missing,
            doubled, unevenly spaced or of mixed orientation.
    """
    path = Path(path)
    source = _open(path)
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(source.voxels(), dtype=np.float32)
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise VolumeError(f"{path}: {bad} of {array.size} voxels are NaN or infinite; replace them by numbers first.")
    return Volume(array, source.affine, source.acquisition_axis)


def read_labels(
    path: str | os.PathLike[str],
    *,
    scan: Volume | None = None,
    values: Collection[int] | None = None,
    names: Mapping[str, int] | None = None,
    limits: ReadLimits | None = None,
) -> Volume:
    """Read a label map: a ``.nii``, ``.nii.gz`` or ``.nrrd`` file of whole numbers from 0 to 255.

    Args:
        path: the file.
        scan: the scan the labels belong to. They must lie on its grid: same shape, and every corner within
            1e-3 mm, or 1 % of the smallest voxel edge where that is more (what rounding in file headers costs).
        values: the label values allowed besides 0 (background); None allows all.

    Returns:
        The label map as uint8, with the scan's own affine and acquisition axis where a scan is given.

    Raises:
        VolumeError: as `read_scan`, and for a DICOM folder, labels that are not whole numbers from 0 to 255, values
            outside `values`, or a grid that is not the scan's.
    """
    path = Path(path)
    if path.is_dir():
        raise VolumeError(f"{path}: is a folder; labels are read from a .nii, .nii.gz or .nrrd file.")
    source = _open(path)
    if scan is not None:
        check_grid(path, source, scan)
    raw = source.voxels()
    if not np.issubdtype(raw.dtype, np.integer) and not (np.isfinite(raw).all() and (raw == np.rint(raw)).all()):
        raise VolumeError(f"{path}: holds voxels that are not whole numbers; give a label map, not a scan or a map.")
    low, high = raw.min(), raw.max()
    if low < 0 or high > 255:
        raise VolumeError(f"{path}: holds label values from {low:g} to {high:g}; use values from 0 to 255.")
    labels = np.ascontiguousarray(raw, dtype=np.uint8)
    if values is not None:
        foreign = sorted(set(np.unique(labels).tolist()) - {0, *values})
        if foreign:
            allowed = ", ".join(map(str, sorted(set(values) - {0}))) or "none"
            raise VolumeError(
                f"{path}: holds the label value{'s' if len(foreign) > 1 else ''} {', '.join(map(str, foreign))}, "
                f"and the structures' values are {allowed}; relabel the file or add the structure to the settings."
            )
    if scan is not None:
        return Volume(labels, scan.affine, scan.acquisition_axis)
    return Volume(labels, source.affine, source.acquisition_axis)


def _open(path: Path) -> Source:
    if path.is_dir():
        return open_dicom(path)
    if not path.is_file():
        raise VolumeError(f"{path}: there is no such file; check the path.")
    suffix = scan_suffix(path.name)
    if suffix is None:
        raise VolumeError(f"{path}: is of no known format; give .nii, .nii.gz, .nrrd or a folder of one DICOM series.")
    return open_nifti(path) if suffix in NIFTI_SUFFIXES else open_nrrd(path)


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
    with np.errstate(invalid="ignore"):
        labels = volume.array.astype(np.uint8)
    if not (labels == volume.array).all():
        raise VolumeError(f"{path}: the labels to write are not whole numbers from 0 to 255; convert them first.")
    _write(Volume(labels, volume.affine, volume.acquisition_axis), path)


@contextlib.contextmanager
def temporary_labels(volume: Volume) -> Iterator[Path]:
    """A label map as a compressed NIfTI file, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="segqc-") as folder:
        path = Path(folder) / "labels.nii.gz"
        write_labels(volume, path)
        yield path


def _write(volume: Volume, path: Path) -> None:
    suffix = scan_suffix(path.name)
    if suffix is None and path.suffix:
        raise VolumeError(f"{path}: is of no known format; write .nii, .nii.gz, .nrrd or, without suffix, DICOM.")
    if suffix is None and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise VolumeError(f"{path}: exists already; give a new or empty folder for a DICOM series.")
    with atomic_write(path) as temporary:
        if suffix is None:
            write_dicom(volume, temporary, path.name)
        elif suffix in NIFTI_SUFFIXES:
            write_nifti(volume, temporary)
        else:
            write_nrrd(volume, temporary)
