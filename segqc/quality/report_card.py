"""The report card of a bundle: what its estimates are worth on masks of patients that it has not seen.

A SegQC-Net is trained with cross-fitting, so that each labelled patient has a mask made by a network that has not
trained from it, and an estimate of this mask that nothing of the patient went into. Against the labels these say how
good the estimates of the waiting scans will be: whether they are better than always answering one number, and whether
their order is better than chance. Where they are not, users are told so, and scans are not handed out in this order.

Several scans of one patient are not independent: intervals are bootstraps by patient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeAlias

import numpy as np
from pydantic import JsonValue, TypeAdapter

from segqc.quality.error_counts import ErrorMapCounts, SignedCounts
from segqc.quality.estimation import (
    ConfidenceInterval,
    interval,
    patient_index,
    percentile_interval,
    rank_regret,
    resampled,
    scores,
    with_resamples,
)
from segqc.quality.intervals import LEVEL as INTERVAL_LEVEL
from segqc.quality.intervals import patients_needed
from segqc.quality.metrics import MetricName, Values
from segqc.quality.witnesses import ORDERS, UNLIKENESS, worst_witness
from segqc.types import Metrics, PredictionInterval, Unlikeness, applying

EstimateVerdict: TypeAlias = Literal["better than the constant", "not better than the constant", "too few patients"]
OrderVerdict: TypeAlias = Literal["better than chance", "not better than chance", "too few patients"]

WORST: Final = "worst structure"
BY_ESTIMATE: Final = "segqc"
AT_RANDOM: Final = "uniform-random"
"""Names of strategies: that of the estimates' order, and that of no order at all."""
MIN_PATIENTS: Final = patients_needed()
PRECISION: Final = 0.5
_LEVEL: Final = 0.9  # of the card's confidence intervals: a verdict in favour is wrong one time in twenty
_SURE: Final = 0.95  # of the interval beyond which estimates are worse than those that serve
_DRAWS: Final = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class UnseenMask:
    """One structure of a mask as it is served, of a patient that neither network has seen.

    Attributes:
        patient, scan: whose mask it is.
        structure: the structure's name.
        true: its true metrics.
        estimated: the estimates to show, made without anything of the patient.
        interval: the prediction interval of the Dice, made likewise; None where there are too few patients for one.
        witnesses: other numbers that are lower for worse masks, by the names that scores and leases have them under.
        errors: the voxels of the error map against the true errors.
        unlikeness: how unlike the other patients' the scan is; None where nobody knows.
    """

    patient: str
    scan: str
    structure: str
    true: Metrics
    estimated: Metrics
    interval: PredictionInterval | None
    errors: SignedCounts
    witnesses: Mapping[str, float] = field(default_factory=dict)
    unlikeness: Unlikeness | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BesideConstant:
    """A mean absolute error, and that of the best constant in hindsight: the median of the true values."""

    mae: float
    constant_mae: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundErrors:
    """The share of wrong tissue that an error map finds, by volume; None where no tissue is wrong.

    Attributes:
        at_half: of a probability of one half or more.
        at_precision: above the lowest probability at which `PRECISION` of what is found is wrong.
    """

    at_half: float | None
    at_precision: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What estimates are worth; numbers are None where they are undefined.

    Attributes:
        true_dice: the mean true Dice.
        dice: the error of the estimated Dice.
        ratio: this error over the constant's; under 1, the estimate is better than a constant.
        spearman: the rank correlation of estimated and true Dice; over 0, the order is better than chance.
        regret: what the order loses, see `estimation.rank_regret`.
        coverage: the share of prediction intervals that hold the truth, of scans that are not marked as unlike the
            others, each patient counting once.
        rvd, abs_rvd, arvd: the errors of the estimated RVD, of its size, and of the estimated ARVD.
        missed, included: what the error map finds of tissue that the mask lacks, and of tissue that it should lack.
    """

    true_dice: float
    dice: BesideConstant
    ratio: ConfidenceInterval
    spearman: ConfidenceInterval
    regret: float | None
    coverage: float | None
    rvd: BesideConstant | None = None
    abs_rvd: BesideConstant | None = None
    arvd: BesideConstant | None = None
    missed: FoundErrors | None = None
    included: FoundErrors | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureReport:
    """What the estimates of one structure, or of each scan's worst one (`WORST`), are worth.

    ``figures`` is None under `MIN_PATIENTS` patients: their numbers would say nothing of the next patient.
    """

    structure: str
    patients: int
    scans: int
    figures: Figures | None

    @property
    def estimate_verdict(self) -> EstimateVerdict:
        """Whether the estimated Dice has a smaller error than the best constant, beyond the interval."""
        if self.figures is None:
            return "too few patients"
        high = self.figures.ratio.high
        return "better than the constant" if high is not None and high < 1 else "not better than the constant"

    @property
    def order_verdict(self) -> OrderVerdict:
        """Whether the order of the estimates agrees with the true one, beyond the interval."""
        if self.figures is None:
            return "too few patients"
        return "better than chance" if _is_order(self.figures.spearman) else "not better than chance"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedScan:
    """The true and the estimated Dice of a scan's worst structure: what scans are ranked by."""

    patient: str
    scan: str
    true: float
    estimated: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportCard:
    """What a bundle's estimates are worth on masks of patients that it has not seen.

    Attributes:
        worst: of each scan's worst structure: what scans are ranked by, and the verdicts are about.
        structures: of each structure.
        witnesses: the rank correlation of each witness with the true Dice, by its name.
        scans: the numbers behind ``worst``, to compare two cards by.
        marked: how many of these are marked as unlike the others; None where scans have no such number.
        checks_all: whether every labelled patient could be checked, and not only those that validate.
    """

    worst: StructureReport
    structures: tuple[StructureReport, ...]
    witnesses: Mapping[str, ConfidenceInterval]
    scans: tuple[CheckedScan, ...]
    marked: int | None = None
    checks_all: bool = True

    @property
    def ranked_by(self) -> str:
        """The strategy whose order scans are handed out in where the estimates' order is asked for.

        The estimates' own, unless it is known not to be better than chance; then that of the best witness that is, or
        else the scans that are most unlike the training's come first; where nobody knows these, a draw at random.
        """
        if self.worst.order_verdict != "not better than chance":
            return BY_ESTIMATE
        orders = {name: found.value for name, found in self.witnesses.items() if _is_order(found)}
        otherwise = AT_RANDOM if self.marked is None else UNLIKENESS
        return max(orders, key=lambda name: (orders[name] or 0.0, name), default=otherwise)


_CARD: Final = TypeAdapter(ReportCard)


def _is_order(spearman: ConfidenceInterval) -> bool:
    return spearman.low is not None and spearman.low > 0


def report_card(masks: Sequence[UnseenMask], *, checks_all: bool = True, seed: int = 0) -> ReportCard:
    """Make the report card of estimates of masks of unseen patients.

    Args:
        masks: each structure of each mask; one mask a scan.
        checks_all: whether they are of all labelled patients; else of those that validate.
        seed: of the bootstrap draws.
    """
    by_scan: dict[str, list[UnseenMask]] = {}
    for mask in masks:
        by_scan.setdefault(mask.scan, []).append(mask)
    scans = [scan for of_scan in by_scan.values() if (scan := _worst(of_scan)) is not None]
    names = dict.fromkeys(mask.structure for mask in masks)
    worst = _report(WORST, scans, seed)
    return ReportCard(
        worst=worst,
        structures=tuple(_of_structure(name, [m for m in masks if m.structure == name], seed) for name in names),
        witnesses=_witness_orders(scans, seed) if worst.figures is not None else {},
        scans=tuple(CheckedScan(patient=s.patient, scan=s.scan, true=s.true, estimated=s.estimated) for s in scans),
        marked=_marked([by_scan[s.scan][0].unlikeness for s in scans]),
        checks_all=checks_all,
    )


def _marked(scans: Sequence[Unlikeness | None]) -> int | None:
    known = [unlikeness for unlikeness in scans if unlikeness is not None]
    return sum(unlikeness.is_marked for unlikeness in known) if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scan:
    """One number of a scan, of one structure or of the worst one."""

    patient: str
    scan: str
    true: float
    estimated: float
    interval: PredictionInterval | None
    witnesses: Mapping[str, float]


def _worst(structures: Sequence[UnseenMask]) -> _Scan | None:
    """A scan as it is ranked: by its worst structure, as each witness sees it; None without a defined Dice."""
    known = [(m.estimated.dice, m) for m in structures if m.estimated.dice is not None]
    true = [m.true.dice for m in structures if m.true.dice is not None]
    if not known or not true:
        return None
    estimated, lowest = min(known, key=lambda pair: pair[0])
    said = [m.witnesses for m in structures]
    witnesses = {name: worst_witness(name, said) for name in structures[0].witnesses}
    return _Scan(
        patient=lowest.patient,
        scan=lowest.scan,
        true=min(true),
        estimated=estimated,
        interval=lowest.interval,
        witnesses={name: value for name, value in witnesses.items() if value is not None},
    )


def _of_structure(name: str, masks: Sequence[UnseenMask], seed: int) -> StructureReport:
    scans = [scan for mask in masks if (scan := _worst([mask])) is not None]
    report = _report(name, scans, seed)
    if report.figures is None:
        return report
    counts = sum((mask.errors for mask in masks), SignedCounts())
    figures = replace(
        report.figures,
        rvd=_of_metric(masks, "rvd"),
        abs_rvd=_of_metric(masks, "rvd", abs),
        arvd=_of_metric(masks, "arvd"),
        missed=_found(counts.false_negative),
        included=_found(counts.false_positive),
    )
    return replace(report, figures=figures)


def _report(name: str, scans: Sequence[_Scan], seed: int) -> StructureReport:
    patients = [s.patient for s in scans]
    count = len(set(patients))
    if count < MIN_PATIENTS:
        return StructureReport(structure=name, patients=count, scans=len(scans), figures=None)
    estimated, true = [s.estimated for s in scans], [s.true for s in scans]
    found = scores(estimated, true, patients)
    weights = with_resamples(count, _DRAWS, np.random.default_rng(seed))
    # the same constant in all draws: their own ones would be better the fewer patients there are
    median = [float(np.median(true))] * len(true)
    mae, constant = (resampled("mae", x, true, patients, weights) for x in (estimated, median))
    ratio = np.divide(mae, constant, out=np.full_like(mae, np.nan), where=constant > 0)
    order = resampled("spearman", estimated, true, patients, weights)
    figures = Figures(
        true_dice=float(np.mean(true)),
        dice=BesideConstant(mae=found.mae or 0.0, constant_mae=found.median_mae or 0.0),
        ratio=percentile_interval(ratio[0], ratio[1:], _LEVEL),
        spearman=percentile_interval(order[0], order[1:], _LEVEL),
        regret=rank_regret(estimated, true),
        coverage=_coverage(scans),
    )
    return StructureReport(structure=name, patients=count, scans=len(scans), figures=figures)


def _coverage(scans: Sequence[_Scan]) -> float | None:
    """The share of intervals that hold the truth, of those that apply, each patient counting once; None without any."""
    held: dict[str, list[bool]] = {}
    for scan in scans:
        if (ends := applying(scan.interval)) is not None:
            held.setdefault(scan.patient, []).append(ends.low <= scan.true <= ends.high)
    return float(np.mean([np.mean(of_patient) for of_patient in held.values()])) if held else None


def _witness_orders(scans: Sequence[_Scan], seed: int) -> dict[str, ConfidenceInterval]:
    names = dict.fromkeys(name for scan in scans for name in scan.witnesses)
    return {
        name: interval(
            "spearman",
            [scan.witnesses.get(name) for scan in scans],
            [scan.true for scan in scans],
            [scan.patient for scan in scans],
            generator=np.random.default_rng(seed),
            draws=_DRAWS,
            level=_LEVEL,
        )
        for name in names
    }


def _of_metric(
    masks: Sequence[UnseenMask], metric: MetricName, of: Callable[[float], float] = float
) -> BesideConstant | None:
    def values(metrics: Sequence[Metrics]) -> list[float | None]:
        found = [getattr(m, metric) for m in metrics]
        return [None if value is None else of(value) for value in found]

    patients = [m.patient for m in masks]
    found = scores(values([m.estimated for m in masks]), values([m.true for m in masks]), patients, metric=metric)
    if found.mae is None or found.median_mae is None:
        return None
    return BesideConstant(mae=found.mae, constant_mae=found.median_mae)


def _found(counts: ErrorMapCounts) -> FoundErrors:
    return FoundErrors(at_half=counts.recall(), at_precision=counts.recall_at_precision(PRECISION))


# --------------------------------------------------------------------------------------------------- compare two cards


def is_worse(new: ReportCard, served: ReportCard) -> str | None:
    """Why estimates are worse than those that serve; None where they are not, or nobody can tell.

    Both cards are compared on the scans that both have, by the same bootstrap draws of their patients; cards of other
    structures are not compared. The new
    estimates are worse where their error is larger beyond the interval of the difference, unless the new masks differ
    more in quality, which their error then has to be measured by; or where their order is, and not because all masks
    became good.
    """
    if {s.structure for s in new.structures} != {s.structure for s in served.structures}:
        return None
    before = {s.scan: s for s in served.scans}
    pairs = [(s, before[s.scan]) for s in new.scans if s.scan in before and before[s.scan].patient == s.patient]
    patients = [s.patient for s, _ in pairs]
    count = patient_index(patients)[1]
    if count < MIN_PATIENTS:
        return None
    weights = with_resamples(count, _DRAWS, np.random.default_rng(0))
    sides = [[pair[i] for pair in pairs] for i in (0, 1)]

    def of(statistic: Literal["mae", "median_mae", "spearman"]) -> tuple[Values, Values]:
        first, second = (
            resampled(statistic, [s.estimated for s in side], [s.true for s in side], patients, weights)
            for side in sides
        )
        return first, second

    mae, constant, order = of("mae"), of("median_mae"), of("spearman")
    on = f"on {count} patients that both were checked on"
    more_error = percentile_interval(mae[0][0] - mae[1][0], mae[0][1:] - mae[1][1:], _SURE)
    is_larger_in_parts = mae[0][0] * constant[1][0] >= mae[1][0] * constant[0][0]
    if more_error.low is not None and more_error.low > 0 and is_larger_in_parts:
        return f"{on}, its estimated Dice is off by {mae[0][0]:.3f}, that of the serving bundle by {mae[1][0]:.3f}"
    less_order = percentile_interval(order[0][0] - order[1][0], order[0][1:] - order[1][1:], _SURE)
    if less_order.high is not None and less_order.high < 0 and mae[0][0] >= mae[1][0]:
        return (
            f"{on}, the rank correlation of its estimates with the true Dice is {order[0][0]:.2f}, that of the "
            f"serving bundle's {order[1][0]:.2f}"
        )
    return None


# ---------------------------------------------------------------------------------------------------------------- words


def estimate_sentence(card: ReportCard) -> str:
    """Whether the estimated Dice can be relied on, for annotators and operators."""
    worst, figures = card.worst, card.worst.figures
    if figures is None:
        return _too_few("how good the estimates are", card)
    errors = (
        f"on masks of {worst.patients} patients, made by fold networks that had not seen them and not by the one that "
        f"serves, the estimated Dice was off by {figures.dice.mae:.3f} on average, the best single number for all by "
        f"{figures.dice.constant_mae:.3f}"
    )
    if worst.estimate_verdict == "better than the constant":
        return f"The estimated Dice is better than a constant: {errors}."
    is_smaller = figures.dice.mae < figures.dice.constant_mae
    why = "that it is better than a constant may be chance" if is_smaller else "it is not better than a constant"
    return f"Do not rely on the estimated Dice; {why}: {errors}."


def people_sentence(card: ReportCard) -> str:
    """Whether the estimated Dice of people's masks can be relied on, and whether anything is proposed.

    Args:
        card: the report card of the network for people's masks.
    """
    worst, figures = card.worst, card.worst.figures
    if figures is None:
        return _too_few("how good the estimates of people's masks are", card)
    errors = (
        f"on experts' labels with implanted errors, of {worst.patients} patients that the networks had not seen, it "
        f"was off by {figures.dice.mae:.3f} on average, the best single number by {figures.dice.constant_mae:.3f}"
    )
    if is_worth_proposing(card):
        return f"The estimated Dice of people's masks is better than a constant: {errors}."
    return f"Do not rely on the estimated Dice of people's masks; nothing is proposed, as {errors}."


def is_worth_proposing(card: ReportCard | None) -> bool:
    """Whether corrections are to be proposed: unless estimates of people's masks are no better than a constant.

    Args:
        card: the report card of the network for people's masks; None where its estimates were not checked.
    """
    return card is None or card.worst.estimate_verdict != "not better than the constant"


def order_sentence(card: ReportCard, used: str | None = None) -> str:
    """Whether the order of the estimates can be relied on, and which order is used where it cannot.

    Args:
        card: the report card.
        used: the strategy whose order was used; by default the one that the card says.
    """
    worst, figures = card.worst, card.worst.figures
    if figures is None:
        return _too_few("how good the order of the estimates is", card)
    found = f"rank correlation with the true Dice {_with_interval(figures.spearman)}"
    if worst.order_verdict == "better than chance":
        return f"The order of the estimates is better than chance on {worst.patients} patients ({found})."
    used = card.ranked_by if used is None else used
    if used == BY_ESTIMATE:
        how = "Do not rely on the order of the estimates"
    else:
        how = "Ordered at random" if used == AT_RANDOM else f"Ordered {ORDERS.get(used, f'by {used}')}"
    return f"{how}: the estimates' order is not better than chance on {worst.patients} patients ({found})."


def unlikeness_sentence(card: ReportCard) -> str | None:
    """Whether scans can be marked as unlike the training's; None where scans have no number to mark them by."""
    if card.marked is None:
        return None
    if card.worst.patients < MIN_PATIENTS:
        patients = f"{card.worst.patients} of {MIN_PATIENTS} patients"
        return f"No scan is marked as unlike the training scans yet: {patients} calibrate."
    return (
        f"Scans that are unlike those of the {card.worst.patients} patients are marked, as intervals do not apply to "
        f"them; of the {len(card.scans)} scans of these patients {card.marked} would be."
    )


def messages(card: ReportCard) -> list[str]:
    """What users are told of a bundle."""
    unlike = unlikeness_sentence(card)
    return [estimate_sentence(card), order_sentence(card), *([] if unlike is None else [unlike])]


def _too_few(what: str, card: ReportCard) -> str:
    remedy = "label scans of more patients"
    if not card.checks_all:
        remedy = (
            "only patients that validate are, but all labelled ones with ensemble = true in [training] of segqc.toml; "
            f"or {remedy}"
        )
    return f"Nobody can tell yet {what}: {card.worst.patients} of {MIN_PATIENTS} patients are checked; {remedy}."


def _with_interval(number: ConfidenceInterval) -> str:
    if number.value is None:
        return "undefined"
    if number.low is None or number.high is None:
        return f"{number.value:.2f}"
    return f"{number.value:.2f}, {number.low:.2f} to {number.high:.2f}"


def to_json(card: ReportCard) -> dict[str, JsonValue]:
    """The card as clients see it: without scans and patients, with verdicts and sentences."""
    body: dict[str, JsonValue] = _CARD.dump_python(card, mode="json", exclude={"scans"})
    return {
        "estimate": card.worst.estimate_verdict,
        "order": card.worst.order_verdict,
        "ranked_by": card.ranked_by,
        "messages": list[JsonValue](messages(card)),
        "interval_level": INTERVAL_LEVEL,
        **body,
    }


def people_to_json(card: ReportCard) -> dict[str, JsonValue]:
    """The card of the network for people's masks as clients see it: as `to_json`, without an order of scans."""
    body: dict[str, JsonValue] = _CARD.dump_python(card, mode="json", exclude={"scans", "witnesses", "marked"})
    message: JsonValue = people_sentence(card)
    return {"estimate": card.worst.estimate_verdict, "messages": [message], "interval_level": INTERVAL_LEVEL, **body}
