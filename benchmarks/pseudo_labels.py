r"""What pseudo-labels are worth: the same labels, with the masks that several rules accept.

Both networks are trained on some labelled scans of a data set and make the masks of all others. Then a segmentation
network is trained from scratch on these labels and on no mask, all masks, the same number of best masks by SegQC-Net's
estimate, by the agreement under test-time augmentation and by the true Dice (the ceiling), and on what the product
accepts: by the interval's lower end, weighted by quality, without the voxels that are probably wrong. Resumable.

    python benchmarks/pseudo_labels.py run --data $SEGQC_DATA/msd-hippocampus --work /tmp/pseudo --seed 0 \
        --structure anterior=1 --structure posterior=2
    python benchmarks/pseudo_labels.py table
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from pydantic import TypeAdapter
from rich.console import Console
from scipy.stats import beta

from segqc.cli.common import structure_flag
from segqc.evaluation.report.document import Table
from segqc.evaluation.report.formats import to_markdown
from segqc.loop.agreement import dice_by_structure, worst_dice
from segqc.loop.dataset import Dataset
from segqc.loop.prepare import labelled_pairs, prepare, scans_by_patient
from segqc.loop.pseudo_labels import make_pseudo_labels, plan_pseudo_labels, pseudo_cases
from segqc.loop.scoring import score
from segqc.loop.training import train
from segqc.networks.device import name_of_device
from segqc.quality.pseudo_labels import PseudoLabelRules
from segqc.settings import load_settings
from segqc.store import scans
from segqc.training import LineProgress
from segqc.training.cases import Case
from segqc.training.segmentation import NO_PSEUDO_CASES, PseudoCases, train_segmentation
from segqc.types import Structure
from segqc.volumes import atomic_write, read_labels, read_scan

RESULTS = Path(__file__).parent / "results"
NONE, ALL, BY_SEGQC, BY_TTA, BY_TRUTH, PRODUCT = (
    "none",
    "all",
    "best by SegQC",
    "best by TTA",
    "best by truth",
    "product",
)
ARMS = (NONE, ALL, BY_TTA, BY_SEGQC, BY_TRUTH, PRODUCT)
progress = LineProgress()


@dataclass(frozen=True, slots=True)
class Arm:
    """What a rule accepted, and what came of it.

    Attributes:
        accepted: the true Dice of the worst structure of each accepted mask.
        test_dice: the mean over the structures of each test scan's mask, in the order of their names.
    """

    accepted: tuple[float, ...]
    test_dice: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """One seed of one data set."""

    data: str
    seed: int
    labelled: int
    waiting: int
    share: float
    settings: Mapping[str, int]
    date: str
    machine: str
    arms: dict[str, Arm]


RESULT = TypeAdapter(Result)


class Worth:
    """The folder of one seed, with both networks, masks and estimates."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.work: Path = arguments.work / f"{arguments.data.name}-{arguments.seed}"
        self.settings = {"epochs": arguments.epochs, "fold_epochs": arguments.epochs // 2, "folds": 3}
        structures = dict(map(structure_flag, arguments.structure))
        folder = self.work / "dataset"
        pairs = labelled_pairs(arguments.data)
        pool = [s for own in scans_by_patient(arguments.data, "train", list(pairs)).values() for s in own]
        if not folder.exists():
            prepare(
                arguments.data, folder, labelled=arguments.labelled, unlabelled=len(pool) - arguments.labelled,
                structures=structures, split="train", seed=arguments.seed,
            )  # fmt: skip
        rules = {"mode": "top", "top_share": arguments.share, "cap": 100}
        training = {"training": {**self.settings, "seed": arguments.seed}}
        self.dataset = Dataset(folder, load_settings(folder, overrides={**training, "pseudo_labels": rules}))
        self.share: float = arguments.share
        self.structures: tuple[Structure, ...] = self.dataset.structures
        test = [s for own in scans_by_patient(arguments.data, "test", list(pairs)).values() for s in own]
        self.test = {scan: pairs[scan] for scan in sorted(test)}
        self.truths = {scan: pairs[scan][1] for scan in pool}

    def prepare(self) -> None:
        """Train both networks on the labels alone; make and score the masks of all other scans."""
        off = replace_rules(self.dataset, PseudoLabelRules())
        for network in ("segmentation", "segqc"):
            if off.model_path(network) is None:
                train(off, network, progress)
        for method in ("segqc", "tta"):
            score(off, method, progress)

    def arm(self, name: str) -> Arm:
        """Train with what a rule accepts, and measure the masks of the test scans."""
        pseudo = self._accepted(name)
        cases, splits = self.dataset.cases(), dict(self.dataset.patient_splits())
        settings = self.dataset.settings.training_settings("segmentation")
        folder = self.work / "trainings" / name.replace(" ", "-")
        network = train_segmentation(cases, self.structures, splits, settings, folder, progress, pseudo)
        accepted = tuple(self._true(case.id, case.labels) for case in pseudo.cases)
        test = []
        for image, label in self.test.values():
            scan = read_scan(image)
            truth = np.asarray(read_labels(label, scan=scan).array, np.uint8)
            dice = dice_by_structure(np.asarray(network.predict(scan).labels.array, np.uint8), truth, self.structures)
            test.append(round(fmean(value for value in dice.values() if value is not None), 4))
        return Arm(accepted, tuple(test))

    def _true(self, scan: str, labels: Path) -> float:
        truth = np.asarray(read_labels(self.truths[scan]).array, np.uint8)
        mask = np.asarray(read_labels(labels).array, np.uint8)
        return round(worst_dice(dice_by_structure(mask, truth, self.structures)), 4)

    def _accepted(self, name: str) -> PseudoCases:
        if name == NONE:
            return NO_PSEUDO_CASES
        if name == PRODUCT:
            make_pseudo_labels(self.dataset, plan_pseudo_labels(self.dataset), progress)
            return pseudo_cases(self.dataset)
        cases = list(self._masks())
        if name != ALL:
            worth = self._worth(name, cases)
            cases = sorted(cases, key=lambda case: (-worth[case.id], case.id))[: round(self.share * len(cases))]
        segmenter, assessor = self.dataset.segmenter(), self.dataset.assessor()
        assert segmenter is not None
        assert assessor is not None
        return PseudoCases(tuple(cases), tuple(sorted({*segmenter.card.seen, *assessor.card.seen})))

    def _masks(self) -> Iterator[Case]:
        with self.dataset.store.read() as transaction:
            known = {scan.name: scan for scan in scans.listing(transaction)}
        for entry in self.dataset.waiting():
            scan = known[entry.id]
            if entry.original is not None and scan.split == "train":
                yield Case(entry.id, scan.patient, entry.image, entry.original, content=entry.sha256)

    def _worth(self, name: str, cases: Sequence[Case]) -> Mapping[str, float]:
        if name == BY_TRUTH:
            return {case.id: self._true(case.id, case.labels) for case in cases}
        if name == BY_TTA:
            return self.dataset.scores("tta")
        return {scan: a.dice for scan, a in self.dataset.assessments().items() if a.dice is not None}


def replace_rules(dataset: Dataset, rules: PseudoLabelRules) -> Dataset:
    """The folder with other rules for pseudo-labels."""
    return Dataset(dataset.folder, dataset.settings.model_copy(update={"pseudo_labels": rules}))


def run(arguments: argparse.Namespace) -> None:
    """Measure one seed; what is in the result already is not measured again."""
    path = RESULTS / f"pseudo-labels-{arguments.data.name}-{arguments.seed}.json"
    worth = Worth(arguments)
    worth.prepare()
    result = Result(
        arguments.data.name, arguments.seed, len(worth.dataset.cases()), len(worth.dataset.waiting()),
        worth.share, worth.settings, datetime.date.today().isoformat(),
        f"{name_of_device()}, {platform.machine()}, {os.cpu_count()} cores", {},
    )  # fmt: skip
    with contextlib.suppress(FileNotFoundError):
        result = RESULT.validate_json(path.read_bytes())
    for name in ARMS:
        if name not in result.arms:
            result = replace(result, arms={**result.arms, name: worth.arm(name)})
            with atomic_write(path) as temporary:
                temporary.write_bytes(RESULT.dump_json(result, indent=1) + b"\n")


def table() -> None:
    """Print what is measured, over the seeds of each data set."""
    results = [RESULT.validate_json(path.read_bytes()) for path in sorted(RESULTS.glob("pseudo-labels-*-[0-9].json"))]
    rows = []
    for data in dict.fromkeys(result.data for result in results):
        own = [result for result in results if result.data == data]
        for name in ARMS:
            arms = [result.arms[name] for result in own if name in result.arms]
            if not arms:
                continue
            accepted = [dice for arm in arms for dice in arm.accepted]
            good = sum(dice >= PseudoLabelRules().min_dice for dice in accepted)
            low = float(beta.ppf(0.05, good, len(accepted) - good + 1)) if good else 0.0
            gains = [fmean(a.test_dice) - fmean(r.arms[NONE].test_dice) for r, a in zip(own, arms, strict=False)]
            rows.append((
                data, name, len(arms), len(accepted), good / len(accepted) if accepted else None,
                low if accepted else None, min(accepted, default=None), fmean(fmean(a.test_dice) for a in arms),
                None if name == NONE else fmean(gains), stdev(gains) if len(gains) > 1 and name != NONE else None,
            ))  # fmt: skip
    columns = (
        "data", "masks that train, too", "seeds", "accepted", "good", "95% bound", "least true Dice", "test Dice",
        "gain", "sd",
    )  # fmt: skip
    note = (
        "Good: share of the accepted masks with a true Dice of the worst structure of 0.75 or more, with its one-sided "
    )
    note += "Clopper-Pearson bound; gain: of the test scans' mean Dice over no masks, and its standard deviation."
    found = Table("pseudo-labels", "What pseudo-labels are worth", columns, tuple(rows), note=note)
    Console().print(to_markdown(found), soft_wrap=True)


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table")
    of_run = commands.add_parser("run")
    of_run.add_argument("--data", type=Path, required=True, help="the data set's folder")
    of_run.add_argument("--work", type=Path, required=True, help="for dataset folders and trainings")
    of_run.add_argument("--structure", action="append", required=True, help="NAME=VALUES; repeat")
    of_run.add_argument("--seed", type=int, default=0)
    of_run.add_argument("--labelled", type=int, default=20)
    of_run.add_argument("--share", type=float, default=0.5, help="of the masks that the best are")
    of_run.add_argument("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("segqc.progress").setLevel(logging.INFO)
    run(arguments) if arguments.command == "run" else table()


if __name__ == "__main__":
    main()
