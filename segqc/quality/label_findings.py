"""What seems wrong in a label: the error boxes, gathered by structure and sign of the error, and one sentence."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np

from segqc.types import Assessment, BoolArray, ErrorBox, FloatArray, LabelArray, Structure, StructureQuality

FaultKind: TypeAlias = Literal["missing", "included", "absent"]
"""Tissue that the label leaves out, tissue that it wrongly includes, or a whole structure that it lacks."""

NOTHING_FOUND: Final = "nothing found"
_MAX_NAMED: Final = 3  # faults in one sentence
_LIKELY: Final = 0.5  # the error probability of voxels that decide on the kind


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelFault:
    """Likely errors of one kind in one structure.

    Attributes:
        structure: its name.
        kind: what is wrong with it.
        slices: where, ascending, numbered from 0 along the through-plane axis.
        volume_ml: the error probabilities inside the boxes, added up.
    """

    structure: str
    kind: FaultKind
    slices: tuple[int, ...]
    volume_ml: float


def find_faults(
    assessment: Assessment,
    errors: FloatArray,
    labels: LabelArray,
    structures: Sequence[Structure],
    *,
    only: Collection[int] | None = None,
) -> tuple[LabelFault, ...]:
    """Gather the error boxes of an assessment by structure and kind, the largest volume first.

    A box is of the kind that most of its likely wrong voxels are of: outside of the mask something is missing, inside
    of it something is wrongly included.

    Args:
        assessment: of the label map.
        errors: its error maps, one per structure, (L, n0, n1, n2).
        labels: the label map, (n0, n1, n2).
        structures: the structures, in the order of the maps.
        only: the slices that are looked at; None for all.
    """
    axis = assessment.through_plane_axis
    voxel_ml = float(np.prod(assessment.spacing_mm)) / 1000.0
    found: dict[tuple[str, FaultKind], list[tuple[int, float]]] = {}
    for quality, structure, error in zip(assessment.structures, structures, errors, strict=True):
        mask = np.moveaxis(structure.mask(labels), axis, 0)
        planes = np.moveaxis(error, axis, 0)
        is_absent = not mask.any()
        for box in quality.raw.boxes:
            if only is not None and box.slice_index not in only:
                continue
            rows, columns = (slice(a, b) for a, b in zip(box.start, box.stop, strict=True))
            error_in_box = planes[box.slice_index, rows, columns]
            inside, outside = _sums(error_in_box, mask[box.slice_index, rows, columns])
            kind: FaultKind = "absent" if is_absent else "included" if inside > outside else "missing"
            volume = float(error_in_box.sum(dtype=np.float64)) * voxel_ml
            found.setdefault((structure.name, kind), []).append((box.slice_index, volume))
    faults = [
        LabelFault(
            structure=name,
            kind=kind,
            slices=tuple(sorted({index for index, _ in boxes})),
            volume_ml=sum(volume for _, volume in boxes),
        )
        for (name, kind), boxes in found.items()
    ]
    return tuple(sorted(faults, key=lambda fault: -fault.volume_ml))


def _sums(error: FloatArray, mask: BoolArray) -> tuple[float, float]:
    """The likely wrong voxels' error probabilities inside and outside of a mask, added up."""
    likely = np.where(error >= _LIKELY, error, 0)
    return float(likely[mask].sum()), float(likely[~mask].sum())


def fault_sentence(faults: Sequence[LabelFault]) -> str:
    """What seems wrong in a label, in one sentence.

    Example:
        >>> fault_sentence([LabelFault(structure="placenta", kind="missing", slices=(12, 13), volume_ml=2.0)])
        'look again at slices 12 and 13: part of the placenta seems to be missing'
        >>> fault_sentence([])
        'nothing found'
    """
    if not faults:
        return NOTHING_FOUND
    parts = [f"{_slices(fault.slices)}: {_what(fault)}" for fault in faults[:_MAX_NAMED]]
    more = "; and more" if len(faults) > _MAX_NAMED else ""
    return f"look again at {'; at '.join(parts)}{more}"


def _what(fault: LabelFault) -> str:
    match fault.kind:
        case "missing":
            return f"part of the {fault.structure} seems to be missing"
        case "included":
            return f"something seems to be wrongly included in the {fault.structure}"
        case "absent":
            return f"the {fault.structure} seems to be missing"


def _slices(slices: Sequence[int]) -> str:
    """Slices in words, those that follow each other as ranges: "slice 3", "slices 3, 5 and 7 to 12"."""
    runs: list[list[int]] = []
    for index in slices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    named: list[str] = []
    for run in runs:
        named += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run)
    head, last = ", ".join(named[:-1]), named[-1]
    return f"{'slice' if len(slices) == 1 else 'slices'} {f'{head} and {last}' if head else last}"


def error_sums(structures: Sequence[StructureQuality]) -> dict[int, float]:
    """The error sum of each slice over all structures."""
    sums: dict[int, float] = {}
    for quality in structures:
        for part in quality.raw.slices:
            sums[part.index] = sums.get(part.index, 0.0) + part.error_sum
    return sums


def slices_to_look_at(assessment: Assessment, only: Collection[int] | None = None) -> tuple[int, ...]:
    """The slices with error boxes, the largest error sum first.

    Args:
        assessment: of the label map.
        only: the slices that are looked at; None for all.
    """
    sums = error_sums(assessment.structures)
    boxes: set[int] = {box.slice_index for box in _boxes(assessment) if only is None or box.slice_index in only}
    return tuple(sorted(boxes, key=lambda index: (-sums[index], index)))


def worst_slice(assessment: Assessment, only: Collection[int] | None = None) -> int:
    """The slice to look at first: the first with an error box, else that with the largest error sum."""
    if boxed := slices_to_look_at(assessment, only):
        return boxed[0]
    sums = error_sums(assessment.structures)
    wanted = [index for index in sums if only is None or index in only] or list(sums) or [0]
    return max(wanted, key=lambda index: (sums.get(index, 0.0), -index))


def _boxes(assessment: Assessment) -> list[ErrorBox]:
    return [box for quality in assessment.structures for box in quality.raw.boxes]
