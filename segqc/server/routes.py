"""The routes whose MONAI Label originals trust the client too far, answer late or fail with a bare 500.

All are plain functions, which FastAPI runs in its thread pool; inference alone has slots of its own, so that waiting
inferences cannot take all threads.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, BackgroundTasks, Body, Depends, File, Form, Request, Response, UploadFile
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.others.generic import file_checksum
from requests_toolbelt import MultipartEncoder

from segqc.networks import ModelError
from segqc.server.checks import (
    JsonObject,
    check_image_id,
    check_session_id,
    check_tag,
    choose_params,
    file_suffix,
    json_object,
    known,
)
from segqc.server.errors import RequestError
from segqc.server.jobs import JobKind, Jobs
from segqc.server.submission import read_submission, store_submission
from segqc.volumes import VolumeError, atomic_write, read_scan

router = APIRouter()

USER = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))
ANNOTATOR = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))
ADMIN = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))

Params = Annotated[dict[str, Any] | None, Body()]
FormText = Annotated[str, Form()]

INFER_PARAMS = frozenset({"label_tag", "save_label"})
SAMPLE_PARAMS = frozenset({"label_tag", "labels", "client_id"})
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


def _jobs(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.jobs
    return jobs


def _receive(upload: UploadFile, folder: Path, stem: str, what: str) -> Path:
    """Write an uploaded scan or label map into a folder; its name is ours, but for the suffix."""
    path = folder / f"{stem}{file_suffix(upload.filename, what)}"
    with path.open("wb") as file:
        shutil.copyfileobj(upload.file, file)
    return path


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
    return await anyio.to_thread.run_sync(work, limiter=request.app.state.inference_slots)


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
            wanted["image_file"] = str(_receive(file, Path(name), "scan", "the scan"))
        elif session_id:
            wanted["image_file"] = _session_image(session_id)
        elif image:
            wanted["image"] = known("image", image, app.datastore().list_images())
        else:
            raise RequestError(400, "name a scan: image=<id>, session_id=<id>, or upload one as 'file'.")
        if label is not None:
            wanted["label"] = str(_receive(label, Path(name), "label", "the label map"))
        result = app.infer(wanted)
    return _reply(Path(result["file"]), result["params"], output)


def _session_image(session_id: str) -> str:
    session = app_instance().sessions().get_session(check_session_id(session_id))
    if session is None:
        raise RequestError(404, f"there is no session {session_id!r}; it may have expired.")
    return str(session.image)


def _reply(path: Path, params: Mapping[str, Any], output: Output | None) -> Response:
    """Send a result and remove its file."""
    if output is Output.image:
        gone = BackgroundTasks()
        gone.add_task(path.unlink, missing_ok=True)
        return FileResponse(path, media_type="application/octet-stream", filename=path.name, background=gone)
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
def next_sample(strategy: str, params: Params = None) -> JsonObject:
    """Answer with the scan to correct next; an empty object means that all scans have a final label."""
    app = app_instance()
    known("strategy", strategy, app._strategies)
    chosen = choose_params(params or {}, SAMPLE_PARAMS)
    answer = app.next_sample({**chosen, "strategy": strategy})
    if not answer:
        return {}
    scan, store = answer["id"], app.datastore()
    info = store.get_image_info(scan)
    kept = info.get("strategy")
    history = dict(kept) if isinstance(kept, dict) else {}
    history[strategy] = {"ts": int(time.time()), "client_id": chosen.get("client_id")}
    store.update_image_info(scan, {"strategy": history})
    # the strategy's own words win over what happens to be noted of the scan
    told: JsonObject = {**info, "history": history, **answer, "requested_strategy": strategy}
    told["name"] = _title(scan, Path(answer["path"]).name, answer.get("estimated_dice"))
    return told


def _title(scan: str, file_name: str, dice: float | None) -> str:
    """What 3D Slicer titles the volume with, and the name of the file that it downloads: the suffix has to stay."""
    return file_name if dice is None else f"{scan} (estimated Dice {dice:.2f}){file_name.removeprefix(scan)}"


# -------------------------------------------------------------------------------------------------------- long work


def _status(jobs: Jobs, kind: JobKind, every: bool, only_running: bool) -> Any:
    if only_running:
        running = jobs.open(kind)
        if not running:
            raise RequestError(404, f"no {kind} job is running.")
        return running[0].to_json()
    found = [job.to_json() for job in jobs.all(kind)]
    if not found:
        raise RequestError(404, f"no {kind} job was started since the server's start.")
    return found if every else found[-1]


def _stop(jobs: Jobs, kind: JobKind) -> JsonObject | None:
    job = jobs.stop(kind)
    return job.to_json() if job is not None else None


def _refuse_sync(run_sync: bool) -> None:
    if run_sync:
        raise RequestError(400, "run_sync is not offered: start the job and ask for its status.")


def _submit(jobs: Jobs, kind: JobKind, request: JsonObject, enqueue: bool = False) -> JsonObject:
    if jobs.open(kind) and not enqueue:
        raise RequestError(429, f"a {kind} job is running already; stop it, wait for it, or ask with enqueue=true.")
    return jobs.submit(kind, request).to_json()


def _training(model: str, params: Mapping[str, Any]) -> JsonObject:
    app = app_instance()
    task = app._trainers[known("trainer", model, app._trainers)]
    chosen = choose_params(params, getattr(task, "params", frozenset()))
    if check := getattr(task, "check", None):
        check(chosen, len(app.datastore().get_labeled_images()))
    return {"model": model, **chosen}


@router.get("/train/", tags=["Train"], dependencies=[USER], summary="Status of the last training")
def train_status(request: Request, all: bool = False, check_if_running: bool = False) -> Any:
    """Tell how the trainings are."""
    return _status(_jobs(request), "train", all, check_if_running)


@router.post("/train/", tags=["Train"], dependencies=[ADMIN], summary="Train all networks")
def train_all(request: Request, params: Params = None, run_sync: bool = False) -> JsonObject:
    """Queue the trainings of all networks; ``params`` may hold an object for each."""
    _refuse_sync(run_sync)
    wanted = params or {}
    requests = {}
    for model in app_instance()._trainers:
        own = wanted.get(model, {})
        if not isinstance(own, dict):
            raise RequestError(400, f"params[{model!r}] is not a JSON object.")
        requests[model] = _training(model, own)
    return {m: {"result": _submit(_jobs(request), "train", r, enqueue=True)} for m, r in requests.items()}


@router.post("/train/{model}", tags=["Train"], dependencies=[ADMIN], summary="Train a network")
def train_start(
    request: Request, model: str, params: Params = None, run_sync: bool = False, enqueue: bool = False
) -> JsonObject:
    """Queue a training."""
    _refuse_sync(run_sync)
    return _submit(_jobs(request), "train", _training(model, params or {}), enqueue)


@router.delete("/train/", tags=["Train"], dependencies=[ADMIN], summary="Stop the running training")
def train_stop(request: Request) -> JsonObject | None:
    """Stop the training that runs; it continues from its checkpoint when it is started again."""
    return _stop(_jobs(request), "train")


@router.get("/scoring/", tags=["Scoring"], dependencies=[USER], summary="Status of the last scoring")
def scoring_status(request: Request, all: bool = False, check_if_running: bool = False) -> Any:
    """Tell how the scorings are."""
    return _status(_jobs(request), "scoring", all, check_if_running)


@router.post("/scoring/", tags=["Scoring"], dependencies=[ANNOTATOR], summary="Score by all methods")
def scoring_all(request: Request, params: Params = None, run_sync: bool = False) -> JsonObject:
    """Queue all scoring methods."""
    _refuse_sync(run_sync)
    requests = {method: _scoring(method, params or {}) for method in app_instance()._scoring_methods}
    return {m: {"result": _submit(_jobs(request), "scoring", r, enqueue=True)} for m, r in requests.items()}


@router.post("/scoring/{method}", tags=["Scoring"], dependencies=[ANNOTATOR], summary="Score by a method")
def scoring_start(
    request: Request, method: str, params: Params = None, run_sync: bool = False, enqueue: bool = False
) -> JsonObject:
    """Queue a scoring method."""
    _refuse_sync(run_sync)
    return _submit(_jobs(request), "scoring", _scoring(method, params or {}), enqueue)


def _scoring(method: str, params: Mapping[str, Any]) -> JsonObject:
    app = app_instance()
    known("scoring method", method, app._scoring_methods)
    app.desk.segmenter()
    if method == "segqc":
        app.desk.assessor()
    return {"method": method, **choose_params(params, {"force"})}


@router.delete("/scoring/", tags=["Scoring"], dependencies=[ANNOTATOR], summary="Stop the running scoring")
def scoring_stop(request: Request) -> JsonObject | None:
    """Stop the scoring that runs; started again it goes on with the scans that are left."""
    return _stop(_jobs(request), "scoring")


@router.get("/batch/infer", tags=["Infer"], dependencies=[USER], summary="Status of the last batch inference")
def batch_status(request: Request, all: bool = False, check_if_running: bool = False) -> Any:
    """Tell how the batch inferences are."""
    return _status(_jobs(request), "batch_infer", all, check_if_running)


@router.post("/batch/infer/{model}", tags=["Infer"], dependencies=[ADMIN], summary="Run inference on many scans")
def batch_start(
    request: Request, model: str, images: Images = Images.all, params: Params = None, run_sync: bool = False
) -> JsonObject:
    """Queue an inference on all, all labelled or all unlabelled scans."""
    _refuse_sync(run_sync)
    app = app_instance()
    known("model", model, app._infers)
    chosen = choose_params(params or {}, BATCH_PARAMS)
    tag = check_tag(str(chosen.get("label_tag") or "original"))
    if tag == "final" and model != "segqc":
        raise RequestError(400, "a network's mask is never final: final labels are what annotators submit.")
    app.desk.segmenter()
    if model == "segqc":
        app.desk.assessor()
    # one worker: a network uses all cores by itself
    fixed: JsonObject = {"model": model, "images": images.value, "label_tag": tag, "multi_gpu": False, "max_workers": 1}
    return _submit(_jobs(request), "batch_infer", {**chosen, **fixed})


@router.delete("/batch/infer", tags=["Infer"], dependencies=[ADMIN], summary="Stop the running batch inference")
def batch_stop(request: Request) -> JsonObject | None:
    """Stop the batch inference that runs."""
    return _stop(_jobs(request), "batch_infer")


# -------------------------------------------------------------------------------------------------------- datastore


def _known_image(image: str) -> str:
    if not app_instance().datastore().has_image(image):
        raise RequestError(404, f"there is no image {image!r}.")
    return image


def _known_label(label: str, tag: str) -> str:
    if not app_instance().datastore().get_label_uri(label, tag):
        raise RequestError(404, f"the image {label!r} has no label with the tag {tag!r}.")
    return label


@router.put("/datastore/label", tags=["Datastore"], dependencies=[ANNOTATOR], summary="Submit a label map")
def save_label(
    image: str, label: Annotated[UploadFile, File()], params: FormText = "{}", tag: str = "final"
) -> JsonObject:
    """Store a label map of a scan, checked and brought to the configured label values."""
    app = app_instance()
    _known_image(image)
    tag = check_tag(tag or "final")
    info = json_object(params, "params")
    with tempfile.TemporaryDirectory(prefix="segqc-") as folder:
        received = _receive(label, Path(folder), "submitted", "the label map")
        scan = Path(app.datastore().get_image_uri(image))
        named = bool(app.desk.settings.structures)
        labels = read_submission(received, scan, app.desk.labels(), info, configured=named)
        stored = store_submission(labels, Path(folder))
        label_id = app.datastore().save_label(image, str(stored), tag, info)
    told = app.on_save_label(image, label_id) or {}
    return {**told, "image": image, "label": label_id}


@router.put("/datastore/", tags=["Datastore"], dependencies=[ANNOTATOR], include_in_schema=False)
@router.put("/datastore/image", tags=["Datastore"], dependencies=[ANNOTATOR], summary="Upload a scan")
def add_image(file: Annotated[UploadFile, File()], image: str | None = None, params: FormText = "{}") -> JsonObject:
    """Store a new scan."""
    store = app_instance().datastore()
    suffix = file_suffix(file.filename, "the scan")
    base = (file.filename or "").replace("\\", "/").rsplit("/", 1)[-1]
    name = check_image_id(image or base[: -len(suffix)])
    if store.has_image(name):
        raise RequestError(409, f"there is an image {name!r} already; remove it first or choose another id.")
    info = json_object(params, "params")
    with tempfile.TemporaryDirectory(prefix="segqc-") as folder:
        path = _receive(file, Path(folder), "scan", "the scan")
        try:
            read_scan(path)
        except VolumeError as error:
            raise RequestError(422, str(error).replace(str(path), "the scan")) from error
        return {"image": store.add_image(name, str(path), info)}


@router.delete("/datastore/", tags=["Datastore"], dependencies=[ADMIN], include_in_schema=False)
@router.delete("/datastore/image", tags=["Datastore"], dependencies=[ADMIN], summary="Remove a scan and its labels")
def remove_image(id: str) -> JsonObject:
    """Remove a scan."""
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
def remove_label(id: str, tag: str) -> JsonObject:
    """Remove a label map."""
    app_instance().datastore().remove_label(_known_label(id, tag), tag)
    return {}


@router.get("/datastore/label/info", tags=["Datastore"], dependencies=[USER], summary="What is noted of a label map")
def label_info(label: str, tag: str) -> JsonObject:
    """Tell what is noted of a label map."""
    found: JsonObject = app_instance().datastore().get_label_info(_known_label(label, tag), tag)
    return found


@router.put("/datastore/label/info", tags=["Datastore"], dependencies=[ANNOTATOR], summary="Note something of a label")
def update_label_info(label: str, tag: str, info: FormText = "{}") -> None:
    """Add to what is noted of a label map."""
    app_instance().datastore().update_label_info(_known_label(label, tag), tag, json_object(info, "info"))


@router.put("/datastore/updatelabelinfo", dependencies=[ANNOTATOR], include_in_schema=False)
def update_label_info_before(label: str, tag: str, params: FormText = "{}") -> None:
    """Add to what is noted of a label map, by the older name that 3D Slicer's reviewer uses."""
    app_instance().datastore().update_label_info(_known_label(label, tag), tag, json_object(params, "params"))


@router.get("/datastore/dataset", tags=["Datastore"], dependencies=[ANNOTATOR], summary="Download labelled scans")
def dataset(background: BackgroundTasks, limit_cases: int | None = None) -> FileResponse:
    """Send a ZIP archive of the scans with final labels."""
    store = app_instance().datastore()
    if not store.get_labeled_images():
        raise RequestError(404, "no scan has a final label yet: there is nothing to download.")
    path = store.get_dataset_archive(limit_cases)
    background.add_task(os.unlink, path)
    return FileResponse(path, media_type="application/zip", filename="dataset.zip", background=background)


# ----------------------------------------------------------------------------------------------- sessions and others


@router.put("/session/", tags=["Session"], dependencies=[USER], summary="Open a session with a scan")
def create_session(files: Annotated[list[UploadFile], File()], uncompress: bool = False, expiry: int = 0) -> JsonObject:
    """Keep an uploaded scan for a while: one file, or the files of one DICOM series."""
    if uncompress:
        raise RequestError(400, "archives are not unpacked here; send the files of the series one by one.")
    names = [(f.filename or "").replace("\\", "/").rsplit("/", 1)[-1] for f in files]
    if any(name in ("", ".", "..") for name in names) or len(set(names)) < len(names):
        raise RequestError(400, "each file of a session needs a name of its own.")
    with tempfile.TemporaryDirectory(prefix="segqc-") as folder:
        series = Path(folder) / "series"
        series.mkdir()
        for name, upload in zip(names, files, strict=True):
            with (series / name).open("wb") as file:
                shutil.copyfileobj(upload.file, file)
        path = series if len(files) > 1 else series / names[0]
        try:
            read_scan(path)
        except VolumeError as error:
            raise RequestError(422, str(error).replace(str(path), "the scan")) from error
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
    """Put an uploaded model in the place of the current one, if it can be loaded and is of the same kind."""
    desk = app_instance().desk
    shelves = {"segmentation": desk.segmenters, "segqc": desk.assessors}
    shelf = shelves[known("model", model, shelves)]
    try:
        with atomic_write(shelf.path) as temporary:
            with temporary.open("wb") as target:
                shutil.copyfileobj(file.file, target)
            shelf.load(temporary)
    except ModelError as error:
        message = str(error).removeprefix(str(temporary)).removeprefix(": ")
        raise RequestError(422, f"the uploaded file is no {model} model: {message}.") from error
    return {"checksum": file_checksum(shelf.path), "modified_time": int(shelf.path.stat().st_mtime)}


@router.get("/logs/", tags=["Others"], dependencies=[ADMIN], summary="The server's last log lines")
def logs(request: Request, lines: int = 300) -> PlainTextResponse:
    """Send the last lines of the server's log."""
    path: Path | None = request.app.state.log_file
    if path is None or not path.is_file():
        raise RequestError(404, "this server writes no log file.")
    with path.open(encoding="utf-8", errors="replace") as file:
        return PlainTextResponse("".join(deque(file, max(1, min(lines, 10_000)))))


@router.api_route("/proxy/{path:path}", methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)
def proxy(path: str) -> None:
    """Refuse: MONAI Label's way to a DICOMweb server leads nowhere here."""
    raise RequestError(404, "this server's scans are a folder of files: there is no DICOMweb server behind it.")


@router.api_route("/infer/wsi/{model}", methods=["POST"], include_in_schema=False)
@router.api_route("/infer/wsi_v2/{model}", methods=["POST"], include_in_schema=False)
def whole_slide(model: str) -> None:
    """Refuse: MONAI Label's pathology route."""
    raise RequestError(404, "this server segments volumes, no whole-slide images; use /infer/{model}.")
