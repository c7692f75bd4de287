"""Attention checks: an error planted into a mask that is handed out, and what a submission has made of it.

The error lies where the mask that was shown differs from the network's. Only masks that the strategy chose get one:
what is learned from audit draws and validating patients is learned from masks as the network made them.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from segqc.errors import SegqcError
from segqc.loop.dataset import Dataset
from segqc.store import attention_checks, labels, scans
from segqc.store.events import SERVER
from segqc.store.labels import ATTENTION_CHECK, ORIGINAL, PROPOSAL, NewLabel
from segqc.store.records import Actor, AttentionCheck, LabelRecord, LeaseRecord
from segqc.store.store import LabelChange
from segqc.training.implanted_errors import ErrorKind, implant_errors
from segqc.types import BoolArray, LabelArray
from segqc.volumes import Volume, read_scan, temporary_labels, through_plane_axis
from segqc.volumes.slices import Slices

logger = logging.getLogger(__name__)

KINDS: Final[tuple[ErrorKind, ...]] = ("cut", "missing slices", "leak", "shifted part", "hole", "island")
"""The errors that a person sees who looks."""
_STREAM: Final = 1  # of the draws; those of leases have the same seed
_TARGET_DICE: Final = (0.85, 0.95)  # of the mask with the error against the one without
_MIN_SHARE: Final = 0.02  # of the mask's voxels that the error must change
_ATTEMPTS: Final = 5
_FOUND_SHARE: Final = 0.5  # of the error's voxels that are corrected


class _PlantedMeanwhile(Exception):  # noqa: N818 - not an error
    """The lease was handed out twice at once, and the other hand-out has planted an error: nothing is kept."""


def plant_error(dataset: Dataset, lease: LeaseRecord) -> None:
    """Plant an error into the mask that a lease hands out, if the settings' draw says so; twice is once.

    A hand-out never fails because of it: where no error can be planted, the mask stays as it is.

    Args:
        dataset: the folder.
        lease: the lease that begins.
    """
    rules = dataset.settings.annotation
    rng = np.random.default_rng((rules.seed, lease.id, _STREAM))
    if lease.draw != "strategy" or lease.label_version is None or rng.random() >= rules.attention_checks:
        return
    with dataset.store.read() as transaction:
        served = labels.get(transaction, lease.label_version)
        scan = scans.get(transaction, lease.scan)
        is_planted = attention_checks.of_lease(transaction, lease.id) is not None
    if is_planted or served.source != "network" or served.tag != ORIGINAL:
        return
    try:
        image = read_scan(dataset.scan_file(scan), limits=dataset.settings.intake)
        mask = dataset.store.read_label(served, scan=image)
        planted = _planted(dataset, image, mask, lease.slices, rng)
        if planted is None:
            return
        array, kind = planted
        label = NewLabel(
            scan.name, ATTENTION_CHECK, "attention check", SERVER, parent=served.id, scan_sha256=scan.sha256
        )
        with (
            contextlib.suppress(_PlantedMeanwhile),
            temporary_labels(Volume(array, mask.affine, mask.acquisition_axis)) as path,
            dataset.store.change_labels([LabelChange(label, path)]) as change,
        ):
            if attention_checks.of_lease(change.transaction, lease.id) is not None:
                raise _PlantedMeanwhile
            attention_checks.add(change.transaction, lease, change.versions[0], kind)
    except SegqcError as error:
        logger.warning("no error is planted into the mask of %r: %s", lease.scan, error)


def _planted(
    dataset: Dataset, image: Volume, mask: Volume, asked: Slices | None, rng: np.random.Generator
) -> tuple[LabelArray, ErrorKind] | None:
    """The mask with one error in the slices that are asked for, and the error's kind; None where none can be made."""
    for _ in range(_ATTEMPTS):
        target = float(rng.uniform(*_TARGET_DICE))
        made = implant_errors(mask.array, image, dataset.structures, rng, kinds=KINDS, errors=1, target_dice=target)
        array = made.labels
        if asked is not None:
            axis = through_plane_axis(image)
            array = mask.array.copy()
            in_asked = np.moveaxis(array, axis, 0)
            in_asked[list(asked)] = np.moveaxis(made.labels, axis, 0)[list(asked)]
        changed = np.count_nonzero(array != mask.array)
        if changed and changed >= _MIN_SHARE * np.count_nonzero(mask.array):
            return array, made.kinds[0]
    return None


def proposal_beside_error(dataset: Dataset, proposal: LabelRecord, actor: Actor | None) -> Volume | None:
    """A proposal for the network's mask as an annotator gets it who has that mask with a planted error.

    It changes what it changes of the network's own mask, and leaves the planted error: it must neither outline that
    error nor correct it.

    Args:
        dataset: the folder.
        proposal: its label version.
        actor: the annotator; None for a client that does not say.

    Returns:
        The label map; None where the annotator gets the proposal as it is kept.

    Raises:
        VolumeError: if a kept label map can't be read any more.
    """
    if proposal.tag != PROPOSAL or proposal.parent is None:
        return None
    with dataset.store.read() as transaction:
        served = labels.get(transaction, proposal.parent)
        shown = attention_checks.shown_to(transaction, served, actor)
    if shown == served:
        return None
    after, before, planted = (dataset.store.read_label(label) for label in (proposal, served, shown))
    array = np.where(after.array != before.array, after.array, planted.array)
    return Volume(array, after.affine, after.acquisition_axis)


@dataclass(frozen=True, slots=True, eq=False)
class Repaired:
    """A submitted label map without a planted error.

    Attributes:
        check: the planted error.
        labels: the label map.
        is_found: whether the annotator has corrected the error, at least half of it.
        is_changed: whether something of the error had to be undone.
    """

    check: AttentionCheck
    labels: Volume
    is_found: bool
    is_changed: bool


def repair(dataset: Dataset, check: AttentionCheck, submitted: Volume) -> Repaired:
    """Undo a planted error in a submitted label map, where the annotator has left it.

    It is undone slice by slice: where at least half of a slice's planted voxels were corrected, the annotator has seen
    the error, and what they have drawn stands.

    Args:
        dataset: the folder.
        check: the planted error.
        submitted: the label map, on the scan's grid.

    Raises:
        VolumeError: if a kept label map can't be read any more.
    """
    served = dataset.store.read_label(check.served).array
    shown = dataset.store.read_label(check.shown).array
    if served.shape != submitted.shape:  # of a scan's content that was replaced
        return Repaired(check, submitted, is_found=False, is_changed=False)
    planted = served != shown
    left = planted & (submitted.array == shown)
    axis = through_plane_axis(submitted)
    is_overlooked = _by_slice(left, axis) > (1 - _FOUND_SHARE) * _by_slice(planted, axis)
    undo = left & np.expand_dims(is_overlooked, tuple(a for a in range(3) if a != axis))
    is_found = np.count_nonzero(left) <= (1 - _FOUND_SHARE) * np.count_nonzero(planted)
    array = np.where(undo, served, submitted.array)
    return Repaired(
        check,
        Volume(array, submitted.affine, submitted.acquisition_axis),
        is_found=bool(is_found),
        is_changed=bool(undo.any()),
    )


def _by_slice(voxels: BoolArray, axis: int) -> npt.NDArray[np.intp]:
    counts: npt.NDArray[np.intp] = np.count_nonzero(np.moveaxis(voxels, axis, 0), axis=(1, 2))
    return counts
