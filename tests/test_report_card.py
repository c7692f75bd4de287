"""Report cards, on simulated estimates of which everything is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from segqc.evaluation.statistics import curves
from segqc.quality.estimation import ConfidenceInterval, rank_regret
from segqc.quality.report_card import (
    AT_RANDOM,
    BY_ESTIMATE,
    MIN_PATIENTS,
    WORST,
    ReportCard,
    UnseenMask,
    estimate_sentence,
    is_worse,
    is_worth_proposing,
    messages,
    order_sentence,
    people_sentence,
    people_to_json,
    report_card,
    to_json,
)
from segqc.quality.witnesses import UNLIKENESS
from segqc.types import MetricIntervals, PredictionInterval, Unlikeness
from tests.report_kit import good_card, metrics, simulated, worthless_card

RNG = np.random.default_rng


def share(of: Callable[[ReportCard], bool], cards: list[ReportCard]) -> float:
    return sum(map(of, cards)) / len(cards)


def test_good_estimates_are_better_than_a_constant_and_in_order() -> None:
    card = report_card(simulated(0, structures=2))
    assert [s.structure for s in (*card.structures, card.worst)] == ["s0", "s1", WORST]
    for report in (*card.structures, card.worst):
        assert (report.patients, report.scans) == (40, 40)
        assert report.figures is not None
        ratio, order = report.figures.ratio, report.figures.spearman
        assert ratio.value == pytest.approx(report.figures.dice.mae / report.figures.dice.constant_mae)
        assert ratio.low is not None and ratio.high is not None and ratio.low < ratio.value < ratio.high < 1
        assert order.value is not None and order.value > 0.8
        assert report.figures.regret is not None and report.figures.regret < 0.1
        assert (report.estimate_verdict, report.order_verdict) == ("better than the constant", "better than chance")
    assert card.ranked_by == BY_ESTIMATE


def test_a_structure_has_the_errors_that_are_found_and_the_worst_one_none() -> None:
    card = report_card(simulated(1))
    (structure,) = card.structures
    assert structure.figures is not None and card.worst.figures is not None
    figures = structure.figures
    assert figures.included is not None and figures.missed is not None
    assert (figures.included.at_half, figures.included.at_precision) == (1.0, 1.0)
    assert (figures.missed.at_half, figures.missed.at_precision) == (0.0, 1.0)  # half of what is outside is wrong
    assert figures.rvd is not None and figures.abs_rvd is not None
    assert (figures.rvd.mae, figures.rvd.constant_mae) == (pytest.approx(0.4), 0)
    assert (figures.abs_rvd.mae, figures.abs_rvd.constant_mae) == (0, 0)
    assert card.worst.figures.missed is None and card.worst.figures.rvd is None


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.1])
def test_coverage_is_the_share_of_intervals_that_hold_the_truth(noise: float) -> None:
    masks = simulated(2, patients=200, noise=noise)
    card = report_card(masks)
    assert card.worst.figures is not None
    held = [m.interval.low <= m.true.dice <= m.interval.high for m in masks if m.interval and m.true.dice is not None]
    assert card.worst.figures.coverage == pytest.approx(np.mean(held))


def test_worthless_estimates_are_rarely_taken_for_good_ones() -> None:
    cards = [report_card(simulated(seed, patients=12, worthless=True)) for seed in range(60)]
    assert share(lambda c: c.worst.order_verdict == "better than chance", cards) <= 0.15
    assert share(lambda c: c.worst.estimate_verdict == "better than the constant", cards) <= 0.05
    assert share(lambda c: c.ranked_by == AT_RANDOM, cards) >= 0.85


def test_a_patient_counts_once_however_many_scans_it_has() -> None:
    few = report_card(simulated(3, patients=12, noise=0.1))
    masks = simulated(3, patients=12, noise=0.1)
    many = report_card([replace(m, scan=f"{m.scan} again {i}") for m in masks for i in range(5)])
    assert few.worst.figures is not None and many.worst.figures is not None
    assert (many.worst.patients, many.worst.scans) == (12, 60)
    for name in ("ratio", "spearman"):
        one: ConfidenceInterval = getattr(few.worst.figures, name)
        other: ConfidenceInterval = getattr(many.worst.figures, name)
        assert one.low is not None and other.low is not None
        assert other.low == pytest.approx(one.low, abs=0.03), "copies of a scan make nothing surer"


def test_of_peoples_masks_it_says_whether_anything_is_proposed() -> None:
    good, worthless = good_card(), worthless_card()
    few = report_card(simulated(4, patients=MIN_PATIENTS - 1, scans_each=8))
    assert [is_worth_proposing(card) for card in (None, good, worthless, few)] == [True, True, False, True]
    assert "is better than a constant" in people_sentence(good)
    assert "nothing is proposed, as on experts' labels with implanted errors" in people_sentence(worthless)
    assert people_sentence(few).startswith("Nobody can tell yet how good the estimates of people's masks are")
    told = people_to_json(worthless)
    assert told["estimate"] == "not better than the constant" and told["messages"] == [people_sentence(worthless)]
    assert not {"scans", "witnesses", "marked", "ranked_by"} & told.keys()


@pytest.mark.parametrize("patients", [1, MIN_PATIENTS - 1])
def test_of_few_patients_nothing_is_said(patients: int) -> None:
    card = report_card(simulated(4, patients=patients, scans_each=3, witness_noise=0.0))
    assert [r.figures for r in (card.worst, *card.structures)] == [None, None]
    assert (card.worst.estimate_verdict, card.worst.order_verdict) == ("too few patients",) * 2
    assert card.ranked_by == BY_ESTIMATE, "nothing speaks against it yet"
    for sentence in (estimate_sentence(card), order_sentence(card)):
        assert sentence.endswith(f": {patients} of {MIN_PATIENTS} patients are checked; label scans of more patients.")


def test_where_only_validating_patients_are_checked_the_setting_that_checks_all_is_named() -> None:
    card = report_card(simulated(4, patients=1), checks_all=False)
    for sentence in (estimate_sentence(card), order_sentence(card)):
        assert f": 1 of {MIN_PATIENTS} patients are checked; only patients that validate are" in sentence
        assert "all labelled ones with ensemble = true in [training] of segqc.toml; or label" in sentence
    many = report_card(simulated(4), checks_all=False)
    assert "ensemble" not in estimate_sentence(many)


def test_without_masks_there_is_a_card_that_says_nothing() -> None:
    assert report_card([]).worst.patients == 0


def test_undefined_numbers_are_left_out() -> None:
    masks = simulated(5, patients=20)
    undefined = [
        UnseenMask(patient=f"q{i}", scan=f"q{i}", structure="s0", true=metrics(None), estimated=metrics(0.5),
                   interval=None, errors=masks[0].errors)
        for i in range(5)
    ]  # fmt: skip
    card = report_card([*masks, *undefined])
    assert card.worst.patients == 20
    assert card.scans == report_card(masks).scans


def test_alike_masks_give_no_verdict_in_favour() -> None:
    card = report_card(simulated(6, patients=15, spread=0.0, noise=0.0))
    assert card.worst.figures is not None
    assert card.worst.figures.spearman.value is None
    assert (card.worst.estimate_verdict, card.worst.order_verdict) == (
        "not better than the constant", "not better than chance",
    )  # fmt: skip


@pytest.mark.parametrize("witness_noise, ranked_by", [(0.02, "tta"), (10.0, UNLIKENESS), (None, UNLIKENESS)])
def test_without_a_witness_the_scans_most_unlike_the_training_s_come_first(
    witness_noise: float | None, ranked_by: str
) -> None:
    card = worthless_card(witness_noise=witness_noise, unlikeness=Unlikeness(1.0, 0.5))
    assert card.ranked_by == ranked_by
    assert ("Ordered by how unlike the training scans they are" in order_sentence(card)) is (ranked_by == UNLIKENESS)
    assert good_card().ranked_by == BY_ESTIMATE


def test_intervals_of_marked_scans_are_left_out_of_the_share_that_hold_and_counted() -> None:
    masks = simulated(2, patients=20)
    wrong = PredictionInterval(0.0, 0.01, 0.9)
    for i in range(6):
        of_scan = MetricIntervals(dice=wrong).of_scan(unlike := Unlikeness(3.0, 0.05 if i < 4 else None))
        masks[i] = replace(masks[i], interval=of_scan.dice, unlikeness=unlike)
    card = report_card(masks)
    held = [m.interval is not None and m.true.dice is not None and m.interval.low <= m.true.dice <= m.interval.high
            for m in masks[4:]]  # fmt: skip
    assert card.worst.figures is not None and card.worst.figures.coverage == pytest.approx(np.mean(held))
    assert (card.marked, report_card(simulated(2)).marked) == (4, None)
    assert "of the 20 scans of these patients 4 would be" in messages(card)[2]
    assert len(messages(report_card(simulated(2)))) == 2, "nothing is said of numbers that are not there"


def test_with_too_few_patients_it_is_said_once_that_no_scan_is_marked() -> None:
    card = report_card(simulated(2, patients=5, unlikeness=Unlikeness(1.0, None)))
    assert messages(card)[2] == ("No scan is marked as unlike the training scans yet: 5 of 9 patients calibrate.")


@pytest.mark.parametrize("witness_noise, ranked_by", [(0.02, "tta"), (10.0, AT_RANDOM), (None, AT_RANDOM)])
def test_where_the_order_is_noise_a_witness_or_chance_takes_its_place(
    witness_noise: float | None, ranked_by: str
) -> None:
    card = report_card(simulated(7, patients=30, worthless=True, witness_noise=witness_noise))
    assert card.worst.order_verdict == "not better than chance"
    assert card.ranked_by == ranked_by
    assert ("Ordered at random" if ranked_by == AT_RANDOM else "masks of a scan agree") in order_sentence(card)
    assert "not better than chance on 30 patients" in order_sentence(card)


@pytest.mark.parametrize("shift", [-0.2, 0.2])
def test_a_shifted_estimate_has_an_order_and_no_worth_as_a_number(shift: float) -> None:
    card = report_card(simulated(8, shift=shift))
    assert (card.worst.estimate_verdict, card.worst.order_verdict) == (
        "not better than the constant", "better than chance",
    )  # fmt: skip
    assert estimate_sentence(card).startswith("Do not rely on the estimated Dice; it is not better than a constant: ")


def test_an_estimate_that_may_be_better_by_chance_is_told_to_be() -> None:
    card = report_card(simulated(1, patients=9, noise=0.06))
    assert card.worst.figures is not None
    assert card.worst.figures.dice.mae < card.worst.figures.dice.constant_mae
    assert card.worst.estimate_verdict == "not better than the constant"
    assert "that it is better than a constant may be chance" in estimate_sentence(card)


def test_a_card_is_the_same_each_time_and_survives_json() -> None:
    card = report_card(simulated(9, witness_noise=0.1))
    assert card == report_card(simulated(9, witness_noise=0.1))
    body = json.loads(json.dumps(to_json(card)))
    assert (body["estimate"], body["order"], body["ranked_by"]) == (
        "better than the constant", "better than chance", BY_ESTIMATE,
    )  # fmt: skip
    assert "p0" not in json.dumps(body), "no patient is named to clients"


# ------------------------------------------------------------------------------------------------------------- compare


def test_a_card_is_not_worse_than_itself_or_by_noise() -> None:
    card = report_card(simulated(10, noise=0.05))
    assert is_worse(card, card) is None
    others = [is_worse(report_card(simulated(10, noise=0.05)), card) for _ in range(2)]
    assert others == [None, None]


@pytest.mark.parametrize("worse", [{"worthless": True}, {"shift": -0.15}, {"noise": 0.2}])
def test_larger_errors_on_the_same_scans_are_worse(worse: dict[str, float]) -> None:
    good, bad = report_card(simulated(11)), report_card(simulated(11, **worse))  # type: ignore[arg-type]
    reason = is_worse(bad, good)
    assert reason is not None and "40 patients" in reason
    assert is_worse(good, bad) is None


def test_smaller_errors_of_masks_that_are_all_good_are_not_worse() -> None:
    # the constant is hard to beat, and the order hard to find, where all masks are alike
    varied, alike = report_card(simulated(12, noise=0.05)), report_card(simulated(12, noise=0.02, spread=0.02))
    assert is_worse(alike, varied) is None


def test_larger_errors_of_masks_that_differ_more_are_not_worse() -> None:
    alike, varied = report_card(simulated(13, noise=0.02, spread=0.02)), report_card(simulated(13, noise=0.05))
    assert is_worse(varied, alike) is None


def test_nothing_is_worse_where_too_few_patients_are_in_both() -> None:
    good, bad = simulated(14, patients=40), simulated(14, patients=MIN_PATIENTS - 1, worthless=True)
    assert is_worse(report_card(bad), report_card(good)) is None


# -------------------------------------------------------------------------------------------------------------- regret


@pytest.mark.parametrize("seed", range(5))
def test_regret_is_what_the_curves_of_correction_give(seed: int) -> None:
    rng = RNG(seed)
    true, estimated = rng.uniform(size=30).round(1), rng.uniform(size=30).round(1)  # with ties
    units = curves.scans(true)
    order = curves.by_scores(units, -estimated, generator=rng)
    captured = curves.captured(order, curves.optimal(units), curves.at_random(units, generator=rng))
    assert captured is not None
    assert rank_regret(estimated, true) == pytest.approx(1 - captured)


def test_the_best_order_loses_nothing_and_the_turned_one_twice_as_much_as_chance() -> None:
    true = RNG(0).uniform(size=20)
    assert rank_regret(true, true) == pytest.approx(0)
    assert rank_regret(-true, true) == pytest.approx(2)
    assert rank_regret(np.zeros(20), true) == pytest.approx(1)
    assert rank_regret(true, np.full(20, 0.9)) is None
