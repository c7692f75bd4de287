from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from pydantic import TypeAdapter

from segqc.evaluation.experiments.observers import (
    ERROR_KINDS,
    RELATIVE_CURVE,
    ChoiceRule,
    ObserverCase,
    ObserverExperiment,
    ObserverSettings,
    Outcome,
    WidthOutcome,
    choose_width,
    compare_observers,
    draw_curves,
    find_double_readings,
    find_experts,
    implant_errors,
    measure,
    read_cases,
    read_structures,
    split_scans,
)
from segqc.quality.error_maps import PLAIN_EXTRACTION, ExtractionSettings
from segqc.types import Structure
from segqc.volumes import Volume, VolumeError, write_labels

SPACING = (1.0, 1.25, 3.0)
NOTHING = ExtractionSettings(band_mm=0.0, min_component_mm2=0.0)
BALL, SMALL = Structure("ball", (1,)), Structure("small", (2,))


def ellipsoid(shape: tuple[int, int, int], centre: tuple[float, ...], radii_mm: tuple[float, ...]) -> np.ndarray:
    grid = np.indices(shape)
    return sum(((g - c) * s / r) ** 2 for g, c, s, r in zip(grid, centre, SPACING, radii_mm, strict=True)) <= 1


def label_maps(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two readings: a ball of about 17 ml whose contour differs by a voxel or so, and a thing of 0.6 ml."""
    rng = np.random.default_rng(seed)
    shape = (64, 56, 20)
    maps = []
    for _ in range(2):
        centre = np.array([26, 24, 10]) + rng.uniform(-0.6, 0.6, 3)
        labels = ellipsoid(shape, tuple(centre), (16, 16, 16)).astype(np.uint8)
        labels[ellipsoid(shape, (52.0, 45.0, 8.0 + rng.uniform(-0.3, 0.3)), (5, 5, 6))] = 2
        maps.append(labels)
    return maps[0], maps[1]


def write_readings(folder: Path, scans: int, *, axis: int = 2) -> None:
    affine = np.diag([*np.roll(SPACING, axis - 2), 1.0])
    for i in range(scans):
        for expert, labels in zip(("a", "b"), label_maps(i), strict=True):
            moved = labels if axis == 2 else labels.transpose(2, 0, 1)
            write_labels(Volume(np.ascontiguousarray(moved), affine), folder / f"s_{i}_{expert}.nii.gz")


def case_of(first: np.ndarray, second: np.ndarray, **changes: object) -> ObserverCase:
    return replace(ObserverCase("s", "ball", (1.0, 1.0, 1.0), first, second), **changes)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> ObserverExperiment:
    folder = tmp_path_factory.mktemp("readings")
    write_readings(folder, 5)
    return compare_observers(find_double_readings(folder, "a", "b"), (BALL, SMALL))


def test_scans_that_both_experts_labelled_are_found(tmp_path: Path) -> None:
    for name in ("x_1_a.nii.gz", "x_1_b.nrrd", "y_a.nii", "z_b.nii.gz", "labels.txt", "README.md"):
        (tmp_path / name).touch()
    (found,) = find_double_readings(tmp_path, "a", "b")
    assert (found.scan, found.first.name, found.second.name) == ("x_1", "x_1_a.nii.gz", "x_1_b.nrrd")
    with pytest.raises(ValueError, match="no scan with labels of both 'a' and 'c'"):
        find_double_readings(tmp_path, "a", "c")


def test_cases_are_the_structures_that_both_drew_whatever_the_slices_axis(tmp_path: Path) -> None:
    first, second = label_maps(0)
    both = {}
    for axis in (2, 0):
        folder = tmp_path / str(axis)
        folder.mkdir()
        write_readings(folder, 1, axis=axis)
        (reading,) = find_double_readings(folder, "a", "b")
        cases = read_cases(reading, (BALL, SMALL, Structure("absent", (9,))), ObserverSettings())
        assert [c.structure for c in cases] == ["ball", "small"]
        both[axis] = cases[0]
    ball = both[2]
    assert ball.spacing_mm == SPACING
    assert ball.first.sum() == (first == 1).sum() and ball.second.sum() == (second == 1).sum()
    assert (ball.first ^ ball.second).sum() == ((first == 1) ^ (second == 1)).sum()
    assert ball.volume_ml == pytest.approx((first == 1).sum() * 3.75 / 1000)
    for a, b in zip(ball.implanted, both[0].implanted, strict=True):
        np.testing.assert_array_equal(a.mask, b.mask)


def test_readings_on_two_grids_are_refused(tmp_path: Path) -> None:
    write_readings(tmp_path, 1)
    write_labels(Volume(np.ones((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "s_0_b.nii.gz")
    with pytest.raises(VolumeError, match="shape"):
        read_cases(find_double_readings(tmp_path, "a", "b")[0], (BALL,), ObserverSettings())


@pytest.mark.parametrize("kind", ERROR_KINDS)
def test_implanted_errors_are_what_they_are_called(kind: str) -> None:
    first = np.moveaxis(ellipsoid((60, 60, 24), (30.0, 24.0, 12.0), (15, 15, 30)), 0, 0)
    case = ObserverCase("s", "ball", SPACING, first, first)
    got = implant_errors(case, kind, ObserverSettings(leak_radius_mm=6.0), np.random.default_rng(1))
    np.testing.assert_array_equal(got.error, got.mask ^ first)
    assert len(set(got.slices)) == 4
    assert set(np.flatnonzero(got.error.any(axis=(0, 1)))) == set(got.slices)
    again = implant_errors(case, kind, ObserverSettings(leak_radius_mm=6.0), np.random.default_rng(1))
    np.testing.assert_array_equal(again.mask, got.mask)
    for i in got.slices:
        here, error = first[..., i], got.error[..., i]
        if kind == "missing slice":
            assert not got.mask[..., i].any()
        elif kind == "leak":
            assert not (error & here).any()
            rows, columns = np.nonzero(error)
            assert np.ptp(rows) * SPACING[0] <= 12 and np.ptp(columns) * SPACING[1] <= 12
            assert 40 < error.sum() * 1.25 < 113  # more than a third of the disk, less than all of it
        else:
            assert not (error & ~here).any()
            assert error.sum() / here.sum() == pytest.approx(0.5, abs=0.08)


def test_few_slices_get_few_errors() -> None:
    first = np.zeros((30, 30, 9), bool)
    first[5:25, 5:25, 2:7] = True
    for kind in ERROR_KINDS:
        assert (
            len(implant_errors(case_of(first, first), kind, ObserverSettings(), np.random.default_rng(0)).slices) == 1
        )


def test_what_is_removed_is_counted_apart_for_slices_of_one_expert() -> None:
    first, second = np.zeros((40, 40, 8), bool), np.zeros((40, 40, 8), bool)
    first[10:30, 10:30, 1:6] = second[11:31, 10:30, 2:7] = True
    (large, everything) = measure([case_of(first, second)], PLAIN_EXTRACTION, ObserverSettings(large_ml=50)).groups
    assert (large.cases, large.removed.share, large.removed.whole) == (0, None, 0)
    # four common slices differ by two rows of 20; slice 1 holds the first mask only, slice 6 the second only
    assert (everything.removed.whole, everything.removed.part, everything.removed.share) == (160, 160, 1.0)
    assert everything.removed_single.whole == 800
    assert everything.removed_single.part == 400 - 16 * 16  # the first mask's rim; the second's slice is kept whole
    assert everything.removed.interval is None  # one scan


def test_without_extraction_all_is_found_and_kept_and_nothing_removed() -> None:
    first, second = (labels == 1 for labels in label_maps(3))
    case = ObserverCase("s", "ball", SPACING, first, second)
    settings = ObserverSettings()
    rng = np.random.default_rng(0)
    case = replace(case, implanted=tuple(implant_errors(case, kind, settings, rng) for kind in ERROR_KINDS))
    group = measure([case], NOTHING, settings).large
    assert group.removed.share == 0 and group.removed.whole > 0
    areas = np.concatenate([np.count_nonzero(i.error, axis=(0, 1)) * 1.25 for i in case.implanted])
    total = group.implanted[0]
    assert (total.found.part, total.found.whole) == ((areas > 100).sum(), (areas > 100).sum())
    assert total.kept.whole == round(areas[areas > 100].sum() / 1.25)
    for errors in group.implanted:
        assert errors.found.share == errors.kept.share == 1
        if errors.kind == "missing slice":
            assert errors.kept_in_difference.whole == 0
        else:
            assert errors.kept_in_difference.share == 1 and errors.difference_removed.share == 0
            assert errors.kept_in_difference.whole <= errors.kept.whole


def test_errors_that_extraction_removes_are_not_found() -> None:
    first = np.zeros((60, 60, 12), bool)
    first[5:55, 5:55] = True
    settings = ObserverSettings(large_ml=1)
    leak = implant_errors(case_of(first, first), "leak", settings, np.random.default_rng(0))
    case = case_of(first, first, implanted=(leak,))
    all_found = measure([case], PLAIN_EXTRACTION, settings).large.implanted[0]
    assert all_found.found.whole > 0 and all_found.found.share == 1 and 0 < all_found.kept.share < 1
    none = measure([case], replace(PLAIN_EXTRACTION, band_mm=12.0), settings).large.implanted[0]
    assert none.found.share == none.kept.share == 0
    # settings of the structure's own come first
    own = replace(PLAIN_EXTRACTION, band_mm=12.0, structure_band_mm={"ball": 2.0})
    assert measure([case], own, settings).large.implanted[0] == all_found
    small = replace(settings, min_error_mm2=1000.0)
    assert measure([case], PLAIN_EXTRACTION, small).large.implanted[0].found.whole == 0


def test_pooled_shares_means_and_intervals() -> None:
    cases = []
    for number in range(12):
        first, second = np.zeros((40, 40, 4), bool), np.zeros((40, 40, 4), bool)
        first[5:35, 5:35] = second[5:35, 5:35] = True
        second[5, 5:35] = False  # removed
        if number % 3 == 0:
            second[15:25, 15:25] = False  # stays
        cases.append(case_of(first, second, scan=f"s{number}"))
    share = measure(cases, replace(PLAIN_EXTRACTION, min_component_mm2=1.0), ObserverSettings(large_ml=1)).large.removed
    assert (share.part, share.whole) == (12 * 120, 12 * 120 + 4 * 400)
    assert share.share == pytest.approx(1440 / 3040, abs=1e-4)
    assert share.mean == pytest.approx((8 + 4 * 120 / 520) / 12, abs=1e-4)
    assert share.interval is not None
    low, high = share.interval
    assert low < share.share < high < 1


@pytest.mark.parametrize("count", [2, 5, 35])
def test_the_split_is_a_seeded_partition(count: int) -> None:
    scans = [f"s{i}" for i in range(count)]
    choosing, held = split_scans(scans, 0)
    assert sorted(choosing + held) == sorted(scans)
    assert len(choosing) == count // 2
    assert split_scans(scans[::-1], 0) == (choosing, held)
    if count > 5:
        assert split_scans(scans, 1) != (choosing, held)


def test_the_narrowest_width_that_meets_the_rule_is_chosen(experiment: ObserverExperiment) -> None:
    curve = experiment.curves[RELATIVE_CURVE]
    removed = {p.width: p.outcome.large.removed.share or 0.0 for p in curve.points}
    found = {p.width: min(e.found.share or 0.0 for e in p.outcome.large.implanted) for p in curve.points}
    rule = ChoiceRule(min_removed=0.9, min_found=0.9, min_kept=0.0)
    allowed = [w for w in removed if removed[w] >= 0.9 and found[w] >= 0.9]
    assert 0 < len(allowed) < len(curve.points)
    assert choose_width(curve, rule) == min(allowed)
    assert choose_width(replace(curve, points=curve.points[::-1]), rule) == min(allowed)
    assert choose_width(curve, replace(rule, min_removed=1.1)) is None
    assert choose_width(curve, replace(rule, min_kept=1.1)) is None


def test_a_study_keeps_its_halves_apart_and_turns_into_json_and_back(experiment: ObserverExperiment) -> None:
    assert len(experiment.choosing) == 2 and len(experiment.held) == 3
    assert {p.outcome.large.cases for curve in experiment.curves.values() for p in curve.points} == {2}
    assert {o.large.cases for o in experiment.on_held.values()} == {3}
    assert [g.name for g in experiment.on_held["plain 2 mm band"].groups] == ["over 5 ml", "all structures", "ball"]
    assert experiment.on_held["plain 2 mm band"].groups[1].cases == 6
    kinds = TypeAdapter(ObserverExperiment)
    assert kinds.validate_json(kinds.dump_json(experiment)) == experiment


def test_a_wider_band_removes_more_and_keeps_less(experiment: ObserverExperiment) -> None:
    for name in ("in mm, plain", "relative, plain"):
        groups = [p.outcome.large for p in experiment.curves[name].points]
        removed = [g.removed.share for g in groups]
        kept = [g.implanted[0].kept.share for g in groups]
        assert removed == sorted(removed) and removed[0] < removed[-1]
        assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1]


def test_experts_and_structures_are_found_or_missed(tmp_path: Path) -> None:
    folder = tmp_path
    write_readings(folder, 2)
    assert find_experts(folder) == ("a", "b")
    with pytest.raises(ValueError, match=r"labels.txt: is missing"):
        read_structures(folder)
    (folder / "labels.txt").write_text("1 ball\n\n12 a small  one \n")
    assert read_structures(folder) == (Structure("ball", (1,)), Structure("a small  one", (12,)))
    (folder / "labels.txt").write_text("1 ball\nsmall 2\n")
    with pytest.raises(ValueError, match=r"'small 2' is not a label value and a name"):
        read_structures(folder)
    for path in folder.glob("*_b.nii.gz"):
        path.unlink()
    with pytest.raises(ValueError, match=r"of two experts, found \['a'\]"):
        find_experts(folder)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("between", [" ", "\t", ";", ", ", " ; "])
def test_structures_are_read_as_other_programs_write_them(
    tmp_path: Path, encoding: str, end: str, between: str
) -> None:
    lines = [" 1", "Herz"], ["", ""], ["2 ", '"große Leber"'], ["1", "Herz "]
    text = end.join(between.join(line) if any(line) else "" for line in lines)
    (tmp_path / "labels.txt").write_bytes(text.encode(encoding))
    assert read_structures(tmp_path) == (Structure("Herz", (1,)), Structure("große Leber", (2,)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("value;name\n1;a", "'value;name' is not a label value and a name"),
        ("1;a\n2;a", "'a' has two label values, 1 and 2"),
        ("1;a\n1;b", "a label value has two names"),
        ("1,5;a", "'1,5;a'"),
        ("1;", "'1;'"),
        ("1", "'1'"),
    ],
)
def test_structures_of_two_meanings_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_structures(tmp_path)
    assert "\n" not in str(caught.value)


def test_too_few_scans_are_refused(tmp_path: Path) -> None:
    write_readings(tmp_path, 1)
    readings = find_double_readings(tmp_path, "a", "b")
    for wrong in (readings, readings * 2):
        with pytest.raises(ValueError, match="two or more scans"):
            compare_observers(wrong, (BALL,))


def test_the_curves_are_drawn(experiment: ObserverExperiment, tmp_path: Path) -> None:
    draw_curves(experiment, tmp_path / "curves.png")
    drawn = image.imread(tmp_path / "curves.png")
    assert drawn.shape[0] > 500 and drawn.shape[1] > 800
    assert len(np.unique(drawn[..., :3] @ [1, 300, 300**2])) > 50, "colours"
    one = replace(experiment, curves={"in mm, plain": experiment.curves["in mm, plain"]}, chosen=None)
    draw_curves(one, tmp_path / "one.svg")
    assert "radius" in (tmp_path / "one.svg").read_text()


def test_real_experts_differ_mostly_along_the_contour(real_data: Path) -> None:
    folder = real_data / "two-raters-head-neck"
    if not folder.is_dir():
        pytest.skip("SEGQC_DATA holds no two-raters-head-neck")
    readings = find_double_readings(folder, "oncologist", "radiographer")
    assert len(readings) == 35
    choosing, _ = split_scans([r.scan for r in readings], 0)
    reading = next(r for r in readings if r.scan == choosing[0])
    cases = read_cases(reading, (Structure("Brainstem", (1,)), Structure("Orbit-Lt", (8,))), ObserverSettings())

    def large(extraction: ExtractionSettings) -> Outcome:
        return measure(cases, extraction, ObserverSettings())

    default, plain = (large(s).large for s in (ExtractionSettings(), PLAIN_EXTRACTION))
    assert default.cases == 2
    assert default.removed.share is not None and default.removed.share > 0.85
    assert default.implanted[0].found.share == 1
    assert default.implanted[0].kept.share > plain.implanted[0].kept.share
    assert WidthOutcome(2.0, large(PLAIN_EXTRACTION)).outcome.large == plain
