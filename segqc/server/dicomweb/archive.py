"""The scans of a dataset folder by DICOM's identifiers, and their images as long as memory allows."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Final

from segqc.loop.dataset import Dataset
from segqc.server.dicomweb.cache import BoundedCache
from segqc.server.dicomweb.series import DicomScan, ScanHeader, ScanImages
from segqc.server.errors import RequestError
from segqc.store import pacs, scans
from segqc.store.records import ScanRecord
from segqc.store.scans import UnknownScan
from segqc.volumes import VolumeError, read_grid, read_scan
from segqc.volumes.tags import read_tag

_MAX_HEADERS: Final = 20_000
_READ_AT_ONCE: Final = 2  # whole scans: each takes several times its voxels' memory meanwhile


class Archive:
    """A dataset folder's scans as DICOM. Threads may share it."""

    def __init__(self, dataset: Dataset, cache_bytes: float) -> None:
        """Serve a folder.

        Args:
            dataset: the folder.
            cache_bytes: of images that are kept in memory.
        """
        self._dataset = dataset
        self._headers: BoundedCache[tuple[str, str | None], ScanHeader] = BoundedCache(_MAX_HEADERS)
        self._images: BoundedCache[str, ScanImages] = BoundedCache(cache_bytes, lambda images: images.size_bytes)
        self._reading = threading.Semaphore(_READ_AT_ONCE)
        self._names: dict[str, str] = {}

    def scans(self) -> list[DicomScan]:
        """All scans whose files are there, in the order of their names."""
        with self._dataset.store.read() as transaction:
            found = scans.listing(transaction)
        return [DicomScan(scan) for scan in found if scan.missing_since is None and scan.sha256 is not None]

    def named(self, name: str) -> DicomScan:
        """The scan of a name, whose file was just seen to hold its content.

        Raises:
            UnknownScan: if there is none, or its file is gone.
        """
        return self.scan_of(self._dataset.verify_scan(name))

    def scan_of(self, record: ScanRecord) -> DicomScan:
        """A scan that was just looked up, by DICOM's identifiers.

        Raises:
            UnknownScan: if its images are gone from the PACS.
            SourceUnavailable: if they are not to be had from there now.
        """
        source = self._dataset.pacs
        return DicomScan(record, None if source is None else source.images(self._dataset.store, record))

    def study(self, uid: str) -> DicomScan:
        """The scan that is a study, whose file was just seen to hold its content.

        Raises:
            RequestError: 404 if there is none, or its file is gone or holds another content by now.
        """
        scan = self.scan(uid)
        if scan.study_uid != uid:
            raise unknown("study", uid)
        return scan

    def scan(self, uid: str) -> DicomScan:
        """The scan of a series, or of a study, as `study` gives it.

        Raises:
            RequestError: 404 if there is none, or its file is gone or holds another content by now; 409 if a study of a
                PACS holds several.
        """
        if self._dataset.pacs is not None:
            return self._of_pacs(uid)
        names = self.names(uid)
        try:
            scan = self.named(names[0]) if names else None
        except UnknownScan:
            scan = None
        if scan is None or uid not in (scan.study_uid, scan.series_uid):
            raise unknown("study", uid)
        return scan

    def names(self, uid: str) -> list[str]:
        """The names of the scans that are a series or a study, by its identifier."""
        if self._dataset.pacs is not None:
            with self._dataset.store.read() as transaction:
                return pacs.scans_of(transaction, uid)
        if uid not in self._names:
            self._names = {name: s.record.name for s in self.scans() for name in (s.study_uid, s.series_uid)}
        return [self._names[uid]] if uid in self._names else []

    def replaced(self, uid: str) -> str | None:
        """The name of the scan that a series or study was until another content took the place of its file."""
        with self._dataset.store.read() as transaction:
            retired = [scan for scan in scans.listing(transaction) if scan.former_name is not None]
        for scan in retired:
            before = DicomScan(replace(scan, name=scan.former_name or ""))
            if uid in (before.study_uid, before.series_uid):
                return scan.former_name
        return None

    def _of_pacs(self, uid: str) -> DicomScan:
        names = self.names(uid)
        if len(names) > 1:
            raise RequestError(
                409, f"{uid[:80]} holds {len(names)} scans; name the series of one, or take the next scan."
            )
        try:
            return self.named(names[0])
        except (IndexError, UnknownScan) as error:
            raise unknown("study", uid) from error

    def header(self, scan: DicomScan) -> ScanHeader:
        """What a scan's file says before its voxels are read.

        Raises:
            RequestError: 404 if the file is gone or holds another content by now.
            VolumeError: if it cannot be read.
        """
        header = self._headers.get((scan.record.name, scan.record.sha256), lambda: self._read_header(scan))
        return replace(header, scan=scan)  # the store may know another patient by now

    def images(self, scan: DicomScan) -> ScanImages:
        """A scan's images; fails as `header` does."""
        return self._images.get(scan.record.sha256 or "", lambda: self._read_images(scan))

    def _read_header(self, scan: DicomScan) -> ScanHeader:
        path = self._dataset.scan_file(scan.record)
        try:
            grid = read_grid(path, limits=self._dataset.settings.intake)
        except VolumeError:
            self._expect(scan)
            raise
        try:
            modality = read_tag(path, "Modality")
        except VolumeError:  # of the side-car: the scan itself can be shown
            modality = None
        self._expect(scan)
        return ScanHeader.of(scan, grid, modality)

    def _read_images(self, scan: DicomScan) -> ScanImages:
        path = self._dataset.scan_file(scan.record)
        with self._reading:
            try:
                volume = read_scan(path, limits=self._dataset.settings.intake, memory_order="K")
            except VolumeError:
                self._expect(scan)
                raise
            self._expect(scan)
            return ScanImages.of(volume, self.header(scan).layout)

    def _expect(self, scan: DicomScan) -> None:
        """Refuse a scan whose file is gone or holds another content than it did."""
        try:
            now = self._dataset.verify(scan.record)
        except UnknownScan as error:
            raise unknown("study", scan.study_uid) from error
        if now.sha256 != scan.record.sha256:
            raise unknown("study", scan.study_uid)


def unknown(what: str, uid: str) -> RequestError:
    """The error of an identifier that leads to nothing."""
    return RequestError(
        404, f"there is no {what} {uid[:80]!r}; if it was there before, its file is gone or was replaced: search again."
    )
