"""Coverage of intervals: near the level on exchangeable patients, under it after a shift, and honest about small n."""

from __future__ import annotations

import numpy as np
import pytest

from segqc.evaluation.statistics.coverage import ALL, Coverage, quality_strata, resplit_coverage, shift_coverage
from segqc.quality.intervals import jackknife_plus


def draw(
    patients: int, noise: float = 1.0, seed: int = 0, bias: float = 0.0
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(patients), rng.integers(1, 5, patients))
    truth = rng.uniform(0.3, 0.97, owner.size)
    error = noise * (0.02 + 0.1 * (1 - truth)) * (rng.normal(size=patients)[owner] + rng.normal(size=owner.size))
    return np.clip(truth + error, 0, 1), truth, [f"p{i}" for i in owner]


def test_coverage_is_near_the_level_over_resplits_and_in_strata_of_the_estimate() -> None:
    x, truth, patients = draw(80)
    strata = quality_strata(x, (0.6, 0.8))
    found = resplit_coverage(x, truth, patients, "dice", rng=np.random.default_rng(0), strata=strata)
    assert list(found) == [ALL, "< 0.6", "0.6-0.8", ">= 0.8"]
    whole = found[ALL]
    assert whole.coverage is not None
    assert whole.error is not None
    assert (whole.resplits, whole.level, whole.patients, whole.masks) == (20, 0.9, 80, x.size)
    assert abs(whole.coverage - 0.9) < 3 * whole.error
    assert whole.error == pytest.approx(np.sqrt(0.9 * 0.1 / 80), rel=0.3)
    for part in found.values():
        assert part.coverage is not None
        assert part.coverage > 0.8
    widths = [found[name].width for name in strata]
    assert widths == sorted(widths, reverse=True), "bad masks have wider intervals"  # type: ignore[type-var]


def test_the_same_seed_gives_the_same_splits() -> None:
    x, truth, patients = draw(30)

    def found(seed: int) -> dict[str, Coverage]:
        return resplit_coverage(x, truth, patients, "dice", rng=np.random.default_rng(seed), resplits=3)

    assert found(0) == found(0) != found(1)


def test_one_split_by_hand() -> None:
    x, truth, patients = draw(40, seed=2)
    found = resplit_coverage(x, truth, patients, "dice", rng=np.random.default_rng(5), resplits=1, test_share=0.25)
    names = np.array(patients)
    test = np.isin(names, np.random.default_rng(5).permutation(np.unique(names))[:10])
    low, high = jackknife_plus(x[~test], truth[~test], names[~test].tolist(), "dice").bounds(x[test])
    inside = (low <= truth[test]) & (truth[test] <= high)
    by_patient = [inside[names[test] == name].mean() for name in np.unique(names[test])]
    assert found[ALL].coverage == pytest.approx(np.mean(by_patient))
    assert (found[ALL].patients, found[ALL].spread) == (10, 0.0)


def test_a_shift_is_seen_and_no_patient_is_on_both_sides() -> None:
    easy, hard = draw(40, noise=0.3, seed=3), draw(40, noise=4.0, seed=4)
    x, truth = np.r_[easy[0], hard[0]], np.r_[easy[1], hard[1]]
    is_hard = np.arange(x.size) >= easy[0].size
    groups = {"easy": ~is_hard, "hard": is_hard}
    apart = [f"e{p}" for p in easy[2]] + [f"h{p}" for p in hard[2]]

    def between(patients: list[str], source: str, target: str) -> Coverage:
        rng = np.random.default_rng(0)
        found = shift_coverage(x, truth, patients, groups[source], groups[target], "dice", rng=rng, resplits=8)
        assert list(found) == [ALL]
        return found[ALL]

    worse, better = between(apart, "easy", "hard"), between(apart, "hard", "easy")
    assert worse.resplits == 1, "all patients are on one side already"
    assert worse.patients == 40
    assert worse.coverage < 0.6  # type: ignore[operator]
    assert better.coverage == 1.0 and better.error > 0  # type: ignore[operator]
    for name in groups:
        same = between(apart, name, name)
        assert same.resplits == 8
        assert abs(same.coverage - 0.9) < 0.12  # type: ignore[operator]
    assert between(easy[2] + hard[2], "easy", "hard").resplits == 8, "patients with masks in both groups are split"
    strata = quality_strata(truth, (0.6,))
    by_quality = shift_coverage(x, truth, apart, ~is_hard, is_hard, "dice", rng=np.random.default_rng(0), strata=strata)
    assert by_quality[ALL] == worse
    assert sum(by_quality[name].masks for name in strata) == worse.masks


def test_few_patients_and_undefined_numbers() -> None:
    x, truth, patients = draw(17)
    found = resplit_coverage(x, truth, patients, "dice", rng=np.random.default_rng(0), resplits=2)[ALL]
    assert found.coverage is not None, "nine patients to calibrate on"
    found = resplit_coverage(x, truth, patients, "dice", rng=np.random.default_rng(0), level=0.95)[ALL]
    assert (found.coverage, found.error, found.width, found.resplits, found.patients) == (None, None, None, 0, 0)
    x[0] = np.nan
    strata = {"first": np.arange(x.size) < 1}
    found = resplit_coverage(x, truth, patients, "dice", rng=np.random.default_rng(0), strata=strata, resplits=2)[
        "first"
    ]
    assert (found.coverage, found.masks) == (None, 0)
    with pytest.raises(ValueError, match="as many"):
        resplit_coverage(x, truth[1:], patients, "dice", rng=np.random.default_rng(0))


def test_strata_hold_each_value_once() -> None:
    values = np.array([0.1, 0.6, 0.7, 0.75, 1.0, np.nan])
    strata = quality_strata(values)
    assert np.stack(list(strata.values())).sum(axis=0).tolist() == [1, 1, 1, 1, 1, 0]
    assert strata["0.6-0.75"].tolist() == [False, True, True, False, False, False]
