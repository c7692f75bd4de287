"""``segqc pacs``: which final labels lie in the PACS that scans come from, and what is to be done there."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from segqc.cli.common import (
    ANNOTATE_PANEL,
    AsCsv,
    AsJson,
    CommandError,
    ConfigFile,
    DatasetFolder,
    Row,
    dataset_at,
    emit,
)

app = typer.Typer()

_TERMS: Final = (
    "version: of the scan's label. state: storing = to be stored; stored = lies there; empty = has no voxel, and so no "
    "SEG; withdrawn = removed there, as another version is final; left = should be removed, and cannot be. from: own = "
    "made of the label; found = the label was made of it. attempts: that failed; the next one comes by itself."
)


@app.command(rich_help_panel=ANNOTATE_PANEL)
def pacs(
    folder: DatasetFolder,
    store: Annotated[
        bool, typer.Option("--store", help="First bring the final labels there that are not there yet.")
    ] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Look through the PACS that the scans come from, and list the final labels there.

    A server and its worker do both by themselves.
    """
    from segqc.store import pacs as stored

    dataset = dataset_at(folder, config)
    if dataset.pacs is None:
        raise CommandError(f"{folder}: its scans come from no PACS; segqc serve URL --folder FOLDER names one")
    dataset.refresh()
    problem = dataset.pacs.problem
    if store and problem is None and dataset.publisher is not None:
        dataset.publisher.publish()
    with dataset.store.read() as transaction:
        found = stored.segmentations(transaction)
        waiting = stored.to_be_done(transaction)
    rows: list[Row] = [
        {
            "scan": record.scan,
            "version": record.label,
            "state": record.state,
            "from": record.origin,
            "series": record.series_uid,
            "attempts": record.attempts,
            "problem": record.problem,
            "since": record.changed_at.isoformat(timespec="seconds"),
        }
        for record in found
    ]
    count = f"{len(dataset.scans())} scans, {len(rows)} label versions, {waiting} to be done"
    emit(
        rows,
        f"{dataset.settings.pacs.url}: {count}",
        as_json=as_json,
        as_csv=as_csv,
        extra={"to_be_done": waiting, "remarks": dataset.remarks()},
        key="segmentations",
        terms=_TERMS,
        empty="No label version is there yet.",
    )
    if problem is not None:
        raise CommandError(problem)
