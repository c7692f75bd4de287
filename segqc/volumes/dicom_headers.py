"""What the headers of DICOM files say, as far as volumes are put together by it."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias, TypeVar

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from segqc.volumes.volume import VolumeError

T = TypeVar("T")
Numbers: TypeAlias = tuple[float, ...]

_MARK: Final = b"DICM"
_MAX_INFLATED_BYTES: Final = 1 << 28
_NO_IMAGE_MODALITIES: Final = frozenset({"SR", "SEG", "PR", "KO", "DOC", "RTSTRUCT", "RTPLAN", "RTDOSE", "REG", "ECG"})
_TAGS: Final = [
    "SOPClassUID", "SOPInstanceUID", "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber",
    "SeriesDescription", "Modality", "ImageType", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness",
    "SpacingBetweenSlices", "AcquisitionNumber", "EchoTime", "EchoNumbers", "TemporalPositionIdentifier",
    "TriggerTime",
]  # fmt: skip
# What the volumes of one series may differ in, and what files of such a volume are called.
SPLITTERS: Final[Mapping[str | int, str]] = {
    "AcquisitionNumber": "acquisition",
    "EchoTime": "echo",
    "EchoNumbers": "echo",
    "TemporalPositionIdentifier": "time",
    "TriggerTime": "time",
    "DiffusionBValue": "b-value",
    0x0019100C: "b-value",  # Siemens, before there was a standard tag
    0x00431039: "b-value",  # GE
    0x20011003: "b-value",  # Philips
    "DiffusionGradientOrientation": "direction",
    "NominalPercentageOfCardiacPhase": "phase",
    "ImageType": "type",
    0x0043102F: "type",  # GE: magnitude, phase, real or imaginary part
    "AcquisitionTime": "time",
    "FrameReferenceTime": "time",
    "InversionTime": "inversion",
    "RepetitionTime": "repetition time",
    "FlipAngle": "flip angle",
}


@dataclass(frozen=True, slots=True)
class SeriesKey:
    """What slices of one series have in common."""

    patient: str
    study: str
    series: str


@dataclass(frozen=True, slots=True)
class DicomHeader:
    """One DICOM object; lengths are millimetres, None stands for what is missing or cannot be used.

    Attributes:
        file: where it lies.
        key: its series.
        sop_class: what it is, in words where DICOM's dictionary has them.
        is_image: whether it is an image by its SOP class.
        is_localizer: whether its image type says so.
        is_mosaic: whether its image type says that it is one image of all slices of a volume.
        instance: its SOPInstanceUID.
        position: ImagePositionPatient (LPS).
        orientation: ImageOrientationPatient (LPS): the direction along a row, then the one along a column.
        spacing: PixelSpacing: between rows, then between columns.
        thickness: distance to the next slice, as far as a single slice can say it.
        splitters: values of the tags that tell the volumes of one series apart.
    """

    file: Path
    key: SeriesKey
    series_number: str
    description: str
    sop_class: str
    is_image: bool
    is_localizer: bool
    is_mosaic: bool
    instance: str
    rows: int | None
    columns: int | None
    frames: int
    samples: int
    photometric: str
    position: Numbers | None
    orientation: Numbers | None
    spacing: Numbers | None
    thickness: float | None
    splitters: tuple[str, ...]


def is_dicom(path: Path) -> bool:
    """Tell by its content whether a file is a DICOM object, with the preamble and the mark ``DICM`` or without."""
    try:
        with path.open("rb") as stream:
            head = stream.read(132)
    except OSError:
        return False
    if head[128:] == _MARK or head.startswith(_MARK):
        return True
    if not _begins_like_a_dataset(head):
        return False
    try:
        return bool(_read(path, [Tag("SOPClassUID")]).get("SOPClassUID"))
    except VolumeError:
        return False


def _begins_like_a_dataset(head: bytes) -> bool:
    """Tell whether the first element is of the groups 0002 or 0008 and has an even, small length or a VR."""
    if len(head) < 16:
        return False
    for order in "<>":
        group, element, length = struct.unpack_from(f"{order}HHL", head)
        if group in (2, 8) and element <= 0x18:
            return bool((length % 2 == 0 and length <= 1024) or (head[4:6].isalpha() and head[4:6].isupper()))
    return False


def read_header(path: Path) -> DicomHeader:
    """Read a DICOM file's header.

    Raises:
        VolumeError: if it cannot be read. The message does not name the file's folder.
    """
    item = _read(path, [Tag(tag) for tag in (*_TAGS, *SPLITTERS)])
    try:
        return _header(path, item)
    except Exception as error:  # values are converted when they are asked for, with errors of many kinds
        raise VolumeError(
            f"{path.name} is truncated or damaged ({first_line(error)}); copy the series again."
        ) from error


def is_dicom_image(path: Path) -> bool:
    """Tell whether a DICOM file can be read and is an image by its SOP class."""
    try:
        return read_header(path).is_image
    except VolumeError:
        return False


def read_dataset(path: Path, *, pixels: bool = True) -> FileDataset:
    """Read a DICOM file, with or without its pixels; it gets a transfer syntax where the file does not state one.

    Raises:
        VolumeError: if it cannot be read. The message does not name the file's folder.
    """
    return _read(path, None, pixels=pixels)


def first_line(error: Exception) -> str:
    """What an error of a library says, as a part of a sentence."""
    said = next(iter(str(error).strip().splitlines()), "")
    return type(error).__name__ if not said or " object at 0x" in said else said


def _read(path: Path, tags: list[BaseTag] | None, *, pixels: bool = False) -> FileDataset:
    """Read a file, all of it or some tags, and with the pixels or nothing from them on."""
    try:
        _refuse_inflated(path)
        source: Path | BinaryIO = path
        with path.open("rb") as stream:
            if stream.read(4) == _MARK:  # the mark without the preamble
                source = io.BytesIO(bytes(128) + _MARK + stream.read())
        item = pydicom.dcmread(source, force=True, stop_before_pixels=not pixels, specific_tags=tags)
        if item.get("SOPClassUID") is None and item.file_meta.get("MediaStorageSOPClassUID") is not None:
            item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID
        if not item.file_meta.get("TransferSyntaxUID"):
            little = ImplicitVRLittleEndian if item.is_implicit_VR else ExplicitVRLittleEndian
            item.file_meta.TransferSyntaxUID = little if item.is_little_endian else ExplicitVRBigEndian
    except VolumeError:
        raise
    except Exception as error:  # pydicom raises many kinds on damaged files, none with a common base
        raise VolumeError(
            f"{path.name} is truncated or damaged ({first_line(error)}); copy the series again."
        ) from error
    return item


def _refuse_inflated(path: Path) -> None:
    """Refuse a deflated file that expands to more than a slice can need."""
    with path.open("rb") as stream:
        if stream.read(132)[128:] != _MARK:
            return
        meta: FileMetaDataset = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return
        stream.seek(144 + int(meta.FileMetaInformationGroupLength))
        inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while chunk := stream.read(1 << 16):
            while chunk and not inflate.eof:
                size += len(inflate.decompress(chunk, 1 << 20))
                chunk = inflate.unconsumed_tail
                if size > _MAX_INFLATED_BYTES:
                    raise VolumeError(
                        f"{path.name} expands to more than {_MAX_INFLATED_BYTES >> 20} MB; decompress it."
                    )


def _header(path: Path, item: Dataset) -> DicomHeader:
    uid = str(item.get("SOPClassUID") or "")
    name = UID(uid).name  # a class that the dictionary does not know has its number for a name
    modality = str(item.get("Modality") or "")
    rows, columns = _value(item, "Rows", int), _value(item, "Columns", int)
    is_private = name == uid  # or missing
    is_image = (rows is not None and modality not in _NO_IMAGE_MODALITIES) if is_private else "Image Storage" in name
    image_type = item.get("ImageType") or []
    types = [image_type] if isinstance(image_type, str) else [str(part) for part in image_type]
    return DicomHeader(
        file=path,
        key=SeriesKey(*(str(item.get(tag) or "") for tag in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID"))),
        series_number=str(item.get("SeriesNumber") or ""),
        description=str(item.get("SeriesDescription") or "").strip(),
        sop_class=name.removesuffix(" Storage") or modality or "of no SOP class",
        is_image=is_image,
        is_localizer="LOCALIZER" in types,
        is_mosaic="MOSAIC" in types,
        instance=str(item.get("SOPInstanceUID") or ""),
        rows=rows,
        columns=columns,
        frames=_value(item, "NumberOfFrames", int) or 1,
        samples=_value(item, "SamplesPerPixel", int) or 1,
        photometric=str(item.get("PhotometricInterpretation") or "MONOCHROME2"),
        position=_numbers(item, "ImagePositionPatient", 3),
        orientation=_numbers(item, "ImageOrientationPatient", 6),
        spacing=_numbers(item, "PixelSpacing", 2),
        thickness=_value(item, "SpacingBetweenSlices", float) or _value(item, "SliceThickness", float),
        splitters=tuple(str(item[tag].value or "").strip() if Tag(tag) in item else "" for tag in SPLITTERS),
    )


def _value(item: Dataset, tag: str, kind: Callable[[str], T]) -> T | None:
    """The value of a tag as a number; None where it is missing, empty or anything else."""
    try:
        value = item.get(tag)
        return None if value is None else kind(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _numbers(item: Dataset, tag: str, count: int) -> Numbers | None:
    try:
        numbers = tuple(float(value) for value in item[tag].value)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else None
