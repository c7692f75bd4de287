"""Raw data folders of nnU-Net v2: ``dataset.json``, ``imagesTr/<case>_0000.nii.gz``, ``labelsTr/<case>.nii.gz``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
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
from segqc.text import nfc
from segqc.types import Structure
from segqc.volumes import LABEL_SUFFIXES, SCAN_SUFFIXES, atomic_write, label_id, label_suffix

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


def read_raw(folder: Path) -> CaseList:
    """Read a raw data folder: training scans with their label maps, test scans without.

    A region (a list of label values) is one structure. Files are matched whatever the case of their suffix; those that
    belong to no case are left aside, and so is a training scan's missing label.

    Raises:
        ExchangeError: if it is no such folder, or its scans have several channels.
    """
    path = folder / _FILE
    raw = read_json(path, _RAW, _PROGRAM)
    if len(raw.channel_names) != 1:
        channels = ", ".join(raw.channel_names.values())
        raise ExchangeError(f"{path}: its scans have the channels {channels}; make a data set of one of them")
    if raw.file_ending.lower() not in SCAN_SUFFIXES:
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
    left_aside: list[LeftAside] = []
    masks = _masks(folder / "labelsTr", left_aside)
    cases = []
    for name, image in _images(folder, "imagesTr", raw.file_ending, left_aside):
        mask = masks.pop(nfc(name), None)
        if mask is None:
            shown = relative_name(image, folder)
            left_aside.append(
                LeftAside(shown, f"{shown}: has no label map in labelsTr; the scan is taken without one.")
            )
        cases.append(Case(name, image, mask))
    for path in masks.values():
        shown = relative_name(path, folder)
        left_aside.append(LeftAside(shown, f"{shown}: no scan in imagesTr has this name; add the scan or rename it."))
    cases += [Case(name, image, None) for name, image in _images(folder, "imagesTs", raw.file_ending, left_aside)]
    return CaseList(folder, tuple(cases), structures, tuple(left_aside))


def _visible(folder: Path) -> list[Path]:
    """The files of a folder; hidden ones (macOS leaves such) are none."""
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]


def _masks(folder: Path, left_aside: list[LeftAside]) -> dict[str, Path]:
    """Label maps by the case's name, in the form in which names are compared."""
    found: dict[str, Path] = {}
    for path in _visible(folder):
        shown, name = relative_name(path, folder.parent), nfc(label_id(path))
        if label_suffix(path.name) is None:
            reason = f"{shown}: is no label map of a known format; convert it to one of {', '.join(LABEL_SUFFIXES)}."
            left_aside.append(LeftAside(shown, reason))
        elif name in found:
            left_aside.append(LeftAside(shown, f"{shown}: {found[name].name} is of the same case; remove one."))
        else:
            found[name] = path
    return found


def _images(folder: Path, part: str, ending: str, left_aside: list[LeftAside]) -> Iterator[tuple[str, Path]]:
    """Names and files of the scans."""
    for path in _visible(folder / part):
        is_scan = path.name.lower().endswith(ending.lower())
        named = _CHANNEL.fullmatch(path.name[: -len(ending)]) if is_scan else None
        if named is not None and named["channel"] == "0000":
            yield named["case"], path
            continue
        shown = relative_name(path, folder)
        reason = f"{shown}: is not named <case>_0000{ending}, as scans of one channel are; rename or remove it."
        left_aside.append(LeftAside(shown, reason))


def write_raw(case_list: CaseList, folder: Path, *, link: bool = False, progress: Progress = NO_PROGRESS) -> Count:
    """Write a raw data folder: labelled scans as ``imagesTr`` with ``labelsTr``, the others as ``imagesTs``.

    The format wants label values without gaps: where there are any, values are renumbered in their order. A structure
    of several values is a region. Slices that nobody has looked at have the label ``ignore``.

    Raises:
        ExchangeError: if the folder is not empty, or no value is left for ``ignore``.
        VolumeError: if a label map holds a value of no structure.
    """
    refuse_existing(folder)
    values = sorted({value for structure in case_list.structures for value in structure.values})
    renumbered = np.zeros(256, np.uint8)
    renumbered[values] = np.arange(1, len(values) + 1)
    in_part = sum(case.slices is not None for case in case_list.cases)
    ignore = len(values) + 1 if in_part else None  # the format wants it to be the highest one
    if ignore is not None and ignore > 255:
        raise ExchangeError(
            f"{folder}: all 255 label values are in use, and none is left for slices that nobody checked"
        )
    count = 0
    with atomic_write(folder) as temporary:
        for sub in ("imagesTr", "labelsTr"):
            (temporary / sub).mkdir(parents=True)
        for done, case in enumerate(case_list.cases, 1):
            part = "imagesTs" if case.label is None else "imagesTr"
            write_image(case.image, temporary / part / f"{case.name}_0000{NIFTI}", link=link)
            if case.label is not None:
                target = temporary / "labelsTr" / f"{case.name}{NIFTI}"
                write_label(case, case.label, target, renumbered, values, ignore=ignore)
                count += 1
            progress.step(done, len(case_list.cases), "exporting")
        more: dict[str, JsonValue] = {
            "channel_names": {"0": "unknown"},
            "numTraining": count,
            "file_ending": NIFTI,
            "name": case_list.folder.name,
        }
        structures = [Structure(s.name, tuple(int(renumbered[v]) for v in s.values)) for s in case_list.structures]
        write_json(temporary / _FILE, _JSON, {**_labels(structures, ignore), **more})
    return Count(len(case_list.cases), count, in_part)


def _labels(structures: list[Structure], ignore: int | None) -> dict[str, JsonValue]:
    """The entries of ``dataset.json`` that name label values, regions, and the value of what nobody has looked at."""
    last: dict[str, JsonValue] = {} if ignore is None else {"ignore": ignore}
    if all(len(s.values) == 1 for s in structures):
        return {"labels": {"background": 0, **{s.name: s.values[0] for s in structures}, **last}}
    # predicted regions are painted over each other in this order: the inner ones last
    outer_first = sorted(structures, key=lambda s: -len(s.values))
    order: list[JsonValue] = []
    for i, region in enumerate(outer_first):
        inner = {value for other in outer_first[i + 1 :] for value in other.values}
        order.append(min(set(region.values) - inner, default=min(region.values)))
    regions: dict[str, JsonValue] = {s.name: [*s.values] if len(s.values) > 1 else s.values[0] for s in outer_first}
    return {"labels": {"background": 0, **regions, **last}, "regions_class_order": order}
