"""NIfTI files."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import IO, Any, cast

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from segqc.volumes.volume import AffineArray, Array, Source, Volume, VolumeError, checked_affine, checked_shape

_NIFTI_UNIT_MM = {"unknown": 1.0, "mm": 1.0, "meter": 1e3, "micron": 1e-3}


def open_nifti(path: Path) -> Source:
    try:
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):
            raise VolumeError(f"{path}: is no single-file NIfTI image; convert it to NIfTI.")
        header = image.header
        shape = checked_shape(path, header.get_data_shape())
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

    return Source(shape, checked_affine(path, affine), acquisition_axis, voxels)


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


def write_nifti(volume: Volume, path: Path) -> None:
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
