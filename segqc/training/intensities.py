"""Other intensities of the same scan: what SegQC-Net is trained on, so that it does not fail where the segmenter does.

A network that knows only scans like those that are labelled misses tissue on another scanner's scans, and a SegQC-Net
that knows only these does not see it. Contrast, gain, resolution and noise are drawn from wide ranges, as domain
generalisation draws them (compare Zhang et al., "Generalizing deep learning for medical image segmentation to unseen
domains via deep stacked transformation", IEEE TMI 39, 2020).
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from scipy import ndimage

from segqc.types import FloatArray

_LARGEST_GAMMA: Final = 3.0  # and its inverse the smallest
_GAIN: Final = 0.3  # the largest standard deviation of the gain's logarithm
_BLUR: Final = (0.6, 1.25)  # standard deviation in voxels, in plane
_NOISE: Final = 0.35  # the largest standard deviation, in those of the scan
_OFTEN: Final = 0.5  # the chance of each change
_WAVES: Final = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (2, 0, 0), (0, 2, 0))


def with_other_intensities(image: FloatArray, rng: np.random.Generator) -> FloatArray:
    """A patch as another scanner might have made it: of the same mean and standard deviation.

    Args:
        image: the patch (a, b, c) in the canonical frame, slices last.
        rng: draws what is changed, and how much.
    """
    mean, deviation = float(image.mean()), float(image.std())
    if deviation < 1e-6:
        return image
    low, high = float(image.min()), float(image.max())
    changed = (image - np.float32(low)) / np.float32(high - low)
    if rng.random() < _OFTEN:
        changed **= np.float32(math.exp(rng.uniform(-1, 1) * math.log(_LARGEST_GAMMA)))
    if rng.random() < _OFTEN:
        changed *= np.exp(np.float32(rng.uniform(0, _GAIN)) * _smooth_field(image.shape, rng))
    if rng.random() < _OFTEN:
        sigma = rng.uniform(*_BLUR)
        changed = ndimage.gaussian_filter(changed, (sigma, sigma, 0))
    if rng.random() < _OFTEN:
        noise = rng.standard_normal(image.shape, dtype=np.float32)
        changed += np.float32(rng.uniform(0, _NOISE) * changed.std()) * noise
    changed -= changed.mean()
    changed *= np.float32(deviation / max(float(changed.std()), 1e-6))
    return np.asarray(changed + np.float32(mean), np.float32)


def _smooth_field(shape: tuple[int, ...], rng: np.random.Generator) -> FloatArray:
    """A random sum of long waves, with mean 0 and standard deviation 1."""
    axes = np.meshgrid(*(np.linspace(0, np.pi, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    field = np.zeros(shape, np.float32)
    for wave in _WAVES:
        along = sum(n * axis for n, axis in zip(wave, axes, strict=True) if n)
        field += np.float32(rng.normal()) * np.cos(along + np.float32(rng.uniform(0, 2 * np.pi)))
    field -= field.mean()
    return np.asarray(field / max(float(field.std()), 1e-6), np.float32)
