from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException

from segqc.server.datastore import FolderDatastore, IndexFileError
from segqc.server.errors import RequestError
from segqc.volumes import write_labels, write_scan
from tests.server_kit import draw_case, make_studies

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_studies(tmp_path / "studies", scans=3, finals=1)


@pytest.fixture
def label(tmp_path: Path) -> Path:
    path = tmp_path / "mask.nii.gz"
    write_labels(draw_case(0)[1], path)
    return path


def test_lists_what_is_in_the_folder_and_what_comes_into_it(folder: Path) -> None:
    store = FolderDatastore(folder)
    assert sorted(store.list_images()) == ["scan_0", "scan_1", "scan_2"]
    assert store.get_labeled_images() == ["scan_0"]
    write_scan(draw_case(7)[0], folder / "scan.v1.2.nii.gz")
    assert "scan.v1.2" in store.list_images()
    write_labels(draw_case(7)[1], folder / "labels" / "final" / "scan.v1.2.nii.gz")
    assert sorted(store.get_labeled_images()) == ["scan.v1.2", "scan_0"]
    (folder / "scan_1.nii.gz").unlink()
    assert not store.has_image("scan_1")


def test_a_label_in_another_format_replaces_the_older_one(folder: Path, label: Path, tmp_path: Path) -> None:
    store = FolderDatastore(folder)
    other = tmp_path / "mask.nrrd"
    write_labels(draw_case(0)[1], other)
    store.save_label("scan_1", str(label), "final", {"by": "first"})
    store.save_label("scan_1", str(other), "final", {"by": "second"})
    assert [p.name for p in sorted((folder / "labels" / "final").glob("scan_1*"))] == ["scan_1.nrrd"]
    assert store.get_label_info("scan_1", "final")["by"] == "second"
    assert Path(store.get_label_uri("scan_1", "final")).read_bytes() == other.read_bytes()


def test_names_that_leave_the_folder_are_refused(folder: Path, label: Path) -> None:
    store = FolderDatastore(folder)
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(RequestError):
        store.save_label("scan_1", str(label), "../../out", {})
    with pytest.raises(RequestError):
        store.add_image("../out", str(label), {})
    with pytest.raises(ImageNotFoundException):
        store.save_label("../scan_1", str(label), "final", {})
    with pytest.raises(LabelNotFoundException):
        store.remove_label("../scan_1", "final")
    assert sorted(folder.parent.rglob("*")) == before


def test_two_processes_and_many_threads_lose_no_information(folder: Path, label: Path) -> None:
    store = FolderDatastore(folder)
    script = (
        "import sys; from pathlib import Path; from segqc.server.datastore import FolderDatastore\n"
        "store = FolderDatastore(Path(sys.argv[1]), auto_reload=False)\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for i in range(25): store.update_image_info('scan_2', {f'other_{i}': i})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    problems: list[BaseException] = []

    def save(start: int) -> None:
        try:
            for i in range(start, start + 8):
                store.save_label("scan_1", str(label), f"tag{i}", {"number": i})
                store.update_image_info("scan_2", {f"own_{i}": i})
                assert len(store.list_images()) == 3
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=save, args=(8 * n,)) for n in range(3)]
    process.stdin.write("go\n")
    process.stdin.flush()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert process.wait(timeout=60) == 0
    assert not problems
    fresh = FolderDatastore(folder)
    info = fresh.get_image_info("scan_2")
    assert {k for k in info if k.startswith(("own_", "other_"))} == {f"own_{i}" for i in range(24)} | {
        f"other_{i}" for i in range(25)
    }
    assert [fresh.get_label_info("scan_1", f"tag{i}")["number"] for i in range(24)] == list(range(24))


def test_the_index_is_never_half_written(folder: Path) -> None:
    store = FolderDatastore(folder)
    index = folder / "datastore_v2.json"
    stop = threading.Event()
    bad: list[str] = []

    def read() -> None:
        while not stop.is_set():
            try:
                json.loads(index.read_text())
            except ValueError as error:
                bad.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(100):
        store.update_image_info("scan_0", {"note": "x" * 2000, "i": i})
    stop.set()
    reader.join()
    assert not bad


def test_a_damaged_index_is_named(folder: Path) -> None:
    FolderDatastore(folder)
    (folder / "datastore_v2.json").write_text('{"name": "x", ')
    with pytest.raises(IndexFileError, match=r"datastore_v2\.json"):
        FolderDatastore(folder)
