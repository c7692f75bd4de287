"""NRRD files."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import nrrd
import numpy as np

from segqc.volumes.volume import (
    LPS_TO_RAS,
    AffineArray,
    Array,
    Source,
    Volume,
    VolumeError,
    checked_affine,
    checked_shape,
)

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


def open_nrrd(path: Path) -> Source:
    header = read_nrrd_header(path)
    sizes: list[int] = header["sizes"]
    if "data file" in header or "datafile" in header:
        # A header that points elsewhere could make a reader open any file of the machine.
        raise VolumeError(f"{path}: keeps its voxels in another file; save header and voxels in one .nrrd file.")
    try:
        spatial = _nrrd_spatial_axes(path, header, sizes)
        shape = checked_shape(path, [sizes[axis] for axis in spatial])
        affine = checked_affine(path, _nrrd_affine(path, header, spatial))
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

    return Source(shape, affine, None, voxels)


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


def write_nrrd(volume: Volume, path: Path) -> None:
    affine = LPS_TO_RAS @ volume.affine
    header = {
        "space": "left-posterior-superior",
        "kinds": ["domain"] * 3,
        "space directions": affine[:3, :3].T,
        "space origin": affine[:3, 3],
        "encoding": "gzip",
    }
    nrrd.write(str(path), volume.array, header, compression_level=4)
