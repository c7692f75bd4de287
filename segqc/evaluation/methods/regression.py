"""A network that regresses the metrics from scan and mask, without a map (method, "The baselines")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from segqc.evaluation.methods.estimates import AssessedMask, Estimate
from segqc.evaluation.methods.learned import (
    PlanEncoder,
    PooledHead,
    around_masks,
    batch_metrics,
    flipped,
    mask_job,
    scan_and_mask_input,
    scan_and_masks,
)
from segqc.networks.device import device_of_choice
from segqc.networks.plan import NetworkPlan
from segqc.progress import Progress
from segqc.quality.metrics import METRIC_NAMES
from segqc.split import PatientSplit
from segqc.training.crossfit import MaskSet
from segqc.training.engine import fit
from segqc.training.patches import Patch
from segqc.training.segmentation import plan_for
from segqc.training.spec import TrainingSettings
from segqc.types import Metrics, Structure

MOST = 3.0  # a true ARVD or RVD above this counts as this much in training: a sliver of truth would rule the loss
_KINK = 0.05  # an absolute error that is small; squared below, linear above


class RegressionNetwork(nn.Module):
    """Encoder of the plan, pooling, four numbers per structure, each within its metric's range."""

    def __init__(self, plan: NetworkPlan) -> None:
        super().__init__()
        self.encoder = PlanEncoder(plan)
        self.head = PooledHead(plan.filters[-1], plan.out_channels * len(METRIC_NAMES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Dice, IoU, ARVD, RVD (N, L * 4) of a batch (N, 1 + L, a, b, c)."""
        numbers = self.head(self.encoder(x)).unflatten(1, (-1, len(METRIC_NAMES)))
        ratios = nn.functional.softplus(numbers[..., 2:])
        return torch.cat([numbers[..., :2].sigmoid(), ratios[..., :1], ratios[..., 1:] - 1], dim=-1).flatten(1)


class Regression:
    """Metrics in 3D from a regression network that looks at the window around the mask."""

    def __init__(
        self, network: nn.Module, plan: NetworkPlan, structures: Sequence[Structure], *, average_flips: bool = False,
        name: str = "regression",
    ) -> None:  # fmt: skip
        self.name = name
        self.device = device_of_choice()
        self.network = network.to(self.device).eval()
        self.plan = plan
        self.structures = tuple(structures)
        self.average_flips = average_flips

    def estimate(self, mask: AssessedMask) -> tuple[Estimate, ...]:
        """Estimate the 3D metrics."""
        x = scan_and_mask_input(mask, self.plan, self.structures)
        batch = flipped(around_masks(x, x[:, 1:], self.plan), average_flips=self.average_flips)
        with torch.inference_mode():
            numbers = self.network(batch.to(self.device)).mean(dim=0).cpu()
        rows = numbers.reshape(len(self.structures), len(METRIC_NAMES)).tolist()
        return tuple(Estimate(Metrics(**dict(zip(METRIC_NAMES, row, strict=True))), None, None, None) for row in rows)


def train_regression(
    sets: Sequence[MaskSet],
    structures: Sequence[Structure],
    patient_splits: dict[str, PatientSplit],
    settings: TrainingSettings,
    folder: Path,
    progress: Progress,
) -> Regression:
    """Train the regression network on given masks, or return the training of the same data found in ``folder``.

    The targets are the metrics of the augmented patch, which is what the network sees.

    Args:
        sets: cases with their masks, whose source networks have not seen the case's label.
        structures: the structures to assess.
        patient_splits: fold and role of each patient.
        settings: how to train; output form, loss and scan-only share are SegQC-Net's alone.
        folder: for checkpoint and learning curve.
        progress: reports after each step.
    """
    cases = [s.case for s in sets]
    plan = plan_for(cases, settings, in_channels=1 + len(structures), out_channels=len(structures))

    def prepare(batch: Patch) -> tuple[torch.Tensor, torch.Tensor]:
        x, masks, truths = scan_and_masks(batch, structures)
        return x, batch_metrics(masks, truths).clamp(max=MOST).flatten(1)

    job = mask_job(
        "regression", sets, structures, patient_splits, settings, plan, RegressionNetwork, prepare, _loss, around=True
    )
    fitted = fit(job, folder, progress)
    return Regression(fitted.network, plan, structures, average_flips=settings.average_flips)


def _loss(predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Huber's loss over the defined numbers."""
    known = ~true.isnan()
    errors = nn.functional.smooth_l1_loss(predicted, true.nan_to_num(), beta=_KINK, reduction="none") * known
    return errors.sum() / known.sum().clamp(min=1)
