"""Train SegQC-Net on cross-fitted masks and calibrate its estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from segqc.networks.assessor import Assessor
from segqc.networks.bundle import FOLDS
from segqc.networks.plan import NetworkPlan
from segqc.networks.segmenter import Segmenter
from segqc.progress import Progress, WholeEstimate
from segqc.split import PatientSplit
from segqc.training.assessor_calibration import VALIDATION_MASKS, calibrated
from segqc.training.assessor_network import ensemble, fit_assessor
from segqc.training.cases import (
    Case,
    TooFewCases,
    label_values,
)
from segqc.training.crossfit import MaskSet, crossfit_masks, folds_of, subsample
from segqc.training.engine import STEPS, write_mean_curve
from segqc.training.people import train_people
from segqc.training.segmentation import check_enough, counted, plan_for, sizes, usable_cases
from segqc.training.side_by_side import side_by_side
from segqc.training.spec import TrainingSettings
from segqc.types import Structure


def train_assessor(
    cases: Sequence[Case],
    structures: Sequence[Structure],
    patient_splits: dict[str, PatientSplit],
    settings: TrainingSettings,
    folder: Path,
    progress: Progress,
) -> Assessor:
    """Train SegQC-Net: cross-fitted masks, the training proper, the calibration on patients that validate.

    Of cases that were checked in part, only the checked slices train; they neither validate nor calibrate.

    Args:
        cases: all labelled cases.
        structures: the structures to assess.
        patient_splits: fold and role of each patient, as `segqc.split.place` gives them.
        settings: how to train.
        folder: for the folds' networks, which are kept there as `FOLDS`, the masks, checkpoint and learning curve.
        progress: reports after each step.

    Raises:
        TooFewCases: with fewer labelled patients than ``settings.min_cases``, or all of them in one fold.
        VolumeError: if a scan or a label file can't be used.
    """
    cases = usable_cases(cases, patient_splits)
    check_enough(cases, settings, "SegQC")
    if len({patient_splits[c.patient].fold for c in cases if patient_splits[c.patient].split == "train"}) < 2:
        raise TooFewCases("the SegQC network needs training patients in at least two folds; label more scans first")
    values = label_values(structures)
    plan = plan_for(cases, settings, in_channels=1, out_channels=1 + len(values))
    folds = len({patient_splits[c.patient].fold for c in cases})
    members = len({p.fold for c in cases if (p := patient_splits[c.patient]).split == "train"})
    members = members if settings.ensemble else 1
    progress.message(
        f"SegQC-Net, on {counted(cases)}: first {folds} segmentation networks, one per fold, of {settings.fold_epochs} "
        f"epochs each, whose masks it learns from; then {members} SegQC-Net{'s' if members > 1 else ''} of at most "
        f"{settings.epochs} epochs each, and for people's masks {settings.people_epochs} more. {sizes(plan, settings)}"
    )
    epochs = folds * settings.fold_epochs + members * (settings.epochs + settings.people_epochs)
    progress = WholeEstimate(progress, epochs * settings.steps_per_epoch, STEPS)
    sets = _masks_of_folds(cases, structures, patient_splits, plan, settings, folder, progress)
    assessor = train_on_masks(sets, structures, patient_splits, settings, folder, progress)
    if not settings.trains_people:
        return assessor
    people = train_people(assessor, cases, patient_splits, settings, folder / "people", progress)
    return assessor if people is None else assessor.with_people(people)


def _masks_of_folds(
    cases: Sequence[Case],
    structures: Sequence[Structure],
    patient_splits: dict[str, PatientSplit],
    plan: NetworkPlan,
    settings: TrainingSettings,
    folder: Path,
    progress: Progress,
) -> list[MaskSet]:
    """The masks by the networks of the folds, which are kept in a file and not in the memory."""
    made = crossfit_masks(cases, structures, patient_splits, plan, settings, folder, progress)
    Segmenter.save_members(made.networks, folder / FOLDS)
    return made.sets


def train_on_masks(
    sets: Sequence[MaskSet],
    structures: Sequence[Structure],
    patient_splits: dict[str, PatientSplit],
    settings: TrainingSettings,
    folder: Path,
    progress: Progress,
) -> Assessor:
    """Train SegQC-Net on given masks; the caller vouches that no source network of a mask has seen its scan's label.

    With ``settings.ensemble`` there is one network per fold, trained without the fold's patients; all answer together.
    Each calibrates on the patients that it has not seen, so that all labelled scans do, and not only those that
    validate.
    """
    train = [s for s in sets if patient_splits[s.case.patient].split == "train"]
    folds = folds_of(sets, patient_splits)
    if not settings.ensemble or len(folds) < 2:
        plan, validation = _plan_of(sets, structures, settings), _validation(sets, patient_splits)
        assessor = fit_assessor("SegQC-Net", plan, train, validation, structures, settings, folder, progress)
        unseen = [(assessor, s) for s in _validating(sets, patient_splits)]
        return calibrated(assessor, train, unseen, settings, progress)
    common = sets, structures, patient_splits, settings, folder
    members = list(side_by_side([partial(train_member, k, *common) for k in range(len(folds))], settings, progress))
    write_mean_curve([folder / f"member-{k}" for k in range(len(folds))], folder)
    unseen = [
        (member, s)
        for fold, member in zip(folds, members, strict=True)
        for s in train
        if s.case.is_whole and patient_splits[s.case.patient].fold == fold
    ]
    together = ensemble(members)
    unseen += [(together, s) for s in _validating(sets, patient_splits)]
    return calibrated(together, train, unseen, settings, progress)


def train_member(
    number: int,
    sets: Sequence[MaskSet],
    structures: Sequence[Structure],
    patient_splits: dict[str, PatientSplit],
    settings: TrainingSettings,
    folder: Path,
    progress: Progress,
) -> Assessor:
    """Train the ensemble's network of a fold, by the fold's number; `train_on_masks` takes it over where it is done.

    Members may be trained side by side, in processes of their own. Other arguments as of `train_on_masks`.
    """
    folds = folds_of(sets, patient_splits)
    trained = [
        s
        for s in sets
        if patient_splits[s.case.patient].split == "train" and patient_splits[s.case.patient].fold != folds[number]
    ]
    return fit_assessor(
        f"SegQC-Net {number + 1} of {len(folds)}",
        _plan_of(sets, structures, settings),
        trained,
        _validation(sets, patient_splits),
        structures,
        replace(settings, seed=settings.seed + number),
        folder / f"member-{number}",
        progress,
        unseen=[patient for patient, p in patient_splits.items() if p.split == "train" and p.fold == folds[number]],
    )


def _plan_of(sets: Sequence[MaskSet], structures: Sequence[Structure], settings: TrainingSettings) -> NetworkPlan:
    return plan_for([s.case for s in sets], settings, in_channels=1 + len(structures), out_channels=len(structures))


def _validation(sets: Sequence[MaskSet], patient_splits: dict[str, PatientSplit]) -> list[MaskSet]:
    """A few masks of each case that validates: more would make validating longer than training, and say little new."""
    return [subsample(s, VALIDATION_MASKS) for s in _validating(sets, patient_splits)]


def _validating(sets: Sequence[MaskSet], patient_splits: dict[str, PatientSplit]) -> list[MaskSet]:
    return [s for s in sets if s.case.is_whole and patient_splits[s.case.patient].split == "validation"]
