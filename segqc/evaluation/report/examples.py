"""Example slices: what the mask, the truth, the error map and the boxes of single scans look like."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from segqc.evaluation.report.document import UNDEFINED, Figure
from segqc.plots import HEAT, View, contour, window_around
from segqc.quality.metrics import EmptyRule, SliceMetrics, estimated_slice_metrics, true_slice_metrics
from segqc.quality.ranking import order_slices
from segqc.types import BoolArray, ErrorBox, FloatArray
from segqc.volumes import Volume

PIXELS_PER_INCH = 110
_MASK = "#56B4E9"
_TRUTH = "#F0E442"


@dataclass(frozen=True, slots=True, eq=False)
class ExampleScan:
    """One structure of one scan, on the scan's own grid.

    Attributes:
        scan: the scan, (n0, n1, n2).
        mask, truth: the assessed mask and the true one, of the scan's shape.
        error: error probabilities, of the scan's shape.
        axis: the through-plane axis.
        predicted, true: the boxes of the error map and of the true error.
        estimated_dice, true_dice: the scan's numbers, for the headline.
        label: what the headline starts with (the scan, and who made the mask).
        interval: the estimate's prediction interval.

    Raises:
        ValueError: if shapes differ.
    """

    scan: Volume
    mask: BoolArray
    truth: BoolArray
    error: FloatArray
    axis: int
    predicted: tuple[ErrorBox, ...]
    true: tuple[ErrorBox, ...]
    estimated_dice: float | None
    true_dice: float | None
    label: str
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        shapes = {self.scan.shape, self.mask.shape, self.truth.shape, self.error.shape}
        if len(shapes) != 1:
            raise ValueError(f"{self.label}: scan, mask, truth and error map need one shape, got {sorted(shapes)}")


def pick_examples(estimated: Sequence[float | None], true: Sequence[float | None]) -> tuple[int, int, int]:
    """The indices of the best, the median and the worst estimate: by its absolute error, ties by index.

    With one pair all three are the same; of an even number, the median is the lower one.

    Args:
        estimated: one metric's estimates.
        true: the true values, in the same order; pairs with an undefined number are not chosen.

    Raises:
        ValueError: if the two differ in length or no pair is defined.
    """
    if len(estimated) != len(true):
        raise ValueError(f"examples need as many estimates as true values, got {len(estimated)} and {len(true)}")
    errors = np.abs(np.array(estimated, np.float64) - np.array(true, np.float64))
    defined = int(np.count_nonzero(np.isfinite(errors)))
    if not defined:
        raise ValueError("examples need at least one estimate whose true value is known")
    order = np.argsort(errors, kind="stable")  # NaN last
    return int(order[0]), int(order[(defined - 1) // 2]), int(order[defined - 1])


def draw_example(name: str, title: str, example: ExampleScan, *, slices: int = 4, caption: str = "") -> Figure:
    """Draw the slices that the error map calls worst (paper, section 3.5), as a row of pairs.

    Above, the scan with the contours of mask and truth; below, the error probability, with the boxes of likely errors
    (dashed) and of true ones (solid). The image is cropped to mask, truth and likely errors. Each slice's title has its
    own estimated Dice, uncalibrated, and its true one.

    Args:
        name: the figure's name.
        title: the figure's title.
        example: what to draw.
        slices: how many slices at most.
        caption: the figure's caption.
    """
    axis = example.axis % 3
    view = View.of(example.scan, axis)
    in_plane = tuple(a for a in range(3) if a != axis)
    sums = example.error.sum(axis=in_plane, dtype=np.float64)
    chosen = sorted(int(i) for i in order_slices(sums)[:slices])
    rule = EmptyRule(voxel_volume_mm3=example.scan.voxel_volume_mm3)
    estimated = estimated_slice_metrics(example.mask, example.error, axis, empty=rule)
    true = true_slice_metrics(example.mask, example.truth, axis)
    window = window_around(example.mask | example.truth | (example.error >= 0.5), example.scan.spacing_mm)
    low, high = np.percentile(example.scan.array[window], (1, 99))
    wide = (window[view.horizontal].stop - window[view.horizontal].start) * example.scan.spacing_mm[view.horizontal]
    tall = (window[view.vertical].stop - window[view.vertical].start) * example.scan.spacing_mm[view.vertical]
    height = 2.05 * float(np.clip(tall / wide, 0.4, 1.6))
    canvas = Canvas(
        figsize=(2.05 * max(len(chosen), 2) + 1.0, 2 * height + 1.25), layout="constrained", facecolor="white"
    )
    canvas.suptitle(
        f"{example.label}: estimated Dice {_number(example.estimated_dice)}{_ends(example.interval)}, "
        f"true {_number(example.true_dice)}",
        fontsize=10,
        parse_math=False,  # a $ in a name is a $
    )
    axes = canvas.subplots(2, len(chosen), squeeze=False)
    for column, index in enumerate(chosen):
        above, below = axes[0, column], axes[1, column]
        for ax in (above, below):
            grey = view.plane(example.scan.array, index)
            ax.imshow(grey, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", aspect=view.aspect)
        below.imshow(view.plane(example.error, index), cmap=HEAT, vmin=0, vmax=1, origin="lower", aspect=view.aspect)
        contour(above, view.plane(example.truth, index), _TRUTH)
        contour(above, view.plane(example.mask, index), _MASK)
        _boxes(below, example.true, index, view, _TRUTH, "-")
        _boxes(below, example.predicted, index, view, _MASK, "--")
        for ax in (above, below):
            view.limits(ax, window)
            ax.set_xticks([])
            ax.set_yticks([])
        dice = f"{_slice_dice(estimated, index)}, true {_slice_dice(true, index)}"
        above.set_title(f"slice {index}\nDice est. {dice}", fontsize=8)
    axes[0, 0].set_ylabel("mask and truth", fontsize=9)
    axes[1, 0].set_ylabel("likely errors", fontsize=9)
    heat = ScalarMappable(Normalize(0, 1), HEAT)
    canvas.colorbar(heat, ax=axes.ravel().tolist(), label="error probability", fraction=0.03, pad=0.01, shrink=0.5)
    _draw_legend(canvas)
    return Figure(name, title, _png(canvas), caption)


def _draw_legend(canvas: Canvas) -> None:
    handles = [
        Line2D([], [], color=_MASK, label="mask"),
        Line2D([], [], color=_TRUTH, label="truth"),
        Line2D([], [], color=_MASK, linestyle="--", label="box of a likely error"),
        Line2D([], [], color=_TRUTH, label="box of a true error"),
    ]
    # on grey, as on the scan: the truth's yellow is not seen on white
    legend = canvas.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, facecolor="#4a4a4a")
    for text in legend.get_texts():
        text.set_color("white")


def _boxes(ax: Axes, boxes: Sequence[ErrorBox], index: int, view: View, colour: str, line: str) -> None:
    for box in boxes:
        if box.slice_index == index:
            corner, width, height = view.rectangle(box.start, box.stop)
            ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linestyle=line, linewidth=1.4))


def _slice_dice(metrics: SliceMetrics, index: int) -> str:
    return _number(metrics.at(index).dice) if metrics.counted[index] else UNDEFINED


def _ends(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({_number(interval[0])} to {_number(interval[1])})"


def _number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.2f}"


def _png(canvas: Canvas) -> bytes:
    FigureCanvasAgg(canvas)
    stream = io.BytesIO()
    canvas.savefig(stream, format="png", dpi=PIXELS_PER_INCH, metadata={"Software": None})
    return stream.getvalue()
