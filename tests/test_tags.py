"""Patients named by a DICOM tag: in JSON side-cars, NRRD headers and DICOM series."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import nrrd
import numpy as np
import pydicom
import pytest
import SimpleITK
from typer.testing import CliRunner

from segqc import settings
from segqc.cli import main
from segqc.io import dicom
from segqc.io.case_list import ExchangeError
from segqc.loop.dataset import Dataset
from segqc.store import scans
from segqc.store.maintenance import check
from segqc.store.store import Store
from segqc.store.sync import sync
from segqc.volumes import Volume, VolumeError, read_scan, write_scan
from segqc.volumes.tags import read_tag
from tests.store_kit import PLACING

ARRAY = np.arange(60, dtype=np.int16).reshape(5, 4, 3)


def without_sidecar(scan: Path) -> Path:
    write_scan(Volume(ARRAY, np.eye(4)), scan)
    return scan


def with_sidecar(scan: Path, **values: object) -> Path:
    without_sidecar(scan)
    scan.with_name(scan.name.split(".")[0] + ".json").write_text(json.dumps(values))
    return scan


def with_header(scan: Path, **pairs: str) -> Path:
    nrrd.write(str(scan), ARRAY, {"space directions": np.eye(3), "space": "left-posterior-superior", **pairs})
    return scan


def series(folder: Path, patient: str | None) -> Path:
    write_scan(Volume(ARRAY, np.eye(4)), folder)
    for file in folder.iterdir():
        item = pydicom.dcmread(file)
        if patient is None:
            del item.PatientID
        else:
            item.PatientID = patient
        item.save_as(file)
    return folder


def patients(dataset: Dataset) -> dict[str, str]:
    with dataset.store.read() as transaction:
        return {s.name: s.patient for s in scans.listing(transaction)}


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("tag", ["PatientID", "patientid", "0010,0020", "0010|0020", "(0010,0020)", "00100020"])
def test_a_tag_is_read_from_the_side_car_by_keyword_or_number(tmp_path: Path, tag: str) -> None:
    assert read_tag(with_sidecar(tmp_path / "a.nii.gz", Modality="MR", PatientID=" P 7 "), tag) == "P 7"


@pytest.mark.parametrize(
    "key", ["PatientID", "DICOM_0010_0020_PatientID", "DICOM_0010_0020", "dicom_0010_0020", "0010|0020"]
)
def test_a_tag_is_read_from_an_nrrd_header_whatever_the_converter_calls_it(tmp_path: Path, key: str) -> None:
    scan = with_header(tmp_path / "a.nrrd", **{"DICOM_0010_0010_PatientName": "Doe", key: "P7"})
    assert read_tag(scan, "PatientID") == "P7"
    assert read_tag(scan, "0010,0020") == ("P7")
    assert read_tag(scan, "StudyID") is None


def test_a_tag_that_simpleitk_wrote_is_found(tmp_path: Path) -> None:
    image = SimpleITK.GetImageFromArray(ARRAY)
    image.SetMetaData("0010|0020", "P7 ")
    SimpleITK.WriteImage(image, tmp_path / "a.nrrd")
    assert read_tag(tmp_path / "a.nrrd", "PatientID") == "P7"


def test_a_name_that_dicom_does_not_know_is_looked_for_as_it_is(tmp_path: Path) -> None:
    assert read_tag(with_sidecar(tmp_path / "a.nii", SubjectCode=12), "SubjectCode") == "12"


def test_the_side_car_goes_before_the_header(tmp_path: Path) -> None:
    with_header(tmp_path / "a.nrrd", PatientID="header")
    (tmp_path / "a.json").write_text('{"PatientID": "side-car"}')
    assert read_tag(tmp_path / "a.nrrd", "PatientID") == "side-car"
    (tmp_path / "a.json").write_text('{"Modality": "MR"}')
    assert read_tag(tmp_path / "a.nrrd", "PatientID") == "header"


@pytest.mark.parametrize("value", ["", "  ", None])
def test_an_empty_tag_is_none(tmp_path: Path, value: str | None) -> None:
    assert read_tag(with_sidecar(tmp_path / "a.nii", PatientID=value), "PatientID") is None


@pytest.mark.parametrize("value", ["P\0 7", "P\n7", "\tP 7\0"])
def test_a_tag_is_one_line_of_text(tmp_path: Path, value: str) -> None:
    assert re.sub(" +", " ", read_tag(with_sidecar(tmp_path / "a.nii", PatientID=value), "PatientID") or "") == "P 7"


def test_a_tag_of_a_dicom_series(tmp_path: Path) -> None:
    assert read_tag(series(tmp_path / "s", "P7"), "PatientID") == "P7"
    assert read_tag(tmp_path / "s", "0010,0020") == "P7"
    assert read_tag(series(tmp_path / "t", None), "PatientID") is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(VolumeError, match="no DICOM images"):
        read_tag(tmp_path / "empty", "PatientID")


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        ("{", r"a\.json.*no readable JSON object"),
        ("[1]", r"a\.json.*no readable JSON object"),
        ('{"PatientID": ["P7"]}', r"a\.json.*PatientID is neither text nor a number"),
        ('{"PatientID": true}', r"a\.json.*PatientID is neither text nor a number"),
    ],
)
def test_an_unusable_side_car_is_named(tmp_path: Path, content: str, finding: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(VolumeError, match=finding):
        read_tag(tmp_path / "a.nii.gz", "PatientID")


def test_an_unreadable_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.nrrd").write_text("nothing")
    with pytest.raises(VolumeError, match=r"a\.nrrd.*no readable NRRD"):
        read_tag(tmp_path / "a.nrrd", "PatientID")


# ----------------------------------------------------------------------------------------------------------- patients


def test_table_tag_pattern_and_own_id_come_in_this_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings._tell_of_untagged.cache_clear()
    for name in ("p1_a", "p1_b", "p2_c"):
        with_sidecar(tmp_path / f"{name}.nii.gz", PatientID="seven")
    without_sidecar(tmp_path / "p3_d.nii.gz")
    without_sidecar(tmp_path / "odd.nii.gz")
    (tmp_path / "segqc.toml").write_text(
        'patient_tag = "PatientID"\npatient_pattern = "^(p[0-9])_"\n[patients]\n"eight" = ["p1_b"]\n'
    )
    with caplog.at_level(logging.WARNING):
        found = patients(Dataset(tmp_path))
    assert found == {"p1_a": "seven", "p1_b": "eight", "p2_c": "seven", "p3_d": "p3", "odd": "odd"}
    assert sum("carry no PatientID" in message for message in caplog.messages) == 1


def test_without_the_setting_no_side_car_is_read(tmp_path: Path) -> None:
    without_sidecar(tmp_path / "a.nii")
    (tmp_path / "a.json").write_text("{")
    assert patients(Dataset(tmp_path)) == {"a": "a"}


def test_a_scan_waits_until_its_side_car_can_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_sidecar(tmp_path / "b.nii", PatientID="seven")
    with_sidecar(tmp_path / "a.nii")
    (tmp_path / "a.json").write_text('{"PatientID": "sev')
    (tmp_path / "segqc.toml").write_text('patient_tag = "PatientID"\n')
    with caplog.at_level(logging.WARNING):
        dataset = Dataset(tmp_path)
        assert patients(dataset) == {"b": "seven"}
        dataset.refresh()
    assert sum("not accepted" in m and "a.nii" in m and "a.json" in m for m in caplog.messages) == 1
    assert [finding.file for finding in dataset.findings()] == ["a.nii"]
    assert any("a.nii" in finding.what for finding in check(dataset.store))
    (tmp_path / "a.json").write_text('{"PatientID": "seven"}')  # in place: the folder itself shows no change
    dataset.refresh()
    assert patients(dataset) == {"a": "seven", "b": "seven"}
    assert dataset.findings() == []


def test_known_scans_are_not_looked_at_again(tmp_path: Path) -> None:
    (tmp_path / "a.nii").touch()
    store = Store.open(tmp_path)
    asked: list[str] = []

    def patient_of(scan: Path) -> str:
        asked.append(scan.name)
        return "one"

    for name in ("b.nii", "c.nii"):
        sync(store, patient_of, PLACING)
        (tmp_path / name).touch()
    sync(store, patient_of, PLACING)
    assert asked == ["a.nii", "b.nii", "c.nii"]
    store.close()


# ------------------------------------------------------------------------------------------------------------- import


def test_dicom_series_become_a_studies_folder_with_their_patients(tmp_path: Path) -> None:
    for name, patient in (("7/axial", "P7"), ("7/coronal", "P7"), ("8/axial", "P8"), ("9", None)):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        series(tmp_path / "in" / name, patient)
    (tmp_path / "in" / "readme.txt").write_text("not a scan")
    result = CliRunner().invoke(main.app, ["import", "dicom", str(tmp_path / "in"), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "4 scans" in result.output
    assert patients(Dataset(tmp_path / "out")) == {"7_axial": "P7", "7_coronal": "P7", "8_axial": "P8", "9": "9"}
    read, kept = read_scan(tmp_path / "in" / "7" / "axial"), read_scan(tmp_path / "out" / "7_axial.nii.gz")
    assert np.array_equal(read.array, kept.array)
    assert np.allclose(read.affine, kept.affine)
    assert set(json.loads((tmp_path / "out" / "7_axial.json").read_text())) == {"PatientID", "SeriesInstanceUID"}


def test_another_tag_names_the_patient_and_the_rest_is_left_behind(tmp_path: Path) -> None:
    for file in series(tmp_path / "in" / "a", "secret").iterdir():
        item = pydicom.dcmread(file)
        item.StudyID = "study 1"
        item.save_as(file)
    dicom.make_dataset(tmp_path / "in", tmp_path / "out", patient_tag="0020,0010")
    assert patients(Dataset(tmp_path / "out")) == {"a": "study 1"}
    assert b"secret" not in (tmp_path / "out" / "a.json").read_bytes()


def test_what_cannot_be_imported_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(ExchangeError, match="no DICOM files"):
        dicom.make_dataset(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ExchangeError, match="no such folder"):
        dicom.make_dataset(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_volumes_of_one_name_are_numbered(tmp_path: Path) -> None:
    series(tmp_path / "in" / "a_b", "P7")
    (tmp_path / "in" / "a").mkdir()
    series(tmp_path / "in" / "a" / "b", "P8")
    assert dicom.make_dataset(tmp_path / "in", tmp_path / "out").scans == 2
    assert set(patients(Dataset(tmp_path / "out")).values()) == {"P7", "P8"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_side_car_is_read_in_the_encodings_of_other_systems(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.json").write_bytes('{\r\n"PatientID": "Jürgen 7"\r\n}'.encode(encoding))
    assert read_tag(tmp_path / "a.nii.gz", "PatientID") == "Jürgen 7"


def test_a_side_car_in_another_encoding_is_named_with_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('{"PatientID": "Jürgen 7"}'.encode("latin-1"))
    with pytest.raises(VolumeError, match=r"a\.json.*byte 16 \(0xFC\) is not UTF-8; save the file as UTF-8"):
        read_tag(tmp_path / "a.nii.gz", "PatientID")
