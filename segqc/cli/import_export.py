"""``segqc import`` and ``segqc export``: dataset folders from and for other programs, tables, and archives."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segqc.cli.common import (
    CommandError,
    DatasetFolder,
    NewFolder,
    dataset_at,
    kept_store,
    open_store,
    scan_named,
    settings_of,
    shown_progress,
)
from segqc.text import visible

if TYPE_CHECKING:
    from segqc.io.case_list import CaseList, Imported

import_app = typer.Typer(no_args_is_help=True, help="Make a dataset folder from another program's folder.")
export_app = typer.Typer(no_args_is_help=True, help="Write a dataset folder for other programs.")

Source = Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder to read.", show_default=False)]
Target = Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to make; new or empty.", show_default=False)]
Link = Annotated[
    bool, typer.Option("--link", help="Make hard links to the scans instead of copies, where no conversion is needed.")
]
OnlyApproved = Annotated[
    bool, typer.Option("--only-approved", help="Only labels that were approved count, not all that were submitted.")
]


class Form(StrEnum):
    """What tables can be written as."""

    CSV = "csv"
    PARQUET = "parquet"


# ------------------------------------------------------------------------------------------------------------ import


@import_app.command("local")
def import_local(folder: DatasetFolder) -> None:
    """Take over a folder of MONAI Label's LocalDatastore, in place: scans, labels, and the notes in its JSON file."""
    from segqc.io.local_datastore import read_datastore, take_notes

    settings_of(folder)
    datastore = read_datastore(folder)
    _print_imported(folder, take_notes(open_store(folder), datastore))


@import_app.command("decathlon")
def import_decathlon(source: Source, folder: NewFolder, link: Link = False) -> None:
    """Make a dataset folder from a Medical Segmentation Decathlon task; its training labels become final labels."""
    from segqc.io.decathlon import read_task

    _import(read_task(source), folder, link=link)


@import_app.command("nnunet")
def import_nnunet(source: Source, folder: NewFolder, link: Link = False) -> None:
    """Make a dataset folder from an nnU-Net v2 raw data folder; its training labels become final labels."""
    from segqc.io.nnunet import read_raw

    _import(read_raw(source), folder, link=link)


@import_app.command("dicom")
def import_dicom(
    source: Source,
    folder: NewFolder,
    patient_tag: Annotated[
        str, typer.Option("--patient-tag", metavar="TAG", help="Tag that names the patient: a keyword, or 0010,0020.")
    ] = "PatientID",
) -> None:
    """Make a dataset folder from DICOM series, as a scanner or an archive exports them.

    Localizers, reports and series with missing slices are left aside and named. Of the tags, only the patient's and the
    series' own stay.
    """
    from segqc.io.dicom import make_dataset

    with shown_progress(log_lines=False) as progress:
        found = make_dataset(source, folder, patient_tag=patient_tag, progress=progress)
    _finish(folder, found)


def _import(case_list: CaseList, folder: Path, *, link: bool) -> None:
    from segqc.io.case_list import make_dataset

    with shown_progress(log_lines=False) as progress:
        found = make_dataset(case_list, folder, link=link, progress=progress)
    _finish(folder, found)


def _finish(folder: Path, found: Imported) -> None:
    """Take a new dataset folder into its store, and print what was taken and what was not."""
    if found.scans:
        open_store(folder)
    _print_imported(folder, found)


def _print_imported(folder: Path, found: Imported) -> None:
    """Print what was taken, and each file that was not with the reason.

    Raises:
        CommandError: if there is something, and nothing of it could be taken.
    """
    labels = f" and {found.labels} labels" if found.labels else ""
    typer.echo(f"{folder}: {found.scans} scans{labels} taken, {len(found.left_aside)} left aside")
    for item in found.left_aside:
        typer.echo(f"  {item.reason}")
    if found.left_aside and not found.scans:
        raise CommandError(f"{folder}: no scan could be taken; mend one of the files above and import again")


@import_app.command("archive")
def import_archive(
    source: Source,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder with the scans, and nothing else yet.", show_default=False)
    ],
) -> None:
    """Put what [bold]segqc export archive[/bold] wrote into the new store of a folder with the same scans."""
    from segqc.io.archive import import_archive as put

    with shown_progress(log_lines=False) as progress:
        counts = put(source, kept_store(folder), progress)
    _say(folder, counts)


# ------------------------------------------------------------------------------------------------------------ export


@export_app.command("local")
def export_local(folder: DatasetFolder, target: Target, link: Link = False) -> None:
    """Write scans, all current labels and notes as a folder that MONAI Label's LocalDatastore opens."""
    from segqc.io.local_datastore import write_datastore

    with shown_progress(log_lines=False) as progress:
        count = write_datastore(open_store(folder), target, link=link, progress=progress)
    in_part = f", {count.in_part} of them checked in part" if count.in_part else ""
    typer.echo(f"{target}: {count.scans} scans, {count.labels} labels{in_part}")


@export_app.command("decathlon")
def export_decathlon(
    folder: DatasetFolder, target: Target, only_approved: OnlyApproved = False, link: Link = False
) -> None:
    """Write a task folder as in the Medical Segmentation Decathlon; scans without a final label are its test scans."""
    from segqc.io.decathlon import write_task

    with shown_progress(log_lines=False) as progress:
        count = write_task(_dataset(folder, only_approved=only_approved), target, link=link, progress=progress)
    in_part = f"; left out were {count.in_part} labels that were checked in part" if count.in_part else ""
    typer.echo(f"{target}: {count.scans} scans, {count.labels} of them with a label{in_part}")


@export_app.command("nnunet")
def export_nnunet(
    folder: DatasetFolder, target: Target, only_approved: OnlyApproved = False, link: Link = False
) -> None:
    """Write an nnU-Net v2 raw data folder; scans without a final label are its test scans."""
    from segqc.io.nnunet import write_raw

    with shown_progress(log_lines=False) as progress:
        count = write_raw(_dataset(folder, only_approved=only_approved), target, link=link, progress=progress)
    in_part = f"; {count.in_part} of the labels were checked in part, the rest is 'ignore'" if count.in_part else ""
    typer.echo(f"{target}: {count.scans} scans, {count.labels} of them with a label{in_part}")


def _dataset(folder: Path, *, only_approved: bool) -> CaseList:
    from segqc.io.case_list import case_list_of

    return case_list_of(open_store(folder), settings_of(folder).structure_list(), only_approved=only_approved)


@export_app.command("dicom")
def export_dicom(
    folder: DatasetFolder,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder for the files.", show_default=False)],
    scan: Annotated[
        list[str] | None, typer.Option(metavar="SCAN", help="Only this scan's; repeat. By default all that wait.")
    ] = None,
    store: Annotated[bool, typer.Option("--store", help="Also store them in the PACS.")] = False,
) -> None:
    """Write estimates as DICOM reports (TID 1500) and error maps as fractional SEG, for scans that come from a PACS."""
    from segqc.loop.dicom_reports import write_reports

    dataset = dataset_at(folder, None)
    names = [scan_named(dataset, name) for name in scan or ()]
    with shown_progress(log_lines=False) as progress:
        count = write_reports(dataset, target, names, store=store, progress=progress)
    there = " and in the PACS" if store else ""
    typer.echo(f"{target}: {count.reports} reports, {count.error_maps} error maps{there}")
    for name, reason in count.left_out.items():
        typer.echo(visible(f"  {name}: {reason}"))


@export_app.command("tables")
def export_tables(
    folder: DatasetFolder,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder for the tables.", show_default=False)],
    form: Annotated[Form, typer.Option("--format", help="File format.")] = Form.CSV,
) -> None:
    """Write assessments, corrections, leases, label versions and events, one file each; older files are replaced."""
    from segqc.io.tables import write_tables

    _say(target, write_tables(open_store(folder), target, form.value))


@export_app.command("archive")
def export_archive(folder: DatasetFolder, target: Target) -> None:
    """Write all rows and all label versions, to import them elsewhere, on SQLite or PostgreSQL."""
    from segqc.io.archive import export_archive as write

    with shown_progress(log_lines=False) as progress:
        counts = write(open_store(folder), target, progress)
    _say(target, counts)


def _say(folder: Path, counts: Mapping[str, int]) -> None:
    typer.echo(f"{folder}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
