"""The commands that keep running: `segqc serve`, `segqc worker` and `segqc round`; and `segqc ohif`."""

from __future__ import annotations

import contextlib
import logging
import signal
from pathlib import Path
from typing import Annotated

import typer

from segqc.cli.common import (
    ANNOTATE_PANEL,
    ESTIMATE_PANEL,
    CommandError,
    ConfigFile,
    DatasetFolder,
    ServeWorse,
    dataset_at,
    given,
    log_to_stderr,
    me,
)
from segqc.cli.report_cards import print_card
from segqc.text import LineFormatter

app = typer.Typer()


@app.command(rich_help_panel=ANNOTATE_PANEL)
def serve(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|URL",
            help="Dataset folder, or the DICOMweb address of a PACS whose series are the scans.",
            show_default=False,
        ),
    ],
    work: Annotated[
        Path | None,
        typer.Option("--folder", metavar="FOLDER", help="With a PACS: the folder that all else is kept in."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (default: 127.0.0.1, this machine only).")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on (default: 8000).")] = None,
    bootstrap: Annotated[
        bool | None,
        typer.Option(
            "--bootstrap/--no-bootstrap",
            help="Train first, small networks at the start if there are none (default: yes).",
        ),
    ] = None,
    sign_in: Annotated[
        bool | None,
        typer.Option(
            "--sign-in/--without-sign-in",
            help="Whether users sign in (segqc users). Without it whoever reaches the server may do everything "
            "(default: they do, but not on 127.0.0.1).",
        ),
    ] = None,
    worker: Annotated[
        bool,
        typer.Option(
            "--worker/--no-worker",
            help="Also start a worker, which trains and scores; otherwise run segqc worker yourself.",
        ),
    ] = True,
) -> None:
    """Serve a dataset folder, or the series of a PACS, to annotation clients: worst estimated mask first.

    The folder remembers its PACS in its segqc.toml; later, and for all other commands, its name is enough.
    """
    try:
        from segqc.server.serve import serve as run
    except ImportError as error:
        if error.name is None or not error.name.startswith("monailabel"):
            raise
        raise CommandError("the server is not installed; pip install 'segqc[server]'") from error
    from segqc.selection import strategies

    folder = _served_folder(source, work)
    flags = given(host=host, port=port, bootstrap=bootstrap)
    settings = dataset_at(folder, None, {"server": flags} if flags else {}, may_begin=True).settings.server
    if settings.strategy not in (there := strategies()):
        raise CommandError(
            f"{folder / 'segqc.toml'}: server.strategy: there is no strategy {settings.strategy!r}; there are "
            f"{', '.join(sorted(there))}"
        )
    run(
        folder,
        host=settings.host,
        port=settings.port,
        bootstrap=settings.bootstrap,
        inference_slots=settings.inference_slots,
        upload_limit_mb=settings.upload_limit_mb,
        upload_total_mb=settings.upload_total_mb,
        upload_pause_seconds=settings.upload_pause_seconds,
        allowed_hosts=settings.allowed_hosts,
        allowed_origins=settings.allowed_origins,
        sign_in=sign_in,
        worker=worker,
    )


def _served_folder(source: str, work: Path | None) -> Path:
    """The dataset folder to serve; one of a PACS is made, and remembers it."""
    from segqc.settings import remember_pacs

    if not source.startswith(("http://", "https://")):
        if work is not None:
            raise CommandError(f"{source}: is no address of a PACS; --folder belongs to one")
        return Path(source)
    if work is None:
        raise CommandError(f"{source}: say with --folder which folder labels, networks and the database are kept in")
    try:
        from segqc.pacs.client import PacsClient
    except ModuleNotFoundError as error:
        raise CommandError("what talks to a PACS is not installed; pip install 'segqc[server]'") from error
    remember_pacs(work, source, lambda settings: PacsClient(settings).check())
    return work


@app.command(rich_help_panel=ANNOTATE_PANEL)
def ohif() -> None:
    """Install a newer OHIF for the server's viewer (12 MB, by npm); without it, MONAI Label's own is served."""
    from segqc.server.ohif.install import VERSION, install_viewer

    folder = install_viewer()
    typer.echo(f"OHIF {VERSION} is in {folder}; a server serves it from its next start on.")


@app.command(rich_help_panel=ANNOTATE_PANEL)
def worker(
    folder: DatasetFolder,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="Run only these kinds of jobs: train, scoring, batch_infer, round, audit; repeat."),
    ] = None,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="End when no job is waiting.")] = False,
    parent: Annotated[
        int | None, typer.Option(metavar="PID", help="End when this process, which started it, has ended.")
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Run the jobs that clients ask the server for: trainings, scorings, inference on many scans, rounds.

    The server starts a worker by itself. More may run, also on other machines that see the folder and the database.
    """
    from segqc.processes import die_with_parent, ending_signals

    if parent is not None:
        die_with_parent(signal.SIGTERM, parent)
    from segqc.loop.requests import KINDS
    from segqc.loop.worker import Worker
    from segqc.settings import load_settings

    if unknown := sorted(set(kind or ()) - set(KINDS)):
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(KINDS)}", param_hint="--kind")
    _log_jobs()
    dataset = dataset_at(folder, config)
    taker = Worker(dataset, kind or KINDS, config=config, settings=lambda: load_settings(folder, config))
    for sign in ending_signals():
        signal.signal(sign, taker.end)
    publisher = dataset.publisher
    with contextlib.nullcontext() if publisher is None else publisher.publishing():
        taker.serve(until_idle=until_idle)
    if publisher is not None and until_idle:
        publisher.publish()


@app.command("round", rich_help_panel=ESTIMATE_PANEL)
def run_round(
    folder: DatasetFolder,
    put: Annotated[
        bool, typer.Option("--put", help="Only put the round into the queue; a running worker does it.")
    ] = False,
    serve: ServeWorse = False,
    config: ConfigFile = None,
) -> None:
    """Train both networks on all final labels, then segment and score all other scans.

    The new networks replace the old ones together, when both are trained, unless their estimates are worse. A round
    that was stopped or killed continues after its last finished step. If another process is doing a round already,
    this one waits for it, and takes it over if that process dies. At the end it prints what the estimates are worth,
    and whether more rounds are worth it.
    """
    from segqc.loop.due import outlook_of
    from segqc.loop.requests import RoundRequest, enqueue
    from segqc.loop.worker import Worker
    from segqc.processes import ending_signals
    from segqc.quality.stopping import outlook_sentence
    from segqc.store import bundles, jobs

    dataset = dataset_at(folder, config)
    with dataset.store.write() as transaction:
        waiting = jobs.open_jobs(transaction, "round")
        job = waiting[0] if waiting else enqueue(transaction, RoundRequest(serve=serve), me())
    if put:
        typer.echo(f"{folder}: a round {'waits already' if waiting else 'was queued'}, as job {job.public_id}")
        return
    typer.echo(
        f"{folder}: {'goes on with the round' if waiting else 'begins a round'} (job {job.public_id}): train "
        "segmentation, train segqc, publish both, score all scans that wait",
        err=True,
    )
    _log_jobs()
    taker = Worker(dataset, ("round",), config=config)
    for sign in ending_signals():
        signal.signal(sign, taker.end)
    ended = taker.serve_until_ended(job.id)
    if ended.state != "done":
        left = "; run segqc round again to go on" if ended.state in ("queued", "running") else ""
        reason = f": {ended.messages[-1].removesuffix('.')}" if ended.state == "failed" and ended.messages else ""
        what = "failed" if ended.state == "failed" else f"is {ended.state}"
        raise CommandError(f"{folder}: the round {what}{reason}{left}")
    with dataset.store.read() as transaction:
        number = jobs.bundle_of_round(transaction, job.id)
        is_held = number is not None and bundles.get(transaction, number).held_because is not None
        more = outlook_sentence(outlook_of(transaction, dataset.settings.round))
    typer.echo(f"{folder}: the round is done{f'; its bundle {number} is held' if is_held else ''}")
    if number is not None:
        print_card(dataset.bundles.open(number).manifest.report)
    typer.echo(more)


def _log_jobs() -> None:
    """Tell what a worker does, with the time."""
    log_to_stderr(logging.INFO, LineFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for noisy in ("alembic", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
