"""The whole evaluation, step by step; every step keeps what it makes in the run folder and is not done twice."""

from __future__ import annotations

from collections.abc import Sequence

from segqc.evaluation.makers import (
    Manifest,
    own_masks,
    stratified_masks,
    test_maker_names,
    train_fold_makers,
    train_served,
    train_test_maker,
    training_masks,
)
from segqc.evaluation.methods import methods, train, trainings
from segqc.evaluation.run import Run, quiet, side_by_side
from segqc.evaluation.studies import STUDIES, StudyName, StudyResult, find_truths, judge_method, study_result
from segqc.training import Progress

ALL_STUDIES: tuple[StudyName, ...] = ("stratified", "served")


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
    side_by_side(run, train_mask_makers, [*test_maker_names(run), "served", *(f"fold-{k}" for k in folds)], progress)
    for manifest in (stratified_masks(run, progress), own_masks(run, progress)):
        _announce(manifest, progress)
    side_by_side(run, make_masks, [str(k) for k in folds], progress)
    side_by_side(run, train, trainings(run, ablations=ablations), progress)
    find_truths(run)
    compared = methods(ablations=ablations)
    side_by_side(run, judge_method, compared, progress)
    results = []
    for i, study in enumerate(studies):
        progress.step(i, len(studies), f"numbers of the study: {study}")
        name = f"results/{study}{'-ablations' if ablations else ''}.json"
        results.append(run.kept(name, STUDIES, lambda study=study: study_result(run, study, compared)))  # type: ignore[misc]
    progress.step(len(studies), len(studies), "numbers of the study: done")
    return results


def train_mask_makers(run: Run, name: str) -> None:
    """Train a network that makes masks, by its name."""
    if name == "served":
        train_served(run, quiet())
    elif name.startswith("fold-"):
        train_fold_makers(run, name.removeprefix("fold-"))
    else:
        train_test_maker(run, name)


def make_masks(run: Run, name: str) -> None:
    """Make the training masks of a fold."""
    training_masks(run, int(name))


def _announce(manifest: Manifest, progress: Progress) -> None:
    progress.step(1, 1, f"{len(manifest.masks)} test masks are fixed: by {len(manifest.makers)} networks")
