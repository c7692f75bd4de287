"""What a reviewer decides of a scan, by the words that commands and routes use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from segqc.loop.dataset import Dataset
from segqc.loop.drift import note_drift, watch_serving
from segqc.store.records import Actor, ScanState

Decision: TypeAlias = Literal["approve", "reject", "exclude", "reopen"]

STATE_OF: Final[Mapping[Decision, ScanState]] = {
    "approve": "approved",
    "reject": "rejected",
    "exclude": "excluded",
    "reopen": "unlabelled",
}


def review(
    dataset: Dataset, scan: str, state: ScanState, actor: Actor, reason: str | None = None, *, seen: int | None = None
) -> None:
    """Approve, reject, exclude or reopen a scan, and test for drift without what was rejected.

    Arguments and errors as `Store.review`.
    """
    dataset.store.review(scan, state, actor, reason, seen=seen)
    watched = watch_serving(dataset)
    if watched is not None:
        with dataset.store.write() as transaction:
            note_drift(transaction, watched)
