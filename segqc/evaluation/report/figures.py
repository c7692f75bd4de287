"""The figures of a report, as SVG: the same values give the same bytes, and no display is needed.

Every function takes plain values and returns a `document.Figure`. Undefined numbers are NaN in arrays, and left out. A
method keeps its colour, marker and line in all figures that are given the same `styles_for` mapping.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy import stats

from segqc.evaluation.report.document import MINUS, Figure

Values: TypeAlias = npt.NDArray[np.float64]
# a line style of matplotlib: a name, or an offset with the lengths of dashes and gaps
Line: TypeAlias = str | tuple[int, tuple[int, ...]]

# Okabe and Ito's colours that are seen on white
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES: tuple[Line, ...] = ("-", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_REFERENCE_LINES: tuple[Line, ...] = ((0, (4, 2)), (0, (1, 1)), (0, (6, 2, 1, 2)))
_GREY = "#777777"
_DENSE = 400
_DPI = 150
_SHORT_LABEL = 34
_LABELS_APART = 0.045  # of an axis from 0 to 1: nearer labels of points lie on each other


@dataclass(frozen=True, slots=True)
class Style:
    """How a method is drawn."""

    colour: str
    marker: str
    line: Line


@dataclass(frozen=True, slots=True, eq=False)
class Estimates:
    """A method's estimates of one metric, and the true values, in the same order: (n,) each.

    Raises:
        ValueError: if the two differ in length.
    """

    method: str
    estimated: Values
    true: Values

    def __post_init__(self) -> None:
        _check_same(self.method, self.estimated, self.true)


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """A line through points.

    Attributes:
        label: its name in the legend.
        x, y: (n,) each.
        low, high: the bounds of an interval around y, (n,) each, if there is one: drawn as a band.
        reference: nothing that competes (optimal, random, a published result): drawn grey and dashed.
        marks: a text at every point, or none at all.

    Raises:
        ValueError: if the arrays, or the marks, differ in length, or only one bound is given.
    """

    label: str
    x: Values
    y: Values
    low: Values | None = None
    high: Values | None = None
    reference: bool = False
    marks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"{self.label}: an interval has two bounds, got one")
        _check_same(self.label, self.x, self.y, *(v for v in (self.low, self.high) if v is not None))
        if self.marks and len(self.marks) != len(self.x):
            raise ValueError(f"{self.label}: {len(self.x)} points, but {len(self.marks)} marks")


@dataclass(frozen=True, slots=True)
class ForestEntry:
    """A number with its interval (None where there is none), in a panel."""

    label: str
    value: float
    low: float | None
    high: float | None
    panel: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class StratumCoverage:
    """How often prediction intervals held the truth, in one stratum.

    Attributes:
        stratum: its name.
        nominal: (n,) the levels that the intervals promised, in (0, 1).
        covered: (n,) how many truths lay inside; a mean over resplits need not be whole.
        trials: (n,) out of how many independent ones (patients; not masks, not patients times resplits).

    Raises:
        ValueError: if the arrays differ in length, are empty, or more is covered than was tried.
    """

    stratum: str
    nominal: Values
    covered: Values
    trials: Values

    def __post_init__(self) -> None:
        _check_same(self.stratum, self.nominal, self.covered, self.trials)
        possible = (self.covered >= 0) & (self.covered <= self.trials) & (self.trials > 0)
        if not self.nominal.size or not possible.all():
            raise ValueError(f"{self.stratum}: a coverage needs a level, trials, and 0 <= covered <= trials")

    def observed(self) -> tuple[Values, Values, Values]:
        """The observed coverage, and the bounds of its 95% Clopper-Pearson interval: (n,) each."""
        k, n = self.covered, self.trials
        low = np.where(k > 0, stats.beta.ppf(0.025, np.maximum(k, 1e-9), n - k + 1), 0.0)
        high = np.where(k < n, stats.beta.ppf(0.975, k + 1, np.maximum(n - k, 1e-9)), 1.0)
        return k / n, low, high


def styles_for(methods: Sequence[str]) -> Mapping[str, Style]:
    """Give each method a colour, marker and line of its own (28 of them differ); the first ones are told apart best."""
    return MappingProxyType(
        {
            method: Style(_COLOURS[i % 7], _MARKERS[(i + i // 7) % 7], _LINES[i // 7 % 4])
            for i, method in enumerate(dict.fromkeys(methods))
        }
    )


def scatter(
    name: str,
    title: str,
    estimates: Sequence[Estimates],
    *,
    metric: str = "Dice",
    caption: str = "",
    styles: Mapping[str, Style] | None = None,
) -> Figure:
    """Estimated against true values, a panel per method on common axes; the dashed line is a perfect estimate.

    In a corner: the mean absolute error, Pearson's r and the number of pairs. With over 400 points they are pixels.

    Args:
        name: the figure's name.
        title: the figure's title.
        estimates: one per method; pairs with an undefined number are left out.
        metric: the metric's name, for the axes.
        caption: the figure's caption.
        styles: colours by method.

    Raises:
        ValueError: if there are no estimates.
    """
    if not estimates:
        raise ValueError(f"figure {name} needs the estimates of at least one method")
    styles = styles or styles_for([e.method for e in estimates])
    pairs = [_defined(e.true, e.estimated) for e in estimates]
    values = np.concatenate([np.concatenate(pair) for pair in pairs])
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    margin = 0.05 * (high - low) or 0.05
    columns = min(len(estimates), 3 if len(estimates) in (5, 6, 9) else 4)
    rows = -(-len(estimates) // columns)
    side = {1: 3.4, 2: 3.0, 3: 2.6}.get(columns, 2.1)
    dense = sum(true.size for true, _ in pairs) > _DENSE
    with _canvas(columns * side + 0.5, rows * (side + 0.3) + 0.3) as (canvas, finish):
        axes = canvas.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for ax in axes.flat[len(estimates) :]:
            ax.remove()
        for number, (entry, (true, estimated)) in enumerate(zip(estimates, pairs, strict=True)):
            ax = axes.flat[number]
            ax.plot([0, 1], [0, 1], transform=ax.transAxes, color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
            ax.scatter(
                true,
                estimated,
                s=5 if true.size > _DENSE else 14,
                color=styles[entry.method].colour,
                alpha=0.35 if true.size > _DENSE else 0.6,
                linewidths=0,
                rasterized=dense,
            )
            ax.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
            ax.set_title(entry.method, fontsize=9)
            ax.locator_params(nbins=5)
            _corner(ax, true, estimated)
            lowest = number + columns >= len(estimates)
            ax.tick_params(labelbottom=lowest)
            if lowest:
                ax.set_xlabel(f"true {metric}")
            if number % columns == 0:
                ax.set_ylabel(f"estimated {metric}")
        return Figure(name, title, finish(), caption)


def correction_curves(
    name: str,
    title: str,
    curves: Sequence[Series],
    *,
    unit: Literal["scans", "slices"] = "scans",
    metric: str = "Dice",
    caption: str = "",
    styles: Mapping[str, Style] | None = None,
) -> Figure:
    """The mean true metric of a set as its masks are corrected, one line per order (paper, figures 5 to 9).

    Args:
        name: the figure's name.
        title: the figure's title.
        curves: x is the corrected share, 0 to 1; y the mean over the whole set. Optimal and random are references.
        unit: what is corrected one by one.
        metric: the metric's name.
        caption: the figure's caption.
        styles: colours by order.
    """
    return _lines(name, title, curves, caption, styles, f"{unit} corrected", f"mean true {metric}", percent=True)


def learning_curves(
    name: str,
    title: str,
    curves: Sequence[Series],
    *,
    quantity: str,
    caption: str = "",
    styles: Mapping[str, Style] | None = None,
) -> Figure:
    """What annotation buys, one line per way to annotate.

    Args:
        name: the figure's name.
        title: the figure's title.
        curves: x is the share of the pool's slices that were opened, 0 to 1.
        quantity: what y is.
        caption: the figure's caption.
        styles: colours by curve.
    """
    return _lines(name, title, curves, caption, styles, "slices opened", quantity, percent=True)


def risk_coverage(
    name: str,
    title: str,
    curves: Sequence[Series],
    *,
    risk: str = f"mean 1 {MINUS} Dice of the kept masks",
    caption: str = "",
    styles: Mapping[str, Style] | None = None,
) -> Figure:
    """The risk of the masks that are kept when the worst-looking ones are put aside, one line per method.

    Args:
        name: the figure's name.
        title: the figure's title.
        curves: x is the kept share, 0 to 1; y the risk of what is kept.
        risk: what the risk is.
        caption: the figure's caption.
        styles: colours by method.
    """
    return _lines(name, title, curves, caption, styles, "masks kept, best-looking first", risk, percent=True)


def band_curves(
    name: str,
    title: str,
    curves: Sequence[Series],
    *,
    width: str = "radius of the band (mm)",
    chosen: float | None = None,
    caption: str = "",
    styles: Mapping[str, Style] | None = None,
) -> Figure:
    """Shares as functions of the width of error extraction's band: removed, kept, found, the recall of boxes.

    Args:
        name: the figure's name.
        title: the figure's title.
        curves: x is the band's width, y a share, 0 to 1.
        width: the axis's name with its unit.
        chosen: the width that was chosen (on other cases), drawn as a vertical line.
        caption: the figure's caption.
        styles: colours by curve.
    """
    return _lines(name, title, curves, caption, styles, width, "share", percent=False, chosen=chosen, shares=True)


def precision_recall(
    name: str,
    title: str,
    curves: Sequence[Series],
    *,
    caption: str = "",
    styles: Mapping[str, Style] | None = None,
) -> Figure:
    """Precision and recall of error boxes, points joined over IoU or threshold.

    Args:
        name: the figure's name.
        title: the figure's title.
        curves: x is the recall, y the precision; marks say the IoU or threshold of each point, but where a label would
            lie on another.
        caption: the figure's caption.
        styles: colours by curve.

    Raises:
        ValueError: if there are no curves.
    """
    _check_any(name, curves)
    styles = styles or styles_for([c.label for c in curves if not c.reference])
    columns, legend = _legend_size([c.label for c in curves])
    with _canvas(5.0, 4.7 + legend) as (canvas, finish):
        ax = canvas.subplots()
        recall = np.linspace(0.01, 1, 200)
        for f1 in (0.2, 0.4, 0.6, 0.8):
            with np.errstate(divide="ignore"):
                precision = np.where(2 * recall > f1, f1 * recall / (2 * recall - f1), np.nan)
            ax.plot(recall, np.where(precision <= 1, precision, np.nan), color="#d0d0d0", linewidth=0.8, zorder=1)
            ax.text(1.015, f1 / (2 - f1), f"F1 {f1:.1f}", color=_GREY, fontsize=7, va="center")
        labelled: list[tuple[float, float]] = []
        for number, curve in enumerate(curves):
            _draw(ax, curve, styles, with_markers=True)
            # above the one curve, below the next: neighbours are apart then
            shift, side = ((-3.0, 5.0), "bottom") if number % 2 == 0 else ((3.0, -5.0), "top")
            for x, y, mark in zip(curve.x, curve.y, curve.marks, strict=False):
                crowded = any(abs(x - u) < _LABELS_APART and abs(y - v) < _LABELS_APART for u, v in labelled)
                if crowded or not (np.isfinite(x) and np.isfinite(y)):
                    continue
                labelled.append((x, y))
                text = ax.annotate(
                    mark,
                    (x, y),
                    shift,
                    textcoords="offset points",
                    fontsize=7,
                    ha="right" if number % 2 == 0 else "left",
                    va=side,
                    zorder=5,
                )
                text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", ylabel="precision", aspect="equal")
        canvas.legend(loc="outside lower center", ncols=columns)
        return Figure(name, title, finish(), caption)


def forest(
    name: str,
    title: str,
    intervals: Sequence[ForestEntry],
    *,
    label: str = "MAE",
    references: Mapping[str, float] | None = None,
    reference_label: str = "constant",
    caption: str = "",
    styles: Mapping[str, Style] | None = None,
) -> Figure:
    """A number per method with its interval: a point and a line, methods below each other, panels side by side.

    Args:
        name: the figure's name.
        title: the figure's title.
        intervals: in the order they are drawn, from above.
        label: the number's name, for the axis.
        references: by panel, a value to compare with, drawn as a vertical line.
        reference_label: what that value is.
        caption: the figure's caption.
        styles: colours by method; without them, all are drawn alike.

    Raises:
        ValueError: if there are no intervals.
    """
    if not intervals:
        raise ValueError(f"figure {name} needs at least one interval")
    panels = list(dict.fromkeys(i.panel for i in intervals))
    labels = list(dict.fromkeys(i.label for i in intervals))
    width = min(1.6 + 2.6 * len(panels), 9.6) if len(panels) > 1 else 5.6
    with _canvas(width, 0.9 + 0.27 * len(labels)) as (canvas, finish):
        axes = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, panel in zip(axes, panels, strict=True):
            if references and panel in references:
                ax.axvline(
                    references[panel],
                    color=_GREY,
                    linewidth=1.1,
                    linestyle=(0, (4, 3)),
                    zorder=1,
                    label=reference_label,
                )
            for entry in (i for i in intervals if i.panel == panel):
                y = labels.index(entry.label)
                colour = styles[entry.label].colour if styles and entry.label in styles else _COLOURS[0]
                if entry.low is not None and entry.high is not None:
                    ax.plot([entry.low, entry.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
                ax.plot(entry.value, y, "o", color=colour, markersize=5)
            ax.set_title(panel, fontsize=9)
            ax.set_xlabel(label)
            ax.set_xlim(left=min(0.0, ax.get_xlim()[0]))
            ax.xaxis.set_major_locator(MaxNLocator(5))
            ax.tick_params(axis="y", length=0)
            ax.grid(visible=False, axis="y")
        axes[0].set_yticks(range(len(labels)), labels)
        axes[0].set_ylim(len(labels) - 0.5, -0.5)
        if references:
            canvas.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center")
        return Figure(name, title, finish(), caption)


def coverage(
    name: str,
    title: str,
    strata: Sequence[StratumCoverage],
    *,
    caption: str = "",
    styles: Mapping[str, Style] | None = None,
) -> Figure:
    """How often prediction intervals held the truth, against what they promised; bars are 95% (Clopper and Pearson).

    Strata of one and the same nominal level lie below each other; with several levels, observed is drawn over nominal
    and points that share a level are set side by side.

    Args:
        name: the figure's name.
        title: the figure's title.
        strata: one entry each.
        caption: the figure's caption.
        styles: colours by stratum.

    Raises:
        ValueError: if there are no strata.
    """
    if not strata:
        raise ValueError(f"figure {name} needs the coverage of at least one stratum")
    styles = styles or styles_for([s.stratum for s in strata])
    levels = np.unique(np.concatenate([s.nominal for s in strata]))
    if levels.size == 1:
        return Figure(name, title, _coverage_at(float(levels[0]), strata), caption)
    spread = 0.2 * float(np.diff(levels).min()) / max(1, len(strata) - 1)
    columns, legend = _legend_size([f"{s.stratum} (n = {_whole(s.trials)})" for s in strata], 1)
    with _canvas(5.4, 3.7 + legend) as (canvas, finish):
        ax = canvas.subplots()
        edge = float(levels.min()) - 0.08
        lowest = edge
        ax.plot([edge, 1], [edge, 1], color=_GREY, linewidth=1, linestyle=(0, (4, 3)), label="as promised")
        for number, entry in enumerate(strata):
            style = styles[entry.stratum]
            observed, low, high = entry.observed()
            lowest = min(lowest, float(low.min()))
            ax.errorbar(
                entry.nominal + (number - (len(strata) - 1) / 2) * spread,
                observed,
                yerr=np.stack([observed - low, high - observed]),
                fmt=style.marker,
                color=style.colour,
                markersize=4.5,
                elinewidth=1.2,
                label=f"{entry.stratum} (n = {_whole(entry.trials)})",
            )
        ax.set(xlim=(edge, 1), ylim=(lowest - 0.02, 1.01), xlabel="nominal coverage", ylabel="observed coverage")
        canvas.legend(loc="outside lower center", ncols=columns)
        return Figure(name, title, finish(), caption)


def _coverage_at(level: float, strata: Sequence[StratumCoverage]) -> str:
    with _canvas(5.6, 0.9 + 0.3 * len(strata)) as (canvas, finish):
        ax = canvas.subplots()
        ax.axvline(level, color=_GREY, linewidth=1.1, linestyle=(0, (4, 3)), label=f"as promised: {level:.0%}")
        for number, entry in enumerate(strata):
            observed, low, high = entry.observed()
            ax.errorbar(
                observed,
                np.full(observed.size, number),
                xerr=np.stack([observed - low, high - observed]),
                fmt="o",
                color=_COLOURS[0],
                markersize=5,
                elinewidth=2,
                clip_on=False,
            )
        ax.set_yticks(range(len(strata)), [f"{s.stratum} (n = {_whole(s.trials)})" for s in strata])
        ax.set_ylim(len(strata) - 0.5, -0.5)
        ax.set_xlim(right=1.01)
        ax.set_xlabel("observed coverage")
        ax.grid(visible=False, axis="y")
        canvas.legend(loc="outside lower right")
        return finish()


def _lines(
    name: str,
    title: str,
    curves: Sequence[Series],
    caption: str,
    styles: Mapping[str, Style] | None,
    x_label: str,
    y_label: str,
    *,
    percent: bool,
    chosen: float | None = None,
    shares: bool = False,
) -> Figure:
    _check_any(name, curves)
    styles = styles or styles_for([c.label for c in curves if not c.reference])
    columns, legend = _legend_size([c.label for c in curves], 0 if chosen is None else 1)
    with _canvas(5.4, 3.5 + legend) as (canvas, finish):
        ax = canvas.subplots()
        if chosen is not None:
            ax.axvline(chosen, color=_GREY, linewidth=1.1, linestyle=(0, (1, 1.5)), label=f"chosen: {chosen:g}")
        for curve in curves:
            _draw(ax, curve, styles, with_markers=curve.x.size <= 12)
        if percent:
            ax.set_xlim(0, 1)
            ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        if shares:
            ax.set_ylim(0, 1.03)
        ax.set(xlabel=x_label, ylabel=y_label)
        canvas.legend(loc="outside lower center", ncols=columns)
        return Figure(name, title, finish(), caption)


def _draw(ax: Axes, curve: Series, styles: Mapping[str, Style], *, with_markers: bool) -> None:
    style = styles.get(curve.label) or Style(_GREY, "o", "-")
    if curve.reference:
        greys = sum(line.get_color() == _GREY for line in ax.lines)
        style = Style(_GREY, "o", _REFERENCE_LINES[greys % len(_REFERENCE_LINES)])
    if curve.low is not None and curve.high is not None:
        ax.fill_between(curve.x, curve.low, curve.high, color=style.colour, alpha=0.15, linewidth=0)
    ax.plot(
        curve.x,
        curve.y,
        color=style.colour,
        linestyle=style.line,
        marker=style.marker if with_markers else None,
        markersize=4.5,
        label=curve.label,
        zorder=2 if curve.reference else 3,
    )


def _legend_size(labels: Sequence[str], more: int = 0) -> tuple[int, float]:
    """Columns of the legend below a plot, and its height in inches; ``more`` entries are short."""
    columns = 2 if max(len(label) for label in labels) <= _SHORT_LABEL else 1
    return columns, 0.1 + 0.18 * -(-(len(labels) + more) // columns)


def _corner(ax: Axes, true: Values, estimated: Values) -> None:
    """The numbers, in the one of the two corners off the diagonal that holds fewer points."""
    lines = [f"n = {true.size}"]
    if true.size:
        lines.insert(0, f"MAE {np.abs(true - estimated).mean():.3f}")
        if true.size > 2 and np.ptp(true) > 0 and np.ptp(estimated) > 0:
            lines.insert(1, f"r = {np.corrcoef(true, estimated)[0, 1]:.3f}")
    above = bool(np.count_nonzero(estimated > true) <= true.size / 2)
    ax.text(
        0.04 if above else 0.96,
        0.96 if above else 0.04,
        "\n".join(lines),
        transform=ax.transAxes,
        ha="left" if above else "right",
        va="top" if above else "bottom",
        fontsize=7.5,
        linespacing=1.25,
        bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5},
    )


def _whole(trials: Values) -> str:
    low, high = f"{trials.min():g}", f"{trials.max():g}"
    return low if low == high else f"{low} to {high}"


def _defined(x: Values, y: Values) -> tuple[Values, Values]:
    both = np.isfinite(x) & np.isfinite(y)
    return x[both], y[both]


def _check_same(label: str, *arrays: Values) -> None:
    if any(a.ndim != 1 or a.shape != arrays[0].shape for a in arrays):
        raise ValueError(f"{label}: needs 1-D arrays of one length, got {[a.shape for a in arrays]}")


def _check_any(name: str, curves: Sequence[Series]) -> None:
    if not curves:
        raise ValueError(f"figure {name} needs at least one curve")


@contextmanager
def _canvas(width: float, height: float) -> Iterator[tuple[Canvas, Callable[[], str]]]:
    """A figure of a size in inches, and what turns it into SVG; our style ends with the block."""
    with matplotlib.rc_context(
        {
            "svg.hashsalt": "segqc",  # ids in the file are drawn from it
            "svg.fonttype": "path",  # looks the same without our font
            "font.family": "DejaVu Sans",  # comes with matplotlib
            "font.size": 9.0,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.8,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e4e4e4",
            "grid.linewidth": 0.7,
            "text.parse_math": False,  # a $ in a name is a $
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "lines.linewidth": 1.7,
        }
    ):
        canvas = Canvas(figsize=(width, height), layout="constrained", facecolor="white", dpi=_DPI)
        FigureCanvasSVG(canvas)

        def finish() -> str:
            stream = io.StringIO()
            # the date, or matplotlib's version, would change the bytes of an unchanged figure
            canvas.savefig(stream, format="svg", dpi=_DPI, metadata={"Date": None, "Creator": None})
            return stream.getvalue()

        yield canvas, finish
