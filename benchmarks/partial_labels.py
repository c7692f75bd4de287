"""What do scans teach of which only the worst slices were corrected, and how often should they be drawn?

On scans of a data set's training part alone: some are labelled as a whole, of others only the slices in which the first
network errs most, and masks are measured on further ones. The trainings differ in their labels and in how often a scan
is drawn that was checked in part. What is done in the work folder is not done again.

    python benchmarks/partial_labels.py run --seed 0 --data $SEGQC_DATA/msd-hippocampus --work /tmp/partial
    python benchmarks/partial_labels.py table
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Final

import numpy as np
from rich.console import Console

from segqc.evaluation.report.document import Table
from segqc.evaluation.report.formats import to_markdown
from segqc.loop.agreement import dice_by_structure
from segqc.loop.prepare import labelled_pairs, scans_by_patient
from segqc.networks.device import name_of_device
from segqc.networks.segmenter import Segmenter
from segqc.training import LineProgress, TrainingSettings
from segqc.training.cases import Case, label_values, read_case
from segqc.training.crossfit import train_mask_sources
from segqc.training.segmentation import plan_for
from segqc.types import Structure
from segqc.volumes import through_plane_axis
from segqc.volumes.slices import Slices

RESULTS: Final = Path(__file__).parent / "results" / "partial-labels.json"
STRUCTURES: Final = (Structure("anterior", (1,)), Structure("posterior", (2,)))
WHOLE, IN_PART, MEASURED, SLICES = 20, 50, 40, 5
SETTINGS: Final = TrainingSettings(fold_epochs=30)
FIRST, ALL = "whole ones alone", "all as a whole"
progress = LineProgress()


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The mean true Dice of the measured scans, by training."""

    seed: int
    date: str
    machine: str
    slices: Mapping[str, int]
    dice: Mapping[str, float]


def cases_of(data: Path, seed: int) -> list[Case]:
    """So many cases of the training part as are needed, in a drawn order."""
    pairs = labelled_pairs(data)
    names = [scan for scans in scans_by_patient(data, "train", list(pairs)).values() for scan in scans]
    order = np.random.default_rng(seed).permutation(len(names))[: WHOLE + IN_PART + MEASURED]
    return [Case(names[i], names[i], *pairs[names[i]]) for i in order]


def worst_slices(segmenter: Segmenter, case: Case) -> Slices:
    """The slices of a case in which most voxels of the network's mask are wrong, ascending."""
    scan, truth = read_case(case, segmenter.values)
    wrong = np.asarray(segmenter.predict(scan).labels.array) != np.asarray(truth.array)
    counts = wrong.sum(axis=tuple(a for a in range(3) if a != through_plane_axis(scan)))
    return tuple(sorted(int(i) for i in np.argsort(-counts, kind="stable")[:SLICES]))


def depth(case: Case) -> int:
    """The number of a case's slices."""
    scan, _ = read_case(case, label_values(STRUCTURES))
    return scan.shape[through_plane_axis(scan)]


def measure(seed: int, data: Path, work: Path) -> Result:
    """Do one seed's trainings."""
    cases = cases_of(data, seed)
    whole, others, measured = cases[:WHOLE], cases[WHOLE : WHOLE + IN_PART], cases[WHOLE + IN_PART :]
    plan = plan_for(cases[: WHOLE + IN_PART], SETTINGS, in_channels=1, out_channels=1 + len(STRUCTURES))

    def trained(name: str, on: Sequence[Case]) -> Segmenter:
        settings, folder = replace(SETTINGS, seed=seed), work / f"{seed}-{name.replace(' ', '-')}"
        return train_mask_sources(name, on, STRUCTURES, plan, settings, folder, progress, early=())[0]

    first = trained(FIRST, whole)
    in_part = [replace(case, slices=worst_slices(first, case)) for case in others]
    depths = {case.id: depth(case) for case in cases}
    opened = sum(depths[case.id] for case in whole) + IN_PART * SLICES
    totals = itertools.accumulate(depths[case.id] for case in cases)
    as_many = [case for case, total in zip(cases, totals, strict=True) if total <= opened]
    by_slices = [replace(case, weight=SLICES / depths[case.id]) for case in in_part]
    networks = {
        FIRST: first,
        "as many slices, of whole ones": trained("as many slices", as_many),
        "in part, too, each as often": trained("by scan", [*whole, *in_part]),
        "in part, too, by their slices": trained("by slices", [*whole, *by_slices]),
        ALL: trained(ALL, [*whole, *others]),
    }
    dice = {name: round(fmean(mean_dice(network, case) for case in measured), 4) for name, network in networks.items()}
    slices = dict.fromkeys(networks, opened)
    slices[FIRST] = opened - IN_PART * SLICES
    slices[ALL] = sum(depths[case.id] for case in (*whole, *others))
    return Result(
        seed=seed,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=name_of_device(),
        slices=slices,
        dice=dice,
    )


def mean_dice(segmenter: Segmenter, case: Case) -> float:
    """The true Dice of a case's mask, a mean over the structures."""
    scan, truth = read_case(case, segmenter.values)
    predicted = np.asarray(segmenter.predict(scan).labels.array, np.uint8)
    found = dice_by_structure(predicted, np.asarray(truth.array, np.uint8), segmenter.structures)
    return fmean(value for value in found.values() if value is not None)


def read() -> list[Result]:
    """The results so far."""
    return [Result(**row) for row in json.loads(RESULTS.read_text())] if RESULTS.is_file() else []


def table(results: Sequence[Result]) -> str:
    """The results in Markdown: by training the slices, the mean Dice of each seed, and that over the seeds."""
    rows = []
    for name in results[0].dice:
        dice = [result.dice[name] for result in results]
        spread = f" ± {stdev(dice):.3f}" if len(dice) > 1 else ""
        slices = f"{fmean(result.slices[name] for result in results):.0f}"
        rows.append((name, slices, ", ".join(f"{value:.3f}" for value in dice), f"{fmean(dice):.3f}{spread}"))
    columns = ("labels", "slices", "Dice by seed", "mean")
    return to_markdown(Table("partial-labels", "What scans teach that were checked in part", columns, tuple(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="one seed")
    running.add_argument("--seed", type=int, default=0)
    running.add_argument("--data", type=Path, required=True, help="the data set's folder")
    running.add_argument("--work", type=Path, required=True, help="for the trainings")
    commands.add_parser("table", help="the results so far, in Markdown")
    arguments = parser.parse_args()
    if arguments.command == "run":
        result = measure(arguments.seed, arguments.data, arguments.work)
        kept = [*(r for r in read() if r.seed != result.seed), result]
        RESULTS.write_text(json.dumps([asdict(r) for r in sorted(kept, key=lambda r: r.seed)], indent=1) + "\n")
    if not (results := read()):
        raise SystemExit(f"{RESULTS}: there are no results yet; run a seed first")
    Console().print(table(results), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
