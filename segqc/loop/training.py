"""Train one of the two networks on a dataset folder, and publish it there."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from segqc.loop.dataset import Dataset, DatasetError
from segqc.loop.locks import Holder, LockHeld, hold
from segqc.loop.other_labels import with_observers, with_other_labels
from segqc.loop.pseudo_labels import pseudo_cases
from segqc.loop.requests import TrackedRun, TrainResult
from segqc.loop.tracking import BUNDLE_TAG, TrackedTraining, note, track
from segqc.networks.assessor import Assessor
from segqc.networks.bundle import FOLDS, model_name
from segqc.networks.card import ModelCard, NetworkName
from segqc.networks.segmenter import Segmenter
from segqc.plots import draw_curve
from segqc.settings import SettingsError, build
from segqc.store import jobs
from segqc.store.events import SERVER
from segqc.store.records import Actor, Begun
from segqc.training import Progress, TrainingSettings
from segqc.training.assessor import train_assessor
from segqc.training.cases import Case, CaseError, TooFewCases
from segqc.training.segmentation import NO_PSEUDO_CASES, train_segmentation, usable_cases

logger = logging.getLogger(__name__)

_POLL_SECONDS: Final = 1.0
_IN_PART: Final = "the scan {scan!r} was checked in part, and its patient validates, which takes a whole label"


class TrainingBusy(DatasetError):  # noqa: N818 - the finding, not the exception, is what callers name
    """Another process trains the same network of the same folder."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of a training.

    Attributes:
        card: of the network.
        used: how many scans it was made of, those that validated included.
        patients: how many patients they are of.
        measured: how many of the patients its scores were measured on: their labels did not train what was measured.
        left_out: why others were not, a sentence each, by the scan's name.
        bundle: the bundle that it was published as; None before that.
        held_because: why this bundle does not serve; None where it does.
        pseudo_labels: how many scans with pseudo-labels trained, too.
        tracked: its run in MLflow; None without one.
    """

    card: ModelCard
    used: int
    patients: int
    measured: int
    left_out: Mapping[str, str]
    bundle: int | None = None
    held_because: str | None = None
    pseudo_labels: int = 0
    tracked: TrackedRun | None = None


def training_result(network: NetworkName, trained: Trained) -> TrainResult:
    """What a job keeps of a training; scans that were left out are logged: a job's last lines are what clients show."""
    if trained.left_out:
        reasons = "; ".join(trained.left_out.values())
        logger.warning("%d scans used, %d left out: %s", trained.used, len(trained.left_out), reasons)
    return TrainResult(
        network=network,
        scores=dict(trained.card.scores),
        used=trained.used,
        left_out=dict(trained.left_out),
        bundle=trained.bundle,
        held_because=trained.held_because,
        pseudo_labels=trained.pseudo_labels,
        validation=trained.card.validation,
        tracked=trained.tracked,
    )


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


def train(
    dataset: Dataset,
    network: NetworkName,
    progress: Progress,
    settings: TrainingSettings | None = None,
    *,
    actor: Actor = SERVER,
    purpose: str = "a training",
    wait: bool = False,
    serve: bool = False,
    begun: Begun | None = None,
    observers: Path | None = None,
) -> Trained:
    """Train a network on all final labels of a dataset folder, draw its learning curve, publish the model.

    The segmentation network trains on the accepted pseudo-labels, too. SegQC-Net and its fold networks never do: what
    they learn, and what they are calibrated on, is people's labels alone. SegQC-Net's network for people's masks learns
    from earlier labels that somebody has corrected, too, and leaves out where readers of a scan differ.

    A scan that can't be used, or whose label can't, is left out, and named in what is returned. The model is published
    with the other network of the bundle that serves then; until that, the bundle before serves, and after it too where
    the new one's estimates are worse.

    Args:
        dataset: the folder.
        network: "segmentation" or "segqc".
        progress: called after each step.
        settings: how to train; by default what the folder's settings say.
        actor: who wants the training.
        purpose: what this process is, for others that want to train the same network.
        wait: whether to wait for another process that trains this network.
        serve: whether the new bundle serves even if its estimates are worse.
        begun: when the work on it began; by default now.
        observers: a folder of another observer's label files, named as the scans, beside the readings of the store.

    Raises:
        TrainingBusy: if another process trains this network, unless told to wait.
        TooFewCases: if too few scans are labelled.
        DatasetError: if nothing says what the structures are, or the observer's labels are of no use.
        VolumeError: if one of the observer's labels can't be used.
    """
    path = dataset.training_folder(network) / model_name(network)
    if begun is None:
        with dataset.store.read() as transaction:
            begun = jobs.begun_now(transaction)
    with _alone(dataset, network, progress, purpose, wait=wait):
        trained = _train_model(dataset, network, progress, settings, path, observers=observers)
        why = f"training of {network}"
        with dataset.bundles.publishing({network: path}, actor, why, even_if_worse=serve, begun=begun) as publication:
            trained = replace(trained, bundle=publication.number, held_because=publication.held_because)
        note(dataset.settings.tracking, dataset.folder, trained.tracked, {BUNDLE_TAG: str(trained.bundle)})
        path.unlink(missing_ok=True)
        path.with_name(FOLDS).unlink(missing_ok=True)
    return trained


def train_unpublished(
    dataset: Dataset,
    network: NetworkName,
    progress: Progress,
    settings: TrainingSettings,
    path: Path,
    *,
    purpose: str = "a training",
    tags: Mapping[str, str] | None = None,
) -> Trained:
    """Train a network as `train` does, waiting for its turn, and keep the model in a file of its own.

    ``tags`` are for its run in MLflow.
    """
    with _alone(dataset, network, progress, purpose, wait=True):
        return _train_model(dataset, network, progress, settings, path, tags)


def _train_model(
    dataset: Dataset,
    network: NetworkName,
    progress: Progress,
    settings: TrainingSettings | None,
    path: Path,
    tags: Mapping[str, str] | None = None,
    observers: Path | None = None,
) -> Trained:
    """Train on the cases that can be used, one process at a time: its checkpoints are one training's."""
    folder, started_at = dataset.training_folder(network), time.time()
    settings = settings or dataset.settings.training_settings(network)
    trained = _learn(dataset, network, progress, settings, folder, observers)
    if (folder / "curve.json").is_file():
        draw_curve(folder / "curve.json", folder / "curve.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    trained.model.save(path)
    if (folds := folder / FOLDS).is_file():
        folds.replace(path.with_name(FOLDS))
    cases, splits = trained.cases, dataset.patient_splits()
    # each network of an ensemble is measured on the fold that it has not seen: together, on all
    is_measured_on_all = network == "segqc" and settings.ensemble
    measured = {
        c.patient for c in cases if c.is_whole and (is_measured_on_all or splits[c.patient].split == "validation")
    }
    patients = len({c.patient for c in cases})
    training = TrackedTraining(
        network=network,
        version=trained.model.version,
        settings=settings,
        counts={"scans": len(cases), "patients": patients, "pseudo_labels": len(trained.pseudo_labels)},
        scores=trained.model.card.scores,
        curve=folder / "curve.json",
        started_at=started_at,
        tags=tags or {},
    )
    return Trained(
        trained.model.card,
        len(cases),
        patients,
        len(measured),
        trained.left_out,
        pseudo_labels=len(trained.pseudo_labels),
        tracked=track(dataset.settings.tracking, dataset.folder, training),
    )


@dataclass(frozen=True, slots=True)
class _Learned:
    """A trained network, the cases and the pseudo-labels that could be used, and why others could not."""

    model: Segmenter | Assessor
    cases: list[Case]
    left_out: dict[str, str]
    pseudo_labels: tuple[Case, ...] = ()


def _learn(
    dataset: Dataset,
    network: NetworkName,
    progress: Progress,
    settings: TrainingSettings,
    folder: Path,
    observers: Path | None,
) -> _Learned:
    """Train on the cases that can be used."""
    structures, labelled = dataset.structures, dataset.cases()
    # after the labels: one that is new in the folder ends the pseudo-label of its scan when it is taken in
    pseudo = pseudo_cases(dataset) if network == "segmentation" else NO_PSEUDO_CASES
    patient_splits = dict(dataset.patient_splits())  # read last: scans may have come into the folder until now
    folds = len({split.fold for split in patient_splits.values()})
    if network == "segqc" and min(settings.folds, len(patient_splits)) != folds:
        logger.warning(
            "the patients are in %d folds, though the settings say folds = %d: a patient keeps the fold that it got "
            "with its first scan, and the setting is for new patients",
            folds,
            settings.folds,
        )
    cases = usable_cases(labelled, patient_splits)
    if network == "segqc" and settings.trains_people:
        cases = with_other_labels(dataset, cases)
    if observers is not None:
        if network != "segqc" or not settings.trains_people:
            raise DatasetError(
                f"{observers}: other observers' labels are for SegQC-Net's network for people's masks, and none is "
                "trained by these settings"
            )
        cases = with_observers(dataset, cases, observers)
    used = {case.id for case in cases}
    left_out = {case.id: _IN_PART.format(scan=case.id) for case in labelled if case.id not in used}
    while True:
        try:
            common = cases, structures, patient_splits, settings, folder, progress
            model = train_segmentation(*common, pseudo) if network == "segmentation" else train_assessor(*common)
            return _Learned(model, cases, left_out, pseudo.cases)
        except CaseError as error:
            logger.warning("left out of the training: %s", error)
            left_out[error.case] = str(error)
            cases = [case for case in cases if case.id != error.case]
            pseudo = replace(pseudo, cases=tuple(case for case in pseudo.cases if case.id != error.case))
        except TooFewCases as error:
            why = [f"left out: {'; '.join(left_out.values())}"] if left_out else []
            if aside := len(dataset.findings()):
                files = "1 file was" if aside == 1 else f"{aside} files were"
                why.append(f"{files} not accepted, 'segqc scans FOLDER' says why")
            raise TooFewCases("; ".join([error.clause, *why])) from error


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
                    progress.message(f"waits for the training of {network} by {actor}")
            time.sleep(_POLL_SECONDS)
        yield
