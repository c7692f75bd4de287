"""What every request passes first: no foreign web page, and no body over the limit."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Guard:
    """ASGI middleware.

    A page of another site that is open in an annotator's browser could send requests to a server on the same machine;
    browsers name the page's origin, and any but the server's own and the configured ones is refused.
    """

    def __init__(self, app: ASGIApp, *, upload_limit_bytes: int, origins: Collection[str] = ()) -> None:
        self._app = app
        self._limit = upload_limit_bytes
        self._origins = frozenset(origin.rstrip("/") for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 403 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        own = origin is None or urlsplit(origin).netloc == headers.get("host")
        if not own and origin not in self._origins:
            message = f"pages of {origin} are not served; name it in MONAI_LABEL_CORS_ORIGINS to allow it."
            await JSONResponse({"detail": message}, 403)(scope, receive, send)
            return
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._limit:
            await JSONResponse({"detail": self._too_large()}, 413)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:  # sent in chunks, without a length
                raise HTTPException(413, self._too_large())
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> str:
        return f"the request is larger than the {self._limit / 1e6:.0f} MB that this server takes."
