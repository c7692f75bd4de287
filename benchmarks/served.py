"""What are the estimates worth on the masks that are served? The product on data sets that are hard for it.

A set of `harder_sets` becomes a dataset folder; the product trains both networks there and scores the pool, as ``segqc
train segmentation``, ``segqc train segqc`` and ``segqc score`` do, at their default settings and lengths. The stored
estimates are compared with the hidden truth, beside other witnesses of the same masks. Resumable: what is done in the
work folder is not done again.

    python benchmarks/served.py run hippocampus-4mm --seed 0 --data $SEGQC_DATA --work /tmp/served --label before
    python benchmarks/served.py table --label before

The development pool is for choosing; the test pool is measured once for each label that is reported, and a result of it
is not written over.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import logging
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import get_args

import harder_sets
import numpy as np
from harder_sets import HarderSet, Pool
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table as RichTable

from segqc.evaluation.methods.ensembles import EnsemblePairs
from segqc.evaluation.methods.estimates import AssessedMask, Estimator
from segqc.evaluation.methods.maps import CrossFittedMean, MapEstimator, SoftOutput
from segqc.evaluation.methods.tta import SoftmaxEntropy, Tta
from segqc.evaluation.report.document import Table
from segqc.evaluation.report.formats import to_markdown
from segqc.evaluation.statistics import curves
from segqc.loop.dataset import Dataset
from segqc.loop.scoring import score
from segqc.loop.training import train
from segqc.networks.assessor import Assessor
from segqc.networks.card import NetworkName
from segqc.networks.device import name_of_device
from segqc.networks.segmenter import Segmenter
from segqc.quality.error_counts import SignedCounts, count_voxels
from segqc.quality.error_maps import difference
from segqc.quality.estimation import Scores, scores
from segqc.quality.metrics import MetricName, true_metrics
from segqc.quality.report_card import StructureReport
from segqc.training import LineProgress
from segqc.training.assessor_calibration import with_maps
from segqc.training.cases import label_values, read_case
from segqc.training.crossfit import folds_of_cases, train_fold
from segqc.training.segmentation import plan_for
from segqc.types import BoolArray, Metrics
from segqc.volumes import Volume, atomic_write, read_labels

RESULTS = Path(__file__).parent / "results"
NETWORKS: tuple[NetworkName, ...] = ("segmentation", "segqc")
WORST, ALL = "worst structure", "all"
SHOWN, MAP, AS_TRAINED = "SegQC", "SegQC's map", "SegQC's map, not calibrated"
STRANGERS = "SegQC's map, strange masks"
STRANGE = 2  # masks of a scan by strange networks: those of the folds, also at early epochs
SOFT, TTA, FOLD_MASKS, FOLD_MEAN = "soft output", "TTA-16", "folds' masks", "folds' mean"
ENTROPY, SIZE, UNLIKENESS = "entropy", "size", "unlikeness"
ORDERS = (ENTROPY, SIZE, UNLIKENESS)  # no estimates
TTA_GAMMAS = (0.7, 0.85, 1.4)  # with the contrast as it is and four flips: sixteen
PRECISION = 0.5
_ORDER_COLUMNS = ("Pearson", "Spearman", "regret")
progress = LineProgress()


@dataclass(frozen=True, slots=True)
class Measured:
    """One structure of one served mask, or the worst one of it.

    Attributes:
        scan, patient, subset, structure: what it is.
        truth: the true metrics.
        shown: the stored estimates, as the product shows them.
        interval: the stored 90% interval of the Dice, whether it applies or not.
        witnesses: what each witness says of the Dice, the higher the better; of `ORDERS` only the order counts.
        unlike: whether the scan is marked as unlike the training's, so that the interval does not apply; None of
            results from before there were marks.
    """

    scan: str
    patient: str
    subset: str
    structure: str
    truth: Metrics
    shown: Metrics
    interval: tuple[float, float] | None
    witnesses: dict[str, float | None]
    unlike: bool | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """How much of the error volume a map finds, over the masks of a subset: tissue missed, and tissue included wrongly.

    Attributes:
        map, subset, structure: what it is; the map of `STRANGERS` is of other masks than the served ones.
        missed_share: missed tissue as a share of all errors.
        missed, included: recall at the lowest threshold with a precision of `PRECISION`, of each by itself.
        missed_half, included_half: recall at an error probability of one half.
    """

    map: str
    subset: str
    structure: str
    missed_share: float | None
    missed: float | None
    missed_half: float | None
    included: float | None
    included_half: float | None


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured on one pool of one set with networks of one seed.

    ``card`` is what the networks' own report card says of each structure; empty in results from before it was kept.
    """

    date: str
    machine: str
    label: str
    set: str
    seed: int
    pool: Pool
    seconds: dict[str, float]
    masks: tuple[Measured, ...]
    found: tuple[Found, ...]
    card: tuple[StructureReport, ...] = ()


RESULT: TypeAdapter[Result] = TypeAdapter(Result)


# --- the product ------------------------------------------------------------------------------------------------------


def serve(fixed: HarderSet, seed: int, pool: Pool, data: Path, folder: Path) -> Dataset:
    """Make the dataset folder, train both networks and score the pool, as far as it is not done yet."""
    harder_sets.build(fixed, seed, pool, data, folder)
    dataset = Dataset(folder)
    for network in NETWORKS:
        bundle = dataset.bundle()
        if bundle is None or not bundle.holds(network):
            with timed(f"train {network}", folder.parent):
                trained = train(dataset, network, progress)
            if trained.left_out:
                raise SystemExit(f"{folder}: not all labelled scans were used: {dict(trained.left_out)}")
    with timed(f"score {pool}", folder.parent):
        summary = score(dataset, "segqc", progress)
    if summary.failed:
        raise SystemExit(f"{folder}: not all scans were scored: {summary.failed}")
    return dataset


@contextlib.contextmanager
def timed(part: str, work: Path) -> Iterator[None]:
    """Keep the seconds of a part's first complete run, passed and of the processor: a later one finds its results."""
    started, used = time.monotonic(), time.process_time()
    yield
    path = work / "seconds.json"
    times = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    times.setdefault(part, round(time.monotonic() - started))
    times.setdefault(f"{part} (CPU)", round(time.process_time() - used))
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(times), encoding="utf-8")


def fold_networks(dataset: Dataset) -> list[list[Segmenter]]:
    """The networks of the folds, as the training of SegQC-Net left them, each followed by itself at early epochs."""
    cases, structures, splits = dataset.cases(), dataset.structures, dict(dataset.patient_splits())
    settings, folder = dataset.settings.training_settings("segqc"), dataset.training_folder("segqc")
    plan = plan_for(cases, settings, in_channels=1, out_channels=1 + len(label_values(structures)))
    folds = folds_of_cases(cases, splits)
    return [train_fold(k, cases, structures, splits, plan, settings, folder, progress) for k in folds]


# --- measuring --------------------------------------------------------------------------------------------------------


class Sizes:
    """How unusual a mask's size is among the training's structures, by the logarithm of the volume."""

    def __init__(self, dataset: Dataset) -> None:
        self.structures = dataset.structures
        logs = []
        for case in dataset.cases():
            scan, truth = read_case(case, label_values(self.structures))
            logs.append([self._log_volume(s.mask(truth.array), scan) for s in self.structures])
        self.mean, self.deviation = np.mean(logs, axis=0), np.maximum(np.std(logs, axis=0), 1e-3)

    def __call__(self, scan: Volume, labels: Volume) -> list[float]:
        """Minus the distance from the training's mean in standard deviations, of each structure."""
        logs = [self._log_volume(s.mask(labels.array), scan) for s in self.structures]
        return [-float(z) for z in np.abs((logs - self.mean) / self.deviation)]

    @staticmethod
    def _log_volume(mask: BoolArray, scan: Volume) -> float:
        return float(np.log(max(float(mask.sum()), 0.5) * scan.voxel_volume_mm3))


def measure(fixed: HarderSet, seed: int, pool: Pool, dataset: Dataset, label: str) -> Result:
    """Compare what the product stored, and what other witnesses say, with the truth."""
    bundle = dataset.bundle()
    if bundle is None:
        raise SystemExit(f"{dataset.folder}: no networks")
    segmenter, assessor, structures = bundle.segmenter(), bundle.assessor(), dataset.structures
    report = bundle.manifest.report
    of_folds, sizes = fold_networks(dataset), Sizes(dataset)
    folds, strangers = [networks[0] for networks in of_folds], [n for networks in of_folds for n in networks]
    maps = {MAP: MapEstimator([assessor]), AS_TRAINED: MapEstimator([with_maps(assessor, ())])}
    witnesses: dict[str, Estimator] = {
        SOFT: SoftOutput(structures),
        TTA: Tta(structures, TTA_GAMMAS),
        FOLD_MASKS: EnsemblePairs(folds),
        FOLD_MEAN: CrossFittedMean(folds),
    }
    entropy = SoftmaxEntropy(structures)
    rows: list[Measured] = []
    counts: dict[tuple[str, str, str], SignedCounts] = defaultdict(SignedCounts)
    scans = fixed.pool(seed, pool)
    rng = np.random.default_rng((24, seed))
    for number, waiting in enumerate(scans):
        progress.step(number, len(scans), "witnesses", waiting.id)
        scan, labels, truth = _read(dataset, waiting.id, assessor)
        mask = AssessedMask(scan, labels, segmenter)
        estimates = {name: e.estimate(mask) for name, e in {**maps, **witnesses}.items()}
        unsure, unusual = entropy.estimate(mask), sizes(scan, labels)
        stored = dataset.assessment(waiting.id)
        if stored is None:
            raise SystemExit(f"{dataset.folder}: {waiting.id} has no estimate")
        of_mask = []
        for k, (structure, quality) in enumerate(zip(structures, stored.structures, strict=True)):
            said = {name: estimate[k].metrics.dice for name, estimate in estimates.items()}
            score_of_entropy = unsure[k].scan_error_score
            said[ENTROPY] = None if score_of_entropy is None else -score_of_entropy
            said[SIZE] = unusual[k]
            said[UNLIKENESS] = None if stored.unlikeness is None else -stored.unlikeness.score
            held, real = structure.mask(labels.array), structure.mask(truth.array)
            bounds = quality.intervals.dice
            of_mask.append(
                Measured(
                    waiting.id,
                    waiting.patient,
                    waiting.subset,
                    structure.name,
                    true_metrics(held, real),
                    quality.estimated,
                    None if bounds is None else (bounds.low, bounds.high),
                    said,
                    None if stored.unlikeness is None else stored.is_unlike,
                )
            )
            for name in maps:
                error = estimates[name][k].error
                if error is not None:
                    for subset in (ALL, waiting.subset):
                        counts[name, subset, structure.name] += count_voxels(error, difference(held, real), held)
        for network in (strangers[int(i)] for i in rng.permutation(len(strangers))[:STRANGE]):
            drawn = network.predict(scan).labels
            for structure, estimate in zip(
                structures, maps[MAP].estimate(AssessedMask(scan, drawn, network)), strict=True
            ):
                held, real = structure.mask(drawn.array), structure.mask(truth.array)
                if estimate.error is not None:
                    for subset in (ALL, waiting.subset):
                        counts[STRANGERS, subset, structure.name] += count_voxels(
                            estimate.error, difference(held, real), held
                        )
        rows += of_mask if len(of_mask) == 1 else [*of_mask, _worst(of_mask, stored.dice)]
    times = json.loads((dataset.folder.parent / "seconds.json").read_text(encoding="utf-8"))
    return Result(
        date=datetime.date.today().isoformat(),
        machine=f"{platform.machine()}, {platform.system()}, {name_of_device()}",
        label=label,
        set=fixed.name,
        seed=seed,
        pool=pool,
        seconds=times,
        masks=tuple(rows),
        found=tuple(_found(*key, of) for key, of in counts.items()),
        card=() if report is None else (report.worst, *report.structures),
    )


def _read(dataset: Dataset, name: str, assessor: Assessor) -> tuple[Volume, Volume, Volume]:
    """A scan of the pool, its served mask and its truth."""
    scan, mask = dataset.read_scan(dataset.scan(name)), dataset.mask(name)
    if mask is None:
        raise SystemExit(f"{dataset.folder}: {name} has no mask")
    labels = read_labels(dataset.store.label_file(mask), scan=scan, values=assessor.values)
    truth = read_labels(dataset.folder / "truth" / f"{name}.nii.gz", scan=scan, values=assessor.values)
    return scan, labels, truth


def _worst(structures: Sequence[Measured], shown: float) -> Measured:
    """A scan as the product ranks it: by its worst structure, as each witness sees it."""

    def lowest(values: Sequence[float | None]) -> float | None:
        return min((v for v in values if v is not None), default=None)

    unknown = Metrics(None, None, None, None)
    witnesses = {name: lowest([s.witnesses[name] for s in structures]) for name in structures[0].witnesses}
    truth = replace(unknown, dice=lowest([s.truth.dice for s in structures]))
    first = structures[0]
    return replace(
        first, structure=WORST, truth=truth, shown=replace(unknown, dice=shown), interval=None, witnesses=witnesses
    )


def _found(name: str, subset: str, structure: str, counts: SignedCounts) -> Found:
    missed, included = counts.false_negative, counts.false_positive
    wrong = sum(missed.wrong) + sum(included.wrong)
    return Found(
        map=name,
        subset=subset,
        structure=structure,
        missed_share=sum(missed.wrong) / wrong if wrong else None,
        missed=missed.recall_at_precision(PRECISION),
        missed_half=missed.recall(),
        included=included.recall_at_precision(PRECISION),
        included_half=included.recall(),
    )


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Numbers:
    """One row of the tables, of one subset and structure; None is undefined."""

    n: float | None
    true_dice: float | None
    map_mae: float | None
    mae: float | None
    constant: float | None
    bias: float | None
    pearson: float | None
    spearman: float | None
    regret: float | None
    rvd: float | None
    rvd_constant: float | None
    size: float | None
    size_constant: float | None
    arvd: float | None
    arvd_constant: float | None
    covered: float | None  # of scans that are not marked
    width: float | None
    marked: float | None
    marked_failed: float | None
    missed_share: float | None
    missed: float | None
    missed_half: float | None
    included: float | None
    included_half: float | None
    strange_missed: float | None  # not in results from before strange masks were judged, too
    strange_included: float | None


def chosen(result: Result, structure: str, subset: str) -> list[Measured]:
    """The masks of a subset, or of all."""
    return [m for m in result.masks if m.structure == structure and subset in (ALL, m.subset)]


def numbers(result: Result, structure: str, subset: str) -> Numbers:
    """Summarise a subset of a result's masks."""
    masks = chosen(result, structure, subset)
    of_maps = {f.map: f for f in result.found if (f.subset, f.structure) == (subset, structure)}
    found, strange = of_maps.get(MAP), of_maps.get(STRANGERS)
    shown = witness_scores(masks, SHOWN)
    rvd, arvd = _of_metric(masks, "rvd"), _of_metric(masks, "arvd")
    size = _of_metric(masks, "rvd", lambda value: abs(value))
    inside = [
        (m.interval[0] <= m.truth.dice <= m.interval[1], m.interval[1] - m.interval[0], m.unlike)
        for m in masks
        if m.interval is not None and m.truth.dice is not None
    ]
    applying = [(hit, width) for hit, width, unlike in inside if not unlike]
    failed = [not hit for hit, _, unlike in inside if unlike]
    marks = [m.unlike for m in masks if m.unlike is not None]
    return Numbers(
        n=shown.n,
        true_dice=shown.truth_mean,
        map_mae=witness_scores(masks, MAP).mae,
        mae=shown.mae,
        constant=shown.median_mae,
        bias=shown.bias,
        pearson=shown.pearson,
        spearman=shown.spearman,
        regret=regret(masks, SHOWN),
        rvd=rvd.mae,
        rvd_constant=rvd.median_mae,
        size=size.mae,
        size_constant=size.median_mae,
        arvd=arvd.mae,
        arvd_constant=arvd.median_mae,
        covered=fmean(hit for hit, _ in applying) if applying else None,
        width=fmean(width for _, width in applying) if applying else None,
        marked=fmean(marks) if marks else None,
        marked_failed=fmean(failed) if failed else None,
        missed_share=found.missed_share if found else None,
        missed=found.missed if found else None,
        missed_half=found.missed_half if found else None,
        included=found.included if found else None,
        included_half=found.included_half if found else None,
        strange_missed=strange.missed if strange else None,
        strange_included=strange.included if strange else None,
    )


def said(mask: Measured, witness: str) -> float | None:
    """A witness's estimate of a mask's Dice."""
    return mask.shown.dice if witness == SHOWN else mask.witnesses[witness]


def witness_scores(masks: Sequence[Measured], witness: str) -> Scores:
    """How good a witness's estimates of the Dice are."""
    return scores([said(m, witness) for m in masks], [m.truth.dice for m in masks], [m.patient for m in masks])


def regret(masks: Sequence[Measured], witness: str) -> float | None:
    """What an order of correction loses of the best order's gain over a random one: 0 the best, 1 as random.

    An undefined estimate comes first, as in the product.
    """
    known = [(m.truth.dice, said(m, witness)) for m in masks if m.truth.dice is not None]
    if not known:
        return None
    units = curves.scans([dice for dice, _ in known])
    worst_first = [np.inf if value is None else -value for _, value in known]
    generator = np.random.default_rng(0)
    order = curves.by_scores(units, worst_first, generator=generator)
    captured = curves.captured(order, curves.optimal(units), curves.at_random(units, generator=generator))
    return None if captured is None else 1 - captured


def _of_metric(masks: Sequence[Measured], metric: MetricName, of: Callable[[float], float] = float) -> Scores:
    def values(metrics: Sequence[Metrics]) -> list[float | None]:
        found = [getattr(m, metric) for m in metrics]
        return [None if v is None else of(v) for v in found]

    patients = [m.patient for m in masks]
    return scores(values([m.shown for m in masks]), values([m.truth for m in masks]), patients, metric=metric)


def mean(rows: Sequence[Numbers]) -> Numbers:
    """The mean over seeds of each number, where all seeds have it."""
    columns = {f.name: _mean([getattr(row, f.name) for row in rows]) for f in fields(Numbers)}
    return Numbers(**columns)


def tables(results: Sequence[Result]) -> list[Table]:
    """The tables of the results of one label, set and pool, of one seed or several."""
    first = results[0]
    structures = list(dict.fromkeys(m.structure for m in first.masks))
    subsets = [ALL, *dict.fromkeys(m.subset for m in first.masks)]
    subsets = subsets if len(subsets) > 2 else [ALL]
    seeds = f"seed{'s' * (len(results) > 1)} {', '.join(str(r.seed) for r in results)}"
    title = f"{first.set}, {first.pool} pool, {first.label}, {seeds}"
    rows = {(s, subset): mean([numbers(r, s, subset) for r in results]) for s in structures for subset in subsets}
    dice = Table(
        "dice",
        f"Estimated Dice: {title}",
        (
            "structure",
            "scans",
            "n",
            "true Dice",
            "MAE, map",
            "MAE",
            "constant",
            "bias",
            "Pearson",
            "Spearman",
            "regret",
        ),
        tuple(
            (
                *key,
                r.n and round(r.n),
                r.true_dice,
                r.map_mae,
                r.mae,
                r.constant,
                r.bias,
                r.pearson,
                r.spearman,
                r.regret,
            )
            for key, r in rows.items()
        ),
        digits=dict.fromkeys(("true Dice", *_ORDER_COLUMNS), 2) | {"n": 0},
    )
    others = Table(
        "others",
        f"Volumes, intervals, errors found: {title}",
        (
            *("structure", "scans", "RVD", "its constant", "|RVD|", "its constant ", "ARVD", "its constant  "),
            *("90% hold", "width", "marked", "of these fail"),
            *("errors missed", "found", "at 1/2", "included: found", "at 1/2 "),
            *("strange masks: missed found", "included found"),
        ),
        tuple(
            (
                *(*key, r.rvd, r.rvd_constant, r.size, r.size_constant, r.arvd, r.arvd_constant, r.covered, r.width),
                *(r.marked, r.marked_failed, r.missed_share, r.missed, r.missed_half, r.included, r.included_half),
                *(r.strange_missed, r.strange_included),
            )
            for key, r in rows.items()
            if key[0] != WORST
        ),
        digits=2,
    )
    return [
        dice,
        others,
        *_card_tables(results, subsets, title),
        *(_witness_table(results, structure, subsets, title) for structure in structures),
    ]


def _card_tables(results: Sequence[Result], subsets: Sequence[str], title: str) -> list[Table]:
    """What the networks' own report cards say, beside the pool, by seed; the intervals are the cards'."""
    rows: list[tuple[str | float | None, ...]] = []
    for result in results:
        for report in result.card:
            if report.figures is not None:
                ratio, order = report.figures.ratio, report.figures.spearman
                said = (ratio.value, ratio.low, ratio.high, order.value, order.low, order.high)
                rows.append((result.seed, report.structure, "card", report.patients, report.figures.true_dice, *said))
            for subset in subsets:
                of = numbers(result, report.structure, subset)
                share = of.mae / of.constant if of.mae is not None and of.constant else None
                shown = (share, None, None, of.spearman, None, None)
                rows.append((result.seed, report.structure, subset, of.n, of.true_dice, *shown))
    if not rows:
        return []
    columns = ("seed", "structure", "scans", "n", "true Dice", "MAE/constant", "from", "to", "Spearman", "from ", "to ")
    digits = dict.fromkeys(columns[4:], 2) | {"seed": 0, "n": 0}
    return [Table("card", f"Report card: {title}", columns, tuple(rows), digits=digits, group="seed")]


def _witness_table(results: Sequence[Result], structure: str, subsets: Sequence[str], title: str) -> Table:
    rows: list[tuple[str | float | None, ...]] = []
    for subset in subsets:
        of_seeds = [chosen(r, structure, subset) for r in results]
        for witness in (SHOWN, *results[0].masks[0].witnesses):
            found = [witness_scores(masks, witness) for masks in of_seeds]
            errors = [_mean([s.mae for s in found]), _mean([s.bias for s in found])]
            rows.append(
                (
                    subset,
                    witness,
                    *([None, None] if witness in ORDERS else errors),
                    _mean([s.pearson for s in found]),
                    _mean([s.spearman for s in found]),
                    _mean([regret(masks, witness) for masks in of_seeds]),
                )
            )
        constant = _mean([numbers(r, structure, subset).constant for r in results])
        rows.append((subset, "best constant", constant, *(None,) * 4))
    return Table(
        "witnesses",
        f"Witnesses of {structure}: {title}",
        ("scans", "witness", "MAE", "bias", *_ORDER_COLUMNS),
        tuple(rows),
        digits=dict.fromkeys(_ORDER_COLUMNS, 2),
        best={"MAE": "lowest", "Spearman": "highest"},
        group="scans",
    )


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else fmean(v for v in values if v is not None)


def show(table: Table, console: Console) -> None:
    """Print a table to the terminal."""
    printed = RichTable(title=table.title)
    for column, name in enumerate(table.columns):
        printed.add_column(name.strip(), justify="right" if table.is_numeric(column) else "left")
    for row in range(len(table.rows)):
        printed.add_row(*(table.shown(row, column) for column in range(len(table.columns))))
    console.print(printed)


# --- the command ------------------------------------------------------------------------------------------------------


def result_path(label: str, name: str, seed: int, pool: Pool) -> Path:
    """Where a result is kept."""
    return RESULTS / f"served-{label}-{name}-{seed}-{pool}.json"


def kept(label: str, pool: Pool) -> Mapping[str, list[Result]]:
    """The results of a label, by set."""
    found: dict[str, list[Result]] = {}
    for name in harder_sets.DRAWN:
        paths = [p for seed in harder_sets.SEEDS if (p := result_path(label, name, seed, pool)).is_file()]
        if paths:
            found[name] = [RESULT.validate_json(path.read_bytes()) for path in paths]
    return found


def run(name: str, seed: int, pool: Pool, label: str, data: Path, work: Path) -> None:
    """Measure one set with one seed, and keep the result."""
    path = result_path(label, name, seed, pool)
    if pool == "test" and path.is_file():
        raise SystemExit(f"{path}: the test pool has been measured for this label; what is new needs a new label")
    fixed = harder_sets.load(name)
    dataset = serve(fixed, seed, pool, data, work / label / name / f"seed-{seed}" / "dataset")
    result = measure(fixed, seed, pool, dataset, label)
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(RESULT.dump_json(_rounded(result)) + b"\n")


def _rounded(result: Result) -> Result:
    """The result with what a reader can use of its digits: a third of the bytes."""
    digits = json.loads(RESULT.dump_json(result), parse_float=lambda text: round(float(text), 5))
    return RESULT.validate_python(digits)


def main() -> None:
    """Run a measurement, or print the tables of those that are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train, score, measure")
    running.add_argument("set", choices=harder_sets.DRAWN)
    running.add_argument("--seed", type=int, choices=harder_sets.SEEDS, default=0)
    running.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    running.add_argument("--work", type=Path, required=True, help="for dataset folders and trainings")
    printing = commands.add_parser("table", help="print the tables of a label")
    printing.add_argument("--markdown", action="store_true")
    for command in (running, printing):
        command.add_argument("--pool", choices=get_args(Pool), default="development")
        command.add_argument("--label", required=True, help="what of the product is measured, in results' names")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("ignite").setLevel(logging.WARNING)
    if arguments.command == "run":
        run(arguments.set, arguments.seed, arguments.pool, arguments.label, arguments.data, arguments.work)
    console = Console()
    if not console.is_terminal:
        console.width = 220  # a pipe has no width: nothing is to be cut off
    for results in kept(arguments.label, arguments.pool).values():
        for table in tables(results):
            if arguments.command == "table" and arguments.markdown:
                print(to_markdown(table))
            else:
                show(table, console)


if __name__ == "__main__":
    main()
