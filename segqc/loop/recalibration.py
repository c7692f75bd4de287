"""Intervals from the store's audit draws: what the estimates were worth on scans that were drawn at random."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from segqc.loop.dataset import Dataset
from segqc.networks.assessor import Assessor
from segqc.networks.bundle import FOLDS, model_name
from segqc.networks.model_file import ModelError
from segqc.quality.calibration import MaskCalibration, StructureCalibration
from segqc.quality.intervals import (
    DEFAULT_FLOOR,
    LEVEL,
    ConformalCalibration,
    StructureIntervals,
    patients_needed,
    split_conformal,
)
from segqc.quality.metrics import MetricName
from segqc.quality.stacking import NOTHING_CHOSEN, ChosenEstimate
from segqc.store import assessments, corrections, labels
from segqc.store.records import Actor, CheckedEstimate
from segqc.types import Assessment, MaskKind, StructureQuality, applying

_KIND: Final[MaskKind] = "served"  # audit draws are of scans with the serving network's masks


@dataclass(frozen=True, slots=True)
class Audit:
    """What audit draws say of one structure's estimates by the current pair of networks.

    Attributes:
        structure: its name.
        patients: how many patients have an audited estimate of the Dice.
        estimates: how many audited estimates there are.
        mean_error: mean absolute error of the Dice; None without an audited one.
        with_interval: how many of the estimates came with an interval that applies.
        covered: how many of these intervals held the truth.
        intervals: what intervals are made of, from these draws; None with too few patients.
    """

    structure: str
    patients: int
    estimates: int
    mean_error: float | None
    with_interval: int
    covered: int
    intervals: StructureIntervals | None


def audit(dataset: Dataset, assessor: Assessor, *, simulated: bool = False, level: float = LEVEL) -> tuple[Audit, ...]:
    """Compare the estimates of the current pair of networks, as shown at hand-out, with the corrections of audit draws.

    An estimate belongs to its pair: those of earlier networks say nothing of this one's. Patients that SegQC-Net has
    trained from are left out, as are all draws that are not uniform at random. The draws are from the scans that waited
    at their time, and the intervals are those of such scans.

    Args:
        dataset: the folder.
        assessor: the current SegQC-Net.
        simulated: take a simulated annotator's corrections instead of people's.
        level: of the intervals that are wanted.

    Returns:
        One of each structure, in the model's order.
    """
    segmenter = dataset.segmenter()
    pair = (segmenter.version if segmenter is not None else None, assessor.version)
    with dataset.store.read() as transaction:
        found = corrections.audited(transaction, simulated=simulated)
    seen = set(assessor.card.seen)
    found = [c for c in found if (c.segmenter_version, c.assessor_version) == pair and c.patient not in seen]
    known = assessor.card.calibration or (None,) * len(assessor.structures)
    calibrations = [c.of(_KIND) if c is not None else None for c in known]
    return tuple(
        _audit(structure.name, [c for c in found if c.structure == structure.name], calibration, level)
        for structure, calibration in zip(assessor.structures, calibrations, strict=True)
    )


def _audit(name: str, found: Sequence[CheckedEstimate], calibration: MaskCalibration | None, level: float) -> Audit:
    errors = [
        abs(c.estimated.dice - c.true.dice) for c in found if c.estimated.dice is not None and c.true.dice is not None
    ]
    with_interval = [(applying(c.intervals.dice), c.true.dice) for c in found]
    held = [i.low <= truth <= i.high for i, truth in with_interval if i is not None and truth is not None]
    made = StructureIntervals(
        dice=_conformal("dice", found, calibration),
        arvd=_conformal("arvd", found, calibration),
        rvd=_conformal("rvd", found, calibration),
        drawn="audit",
    )
    patients = len(made.dice.patients)
    enough = calibration is not None and patients >= patients_needed(level)
    return Audit(
        structure=name,
        patients=patients,
        estimates=len(errors),
        mean_error=float(np.mean(errors)) if errors else None,
        with_interval=len(held),
        covered=sum(held),
        intervals=made if enough else None,
    )


def _conformal(
    metric: MetricName, found: Sequence[CheckedEstimate], calibration: MaskCalibration | None
) -> ConformalCalibration:
    earlier: ConformalCalibration | None = None
    if calibration is not None and calibration.intervals is not None:
        earlier = getattr(calibration.intervals, metric)
    chosen: ChosenEstimate = getattr(calibration, metric) if calibration is not None else NOTHING_CHOSEN
    return split_conformal(
        [getattr(c.estimated, metric) for c in found],
        [getattr(c.true, metric) for c in found],
        [c.patient for c in found],
        metric,
        chosen.model,
        earlier.typical_floor if earlier is not None else DEFAULT_FLOOR,
    )


def use(dataset: Dataset, assessor: Assessor, found: Sequence[Audit], actor: Actor) -> int:
    """Publish a bundle with the intervals of audit draws, where there are enough; estimates and versions stay.

    The waiting scans' assessments are the new bundle's at once, with the new intervals; what an annotator was shown
    stays as it was.

    Args:
        dataset: the folder.
        assessor: the current SegQC-Net.
        found: what `audit` found.
        actor: who wants it.

    Returns:
        The number of assessments with new intervals.

    Raises:
        ModelError: if no structure has enough audited patients.
    """
    if all(a.intervals is None for a in found):
        raise ModelError("no structure has enough patients among the audit draws of the current networks")
    calibration = tuple(
        old.with_intervals(_KIND, new.intervals) if new.intervals is not None else old
        for old, new in zip(assessor.card.calibration, found, strict=True)
    )
    updated = assessor.with_card(replace(assessor.card, calibration=calibration))
    waiting = [entry.id for entry in dataset.waiting()]
    count = 0
    with dataset.bundles.workspace() as work:
        path = work / model_name("segqc")
        updated.save(path)
        bundle = dataset.bundle()
        if bundle is not None and (folds := bundle.folds_path()) is not None:
            shutil.copyfile(folds, work / FOLDS)
        reason = "intervals of audit draws"
        with dataset.bundles.publishing({"segqc": path}, actor, reason, even_if_worse=True) as publication:
            for name in waiting:
                start = labels.start_of(publication.transaction, name)
                if start is None or publication.parent is None:
                    continue
                old = assessments.of_bundle(publication.transaction, start.id, publication.parent)
                if old is not None and old.assessor_version == updated.version:
                    assessments.write(publication.transaction, _renewed(old, updated), start.id, publication.number)
                    count += 1
    return count


def _renewed(assessment: Assessment, assessor: Assessor) -> Assessment:
    """The assessment with the intervals that the model gives now; those of a person's mask stay."""
    if assessment.mask_kind == "person":
        return assessment
    level = assessor.settings.interval_level

    def renewed(quality: StructureQuality, calibration: StructureCalibration) -> StructureQuality:
        of_kind = calibration.of(assessment.mask_kind)
        if of_kind.intervals is None:
            return quality
        said = (quality.raw.metrics, quality.witnesses, quality.estimated)
        intervals = of_kind.intervals_of(*said, level=level)
        return replace(quality, intervals=intervals.of_scan(assessment.unlikeness))

    pairs = zip(assessment.structures, assessor.card.calibration, strict=True)
    return replace(assessment, structures=tuple(renewed(q, c) for q, c in pairs))
