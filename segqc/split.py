"""The fold and the role that each patient gets once and keeps (method, "Leaks")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

Split: TypeAlias = Literal["train", "validation"]


@dataclass(frozen=True, slots=True)
class PatientSplit:
    """The fold and the role of a patient."""

    fold: int
    split: Split


@dataclass(frozen=True, slots=True)
class SplitConfig:
    """How patients are placed: number of folds, share of the patients that validate, seed of their random order."""

    folds: int = 3
    validation_share: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what can't be meant.

        Raises:
            ValueError: if the share is not in [0, 1), there is no fold, or the seed is negative.
        """
        if self.folds < 1 or not 0 <= self.validation_share < 1 or self.seed < 0:
            raise ValueError("folds must be 1 or more, validation_share from 0 to below 1, and seed 0 or more")


def split_patients(
    first: Sequence[str], others: Sequence[str] = (), *, already: int = 0, split_config: SplitConfig
) -> dict[str, PatientSplit]:
    """Place patients in random order, those of ``first`` before the others.

    Folds are dealt in turn; a patient validates whenever the share, rounded, asks for one more: of the first four
    patients one does at a share of 0.15, of the first ten two. The order is random, so that role and fold depend on
    nothing that is known of a patient.

    Args:
        first: names of new patients to spread over folds and roles among themselves.
        others: names of the other new patients.
        already: how many patients were placed before.
        split_config: the number of folds, the share and the seed.
    """
    rng = np.random.default_rng((split_config.seed, already))
    order = [names[int(i)] for names in (first, others) for i in rng.permutation(len(names))]

    def validating(count: int) -> int:
        return math.floor(count * split_config.validation_share + 0.5)

    return {
        name: PatientSplit(n % split_config.folds, "validation" if validating(n + 1) > validating(n) else "train")
        for n, name in enumerate(order, start=already)
    }
