"""The report of a run: its results as tables, figures, examples and cautions."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import numpy as np

from segqc.evaluation import result_tables as tables
from segqc.evaluation.curves import OPTIMAL, RANDOM, SEQUENTIAL
from segqc.evaluation.judging import EXTRACTED, boxes_of, load_judgements, load_truths
from segqc.evaluation.methods import CROSS_FITTED, SCAN_ONLY, SEGQC, TTA, judge_of
from segqc.evaluation.report.cautions import EvaluatedSet, Selection, cautions
from segqc.evaluation.report.document import Figure, Report, Section, Table
from segqc.evaluation.report.examples import Example, draw_example, pick_examples
from segqc.evaluation.report.figures import (
    Curve,
    Estimates,
    Interval,
    correction_curves,
    forest,
    precision_recall,
    risk_coverage,
    scatter,
    styles_for,
)
from segqc.evaluation.report.html import write_report
from segqc.evaluation.result_tables import STUDY_TITLES, number, slug
from segqc.evaluation.run import Run
from segqc.evaluation.studies import (
    Dimension,
    StudyName,
    StudyResult,
    judgement_path,
    manifest_of,
    study_masks,
    truth_path,
)
from segqc.metrics import Values
from segqc.volumes import through_plane_axis

DRAWN = (SEGQC, SCAN_ONLY, CROSS_FITTED, TTA)  # of the scatter plots and the risk-coverage curves
DRAWN_ORDERS = (SEGQC, f"{SEGQC}-EE", f"{SEGQC}, gain", TTA, "TTA entropy", SCAN_ONLY, OPTIMAL, RANDOM, SEQUENTIAL)
DIMENSIONS: tuple[Dimension, ...] = ("3D", "2D")
MASKS_OF: dict[StudyName, Selection] = {"stratified": "stratified", "served": "all", "corrections": "all"}


def write(run: Run, results: Sequence[StudyResult]) -> Path:
    """Write the report of a run; returns the path of its HTML file."""
    return write_report(compose(run, results), run.folder / "report")


def compose(run: Run, results: Sequence[StudyResult]) -> Report:
    """Make the report of a run.

    Args:
        run: the run folder: arrays and masks for figures and examples are read from there.
        results: the studies to report.
    """
    cohort, s = run.cohort, run.settings
    facts = {
        "Data set": cohort.name,
        "Training side": f"{len(cohort.train)} scans of {len({c.patient for c in cohort.train})} patients",
        "Test side": f"{len(cohort.test)} scans of {len({c.patient for c in cohort.test})} patients",
        "Structures": tables.joined(structure.name for structure in cohort.structures),
        "Folds": str(s.folds),
        "SegQC-Net": f"{s.folds} networks of {s.assessor.epochs * s.assessor.steps_per_epoch} steps of "
        f"{s.assessor.batch} patches; {s.assessor.loss}, output: {s.assessor.output_form}",
        "Seed": f"{s.seed}: one seed is one draw of trainings and masks",
        "Date and machine": f"{date.today().isoformat()}, {platform.machine()}, {platform.system()}",
    }
    sections = [_summary(run, results)]
    for result in results:
        sections += _study(run, result)
    sections.append(_costs(results))
    sections.append(cautions([_set(run, result) for result in results]))
    return Report(
        f"How good are SegQC's estimates on {cohort.name}?",
        "Estimates of segmentation quality against the truth, and against other methods",
        facts,
        tuple(sections),
    )


def _summary(run: Run, results: Sequence[StudyResult]) -> Section:
    text = []
    for result in results:
        title = _title(result)
        for structure in run.cohort.structures:
            row = tables.find_row(result, structure.name, SEGQC)
            if row is None:
                continue
            scores = row.calibrated
            verdicts = tables.judged(tables.find_compared(result, structure.name, "dice", "3D", "mae"))
            groups = {
                verdict: [m for m, j in verdicts.items() if j.verdict == verdict]
                for verdict in ("better", "tie", "worse")
            }
            sentence = (
                f"{title}, {structure.name}: {result.masks} masks with a true Dice from {number(scores.truth_min, 2)} "
                f"to "
                f"{number(scores.truth_max, 2)}. SegQC's estimate is off by {number(scores.mae)} on average (95% "
                f"interval "
                f"{tables.span(row.mae)}), correlation {number(scores.pearson)}. The best constant answer, which "
                f"nobody "
                f"knows beforehand, would be off by {number(scores.median_mae)}."
            )
            for verdict, words in (
                ("better", "It is more exact than"),
                ("tie", "It can't be told apart from"),
                ("worse", "It is less exact than"),
            ):
                if groups[verdict]:
                    sentence += f" {words} {tables.joined(groups[verdict])}."
            text.append(sentence)
    if run.settings.most_cases is not None:
        text.insert(
            0, "A quick run: few scans and hardly trained networks. It shows that it works; its numbers mean nothing."
        )
    return Section("Summary", tuple(text))


def _title(result: StudyResult) -> str:
    title = STUDY_TITLES.get(result.study, result.study)
    return title[0].upper() + title[1:]


def _study(run: Run, result: StudyResult) -> Iterator[Section]:
    names = [structure.name for structure in run.cohort.structures]
    title = _title(result)
    manifest = manifest_of(run, result.study)
    about = [f"{result.masks} masks of {result.patients} patients, {result.slices} slices."]
    if result.study == "corrections":
        who = "people corrected" if manifest.corrections == "real" else "a simulated annotator corrected"
        about.append(f"The truth of these masks is what {who}; what was left alone counts as right.")
    main = [_kept(tables.main_table(result, name)) for name in names]
    figures = [_forest(result, names), *(_scatter(run, result, k) for k in range(len(names)))]
    yield Section(f"{title}: the 3D Dice", tuple(about), (), _flat(main), tuple(figures))
    more = [table for name in names for table in tables.metric_tables(result, name)]
    more += [table for name in names for table in tables.comparison_tables(result, name)]
    strata = [_kept(tables.strata_table(result, name)) for name in names]
    yield Section(f"{title}: all metrics, slices, comparisons", (), (), (*more, *_flat(strata)))
    orders = [_kept(tables.order_table(result, name, d)) for name in names for d in DIMENSIONS]
    curves = [figure for name in names for figure in _curves(result, name)]
    risks = [_risks(run, result, k) for k in range(len(names))]
    yield Section(f"{title}: what to correct first", (), (), _flat(orders), (*curves, *risks))
    boxes = [table for name in names for table in tables.detection_tables(result, name)]
    maps = [_kept(tables.error_map_table(result, name)) for name in names]
    yield Section(f"{title}: where the errors are", (), (), (*boxes, *_flat(maps)), tuple(_detections(result, names)))
    variants = [_kept(tables.ablation_table(result, name)) for name in names]
    if any(variants):
        yield Section(f"{title}: variants of the recipe", (), (), _flat(variants))
    if result.covered:
        yield Section(
            f"{title}: prediction intervals",
            (
                "How often the 90% interval of SegQC's 3D Dice held the truth. Resplit: made of a random half of the "
                "training side's patients, held against the other half, twenty times. Test: made of all of them, held "
                "against this study's masks, by quality: the promise is for masks like those of the training side, and "
                "for all of them together, not for each stratum. Shift: made of one group, held against another.",
            ),
            (),
            (_coverage_table(result),),
        )
    if result.study == "stratified":
        yield Section(f"{title}: examples", (_EXAMPLES,), (), (), tuple(_examples(run, result)))


_EXAMPLES = (
    "The best, the median and the worst of SegQC's estimates, by the error of the 3D Dice of the last structure. "
    "Above, the "
    "contours of mask and truth; below, the error probability with likely (dashed) and true (solid) error boxes."
)


def _kept(table: Table | None) -> tuple[Table, ...]:
    return () if table is None else (table,)


def _flat(found: Sequence[tuple[Table, ...]]) -> tuple[Table, ...]:
    return tuple(table for some in found for table in some)


def _forest(result: StudyResult, names: Sequence[str]) -> Figure:
    intervals, references = [], {}
    for name in names:
        for method in tables.methods_of(result, name):
            row = tables.find_row(result, name, method)
            if row is not None and row.calibrated.mae is not None:
                intervals.append(Interval(method, row.calibrated.mae, row.mae.low, row.mae.high, name))
                if row.calibrated.constant_mae is not None:
                    references[name] = row.calibrated.constant_mae
    return forest(
        f"mae-{result.study}",
        "Error of the estimated 3D Dice",
        intervals,
        label="mean absolute error",
        references=references,
        reference_label="constant of the training side",
        caption="After calibration, with 95% intervals by patient.",
    )


def _columns(run: Run, result: StudyResult, k: int) -> tuple[Values, dict[str, Values]]:
    """The true and the estimated (not calibrated) 3D Dice of one structure."""
    truth = load_truths(truth_path(run, result.study)).metrics[:, k, 0]
    said = {m: load_judgements(judgement_path(run, result.study, m)).metrics[:, k, 0] for m in DRAWN}
    return truth, {m: values for m, values in said.items() if np.isfinite(values).any()}


def _scatter(run: Run, result: StudyResult, k: int) -> Figure:
    truth, said = _columns(run, result, k)
    name = run.cohort.structures[k].name
    return scatter(
        f"scatter-{result.study}-{slug(name)}",
        f"Estimated against true 3D Dice of {name}",
        [Estimates(method, values, truth) for method, values in said.items()],
        caption="Estimates as they are, before calibration.",
    )


def _risks(run: Run, result: StudyResult, k: int) -> Figure:
    truth, said = _columns(run, result, k)
    name, curves = run.cohort.structures[k].name, []
    for method, values in {**said, "perfect order": truth}.items():
        known = np.isfinite(values) & np.isfinite(truth)
        order = np.argsort(-values[known], kind="stable")
        kept = np.arange(1, len(order) + 1)
        risk = np.cumsum(1 - truth[known][order]) / kept
        curves.append(Curve(method, kept / len(order), risk, reference=method == "perfect order"))
    return risk_coverage(f"risk-{result.study}-{slug(name)}", f"Risk of the masks that are kept, {name}", curves)


def _curves(result: StudyResult, name: str) -> Iterator[Figure]:
    for ordered in result.ordered:
        if ordered.structure != name:
            continue
        unit = "scans" if ordered.dimension == "3D" else "slices"
        drawn = [o for o in ordered.study.orders if o.name in DRAWN_ORDERS]
        yield correction_curves(
            f"curve-{ordered.dimension.lower()}-{result.study}-{slug(name)}",
            f"Mean Dice of {name} as {unit} are corrected",
            [
                Curve(
                    o.name,
                    np.array(o.curve.share),
                    np.array(o.curve.mean_dice),
                    reference=o.name in (OPTIMAL, RANDOM, SEQUENTIAL),
                )
                for o in drawn
            ],
            unit="scans" if unit == "scans" else "slices",
        )


def _detections(result: StudyResult, names: Sequence[str]) -> Iterator[Figure]:
    for name in names:
        curves = []
        for found in result.detected:
            if found.structure != name or found.predicted != found.true or found.method not in DRAWN:
                continue
            at = [b for b in found.boxes if b.min_iou == min(x.min_iou for x in found.boxes)]
            at = [b for b in at if b.recall.value is not None and b.precision.value is not None]
            if at:
                curves.append(
                    Curve(
                        f"{found.method}{', EE' if found.predicted == 'extracted' else ''}",
                        np.array([b.recall.value for b in at], np.float64),
                        np.array([b.precision.value for b in at], np.float64),
                        marks=tuple(f"{b.threshold:g}" for b in at),
                    )
                )
        if curves:
            yield precision_recall(
                f"boxes-{result.study}-{slug(name)}",
                f"Error boxes of {name}",
                curves,
                caption="At an IoU of 0.05; the numbers are thresholds of the error probability. EE: after error "
                "extraction, against extracted true errors.",
                styles=styles_for([c.label for c in curves]),
            )


def _coverage_table(result: StudyResult) -> Table:
    kinds = {"resplit": "resplits", "test": "this study", "shift": "shift"}
    rows = tuple(
        (c.structure, kinds[c.kind], c.stratum, c.coverage.coverage, c.coverage.error, c.coverage.width,
         c.coverage.patients, c.coverage.masks)
        for c in result.covered
    )  # fmt: skip
    return Table(
        f"coverage-{result.study}",
        "Coverage of the 90% intervals",
        ("structure", "held against", "true Dice", "coverage", "standard error", "mean width", "patients", "masks"),
        rows,
        2,
        "The standard error is binomial with the patients as trials. A dash: not enough data.",
        group="structure",
    )


def _costs(results: Sequence[StudyResult]) -> Section:
    return Section("What an estimate costs", (), (), _kept(tables.cost_table(results)))


def _set(run: Run, result: StudyResult) -> EvaluatedSet:
    structure = run.cohort.structures[-1].name
    row, manifest = tables.find_row(result, structure, SEGQC), manifest_of(run, result.study)
    low, high = (0.0, 1.0) if row is None else (row.calibrated.truth_min or 0.0, row.calibrated.truth_max or 1.0)
    truths = load_truths(truth_path(run, result.study))
    in_mask, in_truth, _ = truths.voxels[:, -1].T
    return EvaluatedSet(
        f"{_title(result)}, {structure}",
        patients=result.patients,
        masks=result.masks,
        makers=tuple(name or "unknown" for name in manifest.makers),
        makers_in_training=False,
        true_range=(low, high),
        selection=MASKS_OF[result.study],
        corrections=manifest.corrections,
        mae=None if row is None else row.calibrated.mae,
        constant_mae=None if row is None else row.calibrated.constant_mae,
        compared=len(tables.methods_of(result, structure)),
        slices=int(((in_mask > 0) | (in_truth > 0)).sum()),
        missed_slices=int(((in_mask == 0) & (in_truth > 0)).sum()),
    )


def _examples(run: Run, result: StudyResult) -> Iterator[Figure]:
    """The best, the median and the worst estimate; their error maps are made anew."""
    k = len(run.cohort.structures) - 1
    structure = run.cohort.structures[k]
    said = load_judgements(judgement_path(run, result.study, SEGQC))
    truths = load_truths(truth_path(run, result.study))
    estimated, true = said.metrics[:, k, 0], truths.metrics[:, k, 0]
    chosen = pick_examples(
        [float(v) if np.isfinite(v) else None for v in estimated], [float(v) if np.isfinite(v) else None for v in true]
    )
    threshold = run.settings.box_thresholds.index(0.5) if 0.5 in run.settings.box_thresholds else 0
    predicted = boxes_of(said.boxes, len(truths.masks), k, EXTRACTED, threshold)
    boxes = boxes_of(truths.boxes, len(truths.masks), k, EXTRACTED)
    estimator = judge_of(run, SEGQC, range(run.settings.folds))
    for number_, known in enumerate(study_masks(run, result.study)):
        for title, index in zip(("best", "median", "worst"), chosen, strict=True):
            if index != number_:
                continue
            error = estimator.estimate(known.judged)[k].error
            if error is None:
                continue
            example = Example(
                known.judged.scan,
                structure.mask(known.judged.labels.array),
                structure.mask(known.truth.array),
                error,
                through_plane_axis(known.judged.scan),
                tuple(predicted[index]),
                tuple(boxes[index]),
                float(estimated[index]),
                float(true[index]),
                known.id,
            )
            yield draw_example(f"example-{title}", f"The {title} estimate", example)
