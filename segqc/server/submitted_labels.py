"""Label maps that annotators submit: brought to the configured values, freed of what is no structure, and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from segqc.loop.dataset import Dataset
from segqc.loop.submission import Opened, submit_label
from segqc.server.client_labels import client_names
from segqc.server.errors import RequestError
from segqc.server.parameters import LabelParams, SegmentNames
from segqc.store.records import Actor, JsonObject, ScanRecord
from segqc.store.store import suffix_of
from segqc.text import caseless
from segqc.types import LabelArray, values_in
from segqc.volumes import Volume, VolumeError, read_grid
from segqc.volumes.dicom_seg import SEGMENTATION_SUFFIX, open_segmentation, values_of
from segqc.volumes.files import open_labels
from segqc.volumes.inputs import InputFile
from segqc.volumes.labelmaps import LIKELY_ERROR_NAMES, NO_STRUCTURES, LabelMap, load_labels
from segqc.volumes.limits import ReadLimits
from segqc.volumes.volume import Array, Segment

_UNNAMED = re.compile(r"segment_?\d+", re.IGNORECASE)


def read_submission(
    path: Path,
    scan_path: Path,
    names: Mapping[str, int],
    params: SegmentNames,
    *,
    configured: bool = True,
    limits: ReadLimits | None = None,
) -> LabelMap:
    """Read a submitted label map onto its scan's grid, with the stored label values.

    A file that names its segments (``.seg.nrrd``, DICOM SEG) is read by these names. Otherwise 3D Slicer numbers the
    exported segments 1, 2, ... in the order of ``params.label_info`` and skips some; so values are read by that order
    where names are given, or as ``params.label_names`` says. Without names they are the stored values, if they can't
    be anything else.

    Args:
        path: the submitted file.
        scan_path: its scan.
        names: the structures' names and stored values.
        params: what the client sent with it.
        configured: whether the settings name the structures; otherwise a submission may bring new ones.
        limits: bounds on the files.

    Returns:
        The label map, and whether whoever reads the file's numbers plainly gets the same.

    Raises:
        RequestError: 422 if it is no label map of this scan.
    """
    file = InputFile(path, limits, "the submitted label map")
    try:
        scan = read_grid(scan_path, limits=limits)
        is_dicom = path.suffix == SEGMENTATION_SUFFIX
        source = open_segmentation(file, scan) if is_dicom else open_labels(file)
        own = [s for s in source.segments or () if caseless(s.name) not in NO_STRUCTURES]
        # the Reviewer opens label maps without names and saves them with names of 3D Slicer's own making
        named = source.segments is not None and not (own and all(_UNNAMED.fullmatch(s.name.strip()) for s in own))
        by_name = names if named and configured else None
        if is_dicom and not configured:
            by_name = values_of(source.segments or (), names)
        labels = load_labels(file, source, scan, names=by_name)
        if source.segments is not None:
            _check_no_likely_errors(source.voxels(), source.segments)
    except VolumeError as error:
        raise RequestError(422, str(error)) from error
    if named:
        return labels
    values = _values_by_name(params)
    if values is not None:
        return _by_names(labels, values, names, configured)
    if configured:
        _check_plain(labels.volume, names)
    return labels


def _check_no_likely_errors(layers: Array, segments: Sequence[Segment]) -> None:
    for segment in segments:
        is_error = caseless(segment.name) in LIKELY_ERROR_NAMES
        if is_error and segment.layer < len(layers) and (layers[segment.layer] == segment.value).any():
            raise _likely_errors_refused(segment.name)


def _likely_errors_refused(name: str) -> RequestError:
    return RequestError(
        422,
        f"the segment {name!r} is part of the submitted label map, where it hides the structures below it: "
        "remove or hide the segment first (MONAI Label's extension exports hidden segments, too: remove it there).",
    )


def _by_names(labels: LabelMap, values: Mapping[str, int], names: Mapping[str, int], configured: bool) -> LabelMap:
    found = values_in(labels.volume.array)
    unnamed = sorted(found - set(values.values()))
    if unnamed:
        raise RequestError(
            422,
            f"the submitted label map holds the value {unnamed[0]}, but label_info names {len(values)} segments; "
            "values count the segments in the order of label_info, from 1.",
        )
    known = {caseless(name): value for name, value in names.items()}
    table: LabelArray = np.zeros(256, np.uint8)
    for segment, value in values.items():
        key = caseless(segment)
        if value not in found:
            continue  # a segment without a voxel may have any name
        if key in LIKELY_ERROR_NAMES:
            raise _likely_errors_refused(segment)
        if key in NO_STRUCTURES:
            continue
        if configured and key not in known:
            raise RequestError(
                422,
                f"the segment {segment!r} is none of the structures {', '.join(names)}; rename or remove it.",
            )
        table[value] = known.get(key, value)
    if all(table[value] == value for value in found):
        return labels
    read = labels.volume
    return LabelMap(Volume(table[read.array], read.affine, read.acquisition_axis), is_plain=False)


def _check_plain(labels: Volume, names: Mapping[str, int]) -> None:
    """Refuse values without names that are no stored ones, or that could as well be those that clients get."""
    found = values_in(labels.array)
    foreign = sorted(found - set(names.values()))
    if foreign:
        raise RequestError(
            422,
            f"the submitted label map holds the values {foreign}; this server knows "
            f"{', '.join(f'{value} ({name})' for name, value in names.items())}.",
        )
    delivered = client_names(names)
    stored = {value: name for name, value in names.items()}
    numbered = {value: name for name, value in delivered.items()}
    if found <= numbered.keys() and any(numbered[value] != stored[value] for value in found):
        raise RequestError(
            422,
            f"the submitted label map's values {sorted(found)} could be the settings' or those that this server gave "
            "out; send label_info, the names of the segments in the order of their values.",
        )


def submit(
    dataset: Dataset,
    scan: ScanRecord,
    labels: LabelMap,
    file: Path,
    tag: str,
    actor: Actor,
    params: LabelParams,
    info: JsonObject,
    *,
    may_replace_approved: bool,
) -> JsonObject:
    """Keep a checked label map; a final one made of what was handed out is a correction.

    Args:
        dataset: the dataset folder.
        scan: the scan, as it was when the label map was checked.
        labels: the label map, on the scan's grid.
        file: the file that it was read from; it is kept as it came where it is a plain ``.nii.gz``.
        tag: the tag.
        actor: who submits it.
        params: what the client sent with it.
        info: what is noted of it.
        may_replace_approved: whether they may give an approved scan another final label.

    Returns:
        What the client sees of it.

    Raises:
        OpenedError: 400 if it names slices or structures as opened that do not exist.
        ApprovedError: 403 if the scan is approved, and they may not replace that.
    """
    done = submit_label(
        dataset,
        scan.name,
        labels.volume,
        tag,
        actor,
        info=info,
        opened=Opened(params.opened_slices, params.opened_structures),
        simulated=params.simulated,
        checked=scan,
        file=file if labels.is_plain and suffix_of(file) == ".nii.gz" else None,
        may_replace_approved=may_replace_approved,
    )
    checked = done.label.checked_slices
    body: JsonObject = {"version": done.label.id, "checked_slices": None if checked is None else list(checked)}
    if done.correction is not None:
        body["correction"] = done.correction
    return body


def stored_info(params: LabelParams, names: Mapping[str, int]) -> JsonObject:
    """What is noted of a kept label map: the client's params, with ``label_info`` as clients get the label map back."""
    if _values_by_name(params) is None:
        return params.to_json()
    sent = {caseless(str(entry.get("name"))): entry for entry in params.label_info or []}
    body: list[JsonValue] = [
        {**sent.get(caseless(name), {}), "name": name, "idx": value} for name, value in client_names(names).items()
    ]
    return {**params.to_json(), "label_info": body}


def _values_by_name(params: SegmentNames) -> dict[str, int] | None:
    """Names of the segments and their values in the file; None where the client gave none."""
    names = [entry.get("name") for entry in params.label_info or []]
    if any(names):
        if not all(isinstance(name, str) and name for name in names):
            raise RequestError(422, "label_info names some segments only; name all, in the order of their values.")
        if len({caseless(str(name)) for name in names}) < len(names):
            raise RequestError(422, "label_info names a segment twice; give each segment a name of its own.")
        if len(names) > 255:
            raise RequestError(422, f"label_info names {len(names)} segments; a label map has 255 values at most.")
        return {str(name): value for value, name in enumerate(names, start=1)}
    if params.label_names:
        values = {name: value for name, value in params.label_names.items() if type(value) is int and 0 < value < 256}
        if len(values) < len(params.label_names) or len(set(values.values())) < len(values):
            raise RequestError(422, "label_names gives each name a value of its own, from 1 to 255.")
        return values
    return None
