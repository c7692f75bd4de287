"""How much a file may hold, and how long reading it may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """Bounds on what is read from one file or DICOM folder, whatever its header promises.

    Attributes:
        max_voxels: voxels of the volume; in the canonical frame, too.
        max_seconds: how long reading may take.
    """

    max_voxels: int = 1 << 30
    max_seconds: float = 300.0
