"""Files for browsers: by the names that addresses have, compressed once, and with what tells their content."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from segqc.server.dicomweb.cache import BoundedCache

Edit: TypeAlias = Callable[[str], str]

PACKED: Final = ".gz"
"""What the name of a file that lies there compressed ends with."""
COMPRESSIBLE: Final = frozenset({".css", ".html", ".js", ".json", ".svg", ".ttf", ".txt", ".wasm", ".xml"})
_MEDIA_TYPES: Final[Mapping[str, str]] = {
    ".css": "text/css",
    ".html": "text/html",
    ".ico": "image/x-icon",
    ".jpg": "image/jpeg",
    ".js": "text/javascript",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".ttf": "font/ttf",
    ".txt": "text/plain",
    ".wasm": "application/wasm",
    ".woff": "font/woff",
    ".woff2": "font/woff2",
    ".xml": "text/xml",
}
_HASHED: Final = re.compile(r"(^|[./])([0-9a-f]{16}|[0-9a-f]{20})\.[a-z0-9]+$")
_CACHE_BYTES: Final = 32e6  # an OHIF has 8 MB
_LEVEL: Final = 6  # a higher one takes twice the time for a hundredth of the size

_packed: BoundedCache[tuple[Path, str], bytes] = BoundedCache(_CACHE_BYTES, len)


def compress(content: bytes) -> bytes:
    """Compress a file's content, to the same bytes each time."""
    return gzip.compress(content, _LEVEL, mtime=0)


@dataclass(frozen=True, slots=True)
class Asset:
    """A file that browsers ask for.

    Attributes:
        name: its name in addresses.
        path: where its content lies: as it is, or compressed, with ``.gz`` after its name.
        edit: what is changed of its text before it is sent.
    """

    name: str
    path: Path
    edit: Edit | None = None

    @property
    def media_type(self) -> str:
        """Its media type."""
        return _MEDIA_TYPES.get(Path(self.name).suffix, "application/octet-stream")

    @property
    def is_hashed(self) -> bool:
        """Whether its name changes with its content, so that browsers may keep it."""
        return _HASHED.search(self.name) is not None

    @property
    def tag(self) -> str:
        """What changes with its content."""
        found = self.path.stat()
        return f"{found.st_mtime_ns:x}-{found.st_size:x}"

    def content(self) -> bytes:
        """Its content."""
        content = self.path.read_bytes()
        if self._lies_packed:
            content = gzip.decompress(content)
        return content if self.edit is None else self.edit(content.decode()).encode()

    def packed(self) -> bytes | None:
        """Its content, compressed by gzip; None where that gains nothing."""
        if self._lies_packed and self.edit is None:
            return self.path.read_bytes()
        if Path(self.name).suffix not in COMPRESSIBLE:
            return None
        return _packed.get((self.path, self.tag), lambda: compress(self.content()))

    @property
    def _lies_packed(self) -> bool:
        return self.path.name.endswith(PACKED)


def assets(folder: Path, edits: Mapping[str, Edit] | None = None) -> dict[str, Asset]:
    """The files below a folder, by name: what is not among them cannot be asked for.

    Args:
        folder: the folder.
        edits: what is changed of their texts, by the ends of their names.
    """
    changed = edits or {}
    return {
        name: Asset(name, path, changed.get(Path(name).suffix))
        for path in _files(folder)
        for name in (path.relative_to(folder).as_posix().removesuffix(PACKED),)
    }


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
