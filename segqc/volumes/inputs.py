"""Files as they are read: no further than their header promises and the limits allow, and in bounded time."""

from __future__ import annotations

import bz2
import contextlib
import time
import zlib
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from segqc.volumes.limits import ReadLimits
from segqc.volumes.volume import VolumeError

Compression: TypeAlias = Literal["none", "deflate", "bzip2"]

MAX_HEADER_BYTES: Final = 1 << 24
"""What may lie before the voxels: a header with its extensions, or what an NRRD header says to skip."""
_MAX_REST_BYTES: Final = 1 << 20  # what may follow the voxels
_MAX_DEFLATE_RATIO: Final = 1040  # deflate reaches 1032
_FILE_CHUNK: Final = 1 << 16
_CHUNK: Final = 1 << 20
_FIRST_CHUNK: Final = 1 << 12
_MAX_FINDING: Final = 500
_MAX_WORD_BYTES: Final = 1 << 10
_GZIP_MAGIC: Final = b"\x1f\x8b"
_BZIP2_MAGIC: Final = b"BZh"


class InputFile:
    """A file that is read, how the user knows it, and what its reading may cost.

    Attributes:
        path: the file.
        shown: what messages name it.
        limits: bounds on its size, and on the time from now on that reading it takes.
    """

    def __init__(self, path: Path, limits: ReadLimits | None = None, shown: str | None = None) -> None:
        self.path = path
        self.shown = str(path) if shown is None else shown
        self.limits = limits or ReadLimits()
        self._deadline = time.monotonic() + self.limits.max_seconds

    def error(self, finding: str) -> VolumeError:
        """Return the error to raise for a finding, shortened where a file's own text makes it long."""
        if len(finding) > _MAX_FINDING:
            half = _MAX_FINDING // 2
            finding = f"{finding[:half]}...{finding[-half:]}"
        return VolumeError(f"{self.shown}: {finding}")

    def check_time(self) -> None:
        """Raise a VolumeError if reading has taken too long."""
        if time.monotonic() > self._deadline:
            raise self.error(
                f"takes longer than {self.limits.max_seconds:g} s to read; give a smaller file, or raise the limit."
            )

    def check_size(self, sizes: Sequence[int]) -> None:
        """Raise a VolumeError if an array of these sizes holds more voxels than the limits allow."""
        if prod(sizes) > self.limits.max_voxels:
            raise self.error(
                f"has {' x '.join(map(str, sizes))} voxels, more than the limit of {self.limits.max_voxels}; "
                "give a smaller volume, or raise the limit."
            )

    @contextlib.contextmanager
    def within_memory(self) -> Iterator[None]:
        """Make running out of memory an error of this file."""
        try:
            yield
        except MemoryError as error:
            raise self.error("is too large for this machine's memory; give a smaller volume.") from error

    @contextlib.contextmanager
    def open(self, compression: Compression = "none", start: int = 0) -> Iterator[ByteStream]:
        """Open the file's content, decompressed, from a byte of the file on.

        Raises:
            VolumeError: also for what goes wrong while the stream is read.
        """
        try:
            with self.path.open("rb") as raw:
                raw.seek(start)
                yield ByteStream(self, iter(lambda: raw.read(_FILE_CHUNK), b""), compression)
        except (OSError, EOFError, zlib.error) as error:
            raise self.error(f"is truncated or damaged ({error}); copy the file again.") from error


class ByteStream:
    """The bytes of an input file, decompressed piece by piece."""

    def __init__(self, file: InputFile, chunks: Iterator[bytes], compression: Compression) -> None:
        """Read from the compressed chunks of a file."""
        self._file = file
        self._compression = compression
        self._chunks = chunks
        if compression != "none":
            self._chunks = _inflate(chunks) if compression == "deflate" else _bunzip(chunks)
        self._rest = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Read so many bytes, or what is left of them."""
        pieces = []
        while size > 0 and self._more():
            piece = self._take(size)
            pieces.append(bytes(piece))
            size -= len(piece)
        return b"".join(pieces)

    def skip(self, size: int, what: str) -> None:
        """Pass over bytes before the voxels.

        Args:
            size: how many.
            what: what the header calls them.

        Raises:
            VolumeError: if they are negative, too many, or more than there are.
        """
        self._check_skip(size, what)
        while size > 0:
            if not self._more():
                raise self._ended(what)
            size -= len(self._take(size))

    def skip_lines(self, count: int, what: str) -> int:
        """Pass over lines before the voxels; returns how many bytes they are.

        Raises:
            VolumeError: as `skip`.
        """
        self._check_skip(min(count, 0), what)
        passed = 0
        while count > 0:
            if not self._more():
                raise self._ended(what)
            ends = np.flatnonzero(np.frombuffer(self._rest, np.uint8) == ord("\n"))[:count]
            count -= len(ends)
            passed += len(self._take(int(ends[-1]) + 1 if count == 0 else len(self._rest)))
            self._check_skip(passed, what)
        return passed

    def voxels(self, size: int) -> npt.NDArray[np.uint8]:
        """Read the voxels' bytes, and the stream to its end, so that its checksum is verified.

        Raises:
            VolumeError: if there are fewer, or much more follows.
        """
        if self._compression == "deflate":
            self._check_promise(size, _MAX_DEFLATE_RATIO)
        elif self._compression == "none":
            self._check_promise(size, 1)
        array = np.empty(size, np.uint8)
        done = 0
        while done < size and self._more():
            piece = self._take(size - done)
            array[done : done + len(piece)] = piece
            done += len(piece)
        if done < size:
            raise self._truncated(done, size)
        rest = len(self._rest)
        for chunk in self._chunks:
            self._file.check_time()
            rest += len(chunk)
            if rest > _MAX_REST_BYTES:
                raise self._file.error("holds more bytes than its header promises; repair the header.")
        return array

    def last_voxels(self, size: int, what: str) -> npt.NDArray[np.uint8]:
        """Read the stream to its end, and return the voxels' bytes, which come last.

        Raises:
            VolumeError: if there are fewer, or too many come before.
        """
        content = self.read(size + MAX_HEADER_BYTES + 1)
        if len(content) < size:
            raise self._truncated(len(content), size)
        self._check_skip(len(content) - size, what)
        return np.frombuffer(content[len(content) - size :], np.uint8)

    def numbers(self, count: int) -> npt.NDArray[np.float64]:
        """Read voxels that are written as text.

        Raises:
            VolumeError: if there are fewer, or something else is among them.
        """
        found: list[npt.NDArray[np.float64]] = []
        missing, begun = count, b""
        while missing > 0:
            more = self._more()
            text = begun + bytes(self._take(len(self._rest)))
            words = text.split()
            begun = words.pop() if more and words and not text[-1:].isspace() else b""
            try:
                found.append(np.array(words[:missing], dtype=np.float64))
            except ValueError as error:
                raise self._file.error("holds text that is no number; copy the file again.") from error
            missing -= len(found[-1])
            if (missing and not more) or len(begun) > _MAX_WORD_BYTES:
                raise self._truncated(count - missing, count, "numbers")
        return np.concatenate(found)

    def _more(self) -> bool:
        while not self._rest:
            self._file.check_time()
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._rest = memoryview(chunk)
        return True

    def _take(self, size: int) -> memoryview:
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece

    def _check_promise(self, size: int, ratio: int) -> None:
        possible = self._file.path.stat().st_size * ratio
        if size > possible:
            raise self._truncated(min(possible, size), size)

    def _check_skip(self, size: int, what: str) -> None:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise self._file.error(
                f"has the {what} {size}, and from 0 to {MAX_HEADER_BYTES} bytes may come before the voxels; "
                "repair the header."
            )

    def _ended(self, what: str) -> VolumeError:
        return self._file.error(f"ends before the voxels begin, by its {what}; copy the file again.")

    def _truncated(self, found: int, wanted: int, what: str = "bytes of voxels") -> VolumeError:
        return self._file.error(f"is truncated, {found} of {wanted} {what} are there; copy the file again.")


def _inflate(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Expand gzip members, one after the other, or a zlib stream; what follows them is passed over."""
    member = zlib.decompressobj(32 | zlib.MAX_WBITS)
    most = _FIRST_CHUNK  # whoever wants the header only does not wait for more
    for chunk in chunks:
        data = chunk
        while data:
            if member.eof:
                if not data.startswith(_GZIP_MAGIC[: len(data)]):
                    return
                member = zlib.decompressobj(32 | zlib.MAX_WBITS)
            if expanded := member.decompress(data, most):
                yield expanded
            most = _CHUNK
            data = member.unused_data if member.eof else member.unconsumed_tail
    while not member.eof:
        expanded = member.decompress(b"", _CHUNK)
        if not expanded:
            raise EOFError("the compressed data end too early")
        yield expanded


def _bunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Expand bzip2 streams, one after the other; what follows them is passed over."""
    stream = bz2.BZ2Decompressor()
    for chunk in chunks:
        data = chunk
        while data or not (stream.needs_input or stream.eof):
            if stream.eof:
                if not data.startswith(_BZIP2_MAGIC[: len(data)]):
                    return
                stream = bz2.BZ2Decompressor()
            if expanded := stream.decompress(data, _CHUNK):
                yield expanded
            data = stream.unused_data if stream.eof else b""
    if not stream.eof:
        raise EOFError("the compressed data end too early")
