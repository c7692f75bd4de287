"""A submitted label: what an annotator changed of the mask that was handed out, kept together with it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from segqc.errors import SegqcError
from segqc.loop.dataset import Dataset
from segqc.loop.drift import note_drift, watch_serving
from segqc.loop.planted_errors import Repaired, repair
from segqc.loop.readers import inter_rater, readings
from segqc.quality.metrics import true_metrics_with_slices
from segqc.store import attention_checks, corrections, events, labels, leases, scans
from segqc.store.database import Transaction
from segqc.store.labels import FINAL, READER, RETURNED, NewLabel
from segqc.store.records import (
    Actor,
    Change,
    JsonObject,
    LabelRecord,
    LeaseRecord,
    ScanRecord,
    StructureChange,
    TakenProposal,
)
from segqc.store.scans import ScanReplaced
from segqc.store.store import LabelChange
from segqc.types import LabelArray, Structure
from segqc.volumes import Volume, VolumeError, temporary_labels, through_plane_axis
from segqc.volumes.slices import Slices, differing, part, united


class OpenedError(SegqcError):
    """What is said to have been opened is not there."""

    status = 400


@dataclass(frozen=True, slots=True)
class Opened:
    """The slices and structures that an annotator looked at; None where nobody says which.

    Then it was all of them; but of an annotator who was asked for some slices, it was these and those with a change.
    """

    slices: tuple[int, ...] | None = None
    structures: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Submission:
    """The kept label, and the number of the correction where it is one."""

    label: LabelRecord
    correction: int | None


ALL = Opened()


@dataclass(frozen=True, slots=True)
class StartedFrom:
    """The label version that a client began with, which is checked; None for an empty label map."""

    version: int | None


class LabelMovedOnError(SegqcError):
    """A label was not made from the current one, which it would replace, or is of another annotator's scan."""

    status = 409


class ApprovedError(SegqcError):
    """A final label of an approved scan comes from somebody who may not replace what a reviewer approved."""

    status = 403


def current_start(transaction: Transaction, scan: str, actor: Actor) -> LabelRecord | None:
    """The label that an annotator goes on from.

    It is what was handed out to them and not answered yet; else their own reading or the final label, where there is
    one; else the mask that waits to be corrected. None stands for an empty label map.
    """
    final = labels.current(transaction, scan, FINAL)
    if final is not None:
        return final
    lease = leases.last_of(transaction, scan, actor)
    if lease is not None:
        return None if lease.label_version is None else labels.get(transaction, lease.label_version)
    own = next((reading for reading in labels.readings(transaction, scan) if reading.actor == actor), None)
    return own or labels.start_of(transaction, scan)


def check_not_replaced(dataset: Dataset, scan: str, actor: Actor) -> None:
    """Refuse the label of a scan that was replaced since it was handed out, before it is compared with the new one.

    Args:
        dataset: the folder.
        scan: the scan's name.
        actor: the annotator.

    Raises:
        ScanReplaced: if it is so; the sentence says when the scan was handed out, and what to do.
    """
    with dataset.store.read() as transaction:
        leases.last_of(transaction, scan, actor)


def check_start(transaction: Transaction, scan: str, actor: Actor, started: StartedFrom, readers: int) -> None:
    """Refuse a label whose start is not the current one: it would take the place of what its maker has not seen.

    Args:
        transaction: one in which the label has not been added yet.
        scan: the scan's name.
        actor: the annotator.
        started: what the label was made of.
        readers: how many annotators label each scan.

    Raises:
        LabelMovedOnError: if another label took its place, or another annotator has the scan by now.
    """
    now = current_start(transaction, scan, actor)
    if (now.id if now is not None else None) != started.version:
        mine = "an empty label map" if started.version is None else f"version {started.version}"
        if now is None:
            raise LabelMovedOnError(f"the label of {scan!r} was removed after you began with {mine}")
        by = "you, perhaps in another tab" if now.actor == actor else described(now.actor)
        raise LabelMovedOnError(
            f"the label of {scan!r} moved on: you began with {mine}, and version {now.id} counts by now, made by {by}"
        )
    is_open = [lease for lease in leases.listing(transaction, state="open", scan=scan) if lease.actor != actor]
    if is_open and readers == 1:
        raise LabelMovedOnError(f"the scan {scan!r} is handed out to {described(is_open[0].actor)} by now")
    if readers > 1 and now is not None and now.tag.startswith(READER):
        raise LabelMovedOnError(f"your reading of {scan!r} is kept already, as version {now.id}")


def described(actor: Actor) -> str:
    """An actor in a sentence; the name of a browser's cookie tells nobody anything."""
    return "another browser" if actor.identified_by == "cookie" else actor.name


def measure_change(start: Volume, end: Volume, structures: tuple[Structure, ...], opened: Opened = ALL) -> Change:
    """Measure a correction: the true metrics of its start against its end, in 3D and of each slice (paper, D_corr).

    Only what was opened counts: 3D metrics are over the opened slices, and closed structures are left out.

    Args:
        start: the label map that was handed out.
        end: what came back, on the same grid.
        structures: all structures.
        opened: what was looked at.

    Raises:
        OpenedError: if a slice or a structure that is said to have been opened does not exist.
    """
    axis = through_plane_axis(end)
    slices, looked_at = _opened_part(end, structures, opened)
    before, after = start.array, end.array
    if opened.slices is not None:
        before, after = (part(array, slices, axis) for array in (before, after))
    before, after = _in_use(before, after, axis)
    parts, changed = [], np.zeros(before.shape, bool)
    for structure in looked_at:
        mask, truth = structure.mask(before), structure.mask(after)
        differs = mask != truth
        changed |= differs
        metrics, by_slice = true_metrics_with_slices(mask, truth, axis)
        parts.append(
            StructureChange(
                name=structure.name,
                metrics=metrics,
                voxels_changed=int(np.count_nonzero(differs)),
                slices=by_slice.each(),
            )
        )
    in_plane = tuple(a for a in range(3) if a != axis)
    return Change(
        through_plane_axis=axis,
        voxels_changed=int(np.count_nonzero(changed)),
        slices_changed=int(changed.any(axis=in_plane).sum()),
        structures=tuple(parts),
        opened_slices=opened.slices if opened.slices is None else slices,
        opened_structures=opened.structures,
    )


def _opened_part(
    end: Volume, structures: tuple[Structure, ...], opened: Opened
) -> tuple[tuple[int, ...], list[Structure]]:
    """The slices and structures that were looked at."""
    count = end.array.shape[through_plane_axis(end)]
    slices = tuple(range(count)) if opened.slices is None else tuple(sorted(set(opened.slices)))
    if not slices or slices[0] < 0 or slices[-1] >= count:
        raise OpenedError(f"opened slices are numbers from 0 to {count - 1}, got {list(opened.slices or ())}")
    names = {s.name for s in structures}
    if unknown := sorted(set(opened.structures or ()) - names):
        raise OpenedError(f"there is no structure {unknown[0]!r} to be opened; there are {', '.join(sorted(names))}")
    return slices, [s for s in structures if opened.structures is None or s.name in opened.structures]


def _in_use(before: LabelArray, after: LabelArray, axis: int) -> tuple[LabelArray, LabelArray]:
    """Cut both label maps, in all slices, to what one of them covers: most of a scan is neither's."""
    covered = (before | after) != 0
    box = [slice(None)] * 3
    for own in {0, 1, 2} - {axis}:
        found = np.flatnonzero(covered.any(axis=tuple(a for a in range(3) if a != own)))
        box[own] = slice(found[0], found[-1] + 1) if found.size else slice(0, 1)
    return before[tuple(box)], after[tuple(box)]


def submit_label(
    dataset: Dataset,
    scan: str,
    end: Volume,
    tag: str,
    actor: Actor,
    *,
    info: JsonObject | None = None,
    opened: Opened = ALL,
    simulated: bool = False,
    checked: ScanRecord | None = None,
    file: Path | None = None,
    started: StartedFrom | None = None,
    may_replace_approved: bool = True,
    proposal: TakenProposal | None = None,
) -> Submission:
    """Keep a label that a person submits; a final one that answers a lease becomes a correction of what was shown.

    Where several annotators label each scan, it is a reading (tag ``reader-1``, ...) until a consensus is made.

    What was sent back to be corrected again needs no lease to become one.

    What was checked of it adds to what was checked of the label that it was made of: the label that was handed out or
    sent back, or else the scan's final one. These are the slices that were opened; where nobody says which, those that
    the lease asks for and those that were changed; without either, all.

    What is left of an error that was planted into the mask as an attention check is undone before anything else, and
    whether it was found is kept with the lease.

    Args:
        dataset: the folder.
        scan: the scan's name.
        end: the label map, on the scan's grid.
        tag: the label's tag.
        actor: the annotator.
        info: what the client notes of it.
        opened: what was looked at.
        simulated: whether no person has made it.
        checked: the scan as it was when the label map was checked against it; None where nobody knows.
        file: a file that holds the label map as it is to be kept; None for a new one.
        started: what it was made of, to be checked (`check_start`) where it becomes the label that counts; None where
            the client does not say.
        may_replace_approved: whether the annotator may give an approved scan another final label.
        proposal: what was taken of a proposal; None where none was offered.

    Raises:
        OpenedError: if a slice or a structure that is said to have been opened does not exist.
        UnknownScan: if there is no such scan.
        ScanReplaced: if the scan's file was replaced since it was handed out to the annotator, or since the label map
            was checked.
        ApprovedError: if the scan is approved, and the annotator may not replace that.
        LabelMovedOnError: if it was not made of the current label, or would take the place of a label in which a person
            has checked slices that were not checked in it.
        OSError: if it can't be written; nothing has changed then.
    """
    if opened != ALL:  # wrong also where nothing was handed out that the label could be compared with
        _opened_part(end, dataset.structures, opened)
    now = _still_there(dataset, scan, checked)
    readers = dataset.settings.annotation.readers
    conditions = _Conditions(scan, actor, started, readers, tag == FINAL, may_replace_approved)
    with dataset.store.read() as transaction:
        attention = attention_checks.of_submission(transaction, scan, actor)
    repaired = repair(dataset, attention, end) if attention is not None else None
    if repaired is not None and repaired.is_changed:
        end, file = repaired.labels, None
    with dataset.store.read() as transaction:
        origin = _origin(transaction, scan, actor, tag)
        if origin.lease is not None and readers > 1:
            tag = labels.reader_tag(transaction, scan, actor)
        try:
            conditions.check(transaction)
        except LabelMovedOnError:
            there = current_start(transaction, scan, actor)
            if there is None or there.actor != actor or not _holds(dataset, there, end):
                raise
            return Submission(there, None)  # sent again by a client that missed the answer
    looked_at, change = _compare(dataset, origin, end, opened)
    label = NewLabel(
        scan,
        tag,
        "annotator",
        actor,
        parent=_parent(origin, started),
        info=info,
        scan_sha256=now.sha256,
        checked_slices=united(origin.checked, looked_at, end.shape[through_plane_axis(end)]),
    )
    is_audited = origin.lease is not None and origin.lease.draw == "audit" and not simulated
    watched = watch_serving(dataset) if is_audited and change is not None else None
    with (
        contextlib.nullcontext(file) if file is not None else temporary_labels(end) as path,
        dataset.store.change_labels([LabelChange(label, path)]) as changing,
    ):
        conditions.check(changing.transaction)
        _check_loses_nothing(changing.transaction, label)
        kept = changing.versions[0]
        if proposal is not None:
            labels.note_proposal(changing.transaction, kept.id, proposal)
        correction = _answer(changing.transaction, origin, kept, change, repaired, simulated=simulated)
        if correction is not None and watched is not None:
            note_drift(changing.transaction, watched)
    if tag.startswith(READER):
        _compare_readers(dataset, scan)
    return Submission(kept, correction)


def _still_there(dataset: Dataset, scan: str, checked: ScanRecord | None) -> ScanRecord:
    """The scan that a label map is of.

    Raises:
        ScanReplaced: if its content is not the one that the label map was checked against.
    """
    now = dataset.verify_scan(scan) if checked is None else dataset.verify(checked)
    if checked is not None and checked.sha256 != now.sha256:
        raise ScanReplaced(scans.drawn_on_another(scan, "you began to submit"))
    return now


@dataclass(frozen=True, slots=True)
class _Conditions:
    """What has to hold for a final label to be kept: asked early, to spare work, and in the transaction that keeps it.

    In that one nobody comes between: approvals and other labels are transactions with the same write lock.
    """

    scan: str
    actor: Actor
    started: StartedFrom | None
    readers: int
    is_final: bool
    may_replace_approved: bool

    def check(self, transaction: Transaction) -> None:
        """Refuse a final label whose start has moved on, or of a scan that a reviewer has approved.

        Raises:
            LabelMovedOnError: see `check_start`.
            ApprovedError: if the scan is approved, and the annotator may not replace that.
        """
        if not self.is_final:
            return
        if self.started is not None:
            check_start(transaction, self.scan, self.actor, self.started, self.readers)
        if not self.may_replace_approved and scans.get(transaction, self.scan).state == "approved":
            raise ApprovedError(
                f"the scan {self.scan!r} is approved: only a reviewer may reopen it or give it another final label"
            )


def _check_loses_nothing(transaction: Transaction, label: NewLabel) -> None:
    """Refuse a correction of some slices in the place of a final label in which a person has checked others.

    That label came after the scan was handed out: nobody would have looked at those slices any more.

    Raises:
        LabelMovedOnError: if it is so.
    """
    there = labels.current(transaction, label.scan, FINAL)
    if label.tag != FINAL or label.checked_slices is None or there is None:
        return
    before = labels.checked_slices(there)
    if before is None or not set(before) <= set(label.checked_slices):
        raise LabelMovedOnError(
            f"the label of {label.scan!r} moved on: version {there.id} came after the scan was handed out, made by "
            f"{described(there.actor)}, who checked slices that yours leaves unchecked; ask for the next sample, or "
            "submit yours under another tag (version_1)"
        )


def _compare(dataset: Dataset, origin: _Origin, end: Volume, opened: Opened) -> tuple[Slices | None, Change | None]:
    """The slices that the annotator has looked at, None for all, and what was changed of the label handed out."""
    before = _read(dataset, origin.label, end) if origin.start is not None or origin.is_of_a_part else None
    looked_at = _looked_at(origin, before, end, opened)
    if origin.start is None or before is None:
        return looked_at, None
    return looked_at, measure_change(before, end, dataset.structures, replace(opened, slices=looked_at))


def _answer(
    transaction: Transaction,
    origin: _Origin,
    kept: LabelRecord,
    change: Change | None,
    repaired: Repaired | None,
    *,
    simulated: bool,
) -> int | None:
    """Have a kept label answer its lease; returns the number of the correction where it is one.

    What was sent back needs no lease to be corrected. Sent twice, it is one correction.
    """
    answered = leases.submitted(transaction, origin.lease) if origin.lease is not None else None
    if answered is not None and repaired is not None:
        attention_checks.answer(transaction, repaired.check, kept.actor, found=repaired.is_found)
    is_first = answered is not None if origin.lease is not None else not corrections.has(transaction, kept)
    if not is_first or origin.start is None or change is None:
        return None
    return corrections.add(transaction, origin.start, kept, change, kept.actor, lease=answered, simulated=simulated)


def _compare_readers(dataset: Dataset, scan: str) -> None:
    """Note how far the readers agree, once all have read."""
    pairs = inter_rater(dataset, scan)
    if len(readings(dataset, scan)) < dataset.settings.annotation.readers:
        return
    detail: JsonObject = {"pairs": [[p.first, p.second, p.structure, p.dice] for p in pairs]}
    with dataset.store.write() as transaction:
        number = scans.number_of(transaction, scan)
        events.record(transaction, events.SERVER, "readers compared", "scan", number, detail)


@dataclass(frozen=True, slots=True)
class _Origin:
    """What a submitted label was made of.

    Attributes:
        lease: the one that it answers; None where it answers none, or the one that it answers was answered before.
        start: the label that was handed out with it, or without a lease the one that was sent back.
        label: the start, or without one the scan's final label.
        is_final: whether a final label is submitted, and not another version of one.
        asked: the slices that the annotator was asked for; None for the whole scan.
    """

    lease: LeaseRecord | None
    start: LabelRecord | None
    label: LabelRecord | None
    is_final: bool
    asked: Slices | None

    @property
    def checked(self) -> Slices | None:
        """The slices of it that a person has looked at; None for all."""
        return () if self.label is None else labels.checked_slices(self.label)

    @property
    def is_of_a_part(self) -> bool:
        """Whether only what was asked for or changed counts as looked at, where nobody says what was opened."""
        return self.asked is not None or (not self.is_final and bool(self.checked))


def _origin(transaction: Transaction, scan: str, actor: Actor, tag: str) -> _Origin:
    """What a submission under a tag was made of.

    Raises:
        ScanReplaced: if another content was handed out than the scan has now.
    """
    lease, start = leases.last_of(transaction, scan, actor), None
    final = labels.current(transaction, scan, FINAL)
    if tag != FINAL:
        return _Origin(None, None, final, False, None)
    if lease is None:
        answered = leases.answered(transaction, scan, actor)
        start = labels.current(transaction, scan, RETURNED) if final is None else None
        return _Origin(None, start, start or final, True, answered.slices if answered is not None else None)
    if lease.label_version is not None:
        start = labels.get(transaction, lease.label_version)
    return _Origin(lease, start, start, True, lease.slices)


def _parent(origin: _Origin, started: StartedFrom | None) -> int | None:
    """The version that a label was made of: what was handed out, else what the client says, else the final label."""
    if origin.start is None and started is not None:
        return started.version
    return None if origin.label is None else origin.label.id


def _read(dataset: Dataset, label: LabelRecord | None, end: Volume) -> Volume | None:
    """A label map that another one was made of; None where it can't have been of use for that."""
    if label is None:
        return None
    try:
        before = dataset.store.read_label(label)
    except VolumeError:
        return None
    return before if before.shape == end.shape else None


def _holds(dataset: Dataset, label: LabelRecord, end: Volume) -> bool:
    """Whether a label has the voxels of a label map."""
    kept = _read(dataset, label, end)
    return kept is not None and np.array_equal(kept.array, end.array)


def _looked_at(origin: _Origin, before: Volume | None, end: Volume, opened: Opened) -> Slices | None:
    """The slices that the annotator has looked at; None for all."""
    if opened.slices is not None:
        return tuple(sorted(set(opened.slices)))
    if not origin.is_of_a_part:
        return None
    empty = np.zeros_like(end.array)
    changed = differing(empty if before is None else before.array, end.array, through_plane_axis(end))
    return tuple(sorted({*(origin.asked or ()), *changed}))
