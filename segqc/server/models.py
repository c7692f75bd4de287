"""What the server knows of one studies folder: its settings, its label names and its two models, loaded once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from segqc.assessor import AssessmentSettings, Assessor
from segqc.loop.studies import Studies, StudiesError
from segqc.networks import ModelError, TrainedNetwork, model_status
from segqc.segmenter import Segmenter
from segqc.server.errors import RequestError
from segqc.settings import Network, Settings
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


class ModelShelf(Generic[M]):
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


class Desk:
    """A studies folder with its settings and models."""

    def __init__(self, folder: Path) -> None:
        self.studies = Studies(folder, watched=True, patience_seconds=_PATIENCE_SECONDS)
        self.settings: Settings = self.studies.settings
        judging = AssessmentSettings(extraction=self.settings.extraction, boxes=self.settings.boxes)
        self.segmenters: ModelShelf[Segmenter] = ModelShelf(self.studies.model_path("segmentation"), Segmenter.load)
        self.assessors: ModelShelf[Assessor] = ModelShelf(
            self.studies.model_path("segqc"), lambda path: Assessor.load(path, judging)
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

    def has(self, network: Network) -> bool:
        """Whether a usable model file is there."""
        shelf = self.segmenters if network == "segmentation" else self.assessors
        try:
            return shelf.get() is not None
        except ModelError:
            return False

    def structures(self) -> tuple[Structure, ...]:
        """The structures: those of the settings, else those of the model, else those that the final labels show."""
        if configured := self.settings.structure_list():
            return configured
        if self.has("segmentation"):
            return self.segmenter().structures
        finals = frozenset(case.labels for case in self.studies.cases())
        if self._found is None or self._found[0] != finals:
            self._found = (finals, _structures_of_labels(self.studies))
        return self._found[1]

    def labels(self) -> dict[str, int]:
        """Names and values of the label maps."""
        return label_names(self.structures())


def _required(shelf: ModelShelf[M], name: Network) -> M:
    try:
        model = shelf.get()
    except ModelError as error:
        raise RequestError(409, f"{error}.") from error
    if model is None:
        raise RequestError(
            409,
            f"the network {name!r} is not trained yet: label some scans and start its training "
            f"(POST /train/{name}, or 'segqc train {name}'), or wait if it is training now (GET /train/).",
        )
    return model


def _structures_of_labels(studies: Studies) -> tuple[Structure, ...]:
    try:
        return Studies(studies.folder, studies.settings).structures  # a new one: it keeps what it once found
    except (StudiesError, VolumeError):
        return ()
