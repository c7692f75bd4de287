"""Labelled cases, and the fold and role that each patient gets once and keeps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from segqc.networks import NetworkPlan, Spacing, Triple, canonical_scan
from segqc.placement import Placement, Role
from segqc.types import FloatArray, LabelArray, Structure
from segqc.volumes import Volume, atomic_write, canonical_frame, read_labels, read_scan, to_canonical


class TooFewCases(ValueError):  # noqa: N818 - the finding, not the exception, is what callers name
    """There are not enough labelled cases to train on."""


@dataclass(frozen=True, slots=True)
class Case:
    """One annotated scan. Several cases may be of one patient; folds and roles are the patient's."""

    id: str
    patient: str
    scan: Path
    labels: Path


@dataclass(frozen=True, slots=True)
class Example:
    """A case in memory, in the network's canonical frame: image (a, b, c), truth and mask as label maps (a, b, c).

    ``mask`` is ``None`` where a network learns to segment. ``weight`` is how often it is drawn, relative to others.
    """

    case: str
    image: FloatArray
    truth: LabelArray
    mask: LabelArray | None = None
    weight: float = 1.0


_PLACEMENTS: TypeAdapter[dict[str, Placement]] = TypeAdapter(dict[str, Placement])


def place_patients(
    patients: Sequence[str], path: Path, *, folds: int, validation_share: float, seed: int
) -> dict[str, Placement]:
    """Give each new patient a fold and a role, store them, and return all; stored ones never change.

    Args:
        patients: patient names; duplicates are allowed.
        path: the JSON file that keeps the placements.
        folds: number of folds.
        validation_share: share of the patients that validate and never train; at least one of four or more.
        seed: of the random order in which new patients are placed.
    """
    placed = _PLACEMENTS.validate_json(path.read_bytes()) if path.is_file() else {}
    new = sorted(set(patients) - placed.keys())
    order = np.random.default_rng((seed, len(placed))).permutation(len(new))
    for i in order:
        total = len(placed) + 1
        validating = sum(p.role == "validation" for p in placed.values())
        # ceil - so that four patients already give one to validate with
        wanted = int(np.ceil(total * validation_share)) if total >= 4 else 0
        role: Role = "validation" if validating < wanted else "train"
        counts = [sum(p.fold == k for p in placed.values() if p.role == role) for k in range(folds)]
        placed[new[int(i)]] = Placement(int(np.argmin(counts)), role)
    if new:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_bytes(_PLACEMENTS.dump_json(placed, indent=1))
    return placed


def label_values(structures: Sequence[Structure]) -> tuple[int, ...]:
    """All label values that the structures are made of, ascending."""
    return tuple(sorted({value for structure in structures for value in structure.values}))


def typical_geometry(cases: Sequence[Case]) -> tuple[Spacing, Triple]:
    """Median spacing and shape of the cases, in the canonical frame."""
    frames = [canonical_frame(read_scan(case.scan)) for case in cases]
    spacing = np.median([f.canonical_spacing_mm for f in frames], axis=0)
    shape = np.ceil(np.median([f.canonical_shape for f in frames], axis=0)).astype(int)
    return (float(spacing[0]), float(spacing[1]), float(spacing[2])), (int(shape[0]), int(shape[1]), int(shape[2]))


def read_case(case: Case, values: Sequence[int]) -> tuple[Volume, Volume]:
    """Read a case's scan and its labels, checked against each other."""
    scan = read_scan(case.scan)
    return scan, read_labels(case.labels, scan=scan, values=values)


def load_example(case: Case, plan: NetworkPlan, values: Sequence[int]) -> Example:
    """Read a case into the plan's canonical frame."""
    scan, labels = read_case(case, values)
    return make_example(case.id, scan, labels, plan)


def make_example(
    name: str, scan: Volume, truth: Volume, plan: NetworkPlan, mask: LabelArray | None = None, weight: float = 1.0
) -> Example:
    """Bring a scan, its truth and, for SegQC-Net, a mask of it into the plan's canonical frame."""
    frame = canonical_frame(scan, spacing_mm=plan.spacing_mm)
    bring = functools.partial(to_canonical, frame=frame, order=0)
    return Example(
        case=name,
        image=canonical_scan(scan, frame),
        truth=np.asarray(bring(truth.array), np.uint8),
        mask=None if mask is None else np.asarray(bring(mask), np.uint8),
        weight=weight,
    )
