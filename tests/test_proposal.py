"""Proposals: what is changed, and what is left."""

from __future__ import annotations

import numpy as np
import pytest

from segqc.quality.boxes import BoxSettings, find_boxes
from segqc.quality.error_maps import difference
from segqc.quality.proposal import propose
from segqc.types import ErrorBox, Structure

ONE, TWO = Structure("one", (1,)), Structure("two", (2, 3))


def whole(index: int, shape: tuple[int, int]) -> ErrorBox:
    return ErrorBox(index, (0, 0), shape, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_with_the_true_error_the_proposal_is_the_truth_in_the_boxes_and_the_mask_elsewhere(axis: int) -> None:
    rng = np.random.default_rng(axis)
    truth = rng.integers(0, 3, (9, 8, 7)).astype(np.uint8)
    labels = rng.integers(0, 4, (9, 8, 7)).astype(np.uint8)
    errors = np.stack([difference(s.mask(labels), s.mask(truth)).astype(np.float32) for s in (ONE, TWO)])
    plane = tuple(n for a, n in enumerate(truth.shape) if a != axis)
    boxes = [whole(2, plane), whole(5, plane)]
    proposed = propose(labels, errors, (ONE, TWO), (boxes, boxes), axis)
    for index in range(truth.shape[axis]):
        found, before, true = (np.take(a, index, axis) for a in (proposed, labels, truth))
        if index in (2, 5):
            assert all(np.array_equal(s.mask(found), s.mask(true)) for s in (ONE, TWO))
            stays = TWO.mask(before) & TWO.mask(true)
            np.testing.assert_array_equal(found[stays], before[stays], "a value of the structure stays")
        else:
            np.testing.assert_array_equal(found, before)


def test_a_box_is_of_one_structure_and_its_edges_are_kept() -> None:
    labels = np.zeros((6, 6, 1), np.uint8)
    errors = np.full((2, 6, 6, 1), 0.6, np.float32)
    errors[1] = 0.7
    proposed = propose(labels, errors, (ONE, TWO), ([ErrorBox(0, (1, 1), (3, 4), 1, 1, 1)], []), 2)
    assert np.argwhere(proposed).tolist() == [[i, j, 0] for i in (1, 2) for j in (1, 2, 3)]
    both = [[ErrorBox(0, (1, 1), (3, 4), 1, 1, 1)]] * 2
    assert (propose(labels, errors, (ONE, TWO), both, 2)[1:3, 1:4] == 2).all(), "the likelier one claims a voxel"
    assert not labels.any()


def test_what_is_not_likely_stays() -> None:
    labels = np.ones((4, 4, 2), np.uint8)
    error = np.full((1, 4, 4, 2), 0.49, np.float32)
    error[0, 0, 0, 0] = 0.5
    found = find_boxes(error[0], 2, (1, 1, 1), BoxSettings(threshold=0.1, min_area_mm2=0, max_slice_share=1))
    assert np.argwhere(propose(labels, error, (ONE,), (found,), 2) == 0).tolist() == [[0, 0, 0]]
