"""Error maps and estimates of masks as DICOM objects, for scans that come from a PACS."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segqc.loop.dataset import Dataset, DatasetError
from segqc.loop.scoring import assess, current_mask, origin_of
from segqc.networks.model_file import ModelError
from segqc.progress import NO_PROGRESS, Progress
from segqc.store.scans import ScanReplaced, UnknownScan
from segqc.volumes import VolumeError, atomic_write

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReportCount:
    """What was written, and why other scans were left out."""

    reports: int
    error_maps: int
    left_out: dict[str, str]


def write_reports(
    dataset: Dataset, target: Path, names: Sequence[str] = (), *, store: bool = False, progress: Progress = NO_PROGRESS
) -> ReportCount:
    """Assess the masks of scans, and write for each its estimates (TID 1500) and its error maps (fractional SEG).

    A mask without an error has no error map. Objects have the same identifiers whenever the same mask is assessed by
    the same network.

    Args:
        dataset: a folder whose scans come from a PACS.
        target: the folder to write ``<scan>_estimates.dcm`` and ``<scan>_errors.dcm`` to.
        names: of the scans; by default all that wait for a label.
        store: whether to store them in the PACS, too.
        progress: called for each scan.

    Raises:
        DatasetError: if the scans are files of the folder, or there is no scan of a name.
        ModelError: if there are no networks yet.
        SourceUnavailable: if the PACS does not answer.
    """
    source = dataset.pacs
    if source is None:
        raise DatasetError(f"{dataset.folder}: its scans come from no PACS, and so have no images to refer to")
    from segqc.pacs.reports import make_error_maps, make_report
    from segqc.pacs.segmentation import ordered

    bundle = dataset.bundle()
    if bundle is None or not (bundle.holds("segmentation") and bundle.holds("segqc")):
        raise ModelError("estimates need both networks; train them first (segqc train)")
    entries = [dataset.scan(name) for name in names] or dataset.waiting()
    reports = maps = 0
    left_out: dict[str, str] = {}
    for done, entry in enumerate(entries):
        progress.step(done, len(entries), "assessing", entry.id)
        try:
            scan = dataset.read_scan(entry)
            mask, labels, prediction = current_mask(dataset, entry, scan, bundle)
            result = assess(bundle, scan, labels, prediction, scan_id=entry.id, origin=origin_of(dataset, mask, scan))
            images = source.images(dataset.store, dataset.verify_scan(entry.id))
            headers = ordered(source.client.series_metadata(images.study_uid, images.series_uid), images)
            found = {
                "estimates": make_report(headers, result.assessment, images.series_uid),
                "errors": make_error_maps(result.errors, headers, result.assessment, images.series_uid),
            }
        except (VolumeError, ScanReplaced, UnknownScan, ValueError, OSError) as error:
            logger.warning("%s is left out: %s", entry.id, error)
            left_out[entry.id] = str(error)
            continue
        for what, content in found.items():
            if content is None:
                continue
            with atomic_write(target / f"{entry.id}_{what}.dcm") as temporary:
                temporary.write_bytes(content)
            if store:
                source.client.store(content)
        reports, maps = reports + 1, maps + (found["errors"] is not None)
    progress.step(len(entries), len(entries), "assessing", "done")
    return ReportCount(reports, maps, left_out)
