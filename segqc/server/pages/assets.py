"""The files that pages are made of beside their HTML, served from memory under an address that changes with them."""

from __future__ import annotations

import hashlib
import mimetypes
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import fastapi_offline
from fastapi import APIRouter, Header
from fastapi.responses import Response

from segqc.server.errors import RequestError

router = APIRouter(include_in_schema=False)

ADDRESS: Final = "/pages/assets"
_FOR_EVER: Final = "public, max-age=31536000, immutable"
_OWN: Final = Path(__file__).with_name("static")
_API: Final = Path(fastapi_offline.__file__).with_name("static")
_OF_API: Final = ("swagger-ui-bundle.js", "swagger-ui.css")


@dataclass(frozen=True, slots=True)
class Asset:
    """A file as it is sent."""

    content: bytes
    media_type: str
    tag: str


def _asset(path: Path) -> Asset:
    content = path.read_bytes()
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return Asset(content, kind, hashlib.sha256(content).hexdigest()[:12])


_ASSETS: Final = {
    path.name: _asset(path) for path in (*sorted(_OWN.iterdir()), *(_API / name for name in _OF_API)) if path.is_file()
}


def address(name: str) -> str:
    """Where a file is fetched from."""
    return f"{ADDRESS}/{_ASSETS[name].tag}/{name}"


@router.get(f"{ADDRESS}/{{tag}}/{{name}}")
def asset(tag: str, name: str, if_none_match: Annotated[str | None, Header()] = None) -> Response:
    """Send a file; under the address of another version of it, the one that there is."""
    found = _ASSETS.get(name)
    if found is None:
        raise RequestError(404, f"there is no file {name[:80]!r}.")
    headers = {
        "Cache-Control": _FOR_EVER if tag == found.tag else "no-cache",
        "ETag": f'"{found.tag}"',
        "X-Content-Type-Options": "nosniff",
    }
    if if_none_match == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media_type, headers=headers)
