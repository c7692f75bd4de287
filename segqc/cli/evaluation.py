"""The command that runs the paper's evaluation on anyone's data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segqc.cli.common import (
    ESTIMATE_PANEL,
    AsJson,
    CommandError,
    Row,
    dataset_at,
    emit,
    shown_progress,
    structure_flag,
)
from segqc.text import visible

if TYPE_CHECKING:
    from segqc.evaluation.experiments.comparison import ExperimentName, ExperimentResult

app = typer.Typer()


class Experiment(StrEnum):
    """What can be evaluated."""

    CORRECTIONS = "corrections"
    STRATIFIED = "stratified"
    DETECTION = "detection"
    ABLATION = "ablation"
    ALL = "all"
    LABELS = "labels"


SHOWN_THRESHOLD = 0.5
SHOWN_TABLES = ("estimates", "people", "proposals")  # of labels; the report has all
EXPERIMENTS: dict[Experiment, tuple[ExperimentName, ...]] = {
    Experiment.CORRECTIONS: ("corrections",),
    Experiment.STRATIFIED: ("stratified", "served"),
    Experiment.DETECTION: ("stratified",),
    Experiment.ABLATION: ("stratified",),
    Experiment.ALL: ("stratified", "served", "corrections"),
}


@app.command(rich_help_panel=ESTIMATE_PANEL)
def evaluate(
    experiment: Annotated[
        Experiment,
        typer.Argument(metavar="EXPERIMENT", help="What to measure.", show_default=False),
    ],
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="Data set (images/, labels/, perhaps splits.json) or dataset folder with final labels; for labels, "
            "the dataset folder whose networks serve.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Run folder: keeps every result; an existing run continues.")
    ] = Path("evaluation"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Few scans and hardly trained networks: minutes, to see that it works.")
    ] = False,
    structure: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUES", help="A structure and its label values (head=1, or brain=2,3); repeat."),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Masks, named as the scans, that the labels of the test side are corrections of (for corrections).",
        ),
    ] = None,
    observers: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Two experts' labels of the same scans (<scan>_<expert>.nii.gz, labels.txt): how much of their "
            "difference error extraction removes, as a section of the report. For labels: another observer's labels, "
            "named as the scans.",
        ),
    ] = None,
    on: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Labelled scans to judge, instead of DATA's own (for labels): a data set, its test side where it has "
            "a split, or a dataset folder.",
        ),
    ] = None,
    min_area: Annotated[float, typer.Option(min=0, help="Smallest error box that counts, in mm².")] = 100.0,
    groups: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Finds a patient's group in its name, for coverage under shift."),
    ] = None,
    length: Annotated[
        float,
        typer.Option(min=0.05, help="Length of all trainings, as a multiple of the usual one: less for large scans."),
    ] = 1.0,
    patch: Annotated[
        tuple[int, int, int] | None,
        typer.Option(
            metavar="X Y Z",
            help="Patch that networks learn from and look through, in their voxels, Z through the plane: about twice "
            "the structure makes large scans cheap. By default as much of the scan as the networks' size allows.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides every random draw.")] = 0,
    workers: Annotated[
        int, typer.Option(min=1, help="Number of parallel processes; the results do not depend on it.")
    ] = 2,
    as_json: AsJson = False,
) -> None:
    """Measure how good the estimates are on your own labelled scans, against every baseline; write a report.

    Trains everything anew on a part of the scans, by patient, and evaluates the rest: some hours on two cores, some
    minutes with --quick. An interrupted run continues where it stopped.

    "labels" trains nothing: DATA's own networks judge networks' and people's masks of scans whose patients they have
    not seen, told and not told who made them.
    """
    if experiment is Experiment.LABELS:
        trained = {"--structure": structure, "--masks": masks, "--groups": groups, "--patch": patch}
        given = [name for name, value in trained.items() if value] + ["--length"] * (length != 1)
        if given:
            raise CommandError(f"{given[0]} does not belong to labels, for which DATA's own networks judge")
        _labels(data, out, on, observers, min_area, seed, workers, quick=quick, as_json=as_json)
        return
    if on is not None:
        raise CommandError("--on belongs to labels")
    from segqc.evaluation.data.run import Run
    from segqc.evaluation.data.settings import EvaluationSettings
    from segqc.evaluation.evaluate import evaluate as run_experiments
    from segqc.evaluation.evaluate import observer_experiment
    from segqc.evaluation.report.compose import write
    from segqc.quality.boxes import BoxSettings

    if masks is not None and experiment not in (Experiment.CORRECTIONS, Experiment.ALL):
        raise CommandError("--masks belongs to the experiment corrections")
    settings = EvaluationSettings(
        seed=seed, boxes=BoxSettings(min_area_mm2=min_area), group_pattern=groups, workers=workers
    ).with_length(length)
    if patch is not None:
        if min(patch) < 1:
            raise CommandError(f"--patch needs three numbers of voxels, at least 1 each, got {patch}")
        settings = settings.with_patch(patch)
    if observers is not None and not observers.is_dir():
        raise CommandError(f"{observers}: no such folder of two experts' label files")
    structures = dict(structure_flag(text) for text in structure or ())
    run = Run.open(out, data, structures, settings.quick() if quick else settings, masks)
    with shown_progress() as progress:
        if observers is not None:
            observer_experiment(run, observers, progress)
        results = run_experiments(
            run, EXPERIMENTS[experiment], progress, ablations=experiment in (Experiment.ABLATION, Experiment.ALL)
        )
        report = write(run)
    _show(experiment, results, report, as_json=as_json)


def _labels(
    data: Path,
    out: Path,
    on: Path | None,
    observers: Path | None,
    min_area: float,
    seed: int,
    workers: int,
    *,
    quick: bool,
    as_json: bool,
) -> None:
    from segqc.evaluation.labels import QUICK_SCANS, LabelSettings, evaluate_labels
    from segqc.evaluation.report.labels import compose_labels, write_labels_report

    if (data / "images").is_dir():
        raise CommandError(
            f"{data}: is a data set without networks; name the dataset folder that has some, and this one with --on"
        )
    if observers is not None and not observers.is_dir():
        raise CommandError(f"{observers}: no such folder of another observer's label files")
    if on is not None and not on.is_dir():
        raise CommandError(f"{on}: no such data set or dataset folder")
    settings = LabelSettings(seed=seed, min_error_mm2=min_area, max_scans=QUICK_SCANS if quick else None)
    with shown_progress(log_lines=not as_json) as progress:
        result = evaluate_labels(
            dataset_at(data, None), out, progress, on=on, observers=observers, settings=settings, workers=workers
        )
        report = write_labels_report(result, out / "labels" / "report")
    tables = compose_labels(result).tables
    if as_json:
        rows = {t.name: [dict(zip(t.columns, row, strict=True)) for row in t.rows] for t in tables}
        typer.echo(json.dumps({"tables": rows, "remarks": result.remarks, "report": str(report)}, indent=1))
        return
    for table in (t for t in tables if t.name in SHOWN_TABLES):
        emit([dict(zip(table.columns, row, strict=True)) for row in table.rows], table.title)
    for remark in result.remarks:
        typer.echo(visible(remark))
    typer.echo(f"report: {report}")


def _show(experiment: Experiment, results: Sequence[ExperimentResult], report: Path, *, as_json: bool) -> None:
    made = _boxes if experiment is Experiment.DETECTION else _rows
    if as_json:
        rows = {result.experiment: [dict(row) for row in made(result)] for result in results}
        typer.echo(json.dumps({"experiments": rows, "report": str(report)}, indent=1))
        return
    for result in results:
        boxes = f"{result.experiment}: error boxes at a probability of {SHOWN_THRESHOLD:g}, over all masks"
        emit(made(result), boxes if experiment is Experiment.DETECTION else _title(result))
    typer.echo(f"report: {report}")


def _title(result: ExperimentResult) -> str:
    return f"{result.experiment}: {result.masks} masks of {result.patients} patients, estimated 3D Dice, calibrated"


def _rows(result: ExperimentResult) -> list[Row]:
    return [
        {
            "structure": row.structure,
            "method": row.method,
            "MAE": row.calibrated.mae,
            "95% interval": f"{row.mae.low:.3f}-{row.mae.high:.3f}"
            if row.mae.low is not None and row.mae.high is not None
            else "-",
            "Pearson": row.calibrated.pearson,
            "Spearman": row.calibrated.spearman,
            "MAE of the constant": row.calibrated.constant_mae,
        }
        for row in result.rows
        if row.dimension == "3D" and row.metric == "dice"
    ]


def _boxes(result: ExperimentResult) -> list[Row]:
    return [
        {
            "structure": found.structure,
            "method": found.method,
            "predicted": found.predicted,
            "true": found.true,
            "IoU": boxes.min_iou,
            "boxes": boxes.predicted,
            "true boxes": boxes.true,
            "precision": boxes.precision.value,
            "recall": boxes.recall.value,
        }
        for found in result.detected
        for boxes in found.boxes
        if boxes.threshold == SHOWN_THRESHOLD
    ]
