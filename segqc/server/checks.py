"""Checks of what people submit, made while nobody waits: how each stands, and what clients are told of it."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import anyio.to_thread

from segqc.errors import SegqcError
from segqc.loop.checking import LabelCheck, check_label, kept_check
from segqc.loop.dataset import Dataset
from segqc.networks.bundle import NetworkBundle
from segqc.store.records import LabelRecord

logger = logging.getLogger(__name__)

CheckState: TypeAlias = Literal["done", "running", "none"]
WAIT_SECONDS: Final = 2.0
"""How long an answer waits for a check at most; then it says that it is being made."""
_FAILED: Final = "it failed; the server's log tells why"
_RUNNING: Final = "The label is being checked."


@dataclass(frozen=True, slots=True)
class CheckStatus:
    """How it is with the check of a label version; without one, the sentence says why."""

    state: CheckState
    sentence: str
    check: LabelCheck | None = None


class Checks:
    """The checks of a dataset folder. Threads may share it."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._going: dict[tuple[int, int], Future[LabelCheck]] = {}
        self._lock = threading.Lock()

    async def ask(self, label: LabelRecord, executor: Executor, *, wait: bool = True) -> CheckStatus:
        """Have a label version checked by the bundle that serves, unless it has been, and tell how that stands.

        Args:
            label: the version.
            executor: what computes it.
            wait: whether to wait for it, for `WAIT_SECONDS`.
        """
        status = await anyio.to_thread.run_sync(self._begin, label, executor)
        if isinstance(status, CheckStatus):
            return status
        waiting = asyncio.wrap_future(status)
        waiting.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # perhaps nobody looks again
        ended, _ = await asyncio.wait({waiting}, timeout=WAIT_SECONDS if wait else 0)
        if not ended:
            return CheckStatus("running", _RUNNING)
        try:
            check = waiting.result()
        except SegqcError as error:
            return _none(error.clause)
        except Exception:  # it is logged; whoever has submitted hears nothing worse
            return _none(_FAILED)
        return CheckStatus("done", check.sentence, check)

    def is_running(self, label: LabelRecord) -> bool:
        """Whether a label version is being checked, or waits for that."""
        with self._lock:
            return any(version == label.id for version, _ in self._going)

    def _begin(self, label: LabelRecord, executor: Executor) -> CheckStatus | Future[LabelCheck]:
        """What is known already, or is being computed."""
        if not self._dataset.settings.annotation.check_submissions:
            return _none("the settings want no check ([annotation] check_submissions)")
        try:
            bundle = self._dataset.bundle()
            if bundle is None or not bundle.holds("segqc"):
                return _none("SegQC-Net is not trained yet")
            kept = kept_check(self._dataset, label, bundle.number)
            if kept is not None:
                return CheckStatus("done", kept.sentence, kept)
            with self._lock:
                key = label.id, bundle.number
                if key not in self._going:
                    self._going[key] = executor.submit(self._check, label, bundle)
                return self._going[key]
        except SegqcError as error:
            return _none(error.clause)
        except Exception:
            logger.exception("the check of the label version %d could not begin", label.id)
            return _none(_FAILED)

    def _check(self, label: LabelRecord, bundle: NetworkBundle) -> LabelCheck:
        try:
            return check_label(self._dataset, label, bundle)
        except SegqcError as error:
            logger.info("the label version %d of %r is not checked: %s", label.id, label.scan, error)
            raise
        except Exception:
            logger.exception("the label version %d of %r could not be checked", label.id, label.scan)
            raise
        finally:
            with self._lock:  # it is kept by now; what failed may be tried again
                self._going.pop((label.id, bundle.number), None)


def _none(why: str) -> CheckStatus:
    return CheckStatus("none", f"Not checked: {why}.")
