"""Task folders of the Medical Segmentation Decathlon: ``dataset.json``, ``imagesTr``, ``labelsTr``, ``imagesTs``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from pydantic import JsonValue, TypeAdapter

from segqc.io.case_list import (
    NIFTI,
    Case,
    CaseList,
    Count,
    ExchangeError,
    LeftAside,
    read_json,
    refuse_existing,
    relative_name,
    write_image,
    write_json,
    write_label,
)
from segqc.progress import NO_PROGRESS, Progress
from segqc.text import printable
from segqc.types import Structure
from segqc.volumes import SCAN_SUFFIXES, as_spelled, atomic_write, label_suffix, scan_id, scan_suffix

_PROGRAM: Final = "the Medical Segmentation Decathlon"
_FILE: Final = "dataset.json"


@dataclass(frozen=True, slots=True)
class _Pair:
    image: str
    label: str


@dataclass(frozen=True, slots=True)
class _Image:
    image: str


@dataclass(frozen=True, slots=True)
class _Task:
    """What of ``dataset.json`` is needed."""

    labels: dict[int, str]
    training: list[_Pair]
    test: list[str | _Image] = field(default_factory=list)
    modality: dict[str, str] = field(default_factory=dict)


_TASK: Final = TypeAdapter(_Task)
_JSON: Final = TypeAdapter(dict[str, JsonValue])


def read_task(folder: Path) -> CaseList:
    """Read a task folder: training scans with their label maps, test scans without.

    Every label value but the background is a structure. Files that are listed and cannot be used are left aside.

    Raises:
        ExchangeError: if it is no such folder, its scans have several channels, or its labels are not named.
    """
    path = folder / _FILE
    task = read_json(path, _TASK, _PROGRAM)
    if len(task.modality) > 1:
        channels = ", ".join(task.modality.values())
        raise ExchangeError(
            f"{path}: its scans are 4-D, with the channels {channels}; write one channel as 3-D files and drop the "
            "others from 'modality'"
        )
    structures = tuple(Structure(name, (value,)) for value, name in sorted(task.labels.items()) if value != 0)
    if not structures or any(not 0 <= value <= 255 for value in task.labels):
        raise ExchangeError(f"{path}: 'labels' must name label values from 1 to 255")
    if len({s.name for s in structures}) < len(structures):
        raise ExchangeError(f"{path}: two label values have the same name; rename one")
    listed: list[tuple[str, str | None]] = [(pair.image, pair.label) for pair in task.training]
    listed += [(test if isinstance(test, str) else test.image, None) for test in task.test]
    cases, left_aside = [], []
    for image, label in listed:
        try:
            scan = _listed(folder, image)
            if scan_suffix(scan.name) is None:
                raise ExchangeError(
                    f"{printable(image)}: is of no known format; convert it to {' or '.join(SCAN_SUFFIXES)}."
                )
        except ExchangeError as error:
            left_aside.append(LeftAside(printable(image), str(error)))
            continue
        mask = None
        if label is not None:
            try:
                mask = _listed(folder, label)
            except ExchangeError as error:
                left_aside.append(LeftAside(printable(label), str(error)))
        cases.append(Case(scan_id(scan), scan, mask))
    used = {os.path.normpath(as_spelled(folder / file)) for files in listed for file in files if file is not None}
    for path in _lying(folder):
        if str(path) not in used:
            shown = relative_name(path, folder)
            left_aside.append(LeftAside(shown, f"{shown}: is not listed in {_FILE}; add it to the list or remove it."))
    return CaseList(folder, tuple(cases), structures, tuple(left_aside))


def _lying(folder: Path) -> Iterator[Path]:
    """The files of scans and label maps in a task's folders."""
    for sub in ("imagesTr", "labelsTr", "imagesTs"):
        if (folder / sub).is_dir():
            files = sorted(Path(os.path.normpath(folder / sub)).iterdir())
            yield from (path for path in files if label_suffix(path.name) and not path.name.startswith("."))


def _listed(folder: Path, file: str) -> Path:
    shown = printable(file)
    try:
        path = as_spelled(folder / file)
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ExchangeError(f"{shown}: is listed in {_FILE}, but is not in its folder; copy it there.")
        found = path.is_file()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise ExchangeError(f"{shown}: is listed in {_FILE}, but is no name of a file; repair the list.") from error
    if not found:
        raise ExchangeError(f"{shown}: is listed in {_FILE}, but not there; download the task again.")
    return path


def write_task(case_list: CaseList, folder: Path, *, link: bool = False, progress: Progress = NO_PROGRESS) -> Count:
    """Write a task folder: labelled scans as ``imagesTr`` with ``labelsTr``, the others as ``imagesTs``.

    The format knows one name for each value: a value that is only part of a structure is named after it and itself. It
    knows no labels that were checked in part: these are left out.

    Raises:
        ExchangeError: if the folder is not empty.
        VolumeError: if a label map holds a value of no structure.
    """
    refuse_existing(folder)
    names = _value_names(case_list.structures)
    training: list[JsonValue] = []
    test: list[JsonValue] = []
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        for done, case in enumerate(case_list.cases, 1):
            mask = case.label if case.slices is None else None
            image = f"images{'Ts' if mask is None else 'Tr'}/{case.name}{NIFTI}"
            write_image(case.image, temporary / image, link=link)
            if mask is None:
                test.append(f"./{image}")
            else:
                label = f"labelsTr/{case.name}{NIFTI}"
                write_label(case, mask, temporary / label, np.arange(256, dtype=np.uint8), list(names))
                training.append({"image": f"./{image}", "label": f"./{label}"})
            progress.step(done, len(case_list.cases), "exporting")
        task: dict[str, JsonValue] = {
            "name": case_list.folder.name,
            "description": ", ".join(s.name for s in case_list.structures),
            "tensorImageSize": "3D",
            "modality": {"0": "unknown"},
            "labels": {"0": "background", **{str(value): name for value, name in names.items()}},
            "numTraining": len(training),
            "numTest": len(test),
            "training": training,
            "test": test,
        }
        write_json(temporary / _FILE, _JSON, task)
    return Count(len(case_list.cases), len(training), sum(case.slices is not None for case in case_list.cases))


def _value_names(structures: tuple[Structure, ...]) -> dict[int, str]:
    values = sorted({value for structure in structures for value in structure.values})
    names = {}
    for value in values:
        own = [s for s in structures if value in s.values]
        alone = any(s.values == (value,) for s in own)
        plain = " and ".join(s.name for s in own if s.values == (value,) or not alone)
        names[value] = plain if alone else f"{plain} {value}"
    return names
