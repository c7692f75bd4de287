"""The series of a PACS as the scans of a dataset folder."""

from __future__ import annotations

import logging
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from filelock import FileLock, Timeout

from segqc.pacs.cache import ScanCache, SeriesImages
from segqc.pacs.client import FoundSeries, PacsClient
from segqc.pacs.errors import PacsRefused
from segqc.pacs.found import take_in_segmentations
from segqc.settings import Settings
from segqc.split import SplitConfig
from segqc.store import findings, pacs, scans
from segqc.store.findings import Finding, sentence_about
from segqc.store.pacs import PACS
from segqc.store.records import ScanRecord, SeriesRecord
from segqc.store.scans import Known, ScanReplaced, UnknownScan
from segqc.store.sources import ScanChanges, SourceUnavailable
from segqc.store.store import Store
from segqc.store.sync import Looked, labelled_scans, note_scans, part_from_labels, regroup
from segqc.text import nfc, printable
from segqc.volumes import (
    DicomContents,
    DicomVolume,
    Volume,
    VolumeError,
    read_dicom_volume,
    sort_into_volumes,
    visible_files,
    write_scan,
)
from segqc.volumes.dicom_headers import read_dataset
from segqc.volumes.inputs import InputFile

logger = logging.getLogger(__name__)

SUFFIX: Final = ".nii"
"""Scans are kept uncompressed: the same voxels are the same bytes, whatever library writes them."""
_BYTES_PER_VOXEL: Final = 8  # with headers; no scan within the limits needs more
_MAX_FAILED: Final = 3  # series in a row that could not be fetched: the others will not be either
_TRIES: Final = 3  # to read a file that may be removed at any moment
_OTHER_BYTES: Final = 1 << 30


class PacsScans:
    """The scans of a PACS, each with the SeriesInstanceUID of its series for a name. Threads may share it.

    What was fetched is kept as files of a cache by their content, so that a file that is there is the right one. What
    is not there is fetched again, and compared with what the store knows of it.
    """

    def __init__(self, settings: Settings, own: Path) -> None:
        """Use the PACS of some settings.

        Args:
            settings: of the dataset folder.
            own: the folder of what SegQC keeps.
        """
        self.client = PacsClient(settings.pacs)
        self.cache = ScanCache(own / "pacs", settings.pacs.cache_mb * 1e6)
        self.problem: str | None = None
        self.messages: tuple[str, ...] = ()
        self._settings = settings
        self._last_look: float | None = None
        self._now = threading.Event()
        self._passed_over: set[tuple[str, str]] = set()
        self._fresh: dict[str, str] = {}  # contents, by file, that take the place of others this moment
        self._fetching = threading.RLock()

    def look_now(self) -> None:
        """Let the next `sync` look, however short ago the last one was."""
        self._now.set()

    @property
    def remarks(self) -> list[str]:
        """What a user should know, a sentence each."""
        return [*filter(None, [self.problem]), *self.messages]

    # ------------------------------------------------------------------------------------------------------------ sync

    def sync(
        self, store: Store, split_config: SplitConfig, noted: Mapping[str, Finding], stop: Callable[[], bool]
    ) -> ScanChanges:
        """Take in series that are new or others now, and note those that are gone; see `ScanSource.sync`.

        It is done no more often than the settings say. A PACS that does not answer is logged and remarked on, and
        changes nothing.
        """
        is_due = self._last_look is None or time.monotonic() - self._last_look >= self._settings.pacs.sync_seconds
        if not (is_due or self._now.is_set()):
            return ScanChanges()
        self._now.clear()
        self._last_look = time.monotonic()
        try:
            with FileLock(store.own / "pacs-sync.lock", timeout=0):
                return self._look(store, split_config, noted, stop)
        except Timeout:  # another process does so
            return ScanChanges()

    def _look(
        self, store: Store, split_config: SplitConfig, noted: Mapping[str, Finding], stop: Callable[[], bool]
    ) -> ScanChanges:
        changes = ScanChanges()
        try:
            found = {series.series_uid: series for series in self.client.scan_series()}
            changes = self._sync(store, split_config, found, noted, stop)
            self._regroup(store, split_config, found)
            if self._settings.pacs.read_segmentations and not stop():
                take_in_segmentations(
                    store,
                    self.client,
                    self._settings,
                    noted,
                    self._passed_over,
                    stop,
                    lambda scan: self.images(store, scan).instances,
                )
        except SourceUnavailable as error:
            if str(error) != self.problem:
                logger.warning("%s", error)
            self.problem = str(error)
        else:
            self.problem = None
        return changes

    def _sync(
        self,
        store: Store,
        split_config: SplitConfig,
        found: Mapping[str, FoundSeries],
        noted: Mapping[str, Finding],
        stop: Callable[[], bool],
    ) -> ScanChanges:
        with store.read() as transaction:
            known, kept = scans.known_files(transaction), pacs.series(transaction)
        files: dict[str, list[str]] = {}
        for file, record in kept.items():
            files.setdefault(record.series_uid, []).append(file)
        refused = {(_series_of(finding), finding.signature) for finding in noted.values() if finding.kind == "scan"}
        unsettled = [
            series
            for uid, series in found.items()
            if not _is_settled([known[f] for f in files.get(uid, []) if f in known], series)
            and (uid, series.signature) not in refused
        ]
        changes = ScanChanges()
        labelled = labelled_scans(store) if unsettled else set()
        # patients of labelled scans are placed first, so that the few of the start are spread over both roles
        unsettled.sort(key=lambda s: (s.series_uid not in labelled, s.patient, s.study_uid, s.series_uid))
        failed = 0
        for done, series in enumerate(unsettled):
            if stop():
                self._now.set()  # the rest comes with the next call
                return changes
            if len(unsettled) > 1:
                logger.info("taking in series of the PACS: %d of %d", done + 1, len(unsettled))
            try:
                changes = _sum(changes, self._take_in(store, split_config, series, labelled))
                failed = 0
            except SourceUnavailable as error:  # one series must not keep all others out
                failed += 1
                if failed == _MAX_FAILED:
                    raise
                self._note_failure(store, series, error)
        gone = [f for uid, of_series in files.items() if uid not in found for f in of_series]
        over = {file for file, finding in noted.items() if finding.kind == "scan" and _series_of(finding) not in found}
        present = [file for file in gone if file in known and not known[file].missing]
        if present or over:
            with store.write() as transaction:
                missing = scans.mark_missing(transaction, present, PACS)
                findings.clear(transaction, over)
            changes = _sum(changes, ScanChanges(missing=missing))
        return changes

    def _note_failure(self, store: Store, series: FoundSeries, error: SourceUnavailable) -> None:
        """Note why a series was not fetched; it is tried again with the next look, unless it is refused here."""
        logger.warning("%s is not taken in: %s", series.shown, error)
        is_final = isinstance(error, PacsRefused) and error.code is None
        sentence = f"{series.shown} is not taken in: {error}"
        file = f"{series.series_uid}{SUFFIX}"
        with store.write() as transaction:
            found = Finding(file, "scan", sentence, series.signature if is_final else "")
            findings.record(transaction, [found], store.intake.version)

    def _take_in(
        self, store: Store, split_config: SplitConfig, series: FoundSeries, labelled: set[str] | frozenset[str]
    ) -> ScanChanges:
        """Fetch a series and write down what came of it."""
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=self.cache.staging()) as folder:
            looked, images = self._fetch(store, series, Path(folder))
        files = {look.file for look in looked}
        with store.read() as transaction:
            known = scans.known_files(transaction, files)
            before = {f for f, record in pacs.series(transaction).items() if record.series_uid == series.series_uid}
        for look in looked:
            scan = known.get(look.file)
            if look.finding is None and scan is not None and scan.sha256 not in (None, look.sha256):
                self._fresh[look.file] = look.sha256  # edited labels that fit this content are its own
                try:
                    part_from_labels(store, scan.name)
                finally:
                    del self._fresh[look.file]
        records = [
            SeriesRecord(
                file=look.file,
                study_uid=series.study_uid,
                series_uid=series.series_uid,
                description=printable(series.description),
                modality=series.modality,
                images=images,
            )
            for look in looked
            if look.finding is None
        ]
        with store.write() as transaction:
            # of a series that was several volumes some may be none any more
            missing = scans.mark_missing(transaction, before - files, PACS)
            counts = note_scans(transaction, store, looked, files, labelled, split_config, PACS)
            pacs.note_series(transaction, records)
            findings.clear(
                transaction, {f"{series.series_uid}{SUFFIX}"} - {f for f in files if _has_finding(looked, f)}
            )
        new, lost, replaced, changed = counts
        return ScanChanges(new, missing + lost, replaced, frozenset(changed))

    def _regroup(self, store: Store, split_config: SplitConfig, found: Mapping[str, FoundSeries]) -> None:
        """Follow the PACS where it names another patient for a series by now, as far as that can be."""
        with store.read() as transaction:
            of_file = {file: record.series_uid for file, record in pacs.series(transaction).items()}
            listed = scans.listing(transaction)
        now = {
            scan.file: self._patient(scan.name, found[uid])
            for scan in listed
            if scan.former_name is None and (uid := of_file.get(scan.file)) in found and uid is not None
        }
        self.messages = ()
        if any(now.get(scan.file, scan.patient) != scan.patient for scan in listed):
            self.messages = tuple(regroup(store, lambda path, patient: now.get(path.name, patient), split_config))

    def _patient(self, name: str, series: FoundSeries) -> str:
        """The patient that a scan is of: by the table ``[patients]``, else by the PACS."""
        named = self._settings.named_patient(name)
        return named or nfc(series.patient) or series.study_uid

    # ----------------------------------------------------------------------------------------------------------- files

    def is_unchanged(self, store: Store, scan: ScanRecord, split_config: SplitConfig) -> bool:
        """Tell whether a scan is there with its content; see `ScanSource.is_unchanged`.

        A content that is in the cache counts as unchanged until the PACS is looked through again.
        """
        if scan.former_name is not None:
            return False
        if scan.missing_since is None and self.cache.find(scan.sha256 or "", scan.file) is not None:
            return True
        self._look_at(store, scan, split_config)
        with store.read() as transaction:
            now = scans.get(transaction, scan.name)
        return now.missing_since is None and (now.id, now.sha256) == (scan.id, scan.sha256)

    def file(self, store: Store, scan: ScanRecord) -> Path:
        """The file of a scan; see `ScanSource.file`."""
        sha256 = self._fresh.get(scan.file, scan.sha256 or "")
        for _ in range(_TRIES):
            found = self.cache.find(sha256, scan.file)
            if found is None:
                with self._fetching:  # whoever waited here finds what another one has fetched
                    found = self.cache.find(sha256, scan.file) or self._fetch_again(store, scan)
            if found is not None:
                return found
        raise PacsRefused(f"{self.cache.staging()}: is emptied all the time; let its files be for some seconds")

    def images(self, store: Store, scan: ScanRecord) -> SeriesImages:
        """The images that a scan's slices are; fails as `file` does."""
        for _ in range(_TRIES):
            try:
                return self.cache.images(self.file(store, scan))
            except FileNotFoundError:  # removed this moment
                continue
        raise PacsRefused(
            f"{self.cache.staging()}: is emptied all the time; let the files of scans be for some seconds"
        )

    def _fetch_again(self, store: Store, scan: ScanRecord) -> Path | None:
        """Fetch the series of a scan and take in what it is now; its file, or None where that was removed meanwhile.

        Raises:
            UnknownScan: if the series is gone.
            ScanReplaced: if it has other images.
            SourceUnavailable: if it is not to be had now.
        """
        self._look_at(store, scan, self._settings.split_config())
        with store.read() as transaction:
            now = scans.get(transaction, scan.name)
        if scan.former_name is None and now.missing_since is not None:
            raise UnknownScan(f"the series of the scan {scan.name!r} is gone from the PACS; see 'segqc scans'")
        if (now.id, now.sha256) != (scan.id, scan.sha256) or now.missing_since is not None:
            raise ScanReplaced(f"the scan {scan.name!r} holds other images in the PACS now; do this again")
        return self.cache.find(scan.sha256 or "", scan.file)

    def _look_at(self, store: Store, scan: ScanRecord, split_config: SplitConfig) -> None:
        """Fetch the series of a scan, and take in what it is now."""
        if scan.former_name is not None:
            return
        with store.read() as transaction:
            record = pacs.series_of(transaction, scan.file)
        series = self.client.find_series(record.series_uid) if record is not None else None
        if series is None:
            with store.write() as transaction:
                scans.mark_missing(transaction, [scan.file], PACS)
        else:
            self._take_in(store, split_config, series, frozenset())

    def _fetch(self, store: Store, series: FoundSeries, folder: Path) -> tuple[list[Looked], int]:
        """Fetch a series and make a file of each of its volumes; a series without one is a finding.

        Returns:
            What came of it, and how many images the series has.
        """
        limits = self._settings.intake
        slices, made = folder / "slices", folder / "made"
        slices.mkdir()
        made.mkdir()
        images = self.client.fetch_series(
            series.study_uid, series.series_uid, slices, limits.max_voxels * _BYTES_PER_VOXEL + _OTHER_BYTES
        )
        shown = InputFile(slices, limits, series.shown)
        try:
            contents = sort_into_volumes(visible_files(slices), tick=shown.check_time)
        except VolumeError as error:
            return [_finding(series, f"{series.series_uid}{SUFFIX}", str(error))], images
        fetched = [self._volume(store, series, volume, contents, slices, made) for volume in contents.volumes]
        if fetched:
            return fetched, images
        left = sorted(contents.left_out, key=lambda entry: not entry.are_images)
        reason = left[0].reason if left else "holds no DICOM images."
        return [_finding(series, f"{series.series_uid}{SUFFIX}", f"{series.shown} {printable(reason)}")], images

    def _volume(
        self, store: Store, series: FoundSeries, volume: DicomVolume, contents: DicomContents, slices: Path, made: Path
    ) -> Looked:
        part = f"_{re.sub(r'[^A-Za-z0-9]+', '-', volume.part)}" if volume.part else ""
        name = f"{series.series_uid}{part}"
        path = made / f"{name}{SUFFIX}"
        shown = f"{series.shown}, {volume.part}," if volume.part else series.shown
        try:
            write_scan(_stored(read_dicom_volume(volume, InputFile(slices, self._settings.intake, shown))), path)
            content = store.intake.scan(path, shown)
            images = _images(series, volume)
        except Exception as error:  # one series must not keep all others out, whatever is wrong with it
            return _finding(series, path.name, sentence_about(path, shown, error))
        left = [entry for entry in contents.left_out if entry.are_images]
        remarks = [f"{series.shown}: {len(entry.files)} of its images are not used: {entry.reason}" for entry in left]
        self.cache.put(path, images, content.sha256)
        return Looked(
            path.name,
            series.signature,
            content.sha256,
            self._patient(name, series),
            (*content.warnings, *map(printable, remarks)),
            content.appearance,
        )


def _finding(series: FoundSeries, file: str, sentence: str) -> Looked:
    return Looked(file, series.signature, finding=Finding(file, "scan", sentence, series.signature))


def _has_finding(looked: Sequence[Looked], file: str) -> bool:
    return any(look.file == file and look.finding is not None for look in looked)


def _series_of(finding: Finding) -> str:
    """The series that was not taken in, or a volume of it."""
    return finding.file.removesuffix(SUFFIX).partition("_")[0]


def _is_settled(known: Sequence[Known], series: FoundSeries) -> bool:
    """Whether all volumes of a series were taken in as the series is now."""
    return bool(known) and all(not scan.missing and scan.signature == series.signature for scan in known)


def _sum(one: ScanChanges, other: ScanChanges) -> ScanChanges:
    return ScanChanges(
        one.new + other.new,
        one.missing + other.missing,
        one.replaced + other.replaced,
        one.changed | other.changed,
    )


def _stored(volume: Volume) -> Volume:
    """The same volume in 16 bits where its intensities are whole numbers that fit, as most scanners' are."""
    low, high = float(volume.array.min()), float(volume.array.max())
    if low >= -32768 and high <= 32767 and np.array_equal(volume.array, np.rint(volume.array)):
        return replace(volume, array=volume.array.astype(np.int16))
    return volume


def _images(series: FoundSeries, volume: DicomVolume) -> SeriesImages:
    """What the slices of a volume were.

    Raises:
        VolumeError: if they do not say it.
    """
    read = [read_dataset(file, pixels=False) for file in volume.files]
    first = read[0]
    frames = {str(item.get("FrameOfReferenceUID") or "") for item in read}
    if len(frames) > 1:
        raise VolumeError(f"{series.shown} has slices of {len(frames)} frames of reference; give one stack.")
    return SeriesImages(
        study_uid=series.study_uid,
        series_uid=series.series_uid,
        frame_of_reference_uid=frames.pop(),
        instances=tuple(str(item.SOPInstanceUID) for item in read),
        patient=str(first.get("PatientID") or ""),
        modality=str(first.get("Modality") or ""),
    )
