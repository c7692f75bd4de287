"""Commands on scans and their labels: who works on what, who changed what, and what a reviewer decides."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from segqc.cli.common import (
    ANNOTATE_PANEL,
    AsCsv,
    AsJson,
    CommandError,
    ConfigFile,
    DatasetFolder,
    Row,
    brackets,
    checked,
    dataset_at,
    emit,
    estimate,
    me,
    numbers,
    refuse_overwriting,
    scan_named,
    shown_progress,
)
from segqc.text import visible

if TYPE_CHECKING:
    from segqc.loop.checking import LabelCheck
    from segqc.loop.dataset import Dataset
    from segqc.loop.proposal_worth import ProposalWorth
    from segqc.store.records import LabelRecord

app = typer.Typer()

_SCAN_TERMS: Final = (
    "fold: patients of one fold are left out together when networks are trained for masks. split: whether the patient "
    "trains networks or validates them. state: unlabelled = waits for a label; in progress = handed out; submitted, "
    "approved, rejected, excluded; missing = its file is gone; replaced = its file holds another scan now. checked "
    "slices: how many of the final label a person has looked at; - where it was all. estimated Dice: of the mask of a "
    "scan that waits, without a true mask."
)
_VERSION_TERMS: Final = (
    "tags: original = by the segmentation network; final = what trains; pseudo-label = a mask that trains, too (segqc "
    "pseudo-labels says why); returned = rejected or reopened, to be corrected again; reader-1, reader-2, ... = one "
    "annotator's each; attention-check = with a planted error, never kept; others, such as version_1, = as a client "
    "named them. checked slices: how many a person has looked at; - where it was all, and of masks. Dice before: of "
    "the structure that was corrected most, start against result, in what was opened. estimated Dice: by SegQC-Net, of "
    "what a person submitted."
)
_READING_TERMS: Final = (
    "dice: overlap of the two readers' labels, 0 to 1; - where neither has the structure. The readings are the tags "
    "reader-1, reader-2, ..."
)
_LEASE_TERMS: Final = (
    "draw: strategy = the strategy's choice; audit = at random of all scans; validation = at random of validating "
    "patients; pseudo-audit = at random of the pseudo-labels; rejected = sent back by a reviewer. probability: of a "
    "random draw; - where nothing was drawn. slices: that are asked for; - for the whole scan. estimated Dice: when "
    "the scan was handed out, without a true mask."
)
_COST_TERMS: Final = (
    "draw: strategy = the strategy's choice; audit = at random of all scans; validation = at random of validating "
    "patients; pseudo-audit = at random of the pseudo-labels; rejected = sent back by a reviewer. hours: from hand-out "
    "to submission, summed over the submitted scans."
)
_ATTENTION_TERMS: Final = (
    "planted: masks with a planted error that were handed out. submitted: those that came back. found: those in which "
    "at least half of the error was corrected."
)

_PROPOSAL_TERMS: Final = (
    "submitted: labels after a proposal was offered. measured: those with boxes taken whose scan has a final label. "
    "Dice before: of what these were made of, against the final label; mean over the structures. Dice with boxes "
    "taken: the same with nothing changed but the boxes taken; the final label may hold what was taken."
)

Scan = Annotated[
    str,
    typer.Argument(
        metavar="SCAN", help="The scan's id: its file name without .nii, .nii.gz or .nrrd.", show_default=False
    ),
]


@app.command(rich_help_panel=ANNOTATE_PANEL)
def scans(folder: DatasetFolder, config: ConfigFile = None, as_json: AsJson = False, as_csv: AsCsv = False) -> None:
    """List all scans: patient, fold, split, state, and the estimated Dice of those that wait.

    Below them: the files that were not accepted, each with the reason, and remarks on those that were.
    """
    from segqc.store import assessments, findings
    from segqc.store import labels as labelled
    from segqc.store import leases as leased
    from segqc.store import scans as stored
    from segqc.store.queue import shown_state

    dataset = dataset_at(folder, config)
    dataset.refresh()
    remarks = dataset.remarks()
    with dataset.store.read() as transaction:
        found = stored.listing(transaction)
        handed_out = {lease.scan for lease in leased.listing(transaction, state="open")}
        intervals = assessments.ranking_intervals(transaction)
        aside = findings.listing(transaction)
        finals = labelled.current_of_all(transaction, labelled.FINAL)

    rows: list[Row] = [
        {
            "scan": s.name,
            "patient": s.patient,
            "fold": s.fold,
            "split": s.split,
            "state": shown_state(s.state, s.missing_since, s.former_name, is_held=s.name in handed_out),
            "reason": s.reason,
            **checked(finals.get(s.name), folder / s.file, as_data=as_json or as_csv),
            **estimate(
                "estimated Dice",
                s.ranking_dice if s.former_name is None else None,
                intervals.get(s.name),
                as_json=as_json,
                as_csv=as_csv,
            ),
        }
        for s in found
    ]
    title = f"{folder}: {len(rows)} scans{brackets(intervals.values())}"
    rows_aside = [{"file": f.file, "kind": f.kind, "message": f.sentence} for f in aside]
    extra: dict[str, object] = {"findings": rows_aside, "remarks": remarks}
    emit(rows, title, as_json=as_json, as_csv=as_csv, key="scans", extra=extra, terms=_SCAN_TERMS)
    if aside and not as_json:
        typer.secho(f"{folder}: {len(aside)} files were not accepted", bold=True, err=as_csv)
        for finding in aside:
            typer.echo(visible(finding.sentence), err=as_csv)
    if remarks and not as_json:
        typer.secho(f"{folder}: {len(remarks)} remarks on files that were accepted", bold=True, err=as_csv)
        for remark in remarks:
            typer.echo(visible(remark), err=as_csv)


@app.command(rich_help_panel=ANNOTATE_PANEL)
def labels(
    folder: DatasetFolder,
    scan: Scan,
    restore: Annotated[
        int | None, typer.Option(metavar="VERSION", help="Make this version the current one of its tag again.")
    ] = None,
    export: Annotated[int | None, typer.Option(metavar="VERSION", help="Copy this version to --out.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where --export writes to.")] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Show who made which version of a scan's labels and what was changed; restore or export one."""
    from segqc.loop.history import versions
    from segqc.store import scans as known

    if (export is None) != (out is None):
        raise typer.BadParameter("--export and --out belong together", param_hint="--export")
    dataset = dataset_at(folder, config)
    scan = scan_named(dataset, scan)
    with dataset.store.read() as transaction:
        history = {summary.label.id: summary for summary in versions(transaction, scan)}
        record = known.get(transaction, scan)
    for wanted in (restore, export):
        if wanted is not None and wanted not in history:
            raise CommandError(
                f"the scan {scan!r} has no label version {wanted}; it has {', '.join(map(str, history))}"
            )
    if restore is not None:
        made = dataset.store.restore_label(restore, me())
        typer.echo(f"{scan}: version {restore} is the current label {made.tag!r} again, as version {made.id}")
        return
    if export is not None and out is not None:
        _export_label(dataset, history[export].label, out)
        return
    rows: list[Row] = []
    image = dataset.folder / record.file
    for summary in history.values():
        version, change = summary.label, summary.correction
        rows.append(
            {
                "version": version.id,
                "tag": version.tag,
                "current": "yes" if summary.is_current else "",
                "made by": version.actor.name,
                "as": version.source,
                "known by": version.actor.identified_by,
                "at": version.made_at.astimezone().strftime("%Y-%m-%d %H:%M:%S"),
                "from": version.parent,
                **checked(version, image, as_data=as_json or as_csv),
                "Dice before": summary.dice_before,
                "voxels changed": change.change.voxels_changed if change else None,
                "seconds": change.seconds if change else None,
                **_check(summary.check, as_json=as_json, as_csv=as_csv),
                "sha256": version.sha256[:12] if version.sha256 else None,
            }
        )
    in_brackets = brackets(s.check.assessment.dice_interval for s in history.values() if s.check is not None)
    emit(
        rows,
        f"{scan}: {len(rows)} label versions{in_brackets}",
        as_json=as_json,
        as_csv=as_csv,
        key="versions",
        terms=_VERSION_TERMS,
    )
    if not (as_json or as_csv):
        for number, summary in history.items():
            if summary.check is not None:
                typer.echo(f"version {number}, checked by bundle {summary.check.bundle}: {summary.check.sentence}")


def _check(check: LabelCheck | None, *, as_json: bool, as_csv: bool) -> Row:
    """The cells of what SegQC-Net said of a submission."""
    dice, interval = (None, None) if check is None else (check.assessment.dice, check.assessment.dice_interval)
    told = estimate("estimated Dice", dice, interval, as_json=as_json, as_csv=as_csv)
    if not (as_json or as_csv):
        return {**told}  # sentences are too long for a table
    bundle, sentence = (None, None) if check is None else (check.bundle, check.sentence)
    return {**told, "by bundle": bundle, "check": sentence}


def _export_label(dataset: Dataset, version: LabelRecord, out: Path) -> None:
    from segqc.volumes import atomic_write

    source = dataset.store.kept_file(version)
    if not out.name.endswith(version.suffix or ""):
        raise CommandError(f"{out}: the version {version.id} is a {version.suffix} file; give it this suffix")
    refuse_overwriting(out)
    with atomic_write(out) as temporary:
        temporary.write_bytes(source.read_bytes())
    typer.echo(f"{out}: version {version.id} of {version.scan}")


class Decision(StrEnum):
    """What a reviewer decides."""

    APPROVE = "approve"
    REJECT = "reject"
    EXCLUDE = "exclude"
    REOPEN = "reopen"


@app.command(rich_help_panel=ANNOTATE_PANEL)
def review(
    folder: DatasetFolder,
    scan: Scan,
    decision: Annotated[Decision, typer.Argument(metavar="DECISION", help="What to do with it.", show_default=False)],
    reason: Annotated[str | None, typer.Option(help="Why; required for reject and exclude.")] = None,
    config: ConfigFile = None,
) -> None:
    """Approve a submitted scan, reject it (back into the queue), exclude it, or reopen it."""
    from segqc.loop.review import STATE_OF
    from segqc.loop.review import review as review_scan

    dataset = dataset_at(folder, config)
    scan = scan_named(dataset, scan)
    review_scan(dataset, scan, STATE_OF[decision.value], me(), reason)
    typer.echo(visible(f"{scan}: {STATE_OF[decision.value]}{f' ({reason})' if reason else ''}"))


@app.command(rich_help_panel=ANNOTATE_PANEL)
def readings(
    folder: DatasetFolder,
    scan: Annotated[
        str | None, typer.Argument(metavar="SCAN", help="One scan's id (default: all with readings).")
    ] = None,
    add: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="First add this folder's label files, named like the scans, as readings."),
    ] = None,
    reader: Annotated[str | None, typer.Option(help="The reader whose labels --add adds.")] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Compare several annotators' labels of the same scan: Dice of each pair of readers, by structure."""
    from segqc.loop.agreement import find_labels
    from segqc.loop.readers import add_reading, inter_rater
    from segqc.store.records import Actor

    if (add is None) != (reader is None):
        raise typer.BadParameter("--add and --reader belong together", param_hint="--add")
    dataset = dataset_at(folder, config)
    names = [scan_named(dataset, scan)] if scan is not None else [entry.id for entry in dataset.scans()]
    if add is not None and reader is not None:
        found = {name: path for name in names if (path := find_labels(add, name)) is not None}
        if not found:
            raise CommandError(f"{add}: no label file is named as a scan of {folder}")
        with shown_progress() as progress:
            for i, (name, path) in enumerate(found.items(), start=1):
                add_reading(dataset, name, path, Actor(kind="person", name=reader, identified_by="command"))
                progress.step(i, len(found), "adding readings", name, unit="readings")
    pairs = [pair for name in names for pair in inter_rater(dataset, name)]
    if not pairs and add is None:
        raise CommandError(f"{folder}: no scan was read by two annotators yet")
    if not pairs:
        typer.echo(f"{folder}: readings kept; nobody else has read these scans yet")
        return
    by_structure: dict[str, list[float]] = {}
    for pair in pairs:
        if pair.dice is not None:
            by_structure.setdefault(pair.structure, []).append(pair.dice)
    rows: list[Row] = [dataclasses.asdict(pair) for pair in pairs]
    means: list[Row] = [
        {"structure": name, "pairs": len(dice), "mean Dice": sum(dice) / len(dice), "lowest": min(dice)}
        for name, dice in by_structure.items()
    ]
    if as_json:
        emit(rows, "", as_json=True, as_csv=as_csv, key="pairs", extra={"structures": [dict(row) for row in means]})
        return
    emit(rows, f"{folder}: readers against each other", as_csv=as_csv, terms=_READING_TERMS)
    if not as_csv:
        emit(means, "by structure")


@app.command(rich_help_panel=ANNOTATE_PANEL)
def consensus(
    folder: DatasetFolder,
    scan: Scan,
    by: Annotated[
        str, typer.Option(help="staple, majority, or the name of the reader whose label is taken.")
    ] = "staple",
    config: ConfigFile = None,
) -> None:
    """Make one final label from several annotators' labels of a scan."""
    from segqc.loop.readers import make_consensus

    dataset = dataset_at(folder, config)
    scan = scan_named(dataset, scan)
    made = make_consensus(dataset, scan, by, me())
    typer.echo(f"{scan}: the final label is now version {made.id}, by {by}")


@app.command(rich_help_panel=ANNOTATE_PANEL)
def leases(
    folder: DatasetFolder,
    every: Annotated[bool, typer.Option("--all", help="Also list what was handed out before.")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """List the scans that are handed out: to whom, until when, and what chose them."""
    from segqc.selection import scores
    from segqc.store import assessments
    from segqc.store import leases as stored

    dataset = dataset_at(folder, config)
    with dataset.store.read() as transaction:
        found = stored.listing(transaction, state=None if every else "open")
        judged = {lease.id: lease.assessment for lease in found if lease.assessment is not None}
        dice = assessments.dice(transaction, list(judged.values()))
        intervals = assessments.dice_intervals(transaction, list(judged.values()))
        reasons = stored.skip_reasons(transaction) if every else {}
    # a baseline may have chosen by an estimate of its own, where SegQC-Net has none
    by_baseline = {name for name, score in scores().items() if score.is_dice and not score.is_estimate}
    own = {lease.id: lease.score for lease in found if lease.draw == "strategy" and lease.strategy in by_baseline}
    rows: list[Row] = [
        {
            "scan": lease.scan,
            "to": lease.actor.name,
            "known by": lease.actor.identified_by,
            "state": lease.state,
            "handed out": lease.handed_out_at.astimezone().strftime("%Y-%m-%d %H:%M:%S"),
            "until": lease.expires_at.astimezone().strftime("%Y-%m-%d %H:%M:%S"),
            "strategy": lease.strategy,
            "draw": lease.draw,
            "probability": lease.probability,
            "slices": numbers(lease.slices),
            **estimate(
                "estimated Dice",
                dice[judged[lease.id]] if lease.id in judged else own.get(lease.id),
                intervals.get(judged[lease.id]) if lease.id in judged else None,
                as_json=as_json,
                as_csv=as_csv,
            ),
            **({"skipped because": reasons.get(lease.id)} if every else {}),
        }
        for lease in found
    ]
    title = f"{folder}: {len(rows)} scans handed out{brackets(intervals.values())}"
    emit(rows, title, as_json=as_json, as_csv=as_csv, key="leases", terms=_LEASE_TERMS)


@app.command(rich_help_panel=ANNOTATE_PANEL)
def costs(folder: DatasetFolder, config: ConfigFile = None, as_json: AsJson = False, as_csv: AsCsv = False) -> None:
    """Sum up what annotation has cost: scans and hours, by strategy, audit draws and validation scans.

    Below them: how many planted errors each annotator got and found, where there are attention checks; and how many
    boxes of proposals each was offered and took, and what these have changed.
    """
    from segqc.store import attention_checks
    from segqc.store import labels as labelled
    from segqc.store import leases as stored

    dataset = dataset_at(folder, config)
    with dataset.store.read() as transaction:
        found = stored.costs(transaction)
        attention = attention_checks.by_annotator(transaction)
        uses_proposals = bool(labelled.taken_proposals(transaction))
    rows: list[Row] = [dataclasses.asdict(cost) for cost in found]
    total = sum(cost.submitted for cost in found)
    rows_of_attention: list[Row] = [
        {
            "annotator": own.actor.name,
            "known by": own.actor.identified_by,
            "planted": own.planted,
            "submitted": own.submitted,
            "found": own.found,
        }
        for own in attention
    ]
    worth = _proposal_worth(dataset) if uses_proposals else []
    rows_of_proposals: list[Row] = [
        {
            "annotator": own.actor.name,
            "known by": own.actor.identified_by,
            "submitted": own.submissions,
            "boxes offered": own.boxes_offered,
            "boxes taken": own.boxes_taken,
            "measured": own.measured,
            "Dice before": own.dice_before,
            "Dice with boxes taken": own.dice_after,
        }
        for own in worth
    ]
    title = f"{folder}: {total} scans submitted"
    extra = {"attention_checks": rows_of_attention, "proposals": rows_of_proposals}
    emit(rows, title, as_json=as_json, as_csv=as_csv, key="costs", extra=extra, terms=_COST_TERMS)
    if attention and not as_json and not as_csv:
        planted, overall = sum(own.submitted for own in attention), sum(own.found for own in attention)
        emit(rows_of_attention, f"{folder}: {overall} of {planted} planted errors found", terms=_ATTENTION_TERMS)
    if worth and not as_json and not as_csv:
        offered, taken = sum(own.boxes_offered for own in worth), sum(own.boxes_taken for own in worth)
        emit(rows_of_proposals, f"{folder}: {taken} of {offered} proposed boxes taken", terms=_PROPOSAL_TERMS)


def _proposal_worth(dataset: Dataset) -> list[ProposalWorth]:
    from segqc.loop.proposal_worth import proposal_worth  # what makes proposals needs PyTorch

    with shown_progress(log_lines=False) as progress:
        return proposal_worth(dataset, progress)
