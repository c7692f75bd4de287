"""What the store hands out: frozen records, no rows of tables."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pydantic import JsonValue

from segqc.split import Split
from segqc.types import MetricIntervals, Metrics

JsonObject: TypeAlias = dict[str, JsonValue]
ActorKind: TypeAlias = Literal["person", "network", "system"]
Identification: TypeAlias = Literal[
    "signed-in", "trusted-header", "client-id", "cookie", "command", "folder", "program"
]
ScanState: TypeAlias = Literal["unlabelled", "rejected", "submitted", "approved", "excluded"]
LabelSource: TypeAlias = Literal["network", "annotator", "pseudo-label", "import", "restored", "consensus", "removal"]
Draw: TypeAlias = Literal["strategy", "audit", "validation"]
LeaseState: TypeAlias = Literal["open", "submitted", "skipped", "expired", "released"]
FindingKind: TypeAlias = Literal["scan", "label", "other"]
JobState: TypeAlias = Literal["queued", "running", "done", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class Actor:
    """An actor, and how it is known that it is this one."""

    kind: ActorKind
    name: str
    identified_by: Identification


@dataclass(frozen=True, slots=True)
class ScanRecord:
    """A scan of the folder; ``file`` is relative to it.

    ``sha256`` is its content, None until the file was read, and ``signature`` tells quickly whether the file still
    holds it (see `files.signature_of`). ``former_name`` is the name that it had until another content took the place of
    its file.
    """

    id: int
    name: str
    file: str
    patient: str
    fold: int
    split: Split
    state: ScanState
    reason: str | None
    ranking_dice: float | None
    info: JsonObject
    added_at: dt.datetime
    missing_since: dt.datetime | None
    sha256: str | None
    signature: str | None
    former_name: str | None


@dataclass(frozen=True, slots=True)
class FindingRecord:
    """A file of the folder that was not taken in: its path relative to the folder, and a sentence that says why."""

    file: str
    kind: FindingKind
    sentence: str
    found_at: dt.datetime


@dataclass(frozen=True, slots=True)
class BundleRecord:
    """A segmentation network and the SegQC-Net that judges it; None while there is no SegQC-Net."""

    id: int
    segmenter_version: str
    assessor_version: str | None


@dataclass(frozen=True, slots=True)
class LabelRecord:
    """One version of a scan's label map; ``sha256`` is None for a removal.

    ``submitted_sha256`` and ``submitted_suffix`` are those of the file that a person put into the folder, where the
    label map had to be read from it into another file.
    """

    id: int
    scan: str
    tag: str
    source: LabelSource
    sha256: str | None
    suffix: str | None
    parent: int | None
    bundle: BundleRecord | None
    actor: Actor
    made_at: dt.datetime
    submitted_sha256: str | None = None
    submitted_suffix: str | None = None


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """A scan handed out; ``label_version`` and ``assessment`` are those that were shown."""

    id: int
    scan: str
    actor: Actor
    slot: int
    state: LeaseState
    handed_out_at: dt.datetime
    expires_at: dt.datetime
    closed_at: dt.datetime | None
    strategy: str
    score: float | None
    draw: Draw
    probability: float | None
    pool: int | None
    label_version: int | None
    assessment: int | None


@dataclass(frozen=True, slots=True)
class Cost:
    """What suggestions of one kind have cost: scans handed out, submitted and skipped, and hours until submission."""

    draw: Draw
    handed_out: int
    submitted: int
    skipped: int
    hours: float


@dataclass(frozen=True, slots=True)
class StructureChange:
    """The start of a correction against its end, of one structure: true metrics in 3D and of each slice."""

    name: str
    metrics: Metrics
    voxels_changed: int
    slices: tuple[Metrics, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """What a correction changed. ``opened_*`` are None where the whole scan was looked at (see `Correction`)."""

    through_plane_axis: int
    voxels_changed: int
    slices_changed: int
    structures: tuple[StructureChange, ...]
    opened_slices: tuple[int, ...] | None = None
    opened_structures: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class CorrectionRecord:
    """A correction: from which version to which, by whom, what it changed, and what had been estimated."""

    id: int
    scan: str
    from_version: int
    to_version: int
    lease: LeaseRecord | None
    assessment: int | None
    actor: Actor
    made_at: dt.datetime
    seconds: float | None
    simulated: bool
    change: Change


@dataclass(frozen=True, slots=True)
class CheckedEstimate:
    """What was estimated of one structure when its scan was handed out, beside what the correction showed to be true.

    Both versions are those of the estimate's bundle.
    """

    patient: str
    scan: str
    structure: str
    segmenter_version: str
    assessor_version: str
    estimated: Metrics
    intervals: MetricIntervals
    true: Metrics


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A piece of long work and how far it is."""

    id: int
    public_id: str
    kind: str
    request: JsonObject
    state: JobState
    attempts: int
    worker: str | None
    done_steps: int
    all_steps: int
    messages: tuple[str, ...]
    result: JsonObject | None
    stop_wanted: bool
    actor: Actor
    enqueued_at: dt.datetime
    started_at: dt.datetime | None
    heartbeat_at: dt.datetime | None
    ended_at: dt.datetime | None


@dataclass(frozen=True, slots=True)
class EventRecord:
    """Something that happened."""

    at: dt.datetime
    actor: Actor
    verb: str
    object_kind: str
    object_id: int
    detail: JsonObject | None
