"""Label versions as DICOM segmentations of their scans' images, and whether one that is sent is of its scan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydicom.dataset import Dataset as DicomDataset

from segqc.loop.dataset import Dataset
from segqc.pacs.segmentation import make_segmentation, ordered
from segqc.server.dicomweb.archive import Archive
from segqc.server.dicomweb.series import IMAGES, DicomScan
from segqc.server.errors import RequestError
from segqc.store.records import LabelRecord
from segqc.types import LabelArray
from segqc.volumes import VolumeError
from segqc.volumes.dicom_seg import read_segmentation_header


def to_segmentation(
    dataset: Dataset, archive: Archive, scan: DicomScan, label: LabelRecord, names: Mapping[str, int]
) -> bytes:
    """A label version as a DICOM SEG: of the images in the PACS, else of those that are served here.

    Args:
        dataset: the dataset folder.
        archive: its scans.
        scan: the scan.
        label: a version of its label that has content.
        names: the structures and their label values.

    Returns:
        A DICOM file.

    Raises:
        RequestError: 404 if the scan's file is gone; 409 if its images' headers lack what a SEG needs.
        SourceUnavailable: if the PACS does not answer, or holds other images by now.
    """
    array = dataset.store.read_label(label).array
    images, headers = _images(dataset, archive, scan, array)
    try:
        return make_segmentation(images, headers, names, label, str(headers[0].SeriesInstanceUID))
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # as many kinds as headers have gaps
        raise RequestError(
            409, f"no DICOM SEG can be made of the images of {scan.record.name!r} ({error}); take NIfTI or NRRD."
        ) from error


def _images(
    dataset: Dataset, archive: Archive, scan: DicomScan, array: LabelArray
) -> tuple[LabelArray, Sequence[DicomDataset]]:
    """A label map image by image, and the headers of the scan's images."""
    if dataset.pacs is not None and scan.source is not None:
        source = scan.source
        there = dataset.pacs.client.series_metadata(source.study_uid, source.series_uid)
        return IMAGES.to_images(array), ordered(there, source)
    header = archive.header(scan)
    headers = [header.images() for _ in range(header.count)]
    for index, item in enumerate(headers):
        item.update(header.image(index))
    return header.layout.to_images(array), headers


def check_segmentation(archive: Archive, scan: DicomScan, path: Path) -> None:
    """Refuse a SEG that names the images of another scan of the folder; one of other programs' images may be of any.

    Raises:
        RequestError: 422 if it is another scan's, or no SEG.
    """
    try:
        header = read_segmentation_header(path)
    except VolumeError as error:
        raise RequestError(422, str(error).replace(path.name, "the submitted label map")) from error
    named = sorted({name for uid in header.series for name in archive.names(uid)})
    if named and scan.record.name not in named:
        raise RequestError(422, f"the submitted SEG names the images of the scan {named[0]!r}; upload it there.")
    if len(named) > 1 and header.images and header.images.isdisjoint(archive.header(scan).instances):
        raise RequestError(422, "the submitted SEG names images of another scan of its series; upload it there.")
