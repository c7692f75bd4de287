"""Platt scaling of maps: from over- or under-confident logits to estimates that are right at every quality."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from segqc.networks.assessor import sigmoid, truth_as_error
from segqc.quality.calibration import MapCalibration
from segqc.quality.metrics import EmptyRule, estimated_metrics
from segqc.training.assessor_calibration import with_maps
from segqc.training.calibration import KnownMap, LogitCounts, fit_map, known_map
from segqc.types import BoolArray, FloatArray
from tests.test_assessor import assessor, world

RULE = EmptyRule(max_sum_mm3=1.0, voxel_volume_mm3=1.0)


def scene(seed: int) -> tuple[FloatArray, BoolArray, BoolArray]:
    """Logits of errors that are right, a mask that is shifted and grown or shrunk at random, and a drawn truth."""
    rng = np.random.default_rng(seed)
    centre, radius = rng.uniform(12, 18, 3), rng.uniform(6, 9)
    at = np.moveaxis(np.indices((30, 30, 30)), 0, -1)
    logits = ((radius - np.linalg.norm(at - centre, axis=-1)) * 1.5).astype(np.float32)
    truth = rng.random(logits.shape) < sigmoid(logits)
    moved = centre + rng.normal(0, 3 * rng.random(), 3)
    mask = np.linalg.norm(at - moved, axis=-1) < radius + rng.normal(0, 1)
    return truth_as_error(logits, mask), mask, truth


def distorted(logits: FloatArray) -> FloatArray:
    """What an under-confident network says that fears too much: Platt scaling by 1.6 and -0.5 makes it right."""
    return np.asarray((logits + 0.5) / 1.6, np.float32)


def test_the_scaling_that_was_undone_is_found() -> None:
    known = [known_map(distorted(e), mask, truth, f"{n}") for n, (e, mask, truth) in enumerate(map(scene, range(60)))]
    found = fit_map(known)
    assert found.scale == pytest.approx(1.6, abs=0.15)
    assert found.shift == pytest.approx(-0.5, abs=0.15)
    before, after = [], []
    for e, mask, truth in map(scene, range(100, 130)):
        true = known_map(e, mask, truth, "").dice
        for errors, logits in ((before, distorted(e)), (after, found.apply(distorted(e)))):
            dice = estimated_metrics(mask, sigmoid(logits), empty=RULE).dice
            assert dice is not None
            assert true is not None
            errors.append(abs(dice - true))
    assert np.mean(after) < 0.5 * np.mean(before)


def test_right_logits_are_left_alone() -> None:
    found = fit_map([known_map(*scene(seed), f"{seed}") for seed in range(60)])
    assert found.scale == pytest.approx(1.0, abs=0.1)
    assert found.shift == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_a_shift_makes_errors_likelier_on_both_sides_of_the_contour(shift: float) -> None:
    logits, mask, _ = scene(0)
    before, after = sigmoid(logits), sigmoid(MapCalibration(1.0, shift).apply(logits))
    for side in (mask, ~mask):
        assert (np.sign(after[side].sum() - before[side].sum())) == np.sign(shift)


def test_the_truth_s_logits_are_the_error_s_but_for_their_sign_in_the_mask() -> None:
    errors, mask, _ = scene(0)
    truth = truth_as_error(errors, mask)
    np.testing.assert_array_equal(truth_as_error(truth, mask), errors)
    np.testing.assert_allclose(sigmoid(truth)[mask], 1 - sigmoid(errors)[mask], atol=1e-6)
    np.testing.assert_array_equal(truth[~mask], errors[~mask])


def test_few_masks_change_little_and_too_few_nothing() -> None:
    known = [known_map(distorted(e), mask, truth, f"{n}") for n, (e, mask, truth) in enumerate(map(scene, range(4)))]
    assert fit_map(known[:2]) == MapCalibration()
    assert fit_map([replace(k, dice=None) for k in known]) == MapCalibration()
    # one mask seen thrice can be met by many scalings: the one nearest to none is taken
    lone = fit_map([replace(known[0], patient=name) for name in "abc"])
    assert abs(np.log(lone.scale)) < np.log(1.6)
    assert abs(lone.shift) < 1.0


def test_a_mask_that_is_empty_or_misses_everything_stops_no_fit() -> None:
    e, mask, truth = scene(0)
    none, z = np.zeros_like(mask), truth_as_error(e, mask)
    odd = [known_map(z, none, truth, "a"), known_map(e, mask, none, "b")]
    odd.append(replace(known_map(z, none, none, "c"), dice=1.0))
    found = fit_map([*odd, *(known_map(*scene(seed), f"{seed}") for seed in range(1, 20))])
    assert 0.5 < found.scale < 2
    assert abs(found.shift) < 1


@pytest.mark.parametrize("fear", [1.0, 2.0])
def test_what_helps_no_patient_that_is_left_out_is_not_used(fear: float) -> None:
    known = []
    for sign, patient in ((1, "fears too much"), (-1, "fears too little")):
        for e, mask, truth in map(scene, range(4)):
            known.append(known_map(np.asarray(e + sign * fear, np.float32), mask, truth, patient))
    one = known[:4]
    assert fit_map([*one[:2], *(replace(k, patient="another") for k in one[2:])]).shift < -0.5
    assert fit_map(known) == MapCalibration()
    assert fit_map(one) == MapCalibration(), "of one patient nobody is left out"


def counts(inside: dict[float, int], outside: dict[float, int]) -> LogitCounts:
    """Voxels by logit."""
    values, masks = [], []
    for of, is_mask in ((inside, True), (outside, False)):
        for logit, number in of.items():
            values += [logit] * number
            masks += [is_mask] * number
    mask = np.array(masks).reshape(-1, 1, 1)
    return known_map(np.array(values, np.float32).reshape(mask.shape), mask, mask, "").counts


@pytest.mark.parametrize(("vague_is_better", "used"), [(True, False), (False, True)])
def test_what_turns_the_order_round_is_not_used(vague_is_better: bool, used: bool) -> None:
    # a shift moves the estimates of masks with much doubt around them, 0.95, and not those of the others, 0.90
    vague, sure = counts({-20: 100}, {-3: 222, -20: 500}), counts({-20: 100, 20: 22}, {-20: 500})
    known = []
    for number in range(10):
        apart = 0.002 * number
        known.append(KnownMap(vague, 0.87 + apart, f"{number}"))
        known.append(KnownMap(sure, (0.82 if vague_is_better else 0.92) + apart / 3, f"{number}"))
    found = fit_map(known)
    assert (found != MapCalibration()) is used


@pytest.mark.parametrize("form", ["truth", "direct"])
def test_an_assessor_scales_what_its_network_says(form: str) -> None:
    scan, labels, _ = world()
    plain = assessor(form)
    maps = (MapCalibration(0.5, -1.0), MapCalibration())
    scaled = with_maps(plain, maps)
    assert with_maps(plain, ()).version == plain.version, "models of before keep their version"
    assert scaled.version != plain.version
    own = plain.output_logits(scan, labels)
    np.testing.assert_array_equal(own, scaled.output_logits(scan, labels))
    masks = np.stack([s.mask(labels.array) for s in plain.structures])
    errors = np.where(masks, -own, own) if form == "truth" else own
    wanted = np.stack([0.5 * errors[0] - 1, errors[1]])
    np.testing.assert_allclose(scaled.error_logits(scan, labels), wanted, rtol=1e-6)
