"""How much of two experts' differences does error extraction remove, and what does it keep of implanted errors?

The band's width is chosen on half of the scans and reported on the other half. The data: a folder of label files
``<scan>_oncologist.nii.gz`` and ``<scan>_radiographer.nii.gz`` with the structures' values in ``labels.txt``.

    python benchmarks/observers.py --data $SEGQC_DATA/two-raters-head-neck --figure observers.png
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from segqc.evaluation.experiments.observers import (
    ObserverExperiment,
    Outcome,
    Share,
    WidthCurve,
    compare_observers,
    draw_curves,
    find_double_readings,
    read_structures,
)
from segqc.progress import LineProgress

WANTED = {"removed": 0.85, "found": 0.98, "kept": 0.75}


@dataclass(frozen=True)
class Result:
    """What ``results/observers.json`` holds."""

    date: str
    machine: str
    seconds: float
    data: str
    experiment: ObserverExperiment


RESULT = TypeAdapter(Result)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def with_interval(share: Share) -> str:
    interval = "" if share.interval is None else f" [{share.interval[0]:.3f}, {share.interval[1]:.3f}]"
    return number(share.share) + interval


def curve_table(name: str, curve: WidthCurve) -> Table:
    table = Table("width", "removed", "mean", "found", "kept", title=f"{name}: large structures, choosing half")
    for kind in curve.points[0].outcome.large.implanted[1:]:
        table.add_column(f"{kind.kind}: found / kept")
    for point in curve.points:
        group = point.outcome.large
        total, *kinds = group.implanted
        row = [f"{point.width:g}", number(group.removed.share), number(group.removed.mean)]
        row += [number(total.found.share), number(total.kept.share)]
        table.add_row(*row, *(f"{number(k.found.share)} / {number(k.kept.share)}" for k in kinds))
    return table


def outcome_tables(name: str, outcome: Outcome) -> tuple[Table, Table]:
    groups = Table("", "cases", "removed", "mean", "one expert's slices", "found", "kept", title=f"{name}: held half")
    for group in outcome.groups:
        total = group.implanted[0]
        shares = (group.removed_single, total.found, total.kept)
        row = [group.name, str(group.cases), with_interval(group.removed), number(group.removed.mean)]
        groups.add_row(*row, *(number(share.share) for share in shares))
    titles = ("", "errors", "found", "kept", "mean", "kept among the difference", "difference removed beside it")
    kinds = Table(*titles, title=f"{name}: implanted errors, large structures, held half")
    for kind in outcome.large.implanted:
        row = [kind.kind, str(kind.found.whole), with_interval(kind.found), with_interval(kind.kept)]
        row += [number(s) for s in (kind.kept.mean, kind.kept_in_difference.share, kind.difference_removed.share)]
        kinds.add_row(*row)
    return groups, kinds


def verdict(outcome: Outcome) -> Table:
    table = Table("large structures, held half", "wanted", "reached", "")
    total = outcome.large.implanted[0]
    for name, share in (("removed", outcome.large.removed), ("found", total.found), ("kept", total.kept)):
        reached = share.share is not None and share.share >= WANTED[name]
        table.add_row(name, f"{WANTED[name]:.2f}", with_interval(share), "yes" if reached else "NO")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--first", default="oncologist", help="whose masks are assessed")
    parser.add_argument("--second", default="radiographer")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "observers.json")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args(arguments)
    console = Console(width=150)
    started = time.monotonic()
    readings = find_double_readings(options.data, options.first, options.second)
    experiment = compare_observers(readings, read_structures(options.data), progress=LineProgress())
    result = Result(
        datetime.datetime.now(datetime.UTC).date().isoformat(),
        f"{platform.machine()}, {platform.system()}, CPU",
        round(time.monotonic() - started, 1),
        options.data.name,
        experiment,
    )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_bytes(RESULT.dump_json(result) + b"\n")
    for name, curve in experiment.curves.items():
        console.print(curve_table(name, curve))
    console.print(f"chosen width: {experiment.chosen} ({experiment.chosen_from})")
    for name, outcome in experiment.on_held.items():
        console.print(*outcome_tables(name, outcome), sep="\n")
    if experiment.chosen is not None:
        console.print(verdict(experiment.on_held["chosen"]))
    if options.figure is not None:
        draw_curves(experiment, options.figure)


if __name__ == "__main__":
    main()
