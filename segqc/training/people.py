"""Train the network that judges people's masks: SegQC-Net again, with a mask skip, on experts' labels with errors.

A network's mask is wrong wherever the scan is hard, and holds little that the scan does not. A person's is right but
for a few errors, and where it is right it knows more than any network: there the mask is the best witness of the truth.
So the network begins at SegQC-Net's weights, gets the mask as a first answer (`segqc.networks.unet.MaskSkip`), and
learns from masks that are right, and right but for errors that people make (`segqc.training.implanted_errors`).
"""

from __future__ import annotations

import hashlib
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
from segqc.training.cases import label_values, read_case
from segqc.training.crossfit import MaskSet, folds_of, mean_dice, subsample
from segqc.training.engine import write_mean_curve
from segqc.training.implanted_errors import people_like_masks
from segqc.training.side_by_side import side_by_side
from segqc.training.spec import TrainingSettings
from segqc.types import LabelArray, Structure
from segqc.volumes import Volume, through_plane_axis

MASKS: Final = 24
"""Masks of one case that train or calibrate."""
_CORRECTED: Final = 6  # of these are masks of a network that somebody has corrected in part
_CORRECTED_SHARE: Final = (0.2, 0.8)  # of the slices that hold anything
_NO_FOLD: Final = -1  # of a network that sees the patients of all folds


def people_sets(sets: Sequence[MaskSet], structures: Sequence[Structure], seed: int) -> list[MaskSet]:
    """Masks as people make them of each case that was checked as a whole; a function of case and seed alone.

    Most are the expert's label with implanted errors or none. The others are masks of networks that have not seen the
    case, with the truth in some of the slices: so look masks that are corrected slice by slice, and what is left in
    them are a network's errors.

    Args:
        sets: the networks' masks of all cases.
        structures: the structures.
        seed: of all draws.

    Raises:
        CaseError: if a scan or its labels can't be used.
    """
    return [_people_set(of_networks, structures, seed) for of_networks in sets if of_networks.case.is_whole]


def _people_set(of_networks: MaskSet, structures: Sequence[Structure], seed: int) -> MaskSet:
    case = of_networks.case
    scan, labels = read_case(case, label_values(structures))
    truth = np.asarray(labels.array, np.uint8)
    of_case = int.from_bytes(hashlib.sha256(case.id.encode()).digest()[:8])
    rng = np.random.default_rng((seed, of_case))
    masks = [m.labels for m in people_like_masks(truth, scan, structures, MASKS - _CORRECTED, rng)]
    for number in rng.integers(len(of_networks.masks), size=_CORRECTED).tolist():
        masks.append(corrected_in_part(of_networks.masks[number], truth, scan, rng))
    return MaskSet(case, np.stack(masks), tuple(mean_dice(mask, truth, structures) for mask in masks))


def corrected_in_part(
    mask: LabelArray, truth: LabelArray, scan: Volume, rng: np.random.Generator, share: float | None = None
) -> LabelArray:
    """A mask with the truth in a share of the slices that hold anything, by default a random one.

    Args:
        mask: the label map (n0, n1, n2).
        truth: what is true.
        scan: for the through-plane axis.
        rng: the source of the draws.
        share: of the slices.
    """
    share = rng.uniform(*_CORRECTED_SHARE) if share is None else share
    axis = through_plane_axis(scan)
    there = np.flatnonzero(((mask > 0) | (truth > 0)).any(axis=tuple(a for a in range(3) if a != axis)))
    chosen = rng.permutation(there)[: round(share * len(there))]
    corrected = mask.copy()
    np.moveaxis(corrected, axis, 0)[chosen] = np.moveaxis(truth, axis, 0)[chosen]
    return corrected


def train_people(
    assessor: Assessor,
    sets: Sequence[MaskSet],
    patient_splits: dict[str, PatientSplit],
    settings: TrainingSettings,
    folder: Path,
    progress: Progress,
) -> Assessor:
    """Train and calibrate the network for people's masks, of as many members as SegQC-Net has.

    Each member begins at that of SegQC-Net that has not seen the patients of its fold, sees none of them either, and
    calibrates on them.

    Args:
        assessor: SegQC-Net, trained on these cases.
        sets: the networks' masks that it was trained on; cases that were checked in part have no part in it.
        patient_splits: fold and role of each patient.
        settings: SegQC-Net's.
        folder: for checkpoints and learning curves.
        progress: reports after each step.

    Raises:
        CaseError: if a scan or its labels can't be used.
    """
    masks = people_sets(sets, assessor.structures, settings.seed)
    train = [s for s in masks if patient_splits[s.case.patient].split == "train"]
    validating = [s for s in masks if patient_splits[s.case.patient].split == "validation"]
    networks = assessor.network.members if isinstance(assessor.network, MeanOfNetworks) else [assessor.network]
    folds = folds_of(masks, patient_splits) if len(networks) > 1 else [_NO_FOLD]
    plan = replace(assessor.card.plan, mask_skip=True)
    trainings = []
    for k, (fold, network) in enumerate(zip(folds, networks, strict=True)):
        trainings.append(
            partial(
                fit_assessor,
                f"for people's masks {k + 1} of {len(folds)}",
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
        (member, s)
        for fold, member in zip(folds, members, strict=True)
        for s in train
        if patient_splits[s.case.patient].fold == fold
    ]
    return calibrated_for_people(together, [*unseen, *((together, s) for s in validating)], progress)


def _settings(settings: TrainingSettings) -> TrainingSettings:
    """Those of SegQC-Net, for masks that are to be looked at as they are."""
    return replace(
        settings,
        epochs=settings.people_epochs,
        scan_only_share=0.0,
        empty_mask_share=0.0,
        mask_deformation=0.0,
        hide_mask=False,
    )
