"""Bundles: a folder with a segmentation network and its SegQC-Net, published together and never changed.

::

    <number>/segmentation.pt     the segmentation network
    <number>/segqc.pt            SegQC-Net with its calibration
    <number>/segqc-folds.pt      the segmentation networks of the folds, whose masks SegQC-Net was trained on
    <number>/segmentation.json   the card of each, to be read without PyTorch
    <number>/segqc.json
    <number>/manifest.json       who made it and why, and the hashes of all other files

A network that was never trained is missing, and so are the networks of the folds beside a SegQC-Net that came without
them. Reading a manifest and verifying files need no PyTorch.
"""

from __future__ import annotations

import datetime as dt
import errno
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal, TypeAlias, get_args

from pydantic import AwareDatetime, ConfigDict, Field, TypeAdapter, ValidationError

from segqc.networks.card import CARDS, ModelCard, NetworkName
from segqc.networks.model_file import ModelError, model_status
from segqc.quality.report_card import ReportCard
from segqc.types import BackendName, Structure
from segqc.volumes import remove, sync

if TYPE_CHECKING:
    from segqc.networks.assessor import AssessmentSettings, Assessor
    from segqc.networks.segmenter import Segmenter

MANIFEST: Final = "manifest.json"
FOLDS: Final = "segqc-folds.pt"
"""The file of the folds' segmentation networks; it lies beside that of the SegQC-Net that they belong to."""
NETWORKS: Final[tuple[NetworkName, ...]] = get_args(NetworkName)
LAST_NUMBER: Final = 999_999_999  # of nine digits, as databases keep it
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,8}")
_MAX_FILE_BYTES: Final = 100_000_000  # of a manifest or a card
_LEFTOVER: Final = ".bundle-"  # begins the names of folders that are being written or removed
_NO_LINKS: Final = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
_A_MANIFEST: Final = "a bundle's manifest"
_REMEDY: Final = "let an intact bundle serve (segqc models serve FOLDER BUNDLE), or train again (segqc train)"


# what a database can keep, and a clock in any time zone can show
_Text: TypeAlias = Annotated[str, Field(pattern=r"^[^\x00]*$")]
_Time: TypeAlias = Annotated[
    AwareDatetime, Field(ge=dt.datetime(1971, 1, 1, tzinfo=dt.UTC), lt=dt.datetime(9999, 1, 1, tzinfo=dt.UTC))
]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkEntry:
    """A network of a bundle: its version, and the hashes of its files; of the folds' networks where it has them."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    version: _Text
    model_sha256: str
    card_sha256: str
    folds_sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a bundle's folder holds, and how it came to be."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    number: Annotated[int, Field(ge=1, le=LAST_NUMBER)]
    made_at: _Time
    made_by: _Text  # the actor's name
    reason: _Text  # such as "training of segqc"
    parent: int | None  # the bundle that served before, of which it may hold a network
    networks: Annotated[dict[NetworkName, NetworkEntry], Field(min_length=1)]
    report: ReportCard | None = None  # of its SegQC-Net; None without one, or where its estimates were never checked
    held_because: _Text | None = None  # why it did not serve by itself when it was published; None where it did

    def __post_init__(self) -> None:
        """Check that the bundle before is an earlier one."""
        if self.parent is not None and not 0 < self.parent < self.number:
            raise ValueError("its parent is no earlier bundle")


_MANIFESTS: Final[TypeAdapter[Manifest]] = TypeAdapter(Manifest)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSource:
    """A network that becomes part of a bundle: its file, its card as JSON, and the file of the folds' networks."""

    model: Path
    card: bytes = field(repr=False)
    entry: NetworkEntry
    folds: Path | None = None

    def read_card(self) -> ModelCard:
        """The card.

        Raises:
            ModelError: if it is of another format.
        """
        try:
            return CARDS.validate_json(self.card)
        except ValidationError as error:
            raise ModelError(f"{self.model}: its card is of another version of SegQC; {_REMEDY}") from error


class NetworkBundle:
    """A bundle as it lies in its folder; each network is verified and loaded when it is first asked for.

    Threads may share it.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        sha256: str,
        settings: Callable[[], AssessmentSettings] | None = None,
        backend: BackendName = "pytorch",
    ) -> None:
        self.folder = folder
        self.sha256 = sha256  # of the manifest's file
        self.manifest = manifest
        self._settings = settings
        self._backend = backend
        self._lock = threading.Lock()
        self._segmenter: Segmenter | None = None
        self._assessor: Assessor | None = None
        self._fold_networks: tuple[Segmenter, ...] | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        settings: Callable[[], AssessmentSettings] | None = None,
        *,
        backend: BackendName = "pytorch",
        sha256: str | None = None,
    ) -> NetworkBundle:
        """Read a bundle's manifest.

        Args:
            folder: its folder, named by its number.
            settings: gives the settings of its SegQC-Net; asked when that is loaded.
            backend: what computes its networks.
            sha256: the manifest's address, where it is known.

        Raises:
            ModelError: if the folder or its manifest is missing, damaged, or another bundle's.
        """
        path = folder / MANIFEST
        if os.path.isfile(folder):
            raise ModelError(f"{folder}: is a file, not a bundle; {_REMEDY}")
        if model_status(path, _A_MANIFEST, _REMEDY) is None and not os.path.isdir(folder):
            raise ModelError(f"{folder}: the files of bundle {folder.name} are gone; {_REMEDY}")
        try:
            content = _content(path, _A_MANIFEST)
            manifest = _MANIFESTS.validate_json(content)
        except ValidationError as error:
            raise ModelError(f"{path}: not {_A_MANIFEST}; {_REMEDY}") from error
        if str(manifest.number) != folder.name or (sha256 is not None and _sha256(content) != sha256):
            raise ModelError(f"{folder}: is not the bundle {folder.name} that was published here; {_REMEDY}")
        return cls(folder, manifest, _sha256(content), settings, backend)

    @property
    def number(self) -> int:
        """The bundle's number."""
        return self.manifest.number

    def holds(self, network: NetworkName) -> bool:
        """Whether the bundle has this network."""
        return network in self.manifest.networks

    def path(self, network: NetworkName) -> Path | None:
        """The model file of a network; None where the bundle has none."""
        return self.folder / model_name(network) if self.holds(network) else None

    def folds_path(self) -> Path | None:
        """The file of the folds' networks; None where the bundle has none."""
        return None if self.folds_version() is None else self.folder / FOLDS

    def folds_version(self) -> str | None:
        """The version of the folds' networks together; None where the bundle has none."""
        entry = self.manifest.networks.get("segqc")
        return None if entry is None or entry.folds_sha256 is None else entry.folds_sha256[:12]

    def size(self) -> int:
        """The size of its model files, in bytes; missing ones count nothing."""
        paths = [*map(self.path, NETWORKS), self.folds_path()]
        return sum(path.stat().st_size for path in paths if path is not None and path.is_file())

    def _entry(self, network: NetworkName) -> NetworkEntry:
        entry = self.manifest.networks.get(network)
        if entry is None:
            raise ModelError(f"{self.folder}: holds no network {network!r}; train it first (segqc train {network})")
        return entry

    def verify(self, network: NetworkName, *, folds: bool = True) -> NetworkSource:
        """Compare the files of a network with the manifest; returns them, to become part of another bundle.

        Args:
            network: the network.
            folds: whether to look at the networks of the folds, too.

        Raises:
            ModelError: if the bundle has no such network, or a file is missing or damaged.
        """
        entry = self._entry(network)
        _verify(self.folder / model_name(network), entry.model_sha256)
        if folds and entry.folds_sha256 is not None:
            _verify(self.folder / FOLDS, entry.folds_sha256)
        return self._source(network, entry)

    def _source(self, network: NetworkName, entry: NetworkEntry) -> NetworkSource:
        """A network whose card alone is verified."""
        card = self.folder / _card_name(network)
        content = _content(card, "a model's card")
        if _sha256(content) != entry.card_sha256:
            raise ModelError(f"{card}: is damaged; {_REMEDY}")
        folds = self.folder / FOLDS if entry.folds_sha256 is not None else None
        return NetworkSource(model=self.folder / model_name(network), card=content, entry=entry, folds=folds)

    def card(self, network: NetworkName) -> ModelCard:
        """The card of a network, which needs no PyTorch; its model file is not looked at.

        Raises:
            ModelError: if the bundle has no such network, or the card is missing, damaged or of another format.
        """
        return self._source(network, self._entry(network)).read_card()

    def people_report(self) -> ReportCard | None:
        """What its estimates of people's masks are worth; None without a network for these, or where nobody knows.

        Raises:
            ModelError: as for `card`.
        """
        people = self.card("segqc").people if self.holds("segqc") else None
        return None if people is None else people.report

    def verify_all(self) -> None:
        """Compare all files with the manifest, and the networks with each other.

        Raises:
            ModelError: if one is missing or damaged, or they know different structures.
        """
        check_pair({network: self.verify(network) for network in self.manifest.networks})

    def segmenter(self) -> Segmenter:
        """The segmentation network.

        Raises:
            ModelError: if the bundle has none, or its files are missing or damaged.
            BackendError: if the backend cannot compute it on this machine.
        """
        from segqc.networks.segmenter import Segmenter

        with self._lock:
            if self._segmenter is None:
                self._segmenter = Segmenter.load(self.verify("segmentation").model, self._backend)
            return self._segmenter

    def assessor(self) -> Assessor:
        """SegQC-Net.

        Raises:
            ModelError: if the bundle has none, or its files are missing or damaged.
            BackendError: if the backend cannot compute it on this machine.
        """
        from segqc.networks.assessor import Assessor

        with self._lock:
            if self._assessor is None:
                settings = self._settings() if self._settings is not None else None
                self._assessor = Assessor.load(self.verify("segqc", folds=False).model, settings, self._backend)
            return self._assessor

    def fold_networks(self) -> tuple[Segmenter, ...]:
        """The segmentation networks of the folds.

        Raises:
            ModelError: if the bundle has none, or their file is missing or damaged.
            BackendError: if the backend cannot compute them on this machine.
        """
        from segqc.networks.segmenter import Segmenter

        entry = self._entry("segqc")
        if entry.folds_sha256 is None:
            raise ModelError(
                f"{self.folder}: holds no networks of the folds, as its SegQC network came without; train it again "
                "(segqc train segqc)"
            )
        with self._lock:
            if self._fold_networks is None:
                _verify(self.folder / FOLDS, entry.folds_sha256)
                self._fold_networks = Segmenter.load_members(self.folder / FOLDS, self._backend)
            return self._fold_networks


def model_name(network: NetworkName) -> str:
    """The name of a network's model file."""
    return f"{network}.pt"


def _card_name(network: NetworkName) -> str:
    return f"{network}.json"


def bundle_folders(models: Path) -> dict[int, Path]:
    """The folders of bundles by number, oldest first.

    Raises:
        ModelError: if nobody can see what lies there.
    """
    return {number: path for number, path in _numbered(models).items() if os.path.isdir(path)}


def last_number(models: Path) -> int:
    """The largest number that is taken, by a bundle's folder or by whatever else lies there; 0 where there is none."""
    return max(_numbered(models), default=0)


def _numbered(models: Path) -> dict[int, Path]:
    try:
        names = os.listdir(models)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _unreadable(models, error) from error
    return dict(sorted((int(name), models / name) for name in names if _NUMBER.fullmatch(name)))


def source_of(path: Path, network: NetworkName) -> NetworkSource:
    """A model file that is to become part of a bundle; it is loaded, so that only what can be loaded is published.

    So is the file of the folds' networks that lies beside a SegQC-Net.

    Raises:
        ModelError: if one is missing, foreign or damaged, or another network's.
        StructuresDiffer: if the folds' networks know other structures.
    """
    from segqc.networks.assessor import Assessor
    from segqc.networks.segmenter import Segmenter

    model = Segmenter.load(path) if network == "segmentation" else Assessor.load(path)
    card = CARDS.dump_json(model.card, indent=1)
    folds = path.with_name(FOLDS) if network == "segqc" and path.with_name(FOLDS).is_file() else None
    entry = NetworkEntry(
        version=model.version,
        model_sha256=_file_sha256(path),
        card_sha256=_sha256(card),
        folds_sha256=None if folds is None else _file_sha256(folds),
    )
    if folds is not None and Segmenter.load_members(folds)[0].structures != model.structures:
        raise StructuresDiffer(f"{folds}: these networks know other structures than {path.name}; train it again")
    return NetworkSource(model=path, card=card, entry=entry, folds=folds)


class StructuresDiffer(ModelError):  # noqa: N818 - the finding, not the exception, is what callers name
    """Two networks that cannot make a bundle, as they know different structures."""


def check_pair(sources: Mapping[NetworkName, NetworkSource]) -> None:
    """Check that the networks of a bundle know the same structures: one assesses the other's masks.

    Raises:
        StructuresDiffer: if they do not.
        ModelError: if a card cannot be read.
    """
    known = {network: frozenset(source.read_card().structures) for network, source in sources.items()}
    if len(set(known.values())) > 1:
        told = " and ".join(f"{network} {_named(structures)}" for network, structures in known.items())
        raise StructuresDiffer(
            f"the networks of a bundle know the same structures, but {told}; train both with the structures of "
            "segqc.toml (segqc round)"
        )


def _named(structures: Iterable[Structure]) -> str:
    """Structures in words: "knows liver [1] and cord [2, 3]"."""
    return f"knows {', '.join(sorted(f'{s.name} {list(s.values)}' for s in structures))}"


def write_bundle(models: Path, manifest: Manifest, sources: Mapping[NetworkName, NetworkSource]) -> str:
    """Put a bundle into its folder, which is there as a whole, on the disk, or not at all.

    Model files are linked where the file system has links, and copied elsewhere.

    Args:
        models: the folder of all bundles.
        manifest: what the bundle holds.
        sources: its networks.

    Returns:
        The address of the manifest.

    Raises:
        OSError: if the disk is full or read-only, or there is a bundle of this number; nothing is left then.
    """
    hidden = models / f"{_LEFTOVER}{manifest.number}"
    content = _MANIFESTS.dump_json(manifest, indent=1)
    remove(hidden)
    hidden.mkdir(parents=True)
    try:
        for network, source in sources.items():
            _link(source.model, hidden / model_name(network))
            if source.folds is not None:
                _link(source.folds, hidden / FOLDS)
            _write(hidden / _card_name(network), source.card)
        _write(hidden / MANIFEST, content)
        sync(hidden)
        hidden.rename(models / str(manifest.number))
    except BaseException:
        remove(hidden)
        raise
    sync(models)
    return _sha256(content)


def set_aside(folder: Path) -> Path:
    """Take a bundle's folder out of the way in one step; returns the hidden folder, to be removed."""
    hidden = folder.with_name(f"{_LEFTOVER}{folder.name}-removed")
    remove(hidden)
    folder.rename(hidden)
    return hidden


def leftovers(models: Path) -> list[Path]:
    """What is left of bundles that were being written or removed; those of living processes are among them."""
    return sorted(models.glob(f"{_LEFTOVER}*")) if models.is_dir() else []


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)
    target.chmod(0o444)  # a published file is never written again
    sync(target)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o444)
    sync(path)


def _content(path: Path, what: str) -> bytes:
    """A small file of a bundle.

    Raises:
        ModelError: if it cannot be read, or is not small.
    """
    status = model_status(path, what, _REMEDY)
    if status is None:
        raise ModelError(f"{path}: is missing; {_REMEDY}")
    if status.st_size > _MAX_FILE_BYTES:
        raise ModelError(f"{path}: is too large for {what}; {_REMEDY}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _verify(path: Path, sha256: str) -> None:
    """Compare a model file with its hash.

    Raises:
        ModelError: if it is missing or damaged.
    """
    if model_status(path, remedy=_REMEDY) is None:
        raise ModelError(f"{path}: is missing; {_REMEDY}")
    if _file_sha256(path) != sha256:
        raise ModelError(f"{path}: is damaged; {_REMEDY}")


def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ModelError:
    reason = (error.strerror or type(error).__name__).lower()
    return ModelError(f"{path}: cannot be read ({reason}); let SegQC read this file and its folder")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
