"""What proposals were worth: how many of their boxes people took, and what these have changed of the true Dice.

The truth is the label that counts in the end, which may still hold what was taken: nobody knows what it would be
without a proposal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from segqc.errors import SegqcError
from segqc.loop.dataset import Dataset
from segqc.loop.proposals import boxes_of_all
from segqc.progress import Progress
from segqc.quality.metrics import true_metrics
from segqc.quality.proposal import ProposedBox
from segqc.store import labels, scans
from segqc.store.labels import FINAL
from segqc.store.records import Actor, LabelRecord, ScanRecord
from segqc.types import BoolArray, LabelArray, Structure
from segqc.volumes import read_grid, through_plane_axis


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalWorth:
    """What became of the proposals that were offered to one annotator.

    Attributes:
        actor: the annotator.
        submissions: labels that were submitted after a proposal was offered.
        boxes_offered, boxes_taken: of these proposals.
        measured: submissions with boxes taken whose label versions can still be read, and whose scan has a final label.
        dice_before: of these, the mean true Dice of what they were made of, over structures; None without any.
        dice_after: the same with nothing changed but the boxes taken.
    """

    actor: Actor
    submissions: int
    boxes_offered: int
    boxes_taken: int
    measured: int
    dice_before: float | None
    dice_after: float | None


@dataclass(frozen=True, slots=True)
class _Use:
    """A submission, the proposal that was offered before it with its boxes, and what counts in the end."""

    scan: ScanRecord
    submitted: LabelRecord
    start: LabelRecord | None
    proposal: LabelRecord
    boxes: tuple[ProposedBox, ...]
    final: LabelRecord | None
    offered: int
    taken: int


def proposal_worth(dataset: Dataset, progress: Progress) -> list[ProposalWorth]:
    """What proposals were worth, by annotator in the order of their names.

    Args:
        dataset: the folder.
        progress: called after each submission whose labels are read.
    """
    uses = _uses(dataset)
    read = [use for use in uses if use.taken]
    changes: dict[int, tuple[float, float] | None] = {}
    for i, use in enumerate(read):
        progress.step(i, len(read), "what proposals have changed", use.submitted.scan, unit="labels")
        changes[use.submitted.id] = _change(dataset, use)
    actors = sorted({use.submitted.actor for use in uses}, key=lambda a: (a.name, a.identified_by))
    return [_of_actor(actor, [u for u in uses if u.submitted.actor == actor], changes) for actor in actors]


def _of_actor(actor: Actor, uses: Sequence[_Use], changes: dict[int, tuple[float, float] | None]) -> ProposalWorth:
    known = [change for use in uses if (change := changes.get(use.submitted.id)) is not None]
    return ProposalWorth(
        actor=actor,
        submissions=len(uses),
        boxes_offered=sum(use.offered for use in uses),
        boxes_taken=sum(use.taken for use in uses),
        measured=len(known),
        dice_before=fmean(before for before, _ in known) if known else None,
        dice_after=fmean(after for _, after in known) if known else None,
    )


def _uses(dataset: Dataset) -> list[_Use]:
    with dataset.store.read() as transaction:
        taken = labels.taken_proposals(transaction)
        versions = labels.get_all(transaction, [*taken, *(of.proposal for of in taken.values())])
        starts = [p for of in taken.values() if (p := versions[of.proposal].parent) is not None]
        versions |= labels.get_all(transaction, starts)
        finals = labels.current_of_all(transaction, FINAL)
        boxes = boxes_of_all(transaction, sorted({of.proposal for of in taken.values()}))
        by_name = {scan.name: scan for scan in scans.listing(transaction)}
        return [
            _Use(
                by_name[versions[number].scan],
                versions[number],
                versions.get(versions[of.proposal].parent or 0),
                versions[of.proposal],
                boxes[of.proposal],
                finals.get(versions[number].scan),
                of.boxes_offered,
                of.boxes_taken,
            )
            for number, of in taken.items()
        ]


def _change(dataset: Dataset, use: _Use) -> tuple[float, float] | None:
    """The true Dice before and after the boxes that were taken; None where a label can't be read any more."""
    if use.start is None or use.final is None:
        return None
    versions = (use.start, use.proposal, use.submitted, use.final)
    try:
        grid = read_grid(dataset.scan_file(use.scan))
        volumes = [dataset.store.read_label(version, scan=grid) for version in versions]
    except (SegqcError, OSError):  # such as of a scan's content that was replaced
        return None
    start, proposed, submitted, final = (np.asarray(volume.array, np.uint8) for volume in volumes)
    structures, axis = dataset.structures, through_plane_axis(grid)
    after = with_taken(start, proposed, submitted, structures, use.boxes, use.taken, axis)
    before, now = (_dice(mask, final, structures) for mask in (start, after))
    return None if before is None or now is None else (before, now)


def with_taken(
    start: LabelArray,
    proposed: LabelArray,
    submitted: LabelArray,
    structures: Sequence[Structure],
    boxes: Sequence[ProposedBox],
    taken: int,
    axis: int,
) -> LabelArray:
    """What a label map would be with nothing changed but the boxes that were taken of its proposal.

    Only their number is kept. They are those in which the submitted label agrees best with the proposal.

    Args:
        start: the label map (n0, n1, n2) that the proposal was made of.
        proposed: the proposal.
        submitted: what was submitted.
        structures: the structures.
        boxes: that were offered.
        taken: how many of them were taken.
        axis: the through-plane axis.
    """
    after = start.copy()
    old, new, end, result = (np.moveaxis(array, axis, 0) for array in (start, proposed, submitted, after))
    by_name = {structure.name: structure for structure in structures}
    changes: list[tuple[tuple[int, slice, slice], BoolArray, float]] = []
    for box in boxes:
        where = (box.slice_index, slice(box.start[0], box.stop[0]), slice(box.start[1], box.stop[1]))
        own, structure = old[where] != new[where], by_name.get(box.structure)
        if structure is not None:
            own &= structure.mask(old[where]) | structure.mask(new[where])
        if own.any():
            changes.append((where, own, float((end[where] == new[where])[own].mean())))
    for where, own, agreement in sorted(changes, key=lambda change: -change[2])[:taken]:
        if agreement > 0:
            result[where][own] = new[where][own]
    return after


def _dice(mask: LabelArray, truth: LabelArray, structures: Sequence[Structure]) -> float | None:
    found = [true_metrics(s.mask(mask), s.mask(truth)).dice for s in structures]
    known = [dice for dice in found if dice is not None]
    return fmean(known) if known else None
