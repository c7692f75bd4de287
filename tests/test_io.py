"""Folders of other programs, tables, and archives: in and out."""

from __future__ import annotations

import base64
import csv
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from segqc.cli import main
from segqc.cli.common import CommandError
from segqc.io import archive, decathlon, local_datastore, nnunet, tables
from segqc.io.case_list import Count, ExchangeError, Imported, case_list_of, make_dataset
from segqc.selection import segqc as worst_first
from segqc.store import (
    assessments,
    attention_checks,
    corrections,
    events,
    features,
    jobs,
    label_verdicts,
    labels,
    leases,
    maintenance,
    pacs,
    pseudo_labels,
    scans,
)
from segqc.store.database import StoreError
from segqc.store.events import SERVER
from segqc.store.files import sha256_of
from segqc.store.label_verdicts import LabelVerdict
from segqc.store.labels import NewLabel
from segqc.store.leases import LeaseRules
from segqc.store.records import Change, LabelRecord, SeriesRecord, StructureChange, TakenProposal
from segqc.store.schema import Base
from segqc.store.store import LabelChange, Store
from segqc.store.sync import SyncResult, sync
from segqc.types import Metrics, Structure, Unlikeness
from segqc.volumes import Volume, VolumeError, read_labels, scan_id, write_labels, write_scan
from tests.server_kit import make_assessment
from tests.store_kit import (
    ANNA,
    BERT,
    PLACING,
    Clock,
    Steps,
    answer_lease,
    bundle,
    label_map,
    new_database,
    save_final,
    save_mask,
    sync_scans,
    write_assessment,
)

SHAPE = (8, 8, 4)
LIVER = Structure("liver", (1,))
KIDNEYS = Structure("kidneys", (2, 3))


def image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 100, SHAPE).astype(np.int16)
    write_scan(Volume(array, np.diag([1.0, 1.0, 3.0, 1.0])), path)
    return path


def label(path: Path, *values: int) -> Path:
    array = np.zeros(SHAPE, np.uint8)
    for i, value in enumerate(values):
        array[i] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    write_labels(Volume(array, np.diag([1.0, 1.0, 3.0, 1.0])), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset folder: three compressed scans, one NRRD file, and final labels of two of them."""
    for i in range(3):
        image(tmp_path / "studies" / f"scan_{i}.nii.gz", i)
    image(tmp_path / "studies" / "other.nrrd", 3)
    label(tmp_path / "studies" / "labels" / "final" / "scan_0.nii.gz", 1, 2)
    label(tmp_path / "studies" / "labels" / "final" / "other.nrrd", 1, 3)
    return tmp_path / "studies"


@pytest.fixture
def store(folder: Path, url: str | None, clock: Clock) -> Iterator[Store]:
    opened = Store.open(folder, url, clock=clock)
    sync_scans(opened)
    yield opened
    opened.close()


def plain(folder: Path) -> Store:
    """A store on SQLite, with all in it that lies in the folder."""
    opened = Store.open(folder)
    sync_scans(opened)
    return opened


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def states(store: Store) -> dict[str, str]:
    with store.read() as transaction:
        return {s.name: s.state for s in scans.listing(transaction)}


# -------------------------------------------------------------------------------------------- MONAI Label's datastore


def test_a_local_datastore_is_taken_over_in_place(folder: Path) -> None:
    label(folder / "labels" / "second" / "scan_1.nii.gz", 1)
    data = {"ext": ".nii.gz", "info": {"ts": 5, "name": "scan_0.nii.gz", "client": None}}
    objects = {
        "scan_0": {"image": data, "labels": {"final": {"ext": ".nii.gz", "info": {"by": "slicer"}}}},
        "scan_1": {"image": {"ext": ".nii.gz"}, "labels": {"second": {"ext": ".nii.gz", "info": {"ts": 7}}}},
        "gone": {"image": data},
    }
    path = write(folder / "datastore_v2.json", {"name": "n", "description": "d", "images_dir": ".", "objects": objects})
    before = sorted(p.name for p in folder.iterdir())
    opened = plain(folder)
    with opened.write() as transaction:
        scans.update_info(transaction, "scan_0", {"ts": 6})  # what the store knows is newer
    found = local_datastore.take_notes(opened, local_datastore.read_datastore(folder))
    assert (found.scans, found.labels) == (2, 2)
    assert [(item.file, "not there" in item.reason) for item in found.left_aside] == [("gone.nii.gz", True)]
    with opened.read() as transaction:
        assert scans.get(transaction, "scan_0").info == {"ts": 6, "name": "scan_0.nii.gz", "client": None}
        final, second = labels.tags(transaction, "scan_0")["final"], labels.tags(transaction, "scan_1")["second"]
        assert (labels.info(transaction, final.id), labels.info(transaction, second.id)) == (
            {"by": "slicer"},
            {"ts": 7},
        )
        assert final.source == "import"
    opened.close()
    assert sorted(p.name for p in folder.iterdir() if p.name != "segqc") == before
    for damaged in ("{", '{"objects": 1}', '{"objects": {}, "images_dir": "images"}'):
        path.write_text(damaged)
        with pytest.raises(ExchangeError, match=r"datastore_v2\.json"):
            local_datastore.read_datastore(folder)


def test_monai_label_opens_an_exported_datastore(folder: Path, tmp_path: Path) -> None:
    local = pytest.importorskip("monailabel.datastore.local")
    opened = plain(folder)
    save_mask(opened, tmp_path, "scan_1", 5)
    with opened.write() as transaction:
        labels.update_info(transaction, labels.tags(transaction, "scan_0")["final"].id, {"note": None})
        scans.update_info(transaction, "scan_2", {"age": 30})
    assert local_datastore.write_datastore(opened, tmp_path / "out", link=True) == Count(4, 3)
    found = local.LocalDatastore(str(tmp_path / "out"), extensions=("*.nii.gz", "*.nii", "*.nrrd"), auto_reload=False)
    assert sorted(found.list_images()) == ["other", "scan_0", "scan_1", "scan_2"]
    assert sorted(found.get_labeled_images()) == ["other", "scan_0"]
    assert found.get_image_info("scan_2")["age"] == 30
    assert found.get_label_info("scan_0", "final") == {"note": None}
    kept = Path(found.get_label_uri("scan_0", "final"))
    assert kept.read_bytes() == (folder / "labels" / "final" / "scan_0.nii.gz").read_bytes()
    assert (tmp_path / "out" / "scan_0.nii.gz").samefile(folder / "scan_0.nii.gz")

    again = plain(tmp_path / "out")
    assert local_datastore.take_notes(again, local_datastore.read_datastore(tmp_path / "out")) == Imported(4, 3)
    assert states(again) == states(opened)
    with pytest.raises(ExchangeError, match="exists already"):
        local_datastore.write_datastore(opened, tmp_path / "out")
    opened.close()
    again.close()


@pytest.fixture
def in_part(folder: Path) -> Iterator[Store]:
    """A store whose scan_1 has a final label with three of its four slices checked."""
    opened = plain(folder)
    new = NewLabel("scan_1", "final", "annotator", ANNA, checked_slices=(0, 1, 3))
    opened.save_label(new, label(folder.parent / "part.nii.gz", 1, 2))
    yield opened
    opened.close()


def test_what_was_checked_of_a_label_goes_with_an_exported_datastore(in_part: Store, tmp_path: Path) -> None:
    assert local_datastore.write_datastore(in_part, tmp_path / "out") == Count(4, 3, 1)
    again = plain(tmp_path / "out")
    listed = local_datastore.read_datastore(tmp_path / "out")
    for _ in range(2):
        assert local_datastore.take_notes(again, listed) == Imported(4, 3)
    with again.read() as transaction:
        finals = labels.current_of_all(transaction, "final")
        assert len(labels.history(transaction, "scan_1")) == 2, "the second time nothing is new"
    assert {name: found.checked_slices for name, found in finals.items()} == {
        "other": None,
        "scan_0": None,
        "scan_1": (0, 1, 3),
    }
    again.close()


@pytest.mark.parametrize("noted", [[4], [-1], [], "all", [0, 0], [True], [1.0]])
def test_a_note_that_names_no_slices_is_named(folder: Path, noted: object) -> None:
    entry = {"ext": ".nii.gz", "info": {"checked_slices": noted}}
    write(
        folder / "datastore_v2.json", {"objects": {"scan_0": {"image": {"ext": ".nii.gz"}, "labels": {"final": entry}}}}
    )
    opened = plain(folder)
    found = local_datastore.take_notes(opened, local_datastore.read_datastore(folder))
    assert ["labels/final/scan_0.nii.gz: its entry" in item.reason for item in found.left_aside] == [True]
    with opened.read() as transaction:
        assert labels.current_of_all(transaction, "final")["scan_0"].checked_slices is None
    opened.close()


def test_slices_that_nobody_checked_are_ignored_by_nnu_net(in_part: Store, tmp_path: Path) -> None:
    case_list = case_list_of(in_part, (LIVER, KIDNEYS))
    assert {case.name: case.slices for case in case_list.cases}["scan_1"] == (0, 1, 3)
    assert nnunet.write_raw(case_list, tmp_path / "raw") == Count(4, 3, 1)
    listed = json.loads((tmp_path / "raw" / "dataset.json").read_text())
    assert listed["labels"]["ignore"] == 4
    array = read_labels(tmp_path / "raw" / "labelsTr" / "scan_1.nii.gz").array
    assert np.array_equal(array == 4, np.broadcast_to(np.arange(4) == 2, SHAPE))
    before = read_labels(in_part.label_file(current_final(in_part, "scan_1"))).array
    assert np.array_equal(array[:, :, (0, 1, 3)], before[:, :, (0, 1, 3)])
    assert not (read_labels(tmp_path / "raw" / "labelsTr" / "scan_0.nii.gz").array == 4).any()


def current_final(store: Store, scan: str) -> LabelRecord:
    with store.read() as transaction:
        return labels.current_of_all(transaction, "final")[scan]


def test_the_decathlon_gets_whole_labels_only(in_part: Store, tmp_path: Path) -> None:
    assert decathlon.write_task(case_list_of(in_part, (LIVER, KIDNEYS)), tmp_path / "task") == Count(4, 2, 1)
    assert "scan_1.nii.gz" in {path.name for path in (tmp_path / "task" / "imagesTs").iterdir()}
    output = run("export", "decathlon", in_part.dataset, tmp_path / "again")
    assert "4 scans, 2 of them with a label; left out were 1 labels that were checked in part" in output


def test_pseudo_labels_are_not_exported_where_they_would_be_a_person_s(folder: Path, tmp_path: Path) -> None:
    opened = plain(folder)
    mask = save_mask(opened, tmp_path, "scan_1", 5)
    for tag in (labels.PSEUDO, labels.IGNORED):
        opened.save_label(NewLabel("scan_1", tag, "pseudo-label", SERVER, parent=mask.id), opened.label_file(mask))
    opened.save_label(NewLabel("scan_2", labels.PSEUDO, "annotator", ANNA), opened.label_file(mask))
    local_datastore.write_datastore(opened, tmp_path / "out")
    opened.close()
    written = {str(path.relative_to(tmp_path / "out" / "labels")) for path in (tmp_path / "out").glob("labels/*/*")}
    assert written >= {"original/scan_1.nii.gz", "pseudo-label/scan_2.nii.gz"}
    assert not {"pseudo-label/scan_1.nii.gz", "pseudo-label-ignored/scan_1.nii.gz"} & written
    again = plain(tmp_path / "out")
    with again.read() as transaction:
        assert {*labels.tags(transaction, "scan_1")} == {"original"}
    again.close()


def test_all_that_an_import_in_place_does_not_use_is_named(folder: Path) -> None:
    (folder / "labels" / "final" / "scan_1.nii.gz").write_bytes(b"x")
    (folder / "broken.nii").write_bytes(b"x")
    label(folder / "labels" / "final" / "nobody.nii.gz", 1)
    (folder / "notes.xyz").write_text("x", encoding="utf-8")
    ends = {"scan_0": ".nii.gz", "scan_1": ".nii.gz", "gone": ".nrrd", "broken": ".nii"}
    objects = {
        name: {"image": {"ext": end}, "labels": {"final": {"ext": ".nii.gz"}, "second": {"ext": ".nii.gz"}}}
        for name, end in ends.items()
    }
    write(folder / "datastore_v2.json", {"objects": {**objects, "odd": {"image": 5}}})
    output = run("import", "local", folder)
    assert "2 scans and 1 labels taken, " in output
    named = {line.strip().split(":")[0] for line in output.splitlines() if line.startswith("  ")}
    assert named >= {
        "labels/final/scan_1.nii.gz", "broken.nii", "labels/final/nobody.nii.gz", "gone.nrrd",
        "labels/second/scan_0.nii.gz", "labels/second/scan_1.nii.gz", "odd",
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- Decathlon


@pytest.fixture
def task(tmp_path: Path) -> Path:
    folder = tmp_path / "Task99_Liver"
    for part, name in (("Tr", "a"), ("Tr", "b"), ("Ts", "c")):
        image(folder / f"images{part}" / f"{name}.nii.gz", ord(name))
        (folder / f"images{part}" / f"._{name}.nii.gz").touch()
    for name in "ab":
        label(folder / "labelsTr" / f"{name}.nii.gz", 1, 2)
    pairs = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "ab"]
    write(folder / "dataset.json", {
        "name": "Liver", "release": 1.0, "modality": {"0": "CT"}, "tensorImageSize": "3D",
        "labels": {"0": "background", "1": "liver", "2": "liver tumour"},
        "training": pairs, "test": ["./imagesTs/c.nii.gz"],
    })  # fmt: skip
    return folder


def changed(path: Path, **entries: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **entries}))


def test_a_decathlon_task_becomes_a_studies_folder(task: Path, tmp_path: Path) -> None:
    steps = Steps()
    case_list = decathlon.read_task(task)
    assert case_list.structures == (Structure("liver", (1,)), Structure("liver tumour", (2,)))
    assert make_dataset(case_list, tmp_path / "s", link=True, progress=steps) == Imported(3, 2)
    assert steps.seen[-1] == (3, 3, "importing")
    assert (tmp_path / "s" / "a.nii.gz").samefile(task / "imagesTr" / "a.nii.gz")
    assert "liver tumour" in (tmp_path / "s" / "segqc.toml").read_text()
    opened = plain(tmp_path / "s")
    assert states(opened) == {"a": "submitted", "b": "submitted", "c": "unlabelled"}
    with opened.read() as transaction:
        assert labels.tags(transaction, "a")["final"].source == "import"
    opened.close()


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"modality": {"0": "T1", "1": "T2"}}, "T1, T2"),
        ({"labels": {"0": "background"}}, "1 to 255"),
        ({"labels": {"1": "liver", "2": "liver"}}, "same name"),
        ({"training": 3}, r"dataset\.json: is no file"),
    ],
)
def test_an_unusable_decathlon_list_is_refused(task: Path, entries: dict[str, object], match: str) -> None:
    changed(task / "dataset.json", **entries)
    with pytest.raises(ExchangeError, match=match):
        decathlon.read_task(task)


def four_dimensional(path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((*SHAPE, 2), np.int16), np.eye(4)), path)


def foreign_value(path: Path) -> None:
    label(path, 1, 7)


def other_grid(path: Path) -> None:
    write_labels(Volume(np.ones((4, 4, 4), np.uint8), np.eye(4)), path)


BAD_FILES = [
    ("imagesTr/a.nii.gz", four_dimensional, "4-D", (2, 1)),
    ("imagesTr/a.nii.gz", Path.unlink, "not there", (2, 1)),
    ("imagesTs/c.nii.gz", lambda path: path.write_bytes(b"x"), "readable", (2, 2)),
    ("labelsTr/a.nii.gz", foreign_value, "label value 7", (3, 1)),
    ("labelsTr/a.nii.gz", other_grid, "scan", (3, 1)),
    ("labelsTr/a.nii.gz", Path.unlink, "not there", (3, 1)),
]


@pytest.mark.parametrize(("file", "damage", "reason", "counts"), BAD_FILES)
def test_one_bad_file_of_a_task_is_left_aside_and_the_rest_is_taken(
    task: Path, tmp_path: Path, file: str, damage: Callable[[Path], object], reason: str, counts: tuple[int, int]
) -> None:
    damage(task / file)
    found = make_dataset(decathlon.read_task(task), tmp_path / "s")
    assert (found.scans, found.labels) == counts
    (item,) = found.left_aside
    assert file in item.file
    assert item.reason.removeprefix("./").startswith(f"{file}: ")
    assert reason in item.reason
    assert str(tmp_path) not in item.reason
    opened = plain(tmp_path / "s")
    assert len(states(opened)) == counts[0]
    assert sum(state == "submitted" for state in states(opened).values()) == counts[1]
    opened.close()


def test_files_that_a_task_does_not_list_are_named(task: Path, tmp_path: Path) -> None:
    image(task / "imagesTr" / "more.nii.gz", 5)
    label(task / "labelsTr" / "more.nii.gz", 1)
    found = decathlon.read_task(task)
    assert [case.name for case in found.cases] == ["a", "b", "c"]
    assert [item.file for item in found.left_aside] == ["imagesTr/more.nii.gz", "labelsTr/more.nii.gz"]


def test_files_that_a_task_may_not_list_are_left_aside(task: Path, tmp_path: Path) -> None:
    wrong = ["../outside.nii.gz", "./imagesTr/a.nii.gz", "./dataset.json", "a\0b.nii.gz", "/etc/passwd", "x" * 5000]
    changed(task / "dataset.json", test=wrong)
    found = make_dataset(decathlon.read_task(task), tmp_path / "s")
    assert (found.scans, found.labels, len(found.left_aside)) == (2, 2, len(wrong) + 1)
    assert found.left_aside[-2].file == "imagesTs/c.nii.gz", "listed no more"
    assert all(item.reason.isprintable() for item in found.left_aside)


def test_where_no_scan_can_be_taken_nothing_is_written(task: Path, tmp_path: Path) -> None:
    for path in task.glob("images*/*.gz"):
        four_dimensional(path)
    result = CliRunner().invoke(main.app, ["import", "decathlon", str(task), str(tmp_path / "s")])
    assert isinstance(result.exception, CommandError)
    assert "0 scans taken, 3 left aside" in result.output
    assert all(f"images{part}: " in result.output for part in ("Tr/a.nii.gz", "Tr/b.nii.gz", "Ts/c.nii.gz"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Task99_Liver"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_list_is_read_in_the_encodings_of_other_systems(task: Path, encoding: str) -> None:
    path = task / "dataset.json"
    changed(path, labels={"1": "Größe", "2": "肝臓"})
    text = json.dumps(json.loads(path.read_text(encoding="utf-8")), ensure_ascii=False, indent=1).replace("\n", "\r\n")
    mark = "\ufeff" if encoding.endswith("e") else ""
    path.write_bytes((mark + text).encode(encoding))
    assert [s.name for s in decathlon.read_task(task).structures] == ["Größe", "肝臓"]
    path.write_bytes(text.replace("肝臓", "x").encode("cp1252"))
    with pytest.raises(ExchangeError, match=r"dataset\.json: byte \d+ \(0xF6\) is not UTF-8; save the file as UTF-8"):
        decathlon.read_task(task)


@pytest.mark.parametrize("only_approved", [False, True])
def test_labels_that_count_are_exported_for_training(folder: Path, tmp_path: Path, only_approved: bool) -> None:
    opened = plain(folder)
    opened.review("scan_0", "approved", ANNA)
    opened.review("scan_2", "excluded", ANNA, "artefacts")
    case_list = case_list_of(opened, (LIVER, KIDNEYS), only_approved=only_approved)
    labelled = ["scan_0"] if only_approved else ["other", "scan_0"]
    assert decathlon.write_task(case_list, tmp_path / "task") == Count(3, len(labelled))
    back = decathlon.read_task(tmp_path / "task")
    assert [case.name for case in back.cases if case.label is not None] == labelled
    assert {case.name for case in back.cases} == {"other", "scan_0", "scan_1"}
    names = {s.name: s.values for s in back.structures}
    assert names == {"liver": (1,), "kidneys 2": (2,), "kidneys 3": (3,)}
    for case in back.cases:
        if case.label is not None:
            suffix = ".nrrd" if case.name == "other" else ".nii.gz"
            original = read_labels(folder / "labels" / "final" / f"{case.name}{suffix}")
            assert (read_labels(case.label).array == original.array).all()
            np.testing.assert_allclose(read_labels(case.label).affine, original.affine, atol=1e-6)
    opened.close()


def test_without_named_structures_every_value_is_one(folder: Path) -> None:
    opened = plain(folder)
    assert [s.name for s in case_list_of(opened, ()).structures] == ["label 1", "label 2", "label 3"]
    opened.close()


# ----------------------------------------------------------------------------------------------------------- nnU-Net


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "Dataset099_Abdomen"
    for part, name in (("Tr", "a_1"), ("Ts", "b")):
        image(folder / f"images{part}" / f"{name}_0000.nii.gz", ord(name[0]))
        (folder / f"images{part}" / f"._{name}_0000.nii.gz").touch()
    label(folder / "labelsTr" / "a_1.nii.gz", 1, 2, 3)
    write(folder / "dataset.json", {
        "channel_names": {"0": "CT"}, "labels": {"background": 0, "organs": [1, 2, 3], "liver": 3},
        "regions_class_order": [1, 3], "numTraining": 1, "file_ending": ".nii.gz",
    })  # fmt: skip
    return folder


def test_an_nnunet_folder_becomes_a_studies_folder_and_one_again(raw: Path, tmp_path: Path) -> None:
    case_list = nnunet.read_raw(raw)
    assert case_list.structures == (Structure("organs", (1, 2, 3)), Structure("liver", (3,)))
    assert make_dataset(case_list, tmp_path / "s") == Imported(2, 1)
    opened = plain(tmp_path / "s")
    assert states(opened) == {"a_1": "submitted", "b": "unlabelled"}
    nnunet.write_raw(case_list_of(opened, case_list.structures), tmp_path / "again")
    opened.close()
    again = nnunet.read_raw(tmp_path / "again")
    assert again.structures == case_list.structures
    assert json.loads((tmp_path / "again" / "dataset.json").read_text())["regions_class_order"] == [1, 3]
    for before, after in zip(case_list.cases, again.cases, strict=True):
        assert after.image.relative_to(again.folder) == before.image.relative_to(raw)
        assert after.image.read_bytes() == before.image.read_bytes()
        assert (after.label is None) == (before.label is None)


def test_gaps_between_label_values_are_closed_for_nnunet(folder: Path, tmp_path: Path) -> None:
    label(folder / "labels" / "final" / "scan_0.nii.gz", 5, 9)
    (folder / "labels" / "final" / "other.nrrd").unlink()
    opened = plain(folder)
    structures = (Structure("left", (9,)), Structure("right", (5,)))
    assert nnunet.write_raw(case_list_of(opened, structures), tmp_path / "raw") == Count(4, 1)
    back = nnunet.read_raw(tmp_path / "raw")
    assert back.structures == (Structure("left", (2,)), Structure("right", (1,)))
    written = read_labels(tmp_path / "raw" / "labelsTr" / "scan_0.nii.gz").array
    assert (written[0] == 1).all()
    assert (written[1] == 2).all()
    with pytest.raises(VolumeError, match="label value 9"):
        nnunet.write_raw(case_list_of(opened, structures[1:]), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    opened.close()


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"channel_names": {"0": "T1", "1": "T2"}}, "T1, T2"),
        ({"file_ending": ".png"}, r"\.png"),
        ({"labels": {"background": 0, "liver": 1, "ignore": 2}}, "ignore"),
        ({"labels": {"background": 0, "liver": 300}}, "1 to 255"),
        ({"labels": {"background": 0}}, "1 to 255"),
        ({"dataset": {"a": {}}}, "'dataset'"),
        ({"labels": None}, "is no file of nnU-Net"),
    ],
)
def test_unusable_nnunet_folders_are_refused(raw: Path, entries: dict[str, object], match: str) -> None:
    changed(raw / "dataset.json", **entries)
    with pytest.raises(ExchangeError, match=match):
        nnunet.read_raw(raw)


def test_files_of_no_case_are_left_aside(raw: Path, tmp_path: Path) -> None:
    image(raw / "imagesTs" / "b_0001.nii.gz")
    image(raw / "imagesTr" / "plain.nii.gz")
    image(raw / "imagesTr" / "c_0000.nii.gz")
    (raw / "imagesTr" / "notes.txt").write_text("x", encoding="utf-8")
    label(raw / "labelsTr" / "nobody.nii.gz", 1)
    found = make_dataset(nnunet.read_raw(raw), tmp_path / "s")
    assert (found.scans, found.labels) == (3, 1)
    assert sorted(item.file for item in found.left_aside) == [
        "imagesTr/c_0000.nii.gz", "imagesTr/notes.txt", "imagesTr/plain.nii.gz", "imagesTs/b_0001.nii.gz",
        "labelsTr/nobody.nii.gz",
    ]  # fmt: skip
    assert all(item.reason.startswith(f"{item.file}: ") for item in found.left_aside)


def test_a_name_that_is_no_text_is_left_aside(raw: Path, tmp_path: Path) -> None:
    (raw / "imagesTs" / "b_0000.nii.gz").rename(raw / "imagesTs" / "\udcff_0000.nii.gz")
    found = make_dataset(nnunet.read_raw(raw), tmp_path / "s")
    assert (found.scans, [item.file for item in found.left_aside]) == (1, ["imagesTs/\\xff_0000.nii.gz"])


def test_suffixes_in_capitals_are_the_same(raw: Path, tmp_path: Path) -> None:
    for path in list(raw.glob("*/[!.]*.nii.gz")):
        path.rename(path.with_name(path.name.replace(".nii.gz", ".NII.GZ")))
    assert make_dataset(nnunet.read_raw(raw), tmp_path / "s") == Imported(2, 1)
    assert (tmp_path / "s" / "labels" / "final" / "a_1.nii.gz").is_file()


# ------------------------------------------------------------------------------------------------ tables and archives


def fill(store: Store, folder: Path, clock: Clock) -> LabelRecord:
    """Something in every table; gives the corrected label."""
    mask = save_mask(store, folder.parent, "scan_1", 5)
    with store.write() as transaction:
        written = replace(make_assessment("scan_1", 0.7, half_width=0.1), segmenter_version="seg1")
        write_assessment(transaction, written, mask.id)
        assessments.write_score(transaction, "scan_1", "tta", 0.25, "seg1")
        lease = leases.acquire(transaction, ANNA, "segqc", worst_first.order, LeaseRules(0.1, validation_share=0))
        assert lease is not None
        job = jobs.enqueue(transaction, "round", {"epochs": 3}, BERT)
        number, _ = jobs.begin_round(transaction, job.id, 2)
        jobs.finish_step(transaction, number, "train", {"dice": 0.5})
        features.write(transaction, scans.number_of(transaction, "scan_1"), "segmenter", "seg1", [0.5, -3.0])
        labels.update_info(transaction, mask.id, {"params": {"label_names": {"liver": 1}}})
    clock.pass_(minutes=2, microseconds=5)
    metrics = Metrics(0.65, 0.5, None, -0.1)
    change = Change(
        through_plane_axis=2,
        voxels_changed=40,
        slices_changed=1,
        structures=(StructureChange(name="liver", metrics=metrics, voxels_changed=40, slices=(metrics,)),),
        opened_slices=(0, 1),
    )
    source = label_map(folder.parent / "submitted.nii.gz", 6)
    store.save_label(NewLabel("scan_1", "returned", "restored", ANNA, checked_slices=()), source)
    final = NewLabel("scan_1", "final", "annotator", ANNA, checked_slices=(0, 1))
    with store.change_labels([LabelChange(final, source)]) as changing:
        lease = answer_lease(changing.transaction, "scan_1", ANNA)
        corrections.add(changing.transaction, mask, changing.versions[0], change, ANNA, lease=lease)
        return changing.versions[0]


def test_tables_tell_which_intervals_apply(store: Store, folder: Path, tmp_path: Path) -> None:
    found = {"scan_0": Unlikeness(1.5, 0.05), "scan_1": Unlikeness(1.0, 0.5), "scan_2": Unlikeness(1.5, None)}
    for i, (name, unlikeness) in enumerate(found.items()):
        mask = save_mask(store, folder.parent, name, i + 1)
        with store.write() as transaction:
            written = make_assessment(name, 0.7, half_width=0.1 if i < 2 else None, unlikeness=unlikeness)
            write_assessment(transaction, written, mask.id)
    tables.write_tables(store, tmp_path / "t", "csv")
    rows = {row["scan"]: row for row in csv.DictReader((tmp_path / "t" / "assessments.csv").open())}
    said = {
        name: [row[c] for c in ("unlikeness", "unlikeness_p_value", "interval_applies")] for name, row in rows.items()
    }
    assert said == {"scan_0": ["1.5", "0.05", "false"], "scan_1": ["1.0", "0.5", "true"], "scan_2": ["1.5", "", ""]}
    assert float(rows["scan_0"]["estimated_dice_low"]) == pytest.approx(0.6), "kept"


def test_tables_as_csv(store: Store, folder: Path, clock: Clock, tmp_path: Path) -> None:
    final = fill(store, folder, clock)
    counts = tables.write_tables(store, tmp_path / "t", "csv")
    read = {name: list(csv.DictReader((tmp_path / "t" / f"{name}.csv").open())) for name in counts}
    assert {name: len(rows) for name, rows in read.items()} == counts
    (assessment,) = read["assessments"]
    assert assessment["scan"] == assessment["patient"] == "scan_1"
    assert (assessment["segmenter_version"], assessment["assessor_version"], assessment["tag"]) == (
        "seg1",
        "qc",
        "original",
    )
    assert (assessment["structure"], assessment["present"], float(assessment["estimated_dice"])) == (
        "liver",
        "true",
        0.7,
    )
    ends = [float(assessment[f"estimated_dice_{end}"]) for end in ("low", "high")]
    assert (*ends, float(assessment["interval_level"])) == pytest.approx((0.6, 0.8, 0.9))
    assert assessment["estimated_rvd_low"] == ""
    (correction,) = read["corrections"]
    shown = ("actor", "identified_by", "draw", "simulated", "opened_slices", "true_arvd")
    assert {k: correction[k] for k in shown} == {
        "actor": "anna", "identified_by": "client-id", "draw": correction["draw"], "simulated": "false",
        "opened_slices": "[0, 1]", "true_arvd": "",
    }  # fmt: skip
    assert (float(correction["true_dice"]), float(correction["seconds"])) == (0.65, 120.000005)
    assert int(correction["to_version"]) == final.id
    assert correction["estimated_dice"] in ("0.7", "")  # an audit draw may have shown another scan
    assert [row["state"] for row in read["leases"]] == ["submitted"]
    assert [row["label_version"] for row in read["label_versions"]] == [str(i + 1) for i in range(5)]
    assert [row["checked_slices"] for row in read["label_versions"]] == ["", "", "", "[]", "[0, 1]"]
    assert [row["slices"] for row in read["leases"]] == [""]
    assert json.loads(read["label_versions"][2]["info"]) == {"params": {"label_names": {"liver": 1}}}
    assert read["events"][0]["at"] == "2026-01-01T12:00:00+00:00"


@pytest.mark.parametrize("start", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_text_that_begins_a_formula_is_quoted_in_tables(folder: Path, tmp_path: Path, start: str) -> None:
    opened = plain(folder)
    opened.review("scan_0", "approved", replace(ANNA, name=f"{start} anna"))
    tables.write_tables(opened, tmp_path / "t", "csv")
    opened.close()
    with (tmp_path / "t" / "events.csv").open(encoding="utf-8", newline="") as file:
        found = [row["actor"] for row in csv.DictReader(file) if "anna" in row["actor"]]
    assert found == [f"'{start} anna".replace("\r", "\n")]


def test_tables_as_parquet_say_the_same(store: Store, folder: Path, clock: Clock, tmp_path: Path) -> None:
    from pyarrow import parquet

    fill(store, folder, clock)
    counts = tables.write_tables(store, tmp_path / "t", "parquet")
    tables.write_tables(store, tmp_path / "t", "csv")
    for name, count in counts.items():
        typed = parquet.read_table(tmp_path / "t" / f"{name}.parquet").to_pylist()
        texts = list(csv.DictReader((tmp_path / "t" / f"{name}.csv").open()))
        assert len(typed) == len(texts) == count
        for a, b in zip(typed, texts, strict=True):
            assert {k: str(tables._cell(v)) if v is not None else "" for k, v in a.items()} == b


def test_without_pyarrow_parquet_is_one_sentence(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ExchangeError, match="pyarrow"):
        tables.write_tables(store, tmp_path / "t", "parquet")
    assert not (tmp_path / "t").exists()


def kept(store: Store) -> dict[str, list[tuple[object, ...]]]:
    """All rows that an archive keeps: not which folder it is, nor when the files below ``labels/`` were written."""
    found = {table: values for table, values in rows(store).items() if table != "folder"}
    return {**found, "label_view": [row[:-1] for row in found["label_view"]]}


def rows(store: Store) -> dict[str, list[tuple[object, ...]]]:
    with store.read() as transaction:
        return {
            table.name: [tuple(row) for row in transaction.execute(select(table).order_by(*table.primary_key.columns))]
            for table in Base.metadata.sorted_tables
        }


@pytest.mark.parametrize("into", ["sqlite", pytest.param("postgresql", marks=pytest.mark.server)])
def test_an_archive_gives_the_same_rows_and_files(
    store: Store, folder: Path, clock: Clock, tmp_path: Path, into: str, request: pytest.FixtureRequest
) -> None:
    final, judged_by = fill(store, folder, clock), bundle(store).id
    planted = NewLabel("scan_1", labels.ATTENTION_CHECK, "attention check", SERVER)
    with store.change_labels([LabelChange(planted, label_map(tmp_path / "planted.nii.gz", 8))]) as change:
        (lease,) = leases.listing(change.transaction)
        attention_checks.add(change.transaction, lease, change.versions[0], "leak")
    with store.write() as transaction:
        why = {"dice": 0.9, "low": 0.8, "level": 0.9, "rule": "a rule", "max_error": 0.5, "is_audited": True}
        pseudo_labels.add(transaction, final, final, **why)  # type: ignore[arg-type]
        series = {"study_uid": "1.2", "series_uid": "1.2.3", "description": "T2", "modality": "MR"}
        pacs.note_series(transaction, [SeriesRecord(file="scan_0.nii.gz", images=9, **series)])
        pacs.begin(transaction, final.id, "1.2", "1.2.4")
        verdict = LabelVerdict(assessment=make_assessment(final.scan, 0.8), networks=2)
        label_verdicts.write(transaction, final.id, judged_by, verdict)
        label_verdicts.mark_right(transaction, final.scan, ANNA, version=final.id)
        other = labels.history(transaction, final.scan)[0].id
        assert other != final.id
        labels.note_proposal(transaction, final.id, TakenProposal(proposal=other, boxes_offered=3, boxes_taken=2))
    (folder / "left_aside.mha").touch()
    sync(store, scan_id, PLACING)
    written = archive.export_archive(store, tmp_path / "archive")
    assert all(written[table] for table in written), "the test wants a row in every table"

    shutil.copytree(folder, tmp_path / "fresh", ignore=shutil.ignore_patterns("segqc", "labels"))
    url = None if into == "sqlite" else new_database(request.getfixturevalue("postgresql"))
    fresh = Store.open(tmp_path / "fresh", url, clock=clock)
    assert archive.import_archive(tmp_path / "archive", fresh) == written
    assert kept(fresh) == kept(store)
    assert fresh.view_file(final).read_bytes() == store.view_file(final).read_bytes()
    assert sync(fresh, scan_id, PLACING) == SyncResult()
    assert maintenance.check(fresh) == []
    before = max(row[0] for row in rows(fresh)["event"])
    save_final(fresh, tmp_path, "scan_2", 9)  # new rows are numbered on
    assert all(row[0] > before for row in rows(fresh)["event"][before:])
    with pytest.raises(ExchangeError, match="labels lie in the folder"):
        archive.import_archive(tmp_path / "archive", fresh)
    shutil.rmtree(tmp_path / "fresh" / "labels")
    with pytest.raises(ExchangeError, match="holds rows already"):
        archive.import_archive(tmp_path / "archive", fresh)
    fresh.close()


@pytest.fixture
def archived(folder: Path, clock: Clock, tmp_path: Path) -> Path:
    """An archive with rows in every table."""
    opened = Store.open(folder, clock=clock)
    sync_scans(opened)
    fill(opened, folder, clock)
    archive.export_archive(opened, tmp_path / "archive")
    opened.close()
    return tmp_path / "archive"


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Store]:
    (tmp_path / "fresh").mkdir()
    opened = Store.open(tmp_path / "fresh")
    yield opened
    opened.close()


def rewritten(folder: Path, table: str, change: Callable[[list[str]], list[str]]) -> None:
    """Change the lines of a table in an archive whose list of files fits them again."""
    path = folder / "tables" / f"{table}.jsonl"
    lines = change(path.read_text().splitlines())
    path.write_text("".join(f"{line}\n" for line in lines))
    told = json.loads((folder / "archive.json").read_text())
    told["tables"][table] = {"rows": len(lines), "sha256": sha256_of(path)}
    (folder / "archive.json").write_text(json.dumps(told))


def refused_archive(folder: Path, store: Store) -> str:
    """The sentence by which an archive is refused; nothing of it stays."""
    with pytest.raises((ExchangeError, StoreError)) as caught:
        archive.import_archive(folder, store)
    assert not any(rows(store).values())
    assert not [*store.files.all_objects(), *store.files.views.rglob("*")]
    assert not (store.dataset.parent / "elsewhere").exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


def bomb(size: int) -> str:
    return base64.b64encode(zlib.compress(bytes(size))).decode()


@pytest.mark.parametrize(
    ("table", "column", "value", "said"),
    [
        *(
            ("scan", "file", name, "outside of the dataset")
            for name in ("../x.nii.gz", "/tmp/x.nii.gz", "a/x.nii", "..")
        ),
        *(("scan", "name", name, "outside of the dataset") for name in ("../../x", ".hidden", "", "a\0")),
        *(("label_version", "tag", tag, "outside of the dataset") for tag in ("../elsewhere", "..", "a/b", "/tmp")),
        *(("label_version", "suffix", suffix, "outside of the dataset") for suffix in ("/../../x.nii.gz", "\0")),
        ("label_version", "submitted_suffix", "/../../x.nii.gz", "outside of the dataset"),
        *(("label_version", "sha256", sha256, "no SHA-256") for sha256 in ("../../../elsewhere", "A" * 64, "a" * 63)),
        ("label_version", "submitted_sha256", "../x", "no SHA-256"),
        ("label_version", "sha256", "a" * 64, "this label content is missing"),
        ("label_version", "scan_id", 99, "contradict each other"),
        ("label_version", "source", "nobody", "contradict each other"),
        ("label_version", "made_at", "2026-01-01", "no time with its zone"),
        ("label_version", "made_at", 7, "no time with its zone"),
        *(("label_version", "checked_slices", slices, "no list of slices") for slices in ([2, 1], [1, 1], "12", [-1])),
        *(("lease", "slices", slices, "no list of slices") for slices in ([True], [])),
        ("scan", "id", "1", "not of the type int"),
        ("scan", "id", True, "not of the type int"),
        ("scan", "id", 1 << 63, "too large"),
        ("scan", "id", None, "is missing"),
        ("scan", "name", "\ud800", "surrogates not allowed"),
        ("score", "value", math.inf, "no JSON"),
        ("score", "method", 1, "not of the type str"),
        ("assessment_structure", "detail", bomb(1 << 28), "expands to more than"),
        ("assessment_structure", "detail", bomb(99)[:8], "truncated"),
        ("assessment_structure", "detail", "AAAA", "damaged"),
        ("feature", "numbers", "AHw=", "no finite 16-bit floats"),
        ("feature", "numbers", "AAAA", "no finite 16-bit floats"),
        ("assessment_structure", "detail", "a-b", "base64"),
    ],
)
def test_a_row_that_cannot_be_meant_is_refused(
    archived: Path, fresh: Store, table: str, column: str, value: object, said: str
) -> None:
    def change(lines: list[str]) -> list[str]:
        return [json.dumps({**json.loads(lines[0]), column: value}), *lines[1:]]

    rewritten(archived, table, change)
    assert said in refused_archive(archived, fresh)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no JSON"),
        ("[]", "does not hold the columns"),
        ("{}", "does not hold the columns"),
        ("[" * 100_000, "nested too deep"),
        ("", "no JSON"),
        (" " * ((1 << 26) + 1), "longer than"),
    ],
)
def test_a_line_that_is_no_row_is_refused(archived: Path, fresh: Store, line: str, said: str) -> None:
    rewritten(archived, "event", lambda lines: [*lines, line])
    message = refused_archive(archived, fresh)
    assert said in message
    assert "event.jsonl: line " in message


@pytest.mark.parametrize("table", ["scan", "label_version", "event", "score"])
def test_rows_that_are_there_twice_are_refused(archived: Path, fresh: Store, table: str) -> None:
    rewritten(archived, table, lambda lines: [*lines, lines[0]])
    assert "contradict each other (UNIQUE constraint failed" in refused_archive(archived, fresh)


def damaged_content(folder: Path) -> None:
    path = next((folder / "labels").rglob("*.nii.gz"))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])


def pipe_for_content(folder: Path) -> None:
    path = next((folder / "labels").rglob("*.nii.gz"))
    path.unlink()
    os.mkfifo(path)


def fewer_rows(folder: Path) -> None:
    told = json.loads((folder / "archive.json").read_text())
    told["tables"]["event"]["rows"] += 1
    (folder / "archive.json").write_text(json.dumps(told))


def cut(folder: Path, file: str) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:-9])


def pipe(folder: Path, file: str) -> None:
    (folder / file).unlink()
    os.mkfifo(folder / file)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damaged_content, "this label content is damaged"),
        (pipe_for_content, "this label content is missing"),
        (lambda folder: shutil.rmtree(folder / "labels"), "this label content is missing"),
        (fewer_rows, "export the archive again"),
        (lambda folder: cut(folder, "tables/event.jsonl"), "event.jsonl: is missing or damaged"),
        (lambda folder: (folder / "tables" / "scan.jsonl").unlink(), "scan.jsonl: is missing or damaged"),
        (lambda folder: pipe(folder, "tables/scan.jsonl"), "scan.jsonl: is missing or damaged"),
        (lambda folder: cut(folder, "archive.json"), "archive.json: is no file of an archive of segqc"),
        (lambda folder: (folder / "archive.json").unlink(), "archive.json: cannot be read"),
        (lambda folder: pipe(folder, "archive.json"), "archive.json: is no file"),
        (lambda folder: changed(folder / "archive.json", revision="0000"), "revision 0000"),
        (lambda folder: changed(folder / "archive.json", tables={}), "is missing or damaged"),
    ],
)
def test_a_damaged_archive_changes_nothing(
    archived: Path, fresh: Store, damage: Callable[[Path], object], said: str
) -> None:
    damage(archived)
    assert said in refused_archive(archived, fresh)


def test_label_files_that_cannot_be_written_are_named_with_the_remedy(archived: Path, fresh: Store) -> None:
    (fresh.dataset / "labels").touch()  # a file in the folder's place
    with pytest.raises(ExchangeError, match=r"the archive is imported, but .*'segqc db restore-views' writes"):
        archive.import_archive(archived, fresh)
    (fresh.dataset / "labels").unlink()
    for path in archived.parent.joinpath("studies").glob("*.n*"):
        shutil.copy(path, fresh.dataset)
    assert sync(fresh, scan_id, PLACING).removed_labels == 0, "a file that was never written was not removed"
    maintenance.rebuild_views(fresh)
    assert maintenance.check(fresh) == []


def test_more_rows_than_fit_into_one_batch(folder: Path, tmp_path: Path) -> None:
    opened = plain(folder)
    with opened.write() as transaction:
        events.record_all(transaction, ANNA, "looked at", "scan", [1] * 2500)
    archive.export_archive(opened, tmp_path / "archive")
    (tmp_path / "fresh").mkdir()
    fresh = Store.open(tmp_path / "fresh")
    archive.import_archive(tmp_path / "archive", fresh)
    assert kept(fresh) == kept(opened)
    opened.close()
    fresh.close()


# ---------------------------------------------------------------------------------------------------------- commands


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main.app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


def test_the_commands(task: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "studies"
    assert "3 scans and 2 labels taken, 0 left aside" in run("import", "decathlon", task, dataset, "--link")
    assert "3 scans, 2 of them" in run("export", "nnunet", dataset, tmp_path / "raw")
    assert "3 scans and 2 labels taken, 0 left aside" in run("import", "nnunet", tmp_path / "raw", tmp_path / "second")
    assert "3 scans, 0 of them" in run("export", "decathlon", dataset, tmp_path / "task", "--only-approved")
    assert "3 scans, 2 labels" in run("export", "local", dataset, tmp_path / "local")
    assert "3 scans and 2 labels taken, 0 left aside" in run("import", "local", tmp_path / "local")
    assert "2 label_versions" in run("export", "tables", dataset, tmp_path / "tables")
    assert "3 scan" in run("export", "archive", dataset, tmp_path / "archive")
    (tmp_path / "third").mkdir()
    for name in "abc":
        shutil.copy(dataset / f"{name}.nii.gz", tmp_path / "third")
    assert "3 scan" in run("import", "archive", tmp_path / "archive", tmp_path / "third")
    assert "nothing is wrong" in run("db", "check", tmp_path / "third")


@pytest.mark.server
def test_the_archive_commands_lead_from_one_database_to_the_other_and_back(
    folder: Path, tmp_path: Path, postgresql: str
) -> None:
    url = new_database(postgresql)
    for name, settings in (
        ("there", f'[store]\nurl = "{url}"\n'),
        ("back", ""),
        ("other", f'[store]\nurl = "{url}"\n'),
    ):
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("segqc", "labels"))
        (tmp_path / name / "segqc.toml").write_text(settings)
    run("export", "archive", folder, tmp_path / "first")
    run("import", "archive", tmp_path / "first", tmp_path / "there")
    assert not (tmp_path / "there" / "segqc" / "store.sqlite").exists()
    assert "nothing is wrong" in run("db", "check", tmp_path / "there")
    run("export", "archive", tmp_path / "there", tmp_path / "second")
    run("import", "archive", tmp_path / "second", tmp_path / "back")
    assert "nothing is wrong" in run("db", "check", tmp_path / "back")
    found = [Store.open(tmp_path / name, url) for name, url in (("studies", None), ("there", url), ("back", None))]
    histories = []
    for opened in found:
        with opened.read() as transaction:
            histories.append(labels.history(transaction, "scan_0"))
        opened.close()
    assert histories[0]
    assert histories[1:] == histories[:1] * 2
    refused = CliRunner().invoke(main.app, ["import", "archive", str(tmp_path / "first"), str(tmp_path / "other")])
    assert isinstance(refused.exception, StoreError)
    assert "is the database of the dataset folder" in str(refused.exception)
