"""A dataset folder out of a data set whose labels are known: some scans labelled, the truth of the others set aside."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import JsonValue, TypeAdapter, ValidationError

from segqc.loop.dataset import DatasetError
from segqc.settings import write_settings
from segqc.text import TextError, decode_text, nfc
from segqc.volumes import atomic_write, is_scan_path, label_id, label_suffix, scan_id

_SPLITS: TypeAdapter[dict[str, JsonValue]] = TypeAdapter(dict[str, JsonValue])


@dataclass(frozen=True, slots=True)
class Prepared:
    """Which scans got a final label, and which have their truth set aside."""

    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...]


def prepare(
    dataset: Path,
    folder: Path,
    *,
    labelled: int,
    unlabelled: int,
    structures: Mapping[str, tuple[int, ...]],
    split: str | None = None,
    seed: int = 0,
) -> Prepared:
    """Make a dataset folder by drawing scans from a data set at random.

    Labels of the labelled scans become ``labels/final/``, those of the others ``truth/``, which no training and no
    server reads. Scans of one patient (from a split that lists patients) go to the same side.

    Args:
        dataset: a folder with ``images/`` and ``labels/``, files of the same names, and perhaps ``splits.json``.
        folder: the dataset folder to make; it must be new or empty.
        labelled: number of scans with a final label.
        unlabelled: number of scans without one.
        structures: names and label values, for ``segqc.toml``.
        split: draw only from this entry of ``splits.json``: a list of scans, or, under the name ``<split>_patients``,
            of patients, whose scans are named ``<patient>_...``.
        seed: of the draw.

    Raises:
        DatasetError: if the data set has no such files or split or too few scans, or the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DatasetError(f"{folder}: exists already; name a new or empty folder")
    pairs = labelled_pairs(dataset)
    groups = scans_by_patient(dataset, split, list(pairs))
    order = np.random.default_rng(seed).permutation(len(groups))
    names = [scan for i in order for scan in groups[list(groups)[int(i)]]]
    if labelled < 0 or unlabelled < 0 or labelled + unlabelled > len(names):
        wanted = f"{labelled} labelled and {unlabelled} unlabelled scans"
        raise DatasetError(f"{dataset}: {wanted} wanted, but {len(names)} are there to draw from")
    chosen, cut = names[: labelled + unlabelled], labelled
    patient_of = {scan: patient for patient, scans in groups.items() for scan in scans}
    if 0 < cut < len(chosen) and patient_of[chosen[cut - 1]] == patient_of[chosen[cut]]:
        shared = patient_of[chosen[cut]]
        raise DatasetError(
            f"{dataset}: with {labelled} labelled scans the patient {shared} would be on both sides; "
            f"ask for {labelled + 1} or {labelled - 1} labelled scans"
        )
    several = {
        patient: kept
        for patient, scans in groups.items()
        if len(kept := tuple(scan for scan in scans if scan in chosen)) > 1
    }
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        for i, name in enumerate(chosen):
            image, label = pairs[name]
            _copy(image, temporary / image.name)
            _copy(label, temporary / ("labels/final" if i < cut else "truth") / label.name)
        write_settings(temporary, structures, several)
    return Prepared(tuple(chosen[:cut]), tuple(chosen[cut:]))


def labelled_pairs(dataset: Path) -> dict[str, tuple[Path, Path]]:
    """The scan and the label file of each labelled scan of a data set, by id.

    Raises:
        DatasetError: if there are none.
    """
    images, labels = dataset / "images", dataset / "labels"
    if not images.is_dir() or not labels.is_dir():
        raise DatasetError(f"{dataset}: wanted a folder with images/ and labels/")
    by_id = {nfc(label_id(path)): path for path in sorted(labels.iterdir()) if label_suffix(path.name) is not None}
    scans = {scan_id(path): path for path in sorted(images.iterdir()) if path.is_file() and is_scan_path(path)}
    pairs = {name: (path, by_id[nfc(name)]) for name, path in scans.items() if nfc(name) in by_id}
    if not pairs:
        raise DatasetError(f"{dataset}: no scan in images/ has a file of the same name in labels/")
    return pairs


def scans_by_patient(dataset: Path, split: str | None, names: Sequence[str]) -> dict[str, list[str]]:
    """Scans of a split by patient; without a split all scans, each its own patient.

    Raises:
        DatasetError: if ``splits.json`` can't be read or has no such split.
    """
    if split is None:
        return {name: [name] for name in names}
    path = dataset / "splits.json"
    try:
        splits = _SPLITS.validate_json(decode_text(path.read_bytes()))
    except TextError as error:
        raise DatasetError(f"{path}: {error}") from error
    except (OSError, ValidationError) as error:
        raise DatasetError(f"{path}: no readable splits file; leave --split away to draw from all scans") from error
    entry = splits.get(split, splits.get(f"{split}_patients"))
    if not isinstance(entry, list):
        raise DatasetError(f"{path}: no split named {split!r}; it has {', '.join(splits)}")
    items = {nfc(str(item)) for listed in splits.values() if isinstance(listed, list) for item in listed}
    owner = {name: _owner(name, items) for name in names}
    groups = {item: [name for name in names if owner[name] == item] for item in (nfc(str(item)) for item in entry)}
    return {item: members for item, members in groups.items() if members}


def _owner(name: str, items: Collection[str]) -> str | None:
    """The item of a splits file that a scan is of: its own name, or the longest that it begins with before a ``_``."""
    parts = nfc(name).split("_")
    beginnings = ("_".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((beginning for beginning in beginnings if beginning in items), None)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
