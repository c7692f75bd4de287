"""What SegQC is measured against: estimates with known answers, and trainings that resume."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from segqc.evaluation.methods.autoencoder import LATENT, AutoencoderFeatures, ShapeAutoencoder, train_autoencoder
from segqc.evaluation.methods.averages import average_slices
from segqc.evaluation.methods.ensembles import EnsemblePairs
from segqc.evaluation.methods.estimates import SILENT, AssessedMask, Estimator, estimate_from_error_map
from segqc.evaluation.methods.features import ALL_MISSED, fit_features, fit_line
from segqc.evaluation.methods.learned import around_masks, batch_metrics, cut_window
from segqc.evaluation.methods.map_and_score import MapAndScore, train_map_and_score
from segqc.evaluation.methods.maps import (
    CrossFittedMean,
    MapEstimator,
    ScanOnly,
    SoftOutput,
    structure_probabilities,
    train_scan_only,
)
from segqc.evaluation.methods.regression import Regression, train_regression
from segqc.evaluation.methods.simple import (
    fit_constant,
    fit_size_regression,
    measured_masks,
    size_features,
    surface_mm2,
)
from segqc.evaluation.methods.soft_input import SourcedMasks, train_soft_input
from segqc.evaluation.methods.tta import SoftmaxEntropy, Tta
from segqc.networks.assessor import sigmoid
from segqc.networks.backends import Backend
from segqc.networks.card import ModelCard
from segqc.networks.plan import NetworkPlan
from segqc.networks.segmenter import Segmenter
from segqc.networks.unet import build_network
from segqc.quality.error_maps import entropy_map
from segqc.quality.metrics import EmptyRule, true_metrics, true_slice_metrics
from segqc.selection.entropy import entropy
from segqc.selection.tta import tta_dice
from segqc.training import NoProgress
from segqc.training.cases import read_case
from segqc.training.crossfit import MaskSet, mean_dice
from segqc.types import Metrics, Structure
from segqc.volumes import Volume, VolumeError
from tests.test_assessor import AFFINE, PLAN, STRUCTURES, assessor, world
from tests.test_training import QUICK, KillAt, KilledError, make_cases, placed

METRICS = ("dice", "iou", "arvd", "rvd")
TURNED = np.array([[0.0, 1, 0, 0], [0, 0, -1, 0], [3, 0, 0, 0], [0, 0, 0, 1]])  # slices along the first axis


class Classes(nn.Module):
    """Tells the classes of `world` by intensity, voxel by voxel: it commutes with every flip and transpose."""

    def __init__(self, sharpness: float = 40.0) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low, high = x.amin(dim=(2, 3, 4), keepdim=True), x.amax(dim=(2, 3, 4), keepdim=True)
        level = (x - low) / (high - low)
        # the classes of values 1, 2, 3: value 2 is never seen
        return torch.cat([-self.sharpness * (level - at).abs() for at in (0.0, 0.5, 9.0, 1.0)], dim=1)


class Shifted(nn.Module):
    """Its answer depends on where a voxel lies in the window: test-time augmentation disagrees with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Classes()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.roll(1, dims=2))


def segmenter(network: nn.Module | None = None, structures: tuple[Structure, ...] = STRUCTURES) -> Segmenter:
    plan = replace(PLAN, in_channels=1, out_channels=4, patch=(24, 20, 8))
    card = ModelCard(kind="segmentation", plan=plan, structures=structures, values=(1, 2, 3), seen=())
    return Segmenter(card, Classes() if network is None else network)


def assessed(source: Segmenter | None = None) -> tuple[AssessedMask, np.ndarray]:
    scan, labels, truth = world()
    return AssessedMask(scan, labels, source), truth


def truths_of(labels: np.ndarray, truth: np.ndarray) -> list[Metrics]:
    return [true_metrics(s.mask(labels), s.mask(truth)) for s in STRUCTURES]


def assert_close(one: Metrics, other: Metrics, within: float = 1e-3) -> None:
    for name in METRICS:
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=within), name


def test_a_mask_lies_on_its_scan() -> None:
    scan, labels, _ = world()
    with pytest.raises(VolumeError, match="share one grid"):
        AssessedMask(scan, Volume(labels.array[1:], AFFINE), None)


def test_an_error_map_gives_metrics_slices_and_orders() -> None:
    mask, truth = assessed()
    structure = STRUCTURES[0]
    m, t = structure.mask(mask.labels.array), structure.mask(truth)
    estimate = estimate_from_error_map(m, (m != t).astype(np.float32), 2, EmptyRule(10.0, 3.0))
    assert estimate.metrics == true_metrics(m, t)
    assert estimate.slices is not None
    np.testing.assert_array_equal(estimate.slices.dice, true_slice_metrics(m, t, 2).dice)
    np.testing.assert_array_equal(estimate.slice_error_score, (m != t).sum(axis=(0, 1)))  # type: ignore[arg-type]
    assert estimate.scan_error_score == (m != t).sum()


@pytest.mark.parametrize("form", ["truth", "direct"])
def test_segqc_reads_the_assessors_map(form: str) -> None:
    mask, _ = assessed()
    model = assessor(form)
    one = MapEstimator([model]).estimate(mask)
    expected = model.assess(mask.scan, mask.labels, scan_id="s")
    for k, quality in enumerate(expected.assessment.structures):
        assert one[k].metrics == quality.raw.metrics
        np.testing.assert_array_equal(one[k].slice_error_score, [s.error_sum for s in quality.raw.slices])  # type: ignore[arg-type]
        np.testing.assert_array_equal(one[k].error, expected.errors[k])  # type: ignore[arg-type]
    extracted = MapEstimator([model], extraction=model.settings.extraction)
    assert extracted.name == "SegQC-EE"
    for k, estimate in enumerate(extracted.estimate(mask)):
        assert estimate.metrics == expected.assessment.structures[k].extracted.metrics != one[k].metrics


def test_several_assessors_average_their_logits() -> None:
    mask, _ = assessed()
    blind = assessor()
    blind.network.sees_high = False
    one = MapEstimator([assessor(), blind], name="two").estimate(mask)
    # logits 12 and -12 cancel where only one of them sees the second structure
    high = STRUCTURES[1].mask(assessed()[1])
    assert one[1].error is not None
    np.testing.assert_allclose(one[1].error[high], 0.5, atol=1e-6)
    assert one[1].error[~high & ~STRUCTURES[1].mask(mask.labels.array)].max() < 1e-4
    with pytest.raises(ValueError, match="same structures"):
        MapEstimator([])


class Soft(nn.Module):
    """A truth's logit that is anything, and that the mask has a say in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :1] + 3 * x[:, 1:2], 0.5 - x[:, :1] + 3 * x[:, 2:3]], dim=1)


@pytest.mark.parametrize("affine", [AFFINE, TURNED])
def test_scan_only_gives_one_truth_and_its_difference_from_each_mask(affine: np.ndarray) -> None:
    scan, labels, truth = world()
    scan = Volume(scan.array + np.random.default_rng(0).normal(0, 0.3, scan.shape).astype(np.float32), affine)
    model = assessor(average_flips=True)
    model.backend = Backend("pytorch", Soft())
    method = ScanOnly([model, model])
    t = sigmoid(method.truth_logits(scan)[0])
    for array in (labels.array, truth, np.zeros_like(truth)):
        estimates = ScanOnly([model]).estimate(AssessedMask(scan, Volume(array, affine), None))
        for k, structure in enumerate(STRUCTURES):
            m = structure.mask(array)
            error = estimates[k].error
            assert error is not None
            np.testing.assert_array_equal(error[~m], t[k][~m])
            np.testing.assert_allclose(error[m], 1 - t[k][m], atol=1e-6)
            assert estimates[k].slices is not None
            axis = 0 if affine is TURNED else 2
            assert len(estimates[k].slices) == scan.shape[axis]  # type: ignore[arg-type]
    assert 0.05 < t.mean() < 0.95
    with pytest.raises(ValueError, match="output form 'truth'"):
        ScanOnly([assessor("direct")])


def test_structures_sum_the_probabilities_of_their_label_values() -> None:
    rng = np.random.default_rng(1)
    soft = rng.dirichlet(np.ones(4), size=(3, 4, 5)).transpose(3, 0, 1, 2).astype(np.float32)
    low, high = structure_probabilities(segmenter(), soft, STRUCTURES)
    np.testing.assert_allclose(low, soft[1])
    np.testing.assert_allclose(high, soft[2] + soft[3], rtol=1e-6)
    with pytest.raises(ValueError, match=r"not \[5\]"):
        structure_probabilities(segmenter(), soft, (Structure("five", (5,)),))


def test_networks_that_know_the_truth_estimate_the_true_metrics() -> None:
    mask, truth = assessed(segmenter())
    expected = truths_of(mask.labels.array, truth)
    methods: list[Estimator] = [
        CrossFittedMean([segmenter(), segmenter()]),
        SoftOutput(STRUCTURES),
        EnsemblePairs([segmenter()]),
        ScanOnly([assessor()]),
    ]
    for method in methods:
        for estimate, true in zip(method.estimate(mask), expected, strict=True):
            assert_close(estimate.metrics, true, within=5e-3)
            assert estimate.slices is not None
            assert estimate.slices.counted.any()


def test_the_mean_softmax_is_a_mean() -> None:
    mask, _ = assessed()
    unsure = segmenter(Classes(0.0))  # all four classes alike
    soft = CrossFittedMean([segmenter(), unsure]).truth(mask.scan)
    sure = CrossFittedMean([segmenter()]).truth(mask.scan)
    np.testing.assert_allclose(soft[0], (sure[0] + 0.25) / 2, atol=1e-6)
    np.testing.assert_allclose(soft[1], (sure[1] + 0.5) / 2, atol=1e-6)


def test_with_flips_the_mean_softmax_turns_with_the_scan() -> None:
    mask, _ = assessed()
    turned = Volume(mask.scan.array[::-1].copy(), mask.scan.affine, mask.scan.acquisition_axis)
    for flips in (True, False):
        one, other = (
            CrossFittedMean([segmenter(Shifted())], average_flips=flips).truth(scan) for scan in (mask.scan, turned)
        )
        alike = np.allclose(one, other[:, ::-1], atol=2e-3)  # the group's members are kept in half precision
        assert alike is flips


def test_a_mask_that_no_network_made_gets_nothing_from_methods_that_ask_the_maker() -> None:
    mask, _ = assessed()
    for method in (Tta(STRUCTURES), SoftmaxEntropy(STRUCTURES), SoftOutput(STRUCTURES)):
        assert method.estimate(mask) == (SILENT, SILENT)


def test_an_equivariant_network_agrees_with_its_augmentations() -> None:
    mask, _ = assessed(segmenter())
    for estimate in Tta(STRUCTURES).estimate(mask):
        assert_close(estimate.metrics, Metrics(1.0, 1.0, 0.0, 0.0), within=0.0)
        assert estimate.slices is not None
        assert set(estimate.slices.dice) == {1.0}
        assert estimate.error is None


def test_augmentation_metrics_are_medians_against_the_median_as_the_mask() -> None:
    source = segmenter(Shifted())
    mask, _ = assessed(source)
    prediction = source.predict_tta(mask.scan)
    estimates = Tta(STRUCTURES).estimate(mask)
    for structure, estimate in zip(STRUCTURES, estimates, strict=True):
        median = structure.mask(prediction.labels.array)
        pairs = [
            (median.sum(), structure.mask(m).sum(), (median ^ structure.mask(m)).sum()) for m in prediction.members
        ]
        assert estimate.metrics.arvd == pytest.approx(np.median([d / t for _, t, d in pairs]))
        assert estimate.metrics.rvd == pytest.approx(np.median([(m - t) / t for m, t, _ in pairs]))
        assert 0 < estimate.metrics.dice < 1  # type: ignore[operator]
        by_slice = [true_slice_metrics(median, structure.mask(m), 2) for m in prediction.members]
        assert estimate.slices is not None
        np.testing.assert_allclose(estimate.slices.dice, np.median([s.dice for s in by_slice], axis=0))
    assert tta_dice(prediction, STRUCTURES) == min(e.metrics.dice for e in estimates)  # type: ignore[type-var]


def test_the_group_runs_once_for_two_masks_and_again_for_another_scan_or_maker() -> None:
    class Counting(Segmenter):
        runs = 0

        def predict_tta(self, scan, gammas=()):  # type: ignore[no-untyped-def]
            type(self).runs += 1
            return super().predict_tta(scan, gammas)

    source = Counting(segmenter().card, Classes())
    other = Counting(segmenter().card, Classes(20.0))
    mask, _ = assessed(source)
    method = Tta(STRUCTURES)
    for assessed_mask, _ in itertools.product((mask, replace(mask, labels=mask.labels)), range(2)):
        method.estimate(assessed_mask)
    assert Counting.runs == 1
    method.estimate(replace(mask, source=other))
    assert Counting.runs == 2
    method.estimate(assessed(other)[0])
    assert Counting.runs == 3


def test_entropy_is_that_of_a_coin_and_orders_only() -> None:
    p = np.array([0.0, 0.5, 1.0, 0.2], np.float32).reshape(1, 1, 4)
    expected = [0, np.log(2), 0, -0.2 * np.log(0.2) - 0.8 * np.log(0.8)]
    np.testing.assert_allclose(entropy_map(p).ravel(), expected, atol=3e-5)

    single = (Structure("all", (1, 2, 3)),)
    source = segmenter(Classes(3.0), single)
    mask, _ = assessed(source)
    (by_softmax,) = SoftmaxEntropy(single).estimate(mask)
    assert by_softmax.metrics == Metrics(None, None, None, None)
    assert (by_softmax.slices, by_softmax.error) == (None, None)
    soft = source.predict(mask.scan).probabilities[1:].sum(axis=0)
    sums = entropy_map(soft).sum(axis=(0, 1))
    np.testing.assert_allclose(by_softmax.slice_error_score, sums, rtol=1e-5)  # type: ignore[arg-type]
    assert by_softmax.scan_error_score == pytest.approx(sums.sum() / (mask.labels.array > 0).sum(), rel=1e-5)


def test_with_one_class_the_scans_entropy_is_the_softmaxs() -> None:
    single = (Structure("low", (1,)),)
    plan = replace(PLAN, in_channels=1, out_channels=2)
    card = ModelCard(kind="segmentation", plan=plan, structures=single, values=(1,), seen=())
    source = Segmenter(card, build_network(plan_with_levels(plan), seed=0))
    mask, _ = assessed(source)
    (estimate,) = Tta(single).estimate(mask)
    assert estimate.scan_error_score == pytest.approx(entropy(source.predict_tta(mask.scan)), rel=1e-3)


def plan_with_levels(plan: NetworkPlan) -> NetworkPlan:
    return replace(
        plan, kernels=((3, 3, 1), (3, 3, 3), (3, 3, 3)), strides=((1, 1, 1), (2, 2, 1), (2, 2, 2)), filters=(4, 8, 8)
    )


def test_an_ensembles_pairs_against_the_mask_and_against_each_other() -> None:
    mask, _ = assessed()
    members = [segmenter(), segmenter(Shifted())]
    arrays = [m.predict(mask.scan).labels.array for m in members]
    against = EnsemblePairs(members).estimate(mask)
    between = EnsemblePairs(members, against="members").estimate(mask)
    for k, s in enumerate(STRUCTURES):
        m, (a, b) = s.mask(mask.labels.array), (s.mask(x) for x in arrays)
        for name in METRICS:
            to_mask = np.mean([getattr(true_metrics(m, x), name) for x in (a, b)])
            assert getattr(against[k].metrics, name) == pytest.approx(to_mask)
            each_other = np.mean([getattr(true_metrics(a, b), name), getattr(true_metrics(b, a), name)])
            assert getattr(between[k].metrics, name) == pytest.approx(each_other)
        np.testing.assert_allclose(against[k].error, ((m != a).astype(float) + (m != b)) / 2)  # type: ignore[arg-type]
        np.testing.assert_allclose(between[k].slice_error_score, (a != b).sum(axis=(0, 1)))  # type: ignore[arg-type]
        assert between[k].error is None
    with pytest.raises(ValueError, match="ensemble"):
        EnsemblePairs(members[:1], against="members")


def test_slices_are_averaged_where_they_are_defined() -> None:
    mask, none = np.zeros((3, 2, 2), bool), np.zeros((3, 2, 2), bool)
    mask[0], mask[1, 0] = True, True
    found = [true_slice_metrics(mask, mask, 0), true_slice_metrics(mask, none, 0), true_slice_metrics(none, none, 0)]
    mean = average_slices(found, "mean")
    # ARVD has no value where only the truth is empty
    np.testing.assert_allclose(mean.arvd, [0, 0, 0])
    np.testing.assert_allclose(mean.dice, [2 / 3, 2 / 3, 1])
    np.testing.assert_array_equal(mean.counted, [True, True, False])
    assert np.isnan(average_slices(found[1:2], "median").arvd[:2]).all()


def test_the_constant_is_the_mean_of_the_true_values(tmp_path: Path) -> None:
    sets = mask_sets(tmp_path, 3)
    known = list(measured_masks(sets, SINGLE))
    constant = fit_constant(known, SINGLE)
    assert constant.metrics[0].dice == pytest.approx(np.mean([j.metrics[0].dice for j in known]))
    assert constant.metrics[0].arvd == pytest.approx(np.mean([j.metrics[0].arvd for j in known]))
    pooled = np.concatenate([j.slices[0].dice[j.slices[0].counted] for j in known])
    (estimate,) = constant.estimate(known[0].mask)
    assert estimate.metrics == constant.metrics[0]
    assert estimate.slices is not None
    np.testing.assert_allclose(estimate.slices.dice, pooled.mean())
    np.testing.assert_array_equal(estimate.slices.counted, (known[0].mask.labels.array > 0).any(axis=(0, 1)))


def test_the_size_regression_is_numpys(tmp_path: Path) -> None:
    known = list(measured_masks(mask_sets(tmp_path, 4), SINGLE))
    method = fit_size_regression(known, SINGLE)
    volumes = [float((j.mask.labels.array > 0).sum()) * 2.0 / 1000 for j in known]
    there = [k for k, v in enumerate(volumes) if v]
    assert len(there) < len(known), "one of the masks is empty"
    dice = np.array([known[k].metrics[0].dice for k in there], float)
    slope, intercept = np.polyfit(np.log([volumes[k] for k in there]), dice, 1)
    for k in there:
        expected = np.clip(slope * np.log(volumes[k]) + intercept, 0, 1)
        assert method.estimate(known[k].mask)[0].metrics.dice == pytest.approx(expected)
    empty = known[next(k for k, v in enumerate(volumes) if not v)]
    assert method.estimate(empty.mask)[0].metrics == Metrics(0.0, 0.0, 1.0, -1.0)


def test_size_features_are_a_boxs_volume_and_surface() -> None:
    mask = np.zeros((6, 7, 5), bool)
    mask[1:4, 2:4, 0:5] = True  # 3 x 2 x 5 voxels, up to the border
    scan = Volume(np.zeros(mask.shape, np.float32), np.diag([0.5, 2.0, 3.0, 1.0]))
    sides = (1.5, 4.0, 15.0)
    area = 2 * (sides[0] * sides[1] + sides[0] * sides[2] + sides[1] * sides[2])
    assert surface_mm2(mask, scan.spacing_mm) == pytest.approx(area)
    np.testing.assert_allclose(
        size_features(mask, scan, surface=True),  # type: ignore[arg-type]
        [np.log(np.prod(sides) / 1000), np.log(area / np.prod(sides))],
    )
    assert size_features(np.zeros_like(mask), scan, surface=True) is None


def test_a_regression_bears_few_rows_and_features_that_never_vary() -> None:
    line = fit_line(np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0], [4.0, 5.0]]), np.array([1.0, 3.0, 5.0, 7.0]))
    assert line is not None
    assert line.at(np.array([10.0, 5.0])) == pytest.approx(19.0)
    few = fit_line(np.array([[1.0], [2.0]]), np.array([1.0, 2.0]))
    assert few is not None
    assert few.at(np.array([7.0])) == pytest.approx(1.5)
    assert fit_line(np.zeros((3, 1)), np.full(3, np.nan)) is None
    nothing = fit_features([None], [Metrics(1.0, 1.0, 0.0, 0.0)])
    assert nothing.at(np.zeros(1)) == Metrics(None, None, None, None)
    assert nothing.at(None) == Metrics(1.0, 1.0, 0.0, 0.0)
    assert fit_features([], []).at(None) == ALL_MISSED


def test_metrics_of_a_batch_are_the_metrics() -> None:
    rng = np.random.default_rng(2)
    masks, truths = rng.random((2, 6, 2, 4, 5, 3)) < 0.4
    masks[0, 0] = truths[0, 0] = False
    masks[1, 0] = False
    truths[2, 0] = False
    found = batch_metrics(torch.from_numpy(masks).float(), torch.from_numpy(truths).float()).numpy()
    for n, k in itertools.product(range(6), range(2)):
        true = true_metrics(masks[n, k], truths[n, k])
        expected = [np.nan if getattr(true, name) is None else getattr(true, name) for name in METRICS]
        np.testing.assert_allclose(found[n, k], expected, rtol=1e-6)


def test_the_window_holds_the_whole_mask() -> None:
    plan = plan_with_levels(replace(PLAN, patch=(8, 8, 2)))
    x = torch.arange(20 * 12 * 3, dtype=torch.float32).reshape(1, 1, 20, 12, 3)
    masks = torch.zeros(1, 2, 20, 12, 3)
    masks[0, 0, 2, 5, 1] = masks[0, 1, 15, 6, 1] = 1
    window = around_masks(x, masks, plan)
    assert window.shape == (1, 1, 16, 8, 2), "14 voxels, rounded up to the stride of 4"
    assert x[0, 0, 2, 5, 1] in window
    assert x[0, 0, 15, 6, 1] in window
    assert around_masks(x, torch.zeros_like(masks), plan).shape == (1, 1, 8, 8, 2)
    padded = cut_window(x, (-1, 10, 0), (3, 4, 3))
    assert not padded[0, 0, 0].any()
    assert not padded[..., 2:, :].any()
    torch.testing.assert_close(padded[0, 0, 1:, :2], x[0, 0, :2, 10:])


SINGLE = (Structure("ball", (1,)),)


def mask_sets(folder: Path, count: int) -> list[MaskSet]:
    """Balls' true masks, pushed aside, without a slice, without anything."""
    sets = []
    for i, case in enumerate(make_cases(folder, count)):
        _, truth = read_case(case, (1,))
        good = np.asarray(truth.array)
        holed = good.copy()
        holed[:, :, 2] = 0
        masks = np.stack([good, np.roll(good, 2, axis=0), np.roll(good, 4 + i, axis=1), holed])
        if i == 0:
            masks[3] = 0
        sets.append(MaskSet(case, masks, tuple(mean_dice(m, truth.array, SINGLE) for m in masks)))
    return sets


Train = Callable[..., Regression | MapAndScore | AutoencoderFeatures]


@pytest.mark.parametrize("train", [train_regression, train_map_and_score, train_autoencoder])
def test_trainings_resume_are_not_repeated_and_judge_any_mask(train: Train, tmp_path: Path) -> None:
    sets = mask_sets(tmp_path, 4)
    patient_splits = placed([s.case for s in sets])
    arguments = (sets, SINGLE, patient_splits, replace(QUICK, average_flips=True))
    work = {train_regression: "regression", train_map_and_score: "map-and-score", train_autoencoder: "autoencoder"}
    straight = train(*arguments, tmp_path / "a", NoProgress())
    with pytest.raises(KilledError):
        train(*arguments, tmp_path / "b", KillAt(4, work[train] + ": epoch"))
    steps = KillAt(-1, work[train] + ": epoch")
    resumed = train(*arguments, tmp_path / "b", steps)
    assert steps.seen == 4, "one epoch of two steps was done, two were left"
    assert (tmp_path / "a" / "curve.json").read_text() == (tmp_path / "b" / "curve.json").read_text()
    again = KillAt(-1, work[train] + ": epoch")
    loaded = train(*arguments, tmp_path / "a", again)
    assert again.seen == 0

    rng = np.random.default_rng(3)
    scan = Volume(rng.normal(size=(5, 30, 18)).astype(np.float32), TURNED)
    for labels in (np.zeros(scan.shape, np.uint8), np.ones(scan.shape, np.uint8)):
        mask = AssessedMask(scan, Volume(labels, TURNED), None)
        (one,), (two,), (three,) = (m.estimate(mask) for m in (straight, resumed, loaded))
        assert one.metrics == two.metrics == three.metrics
        assert 0 <= one.metrics.dice <= 1  # type: ignore[operator]
        if train is train_map_and_score:
            assert one.error is not None
            assert one.error.shape == scan.shape
            assert one.metrics.iou == pytest.approx(one.metrics.dice / (2 - one.metrics.dice))  # type: ignore[operator]
            assert one.slices is not None
            assert len(one.slices) == 5


def test_the_autoencoders_regressor_is_kept_for_the_same_masks_only(tmp_path: Path) -> None:
    sets = mask_sets(tmp_path, 4)
    rest = (SINGLE, placed([s.case for s in sets]), QUICK, tmp_path / "a")
    counted, again, other = (KillAt(-1, "autoencoder: shape") for _ in range(3))
    first = train_autoencoder(sets, *rest, counted)
    assert counted.seen > 0
    assert train_autoencoder(sets, *rest, again).lines == first.lines
    assert again.seen == 0
    holed = [replace(s, masks=np.where(np.arange(s.masks.shape[-1]) < 4, 0, s.masks)) for s in sets]
    assert train_autoencoder(holed, *rest, other).lines != first.lines
    assert other.seen == counted.seen


@pytest.mark.server
@pytest.mark.parametrize("train", [train_regression, train_map_and_score, train_autoencoder])
def test_losses_fall(train: Train, tmp_path: Path) -> None:
    sets = mask_sets(tmp_path, 4)
    settings = replace(QUICK, epochs=12, steps_per_epoch=4, batch=4, learning_rate=5e-3)
    losses: list[float] = []

    class Listen(NoProgress):
        def step(self, done: int, total: int, task: str, detail: str = "", *, unit: str = "scans") -> None:
            if "loss " in detail:
                losses.append(float(detail.split()[-1]))

    train(sets, SINGLE, placed([s.case for s in sets], share=0.0), settings, tmp_path / "t", Listen())
    assert len(losses) == 48
    assert np.mean(losses[-12:]) < 0.8 * np.mean(losses[:12])


def test_two_structures_get_their_own_numbers(tmp_path: Path) -> None:
    structures = (Structure("ball", (1,)), Structure("none", (2,)))
    sets = mask_sets(tmp_path, 4)
    patient_splits = placed([s.case for s in sets])
    scan, truth = read_case(sets[0].case, (1, 2))
    mask = AssessedMask(scan, truth, None)
    for train in (train_regression, train_map_and_score, train_autoencoder):
        method = train(
            sets, structures, patient_splits, replace(QUICK, epochs=1), tmp_path / train.__name__, NoProgress()
        )
        one, two = method.estimate(mask)
        assert one.metrics != two.metrics
    # the last is the autoencoder: the absent structure was absent in all masks and truths, and that is perfect
    assert two.metrics == Metrics(1.0, 1.0, 0.0, 0.0)


def test_the_autoencoders_code_is_drawn_in_training_only() -> None:
    plan = plan_with_levels(replace(PLAN, in_channels=2, out_channels=2))
    network = ShapeAutoencoder(plan)
    x = (torch.rand(3, 2, *plan.patch, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    assert network(x).shape == (3, 2 * 16 * 16 * 4 + 2 * LATENT)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def ball_source(sharpness: float) -> Segmenter:
    plan = replace(PLAN, in_channels=1, out_channels=2, patch=(24, 20, 8))

    class Ball(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sharpness = nn.Parameter(torch.tensor(sharpness))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.zeros_like(x), self.sharpness * x], dim=1)

    return Segmenter(ModelCard(kind="segmentation", plan=plan, structures=SINGLE, values=(1,), seen=()), Ball())


def test_soft_input_looks_at_the_makers_soft_output_of_each_mask(tmp_path: Path) -> None:
    sources = (ball_source(4.0), ball_source(0.5))
    made = [SourcedMasks(s, sources, (0, 0, 1, 1)) for s in mask_sets(tmp_path, 3)]
    settings = replace(QUICK, epochs=6, steps_per_epoch=4)
    method = train_soft_input(made, SINGLE, settings, 10.0, tmp_path / "t", NoProgress())
    scan, truth = read_case(made[0].masks.case, (1,))
    mask = AssessedMask(scan, truth, sources[0])
    (one,) = method.estimate(mask)
    assert one.error is not None and one.error.shape == scan.shape
    (other,) = method.estimate(replace(mask, source=sources[1]))
    assert one.metrics != other.metrics, "another soft output is another answer"
    assert method.estimate(replace(mask, source=None)) == (SILENT,)
    again = train_soft_input(made, SINGLE, settings, 10.0, tmp_path / "t", KillAt(1, "soft input: epoch"))
    assert again.estimate(mask)[0].metrics == one.metrics, "the training is taken over"
    other_soft = [replace(m, sources=sources[::-1]) for m in made]
    with pytest.raises(KilledError):
        train_soft_input(other_soft, SINGLE, settings, 10.0, tmp_path / "t", KillAt(1, "soft input: epoch"))


def test_scan_only_trains_without_masks(tmp_path: Path) -> None:
    sets = mask_sets(tmp_path, 4)
    patient_splits = placed([s.case for s in sets])
    model = train_scan_only(sets, SINGLE, patient_splits, QUICK, tmp_path / "t", NoProgress())
    assert model.card.output_form == "truth"
    other = [MaskSet(s.case, 1 - s.masks, s.dice) for s in sets]
    again = train_scan_only(other, SINGLE, patient_splits, QUICK, tmp_path / "u", NoProgress())
    assert again.version == model.version, "the masks have no say"
