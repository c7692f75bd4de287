"""How well a mask fits the shapes of true masks: a variational autoencoder's loss, then a regressor (Liu et al. 2019).

The autoencoder is trained on true masks only. A mask that it can't reconstruct, or whose code is unlikely, has an
unusual shape. The scan is not looked at. In the original the loss is one feature and masks are scaled to one size;
here its parts are three features, and masks are cut out at the scan's scale.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.losses import DiceLoss
from pydantic import TypeAdapter, ValidationError
from torch import nn

from segqc.evaluation.methods.estimates import AssessedMask, Estimate, structure_masks
from segqc.evaluation.methods.features import FeatureRegression, fit_features
from segqc.evaluation.methods.learned import PlanEncoder, cut_around_mask, cut_window, total_stride, union_of
from segqc.evaluation.methods.simple import measured_masks
from segqc.networks.device import device_of_choice
from segqc.networks.plan import NetworkPlan, Triple
from segqc.networks.unet import depth_to_space
from segqc.progress import Progress
from segqc.quality.metrics import Values
from segqc.split import PatientSplit
from segqc.training.assessor_network import mask_channels
from segqc.training.cases import Case, Example, label_values, load_example
from segqc.training.crossfit import MaskSet, subsample
from segqc.training.engine import Job, fingerprint, fit
from segqc.training.patches import Patch, centred_start
from segqc.training.segmentation import plan_for
from segqc.training.spec import TrainingSettings
from segqc.types import Metrics, Structure
from segqc.volumes import atomic_write, canonical_frame, to_canonical

LATENT = 32  # numbers in a shape's code
REGRESSION_MASKS = 8  # of one case, for the regressor
LINES = "lines.json"  # in the training's folder: the regressor takes minutes, too
_CODE_WEIGHT = 2.0**-5  # of the code's mean divergence, beside the reconstruction
_SMALLEST = 1e-6  # before a logarithm


@dataclass(frozen=True, slots=True)
class _Lines:
    fingerprint: str
    lines: tuple[FeatureRegression, ...]


_LINES = TypeAdapter(_Lines)


class ShapeAutoencoder(nn.Module):
    """Encoder of the plan, a Gaussian code, and a decoder that mirrors the encoder; for patches of the plan's shape."""

    def __init__(self, plan: NetworkPlan) -> None:
        super().__init__()
        self.stem = plan.stem
        first, second, third = (p // s for p, s in zip(plan.patch, total_stride(plan), strict=True))
        self.coarse: Triple = (first, second, third)
        size = plan.filters[-1] * math.prod(self.coarse)
        self.encoder = PlanEncoder(plan)
        self.to_code = nn.Linear(size, 2 * LATENT)
        self.from_code = nn.Linear(LATENT, size)
        levels = range(len(plan.strides) - 1, 0, -1)
        steps = [_step_up(plan.filters[i], plan.filters[i - 1], plan.strides[i], plan.kernels[i - 1]) for i in levels]
        self.decoder = nn.Sequential(*steps, nn.Conv3d(plan.filters[0], plan.out_channels * math.prod(plan.stem), 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reconstruction's logits, mean and log variance of the code of masks (N, L, a, b, c), one row per item.

        Shape (N, L * a * b * c + 2 * LATENT). The code is drawn in training, and is its mean otherwise.
        """
        code = self.to_code(self.encoder(x).flatten(1))
        mean, log_variance = code.chunk(2, dim=1)
        log_variance = log_variance.clamp(-10, 10)
        drawn = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        features = self.from_code(drawn).unflatten(1, (-1, *self.coarse))
        logits = depth_to_space(self.decoder(features), self.stem)
        return torch.cat([logits.flatten(1), mean, log_variance], dim=1)


def _step_up(channels: int, fewer: int, stride: Triple, kernel: Triple) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose3d(channels, fewer, stride, stride),
        nn.LeakyReLU(0.01),
        nn.Conv3d(fewer, fewer, kernel, padding=(kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)),
        nn.LeakyReLU(0.01),
    )


class AutoencoderFeatures:
    """Metrics in 3D from shape alone: a linear regression on what the autoencoder makes of the mask."""

    def __init__(
        self,
        network: nn.Module,
        plan: NetworkPlan,
        structures: Sequence[Structure],
        lines: Sequence[FeatureRegression] = (),
        *,
        name: str = "autoencoder",
    ) -> None:
        self.name = name
        self.device = device_of_choice()
        self.network = network.to(self.device).eval()
        self.plan = plan
        self.structures = tuple(structures)
        self.lines = tuple(lines)

    def features(self, mask: AssessedMask) -> tuple[Values | None, ...]:
        """Per structure: reconstruction's Dice, logs of its cross-entropy and of the code's divergence.

        The divergence is of all structures together. None for an empty mask. What of the masks does not fit into the
        patch is cut off.
        """
        frame = canonical_frame(mask.scan, spacing_mm=self.plan.spacing_mm)
        native = structure_masks(mask.labels.array, self.structures)
        whole = torch.from_numpy(to_canonical(native.astype(np.float32), frame, order=0))[None]
        x = cut_window(whole, centred_start(union_of(whole), self.plan.patch), self.plan.patch)
        with torch.inference_mode():
            output = self.network(x.to(self.device)).cpu()
        logits, divergence = _parts(output, len(self.structures))
        true = x.flatten(2)
        entropy = nn.functional.binary_cross_entropy_with_logits(logits, true, reduction="none").mean(dim=2)[0]
        soft = logits.sigmoid()
        dice = 2 * (soft * true).sum(dim=2)[0] / (soft + true).sum(dim=2)[0].clamp(min=_SMALLEST)
        return tuple(
            np.array([d, math.log(max(e, _SMALLEST)), math.log(max(float(divergence[0]), _SMALLEST))])
            if there
            else None
            for d, e, there in zip(dice.tolist(), entropy.tolist(), native.any(axis=(1, 2, 3)), strict=True)
        )

    def estimate(self, mask: AssessedMask) -> tuple[Estimate, ...]:
        """Estimate the 3D metrics from the shape."""
        features = self.features(mask)
        return tuple(Estimate(line.at(f), None, None, None) for line, f in zip(self.lines, features, strict=True))


def train_autoencoder(
    sets: Sequence[MaskSet],
    structures: Sequence[Structure],
    patient_splits: dict[str, PatientSplit],
    settings: TrainingSettings,
    folder: Path,
    progress: Progress,
) -> AutoencoderFeatures:
    """Train the autoencoder on the cases' true masks, or return the training of the same data found in ``folder``.

    The regressor is then fitted on the masks of patients that train, and kept beside. Arguments as in
    `train_regression`.
    """
    cases = list({s.case.id: s.case for s in sets}.values())
    plan = plan_for(cases, settings, in_channels=len(structures), out_channels=len(structures))
    overlap = DiceLoss(sigmoid=True)

    def prepare(batch: Patch) -> tuple[torch.Tensor, torch.Tensor]:
        masks = mask_channels(batch["truth"], structures)
        return masks, masks.flatten(1)

    def loss(predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        logits, divergence = _parts(predicted, len(structures))
        masks = true.unflatten(1, (len(structures), -1))
        rebuilt = overlap(logits, masks) + nn.functional.binary_cross_entropy_with_logits(logits, masks)
        return torch.as_tensor(rebuilt + _CODE_WEIGHT * divergence.mean() / LATENT)

    def examples(split: str) -> list[Example]:
        return [_shape_example(c, plan, structures) for c in cases if patient_splits[c.patient].split == split]

    job = Job(
        name="autoencoder",
        plan=plan,
        settings=settings,
        epochs=settings.epochs,
        train=examples("train"),
        validation=examples("validation"),
        prepare=prepare,
        loss=loss,
        build=ShapeAutoencoder,
        variant=f"autoencoder {tuple(structures)}",
    )
    network = fit(job, folder, progress).network
    train = [subsample(s, REGRESSION_MASKS) for s in sets if patient_splits[s.case.patient].split == "train"]
    of = _fingerprint(job, train)
    lines = _stored_lines(folder, of)
    if lines is None:
        lines = _fit_lines(AutoencoderFeatures(network, plan, structures), train, progress)
        with atomic_write(folder / LINES) as temporary:
            temporary.write_bytes(_LINES.dump_json(_Lines(of, lines), indent=1) + b"\n")
    return AutoencoderFeatures(network, plan, structures, lines)


def _fit_lines(
    untaught: AutoencoderFeatures, train: Sequence[MaskSet], progress: Progress
) -> tuple[FeatureRegression, ...]:
    """Each structure's regression from the features of masks to their metrics."""
    structures = untaught.structures
    features: list[list[Values | None]] = [[] for _ in structures]
    metrics: list[list[Metrics]] = [[] for _ in structures]
    total = sum(len(s.masks) for s in train)
    for i, measured in enumerate(measured_masks(train, structures)):
        progress.step(i, total, "autoencoder", "shape features")
        for k, of_structure in enumerate(untaught.features(measured.mask)):
            features[k].append(of_structure)
            metrics[k].append(measured.metrics[k])
    return tuple(fit_features(f, m) for f, m in zip(features, metrics, strict=True))


def _fingerprint(job: Job, train: Sequence[MaskSet]) -> str:
    """What stored lines must agree on to be taken: the training, and the masks that they were fitted on."""
    digest = hashlib.sha256(fingerprint(job).encode())
    for masks in train:
        digest.update(masks.case.id.encode())
        digest.update(masks.masks.tobytes())
    return digest.hexdigest()


def _stored_lines(folder: Path, of: str) -> tuple[FeatureRegression, ...] | None:
    try:
        stored = _LINES.validate_json((folder / LINES).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return stored.lines if stored.fingerprint == of else None


def _shape_example(case: Case, plan: NetworkPlan, structures: Sequence[Structure]) -> Example:
    return cut_around_mask(load_example(case, plan, label_values(structures)), plan.patch)


def _parts(output: torch.Tensor, structures: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The reconstruction's logits (N, L, voxels) and the code's divergence (N,) from a standard normal, in nats."""
    logits = output[:, : -2 * LATENT].unflatten(1, (structures, -1))
    mean, log_variance = output[:, -2 * LATENT :].chunk(2, dim=1)
    divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=1) / 2
    return logits, divergence
