"""How soon does the drift alarm notice that errors have grown, and how often is it false?

    python benchmarks/drift.py simulate
    python benchmarks/drift.py served hippocampus-4mm --seed 0 --work /tmp/served --label before
    python benchmarks/drift.py table

``simulate`` tests residuals of a known distribution. ``served`` takes what ``benchmarks/served.py run`` has left in its
work folder and measured, and lets the pool be audited in many random orders: its scans of the site that calibrated, of
another one, and all of them. These are orders of the same few patients, not new patients.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import harder_sets
import numpy as np
from harder_sets import Pool
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from served import ALL, RESULT, RESULTS, Measured, Result, result_path

from segqc.loop.dataset import Dataset
from segqc.networks.card import ModelCard
from segqc.quality.drift import drift_test
from segqc.quality.metrics import Values
from segqc.volumes import atomic_write

LEVELS = (0.01, 0.05)
STREAMS = 2000
ORDERS = 300
AUDITED = (5, 10, 20, 60, 200)  # patients, of simulated streams
PREFIX = "drift-"


@dataclass(frozen=True, slots=True)
class Noticed:
    """How many of many streams raise an alarm.

    Attributes:
        what: the streams, in words.
        calibrating, audited: patients.
        level: of false alarms.
        share: of the streams that raise an alarm.
        median: the audited patient at which half of all streams have one; None where fewer do.
    """

    what: str
    calibrating: int
    audited: int
    level: float
    share: float
    median: int | None


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured, and when."""

    date: str
    streams: int
    found: tuple[Noticed, ...]


MEASUREMENT: TypeAdapter[Measurement] = TypeAdapter(Measurement)


def noticed(what: str, calibrating: int, audited: int, level: float, alarms: Sequence[int | None]) -> Noticed:
    """Summarise the alarms of many streams: the audited patient at which each begins, None without one."""
    began = sorted(alarm for alarm in alarms if alarm is not None)
    half = (len(alarms) + 1) // 2
    median = began[half - 1] if len(began) >= half else None
    return Noticed(what, calibrating, audited, level, round(len(began) / len(alarms), 4), median)


def simulate() -> list[Noticed]:
    """Streams of one structure whose errors are Laplace distributed, and larger by a factor from the first audit on."""

    def alarm(calibrating: int, factor: float, level: float, number: int) -> int | None:
        generator = np.random.default_rng([number, 7])
        known = np.abs(generator.laplace(size=calibrating))
        audited = factor * np.abs(generator.laplace(size=AUDITED[-1]))
        return drift_test(known, audited, level=level, seed=[number]).alarm

    found = []
    for level in LEVELS:
        for calibrating in (20, 40):
            for factor in (1, 2, 3, 5):
                alarms = [alarm(calibrating, factor, level, number) for number in range(STREAMS)]
                for audited in AUDITED:
                    until = [a if a is not None and a <= audited else None for a in alarms]
                    found.append(noticed(f"errors times {factor}", calibrating, audited, level, until))
    return found


def of_served(card: ModelCard, result: Result) -> list[Noticed]:
    """Random orders of the scans of each subset of a pool, by the residuals that the product would test."""
    subsets = [ALL, *dict.fromkeys(m.subset for m in result.masks)]
    found = []
    for subset in subsets:
        chosen = [m for m in result.masks if subset in (ALL, m.subset)]
        patients = sorted({m.patient for m in chosen})
        for level in LEVELS:
            alarms = [_first_alarm(card, chosen, patients, level, number) for number in range(ORDERS)]
            calibrating = len(_calibrating(card, 0, np.random.default_rng(0)))
            found.append(noticed(f"scans: {subset}", calibrating, len(patients), level, alarms))
    return found


def _calibrating(card: ModelCard, structure: int, generator: np.random.Generator) -> Values:
    intervals = card.calibration[structure].of("served").intervals
    if intervals is None:
        raise SystemExit("the estimates of this bundle have no intervals, and so no residuals that calibrate")
    return intervals.dice.one_score_each(generator)


def _first_alarm(
    card: ModelCard, masks: Sequence[Measured], patients: Sequence[str], level: float, number: int
) -> int | None:
    """The audited patient at which the first structure raises the alarm, of one order of the patients."""
    generator = np.random.default_rng(number)
    order = {patient: place for place, patient in enumerate(generator.permutation(patients))}
    began = []
    for k, structure in enumerate(card.structures):
        intervals = card.calibration[k].of("served").intervals
        first: dict[str, float] = {}
        for mask in sorted(masks, key=lambda m: order[m.patient]):
            shown, true = mask.shown.dice, mask.truth.dice
            if mask.structure == structure.name and shown is not None and true is not None and intervals is not None:
                first.setdefault(mask.patient, intervals.dice.score(shown, true))
        test = drift_test(
            _calibrating(card, k, generator),
            np.array(list(first.values())),
            level=level / len(card.structures),
            seed=[number, k, 1],  # other numbers than the generator's
        )
        began += [test.alarm] if test.alarm is not None else []
    return min(began, default=None)


def keep(name: str, streams: int, found: Sequence[Noticed]) -> None:
    """Write a result."""
    made = Measurement(datetime.date.today().isoformat(), streams, tuple(found))
    with atomic_write(RESULTS / f"{PREFIX}{name}.json") as temporary:
        temporary.write_bytes(MEASUREMENT.dump_json(made, indent=1) + b"\n")


def show(console: Console) -> None:
    """Print all results that are kept."""
    for path in sorted(RESULTS.glob(f"{PREFIX}*.json")):
        made = MEASUREMENT.validate_json(path.read_bytes())
        table = Table(title=f"{path.stem}, {made.date}, {made.streams} streams each")
        for column in ("streams", "calibrating", "audited", "level", "alarms", "half of all at patient"):
            table.add_column(column)
        for row in made.found:
            counts = (str(row.calibrating), str(row.audited), f"{row.level}", f"{row.share:.1%}")
            table.add_row(row.what, *counts, "" if row.median is None else str(row.median))
        console.print(table)


def main() -> None:
    """Run a measurement, or print the tables of those that are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("simulate", help="residuals of a known distribution")
    commands.add_parser("table", help="print the results that are kept")
    served = commands.add_parser("served", help="what served.py has measured")
    served.add_argument("set", choices=harder_sets.DRAWN)
    served.add_argument("--seed", type=int, choices=harder_sets.SEEDS, default=0)
    served.add_argument("--pool", choices=get_args(Pool), default="development")
    served.add_argument("--label", required=True, help="what of the product was measured, as for served.py")
    served.add_argument("--work", type=Path, required=True, help="the folder that served.py worked in")
    arguments = parser.parse_args()
    if arguments.command == "simulate":
        keep("simulated", STREAMS, simulate())
    elif arguments.command == "served":
        name, seed, pool, label = arguments.set, arguments.seed, arguments.pool, arguments.label
        result = RESULT.validate_json(result_path(label, name, seed, pool).read_bytes())
        bundle = Dataset(arguments.work / label / name / f"seed-{seed}" / "dataset").bundle()
        if bundle is None:
            raise SystemExit(f"{arguments.work}: no networks; run benchmarks/served.py first")
        keep(f"{label}-{name}-{seed}-{pool}", ORDERS, of_served(bundle.card("segqc"), result))
    show(Console())


if __name__ == "__main__":
    main()
