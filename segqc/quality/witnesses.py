"""Other witnesses of how good a mask is than SegQC-Net's map: lower for worse masks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import numpy as np

from segqc.quality.metrics import true_metrics
from segqc.types import LabelArray, Structure, Witnesses

TTA: Final = "tta"
UNLIKENESS: Final = "unlikeness"
ORDERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        TTA: "by how well the network's masks of a scan agree under flips and other contrasts",
        "soft": "by how well the segmentation network's soft output agrees with its mask",
        "soft-entropy": "by how sure the segmentation network is of its mask",
        "size": "by how usual the mask's size is",
        UNLIKENESS: "by how unlike the training scans they are, most unlike first",
    }
)
"""The orders by a witness alone, or by the scan's unlikeness, in words, by the names that scores and leases have."""


def named_witnesses(witnesses: Witnesses) -> dict[str, float]:
    """The witnesses that an assessment holds, of those that are known, by their names in `ORDERS`."""
    values = {"soft": witnesses.soft, "soft-entropy": witnesses.entropy, "size": witnesses.size}
    return {name: value for name, value in values.items() if value is not None}


def worst_witness(name: str, structures: Sequence[Mapping[str, float]]) -> float | None:
    """What a witness says of the structure that it holds for the worst one; None where it knows not all of them.

    Args:
        name: of the witness.
        structures: what the witnesses say of each structure.
    """
    known = [of_structure[name] for of_structure in structures if name in of_structure]
    return min(known) if known and len(known) == len(structures) else None


def tta_agreement(labels: LabelArray, members: Sequence[LabelArray], structures: Iterable[Structure]) -> float:
    """The worst structure's median Dice between each member's mask and the median mask; 1 where none has one.

    Args:
        labels: the median mask of predictions under test-time augmentation, (n0, n1, n2).
        members: each member's own mask, of the same shape.
        structures: the structures to compare.
    """
    medians = []
    for structure in structures:
        median = structure.mask(labels)
        dice = [true_metrics(median, structure.mask(member)).dice for member in members]
        known = [value for value in dice if value is not None]
        if known:
            medians.append(float(np.median(known)))
    return min(medians, default=1.0)


def ensemble_agreement(members: Sequence[LabelArray], structures: Iterable[Structure]) -> float:
    """The worst structure's mean Dice between the masks of each pair of networks; 1 where no mask has a voxel.

    Args:
        members: the label map of a scan by each network, (n0, n1, n2).
        structures: the structures to compare.

    Raises:
        ValueError: if there is no pair.
    """
    if len(members) < 2:
        raise ValueError(f"an agreement needs two networks or more, got {len(members)}")
    means = []
    for structure in structures:
        pairs = itertools.combinations([structure.mask(member) for member in members], 2)
        known = [dice for one, other in pairs if (dice := true_metrics(one, other).dice) is not None]
        if known:
            means.append(float(np.mean(known)))
    return min(means, default=1.0)
