"""What scans, labels, sessions and uploaded files may be called: checked before anything is read or written."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from typing import Final, TypeVar

from segqc.server.errors import RequestError
from segqc.volumes import LABEL_SUFFIXES, SCAN_SUFFIXES

Name = TypeVar("Name", bound=str)

# Letters of any script, digits and what file names of scans commonly hold. No separators, no leading dot or hyphen.
_ID: Final = re.compile(r"\w[\w .,+=@()\[\]-]{0,199}")
# What a file's name should not hold, but the name of a volume in 3D Slicer may: "2: AX T2".
_UNUSABLE: Final = re.compile(r"[^\w .,+=@()\[\]/\\\x00-\x1f\x7f\ud800-\udfff-]")
_TAG: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SESSION: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_FILE_NAME: Final = re.compile(r"[^/\\\x00-\x1f\x7f\ud800-\udfff]+")

# A file's name has 255 bytes in all common file systems: room for a suffix, and for what a store adds to a name.
MAX_ID_BYTES: Final = 200


def usable_image_id(name: str) -> str:
    """Return the id of a scan that a client calls so: 3D Slicer goes on using its own name of a volume.

    Letters and their accents become one, as some systems write them apart. Path separators and control characters
    stay, to be refused.
    """
    return _UNUSABLE.sub("_", unicodedata.normalize("NFC", name))


def check_image_id(image: str) -> str:
    """Return the id of a scan to be stored.

    Raises:
        RequestError: 400 if it could be anything but a file's name.
    """
    if not _ID.fullmatch(image) or ".." in image or image.endswith((".", " ")):
        raise RequestError(
            400,
            f"{image[:80]!r} is not a usable image id: letters, digits and ' .,+=@()[]-_' only, no path and no '..'.",
        )
    if len(image.encode()) > MAX_ID_BYTES:
        raise RequestError(400, f"the image id {image[:20]!r}... has more than {MAX_ID_BYTES} bytes in UTF-8.")
    return image


def check_tag(tag: str) -> str:
    """Return a label tag.

    Raises:
        RequestError: 400 if it could be anything but a folder's name.
    """
    if not _TAG.fullmatch(tag):
        raise RequestError(
            400, f"{tag[:80]!r} is not a usable label tag: letters, digits, '-' and '_' only, 64 at most."
        )
    return tag


def check_session_id(session: str) -> str:
    """Return a session's id.

    Raises:
        RequestError: 404 if no session can have this id.
    """
    if not _SESSION.fullmatch(session):
        raise RequestError(404, f"there is no session {session[:80]!r}.")
    return session


def check_file_name(name: str | None) -> str:
    """Return the last part of an uploaded file's name, under which it is kept.

    Raises:
        RequestError: 400 if no file can have this name.
    """
    base = _base_name(name)
    if not _FILE_NAME.fullmatch(base) or base in (".", "..") or len(base.encode()) > MAX_ID_BYTES:
        raise RequestError(
            400, f"{base[:80]!r} is no usable file name: no control characters, {MAX_ID_BYTES} bytes at most."
        )
    return base


def split_suffix(name: str | None, what: str, suffixes: Sequence[str] = SCAN_SUFFIXES) -> tuple[str, str]:
    """The last part of an uploaded file's name, as what comes before its suffix, and the suffix in lower case.

    3D Slicer sends scans by the suffix that is set for labels: where only scans are read, ``.seg.nrrd`` is ``.nrrd``.

    Raises:
        RequestError: 415 if the suffix is none of the formats that are read.
    """
    base = _base_name(name)
    found = max((s for s in {*LABEL_SUFFIXES, *suffixes} if base.lower().endswith(s)), key=len, default=None)
    if found is not None and found in suffixes:
        return base[: -len(found)], found
    if found == ".seg.nrrd" and ".nrrd" in suffixes:
        return base[: -len(found)], ".nrrd"
    raise RequestError(415, f"{what} {base[:80]!r} is not of a readable format; send {', '.join(suffixes)}.")


def _base_name(name: str | None) -> str:
    return (name or "").replace("\\", "/").rsplit("/", 1)[-1]


def known(kind: str, name: str, names: Collection[Name]) -> Name:
    """Return a name that is one of those on offer.

    Raises:
        RequestError: 404 that lists what there is.
    """
    for own in names:
        if own == name:
            return own
    listed = sorted(names)
    offer = f"there are: {', '.join(listed)}" if len(listed) <= 20 else f"there are {len(listed)} others"
    shown = name if len(name) <= 80 else f"{name[:80]}..."
    raise RequestError(404, f"there is no {kind} {shown!r}{f'; {offer}' if listed else ''}.")
