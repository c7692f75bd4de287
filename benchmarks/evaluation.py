"""From the reports of full evaluations to the tables and figures of the docs; nothing is trained.

    segqc evaluate stratified $SEGQC_DATA/msd-hippocampus ... --seed 0 --out RUN     # some hours
    python benchmarks/evaluation.py keep RUN hippocampus-0                           # its numbers into results/
    python benchmarks/evaluation.py draw hippocampus                                 # of all seeds that are kept

The table goes to the terminal as Markdown, the figure to ``results/evaluation-<data set>.svg``.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from segqc.evaluation.methods.registry import CONSTANT, SEGQC, TTA
from segqc.evaluation.report import figures
from segqc.evaluation.report.document import UNDEFINED, Cell, Figure, Table
from segqc.evaluation.report.formats import NUMBERS, Numbers, to_markdown
from segqc.evaluation.report.result_figures import CONSTANT_LEGEND

RESULTS = Path(__file__).parent / "results"
MEASURED = ("MAE", "Pearson", "Spearman")
TO_BEAT = (TTA, "regression", "map and score", "autoencoder", "size", CONSTANT)


@dataclass(frozen=True)
class Goal:
    """A column of the table of SegQC's figures: the report's table and column it is from, and what is wanted."""

    table: str
    column: str
    wanted: str


GOALS = {
    "Dice 3D": Goal("mae", "Dice 3D", "0.016"),
    "Pearson 3D": Goal("main", "Pearson", "0.975"),
    "IoU 3D": Goal("mae", "IoU 3D", "0.023"),
    "ARVD 3D": Goal("mae", "ARVD 3D", "0.038"),
    "Dice 2D": Goal("slices", "Dice, mask", "0.037"),
    "Pearson 2D": Goal("slices", "Pearson, mask", "0.975"),
    "scans' order": Goal("orders-3d", "captured", "0.90"),
    "slices' order": Goal("orders-2d", "captured", "0.80"),
    "boxes' recall": Goal("detection-methods", "recall, chosen", "0.80"),
    "boxes' precision": Goal("detection-methods", "precision, chosen", "0.60"),
}


def keep(run: Path, name: str) -> None:
    """Copy a finished run's numbers into the results."""
    tables = run / "report" / "tables.json"
    if not tables.is_file():
        raise SystemExit(f"{tables}: is missing; let `segqc evaluate` end in this run folder first")
    NUMBERS.validate_json(tables.read_bytes())
    RESULTS.mkdir(exist_ok=True)
    shutil.copyfile(tables, RESULTS / f"evaluation-{name}.json")


def main_tables(seeds: Sequence[Numbers], experiment: str) -> dict[str, list[Table]]:
    """The main table of each structure, one per seed."""
    found: dict[str, list[Table]] = {}
    for seed in seeds:
        for table in seed.tables:
            if table.name.startswith(f"main-{experiment}-"):
                found.setdefault(table.name.removeprefix(f"main-{experiment}-"), []).append(table)
    return found


def number(table: Table, method: str, column: str) -> float | None:
    """A number of a method's row; None where results of an older version have no such column."""
    if column not in table.columns:
        return None
    at = table.columns.index(column)
    value = next((row[at] for row in table.rows if row[0] == method), None)
    return value if isinstance(value, float) else None


def text(table: Table, method: str, column: str) -> str:
    """A text of a method's row."""
    return next(str(row[table.columns.index(column)]) for row in table.rows if row[0] == method)


def reach(tables: Sequence[Table], method: str) -> tuple[float, float] | None:
    """From the lowest to the highest end of a method's 95% intervals of the MAE in all seeds."""
    spans = [text(t, method, "95% interval").split(" to ") for t in tables]
    ends = [float(end) for span in spans for end in span if len(span) == 2]
    return (min(ends), max(ends)) if ends else None


def each(texts: Sequence[str]) -> str:
    """What is said of each seed; once, where it is the same of all."""
    return texts[0] if len(set(texts)) == 1 else "; ".join(texts)


def over_seeds(tables: Sequence[Table], structure: str) -> Table:
    """Means over the seeds, each seed's MAE, and the verdicts."""
    rows: list[tuple[Cell, ...]] = []
    for method in [str(row[0]) for row in tables[0].rows]:
        of_seeds = [[number(t, method, c) for t in tables] for c in MEASURED]
        mae, *correlations = map(mean, of_seeds)
        maes = "; ".join(UNDEFINED if n is None else f"{n:.3f}" for n in of_seeds[0])
        span = reach(tables, method)
        rows.append(
            (
                method,
                mae,
                *([maes] if len(tables) > 1 else []),
                UNDEFINED if span is None else f"{span[0]:.3f} to {span[1]:.3f}",
                *correlations,
                each([text(t, method, "SegQC is") for t in tables]),
            )
        )
    columns = (
        "method",
        "MAE",
        *(["in each seed"] if len(tables) > 1 else []),
        "95% interval",
        "Pearson",
        "Spearman",
        "SegQC is",
    )
    best = {"MAE": "lowest", "Pearson": "highest", "Spearman": "highest"}
    return Table(f"main-{structure}", f"Estimated 3D Dice of {structure}", columns, tuple(rows), best=best)  # type: ignore[arg-type]


def figures_of_segqc(seeds: Sequence[Numbers], structures: Sequence[str], experiment: str) -> Table:
    """Means over the seeds of what SegQC reaches with each structure."""
    by_name = [{table.name: table for table in seed.tables} for seed in seeds]
    rows: list[tuple[Cell, ...]] = [("wanted", *(g.wanted for g in GOALS.values()), "0.60", "all")]
    for structure in structures:
        cells: list[Cell] = [structure]
        for goal in GOALS.values():
            found = [tables.get(f"{goal.table}-{experiment}-{structure}") for tables in by_name]
            cells.append(mean([number(table, SEGQC, goal.column) for table in found if table is not None]))
        mains = [tables[f"main-{experiment}-{structure}"] for tables in by_name]
        ours, ttas = (mean([number(table, method, "MAE") for table in mains]) for method in (SEGQC, TTA))
        cells.append(None if ours is None or not ttas else ours / ttas)
        beaten = [sum(text(table, m, "SegQC is") == "better" for m in TO_BEAT) for table in mains]
        rows.append((*cells, each([f"{count} of {len(TO_BEAT)}" for count in beaten])))
    note = (
        "Errors (MAE) after calibration; 2D: slices that have a mask. Orders: share of the optimal order's gain over "
        "random. Boxes after error extraction, IoU 0.05, at the probability chosen on the masks that calibrate. "
        f"Beaten: of {', '.join(TO_BEAT)}, by the MAE of the 3D Dice, in each seed."
    )
    return Table(
        f"figures-{experiment}", "SegQC", ("structure", *GOALS, "of TTA's MAE", "beaten"), tuple(rows), note=note
    )


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that are known."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def forest(tables: dict[str, list[Table]], name: str) -> Figure:
    """The MAE of every method, a panel per structure; lines reach over the intervals of all seeds."""
    entries, constants = [], {}
    for structure, of_seeds in tables.items():
        for method in [str(row[0]) for row in of_seeds[0].rows]:
            value, span = mean([number(t, method, "MAE") for t in of_seeds]), reach(of_seeds, method)
            if value is None:
                continue
            if method == CONSTANT:
                constants[structure] = value
            else:
                low, high = span or (None, None)
                entries.append(figures.ForestEntry(method, value, low, high, structure))
    return figures.forest(
        f"evaluation-{name}",
        f"Mean absolute error of the estimated 3D Dice, {name}",
        entries,
        references=constants,
        reference_label=CONSTANT_LEGEND,
    )


def draw(name: str, experiment: str) -> None:
    """Print the tables and write the figure."""
    paths = sorted(RESULTS.glob(f"evaluation-{name}-[0-9]*.json"))
    if not paths:
        raise SystemExit(f"{RESULTS}: holds no evaluation-{name}-<seed>.json; `keep` one first")
    seeds = [NUMBERS.validate_json(path.read_bytes()) for path in paths]
    for path, seed in zip(paths, seeds, strict=True):
        print(f"{path.name}: " + "; ".join(f"{k}: {v}" for k, v in seed.facts.items()) + "\n")
    tables = main_tables(seeds, experiment)
    for structure, of_seeds in tables.items():
        print(to_markdown(over_seeds(of_seeds, structure)))
    print(to_markdown(figures_of_segqc(seeds, list(tables), experiment)))
    (RESULTS / f"evaluation-{name}.svg").write_text(str(forest(tables, name).image), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    retention = commands.add_parser("keep")
    retention.add_argument("run", type=Path)
    retention.add_argument("name", help="<data set>-<seed>")
    drawing = commands.add_parser("draw")
    drawing.add_argument("name", help="<data set>")
    drawing.add_argument("--experiment", default="stratified")
    options = parser.parse_args()
    if options.command == "keep":
        keep(options.run, options.name)
    else:
        draw(options.name, options.experiment)


if __name__ == "__main__":
    main()
