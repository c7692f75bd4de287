"""Whether a DICOM object's pixels are as many as its header promises, told before memory is taken for them."""

from __future__ import annotations

import io
from typing import Final

from PIL import Image, UnidentifiedImageError
from pydicom.dataset import FileDataset
from pydicom.encaps import decode_data_sequence, defragment_data
from pydicom.uid import RLELossless

_MAX_RLE_RATIO: Final = 64  # two bytes stand for 128 of the same at most
_MAX_RLE_OVERHEAD: Final = 1 << 10  # header and padding, beside at most two bytes for one


def pixels_finding(item: FileDataset) -> str | None:
    """What is wrong with the number of an object's pixels, or None.

    Args:
        item: an image, or a multi-frame object, of one value a pixel.
    """
    if not item.get("PixelData"):
        return "holds no pixels; copy it again."
    frames = int(item.get("NumberOfFrames") or 1)
    bits = int(item.Rows) * int(item.Columns) * int(item.BitsAllocated)
    if item.file_meta.TransferSyntaxUID.is_compressed:
        return _compressed_finding(item, frames, bits // 8)
    there, promised = len(item.PixelData), bits * frames // 8
    if there < promised:
        return f"is truncated, {there} of {promised} bytes of pixels are there; copy it again."
    if there >= 2 * promised + 2:
        return f"holds {there} bytes of pixels for {promised}; export the series again."
    return None


def _compressed_finding(item: FileDataset, frames: int, promised: int) -> str | None:
    """The same for compressed frames that each promise so many bytes."""
    images = decode_data_sequence(item.PixelData) if frames > 1 else [defragment_data(item.PixelData)]
    if len(images) != frames:
        return f"holds {len(images)} compressed frames for {frames}; export it again."
    for image in images:
        if item.file_meta.TransferSyntaxUID == RLELossless:
            if promised > _MAX_RLE_RATIO * len(image):
                return f"is truncated or damaged, its pixels cannot expand to {promised} bytes; copy it again."
            if len(image) > 2 * promised + _MAX_RLE_OVERHEAD:
                return f"holds {len(image)} compressed bytes for {promised}; export it again."
        elif not _are_of_size(image, (int(item.Columns), int(item.Rows))):
            return "holds compressed pixels of another size than its header says; export it again."
    return None


def _are_of_size(image: bytes, size: tuple[int, int]) -> bool:
    """Tell by the head of a JPEG or JPEG 2000 image whether it expands to so many columns and rows."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return opened.size == size
    except UnidentifiedImageError:
        return True  # of a kind that is not decoded here
    except Image.DecompressionBombError:
        return False
