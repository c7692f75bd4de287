"""The whole evaluation, step by step; every step keeps what it makes in the run folder and is not done twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter

from segqc.errors import SegqcError
from segqc.evaluation.data.cohort import CohortError
from segqc.evaluation.data.mask_sources import (
    Manifest,
    calibration_makers,
    check_masks,
    correction_masks,
    fold_makers,
    own_masks,
    stratified_masks,
    test_maker_names,
    train_served,
    train_test_maker,
    training_masks,
)
from segqc.evaluation.data.run import Run, parallel_map, timed
from segqc.evaluation.experiments.comparison import StudyName, StudyResult, find_truths, judge_method, study_result
from segqc.evaluation.experiments.observers import (
    ObserverStudy,
    find_double_readings,
    find_experts,
    read_structures,
    study_observers,
)
from segqc.evaluation.methods.registry import methods, train, trainings
from segqc.training import LineProgress, Progress

OBSERVERS = TypeAdapter(ObserverStudy)
VARIED: StudyName = "stratified"  # the study in which variants are compared
_OBSERVERS = "observers-"
MAKE_MASKS: Mapping[StudyName, Callable[[Run, Progress], Manifest]] = {
    "stratified": stratified_masks,
    "served": own_masks,
    "corrections": correction_masks,
}


def evaluate(
    run: Run, studies: Sequence[StudyName], progress: Progress, *, ablations: bool = False
) -> list[StudyResult]:
    """Run studies, or what is left of them.

    Their test masks are fixed before any method is trained.

    Args:
        run: the run folder.
        studies: which studies.
        progress: told after each step.
        ablations: whether to train the variants as well, and to compare them on the stratified masks.

    Returns:
        The studies' results; `segqc.evaluation.experiments.comparison.kept_results` has those with variants as well.
    """
    run.cohort  # noqa: B018 read once: it goes to all workers with the run
    folds = range(run.settings.folds)
    makers = [*(test_maker_names(run) if "stratified" in studies else ()), "served"]
    makers += [*(f"fold-{k}" for k in folds), *(f"calibration-{k}" for k in folds)]
    with timed(run, "networks that make masks"):
        parallel_map(run, train_mask_makers, makers, progress)
    with timed(run, "masks"):
        for study in studies:
            manifest = MAKE_MASKS[study](run, progress)
            check_masks(run, manifest)
            progress.step(1, 1, f"{study}: {len(manifest.masks)} masks by {len(manifest.makers)} networks are fixed")
        parallel_map(run, make_masks, [str(k) for k in folds], progress)
    with timed(run, "networks that are compared"):
        parallel_map(run, train, trainings(run, ablations=ablations), progress)
    results = []
    for study in studies:
        with_variants = ablations and study == VARIED
        with timed(run, f"judging, {study}"):
            find_truths(run, study)
            compared = methods(ablations=with_variants)
            parallel_map(run, judge_method, [f"{study}/{method}" for method in compared], progress)
        with timed(run, f"statistics, {study}"):
            results.append(study_result(run, study, progress))
            if with_variants:
                study_result(run, study, progress, ablations=True)
    run.made()
    return results


def observer_study(run: Run, folder: Path, progress: Progress) -> ObserverStudy:
    """Hold the run's error extraction against what two experts draw differently, or read what was found.

    Args:
        run: the run folder, which keeps the result under the folder's name.
        folder: label files ``<scan>_<expert>`` of two experts, and ``labels.txt`` with the structures.
        progress: told about each curve.

    Raises:
        CohortError: if the folder does not hold them, or one of them can't be used.
    """

    def make() -> ObserverStudy:
        try:
            readings = find_double_readings(folder, *find_experts(folder))
            return study_observers(
                readings,
                read_structures(folder),
                base=run.settings.extraction,
                report=lambda what: progress.step(0, 1, what),
            )
        except (SegqcError, ValueError) as error:
            raise CohortError(str(error)) from error

    if not folder.is_dir():
        raise CohortError(f"{folder}: no such folder; name one of two experts' label files")
    whole = folder.resolve()
    digest = hashlib.sha256(str(whole).encode()).hexdigest()[:8]  # folders elsewhere may have the same name
    return run.kept(f"results/{_OBSERVERS}{whole.name}-{digest}.json", OBSERVERS, make)


def kept_observers(run: Run) -> dict[str, ObserverStudy]:
    """The studies of two experts' masks that a run folder has, by their folder's name."""
    paths = sorted((run.folder / "results").glob(f"{_OBSERVERS}*.json"))
    names = [path.stem.removeprefix(_OBSERVERS).rpartition("-")[0] for path in paths]
    return {name: OBSERVERS.validate_json(path.read_bytes()) for name, path in zip(names, paths, strict=True)}


def train_mask_makers(run: Run, name: str) -> None:
    """Train a network that makes masks, by its name."""
    if name == "served":
        train_served(run, LineProgress())
    elif name.startswith("fold-"):
        fold_makers(run, int(name.removeprefix("fold-")))
    elif name.startswith("calibration-"):
        calibration_makers(run, int(name.removeprefix("calibration-")))
    else:
        train_test_maker(run, name)


def make_masks(run: Run, name: str) -> None:
    """Make the training masks of a fold."""
    training_masks(run, int(name))
