"""Train the segmentation network."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks import one_hot

from segqc.networks.card import ModelCard
from segqc.networks.plan import NetworkPlan, plan_network
from segqc.networks.segmenter import Segmenter
from segqc.progress import Progress, WholeEstimate
from segqc.quality.metrics import true_metrics
from segqc.split import PatientSplit
from segqc.training.cases import (
    Case,
    CaseError,
    Example,
    TooFewCases,
    label_values,
    load_example,
    read_case,
    typical_geometry,
    whole_cases,
)
from segqc.training.engine import STEPS, Fitted, Job, fit
from segqc.training.patches import Patch
from segqc.training.spec import TrainingSettings
from segqc.training.warm_start import Lineage
from segqc.types import MaskDice, Structure

logger = logging.getLogger(__name__)

_IGNORED: Final = -1.0  # the class of a voxel that is left out of the loss
_CERTAIN: Final = 200.0  # a logit whose softmax is 1 in float32, and that of the others 0


@dataclass(frozen=True, slots=True)
class PseudoCases:
    """Cases whose labels are pseudo-labels, and the patients that the networks which made and accepted these have seen.

    A pseudo-label carries what its makers saw, so that whoever trains on it has seen these patients (method, "Leaks").
    """

    cases: tuple[Case, ...] = ()
    seen: tuple[str, ...] = ()


NO_PSEUDO_CASES: Final = PseudoCases()


def check_enough(cases: Sequence[Case], settings: TrainingSettings, network: str) -> None:
    """Refuse to train on too few labelled patients.

    Raises:
        TooFewCases: with what is there and what is needed.
    """
    patients = len({case.patient for case in cases})
    if patients < settings.min_cases:
        raise TooFewCases(
            f"the {network} network needs labelled scans of at least {settings.min_cases} patients, "
            f"found {patients}; label and submit more scans first"
        )


def plan_for(cases: Sequence[Case], settings: TrainingSettings, *, in_channels: int, out_channels: int) -> NetworkPlan:
    """Plan a network from the cases' median geometry."""
    spacing, shape = typical_geometry(cases)
    return plan_network(
        spacing, shape, in_channels=in_channels, out_channels=out_channels, size=settings.size, patch=settings.patch
    )


def usable_cases(cases: Sequence[Case], patient_splits: Mapping[str, PatientSplit]) -> list[Case]:
    """The cases that a training uses: all that train, and those that validate if they were checked as a whole."""
    return [case for case in cases if case.is_whole or patient_splits[case.patient].split == "train"]


def counted(cases: Sequence[Case]) -> str:
    """The number of labelled scans and of their patients, in words."""
    patients = len({case.patient for case in cases})
    text = f"{len(cases)} labelled scans of {patients} patient{'s' if patients > 1 else ''}"
    if in_part := len(cases) - len(whole_cases(cases)):
        text += f" ({in_part} of them checked in part: the checked slices train, and validate and calibrate nothing)"
    return text


def sizes(plan: NetworkPlan, settings: TrainingSettings) -> str:
    """A sentence on what decides how long a training takes."""
    patch = " x ".join(map(str, plan.patch))
    return (
        f"An epoch has {settings.steps_per_epoch} steps, each on {settings.batch} patches of {patch} voxels; the "
        f"networks are of the size {settings.size}."
    )


def segmentation_job(
    name: str,
    plan: NetworkPlan,
    values: Sequence[int],
    train: Sequence[Example],
    validation: Sequence[Example],
    settings: TrainingSettings,
    *,
    epochs: int,
    snapshots: tuple[int, ...] = (),
    seen: Collection[str] = (),
    unseen: Collection[str] = (),
) -> Job:
    """Describe one training of a segmentation network: softmax over background and values, Dice + cross-entropy.

    Voxels to ignore have no part in the loss: its gradient there is zero. ``seen`` and ``unseen`` are the patients of
    the training's `Lineage`; without any the training has none.
    """
    table = torch.zeros(256, dtype=torch.long)
    table[list(values)] = torch.arange(1, len(values) + 1)

    def prepare(batch: Patch) -> tuple[torch.Tensor, torch.Tensor]:
        classes = table[batch["truth"].long()].float()
        if "ignored" in batch:
            classes = torch.where(batch["ignored"] > 0, _IGNORED, classes)
        return batch["image"], classes

    compare = DiceCELoss(softmax=True, include_background=False, batch=True)

    ignoring = any(example.ignored is not None for example in train)

    def loss(predicted: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        if ignoring:
            # as if known to be background: that adds nothing to cross-entropy, nor to Dice, which leaves background out
            ignored = classes == _IGNORED
            known = torch.zeros_like(predicted)
            known[:, 0] = _CERTAIN
            predicted, classes = torch.where(ignored, known, predicted), torch.where(ignored, 0, classes)
        # of class numbers PyTorch has no cross-entropy that is the same every time on a GPU
        return torch.as_tensor(compare(predicted, one_hot(classes, predicted.shape[1])))

    lineage = Lineage(outputs=f"classes {sorted(values)}", seen=tuple(sorted(seen)), unseen=tuple(sorted(unseen)))
    return Job(
        name,
        plan,
        settings,
        epochs,
        train,
        validation,
        prepare,
        loss,
        snapshots=snapshots,
        lineage=lineage if seen else None,
    )


def segmenter_of(
    fitted: Fitted, plan: NetworkPlan, structures: Sequence[Structure], seen: Sequence[str], settings: TrainingSettings
) -> Segmenter:
    """Wrap trained weights with their card."""
    card = ModelCard(
        kind="segmentation",
        plan=plan,
        structures=tuple(structures),
        values=label_values(structures),
        seen=tuple(sorted(set(seen))),
        transposes=settings.transposes and plan.patch[0] == plan.patch[1],
    )
    return Segmenter(card, fitted.network, settings.backend)


def train_segmentation(
    cases: Sequence[Case],
    structures: Sequence[Structure],
    patient_splits: dict[str, PatientSplit],
    settings: TrainingSettings,
    folder: Path,
    progress: Progress,
    pseudo: PseudoCases = NO_PSEUDO_CASES,
) -> Segmenter:
    """Train the segmentation network on the cases of training patients, stopped early on those that validate.

    Pseudo-labels train, too; they neither validate nor decide the network's plan. Of cases that were checked in part,
    only the checked slices train, and nothing validates.

    Args:
        cases: all labelled cases.
        structures: the structures to learn.
        patient_splits: fold and role of each patient, as `segqc.split.place` gives them.
        settings: how to train.
        folder: for checkpoint and learning curve.
        progress: reports after each step.
        pseudo: cases of training patients with pseudo-labels.

    Raises:
        TooFewCases: with fewer labelled patients than ``settings.min_cases``.
        VolumeError: if a scan or a label file can't be used.
        ValueError: if a pseudo-label is a validating patient's.
    """
    if validating := [c.id for c in pseudo.cases if patient_splits[c.patient].split != "train"]:
        raise ValueError(f"a pseudo-label of a validating patient's scan cannot train: {validating[0]}")
    cases = usable_cases(cases, patient_splits)
    check_enough(cases, settings, "segmentation")
    values = label_values(structures)
    plan = plan_for(cases, settings, in_channels=1, out_channels=1 + len(values))
    also = f" and {len(pseudo.cases)} pseudo-labels" if pseudo.cases else ""
    progress.message(
        f"segmentation network, on {counted(cases)}{also}: at most {settings.epochs} epochs. {sizes(plan, settings)}"
    )
    progress = WholeEstimate(progress, settings.epochs * settings.steps_per_epoch, STEPS)
    split = {split: [c for c in cases if patient_splits[c.patient].split == split] for split in ("train", "validation")}
    train = [load_example(c, plan, values) for c in (*split["train"], *pseudo.cases)]
    validation = [load_example(c, plan, values) for c in split["validation"]]
    # validation labels chose the epoch: their patients count as seen, and so do those that pseudo-labels were made from
    seen = {*(c.patient for c in (*cases, *pseudo.cases)), *pseudo.seen}
    job = segmentation_job("segmentation", plan, values, train, validation, settings, epochs=settings.epochs, seen=seen)
    fitted = fit(job, folder, progress)
    segmenter = segmenter_of(fitted, plan, structures, fitted.seen, settings)
    return with_scores(segmenter, split["validation"], values)


def with_scores(segmenter: Segmenter, cases: Sequence[Case], values: Sequence[int]) -> Segmenter:
    """Measure the Dice of each structure on whole scans and note it on the model's card: each scan's, and the means."""
    if not cases:
        return segmenter
    rows, measured = [], []
    for case in cases:
        try:
            scan, truth = read_case(case, values)
        except CaseError as error:  # replaced during the training, which has cost more than this score is worth
            logger.warning("not measured: %s", error)
            continue
        predicted = segmenter.predict(scan).labels
        dice = [true_metrics(s.mask(predicted.array), s.mask(truth.array)).dice for s in segmenter.structures]
        rows.append([np.nan if d is None else d for d in dice])
        if defined := [d for d in dice if d is not None]:
            measured.append(MaskDice(patient=case.patient, scan=case.id, dice=float(np.mean(defined))))
    if not rows:
        return segmenter
    means = np.nanmean(np.array(rows, float), axis=0)
    scores = {f"dice {s.name}": round(float(m), 4) for s, m in zip(segmenter.structures, means, strict=True)}
    scores["dice"] = round(float(np.nanmean(means)), 4)
    card = replace(segmenter.card, scores=scores, accuracy=scores["dice"], validation=tuple(measured))
    return Segmenter(card, segmenter.network)
