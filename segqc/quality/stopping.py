"""Are more rounds worth it? Stopping rules for active learning, as pure functions.

Two findings end rounds that begin by themselves:

* The masks are good enough: on audit draws, which are uniform at random among the scans that waited, the mean true Dice
  of the masks that serve is at least what is wanted, by the lower end of its interval.
* The last rounds gained nothing: on the same validation scans, the masks' Dice rose by no more than noise in each of
  the last two rounds that had more labels than the round before, and in both together, where steady small gains show
  up first. This holds until as many new labels came as these two rounds had: fewer can hardly show a gain, either. So
  rounds that gain nothing become rarer, and never stop for good.

Both need a number of patients, the unit of all intervals; below it, nobody can tell, and rounds go on. The validation
scans also chose the epoch at which each training ended, so that both sides of a gain are a little too good alike.

Bloodgood & Vijay-Shanker (CoNLL 2009) stop where predictions no longer change; the rules here ask for the quality
itself, which audits and validation scans measure.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

import numpy as np

from segqc.quality.estimation import ConfidenceInterval, patient_index, percentile_interval, with_resamples
from segqc.quality.intervals import patients_needed
from segqc.types import MaskDice

StopReason: TypeAlias = Literal["good enough", "no gain"]

MIN_PATIENTS: Final = patients_needed()
LEVEL: Final = 0.9
"""Of the two-sided intervals: their lower end is wrong one time in twenty."""
_DRAWS: Final = 2000
_NOTABLE: Final = 0.05  # of a Dice: so much lower is worth a word, on however few patients
_ROUNDS: Final = 3  # that two gains lie between


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRound:
    """A finished round.

    Attributes:
        number: its number.
        labelled: how many scans had a final label when it began.
        validation: the Dice of its masks of the validation scans.
    """

    number: int
    labelled: int
    validation: tuple[MaskDice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A mean over scans with its bootstrap interval by patients."""

    patients: int
    interval: ConfidenceInterval

    @property
    def value(self) -> float:
        """The mean itself."""
        return self.interval.value or 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What the Dice of the masks of the same validation scans rose by, between two rounds."""

    first: int  # the earlier round
    last: int
    rise: Mean

    @property
    def is_noise(self) -> bool:
        """Whether there may be no gain at all: the interval does not lie above zero."""
        return self.rise.interval.low is None or self.rise.interval.low <= 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """Whether more rounds are worth it.

    Attributes:
        stop: why not; None where they are, or nobody can tell.
        audits: the true Dice of the masks that serve, on audit draws; None where they are of too few patients.
        audited: how many patients they are of.
        enough_dice: what `audits` has to reach.
        gains: of the last round and the one before it, and last of both together; empty where they can't be measured.
        labels_wanted: how many new labels it takes until rounds that gained nothing are tried again; 0 without a stop.
        labels: how many have come.
        compared: the last rounds that each had more labels than the one before; gains take three.
        validating: the patients of the validation scans that all of these measured.
    """

    stop: StopReason | None
    audits: Mean | None
    audited: int
    enough_dice: float
    gains: tuple[Gain, ...]
    labels_wanted: int
    labels: int
    compared: int = 0
    validating: int = 0


def outlook(
    served: Sequence[MaskDice], rounds: Sequence[CheckedRound], labels: int, *, enough_dice: float, seed: int = 0
) -> Outlook:
    """Say whether more rounds are worth it.

    Args:
        served: the true Dice of masks that serve, of scans that were audit draws.
        rounds: all finished rounds, oldest first.
        labels: how many scans have a final label that no round has trained on.
        enough_dice: the mean true Dice that is good enough, from 0 to 1.
        seed: of the bootstrap draws.
    """
    audited = len({mask.patient for mask in served})
    audits = mean_dice(served, seed=seed) if audited >= MIN_PATIENTS else None
    compared = _with_more_labels(rounds)
    gains = _gains(compared, seed)
    wanted = compared[-1].labelled - compared[0].labelled if gains and all(g.is_noise for g in gains) else 0
    stop: StopReason | None = None
    if audits is not None and audits.interval.low is not None and audits.interval.low >= enough_dice:
        stop = "good enough"
    elif labels < wanted:
        stop = "no gain"
    return Outlook(
        stop=stop,
        audits=audits,
        audited=audited,
        enough_dice=enough_dice,
        gains=gains,
        labels_wanted=wanted,
        labels=labels,
        compared=len(compared),
        validating=_validating(compared),
    )


def _with_more_labels(rounds: Sequence[CheckedRound]) -> list[CheckedRound]:
    """The last rounds that each had more labels than the one before: others show the noise of a training only."""
    chosen: list[CheckedRound] = []
    for checked in reversed(rounds):
        if checked.validation and (not chosen or checked.labelled < chosen[-1].labelled):
            chosen.append(checked)
    return chosen[:_ROUNDS][::-1]


def _validating(rounds: Sequence[CheckedRound]) -> int:
    """How many patients all of these rounds were measured on."""
    found = [{(mask.patient, mask.scan) for mask in checked.validation} for checked in rounds]
    return len({patient for patient, _ in set.intersection(*found)}) if found else 0


def _gains(rounds: Sequence[CheckedRound], seed: int) -> tuple[Gain, ...]:
    """The gains of two rounds, and of both together; empty where there are too few rounds or patients."""
    if len(rounds) < _ROUNDS:
        return ()
    pairs = [*itertools.pairwise(rounds), (rounds[0], rounds[-1])]
    found = [gain(first, last, seed=seed) for first, last in pairs]
    return tuple(g for g in found if g is not None) if all(found) else ()


def gain(first: CheckedRound, last: CheckedRound, *, seed: int = 0) -> Gain | None:
    """What the masks' Dice rose by between two rounds, on the scans that both were measured on.

    None under `MIN_PATIENTS` patients.
    """
    rise = paired_rise(first.validation, last.validation, seed=seed)
    return None if rise is None else Gain(first=first.number, last=last.number, rise=rise)


def paired_rise(before: Sequence[MaskDice], after: Sequence[MaskDice], *, seed: int = 0) -> Mean | None:
    """What the Dice of masks rose by, on the scans that are in both; None under `MIN_PATIENTS` patients.

    Args:
        before: the masks of one network.
        after: those of another one.
        seed: of the bootstrap draws.
    """
    rises = [replace(mask, dice=mask.dice - earlier) for earlier, mask in _pairs(before, after)]
    return mean_dice(rises, seed=seed) if len({mask.patient for mask in rises}) >= MIN_PATIENTS else None


def _pairs(before: Sequence[MaskDice], after: Sequence[MaskDice]) -> list[tuple[float, MaskDice]]:
    """The later masks of the scans that are in both, each with the Dice of the earlier one."""
    earlier = {(mask.patient, mask.scan): mask.dice for mask in before}
    return [(earlier[key], mask) for mask in after if (key := (mask.patient, mask.scan)) in earlier]


def worse_masks(new: Sequence[MaskDice], served: Sequence[MaskDice], *, tolerated: float = 0.0) -> str | None:
    """Why new masks are worse than those that serve; None where they are not, or nobody can tell.

    Args:
        new: the new network's masks of the validation scans.
        served: those of the network that serves.
        tolerated: by how much the mean Dice may have fallen; counted is the upper end of the fall's interval.
    """
    rise = paired_rise(served, new)
    if rise is None or rise.interval.high is None or rise.interval.high >= -tolerated:
        return None
    low, high = -rise.interval.high, -(rise.interval.low or 0.0)
    return (
        f"on {rise.patients} validation patients that both were checked on, the mean Dice of its masks is lower by "
        f"{-rise.value:.3f} ({low:.3f} to {high:.3f}) than that of the serving bundle's"
    )


def fall_of_few(new: Sequence[MaskDice], served: Sequence[MaskDice]) -> str | None:
    """A sentence where new masks seem worse, but on too few patients to tell; None otherwise.

    Args:
        new: the new network's masks of the validation scans.
        served: those of the network that serves.
    """
    pairs = _pairs(served, new)
    patients = len({mask.patient for _, mask in pairs})
    if not pairs or patients >= MIN_PATIENTS:
        return None
    then, now = float(np.mean([old for old, _ in pairs])), float(np.mean([mask.dice for _, mask in pairs]))
    if now > then - _NOTABLE:
        return None
    on = "1 validation patient" if patients == 1 else f"{patients} validation patients"
    return f"the masks' mean Dice fell from {then:.3f} to {now:.3f} on {on}, too few to hold the new bundle for it"


def mean_dice(masks: Sequence[MaskDice], *, seed: int = 0) -> Mean:
    """The mean over masks, with a percentile bootstrap interval at `LEVEL`: patients are drawn, with all their scans.

    Args:
        masks: one or more.
        seed: of the draws.

    Example:
        >>> masks = [MaskDice(patient=name, scan=name, dice=dice) for name, dice in [("a", 0.8), ("b", 0.9)]]
        >>> found = mean_dice(masks)
        >>> round(found.value, 3), found.interval.low, found.interval.high
        (0.85, 0.8, 0.9)
    """
    return _mean(tuple(masks), seed)


@functools.lru_cache(maxsize=16)  # clients ask for `/info/` every few seconds
def _mean(masks: tuple[MaskDice, ...], seed: int) -> Mean:
    index, count = patient_index([mask.patient for mask in masks])
    sums = np.bincount(index, [mask.dice for mask in masks], count)
    scans = np.bincount(index, minlength=count)
    weights = with_resamples(count, _DRAWS, np.random.default_rng(seed))
    means = (weights @ sums) / (weights @ scans)
    return Mean(patients=count, interval=percentile_interval(means[0], means[1:], LEVEL))


# ---------------------------------------------------------------------------------------------------------------- words


def outlook_sentence(found: Outlook) -> str:
    """Whether more rounds are worth it, with the numbers, in one sentence for operators."""
    if found.stop == "good enough" and found.audits is not None:
        return (
            f"More rounds are not needed: {_on_audits(found.audits)}, at least {_end(found.audits.interval.low)}, and "
            f"{found.enough_dice:g} is enough (the setting enough_dice)."
        )
    if found.gains:
        counts, told = {g.rise.patients for g in found.gains}, ", ".join(map(_rise, found.gains))
        patients = f"{min(counts)}{' or more' if len(counts) > 1 else ''}"
        measured = f"on {patients} validation patients the masks' Dice changed by {told}"
        if found.stop == "no gain":
            return (
                f"More rounds are hardly worth it before {found.labels_wanted} new labels have come ({found.labels} "
                f"have): {measured}, all within noise."
            )
        if found.labels_wanted:
            return f"Another round is worth a try, with {found.labels} new labels: {measured}, all within noise."
        return f"Another round may be worth it: {measured}."
    if found.audits is not None:
        return (
            f"Another round may be worth it: {_on_audits(found.audits)}, or only {_end(found.audits.interval.low)}; "
            f"{found.enough_dice:g} is enough."
        )
    return (
        f"Nobody can tell yet whether more rounds are worth it: masks of {found.audited} of {MIN_PATIENTS} patients "
        f"are audited (each segmentation network begins with none), and {found.compared} of {_ROUNDS} rounds with more "
        f"labels each are measured, on {min(found.validating, MIN_PATIENTS)} of {MIN_PATIENTS} validation patients."
    )


def _on_audits(audits: Mean) -> str:
    return (
        f"on {audits.patients} patients drawn at random and corrected, the masks that serve had a mean true Dice of "
        f"{audits.value:.3f}"
    )


def _rise(found: Gain) -> str:
    low, high = found.rise.interval.low or 0.0, found.rise.interval.high or 0.0
    return f"{found.rise.value:+.3f} ({low:+.3f} to {high:+.3f}) from round {found.first} to {found.last}"


def _end(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
