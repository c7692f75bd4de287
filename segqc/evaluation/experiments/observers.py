"""Error extraction against real observer variability: two experts' masks of the same scans.

What two experts draw differently is no error: extraction should remove it. Errors that are implanted into one expert's
mask are known: extraction should find them and keep their voxels. Both depend on the band's width, in opposite ways.
The width is chosen on one half of the scans and reported on the other half (method, "Error extraction (EE)").

The first expert's mask is the mask under assessment, M. Against the second expert's, |T - M| is the difference that
should go; against the first expert's own, before something was implanted, it is the implanted error that should stay.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import ndimage

from segqc.progress import NO_PROGRESS, Progress
from segqc.quality.boxes import BoxSettings, find_boxes
from segqc.quality.error_maps import (
    PLAIN_EXTRACTION,
    ExtractionSettings,
    bounding_box,
    difference,
    extract_errors,
    padded_box,
)
from segqc.text import TextError, decode_text, nfc
from segqc.types import BoolArray, ErrorBox, Structure
from segqc.volumes import atomic_write, label_id, label_suffix, read_labels, through_plane_axis

ErrorKind: TypeAlias = Literal["missing slice", "leak", "cut"]
WidthUnit: TypeAlias = Literal["mm", "share"]

ERROR_KINDS: tuple[ErrorKind, ...] = get_args(ErrorKind)
EVERY_BOX = BoxSettings(min_distance_voxels=0.0, min_area_mm2=0.0, max_slice_share=1.0)
RESAMPLES = 1000
_LABEL_LINE = re.compile(r'\s*(?P<value>[0-9]+)[\s,;]+(?:"(?P<quoted>[^"]+)"|(?P<name>[^\s,;"][^;"]*?))\s*')
_TASK = "experts' masks"
_WIDTH_LABELS: Mapping[WidthUnit, str] = {
    "mm": "band's radius, mm",
    "share": "share of the mask that the erosion may take",
}
_KIND_COLOURS: Mapping[str, str] = {"missing slice": "#009E73", "leak": "#D55E00", "cut": "#CC79A7"}


# ------------------------------------------------------------------------------------------------------------- values


@dataclass(frozen=True, slots=True)
class DoubleReading:
    """The label files of two experts for one scan, on one grid."""

    scan: str
    first: Path
    second: Path


@dataclass(frozen=True, slots=True)
class ObserverSettings:
    """What is implanted, and what is counted.

    Attributes:
        seed: of the split of the scans and of the implanted errors.
        errors_per_kind: errors of each kind per structure and scan, in slices of their own; at most in a quarter of
            the structure's slices.
        leak_radius_mm: radius of the disk around a contour voxel that a leak adds to a slice.
        large_ml: structures whose first mask is larger are reported as large.
        min_error_mm2: only implanted errors of a larger area are counted.
    """

    seed: int = 0
    errors_per_kind: int = 4
    leak_radius_mm: float = 9.0
    large_ml: float = 5.0
    min_error_mm2: float = 100.0


@dataclass(frozen=True, slots=True)
class ChoiceRule:
    """What a width has to reach on the large structures of the choosing half; stricter than what is wanted of it.

    The narrowest width that reaches all is chosen: the wider the band, the less can be found in small structures.

    Attributes:
        min_removed: share of the experts' difference that is removed.
        min_found: share of the implanted errors of every kind that are found.
        min_kept: share of all implanted errors' voxels that are kept.
    """

    min_removed: float = 0.87
    min_found: float = 0.99
    min_kept: float = 0.8


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a whole, pooled over cases.

    Attributes:
        part, whole: counts of voxels or of errors.
        share: part / whole; None for an empty whole.
        mean: the mean over cases (a structure in a scan) of their own shares.
        interval: 95% interval of ``share``, by a bootstrap over scans; None with fewer than two scans, and for single
            structures.
    """

    part: int
    whole: int
    share: float | None
    mean: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class ImplantedErrors:
    """What becomes of implanted errors of one kind, or of all kinds.

    Attributes:
        kind: the kind; "all" for all of them.
        found: errors that are found: a component survives and its box meets the error's.
        kept: their voxels that are kept.
        kept_in_difference: the same where the truth is the second expert's mask, so that error and difference touch;
            of the implanted voxels that are wrong against both. Not for missing slices, where no contour is.
        difference_removed: in the same slices, the share of the experts' own difference that is removed.
    """

    kind: str
    found: Share
    kept: Share
    kept_in_difference: Share
    difference_removed: Share


@dataclass(frozen=True, slots=True)
class Group:
    """The outcome over some structures.

    Attributes:
        name: a structure's name, or what the structures have in common.
        cases: pairs of a scan and a structure that both experts drew.
        removed: share of the differing voxels that extraction removes, in slices that both experts included.
        removed_single: the same in slices that only one of them included.
        implanted: all kinds of errors together, then each kind.
    """

    name: str
    cases: int
    removed: Share
    removed_single: Share
    implanted: tuple[ImplantedErrors, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one setting of extraction does: large structures, all structures, then each structure with large masks."""

    settings: ExtractionSettings
    groups: tuple[Group, ...]

    @property
    def large(self) -> Group:
        """The group of the large structures."""
        return self.groups[0]


@dataclass(frozen=True, slots=True)
class WidthOutcome:
    """One width of a curve."""

    width: float
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class WidthCurve:
    """What becomes of differences and errors over the band's width.

    Attributes:
        unit: of the widths: the band's radius in mm, or the share of the mask that the erosion may take.
        points: one for each width, in ascending order.
    """

    unit: WidthUnit
    points: tuple[WidthOutcome, ...]


@dataclass(frozen=True, slots=True)
class CurveSettings:
    """The settings of extraction along a curve, by width in its unit."""

    unit: WidthUnit
    by_width: Mapping[float, ExtractionSettings]


@dataclass(frozen=True, slots=True)
class ObserverExperiment:
    """The whole experiment.

    Attributes:
        settings: what was implanted and counted.
        rule: how the width was chosen.
        choosing, held: the scans of the two halves.
        curves: by name, on the choosing half.
        chosen: the width that the rule chooses on the curve ``chosen_from``; None if no width meets it.
        chosen_from: the curve's name.
        on_held: by name, outcomes on the held half: the chosen settings, and others to compare with.
    """

    settings: ObserverSettings
    rule: ChoiceRule
    choosing: tuple[str, ...]
    held: tuple[str, ...]
    curves: Mapping[str, WidthCurve]
    chosen: float | None
    chosen_from: str
    on_held: Mapping[str, Outcome]


# -------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True, slots=True, eq=False)
class ImplantedSlices:
    """A mask (n0, n1, slices) with errors of one kind in some of its slices, and the errors alone."""

    kind: ErrorKind
    mask: BoolArray
    error: BoolArray
    slices: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ObserverCase:
    """One structure in one scan: both experts' masks, cut out, the through-plane axis last, and implanted errors."""

    scan: str
    structure: str
    spacing_mm: tuple[float, float, float]
    first: BoolArray
    second: BoolArray
    implanted: tuple[ImplantedSlices, ...] = field(default=())

    @property
    def volume_ml(self) -> float:
        """The volume of the first expert's mask."""
        return float(np.count_nonzero(self.first)) * math.prod(self.spacing_mm) / 1000.0

    @property
    def voxel_mm2(self) -> float:
        """The area of a voxel in its slice."""
        return self.spacing_mm[0] * self.spacing_mm[1]


def find_double_readings(folder: Path, first: str, second: str) -> tuple[DoubleReading, ...]:
    """Find the scans that two experts labelled, in a folder of files named ``<scan>_<expert>``.

    Raises:
        ValueError: if there is none.
    """
    files = {nfc(label_id(path)): path for path in sorted(folder.iterdir()) if label_suffix(path.name)}
    suffix = f"_{first}"
    found = []
    for name, path in files.items():
        scan = name.removesuffix(suffix)
        other = files.get(nfc(f"{scan}_{second}"))
        if name.endswith(suffix) and other is not None:
            found.append(DoubleReading(scan, path, other))
    if not found:
        raise ValueError(f"{folder}: holds no scan with labels of both {first!r} and {second!r}")
    return tuple(found)


def find_experts(folder: Path) -> tuple[str, str]:
    """The two experts of a folder of label files named ``<scan>_<expert>``, in alphabetical order.

    Raises:
        ValueError: if the files are not of exactly two experts.
    """
    names = {label_id(path) for path in folder.iterdir() if label_suffix(path.name)}
    experts = sorted({name.rpartition("_")[2] for name in names if "_" in name})
    if len(experts) != 2:
        raise ValueError(
            f"{folder}: label files must be named <scan>_<expert> and be of two experts, found {experts or 'none'}"
        )
    return experts[0], experts[1]


def read_structures(folder: Path) -> tuple[Structure, ...]:
    """The structures of a folder's ``labels.txt``: a label value and a name per line.

    Blanks, a tabulator, a comma or a semicolon stand between both, the name may be in double quotes, and lines that are
    empty or there twice count for nothing.

    Raises:
        ValueError: if the file is missing, a line is none of these, or a value or a name has two meanings.
    """
    path = folder / "labels.txt"
    if not path.is_file():
        raise ValueError(f"{path}: is missing; write a label value and a structure's name in each of its lines")
    try:
        text = decode_text(path.read_bytes())
    except TextError as error:
        raise ValueError(f"{path}: {error}") from error
    values: dict[str, int] = {}
    for line in filter(str.strip, text.splitlines()):
        found = _LABEL_LINE.fullmatch(line)
        if found is None:
            raise ValueError(f"{path}: the line {' '.join(line.split())!r} is not a label value and a name")
        value, name = int(found["value"]), found["quoted"] or found["name"]
        if values.setdefault(name, value) != value:
            raise ValueError(f"{path}: the name {name!r} has two label values, {values[name]} and {value}; rename one")
    if len(set(values.values())) < len(values):
        raise ValueError(f"{path}: a label value has two names ({', '.join(values)}); remove one")
    return tuple(Structure(name, (value,)) for name, value in values.items())


def read_cases(
    reading: DoubleReading, structures: Sequence[Structure], settings: ObserverSettings
) -> tuple[ObserverCase, ...]:
    """Read one scan's two label maps, and implant errors into the first expert's masks.

    Structures that one of the experts left out are left out. The implanted errors depend on the seed, the scan's and
    the structure's name only.

    Raises:
        VolumeError: if a file can't be read, or the two are not on one grid.
    """
    labels = read_labels(reading.first)
    other = read_labels(reading.second, scan=labels)
    axis = through_plane_axis(labels)
    order = [a for a in range(3) if a != axis] + [axis]
    s0, s1, s2 = (labels.spacing_mm[a] for a in order)
    margin = settings.leak_radius_mm + 10.0  # wider than a leak and any band around it
    cases = []
    for structure in structures:
        first = structure.mask(labels.array).transpose(order)
        second = structure.mask(other.array).transpose(order)
        box = bounding_box(first | second)
        if box is None or not (first.any() and second.any()):
            continue
        window = padded_box(box, (math.ceil(margin / s0), math.ceil(margin / s1), 0), first.shape)
        case = ObserverCase(reading.scan, structure.name, (s0, s1, s2), first[window].copy(), second[window].copy())
        rng = np.random.default_rng((settings.seed, *reading.scan.encode(), *structure.name.encode()))
        cases.append(replace(case, implanted=tuple(implant_errors(case, k, settings, rng) for k in ERROR_KINDS)))
    return tuple(cases)


def implant_errors(
    case: ObserverCase, kind: ErrorKind, settings: ObserverSettings, rng: np.random.Generator
) -> ImplantedSlices:
    """Implant errors of one kind into the first expert's mask, each into a slice of its own.

    "missing slice" empties the slice; "leak" adds a disk around a random contour voxel; "cut" takes what lies on one
    side of a line through the slice's centroid, in a random direction.
    """
    filled = np.flatnonzero(case.first.any(axis=(0, 1)))
    count = min(settings.errors_per_kind, max(1, filled.size // 4))
    mask = case.first.copy()
    rows, columns = (
        axis * spacing for axis, spacing in zip(np.indices(mask.shape[:2]), case.spacing_mm[:2], strict=True)
    )
    slices = sorted(int(i) for i in rng.choice(filled, count, replace=False))
    for index in slices:
        here = case.first[..., index]
        if kind == "missing slice":
            mask[..., index] = False
        elif kind == "leak":
            contour = np.argwhere(here & ~ndimage.binary_erosion(here))
            row, column = contour[rng.integers(len(contour))]
            distance = np.hypot(rows - row * case.spacing_mm[0], columns - column * case.spacing_mm[1])
            mask[..., index] |= distance <= settings.leak_radius_mm
        else:
            angle = rng.uniform(0, 2 * math.pi)
            side = (rows - rows[here].mean()) * math.cos(angle) + (columns - columns[here].mean()) * math.sin(angle)
            mask[..., index] &= side <= 0
    return ImplantedSlices(kind, mask, difference(mask, case.first), tuple(slices))


# ----------------------------------------------------------------------------------------------------------- counting


@dataclass(frozen=True, slots=True)
class _Errors:
    """Counts over the implanted errors of one kind in one case."""

    errors: int = 0
    found: int = 0
    voxels: int = 0
    kept: int = 0
    mixed_voxels: int = 0
    mixed_kept: int = 0
    mixed_differing: int = 0
    mixed_removed: int = 0

    def __add__(self, other: _Errors) -> _Errors:
        return _Errors(*(getattr(self, name) + getattr(other, name) for name in _Errors.__slots__))


@dataclass(frozen=True, slots=True)
class _Counts:
    """Counts of one case."""

    scan: str
    structure: str
    large: bool
    differing: int
    removed: int
    single_differing: int
    single_removed: int
    errors: Mapping[str, _Errors]


def measure(cases: Iterable[ObserverCase], extraction: ExtractionSettings, settings: ObserverSettings) -> Outcome:
    """Apply extraction to the experts' differences and to the implanted errors.

    Args:
        cases: the structures of some scans.
        extraction: the settings of extraction; a structure's own band is taken where there is one.
        settings: what is counted.
    """
    counts = [_count(case, extraction.for_structure(case.structure), settings) for case in cases]
    large = [c for c in counts if c.large]
    names = list(dict.fromkeys(c.structure for c in large))
    groups = [_group(f"over {settings.large_ml:g} ml", large), _group("all structures", counts)]
    groups += [_group(name, [c for c in large if c.structure == name], kinds=False) for name in names]
    return Outcome(extraction, tuple(groups))


def _count(case: ObserverCase, extraction: ExtractionSettings, settings: ObserverSettings) -> _Counts:
    differs = difference(case.first, case.second)
    left = extract_errors(differs, case.first, 2, case.spacing_mm, extraction)
    both = case.first.any(axis=(0, 1)) & case.second.any(axis=(0, 1))
    differing, remaining = (np.count_nonzero(array, axis=(0, 1)) for array in (differs, left))
    return _Counts(
        case.scan,
        case.structure,
        case.volume_ml > settings.large_ml,
        int(differing[both].sum()),
        int((differing - remaining)[both].sum()),
        int(differing[~both].sum()),
        int((differing - remaining)[~both].sum()),
        {implanted.kind: _count_errors(case, implanted, extraction, settings) for implanted in case.implanted},
    )


def _count_errors(
    case: ObserverCase, implanted: ImplantedSlices, extraction: ExtractionSettings, settings: ObserverSettings
) -> _Errors:
    area = np.count_nonzero(implanted.error, axis=(0, 1)) * case.voxel_mm2
    counted = [i for i in implanted.slices if area[i] > settings.min_error_mm2]
    if not counted:
        return _Errors()
    error = implanted.error
    kept = extract_errors(error, implanted.mask, 2, case.spacing_mm, extraction)
    wanted, boxes = (find_boxes(array, 2, case.spacing_mm, EVERY_BOX) for array in (error, kept))
    found = sum(
        any(_meet(a, b) for a in wanted if a.slice_index == i for b in boxes if b.slice_index == i) for i in counted
    )
    total = _Errors(
        len(counted), found, int(np.count_nonzero(error[..., counted])), int(np.count_nonzero(kept[..., counted]))
    )
    counted = [i for i in counted if case.second[..., i].any()]
    if implanted.kind == "missing slice" or not counted:
        return total
    differs = difference(implanted.mask, case.second)
    left = extract_errors(differs, implanted.mask, 2, case.spacing_mm, extraction)[..., counted]
    differs, error = differs[..., counted], error[..., counted]
    return total + _Errors(
        mixed_voxels=int(np.count_nonzero(differs & error)),
        mixed_kept=int(np.count_nonzero(left & error)),
        mixed_differing=int(np.count_nonzero(differs & ~error)),
        mixed_removed=int(np.count_nonzero(differs & ~error & ~left)),
    )


def _meet(a: ErrorBox, b: ErrorBox) -> bool:
    return all(a.start[k] < b.stop[k] and b.start[k] < a.stop[k] for k in range(2))


def _group(name: str, counts: Sequence[_Counts], *, kinds: bool = True) -> Group:
    scans = [c.scan for c in counts] if kinds else None

    def errors_of(kind: str) -> ImplantedErrors:
        of_case = [
            sum(c.errors.values(), _Errors()) if kind == "all" else c.errors.get(kind, _Errors()) for c in counts
        ]
        return ImplantedErrors(
            kind,
            _share(scans, [e.found for e in of_case], [e.errors for e in of_case]),
            _share(scans, [e.kept for e in of_case], [e.voxels for e in of_case]),
            _share(scans, [e.mixed_kept for e in of_case], [e.mixed_voxels for e in of_case]),
            _share(scans, [e.mixed_removed for e in of_case], [e.mixed_differing for e in of_case]),
        )

    return Group(
        name,
        len(counts),
        _share(scans, [c.removed for c in counts], [c.differing for c in counts]),
        _share(scans, [c.single_removed for c in counts], [c.single_differing for c in counts]),
        tuple(errors_of(kind) for kind in (("all", *ERROR_KINDS) if kinds else ("all",))),
    )


def _share(scans: Sequence[str] | None, parts: Sequence[int], wholes: Sequence[int]) -> Share:
    part, whole = np.array(parts, np.float64), np.array(wholes, np.float64)
    if whole.sum() == 0:
        return Share(0, 0, None, None, None)
    counted = whole > 0
    mean = float((part[counted] / whole[counted]).mean())
    return Share(
        int(part.sum()),
        int(whole.sum()),
        round(float(part.sum() / whole.sum()), 4),
        round(mean, 4),
        None if scans is None else _interval(scans, part, whole),
    )


def _interval(
    scans: Sequence[str], part: npt.NDArray[np.float64], whole: npt.NDArray[np.float64]
) -> tuple[float, float] | None:
    """The pooled share's 95% interval when scans are drawn with replacement."""
    _, index = np.unique(scans, return_inverse=True)
    by_scan = np.stack([np.bincount(index, part), np.bincount(index, whole)])
    by_scan = by_scan[:, by_scan[1] > 0]
    scan_count = by_scan.shape[1]
    if scan_count < 2:
        return None
    drawn = np.random.default_rng(0).integers(scan_count, size=(RESAMPLES, scan_count))
    parts, wholes = by_scan[:, drawn].sum(axis=2)
    low, high = np.percentile(parts / wholes, (2.5, 97.5))
    return round(float(low), 4), round(float(high), 4)


# --------------------------------------------------------------------------------------------------------- experiment

ABSOLUTE_WIDTHS_MM = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
RELATIVE_WIDTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
RELATIVE_CURVE = "relative, grown back"


def curve_settings(base: ExtractionSettings) -> dict[str, CurveSettings]:
    """The settings of each curve: bands in mm and bands relative to the mask, with and without growing back.

    Args:
        base: the settings that stay as they are along a curve; those without growing back are the paper's steps.
    """
    plain = PLAIN_EXTRACTION
    return {
        "in mm, plain": CurveSettings("mm", {w: replace(plain, band_mm=w) for w in ABSOLUTE_WIDTHS_MM}),
        "relative, plain": CurveSettings(
            "share", {w: replace(plain, band_mm=base.band_mm, max_band_share=w) for w in RELATIVE_WIDTHS}
        ),
        "in mm, grown back": CurveSettings(
            "mm", {w: replace(base, band_mm=w, max_band_share=1.0) for w in ABSOLUTE_WIDTHS_MM}
        ),
        RELATIVE_CURVE: CurveSettings("share", {w: replace(base, max_band_share=w) for w in RELATIVE_WIDTHS}),
    }


def split_scans(scans: Sequence[str], seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split scans at random into a half to choose on and a held half, which gets the odd one; both sorted."""
    ordered = sorted(scans)
    drawn = np.random.default_rng(seed).permutation(len(ordered))
    half = len(ordered) // 2
    choosing, held = drawn[:half], drawn[half:]
    return tuple(sorted(ordered[i] for i in choosing)), tuple(sorted(ordered[i] for i in held))


def choose_width(curve: WidthCurve, rule: ChoiceRule) -> float | None:
    """The narrowest width of a curve that meets the rule; None if there is none."""
    return min((point.width for point in curve.points if _meets(point.outcome.large, rule)), default=None)


def _meets(group: Group, rule: ChoiceRule) -> bool:
    def reaches(share: Share, least: float) -> bool:
        return share.share is None or share.share >= least

    return (
        reaches(group.removed, rule.min_removed)
        and all(reaches(errors.found, rule.min_found) for errors in group.implanted)
        and reaches(group.implanted[0].kept, rule.min_kept)
    )


def compare_observers(
    readings: Sequence[DoubleReading],
    structures: Sequence[Structure],
    *,
    settings: ObserverSettings | None = None,
    base: ExtractionSettings | None = None,
    rule: ChoiceRule | None = None,
    progress: Progress = NO_PROGRESS,
) -> ObserverExperiment:
    """Measure curves on one half of the scans, choose the band's width there, and report it on the other half.

    Args:
        readings: two experts' label files of some scans.
        structures: the structures to look at.
        settings: what is implanted and counted.
        base: the settings of extraction beside the width.
        rule: how the width is chosen on the curve of relative widths that grows back.
        progress: reports before each curve, and before the held half.

    Raises:
        ValueError: with fewer than two scans, or two of one name.
        VolumeError: if a label file can't be read, or two of one scan are not on one grid.
    """
    settings, base, rule = settings or ObserverSettings(), base or ExtractionSettings(), rule or ChoiceRule()
    by_scan = {reading.scan: reading for reading in readings}
    if len(by_scan) < 2 or len(by_scan) < len(readings):
        raise ValueError(f"the experiment needs two or more scans of different names, got {[r.scan for r in readings]}")
    choosing, held = split_scans(list(by_scan), settings.seed)
    cases = [case for scan in choosing for case in read_cases(by_scan[scan], structures, settings)]
    wanted = curve_settings(base)
    steps = len(wanted) + 1
    curves = {}
    for done, (name, curve) in enumerate(wanted.items()):
        detail = f"{name}, {len(curve.by_width)} widths on {len(choosing)} scans"
        progress.step(done, steps, _TASK, detail, unit="parts")
        points = (WidthOutcome(w, measure(cases, extraction, settings)) for w, extraction in curve.by_width.items())
        curves[name] = WidthCurve(curve.unit, tuple(points))
    width = choose_width(curves[RELATIVE_CURVE], rule)
    compared = {"plain 2 mm band": PLAIN_EXTRACTION}
    if width is not None:
        chosen = replace(base, max_band_share=width)
        same_band = replace(PLAIN_EXTRACTION, band_mm=base.band_mm, max_band_share=width)
        compared = {"chosen": chosen, "the chosen band, plain": same_band, **compared}
    progress.step(steps - 1, steps, _TASK, f"{len(compared)} settings on {len(held)} held scans", unit="parts")
    cases = [case for scan in held for case in read_cases(by_scan[scan], structures, settings)]
    on_held = {name: measure(cases, extraction, settings) for name, extraction in compared.items()}
    progress.step(steps, steps, _TASK, "done", unit="parts")
    return ObserverExperiment(settings, rule, choosing, held, curves, width, RELATIVE_CURVE, on_held)


# ------------------------------------------------------------------------------------------------------------- figure


def draw_curves(experiment: ObserverExperiment, path: Path) -> None:
    """Draw what is removed, found and kept over the band's width, for the large structures of the choosing half.

    Args:
        experiment: the experiment.
        path: the image file; its suffix (.png, .pdf, .svg) decides the format.
    """
    names = list(experiment.curves)
    figure = Figure(figsize=(4.6 * min(len(names), 2), 3.9 * math.ceil(len(names) / 2)), layout="constrained")
    figure.set_facecolor("white")
    grid = figure.subplots(math.ceil(len(names) / 2), min(len(names), 2), sharey=True, squeeze=False)
    for ax, name in zip(grid.ravel(), names, strict=False):
        _draw_curve(ax, experiment.curves[name])
        ax.set_title(name, fontsize=10)
        ax.set_xlabel(_WIDTH_LABELS[experiment.curves[name].unit])
        if name == experiment.chosen_from and experiment.chosen is not None:
            ax.axvline(experiment.chosen, color="black", linestyle=":", label="chosen")
    for ax in grid[:, 0]:
        ax.set_ylabel("share")
    handles = {
        label: handle for ax in grid.ravel() for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    FigureCanvasAgg(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _draw_curve(ax: Axes, curve: WidthCurve) -> None:
    widths = [point.width for point in curve.points]
    groups = [point.outcome.large for point in curve.points]
    removed = [_or_nan(group.removed.share) for group in groups]
    ax.plot(widths, removed, color="#0072B2", marker="o", markersize=3, label="experts' difference removed")
    intervals = [group.removed.interval or (math.nan, math.nan) for group in groups]
    low, high = zip(*intervals, strict=True)
    ax.fill_between(widths, low, high, color="#0072B2", alpha=0.15, linewidth=0)
    for number, kind in enumerate(("all", *ERROR_KINDS)):
        errors = [next(e for e in group.implanted if e.kind == kind) for group in groups]
        colour = _KIND_COLOURS.get(kind, "black")
        name = "all errors" if kind == "all" else kind
        ax.plot(
            widths, [_or_nan(e.kept.share) for e in errors], color=colour, linewidth=1.2, label=f"{name}: voxels kept"
        )
        if number == 0:
            found = [_or_nan(e.found.share) for e in errors]
            ax.plot(widths, found, color="black", linestyle="--", linewidth=1.2, label="all errors: found", zorder=3)
    ax.set_ylim(0, 1.03)
    ax.grid(alpha=0.3)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
