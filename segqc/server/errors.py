"""A request that cannot be served, as an HTTP status and one clear sentence."""

from __future__ import annotations

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
