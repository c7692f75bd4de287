"""Estimates of masks of unseen patients: nothing of a patient goes into the estimates of its masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from segqc.quality.error_counts import SignedCounts
from segqc.quality.report_card import UnseenMask, report_card
from segqc.quality.witnesses import ORDERS, UNLIKENESS
from segqc.training.calibration import KnownMask, fit_masks, held_out_masks
from segqc.training.unseen import ServedErrors, served_errors, unseen_masks
from segqc.types import MetricIntervals, Metrics, Structure, Witnesses

STRUCTURE = Structure("liver", (1,))


def metrics(dice: float) -> Metrics:
    return Metrics(dice, dice / (2 - dice), 1 - dice, 0.5 - dice)


def known(count: int, *, noise: float = 0.03) -> list[KnownMask]:
    """Served masks of as many patients, with maps that are too good, and a soft output that knows nothing."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        true = float(rng.uniform(0.4, 0.85))
        raw = float(np.clip(true + 0.1 + rng.normal(0, noise), 0, 1))
        witnesses = Witnesses(soft=float(rng.uniform(0.8, 0.9)), entropy=-0.1, size=-1.0)
        found.append(KnownMask(f"p{i}", f"scan {i}", metrics(raw), metrics(true), witnesses))
    return found


def unseen(masks: list[KnownMask]) -> dict[str, UnseenMask]:
    held_out = held_out_masks("served", masks, fit_masks("served", [masks])[0])
    errors = [ServedErrors(SignedCounts(), tta=0.9)] * len(masks)
    found = unseen_masks(STRUCTURE, held_out, errors, {})
    assert [(m.patient, m.scan, m.true) for m in found] == [(k.patient, k.scan, k.true) for k in masks]
    return {m.patient: m for m in found}


def test_without_any_mask_the_numbers_are_the_map_s() -> None:
    (nothing,) = fit_masks("strange", [[]])
    raw = Metrics(0.8, 0.8 / 1.2, 0.3, -0.1)
    estimated = nothing.estimates(raw, Witnesses(0.9, -0.2, -1.0))
    assert (estimated.dice, estimated.arvd, estimated.rvd) == (0.8, 0.3, -0.1)
    assert nothing.intervals_of(raw, Witnesses(), raw) == MetricIntervals()
    assert held_out_masks("strange", [], nothing) == ()


@pytest.mark.parametrize("count", [12, 25])
def test_the_truth_of_a_patient_changes_nothing_in_its_own_estimate(count: int) -> None:
    masks = known(count)
    before = unseen(masks)
    absurd = [replace(mask, true=metrics(0.01)) if mask.patient == "p3" else mask for mask in masks]
    after = unseen(absurd)
    assert after["p3"].estimated == before["p3"].estimated
    assert any(after[p].estimated != before[p].estimated for p in before), "others are calibrated by it"


def test_estimates_are_those_of_the_others_and_intervals_hold() -> None:
    card = report_card(list(unseen(known(40)).values()))
    assert card.worst.figures is not None and card.worst.figures.coverage is not None
    assert card.worst.estimate_verdict == "better than the constant"
    assert card.worst.figures.coverage >= 0.75
    assert set(card.witnesses) == {"tta", "soft", "soft-entropy", "size"} == set(ORDERS) - {UNLIKENESS}


@pytest.mark.parametrize("count", [1, 2, 8])
def test_few_patients_give_estimates_without_a_verdict(count: int) -> None:
    found = list(unseen(known(count)).values())
    assert all(m.interval is None for m in found)
    assert report_card(found).worst.figures is None


def test_errors_of_a_served_mask_are_counted_apart_and_tta_agrees_or_not() -> None:
    truth = np.zeros((4, 4, 2), np.uint8)
    truth[:2] = 1
    mask = np.zeros_like(truth)
    mask[1:3] = 1  # a row of voxels is missed, another one wrongly included

    def of(probability: Callable[[np.ndarray], np.ndarray]) -> ServedErrors:
        errors = probability(mask != truth).astype(np.float32)[None]
        return served_errors((STRUCTURE,), errors, mask, truth, [mask, mask, mask])[0]

    found = of(lambda wrong: np.where(wrong, 0.8, 0.2))
    assert (found.counts.false_negative.recall(), found.counts.false_positive.recall()) == (1.0, 1.0)
    assert sum(found.counts.false_negative.wrong) == sum(found.counts.false_positive.wrong) == 8
    assert found.tta == 1.0
    only_included = of(lambda wrong: np.where(wrong & (mask > 0), 0.8, 0.2))
    assert (only_included.counts.false_negative.recall(), only_included.counts.false_positive.recall()) == (0.0, 1.0)
    shifted = served_errors((STRUCTURE,), (mask != truth).astype(np.float32)[None], mask, truth, [mask, truth])[0]
    assert shifted.tta == 0.5
