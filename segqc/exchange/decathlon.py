"""Task folders of the Medical Segmentation Decathlon: ``dataset.json``, ``imagesTr``, ``labelsTr``, ``imagesTs``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from pydantic import JsonValue, TypeAdapter

from segqc.exchange.dataset import (
    NIFTI,
    Case,
    Count,
    Dataset,
    ExchangeError,
    checked_suffix,
    read_json,
    refuse_existing,
    write_image,
    write_json,
    write_label,
)
from segqc.store.upkeep import Report, silent
from segqc.types import Structure
from segqc.volumes import atomic_write, scan_id

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


def read_task(folder: Path) -> Dataset:
    """Read a task folder: training scans with their label maps, test scans without.

    Every label value but the background is a structure.

    Raises:
        ExchangeError: if it is no such folder, a file that it lists is missing, or its scans have several channels.
    """
    path = folder / _FILE
    task = read_json(path, _TASK, _PROGRAM)
    if len(task.modality) > 1:
        channels = ", ".join(task.modality.values())
        raise ExchangeError(
            f"{path}: its scans are 4-D, with the channels {channels}; write one channel as 3-D files and drop the "
            "others from 'modality'"
        )
    cases = [_case(folder, pair.image, pair.label) for pair in task.training]
    cases += [_case(folder, test if isinstance(test, str) else test.image, None) for test in task.test]
    structures = tuple(Structure(name, (value,)) for value, name in sorted(task.labels.items()) if value != 0)
    if not structures or any(not 0 <= value <= 255 for value in task.labels):
        raise ExchangeError(f"{path}: 'labels' must name label values from 1 to 255")
    if len({s.name for s in structures}) < len(structures):
        raise ExchangeError(f"{path}: two label values have the same name; rename one")
    return Dataset(folder, tuple(cases), structures)


def _case(folder: Path, image: str, label: str | None) -> Case:
    scan = _listed(folder, image)
    return Case(scan_id(scan), checked_suffix(scan), _listed(folder, label) if label is not None else None)


def _listed(folder: Path, file: str) -> Path:
    path = folder / file
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ExchangeError(f"{folder / _FILE}: lists {file!r}, which is not in its folder")
    if not path.is_file():
        raise ExchangeError(f"{path}: is listed in {_FILE}, but not there; download the task again")
    return path


def write_task(dataset: Dataset, folder: Path, *, link: bool = False, report: Report = silent) -> Count:
    """Write a task folder: labelled scans as ``imagesTr`` with ``labelsTr``, the others as ``imagesTs``.

    The format knows one name for each value: a value that is only part of a structure is named after it and itself.

    Raises:
        ExchangeError: if the folder is not empty.
        VolumeError: if a label map holds a value of no structure.
    """
    refuse_existing(folder)
    names = _value_names(dataset.structures)
    training: list[JsonValue] = []
    test: list[JsonValue] = []
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        for done, case in enumerate(dataset.cases, 1):
            image = f"images{'Ts' if case.label is None else 'Tr'}/{case.name}{NIFTI}"
            write_image(case.image, temporary / image, link=link)
            if case.label is None:
                test.append(f"./{image}")
            else:
                label = f"labelsTr/{case.name}{NIFTI}"
                write_label(case.label, temporary / label, np.arange(256, dtype=np.uint8), list(names))
                training.append({"image": f"./{image}", "label": f"./{label}"})
            report(done, len(dataset.cases), "scans")
        task: dict[str, JsonValue] = {
            "name": dataset.folder.name,
            "description": ", ".join(s.name for s in dataset.structures),
            "tensorImageSize": "3D",
            "modality": {"0": "unknown"},
            "labels": {"0": "background", **{str(value): name for value, name in names.items()}},
            "numTraining": len(training),
            "numTest": len(test),
            "training": training,
            "test": test,
        }
        write_json(temporary / _FILE, _JSON, task)
    return Count(len(dataset.cases), len(training))


def _value_names(structures: tuple[Structure, ...]) -> dict[int, str]:
    values = sorted({value for structure in structures for value in structure.values})
    names = {}
    for value in values:
        own = [s for s in structures if value in s.values]
        alone = any(s.values == (value,) for s in own)
        plain = " and ".join(s.name for s in own if s.values == (value,) or not alone)
        names[value] = plain if alone else f"{plain} {value}"
    return names
