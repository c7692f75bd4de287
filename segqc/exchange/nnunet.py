"""Raw data folders of nnU-Net v2: ``dataset.json``, ``imagesTr/<case>_0000.nii.gz``, ``labelsTr/<case>.nii.gz``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
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
    read_json,
    refuse_existing,
    write_image,
    write_json,
    write_label,
)
from segqc.store.upkeep import Report, silent
from segqc.types import Structure
from segqc.volumes import SCAN_SUFFIXES, atomic_write

_PROGRAM: Final = "nnU-Net v2"
_FILE: Final = "dataset.json"
_CHANNEL: Final = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


@dataclass(frozen=True, slots=True)
class _Raw:
    """What ``dataset.json`` says."""

    channel_names: dict[str, str]
    labels: dict[str, int | list[int]]
    file_ending: str
    dataset: JsonValue = None


_RAW: Final = TypeAdapter(_Raw)
_JSON: Final = TypeAdapter(dict[str, JsonValue])


def read_raw(folder: Path) -> Dataset:
    """Read a raw data folder: training scans with their label maps, test scans without.

    A region (a list of label values) is one structure.

    Raises:
        ExchangeError: if it is no such folder, a scan has no label map, or scans have several channels.
    """
    path = folder / _FILE
    raw = read_json(path, _RAW, _PROGRAM)
    if len(raw.channel_names) != 1:
        channels = ", ".join(raw.channel_names.values())
        raise ExchangeError(f"{path}: its scans have the channels {channels}; make a data set of one of them")
    if raw.file_ending not in SCAN_SUFFIXES:
        known = ", ".join(SCAN_SUFFIXES)
        raise ExchangeError(f"{path}: its files end in {raw.file_ending}; convert them to one of {known}")
    if raw.dataset is not None:
        raise ExchangeError(f"{path}: lists its files under 'dataset'; move them to imagesTr and labelsTr")
    if "ignore" in raw.labels:
        raise ExchangeError(f"{path}: has a label 'ignore' for voxels that nobody labelled; complete the label maps")
    structures = tuple(
        Structure(name, tuple(values))
        for name, given in raw.labels.items()
        if (values := given if isinstance(given, list) else [given]) != [0]
    )
    if not structures or not all(s.values and all(1 <= v <= 255 for v in s.values) for s in structures):
        raise ExchangeError(f"{path}: 'labels' must name label values from 1 to 255")
    if not (folder / "imagesTr").is_dir():
        raise ExchangeError(f"{folder / 'imagesTr'}: no such folder; wanted a folder of {_PROGRAM}")
    training = [Case(name, image, folder / "labelsTr" / f"{name}{raw.file_ending}")
                for name, image in _images(folder / "imagesTr", raw.file_ending)]  # fmt: skip
    for case in training:
        if case.label is None or not case.label.is_file():
            raise ExchangeError(f"{case.label}: no such label map, and {case.image} is a training scan; add it")
    test = [Case(name, image, None) for name, image in _images(folder / "imagesTs", raw.file_ending)]
    return Dataset(folder, tuple(training + test), structures)


def _images(folder: Path, ending: str) -> Iterator[tuple[str, Path]]:
    """Names and files of the scans; hidden files (macOS leaves such) are none."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.endswith(ending):
            continue
        named = _CHANNEL.fullmatch(path.name.removesuffix(ending))
        if named is None or named["channel"] != "0000":
            raise ExchangeError(
                f"{path}: wanted scans named <case>_0000{ending}, one channel each; rename or remove it"
            )
        yield named["case"], path


def write_raw(dataset: Dataset, folder: Path, *, link: bool = False, report: Report = silent) -> Count:
    """Write a raw data folder: labelled scans as ``imagesTr`` with ``labelsTr``, the others as ``imagesTs``.

    The format wants label values without gaps: where there are any, values are renumbered in their order. A structure
    of several values is a region.

    Raises:
        ExchangeError: if the folder is not empty.
        VolumeError: if a label map holds a value of no structure.
    """
    refuse_existing(folder)
    values = sorted({value for structure in dataset.structures for value in structure.values})
    renumbered = np.zeros(256, np.uint8)
    renumbered[values] = np.arange(1, len(values) + 1)
    count = 0
    with atomic_write(folder) as temporary:
        for sub in ("imagesTr", "labelsTr"):
            (temporary / sub).mkdir(parents=True)
        for done, case in enumerate(dataset.cases, 1):
            part = "imagesTs" if case.label is None else "imagesTr"
            write_image(case.image, temporary / part / f"{case.name}_0000{NIFTI}", link=link)
            if case.label is not None:
                write_label(case.label, temporary / "labelsTr" / f"{case.name}{NIFTI}", renumbered, values)
                count += 1
            report(done, len(dataset.cases), "scans")
        more: dict[str, JsonValue] = {
            "channel_names": {"0": "unknown"},
            "numTraining": count,
            "file_ending": NIFTI,
            "name": dataset.folder.name,
        }
        structures = [Structure(s.name, tuple(int(renumbered[v]) for v in s.values)) for s in dataset.structures]
        write_json(temporary / _FILE, _JSON, {**_labels(structures), **more})
    return Count(len(dataset.cases), count)


def _labels(structures: list[Structure]) -> dict[str, JsonValue]:
    """The entries of ``dataset.json`` that name label values and regions."""
    if all(len(s.values) == 1 for s in structures):
        return {"labels": {"background": 0, **{s.name: s.values[0] for s in structures}}}
    # predicted regions are painted over each other in this order: the inner ones last
    outer_first = sorted(structures, key=lambda s: -len(s.values))
    order: list[JsonValue] = []
    for i, region in enumerate(outer_first):
        inner = {value for other in outer_first[i + 1 :] for value in other.values}
        order.append(min(set(region.values) - inner, default=min(region.values)))
    regions: dict[str, JsonValue] = {s.name: [*s.values] if len(s.values) > 1 else s.values[0] for s in outer_first}
    return {"labels": {"background": 0, **regions}, "regions_class_order": order}
