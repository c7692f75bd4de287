"""Inference: the networks on one scan."""

from __future__ import annotations

import asyncio
import functools
import json
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, File, Request, Response, UploadFile
from fastapi.responses import JSONResponse
from requests_toolbelt import MultipartEncoder

from segqc.server.errors import RequestError
from segqc.server.monailabel.facade import Inference, current_app
from segqc.server.names import known
from segqc.server.parameters import InferParams, InferText
from segqc.server.routers.dependencies import SentOnce, check_received, known_image, known_session, receive
from segqc.server.submitted_labels import read_submission
from segqc.volumes import LABEL_SUFFIXES, VolumeError, write_labels

router = APIRouter()


class Output(StrEnum):
    """What an inference answers with."""

    image = "image"
    json = "json"
    all = "all"
    dicom_seg = "dicom_seg"


@router.post("/infer/{model}", tags=["Infer"], summary="Run inference")
async def infer(
    request: Request,
    model: str,
    params: InferText,
    image: str = "",
    session_id: str = "",
    file: Annotated[UploadFile | None, File()] = None,
    label: Annotated[UploadFile | None, File()] = None,
    output: Output | None = None,
) -> Response:
    """Run an inference task on a scan of the datastore, of a session, or of the request itself."""
    work = functools.partial(_infer, model, params, image, session_id, file, label, output)
    return await asyncio.get_running_loop().run_in_executor(request.app.state.inference, work)


def _infer(
    model: str,
    params: InferParams,
    image: str,
    session_id: str,
    file: UploadFile | None,
    label: UploadFile | None,
    output: Output | None,
) -> Response:
    app = current_app()
    known("model", model, app.models)
    if output is Output.dicom_seg:
        raise RequestError(400, "DICOM SEG is made from scans on a DICOMweb server; these scans are files.")
    with tempfile.TemporaryDirectory(prefix="segqc-") as name:
        wanted: dict[str, Any] = {**params.for_task(app.own_params(model)), "model": model}
        if file is not None:
            received = receive(file, Path(name), "scan", "the scan")
            check_received(received, "the scan")
            wanted["image_file"] = str(received)
        elif session_id:
            wanted["image_file"] = known_session(session_id).image
        elif image:
            wanted["image"] = known_image(image)
        else:
            raise RequestError(400, "name a scan: image=<id>, session_id=<id>, or upload one as 'file'.")
        if label is not None:
            received = receive(label, Path(name), "label", "the label map", LABEL_SUFFIXES)
            scan = Path(wanted["image_file"] if "image" not in wanted else app.datastore.get_image_uri(wanted["image"]))
            wanted["label"] = str(_read_uploaded(received, scan, params))
        try:
            made = app.infer(wanted)
        except VolumeError as error:
            if label is None:
                raise
            raise RequestError(422, str(error).replace(wanted["label"], "the label map")) from error
    return _reply(made, output)


def _read_uploaded(received: Path, scan: Path, params: InferParams) -> Path:
    """Write an uploaded label map anew with the stored values, read as a submission is."""
    context = current_app().context
    configured, limits = bool(context.settings.structures), context.settings.intake
    labels = read_submission(received, scan, context.labels(), params, configured=configured, limits=limits)
    path = received.with_name("stored.nii.gz")
    write_labels(labels.volume, path)
    return path


def _reply(made: Inference, output: Output | None) -> Response:
    """Send a result and remove its file."""
    path = made.file
    if output is Output.image:
        return SentOnce(path, media_type="application/octet-stream", filename=path.name)
    try:
        if output is Output.json:
            return JSONResponse(made.params)
        fields = {
            "params": (None, json.dumps(made.params), "application/json"),
            "image": (path.name, path.read_bytes(), "application/octet-stream"),
        }
        message = MultipartEncoder(fields=fields)
        return Response(message.to_string(), media_type=message.content_type)
    finally:
        path.unlink(missing_ok=True)
