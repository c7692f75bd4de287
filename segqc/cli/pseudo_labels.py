"""``segqc pseudo-labels``: the masks that train without a person, and why they are trusted."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from segqc.cli.common import ESTIMATE_PANEL, AsCsv, AsJson, ConfigFile, DatasetFolder, Row, dataset_at, emit

app = typer.Typer()

_TERMS: Final = (
    "estimated Dice: of the worst structure. lower end: the least of all structures' intervals, so perhaps another "
    "structure's than the one in the brackets of segqc rank. bundle: the networks "
    "that made the mask and accepted it. since: when. audit: whether a person checks it. ended because: why it no "
    "longer trains (--ended). bad: a true Dice below min_dice of [pseudo_labels] in segqc.toml."
)
_OFF: Final = "They are turned off (mode in the table [pseudo_labels] of segqc.toml)."
_NONE: Final = "None is accepted. A round (segqc round FOLDER) chooses them, and says why others are none."


@app.command("pseudo-labels", rich_help_panel=ESTIMATE_PANEL)
def list_pseudo_labels(
    folder: DatasetFolder,
    ended: Annotated[
        bool, typer.Option("--ended", help="Also list those that train no more, with the reason.")
    ] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """List the accepted pseudo-labels with estimate, rule and bundle, and what audits say of all of them."""
    from segqc.loop.pseudo_labels import pseudo_label_audits
    from segqc.quality.pseudo_labels import bound_in_words
    from segqc.store import pseudo_labels

    dataset = dataset_at(folder, config)
    dataset.refresh()
    rules = dataset.settings.pseudo_labels
    with dataset.store.read() as transaction:
        accepted = pseudo_labels.listing(transaction)
        found = pseudo_labels.listing(transaction, ended=True) if ended else accepted
    audits = pseudo_label_audits(dataset, rules)
    rows: list[Row] = [
        {
            "scan": record.label.scan,
            "version": record.label.id,
            "estimated Dice": record.dice,
            "lower end": record.low,
            "level": record.level,
            "rule": record.rule,
            "bundle": record.label.bundle.id if record.label.bundle is not None else None,
            "since": record.label.made_at.isoformat(timespec="seconds"),
            "audit": record.is_audited,
            "ended because": record.ended_because,
        }
        for record in found
    ]
    extra = {
        "rule": str(rules),
        "audits": bound_in_words(audits),
        "audited": audits.audited,
        "bad": audits.bad,
        "bound": audits.bound,
    }
    empty = _OFF if rules.mode == "off" else _NONE
    title = f"{folder}: {len(accepted)} accepted pseudo-labels"
    if rules.mode == "off" and accepted:
        title += ", turned off ([pseudo_labels] in segqc.toml): none of them trains, and the next round drops them"
    emit(rows, title, as_json=as_json, as_csv=as_csv, extra=extra, key="pseudo_labels", terms=_TERMS, empty=empty)
