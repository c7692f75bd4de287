"""What lies in a dataset folder and is not taken in, though somebody may want it to be, and what to do about it."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from segqc.store import labels
from segqc.store.findings import Finding
from segqc.store.store import OWN_FOLDER
from segqc.text import caseless, nfc, printable
from segqc.volumes import SCAN_SUFFIXES, label_id, label_suffix, scan_id, scan_suffix

_NO_FOLDER: Final = "is a file, or a link that leads nowhere, where a folder of labels belongs; move it away"
UNPRINTABLE: Final = "has a name that is not UTF-8 or holds control characters; rename the file"
"""Why a file is not taken in whose name nobody could print."""

# Formats of images that are commonly put beside scans and would silently be left out. Settings and side-cars are not.
_OTHER_FORMATS: Final = (
    ".mha", ".mhd", ".dcm", ".ima", ".mgz", ".mgh", ".img", ".img.gz", ".hdr", ".nhdr", ".mnc", ".gipl",
    ".mif", ".mif.gz",
)  # fmt: skip
_PACKED: Final = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z", ".rar")
_OTHER_CASE: Final = "is not the folder {wanted}/, which is spelled exactly so; rename it, or move its files there"

_NOT_LOOKED_INTO: Final = (
    "is a folder with images, and scans are files beside it; move files up, and import DICOM (segqc import dicom)"
)
_IS_FOLDER: Final = "is a folder, which is not looked into; move the files that it holds up"
_FIRST_FILES: Final = 100  # of a folder that may hold thousands, every few seconds
_DICOM_MAGIC_END: Final = 132


def is_for_scans(folder: Path) -> bool:
    """Whether a folder holds scans, or what `sync` says of that it lies there instead of them."""
    names = os.listdir(folder)
    if any(scan_suffix(name) is not None or name.lower().endswith((".seg.nrrd", *_OTHER_FORMATS)) for name in names):
        return True
    return bool(_folders_of_images(folder, ()))


def _folders_of_images(dataset: Path, names: Collection[str]) -> list[str]:
    """The folders beside the scans that hold images among their first files, but for what is named like a scan.

    Those are masks, maps and the like of the scans.
    """
    with os.scandir(dataset) as found:
        folders = [entry for entry in found if not entry.name.startswith(".") and os.path.isdir(entry)]
    images = []
    for folder in folders:
        if folder.name not in ("labels", OWN_FOLDER) and folder.name == printable(folder.name):
            with contextlib.suppress(OSError), os.scandir(folder) as files:
                if any(_is_image(file, names) for file in itertools.islice(files, _FIRST_FILES)):
                    images.append(folder.name)
    return images


def _in_other_case(folder: Path, name: str) -> list[str]:
    """The folders that have a name but for its case, where that makes them others."""
    wanted = folder / name
    with os.scandir(folder) as found:
        alike = [entry for entry in found if entry.name != name and caseless(entry.name) == name and entry.is_dir()]
    return [entry.name for entry in alike if not (wanted.exists() and os.path.samefile(entry, wanted))]


def _is_image(entry: os.DirEntry[str], names: Collection[str]) -> bool:
    if not os.path.isfile(entry):
        return False
    if label_suffix(entry.name) is not None:
        return nfc(label_id(entry.name)) not in names
    if "." in entry.name:
        return entry.name.lower().endswith(_OTHER_FORMATS)
    with open(entry.path, "rb") as file:
        return file.read(_DICOM_MAGIC_END).endswith(b"DICM")


def misplaced(name: str) -> Finding | None:
    """What is wrong with a file beside the scans that looks like one; None of settings, side-cars and the like."""
    if name.lower().endswith(".seg.nrrd"):
        sentence = f"{name}: is a segmentation, not a scan; move it to labels/final/ if it is the final label"
    elif name.lower().endswith(_OTHER_FORMATS):
        sentence = f"{name}: is of no format that scans are read from; convert it to {' or '.join(SCAN_SUFFIXES)}"
    elif name.lower().endswith(_PACKED):
        sentence = f"{name}: is packed, and not looked into; unpack it if it holds scans"
    else:
        return None
    return Finding(name, "other", sentence, "")


def folders_beside_scans(dataset: Path, present: Collection[str]) -> dict[str, Finding]:
    """Folders that hold images, as no folder is looked into, and those that are nearly called ``labels``.

    Args:
        dataset: the dataset folder.
        present: the names of its files.
    """
    wrong = {name: _NOT_LOOKED_INTO for name in _folders_of_images(dataset, {nfc(scan_id(name)) for name in present})}
    wrong |= {name: _OTHER_CASE.format(wanted="labels") for name in _in_other_case(dataset, "labels")}
    return {name: Finding(name, "other", f"{name}: {why}", "") for name, why in wrong.items()}


def beside_tags(views: Path) -> dict[str, Finding]:
    """Label files that lie beside the tags' folders, and not in one, and what is where a folder of them belongs.

    Args:
        views: the folder of these folders, ``labels/``.
    """
    if not views.is_dir():
        there = os.path.lexists(views)
        return {"labels/": Finding("labels/", "label", f"labels: {_NO_FOLDER}", "")} if there else {}
    final = f"labels/{labels.FINAL}"
    wrong = {f"labels/{name}": _OTHER_CASE.format(wanted=final) for name in _in_other_case(views, labels.FINAL)}
    for entry, _ in visible_files(views, {}):
        if entry.name == labels.FINAL:
            wrong[final] = _NO_FOLDER
        elif label_suffix(entry.name) is not None:
            wrong[f"labels/{printable(entry.name)}"] = (
                f"lies in no tag's folder; move it to {final}/ if it is a final label"
            )
    return {file: Finding(file, "label", f"{file}: {why}", "") for file, why in wrong.items()}


def visible_files(folder: Path, unreadable: dict[str, str]) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
    """The visible files of a folder, links to files among them, with their status.

    Args:
        folder: the folder.
        unreadable: gets the names of folders, and of those whose status is not to be had, each with the reason.
    """
    with os.scandir(folder) as found:
        for entry in found:
            if entry.name.startswith("."):
                continue
            try:
                status = entry.stat()
            except OSError as error:
                if entry.is_symlink():
                    unreadable[printable(entry.name)] = f"is a link that leads nowhere ({error.strerror}); mend it"
                elif not isinstance(error, FileNotFoundError):  # not removed this moment
                    unreadable[printable(entry.name)] = f"cannot be read ({error.strerror})"
            else:
                if stat.S_ISREG(status.st_mode):
                    yield entry, status
                elif stat.S_ISDIR(status.st_mode):
                    unreadable[printable(entry.name)] = _IS_FOLDER
