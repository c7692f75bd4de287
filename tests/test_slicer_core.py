"""Label maps that a headless core of 3D Slicer exports, submitted: what is stored is what was drawn, by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from fastapi.testclient import TestClient

from segqc.types import LabelArray
from segqc.volumes import Volume, read_labels, write_labels, write_scan
from tests.server_kit import serving
from tests.slicer_export import Job

pytestmark = pytest.mark.slow

SLICER_CORE = "slicer-core==5.13.31053.0"
VALUES = {"body": 2, "placenta": 4, "brain": 7}
CONFIG = "[structures]\nbody = [2]\nplacenta = [4]\nbrain = [7]\n"
SHAPE = (30, 26, 12)
EXTENSIONS = (".nii.gz", ".nrrd", ".seg.nrrd")  # those that the module's settings offer
SCRIBBLES, RENAMED = "likely error (scribbles)", "likely error"
SCRIPT = Path(__file__).with_name("slicer_export.py")


@pytest.fixture(scope="module")
def slicer_python() -> Iterator[str]:
    """The Python of SEGQC_SLICER_PYTHON, or one of a new environment: slicer-core brings a VTK of its own."""
    if named := os.environ.get("SEGQC_SLICER_PYTHON"):
        yield named
        return
    with tempfile.TemporaryDirectory(prefix="slicer-core-") as folder:
        python = str(Path(folder) / "bin" / "python")
        try:
            _run(sys.executable, "-m", "venv", folder)
            _run(python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--only-binary=:all:", SLICER_CORE)
            _run(python, "-c", "import slicer")
        except (OSError, subprocess.CalledProcessError) as error:
            said = str(getattr(error, "stderr", "") or error).strip().splitlines()
            pytest.skip(f"{SLICER_CORE} cannot be installed or imported here: {said[-1] if said else error}")
        yield python


def _run(*command: str, text: str = "") -> None:
    subprocess.run(command, input=text, check=True, capture_output=True, text=True)


def oblique() -> np.ndarray:
    """An affine that is no axis' own: rotated about two axes, 1.5 x 1.5 x 4 mm, far from the origin."""
    a, b = np.deg2rad((20, -35))
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag([1.5, 1.5, 4.0])
    affine[:3, 3] = (-31.5, 12.25, 87.0)
    return affine


def drawn() -> LabelArray:
    """A body with a brain in it, and a placenta beside it, with the settings' values."""
    labels: LabelArray = np.zeros(SHAPE, np.uint8)
    x, y, z = np.ogrid[tuple(slice(n) for n in SHAPE)]
    labels[((x - 12) / 9) ** 2 + ((y - 12) / 8) ** 2 + ((z - 6) / 5) ** 2 < 1] = VALUES["body"]
    labels[((x - 8) / 3) ** 2 + ((y - 12) / 3) ** 2 + ((z - 6) / 3) ** 2 < 1] = VALUES["brain"]
    labels[23:29, 4:20, 3:9] = VALUES["placenta"]
    return labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("slicer") / "studies"
    made.mkdir()
    (made / "segqc.toml").write_text(CONFIG)
    image = np.random.default_rng(0).normal(100, 10, SHAPE).astype(np.float32)
    write_scan(Volume(image, oblique()), made / "scan.nii.gz")
    write_labels(Volume(drawn(), oblique()), made / "labels" / "original" / "scan.nii.gz")
    return made


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with serving(folder) as made:
        yield made


SUBMISSIONS = {
    # what is left of the segments, in which order; the name of the filled segment of likely errors; the answer
    "unedited": (["body", "placenta", "brain"], None, 200),
    "reordered": (["brain", "body", "placenta"], None, 200),
    "one structure removed": (["body", "brain"], None, 200),
    "only the last structure": (["brain"], None, 200),
    "likely errors beside": (["body", "placenta", "brain", SCRIBBLES], SCRIBBLES, 200),
    "likely errors first": ([SCRIBBLES, "brain", "placenta", "body"], SCRIBBLES, 200),
    "likely errors over the mask": (["body", "placenta", "brain", RENAMED], RENAMED, 422),
    "likely errors below the mask": ([RENAMED, "body", "placenta", "brain"], RENAMED, 422),
}


@pytest.fixture(scope="module")
def exported(
    slicer_python: str, client: TestClient, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[dict[str, object]], Path]]:
    """The ``label_info`` of each submission and the folder with its files."""
    work = tmp_path_factory.mktemp("exported")
    delivered = work / "delivered.nii.gz"
    delivered.write_bytes(client.get("/datastore/label?label=scan&tag=original").content)
    names = client.get("/datastore/label/info?label=scan&tag=original").json()["params"]["label_names"]
    errors = np.zeros(SHAPE, np.uint8)
    errors[2:10, 9:15, 4:8] = 1  # over much of the brain and the body, and a little beside them
    assert set(drawn()[errors == 1].tolist()) == {0, VALUES["body"], VALUES["brain"]}
    write_labels(Volume(errors, oblique()), work / "errors.nii.gz")
    jobs: list[Job] = []
    for number, (shown, error_name, _) in enumerate(SUBMISSIONS.values()):
        (work / str(number)).mkdir()
        jobs.append({
            "scan": str(folder / "scan.nii.gz"),
            "mask": str(delivered),
            "names": sorted(names, key=names.__getitem__),
            "shown": shown,
            "error_name": error_name or "",
            "errors": str(work / "errors.nii.gz") if error_name is not None else None,
            "outputs": [str(work / str(number) / f"label{extension}") for extension in EXTENSIONS],
        })  # fmt: skip
    _run(slicer_python, str(SCRIPT), str(work / "infos.json"), text=json.dumps(jobs))
    infos = json.loads((work / "infos.json").read_text())
    return {name: (infos[number], work / str(number)) for number, name in enumerate(SUBMISSIONS)}


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("submission", SUBMISSIONS)
def test_what_slicer_exports_is_stored_as_it_was_drawn(
    exported: dict[str, tuple[list[dict[str, object]], Path]],
    client: TestClient,
    folder: Path,
    submission: str,
    extension: str,
) -> None:
    shown, _, status = SUBMISSIONS[submission]
    info, files = exported[submission]
    assert [entry["name"] for entry in info] == shown
    tag = "".join(c if c.isalnum() else "_" for c in f"{submission}{extension}")
    answer = client.put(
        f"/datastore/label?image=scan&tag={tag}",
        data={"params": json.dumps({"label_info": info, "model": "segmentation", "client_id": "user-1"})},
        files={"label": (f"/tmp/slicer/tmp1x{extension}", (files / f"label{extension}").read_bytes())},
    )
    assert answer.status_code == status, answer.text
    stored = folder / "labels" / tag / "scan.nii.gz"
    if status == 422:
        assert f"'{RENAMED}'" in answer.json()["detail"]
        assert "remove or hide the segment first" in answer.json()["detail"]
        assert not stored.exists()
        return
    wanted = np.where(np.isin(drawn(), [VALUES[name] for name in shown if name in VALUES]), drawn(), 0)
    kept = read_labels(stored)
    assert np.array_equal(kept.array, wanted)
    assert np.allclose(kept.affine, oblique(), atol=1e-4)
