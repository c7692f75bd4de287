"""What the page of a scan shows: the scan, the label versions that are drawn, and what is likely to be wrong."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, TypeAlias

import numpy as np

from segqc.errors import SegqcError
from segqc.loop import error_maps
from segqc.loop.error_maps import ErrorSteps
from segqc.loop.history import VersionSummary, versions
from segqc.loop.scoring import error_map
from segqc.networks.bundle import NetworkBundle
from segqc.networks.model_file import ModelError
from segqc.server.context import AppContext
from segqc.server.dicomweb.cache import BoundedCache
from segqc.server.dicomweb.series import DicomScan, ScanHeader
from segqc.server.errors import RequestError
from segqc.server.pages.in_pacs import version_standings
from segqc.server.pages.pictures import Part, ShownSlices, part_of
from segqc.store import assessments, bundles, events, labels, leases, pacs, scans
from segqc.store.labels import FINAL, PROPOSAL
from segqc.store.queue import ShownState, shown_state
from segqc.store.records import EventRecord, LabelRecord, LeaseRecord, ScanRecord
from segqc.types import Assessment, LabelArray, Structure

logger = logging.getLogger(__name__)

HeatState: TypeAlias = Literal["ready", "making", "none", "failed"]
_ARRAYS_BYTES: Final = 96e6
_labels: Final[BoundedCache[str, LabelArray]] = BoundedCache(_ARRAYS_BYTES, lambda a: float(a.nbytes))
_errors: Final[BoundedCache[tuple[str, int, int], ErrorSteps]] = BoundedCache(_ARRAYS_BYTES, lambda a: float(a.nbytes))
_parts: Final[BoundedCache[tuple[object, ...], Part]] = BoundedCache(10_000)
_making: Final[dict[tuple[str, int, int], Future[None]]] = {}


class _NoMapError(Exception):
    """There is no error map yet."""


@dataclass(frozen=True)
class ShownScan:
    """A scan as the store knows it, for its page.

    Attributes:
        context: the server's.
        record: the scan.
        start: the label that an annotator starts from.
        final: its final label.
        assessed: the label that is judged: the final one where it was checked, else ``start``.
        assessment: of ``assessed``, by the bundle that serves, with its number.
        bundle: the number of that bundle.
    """

    context: AppContext
    record: ScanRecord
    start: LabelRecord | None
    final: LabelRecord | None
    assessed: LabelRecord | None
    assessment: tuple[int, Assessment] | None
    bundle: int | None

    @cached_property
    def dicom(self) -> DicomScan:
        """The scan by DICOM's identifiers; fails as `Archive.scan_of` does."""
        return self.context.archive.scan_of(self.record)

    @property
    def header(self) -> ScanHeader:
        """What its file says before its voxels are read; fails as `Archive.header` does."""
        return self.context.archive.header(self.dicom)

    @property
    def usual(self) -> LabelRecord | None:
        """The label that is drawn where nobody wishes for another: the final one, else that to start from."""
        return self.final or self.start

    def worst(self, label: LabelRecord | None) -> int:
        """The slice to look at first: without an assessment the middle one of those that a label marks, or of all."""
        if self.assessment is not None and (found := self.assessment[1].worst_slices(1)):
            return found[0]
        array, axis = self._array(label), self.header.layout.slice_axis
        in_plane = tuple(a for a in range(3) if a != axis)
        marked = np.flatnonzero(array.any(axis=in_plane)) if array is not None else np.empty(0, np.intp)
        return int(marked[len(marked) // 2]) if marked.size else self.header.count // 2

    def error_sums(self) -> list[float]:
        """About how many voxels of each slice are wrong, over all structures; nothing without an assessment."""
        if self.assessment is None or not self.assessment[1].structures:
            return []
        sums = np.sum([[s.error_sum for s in q.raw.slices] for q in self.assessment[1].structures], axis=0)
        return [float(value) for value in sums]

    def version(self, number: int) -> LabelRecord:
        """A version of its labels that has content.

        Raises:
            RequestError: 404 if there is none.
        """
        with self.context.dataset.store.read() as transaction:
            found = {label.id: label for label in labels.history(transaction, self.record.name)}
        label = found.get(number)
        if label is None or label.sha256 is None:
            raise RequestError(404, f"the scan {self.record.name!r} has no label version {number} with a file.")
        return label

    def slices(
        self,
        structures: Sequence[Structure],
        label: LabelRecord | None,
        *,
        other: LabelRecord | None = None,
        with_errors: bool = True,
    ) -> ShownSlices:
        """What its pictures are made of.

        Args:
            structures: those that label maps may hold.
            label: the version that is drawn.
            other: the version that it is compared with.
            with_errors: whether likely errors are drawn, where they are known.

        Raises:
            RequestError: 404 if the scan's file is gone or holds another content by now.
            VolumeError: if it cannot be read.
        """
        header, errors = self.header, self.errors() if with_errors else None
        arrays = self._array(label), self._array(other)
        key = (
            self.record.name,
            self.record.sha256,
            label.sha256 if label is not None else None,
            other.sha256 if other is not None else None,
            self._key if errors is not None else None,
        )
        drawn = [array for array in arrays if array is not None]
        return ShownSlices(
            header=header,
            images=self.context.archive.images(self.dicom),
            structures=structures,
            part=_parts.get(key, lambda: part_of(header, drawn, errors)),
            labels=arrays[0],
            errors=errors,
            assessment=self.assessment[1] if with_errors and self.assessment is not None else None,
            other=arrays[1],
        )

    def _array(self, label: LabelRecord | None) -> LabelArray | None:
        if label is None or label.sha256 is None:
            return None
        return _labels.get(label.sha256, lambda: self.context.dataset.store.read_label(label).array)

    def array(self, label: LabelRecord) -> LabelArray:
        """A label version's voxels, in the scan file's own order."""
        found = self._array(label)
        if found is None:
            raise RequestError(404, f"the label version {label.id} is a removal.")
        return found

    @property
    def _key(self) -> tuple[str, int, int] | None:
        if self.assessed is None or self.bundle is None or self.assessment is None:
            return None
        return str(self.context.dataset.folder), self.assessed.id, self.bundle

    def errors(self) -> ErrorSteps | None:
        """The error map of ``assessed``; None where it is not kept."""
        key = self._key
        if key is None:
            return None

        def load() -> ErrorSteps:
            found = error_maps.read(self.context.dataset, *key[1:])
            if found is None:
                raise _NoMapError
            return error_maps.highest(found)

        try:
            return _errors.get(key, load)
        except _NoMapError:
            return None

    def heat(self, executor: Executor) -> tuple[HeatState, str | None]:
        """How it is with the error map, which is made in the background where it is not kept; and why it failed."""
        key = self._key
        if key is None or self.assessed is None or self.bundle is None:
            return "none", None
        if self.errors() is not None:
            return "ready", None
        going = _making.get(key)
        if going is None:
            try:
                bundle = self.context.dataset.bundle()
            except ModelError as error:
                return "failed", str(error)
            if bundle is None or bundle.number != self.bundle or not bundle.holds("segqc"):
                return "none", None
            _making[key] = executor.submit(self._make, self.assessed, bundle)
            return "making", None
        if not going.done():
            return "making", None
        del _making[key]
        found = going.exception()
        if found is None:
            return "ready", None
        logger.warning("the error map of %r could not be made: %s", self.record.name, found)
        return "failed", str(found) if isinstance(found, SegqcError) else "The server's log tells why."

    def _make(self, label: LabelRecord, bundle: NetworkBundle) -> None:
        error_map(self.context.dataset, self.record, label, bundle)


@dataclass(frozen=True, slots=True)
class ScanHistory:
    """What happened to a scan.

    Attributes:
        versions: of its labels, oldest first; without proposals, which are offered for themselves.
        events: all that happened, oldest first.
        leases: who has it now.
        state: as people are told.
        title: what people call it.
        in_pacs: what became of versions in the PACS, in words, by their numbers.
    """

    versions: list[VersionSummary]
    events: list[EventRecord]
    leases: list[LeaseRecord]
    state: ShownState
    title: str
    in_pacs: dict[int, str]


def shown_scan(context: AppContext, name: str) -> ShownScan:
    """A scan for its page.

    Raises:
        UnknownScan: if there is none of this name.
    """
    with context.dataset.store.read() as transaction:
        record = scans.get(transaction, name)
        start = labels.start_of(transaction, record.name)
        final = labels.current(transaction, record.name, FINAL)
        check = assessments.latest_of(transaction, final.id) if final is not None else None
        assessment = check or (assessments.latest_of(transaction, start.id) if start is not None else None)
        bundle = bundles.serving_number(transaction)
    return ShownScan(context, record, start, final, start if check is None else final, assessment, bundle)


def history(context: AppContext, scan: ScanRecord) -> ScanHistory:
    """What happened to a scan."""
    with context.dataset.store.read() as transaction:
        held = leases.listing(transaction, state="open", scan=scan.name)
        return ScanHistory(
            [version for version in versions(transaction, scan.name) if version.label.tag != PROPOSAL],
            events.history(transaction, "scan", scan.id),
            held,
            shown_state(scan.state, scan.missing_since, scan.former_name, is_held=bool(held)),
            pacs.title_of(transaction, scan),
            version_standings(context.dataset, transaction, scan.name),
        )
