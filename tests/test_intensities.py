"""Strong changes of intensities: another contrast, gain, resolution and noise of the same scan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy.stats import spearmanr

from segqc.networks.plan import plan_network
from segqc.training import TrainingSettings
from segqc.training.cases import Example
from segqc.training.intensities import with_other_intensities
from segqc.training.patches import PatchDataset
from segqc.types import FloatArray

SHAPE = (24, 20, 8)


def scan(seed: int = 0) -> FloatArray:
    """A bright block on a dark ground, with a little noise, normalised."""
    image = np.random.default_rng(seed).normal(0, 0.1, SHAPE)
    image[6:16, 5:15, 2:6] += 3
    return np.asarray((image - image.mean()) / image.std(), np.float32)


def test_mean_and_deviation_stay_and_all_else_changes_by_the_generator_alone() -> None:
    image = scan() * 1.5 + 0.25
    changed = [with_other_intensities(image, np.random.default_rng(seed)) for seed in range(20)]
    for other in changed:
        assert other.dtype == np.float32
        assert np.isfinite(other).all()
        np.testing.assert_allclose([other.mean(), other.std()], [image.mean(), image.std()], atol=1e-3)
    again = with_other_intensities(image, np.random.default_rng(7))
    np.testing.assert_array_equal(again, changed[7])
    differences = [float(np.abs(other - image).max()) for other in changed]
    assert np.median(differences) > 0.3, "far beyond the image's own noise"
    assert min(spearmanr(image.ravel(), other.ravel()).statistic for other in changed) > 0.1, "the same scan"
    np.testing.assert_array_equal(image, scan() * 1.5 + 0.25)


def test_slices_are_not_blurred_into_each_other() -> None:
    image = np.zeros(SHAPE, np.float32)
    image[:, :, 4] = scan()[:, :, 4]
    sharp = [np.ptp(with_other_intensities(image, np.random.default_rng(s))[:, :, 0]) for s in range(40)]
    assert sum(span < 1e-4 for span in sharp) >= 5, "of the draws without noise and gain the empty slices stay even"


def test_a_scan_without_any_contrast_stays() -> None:
    flat = np.full(SHAPE, 2.0, np.float32)
    np.testing.assert_array_equal(with_other_intensities(flat, np.random.default_rng(0)), flat)


def test_only_patches_with_masks_change_strongly() -> None:
    plan = plan_network((1.0, 1.0, 1.0), SHAPE, in_channels=2, out_channels=1, patch=SHAPE)
    truth = (scan() > 1).astype(np.uint8)
    settings = TrainingSettings(flips=False)
    example = Example("block", scan(), truth)

    def patches(example: Example, settings: TrainingSettings) -> list[torch.Tensor]:
        dataset = PatchDataset([example], plan, settings)
        return [dataset[draw]["image"] for draw in range(12)]

    for of_segmenter in (settings, replace(settings, segqc_intensities="usual")):
        np.testing.assert_array_equal(
            torch.stack(patches(example, of_segmenter)), torch.stack(patches(example, settings))
        )
    masked = replace(example, mask=truth)
    strong, usual = (
        patches(masked, replace(settings, segqc_intensities=intensities)) for intensities in ("strong", "usual")
    )
    assert not torch.equal(torch.stack(strong), torch.stack(usual))
    for first, again in zip(strong, patches(masked, settings), strict=True):
        assert torch.equal(first, again)
