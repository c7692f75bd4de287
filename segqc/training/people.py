"""Train the network that judges people's masks: SegQC-Net again, with a mask skip, on experts' labels with errors.

A network's mask is wrong wherever the scan is hard, and holds little that the scan does not. A person's is right but
for a few errors, and where it is right it knows more than any network: there the mask is the best witness of the truth.
So the network begins at SegQC-Net's weights, gets the mask as a first answer (`segqc.networks.unet.MaskSkip`), and
learns from masks that are right, and right but for errors that people make (`segqc.training.implanted_errors`), and
from labels that somebody has corrected.

Where several people have labelled a scan, voxels in which they differ are left out of its loss, for all structures and
whatever the mask holds: the target is the truth, and there nobody knows it. Its calibration compares masks, and there
a voxel is right if one of these people says what the mask says.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from segqc.networks.assessor import Assessor
from segqc.networks.unet import MeanOfNetworks
from segqc.progress import Progress
from segqc.quality.variability import nearest_truth
from segqc.split import PatientSplit
from segqc.training.assessor_calibration import VALIDATION_MASKS, calibrated_for_people
from segqc.training.assessor_network import Beginning, ensemble, fit_assessor
from segqc.training.cases import Case, EarlierLabel, label_values, read_case, whole_cases
from segqc.training.crossfit import MaskSet, mean_dice, subsample
from segqc.training.engine import write_mean_curve
from segqc.training.implanted_errors import ERROR_KINDS, ErrorKind, people_like_masks
from segqc.training.side_by_side import side_by_side
from segqc.training.spec import TrainingSettings
from segqc.types import LabelArray, Structure
from segqc.volumes import Volume, VolumeError, read_labels, through_plane_axis
from segqc.volumes.slices import unchanged

logger = logging.getLogger(__name__)

MASKS: Final = 24
"""Masks of one case that train, at most."""
_CALIBRATING: Final = 8  # of these calibrate: each is looked at twice, and more of one patient say little new
_CORRECTED_SHARE: Final = 1 / 8  # of a case's masks, at most, are labels that were corrected
_MIN_DICE: Final = 0.5  # to which errors are implanted; what is further off is another label, and none with errors
_NO_FOLD: Final = -1  # of a network that sees the patients of all folds


def people_sets(
    cases: Sequence[Case],
    structures: Sequence[Structure],
    seed: int,
    *,
    count: int = MASKS,
    corrected: int = 0,
    kinds: Sequence[ErrorKind] = ERROR_KINDS,
) -> list[MaskSet]:
    """Masks as people make them of each case that was checked as a whole; a function of case, kinds and seed alone.

    The last ones are earlier labels of the case, which somebody has corrected. More of the others begin with the same.

    Masks of networks that somebody has corrected in part are not among them: what is left of the network's contour is
    an error by the expert's label and right by whoever let it be, and in a trial estimates of both kinds became worse.

    Args:
        cases: the cases.
        structures: the structures.
        seed: of what is implanted and drawn.
        count: how many masks of a case have implanted errors, or none.
        corrected: how many of its earlier labels there are with these, at most.
        kinds: the errors that are implanted.

    Raises:
        CaseError: if a scan or its labels can't be used.
    """
    return [_people_set(case, structures, seed, count, corrected, kinds) for case in whole_cases(cases)]


def _people_set(
    case: Case,
    structures: Sequence[Structure],
    seed: int,
    count: int,
    corrected: int,
    kinds: Sequence[ErrorKind],
) -> MaskSet:
    values = label_values(structures)
    scan, labels = read_case(case, values)
    truth = np.asarray(labels.array, np.uint8)
    of_case = int.from_bytes(hashlib.sha256(case.id.encode()).digest()[:8])
    made = people_like_masks(truth, scan, structures, count, np.random.default_rng((seed, of_case)), kinds=kinds)
    masks = [m.labels for m in made]
    read = (_read_further(case, path, scan, values) for path in case.observers)
    # the reader whose label became the final one is no other
    observers = tuple(o for o in read if o is not None and not np.array_equal(o, truth))

    def dice(mask: LabelArray) -> float:
        return mean_dice(mask, nearest_truth(mask, truth, observers), structures)

    for i in np.random.default_rng((seed, of_case, 1)).permutation(len(case.earlier)):
        if len(masks) == count + corrected:
            break
        mask = _persons_own(case, case.earlier[i], scan, values)
        if mask is not None and not np.array_equal(mask, truth) and dice(mask) >= _MIN_DICE:
            masks.append(mask)
    return MaskSet(case, np.stack(masks), tuple(map(dice, masks)), observers=observers)


def _persons_own(case: Case, earlier: EarlierLabel, scan: Volume, values: Sequence[int]) -> LabelArray | None:
    """An earlier label in which no slice is still as a network made it; None where there is one."""
    labels = _read_further(case, earlier.labels, scan, values)
    if labels is None or earlier.made_of is None:
        return labels
    made_of = _read_further(case, earlier.made_of, scan, values)
    is_own = made_of is not None and not unchanged(made_of, labels, through_plane_axis(scan))
    return labels if is_own else None


def _read_further(case: Case, path: Path, scan: Volume, values: Sequence[int]) -> LabelArray | None:
    """Another label map of a case, which can do without one that can't be used, as it holds values of other days."""
    try:
        return np.asarray(read_labels(path, scan=scan, values=values, limits=case.limits).array, np.uint8)
    except (VolumeError, OSError) as error:
        logger.warning("the scan %r trains without one of its other labels: %s", case.id, error)
        return None


def train_people(
    assessor: Assessor,
    cases: Sequence[Case],
    patient_splits: dict[str, PatientSplit],
    settings: TrainingSettings,
    folder: Path,
    progress: Progress,
    *,
    kinds: Sequence[ErrorKind] = ERROR_KINDS,
    fit_member: Callable[..., Assessor] = fit_assessor,
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
        fit_member: what trains a member; called as `fit_assessor` is, and can be pickled.

    Raises:
        CaseError: if a scan or its labels can't be used.
    """
    splits = {case.id: patient_splits[case.patient].split for case in cases}
    training, others = ([c for c in whole_cases(cases) if splits[c.id] == split] for split in ("train", "validation"))
    draws = settings.people_epochs * settings.steps_per_epoch * settings.batch
    count = min(MASKS, max(_CALIBRATING, math.ceil(draws / max(1, len(training)))))  # others would hardly be drawn
    corrected = int(_CORRECTED_SHARE * count)
    train = people_sets(training, assessor.structures, settings.seed, count=count, corrected=corrected, kinds=kinds)
    validating = people_sets(others, assessor.structures, settings.seed, count=_CALIBRATING, kinds=kinds)
    networks = assessor.network.members if isinstance(assessor.network, MeanOfNetworks) else [assessor.network]
    of_training = {p.fold for c in cases if (p := patient_splits[c.patient]).split == "train"}
    folds = sorted(of_training) if len(networks) > 1 else [_NO_FOLD]
    if not all(any(patient_splits[s.case.patient].fold != fold for s in train) for fold in folds):
        progress.message("No network for people's masks: too few scans with a label that was checked as a whole.")
        return None
    if sentence := _further_labels_in_words(train, validating, count):
        progress.message(sentence)
    plan = replace(assessor.card.plan, mask_skip=True)
    trainings = []
    for k, (fold, network) in enumerate(zip(folds, networks, strict=True)):
        trainings.append(
            partial(
                fit_member,
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


def _further_labels_in_words(train: Sequence[MaskSet], validating: Sequence[MaskSet], count: int) -> str:
    """A sentence on what is learned from other labels of the scans than those that count; empty where nothing is."""
    corrected = sum(len(s.masks) - count for s in train)
    read = sum(bool(s.observers) for s in (*train, *validating))
    found = []
    if corrected:
        found.append(f"learns from {corrected} label{'s' * (corrected > 1)} that somebody has corrected, too")
    if read:
        found.append(f"leaves out voxels in which people's labels of {read} scan{'s' * (read > 1)} differ")
    return f"The network for people's masks {', and '.join(found)}." if found else ""


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
