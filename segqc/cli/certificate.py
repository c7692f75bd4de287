"""``segqc certify``: how many labels of the data set are good, by random audits alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from segqc.cli.common import (
    ESTIMATE_PANEL,
    AsCsv,
    AsJson,
    CommandError,
    ConfigFile,
    DatasetFolder,
    Row,
    dataset_at,
    emit,
)

if TYPE_CHECKING:
    from segqc.loop.certificate import GroupCertificate

app = typer.Typer()

_TERMS: Final = (
    "corrected: by a person, wholly; these count as good. judged: nobody has corrected them, and audits speak of them. "
    "unknown: nothing speaks for them (no mask, one of another network, a rejected label, a scan that was put aside or "
    "whose audit nobody answered; --by-state tells which); these count as bad. audits: masks of the network in "
    "question that were drawn at random; bad: those below the Dice, or not answered. at least: the share of good "
    "labels, by a one-sided 95% bound that holds for each row by itself. missing: how many more audits without a bad "
    "one would do; - where none would. A row without a name: labels of no group."
)
_NOTABLE: Final = 5  # scans that are named


@app.command(rich_help_panel=ESTIMATE_PANEL)
def certify(
    folder: DatasetFolder,
    dice: Annotated[
        float, typer.Option(min=0, max=1, help="A label is good from this Dice on, of its worst structure.")
    ] = 0.8,
    share: Annotated[
        float, typer.Option(min=0, max=1, help="The share of good labels that you would like to be sure of.")
    ] = 0.9,
    groups: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX", help="Finds a label's group in the name of its patient, else of its scan; a row for each."
        ),
    ] = None,
    by_state: Annotated[
        bool, typer.Option("--by-state", help="A row for each state: corrected, pseudo-label, network mask, ...")
    ] = False,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="Take a simulated annotator's corrections instead of people's.")
    ] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Say how many labels of the data set are good at least, by its random audits alone.

    The data set is what it would be if it were finished now: people's labels, and the network's masks of all other
    scans. With too few audits, it says how many are missing.
    """
    from segqc.loop.certificate import Wanted, certify_all, certify_groups, certify_states
    from segqc.quality.certificate import certificate_sentence
    from segqc.store import dataset_labels

    if groups is not None and by_state:
        raise CommandError("--groups and --by-state: choose one of the two")
    dataset = dataset_at(folder, config)
    dataset.refresh()
    with dataset.store.read() as transaction:
        found = dataset_labels.listing(transaction, simulated=simulated)
    wanted = Wanted(dice, share)
    all_ = certify_all(found, wanted)
    rows = [all_]
    if groups is not None:
        rows += certify_groups(found, wanted, groups)
    elif by_state:
        rows += certify_states(found, wanted)
    sentence = certificate_sentence(all_.said, dice, share)
    extra = {
        "sentence": sentence,
        "dice": dice,
        "share": share,
        "segmenter": found.segmenter,
        "unanswered": list(all_.unanswered),
    }
    emit(
        [_row(row) for row in rows],
        f"{folder}: {sentence}",
        as_json=as_json,
        as_csv=as_csv,
        extra=extra if as_json else {},
        key="certificates",
        terms=_TERMS,
    )
    if not as_json and all_.unanswered:
        typer.echo(_unanswered(all_.unanswered), err=as_csv)


def _row(row: GroupCertificate) -> Row:
    said = row.said
    return {
        "group": row.group,
        "labels": said.labels,
        "patients": row.patients,
        "corrected": said.corrected,
        "judged": said.judged,
        "unknown": said.unknown,
        "audits": said.audits,
        "bad": said.bad,
        "at least": said.at_least,
        "missing": said.missing,
    }


def _unanswered(scans: tuple[str, ...]) -> str:
    named = ", ".join(scans[:_NOTABLE]) + (", ..." if len(scans) > _NOTABLE else "")
    return f"Drawn or put aside, and not corrected: {named}. They count as bad until somebody labels them."
