"""How far scans are from others, by their features: farthest-first is the greedy solution of the k-center problem.

It chooses, again and again, the scan that is farthest from all those chosen so far, and leaves no scan at more than
twice the distance that the best choice would (Gonzalez, "Clustering to minimize the maximum intercluster distance",
1985). Sener & Savarese ("Active learning for convolutional neural networks: a core-set approach", ICLR 2018) brought it
to active learning.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from segqc.types import FloatArray

_FLOOR: Final = 0.1  # of deviations, as a part of their root median square: few scans may agree by chance
_TINY: Final = 1e-6
_AT_ONCE: Final = 128  # others that are compared with all scans at once: their distances stay in the cache


def standardised(features: FloatArray) -> FloatArray:
    """Features (scans, features), each with a mean of 0 and a deviation of about 1 over the scans.

    The distance of two scans is then the root mean square of their differences, see `nearest`.
    """
    centred = features - features.mean(axis=0)
    variance = np.mean(centred**2, axis=0)
    floor = _FLOOR**2 * float(np.median(variance)) + _TINY**2
    return np.asarray(centred / np.sqrt(variance + floor), np.float32)


def nearest(scans: FloatArray, others: FloatArray) -> FloatArray:
    """The distance of each scan to the nearest of others: (scans,), of features (scans, features), (others, features).

    Raises:
        ValueError: if there are no others.
    """
    if not len(others):
        raise ValueError("distances to the nearest of no scans are wanted")
    # of |a - b|^2 = |a|^2 - 2 ab + |b|^2 the first part is the same for all others
    nearest_yet = np.full(len(scans), np.inf, np.float32)
    squares = np.einsum("sf,sf->s", others, others)
    for start in range(0, len(others), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        found = (-2 * others[part]) @ scans.T
        found += squares[part, None]
        np.minimum(nearest_yet, found.min(axis=0), out=nearest_yet)
    own = np.einsum("sf,sf->s", scans, scans)
    return np.asarray(np.sqrt(np.maximum(nearest_yet + own, 0) / scans.shape[1]), np.float32)
