"""The whole evaluation, step by step; every step keeps what it makes in the run folder and is not done twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from segqc.errors import SegqcError
from segqc.evaluation.data.cohort import CohortError
from segqc.evaluation.data.manifest import Manifest
from segqc.evaluation.data.mask_sources import (
    SourceTraining,
    check_masks,
    correction_masks,
    own_masks,
    stratified_masks,
    test_trainings,
    train_source,
    training_masks,
)
from segqc.evaluation.data.run import Run, parallel_map, timed
from segqc.evaluation.data.storage import as_json
from segqc.evaluation.experiments.comparison import (
    ExperimentName,
    ExperimentResult,
    PredictionTask,
    ResultTask,
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
from segqc.training import Progress

VARIED: ExperimentName = "stratified"  # the experiment in which variants are compared


@dataclass(frozen=True, slots=True)
class NamedObservers:
    """An experiment with two experts' masks, and the name of the folder that they are in."""

    folder: str
    experiment: ObserverExperiment


_OBSERVERS = as_json(TypeAdapter(NamedObservers))
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
    sources = [*(test_trainings(run) if "stratified" in experiments else ()), SourceTraining("served")]
    sources += [*(SourceTraining("fold", k) for k in folds), *(SourceTraining("calibration", k) for k in folds)]
    with timed(run, "networks that make masks"):
        parallel_map(run, train_source, sources, progress)
    with timed(run, "masks"):
        for experiment in experiments:
            manifest = MAKE_MASKS[experiment](run, progress)
            check_masks(run, manifest)
            fixed = f"{len(manifest.masks)} masks by {len(manifest.sources)} networks are fixed"
            progress.message(f"{experiment}: {fixed}")
        parallel_map(run, training_masks, folds, progress)
    with timed(run, "networks that are compared"):
        parallel_map(run, train, trainings(run, ablations=ablations), progress)
    results = []
    for experiment in experiments:
        with_variants = ablations and experiment == VARIED
        with timed(run, f"predictions, {experiment}"):
            find_truths(run, experiment)
            compared = methods(ablations=with_variants)
            parallel_map(run, predict, [PredictionTask(experiment, method) for method in compared], progress)
        with timed(run, f"statistics, {experiment}"):
            results.append(experiment_result(run, ResultTask(experiment), progress))
            if with_variants:
                experiment_result(run, ResultTask(experiment, ablations=True), progress)
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

    def make() -> NamedObservers:
        try:
            readings = find_double_readings(folder, *find_experts(folder))
            found = compare_observers(
                readings,
                read_structures(folder),
                base=run.settings.extraction,
                progress=progress,
            )
            return NamedObservers(whole.name, found)
        except (SegqcError, ValueError) as error:
            raise CohortError(str(error)) from error

    if not folder.is_dir():
        raise CohortError(f"{folder}: no such folder; name one of two experts' label files")
    whole = folder.resolve()
    digest = hashlib.sha256(str(whole).encode()).hexdigest()[:8]  # folders elsewhere may have the same name
    return run.cached(f"results/observers-{whole.name}-{digest}.json", _OBSERVERS, make).experiment


def stored_observers(run: Run) -> dict[str, ObserverExperiment]:
    """The experiments of two experts' masks that a run folder has, by their folder's name."""
    found = [_OBSERVERS.load(path) for path in sorted((run.folder / "results").glob("observers-*.json"))]
    return {named.folder: named.experiment for named in found}
