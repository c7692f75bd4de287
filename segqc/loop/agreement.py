"""How well the order of a dataset folder's scans agrees with their true quality."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from segqc.loop.dataset import Dataset
from segqc.quality.metrics import true_metrics
from segqc.quality.ranking import order_scans
from segqc.quality.report_card import AT_RANDOM, BY_ESTIMATE
from segqc.selection import Strategy
from segqc.selection.preview import preview
from segqc.store import bundles, scans
from segqc.types import LabelArray, PredictionInterval, Structure, Unlikeness, segment_names
from segqc.volumes import LABEL_SUFFIXES, as_spelled, read_labels, read_scan

MIN_FOR_CORRELATION = 3


@dataclass(frozen=True, slots=True)
class RankedScan:
    """One scan of the order: its score, the slices to look at first and, where the truth is known, the true Dice.

    ``score`` is an estimated Dice where the method's `Score.is_dice` says so. Both Dice
    numbers are the worst structure's; ``true_by_structure`` has all of them. ``interval`` is that of SegQC's estimate,
    ``unlikeness`` what its assessment says of the scan.
    """

    rank: int
    id: str
    score: float
    worst_slices: tuple[int, ...]
    true_dice: float | None
    true_by_structure: Mapping[str, float | None]
    interval: PredictionInterval | None = None
    unlikeness: Unlikeness | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """The scored scans of a folder in an order, the first to correct first.

    ``by`` is the strategy whose order it is: where the estimates' order is known to be noise, another one's.
    ``waiting`` is how many scans wait for a person's label, and ``unscored`` how many of these have no score yet.
    """

    by: str
    scans: tuple[RankedScan, ...]
    waiting: int
    unscored: int


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A scan that a strategy would hand out.

    Attributes:
        id: the scan's name.
        by: the strategy whose order chose it; another one than was asked for where that had nothing to go by.
        score: that it was chosen by; None where it was drawn, or compared with others.
        dice: its estimated Dice, if it has one.
        worst_slices: the slices to look at first.
    """

    id: str
    by: str
    score: float | None
    dice: float | None
    worst_slices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Estimates against truths: Spearman, Pearson and mean absolute error (MAE).

    ``constant`` is the median of the true values and ``constant_mae`` the error of always answering it: the least
    error that a constant can make, knowing the truths. An estimate is of use where it is below. Correlations are
    ``None`` where one side does not vary or there are fewer than three scans.
    """

    scans: int
    spearman: float | None
    pearson: float | None
    mae: float
    constant: float
    constant_mae: float
    true_range: tuple[float, float]


def dice_by_structure(mask: LabelArray, truth: LabelArray, structures: Sequence[Structure]) -> dict[str, float | None]:
    """The true 3D Dice of each structure of a label map; 1 where both maps lack it.

    Args:
        mask: the label map, (n0, n1, n2).
        truth: the true label map, of the same shape.
        structures: names and values of the structures.
    """
    return {s.name: true_metrics(s.mask(mask), s.mask(truth)).dice for s in structures}


def worst_dice(dice: Mapping[str, float | None]) -> float:
    """The worst structure's Dice: what a scan is ranked by; 1 where no structure has one."""
    return min((value for value in dice.values() if value is not None), default=1.0)


def find_labels(folder: Path, scan: str) -> Path | None:
    """The label file of a scan in a folder of label files, if there is one."""
    candidates = (as_spelled(folder / f"{scan}{suffix}") for suffix in LABEL_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def rank(dataset: Dataset, method: str = "segqc", *, truth: Path | None = None, include_final: bool = False) -> Ranking:
    """Order the scored scans of a dataset folder, worst first.

    Where the report card of the bundle that serves says that the estimates' order is not better than chance, scans are
    in the order of a witness that is, or most unlike the training's first, or at random: the same order each time.

    Args:
        dataset: the folder.
        method: the strategy whose scores to order by.
        truth: a folder of true label files named as the scans; the network's mask of each scan that is found there
            is compared with it.
        include_final: also list scans that already have a final label.

    Raises:
        VolumeError: if a mask or a truth can't be read, or does not lie on its scan's grid.
    """
    entries = {e.id: e for e in dataset.scans() if include_final or e.final is None}
    assessments = {name: a for name, a in dataset.assessments().items() if name in entries}
    known = {n: a.dice for n, a in assessments.items()} if method == "segqc" else dataset.scores(method)
    scores = {name: value for name, value in known.items() if name in entries}
    names = segment_names(dataset.structures) if truth is not None else None
    by, order = _order(dataset, scores) if method == "segqc" else (method, order_scans(scores))
    ranked = []
    for place, name in enumerate(order, start=1):
        by_structure: dict[str, float | None] = {}
        mask, true_path = entries[name].original, find_labels(truth, name) if truth is not None else None
        if mask is not None and true_path is not None:
            scan = read_scan(dataset.image_file(entries[name]))
            labels, true = read_labels(mask, scan=scan), read_labels(true_path, scan=scan, names=names)
            by_structure = dice_by_structure(labels.array, true.array, dataset.structures)
        ranked.append(
            RankedScan(
                place,
                name,
                scores[name],
                assessments[name].worst_slices() if name in assessments else (),
                worst_dice(by_structure) if by_structure else None,
                by_structure,
                assessments[name].dice_interval if method == "segqc" else None,
                assessments[name].unlikeness if method == "segqc" else None,
            )
        )
    waiting = {entry.id for entry in dataset.waiting()}
    return Ranking(by, tuple(ranked), len(waiting), len(waiting - scores.keys()))


def suggestions(dataset: Dataset, strategy: Strategy, count: int) -> tuple[Suggestion, ...]:
    """The first scans that a strategy would hand out from now on: see `segqc.selection.preview`.

    Args:
        dataset: the folder.
        strategy: the strategy.
        count: of scans.
    """
    assessments = dataset.assessments()
    with dataset.store.read() as transaction:
        rng = np.random.default_rng(dataset.settings.annotation.seed)
        choices = preview(transaction, strategy, rng, count)
        names = scans.names_of(transaction, [choice.scan_id for choice in choices])
    found = []
    for choice in choices:
        assessment = assessments.get(name := names[choice.scan_id])
        dice, slices = (None, ()) if assessment is None else (assessment.dice, assessment.worst_slices())
        found.append(Suggestion(name, choice.order or strategy.name, choice.score, dice, slices))
    return tuple(found)


def _order(dataset: Dataset, estimates: Mapping[str, float]) -> tuple[str, list[str]]:
    """Scans in the order that the strategy "segqc" has for them, and the name of the strategy whose order it is."""
    with dataset.store.read() as transaction:
        ranked_by, bundle = bundles.ranked_by(transaction), bundles.serving_number(transaction)
    if ranked_by is None:
        return BY_ESTIMATE, order_scans(estimates)
    seed = dataset.settings.annotation.seed
    # a number of each scan's own: the others keep their order when one is labelled
    at_random = sorted(estimates, key=lambda name: hashlib.sha256(f"{seed} {bundle} {name}".encode()).digest())
    witness = {name: score for name, score in dataset.scores(ranked_by).items() if name in estimates}
    if ranked_by == AT_RANDOM or not witness:
        return AT_RANDOM, at_random
    return ranked_by, [*order_scans(witness), *(name for name in at_random if name not in witness)]


def agreement(estimated: Sequence[float], true: Sequence[float]) -> Agreement:
    """Compare estimates with true values, in the same order.

    Raises:
        ValueError: if there are none, or not as many of both.
    """
    x, y = np.asarray(estimated, np.float64), np.asarray(true, np.float64)
    if x.shape != y.shape or x.size == 0:
        raise ValueError(f"an agreement needs as many estimates as true values, got {x.size} and {y.size}")
    varies = x.size >= MIN_FOR_CORRELATION and np.ptp(x) > 0 and np.ptp(y) > 0
    constant = float(np.median(y))
    return Agreement(
        scans=int(x.size),
        spearman=float(stats.spearmanr(x, y).statistic) if varies else None,
        pearson=float(stats.pearsonr(x, y).statistic) if varies else None,
        mae=float(np.abs(x - y).mean()),
        constant=constant,
        constant_mae=float(np.abs(y - constant).mean()),
        true_range=(float(y.min()), float(y.max())),
    )
