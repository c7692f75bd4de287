"""Folders of DICOM series, as scanners and archives export them, made into a dataset folder."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from pydantic import JsonValue, TypeAdapter

from segqc.io.case_list import (
    ExchangeError,
    Imported,
    LeftAside,
    new_folder,
    refuse_existing,
    relative_name,
    sentence_of,
    write_json,
)
from segqc.progress import NO_PROGRESS, Progress
from segqc.settings import write_settings
from segqc.text import caseless, nfc, printable
from segqc.volumes import (
    DicomVolume,
    VolumeError,
    read_dicom_volume,
    sort_into_volumes,
    visible_files,
    write_scan,
)
from segqc.volumes.inputs import InputFile
from segqc.volumes.intake import check_scan
from segqc.volumes.tags import read_dicom_tag

_SERIES: Final = "SeriesInstanceUID"
_JSON: Final[TypeAdapter[dict[str, JsonValue]]] = TypeAdapter(dict[str, JsonValue])
_MAX_NAME_BYTES: Final = 180


def make_dataset(
    source: Path, folder: Path, *, patient_tag: str = "PatientID", progress: Progress = NO_PROGRESS
) -> Imported:
    """Make a dataset folder out of all volumes that lie as DICOM files in a folder and below it.

    A volume becomes a ``.nii.gz`` named after its folders (``7/axial`` is ``7_axial``), and after its series' number
    where they hold several. Beside it lies a JSON file with the tag that names its patient and with the series' own
    number; no other tag is kept. What is no volume is left aside with the reason: reports, localizers, series with
    missing slices. Where nothing is a volume, nothing is written.

    Args:
        source: the folder.
        folder: the dataset folder; it must be new or empty.
        patient_tag: the tag, written to the folder's settings.
        progress: called for each file looked at, and each volume.

    Raises:
        ExchangeError: if there are no DICOM files, or the dataset folder is not empty.
    """
    refuse_existing(folder)
    if not source.is_dir():
        raise ExchangeError(f"{source}: no such folder; name a folder of DICOM series")
    passed: list[LeftAside] = []
    files = list(_files(source, passed))
    looked = iter(range(1, len(files) + 1))
    contents = sort_into_volumes(
        files, tick=lambda: progress.step(next(looked), len(files), "reading DICOM", unit="files")
    )
    if not (contents.volumes or contents.left_out or passed):
        raise ExchangeError(f"{source}: holds no DICOM files; name a folder of DICOM series")
    left_aside = passed + [_left(source, entry.files, entry.reason) for entry in contents.left_out]
    taken = 0
    with new_folder(folder) as temporary:
        for done, (name, volume) in enumerate(_named(source, contents.volumes), 1):
            where = common_folder(volume.files)
            shown = relative_name(where, source)
            title = f"{shown} ({printable(volume.title)})"
            image = temporary / f"{name}.nii.gz"
            try:
                write_scan(read_dicom_volume(volume, InputFile(where, shown=title)), image)
                check_scan(image, shown=title)
                values = {tag: read_dicom_tag(volume.files[0], tag) for tag in (patient_tag, _SERIES)}
            except VolumeError as error:
                image.unlink(missing_ok=True)
                left_aside.append(LeftAside(shown, sentence_of(error, image, title)))
            else:
                kept: dict[str, JsonValue] = {tag: value for tag, value in values.items() if value is not None}
                write_json(temporary / f"{name}.json", _JSON, kept)
                taken += 1
            progress.step(done, len(contents.volumes), "importing")
        if taken:
            write_settings(temporary, {}, patient_tag=patient_tag)
    return Imported(taken, 0, tuple(left_aside))


def _files(source: Path, passed: list[LeftAside]) -> Iterator[Path]:
    """The files of a folder and those below it, but for hidden ones; links and unreadable folders are noted."""

    def note(error: OSError) -> None:
        shown = relative_name(Path(error.filename), source)
        passed.append(LeftAside(shown, f"{shown}: cannot be read ({error.strerror}); allow it and import again."))

    for place, folders, _ in os.walk(source, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for link in (Path(place, name) for name in folders if os.path.islink(Path(place, name))):
            shown = relative_name(link, source)
            reason = "is a link to a folder, and links are not followed; import that folder by its own name."
            passed.append(LeftAside(shown, f"{shown}: {reason}"))
        try:
            yield from visible_files(Path(place))
        except OSError as error:
            note(error)


def _left(source: Path, files: Sequence[Path], reason: str) -> LeftAside:
    folder = common_folder(files)
    shown = relative_name(files[0] if len(files) == 1 else folder, source)
    if len(files) > 1:
        shown += f" ({len(files)} files, the first {printable(files[0].name)})"
    return LeftAside(shown, f"{shown}: {printable(reason)}")


def common_folder(files: Sequence[Path]) -> Path:
    """The folder that files lie in, or the nearest above it that holds them all."""
    return Path(os.path.commonpath([file.parent for file in files]))


# ------------------------------------------------------------------------------------------------------------- names


def _named(source: Path, volumes: Sequence[DicomVolume]) -> list[tuple[str, DicomVolume]]:
    """Name each volume after its folders and, where they hold several, after its series."""
    groups: dict[str, list[DicomVolume]] = defaultdict(list)
    for volume in volumes:
        groups[_base_name(source, common_folder(volume.files))].append(volume)
    named: list[tuple[str, DicomVolume]] = []
    used: set[str] = set()
    for base, group in groups.items():
        for volume, more in zip(group, _suffixes(group), strict=True):
            name = whole = _short(f"{base}_{more}" if more else base)
            number = 2
            while caseless(name) in used:
                name, number = f"{whole}_{number}", number + 1
            used.add(caseless(name))
            named.append((name, volume))
    return named


def _base_name(source: Path, folder: Path) -> str:
    parts = folder.relative_to(source).parts if folder.is_relative_to(source) else ()
    return "_".join(map(_plain, parts)) or _plain(source.resolve().name) or "scan"


def _suffixes(group: Sequence[DicomVolume]) -> list[str]:
    """What tells the volumes of one folder apart, as short as it can be; empty for one alone."""
    choices: list[Callable[[DicomVolume], Sequence[str]]] = [
        lambda volume: (),
        lambda volume: (volume.part,),
        lambda volume: (volume.series_number, volume.part),
        lambda volume: (volume.series_number, volume.description, volume.part),
    ]
    for choose in choices:
        found = ["_".join(_plain(part) for part in choose(volume) if part) for volume in group]
        if len({caseless(name) for name in found}) == len(group):
            break
    return found


def _plain(text: str) -> str:
    """A part of a file's name: letters of any script, digits, and what names of scans commonly hold."""
    return re.sub(r"[^\w .,+=@()\[\]-]+", "-", printable(nfc(text))).strip(" .-")


def _short(name: str) -> str:
    return name.encode()[:_MAX_NAME_BYTES].decode(errors="ignore")
