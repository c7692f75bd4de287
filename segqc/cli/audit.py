"""``segqc audit``: the final labels that are probably wrong, and those that somebody has found right."""

from __future__ import annotations

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
    dataset_at,
    emit,
    estimate,
    me,
    numbers,
    scan_named,
    shown_progress,
)
from segqc.text import visible

if TYPE_CHECKING:
    from segqc.loop.dataset import Dataset
    from segqc.store.label_verdicts import AuditedLabel

app = typer.Typer()

_TERMS: Final = (
    "Labels with likely errors come first, then by the estimate. structure: with the lowest estimated Dice of the "
    "label, by networks that have not trained from the patient's labels. slices: with likely errors, the worst first, "
    "counted from 0. marked right: who has looked at this version of the label and found nothing wrong (segqc audit "
    "FOLDER --mark SCAN); another version has no mark."
)
_NONE: Final = "No scan has a final label yet."


@app.command("audit", rich_help_panel=ANNOTATE_PANEL)
def audit_labels(
    folder: DatasetFolder,
    mark: Annotated[
        list[str] | None, typer.Option(metavar="SCAN", help="Only note that this scan's label is right; repeat.")
    ] = None,
    unmark: Annotated[
        list[str] | None, typer.Option(metavar="SCAN", help="Only take such a mark back; repeat.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Judge again what the serving bundle has judged.")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Find mistakes in the final labels: each is judged by networks that have not seen its patient, worst first.

    Continues where an earlier run stopped, and with labels that have come since.
    """
    dataset = dataset_at(folder, config)
    if mark or unmark:
        _mark(dataset, mark or [], unmark or [])
        return
    from segqc.loop.audit import audit
    from segqc.store import label_verdicts

    with shown_progress(log_lines=not as_json) as progress:
        result = audit(dataset, progress, force=force)
    with dataset.store.read() as transaction:
        found = label_verdicts.listing(transaction)
    rows = [_row(label, as_json=as_json, as_csv=as_csv) for label in found]
    intervals = [worst.intervals.dice for label in found if (worst := label.worst) is not None]
    marked = sum(label.mark is not None for label in found)
    title = f"{folder}: {len(found)} final labels, {marked} marked right{brackets(intervals)}"
    emit(
        rows,
        title,
        as_json=as_json,
        as_csv=as_csv,
        extra={"failures": result.failed},
        key="labels",
        terms=_TERMS,
        empty=_NONE,
    )
    if result.failed:
        first, reason = next(iter(result.failed.items()))
        raise CommandError(f"{len(result.failed)} labels could not be judged; the first, of {first}: {reason}")


def _mark(dataset: Dataset, right: list[str], taken_back: list[str]) -> None:
    """Set and remove marks, all of them or none."""
    from segqc.store import label_verdicts

    chosen = [(scan_named(dataset, scan), True) for scan in right]
    chosen += [(scan_named(dataset, scan), False) for scan in taken_back]
    with dataset.store.write() as transaction:
        for scan, is_right in chosen:
            change = label_verdicts.mark_right if is_right else label_verdicts.remove_mark
            change(transaction, scan, me())
    for scan, is_right in chosen:
        typer.echo(visible(f"{scan}: {'marked right' if is_right else 'the mark is removed'}"))


def _row(label: AuditedLabel, *, as_json: bool, as_csv: bool) -> Row:
    worst, mark = label.worst, label.mark
    row: Row = {
        "scan": label.scan,
        "structure": worst.name if worst is not None else None,
        **estimate(
            "estimated Dice",
            worst.estimated.dice if worst is not None else None,
            worst.intervals.dice if worst is not None else None,
            as_json=as_json,
            as_csv=as_csv,
        ),
        "slices": numbers(label.slices) or None,
        "what seems wrong": label.message,
        "made by": label.label.actor.name,
        "marked right": f"by {mark.actor.name}" if mark is not None else None,
    }
    if not as_json and not as_csv:
        return row
    verdict = label.verdict
    return {
        **row,
        "patient": label.patient,
        "state": label.state,
        "version": label.label.id,
        "error volume in ml": verdict.assessment.error_volume_ml if verdict is not None else None,
        "networks": verdict.networks if verdict is not None else None,
        "marked right": mark.actor.name if mark is not None else None,
        "marked at": mark.made_at.isoformat(timespec="seconds") if mark is not None else None,
    }
