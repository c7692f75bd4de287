"""Masks as they are served, of patients that no network has seen: what a bundle's report card is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from segqc.quality.error_counts import SignedCounts, count_voxels
from segqc.quality.report_card import UnseenMask
from segqc.quality.witnesses import TTA, named_witnesses, tta_agreement
from segqc.training.calibration import HeldOutMask
from segqc.types import FloatArray, LabelArray, MetricIntervals, Structure, Unlikeness


@dataclass(frozen=True, slots=True)
class ServedErrors:
    """What else is known of one structure of a served mask: its error map's voxels, and TTA's agreement."""

    counts: SignedCounts
    tta: float


def served_errors(
    structures: Sequence[Structure],
    errors: FloatArray,
    mask: LabelArray,
    truth: LabelArray,
    group: Sequence[LabelArray],
) -> tuple[ServedErrors, ...]:
    """Compare error maps of a served mask with the truth.

    Args:
        structures: the structures.
        errors: their error maps, (L, n0, n1, n2).
        mask: the label map that is served.
        truth: the true one.
        group: the median mask under test-time augmentation, and the members' own.
    """
    median, *members = group
    found = []
    for structure, error in zip(structures, errors, strict=True):
        held, true = structure.mask(mask), structure.mask(truth)
        counts = count_voxels(error, held != true, held)
        found.append(ServedErrors(counts, tta_agreement(median, members, (structure,))))
    return tuple(found)


def unseen_masks(
    structure: Structure,
    held_out: Sequence[HeldOutMask],
    errors: Sequence[ServedErrors],
    unlikeness: Mapping[str, Unlikeness],
) -> list[UnseenMask]:
    """One structure of served masks, as a report card wants them.

    Args:
        structure: the structure.
        held_out: estimates that were made without anything of the mask's patient.
        errors: of the same masks.
        unlikeness: how unlike the others' each scan is, by its name, made likewise; nothing where nobody knows.
    """
    return [
        UnseenMask(
            patient=mask.known.patient,
            scan=mask.known.scan,
            structure=structure.name,
            true=mask.known.true,
            estimated=mask.estimated,
            interval=MetricIntervals(dice=mask.interval).of_scan(unlikeness.get(mask.known.scan)).dice,
            unlikeness=unlikeness.get(mask.known.scan),
            errors=own.counts,
            witnesses={TTA: own.tta, **named_witnesses(mask.known.witnesses)},
        )
        for mask, own in zip(held_out, errors, strict=True)
    ]
