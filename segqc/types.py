"""The values that rooms of the library hand to each other.

Conventions, everywhere:

* Arrays are in the scan file's own voxel order, shape ``(n0, n1, n2)``, unless a docstring says "canonical".
* A *slice* is one index along the through-plane axis; its two *in-plane* axes are the other two, in ascending order.
* Boxes are half-open voxel intervals in one slice.
* ``None`` stands for an undefined number (an ARVD over an empty truth), never infinity or NaN.
"""

from __future__ import annotations

import datetime as dt
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

FloatArray: TypeAlias = npt.NDArray[np.float32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
LabelArray: TypeAlias = npt.NDArray[np.uint8]
ComputeName: TypeAlias = Literal["pytorch", "pytorch-bfloat16", "openvino", "openvino-bfloat16", "compile"]
BackendName: TypeAlias = Literal["auto"] | ComputeName
MaskSource: TypeAlias = Literal["network", "person"]
"""Who made a mask: a network's may be wrong anywhere, a person's is right but for a few errors."""
MaskKind: TypeAlias = Literal["served", "strange", "person"]
"""What is known of a mask's origin: made by the bundle's own segmentation network, by another one, or by a person.

Estimates and intervals are calibrated for each kind by itself.
"""


@dataclass(frozen=True, slots=True)
class Structure:
    """A named structure: the union of one or more values of the label map (``hippocampus = [1, 2]``)."""

    name: str
    values: tuple[int, ...]

    def mask(self, labels: npt.NDArray[np.generic], *, out: BoolArray | None = None) -> BoolArray:
        """Return the structure's mask, of the label map's shape; ``out`` is where it is written."""
        mask: BoolArray = np.equal(labels, self.values[0], out=out)
        for value in self.values[1:]:  # a hundred times as fast as np.isin
            mask |= labels == value
        return mask


def structures_of_values(values: Iterable[int]) -> tuple[Structure, ...]:
    """A structure for each label value, ascending: what stands for names where nobody has given any.

    Examples:
        >>> [structure.name for structure in structures_of_values({3, 1})]
        ['label 1', 'label 3']
    """
    return tuple(Structure(f"label {value}", (value,)) for value in sorted(values))


def values_in(labels: LabelArray) -> set[int]:
    """The values that occur in a label map, but for 0 (background)."""
    counts = np.bincount(labels.ravel(order="K"), minlength=1)  # np.unique would sort all voxels
    return {*np.flatnonzero(counts).tolist()} - {0}


def label_names(structures: tuple[Structure, ...]) -> dict[str, int]:
    """Names of the label map's values, as annotation clients show them: ``{name: value}``, values ascending.

    A structure of one value gives it its name. A value that is only part of a union is named after the union and
    itself.
    """
    names: dict[int, str] = {}
    for structure in sorted(structures, key=lambda s: len(s.values)):
        for value in structure.values:
            plain = structure.name if len(structure.values) == 1 else f"{structure.name} {value}"
            names.setdefault(value, plain)
    return {names[value]: value for value in sorted(names)}


def segment_names(structures: tuple[Structure, ...]) -> dict[str, int] | None:
    """The names and values by which the segments that a file names are read; None where nobody named the structures."""
    values = sorted({value for structure in structures for value in structure.values})
    return None if structures == structures_of_values(values) else label_names(structures)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Dice, IoU, ARVD and RVD of a mask against a truth or an estimated truth (paper, section 3.2)."""

    dice: float | None
    iou: float | None
    arvd: float | None
    rvd: float | None


UNLIKE_SHORT: Final = "unlike the training scans"
"""What stands in the place of the intervals of a scan that is marked, see `Unlikeness`."""
UNLIKE: Final = f"{UNLIKE_SHORT}: interval does not apply"
"""What is said of such a scan."""
UNLIKE_LEVEL: Final = 0.1
"""The largest p-value of a marked scan: that share of scans which are like the training's are marked, too."""


@dataclass(frozen=True, slots=True)
class Unlikeness:
    """How unlike the scans of the training a scan is.

    Attributes:
        score: the distance of its features from theirs, in the training scans' own; 1 is usual.
        p_value: conformal: how rarely a scan that is like theirs has such a score; None with too few patients for any
            scan to be marked.
    """

    score: float
    p_value: float | None

    @property
    def is_marked(self) -> bool:
        """Whether the scan is unlike the training's beyond `UNLIKE_LEVEL`: nothing is promised of its intervals."""
        return self.p_value is not None and self.p_value <= UNLIKE_LEVEL


@dataclass(frozen=True, slots=True)
class PredictionInterval:
    """Where the true metric lies with probability ``level``, on average over patients; as text, ``0.82-0.91``.

    One that does not apply is of a scan that is unlike those of the training (`Unlikeness`). It is kept, but nothing is
    promised of it: whatever shows intervals shows `applying` or `bounds`, or the text.
    """

    low: float
    high: float
    level: float
    applies: bool = True

    def __str__(self) -> str:
        if not self.applies:
            return UNLIKE_SHORT
        between = " to " if self.low < 0 else "-"
        return f"{self.low:.2f}{between}{self.high:.2f}"


def applying(interval: PredictionInterval | None) -> PredictionInterval | None:
    """The interval, if there is one and it applies."""
    return interval if interval is not None and interval.applies else None


def bounds(interval: PredictionInterval | None) -> dict[str, float] | None:
    """An interval in answers and JSON, ``{"low": 0.82, "high": 0.91, "level": 0.9}``; None without one that applies."""
    shown = applying(interval)
    return None if shown is None else {"low": shown.low, "high": shown.high, "level": shown.level}


@dataclass(frozen=True, slots=True)
class MetricIntervals:
    """Prediction intervals of the four 3D metrics; None stands for "not enough data", or an undefined estimate."""

    dice: PredictionInterval | None = None
    iou: PredictionInterval | None = None
    arvd: PredictionInterval | None = None
    rvd: PredictionInterval | None = None

    def of_scan(self, unlikeness: Unlikeness | None) -> MetricIntervals:
        """The same intervals of a scan that is as unlike the training's: where it is marked, they do not apply."""
        applies = unlikeness is None or not unlikeness.is_marked
        of_metrics = (self.dice, self.iou, self.arvd, self.rvd)
        return MetricIntervals(*(None if i is None else replace(i, applies=applies) for i in of_metrics))


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskDice:
    """The true Dice of a mask of a scan, from 0 to 1, and whose scan it is."""

    patient: str
    scan: str
    dice: float


@dataclass(frozen=True, slots=True)
class DriftAlarm:
    """The estimated Dice errs more on audit draws than its calibration knows.

    Attributes:
        began_at: when the correction came that raised the alarm.
        structures: those whose estimates are meant.
        patients: how many audited patients there are by now.
    """

    began_at: dt.datetime
    structures: tuple[str, ...]
    patients: int


@dataclass(frozen=True, slots=True)
class SliceQuality:
    """One slice: its metrics and the sum of the error probability over its voxels (what slices are ranked by)."""

    index: int
    metrics: Metrics
    error_sum: float


@dataclass(frozen=True, slots=True)
class ErrorBox:
    """A likely error in one slice: half-open voxel intervals along the two in-plane axes.

    ``mask_share`` is the share of its likely wrong voxels that lie in the mask: above a half, the structure seems to be
    wrongly included there, else to be missing; None where no mask is known. ``evidence`` is the largest logit of an
    error that a voxel and its four neighbours in the slice all reach: a thin seam along a contour has little, however
    likely each of its voxels is; None where no error map is known.
    """

    slice_index: int
    start: tuple[int, int]
    stop: tuple[int, int]
    area_mm2: float
    mean_error: float
    peak_error: float
    mask_share: float | None = None
    evidence: float | None = None


@dataclass(frozen=True, slots=True)
class ErrorView:
    """What one error map says of one structure: in 3D, in every slice, and as boxes."""

    metrics: Metrics
    slices: tuple[SliceQuality, ...]
    boxes: tuple[ErrorBox, ...]


@dataclass(frozen=True, slots=True)
class Witnesses:
    """What speaks of one structure's mask beside the error map, the higher the better; None where it is not known.

    Attributes:
        soft: the Dice of the mask against the soft output of the network that made it.
        entropy: minus the entropy of that output, in nats per voxel of the mask.
        size: minus the distance of the mask's log volume from the training's mean, in standard deviations.
    """

    soft: float | None = None
    entropy: float | None = None
    size: float | None = None


NO_WITNESSES: Final = Witnesses()


@dataclass(frozen=True, slots=True)
class StructureQuality:
    """The assessment of one structure.

    ``estimated`` are the numbers to show, made of ``raw`` and ``witnesses`` by the model's calibration.
    ``raw`` is read off the error map as it is, ``extracted`` off the map after error extraction (paper, section 3.3).
    ``intervals`` belong to ``estimated``.
    """

    name: str
    present: bool
    mask_volume_ml: float
    estimated: Metrics
    raw: ErrorView
    extracted: ErrorView
    intervals: MetricIntervals = MetricIntervals()
    witnesses: Witnesses = NO_WITNESSES


@dataclass(frozen=True, slots=True)
class Assessment:
    """What SegQC-Net says of one mask of one scan, which model versions said it, and which backend computed it.

    ``mask_kind`` says which of the model's calibrations estimates and intervals are by. ``unlikeness`` is None where
    the model has nothing to compare the scan with; the intervals know whether they apply.
    """

    scan: str
    mask_sha256: str
    segmenter_version: str | None
    assessor_version: str
    through_plane_axis: int
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    structures: tuple[StructureQuality, ...]
    backend: ComputeName = "pytorch"
    mask_kind: MaskKind = "strange"
    unlikeness: Unlikeness | None = None

    @property
    def is_unlike(self) -> bool:
        """Whether the scan is marked as unlike the training's."""
        return self.unlikeness is not None and self.unlikeness.is_marked

    @property
    def dice(self) -> float:
        """The scan's score: the worst present structure's estimated Dice; 1.0 where no structure is present."""
        worst = self._worst()
        return 1.0 if worst is None or worst.estimated.dice is None else worst.estimated.dice

    @property
    def dice_interval(self) -> PredictionInterval | None:
        """The interval of `dice`: the worst present structure's own; None without one."""
        worst = self._worst()
        return None if worst is None else worst.intervals.dice

    def _worst(self) -> StructureQuality | None:
        present = [(q.estimated.dice, q) for q in self.structures if q.present and q.estimated.dice is not None]
        return min(present, key=lambda pair: pair[0], default=(1.0, None))[1]

    @property
    def error_volume_ml(self) -> float:
        """The estimated volume of all structures' errors: the sum of the error probabilities, in ml."""
        voxel_ml = math.prod(self.spacing_mm) / 1000.0
        return voxel_ml * sum(s.error_sum for quality in self.structures for s in quality.raw.slices)

    def worst_slices(self, count: int = 5) -> tuple[int, ...]:
        """Slices to look at first: largest error sum over all structures first (paper, section 3.5)."""
        if not self.structures:
            return ()
        sums = np.sum([[s.error_sum for s in q.raw.slices] for q in self.structures], axis=0)
        order = np.argsort(-sums, kind="stable")[:count]
        return tuple(self.structures[0].raw.slices[int(i)].index for i in order)

    def to_json(self) -> str:
        """Return the assessment as one line of JSON; `from_json` gives it back without loss."""
        return _adapter().dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Assessment:
        """Read what `to_json` wrote.

        Raises:
            ValueError: if the text is not an assessment.
        """
        return _adapter().validate_json(text)


@functools.cache
def _adapter() -> TypeAdapter[Assessment]:
    return TypeAdapter(Assessment)
