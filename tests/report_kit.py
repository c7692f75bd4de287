"""Simulated estimates of masks of unseen patients, of which everything is known."""

from __future__ import annotations

import numpy as np

from segqc.quality.error_counts import count_voxels
from segqc.quality.report_card import ReportCard, UnseenMask, report_card
from segqc.types import Metrics, PredictionInterval, Unlikeness


def metrics(dice: float | None, rvd: float = 0.0) -> Metrics:
    return Metrics(dice, None if dice is None else dice / (2 - dice), abs(rvd), rvd)


def simulated(
    seed: int,
    *,
    patients: int = 40,
    noise: float = 0.03,
    shift: float = 0.0,
    worthless: bool = False,
    witness_noise: float | None = None,
    witness: str = "tta",
    structures: int = 1,
    scans_each: int = 1,
    spread: float = 0.3,
    unlikeness: Unlikeness | None = None,
) -> list[UnseenMask]:
    """Masks with a Dice from 0.95 down by the spread, and estimates with some error; worthless ones know nothing."""
    rng, found = np.random.default_rng(seed), list[UnseenMask]()
    # of their own, so that other noise leaves the rest as it is
    noises, of_witness = np.random.default_rng(seed + 1000), np.random.default_rng(seed + 2000)
    wrong = np.zeros((4, 4, 4), bool)
    wrong[:2] = True
    mask = np.zeros_like(wrong)
    mask[:, :2] = True
    for patient in range(patients):
        for scan in range(scans_each):
            for structure in range(structures):
                true = float(rng.uniform(0.95 - spread, 0.95))
                guess = (
                    float(noises.uniform(0.95 - spread, 0.95)) if worthless else true + float(noises.normal(0, noise))
                )
                estimated = float(np.clip(guess + shift, 0, 1))
                # all errors inside the mask are found, none of those outside
                probability = np.where(wrong & mask, 0.9, 0.1).astype(np.float32)
                said = {} if witness_noise is None else {witness: true + float(of_witness.normal(0, witness_noise))}
                found.append(
                    UnseenMask(
                        patient=f"p{patient}",
                        scan=f"p{patient} scan {scan}",
                        structure=f"s{structure}",
                        true=metrics(true, 0.2),
                        estimated=metrics(estimated, -0.2),
                        interval=PredictionInterval(estimated - 0.05, estimated + 0.05, 0.9),
                        unlikeness=unlikeness,
                        errors=count_voxels(probability, wrong, mask),
                        witnesses=said,
                    )
                )
    return found


def good_card(patients: int = 30) -> ReportCard:
    """Of estimates that are better than a constant, in an order that is better than chance."""
    return report_card(simulated(1, patients=patients))


def worthless_card(
    patients: int = 30,
    *,
    witness_noise: float | None = None,
    witness: str = "tta",
    unlikeness: Unlikeness | None = None,
) -> ReportCard:
    """Of estimates that know nothing; a witness with a noise orders instead where that is small enough.

    Where scans have an unlikeness, that orders without a witness.
    """
    return report_card(
        simulated(
            1,
            patients=patients,
            worthless=True,
            witness_noise=witness_noise,
            witness=witness,
            unlikeness=unlikeness,
        )
    )
