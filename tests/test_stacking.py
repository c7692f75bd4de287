"""Estimates from several witnesses: what is of use is used, what is not is left, and patients count, not masks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from pydantic import TypeAdapter
from scipy.stats import spearmanr

from segqc.quality.intervals import held_out, jackknife
from segqc.quality.metrics import METRIC_RANGES, MetricName
from segqc.quality.stacking import (
    ARVD_CHOICES,
    AS_IT_IS,
    DICE_OF_OTHERS,
    DICE_OF_SERVED,
    MIN_PATIENTS,
    RVD_CHOICES,
    Choice,
    ChosenEstimate,
    EstimateModel,
    KnownMasks,
    WitnessName,
    arvd_of_dice,
    fit_estimates,
    iou_of_dice,
    known_masks,
)
from segqc.quality.stacking import _fit as fit_choice

WITNESSES: tuple[WitnessName, ...] = ("map", "soft", "entropy", "size")


def served(
    seed: int, patients: int = 60, *, noise: dict[WitnessName, float] | None = None, scans: int = 1, spread: float = 0.6
) -> KnownMasks:
    """Masks whose Dice each witness knows with noise of its own, on a logit scale; size knows nothing."""
    rng = np.random.default_rng(seed)
    noise = {"map": 0.3, "soft": 0.3, "entropy": 0.3, **(noise or {})}
    z = np.repeat(rng.normal(1.6, spread, patients), scans) + 0.05 * rng.normal(size=patients * scans)

    def seen(name: WitnessName) -> np.ndarray:
        return z + noise[name] * rng.normal(size=z.size)

    def expit(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    values = {
        "map": expit(seen("map")),
        "soft": expit(2.5 + 0.3 * seen("soft")),  # far too optimistic, as soft outputs are
        "entropy": -np.exp(-0.4 * seen("entropy")),
        "size": -np.abs(rng.normal(size=z.size)),
    }
    names = [f"p{i:03}" for i in np.repeat(np.arange(patients), scans)]
    return known_masks(values, expit(z), names)  # type: ignore[arg-type]


def fit_estimate(masks: KnownMasks, metric: MetricName, choices: Sequence[Choice]) -> ChosenEstimate:
    """Of a single structure."""
    return fit_estimates([masks], metric, choices)[0]


def without_patients(masks: KnownMasks, choices: Sequence[Choice]) -> Callable[[int], EstimateModel]:
    return lambda patient: fit_estimate(masks.where(masks.patients != patient), "dice", choices).model


def error(chosen: ChosenEstimate, masks: KnownMasks) -> float:
    return float(np.abs(chosen.model.apply(masks.values) - masks.true).mean())


@pytest.mark.parametrize("seed", range(3))
def test_a_witness_that_knows_more_than_the_map_is_used(seed: int) -> None:
    noise: dict[WitnessName, float] = {"map": 1.2, "soft": 3.0, "entropy": 0.05}
    chosen = fit_estimate(served(seed, noise=noise), "dice", DICE_OF_SERVED)
    new = served(100 + seed, 300, noise=noise)
    assert chosen.model.weights.get("entropy", 0) > 0
    assert error(chosen, new) < 0.7 * np.abs(new.values["map"] - new.true).mean()
    ranks = [spearmanr(v, new.true).statistic for v in (chosen.model.apply(new.values), new.values["map"])]
    assert ranks[0] > ranks[1]


@pytest.mark.parametrize("seed", range(3))
def test_without_anything_to_gain_the_map_keeps_its_say(seed: int) -> None:
    """A map that is nearly right, beside witnesses that know nothing."""
    noise: dict[WitnessName, float] = {"map": 0.05, "soft": 10.0, "entropy": 10.0}
    chosen = fit_estimate(served(seed, noise=noise), "dice", DICE_OF_SERVED)
    assert chosen.choice == "map"
    assert chosen.model == AS_IT_IS


@pytest.mark.parametrize("seed", range(3))
def test_where_nothing_is_known_the_constant_errs_least_and_scans_keep_an_order(seed: int) -> None:
    noise: dict[WitnessName, float] = {"map": 1.5, "soft": 3.0, "entropy": 3.0}
    masks = served(seed, 120, noise=noise, spread=0.2)
    chosen = fit_estimate(masks, "dice", DICE_OF_SERVED)
    new = served(100 + seed, 300, noise=noise, spread=0.2)
    assert error(chosen, new) < 1.3 * np.abs(new.true - np.median(new.true)).mean()
    assert error(chosen, new) < 0.5 * np.abs(new.values["map"] - new.true).mean()
    estimates = chosen.model.apply(new.values)
    assert len(np.unique(estimates)) > 0.95 * estimates.size, "hardly a tie: a constant orders nothing"


def test_the_constant_keeps_the_order_of_the_witness_that_has_one() -> None:
    noise: dict[WitnessName, float] = {"map": 5.0, "soft": 5.0, "entropy": 0.1}
    masks = served(0, 80, noise=noise)
    chosen = fit_estimate(masks, "dice", ("map", "constant"))
    assert (chosen.choice, chosen.ordered_by) == ("constant", "entropy")
    new = served(1, 200, noise=noise)
    estimates = chosen.model.apply(new.values)
    assert spearmanr(estimates, new.values["entropy"]).statistic == pytest.approx(1)
    assert np.ptp(estimates) < 0.05
    assert np.abs(estimates - np.median(masks.true)).max() < 0.05


def test_an_order_is_not_given_away_for_a_smaller_error() -> None:
    """The size errs least once a line goes through it, as that is flat; but its order is that of a coin."""
    masks = served(4, 80, noise={"map": 0.5, "soft": 20.0, "entropy": 20.0}, spread=0.2)
    far = replace(masks, values={**masks.values, "map": np.clip(masks.values["map"] - 0.25, 0.01, 0.99)})
    chosen = fit_estimate(far, "dice", ("map", "size"))
    by = {c.choice: c for c in chosen.candidates}
    assert by["size"].mae < 0.5 * by["map"].mae
    assert by["map"].spearman > by["size"].spearman + 0.3  # type: ignore[operator]
    assert chosen.choice == "map"


@pytest.mark.parametrize("choice", DICE_OF_SERVED)
def test_every_estimate_is_monotone_and_a_dice(choice: Choice) -> None:
    for seed in range(5):
        # also of witnesses that speak the wrong way round
        masks = served(seed, 20)
        values = {**masks.values, "soft": masks.values["soft"][::-1].copy()}
        model = fit_choice(replace(masks, values=values), "dice", choice, "entropy")
        at: dict[WitnessName, np.ndarray] = {n: np.median(v).repeat(50) for n, v in values.items()}
        for name, (low, high) in {"map": (0, 1), "soft": (0, 1), "entropy": (-9, 0), "size": (-9, 0)}.items():
            estimates = model.apply({**at, name: np.linspace(low, high, 50)})  # type: ignore[dict-item]
            assert (np.diff(estimates) >= -1e-12).all()
            if choice != "map":
                assert estimates.min() >= 0
                assert estimates.max() <= 1


def test_masks_of_one_patient_do_not_count_as_patients() -> None:
    """One patient with a hundred masks that contradict all others."""
    masks = served(0, 40, noise={"map": 0.1})
    loud = served(1, 1, scans=100, noise={"map": 0.1})
    both = KnownMasks(
        {n: np.r_[masks.values[n], loud.values[n]] for n in WITNESSES},
        np.r_[masks.true, 1 - loud.true],
        np.r_[masks.patients, np.full(100, 40)],
    )
    once = both.where(np.arange(both.true.size) <= 40)
    found, wanted = (fit_estimate(m, "dice", DICE_OF_SERVED) for m in (both, once))
    assert found.patients == wanted.patients == 41
    by = [{c.choice: c.mae for c in chosen.candidates} for chosen in (found, wanted)]
    assert by[0] == pytest.approx(by[1], abs=0.01), "fits and errors are over patients"
    assert found.choice == wanted.choice


def test_all_structures_have_one_choice() -> None:
    """The first structure alone would do without the entropy; the second one has nothing else."""
    first = served(0, noise={"map": 0.1, "soft": 5.0, "entropy": 5.0})
    second = served(1, noise={"map": 2.0, "soft": 2.0, "entropy": 0.05})
    alone = [fit_estimate(masks, "dice", ("map", "stack")).choice for masks in (first, second)]
    assert alone == ["map", "stack"]
    both = fit_estimates([first, second], "dice", ("map", "stack"))
    assert [c.choice for c in both] == ["stack", "stack"]
    assert both[0].model != both[1].model, "each has its own weights"
    rare = second.where(second.patients < MIN_PATIENTS - 1)
    assert [c.choice for c in fit_estimates([first, rare], "dice", ("map", "stack"))] == ["map", "map"]
    missing = second.where(second.patients % 3 > 0)  # not every patient has every structure
    assert [c.patients for c in fit_estimates([first, missing], "dice", ("map", "stack"))] == [60, 40]


def test_few_patients_choose_nothing() -> None:
    masks = served(0, MIN_PATIENTS - 1, scans=5, noise={"map": 3.0})
    assert fit_estimate(masks, "dice", DICE_OF_SERVED) == ChosenEstimate(patients=MIN_PATIENTS - 1)
    none = known_masks({"map": []}, [], [])
    assert fit_estimate(none, "dice", DICE_OF_OTHERS) == ChosenEstimate()


def test_the_choice_is_a_function_of_the_masks_whatever_their_order() -> None:
    masks = served(3, 30, scans=2, noise={"map": 1.0, "soft": 0.2})
    first = fit_estimate(masks, "dice", DICE_OF_SERVED)
    assert fit_estimate(masks, "dice", DICE_OF_SERVED) == first
    order = np.random.default_rng(0).permutation(masks.true.size)
    again = fit_estimate(masks.where(order), "dice", DICE_OF_SERVED)
    assert (again.choice, again.patients) == (first.choice, first.patients)
    np.testing.assert_allclose(again.model.apply(masks.values), first.model.apply(masks.values), atol=1e-6)


def test_a_witness_that_is_not_known_leaves_the_map_s_word() -> None:
    model = EstimateModel("logit", 0.3, {"map": 0.8, "soft": 0.5})
    dice = np.array([0.3, 0.9])
    np.testing.assert_array_equal(model.apply({"map": dice}), dice)
    by_dice = EstimateModel("identity", 0.0, {"dice": 1.0})
    np.testing.assert_array_equal(by_dice.apply({"map": dice}), dice)
    known = model.apply({"map": dice, "soft": np.array([np.nan, 0.9])})
    assert known[0] == 0.3
    assert known[1] != 0.9


def volumes(choices: tuple[Choice, ...], values: np.ndarray, true: np.ndarray, dice: np.ndarray) -> ChosenEstimate:
    said = {"map": values, "dice": 2 * (1 - dice)} if "dice" in choices else {"map": values}
    metric = "arvd" if "dice" in choices else "rvd"
    return fit_estimate(known_masks(said, true, [f"p{i}" for i in range(true.size)]), metric, choices)  # type: ignore[arg-type]


@pytest.mark.parametrize("choices", [RVD_CHOICES, ARVD_CHOICES])
def test_volumes_are_checked_against_the_constant(choices: tuple[Choice, ...]) -> None:
    rng = np.random.default_rng(2)
    true = rng.gamma(2.0, 0.1, 60)
    nothing = rng.uniform(0, 1, 60)
    for wanted, values in {
        "map": true + 0.01 * rng.normal(size=60),
        "line": 3 * true + 0.5,
        "constant": rng.gamma(2.0, 3.0, 60),
    }.items():
        chosen = volumes(choices, values, true, nothing)
        assert [c.choice for c in chosen.candidates] == list(choices)
        assert all(c.spearman is None for c in chosen.candidates), "nothing is ordered by it"
        said = {"map": values, "dice": 2 * (1 - nothing)}
        error = np.abs(chosen.model.apply(said) - true).mean()  # type: ignore[arg-type]
        if wanted == "constant":
            assert error < 1.1 * np.abs(true - np.median(true)).mean()
        else:
            assert chosen.choice == wanted
            assert error < 0.02


def test_the_arvd_follows_from_the_dice_of_a_mask_of_the_truth_s_size() -> None:
    """A map that expects next to no truth says anything of a ratio to it, while its Dice stays right."""
    rng = np.random.default_rng(6)
    dice = rng.uniform(0.5, 0.95, 40)
    true = 2 * (1 - dice) * rng.uniform(0.95, 1.05, 40)
    chosen = volumes(ARVD_CHOICES, true * rng.choice([1, 1, 20], 40), true, dice)
    assert chosen.choice == "dice"
    assert arvd_of_dice(0.8) == pytest.approx(0.4)
    far = chosen.model.apply({"map": np.array([50.0]), "dice": np.array([1.0])})
    assert far == pytest.approx(1.0)


def test_held_out_estimates_have_nothing_of_their_patient() -> None:
    """A patient's truth changes everything but what is said of its own mask."""
    masks = served(5, 20, noise={"map": 0.8})
    first = held_out(jackknife(masks, "dice", without_patients(masks, DICE_OF_SERVED)), masks)
    true = masks.true.copy()
    true[7] = 0.02
    other = replace(masks, true=true)
    second = held_out(jackknife(other, "dice", without_patients(other, DICE_OF_SERVED)), other)
    assert first.estimates[7] == second.estimates[7]
    assert (first.low[7], first.high[7]) != (second.low[0], second.high[0])
    assert not np.isnan(first.low).any()
    assert ((first.low <= first.estimates) & (first.estimates <= first.high)).all()


def test_held_out_intervals_hold_about_as_often_as_promised() -> None:
    hits = []
    for seed in range(5):
        masks = served(seed, 24, noise={"map": 0.6, "soft": 0.6})
        made = jackknife(masks, "dice", without_patients(masks, ("pooled", "map", "line")))
        said = held_out(made, masks)
        hits.append((said.low <= masks.true) & (masks.true <= said.high))
        new = served(50 + seed, 60, noise={"map": 0.6, "soft": 0.6})
        low, high = made.bounds(new.values)
        hits.append((low <= new.true) & (new.true <= high))
    inside, outside = np.concatenate(hits[::2]).mean(), np.concatenate(hits[1::2]).mean()
    assert 0.85 < inside <= 1
    assert 0.85 < outside <= 1
    assert inside == pytest.approx(outside, abs=0.07), "what is said of the labelled patients holds for others"


def test_a_choice_survives_json() -> None:
    chosen = fit_estimate(served(0, 30), "dice", DICE_OF_SERVED)
    adapter = TypeAdapter(ChosenEstimate)
    assert adapter.validate_json(adapter.dump_json(chosen)) == chosen


def test_iou_and_dice_are_one_number() -> None:
    for mask, truth, both in itertools.product((3, 8), (5, 8), (0, 2, 3)):
        dice, iou = 2 * both / (mask + truth), both / (mask + truth - both)
        assert iou_of_dice(dice) == pytest.approx(iou)
    assert METRIC_RANGES["dice"] == (iou_of_dice(0.0), iou_of_dice(1.0))


def test_what_differs_in_length_is_refused() -> None:
    with pytest.raises(ValueError, match="got 2, 1 and 2"):
        known_masks({"map": [0.5, 0.6]}, [0.5], ["a", "b"])


@pytest.mark.parametrize(("bias", "choice"), [(0.0, "map"), (0.4, "constant")])
def test_the_constant_is_a_last_resort(bias: float, choice: Choice) -> None:
    """A map that is a little worse than a constant stays, as it follows what the labelled patients do not have."""
    masks = served(8, 15, noise={"map": 0.3}, spread=0.25)
    off = replace(masks, values={**masks.values, "map": masks.values["map"] - bias})
    chosen = fit_estimate(off, "dice", ("map", "constant"))
    errors = {c.choice: c.mae for c in chosen.candidates}
    assert errors["constant"] < errors["map"]
    assert chosen.choice == choice


@pytest.mark.parametrize("choice", ["constant", "soft", "entropy", "size"])
def test_what_does_not_look_at_the_map_follows_it_beyond_what_it_has_seen(choice: Choice) -> None:
    """Masks of another site, which the map holds for far worse than any that is known, are not as good as the rest."""
    masks = served(0, 20, noise={"map": 0.3}, spread=0.1)
    model = fit_choice(masks, "dice", choice, "map")
    low, high = masks.values["map"].min(), masks.values["map"].max()
    asked = {name: np.full(5, np.median(values)) for name, values in masks.values.items()}
    asked["map"] = np.array([0.1, 0.3, low, high, 0.98])
    estimates = model.apply(asked)
    assert (np.diff(estimates) >= 0).all(), "monotone"
    np.testing.assert_allclose(estimates[2], estimates[3], atol=0.02)
    assert estimates[0] < estimates[1] - 0.1 < estimates[2] - 0.2
    assert estimates[4] > estimates[3]


def test_a_constant_of_a_volume_follows_the_map_beyond_what_it_has_seen() -> None:
    said, true = np.linspace(-0.3, 0.5, 20), np.full(20, 0.1)
    model = fit_choice(known_masks({"map": said}, true, [f"p{i}" for i in range(20)]), "rvd", "constant", "map")
    np.testing.assert_allclose(model.apply({"map": np.array([-0.8, -0.3, 0.5, 1.5])}), [-0.4, 0.1, 0.1, 1.1])


def test_a_simpler_choice_that_is_worse_by_next_to_nothing_is_taken() -> None:
    """However surely it is worse: by the noise alone, one of two that are nearly the same would always be out."""
    for noise, choice in ((0.1, "pooled"), (0.5, "map")):
        chosen = fit_estimate(served(0, noise={"map": 0.02, "soft": noise}), "dice", ("pooled", "map"))
        pooled, of_map = (candidate.mae for candidate in chosen.candidates)
        assert pooled > 1.5 * of_map, "beyond the noise of 60 patients"
        assert chosen.choice == choice
