"""What a request may name: ids, tags, file names and parameters, checked before anything is read or written."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import TypeAlias

from pydantic import JsonValue

from segqc.server.errors import RequestError
from segqc.volumes import SCAN_SUFFIXES

JsonObject: TypeAlias = dict[str, JsonValue]

# Letters of any script, digits and what file names of scans commonly hold. No separators, no leading dot or hyphen.
_ID = re.compile(r"\w[\w .,+=@()\[\]-]{0,199}")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SESSION = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# Fields that decide what is read, run or written. They have their own place in a request, `params` does not set them.
RESERVED_PARAMS = frozenset({
    "image", "images", "image_id", "model", "method", "strategy", "label", "session", "description", "bundle_path",
    "result_write_to_file", "local_rank", "network", "path", "id",
})  # fmt: skip


def check_image_id(image: str) -> str:
    """Return the id of a scan to be stored.

    Raises:
        RequestError: 400 if it could be anything but a file's name.
    """
    if not _ID.fullmatch(image) or ".." in image or image.endswith((".", " ")):
        raise RequestError(
            400, f"{image!r} is not a usable image id: letters, digits and ' .,+=@()[]-_' only, no path and no '..'."
        )
    return image


def check_tag(tag: str) -> str:
    """Return a label tag.

    Raises:
        RequestError: 400 if it could be anything but a folder's name.
    """
    if not _TAG.fullmatch(tag):
        raise RequestError(400, f"{tag!r} is not a usable label tag: letters, digits, '-' and '_' only, 64 at most.")
    return tag


def check_session_id(session: str) -> str:
    """Return a session's id.

    Raises:
        RequestError: 404 if no session can have this id.
    """
    if not _SESSION.fullmatch(session):
        raise RequestError(404, f"there is no session {session!r}.")
    return session


def known(kind: str, name: str, names: Collection[str]) -> str:
    """Return a name that is one of those on offer.

    Raises:
        RequestError: 404 that lists what there is.
    """
    if name not in names:
        listed = sorted(names)
        offer = f"there are: {', '.join(listed)}" if len(listed) <= 20 else f"there are {len(listed)} others"
        raise RequestError(404, f"there is no {kind} {name!r}; {offer}." if listed else f"there is no {kind} {name!r}.")
    return name


def file_suffix(name: str | None, what: str) -> str:
    """The suffix of an uploaded file's name.

    Raises:
        RequestError: 415 if it is no format that scans and label maps are read from.
    """
    base = (name or "").replace("\\", "/").rsplit("/", 1)[-1]
    for suffix in SCAN_SUFFIXES:
        if base.lower().endswith(suffix):
            return suffix
    raise RequestError(415, f"{what} {base!r} is not of a readable format; send {', '.join(SCAN_SUFFIXES)}.")


def json_object(text: str | None, field: str) -> JsonObject:
    """Parse a form field that holds a JSON object; an empty field is an empty object.

    Raises:
        RequestError: 400 if it is not JSON, or not an object.
    """
    if not text or not text.strip():
        return {}
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the field {field!r} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise RequestError(400, f"the field {field!r} is not a JSON object but {type(value).__name__}.")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def choose_params(params: Mapping[str, JsonValue], allowed: Collection[str]) -> JsonObject:
    """Keep the parameters that a call understands; others are ignored, as clients send what other servers know.

    Raises:
        RequestError: 400 if a parameter tries to set a field that has its own place in the request.
    """
    forbidden = sorted(RESERVED_PARAMS & params.keys() - set(allowed))
    if forbidden:
        raise RequestError(400, f"params may not set {', '.join(map(repr, forbidden))}: it has its own field.")
    return {key: value for key, value in params.items() if key in allowed}
