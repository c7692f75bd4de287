"""A round of the loop: train both networks, publish them as one bundle, segment and assess the pool.

Each finished step is recorded, and not done again when the round is continued after its process has died.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from segqc.loop.dataset import Dataset
from segqc.loop.due import outlook_of
from segqc.loop.requests import (
    NETWORKS,
    PUBLISH_STEP,
    RoundRequest,
    RoundResult,
    ScoringResult,
    result_to_json,
    training_step,
)
from segqc.loop.scoring import score
from segqc.loop.training import chosen_settings, train_unpublished, training_result
from segqc.networks.bundle import model_name
from segqc.quality.stopping import outlook_sentence
from segqc.settings import NetworkName
from segqc.store import jobs
from segqc.store.records import JobRecord, JsonObject
from segqc.training import Progress

_METHOD: Final = "segqc"


def run_round(dataset: Dataset, job: JobRecord, request: RoundRequest, progress: Progress) -> RoundResult:
    """Do the round of a job, from the first step that is not finished.

    Args:
        dataset: the folder.
        job: the job; whoever asked for it publishes the bundle.
        request: how to train.
        progress: called after each step.

    Raises:
        TooFewCases: if too few scans are labelled.
        DatasetError: if nothing says what the structures are.
        SettingsError: if a choice is unknown or can't be used.
    """
    with dataset.store.write() as transaction:
        number, done = jobs.begin_round(transaction, job.id, len(dataset.cases()))
    folder = _folder(dataset, number)

    def finish(name: str, result: JsonObject) -> None:
        with dataset.store.write() as transaction:
            jobs.finish_step(transaction, number, name, result)
        done[name] = result

    def train_one(network: NetworkName) -> None:
        settings = chosen_settings(dataset, network, request.training(network).settings)
        path = folder / model_name(network)
        trained = train_unpublished(dataset, network, progress, settings, path, purpose="a worker's round job")
        finish(training_step(network), result_to_json(training_result(network, trained)))

    def publish() -> None:
        files = {network: folder / model_name(network) for network in NETWORKS}
        reason = f"round {number}"
        with dataset.bundles.publishing(files, job.actor, reason, even_if_worse=request.serve) as publication:
            result: JsonObject = {"bundle": publication.number, "held_because": publication.held_because}
            jobs.finish_step(publication.transaction, number, PUBLISH_STEP, result, bundle=publication.number)
        done[PUBLISH_STEP] = result

    def score_pool() -> None:
        summary = score(dataset, _METHOD, progress)
        finish("score", result_to_json(ScoringResult(method=_METHOD, **dataclasses.asdict(summary))))

    steps: dict[str, Callable[[], None]] = {training_step(network): partial(train_one, network) for network in NETWORKS}
    steps |= {PUBLISH_STEP: publish, "score": score_pool}
    for number_done, (name, step) in enumerate(steps.items()):
        if name not in done:
            progress.step(number_done, len(steps), "round", name, unit="parts")
            step()
    shutil.rmtree(folder, ignore_errors=True)
    with dataset.store.write() as transaction:
        jobs.finish_round(transaction, number)
    with dataset.store.read() as transaction:
        progress.message(outlook_sentence(outlook_of(transaction, dataset.settings.round)))
    return RoundResult(round=number, steps=done)


def _folder(dataset: Dataset, number: int) -> Path:
    """Where a round keeps its models until they are published; what is left of others that failed goes."""
    rounds = dataset.own / "training" / "rounds"
    folder = rounds / str(number)
    for other in rounds.glob("*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder
