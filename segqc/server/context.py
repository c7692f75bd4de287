"""What the server knows of one dataset folder: its settings, its label names and its two models, loaded once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from segqc.loop.dataset import Dataset, DatasetError
from segqc.networks.assessor import AssessmentSettings, Assessor
from segqc.networks.model import ModelError, TrainedNetwork, model_status
from segqc.networks.segmenter import Segmenter
from segqc.server.errors import RequestError
from segqc.settings import NetworkName, Settings
from segqc.types import Structure, label_names
from segqc.volumes import VolumeError

M = TypeVar("M", bound=TrainedNetwork)

# MONAI Label's extension of 3D Slicer empties segments with "scribbles" in their name before it exports the others
LIKELY_ERROR = "likely error (scribbles)"
LIKELY_ERROR_VALUE = 1
_PATIENCE_SECONDS = 4.0  # annotators are told that the database is locked rather than left waiting


@dataclass(frozen=True, slots=True)
class _Loaded(Generic[M]):
    signature: tuple[int, int, int]
    model: M


class ModelCache(Generic[M]):
    """One model file, loaded when first wanted and again when another file takes its place."""

    def __init__(self, path: Path, load: Callable[[Path], M]) -> None:
        self.path = path
        self.load = load
        self._lock = threading.Lock()
        self._loaded: _Loaded[M] | None = None

    def get(self) -> M | None:
        """The current model, or None where none is trained yet.

        Raises:
            ModelError: if what lies there is foreign, damaged, or cannot be read.
        """
        with self._lock:
            status = model_status(self.path)
            if status is None:
                self._loaded = None
                return None
            # model files appear by rename only: another content is another inode
            signature = (status.st_ino, status.st_mtime_ns, status.st_size)
            if self._loaded is None or self._loaded.signature != signature:
                self._loaded = _Loaded(signature, self.load(self.path))
            return self._loaded.model


class AppContext:
    """A dataset folder with its settings and models."""

    def __init__(self, folder: Path) -> None:
        self.dataset = Dataset(folder, watched=True, patience_seconds=_PATIENCE_SECONDS)
        self.settings: Settings = self.dataset.settings
        judging = AssessmentSettings(extraction=self.settings.extraction, boxes=self.settings.boxes)
        self.segmenters: ModelCache[Segmenter] = ModelCache(self.dataset.model_path("segmentation"), Segmenter.load)
        self.assessors: ModelCache[Assessor] = ModelCache(
            self.dataset.model_path("segqc"), lambda path: Assessor.load(path, judging)
        )
        self._found: tuple[frozenset[Path], tuple[Structure, ...]] | None = None

    def segmenter(self) -> Segmenter:
        """The current segmentation network.

        Raises:
            RequestError: 409 where there is none.
        """
        return _required(self.segmenters, "segmentation")

    def assessor(self) -> Assessor:
        """The current SegQC-Net.

        Raises:
            RequestError: 409 where there is none.
        """
        return _required(self.assessors, "segqc")

    def model(self, network: NetworkName) -> Segmenter | Assessor | None:
        """A current network, or None where none is trained yet.

        Raises:
            ModelError: if what lies there is foreign, damaged, or cannot be read.
        """
        return self.segmenters.get() if network == "segmentation" else self.assessors.get()

    def has(self, network: NetworkName) -> bool:
        """Whether a usable model file is there."""
        try:
            return self.model(network) is not None
        except ModelError:
            return False

    def structures(self) -> tuple[Structure, ...]:
        """The structures: those of the settings, else those of the model, else those that the final labels show."""
        if configured := self.settings.structure_list():
            return configured
        if self.has("segmentation"):
            return self.segmenter().structures
        finals = frozenset(case.labels for case in self.dataset.cases())
        if self._found is None or self._found[0] != finals:
            self._found = (finals, _structures_of_labels(self.dataset))
        return self._found[1]

    def labels(self) -> dict[str, int]:
        """Names and values of the label maps."""
        return label_names(self.structures())


def _required(cache: ModelCache[M], name: NetworkName) -> M:
    try:
        model = cache.get()
    except ModelError as error:
        raise RequestError(409, str(error)) from error
    if model is None:
        raise RequestError(
            409,
            f"the network {name!r} is not trained yet: label some scans and start its training "
            f"(POST /train/{name}, or 'segqc train {name}'), or wait if it is training now (GET /train/).",
        )
    return model


def _structures_of_labels(dataset: Dataset) -> tuple[Structure, ...]:
    try:
        return Dataset(dataset.folder, dataset.settings).structures  # a new one: it keeps what it once found
    except (DatasetError, VolumeError):
        return ()
