"""Errors that people make, implanted into an expert's label map: masks that are right but for a few isolated errors.

SegQC-Net learns from them what a person's mask is worth, the evaluation asks what it has learned, and an attention
check plants one. Sizes are in millimetres on the scan's own grid. Where slices are thick an error lies in one slice or
in a few neighbouring ones, as people draw there slice by slice; elsewhere it may have any direction.

How bad a mask gets is chosen first, as its true Dice, and each error is made as large as that asks. Drawing an error's
size instead would give masks of nearly one Dice, and both clean and broken masks would be strange to the network.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from segqc.quality.error_maps import bounding_box, padded_box
from segqc.types import BoolArray, FloatArray, LabelArray, Structure
from segqc.volumes import Box, Volume, through_plane_axis

ErrorKind: TypeAlias = Literal[
    "cut",
    "leak",
    "missing slices",
    "repeated slices",
    "shifted part",
    "over-smoothed",
    "boundary noise",
    "hole",
    "island",
    "swapped structures",
    "swapped sides",
    "wrong neighbour",
]
ERROR_KINDS: Final[tuple[ErrorKind, ...]] = get_args(ErrorKind)

UNTOUCHED_SHARE: Final = 1 / 6
"""Of the masks that are like people's, those that are exactly the truth."""
_GOOD_SHARE: Final = 0.5  # of the others: people's masks are mostly good, and there small differences count
_GOOD_DICE: Final = (0.85, 0.995)
_POOR_DICE: Final = (0.5, 0.85)
_MAX_ERRORS: Final = 3
_SIDES_SHARE: Final = 0.01  # sides are swapped rarely, and then nothing else is
_TOLERANCE: Final = 0.15  # of the Dice that is missing to 1; a mask further off is drawn again
_ATTEMPTS: Final = 5
_REDRAWS: Final = 6
_THICK_RATIO: Final = 2.0  # slices so much thicker than a pixel is wide are drawn one by one
_MAX_SHARE: Final = 0.8  # of a structure's size that one error takes; nobody overlooks a larger blob or hole than these
_MAX_SHARES: Final[Mapping[ErrorKind, float]] = MappingProxyType({"leak": 0.5, "hole": 0.3, "island": 0.2})
_MIN_SHARE: Final = 0.002
_SLICE_SHARE: Final = 0.4  # of a usual slice of the structure that a blob takes where slices are thick
_MIN_MARGIN_MM: Final = 8.0
_BETWEEN_STRUCTURES: Final = ("swapped structures", "swapped sides")
_GROWS: Final[Mapping[ErrorKind, int]] = MappingProxyType(
    {"cut": -1, "missing slices": -1, "hole": -1, "leak": 1, "island": 1}
)

_Point: TypeAlias = npt.NDArray[np.float64]
_Offset: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class ImplantedErrors:
    """A label map with errors.

    Attributes:
        labels: the label map, in the truth's shape and voxel order.
        kinds: what was implanted, in this order; empty where it is the truth.
    """

    labels: LabelArray
    kinds: tuple[ErrorKind, ...]


def people_like_masks(
    truth: LabelArray,
    scan: Volume,
    structures: Sequence[Structure],
    count: int,
    rng: np.random.Generator,
    *,
    kinds: Sequence[ErrorKind] = ERROR_KINDS,
) -> list[ImplantedErrors]:
    """Masks as people hand them in: about one in six is the truth, the others have one to three errors.

    The true Dice over all structures together lies between .5 and 1, and in three of five masks over .85.

    Args:
        truth: an expert's label map (n0, n1, n2) on the scan's grid.
        scan: the scan.
        structures: what the label map is of.
        count: how many masks.
        rng: the source of all draws.
        kinds: the errors to choose from; a kind that does not apply is left out.

    Raises:
        ValueError: if the truth is not on the scan's grid, or a kind is unknown.
    """
    masks = []
    for _ in range(count):
        if rng.random() < UNTOUCHED_SHARE:
            masks.append(ImplantedErrors(truth.copy(), ()))
        else:
            masks.append(implant_errors(truth, scan, structures, rng, kinds=kinds))
    return masks


def implant_errors(
    truth: LabelArray,
    scan: Volume,
    structures: Sequence[Structure],
    rng: np.random.Generator,
    *,
    kinds: Sequence[ErrorKind] = ERROR_KINDS,
    errors: int | None = None,
    target_dice: float | None = None,
) -> ImplantedErrors:
    """Implant errors into a label map.

    A kind that does not apply is left out: structures are swapped where there are two, slices are missed or repeated
    where there are several. An error that changes nothing is drawn again. A truth without any structure gets an island.
    Swapped sides are rare among other kinds, come alone, and are as bad as they are.

    Args:
        truth: an expert's label map (n0, n1, n2) on the scan's grid.
        scan: the scan; leaks, islands and wrong neighbours look for tissue like the structure's.
        structures: what the label map is of.
        rng: the source of all draws.
        kinds: the errors to choose from.
        errors: how many; None draws one to three, and rather more where one alone would not be as bad as asked.
        target_dice: the true Dice to come near, over all structures together; None draws it, as in
            `people_like_masks`.

    Returns:
        The label map with its errors; the truth without any, if none could be implanted.

    Raises:
        ValueError: if the truth is not on the scan's grid, a kind is unknown, or a number is out of its range.
    """
    if truth.shape != scan.shape:
        raise ValueError(f"the truth must be on the scan's grid {scan.shape}, got {truth.shape}")
    unknown = set(kinds) - set(ERROR_KINDS)
    if unknown:
        raise ValueError(f"unknown kinds of errors {sorted(unknown)}; there are {', '.join(ERROR_KINDS)}")
    if errors is not None and errors < 1:
        raise ValueError(f"errors must be 1 or more, got {errors}")
    if target_dice is not None and not 0 < target_dice < 1:
        raise ValueError(f"a target Dice must lie between 0 and 1, got {target_dice}")
    present = [structure for structure in structures if structure.mask(truth).any()]
    if not present:
        return _island_in_nothing(truth, scan, structures, kinds, rng)
    usable = _applicable(kinds, truth, scan, present)
    count = int(rng.integers(1, _MAX_ERRORS + 1)) if errors is None else errors
    target = _draw_dice(rng) if target_dice is None else target_dice
    best, best_miss = ImplantedErrors(truth.copy(), ()), math.inf
    for _ in range(_ATTEMPTS):
        drawn = _draw_kinds(usable, count, rng)
        window = _Window.of(truth, scan, present, symmetric="swapped sides" in drawn)
        found, dice = _attempt(window, present, drawn, _usual(usable), target, rng)
        if errors is None and found.kinds and dice - target > _TOLERANCE * (1 - target) and count < _MAX_ERRORS:
            count += 1  # so bad a mask has more errors
        miss = abs(dice - target)
        if found.kinds and miss < best_miss:
            best, best_miss = ImplantedErrors(window.put_back(truth, found.labels), found.kinds), miss
        if found.kinds and (miss <= _TOLERANCE * (1 - target) or found.kinds == ("swapped sides",)):
            break
    return best


# ------------------------------------------------------------------------------------------------------------- choices


def _applicable(
    kinds: Sequence[ErrorKind], truth: LabelArray, scan: Volume, present: Sequence[Structure]
) -> list[ErrorKind]:
    left_out: set[ErrorKind] = set()
    if len(present) < 2:
        left_out.add("swapped structures")
    if truth.shape[through_plane_axis(scan)] < 2:
        left_out |= {"missing slices", "repeated slices"}
    return [kind for kind in ERROR_KINDS if kind in kinds and kind not in left_out]


def _usual(kinds: Sequence[ErrorKind]) -> list[ErrorKind]:
    return [kind for kind in kinds if kind != "swapped sides"]


def _draw_kinds(usable: Sequence[ErrorKind], count: int, rng: np.random.Generator) -> list[ErrorKind]:
    others = _usual(usable)
    if len(others) < len(usable) and (not others or rng.random() < _SIDES_SHARE):
        return ["swapped sides"]
    if not others:
        return []
    return [others[i] for i in rng.choice(len(others), count, replace=count > len(others))]


def _draw_dice(rng: np.random.Generator) -> float:
    return float(rng.uniform(*(_GOOD_DICE if rng.random() < _GOOD_SHARE else _POOR_DICE)))


def _attempt(
    window: _Window,
    present: Sequence[Structure],
    kinds: Sequence[ErrorKind],
    instead: Sequence[ErrorKind],
    target: float,
    rng: np.random.Generator,
) -> tuple[ImplantedErrors, float]:
    """Implant errors one after the other in a window, each taking its share of what is missing to the target.

    Returns:
        The window's labels with what was implanted, and their true Dice over all structures.
    """
    labels = window.labels
    implanted: list[ErrorKind] = []
    shares = rng.dirichlet(np.full(len(kinds), 2.0))
    for number, wanted in enumerate(kinds):
        for kind in (wanted, *rng.permutation(np.array(instead, object))[:_REDRAWS]):
            counts = _Counts.of(labels, window.labels, present)
            sizes = counts.masks
            if not sizes.any():
                break
            missing = (1 - target) * counts.of_both - counts.wrong
            missing /= 1 - _GROWS.get(kind, 0) * (1 - target)  # what is added makes the mask larger, too
            missing *= shares[number] / shares[number:].sum()
            most = _MAX_SHARES.get(kind, _MAX_SHARE) * sizes
            weights = np.sqrt(sizes) * (most >= min(missing, most.max()))  # only a large structure holds a large error
            chosen = int(rng.choice(len(present), p=weights / weights.sum()))
            voxels = round(float(np.clip(missing, _MIN_SHARE * sizes[chosen], most[chosen])))
            others = tuple(s for s in present if not set(s.values) & set(present[chosen].values))
            box = _reach(present[chosen].mask(labels), window.spacing_mm, everywhere=kind in _BETWEEN_STRUCTURES)
            site = _Site(
                labels[box], window.image[box], window.spacing_mm, window.lateral_axis, present[chosen], others
            )
            changed = _IMPLANT[kind](site, max(1, voxels), rng)
            if changed is not None and not np.array_equal(changed, site.labels):
                labels = labels.copy()
                labels[box] = changed
                implanted.append(kind)
                break
    counts = _Counts.of(labels, window.labels, present)
    return ImplantedErrors(labels, tuple(implanted) if counts.wrong else ()), 1 - counts.wrong / counts.of_both


def _reach(mask: BoolArray, spacing_mm: Sequence[float], *, everywhere: bool = False) -> Box:
    """The box of a mask and of what errors of it may reach; the whole array for an empty one."""
    box = None if everywhere else bounding_box(mask)
    if box is None:
        return slice(0, mask.shape[0]), slice(0, mask.shape[1]), slice(0, mask.shape[2])
    radius_mm = _radius_mm(np.count_nonzero(mask[box]) * math.prod(spacing_mm))
    return padded_box(box, [math.ceil(max(_MIN_MARGIN_MM, radius_mm) / s) for s in spacing_mm], mask.shape)


@dataclass(frozen=True, slots=True, eq=False)
class _Counts:
    """Voxels of each structure in a label map and in the truth, and those wrong and in either, over all structures."""

    masks: npt.NDArray[np.int64]
    wrong: int
    of_both: int

    @classmethod
    def of(cls, labels: LabelArray, truth: LabelArray, structures: Sequence[Structure]) -> _Counts:
        pairs = np.bincount((truth.astype(np.intp) << 8 | labels).ravel(), minlength=1 << 16).reshape(256, 256)
        values = [list(structure.values) for structure in structures]
        masks = np.array([pairs[:, v].sum() for v in values])
        of_both = int(masks.sum() + sum(pairs[v].sum() for v in values))
        return cls(masks, of_both - 2 * int(sum(pairs[np.ix_(v, v)].sum() for v in values)), of_both)


def _island_in_nothing(
    truth: LabelArray,
    scan: Volume,
    structures: Sequence[Structure],
    kinds: Sequence[ErrorKind],
    rng: np.random.Generator,
) -> ImplantedErrors:
    if "island" not in kinds or not structures:
        return ImplantedErrors(truth.copy(), ())
    window = _Window.of(truth, scan, (), symmetric=False)
    structure = structures[int(rng.integers(len(structures)))]
    site = _Site(window.labels, window.image, window.spacing_mm, window.lateral_axis, structure, ())
    radius_mm = rng.uniform(2.0, 8.0)
    labels = _island(site, max(1, round(4 / 3 * math.pi * radius_mm**3 / site.voxel_mm3)), rng)
    if labels is None:
        return ImplantedErrors(truth.copy(), ())
    return ImplantedErrors(window.put_back(truth, labels), ("island",))


# --------------------------------------------------------------------------------------------------------- where it is


@dataclass(frozen=True, slots=True, eq=False)
class _Window:
    """A part of a scan around its structures, slices first.

    Attributes:
        labels, image: (slices, rows, columns).
        spacing_mm: of these axes.
        lateral_axis: the one of them that runs most from left to right.
        box: the part, in the scan's axes.
        axis: the scan's through-plane axis.
    """

    labels: LabelArray
    image: FloatArray
    spacing_mm: tuple[float, float, float]
    lateral_axis: int
    box: Box
    axis: int

    @classmethod
    def of(cls, truth: LabelArray, scan: Volume, structures: Sequence[Structure], *, symmetric: bool) -> _Window:
        """The part around the structures, as far as an error may reach; the whole scan without any.

        A symmetric one is its own mirror image in the scan's left-right middle.
        """
        axis = through_plane_axis(scan)
        order = (axis, *(a for a in range(3) if a != axis))
        directions = np.abs(scan.affine[0, :3]) / scan.spacing_mm
        lateral = int(np.argmax(directions))
        anything = np.zeros(truth.shape, bool)
        for structure in structures:
            anything |= structure.mask(truth)
        box = _reach(anything, scan.spacing_mm)
        if symmetric:
            n = truth.shape[lateral]
            start = min(box[lateral].start, n - box[lateral].stop)
            first, second, third = (slice(start, n - start) if a == lateral else box[a] for a in range(3))
            box = (first, second, third)
        s0, s1, s2 = (scan.spacing_mm[a] for a in order)
        return cls(
            np.ascontiguousarray(truth[box].transpose(order)),
            np.ascontiguousarray(scan.array[box].transpose(order), np.float32),
            (s0, s1, s2),
            order.index(lateral),
            box,
            axis,
        )

    def put_back(self, truth: LabelArray, labels: LabelArray) -> LabelArray:
        """The truth with the window's labels in their place."""
        result = truth.copy()
        result[self.box] = np.moveaxis(labels, 0, self.axis)
        return result


@dataclass(frozen=True, eq=False)
class _Site:
    """What an error is implanted into: a structure of a label map (slices, rows, columns), and the others there."""

    labels: LabelArray
    image: FloatArray
    spacing_mm: tuple[float, float, float]
    lateral_axis: int
    structure: Structure
    others: tuple[Structure, ...]

    @functools.cached_property
    def mask(self) -> BoolArray:
        return self.structure.mask(self.labels)

    @functools.cached_property
    def areas(self) -> npt.NDArray[np.int64]:
        """The structure's voxels in each slice."""
        return np.asarray(np.count_nonzero(self.mask, axis=(1, 2)), np.int64)

    @property
    def voxel_mm3(self) -> float:
        return math.prod(self.spacing_mm)

    @property
    def is_thick(self) -> bool:
        return self.spacing_mm[0] >= _THICK_RATIO * max(self.spacing_mm[1:])

    @property
    def radius_mm(self) -> float:
        """The radius of the disk that is as large as the structure is on average in its slices."""
        areas = self.areas[self.areas > 0]
        return math.sqrt(float(areas.mean()) * self.spacing_mm[1] * self.spacing_mm[2] / math.pi)

    @functools.cached_property
    def smooth(self) -> FloatArray:
        """The scan without the finest noise."""
        return _smoothed(self.image, self, 0.7)

    @functools.cached_property
    def contrast(self) -> float:
        """The scan's standard deviation around the structure."""
        return max(float(self.smooth.std()), 1e-6)

    @functools.cached_property
    def unlike(self) -> FloatArray:
        """How far the scan is from the structure's median, in standard deviations."""
        usual = np.median(self.smooth[self.mask]) if self.mask.any() else np.median(self.smooth)
        return np.asarray(np.abs(self.smooth - usual) / self.contrast, np.float32)

    @functools.cached_property
    def neighbourhood(self) -> BoolArray:
        """What touches a voxel: in its slice where slices are thick, else all around."""
        touching = ndimage.generate_binary_structure(3, 1)
        if self.is_thick:
            touching[[0, 2]] = False
        return np.asarray(touching, bool)

    def in_touch(self, mask: BoolArray, old: BoolArray) -> BoolArray:
        """The connected parts of a mask that meet an old one."""
        parts, count = ndimage.label(mask, self.neighbourhood)
        meets = np.zeros(count + 1, bool)
        meets[parts[mask & old]] = True
        return np.asarray(meets[parts], bool)

    def distance_mm(self, point: _Point) -> FloatArray:
        """The distance of all voxels from one (an index)."""
        z, r, c = (
            ((np.arange(n) - at) * s) ** 2 for n, at, s in zip(self.mask.shape, point, self.spacing_mm, strict=True)
        )
        return np.asarray(np.sqrt(z[:, None, None] + r[:, None] + c), np.float32)

    def along_mm(self, direction: _Point) -> FloatArray:
        """How far all voxels lie along a direction."""
        z, r, c = (np.arange(n) * s * d for n, s, d in zip(self.mask.shape, self.spacing_mm, direction, strict=True))
        return np.asarray(z[:, None, None] + r[:, None] + c, np.float32)

    def without(self, where: BoolArray) -> LabelArray:
        """The label map with background somewhere."""
        labels = self.labels.copy()
        labels[where] = 0
        return labels

    def around(self, margin_mm: float) -> Box:
        """The box of the structure, and so much more on all sides."""
        box = bounding_box(self.mask)
        assert box is not None  # a structure that is not there gets no such error
        return padded_box(box, [math.ceil(margin_mm / s) for s in self.spacing_mm], self.mask.shape)

    def redrawn_in(self, box: Box, mask: BoolArray) -> LabelArray:
        """The label map with another mask of the structure in a box that holds it all.

        A new voxel gets the value of the structure's nearest one; one that is left, of the nearest outside.
        """
        labels, old = self.labels[box], self.mask[box]
        changed = labels.copy()
        added, left = mask & ~old, old & ~mask
        changed[added] = (
            self.structure.values[0] if len(self.structure.values) == 1 else self._nearest(labels, ~old)[added]
        )
        changed[left] = 0
        inside = bounding_box(old)
        if inside is not None and left.any() and np.any(labels[~old]):
            near = padded_box(inside, (1, 1, 1), old.shape)  # nothing outside is nearer than this rim
            changed[near][left[near]] = self._nearest(labels[near], old[near])[left[near]]
        result = self.labels.copy()
        result[box] = changed
        return result

    def _nearest(self, labels: LabelArray, where: BoolArray) -> LabelArray:
        at = ndimage.distance_transform_edt(where, self.spacing_mm, return_distances=False, return_indices=True)
        nearest: LabelArray = labels[tuple(at)]
        return nearest

    def with_part_moved(self, part: BoolArray, offset: _Offset) -> LabelArray:
        """The label map with a part of the structure elsewhere; what it leaves is background."""
        moved = _moved(np.where(part, self.labels, 0), offset)
        labels = self.without(part)
        labels[moved > 0] = moved[moved > 0]
        return labels


# --------------------------------------------------------------------------------------------------------------- kinds


def _cut(site: _Site, wrong: int, rng: np.random.Generator) -> LabelArray | None:
    """What lies beyond a plane, or in a ball at the contour, is missing."""
    where = site.mask & _neighbouring_slices(site, round(wrong / rng.uniform(0.35, 0.85)), rng)
    if rng.random() < 0.5:
        score = site.along_mm(_direction(site, rng))
    else:
        contour = where & ~ndimage.binary_erosion(site.mask, site.neighbourhood)
        score = site.distance_mm(_any_of(contour if contour.any() else where, rng))
    return site.without(_lowest(score, where, wrong))


def _leak(site: _Site, wrong: int, rng: np.random.Generator) -> LabelArray | None:
    """The mask runs over its contour where the scan shows little of an edge, into tissue of that intensity."""
    rim = ndimage.binary_dilation(site.mask, site.neighbourhood) & (site.labels == 0)
    if not rim.any():
        return None
    seed = _any_of(rim, rng, site.unlike)
    at = (int(seed[0]), int(seed[1]), int(seed[2]))
    free = (site.labels == 0) & _slices_around(site, at[0], wrong, rng)
    distance = site.distance_mm(seed)
    # of the nearest that are three times as many: it follows tissue, but does not run along it through the whole scan
    free &= _lowest(distance, free, 3 * wrong)
    tissue = _smoothed(site.image, site, 1.5)
    score = 2 * distance / max(float(distance[free].max()), 1e-6) + np.abs(tissue - tissue[at]) / site.contrast
    grown = site.mask | _lowest(score, free, wrong)
    leaked = site.mask | (free & (_smoothed(grown, site, 1.0) > 0.5))
    return site.redrawn_in((slice(None), slice(None), slice(None)), site.in_touch(leaked, site.mask))


def _missing_slices(site: _Site, wrong: int, rng: np.random.Generator) -> LabelArray | None:
    """Neighbouring slices are empty; some are left."""
    filled = np.count_nonzero(site.areas)
    return None if filled < 2 else site.without(site.mask & _run_of_slices(site, wrong, filled - 1, rng))


def _repeated_slices(site: _Site, wrong: int, rng: np.random.Generator) -> LabelArray | None:
    """A slice's contour is copied over the next ones, beyond the structure's end, too."""
    furthest = int(np.clip(round(12.0 / site.spacing_mm[0]), 2, 8))
    repeats: list[tuple[int, list[int]]] = []
    differing: list[int] = []
    for source, step in itertools.product(np.flatnonzero(site.areas).tolist(), (-1, 1)):
        total, over = 0, []
        for index in range(source + step, source + step * (furthest + 1), step):
            if not 0 <= index < len(site.areas):
                break
            total += np.count_nonzero(site.mask[index] != site.mask[source])
            over.append(index)
            repeats.append((source, over.copy()))
            differing.append(total)
    if not any(differing):
        return None
    source, over = repeats[_near(differing, wrong, rng)]
    labels = site.without(site.mask & _in_slices(site, np.array(over)))
    labels[over] = np.where(site.mask[source], site.labels[source], labels[over])
    return labels


def _shifted_part(site: _Site, wrong: int, rng: np.random.Generator) -> LabelArray | None:
    """Neighbouring slices, or what lies beyond a plane, are moved in their plane."""
    part = _part(site, round(wrong * rng.uniform(0.8, 2.0)), rng)
    angle = rng.uniform(0, 2 * math.pi)
    step_mm, longest_mm = min(site.spacing_mm[1:]), max(1.2 * site.radius_mm, min(site.spacing_mm[1:]))
    lengths = np.arange(step_mm, longest_mm + step_mm, max(step_mm, longest_mm / 16))
    offsets = list(dict.fromkeys(_in_plane_offset(site, angle, float(length)) for length in lengths))
    changed = [_wrong_when_moved(site, part, offset) for offset in offsets]
    return site.with_part_moved(part, offsets[int(np.argmin(np.abs(np.array(changed) - wrong)))])


def _over_smoothed(site: _Site, wrong: int, rng: np.random.Generator) -> LabelArray | None:
    """The contour has lost its corners, as if drawn in a hurry; no slice gets larger or smaller."""
    box = site.around(0.6 * site.radius_mm)
    inside = site.mask[box]
    free = inside | (site.labels[box] == 0)
    best, best_miss = inside, math.inf
    for sigma_mm in site.radius_mm * np.array([0.15, 0.25, 0.4, 0.6]) * rng.uniform(0.8, 1.2):
        sigma = [0.0 if site.is_thick and a == 0 else sigma_mm / s for a, s in enumerate(site.spacing_mm)]
        smooth = ndimage.gaussian_filter(inside.astype(np.float32), sigma, truncate=2.5)
        triples = zip(smooth, free, inside, strict=True)
        drawn = np.stack([_lowest(-v, (v > 0) & may, np.count_nonzero(old)) for v, may, old in triples])
        miss = abs(np.count_nonzero(drawn != inside) - wrong)
        if miss < best_miss:
            best, best_miss = drawn, miss
    return site.redrawn_in(box, best)


def _boundary_noise(site: _Site, wrong: int, rng: np.random.Generator) -> LabelArray | None:
    """The contour is displaced, by waves between two voxels and the structure's size; partly all of it in or out."""
    box = site.around(0.6 * site.radius_mm)
    inside = site.mask[box]
    edt = ndimage.distance_transform_edt
    depth = np.asarray(edt(inside, site.spacing_mm) - edt(~inside, site.spacing_mm), np.float32)
    shortest_mm = 2 * max(site.spacing_mm[1:])
    length_mm = shortest_mm * max(site.radius_mm / shortest_mm, 1.5) ** rng.random()
    waves = _waves(site, inside.shape, length_mm, rng) + np.float32(rng.normal(0, 0.6))
    # A voxel changes sides when the displacement, amplitude x waves, has passed its distance from the contour.
    near = (depth * waves > 0) & (np.abs(depth) <= max(0.4 * length_mm, shortest_mm / 2))
    amplitude = np.where(near, depth, np.inf) / np.where(near, waves, 1.0)
    change = _lowest(amplitude, near, wrong)
    drawn = _smoothed(inside ^ change, site, length_mm / (3 * shortest_mm)) > 0.5  # without spikes between the waves
    return site.redrawn_in(box, site.in_touch(drawn, inside))


def _hole(site: _Site, wrong: int, rng: np.random.Generator) -> LabelArray | None:
    """Something inside is missing, and the contour stays."""
    inside = ndimage.binary_erosion(site.mask, site.neighbourhood)
    if not inside.any():
        return None
    deep = ndimage.binary_erosion(inside, site.neighbourhood, iterations=2)
    centre = _any_of(deep if deep.any() else inside, rng)
    inside &= _slices_around(site, int(centre[0]), wrong, rng)
    count = min(wrong, math.ceil(0.7 * np.count_nonzero(inside)))
    return site.without(_lowest(_blob(site, centre, rng), inside, count))


def _island(site: _Site, wrong: int, rng: np.random.Generator) -> LabelArray | None:
    """A blob of the structure's value near it, preferably where the scan looks like it."""
    everywhere = np.ones((3, 3, 3), bool)
    where = (site.labels == 0) & ~ndimage.binary_dilation(site.mask, everywhere, iterations=2)
    if not where.any():
        return None
    centre = _any_of(where, rng, site.unlike)
    slices = _slices_around(site, int(centre[0]), wrong, rng)
    blob = _blob(site, centre, rng)
    blocked = slices & ~where
    where &= slices
    if blocked.any():
        where &= blob < 2 * blob[blocked].min()  # so that it does not lie around the structure
    labels = site.labels.copy()
    values = site.structure.values
    labels[_lowest(blob, where, wrong)] = values[int(rng.integers(len(values)))]
    return labels


def _swapped_structures(site: _Site, wrong: int, rng: np.random.Generator) -> LabelArray | None:
    """The values of two structures are exchanged where they touch, or in some slices."""
    masks = {other: other.mask(site.labels) for other in site.others}
    found = [other for other, mask in masks.items() if mask.any()]
    if not found:
        return None
    around = ndimage.binary_dilation(site.mask, np.ones((3, 3, 3), bool))
    touching = [other for other in found if np.any(around & masks[other])]
    other = (touching or found)[int(rng.integers(len(touching or found)))]
    where = site.mask | masks[other]
    if touching and rng.random() < 0.5:
        score = site.distance_mm(_any_of(around & masks[other], rng))
    else:
        where &= _neighbouring_slices(site, wrong, rng)
        score = site.along_mm(_direction(site, rng))
    # a voxel that is exchanged is wrong in both structures
    return _exchanged(site, other, _lowest(score, where, math.ceil(wrong / 2)))


def _swapped_sides(site: _Site, wrong: int, rng: np.random.Generator) -> LabelArray | None:
    """The names of a left and a right structure are exchanged; without such a pair the label map is mirrored."""
    for other in site.others:
        mask = other.mask(site.labels)
        if not mask.any():
            continue
        apart_mm = np.abs((_centre(mask) - _centre(site.mask)) * site.spacing_mm)
        if int(np.argmax(apart_mm)) == site.lateral_axis and 2 / 3 < mask.sum() / site.mask.sum() < 3 / 2:
            return _exchanged(site, other, np.ones_like(mask))
    return np.ascontiguousarray(np.flip(site.labels, site.lateral_axis))


def _wrong_neighbour(site: _Site, wrong: int, rng: np.random.Generator) -> LabelArray | None:
    """A part lies on the tissue beside it that is most like it."""
    part = _part(site, math.ceil(wrong / 2), rng)  # wrong where it was and where it is
    slices = np.count_nonzero(part.any(axis=(1, 2)))
    area_mm2 = np.count_nonzero(part) / slices * site.spacing_mm[1] * site.spacing_mm[2]
    diameter_mm = 2 * math.sqrt(area_mm2 / math.pi)
    turn = rng.uniform(0, 2 * math.pi)
    voxels = np.argwhere(part)
    best, best_unlike = None, math.inf
    for angle, length in itertools.product(turn + np.arange(12) * math.pi / 6, (1.0, 1.4)):
        offset = _in_plane_offset(site, float(angle), length * diameter_mm)
        at = voxels + offset
        inside = ((at >= 0) & (at < site.mask.shape)).all(axis=1)
        z, r, c = at[inside].T
        if inside.mean() < 0.9 or site.mask[z, r, c].mean() > 0.3:
            continue
        unlike = float(site.unlike[z, r, c].mean())
        if unlike < best_unlike:
            best, best_unlike = offset, unlike
    return None if best is None else site.with_part_moved(part, best)


_IMPLANT: Final[Mapping[ErrorKind, Callable[[_Site, int, np.random.Generator], LabelArray | None]]] = MappingProxyType(
    {
        "cut": _cut,
        "leak": _leak,
        "missing slices": _missing_slices,
        "repeated slices": _repeated_slices,
        "shifted part": _shifted_part,
        "over-smoothed": _over_smoothed,
        "boundary noise": _boundary_noise,
        "hole": _hole,
        "island": _island,
        "swapped structures": _swapped_structures,
        "swapped sides": _swapped_sides,
        "wrong neighbour": _wrong_neighbour,
    }
)


# --------------------------------------------------------------------------------------------------------------- draws


def _radius_mm(volume_mm3: float) -> float:
    """The radius of a ball of a volume."""
    return math.cbrt(volume_mm3 * 3 / (4 * math.pi))


def _lowest(score: FloatArray, where: BoolArray, count: int) -> BoolArray:
    """The voxels of the lowest scores among some, at most so many."""
    candidates = np.flatnonzero(where)
    count = min(count, candidates.size)
    lowest = np.zeros(where.shape, bool)
    if count:
        order = np.argpartition(score.ravel()[candidates], count - 1)[:count]
        lowest.ravel()[candidates[order]] = True
    return lowest


def _near(values: Sequence[int] | npt.NDArray[np.int64], wanted: int, rng: np.random.Generator) -> int:
    """The index of one of the values near the wanted one, within a third of it; else of the nearest."""
    miss = np.abs(np.array(values) - wanted).astype(np.float64)
    miss[np.array(values) == 0] = np.inf
    return int(rng.choice(np.flatnonzero(miss <= max(float(miss.min()), wanted / 3))))


def _any_of(where: BoolArray, rng: np.random.Generator, unlike: FloatArray | None = None) -> _Point:
    """The index of one of some voxels; rather of one that is like the structure."""
    candidates = np.flatnonzero(where)
    if unlike is None:
        drawn = rng.choice(candidates)
    else:
        weights = np.exp(-4.0 * unlike.ravel()[candidates].astype(np.float64))
        total = np.cumsum(weights + 1e-12)
        drawn = candidates[min(int(np.searchsorted(total, rng.random() * total[-1])), candidates.size - 1)]
    return np.array(np.unravel_index(int(drawn), where.shape), np.float64)


def _direction(site: _Site, rng: np.random.Generator) -> _Point:
    """A direction in mm; in the slices where they are thick."""
    direction = rng.standard_normal(3)
    if site.is_thick:
        direction[0] = 0.0
    return direction / np.linalg.norm(direction)


def _in_slices(site: _Site, slices: npt.NDArray[np.int64]) -> BoolArray:
    """Some slices, (slices, 1, 1)."""
    result = np.zeros((len(site.areas), 1, 1), bool)
    result[slices] = True
    return result


def _run_of_slices(site: _Site, voxels: int, most: int, rng: np.random.Generator) -> BoolArray:
    """Neighbouring slices, at most so many, that hold about so many voxels of the structure, (slices, 1, 1)."""
    filled = np.flatnonzero(site.areas)
    until = np.concatenate([[0], np.cumsum(site.areas[filled])])
    first, last = np.triu_indices(until.size, 1)
    short = last - first <= most
    first, last = first[short], last[short]
    run = _near(until[last] - until[first], voxels, rng)
    return _in_slices(site, filled[first[run] : last[run]])


def _neighbouring_slices(site: _Site, voxels: int, rng: np.random.Generator) -> BoolArray:
    """Neighbouring slices that hold so many voxels of the structure, (slices, 1, 1); often all where they are thin."""
    filled = np.flatnonzero(site.areas)
    first = last = int(rng.integers(filled.size))
    if not site.is_thick and rng.random() < 0.5:
        first, last = 0, filled.size - 1
    while site.areas[filled[first : last + 1]].sum() < voxels and last - first + 1 < filled.size:
        if first > 0 and (last == filled.size - 1 or rng.random() < 0.5):
            first -= 1
        else:
            last += 1
    return _in_slices(site, filled[first : last + 1])


def _slices_around(site: _Site, index: int, voxels: int, rng: np.random.Generator) -> BoolArray:
    """The slices that a blob of so many voxels around one of them lies in: one or a few where they are thick."""
    if not site.is_thick:
        return np.ones((len(site.areas), 1, 1), bool)
    usual = float(site.areas[site.areas > 0].mean()) if site.areas.any() else float(voxels)
    count = int(rng.integers(1, 3)) + int(voxels / (_SLICE_SHARE * usual))
    start = index - int(rng.integers(count))
    return _in_slices(site, np.arange(max(start, 0), min(start + count, len(site.areas))))


def _part(site: _Site, voxels: int, rng: np.random.Generator) -> BoolArray:
    """About so many voxels of the structure: neighbouring slices of it, or what lies beyond a plane in its slices."""
    voxels = min(voxels, math.ceil(_MAX_SHARE * int(site.areas.sum())))
    if rng.random() < 0.7:
        return site.mask & _run_of_slices(site, voxels, np.count_nonzero(site.areas), rng)
    where = site.mask & _neighbouring_slices(site, voxels, rng)
    return _lowest(site.along_mm(_direction(site, rng)), where, voxels)


def _in_plane_offset(site: _Site, angle: float, length_mm: float) -> _Offset:
    _, rows, columns = site.spacing_mm
    return 0, round(length_mm * math.cos(angle) / rows), round(length_mm * math.sin(angle) / columns)


def _moved(array: LabelArray, offset: _Offset) -> LabelArray:
    """An array moved by some voxels; what comes in is zero."""
    moved = np.zeros_like(array)
    pairs = list(zip(offset, array.shape, strict=True))
    if all(abs(o) < n for o, n in pairs):
        target = tuple(slice(max(o, 0), n + min(o, 0)) for o, n in pairs)
        source = tuple(slice(max(-o, 0), n + min(-o, 0)) for o, n in pairs)
        moved[target] = array[source]
    return moved


def _wrong_when_moved(site: _Site, part: BoolArray, offset: _Offset) -> int:
    moved = _moved(part.view(np.uint8), offset).view(np.bool_)
    return int(np.count_nonzero(part & ~moved) + np.count_nonzero(moved & ~site.mask))


def _smoothed(values: FloatArray | BoolArray, site: _Site, sigma: float) -> FloatArray:
    """Values smoothed in their slices, by a standard deviation in voxels."""
    sigmas = [0.0, *(sigma * max(site.spacing_mm[1:]) / s for s in site.spacing_mm[1:])]
    return np.asarray(ndimage.gaussian_filter(values.astype(np.float32), sigmas, truncate=2.0), np.float32)


def _waves(site: _Site, shape: tuple[int, ...], length_mm: float, rng: np.random.Generator) -> FloatArray:
    """A smooth random field of mean 0 and deviation 1 about; in thick slices each has its own."""
    nodes = [
        n if s >= length_mm or (site.is_thick and a == 0) else min(n, math.ceil((n - 1) * s / length_mm) + 2)
        for a, (n, s) in enumerate(zip(shape, site.spacing_mm, strict=True))
    ]
    drawn = rng.standard_normal(nodes, dtype=np.float32)
    field = ndimage.zoom(drawn, [n / k for n, k in zip(shape, nodes, strict=True)], order=1)
    return np.asarray(field / max(float(field.std()), 1e-6), np.float32)


def _blob(site: _Site, centre: _Point, rng: np.random.Generator) -> FloatArray:
    """The squared distance from a centre, in another measure along each axis, so that what is near is no ball."""
    stretched = site.spacing_mm * np.exp(rng.uniform(-0.35, 0.35, 3))
    z, r, c = (((np.arange(n) - at) * s) ** 2 for n, at, s in zip(site.mask.shape, centre, stretched, strict=True))
    return np.asarray(z[:, None, None] + r[:, None] + c, np.float32)


def _centre(mask: BoolArray) -> _Point:
    return np.asarray(np.argwhere(mask).mean(axis=0), np.float64)


def _exchanged(site: _Site, other: Structure, where: BoolArray) -> LabelArray:
    labels = site.labels.copy()
    labels[where & site.mask] = other.values[0]
    labels[where & other.mask(site.labels)] = site.structure.values[0]
    return labels
