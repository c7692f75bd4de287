"""How well errors are found: boxes (paper, section 3.4; method, "Detection") and voxels of the error map.

Boxes and voxels of all masks are pooled; intervals are bootstraps by patient. Counts of voxels add up over masks, so
that no experiment holds all of its error maps at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from segqc.quality.boxes import Detection, match_boxes, match_boxes_at
from segqc.quality.error_counts import STEPS, ErrorMapCounts, average_precisions, dice_of_counts, ratios
from segqc.quality.estimation import (
    LEVEL,
    ConfidenceInterval,
    Indices,
    patient_index,
    percentile_interval,
    with_resamples,
)
from segqc.quality.metrics import Values
from segqc.types import ErrorBox

MIN_IOUS = (0.05, 0.10, 0.15, 0.20)
DRAWS = 1000


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
        precision, recall = ratios(matched, predicted_sum), ratios(matched, true_sum)
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
    own = dice_of_counts(wrong, right, threshold)
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
        pooled_dice=interval(dice_of_counts(pooled[0], pooled[1], threshold)),
        mean_dice=interval(ratios(means[:, 0], means[:, 1])),
        counted=int(defined.sum()),
        average_precision=interval(average_precisions(pooled[0], pooled[1])),
    )


def _by_patient(table: Values, index: Indices, patients: int) -> Values:
    """Sum rows (masks, columns) over each patient, (patients, columns)."""
    sums = np.zeros((patients, table.shape[1]))
    np.add.at(sums, index, table)
    return sums
