"""What each kind of job does; a worker runs it in a process of its own."""

from __future__ import annotations

import dataclasses
import logging
from typing import assert_never

from segqc.loop.audit import audit
from segqc.loop.dataset import Dataset
from segqc.loop.requests import (
    AuditRequest,
    BatchRequest,
    BatchResult,
    JobResult,
    RoundRequest,
    ScoringRequest,
    ScoringResult,
    TrainRequest,
    TrainResult,
    request_of,
)
from segqc.loop.round import run_round
from segqc.loop.scoring import assess, current_mask, keep_mask, origin_of, score
from segqc.loop.training import chosen_settings as chosen_settings
from segqc.loop.training import train, training_result
from segqc.networks.model_file import ModelError
from segqc.store import jobs
from segqc.store.labels import LIKELY_ERRORS_TAG, NewLabel
from segqc.store.records import Actor, JobRecord
from segqc.store.scans import ScanReplaced, UnknownScan
from segqc.training import Progress
from segqc.volumes import VolumeError, temporary_labels

logger = logging.getLogger(__name__)


def run(dataset: Dataset, job: JobRecord, progress: Progress) -> JobResult:
    """Do a job and return its result.

    Raises:
        DatasetError: if its request cannot be read.
    """
    request = request_of(job)
    match request:
        case TrainRequest():
            return _train(dataset, job, request, progress)
        case ScoringRequest():
            return _score(dataset, request, progress)
        case BatchRequest():
            return _batch_infer(dataset, request, progress)
        case RoundRequest():
            return run_round(dataset, job, request, progress)
        case AuditRequest():
            return audit(dataset, progress, force=request.force)
        case _:
            assert_never(request)


def _train(dataset: Dataset, job: JobRecord, request: TrainRequest, progress: Progress) -> TrainResult:
    settings = chosen_settings(dataset, request.model, request.settings)
    purpose = "a worker's train job"
    with dataset.store.read() as transaction:
        begun = jobs.begun(transaction, job.id)
    trained = train(
        dataset, request.model, progress, settings,
        actor=job.actor, purpose=purpose, wait=True, serve=request.serve, begun=begun,
    )  # fmt: skip
    return training_result(request.model, trained)


def _score(dataset: Dataset, request: ScoringRequest, progress: Progress) -> ScoringResult:
    summary = score(dataset, request.method, progress, force=request.force)
    return ScoringResult(method=request.method, **dataclasses.asdict(summary))


def _batch_infer(dataset: Dataset, request: BatchRequest, progress: Progress) -> BatchResult:
    """Make masks, or label maps of likely errors, of all, all labelled or all unlabelled scans."""
    network, wanted = request.model, request.images
    bundle = dataset.bundle()
    if bundle is None or not (bundle.holds("segmentation") and bundle.holds(network)):
        raise ModelError(f"the network {network!r} is not trained yet")
    segmenter, assessor = bundle.segmenter(), bundle.assessor() if network == "segqc" else None
    entries = [e for e in dataset.scans() if wanted == "all" or (e.final is None) == (wanted == "unlabeled")]
    entries = entries[: request.max_batch_size or None]
    failed: dict[str, str] = {}
    for i, entry in enumerate(entries):
        progress.step(i, len(entries), "inference", entry.id)
        try:
            scan = dataset.read_scan(entry)
            if assessor is None:
                made = segmenter.predict(scan).labels
                keep_mask(dataset, entry.id, made, bundle, request.label_tag, content=entry.sha256)
                continue
            mask, labels, prediction = current_mask(dataset, entry, scan, bundle)
            result = assess(bundle, scan, labels, prediction, scan_id=entry.id, origin=origin_of(dataset, mask, scan))
            errors = assessor.likely_errors(result, scan)
            source = Actor(kind="network", name=assessor.version, identified_by="program")
            label = NewLabel(
                entry.id, LIKELY_ERRORS_TAG, "network", source,
                parent=mask.id, bundle=bundle.number, scan_sha256=entry.sha256,
            )  # fmt: skip
            with temporary_labels(errors) as path:
                dataset.store.save_label(label, path)
        except (VolumeError, ScanReplaced, UnknownScan, OSError) as error:
            # one bad file must not keep all other scans from their masks
            logger.warning("%s is left out: %s", entry.id, error)
            failed[entry.id] = str(error)
    progress.step(len(entries), len(entries), "inference", "done")
    return BatchResult(model=network, done=len(entries) - len(failed), failed=failed)
