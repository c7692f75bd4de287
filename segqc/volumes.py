"""Scans and label maps on disk, and the frame that networks work in.

The one door for files: NIfTI (``.nii``, ``.nii.gz``), NRRD (``.nrrd``) and a folder of one DICOM series become a
`Volume` in the file's own voxel order, and go back in the same geometry. What cannot be read faithfully is refused
with a `VolumeError` that names the file and the finding.

World coordinates are RAS millimetres throughout (NIfTI's convention); NRRD and DICOM are converted at the boundary.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

import nibabel as nib
import nrrd
import numpy as np
import numpy.typing as npt
import pydicom
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import io_orientation
from nibabel.spatialimages import HeaderDataError
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pydicom.valuerep import DSfloat, format_number_as_ds
from scipy.ndimage import gaussian_filter1d

Array: TypeAlias = npt.NDArray[Any]
AffineArray: TypeAlias = npt.NDArray[np.float64]

NIFTI_SUFFIXES = (".nii.gz", ".nii")
NRRD_SUFFIXES = (".nrrd",)
FILE_SUFFIXES = NIFTI_SUFFIXES + NRRD_SUFFIXES

THROUGH_PLANE_RATIO = 1.2
"""An axis is through-plane by its spacing when it exceeds this times both others (method, canonical frame)."""

SMOOTHING_RATIO = 1.5
"""Linear downsampling by more than this is preceded by a Gaussian, against aliasing."""

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class VolumeError(ValueError):
    """A file, or an array with its geometry, is no usable scan or label map; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3-D array with its place in the world.

    Attributes:
        array: voxels, shape ``(n0, n1, n2)``, in the file's voxel order.
        affine: ``(4, 4)`` float64, voxel index to RAS millimetres.
        acquisition_axis: the array axis that slices were acquired along, where the file says it.

    Raises:
        VolumeError: if the array is not 3-D or empty, or if the affine is not an invertible ``(4, 4)`` map.
    """

    array: Array
    affine: AffineArray
    acquisition_axis: int | None = None

    def __post_init__(self) -> None:
        """Check the array and the affine, and take a float64 copy of the affine."""
        if self.array.ndim != 3 or 0 in self.array.shape:
            raise VolumeError(f"A volume needs three non-empty axes, not the shape {self.array.shape}.")
        finding = _affine_finding(np.asarray(self.affine))
        if finding:
            raise VolumeError(f"The volume's affine {finding}; give an invertible 4 x 4 matrix.")
        object.__setattr__(self, "affine", np.array(self.affine, dtype=np.float64))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along each array axis."""
        n0, n1, n2 = self.array.shape
        return (n0, n1, n2)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along each array axis, in millimetres."""
        return _spacing_mm(self.affine)

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel in cubic millimetres (right for sheared grids too)."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))


@dataclass(frozen=True)
class _Source:
    """A file's geometry, known before its voxels are loaded, so that a wrong grid is refused cheaply."""

    shape: tuple[int, int, int]
    affine: AffineArray
    acquisition_axis: int | None
    voxels: Callable[[], Array]


# ---------------------------------------------------------------------------------------------------------- reading


def read_scan(path: str | os.PathLike[str]) -> Volume:
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
    path: str | os.PathLike[str], *, scan: Volume | None = None, values: Collection[int] | None = None
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
        _check_grid(path, source, scan)
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


def is_scan_path(path: str | os.PathLike[str]) -> bool:
    """Tell whether the path names something `read_scan` may read, by its suffix or, for a folder, by its DICOM files.

    Hidden names (a leading dot) are never scans.
    """
    path = Path(path)
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return any(_has_dicom_magic(file) for file in path.iterdir() if file.is_file())
    return _file_suffix(path) is not None


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files of a folder, sorted by name; a DICOMDIR and hidden files are left out."""
    return [file for file in _visible_files(folder) if _has_dicom_magic(file)]


def _visible_files(folder: Path) -> list[Path]:
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith("."))
    return [file for file in files if file.name.upper() != "DICOMDIR"]


def scan_id(path: str | os.PathLike[str]) -> str:
    """Return the file's name without its ``.nii``, ``.nii.gz`` or ``.nrrd`` suffix, and nothing else taken off.

    ``scan.v1.2.nii.gz`` is ``scan.v1.2``; a DICOM folder's id is its name.
    """
    path = Path(path)
    suffix = None if path.is_dir() else _file_suffix(path)
    return path.name[: -len(suffix)] if suffix else path.name


def _file_suffix(path: Path) -> str | None:
    name = path.name.lower()
    return next((suffix for suffix in FILE_SUFFIXES if name.endswith(suffix) and name != suffix), None)


def _open(path: Path) -> _Source:
    if path.is_dir():
        return _open_dicom(path)
    if not path.is_file():
        raise VolumeError(f"{path}: there is no such file; check the path.")
    suffix = _file_suffix(path)
    if suffix is None:
        raise VolumeError(f"{path}: is of no known format; give .nii, .nii.gz, .nrrd or a folder of one DICOM series.")
    return _open_nifti(path) if suffix in NIFTI_SUFFIXES else _open_nrrd(path)


def _check_grid(path: Path, source: _Source, scan: Volume) -> None:
    if source.shape != scan.shape:
        raise VolumeError(
            f"{path}: the labels have the shape {source.shape} and the scan {scan.shape}; resample them to the scan."
        )
    last = np.array(scan.shape, dtype=np.float64) - 1
    corners = np.array(np.meshgrid(*[(0.0, end) for end in last], indexing="ij")).reshape(3, -1)
    difference = source.affine - scan.affine
    offset = float(np.linalg.norm(difference[:3, :3] @ corners + difference[:3, 3:], axis=0).max())
    if offset > max(1e-3, 0.01 * min(scan.spacing_mm)):
        raise VolumeError(
            f"{path}: the labels' grid is up to {offset:.3g} mm away from the scan's (origin, spacing or orientation "
            "differ); resample them to the scan."
        )


def _affine_finding(affine: Array) -> str | None:
    """Say what is wrong with an affine, or None."""
    if affine.shape != (4, 4):
        return f"has the shape {affine.shape}"
    if not np.isfinite(affine).all():
        return "holds NaN or infinite numbers"
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if (lengths == 0).any():
        return "has an axis of length zero"
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-4:
        return "is singular (its axes lie in one plane)"
    return None


def _checked_affine(path: Path, affine: Array) -> AffineArray:
    finding = _affine_finding(affine)
    if finding:
        raise VolumeError(f"{path}: the file's affine {finding}; repair the header's orientation and spacing.")
    return np.array(affine, dtype=np.float64)


def _checked_shape(path: Path, shape: Sequence[int]) -> tuple[int, int, int]:
    """Return three positive sizes, allowing further axes of length one at the end."""
    if len(shape) < 3 or any(size != 1 for size in shape[3:]):
        raise VolumeError(f"{path}: is {len(shape)}-D, of shape {tuple(shape)}; give one 3-D volume a file.")
    if min(shape) < 1:
        raise VolumeError(f"{path}: has the empty or negative shape {tuple(shape)}; the header is damaged.")
    return (int(shape[0]), int(shape[1]), int(shape[2]))


def _spacing_mm(affine: AffineArray) -> tuple[float, float, float]:
    s0, s1, s2 = np.linalg.norm(affine[:3, :3], axis=0)
    return (float(s0), float(s1), float(s2))


# ------------------------------------------------------------------------------------------------------------ NIfTI

_NIFTI_UNIT_MM = {"unknown": 1.0, "mm": 1.0, "meter": 1e3, "micron": 1e-3}


def _open_nifti(path: Path) -> _Source:
    try:
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):
            raise VolumeError(f"{path}: is no single-file NIfTI image; convert it to NIfTI.")
        header = image.header
        shape = _checked_shape(path, header.get_data_shape())
        # The sform where there is one, else the qform, else spacing alone.
        affine = np.array(header.get_best_affine(), dtype=np.float64)
        unit = _NIFTI_UNIT_MM[header.get_xyzt_units()[0]]
        # Loading resets scaling and offset in the header; what the file says is in the array proxy.
        proxy = cast(ArrayProxy, image.dataobj)
        slope, intercept = float(proxy.slope), float(proxy.inter)
        offset, dtype = int(proxy.offset), header.get_data_dtype()
        acquisition_axis = header.get_dim_info()[2]
    except (ImageFileError, HeaderDataError, OSError, EOFError, KeyError, OverflowError, zlib.error) as error:
        raise VolumeError(f"{path}: is no readable NIfTI file ({error}); it may be truncated or damaged.") from error
    if dtype.kind not in "iuf":
        raise VolumeError(f"{path}: holds {dtype} voxels (colour or complex); give one real number a voxel.")
    affine[:3] *= unit

    def voxels() -> Array:
        raw = _nifti_payload(path, offset, dtype, shape)
        if slope == 1 and intercept == 0:
            return raw
        # Integers of 16 bits and less are exact in float32; wider ones need float64 until they are scaled.
        scaled: Array = raw.astype(np.float32 if dtype.itemsize <= 2 else np.float64)
        scaled *= slope
        scaled += intercept
        return scaled

    return _Source(shape, _checked_affine(path, affine), acquisition_axis, voxels)


def _nifti_payload(path: Path, offset: int, dtype: np.dtype[Any], shape: tuple[int, int, int]) -> Array:
    """Read the voxels; a gzip stream is read to its end, so that its checksum is verified."""
    expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
    try:
        stream: IO[bytes]
        with cast("IO[bytes]", gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")) as stream:
            stream.read(offset)
            payload = stream.read(expected)
            while stream.read(1 << 20):
                pass
    except (OSError, EOFError, zlib.error, MemoryError, OverflowError) as error:
        raise VolumeError(f"{path}: is truncated or damaged ({error}); copy the file again.") from error
    if len(payload) < expected:
        raise VolumeError(
            f"{path}: is truncated, {len(payload)} of {expected} bytes of voxels are there; copy the file again."
        )
    return np.frombuffer(payload, dtype=dtype).reshape(shape, order="F")


def _write_nifti(volume: Volume, path: Path) -> None:
    image = nib.Nifti1Image(volume.array, volume.affine)
    # Both forms, for readers that look at one only; a quaternion cannot hold shear, then the sform stands alone.
    image.set_sform(volume.affine, code=1)
    if _is_orthogonal(volume.affine):
        image.set_qform(volume.affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header.set_dim_info(slice=volume.acquisition_axis)
    nib.save(image, path)


def _is_orthogonal(affine: AffineArray) -> bool:
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.allclose(directions.T @ directions, np.eye(3), atol=1e-5))


# ------------------------------------------------------------------------------------------------------------- NRRD

# Multiplying RAS coordinates' first two components by these gives RAS from the named space.
_NRRD_SPACES: dict[str, tuple[float, float]] = {
    "left-posterior-superior": (-1.0, -1.0),
    "lps": (-1.0, -1.0),
    "right-anterior-superior": (1.0, 1.0),
    "ras": (1.0, 1.0),
    "left-anterior-superior": (-1.0, 1.0),
    "las": (-1.0, 1.0),
}
_NRRD_VALUE_KINDS = {"domain", "space"}


def read_nrrd_header(path: Path) -> Mapping[str, Any]:
    """Read the fields and the key/value pairs of an NRRD file's header.

    Raises:
        VolumeError: if it is no readable NRRD file.
    """
    try:
        with path.open("rb") as stream:
            header: dict[str, Any] = nrrd.read_header(stream)
        header["sizes"] = [int(size) for size in header["sizes"]]
    except (nrrd.NRRDError, OSError, ValueError, KeyError, TypeError, IndexError, StopIteration) as error:
        raise VolumeError(f"{path}: is no readable NRRD file ({error}); it may be truncated or damaged.") from error
    return header


def _open_nrrd(path: Path) -> _Source:
    header = read_nrrd_header(path)
    sizes: list[int] = header["sizes"]
    if "data file" in header or "datafile" in header:
        # A header that points elsewhere could make a reader open any file of the machine.
        raise VolumeError(f"{path}: keeps its voxels in another file; save header and voxels in one .nrrd file.")
    try:
        spatial = _nrrd_spatial_axes(path, header, sizes)
        shape = _checked_shape(path, [sizes[axis] for axis in spatial])
        affine = _checked_affine(path, _nrrd_affine(path, header, spatial))
    except VolumeError:
        raise
    except (ValueError, IndexError, TypeError) as error:  # fields that do not fit each other
        raise VolumeError(f"{path}: its NRRD header contradicts itself ({error}); repair the header.") from error

    def voxels() -> Array:
        try:
            with path.open("rb") as stream:
                array = nrrd.read_data(nrrd.read_header(stream), stream, str(path))
        except (nrrd.NRRDError, OSError, EOFError, ValueError, KeyError, zlib.error, MemoryError) as error:
            raise VolumeError(f"{path}: is truncated or damaged ({error}); copy the file again.") from error
        return cast(Array, array.reshape(shape, order="F"))

    return _Source(shape, affine, None, voxels)


def _nrrd_spatial_axes(path: Path, header: Mapping[str, Any], sizes: Sequence[int]) -> list[int]:
    """Return the three axes that span space; any other must have length one."""
    kinds = header.get("kinds") or ["domain"] * len(sizes)
    directions = header.get("space directions")
    spatial = [
        axis
        for axis in range(len(sizes))
        if str(kinds[axis]).lower() in _NRRD_VALUE_KINDS
        and (directions is None or (directions[axis] is not None and np.isfinite(directions[axis]).all()))
    ]
    if directions is None and len(spatial) > 3:
        spatial = spatial[:3]
    if len(spatial) != 3 or any(size != 1 for axis, size in enumerate(sizes) if axis not in spatial):
        raise VolumeError(
            f"{path}: has {len(sizes)} axes of sizes {tuple(sizes)}, {len(spatial)} of them in space; "
            "give one 3-D volume a file, of one value a voxel."
        )
    return spatial


def _nrrd_affine(path: Path, header: Mapping[str, Any], spatial: Sequence[int]) -> AffineArray:
    space = str(header.get("space", "left-posterior-superior")).lower()
    if space not in _NRRD_SPACES:
        raise VolumeError(f"{path}: uses the NRRD space {space!r}; save it in left-posterior-superior.")
    units = {str(unit).strip('"') for unit in header.get("space units", ())} - {"mm", "", "???", "nan", "none"}
    if units:
        raise VolumeError(f"{path}: measures space in {', '.join(sorted(units))}; save it in mm.")
    affine = np.eye(4)
    if "space directions" in header:
        for column, axis in enumerate(spatial):
            affine[:3, column] = header["space directions"][axis]
        affine[:3, 3] = header.get("space origin", np.zeros(3))
    elif "spacings" in header:
        affine[:3, :3] = np.diag([float(header["spacings"][axis]) for axis in spatial])
    else:
        raise VolumeError(f"{path}: says nothing of its spacing; save it with space directions and a space origin.")
    return np.diag([*_NRRD_SPACES[space], 1.0, 1.0]) @ affine


def _write_nrrd(volume: Volume, path: Path) -> None:
    affine = _LPS_TO_RAS @ volume.affine
    header = {
        "space": "left-posterior-superior",
        "kinds": ["domain"] * 3,
        "space directions": affine[:3, :3].T,
        "space origin": affine[:3, 3],
        "encoding": "gzip",
    }
    nrrd.write(str(path), volume.array, header, compression_level=4)


# ------------------------------------------------------------------------------------------------------------ DICOM


def _has_dicom_magic(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _open_dicom(path: Path) -> _Source:
    slices = _read_series(path)
    orientation = _common_orientation(path, slices)
    positions = np.array([_numbers(path, s, "ImagePositionPatient", 3) for s in slices])
    row_direction, column_direction = orientation
    heights = positions @ np.cross(row_direction, column_direction)
    order = np.argsort(heights, kind="stable")
    slices = [slices[int(i)] for i in order]
    step = _slice_step(path, slices, positions[order], heights[order], np.cross(row_direction, column_direction))

    first = slices[0]
    spacing = _numbers(path, first, "PixelSpacing", 2)
    affine = np.eye(4)
    # PixelSpacing is (between rows, between columns); moving along a row goes from column to column.
    affine[:3, 0] = row_direction * spacing[1]
    affine[:3, 1] = column_direction * spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[order[0]]
    shape = _checked_shape(path, (int(first.Columns), int(first.Rows), len(slices)))

    def voxels() -> Array:
        array = np.empty(shape, dtype=np.float32)
        for index, item in enumerate(slices):
            array[:, :, index] = _slice_pixels(path, item).T
        return array

    return _Source(shape, _checked_affine(path, _LPS_TO_RAS @ affine), 2, voxels)


def _read_series(path: Path) -> list[FileDataset]:
    """Read all DICOM images of a folder and check that they are slices of one series and one size."""
    slices = []
    for file in _visible_files(path):
        if not _has_dicom_magic(file):
            if file.suffix.lower() in {".dcm", ".dicom", ".ima"}:
                raise VolumeError(f"{file}: is no DICOM file, or truncated; copy the series again.")
            continue
        try:
            dataset = pydicom.dcmread(file)
        except Exception as error:  # pydicom raises many kinds on damaged files, none with a common base
            raise VolumeError(f"{file}: is truncated or damaged ({error}); copy the series again.") from error
        slices.append(dataset)
    if not slices:
        raise VolumeError(f"{path}: holds no DICOM images; give a folder of one DICOM series.")
    for name, what in (("SeriesInstanceUID", "series"), ("Rows", "numbers of rows"), ("Columns", "numbers of columns")):
        found = {str(s.get(name)) for s in slices}
        if len(found) > 1:
            raise VolumeError(f"{path}: holds {len(found)} different {what}; give a folder of one DICOM series.")
        if found == {"None"}:
            raise VolumeError(f"{path}: its DICOM files have no {name}; give a folder of one DICOM image series.")
    if any(int(s.get("NumberOfFrames") or 1) > 1 for s in slices):
        raise VolumeError(f"{path}: holds a multi-frame DICOM file; convert it to NIfTI, or to one file a slice.")
    if any(int(s.get("SamplesPerPixel") or 1) != 1 for s in slices):
        raise VolumeError(f"{path}: holds colour images; give a series of one value a pixel.")
    return slices


def _numbers(path: Path, item: Dataset, name: str, count: int) -> npt.NDArray[np.float64]:
    try:
        numbers = np.array([float(value) for value in item[name].value], dtype=np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise VolumeError(f"{path}: a slice has no usable {name}; give a series with its geometry.") from error
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise VolumeError(f"{path}: a slice has no usable {name}; give a series with its geometry.")
    return numbers


def _common_orientation(path: Path, slices: Sequence[FileDataset]) -> npt.NDArray[np.float64]:
    """Return the row and the column direction, ``(2, 3)`` unit vectors in LPS, that all slices share."""
    orientations = np.array([_numbers(path, s, "ImageOrientationPatient", 6) for s in slices])
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        raise VolumeError(f"{path}: its slices differ in orientation (a localizer?); give one parallel stack.")
    spacings = np.array([_numbers(path, s, "PixelSpacing", 2) for s in slices])
    if np.abs(spacings - spacings[0]).max() > 1e-3 * spacings[0].min():
        raise VolumeError(f"{path}: its slices differ in pixel spacing; give one stack of like slices.")
    directions = orientations[0].reshape(2, 3)
    lengths = np.linalg.norm(directions, axis=1)
    if np.abs(lengths - 1).max() > 1e-2 or abs(directions[0] @ directions[1]) > 1e-2:
        raise VolumeError(f"{path}: its ImageOrientationPatient is not two orthogonal unit vectors; repair the header.")
    return cast("npt.NDArray[np.float64]", directions / lengths[:, None])


def _slice_step(
    path: Path,
    slices: Sequence[FileDataset],
    positions: npt.NDArray[np.float64],
    heights: npt.NDArray[np.float64],
    normal: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return the vector from one slice to the next (LPS mm), from the sorted positions; refuse uneven stacks."""
    if len(slices) == 1:
        thickness = float(slices[0].get("SpacingBetweenSlices") or slices[0].get("SliceThickness") or 0)
        if thickness <= 0:
            raise VolumeError(f"{path}: holds one slice of unknown thickness; give the whole series.")
        return normal * thickness
    gaps = np.diff(heights)
    typical = float(np.median(gaps))
    if gaps.min() < 1e-3 or gaps.min() < 0.01 * typical:
        raise VolumeError(
            f"{path}: several slices lie at the same position (time points or echoes?); give one volume a folder."
        )
    step = cast("npt.NDArray[np.float64]", (positions[-1] - positions[0]) / (len(slices) - 1))
    expected = positions[0] + np.arange(len(slices))[:, None] * step
    tolerance = max(0.02, 0.02 * typical)
    if np.abs(gaps - typical).max() > tolerance or np.linalg.norm(positions - expected, axis=1).max() > tolerance:
        raise VolumeError(
            f"{path}: its {len(slices)} slices are unevenly spaced or not in line, "
            f"{gaps.min():.3f} to {gaps.max():.3f} mm apart; slices may be missing, copy the series again."
        )
    return step


def _slice_pixels(path: Path, item: FileDataset) -> npt.NDArray[np.float32]:
    """Return one slice, ``(rows, columns)``, rescaled."""
    name = Path(str(item.filename)).name
    try:
        pixels = item.pixel_array
    except Exception as error:  # pydicom and its decoders raise many kinds, none with a common base
        raise VolumeError(f"{path / name}: its pixels cannot be read ({error}); copy or decompress it.") from error
    slope, intercept = float(item.get("RescaleSlope", 1) or 1), float(item.get("RescaleIntercept", 0) or 0)
    return (pixels.astype(np.float64) * slope + intercept).astype(np.float32)


def _write_dicom(volume: Volume, folder: Path, name: str) -> None:
    affine = _LPS_TO_RAS @ volume.affine
    spacing = _spacing_mm(affine)
    directions = affine[:3, :3] / np.array(spacing)
    if abs(directions[:, 0] @ directions[:, 1]) > 1e-4:
        raise VolumeError(f"{folder}: DICOM cannot hold a volume whose in-plane axes are sheared; write .nii.gz.")
    normal = np.cross(directions[:, 0], directions[:, 1])
    stored, slope, intercept = _quantise(volume.array)
    # UIDs follow from the content: the same volume is the same series, however often it is written.
    digest = hashlib.sha256(stored.tobytes() + volume.affine.tobytes() + f"{name} {slope} {intercept}".encode())
    folder.mkdir()
    for index in range(volume.shape[2]):
        item = _slice_dataset(name, digest.hexdigest(), index)
        item.Rows, item.Columns = volume.shape[1], volume.shape[0]
        item.PixelSpacing = [_decimal(spacing[1]), _decimal(spacing[0])]
        item.SliceThickness = item.SpacingBetweenSlices = _decimal(abs(float(normal @ affine[:3, 2])))
        item.ImageOrientationPatient = [_decimal(x) for x in (*directions[:, 0], *directions[:, 1])]
        item.ImagePositionPatient = [_decimal(x) for x in affine[:3, 3] + index * affine[:3, 2]]
        item.PixelRepresentation = int(stored.dtype.kind == "i")
        item.RescaleSlope, item.RescaleIntercept = slope, intercept
        item.PixelData = stored[:, :, index].T.astype(stored.dtype.newbyteorder("<")).tobytes()
        item.save_as(folder / f"{index + 1:05d}.dcm", write_like_original=False)


def _slice_dataset(name: str, digest: str, index: int) -> FileDataset:
    """Return an MR image's header, all but its geometry and pixels."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[digest, "instance", str(index)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    item.is_little_endian, item.is_implicit_VR = True, False
    item.SOPClassUID, item.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    item.StudyInstanceUID = generate_uid(entropy_srcs=[digest, "study"])
    item.SeriesInstanceUID = generate_uid(entropy_srcs=[digest, "series"])
    item.FrameOfReferenceUID = generate_uid(entropy_srcs=[digest, "frame"])
    item.PatientID = item.PatientName = item.SeriesDescription = name[:64]
    item.PatientBirthDate = item.PatientSex = item.StudyDate = item.StudyTime = item.StudyID = ""
    item.AccessionNumber = item.ReferringPhysicianName = item.Manufacturer = item.PositionReferenceIndicator = ""
    item.Modality, item.ImageType = "MR", ["DERIVED", "SECONDARY", "OTHER"]
    item.ScanningSequence, item.SequenceVariant, item.ScanOptions, item.MRAcquisitionType = "RM", "NONE", "", "2D"
    item.EchoTime = item.RepetitionTime = item.EchoTrainLength = ""
    item.SeriesNumber, item.InstanceNumber = 1, index + 1
    item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
    item.BitsAllocated, item.BitsStored, item.HighBit = 16, 16, 15
    return item


def _decimal(value: float) -> DSfloat:
    """Return a number as a DICOM decimal string, of 16 characters at most."""
    return DSfloat(format_number_as_ds(float(value)))


def _quantise(array: Array) -> tuple[Array, DSfloat, DSfloat]:
    """Return 16-bit pixels, rescale slope and intercept.

    Whole numbers of a range under 65,536 are kept exactly; other values to half a 65,535th of their range.
    """
    values = array.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if (values == np.rint(values)).all() and high - low <= 65535 and max(abs(low), abs(high)) < 2**31:
        if low >= -32768 and high <= 32767:
            return values.astype(np.int16), DSfloat("1"), DSfloat("0")
        return (values - low).astype(np.uint16), DSfloat("1"), _decimal(low)
    slope, intercept = _decimal((high - low) / 65535 or 1.0), _decimal(low)
    pixels = np.rint((values - float(intercept)) / float(slope))
    return np.clip(pixels, 0, 65535).astype(np.uint16), slope, intercept


# ---------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write a file or a folder to; it becomes `path` on success, and nothing on failure.

    The temporary path has the same name, in a hidden folder beside `path`, so that whoever lists the folder never
    sees a half-written file. Missing parent folders are made. An existing file is replaced; an existing folder only
    if it is empty (OSError otherwise).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
    try:
        temporary = hidden / path.name
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


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
    if _file_suffix(path) is None:
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
    suffix = _file_suffix(path)
    if suffix is None and path.suffix:
        raise VolumeError(f"{path}: is of no known format; write .nii, .nii.gz, .nrrd or, without suffix, DICOM.")
    if suffix is None and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise VolumeError(f"{path}: exists already; give a new or empty folder for a DICOM series.")
    with atomic_write(path) as temporary:
        if suffix is None:
            _write_dicom(volume, temporary, path.name)
        elif suffix in NIFTI_SUFFIXES:
            _write_nifti(volume, temporary)
        else:
            _write_nrrd(volume, temporary)


# -------------------------------------------------------------------------------------------------- canonical frame


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


def to_native(array: Array, frame: CanonicalFrame, *, order: int) -> Array:
    """Bring an array from the canonical frame back to the native grid: the inverse of `to_canonical`.

    Args:
        array: shape ``(..., *frame.canonical_shape)``; leading axes (channels) are kept.
        frame: from `canonical_frame`.
        order: as in `to_canonical`.

    Returns:
        A new C-ordered array of shape ``(..., *frame.native_shape)``; the exact inverse where nothing is resampled.

    Raises:
        ValueError: if the array's last three axes are not the frame's canonical shape, or the order is neither 0
            nor 1.
    """
    _check_spatial(array, frame.canonical_shape, order)
    n0, n1, n2 = (frame.native_shape[axis] for axis in frame.permutation)
    resampled = _resample(array, (n0, n1, n2), order)
    view = np.flip(resampled, _flipped_axes(frame))
    leading = tuple(range(array.ndim - 3))
    inverse = np.argsort(frame.permutation).tolist()
    return np.ascontiguousarray(view.transpose(*leading, *(array.ndim - 3 + axis for axis in inverse)))


def _flipped_axes(frame: CanonicalFrame) -> tuple[int, ...]:
    return tuple(axis - 3 for axis, flip in enumerate(frame.flips) if flip)


def _check_spatial(array: Array, shape: tuple[int, int, int], order: int) -> None:
    if array.shape[-3:] != shape:
        raise ValueError(f"The array's last three axes must be {shape}, the whole shape is {array.shape}.")
    if order not in (0, 1):
        raise ValueError(f"The order of interpolation must be 0 (nearest) or 1 (linear), not {order}.")


def _resample(array: Array, shape: tuple[int, int, int], order: int) -> Array:
    """Resample the last three axes to a shape over the same field of view, one axis after the other; always a copy."""
    out = array if order == 0 else array.astype(np.result_type(array.dtype, np.float32), copy=False)
    # Shrinking axes first keeps what the later axes work on small.
    for axis in sorted(range(3), key=lambda a: shape[a] / array.shape[a - 3]):
        out = _resample_axis(out, axis - 3, shape[axis], order)
    return np.array(out, order="C", copy=True)


def _resample_axis(array: Array, axis: int, size: int, order: int) -> Array:
    """Resample one axis; voxel ``i`` of the result is centred at ``(i + 1/2) * old / new - 1/2`` of the old grid."""
    old = array.shape[axis]
    if size == old:
        return array
    if order == 0:
        # Whole-number arithmetic: no centre falls on the wrong side of a voxel's edge.
        return np.take(array, ((2 * np.arange(size) + 1) * old) // (2 * size), axis=axis)
    if old / size > SMOOTHING_RATIO:
        array = gaussian_filter1d(array, (old / size - 1) / 2, axis=axis, mode="nearest")
    centres = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
    below = np.minimum(centres.astype(np.intp), max(old - 2, 0))
    weight_shape = [1] * array.ndim
    weight_shape[axis] = size
    weight = (centres - below).astype(array.dtype).reshape(weight_shape)
    low = np.take(array, below, axis=axis)
    high = np.take(array, np.minimum(below + 1, old - 1), axis=axis)
    return cast(Array, low + (high - low) * weight)
