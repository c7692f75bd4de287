"""The settings of a training; the defaults are the recipe that won on real data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

from segqc.networks.plan import NetworkSize, Triple
from segqc.quality.calibration import OutputForm
from segqc.types import BackendName

Intensities: TypeAlias = Literal["usual", "strong"]

# What can be meant, both ends included; a learning rate is above its lower end.
_WHOLE_NUMBERS: Final[Mapping[str, tuple[int, int]]] = {
    "seed": (0, 2**32 - 1),
    "epochs": (1, 100_000),
    "fold_epochs": (1, 100_000),
    "people_epochs": (0, 100_000),
    "steps_per_epoch": (1, 100_000),
    "batch": (1, 1024),
    "patience": (1, 100_000),
    "folds": (2, 100),
    "min_cases": (1, 100_000),
}
_SHARES: Final = ("scan_only_share", "empty_mask_share")
_LARGEST_PATCH: Final = 4096  # voxels along an axis
_MOST_MINUTES: Final = 100_000


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How networks are trained.

    ``epochs`` are of ``steps_per_epoch`` batches each, whatever the number of cases. A training ends when the
    validation loss has got no better for ``patience`` epochs, after ``epochs`` at the latest, and takes about
    ``max_minutes`` at most: what its first epoch takes tells how many these allow. ``fold_epochs`` is the length of
    the cross-fitted segmentation networks that only make SegQC-Net's training masks, ``people_epochs`` the most of the
    network for people's masks, which begins at SegQC-Net; with 0 there is none. ``scan_only_share`` is the first
    part of SegQC-Net's training, in which the mask input is empty: it first learns to find the structure, then to
    judge a mask of it; ``empty_mask_share`` of the patches after that have an empty mask, too, so that it keeps looking
    at the scan and does not believe every mask: only where there are enough cases to segment well from the scan alone.
    ``mask_deformation`` moves the contour of the mask alone, smoothly, by displacements with a standard deviation of up
    to this many in-plane voxels, so that it does not believe masks of networks that it has not met.
    ``segmentation_intensities`` and ``segqc_intensities`` say how far contrast, gain, resolution and noise of patches
    are changed, "usual" or "strong", which is far more. SegQC-Net's are by default, so that it finds what the
    segmentation networks miss on scans unlike the labelled ones.
    ``ensemble`` trains one SegQC-Net per fold, which answer together. Each calibrates on the patients that it has not
    seen: so all patients calibrate, not only the few that validate, and prediction intervals need nine patients in all.
    The estimates themselves became no better by it (``benchmarks/results/hippocampus-ensemble.json``); it costs one
    network's training and assessment for each fold.
    ``average_flips`` lets SegQC-Net answer with the mean over in-plane flips; with ``hide_mask`` it does not see the
    mask in half of them, and so leans less on masks of networks that it has not met.
    ``mixed_precision`` lets the trainings' convolutions compute in bfloat16 on CPUs (AVX-512 BF16) and GPUs that have
    instructions for it, and lets the fastest backend that is right there compute the masks that SegQC-Net learns from,
    and what calibrates it.
    ``start`` "warm" lets each network begin at the weights that the last training gave the network of its role: the
    segmentation network, each fold's network, each SegQC-Net. "scratch" begins with new ones; see
    `segqc.training.engine`.
    ``side_by_side`` lets trainings that do not need each other, those of the folds and of an ensemble, go on at once
    where a CPU computes, in processes of their own (`segqc.training.side_by_side`).
    ``output_form`` "direct" with ``loss`` "dice" and a learning rate of 5e-4 is the paper's recipe.
    """

    seed: int = 0
    size: NetworkSize = "small"
    patch: Triple | None = None
    epochs: int = 60
    fold_epochs: int = 20
    people_epochs: int = 40
    steps_per_epoch: int = 20
    batch: int = 2
    learning_rate: float = 2e-3
    patience: int = 15
    max_minutes: float = 60.0
    folds: int = 3
    validation_share: float = 0.15
    min_cases: int = 4
    flips: bool = True
    transposes: bool = False
    gammas: tuple[float, ...] = (0.7,)
    output_form: OutputForm = "truth"
    loss: Literal["cross-entropy", "dice"] = "cross-entropy"
    scan_only_share: float = 0.2
    empty_mask_share: float = 0.0
    mask_deformation: float = 0.0
    segmentation_intensities: Intensities = "usual"
    segqc_intensities: Intensities = "strong"
    average_flips: bool = False
    hide_mask: bool = False
    ensemble: bool = True
    mixed_precision: bool = True
    start: Literal["scratch", "warm"] = "scratch"
    side_by_side: bool = True

    def __post_init__(self) -> None:
        """Refuse what can't be meant.

        Raises:
            ValueError: if a number is out of its bounds, or ``hide_mask`` goes without flips, empty masks in the
                training, or the output form "truth".
        """
        for name, (low, high) in _WHOLE_NUMBERS.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be a whole number from {low} to {high}")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1")
        if not 0 <= self.validation_share < 1:
            raise ValueError("validation_share must be from 0 to below 1")
        if not 0 < self.learning_rate <= 1:
            raise ValueError("learning_rate must be above 0 and at most 1")
        if not 0 < self.max_minutes <= _MOST_MINUTES:
            raise ValueError(f"max_minutes must be above 0 and at most {_MOST_MINUTES}")
        if not 0 <= self.mask_deformation <= 100:
            raise ValueError("mask_deformation must be from 0 to 100 voxels")
        if not all(0 < contrast <= 10 for contrast in self.gammas):
            raise ValueError("gammas must be above 0 and at most 10")
        if self.patch is not None and not all(1 <= n <= _LARGEST_PATCH for n in self.patch):
            raise ValueError(f"patch must be from 1 to {_LARGEST_PATCH} voxels along each axis")
        taught = self.scan_only_share > 0 or self.empty_mask_share > 0
        if self.hide_mask and not (self.average_flips and taught and self.output_form == "truth"):
            raise ValueError(
                "hide_mask needs average_flips, output_form 'truth', and scan_only_share or empty_mask_share over 0"
            )

    @property
    def trains_people(self) -> bool:
        """Whether there is to be a network for people's masks: its mask skip says what is true, not what is wrong."""
        return self.people_epochs > 0 and self.output_form == "truth"

    @property
    def backend(self) -> BackendName:
        """What computes the masks and the estimates that a training makes on its way."""
        return "auto" if self.mixed_precision else "pytorch"

    def of_mask_sources(self) -> TrainingSettings:
        """Those that the fold networks depend on, all else as by default: SegQC-Net's own leave them as they are."""
        return TrainingSettings(
            seed=self.seed,
            size=self.size,
            patch=self.patch,
            steps_per_epoch=self.steps_per_epoch,
            batch=self.batch,
            learning_rate=self.learning_rate,
            max_minutes=self.max_minutes,
            flips=self.flips,
            transposes=self.transposes,
            segmentation_intensities=self.segmentation_intensities,
            mixed_precision=self.mixed_precision,
            start=self.start,
        )

    def paper_recipe(self) -> TrainingSettings:
        """The paper's own SegQC-Net: error as direct output, Dice loss, learning rate 5e-4 (section 4.2)."""
        return replace(
            self,
            output_form="direct",
            loss="dice",
            learning_rate=5e-4,
            scan_only_share=0.0,
            empty_mask_share=0.0,
            mask_deformation=0.0,
            segqc_intensities="usual",
            average_flips=False,
            hide_mask=False,
            ensemble=False,
        )
