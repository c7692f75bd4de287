"""The experiments of a run: methods assess masks, are calibrated on unseen patients and compared with the truth."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from segqc.evaluation.data import predictions
from segqc.evaluation.data.manifest import MANIFESTS, Corrections, Manifest
from segqc.evaluation.data.mask_sources import (
    CALIBRATION,
    calibration_masks,
    source_path,
    test_mask_path,
    training_masks,
    truth_of,
)
from segqc.evaluation.data.predictions import (
    EXTRACTED,
    PREDICTIONS,
    RAW,
    TRUTHS,
    KnownMask,
    Predictions,
    Truths,
    load_predictions,
    load_truths,
)
from segqc.evaluation.data.run import Run, parallel_map
from segqc.evaluation.data.storage import as_json
from segqc.evaluation.methods.estimates import AssessedMask
from segqc.evaluation.methods.registry import (
    CONSTANT,
    CROSS_FITTED,
    EXTRACTED_MAP,
    ONE_NETWORK,
    SCAN_ONLY,
    SEGQC,
    TTA,
    VARIANTS,
    calibrated_on,
    calibrating_folds,
    estimator_of,
    methods,
    one_network,
)
from segqc.evaluation.statistics import curves, detection
from segqc.evaluation.statistics.coverage import ALL, Coverage, quality_strata, resplit_coverage, shift_coverage
from segqc.networks.segmenter import Segmenter
from segqc.quality import estimation
from segqc.quality.boxes import largest_box_area_mm2
from segqc.quality.error_maps import difference
from segqc.quality.metrics import METRIC_NAMES, MetricName, Values, fit_calibration
from segqc.text import slug
from segqc.training import Progress
from segqc.training.cases import label_values, read_case
from segqc.types import BoolArray, ErrorBox
from segqc.volumes import Volume, read_labels, through_plane_axis

ExperimentName: TypeAlias = Literal["stratified", "served", "corrections"]
Dimension: TypeAlias = Literal["3D", "2D"]
Slices: TypeAlias = Literal["all", "mask", "large"]
Family: TypeAlias = Literal["methods", "bad masks", "good masks", "variants"]
T = TypeVar("T")

MANIFEST_OF: Mapping[ExperimentName, str] = {
    "stratified": "test-masks/manifest.json",
    "served": "test-masks/served.json",
    "corrections": "test-masks/corrections.json",
}
MIN_TRUTH_VOXELS = 20  # of slices whose ARVD is reported apart
STRATA = (0.6, 0.7, 0.8, 0.9)
BAD_UNDER = 0.7  # true Dice
OF_SUM, OF_EXTRACTED = ", error sum", "-EE"  # end the names of a method's further orders
ERROR_SUM, TTA_ENTROPY = SEGQC + OF_SUM, f"{TTA} entropy"


@dataclass(frozen=True, slots=True)
class Row:
    """How good one method's estimates of one metric of one structure are.

    ``raw`` are the estimates as they are, ``calibrated`` after a line fitted on patients that the method has not seen.
    ``slices`` says which slices count: those of mask or truth ("all"), of the mask ("mask"), or with at least 20 voxels
    of truth ("large"); it is None in 3D. ``training_mae`` is the calibrated estimates' error on the calibrating masks:
    of patients of the training side that the estimating network has not seen, what a recipe may be chosen by.
    """

    structure: str
    dimension: Dimension
    slices: Slices | None
    metric: MetricName
    method: str
    raw: estimation.Scores
    calibrated: estimation.Scores
    mae: estimation.ConfidenceInterval
    pearson: estimation.ConfidenceInterval
    spearman: estimation.ConfidenceInterval
    strata: tuple[estimation.Stratum, ...]
    training_mae: float | None = None


@dataclass(frozen=True, slots=True)
class Compared:
    """A method's error against others', by patient: one family of tests.

    Attributes:
        structure, dimension, metric, statistic: of what.
        others: the methods that ``first`` is compared with.
        comparisons, verdicts: one for each of them.
        first: SegQC, or one of its networks.
        family: "methods" for all methods on all masks; "bad masks" and "good masks" for the estimates of the truth that
            never see the mask, on masks with a true Dice under, or of at least, `BAD_UNDER`; "variants" for ablations.
    """

    structure: str
    dimension: Dimension
    metric: MetricName
    statistic: estimation.PairedStatistic
    others: tuple[str, ...]
    comparisons: tuple[estimation.Comparison, ...]
    verdicts: tuple[estimation.Verdict, ...]
    first: str = SEGQC
    family: Family = "methods"


@dataclass(frozen=True, slots=True)
class Ordered:
    """The correction curves of one structure."""

    structure: str
    dimension: Dimension
    comparison: curves.CurveComparison


@dataclass(frozen=True, slots=True)
class Detected:
    """A method's boxes and error maps against the true ones.

    ``predicted`` and ``true`` say whether error extraction was applied to the map and to D; ``chosen`` is the threshold
    of extracted maps that was chosen on the masks that calibrate the method.
    """

    structure: str
    method: str
    predicted: Literal["raw", "extracted"]
    true: Literal["raw", "extracted"]
    boxes: tuple[detection.DetectionScores, ...]
    chosen: float | None = None


@dataclass(frozen=True, slots=True)
class Mapped:
    """How well a method's error map meets the true error, voxel by voxel."""

    structure: str
    method: str
    extracted: bool
    errors: Literal["all", "false positive", "false negative"]
    scores: detection.ErrorMapScores


@dataclass(frozen=True, slots=True)
class Covered:
    """How often SegQC's intervals of a 3D metric hold the truth.

    Attributes:
        structure: the structure.
        metric: the metric.
        kind: "resplit" over random splits of the training side's patients, "test" made of all of them and held against
            this experiment's masks, "shift" made of the patients of all other groups and held against those of one,
            "structure" made of another structure and held against this one.
        stratum: the stratum of the true Dice, the group, or the other structure; "all".
        coverage: the coverage.
    """

    structure: str
    metric: MetricName
    kind: Literal["resplit", "test", "shift", "structure"]
    stratum: str
    coverage: Coverage


@dataclass(frozen=True, slots=True)
class Shared:
    """Whether a method errs on the same patients as SegQC, in the calibrated 3D Dice of one structure."""

    structure: str
    method: str
    errors: estimation.SharedErrors


@dataclass(frozen=True, slots=True)
class ExperimentResult:
    """Everything that an experiment found."""

    experiment: ExperimentName
    masks: int
    patients: int
    slices: int
    rows: tuple[Row, ...]
    compared: tuple[Compared, ...]
    ordered: tuple[Ordered, ...]
    detected: tuple[Detected, ...]
    mapped: tuple[Mapped, ...]
    covered: tuple[Covered, ...]
    seconds: dict[str, float]
    shared: tuple[Shared, ...] = ()
    corrections: Corrections = "none"


RESULTS: TypeAdapter[ExperimentResult] = TypeAdapter(ExperimentResult)
_RESULT = as_json(RESULTS)


@dataclass(frozen=True, slots=True)
class PredictionTask:
    """A method that assesses the masks of an experiment."""

    experiment: ExperimentName
    method: str

    def __str__(self) -> str:
        return f"{self.method}, {self.experiment}"


@dataclass(frozen=True, slots=True)
class ResultTask:
    """The comparison of all methods on the masks of an experiment; with variants of SegQC, if ``ablations``."""

    experiment: ExperimentName
    ablations: bool = False

    def __str__(self) -> str:
        return f"{self.experiment}{'-ablations' if self.ablations else ''}"


@dataclass(frozen=True, slots=True)
class StructureTask:
    """The part of a comparison that is about one structure, the run's number ``structure``."""

    result: ResultTask
    structure: int

    def __str__(self) -> str:
        return f"{self.result}, structure {self.structure}"


# ------------------------------------------------------------------------------------------------- orders of correction


def sums_of(method: str) -> str:
    """The name of the order of a method's plain sums."""
    return TTA_ENTROPY if method == TTA else f"{method}{OF_SUM}"


def order_methods() -> dict[str, str]:
    """The method that each order comes from, by the order's name."""
    every = methods(ablations=True)
    further = {name: method for method in every for name in (sums_of(method), f"{method}{OF_EXTRACTED}")}
    return further | {method: method for method in every}  # an order of SegQC's extracted map is a method of its own


def error_scores_of_scans(predicted: Mapping[str, Predictions], k: int) -> dict[str, Values]:
    """What orders scans, by the order's name, (M,) each: the estimated Dice of structure ``k``, and the plain sums."""
    error_score: dict[str, Values] = {}
    for method, found in predicted.items():
        dice = found.metrics[:, k, 0]
        if not np.isfinite(dice).all():
            error_score[method] = found.scan_error_score[:, k]
        elif method != CONSTANT:
            error_score |= {method: -dice, sums_of(method): found.scan_error_score[:, k]}
    return error_score


def error_scores_of_slices(predicted: Mapping[str, Predictions], truth: Truths, k: int) -> dict[str, Values]:
    """What orders the slices of all scans, by the order's name, (R,) each.

    A method's own order goes by its errors of structure ``k`` in the slice (TTA's and softmax entropy's: by entropies)
    as a share of their scan's size; another by the plain sums; one by the shares after error extraction.
    """
    in_mask = truth.voxels[:, k, 0]
    error_score: dict[str, Values] = {}
    for method, found in predicted.items():
        if method == CONSTANT:
            continue
        sums, in_truth = found.slice_error_score[:, k], found.slice_truth[:, k]
        # who estimates no truth knows the mask only
        size = curves.whole_sizes(truth.mask_of, in_mask, in_truth if np.isfinite(in_truth).all() else in_mask)
        error_score |= {method: sums / size, sums_of(method): sums}
        if len(found.counts) and method not in (SEGQC, EXTRACTED_MAP):  # SegQC's is a method of its own
            error_score[f"{method}{OF_EXTRACTED}"] = found.slice_error_score_extracted[:, k] / size
    return error_score


# ------------------------------------------------------------------------------------------------------- known masks


def test_masks(run: Run, manifest: Manifest) -> Iterator[KnownMask]:
    """The masks of a manifest, those of one scan one after the other."""
    cases = {c.id: c for c in run.cohort.test}
    values, sources = label_values(run.cohort.structures), dict[str, Segmenter]()
    known: tuple[str, Volume, Volume] | None = None
    for mask in manifest.masks:
        case = cases[mask.case]
        if known is None or known[0] != mask.case:
            known = (mask.case, *read_case(replace(case, labels=truth_of(run, mask, case)), values))
        if mask.source and mask.source not in sources:
            sources[mask.source] = Segmenter.load(source_path(run, mask.source))
        labels = read_labels(test_mask_path(run, mask), scan=known[1])
        assessed = AssessedMask(known[1], labels, sources.get(mask.source))
        yield KnownMask(mask.id, mask.patient, assessed, known[2], early=mask.early)


def predict(run: Run, task: PredictionTask) -> None:
    """Let a method assess the masks of an experiment, and those that calibrate it."""
    s, structures, method = run.settings, run.cohort.structures, task.method
    largest = largest_boxes(run)

    def of_fold(fold: int) -> Predictions:
        masks, estimator = calibration_masks(run, fold), estimator_of(run, method, [fold])
        return predictions.predict(masks, estimator, structures, s, largest, maps="extracted boxes")

    def of_experiment() -> Predictions:
        masks, estimator = experiment_masks(run, task.experiment), estimator_of(run, method, range(s.folds))
        return predictions.predict(masks, estimator, structures, s, largest)

    for fold in calibrating_folds(run, method):
        path = predictions_path(run, f"{CALIBRATION}-{fold}", method)
        run.cached(path, PREDICTIONS, functools.partial(of_fold, fold))
    run.cached(predictions_path(run, task.experiment, method), PREDICTIONS, of_experiment)


def find_truths(run: Run, experiment: ExperimentName) -> None:
    """Note what is true of the masks of an experiment, and of those that calibrate methods."""

    def truths_of(masks: Iterator[KnownMask]) -> Truths:
        return predictions.find_truths(masks, run.cohort.structures, run.settings)

    for fold in range(run.settings.folds):
        path = truth_path(run, f"{CALIBRATION}-{fold}")
        run.cached(path, TRUTHS, functools.partial(truths_of, calibration_masks(run, fold)))
    run.cached(truth_path(run, experiment), TRUTHS, functools.partial(truths_of, experiment_masks(run, experiment)))


def manifest_of(run: Run, experiment: ExperimentName) -> Manifest:
    """The fixed masks of an experiment."""
    return MANIFESTS.validate_json((run.folder / MANIFEST_OF[experiment]).read_bytes())


def experiment_masks(run: Run, experiment: ExperimentName) -> Iterator[KnownMask]:
    """The masks of an experiment, with their truths."""
    return test_masks(run, manifest_of(run, experiment))


def largest_boxes(run: Run) -> dict[str, float]:
    """The largest error box of the median training masks, by structure that has one (method, "Error regions")."""

    def make() -> dict[str, float]:
        structures, largest = run.cohort.structures, dict[str, float]()
        for fold in range(run.settings.folds):
            for masks in training_masks(run, fold):
                scan, truth = read_case(masks.case, label_values(structures))
                for s in structures:
                    error = difference(s.mask(masks.masks[0]), s.mask(truth.array))
                    area = largest_box_area_mm2(error, through_plane_axis(scan), scan.spacing_mm, run.settings.boxes)
                    if area is not None:
                        largest[s.name] = max(largest.get(s.name, 0.0), area)
        return largest

    return run.cached("training-masks/largest-boxes.json", as_json(TypeAdapter(dict[str, float])), make)


def predictions_path(run: Run, experiment: str, method: str) -> Path:
    """The file of a method's predictions."""
    return run.folder / "predictions" / experiment / f"{slug(method)}.npz"


def truth_path(run: Run, experiment: str) -> Path:
    """The file of what is true of an experiment's masks."""
    return run.folder / "predictions" / f"truth-{experiment}.npz"


# ------------------------------------------------------------------------------------------------------------ results


def experiment_result(run: Run, task: ResultTask, progress: Progress) -> ExperimentResult:
    """Compare all methods on the masks of an experiment, structures side by side; read what was found before."""
    tasks = [StructureTask(task, k) for k in range(len(run.cohort.structures))]

    def make() -> ExperimentResult:
        parallel_map(run, compare_methods, tasks, progress)
        return _together([compare_methods(run, part) for part in tasks])

    return run.cached(f"results/{task}.json", _RESULT, make)


def stored_results(run: Run) -> list[ExperimentResult]:
    """All results that a run folder has: of experiments, then of those with variants."""
    tasks = [ResultTask(experiment, ablations) for ablations in (False, True) for experiment in MANIFEST_OF]
    paths = [run.folder / "results" / f"{task}.json" for task in tasks]
    return [_RESULT.load(path) for path in paths if path.is_file()]


def compare_methods(run: Run, task: StructureTask) -> ExperimentResult:
    """Compare all methods on one structure: done once, then read."""

    def make() -> ExperimentResult:
        compared = methods(ablations=task.result.ablations)
        return structure_result(run, task.result.experiment, compared, task.structure)

    return run.cached(f"results/structures/{task.result}-{task.structure}.json", _RESULT, make)


def structure_result(run: Run, experiment: ExperimentName, methods: Sequence[str], k: int) -> ExperimentResult:
    """Compare methods on the masks of an experiment, for the run's structure number ``k``."""
    return _Experiment(run, experiment, methods).result(k)


def _together(parts: Sequence[ExperimentResult]) -> ExperimentResult:
    """The results of all structures as one."""

    def joined(of: Callable[[ExperimentResult], tuple[T, ...]]) -> tuple[T, ...]:
        return tuple(x for part in parts for x in of(part))

    return replace(
        parts[0],
        rows=joined(lambda r: r.rows),
        compared=joined(lambda r: r.compared),
        ordered=joined(lambda r: r.ordered),
        detected=joined(lambda r: r.detected),
        mapped=joined(lambda r: r.mapped),
        covered=joined(lambda r: r.covered),
        shared=joined(lambda r: r.shared),
    )


class _Experiment:
    """An experiment's arrays in memory."""

    def __init__(self, run: Run, experiment: ExperimentName, methods: Sequence[str]) -> None:
        self.run, self.experiment, self.methods = run, experiment, tuple(methods)
        self.truth = load_truths(truth_path(run, experiment))
        self.predicted = {m: load_predictions(predictions_path(run, experiment, m)) for m in methods}
        folds = range(run.settings.folds)
        self.known = [load_truths(truth_path(run, f"{CALIBRATION}-{k}")) for k in folds]
        self.on_known = {
            m: [load_predictions(predictions_path(run, f"{CALIBRATION}-{k}", m)) for k in calibrating_folds(run, m)]
            for m in methods
        }

    def rng(self, *of: int) -> np.random.Generator:
        return np.random.default_rng((self.run.settings.seed, 4, *of))

    def result(self, k: int) -> ExperimentResult:
        """What the experiment finds for one structure."""
        kinds: tuple[tuple[Dimension, Slices | None], ...]
        kinds = (("3D", None), ("2D", "all"), ("2D", "mask"), ("2D", "large"))
        rows = tuple(
            self._row(k, dimension, slices, metric, method, values)
            for dimension, slices in kinds
            for metric in METRIC_NAMES
            if slices != "large" or metric == "arvd"
            for method, values in self._comparable(k, dimension, slices, metric).items()
        )
        return ExperimentResult(
            self.experiment,
            len(self.truth.masks),
            len(set(self.truth.patients)),
            len(self.truth.mask_of),
            rows,
            tuple(self._compared(k)),
            (self._ordered(k, "3D"), self._ordered(k, "2D")),
            tuple(self._detected(k)),
            tuple(self._mapped(k)),
            tuple(self._covered(k)),
            {m: float(np.median(self.predicted[m].seconds)) for m in self.methods},
            tuple(self._shared(k)),
            manifest_of(self.run, self.experiment).corrections,
        )

    def _name(self, k: int) -> str:
        return self.run.cohort.structures[k].name

    def _chosen(self, truth: Truths, k: int, slices: Slices | None) -> BoolArray:
        """Which masks or slices count."""
        if slices is None:
            return np.ones(len(truth.masks), bool)
        in_mask, in_truth, _ = truth.voxels[:, k].T
        if slices == "mask":
            return np.asarray(in_mask > 0)
        return np.asarray(in_truth >= MIN_TRUTH_VOXELS if slices == "large" else (in_mask > 0) | (in_truth > 0))

    def _values(self, k: int, dimension: Dimension, slices: Slices | None, metric: MetricName, method: str) -> _Values:
        """Estimates as they are and calibrated, and the truth, with the patients."""
        m = METRIC_NAMES.index(metric)
        column = "metrics" if dimension == "3D" else "slices"
        chosen = self._chosen(self.truth, k, slices)
        raw, true = (getattr(x, column)[:, k, m][chosen] for x in (self.predicted[method], self.truth))
        whose = _patients(self.truth, dimension)[chosen]
        truths = [self.known[fold] for fold in calibrating_folds(self.run, method)]
        known = [self._chosen(t, k, slices) & self._calibrating(t, method, dimension) for t in truths]
        x = np.concatenate([getattr(j, column)[:, k, m][c] for j, c in zip(self.on_known[method], known, strict=True)])
        y = np.concatenate([getattr(t, column)[:, k, m][c] for t, c in zip(truths, known, strict=True)])
        constant = float(np.nanmedian(y)) if np.isfinite(y).any() else None
        known_whose = np.concatenate([_patients(t, dimension)[c] for t, c in zip(truths, known, strict=True)])
        line = fit_calibration(x, y, metric=metric, patients=known_whose)
        if method == CONSTANT:  # the folds' constants hardly differ: there is nothing to lay a line through
            line = replace(line, slope=0.0, intercept=np.nan if constant is None else constant)
        errors = np.abs(line.apply(x) - y)
        known_mae = float(np.nanmean(errors)) if np.isfinite(errors).any() else None
        return _Values(raw, line.apply(raw), true, tuple(whose.tolist()), constant, known_mae)

    def _calibrating(self, truth: Truths, method: str, dimension: Dimension) -> BoolArray:
        """Which of the calibrating masks, or of their slices, calibrate a method."""
        masks = calibrated_on(method, truth.early)
        return masks if dimension == "3D" else masks[truth.mask_of]

    def _comparable(
        self, k: int, dimension: Dimension, slices: Slices | None, metric: MetricName
    ) -> dict[str, _Values]:
        """The values of all methods that say something of a metric, on the masks or slices that all of them speak of.

        Slices where only the truth is not empty stay, whoever is silent there: they are reported apart ("all").
        """
        found = {m: self._values(k, dimension, slices, metric, m) for m in self.methods}
        found = {m: v for m, v in found.items() if np.isfinite(v.raw).any()}
        if slices == "all" or not found:
            return found
        common = np.logical_and.reduce([np.isfinite(v.raw) for v in found.values()])
        return {m: v.where(common) for m, v in found.items()}

    def _row(
        self, k: int, dimension: Dimension, slices: Slices | None, metric: MetricName, method: str, v: _Values
    ) -> Row:
        def interval(statistic: estimation.Statistic) -> estimation.ConfidenceInterval:
            return estimation.interval(
                statistic, v.calibrated, v.true, v.patients, generator=self.rng(k), metric=metric,
                constant=v.constant, draws=self.run.settings.draws,
            )  # fmt: skip

        return Row(
            self._name(k), dimension, slices, metric, method,
            estimation.scores(v.raw, v.true, v.patients, metric=metric, constant=v.constant),
            estimation.scores(v.calibrated, v.true, v.patients, metric=metric, constant=v.constant),
            interval("mae"), interval("pearson"), interval("spearman"),
            estimation.stratified(v.calibrated, v.true, v.patients, STRATA, metric=metric, constant=v.constant)
            if metric == "dice" else (),
            v.training_mae,
        )  # fmt: skip

    def _compared(self, k: int) -> Iterator[Compared]:
        """SegQC against all methods; against those that never see the mask by quality; variants against the recipe."""
        others = [m for m in self.methods if m != SEGQC and m not in VARIANTS]
        dimensions: tuple[Dimension, ...] = ("3D", "2D")
        paired_by: tuple[estimation.PairedStatistic, ...] = ("mae", "spearman")
        for dimension in dimensions:
            for metric in METRIC_NAMES:
                for statistic in paired_by:
                    yield self._family(k, "methods", SEGQC, others, dimension, metric, statistic)
        true = self.truth.metrics[:, k, 0]
        for family, chosen in (("bad masks", true < BAD_UNDER), ("good masks", true >= BAD_UNDER)):
            without_mask = [m for m in (SCAN_ONLY, CROSS_FITTED) if m in self.methods]
            yield self._family(k, family, SEGQC, without_mask, chosen=chosen)  # type: ignore[arg-type]
        variants = [m for m in self.methods if m in VARIANTS and m != ONE_NETWORK]
        for first, ones in ((SEGQC, False), (ONE_NETWORK, True)):
            if compared := [m for m in variants if one_network(m) == ones]:
                yield self._family(k, "variants", first, compared)

    def _family(
        self, k: int, family: Family, first: str, others: Sequence[str], dimension: Dimension = "3D",
        metric: MetricName = "dice", statistic: estimation.PairedStatistic = "mae", chosen: BoolArray | None = None,
    ) -> Compared:  # fmt: skip
        slices: Slices | None = None if dimension == "3D" else "mask"
        ours = self._values(k, dimension, slices, metric, first)
        compared, found = [], []
        for method in others:
            v = self._values(k, dimension, slices, metric, method)
            if not np.isfinite(v.raw).any() or (statistic == "spearman" and method == CONSTANT):
                continue
            compared.append(method)
            found.append(
                estimation.paired(
                    ours.calibrated, v.calibrated, v.true if chosen is None else np.where(chosen, v.true, np.nan),
                    v.patients, generator=self.rng(k, 1), statistic=statistic, metric=metric,
                    draws=self.run.settings.draws,
                )
            )  # fmt: skip
        verdicts = estimation.holm_verdicts(found)
        return Compared(
            self._name(k), dimension, metric, statistic, tuple(compared), tuple(found), verdicts, first, family
        )

    def _ordered(self, k: int, dimension: Dimension) -> Ordered:
        error_score = (
            error_scores_of_scans(self.predicted, k)
            if dimension == "3D"
            else error_scores_of_slices(self.predicted, self.truth, k)
        )
        error_score = {name: values for name, values in error_score.items() if np.isfinite(values).all()}
        in_mask, in_truth, in_both = self.truth.voxels[:, k].T
        units = (
            curves.scans(self.truth.metrics[:, k, 0])
            if dimension == "3D"
            else curves.slices(self.truth.mask_of, in_mask, in_truth, in_both)
        )
        # a family of all orders there are would be so large that no p-value could be small enough
        against = [
            m for m in (*self.methods, ERROR_SUM, TTA_ENTROPY) if m in error_score and m != SEGQC and m not in VARIANTS
        ]
        comparison = curves.compare_orders(
            units, error_score, self.truth.patients, generator=self.rng(k, 2), chosen=SEGQC, against=against,
            draws=self.run.settings.draws,
        )  # fmt: skip
        return Ordered(self._name(k), dimension, comparison)

    def _shared(self, k: int) -> Iterator[Shared]:
        ours = self._values(k, "3D", None, "dice", SEGQC)
        for method in self.methods:
            v = self._values(k, "3D", None, "dice", method)
            if method != CONSTANT and np.isfinite(v.raw).any():
                found = estimation.shared_errors(v.calibrated, ours.calibrated, v.true, v.patients)
                yield Shared(self._name(k), method, found)

    def _covered(self, k: int) -> Iterator[Covered]:
        """Coverage of the intervals of the 3D metrics: over resplits, on this experiment's masks, and under shift."""
        patients = [p for t in self.known for p in t.patients]
        groups = np.array(self.run.groups_of(patients))
        true_dice = np.concatenate([t.metrics[:, k, 0] for t in (*self.known, self.truth)])
        for m, metric in enumerate(METRIC_NAMES):
            x, y = self._known_values(k, m)
            strata = quality_strata(true_dice) if metric == "dice" else {}
            known = {name: chosen[: len(y)] for name, chosen in strata.items()}
            resplit = resplit_coverage(x, y, patients, metric, rng=self.rng(k, 6, m), strata=known)
            found = [("resplit", stratum, coverage) for stratum, coverage in resplit.items()]
            true = np.concatenate([y, self.truth.metrics[:, k, m]])
            tested = np.arange(len(true)) >= len(y)
            on_test = shift_coverage(
                np.concatenate([x, self.predicted[SEGQC].metrics[:, k, m]]), true, [*patients, *self.truth.patients],
                ~tested, tested, metric, rng=self.rng(k, 7, m), strata=strata,
            )  # fmt: skip
            found += [("test", stratum, coverage) for stratum, coverage in on_test.items()]
            for number, group in enumerate(np.unique(groups) if len(set(groups)) > 1 else ()):
                own = groups == group
                shifted = shift_coverage(x, y, patients, ~own, own, metric, rng=self.rng(k, 8, m, number))
                found.append(("shift", str(group), shifted[ALL]))
            found += [("structure", name, c) for name, c in self._from_other_structures(k, m, patients)]
            for kind, stratum, coverage in found:
                yield Covered(self._name(k), metric, kind, stratum, coverage)  # type: ignore[arg-type]

    def _known_values(self, k: int, m: int) -> tuple[Values, Values]:
        """A 3D metric of the calibrating masks: as SegQC reads it off its maps, and the truth."""
        read = np.concatenate([p.metrics[:, k, m] for p in self.on_known[SEGQC]])
        return read, np.concatenate([truth.metrics[:, k, m] for truth in self.known])

    def _from_other_structures(self, k: int, m: int, patients: Sequence[str]) -> Iterator[tuple[str, Coverage]]:
        """Intervals made of each structure that has no voxel in common with structure ``k``, held against this one."""
        structures = self.run.cohort.structures
        x, y = self._known_values(k, m)
        own = np.arange(2 * len(x)) >= len(x)
        for other, structure in enumerate(structures):
            if other == k or set(structure.values) & set(structures[k].values):
                continue
            other_x, other_y = self._known_values(other, m)
            shifted = shift_coverage(
                np.concatenate([other_x, x]), np.concatenate([other_y, y]), [*patients, *patients],
                ~own, own, METRIC_NAMES[m], rng=self.rng(k, 9, m, other),
            )  # fmt: skip
            yield structure.name, shifted[ALL]

    def _detected(self, k: int) -> Iterator[Detected]:
        count, patients = len(self.truth.masks), self.truth.patients
        names = {RAW: "raw", EXTRACTED: "extracted"}
        for method, made in self.predicted.items():
            if not len(made.counts) or method == EXTRACTED_MAP:
                continue
            chosen = self._box_threshold(method, k)
            for predicted, true in ((RAW, RAW), (EXTRACTED, RAW), (EXTRACTED, EXTRACTED), (RAW, EXTRACTED)):
                by_threshold = {
                    threshold: predictions.boxes_of(made.boxes, count, k, predicted, t)
                    for t, threshold in enumerate(self.run.settings.box_thresholds)
                }
                yield Detected(
                    self._name(k), method, names[predicted], names[true],  # type: ignore[arg-type]
                    detection.detection_over_thresholds(
                        by_threshold, predictions.boxes_of(self.truth.boxes, count, k, true), patients,
                        generator=self.rng(k, 3), min_ious=self.run.settings.box_ious,
                        draws=min(500, self.run.settings.draws),
                    ),
                    chosen if predicted == EXTRACTED else None,
                )  # fmt: skip

    def _box_threshold(self, method: str, k: int) -> float:
        """The threshold of extracted boxes by the masks that calibrate."""
        s = self.run.settings
        predicted: dict[float, list[list[ErrorBox]]] = {threshold: [] for threshold in s.box_thresholds}
        true: list[list[ErrorBox]] = []
        for fold, made in zip(calibrating_folds(self.run, method), self.on_known[method], strict=True):
            known = self.known[fold]
            chosen, count = calibrated_on(method, known.early), len(known.masks)
            true += itertools.compress(predictions.boxes_of(known.boxes, count, k, EXTRACTED), chosen)
            for t, threshold in enumerate(s.box_thresholds):
                predicted[threshold] += itertools.compress(
                    predictions.boxes_of(made.boxes, count, k, EXTRACTED, t), chosen
                )
        return detection.choose_threshold(predicted, true, min_iou=min(s.box_ious), precision=s.box_precision)

    def _mapped(self, k: int) -> Iterator[Mapped]:
        for method, made in self.predicted.items():
            for extracted, counts in ((False, made.counts), (True, made.counts_extracted)):
                if not len(counts) or method == EXTRACTED_MAP:
                    continue
                signed = predictions.map_counts(counts, k)
                for errors, chosen in (
                    ("all", [c.both for c in signed]),
                    ("false positive", [c.false_positive for c in signed]),
                    ("false negative", [c.false_negative for c in signed]),
                ):
                    yield Mapped(
                        self._name(k), method, extracted, errors,  # type: ignore[arg-type]
                        detection.error_map_scores(
                            chosen, self.truth.patients, generator=self.rng(k, 5),
                            draws=min(500, self.run.settings.draws),
                        ),
                    )  # fmt: skip


def _patients(truth: Truths, dimension: Dimension) -> npt.NDArray[np.str_]:
    """Whose each mask, or slice, is."""
    return np.array(truth.patients if dimension == "3D" else truth.slice_patients, np.str_)


@dataclass(frozen=True, slots=True, eq=False)
class _Values:
    raw: Values
    calibrated: Values
    true: Values
    patients: tuple[str, ...]
    constant: float | None
    training_mae: float | None

    def where(self, chosen: BoolArray) -> _Values:
        """The same where chosen, undefined elsewhere."""
        return replace(
            self, raw=np.where(chosen, self.raw, np.nan), calibrated=np.where(chosen, self.calibrated, np.nan)
        )
