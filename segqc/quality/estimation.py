"""Estimates of a metric against its true values: scores, intervals and paired comparisons (method, "Numbers").

Several masks of one patient, and all slices of one, are not independent: every interval and every test here takes the
patient as the unit. A bootstrap draw is a number of copies per patient; statistics are computed from these numbers,
so that ranks are sorted once and not once per draw.

Pairs with an undefined estimate or truth (None or NaN) are left out and counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.stats import beta

from segqc.quality.metrics import MetricName, Values

Numbers: TypeAlias = Sequence[float | None] | Sequence[float] | Values
Counts: TypeAlias = npt.NDArray[np.int64]
Indices: TypeAlias = npt.NDArray[np.intp]
Statistic: TypeAlias = Literal[
    "mae",
    "bias",
    "pearson",
    "spearman",
    "aurc",
    "aurc_optimal",
    "aurc_excess",
    "truth_mean",
    "truth_sd",
    "constant_mae",
    "median_mae",
]
PairedStatistic: TypeAlias = Literal["mae", "pearson", "spearman", "aurc"]
Outcome: TypeAlias = Literal["better", "worse", "tie"]

DRAWS = 2000
LEVEL = 0.95
MIN_FOR_CORRELATION = 3
MIN_FOR_TEST = 6  # patients of a bootstrap test: with five, no sign-flip test could find anything either
MIN_PATIENTS = 2  # to resample: copies of one patient have no spread

_RISK: Mapping[MetricName, Callable[[Values], Values]] = MappingProxyType(
    {"dice": lambda v: 1 - v, "iou": lambda v: 1 - v, "arvd": lambda v: v, "rvd": np.abs}
)
_LOWER_IS_BETTER: frozenset[PairedStatistic] = frozenset({"mae", "aurc"})
_TOLERANCE = 1e-12
_CHUNK = 2_000_000  # draws times pairs held at once


@dataclass(frozen=True, slots=True)
class Scores:
    """How good estimates are. A number is None where it is undefined.

    The risk of a mask is 1 - its true Dice or IoU, its true ARVD, or the size of its true RVD. Masks are accepted in
    the order of the estimate, best first; the risk at coverage k/n is the mean risk of the k accepted ones, and AURC is
    its mean over k = 1..n (Geifman et al. 2019). Masks with equal estimates count in the mean over all their orders.

    Attributes:
        n: the number of pairs.
        left_out: the number of pairs with an undefined estimate or truth.
        patients: the number of patients among the pairs.
        mae: mean absolute error.
        bias: mean of estimate - truth.
        pearson, spearman: correlations; None under 3 pairs or where one side does not vary.
        aurc: area under the risk-coverage curve; lower is better.
        aurc_optimal: that of the order by the truth itself.
        aurc_excess: aurc - aurc_optimal, the part that the estimate is to blame for.
        truth_min, truth_max, truth_mean, truth_sd: the true values; the standard deviation has the divisor n.
        constant: the constant to beat, the validation mean for example; None if none was given.
        constant_mae: the error of always answering the constant.
        median_mae: the error of always answering the median of these truths: the least that any constant can have.
    """

    n: int
    left_out: int
    patients: int
    mae: float | None
    bias: float | None
    pearson: float | None
    spearman: float | None
    aurc: float | None
    aurc_optimal: float | None
    aurc_excess: float | None
    truth_min: float | None
    truth_max: float | None
    truth_mean: float | None
    truth_sd: float | None
    constant: float | None
    constant_mae: float | None
    median_mae: float | None


@dataclass(frozen=True, slots=True)
class ConfidenceInterval:
    """A number and its percentile bootstrap interval; the ends are None with fewer than two patients.

    ``draws`` counts the draws in which the number was defined, which the ends are percentiles of.
    """

    value: float | None
    low: float | None
    high: float | None
    level: float
    draws: int


@dataclass(frozen=True, slots=True)
class Stratum:
    """Scores of the pairs whose truth lies in [low, high); None is an open end."""

    low: float | None
    high: float | None
    scores: Scores


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two methods on the same masks.

    Attributes:
        statistic: what is compared.
        n, left_out, patients: pairs where both estimates and the truth are defined; the others; patients among them.
        first, second: the statistic of each method.
        difference: first - second.
        ratio: first / second, for the MAE only.
        p_value: two-sided; None where undefined.
        test: how the p-value was found, see `paired`.
    """

    statistic: PairedStatistic
    n: int
    left_out: int
    patients: int
    first: float | None
    second: float | None
    difference: ConfidenceInterval
    ratio: ConfidenceInterval | None
    p_value: float | None
    test: Literal["sign-flip", "bootstrap"]

    @property
    def advantage(self) -> float | None:
        """By how much the first method is better; None where undefined."""
        value = self.difference.value
        return -value if value is not None and self.statistic in _LOWER_IS_BETTER else value


class Tested(Protocol):
    """A difference of two methods with its p-value."""

    @property
    def p_value(self) -> float | None:
        """Two-sided; None where undefined."""

    @property
    def advantage(self) -> float | None:
        """By how much the first method is better; negative where it is worse, None where undefined."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a difference comes to within its family of tests; None where it is undefined.

    Attributes:
        p_holm: the p-value after Holm's adjustment.
        outcome: what the first method is: better or worse where ``p_holm`` is small enough; all else is a tie.
    """

    p_holm: float | None
    outcome: Outcome | None


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    estimated: Values
    true: Values
    patient: Indices
    patients: int
    left_out: int
    metric: MetricName
    constant: float | None


def scores(
    estimated: Numbers,
    true: Numbers,
    patients: Sequence[str],
    *,
    metric: MetricName = "dice",
    constant: float | None = None,
) -> Scores:
    """Score estimates of one metric.

    Args:
        estimated: the estimates, (n,); None or NaN where undefined.
        true: the true values, in the same order.
        patients: whose mask or slice each is.
        metric: which metric; it says what the risk is.
        constant: the constant to beat: the median truth of the calibrating masks.

    Raises:
        ValueError: if the three differ in length.
    """
    pairs = _pairs(estimated, true, patients, metric, constant)
    once = np.ones((1, pairs.patients), np.int64)

    def of(statistic: Statistic) -> float | None:
        return _number(_values(statistic, pairs, once)[0])

    some = pairs.true.size > 0
    return Scores(
        n=int(pairs.true.size),
        left_out=pairs.left_out,
        patients=pairs.patients,
        mae=of("mae"),
        bias=of("bias"),
        pearson=of("pearson"),
        spearman=of("spearman"),
        aurc=of("aurc"),
        aurc_optimal=of("aurc_optimal"),
        aurc_excess=of("aurc_excess"),
        truth_min=float(pairs.true.min()) if some else None,
        truth_max=float(pairs.true.max()) if some else None,
        truth_mean=of("truth_mean"),
        truth_sd=of("truth_sd"),
        constant=constant,
        constant_mae=of("constant_mae"),
        median_mae=of("median_mae"),
    )


def interval(
    statistic: Statistic,
    estimated: Numbers,
    true: Numbers,
    patients: Sequence[str],
    *,
    generator: np.random.Generator,
    metric: MetricName = "dice",
    constant: float | None = None,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> ConfidenceInterval:
    """Percentile bootstrap interval of a statistic: patients are drawn with replacement, with all that is theirs.

    The statistic is a field of `Scores`; pairs, metric and constant are as for `scores`; the generator is the source of
    the draws.

    Raises:
        ValueError: if lengths differ.
    """
    pairs = _pairs(estimated, true, patients, metric, constant)
    value = _values(statistic, pairs, np.ones((1, pairs.patients), np.int64))[0]
    return percentile_interval(value, _values(statistic, pairs, resample(pairs.patients, draws, generator)), level)


def stratified(
    estimated: Numbers,
    true: Numbers,
    patients: Sequence[str],
    edges: Sequence[float],
    *,
    metric: MetricName = "dice",
    constant: float | None = None,
) -> tuple[Stratum, ...]:
    """Score the pairs of each stratum of the truth. ``k`` edges make ``k + 1`` strata, the outer two with an open end.

    Every pair with a defined truth is in one stratum. Choosing by the truth makes a bias in the strata natural
    (estimates of the worst masks tend to be too good, of the best too bad), and correlations smaller.

    The edges are rising values of the truth; the other arguments are as for `scores`.

    Raises:
        ValueError: if edges do not rise, or lengths differ.
    """
    if not edges or any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(f"strata need edges that rise, got {list(edges)}")
    x, y, whose = np.array(estimated, np.float64), np.array(true, np.float64), np.array(patients)
    _check_lengths(x, y, whose)
    of = np.searchsorted(np.array(edges), y, side="right")
    ends: list[float | None] = [None, *edges, None]
    strata = []
    for i, (low, high) in enumerate(itertools.pairwise(ends)):
        inside = (of == i) & ~np.isnan(y)
        found = scores(x[inside], y[inside], whose[inside].tolist(), metric=metric, constant=constant)
        strata.append(Stratum(low, high, found))
    return tuple(strata)


def paired(
    first: Numbers,
    second: Numbers,
    true: Numbers,
    patients: Sequence[str],
    *,
    generator: np.random.Generator,
    statistic: PairedStatistic = "mae",
    metric: MetricName = "dice",
    draws: int = DRAWS,
    level: float = LEVEL,
) -> Comparison:
    """Compare two methods on the same masks, with the patient as the unit.

    Intervals are percentile bootstraps of the difference (and of the ratio of the MAEs), the same patients drawn for
    both. The two-sided p-value of a difference in MAE is a sign-flip permutation test: if the methods are
    exchangeable, the sum of a patient's differences of absolute errors is as likely with the other sign; all flips are
    taken where they are no more than ``draws``, otherwise ``draws`` random ones with the observed one among them. For
    correlations and AURC, it is twice the share of bootstrap differences on the rarer side of zero, one added to both
    counts.

    Args:
        first: the estimates of one method, (n,).
        second: those of the other.
        true: the true values.
        patients: whose mask or slice each is.
        generator: the source of the draws.
        statistic: what to compare.
        metric: which metric; it says what the risk is.
        draws: bootstrap draws, and sign flips.
        level: the intervals' level.

    Raises:
        ValueError: if lengths differ.
    """
    a, b = np.array(first, np.float64), np.array(second, np.float64)
    _check_lengths(a, b, np.array(patients))
    both = np.isfinite(a) & np.isfinite(b)
    pairs = [_pairs(np.where(both, x, np.nan), true, patients, metric, None) for x in (a, b)]
    count = pairs[0].patients
    once = np.ones((1, count), np.int64)
    values = [float(_values(statistic, p, once)[0]) for p in pairs]
    weights = resample(count, draws, generator)
    drawn = [_values(statistic, p, weights) for p in pairs]
    ratio = None
    if statistic == "mae":
        errors = [np.abs(p.estimated - p.true) for p in pairs]
        p_value = _sign_flip(_by_patient(pairs[0], errors[0] - errors[1]), draws, generator)
        ratio = percentile_interval(_ratio(*map(np.array, values)), _ratio(*drawn), level)
    else:
        p_value = bootstrap_p_value(drawn[0] - drawn[1], count)
    return Comparison(
        statistic=statistic,
        n=int(pairs[0].true.size),
        left_out=pairs[0].left_out,
        patients=count,
        first=_number(values[0]),
        second=_number(values[1]),
        difference=percentile_interval(values[0] - values[1], drawn[0] - drawn[1], level),
        ratio=ratio,
        p_value=None if np.isnan(values).any() else p_value,
        test="sign-flip" if statistic == "mae" else "bootstrap",
    )


@dataclass(frozen=True, slots=True)
class SharedErrors:
    """Whether what is left of two methods' errors belongs to the patients, and not to the methods.

    Attributes:
        patients: with an error of both methods.
        patient_share: share of the first method's squared error about its mean that lies between patients (the
            intraclass correlation of a one-way analysis of variance, at least 0); None without several masks of a
            patient.
        correlation: Pearson's, over patients, of the two methods' mean signed errors; None under three patients or
            where one does not vary.
    """

    patients: int
    patient_share: float | None
    correlation: float | None


def shared_errors(first: Numbers, second: Numbers, true: Numbers, patients: Sequence[str]) -> SharedErrors:
    """Ask whether two methods err on the same patients.

    Where methods without a network in common do, the truths of these patients differ from what the cases that both
    trained from make one expect: a better method of the same kind would not help.

    Args:
        first: the estimates of one method, (n,).
        second: those of the other.
        true: the true values.
        patients: whose mask each is.

    Raises:
        ValueError: if lengths differ.
    """
    a, b, t, whose = (*(np.array(x, np.float64) for x in (first, second, true)), np.array(patients, dtype=str))
    _check_lengths(a, t, whose)
    _check_lengths(b, t, whose)
    defined = np.isfinite(a) & np.isfinite(b) & np.isfinite(t)
    index, count = patient_index(whose[defined].tolist())
    errors = [(x - t)[defined] for x in (a, b)]
    sizes = np.bincount(index, minlength=count)
    means = [np.bincount(index, weights=e, minlength=count) / sizes for e in errors]
    varies = count >= MIN_FOR_CORRELATION and min(np.ptp(m) for m in means) > _TOLERANCE
    correlation = float(np.corrcoef(means[0], means[1])[0, 1]) if varies else None
    return SharedErrors(count, _intraclass(errors[0], index, means[0], sizes), correlation)


def _intraclass(values: Values, index: Indices, means: Values, sizes: npt.NDArray[np.int_]) -> float | None:
    n, count = len(values), len(means)
    if count < MIN_PATIENTS or n == count:
        return None
    between = float((sizes * (means - values.mean()) ** 2).sum()) / (count - 1)
    within = float(((values - means[index]) ** 2).sum()) / (n - count)
    each = (n - float((sizes**2).sum()) / n) / (count - 1)
    spread = between + (each - 1) * within
    return max(0.0, (between - within) / spread) if spread > 0 else None


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Adjust the p-values of one family of tests (Holm 1979), in the order given.

    Raises:
        ValueError: if one is not in [0, 1].
    """
    p = np.array(p_values, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values lie in [0, 1], got {list(p_values)}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)), 1.0)
    return tuple(adjusted.tolist())


def holm_verdicts(family: Sequence[Tested], *, level: float = 0.05) -> tuple[Verdict, ...]:
    """The verdicts of one family of tests (one first method against several), after Holm's adjustment.

    The first method is better or worse where the adjusted p-value is at most ``level``; all else is a tie. Undefined
    differences are not counted in the family.
    """
    adjusted = iter(holm([tested.p_value for tested in family if tested.p_value is not None]))
    verdicts = []
    for tested in family:
        p = None if tested.p_value is None else next(adjusted)
        verdicts.append(Verdict(p, _outcome(tested.advantage, p, level)))
    return tuple(verdicts)


def resampled(
    statistic: Statistic, estimated: Numbers, true: Numbers, patients: Sequence[str], weights: Counts
) -> Values:
    """A statistic of estimates of the Dice in each draw of patients, (draws,); NaN where it is undefined there.

    Sets of one list of patients are compared by the same draws of both.

    Args:
        statistic: a field of `Scores`.
        estimated: the estimates, all of them defined.
        true: the true values, all of them defined.
        patients: whose each is.
        weights: the copies of each patient, (draws, patients), in the order of `patient_index`; see `resample`.

    Raises:
        ValueError: if lengths differ.
    """
    return _values(statistic, _pairs(estimated, true, patients, "dice", None), weights)


def most_bad_share(bad: int, drawn: int, level: float) -> float:
    """The one-sided upper bound on the share of bad ones (Clopper & Pearson, Biometrika 26, 1934).

    Args:
        bad: how many of the random draws met a bad one.
        drawn: how many draws there were; without one the bound is 1.
        level: the confidence.

    Raises:
        ValueError: if the level does not lie between 0 and 1.

    Example:
        >>> round(most_bad_share(0, 59, 0.95), 3)  # 1 - 0.05 ** (1 / 59)
        0.05
    """
    if not 0 < level < 1:
        raise ValueError(f"the level of a bound lies between 0 and 1, got {level}")
    return 1.0 if bad == drawn else float(beta.ppf(level, bad + 1, drawn - bad))


def rank_regret(estimated: Numbers, true: Numbers) -> float | None:
    """The part of the best order's gain over a random one that an order loses: 0 the best, 1 as good as random.

    Masks are corrected as wholes, the one of the lowest estimate first; a correction gains 1 - its true Dice. The gain
    is the area under the curve of the mean Dice over the share of masks corrected (`curves.captured` of the
    laboratory, in closed form: a sum of gains times places).

    Args:
        estimated: estimates of the Dice, (n,), or whatever is lower for worse masks; all defined.
        true: the true Dice, in the same order.

    Returns:
        The regret, above 1 for an order worse than random; None where all orders are alike.
    """
    x, gain = np.array(estimated, np.float64), 1 - np.array(true, np.float64)
    if x.size < MIN_PATIENTS:
        return None
    place, best = _mid_ranks(x), _mid_ranks(-gain)
    most = float(((best - best.mean()) * gain).sum())
    return 1 - float(((place - place.mean()) * gain).sum()) / most if abs(most) > _TOLERANCE else None


def lost_in_worst(estimated: Numbers, true: Numbers, share: float = 0.1) -> float | None:
    """The true quality lost by taking those with the lowest estimates instead of those that are truly the worst.

    Args:
        estimated: estimates of the Dice, (n,), or whatever is lower for worse masks; all defined.
        true: the true Dice, in the same order.
        share: how many are taken, at least one.

    Returns:
        The mean true Dice of those taken less that of the worst; None without any mask.
    """
    x, y = np.array(estimated, np.float64), np.array(true, np.float64)
    if not x.size:
        return None
    k = max(1, round(share * x.size))
    return float(y[np.argsort(x, kind="stable")[:k]].mean() - np.sort(y)[:k].mean())


def _mid_ranks(values: Values) -> Values:
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(sizes) - (sizes - 1) / 2)[group], np.float64)


def patient_index(patients: Sequence[str]) -> tuple[Indices, int]:
    """Number the patients: the index of each entry's patient, (n,), and how many there are."""
    names, index = np.unique(np.array(patients, dtype=str), return_inverse=True)
    return index.astype(np.intp), len(names)


def resample(patients: int, draws: int, generator: np.random.Generator) -> Counts:
    """Draw patients with replacement: the number of copies of each, (draws, patients); no draws of a single patient."""
    if patients < MIN_PATIENTS:
        return np.empty((0, patients), np.int64)
    return generator.multinomial(patients, np.full(patients, 1 / patients), size=draws)


def with_resamples(patients: int, draws: int, generator: np.random.Generator) -> Counts:
    """Each patient once in the first row, the set itself; then the draws of `resample`, (1 + draws, patients)."""
    return np.concatenate([np.ones((1, patients), np.int64), resample(patients, draws, generator)])


def percentile_interval(value: float | np.float64 | Values, drawn: Values, level: float) -> ConfidenceInterval:
    """Make an interval of a number and its bootstrap draws; NaN is undefined and left out."""
    if not 0 < level < 1:
        raise ValueError(f"an interval's level lies between 0 and 1, got {level}")
    defined = drawn[~np.isnan(drawn)]
    number = _number(value)
    if number is None or not defined.size:
        return ConfidenceInterval(number, None, None, level, int(defined.size))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return ConfidenceInterval(number, float(low), float(high), level, int(defined.size))


def bootstrap_p_value(differences: Values, patients: int) -> float | None:
    """Two-sided p-value of no difference from bootstrap draws of it: twice the rarer side of zero; NaN is left out.

    None under `MIN_FOR_TEST` patients: draws of two or three of them say nothing of a fourth.
    """
    defined = differences[~np.isnan(differences)]
    if not defined.size or patients < MIN_FOR_TEST:
        return None
    rarer = min(np.count_nonzero(defined <= 0), np.count_nonzero(defined >= 0))
    return min(1.0, 2 * (int(rarer) + 1) / (defined.size + 1))


def chunks(weights: Counts, columns: int) -> Iterator[Counts]:
    """Split draws so that arrays of (draws, columns) stay small."""
    step = max(1, _CHUNK // max(1, columns))
    for begin in range(0, len(weights), step):
        yield weights[begin : begin + step]


def _pairs(
    estimated: Numbers, true: Numbers, patients: Sequence[str], metric: MetricName, constant: float | None
) -> _Pairs:
    x, y, whose = np.array(estimated, np.float64), np.array(true, np.float64), np.array(patients, dtype=str)
    _check_lengths(x, y, whose)
    defined = np.isfinite(x) & np.isfinite(y)
    index, count = patient_index(whose[defined].tolist())
    return _Pairs(x[defined], y[defined], index, count, int((~defined).sum()), metric, constant)


def _check_lengths(x: Values, y: Values, patients: npt.NDArray[np.generic]) -> None:
    if x.ndim != 1 or not x.shape == y.shape == patients.shape:
        raise ValueError(f"each estimate needs a truth and a patient, got {x.shape}, {y.shape} and {patients.shape}")


def _values(statistic: Statistic, pairs: _Pairs, weights: Counts) -> Values:
    """A statistic in each draw, (draws,), NaN where undefined.

    ``weights`` holds the copies of each patient, (draws, patients).
    """
    x, y = pairs.estimated, pairs.true
    if not x.size or not len(weights):
        return np.full(len(weights), np.nan)
    match statistic:
        case "mae":
            return _mean(pairs, np.abs(x - y), weights)
        case "bias":
            return _mean(pairs, x - y, weights)
        case "truth_mean":
            return _mean(pairs, y, weights)
        case "truth_sd":
            return np.sqrt(_covariance(pairs, y, y, weights))
        case "constant_mae":
            constant = np.nan if pairs.constant is None else pairs.constant
            return _mean(pairs, np.abs(y - constant), weights)
        case "pearson":
            return _pearson(pairs, weights)
        case "spearman":
            return _spearman(pairs, weights)
        case _:
            of_copies = _OF_COPIES[statistic]
            return np.concatenate([of_copies(pairs, chunk[:, pairs.patient]) for chunk in chunks(weights, x.size)])


def _by_patient(pairs: _Pairs, column: Values) -> Values:
    return np.asarray(np.bincount(pairs.patient, weights=column, minlength=pairs.patients), np.float64)


def _mean(pairs: _Pairs, column: Values, weights: Counts) -> Values:
    sizes = np.bincount(pairs.patient, minlength=pairs.patients)
    return np.asarray((weights @ _by_patient(pairs, column)) / (weights @ sizes), np.float64)


def _covariance(pairs: _Pairs, a: Values, b: Values, weights: Counts) -> Values:
    """Covariance in each draw; exactly 0 where rounding is all there is of a variance."""
    a, b = a - a.mean(), b - b.mean()
    products = _mean(pairs, a * b, weights)
    covariance = products - _mean(pairs, a, weights) * _mean(pairs, b, weights)
    scale = np.sqrt(_mean(pairs, a * a, weights) * _mean(pairs, b * b, weights))
    return np.where(np.abs(covariance) <= _TOLERANCE * scale, 0.0, covariance)


def _pearson(pairs: _Pairs, weights: Counts) -> Values:
    x, y = pairs.estimated, pairs.true
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.full(len(weights), np.nan)
    # scaled, so that no product of deviations underflows
    x, y = (x - x.mean()) / np.ptp(x), (y - y.mean()) / np.ptp(y)
    xx, yy, xy = (_covariance(pairs, a, b, weights) for a, b in ((x, x), (y, y), (x, y)))
    sizes = np.bincount(pairs.patient, minlength=pairs.patients)
    return _correlation(xx, yy, xy, (weights > 0) @ sizes)


def _correlation(xx: Values, yy: Values, xy: Values, distinct: npt.NDArray[np.int_]) -> Values:
    with np.errstate(divide="ignore", invalid="ignore"):
        r = np.clip(xy / np.sqrt(xx * yy), -1.0, 1.0)
    return np.where((xx > 0) & (yy > 0) & (distinct >= MIN_FOR_CORRELATION), r, np.nan)


def _spearman(pairs: _Pairs, weights: Counts) -> Values:
    """Pearson of the mid-ranks among all copies.

    A rank is a sum over the patients drawn, so that one matrix product gives the ranks in all draws.
    """
    order = np.argsort(pairs.patient, kind="stable")
    starts = np.searchsorted(pairs.patient[order], np.arange(pairs.patients))
    x, y = (_ranks_by_patient(pairs, values)[:, order] for values in (pairs.estimated, pairs.true))
    sizes = np.bincount(pairs.patient, minlength=pairs.patients)
    found = []
    for drawn in chunks(weights, pairs.true.size):
        a, b = drawn @ x, drawn @ y
        xx, yy, xy = ((np.add.reduceat(u * v, starts, axis=1) * drawn).sum(axis=1) for u, v in ((a, a), (b, b), (a, b)))
        found.append(_correlation(xx, yy, xy, (drawn > 0) @ sizes))
    return np.concatenate(found)


def _ranks_by_patient(pairs: _Pairs, values: Values) -> Values:
    """What one copy of each patient adds to the mid-ranks minus their mean, (patients, n): half of below - above."""
    distinct, group = np.unique(values, return_inverse=True)
    tied = np.zeros((pairs.patients, len(distinct)))
    np.add.at(tied, (pairs.patient, group), 1)
    upto = np.cumsum(tied, axis=1)
    return np.asarray(((2 * upto - tied - upto[:, -1:]) / 2)[:, group])


def _median_mae(pairs: _Pairs, copies: Counts) -> Values:
    order = np.argsort(pairs.true, kind="stable")
    upto = np.cumsum(copies[:, order], axis=1)
    # any point between the two middle values has the same mean absolute error
    median = pairs.true[order][np.argmax(2 * upto >= upto[:, -1:], axis=1)]
    return np.asarray((copies * np.abs(pairs.true - median[:, None])).sum(axis=1) / upto[:, -1], np.float64)


def _aurc(pairs: _Pairs, copies: Counts) -> Values:
    risk = _RISK[pairs.metric]
    return _area(risk(pairs.estimated), risk(pairs.true), copies)


def _aurc_optimal(pairs: _Pairs, copies: Counts) -> Values:
    risk = _RISK[pairs.metric](pairs.true)
    return _area(risk, risk, copies)


def _aurc_excess(pairs: _Pairs, copies: Counts) -> Values:
    return _aurc(pairs, copies) - _aurc_optimal(pairs, copies)


def _area(score: Values, risk: Values, copies: Counts) -> Values:
    """Area under the risk-coverage curve in each draw (see `Scores`), lowest score first.

    The mask accepted at position p of N enters the risks at coverage p/N, ..., 1: its weight is
    (1/p + ... + 1/N) / N. A group of ties at positions a+1..b shares the sum of their weights.
    """
    order = np.argsort(score, kind="stable")
    starts = np.searchsorted(score[order], np.unique(score))  # where each group of ties begins
    tied = np.add.reduceat(copies[:, order], starts, axis=1)
    risks = np.add.reduceat((copies * risk)[:, order], starts, axis=1)
    upto = np.cumsum(tied, axis=1)
    total = upto[:, -1:]
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, int(total.max()) + 1))])
    before = np.concatenate([[0.0], np.cumsum(harmonic)])  # sum of harmonic[p - 1] over positions p = 1..a
    weight = tied * harmonic[total] - (before[upto] - before[upto - tied])
    mean_risk = np.divide(risks, tied, out=np.zeros_like(risks), where=tied > 0)
    return np.asarray((mean_risk * weight).sum(axis=1) / total[:, 0], np.float64)


_OF_COPIES: Mapping[Statistic, Callable[[_Pairs, Counts], Values]] = MappingProxyType(
    {
        "median_mae": _median_mae,
        "aurc": _aurc,
        "aurc_optimal": _aurc_optimal,
        "aurc_excess": _aurc_excess,
    }
)


def _ratio(first: Values, second: Values) -> Values:
    return np.divide(first, second, out=np.full_like(first, np.nan), where=second > 0)


def _sign_flip(differences: Values, draws: int, generator: np.random.Generator) -> float | None:
    count = len(differences)
    if count < MIN_PATIENTS:
        return None
    exact = 2**count <= draws
    if exact:
        signs = 1.0 - 2.0 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    else:
        signs = generator.choice(np.array([-1.0, 1.0]), size=(draws, count))
    least = abs(differences.sum()) - _TOLERANCE * np.abs(differences).sum()
    extreme = int(np.count_nonzero(np.abs(signs @ differences) >= least))
    return extreme / len(signs) if exact else (extreme + 1) / (draws + 1)


def _outcome(advantage: float | None, p: float | None, level: float) -> Outcome | None:
    if p is None or advantage is None:
        return None
    if p > level or advantage == 0:
        return "tie"
    return "better" if advantage > 0 else "worse"


def _number(value: float | np.float64 | Values) -> float | None:
    return None if np.isnan(value) else float(value)
