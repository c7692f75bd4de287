"""File names: which are scans, which are label maps, and what is left of a name without its suffix."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from segqc.text import nfc
from segqc.volumes.dicom_headers import is_dicom

NIFTI_SUFFIXES: Final = (".nii.gz", ".nii")
NRRD_SUFFIXES: Final = (".nrrd",)
SCAN_SUFFIXES: Final = NIFTI_SUFFIXES + NRRD_SUFFIXES
"""What scan files may end in, in any case; a ``.seg.nrrd`` is a segmentation and never a scan."""
LABEL_SUFFIXES: Final = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".mha")
"""What label maps may end in, in any case."""


def as_spelled(path: Path) -> Path:
    """The path of a file by the name that it has on the disk, where it is of another Unicode form; see `text.nfc`.

    A path whose file is there stays as it is, and so does one without such a file.
    """
    if path.name.isascii() or os.path.lexists(path):
        return path
    try:
        names = os.listdir(path.parent)
    except (OSError, ValueError):
        return path
    wanted = nfc(path.name)
    return path.with_name(min((name for name in names if nfc(name) == wanted), default=path.name))


def scan_suffix(name: str) -> str | None:
    """Return the suffix of a scan's file name, in lower case, or None where no scan ends so."""
    return None if name.lower().endswith(".seg.nrrd") else _suffix(name, SCAN_SUFFIXES)


def label_suffix(name: str) -> str | None:
    """Return the suffix of a label map's file name, in lower case, or None where no label map ends so."""
    return _suffix(name, LABEL_SUFFIXES)


def _suffix(name: str, suffixes: tuple[str, ...]) -> str | None:
    """Return the longest of the suffixes that the name ends in, with something before it."""
    lower = name.lower()
    found = max((suffix for suffix in suffixes if lower.endswith(suffix)), key=len, default=None)
    return None if found == lower else found


def is_scan_path(path: str | os.PathLike[str]) -> bool:
    """Tell whether the path names something `read_scan` may read, by its suffix or, for a folder, by its DICOM files.

    Hidden names (a leading dot) are never scans.
    """
    path = Path(path)
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return any(is_dicom(file) for file in path.iterdir() if file.is_file())
    return scan_suffix(path.name) is not None


def scan_id(path: str | os.PathLike[str]) -> str:
    """Return a scan's name without its suffix, and nothing else taken off.

    ``scan.v1.2.nii.gz`` is ``scan.v1.2``; a DICOM folder's id is its name.
    """
    path = Path(path)
    suffix = None if path.is_dir() else scan_suffix(path.name)
    return path.name[: -len(suffix)] if suffix else path.name


def label_id(path: str | os.PathLike[str]) -> str:
    """Return a label map's name without its suffix: the id of the scan that it belongs to."""
    name = Path(path).name
    suffix = label_suffix(name)
    return name[: -len(suffix)] if suffix else name
