from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from segqc.evaluation.statistics.curves import (
    OPTIMAL,
    RANDOM,
    RANDOM_NONEMPTY,
    SEQUENTIAL,
    CurveComparison,
    Units,
    at_random,
    at_random_nonempty,
    by_scores,
    captured,
    compare_orders,
    optimal,
    scans,
    sequential,
    slices,
    whole_sizes,
)

dice_lists = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_slices(seed: int, masks: int = 4, most: int = 5) -> Units:
    """Masks with different numbers of slices, listed in a mixed order, some empty, one with an empty truth."""
    draw = rng(seed)
    of = np.repeat(np.arange(masks), draw.integers(1, most + 1, masks))
    of = draw.permutation(of)
    n = len(of)
    in_mask, in_truth = (draw.integers(0, 50, n) * (draw.random(n) < 0.7) for _ in range(2))
    in_truth[of == 0] = 0
    return slices(of, in_mask, in_truth, (np.minimum(in_mask, in_truth) * draw.random(n)).round())


def simulate(units: Units, order: list[int]) -> list[float]:
    """The mean Dice after every step, by correcting voxel counts one unit at a time."""
    m, both = units.in_mask.copy(), units.in_both.copy()
    curve = []
    for unit in [None, *order]:
        if unit is not None:
            m[unit] = both[unit] = units.in_truth[unit]
        dice = []
        for mask in range(units.masks):
            inside = units.mask == mask
            size = m[inside].sum() + units.in_truth[inside].sum()
            dice.append(2 * both[inside].sum() / size if size else 1.0)
        curve.append(float(np.mean(dice)))
    return curve


def area(curve: list[float]) -> float:
    return float(np.mean([(a + b) / 2 for a, b in itertools.pairwise(curve)]))


def greedy(units: Units) -> list[int]:
    """At every step try each unit that is left."""
    order: list[int] = []
    left = sorted(range(len(units)), key=lambda i: (units.mask[i], i))
    while left:
        ends = [simulate(units, [*order, unit])[-1] for unit in left]
        order.append(left.pop(int(np.argmax(np.round(ends, 12)))))
    return order


@pytest.mark.parametrize("seed", range(6))
def test_a_curve_is_what_correcting_slice_by_slice_gives(seed: int) -> None:
    units = random_slices(seed)
    error_score = rng(seed + 100).random(len(units))
    order = by_scores(units, error_score, generator=rng())
    expected = simulate(units, np.argsort(-error_score).tolist())
    np.testing.assert_allclose(order.mean_dice, expected, atol=1e-12)
    assert order.area() == pytest.approx(area(expected))


@pytest.mark.parametrize("seed", range(12))
def test_optimal_takes_the_largest_gain_at_every_step(seed: int) -> None:
    units = random_slices(seed)
    expected = simulate(units, greedy(units))
    found = optimal(units)
    np.testing.assert_allclose(found.mean_dice, expected, atol=1e-9)
    assert found.area() == pytest.approx(area(expected))


@pytest.mark.parametrize("seed", range(3))
def test_random_is_the_mean_over_all_orders(seed: int) -> None:
    units = random_slices(seed, masks=2, most=3)
    curves = [simulate(units, list(order)) for order in itertools.permutations(range(len(units)))]
    found = at_random(units, generator=rng(), shuffles=4000)
    np.testing.assert_allclose(found.mean_dice, np.mean(curves, axis=0), atol=0.01)
    assert found.area() == pytest.approx(np.mean([area(c) for c in curves]), abs=0.005)


def test_the_area_at_random_is_exact_where_the_order_within_masks_does_not_matter() -> None:
    units = slices([0, 0, 0, 1, 1, 2], [10] * 6, [10] * 6, [4, 4, 4, 7, 7, 1])
    curves = [simulate(units, list(order)) for order in itertools.permutations(range(6))]
    assert at_random(units, generator=rng(), shuffles=1).area() == pytest.approx(np.mean([area(c) for c in curves]))


def test_ties_within_an_order_are_the_mean_over_their_orders() -> None:
    units = slices([0, 0, 1, 1, 1], [10] * 5, [10] * 5, [4, 4, 7, 7, 7])
    error_score = [1.0, 0.0, 1.0, 0.0, 0.0]
    curves = [
        simulate(units, [*head, *tail])
        for head in itertools.permutations([0, 2])
        for tail in itertools.permutations([1, 3, 4])
    ]
    order = by_scores(units, error_score, generator=rng(), shuffles=2000)
    np.testing.assert_allclose(order.mean_dice, np.mean(curves, axis=0), atol=0.01)
    assert order.area() == pytest.approx(np.mean([area(c) for c in curves]))


def test_scans_at_random_gain_evenly() -> None:
    order = at_random(scans([0.5, 0.9, 0.7]), generator=rng())
    np.testing.assert_allclose(order.mean_dice, np.linspace(0.7, 1, 4))
    assert order.area() == pytest.approx(0.85)


def test_random_non_empty_takes_the_slices_of_the_mask_first() -> None:
    units = slices([0, 0, 1, 1], [10, 0, 8, 0], [10, 5, 8, 5], [5, 0, 4, 0])
    found = at_random_nonempty(units, generator=rng(), shuffles=2000)
    heads, tails = itertools.permutations([0, 2]), list(itertools.permutations([1, 3]))
    curves = [simulate(units, [*head, *tail]) for head in heads for tail in tails]
    np.testing.assert_allclose(found.mean_dice, np.mean(curves, axis=0), atol=0.01)


def test_sequential_is_the_order_of_the_list() -> None:
    units = random_slices(3)
    np.testing.assert_allclose(sequential(units).mean_dice, simulate(units, list(range(len(units)))), atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(dice_lists, st.integers(0, 10**6))
def test_no_order_of_scans_is_above_the_optimal_one_anywhere(dice: list[float], seed: int) -> None:
    units = scans(dice)
    error_score = rng(seed).integers(0, 5, len(dice)).astype(float)
    other, best = by_scores(units, error_score, generator=rng()), optimal(units)
    assert (other.mean_dice <= best.mean_dice + 1e-12).all()
    by_truth = by_scores(units, -np.array(dice), generator=rng())
    np.testing.assert_allclose(by_truth.mean_dice, best.mean_dice, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_curves_rise_from_the_mean_dice_to_one(seed: int) -> None:
    units = random_slices(seed)
    error_score = rng(seed).integers(0, 3, len(units)).astype(float)
    for order in (by_scores(units, error_score, generator=rng(), shuffles=8), optimal(units), sequential(units)):
        assert order.mean_dice[0] == pytest.approx(simulate(units, [])[0])
        assert order.mean_dice[-1] == 1.0
        assert (np.diff(order.mean_dice) >= -1e-12).all()
        assert order.gain.sum() / units.masks == pytest.approx(1 - order.mean_dice[0])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_the_order_of_the_list_does_not_matter(seed: int) -> None:
    units, draw = random_slices(seed), rng(seed)
    error_score, mixed, names = draw.random(len(units)), draw.permutation(len(units)), draw.permutation(units.masks)
    moved = Units(names[units.mask][mixed], *(x[mixed] for x in (units.in_mask, units.in_truth, units.in_both)))
    a, b = by_scores(units, error_score, generator=rng()), by_scores(moved, error_score[mixed], generator=rng())
    np.testing.assert_allclose(a.mean_dice, b.mean_dice, atol=1e-12)
    assert a.area() == pytest.approx(b.area())


@settings(max_examples=60, deadline=None)
@given(dice_lists, st.integers(0, 10**6))
def test_the_order_of_the_scans_does_not_matter_even_with_ties(dice: list[float], seed: int) -> None:
    error_score, mixed = rng(seed).integers(0, 3, len(dice)).astype(float), rng(seed).permutation(len(dice))
    a = by_scores(scans(dice), error_score, generator=rng())
    b = by_scores(scans(np.array(dice)[mixed]), error_score[mixed], generator=rng())
    np.testing.assert_allclose(a.mean_dice, b.mean_dice, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_captured_is_one_for_the_optimal_order_and_none_for_random(seed: int) -> None:
    units = random_slices(seed)
    best, random = optimal(units), at_random(units, generator=rng())
    assume(best.area() - random.area() > 1e-9)
    assert captured(best, best, random) == pytest.approx(1)
    assert captured(random, best, random) == pytest.approx(0)


def test_captured_by_hand() -> None:
    units = scans([0.2, 0.6, 1.0])
    best, random = optimal(units), at_random(units, generator=rng())
    # areas over thirds: optimal .6 -> .8667 -> 1 -> 1, reversed .6 -> .6 -> .7333 -> 1, random a straight line to 1
    assert best.area() == pytest.approx((0.6 / 2 + 0.8 / 3 + 0.6 + 1 + 0.5) / 3)
    assert random.area() == pytest.approx(0.8)
    worst = by_scores(units, [0.0, 1.0, 2.0], generator=rng())
    assert captured(worst, best, random) == pytest.approx(-1)
    middle = by_scores(units, [1.0, 2.0, 0.0], generator=rng())
    assert captured(middle, best, random) == pytest.approx((middle.area() - 0.8) / (best.area() - 0.8))


@pytest.mark.parametrize("dice", [[0.7], [0.8, 0.8, 0.8], [1.0, 1.0]])
def test_nothing_to_choose_nothing_captured(dice: list[float]) -> None:
    units = scans(dice)
    best, random = optimal(units), at_random(units, generator=rng())
    assert captured(best, best, random) is None


def test_greedy_is_no_bound_where_slices_gain_only_together() -> None:
    # mask 0 over an empty truth: nothing is gained before its second slice, then everything
    units = slices([0, 0, 1, 1, 1], [9, 9, 9, 9, 9], [0, 0, 9, 9, 9], [0, 0, 8, 8, 8])
    other = by_scores(units, [2.0, 2.0, 1.0, 1.0, 1.0], generator=rng())
    assert other.area() > optimal(units).area()


@pytest.mark.parametrize("seed", range(4))
def test_copies_of_masks_follow_each_other(seed: int) -> None:
    units = random_slices(seed)
    error_score = rng(seed + 50).random(len(units))
    copies = rng(seed).integers(0, 4, (3, units.masks))
    copies[:, 0] = 1
    for order, sequence in (
        (by_scores(units, error_score, generator=rng()), np.argsort(-error_score).tolist()),
        (optimal(units), greedy(units)),
    ):
        for times, found in zip(copies, order.areas(copies), strict=True):
            chosen = [i for i in sequence for _ in range(times[units.mask[i]])]
            nth = [chosen[:i].count(unit) for i, unit in enumerate(chosen)]
            owners = [(int(units.mask[i]), c) for i, c in zip(chosen, nth, strict=True)]
            names = {owner: k for k, owner in enumerate(sorted(set(owners)))}
            many = slices(
                [names[owner] for owner in owners],
                units.in_mask[chosen],
                units.in_truth[chosen],
                units.in_both[chosen],
            )
            assert found == pytest.approx(area(simulate(many, list(range(len(many))))))


def test_copies_of_tied_scans_tie() -> None:
    dice, error_score, copies = [0.2, 0.5, 0.9, 0.6], [1.0, 1.0, 0.0, 0.0], [2, 1, 3, 0]
    many = by_scores(scans(np.repeat(dice, copies)), np.repeat(error_score, copies), generator=rng())
    found = by_scores(scans(dice), error_score, generator=rng()).areas(np.array([copies]))
    assert found[0] == pytest.approx(many.area())


def outcomes(found: CurveComparison) -> list[tuple[str, str | None]]:
    return [(d.second, v.outcome) for d, v in zip(found.differences, found.verdicts, strict=True)]


def test_a_study_of_slices() -> None:
    draw = rng(5)
    n, masks = 200, 20
    of = np.repeat(np.arange(masks), n // masks)
    in_mask, in_truth = draw.integers(50, 90, (2, n))
    units = slices(of, in_mask, in_truth, (np.minimum(in_mask, in_truth) * draw.random(n)).round())
    wrong = units.in_mask + units.in_truth - 2 * units.in_both
    patients = [f"p{i // 2}" for i in range(masks)]
    error_score = {"error": wrong, "noise": draw.random(n), "same": wrong * 2}
    found = compare_orders(units, error_score, patients, generator=rng(), chosen="error", draws=200)
    results = {o.name: o for o in found.orders}
    assert list(results) == ["error", "noise", "same", OPTIMAL, RANDOM, RANDOM_NONEMPTY, SEQUENTIAL]
    assert (found.masks, found.units) == (20, 200)
    best, random = optimal(units), at_random(units, generator=rng())
    share = captured(by_scores(units, wrong, generator=rng()), best, random)
    got = results["error"].captured
    assert got.value == pytest.approx(share, abs=0.02) and got.low is not None and got.high is not None
    assert got.value is not None and got.low < got.value < got.high and got.value > 0.9
    assert results[OPTIMAL].captured.value == 1 and results[RANDOM].captured.value == 0
    assert outcomes(found) == [
        ("noise", "better"),
        ("same", "tie"),
    ]
    turned = compare_orders(units, error_score, patients, generator=rng(), chosen="noise", draws=200)
    assert outcomes(turned) == [
        ("error", "worse"),
        ("same", "worse"),
    ]
    adapter = TypeAdapter(CurveComparison)
    assert adapter.validate_json(adapter.dump_json(found)) == found


def test_a_study_of_scans_of_one_patient_has_no_intervals() -> None:
    found = compare_orders(
        scans([0.5, 0.7, 0.9]), {"a": [3.0, 2, 1], "b": [1.0, 2, 3]}, ["p"] * 3, generator=rng(), chosen="a"
    )
    assert [o.name for o in found.orders] == ["a", "b", OPTIMAL, RANDOM]
    assert found.orders[0].captured.value == pytest.approx(1) and found.orders[0].captured.low is None
    assert found.differences[0].p_value is None and found.verdicts[0].outcome is None


def test_a_kept_curve_is_short_and_has_the_whole_one_s_area() -> None:
    dice = rng(6).random(1000)
    order = optimal(scans(dice))
    short, full = order.curve(11), order.curve(2000)
    assert len(short.share) == len(short.mean_dice) == 11 and len(full.share) == 1001
    assert short.area == full.area == pytest.approx(area(list(full.mean_dice)))
    assert (short.share[3], short.mean_dice[3]) == pytest.approx((0.3, full.mean_dice[300]))


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        scans([0.5, 1.2])
    with pytest.raises(ValueError, match="overlap"):
        scans([0.5, float("nan")])
    with pytest.raises(ValueError, match="at least one"):
        scans([])
    with pytest.raises(ValueError, match="as many counts"):
        slices([0, 0], [1], [1], [1])
    with pytest.raises(ValueError, match="without gaps"):
        slices([0, 2], [1, 1], [1, 1], [1, 1])
    with pytest.raises(ValueError, match="overlap"):
        slices([0], [3], [2], [3])
    with pytest.raises(ValueError, match="NaN"):
        by_scores(scans([0.5, 0.6]), [0.1, float("nan")], generator=rng())
    with pytest.raises(ValueError, match="patient"):
        compare_orders(scans([0.5, 0.6]), {}, ["a"], generator=rng())
    with pytest.raises(ValueError, match="none of"):
        compare_orders(scans([0.5, 0.6]), {"a": [1.0, 2.0]}, ["a", "b"], generator=rng(), chosen="b")


def test_errors_count_as_shares_of_their_scan() -> None:
    # a large scan and a small one: ten wrong voxels of a slice are much of the small one only
    of = np.repeat([0, 1], 3)
    in_truth = np.array([1000.0, 1000, 1000, 20, 20, 20])
    errors = np.array([30.0, 20, 12, 10, 8, 0])
    units = slices(of, in_truth, in_truth, in_truth - errors / 2)
    size = whole_sizes(of, units.in_mask, units.in_truth)
    np.testing.assert_array_equal(size, np.repeat([6000.0, 120.0], 3))
    rng = np.random.default_rng(0)
    best, random = optimal(units), at_random(units, generator=rng)
    shares, sums = (by_scores(units, score, generator=rng) for score in (errors / size, errors))
    by_share, by_sum = captured(shares, best, random), captured(sums, best, random)
    assert by_share == pytest.approx(1)
    assert by_sum is not None and by_sum < 0.9
    np.testing.assert_array_equal(whole_sizes(np.zeros(2, int), np.zeros(2), np.zeros(2)), [1, 1])
