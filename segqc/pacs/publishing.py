"""Final labels on their way to the PACS: stored as DICOM SEG, the one before withdrawn after that.

What has to be done follows from the rows, at any time and whoever was killed before: a final version without a stored
SEG is stored, and a stored SEG whose version is final no more is withdrawn. A SEG's identifiers follow from its
version, and its row is written before it is sent, so that a step that is done twice ends as if it was done once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from filelock import FileLock, Timeout

from segqc.errors import SegqcError, sentence
from segqc.pacs.errors import PacsRefused, PacsUnavailable
from segqc.pacs.segmentation import make_segmentation, ordered, uid_of
from segqc.store import labels, pacs, scans
from segqc.store.database import StoreDamaged, StoreUnavailable
from segqc.store.records import LabelRecord, ScanRecord, SegmentationRecord, SeriesRecord
from segqc.store.store import Store
from segqc.types import label_names

if TYPE_CHECKING:
    from segqc.pacs.source import PacsScans
    from segqc.settings import Settings

logger = logging.getLogger(__name__)

POLL_SECONDS: Final = 0.5
_REFUSED_FOR_GOOD: Final = (400, 403, 404, 405, 501)  # what no later attempt changes


class Publisher:
    """Stores the final labels of one dataset folder in its PACS."""

    def __init__(self, store: Store, source: PacsScans, settings: Settings) -> None:
        self._store = store
        self._source = source
        self._client = source.client
        self._settings = settings
        self._lock = FileLock(store.own / "pacs.lock")

    def publish(self) -> int:
        """Do all that is to be done now; returns how many steps were done. Another process that does so is left to it.

        What fails is logged, noted with its row, and tried again later.
        """
        done = 0
        with contextlib.suppress(Timeout, PacsUnavailable), self._lock.acquire(timeout=0):
            with self._store.read() as transaction:
                waiting = pacs.to_store(transaction)
            for label in waiting:
                done += self._try(label, functools.partial(self._keep, label))
            with self._store.read() as transaction:
                over = pacs.to_withdraw(transaction)
            for segmentation in over:
                done += self._try(segmentation.label, functools.partial(self._withdraw, segmentation))
        return done

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Do so as long as the block lasts, in a thread of its own; a step that was begun is done before it ends."""
        ended = threading.Event()
        thread = threading.Thread(target=self._work, args=(ended,), name="pacs", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _work(self, ended: threading.Event) -> None:
        while not ended.wait(POLL_SECONDS):
            try:
                self.publish()
            except StoreDamaged:
                raise  # it does not mend by itself
            except StoreUnavailable as error:
                logger.warning("%s", error)
            except Exception:
                logger.exception("final labels are not brought to the PACS")  # the next look may do better

    def _try(self, label: int, step: Callable[[], None]) -> bool:
        """Whether a step worked.

        Raises:
            PacsUnavailable: if the PACS does not answer: no other step would work.
        """
        try:
            step()
            return True
        except StoreUnavailable:
            raise  # there is nowhere to note it
        except Exception as error:
            if not isinstance(error, SegqcError | OSError | ValueError):
                logger.exception("label version %d is not brought to the PACS", label)
            problem = sentence(str(error) or type(error).__name__)
            with self._store.write() as transaction:
                pacs.note_failure(transaction, label, problem)
            logger.warning("label version %d is not brought to the PACS yet; it is tried again: %s", label, problem)
            if isinstance(error, PacsUnavailable):
                raise
            return False

    def _keep(self, number: int) -> None:
        """Store a label version; an empty one is noted and has no SEG."""
        with self._store.read() as transaction:
            label = labels.get(transaction, number)
            scan = scans.get(transaction, label.scan)
            series = pacs.series_of(transaction, scan.file)
        if series is None:
            return  # gone meanwhile
        with self._store.write() as transaction:
            uid = uid_of(label, series.series_uid, "series")
            pacs.begin(transaction, number, series.study_uid, uid)
        is_empty = not self._send(label, scan, series)
        with self._store.write() as transaction:
            pacs.settle(transaction, number, "empty" if is_empty else "stored")
        if is_empty:
            logger.info("%s: the final label (version %d) is empty: there is no SEG of it", scan.name, number)
        else:
            logger.info("%s: the final label (version %d) is in the PACS", scan.name, number)

    def _send(self, label: LabelRecord, scan: ScanRecord, series: SeriesRecord) -> bool:
        """Send the SEG of a label version; returns whether there is one."""
        array = self._store.read_label(label).array
        if not array.any():
            return False
        images = self._source.images(self._store, scan)
        headers = ordered(self._client.series_metadata(series.study_uid, series.series_uid), images)
        names = label_names(self._settings.structure_list())
        self._client.store(make_segmentation(array.transpose(2, 1, 0), headers, names, label, series.series_uid))
        return True

    def _withdraw(self, segmentation: SegmentationRecord) -> None:
        """Remove the SEG of a version that is final no more; where the PACS does not do so, say it."""
        try:
            self._client.remove_series(segmentation.study_uid, segmentation.series_uid)
        except PacsRefused as error:
            if error.code not in _REFUSED_FOR_GOOD:
                raise
            with self._store.write() as transaction:
                pacs.settle(transaction, segmentation.label, "left", problem=str(error))
            logger.warning("%s", pacs.left_sentence(segmentation))
            return
        with self._store.write() as transaction:
            pacs.settle(transaction, segmentation.label, "withdrawn")
        logger.info("%s: the SEG of label version %d is withdrawn", segmentation.scan, segmentation.label)
