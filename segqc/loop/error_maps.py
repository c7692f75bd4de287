"""Error maps of the masks that bundles assess, as a cache of small files: what is missing can be made again.

Those of a label audit, by networks that have not seen the label's patient, are kept apart.
"""

from __future__ import annotations

import logging
import shutil
import zipfile
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from segqc.loop.dataset import Dataset
from segqc.types import FloatArray
from segqc.volumes import atomic_write

logger = logging.getLogger(__name__)

ErrorSteps: TypeAlias = npt.NDArray[np.uint8]
MapKind: TypeAlias = Literal["error-maps", "audit-maps"]
CERTAIN: Final = 255
"""What stands for an error probability of 1."""
_KEPT_BUNDLES: Final = 2  # that have maps: the last ones


def quantised(errors: FloatArray) -> ErrorSteps:
    """Error probabilities from 0 to 1 in steps of 1/255; those of one half and more stay so.

    Example:
        >>> quantised(np.array([0.0, 0.2, 0.4999, 0.5, 1.0], np.float32)).tolist()
        [0, 51, 127, 128, 255]
    """
    steps: ErrorSteps = np.rint(errors * CERTAIN).astype(np.uint8)
    return steps


def highest(errors: ErrorSteps) -> ErrorSteps:
    """The largest error probability of all structures: (n0, n1, n2) of (L, n0, n1, n2)."""
    found: ErrorSteps = errors.max(axis=0)
    return found


def path_of(dataset: Dataset, label: int, bundle: int, kind: MapKind = "error-maps") -> Path:
    """The file of the error map of a label version by a bundle."""
    return _folder(dataset, kind) / str(bundle) / f"{label}.npz"


def read(dataset: Dataset, label: int, bundle: int, kind: MapKind = "error-maps") -> ErrorSteps | None:
    """The kept error maps of a label version by a bundle; None without any.

    Returns:
        One of each structure, (L, n0, n1, n2), in the scan file's own voxel order.
    """
    try:
        with np.load(path_of(dataset, label, bundle, kind)) as kept:
            found = np.zeros(tuple(kept["shape"].tolist()), np.uint8)
            start, part = kept["start"], kept["part"]
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        logger.warning("%s: is made again, as it cannot be read (%s)", path_of(dataset, label, bundle, kind), error)
        return None
    found[tuple(slice(first, first + size) for first, size in zip(start, part.shape, strict=True))] = part
    return found


def write(dataset: Dataset, label: int, bundle: int, errors: ErrorSteps, kind: MapKind = "error-maps") -> None:
    """Keep the error maps of a label version, (L, n0, n1, n2); those of bundles before the last two go.

    Where the disk is full or read-only there is none: it is a cache.
    """
    try:
        with atomic_write(path_of(dataset, label, bundle, kind)) as temporary:
            start, part = _cut(errors)
            with temporary.open("wb") as file:
                np.savez_compressed(file, shape=np.array(errors.shape), start=np.array(start), part=part)
        _remove_old(_folder(dataset, kind))
    except OSError as error:
        logger.warning("an error map is not kept: %s", error)


def _folder(dataset: Dataset, kind: MapKind) -> Path:
    return dataset.own / "cache" / kind


def _cut(errors: ErrorSteps) -> tuple[tuple[int, ...], ErrorSteps]:
    """The part that is not zero, and where it begins."""
    axes = range(errors.ndim)
    found = [np.flatnonzero(errors.any(axis=tuple(set(axes) - {axis}))) for axis in axes]
    box = tuple(slice(int(f[0]), int(f[-1]) + 1) if f.size else slice(0, 0) for f in found)
    return tuple(part.start for part in box), np.ascontiguousarray(errors[box])


def _remove_old(folder: Path) -> None:
    numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    for number in numbers[:-_KEPT_BUNDLES]:
        shutil.rmtree(folder / str(number), ignore_errors=True)
