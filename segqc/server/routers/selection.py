"""The next scan to correct."""

from __future__ import annotations

import functools
from typing import Final

from fastapi import APIRouter, Request

from segqc.server.actors import RequestUser, acting
from segqc.server.monailabel.facade import current_app
from segqc.server.names import known
from segqc.server.parameters import SampleBody, SampleParams
from segqc.server.routers.dependencies import AskingUser, in_turn
from segqc.store.records import JsonObject

router = APIRouter()

DEFAULT_STRATEGY: Final = "random"
"""MONAI Label's name for the strategy of the settings."""


@router.post("/activelearning/{strategy}", tags=["ActiveLearning"], summary="Get the next sample")
async def next_sample(request: Request, strategy: str, user: AskingUser, params: SampleBody) -> JsonObject:
    """Hand out the scan to correct next; an empty object means that none is left for this annotator."""
    return await in_turn(request, functools.partial(next_scan, strategy, user, params))


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
