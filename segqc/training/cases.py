"""Labelled cases, on disk and in the frame that networks see."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from segqc.errors import SegqcError
from segqc.networks.inference import canonical_scan
from segqc.networks.plan import NetworkPlan, Spacing, Triple
from segqc.quality.variability import variability
from segqc.types import FloatArray, LabelArray, Structure
from segqc.volumes import (
    CanonicalFrame,
    ReadLimits,
    Volume,
    VolumeError,
    canonical_frame,
    read_labels,
    read_scan,
    through_plane_axis,
    to_canonical,
)
from segqc.volumes.intake import content_sha256
from segqc.volumes.slices import Slices, all_but


class TooFewCases(SegqcError):  # noqa: N818 - the finding, not the exception, is what callers name
    """There are not enough labelled cases to train on."""


class CaseError(VolumeError):
    """A case can't be used; names the scan and its files as the user knows them.

    Attributes:
        case: the case's id.
    """

    def __init__(self, case: Case, finding: object) -> None:
        files = f"{case.scan.name}, {case.labels_shown or case.labels}"
        text = str(finding).replace(str(case.labels), case.labels_shown or str(case.labels))
        super().__init__(f"the scan {case.id!r} ({files}) cannot be used: {text}")
        self.case = case.id


@dataclass(frozen=True, slots=True)
class EarlierLabel:
    """A person's label map of a scan that a later one took the place of.

    ``made_of`` is the last network's label map among those that it was made of; None where there is none.
    """

    labels: Path
    made_of: Path | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One annotated scan. Several cases may be of one patient; folds and roles are the patient's.

    ``labels_shown`` is how the user knows the label file, where that is another one. ``content`` is the SHA-256 of the
    scan that the labels are of; a file that holds something else by now is no part of the case. None takes what is
    there. ``limits`` bound what is read.

    A pseudo-label is drawn less often, by its ``weight``, and ``ignored`` is the label map of the voxels that are left
    out of the loss. ``slices`` are those across the through-plane axis that a person has looked at, ascending; None for
    all. The others are left out of the loss, too. ``fetch`` brings the scan's file here where ``scan`` is only its
    name.

    ``observers`` are other people's label maps of the scan, and ``earlier`` those that the labels took the place of:
    the network for people's masks learns from both (`segqc.training.people`).
    """

    id: str
    patient: str
    scan: Path
    labels: Path
    labels_shown: str | None = None
    content: str | None = None
    limits: ReadLimits = field(default_factory=ReadLimits)
    weight: float = 1.0
    ignored: Path | None = None
    slices: Slices | None = None
    fetch: Callable[[], Path] | None = None
    observers: tuple[Path, ...] = ()
    earlier: tuple[EarlierLabel, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether all of its labels are known to be true: only such a case can say what a mask is worth."""
        return self.slices is None and self.ignored is None


@dataclass(frozen=True, slots=True)
class Example:
    """A case in memory, in the network's canonical frame: image (a, b, c), truth and mask as label maps (a, b, c).

    ``mask`` is ``None`` where a network learns to segment. ``weight`` is how often it is drawn, relative to others.
    ``soft`` (L, a, b, c) is the soft output of the mask's source network, for a network that may look at that, too.
    ``ignored`` (a, b, c) is 1 where the truth is not to be believed; None where it is, everywhere.
    """

    case: str
    image: FloatArray
    truth: LabelArray
    mask: LabelArray | None = None
    weight: float = 1.0
    soft: FloatArray | None = None
    ignored: LabelArray | None = None


def label_values(structures: Sequence[Structure]) -> tuple[int, ...]:
    """All label values that the structures are made of, ascending."""
    return tuple(sorted({value for structure in structures for value in structure.values}))


def typical_geometry(cases: Sequence[Case]) -> tuple[Spacing, Triple]:
    """Median spacing and shape of the cases, in the canonical frame.

    Raises:
        CaseError: if a scan can't be used.
    """
    frames = [canonical_frame(_read_scan(case)) for case in cases]
    spacing = np.median([f.canonical_spacing_mm for f in frames], axis=0)
    shape = np.ceil(np.median([f.canonical_shape for f in frames], axis=0)).astype(int)
    return (float(spacing[0]), float(spacing[1]), float(spacing[2])), (int(shape[0]), int(shape[1]), int(shape[2]))


def read_case(case: Case, values: Sequence[int]) -> tuple[Volume, Volume]:
    """Read a case's scan and its labels, checked against each other.

    Raises:
        CaseError: if one of them can't be used.
    """
    scan = _read_scan(case)
    try:
        return scan, read_labels(case.labels, scan=scan, values=values, limits=case.limits)
    except (VolumeError, OSError) as error:
        raise CaseError(case, error) from error


def _read_scan(case: Case, *, again: bool = True) -> Volume:
    path = case.scan
    try:
        path = case.scan if case.fetch is None else case.fetch()
        scan = read_scan(path, limits=case.limits)
        replaced = case.content is not None and case.content != content_sha256(path)
    except (VolumeError, OSError) as error:
        if again and case.fetch is not None and not path.exists():  # it was removed this moment
            return _read_scan(case, again=False)
        raise CaseError(case, error) from error
    if replaced:
        raise CaseError(case, "the scan's file was replaced meanwhile")
    return scan


def whole_cases(cases: Sequence[Case]) -> list[Case]:
    """The cases whose labels were checked as a whole."""
    return [case for case in cases if case.is_whole]


def load_example(case: Case, plan: NetworkPlan, values: Sequence[int]) -> Example:
    """Read a case into the plan's canonical frame.

    Raises:
        CaseError: if the scan or its labels can't be used.
    """
    return _load(case, plan, values)[0]


def load_masked_examples(
    case: Case,
    masks: LabelArray,
    weights: Sequence[float],
    plan: NetworkPlan,
    values: Sequence[int],
    observers: Sequence[LabelArray] = (),
) -> list[Example]:
    """Read a case into the plan's canonical frame, once with each of its masks (n, n0, n1, n2), which share the rest.

    Voxels in which other observers' label maps (n0, n1, n2) differ from its labels are to be ignored.

    Raises:
        CaseError: if the scan or its labels can't be used.
    """
    example, frame = _load(case, plan, values, observers)
    return [
        replace(example, mask=np.asarray(to_canonical(mask, frame, order=0), np.uint8), weight=weight)
        for mask, weight in zip(masks, weights, strict=True)
    ]


def _load(
    case: Case, plan: NetworkPlan, values: Sequence[int], observers: Sequence[LabelArray] = ()
) -> tuple[Example, CanonicalFrame]:
    scan, labels = read_case(case, values)
    if case.slices is not None and max(case.slices) >= scan.shape[through_plane_axis(scan)]:
        raise CaseError(case, f"it has no slice {max(case.slices)}, which is said to be checked")
    example = make_example(case.id, scan, labels, plan, weight=case.weight, slices=case.slices)
    frame = canonical_frame(scan, spacing_mm=plan.spacing_mm)
    if case.ignored is not None:
        try:
            ignored = read_labels(case.ignored, scan=scan, values=(1,), limits=case.limits)
        except (VolumeError, OSError) as error:
            raise CaseError(case, error) from error
        example = replace(example, ignored=np.asarray(to_canonical(ignored.array, frame, order=0), np.uint8))
    if (unsure := variability(labels.array, observers)).any():
        unsure_there = np.asarray(to_canonical(unsure.astype(np.uint8), frame, order=0), np.uint8)
        known = example.ignored
        example = replace(example, ignored=unsure_there if known is None else known | unsure_there)
    if example.ignored is not None and example.ignored.all():
        raise CaseError(case, "no voxel of the networks' spacing lies in what is known of its labels")
    return example, frame


def make_example(
    name: str,
    scan: Volume,
    truth: Volume,
    plan: NetworkPlan,
    mask: LabelArray | None = None,
    weight: float = 1.0,
    slices: Slices | None = None,
) -> Example:
    """Bring a scan, its truth and, for SegQC-Net, a mask of it into the plan's canonical frame.

    Of the truth some slices may be known only; the others are to be ignored.
    """
    frame = canonical_frame(scan, spacing_mm=plan.spacing_mm)
    bring = functools.partial(to_canonical, frame=frame, order=0)
    unknown = None if slices is None else all_but(scan.shape, slices, frame.through_plane_axis)
    return Example(
        case=name,
        image=canonical_scan(scan, frame),
        truth=np.asarray(bring(truth.array), np.uint8),
        mask=None if mask is None else np.asarray(bring(mask), np.uint8),
        weight=weight,
        ignored=None if unknown is None else np.asarray(bring(unknown), np.uint8),
    )
