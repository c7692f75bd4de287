"""Messages of several parts (RFC 2046), as DICOMweb sends and takes DICOM files."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

_BOUNDARY: Final = re.compile(r'boundary="?([^";,\s]{1,200})"?', re.IGNORECASE)
_MAX_HEADERS: Final = 1 << 14
DICOM: Final = "application/dicom"


def boundary_of(content_type: str) -> bytes | None:
    """What stands between the parts of a message, by its type; None where it has no parts."""
    found = _BOUNDARY.search(content_type)
    is_multipart = content_type.lower().startswith("multipart/")
    return found.group(1).encode() if is_multipart and found is not None else None


def parts(chunks: Iterable[bytes], boundary: bytes) -> Iterator[bytes]:
    r"""Split a message into the contents of its parts, as it comes.

    Raises:
        ValueError: if it ends before its last part is whole.

    >>> list(parts([b"--x\r\nA: b\r\n\r\none\r\n-", b"-x\r\n\r\ntwo\r\n--x--"], b"x"))
    [b'one', b'two']
    """
    mark = b"\r\n--" + boundary
    rest = bytearray(b"\r\n")
    looked = 0
    is_first = True
    for chunk in chunks:
        rest += chunk
        while (at := rest.find(mark, looked)) >= 0:
            if not is_first:
                yield _content(bytes(rest[:at]))
            del rest[: at + len(mark)]
            is_first, looked = False, 0
        looked = max(0, len(rest) - len(mark))
    if is_first or not rest.startswith(b"--"):
        raise ValueError("it ended before its last part was whole")


def _content(part: bytes) -> bytes:
    """A part without its headers."""
    if part.startswith(b"\r\n\r\n"):
        return part[4:]
    end = part.find(b"\r\n\r\n", 0, _MAX_HEADERS)
    if end < 0:
        raise ValueError("one of its parts has no headers")
    return part[end + 4 :]


def message(files: Sequence[bytes]) -> tuple[bytes, str]:
    """A message of DICOM files, and its type."""
    boundary = uuid.uuid4().hex
    pieces = [f"--{boundary}\r\nContent-Type: {DICOM}\r\n\r\n".encode() + file + b"\r\n" for file in files]
    return b"".join(
        [*pieces, f"--{boundary}--\r\n".encode()]
    ), f'multipart/related; type="{DICOM}"; boundary={boundary}'
