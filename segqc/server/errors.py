"""A request that cannot be served, as an HTTP status and one clear sentence."""

from __future__ import annotations


class RequestError(Exception):
    """A request that is refused.

    Attributes:
        status: the HTTP status, 4xx.
        message: one sentence: what was wrong, and what to do.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
