"""``segqc db``: copies, checks and repairs of a dataset folder's store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from segqc.cli.common import CommandError, DatasetFolder, kept_store, settings_of, shown_progress
from segqc.text import visible

DATABASE_PLACE: Final = "segqc/store.sqlite"
_MAX_NAMED: Final = 20

app = typer.Typer(no_args_is_help=True, help="Back up, restore, check and upgrade the store of a dataset folder.")


@app.command()
def backup(
    folder: DatasetFolder,
    target: Annotated[Path, typer.Argument(metavar="BACKUP", help="Folder to make.", show_default=False)],
) -> None:
    """Copy the database, every label version, the serving bundle and the settings, also while the server runs.

    [bold]segqc db restore[/bold] brings it back. Scans and other bundles are not part of it.
    """
    from segqc.settings import SETTINGS_FILE
    from segqc.store import maintenance

    with shown_progress(log_lines=False) as progress:
        count = maintenance.backup(kept_store(folder), target, also=[SETTINGS_FILE], progress=progress)
    typer.echo(f"{target}: the database and {count} label contents")
    if settings_of(folder).store.url is not None:
        typer.echo(f"the settings name the database by its url; where the backup is restored, it is {DATABASE_PLACE}")


@app.command()
def restore(
    backup: Annotated[Path, typer.Argument(metavar="BACKUP", help="Folder of the backup.", show_default=False)],
    folder: DatasetFolder,
) -> None:
    """Restore a backup: its database and labels replace those of the folder, which are set aside, not deleted.

    The bundle of networks that served comes back, too; a different one of the same number is set aside. Other bundles,
    scans and the folder's settings stay. Stop the server and the workers first.
    """
    from segqc.loop.publishing import Bundles
    from segqc.settings import SETTINGS_FILE
    from segqc.store import maintenance
    from segqc.store.restore import restore as bring_back

    url = settings_of(folder, may_begin=True).store.url
    if url is not None:
        where = "its own tools, or 'segqc import archive' into an empty one" if "postgres" in url else "a copy of it"
        raise CommandError(
            f"{folder}/{SETTINGS_FILE}: names a database outside the folder, which is restored by {where}; "
            f"without [store] url, it is {DATABASE_PLACE}"
        )
    with shown_progress(log_lines=False) as progress:
        done = bring_back(backup, folder, settings_file=SETTINGS_FILE, progress=progress)
        store = kept_store(folder)
        findings = [*maintenance.check(store, progress), *Bundles(store, settings_of(folder)).findings()]
    if done.upgraded_from is not None:
        typer.echo(f"{folder}: the tables were of revision {done.upgraded_from} and were upgraded")
    for finding in findings:
        typer.echo(visible(f"{finding.what}; {finding.remedy}"))
    if done.aside is not None:
        typer.echo(f"{done.aside}: what was there before; remove it when it is not needed any more")
    for file in done.not_in_backup[:_MAX_NAMED]:
        typer.echo(visible(f"{file}: is not in the backup; it lies in the folder above"))
    if len(done.not_in_backup) > _MAX_NAMED:
        typer.echo(f"and {len(done.not_in_backup) - _MAX_NAMED} more label files that are not in the backup")
    typer.echo(f"{folder}: restored from {backup}: {done.contents} label contents, {done.shown} label files")


@app.command()
def check(
    folder: DatasetFolder,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Repair what loses nothing: label files in labels/, leftovers of crashes."),
    ] = False,
) -> None:
    """Compare every row with its file and every file with its row; each content is read and hashed.

    The exit code is 1 if something is damaged or missing; files that are not taken in harm nothing.
    """
    from segqc.loop.publishing import Bundles
    from segqc.store import maintenance

    store = kept_store(folder)
    bundles = Bundles(store, settings_of(folder))
    with shown_progress(log_lines=False) as progress:
        if repair:
            restored = maintenance.repair(store, progress)
            bundles.sweep()
            typer.echo(f"{folder}: {restored.written} label files written again")
        findings = [*maintenance.check(store, progress), *bundles.findings()]
    for finding in findings:
        typer.echo(visible(f"{finding.what}; {finding.remedy}"))
    damaged = sum(finding.is_damage for finding in findings)
    if damaged:
        raise CommandError(f"{folder}: {damaged} of {len(findings)} findings are damage")
    typer.echo(f"{folder}: nothing is {'damaged' if findings else 'wrong'}")


@app.command()
def upgrade(folder: DatasetFolder) -> None:
    """Bring the database's tables to this version of segqc; back it up first."""
    from segqc.store import maintenance
    from segqc.store.store import Store

    before, after = maintenance.upgrade(Store(folder, settings_of(folder).store.url))
    typer.echo(f"{folder}: revision {after}, was {before or 'empty'} before")


@app.command("restore-views")
def restore_views(
    folder: DatasetFolder,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also overwrite files that somebody changed: the changes are lost.")
    ] = False,
) -> None:
    """Write the label files below labels/ again where they are missing or damaged."""
    from segqc.store import maintenance

    with shown_progress(log_lines=False) as progress:
        restored = maintenance.rebuild_views(kept_store(folder), overwrite=overwrite, progress=progress)
    typer.echo(f"{folder}: {restored.written} label files written again")
    for path in restored.edited:
        typer.echo(f"{path}: was changed by somebody and is left as it is; --overwrite replaces it")
