"""SegQC-Net's error map and the assessment read from it, with a network whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from segqc.assessor import AssessmentSettings, Assessor, mask_sha256
from segqc.metrics import LinearCalibration, true_metrics
from segqc.networks import ModelCard, ModelError, NetworkPlan, StructureCalibration
from segqc.regions import BoxSettings
from segqc.types import Assessment, Structure
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
    result = assessor(form, average_flips=flips).assess(scan, labels, scan_id="s", segmenter_version="v")
    for quality, structure in zip(result.assessment.structures, STRUCTURES, strict=True):
        true = true_metrics(structure.mask(labels.array), structure.mask(truth))
        for name in ("dice", "iou", "arvd", "rvd"):
            assert getattr(quality.raw.metrics, name) == pytest.approx(getattr(true, name), abs=1e-3)
        assert quality.estimated == quality.raw.metrics
        assert quality.present
    assert result.assessment.dice == min(q.raw.metrics.dice for q in result.assessment.structures)  # type: ignore[type-var]


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
    line = LinearCalibration(0.5, 0.2)
    same = LinearCalibration()
    calibration = StructureCalibration(dice=line, iou=same, arvd=same, rvd=same, largest_box_mm2=None)
    scan, labels, _ = world()
    quality = (
        assessor(calibration=(calibration, calibration)).assess(scan, labels, scan_id="s").assessment.structures[0]
    )
    assert quality.raw.metrics.dice is not None
    assert quality.estimated.dice == pytest.approx(0.5 * quality.raw.metrics.dice + 0.2)
    assert quality.estimated.iou == quality.raw.metrics.iou


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
