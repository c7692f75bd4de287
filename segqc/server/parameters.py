"""What routes take: JSON, as the body or as a form's field, by one model for each purpose; and queries that they share.

MONAI Label calls the JSON ``params``. A body may be absent, or null. Keys that are not listed are ignored, as clients
send what other servers know; a listed key whose value cannot be used is refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated, Final, Literal, TypeAlias, TypeVar

from fastapi import Body, Form, Query
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    JsonValue,
    StrictInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from segqc.loop.requests import MAX_SCANS
from segqc.loop.review import Decision
from segqc.server.errors import RequestError
from segqc.server.names import check_tag
from segqc.store.labels import ORIGINAL
from segqc.store.records import JsonObject
from segqc.text import first_problem

T = TypeVar("T")

MAX_COUNT: Final = 2**31 - 1
MAX_INTEGER: Final = 2**63 - 1  # of databases
MAX_JSON_DEPTH: Final = 32
_MAX_TEXT: Final = 500

# Fields that decide what is read, run or written. They have their own place in a request, `params` does not set them.
_RESERVED: Final = frozenset({
    "image", "images", "image_id", "model", "method", "strategy", "label", "session", "description", "bundle_path",
    "result_write_to_file", "local_rank", "network", "path", "id",
})  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- values


def check_json(value: JsonValue, depth: int = 0) -> JsonValue:
    """Return a value that every database and every client can read: Python's own JSON allows more.

    Raises:
        ValueError: if it holds NaN, an infinite number, an integer of more than 64 bits, a character that is none
            (a lone surrogate or NUL), or is nested too deep.
    """
    if depth > MAX_JSON_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH} levels")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a JSON number")
    if isinstance(value, int) and not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise ValueError("it holds an integer of more than 64 bits")
    if isinstance(value, str):
        _check_text(value)
    if isinstance(value, list):
        for item in value:
            check_json(item, depth + 1)
    if isinstance(value, dict):
        for key, item in value.items():
            _check_text(key)
            check_json(item, depth + 1)
    return value


def _check_text(text: str) -> None:
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("it holds a character that is none (NUL or half of a surrogate pair)")


def _check_line(text: str) -> str:
    if len(text) > _MAX_TEXT or not text.isprintable():
        raise ValueError(f"it is not a line of text of at most {_MAX_TEXT} characters")
    return text


def _refused_as(name: str) -> WrapValidator:
    """Answer 400 to JSON that cannot be used, where a request without it, or that is no JSON at all, gets 422."""

    def refuse(value: object, validate: ValidatorFunctionWrapHandler) -> object:
        try:
            return validate(value)
        except ValidationError as error:
            raise RequestError(400, f"{name}: {first_problem(error.errors())}") from error

    return WrapValidator(refuse)


def _given(value: JsonValue) -> JsonValue:
    return {} if value is None else check_json(value)


Tag: TypeAlias = Annotated[str, AfterValidator(check_tag)]
Line: TypeAlias = Annotated[str, AfterValidator(_check_line)]
ClientId: TypeAlias = Annotated[
    str, Field(pattern=r"^[^\x00-\x1f\x7f]{0,200}$", description="What the client calls itself.")
]

_Given: TypeAlias = Annotated[T, BeforeValidator(_given)]
JsonBody: TypeAlias = Annotated[_Given[T], _refused_as("params")]
JsonText: TypeAlias = Annotated[Json[_Given[T]], _refused_as("params")]
JsonInfo: TypeAlias = Annotated[Json[_Given[T]], _refused_as("info")]


# ------------------------------------------------------------------------------------------------------ what is asked


class Params(BaseModel):
    """What any request may hold."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    client_id: ClientId | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_reserved(cls, value: object) -> object:
        forbidden = sorted(_RESERVED & value.keys()) if isinstance(value, dict) else []
        if forbidden:
            raise ValueError(f"they may not set {', '.join(map(repr, forbidden))}: it has its own field")
        return value


class SampleParams(Params):
    """The next scan to correct."""

    skip_reason: Line | None = Field(None, description="Why the scan that the annotator has is put aside.")
    resume: Line | None = Field(
        None, description="A scan that was put aside, or whose label was rejected, and is wanted back."
    )


class SkipParams(Params):
    """Putting a scan aside."""

    reason: Line = Field(min_length=1, description="Why.")


class ReviewParams(Params):
    """What a reviewer decides."""

    decision: Decision
    reason: Line | None = Field(None, description="Why; needed to reject or to exclude.")
    seen: int | None = Field(
        None,
        ge=0,
        le=MAX_INTEGER,
        description="The newest label version that the reviewer has seen: a later final label is not decided of.",
    )


class ScoringParams(Params):
    """Scoring the scans that wait."""

    force: bool = Field(False, description="Also scans with a current score.")


class AuditParams(Params):
    """Judging the final labels."""

    force: bool = Field(False, description="Also labels that the serving bundle has judged.")


class MarkParams(Params):
    """Whether a final label is right."""

    version: Annotated[StrictInt, Field(ge=1, le=MAX_INTEGER)] = Field(description="The version that was looked at.")
    right: bool = Field(True, description="False to take a mark back.")


class BatchParams(Params):
    """Inference on many scans."""

    label_tag: Tag | None = Field(None, description=f"The tag of the masks; {ORIGINAL!r} by default.")
    max_batch_size: int = Field(0, ge=0, le=MAX_SCANS, description="The most scans; 0 for no limit.")


class ViewerNextParams(Params):
    """The next scan for the viewer."""

    skip_reason: Line | None = Field(None, min_length=1, description="Why the scan that the annotator has is skipped.")


class TakenBoxes(BaseModel):
    """What an annotator took of a proposal."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: Annotated[StrictInt, Field(ge=0, le=MAX_INTEGER)] = Field(description="The proposal's label version.")
    boxes: Annotated[StrictInt, Field(ge=0, le=MAX_COUNT)] = Field(description="How many of its boxes were taken.")


class ViewerSubmission(Params):
    """What comes with a label map from the viewer."""

    instances: tuple[Line, ...] = Field(description="SOPInstanceUIDs of the slices, in the order of the voxels.")
    started_from: Annotated[StrictInt, Field(ge=0, le=MAX_INTEGER)] | None = Field(
        description="The label version that it was made of; null for an empty label map."
    )
    beside: bool = Field(False, description="Whether to keep it beside the final label, whatever that is by now.")
    proposal: TakenBoxes | None = Field(None, description="What was taken of a proposal, where one was offered.")


class SegmentNames(BaseModel):
    """What the values of a label map mean, where its file does not say."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    label_info: list[JsonObject] | None = Field(None, description="The segments in the order of their values from 1.")
    label_names: dict[str, JsonValue] | None = Field(None, description="The segments' names, and their values.")


class InferParams(Params, SegmentNames):
    """Inference on one scan; the segments' names are those of an uploaded label map.

    What else is sent reaches the inference task if it is one of the task's own parameters.
    """

    model_config = ConfigDict(extra="allow")

    label_tag: Tag | None = Field(None, description="The stored label map to assess; or where the mask is kept.")
    save_label: bool = Field(False, description="Whether to keep what is made.")
    result_extension: Literal[".nii.gz", ".nii", ".nrrd"] | None = None
    result_compress: bool | None = None

    def for_task(self, own: Collection[str]) -> JsonObject:
        """What a task gets that has these parameters of its own."""
        further = {name: value for name, value in (self.model_extra or {}).items() if name in own}
        return {**self.model_dump(include=set(InferParams.model_fields)), **further}


class LabelParams(SegmentNames):
    """What is sent with a label map, or noted of it: any JSON object, which is kept."""

    model_config = ConfigDict(extra="allow")

    client_id: ClientId | None = None
    opened_slices: tuple[StrictInt, ...] | None = Field(
        None,
        description="The slices that were looked at, from 0; by default those asked for and those changed, else all.",
    )
    opened_structures: tuple[str, ...] | None = Field(None, description="The same of structures, by their names.")
    simulated: bool = Field(False, description="Whether no person made it.")

    def to_json(self) -> JsonObject:
        """The object as it was sent."""
        return self.model_dump(mode="json", exclude_unset=True)


SampleBody: TypeAlias = Annotated[JsonBody[SampleParams], Body(default_factory=SampleParams)]
ViewerNextBody: TypeAlias = Annotated[JsonBody[ViewerNextParams], Body(default_factory=ViewerNextParams)]
ViewerText: TypeAlias = Annotated[JsonText[ViewerSubmission], Form()]
SkipBody: TypeAlias = Annotated[JsonBody[SkipParams], Body()]
ReviewBody: TypeAlias = Annotated[JsonBody[ReviewParams], Body()]
ScoringBody: TypeAlias = Annotated[JsonBody[ScoringParams], Body(default_factory=ScoringParams)]
AuditBody: TypeAlias = Annotated[JsonBody[AuditParams], Body(default_factory=AuditParams)]
MarkBody: TypeAlias = Annotated[JsonBody[MarkParams], Body()]
BatchBody: TypeAlias = Annotated[JsonBody[BatchParams], Body(default_factory=BatchParams)]
TrainingBody: TypeAlias = Annotated[
    JsonBody[JsonObject],
    Body(
        default_factory=dict,
        description="Settings over those of the folder, as /info/ lists them of a trainer; or an object for each.",
    ),
]
InferText: TypeAlias = Annotated[JsonText[InferParams], Form(default_factory=InferParams)]
LabelText: TypeAlias = Annotated[JsonText[LabelParams], Form(default_factory=LabelParams)]
ImageText: TypeAlias = Annotated[JsonText[JsonObject], Form(default_factory=dict)]
ImageInfo: TypeAlias = Annotated[JsonInfo[JsonObject], Form(default_factory=dict)]

RunSync: TypeAlias = Annotated[bool, Query(description="Whether to answer when the jobs have ended.")]
Enqueue: TypeAlias = Annotated[bool, Query(description="Whether to wait behind a job of the same kind.")]
AllJobs: TypeAlias = Annotated[bool, Query(description="Whether to tell of all jobs, not the last one.")]
OnlyOpen: TypeAlias = Annotated[bool, Query(description="Whether to answer 404 where no job runs or waits.")]


class LabelInfoForm(BaseModel):
    """The form of a note on a label map."""

    info: JsonInfo[LabelParams] = Field(default_factory=LabelParams)


class ReviewerForm(BaseModel):
    """The same, as 3D Slicer's reviewer sends it."""

    params: JsonText[LabelParams] = Field(default_factory=LabelParams)
