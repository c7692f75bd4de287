"""Scans that were fetched, as files on the disk up to a bound. All of it may be removed at any time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from segqc.volumes import remove, scan_id

IN_USE_SECONDS: Final = 600.0
"""A file that was handed out is kept for so long: whoever asked for it is reading it."""
_STALE_SECONDS: Final = 24 * 3600.0
_LONG_AGO: Final = 1.0  # a time of files that nobody has asked for yet: they go first


class SeriesImages(BaseModel):
    """The images that a scan's slices were, in the order of its file's last axis; kept as JSON beside the file.

    It has DICOM's names, by which `segqc.volumes.tags` finds the patient and the modality.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    study_uid: str = Field(alias="StudyInstanceUID")
    series_uid: str = Field(alias="SeriesInstanceUID")
    frame_of_reference_uid: str = Field(alias="FrameOfReferenceUID")
    instances: tuple[str, ...] = Field(alias="SOPInstanceUIDs")
    patient: str = Field(alias="PatientID")
    modality: str = Field(alias="Modality")


class ScanCache:
    """A folder with a folder for each scan, by the SHA-256 of its file. Threads and processes may share it."""

    def __init__(self, folder: Path, max_bytes: float) -> None:
        """Use a folder, which need not exist.

        Args:
            folder: the folder.
            max_bytes: of all files together; what is in use is kept beyond it.
        """
        self._folder = folder
        self._max_bytes = max_bytes

    def find(self, sha256: str, file: str) -> Path | None:
        """A scan's file by its content, kept for some minutes from now on; None where it is not here."""
        folder = self._folder / sha256
        path = folder / file
        try:
            os.utime(folder)
        except OSError:
            return None
        return path if path.is_file() and _images_file(path).is_file() else None

    def images(self, path: Path) -> SeriesImages:
        """The images of a scan's file that `find` has found.

        Raises:
            OSError: if the folder was removed meanwhile.
        """
        return SeriesImages.model_validate_json(_images_file(path).read_bytes())

    def put(self, made: Path, images: SeriesImages, sha256: str) -> Path:
        """Keep a scan's file; what was not asked for longest gives way.

        Args:
            made: the file, on the same disk; it is moved.
            images: what its slices were.
            sha256: of its content.

        Returns:
            Where it is kept.
        """
        folder = self._folder / sha256
        if self.find(sha256, made.name) is None:
            staged = made.with_name(f".{sha256}")
            staged.mkdir()
            os.replace(made, staged / made.name)
            _images_file(staged / made.name).write_text(images.model_dump_json(by_alias=True), encoding="utf-8")
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                os.replace(staged, folder)
            except OSError:  # it lies there already, without one of its files or under another name
                for file in staged.iterdir():
                    os.replace(file, folder / file.name)
            os.utime(folder, (_LONG_AGO, _LONG_AGO))
        self._trim(sha256)
        return folder / made.name

    def staging(self) -> Path:
        """A folder on the same disk for what is being made."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def _trim(self, newest: str) -> None:
        """Remove what was not asked for longest, but for what has come this moment."""
        for left in self._folder.glob(".*"):  # by a process that was killed
            with contextlib.suppress(OSError):
                if left.stat().st_mtime < time.time() - _STALE_SECONDS:
                    remove(left)
        entries = sorted(self._entries(), reverse=True)
        total = sum(size for _, size, _ in entries)
        while entries and total > self._max_bytes:
            used_at, size, folder = entries.pop()
            if used_at > time.time() - IN_USE_SECONDS:
                return
            if folder.name != newest:
                remove(folder)
                total -= size

    def _entries(self) -> Sequence[tuple[float, int, Path]]:
        """When each scan was asked for last, its size and its folder."""
        found = []
        for folder in self._folder.iterdir():
            try:
                if not folder.name.startswith("."):
                    size = sum(file.stat().st_size for file in folder.iterdir())
                    found.append((folder.stat().st_mtime, size, folder))
            except OSError:  # it is being removed
                continue
        return found


def _images_file(path: Path) -> Path:
    return path.with_name(f"{scan_id(path)}.json")
