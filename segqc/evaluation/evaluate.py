"""The whole evaluation, step by step; every step keeps what it makes in the run folder and is not done twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter

from segqc.evaluation.cohort import CohortError
from segqc.evaluation.makers import (
    Manifest,
    correction_masks,
    own_masks,
    stratified_masks,
    test_maker_names,
    train_fold_makers,
    train_served,
    train_test_maker,
    training_masks,
)
from segqc.evaluation.methods import methods, train, trainings
from segqc.evaluation.observers import (
    ObserverStudy,
    find_double_readings,
    find_experts,
    read_structures,
    study_observers,
)
from segqc.evaluation.run import Run, side_by_side
from segqc.evaluation.studies import StudyName, StudyResult, find_truths, judge_method, study_result
from segqc.training import LineProgress, Progress

OBSERVERS = TypeAdapter(ObserverStudy)
MAKE_MASKS: Mapping[StudyName, Callable[[Run, Progress], Manifest]] = {
    "stratified": stratified_masks,
    "served": own_masks,
    "corrections": correction_masks,
}


def evaluate(
    run: Run, studies: Sequence[StudyName], progress: Progress, *, ablations: bool = False
) -> list[StudyResult]:
    """Run studies, or what is left of them.

    The test masks are fixed before any method is trained.

    Args:
        run: the run folder.
        studies: which studies.
        progress: told after each step.
        ablations: whether to train and compare the variants as well.
    """
    folds = range(run.settings.folds)
    makers = [*(test_maker_names(run) if "stratified" in studies else ()), "served", *(f"fold-{k}" for k in folds)]
    side_by_side(run, train_mask_makers, makers, progress)
    for study in studies:
        manifest = MAKE_MASKS[study](run, progress)
        progress.step(1, 1, f"{study}: {len(manifest.masks)} masks by {len(manifest.makers)} networks are fixed")
    side_by_side(run, make_masks, [str(k) for k in folds], progress)
    side_by_side(run, train, trainings(run, ablations=ablations), progress)
    compared = methods(ablations=ablations)
    results = []
    for study in studies:
        find_truths(run, study)
        side_by_side(run, judge_method, [f"{study}/{method}" for method in compared], progress)
        results.append(study_result(run, study, progress, ablations=ablations))
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
        except ValueError as error:
            raise CohortError(str(error)) from error

    if not folder.is_dir():
        raise CohortError(f"{folder}: no such folder; name one of two experts' label files")
    return run.kept(f"results/observers-{folder.resolve().name}.json", OBSERVERS, make)


def train_mask_makers(run: Run, name: str) -> None:
    """Train a network that makes masks, by its name."""
    if name == "served":
        train_served(run, LineProgress())
    elif name.startswith("fold-"):
        train_fold_makers(run, name.removeprefix("fold-"))
    else:
        train_test_maker(run, name)


def make_masks(run: Run, name: str) -> None:
    """Make the training masks of a fold."""
    training_masks(run, int(name))
