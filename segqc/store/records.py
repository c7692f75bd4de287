"""What the store hands out: frozen records, no rows of tables.

Records are built by keyword. Times are in UTC; numbers are keys of the store's tables.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pydantic import JsonValue

from segqc.split import Split
from segqc.text import nfc
from segqc.types import DriftAlarm, MetricIntervals, Metrics
from segqc.volumes import scan_suffix

JsonObject: TypeAlias = dict[str, JsonValue]
ActorKind: TypeAlias = Literal["person", "network", "system"]
Identification: TypeAlias = Literal[
    "signed-in", "oidc", "trusted-header", "client-id", "cookie", "command", "folder", "program"
]
Role: TypeAlias = Literal["annotator", "reviewer", "operator"]
SignInKind: TypeAlias = Literal["session", "token"]
ScanState: TypeAlias = Literal["unlabelled", "rejected", "submitted", "approved", "excluded"]
LabelSource: TypeAlias = Literal[
    "network", "annotator", "pseudo-label", "import", "restored", "consensus", "attention check", "removal"
]
Draw: TypeAlias = Literal["strategy", "audit", "validation", "pseudo-audit", "rejected"]
LeaseState: TypeAlias = Literal["open", "submitted", "skipped", "expired", "released"]
FeatureKind: TypeAlias = Literal["appearance", "segmenter"]
FindingKind: TypeAlias = Literal["scan", "label", "other"]
SegmentationOrigin: TypeAlias = Literal["own", "found"]
SegmentationState: TypeAlias = Literal["empty", "storing", "stored", "withdrawn", "left"]
JobState: TypeAlias = Literal["queued", "running", "done", "failed", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """An actor, and how it is known that it is this one."""

    kind: ActorKind
    name: str  # a person's name, a network's version, or a program
    identified_by: Identification


@dataclass(frozen=True, slots=True, kw_only=True)
class UserRecord:
    """Somebody who may sign in."""

    id: int
    name: str
    role: Role
    has_password: bool  # False where another place signs them in: an OpenID provider, or a proxy
    provider_subject: str | None  # by which an OpenID provider knows them: its address and their id there
    added_at: dt.datetime
    last_sign_in_at: dt.datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SignInRecord:
    """A sign-in that counts: a browser's session, or a program's token."""

    user: UserRecord
    kind: SignInKind
    identified_by: Identification
    made_at: dt.datetime
    expires_at: dt.datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanRecord:
    """A scan of the folder."""

    id: int
    name: str
    file: str  # relative to the folder
    patient: str
    fold: int  # the patient's
    split: Split  # the patient's
    state: ScanState
    reason: str | None  # why it was rejected or excluded
    ranking_dice: float | None  # the estimate that it is ranked by, from 0 to 1
    info: JsonObject  # what clients noted
    added_at: dt.datetime
    missing_since: dt.datetime | None  # None while its file is there
    sha256: str | None  # its content; None until the file was read
    signature: str | None  # tells quickly whether the file still holds it (see `files.signature_of`)
    former_name: str | None  # its name until another content took the place of its file

    @property
    def suffix(self) -> str:
        """What its file's name has beyond its own name, as it is spelt."""
        end = scan_suffix(self.file) or ""
        return "" if nfc(self.name) == nfc(self.file) else self.file[len(self.file) - len(end) :]


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingRecord:
    """A file of the folder that was not taken in."""

    file: str  # relative to the folder
    kind: FindingKind
    sentence: str  # why
    found_at: dt.datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleRecord:
    """A segmentation network and the SegQC-Net that judges it."""

    id: int  # the number of its folder
    segmenter_version: str | None  # None while there is no segmentation network
    assessor_version: str | None  # None while there is no SegQC-Net


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """When work on networks began, told by what was the newest then: a clock may be set back."""

    event: int
    label: int  # label version; the networks know none that came later


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedBundle:
    """A bundle and how it came to be."""

    bundle: BundleRecord
    manifest_sha256: str  # of the manifest in its folder
    parent: int | None  # the bundle that served before, of which it may hold a network
    reason: str  # what it was published for, such as "training of segqc"
    actor: Actor
    published_at: dt.datetime
    newest_label: int  # the newest label version then
    is_serving: bool
    ranked_by: str | None  # the strategy whose order its estimates' order is replaced by; None for their own
    held_because: str | None  # why it does not serve by itself; None where it does, did, or was let to
    drift_alarm: DriftAlarm | None  # what audit draws say against its estimates; None where they say nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRecord:
    """One version of a scan's label map, or a removal."""

    id: int
    scan: str  # its name
    tag: str
    source: LabelSource
    sha256: str | None  # its content; None for a removal
    suffix: str | None  # of the file that holds it, such as ".nii.gz"; None for a removal
    parent: int | None  # the version that it was made of
    bundle: BundleRecord | None  # the pair of networks whose network made it
    actor: Actor
    made_at: dt.datetime
    submitted_sha256: str | None = None  # of the file that a person put into the folder, where it was read from one
    submitted_suffix: str | None = None  # the same file's suffix
    checked_slices: tuple[int, ...] | None = None  # that a person has looked at, ascending; None for all


@dataclass(frozen=True, slots=True, kw_only=True)
class PseudoLabelRecord:
    """A mask that was accepted as a pseudo-label, by which estimate and rule, and what became of it."""

    label: LabelRecord  # its parent is the mask, its bundle the one that made and accepted it
    ignored: LabelRecord  # the voxels that are left out of the loss, as a label map
    dice: float  # estimated, of the worst structure
    low: float  # the least lower end of the structures' intervals
    level: float  # of the intervals
    rule: str  # in words
    max_error: float  # voxels with a higher error probability are left out of the loss
    is_audited: bool  # whether a person shall check it
    ended_at: dt.datetime | None  # None while it is accepted
    ended_because: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """A scan handed out."""

    id: int
    scan: str  # its name
    actor: Actor
    slot: int  # which of the annotators who label each scan, from 0
    state: LeaseState
    handed_out_at: dt.datetime
    expires_at: dt.datetime
    closed_at: dt.datetime | None  # None while it is open
    strategy: str  # which chose the scan
    score: float | None  # by which it was chosen
    draw: Draw
    probability: float | None  # with which a suggestion was drawn at random
    pool: int | None  # how many scans waited when it was drawn at random
    label_version: int | None  # that was shown
    assessment: int | None  # that was shown
    slices: tuple[int, ...] | None = None  # that the annotator is asked for, ascending; None for the whole scan


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCheck:
    """An error that was planted into the mask that a lease hands out; it lies where both versions differ."""

    lease: LeaseRecord
    served: LabelRecord  # the network's mask
    shown: LabelRecord  # the same with the error
    kind: str  # of the error
    found: bool | None  # whether the annotator has corrected it; None until the lease is answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """How many planted errors an annotator got, and what became of them."""

    actor: Actor
    planted: int
    submitted: int  # scans with one
    found: int  # of these


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What suggestions of one kind have cost."""

    draw: Draw
    handed_out: int  # scans
    submitted: int  # scans
    skipped: int  # scans
    hours: float  # until submission, all together


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureChange:
    """The start of a correction against its end, of one structure."""

    name: str
    metrics: Metrics  # true, in 3D
    voxels_changed: int
    slices: tuple[Metrics, ...]  # true, of each slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a correction changed."""

    through_plane_axis: int
    voxels_changed: int
    slices_changed: int
    structures: tuple[StructureChange, ...]
    opened_slices: tuple[int, ...] | None = None  # those that were looked at; None for all
    opened_structures: tuple[str, ...] | None = None  # those that were looked at; None for all


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenProposal:
    """What a person took of a proposal for a label."""

    proposal: int  # its label version
    boxes_offered: int
    boxes_taken: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionRecord:
    """A correction: from which version to which, by whom, what it changed, and what had been estimated."""

    id: int
    scan: str  # its name
    from_version: int
    to_version: int
    lease: LeaseRecord | None  # that it answers
    assessment: int | None  # that the annotator was shown
    actor: Actor
    made_at: dt.datetime
    seconds: float | None  # from hand-out to submission
    simulated: bool  # no person has made it
    change: Change
    proposal: TakenProposal | None = None  # that was offered, where one was


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatorWork:
    """What one annotator has corrected."""

    actor: Actor
    corrections: int
    timed: int  # corrections of which the time is known, from hand-out to submission
    seconds: float  # of these, all together
    voxels_changed: int  # all together
    slices_changed: int  # all together
    mean_dice_before: float | None  # of the masks against their corrections, of each one's worst structure
    last_at: dt.datetime
    attention: Attention | None  # None without planted errors


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionLine:
    """A correction in a list: where, by whom, how long it took and how large it was."""

    scan: str
    actor: Actor
    made_at: dt.datetime
    seconds: float | None  # from hand-out to submission
    voxels_changed: int
    slices_changed: int
    dice_before: float | None  # of the structure that was corrected most
    estimated_dice: float | None  # that was shown
    draw: Draw | None  # how the scan was chosen
    simulated: bool
    from_version: int
    to_version: int
    boxes_offered: int | None  # of a proposal; None where none was offered
    boxes_taken: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedEstimate:
    """What was estimated of one structure when its scan was handed out, beside what the correction showed to be true.

    The versions are those of the network that made the mask, and of the SegQC-Net that assessed it.
    """

    patient: str
    scan: str  # its name
    made_at: dt.datetime  # when the correction came
    label: int  # the version that came of it
    structure: str  # its name
    segmenter_version: str | None  # None where no network made the mask
    assessor_version: str | None
    estimated: Metrics
    intervals: MetricIntervals
    true: Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A piece of long work and how far it is."""

    id: int
    public_id: str  # the number that clients see, a UUID
    kind: str
    request: JsonObject  # what is asked for; its kind says how it is read
    state: JobState
    attempts: int  # how often a worker has taken it
    worker: str | None  # that does it, or did
    done_steps: int
    all_steps: int  # 0 while nobody knows
    messages: tuple[str, ...]  # the last lines that it said
    result: JsonObject | None  # None until it is done
    stop_wanted: bool
    reason: str | None  # why it was put; None where its actor asked for it
    actor: Actor  # who asked for it
    enqueued_at: dt.datetime
    started_at: dt.datetime | None  # the first time
    heartbeat_at: dt.datetime | None  # the worker's last sign of life
    ended_at: dt.datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """A round that has begun."""

    number: int
    job: JobRecord
    bundle: int | None  # that it published or held; None before that
    labelled: int  # scans with a final label, when it began
    started_at: dt.datetime
    ended_at: dt.datetime | None  # None until its last step is done
    steps: Mapping[str, JsonObject]  # the results of its finished steps, by their names


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSince:
    """The scans that got a final label from people, or from a simulated annotator, after some label version."""

    scans: int
    first_at: dt.datetime | None  # when the earliest of these labels came; None without one
    simulated: int = 0  # how many of these labels are simulated corrections
    imported: int = 0  # how many were put into the folder or the PACS


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    """Something that happened."""

    at: dt.datetime
    actor: Actor
    verb: str
    object_kind: str  # the table of what it happened to
    object_id: int  # its row
    detail: JsonObject | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesRecord:
    """Of which series of a PACS a scan is."""

    file: str  # the scan's, as its row calls it
    study_uid: str
    series_uid: str
    description: str  # of the series, maybe empty
    modality: str
    images: int  # of the whole series, which may be several scans


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationRecord:
    """A label version as a DICOM SEG in a PACS, and how far its way there is."""

    id: int
    scan: str  # its name
    label: int  # the version
    origin: SegmentationOrigin
    state: SegmentationState
    study_uid: str
    series_uid: str  # of the SEG
    attempts: int  # that failed, of the step that is to be done now
    problem: str | None  # of the last attempt, or why it was left
    changed_at: dt.datetime
