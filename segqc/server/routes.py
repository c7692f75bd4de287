"""The routes whose MONAI Label originals trust the client too far, answer late or fail with a bare 500.

All are plain functions, which FastAPI runs in its thread pool; inference alone has slots of its own, so that waiting
inferences cannot take all threads.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import anyio
import anyio.to_thread
from fastapi import APIRouter, Depends, File, Form, Query, Request, Response, UploadFile
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC
from monailabel.interfaces.exception import ImageNotFoundException
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.others.generic import file_checksum
from pydantic import TypeAdapter
from requests_toolbelt import MultipartEncoder
from starlette.types import Receive, Scope, Send

from segqc.loop.jobs import LIKELY_ERRORS_TAG, JobKind, enqueue_scoring
from segqc.loop.review import STATE_OF
from segqc.networks.card import NetworkName
from segqc.networks.model import ModelError, TrainedNetwork, model_status
from segqc.server import job_answers
from segqc.server.actors import RequestUser, acting, request_user
from segqc.server.checks import (
    FOREIGN_TRAINING_PARAMS,
    IGNORED_REASON,
    JsonObject,
    Params,
    check_file_name,
    check_image_id,
    check_session_id,
    check_tag,
    choose_params,
    file_suffix,
    json_object,
    known,
    refuse_unknown,
    text_param,
    usable_image_id,
)
from segqc.server.client_labels import same_values, to_client
from segqc.server.context import AppContext
from segqc.server.errors import RequestError
from segqc.server.submitted_labels import read_submission, stored_info, submit
from segqc.server.uploads import is_dicom_name, take_slice
from segqc.server.waiting import JobsDone
from segqc.store import assessments, events, labels, leases, scans
from segqc.store.records import EventRecord, LabelRecord, ScanRecord
from segqc.store.store import Store, suffix_of
from segqc.types import PredictionInterval
from segqc.volumes import LABEL_SUFFIXES, SCAN_SUFFIXES, VolumeError, atomic_write, read_labels, write_labels
from segqc.volumes.intake import check_scan

router = APIRouter()

# With the patience for a locked database after it, the last of a crowd is told within a quarter of a minute.
TURN_SECONDS: Final = 10.0

AskingUser = Annotated[RequestUser, Depends(request_user)]

USER = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))
ANNOTATOR = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))
REVIEWER = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_REVIEWER))
ADMIN = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))

CHECK_SUMS: Final = ("SHA256", "SHA512", "MD5")
MAX_COUNT: Final = 2**31 - 1
FormText = Annotated[str, Form()]

INFER_PARAMS = frozenset({"label_tag", "save_label"})
SAMPLE_PARAMS = frozenset({"label_tag", "labels", "client_id", "skip_reason", "resume"})
BATCH_PARAMS = frozenset({"label_tag", "max_batch_size", "save_label"})


class Output(StrEnum):
    """What an inference answers with."""

    image = "image"
    json = "json"
    all = "all"
    dicom_seg = "dicom_seg"


class Images(StrEnum):
    """Which scans a batch inference takes."""

    all = "all"
    labeled = "labeled"
    unlabeled = "unlabeled"


class _SentOnce(FileResponse):
    """A file that is removed when it is sent, or could not be."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            Path(self.path).unlink(missing_ok=True)


def _receive(upload: UploadFile, folder: Path, stem: str, what: str, suffixes: Sequence[str] = SCAN_SUFFIXES) -> Path:
    """Write an uploaded scan or label map into a folder; its name is ours, but for the suffix."""
    path = folder / f"{stem}{file_suffix(upload.filename, what, suffixes)}"
    with path.open("wb") as file:
        shutil.copyfileobj(upload.file, file)
    return path


def _check_received(path: Path, what: str) -> None:
    """Check an uploaded scan before it is kept or used, within the limits of the settings.

    Raises:
        RequestError: 422 if it can't be used; the sentence names what it was sent as, not where it lies here.
    """
    try:
        check_scan(path, app_instance().context.settings.intake, shown=what)
    except VolumeError as error:
        # what is wrong with one file of a DICOM series names that file
        raise RequestError(422, str(error).replace(str(path), what)) from error


# ------------------------------------------------------------------------------------------------------- inference


@router.post("/infer/{model}", tags=["Infer"], dependencies=[USER], summary="Run inference")
async def infer(
    request: Request,
    model: str,
    image: str = "",
    session_id: str = "",
    params: FormText = "{}",
    file: Annotated[UploadFile | None, File()] = None,
    label: Annotated[UploadFile | None, File()] = None,
    output: Output | None = None,
) -> Response:
    """Run an inference task on a scan of the datastore, of a session, or of the request itself."""
    work = functools.partial(_infer, model, image, session_id, params, file, label, output)
    return await asyncio.get_running_loop().run_in_executor(request.app.state.inference, work)


def _infer(
    model: str,
    image: str,
    session_id: str,
    params: str,
    file: UploadFile | None,
    label: UploadFile | None,
    output: Output | None,
) -> Response:
    app = app_instance()
    task = app._infers[known("model", model, app._infers)]
    if output is Output.dicom_seg:
        raise RequestError(400, "DICOM SEG is made from scans on a DICOMweb server; these scans are files.")
    chosen = choose_params(json_object(params, "params"), INFER_PARAMS | getattr(task, "params", frozenset()))
    if "label_tag" in chosen:
        check_tag(str(chosen["label_tag"]))
    with tempfile.TemporaryDirectory(prefix="segqc-") as name:
        wanted: dict[str, Any] = {**chosen, "model": model}
        if file is not None:
            received = _receive(file, Path(name), "scan", "the scan")
            _check_received(received, "the scan")
            wanted["image_file"] = str(received)
        elif session_id:
            wanted["image_file"] = _session_image(session_id)
        elif image:
            wanted["image"] = _known_image(image)
        else:
            raise RequestError(400, "name a scan: image=<id>, session_id=<id>, or upload one as 'file'.")
        if label is not None:
            received = _receive(label, Path(name), "label", "the label map", LABEL_SUFFIXES)
            scan = Path(
                wanted["image_file"] if "image" not in wanted else app.datastore().get_image_uri(wanted["image"])
            )
            wanted["label"] = str(_read_uploaded(received, scan, json_object(params, "params")))
        try:
            result = app.infer(wanted)
        except VolumeError as error:
            sentence = str(error).replace(str(wanted.get("label")), "the label map")
            raise RequestError(422, sentence) from error
    return _reply(Path(result["file"]), result["params"], output)


def _read_uploaded(received: Path, scan: Path, params: JsonObject) -> Path:
    """Write an uploaded label map anew with the stored values, read as a submission is."""
    context = app_instance().context
    configured, limits = bool(context.settings.structures), context.settings.intake
    labels = read_submission(received, scan, context.labels(), params, configured=configured, limits=limits)
    path = received.with_name("stored.nii.gz")
    write_labels(labels.volume, path)
    return path


def _session_image(session_id: str) -> str:
    session = app_instance().sessions().get_session(check_session_id(session_id))
    if session is None:
        raise RequestError(404, f"there is no session {session_id!r}; it may have expired.")
    return str(session.image)


def _reply(path: Path, params: Mapping[str, Any], output: Output | None) -> Response:
    """Send a result and remove its file."""
    if output is Output.image:
        return _SentOnce(path, media_type="application/octet-stream", filename=path.name)
    try:
        if output is Output.json:
            return JSONResponse(dict(params))
        fields = {
            "params": (None, json.dumps(params), "application/json"),
            "image": (path.name, path.read_bytes(), "application/octet-stream"),
        }
        message = MultipartEncoder(fields=fields)
        return Response(message.to_string(), media_type=message.content_type)
    finally:
        path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------- the next sample


@router.post("/activelearning/{strategy}", tags=["ActiveLearning"], dependencies=[USER], summary="Get the next sample")
async def next_sample(request: Request, strategy: str, user: AskingUser, params: Params = None) -> JsonObject:
    """Hand out the scan to correct next; an empty object means that none is left for this annotator."""
    return await _in_turn(request, functools.partial(_next_sample, strategy, user, params))


async def _in_turn(request: Request, work: Callable[[], JsonObject]) -> JsonObject:
    """Do what annotators wait for, a few at a time and in the order of asking.

    More threads than cores only take each other's time: the last one of a crowd would wait many times as long.

    Raises:
        RequestError: 503 if the turn does not come within seconds: the database is locked, or the crowd too large.
    """
    slots: anyio.CapacityLimiter = request.app.state.annotation_slots
    turn = object()
    try:
        with anyio.fail_after(TURN_SECONDS):
            await slots.acquire_on_behalf_of(turn)
    except TimeoutError as error:
        raise RequestError(503, "the server is too busy, or its database is locked; try again.") from error
    try:
        return await anyio.to_thread.run_sync(work)
    finally:
        slots.release_on_behalf_of(turn)


def _next_sample(strategy: str, user: RequestUser, params: Params) -> JsonObject:
    app = app_instance()
    known("strategy", strategy, app._strategies)
    chosen = choose_params(params or {}, SAMPLE_PARAMS)
    with acting(user.actor(chosen)):
        answer = app.next_sample({**chosen, "strategy": strategy})
    if not answer:
        return {}
    scan = app.datastore().scan(answer["id"])
    # the strategy's own words win over what happens to be noted of the scan
    told: JsonObject = {**app.datastore().scan_info(scan), **answer, "requested_strategy": strategy}
    interval = answer.get("estimated_dice_interval")
    told["name"] = _title(
        scan.name,
        Path(answer["path"]).name,
        answer.get("estimated_dice"),
        PredictionInterval(**interval) if interval is not None else None,
    )
    return told


def _title(scan: str, file_name: str, dice: float | None, interval: PredictionInterval | None) -> str:
    """What 3D Slicer titles the volume with, and the name of the file that it downloads: the suffix has to stay."""
    if dice is None:
        return file_name
    between = f", {interval}" if interval is not None else ""
    return f"{scan} (estimated Dice {dice:.2f}{between}){file_name.removeprefix(scan)}"


# -------------------------------------------------------------------------------------------------------- long work


def to_json(record: LabelRecord | EventRecord) -> JsonObject:
    """A record of the store as clients are told of it."""
    told: JsonObject = TypeAdapter(type(record)).dump_python(record, mode="json")
    return told


def _store() -> Store:
    store: Store = app_instance().context.dataset.store
    return store


def _described(job: JsonObject, kind: JobKind, run_sync: bool) -> JsonObject | Response:
    """A job as it is now, or, where the client asks for it, when it has ended."""
    return JobsDone(_store(), kind, {"job": str(job["id"])}, single=True) if run_sync else job


def _all_told(put: Mapping[str, JsonObject], kind: JobKind, run_sync: bool) -> JsonObject | Response:
    """Jobs as they are now, or, where the client asks for it, when they have ended."""
    if run_sync:
        return JobsDone(_store(), kind, {name: str(job["id"]) for name, job in put.items()})
    return {name: {"result": job} for name, job in put.items()}


@dataclass(frozen=True, slots=True)
class _Training:
    """What a worker is asked for, and which of the client's parameters are ignored."""

    request: JsonObject
    ignored: list[str]

    @property
    def messages(self) -> list[str]:
        return [f"ignored: {', '.join(self.ignored)} ({IGNORED_REASON})"] if self.ignored else []


def _trainings(wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, _Training]:
    """Check the parameters of trainings, by network, and whether there are enough labels."""
    app = app_instance()
    tasks = {model: app._trainers[known("trainer", model, app._trainers)] for model in wanted}
    chosen = {model: task.job(wanted[model]) for model, task in tasks.items()}
    labelled = len(app.context.dataset.cases())
    for model, task in tasks.items():
        task.check(chosen[model][0], labelled)
    return {model: _Training({"model": model, **request}, ignored) for model, (request, ignored) in chosen.items()}


def _all_trainings(params: Params) -> dict[str, _Training]:
    """The trainings of all networks; ``params`` may hold an object for each."""
    trainers, wanted = app_instance()._trainers, params or {}
    refuse_unknown(wanted, {*trainers, *FOREIGN_TRAINING_PARAMS}, "training parameter")
    chosen = {}
    for model in trainers:
        own = wanted.get(model, {})
        if not isinstance(own, dict):
            raise RequestError(400, f"params[{model!r}] is not a JSON object.")
        chosen[model] = own
    return _trainings(chosen)


def _submit_training(user: RequestUser, params: Params, training: _Training, *, enqueue: bool = False) -> JsonObject:
    actor, store = user.actor(params), _store()
    told = job_answers.submit(store, actor, "train", training.request, enqueue=enqueue, messages=training.messages)
    return {**told, "ignored": [*training.ignored]} if training.ignored else told


@router.get("/train/", tags=["Train"], dependencies=[USER], summary="Status of the last training")
def train_status(all: bool = False, check_if_running: bool = False) -> Any:
    """Tell how the trainings are."""
    return job_answers.status(_store(), "train", every=all, only_running=check_if_running)


@router.post("/train/", tags=["Train"], dependencies=[ADMIN], summary="Train all networks")
def train_all(user: AskingUser, params: Params = None, run_sync: bool = False) -> Any:
    """Queue the trainings of all networks; ``params`` may hold an object for each."""
    put = {model: _submit_training(user, params, own) for model, own in _all_trainings(params).items()}
    return _all_told(put, "train", run_sync)


@router.post("/train/{model}", tags=["Train"], dependencies=[ADMIN], summary="Train a network")
def train_start(
    user: AskingUser, model: str, params: Params = None, run_sync: bool = False, enqueue: bool = False
) -> Any:
    """Queue a training; where the same one is open already, tell of that one."""
    job = _submit_training(user, params, _trainings({model: params or {}})[model], enqueue=enqueue)
    return _described(job, "train", run_sync)


@router.delete("/train/", tags=["Train"], dependencies=[ADMIN], summary="Stop the running training")
def train_stop(user: AskingUser) -> JsonObject | None:
    """Stop the training that runs; it continues from its checkpoint when it is started again."""
    return job_answers.stop(_store(), user.actor(), "train")


@router.get("/scoring/", tags=["Scoring"], dependencies=[USER], summary="Status of the last scoring")
def scoring_status(all: bool = False, check_if_running: bool = False) -> Any:
    """Tell how the scorings are."""
    return job_answers.status(_store(), "scoring", every=all, only_running=check_if_running)


@router.post("/scoring/", tags=["Scoring"], dependencies=[ANNOTATOR], summary="Score by all methods")
def scoring_all(user: AskingUser, params: Params = None, run_sync: bool = False) -> Any:
    """Queue all scoring methods."""
    requests = {method: _scoring(method, params or {}) for method in app_instance()._scoring_methods}
    actor = user.actor(params)
    put = {method: job_answers.submit(_store(), actor, "scoring", request) for method, request in requests.items()}
    return _all_told(put, "scoring", run_sync)


@router.post("/scoring/{method}", tags=["Scoring"], dependencies=[ANNOTATOR], summary="Score by a method")
def scoring_start(
    user: AskingUser, method: str, params: Params = None, run_sync: bool = False, enqueue: bool = False
) -> Any:
    """Queue a scoring method."""
    job = job_answers.submit(_store(), user.actor(params), "scoring", _scoring(method, params or {}), enqueue=enqueue)
    return _described(job, "scoring", run_sync)


def _scoring(method: str, params: Mapping[str, Any]) -> JsonObject:
    app = app_instance()
    known("scoring method", method, app._scoring_methods)
    app.context.segmenter()
    if method == "segqc":
        app.context.assessor()
    return {"method": method, **choose_params(params, {"force"})}


@router.delete("/scoring/", tags=["Scoring"], dependencies=[ANNOTATOR], summary="Stop the running scoring")
def scoring_stop(user: AskingUser) -> JsonObject | None:
    """Stop the scoring that runs; started again it goes on with the scans that are left."""
    return job_answers.stop(_store(), user.actor(), "scoring")


@router.get("/batch/infer", tags=["Infer"], dependencies=[USER], summary="Status of the last batch inference")
def batch_status(all: bool = False, check_if_running: bool = False) -> Any:
    """Tell how the batch inferences are."""
    return job_answers.status(_store(), "batch_infer", every=all, only_running=check_if_running)


@router.post("/batch/infer/{model}", tags=["Infer"], dependencies=[ADMIN], summary="Run inference on many scans")
def batch_start(
    user: AskingUser, model: str, images: Images = Images.all, params: Params = None, run_sync: bool = False
) -> Any:
    """Queue an inference on all, all labelled or all unlabelled scans."""
    app = app_instance()
    known("model", model, app._infers)
    chosen = choose_params(params or {}, BATCH_PARAMS)
    tag = check_tag(str(chosen.get("label_tag") or "original"))
    if tag == "final" and model != "segqc":
        raise RequestError(400, "a network's mask is never final: final labels are what annotators submit.")
    app.context.segmenter()
    if model == "segqc":
        app.context.assessor()
    fixed: JsonObject = {"model": model, "images": images.value, "label_tag": tag}
    return _described(
        job_answers.submit(_store(), user.actor(params), "batch_infer", {**chosen, **fixed}), "batch_infer", run_sync
    )


@router.delete("/batch/infer", tags=["Infer"], dependencies=[ADMIN], summary="Stop the running batch inference")
def batch_stop(user: AskingUser) -> JsonObject | None:
    """Stop the batch inference that runs."""
    return job_answers.stop(_store(), user.actor(), "batch_infer")


# -------------------------------------------------------------------------------------------------------- datastore


def _known_scan(image: str) -> ScanRecord:
    """The scan that a client calls so."""
    try:
        scan: ScanRecord = app_instance().datastore().scan(image)
    except ImageNotFoundException as error:
        raise RequestError(404, f"there is no image {image!r}.") from error
    return scan


def _known_image(image: str) -> str:
    """The id of the scan that a client calls so."""
    return _known_scan(image).name


def _known_label(label: str, tag: str) -> str:
    image = _known_image(label)
    if not app_instance().datastore().get_label_uri(image, tag):
        raise RequestError(404, f"the image {label!r} has no label with the tag {tag!r}.")
    return image


@router.head("/datastore/image", tags=["Datastore"], dependencies=[USER], summary="Whether there is a scan")
def check_image(image: str, check_sum: str | None = None) -> Response:
    """Answer 404 where there is no such scan, or it has another check sum (``SHA256:<hex>``, also SHA512 and MD5)."""
    path = Path(app_instance().datastore().get_image_uri(_known_image(image)))
    if check_sum:
        kind, _, digest = check_sum.rpartition(":")
        if kind not in ("", *CHECK_SUMS):
            raise RequestError(400, f"a check sum is of the kind {', '.join(CHECK_SUMS)}, not {kind[:20]!r}.")
        if file_checksum(path, kind or CHECK_SUMS[0]).rpartition(":")[2] != digest.lower():
            raise RequestError(404, f"the image {image!r} has another check sum.")
    return Response()


@router.head("/datastore/label", tags=["Datastore"], dependencies=[USER], summary="Whether there is a label map")
def check_label(tag: str, image: str = "", label: str = "") -> Response:
    """Answer 404 where a scan has no label map under the tag; MONAI Label calls its id ``image`` here."""
    _known_label(image or label, tag)
    return Response()


@router.put("/datastore/label", tags=["Datastore"], dependencies=[ANNOTATOR], summary="Submit a label map")
async def save_label(
    request: Request,
    user: AskingUser,
    image: str,
    label: Annotated[UploadFile, File()],
    params: FormText = "{}",
    tag: str = "final",
) -> JsonObject:
    """Store a label map of a scan, checked and brought to the configured label values.

    A final label that an annotator made of what was handed out becomes a correction, with what changed.
    """
    return await _in_turn(request, functools.partial(_save_label, user, image, label, params, tag))


def _save_label(user: RequestUser, image: str, label: UploadFile, params: str, tag: str) -> JsonObject:
    app = app_instance()
    dataset = app.context.dataset
    scan = dataset.verify(_known_scan(image))
    tag = check_tag(tag or "final")
    info = json_object(params, "params")
    named, names, limits = bool(app.context.settings.structures), app.context.labels(), app.context.settings.intake
    with tempfile.TemporaryDirectory(prefix="segqc-") as folder:
        received = _receive(label, Path(folder), "submitted", "the label map", LABEL_SUFFIXES)
        submitted = read_submission(received, dataset.folder / scan.file, names, info, configured=named, limits=limits)
        actor, info = user.actor(info), stored_info(info, names) if named else info
        told = submit(dataset, scan, submitted, received, tag, actor, info)
    if "segmentationMeta" in info:
        app.datastore().review_label(scan.name, tag, info, actor)
    return {**(app.on_save_label(scan.name, scan.name) or {}), **told, "image": image, "label": scan.name}


@router.put("/datastore/", tags=["Datastore"], dependencies=[ANNOTATOR], include_in_schema=False)
@router.put("/datastore/image", tags=["Datastore"], dependencies=[ANNOTATOR], summary="Upload a scan")
def add_image(
    user: AskingUser,
    file: Annotated[UploadFile, File()],
    image: str | None = None,
    params: FormText = "{}",
) -> JsonObject:
    """Store a new scan. A DICOM file that the same client sends after it tells the scan's patient."""
    app = app_instance()
    info = json_object(params, "params")
    actor = user.actor(info)
    client = user.client(actor)
    with tempfile.TemporaryDirectory(prefix="segqc-") as folder:
        if is_dicom_name(file.filename):
            path = Path(folder) / "the DICOM file"
            with path.open("wb") as target:
                shutil.copyfileobj(file.file, target)
            return {"image": take_slice(app.context.dataset, app.uploads.last(client), path, actor)}
        suffix = file_suffix(file.filename, "the scan")
        base = (file.filename or "").replace("\\", "/").rsplit("/", 1)[-1]
        name = check_image_id(usable_image_id(image or base[: -len(suffix)]))
        path = _receive(file, Path(folder), "scan", "the scan")
        _check_received(path, "the scan")
        added = app.datastore().add_image(name, str(path), info)
    app.uploads.note(client, added)
    return {"image": added}


@router.delete("/datastore/", tags=["Datastore"], dependencies=[ADMIN], include_in_schema=False)
@router.delete("/datastore/image", tags=["Datastore"], dependencies=[ADMIN], summary="Exclude a scan")
def remove_image(user: AskingUser, id: str) -> JsonObject:
    """Exclude a scan; its file and its history stay."""
    with acting(user.actor()):
        app_instance().datastore().remove_image(_known_image(id))
    return {}


@router.get("/datastore/image/info", tags=["Datastore"], dependencies=[USER], summary="What is noted of a scan")
def image_info(image: str) -> JsonObject:
    """Tell what is noted of a scan."""
    found: JsonObject = app_instance().datastore().get_image_info(_known_image(image))
    return found


@router.put("/datastore/image/info", tags=["Datastore"], dependencies=[ANNOTATOR], summary="Note something of a scan")
def update_image_info(image: str, info: FormText = "{}") -> None:
    """Add to what is noted of a scan."""
    app_instance().datastore().update_image_info(_known_image(image), json_object(info, "info"))


@router.delete("/datastore/label", tags=["Datastore"], dependencies=[ADMIN], summary="Remove a label map")
def remove_label(user: AskingUser, id: str, tag: str) -> JsonObject:
    """Take a label map away; it stays in the history."""
    with acting(user.actor()):
        app_instance().datastore().remove_label(_known_label(id, tag), tag)
    return {}


@router.get("/datastore/label", tags=["Datastore"], dependencies=[USER], summary="Download a label map")
def download_label(label: str, tag: str, check_only: bool = False) -> Response:
    """Send the current label map of a scan, with the values that clients count by."""
    image, context = _known_label(label, tag), app_instance().context
    path = Path(app_instance().datastore().get_label_uri(image, tag))
    if check_only:
        return JSONResponse({})
    name, names = f"{image}{suffix_of(path)}", context.labels()
    if tag == LIKELY_ERRORS_TAG or same_values(names):
        return FileResponse(path, media_type="application/octet-stream", filename=name)
    labels = to_client(read_labels(path), names)
    handle, delivered = tempfile.mkstemp(prefix="segqc-", suffix=suffix_of(path))
    os.close(handle)
    write_labels(labels, Path(delivered))
    return _SentOnce(delivered, media_type="application/octet-stream", filename=name)


@router.get("/datastore/label/info", tags=["Datastore"], dependencies=[USER], summary="What is noted of a label map")
def label_info(label: str, tag: str) -> JsonObject:
    """Tell what is noted of a label map."""
    found: JsonObject = app_instance().datastore().get_label_info(_known_label(label, tag), tag)
    return found


@router.put("/datastore/label/info", tags=["Datastore"], dependencies=[ANNOTATOR], summary="Note something of a label")
def update_label_info(user: AskingUser, label: str, tag: str, info: FormText = "{}") -> None:
    """Add to what is noted of a label map; the Reviewer's decision on it is a review of the scan."""
    _note_label(user, label, tag, json_object(info, "info"))


@router.put("/datastore/updatelabelinfo", dependencies=[ANNOTATOR], include_in_schema=False)
def update_label_info_before(user: AskingUser, label: str, tag: str, params: FormText = "{}") -> None:
    """Add to what is noted of a label map, by the older name that 3D Slicer's reviewer uses."""
    _note_label(user, label, tag, json_object(params, "params"))


def _note_label(user: RequestUser, label: str, tag: str, info: JsonObject) -> None:
    app = app_instance()
    label = _known_label(label, tag)
    noted = stored_info(info, app.context.labels()) if app.context.settings.structures else info
    app.datastore().update_label_info(label, tag, noted)
    app.datastore().review_label(label, tag, noted, user.actor(info))


@router.get("/datastore/dataset", tags=["Datastore"], dependencies=[ANNOTATOR], summary="Download labelled scans")
def download_labelled(limit_cases: Annotated[int | None, Query(ge=1, le=MAX_COUNT)] = None) -> FileResponse:
    """Send a ZIP archive of the scans with final labels."""
    store = app_instance().datastore()
    if not store.get_labeled_images():
        raise RequestError(404, "no scan has a final label yet: there is nothing to download.")
    path = store.get_dataset_archive(limit_cases)
    return _SentOnce(path, media_type="application/zip", filename="dataset.zip")


# ------------------------------------------------------------------------------------------------ history and review


@router.get("/segqc/labels/{scan}", tags=["SegQC"], dependencies=[USER], summary="All versions of a scan's labels")
def label_history(scan: str) -> list[JsonObject]:
    """Tell who made which version of a scan's labels, from which, and when; oldest first."""
    with _store().read() as transaction:
        return [to_json(version) for version in labels.history(transaction, scan)]


@router.post("/segqc/labels/{scan}/restore", tags=["SegQC"], dependencies=[REVIEWER], summary="Restore a version")
def restore_label(scan: str, version: Annotated[int, Query(ge=0, le=2**63 - 1)], user: AskingUser) -> JsonObject:
    """Make an earlier version the current label of its tag again; it becomes a version of its own."""
    store = _store()
    with store.read() as transaction:
        if version not in [v.id for v in labels.history(transaction, scan)]:
            raise RequestError(404, f"the scan {scan!r} has no label version {version}.")
    return to_json(store.restore_label(version, user.actor()))


@router.post("/segqc/review/{scan}", tags=["SegQC"], dependencies=[REVIEWER], summary="Review a scan")
def review_scan(scan: str, user: AskingUser, params: Params = None) -> JsonObject:
    """Approve, reject, exclude or reopen a scan: ``{"decision": "reject", "reason": "..."}``."""
    wanted = params or {}
    state = STATE_OF[known("decision", str(wanted.get("decision", "")), STATE_OF)]
    reason = wanted.get("reason")
    store = _store()
    store.review(scan, state, user.actor(wanted), str(reason) if reason is not None else None)
    with store.read() as transaction:
        now = scans.get(transaction, scan)
    return {"scan": now.name, "state": now.state, "reason": now.reason}


@router.get("/segqc/events/{scan}", tags=["SegQC"], dependencies=[USER], summary="All that happened to a scan")
def scan_events(scan: str) -> list[JsonObject]:
    """Tell who did what to a scan, and how that is known; oldest first."""
    with _store().read() as transaction:
        return [to_json(event) for event in events.history(transaction, "scan", scans.get(transaction, scan).id)]


@router.post("/segqc/round", tags=["SegQC"], dependencies=[ADMIN], summary="Start a round")
def start_round(user: AskingUser, params: Params = None) -> JsonObject:
    """Queue a round: train both networks, then segment and score all scans that wait."""
    trainings = _all_trainings(params)
    request: JsonObject = {
        model: {name: value for name, value in own.request.items() if name != "model"}
        for model, own in trainings.items()
    }
    messages = [f"{model}: {line}" for model, own in trainings.items() for line in own.messages]
    return job_answers.submit(_store(), user.actor(params), "round", request, messages=messages)


@router.get("/segqc/round", tags=["SegQC"], dependencies=[USER], summary="Status of the last round")
def round_status(all: bool = False, check_if_running: bool = False) -> Any:
    """Tell how the rounds are."""
    return job_answers.status(_store(), "round", every=all, only_running=check_if_running)


@router.get("/segqc/leases", tags=["SegQC"], dependencies=[USER], summary="Which scans are handed out")
def open_leases() -> list[JsonObject]:
    """Tell which scan is handed out to whom, and until when; how it was drawn is not told to annotators."""
    with _store().read() as transaction:
        found = leases.listing(transaction, state="open")
    return [{"scan": f.scan, "to": f.actor.name, "until": f.expires_at.isoformat()} for f in found]


@router.post("/segqc/leases/{scan}/skip", tags=["SegQC"], dependencies=[USER], summary="Put a scan aside, and say why")
def skip_scan(scan: str, user: AskingUser, params: Params = None) -> JsonObject:
    """Put aside a scan that the annotator has, or say why it was put aside: ``{"reason": "..."}``."""
    wanted = params or {}
    reason = text_param(wanted, "reason")
    if reason is None:
        raise RequestError(400, 'say why: {"reason": "..."}.')
    with _store().write() as transaction:
        lease = leases.skip(transaction, scan, user.actor(wanted), reason)
    return {"scan": lease.scan, "lease": lease.id, "state": lease.state, "reason": reason}


@router.post("/segqc/leases/{scan}/resume", tags=["SegQC"], dependencies=[USER], summary="Have a scan back")
def resume_scan(scan: str, user: AskingUser, params: Params = None) -> JsonObject:
    """Hand out a scan again that the annotator had and skipped; answers as a request for the next sample does."""
    return _next_sample("random", user, {**(params or {}), "resume": scan})


# ----------------------------------------------------------------------------------------------- sessions and others


@router.put("/session/", tags=["Session"], dependencies=[USER], summary="Open a session with a scan")
def create_session(
    files: Annotated[list[UploadFile], File()],
    uncompress: bool = False,
    expiry: Annotated[int, Query(ge=0, le=MAX_COUNT)] = 0,
) -> JsonObject:
    """Keep an uploaded scan for a while: one file, or the files of one DICOM series."""
    if uncompress:
        raise RequestError(400, "archives are not unpacked here; send the files of the series one by one.")
    names = [check_file_name(f.filename) for f in files]
    if len(set(names)) < len(names):
        raise RequestError(400, "each file of a session needs a name of its own.")
    with tempfile.TemporaryDirectory(prefix="segqc-") as folder:
        series = Path(folder) / "series"
        series.mkdir()
        for name, upload in zip(names, files, strict=True):
            with (series / name).open("wb") as file:
                shutil.copyfileobj(upload.file, file)
        path = series if len(files) > 1 else series / names[0]
        _check_received(path, "the scan")
        session, info = app_instance().sessions().add_session(str(path), expiry)
    return {"session_id": session, "session_info": info.to_json()}


@router.get("/session/{session_id}", tags=["Session"], dependencies=[USER], summary="What is known of a session")
def get_session(session_id: str, update_ts: bool = False, image: bool = False) -> Any:
    """Tell what is known of a session, or send its scan."""
    info = app_instance().sessions().get_session(check_session_id(session_id), update_ts=update_ts)
    if info is None:
        raise RequestError(404, f"there is no session {session_id!r}; it may have expired.")
    if not image:
        return info.to_json()
    if not os.path.isfile(info.image):
        raise RequestError(400, "the session holds a series of files; they cannot be sent as one.")
    return FileResponse(info.image, filename=os.path.basename(info.image))


@router.delete("/session/{session_id}", tags=["Session"], dependencies=[USER], summary="End a session")
def remove_session(session_id: str) -> JsonObject:
    """End a session and remove its scan."""
    sessions = app_instance().sessions()
    info = sessions.get_session(check_session_id(session_id))
    if info is None:
        raise RequestError(404, f"there is no session {session_id!r}; it may have expired.")
    sessions.remove_session(session_id)
    ended: JsonObject = info.to_json()
    return ended


@router.put("/model/{model}", tags=["Model"], dependencies=[ADMIN], summary="Replace a model file")
def update_model(model: str, file: UploadFile) -> JsonObject:
    """Put an uploaded model in the place of the current one, if it can be loaded and is of the same kind.

    From then on only the new pair's estimates count, and the scans that wait are scored by it.
    """
    context = app_instance().context
    caches = {"segmentation": context.segmenters, "segqc": context.assessors}
    cache = caches[known("model", model, caches)]
    model_status(cache.path)  # a folder in its place is nothing that an upload could replace
    try:
        with atomic_write(cache.path) as temporary:
            with temporary.open("wb") as target:
                shutil.copyfileobj(file.file, target)
            _let_serve(context, cache.load(temporary))
    except ModelError as error:
        message = str(error).removeprefix(str(temporary)).removeprefix(": ")
        raise RequestError(422, f"the uploaded file is no {model} model: {message}") from error
    return {"checksum": file_checksum(cache.path), "modified_time": int(cache.path.stat().st_mtime)}


def _let_serve(context: AppContext, uploaded: TrainedNetwork) -> None:
    """Let the pair of networks serve that an uploaded one makes with the other one, where that is there."""
    versions: dict[NetworkName, str] = {uploaded.kind: uploaded.version}
    if uploaded.kind == "segmentation" and context.has("segqc"):
        versions["segqc"] = context.assessor().version
    elif uploaded.kind == "segqc" and context.has("segmentation"):
        versions["segmentation"] = context.segmenter().version
    if len(versions) < 2:
        return
    with context.dataset.store.write() as transaction:
        assessments.serve(transaction, versions["segmentation"], versions["segqc"])
        enqueue_scoring(transaction)


@router.get("/logs/", tags=["Others"], dependencies=[ADMIN], summary="The server's last log lines")
def logs(request: Request, lines: Annotated[int, Query(ge=1, le=MAX_COUNT)] = 300) -> PlainTextResponse:
    """Send the last lines of the server's log."""
    path: Path | None = request.app.state.log_file
    if path is None or not path.is_file():
        raise RequestError(404, "this server writes no log file.")
    with path.open(encoding="utf-8", errors="replace") as file:
        return PlainTextResponse("".join(deque(file, min(lines, 10_000))))


@router.api_route("/proxy/{path:path}", methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)
def proxy(path: str) -> None:
    """Refuse: MONAI Label's way to a DICOMweb server leads nowhere here."""
    raise RequestError(404, "this server's scans are a folder of files: there is no DICOMweb server behind it.")


@router.get("/ohif/{path:path}", include_in_schema=False)
def ohif(path: str) -> None:
    """Refuse: the viewer would wait for scans for ever."""
    raise RequestError(
        404, "OHIF shows scans of a DICOMweb server; this server's scans are a folder of files: use 3D Slicer for them."
    )


@router.api_route("/infer/wsi/{model}", methods=["POST"], include_in_schema=False)
@router.api_route("/infer/wsi_v2/{model}", methods=["POST"], include_in_schema=False)
def whole_slide(model: str) -> None:
    """Refuse: MONAI Label's pathology route."""
    raise RequestError(404, "this server segments volumes, no whole-slide images; use /infer/{model}.")
