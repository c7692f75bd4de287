"""What jobs are asked for and what comes of them: one frozen record a kind, in the store as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias, assert_never

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from segqc.loop.errors import DatasetError
from segqc.networks.bundle import NETWORKS as NETWORKS
from segqc.settings import NetworkName
from segqc.store import jobs
from segqc.store.database import Transaction
from segqc.store.events import SERVER
from segqc.store.labels import FINAL, ORIGINAL, is_servers_own
from segqc.store.records import Actor, JobRecord, JsonObject
from segqc.text import first_problem
from segqc.types import MaskDice

JobKind: TypeAlias = Literal["train", "scoring", "batch_infer", "round", "audit"]
BatchImages: TypeAlias = Literal["all", "labeled", "unlabeled"]
KINDS: Final[tuple[JobKind, ...]] = ("train", "scoring", "batch_infer", "round", "audit")
MAX_SCANS: Final = 1_000_000_000


def mask_tag_problem(tag: str) -> str | None:
    """Why a network's masks are not kept under a tag when somebody asks for them: a sentence; None where they are."""
    if tag == FINAL:
        return "a network's mask is never final: final labels are what annotators submit."
    if tag != ORIGINAL and is_servers_own(tag):
        return f"a network's mask is not kept under the tag {tag!r}: the server keeps its own there; name another tag."
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """Train and publish a network."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    kind: ClassVar[JobKind] = "train"

    model: NetworkName
    settings: JsonObject = field(default_factory=dict)  # over those of the folder, by the names of `TrainingSettings`
    serve: bool = False  # even if its estimates are worse than those that serve


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringRequest:
    """Score the scans that wait for a label."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    kind: ClassVar[JobKind] = "scoring"

    method: str  # the name of a strategy with a score
    force: bool = False  # also scans with a current score


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """Make masks, or label maps of likely errors, of many scans."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    kind: ClassVar[JobKind] = "batch_infer"

    model: NetworkName
    images: BatchImages = "all"
    label_tag: str = ORIGINAL  # of the masks
    max_batch_size: Annotated[int, Field(ge=0, le=MAX_SCANS)] = 0  # the most scans; 0 for no limit

    def __post_init__(self) -> None:
        """Refuse tags under which only people or rounds keep labels; SegQC-Net's label maps have a tag of their own.

        Raises:
            ValueError: with the reason.
        """
        if self.model == "segmentation" and (problem := mask_tag_problem(self.label_tag)) is not None:
            raise ValueError(problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRequest:
    """Train both networks, publish them together, and score the pool."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    kind: ClassVar[JobKind] = "round"

    segmentation: JsonObject = field(default_factory=dict)  # as `TrainRequest.settings`
    segqc: JsonObject = field(default_factory=dict)  # as `TrainRequest.settings`
    serve: bool = False  # as `TrainRequest.serve`

    def training(self, network: NetworkName) -> TrainRequest:
        """The training of one of the networks."""
        return TrainRequest(model=network, settings=self.segmentation if network == "segmentation" else self.segqc)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRequest:
    """Judge the final labels, each by networks that have not seen its patient."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    kind: ClassVar[JobKind] = "audit"

    force: bool = False  # also labels that the serving bundle has judged


JobRequest: TypeAlias = TrainRequest | ScoringRequest | BatchRequest | RoundRequest | AuditRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """The run of a training in MLflow; ``url`` is its page, None where runs are kept in a folder."""

    id: str
    url: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What came of a training."""

    network: NetworkName
    scores: Mapping[str, float]  # of the network's card
    used: int  # scans with labels
    left_out: Mapping[str, str]  # why, by scan
    bundle: int | None = None  # that it was published as; None where a round publishes both networks together
    held_because: str | None = None  # why this bundle does not serve; None where it does
    validation: tuple[MaskDice, ...] = ()  # of the network's card
    pseudo_labels: int = 0  # scans with pseudo-labels that trained, too
    tracked: TrackedRun | None = None  # None where none was wanted, or MLflow could not be reached


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringResult:
    """What came of a scoring."""

    method: str  # the name of a strategy with a score
    scored: int
    skipped: int  # had a current score
    failed: Mapping[str, str]  # why, by scan
    marked: int | None = None  # of the scans that wait, those unlike the training's; None where nothing could mark them


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """What came of a batch inference."""

    model: NetworkName
    done: int
    failed: Mapping[str, str]  # why, by scan


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPseudoLabel:
    """A mask that shall be a pseudo-label, with the estimate that it was chosen by."""

    scan: str
    mask: int  # the label version
    dice: float  # estimated, of the worst structure
    low: float  # the least lower end of the structures' intervals
    level: float  # of the intervals


@dataclass(frozen=True, slots=True, kw_only=True)
class PseudoLabelPlan:
    """Which masks a round accepts as pseudo-labels."""

    rule: str  # in words
    bundle: int | None  # that made and assessed the masks; None where none serves
    supervised: int  # labelled scans that train: the cap is relative to them
    chosen: Sequence[PlannedPseudoLabel]  # to be made, new or in the place of an older one
    kept: Sequence[str]  # scans whose pseudo-label stays as it is
    dropped: Mapping[str, str]  # why, by scan
    refused: Mapping[str, int]  # how many scans that wait, by why they have none
    audited: int  # pseudo-labels that were drawn at random and corrected so far
    bad: int  # of those
    bad_bound: float  # on the share of bad ones, see `segqc.quality.pseudo_labels.audit_bound`


@dataclass(frozen=True, slots=True, kw_only=True)
class PseudoLabelResult:
    """What came of a plan."""

    made: int
    failed: Mapping[str, str]  # why, by scan


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """What came of a round."""

    round: int  # its number
    steps: Mapping[str, JsonObject]  # what came of each step, by its name


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """What came of judging the final labels."""

    judged: int
    known: int  # that the bundle had judged before
    seen: int  # whose patient every network has seen
    failed: Mapping[str, str]  # why, by scan


def training_step(network: NetworkName) -> str:
    """The name of the step of a round that trains a network."""
    return f"train {network}"


PUBLISH_STEP: Final = "publish"
"""The name of the step of a round that publishes both networks."""

JobResult: TypeAlias = TrainResult | ScoringResult | BatchResult | RoundResult | AuditResult
StepResult: TypeAlias = TrainResult | ScoringResult | PseudoLabelPlan | PseudoLabelResult

_REQUESTS: Final[Mapping[str, TypeAdapter[Any]]] = {
    request.kind: TypeAdapter(request)
    for request in (TrainRequest, ScoringRequest, BatchRequest, RoundRequest, AuditRequest)
}
_RESULT: Final[TypeAdapter[JobResult | StepResult]] = TypeAdapter(JobResult | StepResult)
_PLAN: Final = TypeAdapter(PseudoLabelPlan)
_TRAINED: Final = TypeAdapter(TrainResult)


def parse_request(kind: str, request: Mapping[str, object]) -> JobRequest:
    """Read what a job is asked for.

    Raises:
        DatasetError: if there is no such kind, a field is unknown or missing, or a value cannot be used.
    """
    if kind not in _REQUESTS:
        raise DatasetError(f"there is no kind of job {kind!r}; there are {', '.join(KINDS)}")
    try:
        read: JobRequest = _REQUESTS[kind].validate_python(dict(request))
    except ValidationError as error:
        raise DatasetError(f"{kind} request: {first_problem(error.errors())}") from error
    return read


def request_of(job: JobRecord) -> JobRequest:
    """What a job of the store is asked for.

    Raises:
        DatasetError: if it cannot be read.
    """
    return parse_request(job.kind, job.request)


def request_to_json(request: JobRequest) -> JsonObject:
    """A request as the store keeps it, without the fields that have their defaults; see `parse_request`."""
    written: JsonObject = _REQUESTS[request.kind].dump_python(request, mode="json", exclude_defaults=True)
    return written


def result_to_json(result: JobResult | StepResult) -> JsonObject:
    """A result of a job, or of a round's step, as the store keeps it."""
    written: JsonObject = _RESULT.dump_python(result, mode="json")
    return written


def train_result_of(step: JsonObject) -> TrainResult:
    """What came of a training that a finished step of a round has kept."""
    return _TRAINED.validate_python(step)


def plan_of(step: JsonObject) -> PseudoLabelPlan:
    """The plan that a finished step of a round has kept."""
    return _PLAN.validate_python(step)


def enqueue(
    transaction: Transaction,
    request: JobRequest,
    actor: Actor,
    *,
    messages: Sequence[str] = (),
    reason: str | None = None,
) -> JobRecord:
    """Put a job at the end of its kind's queue; see `jobs.enqueue`."""
    return jobs.enqueue(transaction, request.kind, request_to_json(request), actor, messages=messages, reason=reason)


def enqueue_scoring(transaction: Transaction) -> None:
    """Put a scoring of the pool, unless one waits already; what has a current score is left as it is."""
    if not any(job.state == "queued" for job in jobs.open_jobs(transaction, "scoring")):
        enqueue(transaction, ScoringRequest(method="segqc"), SERVER)


def title(request: JobRequest) -> str:
    """What a job is, in words: "the training of segqc"."""
    match request:
        case TrainRequest():
            return f"the training of {request.model}"
        case ScoringRequest():
            return f"the scoring by {request.method}"
        case BatchRequest():
            return f"the inference of {request.model} on many scans"
        case RoundRequest():
            return "the round"
        case AuditRequest():
            return "the audit of the labels"
        case _:
            assert_never(request)
