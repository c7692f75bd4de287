"""From the results of experiments to the report: the findings in words, the paper's tables and figures, limitations.

Whatever a run folder no longer has (scans, networks, arrays) is left out: tables are drawn from the results alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from segqc.evaluation.data.cohort import Cohort, CohortError
from segqc.evaluation.data.manifest import Manifest
from segqc.evaluation.data.run import Run, seconds_of
from segqc.evaluation.evaluate import stored_observers
from segqc.evaluation.experiments.comparison import (
    MANIFEST_OF,
    ExperimentName,
    ExperimentResult,
    manifest_of,
    stored_results,
)
from segqc.evaluation.experiments.observers import ObserverExperiment, Outcome, Share
from segqc.evaluation.methods.registry import CONSTANT, CROSS_FITTED, SCAN_ONLY, SEGQC, TTA
from segqc.evaluation.report import result_figures, result_tables
from segqc.evaluation.report.document import UNDEFINED, Cell, Figure, Point, Report, Section, Table
from segqc.evaluation.report.html import write_report
from segqc.evaluation.report.limitations import EvaluatedSet, limitations
from segqc.evaluation.report.result_tables import find_compared, find_row, number, span, title_of, verdicts_of
from segqc.evaluation.statistics.curves import CurveComparison
from segqc.loop.dataset import DatasetError
from segqc.text import slug

FEW_PATIENTS = 10
CLEARLY_BETTER = 0.6  # of the best constant's error: from here on an estimate is worth reading


def write(run: Run) -> Path:
    """Write the report of all results that a run has into its folder, ``report/``.

    Returns:
        The path of ``report.html``.
    """
    return write_report(compose(run, stored_results(run), stored_observers(run)), run.folder / "report")


def compose(
    run: Run, results: Sequence[ExperimentResult], observers: Mapping[str, ObserverExperiment] = MappingProxyType({})
) -> Report:
    """Compose the report of a run.

    Args:
        run: the run; its arrays, networks and scans are used where they are there.
        results: one per experiment; of two results of one experiment, variants of SegQC are taken from the one that has
            them, and everything else from the first.
        observers: experiments of error extraction on two experts' masks by their folder's name, a section each.

    Raises:
        ValueError: if there are no results, or none has an estimate.
    """
    by_experiment: dict[ExperimentName, ExperimentResult] = {}
    for result in results:
        by_experiment.setdefault(result.experiment, result)
    experiments = list(by_experiment.values())
    structures = list(dict.fromkeys(row.structure for r in experiments for row in r.rows))
    if not structures:
        raise ValueError("a report needs the results of at least one experiment with estimates")
    whole = max(structures, key=lambda s: len(run.description.structures.get(s, ())))  # the first of the largest
    others = [s for s in structures if s != whole]
    cohort = _cohort(run)
    index = {s: i for i, s in enumerate(structures)} if cohort is None else {
        s.name: i for i, s in enumerate(cohort.structures)
    }  # fmt: skip
    sections = [
        _summary(experiments, whole, structures),
        _setup(run, cohort, experiments),
        *(_estimates(run, r, whole, index[whole]) for r in experiments),
        *_orders(experiments, whole),
        *_detection(experiments, whole),
        *_examples(run, cohort, experiments, whole, index[whole]),
        *_ablations(results, structures),
        *_intervals(experiments, [whole, *others]),
        *(_observers(name, experiment) for name, experiment in observers.items()),
        limitations([_evaluated(run, r, whole) for r in experiments if find_row(r, whole, SEGQC) is not None])
        if any(find_row(r, whole, SEGQC) is not None for r in experiments)
        else Section("What not to conclude", ("SegQC gave no estimate: nothing can be concluded.",)),
        *(_other(run, experiments, s, index[s]) for s in others),
    ]
    name, made = Path(run.description.dataset).name, run.made()
    facts = {
        "Data set": name if cohort is None else f"{name}: {_sides(cohort)}",
        "Structures": ", ".join(structures),
        "Seed": f"{run.settings.seed} (one training of everything)",
        "Run": f"{made.date}, {made.machine}, {made.cores} cores",
    }
    subtitle = "How well the quality of segmentation masks is estimated without their truth, against other ways"
    return Report(f"SegQC evaluation: {name}", subtitle, facts, tuple(sections))


# ------------------------------------------------------------------------------------------------------------ in short


def _summary(experiments: Sequence[ExperimentResult], whole: str, structures: Sequence[str]) -> Section:
    points = [point for r in experiments if (point := _found(r, whole, structures)) is not None]
    tables = [t for r in experiments if (t := result_tables.main_table(r, whole)) is not None]
    drawn = [f for r in experiments if (f := result_figures.forest_figure(r, [whole, *_without(structures, whole)]))]
    text = [
        "SegQC looks at a scan and at a mask somebody, or some network, has drawn in it, and estimates how good "
        "the mask is (Dice: 1 is perfect, 0 is nothing in common with the truth), and where it is wrong. Here its "
        "estimates are held against truths that no network had seen, and against other ways to get such an estimate.",
    ]
    if min(r.patients for r in experiments) < FEW_PATIENTS:
        text.append(
            f"There are only {min(r.patients for r in experiments)} test patients. That shows that the evaluation "
            "works; it is too few for any conclusion, and ties say nothing.",
        )
    return Section("In short", tuple(text), tuple(points), tuple(tables), tuple(drawn))


def _found(result: ExperimentResult, structure: str, structures: Sequence[str]) -> Point | None:
    row = find_row(result, structure, SEGQC)
    if row is None or row.calibrated.mae is None:
        return None
    s = row.calibrated
    text = (
        f"On {result.masks} masks of {result.patients} patients, with a true Dice from {number(s.truth_min, 2)} to "
        f"{number(s.truth_max, 2)}, SegQC's estimate of the 3D Dice of {structure} is wrong by {number(s.mae)} on "
        f"average (95% interval {span(row.mae)}). Always giving the best possible constant answer would be wrong by "
        f"{number(s.median_mae)}. Pearson's correlation of estimate and truth is {number(s.pearson, 2)}"
        f"{_interval_text(row.pearson.low, row.pearson.high)}."
    )
    items = [*_versus(result, structure), *_orders_in_words(result, structure), *_boxes_in_words(result, structure)]
    items += [
        f"{other}: wrong by {number(o.calibrated.mae)} (constant: {number(o.calibrated.median_mae)}), "
        f"Pearson {number(o.calibrated.pearson, 2)}."
        for other in _without(structures, structure)
        if (o := find_row(result, other, SEGQC)) is not None
    ]
    items.append(f"What to do: {_advice(s.mae, s.median_mae, result.patients)}")
    return Point(title_of(result).capitalize(), text, tuple(items))


def _versus(result: ExperimentResult, structure: str) -> Iterator[str]:
    """Who is beaten, who ties and who wins, by MAE of the 3D Dice after Holm's adjustment."""
    family = verdicts_of(find_compared(result, structure, "dice", "3D", "mae"))
    known = [m for m in result_tables.methods_of(result, structure) if m in family]
    by_verdict = {v: [m for m in known if family[m].outcome == v] for v in ("better", "tie", "worse")}
    if by_verdict["worse"]:
        yield f"More exact than SegQC: {result_tables.joined(by_verdict['worse'])}."
    if by_verdict["tie"]:
        yield f"SegQC can't be told apart from {result_tables.joined(by_verdict['tie'])}."
    if by_verdict["better"]:
        yield f"SegQC is more exact than {result_tables.joined(by_verdict['better'])}."
    without_mask = [m for m in (SCAN_ONLY, CROSS_FITTED) if m in by_verdict["tie"] + by_verdict["worse"]]
    if without_mask:
        yield (
            f"What looking at the mask adds is not shown: {result_tables.joined(without_mask)} never "
            f"{'sees' if len(without_mask) == 1 else 'see'} it."
        )
    if SCAN_ONLY in by_verdict["worse"]:
        yield "Here it even does harm: the same network is more exact when it sees the scan only."


def _orders_in_words(result: ExperimentResult, structure: str) -> Iterator[str]:
    for ordered in (o for o in result.ordered if o.structure == structure):
        share = _captured(ordered.comparison, SEGQC)
        if share is None:
            continue
        unit = "scans" if ordered.dimension == "3D" else "slices"
        rival = _captured(ordered.comparison, TTA)
        beside = "" if rival is None else f" (TTA: {number(rival, 2)})"
        yield (
            f"Correcting {unit} in SegQC's order, worst first, captures {number(share, 2)} of what the perfect "
            f"order gains over a random one{beside}{'' if share > 0 else '. That is no better than at random'}."
        )


def _captured(experiment: CurveComparison, name: str) -> float | None:
    return next((o.captured.value for o in experiment.orders if o.name == name), None)


def _boxes_in_words(result: ExperimentResult, structure: str) -> Iterator[str]:
    for d in result.detected:
        if (d.structure, d.method, d.predicted, d.true) == (structure, SEGQC, "extracted", "extracted"):
            for s in result_tables.at_threshold(d, d.chosen or result_tables.THRESHOLD)[:1]:
                if s.recall.value is not None and s.precision.value is not None:
                    yield (
                        f"After error extraction, {s.recall.value:.0%} of the true error boxes are met by one of "
                        f"SegQC's, and {s.precision.value:.0%} of SegQC's meet a true one (IoU at least {s.min_iou:g})."
                    )


def _advice(mae: float | None, best_constant: float | None, patients: int) -> str:
    if patients < FEW_PATIENTS:
        return "run it on more patients before using any of these numbers."
    if mae is None or best_constant is None or mae >= best_constant:
        return (
            "do not read single estimates on masks like these: one and the same answer for all would be as near. "
            "Use the order, if the table of orders says that it helps, and check by eye."
        )
    if mae > CLEARLY_BETTER * best_constant:
        return (
            "use the estimates to sort, worst first. A single number is only a little nearer to the truth than the "
            "average of all; do not decide by it alone."
        )
    return (
        "use the estimates to sort scans and slices, worst first, and read a single number with its interval. A good "
        "estimate is no reason not to look at a mask that a decision depends on."
    )


# --------------------------------------------------------------------------------------------------------------- setup


def _setup(run: Run, cohort: Cohort | None, experiments: Sequence[ExperimentResult]) -> Section:
    s = run.settings
    manifests = [manifest for r in experiments if (manifest := _manifest(run, r.experiment)) is not None]
    late = any(manifest.after_training for manifest in manifests)
    text = (
        f"Cross-fitting in {s.folds} folds by patient: every trained method has one network per fold that has not "
        "seen the fold's patients. On those patients it is calibrated; all its networks together assess the test "
        "masks. Networks that make test masks make no training masks, and the test masks were fixed before any "
        f"method was trained{', but for those of experiments that were asked for later' if late else ''}.",
        f"All of this is one seed ({s.seed}). One seed is one seed: intervals say what other patients could "
        "change, not what another training could.",
    )
    rows: list[tuple[Cell, ...]] = [] if cohort is None else [("scans", _sides(cohort))]
    rows += [
        ("stratified masks", f"networks of {s.test_sources} trainings of {s.source_epochs} epochs, best and early"),
        ("segmenter", f"{s.segmenter.size}, {s.segmenter.epochs} epochs of {s.segmenter.steps_per_epoch} steps, batch "
                      f"{s.segmenter.batch}; cross-fitted ones {s.segmenter.fold_epochs} epochs"),
        ("SegQC-Net", f"{s.assessor.size}, {s.assessor.epochs} epochs of {s.assessor.steps_per_epoch} steps, batch "
                      f"{s.assessor.batch}, output form {s.assessor.output_form}, loss {s.assessor.loss}"),
        ("patch", "as much of a scan as the networks' size allows" if s.segmenter.patch is None else
                  f"{' x '.join(map(str, s.segmenter.patch))} voxels of the networks' grid"),
        ("error boxes", f"larger than {s.boxes.min_area_mm2:g} mm², united when nearer than "
                        f"{s.boxes.min_distance_voxels:g} voxels"),
        ("error extraction", f"band {s.extraction.band_mm:g} mm, at most {s.extraction.max_band_share:g} of the mask; "
                             f"components under {s.extraction.min_component_mm2:g} mm² dropped"),
        ("bootstrap", f"{s.draws} draws of patients"),
        *((f"minutes: {step}", f"{seconds / 60:.1f}") for step, seconds in seconds_of(run).items()),
    ]  # fmt: skip
    tables = [Table("setup", "What was trained, and how it was looked at", ("what", "setting"), tuple(rows))]
    made = _masks_table(run, experiments)
    cost = result_tables.cost_table(experiments)
    return Section("How it was evaluated", text, (), (*tables, *(t for t in (made, cost) if t is not None)))


def _masks_table(run: Run, experiments: Sequence[ExperimentResult]) -> Table | None:
    rows: list[tuple[Cell, ...]] = []
    for result in experiments:
        manifest = _manifest(run, result.experiment)
        if manifest is None:
            continue
        edges = manifest.bins
        for low, high in itertools.pairwise(edges):
            inside = [m for m in manifest.masks if low <= m.dice < high]
            rows.append(
                (
                    result.experiment,
                    f"{low:g} to {min(high, 1.0):g}",
                    len(inside),
                    len({m.patient for m in inside}),
                    len({m.source for m in inside}),
                )
            )
    if not rows:
        return None
    note = "Bins of the true Dice of all structures together. A bin with fewer masks had no more to choose from."
    columns = ("experiment", "true Dice", "masks", "patients", "networks")
    return Table("masks", "The masks that are assessed", columns, tuple(rows), note=note, group="experiment")


# -------------------------------------------------------------------------------------------------- results, by chapter


def _estimates(run: Run, result: ExperimentResult, structure: str, index: int) -> Section:
    strata, shared = result_tables.strata_table(result, structure), result_tables.shared_table(result, structure)
    bad = result_tables.bad_masks_table(result, structure)
    return Section(
        f"Estimated metrics: {title_of(result)}",
        (f"{result.masks} masks of {result.patients} patients, {result.slices} slices; {structure}.",),
        (),
        (
            *result_tables.metric_tables(result, structure),
            *result_tables.comparison_tables(result, structure),
            *(table for table in (strata, bad, shared) if table is not None),
        ),
        tuple(result_figures.estimate_figures(run, result, structure, index)),
    )


def _orders(experiments: Sequence[ExperimentResult], structure: str) -> Iterator[Section]:
    tables = [
        table
        for r in experiments
        for table in (result_tables.order_table(r, structure, "3D"), result_tables.order_table(r, structure, "2D"))
        if table is not None
    ]
    if tables:
        text = (
            "Whose masks, or which slices, should be corrected first? The mean true Dice rises fastest in a good order."
        )
        drawn = tuple(f for r in experiments for f in result_figures.curve_figures(r, structure))
        yield Section("Orders of correction", (text,), (), tuple(tables), drawn)


def _detection(experiments: Sequence[ExperimentResult], structure: str) -> Iterator[Section]:
    tables: list[Table] = []
    drawn: list[Figure] = []
    for r in experiments:
        tables += result_tables.detection_tables(r, structure)
        maps, figure = result_tables.error_map_table(r, structure), result_figures.detection_figure(r, structure)
        tables += [] if maps is None else [maps]
        drawn += [] if figure is None else [figure]
    if tables:
        text = "Does the error map point to the errors? Boxes per slice, and single voxels."
        yield Section("Where the errors are", (text,), (), tuple(tables), tuple(drawn))


def _examples(
    run: Run, cohort: Cohort | None, experiments: Sequence[ExperimentResult], structure: str, index: int
) -> Iterator[Section]:
    if cohort is None:
        return
    result = next((r for r in experiments if r.experiment == "stratified"), experiments[0])
    drawn = tuple(result_figures.example_figures(run, result, structure, index))
    if drawn:
        text = (
            "By the absolute error of SegQC's calibrated 3D Dice: its best, its median and its worst estimate, in the "
            "slices that the error map calls worst. They were chosen by that rule, not by looks."
        )
        yield Section("Examples", (text,), (), (), drawn)


def _ablations(results: Sequence[ExperimentResult], structures: Sequence[str]) -> Iterator[Section]:
    with_variants = {r.experiment: r for r in reversed(results) if result_tables.variants_of(r)}
    tables = [result_tables.ablation_table(r, s) for r in with_variants.values() for s in structures]
    shown = tuple(t for t in tables if t is not None)
    if shown:
        yield Section("What each part of the recipe does", (), (), shown)


def _intervals(experiments: Sequence[ExperimentResult], structures: Sequence[str]) -> Iterator[Section]:
    tables: list[Table] = []
    drawn: list[Figure] = []
    for r in experiments:
        # random splits and shifts are of the training side: the same in every experiment
        kinds = tuple(result_tables.COVERAGE_KINDS) if r is experiments[0] else ("test",)
        found = result_tables.coverage_tables(r, structures, kinds)
        tables += found
        figures = [result_figures.coverage_figure(r, s, kinds) for s in structures]
        drawn += [figure for figure in figures if figure is not None]
    if tables:
        yield Section("Prediction intervals", (), (), tuple(tables), tuple(drawn))


def _observers(name: str, experiment: ObserverExperiment) -> Section:
    def rows(outcomes: Sequence[tuple[str, Outcome]]) -> tuple[tuple[Cell, ...], ...]:
        return tuple(
            (
                name, group.name, group.cases, group.removed.share, _ends(group.removed), group.removed_single.share,
                group.implanted[0].found.share, group.implanted[0].kept.share, _ends(group.implanted[0].kept),
            )
            for name, outcome in outcomes for group in outcome.groups[:2]
        )  # fmt: skip

    columns = (
        "setting", "structures", "cases", "removed", "95% interval", "one expert's", "found", "kept", "95% (kept)",
    )  # fmt: skip
    tables = [
        Table(
            f"observers-{slug(name)}",
            "Error extraction between two experts, held half",
            columns,
            rows(list(experiment.on_held.items())),
            note=(
                f"{len(experiment.held)} scans; the other {len(experiment.choosing)} chose the width. Removed: share "
                "of the voxels that two experts drew differently, in slices that both included; one expert's: in the "
                f"other slices. Found, kept: implanted errors over {experiment.settings.min_error_mm2:g} mm² of which "
                "something survives, and their voxels. Intervals by scan."
            ),
            group="setting",
        )
    ]
    chosen = experiment.on_held.get("chosen")
    if chosen is not None:
        tables.append(
            Table(
                f"observers-structures-{slug(name)}",
                "The same by structure, with the chosen width",
                ("structure", "cases", "difference removed", "errors found", "voxels kept"),
                tuple(
                    (g.name, g.cases, g.removed.share, g.implanted[0].found.share, g.implanted[0].kept.share)
                    for g in chosen.groups[2:]
                ),
            )
        )
    width = "No width met the rule." if experiment.chosen is None else f"The chosen width is {experiment.chosen:g}."
    text = (
        "What two experts draw differently is no error, and extraction should remove it; implanted errors should stay. "
        f"{width} It was chosen on one half of the scans, and is reported on the other."
    )
    drawn = tuple(result_figures.observer_figures(name, experiment))
    return Section(f"Error extraction and observers: {name}", (text,), (), tuple(tables), drawn)


def _ends(share: Share) -> str:
    return UNDEFINED if share.interval is None else result_tables.span_of(*share.interval, 2)


def _other(run: Run, experiments: Sequence[ExperimentResult], structure: str, index: int) -> Section:
    """All the same for another structure."""
    tables: list[Table] = []
    drawn: list[Figure] = []
    for r in experiments:
        main = result_tables.main_table(r, structure)
        tables += [] if main is None else [main]
        chapters = [_estimates(run, r, structure, index), *_orders([r], structure), *_detection([r], structure)]
        tables += [t for chapter in chapters for t in chapter.tables]
        drawn += [f for chapter in chapters for f in chapter.figures]
    return Section(f"The same for {structure}", (), (), tuple(tables), tuple(drawn))


# -------------------------------------------------------------------------------------------------------------- facts


def _evaluated(run: Run, result: ExperimentResult, structure: str) -> EvaluatedSet:
    row = find_row(result, structure, SEGQC)
    assert row is not None
    s, manifest = row.calibrated, _manifest(run, result.experiment)
    constant = find_row(result, structure, CONSTANT)
    both, own = (find_row(result, structure, SEGQC, "dice", "2D", slices) for slices in ("all", "mask"))
    if result.experiment == "stratified":
        count = len({m.source for m in manifest.masks}) if manifest is not None else 2 * run.settings.test_sources
        sources: tuple[str, ...] = (f"{count} networks of {run.settings.test_sources} trainings",)
    else:
        sources = ("the served network",) if manifest is None or all(manifest.sources) else ("unknown sources",)
    return EvaluatedSet(
        f"{title_of(result).capitalize()}, {structure}",
        result.patients,
        result.masks,
        sources,
        False,
        (s.truth_min or 0.0, s.truth_max or 0.0),
        "all" if manifest is None else manifest.selection,
        "none" if manifest is None else manifest.corrections,
        mae=s.mae,
        constant_mae=s.median_mae if constant is None else constant.calibrated.mae,
        compared=len(result_tables.methods_of(result, structure)),
        slices=None if both is None else both.calibrated.n,
        missed_slices=None if both is None or own is None else both.calibrated.n - own.calibrated.n,
        after_training=manifest is not None and manifest.after_training,
    )


def _manifest(run: Run, experiment: ExperimentName) -> Manifest | None:
    return manifest_of(run, experiment) if (run.folder / MANIFEST_OF[experiment]).is_file() else None


def _cohort(run: Run) -> Cohort | None:
    """The cases, where the data set is still there."""
    try:
        return run.cohort if Path(run.description.dataset).is_dir() else None
    except (CohortError, DatasetError):
        return None


def _sides(cohort: Cohort) -> str:
    sides = (("to train on", cohort.train), ("to test with", cohort.test))
    return ", ".join(f"{len(cases)} scans of {len({c.patient for c in cases})} patients {of}" for of, cases in sides)


def _interval_text(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({result_tables.span_of(low, high, 2)})"


def _without(names: Sequence[str], name: str) -> list[str]:
    return [n for n in names if n != name]
