"""From the reports of full evaluations to the README's table and figure; nothing is trained.

    segqc evaluate stratified $SEGQC_DATA/msd-hippocampus ... --seed 0 --out RUN     # an hour or two
    python benchmarks/evaluation.py keep RUN hippocampus-0                           # its numbers into results/
    python benchmarks/evaluation.py draw hippocampus                                 # of all seeds that are kept

The table goes to the terminal as Markdown, the figure to ``results/evaluation-<data set>.svg``.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from segqc.evaluation.methods import CONSTANT, SEGQC
from segqc.evaluation.report import figures
from segqc.evaluation.report.document import Cell, Figure, Table
from segqc.evaluation.report.formats import NUMBERS, Numbers, to_markdown
from segqc.evaluation.result_figures import CONSTANT_LEGEND

RESULTS = Path(__file__).parent / "results"
MEASURED = ("MAE", "Pearson", "Spearman")
# column of the table of SegQC's figures: the report's table, and its column
FIGURES = {
    "Dice 3D": ("mae", "Dice 3D"),
    "Pearson 3D": ("main", "Pearson"),
    "IoU 3D": ("mae", "IoU 3D"),
    "ARVD 3D": ("mae", "ARVD 3D"),
    "Dice 2D": ("slices", "Dice, mask"),
    "Pearson 2D": ("slices", "Pearson, mask"),
    "scans' order": ("orders-3d", "captured"),
    "slices' order": ("orders-2d", "captured"),
    "boxes' recall": ("detection-methods", "recall, chosen"),
    "boxes' precision": ("detection-methods", "precision, chosen"),
}


def keep(run: Path, name: str) -> None:
    """Copy a finished run's numbers into the results."""
    tables = run / "report" / "tables.json"
    if not tables.is_file():
        raise SystemExit(f"{tables}: is missing; let `segqc evaluate` end in this run folder first")
    NUMBERS.validate_json(tables.read_bytes())
    RESULTS.mkdir(exist_ok=True)
    shutil.copyfile(tables, RESULTS / f"evaluation-{name}.json")


def main_tables(seeds: Sequence[Numbers], study: str) -> dict[str, list[Table]]:
    """The main table of each structure, one per seed."""
    found: dict[str, list[Table]] = {}
    for seed in seeds:
        for table in seed.tables:
            if table.name.startswith(f"main-{study}-"):
                found.setdefault(table.name.removeprefix(f"main-{study}-"), []).append(table)
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


def over_seeds(tables: Sequence[Table], structure: str) -> Table:
    """Means over the seeds, each seed's MAE, and the verdicts."""
    rows: list[tuple[Cell, ...]] = []
    for method in [str(row[0]) for row in tables[0].rows]:
        numbers = [[n for t in tables if (n := number(t, method, c)) is not None] for c in MEASURED]
        means = [fmean(n) if n else None for n in numbers]
        spans = "; ".join(text(t, method, "95% interval") for t in tables)
        rows.append((method, means[0], spans, *means[1:], "; ".join(text(t, method, "SegQC is") for t in tables)))
    columns = ("method", "MAE", "95% interval", "Pearson", "Spearman", "SegQC is")
    best = {"MAE": "lowest", "Pearson": "highest", "Spearman": "highest"}
    return Table(f"main-{structure}", f"Estimated 3D Dice of {structure}", columns, tuple(rows), best=best)  # type: ignore[arg-type]


def figures_of_segqc(seeds: Sequence[Numbers], structures: Sequence[str], study: str) -> Table:
    """Means over the seeds of what SegQC reaches with each structure."""
    by_name = [{table.name: table for table in seed.tables} for seed in seeds]
    rows: list[tuple[Cell, ...]] = []
    for structure in structures:
        cells: list[Cell] = [structure]
        for kind, column in FIGURES.values():
            found = [number(tables[f"{kind}-{study}-{structure}"], SEGQC, column) for tables in by_name]
            known = [n for n in found if n is not None]
            cells.append(fmean(known) if known else None)
        rows.append(tuple(cells))
    note = (
        "Errors (MAE) after calibration; 2D: slices that have a mask. Orders: share of the optimal order's gain over "
        "random. Boxes after error extraction, IoU 0.05, at the probability chosen on the masks that calibrate."
    )
    return Table(f"figures-{study}", "SegQC", ("structure", *FIGURES), tuple(rows), note=note)


def forest(tables: dict[str, list[Table]], name: str) -> Figure:
    """The MAE of every method, a panel per structure; lines reach over the intervals of all seeds."""
    entries, constants = [], {}
    for structure, of_seeds in tables.items():
        for method in [str(row[0]) for row in of_seeds[0].rows]:
            values = [n for t in of_seeds if (n := number(t, method, "MAE")) is not None]
            spans = [text(t, method, "95% interval").split(" to ") for t in of_seeds]
            ends = [float(end) for span in spans for end in span if len(span) == 2]
            if not values:
                continue
            if method == CONSTANT:
                constants[structure] = fmean(values)
            else:
                low, high = (min(ends), max(ends)) if ends else (None, None)
                entries.append(figures.Interval(method, fmean(values), low, high, structure))
    return figures.forest(
        f"evaluation-{name}",
        f"Mean absolute error of the estimated 3D Dice, {name}",
        entries,
        references=constants,
        reference_label=CONSTANT_LEGEND,
    )


def draw(name: str, study: str) -> None:
    """Print the tables and write the figure."""
    paths = sorted(RESULTS.glob(f"evaluation-{name}-[0-9]*.json"))
    if not paths:
        raise SystemExit(f"{RESULTS}: holds no evaluation-{name}-<seed>.json; `keep` one first")
    seeds = [NUMBERS.validate_json(path.read_bytes()) for path in paths]
    for path, seed in zip(paths, seeds, strict=True):
        print(f"{path.name}: " + "; ".join(f"{k}: {v}" for k, v in seed.facts.items()) + "\n")
    tables = main_tables(seeds, study)
    for structure, of_seeds in tables.items():
        print(to_markdown(over_seeds(of_seeds, structure)))
    print(to_markdown(figures_of_segqc(seeds, list(tables), study)))
    (RESULTS / f"evaluation-{name}.svg").write_text(str(forest(tables, name).image))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    keeping = commands.add_parser("keep")
    keeping.add_argument("run", type=Path)
    keeping.add_argument("name", help="<data set>-<seed>")
    drawing = commands.add_parser("draw")
    drawing.add_argument("name", help="<data set>")
    drawing.add_argument("--study", default="stratified")
    options = parser.parse_args()
    if options.command == "keep":
        keep(options.run, options.name)
    else:
        draw(options.name, options.study)


if __name__ == "__main__":
    main()
