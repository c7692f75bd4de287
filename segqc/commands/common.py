"""What groups of commands share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from segqc.settings import Settings
    from segqc.store.store import Store
    from segqc.store.upkeep import Report

StudiesFolder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Studies folder: scans, and labels/final.", show_default=False)
]


class CommandError(ValueError):
    """A command cannot do what was asked; says why and what to do."""


def settings_of(folder: Path) -> Settings:
    """The settings of a studies folder.

    Raises:
        CommandError: if there is no such folder.
        SettingsError: if its ``segqc.toml`` can't be used.
    """
    from segqc.settings import load_settings

    if not folder.is_dir():
        raise CommandError(f"{folder}: no such folder; name a folder of scans (.nii, .nii.gz or .nrrd)")
    return load_settings(folder)


def kept_store(folder: Path) -> Store:
    """The store of a studies folder as it was left: what lies in the folder by now is not taken in."""
    from segqc.store.store import Store

    return Store.open(folder, settings_of(folder).store.url)


def open_store(folder: Path) -> Store:
    """The store of a studies folder, with all in it that lies in the folder now."""
    from segqc.store.folder import take_in

    store, settings = kept_store(folder), settings_of(folder)
    take_in(store, settings.patient_of, settings.placing())
    return store


@contextmanager
def progress() -> Iterator[Report]:
    """A bar on the error stream where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _done, _total, _what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, int] = {}

        def report(done: int, total: int, what: str) -> None:
            task = tasks[what] if what in tasks else tasks.setdefault(what, bars.add_task(what))
            bars.update(bars.task_ids[task], completed=done, total=total)

        yield report
