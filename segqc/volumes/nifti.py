"""NIfTI files, placed in the world by ITK's rules: those of 3D Slicer, ITK-SNAP and OHIF's converters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.nifti1 import header_dtype as nifti1_dtype
from nibabel.nifti2 import header_dtype as nifti2_dtype
from nibabel.spatialimages import HeaderDataError

from segqc.volumes.inputs import MAX_HEADER_BYTES, Compression, InputFile
from segqc.volumes.volume import (
    LPS_TO_RAS,
    AffineArray,
    Array,
    Source,
    Volume,
    VolumeError,
    affine_finding,
    checked_affine,
    checked_shape,
    distance_of_grids,
    grid_tolerance,
    nearest_orthogonal,
)

_UNIT_MM: Final = {1: 1e3, 2: 1.0, 3: 1e-3}  # metres, millimetres, micrometres; all else counts as millimetres
_DTYPES: Final = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_SCANNER_CODE: Final = 1
_NIFTI2_WARNING: Final = "is NIfTI-2, which 3D Slicer does not read; save it as NIfTI-1 to annotate it there."


def open_nifti(file: InputFile, *, is_label: bool = False) -> Source:
    """Open a NIfTI file, ``.nii`` or ``.nii.gz``.

    Args:
        file: the file.
        is_label: whether it is a label map; it may lie on the sheared grid that its scan states, too.

    Raises:
        VolumeError: if its header cannot be used, or for a scan, if ITK does not read it.
    """
    compression = _compression(file)
    header = _read_header(file, compression)
    forms = _read_forms(header.fields)
    affine = forms.affine(file, allow_shear=is_label)
    dtype = header.voxel_type
    slope, intercept = header.slope, header.intercept

    def voxels() -> Array:
        size = math.prod(header.shape) * dtype.itemsize
        with file.open(compression) as stream:
            stream.skip(header.offset, "vox_offset")
            raw = stream.voxels(size).view(dtype).reshape(header.shape, order="F")
            if slope == 1 and intercept == 0:
                return raw
            # Integers of 16 bits and less are exact in float32; wider ones need float64 until they are scaled.
            scaled: Array = raw.astype(np.float32 if dtype.itemsize <= 2 else np.float64)
            with np.errstate(over="ignore", invalid="ignore"):
                scaled *= slope
                scaled += intercept
            return scaled

    is_nifti1 = header.fields.dtype.itemsize == nifti1_dtype.itemsize
    is_scaled = dtype.kind in "iu" and (slope != 1 or intercept != 0)
    return Source(
        header.shape,
        affine,
        header.acquisition_axis,
        voxels,
        lambda: forms.alternatives(affine),
        step=abs(slope) if is_scaled else 0.0,
        find_warnings=lambda: forms.warnings(affine, header.shape) + (() if is_nifti1 else (_NIFTI2_WARNING,)),
        is_for_itk=is_nifti1,
    )


def _compression(file: InputFile) -> Compression:
    """Files named .nii.gz need not be compressed; those named .nii must not."""
    if not file.path.name.lower().endswith(".gz"):
        return "none"
    with file.open() as stream:
        return "deflate" if stream.read(2) == b"\x1f\x8b" else "none"


@dataclass(frozen=True)
class _Header:
    """What is used of a header.

    Attributes:
        fields: all of it, one record of a structured type.
        shape: voxels along each axis.
        voxel_type: of the stored numbers.
        offset: bytes before the voxels.
        slope: stored numbers are multiplied by it.
        intercept: added to them.
        acquisition_axis: the axis that slices were acquired along.
    """

    fields: npt.NDArray[np.void]
    shape: tuple[int, int, int]
    voxel_type: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    acquisition_axis: int | None


def _read_header(file: InputFile, compression: Compression) -> _Header:
    with file.open(compression) as stream:
        raw = stream.read(nifti2_dtype.itemsize)
    fields, order = _fields(file, raw)
    dimensions = int(fields["dim"][0])
    if not 1 <= dimensions <= 7:
        raise file.error(f"has {dimensions} dimensions by its header, which is damaged; copy the file again.")
    sizes = [int(size) for size in fields["dim"][1 : dimensions + 1]]
    # Some converters state further axes of size 0; niftilib, and so ITK, takes them for 1.
    shape = checked_shape(file.shown, [*sizes[:3], *(max(size, 1) for size in sizes[3:])])
    file.check_size(shape)
    code = int(fields["datatype"])
    if code not in _DTYPES:
        raise file.error(
            f"holds voxels of data type {code} (colour, complex, single bits or 128 bits); give one real number a "
            "voxel, of 8 to 64 bits."
        )
    offset = float(fields["vox_offset"])
    if not 0 <= offset <= MAX_HEADER_BYTES:
        raise file.error(
            f"has the vox_offset {offset:g}, and its header may take from 0 to {MAX_HEADER_BYTES} bytes; repair it."
        )
    slope, intercept = _scaling(file, fields)
    slice_axis = int(fields["dim_info"]) >> 4 & 3
    return _Header(
        fields=fields,
        shape=shape,
        voxel_type=np.dtype(order + _DTYPES[code]),
        offset=max(int(offset), fields.dtype.itemsize),
        slope=slope,
        intercept=intercept,
        acquisition_axis=slice_axis - 1 if slice_axis else None,
    )


def _fields(file: InputFile, raw: bytes) -> tuple[npt.NDArray[np.void], Literal["<", ">"]]:
    """The header's record, of NIfTI-1 or NIfTI-2, and its byte order."""
    orders: tuple[Literal["<", ">"], ...] = ("<", ">")
    for layout, magic in ((nifti1_dtype, b"n+1"), (nifti2_dtype, b"n+2")):
        for order in orders:
            if len(raw) >= layout.itemsize:
                fields: npt.NDArray[np.void] = np.frombuffer(raw, layout.newbyteorder(order), count=1)[0]
                if fields["sizeof_hdr"] == layout.itemsize and bytes(fields["magic"]).startswith(magic):
                    return fields, order
    raise file.error("is no readable single-file NIfTI image; it may be truncated or damaged, or of another format.")


def _scaling(file: InputFile, fields: npt.NDArray[np.void]) -> tuple[float, float]:
    """Slope and intercept; a slope of zero or NaN means that nothing is scaled."""
    slope, intercept = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0
    if math.isinf(slope) or not math.isfinite(intercept):
        raise file.error(f"scales its voxels by {slope:g} and adds {intercept:g}; repair the header.")
    return slope, intercept


# ---------------------------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True)
class _Forms:
    """What a header says of the voxels' place, in millimetres.

    Attributes:
        qform: the matrix of the quaternion, where its code says that there is one.
        sform: the matrix of the srow fields, where its code says that there is one.
        sform_is_scanner: whether its code says that these are the scanner's coordinates.
        spacing: of the pixdim field; a negative number turns an axis round.
        find_nibabel: what nibabel takes the file's affine and its qform for.
    """

    qform: AffineArray | None
    sform: AffineArray | None
    sform_is_scanner: bool
    spacing: npt.NDArray[np.float64]
    find_nibabel: Callable[[], tuple[AffineArray, ...]]

    def chosen(self) -> AffineArray | None:
        """The matrix that ITK takes directions and origin from; None where it finds none.

        The sform, if its axes are orthogonal and it alone is there, or is the scanner's, or is much the same as the
        qform; else the qform.
        """
        if self.sform is None or not _is_orthogonal(self.sform):
            return self.qform
        if self.qform is None or self.sform_is_scanner or np.allclose(self.sform, self.qform, rtol=0, atol=1e-4):
            return self.sform
        return self.qform

    def affine(self, file: InputFile, *, allow_shear: bool) -> AffineArray:
        """The affine as ITK has it: directions and origin of a form, and the spacing of pixdim.

        Raises:
            VolumeError: if ITK finds none, but for a sheared sform where that is allowed.
        """
        if self.sform is not None and np.isnan(self.sform).any():  # ITK passes them on
            raise file.error("has NaN in its sform; repair the header.")
        matrix = self.chosen()
        if matrix is None and self.sform is not None:
            sheared = checked_affine(file.shown, self.sform)
            if allow_shear:
                return sheared
            raise file.error(
                "has a sheared sform and no qform, which 3D Slicer cannot show; resample it to orthogonal axes."
            )
        if self._are_mirrored():
            raise file.error(
                "its sform and qform differ in the direction of axes only, and programs take the one or the other; "
                "repair the header."
            )
        affine = np.array(LPS_TO_RAS if matrix is None else matrix)
        with np.errstate(invalid="ignore", divide="ignore"):
            affine[:3, :3] *= self.spacing / np.linalg.norm(affine[:3, :3], axis=0)
        return checked_affine(file.shown, affine)

    def _are_mirrored(self) -> bool:
        """Whether ITK's choice is left to rounding: it compares singular vectors, whose signs are arbitrary."""
        if self.sform is None or self.qform is None or self.sform_is_scanner or not _is_orthogonal(self.sform):
            return False
        similar = np.allclose(self.sform[:3, 3], self.qform[:3, 3], rtol=0, atol=2e-4)
        cosines = np.linalg.solve(self.qform[:3, :3], self.sform[:3, :3])
        return bool(
            similar
            and np.allclose(np.abs(cosines), np.eye(3), rtol=0, atol=1e-3)
            and not np.allclose(cosines, np.eye(3), rtol=0, atol=1e-3)
        )

    def alternatives(self, affine: AffineArray) -> tuple[AffineArray, ...]:
        """The other usable matrices that programs may take for the affine."""
        stated = [matrix for matrix in (self.sform, self.qform) if matrix is not None]
        usable = [matrix for matrix in (*stated, *self.find_nibabel()) if affine_finding(matrix) is None]
        return tuple(matrix for matrix in usable if not np.array_equal(matrix, affine))

    def warnings(self, affine: AffineArray, shape: tuple[int, int, int]) -> tuple[str, ...]:
        """Say what is used where the header contradicts itself or is silent."""
        matrix, tolerance = self.chosen(), grid_tolerance(affine, shape)
        if matrix is None and self.sform is not None:
            return ()
        if matrix is None:
            return (
                "says nothing of its orientation (qform and sform have the code 0); its axes are taken to run to the "
                "left, posterior and superior, as 3D Slicer takes them.",
            )
        name, found = "sform" if matrix is self.sform else "qform", []
        if self.sform is not None and self.qform is not None:
            apart = distance_of_grids(self.sform, self.qform, shape)
            if not apart <= tolerance:
                found.append(
                    f"its sform and qform are up to {apart:.3g} mm apart; the {name} is used, as in 3D Slicer."
                )
        if not distance_of_grids(affine, matrix, shape) <= tolerance:
            spacing = " x ".join(f"{abs(edge):.4g}" for edge in self.spacing)
            found.append(f"its voxel size contradicts its {name}; {spacing} mm is used, as in 3D Slicer.")
        return tuple(found)


def _read_forms(fields: npt.NDArray[np.void]) -> _Forms:
    unit_mm = _UNIT_MM.get(int(fields["xyzt_units"]) & 7, 1.0)
    unit = np.array([unit_mm] * 3 + [1.0])[:, None]
    pixdim = np.asarray(fields["pixdim"], dtype=np.float64)
    spacing = np.where(np.isfinite(pixdim[1:4]) & (pixdim[1:4] != 0), pixdim[1:4], 1.0)
    sform = np.eye(4)
    sform[:3] = [fields["srow_x"], fields["srow_y"], fields["srow_z"]]
    return _Forms(
        qform=unit * _qform(fields, spacing) if fields["qform_code"] > 0 else None,
        sform=unit * sform if fields["sform_code"] > 0 else None,
        sform_is_scanner=bool(fields["sform_code"] == _SCANNER_CODE),
        spacing=spacing * unit[0],
        find_nibabel=lambda: tuple(
            # nibabel knows no units: whoever takes over its affine may leave the unit behind
            factor * matrix
            for matrix in _nibabel_matrices(fields)
            for factor in ((unit,) if unit_mm == 1 else (unit, np.ones((4, 1))))
        ),
    )


def _qform(fields: npt.NDArray[np.void], spacing: npt.NDArray[np.float64]) -> AffineArray:
    """The matrix of a quaternion, rounded where niftilib (and so ITK) rounds it."""
    names = ("quatern_b", "quatern_c", "quatern_d")
    vector = np.array([float(fields[name]) if np.isfinite(fields[name]) else 0.0 for name in names])
    square = float(vector @ vector)
    scalar = 0.0
    if 1 - square < 1e-7:
        vector /= math.sqrt(square)
    else:
        scalar = math.sqrt(1 - square)
    b, c, d = vector
    a = scalar
    rotation = np.array([
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
    ])  # fmt: skip
    scale = np.where(spacing > 0, spacing, 1.0)
    if fields["pixdim"][0] < 0:
        scale[2] = -scale[2]
    offsets = np.array([fields["qoffset_x"], fields["qoffset_y"], fields["qoffset_z"]], dtype=np.float64)
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * scale
    matrix[:3, 3] = np.where(np.isfinite(offsets), offsets, 0.0)
    return matrix


def _nibabel_matrices(fields: npt.NDArray[np.void]) -> tuple[AffineArray, ...]:
    kind = nib.Nifti2Header if fields.dtype.itemsize == nifti2_dtype.itemsize else nib.Nifti1Header
    try:
        header = kind(fields.tobytes(), check=False)  # type: ignore[no-untyped-call]
        qform = header.get_qform() if fields["qform_code"] > 0 else header.get_base_affine()
        return (np.array(header.get_best_affine(), np.float64), np.array(qform, np.float64))
    except (HeaderDataError, ValueError, OverflowError):  # what nibabel cannot read is no grid of its users
        return ()


def _is_orthogonal(matrix: AffineArray) -> bool:
    """Whether a matrix has three axes that ITK takes for orthogonal."""
    if affine_finding(matrix) is not None:
        return False
    directions = matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0)
    return bool(np.abs(directions @ directions.T - np.eye(3)).max() <= 1e-4)


# ----------------------------------------------------------------------------------------------------------- writing


def write_nifti(volume: Volume, path: Path, target: Path) -> None:
    """Write a volume, on its way to `target`, so that ITK and nibabel read it at the same place.

    Both forms are written: ITK takes the sform where its axes are orthogonal but for single precision, else the qform.

    Raises:
        VolumeError: if the axes are sheared.
    """
    sheared = distance_of_grids(volume.affine, nearest_orthogonal(volume.affine), volume.shape)
    if sheared > grid_tolerance(volume.affine, volume.shape):
        raise VolumeError(f"{target}: ITK reads no NIfTI file whose axes are sheared; resample it to orthogonal axes.")
    image = nib.Nifti1Image(volume.array, volume.affine)
    image.set_sform(volume.affine, code=1)
    image.set_qform(volume.affine, code=1, strip_shears=True)
    image.header.set_xyzt_units("mm")
    image.header.set_dim_info(slice=volume.acquisition_axis)
    nib.save(image, path)
