"""Which masks are accepted as pseudo-labels: by the lower end of their estimated Dice's interval, best first.

A pseudo-label is a mask that trains a segmentation network as if a person had made it (self-training: Lee,
"Pseudo-label", ICML workshop 2013). The choice is a pure function of estimates; who keeps the masks is
`segqc.loop.pseudo_labels`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import numpy as np

from segqc.quality.estimation import most_bad_share
from segqc.split import Split
from segqc.types import Assessment, PredictionInterval

PseudoLabelMode: TypeAlias = Literal["off", "threshold", "top", "full"]
Refusal: TypeAlias = Literal[
    "its patient validates",
    "it has no estimate by the serving bundle",
    "its mask is not the serving network's",
    "its mask lacks a structure",
    "its estimate has no interval",
    "it is unlike the training scans",
    "its estimate is below the rule",
    "there are better ones up to the cap",
]
BOUND_LEVEL: Final = 0.95  # of the one-sided bound on the share of bad pseudo-labels
_ROUNDING: Final = 1e-9  # 0.1 * 30 is a little more than 3


@dataclass(frozen=True, slots=True)
class PseudoLabelRules:
    """Which masks are accepted, and how they train; the table ``[pseudo_labels]`` of the settings.

    Attributes:
        mode: "off"; "threshold", where the lower end of the estimated Dice's interval is at least ``min_dice``; "top",
            the ``top_share`` of the eligible scans that have the best lower ends, but for those whose estimated Dice
            itself is below ``min_dice``; "full", all eligible scans.
        min_dice: the threshold; a mask whose true Dice is below it is a bad pseudo-label, in every mode.
        top_share: see ``mode``.
        cap: at most so many times the number of labelled scans that train are accepted, in every mode.
        max_error: voxels with a higher error probability are left out of the loss.
        audit_share: probability that an accepted scan goes to a person as an audit.
        seed: of the draws of audits.
    """

    mode: PseudoLabelMode = "off"
    min_dice: float = 0.75
    top_share: float = 0.5
    cap: float = 1.5
    max_error: float = 0.5
    audit_share: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what can't be meant.

        Raises:
            ValueError: if a number is out of its bounds.
        """
        for name in ("min_dice", "top_share", "max_error", "audit_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1")
        if not 0 <= self.cap <= 1000:
            raise ValueError("cap must be from 0 to 1000 times the number of labelled scans")
        if self.seed < 0:
            raise ValueError("seed must be 0 or more")

    def __str__(self) -> str:
        match self.mode:
            case "off":
                return "none"
            case "threshold":
                return f"lower end of the estimated Dice's interval at least {self.min_dice:g}"
            case "top":
                best = f"best {self.top_share:.0%} of the eligible scans by the lower end of the interval"
                return f"{best}, estimated Dice at least {self.min_dice:g}"
            case "full":
                return "all eligible scans"

    def is_audited(self, scan: int) -> bool:
        """Whether a scan, by its number, goes to a person should it be accepted; drawn once for each scan."""
        return bool(np.random.default_rng((self.seed, scan)).random() < self.audit_share)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scan that waits for a person's label.

    Attributes:
        scan: its name.
        split: what its patient is for.
        is_whole: whether mask or estimate show each structure: of one that both miss there is no interval.
        is_served: whether the network that serves made its mask, and the bundle that serves assessed it so.
        dice: the estimated Dice of the worst structure; None without an estimate.
        interval: the interval of the estimated Dice with the least lower end, see `weakest_interval`.
    """

    scan: str
    split: Split
    is_whole: bool = True
    is_served: bool = True
    dice: float | None = None
    interval: PredictionInterval | None = None


@dataclass(frozen=True, slots=True)
class AcceptedScan:
    """A scan whose mask is accepted: the estimated Dice, and the lower end of its interval at ``level``."""

    scan: str
    dice: float
    low: float
    level: float


@dataclass(frozen=True, slots=True)
class PseudoLabelChoice:
    """The accepted scans, best first, and why the others are not, by the scan's name."""

    accepted: tuple[AcceptedScan, ...] = ()
    refused: Mapping[str, Refusal] = field(default_factory=dict)


def weakest_interval(assessment: Assessment) -> PredictionInterval | None:
    """The Dice interval with the least lower end over the structures that are present; None if one has none.

    The worst structure by its estimate may have the narrower interval: a mask is trusted for all it holds.
    """
    intervals = [quality.intervals.dice for quality in assessment.structures if quality.present]
    known = [interval for interval in intervals if interval is not None]
    return min(known, key=lambda interval: interval.low) if known and len(known) == len(intervals) else None


def choose_pseudo_labels(
    candidates: Sequence[Candidate], rules: PseudoLabelRules, *, supervised: int
) -> PseudoLabelChoice:
    """Choose the scans whose masks are accepted, by the lower ends of their intervals; ties go by name.

    Eligible are scans of training patients whose served mask shows each structure and has an estimate with an interval
    that applies.

    Args:
        candidates: the scans that wait for a person's label.
        rules: the settings.
        supervised: the number of labelled scans that train; the cap is relative to it.

    Example:
        >>> sure, unsure = PredictionInterval(0.85, 0.95, 0.9), PredictionInterval(0.6, 1.0, 0.9)
        >>> found = {"a": unsure, "b": sure}
        >>> scans = [Candidate(name, "train", dice=0.9, interval=interval) for name, interval in found.items()]
        >>> choice = choose_pseudo_labels(scans, PseudoLabelRules(mode="threshold"), supervised=4)
        >>> [accepted.scan for accepted in choice.accepted], dict(choice.refused)
        (['b'], {'a': 'its estimate is below the rule'})
    """
    if rules.mode == "off":
        return PseudoLabelChoice()
    eligible: list[AcceptedScan] = []
    refused: dict[str, Refusal] = {}
    for candidate in candidates:
        reason = _ineligible(candidate)
        if reason is not None:
            refused[candidate.scan] = reason
        elif candidate.dice is not None and candidate.interval is not None:
            interval = candidate.interval
            eligible.append(AcceptedScan(candidate.scan, candidate.dice, interval.low, interval.level))
    eligible.sort(key=lambda scan: (-scan.low, scan.scan))
    good = eligible
    if rules.mode == "threshold":
        good = [scan for scan in eligible if scan.low >= rules.min_dice]
    elif rules.mode == "top":
        best = eligible[: math.floor(rules.top_share * len(eligible) + _ROUNDING)]
        good = [scan for scan in best if scan.dice >= rules.min_dice]
    accepted = good[: math.floor(rules.cap * supervised + _ROUNDING)]
    names = {scan.scan for scan in good}
    refused |= {scan.scan: "its estimate is below the rule" for scan in eligible if scan.scan not in names}
    refused |= {scan.scan: "there are better ones up to the cap" for scan in good[len(accepted) :]}
    return PseudoLabelChoice(tuple(accepted), refused)


def _ineligible(candidate: Candidate) -> Refusal | None:
    if candidate.split == "validation":
        return "its patient validates"
    if candidate.dice is None:
        return "it has no estimate by the serving bundle"
    if not candidate.is_served:
        return "its mask is not the serving network's"
    if not candidate.is_whole:
        return "its mask lacks a structure"
    if candidate.interval is None:
        return "its estimate has no interval"
    return None if candidate.interval.applies else "it is unlike the training scans"


@dataclass(frozen=True, slots=True)
class AuditBound:
    """What audits say of accepted masks: ``bad`` of ``audited`` were bad, so that at most ``bound`` of all are.

    The bound is one-sided, at `BOUND_LEVEL`; 1 without an audit.
    """

    audited: int
    bad: int
    bound: float


def bound_in_words(said: AuditBound) -> str:
    """What audits say, as a sentence.

    Example:
        >>> bound_in_words(AuditBound(20, 0, 0.1391))
        '0 of 20 audited were bad; with 95% confidence at most 14% of all are'
    """
    if not said.audited:
        return "none is corrected yet, and nothing is known of the share of bad ones"
    return (
        f"{said.bad} of {said.audited} audited were bad; with {BOUND_LEVEL:.0%} confidence at most {said.bound:.0%} of "
        "all are"
    )


def audit_bound(true_dice: Sequence[float], min_dice: float, *, level: float = BOUND_LEVEL) -> AuditBound:
    """The one-sided upper bound on the share of bad pseudo-labels; see `most_bad_share`.

    Args:
        true_dice: of the worst structure of each audited mask, against its correction. Audits must be drawn at random
            among the accepted; several scans of one patient are no independent draws, and the bound is then too low.
        min_dice: a mask with less is bad.
        level: the confidence.

    Raises:
        ValueError: if the level is not between 0 and 1.

    Example:
        >>> none_bad = audit_bound([0.9] * 20, 0.75)
        >>> none_bad.bad, round(none_bad.bound, 3)  # 1 - 0.05 ** (1 / 20)
        (0, 0.139)
    """
    audited, bad = len(true_dice), sum(dice < min_dice for dice in true_dice)
    return AuditBound(audited, bad, most_bad_share(bad, audited, level))
