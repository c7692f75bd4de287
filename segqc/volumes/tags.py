"""DICOM tags that came along when a series was converted to a NIfTI or NRRD file.

Converters keep them in two places: in a JSON file of the scan's name beside it (dcm2niix and BIDS, by keyword), and in
the key/value pairs of an NRRD header (by keyword, or by number: ``DICOM_0010_0020_PatientID`` of BRAINSTools'
converters, ``0010|0020`` of ITK's). A folder of one DICOM series has them in its files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue, TypeAdapter, ValidationError
from pydicom.datadict import keyword_for_tag, tag_for_keyword

from segqc.text import TextError, decode_text, first_problem
from segqc.volumes import (
    NRRD_SUFFIXES,
    VolumeError,
    as_spelled,
    dicom_files,
    is_dicom_image,
    read_dataset,
    read_nrrd_header,
    scan_id,
)

_SIDECAR: TypeAdapter[dict[str, JsonValue]] = TypeAdapter(dict[str, JsonValue])
_NUMBER = re.compile(r"\(?([0-9a-f]{4})[|,_ ]?([0-9a-f]{4})\)?", re.IGNORECASE)
_NUMBERED_KEY = re.compile(r"(?:dicom[_ .]?)?" + _NUMBER.pattern + r"(?:[_ .].*)?", re.IGNORECASE)


def read_tag(scan: Path, tag: str) -> str | None:
    """The value of a tag that came along with a scan.

    Args:
        scan: a NIfTI or NRRD file, or a folder of one DICOM series.
        tag: a keyword (``"PatientID"``) or a number (``"0010,0020"``); a keyword that DICOM does not know is looked
            for as it is.

    Returns:
        The value as text without blanks at its ends; None where the scan has no such tag, or an empty one.

    Raises:
        VolumeError: if the JSON file beside the scan or the header can't be read, or the value is neither text nor a
            number.
    """
    keyword, number = _named(tag)
    if scan.is_dir():
        return _in_series(scan, keyword, number)
    sidecar = as_spelled(scan.with_name(f"{scan_id(scan)}.json"))
    value = _in_pairs(sidecar, _read_sidecar(sidecar), keyword, number) if sidecar.is_file() else None
    if value is None and scan.name.lower().endswith(NRRD_SUFFIXES):
        value = _in_pairs(scan, read_nrrd_header(scan), keyword, number)
    return value


def _named(tag: str) -> tuple[str, int | None]:
    """Keyword and number of a tag, as far as DICOM's dictionary knows them."""
    found = _NUMBER.fullmatch(tag.strip())
    if found is not None:
        number = int(found.group(1) + found.group(2), 16)
        return keyword_for_tag(number) or tag, number
    return tag, tag_for_keyword(tag)


def _read_sidecar(path: Path) -> Mapping[str, JsonValue]:
    try:
        return _SIDECAR.validate_json(decode_text(path.read_bytes()))
    except (OSError, TextError, ValidationError) as error:
        match error:
            case ValidationError():
                reason = first_problem(error.errors())
            case TextError():
                reason = error.clause
            case _:
                reason = error.strerror or str(error)
        raise VolumeError(
            f"{path}: the scan's side-car is no readable JSON object ({reason}); repair or remove it."
        ) from error


def _in_pairs(path: Path, pairs: Mapping[str, object], keyword: str, number: int | None) -> str | None:
    for key, value in pairs.items():
        if key.lower() != keyword.lower() and (number is None or _number_of(key) != number):
            continue
        if value is None:  # what a program writes that leaves a value out
            return None
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise VolumeError(f"{path}: its {key} is neither text nor a number; write it as text.")
        return _plain(value)
    return None


def _plain(value: object) -> str | None:
    """A value as one line of text; databases keep no zero characters, and tables no ends of lines."""
    return re.sub(r"[\x00-\x1f\x7f]+", " ", str(value)).strip() or None


def _number_of(key: str) -> int | None:
    found = _NUMBERED_KEY.fullmatch(key)
    return int(found.group(1) + found.group(2), 16) if found is not None else None


def _in_series(folder: Path, keyword: str, number: int | None) -> str | None:
    for file in dicom_files(folder):
        if is_dicom_image(file):
            return _in_file(file, keyword, number)
    raise VolumeError(f"{folder}: holds no DICOM images; give a folder of one DICOM series.")


def read_dicom_tag(file: Path, tag: str) -> str | None:
    """The value of a tag of one DICOM file, as `read_tag` gives it.

    Raises:
        VolumeError: if the file is damaged.
    """
    return _in_file(file, *_named(tag))


def _in_file(file: Path, keyword: str, number: int | None) -> str | None:
    try:
        value = read_dataset(file, pixels=False).get(keyword if number is None else number)
        shown = getattr(value, "value", value)  # by number it is an element, by keyword its value
        return _plain(shown) if shown is not None else None
    except Exception as error:  # pydicom raises many kinds on damaged files, none with a common base
        raise VolumeError(f"{file}: is truncated or damaged ({error}); copy the series again.") from error
