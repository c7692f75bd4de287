"""Masks as they are served, of patients that no network has seen: what a bundle's report card is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from segqc.networks.assessor import Assessor, calibrated_metrics
from segqc.progress import Progress
from segqc.quality.error_counts import SignedCounts, count_voxels
from segqc.quality.metrics import estimated_metrics, true_metrics
from segqc.quality.report_card import UnseenMask
from segqc.quality.witnesses import tta_agreement
from segqc.training.calibration import fit_structure
from segqc.training.cases import read_case
from segqc.training.crossfit import MaskSet
from segqc.types import Metrics, Structure
from segqc.volumes import Volume

_PARTS: Final = 10  # of the patients, each with calibrations that it has no part in


@dataclass(frozen=True, slots=True)
class CalibrationMasks:
    """The masks that a structure's calibration is fitted on: estimates as read off the maps, truths, and patients."""

    estimates: Sequence[Metrics]
    truths: Sequence[Metrics]
    patients: Sequence[str]

    def without(self, patients: set[str]) -> CalibrationMasks:
        """The masks of the other patients."""
        kept = [i for i, patient in enumerate(self.patients) if patient not in patients]
        estimates, truths = [self.estimates[i] for i in kept], [self.truths[i] for i in kept]
        return CalibrationMasks(estimates, truths, [self.patients[i] for i in kept])


@dataclass(frozen=True, slots=True)
class ServedMask:
    """One structure of a mask as it is served, before any line is put through the estimates."""

    patient: str
    scan: str
    raw: Metrics
    true: Metrics
    errors: SignedCounts
    tta: float


def served_masks(judge: Assessor, mask_set: MaskSet, members: int) -> tuple[ServedMask, ...]:
    """What a network that has not seen a case's patient makes of the mask as it would be served, by structure.

    Args:
        judge: the network, with calibrated maps.
        mask_set: all masks of the case; see `crossfit.masks_of`: the median, then the members of the augmentation
            group, of which the first one is the plain prediction.
        members: of the augmentation group.
    """
    scan, truth = read_case(mask_set.case, judge.values)
    median, *others = mask_set.masks
    served = others[0] if others else median
    errors = judge.error_maps(scan, Volume(served, scan.affine, scan.acquisition_axis))
    found = []
    for structure, error in zip(judge.structures, errors, strict=True):
        mask, true = structure.mask(served), structure.mask(truth.array)
        found.append(
            ServedMask(
                patient=mask_set.case.patient,
                scan=mask_set.case.id,
                raw=estimated_metrics(mask, error, empty=judge.empty_rule(scan)),
                true=true_metrics(mask, true),
                errors=count_voxels(error, mask != true, mask),
                tta=tta_agreement(median, others[:members], (structure,)),
            )
        )
    return tuple(found)


def unseen_masks(
    structures: Sequence[Structure],
    served: Sequence[Sequence[ServedMask]],
    fitted: Sequence[CalibrationMasks],
    progress: Progress,
) -> list[UnseenMask]:
    """Estimates of served masks by calibrations that were fitted without their patients.

    The scaling of the maps, two numbers, is of all patients.

    Args:
        structures: the structures.
        served: of each structure.
        fitted: of each structure, the masks that the model's calibration is fitted on.
        progress: called after each part.
    """
    patients = sorted({mask.patient for of_structure in served for mask in of_structure})
    parts = [set(part.tolist()) for part in np.array_split(np.array(patients, np.str_), _PARTS) if part.size]
    found = []
    for i, part in enumerate(parts):
        progress.step(i, len(parts), "report card", unit="parts")
        for structure, of_structure, masks in zip(structures, served, fitted, strict=True):
            others = masks.without(part)
            calibration = fit_structure(others.estimates, others.truths, others.patients)
            for mask in of_structure:
                if mask.patient not in part:
                    continue
                estimated = calibrated_metrics(mask.raw, calibration)
                intervals = calibration.intervals.of(mask.raw, estimated) if calibration.intervals is not None else None
                found.append(
                    UnseenMask(
                        patient=mask.patient,
                        scan=mask.scan,
                        structure=structure.name,
                        true=mask.true,
                        estimated=estimated,
                        interval=intervals.dice if intervals is not None else None,
                        errors=mask.errors,
                        witnesses={"tta": mask.tta},
                    )
                )
    return found
