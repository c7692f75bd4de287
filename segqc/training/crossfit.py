"""Pairs of a scan and a mask to train SegQC-Net on, made by networks that have never seen the scan's label."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from segqc.networks.plan import NetworkPlan
from segqc.networks.segmenter import Segmenter, SoftOutput
from segqc.networks.unet import StemUNet, Weights
from segqc.progress import Progress
from segqc.quality.metrics import true_metrics
from segqc.split import PatientSplit
from segqc.training.cases import Case, label_values, load_example, read_case
from segqc.training.engine import finished_training, fit
from segqc.training.segmentation import segmentation_job, segmenter_of
from segqc.training.side_by_side import side_by_side
from segqc.training.spec import TrainingSettings
from segqc.types import LabelArray, Structure
from segqc.volumes import atomic_write, through_plane_axis
from segqc.volumes.intake import content_sha256
from segqc.volumes.slices import part

logger = logging.getLogger(__name__)

BIN_WIDTH = 0.1  # of Dice, for stratified sampling
MAX_EARLY_EPOCHS = 5


class LeakError(ValueError):
    """A network was asked for a training mask of a scan whose label it, or an ancestor, has seen."""


@dataclass(frozen=True, slots=True)
class ServedMask:
    """The plain prediction of a case by a network that has not seen it: what the product would serve.

    Attributes:
        mask: on the scan's grid, (n0, n1, n2).
        soft: what the network's soft output says of each structure.
    """

    mask: LabelArray
    soft: tuple[SoftOutput, ...]


@dataclass(frozen=True, slots=True)
class MaskSet:
    """The masks of one case, on the scan's grid, shape (n, n0, n1, n2), with their mean true Dice over structures.

    Where only some slices of the case were checked, the Dice is that in these. ``served`` is None where no network of
    the case's fold has made the masks. ``observers`` are other people's label maps of the case, (n0, n1, n2) each:
    where they differ from its labels, nobody knows the truth.
    """

    case: Case
    masks: LabelArray
    dice: tuple[float, ...]
    served: ServedMask | None = None
    observers: tuple[LabelArray, ...] = ()


@dataclass(frozen=True, slots=True)
class CrossfitMasks:
    """The masks of cases, and the network of each fold that made them."""

    sets: list[MaskSet]
    networks: list[Segmenter]


def assert_unseen(segmenter: Segmenter, case: Case) -> None:
    """Refuse a case that the network has trained from.

    Raises:
        LeakError: naming the case and the patient.
    """
    if case.patient in segmenter.card.seen:
        raise LeakError(f"case {case.id}: the network {segmenter.version} has seen patient {case.patient}'s label")


def masks_of(
    segmenters: Sequence[Segmenter], case: Case, settings: TrainingSettings, *, allow_seen: bool = False
) -> MaskSet:
    """Make the masks of a case: per network each member of the augmentation group and the median (paper, 3.1).

    The first network gives the whole group, and the mask that would be served; the further ones (early epochs) give one
    mask each, as the members of a group look much alike and cost as much as the first one's.

    Args:
        segmenters: the networks.
        case: the case.
        settings: for the group's gammas.
        allow_seen: take networks that have seen the case; only to show what this leak does to an estimator.

    Raises:
        LeakError: if one of the networks has seen the case.
    """
    scan, truth = read_case(case, segmenters[0].values)
    masks: list[LabelArray] = []
    served: ServedMask | None = None
    for i, segmenter in enumerate(segmenters):
        if not allow_seen:
            assert_unseen(segmenter, case)
        if i == 0:
            plain, tta = segmenter.predict_both(scan, gammas=settings.gammas)
            soft = segmenter.soft_outputs(plain, segmenter.structures)
            served = ServedMask(np.asarray(plain.labels.array, np.uint8), soft)
            masks += [np.asarray(tta.labels.array, np.uint8), *tta.members]
        else:
            masks.append(np.asarray(segmenter.predict(scan).labels.array, np.uint8))
    axis = through_plane_axis(scan)
    known = part(truth.array, case.slices, axis)
    dice = tuple(mean_dice(part(mask, case.slices, axis), known, segmenters[0].structures) for mask in masks)
    return MaskSet(case, np.stack(masks), dice, served)


def sources_of_masks(sources: int, settings: TrainingSettings) -> tuple[int, ...]:
    """The number of the network that made each of a case's masks, in the order of `masks_of`."""
    group = (8 if settings.transposes else 4) * (1 + len(settings.gammas))
    return (0,) * (1 + group) + tuple(range(1, sources))


def mean_dice(mask: LabelArray, truth: LabelArray, structures: Sequence[Structure]) -> float:
    """Mean true Dice over the structures that are there; 1.0 where none is."""
    dice = [true_metrics(s.mask(mask), s.mask(truth)).dice for s in structures]
    return float(np.mean([d for d in dice if d is not None] or [1.0]))


def crossfit_masks(
    cases: Sequence[Case],
    structures: Sequence[Structure],
    patient_splits: dict[str, PatientSplit],
    plan: NetworkPlan,
    settings: TrainingSettings,
    folder: Path,
    progress: Progress,
    *,
    only: Sequence[int] | None = None,
) -> CrossfitMasks:
    """Make the masks of all cases, each from networks trained without its patient.

    Fold k's network learns from the training patients of the other folds, for a fixed number of epochs (no early
    stopping: validation labels must stay unseen too), and makes the masks of fold k's patients, validating ones
    included. Its weights at early epochs make further, worse masks (the paper's stratification, 4.1).

    Args:
        cases: the cases.
        structures: the structures to learn.
        patient_splits: fold and role by patient.
        plan: the networks' plan.
        settings: how to train.
        folder: for checkpoints and masks; folds in one folder may be done side by side, by processes of their own.
        progress: reports after each step.
        only: the folds whose cases' masks are made; by default all.
    """
    wanted = folds_of_cases(cases, patient_splits) if only is None else only
    common = cases, structures, patient_splits, plan, settings, folder
    made = list(side_by_side([partial(_masks_of_fold, fold, *common) for fold in wanted], settings, progress))
    return CrossfitMasks([s for m in made for s in m.sets], [network for m in made for network in m.networks])


def _masks_of_fold(
    fold: int,
    cases: Sequence[Case],
    structures: Sequence[Structure],
    patient_splits: dict[str, PatientSplit],
    plan: NetworkPlan,
    settings: TrainingSettings,
    folder: Path,
    progress: Progress,
) -> CrossfitMasks:
    """Train a fold's network and make the masks of its cases, or take over what is done; arguments as above."""
    networks = train_fold(fold, cases, structures, patient_splits, plan, settings, folder, progress)
    name = _name_of(fold, folds_of_cases(cases, patient_splits))
    held = [c for c in cases if patient_splits[c.patient].fold == fold]
    sets: list[MaskSet] = []
    for i, case in enumerate(held):
        path = masks_file(networks, case, settings, folder / "masks")
        kept = ", kept from an earlier run" if path.is_file() else ""
        progress.step(i, len(held), f"masks by the {name}", f"{case.id}{kept}")
        sets.append(_masks_at(path, networks, case, settings))
    return CrossfitMasks(sets, networks[:1])


def train_fold(
    fold: int,
    cases: Sequence[Case],
    structures: Sequence[Structure],
    patient_splits: dict[str, PatientSplit],
    plan: NetworkPlan,
    settings: TrainingSettings,
    folder: Path,
    progress: Progress,
) -> list[Segmenter]:
    """Train a fold's network, which sees the training patients of the other folds only, or take over a finished one.

    Arguments as of `crossfit_masks`.

    Returns:
        The network, and itself at early epochs.
    """
    trained = [
        c for c in cases if patient_splits[c.patient].fold != fold and patient_splits[c.patient].split == "train"
    ]
    unseen = [patient for patient, p in patient_splits.items() if p.fold == fold or p.split == "validation"]
    name = _name_of(fold, folds_of_cases(cases, patient_splits))
    own = folder / f"fold-{fold}"
    return train_mask_sources(name, trained, structures, plan, settings, own, progress, unseen=unseen)


def folds_of_cases(cases: Sequence[Case], patient_splits: dict[str, PatientSplit]) -> list[int]:
    """The folds that the cases' patients are in, ascending."""
    return sorted({patient_splits[c.patient].fold for c in cases})


def _name_of(fold: int, folds: Sequence[int]) -> str:
    return f"network for masks, fold {folds.index(fold) + 1} of {len(folds)}"


def train_mask_sources(
    name: str,
    trained: Sequence[Case],
    structures: Sequence[Structure],
    plan: NetworkPlan,
    settings: TrainingSettings,
    folder: Path,
    progress: Progress,
    *,
    early: Sequence[int] | None = None,
    unseen: Collection[str] = (),
) -> list[Segmenter]:
    """Train a network that only makes masks, for ``settings.fold_epochs``; return it and itself at its early epochs.

    Args:
        name: what progress calls it.
        trained: the cases it learns from.
        structures: the structures to learn.
        plan: the network's plan.
        settings: how to train.
        folder: for the checkpoint.
        progress: reports after each step.
        early: the early epochs, by default those of `early_epochs`; those after the bound on time have no network.
        unseen: patients whose labels it must never have seen, nor a network that it begins at.
    """
    values = label_values(structures)
    early = early_epochs(settings.fold_epochs) if early is None else tuple(early)
    examples = [load_example(c, plan, values) for c in trained]
    own = settings.of_mask_sources()
    job = segmentation_job(
        name,
        plan,
        values,
        examples,
        [],
        own,
        epochs=settings.fold_epochs,
        snapshots=early,
        seen={c.patient for c in trained},
        unseen=unseen,
    )
    fitted = fit(job, folder, progress)
    last = segmenter_of(fitted, plan, structures, fitted.seen, settings)
    reached = [fitted.snapshots[epoch] for epoch in early if epoch in fitted.snapshots]  # its time may have been over
    return [last, *(at_weights(last, weights) for weights in reached)]


def early_epochs(epochs: int) -> tuple[int, ...]:
    """Two to five epochs of the first half of a training, denser at the start, where the masks change most.

    Drawn at random they may all make useless or all make good masks; SegQC-Net has to know those between as well.
    """
    latest = max(1, epochs // 2)
    count = min(max(2, epochs // 4), MAX_EARLY_EPOCHS)
    return tuple(sorted({round(e) for e in np.geomspace(1, latest, count)}))


def at_weights(segmenter: Segmenter, weights: Weights) -> Segmenter:
    """The segmenter as it was at other weights, those of an earlier epoch."""
    network = StemUNet(segmenter.card.plan)
    network.load_state_dict(weights)
    return Segmenter(segmenter.card, network, segmenter.wanted_backend)


def early_networks(network: Segmenter, folder: Path) -> list[Segmenter]:
    """A fold's network as it was at the early epochs of its training; none where that training is no longer kept.

    Args:
        network: the fold's network.
        folder: the one of the training that it was made for, see `crossfit_masks`.
    """
    for path in sorted(folder.glob("fold-*/checkpoint.pt")):
        plan, end = finished_training(path.parent) or (None, None)
        if (
            end is not None
            and plan == network.card.plan
            and at_weights(network, end.weights).version == network.version
        ):
            return [at_weights(network, end.snapshots[epoch]) for epoch in sorted(end.snapshots)]
    return []


def masks_file(networks: Sequence[Segmenter], case: Case, settings: TrainingSettings, folder: Path) -> Path:
    """Where the masks of a case are kept: another file for other networks, scans or labels."""
    content = case.content or content_sha256(case.scan)
    made_with = " ".join([*(n.version for n in networks), repr(settings.gammas), repr(case.slices), content])
    key = hashlib.sha256(made_with.encode() + case.labels.read_bytes()).hexdigest()[:16]
    return folder / f"{case.id}-{key}.npz"


def stored_masks(networks: Sequence[Segmenter], case: Case, settings: TrainingSettings, folder: Path) -> MaskSet:
    """The masks of a case, from an earlier run with the same networks where there is one."""
    return _masks_at(masks_file(networks, case, settings, folder), networks, case, settings)


def _masks_at(path: Path, networks: Sequence[Segmenter], case: Case, settings: TrainingSettings) -> MaskSet:
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as stored:
                soft = tuple(SoftOutput(*row) for row in stored["soft"].tolist())
                served = ServedMask(stored["served"], soft)
                return MaskSet(case, stored["masks"], tuple(float(d) for d in stored["dice"]), served)
        except Exception as error:  # of many kinds on damaged files, without a common base
            logger.warning("%s: unreadable masks (%s), made anew", path, error)
    made = masks_of(networks, case, settings)
    if made.served is None:
        raise ValueError(f"case {case.id}: no network made its masks")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        np.savez_compressed(
            temporary,
            masks=made.masks,
            dice=np.array(made.dice),
            served=made.served.mask,
            soft=np.array([(soft.dice, soft.entropy) for soft in made.served.soft]),
        )
    return made


def folds_of(sets: Sequence[MaskSet], patient_splits: dict[str, PatientSplit]) -> list[int]:
    """The folds that have patients who train, ascending."""
    return sorted({p.fold for s in sets if (p := patient_splits[s.case.patient]).split == "train"})


def subsample(mask_set: MaskSet, most: int) -> MaskSet:
    """At most ``most`` masks of a case, evenly spaced in their order of quality, the worst and the best included."""
    if len(mask_set.masks) <= most:
        return mask_set
    order = np.argsort(mask_set.dice, kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, most).round().astype(int)]
    return replace(mask_set, masks=mask_set.masks[chosen], dice=tuple(mask_set.dice[int(i)] for i in chosen))


def stratified_weights(dice: Sequence[float]) -> tuple[float, ...]:
    """Weights that draw masks of rare qualities more often: a Dice bin's share grows with the root of its number.

    Equal shares (method, "Stratified data") would show the handful of masks in a sparse bin again and again.
    """
    bins = np.minimum((np.asarray(dice) / BIN_WIDTH).astype(int), round(1 / BIN_WIDTH) - 1)
    counts = np.bincount(bins)
    return tuple(float(counts[b] ** -0.5) for b in bins)
