"""DICOM segmentations (SEG) as label maps: their frames brought together by where they lie (DICOM PS3.3, A.51, C.8.20).

Frames may come in any order, leave slices out, and run the other way than the scan's slices. A binary segmentation has
frames for each of its segments, a label map one for all. Fractional ones hold no labels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileDataset

from segqc.text import caseless
from segqc.volumes.dicom_headers import first_line, read_dataset
from segqc.volumes.dicom_pixels import pixels_finding
from segqc.volumes.inputs import InputFile
from segqc.volumes.volume import LPS_TO_RAS, AffineArray, Array, Grid, Segment, Source, VolumeError, spacing_of

SEGMENTATION: Final = "1.2.840.10008.5.1.4.1.1.66.4"
LABEL_MAP_SEGMENTATION: Final = "1.2.840.10008.5.1.4.1.1.66.7"
SEGMENTATION_SUFFIX: Final = ".dcm"
_NAMED_BY_VALUE: Final = re.compile("label ([0-9]{1,3})")  # see `structures_of_values`
_MAX_SLOPE: Final = 0.02  # the sine of the angle between the frames and the scan's slices
_MAX_OFFSET: Final = 0.05  # of a slice's distance


@dataclass(frozen=True, slots=True)
class SegmentationHeader:
    """What a SEG says of itself.

    Attributes:
        series: the SeriesInstanceUIDs of the images that it was made of.
        images: their SOPInstanceUIDs.
        is_automatic: whether nobody had a hand in any of its segments.
        is_fractional: whether it holds shares or probabilities, and no labels.
        made_at: ContentDate and ContentTime, ``20261130120000.0``; empty where it does not say them.
    """

    series: frozenset[str]
    images: frozenset[str]
    is_automatic: bool
    is_fractional: bool
    made_at: str


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where a frame lies (LPS millimetres), and of which segment it is; None for a label map's."""

    position: npt.NDArray[np.float64]
    segment: int | None


def read_segmentation_header(path: Path) -> SegmentationHeader:
    """Read what a SEG says of itself.

    Raises:
        VolumeError: if the file is none, or damaged. The message does not name the file's folder.
    """
    item = read_dataset(path, pixels=False)
    if item.get("SOPClassUID") not in (SEGMENTATION, LABEL_MAP_SEGMENTATION):
        raise VolumeError(f"{path.name} is no DICOM segmentation.")
    try:
        series = list(item.get("ReferencedSeriesSequence") or [])
        images = {
            str(image.ReferencedSOPInstanceUID)
            for entry in series
            for image in entry.get("ReferencedInstanceSequence") or []
        }
        kinds = {str(segment.get("SegmentAlgorithmType") or "") for segment in item.get("SegmentSequence") or []}
        made = f"{item.get('ContentDate') or ''}{item.get('ContentTime') or ''}"
        return SegmentationHeader(
            series=frozenset(str(entry.SeriesInstanceUID) for entry in series),
            images=frozenset(images),
            is_automatic=kinds == {"AUTOMATIC"},
            is_fractional=item.get("SegmentationType") == "FRACTIONAL",
            made_at=made,
        )
    except Exception as error:  # values are converted when they are asked for, with errors of many kinds
        raise VolumeError(f"{path.name} is damaged ({first_line(error)}); store it again.") from error


def values_of(segments: Sequence[Segment], names: Mapping[str, int]) -> dict[str, int] | None:
    """The label values of a SEG's segments where no settings name structures; None where only their numbers tell.

    A segment has the value of the structure of its name, or the one in a name that stands for a value alone.

    Args:
        segments: the segments.
        names: the structures that are known all the same, and their values.

    Examples:
        >>> values_of([Segment("label 9", 1, 0), Segment("Liver", 2, 0)], {"liver": 4})
        {'label 9': 9, 'Liver': 4}
        >>> values_of([Segment("tumour", 1, 0)], {"liver": 4})
    """
    known = {caseless(name): value for name, value in names.items()}
    found: dict[str, int] = {}
    for segment in segments:
        of_value = _NAMED_BY_VALUE.fullmatch(caseless(segment.name))
        value = known.get(caseless(segment.name), int(of_value[1]) if of_value is not None else 0)
        if not 0 < value < 256:
            return None
        found[segment.name] = value
    return found


def open_segmentation(file: InputFile, scan: Grid) -> Source:
    """Open a SEG of a scan.

    Args:
        file: the file.
        scan: where the scan lies: its slices tell how far the frames are apart.

    Returns:
        The box of the scan's slices that the frames lie in, with the segments that the SEG names.

    Raises:
        VolumeError: if it holds no labels, or its frames do not lie in slices of the scan.
    """
    try:
        item = read_dataset(file.path)
        return _open(file, item, scan)
    except VolumeError:
        raise
    except Exception as error:  # values are converted when they are asked for, with errors of many kinds
        raise file.error(f"is a damaged segmentation ({first_line(error)}); store it again.") from error


def _open(file: InputFile, item: FileDataset, scan: Grid) -> Source:
    if item.get("SOPClassUID") not in (SEGMENTATION, LABEL_MAP_SEGMENTATION):
        raise file.error("is no DICOM segmentation.")
    kind = str(item.get("SegmentationType") or "")
    is_map = item.SOPClassUID == LABEL_MAP_SEGMENTATION or kind == "LABELMAP"
    if not is_map and kind != "BINARY":
        raise file.error(f"is a segmentation of the type {kind or 'unknown'}; labels are BINARY or LABELMAP.")
    if finding := pixels_finding(item):
        raise file.error(finding)
    frames = _frames(file, item, is_map)
    along_row, down, spacing = _plane(file, item)
    slices, step = _slices(file, frames, np.cross(along_row, down), scan)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = along_row * spacing[1], down * spacing[0]
    affine[:3, 2], affine[:3, 3] = step, frames[int(np.argmin(slices))].position
    slices = slices - slices.min()
    shape = (int(item.Columns), int(item.Rows), int(slices.max()) + 1)
    file.check_size(shape)
    segments, layer_of = _segments(item, is_map)
    file.check_size((*shape, max(len(segments), 1)))
    ras: AffineArray = LPS_TO_RAS @ affine
    return Source(shape, ras, 2, _voxels(file, item, frames, slices, layer_of, shape), segments=segments)


def _frames(file: InputFile, item: Dataset, is_map: bool) -> list[_Frame]:
    shared = _first(item, "SharedFunctionalGroupsSequence")
    found = []
    for groups in item.PerFrameFunctionalGroupsSequence:
        place = _first(groups, "PlanePositionSequence") or _first(shared, "PlanePositionSequence")
        named = _first(groups, "SegmentIdentificationSequence") or _first(shared, "SegmentIdentificationSequence")
        if place is None or (named is None and not is_map):
            what = "where it lies" if place is None else "of which segment it is"
            raise file.error(f"has a frame that does not say {what}; store the segmentation with its geometry.")
        segment = None if is_map or named is None else int(named.ReferencedSegmentNumber)
        found.append(_Frame(np.array(place.ImagePositionPatient, dtype=np.float64), segment))
    if not found:
        raise file.error("holds no frame; a segmentation without one is no label.")
    return found


def _plane(
    file: InputFile, item: Dataset
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], tuple[float, float]]:
    """The directions along a row and down the columns, and the spacing of rows and columns, that all frames share."""
    shared = _first(item, "SharedFunctionalGroupsSequence")
    planes = []
    for groups in item.PerFrameFunctionalGroupsSequence:
        turned = _first(groups, "PlaneOrientationSequence") or _first(shared, "PlaneOrientationSequence")
        measures = _first(groups, "PixelMeasuresSequence") or _first(shared, "PixelMeasuresSequence")
        if turned is None or measures is None:
            raise file.error("has a frame of unknown orientation or spacing; store the segmentation with its geometry.")
        planes.append([*map(float, turned.ImageOrientationPatient), *map(float, measures.PixelSpacing)])
    found = np.array(planes)
    if np.abs(found - found[0]).max() > 1e-3:
        raise file.error("has frames that differ in orientation or spacing; store one segmentation for each stack.")
    return found[0, :3], found[0, 3:6], (float(found[0, 6]), float(found[0, 7]))


def _slices(
    file: InputFile, frames: list[_Frame], normal: npt.NDArray[np.float64], scan: Grid
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Number the frames' slices, and return the vector from one to the next: the scan's own (LPS millimetres)."""
    edges = (LPS_TO_RAS @ scan.affine)[:3, :3]
    across = normal @ (edges / np.array(spacing_of(scan.affine)))
    axis = int(np.abs(across).argmax())
    if np.sqrt(max(0.0, 1 - float(across[axis]) ** 2)) > _MAX_SLOPE and not _is_sheared(edges, axis):
        raise file.error("has frames that are no slices of its scan; resample it to the scan's slices.")
    step = edges[:, axis] * np.sign(across[axis])
    offsets = np.array([frame.position - frames[0].position for frame in frames])
    numbers = offsets @ normal / (step @ normal)
    nearest = np.rint(numbers)
    apart = np.linalg.norm(offsets - nearest[:, None] * step, axis=1)
    if apart.max() > max(_MAX_OFFSET * float(np.linalg.norm(step)), 0.01):
        raise file.error(f"has frames up to {apart.max():.3g} mm beside its scan's slices; resample it to the scan.")
    return nearest.astype(np.int64), step


def _is_sheared(edges: npt.NDArray[np.float64], axis: int) -> bool:
    """Whether a scan's slices are not stacked at a right angle."""
    units = edges / np.linalg.norm(edges, axis=0)
    return bool(max(abs(units[:, axis] @ units[:, other]) for other in range(3) if other != axis) > _MAX_SLOPE)


def _segments(item: Dataset, is_map: bool) -> tuple[tuple[Segment, ...], dict[int, int]]:
    """The segments by name, and the layer of each number."""
    described = [segment for segment in item.SegmentSequence if int(segment.SegmentNumber) != 0]
    numbers = [int(segment.SegmentNumber) for segment in described]
    layers = {number: 0 if is_map else index for index, number in enumerate(numbers)}
    segments = tuple(
        Segment(str(segment.get("SegmentLabel") or f"segment {number}").strip(), number, layers[number])
        for segment, number in zip(described, numbers, strict=True)
    )
    return segments, layers


def _voxels(
    file: InputFile,
    item: FileDataset,
    frames: list[_Frame],
    slices: npt.NDArray[np.int64],
    layer_of: dict[int, int],
    shape: tuple[int, int, int],
) -> Callable[[], Array]:
    places = [
        (0 if frame.segment is None else layer_of[frame.segment], number)
        for frame, number in zip(frames, slices.tolist(), strict=True)
    ]
    if len(set(places)) < len(places):
        raise file.error("has two frames of one segment at the same place; store it again.")

    def load() -> Array:
        try:
            pixels = item.pixel_array.reshape(len(frames), shape[1], shape[0])
        except Exception as error:  # pydicom raises many kinds, none with a common base
            raise file.error(f"is a damaged segmentation ({first_line(error)}); store it again.") from error
        padding = item.get("PixelPaddingValue")
        layers = np.zeros((max(layer_of.values(), default=0) + 1, *shape), np.uint16)
        for frame, (layer, number), image in zip(frames, places, pixels, strict=True):
            if frame.segment is None:
                values = np.where(image == padding, 0, image) if padding is not None else image
            else:
                values = np.where(image != 0, frame.segment, 0)
            layers[layer, :, :, number] = values.T
        return layers

    return load


def _first(item: Dataset | None, name: str) -> Dataset | None:
    """The first item of a sequence; None where there is none."""
    sequence = None if item is None else item.get(name)
    return sequence[0] if sequence else None
