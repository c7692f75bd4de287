"""What several observers' labels of one scan say of the truth."""

from __future__ import annotations

import numpy as np

from segqc.quality.variability import nearest_truth, variability


def maps(seed: int, count: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    return list(np.random.default_rng(seed).integers(0, 3, (count, 6, 5, 4)).astype(np.uint8))


def test_without_observers_the_label_is_the_truth() -> None:
    mask, truth = maps(0, 2)
    assert not variability(truth, ()).any()
    np.testing.assert_array_equal(nearest_truth(mask, truth, ()), truth)


def test_a_mask_is_wrong_only_where_it_agrees_with_nobody() -> None:
    mask, truth, *observers = maps(1, 4)
    nearest = nearest_truth(mask, truth, observers)
    agrees = np.any([mask == labels for labels in (truth, *observers)], axis=0)
    np.testing.assert_array_equal(nearest == mask, agrees)
    np.testing.assert_array_equal(nearest[~agrees], truth[~agrees])
    assert nearest.dtype == np.uint8
    differ = np.any([observer != truth for observer in observers], axis=0)
    np.testing.assert_array_equal(variability(truth, observers), differ)
    for observer in observers:
        np.testing.assert_array_equal(nearest_truth(observer, truth, observers), observer)
