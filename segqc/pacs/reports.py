"""What SegQC-Net says of a mask as DICOM objects: its error maps as a fractional SEG, its estimates as a report.

A fractional SEG has a segment for each structure, as the SEG of a label has, and a tenth of a parametric map's bytes.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import highdicom as hd
import numpy as np
from pydicom.sr.coding import Code

from segqc import __version__
from segqc.pacs.segmentation import LEARNING, TISSUE, quiet, to_bytes
from segqc.types import Assessment, FloatArray, StructureQuality

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_NAMESPACE: Final = uuid.UUID("7f8b9bb2-26f5-5a0f-8a35-1d6f5e2b8f0d")
_SCHEME: Final = "99SEGQC"
_STEPS: Final = 255
_ERRORS_NUMBER: Final = 901
_REPORT_NUMBER: Final = 902
_NO_UNIT: Final = Code("1", "UCUM", "no units")
_MILLILITRE: Final = Code("ml", "UCUM", "milliliter")
_DEVICE: Final = Code("121007", "DCM", "Device")
_MEASUREMENTS: Final = Code("126000", "DCM", "Imaging Measurement Report")
_IMAGING: Final = Code("363679005", "SCT", "Imaging")


def uid_of(assessment: Assessment, series_uid: str, what: str) -> str:
    """An identifier that follows from an assessment: whoever exports it again makes the same."""
    basis = f"{assessment.mask_sha256} {assessment.assessor_version} {assessment.mask_kind} {series_uid} {what}"
    return f"2.25.{uuid.uuid5(_NAMESPACE, basis).int}"


def make_error_maps(
    errors: FloatArray, headers: Sequence[Dataset], assessment: Assessment, series_uid: str
) -> bytes | None:
    """Write error maps as a fractional SEG of probabilities, in steps of a 255th.

    Args:
        errors: (structures, columns, rows, slices), from 0 to 1.
        headers: of the images that the slices are, in their order.
        assessment: that was read off them; it names the structures.
        series_uid: of the images.

    Returns:
        A DICOM file; None where no voxel is a step or more.

    Raises:
        ValueError: if the images' headers lack what a SEG needs.
    """
    steps = np.rint(errors * _STEPS)
    if not steps.any():
        return None
    by = hd.AlgorithmIdentificationSequence("SegQC-Net", LEARNING, assessment.assessor_version)
    with quiet():
        item = hd.seg.Segmentation(
            source_images=list(headers),
            pixel_array=np.ascontiguousarray((steps / _STEPS).astype(np.float32).transpose(3, 2, 1, 0)),
            segmentation_type=hd.seg.SegmentationTypeValues.FRACTIONAL,
            fractional_type=hd.seg.SegmentationFractionalTypeValues.PROBABILITY,
            max_fractional_value=_STEPS,
            segment_descriptions=[
                hd.seg.SegmentDescription(
                    segment_number=number,
                    segment_label=f"errors of {quality.name}"[:64],
                    segmented_property_category=TISSUE,
                    segmented_property_type=TISSUE,
                    algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                    algorithm_identification=by,
                )
                for number, quality in enumerate(assessment.structures, start=1)
            ],
            series_instance_uid=uid_of(assessment, series_uid, "errors"),
            series_number=_ERRORS_NUMBER,
            sop_instance_uid=uid_of(assessment, series_uid, "errors instance"),
            instance_number=1,
            manufacturer="SegQC",
            manufacturer_model_name="SegQC-Net",
            software_versions=__version__,
            device_serial_number="0",
            series_description="SegQC error probabilities",
        )
    return to_bytes(item)


def make_report(headers: Sequence[Dataset], assessment: Assessment, series_uid: str) -> bytes:
    """Write the estimates of an assessment as a measurement report (TID 1500), a group for each structure.

    Args:
        headers: of the scan's images.
        assessment: the estimates.
        series_uid: of the images.

    Returns:
        A DICOM file.

    Raises:
        ValueError: if the images' headers lack what a report needs.
    """
    device = hd.sr.DeviceObserverIdentifyingAttributes(
        uid=uid_of(assessment, "", "device"), name="SegQC", model_name="SegQC-Net",
        serial_number=assessment.assessor_version[:64],
    )  # fmt: skip
    observer = hd.sr.ObserverContext(hd.sr.CodedConcept.from_code(_DEVICE), device)
    with quiet():
        report = hd.sr.MeasurementReport(
            observation_context=hd.sr.ObservationContext(observer_device_context=observer),
            procedure_reported=_IMAGING,
            imaging_measurements=[
                hd.sr.MeasurementsAndQualitativeEvaluations(
                    tracking_identifier=hd.sr.TrackingIdentifier(
                        uid_of(assessment, series_uid, f"structure {quality.name}"), quality.name
                    ),
                    measurements=_measurements(quality),
                )
                for quality in assessment.structures
            ],
            title=_MEASUREMENTS,
        )
        item = hd.sr.ComprehensiveSR(
            evidence=list(headers),
            content=report[0],
            series_instance_uid=uid_of(assessment, series_uid, "report"),
            series_number=_REPORT_NUMBER,
            sop_instance_uid=uid_of(assessment, series_uid, "report instance"),
            instance_number=1,
            manufacturer="SegQC",
            is_complete=True,
            is_final=True,
            record_evidence=True,
            series_description="SegQC estimates",
        )
    return to_bytes(item)


def _measurements(quality: StructureQuality) -> list[hd.sr.Measurement]:
    """Estimates and the ends of their intervals; what is undefined is left out."""
    found: list[tuple[str, str, float | None, Code]] = []
    intervals = quality.intervals
    for code, name, value, interval in (
        ("DICE", "Dice", quality.estimated.dice, intervals.dice),
        ("IOU", "IoU", quality.estimated.iou, intervals.iou),
        ("ARVD", "ARVD", quality.estimated.arvd, intervals.arvd),
        ("RVD", "RVD", quality.estimated.rvd, intervals.rvd),
    ):
        found.append((code, f"Estimated {name}", value, _NO_UNIT))
        if interval is not None and interval.applies:
            ends = f"prediction interval of {interval.level:.0%}"
            found.append((f"{code}_LOW", f"Lower end of {name}, {ends}", interval.low, _NO_UNIT))
            found.append((f"{code}_HIGH", f"Upper end of {name}, {ends}", interval.high, _NO_UNIT))
    found.append(("MASK_VOLUME", "Volume of the mask", quality.mask_volume_ml, _MILLILITRE))
    return [
        hd.sr.Measurement(hd.sr.CodedConcept(code, _SCHEME, name[:64]), value, unit)
        for code, name, value, unit in found
        if value is not None
    ]
