"""``segqc rounds``: what became of each round, when the next one begins, and whether it is worth it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Final

import typer

from segqc.cli.common import ESTIMATE_PANEL, AsCsv, AsJson, ConfigFile, DatasetFolder, Row, dataset_at, emit

if TYPE_CHECKING:
    from segqc.loop.rounds import RoundSummary

app = typer.Typer()

_TERMS: Final = (
    "why: who asked for it, or which setting. labels: scans with a final label when it began. pseudo-labels: "
    "masks that trained, too (segqc pseudo-labels). validation Dice: of its masks of the validation scans. audited, "
    "audit error: audit draws shown with its estimates and corrected, and how far the estimated Dice was off on "
    "average; each bundle begins with none, as an audit speaks of the estimates that were shown. bundle: serves, "
    "served before, or held, and why (segqc models serve). new corrections: scans whose final label no round has "
    "trained on, nor both networks of a bundle; simulated ones count."
)
_NONE: Final = (
    "No round was ever begun here; segqc round FOLDER begins one, [round] in segqc.toml says when others begin."
)


@app.command("rounds", rich_help_panel=ESTIMATE_PANEL)
def list_rounds(
    folder: DatasetFolder,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="Take a simulated annotator's audits instead of people's.")
    ] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """List the rounds: when and why each began, what it was made of and what came of it.

    Below the table it says when the next round begins by itself, and whether more rounds are worth it.
    """
    from segqc.loop.due import next_round_sentence, rounds_info
    from segqc.loop.rounds import ROUND_COLUMNS, summaries

    dataset = dataset_at(folder, config)
    with dataset.store.read() as transaction:
        found = summaries(transaction, simulated=simulated)
        info = rounds_info(transaction, dataset.settings.round)
    is_for_programs = as_json or as_csv
    rows = [{name: cell(s) for name, cell in ROUND_COLUMNS.items()} if is_for_programs else _row(s) for s in found]
    extra: dict[str, object] = {"next": dataclasses.asdict(info)} if as_json else {}
    title = f"{folder}: rounds"
    emit(rows, title, as_json=as_json, as_csv=as_csv, extra=extra, key="rounds", terms=_TERMS, empty=_NONE)
    for sentence in (next_round_sentence(info), info.message) if not as_json else ():
        typer.echo(sentence, err=as_csv)


def _row(summary: RoundSummary) -> Row:
    """A round for people: local times, and what belongs together in one cell."""
    began = summary.started_at or summary.put_at
    bundle = f"{summary.bundle} {summary.bundle_state}" if summary.bundle is not None else None
    held = f": {summary.held_because}" if summary.held_because is not None else ""
    problem = f": {summary.problem}" if summary.problem is not None else ""
    return {
        "round": summary.number,
        "began": f"{began.astimezone():%Y-%m-%d %H:%M}",
        "why": summary.reason or f"by {summary.actor.name}",
        "state": f"{summary.state}{problem}",
        "labels": summary.labelled,
        "pseudo-labels": summary.pseudo_labels,
        "validation Dice": summary.validation_dice,
        "audited": summary.audited,
        "audit error": summary.audit_error,
        "minutes": None if summary.minutes is None else f"{summary.minutes:.1f}",
        "bundle": None if bundle is None else f"{bundle}{held}",
    }
