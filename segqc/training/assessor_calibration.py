"""Calibrate SegQC-Net on masks of patients that it has not seen, and note what its estimates are worth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from segqc.networks.assessor import Assessor, witnesses_of
from segqc.networks.encoder import encoders
from segqc.networks.segmenter import SoftOutput
from segqc.progress import Progress
from segqc.quality.boxes import largest_box_area_mm2, largest_evidence
from segqc.quality.calibration import (
    MapCalibration,
    StructureCalibration,
    TrainingSizes,
    log_volume,
    training_sizes,
)
from segqc.quality.error_counts import SignedCounts, count_voxels
from segqc.quality.error_maps import difference
from segqc.quality.metrics import true_metrics
from segqc.quality.report_card import UnseenMask, report_card
from segqc.quality.unlikeness import ScanFeatures, fit_unlikeness
from segqc.quality.variability import nearest_truth
from segqc.training.calibration import HeldOutMask, KnownMap, KnownMask, fit_map, fit_masks, held_out_masks, known_map
from segqc.training.cases import (
    Case,
    label_values,
    read_case,
    whole_cases,
)
from segqc.training.crossfit import MaskSet, sources_of_masks, subsample
from segqc.training.spec import TrainingSettings
from segqc.training.unseen import ServedErrors, served_errors, unseen_masks
from segqc.types import FloatArray, LabelArray, MaskKind, Structure
from segqc.volumes import Volume, through_plane_axis

VALIDATION_MASKS = 4  # of one case, for early stopping and calibration
FOUND_IN_RIGHT = 0.2  # the share of right masks in which an error may be found, of any structure


def calibrated(
    assessor: Assessor,
    train: Sequence[MaskSet],
    unseen: Sequence[tuple[Assessor, MaskSet]],
    settings: TrainingSettings,
    progress: Progress,
) -> Assessor:
    """Fit each structure's calibrations and intervals on masks of unseen patients, and note what they are worth.

    The largest error box is noted, too, and what scans are compared with.

    Served masks, one of each scan, are calibrated by themselves, as they are much alike; strange ones on masks that are
    spread over the qualities (`subsample`): their intervals are those of a random mask of such a spread.

    Args:
        assessor: what is calibrated.
        train: the masks that it was trained on.
        unseen: masks, each with the network that estimates it and has not trained from its patient: a member of the
            ensemble, or the assessor itself for patients that validate, though its best epoch was chosen by them. Their
            cases were checked as a whole.
        settings: how the masks were made.
        progress: called after each case.
    """
    structures = assessor.structures
    spread = [(judge, subsample(s, VALIDATION_MASKS)) for judge, s in unseen]
    maps = _fit_maps(assessor, spread, progress)
    assessor = with_maps(assessor, maps)
    judges = {id(judge): with_maps(judge, maps) for judge, _ in unseen}
    cases = {s.case.id: s.case for s in (*train, *(s for _, s in unseen))}
    volumes = _log_volumes(whole_cases(list(cases.values())), structures)
    members = sources_of_masks(1, settings).count(0) - 1
    known: dict[MaskKind, list[tuple[KnownMask, ...]]] = {"served": [], "strange": []}
    errors: list[tuple[ServedErrors, ...]] = []
    for i, (judge, mask_set) in enumerate(unseen):
        progress.step(i, len(unseen), "calibration")
        case = mask_set.case
        others = {
            patient: v for patient, v in volumes.items() if patient in judge.card.seen and patient != case.patient
        }
        look = _Unseen(judges[id(judge)], case, *read_case(case, assessor.values), _sizes(others, len(structures)))
        for mask in subsample(mask_set, VALIDATION_MASKS).masks:
            known["strange"].append(look.at(mask, look.error_maps(mask)))
        if (served := mask_set.served) is not None:
            maps_of_served = look.error_maps(served.mask)
            known["served"].append(look.at(served.mask, maps_of_served, served.soft))
            truth, group = np.asarray(look.truth.array, np.uint8), list(mask_set.masks[: 1 + members])
            errors.append(served_errors(structures, maps_of_served, served.mask, truth, group))
    of_structure = [{kind: [row[k] for row in rows] for kind, rows in known.items()} for k in range(len(structures))]
    fitted = {
        kind: fit_masks(kind, [of[kind] for of in of_structure])
        for kind, rows in known.items()
        if rows or kind == "strange"
    }
    whole = [s for s in train if s.case.is_whole]
    sizes, boxes = _sizes(volumes, len(structures)), _largest_boxes(whole, structures, assessor.values)
    calibration = tuple(
        StructureCalibration({kind: of_all[k] for kind, of_all in fitted.items()}, sizes[k], boxes[k])
        for k in range(len(structures))
    )
    unlikeness = fit_unlikeness(_scan_features(assessor, train, unseen, progress))
    held_out_scans = {} if unlikeness is None else unlikeness[1]
    kind: MaskKind = "served" if known["served"] else "strange"
    held_out = [
        held_out_masks(kind, of_kind[kind], c.of(kind)) if of_kind[kind] else ()
        for c, of_kind in zip(calibration, of_structure, strict=True)
    ]
    unseen_served = [
        mask
        for k, structure in enumerate(structures)
        for mask in unseen_masks(structure, held_out[k] if errors else (), [row[k] for row in errors], held_out_scans)
    ]
    mean_errors = {s.name: _mean_error(masks) for s, masks in zip(structures, held_out, strict=True)}
    accurate = {name: error for name, error in mean_errors.items() if error is not None}
    card = replace(
        assessor.card,
        calibration=calibration,
        scores={f"dice error {name}": error for name, error in accurate.items()},
        accuracy=1.0 - sum(accurate.values()) / len(accurate) if accurate else None,
        report=report_card(unseen_served, checks_all=settings.ensemble),
        unlikeness=None if unlikeness is None else unlikeness[0],
    )
    return assessor.with_card(card)


def calibrated_for_people(
    assessor: Assessor, unseen: Sequence[tuple[Assessor, MaskSet]], progress: Progress
) -> Assessor:
    """Fit the calibrations, intervals and least evidences of a network for people's masks on those of unseen patients.

    What its estimates are worth is noted, too. Where observers of a case differ, a mask is right if it agrees with one
    of them (`nearest_truth`). Arguments as of `calibrated`.
    """
    maps = _fit_maps(assessor, unseen, progress)
    judges = {id(judge): with_maps(judge, maps) for judge, _ in unseen}
    known: list[tuple[KnownMask, ...]] = []
    errors: list[tuple[SignedCounts, ...]] = []
    of_right_masks: list[list[float]] = [[] for _ in assessor.structures]
    for i, (judge, mask_set) in enumerate(unseen):
        progress.step(i, len(unseen), "calibration for people's masks")
        scan, truth = read_case(mask_set.case, assessor.values)
        sizes = [None] * len(assessor.structures)
        look = _Unseen(judges[id(judge)], mask_set.case, scan, truth, sizes, mask_set.observers)
        for mask in mask_set.masks:
            of_mask = look.error_maps(mask)
            known.append(look.at(mask, of_mask))
            errors.append(look.errors(mask, of_mask))
        for found, evidence in zip(of_right_masks, look.evidence_of_truth(), strict=True):
            found.append(evidence)
    of_structure = [[row[k] for row in known] for k in range(len(assessor.structures))]
    fitted = fit_masks("person", of_structure)
    allowed = int(FOUND_IN_RIGHT / len(fitted) * len(unseen))
    calibration = tuple(
        StructureCalibration({"person": replace(calibrated_masks, least_evidence=least_evidence(evidences, allowed))})
        for calibrated_masks, evidences in zip(fitted, of_right_masks, strict=True)
    )
    held_out = [
        UnseenMask(
            patient=mask.known.patient,
            scan=f"{mask.known.scan}, mask {number}",  # each mask counts by itself, and the patient is the unit
            structure=structure.name,
            true=mask.known.true,
            estimated=mask.estimated,
            interval=mask.interval,
            errors=errors[number][k],
        )
        for k, structure in enumerate(assessor.structures)
        for number, mask in enumerate(held_out_masks("person", of_structure[k], fitted[k]) if known else ())
    ]
    report = report_card(held_out, checks_all=assessor.card.members > 1) if held_out else None
    return assessor.with_card(replace(assessor.card, map_calibration=maps, calibration=calibration, report=report))


def least_evidence(evidences: Sequence[float], allowed: int) -> float:
    """The evidence that only so many right masks exceed; at least that of an error that is as likely as not.

    Masks count, and not their boxes: of a few scans that are unlike all others, whatever the mask, each has many.

    Example:
        >>> least_evidence([1.0, 7.5, 3.0, 5.0], allowed=1)
        5.0
        >>> least_evidence([1.0], allowed=1)
        0.0
    """
    falling = sorted(evidences, reverse=True)
    return max(0.0, falling[allowed]) if len(falling) > allowed else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Unseen:
    """A case, and a network that has not trained from its patient.

    ``sizes`` are of the others' structures, ``observers`` other people's label maps of the case.
    """

    judge: Assessor
    case: Case
    scan: Volume
    truth: Volume
    sizes: Sequence[TrainingSizes | None]
    observers: Sequence[LabelArray] = ()

    def error_maps(self, mask: LabelArray) -> FloatArray:
        """The error maps of a mask: (L, n0, n1, n2)."""
        return self.judge.error_maps(self.scan, self._on_grid(mask))

    def evidence_of_truth(self) -> list[float]:
        """The largest evidence of an error of each structure in the right mask."""
        maps = self.error_maps(np.asarray(self.truth.array, np.uint8))
        return [largest_evidence(error, through_plane_axis(self.scan)) for error in maps]

    def at(
        self, mask: LabelArray, errors: FloatArray, soft: Sequence[SoftOutput] | None = None
    ) -> tuple[KnownMask, ...]:
        """What is said, and what is true, of each structure of a mask.

        Args:
            mask: the label map.
            errors: its error maps.
            soft: what its network says of it.
        """
        raw = self.judge.map_metrics(self.scan, self._on_grid(mask), errors)
        truth, found = self._truth_of(mask), []
        for k, structure in enumerate(self.judge.structures):
            held = structure.mask(mask)
            true = true_metrics(held, structure.mask(truth))
            witnesses = witnesses_of(held, self.scan, soft[k] if soft else None, self.sizes[k])
            found.append(KnownMask(self.case.patient, self.case.id, raw[k], true, witnesses))
        return tuple(found)

    def errors(self, mask: LabelArray, errors: FloatArray) -> tuple[SignedCounts, ...]:
        """The voxels of error maps (L, n0, n1, n2) against the true errors of a mask, of each structure."""
        truth, found = self._truth_of(mask), []
        for structure, error in zip(self.judge.structures, errors, strict=True):
            held = structure.mask(mask)
            found.append(count_voxels(error, difference(held, structure.mask(truth)), held))
        return tuple(found)

    def _truth_of(self, mask: LabelArray) -> LabelArray:
        return nearest_truth(mask, np.asarray(self.truth.array, np.uint8), self.observers)

    def _on_grid(self, mask: LabelArray) -> Volume:
        return Volume(mask, self.scan.affine, self.scan.acquisition_axis)


def _scan_features(
    assessor: Assessor, train: Sequence[MaskSet], unseen: Sequence[tuple[Assessor, MaskSet]], progress: Progress
) -> list[ScanFeatures]:
    """The features of all scans by each network of the assessor; none where it has none. Arguments as of `calibrated`.

    All are made as those of a scan that is served: around the mask of a network that has not seen it.
    """
    networks = encoders(assessor.network)
    unseen_by: dict[str, set[int]] = defaultdict(set)
    for judge, mask_set in unseen:
        own = {id(network) for network in encoders(judge.network)}
        unseen_by[mask_set.case.id] |= {k for k, network in enumerate(networks) if id(network) in own}
    sets, found = {s.case.id: s for s in (*train, *(s for _, s in unseen))}, list[ScanFeatures]()
    for i, (name, mask_set) in enumerate(sets.items()):
        progress.step(i, len(sets), "features of the scans")
        scan, _ = read_case(mask_set.case, assessor.values)
        mask = mask_set.masks[0] if mask_set.served is None else mask_set.served.mask
        features = assessor.scan_features(scan, Volume(mask, scan.affine, scan.acquisition_axis))
        if features is not None:
            found.append(ScanFeatures(mask_set.case.patient, name, features, tuple(sorted(unseen_by[name]))))
    return found


def _log_volumes(cases: Sequence[Case], structures: Sequence[Structure]) -> dict[str, list[float]]:
    """Each patient's mean log volume of each structure."""
    found: dict[str, list[list[float]]] = defaultdict(list)
    for case in cases:
        scan, truth = read_case(case, label_values(structures))
        found[case.patient].append([log_volume(s.mask(truth.array), scan.voxel_volume_mm3) for s in structures])
    return {patient: np.mean(volumes, axis=0).tolist() for patient, volumes in found.items()}


def _sizes(volumes: Mapping[str, Sequence[float]], structures: int) -> list[TrainingSizes | None]:
    return [training_sizes([of_patient[k] for of_patient in volumes.values()]) for k in range(structures)]


def _fit_maps(
    assessor: Assessor, unseen: Sequence[tuple[Assessor, MaskSet]], progress: Progress
) -> tuple[MapCalibration, ...]:
    known: list[list[KnownMap]] = [[] for _ in assessor.structures]
    for i, (judge, mask_set) in enumerate(unseen):
        progress.step(i, len(unseen), "calibration of the maps")
        scan, truth = read_case(mask_set.case, assessor.values)
        patient = mask_set.case.patient
        for mask in mask_set.masks:
            logits = judge.error_logits(scan, Volume(mask, scan.affine, scan.acquisition_axis))
            nearest = nearest_truth(mask, np.asarray(truth.array, np.uint8), mask_set.observers)
            for structure, of_structure, e in zip(assessor.structures, known, logits, strict=True):
                of_structure.append(known_map(e, structure.mask(mask), structure.mask(nearest), patient))
    return tuple(fit_map(of_structure) for of_structure in known)


def with_maps(assessor: Assessor, maps: tuple[MapCalibration, ...]) -> Assessor:
    """The same network with calibrated maps."""
    return assessor.with_card(replace(assessor.card, map_calibration=maps))


def _mean_error(held_out: Sequence[HeldOutMask]) -> float | None:
    """The mean error of the estimated Dice, made with no part of the mask's patient."""
    pairs = [(m.estimated.dice, m.known.true.dice) for m in held_out]
    errors = [abs(estimate - true) for estimate, true in pairs if estimate is not None and true is not None]
    return round(float(np.mean(errors)), 4) if errors else None


def _largest_boxes(
    sets: Sequence[MaskSet], structures: Sequence[Structure], values: Sequence[int]
) -> list[float | None]:
    """The largest true error box of each structure over the training cases' median masks, in mm^2."""
    largest: list[float | None] = [None] * len(structures)
    for mask_set in sets:
        scan, truth = read_case(mask_set.case, values)
        axis = through_plane_axis(scan)
        for k, structure in enumerate(structures):
            error = difference(structure.mask(mask_set.masks[0]), structure.mask(truth.array))
            area = largest_box_area_mm2(error, axis, scan.spacing_mm)
            if area is not None:
                largest[k] = max(area, largest[k] or 0.0)
    return largest
