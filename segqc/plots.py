"""Pictures for people: the slices of an assessment to look at first, and learning curves.

Drawn with matplotlib's object interface on the Agg canvas: no display is needed, and nothing global is changed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from pydantic import TypeAdapter

from segqc.quality.error_maps import bounding_box, padded_box
from segqc.types import Assessment, BoolArray, FloatArray, Structure, StructureQuality
from segqc.volumes import Volume, atomic_write

if TYPE_CHECKING:
    from segqc.networks.assessor import AssessmentResult

# Okabe and Ito's colours, told apart with any kind of colour vision; red stays for errors.
COLOURS = ("#56B4E9", "#F0E442", "#009E73", "#CC79A7", "#0072B2", "#E69F00")
HEAT = LinearSegmentedColormap.from_list("error", [(1, 0.3, 0, 0.0), (1, 0.3, 0, 0.6), (1, 0, 0, 0.9)])
_MARGIN_MM = 15.0
_LETTERS_PER_INCH = 11  # of the headline

Window: TypeAlias = tuple[slice, slice, slice]


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One epoch of a learning curve, numbered from 1; the validation loss only where it was measured."""

    epoch: int
    train_loss: float
    validation_loss: float | None = None


_CURVE: TypeAdapter[tuple[CurvePoint, ...]] = TypeAdapter(tuple[CurvePoint, ...])


@dataclass(frozen=True, slots=True)
class View:
    """How a slice is laid on the page: anterior or superior up, the patient's right (or front) on the left.

    Attributes:
        axis: the through-plane axis.
        horizontal, vertical: the array axes that lie along the page.
        flip_horizontal, flip_vertical: whether an axis runs against the page's direction.
        aspect: height over width of a voxel.
    """

    axis: int
    horizontal: int
    vertical: int
    flip_horizontal: bool
    flip_vertical: bool
    aspect: float

    @classmethod
    def of(cls, scan: Volume, axis: int) -> View:
        """The view of a scan's slices along an axis."""
        codes = nib.orientations.aff2axcodes(scan.affine)
        first, second = (a for a in range(3) if a != axis)
        # left-right lies horizontally; in a sagittal slice, which has none, front-back does
        swapped = codes[second] in "LR" or (codes[first] in "SI" and codes[second] in "AP")
        horizontal, vertical = (second, first) if swapped else (first, second)
        spacing = scan.spacing_mm
        return cls(
            axis,
            horizontal,
            vertical,
            flip_horizontal=codes[horizontal] in "RA",
            flip_vertical=codes[vertical] in "IP",
            aspect=spacing[vertical] / spacing[horizontal],
        )

    def plane(self, array: FloatArray | BoolArray, index: int) -> FloatArray:
        """One slice as a picture: rows along the vertical axis."""
        taken = np.take(array, index, axis=self.axis)
        return np.asarray(taken.T if self.horizontal < self.vertical else taken, np.float32)

    def limits(self, ax: Axes, window: Window) -> None:
        """Cut a panel to a window, and turn it the right way."""
        left, right = window[self.horizontal].start - 0.5, window[self.horizontal].stop - 0.5
        low, high = window[self.vertical].start - 0.5, window[self.vertical].stop - 0.5
        ax.set_xlim(*((right, left) if self.flip_horizontal else (left, right)))
        ax.set_ylim(*((high, low) if self.flip_vertical else (low, high)))

    def rectangle(self, start: tuple[int, int], stop: tuple[int, int]) -> tuple[tuple[float, float], float, float]:
        """Corner, width and height of a box whose intervals are along the in-plane axes in ascending order."""
        h, v = (0, 1) if self.horizontal < self.vertical else (1, 0)
        return (start[h] - 0.5, start[v] - 0.5), stop[h] - start[h], stop[v] - start[v]


def draw_assessment(
    scan: Volume,
    labels: Volume,
    result: AssessmentResult,
    path: Path,
    *,
    slices: int = 4,
    structures: Sequence[Structure] | None = None,
) -> None:
    """Draw the slices to look at first: above, the scan with the mask's contours; below, with errors and boxes.

    Each structure has one colour, for its contour and its error boxes (of the extracted errors, which leave the
    contour's observer variability out: paper, section 3.4). The heat is the largest error probability of
    all structures. The picture is cut to the masks and likely errors.

    Args:
        scan: the scan.
        labels: the assessed label map, on the scan's grid.
        result: the assessment and its error maps (L, n0, n1, n2).
        path: the picture; its suffix (.png, .pdf, .svg) decides the format.
        slices: the number of slices.
        structures: the assessed structures, in the assessment's order; without them, one contour runs around all.
    """
    assessment = result.assessment
    masks = np.stack([s.mask(labels.array) for s in structures] if structures else [labels.array > 0])
    error = result.errors.max(axis=0)
    view = View.of(scan, assessment.through_plane_axis)
    window = window_around(masks.any(axis=0) | (error >= 0.5), scan.spacing_mm)
    low, high = np.percentile(scan.array[window], (1, 99))
    chosen = assessment.worst_slices(slices)
    width = 2.6 * max(len(chosen), 2) + 1.2  # inches
    figure = Figure(figsize=(width, 6.4), layout="constrained", facecolor="white")
    figure.suptitle(textwrap.fill(_headline(assessment), int(width * _LETTERS_PER_INCH)), fontsize=10)
    axes = figure.subplots(2, len(chosen), squeeze=False)
    for column, index in enumerate(chosen):
        for row in range(2):
            ax = axes[row, column]
            grey = view.plane(scan.array, index)
            ax.imshow(grey, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", aspect=view.aspect)
            if row == 1:
                ax.imshow(view.plane(error, index), cmap=HEAT, vmin=0, vmax=1, origin="lower", aspect=view.aspect)
            for number, mask in enumerate(masks):
                contour(ax, view.plane(mask, index), _colour(number))
            view.limits(ax, window)
            ax.set_xticks([])
            ax.set_yticks([])
        axes[0, column].set_title(_slice_title(assessment, index), fontsize=8)
        _boxes(axes[1, column], assessment, index, view)
    axes[0, 0].set_ylabel("mask", fontsize=9)
    axes[1, 0].set_ylabel("likely errors", fontsize=9)
    heat = ScalarMappable(Normalize(0, 1), HEAT)
    figure.colorbar(heat, ax=axes.ravel().tolist(), shrink=0.5, label="error probability", fraction=0.03, pad=0.01)
    _legend(figure, assessment)
    save_figure(figure, path)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def window_around(region: BoolArray, spacing_mm: Sequence[float]) -> Window:
    """The bounding box of a region (n0, n1, n2) with a margin of 15 mm; the whole array where the region is empty."""
    first, second, third = (slice(0, size) for size in region.shape)
    box = bounding_box(region) or (first, second, third)
    return padded_box(box, [int(np.ceil(_MARGIN_MM / spacing)) for spacing in spacing_mm], region.shape)


def contour(ax: Axes, mask: FloatArray, colour: str, *, style: Literal["solid", "dashed", "dotted"] = "solid") -> None:
    """Draw the contour of a mask's plane; an empty one has none."""
    if mask.any():
        ax.contour(
            np.pad(mask, 1),
            levels=[0.5],
            colors=[colour],
            linewidths=1.2,
            linestyles=style,
            extent=(-1, mask.shape[1], -1, mask.shape[0]),
        )


def _boxes(ax: Axes, assessment: Assessment, index: int, view: View) -> None:
    for number, quality in enumerate(assessment.structures):
        for box in quality.extracted.boxes:
            if box.slice_index == index:
                corner, width, height = view.rectangle(box.start, box.stop)
                ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=_colour(number), linestyle="--"))


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _headline(assessment: Assessment) -> str:
    parts = [f"{q.name} {_number(q.estimated.dice)}{_between(q)}" for q in assessment.structures if q.present]
    return f"{assessment.scan}: estimated Dice " + (", ".join(parts) if parts else "undefined (no structure)")


def _between(quality: StructureQuality) -> str:
    """The interval of the Dice, in brackets."""
    return f" ({quality.intervals.dice or 'no interval: not enough data'})"


def _slice_title(assessment: Assessment, index: int) -> str:
    def dice(quality: StructureQuality) -> float | None:
        return next((s.metrics.dice for s in quality.raw.slices if s.index == index), None)

    lines = [f"{q.name} {_number(dice(q))}" for q in assessment.structures if dice(q) is not None]
    return "\n".join([f"slice {index}", *lines])


def _legend(figure: Figure, assessment: Assessment) -> None:
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=_colour(i), label=q.name) for i, q in enumerate(assessment.structures)
    ]
    handles.append(Patch(fill=False, edgecolor="black", linestyle="--", label="error box"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)


def read_curve(path: Path) -> tuple[CurvePoint, ...]:
    """Read the file ``curve.json`` of a training.

    Raises:
        ValueError: if the file is no learning curve.
    """
    return _CURVE.validate_json(path.read_bytes())


def draw_curve(curve: Path, path: Path) -> None:
    """Draw a learning curve: the loss on training batches and, where measured, on the validation cases.

    Args:
        curve: the file ``curve.json`` that a training wrote: a list of `CurvePoint`.
        path: the picture; its suffix decides the format.

    Raises:
        ValueError: if the file is no learning curve.
    """
    history = read_curve(curve)
    figure = Figure(figsize=(6, 3.6), layout="constrained", facecolor="white")
    ax = figure.subplots()
    ax.plot([p.epoch for p in history], [p.train_loss for p in history], color=COLOURS[4], label="training")
    measured = [(p.epoch, p.validation_loss) for p in history if p.validation_loss is not None]
    if measured:
        epochs, losses = zip(*measured, strict=True)
        ax.plot(epochs, losses, color=COLOURS[5], label="validation")
        best = int(np.argmin(losses))
        ax.plot(epochs[best], losses[best], "o", color=COLOURS[5], label=f"best: epoch {epochs[best]}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    ax.set_ylabel("loss")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    save_figure(figure, path)


def is_picture_name(path: Path) -> bool:
    """Whether a file's suffix names a format that pictures are written in.

    Example:
        >>> is_picture_name(Path("a.PNG")), is_picture_name(Path("a.nii.gz")), is_picture_name(Path("a"))
        (True, False, False)
    """
    return path.suffix.lower().removeprefix(".") in FigureCanvasAgg.get_supported_filetypes()


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture; its suffix decides the format."""
    FigureCanvasAgg(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
