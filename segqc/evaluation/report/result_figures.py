"""The figures of a report, from the results of experiments and from the arrays that they were computed from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from segqc.evaluation.data import predictions
from segqc.evaluation.data.mask_sources import CALIBRATION
from segqc.evaluation.data.predictions import RAW, KnownMask, Truths, load_predictions, load_truths
from segqc.evaluation.data.run import NETWORKS, Run
from segqc.evaluation.experiments.comparison import (
    ERROR_SUM,
    TTA_ENTROPY,
    Dimension,
    ExperimentName,
    ExperimentResult,
    manifest_of,
    predictions_path,
    test_masks,
    truth_path,
)
from segqc.evaluation.experiments.observers import ERROR_KINDS, ObserverExperiment
from segqc.evaluation.methods.estimates import Estimator
from segqc.evaluation.methods.registry import (
    CONSTANT,
    CROSS_FITTED,
    EXTRACTED_MAP,
    SCAN_ONLY,
    SEGQC,
    TTA,
    calibrated_on,
    estimator_of,
)
from segqc.evaluation.report import figures
from segqc.evaluation.report.document import Figure
from segqc.evaluation.report.examples import ExampleScan, draw_example, pick_examples
from segqc.evaluation.report.result_tables import (
    COVERAGE_KINDS,
    OWN,
    REFERENCES,
    THRESHOLD,
    find_row,
    methods_of,
    number,
    title_of,
)
from segqc.quality.intervals import LEVEL, jackknife_plus
from segqc.quality.metrics import Values, fit_calibration
from segqc.text import slug
from segqc.volumes import through_plane_axis

ORDERS: dict[Dimension, tuple[str, ...]] = {
    "3D": (SEGQC, TTA, TTA_ENTROPY, SCAN_ONLY, ERROR_SUM),
    "2D": (SEGQC, TTA, SCAN_ONLY, EXTRACTED_MAP, ERROR_SUM),
}
CONSTANT_LEGEND = "always giving one answer, the training side's"
_MAX_POINTS = 400


@dataclass(frozen=True, slots=True, eq=False)
class Estimated:
    """The 3D Dice of one structure by method after calibration, and the truth: (masks,) each."""

    by_method: dict[str, Values]
    true: Values


def best_rival(result: ExperimentResult, structure: str, besides: Sequence[str] = ()) -> str | None:
    """The method of lowest MAE of the 3D Dice that is no SegQC and no constant; None if there is none."""
    errors = {
        m: row.calibrated.mae
        for m in methods_of(result, structure)
        if m not in (*OWN, CONSTANT, *besides) and (row := find_row(result, structure, m)) is not None
    }
    known = {m: e for m, e in errors.items() if e is not None}
    return min(known, key=lambda m: known[m], default=None)


def estimated_dice(run: Run, experiment: ExperimentName, structure: int, methods: Sequence[str]) -> Estimated | None:
    """Read estimates from the run folder, calibrated as the experiment does it; None where the arrays are not there."""
    folds = range(run.settings.folds)
    names = (experiment, *(f"{CALIBRATION}-{k}" for k in folds))
    needed = [truth_path(run, name) for name in names]
    needed += [predictions_path(run, name, m) for name in names for m in methods]
    if not all(path.is_file() for path in needed):
        return None
    truths = [load_truths(truth_path(run, f"{CALIBRATION}-{k}")) for k in folds]
    true = np.concatenate([t.metrics[:, structure, 0] for t in truths])
    patients = np.concatenate([t.patients for t in truths])
    early = np.concatenate([t.early for t in truths])
    by_method = {}
    for m in methods:
        known = [
            load_predictions(predictions_path(run, f"{CALIBRATION}-{k}", m)).metrics[:, structure, 0] for k in folds
        ]
        chosen = calibrated_on(m, early)
        line = fit_calibration(np.concatenate(known)[chosen], true[chosen], metric="dice", patients=patients[chosen])
        by_method[m] = line.apply(load_predictions(predictions_path(run, experiment, m)).metrics[:, structure, 0])
    return Estimated(by_method, load_truths(truth_path(run, experiment)).metrics[:, structure, 0])


def intervals(run: Run, experiment: ExperimentName, structure: int) -> list[tuple[float, float] | None]:
    """The prediction interval of SegQC's 3D Dice of each mask of an experiment; None where too few calibrate."""
    folds = range(run.settings.folds)
    truths = [load_truths(truth_path(run, f"{CALIBRATION}-{k}")) for k in folds]
    predicted = [load_predictions(predictions_path(run, f"{CALIBRATION}-{k}", SEGQC)) for k in folds]
    made = jackknife_plus(
        np.concatenate([j.metrics[:, structure, 0] for j in predicted]),
        np.concatenate([t.metrics[:, structure, 0] for t in truths]),
        [patient for t in truths for patient in t.patients],
        "dice",
    )
    low, high = made.bounds(
        load_predictions(predictions_path(run, experiment, SEGQC)).metrics[:, structure, 0], level=LEVEL
    )
    return [None if np.isnan(a) else (a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True)]


def estimate_figures(run: Run, result: ExperimentResult, structure: str, index: int) -> Iterator[Figure]:
    """Estimated against true Dice, and the risk of the kept masks, of SegQC and its closest rivals."""
    known = methods_of(result, structure)
    shown = [m for m in (SEGQC, TTA, SCAN_ONLY) if m in known and find_row(result, structure, m) is not None]
    rival = best_rival(result, structure, shown)
    shown += [rival] if rival is not None else []
    estimated = estimated_dice(run, result.experiment, index, shown) if shown else None
    if estimated is None:
        return
    styles, end = figures.styles_for(shown), f"{result.experiment}-{slug(structure)}"
    title = title_of(result)
    yield figures.scatter(
        f"scatter-{end}",
        f"Estimated against true 3D Dice of {structure}, {title}",
        [figures.Estimates(m, values, estimated.true) for m, values in estimated.by_method.items()],
        caption="After calibration; a point is a mask, the dashed line a perfect estimate.",
        styles=styles,
    )
    curves = [_risk(m, values, estimated.true) for m, values in estimated.by_method.items()]
    curves.append(replace(_risk("perfect order", estimated.true, estimated.true), reference=True))
    yield figures.risk_coverage(
        f"risk-{end}",
        f"What remains when the worst-looking masks are put aside: {structure}, {title}",
        curves,
        caption="The lower a curve, the better a method tells which masks can be kept.",
        styles=styles,
    )


def _risk(name: str, estimated: Values, true: Values) -> figures.Series:
    defined = np.isfinite(estimated) & np.isfinite(true)
    order = np.argsort(-estimated[defined], kind="stable")
    count = np.arange(1, order.size + 1)
    risk = np.cumsum(1 - true[defined][order]) / count
    at = np.unique(np.linspace(0, count.size - 1, min(count.size, _MAX_POINTS)).round().astype(int))
    return figures.Series(name, count[at] / max(1, count.size), risk[at])


def forest_figure(result: ExperimentResult, structures: Sequence[str]) -> Figure | None:
    """The MAE of every method's 3D Dice, a panel per structure."""
    entries, constants = [], {}
    for structure in structures:
        for method in methods_of(result, structure):
            row = find_row(result, structure, method)
            if row is None or row.mae.value is None:
                continue
            if method == CONSTANT:
                constants[structure] = row.mae.value
            else:
                entries.append(figures.ForestEntry(method, row.mae.value, row.mae.low, row.mae.high, structure))
    if not entries:
        return None
    return figures.forest(
        f"mae-{result.experiment}",
        f"Mean absolute error of the estimated 3D Dice, {title_of(result)}",
        entries,
        references=constants,
        reference_label=CONSTANT_LEGEND,
        caption="After calibration. Lines: 95% intervals, bootstrap by patient. Overlap is no test: see the table.",
    )


def curve_figures(result: ExperimentResult, structure: str) -> Iterator[Figure]:
    """The correction curves of a readable part of the orders (paper, figures 5 to 9)."""
    for ordered in (o for o in result.ordered if o.structure == structure):
        wanted = (*ORDERS[ordered.dimension], *(r for r in REFERENCES if r != "random non-empty"))
        found = {o.name: o for o in ordered.comparison.orders}
        curves = [
            figures.Series(
                f"{name} ({number(found[name].captured.value, 2)})",
                np.array(found[name].curve.share),
                np.array(found[name].curve.mean_dice),
                reference=name in REFERENCES,
            )
            for name in wanted
            if name in found
        ]
        if curves:
            unit = "scans" if ordered.dimension == "3D" else "slices"
            yield figures.correction_curves(
                f"curves-{ordered.dimension.lower()}-{result.experiment}-{slug(structure)}",
                f"Mean true Dice as {unit} of {structure} are corrected, {title_of(result)}",
                curves,
                unit="scans" if ordered.dimension == "3D" else "slices",
                caption="In brackets: the captured share of the optimal order's gain over random.",
            )


def detection_figure(result: ExperimentResult, structure: str) -> Figure | None:
    """Precision and recall of boxes over the thresholds of the error probability, at the lowest IoU."""
    wanted = ((SEGQC, "raw"), (SEGQC, "extracted"), (SCAN_ONLY, "extracted"), (CROSS_FITTED, "extracted"))
    curves, lowest = [], None
    for method, kind in wanted:
        for d in result.detected:
            if (d.structure, d.method, d.predicted, d.true) != (structure, method, kind, kind) or not d.boxes:
                continue
            lowest = min(s.min_iou for s in d.boxes)
            scores = [s for s in d.boxes if s.min_iou == lowest]
            curves.append(
                figures.Series(
                    method if kind == "raw" else f"{method}, extracted",
                    np.array([np.nan if s.recall.value is None else s.recall.value for s in scores]),
                    np.array([np.nan if s.precision.value is None else s.precision.value for s in scores]),
                    marks=tuple("" if s.threshold is None else f"{s.threshold:g}" for s in scores),
                )
            )
    if not curves or lowest is None:
        return None
    return figures.precision_recall(
        f"boxes-{result.experiment}-{slug(structure)}",
        f"Error boxes over thresholds: {structure}, {title_of(result)}",
        curves,
        caption=f"Points are labelled by the error probability from which a voxel counts; IoU at least {lowest:g}.",
    )


def example_figures(run: Run, result: ExperimentResult, structure: str, index: int) -> Iterator[Figure]:
    """The best, the median and the worst of SegQC's estimates, made anew; nothing where the run's files are gone.

    Args:
        run: the run.
        result: of the experiment whose masks they are.
        structure: the structure's name.
        index: its number among the run's.
    """
    networks, experiment = run.folder / NETWORKS / slug(SEGQC), result.experiment
    estimated = estimated_dice(run, experiment, index, [SEGQC]) if networks.is_dir() else None
    if estimated is None or not np.isfinite(estimated.by_method[SEGQC] - estimated.true).any():
        return
    values, manifest = estimated.by_method[SEGQC], manifest_of(run, experiment)
    chosen = dict(
        zip(("best", "median", "worst"), pick_examples(values.tolist(), estimated.true.tolist()), strict=True)
    )
    truths, estimator = load_truths(truth_path(run, experiment)), estimator_of(run, SEGQC, range(run.settings.folds))
    ends = intervals(run, experiment, index)
    for kind, i in chosen.items():
        (known,) = test_masks(run, replace(manifest, masks=(manifest.masks[i],)))
        example = _example(run, experiment, known, estimator, truths, i, index, float(values[i]), ends[i])
        if example is not None:
            yield draw_example(
                f"example-{kind}-{experiment}-{slug(structure)}",
                f"The {kind} estimate of SegQC: {structure}, {title_of(result)}",
                example,
                caption=(
                    f"The headline's estimate is calibrated; in brackets its {LEVEL:.0%} interval. Dashed boxes: where "
                    f"SegQC sees errors (probability at least {THRESHOLD:g}); solid ones: where they are."
                ),
            )


def _example(
    run: Run,
    experiment: ExperimentName,
    known: KnownMask,
    estimator: Estimator,
    truths: Truths,
    i: int,
    k: int,
    dice: float,
    interval: tuple[float, float] | None,
) -> ExampleScan | None:
    structure, scan = run.cohort.structures[k], known.assessed.scan
    error = estimator.estimate(known.assessed)[k].error
    if error is None:
        return None
    thresholds = run.settings.box_thresholds
    nearest = min(range(len(thresholds)), key=lambda t: abs(thresholds[t] - THRESHOLD))
    predicted, count = load_predictions(predictions_path(run, experiment, SEGQC)), len(truths.masks)
    return ExampleScan(
        scan,
        structure.mask(known.assessed.labels.array),
        structure.mask(known.truth.array),
        error,
        through_plane_axis(scan),
        tuple(predictions.boxes_of(predicted.boxes, count, k, RAW, nearest)[i]),
        tuple(predictions.boxes_of(truths.boxes, count, k, RAW)[i]),
        dice,
        float(truths.metrics[i, k, 0]),
        known.id,
        interval,
    )


def coverage_figure(result: ExperimentResult, structure: str, kinds: Sequence[str]) -> Figure | None:
    """How often the intervals of the 3D Dice held the truth, by stratum; ``kinds`` are of `COVERAGE_KINDS`."""
    strata = [
        figures.StratumCoverage(
            f"{COVERAGE_KINDS[c.kind]}: {c.stratum}",
            np.array([c.coverage.level]),
            np.array([c.coverage.coverage * c.coverage.patients]),
            np.array([float(c.coverage.patients)]),
        )
        for c in result.covered
        if (c.structure, c.metric) == (structure, "dice")
        and c.kind in kinds
        and c.coverage.coverage is not None
        and c.coverage.patients
    ]
    if not strata:
        return None
    return figures.coverage(
        f"coverage-{result.experiment}-{slug(structure)}",
        f"How often the intervals hold the true Dice: {structure}, {title_of(result)}",
        strata,
        caption="Bars: 95% intervals with the patients as trials.",
    )


def observer_figures(name: str, experiment: ObserverExperiment) -> Iterator[Figure]:
    """What error extraction removes and keeps over the band's width, on the half of the scans it was chosen on."""
    points = experiment.curves[experiment.chosen_from].points
    end = slug(name)
    widths = np.array([p.width for p in points])
    groups = [p.outcome.large for p in points]
    curves = [figures.Series("experts' difference removed", widths, _shares([g.removed.share for g in groups]))]
    for kind in ("all", *ERROR_KINDS):
        errors = [next((e for e in g.implanted if e.kind == kind), None) for g in groups]
        name = "implanted errors" if kind == "all" else kind
        if kind == "all":
            found = [None if e is None else e.found.share for e in errors]
            curves.append(figures.Series(f"{name} found", widths, _shares(found)))
        kept = [None if e is None else e.kept.share for e in errors]
        curves.append(figures.Series(f"{name}: voxels kept", widths, _shares(kept)))
    width = "share of the mask that the erosion may take"
    yield figures.band_curves(
        f"observers-{end}",
        "What error extraction removes and keeps, large structures of the choosing half",
        curves,
        width=width,
        chosen=experiment.chosen,
    )
    structures = [group.name for group in points[0].outcome.groups[2:]]
    by_structure = {s: [next(g for g in p.outcome.groups if g.name == s) for p in points] for s in structures}
    yield figures.band_curves(
        f"observers-removed-{end}",
        "The experts' difference that error extraction removes, by structure",
        [figures.Series(s, widths, _shares([g.removed.share for g in groups])) for s, groups in by_structure.items()],
        width=width,
        chosen=experiment.chosen,
    )
    yield figures.band_curves(
        f"observers-kept-{end}",
        "The voxels of implanted errors that error extraction keeps, by structure",
        [
            figures.Series(s, widths, _shares([g.implanted[0].kept.share for g in groups]))
            for s, groups in by_structure.items()
        ],
        width=width,
        chosen=experiment.chosen,
    )


def _shares(values: Sequence[float | None]) -> Values:
    return np.array(values, np.float64)
