"""How results are stored in a run folder: a file each, whole or not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from segqc.volumes import atomic_write

T = TypeVar("T")
Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Format(Generic[T]):
    """A kind of result as a file; ``save`` writes atomically."""

    load: Callable[[Path], T]
    save: Callable[[T, Path], None]


def as_json(kind: TypeAdapter[T]) -> Format[T]:
    """A dataclass as JSON."""

    def save(value: T, path: Path) -> None:
        with atomic_write(path) as temporary:
            temporary.write_bytes(kind.dump_json(value, indent=1) + b"\n")

    return Format(lambda path: kind.validate_json(path.read_bytes()), save)


def load_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read what `save_arrays` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def save_arrays(arrays: Arrays, path: Path) -> None:
    """Write named arrays as one compressed file."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


ARRAYS: Format[Arrays] = Format(load_arrays, save_arrays)
