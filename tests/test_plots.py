"""Pictures: what a person sees lies where the arrays say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from segqc.networks.assessor import AssessmentResult
from segqc.plots import View, draw_assessment, draw_curve
from segqc.types import (
    Assessment,
    ErrorBox,
    ErrorView,
    FloatArray,
    MetricIntervals,
    Metrics,
    PredictionInterval,
    SliceQuality,
    Structure,
    StructureQuality,
)
from segqc.volumes import Volume

SHAPE = (40, 30, 6)
STRUCTURES = (Structure("liver", (1,)),)


def example(error_at: tuple[slice, slice, slice]) -> tuple[Volume, Volume, AssessmentResult]:
    scan = Volume(np.random.default_rng(0).normal(100, 5, SHAPE).astype(np.float32), np.diag([1.0, 1.0, 4.0, 1.0]))
    labels = np.zeros(SHAPE, np.uint8)
    labels[10:30, 8:22, 1:5] = 1
    error: FloatArray = np.zeros((1, *SHAPE), np.float32)
    error[0][error_at] = 1.0
    metrics = Metrics(0.8, 0.67, 0.2, None)
    sums = error[0].sum(axis=(0, 1))
    box = ErrorBox(3, (10, 8), (16, 12), 24.0, 1.0, 1.0)
    view = ErrorView(metrics, tuple(SliceQuality(i, metrics, float(s)) for i, s in enumerate(sums)), (box,))
    quality = StructureQuality("liver", True, 1.0, metrics, view, view)
    assessment = Assessment("s", "0" * 64, None, "v", 2, SHAPE, scan.spacing_mm, (quality,))
    whole = (slice(0, SHAPE[0]), slice(0, SHAPE[1]), slice(0, SHAPE[2]))
    return scan, Volume(labels, scan.affine), AssessmentResult(assessment, error, whole)


def redness(path: Path) -> FloatArray:
    pixels = imread(path)[..., :3]
    strong = (pixels[..., 0] > 0.8) & (pixels[..., 1] < 0.25) & (pixels[..., 2] < 0.25)
    return strong.astype(np.float32)


def test_the_heat_shows_only_where_errors_are_likely(tmp_path: Path) -> None:
    with_error = example((slice(10, 16), slice(8, 12), slice(3, 4)))
    draw_assessment(*with_error, tmp_path / "a.png", slices=2, structures=STRUCTURES)
    without = example((slice(0, 0), slice(0, 0), slice(0, 0)))
    draw_assessment(*without, tmp_path / "b.png", slices=2, structures=STRUCTURES)
    # the colour bar is red in both
    assert redness(tmp_path / "a.png").sum() > redness(tmp_path / "b.png").sum() + 200


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_the_suffix_decides_the_format_and_nothing_half_written_stays(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    draw_assessment(*example((slice(1, 2), slice(1, 2), slice(1, 2))), path)
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    assert path.read_bytes().startswith(start)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_headline_tells_the_interval_or_that_there_is_not_enough_data(tmp_path: Path) -> None:
    scan, labels, result = example((slice(1, 2), slice(1, 2), slice(1, 2)))
    draw_assessment(scan, labels, result, tmp_path / "a.svg")
    assert "liver 0.80 (no interval: not enough data)" in (tmp_path / "a.svg").read_text()
    (quality,) = result.assessment.structures
    output = replace(quality, intervals=MetricIntervals(dice=PredictionInterval(0.724, 0.9, 0.9)))
    draw_assessment(
        scan, labels, replace(result, assessment=replace(result.assessment, structures=(output,))), tmp_path / "b.svg"
    )
    assert "liver 0.80 (0.72-0.90)" in (tmp_path / "b.svg").read_text()


def test_a_scan_without_structure_or_error_can_be_drawn(tmp_path: Path) -> None:
    scan, labels, result = example((slice(0, 0), slice(0, 0), slice(0, 0)))
    empty = Volume(np.zeros_like(labels.array), labels.affine)
    draw_assessment(scan, empty, result, tmp_path / "a.png", slices=10)
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "PIR", "ASL", "ILP"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_superior_or_anterior_is_up_and_the_patient_s_right_or_front_on_the_left(codes: str, axis: int) -> None:
    """Independent reference: follow one voxel step on the page into world coordinates."""
    directions = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    affine = np.eye(4)
    affine[:3, :3] = np.array([directions[c] for c in codes]).T
    view = View.of(Volume(np.zeros((3, 4, 5), np.float32), affine), axis)
    assert {view.horizontal, view.vertical} == {0, 1, 2} - {axis}
    to_the_right = affine[:3, view.horizontal] * (-1 if view.flip_horizontal else 1)
    upwards = affine[:3, view.vertical] * (-1 if view.flip_vertical else 1)
    assert tuple(to_the_right) in {(-1, 0, 0), (0, -1, 0)}  # towards the left side, or the back, of the patient
    assert tuple(upwards) in {(0, 0, 1), (0, 1, 0)}


@pytest.mark.parametrize("codes", ["RAS", "SAR", "ASL"])
def test_boxes_lie_on_the_voxels_that_they_hold(codes: str) -> None:
    directions = {"R": (1, 0, 0), "A": (0, 1, 0), "S": (0, 0, 1), "L": (-1, 0, 0)}
    affine = np.eye(4)
    affine[:3, :3] = np.array([directions[c] for c in codes]).T
    array = np.zeros((8, 9, 10), np.float32)
    array[2:5, 1:7, 4] = 1
    view = View.of(Volume(array, affine), 2)
    (x, y), width, height = view.rectangle((2, 1), (5, 7))
    rows, columns = np.nonzero(view.plane(array, 4))
    assert (x, y) == (columns.min() - 0.5, rows.min() - 0.5)
    assert (x + width, y + height) == (columns.max() + 0.5, rows.max() + 0.5)


def test_a_learning_curve_is_drawn_from_what_the_training_wrote(tmp_path: Path) -> None:
    curve = tmp_path / "curve.json"
    curve.write_text(json.dumps([{"epoch": e, "train_loss": 1 / e, "validation_loss": None} for e in (1, 2, 3)]))
    draw_curve(curve, tmp_path / "curve.png")
    assert imread(tmp_path / "curve.png").std() > 0
    curve.write_text('[{"epoch": "x"}]')
    with pytest.raises(ValueError, match="epoch"):
        draw_curve(curve, tmp_path / "curve.png")
