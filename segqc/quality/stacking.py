"""The estimate of a metric from several witnesses: fitted and chosen on masks of unseen patients.

SegQC-Net's error map is one witness of a mask's Dice. The network that made the mask is another: its soft output, and
the entropy of it, cost nothing more. So is the size of the mask beside those of the training. Which of them to believe
is decided on cross-fitted masks whose truth is known, by cross-validation with the patient as unit (`fit_estimates`).

All models are monotone: a witness that speaks better of a mask never lowers its estimate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from segqc.quality.metrics import METRIC_RANGES, MetricName, Values, fit_calibration
from segqc.types import BoolArray

WitnessName: TypeAlias = Literal["map", "soft", "entropy", "size", "dice"]
WitnessValues: TypeAlias = Mapping[WitnessName, Values]
Choice: TypeAlias = Literal["map", "pooled", "line", "straight", "soft", "entropy", "size", "stack", "dice", "constant"]

DICE_OF_SERVED: Final[tuple[Choice, ...]] = ("pooled", "map", "line", "soft", "entropy", "size", "stack", "constant")
"""What the Dice of served masks is chosen among, the simplest first."""
DICE_OF_OTHERS: Final[tuple[Choice, ...]] = ("map", "line")
"""Of other masks nothing but the map is known; that they are of many qualities makes the constant worthless."""
DICE_OF_PEOPLE: Final[tuple[Choice, ...]] = ("straight",)
"""Of people's masks there are many, of all qualities: what is read off their maps is too high for bad ones, and too low
for those without an error, of which a line on the logit knows nothing."""
RVD_CHOICES: Final[tuple[Choice, ...]] = ("constant", "map", "line")
"""Of RVD the constant comes first: where little truth is expected, the map's ratio of two sizes may be anything."""
ARVD_CHOICES: Final[tuple[Choice, ...]] = ("dice", "map", "line", "constant")
"""ARVD is (2 + RVD) (1 - Dice). With an RVD of 0 the Dice gives it, without a small denominator."""

MIN_PATIENTS: Final = 8
"""With fewer patients nothing is chosen: estimates are read off the error map as it is.

So many are left of the nine that a 90% interval needs at least, when one is left out.
"""
_PARTS: Final = 10  # of a cross-validation over patients
_NOISE: Final = 2.0  # standard errors by which an error or an order may seem worse
_NEGLIGIBLE: Final = 0.005  # of a Dice: by so much a simpler choice may be worse, whatever the noise
_CHANCE: Final = 1.645  # standard errors from which an order is better than chance
_EDGE: Final = 0.01  # logits are of Dice within [_EDGE, 1 - _EDGE]
_MIN_ENTROPY: Final = 1e-3
_MIN_SIZE: Final = -4.0  # standard deviations; a size further away is no worse
_POOLED: Final[Mapping[WitnessName, float]] = MappingProxyType({"map": 1.0, "soft": 0.3})
_ALONE: Final[Mapping[WitnessName, float]] = MappingProxyType({"soft": 1.0, "entropy": 1.0, "size": 0.3})
_RESIDUAL, _PRIOR = 0.05, 0.1  # standard deviations: of a Dice, and of what is believed of a stack's weights
_ORDER_SLOPE: Final = 0.01  # of a constant, per standard deviation of the witness that orders


@dataclass(frozen=True, slots=True)
class EstimateModel:
    """A metric as a monotone function of witnesses: ``link(intercept + sum of weight * feature)``.

    With the link "identity" features are the witnesses as they are: the metric as read off the error map, or, of the
    ARVD, what the map's Dice makes of it (`arvd_of_dice`). With "logit" they are as in `_feature`, and the result is a
    Dice.

    Attributes:
        link: the scale on which witnesses add up.
        intercept: the constant part.
        weights: of each witness that is used, none below 0.
        known: the least and the largest of the map's values that the model was fitted on; beyond them the estimate goes
            on with the map, step by step. None where it is the same function everywhere.
    """

    link: Literal["identity", "logit"]
    intercept: float
    weights: Mapping[WitnessName, float]
    known: tuple[float, float] | None = None

    def apply(self, values: WitnessValues) -> Values:
        """The estimates of many masks, not clipped to the metric's range; the map's own where a witness is unknown.

        Args:
            values: of each witness, an array over masks, NaN where unknown; "map" is always there.
        """
        total = np.full(values["map"].shape, self.intercept, np.float64)
        unknown = np.full(total.shape, np.nan)
        for name, weight in self.weights.items():
            said = values.get(name, unknown)
            total += weight * (said if self.link == "identity" else _feature(name, said))
        if self.known is not None:
            of_map, low, high = (
                np.asarray(v, np.float64) if self.link == "identity" else _logit(np.asarray(v, np.float64))
                for v in (values["map"], *self.known)
            )
            total += of_map - np.clip(of_map, low, high)
        estimates = total if self.link == "identity" else _expit(total)
        return np.where(np.isnan(estimates) | np.isnan(values["map"]), values["map"], estimates)


AS_IT_IS: Final = EstimateModel("identity", 0.0, {"map": 1.0})
"""The metric as read off the error map."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What cross-validation says of one choice: its mean absolute error, and the rank correlation of its order.

    ``spearman`` is None where the choice gives no order, or nothing is ordered by the metric.
    """

    choice: Choice
    mae: float
    spearman: float | None


@dataclass(frozen=True, slots=True)
class ChosenEstimate:
    """A fitted model, and how it was chosen; small enough to lie on a model's card.

    Attributes:
        model: of the choice, fitted on all patients.
        choice: what was chosen.
        patients: how many patients have a mask with known witnesses and truth.
        candidates: what it was chosen among; none with too few patients.
        ordered_by: where the constant was chosen, the witness whose order it keeps.
    """

    model: EstimateModel = AS_IT_IS
    choice: Choice = "map"
    patients: int = 0
    candidates: tuple[Candidate, ...] = ()
    ordered_by: WitnessName | None = None


NOTHING_CHOSEN: Final = ChosenEstimate()


@dataclass(frozen=True, slots=True, eq=False)
class KnownMasks:
    """Masks with a known truth: arrays over masks, of unseen patients.

    Attributes:
        values: of each witness.
        true: the true metric.
        patients: whose mask it is, as numbers.
    """

    values: WitnessValues
    true: Values
    patients: npt.NDArray[np.int64]

    def where(self, chosen: BoolArray) -> KnownMasks:
        """Some of the masks, patients' numbers as they are."""
        return KnownMasks({n: v[chosen] for n, v in self.values.items()}, self.true[chosen], self.patients[chosen])

    @property
    def count(self) -> int:
        """The number of patients."""
        return len(np.unique(self.patients))

    def per_patient(self, numbers: Values) -> Values:
        """The mean over each patient's masks of one number a mask: patients count alike."""
        index = np.unique(self.patients, return_inverse=True)[1]
        return np.asarray(np.bincount(index, numbers) / np.bincount(index), np.float64)


def known_masks(
    values: Mapping[WitnessName, Sequence[float | None] | Values],
    true: Sequence[float | None] | Values,
    patients: Sequence[str],
) -> KnownMasks:
    """Masks of which the truth and all witnesses are known; the others are left out.

    Patients are numbered in the order of their names, those of all masks given.

    Raises:
        ValueError: if they differ in length.
    """
    arrays = {name: np.array(v, np.float64) for name, v in values.items()}
    truth, names = np.array(true, np.float64), np.array(patients, np.str_)
    if {a.shape for a in arrays.values()} | {truth.shape} != {names.shape}:
        sizes = ", ".join(str(a.size) for a in arrays.values())
        raise ValueError(
            f"estimates are fitted on a number, a truth and a patient of each mask, got {sizes}, {truth.size} and "
            f"{names.size}"
        )
    defined = np.isfinite(truth) & np.all([np.isfinite(a) for a in arrays.values()], axis=0)
    index = np.unique(names, return_inverse=True)[1].astype(np.int64)
    return KnownMasks({n: a[defined] for n, a in arrays.items()}, truth[defined], index[defined])


def iou_of_dice(dice: float) -> float:
    """The IoU of a mask with this Dice.

    >>> round(iou_of_dice(0.8), 3)
    0.667
    """
    return dice / (2.0 - dice)


def arvd_of_dice(dice: float) -> float:
    """The ARVD of a mask with this Dice that is as large as the truth.

    >>> round(arvd_of_dice(0.8), 3)
    0.4
    """
    return 2.0 * (1.0 - dice)


def fit_estimates(
    structures: Sequence[KnownMasks], metric: MetricName, choices: Sequence[Choice]
) -> tuple[ChosenEstimate, ...]:
    """Choose a kind of model by cross-validation over patients, and fit it on the masks of each structure.

    All structures have the same choice: the worst one of a scan is then the worst by one measure, and there is more to
    choose by. Errors and orders are means over structures, with the patient as unit.

    A Dice orders scans. A choice whose order is worse than the best one by more than two standard errors of the
    difference is out. Of the others, the first one of ``choices`` is taken whose error is within two standard errors
    of the least, by the patients' paired differences, or within 0.005 of it, which is of no consequence; with one
    standard error, luck would choose among so many. A constant that comes
    last is a last resort: used only where all others are worse by more than two standard errors. It keeps the order of
    the best witness that is better than chance, of the map where none is: its estimates differ by almost nothing.

    Args:
        structures: masks with known truth, whose patients are numbered alike; the networks must not have trained from
            these patients.
        metric: what is estimated.
        choices: the candidates, the simplest first. Those of witnesses that the masks lack are left out.

    Returns:
        One of each structure; as read off the error map where a structure has fewer than `MIN_PATIENTS` patients.
    """
    tried = [_try(masks, metric, choices) if masks.count >= MIN_PATIENTS else None for masks in structures]
    choice = _choose([trial for trial in tried if trial is not None])
    return tuple(
        trial.fit(choice) if trial is not None else ChosenEstimate(patients=masks.count)
        for trial, masks in zip(tried, structures, strict=True)
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """What cross-validation says of one structure's masks.

    Attributes:
        masks, metric: what was tried.
        ordered_by: the witness whose order a constant keeps.
        errors: of each choice, every patient's mean absolute error.
        orders: of each choice; of the Dice only.
    """

    masks: KnownMasks
    metric: MetricName
    ordered_by: WitnessName
    errors: dict[Choice, Values]
    orders: dict[Choice, _Order]

    def fit(self, choice: Choice) -> ChosenEstimate:
        """The choice's model, fitted on all masks, and the record of how it was chosen."""
        return ChosenEstimate(
            model=_fit(self.masks, self.metric, choice, self.ordered_by),
            choice=choice,
            patients=self.masks.count,
            candidates=tuple(
                Candidate(c, float(errors.mean()), self.orders[c].correlation if c in self.orders else None)
                for c, errors in self.errors.items()
            ),
            ordered_by=self.ordered_by if choice == "constant" and self.metric == "dice" else None,
        )


def _try(masks: KnownMasks, metric: MetricName, choices: Sequence[Choice]) -> _Trial:
    ordered_by = _best_order(masks)
    known = [choice for choice in choices if _needs(choice) <= masks.values.keys()]
    estimates = {choice: _cross_validated(masks, metric, choice, ordered_by) for choice in known}
    errors = {choice: masks.per_patient(np.abs(e - masks.true)) for choice, e in estimates.items()}
    orders: dict[Choice, _Order] = {}
    if metric == "dice":
        orders = {c: _order_of(_ordering(masks, c, e, ordered_by), masks) for c, e in estimates.items()}
    return _Trial(masks, metric, ordered_by, errors, orders)


def _choose(trials: Sequence[_Trial]) -> Choice:
    """The choice for all structures, see `fit_estimates`."""
    if not trials:
        return "map"
    numbers = np.concatenate([np.unique(trial.masks.patients) for trial in trials])
    index = np.unique(numbers, return_inverse=True)[1]

    def over_structures(of_patients: Sequence[Values]) -> Values:
        return np.asarray(np.bincount(index, np.concatenate(of_patients)) / np.bincount(index), np.float64)

    errors = {choice: over_structures([t.errors[choice] for t in trials]) for choice in trials[0].errors}
    allowed = list(errors)
    if trials[0].orders:
        found = {choice: [t.orders[choice] for t in trials] for choice in errors}
        allowed = _keeping_order(
            {
                choice: _Order(float(np.mean([o.correlation for o in of])), over_structures([o.influence for o in of]))
                for choice, of in found.items()
            }
        )
    last_resort = len(allowed) > 1 and allowed[-1] == "constant"
    usual = allowed[:-1] if last_resort else allowed
    best = min(usual, key=lambda choice: float(errors[choice].mean()))
    if last_resort and not _within_noise(errors[best] - errors["constant"]):
        return "constant"
    negligible = _NEGLIGIBLE if trials[0].metric == "dice" else 0.0
    more = {choice: errors[choice] - errors[best] for choice in usual}
    return next(choice for choice in usual if more[choice].mean() <= negligible or _within_noise(more[choice]))


def _needs(choice: Choice) -> set[WitnessName]:
    if choice == "pooled":
        return {"map", "soft"}
    if choice == "stack":
        return {"map", "soft", "entropy", "size"}
    return {choice} if choice in ("soft", "entropy", "size", "dice") else {"map"}


def _fit(masks: KnownMasks, metric: MetricName, choice: Choice, ordered_by: WitnessName) -> EstimateModel:
    """A choice's model, fitted on masks."""
    if choice == "map":
        return AS_IT_IS
    if choice == "dice":
        return EstimateModel("identity", 0.0, {"dice": 1.0})
    if choice == "line" and metric == "dice":
        return _ridge(masks, ("map",), {"map": 1.0})
    if choice == "line" or choice == "straight":
        line = fit_calibration(masks.values["map"], masks.true, metric=metric)
        return EstimateModel("identity", line.intercept, {"map": line.slope})
    if choice == "constant":
        return _constant(masks, metric, ordered_by)
    if choice == "pooled":
        return _pooled(masks)
    if choice == "stack":
        return _ridge(masks, ("map", "soft", "entropy", "size"), _POOLED)
    level = float(masks.per_patient(_logit(masks.true)).mean())
    return replace(_ridge(masks, (choice,), {choice: _ALONE[choice]}, level), known=_known_range(masks))


def _constant(masks: KnownMasks, metric: MetricName, ordered_by: WitnessName) -> EstimateModel:
    """The median truth; near it, in the order of a witness."""
    known = _known_range(masks)
    if metric != "dice":
        return EstimateModel("identity", float(np.median(masks.per_patient(masks.true))), {}, known)
    feature = masks.per_patient(_feature(ordered_by, masks.values[ordered_by]))
    weight = _ORDER_SLOPE / max(float(feature.std()), 1e-6)
    level = float(np.median(masks.per_patient(_logit(masks.true))))
    return EstimateModel("logit", level - weight * float(np.median(feature)), {ordered_by: weight}, known)


def _known_range(masks: KnownMasks) -> tuple[float, float]:
    """Where a model that does not look at the map holds.

    That the map tells nothing was seen of these masks. Where it says something else of one than of any of them, as of
    another scanner's scans, nobody has seen that, and the map is what there is to go by.
    """
    return float(masks.values["map"].min()), float(masks.values["map"].max())


def _pooled(masks: KnownMasks) -> EstimateModel:
    """The map's logit, lowered where the network that made the mask is less sure than it usually is.

    A logarithmic pool of the map's Dice and the soft output's, the latter's mean made zero: soft outputs are far too
    optimistic. Its weight is fixed: masks that the labelled patients do not have, of another scanner, are where it is
    of use, so it cannot be fitted on them.
    """
    centre = float(masks.per_patient(_feature("soft", masks.values["soft"])).mean())
    return EstimateModel("logit", -_POOLED["soft"] * centre, dict(_POOLED))


def _ridge(
    masks: KnownMasks, names: Sequence[WitnessName], prior: Mapping[WitnessName, float], level: float = 0.0
) -> EstimateModel:
    """The logit of the Dice as a level and a sum over witnesses, by least squares, ridge towards what is given.

    Least squares alone make the function of a few patients, who are much alike, nearly flat: of scans of another site
    it would say that they are as good. Residuals are weighted so that they are about those of the Dice, and so that a
    patient counts once.
    """
    features = np.stack([_feature(name, masks.values[name]) for name in names], axis=1)
    centres = [
        0.0 if n == "map" else float(masks.per_patient(f).mean()) for n, f in zip(names, features.T, strict=True)
    ]
    truth = np.clip(masks.true, _EDGE, 1 - _EDGE)
    counts = np.bincount(masks.patients)[masks.patients]
    weights = truth * (1 - truth) / _RESIDUAL / np.sqrt(counts)
    # the intercept may be negative: as a difference of two numbers that may not
    design = np.column_stack([np.ones(truth.size), -np.ones(truth.size), features - centres])
    beliefs = np.eye(1 + len(names))
    beliefs = np.column_stack([beliefs[:, 0], -beliefs[:, 0], beliefs[:, 1:]])
    wanted = np.array([0.0, *(prior.get(name, 0.0) for name in names)])
    up, down, *found = nnls(
        np.vstack([design * weights[:, None], beliefs / _PRIOR]),
        np.concatenate([(_logit(truth) - level) * weights, wanted / _PRIOR]),
    )[0]
    used = {name: float(weight) for name, weight in zip(names, found, strict=True) if weight > 0}
    return EstimateModel("logit", float(level + up - down - np.dot(found, centres)), used)


def _cross_validated(masks: KnownMasks, metric: MetricName, choice: Choice, ordered_by: WitnessName) -> Values:
    """Each mask's estimate by a model that was fitted without its patient."""
    numbers = np.unique(masks.patients, return_inverse=True)[1]
    estimates = np.empty(masks.true.size)
    for part in range(min(_PARTS, masks.count)):
        left_out = numbers % _PARTS == part
        model = _fit(masks.where(~left_out), metric, choice, ordered_by)
        estimates[left_out] = model.apply(masks.where(left_out).values)
    low, high = METRIC_RANGES[metric]
    return np.clip(estimates, low, high)


def _ordering(masks: KnownMasks, choice: Choice, estimates: Values, ordered_by: WitnessName) -> Values:
    """What orders masks: of one witness it is the witness, whatever was fitted; of several what cross-validation gave.

    Estimates by models of different parts cannot be compared as closely as one witness's values.
    """
    if choice == "stack":
        return estimates
    if choice == "pooled":
        return EstimateModel("logit", 0.0, dict(_POOLED)).apply(masks.values)
    if choice == "constant":
        return masks.values[ordered_by]
    return masks.values["map" if choice in ("map", "line", "straight") else choice]  # type: ignore[index]


def _best_order(masks: KnownMasks) -> WitnessName:
    """The witness whose order is best, where it is better than chance; else the map."""
    found = {name: _order_of(values, masks).correlation for name, values in masks.values.items()}
    best = max(found, key=lambda name: found[name])
    return best if found[best] > _CHANCE / np.sqrt(masks.count - 1) else "map"


def _keeping_order(orders: Mapping[Choice, _Order]) -> list[Choice]:
    """The choices whose order is not worse than the best one beyond its noise."""
    best = max(orders.values(), key=lambda order: order.correlation)
    return [
        choice
        for choice, order in orders.items()
        if best.correlation - order.correlation <= _NOISE * _standard_error(best.influence - order.influence)
    ]


def _within_noise(differences: Values) -> bool:
    return bool(differences.mean() <= _NOISE * _standard_error(differences))


def _standard_error(of_patients: Values) -> float:
    return float(of_patients.std(ddof=1) / np.sqrt(of_patients.size))


@dataclass(frozen=True, slots=True, eq=False)
class _Order:
    """Spearman's correlation of an order with the truth, and each patient's influence on it."""

    correlation: float
    influence: Values


def _order_of(values: Values, masks: KnownMasks) -> _Order:
    """How well values order masks, each patient counting once; a correlation of 0 where one side is flat."""
    weights = 1.0 / np.bincount(masks.patients)[masks.patients]
    x, y = (_standardised(_ranks(v, weights), weights) for v in (values, masks.true))
    correlation = float(np.dot(weights, x * y) / weights.sum())
    return _Order(correlation, masks.per_patient(x * y - correlation * (x * x + y * y) / 2))


def _standardised(values: Values, weights: Values) -> Values:
    centred = values - np.dot(weights, values) / weights.sum()
    deviation = np.sqrt(np.dot(weights, centred * centred) / weights.sum())
    return np.asarray(centred / deviation if deviation > 0 else centred, np.float64)


def _ranks(values: Values, weights: Values) -> Values:
    """The weight of what is below each value, and half of what equals it."""
    index = np.unique(values, return_inverse=True)[1]
    of_value = np.bincount(index, weights)
    return np.asarray((np.cumsum(of_value) - of_value / 2)[index], np.float64)


def _feature(name: WitnessName, values: Values) -> Values:
    """A witness on a scale on which it adds to a logit."""
    if name in ("map", "soft"):
        return _logit(values)
    if name == "entropy":
        return np.asarray(-np.log(np.maximum(-values, _MIN_ENTROPY)), np.float64)
    return np.maximum(values, _MIN_SIZE)


def _logit(dice: Values) -> Values:
    p = np.clip(dice, _EDGE, 1 - _EDGE)
    return np.asarray(np.log(p / (1 - p)), np.float64)


def _expit(z: Values) -> Values:
    return np.asarray(1 / (1 + np.exp(-np.clip(z, -30, 30))), np.float64)
