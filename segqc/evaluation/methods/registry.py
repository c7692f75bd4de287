"""The methods that are compared: their trainings, and the estimators that come of them.

A trained method has one network per fold, trained without the fold's patients and without any choice by them (the last
epoch's weights are taken). The fold's networks assess the fold's own masks, which calibrate the method; all folds'
networks together assess the test masks. So every trained method has the same cases, and as many networks.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from pydantic import TypeAdapter

from segqc.evaluation.data.mask_sources import calibration_masks, calibration_sources, fold_sources, training_masks
from segqc.evaluation.data.run import NETWORKS, Run
from segqc.evaluation.data.storage import ARRAYS, Arrays, Format, as_json
from segqc.evaluation.methods.autoencoder import train_autoencoder
from segqc.evaluation.methods.ensemble import MeanOfEstimators
from segqc.evaluation.methods.ensembles import EnsemblePairs
from segqc.evaluation.methods.estimates import EMPTY_UNDER_MM3, AssessedMask, Estimator, structure_masks
from segqc.evaluation.methods.map_and_score import train_map_and_score
from segqc.evaluation.methods.maps import CrossFittedMean, MapEstimator, ScanOnly, SoftOutput
from segqc.evaluation.methods.regression import train_regression
from segqc.evaluation.methods.simple import MeasuredMask, fit_constant, fit_size_regression, measured_masks
from segqc.evaluation.methods.soft_input import SoftInput, SourcedMasks, train_soft_input
from segqc.evaluation.methods.tta import SoftmaxEntropy, Tta
from segqc.networks.assessor import Assessor, truth_as_error
from segqc.networks.card import ModelCard
from segqc.networks.segmenter import Segmenter
from segqc.quality.calibration import MapCalibration
from segqc.split import PatientSplit
from segqc.text import slug
from segqc.training import LineProgress
from segqc.training.assessor_calibration import with_maps
from segqc.training.assessor_network import fit_assessor
from segqc.training.calibration import KnownMap, fit_map, known_map
from segqc.training.crossfit import MaskSet, masks_of, sources_of_masks
from segqc.training.segmentation import plan_for
from segqc.training.spec import TrainingSettings
from segqc.types import BoolArray, FloatArray, Structure

Change: TypeAlias = Callable[[TrainingSettings], TrainingSettings]

_MAPS: Format[tuple[MapCalibration, ...]] = as_json(TypeAdapter(tuple[MapCalibration, ...]))
_ASSESSOR: Format[Assessor] = Format(Assessor.load, Assessor.save)

SEGQC, TTA, SCAN_ONLY, CROSS_FITTED, CONSTANT = "SegQC", "TTA", "scan only", "cross-fitted mean", "constant"
EXTRACTED_MAP = "SegQC-EE"
ONE_NETWORK = "SegQC, one network"  # what variants of one network are compared with


@dataclass(frozen=True)
class Method(ABC):
    """A method of the comparison.

    Attributes:
        name: in tables.
        variant: whether it is one network, trained without the first fold, whose masks alone calibrate it: ablations
            that are trained anew, and those that they are compared with.
        of_one_source: whether it has trained from masks of trained networks only (the paper's SegQC-TR), and so is
            calibrated on such ones only.
    """

    name: str
    variant: bool = False
    of_one_source: bool = False

    @abstractmethod
    def estimator(self, run: Run, folds: Sequence[int]) -> Estimator:
        """The method as made from the networks of some folds: one that has not seen a mask's patient, or all."""


@dataclass(frozen=True)
class Trained(Method):
    """A method with networks of its own, one per fold."""

    @abstractmethod
    def train(self, run: Run, fold: int) -> None:
        """Train the network that has not seen a fold's patients, or what is left of it."""


@dataclass(frozen=True)
class SegQcNet(Trained):
    """A SegQC-Net, or one of its variants: how its training differs from the recipe.

    Attributes:
        change: of the settings.
        augmented: whether test-time augmentations give masks to learn from, too (the paper's table 5); for
            ``of_one_source``, without which early epochs do in any case.
        in_sample: whether its masks come from networks that have seen the scans: the leak, to show what it does.
        scan_only: whether it never sees a mask.
        maps_as_they_are: whether its maps are not calibrated (the paper's recipe has no such step).
    """

    change: Change = lambda settings: settings
    maps_as_they_are: bool = False
    augmented: bool = True
    in_sample: bool = False
    scan_only: bool = False

    def estimator(self, run: Run, folds: Sequence[int]) -> Estimator:
        """The map of the networks that have not seen these folds."""
        folds = folds[:1] if self.variant else folds
        if self.maps_as_they_are:
            assessors = [self.assessor(run, fold) for fold in folds]
        else:
            assessors = self.calibrated(run, folds)
        return (ScanOnly if self.scan_only else MapEstimator)(assessors, name=self.name)

    def train(self, run: Run, fold: int) -> None:
        """Train the fold's SegQC-Net."""
        self.assessor(run, fold)

    def assessor(self, run: Run, fold: int) -> Assessor:
        """Train the network without the patients of a fold, or read what was trained."""
        folder = run.folder / NETWORKS / slug(self.name) / f"fold-{fold}"
        return run.cached(folder.with_suffix(".pt"), _ASSESSOR, lambda: self._trained(run, fold, folder))

    def _trained(self, run: Run, fold: int, folder: Path) -> Assessor:
        structures = run.cohort.structures
        settings = self.change(replace(run.settings.assessor, seed=10 * (run.settings.seed + 1) + fold))
        sets = self._masks(run, fold)
        plan = plan_for([s.case for s in sets], settings, in_channels=1 + len(structures), out_channels=len(structures))
        return fit_assessor(f"{self.name} {fold}", plan, sets, [], structures, settings, folder, LineProgress())

    def calibrated(self, run: Run, folds: Sequence[int]) -> list[Assessor]:
        """The networks of some folds, their maps calibrated as `segqc.training.train_on_masks` does it."""
        return _calibrated(run, self, folds, functools.partial(self.assessor, run), blind=self.scan_only)

    def _masks(self, run: Run, fold: int) -> list[MaskSet]:
        """The masks that a fold's network learns from: those of the other folds' cases."""
        others = [k for k in range(run.settings.folds) if k != fold]
        if self.in_sample:
            # of each other fold's cases, by a network of the next fold: it has seen them
            return [_leaking(run, m, (k + 1) % run.settings.folds) for k in others for m in training_masks(run, k)]
        sets = [m for k in others for m in training_masks(run, k)]
        if not self.of_one_source:
            return sets
        count = sources_of_masks(1, run.settings.segmenter).count(0) if self.augmented else 1
        return [MaskSet(m.case, m.masks[:count], m.dice[:count]) for m in sets]


@dataclass(frozen=True)
class SameNetworks(Method):
    """The networks of SegQC, or of another method, asked in another way; as a variant, only the first of them.

    Attributes:
        of: the method whose networks they are.
        ask: what is another in their cards.
        blind: whether they never see the mask.
        calibrated: whether their maps are calibrated.
        extracted: whether estimates are read off the map after error extraction (the paper's SegQC-EE).
    """

    of: SegQcNet = field(default_factory=lambda: _RECIPE)
    ask: Callable[[ModelCard], ModelCard] = lambda card: card
    blind: bool = False
    calibrated: bool = True
    extracted: bool = False

    def estimator(self, run: Run, folds: Sequence[int]) -> Estimator:
        """The map of the networks."""
        folds = folds[:1] if self.variant else folds
        if self.extracted:
            return MapEstimator(self.of.calibrated(run, folds), name=self.name, extraction=run.settings.extraction)
        asked = functools.partial(self._asked, run)
        if self.calibrated:
            assessors = _calibrated(run, self, folds, asked, blind=self.blind)
        else:
            assessors = [asked(fold) for fold in folds]
        return (ScanOnly if self.blind else MapEstimator)(assessors, name=self.name)

    def _asked(self, run: Run, fold: int) -> Assessor:
        assessor = self.of.assessor(run, fold)
        return assessor.with_card(self.ask(assessor.card))


@dataclass(frozen=True)
class WithSoftInput(Trained):
    """SegQC-Net that sees the soft output of the network that made the mask as well."""

    def train(self, run: Run, fold: int) -> None:
        """Train the fold's network."""
        self._network(run, fold)

    def estimator(self, run: Run, folds: Sequence[int]) -> Estimator:
        """The network of the first of the folds, its maps calibrated."""
        network = self._network(run, folds[0])

        def logits(_fold: int) -> Callable[[AssessedMask], FloatArray]:
            return lambda mask: truth_as_error(
                network.truth_logits(mask, _source(mask)), structure_masks(mask.labels.array, network.structures)
            )

        path = f"networks/{slug(self.name)}/maps.json"
        return network.with_maps(run.cached(path, _MAPS, lambda: _fit_maps(run, self, logits)))

    def _network(self, run: Run, fold: int) -> SoftInput:
        s = run.settings
        made = []
        for k in range(s.folds):
            if k != fold:
                sources = fold_sources(run, k)
                numbers = sources_of_masks(len(sources), s.segmenter)
                made += [SourcedMasks(masks, tuple(sources), numbers) for masks in training_masks(run, k)]
        settings = replace(s.assessor, seed=10 * (s.seed + 1) + fold)
        folder = run.folder / NETWORKS / slug(self.name) / f"fold-{fold}"
        return train_soft_input(made, run.cohort.structures, settings, EMPTY_UNDER_MM3, folder, LineProgress())


@dataclass(frozen=True)
class LearnedScore(Trained):
    """A network, or a regressor, that answers with the metrics themselves.

    It learns as long as SegQC-Net, but no mask is emptied or deformed for it: that leaves SegQC-Net's target what it
    is, the truth, but would change the very numbers that are trained here.
    """

    fit: Callable[..., Estimator] = train_regression

    def train(self, run: Run, fold: int) -> None:
        """Train the fold's network."""
        self._of(run, fold)

    def estimator(self, run: Run, folds: Sequence[int]) -> Estimator:
        """The mean of the folds' answers."""
        return MeanOfEstimators([self._of(run, fold) for fold in folds], name=self.name)

    def _of(self, run: Run, fold: int) -> Estimator:
        s, folder = run.settings, run.folder / NETWORKS / slug(self.name) / f"fold-{fold}"
        seed = 10 * (s.seed + 1) + fold
        settings = replace(s.assessor, empty_mask_share=0.0, mask_deformation=0.0, hide_mask=False, seed=seed)
        sets = [m for k in range(s.folds) if k != fold for m in training_masks(run, k)]
        placed = {p: PatientSplit(0, "train") for p in run.cohort.fold}
        return self.fit(sets, run.cohort.structures, placed, settings, folder, LineProgress())


@dataclass(frozen=True)
class OfSegmenters(Method):
    """What the folds' segmentation networks say; a fold's own masks are assessed by the one that has not seen them.

    Attributes:
        make: the estimator of these networks, by its name and SegQC-Net's settings.
        least: how many networks it needs; of one fold, the network of its calibrating masks is the second one.
    """

    make: Callable[[Sequence[Segmenter], str, TrainingSettings], Estimator] = lambda segmenters, name, assessor: (
        CrossFittedMean(segmenters, average_flips=assessor.average_flips, name=name)
    )
    least: int = 1

    def estimator(self, run: Run, folds: Sequence[int]) -> Estimator:
        """What the folds' networks say together."""
        segmenters = [fold_sources(run, fold)[0] for fold in folds]
        if len(segmenters) < self.least:
            segmenters.append(calibration_sources(run, folds[0])[0])
        return self.make(segmenters, self.name, run.settings.assessor)


@dataclass(frozen=True)
class OfMasks(Method):
    """A method that knows the metrics of the training masks only."""

    fit: Callable[[Iterable[MeasuredMask], Sequence[Structure]], Estimator] = fit_constant

    def estimator(self, run: Run, folds: Sequence[int]) -> Estimator:
        """What the masks of the other folds teach; all masks for a test."""
        known = [k for k in range(run.settings.folds) if len(folds) > 1 or k not in folds]
        sets = [m for k in known for m in training_masks(run, k)]
        structures = run.cohort.structures
        return self.fit(measured_masks(sets, structures), structures)


@dataclass(frozen=True)
class OfSource(Method):
    """What the network that made the mask says of it."""

    make: Callable[[Sequence[Structure]], Estimator] = SoftOutput

    def estimator(self, run: Run, folds: Sequence[int]) -> Estimator:
        """The method itself: it has nothing of the folds."""
        return self.make(run.cohort.structures)


@dataclass(frozen=True)
class OfAugmentations(Method):
    """What the network that made the mask says of it under the augmentations that make training masks as well."""

    def estimator(self, run: Run, folds: Sequence[int]) -> Estimator:
        """The method itself: it has nothing of the folds."""
        return Tta(run.cohort.structures, run.settings.segmenter.gammas, name=self.name)


_RECIPE: SegQcNet = SegQcNet(SEGQC)
_TRANSFERRED = SegQcNet("SegQC-TR", of_one_source=True)
_METHODS: tuple[Method, ...] = (
    _RECIPE,
    SegQcNet(SCAN_ONLY, change=lambda s: replace(s, scan_only_share=1.0), scan_only=True),
    SameNetworks(EXTRACTED_MAP, extracted=True),
    SegQcNet("paper's SegQC", change=TrainingSettings.paper_recipe, maps_as_they_are=True),
    _TRANSFERRED,
    OfAugmentations(TTA),
    OfSource("softmax entropy", make=SoftmaxEntropy),
    OfSource("soft output", make=SoftOutput),
    OfSegmenters(CROSS_FITTED),
    OfSegmenters("ensemble", make=lambda networks, name, _: EnsemblePairs(networks, against="mask", name=name)),
    OfSegmenters(
        "ensemble pairs", make=lambda networks, name, _: EnsemblePairs(networks, against="members", name=name), least=2
    ),
    OfMasks("size", fit=fit_size_regression),
    LearnedScore("regression", fit=train_regression),
    LearnedScore("map and score", fit=train_map_and_score),
    LearnedScore("autoencoder", fit=train_autoencoder),
    OfMasks(CONSTANT, fit=fit_constant),
)
_VARIANTS: tuple[Method, ...] = (
    SameNetworks(ONE_NETWORK, variant=True),
    SameNetworks(f"{SEGQC}, no flips", ask=lambda card: replace(card, average_flips=False, hide_mask=False)),
    SameNetworks(f"{SEGQC}, mask always shown", ask=lambda card: replace(card, hide_mask=False)),
    SameNetworks(f"{SEGQC}, mask never shown", blind=True),
    SameNetworks(f"{SEGQC}, maps not calibrated", calibrated=False),
    SameNetworks("SegQC-TR, one network", variant=True, of=_TRANSFERRED, of_one_source=True),
    SegQcNet("median masks only", variant=True, of_one_source=True, augmented=False),
    SegQcNet("in-sample masks", variant=True, in_sample=True),
    SegQcNet(
        "direct output",
        variant=True,
        change=lambda s: replace(s, output_form="direct", scan_only_share=0.0, empty_mask_share=0.0, hide_mask=False),
    ),
    SegQcNet("Dice loss", variant=True, change=lambda s: replace(s, loss="dice")),
    SegQcNet("masks not deformed", variant=True, change=lambda s: replace(s, mask_deformation=0.0)),
    SegQcNet("no empty masks", variant=True, change=lambda s: replace(s, empty_mask_share=0.0, hide_mask=False)),
    WithSoftInput("soft input", variant=True),
)
_BY_NAME = {method.name: method for method in (*_METHODS, *_VARIANTS)}
VARIANTS = tuple(method.name for method in _VARIANTS)


@dataclass(frozen=True, slots=True)
class MethodTraining:
    """One training of a method: without the patients of a fold."""

    method: str
    fold: int

    def __str__(self) -> str:
        return f"{self.method}, fold {self.fold}"


def trainings(run: Run, *, ablations: bool) -> list[MethodTraining]:
    """All trainings; the longest and the most important first."""
    trained = [_BY_NAME[name] for name in methods(ablations=ablations)]
    return [
        MethodTraining(m.name, fold)
        for m in trained
        if isinstance(m, Trained)
        for fold in calibrating_folds(run, m.name)
    ]


def methods(*, ablations: bool = False) -> list[str]:
    """The names of all methods, in the order of tables."""
    return [method.name for method in (*_METHODS, *(_VARIANTS if ablations else ()))]


def calibrating_folds(run: Run, method: str) -> list[int]:
    """The folds whose masks calibrate a method; a variant has one network, and so one fold."""
    return [0] if _BY_NAME[method].variant else list(range(run.settings.folds))


def one_network(method: str) -> bool:
    """Whether a method is one network, calibrated on the masks of one fold."""
    return _BY_NAME[method].variant


def calibrated_on(method: str, early: BoolArray) -> BoolArray:
    """Which calibrating masks calibrate a method; ``early`` says which were made at an early epoch, (M,)."""
    return ~early if _BY_NAME[method].of_one_source else np.ones_like(early)


def train(run: Run, training: MethodTraining) -> None:
    """Do one training, or what is left of it."""
    method = _BY_NAME[training.method]
    if not isinstance(method, Trained):
        raise ValueError(f"{training.method} has no network to train")
    method.train(run, training.fold)


def estimator_of(run: Run, method: str, folds: Sequence[int]) -> Estimator:
    """The estimator of a method, by its name; see `Method.estimator`."""
    return _BY_NAME[method].estimator(run, folds)


def _calibrated(
    run: Run, method: Method, folds: Sequence[int], assessor_of: Callable[[int], Assessor], *, blind: bool
) -> list[Assessor]:
    """The assessors of some folds, their maps calibrated on the masks that calibrate a method; blind, without them."""

    def logits(fold: int) -> Callable[[AssessedMask], FloatArray]:
        assessor = assessor_of(fold)
        if not blind:
            return lambda mask: assessor.error_logits(mask.scan, mask.labels)
        alone = ScanOnly([assessor])
        return lambda mask: truth_as_error(
            alone.truth_logits(mask.scan)[0], structure_masks(mask.labels.array, assessor.structures)
        )

    assessors = [assessor_of(fold) for fold in folds]
    path = f"networks/{slug(method.name)}/maps.json"
    maps = run.cached(path, _MAPS, lambda: _fit_maps(run, method, logits))
    return [with_maps(assessor, maps) for assessor in assessors]


def _fit_maps(
    run: Run, method: Method, logits_of: Callable[[int], Callable[[AssessedMask], FloatArray]]
) -> tuple[MapCalibration, ...]:
    """Calibrate a method's error maps on the calibrating masks, each as the network of its fold sees it."""
    structures = run.cohort.structures
    known: list[list[KnownMap]] = [[] for _ in structures]
    for fold in calibrating_folds(run, method.name):
        logits = logits_of(fold)
        for mask in calibration_masks(run, fold):
            if method.of_one_source and mask.early:
                continue
            for structure, of_structure, e in zip(structures, known, logits(mask.assessed), strict=True):
                labels, truth = (structure.mask(volume.array) for volume in (mask.assessed.labels, mask.truth))
                of_structure.append(known_map(e, labels, truth, mask.patient))
    return tuple(fit_map(of_structure) for of_structure in known)


def _leaking(run: Run, masks: MaskSet, fold: int) -> MaskSet:
    def make() -> Arrays:
        made = masks_of(fold_sources(run, fold), masks.case, run.settings.segmenter, allow_seen=True)
        return {"masks": made.masks, "dice": np.array(made.dice)}

    stored = run.cached(f"training-masks/in-sample/{masks.case.id}.npz", ARRAYS, make)
    return MaskSet(masks.case, stored["masks"], tuple(float(d) for d in stored["dice"]))


def _source(mask: AssessedMask) -> Segmenter:
    if mask.source is None:
        raise ValueError("a mask of the training side has a network that made it")
    return mask.source
