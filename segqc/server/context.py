"""What the server knows of one dataset folder: its settings, its label names, and the bundle that serves."""

from __future__ import annotations

from pathlib import Path

from segqc.loop.dataset import Dataset, DatasetError
from segqc.networks.assessor import Assessor
from segqc.networks.bundle import NetworkBundle
from segqc.networks.model_file import ModelError
from segqc.networks.segmenter import Segmenter
from segqc.server.checks import Checks
from segqc.server.dicomweb.archive import Archive
from segqc.server.dicomweb.cache import BoundedCache
from segqc.server.errors import RequestError
from segqc.settings import NetworkName, Settings
from segqc.types import Structure, label_names
from segqc.volumes import VolumeError

# MONAI Label's extension of 3D Slicer empties segments with "scribbles" in their name before it exports the others
LIKELY_ERROR = "likely error (scribbles)"
LIKELY_ERROR_VALUE = 1
_ERROR_MAPS_BYTES = 64e6
_PATIENCE_SECONDS = 4.0  # annotators are told that the database is locked rather than left waiting


class AppContext:
    """A dataset folder with its settings, models and images."""

    def __init__(self, folder: Path) -> None:
        self.dataset = Dataset(folder, watched=True, patience_seconds=_PATIENCE_SECONDS)
        self.settings: Settings = self.dataset.settings
        self.archive = Archive(self.dataset, self.settings.server.dicomweb_cache_mb * 1e6)
        self.error_maps: BoundedCache[tuple[str, int, int], bytes] = BoundedCache(_ERROR_MAPS_BYTES, len)
        """Error maps as viewers get them, by study, label version and bundle."""
        self.checks = Checks(self.dataset)
        self._found: tuple[frozenset[Path], tuple[Structure, ...]] | None = None

    def bundle(self, network: NetworkName) -> NetworkBundle:
        """The bundle that serves: what one request is answered with comes from one bundle.

        Args:
            network: a network that it must hold.

        Raises:
            RequestError: 409 where the network is not trained yet.
            ModelError: if the bundle's files are missing, or its manifest is damaged.
        """
        bundle = self.dataset.bundle()
        if bundle is None or not bundle.holds(network):
            raise RequestError(
                409,
                f"the network {network!r} is not trained yet: label some scans and start its training "
                f"(POST /train/{network}, or 'segqc train {network}'), or wait if it is training now (GET /train/).",
            )
        return bundle

    def segmenter(self) -> Segmenter:
        """The segmentation network that serves; fails as `bundle` does, and where its files are damaged."""
        return self.bundle("segmentation").segmenter()

    def assessor(self) -> Assessor:
        """The SegQC-Net that serves; fails as `bundle` does, and where its files are damaged."""
        return self.bundle("segqc").assessor()

    def model(self, network: NetworkName) -> Segmenter | Assessor | None:
        """A network that serves; None before its first training.

        Raises:
            ModelError: if its files are missing or damaged.
        """
        return self.dataset.segmenter() if network == "segmentation" else self.dataset.assessor()

    def model_file(self, network: NetworkName) -> Path | None:
        """The model file of a network that serves; None where there is none."""
        try:
            path = self.dataset.model_path(network)
        except ModelError:
            return None
        return path if path is not None and path.is_file() else None

    def has(self, network: NetworkName) -> bool:
        """Whether a network serves and can be used."""
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


def _structures_of_labels(dataset: Dataset) -> tuple[Structure, ...]:
    try:
        return Dataset(dataset.folder, dataset.settings).structures  # a new one: it keeps what it once found
    except (DatasetError, VolumeError):
        return ()
