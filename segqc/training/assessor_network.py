"""Train one SegQC-Net on masks, uncalibrated."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import torch
from monai.losses import DiceLoss
from torch import nn

from segqc.networks.assessor import Assessor
from segqc.networks.card import ModelCard
from segqc.networks.plan import NetworkPlan
from segqc.networks.unet import MeanOfNetworks, Weights, build_network
from segqc.progress import Progress
from segqc.training.cases import (
    Example,
    label_values,
    load_masked_examples,
)
from segqc.training.crossfit import MaskSet, stratified_weights
from segqc.training.engine import Job, Loss, PrepareBatch, fit
from segqc.training.patches import Patch
from segqc.training.spec import TrainingSettings
from segqc.training.warm_start import Lineage
from segqc.types import Structure

_IGNORED: Final = -1.0  # the target of a voxel that is left out of the loss
_CERTAIN: Final = -200.0  # a logit whose sigmoid is 0 in float32
_FIRST_BIAS = -3.0  # of the logit: structures and errors are rare, and tiny probabilities far away would add up


@dataclass(frozen=True, slots=True, eq=False)
class Beginning:
    """The weights that a training begins at, and the version of the model that they are of."""

    weights: Weights
    version: str


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
    begin_at: Beginning | None = None,
) -> Assessor:
    """Train one SegQC-Net, uncalibrated; without validation masks the last epoch's weights are taken.

    ``unseen`` are patients whose labels it must never have seen, nor a network that it begins at. With ``begin_at`` it
    begins at these weights, of a network whose plan is the same but for the mask skip.
    """
    values = label_values(structures)
    examples, validating = (mask_examples(sets, values, plan) for sets in (train, validation))
    job = assessor_job(name, plan, examples, validating, structures, settings)
    if begin_at is not None:
        build = partial(_network_at, begin_at.weights)
        job = replace(job, build=build, variant=begin_at.version, bounded_by="people_epochs")
    lineage = Lineage(
        outputs=f"{settings.output_form} of {[s.values for s in structures]}",
        seen=tuple(sorted({s.case.patient for s in (*train, *validation)})),
        unseen=tuple(sorted(unseen)),
    )
    fitted = fit(replace(job, lineage=lineage), folder, progress)
    validating_patients = {s.case.patient for s in validation}
    card = ModelCard(
        kind="segqc",
        plan=plan,
        structures=tuple(structures),
        values=values,
        seen=fitted.seen,
        members_seen=(tuple(patient for patient in fitted.seen if patient not in validating_patients),),
        output_form=settings.output_form,
        average_flips=settings.average_flips,
        hide_mask=settings.hide_mask,
    )
    return Assessor(card, fitted.network, backend=settings.backend)


def _network_at(weights: Weights, plan: NetworkPlan) -> nn.Module:
    """The network of a plan at the weights of one that has the same plan but for the mask skip."""
    network = build_network(plan)
    network.load_state_dict(network.state_dict() | weights)
    return network


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
        loss=_loss(settings, ignoring=any(example.ignored is not None for example in (*train, *validation))),
        scan_only_share=settings.scan_only_share,
        first_bias=_FIRST_BIAS,
    )


def ensemble(members: Sequence[Assessor]) -> Assessor:
    """Assessors of one plan as one, which answers with the mean of their logits."""
    seen = tuple(sorted({patient for member in members for patient in member.card.seen}))
    members_seen = tuple(member.card.seen_by(0) for member in members)
    card = replace(members[0].card, seen=seen, members=len(members), members_seen=members_seen)
    network = MeanOfNetworks([member.network for member in members])
    return Assessor(card, network, backend=members[0].wanted_backend)


def mask_examples(sets: Sequence[MaskSet], values: Sequence[int], plan: NetworkPlan) -> list[Example]:
    """One example per mask; scan and truth are shared between the masks of a case."""
    weights = iter(stratified_weights([d for s in sets for d in s.dice])) if sets else iter(())
    examples: list[Example] = []
    for mask_set in sets:
        own = list(itertools.islice(weights, len(mask_set.masks)))
        examples += load_masked_examples(mask_set.case, mask_set.masks, own, plan, values, mask_set.observers)
    return examples


def mask_channels(labels: torch.Tensor, structures: Sequence[Structure]) -> torch.Tensor:
    """One mask per structure (N, L, a, b, c) of label maps (N, 1, a, b, c)."""
    # a few comparisons take a fifth of the time of `torch.isin`
    masks = [functools.reduce(torch.logical_or, [labels == value for value in s.values]) for s in structures]
    return torch.cat(masks, 1).float()


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
