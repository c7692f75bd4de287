"""The commands that make a dataset folder: `segqc phantom` and `segqc prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from segqc.cli.common import MAKE_PANEL, NewFolder, structure_flag

app = typer.Typer()

Seed = Annotated[int, typer.Option(help="Decides every random draw: the same seed gives the same result.")]


@app.command(rich_help_panel=MAKE_PANEL)
def phantom(
    folder: NewFolder,
    scans: Annotated[int, typer.Option(min=1, help="Number of scans.")] = 24,
    labelled: Annotated[int, typer.Option(min=0, help="How many of them get a final label.")] = 8,
    seed: Seed = 0,
) -> None:
    """Draw a dataset folder of fetal-MRI-like phantoms, to try everything without patient data."""
    from segqc.phantom import write_datastore

    if labelled > scans:
        raise typer.BadParameter(f"{labelled} labelled scans of {scans}", param_hint="--labelled")
    write_datastore(folder, scans=scans, labelled=labelled, seed=seed)
    typer.echo(f"{folder}: {scans} scans, {labelled} of them with a final label")


@app.command(rich_help_panel=MAKE_PANEL)
def prepare(
    labelled_data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="Data set: images/, labels/ and perhaps splits.json.", show_default=False),
    ],
    folder: NewFolder,
    labelled: Annotated[int, typer.Option(min=0, help="Number of scans with a final label.")] = 30,
    unlabelled: Annotated[
        int, typer.Option(min=0, help="Number of scans without one; their truth goes to truth/.")
    ] = 50,
    structure: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUES", help="A structure and its label values (head=1, or brain=2,3); repeat."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Draw only from this entry of splits.json.")] = None,
    seed: Seed = 0,
) -> None:
    """Make a dataset folder from a data set whose labels are known, and hide the truth of some scans."""
    from segqc.loop.prepare import prepare as make

    structures = dict(structure_flag(text) for text in structure or ())
    made = make(
        labelled_data, folder, labelled=labelled, unlabelled=unlabelled, structures=structures, split=split, seed=seed
    )
    typer.echo(f"{folder}: {len(made.labelled)} scans with a final label, {len(made.unlabelled)} without")
