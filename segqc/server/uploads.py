"""DICOM slices that a client sends after a scan: 3D Slicer's option "Include DICOM files".

The extension uploads the scan as one file, then the first slice of its series under a name of the exporter's
(``IMG0001.dcm``). Nothing in the second request says which scan it belongs to, so the last upload of each client is
remembered for some minutes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter

from segqc.loop.dataset import Dataset
from segqc.server.errors import RequestError
from segqc.settings import Settings
from segqc.store import scans
from segqc.store.records import Actor
from segqc.text import nfc
from segqc.volumes import VolumeError, as_spelled, atomic_write, check_dicom_image, read_grid, scan_id
from segqc.volumes.tags import read_dicom_tag, read_tag

logger = logging.getLogger(__name__)

REMEMBERED_SECONDS: Final = 600.0
MAX_REMEMBERED: Final = 1000
MAX_VALUE: Final = 200  # characters of a tag; DICOM itself allows 64
DICOM_SUFFIXES: Final = (".dcm", ".dicom", ".ima")

_DEFAULT_TAG: Final = "PatientID"
_SERIES: Final = "SeriesInstanceUID"
_SIDECAR: Final[TypeAdapter[dict[str, str]]] = TypeAdapter(dict[str, str])


@dataclass(frozen=True, slots=True)
class _Upload:
    scan: str
    at: float


class Uploads:
    """The scan that each client uploaded last, for some minutes and a bounded number of clients."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, _Upload] = {}
        self._lock = threading.Lock()

    def note(self, client: str, scan: str) -> None:
        """Remember a client's upload; the longest ago is forgotten where there are too many."""
        with self._lock:
            self._last.pop(client, None)
            self._last[client] = _Upload(scan, self._clock())
            if len(self._last) > MAX_REMEMBERED:
                del self._last[next(iter(self._last))]

    def last(self, client: str) -> str | None:
        """The scan that a client uploaded last; None where there is none, or it was too long ago."""
        with self._lock:
            found = self._last.get(client)
        return found.scan if found is not None and self._clock() - found.at < REMEMBERED_SECONDS else None


def is_dicom_name(name: str | None) -> bool:
    """Whether an uploaded file is called a DICOM file."""
    return (name or "").lower().endswith(DICOM_SUFFIXES)


def take_slice(dataset: Dataset, image: str | None, path: Path, actor: Actor) -> str:
    """Take a scan's patient from a DICOM slice of it; the slice itself is not kept.

    The patient's and the series' tag are written to a JSON file beside the scan, unless there is one already: what the
    first slice said stays. Where the settings say otherwise whose scan it is, that counts; and the patient of a scan
    that was worked on stays, as its fold and role do.

    Args:
        dataset: the dataset folder.
        image: the scan's id; None where the client has uploaded none.
        path: the slice.
        actor: who sent it.

    Returns:
        The scan's id.

    Raises:
        RequestError: 422 if it is no usable DICOM image, 409 if there is no scan that it belongs to.
    """
    tag = dataset.settings.patient_tag or _DEFAULT_TAG
    try:
        check_dicom_image(path)
        found = {name: read_dicom_tag(path, name) for name in (tag, _SERIES)}
    except VolumeError as error:
        raise RequestError(422, str(error).replace(str(path), path.name)) from error
    too_long = [name for name, value in found.items() if value is not None and len(value) > MAX_VALUE]
    if too_long:
        raise RequestError(422, f"{path.name} has a {too_long[0]} of more than {MAX_VALUE} characters; repair it.")
    if image is None:
        raise RequestError(
            409, "a single DICOM file is taken after the scan that it belongs to; upload the scan first, as one file."
        )
    if dataset.pacs is not None:
        raise RequestError(409, "the scans of this server come from a PACS, and so do their patients; store it there.")
    scan = dataset.folder / dataset.verify_scan(image).file
    sidecar = as_spelled(scan.with_name(f"{scan_id(scan)}.json"))
    _check_slice(path, scan, read_tag(scan, _SERIES), found[_SERIES], image)
    with dataset.store.write() as transaction:
        if not sidecar.exists():
            with atomic_write(sidecar) as temporary:
                kept = {name: value for name, value in found.items() if value is not None}
                temporary.write_bytes(_SIDECAR.dump_json(kept, indent=1) + b"\n")
        known, patient = scans.get(transaction, image), _patient(dataset.settings, scan, tag)
        if known.patient == patient:
            return image
        if known.state == "unlabelled":
            scans.assign_patient(transaction, image, patient, dataset.settings.split_config(), actor)
        else:
            logger.warning("%s: is %s, so its patient stays %r", image, known.state, known.patient)
    return image


def _check_slice(path: Path, scan: Path, series: str | None, own: str | None, image: str) -> None:
    """Refuse a slice of another scan than the last upload: of another series, or of another size.

    Raises:
        RequestError: 409 if it is none of the scan's.
    """
    sizes = [read_dicom_tag(path, name) for name in ("Rows", "Columns")]
    shape = [str(size) for size in read_grid(scan).shape]
    of_its_size = all(size in shape for size in sizes) and (sizes[0] != sizes[1] or shape.count(str(sizes[0])) > 1)
    if not of_its_size or series not in (None, own):
        raise RequestError(
            409,
            f"the DICOM file is no slice of {image!r}, the scan that was uploaded before it; upload its scan first.",
            image=image,
        )


def _patient(settings: Settings, scan: Path, tag: str) -> str:
    """Whose scan it is by the settings; by its side-car, where they leave that open."""
    named = settings.patient_of(scan)
    return (read_tag(scan, tag) or named) if named == nfc(scan_id(scan)) else named
