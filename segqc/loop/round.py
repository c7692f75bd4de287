"""A round of the loop: train both networks, publish them as one bundle, segment and assess the pool.

Each finished step is recorded, and not done again when the round is continued after its process has died. A training
is, where its model can't be published any more: its file is gone, as backups hold none of a round that goes on, or
[structures] have changed.

Where pseudo-labels are wanted, they are chosen twice. At the beginning, so that what trains was accepted by the bundle
that serves now, with the labels, estimates and settings of now. At the end, by the bundle that serves then, so that
audits and other annotation between two rounds meet the very masks that would train next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from segqc.loop.dataset import Dataset
from segqc.loop.due import outlook_of
from segqc.loop.pseudo_labels import make_pseudo_labels, plan_in_words, plan_pseudo_labels, uses_pseudo_labels
from segqc.loop.requests import (
    NETWORKS,
    PUBLISH_STEP,
    RoundRequest,
    RoundResult,
    ScoringResult,
    plan_of,
    result_to_json,
    train_result_of,
    training_step,
)
from segqc.loop.scoring import score
from segqc.loop.tracking import BUNDLE_TAG, ROUND_TAG, note
from segqc.loop.training import chosen_settings, train_unpublished, training_result
from segqc.networks.bundle import model_name, source_of
from segqc.networks.model_file import ModelError
from segqc.quality.stopping import outlook_sentence
from segqc.settings import NetworkName
from segqc.store import jobs
from segqc.store.records import JobRecord, JsonObject
from segqc.training import Progress

_METHOD: Final = "segqc"
_PLAN: Final = "choose pseudo-labels"
_MAKE: Final = "make pseudo-labels"
_PLAN_NEXT: Final = "choose next pseudo-labels"
_MAKE_NEXT: Final = "make next pseudo-labels"


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
    labelled = len(dataset.cases())  # before the write lock is taken: new files in the folder need it
    with dataset.store.write() as transaction:
        number, done = jobs.begin_round(transaction, job.id, labelled)
        begun = jobs.begun(transaction, job.id)
    folder = _folder(dataset, number)
    if PUBLISH_STEP not in done:
        for network in [n for n in NETWORKS if training_step(n) in done and not _is_usable(dataset, folder, n)]:
            progress.message(f"{training_step(network)}: again, its model is gone or knows other structures")
            del done[training_step(network)]

    def finish(name: str, result: JsonObject) -> None:
        with dataset.store.write() as transaction:
            jobs.finish_step(transaction, number, name, result)
        done[name] = result

    def plan(name: str, *, scored: bool) -> None:
        if not scored:  # what has a current assessment keeps it
            with contextlib.suppress(ModelError):  # without networks there is nothing to accept
                score(dataset, _METHOD, progress)
        planned = plan_pseudo_labels(dataset)
        progress.message(plan_in_words(planned))
        finish(name, result_to_json(planned))

    def make(name: str, planned: str) -> None:
        finish(name, result_to_json(make_pseudo_labels(dataset, plan_of(done[planned]), progress)))

    def train_one(network: NetworkName) -> None:
        settings = chosen_settings(dataset, network, request.training(network).settings)
        path = folder / model_name(network)
        tags, purpose = {ROUND_TAG: str(number)}, "a worker's round job"
        trained = train_unpublished(dataset, network, progress, settings, path, purpose=purpose, tags=tags)
        finish(training_step(network), result_to_json(training_result(network, trained)))

    def publish() -> None:
        files = {network: folder / model_name(network) for network in NETWORKS}
        reason = f"round {number}"
        with dataset.bundles.publishing(
            files, job.actor, reason, even_if_worse=request.serve, begun=begun
        ) as publication:
            result: JsonObject = {"bundle": publication.number, "held_because": publication.held_because}
            jobs.finish_step(publication.transaction, number, PUBLISH_STEP, result, bundle=publication.number)
        done[PUBLISH_STEP] = result
        for network in NETWORKS:
            tracked = train_result_of(done[training_step(network)]).tracked
            note(dataset.settings.tracking, dataset.folder, tracked, {BUNDLE_TAG: str(publication.number)})

    def score_pool() -> None:
        summary = score(dataset, _METHOD, progress)
        finish("score", result_to_json(ScoringResult(method=_METHOD, **dataclasses.asdict(summary))))

    steps: dict[str, Callable[[], None]] = {training_step(network): partial(train_one, network) for network in NETWORKS}
    steps |= {PUBLISH_STEP: publish, "score": score_pool}
    if uses_pseudo_labels(dataset):
        before = {_PLAN: partial(plan, _PLAN, scored=False), _MAKE: partial(make, _MAKE, _PLAN)}
        after = {_PLAN_NEXT: partial(plan, _PLAN_NEXT, scored=True), _MAKE_NEXT: partial(make, _MAKE_NEXT, _PLAN_NEXT)}
        steps = before | steps | after
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


def _is_usable(dataset: Dataset, folder: Path, network: NetworkName) -> bool:
    """Whether what a finished training has made can still be published."""
    try:
        known = source_of(folder / model_name(network), network).read_card().structures
    except ModelError:
        return False
    return set(known) == set(dataset.structures)


def _folder(dataset: Dataset, number: int) -> Path:
    """Where a round keeps its models until they are published; what is left of others that failed goes."""
    rounds = dataset.own / "training" / "rounds"
    folder = rounds / str(number)
    for other in rounds.glob("*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder
