"""What each kind of job does; a worker runs it in a process of its own."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, assert_never

from segqc.loop.dataset import Dataset
from segqc.loop.requests import (
    BatchRequest,
    BatchResult,
    JobKind,
    JobResult,
    RoundRequest,
    RoundResult,
    ScoringRequest,
    ScoringResult,
    TrainRequest,
    TrainResult,
    enqueue,
    request_of,
    result_to_json,
)
from segqc.loop.scoring import keep_mask, mask_to_assess, score
from segqc.loop.training import publish, publish_staged, train
from segqc.networks.model import ModelError
from segqc.settings import NetworkName, SettingsError, build
from segqc.store import jobs
from segqc.store.database import Transaction
from segqc.store.events import SERVER
from segqc.store.labels import NewLabel
from segqc.store.records import Actor, JobRecord, JsonObject
from segqc.store.scans import ScanReplaced, UnknownScan
from segqc.training import Progress, TrainingSettings
from segqc.volumes import VolumeError, read_labels, temporary_labels

logger = logging.getLogger(__name__)

LIKELY_ERRORS_TAG: Final = "likely-errors"


def run(dataset: Dataset, job: JobRecord, progress: Progress) -> JobResult:
    """Do a job and return its result.

    Raises:
        DatasetError: if its request cannot be read.
    """
    request = request_of(job)
    match request:
        case TrainRequest():
            return _train(dataset, request, progress)
        case ScoringRequest():
            return _score(dataset, request, progress)
        case BatchRequest():
            return _batch_infer(dataset, request, progress)
        case RoundRequest():
            return _round(dataset, job.id, request, progress)
        case _:
            assert_never(request)


def chosen_settings(dataset: Dataset, network: NetworkName, choices: Mapping[str, object]) -> TrainingSettings:
    """The folder's settings of a training, with a request's choices over them.

    Raises:
        SettingsError: if a choice is unknown or can't be used.
    """
    own = dataset.settings.training_settings(network)
    checked = build(TrainingSettings, choices, "params")
    try:
        return replace(own, **{name: getattr(checked, name) for name in choices})
    except ValueError as error:  # two settings that do not go together
        raise SettingsError(f"params: {error}") from error


def _train(
    dataset: Dataset, request: TrainRequest, progress: Progress, *, kind: JobKind = "train", stage: bool = False
) -> TrainResult:
    settings = chosen_settings(dataset, request.model, request.settings)
    purpose = f"a worker's {kind} job"
    trained = train(dataset, request.model, progress, settings, purpose=purpose, wait=True, stage=stage)
    if trained.left_out:  # the last lines of a job are what clients show
        reasons = "; ".join(trained.left_out.values())
        logger.warning("%d scans used, %d left out: %s", trained.used, len(trained.left_out), reasons)
    return TrainResult(network=request.model, scores=trained.card.scores, used=trained.used, left_out=trained.left_out)


def _score(dataset: Dataset, request: ScoringRequest, progress: Progress) -> ScoringResult:
    summary = score(dataset, request.method, progress, force=request.force)
    return ScoringResult(method=request.method, **dataclasses.asdict(summary))


def _batch_infer(dataset: Dataset, request: BatchRequest, progress: Progress) -> BatchResult:
    """Make masks, or label maps of likely errors, of all, all labelled or all unlabelled scans."""
    network, wanted = request.model, request.images
    segmenter, assessor = dataset.segmenter(), dataset.assessor()
    if segmenter is None or (network == "segqc" and assessor is None):
        raise ModelError(f"the network {network!r} is not trained yet")
    entries = [e for e in dataset.scans() if wanted == "all" or (e.final is None) == (wanted == "unlabeled")]
    entries = entries[: request.max_batch_size or None]
    pair, failed = publish(dataset), dict[str, str]()
    for i, entry in enumerate(entries):
        progress.step(i, len(entries), "inference", entry.id)
        try:
            scan = dataset.read_scan(entry)
            if network == "segmentation" or assessor is None:
                made = segmenter.predict(scan).labels
                keep_mask(dataset, entry.id, made, segmenter, request.label_tag, content=entry.sha256)
                continue
            mask = mask_to_assess(dataset, entry, segmenter)
            if mask is None:
                made = segmenter.predict(scan).labels
                mask = keep_mask(dataset, entry.id, made, segmenter, content=entry.sha256)
            labels = read_labels(dataset.store.label_file(mask), scan=scan, values=assessor.values)
            result = assessor.assess(scan, labels, scan_id=entry.id)
            errors = assessor.likely_errors(result, scan)
            source = Actor(kind="network", name=assessor.version, identified_by="program")
            label = NewLabel(
                entry.id, LIKELY_ERRORS_TAG, "network", source,
                parent=mask.id, bundle=pair, scan_sha256=entry.sha256,
            )  # fmt: skip
            with temporary_labels(errors) as path:
                dataset.store.save_label(label, path)
        except (VolumeError, ScanReplaced, UnknownScan, OSError) as error:
            # one bad file must not keep all other scans from their masks
            logger.warning("%s is left out: %s", entry.id, error)
            failed[entry.id] = str(error)
    progress.step(len(entries), len(entries), "inference", "done")
    return BatchResult(model=network, done=len(entries) - len(failed), failed=failed)


def _round(dataset: Dataset, job: int, request: RoundRequest, progress: Progress) -> RoundResult:
    """Train both networks, publish them together, then segment and assess the pool.

    Finished steps are not done twice.
    """
    with dataset.store.write() as transaction:
        number, done = jobs.begin_round(transaction, job, len(dataset.cases()))

    def train_one(network: NetworkName) -> JsonObject:
        return result_to_json(_train(dataset, request.training(network), progress, kind="round", stage=True))

    def score_pool() -> JsonObject:
        return result_to_json(_score(dataset, ScoringRequest(method="segqc"), progress))

    steps: list[tuple[str, Callable[[], JsonObject]]] = [
        ("train segmentation", lambda: train_one("segmentation")),
        ("train segqc", lambda: train_one("segqc")),
        ("publish", lambda: {"bundle": publish_staged(dataset)}),
        ("score", score_pool),
    ]
    for name, step in steps:
        if name not in done:
            progress.step(0, 1, "round", name)
            done[name] = step()
            with dataset.store.write() as transaction:
                jobs.finish_step(transaction, number, name, done[name])
    pair = publish(dataset)
    with dataset.store.write() as transaction:
        jobs.finish_round(transaction, number, pair)
    return RoundResult(round=number, steps=done)


def follow_up(transaction: Transaction, job: JobRecord) -> None:
    """What a finished job calls for: after the last waiting training, the pool is scored by the new networks."""
    if job.kind == "train" and not jobs.open_jobs(transaction, "train"):
        enqueue_scoring(transaction)


def enqueue_scoring(transaction: Transaction) -> None:
    """Put a scoring of the pool, unless one waits already; what has a current score is left as it is."""
    if not any(job.state == "queued" for job in jobs.open_jobs(transaction, "scoring")):
        enqueue(transaction, ScoringRequest(method="segqc"), SERVER)
