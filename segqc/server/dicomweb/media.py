"""In which form an answer is sent: what a client accepts, and answers of several parts (DICOM PS3.18, 8.4 and 8.7)."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final, Literal, TypeAlias

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydicom.uid import ExplicitVRLittleEndian

from segqc.server.errors import RequestError

BulkType: TypeAlias = Literal["application/octet-stream", "application/dicom"]

JSON_TYPES: Final = ("application/dicom+json", "application/json")
IMAGE_TYPES: Final = ("image/jpeg", "image/png")
_SYNTAXES: Final = ("*", str(ExplicitVRLittleEndian))
_ITEM: Final = re.compile(r'(?:[^,"]|"(?:\\.|[^"\\])*"?)+')
_PARAMETER: Final = re.compile(r'\s*([\w-]+)\s*=\s*(?:"((?:\\.|[^"\\])*)"|([^;"]*))')


@dataclass(frozen=True, slots=True)
class MediaRange:
    """A media type that is accepted, or a pattern of some, with its parameters."""

    type: str
    parameters: Mapping[str, str]

    def fits(self, media_type: str) -> bool:
        """Whether it stands for a type."""
        return _fits(self.type, media_type)


def _fits(pattern: str, media_type: str) -> bool:
    return pattern in ("*/*", media_type, f"{media_type.partition('/')[0]}/*")


def accepted(request: Request) -> list[MediaRange]:
    """What a client accepts, by the query parameter ``accept``, else by its headers: the dearest first."""
    values = request.query_params.getlist("accept") or request.headers.getlist("accept")
    weighed = [found for value in values for item in _ITEM.findall(value) if (found := _media_range(item))]
    if not weighed:
        return [MediaRange("*/*", {})]
    return [media for weight, media in sorted(weighed, key=lambda entry: -entry[0]) if weight > 0]


def _media_range(text: str) -> tuple[float, MediaRange] | None:
    name, _, rest = text.partition(";")
    if not name.strip():
        return None
    found = {m[1].lower(): (m[3] or "").strip() if m[2] is None else m[2] for m in _PARAMETER.finditer(rest)}
    try:
        weight = float(found.get("q", 1))
    except ValueError:
        weight = 1.0
    return weight, MediaRange(name.strip().lower(), found)


def choose(request: Request, offers: Sequence[str]) -> str:
    """The type that an answer is sent in, of some that it can be.

    Raises:
        RequestError: 406 if none of them is accepted.
    """
    for media in accepted(request):
        for offer in offers:
            if media.fits(offer):
                return offer
    raise _not_acceptable(offers)


def wants_parts(request: Request, media_type: BulkType, *, single: bool) -> bool:
    """Whether an answer is sent as a multipart message, which is the usual, or as one single part.

    Args:
        request: the request.
        media_type: of the parts.
        single: whether there is one part only, so that it may be sent alone.

    Raises:
        RequestError: 406 if neither is accepted, or in other transfer syntaxes only.
    """
    for media in accepted(request):
        if media.parameters.get("transfer-syntax", "*") not in _SYNTAXES:
            continue
        if media.fits("multipart/related") and _fits(media.parameters.get("type", "*/*").lower(), media_type):
            return True
        if single and media.fits(media_type):
            return False
    raise _not_acceptable([f'multipart/related; type="{media_type}"', *([media_type] if single else [])])


def _not_acceptable(offers: Sequence[str]) -> RequestError:
    return RequestError(
        406, f"this is sent as {' or '.join(offers)}, pixels in explicit little endian; accept one of these."
    )


def single_part(content: bytes, media_type: BulkType) -> Response:
    """An answer of one part alone."""
    return Response(content, media_type=f"{media_type}; transfer-syntax={ExplicitVRLittleEndian}")


def multipart(parts: Iterable[bytes], media_type: BulkType) -> Response:
    """An answer of several parts, made as they are sent; the first one is made before, so that it may fail."""
    boundary = uuid.uuid4().hex
    made = iter(parts)
    first = next(made)

    def body() -> Iterator[bytes]:
        for part in chain([first], made):
            yield (
                f"--{boundary}\r\nContent-Type: {media_type}; transfer-syntax={ExplicitVRLittleEndian}\r\n"
                f"Content-Length: {len(part)}\r\n\r\n"
            ).encode()
            yield part
            yield b"\r\n"
        yield f"--{boundary}--\r\n".encode()

    return StreamingResponse(body(), media_type=f'multipart/related; type="{media_type}"; boundary={boundary}')
