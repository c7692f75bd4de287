"""The versions of a scan's labels as a table: who made each, of which, and what was changed."""

from __future__ import annotations

from dataclasses import dataclass

from segqc.loop.checking import LabelCheck, kept_checks
from segqc.store import corrections, labels
from segqc.store.database import Transaction
from segqc.store.records import CorrectionRecord, LabelRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSummary:
    """One version of a scan's labels.

    Attributes:
        label: the version.
        is_current: whether it is the current one of its tag.
        correction: what was changed, where it answers what was handed out.
        check: what SegQC-Net said last of what a person submitted; None where it was not checked.
    """

    label: LabelRecord
    is_current: bool
    correction: CorrectionRecord | None
    check: LabelCheck | None

    @property
    def dice_before(self) -> float | None:
        """The true Dice of what was corrected against the result, of the structure that was corrected most."""
        parts = self.correction.change.structures if self.correction is not None else ()
        return min((p.metrics.dice for p in parts if p.metrics.dice is not None), default=None)


def versions(transaction: Transaction, scan: str) -> list[VersionSummary]:
    """All versions of a scan's labels, oldest first.

    Raises:
        UnknownScan: if there is no such scan.
    """
    changes = {c.to_version: c for c in corrections.listing(transaction, scan)}
    current = {label.id for label in labels.tags(transaction, scan).values()}
    history = labels.history(transaction, scan)
    checks = kept_checks(transaction, scan, history)
    return [
        VersionSummary(
            label=label,
            is_current=label.id in current,
            correction=changes.get(label.id),
            check=checks.get(label.id),
        )
        for label in history
    ]
