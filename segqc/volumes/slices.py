"""Sets of slices across the through-plane axis, where a person has looked at a part of a label map only."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import TypeAlias

import numpy as np

from segqc.types import LabelArray

Slices: TypeAlias = tuple[int, ...]
"""Numbers of slices, ascending."""


def united(one: Collection[int] | None, other: Collection[int] | None, count: int) -> Slices | None:
    """The slices that are in one of two sets; None stands for all slices.

    Args:
        one: a set.
        other: a set.
        count: how many slices there are.

    Example:
        >>> united((3,), (1, 3), 5)
        (1, 3)
        >>> united((0, 1), (2,), 3) is None
        True
    """
    if one is None or other is None:
        return None
    found = sorted({*one, *other})
    return tuple(found) if len(found) < count else None


def common(one: Collection[int] | None, other: Collection[int] | None) -> Slices | None:
    """The slices that are in both of two sets; None stands for all slices.

    Example:
        >>> common((1, 3), None)
        (1, 3)
        >>> common((1, 3), (0, 3))
        (3,)
    """
    if one is None or other is None:
        known = other if one is None else one
        return None if known is None else tuple(sorted(known))
    return tuple(sorted(set(one) & set(other)))


def part(array: LabelArray, slices: Collection[int] | None, axis: int) -> LabelArray:
    """Some slices of an array, one after the other; the array itself where None stands for all."""
    return array if slices is None else np.take(array, sorted(slices), axis=axis)


def all_but(shape: tuple[int, int, int], slices: Collection[int], axis: int) -> LabelArray:
    """An array of a shape that is 1 in all slices but some, where it is 0."""
    result = np.ones(shape, np.uint8)
    np.moveaxis(result, axis, 0)[sorted(slices)] = 0
    return result


def differing(before: LabelArray, after: LabelArray, axis: int) -> Slices:
    """The slices in which two label maps of one shape differ."""
    in_plane = tuple(a for a in range(3) if a != axis)
    return tuple(np.flatnonzero((before != after).any(axis=in_plane)).tolist())


def unchanged(before: LabelArray, after: LabelArray, axis: int) -> Slices:
    """The slices in which a label map still holds exactly what the one held that it was made of; of one shape.

    A slice that is empty in both tells nothing by itself: it counts as the nearest one that is not.
    """
    same = np.ones(before.shape[axis], bool)
    same[list(differing(before, after, axis))] = False
    there = np.flatnonzero(((before | after) != 0).any(axis=tuple(a for a in range(3) if a != axis)))
    if there.size:
        distance = np.abs(np.arange(same.size)[:, None] - there)
        same = same[there[distance.argmin(axis=1)]]
    return tuple(np.flatnonzero(same).tolist())


def in_words(slices: Collection[int]) -> str:
    """Slices by number, as a part of a sentence; three neighbours or more as a range.

    Example:
        >>> in_words((3, 7, 9))
        'slices 3, 7 and 9'
        >>> in_words((3, 4, 5, 9))
        'slices 3 to 5 and 9'
        >>> in_words((3,))
        'slice 3'
    """
    numbers = sorted(slices)
    runs = [[number for _, number in run] for _, run in itertools.groupby(enumerate(numbers), lambda p: p[1] - p[0])]
    *others, last = [part for run in runs for part in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    together = f"{', '.join(others)} and {last}" if others else last
    return f"slices {together}" if len(numbers) > 1 else f"slice {together}"
