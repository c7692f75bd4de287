"""The report of an evaluation of labels: who made the mask, and what each way to estimate its Dice is worth there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from segqc.evaluation.experiments.labels import ESTIMATORS, ORIGINS, TOLD, VIEWS, JudgedMask, Origin, View
from segqc.evaluation.labels import LabelsResult
from segqc.evaluation.report.document import Cell, Report, Section, Table
from segqc.evaluation.report.html import write_report
from segqc.evaluation.statistics.labels import (
    ErrorGroup,
    ToldAgainst,
    by_band,
    by_kind,
    comparisons,
    estimator_numbers,
    headline,
    mean,
    of_origin,
    views_of,
)
from segqc.quality.estimation import ConfidenceInterval

_ORIGIN_TITLES: Final[Mapping[Origin, str]] = {
    "untouched": "an expert's, untouched",
    "implanted": "an expert's, errors implanted",
    "second observer": "a second observer's",
    "half corrected": "the served network's, half corrected",
    "unchanged": "the served network's, submitted unchanged",
    "served": "the served network's",
    "strange": "a strange network's",
}
_TEXT: Final = (
    "Masks whose truth is known, by who made them; and what each way to estimate their Dice is worth. Each mask was "
    "judged by networks that have not trained from its patient's labels. The Dice is the mean over the structures. "
    "What a person hands in is right but for a few errors, or a network's mask that was corrected in part."
)
_ESTIMATOR_NOTE: Final = (
    "SegQC, told: SegQC-Net knows whether a person or a network made the mask, and which slices of a network's mask a "
    "person let be; not told: it takes every mask for a network's. Scan only: SegQC-Net with the mask hidden, where it "
    "was trained so. Cross-fitted mean: the mean output of the folds' networks as the truth; it may hold the network "
    "that made a strange mask. Soft output: that of the network that made the mask, or of the served one. TTA: only of "
    "served masks."
)


def write_labels_report(result: LabelsResult, folder: Path) -> Path:
    """Write the report into a folder; the path of ``report.html``."""
    return write_report(compose_labels(result), folder)


def compose_labels(result: LabelsResult) -> Report:
    """Compose the report of an evaluation of labels."""
    masks, patients = result.masks, {m.patient for m in result.masks}
    scans = {m.scan for m in masks}
    name = result.on or result.dataset
    facts = {
        "Labels": f"{name}: {len(scans)} scans of {len(patients)} patients",
        "Networks": f"{result.dataset}, bundle {result.bundle}",
        "Seed": str(result.settings.seed),
        "Run": f"{result.date}, {result.machine}",
    }
    sections = [
        Section("Estimated Dice by who made the mask", (_TEXT, *result.remarks), tables=tuple(main_tables(masks))),
        Section("Errors", tables=tuple(error_tables(masks))),
    ]
    subtitle = "What estimates of people's and networks' masks are worth, against masks whose truth is known"
    return Report(f"Evaluation of labels: {name}", subtitle, facts, tuple(sections))


def main_tables(masks: Sequence[JudgedMask]) -> list[Table]:
    """The tables of estimates."""
    return [estimator_table(masks), headline_table(masks), comparison_table(comparisons(masks)), coverage_table(masks)]


def error_tables(masks: Sequence[JudgedMask]) -> list[Table]:
    """The tables of errors: by kind, by true Dice, and what proposals are worth."""
    kind = group_table("kinds", "Masks with implanted errors, by kind of error", "kind", by_kind(masks))
    band = group_table("bands", "Masks with implanted errors, by their true Dice", "true Dice between", by_band(masks))
    return [kind, band, proposal_table(masks)]


def estimator_table(masks: Sequence[JudgedMask]) -> Table:
    """Errors and correlations of each estimator, by origin."""
    rows: list[tuple[Cell, ...]] = []
    for origin in ORIGINS:
        for of in (n for n in estimator_numbers(masks) if n.origin == origin):
            s = of.scores
            rows.append(
                (
                    *(_ORIGIN_TITLES[origin], of.estimator, s.n, s.truth_mean, of.mean),
                    *(s.mae, of.mae_after_line, s.median_mae, s.bias, s.pearson, s.spearman, of.regret, of.lost),
                )
            )
    columns = (
        *("mask", "estimator", "n", "true Dice", "estimate", "MAE", "MAE after a line", "constant", "bias"),
        *("Pearson", "Spearman", "regret", "lost in the worst tenth"),
    )
    return Table(
        "estimates",
        "Estimated 3D Dice by who made the mask, and by estimator",
        columns,
        tuple(rows),
        note=f"{_ESTIMATOR_NOTE} MAE after a line: after a line of least squares fitted on other patients, for all "
        "people's masks the same one, as SegQC-Net's estimates are calibrated. Constant: "
        "the error of the best constant. Regret: the part of the best order's gain that the order loses; 0 the best, "
        "1 a random one. Lost in the worst tenth: true Dice of the tenth with the lowest estimates, less that of the "
        "tenth that is truly the worst.",
        best={"MAE": "lowest", "MAE after a line": "lowest", "Pearson": "highest", "Spearman": "highest"},
        group="mask",
    )


def headline_table(masks: Sequence[JudgedMask]) -> Table:
    """What people's masks get, in one number each."""
    rows = tuple((name, number.value, _ends(number)) for name, number in headline(masks).items())
    return Table(
        "people",
        f"People's masks: {TOLD}",
        ("what", "value", "95% interval"),
        rows,
        note="Raw boxes are those that the panel, the check and the proposal show; extracted ones are of the map after "
        "error extraction. An error counts as found where a box touches it.",
    )


def comparison_table(found: Sequence[ToldAgainst]) -> Table:
    """SegQC-Net, told, against the others."""
    rows = tuple(
        (
            _ORIGIN_TITLES[of.origin],
            of.other,
            of.comparison.n,
            of.comparison.first,
            of.comparison.second,
            of.comparison.difference.value,
            _ends(of.comparison.difference),
            of.verdict.outcome,
        )
        for of in found
    )
    return Table(
        "comparisons",
        f"{TOLD}, against other estimators: mean absolute error of the Dice",
        ("mask", "against", "n", "MAE", "the other's", "difference", "95% interval", "SegQC, told, is"),
        rows,
        note="Patient-level bootstrap intervals of the difference; sign-flip tests over patients with Holm's "
        "adjustment over the others of one origin. What is not significant is a tie.",
        group="mask",
    )


def coverage_table(masks: Sequence[JudgedMask]) -> Table:
    """How often prediction intervals hold, by origin."""
    rows = []
    for origin in ORIGINS:
        known = [m for m in of_origin(masks, origin) if m.covered is not None]
        if known:
            held = mean(known, lambda m: m.covered)
            rows.append((_ORIGIN_TITLES[origin], len(known), held.value, _ends(held)))
    return Table(
        "coverage",
        "Prediction intervals that hold, of those that apply",
        ("mask", "n", "share", "95% interval"),
        tuple(rows),
        note="Told who made the mask; intervals of a 90% level by default.",
    )


def group_table(name: str, title: str, what: str, groups: Sequence[ErrorGroup]) -> Table:
    """Masks with implanted errors in groups."""
    views = [view for view in VIEWS if groups and all(view in g.found for g in groups)]
    estimators = [e for e in ESTIMATORS if any(e in g.auroc for g in groups)]
    rows = tuple(
        (
            *(group.name, group.masks, group.true_dice, group.mae),
            *(group.auroc[e].value if e in group.auroc else None for e in estimators),
            group.errors,
            *(cell for view in views for cell in _found(group, view)),
        )
        for group in groups
    )
    columns = (
        *(what, "n", "mean true Dice", "MAE"),
        *(f"AUROC, {estimator}" for estimator in estimators),
        "errors",
        *(column for view in views for column in (f"found, {view} boxes", f"95% interval, {view}")),
    )
    return Table(
        name,
        title,
        columns,
        rows,
        note=f"MAE: of {TOLD}. AUROC: of telling these masks from untouched ones. Errors: of single slices, that are "
        "to be found.",
    )


def proposal_table(masks: Sequence[JudgedMask]) -> Table:
    """What proposals are worth, by origin."""
    rows = []
    for view in views_of(masks):
        for origin in ORIGINS:
            of = of_origin(masks, origin)
            if of:
                worth = [m.boxes[view] for m in of]
                count = len(of)
                rows.append(
                    (
                        *(view, _ORIGIN_TITLES[origin], count, sum(w.boxes for w in worth) / count),
                        sum(m.dice for m in of) / count,
                        *(sum(w.proposed for w in worth) / count, sum(w.accepted for w in worth) / count),
                    )
                )
    return Table(
        "proposals",
        "True Dice before a proposal, and after it",
        ("boxes", "mask", "n", "boxes a mask", "before", "all boxes taken", "those that help"),
        tuple(rows),
        note="Those that help: boxes in which the proposal is nearer to the truth than the mask.",
        group="boxes",
    )


def _found(group: ErrorGroup, view: View) -> tuple[Cell, Cell]:
    share = group.found[view]
    return share.value, _ends(share)


def _ends(number: ConfidenceInterval) -> str | None:
    return None if number.low is None or number.high is None else f"{number.low:.3f} to {number.high:.3f}"
