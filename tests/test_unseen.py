"""Estimates of masks of unseen patients: nothing of a patient goes into the estimates of its masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from segqc.progress import NoProgress
from segqc.quality.error_counts import SignedCounts
from segqc.quality.report_card import UnseenMask, report_card
from segqc.training.unseen import CalibrationMasks, ServedMask, unseen_masks
from segqc.types import Metrics, Structure

STRUCTURES = (Structure("s0", (1,)), Structure("s1", (2,)))
MASKS = 4  # of each patient, to calibrate on


def metrics(dice: float) -> Metrics:
    return Metrics(dice, dice / (2 - dice), 1 - dice, 0.5 - dice)


def of_patients(
    count: int, seed: int = 0, *, bias: float = 0.2
) -> tuple[list[list[ServedMask]], list[CalibrationMasks]]:
    """Served masks and masks to calibrate on, of estimates that are too low by a bias."""
    rng = np.random.default_rng(0)
    served, fitted = [], []
    for _ in STRUCTURES:
        true = rng.uniform(0.5, 0.95, (count, MASKS + 1))
        raw = np.clip(true - bias + rng.normal(0, 0.02, true.shape), 0, 1)
        served.append([
            ServedMask(f"p{i}", f"scan {i}", metrics(raw[i, 0]), metrics(true[i, 0]), SignedCounts(), true[i, 0])
            for i in range(count)
        ])  # fmt: skip
        flat = [(i, k) for i in range(count) for k in range(1, MASKS + 1)]
        estimates, truths = ([metrics(float(a[i, k])) for i, k in flat] for a in (raw, true))
        fitted.append(CalibrationMasks(estimates, truths, [f"p{i}" for i, _ in flat]))
    return served, fitted


def estimates(count: int, served: list[list[ServedMask]], fitted: list[CalibrationMasks]) -> list[UnseenMask]:
    found = unseen_masks(STRUCTURES, served, fitted, NoProgress())
    assert {(m.patient, m.structure) for m in found} == {(f"p{i}", s.name) for i in range(count) for s in STRUCTURES}
    assert len(found) == count * len(STRUCTURES)
    return found


@pytest.mark.parametrize("count", [12, 25])
def test_what_is_known_of_a_patient_changes_nothing_in_its_own_estimate(count: int) -> None:
    served, fitted = of_patients(count)
    before = {(m.patient, m.structure): m for m in estimates(count, served, fitted)}
    absurd = [
        replace(f, truths=[metrics(0.01) if p == "p3" else t for p, t in zip(f.patients, f.truths, strict=True)])
        for f in fitted
    ]
    after = {(m.patient, m.structure): m for m in estimates(count, served, absurd)}
    for structure in STRUCTURES:
        mine = ("p3", structure.name)
        assert after[mine] == before[mine]
        assert after["p0", structure.name] != before["p0", structure.name], "others are calibrated by it"


def test_the_lines_of_the_others_are_used_and_the_intervals_hold() -> None:
    served, fitted = of_patients(40, bias=0.2)
    found = estimates(40, served, fitted)
    errors = [abs(m.estimated.dice - m.true.dice) for m in found if m.estimated.dice and m.true.dice]
    assert np.mean(errors) < 0.05, "a bias of 0.2 is known from the others"
    card = report_card(found)
    assert card.worst.figures is not None and card.worst.figures.coverage is not None
    assert card.worst.figures.coverage >= 0.75
    assert set(card.witnesses) == {"tta"}


@pytest.mark.parametrize("count", [1, 2, 8])
def test_few_patients_give_estimates_without_intervals(count: int) -> None:
    assert all(m.interval is None for m in estimates(count, *of_patients(count)))
    assert report_card(estimates(count, *of_patients(count))).worst.figures is None


def test_no_patients_give_nothing() -> None:
    assert unseen_masks(STRUCTURES, [[], []], [CalibrationMasks([], [], [])] * 2, NoProgress()) == []
