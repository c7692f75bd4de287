"""Slices as pictures for people: windowed, with square pixels, as JPEG or PNG (DICOM PS3.18, 8.3.5)."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from segqc.server.dicomweb.series import ScanHeader, ScanImages
from segqc.server.errors import RequestError
from segqc.volumes.volume import spacing_of

WindowFunction: TypeAlias = Literal["linear", "linear-exact", "sigmoid"]
THUMBNAIL: Final = (128, 128)
MAX_EDGE: Final = 4096
_FUNCTIONS: Final[tuple[WindowFunction, ...]] = ("linear", "linear-exact", "sigmoid")
_USUAL_QUALITY: Final = 90


@dataclass(frozen=True, slots=True)
class Window:
    """Which intensities are shown between black and white (DICOM PS3.3, C.11.2)."""

    center: float
    width: float
    function: WindowFunction = "linear"

    @classmethod
    def parse(cls, text: str) -> Window:
        """Read ``center,width,function``; the function may be left out.

        Raises:
            RequestError: 400 if it is no window.
        """
        center, width, function = (*text.split(","), "linear")[:3] if text.count(",") in (1, 2) else ("", "", "")
        known = next((f for f in _FUNCTIONS if f == function.strip().lower()), None)
        try:
            numbers = (float(center), float(width))
        except ValueError:
            numbers = (math.nan, math.nan)
        if known is None or not all(map(math.isfinite, numbers)) or not numbers[1] > 0:
            raise RequestError(
                400,
                f"window is center,width,function (of {', '.join(_FUNCTIONS)}; a width above 0), not {text[:80]!r}.",
            )
        return cls(*numbers, known)

    def apply(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Shares of white, from 0 to 1."""
        if self.function == "sigmoid":
            with np.errstate(over="ignore"):
                return np.asarray(1 / (1 + np.exp(-4 * (values - self.center) / self.width)))
        # DICOM's linear function is the exact one of a center half and a width one less
        by = 0.5 if self.function == "linear" and self.width > 1 else 0.0
        low = self.center - by - (self.width - 2 * by) / 2
        return np.clip((values - low) / (self.width - 2 * by), 0, 1)


def parse_viewport(text: str) -> tuple[int, int]:
    """Read ``width,height``, the pixels that a picture may have at most.

    Raises:
        RequestError: 400 if it is none; parts of a picture are not made.
    """
    numbers = text.split(",")
    if len(numbers) != 2 or not all(n.isascii() and n.isdecimal() and len(n) < 9 and int(n) > 0 for n in numbers):
        raise RequestError(400, f"viewport is width,height in pixels, not {text[:80]!r}.")
    return min(int(numbers[0]), MAX_EDGE), min(int(numbers[1]), MAX_EDGE)


def parse_quality(text: str) -> int:
    """Read the quality of a JPEG, from 1 to 100.

    Raises:
        RequestError: 400 if it is none.
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 4 and 1 <= int(text) <= 100):
        raise RequestError(400, f"quality is a whole number from 1 to 100, not {text[:80]!r}.")
    return int(text)


def render(
    header: ScanHeader,
    images: ScanImages,
    index: int,
    media_type: str,
    *,
    window: Window | None = None,
    viewport: tuple[int, int] | None = None,
    quality: int | None = None,
) -> bytes:
    """Make a picture of a slice.

    Args:
        header: of the scan.
        images: its images.
        index: the slice's number.
        media_type: ``image/jpeg`` or ``image/png``.
        window: what is shown between black and white; None for nearly all intensities of the scan.
        viewport: width and height that the picture is fitted into; None for the slice's own size.
        quality: of a JPEG.
    """
    values = images.pixels.values(index)
    if window is None:
        window = Window((images.low + images.high) / 2, (images.high - images.low) or 1.0, "linear-exact")
    shares = window.apply(values)
    picture = Image.fromarray(np.rint(shares * 255).astype(np.uint8))
    size = _size(header, viewport)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    file = io.BytesIO()
    if media_type == "image/png":
        picture.save(file, "PNG")
    else:
        picture.save(file, "JPEG", quality=quality or _USUAL_QUALITY)
    return file.getvalue()


def _size(header: ScanHeader, viewport: tuple[int, int] | None) -> tuple[int, int]:
    """Width and height of a picture with square pixels."""
    _, rows, columns = header.planes.shape
    column_mm, row_mm, _ = spacing_of(header.planes.affine)
    smallest = min(column_mm, row_mm)
    width, height = columns * column_mm / smallest, rows * row_mm / smallest
    most = viewport or (MAX_EDGE, MAX_EDGE)
    scale = min(most[0] / width, most[1] / height)
    if viewport is None:
        scale = min(1.0, scale)
    return max(1, round(width * scale)), max(1, round(height * scale))
