"""Folders of DICOM series, as scanners and archives export them, made into a studies folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic import JsonValue, TypeAdapter

from segqc.exchange.dataset import Count, ExchangeError, refuse_existing, write_json
from segqc.settings import write_settings
from segqc.store.upkeep import Report, silent
from segqc.tags import read_tag
from segqc.volumes import atomic_write, dicom_files, read_scan, write_scan

_SERIES: Final = "SeriesInstanceUID"
_JSON: Final[TypeAdapter[dict[str, JsonValue]]] = TypeAdapter(dict[str, JsonValue])


def make_studies(source: Path, folder: Path, *, patient_tag: str = "PatientID", report: Report = silent) -> Count:
    """Make a studies folder out of all series that lie in a folder and below it, a folder for each.

    A series becomes a ``.nii.gz`` named after its folders (``7/axial`` is ``7_axial``). Beside it lies a JSON file
    with the tag that names its patient and with the series' own number; no other tag is kept.

    Args:
        source: the folder.
        folder: the studies folder; it must be new or empty.
        patient_tag: the tag, written to the folder's settings.
        report: told about each series.

    Raises:
        ExchangeError: if there is no series, the studies folder is not empty, or two series would have one name.
        VolumeError: if a folder's DICOM files are not the slices of one volume.
    """
    refuse_existing(folder)
    series = _series(source)
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        for done, (name, path) in enumerate(series, 1):
            image = temporary / f"{name}.nii.gz"
            if image.exists():
                raise ExchangeError(f"{path}: another series would have the name {name}, too; rename its folder")
            write_scan(read_scan(path), image)
            values = {tag: read_tag(path, tag) for tag in (patient_tag, _SERIES)}
            kept: dict[str, JsonValue] = {tag: value for tag, value in values.items() if value is not None}
            write_json(temporary / f"{name}.json", _JSON, kept)
            report(done, len(series), "series")
        write_settings(temporary, {}, patient_tag=patient_tag)
    return Count(len(series), 0)


def _series(source: Path) -> Sequence[tuple[str, Path]]:
    if not source.is_dir():
        raise ExchangeError(f"{source}: no such folder; name a folder of DICOM series")
    folders = [source, *sorted(path for path in source.rglob("*") if path.is_dir())]
    found = [("_".join(path.relative_to(source).parts) or source.resolve().name, path) for path in folders]
    series = [(name, path) for name, path in found if dicom_files(path)]
    if not series:
        raise ExchangeError(f"{source}: holds no DICOM files; name a folder of DICOM series")
    return series
