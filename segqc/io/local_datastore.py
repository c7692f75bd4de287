"""Folders of MONAI Label's own LocalDatastore: scans, ``labels/<tag>/``, and ``datastore_v2.json``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import JsonValue, TypeAdapter, ValidationError

from segqc.io.case_list import (
    Count,
    ExchangeError,
    Imported,
    LeftAside,
    place,
    read_json,
    refuse_existing,
    write_json,
)
from segqc.progress import NO_PROGRESS, Progress
from segqc.store import findings, labels, scans
from segqc.store.events import FOLDER
from segqc.store.labels import NewLabel
from segqc.store.records import JsonObject, LabelRecord
from segqc.store.store import Store, suffix_of
from segqc.text import first_problem, nfc, printable
from segqc.volumes import as_spelled, atomic_write, read_grid, through_plane_axis
from segqc.volumes.slices import Slices

_FILE: Final = "datastore_v2.json"
_PROGRAM: Final = "MONAI Label's LocalDatastore"
_CHECKED: Final = "checked_slices"  # in the notes of a label that was checked in part


@dataclass(frozen=True, slots=True)
class _Data:
    ext: str = ""
    info: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Object:
    image: _Data
    labels: dict[str, _Data] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _File:
    """``datastore_v2.json``; each of its objects is a file's entry of its own."""

    objects: dict[str, JsonValue]
    name: str = ""
    description: str = ""
    images_dir: str = "."
    labels_dir: str = "labels"


@dataclass(frozen=True, slots=True)
class Datastore:
    """What ``datastore_v2.json`` says: scans by id, with their files' suffixes and what clients noted.

    ``left_aside`` are entries that cannot be read.
    """

    objects: Mapping[str, _Object]
    left_aside: tuple[LeftAside, ...] = ()


_DATASTORE: Final = TypeAdapter(_File)
_OBJECT: Final = TypeAdapter(_Object)


def read_datastore(folder: Path) -> Datastore:
    """Read what a folder's ``datastore_v2.json`` says; entries that cannot be read are left aside.

    Raises:
        ExchangeError: if it is missing or damaged, or its scans and labels do not lie where a dataset folder has them.
    """
    path = folder / _FILE
    found = read_json(path, _DATASTORE, _PROGRAM)
    if found.images_dir not in ("", ".") or found.labels_dir != "labels":
        raise ExchangeError(
            f"{path}: its scans lie in {found.images_dir!r} and its labels in {found.labels_dir!r}; move them to the "
            "folder itself and to 'labels'"
        )
    objects, left_aside = {}, []
    for name, entry in found.objects.items():
        try:
            objects[name] = _OBJECT.validate_python(entry)
        except ValidationError as error:
            shown = printable(name)
            reason = f"{shown}: its entry in {_FILE} cannot be read ({first_problem(error.errors())}); repair it."
            left_aside.append(LeftAside(shown, reason))
    return Datastore(objects, tuple(left_aside))


def take_notes(store: Store, datastore: Datastore) -> Imported:
    """Add what clients noted of scans and labels to a store that has taken in the folder.

    What the store knows already stays as it is. Objects and labels whose files are gone are left aside, and so is
    what the store has not taken in of the folder. A label that is said to be checked in part becomes a version that is.
    """
    scans_found = labels_found = 0
    in_part: list[tuple[LabelRecord, Slices]] = []
    with store.write() as transaction:
        left_aside = {f.file: LeftAside(f.file, f.sentence) for f in findings.listing(transaction)}
        by_file = {nfc(scan.file): scan for scan in scans.listing(transaction) if scan.missing_since is None}
        tags = {tag for entry in datastore.objects.values() for tag in entry.labels}
        current = {tag: labels.current_of_all(transaction, tag) for tag in tags}
        for name, entry in datastore.objects.items():
            file = f"{name}{entry.image.ext}"
            scan = by_file.get(nfc(file))
            if scan is None:
                left_aside.setdefault(file, _unused(store.dataset, file))
                continue
            scans_found += 1
            scans.update_info(transaction, scan.name, {**entry.image.info, **scan.info})
            for tag, data in entry.labels.items():
                label = current[tag].get(scan.name)
                if label is None:
                    file = f"labels/{tag}/{name}{data.ext}"
                    left_aside.setdefault(file, _unused(store.dataset, file))
                    continue
                labels_found += 1
                known = labels.info(transaction, label.id)
                labels.update_info(transaction, label.id, {**data.info, **known})
                if _CHECKED in data.info and label.source == "import" and label.checked_slices is None:
                    try:
                        in_part.append((label, _checked_slices(data.info[_CHECKED], store.scan_file(scan))))
                    except ValueError as error:
                        file = printable(f"labels/{tag}/{name}{data.ext}")
                        left_aside.setdefault(
                            file, LeftAside(file, f"{file}: {error}; it counts as checked as a whole.")
                        )
    for label, slices in in_part:
        new = NewLabel(label.scan, label.tag, "import", FOLDER, parent=label.id, checked_slices=slices)
        store.save_label(new, store.label_file(label))
    named = (left_aside[file] for file in sorted(left_aside))
    return Imported(scans_found, labels_found, (*datastore.left_aside, *named))


def _checked_slices(noted: JsonValue, scan: Path) -> Slices:
    """The slices of a label that a note says were checked.

    Raises:
        ValueError: if it names none of the scan's slices.
    """
    grid = read_grid(scan)
    count = grid.shape[through_plane_axis(grid)]
    found = {n for n in noted if type(n) is int and 0 <= n < count} if isinstance(noted, list) else set()
    if not found or not isinstance(noted, list) or len(found) != len(noted):
        raise ValueError(f"its entry in {_FILE} does not name slices from 0 to {count - 1} that were checked")
    return tuple(sorted(found))


def _unused(folder: Path, file: str) -> LeftAside:
    shown = printable(file)
    if os.path.lexists(as_spelled(folder / file)):
        return LeftAside(shown, f"{shown}: is listed in {_FILE} and was not accepted; see segqc scans.")
    return LeftAside(shown, f"{shown}: is listed in {_FILE}, but not there; put the file back or forget it.")


def write_datastore(store: Store, folder: Path, *, link: bool = False, progress: Progress = NO_PROGRESS) -> Count:
    """Write the scans whose files are there, with their current labels, as a folder that MONAI Label opens.

    Pseudo-labels are left out: such a folder does not say who made a label, and read again they would be a person's.

    Raises:
        ExchangeError: if the folder is not empty.
    """
    refuse_existing(folder)
    with store.read() as transaction:
        found = [scan for scan in scans.listing(transaction) if scan.missing_since is None]
        tags = labels.all_tags(transaction)
        current = {tag: labels.current_of_all(transaction, tag) for tag in tags}
        infos = labels.infos(transaction)
    objects: dict[str, JsonValue] = {}
    count = in_part = 0
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        for done, scan in enumerate(found, 1):
            ext = suffix_of(Path(scan.file))
            place(store.scan_file(scan), temporary / f"{scan.name}{ext}", link=link)
            own = {}
            for tag in tags:
                label = current[tag].get(scan.name)
                if label is not None and label.suffix is not None and label.source != "pseudo-label":
                    place(store.kept_file(label), temporary / "labels" / tag / f"{scan.name}{label.suffix}", link=False)
                    noted = infos.get(label.id, {})
                    if label.checked_slices is not None:
                        noted = {**noted, _CHECKED: list(label.checked_slices)}
                        in_part += 1
                    own[tag] = _Data(label.suffix, noted)
                    count += 1
            objects[scan.name] = _OBJECT.dump_python(_Object(_Data(ext, scan.info), own), mode="json")
            progress.step(done, len(found), "exporting")
        name = store.dataset.name
        write_json(temporary / _FILE, _DATASTORE, _File(objects, name, f"exported from {name}"))
    return Count(len(found), count, in_part)
