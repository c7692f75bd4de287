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


def review(dataset: Dataset, scan: str, state: ScanState, actor: Actor, reason: str | None = None) -> None:
    """Approve, reject, exclude or reopen a scan, see `Store.review`, and test for drift without what was rejected.

    Raises:
        UnknownScan: if there is none of this name.
        StoreError: if the scan is not in a state that allows it, or a reason is wanted and missing.
    """
    dataset.store.review(scan, state, actor, reason)
    watched = watch_serving(dataset)
    if watched is not None:
        with dataset.store.write() as transaction:
            note_drift(transaction, watched)
