"""``segqc models``: the bundles of networks of a dataset folder, and which one serves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from segqc.cli.common import AsCsv, AsJson, CommandError, DatasetFolder, Row, emit, kept_store, me, settings_of
from segqc.cli.report_cards import print_card, print_people_card, summary

if TYPE_CHECKING:
    from segqc.loop.publishing import Bundles, BundleStatus
    from segqc.networks.card import NetworkName

app = typer.Typer(no_args_is_help=True, help="List the bundles of networks of a dataset folder, or let one serve.")

_TERMS: Final = (
    "A bundle is a segmentation network and the SegQC-Net that assesses its masks, published together in "
    "segqc/models/<bundle>/. One serves. reason: what it was published for. MAE/constant, Spearman: what its estimated "
    "Dice is worth (segqc models show). held because: why it does not serve by itself. Files of old bundles are "
    "removed ([models] keep in segqc.toml); their rows stay."
)
_NONE: Final = (
    "No network was trained here yet. Label some scans and train both (segqc round FOLDER), or run the server, which "
    "trains first ones once enough scans are labelled."
)
_WITHOUT: Final[Mapping[NetworkName, str]] = {
    "segmentation": "scans get no masks",
    "segqc": "masks get no estimates, and scans are drawn at random",
}
_PUBLISHES: Final = ("train", "round")  # the jobs that end with a bundle
_MEGABYTE: Final = 1e6

BundleNumber = Annotated[int, typer.Argument(metavar="BUNDLE", help="The bundle's number.", show_default=False)]


@app.command("list")
def list_bundles(folder: DatasetFolder, as_json: AsJson = False, as_csv: AsCsv = False) -> None:
    """List all bundles: their networks, who published them and why, which one serves, and whether it is intact."""
    rows = [_row(status) for status in _bundles(folder).listing()]
    emit(rows, f"{folder}: bundles", as_json=as_json, as_csv=as_csv, key="bundles", terms=_TERMS, empty=_NONE)


@app.command()
def show(
    folder: DatasetFolder,
    number: Annotated[
        int | None, typer.Argument(metavar="[BUNDLE]", help="The bundle's number (default: the one that serves).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a bundle's estimates are worth: its report card, and what audit draws have said against them."""
    from segqc.quality.drift import drift_sentence
    from segqc.quality.drift import to_json as alarm_to_json
    from segqc.quality.report_card import people_to_json, to_json
    from segqc.store import bundles

    shelf = _bundles(folder)
    if number is None:
        with shelf.store.read() as transaction:
            number = bundles.serving_number(transaction)
        if number is None:
            raise CommandError(f"{folder}: no bundle serves; {_NONE}")
    opened = shelf.open(number)
    card, people = opened.manifest.report, opened.people_report()
    with shelf.store.read() as transaction:
        published = bundles.get(transaction, number)
    alarm = published.drift_alarm if settings_of(folder).models.drift_level else None
    if as_json:
        body = {
            "bundle": number,
            "serving": published.is_serving,
            "held_because": published.held_because,
            "report_card": None if card is None else to_json(card),
            "people_report_card": None if people is None else people_to_json(people),
            "drift_alarm": None if alarm is None else alarm_to_json(alarm),
        }
        typer.echo(json.dumps(body, indent=1))
        return
    state = "serves" if published.is_serving else "does not serve"
    held = f": held, {published.held_because}" if published.held_because is not None else ""
    typer.echo(f"{folder}: bundle {number} {state}{held}")
    if card is None:
        typer.echo("it has no report card: its estimates were never checked (segqc train segqc makes one)")
    print_card(card, more=True)
    print_people_card(people)
    if alarm is not None:
        typer.echo(drift_sentence(alarm))


@app.command()
def serve(folder: DatasetFolder, number: BundleNumber) -> None:
    """Let a bundle serve from now on: in one step, and without a restart of the server.

    The scans that wait have no estimate until the bundle has assessed them: a worker does so, or 'segqc score'.
    """
    from segqc.store import bundles, jobs

    shelf = _bundles(folder)
    with shelf.store.read() as transaction:
        before = bundles.serving_number(transaction)
        held = next((p.held_because for p in bundles.listing(transaction) if p.bundle.id == number), None)
    changed = shelf.serve(number, me())
    with shelf.store.read() as transaction:
        at_work = [job for kind in _PUBLISHES for job in jobs.open_jobs(transaction, kind) if job.state == "running"]
    place = f", in the place of bundle {before}" if changed and before is not None else "" if changed else " already"
    typer.echo(f"{folder}: bundle {number} serves{place}")
    if held is not None:
        typer.echo(f"it was held: {held}")
    for job in at_work:
        typer.echo(
            f"the {job.kind} that runs now (job {job.public_id}) will have its bundle held, as you chose this one by "
            f"hand meanwhile; segqc models serve {folder} BUNDLE lets it serve then"
        )
    bundle = shelf.open(number)
    for network, lost in _WITHOUT.items():
        if not bundle.holds(network):
            typer.echo(f"it holds no network {network}: {lost} until it is trained (segqc train {network} {folder})")


def _bundles(folder: Path) -> Bundles:
    from segqc.loop.publishing import Bundles

    return Bundles(kept_store(folder), settings_of(folder))


def _row(status: BundleStatus) -> Row:
    published, files = status.published, status.files
    made = published.published_at if published is not None else files.manifest.made_at if files is not None else None
    if published is not None:
        pair = published.bundle
        versions = {"segmentation": pair.segmenter_version, "segqc": pair.assessor_version}
        held = published.held_because
    else:
        versions = {n: e.version for n, e in files.manifest.networks.items()} if files is not None else {}
        held = files.manifest.held_because if files is not None else None
    return {
        "bundle": status.number,
        "made": made.isoformat(timespec="seconds") if made is not None else None,
        "segmentation": versions.get("segmentation"),
        "segqc": versions.get("segqc"),
        "by": published.actor.name if published is not None else None,
        "reason": published.reason if published is not None else "not recorded",
        "serving": published is not None and published.is_serving,
        **summary(files.manifest.report if files is not None else None),
        "held because": held,
        "MB": files.size() / _MEGABYTE if files is not None else None,
        "files": "intact" if status.problem is None else "removed" if status.is_removed else status.problem,
    }
