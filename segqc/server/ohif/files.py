"""The files of an OHIF and ours for it, as a server sends them: by name, compressed, and with what browsers may keep."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from segqc.server.dicomweb.cache import BoundedCache

MEDIA_TYPES: Final[Mapping[str, str]] = {
    ".css": "text/css",
    ".html": "text/html",
    ".ico": "image/x-icon",
    ".jpg": "image/jpeg",
    ".js": "text/javascript",
    ".json": "application/json",
    ".mjs": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".ttf": "font/ttf",
    ".txt": "text/plain",
    ".wasm": "application/wasm",
    ".woff": "font/woff",
    ".woff2": "font/woff2",
    ".xml": "text/xml",
}
_COMPRESSIBLE: Final = frozenset({".css", ".html", ".js", ".json", ".mjs", ".svg", ".txt", ".wasm", ".xml", ".ttf"})
_HASHED: Final = re.compile(r"[.\b]?[0-9a-f]{20}\.")
_CACHE_BYTES: Final = 32e6
_GZIP_LEVEL: Final = 6
PACKED: Final = ".gz"

_packed: BoundedCache[tuple[Path, int, int], bytes] = BoundedCache(_CACHE_BYTES, len)


@dataclass(frozen=True, slots=True)
class Asset:
    """A file that browsers ask for.

    Attributes:
        name: its name.
        path: where its content lies: under its name, or compressed, with ``.gz`` after it.
    """

    name: str
    path: Path

    @property
    def is_packed(self) -> bool:
        """Whether it lies there compressed."""
        return self.path.suffix == PACKED and not self.name.endswith(PACKED)

    @property
    def media_type(self) -> str:
        """Its media type."""
        return MEDIA_TYPES.get(Path(self.name).suffix, "application/octet-stream")

    @property
    def is_text(self) -> bool:
        """Whether its type names a character set."""
        return self.media_type.startswith("text/")

    @property
    def is_hashed(self) -> bool:
        """Whether its name changes with its content, so that browsers may keep it."""
        return _HASHED.search(self.name) is not None

    @property
    def tag(self) -> str:
        """What changes with its content, as an ETag."""
        found = self.path.stat()
        return f'W/"{found.st_mtime_ns:x}-{found.st_size:x}"'

    def plain(self) -> bytes:
        """Its content."""
        content = self.path.read_bytes()
        return gzip.decompress(content) if self.is_packed else content

    def packed(self) -> bytes | None:
        """Its content, compressed by gzip; None where that gains nothing."""
        if self.is_packed:
            return self.path.read_bytes()
        if self.path.suffix not in _COMPRESSIBLE:
            return None
        found = self.path.stat()
        key = self.path, found.st_mtime_ns, found.st_size
        return _packed.get(key, lambda: gzip.compress(self.path.read_bytes(), _GZIP_LEVEL, mtime=0))


def assets(folder: Path) -> dict[str, Asset]:
    """The files below a folder, by the names that addresses have: what is not listed cannot be asked for."""
    return {asset.name: asset for asset in _files(folder)}


def _files(folder: Path) -> Iterator[Asset]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield Asset(path.relative_to(folder).as_posix().removesuffix(PACKED), path)
