"""Segmentations that others have stored in the PACS, taken in as labels of the scans that they are of."""

from __future__ import annotations

import datetime as dt
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from segqc.pacs.client import FoundSeries, PacsClient
from segqc.pacs.errors import PacsRefused
from segqc.settings import Settings
from segqc.store import findings, labels, pacs, scans
from segqc.store.findings import Finding, is_still, sentence_about
from segqc.store.labels import FINAL, ORIGINAL, NewLabel
from segqc.store.pacs import PACS
from segqc.store.records import ScanRecord
from segqc.store.sources import SourceUnavailable
from segqc.store.store import LabelChange, Store
from segqc.types import label_names
from segqc.volumes import VolumeError, read_grid, temporary_labels
from segqc.volumes.dicom_seg import (
    SEGMENTATION_SUFFIX,
    SegmentationHeader,
    open_segmentation,
    read_segmentation_header,
    values_of,
)
from segqc.volumes.inputs import InputFile
from segqc.volumes.labelmaps import load_labels

logger = logging.getLogger(__name__)

_MAX_BYTES: Final = 1 << 30


def take_in_segmentations(
    store: Store,
    client: PacsClient,
    settings: Settings,
    noted: Mapping[str, Finding],
    passed_over: set[tuple[str, str]],
    stop: Callable[[], bool],
    images_of: Callable[[ScanRecord], Sequence[str]],
) -> None:
    """Make label versions of the SEGs of the scans' studies that nobody here has made or taken in.

    Those that a person had a hand in become final labels, those of a program alone masks to start from, as the files
    below ``labels/`` do. One that is older than the label that a scan has is left alone, and so is a program's
    fractional one, which is a map and no label. What cannot be a label is noted with a sentence.

    Args:
        store: the store.
        client: the PACS.
        settings: of the folder.
        noted: what was not taken in before, by file.
        passed_over: series that are of no scan, with their signatures; more are added.
        stop: asked after each series whether to leave the rest for the next time.
        images_of: tells the SOPInstanceUIDs of a scan's slices.

    Raises:
        SourceUnavailable: if the PACS does not answer.
    """
    with store.read() as transaction:
        known = pacs.known_segmentations(transaction)
        studies = {record.study_uid for record in pacs.readable_series(transaction).values()}
    found = [series for series in client.search("SEG", patient=settings.pacs.patient) if series.study_uid in studies]
    for series in found:
        key = (series.series_uid, series.signature)
        is_new = series.series_uid not in known and key not in passed_over
        if not is_new or is_still(noted, f"{series.series_uid}{SEGMENTATION_SUFFIX}", series.signature):
            continue
        if stop():
            return
        try:
            _take_in(store, client, settings, series, images_of)
        except PacsRefused as error:  # one must not keep all others out
            logger.warning("%s is not taken in: %s", series.shown, error)
        passed_over.add(key)
    over = {f for f in noted if f.endswith(SEGMENTATION_SUFFIX) and "/" not in f} - {
        f"{s.series_uid}{SEGMENTATION_SUFFIX}" for s in found
    }
    if over:
        with store.write() as transaction:
            findings.clear(transaction, over)


def _take_in(
    store: Store,
    client: PacsClient,
    settings: Settings,
    series: FoundSeries,
    images_of: Callable[[ScanRecord], Sequence[str]],
) -> None:
    finding = None
    with tempfile.TemporaryDirectory(prefix="segqc-") as folder:
        client.fetch_series(series.study_uid, series.series_uid, Path(folder), _MAX_BYTES)
        read: list[tuple[SegmentationHeader, Path]] = []
        for path in sorted(Path(folder).iterdir()):
            try:
                read.append((read_segmentation_header(path), path))
            except VolumeError as error:
                finding = sentence_about(path, series.shown, error)
        for header, path in sorted(read, key=lambda entry: (entry[0].made_at, entry[1])):
            try:
                scan = _scan_of(store, header, images_of)
                if scan is not None:
                    _save(store, settings, series, scan, header, path)
            except SourceUnavailable:
                raise
            except Exception as error:  # one file must not keep all others out, whatever is wrong with it
                finding = sentence_about(path, series.shown, error)
    file = f"{series.series_uid}{SEGMENTATION_SUFFIX}"
    with store.write() as transaction:
        if finding is None:
            findings.clear(transaction, [file])
        else:
            findings.record(transaction, [Finding(file, "label", finding, series.signature)], store.intake.version)


def _scan_of(
    store: Store, header: SegmentationHeader, images_of: Callable[[ScanRecord], Sequence[str]]
) -> ScanRecord | None:
    """The scan that a SEG is of; None where it is of none. Of several volumes of a series the images tell."""
    with store.read() as transaction:
        files = {f for f, record in pacs.series(transaction).items() if record.series_uid in header.series}
        there = [s for s in scans.listing(transaction) if s.file in files and s.missing_since is None]
    if len(there) <= 1:
        return there[0] if there else None
    shared = {scan.name: len(header.images.intersection(images_of(scan))) for scan in there}
    best = max(there, key=lambda scan: shared[scan.name])
    if not shared[best.name]:
        raise VolumeError("names none of the images of its series, which holds several volumes; store it with them.")
    return best


def _save(
    store: Store, settings: Settings, series: FoundSeries, scan: ScanRecord, header: SegmentationHeader, path: Path
) -> None:
    if header.is_automatic and header.is_fractional:
        return
    tag = ORIGINAL if header.is_automatic else FINAL
    with store.read() as transaction:
        last = labels.current(transaction, scan.name, tag)
    if last is not None and not _is_later(header.made_at, last.made_at):
        logger.info("%s: is older than the label of the scan, which stays", series.shown)
        return
    names = label_names(settings.structure_list())
    file = InputFile(path, settings.intake, series.shown)
    grid = read_grid(store.scan_file(scan), limits=settings.intake)
    opened = open_segmentation(file, grid)
    by_name = names or values_of(opened.segments or (), {})
    read = load_labels(file, opened, grid, tuple(names.values()) or None, by_name)
    label = NewLabel(scan.name, tag, "import", PACS, scan_sha256=scan.sha256)
    with temporary_labels(read.volume) as source, store.change_labels([LabelChange(label, source)]) as change:
        pacs.found(change.transaction, change.versions[0].id, series.study_uid, series.series_uid)


def _is_later(made_at: str, than: dt.datetime) -> bool:
    """Whether a SEG was made after a label; what says no time was not. DICOM's times are the local ones."""
    try:
        return dt.datetime.strptime(made_at[:14], "%Y%m%d%H%M%S").astimezone() > than
    except ValueError:
        return False
