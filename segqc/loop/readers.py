"""Double reading: labels of the same scan by several annotators, how far they agree, and one label out of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from segqc.loop.dataset import Dataset
from segqc.quality.metrics import true_metrics
from segqc.store import labels
from segqc.store.database import StoreError
from segqc.store.labels import FINAL, NewLabel
from segqc.store.records import Actor, LabelRecord
from segqc.types import LabelArray
from segqc.volumes import Volume, read_grid, temporary_labels, through_plane_axis
from segqc.volumes.slices import Slices, common, part

Method: TypeAlias = Literal["staple", "majority"]
STAPLE_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class ReaderPair:
    """Dice of one structure between two readers' labels of a scan; None where both have none of it."""

    scan: str
    first: str
    second: str
    structure: str
    dice: float | None


def readings(dataset: Dataset, scan: str) -> list[LabelRecord]:
    """The current readings of a scan, in the order of their numbers.

    Raises:
        UnknownScan: if there is no such scan.
    """
    with dataset.store.read() as transaction:
        return labels.readings(transaction, scan)


def whole_readings(dataset: Dataset) -> dict[str, tuple[Path, ...]]:
    """The readers' label files of each scan that has some, as far as they have looked at all of it."""
    with dataset.store.read() as transaction:
        found = labels.readings_of_all(transaction)
    whole = {scan: [r for r in records if labels.checked_slices(r) is None] for scan, records in found.items()}
    return {scan: tuple(map(dataset.store.label_file, records)) for scan, records in whole.items() if records}


def add_reading(dataset: Dataset, scan: str, path: Path, actor: Actor) -> LabelRecord:
    """Keep a label file as an annotator's reading of a scan; a second one of the same annotator replaces the first.

    Raises:
        UnknownScan: if there is no such scan.
        VolumeError: if it is no label map on the scan's grid with the configured values.
    """
    entry = dataset.scan(scan)
    content = dataset.store.intake.labels(path, dataset.image_file(entry), str(path))
    with dataset.store.read() as transaction:
        tag = labels.reader_tag(transaction, scan, actor)
    with temporary_labels(content.labels) as source:
        label = NewLabel(scan, tag, "annotator", actor, scan_sha256=entry.sha256)
        return dataset.store.save_label(label, source)


def inter_rater(dataset: Dataset, scan: str) -> list[ReaderPair]:
    """Compare the readings of a scan, each pair and structure, in the slices that both readers have looked at.

    Raises:
        UnknownScan: if there is no such scan.
        VolumeError: if a reading can't be read.
    """
    found = readings(dataset, scan)
    if len(found) < 2:
        return []
    arrays = {record.id: dataset.store.read_label(record).array for record in found}
    axis = through_plane_axis(read_grid(dataset.image_file(dataset.scan(scan))))
    pairs = []
    for a, b in itertools.combinations(found, 2):
        slices = common(labels.checked_slices(a), labels.checked_slices(b))
        one, other = (part(arrays[record.id], slices, axis) for record in (a, b))
        for structure in dataset.structures:
            masks = structure.mask(one), structure.mask(other)
            dice = true_metrics(*masks).dice if masks[0].any() or masks[1].any() else None
            pairs.append(ReaderPair(scan, a.actor.name, b.actor.name, structure.name, dice))
    return pairs


def make_consensus(dataset: Dataset, scan: str, method: Method | str, actor: Actor) -> LabelRecord:
    """Make the final label of a scan out of its readings.

    "staple" is the estimate of the hidden truth by expectation maximisation (Warfield et al. 2004, as SimpleITK has
    it), for each label value against the rest; where several values reach one half, the most probable one is taken.
    "majority" is the value that most readers gave, background where they tie. Any other method is a reader's name.
    What all of these readers have looked at counts as checked.

    Raises:
        UnknownScan: if there is no such scan.
        StoreError: with fewer than two readings, if no slice was looked at by all readers, or if no reader has this
            name.
    """
    found = readings(dataset, scan)
    if method not in ("staple", "majority"):
        chosen = [record for record in found if record.actor.name == method]
        if not chosen:
            names = ", ".join(record.actor.name for record in found) or "nobody"
            raise StoreError(f"{method!r} has not read the scan {scan!r}; {names} has")
        source = dataset.store.kept_file(chosen[0])
        return dataset.store.save_label(_consensus(chosen, actor), source)
    if len(found) < 2:
        raise StoreError(f"a consensus of the scan {scan!r} needs two readings or more, there are {len(found)}")
    consensus = _consensus(found, actor)
    volumes = [dataset.store.read_label(record) for record in found]
    arrays = np.stack([np.asarray(volume.array, np.uint8) for volume in volumes])
    merged = staple(arrays) if method == "staple" else majority(arrays)
    with temporary_labels(Volume(merged, volumes[0].affine, volumes[0].acquisition_axis)) as source:
        return dataset.store.save_label(consensus, source)


def _consensus(read: Sequence[LabelRecord], actor: Actor) -> NewLabel:
    """The final label that readings become.

    Raises:
        StoreError: if no slice was looked at by all readers.
    """
    scan = read[-1].scan
    checked: Slices | None = functools.reduce(common, map(labels.checked_slices, read))
    if checked == ():
        raise StoreError(f"the readers of the scan {scan!r} have no slice in common; take one reader's label")
    return NewLabel(scan, FINAL, "consensus", actor, parent=read[-1].id, checked_slices=checked)


def majority(readers: LabelArray) -> LabelArray:
    """The value that most readers gave, of label maps (n, a, b, c); background where values tie."""
    values = np.unique(readers)
    votes = np.stack([(readers == value).sum(axis=0) for value in values])
    most = votes.max(axis=0)
    winner = values[votes.argmax(axis=0)]
    return np.where((votes == most).sum(axis=0) == 1, winner, 0).astype(np.uint8)


def staple(readers: LabelArray) -> LabelArray:
    """STAPLE of label maps (n, a, b, c), each value against the rest."""
    import SimpleITK as sitk  # noqa: N813 - its users know it by this name. Slow to import

    best = np.full(readers.shape[1:], STAPLE_THRESHOLD)
    merged = np.zeros(readers.shape[1:], np.uint8)
    for value in np.unique(readers[readers > 0]):
        masks = (readers == value).astype(np.uint8)
        if (masks == masks[0]).all():
            probability = masks[0].astype(float)  # where all agree there is nothing to estimate
        else:
            probability = sitk.GetArrayFromImage(
                sitk.STAPLE(  # type: ignore[no-untyped-call]
                    [sitk.GetImageFromArray(m) for m in masks], 1.0
                )
            )
        wins = probability > best
        merged[wins], best[wins] = value, probability[wins]
    return merged
