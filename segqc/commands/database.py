"""``segqc db``: copies, checks and repairs of a studies folder's store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from segqc.commands.common import CommandError, StudiesFolder, kept_store, progress, settings_of

DATABASE_PLACE: Final = "segqc/store.sqlite"

app = typer.Typer(no_args_is_help=True, help="Back up, check and upgrade the store of a studies folder.")


@app.command()
def backup(
    folder: StudiesFolder,
    target: Annotated[Path, typer.Argument(metavar="BACKUP", help="Folder to make.", show_default=False)],
) -> None:
    """Copy the database, every label version and the settings, also while the server runs.

    To restore it, copy what is in BACKUP into a folder with the scans and run [bold]segqc db restore-views[/bold]
    there first. Scans and networks are not part of it.
    """
    from segqc.settings import SETTINGS_FILE
    from segqc.store import upkeep

    with progress() as report:
        count = upkeep.backup(kept_store(folder), target, also=[SETTINGS_FILE], report=report)
    typer.echo(f"{target}: the database and {count} label contents")
    if settings_of(folder).store.url is not None:
        typer.echo(f"the settings name the database by its url; where the backup is restored, it is {DATABASE_PLACE}")


@app.command()
def check(
    folder: StudiesFolder,
    repair: Annotated[
        bool, typer.Option("--repair", help="Repair what loses nothing: label files of labels/, leftovers of crashes.")
    ] = False,
) -> None:
    """Compare every row with its file and every file with its row; each content is read and hashed.

    The exit code is 1 if something is wrong.
    """
    from segqc.store import upkeep

    store = kept_store(folder)
    with progress() as report:
        if repair:
            restored = upkeep.repair(store, report)
            typer.echo(f"{folder}: {restored.written} label files written again")
        findings = upkeep.check(store, report)
    for finding in findings:
        typer.echo(f"{finding.what}; {finding.remedy}")
    if findings:
        raise CommandError(f"{folder}: {len(findings)} findings")
    typer.echo(f"{folder}: nothing is wrong")


@app.command()
def upgrade(folder: StudiesFolder) -> None:
    """Bring the database's tables to this version of segqc; back it up first."""
    from segqc.store import upkeep
    from segqc.store.store import Store

    before, after = upkeep.upgrade(Store(folder, settings_of(folder).store.url))
    typer.echo(f"{folder}: revision {after}, was {before or 'empty'} before")


@app.command("restore-views")
def restore_views(
    folder: StudiesFolder,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also where somebody changed the file: the change is lost.")
    ] = False,
) -> None:
    """Write the label files below labels/ again where they are missing or damaged.

    After a backup was copied into a folder, run this before anything else: a missing label file counts as removed.
    """
    from segqc.store import upkeep

    with progress() as report:
        restored = upkeep.rebuild_views(kept_store(folder), overwrite=overwrite, report=report)
    typer.echo(f"{folder}: {restored.written} label files written again")
    for path in restored.edited:
        typer.echo(f"{path}: was changed by somebody and is left as it is; --overwrite replaces it")
