"""What is said of scans that were taken in: contradicting headers, copies, and patients named after the first look."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import pytest
from typer.testing import CliRunner

from segqc.cli import main
from segqc.loop.dataset import Dataset
from segqc.loop.submission import submit_label
from segqc.selection import sequential
from segqc.store import leases, scans
from segqc.store.events import SERVER
from segqc.store.labels import PSEUDO, NewLabel
from segqc.store.leases import LeaseRules
from segqc.volumes import temporary_labels
from tests.server_kit import AFFINE, CONFIG, draw_case, make_dataset
from tests.store_kit import ANNA

RULES = LeaseRules(audit_share=0.0, validation_share=0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "studies", scans=4, finals=0)


def remarks(folder: Path) -> list[str]:
    dataset = Dataset(folder)
    found = dataset.remarks()
    dataset.store.close()
    return found


def patients(folder: Path) -> dict[str, str]:
    dataset = Dataset(folder)
    with dataset.store.read() as transaction:
        found = {scan.name: scan.patient for scan in scans.listing(transaction)}
    dataset.store.close()
    return found


def contradicting(path: Path) -> None:
    image = nib.Nifti1Image(draw_case(0)[0].array, AFFINE)
    moved = AFFINE.copy()
    moved[:3, 3] += 40
    image.set_sform(AFFINE, code=1)
    image.set_qform(moved, code=1)
    nib.save(image, path)


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main.app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


def test_remarks_are_shown_whenever_somebody_asks(folder: Path) -> None:
    assert remarks(folder) == []
    contradicting(folder / "odd.nii.gz")
    for _ in range(2):
        (remark,) = json.loads(run("scans", folder, "--json"))["remarks"]
        assert remark.startswith("odd.nii.gz: ")
        assert "qform" in remark
        assert remark in " ".join(run("scans", folder).split("\n"))
    (folder / "odd.nii.gz").unlink()
    assert remarks(folder) == []


def test_an_uploaded_scan_has_its_remarks(folder: Path, tmp_path: Path) -> None:
    contradicting(tmp_path / "odd.nii.gz")
    dataset = Dataset(folder)
    dataset.add_scan(tmp_path / "odd.nii.gz", "odd")
    (remark,) = dataset.remarks()
    assert remark.startswith("odd.nii.gz: ")
    dataset.store.close()


def test_copies_of_an_image_are_named_and_told_to_be_of_one_patient(folder: Path) -> None:
    shutil.copy(folder / "scan_0.nii.gz", folder / "again.nii.gz")
    (remark,) = remarks(folder)
    assert remark.startswith("again.nii.gz, scan_0.nii.gz: hold the same image; as they count as different patients")
    (folder / "segqc.toml").write_text(f'{CONFIG}[patients]\nP = ["scan_0", "again"]\n')
    assert remarks(folder) == ["again.nii.gz, scan_0.nii.gz: hold the same image; remove all but one"]
    (folder / "again.nii.gz").unlink()
    assert remarks(folder) == []


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ('[patients]\nP = ["scan_0", "scan_2"]\n', ["P", "scan_1", "P", "scan_3"]),
        ("", ["scan_0", "scan_1", "scan_2", "scan_3"]),
    ],
)
def test_patients_that_are_named_later_count(folder: Path, rules: str, expected: list[str]) -> None:
    assert sorted(patients(folder).values()) == ["scan_0", "scan_1", "scan_2", "scan_3"]
    (folder / "segqc.toml").write_text(f"{CONFIG}{rules}")
    assert [patients(folder)[f"scan_{i}"] for i in range(4)] == expected
    assert remarks(folder) == []
    dataset = Dataset(folder)
    with dataset.store.read() as transaction:
        found = scans.listing(transaction)
    assert len({(scan.fold, scan.split) for scan in found if scan.patient == "P"}) <= 1
    dataset.store.close()


def test_a_pattern_that_is_written_later_counts_where_no_patient_was_named(folder: Path) -> None:
    (folder / "segqc.toml").write_text(f'{CONFIG}[patients]\nP = ["scan_0"]\n')
    patients(folder)
    (folder / "segqc.toml").write_text(f'patient_pattern = "scan"\n{CONFIG}')
    assert patients(folder) == {"scan_0": "P", "scan_1": "scan", "scan_2": "scan", "scan_3": "scan"}


def test_a_scan_that_is_handed_out_stays_until_it_is_back(folder: Path) -> None:
    dataset = Dataset(folder)
    with dataset.store.write() as transaction:
        lease = leases.acquire(transaction, ANNA, "first", sequential.order, RULES)
    assert lease is not None
    (folder / "segqc.toml").write_text(f'{CONFIG}[patients]\nP = ["{lease.scan}"]\n')
    (remark,) = remarks(folder)
    assert f"stays with the patient '{lease.scan}', and not 'P' as the settings say, while it is handed out" in remark
    assert remark in " ".join(run("scans", folder).split("\n"))
    submit_label(dataset, lease.scan, draw_case(0)[1], "final", ANNA)
    assert patients(folder)[lease.scan] == "P"
    dataset.store.close()


@pytest.mark.parametrize("trained_by", ["final", "taken back", "pseudo-label"])
def test_a_scan_that_networks_were_trained_with_keeps_its_split(folder: Path, trained_by: str) -> None:
    dataset = Dataset(folder)
    if trained_by == "pseudo-label":
        with temporary_labels(draw_case(0)[1]) as path:
            dataset.store.save_label(NewLabel("scan_0", PSEUDO, "pseudo-label", SERVER), path)
    else:
        submit_label(dataset, "scan_0", draw_case(0)[1], "final", ANNA)
    if trained_by == "taken back":
        dataset.store.remove_label("scan_0", "final", ANNA)
    dataset.store.close()
    (folder / "segqc" / "models").mkdir()
    (folder / "segqc.toml").write_text(f'{CONFIG}[patients]\nP = ["scan_0", "scan_1"]\n')
    (remark,) = remarks(folder)
    assert remark.startswith("scan_0.nii.gz: stays with the patient 'scan_0', and not 'P'")
    assert "move segqc/models and segqc/training away" in remark
    assert (patients(folder)["scan_0"], patients(folder)["scan_1"]) == ("scan_0", "P")
    (folder / "segqc" / "models").rmdir()
    assert patients(folder)["scan_0"] == "P"
    assert remarks(folder) == []
