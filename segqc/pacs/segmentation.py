"""A label map as a DICOM segmentation of the images that its scan was made of.

Written by highdicom: dcmqi numbers and keeps only the segments that have voxels, so that a mask of the second structure
alone would call it the first one (docs/pacs.md has the trial of both).
"""

from __future__ import annotations

import contextlib
import io
import logging
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import highdicom as hd
import numpy as np
from pydicom.sr.coding import Code
from pydicom.valuerep import DA, TM

from segqc import __version__
from segqc.pacs.errors import PacsRefused
from segqc.store.labels import NOT_BY_PEOPLE
from segqc.store.records import LabelRecord
from segqc.types import LabelArray, structures_of_values, values_in

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

    from segqc.pacs.cache import SeriesImages

logging.getLogger("highdicom").setLevel(logging.WARNING)  # it logs what it copies

_NAMESPACE: Final = uuid.UUID("0f6a1a6e-52b0-5a43-9a2e-6b0f0b0c5b57")
TISSUE: Final = Code("85756007", "SCT", "Tissue")
LEARNING: Final = Code("123110", "DCM", "Artificial Intelligence")
SERIES_NUMBER: Final = 900
# Told apart by colour-blind eyes, too (Okabe and Ito), in the order of the label values.
_COLOURS: Final = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)
)  # fmt: skip
_WHITE: Final = (0.95047, 1.0, 1.08883)  # D65
_TO_XYZ: Final = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of patients' names that have no caret, and the like."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def uid_of(label: LabelRecord, series_uid: str, what: str) -> str:
    """An identifier that follows from a label version: whoever stores it again stores the same."""
    basis = f"{label.sha256} {label.id} {label.made_at.isoformat()} {series_uid} {what}"
    return f"2.25.{uuid.uuid5(_NAMESPACE, basis).int}"


def segments_of(names: Mapping[str, int], values: Sequence[int]) -> dict[str, int]:
    """All segments of a SEG, by name: the structures, whether or not they have voxels, and values that none has.

    A segment's number is its place. It is the label value where the values are 1, 2, 3 and so on; DICOM allows no gaps.

    >>> segments_of({"liver": 1, "spleen": 4}, [4, 9])
    {'liver': 1, 'spleen': 4, 'label 9': 9}
    """
    unnamed = {s.name: s.values[0] for s in structures_of_values(set(values) - set(names.values()))}
    return dict(sorted({**names, **unnamed}.items(), key=lambda entry: entry[1]))


def ordered(headers: Sequence[Dataset], images: SeriesImages) -> list[Dataset]:
    """The headers of a scan's images in the order of its slices.

    Raises:
        PacsRefused: if some are not there, or of another frame of reference than when the scan was fetched.
    """
    by_uid = {str(item.get("SOPInstanceUID")): item for item in headers}
    found = [by_uid[uid] for uid in images.instances if uid in by_uid]
    frames = {str(item.get("FrameOfReferenceUID") or "") for item in found}
    if len(found) < len(images.instances) or frames != {images.frame_of_reference_uid}:
        raise PacsRefused(f"the series {images.series_uid} holds other images in the PACS than when it was fetched")
    return found


def make_segmentation(
    images: LabelArray,
    headers: Sequence[Dataset],
    names: Mapping[str, int],
    label: LabelRecord,
    series_uid: str,
) -> bytes:
    """Write a label map as a binary SEG; an empty one has all frames of all segments, as a SEG has to have some.

    Args:
        images: the label map, (slices, rows, columns).
        headers: of the images that the slices are, in their order.
        names: the structures and their label values.
        label: the version that it is.
        series_uid: of the images.

    Returns:
        A DICOM file. Its identifiers follow from the version.

    Raises:
        ValueError: if the images' headers lack what a SEG needs.
    """
    segments = segments_of(names, sorted(values_in(images)))
    numbers = np.zeros(256, np.uint8)
    for number, value in enumerate(segments.values(), start=1):
        numbers[value] = number
    with quiet():
        item = hd.seg.Segmentation(
            source_images=list(headers),
            pixel_array=numbers[images],
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[
                _description(number, name, value, label, series_uid)
                for number, (name, value) in enumerate(segments.items(), start=1)
            ],
            series_instance_uid=uid_of(label, series_uid, "series"),
            series_number=SERIES_NUMBER,
            sop_instance_uid=uid_of(label, series_uid, "instance"),
            instance_number=1,
            manufacturer="SegQC",
            manufacturer_model_name="SegQC",
            software_versions=__version__,
            device_serial_number="0",
            series_description=f"SegQC label version {label.id}",
            content_label="SEGMENTATION",
            content_description=f"label version {label.id}",
        )
    made_at = label.made_at.astimezone()
    item.ContentDate, item.ContentTime = DA(made_at.date()), TM(made_at.time())
    item.ContentCreatorName = "".join(c for c in label.actor.name if c.isprintable() and c not in "\\^=")[:64]
    return to_bytes(item)


def to_bytes(item: Dataset) -> bytes:
    """A DICOM object that was made here as a file, whose text may be of any script.

    highdicom copies the patient's name from the images, and not the character set that it is written in.
    """
    item.SpecificCharacterSet = "ISO_IR 192"
    file = io.BytesIO()
    item.save_as(file, write_like_original=False)
    return file.getvalue()


def _description(number: int, name: str, value: int, label: LabelRecord, series_uid: str) -> hd.seg.SegmentDescription:
    kinds, by = hd.seg.SegmentAlgorithmTypeValues, _algorithm(label)
    described = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=TISSUE,
        segmented_property_type=TISSUE,
        algorithm_type=kinds.MANUAL if by is None else kinds.AUTOMATIC,
        algorithm_identification=by,
        tracking_uid=uid_of(label, series_uid, f"segment {value}"),
        tracking_id=name[:64],
    )
    described.SegmentDescription = f"label value {value}"
    described.RecommendedDisplayCIELabValue = _cielab(_COLOURS[(value - 1) % len(_COLOURS)])
    return described


def _algorithm(label: LabelRecord) -> hd.AlgorithmIdentificationSequence | None:
    """The network that has made a label version; None where a person had a hand in it."""
    if label.source not in NOT_BY_PEOPLE:
        return None
    version = label.bundle.segmenter_version if label.bundle is not None else None
    return hd.AlgorithmIdentificationSequence("SegQC segmenter", LEARNING, version or __version__)


def _cielab(colour: tuple[int, int, int]) -> list[int]:
    """A colour, 0 to 255 each, as DICOM has it: CIELab (D65), 16 bits each (PS3.3, C.10.7.1.1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    x, y, z = (
        t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116
        for t in (_TO_XYZ @ np.array(linear) / np.array(_WHITE)).tolist()
    )
    lightness, a, b = 116 * y - 16, 500 * (x - y), 200 * (y - z)
    return [round(lightness * 65535 / 100), round((a + 128) * 65535 / 255), round((b + 128) * 65535 / 255)]
