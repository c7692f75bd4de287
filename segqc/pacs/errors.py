"""What goes wrong with a PACS."""

from __future__ import annotations

from segqc.store.sources import SourceUnavailable


class PacsUnavailable(SourceUnavailable):
    """The PACS does not answer, or not now."""


class PacsRefused(SourceUnavailable):
    """The PACS answers, but not with what was asked for.

    Attributes:
        code: the HTTP status of its answer; None where the answer itself cannot be used.
    """

    status = 502

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code
