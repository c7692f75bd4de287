"""A studies folder: scans, labels in MONAI Label's layout, and what SegQC keeps beside them.

::

    <folder>/<id>.nii.gz                  scans (.nii, .nii.gz, .nrrd)
    <folder>/labels/final/<id>.nii.gz     labels that a person submitted
    <folder>/labels/original/<id>.nii.gz  masks that the segmentation network made
    <folder>/segqc.toml                   settings
    <folder>/segqc/                       models, trainings, assessments, scores, folds
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from segqc.assessor import AssessmentSettings, Assessor
from segqc.networks import Kind
from segqc.segmenter import Segmenter
from segqc.settings import Settings, load_settings
from segqc.training import Case, Placement, TrainingSettings, place_patients
from segqc.types import Assessment, Structure
from segqc.volumes import atomic_write, is_scan_path, read_labels, scan_id

LABEL_SUFFIXES = (".nii.gz", ".nii", ".nrrd")


class StudiesError(ValueError):
    """A studies folder can't be used; says what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class ScanEntry:
    """A scan of the folder and its labels, where they are."""

    id: str
    image: Path
    final: Path | None
    original: Path | None


@dataclass(frozen=True, slots=True)
class _Score:
    value: float
    version: str


_SCORES: TypeAdapter[_Score] = TypeAdapter(_Score)


class Studies:
    """One studies folder. Holds nothing but its path and settings: what is on disk is the state."""

    def __init__(self, folder: Path, settings: Settings | None = None) -> None:
        """Open a folder.

        Raises:
            StudiesError: if it is no folder.
            SettingsError: if its ``segqc.toml`` can't be used.
        """
        if not folder.is_dir():
            raise StudiesError(f"{folder}: no such folder; name a folder of scans (.nii, .nii.gz or .nrrd)")
        self.folder = folder.resolve()
        self.settings = settings or load_settings(self.folder)

    @property
    def own(self) -> Path:
        """The folder of what SegQC keeps."""
        return self.folder / "segqc"

    def scans(self) -> list[ScanEntry]:
        """All scans, by id."""
        finals, originals = self._labels("final"), self._labels("original")
        entries = []
        with os.scandir(self.folder) as found:
            for item in found:
                path = Path(item.path)
                if item.is_file() and not item.name.startswith(".") and is_scan_path(path):
                    name = scan_id(path)
                    entries.append(ScanEntry(name, path, finals.get(name), originals.get(name)))
        return sorted(entries, key=lambda e: e.id)

    def scan(self, name: str) -> ScanEntry:
        """One scan.

        Raises:
            StudiesError: if the folder has no scan of this name.
        """
        for entry in self.scans():
            if entry.id == name:
                return entry
        raise StudiesError(f"{self.folder}: no scan named {name}")

    def _labels(self, tag: str) -> dict[str, Path]:
        folder = self.folder / "labels" / tag
        if not folder.is_dir():
            return {}
        return {scan_id(p): p for p in sorted(folder.iterdir()) if p.name.endswith(LABEL_SUFFIXES)}

    @functools.cached_property
    def structures(self) -> tuple[Structure, ...]:
        """The structures: those of the settings, else one per value found in the final labels.

        Raises:
            StudiesError: if there are neither.
        """
        if named := self.settings.structure_list():
            return named
        values: set[int] = set()
        for path in self._labels("final").values():
            values |= {int(v) for v in set(read_labels(path).array.ravel().tolist()) if v}
        if not values:
            raise StudiesError(
                f"{self.folder}: no structures are named in segqc.toml and no final label shows any; "
                "write a table such as [structures] liver = [1]"
            )
        return tuple(Structure(f"label {v}", (v,)) for v in sorted(values))

    def cases(self) -> list[Case]:
        """The scans with a final label, ready to train on; scans of one patient stay in one fold."""
        return [
            Case(e.id, self.settings.patient_of(e.id), e.image, e.final) for e in self.scans() if e.final is not None
        ]

    def placements(self, settings: TrainingSettings) -> Mapping[str, Placement]:
        """Fold and role of each labelled patient, given once and stored."""
        return place_patients(
            [c.patient for c in self.cases()],
            self.own / "folds.json",
            folds=settings.folds,
            validation_share=settings.validation_share,
            seed=settings.seed,
        )

    def model_path(self, network: Kind) -> Path:
        """Where the current model of a network lies."""
        return self.own / "models" / f"{network}.pt"

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
        """The current assessment of a scan's mask, if there is one."""
        path = self.own / "assessments" / f"{name}.json"
        return Assessment.from_json(path.read_bytes()) if path.is_file() else None

    def assessments(self) -> dict[str, Assessment]:
        """The current assessments of all scans that have one."""
        found = ((e.id, self.assessment(e.id)) for e in self.scans())
        return {name: a for name, a in found if a is not None}

    def write_assessment(self, assessment: Assessment) -> None:
        """Keep an assessment as the current one of its scan."""
        _write(self.own / "assessments" / f"{assessment.scan}.json", assessment.to_json().encode())

    def mask_maker(self, name: str) -> str | None:
        """The version of the segmentation network that made a scan's original mask, if one did."""
        path = self.own / "masks" / f"{name}.version"
        return path.read_text() if path.is_file() else None

    def write_mask_maker(self, name: str, version: str) -> None:
        """Keep which network made a scan's original mask; call it after the mask is in place."""
        _write(self.own / "masks" / f"{name}.version", version.encode())

    def score(self, method: str, name: str) -> tuple[float, str] | None:
        """A baseline's score of a scan and the version of the network that it speaks of."""
        path = self.own / "scores" / method / f"{name}.json"
        if not path.is_file():
            return None
        score = _SCORES.validate_json(path.read_bytes())
        return score.value, score.version

    def scores(self, method: str) -> dict[str, float]:
        """A baseline's scores of all scans that have one; the lowest is the worst."""
        found = ((e.id, self.score(method, e.id)) for e in self.scans())
        return {name: s[0] for name, s in found if s is not None}

    def write_score(self, method: str, name: str, value: float, version: str) -> None:
        """Keep a baseline's score of a scan."""
        _write(self.own / "scores" / method / f"{name}.json", _SCORES.dump_json(_Score(value, version)))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
