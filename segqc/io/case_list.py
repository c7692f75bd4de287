"""A data set of scans, some with a label map: what the folders of other programs are read into and written from."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from segqc.errors import SegqcError
from segqc.progress import NO_PROGRESS, Progress
from segqc.settings import write_settings
from segqc.store import labels, scans
from segqc.store.labels import FINAL
from segqc.store.store import Store
from segqc.text import TextError, caseless, decode_text, first_problem, printable
from segqc.types import Structure, label_names, structures_of_values, values_in
from segqc.volumes import (
    Volume,
    VolumeError,
    atomic_write,
    label_suffix,
    read_grid,
    read_labels,
    read_scan,
    scan_suffix,
    through_plane_axis,
    write_labels,
    write_scan,
)
from segqc.volumes.intake import check_labels, check_scan
from segqc.volumes.slices import Slices, all_but

T = TypeVar("T")
NIFTI = ".nii.gz"


class ExchangeError(SegqcError):
    """A folder can't be read or written as the wanted format; says which file, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Case:
    """A scan, and its label map where it has one; of this, the slices that a person has looked at (None: all)."""

    name: str
    image: Path
    label: Path | None
    slices: Slices | None = None


@dataclass(frozen=True, slots=True)
class LeftAside:
    """A file or a folder that is not imported.

    Attributes:
        file: its path as the user knows it, relative to what is imported.
        reason: what is wrong with it and what to do; one sentence that names the file.
    """

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class CaseList:
    """The cases of a folder, the structures that their label maps show, and what cannot be used."""

    folder: Path
    cases: tuple[Case, ...]
    structures: tuple[Structure, ...]
    left_aside: tuple[LeftAside, ...] = ()


@dataclass(frozen=True, slots=True)
class Count:
    """How many scans were read or written, and how many of them with a label.

    ``in_part`` are the scans with a label that was checked in part.
    """

    scans: int
    labels: int
    in_part: int = 0


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import has taken, and what it has left aside."""

    scans: int
    labels: int
    left_aside: tuple[LeftAside, ...] = ()


def read_json(path: Path, kind: TypeAdapter[T], program: str) -> T:
    """Read a JSON file of a known form, in any encoding that `decode_text` knows.

    Raises:
        ExchangeError: if it is missing or of another form.
    """
    if path.exists() and not path.is_file():
        raise ExchangeError(f"{path}: is no file; wanted a folder of {program}")
    try:
        return kind.validate_json(decode_text(path.read_bytes()))
    except TextError as error:
        raise ExchangeError(f"{path}: {error}") from error
    except OSError as error:
        raise ExchangeError(f"{path}: cannot be read ({error.strerror}); wanted a folder of {program}") from error
    except ValidationError as error:
        raise ExchangeError(f"{path}: is no file of {program} ({first_problem(error.errors())}); repair it") from error


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


def make_dataset(
    case_list: CaseList, folder: Path, *, link: bool = False, progress: Progress = NO_PROGRESS
) -> Imported:
    """Make a dataset folder out of a data set; its label maps become final labels.

    Every file is checked first. A scan that cannot be used is left aside with its label; a label map that cannot be
    used is left aside, and its scan is taken. Where no scan can be taken, nothing is written.

    Args:
        case_list: what to put into it.
        folder: the dataset folder; it must be new or empty.
        link: make hard links to the scans instead of copies.
        progress: called for each case.

    Raises:
        ExchangeError: if the folder is not empty, or a link cannot be made.
    """
    refuse_existing(folder)
    left_aside = list(case_list.left_aside)
    taken: set[str] = set()
    labelled = 0
    with new_folder(folder) as temporary:
        for done, case in enumerate(case_list.cases, 1):
            try:
                _place_scan(case, case_list.folder, temporary, taken, link=link)
                if case.label is not None:
                    _place_label(case, case.label, case_list, temporary)
                    labelled += 1
            except _NotUsable as found:
                left_aside.append(found.item)
            progress.step(done, len(case_list.cases), "importing")
        if taken:
            write_settings(temporary, {s.name: s.values for s in case_list.structures})
    return Imported(len(taken), labelled, tuple(left_aside))


class _NotUsable(Exception):  # noqa: N818 - not an error
    """A file that is left aside."""

    def __init__(self, file: str, sentence: str) -> None:
        super().__init__(sentence)
        self.item = LeftAside(file, sentence)


def _place_scan(case: Case, source: Path, target: Path, taken: set[str], *, link: bool) -> None:
    shown = relative_name(case.image, source)
    if printable(case.name) != case.name:
        raise _NotUsable(shown, f"{shown}: has a name that is not UTF-8 or holds control characters; rename the file.")
    if caseless(case.name) in taken:
        raise _NotUsable(shown, f"{shown}: another scan has the same name; rename one.")
    try:
        check_scan(case.image, shown=shown)
    except VolumeError as error:
        raise _NotUsable(shown, sentence_of(error, case.image, shown)) from error
    place(case.image, target / f"{case.name}{scan_suffix(case.image.name)}", link=link)
    taken.add(caseless(case.name))


def _place_label(case: Case, label: Path, case_list: CaseList, target: Path) -> None:
    shown = relative_name(label, case_list.folder)
    names = label_names(case_list.structures)
    try:
        check_labels(label, read_scan(case.image), list(names.values()), names, shown=shown)
    except VolumeError as error:
        raise _NotUsable(shown, sentence_of(error, label, shown)) from error
    place(label, target / "labels" / FINAL / f"{case.name}{label_suffix(label.name)}", link=False)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `folder` on success if there is something in it, and nothing otherwise."""
    with contextlib.suppress(_Empty), atomic_write(folder) as temporary:
        temporary.mkdir()
        yield temporary
        if not any(temporary.iterdir()):
            raise _Empty


class _Empty(Exception):  # noqa: N818 - not an error
    """Nothing was put into a new folder."""


def relative_name(path: Path, folder: Path) -> str:
    """How messages of an import name a file: by its path relative to what is imported, as printable text."""
    return printable(str(path.relative_to(folder) if path.is_relative_to(folder) else path))


def sentence_of(error: VolumeError, path: Path, shown: str) -> str:
    """The message of an error, with the file named as the user knows it."""
    message = printable(str(error)).replace(printable(str(path)), shown)
    return message if message.startswith(shown) else f"{shown}: {message}"


# ------------------------------------------------------------------------------------------------------------ export


def case_list_of(store: Store, structures: Sequence[Structure], *, only_approved: bool = False) -> CaseList:
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
            slices = final.checked_slices if final is not None else None
            cases.append(Case(scan.name, store.scan_file(scan), label, slices))
    return CaseList(store.dataset, tuple(cases), tuple(structures) or _value_structures(cases))


def _value_structures(cases: Iterable[Case]) -> tuple[Structure, ...]:
    values: set[int] = set()
    for case in cases:
        if case.label is not None:
            values |= values_in(read_labels(case.label).array)
    return structures_of_values(values)


def write_image(source: Path, target: Path, *, link: bool) -> None:
    """Write a scan as compressed NIfTI: the same bytes where it is that already."""
    if source.name.lower().endswith(NIFTI):
        place(source, target, link=link)
    else:
        write_scan(read_scan(source), target)


def write_label(
    case: Case,
    source: Path,
    target: Path,
    renumbered: npt.NDArray[np.uint8],
    values: Sequence[int],
    *,
    ignore: int | None = None,
) -> None:
    """Write a case's label map as compressed NIfTI, its values renumbered by a table of all 256.

    Args:
        case: the case.
        source: its label map.
        target: the file to write.
        renumbered: the table.
        values: the values that the label map may hold.
        ignore: the value of all slices that nobody has looked at; None leaves them as they are.

    Raises:
        VolumeError: if it holds values other than those given.
    """
    volume = read_labels(source, values=values)
    changed = renumbered[volume.array]
    if ignore is not None and case.slices is not None:
        changed[all_but(volume.shape, case.slices, through_plane_axis(read_grid(case.image))) > 0] = ignore
    if source.name.lower().endswith(NIFTI) and np.array_equal(changed, volume.array):
        place(source, target, link=False)
    else:
        write_labels(Volume(changed, volume.affine, volume.acquisition_axis), target)
