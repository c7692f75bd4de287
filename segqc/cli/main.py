"""The command `segqc`: reads flags, calls the library, prints what it returns.

Imports of the library are inside the commands: PyTorch takes seconds, and ``segqc --help`` should not wait for it.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import io
import logging
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from segqc import __version__
from segqc.cli import (
    annotation,
    audit,
    certificate,
    database,
    evaluation,
    import_export,
    models,
    pacs,
    pseudo_labels,
    rounds,
    simulation,
    users,
)
from segqc.cli.common import (
    ANNOTATE_PANEL,
    ESTIMATE_PANEL,
    KEEP_PANEL,
    MAKE_PANEL,
    NOT_ENOUGH_DATA,
    AsCsv,
    AsJson,
    Cell,
    CommandError,
    ConfigFile,
    DatasetFolder,
    NewFolder,
    Row,
    brackets,
    dataset_at,
    emit,
    estimate,
    holds_store,
    me,
    refuse_overwriting,
    shown,
    shown_progress,
    structure_flag,
)
from segqc.cli.report_cards import print_card
from segqc.errors import SegqcError, sentence
from segqc.text import LineFormatter, visible

if TYPE_CHECKING:
    from segqc.loop.agreement import Agreement, Ranking
    from segqc.loop.dataset import Dataset
    from segqc.loop.drift import StructureDrift
    from segqc.networks.assessor import Assessor
    from segqc.networks.segmenter import Segmenter
    from segqc.selection import Strategy
    from segqc.settings import NetworkName
    from segqc.types import Assessment, MetricIntervals, Unlikeness


EXAMPLES = (
    "Estimate how good segmentation masks are, see where they are wrong, and correct the worst first.\n\n"
    "A *dataset folder* (FOLDER) holds scans (.nii, .nii.gz, .nrrd) and, in labels/final, the masks that people made "
    "of some of them. SegQC keeps its own files in FOLDER/segqc and its settings in FOLDER/segqc.toml.\n\n"
    "The usual order: **phantom**, **prepare** or **import** makes such a folder, **train segmentation** and **train "
    "segqc** train on it, **score** makes and assesses the masks of all other scans, **rank** shows the order, and "
    "**serve** hands the scans to 3D Slicer, worst first. **round** does both trainings and the scoring in one.\n\n"
    "Exit codes: 0 done; 1 something could not be done (one sentence on the error stream says what); 2 wrong usage; "
    "130 ended by Ctrl-C; 143 ended by SIGTERM. A signal ends serve and worker with 0."
)

app = typer.Typer(
    help=EXAMPLES,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)
train_app = typer.Typer(no_args_is_help=True, help="Train one of the two networks on a dataset folder's final labels.")
app.add_typer(train_app, name="train", rich_help_panel=ESTIMATE_PANEL)
app.add_typer(annotation.app)  # without a name: its commands are the program's own
app.add_typer(audit.app)
app.add_typer(rounds.app)
app.add_typer(evaluation.app)
app.add_typer(pseudo_labels.app)
app.add_typer(certificate.app)
app.add_typer(pacs.app)
app.add_typer(database.app, name="db", rich_help_panel=KEEP_PANEL)
app.add_typer(simulation.app, name="simulate", rich_help_panel=ESTIMATE_PANEL)
app.add_typer(models.app, name="models", rich_help_panel=KEEP_PANEL)
app.add_typer(users.app, name="users", rich_help_panel=ANNOTATE_PANEL)
app.add_typer(import_export.import_app, name="import", rich_help_panel=MAKE_PANEL)
app.add_typer(import_export.export_app, name="export", rich_help_panel=KEEP_PANEL)


def _scored(method: str) -> str:
    """Refuse what is no scoring method while the command line is read."""
    from segqc.selection import StrategyError, score_of

    try:
        score_of(method)
    except StrategyError as error:
        raise typer.BadParameter(str(error)) from error
    return method


_SUGGESTION_TERMS: Final = (
    "ordered by: the strategy whose order chose the scan; another one than was asked for where that has nothing to go "
    "by yet. score: what it was chosen by, the lowest first; - where it was drawn or compared with others."
)
_NO_SUGGESTION: Final = "No scan of a training patient waits for a label and is free."


def _strategy(method: str) -> str:
    """Refuse what is no strategy while the command line is read."""
    from segqc.selection import strategies

    if method not in strategies():
        raise typer.BadParameter(f"there is no strategy {method!r}; there are {', '.join(strategies())}.")
    return method


class Size(StrEnum):
    """Sizes of networks."""

    SMALL = "small"
    MEDIUM = "medium"
    PAPER = "paper"


class Source(StrEnum):
    """Who made a mask."""

    NETWORK = "network"
    PERSON = "person"


_METRIC_TERMS: Final = (
    "Estimates, made without a true mask. Dice, IoU: overlap with the true mask, 1 is best. ARVD: voxels that differ, "
    "in parts of the true volume, 0 is best. RVD: mask too large (+) or too small (-), in the same parts."
)
_SLICE_TERMS: Final = (
    "error sum: error probabilities of the slice's voxels added up, about the number of wrong voxels. "
    "boxes: likely errors, as voxels along the two axes of the slice."
)

_AUDIT_TERMS: Final = (
    "audited patients: whose scans were audit draws, shown with estimates of the networks that serve, and corrected; "
    "new networks begin with none. wanted: so many patients make new intervals (--use). covered: of the estimates with "
    "an interval, those whose interval holds the truth."
)
_DRIFT_TERMS: Final = (
    "evidence of drift: how strongly the audited patients speak for errors larger than those of the calibration; 1 is "
    "nothing. Patients whose corrections are part of the calibration are not tested."
)

Seed = Annotated[int, typer.Option(help="Decides every random draw: the same seed gives the same result.")]
ModelsOf = Annotated[
    Path | None,
    typer.Option(
        "--dataset",
        metavar="FOLDER",
        help="Use the networks of this dataset folder (default: the folder that the scan lies in).",
    ),
]
ModelFile = Annotated[Path | None, typer.Option("--model", metavar="FILE", help="Use this model file (.pt).")]


def main() -> None:
    """Run the command; an error that the user can mend is one sentence, not a traceback."""
    _set_up_text()
    # NumPy's matrices are of 4 x 4 here: its threads would double the cost of a request (PyTorch has its own)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _log_to_stderr(logging.WARNING, LineFormatter("%(levelname)s: %(message)s"))
    logging.getLogger("ignite").setLevel(logging.CRITICAL)  # it logs each exception that passes through a training
    try:
        app()
    except (SegqcError, OSError) as error:
        typer.echo(f"segqc: {_sentence(error)}", err=True)
        sys.exit(error.exit_code if isinstance(error, SegqcError) else SegqcError.exit_code)


def _log_to_stderr(level: int, formatter: logging.Formatter) -> None:
    terminal = logging.StreamHandler()
    terminal.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[terminal], force=True)


def _log_jobs() -> None:
    """Tell what a worker does, with the time."""
    _log_to_stderr(logging.INFO, LineFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for noisy in ("alembic", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _sentence(error: SegqcError | OSError) -> str:
    """What to tell of an error; the operating system's number means nothing to users."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return visible(f"{error.filename}: {error.strerror.lower()}.")
    return visible(sentence(str(error)))


def _set_up_text() -> None:
    """Let every name be read and printed, whatever the locale.

    Where it knows ASCII only, as with ``LC_ALL=C`` in a container, Python starts again in its UTF-8 mode: names of
    files could neither be stored nor printed otherwise. What a terminal cannot show is printed escaped.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name == "ascii":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"segqc {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print more on the error stream.")] = False,
) -> None:
    if verbose:
        logging.getLogger("segqc").setLevel(logging.INFO)


# ---- make a folder -------------------------------------------------------------------------------------------------


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


# ---- train and score -----------------------------------------------------------------------------------------------

Epochs = Annotated[
    int | None, typer.Option(min=1, help="Length of the training, in epochs (default: from the settings).")
]
TrainingSeed = Annotated[
    int | None, typer.Option("--seed", help="Decides every random draw (default: from the settings).")
]
NetworkSize = Annotated[Size | None, typer.Option(help="Size of the network (default: from the settings).")]
ServeWorse = Annotated[
    bool, typer.Option("--serve", help="Let the new networks serve even if their estimates are worse than today's.")
]


@train_app.command("segmentation")
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
    _train(folder, "segmentation", _given(epochs=epochs, size=size, seed=seed), config, as_json)


@train_app.command("segqc")
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
    given = _given(epochs=epochs, size=size, seed=seed)
    if observers is not None and not observers.is_dir():
        raise CommandError(f"{observers}: no such folder of another observer's label files")
    _train(folder, "segqc", given, config, as_json, paper_recipe=paper_recipe, serve=serve, observers=observers)


def _given(**flags: int | str | None) -> dict[str, int | str]:
    return {name: value for name, value in flags.items() if value is not None}


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


@app.command(rich_help_panel=ESTIMATE_PANEL)
def score(
    folder: DatasetFolder,
    method: Annotated[
        str,
        typer.Option(
            callback=_scored,
            help="What to score by. segqc: SegQC-Net's estimate; tta, entropy, class-stratified: baselines by "
            "test-time augmentation; ensemble: by the networks of the folds.",
        ),
    ] = "segqc",
    force: Annotated[bool, typer.Option("--force", help="Also score scans that have a current score.")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Segment and score every scan without a final label; continues where an earlier run stopped."""
    from segqc.loop.scoring import score as score_all
    from segqc.types import UNLIKE

    dataset = dataset_at(folder, config)
    with shown_progress() as progress:
        summary = score_all(dataset, method, progress, force=force)
    row: dict[str, Cell] = {
        "scored": summary.scored, "had a current score": summary.skipped, "failed": len(summary.failed)
    }  # fmt: skip
    if summary.marked is not None:
        row["unlike the training scans"] = summary.marked
    terms = f"{UNLIKE}." if summary.marked else ""
    emit([row], f"scores by {method}", as_json=as_json, extra={"failures": summary.failed}, terms=terms)
    if summary.failed:
        first, reason = next(iter(summary.failed.items()))
        raise CommandError(f"{len(summary.failed)} scans could not be scored; the first, {first}: {reason}")


@app.command(rich_help_panel=ESTIMATE_PANEL)
def rank(
    folder: DatasetFolder,
    method: Annotated[
        str,
        typer.Option(callback=_strategy, help="The strategy by whose score to order, or whose next scans to list."),
    ] = "segqc",
    first: Annotated[int, typer.Option(min=1, help="How many scans to list of a strategy that has no score.")] = 20,
    truth: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="True labels, named as the scans: also print the true Dice and how well the two agree."
        ),
    ] = None,
    include_final: Annotated[bool, typer.Option("--all", help="Also list scans that have a final label.")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """List the scored scans, worst first, with the slices to look at first.

    Where the estimates' order is known not to be better than chance, it says so, and lists the scans in another order.
    Of a strategy that has no score of its own, such as segqc-diverse or cold-start, it lists the scans that would be
    handed out next; docs/strategies.md says which strategies there are.
    """
    from segqc.loop.agreement import agreement
    from segqc.loop.agreement import rank as order
    from segqc.quality.drift import drift_sentence
    from segqc.quality.drift import to_json as alarm_to_json
    from segqc.quality.report_card import AT_RANDOM, estimate_sentence, order_sentence, to_json
    from segqc.quality.witnesses import UNLIKENESS
    from segqc.selection import strategies

    strategy = strategies()[method]
    wanted = strategy.score
    if wanted is None and (truth is not None or include_final):
        raise CommandError(f"--truth and --all are for strategies with a score, and {method} has none")
    if truth is not None and not truth.is_dir():
        raise CommandError(f"{truth}: no such folder of true labels")
    dataset = dataset_at(folder, config)
    if wanted is None:
        _print_suggestions(dataset, strategy, first, as_json=as_json, as_csv=as_csv)
        return
    ranking = order(dataset, method, truth=truth, include_final=include_final)
    ranked = ranking.scans
    if not ranked:
        raise CommandError(f"{folder}: {_unscored(dataset, ranking, method)}")
    names = list(dict.fromkeys(name for scan in ranked for name in scan.true_by_structure))
    rows: list[Row] = [
        {
            "rank": scan.rank,
            "scan": scan.id,
            **(
                estimate("estimated Dice", scan.score, scan.interval, as_json=as_json, as_csv=as_csv)
                if wanted.is_estimate
                else {"estimated Dice" if wanted.is_dice else "score": scan.score}
            ),
            **(_unlikeness(scan.unlikeness, as_text=not as_json and not as_csv) if wanted.is_estimate else {}),
            "worst slices": " ".join(map(str, scan.worst_slices)),
            **({"ordered by": ranking.by} if as_json or as_csv else {}),
            **({"true Dice": scan.true_dice} if truth is not None else {}),
            **({f"true {name}": scan.true_by_structure.get(name) for name in names} if len(names) > 1 else {}),
        }
        for scan in ranked
    ]
    pairs = [(scan.score, scan.true_dice) for scan in ranked if scan.true_dice is not None]
    if truth is not None and not pairs:
        raise CommandError(
            f"{truth}: no ranked scan has both a mask and a true label file here; score by segqc makes masks"
        )
    found = agreement([p[0] for p in pairs], [p[1] for p in pairs]) if pairs else None
    extra: dict[str, object] = {"agreement": dataclasses.asdict(found)} if found is not None else {}
    orders = {AT_RANDOM: "in random order", UNLIKENESS: "most unlike the training scans first"}
    title = f"{folder}: {orders.get(ranking.by, f'worst first, by {ranking.by}')}"
    card = dataset.report_card() if wanted.is_estimate else None
    alarm = dataset.drift_alarm() if wanted.is_estimate else None
    if wanted.is_estimate:
        title += brackets(scan.interval for scan in ranked)
        extra["report_card"] = None if card is None else to_json(card)
        extra["drift_alarm"] = None if alarm is None else alarm_to_json(alarm)
    if as_json:
        extra |= {"waiting": ranking.waiting, "unscored": ranking.unscored}
    emit(rows, title, as_json=as_json, as_csv=as_csv, extra=extra, key="scans", terms=wanted.legend)
    if ranking.unscored and not as_json:
        typer.echo(f"The list is not complete: {_unscored(dataset, ranking, method)}.", err=as_csv)
    sentences = [drift_sentence(alarm)] if alarm is not None else []
    if card is not None:  # an alarm is later than the card: its word on the estimate counts
        sentences += [*([estimate_sentence(card)] if alarm is None else []), order_sentence(card, ranking.by)]
    for text in sentences if not as_json else ():
        typer.echo(text, err=as_csv)
    if found is not None and not as_json:
        typer.echo(_agreement_text(found, is_dice=wanted.is_dice), err=as_csv)


def _unscored(dataset: Dataset, ranking: Ranking, method: str) -> str:
    """How many of the waiting scans are scored, and what scores the others."""
    from segqc.selection import score_of
    from segqc.store import bundles, jobs

    if not ranking.waiting:
        return "no scan waits for a label"
    with dataset.store.read() as transaction:
        serving = bundles.serving(transaction)
        work = [job for kind in ("scoring", "round") for job in jobs.open_jobs(transaction, kind)]
    pair = serving.bundle if serving is not None else None
    needs_assessor = score_of(method).is_estimate
    if pair is None or pair.segmenter_version is None or (needs_assessor and pair.assessor_version is None):
        return f"no scan has a score of the method {method}, as its networks are not trained yet; run segqc round first"
    scored = f"{ranking.waiting - ranking.unscored} of {ranking.waiting} waiting scans are scored by bundle {pair.id}"
    if any(job.state == "running" for job in work):
        return f"{scored}, which serves; a worker is at it, and the rest follows"
    command = "segqc score" if needs_assessor else f"segqc score --method {method}"
    is_workers = needs_assessor or method == dataset.settings.server.strategy
    return f"{scored}, which serves; {'a worker (segqc serve, segqc worker) or ' * is_workers}{command} does the rest"


@app.command(rich_help_panel=ESTIMATE_PANEL)
def intervals(
    folder: DatasetFolder,
    use: Annotated[
        bool, typer.Option("--use", help="From now on, make intervals from the audit draws instead of the training.")
    ] = False,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="Take a simulated annotator's corrections instead of people's.")
    ] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Check the prediction intervals on audit draws: scans drawn at random, estimated, and then corrected.

    Only audit draws count (the setting audit_share): scans that came worst-first are no fair sample. A drift alarm says
    that the estimated Dice errs more on them than its calibration knows.
    """
    from segqc.loop.drift import alarm_of, drift, watch_serving
    from segqc.loop.recalibration import audit
    from segqc.loop.recalibration import use as use_them
    from segqc.quality.drift import drift_sentence
    from segqc.quality.drift import to_json as alarm_to_json
    from segqc.quality.intervals import LEVEL, patients_needed

    dataset = dataset_at(folder, config)
    assessor = dataset.assessor()
    if assessor is None:
        raise CommandError(f"{folder}: no SegQC network is trained yet, so there are no estimates (segqc train segqc)")
    found = audit(dataset, assessor, simulated=simulated)
    watched = watch_serving(dataset)
    with dataset.store.read() as transaction:
        tests = drift(transaction, watched, simulated=simulated) if watched is not None else ()
    alarm = alarm_of(tests)
    rows: list[Row] = [
        {
            "structure": a.structure,
            "audited patients": a.patients,
            "wanted": patients_needed(),
            "audited estimates": a.estimates,
            "mean Dice error": a.mean_error,
            "with interval": a.with_interval,
            "covered": a.covered,
            "new intervals": "ready" if a.intervals is not None else NOT_ENOUGH_DATA,
        }
        for a in found
    ]
    drift_rows = [_drift_row(test) for test in tests]
    if as_json or as_csv:
        rows = [{**row, **of_drift} for row, of_drift in zip(rows, drift_rows or [{}] * len(rows), strict=True)]
    title = f"{folder}: {LEVEL:.0%} intervals on audit draws"
    extra: dict[str, object] = {"drift_alarm": None if alarm is None else alarm_to_json(alarm)}
    emit(rows, title, as_json=as_json, as_csv=as_csv, extra=extra, key="structures", terms=_AUDIT_TERMS)
    if drift_rows and not as_json and not as_csv:
        emit(drift_rows, "drift of the estimated Dice", terms=_DRIFT_TERMS)
    if alarm is not None and not as_json:
        typer.echo(drift_sentence(alarm), err=as_csv)
    if use:
        renewed = use_them(dataset, assessor, found, me())
        typer.echo(f"intervals are made of audit draws from now on; {renewed} waiting scans have new ones", err=True)


def _drift_row(found: StructureDrift) -> Row:
    test = found.test
    return {
        "structure": found.structure,
        "calibrating patients": test.calibrating,
        "patients tested": test.audited,
        "evidence of drift": test.evidence,
        "alarm from": test.threshold if math.isfinite(test.threshold) else None,
        "alarm at patient": test.alarm,
    }


def _print_suggestions(dataset: Dataset, strategy: Strategy, count: int, *, as_json: bool, as_csv: bool) -> None:
    from segqc.loop.agreement import suggestions

    dataset.refresh()
    found = suggestions(dataset, strategy, count)
    rows: list[Row] = [
        {
            "rank": place,
            "scan": suggestion.id,
            "ordered by": suggestion.by,
            "score": suggestion.score,
            "estimated Dice": suggestion.dice,
            "worst slices": " ".join(map(str, suggestion.worst_slices)),
        }
        for place, suggestion in enumerate(found, start=1)
    ]
    title = f"{dataset.folder}: the next {len(rows)} scans by {strategy.name}, if none is submitted meanwhile"
    emit(rows, title, as_json=as_json, as_csv=as_csv, key="scans", terms=_SUGGESTION_TERMS, empty=_NO_SUGGESTION)


def _unlikeness(found: Unlikeness | None, *, as_text: bool) -> dict[str, Cell]:
    """The cells of how unlike the training's a scan is."""
    if as_text:
        return {"unlikeness": None if found is None else f"{found.score:.2f}"}
    return {
        "unlikeness": None if found is None else found.score,
        "unlikeness p-value": None if found is None else found.p_value,
    }


def _agreement_text(found: Agreement, *, is_dice: bool) -> str:
    low, high = found.true_range
    lines = [
        f"{found.scans} scans with a truth; true Dice from {low:.3f} to {high:.3f}",
        f"Spearman {shown(found.spearman)}   Pearson {shown(found.pearson)}",
    ]
    if is_dice:
        lines.append(
            f"mean absolute error {found.mae:.4f}; of the constant {found.constant:.3f}, the median truth: "
            f"{found.constant_mae:.4f}"
        )
    return "\n".join(lines)


# ---- single scans --------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=ESTIMATE_PANEL)
def predict(
    scans: Annotated[list[Path], typer.Argument(metavar="SCAN", help="The scans' files.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Mask to write, or, without a suffix, a folder of masks.", show_default=False),
    ],
    dataset: ModelsOf = None,
    model: ModelFile = None,
) -> None:
    """Segment scans with the trained segmentation network; the masks lie on the scans' own grids."""
    from segqc.volumes import SCAN_SUFFIXES, VolumeError, label_suffix, read_scan, scan_id, scan_suffix, write_labels

    to_file = scan_suffix(out.name) is not None
    if to_file and len(scans) > 1:
        raise typer.BadParameter("several scans need a folder, not one mask file", param_hint="--out")
    if not to_file and label_suffix(out.name) is not None:
        raise CommandError(f"{out}: masks are written as {', '.join(SCAN_SUFFIXES)}; choose one of these suffixes")
    twice = sorted(name for name, count in Counter(map(scan_id, scans)).items() if count > 1)
    if twice:
        raise CommandError(
            f"several scans are named {twice[0]}: their masks would be one file; segment them separately"
        )
    targets = [out if to_file else out / f"{scan_id(path)}.nii.gz" for path in scans]
    for target in targets:
        refuse_overwriting(target)
    _refuse_missing(*scans)
    segmenter = _segmenter(_models_folder(dataset, scans[0]), model)
    failed: list[str] = []
    with shown_progress() as progress:
        for i, (path, target) in enumerate(zip(scans, targets, strict=True)):
            progress.step(i, len(scans), "segmenting", path.name)
            try:
                write_labels(segmenter.predict(read_scan(path)).labels, target)
            except VolumeError as error:
                if len(scans) == 1:
                    raise
                failed.append(str(error))
        progress.step(len(scans), len(scans), "segmenting", "done")
    made = len(scans) - len(failed)
    if made:
        typer.echo(f"{out}: {made} mask{'s' if made > 1 else ''}")
    for reason in failed:
        typer.echo(reason, err=True)
    if failed:
        raise CommandError(f"{len(failed)} of {len(scans)} scans could not be segmented")


@app.command(rich_help_panel=ESTIMATE_PANEL)
def assess(
    scan: Annotated[Path, typer.Argument(metavar="SCAN", help="The scan's file.", show_default=False)],
    mask: Annotated[
        Path, typer.Argument(metavar="MASK", help="Its mask: a label file on the scan's grid.", show_default=False)
    ],
    dataset: ModelsOf = None,
    model: ModelFile = None,
    source: Annotated[
        Source, typer.Option(help="Who made the mask: a person's is right but for a few errors.")
    ] = Source.NETWORK,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The picture to write (default: SCAN_assessment.png).")
    ] = None,
    no_picture: Annotated[bool, typer.Option("--no-picture", help="Write no picture.")] = False,
    errors: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the likely errors as a label file (1 = likely wrong)."),
    ] = None,
    slices: Annotated[int, typer.Option(min=1, help="Number of worst slices to list and draw.")] = 4,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Estimate a mask's Dice, IoU, ARVD and RVD, list its worst slices, and draw them with the likely errors.

    JSON is the whole assessment; CSV has one line for each structure in 3D and in every slice.
    """
    from segqc.plots import draw_assessment
    from segqc.quality.likely_errors import likely_errors, sentence
    from segqc.types import segment_names
    from segqc.volumes import read_labels, read_scan, scan_id, write_labels

    for named in (picture, errors):
        if named is not None:
            refuse_overwriting(named)
    _refuse_missing(scan, mask)
    volume = read_scan(scan)
    assessor = _assessor(_models_folder(dataset, scan), model)
    labels = read_labels(mask, scan=volume, values=assessor.values, names=segment_names(assessor.structures))
    if source is Source.PERSON and assessor.people is None:
        typer.echo("SegQC-Net was not trained to judge people's masks here, and takes it for a network's", err=True)
    result = assessor.assess(volume, labels, scan_id=scan_id(scan), source=source.value)
    if errors is not None:
        write_labels(assessor.likely_errors(result, volume), errors)
    target = None if no_picture else picture or Path(f"{scan_id(scan)}_assessment.png")
    if target is not None:
        draw_assessment(volume, labels, result, target, slices=slices, structures=assessor.structures)
    if as_json:
        typer.echo(result.assessment.to_json())
    elif as_csv:
        emit(_assessment_lines(result.assessment), "", as_csv=True)
    else:
        in_brackets = brackets(q.intervals.dice for q in result.assessment.structures)
        emit(_structure_rows(result.assessment), f"{scan.name}: estimated quality{in_brackets}", terms=_METRIC_TERMS)
        emit(_slice_rows(result.assessment, slices), "slices to look at first", terms=_SLICE_TERMS)
        if result.assessment.mask_kind == "person":
            typer.echo(sentence(likely_errors(result.assessment)))
    if target is not None:
        typer.echo(f"picture: {target}", err=True)


def _structure_rows(assessment: Assessment) -> list[Row]:
    return [
        {
            "structure": q.name,
            **estimate("Dice", q.estimated.dice if q.present else None, q.intervals.dice),
            **estimate("IoU", q.estimated.iou if q.present else None, q.intervals.iou),
            **estimate("ARVD", q.estimated.arvd if q.present else None, q.intervals.arvd),
            **estimate("RVD", q.estimated.rvd if q.present else None, q.intervals.rvd),
            "volume ml": q.mask_volume_ml,
            "boxes": len(q.extracted.boxes),
        }
        for q in assessment.structures
    ]


def _slice_rows(assessment: Assessment, count: int) -> list[Row]:
    rows: list[Row] = []
    for index in assessment.worst_slices(count):
        for q in assessment.structures:
            quality = next(s for s in q.raw.slices if s.index == index)
            boxes = [
                f"{b.start[0]}:{b.stop[0]},{b.start[1]}:{b.stop[1]}"
                for b in q.extracted.boxes
                if b.slice_index == index
            ]
            rows.append(
                {
                    "slice": index,
                    "structure": q.name,
                    "Dice": quality.metrics.dice,
                    "error sum": quality.error_sum,
                    "boxes": " ".join(boxes),
                }
            )
    return rows


def _assessment_lines(assessment: Assessment) -> list[Row]:
    from segqc.types import UNLIKE

    lines: list[Row] = []
    for q in assessment.structures:
        whole, error_sum = dataclasses.asdict(q.estimated), sum(s.error_sum for s in q.raw.slices)
        ends = {**_ends(q.intervals), "remark": UNLIKE if assessment.is_unlike else None}
        lines.append({"structure": q.name, "slice": None, **whole, "error_sum": error_sum, **ends})
        for s in q.raw.slices:
            metrics = dataclasses.asdict(s.metrics)
            none = dict.fromkeys(ends)  # intervals are of the 3D metrics
            lines.append({"structure": q.name, "slice": s.index, **metrics, "error_sum": s.error_sum, **none})
    return lines


def _ends(intervals: MetricIntervals) -> dict[str, Cell]:
    from segqc.types import applying

    cells: dict[str, Cell] = {}
    of_metrics = {f.name: applying(getattr(intervals, f.name)) for f in dataclasses.fields(intervals)}
    for name, interval in of_metrics.items():
        cells[f"{name}_low"] = interval.low if interval is not None else None
        cells[f"{name}_high"] = interval.high if interval is not None else None
    levels = [interval.level for interval in of_metrics.values() if interval is not None]
    return {**cells, "interval_level": levels[0] if levels else None}


# ---- server --------------------------------------------------------------------------------------------------------


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
    flags = _given(host=host, port=port, bootstrap=bootstrap)
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


def _refuse_missing(*paths: Path) -> None:
    """Refuse paths that lead nowhere, before networks are looked for where they lead."""
    for path in paths:
        if not path.exists():
            raise CommandError(f"{path}: there is no such file; check the path")


def _models_folder(dataset: Path | None, scan: Path) -> Path:
    return dataset if dataset is not None else scan.resolve().parent


def _dataset_with_networks(folder: Path) -> Dataset | None:
    """The dataset folder; None where there is no store, which is not made only to look for networks."""
    from segqc.settings import load_settings

    if folder.is_dir() and not holds_store(folder, load_settings(folder)):
        return None
    return dataset_at(folder, None)


def _segmenter(folder: Path, model: Path | None) -> Segmenter:
    from segqc.networks.segmenter import Segmenter

    if model is not None:
        return Segmenter.load(model, "auto")
    dataset = _dataset_with_networks(folder)
    found = dataset.segmenter() if dataset is not None else None
    if found is None:
        raise CommandError(f"{folder}: no segmentation network; name one with --model or --dataset, or train it first")
    return found


def _assessor(folder: Path, model: Path | None) -> Assessor:
    from segqc.networks.assessor import Assessor

    if model is not None:
        return Assessor.load(model, backend="auto")
    dataset = _dataset_with_networks(folder)
    found = dataset.assessor() if dataset is not None else None
    if found is None:
        raise CommandError(f"{folder}: no SegQC network; name one with --model or --dataset, or train it first")
    return found
