"""Label maps: what the numbers and the named segments of a file mean, and where they lie on the scan's grid."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from segqc.text import caseless
from segqc.types import values_in
from segqc.volumes.grid import GridPlacement, place_labels
from segqc.volumes.inputs import InputFile
from segqc.volumes.volume import Array, Grid, Segment, Source, Volume

LIKELY_ERROR_NAMES: Final = frozenset({"likely error", "likely error (scribbles)"})
NO_STRUCTURES: Final = LIKELY_ERROR_NAMES | {"background", "foreground_scribbles", "background_scribbles"}
"""Segments that clients show beside the structures, in lower case; they are never part of a label map."""

_TOLERANCE: Final = 1e-3  # what single precision and interpolation at the same place cost a whole number


@dataclass(frozen=True)
class LabelMap:
    """A label map, and whether whoever reads the file's numbers plainly gets the same."""

    volume: Volume
    is_plain: bool


def load_labels(
    file: InputFile,
    source: Source,
    scan: Grid | None = None,
    values: Collection[int] | None = None,
    names: Mapping[str, int] | None = None,
) -> LabelMap:
    """Load the labels of an opened file.

    Args:
        file: the file.
        source: as it was opened.
        scan: the scan that it belongs to; the labels are brought onto its grid.
        values: the label values allowed besides 0 (background); None allows all.
        names: the structures' names and label values, for a file that names its segments; None for the file's values.

    Raises:
        VolumeError: if the labels do not lie on the scan's grid, or their values are not whole numbers from 0 to 255,
            mean nothing or are not allowed.
    """
    placement = None if scan is None else place_labels(file, source, scan)
    with file.within_memory():
        return _load(file, source, scan, placement, values, names)


def _load(
    file: InputFile,
    source: Source,
    scan: Grid | None,
    placement: GridPlacement | None,
    values: Collection[int] | None,
    names: Mapping[str, int] | None,
) -> LabelMap:
    stored = source.voxels()
    labels = _whole_numbers(file, stored, source.step)
    is_plain = stored.dtype.kind in "iu" and source.step == 0 and source.is_for_itk
    if source.segments is not None:
        merged = _merge_segments(file, labels, source.segments, names or None)
        is_plain = is_plain and len(labels) == 1 and np.array_equal(merged, labels[0])
        labels = merged
    if values is not None:
        _check_values(file, labels, values)
    if scan is None or placement is None:
        return LabelMap(Volume(np.ascontiguousarray(labels), source.affine, source.acquisition_axis), is_plain)
    is_plain = is_plain and placement.keeps_voxels(labels.shape) and placement.is_own_affine
    placed = np.ascontiguousarray(placement.apply(labels))
    return LabelMap(Volume(placed, scan.affine, scan.acquisition_axis), is_plain)


def _whole_numbers(file: InputFile, stored: Array, step: float) -> npt.NDArray[np.uint8]:
    """The nearest whole numbers, where all lie as near as the file's way of storing them allows."""
    if stored.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            nearest = np.rint(stored)
            error = float(np.abs(stored - nearest).max())
        # Steps of more than 1 leave whole numbers out: those are intensities.
        if not error <= (max(_TOLERANCE, step / 2 + _TOLERANCE) if step <= 1 else _TOLERANCE):
            raise file.error("holds voxels that are not whole numbers; give a label map, not a scan or a map.")
    else:
        nearest = stored
    low, high = nearest.min(), nearest.max()
    if low < 0 or high > 255:
        raise file.error(f"holds label values from {low:g} to {high:g}; use values from 0 to 255.")
    return nearest.astype(np.uint8, copy=False)


def _merge_segments(
    file: InputFile,
    layers: npt.NDArray[np.uint8],
    segments: Sequence[Segment],
    names: Mapping[str, int] | None,
) -> npt.NDArray[np.uint8]:
    """Bring the layers' segments together in one label map, ``layers`` being ``(layer, n0, n1, n2)``.

    A segment without a voxel may have any name: nothing of it is lost.
    """
    for segment in segments:
        _check_place(file, segment, len(layers))
    found = [values_in(layer) for layer in layers]
    segments = [segment for segment in segments if segment.value in found[segment.layer]]
    values = [_value_of(file, segment, names) for segment in segments]
    merged = np.zeros(layers.shape[1:], np.uint8)
    of_layer: dict[int, list[tuple[Segment, int]]] = defaultdict(list)
    for segment, value in zip(segments, values, strict=True):
        of_layer[segment.layer].append((segment, value))
    for number, layer in enumerate(layers):
        table = np.zeros(256, np.uint8)
        owners: dict[int, Segment] = {}
        for segment, value in of_layer[number]:
            if segment.value in owners:
                raise file.error(
                    f"gives the segments {owners[segment.value].name!r} and {segment.name!r} the same value "
                    f"{segment.value} in one layer; save the segmentation again."
                )
            owners[segment.value] = segment
            table[segment.value] = value
        unnamed = sorted(found[number] - owners.keys())
        if unnamed:
            raise file.error(
                f"holds the value {unnamed[0]}, which none of its segments has; save the segmentation again."
            )
        mapped = table[layer]
        overlap = (merged != 0) & (mapped != 0) & (merged != mapped)
        if overlap.any():
            at = tuple(int(i) for i in np.argwhere(overlap)[0])
            one, other = (_name_of(value, segments, values) for value in (merged[at], mapped[at]))
            raise file.error(
                f"has {int(overlap.sum())} voxels that are both {one!r} and {other!r}; a voxel can be one structure "
                "only, remove the overlap."
            )
        np.copyto(merged, mapped, where=mapped != 0)
    return merged


def _check_place(file: InputFile, segment: Segment, layers: int) -> None:
    if not 0 < segment.value < 256 or not 0 <= segment.layer < layers:
        raise file.error(
            f"gives the segment {segment.name!r} the value {segment.value} in the layer {segment.layer} of {layers}; "
            "save the segmentation again, with values from 1 to 255."
        )


def _value_of(file: InputFile, segment: Segment, names: Mapping[str, int] | None) -> int:
    """The label value of a segment, 0 for one that is no structure."""
    key = caseless(segment.name)
    if key in NO_STRUCTURES:
        return 0
    if names is None:
        return segment.value
    known = {caseless(name): value for name, value in names.items()}
    if key not in known:
        raise file.error(
            f"has the segment {segment.name!r}, which is none of the structures {', '.join(names)}; "
            "rename or remove it."
        )
    return known[key]


def _name_of(value: int, segments: Sequence[Segment], values: Sequence[int]) -> str:
    return next(segment.name for segment, own in zip(segments, values, strict=True) if own == value)


def _check_values(file: InputFile, labels: npt.NDArray[np.uint8], values: Collection[int]) -> None:
    foreign = sorted(values_in(labels) - set(values))
    if foreign:
        allowed = ", ".join(map(str, sorted(set(values) - {0}))) or "none"
        raise file.error(
            f"holds the label value{'s' if len(foreign) > 1 else ''} {', '.join(map(str, foreign))}, "
            f"and the structures' values are {allowed}; relabel the file or add the structure to the settings."
        )
