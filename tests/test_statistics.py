from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy import stats

from segqc.quality.estimation import (
    Comparison,
    ConfidenceInterval,
    Outcome,
    PairedStatistic,
    Scores,
    Statistic,
    Stratum,
    Verdict,
    bootstrap_p_value,
    holm,
    holm_verdicts,
    interval,
    paired,
    patient_index,
    percentile_interval,
    resample,
    scores,
    shared_errors,
    stratified,
)

STATISTICS: tuple[Statistic, ...] = get_args(Statistic)


def data(seed: int, n: int = 40, patients: int = 9) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Estimates and truths on a coarse grid, so that there are ties."""
    rng = np.random.default_rng(seed)
    true = rng.random(n).round(1)
    return (true + rng.normal(0, 0.2, n)).clip(0, 1).round(1), true, [f"p{i}" for i in rng.integers(0, patients, n)]


def aurc_by_hand(score: np.ndarray, risk: np.ndarray) -> float:
    """The mean of the curve over all coverages, each tie group's risk spread evenly over its places."""
    order = np.argsort(score, kind="stable")
    even = np.array([risk[score == s].mean() for s in score[order]])
    return float(np.mean([even[:k].mean() for k in range(1, len(even) + 1)]))


def by_hand(statistic: Statistic, x: np.ndarray, y: np.ndarray, constant: float) -> float:
    match statistic:
        case "mae":
            return float(np.mean(np.abs(x - y)))
        case "bias":
            return float(np.mean(x) - np.mean(y))
        case "pearson":
            return float(stats.pearsonr(x, y).statistic)
        case "spearman":
            return float(stats.spearmanr(x, y).statistic)
        case "aurc":
            return aurc_by_hand(-x, 1 - y)
        case "aurc_optimal":
            return aurc_by_hand(-y, 1 - y)
        case "aurc_excess":
            return aurc_by_hand(-x, 1 - y) - aurc_by_hand(-y, 1 - y)
        case "truth_mean":
            return float(np.mean(y))
        case "truth_sd":
            return float(np.std(y))
        case "constant_mae":
            return float(np.mean(np.abs(y - constant)))
        case "median_mae":
            return float(np.mean(np.abs(y - np.median(y))))


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_the_definitions(seed: int) -> None:
    x, y, patients = data(seed)
    found = scores(x, y, patients, constant=0.4)
    for statistic in STATISTICS:
        assert getattr(found, statistic) == pytest.approx(by_hand(statistic, x, y, 0.4), abs=1e-12), statistic
    assert (found.n, found.left_out, found.patients) == (40, 0, len(set(patients)))
    assert (found.truth_min, found.truth_max, found.constant) == (y.min(), y.max(), 0.4)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_an_interval_is_that_of_copied_patients(statistic: Statistic) -> None:
    x, y, patients = data(3)
    found = interval(statistic, x, y, patients, generator=np.random.default_rng(5), constant=0.4, draws=60, level=0.8)
    index, count = patient_index(patients)
    drawn = []
    for copies in resample(count, 60, np.random.default_rng(5)):
        chosen = np.concatenate([np.repeat(np.flatnonzero(index == p), c) for p, c in enumerate(copies)])
        drawn.append(by_hand(statistic, x[chosen], y[chosen], 0.4))
    assert found.value == pytest.approx(by_hand(statistic, x, y, 0.4))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.1, 0.9])))
    assert (found.level, found.draws) == (0.8, 60)


def test_one_patient_with_many_masks_widens_the_interval() -> None:
    rng = np.random.default_rng(0)
    shift = np.repeat(rng.normal(0, 1, 10), 30)
    y, x = np.zeros(300), shift + rng.normal(0, 0.1, 300)
    apart = [str(i) for i in range(300)]
    together = [str(i // 30) for i in range(300)]
    widths = []
    for patients in (apart, together):
        found = interval("bias", x, y, patients, generator=np.random.default_rng(1))
        assert found.low is not None and found.high is not None
        widths.append(found.high - found.low)
    assert widths[1] > 3 * widths[0]


def test_risk_of_each_metric_and_its_order() -> None:
    patients = ["a", "b", "c"]
    dice = scores([0.9, 0.8, 0.7], [0.9, 0.8, 0.7], patients, metric="dice")
    assert dice.aurc == pytest.approx(np.mean([0.1, 0.15, 0.2])) and dice.aurc_excess == pytest.approx(0)
    arvd = scores([0.1, 0.2, 0.3], [0.1, 0.2, 0.6], patients, metric="arvd")
    assert arvd.aurc == pytest.approx(np.mean([0.1, 0.15, 0.3])) and arvd.aurc_excess == pytest.approx(0)
    rvd = scores([-0.3, 0.1, -0.2], [-0.3, 0.1, -0.2], patients, metric="rvd")
    assert rvd.aurc == pytest.approx(np.mean([0.1, 0.15, 0.2]))
    turned = scores([0.7, 0.8, 0.9], [0.9, 0.8, 0.7], patients)
    assert turned.aurc == pytest.approx(np.mean([0.3, 0.25, 0.2]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 20))
def test_no_order_has_a_smaller_area_than_the_optimal(seed: int, n: int) -> None:
    x, y, patients = data(seed, n)
    found = scores(x, y, patients)
    assert found.aurc_excess is not None and found.aurc_excess >= -1e-12
    assert found.aurc is not None and found.aurc_optimal is not None
    assert found.aurc - found.aurc_optimal == pytest.approx(found.aurc_excess, abs=1e-12)


def test_estimates_that_are_all_equal_accept_at_the_mean_risk() -> None:
    _, y, patients = data(1)
    assert scores(np.full(40, 0.5), y, patients).aurc == pytest.approx(np.mean(1 - y))


def test_undefined_pairs_are_left_out_and_counted() -> None:
    x, y, patients = data(2)
    more = scores(
        [*x.tolist(), None, 0.5, float("nan"), None],
        [*y.tolist(), 0.5, None, 0.3, None],
        [*patients, "new", "new", "new", "p0"],
        constant=0.5,
    )
    clean = scores(x, y, patients, constant=0.5)
    assert more.left_out == 4
    assert TypeAdapter(Scores).dump_python(more) | {"left_out": 0} == TypeAdapter(Scores).dump_python(clean)


def test_without_pairs_every_number_is_undefined() -> None:
    found = scores([None], [0.5], ["a"])
    assert (found.n, found.left_out, found.patients) == (0, 1, 0)
    assert all(getattr(found, s) is None for s in STATISTICS)
    empty = interval("mae", [], [], [], generator=np.random.default_rng(0))
    assert empty == ConfidenceInterval(None, None, None, 0.95, 0)


def test_a_single_pair_has_errors_and_no_correlation() -> None:
    found = scores([0.5], [0.7], ["a"])
    assert found.mae == pytest.approx(0.2) and found.aurc == pytest.approx(0.3)
    assert found.pearson is None and found.spearman is None and found.constant_mae is None


def test_one_patient_has_no_interval() -> None:
    found = interval("mae", [0.5, 0.6], [0.7, 0.7], ["a", "a"], generator=np.random.default_rng(0))
    assert found.value == pytest.approx(0.15) and found.low is None and found.high is None and found.draws == 0


@pytest.mark.parametrize("value", [0.1, 0.3, 1e-9])
def test_a_constant_side_has_no_correlation(value: float) -> None:
    x, y, patients = data(4)
    for found in (scores(np.full(40, value), y, patients), scores(x, np.full(40, value), patients)):
        assert found.pearson is None and found.spearman is None


def test_draws_where_a_correlation_is_undefined_are_left_out() -> None:
    x, y, patients = [0.1, 0.2, 0.3], [0.1, 0.3, 0.2], ["a", "b", "c"]
    found = interval("pearson", x, y, patients, generator=np.random.default_rng(0), draws=99)
    complete = (resample(3, 99, np.random.default_rng(0)) == 1).all(axis=1)
    assert 0 < found.draws == complete.sum() < 99
    assert found.value == pytest.approx(0.5) and found.low == pytest.approx(0.5) == found.high


def test_correlations_of_a_narrow_range_keep_their_digits() -> None:
    x, y, patients = data(6)
    narrow = scores(0.9 + x * 1e-7, 0.9 + y * 1e-7, patients)
    assert narrow.pearson == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-6)


def test_strata_share_out_all_pairs() -> None:
    x, y, patients = data(7)
    x[3] = np.nan
    y[5] = np.nan
    found = stratified(x, y, patients, [0.3, 0.6], constant=0.5)
    assert [(s.low, s.high) for s in found] == [(None, 0.3), (0.3, 0.6), (0.6, None)]
    assert sum(s.scores.n for s in found) == 38
    assert sum(s.scores.left_out for s in found) == 1
    inside = (y >= 0.3) & (y < 0.6) & ~np.isnan(x)
    assert found[1].scores.mae == pytest.approx(np.abs(x - y)[inside].mean())
    assert found[1].scores.truth_min == 0.3


@pytest.mark.parametrize("edges", [[], [0.5, 0.5], [0.6, 0.5]])
def test_edges_that_do_not_rise_are_refused(edges: list[float]) -> None:
    with pytest.raises(ValueError, match="rise"):
        stratified([0.1], [0.1], ["a"], edges)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="truth and a patient"):
        scores([0.1, 0.2], [0.1], ["a"])
    with pytest.raises(ValueError, match="truth and a patient"):
        paired([0.1], [0.1, 0.2], [0.1, 0.2], ["a", "b"], generator=np.random.default_rng(0))


def test_the_sign_flips_of_few_patients_are_all_taken() -> None:
    x, y, patients = data(8, n=25, patients=6)
    z = np.clip(y + np.random.default_rng(9).normal(0, 0.3, 25), 0, 1)
    found = paired(x, z, y, patients, generator=np.random.default_rng(0))
    difference = np.abs(x - y) - np.abs(z - y)
    sums = [sum(d for d, p in zip(difference, patients, strict=True) if p == q) for q in sorted(set(patients))]
    flips = [abs(np.dot(s, sums)) for s in itertools.product([1, -1], repeat=len(sums))]
    assert found.p_value == pytest.approx(np.mean([f >= abs(sum(sums)) - 1e-12 for f in flips]))
    assert found.difference.value == pytest.approx(difference.mean())
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(np.abs(x - y).mean() / np.abs(z - y).mean())
    assert found.test == "sign-flip"


def test_random_sign_flips_agree_with_scipy_s_permutation_test() -> None:
    rng = np.random.default_rng(10)
    y = rng.random(30)
    a, b = y + rng.normal(0, 0.10, 30), y + rng.normal(0, 0.14, 30)
    patients = [str(i) for i in range(30)]
    found = paired(a, b, y, patients, generator=np.random.default_rng(1), draws=20_000)
    reference = stats.permutation_test(
        (np.abs(a - y) - np.abs(b - y),), np.sum, permutation_type="samples", n_resamples=20_000, rng=2
    )
    assert found.p_value == pytest.approx(reference.pvalue, abs=0.02)


def test_sign_flips_reject_true_equality_as_often_as_they_say() -> None:
    rng = np.random.default_rng(11)
    p_values = []
    for _ in range(300):
        y = np.zeros(24)
        a, b = rng.normal(0, 1, (2, 24))
        p = paired(a, b, y, [str(i // 2) for i in range(24)], generator=rng, draws=200).p_value
        assert p is not None
        p_values.append(p)
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.09


@pytest.mark.parametrize("statistic", ["mae", "pearson", "spearman", "aurc"])
def test_a_method_ties_with_itself(statistic: PairedStatistic) -> None:
    x, y, patients = data(12)
    found = paired(x, x, y, patients, generator=np.random.default_rng(0), statistic=statistic, draws=200)
    assert found.p_value == 1.0
    assert (found.difference.value, found.difference.low, found.difference.high) == (0.0, 0.0, 0.0)
    assert holm_verdicts([found])[0].outcome == "tie"


@pytest.mark.parametrize("statistic", ["mae", "pearson", "spearman", "aurc"])
def test_a_clearly_better_method_is_better_and_the_other_worse(statistic: PairedStatistic) -> None:
    rng = np.random.default_rng(13)
    y = rng.random(200)
    good, bad = y + rng.normal(0, 0.02, 200), y + rng.normal(0, 0.4, 200)
    patients = [str(i // 4) for i in range(200)]
    verdicts: list[Outcome | None] = []
    for first, second in ((good, bad), (bad, good)):
        found = paired(first, second, y, patients, generator=np.random.default_rng(0), statistic=statistic)
        verdicts.append(holm_verdicts([found])[0].outcome)
    assert verdicts == ["better", "worse"]


@pytest.mark.parametrize("statistic", ["pearson", "spearman", "aurc"])
def test_a_difference_uses_the_same_draws_for_both(statistic: PairedStatistic) -> None:
    x, y, patients = data(14)
    z, _, _ = data(15)
    found = paired(x, z, y, patients, generator=np.random.default_rng(3), statistic=statistic, draws=80)
    index, count = patient_index(patients)
    drawn = []
    for copies in resample(count, 80, np.random.default_rng(3)):
        chosen = np.repeat(np.arange(40), copies[index])
        drawn.append(by_hand(statistic, x[chosen], y[chosen], 0) - by_hand(statistic, z[chosen], y[chosen], 0))
    assert (found.difference.low, found.difference.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    rarer = min(np.mean(np.array(drawn) <= 0), np.mean(np.array(drawn) >= 0)) * 80
    assert found.p_value == pytest.approx(min(1, 2 * (rarer + 1) / 81))
    assert found.ratio is None and found.test == "bootstrap"


def test_pairs_that_one_method_leaves_undefined_count_for_neither() -> None:
    x, y, patients = data(16)
    gaps = x.copy()
    gaps[[0, 7]] = np.nan
    found = paired(gaps, x, y, patients, generator=np.random.default_rng(0), draws=50)
    assert (found.n, found.left_out) == (38, 2)
    assert found.first == found.second


def test_undefined_comparisons_have_no_verdict_and_do_not_burden_the_others() -> None:
    x, y, patients = data(17, n=60, patients=30)
    worse = np.clip(x + 0.5, 0, 2)
    good = paired(x, worse, y, patients, generator=np.random.default_rng(0))
    constant = np.full(60, 0.5)
    undefined = paired(x, constant, y, patients, generator=np.random.default_rng(0), statistic="spearman")
    assert undefined.p_value is None and undefined.second is None and undefined.difference.value is None
    verdicts = holm_verdicts([undefined, good])
    assert (verdicts[0].p_holm, verdicts[0].outcome) == (None, None)
    assert (verdicts[1].p_holm, verdicts[1].outcome) == (good.p_value, "better")


def test_one_patient_cannot_decide() -> None:
    found = paired([0.1, 0.2], [0.3, 0.4], [0.1, 0.2], ["a", "a"], generator=np.random.default_rng(0))
    assert found.p_value is None and holm_verdicts([found])[0].outcome is None


@pytest.mark.parametrize(("patients", "decides"), [(5, False), (6, True)])
def test_a_bootstrap_of_few_patients_decides_nothing(patients: int, decides: bool) -> None:
    assert (bootstrap_p_value(np.full(1000, 0.3), patients) is not None) == decides


def test_holm_s_published_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([]) == ()
    assert holm([0.6, 0.7]) == (1.0, 1.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_rejects_what_stepping_down_rejects(p_values: list[float], level: float) -> None:
    rejected = set()
    for step, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[i] * (len(p_values) - step) > level:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(p_values)) if p <= level} == rejected


def test_holm_makes_a_verdict_a_tie() -> None:
    y, patients = np.zeros(7), list("abcdefg")
    found = paired(y + 0.1, y + 0.2, y, patients, generator=np.random.default_rng(0))
    assert found.p_value == 2 / 2**7
    assert holm_verdicts([found])[0].outcome == "better"
    assert [v.outcome for v in holm_verdicts([found] * 3)] == ["better"] * 3  # 3 * 2 / 128 = .047
    assert [v.outcome for v in holm_verdicts([found] * 4)] == ["tie"] * 4
    assert holm_verdicts([found], level=0.015)[0].outcome == "tie"


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_p_values_out_of_range_are_refused(p: float) -> None:
    with pytest.raises(ValueError, match="p-values"):
        holm([0.5, p])


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_levels_that_mean_nothing_are_refused(level: float) -> None:
    with pytest.raises(ValueError, match="level"):
        percentile_interval(0.5, np.array([0.4, 0.6]), level)


def test_results_survive_json() -> None:
    x, y, patients = data(19)
    found = tuple(
        paired(x, y, y, patients, generator=np.random.default_rng(0), statistic=s, draws=50)
        for s in ("mae", "spearman")
    )
    comparisons = TypeAdapter(tuple[Comparison, ...])
    assert comparisons.validate_json(comparisons.dump_json(found)) == found
    verdicts = TypeAdapter(tuple[Verdict, ...])
    assert verdicts.validate_json(verdicts.dump_json(holm_verdicts(found))) == holm_verdicts(found)
    strata = TypeAdapter(tuple[Stratum, ...])
    made = stratified(x, y, patients, [0.5])
    assert strata.validate_json(strata.dump_json(made)) == made


def test_whose_errors_they_are() -> None:
    rng = np.random.default_rng(3)
    patients = [f"p{i // 4}" for i in range(80)]
    true, own = rng.random(80), np.repeat(rng.normal(0, 0.1, 20), 4)
    first = true + own + rng.normal(0, 0.05, 80)
    second = true + own + rng.normal(0, 0.05, 80)
    found = shared_errors(first, second, true, patients)
    errors = (first - true).reshape(20, 4)
    f = stats.f_oneway(*errors).statistic
    assert found.patients == 20
    assert found.patient_share == pytest.approx((f - 1) / (f + 3))
    wanted = stats.pearsonr(errors.mean(axis=1), (second - true).reshape(20, 4).mean(axis=1))[0]
    assert found.correlation == pytest.approx(wanted)
    assert wanted > 0.8

    order = rng.permutation(80)
    shuffled = shared_errors(first[order], second[order], true[order], [patients[int(i)] for i in order])
    assert shuffled.patient_share == pytest.approx(found.patient_share)
    assert shuffled.correlation == pytest.approx(found.correlation)
    apart = shared_errors(true + rng.normal(0, 0.1, 80), second, true, patients)
    assert apart.patient_share is not None
    assert apart.patient_share < 0.3


def test_errors_of_few_or_single_masks_are_shared_by_nobody() -> None:
    single = shared_errors([0.5, 0.6, 0.9], [0.5, 0.7, 0.8], [0.4, 0.8, 0.8], ["a", "b", "c"])
    assert single.patient_share is None
    assert single.correlation is not None
    assert shared_errors([0.5, None], [0.5, 0.7], [0.4, 0.8], ["a", "b"]).correlation is None
    assert shared_errors([0.5] * 3, [0.5] * 3, [0.5] * 3, ["a", "b", "c"]).correlation is None
    with pytest.raises(ValueError, match="a truth and a patient"):
        shared_errors([0.5], [0.5, 0.6], [0.5, 0.6], ["a", "b"])
