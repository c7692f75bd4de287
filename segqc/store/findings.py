"""Files of the folder that were not taken in, each with a sentence that says why."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Literal

from segqc.store.database import Transaction


@dataclass(frozen=True, slots=True)
class FindingRecord:
    """A file that was not taken in; its path is relative to the folder."""

    file: str
    kind: Literal["scan", "label", "other"]
    sentence: str
    found_at: dt.datetime


def listing(transaction: Transaction) -> list[FindingRecord]:
    """All files that were not taken in, in the order of their names."""
    return []
