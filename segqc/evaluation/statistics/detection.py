"""How well errors are found: boxes (paper, section 3.4; method, "Detection") and voxels of the error map.

Boxes and voxels of all masks are pooled; intervals are bootstraps by patient. Counts of voxels add up over masks, so
that no experiment holds all of its error maps at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from segqc.evaluation.statistics.estimation import (
    LEVEL,
    ConfidenceInterval,
    Indices,
    patient_index,
    percentile_interval,
    with_resamples,
)
from segqc.quality.boxes import Detection, match_boxes, match_boxes_at
from segqc.quality.metrics import Values
from segqc.types import BoolArray, ErrorBox, FloatArray

MIN_IOUS = (0.05, 0.10, 0.15, 0.20)
DRAWS = 1000
STEPS = 1000  # an error probability is kept as a whole number of 1/STEPS, rounded down
_TOLERANCE = 1e-3  # of a step: 0.3 in single precision is 300 steps


@dataclass(frozen=True, slots=True)
class DetectionScores:
    """Precision and recall of the predicted boxes, pooled over masks.

    Attributes:
        threshold: error probability that the predicted boxes were made with; None where the caller did not say.
        min_iou: from which IoU on a predicted and a true box are a pair.
        masks, patients: how many.
        predicted, true, matched: numbers of boxes, and of pairs (each box in one pair at most).
        precision: matched / predicted; undefined without predicted boxes.
        recall: matched / true; undefined without true boxes.
    """

    threshold: float | None
    min_iou: float
    masks: int
    patients: int
    predicted: int
    true: int
    matched: int
    precision: ConfidenceInterval
    recall: ConfidenceInterval


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
        return _number(_average_precision(*self._rows()))

    def dice(self, threshold: float = 0.5) -> float | None:
        """Dice of the voxels whose probability reaches a threshold with the wrong ones; None without either.

        Raises:
            ValueError: if the threshold is no multiple of 1/STEPS in (0, 1].
        """
        return _number(_dice(*self._rows(), threshold))

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


@dataclass(frozen=True, slots=True)
class ErrorMapScores:
    """How well error maps show the wrong voxels.

    Attributes:
        threshold: error probability from which a voxel counts as predicted wrong.
        masks, patients: how many.
        wrong_share: share of the voxels that are wrong: the average precision of a map without information.
        pooled_dice: Dice of predicted and truly wrong voxels over all masks together.
        mean_dice: mean of the masks' own Dice, over those that have predicted or truly wrong voxels.
        counted: their number.
        average_precision: over the voxels of all masks together.
    """

    threshold: float
    masks: int
    patients: int
    wrong_share: float | None
    pooled_dice: ConfidenceInterval
    mean_dice: ConfidenceInterval
    counted: int
    average_precision: ConfidenceInterval


def detection_scores(
    predicted: Sequence[Sequence[ErrorBox]],
    true: Sequence[Sequence[ErrorBox]],
    patients: Sequence[str],
    *,
    generator: np.random.Generator,
    threshold: float | None = None,
    min_ious: Sequence[float] = MIN_IOUS,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> tuple[DetectionScores, ...]:
    """Precision and recall of boxes, one result per IoU.

    Args:
        predicted: the boxes of each mask's error map.
        true: the boxes of its true error.
        patients: whose mask it is.
        generator: the source of the bootstrap draws of patients.
        threshold: what the predicted boxes were made with, to be kept beside the scores.
        min_ious: IoUs in (0, 1].
        draws: the number of draws.
        level: the intervals' level.

    Raises:
        ValueError: if lengths differ, or an IoU is out of range.
    """
    if not len(predicted) == len(true) == len(patients):
        raise ValueError(
            f"each mask needs predicted boxes, true boxes and a patient, got {len(predicted)}, {len(true)} and "
            f"{len(patients)}"
        )
    index, count = patient_index(patients)
    copies = with_resamples(count, draws, generator)
    matched_at = [match_boxes_at(p, t, min_ious) for p, t in zip(predicted, true, strict=True)]
    scores = []
    for i, min_iou in enumerate(min_ious):
        found = [of_mask[i] for of_mask in matched_at]
        table = np.array([(d.predicted, d.true, d.matched) for d in found], np.float64).reshape(-1, 3)
        sums = copies @ _by_patient(table, index, count)
        predicted_sum, true_sum, matched = sums[:, 0], sums[:, 1], sums[:, 2]
        precision, recall = _ratio(matched, predicted_sum), _ratio(matched, true_sum)
        scores.append(
            DetectionScores(
                threshold=threshold,
                min_iou=min_iou,
                masks=len(found),
                patients=count,
                predicted=int(predicted_sum[0]),
                true=int(true_sum[0]),
                matched=int(matched[0]),
                precision=percentile_interval(precision[0], precision[1:], level),
                recall=percentile_interval(recall[0], recall[1:], level),
            )
        )
    return tuple(scores)


def detection_over_thresholds(
    predicted: Mapping[float, Sequence[Sequence[ErrorBox]]],
    true: Sequence[Sequence[ErrorBox]],
    patients: Sequence[str],
    *,
    generator: np.random.Generator,
    min_ious: Sequence[float] = MIN_IOUS,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> tuple[DetectionScores, ...]:
    """Precision and recall of boxes made at several thresholds of the error probability.

    Args:
        predicted: by threshold, the boxes of each mask.
        true: the boxes of the true error, at whatever threshold.
        patients: whose mask it is.
        generator: the source of the bootstrap draws of patients.
        min_ious: IoUs in (0, 1].
        draws: the number of draws.
        level: the intervals' level.

    Returns:
        One result per threshold, rising, and IoU.

    Raises:
        ValueError: as `detection_scores`.
    """
    return tuple(
        score
        for threshold in sorted(predicted)
        for score in detection_scores(
            predicted[threshold],
            true,
            patients,
            generator=generator,
            threshold=threshold,
            min_ious=min_ious,
            draws=draws,
            level=level,
        )
    )


def choose_threshold(
    predicted: Mapping[float, Sequence[Sequence[ErrorBox]]],
    true: Sequence[Sequence[ErrorBox]],
    *,
    min_iou: float,
    precision: float,
) -> float:
    """The lowest threshold whose boxes have a wanted precision, so that as many errors as may be are found.

    Where none has it, the one of the highest precision is taken; the lowest where no boxes are predicted at all. For
    masks that no result is reported of.

    Args:
        predicted: by threshold, the boxes of each mask; one threshold at least.
        true: the boxes of the true error.
        min_iou: from which IoU on two boxes are a pair.
        precision: what is wanted.
    """
    reached = dict[float, float]()
    for threshold, boxes in predicted.items():
        found = sum((match_boxes(p, t, min_iou) for p, t in zip(boxes, true, strict=True)), Detection())
        if found.precision is not None:
            reached[threshold] = found.precision
    if not reached:
        return min(predicted)
    precise = [threshold for threshold, value in reached.items() if value >= precision]
    return min(precise) if precise else max(reached, key=lambda t: (reached[t], t))


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


def error_map_scores(
    counts: Sequence[ErrorMapCounts],
    patients: Sequence[str],
    *,
    generator: np.random.Generator,
    threshold: float = 0.5,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> ErrorMapScores:
    """Score error maps against the true errors, pooled and per mask, with intervals by patient.

    Args:
        counts: of each mask, for one sign or `SignedCounts.both`.
        patients: whose mask it is.
        generator: the source of the bootstrap draws of patients.
        threshold: error probability from which a voxel counts as predicted wrong, a multiple of 1/STEPS.
        draws: the number of draws.
        level: the intervals' level.

    Raises:
        ValueError: if lengths differ, or the threshold is no multiple of 1/STEPS in (0, 1].
    """
    if len(counts) != len(patients):
        raise ValueError(f"each mask needs a patient, got {len(counts)} masks and {len(patients)} patients")
    index, count = patient_index(patients)
    copies = with_resamples(count, draws, generator)
    wrong, right = (
        np.array(rows, np.float64).reshape(-1, STEPS + 1)
        for rows in ([c.wrong for c in counts], [c.right for c in counts])
    )
    own = _dice(wrong, right, threshold)
    defined = ~np.isnan(own)
    means = copies @ _by_patient(np.stack([np.where(defined, own, 0.0), defined], axis=1), index, count)
    pooled = [copies @ _by_patient(rows, index, count) for rows in (wrong, right)]

    def interval(values: Values) -> ConfidenceInterval:
        return percentile_interval(values[0], values[1:], level)

    voxels = wrong.sum() + right.sum()
    return ErrorMapScores(
        threshold=threshold,
        masks=len(counts),
        patients=count,
        wrong_share=float(wrong.sum() / voxels) if voxels else None,
        pooled_dice=interval(_dice(pooled[0], pooled[1], threshold)),
        mean_dice=interval(_ratio(means[:, 0], means[:, 1])),
        counted=int(defined.sum()),
        average_precision=interval(_average_precision(pooled[0], pooled[1])),
    )


def _by_patient(table: Values, index: Indices, patients: int) -> Values:
    """Sum rows (masks, columns) over each patient, (patients, columns)."""
    sums = np.zeros((patients, table.shape[1]))
    np.add.at(sums, index, table)
    return sums


def _average_precision(wrong: Values, right: Values) -> Values:
    """Average precision of rows of counts by rising probability, (rows, STEPS + 1)."""
    hits = np.cumsum(wrong[:, ::-1], axis=1)
    precision = _ratio(hits, hits + np.cumsum(right[:, ::-1], axis=1))
    return _ratio(np.nansum(precision * wrong[:, ::-1], axis=1), hits[:, -1])


def _dice(wrong: Values, right: Values, threshold: float) -> Values:
    first = _first_step(threshold)
    hits, false = wrong[:, first:].sum(axis=1), right[:, first:].sum(axis=1)
    return _ratio(2 * hits, hits + false + wrong.sum(axis=1))


def _first_step(threshold: float) -> int:
    first = round(threshold * STEPS)
    if not 0 < threshold <= 1 or abs(first - threshold * STEPS) > _TOLERANCE:
        raise ValueError(f"voxels are counted in steps of 1/{STEPS}: no threshold of {threshold}")
    return first


def _ratio(part: Values, whole: Values) -> Values:
    return np.divide(part, whole, out=np.full_like(whole, np.nan), where=whole > 0)


def _number(values: Values) -> float | None:
    return None if np.isnan(values[0]) else float(values[0])
