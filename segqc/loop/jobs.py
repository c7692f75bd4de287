"""What each kind of job does; a worker runs it in a process of its own."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, Literal, TypeAlias

from segqc.loop.dataset import Dataset, DatasetError, expecting
from segqc.loop.scoring import keep_mask, mask_to_assess, score
from segqc.loop.training import publish, publish_staged, train
from segqc.networks.device import DeviceMemoryError
from segqc.networks.model import ModelError
from segqc.selection import StrategyError
from segqc.settings import NetworkName, SettingsError, build
from segqc.store import jobs
from segqc.store.database import StoreError, Transaction
from segqc.store.events import SERVER
from segqc.store.labels import ORIGINAL, NewLabel
from segqc.store.records import Actor, JobRecord, JsonObject
from segqc.store.scans import ScanReplaced, UnknownScan
from segqc.training import Progress, TooFewCases, TrainingSettings
from segqc.volumes import VolumeError, read_labels, temporary_labels

logger = logging.getLogger(__name__)

JobKind: TypeAlias = Literal["train", "scoring", "batch_infer", "round"]
KINDS: Final[tuple[JobKind, ...]] = ("train", "scoring", "batch_infer", "round")
NETWORKS: Final[tuple[NetworkName, ...]] = ("segmentation", "segqc")
LIKELY_ERRORS_TAG: Final = "likely-errors"

# What a user can mend: said in its own sentence, without the way it took through the code.
KNOWN_PROBLEMS = (
    DeviceMemoryError, ModelError, SettingsError, StoreError, DatasetError, StrategyError, TooFewCases, VolumeError,
    OSError,
)  # fmt: skip


def run(dataset: Dataset, job: JobRecord, progress: Progress) -> JsonObject:
    """Do a job and return its result.

    Raises:
        DatasetError: if its request asks for something that is not there.
    """
    work: Mapping[str, Callable[[Dataset, JobRecord, Progress], JsonObject]] = {
        "train": _train,
        "scoring": _score,
        "batch_infer": _batch_infer,
        "round": _round,
    }
    return work[job.kind](dataset, job, progress)


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


def title(kind: str, request: JsonObject) -> str:
    """What a job is, in words: "the training of segqc"."""
    match kind:
        case "train":
            return f"the training of {request.get('model')}"
        case "scoring":
            return f"the scoring by {request.get('method')}"
        case "batch_infer":
            return f"the inference of {request.get('model')} on many scans"
        case _:
            return f"the {kind}"


def _train(dataset: Dataset, job: JobRecord, progress: Progress, *, stage: bool = False) -> JsonObject:
    request = dict(job.request)
    network = _network(request.pop("model", None))
    settings = chosen_settings(dataset, network, request)
    card = train(dataset, network, progress, settings, purpose=f"a worker's {job.kind} job", wait=True, stage=stage)
    return {"network": network, "scores": dict(card.scores)}


def _network(name: object) -> NetworkName:
    for network in NETWORKS:
        if name == network:
            return network
    raise DatasetError(f"there is no network {name!r}; there are {' and '.join(NETWORKS)}")


def _score(dataset: Dataset, job: JobRecord, progress: Progress) -> JsonObject:
    method = str(job.request.get("method"))
    summary = score(dataset, method, progress, force=bool(job.request.get("force", False)))
    return {"method": method, **dataclasses.asdict(summary)}


def _batch_infer(dataset: Dataset, job: JobRecord, progress: Progress) -> JsonObject:
    """Make masks, or label maps of likely errors, of all, all labelled or all unlabelled scans."""
    request = job.request
    network, tag, wanted = (
        _network(request.get("model")),
        str(request.get("label_tag") or ORIGINAL),
        request.get("images"),
    )
    segmenter, assessor = dataset.segmenter(), dataset.assessor()
    if segmenter is None or (network == "segqc" and assessor is None):
        raise ModelError(f"the network {network!r} is not trained yet")
    entries = [e for e in dataset.scans() if wanted == "all" or (e.final is None) == (wanted == "unlabeled")]
    most = request.get("max_batch_size")
    entries = entries[: int(most)] if isinstance(most, int) and most > 0 else entries
    pair, failed = publish(dataset), dict[str, str]()
    for i, entry in enumerate(entries):
        progress.step(i, len(entries), f"inference: {entry.id}")
        try:
            scan = dataset.read_scan(entry)
            if network == "segmentation" or assessor is None:
                keep_mask(dataset, entry.id, segmenter.predict(scan).labels, segmenter, tag, content=entry.sha256)
                continue
            mask = mask_to_assess(dataset, entry, segmenter)
            if mask is None:
                made = segmenter.predict(scan).labels
                mask = keep_mask(dataset, entry.id, made, segmenter, content=entry.sha256)
            labels = read_labels(dataset.store.label_file(mask), scan=scan, values=assessor.values)
            result = assessor.assess(scan, labels, scan_id=entry.id)
            errors = assessor.likely_errors(result, scan)
            source = Actor("network", assessor.version, "program")
            label = NewLabel(entry.id, LIKELY_ERRORS_TAG, "network", source, parent=mask.id, bundle=pair)
            with temporary_labels(errors) as path:
                dataset.store.save_label(label, path, first=expecting(entry.id, entry.sha256))
        except (VolumeError, ScanReplaced, UnknownScan, OSError) as error:
            # one bad file must not keep all other scans from their masks
            logger.warning("%s is left out: %s", entry.id, error)
            failed[entry.id] = str(error)
    progress.step(len(entries), len(entries), "inference: done")
    return {"model": network, "done": len(entries) - len(failed), "failed": dict(failed)}


def _round(dataset: Dataset, job: JobRecord, progress: Progress) -> JsonObject:
    """Train both networks, publish them together, then segment and assess the pool.

    Finished steps are not done twice.
    """
    with dataset.store.write() as transaction:
        number, done = jobs.begin_round(transaction, job.id, len(dataset.cases()))

    def train_one(network: NetworkName) -> JsonObject:
        return _train(dataset, _part(job, network), progress, stage=True)

    steps: list[tuple[str, Callable[[], JsonObject]]] = [
        ("train segmentation", lambda: train_one("segmentation")),
        ("train segqc", lambda: train_one("segqc")),
        ("publish", lambda: {"bundle": publish_staged(dataset)}),
        ("score", lambda: _score(dataset, replace(job, request={"method": "segqc"}), progress)),
    ]
    for name, step in steps:
        if name not in done:
            progress.step(0, 1, f"round: {name}")
            done[name] = step()
            with dataset.store.write() as transaction:
                jobs.finish_step(transaction, number, name, done[name])
    pair = publish(dataset)
    with dataset.store.write() as transaction:
        jobs.finish_round(transaction, number, pair)
    return {"round": number, **done}


def _part(job: JobRecord, network: NetworkName) -> JobRecord:
    own = job.request.get(network, {})
    return replace(job, request={"model": network, **(own if isinstance(own, dict) else {})})


def follow_up(transaction: Transaction, job: JobRecord) -> None:
    """What a finished job calls for: after the last waiting training, the pool is scored by the new networks."""
    if job.kind == "train" and not jobs.open_jobs(transaction, "train"):
        enqueue_scoring(transaction)


def enqueue_scoring(transaction: Transaction) -> None:
    """Put a scoring of the pool, unless one waits already; what has a current score is left as it is."""
    if not any(job.state == "queued" for job in jobs.open_jobs(transaction, "scoring")):
        jobs.enqueue(transaction, "scoring", {"method": "segqc"}, SERVER)
