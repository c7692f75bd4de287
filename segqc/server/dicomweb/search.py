"""What there is to be found: scans as studies and series, and their slices, with what QIDO-RS tells of each."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from segqc.errors import SegqcError
from segqc.server.dicomweb.archive import Archive
from segqc.server.dicomweb.query import Found
from segqc.server.dicomweb.series import Attributes, DicomScan, ScanHeader

logger = logging.getLogger(__name__)

# What is told of each level without being asked for (DICOM PS3.18, 10.6.3.3).
OF_STUDY: Final = frozenset({
    "SpecificCharacterSet", "StudyDate", "StudyTime", "AccessionNumber", "InstanceAvailability", "ModalitiesInStudy",
    "ReferringPhysicianName", "RetrieveURL", "PatientName", "PatientID", "PatientBirthDate", "PatientSex",
    "StudyInstanceUID", "StudyID", "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances",
})  # fmt: skip
OF_SERIES: Final = frozenset({
    "SpecificCharacterSet", "Modality", "SeriesDescription", "RetrieveURL", "StudyInstanceUID", "SeriesInstanceUID",
    "SeriesNumber", "NumberOfSeriesRelatedInstances",
})  # fmt: skip
OF_INSTANCE: Final = frozenset({
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "InstanceAvailability", "RetrieveURL", "StudyInstanceUID",
    "SeriesInstanceUID", "InstanceNumber", "Rows", "Columns", "BitsAllocated",
})  # fmt: skip


def found_studies(archive: Archive, scans: Iterable[DicomScan], address: str) -> Iterator[Found]:
    """Scans as studies."""
    for scan in scans:
        known = {**scan.study(), "RetrieveURL": study_address(address, scan)}
        yield known, functools.partial(_described, archive, scan, known, _study)


def found_series(archive: Archive, scans: Iterable[DicomScan], address: str) -> Iterator[Found]:
    """The series of scans."""
    for scan in scans:
        known = {**scan.study(), "SeriesInstanceUID": scan.series_uid, "RetrieveURL": series_address(address, scan)}
        yield known, functools.partial(_described, archive, scan, known, _series)


def found_slices(archive: Archive, scans: Iterable[DicomScan], address: str) -> Iterator[Found]:
    """The slices of scans; those of a scan whose file is gone meanwhile are left out."""
    for scan in scans:
        try:
            header = archive.header(scan)
        except SegqcError as error:
            logger.warning("left out of a search: %s", error)
            continue
        common = {**{item.keyword: item.value for item in header.images()}, **_series(header), "BitsAllocated": 16}
        for instance, index in header.instances.items():
            own = {item.keyword: item.value for item in header.image(index)}
            known = {**common, **own, "RetrieveURL": f"{series_address(address, scan)}/instances/{instance}"}
            yield known, functools.partial(dict, known)


def study_address(address: str, scan: DicomScan) -> str:
    """Where a scan's study is, below the address of all."""
    return f"{address}/studies/{scan.study_uid}"


def series_address(address: str, scan: DicomScan) -> str:
    """Where a scan's series is."""
    return f"{study_address(address, scan)}/series/{scan.series_uid}"


def _described(
    archive: Archive, scan: DicomScan, known: Attributes, more: Callable[[ScanHeader], Attributes]
) -> Attributes:
    return {**known, **more(archive.header(scan))}


def _study(header: ScanHeader) -> Attributes:
    return {
        "InstanceAvailability": "ONLINE",
        "ModalitiesInStudy": [header.modality],
        "NumberOfStudyRelatedSeries": 1,
        "NumberOfStudyRelatedInstances": header.count,
    }


def _series(header: ScanHeader) -> Attributes:
    own = header.scan.series(header.modality)
    return {**_study(header), **own, "NumberOfSeriesRelatedInstances": header.count}
