"""Whether a label map lies on its scan's grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segqc.volumes.volume import Source, Volume, VolumeError


def check_grid(path: Path, source: Source, scan: Volume) -> None:
    if source.shape != scan.shape:
        raise VolumeError(
            f"{path}: the labels have the shape {source.shape} and the scan {scan.shape}; resample them to the scan."
        )
    last = np.array(scan.shape, dtype=np.float64) - 1
    corners = np.array(np.meshgrid(*[(0.0, end) for end in last], indexing="ij")).reshape(3, -1)
    difference = source.affine - scan.affine
    offset = float(np.linalg.norm(difference[:3, :3] @ corners + difference[:3, 3:], axis=0).max())
    if offset > max(1e-3, 0.01 * min(scan.spacing_mm)):
        raise VolumeError(
            f"{path}: the labels' grid is up to {offset:.3g} mm away from the scan's (origin, spacing or orientation "
            "differ); resample them to the scan."
        )
