"""Inference on many scans."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

from fastapi import APIRouter

from segqc.server import job_answers
from segqc.server.checks import JsonObject, Params, check_tag, choose_params, known
from segqc.server.errors import RequestError
from segqc.server.monailabel.auth import ADMIN, USER
from segqc.server.monailabel.facade import current_app
from segqc.server.routers.dependencies import AskingUser, checked_request, open_store
from segqc.server.waiting import described

router = APIRouter()

BATCH_PARAMS: Final = frozenset({"label_tag", "max_batch_size", "save_label"})


class Images(StrEnum):
    """Which scans a batch inference takes."""

    all = "all"
    labeled = "labeled"
    unlabeled = "unlabeled"


@router.get("/batch/infer", tags=["Infer"], dependencies=[USER], summary="Status of the last batch inference")
def batch_status(all: bool = False, check_if_running: bool = False) -> Any:
    """Tell how the batch inferences are."""
    return job_answers.status(open_store(), "batch_infer", every=all, only_running=check_if_running)


@router.post("/batch/infer/{model}", tags=["Infer"], dependencies=[ADMIN], summary="Run inference on many scans")
def batch_start(
    user: AskingUser, model: str, images: Images = Images.all, params: Params = None, run_sync: bool = False
) -> Any:
    """Queue an inference on all, all labelled or all unlabelled scans."""
    app = current_app()
    known("model", model, app.models)
    chosen = choose_params(params or {}, BATCH_PARAMS)
    tag = check_tag(str(chosen.get("label_tag") or "original"))
    if tag == "final" and model != "segqc":
        raise RequestError(400, "a network's mask is never final: final labels are what annotators submit.")
    app.context.segmenter()
    if model == "segqc":
        app.context.assessor()
    limit: JsonObject = {name: value for name, value in chosen.items() if name == "max_batch_size"}
    request = checked_request("batch_infer", {**limit, "model": model, "images": images.value, "label_tag": tag})
    job = job_answers.submit(open_store(), user.actor(params), request)
    return described(open_store(), job, "batch_infer", wait=run_sync)


@router.delete("/batch/infer", tags=["Infer"], dependencies=[ADMIN], summary="Stop the running batch inference")
def batch_stop(user: AskingUser) -> JsonObject | None:
    """Stop the batch inference that runs."""
    return job_answers.stop(open_store(), user.actor(), "batch_infer")
