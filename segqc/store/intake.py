"""What every file is checked for before the store trusts it; the store itself knows no settings."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from segqc import __version__
from segqc.store.files import sha256_of
from segqc.volumes import ReadLimits, Volume, read_grid
from segqc.volumes.intake import LabelContent, ScanContent, check_labels, check_scan


class Intake(Protocol):
    """The checks of scans and labels on their way into the store."""

    @property
    def limits(self) -> ReadLimits:
        """Bounds on size and time of a read."""

    @property
    def version(self) -> str:
        """Another one when files would be checked in another way, so that refused ones are checked again."""

    def scan(self, path: Path, shown: str) -> ScanContent:
        """Check a scan's file.

        Args:
            path: the file.
            shown: its name for messages.

        Raises:
            VolumeError: if it can't be used.
        """

    def labels(self, path: Path, scan: Path, shown: str) -> LabelContent:
        """Check a label file against its scan's file.

        Args:
            path: the file.
            scan: the scan's file.
            shown: the label file's name for messages.

        Raises:
            VolumeError: if one of them can't be used, or they do not belong together.
        """


@dataclass(frozen=True, slots=True)
class AnyContent:
    """Takes every file by its name: for stores whose files somebody else has checked."""

    version: str = ""
    limits: ReadLimits = field(default_factory=ReadLimits)

    def scan(self, path: Path, shown: str) -> ScanContent:
        """Take any file."""
        return ScanContent(sha256_of(path), (1, 1, 1))

    def labels(self, path: Path, scan: Path, shown: str) -> LabelContent:
        """Take any file as it is."""
        return LabelContent(sha256_of(path), Volume(np.zeros((1, 1, 1), np.uint8), np.eye(4)), is_plain=True)


@dataclass(frozen=True)
class FileChecks:
    """Reads every file: scans within the limits, labels on their scan's grid with values whose meaning is known.

    Attributes:
        limits: bounds on size and time of a read.
        names: the structures' names and label values; empty where the settings name none, and any value is taken.
    """

    limits: ReadLimits
    names: Mapping[str, int] = field(default_factory=dict)

    @functools.cached_property
    def version(self) -> str:
        """The program's version and the settings that the checks depend on, as a hash."""
        basis = (__version__, self.limits, sorted(self.names.items()))
        return hashlib.sha256(repr(basis).encode()).hexdigest()[:16]

    def scan(self, path: Path, shown: str) -> ScanContent:
        """Read a scan."""
        return check_scan(path, self.limits, shown=shown)

    def labels(self, path: Path, scan: Path, shown: str) -> LabelContent:
        """Read a label map on its scan's grid."""
        values = tuple(self.names.values()) or None
        return check_labels(
            path, read_grid(scan, limits=self.limits), values, self.names or None, self.limits, shown=shown
        )
