"""Inference on many scans."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from segqc.loop.requests import NETWORKS, BatchImages, BatchRequest, mask_tag_problem
from segqc.server import job_answers
from segqc.server.errors import RequestError
from segqc.server.monailabel.facade import current_app
from segqc.server.names import known
from segqc.server.parameters import AllJobs, BatchBody, OnlyOpen, RunSync
from segqc.server.routers.dependencies import AskingUser, open_store
from segqc.server.waiting import described
from segqc.store.labels import ORIGINAL
from segqc.store.records import JsonObject

router = APIRouter()


@router.get("/batch/infer", tags=["Infer"], summary="Status of the last batch inference")
def batch_status(all: AllJobs = False, check_if_running: OnlyOpen = False) -> Any:
    """Tell how the batch inferences are."""
    return job_answers.status(open_store(), "batch_infer", every=all, only_running=check_if_running)


@router.post("/batch/infer/{model}", tags=["Infer"], summary="Run inference on many scans")
def batch_start(
    user: AskingUser, model: str, params: BatchBody, images: BatchImages = "all", run_sync: RunSync = False
) -> Any:
    """Queue an inference on all, all labelled or all unlabelled scans."""
    app = current_app()
    network, tag = known("model", model, NETWORKS), params.label_tag or ORIGINAL
    if network == "segmentation" and (problem := mask_tag_problem(tag)) is not None:
        raise RequestError(400, problem)
    app.context.segmenter()
    if network == "segqc":
        app.context.assessor()
    request = BatchRequest(model=network, images=images, label_tag=tag, max_batch_size=params.max_batch_size)
    job = job_answers.submit(open_store(), user.actor(params.client_id), request)
    return described(open_store(), job, "batch_infer", wait=run_sync)


@router.delete("/batch/infer", tags=["Infer"], summary="Stop the running batch inference")
def batch_stop(user: AskingUser) -> JsonObject | None:
    """Stop the batch inference that runs."""
    return job_answers.stop(open_store(), user.actor(), "batch_infer")
