"""Names in two Unicode forms: macOS stores accents apart from their letters (NFD), most others together (NFC)."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from segqc.io import decathlon, nnunet
from segqc.io.case_list import CaseList, make_dataset
from segqc.loop.agreement import find_labels
from segqc.loop.dataset import Dataset
from segqc.loop.prepare import labelled_pairs
from segqc.loop.submission import submit_label
from segqc.settings import load_settings, write_settings
from segqc.store import labels, scans
from segqc.store.maintenance import check
from segqc.store.records import LabelRecord, ScanRecord
from segqc.store.scans import UnknownScan
from segqc.store.sync import ScanExists
from segqc.volumes import label_id, label_suffix, read_labels, write_labels, write_scan
from tests.server_kit import CONFIG, draw_case
from tests.store_kit import ANNA

Form = Literal["NFC", "NFD"]
FORMS: tuple[Form, ...] = ("NFC", "NFD")
BOTH = [(one, other) for one in FORMS for other in FORMS]
NAME = "Jos\u00e9 fo\u0308tus 1"  # one letter composed, one not


def name_in(form: Form) -> str:
    return unicodedata.normalize(form, NAME)


def put_scan(folder: Path, name: str, index: int = 0, suffix: str = ".nii.gz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_scan(draw_case(index)[0], folder / f"{name}{suffix}")
    return folder / f"{name}{suffix}"


def put_label(folder: Path, name: str, index: int = 0, tag: str = "final") -> Path:
    path = folder / "labels" / tag / f"{name}.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_labels(draw_case(index)[1], path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "segqc.toml").write_text(CONFIG)
    return tmp_path / "studies"


@pytest.fixture
def dataset(folder: Path) -> Iterator[Dataset]:
    opened = Dataset(folder)
    yield opened
    opened.store.close()


def record(dataset: Dataset, name: str) -> ScanRecord:
    with dataset.store.read() as transaction:
        return scans.get(transaction, name)


def history(dataset: Dataset, name: str) -> list[LabelRecord]:
    with dataset.store.read() as transaction:
        return labels.history(transaction, name)


def all_scans(dataset: Dataset) -> list[str]:
    with dataset.store.read() as transaction:
        return scans.names(transaction, missing=True)


def rename_all(folder: Path, form: Form) -> None:
    """Give every scan and label file its name in a form, as a copy made by another system has it."""
    for path in [*folder.glob("*.nii.gz"), *folder.glob("labels/*/*")]:
        path.rename(path.with_name(unicodedata.normalize(form, path.name)))


@pytest.mark.parametrize(("scan", "label"), BOTH)
def test_a_label_belongs_to_its_scan_in_any_form(dataset: Dataset, folder: Path, scan: Form, label: Form) -> None:
    put_scan(folder, name_in(scan))
    path = put_label(folder, name_in(label), 1)
    dataset.sync()
    assert dataset.findings() == []
    assert all_scans(dataset) == [name_in(scan)]
    (version,) = history(dataset, name_in(scan))
    assert dataset.store.view_file(version) == path
    assert check(dataset.store) == []
    for wanted in FORMS:
        assert record(dataset, name_in(wanted)).state == "submitted"
    write_labels(draw_case(2)[1], path)  # an edit in place, unseen until it would be overwritten
    submit_label(dataset, name_in(scan), draw_case(3)[1], "final", ANNA)
    assert [path] == list(path.parent.iterdir())
    kept = [read_labels(dataset.store.label_file(version)).array for version in history(dataset, name_in(scan))]
    for array, index in zip(kept, (1, 2, 3), strict=True):
        assert np.array_equal(array, draw_case(index)[1].array)
    dataset.sync()
    assert check(dataset.store) == []
    path.unlink()
    dataset.sync()
    assert [version.source for version in history(dataset, name_in(scan))][-1] == "removal"


@pytest.mark.parametrize("form", FORMS)
def test_a_label_that_came_before_its_scan_is_taken_in_with_it(dataset: Dataset, folder: Path, form: Form) -> None:
    put_label(folder, name_in("NFD"))
    put_label(folder, name_in("NFC"), 1)
    dataset.sync()
    assert len(dataset.findings()) == 2
    put_scan(folder, name_in(form))
    dataset.sync()
    assert dataset.findings() == []
    assert len(history(dataset, name_in(form))) == 2  # both are kept, the newest counts


@pytest.mark.parametrize("known_first", [True, False])
@pytest.mark.parametrize("suffixes", [(".nii.gz", ".nii.gz"), (".nii.gz", ".nrrd")])
def test_of_two_scans_that_differ_by_form_none_is_lost(
    dataset: Dataset, folder: Path, known_first: bool, suffixes: tuple[str, str]
) -> None:
    first = put_scan(folder, name_in("NFD" if known_first else "NFC"), suffix=suffixes[0])
    if known_first:
        dataset.sync()
    second = put_scan(folder, name_in("NFC" if known_first else "NFD"), 1, suffix=suffixes[1])
    before = first.read_bytes(), second.read_bytes()
    for _ in range(2):
        dataset.sync()
    if suffixes[0] == suffixes[1]:
        (finding,) = dataset.findings()
        assert finding.file == second.name
        assert first.name in finding.sentence
        assert "rename one" in finding.sentence
        assert all_scans(dataset) == [label_id(first)]
    else:
        assert len({unicodedata.normalize("NFC", name) for name in all_scans(dataset)}) == 2
        assert dataset.findings() == []
    assert (first.read_bytes(), second.read_bytes()) == before
    if suffixes[0] == suffixes[1]:
        second.rename(second.with_name("other.nii.gz"))
        dataset.sync()
        assert dataset.findings() == []
        assert sorted(all_scans(dataset)) == sorted([label_id(first), "other"])


@pytest.mark.parametrize(("before", "after"), BOTH)
def test_a_copy_in_another_form_is_the_same_folder(dataset: Dataset, folder: Path, before: Form, after: Form) -> None:
    put_scan(folder, name_in(before))
    put_scan(folder, "plain", 1)
    put_label(folder, name_in(before))
    put_label(folder, name_in(before), 1, tag="original")
    dataset.sync()
    known = record(dataset, name_in(before))
    rename_all(folder, after)
    dataset.sync()
    now = record(dataset, name_in(before))
    assert (now.name, now.sha256, now.state, now.missing_since) == (known.name, known.sha256, "submitted", None)
    assert now.file == f"{name_in(after)}.nii.gz"
    assert len(history(dataset, known.name)) == 2
    assert dataset.findings() == []
    assert check(dataset.store) == []
    assert dataset.scan(known.name).image.is_file()


def test_another_content_in_another_form_is_another_scan(dataset: Dataset, folder: Path) -> None:
    path = put_scan(folder, name_in("NFC"))
    dataset.sync()
    known = record(dataset, name_in("NFC"))
    put_scan(folder, name_in("NFD"), 1)
    dataset.sync()
    path.unlink()
    dataset.sync()
    now = record(dataset, name_in("NFC"))
    assert (now.name, now.file) == (name_in("NFC"), f"{name_in('NFD')}.nii.gz")
    assert now.id != known.id
    assert len(all_scans(dataset)) == 2
    assert dataset.findings() == []


@pytest.mark.parametrize(("there", "sent"), BOTH)
def test_an_upload_in_another_form_replaces_nothing(
    dataset: Dataset, folder: Path, tmp_path: Path, there: Form, sent: Form
) -> None:
    path = put_scan(folder, name_in(there))
    dataset.sync()
    content = path.read_bytes()
    again = dataset.add_scan(put_scan(tmp_path, "same"), name_in(sent))
    assert (again.name, again.new) == (name_in(there), False)
    with pytest.raises(ScanExists) as raised:
        dataset.add_scan(put_scan(tmp_path, "other", 1), name_in(sent))
    assert raised.value.name == name_in(there)
    assert [p.name for p in folder.glob("*.nii.gz")] == [path.name]
    assert path.read_bytes() == content


def test_a_name_that_no_scan_has_in_any_form_is_unknown(dataset: Dataset, folder: Path) -> None:
    put_scan(folder, name_in("NFC"))
    dataset.sync()
    with pytest.raises(UnknownScan):
        record(dataset, f"{NAME}\u0301")


# -------------------------------------------------------------------------------------------------------- the server


@pytest.mark.parametrize(("there", "asked"), BOTH)
def test_clients_may_call_a_scan_in_any_form(folder: Path, tmp_path: Path, there: Form, asked: Form) -> None:
    pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")
    from tests.server_kit import serving

    put_scan(folder, name_in(there))
    label = put_label(tmp_path, "sent", 1)
    with serving(folder) as client:
        name = name_in(asked)
        sent = {"label": ("m.nii.gz", label.read_bytes())}
        answer = client.put("/datastore/label", params={"image": name, "tag": "final"}, files=sent)
        assert answer.status_code == 200, answer.text
        found = client.get("/datastore/label", params={"label": name, "tag": "final"})
        assert found.status_code == 200
        assert client.get("/datastore/image", params={"image": name}).content == next(folder.glob("J*")).read_bytes()
        assert len(client.get(f"/segqc/labels/{name}").json()) == 1
        assert client.post(f"/segqc/review/{name}", json={"decision": "approve"}).json()["scan"] == name_in(there)
        assert client.get(f"/segqc/events/{name}").status_code == 200
        uploaded = {"file": ("x.nii.gz", put_scan(tmp_path, "up").read_bytes())}
        again = client.put("/datastore/image", params={"image": name}, files=uploaded)
        assert (again.status_code, again.json()["image"]) == (200, name_in(there))
        uploaded = {"file": ("x.nii.gz", put_scan(tmp_path, "up", 2).read_bytes())}
        refused = client.put("/datastore/image", params={"image": name}, files=uploaded)
        assert (refused.status_code, refused.json()["image"]) == (409, name_in(there))
    assert [p.name for p in folder.glob("*.nii.gz")] == [f"{name_in(there)}.nii.gz"]


# ----------------------------------------------------------------------------------------------------------- imports


def imported(case_list: CaseList, folder: Path) -> tuple[int, int, int]:
    made = make_dataset(case_list, folder)
    return made.scans, made.labels, len(made.left_aside)


@pytest.mark.parametrize(("listed", "stored"), BOTH)
def test_imports_match_names_in_any_form(tmp_path: Path, listed: Form, stored: Form) -> None:
    task, raw, plain = tmp_path / "task", tmp_path / "raw", tmp_path / "plain"
    for base, images, masks, end in (
        (task, "imagesTr", "labelsTr", ""),
        (raw, "imagesTr", "labelsTr", "_0000"),
        (plain, "images", "labels", ""),
    ):
        put_scan(base / images, f"{name_in(stored)}{end}")
        shutil.move(put_label(base, name_in(stored if base == task else listed)), base / "moved.nii.gz")
        (base / masks).mkdir(exist_ok=True)
        name = name_in(stored if base == task else listed)
        shutil.move(base / "moved.nii.gz", base / masks / f"{name}.nii.gz")
    pair = {part: f"{place}/{name_in(listed)}.nii.gz" for part, place in (("image", "imagesTr"), ("label", "labelsTr"))}
    names = {"0": "background", "1": "liver", "4": "spleen"}
    (task / "dataset.json").write_text(json.dumps({"labels": names, "training": [pair], "test": []}))
    values = {"background": 0, "liver": 1, "spleen": 4}
    header = {"channel_names": {"0": "MR"}, "labels": values, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(header))
    assert imported(decathlon.read_task(task), tmp_path / "a") == (1, 1, 0)
    assert imported(nnunet.read_raw(raw), tmp_path / "b") == (1, 1, 0)
    assert list(labelled_pairs(plain)) == [name_in(stored)]
    found = find_labels(plain / "labels", name_in(stored))
    assert found is not None
    assert label_suffix(found.name) == ".nii.gz"


def test_imports_leave_aside_what_differs_by_form_only(tmp_path: Path) -> None:
    for index, form in enumerate(FORMS):
        put_scan(tmp_path / "raw" / "imagesTr", f"{name_in(form)}_0000", index)
        (tmp_path / "raw" / "labelsTr").mkdir(exist_ok=True)
        os.replace(put_label(tmp_path, "x", index), tmp_path / "raw" / "labelsTr" / f"{name_in(form)}.nii.gz")
    header = {"channel_names": {"0": "MR"}, "labels": {"liver": 1, "spleen": 4}, "file_ending": ".nii.gz"}
    (tmp_path / "raw" / "dataset.json").write_text(json.dumps(header))
    made = make_dataset(nnunet.read_raw(tmp_path / "raw"), tmp_path / "studies")
    assert (made.scans, made.labels) == (1, 1)
    reasons = " ".join(item.reason for item in made.left_aside)
    assert "is of the same case" in reasons
    assert "another scan has the same name" in reasons


# ---------------------------------------------------------------------------------------------------------- patients


@pytest.mark.parametrize(("scan", "named"), BOTH)
def test_a_patient_is_one_in_any_form(folder: Path, scan: Form, named: Form) -> None:
    path = put_scan(folder, name_in(scan))
    whole = unicodedata.normalize("NFC", NAME)
    write_settings(folder, {}, {"Ren\u00e9": (name_in(named),)})
    assert load_settings(folder).patient_of(path) == "Ren\u00e9"
    (folder / "segqc.toml").write_text(f"patient_pattern = '{name_in(named)[:-2]}'", encoding="utf-8")
    assert load_settings(folder).patient_of(path) == whole[:-2]
    (folder / "segqc.toml").write_text("patient_tag = 'PatientID'", encoding="utf-8")
    (folder / f"{name_in(named)}.json").write_text(json.dumps({"PatientID": "Rene\u0301"}))
    settings = load_settings(folder)
    assert settings.patient_of(path) == "Ren\u00e9"
    assert settings.patient_now(path, whole) == "Ren\u00e9"
    (folder / f"{name_in(named)}.json").unlink()
    assert load_settings(folder).patient_of(path) == whole
