"""Train SegQC-Net on cross-fitted masks and calibrate its estimates."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from monai.losses import DiceLoss

from segqc.networks.assessor import Assessor, witnesses_of
from segqc.networks.bundle import FOLDS
from segqc.networks.card import ModelCard
from segqc.networks.encoder import encoders
from segqc.networks.plan import NetworkPlan
from segqc.networks.segmenter import Segmenter, SoftOutput
from segqc.networks.unet import MeanOfNetworks
from segqc.progress import Progress, WholeEstimate
from segqc.quality.boxes import largest_box_area_mm2
from segqc.quality.calibration import (
    MapCalibration,
    StructureCalibration,
    TrainingSizes,
    log_volume,
    training_sizes,
)
from segqc.quality.error_maps import difference
from segqc.quality.metrics import true_metrics
from segqc.quality.report_card import report_card
from segqc.quality.unlikeness import ScanFeatures, fit_unlikeness
from segqc.split import PatientSplit
from segqc.training.calibration import HeldOutMask, KnownMap, KnownMask, fit_map, fit_masks, held_out_masks, known_map
from segqc.training.cases import (
    Case,
    Example,
    TooFewCases,
    label_values,
    load_masked_examples,
    read_case,
    whole_cases,
)
from segqc.training.crossfit import MaskSet, crossfit_masks, sources_of_masks, stratified_weights, subsample
from segqc.training.engine import STEPS, Job, Loss, PrepareBatch, fit, write_mean_curve
from segqc.training.patches import Patch
from segqc.training.segmentation import check_enough, counted, plan_for, sizes, usable_cases
from segqc.training.side_by_side import side_by_side
from segqc.training.spec import TrainingSettings
from segqc.training.unseen import ServedErrors, served_errors, unseen_masks
from segqc.training.warm_start import Lineage
from segqc.types import FloatArray, LabelArray, MaskKind, Structure
from segqc.volumes import Volume, through_plane_axis

VALIDATION_MASKS = 4  # of one case, for early stopping and calibration
_IGNORED: Final = -1.0  # the target of a voxel that is left out of the loss
_CERTAIN: Final = -200.0  # a logit whose sigmoid is 0 in float32
_FIRST_BIAS = -3.0  # of the logit: structures and errors are rare, and tiny probabilities far away would add up


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
        f"{settings.epochs} epochs each. {sizes(plan, settings)}"
    )
    epochs = folds * settings.fold_epochs + members * settings.epochs
    progress = WholeEstimate(progress, epochs * settings.steps_per_epoch, STEPS)
    sets = _masks_of_folds(cases, structures, patient_splits, plan, settings, folder, progress)
    return train_on_masks(sets, structures, patient_splits, settings, folder, progress)


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


def folds_of(sets: Sequence[MaskSet], patient_splits: dict[str, PatientSplit]) -> list[int]:
    """The folds that have patients who train, ascending."""
    return sorted({p.fold for s in sets if (p := patient_splits[s.case.patient]).split == "train"})


def _plan_of(sets: Sequence[MaskSet], structures: Sequence[Structure], settings: TrainingSettings) -> NetworkPlan:
    return plan_for([s.case for s in sets], settings, in_channels=1 + len(structures), out_channels=len(structures))


def _validation(sets: Sequence[MaskSet], patient_splits: dict[str, PatientSplit]) -> list[MaskSet]:
    """A few masks of each case that validates: more would make validating longer than training, and say little new."""
    return [subsample(s, VALIDATION_MASKS) for s in _validating(sets, patient_splits)]


def _validating(sets: Sequence[MaskSet], patient_splits: dict[str, PatientSplit]) -> list[MaskSet]:
    return [s for s in sets if s.case.is_whole and patient_splits[s.case.patient].split == "validation"]


def fit_assessor(
    name: str,
    plan: NetworkPlan,
    train: Sequence[MaskSet],
    validation: Sequence[MaskSet],
    structures: Sequence[Structure],
    settings: TrainingSettings,
    folder: Path,
    progress: Progress,
    *,
    unseen: Collection[str] = (),
) -> Assessor:
    """Train one SegQC-Net, uncalibrated; without validation masks the last epoch's weights are taken.

    ``unseen`` are patients whose labels it must never have seen, nor a network that it begins at.
    """
    values = label_values(structures)
    examples, validating = (mask_examples(sets, values, plan) for sets in (train, validation))
    job = assessor_job(name, plan, examples, validating, structures, settings)
    lineage = Lineage(
        outputs=f"{settings.output_form} of {[s.values for s in structures]}",
        seen=tuple(sorted({s.case.patient for s in (*train, *validation)})),
        unseen=tuple(sorted(unseen)),
    )
    fitted = fit(replace(job, lineage=lineage), folder, progress)
    card = ModelCard(
        kind="segqc",
        plan=plan,
        structures=tuple(structures),
        values=values,
        seen=fitted.seen,
        output_form=settings.output_form,
        average_flips=settings.average_flips,
        hide_mask=settings.hide_mask,
    )
    return Assessor(card, fitted.network)


def assessor_job(
    name: str,
    plan: NetworkPlan,
    train: Sequence[Example],
    validation: Sequence[Example],
    structures: Sequence[Structure],
    settings: TrainingSettings,
) -> Job:
    """The training of a SegQC-Net on examples with masks; where they have soft outputs, these are inputs as well."""
    return Job(
        name=name,
        plan=plan,
        settings=settings,
        epochs=settings.epochs,
        train=train,
        validation=validation,
        prepare=_prepare(structures, settings),
        loss=_loss(settings, ignoring=any(example.ignored is not None for example in train)),
        scan_only_share=settings.scan_only_share,
        first_bias=_FIRST_BIAS,
    )


def ensemble(members: Sequence[Assessor]) -> Assessor:
    """Assessors of one plan as one, which answers with the mean of their logits."""
    seen = tuple(sorted({patient for member in members for patient in member.card.seen}))
    card = replace(members[0].card, seen=seen, members=len(members))
    return Assessor(card, MeanOfNetworks([member.network for member in members]))


def mask_examples(sets: Sequence[MaskSet], values: Sequence[int], plan: NetworkPlan) -> list[Example]:
    """One example per mask; scan and truth are shared between the masks of a case."""
    weights = iter(stratified_weights([d for s in sets for d in s.dice])) if sets else iter(())
    examples: list[Example] = []
    for mask_set in sets:
        own = list(itertools.islice(weights, len(mask_set.masks)))
        examples += load_masked_examples(mask_set.case, mask_set.masks, own, plan, values)
    return examples


def mask_channels(labels: torch.Tensor, structures: Sequence[Structure]) -> torch.Tensor:
    """One mask per structure (N, L, a, b, c) of label maps (N, 1, a, b, c)."""
    return torch.cat([torch.isin(labels, torch.tensor(s.values, dtype=labels.dtype)) for s in structures], 1).float()


def _prepare(structures: Sequence[Structure], settings: TrainingSettings) -> PrepareBatch:
    """Input and target of a batch; the target is `_IGNORED` where the truth is not known."""

    def prepare(batch: Patch) -> tuple[torch.Tensor, torch.Tensor]:
        mask, truth = mask_channels(batch["mask"], structures), mask_channels(batch["truth"], structures)
        # cross-entropy on E against D through sigmoid((1 - 2M) z) equals cross-entropy on z against T
        target = truth if settings.output_form == "truth" else (mask != truth).float()
        if "ignored" in batch:
            target = torch.where(batch["ignored"] > 0, _IGNORED, target)
        further = [batch["soft"]] if "soft" in batch else []
        return torch.cat([batch["image"], mask, *further], dim=1), target

    return prepare


def _loss(settings: TrainingSettings, *, ignoring: bool) -> Loss:
    """The loss; its gradient is zero where the truth is not known."""
    compare: Loss = DiceLoss(sigmoid=True, batch=True) if settings.loss == "dice" else torch.nn.BCEWithLogitsLoss()
    if not ignoring:
        return compare

    def loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        # as if known to be empty: that adds nothing to cross-entropy, nor to Dice
        ignored = target == _IGNORED
        return compare(torch.where(ignored, _CERTAIN, predicted), torch.where(ignored, 0.0, target))

    return loss


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
    return Assessor(card, assessor.network)


@dataclass(frozen=True, slots=True, eq=False)
class _Unseen:
    """A case, and a network that has not trained from its patient; ``sizes`` are of the others' structures."""

    judge: Assessor
    case: Case
    scan: Volume
    truth: Volume
    sizes: Sequence[TrainingSizes | None]

    def error_maps(self, mask: LabelArray) -> FloatArray:
        """The error maps of a mask: (L, n0, n1, n2)."""
        return self.judge.error_maps(self.scan, self._on_grid(mask))

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
        found = []
        for k, structure in enumerate(self.judge.structures):
            held = structure.mask(mask)
            true = true_metrics(held, structure.mask(self.truth.array))
            witnesses = witnesses_of(held, self.scan, soft[k] if soft else None, self.sizes[k])
            found.append(KnownMask(self.case.patient, self.case.id, raw[k], true, witnesses))
        return tuple(found)

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
            for structure, of_structure, e in zip(assessor.structures, known, logits, strict=True):
                of_structure.append(known_map(e, structure.mask(mask), structure.mask(truth.array), patient))
    return tuple(fit_map(of_structure) for of_structure in known)


def with_maps(assessor: Assessor, maps: tuple[MapCalibration, ...]) -> Assessor:
    """The same network with calibrated maps."""
    return Assessor(replace(assessor.card, map_calibration=maps), assessor.network)


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
