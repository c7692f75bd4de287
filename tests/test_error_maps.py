from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage import measure

from segqc.quality.error_maps import (
    PLAIN_EXTRACTION,
    ExtractionSettings,
    bounding_box,
    difference,
    dilate_in_plane,
    estimated_truth,
    extract_errors,
    label_slices,
)

UNBOUNDED = replace(PLAIN_EXTRACTION, min_component_mm2=0.0)
BAND_ONLY = replace(UNBOUNDED, max_band_share=0.4)
ISO = (1.0, 1.0, 1.0)


def blobs(seed: int, shape: tuple[int, int, int] = (30, 26, 5)) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=shape)
    return ndimage.gaussian_filter(noise, (3, 3, 0.5)) > 0.02


def band_by_distance(mask: np.ndarray, axis: int, spacing: tuple[float, ...], radius: float) -> np.ndarray:
    """Voxels within a radius of the contour, slice by slice, by exact distance transforms."""
    plane = [s for a, s in enumerate(spacing) if a != axis]
    band = np.zeros(mask.shape, bool)
    for i in range(mask.shape[axis]):
        here = np.moveaxis(mask, axis, 0)[i]
        if here.any() and not here.all():
            inside = ndimage.distance_transform_edt(here, sampling=plane)
            outside = ndimage.distance_transform_edt(~here, sampling=plane)
            np.moveaxis(band, axis, 0)[i] = np.where(here, inside, outside) <= radius + 1e-9
    return band


def test_difference_and_estimated_truth_are_each_other_s_inverse() -> None:
    mask, truth = blobs(0), blobs(1)
    error = difference(mask, truth)
    assert error.dtype == bool
    np.testing.assert_array_equal(error, np.abs(mask.astype(int) - truth.astype(int)))
    np.testing.assert_array_equal(estimated_truth(mask, error.astype(np.float32)), truth)
    soft = np.random.default_rng(0).random(mask.shape, dtype=np.float32)
    got = estimated_truth(mask, soft)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, mask * (1 - soft) + (1 - mask) * soft)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 1.3), (0.2, 0.2), (3.0, 0.5)])
@pytest.mark.parametrize("radius", [0.4, 1.0, 2.0, 3.7])
def test_dilation_is_scipy_s_with_a_disk_in_mm(spacing: tuple[float, float], radius: float) -> None:
    mask = np.random.default_rng(3).random((3, 25, 21)) < 0.01
    reach = [int(np.ceil(radius / s)) for s in spacing]
    i, j = (np.arange(-r, r + 1) * s for r, s in zip(reach, spacing, strict=True))
    disk = np.hypot(i[:, None], j[None]) <= radius + 1e-9
    wanted = ndimage.binary_dilation(mask, structure=disk[None])
    np.testing.assert_array_equal(dilate_in_plane(mask, radius, spacing), wanted)


def test_dilation_reaches_past_small_volumes() -> None:
    mask = np.zeros((2, 2, 1), bool)
    mask[0, 0, 0] = True
    assert dilate_in_plane(mask, 50.0, (1.0, 1.0)).sum() == 2


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("spacing", [ISO, (0.8, 1.2, 4.0), (4.0, 1.0, 0.6)])
def test_the_band_is_what_lies_within_the_radius_of_the_contour(axis: int, spacing: tuple[float, float, float]) -> None:
    mask = blobs(axis)
    everywhere = np.ones(mask.shape, np.float32)
    kept = extract_errors(everywhere, mask, axis, spacing, UNBOUNDED)
    np.testing.assert_array_equal(kept == 0, band_by_distance(mask, axis, spacing, 2.0))


def shifted_with_a_hole() -> tuple[np.ndarray, np.ndarray]:
    """A truth, and a mask that is shifted by a voxel (variability) and has a hole of 120 mm2 (an error)."""
    truth = np.zeros((60, 60, 4), bool)
    truth[15:45, 15:45] = True
    mask = np.zeros_like(truth)
    mask[16:46, 15:45] = True
    mask[20:30, 20:32, 2] = False
    return mask, truth


def test_observer_variability_goes_and_errors_stay() -> None:
    mask, truth = shifted_with_a_hole()
    extracted = extract_errors(difference(mask, truth), mask, 2, ISO, PLAIN_EXTRACTION)
    assert extracted.dtype == bool
    assert not extracted[..., [0, 1, 3]].any()
    # the band of 2 mm takes the hole's rim as well
    wanted = np.zeros((60, 60), bool)
    wanted[22:28, 22:30] = True
    assert (extracted[..., 2] & wanted).sum() == wanted.sum()
    assert not extracted[:15, :, 2].any() and extracted[..., 2].sum() <= wanted.sum() + 8  # the rim's round corners


def test_what_survives_grows_back_and_variability_does_not() -> None:
    mask, truth = shifted_with_a_hole()
    error = difference(mask, truth)
    hole = np.zeros_like(mask)
    hole[20:30, 20:32, 2] = True
    plain, default, whole = (
        extract_errors(error, mask, 2, ISO, s)
        for s in (PLAIN_EXTRACTION, ExtractionSettings(), replace(ExtractionSettings(), regrow=1.0))
    )
    for extracted in (default, whole):
        assert not extracted[~hole].any()
    assert plain[hole].sum() < default[hole].sum() < whole[hole].sum() <= hole.sum()
    assert default[hole].mean() > 0.5
    assert whole[hole].mean() > 0.8  # a disk does not reach the corners


def test_growing_back_stays_within_the_component_and_its_reach() -> None:
    mask = np.zeros((40, 60, 1), bool)
    mask[20:] = True
    error = np.zeros(mask.shape, np.float32)
    error[18:30, 5:20, 0] = 0.9  # deep: the band takes the rows up to 22
    error[18:21, 20:50, 0] = 0.8  # a sliver along the contour that is connected with it
    error[20:22, 51:55, 0] = 0.7  # and one that is not
    chosen = ExtractionSettings(band_mm=3, max_band_share=1, min_component_mm2=20, max_component_share=1, regrow=1)
    got = extract_errors(error, mask, 2, ISO, chosen)
    core = np.zeros(mask.shape, bool)
    core[23:30, 5:20] = True
    near = ndimage.distance_transform_edt(~core[..., 0])[..., None] <= 3
    wanted = np.where(near & (error > 0), error, 0)
    wanted[..., 0][:, 51:] = 0
    np.testing.assert_array_equal(got, wanted)
    assert (got[20:23, 5:20] == np.float32(0.9)).all()
    assert not got[..., 0][:20].any() and not got[..., 0][:, 24:].any()


def opened_by_hand(
    error: np.ndarray, mask: np.ndarray, spacing: tuple[float, ...], s: ExtractionSettings
) -> np.ndarray:
    """Extraction of a true error by distance transforms and skimage, slice by slice, for a band without a bound."""
    result = np.zeros_like(error)
    outside = error & ~band_by_distance(mask, 2, spacing, s.band_mm)
    filled = mask.any(axis=(0, 1))
    mean_mm2 = mask.sum() / filled.sum() * spacing[0] * spacing[1]
    smallest = min(s.min_component_mm2, s.max_component_share * mean_mm2)
    for i in np.flatnonzero(outside.any(axis=(0, 1))):
        own = measure.label(error[..., i], connectivity=2)
        core = outside[..., i]
        far = ndimage.distance_transform_edt(~core, sampling=spacing[:2])
        near = np.isin(own, np.unique(own[core])) & (own > 0)
        # the band's radius is the largest distance between voxels that is not larger
        steps = np.hypot(*(np.arange(20)[(slice(None), *[None] * (1 - k))] * spacing[k] for k in range(2)))
        radius = steps[steps <= s.band_mm + 1e-9].max()
        opened = measure.label(near & (far <= radius + 1e-9), connectivity=2)
        for region in measure.regionprops(opened):
            if region.area * spacing[0] * spacing[1] >= smallest - 1e-9:
                result[..., i] |= (opened == region.label) & (far <= s.regrow * radius + 1e-9)
    return result


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 3.0), (0.8, 1.2, 4.0)])
def test_extraction_is_what_slices_by_hand_give(seed: int, spacing: tuple[float, float, float]) -> None:
    mask, error = blobs(seed, (40, 36, 4)), blobs(seed + 100, (40, 36, 4))
    chosen = ExtractionSettings(band_mm=2.0, max_band_share=1.0, min_component_mm2=30.0, max_component_share=0.1)
    got = extract_errors(error, mask, 2, spacing, chosen)
    assert 0 < got.sum() < error.sum()
    np.testing.assert_array_equal(got, opened_by_hand(error, mask, spacing, chosen))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_growing_back_only_gives_back(seed: int, less: float, more: float) -> None:
    mask, error = blobs(seed, (20, 18, 3)), np.random.default_rng(seed).random((20, 18, 3), dtype=np.float32)
    less, more = sorted((less, more))
    base = ExtractionSettings(min_component_mm2=0.0)
    got = [extract_errors(error, mask, 2, ISO, replace(base, regrow=r)) for r in (less, more)]
    for extracted in got:
        assert np.isin(extracted - error, (0,)).all(where=extracted > 0)
    assert (got[0] <= got[1]).all()


def test_the_smallest_component_is_relative_to_a_small_structure() -> None:
    mask = np.zeros((60, 60, 3), bool)
    mask[10:20, 10:20, :2] = True  # 100 mm2 in each slice that holds it
    error = np.zeros_like(mask)
    error[40:45, 40:46, 0] = error[30:39, 30:32, 1] = True  # 30 and 18 mm2, away from the contour
    assert extract_errors(error, mask, 2, ISO, ExtractionSettings(max_component_share=0.3)).sum() == 30
    assert extract_errors(error, mask, 2, ISO, ExtractionSettings(max_component_share=0.18)).sum() == 48
    assert extract_errors(error, mask, 2, ISO, ExtractionSettings(max_component_share=None)).sum() == 0
    nothing = np.zeros_like(mask)  # no structure, no size: the area in mm2 alone
    assert extract_errors(error, nothing, 2, ISO, ExtractionSettings()).sum() == 0


def test_a_missing_slice_is_kept_whole() -> None:
    truth = np.zeros((40, 40, 5), bool)
    truth[10:30, 10:30] = True
    mask = truth.copy()
    mask[..., 2] = False
    error = difference(mask, truth)
    np.testing.assert_array_equal(extract_errors(error, mask, 2, ISO, ExtractionSettings()), error)


def test_small_components_are_dropped_by_their_area_in_mm2() -> None:
    mask = np.zeros((30, 30, 3), bool)
    error = np.zeros(mask.shape, np.float32)
    error[2:6, 2:6, 1] = 0.9  # 16 voxels
    error[10:15, 10:14, 1] = 0.9  # 20 voxels
    error[10:15, 10:14, 2] = error[8, 2:12, 1] = 0.3  # under the threshold: no component, stays
    settings = replace(UNBOUNDED, min_component_mm2=20.0)
    got = extract_errors(error, mask, 2, ISO, settings)
    assert not got[2:6, 2:6].any()
    np.testing.assert_array_equal(got[6:], error[6:])
    coarse = extract_errors(error, mask, 2, (1.0, 1.25, 9.0), settings)
    np.testing.assert_array_equal(coarse, error)  # 16 voxels are 20 mm2 now


def test_components_do_not_reach_across_slices() -> None:
    error = np.zeros((12, 12, 6), bool)
    error[4:7, 4:7] = True  # 9 mm2 in each of six slices
    got = extract_errors(error, np.zeros_like(error), 2, ISO, replace(UNBOUNDED, min_component_mm2=10.0))
    assert not got.any()


def test_components_that_touch_by_a_corner_are_one() -> None:
    error = np.zeros((8, 8, 1), bool)
    error[0:2, 0:2] = error[2:4, 2:4] = True
    settings = replace(UNBOUNDED, min_component_mm2=8.0)
    np.testing.assert_array_equal(extract_errors(error, np.zeros_like(error), 2, ISO, settings), error)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_labels_are_skimage_s_slice_by_slice(axis: int) -> None:
    mask = np.random.default_rng(axis).random((9, 8, 7)) < 0.4
    labels, count = label_slices(mask, axis)
    planes, masks = np.moveaxis(labels, axis, 0), np.moveaxis(mask, axis, 0)
    total = 0
    for plane, here in zip(planes, masks, strict=True):
        wanted, n = measure.label(here, connectivity=2, return_num=True)
        total += n
        pairs = set(zip(plane.ravel().tolist(), wanted.ravel().tolist(), strict=True))
        assert len(pairs) == n + (not here.all())  # one label for one label
    assert count == total == labels.max()


def test_the_band_is_small_against_a_small_structure() -> None:
    mask = np.zeros((40, 40, 3), bool)
    mask[10:16, 5:35, 1] = True  # 6 mm wide: a 2 mm band would leave a third of it
    everywhere = np.ones(mask.shape, np.float32)
    erased = [
        (extract_errors(everywhere, mask, 2, ISO, s)[mask] == 0).mean()
        for s in (UNBOUNDED, BAND_ONLY, replace(BAND_ONLY, max_band_share=0.0))
    ]
    assert erased[0] > 0.6
    assert 0.3 < erased[1] <= 0.4
    assert erased[2] == 0


def test_a_one_voxel_structure_has_no_band() -> None:
    mask = np.zeros((9, 9, 2), bool)
    mask[4, 4, 0] = True
    everywhere = np.ones(mask.shape, np.float32)
    np.testing.assert_array_equal(extract_errors(everywhere, mask, 2, ISO, BAND_ONLY), everywhere)


@pytest.mark.parametrize("mask", [np.zeros((6, 6, 3), bool), np.ones((6, 6, 3), bool)], ids=["empty", "full"])
def test_no_contour_no_band(mask: np.ndarray) -> None:
    everywhere = np.ones(mask.shape, np.float32)
    np.testing.assert_array_equal(extract_errors(everywhere, mask, 2, ISO, UNBOUNDED), everywhere)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.permutations([0, 1, 2]), st.tuples(*[st.booleans()] * 3))
def test_flips_and_permutations_change_nothing(seed: int, order: list[int], flips: tuple[bool, ...]) -> None:
    mask, spacing = blobs(seed, (14, 12, 4)), (0.8, 1.1, 3.0)
    error = np.random.default_rng(seed).random(mask.shape, dtype=np.float32)
    chosen = ExtractionSettings(min_component_mm2=6.0)
    axes = [a for a, flip in enumerate(flips) if flip]
    moved = extract_errors(
        np.flip(error.transpose(order), axes),
        np.flip(mask.transpose(order), axes),
        order.index(2),
        [spacing[a] for a in order],
        chosen,
    )
    wanted = extract_errors(error, mask, 2, spacing, chosen)
    np.testing.assert_array_equal(moved, np.flip(wanted.transpose(order), axes))


def test_the_arguments_are_left_alone() -> None:
    mask, error = blobs(0), np.ones((30, 26, 5), np.float32)
    before = mask.copy()
    extract_errors(error, mask, -1, ISO, ExtractionSettings())
    assert (error == 1).all() and (mask == before).all()


def test_bounding_box() -> None:
    mask = np.zeros((5, 6, 7), bool)
    assert bounding_box(mask) is None
    mask[1, 2, 3] = mask[3, 2, 6] = True
    assert bounding_box(mask) == (slice(1, 4), slice(2, 3), slice(3, 7))


def test_a_structure_can_have_its_own_band() -> None:
    chosen = ExtractionSettings(band_mm=3.0, structure_band_mm={"hippocampus": 0.5})
    assert chosen.for_structure("hippocampus").band_mm == 0.5
    assert chosen.for_structure("placenta").band_mm == 3.0
    assert hash(chosen) == hash(replace(chosen, structure_band_mm={}))  # settings can be keys and defaults


@pytest.mark.parametrize(
    "values",
    [
        {"band_mm": -1},
        {"min_component_mm2": -1},
        {"max_band_share": 1.1},
        {"max_component_share": -0.1},
        {"max_component_share": math.nan},
        {"regrow": -0.1},
        {"regrow": 1.1},
        {"threshold": 0},
        {"structure_band_mm": {"a": -1}},
    ],
)
def test_settings_that_mean_nothing_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="error extraction"):
        ExtractionSettings(**values)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        extract_errors(np.zeros((3, 3, 3), bool), np.zeros((3, 3, 2), bool), 2, ISO, UNBOUNDED)
