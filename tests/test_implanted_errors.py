"""Errors of people, implanted: each kind does what its name says, and masks are as bad as people's."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from segqc.phantom import draw_phantom
from segqc.training.implanted_errors import ERROR_KINDS, ErrorKind, ImplantedErrors, implant_errors, people_like_masks
from segqc.types import BoolArray, LabelArray, Structure
from segqc.volumes import Volume, read_labels, read_scan, through_plane_axis
from segqc.volumes.slices import differing

PAIR = (Structure("left", (1,)), Structure("right", (2,)))
UNION = (Structure("both", (1, 2)),)
ONE = (Structure("left", (1,)),)
THICK = (1.0, 1.2, 5.0)
ISOTROPIC = (1.5, 1.5, 1.5)
SEEDS = range(6)
ORDERS = list(itertools.permutations(range(3)))
LOSING: tuple[ErrorKind, ...] = ("cut", "missing slices", "hole")
GAINING: tuple[ErrorKind, ...] = ("leak", "island")


def scene(
    spacing_mm: tuple[float, float, float], order: tuple[int, int, int] = (0, 1, 2), *, oblique: bool = False
) -> tuple[Volume, LabelArray]:
    """Two balls that touch, left and right, in noise, and something bright beside them; the axes in any order."""
    shape = tuple(round(n / s) for n, s in zip((80.0, 70.0, 60.0), spacing_mm, strict=True))
    x, y, z = (np.arange(n, dtype=np.float32) * s for n, s in zip(shape, spacing_mm, strict=True))
    x, y, z = x[:, None, None], y[:, None], z

    def ball(centre: tuple[float, float, float], radius_mm: float) -> BoolArray:
        cx, cy, cz = centre
        return np.asarray((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2 < radius_mm**2)

    truth = np.zeros(shape, np.uint8)
    truth[ball((30, 30, 30), 12)] = 1
    truth[ball((50, 31, 31), 11) & (truth == 0)] = 2
    image = np.random.default_rng(0).normal(0, 8, shape) + 100 * (truth > 0)
    image[ball((30, 52, 30), 9) & (truth == 0)] += 90
    affine = np.diag([*spacing_mm, 1.0])[:, [*order, 3]]
    if oblique:
        turn = np.deg2rad(20.0)
        rotation = np.eye(4)
        rotation[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
        affine = rotation @ affine
    scan = Volume(np.ascontiguousarray(image.transpose(order), np.float32), affine)
    return scan, np.ascontiguousarray(truth.transpose(order))


def dice(labels: LabelArray, truth: LabelArray, structures: Sequence[Structure]) -> float:
    pairs = [(structure.mask(labels), structure.mask(truth)) for structure in structures]
    common = sum(np.count_nonzero(mask & true) for mask, true in pairs)
    return 2 * common / sum(np.count_nonzero(mask) + np.count_nonzero(true) for mask, true in pairs)


def implant(
    scan: Volume,
    truth: LabelArray,
    kind: ErrorKind,
    seed: int,
    structures: Sequence[Structure] = ONE,
    target: float = 0.92,
) -> LabelArray:
    rng = np.random.default_rng(seed)
    found = implant_errors(truth, scan, structures, rng, kinds=(kind,), errors=1, target_dice=target)
    assert found.kinds == (kind,)
    assert found.labels.dtype == np.uint8
    assert found.labels.shape == truth.shape
    assert not np.array_equal(found.labels, truth)
    return found.labels


def slices_first(array: LabelArray, scan: Volume) -> LabelArray:
    return np.moveaxis(array, through_plane_axis(scan), 0)


@pytest.fixture(params=[THICK, ISOTROPIC], ids=["thick", "isotropic"])
def ball(request: pytest.FixtureRequest) -> tuple[Volume, LabelArray]:
    """A scan and the left one of its structures."""
    scan, truth = scene(request.param)
    return scan, np.where(truth == 1, truth, 0).astype(np.uint8)


# --------------------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize("kind", LOSING)
@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_missing_was_there_and_nothing_is_new(
    ball: tuple[Volume, LabelArray], kind: ErrorKind, seed: int
) -> None:
    scan, truth = ball
    labels = implant(scan, truth, kind, seed)
    assert np.all((labels == truth) | (labels == 0))


@pytest.mark.parametrize("kind", GAINING)
@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_added_leaves_the_structure_as_it_is(
    ball: tuple[Volume, LabelArray], kind: ErrorKind, seed: int
) -> None:
    scan, truth = ball
    labels = implant(scan, truth, kind, seed)
    np.testing.assert_array_equal(labels[truth > 0], truth[truth > 0])
    added = (labels > 0) & (truth == 0)
    _, old = ndimage.label(truth, np.ones((3, 3, 3)))
    _, new = ndimage.label(labels, np.ones((3, 3, 3)))
    assert old == 1
    if kind == "leak":
        assert new == 1, "it hangs on to the structure"
    else:
        assert not (ndimage.binary_dilation(truth, np.ones((3, 3, 3))) & added).any(), "it lies away from it"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_leak_follows_the_tissue_of_the_scan(seed: int) -> None:
    scan, truth = scene(ISOTROPIC)
    bright = scan.array > 50
    wet, dry = (np.where(area, 100.0, 0.0).astype(np.float32) for area in (bright, truth == 1))
    outside = [
        implant(Volume(image, scan.affine), np.where(truth == 1, 1, 0).astype(np.uint8), "leak", seed) == 1
        for image in (wet, dry)
    ]
    in_tissue = [np.count_nonzero(mask & (truth == 2)) / np.count_nonzero(mask & (truth != 1)) for mask in outside]
    assert in_tissue[0] > 0.4, "into the structure beside it, which looks the same"
    assert in_tissue[0] >= in_tissue[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_slices_are_whole_neighbouring_slices_and_some_are_left(
    ball: tuple[Volume, LabelArray], seed: int
) -> None:
    scan, truth = ball
    labels = implant(scan, truth, "missing slices", seed, target=0.8)
    missing = np.array(differing(truth, labels, through_plane_axis(scan)))
    assert not slices_first(labels, scan)[missing].any()
    assert np.all(np.diff(missing) == 1)
    assert labels.any()


@pytest.mark.parametrize("structures", [ONE, PAIR, UNION], ids=["one", "pair", "union"])
@pytest.mark.parametrize("seed", SEEDS)
def test_repeated_slices_equal_their_source(structures: Sequence[Structure], seed: int) -> None:
    scan, truth = scene(THICK)
    labels = implant(scan, truth, "repeated slices", seed, structures)
    changed = differing(truth, labels, 2)
    repeated = [
        structure
        for structure, source in itertools.product(structures, range(truth.shape[2]))
        if structure.mask(truth[..., source]).any()
        and all(
            np.array_equal(structure.mask(labels[..., index]), structure.mask(truth[..., source])) for index in changed
        )
    ]
    assert repeated
    inner = range(changed[0], changed[-1] + 1)
    assert all(np.array_equal(labels[..., i] > 0, labels[..., changed[0]] > 0) for i in inner if structures == UNION), (
        "one after the other"
    )


@pytest.mark.parametrize("kind", ["shifted part", "wrong neighbour"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_part_is_moved_in_its_slices_as_it_is(ball: tuple[Volume, LabelArray], kind: ErrorKind, seed: int) -> None:
    scan, truth = ball
    labels = implant(scan, truth, kind, seed)
    before, after = (np.count_nonzero(slices_first(a, scan), axis=(1, 2)) for a in (truth, labels))
    assert np.all(after <= before), "nothing grows; where it lies on the rest it hides some"
    left, added = (truth > 0) & (labels == 0), (labels > 0) & (truth == 0)
    assert left.any()
    assert added.any()
    if kind == "wrong neighbour":
        assert np.count_nonzero(added) > 0.5 * np.count_nonzero(left)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_over_smoothed_structure_loses_its_corners_and_keeps_its_slices(seed: int) -> None:
    truth = np.zeros((40, 40, 12), np.uint8)
    truth[10:30, 10:30, 3:9] = 1
    truth[18:22, 30:36, 3:9] = 1  # a tongue
    scan = Volume(truth * 100.0, np.diag([1.0, 1.0, 4.0, 1.0]))
    labels = implant(scan, truth, "over-smoothed", seed)
    np.testing.assert_array_equal(np.count_nonzero(labels, axis=(0, 1)), np.count_nonzero(truth, axis=(0, 1)))
    assert not labels[10, 10].any()
    assert not labels[35, 18].any() or not labels[18, 35].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_boundary_noise_stays_at_the_contour_and_leaves_no_crumbs(ball: tuple[Volume, LabelArray], seed: int) -> None:
    scan, truth = ball
    labels = implant(scan, truth, "boundary noise", seed)
    changed = labels != truth
    away_mm = np.maximum(
        *(ndimage.distance_transform_edt(mask, scan.spacing_mm) for mask in (truth > 0, truth == 0))  # type: ignore[call-overload]
    )
    assert away_mm[changed].max() <= 0.6 * 12 + 1, "of a ball of 12 mm"
    parts, count = ndimage.label(labels > 0, np.ones((3, 3, 3)))
    assert set(range(1, count + 1)) <= set(np.unique(parts[truth > 0]))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_hole_is_enclosed(ball: tuple[Volume, LabelArray], seed: int) -> None:
    scan, truth = ball
    labels = implant(scan, truth, "hole", seed)
    slices, filled = slices_first(labels, scan), slices_first(truth, scan)
    for one, whole in zip(slices, filled, strict=True):
        np.testing.assert_array_equal(ndimage.binary_fill_holes(one > 0), whole > 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_swapped_structures_exchange_values_and_nothing_else(seed: int) -> None:
    scan, truth = scene(THICK)
    labels = implant(scan, truth, "swapped structures", seed, PAIR)
    np.testing.assert_array_equal(labels > 0, truth > 0)
    changed = labels != truth
    np.testing.assert_array_equal(labels[changed], 3 - truth[changed])


def test_swapped_sides_exchange_a_left_and_a_right_structure() -> None:
    scan, truth = scene(ISOTROPIC)
    labels = implant(scan, truth, "swapped sides", 0, PAIR)
    np.testing.assert_array_equal(labels, np.array([0, 2, 1], np.uint8)[truth])


@pytest.mark.parametrize("order", ORDERS)
def test_without_a_pair_the_mask_is_mirrored_from_left_to_right(order: tuple[int, int, int]) -> None:
    scan, truth = scene(THICK, order)
    labels = implant(scan, truth, "swapped sides", 0, UNION)
    np.testing.assert_array_equal(labels, np.flip(truth, order.index(0)))


# -------------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("kind", ERROR_KINDS)
@pytest.mark.parametrize("order", ORDERS)
def test_axes_may_be_in_any_order(kind: ErrorKind, order: tuple[int, int, int]) -> None:
    scan, truth = scene(THICK, order, oblique=True)
    plain, plain_truth = scene(THICK)
    assert through_plane_axis(scan) == order.index(2)
    for seed in range(2):
        labels = implant(scan, truth, kind, seed, PAIR)
        if kind not in ("swapped sides", "over-smoothed"):  # a ball has no corners to lose
            assert dice(labels, truth, PAIR) == pytest.approx(0.92, abs=0.05)
        if order[:2] == (0, 1) or (order.index(0) < order.index(1) and kind != "swapped sides"):
            same = implant(plain, plain_truth, kind, seed, PAIR)
            np.testing.assert_array_equal(labels, same.transpose(order), "the same error as with the slices last")


@pytest.mark.parametrize("kind", ["cut", "leak", "hole", "island", "shifted part", "wrong neighbour"])
def test_in_thick_slices_a_small_error_lies_in_few(kind: ErrorKind) -> None:
    scan, truth = scene(THICK)
    for seed in range(6):
        labels = implant(scan, truth, kind, seed, PAIR, target=0.98)
        changed = differing(truth, labels, 2)
        assert changed[-1] - changed[0] < 4


# ------------------------------------------------------------------------------------------------------------- choices


def test_the_generator_alone_decides() -> None:
    scan, truth = scene(THICK)
    before = truth.copy()

    def masks(seed: int) -> list[ImplantedErrors]:
        return people_like_masks(truth, scan, PAIR, 12, np.random.default_rng(seed))

    one, again, other = masks(1), masks(1), masks(2)
    for first, second in zip(one, again, strict=True):
        assert first.kinds == second.kinds
        np.testing.assert_array_equal(first.labels, second.labels)
    assert any(not np.array_equal(a.labels, b.labels) for a, b in zip(one, other, strict=True))
    np.testing.assert_array_equal(truth, before)
    assert not any(np.shares_memory(mask.labels, truth) for mask in one)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_so_many_errors_as_are_asked_for(count: int) -> None:
    scan, truth = scene(THICK)
    for seed in range(5):
        found = implant_errors(truth, scan, UNION, np.random.default_rng(seed), errors=count)
        assert len(found.kinds) == (1 if found.kinds == ("swapped sides",) else count)


@pytest.mark.parametrize("target", [0.98, 0.9, 0.8, 0.6])
def test_the_true_dice_is_as_asked_for(target: float) -> None:
    scan, truth = scene(THICK)
    usual = [kind for kind in ERROR_KINDS if kind != "swapped sides"]
    got = [
        dice(
            implant_errors(truth, scan, PAIR, np.random.default_rng(s), kinds=usual, target_dice=target).labels,
            truth,
            PAIR,
        )
        for s in range(10)
    ]
    assert np.median(np.abs(np.array(got) - target)) < 0.2 * (1 - target)
    assert max(got) < 1


def test_kinds_that_do_not_apply_are_left_out() -> None:
    scan, truth = scene(THICK)
    rng = np.random.default_rng(0)
    alone = implant_errors(truth, scan, UNION, rng, kinds=("swapped structures",))
    assert alone.kinds == ()
    np.testing.assert_array_equal(alone.labels, truth)
    single = Volume(scan.array[..., 5:6], scan.affine)
    kinds = {
        kind
        for seed in range(20)
        for kind in implant_errors(truth[..., 5:6], single, PAIR, np.random.default_rng(seed)).kinds
    }
    assert kinds
    assert not kinds & {"missing slices", "repeated slices"}


def test_an_empty_truth_stays_or_gets_an_island() -> None:
    scan, truth = scene(THICK)
    nothing = np.zeros_like(truth)
    masks = people_like_masks(nothing, scan, ONE, 30, np.random.default_rng(0))
    assert {mask.kinds for mask in masks} == {(), ("island",)}
    for mask in masks:
        assert mask.labels.any() == bool(mask.kinds)
        assert set(np.unique(mask.labels)) <= {0, 1}
    assert implant_errors(nothing, scan, ONE, np.random.default_rng(0), kinds=("cut",)).kinds == ()


@pytest.mark.parametrize("kind", ERROR_KINDS)
def test_a_structure_of_a_voxel_or_one_that_fills_the_scan_is_no_failure(kind: ErrorKind) -> None:
    scan, truth = scene(THICK)
    tiny = np.zeros_like(truth)
    tiny[0, 0, 0] = 1
    for labels in (tiny, np.ones_like(truth)):
        found = implant_errors(labels, scan, PAIR, np.random.default_rng(0), kinds=(kind,))
        assert bool(found.kinds) == (not np.array_equal(found.labels, labels))


def test_what_is_wrong_with_the_arguments_is_said() -> None:
    scan, truth = scene(THICK)
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="on the scan's grid"):
        implant_errors(truth[1:], scan, ONE, rng)
    with pytest.raises(ValueError, match=r"unknown kinds of errors \['scribble'\]"):
        implant_errors(truth, scan, ONE, rng, kinds=("scribble",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="errors must be 1 or more, got 0"):
        implant_errors(truth, scan, ONE, rng, errors=0)
    with pytest.raises(ValueError, match="target Dice must lie between 0 and 1"):
        implant_errors(truth, scan, ONE, rng, target_dice=1.0)


# -------------------------------------------------------------------------------------------------------------- spread


def check_spread(masks: Sequence[tuple[ImplantedErrors, float]]) -> None:
    """Of masks with their Dice: untouched ones, and the others over the whole range, most of them good."""
    untouched = [mask for mask, true in masks if not mask.kinds]
    assert 0.08 < len(untouched) / len(masks) < 0.27
    assert all((true == 1) == (not mask.kinds) for mask, true in masks)
    assert all(len(mask.kinds) <= 3 for mask, _ in masks)
    values = np.array([true for _, true in masks])
    counts, _ = np.histogram(values, [0.0, 0.45, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0 + 1e-9])
    shares = counts / len(masks)
    assert shares[0] < 0.05, "nobody hands in what is all wrong"
    assert shares[1:4].min() > 0.02
    assert shares[4:].min() > 0.08
    assert 0.45 < np.mean(values >= 0.85) < 0.75
    seen = {kind for mask, _ in masks for kind in mask.kinds}
    assert len(seen) >= len(ERROR_KINDS) - 2


def test_masks_of_a_phantom_are_as_bad_as_peoples() -> None:
    structures = tuple(Structure(name, (value,)) for value, name in enumerate(("placenta", "body", "brain"), 1))
    masks = []
    for seed in range(2):
        phantom = draw_phantom(seed, 0.3)
        truth = phantom.labels.array[::2, ::2]
        scan = Volume(phantom.scan.array[::2, ::2], phantom.scan.affine @ np.diag([2.0, 2.0, 1.0, 1.0]))
        made = people_like_masks(truth, scan, structures, 75, np.random.default_rng(seed))
        masks += [(mask, dice(mask.labels, truth, structures)) for mask in made]
    check_spread(masks)


@pytest.mark.parametrize("structures", [UNION, PAIR], ids=["hippocampus", "head and body"])
def test_masks_of_hippocampi_are_as_bad_as_peoples(real_data: Path, structures: Sequence[Structure]) -> None:
    folder = real_data / "msd-hippocampus"
    if not folder.is_dir():
        pytest.skip("SEGQC_DATA holds no msd-hippocampus")
    masks = []
    for number, name in enumerate(json.loads((folder / "splits.json").read_text())["train"][:20]):
        scan = read_scan(folder / "images" / f"{name}.nii.gz")
        truth = read_labels(folder / "labels" / f"{name}.nii.gz", scan=scan).array
        made = people_like_masks(truth, scan, structures, 10, np.random.default_rng(number))
        masks += [(mask, dice(mask.labels, truth, structures)) for mask in made]
    check_spread(masks)
