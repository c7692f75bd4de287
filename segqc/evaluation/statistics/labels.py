"""The numbers of judged masks: by who made them, by kind of error, and by how good they are.

Masks of one patient are not independent: every interval is a bootstrap by patient.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from segqc.evaluation.experiments.labels import ESTIMATORS, OF_NETWORKS, ORIGINS, TOLD, VIEWS, JudgedMask, Origin, View
from segqc.quality.estimation import (
    LEVEL,
    Comparison,
    ConfidenceInterval,
    Scores,
    Verdict,
    holm_verdicts,
    lost_in_worst,
    paired,
    patient_index,
    percentile_interval,
    rank_regret,
    scores,
    with_resamples,
)
from segqc.quality.metrics import Values
from segqc.training.implanted_errors import ERROR_KINDS, ErrorKind

CONSTANT: Final = "best constant"
BANDS: Final = (0.0, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Edges of the bands of the true Dice; a mask that is right is in none."""
GOOD: Final = 0.95
"""Above it, masks with an error are told from untouched ones by themselves, too."""
DRAWS: Final = 1000
_LINE_FOLDS: Final = 5
_CALIBRATING: Final[tuple[Origin, ...]] = ("untouched", "implanted")
_MIN_FOR_LINE: Final = 3  # patients

_Masks: TypeAlias = Sequence[JudgedMask]


def of_origin(masks: _Masks, *origins: Origin) -> list[JudgedMask]:
    """The masks of some origins."""
    return [mask for mask in masks if mask.origin in origins]


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatorNumbers:
    """What one estimator's Dice of the masks of one origin is worth.

    Attributes:
        origin, estimator: of whose masks, and who estimates.
        scores: errors and correlations; `scores.median_mae` is the error of the best constant.
        mean: the mean estimate.
        regret: what the order loses, see `rank_regret`.
        lost: the true Dice lost in the worst tenth, see `lost_in_worst`.
        mae_after_line: the error after a line of its own, fitted on other patients; None with too few.
    """

    origin: Origin
    estimator: str
    scores: Scores
    mean: float
    regret: float | None
    lost: float | None
    mae_after_line: float | None


def estimator_numbers(masks: _Masks) -> list[EstimatorNumbers]:
    """The numbers of each estimator on the masks of each origin that it says something of."""
    found = []
    for origin, estimator in itertools.product(ORIGINS, ESTIMATORS):
        of = of_origin(masks, origin)
        known = [(m, e) for m in of if (e := m.estimates[estimator]) is not None]
        if not known:
            continue
        said, true, patients = [e for _, e in known], [m.dice for m, _ in known], [m.patient for m, _ in known]
        after = None if len(known) < len(of) else after_line(masks, origin, estimator)
        found.append(
            EstimatorNumbers(
                origin=origin,
                estimator=estimator,
                scores=scores(said, true, patients),
                mean=float(np.mean(said)),
                regret=rank_regret(said, true),
                lost=lost_in_worst(said, true),
                mae_after_line=None if after is None else float(np.abs(np.array(after) - true).mean()),
            )
        )
    return found


def after_line(masks: _Masks, origin: Origin, estimator: str) -> list[float] | None:
    """Estimates of the masks of one origin after a line of least squares, fitted on other patients in five parts.

    As SegQC-Net's are calibrated, there is one line for people's masks, fitted on experts' as they are and with
    implanted errors, and one for each kind of networks' masks.

    Returns:
        The estimates, in [0, 1]; None with fewer than three patients, or where one is missing.
    """
    fitted = [origin] if origin in OF_NETWORKS else list(_CALIBRATING)
    of, others = of_origin(masks, origin), of_origin(masks, *fitted)
    names, part = sorted({m.patient for m in masks}), dict[str, int]()
    for number, i in enumerate(np.random.default_rng(0).permutation(len(names))):
        part[names[int(i)]] = number % _LINE_FOLDS
    known = [(m, e) for m in others if (e := m.estimates[estimator]) is not None]
    if len({m.patient for m, _ in known}) < _MIN_FOR_LINE or any(m.estimates[estimator] is None for m in of):
        return None
    lines = {}
    for number in sorted({part[m.patient] for m in of}):
        pairs = [(e, m.dice) for m, e in known if part[m.patient] != number]
        if not pairs:
            return None
        x, y = np.array(pairs, np.float64).T
        lines[number] = np.polyfit(x, y, 1) if np.ptp(x) > 0 else np.array([0.0, y.mean()])
    return [float(np.clip(np.polyval(lines[part[m.patient]], m.estimates[estimator] or 0.0), 0, 1)) for m in of]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToldAgainst:
    """SegQC-Net, told who made the mask, against another estimator, by the mean absolute error on the same masks."""

    origin: Origin
    other: str
    comparison: Comparison
    verdict: Verdict


def comparisons(masks: _Masks) -> list[ToldAgainst]:
    """SegQC-Net, told, against the others on the masks of each origin, which are one family of tests.

    The others stand as they are, and after a line of their own, as SegQC-Net's estimates are calibrated.
    """
    found = []
    for origin in ORIGINS:
        of = of_origin(masks, origin)
        true, patients = [m.dice for m in of], [m.patient for m in of]
        told = [m.estimates[TOLD] for m in of]
        others: dict[str, list[float | None]] = {}
        for name in ESTIMATORS:
            said = [m.estimates[name] for m in of]
            known = [e for e in said if e is not None]
            if name == TOLD or not known or said == told:
                continue
            others[name] = said
            if (after := after_line(masks, origin, name)) is not None:
                others[f"{name}, after a line"] = list(after)
        if of:
            others[CONSTANT] = [float(np.median(true))] * len(of)
        of_others = [paired(told, said, true, patients, generator=np.random.default_rng(0)) for said in others.values()]
        for name, comparison, verdict in zip(others, of_others, holm_verdicts(of_others), strict=True):
            found.append(ToldAgainst(origin=origin, other=name, comparison=comparison, verdict=verdict))
    return found


# ---------------------------------------------------------------------------------------------- shares, with intervals


def share(masks: _Masks, part: Callable[[JudgedMask], float], of: Callable[[JudgedMask], float]) -> ConfidenceInterval:
    """One sum over the masks in relation to another, with its bootstrap interval."""
    index, count = patient_index([m.patient for m in masks])
    weights = with_resamples(count, DRAWS, np.random.default_rng(0)) if count else np.zeros((1, 0), np.int64)
    sums = [weights @ np.bincount(index, [value(m) for m in masks], minlength=count) for value in (part, of)]
    drawn: Values = np.divide(sums[0], sums[1], out=np.full(len(weights), np.nan), where=sums[1] > 0)
    return percentile_interval(drawn[0], drawn[1:], LEVEL)


def mean(masks: _Masks, of: Callable[[JudgedMask], float | None]) -> ConfidenceInterval:
    """The mean of a number of the masks that have it, with its bootstrap interval."""
    return share([m for m in masks if of(m) is not None], lambda m: of(m) or 0.0, lambda _: 1.0)


def auroc(wrong: _Masks, right: _Masks, estimator: str = TOLD) -> ConfidenceInterval:
    """How well an estimate tells masks with an error from those without: the area under the ROC curve, with interval.

    Undefined where there is nothing of one of the two, or an estimate is missing.
    """
    masks = [*(m for m in wrong if m.dice < 1), *right]
    said = [m.estimates[estimator] for m in masks]
    known = np.array([e for e in said if e is not None], np.float64)
    is_wrong = np.array([m.dice < 1 for m in masks], bool)
    if len(known) < len(said) or len(np.unique(is_wrong)) < 2:
        return ConfidenceInterval(None, None, None, LEVEL, 0)
    low, high = known[is_wrong][:, None], known[~is_wrong][None]
    wins = (low < high) + 0.5 * (low == high)  # of each pair of masks
    index, count = patient_index([m.patient for m in masks])
    copies = with_resamples(count, DRAWS, np.random.default_rng(0))[:, index]
    of_wrong, of_right = copies[:, is_wrong], copies[:, ~is_wrong]
    pairs = of_wrong.sum(axis=1) * of_right.sum(axis=1)
    won = ((of_wrong @ wins) * of_right).sum(axis=1)
    drawn: Values = np.divide(won, pairs, out=np.full(len(copies), np.nan), where=pairs > 0)
    return percentile_interval(drawn[0], drawn[1:], LEVEL)


def found_errors(masks: _Masks, view: View) -> ConfidenceInterval:
    """The share of the errors to be found that a box of a view touches."""
    return share(masks, lambda m: m.boxes[view].found, lambda m: m.errors)


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorGroup:
    """Masks with implanted errors that have something in common, beside untouched ones.

    Attributes:
        name: what they have in common.
        masks: how many.
        true_dice, mae: the mean true Dice, and SegQC-Net's error.
        auroc: of telling them from untouched masks, by each estimator that says something of them.
        errors: how many are to be found.
        found: the share that boxes of each view touch.
    """

    name: str
    masks: int
    true_dice: float
    mae: float | None
    auroc: Mapping[str, ConfidenceInterval]
    errors: int
    found: Mapping[View, ConfidenceInterval]


def by_kind(masks: _Masks) -> list[ErrorGroup]:
    """The masks with implanted errors by kind of error; one with several kinds is in several groups."""

    def of_kind(kind: ErrorKind) -> list[JudgedMask]:
        return [m for m in of_origin(masks, "implanted") if kind in m.kinds]

    return [_group(kind, found, masks) for kind in ERROR_KINDS if (found := of_kind(kind))]


def by_band(masks: _Masks) -> list[ErrorGroup]:
    """The masks with implanted errors: all of them, and by their true Dice."""
    implanted = of_origin(masks, "implanted")
    groups = [_group("0 to 1", implanted, masks)] if implanted else []
    for low, high in itertools.pairwise(BANDS):
        found = [m for m in implanted if low <= m.dice < high]
        if found:
            groups.append(_group(f"{low:.2f} to {high:.2f}", found, masks))
    return groups


def _group(name: str, found: _Masks, masks: _Masks) -> ErrorGroup:
    untouched = of_origin(masks, "untouched")
    told = [abs(e - m.dice) for m in found if (e := m.estimates[TOLD]) is not None]
    areas = {estimator: auroc(found, untouched, estimator) for estimator in ESTIMATORS}
    return ErrorGroup(
        name=name,
        masks=len(found),
        true_dice=float(np.mean([m.dice for m in found])),
        mae=float(np.mean(told)) if told else None,
        auroc={estimator: area for estimator, area in areas.items() if area.value is not None},
        errors=sum(m.errors for m in found),
        found={view: found_errors(found, view) for view in VIEWS if all(view in m.boxes for m in found)},
    )


def views_of(masks: _Masks) -> list[View]:
    """The views whose boxes are known of all masks."""
    return [view for view in VIEWS if all(view in m.boxes for m in masks)]


def higher_than_before(masks: _Masks) -> ConfidenceInterval:
    """The share of half corrected masks that are estimated higher than the served mask they were made of."""
    before = {m.scan: m.estimates[TOLD] for m in of_origin(masks, "served")}

    def is_higher(mask: JudgedMask) -> float | None:
        now, then = mask.estimates[TOLD], before.get(mask.scan)
        return None if now is None or then is None else float(now > then)

    return mean(of_origin(masks, "half corrected"), is_higher)


def headline(masks: _Masks) -> dict[str, ConfidenceInterval]:
    """What people's masks get, in one number each, with intervals."""
    implanted, untouched = of_origin(masks, "implanted"), of_origin(masks, "untouched")

    def error(mask: JudgedMask) -> float | None:
        told = mask.estimates[TOLD]
        return None if told is None else abs(told - mask.dice)

    found = {
        "errors implanted: mean absolute error": mean(implanted, error),
        "errors implanted: intervals that hold": mean(implanted, lambda m: m.covered),
        "untouched: estimated Dice": mean(untouched, lambda m: m.estimates[TOLD]),
        "half corrected: estimated higher than before": higher_than_before(masks),
        "AUROC, errors implanted or untouched": auroc(implanted, untouched),
        f"AUROC, true Dice over {GOOD}": auroc([m for m in implanted if m.dice > GOOD], untouched),
    }
    for view in views_of(masks):
        found[f"errors found, {view} boxes"] = found_errors(implanted, view)
        found[f"false boxes an untouched scan, {view} boxes"] = mean(untouched, _boxes_of(view))
    return found


def _boxes_of(view: View) -> Callable[[JudgedMask], float]:
    return lambda mask: float(mask.boxes[view].boxes)
