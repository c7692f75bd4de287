"""SegQC-Net's error map and the assessment read from it, with a network whose answer is known."""

from __future__ import annotations

import gc
import importlib.util
import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from segqc.networks.assessor import AssessmentResult, AssessmentSettings, Assessor, mask_sha256, part_of
from segqc.networks.backends import Backend
from segqc.networks.cache import LatestCache
from segqc.networks.card import ModelCard
from segqc.networks.model import ModelError
from segqc.networks.plan import NetworkPlan
from segqc.networks.segmenter import SoftOutput
from segqc.networks.unet import build_network
from segqc.quality.boxes import BoxSettings
from segqc.quality.calibration import MaskCalibration, StructureCalibration, TrainingSizes
from segqc.quality.error_maps import estimated_truth
from segqc.quality.metrics import METRIC_NAMES, true_metrics
from segqc.quality.stacking import ChosenEstimate, EstimateModel
from segqc.quality.unlikeness import HeldOutPatient, NetworkReference, UnlikenessReference
from segqc.training.calibration import KnownMask, fit_masks
from segqc.types import Assessment, ErrorBox, MaskSource, MetricIntervals, Metrics, Structure, Unlikeness, Witnesses
from segqc.volumes import Volume, VolumeError

PLAN = NetworkPlan(3, 2, (1.0, 1.0, 3.0), (16, 16, 4), (1, 1, 1), ((3, 3, 3),), ((1, 1, 1),), (4,))
STRUCTURES = (Structure("low", (1,)), Structure("high", (2, 3)))
AFFINE = np.diag([1.0, 1.0, 3.0, 1.0])


class Oracle(nn.Module):
    """Reads the truth off the scan: intensity -1, 0, 1 for background, "low" and "high"."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.sees_high = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        image, masks = x[:, :1], x[:, 1:]
        low, high = (image.min() + image.max()) / 2, image.max()
        span = (high - image.min()) / 8
        truth = torch.cat([(image - low).abs() < span, (image - high).abs() < span], dim=1)
        truth[:, 1] &= self.sees_high
        wanted = truth if self.form == "truth" else truth != (masks > 0.5)
        return torch.where(wanted, 12.0, -12.0)


def world() -> tuple[Volume, Volume, np.ndarray]:
    """A scan that shows two blocks, a label map with errors in both, and the true label map."""
    truth = np.zeros((24, 20, 8), np.uint8)
    truth[3:12, 4:14, 2:6] = 1
    truth[14:22, 4:14, 1:7] = 3
    scan = Volume(np.array([-1.0, 0.0, 1.0, 1.0], np.float32)[truth], AFFINE)
    mask = truth.copy()
    mask[3:12, 4:14, 4] = 0  # a slice forgotten
    mask[14:22, 14:18, 3] = 2  # a leak
    return scan, Volume(mask, AFFINE), truth


def assessor(form: str = "truth", **card: object) -> Assessor:
    values = {"structures": STRUCTURES, "values": (1, 2, 3), "seen": (), "output_form": form, **card}
    small_boxes = AssessmentSettings(boxes=BoxSettings(min_area_mm2=4.0))
    return Assessor(ModelCard(kind="segqc", plan=PLAN, **values), Oracle(form), small_boxes)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["truth", "direct"])
@pytest.mark.parametrize("flips", [False, True])
def test_a_network_that_knows_the_truth_gives_the_true_numbers(form: str, flips: bool) -> None:
    scan, labels, truth = world()
    model = assessor(form, average_flips=flips)
    result = model.assess(scan, labels, scan_id="s", segmenter_version="v")
    assert model.map_metrics(scan, labels) == tuple(q.raw.metrics for q in result.assessment.structures)
    for quality, structure in zip(result.assessment.structures, STRUCTURES, strict=True):
        true = true_metrics(structure.mask(labels.array), structure.mask(truth))
        for name in ("dice", "iou", "arvd", "rvd"):
            assert getattr(quality.raw.metrics, name) == pytest.approx(getattr(true, name), abs=1e-3)
            assert getattr(quality.estimated, name) == pytest.approx(getattr(quality.raw.metrics, name))
        assert quality.present
    assert result.assessment.dice == min(q.raw.metrics.dice for q in result.assessment.structures)  # type: ignore[type-var]


class Believing(nn.Module):
    """A truth's logit from scan and mask, of each structure: unlike under flips, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ramp = torch.linspace(0, 1, x.shape[-3], device=x.device)[:, None, None]
        return torch.cat([x[:, :1] + 3 * x[:, 1:2] + ramp, 0.5 - x[:, :1] + 3 * x[:, 2:3]], dim=1)


def test_half_of_the_flips_are_looked_at_without_the_mask() -> None:
    scan, labels, _ = world()
    empty = Volume(np.zeros_like(labels.array), AFFINE)

    def logits(seen: Volume, *, hidden: bool) -> np.ndarray:
        model = assessor(average_flips=True, hide_mask=hidden)
        model.backend = Backend("pytorch", Believing())
        return model.output_logits(scan, seen)

    shown, unseen = logits(labels, hidden=False), logits(empty, hidden=False)
    np.testing.assert_allclose(logits(labels, hidden=True), (shown + unseen) / 2, atol=1e-5)
    assert np.abs(shown - unseen).max() == pytest.approx(3)
    np.testing.assert_allclose(logits(empty, hidden=True), unseen, atol=1e-5)


def test_of_masks_of_one_scan_the_looks_without_the_mask_are_taken_once() -> None:
    scan, labels, _ = world()
    other = Volume(np.roll(labels.array, 1, axis=0), AFFINE)
    model = assessor(average_flips=True, hide_mask=True)
    hidden = []

    class Counting(Believing):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden.append(not x[:, 1:].any())
            return super().forward(x)

    model.backend = Backend("pytorch", Counting())
    answers = []
    for mask in (labels, other, labels):
        answers.append(model.output_logits(scan, mask))
    assert sum(hidden) * 4 == len(hidden), "once for three masks; those with the mask each time"
    np.testing.assert_array_equal(answers[0], answers[2])
    assert not np.array_equal(answers[0], answers[1])
    alike = Volume(scan.array.copy(), scan.affine)
    np.testing.assert_array_equal(model.output_logits(alike, other), answers[1])
    assert sum(hidden) * 3 == len(hidden), "another scan is looked at anew, even if it is alike"


def test_what_was_computed_of_a_scan_is_forgotten_with_it() -> None:
    scan, _, _ = world()
    last, big = LatestCache[np.ndarray](), np.zeros(3)
    assert last.get(scan) is None
    assert last.keep(big, scan, "v1") is big
    assert last.get(scan, "v1") is big and last.get(scan) is None
    kept = weakref.ref(big)
    del big, scan
    gc.collect()
    assert kept() is None, "a server that has answered keeps nothing of the scan"


def test_slices_boxes_and_likely_errors_point_at_the_errors() -> None:
    scan, labels, truth = world()
    model = assessor()
    result = model.assess(scan, labels, scan_id="s")
    assert set(result.assessment.worst_slices(2)) == {3, 4}
    assert result.assessment.worst_slices(2)[0] == 4  # 90 voxels are missing there, 32 too many in slice 3
    (forgotten,) = result.assessment.structures[0].raw.boxes
    assert (forgotten.slice_index, forgotten.start, forgotten.stop) == (4, (3, 4), (12, 14))
    assert forgotten.mean_error > 0.99
    assert forgotten.area_mm2 == pytest.approx(90.0)
    (leak,) = result.assessment.structures[1].raw.boxes
    assert (leak.slice_index, leak.start, leak.stop) == (3, (14, 14), (22, 18))
    expected = (labels.array != truth) & ~((labels.array == 2) & (truth == 3))
    np.testing.assert_array_equal(model.likely_errors(result, scan).array, expected)


def test_a_perfect_mask_is_perfect_and_an_absent_structure_does_not_count() -> None:
    scan, _, truth = world()
    perfect = assessor().assess(scan, Volume(truth, AFFINE), scan_id="s").assessment
    assert perfect.dice == pytest.approx(1.0, abs=1e-3)
    assert all(q.raw.boxes == () for q in perfect.structures)

    blind = assessor()
    blind.network.sees_high = False
    labels = np.where(truth == 1, truth, 0).astype(np.uint8)
    labels[3:12, 4:14, 4] = 0
    assessment = blind.assess(scan, Volume(labels, AFFINE), scan_id="s").assessment
    assert [q.present for q in assessment.structures] == [True, False]
    assert assessment.dice == assessment.structures[0].estimated.dice < 0.9  # type: ignore[operator]


def test_calibration_shifts_the_shown_numbers_only() -> None:
    line = ChosenEstimate(EstimateModel("identity", 0.2, {"map": 0.5}), "line")
    calibration = StructureCalibration({"strange": MaskCalibration(dice=line)})
    scan, labels, _ = world()
    quality = (
        assessor(calibration=(calibration, calibration)).assess(scan, labels, scan_id="s").assessment.structures[0]
    )
    assert quality.raw.metrics.dice is not None
    assert quality.estimated.dice == pytest.approx(0.5 * quality.raw.metrics.dice + 0.2)
    assert quality.estimated.iou == pytest.approx(quality.estimated.dice / (2 - quality.estimated.dice))
    assert quality.estimated.rvd == quality.raw.metrics.rvd


def test_each_kind_of_mask_has_its_own_calibration_and_the_answer_says_which() -> None:
    scan, labels, _ = world()

    def shifted(by: float) -> MaskCalibration:
        return MaskCalibration(dice=ChosenEstimate(EstimateModel("identity", -by, {"map": 1.0}), "line"))

    by_soft = ChosenEstimate(EstimateModel("logit", 0.0, {"soft": 1.0}), "soft")
    both = StructureCalibration({"served": MaskCalibration(dice=by_soft), "strange": shifted(0.2)}, TrainingSizes(7, 2))
    model = assessor(calibration=(both, StructureCalibration({"strange": shifted(0.1)})))
    served = model.assess(scan, labels, scan_id="s", soft=(SoftOutput(0.7, 0.3), SoftOutput(0.9, 0.1))).assessment
    strange = model.assess(scan, labels, scan_id="s").assessment
    assert (served.mask_kind, strange.mask_kind) == ("served", "strange")
    raw = [q.raw.metrics.dice for q in served.structures]
    assert served.structures[0].estimated.dice == pytest.approx(0.7)
    assert strange.structures[0].estimated.dice == pytest.approx(raw[0] - 0.2)
    for assessment in (served, strange):  # what has no calibration of its own is taken as any other mask
        assert assessment.structures[1].estimated.dice == pytest.approx(raw[1] - 0.1)
    volume = float((labels.array == 1).sum()) * 3.0
    size = -abs(np.log(volume) - 7) / 2
    assert served.structures[0].witnesses == Witnesses(0.7, -0.3, pytest.approx(size))
    assert strange.structures[0].witnesses == Witnesses(None, None, pytest.approx(size))
    assert Assessment.from_json(served.to_json()) == served


def calibrated_on(patients: int) -> StructureCalibration:
    """Calibration and intervals of a map whose Dice is always 0.1 too good."""
    known = [
        KnownMask(f"p{i}", f"s{i}", Metrics(d, None, 1 - d, 0.0), Metrics(d - 0.1, None, 1 - d, 0.0))
        for i, d in enumerate(np.linspace(0.5, 0.95, patients))
    ]
    return StructureCalibration({"strange": fit_masks("strange", [known])[0]})


def test_an_estimate_comes_with_the_interval_of_its_structure_where_there_were_enough_patients() -> None:
    scan, labels, _ = world()
    model = assessor(calibration=(calibrated_on(9), calibrated_on(8)))
    assessment = model.assess(scan, labels, scan_id="s").assessment
    told, silent = assessment.structures
    assert silent.intervals == MetricIntervals()
    made = model.card.calibration[0].of("strange").intervals
    for name in ("dice", "arvd", "rvd"):
        interval, raw = getattr(told.intervals, name), getattr(told.raw.metrics, name)
        assert interval == getattr(made, name).interval(raw, level=0.9, shown=getattr(told.estimated, name))
    for name in METRIC_NAMES:
        interval = getattr(told.intervals, name)
        assert interval.low <= getattr(told.estimated, name) <= interval.high
    assert told.intervals.dice.high < told.raw.metrics.dice  # type: ignore[union-attr, operator]
    worst = min(assessment.structures, key=lambda q: q.estimated.dice or 0.0)
    assert assessment.dice_interval == worst.intervals.dice
    settings = AssessmentSettings(interval_level=0.8)
    lower = Assessor(model.card, model.network, settings).assess(scan, labels, scan_id="s").assessment
    assert lower.structures[1].intervals.dice is not None
    assert lower.structures[1].intervals.dice.level == 0.8


def test_a_scan_unlike_the_reference_is_marked_by_every_backend_and_its_interval_does_not_apply(tmp_path: Path) -> None:
    scan, labels, _ = world()
    model = small_assessor()
    usual = model.scan_features(scan, labels)
    assert usual is not None
    held_out = tuple(HeldOutPatient(f"p{i}", (1.0,)) for i in range(9))
    mean, deviation = tuple(usual[0].tolist()), (0.03,) * usual.shape[1]
    reference = UnlikenessReference((NetworkReference(mean, deviation, 1.0, held_out),))
    card = replace(model.card, unlikeness=reference, calibration=(calibrated_on(9),))
    Assessor(card, model.network).save(tmp_path / "model.pt")
    noise = np.random.default_rng(0).normal(0, 100, scan.shape).astype(np.float32)
    noisy, found = Volume(scan.array + noise, scan.affine), []
    for backend in ("pytorch", "openvino"):
        if backend == "openvino" and importlib.util.find_spec("openvino") is None:
            continue
        loaded = Assessor.load(tmp_path / "model.pt", backend=backend)  # type: ignore[arg-type]
        assert loaded.card == card
        like, unlike = (loaded.assess(of, labels, scan_id="s").assessment for of in (scan, noisy))
        assert like.unlikeness == Unlikeness(pytest.approx(0.0, abs=1e-3), 1.0) and not like.is_unlike
        assert unlike.is_unlike and unlike.unlikeness is not None and unlike.unlikeness.p_value == 0.1
        kept = unlike.dice_interval
        assert kept is not None and not kept.applies and like.dice_interval is not None and like.dice_interval.applies
        assert Assessment.from_json(unlike.to_json()) == unlike
        found.append(unlike.unlikeness)
    assert len(set(found)) == 1


def test_an_assessment_of_before_there_were_intervals_can_be_read() -> None:
    scan, labels, _ = world()
    told = assessor(calibration=(calibrated_on(9), calibrated_on(9))).assess(scan, labels, scan_id="s").assessment
    assert Assessment.from_json(told.to_json()) == told
    content = json.loads(told.to_json())
    assert content["structures"][0]["intervals"]["dice"]["level"] == 0.9
    for structure in content["structures"]:
        del structure["intervals"]
    old = Assessment.from_json(json.dumps(content))
    assert old.dice == told.dice
    assert old.dice_interval is None


def test_people_s_masks_are_judged_by_a_network_of_their_own(tmp_path: Path) -> None:
    scan, labels, _ = world()
    alone = small_assessor()
    plan = replace(alone.card.plan, mask_skip=True)
    card = replace(alone.card, plan=plan, calibration=(StructureCalibration({"person": MaskCalibration()}),))
    both = alone.with_people(Assessor(card, build_network(plan, seed=1)))
    both.save(tmp_path / "model.pt")
    model = Assessor.load(tmp_path / "model.pt")
    assert model.version == both.version != alone.version
    judged = {
        (made is alone, source): made.assess(scan, labels, scan_id="s", source=source)
        for made in (alone, model)
        for source in ("network", "person")
    }  # type: ignore[misc]
    assert {key: result.assessment.mask_kind for key, result in judged.items()} == {
        (True, "network"): "strange",
        (True, "person"): "strange",
        (False, "network"): "strange",
        (False, "person"): "person",
    }
    np.testing.assert_array_equal(judged[False, "network"].errors, judged[True, "person"].errors)
    said = judged[False, "person"]
    assert said.assessment.assessor_version == model.version
    inside = STRUCTURES[0].mask(labels.array)
    # trust of 3 in the mask, and a first bias of none: what the mask says is likely, wherever the network looks
    assert said.errors[0][inside].mean() < judged[False, "network"].errors[0][inside].mean()
    assert model.people is not None and model.judge_of("person") is model.people is model.people.judge_of("person")


def judged_by_source() -> Assessor:
    """Networks for networks' and for people's masks, with calibrations of their own."""
    net = small_assessor()
    plan = replace(net.card.plan, mask_skip=True)
    kinds = [
        MaskCalibration(dice=ChosenEstimate(EstimateModel("identity", value, {"map": 0.1}), "line"))
        for value in (0.3, 0.5, 0.8)
    ]
    intervals = calibrated_on(9).of("strange").intervals
    served, strange, person = (replace(kind, intervals=intervals) for kind in kinds)
    person = replace(person, least_evidence=100.0)  # no box has so much
    people = replace(net.card, plan=plan, calibration=(StructureCalibration({"person": person}),))
    own = net.with_card(replace(net.card, calibration=(StructureCalibration({"served": served, "strange": strange}),)))
    both = own.with_people(Assessor(people, build_network(plan, seed=1)))
    return both.with_settings(AssessmentSettings(boxes=BoxSettings(min_area_mm2=1.0, max_area_mm2=1000.0)))


@pytest.mark.parametrize("soft", [None, (SoftOutput(0.7, 0.3),)])
def test_slices_that_a_person_let_be_are_judged_as_the_networks(soft: tuple[SoftOutput, ...] | None) -> None:
    scan, labels, _ = world()
    model = judged_by_source()
    count = scan.shape[2]

    def judged(source: MaskSource, slices: tuple[int, ...] = ()) -> AssessmentResult:
        return model.assess(scan, labels, scan_id="s", soft=soft, source=source, network_slices=slices)

    network, person = judged("network"), judged("person")
    unchanged = judged("person", tuple(range(count)))
    np.testing.assert_array_equal(unchanged.errors, network.errors)
    assert unchanged.assessment == replace(network.assessment, mask_kind="person")
    alone = model.assess(scan, labels, scan_id="s", source="person")
    assert (person.assessment, person.errors.tolist()) == (alone.assessment, alone.errors.tolist())
    mixed, let_be = judged("person", (0, 1, 2, 3)), np.arange(count) < 4
    assert mixed.assessment.mask_kind == "person"
    np.testing.assert_array_equal(mixed.errors[..., let_be], network.errors[..., let_be])
    np.testing.assert_array_equal(mixed.errors[..., ~let_be], person.errors[..., ~let_be])
    maps = model.error_maps(scan, labels, source="person", network_slices=(0, 1, 2, 3))
    np.testing.assert_array_equal(maps, mixed.errors)
    mask, error = STRUCTURES[0].mask(labels.array), mixed.errors[0]
    sizes = (mask + estimated_truth(mask, error)).sum(axis=(0, 1))
    share = float(sizes[let_be].sum() / sizes.sum())
    quality = mixed.assessment.structures[0]
    raw = quality.raw.metrics.dice
    assert raw is not None and 0 < share < 1
    of_network = (0.5 if soft is None else 0.3) + 0.1 * raw
    assert quality.estimated.dice == pytest.approx(share * of_network + (1 - share) * (0.8 + 0.1 * raw), abs=1e-6)
    assert quality.estimated.iou == pytest.approx(quality.estimated.dice / (2 - quality.estimated.dice))
    boxes = [{box.slice_index for box in q.raw.boxes} for q in (network.assessment.structures[0], quality)]
    assert boxes[0] - {0, 1, 2, 3} and boxes[1] == boxes[0] & {0, 1, 2, 3} != set(), "each judge bounds its own boxes"
    interval = quality.intervals.dice
    assert interval is not None and interval.low <= quality.estimated.dice <= interval.high


def test_without_a_network_for_people_a_corrected_mask_is_a_strange_one() -> None:
    scan, labels, _ = world()
    model, soft = small_assessor(), (SoftOutput(0.7, 0.3),)
    told = model.assess(scan, labels, scan_id="s", soft=soft, source="person", network_slices=(0, 1)).assessment
    assert told == model.assess(scan, labels, scan_id="s").assessment


def test_boxes_of_people_s_masks_are_bounded_by_their_evidence() -> None:
    scan, labels, _ = world()

    def boxes(least: float, settings: BoxSettings) -> list[ErrorBox]:
        calibration = StructureCalibration({"person": MaskCalibration(least_evidence=least)})
        of_people = assessor(calibration=(calibration,) * len(STRUCTURES))
        model = assessor().with_people(of_people).with_settings(AssessmentSettings(boxes=settings))
        told = model.assess(scan, labels, scan_id="s", source="person").assessment
        return [box for quality in told.structures for box in quality.raw.boxes]

    every = boxes(-20.0, BoxSettings(min_area_mm2=1e6))
    assert every, "evidence takes the place of the smallest area"
    assert boxes(16.0, BoxSettings(min_area_mm2=0.0)) == []
    assert boxes(16.0, BoxSettings(min_area_mm2=0.0, min_evidence=-20.0)) == every, "what the settings say goes first"


def test_new_intervals_make_no_other_version_and_another_calibration_does(tmp_path: Path) -> None:
    fitted = calibrated_on(9)
    model = small_assessor()

    def version(**changes: object) -> str:
        card = replace(model.card, calibration=(replace(fitted, **changes),))  # type: ignore[arg-type]
        made = Assessor(card, model.network)
        made.save(tmp_path / "model.pt")
        loaded = Assessor.load(tmp_path / "model.pt")
        assert (loaded.card, loaded.version) == (card, made.version)
        return made.version

    strange = fitted.of("strange")
    reference = UnlikenessReference((NetworkReference((0.0,), (1.0,), 1.0),))
    assert Assessor(replace(model.card, unlikeness=reference), model.network).version == model.version
    assert version() == version(kinds={"strange": replace(strange, intervals=None)}) != model.version
    other = replace(strange.dice, model=replace(strange.dice.model, intercept=0.5))
    assert version(kinds={"strange": replace(strange, dice=other)}) != version()


def small_assessor() -> Assessor:
    """An untrained network of one structure."""
    plan = replace(PLAN, in_channels=2, out_channels=1, kernels=((3, 3, 3),) * 3, strides=((1, 1, 1),) * 3)
    plan = replace(plan, filters=(4, 4, 4))
    return Assessor(ModelCard("segqc", plan, STRUCTURES[:1], (1,), seen=("p1",)), build_network(plan))


def test_an_assessment_survives_json_without_loss() -> None:
    scan, labels, _ = world()
    assessment = assessor().assess(scan, labels, scan_id="näme").assessment
    assert Assessment.from_json(assessment.to_json()) == assessment
    with pytest.raises(ValueError, match="Assessment"):
        Assessment.from_json("{}")


def test_the_content_address_knows_voxels_and_grid() -> None:
    _, labels, truth = world()
    assert mask_sha256(labels) == mask_sha256(Volume(labels.array.copy(), AFFINE))
    assert mask_sha256(labels) != mask_sha256(Volume(truth, AFFINE))
    assert mask_sha256(labels) != mask_sha256(Volume(labels.array, np.diag([2.0, 1.0, 3.0, 1.0])))


def test_a_mask_of_another_shape_and_a_card_of_other_structures_are_refused() -> None:
    scan, labels, _ = world()
    with pytest.raises(VolumeError, match="must share one grid"):
        assessor().assess(scan, Volume(labels.array[:-1], AFFINE), scan_id="s")
    with pytest.raises(ModelError, match="names 1 structures"):
        assessor(structures=STRUCTURES[:1])


def test_a_part_of_error_maps_is_zero_beyond_where_was_looked() -> None:
    whole = np.zeros((1, 6, 7, 8), np.float32)
    box = slice(1, 4), slice(2, 7), slice(0, 3)
    values = np.random.default_rng(0).random((1, 3, 5, 3)).astype(np.float32)
    whole[(slice(None), *box)] = values
    parts = [
        box,
        (slice(0, 6), slice(0, 7), slice(0, 8)),
        (slice(2, 3), slice(0, 4), slice(2, 8)),
        (slice(5, 6), slice(0, 2), slice(4, 8)),  # apart from it
        (slice(0, 0), slice(0, 1), slice(0, 1)),  # nothing
    ]
    for part in parts:
        np.testing.assert_array_equal(part_of(values, box, part), whole[(slice(None), *part)])
