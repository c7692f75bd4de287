"""The server's log, and what this server refuses of MONAI Label's."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import PlainTextResponse

from segqc.server.errors import RequestError
from segqc.server.parameters import MAX_COUNT

router = APIRouter()


@router.get("/logs/", tags=["Others"], summary="The server's last log lines")
def logs(
    request: Request, lines: Annotated[int, Query(ge=1, le=MAX_COUNT, description="How many.")] = 300
) -> PlainTextResponse:
    """Send the last lines of the server's log."""
    path: Path | None = request.app.state.log_file
    if path is None or not path.is_file():
        raise RequestError(404, "this server writes no log file.")
    with path.open(encoding="utf-8", errors="replace") as file:
        return PlainTextResponse("".join(deque(file, min(lines, 10_000))))


@router.api_route("/proxy/{path:path}", methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)
def proxy(path: str) -> None:
    """Refuse: MONAI Label's way to another DICOMweb server leads nowhere here."""
    raise RequestError(404, "there is no DICOMweb server behind this one; its own scans are served at /dicomweb.")


@router.api_route("/infer/wsi/{model}", methods=["POST"], include_in_schema=False)
@router.api_route("/infer/wsi_v2/{model}", methods=["POST"], include_in_schema=False)
def whole_slide(model: str) -> None:
    """Refuse: MONAI Label's pathology route."""
    raise RequestError(404, "this server segments volumes, no whole-slide images; use /infer/{model}.")
