"""What a strategy would hand out next, one scan after the other, while nobody submits anything."""

from __future__ import annotations

from typing import Final

import numpy as np
from sqlalchemy import and_, exists, literal_column

from segqc.selection.strategy import Strategy
from segqc.store.database import Transaction
from segqc.store.features import SUGGESTED
from segqc.store.orders import Choice, Waiting
from segqc.store.schema import LeaseRow, Scan

# the scans that a strategy chooses from for an annotator who has skipped none, see `leases.acquire`
_FREE: Final = ~exists().where(and_(LeaseRow.scan_id == Scan.id, LeaseRow.state == literal_column("'open'")))
_WAITING: Final = Waiting(Scan.queue == "train", (_FREE, Scan.id.not_in(SUGGESTED)))


def preview(transaction: Transaction, strategy: Strategy, rng: np.random.Generator, count: int) -> list[Choice]:
    """The first scans that a strategy would hand out; draws are other ones each time that somebody really asks.

    Args:
        transaction: what to read in.
        strategy: the strategy.
        rng: of random draws.
        count: of scans.
    """
    choices: list[Choice] = []
    while len(choices) < count:
        suggested = [choice.scan_id for choice in choices]
        choice = strategy.order(transaction, _WAITING, {"suggested": suggested}, rng)
        if choice is None:
            break
        choices.append(choice)
    return choices
