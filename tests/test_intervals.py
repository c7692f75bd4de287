"""Conformal intervals: coverage on exchangeable patients, the jackknife+ by hand, and what happens at the edges."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from pydantic import TypeAdapter
from scipy import stats

from segqc.quality.intervals import (
    DEFAULT_FLOOR,
    LEVEL,
    PERFECT,
    SCALE_FLOORS,
    ConformalCalibration,
    PatientScores,
    jackknife_plus,
    patients_needed,
    split_conformal,
)
from segqc.quality.metrics import METRIC_NAMES, METRIC_RANGES, LinearCalibration, MetricName, fit_calibration
from segqc.quality.stacking import AS_IT_IS, EstimateModel
from segqc.types import PredictionInterval

RESAMPLES = 30
NEW_PATIENTS = 20  # of each resample: its intervals are judged by more than one


def draw(rng: np.random.Generator, patients: int, *, masks: int = 4) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Estimates and true Dice of 1 to ``masks`` masks of each patient, who shares a part of the errors' size and sign.

    Bad masks err more; the estimate is biased, so that the calibration line has work to do.
    """
    counts = rng.integers(1, masks + 1, patients)
    owner = np.repeat(np.arange(patients), counts)
    truth = 1 - rng.beta(1.2, 4, owner.size)
    sign, size = rng.normal(size=patients)[owner], rng.uniform(0.3, 1.5, patients)[owner]
    error = (0.02 + 0.2 * (1 - truth)) * size * (sign + 0.5 * rng.normal(size=owner.size))
    return np.clip(0.8 * truth + 0.15 + error, 0, 1), truth, [f"p{i}" for i in owner]


def covered(calibration: ConformalCalibration, x: np.ndarray, truth: np.ndarray, level: float = LEVEL) -> np.ndarray:
    low, high = calibration.bounds(x, level=level)
    return (truth >= low) & (truth <= high)


@pytest.mark.parametrize(("patients", "levels"), [(9, (0.9,)), (20, (0.9, 0.8))])
def test_new_patients_are_covered_at_the_level_though_a_patients_masks_err_alike(
    patients: int, levels: tuple[float, ...]
) -> None:
    rng = np.random.default_rng(7)
    shares: dict[tuple[str, float], list[float]] = {(name, at): [] for name in ("split", "jackknife") for at in levels}
    for _ in range(RESAMPLES):
        x, truth, names = draw(rng, patients)
        new_x, new_truth, new_names = draw(rng, NEW_PATIENTS)
        owner = np.unique(new_names, return_inverse=True)[1]
        # a fixed line stands for one fitted elsewhere
        line = LinearCalibration(1.25, -0.19, 0.0, 1.0)
        split = split_conformal(line.apply(x), truth, names, "dice", EstimateModel("identity", -0.19, {"map": 1.25}))
        made = {"split": split, "jackknife": jackknife_plus(x, truth, names, "dice")}
        for name, level in shares:
            inside = covered(made[name], new_x, new_truth, level)
            shares[name, level].append(float((np.bincount(owner, inside) / np.bincount(owner)).mean()))
    for level in levels:
        split_share, jackknife_share = np.array(shares["split", level]), np.array(shares["jackknife", level])
        assert split_share.mean() >= level - tolerance(split_share)
        assert jackknife_share.mean() >= level - tolerance(jackknife_share), "far above the 2 level - 1 promised"
        ideal = math.ceil(level * (patients + 1)) / (patients + 1)
        assert split_share.mean() <= ideal + 0.02 + tolerance(split_share), "hardly wider than needed"


def tolerance(shares: np.ndarray) -> float:
    """Three standard errors of the mean."""
    return float(3 * shares.std(ddof=1) / math.sqrt(shares.size))


def test_masks_of_one_patient_do_not_count_as_patients() -> None:
    """One patient with a thousand masks and large errors moves the interval no more than any other patient."""
    rng = np.random.default_rng(0)
    names = [f"p{i}" for i in range(19)]
    x, truth = np.full(19, 0.8), 0.8 + rng.uniform(-0.02, 0.02, 19)
    many = ["bad"] * 1000
    both = split_conformal(np.r_[x, np.full(1000, 0.8)], np.r_[truth, np.full(1000, 0.2)], names + many, "dice")
    once = split_conformal(np.r_[x, 0.8], np.r_[truth, 0.2], [*names, "bad"], "dice")
    assert both.interval(0.8) == once.interval(0.8)
    interval = both.interval(0.8)
    assert interval is not None
    assert interval.low > 0.7
    nearly_all_masks = both.interval(0.8, level=0.95)  # 20 of 21: the bad one is the next rank
    assert nearly_all_masks is not None
    assert nearly_all_masks.low == pytest.approx(0.2)


def likeliest_floor(estimates: np.ndarray, truth: np.ndarray) -> float:
    """By scipy's Laplace distribution, its own scale fitted."""

    def likelihood(floor: float) -> float:
        scale = floor + 1 - estimates
        share = float(np.mean(np.abs(truth - estimates) / scale))
        return float(stats.laplace.logpdf(truth - estimates, scale=share * scale).sum())

    return max(SCALE_FLOORS, key=likelihood)


def test_the_scale_follows_the_residuals() -> None:
    rng = np.random.default_rng(5)
    truth = rng.uniform(0.3, 1.0, 200)
    names = [f"p{i}" for i in range(200)]
    for wanted, scale in (({0.02, 0.05}, 0.02 + 1 - truth), ({1.0, 5.0}, np.ones(200))):
        made = jackknife_plus(truth + 0.003 * rng.laplace(size=200) * scale, truth, names, "dice")
        assert {p.floor for p in made.patients} <= wanted


def test_the_jackknife_plus_by_hand() -> None:
    rng = np.random.default_rng(3)
    x, truth, names = draw(rng, 14)
    new, level = 0.83, 0.8
    owner = np.array(names)
    ends: list[tuple[float, float, float]] = []
    for name in sorted(set(names)):
        own = owner == name
        line = fit_calibration(x[~own], truth[~own], metric="dice", patients=owner[~own])
        floor = likeliest_floor(line.apply(x[~own]), truth[~own])
        for value, true in zip(x[own], truth[own], strict=True):
            there, here = line.apply(float(value)), line.apply(new)
            reach = abs(true - there) / (floor + 1 - there) * (floor + 1 - here)
            ends.append((here - reach, here + reach, 1 / own.sum() / (14 + 1)))
    lows, highs = sorted((-low, w) for low, _, w in ends), sorted((high, w) for _, high, w in ends)

    def first(values: list[tuple[float, float]]) -> float:
        mass = 0.0
        for value, weight in values:
            mass += weight
            if mass >= level - 1e-9:
                return value
        return math.inf

    found = jackknife_plus(x, truth, names, "dice").interval(new, level=level)
    assert found is not None
    assert found.low == pytest.approx(max(0.0, -first(lows)))
    assert found.high == pytest.approx(min(1.0, first(highs)))


def test_residuals_are_cross_fitted() -> None:
    """A patient that no line without it can explain has a large score, though a line with it goes through it."""
    x = np.array([0.5, 0.5, 0.5, 0.9])
    truth = np.array([0.5, 0.52, 0.48, 0.2])
    last = jackknife_plus(x, truth, ["a", "b", "c", "d"], "dice").patients[-1]
    assert last.model == AS_IT_IS  # the others are alike
    assert last.scores[0] == pytest.approx(0.7 / (last.floor + 0.1))


@pytest.mark.parametrize(("level", "needed"), [(0.5, 1), (0.8, 4), (0.9, 9), (0.95, 19), (0.99, 99)])
def test_with_too_few_patients_there_is_no_interval(level: float, needed: int) -> None:
    assert patients_needed(level) == needed
    for patients, output in ((needed - 1, False), (needed, True)):
        names = [f"p{i}" for i in range(patients)]
        # three masks each: it is patients that count
        made = split_conformal([0.8] * 3 * patients, [0.7] * 3 * patients, names * 3, "dice")
        assert (made.interval(0.8, level=level) is not None) is output
        assert np.isnan(made.bounds(np.array([0.8]), level=level)[0][0]) != output


def test_nothing_at_all_and_undefined_numbers() -> None:
    assert jackknife_plus([], [], [], "arvd") == ConformalCalibration("arvd", ())
    assert jackknife_plus([], [], [], "arvd").interval(0.1) is None
    made = split_conformal([0.1, None, 0.2, 0.3], [0.1, 0.1, None, 0.2], ["a", "b", "c", "d"], "arvd")
    assert len(made.patients) == 2
    low, high = split_conformal([0.5] * 9, [0.5] * 9, [*"abcdefghi"], "dice").bounds(np.array([np.nan, 0.5]))
    assert np.isnan(low[0])
    assert np.isnan(high[0])
    assert low[1] == high[1] == 0.5
    with pytest.raises(ValueError, match="2, 2 and 1"):
        jackknife_plus([0.1, 0.2], [0.1, 0.2], ["a"], "dice")
    for level in (0.0, 1.0, 90.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            patients_needed(level)


@pytest.mark.parametrize("metric", METRIC_NAMES)
def test_intervals_stay_in_the_metrics_range(metric: MetricName) -> None:
    lowest, highest = METRIC_RANGES[metric]
    truth = np.linspace(lowest, 1.0, 12)
    made = split_conformal(truth[::-1].copy(), truth, [f"p{i}" for i in range(12)], metric)
    low, high = made.bounds(np.linspace(lowest, 1.0, 30))
    assert low.min() >= lowest
    assert (high >= low).all()
    if highest is None:
        assert high.max() > 1.0
    else:
        assert high.max() <= highest


def test_a_higher_level_holds_the_lower_one_and_bad_masks_have_wider_intervals() -> None:
    x, truth, names = draw(np.random.default_rng(11), 60)
    made = jackknife_plus(x, truth, names, "dice")
    at = np.linspace(0.2, 1.0, 40)
    bounds = [made.bounds(at, level=level) for level in (0.5, 0.7, 0.8, 0.9, 0.95)]
    for (low, high), (lower, higher) in itertools.pairwise(bounds):
        assert (lower <= low).all()
        assert (higher >= high).all()
    narrow, wide = made.interval(0.92), made.interval(0.6)
    assert narrow is not None
    assert wide is not None
    assert wide.high - wide.low > narrow.high - narrow.low


def test_the_estimate_beside_the_interval_is_in_it() -> None:
    made = ConformalCalibration("dice", tuple(PatientScores(AS_IT_IS, DEFAULT_FLOOR, (0.01,)) for _ in range(9)))
    assert made.interval(0.8, shown=0.95) == PredictionInterval(
        pytest.approx(0.8 - 0.01 * (0.2 + DEFAULT_FLOOR)), 0.95, 0.9
    )


def test_a_calibration_survives_json_and_is_small() -> None:
    x, truth, names = draw(np.random.default_rng(1), 40)
    made = jackknife_plus(x, truth, names, "dice")
    adapter = TypeAdapter(ConformalCalibration)
    written = adapter.dump_json(made)
    assert adapter.validate_json(written) == made
    assert len(written) < 10_000


def test_an_interval_as_text() -> None:
    assert str(PredictionInterval(0.8196, 0.91, 0.9)) == "0.82-0.91"
    assert str(PredictionInterval(-0.05, 0.1, 0.9)) == "-0.05 to 0.10"
    assert PERFECT.keys() == METRIC_RANGES.keys()
