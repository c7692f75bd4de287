"""Proposals: a label with the estimated truth in its error boxes, as a label version of its own.

A proposal lies under the tag ``proposal``, made of one label version by one bundle. It is nobody's label: it never
trains, is never final, and changes no other label. Annotators take it box by box, or leave it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from pydantic import TypeAdapter

from segqc.errors import SegqcError
from segqc.loop import error_maps
from segqc.loop.dataset import Dataset, ScanEntry
from segqc.loop.scoring import assess, origin_of
from segqc.networks.assessor import Assessor
from segqc.networks.bundle import NetworkBundle
from segqc.quality.proposal import ProposedBox, propose, proposed_boxes
from segqc.quality.report_card import is_worth_proposing, people_sentence
from segqc.store import assessments, labels, leases
from segqc.store.database import Transaction
from segqc.store.labels import FINAL, PROPOSAL, NewLabel, mask_source
from segqc.store.records import Actor, JsonObject, LabelRecord, TakenProposal
from segqc.store.store import LabelChange
from segqc.types import Assessment, FloatArray, MaskSource, label_names
from segqc.volumes import Volume, temporary_labels

_BOXES: Final = TypeAdapter(tuple[ProposedBox, ...])


class NoProposalError(SegqcError):
    """Why nothing can be proposed for a label version."""

    status = 409


class TakenError(SegqcError):
    """What is said to have been taken of a proposal cannot have been."""

    status = 422


@dataclass(frozen=True, slots=True)
class Proposal:
    """A kept proposal, and what can be taken of it."""

    label: LabelRecord
    boxes: tuple[ProposedBox, ...]


def proposal_of(dataset: Dataset, label: LabelRecord, bundle: NetworkBundle) -> Proposal:
    """The proposal of a label version by a bundle; made and kept now where it is not yet.

    Args:
        dataset: the folder.
        label: a version that annotators go on from.
        bundle: with both networks.

    Raises:
        NoProposalError: if nobody goes on from the version, the bundle has no network for people's masks, or its
            estimates of these are known to be no better than one number.
        ModelError: if the bundle has not both networks.
        VolumeError: if scan or label can't be used.
        ScanReplaced: if the scan's file holds another content by now.
    """
    with dataset.store.read() as transaction:
        _check_worked_on(transaction, label)
        kept = labels.current(transaction, label.scan, PROPOSAL)
        if kept is not None and _is_made_of(kept, label, bundle):
            return Proposal(kept, boxes_of(transaction, kept))
        source = mask_source(transaction, label)
    report = bundle.people_report()
    if report is not None and not is_worth_proposing(report):
        raise NoProposalError(people_sentence(report))
    assessor = bundle.assessor()
    if source == "person" and assessor.people is None:
        raise NoProposalError(
            f"nothing is proposed: SegQC-Net of the bundle {bundle.number} was not trained to judge people's masks"
        )
    entry = dataset.scan(label.scan)
    scan = dataset.read_scan(entry)
    start = dataset.store.read_label(label, scan=scan, values=assessor.values)
    assessment, errors = _judged(dataset, entry, label, source, bundle, scan, start)
    structures, axis = assessor.structures, assessment.through_plane_axis
    found = {quality.name: quality.raw.boxes for quality in assessment.structures}
    of_structures = [found.get(structure.name, ()) for structure in structures]
    voxels = propose(start.array, errors, structures, of_structures, axis)
    boxes = proposed_boxes(start.array, voxels, structures, of_structures, axis)
    kept = _keep(dataset, entry, label, Volume(voxels, start.affine, start.acquisition_axis), boxes, bundle, assessor)
    return Proposal(kept, boxes)


def taken(transaction: Transaction, proposal: int, boxes: int, made_of: int | None) -> TakenProposal:
    """What a person says to have taken of a proposal.

    Args:
        transaction: what to read in.
        proposal: the proposal's label version.
        boxes: how many boxes were taken.
        made_of: the label version that the person began with.

    Raises:
        TakenError: if it is no proposal of that version, or has fewer boxes.
    """
    if made_of is not None:
        scan = labels.get(transaction, made_of).scan
        found = next((label for label in labels.history(transaction, scan) if label.id == proposal), None)
        if found is not None and found.tag == PROPOSAL and found.source == "network" and found.parent == made_of:
            offered = len(boxes_of(transaction, found))
            if boxes <= offered:
                return TakenProposal(proposal=proposal, boxes_offered=offered, boxes_taken=boxes)
            raise TakenError(f"the proposal {proposal} has {offered} boxes, of which {boxes} cannot have been taken")
    raise TakenError(f"the label version {proposal} is no proposal for what you began with")


def boxes_of(transaction: Transaction, proposal: LabelRecord) -> tuple[ProposedBox, ...]:
    """What can be taken of a kept proposal."""
    return boxes_of_all(transaction, [proposal.id])[proposal.id]


def boxes_of_all(transaction: Transaction, proposals: Sequence[int]) -> dict[int, tuple[ProposedBox, ...]]:
    """The same for many, by the numbers of their versions."""
    noted = labels.infos(transaction, proposals)
    return {number: _BOXES.validate_python(noted.get(number, {}).get("boxes", ())) for number in proposals}


def _is_made_of(proposal: LabelRecord, label: LabelRecord, bundle: NetworkBundle) -> bool:
    by = proposal.bundle.id if proposal.bundle is not None else None
    return proposal.source == "network" and (proposal.parent, by) == (label.id, bundle.number)


def _check_worked_on(transaction: Transaction, label: LabelRecord) -> None:
    """Refuse a version that nobody goes on from; see `segqc.loop.submission.current_start`.

    Raises:
        NoProposalError: if it is one.
    """
    final = labels.current(transaction, label.scan, FINAL)
    start = labels.start_of(transaction, label.scan)
    going_on = {final.id} if final is not None else {start.id if start is not None else None}
    if final is None:
        going_on |= {reading.id for reading in labels.readings(transaction, label.scan)}
        going_on |= {lease.label_version for lease in leases.listing(transaction, scan=label.scan)}
    if label.id not in going_on:
        raise NoProposalError(f"nothing is proposed for the label version {label.id}: another one counts by now")


def _judged(
    dataset: Dataset,
    entry: ScanEntry,
    label: LabelRecord,
    source: MaskSource,
    bundle: NetworkBundle,
    scan: Volume,
    start: Volume,
) -> tuple[Assessment, FloatArray]:
    """What a bundle says of a label version, and its error maps (L, n0, n1, n2): as kept, else computed now."""
    with dataset.store.read() as transaction:
        kept = assessments.of_bundle(transaction, label.id, bundle.number)
    maps = error_maps.read(dataset, label.id, bundle.number)
    if maps is not None and kept is not None and (kept.mask_kind == "person") == (source == "person"):
        return kept, maps / np.float32(error_maps.CERTAIN)
    result = assess(bundle, scan, start, None, scan_id=entry.id, origin=origin_of(dataset, label, scan))
    error_maps.write(dataset, label.id, bundle.number, error_maps.quantised(result.errors))
    return result.assessment, result.errors


def _keep(
    dataset: Dataset,
    entry: ScanEntry,
    label: LabelRecord,
    voxels: Volume,
    boxes: tuple[ProposedBox, ...],
    bundle: NetworkBundle,
    assessor: Assessor,
) -> LabelRecord:
    """Keep a proposal as the current one of its scan, if annotators still go on from what it was made of."""
    info: JsonObject = {
        "model": "segqc",
        "made_of": label.id,
        "boxes": _BOXES.dump_python(boxes, mode="json"),
        "params": {"label_names": dict(label_names(assessor.structures)), "model_version": assessor.version},
    }
    network = Actor(kind="network", name=assessor.version, identified_by="program")
    new = NewLabel(
        entry.id, PROPOSAL, "network", network,
        parent=label.id, bundle=bundle.number, info=info, scan_sha256=entry.sha256,
    )  # fmt: skip
    with temporary_labels(voxels) as path, dataset.store.change_labels([LabelChange(new, path)]) as change:
        _check_worked_on(change.transaction, label)
        return change.versions[0]
