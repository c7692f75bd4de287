"""The labelled scans that an evaluation is about: who trains, and who is kept for the test."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from segqc.errors import SegqcError
from segqc.loop.dataset import Dataset, DatasetError
from segqc.loop.prepare import labelled_pairs, scans_by_patient
from segqc.training.cases import Case, whole_cases
from segqc.types import Structure, structures_of_values, values_in
from segqc.volumes import read_labels

logger = logging.getLogger(__name__)

TRAIN, TEST = "train", "test"
MIN_TRAINING_PATIENTS = 6
MIN_TEST_PATIENTS = 2


class CohortError(SegqcError):
    """A data set can't be evaluated on; says what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class Cohort:
    """Labelled cases of a data set. No patient has cases on both sides.

    Attributes:
        name: the data set's name, for titles.
        structures: what is segmented and assessed.
        train: cases that every network may learn from.
        test: cases whose labels only the evaluation reads.
        fold: the fold of each patient of the training side.
    """

    name: str
    structures: tuple[Structure, ...]
    train: tuple[Case, ...]
    test: tuple[Case, ...]
    fold: Mapping[str, int]

    def held(self, fold: int) -> tuple[Case, ...]:
        """The training side's cases that networks of a fold do not see."""
        return tuple(c for c in self.train if self.fold[c.patient] == fold)

    def trained(self, fold: int) -> tuple[Case, ...]:
        """The training side's cases that networks of a fold learn from."""
        return tuple(c for c in self.train if self.fold[c.patient] != fold)


@dataclass(frozen=True, slots=True)
class SplitRecord:
    """What a run was begun with, to hold it to: each scan's patient, side and label file's content, and the folds."""

    structures: tuple[Structure, ...]
    train: Mapping[str, str]
    test: Mapping[str, str]
    fold: Mapping[str, int]
    labels: Mapping[str, str]


SPLIT_RECORDS: TypeAdapter[SplitRecord] = TypeAdapter(SplitRecord)


@dataclass(frozen=True, slots=True)
class Labelled:
    """The labelled scans of a folder: by side where the data set brings a split, else under one name."""

    folder: Path
    structures: tuple[Structure, ...]
    sides: Mapping[str, Sequence[Case]]

    @property
    def cases(self) -> list[Case]:
        """All of them."""
        return [case for cases in self.sides.values() for case in cases]


def read_labelled(folder: Path, structures: Mapping[str, tuple[int, ...]]) -> Labelled:
    """Find the labelled scans of a folder.

    Args:
        folder: a data set (``images/``, ``labels/`` and perhaps ``splits.json`` with ``train`` and ``test``), or a
            dataset folder, whose final labels are the truth where they were checked as a whole.
        structures: names and label values; empty takes those of the dataset folder; those of a data set are then found
            by `split`.

    Raises:
        DatasetError: if the folder is neither.
    """
    named = tuple(Structure(name, values) for name, values in structures.items())
    if (folder / "images").is_dir():
        return Labelled(folder, named, _of_dataset(folder))
    dataset = Dataset(folder)
    cases = dataset.cases()
    whole = whole_cases(cases)
    if in_part := len(cases) - len(whole):
        logger.warning("%s: %d labels that were checked in part are left out", folder, in_part)
    return Labelled(folder, named or dataset.structures, {"": whole})


def split(labelled: Labelled, *, folds: int, seed: int, test_share: float, max_cases: int | None = None) -> Cohort:
    """Split labelled scans by patient.

    Args:
        labelled: the scans; without structures, each label value that is found becomes one.
        folds: number of folds on the training side.
        seed: of the split, where the data set brings none, and of the folds.
        test_share: share of the patients that is kept for the test where the data set brings no split.
        max_cases: use at most so many cases of each side, drawn at random.

    Raises:
        CohortError: if there are too few labelled patients.
    """
    sides, rng = labelled.sides, np.random.default_rng((seed, 1))
    if TRAIN not in sides or TEST not in sides:
        every = labelled.cases
        patients = _shuffled(every, rng)
        kept = set(patients[: max(MIN_TEST_PATIENTS, round(test_share * len(patients)))])
        sides = {TRAIN: [c for c in every if c.patient not in kept], TEST: [c for c in every if c.patient in kept]}
    train, test = (_fewer(sides[side], max_cases, rng) for side in (TRAIN, TEST))
    patients = _shuffled(train, rng)
    if len(patients) < max(MIN_TRAINING_PATIENTS, folds) or len({c.patient for c in test}) < MIN_TEST_PATIENTS:
        raise CohortError(
            f"{labelled.folder}: an evaluation needs labelled scans of at least {max(MIN_TRAINING_PATIENTS, folds)} "
            f"patients to train on and of {MIN_TEST_PATIENTS} to test with, found {len(patients)} and "
            f"{len({c.patient for c in test})}; label more scans"
        )
    structures = labelled.structures
    if not structures:
        structures = structures_of_values({v for c in train for v in values_in(read_labels(c.labels).array)})
    else:
        _check_structures(labelled, structures)
    name = labelled.folder.resolve().name
    return Cohort(name, structures, train, test, {p: i % folds for i, p in enumerate(patients)})


def _check_structures(labelled: Labelled, structures: Sequence[Structure]) -> None:
    """Refuse structures that no label shows; labels are read until each was seen.

    Raises:
        CohortError: if there is such a structure, or a label read holds a value that is in none.
    """
    known = {value for structure in structures for value in structure.values}
    unseen = {structure.name: set(structure.values) for structure in structures}
    for case in labelled.cases:
        found = {int(value) for value in np.unique(read_labels(case.labels).array) if value > 0}
        if foreign := sorted(found - known):
            raise CohortError(
                f"{case.labels}: holds the value {foreign[0]}, which is in none of the structures "
                f"{', '.join(structure.name for structure in structures)}; name it with --structure"
            )
        unseen = {name: values for name, values in unseen.items() if not values & found}
        if not unseen:
            return
    raise CohortError(f"{labelled.folder}: no label holds the structure {', '.join(unseen)}")


def record_of(cohort: Cohort) -> SplitRecord:
    """What to note of a cohort."""
    return SplitRecord(
        cohort.structures,
        {c.id: c.patient for c in cohort.train},
        {c.id: c.patient for c in cohort.test},
        dict(cohort.fold),
        {c.id: _sha256(c.labels) for c in (*cohort.train, *cohort.test)},
    )


def verify(noted: SplitRecord, labelled: Labelled) -> Cohort:
    """The cohort that was noted, of today's files; scans that were labelled since are left out.

    Raises:
        CohortError: if a scan's label is gone or has another content: networks were trained on what it was.
    """
    cases = {c.id: c for c in labelled.cases}
    for name, digest in noted.labels.items():
        if name not in cases or _sha256(cases[name].labels) != digest:
            raise CohortError(
                f"{labelled.folder}: the label of scan {name} {'is gone' if name not in cases else 'has changed'} "
                "since this evaluation began; restore it (`segqc labels`), or name another run folder with --out"
            )
    train, test = (
        tuple(replace(cases[name], patient=patient) for name, patient in side.items())
        for side in (noted.train, noted.test)
    )
    return Cohort(labelled.folder.resolve().name, noted.structures, train, test, noted.fold)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _of_dataset(folder: Path) -> dict[str, list[Case]]:
    pairs = labelled_pairs(folder)
    sides: dict[str, list[Case]] = {}
    for side in (TRAIN, TEST) if (folder / "splits.json").is_file() else (None,):
        groups = scans_by_patient(folder, side, list(pairs))
        sides[side or ""] = [Case(scan, patient, *pairs[scan]) for patient, names in groups.items() for scan in names]
    both = {c.patient for c in sides.get(TRAIN, ())} & {c.patient for c in sides.get(TEST, ())}
    if both:
        raise DatasetError(
            f"{folder / 'splits.json'}: patient {sorted(both)[0]} is in train and in test; separate them"
        )
    return sides


def _shuffled(cases: list[Case] | tuple[Case, ...], rng: np.random.Generator) -> list[str]:
    patients = sorted({c.patient for c in cases})
    return [patients[int(i)] for i in rng.permutation(len(patients))]


def _fewer(cases: Sequence[Case], most: int | None, rng: np.random.Generator) -> tuple[Case, ...]:
    cases = sorted(cases, key=lambda c: c.id)
    if most is None or len(cases) <= most:
        return tuple(cases)
    return tuple(cases[int(i)] for i in sorted(rng.permutation(len(cases))[:most]))
