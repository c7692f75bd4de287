"""The check of what a person has submitted: SegQC-Net's word on it, in numbers, boxes and a sentence.

A check is an assessment of the label version by the bundle's network for people's masks; by SegQC-Net in slices that
hold exactly what a network made. It is kept with the version, and nothing waits for it: a submission is never refused
because of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from segqc.errors import SegqcError
from segqc.loop import error_maps
from segqc.loop.dataset import Dataset
from segqc.loop.scoring import assess, origin_of
from segqc.networks.bundle import NetworkBundle
from segqc.quality.likely_errors import LikelyError, likely_errors, sentence
from segqc.store import assessments
from segqc.store.database import Transaction
from segqc.store.labels import mask_source
from segqc.store.records import LabelRecord
from segqc.types import Assessment


class NotCheckedError(SegqcError):
    """Why a label version cannot be checked."""

    status = 409


@dataclass(frozen=True, slots=True)
class LabelCheck:
    """What a bundle says of a label version that a person made."""

    label: LabelRecord
    bundle: int
    assessment: Assessment

    @property
    def errors(self) -> tuple[LikelyError, ...]:
        """What seems wrong in the slices that a person has looked at, the largest likely error first."""
        return likely_errors(self.assessment, self.label.checked_slices)

    @property
    def sentence(self) -> str:
        """The same in a sentence."""
        return sentence(self.errors)


def kept_checks(transaction: Transaction, scan: str, labels: list[LabelRecord]) -> dict[int, LabelCheck]:
    """The last check of each of a scan's label versions that has one, by the version's number."""
    found = assessments.of_people(transaction, scan)
    return {label.id: LabelCheck(label, *found[label.id]) for label in labels if label.id in found}


def kept_check(dataset: Dataset, label: LabelRecord, bundle: int) -> LabelCheck | None:
    """What a bundle has said of a label version, if it has checked it."""
    with dataset.store.read() as transaction:
        found = assessments.of_bundle(transaction, label.id, bundle)
    return LabelCheck(label, bundle, found) if found is not None and found.mask_kind == "person" else None


def check_label(dataset: Dataset, label: LabelRecord, bundle: NetworkBundle) -> LabelCheck:
    """Check a label version that a person made, and keep what comes of it.

    Raises:
        NotCheckedError: if the bundle has no network for people's masks, or no person made the version.
        VolumeError: if scan or label can't be used.
        ScanReplaced: if the scan's file holds another content by now.
    """
    with dataset.store.read() as transaction:
        source = mask_source(transaction, label)
    if source != "person":
        raise NotCheckedError(f"the label version {label.id} is a network's: only what people submit is checked")
    assessor = bundle.assessor()
    if assessor.people is None:
        raise NotCheckedError(
            f"SegQC-Net of the bundle {bundle.number} was not trained to judge people's masks; train it again"
        )
    entry = dataset.scan(label.scan)
    scan = dataset.read_scan(entry)
    labels = dataset.store.read_label(label, scan=scan, values=assessor.values)
    result = assess(bundle, scan, labels, None, scan_id=entry.id, origin=origin_of(dataset, label, scan))
    dataset.write_assessment(result.assessment, label, bundle.number, content=entry.sha256)
    error_maps.write(dataset, label.id, bundle.number, error_maps.quantised(result.errors))
    return LabelCheck(label, bundle.number, result.assessment)
