"""Train the network that judges people's masks: SegQC-Net again, with a mask skip, on experts' labels with errors.

A network's mask is wrong wherever the scan is hard, and holds little that the scan does not. A person's is right but
for a few errors, and where it is right it knows more than any network: there the mask is the best witness of the truth.
So the network begins at SegQC-Net's weights, gets the mask as a first answer (`segqc.networks.unet.MaskSkip`), and
learns from masks that are right, and right but for errors that people make (`segqc.training.implanted_errors`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from segqc.networks.assessor import Assessor
from segqc.networks.unet import MeanOfNetworks
from segqc.progress import Progress
from segqc.split import PatientSplit
from segqc.training.assessor_calibration import VALIDATION_MASKS, calibrated_for_people
from segqc.training.assessor_network import Beginning, ensemble, fit_assessor
from segqc.training.cases import Case, label_values, read_case, whole_cases
from segqc.training.crossfit import MaskSet, mean_dice, subsample
from segqc.training.engine import write_mean_curve
from segqc.training.implanted_errors import ERROR_KINDS, ErrorKind, people_like_masks
from segqc.training.side_by_side import side_by_side
from segqc.training.spec import TrainingSettings
from segqc.types import Structure

MASKS: Final = 24
"""Masks of one case that train, at most."""
_CALIBRATING: Final = 8  # of these calibrate: each is looked at twice, and more of one patient say little new
_NO_FOLD: Final = -1  # of a network that sees the patients of all folds


def people_sets(
    cases: Sequence[Case],
    structures: Sequence[Structure],
    seed: int,
    *,
    count: int = MASKS,
    kinds: Sequence[ErrorKind] = ERROR_KINDS,
) -> list[MaskSet]:
    """Masks as people make them of each case that was checked as a whole; a function of case, kinds and seed alone.

    More of them begin with the same ones; their errors are of these kinds.

    Masks of networks that somebody has corrected in part are not among them: what is left of the network's contour is
    an error by the expert's label and right by whoever let it be, and in a trial estimates of both kinds became worse.

    Raises:
        CaseError: if a scan or its labels can't be used.
    """
    return [_people_set(case, structures, seed, count, kinds) for case in whole_cases(cases)]


def _people_set(
    case: Case, structures: Sequence[Structure], seed: int, count: int, kinds: Sequence[ErrorKind]
) -> MaskSet:
    scan, labels = read_case(case, label_values(structures))
    truth = np.asarray(labels.array, np.uint8)
    of_case = int.from_bytes(hashlib.sha256(case.id.encode()).digest()[:8])
    made = people_like_masks(truth, scan, structures, count, np.random.default_rng((seed, of_case)), kinds=kinds)
    masks = np.stack([m.labels for m in made])
    return MaskSet(case, masks, tuple(mean_dice(mask, truth, structures) for mask in masks))


def train_people(
    assessor: Assessor,
    cases: Sequence[Case],
    patient_splits: dict[str, PatientSplit],
    settings: TrainingSettings,
    folder: Path,
    progress: Progress,
    *,
    kinds: Sequence[ErrorKind] = ERROR_KINDS,
) -> Assessor | None:
    """Train and calibrate the network for people's masks, of as many members as SegQC-Net has.

    Each member begins at that of SegQC-Net that has not seen the patients of its fold, sees none of them either, and
    calibrates on them. There is no such network where a member has no case to learn from that was checked as a whole.

    Args:
        assessor: SegQC-Net, trained on these cases.
        cases: the labelled cases; those that were checked in part have no part in it.
        patient_splits: fold and role of each patient.
        settings: SegQC-Net's.
        folder: for checkpoints and learning curves.
        progress: reports after each step.
        kinds: the errors that it learns from, and is calibrated on.

    Raises:
        CaseError: if a scan or its labels can't be used.
    """
    splits = {case.id: patient_splits[case.patient].split for case in cases}
    training, others = ([c for c in whole_cases(cases) if splits[c.id] == split] for split in ("train", "validation"))
    draws = settings.people_epochs * settings.steps_per_epoch * settings.batch
    count = min(MASKS, max(_CALIBRATING, math.ceil(draws / max(1, len(training)))))  # others would hardly be drawn
    train = people_sets(training, assessor.structures, settings.seed, count=count, kinds=kinds)
    validating = people_sets(others, assessor.structures, settings.seed, count=_CALIBRATING, kinds=kinds)
    networks = assessor.network.members if isinstance(assessor.network, MeanOfNetworks) else [assessor.network]
    of_training = {p.fold for c in cases if (p := patient_splits[c.patient]).split == "train"}
    folds = sorted(of_training) if len(networks) > 1 else [_NO_FOLD]
    if not all(any(patient_splits[s.case.patient].fold != fold for s in train) for fold in folds):
        progress.message("No network for people's masks: too few scans with a label that was checked as a whole.")
        return None
    plan = replace(assessor.card.plan, mask_skip=True)
    trainings = []
    for k, (fold, network) in enumerate(zip(folds, networks, strict=True)):
        trainings.append(
            partial(
                fit_assessor,
                f"network for people's masks {k + 1} of {len(folds)}",
                plan,
                [s for s in train if patient_splits[s.case.patient].fold != fold],
                [subsample(s, VALIDATION_MASKS) for s in validating],
                assessor.structures,
                replace(_settings(settings), seed=settings.seed + k),
                folder / f"member-{k}",
                begin_at=Beginning(network.state_dict(), assessor.version),
                unseen=[patient for patient, p in patient_splits.items() if p.split == "train" and p.fold == fold],
            )
        )
    members = list(side_by_side(trainings, settings, progress))
    write_mean_curve([folder / f"member-{k}" for k in range(len(members))], folder)
    together = ensemble(members) if len(members) > 1 else members[0]
    unseen = [
        (member, _first(s, _CALIBRATING))
        for fold, member in zip(folds, members, strict=True)
        for s in train
        if patient_splits[s.case.patient].fold == fold
    ]
    unseen += [(together, _first(s, _CALIBRATING)) for s in validating]
    return calibrated_for_people(together, unseen, progress)


def _first(mask_set: MaskSet, count: int) -> MaskSet:
    """So many masks of a case, which were drawn at random."""
    return replace(mask_set, masks=mask_set.masks[:count], dice=mask_set.dice[:count])


def _settings(settings: TrainingSettings) -> TrainingSettings:
    """Those of SegQC-Net, for masks that are to be looked at as they are."""
    return replace(
        settings,
        epochs=settings.people_epochs,
        start="scratch",  # that is at SegQC-Net
        scan_only_share=0.0,
        empty_mask_share=0.0,
        mask_deformation=0.0,
        hide_mask=False,
    )
