"""What routes share: who asks, the folder's store, turns, uploads, and the names of scans and labels."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Final, TypeVar

import anyio
import anyio.to_thread
from fastapi import Depends, Request, UploadFile
from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from segqc.loop.planted_errors import proposal_beside_error
from segqc.server.actors import RequestUser, request_user
from segqc.server.client_labels import same_values, to_client
from segqc.server.errors import RequestError
from segqc.server.monailabel.facade import Session, current_app
from segqc.server.names import check_session_id, split_suffix
from segqc.store import labels, scans
from segqc.store.labels import IGNORED, LIKELY_ERRORS_TAG
from segqc.store.records import Actor, LabelRecord, ScanRecord
from segqc.store.store import Store, suffix_of
from segqc.volumes import LABEL_SUFFIXES, SCAN_SUFFIXES, VolumeError, write_labels
from segqc.volumes.dicom_seg import SEGMENTATION_SUFFIX
from segqc.volumes.intake import check_scan

# With the patience for a locked database after it, the last of a crowd is told within a quarter of a minute.
TURN_SECONDS: Final = 10.0
_DICOM_MARK: Final = b"DICM"
_DICOM_HEAD: Final = 132  # bytes, with the mark

T = TypeVar("T")

AskingUser = Annotated[RequestUser, Depends(request_user)]


def open_store() -> Store:
    """The dataset folder's store."""
    return current_app().context.dataset.store


async def in_turn(request: Request, work: Callable[[], T]) -> T:
    """Do what annotators wait for, a few at a time and in the order of asking.

    More threads than cores only take each other's time: the last one of a crowd would wait many times as long.

    Raises:
        RequestError: 503 if the turn does not come within seconds: the database is locked, or the crowd too large.
    """
    slots: anyio.CapacityLimiter = request.app.state.annotation_slots
    turn = object()
    try:
        with anyio.fail_after(TURN_SECONDS):
            await slots.acquire_on_behalf_of(turn)
    except TimeoutError as error:
        raise RequestError(503, "the server is too busy, or its database is locked; try again.") from error
    try:
        return await anyio.to_thread.run_sync(work)
    finally:
        slots.release_on_behalf_of(turn)


class SentOnce(FileResponse):
    """A file that is removed when it is sent, or could not be."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            Path(self.path).unlink(missing_ok=True)


def receive(upload: UploadFile, folder: Path, stem: str, what: str, suffixes: Sequence[str] = SCAN_SUFFIXES) -> Path:
    """Write an uploaded scan or label map into a folder; its name is ours, but for the suffix."""
    path = folder / f"{stem}{split_suffix(upload.filename, what, suffixes)[1]}"
    with path.open("wb") as file:
        shutil.copyfileobj(upload.file, file)
    return path


def receive_labels(upload: UploadFile, folder: Path) -> Path:
    """Write an uploaded label map into a folder, as `receive`; a DICOM SEG may have any name."""
    mark = upload.file.read(_DICOM_HEAD)[-len(_DICOM_MARK) :]
    upload.file.seek(0)
    if mark != _DICOM_MARK:
        return receive(upload, folder, "submitted", "the label map", (*LABEL_SUFFIXES, SEGMENTATION_SUFFIX))
    path = folder / f"submitted{SEGMENTATION_SUFFIX}"
    with path.open("wb") as file:
        shutil.copyfileobj(upload.file, file)
    return path


def check_received(path: Path, what: str) -> None:
    """Check an uploaded scan before it is kept or used, within the limits of the settings.

    Raises:
        RequestError: 422 if it can't be used; the sentence names what it was sent as, not where it lies here.
    """
    try:
        check_scan(path, current_app().context.settings.intake, shown=what)
    except VolumeError as error:
        # what is wrong with one file of a DICOM series names that file
        raise RequestError(422, str(error).replace(str(path), what)) from error


def known_scan(image: str) -> ScanRecord:
    """The scan that a client calls so.

    Raises:
        ImageNotFoundException: if there is none; clients get 404.
    """
    return current_app().datastore.scan(image)


def known_image(image: str) -> str:
    """The id of the scan that a client calls so; fails as `known_scan` does."""
    return known_scan(image).name


def known_session(session_id: str, *, touch: bool = True) -> Session:
    """The session with this id.

    Args:
        session_id: its id.
        touch: whether it is kept for another while from now on.

    Raises:
        RequestError: 404 if there is none, or no longer.
    """
    session = current_app().sessions.get_session(check_session_id(session_id), update_ts=touch)
    if session is None:
        raise RequestError(404, f"there is no session {session_id!r}; it may have expired.")
    return session


def known_label(label: str, tag: str) -> str:
    """The id of the scan that a client calls so, which has a label map under the tag.

    Raises:
        ImageNotFoundException: if there is no such scan; clients get 404.
        RequestError: 404 if it has no such label map.
    """
    image = known_image(label)
    if not current_app().datastore.get_label_uri(image, tag):
        raise RequestError(404, f"the image {label!r} has no label with the tag {tag!r}.")
    return image


def version_of(scan: str, version: int) -> LabelRecord:
    """A label version of a scan.

    Raises:
        UnknownScan: if there is no such scan; clients get 404.
        RequestError: 404 if the scan has no such version, or it was a removal.
    """
    with open_store().read() as transaction:
        name = scans.get(transaction, scan).name
        found = [label for label in labels.history(transaction, name) if label.id == version]
    if not found or found[0].sha256 is None:
        raise RequestError(404, f"the scan {scan!r} has no label version {version} with voxels.")
    return found[0]


def send_label(label: LabelRecord, actor: Actor | None) -> FileResponse:
    """Send the file of a label version, with the values that clients count by.

    Args:
        label: the version; where an error is planted into it for an annotator, the one that this one gets.
        actor: the annotator; None for a client that does not say.
    """
    context, store = current_app().context, open_store()
    path = store.kept_file(label)
    name, names = f"{label.scan}{suffix_of(path)}", context.labels()
    voxels = proposal_beside_error(context.dataset, label, actor)
    if voxels is None and (label.tag in (LIKELY_ERRORS_TAG, IGNORED) or same_values(names)):
        return FileResponse(path, media_type="application/octet-stream", filename=name)
    voxels = to_client(voxels or store.read_label(label), names)
    handle, delivered = tempfile.mkstemp(prefix="segqc-", suffix=suffix_of(path))
    os.close(handle)
    write_labels(voxels, Path(delivered))
    return SentOnce(delivered, media_type="application/octet-stream", filename=name)
