"""A real server on a small dataset folder, driven by MONAI Label's own client, as 3D Slicer drives it.

The tests follow one story, in order: first start, first networks, corrections, and the end.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

import psutil
import requests
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException

from segqc.loop.dataset import Dataset
from segqc.types import Assessment
from segqc.volumes import Volume, read_labels, read_scan, write_labels
from tests.server_kit import draw_case, make_dataset

pytestmark = pytest.mark.server

ROOT = Path(__file__).resolve().parents[2]
SLOW_APP = Path(__file__).parent / "slow_app"
SLOW_SECONDS = 20.0
PROMPT_SECONDS = 5.0
CONFIG = """
[structures]
liver = [1]
spleen = [4]

[training]
epochs = 1
fold_epochs = 4
people_epochs = 2
steps_per_epoch = 1
folds = 2
gammas = []
"""
START = """
import sys
from pathlib import Path
from segqc.server import serve as module
module._REQUEST_GRACE_SECONDS, module._DEADLINE_SECONDS = 1, 8.0
module.serve(Path(sys.argv[1]), app_dir=Path(sys.argv[2]), port=int(sys.argv[3]))
"""


# No draws by lot, and leases of seconds: who gets what is then a matter of the estimates alone.
PLAIN = "[annotation]\naudit_share = 0.0\nvalidation_share = 0.0\nlease_minutes = 0.05\nskip_hours = 0.0\n"


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    url: str
    folder: Path
    log: Path
    client: MONAILabelClient

    def get(self, path: str) -> requests.Response:
        return requests.get(f"{self.url}{path}", timeout=60)

    def post(self, path: str, **arguments: Any) -> requests.Response:
        return requests.post(f"{self.url}{path}", timeout=60, **arguments)

    def wait(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            assert "ended: failed" not in self.log.read_text(), self.log.read_text()[-4000:]
            time.sleep(0.3)

    def job_ended(self, kind: str) -> bool:
        answer = self.get(f"/{kind}")
        return answer.status_code == 200 and answer.json()["status"] in ("DONE", "ERROR", "STOPPED")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("e2e")
    folder = make_dataset(base / "studies", scans=8, finals=5, config=CONFIG + PLAIN)
    port = free_port()
    log = base / "terminal.log"
    with log.open("wb") as terminal:
        process = subprocess.Popen(
            [sys.executable, "-c", START, str(folder), str(SLOW_APP), str(port)],
            cwd=ROOT,
            stdout=terminal,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    url = f"http://127.0.0.1:{port}"
    made = Server(process, url, folder, log, MONAILabelClient(url, tmpdir=str(base), client_id="annotator"))
    try:
        made.wait(lambda: _answers(url), 120)
        yield made
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        for child in children:
            child.kill()
        shutil.rmtree(base, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/info/", timeout=60).status_code == 200
    except requests.ConnectionError:
        return False


def test_others_are_answered_while_an_inference_and_a_training_run(server: Server) -> None:
    slow: list[tuple[int, float]] = []

    def infer() -> None:
        start = time.monotonic()
        answer = server.post(
            "/infer/slow",
            params={"image": "scan_7", "output": "json"},
            data={"params": f'{{"seconds": {SLOW_SECONDS}}}'},
        )
        slow.append((answer.status_code, time.monotonic() - start))

    thread = threading.Thread(target=infer)
    thread.start()
    waited: list[float] = []
    while thread.is_alive():
        start = time.monotonic()
        assert server.client.info()["name"] == "SegQC"
        assert server.client.next_sample("segqc", {})["id"] in {"scan_5", "scan_6", "scan_7"}
        waited.append(time.monotonic() - start)
        time.sleep(0.5)
    thread.join()
    assert slow[0][0] == 200
    assert slow[0][1] >= SLOW_SECONDS
    assert len(waited) > 4
    assert max(waited) < PROMPT_SECONDS
    # the first networks were in training all the while
    assert server.client.train_status()["start_ts"]
    assert "training ['segmentation', 'segqc'] on 5 labelled scans" in server.log.read_text()


def test_first_networks_are_trained_and_the_pool_is_scored(server: Server) -> None:
    server.wait(lambda: server.job_ended("scoring/"))
    trainings = server.get("/train/?all=true").json()
    assert [(t["request"]["model"], t["status"]) for t in trainings] == [("segmentation", "DONE"), ("segqc", "DONE")]
    assert server.get("/scoring/").json()["status"] == "DONE"
    assert "fold 1 of 2" in server.log.read_text()  # progress is seen at the terminal
    info = server.client.info()
    assert 0 <= info["train_stats"]["segmentation"]["best_metric"] <= 1
    assert info["datastore"]["label_tags"] == {"final": 5, "original": 3}


def test_the_next_sample_is_the_one_with_the_lowest_estimate(server: Server) -> None:
    assessments = Dataset(server.folder).assessments()
    assert set(assessments) == {"scan_5", "scan_6", "scan_7"}
    worst = min(sorted(assessments), key=lambda scan: assessments[scan].dice)
    fresh = MONAILabelClient(server.url, client_id="somebody else")
    server.wait(lambda: not server.get("/segqc/leases").json())  # they last for seconds here
    for strategy in ("segqc", "random"):
        sample = fresh.next_sample(strategy, {})
        assert sample["id"] == worst
        assert sample["estimated_dice"] == pytest.approx(assessments[worst].dice)
        assert sample["worst_slices"] == list(assessments[worst].worst_slices())
        assert sample["strategy"] == "segqc"
        assert "note" not in sample
        assert Path(sample["path"]).is_file()
    label = server.client.download_label(worst, "original")
    read_labels(label, scan=read_scan(Path(sample["path"])), values=(1, 2))
    info = server.get(f"/datastore/label/info?label={worst}&tag=original").json()
    assert info["params"]["label_names"] == {"liver": 1, "spleen": 2}  # as clients count them


def test_inference_through_the_client(server: Server) -> None:
    scan = read_scan(server.folder / "scan_6.nii.gz")
    path, params = server.client.infer("segmentation", "scan_6", {"result_extension": ".nrrd"})
    assert read_labels(path, scan=scan, values=(1, 2)).shape == scan.shape
    assert params["label_names"] == {"liver": 1, "spleen": 2}
    path, params = server.client.infer("segqc", "scan_6", {"label_tag": "original"})
    read_labels(path, scan=scan, values=(1,))
    assert params["label_names"] == {"likely error (scribbles)": 1}
    assert params["assessed"] == "label"
    kept = Dataset(server.folder).assessment("scan_6")
    told = Assessment.from_json(requests.compat.json.dumps(params["assessment"]))
    assert kept is not None
    assert told.mask_sha256 == kept.mask_sha256
    assert told.dice == pytest.approx(kept.dice, abs=1e-4)


def test_a_correction_is_final_and_the_next_sample_another(server: Server, tmp_path: Path) -> None:
    first = server.client.next_sample("segqc", {})["id"]
    truth = draw_case(int(first.removeprefix("scan_")))[1]
    path = tmp_path / "corrected.nrrd"
    write_labels(Volume(np.where(truth.array == 4, 2, truth.array).astype(np.uint8), truth.affine), path)
    params = {"label_info": [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}]}
    told = server.client.save_label(first, str(path), params=params)
    assert (told["image"], told["label"]) == (first, first)
    assert told["correction"] == 1
    stored = read_labels(server.folder / "labels" / "final" / f"{first}.nii.gz")
    assert np.array_equal(stored.array, truth.array)
    assert server.client.next_sample("segqc", {})["id"] != first
    entry = server.client.datastore()["objects"][first]
    assert entry["labels"]["final"]["info"]["client_id"] == "annotator"


def test_sessions_and_files_of_the_clients_own(server: Server, tmp_path: Path) -> None:
    scan = server.folder / "scan_1.nii.gz"
    session = server.client.create_session(str(scan))["session_id"]
    assert server.client.get_session(session)["name"] == session
    path, _ = server.client.infer("segmentation", "", {}, session_id=session)
    read_labels(path, scan=read_scan(scan))
    path, _ = server.client.infer("segmentation", "", {}, file=str(scan))
    read_labels(path, scan=read_scan(scan))
    server.client.remove_session(session)
    with pytest.raises(MONAILabelClientException):
        server.client.get_session(session)


def test_what_cannot_be_read_is_a_finding_and_no_scan(server: Server) -> None:
    (server.folder / "damaged.nii.gz").write_bytes(b"no volume")
    server.wait(lambda: bool(server.client.info()["findings"]))
    assert server.client.info()["findings"][0]["file"] == "damaged.nii.gz"
    assert "damaged" not in server.client.datastore()["objects"]
    before = {p.name: p.stat().st_mtime_ns for p in (server.folder / "labels" / "original").iterdir()}
    assert server.post("/batch/infer/segmentation?images=unlabeled", json={}).status_code == 200
    server.wait(lambda: server.job_ended("batch/infer"))
    assert server.get("/batch/infer").json()["status"] == "DONE"
    after = {p.name: p.stat().st_mtime_ns for p in (server.folder / "labels" / "original").iterdir()}
    assert sum(after[name] != before.get(name) for name in after) == 2
    (server.folder / "damaged.nii.gz").unlink()
    server.wait(lambda: not server.client.info()["findings"])


def test_bad_requests_reach_the_client_as_sentences(server: Server) -> None:
    for call in (
        lambda: server.client.next_sample("unknown", {}),
        lambda: server.client.infer("unknown", "scan_1", {}),
        lambda: server.client.infer("segmentation", "/etc/passwd", {}),
        lambda: server.client.infer("segmentation", "scan_1", {"image": "/etc/passwd"}),
        lambda: server.client.train_start("unknown", {}),
        lambda: server.client.save_label("scan_1", str(server.log), tag="../../.."),
    ):
        with pytest.raises(MONAILabelClientException, match=r"Status: 4\d\d"):
            call()
    assert server.get("/proxy/dicom/%2e%2e/system").status_code == 404


def test_a_training_is_stopped(server: Server) -> None:
    assert not server.client.train_status(check_if_running=True)
    started = server.client.train_start("segmentation", {"max_epochs": 500})
    assert started["status"] in ("SUBMITTED", "RUNNING")
    assert server.client.train_status(check_if_running=True)
    with pytest.raises(MONAILabelClientException, match="429"):
        server.client.train_start("segmentation", {"max_epochs": 400})
    server.wait(lambda: bool(server.client.train_status()["details"]))
    assert server.client.train_stop()["status"] == "STOPPED"
    assert not server.client.train_status(check_if_running=True)
    assert server.client.train_status()["id"] == started["id"]


def test_the_end_waits_for_no_request_and_leaves_no_process_behind(server: Server) -> None:
    answers: list[int] = []

    def infer_for_hours() -> None:
        answer = server.post("/infer/slow", params={"image": "scan_7"}, data={"params": '{"seconds": 10000}'})
        answers.append(answer.status_code)

    stuck = threading.Thread(target=infer_for_hours)
    stuck.start()
    server.client.train_start("segmentation", {"max_epochs": 500})
    server.wait(lambda: bool(psutil.Process(server.process.pid).children()))
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=30) == 0
    stuck.join()
    assert answers == [503]
    assert "cut off" in server.log.read_text()
    assert "POST /infer/slow" in server.log.read_text()
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert "Traceback" not in server.log.read_text()
