"""A scan as a DICOM study of one series: its identifiers, and what the headers of its images say."""

from __future__ import annotations

import io
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from segqc.pacs.cache import SeriesImages
from segqc.store.records import JsonObject, ScanRecord
from segqc.volumes import SliceLayout, Volume, slice_layout
from segqc.volumes.dicom_images import ImagePixels, ImagePlanes, decimal, describe_kind, quantise
from segqc.volumes.volume import Grid

Attributes: TypeAlias = dict[str, Any]
"""Values by DICOM keyword."""

USUAL_MODALITY: Final = "MR"
"""What a scan counts as whose file says nothing: viewers reconstruct no planes of images of unknown modality."""
IMAGES: Final = SliceLayout(0, 1, 2, flip_columns=False, flip_rows=False)
"""How the file of a scan that comes as DICOM images has their voxels."""
_NAMESPACE: Final = uuid.UUID("4d1d4c43-8a0b-5a7e-9f0e-6c8b1f2f7a11")
_CODE: Final = re.compile("[A-Z0-9_]{1,16}")
_MAX_TEXT: Final = 64  # characters of a DICOM long string
_DARKEST, _BRIGHTEST = 0.01, 0.99  # shares of the voxels


@dataclass(frozen=True, slots=True)
class DicomScan:
    """A scan as DICOM names it. Identifiers follow from its name and content: another content has others.

    Attributes:
        record: the scan.
        source: the images of a PACS that it was made of, whose identifiers are its own; None for a file.
    """

    record: ScanRecord
    source: SeriesImages | None = None

    @property
    def study_uid(self) -> str:
        """StudyInstanceUID."""
        return self._uid("study") if self.source is None else self.source.study_uid

    @property
    def series_uid(self) -> str:
        """SeriesInstanceUID."""
        return self._uid("series") if self.source is None else self.source.series_uid

    @property
    def frame_of_reference_uid(self) -> str:
        """FrameOfReferenceUID."""
        return self._uid("frame of reference") if self.source is None else self.source.frame_of_reference_uid

    def instance_uid(self, index: int) -> str:
        """SOPInstanceUID of a slice, by its number across the through-plane axis."""
        return self._uid(f"instance {index}") if self.source is None else self.source.instances[index]

    def _uid(self, what: str) -> str:
        return f"2.25.{uuid.uuid5(_NAMESPACE, f'{self.record.sha256} {what} {self.record.name}').int}"

    def study(self) -> Attributes:
        """What the store knows of the study."""
        empty = ("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "PatientBirthDate",
                 "PatientSex", "StudyID")  # fmt: skip
        return {
            "SpecificCharacterSet": "ISO_IR 192",
            **dict.fromkeys(empty, ""),
            "PatientName": _text(self.record.patient).replace("=", "-"),
            "PatientID": _text(self.record.patient),
            "StudyInstanceUID": self.study_uid,
            "StudyDescription": _text(self.record.name),
        }

    def series(self, modality: str) -> Attributes:
        """What is known of its series beside."""
        return {
            "Modality": modality,
            "SeriesInstanceUID": self.series_uid,
            "SeriesDescription": _text(self.record.name),
            "SeriesNumber": 1,
        }


def _text(value: str) -> str:
    """Text as one value of DICOM, whose values a backslash separates."""
    return value.replace("\\", "/")[:_MAX_TEXT].strip()


@dataclass(frozen=True)
class ScanHeader:
    """What a scan's file says before its voxels are read.

    Attributes:
        scan: the scan.
        layout: how its voxels become images.
        planes: where the images lie.
        modality: of the scanner.
        instances: the number of each slice, in the file's order, by SOPInstanceUID.
    """

    scan: DicomScan
    layout: SliceLayout
    planes: ImagePlanes
    modality: str
    instances: Mapping[str, int]

    @classmethod
    def of(cls, scan: DicomScan, grid: Grid, modality: str | None) -> ScanHeader:
        """The header of a scan that lies on a grid, of the modality that its file names."""
        layout = slice_layout(grid) if scan.source is None else IMAGES
        sizes = (grid.shape[layout.slice_axis], grid.shape[layout.row_axis], grid.shape[layout.column_axis])
        planes = ImagePlanes.from_ras(sizes, layout.affine_of_images(grid))
        instances = {scan.instance_uid(index): index for index in range(sizes[0])}
        known = modality if modality is not None and _CODE.fullmatch(modality) else USUAL_MODALITY
        return cls(scan, layout, planes, known, instances)

    @property
    def count(self) -> int:
        """How many images there are."""
        return self.planes.shape[0]

    def image(self, index: int) -> Dataset:
        """What the header of one image says of its identity and place, beside what all have in common."""
        item = Dataset()
        item.SOPInstanceUID = self.scan.instance_uid(index)
        self.planes.place(item, index)
        return item

    def images(self) -> Dataset:
        """What the headers of all images have in common, but for what depends on the voxels."""
        item = dataset({**self.scan.study(), **self.scan.series(self.modality)})
        describe_kind(item, self.modality)
        item.FrameOfReferenceUID = self.scan.frame_of_reference_uid
        self.planes.describe(item)
        return item


@dataclass(frozen=True)
class ScanImages:
    """The images of a scan.

    Attributes:
        pixels: their stored values.
        low: the intensity that is shown black.
        high: the intensity that is shown white.
    """

    pixels: ImagePixels
    low: float
    high: float

    @classmethod
    def of(cls, volume: Volume, layout: SliceLayout) -> ScanImages:
        """The images of a scan that is shown by a layout, in 16 bits."""
        pixels = quantise(layout.to_images(volume.array))
        low, high = (float(pixels.slope) * step + float(pixels.intercept) for step in _display_range(pixels))
        return cls(pixels, low, high)

    @property
    def size_bytes(self) -> int:
        """Memory that they take."""
        return int(self.pixels.stored.nbytes)

    def describe(self, item: Dataset) -> None:
        """Note what depends on the voxels."""
        self.pixels.describe(item)
        # by DICOM's linear function (PS3.3, C.11.2.1.2) exactly low is black and high is white
        item.WindowCenter = decimal((self.low + self.high) / 2 + 0.5)
        item.WindowWidth = decimal(self.high - self.low + 1)


def _display_range(pixels: ImagePixels) -> tuple[int, int]:
    """The stored values between which all but the darkest and brightest voxels lie."""
    smallest = int(np.iinfo(pixels.stored.dtype).min)
    counts = np.zeros(1 << 16, np.int64)
    for image in pixels.stored:
        counts += np.bincount(image.ravel().astype(np.int64) - smallest, minlength=1 << 16)
    below = np.cumsum(counts)
    low, high = np.searchsorted(below, (_DARKEST * below[-1], _BRIGHTEST * below[-1]))
    return int(low) + smallest, int(high) + smallest


def dataset(attributes: Attributes) -> Dataset:
    """A DICOM data set of values by keyword."""
    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return item


def to_json(item: Dataset) -> JsonObject:
    """A data set by the DICOM JSON model (PS3.18, F)."""
    found: JsonObject = item.to_json_dict()
    return found


def metadata(header: ScanHeader, images: ScanImages, slices: Iterable[int], address: str) -> list[JsonObject]:
    """The headers of images of a scan by the DICOM JSON model; pixels are named by their address.

    Args:
        header: of the scan.
        images: its images.
        slices: the numbers of those that are wanted.
        address: of the series.
    """
    common = header.images()
    images.describe(common)
    shared = to_json(common)
    found = []
    for index in slices:
        instance = header.scan.instance_uid(index)
        pixels: JsonObject = {"vr": "OW", "BulkDataURI": f"{address}/instances/{instance}/frames/1"}
        found.append(dict(sorted({**shared, **to_json(header.image(index)), "7FE00010": pixels}.items())))
    return found


def to_file(header: ScanHeader, images: ScanImages, index: int) -> bytes:
    """One image as a DICOM file."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item = FileDataset("", header.images(), file_meta=meta, preamble=b"\0" * 128)
    item.is_little_endian, item.is_implicit_VR = True, False
    item.update(header.image(index))
    images.describe(item)
    item.PixelData = images.pixels.frame(index)
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = item.SOPClassUID, item.SOPInstanceUID
    file = io.BytesIO()
    item.save_as(file, write_like_original=False)
    return file.getvalue()
