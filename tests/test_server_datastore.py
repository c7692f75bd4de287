from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException

from segqc.loop.dataset import Dataset
from segqc.server.actors import acting
from segqc.server.errors import RequestError
from segqc.server.monailabel.datastore import StoreDatastore
from segqc.store.records import Actor
from segqc.volumes import write_labels, write_scan
from tests.server_kit import draw_case, make_dataset

ANNA = Actor(kind="person", name="anna", identified_by="client-id")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "studies", scans=3, finals=1)


@pytest.fixture
def store(folder: Path) -> StoreDatastore:
    return StoreDatastore(Dataset(folder))


@pytest.fixture
def label(tmp_path: Path) -> Path:
    path = tmp_path / "mask.nii.gz"
    write_labels(draw_case(0)[1], path)
    return path


def test_lists_what_is_in_the_folder_and_what_comes_into_it(folder: Path, store: StoreDatastore) -> None:
    assert store.list_images() == ["scan_0", "scan_1", "scan_2"]
    assert store.get_labeled_images() == ["scan_0"]
    assert store.get_unlabeled_images() == ["scan_1", "scan_2"]
    assert store.get_unlabeled_images("original") == ["scan_0", "scan_1", "scan_2"]
    write_scan(draw_case(7)[0], folder / "scan.v1.2.nii.gz")
    write_labels(draw_case(7)[1], folder / "labels" / "final" / "scan.v1.2.nii.gz")
    (folder / "scan_1.nii.gz").unlink()
    store.refresh()
    assert store.list_images() == ["scan.v1.2", "scan_0", "scan_2"]
    assert store.get_labeled_images() == ["scan.v1.2", "scan_0"]
    assert not store.has_image("scan_1")
    assert "scan_1" not in store.json()["objects"]
    assert [Path(p["label"]).name for p in store.datalist()] == ["scan.v1.2.nii.gz", "scan_0.nii.gz"]
    assert store.status()["completed"] == 2


def test_a_label_is_the_actors(store: StoreDatastore, label: Path) -> None:
    with acting(ANNA):
        assert store.save_label("scan_1", str(label), DefaultLabelTag.FINAL, {"by": "hand"}) == "scan_1"
    info = store.get_label_info("scan_1", "final")
    assert (info["by"], info["actor"], info["source"], info["name"]) == ("hand", "anna", "annotator", "scan_1.nii.gz")
    store.update_label_info("scan_1", "final", {"seen": True})
    assert store.get_label_info("scan_1", "final")["seen"] is True
    assert Path(store.get_label_uri("scan_1", "final")).read_bytes() == label.read_bytes()
    assert store.get_label("scan_1", "final").read() == label.read_bytes()
    assert store.get_labels_by_image_id("scan_1") == {"final": "scan_1"}
    assert store.get_label_by_image_id("scan_1", "original") == ""
    store.remove_label("scan_1", "final")
    assert store.get_label_uri("scan_1", "final") == ""
    with pytest.raises(LabelNotFoundException):
        store.remove_label("scan_1", "final")


def test_a_removed_scan_is_excluded_and_stays_where_it_is(folder: Path, store: StoreDatastore) -> None:
    with acting(ANNA):
        store.remove_image("scan_2")
    assert store.list_images() == ["scan_0", "scan_1"]
    assert (folder / "scan_2.nii.gz").is_file()
    with pytest.raises(ImageNotFoundException):
        store.remove_image("nobody")


def test_a_scan_whose_file_is_back_is_there_before_the_next_look(
    folder: Path, tmp_path: Path, store: StoreDatastore, label: Path
) -> None:
    scan = folder / "scan_0.nii.gz"
    scan.rename(tmp_path / "away.nii.gz")
    store.refresh()
    assert not store.has_image("scan_0")
    scan.write_bytes(b"not yet copied as a whole")
    assert not store.has_image("scan_0")
    (tmp_path / "away.nii.gz").rename(scan)
    with acting(ANNA):
        assert store.save_label("scan_0", str(label), "final", {}) == "scan_0"


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_label_is_handed_on_with_its_own_scan_only(
    folder: Path, store: StoreDatastore, label: Path, is_replaced: bool
) -> None:
    with acting(ANNA):
        store.save_label("scan_1", str(label), "final", {})
        store.save_label("scan_2", str(label), "final", {})
    (folder / "scan_0.nii.gz").unlink()
    if is_replaced:
        write_scan(draw_case(7)[0], folder / "scan_0.nii.gz")
    os.utime(folder / "scan_1.nii.gz", (0, 0))
    assert [Path(pair["image"]).name for pair in store.datalist()] == ["scan_1.nii.gz", "scan_2.nii.gz"]
    with zipfile.ZipFile(store.get_dataset_archive(None)) as archive:
        assert sorted(archive.namelist()) == [
            "labels/final/scan_1.nii.gz", "labels/final/scan_2.nii.gz", "scan_1.nii.gz", "scan_2.nii.gz",
        ]  # fmt: skip


def test_an_image_can_be_added(store: StoreDatastore, folder: Path) -> None:
    assert store.add_image("new.v2", str(folder / "scan_0.nii.gz"), {"from": "a test"}) == "new.v2"
    assert Path(store.get_image_uri("new.v2")).read_bytes() == (folder / "scan_0.nii.gz").read_bytes()
    assert store.get_image_info("new.v2")["from"] == "a test"


def test_names_that_leave_the_folder_are_refused(folder: Path, store: StoreDatastore, label: Path) -> None:
    before = sorted(p for p in folder.parent.rglob("*") if "store.sqlite" not in p.name)
    with pytest.raises(RequestError):
        store.save_label("scan_1", str(label), "../../out", {})
    with pytest.raises(RequestError):
        store.add_image("../out", str(label), {})
    with pytest.raises(ImageNotFoundException):
        store.save_label("../scan_1", str(label), "final", {})
    with pytest.raises(LabelNotFoundException):
        store.remove_label("../scan_1", "final")
    assert sorted(p for p in folder.parent.rglob("*") if "store.sqlite" not in p.name) == before


def test_monai_labels_own_datastore_can_read_the_folder(store: StoreDatastore, folder: Path, label: Path) -> None:
    with acting(ANNA):
        store.save_label("scan_1", str(label), "final", {})
    plain = LocalDatastore(str(folder), extensions=["*.nii.gz"], auto_reload=False)
    assert sorted(plain.get_labeled_images()) == ["scan_0", "scan_1"]
    assert Path(plain.get_label_uri("scan_1", "final")).read_bytes() == label.read_bytes()


def test_everything_is_told_in_monai_labels_form(store: StoreDatastore) -> None:
    output = json.loads(json.dumps(store.json()))
    assert output["objects"]["scan_0"]["labels"]["final"]["ext"] == ".nii.gz"
    other = output["objects"]["scan_1"]
    assert (other["image"]["info"]["name"], other["image"]["ext"], other["labels"]) == ("scan_1.nii.gz", ".nii.gz", {})
    assert other["image"]["info"]["ts"] > 0
