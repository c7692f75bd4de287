"""``segqc pseudo-labels``: the masks that train without a person, and why they are trusted."""

from __future__ import annotations

from collections import Counter
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
_NONE: Final = "None is accepted; a round (segqc round FOLDER) chooses them."
_NEXT: Final = "the next round would accept it"


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
    """List the accepted pseudo-labels with estimate, rule and bundle, and what audits say of all of them.

    Below the table it says why other waiting scans have none, by the estimates and settings of now.
    """
    from segqc.loop.pseudo_labels import choose_now, pseudo_label_audits
    from segqc.quality.pseudo_labels import bound_in_words
    from segqc.store import pseudo_labels

    dataset = dataset_at(folder, config)
    dataset.refresh()
    rules = dataset.settings.pseudo_labels
    with dataset.store.read() as transaction:
        accepted = pseudo_labels.listing(transaction)
        found = pseudo_labels.listing(transaction, ended=True) if ended else accepted
    audits = pseudo_label_audits(dataset, rules)
    choice = choose_now(dataset)
    known = {record.label.scan for record in accepted}
    refused: dict[str, str] = {scan: reason for scan, reason in choice.refused.items() if scan not in known}
    refused |= {scan.scan: _NEXT for scan in choice.accepted if scan.scan not in known}
    reasons = Counter(refused.values())
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
    extra: dict[str, object] = {
        "rule": str(rules),
        "audits": bound_in_words(audits),
        "audited": audits.audited,
        "bad": audits.bad,
        "bound": audits.bound,
        "reasons": dict(reasons.most_common()),
        "not_accepted": refused,
    }
    empty = _OFF if rules.mode == "off" else _NONE
    title = f"{folder}: {len(accepted)} accepted pseudo-labels"
    if rules.mode == "off" and accepted:
        title += ", turned off ([pseudo_labels] in segqc.toml): none of them trains, and the next round drops them"
    emit(rows, title, as_json=as_json, as_csv=as_csv, extra=extra, key="pseudo_labels", terms=_TERMS, empty=empty)
    if reasons and not as_json:
        counts = "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common())
        typer.echo(f"{len(refused)} waiting scans have none ({counts}).", err=as_csv)
