"""Trainings as runs of MLflow, for whoever compares them there; the store is the truth and needs none of it.

A run is made when its training has ended, whole: an interrupted training leaves none, and one that is returned as it
was done before has its run already. What is kept is how the training was set, its learning curve and its scores; no
scan, no label and no patient's name. A server that is down, or a missing package, costs a warning and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from segqc.loop.requests import TrackedRun
from segqc.settings import TrackingSettings
from segqc.training.spec import TrainingSettings

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

_QUIET: Final[Mapping[str, str]] = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nothing is told to others than the server that the settings name
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a training that has ended does not wait minutes for a server
}
_BATCH_SIZE: Final = 1000  # metrics in one request, MLflow's own limit
_VERSION: Final = "segqc.version"

BUNDLE_TAG: Final = "segqc.bundle"
ROUND_TAG: Final = "segqc.round"
"""Tags of runs: the numbers of the bundle that a network was published as, and of the round that trained it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrackedTraining:
    """What a run holds of a training.

    Attributes:
        network: "segmentation" or "segqc".
        version: of the network that it made.
        settings: how it was trained.
        counts: of what it was made, by name.
        scores: of the network's card.
        curve: the learning curve's file.
        started_at: when it began, in seconds.
        tags: further tags of the run.
    """

    network: str
    version: str
    settings: TrainingSettings
    counts: Mapping[str, int]
    scores: Mapping[str, float]
    curve: Path
    started_at: float
    tags: Mapping[str, str]


def track(settings: TrackingSettings, folder: Path, training: TrackedTraining) -> TrackedRun | None:
    """Make the run of a training that has ended, or find it; None where none is wanted, or MLflow can't be reached.

    Args:
        settings: where runs are kept.
        folder: the dataset folder.
        training: the training.
    """
    if settings.uri is None:
        return None
    try:
        client = _client(settings.uri, folder)
        return _run(client, settings, folder, training)
    except ImportError as error:
        logger.warning("the training is not tracked: no MLflow (%s); pip install 'segqc[tracking]'", error)
    except Exception as error:  # of many kinds: of the network, of databases, of MLflow, without a common base
        _warn(settings.uri, "the training is not tracked", error)
    return None


def note(settings: TrackingSettings, folder: Path, run: TrackedRun | None, tags: Mapping[str, str]) -> None:
    """Set tags of a run that came to be known later, such as the bundle; without a run nothing.

    Args:
        settings: where runs are kept.
        folder: the dataset folder.
        run: the run.
        tags: by name.
    """
    if settings.uri is None or run is None:
        return
    try:
        client = _client(settings.uri, folder)
        for name, value in tags.items():
            client.set_tag(run.id, name, value)
    except Exception as error:  # as in `track`
        _warn(settings.uri, f"the run {run.id} does not get its tags", error)


def _warn(uri: str, what: str, error: Exception) -> None:
    reason = str(error).partition("\n")[0]
    reason = reason.replace(f"{urlsplit(uri).netloc.rpartition('@')[0]}@", "") if "@" in uri else reason
    logger.warning("%s: MLflow at %s cannot be used (%s)", what, _shown(uri), reason)


def _client(uri: str, folder: Path) -> MlflowClient:
    """MLflow's client.

    Raises:
        ImportError: if it is not installed.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    if "://" not in uri:
        kept = _folder(uri, folder)
        kept.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{kept / 'mlflow.db'}"
    return MlflowClient(tracking_uri=uri)


def _folder(uri: str, folder: Path) -> Path:
    """The folder that the setting names, relative to the dataset folder."""
    return (folder / uri).resolve()


def _shown(uri: str) -> str:
    """A server's address without a password in it."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _run(client: MlflowClient, settings: TrackingSettings, folder: Path, training: TrackedTraining) -> TrackedRun:
    experiment = _experiment(client, settings, folder)
    found = client.search_runs([experiment], f"tags.`{_VERSION}` = '{training.version}' and status = 'FINISHED'")
    if found:
        run = found[0].info.run_id
    else:
        run = client.create_run(
            experiment,
            start_time=round(1000 * training.started_at),
            run_name=f"{training.network} {training.version}",
            tags={"segqc.network": training.network, _VERSION: training.version, "segqc.folder": folder.name},
        ).info.run_id
        _log(client, run, training)
        client.set_terminated(run)
    for name, value in training.tags.items():
        client.set_tag(run, name, value)
    uri = settings.uri or ""
    url = f"{_shown(uri).rstrip('/')}/#/experiments/{experiment}/runs/{run}" if uri.startswith("http") else None
    return TrackedRun(id=run, url=url)


def _experiment(client: MlflowClient, settings: TrackingSettings, folder: Path) -> str:
    """The number of the experiment, made where there is none."""
    found = client.get_experiment_by_name(settings.experiment)
    if found is not None:
        return str(found.experiment_id)
    uri = settings.uri or ""
    artifacts = None if "://" in uri else (_folder(uri, folder) / "artifacts").as_uri()
    return str(client.create_experiment(settings.experiment, artifact_location=artifacts))


def _log(client: MlflowClient, run: str, training: TrackedTraining) -> None:
    from mlflow.entities import Metric, Param

    now = round(1000 * time.time())
    params = [Param(name, str(value)) for name, value in dataclasses.asdict(training.settings).items()]
    counts = [Param(name, str(value)) for name, value in training.counts.items()]
    client.log_batch(run, params=[*params, *counts])
    metrics = [Metric(_name(name), value, now, step) for name, value, step in _values(training)]
    for first in range(0, len(metrics), _BATCH_SIZE):
        client.log_batch(run, metrics=metrics[first : first + _BATCH_SIZE])


def _values(training: TrackedTraining) -> Iterator[tuple[str, float, int]]:
    """Each metric with its value and its step: the curve's epochs; scores have the last one."""
    points = json.loads(training.curve.read_text(encoding="utf-8")) if training.curve.is_file() else []
    for point in points:
        for name in ("train_loss", "validation_loss"):
            if point[name] is not None:
                yield name, point[name], point["epoch"]
    for name, value in training.scores.items():
        yield name, value, len(points)


def _name(score: str) -> str:
    """A score's name as MLflow bears it: structures may be called anything."""
    return re.sub(r"[^\w\-. ]", "_", score)
