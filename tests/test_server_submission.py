from __future__ import annotations

from pathlib import Path

import nrrd
import numpy as np
import pytest

from segqc.server.client_labels import client_names, from_client, to_client
from segqc.server.context import label_names
from segqc.server.errors import RequestError
from segqc.server.parameters import LabelParams
from segqc.server.submitted_labels import read_submission, stored_info
from segqc.types import Structure
from segqc.volumes import Volume, read_labels, write_labels
from tests.server_kit import AFFINE, SHAPE, make_dataset

NAMES = {"liver": 1, "spleen": 4}


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "studies", scans=1, finals=0) / "scan_0.nii.gz"


def submit(path: Path, blocks: dict[int, int], affine: np.ndarray = AFFINE) -> Path:
    """A label map with one slab of voxels per value: {value: index along the first axis}."""
    labels = np.zeros(SHAPE, np.uint8)
    for value, index in blocks.items():
        labels[index] = value
    write_labels(Volume(labels, affine), path)
    return path


def info(*names: str) -> LabelParams:
    return LabelParams(label_info=[{"name": name, "idx": 7 + i} for i, name in enumerate(names)])


def test_segments_count_in_their_order_and_empty_likely_errors_are_dropped(tmp_path: Path, scan: Path) -> None:
    path = submit(tmp_path / "m.nrrd", {1: 3, 3: 8})
    labels = read_submission(path, scan, NAMES, info("Spleen", "likely error (scribbles)", "liver")).volume
    assert (labels.array[3] == 4).all()
    assert (labels.array[8] == 1).all()
    assert np.allclose(labels.affine, AFFINE)


def test_whether_the_file_itself_says_the_same_plainly(tmp_path: Path, scan: Path) -> None:
    same = submit(tmp_path / "same.nii.gz", {1: 3, 4: 8})
    assert read_submission(same, scan, NAMES, LabelParams()).is_plain
    renumbered = submit(tmp_path / "renumbered.nii.gz", {1: 3, 2: 8})
    assert not read_submission(renumbered, scan, NAMES, info("liver", "spleen")).is_plain
    numbered = LabelParams(label_names={"liver": 1, "spleen": 4})
    assert read_submission(same, scan, NAMES, numbered).is_plain
    turn = np.diag([-1.0, 1.0, 1.0, 1.0])
    turn[0, 3] = SHAPE[0] - 1
    turned = read_labels(same)
    write_labels(Volume(turned.array[::-1], turned.affine @ turn), tmp_path / "turned.nii.gz")
    assert not read_submission(tmp_path / "turned.nii.gz", scan, NAMES, LabelParams()).is_plain


@pytest.mark.parametrize("unknown", ["Segment_3", "kidney", "likely error"])
@pytest.mark.parametrize("way", ["label_info", "label_names"])
def test_segments_without_a_voxel_may_have_any_name(tmp_path: Path, scan: Path, unknown: str, way: str) -> None:
    names = ("spleen", unknown, "liver")
    params = info(*names) if way == "label_info" else LabelParams(**{way: {name: i for i, name in enumerate(names, 1)}})
    read = read_submission(submit(tmp_path / "m.nrrd", {1: 3, 3: 8}), scan, NAMES, params)
    assert (read.volume.array[3] == 4).all()
    assert (read.volume.array[8] == 1).all()
    with pytest.raises(RequestError, match=unknown):
        read_submission(submit(tmp_path / "n.nrrd", {2: 3}), scan, NAMES, params)


def test_a_segmentation_of_another_shape_is_refused_before_its_voxels_are_read(tmp_path: Path, scan: Path) -> None:
    path = tmp_path / "m.seg.nrrd"
    path.write_text(
        "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 800 800 800\nencoding: gzip\nspace: left-posterior-superior\n"
        "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\n"
        "Segment0_Name:=liver\nSegment0_LabelValue:=1\nSegment0_Layer:=0\n\n"
    )
    with pytest.raises(RequestError, match="resample them to the scan"):
        read_submission(path, scan, NAMES, LabelParams())


@pytest.mark.parametrize("name", ["likely error", "Likely Error", "likely error (scribbles)"])
def test_likely_errors_that_hide_structures_are_refused(tmp_path: Path, scan: Path, name: str) -> None:
    path = submit(tmp_path / "m.nrrd", {1: 3, 3: 8})
    with pytest.raises(RequestError, match="remove or hide the segment first") as caught:
        read_submission(path, scan, NAMES, info("liver", "spleen", name))
    assert caught.value.status == 422


SETTINGS = [
    {"body": 2, "placenta": 4, "brain": 7},
    {"brain": 3, "body": 1, "placenta": 2},
    {"a": 1, "b": 2, "c": 3},
    {"a": 2, "b": 1},
    {"only": 255},
    {"kidneys 2": 2, "kidneys 3": 3, "liver": 9},
]


@pytest.mark.parametrize("names", SETTINGS)
@pytest.mark.parametrize("way", ["label_info", "reordered", "label_names", "seg.nrrd"])
def test_an_unedited_label_map_comes_back_as_it_was_stored(
    tmp_path: Path, scan: Path, names: dict[str, int], way: str
) -> None:
    stored = np.zeros(SHAPE, np.uint8)
    for index, value in enumerate(names.values()):
        stored[2 * index + 1] = value
    delivered = to_client(Volume(stored, AFFINE), names)
    told = client_names(names)
    params = LabelParams(label_names=dict(told))
    path = tmp_path / "m.nrrd"
    if way == "label_info":
        params = LabelParams(label_info=[{"name": name, "idx": 9 + i} for i, name in enumerate(told)])
    elif way == "reordered":
        order = list(reversed(told))
        table = np.zeros(256, np.uint8)
        for position, name in enumerate(order, start=1):
            table[told[name]] = position
        delivered = Volume(table[delivered.array], AFFINE)
        params = LabelParams(label_info=[{"name": name} for name in order])
    write_labels(delivered, path)
    if way == "seg.nrrd":
        params = LabelParams()
        voxels, header = nrrd.read(str(path))
        for number, (name, value) in enumerate(reversed(told.items())):
            header |= {f"Segment{number}_Name": name, f"Segment{number}_LabelValue": str(value),
                       f"Segment{number}_Layer": "0", f"Segment{number}_ID": f"Segment_{number}"}  # fmt: skip
        path = tmp_path / "m.seg.nrrd"
        nrrd.write(str(path), voxels, header)
    assert np.array_equal(read_submission(path, scan, names, params).volume.array, stored)
    assert np.array_equal(from_client(to_client(Volume(stored, AFFINE), names), names).array, stored)


def test_values_that_could_be_read_either_way_are_refused(tmp_path: Path, scan: Path) -> None:
    names = {"body": 2, "placenta": 3, "brain": 7}
    plain = read_submission(submit(tmp_path / "a.nrrd", {7: 3}), scan, names, LabelParams())
    assert set(np.unique(plain.volume.array)) == {0, 7}
    with pytest.raises(RequestError, match="send label_info") as caught:
        read_submission(submit(tmp_path / "b.nrrd", {2: 3, 3: 5}), scan, names, LabelParams())
    assert caught.value.status == 422


def test_what_is_noted_fits_what_clients_get_back() -> None:
    names = {"body": 2, "placenta": 4, "brain": 7}
    sent = {"label_info": [{"name": "brain", "idx": 1, "color": [1, 0, 0]}, {"name": "body", "idx": 5}], "by": "me"}
    noted = stored_info(LabelParams(**sent), names)
    assert noted == {
        "label_info": [
            {"name": "body", "idx": 1},
            {"name": "placenta", "idx": 2},
            {"name": "brain", "idx": 3, "color": [1, 0, 0]},
        ],
        "by": "me",
    }
    assert stored_info(LabelParams(**noted), names) == noted
    assert stored_info(LabelParams(by="me"), names) == {"by": "me"}


def test_without_names_values_are_as_they_are(tmp_path: Path, scan: Path) -> None:
    path = submit(tmp_path / "m.nii.gz", {1: 3, 4: 5})
    for params in (LabelParams(), LabelParams(label_info=[{"color": [1, 0, 0]}])):
        assert set(np.unique(read_submission(path, scan, NAMES, params).volume.array)) == {0, 1, 4}


@pytest.mark.parametrize(
    ("blocks", "params", "messages"),
    [
        ({2: 3}, LabelParams(), "value"),
        ({3: 3}, info("liver", "spleen"), "holds the value 3"),
        ({1: 3}, info("kidney"), "kidney"),
        ({1: 3}, LabelParams(label_info=[{"name": "liver"}, {}]), "name all"),
    ],
)
def test_what_is_no_structure_is_refused(
    tmp_path: Path, scan: Path, blocks: dict[int, int], params: LabelParams, messages: str
) -> None:
    path = submit(tmp_path / "m.nii.gz", blocks)
    with pytest.raises(RequestError, match=messages) as caught:
        read_submission(path, scan, NAMES, params)
    assert caught.value.status == 422


def test_another_grid_or_no_volume_is_refused_without_telling_server_paths(tmp_path: Path, scan: Path) -> None:
    shifted = AFFINE.copy()
    shifted[0, 3] = 10
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"not a volume")
    for path in (submit(tmp_path / "m.nii.gz", {1: 3}, shifted), broken):
        with pytest.raises(RequestError) as caught:
            read_submission(path, scan, NAMES, LabelParams())
        assert caught.value.status == 422
        assert str(path) not in str(caught.value)


def test_unconfigured_structures_may_be_new(tmp_path: Path, scan: Path) -> None:
    path = submit(tmp_path / "m.nii.gz", {1: 3, 2: 5})
    params = info("label 1", "something new")
    labels = read_submission(path, scan, {"label 1": 1}, params, configured=False).volume
    assert set(np.unique(labels.array)) == {0, 1, 2}


def test_label_names_of_unions_and_parts() -> None:
    parts = (Structure("hippocampus", (1, 2)), Structure("anterior", (1,)))
    assert label_names(parts) == {"anterior": 1, "hippocampus 2": 2}
