"""A data set of scans, some with a label map: what the folders of other programs are read into and written from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from segqc.settings import write_settings
from segqc.store import labels, scans
from segqc.store.labels import FINAL
from segqc.store.store import Store, suffix_of
from segqc.store.upkeep import Report, silent
from segqc.types import Structure
from segqc.volumes import (
    SCAN_SUFFIXES,
    Volume,
    atomic_write,
    read_labels,
    read_scan,
    scan_suffix,
    write_labels,
    write_scan,
)

T = TypeVar("T")
NIFTI = ".nii.gz"


class ExchangeError(ValueError):
    """A folder can't be read or written as the wanted format; says which file, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Case:
    """A scan, and its label map where it has one."""

    name: str
    image: Path
    label: Path | None


@dataclass(frozen=True, slots=True)
class Dataset:
    """The cases of a folder and the structures that their label maps show."""

    folder: Path
    cases: tuple[Case, ...]
    structures: tuple[Structure, ...]


@dataclass(frozen=True, slots=True)
class Count:
    """How many scans were read or written, and how many of them with a label."""

    scans: int
    labels: int


def read_json(path: Path, kind: TypeAdapter[T], program: str) -> T:
    """Read a JSON file of a known form.

    Raises:
        ExchangeError: if it is missing or of another form.
    """
    try:
        return kind.validate_json(path.read_bytes())
    except OSError as error:
        raise ExchangeError(f"{path}: cannot be read ({error.strerror}); wanted a folder of {program}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        finding = f"{place}: {first['msg']}" if place else first["msg"]
        raise ExchangeError(f"{path}: is no file of {program} ({finding}); repair it") from error


def write_json(path: Path, kind: TypeAdapter[T], value: T) -> None:
    """Write a JSON file."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(kind.dump_json(value, indent=1) + b"\n")


def refuse_existing(folder: Path) -> None:
    """Refuse to write into a folder that holds something.

    Raises:
        ExchangeError: if it does.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExchangeError(f"{folder}: exists already; name a new or empty folder")


def place(source: Path, target: Path, *, link: bool) -> None:
    """Copy a file, or make a hard link to it.

    Raises:
        ExchangeError: if a link cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if not link:
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError as error:
        raise ExchangeError(f"{source}: cannot be linked to {target} ({error.strerror}); copy instead") from error


# ------------------------------------------------------------------------------------------------------------ import


def make_studies(dataset: Dataset, folder: Path, *, link: bool = False, report: Report = silent) -> Count:
    """Make a studies folder out of a data set; its label maps become final labels.

    Every file is read and checked first; nothing is left where one cannot be used.

    Args:
        dataset: what to put into it.
        folder: the studies folder; it must be new or empty.
        link: make hard links to the scans instead of copies.
        report: told about each case.

    Raises:
        ExchangeError: if the folder is not empty, or two scans have the same name.
        VolumeError: if a file is no 3-D scan, or no label map of its scan's grid with the structures' values only.
    """
    refuse_existing(folder)
    values = {value for structure in dataset.structures for value in structure.values}
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        for done, case in enumerate(dataset.cases, 1):
            image = temporary / f"{case.name}{suffix_of(case.image)}"
            if image.exists():
                raise ExchangeError(f"{case.image}: another scan of the data set has the same name; rename one")
            scan = read_scan(case.image)
            place(case.image, image, link=link)
            if case.label is not None:
                read_labels(case.label, scan=scan, values=values)
                kept = temporary / "labels" / FINAL / f"{case.name}{suffix_of(case.label)}"
                place(case.label, kept, link=False)
            report(done, len(dataset.cases), "scans")
        write_settings(temporary, {s.name: s.values for s in dataset.structures})
    return Count(len(dataset.cases), sum(case.label is not None for case in dataset.cases))


def checked_suffix(path: Path) -> Path:
    """Return a path whose suffix scans may have.

    Raises:
        ExchangeError: for another.
    """
    if scan_suffix(path.name) is None:
        raise ExchangeError(f"{path}: is of no known format; convert it to {' or '.join(SCAN_SUFFIXES)}")
    return path


# ------------------------------------------------------------------------------------------------------------ export


def dataset_of(store: Store, structures: Sequence[Structure], *, only_approved: bool = False) -> Dataset:
    """The scans of a store whose files are there, with the final labels that count.

    Excluded scans are left out.

    Args:
        store: the store.
        structures: those of the settings; where there are none, every label value is one.
        only_approved: only labels that somebody approved count, not all that were submitted.
    """
    states = {"approved"} if only_approved else {"submitted", "approved"}
    with store.read() as transaction:
        finals = labels.current_of_all(transaction, FINAL)
        found = scans.listing(transaction)
    cases = []
    for scan in found:
        final = finals.get(scan.name) if scan.state in states else None
        label = store.label_file(final) if final is not None else None
        if scan.missing_since is None and scan.state != "excluded":
            cases.append(Case(scan.name, store.studies / scan.file, label))
    return Dataset(store.studies, tuple(cases), tuple(structures) or _value_structures(cases))


def _value_structures(cases: Iterable[Case]) -> tuple[Structure, ...]:
    values: set[int] = set()
    for case in cases:
        if case.label is not None:
            values |= set(np.unique(read_labels(case.label).array).tolist()) - {0}
    return tuple(Structure(f"label {value}", (value,)) for value in sorted(values))


def write_image(source: Path, target: Path, *, link: bool) -> None:
    """Write a scan as compressed NIfTI: the same bytes where it is that already."""
    if source.name.endswith(NIFTI):
        place(source, target, link=link)
    else:
        write_scan(read_scan(source), target)


def write_label(source: Path, target: Path, renumbered: npt.NDArray[np.uint8], values: Sequence[int]) -> None:
    """Write a label map as compressed NIfTI, its values renumbered by a table of all 256.

    Raises:
        VolumeError: if it holds values other than those given.
    """
    volume = read_labels(source, values=values)
    changed = renumbered[volume.array]
    if source.name.endswith(NIFTI) and np.array_equal(changed, volume.array):
        place(source, target, link=False)
    else:
        write_labels(Volume(changed, volume.affine, volume.acquisition_axis), target)
