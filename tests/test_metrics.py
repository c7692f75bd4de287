from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.metrics import compute_dice, compute_iou
from scipy import optimize

from segqc.quality.metrics import (
    METRIC_NAMES,
    MIN_SLOPE,
    EmptyRule,
    LinearCalibration,
    estimated_metrics,
    estimated_slice_metrics,
    fit_calibration,
    true_metrics,
    true_metrics_with_slices,
    true_slice_metrics,
    truth_is_empty,
)
from segqc.types import Metrics

RULE = EmptyRule(max_sum_mm3=10.0, voxel_volume_mm3=1.0)
SHAPE = (4, 5, 3)
EMPTY = np.zeros(SHAPE, bool)
PERFECT = Metrics(1.0, 1.0, 0.0, 0.0)

shapes = hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=5)


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(shapes)
    return draw(hnp.arrays(bool, shape)), draw(hnp.arrays(bool, shape))


def ball() -> np.ndarray:
    mask = EMPTY.copy()
    mask[1:3, 1:4, :2] = True
    return mask


def random_case(seed: int, shape: tuple[int, int, int] = (9, 11, 6)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random(shape) < 0.3, rng.random(shape) < 0.3, rng.random(shape, dtype=np.float32)


def brute_force(mask: np.ndarray, error: np.ndarray) -> Metrics:
    """Method, "Estimated metrics", one voxel at a time."""
    in_mask = in_truth = both = wrong = 0.0
    for m, e in zip(mask.ravel().tolist(), error.ravel().tolist(), strict=True):
        in_mask += m
        in_truth += m * (1 - e) + (1 - m) * e
        both += m * (1 - e)
        wrong += e
    return Metrics(
        2 * both / (in_mask + in_truth),
        both / (in_mask + in_truth - both),
        wrong / in_truth,
        (in_mask - in_truth) / in_truth,
    )


def assert_close(got: Metrics, wanted: Metrics) -> None:
    for name in METRIC_NAMES:
        assert getattr(got, name) == pytest.approx(getattr(wanted, name), rel=1e-9, abs=1e-12), name


def test_dice_and_iou_agree_with_monai() -> None:
    for seed in range(5):
        mask, truth, _ = random_case(seed)
        batch = [torch.from_numpy(a)[None, None].float() for a in (mask, truth)]
        got = true_metrics(mask, truth)
        assert got.dice == pytest.approx(compute_dice(*batch).item(), abs=1e-6)
        assert got.iou == pytest.approx(compute_iou(*batch).item(), abs=1e-6)


def test_arvd_is_the_difference_over_the_truth_and_rvd_is_signed() -> None:
    mask, truth = EMPTY.copy(), EMPTY.copy()
    mask[0, 0, 0] = True
    truth[1, 0, :2] = True  # no overlap: 3 voxels differ, 2 are true, 1 is in the mask
    assert true_metrics(mask, truth) == Metrics(0.0, 0.0, 1.5, -0.5)


def test_a_perfect_mask_scores_one() -> None:
    # equation 5 as printed in the paper would give 2/3
    assert true_metrics(ball(), ball()) == PERFECT
    assert estimated_metrics(ball(), np.zeros(SHAPE, np.float32), empty=RULE) == PERFECT


def test_estimates_agree_with_the_sums_written_out() -> None:
    for seed in range(3):
        mask, _, error = random_case(seed)
        assert_close(estimated_metrics(mask, error, empty=RULE), brute_force(mask, error))


@settings(max_examples=200, deadline=None)
@given(mask_pairs(), st.sampled_from([0, 1, 2]), st.sampled_from([0.0, 10.0]))
def test_estimates_equal_the_truth_when_the_error_map_is_the_difference(
    pair: tuple[np.ndarray, np.ndarray], axis: int, max_sum_mm3: float
) -> None:
    mask, truth = pair
    rule = EmptyRule(max_sum_mm3, 1.0)
    error = (mask ^ truth).astype(np.float32)
    assert estimated_metrics(mask, error, empty=rule) == true_metrics(mask, truth)
    estimated, true = estimated_slice_metrics(mask, error, axis, empty=rule), true_slice_metrics(mask, truth, axis)
    for name in (*METRIC_NAMES, "truth_voxels", "counted"):
        np.testing.assert_array_equal(getattr(estimated, name), getattr(true, name), err_msg=name)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_whole_and_its_slices_are_counted_together(axis: int, share: float) -> None:
    mask, truth = np.random.default_rng(1).random((2, 7, 5, 6)) < share
    whole, slices = true_metrics_with_slices(mask, truth, axis)
    assert whole == true_metrics(mask, truth)
    assert slices.each() == true_slice_metrics(mask, truth, axis).each()
    assert slices.truth_voxels.tolist() == [truth.take(i, axis).sum() for i in range(truth.shape[axis])]


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_a_slice_is_measured_as_if_it_were_alone(axis: int) -> None:
    mask, truth, error = random_case(7)
    true, estimated = true_slice_metrics(mask, truth, axis), estimated_slice_metrics(mask, error, axis, empty=RULE)
    assert len(true) == len(estimated) == mask.shape[axis]
    for i in range(mask.shape[axis]):
        m, t, e = (np.take(a, [i], axis=axis) for a in (mask, truth, error))
        assert true.at(i) == true_metrics(m, t)
        assert_close(estimated.at(i), estimated_metrics(m, e, empty=RULE))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.permutations([0, 1, 2]), st.tuples(*[st.booleans()] * 3))
def test_flips_and_permutations_change_nothing(seed: int, order: list[int], flips: tuple[bool, ...]) -> None:
    mask, truth, error = random_case(seed, (4, 3, 5))
    axes = [a for a, flip in enumerate(flips) if flip]
    m, t, e = (np.flip(a.transpose(order), axes) for a in (mask, truth, error))
    assert true_metrics(m, t) == true_metrics(mask, truth)
    assert_close(estimated_metrics(m, e, empty=RULE), estimated_metrics(mask, error, empty=RULE))
    slices = estimated_slice_metrics(m, e, order.index(2), empty=RULE)
    wanted = estimated_slice_metrics(mask, error, 2, empty=RULE)
    np.testing.assert_allclose(slices.dice[:: -1 if flips[order.index(2)] else 1], wanted.dice)


# Empty masks, one convention each ------------------------------------------------------------------------------------


def test_both_empty_is_perfect_and_not_counted() -> None:
    assert true_metrics(EMPTY, EMPTY) == PERFECT
    assert estimated_metrics(EMPTY, np.full(SHAPE, 0.01, np.float32), empty=RULE) == PERFECT
    for slices in (
        true_slice_metrics(EMPTY, EMPTY, 2),
        estimated_slice_metrics(EMPTY, np.full(SHAPE, 0.01, np.float32), 2, empty=RULE),
    ):
        assert not slices.counted.any()
        assert slices.at(0) == PERFECT
        assert slices.mean().metrics == Metrics(None, None, None, None)
        assert slices.mean().counted == 0


def test_only_the_truth_empty_is_zero_overlap_and_undefined_volumes() -> None:
    wanted = Metrics(0.0, 0.0, None, None)
    assert true_metrics(ball(), EMPTY) == wanted
    nearly_all_wrong = np.where(ball(), 0.9, 0.01).astype(np.float32)
    assert estimated_metrics(ball(), nearly_all_wrong, empty=RULE) == wanted
    slices = true_slice_metrics(ball(), EMPTY, 2)
    assert slices.counted.tolist() == [True, True, False]
    assert slices.mean().metrics == wanted


def test_only_the_mask_empty_is_zero_overlap_and_everything_missed() -> None:
    wanted = Metrics(0.0, 0.0, 1.0, -1.0)
    assert true_metrics(EMPTY, ball()) == wanted
    assert estimated_metrics(EMPTY, np.where(ball(), 0.9, 0.01).astype(np.float32), empty=RULE) == wanted


def test_an_estimated_truth_is_empty_only_without_a_peak_and_under_the_volume() -> None:
    faint = np.full(SHAPE, 0.1, np.float32)  # sums to 6 voxels
    assert truth_is_empty(EMPTY, faint, empty=EmptyRule(10.0, 1.0))
    assert not truth_is_empty(EMPTY, faint, empty=EmptyRule(10.0, 2.0)), "12 mm3 is not under 10 mm3"
    assert not truth_is_empty(EMPTY, faint, empty=EmptyRule(0.0, 1.0)), "nothing is under 0 mm3"
    quarters = np.where(ball(), 0.25, 0).astype(np.float32)  # sums to 3 voxels, exactly
    assert not truth_is_empty(EMPTY, quarters, empty=EmptyRule(3.0, 1.0)), "3 mm3 is not under 3 mm3"
    peak = faint.copy()
    peak[0, 0, 0] = 0.5
    assert not truth_is_empty(EMPTY, peak, empty=EmptyRule(10.0, 1.0))
    peak[0, 0, 0] = 0.49
    assert truth_is_empty(EMPTY, peak, empty=EmptyRule(10.0, 1.0))


def test_a_certain_error_inside_the_mask_is_no_peak_of_the_truth() -> None:
    assert truth_is_empty(ball(), ball().astype(np.float32), empty=RULE)
    half_wrong = np.where(ball(), 0.5, 0.0).astype(np.float32)
    assert not truth_is_empty(ball(), half_wrong, empty=RULE)


def test_slices_are_empty_one_by_one() -> None:
    mask, error = EMPTY.copy(), np.full(SHAPE, 0.01, np.float32)
    mask[0, 0, 1] = True
    error[2, 2, 2] = 0.8
    slices = estimated_slice_metrics(mask, error, 2, empty=RULE)
    assert slices.counted.tolist() == [False, True, True]
    assert slices.at(0) == PERFECT
    assert slices.at(1).dice == pytest.approx(2 * 0.99 / (1 + 0.99 + 19 * 0.01))
    assert slices.at(2) == Metrics(0.0, 0.0, 1.0, -1.0)


def test_one_voxel_structures() -> None:
    one = np.ones((1, 1, 1), bool)
    assert true_metrics(one, one) == PERFECT
    assert true_metrics(one, ~one) == Metrics(0.0, 0.0, None, None)
    assert_close(estimated_metrics(one, np.full((1, 1, 1), 0.25, np.float32), empty=RULE), brute_force(one, one * 0.25))


def test_averages_are_over_counted_and_chosen_slices() -> None:
    mask, truth = np.zeros((6, 6, 4), bool), np.zeros((6, 6, 4), bool)
    mask[:, :, 0], truth[:, :, 0] = True, True  # perfect, 36 true voxels
    mask[0, :2, 1], truth[0, 0, 1] = True, True  # Dice 2/3, ARVD 1, one true voxel
    mask[0, 0, 2] = True  # Dice 0, ARVD undefined
    slices = true_slice_metrics(mask, truth, 2)
    means = slices.mean()
    assert means.counted == 3
    assert means.metrics.dice == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert means.metrics.arvd == pytest.approx((0 + 1) / 2)
    large = slices.mean(slices.truth_voxels >= 20)
    assert large.counted == 1 and large.metrics == PERFECT
    assert slices.mean(np.ones(4, bool)) == means  # the empty slice is not counted, even where it is chosen


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 5, 3\) and \(4, 5, 2\)"):
        true_metrics(EMPTY, EMPTY[..., :2])
    with pytest.raises(ValueError, match="3-D"):
        estimated_metrics(EMPTY[0], np.zeros(SHAPE[1:], np.float32), empty=RULE)
    with pytest.raises(ValueError, match="through-plane axis"):
        true_slice_metrics(EMPTY, EMPTY, 3)
    with pytest.raises(ValueError, match="voxel volume"):
        EmptyRule(10.0, 0.0)


def test_sums_of_many_tiny_probabilities_do_not_lose_precision() -> None:
    mask = np.zeros((128, 128, 64), bool)
    mask[0, 0, 0] = True
    error = np.full(mask.shape, 1e-4, np.float32)
    wanted = float(np.float32(1e-4)) * (mask.size - 2) + 1  # RVD's denominator: the estimated truth's size
    got = estimated_metrics(mask, error, empty=RULE)
    assert got.rvd == pytest.approx((1 - wanted) / wanted, rel=1e-9)


# Calibration ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_calibration_is_the_line_of_least_absolute_errors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 40 + 60 * seed
    estimated = rng.uniform(0.5, 1.0, n).round(seed % 3 + 1)  # some with ties
    true = 0.8 * estimated + 0.1 + rng.standard_t(1.5, n) * 0.02
    line = fit_calibration(estimated, true)
    # an independent solution: min sum(u + v) with slope * x + intercept + u - v = y
    columns = np.hstack([estimated[:, None], np.ones((n, 1)), np.eye(n), -np.eye(n)])
    bounds = [(None, None)] * 2 + [(0, None)] * 2 * n
    best = optimize.linprog(np.r_[0, 0, np.ones(2 * n)], A_eq=columns, b_eq=true, bounds=bounds).fun
    assert np.abs(line.apply(estimated) - true).sum() == pytest.approx(best, rel=1e-6)
    assert line.apply(0.7) == pytest.approx(line.slope * 0.7 + line.intercept)


def test_calibration_is_not_turned_by_a_few_odd_slices() -> None:
    estimated = np.linspace(0, 1, 50)
    true = 0.9 * estimated + 0.05
    true[[3, 40]] = 100.0, 70.0
    line = fit_calibration(estimated, true, metric="arvd")
    assert (line.slope, line.intercept) == (pytest.approx(0.9, abs=1e-5), pytest.approx(0.05, abs=1e-5))


def test_a_calibration_may_be_steep() -> None:
    x = np.linspace(0, 1, 9)
    assert fit_calibration(x, 300 * x).slope == pytest.approx(300)


def test_calibrated_values_stay_in_the_metric_s_range() -> None:
    steep = ([0.4, 0.5, 0.6], [0.0, 0.5, 1.0])
    dice = fit_calibration(*steep, metric="dice")
    assert (dice.apply(0.9), dice.apply(0.1)) == (1.0, 0.0)
    assert fit_calibration(*steep, metric="arvd").apply(0.9) == pytest.approx(2.5)
    assert fit_calibration(*steep, metric="rvd").apply(0.0) == -1.0
    assert np.isnan(dice.apply(np.array([np.nan, 0.5]))).tolist() == [True, False]


@pytest.mark.parametrize(
    ("estimated", "true"),
    [
        ([], []),
        ([0.1, 0.9], [0.2, 0.8]),
        ([0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4]),
        ([0.1, None, 0.3, 0.4], [0.2, 0.2, None, 0.3]),
    ],
    ids=["none", "two", "constant", "two defined"],
)
def test_too_little_to_fit_gives_the_identity(estimated: list[float | None], true: list[float | None]) -> None:
    line = fit_calibration(estimated, true)
    assert (line.slope, line.intercept) == (1.0, 0.0)


def test_calibration_keeps_the_order_of_scans() -> None:
    line = fit_calibration([0.1, 0.5, 0.9], [0.9, 0.6, 0.3])  # falls
    assert (line.slope, line.intercept) == (MIN_SLOPE, pytest.approx(0.6 - 0.5 * MIN_SLOPE))
    mostly_right = np.array([1.0] * 7 + [0.0, 0.2])  # flat
    assert fit_calibration(np.linspace(1, 0, 9), mostly_right).slope == MIN_SLOPE


def test_undefined_pairs_are_left_out_and_lengths_must_agree() -> None:
    line = fit_calibration([0.1, 0.2, None, 0.3], [0.2, 0.4, 7.0, 0.6])
    assert line.slope == pytest.approx(2.0)
    with pytest.raises(ValueError, match="3 and 2"):
        fit_calibration([0.1, 0.2, 0.3], [0.1, 0.2])
    assert LinearCalibration().apply(0.3) == 0.3


def test_there_is_a_line_only_where_it_helps_patients_that_it_was_not_fitted_on() -> None:
    rng = np.random.default_rng(0)
    patients = [f"p{i // 4}" for i in range(80)]
    estimated = rng.uniform(0.5, 1.0, 80)
    scattered = estimated + rng.normal(0, 0.05, 80)  # no line is better than the estimates, but by chance
    biased = 0.7 * estimated + 0.2 + rng.normal(0, 0.01, 80)
    assert fit_calibration(estimated, scattered).slope != 1.0
    assert fit_calibration(estimated, scattered, patients=patients, metric="dice") == LinearCalibration(1, 0, 0, 1)
    assert fit_calibration(estimated, biased, patients=patients) == fit_calibration(estimated, biased)
    # names, order, and undefined pairs change nothing
    order = rng.permutation(80)
    known = [None, *biased[order]]
    again = fit_calibration([0.2, *estimated[order]], known, patients=["z", *(patients[i] for i in order)])
    assert again.slope == pytest.approx(fit_calibration(estimated, biased).slope)
    # each patient counts once: one with many masks does not bring a line for all
    many = ["p0"] * 61 + [f"p{i}" for i in range(1, 20)]
    assert fit_calibration(estimated, np.r_[biased[:61], estimated[61:]], patients=many).slope == 1.0
    # what one patient shows cannot be checked
    assert fit_calibration(estimated, biased, patients=["p0"] * 80).slope == 1.0
    with pytest.raises(ValueError, match="3 and 3, of 2 masks' patients"):
        fit_calibration([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], patients=["a", "b"])


def test_all_pairs_of_small_masks_against_the_definition() -> None:
    # every pair of masks of three voxels: 64 cases, among them all empty ones
    for bits in itertools.product([False, True], repeat=6):
        mask, truth = (np.array(b, bool).reshape(3, 1, 1) for b in (bits[:3], bits[3:]))
        got = true_metrics(mask, truth)
        both, either, m, t = (int(x.sum()) for x in (mask & truth, mask | truth, mask, truth))
        assert got.dice == (2 * both / (m + t) if m + t else 1.0)
        assert got.iou == (both / either if either else 1.0)
        assert got.arvd == ((either - both) / t if t else (None if m else 0.0))
        assert got.rvd == ((m - t) / t if t else (None if m else 0.0))
