"""The drift alarm: an exact test on exchangeable residuals, and what an alarm does in a folder."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pytest
from crepes.martingales import SimpleJumper, semi_online_p_values

from segqc.quality.drift import JUMP, bets, drift_sentence, drift_test, martingale, p_values, to_json
from segqc.types import DriftAlarm

ALARM = DriftAlarm(dt.datetime(2026, 11, 30, 12, tzinfo=dt.UTC), ("liver", "spleen"), 12)


class Bets:
    """Our bets as crepes takes betting functions."""

    def apply(self, p: np.ndarray) -> np.ndarray:
        return bets(p)


@pytest.mark.parametrize("decimals", [9, 1])  # with few decimals there are many ties
def test_p_values_and_martingale_are_those_of_crepes(decimals: int) -> None:
    scores = np.abs(np.random.default_rng(0).laplace(size=80)).round(decimals)
    np.random.seed(3)
    smoothing = np.random.rand(80)
    expected = semi_online_p_values(scores, seed=3)
    found = p_values(scores[:30], scores[30:], smoothing[30:])
    assert found == pytest.approx(expected[30:], abs=1e-12)
    assert martingale(found) == pytest.approx(SimpleJumper(J=JUMP, bf=Bets()).apply(found), rel=1e-12)


def test_no_bet_has_a_mean_over_1() -> None:
    middles = (np.arange(1_000_000) + 0.5) / 1_000_000
    assert bets(middles).mean(axis=0) == pytest.approx([1, 1, 1], abs=1e-3)
    assert (np.diff(bets(middles[::1000]), axis=0) <= 0).all(), "large p-values never win"


def laplace(generator: np.random.Generator, scales: np.ndarray) -> np.ndarray:
    return np.abs(generator.laplace(size=scales.size)) * scales


def alarms(
    level: float, shift: float, start: int, *, calibrating: int = 20, audited: int = 60, runs: int = 400
) -> list[int]:
    """At how many audits after the start each of many streams raises the alarm; those that do."""
    scales = np.where(np.arange(audited) < start, 1.0, shift)
    found = []
    for run in range(runs):
        generator = np.random.default_rng([run, start, 1])  # not the numbers of the seed [run]
        known = laplace(generator, np.ones(calibrating))
        test = drift_test(known, laplace(generator, scales), level=level, seed=[run])
        if test.alarm is not None:
            found.append(test.alarm - start)
    return found


@pytest.mark.parametrize("level", [0.01, 0.05])
@pytest.mark.parametrize("calibrating", [0, 9, 40])
def test_false_alarms_are_as_rare_as_the_level_says(level: float, calibrating: int) -> None:
    share = len(alarms(level, 1.0, 0, calibrating=calibrating, audited=100)) / 400
    assert share <= level + 2 * np.sqrt(level * (1 - level) / 400)


def test_errors_five_times_as_large_are_noticed_within_twenty_audits() -> None:
    found = alarms(0.05, 5.0, 0)
    assert sum(after <= 20 for after in found) >= 0.85 * 400
    assert np.median(found) <= 10


def test_a_drift_that_begins_after_many_quiet_audits_is_noticed() -> None:
    found = alarms(0.05, 5.0, 60, calibrating=30, audited=100)
    assert sum(0 < after <= 20 for after in found) >= 0.85 * 400


def test_smaller_errors_are_no_drift() -> None:
    assert alarms(0.1, 0.3, 0) == []


def test_what_was_tested_stays_what_it_was_when_more_audits_come() -> None:
    generator = np.random.default_rng(5)
    known, stream = laplace(generator, np.ones(20)), laplace(generator, np.full(40, 6.0))
    whole = drift_test(known, stream, level=0.01, seed=[1])
    assert whole.alarm is not None
    before = drift_test(known, stream[: whole.alarm - 1], level=0.01, seed=[1])
    assert (before.alarm, before.audited) == (None, whole.alarm - 1)
    assert before.evidence < before.threshold == 100
    assert drift_test(known, stream[: whole.alarm], level=0.01, seed=[1]).alarm == whole.alarm


def test_without_audits_nothing_is_said_and_with_level_0_no_alarm_is_raised() -> None:
    known = np.ones(20)
    none = drift_test(known, np.zeros(0), level=0.01, seed=[1])
    assert (none.audited, none.evidence, none.alarm) == (0, 1.0, None)
    assert drift_test(known, np.full(60, 9.0), level=0.0, seed=[1]).alarm is None
    assert drift_test(known, np.full(60, 9.0), level=0.01, seed=[1]).alarm is not None


def test_an_alarm_is_one_sentence() -> None:
    assert drift_sentence(ALARM) == (
        "Do not rely on the estimated Dice; drift alarm since 30 November 2026: on 12 patients drawn at random and "
        "corrected, it was off by more than its calibration knows (liver, spleen); the order of the scans stays as it "
        "is."
    )
    assert to_json(ALARM) == {
        "began_at": "2026-11-30T12:00:00Z", "structures": ["liver", "spleen"], "patients": 12,
        "message": drift_sentence(ALARM),
    }  # fmt: skip
