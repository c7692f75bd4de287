"""Windows, what of a scan is looked at, and the backends that compute networks."""

from __future__ import annotations

import importlib.util
import itertools
import math
import shutil
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from torch import nn

from segqc.networks import backends
from segqc.networks.assessor import MARGIN_MM, Assessor
from segqc.networks.backends import Backend, BackendError, choose_backend, difference_from_float32
from segqc.networks.card import ModelCard
from segqc.networks.inference import (
    NOWHERE,
    all_windows,
    canonical_scan,
    normalise,
    not_air,
    outer_values,
    sliding_window,
    windows_near,
)
from segqc.networks.plan import NetworkPlan, Spacing, Triple, plan_network, window_starts
from segqc.networks.segmenter import PLAUSIBLE, Segmenter
from segqc.networks.unet import MeanOfNetworks, build_network
from segqc.quality.boxes import BoxSettings, find_boxes
from segqc.quality.error_maps import ExtractionSettings, bounding_box, extract_errors
from segqc.quality.metrics import EmptyRule, estimated_metrics_and_slices
from segqc.types import BackendName, ComputeName, Structure
from segqc.volumes import Volume, canonical_frame, native_support, to_canonical, to_native, touched

CPU = torch.device("cpu")
SPACING = (1.0, 1.0, 3.0)
AFFINE = np.diag([*SPACING, 1.0])
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")


class Linear(nn.Module):
    """Foreground where the scan is bright; SegQC-Net's counterpart, as it ignores the mask."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = 8 * (x[:, :1] - 2)
        return torch.cat([torch.zeros_like(z), z], dim=1) if self.channels == 2 else z


class Counting(Linear):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.windows = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.windows += len(x)
        return super().forward(x)


def plan(channels: int, patch: Triple = (16, 16, 8)) -> NetworkPlan:
    return plan_network(SPACING, (96, 96, 16), in_channels=channels, out_channels=3 - channels, patch=patch)


def assessor(network: nn.Module) -> Assessor:
    return Assessor(ModelCard("segqc", plan(2), (Structure("ball", (1,)),), (1,), ()), network)


def segmenter(network: nn.Module) -> Segmenter:
    return Segmenter(ModelCard("segmentation", plan(1), (Structure("ball", (1,)),), (1,), ()), network)


def world(balls: int = 1) -> tuple[Volume, Volume]:
    """A large body of grey noise with bright balls far from each other, and a mask of the first one only."""
    rng = np.random.default_rng(0)
    array = (rng.normal(1, 0.05, (96, 96, 16))).astype(np.float32)
    array[::95, ::95, ::15] = 0  # the darkest
    labels = np.zeros(array.shape, np.uint8)
    for i, (a, b) in enumerate([(16, 16), (78, 78)][:balls]):
        array[a - 8 : a + 8, b - 8 : b + 8, 4:12] = 4
        labels[a - 8 : a + 8, b - 8 : b + 8, 4:12] = i == 0
    return Volume(array, AFFINE), Volume(labels, AFFINE)


@given(size=st.integers(1, 400), window=st.integers(1, 200))
def test_windows_cover_an_axis_and_overlap_by_an_eighth(size: int, window: int) -> None:
    starts = window_starts(size, window)
    assert starts[0] == 0 and starts[-1] == max(0, size - window)
    assert all(b - a <= math.ceil(window * 7 / 8) for a, b in itertools.pairwise(starts))
    fewer = len(starts) - 1
    assert fewer < 2 or (size - window) / (fewer - 1 or 1) > window * 7 / 8 * (fewer - 1) / (fewer - 1 or 1)


@pytest.mark.parametrize(
    ("shape", "patch"), [((28, 12, 8), (16, 12, 8)), ((9, 10, 5), (16, 8, 8)), ((5, 6, 7), (8, 8, 8))]
)
def test_where_windows_lie_alike_logits_are_those_of_monais_sliding_window(shape: Triple, patch: Triple) -> None:
    x = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(0))

    def network(windows: torch.Tensor) -> torch.Tensor:
        return torch.cat([windows - windows.mean(dim=(2, 3, 4), keepdim=True), windows.flip(2)], dim=1)

    expected = sliding_window_inference(x, patch, 3, network, overlap=0.25, mode="gaussian")
    torch.testing.assert_close(sliding_window(network, x, patch, CPU), expected)


def test_windows_that_are_not_looked_at_change_nothing_in_the_others() -> None:
    x = torch.rand(1, 1, 60, 60, 8, generator=torch.Generator().manual_seed(0))
    network = build_network(plan(1)).eval()
    where = np.zeros((60, 60, 8), bool)
    where[5:20, 30:40] = True
    windows = windows_near(all_windows(where.shape, (16, 16, 8)), where)
    every = sliding_window(network, x, (16, 16, 8), CPU)
    some = sliding_window(network, x, (16, 16, 8), CPU, windows=windows, elsewhere=(0.0, NOWHERE))
    assert 0 < len(windows) < len(all_windows(where.shape, (16, 16, 8))) / 2
    torch.testing.assert_close(some[..., torch.from_numpy(where)], every[..., torch.from_numpy(where)])
    assert some[0, :, -1, 0, 0].tolist() == [0.0, NOWHERE]
    nothing = sliding_window(network, x, (16, 16, 8), CPU, windows=[], elsewhere=(0.0, NOWHERE))
    assert nothing.shape == every.shape and (nothing[0, 1] == NOWHERE).all()


def test_air_is_what_is_dark_and_a_scan_without_contrast_has_none() -> None:
    image = np.array([0.0, 0.04, 0.06, 1.0], np.float32).reshape(4, 1, 1)
    assert not_air(image * 700 - 300).ravel().tolist() == [False, False, True, True]
    assert not_air(np.zeros((2, 2, 2), np.float32)).all()


def test_air_is_not_looked_at_by_either_network_and_costs_no_structure() -> None:
    scan, labels = world()
    scan.array[40:] = 0
    for model, looked in ((segmenter(Linear(2)), Counting(2)), (assessor(Linear(1)), Counting(1))):
        model.backend = Backend("pytorch", looked)
        if isinstance(model, Segmenter):
            np.testing.assert_array_equal(model.predict(scan).labels.array, labels.array)
        else:
            assert model.map_metrics(scan, labels)[0].dice == pytest.approx(1, abs=3e-3)
        assert 0 < looked.windows < len(all_windows((96, 96, 16), (16, 16, 8))) * 0.6


def test_segqc_looks_only_near_the_mask_and_plausible_voxels_and_estimates_the_same() -> None:
    scan, labels = world()
    plausible = segmenter(Linear(2)).predict(scan).plausible
    model, counting = assessor(Linear(1)), Counting(1)
    everything = model.assess(scan, labels, scan_id="s").assessment.structures[0].raw.metrics
    model.backend = Backend("pytorch", counting)
    near = model.assess(scan, labels, scan_id="s", plausible=plausible).assessment.structures[0].raw.metrics
    assert counting.windows < len(all_windows((96, 96, 16), (16, 16, 8))) / 3
    assert near.dice == pytest.approx(everything.dice, abs=0.002)
    again = model.assess(scan, labels, scan_id="s", plausible=plausible).assessment.structures[0].raw.metrics
    assert again == near


def test_a_missed_structure_far_from_the_mask_is_found_where_the_segmenter_holds_it_possible() -> None:
    """The bound: what is not looked at has no mask, and no voxel of foreground probability 1% within the margin."""
    scan, labels = world(balls=2)
    model = assessor(Linear(1))
    plausible = np.zeros(scan.shape, bool)
    missed = model.error_maps(scan, labels, plausible)[0, 70:86, 70:86, 4:12]
    assert missed.max() < 1e-6, "nothing there is plausible"
    plausible[78, 78, 6] = True  # a single voxel is enough
    found = model.error_maps(scan, labels, plausible)[0]
    assert found[70:86, 70:86, 4:12].min() > 0.9
    margin = round(MARGIN_MM)
    around = np.zeros(scan.shape, bool)
    around[78 - margin : 79 + margin, 78 - margin : 79 + margin] = True
    everything = model.error_maps(scan, labels)[0]
    np.testing.assert_array_equal(found[around], everything[around])


def test_without_a_mask_of_a_structure_every_window_is_looked_at() -> None:
    scan, labels = world()
    empty = Volume(np.zeros_like(labels.array), AFFINE)
    errors = assessor(Linear(1)).error_maps(scan, empty, np.zeros(scan.shape, bool))[0]
    assert errors[labels.array > 0].min() > 0.9


@pytest.mark.parametrize("size", [1, 2, 10, 1000, 100_000])
@pytest.mark.parametrize("kind", ["noise", "air", "constant", "few bright", "sorted"])
def test_outer_values_are_numpy_s_quantiles(kind: str, size: int) -> None:
    """Also where the voxels that are looked at first are no picture of the rest."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 100, size).astype(np.float32)
    if kind == "air":
        values[np.abs(values) < 60] = 0
    elif kind == "constant":
        values[:] = 3
    elif kind == "few bright":
        values[:] = 0
        values[rng.integers(0, size, max(1, size // 3000))] = 5
    elif kind == "sorted":
        values.sort()
    given = values.copy()
    assert outer_values(values, 0.005) == pytest.approx(np.quantile(values, (0.005, 0.995)), rel=1e-6, abs=1e-6)
    np.testing.assert_array_equal(values, given)


def test_a_normalised_scan_is_clipped_and_of_mean_0_and_deviation_1() -> None:
    scan = np.random.default_rng(0).normal(40, 7, (30, 31, 32)).astype(np.float32)
    scan[3, 4, 5] = 4000
    low, high = np.percentile(scan, (0.5, 99.5))
    clipped = np.clip(scan, low, high).astype(np.float64)
    expected = (clipped - clipped.mean()) / clipped.std()
    np.testing.assert_allclose(normalise(scan), expected, atol=1e-5)
    assert scan[3, 4, 5] == 4000, "what is given stays"
    np.testing.assert_array_equal(normalise(np.full((3, 3, 3), 7, np.float32)), np.zeros((3, 3, 3)))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("spacing", [SPACING, (1.5, 1.5, 3.0)])
@pytest.mark.parametrize("balls", [0, 1])
def test_an_assessment_is_read_off_the_whole_error_map(order: tuple[int, ...], spacing: Spacing, balls: int) -> None:
    """Though most of it is worked out near the mask and likely errors."""
    scan, labels = world()
    rng = np.random.default_rng(1)
    for corner in rng.integers(0, (92, 92, 15), (12, 3)):  # errors anywhere, at the border too
        part = tuple(
            slice(begin, begin + int(size)) for begin, size in zip(corner, rng.integers(9, 16, 3), strict=True)
        )
        scan.array[part] = rng.uniform(1.8, 2.6)
    labels.array[:, 40:] = 0
    labels.array[...] *= balls
    affine = AFFINE[:, [*order, 3]]
    scan, labels = (Volume(np.ascontiguousarray(v.array.transpose(order)), affine) for v in (scan, labels))
    model = assessor(Linear(1))
    object.__setattr__(model.card.plan, "spacing_mm", spacing)
    where = np.zeros(model.frame(scan).canonical_shape, bool)
    result = model.assess(scan, labels, scan_id="s", plausible=where)
    error, mask, axis = result.errors[0], labels.array > 0, order.index(2)
    quality = result.assessment.structures[0]
    extracted = extract_errors(error, mask, axis, scan.spacing_mm, ExtractionSettings())
    rule = EmptyRule(10.0, scan.voxel_volume_mm3)
    assert quality.present and (balls == 0 or (error == 0).any()), "a part was not looked at"
    for view, of in ((quality.raw, error), (quality.extracted, extracted)):
        whole, slices, sums = estimated_metrics_and_slices(mask, of, axis, empty=rule)
        assert list(astuple(view.metrics)) == pytest.approx(list(astuple(whole)), rel=1e-9)
        for got, wanted in zip(view.slices, slices.each(), strict=True):
            assert list(astuple(got.metrics)) == pytest.approx(list(astuple(wanted)), rel=1e-9, abs=1e-9)
        assert [s.error_sum for s in view.slices] == pytest.approx(sums.tolist(), rel=1e-9, abs=1e-9)
        assert view.boxes == find_boxes(of, axis, scan.spacing_mm, BoxSettings(), mask=mask)
    assert quality.raw.boxes


def test_plausible_voxels_are_those_of_one_in_a_hundred() -> None:
    scan, _ = world()
    prediction = segmenter(build_network(plan(1))).predict(scan)
    foreground = prediction.probabilities[1]
    np.testing.assert_array_equal(prediction.plausible, foreground >= PLAUSIBLE)


def test_the_soft_output_s_dice_and_entropy_are_those_of_the_probabilities() -> None:
    scan, _ = world()
    network = segmenter(build_network(plan(1), seed=3))
    prediction = network.predict(scan)
    p, mask = prediction.probabilities[1], prediction.labels.array > 0
    assert 0 < mask.mean() < 1
    (soft,) = network.soft_outputs(prediction, network.structures)
    expected = 2 * p[mask].sum() / (mask.sum() + p.sum())
    entropy = -(p * np.log(p) + (1 - p) * np.log1p(-p)).sum() / mask.sum()
    assert (soft.dice, soft.entropy) == (pytest.approx(expected, rel=1e-3), pytest.approx(entropy, rel=1e-3))


def test_a_soft_output_of_nothing_is_right_where_nothing_is_expected() -> None:
    dark = Volume(np.ones((96, 96, 16), np.float32), AFFINE)
    dark.array[::95, ::95, ::15] = 0
    network = segmenter(Linear(2))
    prediction = network.predict(dark)
    assert not prediction.labels.array.any()
    (soft,) = network.soft_outputs(prediction, network.structures)
    assert soft.dice == 1.0
    assert soft.entropy < 1


def test_a_mask_smaller_than_the_networks_voxels_is_looked_at() -> None:
    scan, labels = world()
    model = assessor(Linear(1))
    object.__setattr__(model.card.plan, "spacing_mm", (4.0, 4.0, 3.0))
    labels.array[:] = 0
    labels.array[78, 78, 6] = 1
    frame = model.frame(scan)
    where = touched(labels.array > 0, frame)
    assert np.argwhere(where).tolist() == [[78 // 4, 78 // 4, 6]]
    errors = model.error_maps(scan, labels, np.zeros(frame.canonical_shape, bool))
    assert 0 < errors[0, 78, 78, 6] < 1 + 1e-6


@pytest.mark.parametrize("target", [(1.0, 1.0, 3.0), (2.5, 2.0, 3.0), (0.7, 0.6, 2.0), (1.0, 1.0, 1.2)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_a_box_of_the_native_grid_is_the_part_of_the_whole(target: Spacing, signs: Triple) -> None:
    scan = Volume(np.random.default_rng(0).normal(size=(17, 22, 9)), AFFINE @ np.diag([*signs, 1]))
    frame = canonical_frame(scan, spacing_mm=target)
    array = np.random.default_rng(1).normal(size=(2, *frame.canonical_shape)).astype(np.float32)
    box = (slice(3, 11), slice(0, 20), slice(4, 9))
    for order in (0, 1):
        whole = to_native(array, frame, order=order)
        np.testing.assert_allclose(to_native(array, frame, order=order, box=box), whole[(slice(None), *box)], atol=1e-6)
    where = np.zeros(frame.canonical_shape, bool)
    where[tuple(n // 2 for n in where.shape)] = True
    middle = bounding_box(where)
    assert middle is not None
    support = native_support(middle, frame)
    values = to_native(where.astype(np.float32), frame, order=1)
    assert values[support].max() > 0
    values[support] = 0
    assert not values.any(), "outside of the box there is nothing"


@pytest.mark.parametrize("target", [(1.0, 1.0, 3.0), (2.5, 2.0, 3.0), (0.7, 0.6, 2.0), (1.0, 4.1, 7.0)])
@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
def test_a_scan_stored_the_other_way_round_is_the_same_to_networks(target: Spacing, axes: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=(17, 22, 9)).astype(np.float32)
    reverse = np.eye(4)
    for axis in axes:
        reverse[axis, axis], reverse[axis, 3] = -1, array.shape[axis] - 1
    one, other = Volume(array, AFFINE), Volume(np.flip(array, axes), AFFINE @ reverse)
    frame, reversed_frame = (canonical_frame(v, spacing_mm=target) for v in (one, other))
    assert sum(reversed_frame.flips) == len(axes)
    for order in (0, 1):
        canonical = to_canonical(one.array, frame, order=order)
        np.testing.assert_allclose(to_canonical(other.array, reversed_frame, order=order), canonical, atol=1e-5)
        native, reversed_native = (to_native(canonical, f, order=order) for f in (frame, reversed_frame))
        np.testing.assert_allclose(np.flip(reversed_native, axes), native, atol=1e-5)


@pytest.mark.parametrize("target", [(1.0, 1.0, 3.0), (2.5, 2.0, 3.0), (0.7, 4.1, 2.0)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_touched_voxels_hold_the_centre_of_one(target: Spacing, signs: Triple) -> None:
    scan = Volume(np.zeros((9, 17, 22), np.float32), AFFINE[:, [2, 0, 1, 3]] @ np.diag([*signs, 1]))
    frame = canonical_frame(scan, spacing_mm=target)
    where = np.random.default_rng(0).random(scan.shape) < 0.02
    wanted = np.zeros(frame.canonical_shape, bool)
    for voxel in np.argwhere(where):
        there = []
        for axis, size, flip in zip(frame.permutation, frame.canonical_shape, frame.flips, strict=True):
            old = scan.shape[axis]
            index = old - 1 - voxel[axis] if flip else voxel[axis]
            there.append(int((index + 0.5) * size / old))
        wanted[tuple(there)] = True
    np.testing.assert_array_equal(touched(where, frame), wanted)


def test_the_scan_in_the_canonical_frame_is_made_once() -> None:
    scan, _ = world()
    frame = canonical_frame(scan, spacing_mm=SPACING)
    assert canonical_scan(scan, frame) is canonical_scan(scan, frame)
    coarse = canonical_frame(scan, spacing_mm=(2.0, 2.0, 3.0))
    assert canonical_scan(scan, coarse).shape == to_canonical(scan.array, coarse, order=1).shape


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((256, 256, 10), (1.25, 1.25, 8.0)),
        ((256, 256, 48), (1.0, 1.0, 3.0)),
        ((512, 512, 200), (0.7, 0.7, 2.0)),
        ((128, 128, 24), (1.2, 1.2, 4.0)),
    ],
)
def test_a_planned_patch_covers_its_scans_with_little_overlap(shape: Triple, spacing: Spacing) -> None:
    made = plan_network(spacing, shape, in_channels=1, out_channels=2)
    extent = [round(n * s / t) for n, s, t in zip(shape, spacing, made.spacing_mm, strict=True)]
    assert len(all_windows(extent, made.patch)) * math.prod(made.patch) < 1.5 * math.prod(extent)


def network_of(shape: Triple, spacing: Spacing, members: int, *, skip: bool = False) -> tuple[NetworkPlan, nn.Module]:
    made = replace(plan_network(spacing, shape, in_channels=2, out_channels=1), mask_skip=skip)
    networks = [build_network(made, seed=i) for i in range(members)]
    return made, (MeanOfNetworks(networks) if members > 1 else networks[0]).eval()


@needs_openvino
@pytest.mark.parametrize(
    ("shape", "spacing", "members", "skip"),
    [
        ((20, 22, 18), (1.0, 1.0, 1.0), 1, False),
        ((48, 40, 6), (1.0, 1.0, 4.0), 3, False),
        ((48, 40, 6), (1.0, 1.0, 4.0), 2, True),
        ((20, 18, 1), (1.0, 1.0, 8.0), 1, False),
    ],
)
def test_openvino_computes_the_same_on_windows_of_any_shape(
    shape: Triple, spacing: Spacing, members: int, skip: bool
) -> None:
    made, network = network_of(shape, spacing, members, skip=skip)
    backend = choose_backend(network, made, CPU, "openvino")
    assert backend.name == "openvino"
    for windows in (1, 3):
        x = torch.rand(windows, 2, made.patch[1], made.patch[0], made.patch[2])
        with torch.inference_mode():
            torch.testing.assert_close(backend(x), network(x), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_a_compiled_network_computes_the_same() -> None:
    made = NetworkPlan(
        2, 1, (1.0, 1.0, 3.0), (8, 8, 4), (1, 1, 1), ((3, 3, 3),) * 3, ((1, 1, 1), (2, 2, 1), (2, 2, 1)), (4, 6, 6)
    )
    network = build_network(made).eval()
    backend = choose_backend(network, made, CPU, "compile")
    x = torch.rand(2, 2, *made.patch)
    with torch.inference_mode():
        torch.testing.assert_close(backend(x), network(x), atol=1e-4, rtol=1e-4)


def test_a_network_that_does_not_compile_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: object, **__: object) -> object:
        def compute(_: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such header")

        return compute

    made, network = network_of((20, 22, 18), (1.0, 1.0, 1.0), 1)
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(shutil, "which", lambda _: "g++")
    with pytest.raises(BackendError, match=r"'compile' does not compile .*choose 'auto'"):
        choose_backend(network, made, CPU, "compile")


def test_a_backend_that_computes_something_else_is_refused_and_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    made, network = network_of((20, 22, 18), (1.0, 1.0, 1.0), 1)

    def wrong(name: ComputeName, *_: object) -> str | None:
        return None if name == "pytorch-bfloat16" else "is not there"

    monkeypatch.setattr(backends, "_missing", wrong)
    for factor in (1.5, math.nan):
        monkeypatch.setattr(backends, "_in_bfloat16", lambda net, _, by=factor: lambda x: net(x) * by)
        with pytest.raises(BackendError, match="computes wrong logits"):
            choose_backend(network, made, CPU, "pytorch-bfloat16")
        assert choose_backend(network, made, CPU, "auto").name == "pytorch"
    monkeypatch.setattr(backends, "_in_bfloat16", lambda net, _: lambda x: net(x) * 1.01)
    assert choose_backend(network, made, CPU, "auto").name == "pytorch-bfloat16"


@pytest.mark.parametrize("wanted", ["openvino", "openvino-bfloat16", "pytorch-bfloat16", "compile"])
def test_a_backend_that_is_not_there_is_named_with_what_to_do(
    wanted: BackendName, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, network = network_of((20, 22, 18), (1.0, 1.0, 1.0), 1)
    monkeypatch.setattr(backends, "has_bfloat16", lambda _: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(BackendError, match=rf"'{wanted}' .*choose 'auto'"):
        choose_backend(network, made, CPU, wanted)
    assert choose_backend(network, made, CPU, "auto").name == "pytorch"


@pytest.mark.parametrize("batch", [1, 2])
def test_a_window_alone_is_computed_as_in_company(batch: int) -> None:
    made, network = network_of((48, 40, 6), (1.0, 1.0, 4.0), 1)
    x = torch.rand(batch, 2, *made.patch)
    with torch.inference_mode():
        alone = choose_backend(network, made, CPU, "pytorch")(x)
    assert difference_from_float32(Backend("pytorch", network), network, made, CPU) == 0
    torch.testing.assert_close(alone, network(x).detach(), atol=1e-5, rtol=1e-4)
