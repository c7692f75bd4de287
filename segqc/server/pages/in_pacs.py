"""How it is with the PACS that scans come from, as the pages tell it."""

from __future__ import annotations

from dataclasses import dataclass

from segqc.loop.dataset import Dataset
from segqc.store import pacs
from segqc.store.database import Transaction


@dataclass(frozen=True, slots=True)
class PacsStanding:
    """What people should know of the PACS.

    Attributes:
        problem: why it cannot be looked through now; None where it can.
        waiting: how many label versions are to be stored there or withdrawn.
        failure: why the last try to do so failed; None where none did.
        left: a sentence for each SEG that should be withdrawn and cannot be.
    """

    problem: str | None
    waiting: int
    failure: str | None
    left: tuple[str, ...]


def pacs_standing(dataset: Dataset, transaction: Transaction) -> PacsStanding | None:
    """How it is with the PACS; None where scans are files."""
    if dataset.pacs is None:
        return None
    stores = dataset.settings.pacs.store_labels
    return PacsStanding(
        problem=dataset.pacs.problem,
        waiting=pacs.to_be_done(transaction) if stores else 0,
        failure=pacs.last_failure(transaction) if stores else None,
        left=tuple(pacs.left(transaction)),
    )


def version_standings(dataset: Dataset, transaction: Transaction, scan: str) -> dict[int, str]:
    """What became of a scan's label versions in the PACS, in words, by the numbers of those that it concerns."""
    if dataset.pacs is None:
        return {}
    words = {"storing": "waits for the PACS", "stored": "in the PACS", "empty": "empty, not in the PACS",
             "withdrawn": "withdrawn from the PACS", "left": "left in the PACS"}  # fmt: skip
    found = {
        s.label: words[s.state] + (f": {s.problem}" if s.problem else "") for s in pacs.segmentations(transaction, scan)
    }
    if dataset.settings.pacs.store_labels:
        found |= {number: words["storing"] for number in pacs.to_store(transaction, later=True) if number not in found}
    return found
