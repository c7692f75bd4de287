"""The routes of OHIF, below ``/ohif``: a viewer's files, with our configuration and extension in it."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request, Response

from segqc.server.errors import RequestError
from segqc.server.ohif.files import Asset
from segqc.server.ohif.viewer import INDEX, Viewer

router = APIRouter(include_in_schema=False)

_YEAR: Final = "public, max-age=31536000, immutable"
_ASK: Final = "no-cache"  # kept, but asked for again each time


@router.api_route("/ohif/{path:path}", methods=["GET", "HEAD"])
def ohif(request: Request, path: str) -> Response:
    """Send a file of the viewer; its page for the addresses of its own that it shows scans at."""
    viewer: Viewer | None = request.app.state.viewer
    if viewer is None:
        raise RequestError(
            404, "the installed MONAI Label carries no OHIF; install the version that this server is made for again."
        )
    if path != INDEX and (asset := viewer.files.get(path)) is not None:
        return _send(request, asset)
    if path != INDEX and "." in path.rpartition("/")[2]:
        raise RequestError(404, f"the viewer has no file {path[:200]!r}.")
    return Response(viewer.index, media_type="text/html", headers={"Cache-Control": _ASK})


def _send(request: Request, asset: Asset) -> Response:
    headers = {
        "Cache-Control": _YEAR if asset.is_hashed else _ASK,
        "ETag": asset.tag,
        "Vary": "Accept-Encoding",
        "X-Content-Type-Options": "nosniff",
    }
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    packed = asset.packed() if "gzip" in request.headers.get("accept-encoding", "") else None
    if packed is not None:
        return Response(packed, media_type=asset.media_type, headers={**headers, "Content-Encoding": "gzip"})
    return Response(asset.plain(), media_type=asset.media_type, headers=headers)
