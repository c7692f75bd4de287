"""Rounds: train both networks, then segment and score what waits."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from segqc.loop.requests import RoundRequest
from segqc.server import job_answers
from segqc.server.checks import JsonObject, Params
from segqc.server.monailabel.auth import ADMIN, USER
from segqc.server.routers.dependencies import AskingUser, open_store
from segqc.server.routers.training import all_trainings

router = APIRouter()


@router.post("/segqc/round", tags=["SegQC"], dependencies=[ADMIN], summary="Start a round")
def start_round(user: AskingUser, params: Params = None) -> JsonObject:
    """Queue a round: train both networks, then segment and score all scans that wait."""
    trainings = all_trainings(params)
    request = RoundRequest(**{model: own.request.settings for model, own in trainings.items()})
    messages = [f"{model}: {line}" for model, own in trainings.items() for line in own.messages]
    return job_answers.submit(open_store(), user.actor(params), request, messages=messages)


@router.get("/segqc/round", tags=["SegQC"], dependencies=[USER], summary="Status of the last round")
def round_status(all: bool = False, check_if_running: bool = False) -> Any:
    """Tell how the rounds are."""
    return job_answers.status(open_store(), "round", every=all, only_running=check_if_running)
