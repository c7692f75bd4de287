"""What the viewer in the browser shows of a scan, by the identifiers that DICOM gives its slices.

Label maps and error maps travel as one byte a voxel: image by image in the order of `ViewedScan.instances`, each row by
row as it is shown. `segqc.volumes.SliceLayout` turns them into the file's own voxel order and back.
"""

from __future__ import annotations

import datetime as dt
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from segqc.loop.proposals import Proposal
from segqc.loop.submission import current_start
from segqc.plots import COLOURS
from segqc.server.context import AppContext
from segqc.server.dicomweb.series import DicomScan, ScanHeader
from segqc.server.errors import RequestError
from segqc.server.monailabel.strategy import WORST_SLICES, estimate_warning
from segqc.store import assessments, labels, leases, pacs
from segqc.store.database import Transaction
from segqc.store.labels import PROPOSAL
from segqc.store.records import Actor, LabelRecord, LabelSource, LeaseRecord, ScanState
from segqc.types import UNLIKE, Assessment, LabelArray, PredictionInterval, Structure, StructureQuality, applying
from segqc.volumes import Volume, read_grid
from segqc.volumes.volume import Array

_QUICK: Final = 1  # zlib's level: label maps shrink to a hundredth at any


@dataclass(frozen=True, slots=True)
class Segment:
    """A value of the label map, with its name and the colour that it is shown in."""

    value: int
    name: str
    colour: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A label version as an annotator sees it.

    ``by`` is None where only a browser's cookie is known. ``is_current`` says whether it is its tag's last one, and
    ``has_voxels`` whether it is more than a removal.
    """

    version: int
    tag: str
    source: LabelSource
    by: str | None
    is_own: bool
    made_at: dt.datetime
    made_of: int | None
    is_current: bool
    has_voxels: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Who has the scan; ``slices`` are the instances that are to be corrected, None for all."""

    is_own: bool
    to: str | None
    until: dt.datetime
    slices: list[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureEstimate:
    """The estimate of one structure; without an interval there is too little data for one, or it does not apply."""

    name: str
    values: list[int]
    present: bool
    dice: float | None
    interval: PredictionInterval | None
    error_ml: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceEstimate:
    """How much is likely to be wrong in a slice, over all structures."""

    instance: str
    error_ml: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A likely error: half-open intervals of the image's columns and rows."""

    instance: str
    structure: str
    columns: tuple[int, int]
    rows: tuple[int, int]
    area_mm2: float
    peak_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxToTake:
    """A box of a proposal: what it changes of one structure there.

    Of the voxels in the rectangle, half-open intervals of the image's columns and rows, it changes those that differ
    between label and proposal and have one of the structure's values in one of them: so many.
    """

    instance: str
    structure: str
    values: list[int]
    columns: tuple[int, int]
    rows: tuple[int, int]
    voxels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewedProposal:
    """What SegQC-Net would change of a label version; ``version`` is the proposal's own, which its voxels come by."""

    version: int
    made_of: int
    boxes: list[BoxToTake]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What SegQC-Net says of a label version."""

    version: int
    dice: float
    interval: PredictionInterval | None
    structures: list[StructureEstimate]
    slices: list[SliceEstimate]
    worst_slices: list[str]
    boxes: list[Box]


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewedScan:
    """A scan with all that the viewer's panel shows of it.

    ``title`` is what people call it, which of a scan of a PACS is not its id. ``instances`` name the slices in the
    order of the file's voxels. ``label`` is what an annotator goes on from, None for an empty label map. ``warnings``
    say why an estimate is to be taken with care.
    """

    scan: str
    title: str
    study: str
    series: str
    state: ScanState
    reason: str | None
    instances: list[str]
    rows: int
    columns: int
    voxel_ml: float
    segments: list[Segment]
    label: Version | None
    lease: Lease | None
    has_networks: bool
    estimate: Estimate | None
    warnings: list[str]
    history: list[Version]


def view(context: AppContext, scan: DicomScan, header: ScanHeader, actor: Actor) -> ViewedScan:
    """What an annotator is shown of a scan."""
    dataset = context.dataset
    name, instances = scan.record.name, list(header.instances)
    with dataset.store.read() as transaction:
        start = current_start(transaction, name, actor)
        # proposals are offered for themselves, and planted errors are gone: they are no steps of the label's way
        history = [
            label
            for label in labels.history(transaction, name)
            if label.tag != PROPOSAL and label.source != "attention check"
        ]
        last = {label.tag: label.id for label in history}
        versions = [_version(label, actor, is_current=last[label.tag] == label.id) for label in history]
        lease = _lease(transaction, name, actor)
        found = None if start is None else _assessment(transaction, start, lease)
        title = pacs.title_of(transaction, scan.record)
    warnings = []
    if found is not None:
        warning = estimate_warning(dataset.report_card(), dataset.drift_alarm())
        warnings = [warning] if warning is not None else []
        warnings += [f"This scan is {UNLIKE}."] if found.is_unlike else []
    names = context.labels()
    _, rows, columns = header.planes.shape
    return ViewedScan(
        scan=name,
        title=title,
        study=scan.study_uid,
        series=scan.series_uid,
        state=scan.record.state,
        reason=scan.record.reason,
        instances=instances,
        rows=rows,
        columns=columns,
        voxel_ml=abs(float(np.linalg.det(header.planes.affine[:3, :3]))) / 1000.0,
        segments=[Segment(value, key, COLOURS[i % len(COLOURS)]) for i, (key, value) in enumerate(names.items())],
        label=next((version for version in versions if start is not None and version.version == start.id), None),
        lease=None if lease is None else _shown_lease(lease, actor, instances),
        has_networks=context.has("segmentation") and context.has("segqc"),
        estimate=None if start is None or found is None else _estimate(start.id, found, header, context.structures()),
        warnings=warnings,
        history=versions[::-1],
    )


def _version(label: LabelRecord, actor: Actor, *, is_current: bool) -> Version:
    return Version(
        version=label.id,
        tag=label.tag,
        source=label.source,
        by=None if label.actor.identified_by == "cookie" else label.actor.name,
        is_own=label.actor == actor,
        made_at=label.made_at,
        made_of=label.parent,
        is_current=is_current,
        has_voxels=label.sha256 is not None,
    )


def _lease(transaction: Transaction, scan: str, actor: Actor) -> LeaseRecord | None:
    """The annotator's open lease of a scan, else another's."""
    is_open = leases.listing(transaction, state="open", scan=scan)
    return next((lease for lease in is_open if lease.actor == actor), is_open[0] if is_open else None)


def _shown_lease(lease: LeaseRecord, actor: Actor, instances: Sequence[str]) -> Lease:
    return Lease(
        is_own=lease.actor == actor,
        to=None if lease.actor.identified_by == "cookie" else lease.actor.name,
        until=lease.expires_at,
        slices=None if lease.slices is None or lease.actor != actor else [instances[i] for i in lease.slices],
    )


def _assessment(transaction: Transaction, label: LabelRecord, lease: LeaseRecord | None) -> Assessment | None:
    """The assessment of a label: the one that was handed out with it, else the serving bundle's last one."""
    if lease is not None and lease.label_version == label.id and lease.assessment is not None:
        return assessments.read(transaction, lease.assessment)
    found = assessments.latest_of(transaction, label.id)
    return None if found is None else found[1]


def _estimate(version: int, assessment: Assessment, header: ScanHeader, structures: Sequence[Structure]) -> Estimate:
    instances = list(header.instances)
    voxel_ml = float(np.prod(assessment.spacing_mm)) / 1000.0
    sums = np.zeros(len(instances))
    for quality in assessment.structures:
        for of_slice in quality.raw.slices:
            sums[of_slice.index] += of_slice.error_sum * voxel_ml
    values = {structure.name: list(structure.values) for structure in structures}
    return Estimate(
        version=version,
        dice=assessment.dice,
        interval=applying(assessment.dice_interval),
        structures=[_structure(q, values.get(q.name, []), voxel_ml) for q in assessment.structures],
        slices=[
            SliceEstimate(instance=uid, error_ml=error) for uid, error in zip(instances, sums.tolist(), strict=True)
        ],
        worst_slices=[instances[index] for index in assessment.worst_slices(WORST_SLICES)],
        boxes=[box for quality in assessment.structures for box in _boxes(quality, assessment.shape, header)],
    )


def _structure(quality: StructureQuality, values: list[int], voxel_ml: float) -> StructureEstimate:
    return StructureEstimate(
        name=quality.name,
        values=values,
        present=quality.present,
        dice=quality.estimated.dice,
        interval=applying(quality.intervals.dice),
        error_ml=voxel_ml * sum(s.error_sum for s in quality.raw.slices),
    )


def _boxes(quality: StructureQuality, shape: tuple[int, int, int], header: ScanHeader) -> list[Box]:
    instances, found = list(header.instances), []
    for box in quality.raw.boxes:
        columns, rows = header.layout.to_image_rectangle(box.start, box.stop, shape)
        found.append(
            Box(
                instance=instances[box.slice_index],
                structure=quality.name,
                columns=columns,
                rows=rows,
                area_mm2=box.area_mm2,
                peak_error=box.peak_error,
            )
        )
    return found


def view_proposal(proposal: Proposal, header: ScanHeader, structures: Sequence[Structure]) -> ViewedProposal:
    """A proposal as an annotator is shown it."""
    instances, made_of = list(header.instances), proposal.label.parent
    assert made_of is not None
    values = {structure.name: list(structure.values) for structure in structures}
    layout = header.layout
    sizes = dict(zip((layout.slice_axis, layout.row_axis, layout.column_axis), header.planes.shape, strict=True))
    shape = sizes[0], sizes[1], sizes[2]
    boxes = []
    for box in proposal.boxes:
        columns, rows = layout.to_image_rectangle(box.start, box.stop, shape)
        boxes.append(
            BoxToTake(
                instance=instances[box.slice_index],
                structure=box.structure,
                values=values.get(box.structure, []),
                columns=columns,
                rows=rows,
                voxels=box.voxels,
            )
        )
    return ViewedProposal(version=proposal.label.id, made_of=made_of, boxes=boxes)


def to_bytes(array: Array, header: ScanHeader) -> bytes:
    """Bytes of voxels, uint8 in the file's order, as the viewer takes them: image by image."""
    return header.layout.to_images(array).astype(np.uint8, copy=False).tobytes()


def from_bytes(content: bytes, instances: Sequence[str], header: ScanHeader, *, is_packed: bool) -> LabelArray:
    """A label map as the viewer sends it, in the file's voxel order.

    Args:
        content: a byte a voxel.
        instances: the images that it holds, in their order.
        header: of the scan.
        is_packed: whether the content is compressed by gzip.

    Raises:
        RequestError: 422 if it does not hold all of the scan's images once, or is of another size.
    """
    if len(instances) != header.count or set(instances) != set(header.instances):
        raise RequestError(
            422, f"a label map holds each of the scan's {header.count} slices once, by its SOPInstanceUID."
        )
    size = int(np.prod(header.planes.shape))
    raw = _unpacked(content, size) if is_packed else content
    if len(raw) != size:
        came = "more" if len(raw) > size else "fewer"
        raise RequestError(422, f"a label map of this scan has {size} bytes, one a voxel; what came has {came}.")
    images = np.frombuffer(raw, np.uint8).reshape(header.planes.shape)
    order = [header.instances[instance] for instance in instances]
    sorted_images = np.empty_like(images)
    sorted_images[order] = images
    return np.ascontiguousarray(header.layout.from_images(sorted_images))


def _unpacked(content: bytes, size: int) -> bytes:
    """What was compressed by gzip, and no more than a byte beyond what there may be."""
    try:
        return zlib.decompressobj(wbits=31).decompress(content, size + 1)
    except zlib.error as error:
        raise RequestError(
            422, "the label map is damaged: its compressed bytes cannot be read; send it again."
        ) from error


def packed(content: bytes) -> bytes:
    """Compress by gzip, quickly."""
    compressor = zlib.compressobj(_QUICK, wbits=31)
    return compressor.compress(content) + compressor.flush()


def label_map(context: AppContext, scan: DicomScan, voxels: LabelArray) -> Volume:
    """A label map on its scan's grid.

    Raises:
        RequestError: 422 if it holds a value that is no structure's, where the settings name the structures.
    """
    names = context.labels()
    foreign = sorted(set(np.flatnonzero(np.bincount(voxels.ravel(), minlength=256)).tolist()) - {0, *names.values()})
    if foreign and context.settings.structures:
        known = ", ".join(f"{value} ({name})" for name, value in names.items())
        raise RequestError(
            422, f"the label map holds the value {foreign[0]}, which is no structure's; there are {known}."
        )
    grid = read_grid(context.dataset.scan_file(scan.record), limits=context.settings.intake)
    return Volume(voxels, grid.affine, grid.acquisition_axis)
