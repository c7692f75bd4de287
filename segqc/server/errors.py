"""A request that cannot be served, as an HTTP status and one clear sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from segqc.errors import SegqcError


class RequestError(SegqcError):
    """A request that is refused.

    Attributes:
        status: the HTTP status, 4xx.
        image: the id of the scan that it is about, where that may be another than the one that the client sent.
    """

    def __init__(self, status: int, message: str, *, image: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.image = image


class Refuse(Protocol):
    """Answers a request that is refused: a program in JSON, a person's browser by a page."""

    def __call__(
        self, request: Request, status: int, message: str, headers: Mapping[str, str] | None = None
    ) -> Response:
        """The answer with a status, a sentence, and headers beside those that it has anyway."""
        ...


def refuse_in_json(
    request: Request, status: int, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The answer for programs; see `Refuse`."""
    return JSONResponse({"detail": message}, status, headers)
