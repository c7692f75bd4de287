"""The routes of OHIF, below ``/ohif``: a viewer's files, with our configuration and extension in it."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request, Response

from segqc.server.errors import RequestError
from segqc.server.ohif.files import Asset
from segqc.server.ohif.viewer import INDEX, Viewer

router = APIRouter(include_in_schema=False)

_KEEP: Final = "public, max-age=31536000, immutable"
_ASK_AGAIN: Final = "no-cache"


@router.api_route("/ohif/{path:path}", methods=["GET", "HEAD"])
def ohif(request: Request, path: str) -> Response:
    """Send a file of the viewer, and its page at the addresses where it shows scans."""
    viewer: Viewer | None = request.app.state.viewer
    if viewer is None:
        raise RequestError(
            404, "the installed MONAI Label carries no OHIF; install segqc's server again, or an OHIF by 'segqc ohif'."
        )
    asset = viewer.files.get(path)
    if asset is None:
        if "." in path.rpartition("/")[2]:
            raise RequestError(404, f"the viewer has no file {path[:200]!r}.")
        asset = viewer.files[INDEX]
    return _send(request, asset, viewer.policy)


def _send(request: Request, asset: Asset, policy: str) -> Response:
    tag = f'W/"{asset.tag}"'
    headers = {
        "Cache-Control": _KEEP if asset.is_hashed else _ASK_AGAIN,
        "Content-Security-Policy": policy,
        "ETag": tag,
        "Referrer-Policy": "same-origin",
        "Vary": "Accept-Encoding",
        "X-Content-Type-Options": "nosniff",
    }
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    packed = asset.packed() if "gzip" in request.headers.get("accept-encoding", "") else None
    if packed is None:
        return Response(asset.content(), media_type=asset.media_type, headers=headers)
    return Response(packed, media_type=asset.media_type, headers={**headers, "Content-Encoding": "gzip"})
