"""Correction curves: what a set gains when its masks are corrected in an order (method, "Correction curves").

Whole scans (3D) or slices pooled over scans (2D) are corrected one after the other; the curve is the mean true 3D Dice
over the masks as a function of the share corrected. A corrected slice equals the truth, and its mask's Dice follows
from the voxel counts of all its slices: the gain of a slice depends on which others of its mask are done.

The area under a curve is the mean over the whole way. The share of the optimal order's gain over random that an order
captures is (area - area at random) / (optimal area - area at random).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segqc.quality.estimation import (
    LEVEL,
    ConfidenceInterval,
    Counts,
    Indices,
    Verdict,
    bootstrap_p_value,
    chunks,
    holm_verdicts,
    patient_index,
    percentile_interval,
    with_resamples,
)
from segqc.quality.metrics import Values

OPTIMAL, RANDOM, RANDOM_NONEMPTY, SEQUENTIAL = "optimal", "random", "random non-empty", "sequential"
POINTS = 201  # of a curve that is kept
DRAWS = 1000  # of patients
SHUFFLES = 64  # of units that tie
_TOLERANCE = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """What is corrected one by one: slices, or whole scans. Make it with `slices` or `scans`.

    Attributes:
        mask: which mask each unit is of, 0, 1, ..., (n,).
        in_mask, in_truth, in_both: voxels of the mask, of the truth and of their overlap in each unit, (n,).
    """

    mask: Indices
    in_mask: Values
    in_truth: Values
    in_both: Values

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def masks(self) -> int:
        """The number of masks."""
        return int(self.mask.max()) + 1

    @property
    def start(self) -> Values:
        """The true 3D Dice of each mask before any correction, (masks,)."""
        overlap, sizes = self.overlap_and_size()
        return _dice(overlap, sizes)

    def overlap_and_size(self) -> tuple[Values, Values]:
        """Overlap, and voxels of mask and truth together, of each whole mask."""
        sums = [np.bincount(self.mask, weights=x) for x in (self.in_both, self.in_mask + self.in_truth)]
        return np.asarray(sums[0], np.float64), np.asarray(sums[1], np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """An order of correction and what it gains, in expectation where units tie.

    Attributes:
        units: the units that are ordered.
        mask: the mask of each step, (n,); steps of a group of ties lie together, by mask.
        first: where each group of ties begins, (groups,).
        place: the expected place of each step in its group, as a share of (0, 1), (n,).
        gain: the expected gain in its mask's Dice, (n,).
        mean_dice: the expected mean Dice after 0, 1, ..., n units, (n + 1,).
    """

    units: Units
    mask: Indices
    first: Indices
    place: Values
    gain: Values
    mean_dice: Values

    def area(self) -> float:
        """The area under the curve (trapezoids), between the first mean Dice and 1."""
        return float(self.areas(np.ones((1, self.units.masks), np.int64))[0])

    def areas(self, copies: Counts) -> Values:
        """The areas where each mask is there a number of times, (draws,).

        Args:
            copies: (draws, masks). The copies of a unit follow each other.
        """
        group = np.repeat(np.arange(len(self.first)), np.diff(self.first, append=len(self.mask)))
        start = self.units.start
        areas = []
        for chunk in chunks(copies, len(self.mask)):
            times = chunk[:, self.mask]
            tied = np.add.reduceat(times, self.first, axis=1)
            upto = np.cumsum(tied, axis=1)
            # k of m steps of one mask among W tied ones are expected at place k (W + 1) / (m + 1) of the group
            done = (upto - tied)[:, group] + self.place * (tied[:, group] + 1) - 0.5
            left = 1 - done / upto[:, -1:]
            areas.append((chunk @ start + (times * self.gain * left).sum(axis=1)) / chunk.sum(axis=1))
        return np.concatenate(areas) if areas else np.empty(0)

    def curve(self, points: int = POINTS) -> CorrectionCurve:
        """Return the curve at every step, or at evenly spaced shares where there are more than ``points``."""
        share = np.linspace(0, 1, len(self.mean_dice))
        at = share if len(share) <= points else np.linspace(0, 1, points)
        return CorrectionCurve(tuple(at.tolist()), tuple(np.interp(at, share, self.mean_dice).tolist()), self.area())


@dataclass(frozen=True, slots=True)
class CorrectionCurve:
    """Mean true 3D Dice of a set after a share of it is corrected, and the area under the whole curve."""

    share: tuple[float, ...]
    mean_dice: tuple[float, ...]
    area: float


@dataclass(frozen=True, slots=True)
class OrderResult:
    """One order: its curve and the captured share of the optimal gain; see `captured`."""

    name: str
    curve: CorrectionCurve
    captured: ConfidenceInterval


@dataclass(frozen=True, slots=True)
class CapturedDifference:
    """How much more of the optimal gain ``first`` captures than ``second``, by patient-level bootstrap."""

    first: str
    second: str
    difference: ConfidenceInterval
    p_value: float | None

    @property
    def advantage(self) -> float | None:
        """By how much the first order is better; None where undefined."""
        return self.difference.value


@dataclass(frozen=True, slots=True)
class CurveComparison:
    """The orders of one set, the reference orders last; the chosen one against others, and a verdict for each of these.

    The verdicts are adjusted over the differences.
    """

    masks: int
    units: int
    orders: tuple[OrderResult, ...]
    differences: tuple[CapturedDifference, ...]
    verdicts: tuple[Verdict, ...]


def scans(dice: Sequence[float] | Values) -> Units:
    """Units of a 3D curve: each mask is corrected as a whole.

    Args:
        dice: the true 3D Dice of each mask.

    Raises:
        ValueError: if a Dice is not in [0, 1], or there is none.
    """
    values = np.array(dice, np.float64)
    one = np.ones(values.size)
    return slices(np.arange(values.size), one, one, values)  # 2 d / (1 + 1) = d


def slices(
    mask: Sequence[int] | Indices | Counts,
    in_mask: Sequence[float] | npt.NDArray[np.generic],
    in_truth: Sequence[float] | npt.NDArray[np.generic],
    in_both: Sequence[float] | npt.NDArray[np.generic],
) -> Units:
    """Units of a 2D curve: the slices of all masks, pooled; empty ones too.

    Args:
        mask: which mask each slice is of, 0, 1, ... without gaps.
        in_mask: voxels of the mask in each slice.
        in_truth: voxels of the truth.
        in_both: voxels of both.

    Raises:
        ValueError: if lengths differ, a mask has no slice, or counts are impossible.
    """
    of = np.array(mask, np.intp)
    m, t, both = (np.array(x, np.float64) for x in (in_mask, in_truth, in_both))
    if not of.size or not of.shape == m.shape == t.shape == both.shape:
        raise ValueError(f"curves need as many counts as units, at least one, got {of.size}, {m.size}, {t.size}")
    if of.min() < 0 or not np.bincount(of).all():
        raise ValueError("masks are numbered 0, 1, ... without gaps")
    if not ((both >= 0) & (both <= np.minimum(m, t))).all():
        raise ValueError("an overlap lies between 0 and the smaller of mask and truth")
    return Units(of, m, t, both)


def whole_sizes(mask: Indices, in_mask: Values, in_truth: Values) -> Values:
    """The voxels of mask and estimated truth of each slice's whole scan, (n,); at least 1.

    The errors in a slice over this number are about what correcting it adds to its scan's Dice, so that slices of
    small and of large scans can be ordered together. Within one scan that is the order of the errors themselves.

    Args:
        mask: which mask each slice is of.
        in_mask: voxels of the mask in each slice.
        in_truth: those of the estimated truth.
    """
    return np.asarray(np.maximum(np.bincount(mask, in_mask + in_truth), 1.0)[mask])


def by_scores(
    units: Units, error_score: Sequence[float] | Values, *, generator: np.random.Generator, shuffles: int = SHUFFLES
) -> Order:
    """Correct the unit of the largest badness first; units that tie in random order, in expectation.

    For scans the expectation is exact; for slices the gains are means over seeded shuffles of the ties, and the area is
    exact in how the masks' slices interleave.

    Args:
        units: what is ordered.
        error_score: one number per unit.
        generator: the source of the shuffles; not used without ties.
        shuffles: their number.

    Raises:
        ValueError: if lengths differ, or a number is NaN: say where undefined ones belong.
    """
    score = np.array(error_score, np.float64)
    if score.shape != units.mask.shape or np.isnan(score).any():
        raise ValueError(f"an order needs a number for each of {len(units)} units, got {score.size}, NaN not allowed")
    _, group = np.unique(-score, return_inverse=True)
    sizes = np.bincount(group)
    first = np.cumsum(sizes) - sizes
    ties, whole = len(first) < len(units), units.masks == len(units)
    gain, steps = np.zeros(len(units)), np.zeros(len(units))
    rounds = shuffles if ties and not whole else 1
    for _ in range(rounds):
        order = np.lexsort((generator.random(len(units)), group)) if rounds > 1 else np.argsort(group, kind="stable")
        gains = _gains(units, order)
        steps += gains / rounds
        gain += gains[np.lexsort((units.mask[order], group[order]))] / rounds
    together = np.lexsort((units.mask, group))
    if whole:
        steps = np.repeat(np.add.reduceat(steps, first) / sizes, sizes)
    mask = units.mask[together]
    return Order(units, mask, first, _places(mask, group[together]), gain, _curve(units, steps))


def optimal(units: Units) -> Order:
    """Correct the unit first that raises the mean Dice most, at every step: the exact greedy order.

    For scans no order has a higher curve at any point. For slices the greedy order is the method's reference, but no
    proven bound: the gain of a slice may grow as others of its mask are done (a mask over an empty truth gains only
    with its last slice), so that another order may be above it, by little.
    """
    order, gains = _greedy(units)
    places = np.full(len(units), 0.5)
    return Order(units, units.mask[order], np.arange(len(units)), places, gains, _curve(units, gains))


def at_random(units: Units, *, generator: np.random.Generator, shuffles: int = SHUFFLES) -> Order:
    """Correct in random order, in expectation; see `by_scores`."""
    return by_scores(units, np.zeros(len(units)), generator=generator, shuffles=shuffles)


def at_random_nonempty(units: Units, *, generator: np.random.Generator, shuffles: int = SHUFFLES) -> Order:
    """Correct the slices where the mask is not empty in random order, then the others in random order."""
    return by_scores(units, (units.in_mask > 0).astype(np.float64), generator=generator, shuffles=shuffles)


def sequential(units: Units) -> Order:
    """Correct in the order in which the units are listed: one scan after the other, slice by slice."""
    return by_scores(units, -np.arange(len(units), dtype=np.float64), generator=np.random.default_rng(0))


def captured(order: Order, best: Order, random: Order) -> float | None:
    """Share of the optimal order's gain over random that an order captures: 1 as good as optimal, 0 as random.

    Returns:
        The share, negative for an order worse than random; None where the optimal order gains nothing over random.
    """
    once = np.ones((1, order.units.masks), np.int64)
    share = float(_captured(*(o.areas(once) for o in (order, best, random)))[0])
    return None if np.isnan(share) else share


def compare_orders(
    units: Units,
    error_score: Mapping[str, Sequence[float] | Values],
    patients: Sequence[str],
    *,
    generator: np.random.Generator,
    chosen: str | None = None,
    against: Sequence[str] | None = None,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> CurveComparison:
    """Compare the orders of several methods on one set, with bootstrap intervals by patient.

    The reference orders are added under the names `OPTIMAL`, `RANDOM`, `RANDOM_NONEMPTY` and `SEQUENTIAL`, the latter
    two for slices only (scans have no order of their own).

    Args:
        units: the scans or slices.
        error_score: one number per unit, by method.
        patients: whose each mask is, (masks,).
        generator: the source of shuffles and draws.
        chosen: the method to compare with others, by the captured share.
        against: these others, one family of tests; by default all.
        draws: the number of bootstrap draws.
        level: the intervals' level; verdicts are at 1 - level after Holm's adjustment.

    Raises:
        ValueError: if lengths differ, or ``chosen`` is not among the methods.
    """
    if len(patients) != units.masks:
        raise ValueError(f"each of {units.masks} masks needs its patient, got {len(patients)}")
    if chosen is not None and chosen not in error_score:
        raise ValueError(f"the chosen order {chosen!r} is none of {', '.join(error_score)}")
    orders = {name: by_scores(units, values, generator=generator) for name, values in error_score.items()}
    orders[OPTIMAL] = optimal(units)
    orders[RANDOM] = at_random(units, generator=generator)
    if units.masks < len(units):
        orders[RANDOM_NONEMPTY] = at_random_nonempty(units, generator=generator)
        orders[SEQUENTIAL] = sequential(units)
    index, count = patient_index(patients)
    copies = with_resamples(count, draws, generator)[:, index]
    areas = {name: order.areas(copies) for name, order in orders.items()}
    shares = {name: _captured(area, areas[OPTIMAL], areas[RANDOM]) for name, area in areas.items()}
    results = tuple(
        OrderResult(name, order.curve(), percentile_interval(shares[name][0], shares[name][1:], level))
        for name, order in orders.items()
    )
    others = [] if chosen is None else [n for n in (error_score if against is None else against) if n != chosen]
    found = [shares[chosen] - shares[name] for name in others] if chosen is not None else []
    differences = tuple(
        CapturedDifference(
            chosen or "",
            second,
            percentile_interval(values[0], values[1:], level),
            None if np.isnan(values[0]) else bootstrap_p_value(values[1:], count),
        )
        for second, values in zip(others, found, strict=True)
    )
    verdicts = holm_verdicts(differences, level=1 - level)
    return CurveComparison(units.masks, len(units), results, differences, verdicts)


def _captured(area: Values, best: Values, random: Values) -> Values:
    gain = best - random
    return np.divide(area - random, gain, out=np.full_like(gain, np.nan), where=gain > _TOLERANCE)


def _dice(overlap: Values, size: Values) -> Values:
    return np.divide(2 * overlap, size, out=np.ones_like(size), where=size > 0)


def _gains(units: Units, order: Indices) -> Values:
    """The gain in its mask's Dice of every step of an order, (n,)."""
    back = np.argsort(units.mask[order], kind="stable")
    by_mask = order[back]
    mask = units.mask[by_mask]
    sizes = np.bincount(mask)
    first = np.cumsum(sizes) - sizes
    overlap, size = units.overlap_and_size()
    more = (units.in_truth - units.in_both)[by_mask], (units.in_truth - units.in_mask)[by_mask]
    sums = [np.cumsum(x) for x in more]
    added = [total - np.repeat(total[first] - x[first], sizes) for total, x in zip(sums, more, strict=True)]
    after = _dice(overlap[mask] + added[0], size[mask] + added[1])
    before = np.empty_like(after)
    before[1:] = after[:-1]
    before[first] = units.start
    gains = np.empty_like(after)
    gains[back] = after - before
    return gains


def _greedy(units: Units) -> tuple[Indices, Values]:
    """The greedy order of units and the gain of each step.

    A correction changes the gains in its own mask only. So the greedy order within a mask does not depend on the
    others, and at each step the mask whose next gain is largest goes on: after a step, a mask's further ones follow at
    once for as long as they gain no less, which is the order by the smallest gain up to each step.
    """
    by_mask = np.argsort(units.mask, kind="stable")
    sizes = np.bincount(units.mask)
    row = units.mask[by_mask]
    column = np.arange(len(units)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    table = np.full((units.masks, int(sizes.max())), -1, np.intp)
    table[row, column] = by_mask
    open_ = table >= 0
    more_overlap, more_size = (
        np.where(open_, x[table], 0.0) for x in (units.in_truth - units.in_both, units.in_truth - units.in_mask)
    )
    overlap, size = units.overlap_and_size()
    rows = np.arange(units.masks)
    chosen, gained = np.full_like(table, -1), np.full(table.shape, np.nan)
    dice = units.start
    for step in range(table.shape[1]):
        after = np.where(open_, _dice(overlap[:, None] + more_overlap, size[:, None] + more_size), -1.0)
        best = after.argmax(axis=1)
        going = open_[rows, best]
        on, picked = rows[going], best[going]
        chosen[on, step], gained[on, step] = table[on, picked], after[on, picked] - dice[going]
        overlap[on] += more_overlap[on, picked]
        size[on] += more_size[on, picked]
        dice = np.where(going, after[rows, best], dice)
        open_[on, picked] = False
    done = chosen >= 0
    smallest = np.minimum.accumulate(np.where(done, gained, np.inf), axis=1)
    mask, step_of = np.nonzero(done)
    merged = np.lexsort((step_of, mask, -smallest[done]))
    return chosen[done][merged], gained[done][merged]


def _places(mask: Indices, group: Indices) -> Values:
    """K / (m + 1) for the k-th of m steps of one mask in one group; steps sorted by group, then by mask."""
    new = np.ones(len(mask), bool)
    new[1:] = (mask[1:] != mask[:-1]) | (group[1:] != group[:-1])
    first = np.flatnonzero(new)
    sizes = np.diff(first, append=len(mask))
    rank = np.arange(len(mask)) - np.repeat(first, sizes) + 1
    return np.asarray(rank / (np.repeat(sizes, sizes) + 1), np.float64)


def _curve(units: Units, gains: Values) -> Values:
    start = float(units.start.mean())
    curve = start + np.concatenate([[0.0], np.cumsum(gains)]) / units.masks
    curve[-1] = 1.0  # every mask equals its truth: no rounding
    return curve
