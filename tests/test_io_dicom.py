"""Sessions of DICOM series, as archives export them, made into a dataset folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from typer.testing import CliRunner

from segqc.cli import main
from segqc.errors import SegqcError
from segqc.io import dicom
from segqc.volumes import Volume, VolumeError, read_scan, write_scan

Change = Callable[[int, Dataset], object]


def stack(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-500, 500, (6, 5, 4)).astype(np.int16)


def series(folder: Path, uid: str, array: np.ndarray | None = None, change: Change | None = None) -> Path:
    """Add the files of a series to a folder."""
    made = folder.parent / "writing"
    write_scan(Volume(stack() if array is None else array, np.diag([1.0, 1.0, 3.0, 1.0])), made)
    folder.mkdir(exist_ok=True)
    for index, file in enumerate(sorted(made.iterdir())):
        item = pydicom.dcmread(file)
        item.PatientID, item.StudyInstanceUID, item.SeriesInstanceUID = "P1", "1.2", uid
        item.SOPInstanceUID = item.file_meta.MediaStorageSOPInstanceUID = f"{uid}.{index}"
        item.SeriesNumber, item.SeriesDescription = uid.rsplit(".", 1)[-1], f"T2 {uid}"
        if change is not None:
            change(index, item)
        item.save_as(folder / f"{uid}-{index}.dcm")
    shutil.rmtree(made)
    return folder


def report(_: int, item: Dataset) -> None:
    item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    item.Modality = "SR"
    del item.Rows, item.Columns, item.PixelData, item.PixelSpacing


def turned(index: int, item: Dataset) -> None:
    item.ImageOrientationPatient = [[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1]][index % 2]


def echoes(index: int, item: Dataset) -> None:
    """Every second image is a second echo at the place of the first."""
    item.EchoTime = [30, 90][index % 2]
    item.ImagePositionPatient = [0, 0, 3 * (index // 2)]


def scans(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix(".nii.gz") for path in folder.glob("*.nii.gz"))


def run(source: Path, target: Path) -> tuple[int, str]:
    result = CliRunner().invoke(main.app, ["import", "dicom", str(source), str(target)])
    assert result.exception is None or isinstance(result.exception, (SystemExit, SegqcError)), result.exception
    return result.exit_code, result.output


@pytest.fixture
def session(tmp_path: Path) -> Path:
    folder = tmp_path / "session"
    folder.mkdir()
    return folder


def test_a_session_gives_its_volumes_and_names_the_rest(session: Path, tmp_path: Path) -> None:
    series(session / "1-localizer", "1.1", stack()[:, :, :2], turned)
    series(session / "2-T2", "1.2")
    series(session / "2-T2", "1.92", stack()[:, :, :1], report)
    series(session / "3-gap", "1.3", stack(3))
    (session / "3-gap" / "1.3-1.dcm").unlink()
    series(session / "4-cut", "1.4", stack(4))
    cut = session / "4-cut" / "1.4-2.dcm"
    cut.write_bytes(cut.read_bytes()[:-9])
    series(session / "99-SR", "1.99", stack()[:, :, :1], report)
    (session / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (session / "notes.txt").write_text("x", encoding="utf-8")
    code, output = run(session, tmp_path / "out")
    assert code == 0
    assert "1 scans taken, 5 left aside" in output
    assert scans(tmp_path / "out") == ["2-T2"]
    assert np.array_equal(read_scan(tmp_path / "out" / "2-T2.nii.gz").array, stack())
    kept = json.loads((tmp_path / "out" / "2-T2.json").read_text(encoding="utf-8"))
    assert kept == {"PatientID": "P1", "SeriesInstanceUID": "1.2"}
    lines = [line.strip() for line in output.splitlines() if line.startswith("  ")]
    for start, reason in (
        ("1-localizer", "differ in orientation"),
        ("2-T2/1.92-0.dcm: ", "Basic Text SR"),
        ("3-gap", "unevenly spaced"),
        ("4-cut", "1.4-2.dcm is truncated"),
        ("99-SR", "Basic Text SR"),
    ):
        assert sum(line.startswith(start) and reason in line for line in lines) == 1, (start, lines)
    assert str(session) not in "".join(lines)


@pytest.mark.parametrize("link", [False, True])
def test_a_copy_of_a_slice_in_another_folder_gives_its_series_no_other_name(
    session: Path, tmp_path: Path, link: bool
) -> None:
    slice_ = sorted(series(session / "T2", "1.2").iterdir())[1]
    key = session / "key images" / "1"
    key.parent.mkdir()
    if link:
        key.symlink_to(slice_)
    else:
        shutil.copy(slice_, key)
    code, output = run(session, tmp_path / "out")
    assert (code, scans(tmp_path / "out")) == (0, ["T2"])
    assert "  key images/1: holds further copies of the same slices." in output


def test_where_nothing_is_a_volume_nothing_is_written(session: Path, tmp_path: Path) -> None:
    series(session / "99-SR", "1.99", stack()[:, :, :1], report)
    code, output = run(session, tmp_path / "out")
    assert code == 1
    assert "0 scans taken, 1 left aside" in output
    assert not (tmp_path / "out").exists()


def test_series_of_one_folder_are_named_by_their_numbers(session: Path, tmp_path: Path) -> None:
    for uid, seed in (("1.3", 3), ("1.11", 4)):
        series(session / "all", uid, stack(seed))
    assert dicom.make_dataset(session, tmp_path / "out").scans == 2
    assert scans(tmp_path / "out") == ["all_11", "all_3"]
    assert np.array_equal(read_scan(tmp_path / "out" / "all_3.nii.gz").array, stack(3))


def test_echoes_of_one_series_are_scans_of_their_own(session: Path, tmp_path: Path) -> None:
    series(session / "all", "1.3", None, echoes)
    assert dicom.make_dataset(session, tmp_path / "out").scans == 2
    assert scans(tmp_path / "out") == ["all_echo 1", "all_echo 2"]


@pytest.mark.parametrize("number", ["", None, "7"])
def test_volumes_that_nothing_tells_apart_are_numbered(session: Path, tmp_path: Path, number: str | None) -> None:
    def alike(_: int, item: Dataset) -> None:
        item.SeriesNumber, item.SeriesDescription = number, "../a/b: \u00e4 *"

    for uid in ("1.3", "1.4"):
        series(session / "x", uid, stack(), alike)
    assert dicom.make_dataset(session, tmp_path / "out").scans == 2
    names = scans(tmp_path / "out")
    assert len(names) == 2
    assert all("/" not in name and name.startswith("x") for name in names)
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("session", "out")] == []


@pytest.mark.parametrize("name", ["\udcff\udcfe", "a" * 250, "  .x. ", "größe 肝", "a\nb", "-n"])
def test_whatever_the_folder_is_called_the_scan_has_a_usable_name(session: Path, tmp_path: Path, name: str) -> None:
    series(session / "s", "1.3")
    (session / "s").rename(session / name)
    if name.startswith("\udcff"):
        assert dicom.make_dataset(session, tmp_path / "out").scans == 1
    else:
        assert run(session, tmp_path / "out")[0] == 0
    (found,) = scans(tmp_path / "out")
    found.encode()
    assert found == found.strip(" .-")
    assert len(found.encode()) < 200
    assert "\n" not in found


def test_odd_values_bring_no_warnings_of_a_library(session: Path, tmp_path: Path) -> None:
    series(session / "7", "1.7")
    for file in (session / "7").iterdir():
        file.write_bytes(file.read_bytes().replace(b"IS\x02\x007 ", b"IS\x02\x007A"))
    command = [sys.executable, "-m", "segqc", "import", "dicom", str(session), str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and scans(tmp_path / "new") == ["7"]
    assert "pydicom" not in done.stderr


def test_one_folder_is_read_by_its_name_too(session: Path, tmp_path: Path) -> None:
    series(session / "T2", "1.2")
    assert run(session / "T2", tmp_path / "out")[0] == 0
    assert scans(tmp_path / "out") == ["T2"]


def test_a_volume_that_the_intake_refuses_is_left_aside(
    session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series(session / "a", "1.2")
    series(session / "b", "1.3", stack(1))

    def refuse(path: Path, limits: object = None, *, shown: str) -> None:
        if shown.startswith("a "):
            raise VolumeError(f"{shown}: is too large.")

    monkeypatch.setattr(dicom, "check_scan", refuse)
    found = dicom.make_dataset(session, tmp_path / "out")
    assert (found.scans, [item.file for item in found.left_aside]) == (1, ["a"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.json", "b.nii.gz", "segqc.toml"]


def tilted(index: int, item: Dataset) -> None:
    item.ImagePositionPatient = [0, 1.5 * index, 3 * index]


def test_a_tilted_gantry_is_left_aside_by_the_series_name(session: Path, tmp_path: Path) -> None:
    series(session / "a", "1.2", change=tilted)
    series(session / "b", "1.3")
    found = dicom.make_dataset(session, tmp_path / "out")
    (item,) = found.left_aside
    assert (found.scans, item.file) == (1, "a")
    assert item.reason.startswith("a (series 2 'T2 1.2'): ")
    assert "sheared" in item.reason
    assert str(tmp_path) not in item.reason


def test_a_link_to_a_folder_is_named_and_not_followed(session: Path, tmp_path: Path) -> None:
    series(tmp_path / "elsewhere", "1.2")
    series(session / "1", "1.1")
    (session / "2").symlink_to(tmp_path / "elsewhere")
    (session / "1" / "up").symlink_to(session)
    code, output = run(session, tmp_path / "out")
    assert code == 0
    assert scans(tmp_path / "out") == ["1"]
    assert "2: is a link to a folder" in output
    assert "1/up: is a link to a folder" in output


def test_a_folder_that_cannot_be_read_is_named(session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series(session / "a", "1.2")
    series(session / "b", "1.3", stack(1))
    whole = dicom.visible_files

    def visible_files(folder: Path) -> list[Path]:
        if folder.name == "b":
            raise PermissionError(13, "Permission denied", str(folder))
        return whole(folder)

    monkeypatch.setattr(dicom, "visible_files", visible_files)
    found = dicom.make_dataset(session, tmp_path / "out")
    assert (found.scans, [item.file for item in found.left_aside]) == (1, ["b"])
