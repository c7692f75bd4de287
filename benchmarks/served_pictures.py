"""Where are the estimates most wrong? Pictures of the served masks with the largest errors of the estimated Dice.

For the work folder that ``benchmarks/served.py run`` has left:

    python benchmarks/served_pictures.py hippocampus-4mm --seed 0 --work /tmp/served --label before --out /tmp/pictures

One picture a set, a row for each mask, by the error of the estimated Dice of its worst structure: the slice with the
most wrong voxels, and the slice with the largest estimated error, each as the scan with the contours of mask and truth
and with the error map over it. They show patients' scans: they are written outside the repository only.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import harder_sets
import numpy as np
from harder_sets import HarderScan, Pool
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from segqc.loop.dataset import Dataset
from segqc.loop.scoring import BY_A_NETWORK, assess, current_mask
from segqc.plots import COLOURS, HEAT, View, contour, save_figure, window_around
from segqc.quality.metrics import true_metrics
from segqc.training import LineProgress
from segqc.types import Assessment, BoolArray, FloatArray, PredictionInterval
from segqc.volumes import Volume, read_labels, through_plane_axis

REPOSITORY = Path(__file__).parents[1]
ROWS = 10
_PANEL = 2.0  # inches
_TEXT = 2.4
progress = LineProgress()


@dataclass(frozen=True, slots=True)
class Miss:
    """A served mask and how far its estimates are off.

    Attributes:
        scan, subset: whose mask it is.
        assessment: what the product shows of it.
        true: the true Dice of each structure; None where it is undefined.
    """

    scan: str
    subset: str
    assessment: Assessment
    true: tuple[float | None, ...]

    @property
    def worst(self) -> float:
        """The true Dice of the worst structure."""
        return min((dice for dice in self.true if dice is not None), default=1.0)

    @property
    def error(self) -> float:
        """Estimated less true Dice of the worst structure."""
        return self.assessment.dice - self.worst

    @property
    def words(self) -> str:
        """The numbers beside the pictures."""
        lines = [self.scan, f"({self.subset})", f"worst structure off by {self.error:+.2f}"]
        for quality, true in zip(self.assessment.structures, self.true, strict=True):
            lines += [
                f"{quality.name}:",
                f"   true {_number(true)}, estimated {_number(quality.estimated.dice)}",
                f"   {_interval(quality.intervals.dice, true)}",
            ]
        return "\n".join(lines)


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _interval(interval: PredictionInterval | None, true: float | None) -> str:
    if interval is None:
        return "no interval"
    holds = true is None or interval.low <= true <= interval.high
    return f"interval {interval}{'' if holds else ', does not hold'}"


def worst_misses(dataset: Dataset, pool: Sequence[HarderScan], count: int = ROWS) -> list[Miss]:
    """The served masks of a pool with the largest errors of the estimated Dice, the largest first."""
    found = []
    for waiting in pool:
        assessment, mask = dataset.assessment(waiting.id), dataset.mask(waiting.id)
        if assessment is None or mask is None:
            raise SystemExit(f"{dataset.folder}: {waiting.id} has no estimate; run benchmarks/served.py first")
        scan = dataset.read_scan(dataset.scan(waiting.id))
        labels, truth = read_labels(dataset.store.label_file(mask), scan=scan), _truth(dataset, waiting.id, scan)
        true = tuple(true_metrics(s.mask(labels.array), s.mask(truth.array)).dice for s in dataset.structures)
        found.append(Miss(waiting.id, waiting.subset, assessment, true))
    return sorted(found, key=lambda miss: -abs(miss.error))[:count]


def _truth(dataset: Dataset, name: str, scan: Volume) -> Volume:
    return read_labels(dataset.folder / "truth" / f"{name}.nii.gz", scan=scan)


def draw(dataset: Dataset, misses: Sequence[Miss], title: str, path: Path) -> None:
    """Draw a row for each mask: words, and two slices with contours and with the error map."""
    bundle = dataset.bundle()
    if bundle is None:
        raise SystemExit(f"{dataset.folder}: no networks")
    size = (_TEXT + 4 * _PANEL + 0.5, len(misses) * _PANEL + 1.0)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(len(misses), 5, squeeze=False, width_ratios=[_TEXT / _PANEL, 1, 1, 1, 1])
    for row, miss in zip(axes, misses, strict=True):
        progress.message(f"draws {miss.scan}")
        scan = dataset.read_scan(dataset.scan(miss.scan))
        truth = _truth(dataset, miss.scan, scan)
        _, labels, prediction = current_mask(dataset, dataset.scan(miss.scan), scan, bundle)
        result = assess(bundle, scan, labels, prediction, scan_id=miss.scan, origin=BY_A_NETWORK)
        pairs = [(s.mask(labels.array), s.mask(truth.array)) for s in dataset.structures]
        error = result.errors.max(axis=0)
        wrong = np.any([mask != real for mask, real in pairs], axis=0)
        _draw_row(row, miss, scan, pairs, wrong, error)
    handles = [Line2D([], [], color=COLOURS[i], label=s.name) for i, s in enumerate(dataset.structures)]
    handles += [
        Line2D([], [], color="black", label="mask"),
        Line2D([], [], color="black", linestyle="dotted", label="truth"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    heat = ScalarMappable(Normalize(0, 1), HEAT)
    figure.colorbar(heat, ax=axes[:, -1].tolist(), label="error probability", aspect=30, shrink=0.2, anchor=(0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def _draw_row(
    axes: Sequence[Axes],
    miss: Miss,
    scan: Volume,
    pairs: Sequence[tuple[BoolArray, BoolArray]],
    wrong: BoolArray,
    error: FloatArray,
) -> None:
    """One mask: its words, the slice with the most wrong voxels, and the one with the largest estimated error."""
    axis = through_plane_axis(scan)
    in_plane = tuple(a for a in range(3) if a != axis)
    view = View.of(scan, axis)
    window = window_around(np.any(pairs, axis=(0, 1)), scan.spacing_mm)
    low, high = np.percentile(scan.array[window], (1, 99))
    axes[0].axis("off")
    axes[0].text(0, 0.5, miss.words, fontsize=8.5, va="center", transform=axes[0].transAxes)
    true_slice, estimated_slice = (int(np.argmax(part.sum(axis=in_plane))) for part in (wrong, error))
    titles = ("most wrong voxels", "largest estimated error")
    for column, (index, title) in enumerate(zip((true_slice, estimated_slice), titles, strict=True)):
        for ax, is_map in zip(axes[1 + 2 * column : 3 + 2 * column], (False, True), strict=True):
            grey = view.plane(scan.array, index)
            ax.imshow(grey, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", aspect=view.aspect)
            if is_map:
                ax.imshow(view.plane(error, index), cmap=HEAT, vmin=0, vmax=1, origin="lower", aspect=view.aspect)
            for number, (mask, real) in enumerate(pairs):
                contour(ax, view.plane(mask, index), COLOURS[number])
                contour(ax, view.plane(real, index), COLOURS[number], style="dotted")
            view.limits(ax, window)
            ax.set_xticks([])
            ax.set_yticks([])
            count = int(np.take(wrong, index, axis).sum())
            said = f"error sum {np.take(error, index, axis).sum():.0f}"
            ax.set_title(said if is_map else f"slice {index}: {title}\n{count} wrong voxels", fontsize=7)


def main() -> None:
    """Draw the picture of a set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=harder_sets.DRAWN)
    parser.add_argument("--seed", type=int, choices=harder_sets.SEEDS, default=0)
    parser.add_argument("--pool", choices=get_args(Pool), default="development")
    parser.add_argument("--label", required=True, help="what of the product was measured, as for served.py")
    parser.add_argument("--work", type=Path, required=True, help="the folder that served.py worked in")
    parser.add_argument("--out", type=Path, required=True, help="folder for the picture, outside the repository")
    arguments = parser.parse_args()
    if arguments.out.resolve().is_relative_to(REPOSITORY):
        raise SystemExit(f"{arguments.out}: lies in the repository; pictures of patients do not belong there")
    name, seed, pool = arguments.set, arguments.seed, arguments.pool
    folder = arguments.work / arguments.label / name / f"seed-{seed}" / "dataset"
    if not folder.is_dir():
        raise SystemExit(f"{folder}: no such folder; run benchmarks/served.py with this set, seed and label first")
    dataset = Dataset(folder)
    misses = worst_misses(dataset, harder_sets.load(name).pool(seed, pool))
    title = f"{name}, {pool} pool, {arguments.label}, seed {seed}: the largest errors of the estimated Dice"
    path = arguments.out / f"misses-{arguments.label}-{name}-{seed}-{pool}.png"
    draw(dataset, misses, title, path)
    print(path)


if __name__ == "__main__":
    main()
