"""Slices as pictures: the scan with the contours of a label map, the likely errors as heat and as boxes.

The pictures are cut to where something is drawn in any slice of the scan, so that all of them show the same place, and
turned as DICOMweb turns them. Whoever looks at them needs no colours: contours are lines, boxes are dashed, heat is
brighter than the tissue, and of two versions, what was removed is hatched.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, ImageDraw
from scipy import ndimage

from segqc.loop.error_maps import CERTAIN, ErrorSteps
from segqc.plots import COLOURS
from segqc.quality.error_maps import bounding_box, padded_box
from segqc.server.dicomweb.series import ScanHeader, ScanImages
from segqc.types import Assessment, BoolArray, LabelArray, Structure
from segqc.volumes.volume import spacing_of

Canvas: TypeAlias = npt.NDArray[np.float32]  # (rows, columns, 3), from 0 to 255
Part: TypeAlias = tuple[slice, slice]  # rows, columns

MEDIA_TYPE: Final = "image/webp"
ADDED: Final = "#56B4E9"
REMOVED: Final = "#E69F00"
CHANGED: Final = "#CC79A7"
"""What a version has more, less, or as another structure than the one that it is compared with."""
_PLAIN: Final = ("#FFFFFF",)
_MARGIN_MM: Final = 15.0
_FILL: Final = 0.55
_HATCH_PIXELS: Final = 6
_FINE_EDGE: Final = 200  # pixels: under it, lines are one pixel wide
_QUALITY: Final = 88


@dataclass(frozen=True, slots=True)
class Layers:
    """What is drawn on a slice, and whether the whole of it is shown."""

    mask: bool = True
    heat: bool = True
    boxes: bool = True
    whole: bool = False


@dataclass(frozen=True)
class ShownSlices:
    """What a scan's pictures are made of; arrays are in the scan file's own voxel order.

    Attributes:
        header: of the scan.
        images: its images.
        structures: those that label maps may hold.
        part: the rows and columns that are shown where the whole slice is not, see `part_of`.
        labels: the label map; None where there is none.
        errors: the error map; None where there is none.
        assessment: whose boxes are drawn; None where there is none.
        other: the label map that ``labels`` is compared with; None where it is compared with none.
    """

    header: ScanHeader
    images: ScanImages
    structures: Sequence[Structure]
    part: Part
    labels: LabelArray | None = None
    errors: ErrorSteps | None = None
    assessment: Assessment | None = None
    other: LabelArray | None = None


def draw(shown: ShownSlices, index: int, layers: Layers, edge: int) -> bytes:
    """Draw a slice.

    Args:
        shown: the scan.
        index: the slice's number.
        layers: what is drawn on it.
        edge: of the square that the picture is fitted into, in pixels.

    Returns:
        A WebP file.
    """
    layout = shown.header.layout
    rows, columns = everything(shown.header) if layers.whole else shown.part
    size = _size(shown.header, rows.stop - rows.start, columns.stop - columns.start, edge)
    canvas = _grey(shown.images, index, (rows, columns), size)
    width = 1 if edge < _FINE_EDGE else 2
    if layers.heat and shown.errors is not None:
        _add_heat(canvas, layout.to_images(shown.errors)[index][rows, columns], size)
    if shown.other is not None and shown.labels is not None:
        now, before = (layout.to_images(found)[index][rows, columns] for found in (shown.labels, shown.other))
        _add_difference(canvas, now, before, size)
    if layers.mask and shown.labels is not None:
        labels = layout.to_images(shown.labels)[index][rows, columns]
        colours: Sequence[str] = COLOURS
        if shown.other is not None:  # the structures' colours stand for what differs there
            colours, width = _PLAIN, 1
        _add_contours(canvas, labels, shown.structures, colours, size, width)
    picture = Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))
    if layers.boxes and shown.assessment is not None:
        _add_boxes(picture, shown, index, (rows, columns), width)
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=_QUALITY, method=2)
    return file.getvalue()


def everything(header: ScanHeader) -> Part:
    """All rows and columns of a slice."""
    _, rows, columns = header.planes.shape
    return slice(0, rows), slice(0, columns)


def part_of(header: ScanHeader, labels: Sequence[LabelArray], errors: ErrorSteps | None) -> Part:
    """The rows and columns around label maps and likely errors, in whatever slice they are.

    Args:
        header: of the scan.
        labels: the label maps.
        errors: the error map; None where there is none.
    """
    drawn: BoolArray | None = None
    for marked in (*(found > 0 for found in labels), *(() if errors is None else (errors > CERTAIN // 2,))):
        drawn = marked if drawn is None else drawn | marked
    box = None if drawn is None else bounding_box(header.layout.to_images(drawn))
    if box is None:
        return everything(header)
    column_mm, row_mm, _ = spacing_of(header.planes.affine)
    margin = [0, int(np.ceil(_MARGIN_MM / row_mm)), int(np.ceil(_MARGIN_MM / column_mm))]
    _, rows, columns = padded_box(box, margin, header.planes.shape)
    return rows, columns


def _size(header: ScanHeader, rows: int, columns: int, edge: int) -> tuple[int, int]:
    """Width and height of a picture with square pixels."""
    column_mm, row_mm, _ = spacing_of(header.planes.affine)
    width_mm, height_mm = columns * column_mm, rows * row_mm
    scale = edge / max(width_mm, height_mm)
    return max(1, round(width_mm * scale)), max(1, round(height_mm * scale))


def _grey(images: ScanImages, index: int, part: Part, size: tuple[int, int]) -> Canvas:
    values = images.pixels.values(index)[part]
    shares = np.clip((values - images.low) / ((images.high - images.low) or 1.0), 0, 1)
    grey = Image.fromarray(np.rint(shares * 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return np.repeat(np.asarray(grey, np.float32)[:, :, None], 3, axis=2)


def _resized(values: npt.NDArray[np.uint8], size: tuple[int, int]) -> Canvas:
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BILINEAR), np.float32)


def _blend(canvas: Canvas, colour: str | npt.NDArray[np.float32], opacity: Canvas | BoolArray) -> None:
    rgb = np.array(ImageColor.getrgb(colour), np.float32) if isinstance(colour, str) else colour
    alpha = np.asarray(opacity, np.float32)[:, :, None]
    canvas += alpha * (rgb - canvas)


def _add_heat(canvas: Canvas, errors: ErrorSteps, size: tuple[int, int]) -> None:
    """Lay the error probability over a slice: from nothing over orange to red."""
    probability = _resized(np.ascontiguousarray(errors), size) / CERTAIN
    opacity = np.where(probability < 0.5, 1.2 * probability, 0.6 + 0.6 * (probability - 0.5))
    green = np.clip(0.6 - 0.6 * (probability - 0.5), 0.25, 0.6) * 255
    _blend(canvas, np.stack([np.full_like(green, 255), green, np.zeros_like(green)], axis=2), opacity)


def _mask(labels: BoolArray, size: tuple[int, int]) -> BoolArray:
    """A mask at the picture's size, its edge smoothed as far as its pixels allow."""
    smooth: BoolArray = _resized(np.where(labels, 255, 0).astype(np.uint8), size) >= 127.5
    return smooth


def _edge(mask: BoolArray, width: int) -> BoolArray:
    inner = ndimage.binary_erosion(mask, iterations=width, border_value=1)
    edge: BoolArray = mask & ~inner
    return edge


def _add_contours(
    canvas: Canvas,
    labels: LabelArray,
    structures: Sequence[Structure],
    colours: Sequence[str],
    size: tuple[int, int],
    width: int,
) -> None:
    for number, structure in enumerate(structures):
        mask = structure.mask(labels)
        if mask.any():
            _blend(canvas, colours[number % len(colours)], _edge(_mask(mask, size), width))


def _add_difference(canvas: Canvas, labels: LabelArray, other: LabelArray, size: tuple[int, int]) -> None:
    """Fill what a label map has more than another, less, or as another structure."""
    parts = (
        (ADDED, (labels != 0) & (other == 0), False),
        (REMOVED, (labels == 0) & (other != 0), True),
        (CHANGED, (labels != other) & (labels != 0) & (other != 0), False),
    )
    for colour, part, is_hatched in parts:
        if not part.any():
            continue
        mask = _mask(part, size)
        filled = mask & _hatch(mask.shape) if is_hatched else mask
        _blend(canvas, colour, filled * np.float32(_FILL))
        _blend(canvas, colour, _edge(mask, 1))


def _hatch(shape: tuple[int, ...]) -> BoolArray:
    rows, columns = np.indices(shape[:2])
    hatch: BoolArray = (rows + columns) % _HATCH_PIXELS < _HATCH_PIXELS // 2
    return hatch


def _add_boxes(picture: Image.Image, shown: ShownSlices, index: int, part: Part, width: int) -> None:
    """Draw the error boxes of a slice, dashed in their structure's colour on a dark ground."""
    if shown.assessment is None:
        return
    layout, pen = shown.header.layout, ImageDraw.Draw(picture)
    first, _ = sorted((layout.row_axis, layout.column_axis))
    _, height, width_px = shown.header.planes.shape
    for number, quality in enumerate(shown.assessment.structures):
        for box in quality.raw.boxes:
            if box.slice_index != index:
                continue
            r, c = (0, 1) if layout.row_axis == first else (1, 0)
            top, bottom = _turned(box.start[r], box.stop[r], height, layout.flip_rows)
            left, right = _turned(box.start[c], box.stop[c], width_px, layout.flip_columns)
            scale_x = picture.width / (part[1].stop - part[1].start)
            scale_y = picture.height / (part[0].stop - part[0].start)
            corners = (
                (left - part[1].start) * scale_x,
                (top - part[0].start) * scale_y,
                (right - part[1].start) * scale_x - 1,
                (bottom - part[0].start) * scale_y - 1,
            )
            _dashed(pen, corners, COLOURS[number % len(COLOURS)], width)


def _turned(start: int, stop: int, size: int, flipped: bool) -> tuple[int, int]:
    """An interval of voxels as one of rows or columns, which may be counted from the other end."""
    return (size - stop, size - start) if flipped else (start, stop)


def _dashed(pen: ImageDraw.ImageDraw, corners: tuple[float, float, float, float], colour: str, width: int) -> None:
    left, top, right, bottom = corners
    dash = 4 * width
    if width > 1:
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="#1a1a1a", width=width + 1)
    for x in np.arange(left, right, 2 * dash):
        for y in (top, bottom):
            pen.line((x, y, min(x + dash, right), y), fill=colour, width=width)
    for y in np.arange(top, bottom, 2 * dash):
        for x in (left, right):
            pen.line((x, y, x, min(y + dash, bottom)), fill=colour, width=width)
