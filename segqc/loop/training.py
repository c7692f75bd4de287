"""Train one of the two networks on a dataset folder and publish it there."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from segqc.loop.dataset import Dataset, DatasetError
from segqc.loop.locks import Holder, LockHeld, hold
from segqc.networks.assessor import Assessor
from segqc.networks.card import ModelCard, NetworkName
from segqc.networks.model import ModelError, model_status
from segqc.networks.segmenter import Segmenter
from segqc.plots import draw_curve
from segqc.store import labels
from segqc.training import Progress, TrainingSettings
from segqc.training.assessor import train_assessor
from segqc.training.cases import CaseError, TooFewCases
from segqc.training.segmentation import train_segmentation

logger = logging.getLogger(__name__)

_POLL_SECONDS: Final = 1.0


class TrainingBusy(DatasetError):  # noqa: N818 - the finding, not the exception, is what callers name
    """Another process trains the same network of the same folder."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of a training.

    Attributes:
        card: of the network.
        used: how many scans it was made of, those that validated included.
        left_out: why others were not, a sentence each, by the scan's name.
    """

    card: ModelCard
    used: int
    left_out: Mapping[str, str]


def train(
    dataset: Dataset,
    network: NetworkName,
    progress: Progress,
    settings: TrainingSettings | None = None,
    *,
    purpose: str = "a training",
    wait: bool = False,
    stage: bool = False,
) -> Trained:
    """Train a network on all final labels of a dataset folder, draw its learning curve, publish the model.

    A scan that can't be used, or whose label can't, is left out, and named in what is returned.

    The file of the model is replaced in one step when the training is done; until then the old model serves. One
    process at a time trains a network of a folder: its checkpoints are one training's.

    Args:
        dataset: the folder.
        network: "segmentation" or "segqc".
        progress: told after each step.
        settings: how to train; by default what the folder's settings say.
        purpose: what this process is, for others that want to train the same network.
        wait: whether to wait for another process that trains this network.
        stage: whether to keep the model aside until `publish_staged`.

    Raises:
        TrainingBusy: if another process trains this network, unless told to wait.
        TooFewCases: if too few scans are labelled.
        DatasetError: if nothing says what the structures are.
        ModelError: if something else than a model file lies where the model belongs.
    """
    settings = settings or dataset.settings.training_settings(network)
    folder = dataset.training_folder(network)
    path = dataset.staged_path(network) if stage else dataset.model_path(network)
    model_status(path)  # what no model file can take the place of shows before the training
    with _alone(dataset, network, progress, purpose, wait=wait):
        model, used, left_out = _learn(dataset, network, progress, settings, folder)
        if (folder / "curve.json").is_file():
            draw_curve(folder / "curve.json", folder / "curve.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(path)
    if not stage:
        publish(dataset)
    return Trained(model.card, used, left_out)


def _learn(
    dataset: Dataset, network: NetworkName, progress: Progress, settings: TrainingSettings, folder: Path
) -> tuple[Segmenter | Assessor, int, dict[str, str]]:
    """Train on the cases that can be used; returns how many, too, and why others cannot."""
    learn = train_segmentation if network == "segmentation" else train_assessor
    patient_splits, structures, cases = dict(dataset.patient_splits()), dataset.structures, dataset.cases()
    left_out: dict[str, str] = {}
    while True:
        try:
            model: Segmenter | Assessor = learn(cases, structures, patient_splits, settings, folder, progress)
            return model, len(cases), left_out
        except CaseError as error:
            logger.warning("left out of the training: %s", error)
            left_out[error.case] = str(error)
            cases = [case for case in cases if case.id != error.case]
        except TooFewCases as error:
            if not left_out:
                raise
            raise TooFewCases(f"{error.clause}; left out: {'; '.join(left_out.values())}") from error


@contextlib.contextmanager
def _alone(dataset: Dataset, network: NetworkName, progress: Progress, purpose: str, *, wait: bool) -> Iterator[None]:
    path = dataset.training_folder(network) / "training.lock"
    reported: Holder | None = None
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold(path, purpose))
                break
            except LockHeld as held:
                actor = held.holder or "another process"
                if not wait:
                    raise TrainingBusy(
                        f"{dataset.folder}: the network {network} is being trained by {actor}; wait for its end, or "
                        "end it (what it learned is kept, and continued by the next training with the same settings)"
                    ) from held
                if reported is None or reported != held.holder:
                    reported = held.holder
                    progress.step(0, 1, f"waits for the training of {network} by {actor}")
            time.sleep(_POLL_SECONDS)
        yield


def publish(dataset: Dataset) -> int:
    """Note which pair of networks is in use from now on; returns its number.

    A model file that can't be read is none, with a warning: the training of the other network is not in vain.
    """
    segmenter, assessor = _version(dataset.segmenter), _version(dataset.assessor)
    with dataset.store.write() as transaction:
        pair = labels.bundle(transaction, segmenter or "", assessor)
    return pair.id


def _version(load: Callable[[], Segmenter | Assessor | None]) -> str | None:
    try:
        model = load()
    except ModelError as error:
        logger.warning("%s", error)
        return None
    return model.version if model is not None else None


def publish_staged(dataset: Dataset) -> int:
    """Put the models that were kept aside in the place of the current ones, and note the pair; returns its number.

    Interrupted, it can be called again.
    """
    kinds: tuple[NetworkName, ...] = ("segmentation", "segqc")
    for network in kinds:
        with contextlib.suppress(FileNotFoundError):
            os.replace(dataset.staged_path(network), dataset.model_path(network))
    return publish(dataset)
