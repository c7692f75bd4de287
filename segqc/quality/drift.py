"""Drift: are the errors of the estimated Dice still those that its calibration knows?

Audit draws are patients drawn at random, with an estimate that was shown and a correction that says what was true.
While these patients are like the calibrating ones, their residuals, over their scale, are exchangeable with the
calibrating residuals: no order of all of them is likelier than another. A conformal test martingale bets against that.

* The calibrating residuals come first, one of each patient, then the audited ones in the order of their corrections.
  The patient is the unit: of a calibrating patient with several masks one is drawn, of an audited one the first audited
  scan counts (Dunn, Wasserman & Ramdas, JASA 118, 2023: "subsampling once"). Scans of one patient resemble each other;
  counted as if they were independent, two bad patients would look like a drift.
* Each audited residual has a smoothed p-value: the share of the residuals before it that are larger, ties and the
  residual itself with a random part of their weight. Under exchangeability these are independent and uniform on [0, 1],
  whatever the distribution of the residuals (Vovk, Nouretdinov & Gammerman, "Testing exchangeability on-line", ICML
  2003; Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random World", 2nd ed., Springer 2022).
* A capital of 1 bets on small p-values: it is multiplied by a function of each p-value whose mean over [0, 1] is 1. The
  capital is then a martingale, and the probability that it ever reaches 1 / level is at most the level (Ville's
  inequality), however often somebody looks.
* The bets are mixed as by the *simple jumper* (algorithm 8.1 of the same book, here with other bets): the capital lies
  in equal parts on three functions, and after each step a hundredth of it is spread over them evenly. One does not bet
  at all, so that a long quiet time costs little and a drift that begins late is found. Mixtures of martingales are
  martingales.

All functions bet on small p-values only, on errors that have become *larger*: smaller ones are no reason for an alarm.
The calibrating residuals may be of fold networks, and the audited ones of all of them together, which should err rather
less; then nothing is proven, as with the intervals, but less error only makes an alarm rarer.

Each audited residual joins those that the next ones are compared with, which the proof needs. So a drift has to be
shown by its first few dozen patients; later, it is what is usual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import JsonValue, TypeAdapter

from segqc.quality.metrics import Values
from segqc.types import DriftAlarm

JUMP = 0.01
"""The share of the capital that is spread over all bets after each step."""
_POWER = 0.5
_SLOPE = 1.9  # at most 2: a factor is never negative
_ALARMS = TypeAdapter(DriftAlarm)


@dataclass(frozen=True, slots=True)
class DriftTest:
    """What audited residuals of one structure say.

    Attributes:
        calibrating: patients whose residuals calibrate.
        audited: audited patients.
        evidence: the highest capital so far, at least 1: how much the audited errors speak for a drift.
        threshold: the capital that is an alarm.
        alarm: the number of audited patients at which it was reached; None where it was not.
    """

    calibrating: int
    audited: int
    evidence: float
    threshold: float
    alarm: int | None


def drift_test(calibrating: Values, audited: Values, *, level: float, seed: Sequence[int]) -> DriftTest:
    """Test whether audited residuals are larger than exchangeable ones would be.

    Args:
        calibrating: the residuals that calibrate, one of each patient, over their scale.
        audited: the audited ones, likewise, in the order of their corrections.
        level: the probability of a false alarm over the whole stream; with 0 there is never an alarm.
        seed: of the random part of the p-values. With the same seed, what a stream begins with stays what it was.
    """
    smoothing = 1.0 - np.random.default_rng(seed).random(len(audited))  # over 0, as is every p-value then
    capital = martingale(p_values(calibrating, audited, smoothing))
    threshold = 1 / level if level > 0 else np.inf
    reached = np.flatnonzero(capital >= threshold)
    return DriftTest(
        calibrating=len(calibrating),
        audited=len(audited),
        evidence=float(capital.max(initial=1.0)),
        threshold=float(threshold),
        alarm=int(reached[0]) + 1 if reached.size else None,
    )


def p_values(calibrating: Values, audited: Values, smoothing: Values) -> Values:
    """The smoothed conformal p-value of each audited residual among those before it, small where it is large.

    Args:
        calibrating: residuals, an array.
        audited: residuals in their order, an array.
        smoothing: the part of ties that counts as larger, from 0 to 1, one for each audited residual.

    Example:
        >>> p_values(np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.15]), np.array([0.5, 0.5]))
        array([0.125, 0.7  ])
    """
    scores = np.concatenate([calibrating, audited])
    found = np.empty(len(audited), np.float64)
    for i, (score, part) in enumerate(zip(audited, smoothing, strict=True)):
        before = scores[: len(calibrating) + i]
        ties = 1 + np.count_nonzero(before == score)
        found[i] = (np.count_nonzero(before > score) + part * ties) / (before.size + 1)
    return found


def bets(p: Values) -> Values:
    """What each bet multiplies its capital by, (p-values, bets): each has a mean of 1 over [0, 1]."""
    return np.stack([np.ones_like(p), _POWER * p ** (_POWER - 1), 1 + _SLOPE * (0.5 - p)], axis=1)


def martingale(p: Values) -> Values:
    """The capital after each p-value, see this module's first lines."""
    factors = bets(p)
    parts = np.full(factors.shape[1], 1 / factors.shape[1])
    capital = np.empty(len(p), np.float64)
    for i, factor in enumerate(factors):
        parts = parts * factor
        capital[i] = parts.sum()
        parts = (1 - JUMP) * parts + JUMP * capital[i] / parts.size
    return capital


def drift_sentence(alarm: DriftAlarm) -> str:
    """What an alarm means, for annotators and operators."""
    patients = "1 patient" if alarm.patients == 1 else f"{alarm.patients} patients"
    return (
        f"Do not rely on the estimated Dice; drift alarm since {alarm.began_at:%d %B %Y}: on {patients} drawn at "
        f"random and corrected, it was off by more than its calibration knows ({', '.join(alarm.structures)}); the "
        "order of the scans stays as it is."
    )


def to_json(alarm: DriftAlarm) -> dict[str, JsonValue]:
    """The alarm as clients see it."""
    body: dict[str, JsonValue] = _ALARMS.dump_python(alarm, mode="json")
    return {**body, "message": drift_sentence(alarm)}
