"""Are more rounds worth it? Decisions as a function of what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from segqc.quality.stopping import (
    MIN_PATIENTS,
    CheckedRound,
    gain,
    mean_dice,
    outlook,
    outlook_sentence,
)
from segqc.types import MaskDice


def masks(dice: Sequence[float], *, scans_each: int = 1) -> tuple[MaskDice, ...]:
    """Masks of as many patients as there are numbers, each with so many scans of the same Dice."""
    return tuple(
        MaskDice(patient=f"p{i}", scan=f"p{i}_{k}", dice=value)
        for i, value in enumerate(dice)
        for k in range(scans_each)
    )


def a_round(number: int, labelled: int, rise: float, *, patients: int = 12, noise: float = 0.01) -> CheckedRound:
    """A round whose masks are better than those of the zeroth by `rise`, give or take."""
    drawn = np.random.default_rng(number).normal(0, noise, patients)
    return CheckedRound(number=number, labelled=labelled, validation=masks((0.8 + rise + drawn).tolist()))


FLAT = [a_round(1, 10, 0.0), a_round(2, 25, 0.0), a_round(3, 30, 0.0)]


@pytest.mark.parametrize(
    ("patients", "dice", "stop"),
    [(MIN_PATIENTS, 0.97, "good enough"), (MIN_PATIENTS - 1, 0.97, None), (MIN_PATIENTS, 0.94, None)],
)
def test_rounds_stop_where_audited_masks_need_little_correction(patients: int, dice: float, stop: str | None) -> None:
    found = outlook(masks([dice] * patients), [], 50, enough_dice=0.95)
    assert found.stop == stop
    assert (found.audits is None) == (patients < MIN_PATIENTS)


def test_it_is_the_lower_end_of_the_mean_that_has_to_be_enough() -> None:
    served = masks([0.99] * 8 + [0.72, 0.99])
    assert mean_dice(served).value > 0.95
    assert outlook(served, [], 0, enough_dice=0.95).stop is None
    assert outlook(served, [], 0, enough_dice=0.85).stop == "good enough"


def test_many_scans_of_few_patients_are_few() -> None:
    served = masks([0.97] * (MIN_PATIENTS - 1), scans_each=5)
    found = outlook(served, [], 0, enough_dice=0.95)
    assert (found.stop, found.audited) == (None, MIN_PATIENTS - 1)
    ends = [mean_dice(masks([0.9, 0.7] * 5, scans_each=n)).interval for n in (1, 5)]
    assert ends[0] == ends[1], "more scans of the same patients make no narrower interval"


def test_two_rounds_within_noise_stop_until_as_many_labels_came_as_these_had() -> None:
    for labels, stop in ((0, "no gain"), (19, "no gain"), (20, None)):
        found = outlook([], FLAT, labels, enough_dice=0.95)
        assert (found.stop, found.labels_wanted) == (stop, 20)
    assert [(g.first, g.last) for g in found.gains] == [(1, 2), (2, 3), (1, 3)]


@pytest.mark.parametrize(
    "rises",
    [
        (0.0, 0.0, 0.05),  # the last one gained
        (0.0, 0.05, 0.05),  # the one before did
        (0.0, 0.006, 0.012),  # each within noise, and both together are not
    ],
)
def test_a_gain_in_either_of_two_rounds_or_in_both_together_goes_on(rises: tuple[float, ...]) -> None:
    shared = np.random.default_rng(7).normal(0, 0.05, 30)

    def of(number: int, rise: float) -> CheckedRound:
        noise = np.random.default_rng(number).normal(0, 0.02, 30)
        noise -= noise.mean()
        dice = 0.8 + shared + rise + noise
        return CheckedRound(number=number, labelled=10 * number, validation=masks(dice.tolist()))

    found = outlook([], [of(i + 1, rise) for i, rise in enumerate(rises)], 0, enough_dice=0.95)
    assert (found.stop, len(found.gains)) == (None, 3)
    if max(rises) < 0.05:
        assert [g.is_noise for g in found.gains] == [True, True, False]


def test_a_loss_is_no_gain() -> None:
    found = outlook([], [a_round(1, 10, 0.0), a_round(2, 20, -0.05), a_round(3, 30, -0.1)], 0, enough_dice=0.95)
    assert found.stop == "no gain"


@pytest.mark.parametrize(
    "rounds",
    [
        FLAT[:2],
        [a_round(i, 10 * i, 0.0, patients=MIN_PATIENTS - 1) for i in (1, 2, 3)],
        [a_round(1, 10, 0.0), a_round(2, 10, 0.0), a_round(3, 10, 0.0)],  # the same labels again: a training's noise
        [CheckedRound(number=i, labelled=10 * i, validation=()) for i in (1, 2, 3)],
        [*FLAT[:2], CheckedRound(number=3, labelled=30, validation=masks([0.8] * 12, scans_each=2)[12:])],
    ],
    ids=["two rounds", "too few patients", "no new labels", "no validation", "other scans"],
)
def test_where_nobody_can_tell_rounds_go_on(rounds: list[CheckedRound]) -> None:
    found = outlook([], rounds, 0, enough_dice=0.95)
    assert (found.stop, found.gains) == (None, ())
    assert outlook_sentence(found).startswith("Nobody can tell yet")


def test_rounds_without_new_labels_are_passed_over() -> None:
    again = a_round(4, 30, 0.1)  # the labels of round 3, and luck
    found = outlook([], [*FLAT, again], 0, enough_dice=0.95)
    assert [(g.first, g.last) for g in found.gains] == [(1, 2), (2, 4), (1, 4)]


def test_a_gain_is_of_the_scans_that_both_rounds_measured_and_the_same_every_time() -> None:
    first = CheckedRound(number=1, labelled=10, validation=masks([0.5] * 10))
    last = CheckedRound(number=2, labelled=20, validation=(*masks([0.6] * 10), *masks([0.0], scans_each=9)[1:]))
    found = gain(first, last)
    assert found is not None
    assert (found.rise.patients, round(found.rise.value, 6), found.is_noise) == (10, 0.1, False)
    assert gain(first, last) == found


@pytest.mark.parametrize(
    ("served", "rounds", "labels", "words"),
    [
        (masks([0.97] * 9), [], 0, ["not needed", "9 patients", "mean true Dice of 0.970", "0.95 is enough"]),
        (masks([0.9] * 9), [], 0, ["may be worth it", "0.900"]),
        ((), FLAT, 3, ["before 20 new labels", "(3 have)", "12 validation patients", "round 2 to 3", "within noise"]),
        ((), FLAT, 20, ["worth a try", "20 new labels"]),
        ((), [*FLAT[:2], a_round(3, 30, 0.1)], 0, ["may be worth it", "from round 1 to 2", "+0.1"]),
        (masks([0.9] * 3), [], 0, ["Nobody can tell", "3 of 9 patients are audited", "0 of 3 rounds", "on 0 of 9"]),
        ((), FLAT[:2], 0, ["0 of 9 patients are audited", "2 of 3 rounds", "on 9 of 9 validation patients"]),
    ],
)
def test_the_answer_is_one_sentence_with_the_numbers(
    served: tuple[MaskDice, ...], rounds: list[CheckedRound], labels: int, words: list[str]
) -> None:
    sentence = outlook_sentence(outlook(served, rounds, labels, enough_dice=0.95))
    assert sentence.endswith(".")
    assert [word for word in words if word not in sentence] == []
