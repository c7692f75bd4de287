"""What a request may name: ids, tags, file names and parameters, checked before anything is read or written."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import TypeAlias

from pydantic import JsonValue

from segqc.server.errors import RequestError
from segqc.volumes import FILE_SUFFIXES

JsonObject: TypeAlias = dict[str, JsonValue]

# Letters of any script, digits and what file names of scans commonly hold. No separators, no leading dot or hyphen.
_ID = re.compile(r"\w[\w .,+=@()\[\]-]{0,199}")
_LONGEST_TEXT = 500
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SESSION = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

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
    for suffix in FILE_SUFFIXES:
        if base.lower().endswith(suffix):
            return suffix
    raise RequestError(415, f"{what} {base!r} is not of a readable format; send {', '.join(FILE_SUFFIXES)}.")


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
