"""Commands of simulated annotators: what corrections buy, and one that tries a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from segqc.cli.common import (
    AsCsv,
    AsJson,
    CommandError,
    DatasetFolder,
    Row,
    dataset_at,
    emit,
    estimate,
    numbers,
    shown_progress,
)

_STUDY = "study"


class _StudyUnlessNamed(TyperGroup):
    """``segqc simulate STUDY DATA`` means ``segqc simulate study STUDY DATA``."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        known = {*self.commands, *ctx.help_option_names}
        return super().parse_args(ctx, [_STUDY, *args] if args and args[0] not in known else args)


app = typer.Typer(
    cls=_StudyUnlessNamed,
    no_args_is_help=True,
    help="Simulated annotators: learning curves of whole studies (segqc simulate STUDY DATA), or one for a server.",
)


@app.command(_STUDY)
def study(
    file: Annotated[
        Path, typer.Argument(metavar="STUDY", help="The study: a TOML file, see the docs.", show_default=False)
    ],
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="Data set: images/, labels/ and splits.json.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Keeps every result; a study that is there continues.")
    ] = Path("simulation"),
    arm: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Run this arm only; repeat.")] = None,
    seed: Annotated[list[int] | None, typer.Option(metavar="SEED", min=0, help="Run this seed only; repeat.")] = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Measure what corrections buy: the Dice of new masks and of all labels, against what annotation has cost.

    A simulated annotator corrects what the product hands out, towards the known truth, and the product trains in
    rounds, in each of the study's arms and for each of its seeds. What is in the folder is not done again, and several
    commands may work there on different arms or seeds. Writes tables, pictures and all numbers.
    """
    from segqc.evaluation.simulation.results import write_result
    from segqc.evaluation.simulation.study import Study
    from segqc.evaluation.simulation.unit import left_units, run_unit, unit_folder

    wanted = Study.read(file)
    arms = [name for name in wanted.arms if arm is None or name in arm]
    for name in arm or ():
        wanted.arm(name)  # says which there are
    left_units(wanted, out)  # says whether they are of this study
    with shown_progress() as progress:
        for number in seed or wanted.seeds:
            for name in arms:
                progress.message(f"{name}, seed {number}")
                run_unit(wanted, name, number, data, unit_folder(out, name, number), progress)
    result = write_result(left_units(wanted, out), out)
    table = result.curves
    rows: list[Row] = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    emit(rows, f"{out}: {table.title}", as_json=as_json, as_csv=as_csv, key="arms", terms=table.note)


@app.command()
def annotator(
    folder: DatasetFolder,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="The running server (default: http://127.0.0.1:8000).")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of scans to correct.")] = 1,
    truth: Annotated[Path | None, typer.Option(metavar="DIR", help="True labels (default: FOLDER/truth).")] = None,
    strategy: Annotated[str, typer.Option(help="The strategy to ask for the next scan.")] = "segqc",
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Play an annotator, to try a server: take the next scan, submit its true labels as final."""
    try:
        from segqc.server.annotator import annotate
    except ImportError as error:
        if error.name is None or not error.name.startswith("monailabel"):
            raise
        raise CommandError("the client is not installed; pip install 'segqc[server]'") from error
    dataset = dataset_at(folder, None)
    source = truth or folder / "truth"
    if not source.is_dir():
        raise CommandError(f"{source}: no such folder of true labels; name one with --truth")
    url = server or f"http://{dataset.settings.server.host}:{dataset.settings.server.port}"
    rows: list[Row] = []
    with shown_progress() as progress:
        for done in annotate(url, source, dataset.structures, count=count, strategy=strategy):
            rows.append(
                {
                    "scan": done.scan,
                    "chosen by": done.strategy,
                    **estimate(
                        "estimated Dice",
                        done.estimated_dice,
                        done.interval,
                        unlike=done.unlike,
                        as_json=as_json,
                        as_csv=as_csv,
                    ),
                    "true Dice": done.true_dice,
                    "worst slices": " ".join(map(str, done.worst_slices)),
                    "corrected slices": numbers(done.slices),
                }
            )
            progress.step(len(rows), count, "correcting", done.scan)
    if not rows:
        raise CommandError(f"{url}: no scan is left to correct")
    emit(rows, "corrected and submitted as final", as_json=as_json, as_csv=as_csv, key="corrections")
