"""NRRD files, with the segments that 3D Slicer names in them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import nrrd
import numpy as np
import numpy.typing as npt

from segqc.volumes.inputs import Compression, InputFile
from segqc.volumes.volume import (
    LPS_TO_RAS,
    AffineArray,
    Array,
    Segment,
    Source,
    Volume,
    VolumeError,
    checked_affine,
    checked_shape,
)

# Multiplying RAS coordinates' first two components by these gives RAS from the named space. ITK takes no space for LPS.
_SPACES: Final = {
    "left-posterior-superior": (-1.0, -1.0),
    "lps": (-1.0, -1.0),
    "right-anterior-superior": (1.0, 1.0),
    "ras": (1.0, 1.0),
    "left-anterior-superior": (-1.0, 1.0),
    "las": (-1.0, 1.0),
}
_TYPES: Final = {
    name: code
    for code, names in {
        "i1": ("signed char", "int8", "int8_t"),
        "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
        "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
        "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
        "i4": ("int", "signed int", "int32", "int32_t"),
        "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
        "i8": (
            "longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t",
        ),
        "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
        "f4": ("float",),
        "f8": ("double",),
    }.items()
    for name in names
}  # fmt: skip
_ENCODINGS: Final[Mapping[str, Compression]] = {
    "raw": "none", "gzip": "deflate", "gz": "deflate", "bzip2": "bzip2", "bz2": "bzip2",
}  # fmt: skip
_BZIP2_WARNING: Final = "is compressed by bzip2, which 3D Slicer does not read; save it with gzip to annotate it there."
_TEXT_ENCODINGS: Final = ("ascii", "text", "txt")
_BYTE_ORDERS: Final[Mapping[str, Literal["<", ">"]]] = {"little": "<", "big": ">"}
_MAX_AXES: Final = 16
_MAX_HEADER_BYTES: Final = 1 << 20
_SEGMENT_KEY: Final = re.compile(r"Segment(\d{1,4})_(ID|Name|LabelValue|Layer)")


@dataclass(frozen=True)
class _Header:
    """A header's fields, named in lower case without blanks, and its key/value pairs; all text, and its length."""

    fields: Mapping[str, str]
    pairs: Mapping[str, str]
    size: int


def read_nrrd_header(path: Path) -> Mapping[str, str]:
    """Read the fields and the key/value pairs of an NRRD file's header, as text.

    Raises:
        VolumeError: if it is no readable NRRD file.
    """
    header = _read_header(InputFile(path))
    return {**header.fields, **header.pairs}


def open_nrrd(file: InputFile) -> Source:
    """Open an NRRD file that holds its voxels itself.

    Raises:
        VolumeError: if its header cannot be used.
    """
    header = _read_header(file)
    if "datafile" in header.fields:
        # A header that points elsewhere could make a reader open any file of the machine.
        raise file.error("keeps its voxels in another file; save header and voxels in one .nrrd file.")
    try:
        return _source(file, header)
    except VolumeError:
        raise
    except KeyError as error:
        raise file.error(f"lacks the field {error} in its NRRD header; repair the header.") from error
    except (ValueError, OverflowError) as error:
        raise file.error(
            f"its NRRD header is incomplete or contradicts itself ({error}); repair the header."
        ) from error


def _read_header(file: InputFile) -> _Header:
    with file.open() as stream:
        raw = stream.read(_MAX_HEADER_BYTES)
    if not re.match(rb"NRRD\d{4}\r?\n", raw):
        raise file.error("is no readable NRRD file; it may be truncated or damaged, or of another format.")
    end = re.search(rb"\n\r?\n", raw)
    if end is None and len(raw) == _MAX_HEADER_BYTES:
        raise file.error(f"its NRRD header is longer than {_MAX_HEADER_BYTES} bytes; repair the header.")
    text = raw if end is None else raw[: end.start()]
    fields: dict[str, str] = {}
    pairs: dict[str, str] = {}
    for line in text.decode("utf-8", "replace").strip("\r\n").split("\n")[1:]:
        if line.startswith("#"):
            continue
        found = re.match(r"(.*?)(:=|: |:$)(.*)", line.rstrip())
        if found is None:
            raise file.error(f"has the line {line[:40]!r} in its NRRD header; repair the header.")
        name, separator, value = found.groups()
        if separator == ":=":
            pairs[name] = _unescaped(value.strip())
        elif (key := "".join(name.lower().split())) in fields:
            raise file.error(f"has the field {name!r} twice in its NRRD header; repair the header.")
        else:
            fields[key] = value.strip()
    return _Header(fields, pairs, len(raw) if end is None else end.end())


def _unescaped(value: str) -> str:
    """A value as it was given: writers escape backslashes, and ends of lines as backslash and n."""
    return re.sub(r"\\([\\n])", lambda found: "\n" if found[1] == "n" else "\\", value)


def _source(file: InputFile, header: _Header) -> Source:
    fields = header.fields
    sizes = [int(size) for size in fields["sizes"].split()]
    if len(sizes) != int(fields["dimension"]) or len(sizes) > _MAX_AXES or min(sizes) < 1:
        raise ValueError(f"dimension {fields['dimension']}, sizes {fields['sizes'][:80]}")
    file.check_size(sizes)
    axes = _Axes.of(fields, sizes)
    segments = _segments(header.pairs)
    beside = [axis for axis in range(len(sizes)) if axis not in axes.spatial]
    layers = [axis for axis in beside if sizes[axis] > 1]
    if len(axes.spatial) != 3 or len(layers) > (segments is not None):
        raise file.error(
            f"has {len(sizes)} axes of sizes {tuple(sizes)}, {len(axes.spatial)} of them in space; "
            "give one 3-D volume a file, of one value a voxel."
        )
    if segments is not None and layers and sizes[layers[0]] > len(segments):
        raise file.error(
            f"has {sizes[layers[0]]} layers for {len(segments)} segments; save the segmentation again, and its header "
            "with it."
        )
    shape = checked_shape(file.shown, [sizes[axis] for axis in axes.spatial])
    affine = checked_affine(file.shown, _affine(file, fields, axes))
    dtype = _voxel_type(file, fields)
    skips = (int(fields.get("lineskip", 0)), int(fields.get("byteskip", 0)))

    def voxels() -> Array:
        array = _read_voxels(file, header, math.prod(sizes), dtype, skips).reshape(sizes, order="F")
        if segments is None:
            return array.reshape(shape, order="F")
        # Sizes of one are dropped, and the layers come first.
        return array.transpose(*beside, *axes.spatial).reshape(-1, *shape)

    is_bzip2 = _ENCODINGS.get(fields["encoding"].lower()) == "bzip2"
    warnings = (_BZIP2_WARNING,) if is_bzip2 else ()
    return Source(
        shape, affine, None, voxels, segments=segments, find_warnings=lambda: warnings, is_for_itk=not is_bzip2
    )


# ---------------------------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True)
class _Axes:
    """The axes that span space, and the direction of each of all axes, NaN where it has none."""

    spatial: tuple[int, ...]
    directions: npt.NDArray[np.float64] | None

    @staticmethod
    def of(fields: Mapping[str, str], sizes: Sequence[int]) -> _Axes:
        kinds = [kind.lower() for kind in fields.get("kinds", "").split()] or ["???"] * len(sizes)
        if len(kinds) != len(sizes):
            raise ValueError(f"{len(kinds)} kinds of {len(sizes)} axes")
        directions = _vectors(fields["spacedirections"], len(sizes)) if "spacedirections" in fields else None
        spatial = tuple(
            axis
            for axis, kind in enumerate(kinds)
            if kind in ("domain", "space", "none", "???")
            and (directions is None or np.isfinite(directions[axis]).all())
        )
        return _Axes(spatial, directions)


def _vectors(text: str, count: int) -> npt.NDArray[np.float64]:
    words = re.findall(r"none|\([^()]*\)", text.lower())
    if re.sub(r"none|\([^()]*\)|\s", "", text.lower()) or len(words) != count:
        raise ValueError(f"{count} axes, and the directions {text[:80]}")
    return np.array([[math.nan] * 3 if word == "none" else _numbers(word.strip("()"), ",", 3) for word in words])


def _numbers(text: str, separator: str | None, count: int) -> list[float]:
    numbers = [float(word) for word in text.split(separator)]
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} numbers instead of {count}: {text[:80]}")
    return numbers


def _affine(file: InputFile, fields: Mapping[str, str], axes: _Axes) -> AffineArray:
    space = fields.get("space", "left-posterior-superior").lower()
    if space not in _SPACES:
        raise file.error(f"uses the NRRD space {space[:80]!r}; save it in left-posterior-superior.")
    units = {unit for name in ("spaceunits", "units") for unit in re.findall(r'"([^"]*)"', fields.get(name, ""))}
    foreign = sorted(unit for unit in units if unit.lower() not in {"mm", "millimeter", "", "???", "nan", "none"})
    if foreign:
        raise file.error(f"measures space in {', '.join(foreign)[:80]}; save it in mm.")
    spacings = fields.get("spacings")
    affine = np.eye(4)
    if axes.directions is not None and spacings is None:
        affine[:3, :3] = axes.directions[list(axes.spatial)].T
        if "spaceorigin" in fields:
            origin = np.array(_numbers(fields["spaceorigin"].strip("() "), ",", 3))
            affine[:3, 3] = 0.0 if np.isnan(origin).all() else origin
    elif spacings is not None and not any(name in fields for name in ("space", "spacedimension", "spacedirections")):
        edges = np.array(_numbers(spacings, None, len(fields["sizes"].split())))[list(axes.spatial)]
        affine[:3, :3] = np.diag(edges)
        if any(math.isfinite(float(word)) for word in fields.get("axismins", "").split()):
            raise file.error("states its place by axis mins; save it with space directions and a space origin.")
    elif spacings is not None:
        raise file.error("states both spacings and a space; save it with space directions and a space origin.")
    else:
        raise file.error("says nothing of its spacing; save it with space directions and a space origin.")
    affine[:2] *= np.array(_SPACES[space])[:, None]
    return affine


# ------------------------------------------------------------------------------------------------------------ voxels


def _voxel_type(file: InputFile, fields: Mapping[str, str]) -> np.dtype[Any]:
    name, encoding = fields["type"].lower(), fields["encoding"].lower()
    if name not in _TYPES:
        raise file.error(f"holds voxels of the type {name[:40]!r}; give one real number a voxel.")
    if encoding not in (*_ENCODINGS, *_TEXT_ENCODINGS):
        raise file.error(f"has the encoding {encoding[:40]!r}; save it as raw or gzip.")
    dtype = np.dtype(_TYPES[name])
    if dtype.itemsize == 1 or encoding in _TEXT_ENCODINGS:
        return dtype
    order = fields["endian"].lower()
    if order not in _BYTE_ORDERS:
        raise ValueError(f"endian {order[:40]}")
    return dtype.newbyteorder(_BYTE_ORDERS[order])


def _read_voxels(file: InputFile, header: _Header, count: int, dtype: np.dtype[Any], skips: tuple[int, int]) -> Array:
    encoding, (lines, bytes_) = header.fields["encoding"].lower(), skips
    with file.open(start=header.size) as stream:
        start = header.size + stream.skip_lines(lines, "line skip")
        if encoding in _TEXT_ENCODINGS:
            stream.skip(bytes_, "byte skip")
            return stream.numbers(count)
    with file.open(_ENCODINGS[encoding], start) as stream:
        if bytes_ == -1:
            return stream.last_voxels(count * dtype.itemsize, "byte skip").view(dtype)
        stream.skip(bytes_, "byte skip")
        return stream.voxels(count * dtype.itemsize).view(dtype)


# ---------------------------------------------------------------------------------------------------------- segments


def _segments(pairs: Mapping[str, str]) -> tuple[Segment, ...] | None:
    """The segments that 3D Slicer names in a header; None where it names none.

    Old versions wrote neither value nor layer: the n-th segment is 1 in the n-th layer.
    """
    found: dict[int, dict[str, str]] = {}
    for key, value in pairs.items():
        match = _SEGMENT_KEY.fullmatch(key)
        if match is not None:
            found.setdefault(int(match.group(1)), {})[match.group(2)] = value
    if not found:
        return None
    return tuple(
        Segment(
            name=segment.get("Name") or segment.get("ID") or f"segment {number}",
            value=int(segment.get("LabelValue", 1)),
            layer=int(segment.get("Layer", number if "LabelValue" not in segment else 0)),
        )
        for number, segment in sorted(found.items())
    )


# ----------------------------------------------------------------------------------------------------------- writing


def write_nrrd(volume: Volume, path: Path) -> None:
    """Write a volume, compressed, in left-posterior-superior coordinates."""
    affine = LPS_TO_RAS @ volume.affine
    header = {
        "space": "left-posterior-superior",
        "kinds": ["domain"] * 3,
        "space directions": affine[:3, :3].T,
        "space origin": affine[:3, 3],
        "encoding": "gzip",
    }
    nrrd.write(str(path), volume.array, header, compression_level=4)
