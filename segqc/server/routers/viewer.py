"""What the panel in the viewer asks for: the next scan, what is known of a scan, its label maps, and submissions."""

from __future__ import annotations

import asyncio
import functools
import re
from dataclasses import dataclass
from typing import Annotated, Final

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, File, Path, Request, Response, UploadFile

from segqc.loop import proposals
from segqc.loop.planted_errors import proposal_beside_error
from segqc.loop.scoring import error_map
from segqc.loop.submission import (
    LabelMovedOnError,
    StartedFrom,
    Submission,
    check_not_replaced,
    check_start,
    measure_change,
    submit_label,
)
from segqc.server.actors import RequestUser
from segqc.server.dicomweb.series import DicomScan, ScanHeader
from segqc.server.errors import RequestError
from segqc.server.monailabel.facade import current_app
from segqc.server.parameters import (
    MAX_INTEGER,
    LabelParams,
    SampleParams,
    ViewerNextBody,
    ViewerNextParams,
    ViewerSubmission,
    ViewerText,
)
from segqc.server.routers.checks import check_of, check_to_json
from segqc.server.routers.dependencies import AskingUser, in_turn, open_store
from segqc.server.routers.proposals import proposal_for
from segqc.server.routers.selection import DEFAULT_STRATEGY, next_scan, nothing_left
from segqc.server.submitted_labels import stored_info
from segqc.server.viewer import (
    ViewedProposal,
    ViewedScan,
    from_bytes,
    label_map,
    packed,
    to_bytes,
    view,
    view_proposal,
)
from segqc.store import attention_checks, labels, leases
from segqc.store.labels import FINAL, ORIGINAL, PROPOSAL
from segqc.store.records import Actor, JsonObject, LabelRecord, TakenProposal
from segqc.store.scans import ScanReplaced, drawn_on_another
from segqc.types import LabelArray
from segqc.volumes import Volume, read_grid

router = APIRouter(prefix="/segqc/viewer", tags=["SegQC"])

Study = Annotated[str, Path(description="SeriesInstanceUID of the scan, or its StudyInstanceUID.")]
VersionNumber = Annotated[int, Path(ge=0, le=MAX_INTEGER, description="The label version's number.")]
Voxels = Annotated[UploadFile, File(description="A byte a voxel, slice by slice; perhaps compressed by gzip.")]

_GZIP: Final = "application/gzip"
_BESIDE: Final = re.compile(r"version_([0-9]{1,9})")
_FOR_EVER: Final = "private, max-age=31536000, immutable"  # a version's voxels never change
_ASK_AGAIN: Final = "private, no-store"  # its error map does, with the bundle that serves; and where errors are planted


@dataclass(frozen=True, slots=True, kw_only=True)
class NextScan:
    """The scan that an annotator is to correct; ``note`` says what there is to know of it, or why there is none."""

    scan: ViewedScan | None
    note: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureDifference:
    """What a label map changes of one structure; the Dice is that of its start against it."""

    name: str
    voxels_changed: int
    dice: float | None
    is_empty: bool
    was_empty: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What the server says of a label map before it is submitted; ``conflict`` is why it would be refused."""

    voxels_changed: int
    slices_changed: int
    structures: list[StructureDifference]
    warnings: list[str]
    conflict: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A submitted label: its version, its tag, and the number of the correction where it is one.

    ``check`` is what ``GET /segqc/labels/{scan}/check`` answers by now.
    """

    version: int
    tag: str
    correction: int | None
    check: JsonObject


@router.post("/next", summary="The next scan for the viewer")
async def next_viewed(request: Request, user: AskingUser, params: ViewerNextBody) -> NextScan:
    """Hand out a scan: the one that the annotator has, unless a reason to skip it is given; else the next one."""
    return await in_turn(request, functools.partial(_next, user, params))


def _next(user: RequestUser, params: ViewerNextParams) -> NextScan:
    with open_store().read() as transaction:
        held = leases.held_by(transaction, user.actor(params.client_id))
    again = held.scan if held is not None and params.skip_reason is None else None
    wanted = SampleParams(client_id=params.client_id, skip_reason=params.skip_reason, resume=again)
    answer = next_scan(DEFAULT_STRATEGY, user, wanted)
    if not answer:
        return NextScan(scan=None, note=nothing_left(current_app().context.dataset))
    archive = current_app().context.archive
    scan = archive.named(str(answer["id"]))
    shown = view(current_app().context, scan, archive.header(scan), user.actor(params.client_id))
    note = answer.get("note")
    return NextScan(scan=shown, note=note if isinstance(note, str) else None)


@router.get("/scans/{study}", summary="What the viewer shows of a scan")
def viewed_scan(study: Study, user: AskingUser) -> ViewedScan:
    """Tell of a scan: its structures, the label to go on from, what is likely to be wrong with it, and its history."""
    scan, header = _scan(study)
    return view(current_app().context, scan, header, user.actor())


@router.get("/scans/{study}/labels/{version}", summary="A label map for the viewer")
async def label_voxels(request: Request, study: Study, version: VersionNumber, user: AskingUser) -> Response:
    """Send a label version: a byte a voxel, slice by slice in the order of the scan's ``instances``."""

    def work() -> Response:
        scan, header = _scan(study)
        label, context = _version(scan, version), current_app().context
        shown = _shown(label, user.actor())
        may_change = label.tag in (ORIGINAL, PROPOSAL) and context.settings.annotation.attention_checks > 0
        keeps = _ASK_AGAIN if may_change or shown.id != label.id else _FOR_EVER
        proposed = proposal_beside_error(context.dataset, label, user.actor())
        array = _read(scan, shown) if proposed is None else proposed.array
        return _bytes(request, to_bytes(array, header), keeps)

    return await in_turn(request, work)


@router.get("/scans/{study}/errors/{version}", summary="An error map for the viewer")
async def error_voxels(request: Request, study: Study, version: VersionNumber) -> Response:
    """Send the error map of a label version: 0 to 255 for a probability of 0 to 1, the highest of all structures'."""

    def work() -> Response:
        scan, header = _scan(study)
        label, context = _version(scan, version), current_app().context
        bundle = context.bundle("segqc")
        key = (study, version, bundle.number)
        found = context.error_maps.get(
            key, lambda: packed(to_bytes(error_map(context.dataset, scan.record, label, bundle), header))
        )
        return _sent(found, _ASK_AGAIN)

    # as any inference: annotators do not wait for it
    return await asyncio.get_running_loop().run_in_executor(request.app.state.inference, work)


@router.get("/scans/{study}/proposals/{version}", summary="A proposal for the viewer")
async def viewed_proposal(request: Request, study: Study, version: VersionNumber) -> ViewedProposal:
    """Tell what SegQC-Net would change of a label version, box by box; the proposal's voxels are a label version, too.

    It is made now where it is not yet.
    """

    def find() -> tuple[ScanHeader, LabelRecord]:
        scan, header = _scan(study)
        return header, _version(scan, version)

    header, label = await anyio.to_thread.run_sync(find)
    return view_proposal(await proposal_for(request, label), header, current_app().context.structures())


@router.post("/scans/{study}/check", summary="Check a label map before it is submitted")
async def check_label(request: Request, study: Study, user: AskingUser, params: ViewerText, voxels: Voxels) -> Check:
    """Tell what a label map changes, and whether it would be refused; nothing is kept."""
    return await in_turn(request, functools.partial(_check, study, user, params, voxels))


def _check(study: str, user: RequestUser, params: ViewerSubmission, voxels: UploadFile) -> Check:
    scan, header = _drawn_on(study, user.actor(params.client_id))
    end, dataset = _received(scan, header, params, voxels), current_app().context.dataset
    conflict = None
    try:
        with dataset.store.read() as transaction:
            readers = dataset.settings.annotation.readers
            check_start(transaction, scan.record.name, user.actor(params.client_id), _started(scan, params), readers)
    except LabelMovedOnError as error:
        conflict = str(error)
    before: LabelArray = np.zeros(end.shape, np.uint8)
    if params.started_from is not None:
        before = _read(scan, _shown(_version(scan, params.started_from), user.actor(params.client_id)))
    start = Volume(before, end.affine, end.acquisition_axis)
    structures = current_app().context.structures()
    change = measure_change(start, end, structures)
    differences = [
        StructureDifference(
            name=part.name,
            voxels_changed=part.voxels_changed,
            dice=part.metrics.dice,
            is_empty=not structure.mask(end.array).any(),
            was_empty=not structure.mask(before).any(),
        )
        for part, structure in zip(change.structures, structures, strict=True)
    ]
    return Check(
        voxels_changed=change.voxels_changed,
        slices_changed=change.slices_changed,
        structures=differences,
        warnings=_warnings(differences, change.voxels_changed),
        conflict=conflict,
    )


def _warnings(structures: list[StructureDifference], changed: int) -> list[str]:
    found = [f"{s.name} is empty now, and was not before." for s in structures if s.is_empty and not s.was_empty]
    if structures and all(s.is_empty for s in structures):
        found = ["The label map is empty: no structure has a voxel."]
    return found if changed else [*found, "Nothing was changed."]


@router.post("/scans/{study}/label", summary="Submit a label map from the viewer")
async def submit_voxels(request: Request, study: Study, user: AskingUser, params: ViewerText, voxels: Voxels) -> Kept:
    """Keep a label map as the scan's final label, or beside it where the client asks for that.

    It is refused with 409 where another label took the place of the one that it was made of. Nobody waits for its
    check here: the panel asks for it.
    """
    done = await in_turn(request, functools.partial(_submit, study, user, params, voxels))
    label, status = done.label, await check_of(request, done.label.id, wait=False)
    return Kept(version=label.id, tag=label.tag, correction=done.correction, check=check_to_json(status))


def _submit(study: str, user: RequestUser, params: ViewerSubmission, voxels: UploadFile) -> Submission:
    context = current_app().context
    scan, header = _drawn_on(study, user.actor(params.client_id))
    end = _received(scan, header, params, voxels)
    tag = _tag_beside(scan) if params.beside else FINAL
    info = stored_info(LabelParams(label_names={**context.labels()}), context.labels())
    return submit_label(
        context.dataset,
        scan.record.name,
        end,
        tag,
        user.actor(params.client_id),
        info=info,
        checked=scan.record,
        started=_started(scan, params),
        may_replace_approved=user.may("reviewer"),
        proposal=_taken(params),
    )


def _taken(params: ViewerSubmission) -> TakenProposal | None:
    """What was taken of a proposal, as the annotator's panel says."""
    told = params.proposal
    if told is None:
        return None
    with open_store().read() as transaction:
        return proposals.taken(transaction, told.version, told.boxes, params.started_from)


def _tag_beside(scan: DicomScan) -> str:
    """The next free tag of those that MONAI Label's Reviewer keeps beside the final label."""
    with open_store().read() as transaction:
        taken = [_BESIDE.fullmatch(label.tag) for label in labels.history(transaction, scan.record.name)]
    return f"version_{max((int(found[1]) for found in taken if found is not None), default=0) + 1}"


def _scan(study: str) -> tuple[DicomScan, ScanHeader]:
    archive = current_app().context.archive
    scan = archive.scan(study)
    return scan, archive.header(scan)


def _drawn_on(study: str, actor: Actor) -> tuple[DicomScan, ScanHeader]:
    """The scan that an annotator's label map was drawn on.

    Raises:
        RequestError: 404 if there is none, or another one took its place; it says so.
        ScanReplaced: 409 if the images of a PACS are others since they were handed out.
    """
    context = current_app().context
    try:
        found = _scan(study)
    except RequestError as error:
        name = context.archive.replaced(study)
        if name is None:
            raise
        try:
            check_not_replaced(context.dataset, name, actor)
        except ScanReplaced as replaced:
            raise RequestError(404, str(replaced)) from error
        raise RequestError(404, drawn_on_another(name, "you opened it")) from error
    check_not_replaced(context.dataset, found[0].record.name, actor)
    return found


def _version(scan: DicomScan, version: int) -> LabelRecord:
    with open_store().read() as transaction:
        found = [label for label in labels.history(transaction, scan.record.name) if label.id == version]
    if not found or found[0].sha256 is None or found[0].source == "attention check":
        raise RequestError(404, f"the scan {scan.record.name!r} has no label version {version} with voxels.")
    return found[0]


def _shown(label: LabelRecord, actor: Actor) -> LabelRecord:
    """The version whose voxels an annotator gets."""
    with open_store().read() as transaction:
        return attention_checks.shown_to(transaction, label, actor)


def _started(scan: DicomScan, params: ViewerSubmission) -> StartedFrom:
    """What a label map was made of, a version of the same scan."""
    return StartedFrom(None if params.started_from is None else _version(scan, params.started_from).id)


def _read(scan: DicomScan, label: LabelRecord) -> LabelArray:
    """The voxels of a label version, on the scan's grid and in its file's order."""
    context = current_app().context
    grid = read_grid(context.dataset.scan_file(scan.record), limits=context.settings.intake)
    found: LabelArray = open_store().read_label(label, scan=grid).array
    return found


def _received(scan: DicomScan, header: ScanHeader, params: ViewerSubmission, voxels: UploadFile) -> Volume:
    content = voxels.file.read()
    array = from_bytes(content, params.instances, header, is_packed=voxels.content_type == _GZIP)
    return label_map(current_app().context, scan, array)


def _bytes(request: Request, content: bytes, cache_control: str) -> Response:
    """Voxels, compressed where the client takes that: label maps shrink to a hundredth."""
    if "gzip" in request.headers.get("accept-encoding", ""):
        return _sent(packed(content), cache_control)
    return Response(content, media_type="application/octet-stream", headers={"Cache-Control": cache_control})


def _sent(content: bytes, cache_control: str) -> Response:
    headers = {"Cache-Control": cache_control, "Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
    return Response(content, media_type="application/octet-stream", headers=headers)
