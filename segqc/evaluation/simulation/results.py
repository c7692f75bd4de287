"""What a study has shown so far, as tables and pictures; all numbers as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from pydantic import TypeAdapter

from segqc.evaluation.report import figures
from segqc.evaluation.report.document import Cell, Figure, Table
from segqc.evaluation.report.formats import to_csv, to_markdown
from segqc.evaluation.simulation.curves import Spread, Values, area, at, by_arm, cost_of, labels_dice, test_dice
from segqc.evaluation.simulation.unit import Point, Unit
from segqc.volumes import atomic_write

_COSTS: Final = (0.1, 0.3)
_REACHED: Final = (0.95, 0.98)
_UNITS: Final[TypeAdapter[tuple[Unit, ...]]] = TypeAdapter(tuple[Unit, ...])


@dataclass(frozen=True, slots=True)
class StudyResult:
    """The tables and pictures of a study."""

    curves: Table
    pseudo_labels: Table | None
    figures: tuple[Figure, ...]


def result_of(units: Sequence[Unit]) -> StudyResult:
    """Sum up the units that have at least one point.

    Raises:
        ValueError: if none has.
    """
    measured = [unit for unit in units if unit.points]
    arms = by_arm(measured)
    accepting = {arm: own for arm, own in arms.items() if any(point.accepted for u in own for point in u.points)}
    return StudyResult(
        _curves(arms, _full(measured)),
        _pseudo_labels(accepting) if accepting else None,
        (
            _figure("learning-curves", "Masks of the test scans", "mean true Dice of the test scans", arms, test_dice),
            _figure("labels", "Labels of the pool", "mean true Dice of the pool's labels", arms, labels_dice),
        ),
    )


def write_result(units: Sequence[Unit], folder: Path) -> StudyResult:
    """Sum up and write it: ``learning-curves.json`` (all units), and each table and picture as a file."""
    result = result_of(units)
    files = {"learning-curves.json": (_UNITS.dump_json(tuple(units), indent=1) + b"\n").decode()}
    for table in (result.curves, result.pseudo_labels):
        if table is not None:
            files |= {f"{table.name}.csv": to_csv(table), f"{table.name}.md": to_markdown(table)}
    for figure in result.figures:
        files[f"{figure.name}.{figure.suffix}"] = str(figure.image)
    for name, text in files.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return result


def read_units(path: Path) -> tuple[Unit, ...]:
    """The units of a file ``learning-curves.json``."""
    return _UNITS.validate_json(path.read_bytes())


def _full(units: Sequence[Unit]) -> float | None:
    """The test Dice with all labels: the mean over all that got there, as their labels are the same."""
    found = [p.mean_test_dice for u in units for p in u.points if p.share > 1 - 1e-9 and not p.accepted]
    return float(np.mean(found)) if found else None


def _curves(arms: Mapping[str, tuple[Unit, ...]], full: float | None) -> Table:
    units = [unit for own in arms.values() for unit in own]
    first = max(unit.points[0].share for unit in units)
    last = max(unit.study.budgets[-1] for unit in units)
    rows = []
    for arm, own in arms.items():
        row: list[Cell] = [arm, len(own)]
        if last > first:
            below = Spread.of([area(u.points, test_dice(u.points), first, last) for u in own])
            row += [below.mean, below.deviation]
        else:  # everything was opened at the start
            row += [None, None]
        row += [_mean([at(u.points, test_dice(u.points), cost) for u in own]) for cost in _COSTS]
        row += [
            None if full is None else _mean([cost_of(u.points, test_dice(u.points), share * full) for u in own])
            for share in _REACHED
        ]
        row += [_mean([at(u.points, labels_dice(u.points), cost) for u in own]) for cost in _COSTS]
        row += [Spread.of([u.points[-1].share for u in own]).mean, Spread.of([_minutes(u) for u in own]).mean]
        rows.append(tuple(row))
    columns = (
        "arm", "seeds", "area", "sd",
        *(f"test Dice at {cost:.0%}" for cost in _COSTS),
        *(f"cost of {share:.0%}" for share in _REACHED),
        *(f"labels' Dice at {cost:.0%}" for cost in _COSTS),
        "opened", "minutes",
    )  # fmt: skip
    known = "" if full is None else f" With all labels the test Dice is {full:.3f}, of which costs are shares."
    return Table(
        "curves",
        "What corrections buy",
        columns,
        tuple(rows),
        digits={"minutes": 0},
        note="Means over the seeds. Area: mean test Dice over the costs, the shares of the pool's slices that were "
        f"opened, from {first:.0%} to {last:.0%}; sd: its standard deviation over the seeds. Cost: until the curve "
        "reaches that share of the test Dice with all labels; a dash where one of the seeds never does. Opened: what "
        f"was opened at the end. Minutes: of annotation, by the study's model.{known}",
        best={"area": "highest", **{f"cost of {share:.0%}": "lowest" for share in _REACHED}},
    )


def _pseudo_labels(arms: Mapping[str, tuple[Unit, ...]]) -> Table:
    rows = []
    for arm, own in arms.items():
        accepted = [(u.study.accepted_dice, a) for u in own for point in u.points for a in point.accepted]
        bad = sum(a.true < wanted for wanted, a in accepted)
        scans = {(u.seed, a.scan) for u in own for point in u.points for a in point.accepted}
        least = min(a.true for _, a in accepted)
        rows.append((arm, len(own), len(accepted), len(scans), bad, 1 - bad / len(accepted), least))
    return Table(
        "pseudo-labels",
        "What was accepted",
        ("arm", "seeds", "accepted", "scans", "bad", "precision", "least true Dice"),
        tuple(rows),
        note="Pseudo-labels of all rounds: a mask that is accepted in two rounds counts twice. Bad: the true Dice of "
        "its worst structure is below the study's limit.",
    )


def _figure(
    name: str,
    title: str,
    y_label: str,
    arms: Mapping[str, tuple[Unit, ...]],
    values: Callable[[Sequence[Point]], Values],
) -> Figure:
    """A line for each arm: the mean over the seeds, at the costs that its seeds had, with their extremes as a band."""
    series = []
    for arm, own in arms.items():
        x = np.mean(np.array([[p.share for p in u.points[: _common(own)]] for u in own]), axis=0)
        y = np.array([values(u.points[: _common(own)]) for u in own])
        several = len(own) > 1
        series.append(
            figures.Series(
                arm, x, y.mean(axis=0), y.min(axis=0) if several else None, y.max(axis=0) if several else None
            )
        )
    caption = "Means over the seeds; bands from the least to the largest of them."
    return figures.learning_curves(name, title, series, quantity=y_label, caption=caption)


def _common(units: Sequence[Unit]) -> int:
    """How many rounds all units of an arm have."""
    return min(len(unit.points) for unit in units)


def _minutes(unit: Unit) -> float:
    return unit.points[-1].cost.minutes


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None
