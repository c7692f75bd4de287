"""The whole loop on a PACS: a real server and its worker on an Orthanc of our own, with real scans where they are."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
from pydicom.dataset import FileDataset

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from segqc.types import Structure
from segqc.volumes import Volume, read_labels, read_scan, write_labels
from tests.pacs_kit import PASSWORD, USER, Orthanc, series, to_bytes
from tests.server_kit import add_models, draw_case
from tests.test_pacs import read_independently

pytestmark = pytest.mark.server
ROOT = Path(__file__).resolve().parents[2]
STRUCTURES = (Structure("organ", (1,)), Structure("other", (2,)))
SEG_SECONDS = 60  # that a busy machine may take; benchmarks/pacs.py says how long it takes


@dataclass(frozen=True)
class Served:
    url: str
    folder: Path
    log: Path
    images: dict[str, list[FileDataset]]  # by series
    masks: dict[str, Volume]  # that an expert has drawn

    def wipe(self) -> None:
        shutil.rmtree(self.folder / "segqc" / "pacs", ignore_errors=True)


def cases() -> list[tuple[str, Volume, Volume]]:
    """Scans and masks, each with its patient: two oblique stacks of a foetus and a heart, or the generated sample."""
    data = Path(os.environ.get("SEGQC_DATA", "none"))
    wanted = ["fetal-brain-stacks/{}/run-1", "fetal-brain-stacks/{}/run-4", "sunnybrook-cine/{}/SC-HF-I-02_ED"]
    if not all((data / f"{name.format('images')}.nii.gz").is_file() for name in wanted):
        return [(f"patient-{i}", *draw_case(i)) for i in range(3)]
    found = []
    for name in wanted:
        image = read_scan(data / f"{name.format('images')}.nii.gz")
        mask = read_labels(data / f"{name.format('labels')}.nii.gz", scan=image)
        found.append((name.split("/")[0], image, mask))
    return found


@pytest.fixture(scope="module")
def served(orthanc: Orthanc, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    base = tmp_path_factory.mktemp("pacs-loop")
    images: dict[str, list[FileDataset]] = {}
    masks: dict[str, Volume] = {}
    for patient, image, mask in cases():
        items = series(image, f"LOOP-{patient}")
        orthanc.store(*map(to_bytes, items))
        uid = str(items[0].SeriesInstanceUID)
        images[uid] = items
        # the file of a scan ends at the head: as DICOM's slices ascend along their normal
        masks[uid] = Volume((mask.array > 0).astype(np.uint8), mask.affine)
    folder = base / "work"
    folder.mkdir()
    (folder / "segqc.toml").write_text(
        f'[pacs]\nuser = "{USER}"\npatient = "LOOP-*"\northanc_url = "{orthanc.rest}"\n'
        "[structures]\norgan = [1]\nother = [2]\n"
    )
    add_models(folder, STRUCTURES)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = base / "terminal.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SEGQC_")}
    with log.open("wb") as terminal:
        process = subprocess.Popen(
            [sys.executable, "-m", "segqc", "serve", orthanc.url, "--folder", str(folder), "--port", str(port)],
            cwd=ROOT,
            stdout=terminal,
            stderr=subprocess.STDOUT,
            env={**environment, "PYTHONPATH": str(ROOT), "SEGQC_PACS__PASSWORD": PASSWORD},
        )
    made = Served(f"http://127.0.0.1:{port}", folder, log, images, masks)
    try:
        until = time.monotonic() + 240
        while not _knows_all(made):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()[-4000:]
            time.sleep(0.3)
        yield made
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        for child in children:
            child.kill()
        shutil.rmtree(base, ignore_errors=True)


def _knows_all(served: Served) -> bool:
    try:
        status = requests.get(f"{served.url}/datastore/?output=stats", timeout=60).json()
    except (requests.ConnectionError, ValueError):
        return False
    return int(status.get("total", 0)) == len(served.images)


def test_from_the_next_scan_to_a_seg_in_the_pacs(served: Served, orthanc: Orthanc, tmp_path: Path) -> None:
    done = set()
    for annotator in ("anna", "ben", "cleo"):
        served.wipe()
        answer = requests.post(f"{served.url}/activelearning/segqc", json={"client_id": annotator}, timeout=120)
        assert answer.status_code == 200, answer.text
        scan = answer.json()["id"]
        done.add(scan)
        served.wipe()
        image = requests.get(f"{served.url}/datastore/image", params={"image": scan}, timeout=120)
        (tmp_path / "scan.nii").write_bytes(image.content)
        grid = read_scan(tmp_path / "scan.nii")
        served.wipe()
        assessed = requests.post(
            f"{served.url}/infer/segqc", params={"image": scan, "output": "json"}, data={"params": "{}"}, timeout=240
        )
        assert assessed.status_code == 200, assessed.text
        drawn = served.masks[scan]
        submitted = np.ascontiguousarray(drawn.array[:, :, ::-1] if is_reversed(drawn, grid) else drawn.array)
        submitted[5, 5, 0] = 2
        write_labels(Volume(submitted, grid.affine), tmp_path / "label.nii.gz")
        served.wipe()
        started = time.monotonic()
        with (tmp_path / "label.nii.gz").open("rb") as file:
            kept = requests.put(
                f"{served.url}/datastore/label",
                params={"image": scan, "tag": "final"},
                data={"params": json.dumps({"client_id": annotator})},
                files={"label": file},
                timeout=240,
            )
        assert kept.status_code == 200, kept.text
        study = str(served.images[scan][0].StudyInstanceUID)
        while not (segs := orthanc.segmentations(study)):
            assert time.monotonic() - started < SEG_SECONDS, served.log.read_text()[-4000:]
            time.sleep(0.2)
        (seg,) = segs
        np.testing.assert_array_equal(read_independently(seg, grid, {"organ": 1, "other": 2}), submitted)
        assert seg.FrameOfReferenceUID == served.images[scan][0].FrameOfReferenceUID
    assert done == set(served.images)
    assert PASSWORD not in served.log.read_text()


def is_reversed(one: Volume, other: Volume) -> bool:
    """Whether the slices of a file run the other way than those of the series that was made of it."""
    return bool(one.affine[:3, 2] @ other.affine[:3, 2] < 0)
