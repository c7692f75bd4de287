"""Each method's predictions for each mask, and the truth: all numbers that experiments are made of.

Axes of arrays: M masks, L structures, R slices of all masks one after the other, 4 metrics in the order of
`segqc.quality.metrics.METRIC_NAMES`. NaN stands for what is undefined, or what a method says nothing of.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from segqc.evaluation.data.settings import EvaluationSettings
from segqc.evaluation.data.storage import Format, load_arrays, save_arrays
from segqc.evaluation.methods.estimates import AssessedMask, Estimator, slice_sums
from segqc.quality.boxes import BoxSettings, find_boxes
from segqc.quality.error_counts import STEPS, ErrorMapCounts, SignedCounts, count_voxels
from segqc.quality.error_maps import difference, extract_errors
from segqc.quality.metrics import METRIC_NAMES, SliceMetrics, Values, true_metrics, true_slice_metrics
from segqc.types import BoolArray, ErrorBox, FloatArray, Metrics, Structure
from segqc.volumes import Volume, through_plane_axis

Counts: TypeAlias = npt.NDArray[np.int32]
BoxRows: TypeAlias = npt.NDArray[np.int32]  # mask, structure, extracted, threshold's number, slice, start0, start1, ...

Maps: TypeAlias = Literal["all", "extracted boxes"]

RAW, EXTRACTED = 0, 1


@dataclass(frozen=True, slots=True, eq=False)
class KnownMask:
    """A mask whose truth is known: its patient, the assessed mask, whether a network made it at an early epoch."""

    id: str
    patient: str
    assessed: AssessedMask
    truth: Volume
    early: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Truths:
    """What is true of the masks of an experiment.

    Attributes:
        masks, patients: the masks' ids, and whose they are.
        early: (M,) whether a network made it at an early epoch of its training.
        metrics: (M, L, 4).
        slices: (R, L, 4).
        voxels: (R, L, 3): in the mask, in the truth, in both.
        mask_of: (R,) which mask each slice is of.
        boxes: of D and of extracted D.
    """

    masks: tuple[str, ...]
    patients: tuple[str, ...]
    early: BoolArray
    metrics: Values
    slices: Values
    voxels: Values
    mask_of: npt.NDArray[np.intp]
    boxes: BoxRows

    @property
    def slice_patients(self) -> tuple[str, ...]:
        """The patient of each slice."""
        return tuple(self.patients[int(m)] for m in self.mask_of)


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """One method's predictions for the masks of an experiment.

    Attributes:
        metrics: (M, L, 4).
        slices: (R, L, 4).
        slice_error_score: (R, L).
        slice_error_score_extracted: (R, L) sums of the error map after error extraction.
        slice_truth: (R, L) voxels of the estimated truth.
        scan_error_score: (M, L).
        boxes: before and after error extraction, at each threshold.
        counts: (M, L, 2 signs, wrong or right, probability steps); no rows where the method has no map.
        counts_extracted: the same after error extraction, against the extracted D.
        seconds: (M,) what the estimate took, on this machine.
    """

    metrics: Values
    slices: Values
    slice_error_score: Values
    slice_error_score_extracted: Values
    slice_truth: Values
    scan_error_score: Values
    boxes: BoxRows
    counts: Counts
    counts_extracted: Counts
    seconds: Values


def predict(
    masks: Iterator[KnownMask] | Sequence[KnownMask],
    estimator: Estimator,
    structures: Sequence[Structure],
    settings: EvaluationSettings,
    largest_boxes_mm2: Mapping[str, float],
    *,
    maps: Maps = "all",
) -> Predictions:
    """Let a method predict the quality of masks.

    Args:
        masks: the masks.
        estimator: the method.
        structures: what it assesses.
        settings: of boxes and error extraction.
        largest_boxes_mm2: the largest box of the training errors by structure, which bounds predicted ones.
        maps: what to look at in the error maps, beside the numbers; the boxes after error extraction are enough to
            choose their threshold by.
    """
    by_mask = [
        _predict_mask(number, known, estimator, structures, settings, largest_boxes_mm2, maps)
        for number, known in enumerate(masks)
    ]
    return Predictions(
        *(np.concatenate([getattr(j, name) for j in by_mask]) for name in Predictions.__dataclass_fields__)
    )


def find_truths(masks: Iterator[KnownMask] | Sequence[KnownMask], structures: Sequence[Structure],
                settings: EvaluationSettings) -> Truths:  # fmt: skip
    """What is true of masks."""
    names, patients, early, metrics, slices, voxels, mask_of = [], [], [], [], [], [], []
    boxes = list[tuple[int, ...]]()
    for number, known in enumerate(masks):
        scan = known.assessed.scan
        axis = through_plane_axis(scan)
        pairs = [(s.mask(known.assessed.labels.array), s.mask(known.truth.array)) for s in structures]
        names.append(known.id)
        patients.append(known.patient)
        early.append(known.early)
        metrics.append([_row(true_metrics(mask, truth)) for mask, truth in pairs])
        length = scan.array.shape[axis]
        by_slice = [true_slice_metrics(mask, truth, axis) for mask, truth in pairs]
        slices.append(np.stack([_slice_rows(s, length) for s in by_slice], axis=1))
        voxels.append(np.stack([_voxels(mask, truth, axis) for mask, truth in pairs], axis=1))
        mask_of.append(np.full(length, number))
        for k, (mask, truth) in enumerate(pairs):
            raw, extracted = true_errors(mask, truth, axis, scan, structures[k], settings)
            unbounded = _box_settings(settings, np.inf, settings.boxes.threshold)
            for kind, error in ((RAW, raw), (EXTRACTED, extracted)):
                found = find_boxes(error, axis, scan.spacing_mm, unbounded)
                boxes += [(number, k, kind, 0, *_box_row(box)) for box in found]
    return Truths(
        tuple(names),
        tuple(patients),
        np.array(early, bool),
        np.array(metrics, np.float64),
        np.concatenate(slices),
        np.concatenate(voxels),
        np.concatenate(mask_of).astype(np.intp),
        np.array(boxes, np.int32).reshape(-1, 9),
    )


def true_errors(
    mask: BoolArray, truth: BoolArray, axis: int, scan: Volume, structure: Structure, settings: EvaluationSettings
) -> tuple[BoolArray, BoolArray]:
    """D, and what error extraction leaves of it."""
    wrong = difference(mask, truth)
    extraction = settings.extraction.for_structure(structure.name)
    return wrong, extract_errors(wrong, mask, axis, scan.spacing_mm, extraction)


def boxes_of(rows: BoxRows, masks: int, structure: int, kind: int, threshold: int = 0) -> list[list[ErrorBox]]:
    """The boxes of one structure, by mask."""
    found: list[list[ErrorBox]] = [[] for _ in range(masks)]
    chosen = rows[(rows[:, 1] == structure) & (rows[:, 2] == kind) & (rows[:, 3] == threshold)]
    for mask, _, _, _, index, a0, a1, b0, b1 in chosen.tolist():
        # how boxes meet depends on their corners only
        found[mask].append(ErrorBox(index, (a0, a1), (b0, b1), float((b0 - a0) * (b1 - a1)), 0.0, 0.0))
    return found


def map_counts(counts: Counts, structure: int) -> list[SignedCounts]:
    """The counted voxels of one structure, by mask."""
    return [
        SignedCounts(*(ErrorMapCounts(*(tuple(steps.tolist()) for steps in sign)) for sign in mask[structure]))
        for mask in counts
    ]


def save(path: Path, values: Truths | Predictions) -> None:
    """Write arrays as one file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_arrays({name: np.array(getattr(values, name)) for name in values.__dataclass_fields__}, path)


def load_predictions(path: Path) -> Predictions:
    """Read what `save` wrote."""
    return Predictions(**load_arrays(path))


def load_truths(path: Path) -> Truths:
    """Read what `save` wrote."""
    columns = load_arrays(path)
    masks, patients = (tuple(str(n) for n in columns.pop(name)) for name in ("masks", "patients"))
    return Truths(masks=masks, patients=patients, **columns)


PREDICTIONS: Format[Predictions] = Format(load_predictions, lambda value, path: save(path, value))
TRUTHS: Format[Truths] = Format(load_truths, lambda value, path: save(path, value))


def _predict_mask(
    number: int,
    known: KnownMask,
    estimator: Estimator,
    structures: Sequence[Structure],
    settings: EvaluationSettings,
    largest_boxes_mm2: Mapping[str, float],
    maps: Maps,
) -> Predictions:
    """What a method says of the mask of this number."""
    started = time.perf_counter()
    estimates = estimator.estimate(known.assessed)
    seconds = time.perf_counter() - started
    scan = known.assessed.scan
    length = scan.array.shape[through_plane_axis(scan)]
    found = [
        _look(known, e.error, structure, settings, largest_boxes_mm2.get(structure.name, np.inf), maps)
        for e, structure in zip(estimates, structures, strict=True)
        if e.error is not None
    ]
    looks = found if len(found) == len(structures) else []
    boxes = [(number, k, *box) for k, look in enumerate(looks) for box in look.boxes]
    counted = maps == "all" and bool(looks)

    def by_slice(columns: Sequence[Values]) -> Values:
        return np.stack(columns, axis=1)

    return Predictions(
        metrics=np.array([[_row(e.metrics) for e in estimates]], np.float64),
        slices=by_slice([_slice_rows(e.slices, length) for e in estimates]),
        slice_error_score=by_slice([_or_nan(e.slice_error_score, length) for e in estimates]),
        slice_error_score_extracted=by_slice([look.sums_extracted for look in looks])
        if counted
        else np.full((length, len(structures)), np.nan),
        slice_truth=by_slice([_or_nan(e.slices.truth_voxels if e.slices else None, length) for e in estimates]),
        scan_error_score=np.array(
            [[np.nan if e.scan_error_score is None else e.scan_error_score for e in estimates]], np.float64
        ),
        boxes=np.array(boxes, np.int32).reshape(-1, 9),
        counts=_stack_counts([look.counts for look in looks] if counted else [], structures),
        counts_extracted=_stack_counts([look.counts_extracted for look in looks] if counted else [], structures),
        seconds=np.array([seconds]),
    )


def _stack_counts(counts: Sequence[Counts], structures: Sequence[Structure]) -> Counts:
    """The counts of one mask as a row; no row where there are none."""
    return np.stack(counts)[None] if counts else np.empty((0, len(structures), 2, 2, STEPS + 1), np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class _Look:
    """What a structure's error map shows: boxes, voxels by probability, each slice's sum after error extraction.

    ``boxes`` are the last seven numbers of `BoxRows`. Where only boxes after error extraction are asked for, nothing is
    counted.
    """

    boxes: list[tuple[int, ...]]
    counts: Counts
    counts_extracted: Counts
    sums_extracted: Values


def _look(
    known: KnownMask,
    error: FloatArray,
    structure: Structure,
    settings: EvaluationSettings,
    largest_mm2: float,
    maps: Maps,
) -> _Look:
    """Find the boxes of an error map, and count its voxels, before and after error extraction."""
    scan = known.assessed.scan
    axis = through_plane_axis(scan)
    mask, truth = structure.mask(known.assessed.labels.array), structure.mask(known.truth.array)
    extracted = extract_errors(error, mask, axis, scan.spacing_mm, settings.extraction.for_structure(structure.name))
    looked_at = [(EXTRACTED, extracted)] if maps == "extracted boxes" else [(RAW, error), (EXTRACTED, extracted)]
    boxes = [
        (kind, t, *_box_row(box))
        for kind, values in looked_at
        for t, threshold in enumerate(settings.box_thresholds)
        for box in find_boxes(values, axis, scan.spacing_mm, _box_settings(settings, 2 * largest_mm2, threshold))
    ]
    if maps == "extracted boxes":
        none = np.empty(0, np.int32)
        return _Look(boxes, none, none, np.empty(0))
    wrong, wrong_extracted = true_errors(mask, truth, axis, scan, structure, settings)
    return _Look(
        boxes,
        _counted(error, wrong, mask),
        _counted(extracted, wrong_extracted, mask),
        slice_sums(extracted, axis),
    )


def _counted(error: FloatArray, wrong: BoolArray, mask: BoolArray) -> Counts:
    found = count_voxels(np.clip(error, 0, 1), wrong, mask)
    return np.array(
        [[c.wrong, c.right] for c in (found.false_positive, found.false_negative)], np.int32
    )  # fmt: skip


def _box_settings(settings: EvaluationSettings, largest_mm2: float, threshold: float) -> BoxSettings:
    b = settings.boxes
    return BoxSettings(threshold, b.min_distance_voxels, b.min_area_mm2, float(largest_mm2), b.max_slice_share)


def _box_row(box: ErrorBox) -> tuple[int, ...]:
    return (box.slice_index, *box.start, *box.stop)


def _row(metrics: Metrics) -> list[float]:
    return [np.nan if (v := getattr(metrics, name)) is None else float(v) for name in METRIC_NAMES]


def _slice_rows(slices: SliceMetrics | None, length: int) -> Values:
    if slices is None:
        return np.full((length, len(METRIC_NAMES)), np.nan)
    return np.stack([getattr(slices, name) for name in METRIC_NAMES], axis=1)


def _or_nan(values: Values | None, length: int) -> Values:
    return np.full(length, np.nan) if values is None else values


def _voxels(mask: BoolArray, truth: BoolArray, axis: int) -> Values:
    in_plane = tuple(a for a in range(3) if a != axis)
    counts = [np.count_nonzero(x, axis=in_plane) for x in (mask, truth, mask & truth)]
    return np.asarray(np.stack(counts, axis=1), np.float64)
