"""The next scan to correct."""

from __future__ import annotations

import functools
from typing import Final

from fastapi import APIRouter, Request

from segqc.server.actors import RequestUser, acting
from segqc.server.checks import JsonObject, Params, choose_params, known
from segqc.server.monailabel.auth import USER
from segqc.server.monailabel.facade import current_app
from segqc.server.routers.dependencies import AskingUser, in_turn

router = APIRouter()

SAMPLE_PARAMS: Final = frozenset({"label_tag", "labels", "client_id", "skip_reason", "resume"})


@router.post("/activelearning/{strategy}", tags=["ActiveLearning"], dependencies=[USER], summary="Get the next sample")
async def next_sample(request: Request, strategy: str, user: AskingUser, params: Params = None) -> JsonObject:
    """Hand out the scan to correct next; an empty object means that none is left for this annotator."""
    return await in_turn(request, functools.partial(next_scan, strategy, user, params))


def next_scan(strategy: str, user: RequestUser, params: Params) -> JsonObject:
    """Hand out the scan to correct next, as clients see it; an empty object where none is left."""
    app = current_app()
    known("strategy", strategy, app.strategies)
    chosen = choose_params(params or {}, SAMPLE_PARAMS)
    with acting(user.actor(chosen)):
        answer = app.next_sample(strategy, chosen)
    return {**answer, "requested_strategy": strategy} if answer else {}
