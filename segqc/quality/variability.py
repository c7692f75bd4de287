"""Observer variability: where several people's label maps of one scan differ, nobody knows the truth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from segqc.types import BoolArray, LabelArray


def variability(truth: LabelArray, observers: Sequence[LabelArray]) -> BoolArray:
    """The voxels in which an observer differs from the label that counts.

    Args:
        truth: the label that counts, (n0, n1, n2).
        observers: other observers' label maps, of the same shape.
    """
    found = np.zeros(truth.shape, bool)
    for observer in observers:
        found |= observer != truth
    return found


def nearest_truth(mask: LabelArray, truth: LabelArray, observers: Sequence[LabelArray]) -> LabelArray:
    """What a mask is compared with: the label that counts, but for voxels in which an observer says what the mask says.

    So a voxel is wrong only where the mask agrees with nobody.

    Args:
        mask: a label map (n0, n1, n2).
        truth: the label that counts, of the same shape.
        observers: other observers' label maps.

    Example:
        The first voxel is an observer's, the last one nobody's.

        >>> nearest_truth(np.array([1, 1, 3]), np.array([0, 1, 1]), [np.array([1, 1, 2])])
        array([1, 1, 1])
    """
    nearest = truth
    for observer in observers:
        nearest = np.where(mask == observer, mask, nearest)
    return nearest
