"""The commands `segqc predict` and `segqc assess`: masks and estimates of files."""

from __future__ import annotations

import dataclasses
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from segqc.cli.common import (
    ESTIMATE_PANEL,
    AsCsv,
    AsJson,
    Cell,
    CommandError,
    Row,
    brackets,
    dataset_at,
    emit,
    estimate,
    holds_store,
    refuse_overwriting,
    shown_progress,
)

if TYPE_CHECKING:
    from segqc.loop.dataset import Dataset
    from segqc.networks.assessor import Assessor
    from segqc.networks.segmenter import Segmenter
    from segqc.types import Assessment, MetricIntervals

app = typer.Typer()

_METRIC_TERMS: Final = (
    "Estimates, made without a true mask. Dice, IoU: overlap with the true mask, 1 is best. ARVD: voxels that differ, "
    "in parts of the true volume, 0 is best. RVD: mask too large (+) or too small (-), in the same parts."
)
_SLICE_TERMS: Final = (
    "error sum: error probabilities of the slice's voxels added up, about the number of wrong voxels. "
    "boxes: likely errors, as voxels along the two axes of the slice."
)

ModelsOf = Annotated[
    Path | None,
    typer.Option(
        "--dataset",
        metavar="FOLDER",
        help="Use the networks of this dataset folder (default: the folder that the scan lies in).",
    ),
]
ModelFile = Annotated[Path | None, typer.Option("--model", metavar="FILE", help="Use this model file (.pt).")]


class Source(StrEnum):
    """Who made a mask."""

    NETWORK = "network"
    PERSON = "person"


@app.command(rich_help_panel=ESTIMATE_PANEL)
def predict(
    scans: Annotated[list[Path], typer.Argument(metavar="SCAN", help="The scans' files.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Mask to write, or, without a suffix, a folder of masks.", show_default=False),
    ],
    dataset: ModelsOf = None,
    model: ModelFile = None,
) -> None:
    """Segment scans with the trained segmentation network; the masks lie on the scans' own grids."""
    from segqc.volumes import VolumeError, label_suffix, read_scan, scan_id, scan_suffix, write_labels

    to_file = scan_suffix(out.name) is not None
    if to_file and len(scans) > 1:
        raise typer.BadParameter("several scans need a folder, not one mask file", param_hint="--out")
    if not to_file and label_suffix(out.name) is not None:
        raise _no_mask_name(out)
    twice = sorted(name for name, count in Counter(map(scan_id, scans)).items() if count > 1)
    if twice:
        raise CommandError(
            f"several scans are named {twice[0]}: their masks would be one file; segment them separately"
        )
    targets = [out if to_file else out / f"{scan_id(path)}.nii.gz" for path in scans]
    for target in targets:
        refuse_overwriting(target)
    _refuse_missing(*scans)
    segmenter = _segmenter(_models_folder(dataset, scans[0]), model)
    failed: list[str] = []
    with shown_progress() as progress:
        for i, (path, target) in enumerate(zip(scans, targets, strict=True)):
            progress.step(i, len(scans), "segmenting", path.name)
            try:
                write_labels(segmenter.predict(read_scan(path)).labels, target)
            except VolumeError as error:
                if len(scans) == 1:
                    raise
                failed.append(str(error))
        progress.step(len(scans), len(scans), "segmenting", "done")
    made = len(scans) - len(failed)
    if made:
        typer.echo(f"{out}: {made} mask{'s' if made > 1 else ''}")
    for reason in failed:
        typer.echo(reason, err=True)
    if failed:
        raise CommandError(f"{len(failed)} of {len(scans)} scans could not be segmented")


@app.command(rich_help_panel=ESTIMATE_PANEL)
def assess(
    scan: Annotated[Path, typer.Argument(metavar="SCAN", help="The scan's file.", show_default=False)],
    mask: Annotated[
        Path, typer.Argument(metavar="MASK", help="Its mask: a label file on the scan's grid.", show_default=False)
    ],
    dataset: ModelsOf = None,
    model: ModelFile = None,
    source: Annotated[
        Source, typer.Option(help="Who made the mask: a person's is right but for a few errors.")
    ] = Source.NETWORK,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The picture to write (default: SCAN_assessment.png).")
    ] = None,
    no_picture: Annotated[bool, typer.Option("--no-picture", help="Write no picture.")] = False,
    errors: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the likely errors as a label file (1 = likely wrong)."),
    ] = None,
    slices: Annotated[int, typer.Option(min=1, help="Number of worst slices to list and draw.")] = 4,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Estimate a mask's Dice, IoU, ARVD and RVD, list its worst slices, and draw them with the likely errors.

    JSON is the whole assessment; CSV has one line for each structure in 3D and in every slice.
    """
    from segqc.plots import draw_assessment, is_picture_name
    from segqc.quality.likely_errors import likely_errors, sentence
    from segqc.types import segment_names
    from segqc.volumes import read_labels, read_scan, scan_id, scan_suffix, write_labels

    for named in (picture, errors):
        if named is not None:
            refuse_overwriting(named)
    if picture is not None and not is_picture_name(picture):
        raise CommandError(f"{picture}: pictures are written as .png, .pdf or .svg; choose one of these suffixes")
    if errors is not None and scan_suffix(errors.name) is None:
        raise _no_mask_name(errors)
    _refuse_missing(scan, mask)
    volume = read_scan(scan)
    assessor = _assessor(_models_folder(dataset, scan), model)
    labels = read_labels(mask, scan=volume, values=assessor.values, names=segment_names(assessor.structures))
    if source is Source.PERSON and assessor.people is None:
        typer.echo("SegQC-Net was not trained to judge people's masks here, and takes it for a network's", err=True)
    result = assessor.assess(volume, labels, scan_id=scan_id(scan), source=source.value)
    if errors is not None:
        write_labels(assessor.likely_errors(result, volume), errors)
    target = None if no_picture else picture or Path(f"{scan_id(scan)}_assessment.png")
    if target is not None:
        draw_assessment(volume, labels, result, target, slices=slices, structures=assessor.structures)
    if as_json:
        typer.echo(result.assessment.to_json())
    elif as_csv:
        emit(_assessment_lines(result.assessment), "", as_csv=True)
    else:
        in_brackets = brackets(q.intervals.dice for q in result.assessment.structures)
        emit(_structure_rows(result.assessment), f"{scan.name}: estimated quality{in_brackets}", terms=_METRIC_TERMS)
        emit(_slice_rows(result.assessment, slices), "slices to look at first", terms=_SLICE_TERMS)
        if result.assessment.mask_kind == "person":
            typer.echo(sentence(likely_errors(result.assessment)))
    if target is not None:
        typer.echo(f"picture: {target}", err=True)


def _structure_rows(assessment: Assessment) -> list[Row]:
    return [
        {
            "structure": q.name,
            **estimate("Dice", q.estimated.dice if q.present else None, q.intervals.dice),
            **estimate("IoU", q.estimated.iou if q.present else None, q.intervals.iou),
            **estimate("ARVD", q.estimated.arvd if q.present else None, q.intervals.arvd),
            **estimate("RVD", q.estimated.rvd if q.present else None, q.intervals.rvd),
            "volume ml": q.mask_volume_ml,
            "boxes": len(q.extracted.boxes),
        }
        for q in assessment.structures
    ]


def _slice_rows(assessment: Assessment, count: int) -> list[Row]:
    rows: list[Row] = []
    for index in assessment.worst_slices(count):
        for q in assessment.structures:
            quality = next(s for s in q.raw.slices if s.index == index)
            boxes = [
                f"{b.start[0]}:{b.stop[0]},{b.start[1]}:{b.stop[1]}"
                for b in q.extracted.boxes
                if b.slice_index == index
            ]
            rows.append(
                {
                    "slice": index,
                    "structure": q.name,
                    "Dice": quality.metrics.dice,
                    "error sum": quality.error_sum,
                    "boxes": " ".join(boxes),
                }
            )
    return rows


def _assessment_lines(assessment: Assessment) -> list[Row]:
    from segqc.types import UNLIKE

    lines: list[Row] = []
    for q in assessment.structures:
        whole, error_sum = dataclasses.asdict(q.estimated), sum(s.error_sum for s in q.raw.slices)
        ends = {**_ends(q.intervals), "remark": UNLIKE if assessment.is_unlike else None}
        lines.append({"structure": q.name, "slice": None, **whole, "error_sum": error_sum, **ends})
        for s in q.raw.slices:
            metrics = dataclasses.asdict(s.metrics)
            none = dict.fromkeys(ends)  # intervals are of the 3D metrics
            lines.append({"structure": q.name, "slice": s.index, **metrics, "error_sum": s.error_sum, **none})
    return lines


def _ends(intervals: MetricIntervals) -> dict[str, Cell]:
    from segqc.types import applying

    cells: dict[str, Cell] = {}
    of_metrics = {f.name: applying(getattr(intervals, f.name)) for f in dataclasses.fields(intervals)}
    for name, interval in of_metrics.items():
        cells[f"{name}_low"] = interval.low if interval is not None else None
        cells[f"{name}_high"] = interval.high if interval is not None else None
    levels = [interval.level for interval in of_metrics.values() if interval is not None]
    return {**cells, "interval_level": levels[0] if levels else None}


def _no_mask_name(path: Path) -> CommandError:
    from segqc.volumes import SCAN_SUFFIXES

    return CommandError(f"{path}: masks are written as {', '.join(SCAN_SUFFIXES)}; choose one of these suffixes")


def _refuse_missing(*paths: Path) -> None:
    """Refuse paths that lead nowhere, before networks are looked for where they lead."""
    for path in paths:
        if not path.exists():
            raise CommandError(f"{path}: there is no such file; check the path")


def _models_folder(dataset: Path | None, scan: Path) -> Path:
    return dataset if dataset is not None else scan.resolve().parent


def _dataset_with_networks(folder: Path) -> Dataset | None:
    """The dataset folder; None where there is no store, which is not made only to look for networks."""
    from segqc.settings import load_settings

    if folder.is_dir() and not holds_store(folder, load_settings(folder)):
        return None
    return dataset_at(folder, None)


def _segmenter(folder: Path, model: Path | None) -> Segmenter:
    from segqc.networks.segmenter import Segmenter

    if model is not None:
        return Segmenter.load(model, "auto")
    dataset = _dataset_with_networks(folder)
    found = dataset.segmenter() if dataset is not None else None
    if found is None:
        raise CommandError(f"{folder}: no segmentation network; name one with --model or --dataset, or train it first")
    return found


def _assessor(folder: Path, model: Path | None) -> Assessor:
    from segqc.networks.assessor import Assessor

    if model is not None:
        return Assessor.load(model, backend="auto")
    dataset = _dataset_with_networks(folder)
    found = dataset.assessor() if dataset is not None else None
    if found is None:
        raise CommandError(f"{folder}: no SegQC network; name one with --model or --dataset, or train it first")
    return found
