"""The methods that are compared: their trainings, and the estimators that come of them.

A learnt method has one network per fold, trained without the fold's patients and without any choice by them (the last
epoch's weights are taken). The fold's networks judge the fold's own masks, which calibrate the method; all folds'
networks together judge the test masks. So every learnt method has the same cases, and as many networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from segqc.assessor import Assessor
from segqc.baselines.autoencoder import train_autoencoder
from segqc.baselines.ensembles import EnsemblePairs
from segqc.baselines.estimates import EMPTY_UNDER_MM3, Estimator
from segqc.baselines.map_and_score import train_map_and_score
from segqc.baselines.maps import CrossFittedMean, MapEstimator, ScanOnly, SoftOutput
from segqc.baselines.regression import train_regression
from segqc.baselines.simple import fit_constant, fit_size_regression, judged_masks
from segqc.baselines.soft_input import MadeMasks, train_soft_input
from segqc.baselines.together import MeanOfEstimators
from segqc.baselines.tta import SoftmaxEntropy, Tta, TtaEntropy
from segqc.evaluation.makers import fold_makers, training_masks
from segqc.evaluation.run import Run
from segqc.training import LineProgress, Placement
from segqc.training.assessor import fit_assessor
from segqc.training.pairs import MaskSet, makers_of_masks, masks_of
from segqc.training.segmentation import plan_for
from segqc.training.settings import TrainingSettings

Change: TypeAlias = Callable[[TrainingSettings], TrainingSettings]

SEGQC, TTA, SCAN_ONLY, CROSS_FITTED = "SegQC", "TTA", "scan only", "cross-fitted mean"


@dataclass(frozen=True, slots=True)
class Assessing:
    """A SegQC-Net, or one of its variants: how its training differs from the recipe.

    Attributes:
        change: of the settings.
        single: whether it learns from one segmentation network's masks only (the paper's SegQC-TR), not from those of
            early epochs as well.
        augmented: whether that network's test-time augmentations give masks, too (the paper's table 5).
        in_sample: whether its masks come from networks that have seen the scans: the leak, to show what it does.
        scan_only: whether it never sees a mask.
    """

    change: Change = lambda settings: settings
    single: bool = False
    augmented: bool = True
    in_sample: bool = False
    scan_only: bool = False


def _paper(settings: TrainingSettings) -> TrainingSettings:
    return settings.paper_recipe()


def _never_a_mask(settings: TrainingSettings) -> TrainingSettings:
    return replace(settings, scan_only_share=1.0)


ASSESSING: Mapping[str, Assessing] = {
    SEGQC: Assessing(),
    SCAN_ONLY: Assessing(_never_a_mask, scan_only=True),
    "paper's SegQC": Assessing(_paper),
    "SegQC-TR": Assessing(single=True),
}
ABLATIONS: Mapping[str, Assessing] = {
    "median masks only": Assessing(single=True, augmented=False),
    "in-sample masks": Assessing(in_sample=True),
    "direct output": Assessing(lambda s: replace(s, output_form="direct", scan_only_share=0.0, empty_mask_share=0.0)),
    "Dice loss": Assessing(lambda s: replace(s, loss="dice")),
    "no empty masks": Assessing(lambda s: replace(s, empty_mask_share=0.0)),
}
SOFT_INPUT = "soft input"
ONE_NETWORK, FLIPS_AVERAGED = f"{SEGQC}, one network", f"{SEGQC}, flips averaged"
TRAINED_VARIANTS = (*ABLATIONS, SOFT_INPUT)  # of one network each
VARIANTS = (ONE_NETWORK, FLIPS_AVERAGED, *TRAINED_VARIANTS)
LEARNT_SCORES: Mapping[str, Callable[..., Estimator]] = {
    "regression": train_regression,
    "map and score": train_map_and_score,
    "autoencoder": train_autoencoder,
}
UNTRAINED = (TTA, "TTA entropy", "softmax entropy", "soft output", CROSS_FITTED, "ensemble", "ensemble pairs", "size")
CONSTANT = "constant"


def trainings(run: Run, *, ablations: bool) -> list[str]:
    """The names of all trainings, ``<method>@<fold>``; the longest and the most important first."""
    methods = [*ASSESSING, *LEARNT_SCORES]
    full = [f"{method}@{fold}" for method in methods for fold in range(run.settings.folds)]
    # one fold of each variant is compared with the same fold of the recipe
    return full + ([f"{name}@0" for name in TRAINED_VARIANTS] if ablations else [])


def methods(*, ablations: bool = False) -> list[str]:
    """The names of all methods, in the order of tables."""
    names = [*ASSESSING, *UNTRAINED, *LEARNT_SCORES, CONSTANT]
    return [*names, *VARIANTS] if ablations else names


def calibrating_folds(run: Run, method: str) -> list[int]:
    """The folds whose masks calibrate a method; a variant has one network, and so one fold."""
    return [0] if method in TRAINED_VARIANTS else list(range(run.settings.folds))


def train(run: Run, name: str) -> None:
    """Do one training, or what is left of it."""
    method, _, fold = name.rpartition("@")
    if method in LEARNT_SCORES:
        _learnt_scores(run, method, int(fold))
    elif method == SOFT_INPUT:
        _soft_input(run, int(fold))
    else:
        _assessor(run, method, int(fold))


def judge_of(run: Run, method: str, folds: Sequence[int]) -> Estimator:
    """The method as made from the networks of some folds: one that has not seen a mask's patient, or all for a test."""
    s, structures = run.settings, run.cohort.structures
    if method in ASSESSING or method in ABLATIONS or method in (ONE_NETWORK, FLIPS_AVERAGED):
        base = SEGQC if method in (ONE_NETWORK, FLIPS_AVERAGED) else method
        folds = folds[:1] if method in ABLATIONS or method == ONE_NETWORK else folds
        assessors = [_assessor(run, base, fold) for fold in folds]
        if method == FLIPS_AVERAGED:
            assessors = [Assessor(replace(a.card, average_flips=True), a.network) for a in assessors]
        recipe = ASSESSING.get(base) or ABLATIONS[base]
        return ScanOnly(assessors, name=method) if recipe.scan_only else MapEstimator(assessors, name=method)
    if method == SOFT_INPUT:
        return _soft_input(run, folds[0])
    if method in LEARNT_SCORES:
        return MeanOfEstimators([_learnt_scores(run, method, fold) for fold in folds], name=method)
    if method in (CROSS_FITTED, "ensemble", "ensemble pairs"):
        # a fold's own masks: one network has not seen them
        segmenters = [fold_makers(run, fold)[0] for fold in folds]
        if method == CROSS_FITTED:
            return CrossFittedMean(segmenters, name=method)
        if method == "ensemble":
            return EnsemblePairs(segmenters, against="mask", name=method)
        pairs = segmenters if len(segmenters) > 1 else fold_makers(run, folds[0])[:2]
        return EnsemblePairs(pairs, against="members", name=method)
    if method in (CONSTANT, "size"):
        sets = [m for fold in range(s.folds) if len(folds) > 1 or fold not in folds for m in training_masks(run, fold)]
        fitted = fit_constant if method == CONSTANT else fit_size_regression
        return fitted(judged_masks(sets, structures), structures)
    simple: dict[str, Callable[[], Estimator]] = {
        TTA: lambda: Tta(structures, name=TTA),
        "TTA entropy": lambda: TtaEntropy(structures),
        "softmax entropy": lambda: SoftmaxEntropy(structures),
        "soft output": lambda: SoftOutput(structures),
    }
    return simple[method]()


def _assessor(run: Run, method: str, fold: int) -> Assessor:
    """Train a SegQC-Net without the patients of a fold, or read what was trained."""
    path = run.folder / "networks" / slug(method) / f"fold-{fold}.pt"
    if path.is_file():
        return Assessor.load(path)
    recipe, structures = ASSESSING.get(method) or ABLATIONS[method], run.cohort.structures
    settings = recipe.change(replace(run.settings.assessor, seed=10 * (run.settings.seed + 1) + fold))
    sets = _sets(run, recipe, fold)
    plan = plan_for([s.case for s in sets], settings, in_channels=1 + len(structures), out_channels=len(structures))
    assessor = fit_assessor(
        f"{method} {fold}", plan, sets, [], structures, settings, path.with_suffix(""), LineProgress()
    )
    assessor.save(path)
    return assessor


def _sets(run: Run, recipe: Assessing, fold: int) -> list[MaskSet]:
    """The masks that a fold's network learns from: those of the other folds' cases."""
    others = [k for k in range(run.settings.folds) if k != fold]
    if recipe.in_sample:
        # of each other fold's cases, by a network of the next fold: it has seen them
        return [_leaking(run, m, (k + 1) % run.settings.folds) for k in others for m in training_masks(run, k)]
    sets = [m for k in others for m in training_masks(run, k)]
    if not recipe.single:
        return sets
    count = makers_of_masks(1, run.settings.segmenter).count(0) if recipe.augmented else 1
    return [MaskSet(m.case, m.masks[:count], m.dice[:count]) for m in sets]


def _leaking(run: Run, masks: MaskSet, fold: int) -> MaskSet:
    path = run.folder / "training-masks" / "in-sample" / f"{masks.case.id}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            return MaskSet(masks.case, stored["masks"], tuple(float(d) for d in stored["dice"]))
    made = masks_of(fold_makers(run, fold), masks.case, run.settings.segmenter, allow_seen=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, masks=made.masks, dice=np.array(made.dice))
    return made


def _soft_input(run: Run, fold: int) -> Estimator:
    s, folder = run.settings, run.folder / "networks" / slug(SOFT_INPUT) / f"fold-{fold}"
    made = []
    for k in range(s.folds):
        if k != fold:
            makers = fold_makers(run, k)
            numbers = makers_of_masks(len(makers), s.segmenter)
            made += [MadeMasks(masks, tuple(makers), numbers) for masks in training_masks(run, k)]
    settings = replace(s.assessor, seed=10 * (s.seed + 1) + fold)
    return train_soft_input(made, run.cohort.structures, settings, EMPTY_UNDER_MM3, folder, LineProgress())


def _learnt_scores(run: Run, method: str, fold: int) -> Estimator:
    s, folder = run.settings, run.folder / "networks" / slug(method) / f"fold-{fold}"
    settings = replace(s.assessor, epochs=s.score_epochs, seed=10 * (s.seed + 1) + fold)
    sets = [m for k in range(s.folds) if k != fold for m in training_masks(run, k)]
    placed = {p: Placement(0, "train") for p in run.cohort.fold}
    return LEARNT_SCORES[method](sets, run.cohort.structures, placed, settings, folder, LineProgress())


def slug(method: str) -> str:
    """The method's name as a file name."""
    return "".join(c if c.isalnum() else "-" for c in method).lower()
