"""MONAI Label's training tasks: what a request may set, and what clients see of the current model."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Final

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask

from segqc.loop.jobs import chosen_settings
from segqc.loop.requests import TrainRequest, request_of
from segqc.loop.training import train
from segqc.networks.model import ModelError
from segqc.plots import read_curve
from segqc.server.context import AppContext
from segqc.server.errors import RequestError
from segqc.settings import NetworkName, SettingsError
from segqc.store import jobs
from segqc.training import LineProgress, TrainingSettings

# What a client may choose, by the library's own names; the rest is in the dataset folder's segqc.toml.
CHOICES: Final = ("epochs", "steps_per_epoch", "learning_rate", "batch", "seed", "size")
ALIASES: Final = {"max_epochs": "epochs", "train_batch_size": "batch"}
# What MONAI Label's clients send with a training of any server. Devices, data loading and who validates are decided by
# this server's settings; `client_id` says who asks.
FOREIGN_PARAMS: Final = frozenset({
    "name", "pretrained", "device", "early_stop_patience", "val_split", "val_batch_size", "multi_gpu", "gpus",
    "dataset", "dataloader", "tracking", "tracking_uri", "tracking_experiment_name", "run_id",
    "dataset_limit", "dataset_randomize", "amp", "n_saved", "train_random_seed", "val_interval", "client_id",
})  # fmt: skip
IGNORED_REASON: Final = "MONAI Label's parameters that this server has no use for; see [training] in its settings"
_DESCRIPTIONS: Final[Mapping[NetworkName, str]] = {
    "segmentation": "Trains the segmentation network on all final labels",
    "segqc": "Trains SegQC-Net on cross-fitted masks of all scans with a final label",
}


def refuse_unknown(params: Collection[str], understood: Collection[str]) -> None:
    """Refuse training parameters that nobody understands: a misspelt one must not be dropped silently.

    Raises:
        RequestError: 400 that names them and lists what there is.
    """
    unknown = sorted(set(params) - set(understood) - FOREIGN_PARAMS)
    if unknown:
        named = ", ".join(repr(name[:60]) for name in unknown[:5])
        raise RequestError(400, f"there is no training parameter {named}; there are: {', '.join(sorted(understood))}.")


class NetworkTraining(TrainTask):
    """A training on all final labels of the dataset folder."""

    def __init__(self, context: AppContext, network: NetworkName) -> None:
        super().__init__(_DESCRIPTIONS[network])
        self.context = context
        self.network = network
        self.choices = (*CHOICES, "fold_epochs", "people_epochs") if network == "segqc" else CHOICES

    @property
    def params(self) -> frozenset[str]:
        """What a request may set."""
        return frozenset((*self.choices, *ALIASES))

    def config(self) -> dict[str, Any]:
        """What a client may choose, with the values of now."""
        settings = self.context.settings.training_settings(self.network)
        return {name: getattr(settings, name) for name in self.choices}

    def settings(self, choices: Mapping[str, Any]) -> TrainingSettings:
        """The folder's settings, with choices by the library's own names over them.

        Raises:
            RequestError: 400 if a choice cannot be used.
        """
        try:
            return chosen_settings(self.context.dataset, self.network, choices)
        except SettingsError as error:
            raise RequestError(400, str(error)) from error

    def job(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """What a worker is asked for, by the library's own names, and which parameters are ignored.

        Raises:
            RequestError: 400 for a parameter that is unknown or given twice.
        """
        refuse_unknown(request, self.params)
        for alias, name in ALIASES.items():
            if {alias, name} <= request.keys():
                raise RequestError(400, f"{alias} and {name} are the same: send one of them.")
        chosen = {ALIASES.get(key, key): value for key, value in request.items() if key in self.params}
        return chosen, sorted(request.keys() - self.params - {"client_id"})

    def check(self, choices: Mapping[str, Any], labelled: int) -> None:
        """Refuse a training that cannot work, before it is queued.

        Raises:
            RequestError: 400 for a choice that cannot be used, 409 with too few labelled scans.
        """
        needed = self.settings(choices).min_cases
        if labelled < needed:
            raise RequestError(
                409, f"training needs final labels of at least {needed} scans, there are {labelled}: submit more first."
            )

    def stats(self) -> dict[str, Any]:
        """What is known of the current model; clients show ``best_metric`` as its accuracy, 0 to 1."""
        progress = self._progress()
        try:
            model = self.context.model(self.network)
        except ModelError as error:
            return {**progress, "problem": str(error)}
        if model is None:
            return progress
        stats: dict[str, Any] = {
            "version": model.version,
            "scores": model.card.scores,
            "patients": len(model.card.seen),
        }
        if model.card.accuracy is not None:
            stats["best_metric"] = model.card.accuracy
        return {**stats, **progress}

    def _progress(self) -> dict[str, Any]:
        """How far the last training came; 3D Slicer's bar shows ``epoch`` of ``total_epochs``."""
        wanted = self._wanted_epochs()
        curve = self.context.dataset.training_folder(self.network) / "curve.json"
        try:
            points = read_curve(curve)
        except FileNotFoundError:
            return {"epoch": 0, "total_epochs": wanted}
        except (OSError, ValueError):
            problem = f"{curve}: not a readable learning curve; the next training writes it anew"
            return {"epoch": 0, "total_epochs": wanted, "problem": problem}
        epoch = len(points)
        curve_points = [dataclasses.asdict(point) for point in points]
        return {"epoch": epoch, "total_epochs": max(epoch, wanted), "curve": curve_points}

    def _wanted_epochs(self) -> int:
        """The epochs of the last training that was asked for; by default those of the settings."""
        default: int = self.context.settings.training_settings(self.network).epochs
        with self.context.dataset.store.read() as transaction:
            asked = [request_of(job) for job in jobs.listing(transaction, "train")]
        own = [r.settings for r in asked if isinstance(r, TrainRequest) and r.model == self.network]
        epochs = own[-1].get("epochs") if own else None
        return epochs if isinstance(epochs, int) else default

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train and publish at once; the server's routes leave it to a worker."""
        choices, _ = self.job({key: value for key, value in request.items() if key != "model"})
        trained = train(self.context.dataset, self.network, LineProgress(), self.settings(choices))
        return {"network": self.network, "scores": trained.card.scores}
