"""How an evaluation is run: one place for all that its numbers depend on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeAlias

from segqc.networks.plan import Triple
from segqc.quality.boxes import BoxSettings
from segqc.quality.error_maps import ExtractionSettings
from segqc.training import TrainingSettings

Bins: TypeAlias = tuple[float, ...]

# short epochs: after twenty steps masks are no longer bad, and bad ones are wanted as well
_SEGMENTER = TrainingSettings(epochs=80, fold_epochs=50, steps_per_epoch=10, batch=4, patience=30)
# steps of two patches, not four, and many: on the train split the error fell from 600 over 1200 to 2400 steps
_MASKS_TO_LEARN_FROM = TrainingSettings(
    epochs=60, steps_per_epoch=40, batch=2, scan_only_share=0.25, empty_mask_share=0.25, mask_deformation=4.0,
    average_flips=True, hide_mask=True, segqc_intensities="usual",
)  # fmt: skip
_ANNOTATOR = ExtractionSettings(
    band_mm=1.0, max_band_share=0.3, min_component_mm2=10.0, max_component_share=0.1, regrow=1.0
)


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """All that an evaluation's numbers depend on, beside the scans; kept in its run folder.

    Attributes:
        seed: decides every random draw.
        folds: cross-fitting: each trained method has one network per fold, trained without the fold's patients; the
            fold's masks calibrate it, and all of them together assess the test masks.
        test_share: share of the patients kept for the test where the data set brings no split.
        max_cases: use at most so many cases of each side.
        test_sources: trainings whose networks make the stratified test masks (the paper: 12); each gives two networks.
        source_epochs: their length.
        segmenter: how segmentation networks are trained; ``epochs`` is of the served one, ``fold_epochs`` of those
            that make training masks.
        assessor: how SegQC-Net, and what it is compared with, is trained.
        bins: edges of the Dice bins of the stratified masks, for all structures together.
        per_bin: masks in each of them.
        boxes: how error maps become boxes.
        extraction: how errors are told from observer variability.
        annotator: what a simulated annotator corrects: here errors that leave a band of 1 mm, whole.
        box_thresholds: error probabilities at which boxes are counted.
        box_precision: boxes after error extraction are made at the lowest of these that has this precision on the
            masks that calibrate a method.
        box_ious: overlaps at which a box counts as found (paper, section 4.4).
        group_pattern: a regular expression that finds the group of a patient in the patient's name (its first group, or
            all that it matches), for coverage under shift between groups.
        draws: bootstrap draws.
        workers: processes that train and assess in parallel; no number depends on it.
    """

    seed: int = 0
    folds: int = 3
    test_share: float = 0.3
    max_cases: int | None = None
    test_sources: int = 12
    source_epochs: int = 24
    segmenter: TrainingSettings = _SEGMENTER
    assessor: TrainingSettings = _MASKS_TO_LEARN_FROM
    bins: Bins = (0.0, 0.6, 0.7, 0.8, 0.85, 1.01)
    per_bin: int = 24
    boxes: BoxSettings = field(default_factory=BoxSettings)
    extraction: ExtractionSettings = field(default_factory=ExtractionSettings)
    annotator: ExtractionSettings = _ANNOTATOR
    box_thresholds: tuple[float, ...] = (0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8)
    box_precision: float = 0.7
    box_ious: tuple[float, ...] = (0.05, 0.10, 0.15, 0.20)
    group_pattern: str | None = None
    draws: int = 2000
    workers: int = 2

    def quick(self) -> EvaluationSettings:
        """The same evaluation in minutes, on few scans and with hardly trained networks: it shows that it works."""
        short = replace(self.segmenter, epochs=4, fold_epochs=4, steps_per_epoch=6, batch=1, gammas=())
        return replace(
            self,
            folds=2,
            max_cases=10,
            test_sources=2,
            source_epochs=4,
            segmenter=short,
            assessor=replace(self.assessor, epochs=3, steps_per_epoch=6, batch=1, average_flips=False, hide_mask=False),
            per_bin=4,
            draws=500,
        )

    def with_length(self, length: float) -> EvaluationSettings:
        """The same evaluation with all trainings this many times as long, of at least two epochs each."""

        def scaled(epochs: int) -> int:
            return max(2, round(epochs * length))

        def of(settings: TrainingSettings) -> TrainingSettings:
            return replace(settings, epochs=scaled(settings.epochs), fold_epochs=scaled(settings.fold_epochs))

        return replace(
            self,
            source_epochs=scaled(self.source_epochs),
            segmenter=of(self.segmenter),
            assessor=of(self.assessor),
        )

    def with_patch(self, patch: Triple) -> EvaluationSettings:
        """The same evaluation with networks that learn from patches of this size, and look at scans through them."""
        return replace(
            self, segmenter=replace(self.segmenter, patch=patch), assessor=replace(self.assessor, patch=patch)
        )

    def numbers(self) -> EvaluationSettings:
        """These settings without those that no number depends on: what runs are compared by."""
        return replace(self, workers=1)
