"""Addresses as people and MONAI Label's clients write them, and answers that wait for a job."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from fastapi.testclient import TestClient
from monailabel.config import settings
from monailabel.interfaces.utils.app import app_instance, clear_cache

from segqc.loop.requests import KINDS
from segqc.server import waiting
from segqc.server.serve import default_app_dir
from segqc.store import jobs
from segqc.store.records import JobState
from segqc.store.store import Store
from tests.server_kit import add_models, make_dataset

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = make_dataset(tmp_path_factory.mktemp("addresses") / "studies", scans=4, finals=4)
    add_models(made)
    saved = settings.model_dump()
    settings.MONAI_LABEL_APP_DIR = str(default_app_dir())
    settings.MONAI_LABEL_STUDIES = str(made)
    settings.MONAI_LABEL_AUTO_UPDATE_SCORING = False
    settings.MONAI_LABEL_SESSION_PATH = str(made / "segqc" / "sessions")
    settings.MONAI_LABEL_APP_CONF = {"bootstrap": "false", "allowed_hosts": "segqc.example.org", "sign_in": "false"}
    yield made
    clear_cache()
    for name, value in saved.items():
        setattr(settings, name, value)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    from segqc.server.app import create_app

    with TestClient(create_app(), raise_server_exceptions=False, follow_redirects=False) as made:
        yield made


@pytest.mark.parametrize("path", ["/info", "/info/", "//info/", "//info//", "/datastore", "/datastore/", "//datastore/",
                                  "/batch/infer", "/batch/infer/", "/segqc/leases/", "/train", "/logs",
                                  "/datastore/image/?image=scan_0", "//datastore//label/?label=scan_0&tag=final",
                                  "/segqc/labels/scan_0/"])  # fmt: skip
def test_slashes_too_many_or_too_few_do_not_matter(client: TestClient, path: str) -> None:
    usual = {"/train": 404, "/batch": 404, "/logs": 404}  # no job was started, and no log is written
    wanted = next((status for start, status in usual.items() if path.replace("//", "/").startswith(start)), 200)
    answer = client.get(f"http://127.0.0.1{path}")
    assert answer.status_code == wanted
    if wanted == 404:
        assert "there is nothing at" not in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/nothing", "/nothing/", "/info/x", "/review", "/review/", "/train/segmentation"])
def test_an_address_without_a_route_says_so(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code in (404, 405)
    assert answer.json()["detail"]


def test_hosts_of_the_settings_are_answered(client: TestClient) -> None:
    for host, status in (("segqc.example.org:8000", 200), ("evil.example", 421)):
        assert client.get("/info/", headers={"host": host}).status_code == status


def test_head_tells_whether_a_scan_is_there_and_the_same(client: TestClient, folder: Path) -> None:
    content = (folder / "scan_0.nii.gz").read_bytes()
    for kind in ("sha256", "sha512", "md5"):
        right = f"{kind.upper()}:{hashlib.new(kind, content).hexdigest()}"
        for check_sum, status in ((right, 200), (right[:-1] + "x", 404)):
            query = {"image": "scan_0", "check_sum": check_sum}
            assert client.head("/datastore/image", params=query).status_code == status
    bare = hashlib.sha256(content).hexdigest()
    assert client.head("/datastore/image", params={"image": "scan_0", "check_sum": bare}).status_code == 200
    assert client.head("/datastore/image?image=scan_0").status_code == 200
    assert client.head("/datastore/image?image=unknown").status_code == 404
    assert client.head("/datastore/image?image=scan_0&check_sum=FOO:1").status_code == 400


@pytest.mark.parametrize("name", ["image", "label"])  # MONAI Label's server has the first, its GET the second
def test_head_tells_whether_a_label_is_there(client: TestClient, name: str) -> None:
    assert client.head(f"/datastore/label?{name}=scan_0&tag=final").status_code == 200
    assert client.head(f"/datastore/label?{name}=scan_0&tag=original").status_code == 404
    assert client.head(f"/datastore/label?{name}=unknown&tag=final").status_code == 404


# ---------------------------------------------------------------------------------------------------- waiting for jobs


def store() -> Store:
    found: Store = app_instance().context.dataset.store
    return found


@pytest.fixture
def worker(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobState]:
    """A worker that does nothing but say that its jobs are done."""
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.01)
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(0.01):
            with store().write() as transaction:
                job = jobs.claim(transaction, "test", KINDS)
            if job is not None:
                with store().write() as transaction:
                    jobs.finish(transaction, job.id, "test", "done", {"scores": {"dice": 0.5}})

    thread = threading.Thread(target=work)
    thread.start()
    yield "done"
    ended.set()
    thread.join()


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("path", ["/train/segmentation", "/scoring/segqc", "/batch/infer/segmentation"])
def test_run_sync_answers_with_the_finished_job(client: TestClient, path: str) -> None:
    answer = client.post(f"{path}?run_sync=true", json={}).json()
    assert (answer["status"], answer["result"]) == ("DONE", {"scores": {"dice": 0.5}})
    assert answer["end_ts"] >= answer["start_ts"]


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    ("path", "names"),
    [("/train", ["segmentation", "segqc"]), ("/scoring/", ["segqc", "tta", "entropy", "class-stratified"])],
)
def test_run_sync_waits_for_all_jobs(client: TestClient, path: str, names: list[str]) -> None:
    answer = client.post(f"{path}?run_sync=true", json={}).json()
    assert list(answer) == names
    assert {job["result"]["status"] for job in answer.values()} == {"DONE"}


def test_a_scoring_by_networks_that_are_not_there_is_refused(client: TestClient) -> None:
    answer = client.post("/scoring/ensemble", json={})
    assert answer.status_code == 409 and "holds no networks of the folds" in answer.json()["detail"]


def test_run_sync_without_a_worker_says_so_and_the_job_waits(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(waiting, "NO_WORKER_SECONDS", 0.05)
    answer = client.post("/scoring/tta?run_sync=true", json={})
    assert answer.status_code == 503
    assert "segqc worker" in answer.json()["detail"]
    with store().read() as transaction:
        assert [job.request["method"] for job in jobs.open_jobs(transaction, "scoring")] == ["tta"]
