"""MetaImage files (``.mha``), as ITK reads and writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np

from segqc.volumes.inputs import InputFile
from segqc.volumes.volume import LPS_TO_RAS, AffineArray, Array, Source, VolumeError, checked_affine, checked_shape

_TYPES: Final = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
_MAX_HEADER_BYTES: Final = 1 << 20
_ONLY: Final = {"ObjectType": "Image", "BinaryData": "True", "ElementNumberOfChannels": "1", "HeaderSize": "0"}


def open_metaimage(file: InputFile) -> Source:
    """Open a MetaImage file that holds its voxels itself.

    Raises:
        VolumeError: if its header cannot be used.
    """
    fields, start = _read_header(file)
    try:
        return _source(file, fields, start)
    except VolumeError:
        raise
    except KeyError as error:
        raise file.error(f"lacks the field {error} in its MetaImage header; save the file again.") from error
    except (ValueError, OverflowError) as error:
        raise file.error(
            f"its MetaImage header is incomplete or contradicts itself ({error}); save the file again."
        ) from error


def _read_header(file: InputFile) -> tuple[Mapping[str, str], int]:
    """Return the header's fields, and where the voxels begin."""
    with file.open() as stream:
        raw = stream.read(_MAX_HEADER_BYTES)
    fields: dict[str, str] = {}
    start = 0
    while (end := raw.find(b"\n", start)) >= 0:
        name, separator, value = raw[start:end].decode("utf-8", "replace").partition("=")
        start = end + 1
        if not separator:
            break
        fields[name.strip()] = value.strip()
        if name.strip() == "ElementDataFile":
            if fields["ElementDataFile"].upper() != "LOCAL":
                # A header that points elsewhere could make a reader open any file of the machine.
                raise file.error("keeps its voxels in another file; save header and voxels in one .mha file.")
            return fields, start
    raise file.error("is no readable MetaImage file; it may be truncated or damaged, or of another format.")


def _source(file: InputFile, fields: Mapping[str, str], start: int) -> Source:
    for name, only in _ONLY.items():
        if fields.get(name, only).lower() != only.lower():
            raise file.error(f"has {name} = {fields[name][:40]}; save it as one binary image of one number a voxel.")
    sizes = [int(number) for number in _numbers(file, fields, "DimSize")]
    shape = checked_shape(file.shown, sizes)
    file.check_size(shape)
    if fields["ElementType"] not in _TYPES:
        raise file.error(f"holds voxels of the type {fields['ElementType'][:40]}; give one real number a voxel.")
    is_big = _flag(fields, "BinaryDataByteOrderMSB", "ElementByteOrderMSB")
    dtype = np.dtype(_TYPES[fields["ElementType"]]).newbyteorder(">" if is_big else "<")
    is_compressed = _flag(fields, "CompressedData")

    # One row of the matrix is one axis's direction, in left-posterior-superior coordinates whatever else is said.
    affine = np.eye(4)
    directions = _numbers(file, fields, "TransformMatrix", "Rotation", "Orientation", default=np.eye(3).ravel())
    spacing = _numbers(file, fields, "ElementSpacing", "ElementSize")
    origin = _numbers(file, fields, "Offset", "Position", "Origin", default=np.zeros(3))
    if (len(directions), len(spacing), len(origin), len(sizes)) != (9, 3, 3, 3):
        raise file.error("has a geometry of other than three axes; give one 3-D volume a file.")
    affine[:3, :3] = directions.reshape(3, 3).T * spacing
    affine[:3, 3] = origin

    def voxels() -> Array:
        with file.open("deflate" if is_compressed else "none", start) as stream:
            return stream.voxels(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape, order="F")

    return Source(shape, checked_affine(file.shown, LPS_TO_RAS @ affine), None, voxels)


def _flag(fields: Mapping[str, str], *names: str) -> bool:
    return any(fields.get(name, "False").lower() in ("true", "1") for name in names)


def _numbers(
    file: InputFile, fields: Mapping[str, str], *names: str, default: AffineArray | None = None
) -> AffineArray:
    """The numbers of the first of the fields that is there."""
    text = next((fields[name] for name in names if name in fields), None)
    if text is None:
        if default is None:
            raise KeyError(names[0])
        return default
    try:
        return np.array(text.split(), dtype=np.float64)
    except ValueError as error:
        raise file.error(f"has {names[0]} = {text[:40]}; repair the header.") from error
