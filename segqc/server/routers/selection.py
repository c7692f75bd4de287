"""The next scan to correct."""

from __future__ import annotations

import functools
from typing import Final

from fastapi import APIRouter, Request

from segqc.loop.dataset import Dataset
from segqc.server.actors import RequestUser, acting
from segqc.server.monailabel.facade import current_app
from segqc.server.names import known
from segqc.server.parameters import SampleBody, SampleParams
from segqc.server.routers.dependencies import AskingUser, in_turn
from segqc.store import queue
from segqc.store.records import JsonObject

router = APIRouter()

DEFAULT_STRATEGY: Final = "random"
"""MONAI Label's name for the strategy of the settings."""


@router.post("/activelearning/{strategy}", tags=["ActiveLearning"], summary="Get the next sample")
async def next_sample(request: Request, strategy: str, user: AskingUser, params: SampleBody) -> JsonObject:
    """Hand out the scan to correct next; an empty object means that none is left for this annotator."""
    return await in_turn(request, functools.partial(next_scan, strategy, user, params))


def nothing_left(dataset: Dataset) -> str:
    """Why no scan is handed out, in a sentence."""
    with dataset.store.read() as transaction:
        is_empty = queue.counts(transaction)["all"] == 0
    if not is_empty:
        return "No scan is left for you: all are labelled, or others work on them."
    if dataset.pacs is not None:
        return "There are no scans yet: no series of the PACS passes the filters in segqc.toml ([pacs])."
    return "There are no scans yet: put some (.nii, .nii.gz or .nrrd) into the dataset folder of the server."


def next_scan(strategy: str, user: RequestUser, params: SampleParams) -> JsonObject:
    """Hand out the scan to correct next, as clients see it; an empty object where none is left."""
    app = current_app()
    known("strategy", strategy, app.strategies)
    with acting(user.actor(params.client_id)):
        answer = app.next_sample(strategy, params)
    if not answer:
        return {}
    user.will_download(str(answer["id"]))
    return {**answer, "requested_strategy": strategy}
