"""Label values towards clients of MONAI Label: 1, 2, ... in the order of the names that they get.

3D Slicer takes the value n for the n-th name, whatever the settings say. Label maps are stored with the settings'
values, and translated on their way out and back.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from segqc.types import LabelArray, values_in
from segqc.volumes import Volume, VolumeError


def client_names(names: Mapping[str, int]) -> dict[str, int]:
    """The names and the values that clients get: 1, 2, ... in ascending order of the stored values.

    Args:
        names: names and stored values.
    """
    return {name: number for number, name in enumerate(sorted(names, key=lambda name: names[name]), start=1)}


def same_values(names: Mapping[str, int]) -> bool:
    """Whether clients get the stored values as they are."""
    return client_names(names) == dict(names)


def to_client(labels: Volume, names: Mapping[str, int]) -> Volume:
    """Return a stored label map with the values that clients get.

    Raises:
        VolumeError: if it holds a value that has no name.
    """
    foreign = sorted(values_in(labels.array) - set(names.values()))
    if foreign:
        raise VolumeError(
            f"the label map holds the value {foreign[0]}, which the settings do not name any more; add it to "
            "[structures] in segqc.toml, or restore another version."
        )
    return _translated(labels, {names[name]: value for name, value in client_names(names).items()})


def from_client(labels: Volume, names: Mapping[str, int]) -> Volume:
    """Return a label map with the stored values again; the inverse of `to_client`."""
    return _translated(labels, {value: names[name] for name, value in client_names(names).items()})


def _translated(labels: Volume, values: Mapping[int, int]) -> Volume:
    table: LabelArray = np.zeros(256, np.uint8)
    for value, wanted in values.items():
        table[value] = wanted
    return Volume(table[labels.array], labels.affine, labels.acquisition_axis)
