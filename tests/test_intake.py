"""What comes into a dataset folder: read once, kept aside with a reason, or kept for ever."""

from __future__ import annotations

import gzip
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from segqc.loop.dataset import Dataset, DatasetError
from segqc.loop.submission import Opened, submit_label
from segqc.selection import sequential
from segqc.store import assessments, files, labels, leases, scans
from segqc.store import sync as folder_module
from segqc.store.database import StoreError
from segqc.store.files import sha256_of
from segqc.store.intake import AnyContent, FileChecks
from segqc.store.labels import NewLabel
from segqc.store.leases import LeaseRules
from segqc.store.maintenance import check
from segqc.store.records import Actor, LabelRecord, ScanRecord
from segqc.store.scans import ScanReplaced
from segqc.store.store import LabelChange, Store
from segqc.store.sync import ScanExists, sync
from segqc.volumes import Volume, VolumeError, read_labels, scan_id, write_labels, write_scan
from tests.server_kit import (
    AFFINE,
    CONFIG,
    SHAPE,
    draw_case,
    make_assessment,
    make_dataset,
    write_segmentation,
)
from tests.store_kit import ANNA, BERT, PLACING, bundle, fork, label_map, make_scans, save_final, save_mask, sync_scans

RULES = LeaseRules(audit_share=0.0, validation_share=0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "studies", scans=3, finals=0)


@pytest.fixture
def dataset(folder: Path) -> Iterator[Dataset]:
    opened = Dataset(folder)
    yield opened
    opened.store.close()


def states(dataset: Dataset) -> dict[str, str]:
    dataset.refresh()
    with dataset.store.read() as transaction:
        return {s.name: "missing" if s.missing_since else s.state for s in scans.listing(transaction)}


def record(dataset: Dataset, name: str) -> ScanRecord:
    with dataset.store.read() as transaction:
        return scans.get(transaction, name)


def history(dataset: Dataset, name: str) -> list[LabelRecord]:
    with dataset.store.read() as transaction:
        return labels.history(transaction, name)


def kept(folder: Path) -> set[str]:
    """The hashes of all contents that the folder still holds somewhere."""
    return {sha256_of(path) for place in ("labels", "segqc/labels") for path in (folder / place).rglob("*.*")}


def in_place(path: Path, content: bytes) -> bytes:
    """Write into a file as it is, as ITK-SNAP and nibabel do."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()
    return content


def final(folder: Path, name: str, suffix: str = ".nii.gz") -> Path:
    path = folder / "labels" / "final" / f"{name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def label_bytes(work: Path, index: int = 0, *, shape: tuple[int, int, int] = SHAPE) -> bytes:
    array = draw_case(index)[1].array[: shape[0], : shape[1], : shape[2]]
    write_labels(Volume(array, AFFINE), work / "made.nii.gz")
    return (work / "made.nii.gz").read_bytes()


def another_scan(path: Path, index: int, *, shape: tuple[int, int, int] = SHAPE) -> bytes:
    array = draw_case(index)[0].array[: shape[0], : shape[1], : shape[2]]
    write_scan(Volume(array, AFFINE), path)
    return path.read_bytes()


def submit(dataset: Dataset, name: str, index: int = 0, actor: Actor = ANNA) -> LabelRecord:
    return submit_label(dataset, name, draw_case(index)[1], "final", actor).label


# ---------------------------------------------------------------------------------------------------------- findings


BAD_FILES: dict[str, Callable[[Path, Path], object]] = {
    "bad.nii.gz": lambda path, work: path.write_bytes(b"no scan"),
    "empty.nii": lambda path, work: path.touch(),
    "cut.nii.gz": lambda path, work: path.write_bytes(another_scan(work / "x.nii.gz", 1)[:-2000]),
    "c.seg.nrrd": lambda path, work: path.write_bytes(b"NRRD0004\n"),
    "V.MHA": lambda path, work: path.touch(),
    "pair.img.gz": lambda path, work: path.touch(),
    "v.hdr": lambda path, work: path.touch(),
    "v.nii.BZ2": lambda path, work: path.touch(),
    "all.zip": lambda path, work: path.touch(),
    "labels/final/scan_0.nii.gz": lambda path, work: path.write_bytes(label_bytes(work, shape=(32, 28, 9))),
    "labels/final/scan_1.nii.gz": lambda path, work: path.write_bytes(b"no label"),
    "labels/final/nobody.nii.gz": lambda path, work: path.write_bytes(label_bytes(work)),
    "labels/final/scan_2.png": lambda path, work: path.touch(),
    "labels/scan_0.nii.gz": lambda path, work: path.write_bytes(label_bytes(work)),
    "labels/original/scan_2.nii": lambda path, work: write_labels(Volume(np.full(SHAPE, 9, np.uint8), AFFINE), path),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_does_not_pass_is_kept_aside_and_the_rest_goes_on(
    dataset: Dataset, folder: Path, tmp_path: Path, name: str
) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    BAD_FILES[name](path, tmp_path)
    content = path.read_bytes()
    another_scan(folder / "zz.nii.gz", 8)
    assert states(dataset) == dict.fromkeys(("scan_0", "scan_1", "scan_2", "zz"), "unlabelled")
    (found,) = dataset.findings()
    assert found.file == name
    assert name in found.sentence
    assert str(folder) not in found.sentence
    assert path.read_bytes() == content, "it stays where it is"
    dataset.refresh()
    assert dataset.findings() == [found], "told once"
    path.unlink()
    dataset.refresh()
    assert dataset.findings() == []


@pytest.mark.parametrize("name", ["labels", "labels/final"])
def test_a_file_in_the_place_of_a_labels_folder_is_told_and_takes_no_label_away(
    dataset: Dataset, folder: Path, tmp_path: Path, name: str
) -> None:
    final(folder, "scan_0").write_bytes(label_bytes(tmp_path))
    assert states(dataset)["scan_0"] == "submitted"
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).touch()
    assert states(dataset)["scan_0"] == "submitted"
    (found,) = dataset.findings()
    assert found.sentence.startswith(f"{name}: is a file")
    (folder / name).unlink()
    (tmp_path / "elsewhere").rename(folder / name)
    assert states(dataset)["scan_0"] == "submitted"
    assert dataset.findings() == []


@pytest.mark.parametrize(
    ("name", "wanted"), [("Labels", "labels"), ("LABELS", "labels"), ("labels/Final", "labels/final")]
)
def test_a_folder_of_labels_whose_name_has_another_case_is_told(
    dataset: Dataset, folder: Path, tmp_path: Path, name: str, wanted: str
) -> None:
    final(folder, "scan_0").parent.mkdir(parents=True, exist_ok=True)
    (folder / name).mkdir()
    (folder / name / "scan_0.nii.gz").write_bytes(label_bytes(tmp_path))
    assert states(dataset)["scan_0"] == "unlabelled"
    (found,) = dataset.findings()
    assert found.file == name
    assert found.sentence.startswith(f"{name}: is not the folder {wanted}/")
    shutil.move(folder / name / "scan_0.nii.gz", folder / "labels" / "final")
    (folder / name).rmdir()
    assert states(dataset)["scan_0"] == "submitted"
    assert dataset.findings() == []


@pytest.mark.parametrize("link", [False, True])
def test_a_file_in_the_place_of_the_store_is_told(folder: Path, link: bool) -> None:
    (folder / "segqc").symlink_to("nowhere") if link else (folder / "segqc").touch()
    with pytest.raises(StoreError, match=r"segqc: is a file, or a link that leads nowhere"):
        Store.open(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.nii.gz", b"x"), ("b.NRRD", b"x"), ("c.dcm", b"x"), ("000001", bytes(128) + b"DICM"), ("series.ima", b"")],
)
def test_a_folder_of_images_is_told_and_not_looked_into(
    dataset: Dataset, folder: Path, name: str, content: bytes
) -> None:
    (folder / "notes").mkdir()
    (folder / "notes" / "README").write_text("no images")
    (folder / "truth").mkdir()
    for file in ("scan_0.nii.gz", "scan_1.seg.nrrd"):
        (folder / "truth" / file).touch()
    (folder / "more").mkdir()
    (folder / "more" / name).write_bytes(content)
    assert len(states(dataset)) == 3
    (found,) = dataset.findings()
    assert (found.file, found.kind) == ("more", "other")
    assert found.sentence.startswith("more: is a folder with images")
    (folder / "more" / name).unlink()
    dataset.refresh()
    assert dataset.findings() == []


@pytest.mark.parametrize("name", ["a.nii.gz", "labels/final/batch 1", "labels/final/scan_0.nii.gz", "labels/Final"])
def test_a_folder_where_files_are_wanted_is_told(dataset: Dataset, folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "scan_0.nii.gz").write_bytes(label_bytes(tmp_path))
    assert len(states(dataset)) == 3
    (found,) = dataset.findings()
    assert found.file == name
    assert "move" in found.sentence
    dataset.refresh()
    assert dataset.findings() == [found], "told once"
    shutil.rmtree(folder / name)
    dataset.refresh()
    assert dataset.findings() == []


@pytest.mark.parametrize("target", ["nowhere.nii.gz", "self"])
@pytest.mark.parametrize("name", ["bad.nii.gz", "labels/final/scan_0.nii.gz"])
def test_a_link_that_leads_nowhere_keeps_nothing_else_out(
    dataset: Dataset, folder: Path, tmp_path: Path, name: str, target: str
) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(path.name if target == "self" else target)
    another_scan(folder / "zz.nii.gz", 8)
    assert states(dataset) == dict.fromkeys(("scan_0", "scan_1", "scan_2", "zz"), "unlabelled")
    (found,) = dataset.findings()
    assert found.file == name
    assert "is a link that leads nowhere" in found.sentence
    dataset.refresh()
    assert dataset.findings() == [found], "told once"
    path.unlink()
    dataset.refresh()
    assert dataset.findings() == []


def test_a_label_that_cannot_be_read_for_a_while_is_not_removed(dataset: Dataset, folder: Path) -> None:
    submit(dataset, "scan_0")
    path = final(folder, "scan_0")
    content = path.read_bytes()
    path.unlink()
    path.symlink_to(path.name)
    assert states(dataset)["scan_0"] == "submitted"
    assert [f.file for f in dataset.findings()] == ["labels/final/scan_0.nii.gz"]
    path.unlink()
    path.write_bytes(content)
    assert states(dataset)["scan_0"] == "submitted"
    assert dataset.findings() == []
    assert len(history(dataset, "scan_0")) == 1


@pytest.mark.parametrize("name", ["scan_0.nii", "scan_0.seg.nrrd"])
def test_a_label_is_not_removed_where_a_file_that_cannot_be_used_takes_its_place(
    dataset: Dataset, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CLOCK_TICK_NS", -1)  # a file just written would be read again
    submit(dataset, "scan_0")
    final(folder, "scan_0").unlink()
    path = folder / "labels/final" / name
    path.write_bytes(b"not what it was")
    for _ in range(2):
        assert states(dataset)["scan_0"] == "submitted"
        assert [f.file for f in dataset.findings()] == [f"labels/final/{name}"]
        assert path.read_bytes() == b"not what it was"
    path.unlink()
    assert states(dataset)["scan_0"] == "unlabelled"


def test_a_label_that_is_saved_while_the_folder_is_gone_removes_no_other(dataset: Dataset, folder: Path) -> None:
    for scan in ("scan_0", "scan_1"):
        submit(dataset, scan)
    before = final(folder, "scan_0").read_bytes()
    (folder / "labels").rename(folder / "not-mounted")
    submit(dataset, "scan_1", 1)
    submit(dataset, "scan_2")
    assert set(states(dataset).values()) == {"submitted"}
    assert final(folder, "scan_0").read_bytes() == before
    assert [len(history(dataset, f"scan_{i}")) for i in range(3)] == [1, 2, 1]
    assert check(dataset.store) == []


@pytest.mark.parametrize("other", [None, "README", ".DS_Store"])
def test_a_folder_that_is_empty_as_a_disk_that_is_not_mounted_removes_no_label(
    dataset: Dataset, folder: Path, other: str | None
) -> None:
    for scan in ("scan_0", "scan_1"):
        submit(dataset, scan)
    dataset.store.review("scan_0", "approved", BERT)
    before = final(folder, "scan_0").read_bytes()
    (folder / "labels/final").rename(folder / "disk")
    (folder / "labels/final").mkdir()
    if other is not None:
        (folder / "labels/final" / other).touch()
    for _ in range(2):
        assert [*states(dataset).values()] == ["approved", "submitted", "unlabelled"]
        found = {finding.file: finding.sentence for finding in dataset.findings()}
        assert "2 labels stay" in found["labels/final"]
    submit(dataset, "scan_2")
    assert final(folder, "scan_0").read_bytes() == before
    assert [*states(dataset).values()] == ["approved", "submitted", "submitted"]
    assert "labels/final" not in {finding.file for finding in dataset.findings()}
    assert [len(history(dataset, f"scan_{i}")) for i in range(3)] == [1, 1, 1]
    assert not any(finding.is_damage for finding in check(dataset.store))


@pytest.mark.parametrize("year", [1600, 1930, 2413])
def test_a_file_of_any_date_keeps_no_other_out(dataset: Dataset, folder: Path, tmp_path: Path, year: int) -> None:
    for name in ("scan_0", "scan_1"):
        final(folder, name).write_bytes(label_bytes(tmp_path))
    seconds = int((year - 1970) * 365.2425 * 86400)
    for path in (final(folder, "scan_0"), folder / "scan_0.nii.gz"):
        os.utime(path, (seconds, seconds))
    for _ in range(2):
        assert [*states(dataset).values()] == ["submitted", "submitted", "unlabelled"]
    assert [len(history(dataset, f"scan_{i}")) for i in range(2)] == [1, 1]


@pytest.mark.parametrize("is_edit", [True, False])
@pytest.mark.parametrize("is_refused", [True, False])
def test_a_file_that_holds_what_is_submitted_is_left_as_it_is(
    dataset: Dataset, folder: Path, tmp_path: Path, is_edit: bool, is_refused: bool
) -> None:
    if is_edit:
        submit(dataset, "scan_0", 1)
    content = label_bytes(tmp_path)
    final(folder, "scan_0").write_bytes(content)  # as whoever saves it there, and submits it, too
    change = LabelChange(NewLabel("scan_0", "final", "annotator", BERT), tmp_path / "made.nii.gz")
    if is_refused:
        with pytest.raises(ZeroDivisionError), dataset.store.change_labels([change]):
            raise ZeroDivisionError
        assert final(folder, "scan_0").read_bytes() == content
    else:
        with dataset.store.change_labels([change]):
            pass
    assert states(dataset)["scan_0"] == "submitted"
    saved = [] if is_refused else [("annotator", sha256_of(final(folder, "scan_0")))]
    assert [(v.source, v.sha256) for v in history(dataset, "scan_0")[is_edit:]] == [
        ("import", sha256_of(final(folder, "scan_0"))), *saved,
    ]  # fmt: skip
    assert final(folder, "scan_0").read_bytes() == content
    assert check(dataset.store) == []


def test_labels_are_removed_one_after_another_to_the_last(dataset: Dataset, folder: Path) -> None:
    for scan in ("scan_0", "scan_1", "scan_2"):
        submit(dataset, scan)
    for scan in ("scan_0", "scan_1"):
        final(folder, scan).unlink()
    assert [*states(dataset).values()] == ["unlabelled", "unlabelled", "submitted"]
    final(folder, "scan_2").unlink()
    assert set(states(dataset).values()) == {"unlabelled"}
    assert dataset.findings() == []


def test_the_only_label_is_removed_though_another_is_saved_at_once(dataset: Dataset, folder: Path) -> None:
    submit(dataset, "scan_0")
    final(folder, "scan_0").unlink()
    submit(dataset, "scan_1")
    assert [*states(dataset).values()] == ["unlabelled", "submitted", "unlabelled"]


@pytest.mark.parametrize("is_removed", [True, False])
def test_a_label_that_comes_back_is_what_it_was(dataset: Dataset, folder: Path, is_removed: bool) -> None:
    mask = draw_case(0)[1]
    looked_at = Opened((2, 3), None)
    first = submit_label(dataset, "scan_0", mask, "final", ANNA, opened=looked_at).label
    assert first.checked_slices == (2, 3)
    content = final(folder, "scan_0").read_bytes()
    if is_removed:
        final(folder, "scan_0").unlink()
    else:
        submit(dataset, "scan_0", 1, BERT)
    dataset.refresh()
    final(folder, "scan_0").write_bytes(content)
    assert states(dataset)["scan_0"] == "submitted"
    last = history(dataset, "scan_0")[-1]
    assert (last.source, last.parent, last.sha256) == ("restored", first.id, first.sha256)
    assert last.checked_slices == (2, 3), "nobody has looked at the others"


def test_a_segmentation_that_comes_back_is_what_it_was(dataset: Dataset, folder: Path) -> None:
    path = final(folder, "scan_0", ".seg.nrrd")
    write_segmentation(path)
    dataset.refresh()
    path.rename(folder / "away")
    dataset.refresh()
    (folder / "away").rename(path)
    dataset.refresh()
    first, _, last = history(dataset, "scan_0")
    assert (last.source, last.parent, last.submitted_sha256) == ("restored", first.id, first.submitted_sha256)


@pytest.mark.parametrize("name", [b"a\nb.nii.gz", b"a\x1b[31m.nii.gz", b"labels/final/\xff.nii.gz"])
def test_a_name_that_cannot_be_printed_is_kept_aside(
    dataset: Dataset, folder: Path, tmp_path: Path, name: bytes
) -> None:
    path = folder / os.fsdecode(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(another_scan(tmp_path / "x.nii.gz", 1))
    dataset.refresh()
    (found,) = dataset.findings()
    assert found.sentence.isprintable()
    assert "rename the file" in found.sentence
    assert sorted(states(dataset)) == ["scan_0", "scan_1", "scan_2"]


def test_a_file_that_passes_after_all_is_no_finding_any_more(dataset: Dataset, folder: Path, tmp_path: Path) -> None:
    (folder / "late.nii.gz").write_bytes(b"not yet")
    final(folder, "late").write_bytes(label_bytes(tmp_path))
    dataset.refresh()
    assert {f.file for f in dataset.findings()} == {"late.nii.gz", "labels/final/late.nii.gz"}
    another_scan(folder / "late.nii.gz", 4)
    assert states(dataset)["late"] == "submitted"
    assert dataset.findings() == []


def test_a_label_is_looked_at_again_when_the_settings_change(dataset: Dataset, folder: Path) -> None:
    write_labels(Volume(np.full(SHAPE, 9, np.uint8), AFFINE), final(folder, "scan_1"))
    assert states(dataset)["scan_1"] == "unlabelled"
    (folder / "segqc.toml").write_text(CONFIG.replace("liver = [1]", "liver = [1]\nkidney = [9]"))
    assert states(Dataset(folder))["scan_1"] == "submitted"
    assert dataset.findings() == []


def test_limits_are_those_of_the_settings(folder: Path) -> None:
    (folder / "segqc.toml").write_text(f"{CONFIG}[intake]\nmax_voxels = {SHAPE[0] * SHAPE[1] * SHAPE[2] - 1}\n")
    dataset = Dataset(folder)
    assert states(dataset) == {}
    assert len(dataset.findings()) == 3


def test_an_error_in_a_reader_is_that_files_problem(
    dataset: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FileChecks.scan

    def failing(self: FileChecks, path: Path, shown: str) -> object:
        if shown == "a.nii.gz":
            raise MemoryError
        if shown == "b.nii.gz":
            raise ZeroDivisionError
        return real(self, path, shown)

    monkeypatch.setattr(FileChecks, "scan", failing)
    for name in "abc":
        another_scan(folder / f"{name}.nii.gz", 5)
    assert "c" in states(dataset)
    assert [f.file for f in dataset.findings()] == ["a.nii.gz", "b.nii.gz"]


def test_each_content_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = FileChecks.scan

    def counting(self: FileChecks, path: Path, shown: str) -> object:
        read.append(shown)
        return real(self, path, shown)

    monkeypatch.setattr(FileChecks, "scan", counting)
    monkeypatch.setattr(files, "_CLOCK_TICK_NS", 0)  # a file just written would be read again
    dataset = Dataset(folder)
    (folder / "bad.nii").write_bytes(b"bad")
    os.utime(folder / "bad.nii", (1, 1))
    for _ in range(3):
        dataset.refresh()
    os.utime(folder / "scan_0.nii.gz", (5, 5))  # only touched
    dataset.refresh()
    assert sorted(read) == ["bad.nii", "scan_0.nii.gz", "scan_1.nii.gz", "scan_2.nii.gz"]


def test_a_large_folder_is_taken_in_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_scans(tmp_path / "s", 7)
    monkeypatch.setattr(folder_module, "_BATCH", 2)
    store = Store.open(tmp_path / "s")
    asked = iter([False, False, True, True, True])
    assert sync(store, scan_id, PLACING, stop=lambda: next(asked)).new_scans == 4
    with store.read() as transaction:
        assert len(scans.names(transaction)) == 4
    assert sync(store, scan_id, PLACING).new_scans == 3
    store.close()


# --------------------------------------------------------------------------------------------------------- suffixes


def test_a_segmentation_is_read_by_its_names_and_kept_as_it_came(dataset: Dataset, folder: Path) -> None:
    path = final(folder, "scan_0", ".seg.nrrd")
    write_segmentation(path)
    content = path.read_bytes()
    assert states(dataset)["scan_0"] == "submitted"
    (version,) = history(dataset, "scan_0")
    assert (version.submitted_suffix, version.submitted_sha256) == (".seg.nrrd", sha256_of(path))
    assert np.array_equal(read_labels(dataset.store.label_file(version)).array, draw_case(0)[1].array)
    assert path.read_bytes() == content
    assert sha256_of(path) in {sha256_of(p) for p in dataset.store.files.all_objects()}
    assert check(dataset.store) == []
    dataset.refresh()
    assert len(history(dataset, "scan_0")) == 1
    assert submit(dataset, "scan_0", 1).parent == version.id, "what counted until then"
    assert [p.name for p in path.parent.iterdir()] == ["scan_0.nii.gz"]
    dataset.store.restore_label(version.id, BERT)
    assert np.array_equal(read_labels(final(folder, "scan_0")).array, draw_case(0)[1].array)
    assert check(dataset.store) == []


@pytest.mark.parametrize("segments", [("spleen", "liver", "Segment_3"), ("Segment_1", "kidney", "liver", "spleen")])
def test_a_segment_without_a_voxel_keeps_no_label_out(
    dataset: Dataset, folder: Path, segments: tuple[str, ...]
) -> None:
    write_segmentation(final(folder, "scan_0", ".seg.nrrd"), segments)
    write_segmentation(final(folder, "scan_1", ".seg.nrrd"), segments, {"liver": "Segment_2"})
    dataset.sync()
    (version,) = history(dataset, "scan_0")
    assert np.array_equal(read_labels(dataset.store.label_file(version)).array, draw_case(0)[1].array)
    (finding,) = dataset.findings()
    assert "labels/final/scan_1.seg.nrrd: has the segment 'Segment_2', which is none of" in finding.sentence


@pytest.mark.parametrize("suffix", [".NII.GZ", ".Nii", ".NRRD", ".nii"])
def test_suffixes_are_known_in_any_case(dataset: Dataset, folder: Path, tmp_path: Path, suffix: str) -> None:
    another_scan(tmp_path / f"B{suffix.lower()}", 3)
    (tmp_path / f"B{suffix.lower()}").rename(folder / f"B{suffix}")
    write_labels(draw_case(3)[1], tmp_path / f"L{suffix.lower()}")
    (tmp_path / f"L{suffix.lower()}").rename(final(folder, "B", suffix))
    assert states(dataset)["B"] == "submitted"
    assert dataset.findings() == []
    (version,) = history(dataset, "B")
    assert np.array_equal(read_labels(dataset.store.label_file(version)).array, draw_case(3)[1].array)
    assert check(dataset.store) == []
    in_place(final(folder, "B", suffix), b"broken")
    submit(dataset, "B", 1)
    assert len(history(dataset, "B")) == 3
    assert check(dataset.store) == []


def test_of_two_files_for_a_label_the_newest_counts_and_both_are_kept(
    dataset: Dataset, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    final(folder, "scan_0").write_bytes(label_bytes(tmp_path, 1))
    os.utime(final(folder, "scan_0"), (100, 100))
    write_segmentation(final(folder, "scan_0", ".seg.nrrd"))
    older = sha256_of(final(folder, "scan_0"))
    assert states(dataset)["scan_0"] == "submitted"
    versions = history(dataset, "scan_0")
    assert [v.sha256 == older for v in versions] == [True, False]
    assert [p.name for p in final(folder, "x").parent.iterdir()] == ["scan_0.seg.nrrd"]
    (told,) = [record.getMessage() for record in caplog.records if "several labels" in record.getMessage()]
    assert told.startswith("labels/final/scan_0.seg.nrrd: is the newest") and told.endswith(": scan_0.nii.gz")
    assert check(dataset.store) == []


# ------------------------------------------------------------------------------------------------------------- edits


def submitting(dataset: Dataset, folder: Path) -> None:
    submit(dataset, "scan_0", 2, BERT)


def removing(dataset: Dataset, folder: Path) -> None:
    dataset.store.remove_label("scan_0", "final", BERT)


def restoring(dataset: Dataset, folder: Path) -> None:
    dataset.store.restore_label(history(dataset, "scan_0")[0].id, BERT)


def rejecting(dataset: Dataset, folder: Path) -> None:
    dataset.store.review("scan_0", "rejected", BERT, "a gap")


def looking(dataset: Dataset, folder: Path) -> None:
    dataset.refresh()


def another_format(dataset: Dataset, folder: Path) -> None:
    write_labels(draw_case(2)[1], folder.parent / "l.nrrd")
    dataset.store.save_label(NewLabel("scan_0", "final", "annotator", BERT), folder.parent / "l.nrrd")


def replacing_the_scan(dataset: Dataset, folder: Path) -> None:
    another_scan(folder / "scan_0.nii.gz", 9, shape=(30, 28, 10))
    dataset.refresh()


OVERWRITING = [submitting, removing, restoring, rejecting, another_format, replacing_the_scan]


@pytest.mark.parametrize("act", [looking, *OVERWRITING])
def test_a_label_that_was_edited_in_place_is_a_version_before_anything_overwrites_it(
    dataset: Dataset, folder: Path, tmp_path: Path, act: Callable[[Dataset, Path], None]
) -> None:
    first = submit(dataset, "scan_0")
    in_place(final(folder, "scan_0"), label_bytes(tmp_path, 5))
    edit = sha256_of(final(folder, "scan_0"))
    act(dataset, folder)
    assert edit in kept(folder)
    with dataset.store.read() as transaction:
        rows = [
            version
            for scan in scans.listing(transaction)
            if scan.name.startswith("scan_0")
            for version in labels.history(transaction, scan.name)
        ]
    assert [v.sha256 for v in rows][:2] == [first.sha256, edit]
    assert (rows[1].source, rows[1].actor.identified_by) == ("import", "folder")
    assert check(dataset.store) == []


@pytest.mark.parametrize("act", OVERWRITING)
def test_an_edit_that_keeps_size_and_time_is_a_version_before_anything_overwrites_it(
    dataset: Dataset, folder: Path, tmp_path: Path, act: Callable[[Dataset, Path], None]
) -> None:
    submit(dataset, "scan_0")
    path = final(folder, "scan_0")
    before, edit = (label_bytes(tmp_path, index).ljust(4000, b"\0") for index in (4, 5))
    in_place(path, before)
    dataset.refresh()
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    in_place(path, edit)
    os.utime(path, ns=times)
    assert len(before) == len(edit)
    address = sha256_of(path)
    act(dataset, folder)
    assert address in {sha256_of(kept_file) for kept_file in dataset.store.files.all_objects()}
    assert check(dataset.store) == []


@pytest.mark.parametrize("act", OVERWRITING)
def test_an_edit_that_is_no_label_is_kept_all_the_same(
    dataset: Dataset, folder: Path, act: Callable[[Dataset, Path], None]
) -> None:
    submit(dataset, "scan_0")
    in_place(final(folder, "scan_0"), b"whatever somebody wrote")
    edit = sha256_of(final(folder, "scan_0"))
    dataset.refresh()
    assert [f.file for f in dataset.findings()] == ["labels/final/scan_0.nii.gz"]
    act(dataset, folder)
    assert edit in {sha256_of(path) for path in dataset.store.files.all_objects()}
    dataset.refresh()
    assert dataset.findings() == []
    assert check(dataset.store) == []


def test_an_edit_that_was_no_label_is_never_a_label_again(dataset: Dataset, folder: Path) -> None:
    submit(dataset, "scan_0")
    in_place(final(folder, "scan_0"), b"whatever somebody wrote")
    submit(dataset, "scan_0", 2)
    with pytest.raises(Exception, match="cannot be a label again"):
        dataset.store.restore_label(history(dataset, "scan_0")[1].id, BERT)


def test_a_persons_mask_is_kept_when_a_network_writes_its_own(dataset: Dataset, folder: Path, tmp_path: Path) -> None:
    save_mask(dataset.store, tmp_path, "scan_0", 3)
    path = folder / "labels" / "original" / "scan_0.nii.gz"
    in_place(path, label_bytes(tmp_path, 6))
    edit = sha256_of(path)
    save_mask(dataset.store, tmp_path, "scan_0", 4, segmenter="seg2")
    assert [v.source for v in history(dataset, "scan_0")] == ["network", "import", "network"]
    assert edit in kept(folder)


@pytest.mark.parametrize("when", ["put", "_show"])
@pytest.mark.parametrize("content", ["label", "no label"])
def test_an_edit_outlives_a_process_that_dies_while_it_replaces_it(
    folder: Path, tmp_path: Path, url: str | None, when: str, content: str
) -> None:
    store = Store.open(folder, url, intake=Dataset(folder).settings.intake_checks())
    sync_scans(store)
    save_final(store, tmp_path, "scan_0", 3)
    in_place(final(folder, "scan_0"), label_bytes(tmp_path, 5) if content == "label" else b"no label")
    edit = sha256_of(final(folder, "scan_0"))
    label_map(tmp_path / "next.nii.gz", 4)
    store.database.engine.dispose()
    child = fork()
    if child == 0:
        try:
            dying = Store(folder, url, intake=store.intake)
            done = {"put": 0, "_show": 0}
            real = getattr(dying.files, when)

            def deadly(*arguments: object) -> object:
                answer = real(*arguments)
                done[when] += 1
                if done[when] == (2 if when == "put" else 1):  # the edit, then what replaces it
                    os._exit(9)
                return answer

            setattr(dying.files, when, deadly)
            dying.save_label(NewLabel("scan_0", "final", "annotator", BERT), tmp_path / "next.nii.gz")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    again = Store.open(folder, url, intake=store.intake)
    assert sha256_of(final(folder, "scan_0")) == edit
    sync_scans(again)
    with again.read() as transaction:
        versions = labels.history(transaction, "scan_0")
    assert len(versions) == (2 if content == "label" else 1)
    assert edit in kept(folder)
    again.close()
    store.close()


def test_a_submission_whose_file_says_it_all_is_kept_as_it_came(dataset: Dataset, folder: Path) -> None:
    file = folder.parent / "sent.nii.gz"
    file.write_bytes(gzip.compress(gzip.decompress(label_bytes(folder.parent, 1)), 9, mtime=0))
    label = submit_label(dataset, "scan_0", draw_case(1)[1], "final", ANNA, file=file).label
    assert dataset.store.label_file(label).read_bytes() == file.read_bytes() == final(folder, "scan_0").read_bytes()


# ---------------------------------------------------------------------------------------------------------- contents


def test_another_content_of_the_same_size_and_time_is_another_scan(dataset: Dataset, folder: Path) -> None:
    path = folder / "q.nii"
    size = len(another_scan(path, 4))
    dataset.refresh()
    before = record(dataset, "q").sha256
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    content = another_scan(folder.parent / "other.nii", 5)
    in_place(path, content)
    os.utime(path, ns=times)
    assert len(content) == size
    dataset.refresh()
    assert record(dataset, "q").sha256 not in (None, before)
    assert record(dataset, f"q@{str(before)[:8]}").missing_since is not None


@pytest.mark.parametrize("shape", [SHAPE, (30, 28, 10)])
def test_another_content_under_the_same_name_is_another_scan(
    dataset: Dataset, folder: Path, shape: tuple[int, int, int]
) -> None:
    label = submit(dataset, "scan_0")
    before, old = record(dataset, "scan_0"), (folder / "scan_0.nii.gz").read_bytes()
    another_scan(folder / "scan_0.nii.gz", 9, shape=shape)
    retired = f"scan_0@{(before.sha256 or '')[:8]}"
    assert states(dataset) == {
        "scan_0": "unlabelled", "scan_1": "unlabelled", "scan_2": "unlabelled", retired: "missing"
    }  # fmt: skip
    now = record(dataset, "scan_0")
    assert (now.patient, now.fold, now.split) == (before.patient, before.fold, before.split)
    assert now.sha256 == sha256_of(folder / "scan_0.nii.gz")
    assert record(dataset, retired).former_name == "scan_0"
    assert not final(folder, "scan_0").exists()
    assert [v.id for v in history(dataset, retired)] == [label.id]
    assert history(dataset, "scan_0") == []
    assert dataset.cases() == []
    assert check(dataset.store) == []
    (folder / "scan_0.nii.gz").write_bytes(old)
    assert states(dataset)["scan_0"] == "submitted"
    assert record(dataset, "scan_0").id == before.id
    assert final(folder, "scan_0").is_file()
    assert [case.id for case in dataset.cases()] == ["scan_0"]
    assert check(dataset.store) == []


def test_contents_that_take_turns_keep_their_own(dataset: Dataset, folder: Path) -> None:
    contents = [(folder / "scan_0.nii.gz").read_bytes(), *(another_scan(folder / "x.nii.gz", i) for i in (7, 8))]
    (folder / "x.nii.gz").unlink()
    for turn in range(2):
        for index, content in enumerate(contents):
            (folder / "scan_0.nii.gz").write_bytes(content)
            assert states(dataset)["scan_0"] == ("unlabelled" if turn == 0 else "submitted")
            if turn == 0:
                submit(dataset, "scan_0", index)
            current = history(dataset, "scan_0")[-1]
            assert np.array_equal(read_labels(dataset.store.label_file(current)).array, draw_case(index)[1].array)
            assert check(dataset.store) == []
    with dataset.store.read() as transaction:
        assert len(scans.listing(transaction)) == 5


def test_a_label_that_came_with_the_new_content_is_the_new_contents(
    dataset: Dataset, folder: Path, tmp_path: Path
) -> None:
    old = submit(dataset, "scan_0")
    shape = (30, 28, 10)
    another_scan(folder / "scan_0.nii.gz", 9, shape=shape)
    in_place(final(folder, "scan_0"), label_bytes(tmp_path, 9, shape=shape))
    assert states(dataset)["scan_0"] == "submitted"
    (version,) = history(dataset, "scan_0")
    assert version.sha256 == sha256_of(final(folder, "scan_0")) != old.sha256


def test_a_scan_that_becomes_unreadable_waits_for_its_content(dataset: Dataset, folder: Path) -> None:
    submit(dataset, "scan_0")
    old = (folder / "scan_0.nii.gz").read_bytes()
    in_place(folder / "scan_0.nii.gz", old[: len(old) // 2])
    assert states(dataset)["scan_0"] == "missing"
    assert [f.file for f in dataset.findings()] == ["scan_0.nii.gz"]
    in_place(folder / "scan_0.nii.gz", old)
    assert states(dataset)["scan_0"] == "submitted"
    assert dataset.findings() == []


def hand_out(dataset: Dataset, actor: Actor = ANNA) -> str:
    with dataset.store.write() as transaction:
        lease = leases.acquire(transaction, actor, "segqc", sequential.order, RULES)
    assert lease is not None
    return lease.scan


def test_what_was_handed_out_for_the_old_content_is_never_the_new_ones(dataset: Dataset, folder: Path) -> None:
    name = hand_out(dataset)
    old = (folder / f"{name}.nii.gz").read_bytes()
    another_scan(folder / f"{name}.nii.gz", 9)  # of the same shape, and not looked at yet
    with pytest.raises(ScanReplaced, match=r"handed out to you .*drawn on the older one.*ask for the scan again"):
        submit(dataset, name)
    assert states(dataset)[name] == "unlabelled"
    assert history(dataset, name) == []
    with dataset.store.read() as transaction:
        assert leases.listing(transaction, state="open") == []
    submit(dataset, name, actor=BERT)  # was never shown the old one
    (folder / f"{name}.nii.gz").write_bytes(old)
    submit(dataset, name)
    assert states(dataset)[name] == "submitted"


def test_a_submission_that_was_checked_against_the_old_content_is_refused(dataset: Dataset, folder: Path) -> None:
    checked = dataset.verify_scan("scan_0")
    another_scan(folder / "scan_0.nii.gz", 9)
    with pytest.raises(ScanReplaced):
        submit_label(dataset, "scan_0", draw_case(0)[1], "final", ANNA, checked=checked)


def test_an_estimate_is_of_the_content_that_was_read(dataset: Dataset, folder: Path, tmp_path: Path) -> None:
    entry = dataset.scan("scan_0")
    mask = save_mask(dataset.store, tmp_path, "scan_0", 3)
    another_scan(folder / "scan_0.nii.gz", 9)
    with pytest.raises(ScanReplaced):
        dataset.read_scan(entry)
    made = make_assessment("scan_0", 0.7)
    with pytest.raises(ScanReplaced):
        dataset.write_assessment(made, mask, bundle(dataset.store).id, content=entry.sha256)
    with pytest.raises(ScanReplaced):
        dataset.write_score("tta", "scan_0", 0.5, "seg", entry.sha256)
    with dataset.store.read() as transaction:
        assert assessments.latest(transaction, "scan_0") is None
    assert record(dataset, "scan_0").ranking_dice is None
    assert dataset.scores("tta") == {}


# ----------------------------------------------------------------------------------------------------------- uploads


UPLOAD_NAMES = ["scan_0", "SCAN_0"]


def excluded(dataset: Dataset, folder: Path) -> None:
    dataset.store.review("scan_0", "excluded", ANNA, "wrong")


def missing(dataset: Dataset, folder: Path) -> None:
    (folder / "scan_0.nii.gz").unlink()
    dataset.refresh()


def unseen(dataset: Dataset, folder: Path) -> None:
    missing(dataset, folder)
    with dataset.store.write() as transaction:
        scans.retire(transaction, scans.get(transaction, "scan_0").id, ANNA)
    another_scan(folder / "scan_0.nrrd", 6)


def unreadable(dataset: Dataset, folder: Path) -> None:
    unseen(dataset, folder)
    (folder / "scan_0.nrrd").write_bytes(b"not yet")


@pytest.mark.parametrize("name", UPLOAD_NAMES)
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".NII"])
@pytest.mark.parametrize("state", [looking, excluded, missing, unseen, unreadable])
def test_an_upload_never_replaces_a_file(
    dataset: Dataset, folder: Path, tmp_path: Path, state: Callable[[Dataset, Path], None], name: str, suffix: str
) -> None:
    dataset.refresh()
    state(dataset, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    another_scan(tmp_path / f"up{suffix.lower()}", 7)
    (tmp_path / f"up{suffix.lower()}").rename(tmp_path / f"up{suffix}")
    with pytest.raises(ScanExists) as raised:
        dataset.add_scan(tmp_path / f"up{suffix}", name)
    assert raised.value.name == "scan_0"
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_the_same_upload_again_is_the_scan_that_is_there(dataset: Dataset, tmp_path: Path) -> None:
    another_scan(tmp_path / "up.nii.gz", 7)
    assert [dataset.add_scan(tmp_path / "up.nii.gz", "new").new for _ in range(2)] == [True, False]
    another_scan(tmp_path / "up.nii.gz", 8)
    with pytest.raises(ScanExists):
        dataset.add_scan(tmp_path / "up.nii.gz", "new")


def test_an_upload_that_is_no_scan_leaves_nothing(dataset: Dataset, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "up.nii.gz").write_bytes(b"no scan")
    dataset.refresh()
    before = sorted(folder.iterdir())
    with pytest.raises(VolumeError):
        dataset.add_scan(tmp_path / "up.nii.gz", "new")
    assert sorted(folder.iterdir()) == before
    with pytest.raises(DatasetError):
        dataset.scan("new")


def test_of_uploads_in_the_same_moment_one_wins(folder: Path, tmp_path: Path, url: str | None) -> None:
    store = Store.open(folder, url, intake=AnyContent())
    sync_scans(store)
    suffixes = (".nii.gz", ".nii", ".nrrd", ".NII.GZ")
    sources = [another_scan(tmp_path / f"{i}.nii.gz", i) and tmp_path / f"{i}.nii.gz" for i in range(4)]
    start = threading.Barrier(len(suffixes))

    def upload(index: int) -> bool:
        start.wait()
        try:
            return folder_module.add_scan(store, sources[index], "new", suffixes[index], scan_id, PLACING).new
        except ScanExists:
            return False

    with ThreadPoolExecutor(len(suffixes)) as pool:
        won = list(pool.map(upload, range(len(suffixes))))
    assert sum(won) == 1
    (file,) = (path for path in folder.iterdir() if path.name.startswith("new"))
    assert file.read_bytes() == sources[won.index(True)].read_bytes()
    store.close()


# --------------------------------------------------------------------------------------------------------- estimates


@pytest.mark.parametrize("how", ["removed", "edited", "replaced scan"])
def test_no_estimate_is_shown_of_a_mask_that_is_not_there_any_more(
    dataset: Dataset, folder: Path, tmp_path: Path, how: str
) -> None:
    write_labels(draw_case(0)[1], tmp_path / "m.nii.gz")
    pair = bundle(dataset.store, "seg")
    label = NewLabel(
        "scan_0", "original", "network", Actor(kind="network", name="seg", identified_by="program"), bundle=pair.id
    )
    mask = dataset.store.save_label(label, tmp_path / "m.nii.gz")
    dataset.write_assessment(make_assessment("scan_0", 0.7), mask, pair.id)
    assert record(dataset, "scan_0").ranking_dice == 0.7
    path = folder / "labels" / "original" / "scan_0.nii.gz"
    if how == "removed":
        path.unlink()
    elif how == "edited":
        in_place(path, label_bytes(tmp_path, 5))
    else:
        another_scan(folder / "scan_0.nii.gz", 9)
    dataset.refresh()
    assert record(dataset, "scan_0").ranking_dice is None
    assert dataset.assessments() == {}
