"""The running MONAI Label app, typed: the only place that touches its private attributes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from monailabel.interfaces.utils.app import app_instance

from segqc.server.context import AppContext
from segqc.server.monailabel.datastore import StoreDatastore
from segqc.server.monailabel.train import NetworkTraining
from segqc.server.parameters import SampleParams
from segqc.server.uploads import Uploads
from segqc.store.records import JsonObject


class Session(Protocol):
    """A scan that a client uploaded for a while."""

    image: str

    def to_json(self) -> JsonObject:
        """What clients see of it."""
        ...


class Sessions(Protocol):
    """The open sessions."""

    def get_session(self, session_id: str, update_ts: bool = True) -> Session | None:
        """A session; None where there is none, or no longer."""
        ...

    def add_session(self, data_file: str, expiry: int = 0) -> tuple[str, Session]:
        """Move a file, or a folder of files, into a new session; its id, and what is known of it."""
        ...

    def remove_session(self, session_id: str) -> None:
        """End a session and remove its scan."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """What an inference task made: a temporary file, and what is sent with it."""

    file: Path
    params: JsonObject


class App:
    """The app instance that MONAI Label's settings describe."""

    def __init__(self, instance: Any) -> None:
        self._instance = instance  # MONAI Label has no types

    def start(self) -> None:
        """Tell the app that a server runs it."""
        self._instance.server_mode(True)
        self._instance.on_init_complete()

    @property
    def context(self) -> AppContext:
        """The dataset folder with its settings and models."""
        context: AppContext = self._instance.context
        return context

    @property
    def uploads(self) -> Uploads:
        """The last upload of each client."""
        uploads: Uploads = self._instance.uploads
        return uploads

    @property
    def datastore(self) -> StoreDatastore:
        """The dataset folder as MONAI Label's clients see it."""
        datastore: StoreDatastore = self._instance.datastore()
        return datastore

    @property
    def sessions(self) -> Sessions:
        """The open sessions."""
        sessions: Sessions = self._instance.sessions()
        return sessions

    @property
    def models(self) -> Collection[str]:
        """Names of the inference tasks."""
        return list(self._instance._infers)

    @property
    def trainers(self) -> Mapping[str, NetworkTraining]:
        """The trainings, by network."""
        trainers: Mapping[str, NetworkTraining] = self._instance._trainers
        return trainers

    @property
    def strategies(self) -> Collection[str]:
        """Names of the strategies."""
        return list(self._instance._strategies)

    @property
    def scoring_methods(self) -> Collection[str]:
        """Names of the scoring methods."""
        return list(self._instance._scoring_methods)

    def info(self) -> JsonObject:
        """What clients see of the server."""
        body: JsonObject = self._instance.info()
        return body

    def own_params(self, model: str) -> frozenset[str]:
        """The parameters that an inference task takes beside those of every task: its ``params``, where it has them."""
        names: frozenset[str] = getattr(self._instance._infers[model], "params", frozenset())
        return names

    def infer(self, request: Mapping[str, Any]) -> Inference:
        """Run an inference task, as `DatasetApp.infer` describes."""
        made = self._instance.infer(request)
        return Inference(file=Path(made["file"]), params=made["params"])

    def next_sample(self, strategy: str, params: SampleParams) -> dict[str, Any]:
        """The scan that a strategy hands out, by its id; empty where none is left."""
        answer: dict[str, Any] | None = self._instance._strategies[strategy](params.model_dump(), self.datastore)
        return answer or {}

    def on_save_label(self, image: str, label: str) -> JsonObject:
        """What MONAI Label's app says of a label that was stored."""
        body: JsonObject | None = self._instance.on_save_label(image, label)
        return body or {}


def current_app() -> App:
    """The app of this process; made when first wanted."""
    return App(app_instance())
