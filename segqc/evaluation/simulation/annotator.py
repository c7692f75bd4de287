"""A simulated annotator: what it makes of a mask that it is handed, and what that takes."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import numpy as np
import torch
from scipy import ndimage

from segqc.evaluation.simulation.study import AnnotatorSettings
from segqc.training.corruptions import deformed, sampling_grid
from segqc.types import LabelArray
from segqc.volumes import Volume, through_plane_axis

_NEIGHBOURS = ndimage.generate_binary_structure(2, 2)


def generator_of(seed: int, scan: str) -> np.random.Generator:
    """The source of an annotator's slips on one scan, whenever it comes to it."""
    return np.random.default_rng((seed, int.from_bytes(hashlib.sha256(scan.encode()).digest()[:8])))


def correct(
    mask: LabelArray,
    truth: Volume,
    settings: AnnotatorSettings,
    rng: np.random.Generator,
    slices: Collection[int] | None = None,
) -> LabelArray:
    """What the annotator makes of a mask.

    Args:
        mask: the label map that it is handed, (n0, n1, n2).
        truth: the true labels, on the same grid.
        settings: how well it works.
        rng: the source of its slips.
        slices: those that it opens; None for all.

    Returns:
        The label map that it submits, of the same shape.
    """
    axis = through_plane_axis(truth)
    opened = range(mask.shape[axis]) if slices is None else sorted(slices)
    drawn = _drawn(truth, settings.boundary_noise_mm, rng)
    corrected = mask.copy()
    for index in opened:
        here = tuple(index if a == axis else slice(None) for a in range(3))
        corrected[here] = _slice(mask[here], drawn[here], settings.missed_share, rng)
    return corrected


def _drawn(truth: Volume, noise_mm: float, rng: np.random.Generator) -> LabelArray:
    """The contours as the annotator would draw them."""
    labels = np.asarray(truth.array, np.uint8)
    if not noise_mm:
        return labels
    shape = (labels.shape[0], labels.shape[1], labels.shape[2])
    grid = sampling_grid(shape, truth.spacing_mm, noise_mm, rng)
    return deformed(torch.from_numpy(labels.astype(np.float32))[None], grid, labels=True)[0].numpy().astype(np.uint8)


def _slice(mask: LabelArray, drawn: LabelArray, missed_share: float, rng: np.random.Generator) -> LabelArray:
    if not missed_share:
        return drawn
    parts, count = ndimage.label(mask != drawn, _NEIGHBOURS)
    seen = np.concatenate([[True], rng.random(count) >= missed_share])
    return np.where(seen[parts], drawn, mask)
