"""Messages of several parts (RFC 2046), as DICOMweb sends and takes DICOM files."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

_BOUNDARY: Final = re.compile(r'boundary="?([^";,\s]{1,200})"?', re.IGNORECASE)
_TYPE: Final = re.compile(rb"^content-type:([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
_MAX_HEADERS: Final = 1 << 14
DICOM: Final = "application/dicom"


def boundary_of(content_type: str) -> bytes | None:
    """What stands between the parts of a message, by its type; None where it has no parts."""
    found = _BOUNDARY.search(content_type)
    is_multipart = content_type.lower().startswith("multipart/")
    return found.group(1).encode() if is_multipart and found is not None else None


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a message: its type and its content; no other header is kept."""

    content_type: str
    content: bytes


def parts(chunks: Iterable[bytes], boundary: bytes) -> Iterator[Part]:
    r"""Split a message into its parts, as it comes.

    Raises:
        ValueError: if it ends before its last part is whole.

    >>> for part in parts([b"--x\r\nContent-Type: a/b\r\n\r\none\r\n-", b"-x\r\n\r\ntwo\r\n--x--"], b"x"):
    ...     print(part)
    Part(content_type='a/b', content=b'one')
    Part(content_type='', content=b'two')
    """
    mark = b"\r\n--" + boundary
    rest = bytearray(b"\r\n")
    looked = 0
    is_first = True
    for chunk in chunks:
        rest += chunk
        while (at := rest.find(mark, looked)) >= 0:
            if not is_first:
                yield _part(bytes(rest[:at]))
            del rest[: at + len(mark)]
            is_first, looked = False, 0
        looked = max(0, len(rest) - len(mark))
    if is_first or not rest.startswith(b"--"):
        raise ValueError("it ended before its last part was whole")


def _part(part: bytes) -> Part:
    end = 0 if part.startswith(b"\r\n\r\n") else part.find(b"\r\n\r\n", 0, _MAX_HEADERS)
    if end < 0:
        raise ValueError("one of its parts has no headers")
    found = _TYPE.search(part, 0, end)
    return Part("" if found is None else found.group(1).decode("latin-1").strip(), part[end + 4 :])


def joined(parts_: Iterable[Part], boundary: bytes) -> Iterator[bytes]:
    """A message of parts, as they come."""
    for part in parts_:
        headers = f"Content-Type: {part.content_type}\r\n" if part.content_type else ""
        head = f"\r\n{headers}Content-Length: {len(part.content)}\r\n\r\n"
        yield b"--" + boundary + head.encode("latin-1")
        yield part.content
        yield b"\r\n"
    yield b"--" + boundary + b"--\r\n"


def message(files: Sequence[bytes]) -> tuple[bytes, str]:
    """A message of DICOM files, and its type."""
    boundary = uuid.uuid4().hex
    pieces = [f"--{boundary}\r\nContent-Type: {DICOM}\r\n\r\n".encode() + file + b"\r\n" for file in files]
    return b"".join(
        [*pieces, f"--{boundary}--\r\n".encode()]
    ), f'multipart/related; type="{DICOM}"; boundary={boundary}'
