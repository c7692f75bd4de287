"""The drift alarm of a bundle: its audited residuals, as they come, against those that calibrate.

A stream of audited residuals belongs to a pair of networks, as audits do. Where the pair's intervals were made of audit
draws, it begins anew: what calibrates cannot raise the alarm.

Each structure has a test of its own, at the level over the number of structures (Bonferroni: the chance that any of
them gives a false alarm is at most the level). The residuals are then those that the structure's intervals are made of,
and the alarm says which estimates are meant. One stream of each scan's worst structure would mix structures whose
errors differ in size, and never see a drift in a structure that is rarely the worst.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segqc.loop.dataset import Dataset
from segqc.networks.bundle import NetworkBundle
from segqc.networks.card import ModelCard
from segqc.networks.model_file import ModelError
from segqc.quality.drift import DriftTest, drift_test
from segqc.quality.intervals import ConformalCalibration
from segqc.store import bundles, corrections
from segqc.store.database import Transaction
from segqc.store.records import CheckedEstimate
from segqc.types import DriftAlarm


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureDrift:
    """The test of one structure's estimates, and when its alarm began; None without one."""

    structure: str
    test: DriftTest
    began_at: dt.datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftWatch:
    """What is needed of a bundle to test its audited residuals; read before a transaction that writes.

    Attributes:
        bundle: the bundle's number.
        segmenter_version: of its segmentation network; None without one.
        card: that of its SegQC-Net.
        level: the probability of a false alarm over the whole stream.
    """

    bundle: int
    segmenter_version: str | None
    card: ModelCard
    assessor_version: str
    level: float


def watch(dataset: Dataset, bundle: NetworkBundle | None) -> DriftWatch | None:
    """What is to be watched of a bundle; None where it has no estimates, or its files are missing or damaged."""
    if bundle is None or not bundle.holds("segqc"):
        return None
    try:
        card = bundle.card("segqc")
    except ModelError:
        return None  # whatever needs the network says so
    versions = {network: entry.version for network, entry in bundle.manifest.networks.items()}
    return DriftWatch(
        bundle=bundle.number,
        segmenter_version=versions.get("segmentation"),
        card=card,
        assessor_version=versions["segqc"],
        level=dataset.settings.models.drift_level,
    )


def watch_serving(dataset: Dataset) -> DriftWatch | None:
    """The same of the bundle that serves."""
    try:
        return watch(dataset, dataset.bundle())
    except ModelError:
        return None


def drift(transaction: Transaction, watched: DriftWatch, *, simulated: bool = False) -> tuple[StructureDrift, ...]:
    """Test the audited residuals of each structure, in the model's order.

    Args:
        transaction: what to read in.
        watched: the bundle.
        simulated: take a simulated annotator's corrections instead of people's.
    """
    pair = (watched.segmenter_version, watched.assessor_version)
    seen = set(watched.card.seen)
    found = [
        c
        for c in corrections.audited(transaction, simulated=simulated)
        if (c.segmenter_version, c.assessor_version) == pair and c.patient not in seen
    ]
    if _is_drawn_from_audits(watched.card):
        newest = bundles.get(transaction, watched.bundle).newest_label
        before = {c.patient for c in found if c.label <= newest}
        found = [c for c in found if c.label > newest and c.patient not in before]
    known = watched.card.calibration or (None,) * len(watched.card.structures)
    tests = []
    for structure, calibration in zip(watched.card.structures, known, strict=True):
        intervals = calibration.of("served").intervals if calibration is not None else None
        made = intervals.dice if intervals is not None else ConformalCalibration("dice", ())
        stream = _first_of_each_patient([c for c in found if c.structure == structure.name])
        level = watched.level / len(watched.card.structures)
        scores = np.array([made.score(estimated, true) for _, estimated, true in stream], np.float64)
        calibrating = made.one_score_each(np.random.default_rng(_seed("masks", *pair, structure.name)))
        test = drift_test(calibrating, scores, level=level, seed=_seed("p-values", *pair, structure.name))
        began_at = stream[test.alarm - 1][0].made_at if test.alarm is not None else None
        tests.append(StructureDrift(structure=structure.name, test=test, began_at=began_at))
    return tuple(tests)


def alarm_of(tests: Sequence[StructureDrift]) -> DriftAlarm | None:
    """The alarm that tests give together; None where none of them gives one."""
    began = [(t.began_at, t) for t in tests if t.began_at is not None]
    if not began:
        return None
    structures = tuple(t.structure for _, t in began)
    return DriftAlarm(min(at for at, _ in began), structures, max(t.test.audited for _, t in began))


def note_drift(transaction: Transaction, watched: DriftWatch) -> DriftAlarm | None:
    """Test a bundle again, after another correction of an audit draw, and keep in the store what it gave.

    The store's history has one event when an alarm begins, and one when it ends as corrections behind it were rejected.
    """
    alarm = alarm_of(drift(transaction, watched))
    bundles.set_drift_alarm(transaction, watched.bundle, alarm)
    return alarm


def _is_drawn_from_audits(card: ModelCard) -> bool:
    intervals = [calibration.of("served").intervals for calibration in card.calibration]
    return any(made is not None and made.drawn == "audit" for made in intervals)


def _first_of_each_patient(found: Sequence[CheckedEstimate]) -> list[tuple[CheckedEstimate, float, float]]:
    """The first audited scan of each patient whose Dice is defined, with the estimated and the true one."""
    first: dict[str, tuple[CheckedEstimate, float, float]] = {}
    for checked in found:
        if checked.estimated.dice is not None and checked.true.dice is not None:
            first.setdefault(checked.patient, (checked, checked.estimated.dice, checked.true.dice))
    return list(first.values())


def _seed(*content: str | None) -> list[int]:
    """A seed that is the same each time somebody looks, and another one for other draws and other networks."""
    return list(hashlib.sha256("\n".join(map(str, content)).encode()).digest())
