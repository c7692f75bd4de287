"""How unlike the training's a scan is: distances, conformal p-values, and the features that they are of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import seuclidean

from segqc.networks.encoder import encoder_features, encoders, part_around, part_extent
from segqc.networks.plan import plan_network
from segqc.networks.unet import MeanOfNetworks, build_network
from segqc.quality.unlikeness import (
    MIN_PATIENTS,
    HeldOutPatient,
    NetworkReference,
    ScanFeatures,
    UnlikenessReference,
    fit_unlikeness,
)
from segqc.types import UNLIKE_LEVEL, UNLIKE_SHORT, MetricIntervals, PredictionInterval, Unlikeness, applying, bounds
from segqc.volumes import Volume, canonical_frame, to_canonical

FOLDS, FEATURES = 3, 12


def scans(rng: np.random.Generator, patients: int, *, validating: int = 0, each: int = 1) -> list[ScanFeatures]:
    """Labelled scans: a fold's network has not seen its patients, and none those that validate.

    Networks see a scan alike, each with some noise of its own.
    """
    found = []
    for patient in range(patients + validating):
        unseen_by = tuple(range(FOLDS)) if patient >= patients else (patient % FOLDS,)
        for scan in range(each):
            values = features(rng)
            found.append(ScanFeatures(f"p{patient}", f"p{patient} scan {scan}", values, unseen_by))
    return found


def features(rng: np.random.Generator, shift: float = 0.0) -> np.ndarray:
    own = rng.normal(shift, 1, FEATURES)
    return own + rng.normal(0, 0.3, (FOLDS, FEATURES))


def test_the_score_is_a_standardised_distance_in_the_training_s_own() -> None:
    rng = np.random.default_rng(0)
    known = scans(rng, 15, validating=2)
    fitted = fit_unlikeness(known)
    assert fitted is not None
    new, expected = features(rng), []
    for k in range(FOLDS):
        trained = np.array([s.values[k] for s in known if k not in s.unseen_by])

        def distance(x: np.ndarray, others: np.ndarray) -> float:
            variance = others.var(axis=0, ddof=1)
            return float(seuclidean(x, others.mean(axis=0), variance + 0.01 * np.median(variance)))

        left_out = [distance(trained[i], np.delete(trained, i, axis=0)) for i in range(len(trained))]
        expected.append(distance(new[k], trained) / np.median(left_out))
    assert fitted[0].of(new).score == pytest.approx(np.mean(expected), rel=1e-6)


def test_the_p_value_counts_patients_by_the_network_that_has_not_seen_them() -> None:
    rng = np.random.default_rng(1)
    known = scans(rng, 15, validating=2)
    fitted = fit_unlikeness(known)
    assert fitted is not None
    reference, held_out = fitted
    assert reference.patients == tuple(sorted({s.patient for s in known})) and set(held_out) == {s.scan for s in known}
    for shift in (0.0, 0.5, 2.0):
        new, count = features(rng, shift), 0.0
        for scan in known:
            as_unlike = [
                reference.networks[k].distance(scan.values[k]) >= reference.networks[k].distance(new[k])
                for k in scan.unseen_by
            ]
            count += sum(as_unlike) / len(as_unlike)
        assert reference.of(new).p_value == pytest.approx((1 + count) / (len(known) + 1))


def test_scans_like_the_training_s_are_marked_as_rarely_as_promised_and_others_are_found() -> None:
    rng = np.random.default_rng(2)
    marked, own, other = 0, 0, 0
    for _ in range(150):
        fitted = fit_unlikeness(scans(rng, 18, validating=2))
        assert fitted is not None
        reference, held_out = fitted
        marked += sum(u.is_marked for u in held_out.values())
        own += sum(reference.of(features(rng)).is_marked for _ in range(10))
        other += sum(reference.of(features(rng, 2.0)).is_marked for _ in range(10))
    assert 0.03 <= own / 1500 <= UNLIKE_LEVEL + 0.02, "20 calibrate, so 2 of 21 places count as unlike"
    assert marked / (150 * 20) <= UNLIKE_LEVEL
    assert other / 1500 >= 0.9


@pytest.mark.parametrize("patients, known", [(MIN_PATIENTS - 1, False), (MIN_PATIENTS, True)])
def test_with_too_few_patients_nothing_is_marked(patients: int, known: bool) -> None:
    fitted = fit_unlikeness(scans(np.random.default_rng(3), patients))
    assert fitted is not None
    found = fitted[0].of(features(np.random.default_rng(3), 50.0))
    assert (found.p_value is not None, found.is_marked, found.score > 10) == (known, known, True)
    assert fitted[0].can_mark is known


def test_a_network_with_two_patients_and_one_without_any_network_have_no_reference() -> None:
    assert fit_unlikeness(scans(np.random.default_rng(4), 3)) is None, "each network has seen two patients"
    assert fit_unlikeness([]) is None


def test_a_patient_counts_once_however_many_scans_it_has() -> None:
    far = HeldOutPatient("far", (9.0,) * 50)
    near = tuple(HeldOutPatient(f"p{i}", (1.0,)) for i in range(19))
    reference = UnlikenessReference((NetworkReference((0.0,), (1.0,), 1.0, (far, *near)),))
    found = reference.of(np.array([[5.0]]))
    assert found.p_value == pytest.approx(2 / 21) and found.is_marked
    rng = np.random.default_rng(5)
    once, twice = scans(rng, 12), list[ScanFeatures]()
    for scan in once:
        twice += [scan, replace(scan, scan=f"{scan.scan} again")]
    first, second = fit_unlikeness(once), fit_unlikeness(twice)
    assert first is not None and second is not None
    new = features(rng)
    assert second[0].of(new).score == pytest.approx(first[0].of(new).score)
    assert second[0].of(new).p_value == first[0].of(new).p_value


def test_intervals_of_a_marked_scan_are_kept_but_not_shown() -> None:
    interval = PredictionInterval(0.82, 0.91, 0.9)
    marked = MetricIntervals(dice=interval).of_scan(Unlikeness(3.0, 0.05)).dice
    assert marked == replace(interval, applies=False) and (marked.low, marked.high) == (0.82, 0.91)
    assert (str(marked), applying(marked), bounds(marked)) == (UNLIKE_SHORT, None, None)
    for found in (None, Unlikeness(1.0, 0.5), Unlikeness(99.0, None)):
        assert MetricIntervals(dice=interval).of_scan(found).dice == interval
    assert (str(interval), bounds(interval)) == ("0.82-0.91", {"low": 0.82, "high": 0.91, "level": 0.9})


# ------------------------------------------------------------------------------------------------------------ features

PLAN = plan_network((1.0, 1.0, 3.0), (32, 40, 12), in_channels=3, out_channels=2)


def test_features_are_moments_of_what_the_encoder_s_blocks_make_of_the_scan_alone() -> None:
    members = [build_network(PLAN, seed=seed) for seed in range(2)]
    networks = encoders(MeanOfNetworks(members).eval())
    assert [*networks] == members and encoders(members[0]) == (members[0],) and encoders(torch.nn.Identity()) == ()
    extent = part_extent(PLAN)
    scan = torch.randn(1, 1, *extent, generator=torch.Generator().manual_seed(0))
    found = encoder_features(networks, scan, PLAN.in_channels)
    for network, values in zip(networks, found, strict=True):
        seen: list[torch.Tensor] = []
        for block in (network.unet.input_block, *network.unet.downsamples, network.unet.bottleneck):
            block.register_forward_hook(lambda _module, _inputs, out, seen=seen: seen.append(out[0].clone()))
        with torch.inference_mode():
            network(torch.cat([scan, torch.zeros(1, 2, *extent)], dim=1))
        expected = [part for out in seen for part in (out.mean((1, 2, 3)), out.std((1, 2, 3), correction=0).log())]
        np.testing.assert_allclose(values, torch.cat(expected).numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "affine",
    [np.diag([1.0, 1, 3, 1]), np.diag([-1.0, -1, 3, 1]), [[0, 0, -3.0, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]]],
)
def test_the_part_is_around_the_mask_wherever_the_file_has_it(affine: np.ndarray) -> None:
    mask = np.zeros((60, 56, 20), bool)
    mask[40:44, 10:16, 4:6] = True
    scan = Volume(mask.astype(np.float32), np.array(affine))
    frame = canonical_frame(scan, spacing_mm=(1.0, 1.0, 3.0))
    image = to_canonical(scan.array, frame, order=1)
    part = part_around(np.asarray(image, np.float32), mask, frame, (12, 12, 6))
    assert part.shape == (1, 1, 12, 12, 6) and float(part.sum()) == pytest.approx(float(image.sum()))
    middle = [float(np.mean(places)) for places in np.nonzero(part[0, 0].numpy())]
    assert np.abs(np.subtract(middle, (5.5, 5.5, 2.5))).max() <= 1


def test_a_part_beyond_a_small_scan_is_padded_and_one_at_the_edge_is_moved() -> None:
    scan = Volume(np.ones((10, 40, 4), np.float32), np.diag([1.0, 1, 3, 1]))
    frame, mask = canonical_frame(scan), np.zeros(scan.shape, bool)
    image = to_canonical(scan.array, frame, order=1)
    assert part_around(image, mask, frame, (16, 16, 8)).sum() == 10 * 16 * 4, "an empty mask: the scan's middle"
    mask[0, 39, 0] = True
    assert part_around(image, mask, frame, (16, 16, 8)).sum() == 10 * 16 * 4
