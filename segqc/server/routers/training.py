"""Trainings of the networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter

from segqc.loop.requests import TrainRequest
from segqc.server import job_answers
from segqc.server.actors import RequestUser
from segqc.server.errors import RequestError
from segqc.server.monailabel.facade import current_app
from segqc.server.monailabel.train import IGNORED_REASON, refuse_unknown
from segqc.server.names import known
from segqc.server.parameters import AllJobs, Enqueue, OnlyOpen, RunSync, TrainingBody
from segqc.server.routers.dependencies import AskingUser, open_store
from segqc.server.waiting import all_described, described
from segqc.store.records import JsonObject

router = APIRouter()


@dataclass(frozen=True, slots=True)
class RequestedTraining:
    """What a worker is asked for, and which of the client's parameters are ignored."""

    request: TrainRequest
    ignored: list[str]

    @property
    def messages(self) -> list[str]:
        """What the job says at once."""
        return [f"ignored: {', '.join(self.ignored)} ({IGNORED_REASON})"] if self.ignored else []


def _checked(wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, RequestedTraining]:
    """Check the parameters of trainings, by network, and whether there are enough labels.

    Raises:
        RequestError: 400 for a parameter that cannot be used, 404 for a network that there is none of, 409 with too
            few labels.
    """
    app = current_app()
    tasks = {model: app.trainers[known("trainer", model, app.trainers)] for model in wanted}
    chosen = {model: task.job(wanted[model]) for model, task in tasks.items()}
    labelled = len(app.context.dataset.cases())
    for model, task in tasks.items():
        task.check(chosen[model][0], labelled)
    return {
        model: RequestedTraining(TrainRequest(model=tasks[model].network, settings=own), ignored)
        for model, (own, ignored) in chosen.items()
    }


def all_trainings(params: JsonObject) -> dict[str, RequestedTraining]:
    """The trainings of all networks, checked; ``params`` may hold an object for each.

    Raises:
        RequestError: 400 for a parameter that cannot be used, 409 with too few labels.
    """
    trainers = current_app().trainers
    refuse_unknown(params, trainers)
    chosen = {}
    for model in trainers:
        own = params.get(model, {})
        if not isinstance(own, dict):
            raise RequestError(400, f"params[{model!r}] is not a JSON object.")
        chosen[model] = own
    return _checked(chosen)


def _submit_training(
    user: RequestUser, params: JsonObject, training: RequestedTraining, *, enqueue: bool = False
) -> JsonObject:
    actor, store = user.actor(params.get("client_id")), open_store()
    answer = job_answers.submit(store, actor, training.request, wait=enqueue, messages=training.messages)
    return {**answer, "ignored": [*training.ignored]} if training.ignored else answer


@router.get("/train/", tags=["Train"], summary="Status of the last training")
def train_status(all: AllJobs = False, check_if_running: OnlyOpen = False) -> Any:
    """Tell how the trainings are."""
    return job_answers.status(open_store(), "train", every=all, only_running=check_if_running)


@router.post("/train/", tags=["Train"], summary="Train all networks")
def train_all(user: AskingUser, params: TrainingBody, run_sync: RunSync = False) -> Any:
    """Queue the trainings of all networks; ``params`` may hold an object for each."""
    put = {model: _submit_training(user, params, own) for model, own in all_trainings(params).items()}
    return all_described(open_store(), put, "train", wait=run_sync)


@router.post("/train/{model}", tags=["Train"], summary="Train a network")
def train_start(
    user: AskingUser, model: str, params: TrainingBody, run_sync: RunSync = False, enqueue: Enqueue = False
) -> Any:
    """Queue a training; where the same one is open already, tell of that one."""
    job = _submit_training(user, params, _checked({model: params})[model], enqueue=enqueue)
    return described(open_store(), job, "train", wait=run_sync)


@router.delete("/train/", tags=["Train"], summary="Stop the running training")
def train_stop(user: AskingUser) -> JsonObject | None:
    """Stop the training that runs; it continues from its checkpoint when it is started again."""
    return job_answers.stop(open_store(), user.actor(), "train")
