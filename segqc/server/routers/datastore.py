"""Scans and label maps: what MONAI Label calls the datastore."""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Final

import anyio.to_thread
from fastapi import APIRouter, File, Form, Query, Request, Response, UploadFile
from fastapi.responses import FileResponse, JSONResponse

from segqc.loop.submission import check_not_replaced
from segqc.server.actors import RequestUser, acting
from segqc.server.dicomweb.segmentations import check_segmentation
from segqc.server.errors import RequestError
from segqc.server.monailabel.datastore import decision_in
from segqc.server.monailabel.facade import current_app
from segqc.server.names import check_image_id, check_tag, split_suffix, usable_image_id
from segqc.server.parameters import (
    MAX_COUNT,
    ImageInfo,
    ImageText,
    LabelInfoForm,
    LabelParams,
    LabelText,
    ReviewerForm,
)
from segqc.server.routers.checks import check_of, check_to_json
from segqc.server.routers.dependencies import (
    AskingUser,
    SentOnce,
    check_received,
    in_turn,
    known_image,
    known_label,
    known_scan,
    open_store,
    receive,
    receive_labels,
    send_label,
)
from segqc.server.routers.proposals import propose_for
from segqc.server.submitted_labels import read_submission, stored_info, submit
from segqc.server.uploads import is_dicom_name, take_slice
from segqc.store import attention_checks, labels
from segqc.store.labels import FINAL, PROPOSAL
from segqc.store.records import JsonObject
from segqc.volumes.dicom_seg import SEGMENTATION_SUFFIX

router = APIRouter()

CHECK_SUMS: Final = ("SHA256", "SHA512", "MD5")


@router.head("/datastore/image", tags=["Datastore"], summary="Whether there is a scan")
def check_image(image: str, check_sum: str | None = None) -> Response:
    """Answer 404 where there is no such scan, or it has another check sum (``SHA256:<hex>``, also SHA512 and MD5)."""
    path = Path(current_app().datastore.get_image_uri(known_image(image)))
    if check_sum:
        kind, _, digest = check_sum.rpartition(":")
        if kind not in ("", *CHECK_SUMS):
            raise RequestError(400, f"a check sum is of the kind {', '.join(CHECK_SUMS)}, not {kind[:20]!r}.")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, (kind or CHECK_SUMS[0]).lower()).hexdigest()
        if found != digest.lower():
            raise RequestError(404, f"the image {image!r} has another check sum.")
    return Response()


@router.head("/datastore/label", tags=["Datastore"], summary="Whether there is a label map")
def check_label(tag: str, image: str = "", label: str = "") -> Response:
    """Answer 404 where a scan has no label map under the tag; MONAI Label calls its id ``image`` here."""
    known_label(image or label, tag)
    return Response()


@router.put("/datastore/label", tags=["Datastore"], summary="Submit a label map")
async def save_label(
    request: Request,
    user: AskingUser,
    image: str,
    label: Annotated[UploadFile, File()],
    params: LabelText,
    tag: str = FINAL,
) -> JsonObject:
    """Store a label map of a scan, checked and brought to the configured label values.

    A final label that an annotator made of what was handed out becomes a correction, with what changed. The answer
    begins with what SegQC-Net says of it (``check``), or that it is being checked.
    """
    body = await in_turn(request, functools.partial(save_label_of, user, image, label, params, tag))
    version = body["version"]
    assert isinstance(version, int)
    return {"check": check_to_json(await check_of(request, version)), **body}


class EmptyLabelError(RequestError):
    """A label map without a voxel is to be asked about before it is kept."""

    def __init__(self) -> None:
        super().__init__(409, "the submitted label map is empty: no voxel of it is a structure's.")


def save_label_of(
    user: RequestUser, image: str, label: UploadFile, params: LabelParams, tag: str, *, asks_if_empty: bool = False
) -> JsonObject:
    """Keep an uploaded label map of a scan, as `save_label` says; the answer is the client's.

    Raises:
        EmptyLabelError: if it is empty, and that is to be asked about; nothing has changed then.
        RequestError: 400 for a tag that is none, 422 if the file is no label map of the scan.
        ImageNotFoundException: if there is no such scan.
        ApprovedError: 403 if the scan is approved and the user no reviewer.
        ScanReplaced: 409 if the scan was replaced since it was handed out to the user.
    """
    app = current_app()
    dataset = app.context.dataset
    scan = dataset.verify(known_scan(image))
    tag = check_tag(tag or FINAL)  # clients may leave it empty
    if labels.is_servers_own(tag):
        raise RequestError(
            400,
            f"nobody submits a label under the tag {tag!r}: the server keeps its own there; submit it as {FINAL!r}, or "
            "under a tag of your own.",
        )
    actor = user.actor(params.client_id)
    check_not_replaced(dataset, scan.name, actor)
    named, names, limits = bool(app.context.settings.structures), app.context.labels(), app.context.settings.intake
    with tempfile.TemporaryDirectory(prefix="segqc-") as folder:
        received = receive_labels(label, Path(folder))
        if received.suffix == SEGMENTATION_SUFFIX:
            check_segmentation(app.context.archive, app.context.archive.scan_of(scan), received)
        submitted = read_submission(received, dataset.scan_file(scan), names, params, configured=named, limits=limits)
        if asks_if_empty and not submitted.volume.array.any():
            raise EmptyLabelError
        info = stored_info(params, names) if named else params.to_json()
        _check_review(user, info)
        may_replace = user.may("reviewer")
        body = submit(dataset, scan, submitted, received, tag, actor, params, info, may_replace_approved=may_replace)
    if "segmentationMeta" in info:
        app.datastore.review_label(scan.name, tag, info, actor)
    return {**app.on_save_label(scan.name, scan.name), **body, "image": image, "label": scan.name}


@router.put("/datastore/", tags=["Datastore"], include_in_schema=False)
@router.put("/datastore/image", tags=["Datastore"], summary="Upload a scan")
def add_image(
    user: AskingUser,
    file: Annotated[UploadFile, File()],
    params: ImageText,
    image: str | None = None,
) -> JsonObject:
    """Store a new scan. A DICOM file that the same client sends after it tells the scan's patient."""
    app = current_app()
    actor = user.actor(params.get("client_id"))
    client = user.client(actor)
    with tempfile.TemporaryDirectory(prefix="segqc-") as folder:
        if is_dicom_name(file.filename):
            path = Path(folder) / "the DICOM file"
            with path.open("wb") as target:
                shutil.copyfileobj(file.file, target)
            return {"image": take_slice(app.context.dataset, app.uploads.last(client), path, actor)}
        stem, _ = split_suffix(file.filename, "the scan")
        name = check_image_id(usable_image_id(image or stem))
        path = receive(file, Path(folder), "scan", "the scan")
        check_received(path, "the scan")
        added = app.datastore.add_image(name, str(path), params)
    app.uploads.note(client, added)
    return {"image": added}


@router.delete("/datastore/", tags=["Datastore"], include_in_schema=False)
@router.delete("/datastore/image", tags=["Datastore"], summary="Exclude a scan")
def remove_image(user: AskingUser, id: str) -> JsonObject:
    """Exclude a scan; its file and its history stay."""
    with acting(user.actor()):
        current_app().datastore.remove_image(known_image(id))
    return {}


@router.get("/datastore/image/info", tags=["Datastore"], summary="What is noted of a scan")
def image_info(image: str) -> JsonObject:
    """Tell what is noted of a scan."""
    return current_app().datastore.get_image_info(known_image(image))


@router.put("/datastore/image/info", tags=["Datastore"], summary="Note something of a scan")
def update_image_info(image: str, info: ImageInfo) -> None:
    """Add to what is noted of a scan."""
    current_app().datastore.update_image_info(known_image(image), info)


@router.delete("/datastore/label", tags=["Datastore"], summary="Remove a label map")
def remove_label(user: AskingUser, id: str, tag: str) -> JsonObject:
    """Take a label map away; it stays in the history."""
    with acting(user.actor()):
        current_app().datastore.remove_label(known_label(id, tag), tag)
    return {}


@router.get("/datastore/label", tags=["Datastore"], summary="Download a label map")
async def download_label(
    request: Request,
    user: AskingUser,
    label: str,
    tag: str,
    check_only: Annotated[bool, Query(description="Whether to send nothing.")] = False,
) -> Response:
    """Send the current label map of a scan, with the values that clients count by.

    Under the tag "proposal" it is what SegQC-Net would change of the label to go on from, made now if need be.
    """
    if tag == PROPOSAL:
        await propose_for(request, label, user.actor())

    def send() -> Response:
        actor = user.known_actor()
        with open_store().read() as transaction:
            found = labels.current(transaction, known_label(label, tag), tag)
            if check_only or found is None:
                return JSONResponse({})
            shown = attention_checks.shown_to(transaction, found, actor)
        return send_label(shown, actor)

    return await anyio.to_thread.run_sync(send)


@router.get("/datastore/label/info", tags=["Datastore"], summary="What is noted of a label map")
def label_info(label: str, tag: str) -> JsonObject:
    """Tell what is noted of a label map."""
    return current_app().datastore.get_label_info(known_label(label, tag), tag)


@router.put("/datastore/label/info", tags=["Datastore"], summary="Note something of a label")
def update_label_info(user: AskingUser, label: str, tag: str, form: Annotated[LabelInfoForm, Form()]) -> None:
    """Add to what is noted of a label map; the Reviewer's decision on it is a review of the scan."""
    _note_label(user, label, tag, form.info)


@router.put("/datastore/updatelabelinfo", include_in_schema=False)
def update_label_info_before(user: AskingUser, label: str, tag: str, form: Annotated[ReviewerForm, Form()]) -> None:
    """Add to what is noted of a label map, by the older name that 3D Slicer's reviewer uses."""
    _note_label(user, label, tag, form.params)


def _note_label(user: RequestUser, label: str, tag: str, params: LabelParams) -> None:
    if tag == PROPOSAL:
        raise RequestError(400, f"nobody notes anything of a label with the tag {tag!r}: it goes with its boxes.")
    app = current_app()
    label = known_label(label, tag)
    noted = stored_info(params, app.context.labels()) if app.context.settings.structures else params.to_json()
    _check_review(user, noted)
    app.datastore.update_label_info(label, tag, noted)
    app.datastore.review_label(label, tag, noted, user.actor(params.client_id))


def _check_review(user: RequestUser, info: JsonObject) -> None:
    """Refuse an annotator's review among what is noted of a label."""
    if decision_in(info)[0] is not None:
        user.need("reviewer", "a review")


@router.get("/datastore/dataset", tags=["Datastore"], summary="Download labelled scans")
def download_labelled(
    limit_cases: Annotated[int | None, Query(ge=1, le=MAX_COUNT, description="The most scans.")] = None,
) -> FileResponse:
    """Send a ZIP archive of the scans with final labels."""
    store = current_app().datastore
    if not store.get_labeled_images():
        raise RequestError(404, "no scan has a final label yet: there is nothing to download.")
    path = store.get_dataset_archive(limit_cases)
    return SentOnce(path, media_type="application/zip", filename="dataset.zip")
