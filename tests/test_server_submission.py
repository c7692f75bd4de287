from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segqc.server.errors import RequestError
from segqc.server.models import label_names
from segqc.server.submission import read_submission
from segqc.types import Structure
from segqc.volumes import Volume, write_labels
from tests.server_kit import AFFINE, SHAPE, make_studies

NAMES = {"liver": 1, "spleen": 4}


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return make_studies(tmp_path / "studies", scans=1, finals=0) / "scan_0.nii.gz"


def submit(path: Path, blocks: dict[int, int], affine: np.ndarray = AFFINE) -> Path:
    """A label map with one slab of voxels per value: {value: index along the first axis}."""
    labels = np.zeros(SHAPE, np.uint8)
    for value, index in blocks.items():
        labels[index] = value
    write_labels(Volume(labels, affine), path)
    return path


def info(*names: str) -> dict[str, object]:
    return {"label_info": [{"name": name, "idx": 7 + i} for i, name in enumerate(names)]}


def test_segments_count_in_their_order_and_likely_errors_are_stripped(tmp_path: Path, scan: Path) -> None:
    path = submit(tmp_path / "m.nrrd", {1: 3, 2: 5, 3: 8})
    labels = read_submission(path, scan, NAMES, info("Spleen", "likely error", "liver"))  # type: ignore[arg-type]
    assert (labels.array[3] == 4).all()
    assert (labels.array[5] == 0).all()
    assert (labels.array[8] == 1).all()
    assert np.allclose(labels.affine, AFFINE)


def test_without_names_values_are_as_they_are(tmp_path: Path, scan: Path) -> None:
    path = submit(tmp_path / "m.nii.gz", {1: 3, 4: 5})
    for params in ({}, {"label_info": [{"color": [1, 0, 0]}]}):
        assert set(np.unique(read_submission(path, scan, NAMES, params).array)) == {0, 1, 4}


@pytest.mark.parametrize(
    ("blocks", "params", "said"),
    [
        ({2: 3}, {}, "value"),
        ({3: 3}, info("liver", "spleen"), "holds the value 3"),
        ({1: 3}, info("kidney"), "kidney"),
        ({1: 3}, {"label_info": [{"name": "liver"}, {}]}, "name all"),
    ],
)
def test_what_is_no_structure_is_refused(
    tmp_path: Path, scan: Path, blocks: dict[int, int], params: dict[str, object], said: str
) -> None:
    path = submit(tmp_path / "m.nii.gz", blocks)
    with pytest.raises(RequestError, match=said) as caught:
        read_submission(path, scan, NAMES, params)  # type: ignore[arg-type]
    assert caught.value.status == 422


def test_another_grid_or_no_volume_is_refused_without_telling_server_paths(tmp_path: Path, scan: Path) -> None:
    shifted = AFFINE.copy()
    shifted[0, 3] = 10
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"not a volume")
    for path in (submit(tmp_path / "m.nii.gz", {1: 3}, shifted), broken):
        with pytest.raises(RequestError) as caught:
            read_submission(path, scan, NAMES, {})
        assert caught.value.status == 422
        assert str(path) not in caught.value.message


def test_unconfigured_structures_may_be_new(tmp_path: Path, scan: Path) -> None:
    path = submit(tmp_path / "m.nii.gz", {1: 3, 2: 5})
    params = info("label 1", "something new")
    labels = read_submission(path, scan, {"label 1": 1}, params, configured=False)  # type: ignore[arg-type]
    assert set(np.unique(labels.array)) == {0, 1, 2}


def test_label_names_of_unions_and_parts() -> None:
    parts = (Structure("hippocampus", (1, 2)), Structure("anterior", (1,)))
    assert label_names(parts) == {"anterior": 1, "hippocampus 2": 2}
