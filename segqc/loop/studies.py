"""A studies folder: scans, labels in MONAI Label's layout, and what SegQC keeps beside them.

::

    <folder>/<id>.nii.gz                  scans (.nii, .nii.gz, .nrrd)
    <folder>/labels/final/<id>.nii.gz     labels that a person submitted
    <folder>/labels/original/<id>.nii.gz  masks that the segmentation network made
    <folder>/segqc.toml                   settings
    <folder>/segqc/                       the store, every label version, models, trainings
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from segqc.assessor import AssessmentSettings, Assessor
from segqc.networks import Kind
from segqc.placement import Placement
from segqc.segmenter import Segmenter
from segqc.settings import Settings, load_settings
from segqc.store import assessments, labels, scans
from segqc.store.database import PATIENCE_SECONDS
from segqc.store.folder import take_in
from segqc.store.labels import FINAL, ORIGINAL, NewLabel
from segqc.store.scans import UnknownScan
from segqc.store.schema import OPEN_STATES
from segqc.store.store import Store
from segqc.store.values import JsonObject, LabelRecord, ScanRecord, Who
from segqc.training import Case
from segqc.types import Assessment, Structure
from segqc.volumes import read_labels

LABEL_SUFFIXES = (".nii.gz", ".nii", ".nrrd")
LABELLED: tuple[Literal["submitted"], Literal["approved"]] = ("submitted", "approved")


class StudiesError(ValueError):
    """A studies folder can't be used; says what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class ScanEntry:
    """A scan of the folder and its current labels, where there are any.

    ``final`` and ``original`` are the kept files of these versions, which nobody changes.
    """

    id: str
    image: Path
    final: Path | None
    original: Path | None


class Studies:
    """One studies folder. Holds its path, its settings and its store: what is on disk is the state."""

    def __init__(
        self, folder: Path, settings: Settings | None = None, *, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        """Open a folder; ``patience_seconds`` is how long to wait for a database that is locked.

        Raises:
            StudiesError: if it is no folder.
            SettingsError: if its ``segqc.toml`` can't be used.
        """
        if not folder.is_dir():
            raise StudiesError(f"{folder}: no such folder; name a folder of scans (.nii, .nii.gz or .nrrd)")
        self.folder = folder.resolve()
        self.settings = settings or load_settings(self.folder)
        self._patience_seconds = patience_seconds

    @property
    def own(self) -> Path:
        """The folder of what SegQC keeps."""
        return self.folder / "segqc"

    @functools.cached_property
    def store(self) -> Store:
        """The store of the folder, with all in it that lies in the folder now.

        Raises:
            StoreError: if its database can't be reached, or is of another version of this program.
        """
        store = Store.open(self.folder, self.settings.store.url, patience_seconds=self._patience_seconds)
        take_in(store, self.settings.patient_of, self.settings.placing())
        return store

    def refresh(self) -> None:
        """Take in what has been put into the folder, or taken out of it, meanwhile."""
        take_in(self.store, self.settings.patient_of, self.settings.placing())

    def scans(self) -> list[ScanEntry]:
        """All scans whose files are there, in the order of their names."""
        self.refresh()
        with self.store.read() as transaction:
            records = [s for s in scans.listing(transaction) if s.missing_since is None]
            finals = labels.current_of_all(transaction, FINAL)
            originals = labels.current_of_all(transaction, ORIGINAL)
        return [self._entry(s, finals.get(s.name), originals.get(s.name)) for s in records]

    def waiting(self) -> list[ScanEntry]:
        """The scans that wait for a person's label, in the order of their names."""
        self.refresh()
        with self.store.read() as transaction:
            records = [s for s in scans.listing(transaction, states=OPEN_STATES) if s.missing_since is None]
            originals = labels.current_of_all(transaction, ORIGINAL)
        return [self._entry(s, None, originals.get(s.name)) for s in records]

    def scan(self, name: str) -> ScanEntry:
        """One scan.

        Raises:
            StudiesError: if the folder has no scan of this name.
        """
        self.refresh()
        with self.store.read() as transaction:
            try:
                record = scans.get(transaction, name)
            except UnknownScan as error:
                raise StudiesError(f"{self.folder}: no scan named {name}") from error
            tags = labels.tags(transaction, name)
        return self._entry(record, tags.get(FINAL), tags.get(ORIGINAL))

    def _entry(self, scan: ScanRecord, final: LabelRecord | None, original: LabelRecord | None) -> ScanEntry:
        return ScanEntry(
            scan.name,
            self.folder / scan.file,
            self.store.label_file(final) if final is not None else None,
            self.store.label_file(original) if original is not None else None,
        )

    @functools.cached_property
    def structures(self) -> tuple[Structure, ...]:
        """The structures: those of the settings, else one per value found in the final labels.

        Raises:
            StudiesError: if there are neither.
        """
        if named := self.settings.structure_list():
            return named
        values: set[int] = set()
        for entry in self.scans():
            if entry.final is not None:
                values |= {int(v) for v in set(read_labels(entry.final).array.ravel().tolist()) if v}
        if not values:
            raise StudiesError(
                f"{self.folder}: no structures are named in segqc.toml and no final label shows any; "
                "write a table such as [structures] liver = [1]"
            )
        return tuple(Structure(f"label {v}", (v,)) for v in sorted(values))

    def cases(self) -> list[Case]:
        """The scans with a final label that nobody rejected, ready to train on."""
        self.refresh()
        with self.store.read() as transaction:
            records = scans.listing(transaction, states=LABELLED)
            finals = labels.current_of_all(transaction, FINAL)
        return [
            Case(s.name, s.patient, self.folder / s.file, self.store.label_file(finals[s.name]))
            for s in records
            if s.name in finals and s.missing_since is None
        ]

    def placements(self) -> Mapping[str, Placement]:
        """Fold and role of each patient, given once and stored."""
        with self.store.read() as transaction:
            return {s.patient: Placement(s.fold, s.role) for s in scans.listing(transaction)}

    def model_path(self, network: Kind) -> Path:
        """Where the current model of a network lies."""
        return self.own / "models" / f"{network}.pt"

    def staged_path(self, network: Kind) -> Path:
        """Where a round keeps its model of a network until both are trained."""
        return self.own / "models" / "next" / f"{network}.pt"

    def training_folder(self, network: Kind) -> Path:
        """Where checkpoints and learning curve of a network lie."""
        return self.own / "training" / network

    def segmenter(self) -> Segmenter | None:
        """The current segmentation network; ``None`` before the first training."""
        path = self.model_path("segmentation")
        return Segmenter.load(path) if path.is_file() else None

    def assessor(self) -> Assessor | None:
        """The current SegQC-Net with this folder's settings; ``None`` before the first training."""
        path = self.model_path("segqc")
        settings = AssessmentSettings(extraction=self.settings.extraction, boxes=self.settings.boxes)
        return Assessor.load(path, settings) if path.is_file() else None

    def assessment(self, name: str) -> Assessment | None:
        """The current assessment of the mask that an annotator would start from, if there is one."""
        with self.store.read() as transaction:
            found = assessments.latest(transaction, name)
        return found[1] if found is not None else None

    def assessments(self) -> dict[str, Assessment]:
        """The current assessments of all scans that have one."""
        self.refresh()
        with self.store.read() as transaction:
            there = scans.names(transaction)
            found = assessments.latest_of_all(transaction)
        return {name: found[name] for name in there if name in found}

    def write_assessment(self, assessment: Assessment, mask: LabelRecord) -> None:
        """Keep an assessment of a stored mask."""
        with self.store.write() as transaction:
            assessments.write(transaction, assessment, mask.id)

    def mask(self, name: str) -> LabelRecord | None:
        """The current mask of a scan: what a network made, or a person put there as such."""
        with self.store.read() as transaction:
            return labels.current(transaction, name, ORIGINAL)

    def save_mask(self, name: str, source: Path, segmenter: Segmenter, *, tag: str = ORIGINAL) -> LabelRecord:
        """Keep a network's mask of a scan."""
        with self.store.write() as transaction:
            pair = labels.bundle(transaction, segmenter.version)
        # what clients of MONAI Label look for: which value is which structure
        info: JsonObject = {
            "model": "segmentation",
            "params": {"label_names": dict(label_names(segmenter.structures)), "model_version": segmenter.version},
        }
        network = Who("network", segmenter.version, "program")
        return self.store.save_label(NewLabel(name, tag, "network", network, bundle=pair.id, info=info), source)

    def score_versions(self, method: str) -> dict[str, str]:
        """The version of the network that a baseline's score speaks of, of all scans that have one."""
        with self.store.read() as transaction:
            return {name: version for name, (_, version) in assessments.scores(transaction, method).items()}

    def scores(self, method: str) -> dict[str, float]:
        """A baseline's scores of all scans that have one; the lowest is the worst."""
        with self.store.read() as transaction:
            return {name: value for name, (value, _) in assessments.scores(transaction, method).items()}

    def write_score(self, method: str, name: str, value: float, version: str) -> None:
        """Keep a baseline's score of a scan."""
        with self.store.write() as transaction:
            assessments.write_score(transaction, name, method, value, version)


def label_names(structures: tuple[Structure, ...]) -> dict[str, int]:
    """Names of the label map's values, as annotation clients show them: ``{name: value}``, values ascending.

    A structure of one value gives it its name. A value that is only part of a union is named after the union and
    itself.
    """
    names: dict[int, str] = {}
    for structure in sorted(structures, key=lambda s: len(s.values)):
        for value in structure.values:
            plain = structure.name if len(structure.values) == 1 else f"{structure.name} {value}"
            names.setdefault(value, plain)
    return {names[value]: value for value in sorted(names)}
