"""Prediction and prediction with the augmentation group."""

from __future__ import annotations

import numpy as np
import pytest

from segqc.networks.segmenter import Segmenter
from segqc.volumes import Volume
from tests.test_networks import small_segmenter


def scan(shape: tuple[int, int, int] = (18, 14, 6)) -> Volume:
    """Noise with thick slices along the last axis."""
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return Volume(array, np.diag([1.0, 1.0, 3.0, 1.0]))


def test_a_prediction_lies_on_the_scan_and_its_probabilities_sum_to_one() -> None:
    prediction = small_segmenter().predict(scan())
    assert prediction.labels.shape == (18, 14, 6)
    np.testing.assert_array_equal(prediction.labels.affine, scan().affine)
    np.testing.assert_allclose(prediction.probabilities.sum(axis=0), 1.0, atol=1e-5)
    np.testing.assert_array_equal(prediction.labels.array, prediction.probabilities.argmax(axis=0))


def test_label_values_need_not_be_consecutive() -> None:
    prediction = small_segmenter(values=(7,)).predict(scan())
    assert set(np.unique(prediction.labels.array)) <= {0, 7}


def test_the_group_gives_each_member_in_the_scans_own_frame() -> None:
    """An untrained network commutes with nothing: the first member alone must be the plain prediction."""
    model = small_segmenter(transposes=True)
    both, tta = model.predict_both(scan(), gammas=(0.7,))
    assert len(tta.members) == 16
    assert all(m.shape == (18, 14, 6) for m in tta.members)
    plain = model.predict(scan())
    np.testing.assert_allclose(both.logits, plain.logits, atol=1e-5)
    assert (tta.members[0] == plain.labels.array).mean() > 0.999
    np.testing.assert_allclose(tta.mean_probabilities.sum(axis=0), 1.0, atol=1e-2)


def test_the_group_without_transposes_has_four_members_and_the_median_is_their_median() -> None:
    model = small_segmenter()
    tta = model.predict_tta(scan())
    assert len(tta.members) == 4
    votes = np.mean([m == 1 for m in tta.members], axis=0)
    # two classes: where all members agree, so does the median
    assert (tta.labels.array[votes == 1] == 1).all()
    assert (tta.labels.array[votes == 0] == 0).all()


@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 0, 1), (0, 2, 1)])
def test_the_files_axis_order_does_not_matter(axes: tuple[int, int, int]) -> None:
    """The same scan, stored with its axes in another order and reversed, gets the same mask."""
    model: Segmenter = small_segmenter()
    one = scan()
    permutation = np.zeros((4, 4))
    permutation[3, 3] = 1
    for new, old in enumerate(axes):
        permutation[old, new] = 1
    turned = Volume(np.ascontiguousarray(one.array.transpose(axes)), one.affine @ permutation)
    expected = model.predict(one).labels.array.transpose(axes)
    assert (model.predict(turned).labels.array == expected).mean() > 0.999
