"""The model files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from fastapi import APIRouter, UploadFile

from segqc.loop.jobs import enqueue_scoring
from segqc.networks.assessor import Assessor
from segqc.networks.card import NetworkName
from segqc.networks.model import ModelError, TrainedNetwork, model_status
from segqc.networks.segmenter import Segmenter
from segqc.server.checks import JsonObject, known
from segqc.server.context import AppContext, ModelCache
from segqc.server.errors import RequestError
from segqc.server.monailabel.auth import ADMIN
from segqc.server.monailabel.facade import current_app
from segqc.store import assessments
from segqc.store.files import sha256_of
from segqc.volumes import atomic_write

router = APIRouter()


@router.put("/model/{model}", tags=["Model"], dependencies=[ADMIN], summary="Replace a model file")
def update_model(model: str, file: UploadFile) -> JsonObject:
    """Put an uploaded model in the place of the current one, if it can be loaded and is of the same kind.

    From then on only the new pair's estimates count, and the scans that wait are scored by it.
    """
    context = current_app().context
    caches: Mapping[str, ModelCache[Segmenter] | ModelCache[Assessor]] = {
        "segmentation": context.segmenters,
        "segqc": context.assessors,
    }
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
    return {"checksum": f"SHA256:{sha256_of(cache.path)}", "modified_time": int(cache.path.stat().st_mtime)}


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
