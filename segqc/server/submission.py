"""Label maps that annotators submit: brought to the configured values, freed of what is no structure, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from segqc.loop.corrections import Opened, OpenedError, submit_label
from segqc.loop.studies import Studies
from segqc.server.checks import JsonObject
from segqc.server.errors import RequestError
from segqc.server.models import LIKELY_ERROR
from segqc.store.values import Who
from segqc.types import LabelArray
from segqc.volumes import Volume, VolumeError, read_labels, read_scan

# Segments that clients show beside the structures; they are never part of a label map.
NO_STRUCTURES = frozenset({LIKELY_ERROR, "background", "foreground_scribbles", "background_scribbles"})


def read_submission(
    path: Path, scan_path: Path, names: Mapping[str, int], params: JsonObject, *, configured: bool = True
) -> Volume:
    """Read a submitted label map onto its scan's grid, with the configured label values.

    3D Slicer numbers the exported segments 1, 2, ... in the order of ``params["label_info"]``, whatever their names
    stand for in the settings, and skips some; so values are read by that order where names are given, and the segment
    of likely errors is dropped. Without names, values are taken as they are.

    Args:
        path: the submitted file.
        scan_path: its scan.
        names: the structures' names and values.
        params: what the client sent with it.
        configured: whether the settings name the structures; otherwise a submission may bring new ones.

    Raises:
        RequestError: 422 if it is no label map of this scan.
    """
    try:
        labels = read_labels(path, scan=read_scan(scan_path))
    except VolumeError as error:
        # the file's temporary name says nothing to the client
        raise RequestError(422, str(error).replace(str(path), "the submitted label map")) from error
    segments = _segment_names(params)
    if segments is not None:
        table = _value_table(segments, names, configured)
        largest = int(labels.array.max())
        if largest > len(segments):
            raise RequestError(
                422,
                f"the submitted label map holds the value {largest}, but label_info names {len(segments)} segments; "
                "values count the segments in the order of label_info, from 1.",
            )
        return Volume(table[labels.array], labels.affine, labels.acquisition_axis)
    if configured:
        foreign = sorted(set(np.unique(labels.array).tolist()) - {0, *names.values()})
        if foreign:
            raise RequestError(
                422,
                f"the submitted label map holds the values {foreign}; this server knows "
                f"{', '.join(f'{value} ({name})' for name, value in names.items())}.",
            )
    return labels


def submit(
    studies: Studies, scan: str, labels: Volume, tag: str, who: Who, params: JsonObject, content: str | None = None
) -> JsonObject:
    """Keep a checked label map; a final one made of what was handed out is a correction.

    Args:
        studies: the studies folder.
        scan: the scan's id.
        labels: the label map, on the scan's grid.
        tag: the tag.
        who: who submits it.
        params: what the client sent with it; ``opened_slices`` and ``opened_structures`` say which part was looked at,
            where it was not all.
        content: the scan's content (sha256) that the label map was checked against; None where nobody knows.

    Returns:
        What the client is told of it.

    Raises:
        RequestError: 400 if ``opened_slices`` or ``opened_structures`` can't be used.
    """
    opened = _opened(params)
    try:
        simulated = params.get("simulated") is True
        done = submit_label(
            studies, scan, labels, tag, who, info=params, opened=opened, simulated=simulated, content=content
        )
    except OpenedError as error:
        raise RequestError(400, f"{error}.") from error
    told: JsonObject = {"version": done.label.id}
    if done.correction is not None:
        told["correction"] = done.correction
    return told


def _opened(params: JsonObject) -> Opened:
    slices, structures = params.get("opened_slices"), params.get("opened_structures")
    if slices is not None and not (isinstance(slices, list) and all(type(i) is int for i in slices)):
        raise RequestError(400, "opened_slices is not a list of slice numbers.")
    if structures is not None and not (isinstance(structures, list) and all(isinstance(n, str) for n in structures)):
        raise RequestError(400, "opened_structures is not a list of structures' names.")
    return Opened(
        tuple(int(str(i)) for i in slices) if slices is not None else None,
        tuple(str(n) for n in structures) if structures is not None else None,
    )


def _segment_names(params: JsonObject) -> list[str] | None:
    """Names of the segments in the order of their values; None where the client gave none."""
    info = params.get("label_info")
    if not isinstance(info, list) or not info:
        return None
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in info]
    if not any(names):
        return None
    if not all(isinstance(name, str) and name for name in names):
        raise RequestError(422, "label_info names some segments only; name all, in the order of their values.")
    return [str(name) for name in names]


def _value_table(segments: list[str], names: Mapping[str, int], configured: bool) -> LabelArray:
    """The configured value of each submitted value, uint8, 256 entries."""
    known = {name.strip().casefold(): value for name, value in names.items()}
    table = np.zeros(256, np.uint8)
    for position, segment in enumerate(segments, start=1):
        key = segment.strip().casefold()
        if key in NO_STRUCTURES:
            continue
        if configured and key not in known:
            raise RequestError(
                422,
                f"the segment {segment!r} is none of the structures {', '.join(names)}; rename or remove it.",
            )
        table[position] = known.get(key, position)
    return table
