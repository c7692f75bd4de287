"""The check that every file passes on its way in: readable, of a size and a geometry that can be meant, its content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from segqc.volumes.appearance import appearance
from segqc.volumes.files import load_scan, open_labels, open_scan
from segqc.volumes.inputs import InputFile
from segqc.volumes.labelmaps import load_labels
from segqc.volumes.limits import ReadLimits
from segqc.volumes.volume import Grid, Volume

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class ScanContent:
    """What was found in a scan's file or folder.

    Attributes:
        sha256: of the content; see `content_sha256`.
        shape: voxels along each array axis.
        warnings: sentences about what was decided where the file contradicts itself.
        appearance: what the scan looks like, see `segqc.volumes.appearance`; None where nobody looked.
    """

    sha256: str
    shape: tuple[int, int, int]
    warnings: tuple[str, ...] = ()
    appearance: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class LabelContent:
    """What was found in a label map's file.

    Attributes:
        sha256: of the file's content.
        labels: the label map, uint8, on the scan's grid in the scan's voxel order, with the settings' values.
        is_plain: whether the file's own bytes, read by their values, give the same label map.
    """

    sha256: str
    labels: Volume
    is_plain: bool


def check_scan(
    path: str | os.PathLike[str], limits: ReadLimits | None = None, *, shown: str | None = None
) -> ScanContent:
    """Check that a file or a DICOM folder is a scan that can be used.

    Args:
        path: the file, or the folder of one DICOM series.
        limits: bounds on its size and on the time that reading it takes; None for the defaults.
        shown: how the user knows the file; messages name it so. None for the path.

    Raises:
        VolumeError: with one sentence that says which file, what is wrong and what to do.
    """
    file = InputFile(Path(path), limits, shown)
    source = open_scan(file)
    look = tuple(appearance(load_scan(file, source)).tolist())
    return ScanContent(_sha256(file), source.shape, source.find_warnings(), look)


def check_labels(
    path: str | os.PathLike[str],
    scan: Grid,
    values: Collection[int] | None = None,
    names: Mapping[str, int] | None = None,
    limits: ReadLimits | None = None,
    *,
    shown: str | None = None,
) -> LabelContent:
    """Check that a file is a label map of a scan, with values whose meaning is known.

    Args:
        path: the file.
        scan: where its scan lies.
        values: the label values allowed besides 0 (background); None allows all.
        names: the structures' names and label values; a file that names its segments is read by these.
        limits: bounds on its size and on the time that reading it takes; None for the defaults.
        shown: how the user knows the file; messages name it so. None for the path.

    Raises:
        VolumeError: with one sentence that says which file, what is wrong and what to do.
    """
    file = InputFile(Path(path), limits, shown)
    found = load_labels(file, open_labels(file), scan, values, names)
    return LabelContent(_sha256(file), found.volume, found.is_plain)


def _sha256(file: InputFile) -> str:
    try:
        return content_sha256(file.path)
    except OSError as error:
        raise file.error(f"cannot be read ({error.strerror}); try again.") from error


def content_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256, as 64 hexadecimal digits, of a file's content or of a DICOM folder's.

    A folder's covers the content of its visible files, sorted by name, and not their names.

    Raises:
        OSError: if a file cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        return _file_digest(path).hex()
    files = (file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith("."))
    return hashlib.sha256(b"".join(map(_file_digest, files))).hexdigest()


def _file_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.digest()
