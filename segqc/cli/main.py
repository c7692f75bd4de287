"""The command `segqc`: reads flags, calls the library, prints what it returns.

Imports of the library are inside the commands: PyTorch takes seconds, and ``segqc --help`` should not wait for it.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import sys
import warnings
from typing import Annotated

import typer

from segqc import __version__
from segqc.cli import (
    annotation,
    audit,
    certificate,
    database,
    evaluation,
    folders,
    import_export,
    models,
    pacs,
    pseudo_labels,
    ranking,
    rounds,
    serving,
    simulation,
    single_scans,
    training,
    users,
)
from segqc.cli.common import ANNOTATE_PANEL, ESTIMATE_PANEL, KEEP_PANEL, MAKE_PANEL, log_to_stderr
from segqc.errors import SegqcError, sentence
from segqc.text import LineFormatter, visible

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
app.add_typer(folders.app)  # without a name: its commands are the program's own
app.add_typer(training.app, name="train", rich_help_panel=ESTIMATE_PANEL)
app.add_typer(ranking.app)
app.add_typer(single_scans.app)
app.add_typer(serving.app)
app.add_typer(annotation.app)
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


def main() -> None:
    """Run the command; an error that the user can mend is one sentence, not a traceback."""
    _set_up_text()
    # NumPy's matrices are of 4 x 4 here: its threads would double the cost of a request (PyTorch has its own)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    log_to_stderr(logging.WARNING, LineFormatter("%(levelname)s: %(message)s"))
    logging.getLogger("ignite").setLevel(logging.CRITICAL)  # it logs each exception that passes through a training
    # pydicom quotes its own code for each odd value; what is wrong with a file is said in a sentence
    warnings.filterwarnings("ignore", module=r"pydicom\b")
    try:
        app()
    except (SegqcError, OSError) as error:
        typer.echo(f"segqc: {_sentence(error)}", err=True)
        sys.exit(error.exit_code if isinstance(error, SegqcError) else SegqcError.exit_code)


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
