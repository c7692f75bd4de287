from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from segqc.evaluation.statistics.detection import (
    MIN_IOUS,
    DetectionScores,
    ErrorMapScores,
    choose_threshold,
    detection_over_thresholds,
    detection_scores,
    error_map_scores,
)
from segqc.quality.boxes import match_boxes
from segqc.quality.error_counts import STEPS, ErrorMapCounts, SignedCounts, count_voxels
from segqc.quality.estimation import patient_index, resample
from segqc.types import ErrorBox

SHAPE = (6, 7, 4)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def box(start: tuple[int, int], stop: tuple[int, int], index: int = 0) -> ErrorBox:
    return ErrorBox(index, start, stop, float((stop[0] - start[0]) * (stop[1] - start[1])), 0.5, 0.9)


def random_boxes(draw: np.random.Generator, count: int) -> list[ErrorBox]:
    corners = draw.integers(0, 12, (count, 2))
    sides = draw.integers(2, 8, (count, 2))
    return [
        box((int(a), int(b)), (int(a + h), int(b + w)), int(draw.integers(0, 2)))
        for (a, b), (h, w) in zip(corners, sides, strict=True)
    ]


def case(seed: int, shape: tuple[int, int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An informative error map with many equal probabilities, the wrong voxels, and a mask."""
    draw = rng(seed)
    wrong = draw.random(shape) < 0.2
    error = (wrong * 0.4 + draw.random(shape) * 0.6).round(2).astype(np.float32)
    return error, wrong, draw.random(shape) < 0.5


def average_precision(error: np.ndarray, wrong: np.ndarray) -> float:
    """One threshold per distinct probability, from the highest."""
    total = recall = 0.0
    for threshold in np.unique(error)[::-1]:
        found = error >= threshold
        now = (found & wrong).sum() / wrong.sum()
        total += (now - recall) * (found & wrong).sum() / found.sum()
        recall = now
    return float(total)


def dice(error: np.ndarray, wrong: np.ndarray, threshold: float) -> float:
    found = error >= np.float32(threshold)
    return float(2 * (found & wrong).sum() / (found.sum() + wrong.sum()))


def test_boxes_of_all_masks_are_pooled() -> None:
    draw = rng(1)
    predicted = [random_boxes(draw, n) for n in (3, 0, 5, 4)]
    true = [random_boxes(draw, n) for n in (2, 3, 4, 0)]
    found = detection_scores(predicted, true, ["a", "a", "b", "c"], generator=rng(), threshold=0.5)
    assert [s.min_iou for s in found] == list(MIN_IOUS)
    for score in found:
        matched = sum(match_boxes(p, t, score.min_iou).matched for p, t in zip(predicted, true, strict=True))
        assert (score.predicted, score.true, score.matched) == (12, 9, matched)
        assert score.precision.value == pytest.approx(matched / 12)
        assert score.recall.value == pytest.approx(matched / 9)
        assert (score.masks, score.patients, score.threshold) == (4, 3, 0.5)
    assert found[0].matched > 0


def test_intervals_of_precision_and_recall_are_those_of_copied_patients() -> None:
    draw = rng(2)
    patients = list("aabbccdde")
    predicted = [random_boxes(draw, int(n)) for n in draw.integers(1, 6, 9)]
    true = [random_boxes(draw, int(n)) for n in draw.integers(1, 6, 9)]
    found = detection_scores(predicted, true, patients, generator=rng(4), min_ious=[0.1], draws=70, level=0.8)[0]
    index, count = patient_index(patients)
    precision, recall = [], []
    for copies in resample(count, 70, rng(4)):
        chosen = np.repeat(np.arange(9), copies[index])
        matched = sum(match_boxes(predicted[i], true[i], 0.1).matched for i in chosen)
        precision.append(matched / sum(len(predicted[i]) for i in chosen))
        recall.append(matched / sum(len(true[i]) for i in chosen))
    for interval, drawn in ((found.precision, precision), (found.recall, recall)):
        assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(drawn, [0.1, 0.9])))


def test_without_boxes_precision_and_recall_are_undefined() -> None:
    some = [[box((0, 0), (4, 4))], []]
    nothing: list[list[ErrorBox]] = [[], []]
    missed = detection_scores(nothing, some, ["a", "b"], generator=rng())[0]
    assert missed.precision.value is None and missed.precision.low is None and missed.recall.value == 0
    false = detection_scores(some, nothing, ["a", "b"], generator=rng())[0]
    assert false.recall.value is None and false.precision.value == 0
    # draws of the mask without boxes alone have no precision
    assert 0 < false.precision.draws < 1000
    none = detection_scores([], [], [], generator=rng())[0]
    assert (none.masks, none.precision.value, none.recall.value) == (0, None, None)


def test_one_result_per_threshold_and_iou() -> None:
    true = [[box((0, 0), (6, 6))], [box((0, 0), (6, 6))]]
    predicted = {0.5: [[box((0, 0), (6, 6))], []], 0.1: [[box((0, 0), (12, 6))], [box((0, 0), (6, 6))]]}
    found = detection_over_thresholds(predicted, true, ["a", "b"], generator=rng(), min_ious=[0.2, 0.6])
    assert [(s.threshold, s.min_iou, s.matched) for s in found] == [
        (0.1, 0.2, 2),
        (0.1, 0.6, 1),
        (0.5, 0.2, 1),
        (0.5, 0.6, 1),
    ]
    adapter = TypeAdapter(tuple[DetectionScores, ...])
    assert adapter.validate_json(adapter.dump_json(found)) == found


@pytest.mark.parametrize("seed", range(5))
def test_counts_give_the_brute_force_s_average_precision_and_dice(seed: int) -> None:
    error, wrong, mask = case(seed)
    counts = count_voxels(error, wrong, mask)
    parts = ((counts.both, np.ones(SHAPE, bool)), (counts.false_positive, mask), (counts.false_negative, ~mask))
    for found, inside in parts:
        assert found.average_precision == pytest.approx(average_precision(error[inside], wrong[inside]))
        for threshold in (0.1, 0.3, 0.5, 0.7):
            assert found.dice(threshold) == pytest.approx(dice(error[inside], wrong[inside], threshold))
        assert (sum(found.wrong), sum(found.right)) == ((wrong & inside).sum(), (~wrong & inside).sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("precision", [0.15, 0.5, 0.9, 1.0])
def test_recall_is_of_the_wrong_voxels_alone_and_the_largest_at_a_precision(seed: int, precision: float) -> None:
    error, wrong, mask = case(seed)
    counts = count_voxels(error, wrong, mask)
    for found, inside in ((counts.false_positive, mask), (counts.false_negative, ~mask)):
        e, w = error[inside], wrong[inside]
        for threshold in (0.1, 0.5, 0.7):
            assert found.recall(threshold) == pytest.approx((e[w] >= np.float32(threshold)).mean())
        reached = [(e[w] >= t).mean() for t in np.unique(e) if w[e >= t].mean() >= precision]
        assert found.recall_at_precision(precision) == pytest.approx(max(reached, default=0.0))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_average_precision_is_scikit_learn_s(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is no dependency")
    draw = rng(seed)
    wrong = draw.random(SHAPE) < 0.3
    wrong[0, 0, 0] = True
    error = draw.random(SHAPE, dtype=np.float32)
    found = count_voxels(error, wrong, wrong).both
    rounded = np.floor(error.ravel() * np.float32(STEPS) + np.float32(1e-3))
    assert found.average_precision == pytest.approx(metrics.average_precision_score(wrong.ravel(), rounded))
    assert found.average_precision == pytest.approx(
        metrics.average_precision_score(wrong.ravel(), error.ravel()), abs=0.05
    )


def test_every_threshold_of_two_digits_counts_as_comparing_does() -> None:
    thresholds = np.arange(1, 101) / 100
    error = thresholds.astype(np.float32).reshape(10, 10, 1)
    below = np.nextafter(error - np.float32(1e-4), np.float32(0))
    for values in (error, below):
        counts = count_voxels(values, np.ones(values.shape, bool), np.ones(values.shape, bool)).both
        for threshold in thresholds.tolist():
            assert counts.dice(threshold) == pytest.approx(dice(values, np.ones(values.shape, bool), threshold))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_counts_of_masks_add_up_to_those_of_all_their_voxels(one: int, other: int) -> None:
    cases = [case(one), case(other)]
    together = count_voxels(*(np.concatenate(arrays) for arrays in zip(*cases, strict=True)))
    first, second = (count_voxels(*c) for c in cases)
    assert first + second == together == second + first
    assert sum([first, second], SignedCounts()) == together
    assert (first + second).both == first.both + second.both


def test_signs_go_by_the_mask() -> None:
    mask, truth = np.zeros((2, *SHAPE), bool)
    mask[:3], truth[2:4] = True, True
    error = np.where(mask & ~truth, 0.9, 0.2).astype(np.float32)
    counts = count_voxels(error, mask ^ truth, mask)
    assert sum(counts.false_positive.wrong) == 2 * 7 * 4 and sum(counts.false_positive.right) == 7 * 4
    assert sum(counts.false_negative.wrong) == 7 * 4 and sum(counts.false_negative.right) == 2 * 7 * 4
    assert counts.false_positive.dice() == 1 and counts.false_positive.average_precision == 1
    assert counts.false_negative.dice() == 0 and counts.false_negative.average_precision == pytest.approx(1 / 3)


def test_nothing_wrong_is_undefined_or_false_alarm() -> None:
    right = np.zeros(SHAPE, bool)
    calm = count_voxels(np.full(SHAPE, 0.1, np.float32), right, right).both
    assert calm.average_precision is None and calm.dice() is None
    assert calm.recall() is None and calm.recall_at_precision(0.5) is None
    alarm = count_voxels(np.full(SHAPE, 0.9, np.float32), right, right).both
    assert alarm.average_precision is None and alarm.dice() == 0
    assert ErrorMapCounts().dice() is None and ErrorMapCounts().average_precision is None


def test_probabilities_of_zero_and_one_are_counted() -> None:
    error = np.array([[[0.0, 1.0, 1.0]]], np.float32)
    wrong = np.array([[[False, True, False]]])
    counts = count_voxels(error, wrong, wrong).both
    assert counts.wrong[STEPS] == counts.right[STEPS] == counts.right[0] == 1
    assert counts.dice(1.0) == pytest.approx(2 / 3) and counts.average_precision == pytest.approx(0.5)


def test_error_maps_are_scored_pooled_and_per_mask() -> None:
    cases = [case(seed) for seed in range(6)]
    patients = list("aabbcd")
    counts = [count_voxels(*c).both for c in cases]
    calm = np.zeros(SHAPE, bool)
    counts.append(count_voxels(np.zeros(SHAPE, np.float32), calm, calm).both)
    found = error_map_scores(counts, [*patients, "d"], generator=rng(1), draws=60, level=0.8)
    errors, wrongs = ([c[i] for c in cases] for i in (0, 1))
    zero = np.zeros(SHAPE, np.float32)
    everything = np.stack([*errors, zero]), np.stack([*wrongs, calm])
    assert found.average_precision.value == pytest.approx(average_precision(*everything))
    assert found.pooled_dice.value == pytest.approx(dice(*everything, 0.5))
    own = [dice(e, w, 0.5) for e, w in zip(errors, wrongs, strict=True)]
    assert found.mean_dice.value == pytest.approx(np.mean(own)) and found.counted == 6
    assert found.wrong_share == pytest.approx(everything[1].mean())
    assert (found.masks, found.patients, found.threshold) == (7, 4, 0.5)
    index, count = patient_index([*patients, "d"])
    drawn: list[tuple[float, float, float]] = []
    for copies in resample(count, 60, rng(1)):
        chosen = np.repeat(np.arange(7), copies[index])
        pool = everything[0][chosen], everything[1][chosen]
        drawn.append((dice(*pool, 0.5), float(np.mean([own[i] for i in chosen if i < 6])), average_precision(*pool)))
    for interval, values in zip(
        (found.pooled_dice, found.mean_dice, found.average_precision), zip(*drawn, strict=True), strict=True
    ):
        assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(values, [0.1, 0.9])))


def test_without_masks_error_map_scores_are_undefined() -> None:
    found = error_map_scores([], [], generator=rng())
    assert (found.masks, found.wrong_share, found.counted) == (0, None, 0)
    assert found.pooled_dice.value is found.mean_dice.value is found.average_precision.value is None


def test_results_survive_json() -> None:
    counts = count_voxels(*case(3))
    signed = TypeAdapter(SignedCounts)
    assert signed.validate_json(signed.dump_json(counts)) == counts
    scored = TypeAdapter(ErrorMapScores)
    found = error_map_scores([counts.both] * 2, ["a", "b"], generator=rng(), draws=20)
    assert scored.validate_json(scored.dump_json(found)) == found


def test_what_makes_no_sense_is_refused() -> None:
    error, wrong, mask = case(0)
    with pytest.raises(ValueError, match="one grid"):
        count_voxels(error, wrong[:2], mask)
    for value in (1.5, -0.1, np.nan):
        bad = error.copy()
        bad[0, 0, 0] = value
        with pytest.raises(ValueError, match="probabilities"):
            count_voxels(bad, wrong, mask)
    for threshold in (0.0, 1.1, 0.12345):
        with pytest.raises(ValueError, match="no threshold"):
            count_voxels(error, wrong, mask).both.dice(threshold)
    with pytest.raises(ValueError, match="patient"):
        error_map_scores([ErrorMapCounts()], [], generator=rng())
    with pytest.raises(ValueError, match="patient"):
        detection_scores([[]], [[]], ["a", "b"], generator=rng())
    with pytest.raises(ValueError, match="IoU"):
        detection_scores([[]], [[]], ["a"], generator=rng(), min_ious=[0.0])


def test_the_lowest_threshold_that_is_precise_enough_is_chosen() -> None:
    true = [[box((0, 0), (5, 5))], [box((0, 0), (5, 5))]]
    false = [box((20 + 10 * i, 20), (25 + 10 * i, 25)) for i in range(4)]
    # precision 2/6, 2/4, 2/3, 1/1, none predicted
    predicted = {
        0.3: [[*true[0], *false], true[1]],
        0.4: [[*true[0], *false[:2]], true[1]],
        0.45: [[*true[0], false[0]], true[1]],
        0.5: [true[0], []],
        0.6: [[], []],
    }
    for precision, wanted in ((0.3, 0.3), (0.5, 0.4), (0.6, 0.45), (0.7, 0.5), (1.0, 0.5)):
        assert choose_threshold(predicted, true, min_iou=0.05, precision=precision) == wanted
    del predicted[0.5]
    assert choose_threshold(predicted, true, min_iou=0.05, precision=0.9) == 0.45, "the most precise one there is"
    assert choose_threshold({0.3: [[]], 0.5: [[]]}, [[]], min_iou=0.05, precision=0.9) == 0.3
