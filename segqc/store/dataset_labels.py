"""The labels that a data set would have if it were finished now, and the random draws among those of one network.

A scan's label is a person's, else the mask that it would be handed out with. Which masks were there to be drawn, when,
and what became of them, is what a statement about those rests on that nobody has corrected.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from sqlalchemy import ColumnElement, Select, and_, func, select
from sqlalchemy.orm import aliased

from segqc.store import labels
from segqc.store.database import Transaction
from segqc.store.labels import ORIGINAL, RETURNED
from segqc.store.records import Draw, LeaseState, ScanState
from segqc.store.schema import (
    LABELLED_STATES,
    Bundle,
    Correction,
    CorrectionStructure,
    LabelVersion,
    LeaseRow,
    Patient,
    PseudoLabelRow,
    Scan,
)

LabelState: TypeAlias = Literal[
    "corrected",  # by a person, wholly
    "partly corrected",  # a person has looked at some slices or structures only
    "pseudo-label",  # an accepted mask of the network in question
    "network mask",  # another mask of it
    "other mask",  # of another network, or of nobody knows whom
    "returned",  # a person's, that was rejected or whose scan was reopened
    "simulated",  # a simulated annotator's, where people's are wanted
    "no mask",
]
_IS_WHOLE: Final[ColumnElement[bool]] = and_(Correction.opened_slices.is_(None), Correction.opened_structures.is_(None))
"""Of a correction: whether a person has checked the whole scan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomDraw:
    """A mask was drawn at random."""

    draw: Draw
    at: dt.datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingMask:
    """A mask of the network in question that waited for a person, or still does.

    Attributes:
        made_at: when it came.
        left_at: when it was handed out to the one who corrected it, or another label took its place; None while it
            waits.
        accepted_at: when it became a pseudo-label; None where it was none, or none any more when it left.
        draws: by which it was handed out at random, oldest first, without leases that are still open.
        true_dice: of its worst structure, by a correction of the whole scan that stands; None without one.
        was_skipped: whether it waits and was put aside by the last one who had it.
    """

    made_at: dt.datetime
    left_at: dt.datetime | None
    accepted_at: dt.datetime | None
    draws: tuple[RandomDraw, ...]
    true_dice: float | None
    was_skipped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetLabel:
    """The label of a scan; ``state`` is None of an excluded scan, which the data set does not have."""

    scan: str
    patient: str
    state: LabelState | None
    mask: WaitingMask | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetLabels:
    """The labels of all scans whose files are there.

    ``segmenter`` is the version of the network that made most of the masks that wait: draws among its masks count. It
    is None where most come from elsewhere, as those that were imported.
    """

    segmenter: str | None
    labels: tuple[DatasetLabel, ...]


def listing(transaction: Transaction, *, simulated: bool = False) -> DatasetLabels:
    """The labels of all scans, in the order of the scans' numbers.

    Args:
        transaction: what to read in.
        simulated: whether a simulated annotator's corrections tell what masks are worth, instead of people's, and
            their labels count as corrected.
    """
    scans_ = _scans(transaction)
    masks = [scan for scan in scans_ if scan.tag == ORIGINAL]
    waiting = Counter(scan.segmenter for scan in [s for s in masks if s.is_waiting] or masks)
    segmenter = max(waiting, key=lambda version: (waiting[version], version or ""), default=None)
    found = _Found(
        segmenter=segmenter,
        made_at=_masks(transaction, segmenter),
        handed_out=_hand_outs(transaction, segmenter, simulated=simulated),
        corrections=_corrections(transaction, segmenter),
        accepted=_accepted(transaction),
        read=labels.read_scans(transaction),
        simulated=simulated,
    )
    return DatasetLabels(segmenter=segmenter, labels=tuple(found.label(scan) for scan in scans_))


@dataclass(frozen=True, slots=True)
class _ScanRow:
    """A scan with the mask that it would be handed out with, and its final label."""

    id: int
    name: str
    patient: str
    state: ScanState
    start: int | None
    tag: str | None
    started_at: dt.datetime | None
    segmenter: str | None
    final: int | None
    final_at: dt.datetime | None

    @property
    def is_waiting(self) -> bool:
        return self.state != "excluded" and self.state not in LABELLED_STATES


@dataclass(frozen=True, slots=True)
class _CorrectionRow:
    """A correction of a label that nobody rejected since; ``is_of_mask`` if it is of the network in question."""

    to_version: int
    handed_out_at: dt.datetime
    is_of_mask: bool
    is_whole: bool
    simulated: bool
    dice: float


@dataclass(frozen=True, slots=True)
class _HandOut:
    """A mask of the network in question was handed out."""

    draw: Draw
    state: LeaseState
    at: dt.datetime


@dataclass(frozen=True, slots=True)
class _Acceptance:
    """A mask was a pseudo-label for some time."""

    mask: int | None
    since: dt.datetime
    until: dt.datetime | None


@dataclass(frozen=True, slots=True)
class _Found:
    """What is known of masks of the network in question, by the scan's number."""

    segmenter: str | None
    made_at: Mapping[int, dt.datetime]
    handed_out: Mapping[int, Sequence[_HandOut]]
    corrections: Mapping[int, Sequence[_CorrectionRow]]
    accepted: Mapping[int, Sequence[_Acceptance]]
    read: set[str]
    simulated: bool

    def label(self, scan: _ScanRow) -> DatasetLabel:
        state = self._state(scan)
        return DatasetLabel(scan=scan.name, patient=scan.patient, state=state, mask=self._mask(scan, state))

    def _state(self, scan: _ScanRow) -> LabelState | None:
        if scan.state == "excluded":
            return None
        corrections = self.corrections.get(scan.id, ())
        if scan.state in LABELLED_STATES:
            return self._state_of([c for c in corrections if c.to_version == scan.final])
        if scan.name in self.read:  # by one of several annotators; the final label will be theirs
            return self._state_of(corrections)
        if scan.start is None:
            return "no mask"
        if scan.tag == RETURNED:
            return "returned"
        if scan.segmenter != self.segmenter:
            return "other mask"
        is_accepted = any(a.mask == scan.start and a.until is None for a in self.accepted.get(scan.id, ()))
        return "pseudo-label" if is_accepted else "network mask"

    def _state_of(self, corrections: Sequence[_CorrectionRow]) -> LabelState:
        """The state of a person's label that came of these corrections; of none where it was made anew."""
        wanted = [c for c in corrections if self.simulated or not c.simulated]
        if corrections and not wanted:
            return "simulated"
        return "corrected" if not wanted or any(c.is_whole for c in wanted) else "partly corrected"

    def _mask(self, scan: _ScanRow, state: LabelState | None) -> WaitingMask | None:
        made_at = self.made_at.get(scan.id)
        if made_at is None:
            return None
        handed_out = self.handed_out.get(scan.id, ())
        corrections = [c for c in self.corrections.get(scan.id, ()) if c.is_of_mask and c.simulated == self.simulated]
        dice = [c.dice for c in corrections if c.is_whole]
        if state == "partly corrected" and not corrections:
            return None  # it began with another label, and nobody knows what the rest of that is worth
        was_skipped = (
            state in ("pseudo-label", "network mask") and bool(handed_out) and handed_out[-1].state == "skipped"
        )
        left_at = [c.handed_out_at for c in corrections]
        if was_skipped:
            left_at.append(handed_out[-1].at)
        if scan.final_at is not None:
            left_at.append(scan.final_at)
        elif state in ("other mask", "returned") and scan.started_at is not None:
            left_at.append(scan.started_at)
        end = min(left_at, default=None)
        accepted = [
            a.since
            for a in self.accepted.get(scan.id, ())
            if a.until is None or (end is not None and a.since <= end <= a.until)
        ]
        return WaitingMask(
            made_at=made_at,
            left_at=end,
            accepted_at=max(accepted, default=None),
            draws=tuple(RandomDraw(draw=h.draw, at=h.at) for h in handed_out if h.draw in ("audit", "pseudo-audit")),
            true_dice=min(dice, default=None),
            was_skipped=was_skipped,
        )


def _scans(transaction: Transaction) -> list[_ScanRow]:
    start, final = aliased(LabelVersion), aliased(LabelVersion)
    query: Select[*tuple[Any, ...]] = (
        select(
            Scan.id,
            Scan.name,
            Patient.name,
            Scan.state,
            start.id,
            start.tag,
            start.made_at,
            Bundle.segmenter_version,
            final.id,
            final.made_at,
        )
        .join(Patient, Patient.id == Scan.patient_id)
        .outerjoin(start, start.id == labels.START_OF_SCAN)
        .outerjoin(Bundle, Bundle.id == start.bundle_id)
        .outerjoin(final, final.id == labels.FINAL_OF_SCAN)
        .where(Scan.missing_since.is_(None))
        .order_by(Scan.id)
    )
    return [_ScanRow(*row) for row in transaction.execute(query)]


def _masks(transaction: Transaction, segmenter: str | None) -> dict[int, dt.datetime]:
    """When each scan got its first mask of a network."""
    query = (
        select(LabelVersion.scan_id, func.min(LabelVersion.made_at))
        .outerjoin(Bundle, Bundle.id == LabelVersion.bundle_id)
        .where(_is_of(segmenter))
        .group_by(LabelVersion.scan_id)
    )
    return {scan: made_at for scan, made_at in transaction.execute(query)}


def _is_of(segmenter: str | None) -> ColumnElement[bool]:
    """Of a label version: whether it is a mask that a network made; None for masks from elsewhere."""
    by = Bundle.segmenter_version == segmenter if segmenter is not None else LabelVersion.bundle_id.is_(None)
    return and_(LabelVersion.tag == ORIGINAL, LabelVersion.sha256.is_not(None), by)


def _corrections(transaction: Transaction, segmenter: str | None) -> dict[int, list[_CorrectionRow]]:
    """The corrections of labels that nobody rejected since; of several structures the worst counts."""
    query = (
        select(
            Correction.scan_id,
            Correction.to_version_id,
            func.coalesce(LeaseRow.handed_out_at, Correction.made_at, type_=Correction.made_at.type),
            _is_of(segmenter),
            _IS_WHOLE,
            Correction.simulated,
            func.min(CorrectionStructure.dice),
        )
        .join(Scan, Scan.id == Correction.scan_id)
        .join(LabelVersion, LabelVersion.id == Correction.from_version_id)
        .outerjoin(Bundle, Bundle.id == LabelVersion.bundle_id)
        .outerjoin(LeaseRow, LeaseRow.id == Correction.lease_id)
        .outerjoin(CorrectionStructure, CorrectionStructure.correction_id == Correction.id)
        .where(Correction.to_version_id > Scan.newest_label)
        .group_by(Correction.id, LabelVersion.id, Bundle.id, LeaseRow.id)
        .order_by(Correction.id)
    )
    found: dict[int, list[_CorrectionRow]] = defaultdict(list)
    for scan, to_version, handed_out_at, is_of_mask, is_whole, simulated, dice in transaction.execute(query):
        worst = 1.0 if dice is None else dice  # without a structure in mask and truth there is nothing wrong with it
        found[scan].append(
            _CorrectionRow(to_version, handed_out_at, bool(is_of_mask), bool(is_whole), simulated, worst)
        )
    return found


def _hand_outs(transaction: Transaction, segmenter: str | None, *, simulated: bool) -> dict[int, list[_HandOut]]:
    """The leases of a network's masks, oldest first, but those that are open and those of the other annotators."""
    is_over = LeaseRow.expires_at <= transaction.now
    query = (
        select(LeaseRow.scan_id, LeaseRow.draw, LeaseRow.state, LeaseRow.handed_out_at)
        .join(LabelVersion, LabelVersion.id == LeaseRow.label_version_id)
        .outerjoin(Bundle, Bundle.id == LabelVersion.bundle_id)
        .outerjoin(Correction, Correction.lease_id == LeaseRow.id)
        .where(
            _is_of(segmenter),
            (LeaseRow.state != "open") | is_over,
            func.coalesce(Correction.simulated, simulated) == simulated,
        )
        .order_by(LeaseRow.handed_out_at, LeaseRow.id)
    )
    found: dict[int, list[_HandOut]] = defaultdict(list)
    for scan, draw, state, handed_out_at in transaction.execute(query):
        found[scan].append(_HandOut(draw, state, handed_out_at))
    return found


def _accepted(transaction: Transaction) -> dict[int, list[_Acceptance]]:
    query = select(LabelVersion.scan_id, LabelVersion.parent_id, LabelVersion.made_at, PseudoLabelRow.ended_at).join(
        PseudoLabelRow, PseudoLabelRow.label_version_id == LabelVersion.id
    )
    found: dict[int, list[_Acceptance]] = defaultdict(list)
    for scan, mask, since, until in transaction.execute(query):
        found[scan].append(_Acceptance(mask, since, until))
    return found
