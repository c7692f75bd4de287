"""The commands `segqc train segmentation` and `segqc train segqc`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segqc.cli.common import (
    AsJson,
    CommandError,
    ConfigFile,
    DatasetFolder,
    Row,
    ServeWorse,
    dataset_at,
    emit,
    given,
    me,
    shown_progress,
)
from segqc.cli.report_cards import print_card
from segqc.text import visible

if TYPE_CHECKING:
    from segqc.settings import NetworkName

app = typer.Typer(no_args_is_help=True, help="Train one of the two networks on a dataset folder's final labels.")


class Size(StrEnum):
    """Sizes of networks."""

    SMALL = "small"
    MEDIUM = "medium"
    PAPER = "paper"


Epochs = Annotated[
    int | None, typer.Option(min=1, help="Length of the training, in epochs (default: from the settings).")
]
TrainingSeed = Annotated[
    int | None, typer.Option("--seed", help="Decides every random draw (default: from the settings).")
]
NetworkSize = Annotated[Size | None, typer.Option(help="Size of the network (default: from the settings).")]


@app.command("segmentation")
def train_segmentation(
    folder: DatasetFolder,
    epochs: Epochs = None,
    size: NetworkSize = None,
    seed: TrainingSeed = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Train the segmentation network, which makes the masks.

    It says at the start what it trains and, after some steps, how long that takes. A training that was stopped goes on
    from its last finished epoch.
    """
    _train(folder, "segmentation", given(epochs=epochs, size=size, seed=seed), config, as_json)


@app.command("segqc")
def train_segqc(
    folder: DatasetFolder,
    epochs: Epochs = None,
    size: NetworkSize = None,
    seed: TrainingSeed = None,
    paper_recipe: Annotated[
        bool,
        typer.Option(
            "--paper-recipe", help="Train as in the paper: error as direct output, Dice loss, learning rate 5e-4."
        ),
    ] = False,
    serve: ServeWorse = False,
    observers: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Another observer's label files, named as the scans: where they differ from the final labels, nobody "
            "is said to be wrong. Readings of the folder count anyway.",
        ),
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Train SegQC-Net, which estimates how good masks are. This takes longest of all: minutes to hours.

    It learns from masks of networks that have not seen the scan. So it first trains a segmentation network for each
    fold of the patients, and then SegQC-Nets, by default one for each fold, too. It says at the start what it trains
    and, after some steps, how long that takes. A training that was stopped goes on from its last finished epoch.

    At the end it prints what the estimates are worth. Where they are worse than those of the networks that serve, the
    new network is kept, and does not serve by itself.
    """
    flags = given(epochs=epochs, size=size, seed=seed)
    if observers is not None and not observers.is_dir():
        raise CommandError(f"{observers}: no such folder of another observer's label files")
    _train(folder, "segqc", flags, config, as_json, paper_recipe=paper_recipe, serve=serve, observers=observers)


def _train(
    folder: Path,
    network: NetworkName,
    flags: Mapping[str, int | str],
    config: Path | None,
    as_json: bool,
    *,
    paper_recipe: bool = False,
    serve: bool = False,
    observers: Path | None = None,
) -> None:
    from segqc.loop.training import train
    from segqc.networks.bundle import model_name
    from segqc.quality.report_card import to_json

    dataset = dataset_at(folder, config, {"training": {network: dict(flags)}} if flags else {})
    settings = dataset.settings.training_settings(network)
    with shown_progress() as progress:
        chosen = settings.paper_recipe() if paper_recipe else settings
        trained = train(
            dataset, network, progress, chosen,
            actor=me(), purpose="segqc train", serve=serve, observers=observers,
        )  # fmt: skip
    path = dataset.bundles.folder / str(trained.bundle) / model_name(network)
    rows: list[Row] = [{"measure": name, "value": value} for name, value in trained.card.scores.items()]
    extra: dict[str, object] = {"model": str(path), "curve": str(dataset.training_folder(network) / "curve.png")}
    extra |= {"used": trained.used, "left_out": dict(trained.left_out)}
    extra |= {"patients": trained.patients, "measured_patients": trained.measured, "bundle": trained.bundle}
    report = trained.card.report
    if as_json:
        extra |= {"report_card": None if report is None else to_json(report), "held_because": trained.held_because}
    title = f"{network}, measured on {trained.measured} of {trained.patients} patients, without their own labels"
    emit(rows, title, as_json=as_json, extra=extra, key="scores")
    if not as_json:
        typer.echo(f"{folder}: {trained.used} labelled scans used, {len(trained.left_out)} left out")
        for reason in trained.left_out.values():
            typer.echo(visible(reason))
        print_card(report)  # that its bundle is held, and why, was logged as a warning when it was published
