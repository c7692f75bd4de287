"""Voxels of error maps counted by probability and truth, from which recall and precision of likely errors are read.

Missed tissue (outside the mask) and wrongly included tissue (inside it) are counted apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from segqc.quality.metrics import Values
from segqc.types import BoolArray, FloatArray

STEPS = 1000  # an error probability is kept as a whole number of 1/STEPS, rounded down
_TOLERANCE = 1e-3  # of a step: 0.3 in single precision is 300 steps


@dataclass(frozen=True, slots=True)
class ErrorMapCounts:
    """Voxels by error probability, of one mask or of the sum of several.

    Attributes:
        wrong: voxels that are truly wrong, by their probability in steps of 1/STEPS, STEPS + 1 numbers.
        right: the other voxels.
    """

    wrong: tuple[int, ...] = (0,) * (STEPS + 1)
    right: tuple[int, ...] = (0,) * (STEPS + 1)

    def __add__(self, other: ErrorMapCounts) -> ErrorMapCounts:
        return ErrorMapCounts(
            tuple(a + b for a, b in zip(self.wrong, other.wrong, strict=True)),
            tuple(a + b for a, b in zip(self.right, other.right, strict=True)),
        )

    @property
    def average_precision(self) -> float | None:
        """Average precision over all thresholds (sum of precision times rise in recall); None without wrong voxels.

        That of the probabilities rounded down to steps of 1/STEPS.
        """
        return _number(average_precisions(*self._rows()))

    def dice(self, threshold: float = 0.5) -> float | None:
        """Dice of the voxels whose probability reaches a threshold with the wrong ones; None without either.

        Raises:
            ValueError: if the threshold is no multiple of 1/STEPS in (0, 1].
        """
        return _number(dice_of_counts(*self._rows(), threshold))

    def recall(self, threshold: float = 0.5) -> float | None:
        """Share of the wrong voxels whose probability reaches a threshold; None without wrong voxels.

        Raises:
            ValueError: if the threshold is no multiple of 1/STEPS in (0, 1].
        """
        wrong = np.array(self.wrong, np.float64)
        return float(wrong[_first_step(threshold) :].sum() / wrong.sum()) if wrong.any() else None

    def recall_at_precision(self, precision: float) -> float | None:
        """The largest recall of a threshold at which this share of the chosen voxels is wrong; 0 where none is.

        None without wrong voxels.
        """
        if not any(self.wrong):
            return None
        hits, false = (np.cumsum(counts[::-1], dtype=np.float64) for counts in (self.wrong, self.right))
        precise = (hits > 0) & (hits >= precision * (hits + false))
        return float(hits[precise].max(initial=0.0) / hits[-1])

    def _rows(self) -> tuple[Values, Values]:
        return np.array([self.wrong], np.float64), np.array([self.right], np.float64)


@dataclass(frozen=True, slots=True)
class SignedCounts:
    """Counts apart for the two signs of error, which share out the voxels.

    Attributes:
        false_positive: voxels of the mask: wrong where the truth lacks the structure.
        false_negative: voxels outside the mask: wrong where the truth has it.
    """

    false_positive: ErrorMapCounts = ErrorMapCounts()
    false_negative: ErrorMapCounts = ErrorMapCounts()

    def __add__(self, other: SignedCounts) -> SignedCounts:
        return SignedCounts(self.false_positive + other.false_positive, self.false_negative + other.false_negative)

    @property
    def both(self) -> ErrorMapCounts:
        """All voxels."""
        return self.false_positive + self.false_negative


def count_voxels(error: FloatArray, wrong: BoolArray, mask: BoolArray) -> SignedCounts:
    """Count the voxels of one error map by probability, sign and truth.

    Args:
        error: error probabilities, (n0, n1, n2).
        wrong: the true error, of the same shape: |T - M|, or that after error extraction.
        mask: the mask under assessment.

    Raises:
        ValueError: if shapes differ, or a probability is not in [0, 1].
    """
    if not error.shape == wrong.shape == mask.shape:
        raise ValueError(f"an error map is compared on one grid, got {error.shape}, {wrong.shape} and {mask.shape}")
    if error.size and not (error.min() >= 0 and error.max() <= 1):
        raise ValueError(f"error probabilities lie in [0, 1], got {error.min()} to {error.max()}")
    # one number for probability, truth and sign, in single precision: this runs over all voxels
    step = (error.astype(np.float32, copy=False) * np.float32(STEPS) + np.float32(_TOLERANCE)).astype(np.int32)
    kind = 2 * mask.astype(bool, copy=False).view(np.uint8) + wrong.astype(bool, copy=False).view(np.uint8)
    table = np.bincount((step + (STEPS + 1) * kind.astype(np.int32)).ravel(), minlength=4 * (STEPS + 1))
    outside_right, outside_wrong, inside_right, inside_wrong = (
        tuple(row) for row in table.reshape(4, STEPS + 1).tolist()
    )
    return SignedCounts(ErrorMapCounts(inside_wrong, inside_right), ErrorMapCounts(outside_wrong, outside_right))


def average_precisions(wrong: Values, right: Values) -> Values:
    """Average precision of rows of counts by rising probability, (rows, STEPS + 1)."""
    hits = np.cumsum(wrong[:, ::-1], axis=1)
    precision = ratios(hits, hits + np.cumsum(right[:, ::-1], axis=1))
    return ratios(np.nansum(precision * wrong[:, ::-1], axis=1), hits[:, -1])


def dice_of_counts(wrong: Values, right: Values, threshold: float) -> Values:
    """Dice of likely and wrong voxels, of rows of counts by rising probability, (rows, STEPS + 1)."""
    first = _first_step(threshold)
    hits, false = wrong[:, first:].sum(axis=1), right[:, first:].sum(axis=1)
    return ratios(2 * hits, hits + false + wrong.sum(axis=1))


def _first_step(threshold: float) -> int:
    first = round(threshold * STEPS)
    if not 0 < threshold <= 1 or abs(first - threshold * STEPS) > _TOLERANCE:
        raise ValueError(f"voxels are counted in steps of 1/{STEPS}: no threshold of {threshold}")
    return first


def ratios(part: Values, whole: Values) -> Values:
    """Quotients, NaN over zero; both of one shape."""
    return np.divide(part, whole, out=np.full_like(whole, np.nan), where=whole > 0)


def _number(values: Values) -> float | None:
    return None if np.isnan(values[0]) else float(values[0])
