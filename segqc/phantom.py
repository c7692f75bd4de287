"""Fetal-MRI-like phantoms: thick-slice scans of a uterus with placenta, fetal body and brain, and their true labels.

No patient data can be shipped with the project; these scans stand in for it. They copy what makes fetal MRI hard to
segment: thick slices and partial volume, a fetus that moves between interleaved slices, signal dropouts, a bias field,
Rician noise, a contrast that changes from scan to scan, and a placenta that may be thin or as bright as the uterine
wall. The anatomy is analytic (ellipsoids and tapered capsules joined smoothly, in millimetres), is sampled finer than
the voxel grid and averaged down. Labels follow each slice's motion, as an annotator's contours do.

Every number is a function of ``(seed, difficulty)``; the anatomy depends on the seed alone (but for the placenta's
thickness), so that the same fetus can be scanned well and badly.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from segqc.types import FloatArray, LabelArray
from segqc.volumes import Volume, atomic_write, write_labels, write_scan

PLACENTA, BODY, BRAIN = 1, 2, 3

_PIXELS = 128
_SPACING_MM = (1.2, 1.2, 4.0)
_IN_PLANE_SAMPLES = 2
_THROUGH_PLANE_SAMPLES = 3
# Independent streams: a draw added to one leaves what the others yield as it was.
_ANATOMY, _CONTRAST, _MOTION, _ACQUISITION, _SEVERITY, _PLAN = range(6)

Vector: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Severity:
    """How strongly each thing that makes a scan hard is present, 0 (not at all) to 1."""

    placenta_contrast: float
    placenta_thinness: float
    motion: float
    dropout: float
    noise: float

    def reasons(self) -> tuple[str, ...]:
        """Return the names of what is at least half present, strongest first."""
        amounts = {field.name: float(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return tuple(name for name in sorted(amounts, key=lambda name: -amounts[name]) if amounts[name] >= 0.5)


@dataclass(frozen=True)
class Phantom:
    """A drawn scan, its true labels, and what was done to it.

    ``scan`` is int16, ``labels`` uint8 (0 background, 1 placenta, 2 body without brain, 3 brain), both of shape
    (128, 128, slices) with the slices last. ``displacement_mm`` (slices, 3) is each slice's shift of the fetus in the
    scan's axes; ``dropout_slices`` are the slices with lost signal; ``placenta_contrast`` is the difference between
    placenta and uterine wall in units of the noise's standard deviation.
    """

    scan: Volume
    labels: Volume
    seed: int
    difficulty: float
    severity: Severity
    displacement_mm: FloatArray
    dropout_slices: tuple[int, ...]
    placenta_contrast: float
    placenta_thickness_mm: float


@dataclass(frozen=True)
class _Palette:
    """Signal of each tissue, in arbitrary units of about 0 to 230."""

    fat: float
    muscle: float
    bowel: float
    vertebra: float
    disc: float
    csf: float
    myometrium: float
    fluid: float
    placenta: float
    cord: float
    soft: float
    lung: float
    liver: float
    heart: float
    bone: float
    cortex: float
    white: float
    grey: float


# T2-weighted half-Fourier single shot: dark flow and muscle, very bright fluid. Balanced steady state: bright blood.
_HASTE = _Palette(165, 45, 95, 75, 40, 205, 85, 225, 142, 110, 90, 160, 62, 35, 34, 98, 150, 116)
_TRUFI = _Palette(215, 70, 120, 95, 70, 215, 108, 205, 158, 165, 122, 148, 100, 185, 46, 116, 146, 130)


@dataclass(frozen=True)
class _Waves:
    """A smooth random field: the sum of a few plane waves, of unit variance."""

    vectors: FloatArray
    phases: FloatArray

    @classmethod
    def draw(cls, rng: np.random.Generator, count: int, wavelength_mm: tuple[float, float]) -> _Waves:
        directions = rng.normal(size=(count, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        frequency = 2 * np.pi / rng.uniform(*wavelength_mm, size=(count, 1))
        return cls((directions * frequency).astype(np.float32), rng.uniform(0, 2 * np.pi, count).astype(np.float32))

    def __call__(self, points: FloatArray) -> FloatArray:
        total = np.zeros(points.shape[1:], np.float32)
        for (a, b, c), phase in zip(self.vectors, self.phases, strict=True):
            total += np.cos(a * points[0] + b * points[1] + c * points[2] + phase)
        return total * np.float32(np.sqrt(2 / len(self.phases)))


@dataclass(frozen=True)
class _Capsule:
    """A limb: a segment with a radius that changes linearly along it."""

    start: tuple[float, float, float]
    stop: tuple[float, float, float]
    radii: tuple[float, float]


@dataclass(frozen=True)
class _Anatomy:
    """One pregnancy. Lengths in mm; stack frame: x posterior, y superior, z left, origin at the stack's centre."""

    uterus_centre: Vector
    uterus_semi: Vector
    uterus_shape: _Waves
    wall_mm: float
    skin_x: float
    spine_x: float
    spine_phase: float
    bladder_semi: Vector
    placenta_direction: Vector
    placenta_angle: float
    placenta_mm: float
    lobules: _Waves
    texture: _Waves
    fine_texture: _Waves
    fetus_centre: Vector
    fetus_axes: Vector  # (3, 3): rows are the fetus' ventral, cranial and left directions
    fetus_scale: float
    flexion: float
    limbs: tuple[_Capsule, ...]
    gyri: _Waves
    cord: Vector  # (points, 3): a curve in the stack frame


@dataclass(frozen=True)
class _Motion:
    """Per slice, in the stack frame: the mother's shift, and the fetus' shift and rotation vector on top of it."""

    mother_mm: Vector
    fetus_mm: Vector
    fetus_rotation: Vector


def draw_phantom(seed: int, difficulty: float) -> Phantom:
    """Draw one scan of 128 x 128 x 20 to 24 voxels of 1.2 x 1.2 x 4 mm, and its labels.

    Args:
        seed: Decides the anatomy, the contrast, and the random part of everything else; not negative.
        difficulty: 0 (a good scan) to 1 (a bad one): how low the placenta's contrast and how thin it may be, how much
            the fetus moves, how many slices lose signal, how strong the noise is.

    Raises:
        ValueError: if the difficulty is outside 0 to 1.
    """
    if not 0 <= difficulty <= 1:
        raise ValueError(f"The phantom's difficulty must be between 0 and 1, not {difficulty}.")
    severity = _draw_severity(np.random.default_rng((seed, _SEVERITY)), difficulty)
    rng = np.random.default_rng((seed, _ANATOMY))
    slices = int(rng.integers(20, 25))
    affine = _draw_affine(rng, slices)
    anatomy = _draw_anatomy(rng, severity)
    palette = _draw_palette(np.random.default_rng((seed, _CONTRAST)), severity)
    motion = _draw_motion(np.random.default_rng((seed, _MOTION)), slices, severity)
    rendered = [_render_slice(index, slices, anatomy, palette, motion) for index in range(slices)]
    signal = np.stack([image for image, _ in rendered], axis=-1)
    labels = np.stack([label for _, label in rendered], axis=-1)
    noise = 4.0 + 8.0 * severity.noise
    array, dropouts = _acquire(np.random.default_rng((seed, _ACQUISITION)), signal, severity, noise)
    return Phantom(
        scan=Volume(array=array, affine=affine, acquisition_axis=2),
        labels=Volume(array=labels, affine=affine, acquisition_axis=2),
        seed=seed,
        difficulty=difficulty,
        severity=severity,
        displacement_mm=(motion.mother_mm + motion.fetus_mm).astype(np.float32),
        dropout_slices=dropouts,
        placenta_contrast=abs(palette.placenta - palette.myometrium) / noise,
        placenta_thickness_mm=anatomy.placenta_mm,
    )


def write_datastore(folder: Path, *, scans: int = 24, labelled: int = 8, seed: int = 0) -> None:
    """Write a dataset folder of phantoms, easy ones and hard ones mixed.

    Scans lie in the folder itself, the final labels of ``labelled`` of them in ``labels/final``, the truth of the
    others in ``truth``: MONAI Label's datastore lists the files of the folder and of each ``labels/<tag>``, not deeper
    and nothing else, so the server never sees the truth. ``truth/phantoms.csv`` says how each scan was drawn.

    Args:
        folder: Made where it is missing; files of the same names are replaced.
        scans: Number of scans.
        labelled: How many of them get final labels, spread evenly over the difficulties.
        seed: Decides everything; the same numbers give the same files, byte for byte, with the same library versions.

    Raises:
        ValueError: if there are no scans, or more labelled scans than scans.
    """
    if scans < 1 or not 0 <= labelled <= scans:
        raise ValueError(f"Cannot label {labelled} of {scans} scans: give at least one scan, and no more labels.")
    ranks = np.random.default_rng((seed, _PLAN)).permutation(scans)
    easy_to_hard = np.linspace(0, 1, scans)
    final_ranks = set(np.floor((np.arange(labelled) + 0.5) * scans / max(labelled, 1)).astype(int).tolist())
    rows = []
    for index, rank in enumerate(ranks.tolist()):
        name = f"fetus_{index + 1:03d}"
        phantom = draw_phantom(seed * 10_000 + index, float(easy_to_hard[rank]))
        final = rank in final_ranks
        write_scan(phantom.scan, folder / f"{name}.nii.gz")
        write_labels(phantom.labels, folder / ("labels/final" if final else "truth") / f"{name}.nii.gz")
        rows.append(_describe(name, phantom, final))
    _write_table(rows, folder / "truth" / "phantoms.csv")
    _write_text(_SETTINGS, folder / "segqc.toml")
    _write_text(_README.format(scans=scans, labelled=labelled, seed=seed), folder / "README.md")


# --- what is drawn --------------------------------------------------------------------------------------------------


def _draw_severity(rng: np.random.Generator, difficulty: float) -> Severity:
    # Two causes are always at full strength, so that hard scans are hard for different reasons.
    weights = rng.uniform(0.15, 0.6, size=5)
    weights[rng.permutation(5)[:2]] = 1.0
    return Severity(*(float(difficulty * weight) for weight in weights))


def _draw_affine(rng: np.random.Generator, slices: int) -> Vector:
    """Return a sagittal stack's affine: i to posterior, j to superior, k to left, turned by a few degrees."""
    sagittal = np.array([[0.0, 0.0, -1.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    directions = _rotation(rng.normal(0, np.deg2rad(5), 3)) @ sagittal
    affine = np.eye(4)
    affine[:3, :3] = directions * _SPACING_MM
    centre = (np.array([_PIXELS, _PIXELS, slices]) - 1) / 2
    affine[:3, 3] = rng.normal(0, 15, 3) - affine[:3, :3] @ centre
    return affine.round(6)


def _draw_anatomy(rng: np.random.Generator, severity: Severity) -> _Anatomy:
    centre = np.array([rng.uniform(-3, 3), rng.uniform(-1, 7), rng.uniform(-3, 3)])
    semi = np.array([rng.uniform(43, 48), rng.uniform(60, 66), rng.uniform(41, 47)])
    site = np.array([(-1.0, 0.2, 0.0), (1.0, 0.1, 0.0), (-0.5, 1.0, 0.0), (0.5, 1.0, 0.0)])[rng.integers(4)]
    direction = site + rng.normal(0, 0.25, 3)
    direction /= np.linalg.norm(direction)
    axes = _fetus_axes(rng)
    scale = rng.uniform(0.9, 1.0)
    # The fetus' middle lies ventral of its spine; it keeps away from the placenta.
    middle = scale * (axes.T @ np.array([9.0, 8.0, 0.0]))
    fetus_centre = centre - middle - rng.uniform(7, 10) * direction + rng.normal(0, 2, 3)
    thickness = rng.uniform(19, 24) * (1 - 0.55 * severity.placenta_thinness)
    navel = fetus_centre + scale * (axes.T @ np.array([24.0, -18.0, 0.0]))
    insertion = centre + semi * direction * 0.72
    return _Anatomy(
        uterus_centre=centre,
        uterus_semi=semi,
        uterus_shape=_Waves.draw(rng, 3, (70, 110)),
        wall_mm=rng.uniform(4.5, 7),
        skin_x=rng.uniform(-70, -66),
        spine_x=rng.uniform(61, 66),
        spine_phase=rng.uniform(0, 30),
        bladder_semi=np.array([rng.uniform(10, 20), rng.uniform(6, 12), rng.uniform(14, 22)]),
        placenta_direction=direction,
        placenta_angle=rng.uniform(0.95, 1.2),
        placenta_mm=float(thickness),
        lobules=_Waves.draw(rng, 4, (16, 28)),
        texture=_Waves.draw(rng, 7, (6, 16)),
        fine_texture=_Waves.draw(rng, 6, (3, 6)),
        fetus_centre=fetus_centre,
        fetus_axes=axes,
        fetus_scale=float(scale),
        flexion=rng.uniform(0.35, 0.75),
        limbs=_draw_limbs(rng),
        gyri=_Waves.draw(rng, 6, (7, 13)),
        cord=_draw_cord(rng, navel, insertion),
    )


def _fetus_axes(rng: np.random.Generator) -> Vector:
    """Return the fetus' ventral, cranial and left directions: it lies along the uterus, its head up or down."""
    roll = rng.uniform(0, 2 * np.pi)
    ventral = np.array([np.cos(roll), 0.0, np.sin(roll)])
    cranial = np.array([0.0, 1.0 if rng.random() < 0.35 else -1.0, 0.0])
    axes = np.stack([ventral, cranial, np.cross(ventral, cranial)])
    tilt = _rotation(np.array([rng.normal(0, 0.12), rng.normal(0, 0.1), rng.normal(0, 0.22)]))
    turned: Vector = axes @ tilt.T
    return turned


def _draw_limbs(rng: np.random.Generator) -> tuple[_Capsule, ...]:
    """Arms bent towards the face, legs drawn up: in the fetus' frame, before scaling."""
    limbs: list[_Capsule] = []

    def joint(x: float, y: float, z: float) -> tuple[float, float, float]:
        return x + rng.normal(0, 2.5), y + rng.normal(0, 3.5), z + rng.normal(0, 2)

    for side in (-1.0, 1.0):
        shoulder, elbow, wrist = (1.0, 13.0, side * 20), joint(16, -7, side * 25), joint(32, 11, side * 11)
        hand = (wrist[0] + 2, wrist[1] + 8, wrist[2] - side * 2)
        hip, knee, ankle = (9.0, -37.0, side * 10), joint(39, -20, side * 15), joint(27, -47, side * 7)
        foot = (ankle[0] + 11, ankle[1] - 5, ankle[2])
        limbs += [_Capsule(shoulder, elbow, (7, 5.5)), _Capsule(elbow, wrist, (5.2, 4))]
        limbs += [_Capsule(wrist, hand, (4.5, 3.2)), _Capsule(hip, knee, (11, 7.5))]
        limbs += [_Capsule(knee, ankle, (7.2, 4.4)), _Capsule(ankle, foot, (4.6, 3.6))]
    return tuple(limbs)


def _draw_cord(rng: np.random.Generator, navel: Vector, insertion: Vector) -> Vector:
    """Return a wound curve from the fetus' navel to the placenta, (points, 3)."""
    steps = np.linspace(0, 1, 22)[:, None]
    sway = rng.normal(0, 9, size=(2, 3))
    turns = 2 * np.pi * steps * np.array([1.0, 2.0])
    curve: Vector = navel + steps * (insertion - navel) + np.sin(np.pi * steps) * (np.sin(turns) @ sway)
    return curve


def _draw_palette(rng: np.random.Generator, severity: Severity) -> _Palette:
    towards_trufi = rng.uniform(0, 0.3) if rng.random() < 0.5 else rng.uniform(0.7, 1)
    haste, trufi = np.array(dataclasses.astuple(_HASTE)), np.array(dataclasses.astuple(_TRUFI))
    values = haste + towards_trufi * (trufi - haste)
    palette = _Palette(*(values * rng.normal(1, 0.05, values.shape)).tolist())
    # A hard placenta is nearly as bright as the wall that it lies on, and the fluid around it is less bright.
    fade = 0.92 * severity.placenta_contrast
    placenta = (1 - fade) * palette.placenta + fade * (palette.myometrium + 4)
    return dataclasses.replace(palette, placenta=placenta, fluid=palette.fluid * (1 - 0.3 * severity.placenta_contrast))


def _draw_motion(rng: np.random.Generator, slices: int, severity: Severity) -> _Motion:
    """Draw random walks in the order of acquisition: all even slices, then all odd ones.

    Neighbouring slices are half a scan apart in time, which gives moving structures their sawtooth edges.
    """
    order = np.concatenate([np.arange(0, slices, 2), np.arange(1, slices, 2)])
    breathing = np.array([1.0, 0.7, 0.1]) * np.sin(rng.uniform(0, 2 * np.pi) + 2.1 * np.arange(slices))[:, None]
    mother = np.empty((slices, 3))
    mother[order] = breathing * (0.3 + 1.4 * severity.motion)

    def walk(rms: float) -> Vector:
        jumps = rng.random((slices, 1)) < 0.25
        path = np.cumsum(rng.normal(size=(slices, 3)) * np.where(jumps, 4.0, 1.0), axis=0)
        path -= path.mean(axis=0)
        placed: Vector = np.empty((slices, 3))
        placed[order] = path * (rms / np.sqrt(np.mean(np.sum(path**2, axis=1))))
        return placed

    return _Motion(mother, walk(0.4 + 4.2 * severity.motion), walk(0.01 + 0.11 * severity.motion))


# --- one slice ------------------------------------------------------------------------------------------------------


def _render_slice(
    index: int, slices: int, anatomy: _Anatomy, palette: _Palette, motion: _Motion
) -> tuple[FloatArray, LabelArray]:
    """Return one slice's signal and its label map, (128, 128) each, averaged from samples finer than the voxel."""
    points = _sample_points(index, slices)
    mother = points - motion.mother_mm[index].astype(np.float32)[:, None, None, None]
    signal = _render_mother(mother, anatomy, palette)
    labels = np.zeros(signal.shape, np.uint8)
    depth = _render_uterus(mother, anatomy, palette, signal, labels)
    pose = _rotation(motion.fetus_rotation[index])
    centre = anatomy.fetus_centre + motion.mother_mm[index] + motion.fetus_mm[index]
    _render_fetus(points, depth, anatomy, palette, pose, centre, signal, labels)
    return _average(signal), _majority(labels)


def _sample_points(index: int, slices: int) -> FloatArray:
    """Return the stack-frame positions of a slice's samples, in mm: (3, through-plane, in-plane, in-plane)."""
    step = _SPACING_MM[0] / _IN_PLANE_SAMPLES
    count = _PIXELS * _IN_PLANE_SAMPLES
    in_plane = (np.arange(count) - (count - 1) / 2) * step
    offsets = (np.arange(_THROUGH_PLANE_SAMPLES) + 0.5) / _THROUGH_PLANE_SAMPLES - 0.5
    z = (index - (slices - 1) / 2 + offsets) * _SPACING_MM[2]
    grid = np.meshgrid(z, in_plane, in_plane, indexing="ij")
    return np.stack([grid[1], grid[2], grid[0]], dtype=np.float32, casting="same_kind")


def _average(samples: FloatArray) -> FloatArray:
    k = _IN_PLANE_SAMPLES
    averaged: FloatArray = samples.reshape(-1, _PIXELS, k, _PIXELS, k).mean(axis=(0, 2, 4), dtype=np.float32)
    return averaged


def _majority(labels: LabelArray) -> LabelArray:
    shares = np.stack([_average((labels == value).astype(np.float32)) for value in range(BRAIN + 1)])
    majority: LabelArray = np.argmax(shares, axis=0).astype(np.uint8)
    return majority


def _render_mother(points: FloatArray, anatomy: _Anatomy, palette: _Palette) -> FloatArray:
    """Return the signal of the mother without her uterus: abdominal wall, bowel, spine, bladder; air outside."""
    x, y, z = points
    below_skin = x - anatomy.skin_x - y**2 / 500 - z**2 / 260
    signal = np.full(x.shape, palette.bowel, np.float32)
    # Loops of bowel: bands between the zero crossings of a smooth field, with darker walls.
    loops = anatomy.lobules(points * np.float32(0.8))
    signal *= 1 + 0.22 * np.tanh(2.5 * loops) + 0.04 * anatomy.fine_texture(points * np.float32(0.6))
    signal[np.abs(loops) < 0.12] *= np.float32(0.72)
    spine = x - anatomy.spine_x - (y / 30) ** 2
    muscle = (below_skin < 17) | (spine > -14)
    signal[muscle] = palette.muscle + 0.12 * (signal[muscle] - palette.bowel)
    signal[below_skin < 11] = palette.fat
    column = (np.abs(spine) < 12) & (np.abs(z) < 19)
    disc = np.mod(y + anatomy.spine_phase, 30) < 7
    signal[column] = np.where(disc, palette.disc, palette.vertebra)[column]
    signal[(np.abs(spine - 16) < 4) & (np.abs(z) < 9)] = palette.csf
    bladder = _ellipsoid(points, np.array([-24.0, -70.0, 0.0]), anatomy.bladder_semi)
    signal[(bladder > 0) & (bladder < 3)] = palette.muscle
    signal[bladder <= 0] = palette.fluid
    signal[below_skin < 0] = 0
    return signal


def _render_uterus(
    points: FloatArray, anatomy: _Anatomy, palette: _Palette, signal: FloatArray, labels: LabelArray
) -> FloatArray:
    """Add wall, fluid, placenta and cord; return each sample's depth in mm inside the cavity (negative outside)."""
    bulge = 1 + np.float32(0.035) * anatomy.uterus_shape(points)
    local = (points - anatomy.uterus_centre.astype(np.float32)[:, None, None, None]) / bulge
    depth = -_ellipsoid(local, np.zeros(3), anatomy.uterus_semi)
    wall = (depth > -anatomy.wall_mm) & (depth <= 0)
    signal[wall] = palette.myometrium + 5 * anatomy.texture(points[:, wall])
    # A thin dark line outside the wall: the serosa.
    signal[(depth > -anatomy.wall_mm - 1.2) & (depth <= -anatomy.wall_mm)] = palette.muscle
    cavity = depth > 0
    inside = points[:, cavity]
    lobules = anatomy.lobules(inside)
    values = palette.fluid * (1 + 0.02 * lobules)
    cord = np.full(values.shape, np.inf, np.float32)
    for start, stop in itertools.pairwise(anatomy.cord):
        near = np.flatnonzero(np.abs(inside[2] - (start[2] + stop[2]) / 2) < 9 + abs(start[2] - stop[2]) / 2)
        if near.size:
            cord[near] = np.minimum(cord[near], _capsule(inside[:, near], start, stop, (4.2, 4.2)))
    values[cord < 0] = palette.cord
    values[cord < -2.6] = palette.heart
    thickness = _placenta_thickness(lobules, local[:, cavity], anatomy)
    placenta = depth[cavity] < thickness
    values[placenta] = _placenta_signal(inside[:, placenta], lobules[placenta], anatomy, palette)
    signal[cavity] = values
    labels[cavity] = np.where(placenta, PLACENTA, 0).astype(np.uint8)
    return depth


def _placenta_thickness(lobules: FloatArray, local: FloatArray, anatomy: _Anatomy) -> FloatArray:
    """Return the placenta's thickness in mm over each sample: a disc on the wall, thinning to a lobulated rim."""
    unit = local / anatomy.uterus_semi.astype(np.float32)[:, None]
    direction = anatomy.placenta_direction.astype(np.float32)
    cosine = np.tensordot(direction, unit, 1) / np.maximum(np.sqrt(np.sum(unit**2, axis=0)), 1e-3)
    angle = np.arccos(np.clip(cosine, -1, 1))
    reach = anatomy.placenta_angle * (1 + 0.06 * lobules)
    profile = np.clip(1 - (angle / reach) ** 2, 0, 1) ** np.float32(0.45)
    return np.asarray(anatomy.placenta_mm * profile * (1 + 0.11 * lobules), dtype=np.float32)


def _placenta_signal(points: FloatArray, lobules: FloatArray, anatomy: _Anatomy, palette: _Palette) -> FloatArray:
    """Return a mottled signal with dark septa between cotyledons and some bright lakes."""
    mottle = anatomy.texture(points)
    septa = np.abs(lobules) < 0.1
    signal = palette.placenta * (1 + 0.07 * mottle + 0.04 * anatomy.fine_texture(points))
    signal = np.where(septa, 0.82 * signal, signal)
    return np.where(mottle > 2.1, 0.5 * (signal + palette.fluid), signal).astype(np.float32)


def _render_fetus(
    points: FloatArray,
    depth: FloatArray,
    anatomy: _Anatomy,
    palette: _Palette,
    pose: Vector,
    centre: Vector,
    signal: FloatArray,
    labels: LabelArray,
) -> None:
    """Add the fetus in its pose; it stays inside the cavity and presses into the placenta."""
    candidates = np.flatnonzero(depth.ravel() > 0.6)
    to_fetus = (anatomy.fetus_axes @ pose.T / anatomy.fetus_scale).astype(np.float32)
    local = to_fetus @ (points.reshape(3, -1)[:, candidates] - centre.astype(np.float32)[:, None])
    near = np.abs(local[2]) < 45
    local, candidates = local[:, near], candidates[near]
    head, vault = _head_distance(local, anatomy.flexion)
    skin = _body_distance(local, head, anatomy)
    body = skin < 0
    if not body.any():
        return
    inside, where = local[:, body], candidates[body]
    brain = vault[body] < -2.4
    values = _body_signal(inside, skin[body], anatomy, palette)
    in_head = np.flatnonzero(vault[body] < 0.5)
    head_points = _to_head(inside[:, in_head], anatomy.flexion)
    values[in_head] = _head_signal(head_points, vault[body][in_head], values[in_head], anatomy, palette)
    signal.reshape(-1)[where] = values
    labels.reshape(-1)[where] = np.where(brain, BRAIN, BODY).astype(np.uint8)


_HEAD_CENTRE = np.array([9.0, 46.0, 0.0])
_VAULT_SEMI = np.array([28.0, 22.5, 21.5])


def _to_head(points: FloatArray, flexion: float) -> FloatArray:
    """Turn fetus-frame points into the head's frame: towards the forehead, the crown and the left."""
    cos, sin = np.cos(flexion), np.sin(flexion)
    axes = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], np.float32)
    return np.asarray(axes @ (points - _HEAD_CENTRE.astype(np.float32)[:, None]), dtype=np.float32)


def _head_distance(points: FloatArray, flexion: float) -> tuple[FloatArray, FloatArray]:
    """Return the distance in mm to the head with its face, and to the cranial vault alone (negative inside)."""
    local = _to_head(points, flexion)
    vault = _ellipsoid(local, np.zeros(3), _VAULT_SEMI)
    face = _ellipsoid(local, np.array([16.0, -16.0, 0.0]), np.array([11.0, 11.0, 12.0]))
    nose = _ellipsoid(local, np.array([27.0, -14.0, 0.0]), np.array([3.5, 3.5, 3.0]))
    return _smooth_union(_smooth_union(vault, face, 5), nose, 3), vault


def _body_distance(points: FloatArray, head: FloatArray, anatomy: _Anatomy) -> FloatArray:
    """Return the distance in mm to the skin of the whole fetus (negative inside), in unscaled fetus units."""
    chest = _ellipsoid(points, np.array([0.0, 2.0, 0.0]), np.array([18.0, 23.0, 19.0]))
    abdomen = _ellipsoid(points, np.array([4.0, -19.0, 0.0]), np.array([21.0, 21.0, 20.0]))
    pelvis = _ellipsoid(points, np.array([7.0, -37.0, 0.0]), np.array([14.0, 14.0, 17.0]))
    neck = _capsule(points, np.array([-2.0, 18.0, 0.0]), np.array([3.0, 34.0, 0.0]), (10, 9))
    skin = _smooth_union(_smooth_union(chest, abdomen, 8), pelvis, 8)
    skin = _smooth_union(_smooth_union(skin, neck, 6), head, 5)
    for limb in anatomy.limbs:
        skin = _smooth_union(skin, _capsule(points, np.array(limb.start), np.array(limb.stop), limb.radii), 2.5)
    return skin


def _body_signal(points: FloatArray, skin: FloatArray, anatomy: _Anatomy, palette: _Palette) -> FloatArray:
    """Return the signal of trunk and limbs: organs, spine, long bones, a darker skin."""
    values = palette.soft * (1 + 0.06 * anatomy.texture(points)).astype(np.float32)
    organs = (
        (palette.lung, (-3.0, 5.0, 8.5), (9.0, 13.0, 7.5)),
        (palette.lung, (-3.0, 5.0, -8.5), (9.0, 13.0, 7.5)),
        (palette.heart, (7.0, 3.0, 2.5), (7.5, 8.0, 7.0)),
        (palette.liver, (7.0, -13.0, -4.0), (12.0, 8.5, 14.0)),
        (palette.fluid, (1.0, -15.0, 11.0), (4.5, 6.0, 4.5)),
        (palette.white, (-7.0, -21.0, 8.0), (5.0, 8.0, 4.5)),
        (palette.white, (-7.0, -21.0, -8.0), (5.0, 8.0, 4.5)),
        (palette.fluid, (12.0, -37.0, 0.0), (5.0, 5.5, 5.0)),
    )
    for level, centre, semi in organs:
        organ = _ellipsoid(points, np.array(centre), np.array(semi)) < 0
        values[organ] = level * (1 + 0.05 * anatomy.fine_texture(points[:, organ]))
    for limb in anatomy.limbs:
        bone = _capsule(points, np.array(limb.start), np.array(limb.stop), (1.6, 1.4)) < 0
        values[bone] = palette.bone
    curve = np.array([(-10, 32, 0), (-13, 14, 0), (-14, -6, 0), (-11, -25, 0), (-3, -43, 0)], np.float64)
    spine = np.full(skin.shape, np.inf, np.float32)
    for start, stop in itertools.pairwise(curve):
        spine = np.minimum(spine, _capsule(points, start, stop, (0, 0)))
    vertebra = np.mod(points[1], 5) < 3.4
    values[spine < 3.6] = np.where(vertebra, palette.bone, palette.soft)[spine < 3.6]
    values[spine < 1.5] = palette.csf
    # Skin and the thin fat below it.
    values[skin > -1.4] *= 0.72
    return values


def _head_signal(
    points: FloatArray, vault: FloatArray, values: FloatArray, anatomy: _Anatomy, palette: _Palette
) -> FloatArray:
    """Return the signal in and around the skull, in the head's frame: skull, fluid, cortex, ventricles, cerebellum."""
    x, y, z = points
    values = values.copy()
    for side in (-8.0, 8.0):
        eye = _ellipsoid(points, np.array([20.0, -11.0, side]), np.array([4.5, 4.5, 4.5]))
        values[eye < 1] = palette.bone
        values[eye < -0.3] = palette.csf
    values[vault < 0] = palette.soft * 0.8
    values[vault < -0.9] = palette.bone
    gyri = anatomy.gyri(points)
    below = -vault - 2.4
    brain = below > 0
    tissue = palette.white * (1 + 0.03 * anatomy.texture(points))
    cortex = below < 5.2 + 1.1 * gyri
    tissue = np.where(cortex, palette.cortex * (1 + 0.04 * anatomy.fine_texture(points)), tissue)
    deep = _ellipsoid(points, np.array([1.0, -2.0, 0.0]), np.array([10.0, 6.5, 9.0]))
    tissue = np.where(deep < 0, palette.grey, tissue)
    fluid = (below < 1.7 + 0.9 * gyri) | ((np.abs(z) < 0.8) & (deep > 0) & (y > -4))
    mirrored = np.stack([x, y, np.abs(z)])
    for start, stop, radii in (((13, 3, 4), (-3, 6, 5), (2.2, 2.4)), ((-3, 6, 5), (-14, 2, 9), (2.4, 3.8))):
        fluid |= _capsule(mirrored, np.array(start, float), np.array(stop, float), radii) < 0
    cerebellum = _ellipsoid(points, np.array([-14.0, -12.0, 0.0]), np.array([8.0, 6.5, 13.0]))
    fluid |= (cerebellum >= 0) & (cerebellum < 1.8)
    folia = palette.cortex * (0.95 + 0.08 * np.sign(np.sin(points[1] * 2.2)))
    tissue = np.where(cerebellum < 0, folia, np.where(fluid, palette.csf, tissue))
    stem = _capsule(points, np.array([-1.0, -8.0, 0.0]), np.array([-6.0, -21.0, 0.0]), (5, 4)) < 0
    tissue = np.where(stem & (cerebellum >= 0), palette.grey, tissue)
    values[brain] = tissue[brain]
    return values


# --- the scanner ----------------------------------------------------------------------------------------------------


def _acquire(
    rng: np.random.Generator, signal: FloatArray, severity: Severity, noise: float
) -> tuple[npt.NDArray[np.int16], tuple[int, ...]]:
    """Turn the true signal (128, 128, slices) into a scan: blur, dropouts, bias field, noise; and name the dropouts."""
    slices = signal.shape[2]
    image = ndimage.gaussian_filter(signal, (0.45, 0.45, 0))
    # Motion while a slice is read out smears it along the phase encoding.
    smeared = np.flatnonzero(rng.random(slices) < 0.5 * severity.motion)
    smear = rng.uniform(0.8, 1.6, slices)
    for index in smeared:
        image[..., index] = ndimage.gaussian_filter1d(image[..., index], smear[index], axis=1)
    gain = 1 + (0.02 + 0.05 * severity.dropout) * rng.normal(size=slices)
    image *= gain.astype(np.float32)
    dropouts = np.sort(rng.permutation(np.arange(2, slices - 2))[: round(6 * severity.dropout)])
    for index in dropouts:
        image[..., index] *= _dropout_pattern(rng)
    image *= _bias_field(rng, slices, 0.14 + 0.16 * severity.noise)
    noise_real, noise_imaginary = rng.normal(0, noise, size=(2, *image.shape))
    magnitude = np.hypot(image + noise_real, noise_imaginary)
    # Scanner units are arbitrary; small ones compress well.
    scale = rng.uniform(0.26, 0.4)
    return np.rint(magnitude * scale).astype(np.int16), tuple(int(i) for i in dropouts)


def _dropout_pattern(rng: np.random.Generator) -> FloatArray:
    """Return a factor over one slice (128, 128): signal lost in a broad, soft-edged part, or nearly everywhere."""
    axis = (np.arange(_PIXELS) - _PIXELS / 2) * _SPACING_MM[0]
    x, y = np.meshgrid(axis, axis, indexing="ij")
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * (x - rng.uniform(-15, 15)) + np.sin(angle) * (y - rng.uniform(-15, 15))
    reach = rng.choice([0.0, 60.0], p=[0.65, 0.35])
    lost = rng.uniform(0.6, 0.9) / (1 + np.exp(-(along + reach) / 7))
    return np.asarray(1 - lost, dtype=np.float32)


def _bias_field(rng: np.random.Generator, slices: int, strength: float) -> FloatArray:
    """Return a smooth gain (128, 128, slices): brighter near the anterior coil, plus low-order polynomials."""
    i = np.linspace(-1, 1, _PIXELS)[:, None, None]
    j = np.linspace(-1, 1, _PIXELS)[None, :, None]
    k = np.linspace(-1, 1, slices)[None, None, :]
    a = rng.normal(0, 0.5, 6)
    shape = -0.9 * i + a[0] * j + a[1] * k + a[2] * i * j + a[3] * (i**2 - 0.3) + a[4] * (j**2 - 0.3) + a[5] * j * k
    return np.asarray(np.exp(strength * shape), dtype=np.float32)


# --- shapes ---------------------------------------------------------------------------------------------------------


def _ellipsoid(points: FloatArray, centre: Vector, semi: Vector) -> FloatArray:
    """Return the first-order signed distance in mm of points (3, ...) to an axis-aligned ellipsoid, negative inside."""
    level = np.zeros(points.shape[1:], np.float32)
    slope = np.zeros(points.shape[1:], np.float32)
    for axis in range(3):
        ratio = (points[axis] - np.float32(centre[axis])) / np.float32(semi[axis])
        level += ratio * ratio
        ratio /= np.float32(semi[axis])
        slope += ratio * ratio
    level = np.sqrt(level)
    # At the very centre both vanish; any clearly negative distance does there.
    distance: FloatArray = level * (level - 1) / np.maximum(np.sqrt(slope), np.float32(1e-3))
    return distance


def _capsule(points: FloatArray, start: Vector, stop: Vector, radii: tuple[float, float]) -> FloatArray:
    """Return the signed distance in mm of points (3, n) to a segment thickened from one radius to the other."""
    a = np.asarray(start, np.float32)
    direction = np.asarray(stop, np.float32) - a
    length_squared = max(float(direction @ direction), 1e-6)
    x, y, z = points[0] - a[0], points[1] - a[1], points[2] - a[2]
    along = np.clip((x * direction[0] + y * direction[1] + z * direction[2]) / length_squared, 0, 1)
    x, y, z = x - along * direction[0], y - along * direction[1], z - along * direction[2]
    distance = np.sqrt(x * x + y * y + z * z) - (radii[0] + along * (radii[1] - radii[0]))
    return np.asarray(distance, dtype=np.float32)


def _smooth_union(first: FloatArray, second: FloatArray, radius_mm: float) -> FloatArray:
    """Join two distances with a fillet of about the given radius (polynomial smooth minimum)."""
    blend = np.maximum(radius_mm - np.abs(first - second), 0)
    return np.asarray(np.minimum(first, second) - blend * blend / (4 * radius_mm), dtype=np.float32)


def _rotation(vector: Vector) -> Vector:
    """Return the rotation matrix of a rotation vector in radians (Rodrigues)."""
    angle = float(np.linalg.norm(vector))
    if angle == 0:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    matrix: Vector = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return matrix


# --- files ----------------------------------------------------------------------------------------------------------


def _describe(name: str, phantom: Phantom, final: bool) -> dict[str, str]:
    rms = float(np.sqrt(np.mean(np.sum(phantom.displacement_mm**2, axis=1))))
    return {
        "scan": name,
        "seed": str(phantom.seed),
        "difficulty": f"{phantom.difficulty:.2f}",
        "label": "final" if final else "truth",
        "hard_because": " ".join(phantom.severity.reasons()),
        "motion_rms_mm": f"{rms:.1f}",
        "dropout_slices": " ".join(map(str, phantom.dropout_slices)),
        "placenta_contrast_to_noise": f"{phantom.placenta_contrast:.1f}",
        "placenta_thickness_mm": f"{phantom.placenta_thickness_mm:.1f}",
    }


def _write_table(rows: list[dict[str, str]], path: Path) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_text(text: str, path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


_SETTINGS = """\
# Settings of this dataset folder. A structure is the union of one or more values of the label maps.
[structures]
placenta = [1]
body = [2]    # the fetus without its brain, skull included
brain = [3]
"""

_README = """\
# Sample scans: fetal-MRI-like phantoms

{scans} generated scans to start with: sagittal stacks of a uterus with placenta, fetal body and brain, 128 x 128 voxels
of 1.2 x 1.2 mm in slices of 4 mm, slightly oblique. They are drawings, not patients; no clinical statement can rest on
them.

| Where | What |
|---|---|
| `<id>.nii.gz` | the scans |
| `labels/final/<id>.nii.gz` | final labels of {labelled} of them, easy and hard |
| `truth/<id>.nii.gz` | true labels of the others; for simulated annotators, not listed by the server |
| `truth/phantoms.csv` | how hard each scan is, and why |
| `segqc.toml` | the structures: placenta 1, body (without brain) 2, brain 3 |

Made by `segqc phantom` (`segqc.phantom.write_datastore`) with {scans} scans, {labelled} labelled, seed {seed}. The same
numbers give the same folder again.
What is drawn: partial volume, interleaved slices with motion of mother and fetus between them (labels follow it),
slices with signal dropout, bias field, Rician noise, a contrast between T2 half-Fourier and balanced steady-state, and
in hard scans a thin placenta or one nearly as bright as the uterine wall.

Licence: Apache-2.0, as the rest of the project.
"""
