"""What groups of commands share."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import typer

from segqc.errors import SegqcError
from segqc.text import visible, write_csv

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from segqc.loop.dataset import Dataset
    from segqc.progress import Progress
    from segqc.settings import Settings
    from segqc.store.records import Actor, LabelRecord
    from segqc.store.store import Store
    from segqc.types import PredictionInterval

logger = logging.getLogger(__name__)

MAKE_PANEL: Final = "Make a dataset folder"
ESTIMATE_PANEL: Final = "Train, estimate, rank"
ANNOTATE_PANEL: Final = "Serve and annotate"
KEEP_PANEL: Final = "Keep and pass on"
"""Headings of the list of commands."""

DatasetFolder = Annotated[
    Path,
    typer.Argument(
        metavar="FOLDER",
        help="Dataset folder: the scans, and the masks that people made in labels/final.",
        show_default=False,
    ),
]
NewFolder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Dataset folder to make; new or empty.", show_default=False)
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings file to use instead of FOLDER/segqc.toml."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")]
ServeWorse = Annotated[
    bool, typer.Option("--serve", help="Let the new networks serve even if their estimates are worse than today's.")
]

Cell: TypeAlias = str | int | float | bool | Mapping[str, float] | None
Row: TypeAlias = Mapping[str, Cell]

NOT_ENOUGH_DATA = "not enough data"  # for an interval: too few patients with a truth


class CommandError(SegqcError):
    """A command cannot do what was asked; says why and what to do."""


def settings_of(folder: Path, *, may_begin: bool = False) -> Settings:
    """The settings of a dataset folder.

    Args:
        folder: the folder.
        may_begin: whether an empty folder will do, as one that becomes a dataset folder.

    Raises:
        CommandError: if there is no such folder, or it is plainly no dataset folder: nothing is left behind in it.
        SettingsError: if its ``segqc.toml`` can't be used.
    """
    from segqc.settings import load_settings

    if not folder.is_dir():
        raise CommandError(f"{folder}: no such folder; name a folder of scans (.nii, .nii.gz or .nrrd)")
    _warn_of_variables()
    settings = load_settings(folder)
    _refuse_other_folder(folder, settings, may_begin=may_begin)
    return settings


def _refuse_other_folder(folder: Path, settings: Settings, *, may_begin: bool) -> None:
    """Refuse a folder that was probably named by mistake, before a store is made in it."""
    from segqc.settings import SETTINGS_FILE
    from segqc.store.misplaced import is_for_scans

    if holds_store(folder, settings) or settings.pacs.url is not None or (folder / SETTINGS_FILE).exists():
        return
    names = os.listdir(folder)
    if "labels" in names or is_for_scans(folder) or (may_begin and all(name.startswith(".") for name in names)):
        return
    empty = ", and it is not empty" if may_begin else ""
    raise CommandError(
        f"{folder}: is no dataset folder: it holds no scan (.nii, .nii.gz or .nrrd), no {SETTINGS_FILE} and no store "
        f"of SegQC{empty}; name the folder that the scans lie in"
    )


def holds_store(folder: Path, settings: Settings) -> bool:
    """Whether a folder has a store; opening it would make one otherwise."""
    from segqc.store.store import has_store

    return settings.store.url is not None or has_store(folder)


@functools.cache  # once in a process
def _warn_of_variables() -> None:
    from segqc.settings import ignored_variables

    for sentence in ignored_variables():
        logger.warning("%s", sentence)


def kept_store(folder: Path, *, may_begin: bool = False) -> Store:
    """The store of a dataset folder as it was left: what lies in the folder by now is not taken in.

    Fails as `settings_of` does.
    """
    from segqc.store.store import Store

    settings = settings_of(folder, may_begin=may_begin)
    return Store.open(folder, settings.store.url, intake=settings.intake_checks())


def open_store(folder: Path) -> Store:
    """The store of a dataset folder, with all in it that lies in the folder now."""
    return dataset_at(folder, None).store


def dataset_at(
    folder: Path, config: Path | None, overrides: Mapping[str, object] | None = None, *, may_begin: bool = False
) -> Dataset:
    """A dataset folder, with its own settings file or another one, and flags over it.

    Fails as `settings_of` does.
    """
    from segqc.loop.dataset import Dataset
    from segqc.settings import load_settings

    _warn_of_variables()
    dataset = Dataset(folder, load_settings(folder, config, overrides))
    _refuse_other_folder(folder, dataset.settings, may_begin=may_begin)
    return dataset


def scan_named(dataset: Dataset, name: str) -> str:
    """The name in the store of the scan that a user calls so, in whatever Unicode form.

    Raises:
        UnknownScan: if there is none.
    """
    from segqc.store import scans

    with dataset.store.read() as transaction:
        return scans.get(transaction, name).name


@contextmanager
def shown_progress(*, log_lines: bool = True) -> Iterator[Progress]:
    """A bar for each task on a terminal; elsewhere log lines, or nothing. Both go to the error stream.

    Args:
        log_lines: whether there are lines where the error stream is no terminal.
    """
    from segqc.progress import NO_PROGRESS, LineProgress

    if not sys.stderr.isatty():
        if log_lines:
            logging.getLogger("segqc").setLevel(logging.INFO)
        yield LineProgress() if log_lines else NO_PROGRESS
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        BarColumn(bar_width=20),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.description}", markup=False),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        yield BarProgress(bars)


class BarProgress:
    """Progress as bars of a terminal, one for each task."""

    def __init__(self, bars: Bars) -> None:
        from segqc.progress import TimeLeft

        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._time = TimeLeft()

    def step(self, done: int, total: int, task: str, detail: str = "", *, unit: str = "scans") -> None:
        """Move the bar of a task."""
        from segqc.progress import described

        left = self._time.after(done, total, task)
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=total, unit=unit, left=left)
        bar = self._tasks[task]
        self._bars.update(bar, completed=done, total=total, description=described(task, detail), left=left)

    def message(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(visible(text), markup=False, highlight=False)


def shown(value: Cell) -> str:
    """A cell as tables show it."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else visible(str(value))


def estimate(
    name: str,
    value: float | None,
    interval: PredictionInterval | None,
    *,
    unlike: bool = False,
    as_json: bool = False,
    as_csv: bool = False,
) -> dict[str, Cell]:
    """The cells of an estimate: in tables "0.87 (0.82-0.91)" is one; in CSV the interval's ends have their own columns.

    Where there is no interval, JSON says null and a table "not enough data". Where it does not apply, as the scan is
    unlike the training's (``unlike``, or the interval knows), JSON and CSV leave it out and say why under "remark".
    """
    from segqc.types import UNLIKE, UNLIKE_SHORT, bounds

    unlike = unlike or (interval is not None and not interval.applies)
    if as_json or as_csv:
        ends, remark = bounds(interval), UNLIKE if unlike else None
        if as_json:
            return {name: value, f"{name} interval": ends, "remark": remark}
        columns = {f"{name} {end}": ends[end] if ends is not None else None for end in ("low", "high", "level")}
        return {name: value, **columns, "remark": remark}
    between = UNLIKE_SHORT if unlike else interval or NOT_ENOUGH_DATA
    return {name: None if value is None else f"{value:.2f} ({between})"}


def numbers(slices: Iterable[int] | None) -> str | None:
    """The cell of a set of slices; None for all."""
    return None if slices is None else " ".join(map(str, slices))


def checked(label: LabelRecord | None, scan: Path, *, as_data: bool) -> dict[str, Cell]:
    """The cells of how much of a label was checked: in tables "3 of 12" slices; in JSON and CSV which, and of how many.

    Nothing where all of it was, or there is none.

    Args:
        label: the label.
        scan: the file of its scan.
        as_data: whether JSON or CSV is wanted.
    """
    from segqc.volumes import VolumeError, read_grid, through_plane_axis

    slices = label.checked_slices if label is not None else None
    count: int | None = None
    if slices is not None:
        with suppress(VolumeError, OSError):  # the scan's file is gone, or is replaced
            grid = read_grid(scan)
            count = grid.shape[through_plane_axis(grid)]
    if as_data:
        return {"checked slices": numbers(slices), "slices": count}
    return {"checked slices": None if slices is None else f"{len(slices)} of {'?' if count is None else count}"}


def brackets(intervals: Iterable[PredictionInterval | None]) -> str:
    """What the brackets behind estimates are, for a table's title."""
    from segqc.types import UNLIKE

    known = [interval for interval in intervals if interval is not None]
    level = f"{known[0].level:.0%} " if known else ""
    unlike = "" if all(interval.applies for interval in known) else f"; {UNLIKE}"
    return f" (in brackets: {level}prediction intervals{unlike})"


def emit(
    rows: Sequence[Row],
    title: str,
    *,
    as_json: bool = False,
    as_csv: bool = False,
    extra: Mapping[str, object] | None = None,
    key: str = "rows",
    terms: str = "",
    empty: str = "",
) -> None:
    """Print rows on the standard stream: as a table, as one JSON object with all of ``extra``, or as CSV.

    ``terms``, what the columns mean, is printed below a table only; ``empty`` in the place of one without rows.
    """
    if as_json and as_csv:
        raise typer.BadParameter("choose one of the two", param_hint="--json and --csv")
    if as_json:
        typer.echo(json.dumps({key: [dict(row) for row in rows], **(extra or {})}, indent=1))
        return
    names = list(rows[0]) if rows else []
    if as_csv:
        write_csv(sys.stdout, rows)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console.width = 200  # a pipe has no width: nothing is to be cut off
    typer.secho(visible(title), bold=True)
    if empty and not rows:
        typer.echo(empty)
        return
    table = Table(box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(Text(visible(name)), justify="left" if rows and isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(Text(shown(row[name])) for name in names))  # text is no markup
    console.print(table)
    if terms and rows:
        typer.echo(f"{terms}\n")
    for name, value in (extra or {}).items():
        if isinstance(value, str):
            typer.echo(visible(f"{name}: {value}"))


def structure_flag(text: str) -> tuple[str, tuple[int, ...]]:
    """Name and label values of a structure as flags give them.

    Raises:
        typer.BadParameter: if it has another form.
    """
    name, _, values = text.partition("=")
    parts = [part.strip() for part in values.split(",")]
    if not name.strip() or not all(part.isdigit() and 1 <= int(part) <= 255 for part in parts):
        raise typer.BadParameter(
            f"wanted NAME=VALUE or NAME=VALUE,VALUE (1 to 255), got {text!r}", param_hint="--structure"
        )
    return name.strip(), tuple(int(part) for part in parts)


def given(**flags: int | str | None) -> dict[str, int | str]:
    """The flags that were given, by name."""
    return {name: value for name, value in flags.items() if value is not None}


def log_to_stderr(level: int, formatter: logging.Formatter) -> None:
    """Let all loggers write to the error stream from a level on, in the place of how they did before."""
    terminal = logging.StreamHandler()
    terminal.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[terminal], force=True)


def me() -> Actor:
    """Whoever runs the command."""
    import getpass

    from segqc.store.records import Actor

    return Actor(kind="person", name=getpass.getuser(), identified_by="command")


def refuse_overwriting(out: Path) -> None:
    """Refuse to write over a file: it may be the scan itself, or a mask that somebody has corrected.

    Raises:
        CommandError: if there is something of this name.
    """
    if out.exists():
        raise CommandError(f"{out}: exists already; name a new file, or remove it first")
