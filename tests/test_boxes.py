from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import measure

from segqc.quality.boxes import (
    BoxSettings,
    Detection,
    box_iou,
    find_boxes,
    largest_box_area_mm2,
    largest_evidence,
    match_boxes,
    unite_boxes,
)
from segqc.types import ErrorBox

ISO = (1.0, 1.0, 1.0)
ALL = BoxSettings(min_distance_voxels=0, min_area_mm2=0, max_slice_share=1.0)


def box(start: tuple[int, int], stop: tuple[int, int], index: int = 0) -> ErrorBox:
    return ErrorBox(index, start, stop, float((stop[0] - start[0]) * (stop[1] - start[1])), 1.0, 1.0)


def place(boxes: list[ErrorBox]) -> list[tuple[int, ...]]:
    return [(b.slice_index, *b.start, *b.stop) for b in boxes]


def unite_by_hand(corners: list[tuple[int, int, int, int]], distance: float) -> list[tuple[int, int, int, int]]:
    """Unite one pair at a time, until no pair is near."""
    boxes = list(corners)
    while True:
        for a, b in itertools.combinations(boxes, 2):
            gaps = [max(b[k] - a[k + 2], a[k] - b[k + 2], 0) for k in (0, 1)]
            if (gaps[0] ** 2 + gaps[1] ** 2) ** 0.5 < distance:
                boxes.remove(a)
                boxes.remove(b)
                boxes.append((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
                break
        else:
            return sorted(boxes)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_boxes_are_skimage_s_regions_slice_by_slice(axis: int) -> None:
    error = np.random.default_rng(axis % 3).random((12, 11, 10), dtype=np.float32)
    wanted = []
    for i, plane in enumerate(np.moveaxis(error, axis, 0)):
        for region in measure.regionprops(measure.label(plane >= 0.7, connectivity=2), intensity_image=plane):
            a0, a1, b0, b1 = region.bbox
            mean, peak = plane[a0:b0, a1:b1].mean(), plane[a0:b0, a1:b1].max()
            wanted.append(((i, *region.bbox), float((b0 - a0) * (b1 - a1)), mean, peak))
    got = find_boxes(error, axis, ISO, replace(ALL, threshold=0.7))
    assert place(got) == sorted(w[0] for w in wanted)
    for b, w in zip(got, sorted(wanted), strict=True):
        assert (b.area_mm2, b.mean_error, b.peak_error) == pytest.approx(w[1:])


def test_areas_use_the_slice_s_own_spacing() -> None:
    error = np.zeros((20, 20, 20), bool)
    error[3:7, 5:10, 8:14] = True
    spacing = (0.5, 2.0, 3.0)
    for axis, sides in ((0, (5, 6)), (1, (4, 6)), (2, (4, 5))):
        first, second = (s for a, s in enumerate(spacing) if a != axis)
        for b in find_boxes(error, axis, spacing, ALL):
            assert b.area_mm2 == pytest.approx(sides[0] * first * sides[1] * second)
            assert (b.mean_error, b.peak_error) == (1.0, 1.0)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(1, 6)] * 2), max_size=14),
    st.sampled_from([0.5, 1.0, 2.0, 5.0]),
    st.randoms(use_true_random=False),
)
def test_uniting_gives_what_uniting_pair_by_pair_gives(
    boxes: list[tuple[int, ...]], distance: float, random: object
) -> None:
    corners = [(a, b, a + h, b + w) for a, b, h, w in boxes]
    wanted = unite_by_hand(corners, distance)
    random.shuffle(corners)  # type: ignore[attr-defined]
    got = unite_boxes(np.array(corners, np.int32).reshape(-1, 4), distance)
    assert [tuple(row) for row in got.tolist()] == wanted


def test_uniting_goes_on_until_stable() -> None:
    # the union of the first two is near the third, neither of them alone is
    corners = np.array([(0, 0, 2, 2), (5, 5, 20, 7), (0, 10, 2, 12)], np.int32)
    assert unite_boxes(corners[[0, 2]], 5.0).shape == (2, 4)
    assert unite_boxes(corners, 5.0).tolist() == [[0, 0, 20, 12]]


def test_boxes_at_the_distance_stay_apart() -> None:
    at, nearer = ([[0, 0, 2, 2], [2 + gap, 0, 9, 2]] for gap in (5, 4))
    assert unite_boxes(np.array(at, np.int32), 5.0).tolist() == at
    assert unite_boxes(np.array(nearer, np.int32), 5.0).tolist() == [[0, 0, 9, 2]]
    diagonal = [[0, 0, 2, 2], [5, 6, 9, 9]]  # gaps 3 and 4: distance 5
    assert unite_boxes(np.array(diagonal, np.int32), 5.0).tolist() == diagonal


def test_thousands_of_components_in_a_slice_are_united_in_portions() -> None:
    grid = np.zeros((200, 200, 1), bool)
    grid[::4, ::4] = True  # 2500 single voxels, gaps of 3
    assert place(find_boxes(grid, 2, ISO, replace(ALL, min_distance_voxels=5))) == [(0, 0, 0, 197, 197)]
    assert len(find_boxes(grid, 2, ISO, replace(ALL, min_distance_voxels=3))) == 2500


def test_boxes_of_different_slices_are_never_united() -> None:
    error = np.zeros((9, 9, 4), bool)
    error[3:5, 3:5, 1:3] = True
    assert place(find_boxes(error, 2, ISO, replace(ALL, min_distance_voxels=5))) == [(1, 3, 3, 5, 5), (2, 3, 3, 5, 5)]


def test_slices_are_apart_however_many_are_united_at_once() -> None:
    rng = np.random.default_rng(0)
    error = rng.random((24, 30, 40)) > 0.93  # about 40 components in a slice, more than are united at once
    error[[0, -1], :3] = True  # the last row of a slice and the first of the next one
    for axis in range(3):
        every = find_boxes(error, axis, ISO, replace(ALL, min_distance_voxels=2))
        for index in range(error.shape[axis]):
            alone = find_boxes(np.take(error, [index], axis), axis, ISO, replace(ALL, min_distance_voxels=2))
            assert [replace(b, slice_index=0) for b in every if b.slice_index == index] == list(alone)


def test_small_boxes_are_dropped_after_uniting() -> None:
    error = np.zeros((40, 40, 1), np.float32)
    error[0:5, 0:5] = 0.8  # two boxes of 25 mm2, united 5 x 13 = 65 mm2
    error[0:5, 8:13] = 0.8
    error[30:36, 30:36] = 0.8  # 36 mm2, alone
    got = find_boxes(error, 2, ISO, BoxSettings(min_area_mm2=65.0))
    assert place(got) == [(0, 0, 0, 5, 13)]
    assert got[0].mean_error == pytest.approx(0.8 * 50 / 65)
    assert find_boxes(error, 2, ISO, BoxSettings()) == ()


def test_a_box_larger_than_both_bounds_is_dropped() -> None:
    error = np.zeros((20, 20, 2), bool)
    error[2:18, 2:18, 0] = True  # 256 of 400 mm2
    error[0:4, 0:4, 1] = True
    small = replace(ALL, max_slice_share=0.5)
    assert place(find_boxes(error, 2, ISO, small)) == [(1, 0, 0, 4, 4)]
    assert len(find_boxes(error, 2, ISO, replace(small, max_area_mm2=255.0))) == 1
    assert len(find_boxes(error, 2, ISO, replace(small, max_area_mm2=256.0))) == 2
    # under half the slice a box stays, however small the true ones were
    assert len(find_boxes(error, 2, ISO, replace(ALL, max_slice_share=0.7, max_area_mm2=1.0))) == 2


def test_the_largest_box_of_a_true_error_has_no_upper_bound() -> None:
    error = np.zeros((20, 20, 2), bool)
    assert largest_box_area_mm2(error, 2, (2.0, 1.0, 4.0)) is None
    error[1:19, 1:19, 0] = True
    assert largest_box_area_mm2(error, 2, (2.0, 1.0, 4.0)) == pytest.approx(18 * 18 * 2)
    assert largest_box_area_mm2(error, 2, (2.0, 1.0, 4.0), replace(ALL, min_area_mm2=1000.0)) is None


def test_nothing_wrong_no_boxes() -> None:
    assert find_boxes(np.full((4, 4, 4), 0.49, np.float32), 2, ISO, ALL) == ()
    assert find_boxes(np.zeros((4, 4, 4), bool), 2, ISO, ALL) == ()


def test_a_single_voxel_is_a_box() -> None:
    error = np.zeros((4, 5, 6), np.float32)
    error[1, 2, 3] = 0.5
    alone = ErrorBox(1, (2, 3), (3, 4), 1.0, 0.5, 0.5, evidence=-16.0)
    assert find_boxes(error, 0, (1.0, 0.5, 2.0), ALL) == (alone,)


def test_the_evidence_is_the_largest_logit_of_a_voxel_and_its_neighbours_in_the_slice() -> None:
    error = np.full((3, 9, 12), 1e-4, np.float32)
    error[1, 2:7, 3:8] = 0.9
    error[1, 4, 5] = 0.99  # neither the centre alone nor a corner of a square counts
    error[2, 2:7, 5] = 0.9  # a seam of one voxel
    square, seam = find_boxes(error, 0, ISO, ALL)
    assert square.evidence == pytest.approx(np.log(9), rel=1e-4)
    assert seam.evidence == pytest.approx(np.log(1e-4 / (1 - 1e-4)), rel=1e-4)
    assert find_boxes(error, 0, ISO, replace(ALL, min_evidence=0.0)) == (square,)
    assert largest_evidence(error, 0) == square.evidence
    assert find_boxes(error, 0, ISO, replace(ALL, min_evidence=2.2)) == ()


def test_a_box_at_the_edge_has_the_evidence_of_what_is_there() -> None:
    error = np.zeros((1, 6, 6), np.float32)
    error[0, :2, 4:] = 0.9
    (corner,) = find_boxes(error, 0, ISO, ALL)
    assert corner.evidence == pytest.approx(np.log(9), rel=1e-4)
    (certain,) = find_boxes(np.ones((1, 6, 6), bool), 0, ISO, ALL)
    assert certain.evidence == 16.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.tuples(*[st.booleans()] * 3))
def test_flips_move_boxes_and_change_nothing_else(seed: int, flips: tuple[bool, ...]) -> None:
    error = np.random.default_rng(seed).random((16, 14, 3), dtype=np.float32)
    chosen = replace(ALL, threshold=0.97, min_distance_voxels=3, min_area_mm2=2)
    axes = [a for a, flip in enumerate(flips) if flip]

    def flipped(b: ErrorBox) -> tuple[int, ...]:
        spans = [(b.start[0], b.stop[0]), (b.start[1], b.stop[1]), (b.slice_index, b.slice_index + 1)]
        for a in axes:
            spans[a] = (error.shape[a] - spans[a][1], error.shape[a] - spans[a][0])
        return (spans[2][0], spans[0][0], spans[1][0], spans[0][1], spans[1][1])

    wanted = sorted(flipped(b) for b in find_boxes(error, 2, ISO, chosen))
    assert place(find_boxes(np.flip(error, axes), 2, ISO, chosen)) == wanted


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), *[st.integers(0, 8)] * 2, *[st.integers(1, 6)] * 2), min_size=2, max_size=2)
)
def test_iou_is_that_of_the_painted_boxes(pair: list[tuple[int, ...]]) -> None:
    painted, boxes = [], []
    for index, a, b, h, w in pair:
        canvas = np.zeros((2, 16, 16), bool)
        canvas[index, a : a + h, b : b + w] = True
        painted.append(canvas)
        boxes.append(box((a, b), (a + h, b + w), index))
    wanted = (painted[0] & painted[1]).sum() / (painted[0] | painted[1]).sum()
    assert box_iou(*boxes) == pytest.approx(wanted)


def test_each_box_is_matched_once() -> None:
    true = [box((0, 0), (10, 10))]
    predicted = [box((0, 0), (10, 5)), box((0, 5), (10, 10)), box((0, 0), (10, 10), index=1)]
    got = match_boxes(predicted, true, 0.05)
    assert got == Detection(predicted=3, true=1, matched=1)
    assert (got.precision, got.recall) == (pytest.approx(1 / 3), 1.0)


def test_as_many_boxes_as_possible_are_matched() -> None:
    # the first prediction meets both true boxes, the second one only: greedy by order or by IoU would match one
    true = [box((0, 0), (10, 10)), box((0, 10), (10, 20))]
    predicted = [box((0, 0), (10, 18)), box((0, 0), (10, 4))]
    assert match_boxes(predicted, true, 0.2).matched == 2


@pytest.mark.parametrize(("min_iou", "matched"), [(0.05, 3), (0.10, 2), (0.15, 1), (0.20, 0)])
def test_matching_needs_the_iou(min_iou: float, matched: int) -> None:
    true = [box((0, 0), (20, 20), index=i) for i in range(3)]
    predicted = [box((0, 0), (2, 16), 0), box((0, 0), (4, 13), 1), box((0, 0), (4, 17), 2)]  # IoU .08, .13, .17
    assert match_boxes(predicted, true, min_iou).matched == matched


def test_precision_and_recall_without_boxes_are_undefined() -> None:
    none = match_boxes([], [box((0, 0), (2, 2))], 0.05)
    assert (none.precision, none.recall) == (None, 0.0)
    assert match_boxes([box((0, 0), (2, 2))], [], 0.05).recall is None
    with pytest.raises(ValueError, match="IoU"):
        match_boxes([], [], 0.0)


def test_detections_of_several_scans_add_up() -> None:
    assert sum([Detection(3, 1, 1), Detection(1, 3, 1)], Detection()) == Detection(4, 4, 2)


@pytest.mark.parametrize(
    "values",
    [
        {"threshold": 0},
        {"min_area_mm2": -1},
        {"max_area_mm2": -1},
        {"min_area_mm2": np.nan},
        {"max_slice_share": np.inf},
    ],
)
def test_settings_that_mean_nothing_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="boxes"):
        BoxSettings(**values)


def test_arrays_that_are_not_volumes_are_refused() -> None:
    with pytest.raises(ValueError, match="3-D"):
        find_boxes(np.zeros((4, 4), bool), 0, ISO, ALL)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_is_small_is_bounded_by_the_mask_s_mean_area(axis: int) -> None:
    mask = np.zeros((6, 10, 10), bool)
    mask[1, :5, :4], mask[2, :5, :8] = True, True  # 20 and 40 voxels: 30 on average
    mask, spacing = np.moveaxis(mask, 0, axis), np.insert([2.0, 3.0], axis, 7.0).tolist()
    settings = BoxSettings(min_area_share=0.5)
    assert settings.for_mask(mask, axis, spacing).min_area_mm2 == pytest.approx(0.5 * 30 * 6)
    assert replace(settings, min_area_mm2=50.0).for_mask(mask, axis, spacing).min_area_mm2 == 50.0
    assert settings.for_mask(np.zeros_like(mask), axis, spacing) == settings
    assert replace(settings, min_area_share=None).for_mask(mask, axis, spacing).min_area_mm2 == 100.0
