"""The whole evaluation, step by step; every step keeps what it makes in the run folder and is not done twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter

from segqc.evaluation.data.cohort import CohortError
from segqc.evaluation.data.manifest import Manifest
from segqc.evaluation.data.mask_sources import (
    calibration_sources,
    check_masks,
    correction_masks,
    fold_sources,
    own_masks,
    stratified_masks,
    test_source_names,
    train_served,
    train_test_source,
    training_masks,
)
from segqc.evaluation.data.run import Run, parallel_map, timed
from segqc.evaluation.experiments.comparison import (
    ExperimentName,
    ExperimentResult,
    experiment_result,
    find_truths,
    predict,
)
from segqc.evaluation.experiments.observers import (
    ObserverExperiment,
    compare_observers,
    find_double_readings,
    find_experts,
    read_structures,
)
from segqc.evaluation.methods.registry import methods, train, trainings
from segqc.training import LineProgress, Progress

OBSERVERS = TypeAdapter(ObserverExperiment)
VARIED: ExperimentName = "stratified"  # the experiment in which variants are compared
_OBSERVERS = "observers-"
MAKE_MASKS: Mapping[ExperimentName, Callable[[Run, Progress], Manifest]] = {
    "stratified": stratified_masks,
    "served": own_masks,
    "corrections": correction_masks,
}


def evaluate(
    run: Run, experiments: Sequence[ExperimentName], progress: Progress, *, ablations: bool = False
) -> list[ExperimentResult]:
    """Run experiments, or what is left of them.

    Their test masks are fixed before any method is trained.

    Args:
        run: the run folder.
        experiments: which experiments.
        progress: reports after each step.
        ablations: whether to train the variants as well, and to compare them on the stratified masks.

    Returns:
        The experiments' results; `segqc.evaluation.experiments.comparison.stored_results` adds those with variants.
    """
    run.cohort  # noqa: B018 read once: it goes to all workers with the run
    folds = range(run.settings.folds)
    sources = [*(test_source_names(run) if "stratified" in experiments else ()), "served"]
    sources += [*(f"fold-{k}" for k in folds), *(f"calibration-{k}" for k in folds)]
    with timed(run, "networks that make masks"):
        parallel_map(run, train_mask_source, sources, progress)
    with timed(run, "masks"):
        for experiment in experiments:
            manifest = MAKE_MASKS[experiment](run, progress)
            check_masks(run, manifest)
            progress.step(
                1, 1, f"{experiment}: {len(manifest.masks)} masks by {len(manifest.sources)} networks are fixed"
            )
        parallel_map(run, make_masks, [str(k) for k in folds], progress)
    with timed(run, "networks that are compared"):
        parallel_map(run, train, trainings(run, ablations=ablations), progress)
    results = []
    for experiment in experiments:
        with_variants = ablations and experiment == VARIED
        with timed(run, f"predictions, {experiment}"):
            find_truths(run, experiment)
            compared = methods(ablations=with_variants)
            parallel_map(run, predict, [f"{experiment}/{method}" for method in compared], progress)
        with timed(run, f"statistics, {experiment}"):
            results.append(experiment_result(run, experiment, progress))
            if with_variants:
                experiment_result(run, experiment, progress, ablations=True)
    run.made()
    return results


def observer_experiment(run: Run, folder: Path, progress: Progress) -> ObserverExperiment:
    """Hold the run's error extraction against what two experts draw differently, or read what was found.

    Args:
        run: the run folder, which keeps the result under the folder's name.
        folder: label files ``<scan>_<expert>`` of two experts, and ``labels.txt`` with the structures.
        progress: reports each curve.

    Raises:
        CohortError: if the folder does not hold them, or one of them can't be used.
    """

    def make() -> ObserverExperiment:
        try:
            readings = find_double_readings(folder, *find_experts(folder))
            return compare_observers(
                readings,
                read_structures(folder),
                base=run.settings.extraction,
                report=lambda what: progress.step(0, 1, what),
            )
        except ValueError as error:
            raise CohortError(str(error)) from error

    if not folder.is_dir():
        raise CohortError(f"{folder}: no such folder; name one of two experts' label files")
    whole = folder.resolve()
    digest = hashlib.sha256(str(whole).encode()).hexdigest()[:8]  # folders elsewhere may have the same name
    return run.cached(f"results/{_OBSERVERS}{whole.name}-{digest}.json", OBSERVERS, make)


def stored_observers(run: Run) -> dict[str, ObserverExperiment]:
    """The experiments of two experts' masks that a run folder has, by their folder's name."""
    paths = sorted((run.folder / "results").glob(f"{_OBSERVERS}*.json"))
    names = [path.stem.removeprefix(_OBSERVERS).rpartition("-")[0] for path in paths]
    return {name: OBSERVERS.validate_json(path.read_bytes()) for name, path in zip(names, paths, strict=True)}


def train_mask_source(run: Run, name: str) -> None:
    """Train a network that makes masks, by its name."""
    if name == "served":
        train_served(run, LineProgress())
    elif name.startswith("fold-"):
        fold_sources(run, int(name.removeprefix("fold-")))
    elif name.startswith("calibration-"):
        calibration_sources(run, int(name.removeprefix("calibration-")))
    else:
        train_test_source(run, name)


def make_masks(run: Run, name: str) -> None:
    """Make the training masks of a fold."""
    training_masks(run, int(name))
