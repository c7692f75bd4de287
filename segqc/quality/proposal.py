"""A proposal: a mask with the estimated truth in its error boxes, for a person to take box by box, or leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segqc.types import BoolArray, ErrorBox, FloatArray, LabelArray, Structure

LIKELY = 0.5
"""The error probability from which a voxel is changed."""


@dataclass(frozen=True, slots=True)
class ProposedBox:
    """What a proposal changes of one structure in one error box: half-open voxel intervals along the in-plane axes."""

    structure: str
    slice_index: int
    start: tuple[int, int]
    stop: tuple[int, int]
    voxels: int


def propose(
    labels: LabelArray,
    errors: FloatArray,
    structures: Sequence[Structure],
    boxes: Sequence[Sequence[ErrorBox]],
    axis: int,
) -> LabelArray:
    """Correct a label map where it is probably wrong, in the boxes of each structure and nowhere else.

    A voxel that leaves its structure becomes background, one that joins a structure takes the structure's first value;
    where several structures claim it, the one whose estimated truth is likeliest.

    Args:
        labels: the label map (n0, n1, n2).
        errors: the error map of each structure's mask, (L, n0, n1, n2).
        structures: the structures.
        boxes: the error boxes of each structure.
        axis: the through-plane axis, which the boxes' slices lie across.
    """
    proposed = labels.copy()
    likeliest = np.zeros(labels.shape, np.float32)
    masks = [structure.mask(labels) for structure in structures]
    wrong = [
        (error >= LIKELY) & _inside(of_structure, labels.shape, axis)
        for error, of_structure in zip(errors, boxes, strict=True)
    ]
    for mask, of_structure in zip(masks, wrong, strict=True):
        proposed[of_structure & mask] = 0
    for structure, mask, error, of_structure in zip(structures, masks, errors, wrong, strict=True):
        joins = of_structure & ~mask & (error > likeliest)  # outside a mask the error is the truth
        proposed[joins] = structure.values[0]
        likeliest[joins] = error[joins]
    return proposed


def proposed_boxes(
    labels: LabelArray,
    proposed: LabelArray,
    structures: Sequence[Structure],
    boxes: Sequence[Sequence[ErrorBox]],
    axis: int,
) -> tuple[ProposedBox, ...]:
    """What can be taken of a proposal: the boxes in which it changes something, the largest change first.

    A box's changes are those of voxels in it that leave its structure or join it.

    Args:
        labels: the label map (n0, n1, n2).
        proposed: its proposal, see `propose`.
        structures: the structures.
        boxes: the error boxes of each structure.
        axis: the through-plane axis, which the boxes' slices lie across.
    """
    before, after = np.moveaxis(labels, axis, 0), np.moveaxis(proposed, axis, 0)
    found = []
    for structure, of_structure in zip(structures, boxes, strict=True):
        for box in of_structure:
            where = (box.slice_index, slice(box.start[0], box.stop[0]), slice(box.start[1], box.stop[1]))
            old, new = before[where], after[where]
            changes = (old != new) & (structure.mask(old) | structure.mask(new))
            voxels = int(np.count_nonzero(changes))
            if voxels:
                found.append(ProposedBox(structure.name, box.slice_index, box.start, box.stop, voxels))
    return tuple(sorted(found, key=lambda box: -box.voxels))


def _inside(boxes: Sequence[ErrorBox], shape: tuple[int, ...], axis: int) -> BoolArray:
    """Where the boxes are, (n0, n1, n2)."""
    inside = np.zeros(shape, bool)
    planes = np.moveaxis(inside, axis, 0)
    for box in boxes:
        planes[box.slice_index, box.start[0] : box.stop[0], box.start[1] : box.stop[1]] = True
    return inside
