"""What a request may name: ids, tags, file names and parameters, checked before anything is read or written."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Final, TypeAlias

from fastapi import Body
from pydantic import AfterValidator, JsonValue

from segqc.server.errors import RequestError
from segqc.volumes import LABEL_SUFFIXES, SCAN_SUFFIXES

JsonObject: TypeAlias = dict[str, JsonValue]

# Letters of any script, digits and what file names of scans commonly hold. No separators, no leading dot or hyphen.
_ID = re.compile(r"\w[\w .,+=@()\[\]-]{0,199}")
_LONGEST_TEXT = 500
# What a file's name should not hold, but the name of a volume in 3D Slicer may: "2: AX T2".
_UNUSABLE = re.compile(r"[^\w .,+=@()\[\]/\\\x00-\x1f\x7f\ud800-\udfff-]")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SESSION = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_FILE_NAME = re.compile(r"[^/\\\x00-\x1f\x7f\ud800-\udfff]+")

# A file's name has 255 bytes in all common file systems: room for a suffix, and for what a store adds to a name.
MAX_ID_BYTES: Final = 200
MAX_JSON_DEPTH: Final = 32
_MAX_INTEGER: Final = 2**63 - 1

# Fields that decide what is read, run or written. They have their own place in a request, `params` does not set them.
RESERVED_PARAMS = frozenset({
    "image", "images", "image_id", "model", "method", "strategy", "label", "session", "description", "bundle_path",
    "result_write_to_file", "local_rank", "network", "path", "id",
})  # fmt: skip

# What MONAI Label's clients send with a training of any server. Devices, data loading and who validates are decided by
# this server's settings; `client_id` says who asks.
FOREIGN_TRAINING_PARAMS = frozenset({
    "name", "pretrained", "device", "early_stop_patience", "val_split", "val_batch_size", "multi_gpu", "gpus",
    "dataset", "dataloader", "tracking", "tracking_uri", "tracking_experiment_name", "run_id",
    "dataset_limit", "dataset_randomize", "amp", "n_saved", "train_random_seed", "val_interval", "client_id",
})  # fmt: skip
IGNORED_REASON = "MONAI Label's parameters that this server has no use for; see [training] in its settings"


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
    base = (name or "").replace("\\", "/").rsplit("/", 1)[-1]
    if not _FILE_NAME.fullmatch(base) or base in (".", "..") or len(base.encode()) > MAX_ID_BYTES:
        raise RequestError(
            400, f"{base[:80]!r} is no usable file name: no control characters, {MAX_ID_BYTES} bytes at most."
        )
    return base


def known(kind: str, name: str, names: Collection[str]) -> str:
    """Return a name that is one of those on offer.

    Raises:
        RequestError: 404 that lists what there is.
    """
    if name not in names:
        listed = sorted(names)
        offer = f"there are: {', '.join(listed)}" if len(listed) <= 20 else f"there are {len(listed)} others"
        shown = name if len(name) <= 80 else f"{name[:80]}..."
        raise RequestError(404, f"there is no {kind} {shown!r}{f'; {offer}' if listed else ''}.")
    return name


def file_suffix(name: str | None, what: str, suffixes: Sequence[str] = SCAN_SUFFIXES) -> str:
    """The suffix of an uploaded file's name.

    Raises:
        RequestError: 415 if it is none of the formats that are read.
    """
    base = (name or "").replace("\\", "/").rsplit("/", 1)[-1]
    found = max((s for s in LABEL_SUFFIXES if base.lower().endswith(s)), key=len, default=None)
    if found is not None and found in suffixes:
        return found
    raise RequestError(415, f"{what} {base[:80]!r} is not of a readable format; send {', '.join(suffixes)}.")


def json_object(text: str | None, field: str) -> JsonObject:
    """Parse a form field that holds a JSON object; an empty field is an empty object.

    Raises:
        RequestError: 400 if it is not JSON, or not an object.
    """
    if not text or not text.strip():
        return {}
    try:
        value = check_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the field {field!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(400, f"the field {field!r} is not a JSON object but {type(value).__name__}.")
    return value


def check_json(value: JsonValue, depth: int = 0) -> JsonValue:
    """Return a value that every database and every client can read: Python's own JSON allows more.

    Raises:
        ValueError: if it holds NaN, an infinite number, an integer of more than 64 bits, a character that is none
            (a lone surrogate or NUL), or is nested too deep.
    """
    if depth > MAX_JSON_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH} levels")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a JSON number")
    if isinstance(value, int) and not -_MAX_INTEGER <= value <= _MAX_INTEGER:
        raise ValueError("it holds an integer of more than 64 bits")
    if isinstance(value, str):
        _check_text(value)
    if isinstance(value, list):
        for item in value:
            check_json(item, depth + 1)
    if isinstance(value, dict):
        for key, item in value.items():
            _check_text(key)
            check_json(item, depth + 1)
    return value


def _check_text(text: str) -> None:
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("it holds a character that is none (NUL or half of a surrogate pair)")


def _checked_object(value: JsonObject | None) -> JsonObject | None:
    check_json(value)
    return value


# The body of a request: parameters that depend on what is asked for, by name.
Params: TypeAlias = Annotated[JsonObject | None, Body(), AfterValidator(_checked_object)]


def choose_params(params: Mapping[str, JsonValue], allowed: Collection[str]) -> JsonObject:
    """Keep the parameters that a call understands; others are ignored, as clients send what other servers know.

    Raises:
        RequestError: 400 if a parameter tries to set a field that has its own place in the request.
    """
    forbidden = sorted(RESERVED_PARAMS & params.keys() - set(allowed))
    if forbidden:
        raise RequestError(400, f"params may not set {', '.join(map(repr, forbidden))}: it has its own field.")
    return {key: value for key, value in params.items() if key in allowed}


def refuse_unknown(params: Mapping[str, JsonValue], understood: Collection[str], what: str) -> None:
    """Refuse parameters that nobody understands: a misspelt one must not be dropped silently.

    Raises:
        RequestError: 400 that names them and lists what there is.
    """
    unknown = sorted(set(params) - set(understood))
    if unknown:
        named = ", ".join(repr(name[:60]) for name in unknown[:5])
        listed = ", ".join(sorted(set(understood) - FOREIGN_TRAINING_PARAMS))
        raise RequestError(400, f"there is no {what} {named}; there are: {listed}.")


def text_param(params: Mapping[str, JsonValue], name: str) -> str | None:
    """A parameter that is a short text; None where it is missing or empty.

    Raises:
        RequestError: 400 if it is something else, or longer than 500 characters.
    """
    value = params.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or not value.isprintable():
        raise RequestError(400, f"{name} is not a line of text of at most {_LONGEST_TEXT} characters.")
    return value
