"""File names: which are scans, which are label maps, and what is left of a name without its suffix."""

from __future__ import annotations

import os
from pathlib import Path

from segqc.volumes.dicom import has_dicom_magic

NIFTI_SUFFIXES = (".nii.gz", ".nii")
NRRD_SUFFIXES = (".nrrd",)
FILE_SUFFIXES = NIFTI_SUFFIXES + NRRD_SUFFIXES


def is_scan_path(path: str | os.PathLike[str]) -> bool:
    """Tell whether the path names something `read_scan` may read, by its suffix or, for a folder, by its DICOM files.

    Hidden names (a leading dot) are never scans.
    """
    path = Path(path)
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return any(has_dicom_magic(file) for file in path.iterdir() if file.is_file())
    return file_suffix(path) is not None


def scan_id(path: str | os.PathLike[str]) -> str:
    """Return the file's name without its ``.nii``, ``.nii.gz`` or ``.nrrd`` suffix, and nothing else taken off.

    ``scan.v1.2.nii.gz`` is ``scan.v1.2``; a DICOM folder's id is its name.
    """
    path = Path(path)
    suffix = None if path.is_dir() else file_suffix(path)
    return path.name[: -len(suffix)] if suffix else path.name


def file_suffix(path: Path) -> str | None:
    name = path.name.lower()
    return next((suffix for suffix in FILE_SUFFIXES if name.endswith(suffix) and name != suffix), None)
