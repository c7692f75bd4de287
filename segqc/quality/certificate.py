"""How many labels of a data set are good? A lower bound from random audits of those that nobody has corrected.

The statement is about the labels of one data set, which are what they are: chance is in the audit draws alone. So it
holds whatever patients the scans are of, and however alike the scans of one patient are; it says nothing of others.

An audit takes, of all masks that wait at that time, each with the same probability. In between, masks leave: they are
corrected in an order that may depend on anything, such as an estimate of their quality. What the audits saw is
therefore no sample of the masks that are left at the end. But each bad mask that is left waited at the time of every
draw before, and those that were corrected since are known: with R bad masks left, a draw among n masks, of which k
turned out to be bad since, met a bad one with a probability of at least (R + k) / n. The upper bound of Clopper &
Pearson (Biometrika 26, 1934), the largest mean probability that so few bad draws do not contradict, bounds R. These
probabilities differ from draw to draw; that makes few bad ones no likelier than equal probabilities of the same mean
would (Hoeffding, Annals of Mathematical Statistics 27, 1956). As fewer masks wait after each audit, the bound is nearly
the hypergeometric one where nothing but audits happens.

The bound is for one look. Whoever audits until it is reached should know that looking often makes it a little too good.
"""

from __future__ import annotations

import bisect
import datetime as dt
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from segqc.quality.estimation import most_bad_share
from segqc.quality.metrics import Values

LEVEL: Final = 0.95
"""Of the one-sided bound."""
_ROUNDING: Final = 1e-9  # 0.05 * 20 is a little more than 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedMask:
    """A mask that audits could draw at some time.

    Attributes:
        made_at: when it began to wait.
        left_at: when it was last there to be drawn; None while it is.
        drawn_at: when it was drawn at random; None where it never was.
        is_good: whether it is; None where nobody knows. A drawn one of which nobody knows counts as bad.
        is_judged: whether it is a label of the data set that nobody has corrected, and that the audits speak of.
    """

    made_at: dt.datetime
    left_at: dt.datetime | None = None
    drawn_at: dt.datetime | None = None
    is_good: bool | None = None
    is_judged: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What can be said of the labels of a data set, or of a group of them.

    Attributes:
        labels: how many there are.
        corrected: of these, those that a person has wholly made or corrected: they count as good.
        judged: those that nobody has corrected, and that audits speak of.
        audits: masks that were drawn at random.
        bad: of the audits.
        bad_left: of `judged`, how many are bad at most.
        at_least: the share of the labels that are good at least, from 0 to 1; None without a label.
        missing: how many more audits without a bad one would allow to say that the wanted share is; 0 where it can be
            said now, None where no number of audits would do.
    """

    labels: int
    corrected: int
    judged: int
    audits: int
    bad: int
    bad_left: int
    at_least: float | None
    missing: int | None

    @property
    def unknown(self) -> int:
        """How many labels nothing speaks for: they count as bad."""
        return self.labels - self.corrected - self.judged


def certify(
    labels: int, corrected: int, masks: Sequence[AuditedMask], *, share: float, level: float = LEVEL
) -> Certificate:
    """Bound the share of good labels from below.

    Args:
        labels: how many labels there are.
        corrected: how many of these a person has wholly made or corrected.
        masks: every mask that audits could draw at some time, those that left included.
        share: what one would like to say, from 0 to 1.
        level: of the one-sided bound.

    Raises:
        ValueError: if the level does not lie between 0 and 1.

    Example:
        >>> monday, tuesday = dt.datetime(2026, 1, 5), dt.datetime(2026, 1, 6)
        >>> waiting = [AuditedMask(made_at=monday, is_judged=True)] * 60
        >>> audited = [AuditedMask(made_at=monday, left_at=tuesday, drawn_at=tuesday, is_good=True)] * 20
        >>> found = certify(80, 20, waiting + audited, share=0.9)
        >>> found.audits, found.bad_left, round(found.at_least, 2), found.missing
        (20, 11, 0.86, 4)
    """
    stream = _Stream.of(masks, level)
    unknown = labels - corrected - stream.judged

    def at_least(further: int) -> float:
        return (labels - unknown - stream.bad_left(further)) / labels

    missing = None
    if labels and at_least(stream.waiting) >= share - _ROUNDING:
        wanted = range(stream.waiting + 1)
        missing = bisect.bisect_left(wanted, True, key=lambda further: at_least(further) >= share - _ROUNDING)
    return Certificate(
        labels=labels,
        corrected=corrected,
        judged=stream.judged,
        audits=stream.audits,
        bad=stream.bad,
        bad_left=stream.bad_left(0),
        at_least=at_least(0) if labels else None,
        missing=missing,
    )


@dataclass(frozen=True, slots=True)
class _Stream:
    """Random draws, and what was there to be drawn at each of them.

    Attributes:
        judged: masks that are labels nobody has corrected.
        waiting: of these, those that can still be drawn.
        bad: how many draws met a bad mask.
        pool: how many masks each draw was made of, (draws,).
        known_bad: of these, those that are known to be bad by now, (draws,).
        absent: how many of the judged masks were not there at each draw, (draws,).
        level: of the one-sided bound.
    """

    judged: int
    waiting: int
    bad: int
    pool: Values
    known_bad: Values
    absent: Values
    level: float

    @classmethod
    def of(cls, masks: Sequence[AuditedMask], level: float) -> _Stream:
        made = np.array([mask.made_at.timestamp() for mask in masks], np.float64)
        ends = [mask.drawn_at or mask.left_at for mask in masks]  # whoever draws a mask takes it out of the pool
        left = np.array([end.timestamp() if end is not None else math.inf for end in ends], np.float64)
        judged = np.array([mask.is_judged for mask in masks], bool)
        bad = np.array([mask.is_good is False for mask in masks], bool)
        good = np.array([mask.is_good is True for mask in masks], bool)
        drawn = np.array([mask.drawn_at is not None for mask in masks], bool)

        def there(at: Values, which: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Values:
            which = which & (made <= left)
            come = np.searchsorted(np.sort(made[which]), at, side="right")
            return np.asarray(come - np.searchsorted(np.sort(left[which]), at, side="left"), np.float64)

        at = left[drawn]
        return cls(
            judged=int(judged.sum()),
            waiting=int((judged & np.isinf(left)).sum()),
            bad=int((drawn & ~good).sum()),
            pool=there(at, np.ones_like(judged)),
            known_bad=there(at, bad),
            absent=judged.sum() - there(at, judged),
            level=level,
        )

    @property
    def audits(self) -> int:
        """The number of draws."""
        return len(self.pool)

    def bad_left(self, further: int) -> int:
        """How many of the judged masks are bad at most, after so many further draws that meet no bad one.

        What is said of `further` draws is cautious: each is of the masks that wait, and of none that left the pool.
        """
        audits, judged = self.audits + further, self.judged - further
        if audits == 0:
            return judged
        largest = most_bad_share(self.bad, audits, self.level) * audits + _ROUNDING
        pools = np.concatenate([self.pool, self.waiting - np.arange(further)])
        known_bad = np.concatenate([self.known_bad, np.zeros(further)])
        absent = np.concatenate([self.absent, np.full(further, self.judged - self.waiting)])

        def is_contradicted(left: int) -> bool:
            return bool(((np.maximum(0, left - absent) + known_bad) / pools).sum() > largest)

        return bisect.bisect_left(range(1, judged + 1), True, key=is_contradicted)


# ---------------------------------------------------------------------------------------------------------------- words


def certificate_sentence(found: Certificate, dice: float, share: float, *, level: float = LEVEL) -> str:
    """What a certificate says, for whoever owns the data.

    Args:
        found: the certificate.
        dice: a label is good from this Dice on.
        share: what one would like to say, from 0 to 1.
        level: of the one-sided bound.
    """
    if found.at_least is None:
        return "There are no labels to say anything of."
    bad = f", {found.bad} of them bad" if found.bad else ""
    audits = "1 audit" if found.audits == 1 else f"{found.audits or 'no'} audits"
    said = (
        f"At least {_percent(found.at_least)} of the {found.labels} labels have a Dice of {dice:g} or more (one-sided "
        f"{level:.0%} bound; {audits}{bad})."
    )
    if found.missing == 0:
        return said
    if found.missing is None:
        return f"{said} No number of further audits would allow to say that at least {_percent(share)} do{_why(found)}."
    more = "1 more audit" if found.missing == 1 else f"{found.missing} more audits"
    return f"{said} {more} without a bad one would allow to say that at least {_percent(share)} do."


def _percent(share: float) -> str:
    return f"{math.floor(1000 * share + _ROUNDING) / 10:g}%"


def _why(found: Certificate) -> str:
    if found.unknown:
        return f": nothing speaks for {found.unknown} of the labels"
    return "; people have to correct more of the labels wholly"
