"""Rounds: train both networks, then segment and score what waits."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from segqc.loop.requests import RoundRequest
from segqc.server import job_answers
from segqc.server.parameters import AllJobs, OnlyOpen, TrainingBody
from segqc.server.routers.dependencies import AskingUser, open_store
from segqc.server.routers.training import all_trainings
from segqc.store.records import JsonObject

router = APIRouter()


@router.post("/segqc/round", tags=["SegQC"], summary="Start a round")
def start_round(user: AskingUser, params: TrainingBody) -> JsonObject:
    """Queue a round: train both networks, then segment and score all scans that wait."""
    trainings = all_trainings(params)
    request = RoundRequest(
        segmentation=trainings["segmentation"].request.settings, segqc=trainings["segqc"].request.settings
    )
    messages = [f"{model}: {line}" for model, own in trainings.items() for line in own.messages]
    return job_answers.submit(open_store(), user.actor(params.get("client_id")), request, messages=messages)


@router.get("/segqc/round", tags=["SegQC"], summary="Status of the last round")
def round_status(all: AllJobs = False, check_if_running: OnlyOpen = False) -> Any:
    """Tell how the rounds are; ``reason`` says why one began by itself."""
    return job_answers.status(open_store(), "round", every=all, only_running=check_if_running)
