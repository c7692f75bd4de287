"""What seems wrong with a mask, in a sentence: which structure, in which slices, and whether too little or too much."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from segqc.types import Assessment, ErrorBox
from segqc.volumes.slices import in_words

ErrorKind: TypeAlias = Literal["part missing", "all missing", "included"]

NOTHING_FOUND: Final = "Nothing found."
_MAX_NAMED: Final = 3  # in one sentence


@dataclass(frozen=True, slots=True)
class LikelyError:
    """What seems wrong with a structure in some slices.

    Attributes:
        structure: its name.
        kind: whether a part or all of it seems to be missing, or something else to be wrongly included.
        slices: where, ascending, from 0.
        volume: about how much is wrong, to compare likely errors of one scan.
    """

    structure: str
    kind: ErrorKind
    slices: tuple[int, ...]
    volume: float


def likely_errors(assessment: Assessment, slices: Collection[int] | None = None) -> tuple[LikelyError, ...]:
    """Sum up the error boxes of a mask, the largest likely error first.

    Args:
        assessment: of the mask.
        slices: the slices that count; None for all.
    """
    found = []
    for quality in assessment.structures:
        boxes = [box for box in quality.raw.boxes if slices is None or box.slice_index in slices]
        missing: ErrorKind = "part missing" if quality.mask_volume_ml > 0 else "all missing"
        by_kind: dict[ErrorKind, list[ErrorBox]] = {}
        for box in boxes:
            by_kind.setdefault("included" if (box.mask_share or 0) > 0.5 else missing, []).append(box)
        for kind, chosen in by_kind.items():
            where = tuple(sorted({box.slice_index for box in chosen}))
            volume = sum(box.area_mm2 * box.mean_error for box in chosen)
            found.append(LikelyError(quality.name, kind, where, volume))
    return tuple(sorted(found, key=lambda error: -error.volume))


def sentence(errors: Collection[LikelyError]) -> str:
    """Likely errors as people are told, in one sentence.

    Example:
        >>> sentence([LikelyError("placenta", "part missing", (11, 12), 90.0)])
        'Look again at slices 11 and 12: part of the placenta seems to be missing.'
        >>> sentence([])
        'Nothing found.'
    """
    if not errors:
        return NOTHING_FOUND
    told = [f"{in_words(error.slices)}: {_what(error)}" for error in itertools.islice(errors, _MAX_NAMED)]
    more = "; and there is more" if len(errors) > _MAX_NAMED else ""
    return f"Look again at {'; at '.join(told)}{more}."


def _what(error: LikelyError) -> str:
    match error.kind:
        case "part missing":
            return f"part of the {error.structure} seems to be missing"
        case "all missing":
            return f"the {error.structure} seems to be missing"
        case "included":
            return f"something else seems to be marked as {error.structure}"
