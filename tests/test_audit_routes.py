"""The audit by its routes and on its page: what reviewers see and do, and what is refused."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from fastapi.testclient import TestClient
from PIL import Image

from segqc.loop import error_maps
from segqc.loop.audit import audit
from segqc.loop.dataset import Dataset
from segqc.progress import NO_PROGRESS
from segqc.store import jobs, label_verdicts, labels
from segqc.store.label_verdicts import LabelVerdict
from segqc.store.labels import FINAL
from segqc.store.records import LabelRecord
from segqc.volumes import write_labels
from tests.audit_kit import add_fold_models
from tests.auth_kit import PASSWORD, ROLES, add_users, quick_hashes
from tests.server_kit import SHAPE, application, draw_case, make_assessment, make_dataset, serving

if TYPE_CHECKING:
    from httpx import Response

HTML = {"Accept": "text/html,application/xhtml+xml"}
SEEN = (("scan_1", "scan_2"), ("scan_0", "scan_2"))


def final_of(dataset: Dataset, scan: str) -> LabelRecord:
    with dataset.store.read() as transaction:
        found = labels.current(transaction, scan, FINAL)
    assert found is not None
    return found


def judge(dataset: Dataset, scan: str, dice: float, number: int) -> None:
    """Keep a verdict with a given estimate and an error map."""
    label = final_of(dataset, scan)
    verdict = LabelVerdict(assessment=make_assessment(scan, dice, half_width=0.05), networks=1)
    with dataset.store.write() as transaction:
        label_verdicts.write(transaction, label.id, number, verdict)
    error_maps.write(dataset, label.id, number, np.full((2, *SHAPE), 90, np.uint8), "audit-maps")


@pytest.fixture(scope="module")
def judged_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five final labels of six scans, of which three are judged."""
    path = make_dataset(tmp_path_factory.mktemp("judged") / "data", scans=6, finals=5)
    number = add_fold_models(path, SEEN)
    made = Dataset(path)
    for i, dice in enumerate((0.71, 0.42, 0.93)):
        judge(made, f"scan_{i}", dice, number)
    made.store.close()
    return path


@pytest.fixture
def dataset(judged_folder: Path, tmp_path: Path) -> Iterator[Dataset]:
    """A copy of it to write into."""
    found = Dataset(shutil.copytree(judged_folder, tmp_path / "data"))
    yield found
    found.store.close()


@pytest.fixture
def client(dataset: Dataset) -> Iterator[TestClient]:
    with serving(dataset.folder) as found:
        yield found


def names_of(page: str) -> list[str]:
    return re.findall(r"data-row>([^<]+)</a>", page)


def page_of(client: TestClient, address: str = "/audit") -> str:
    answer = client.get(address, headers=HTML)
    assert answer.status_code == 200, answer.text
    return answer.text


def told(answer: Response) -> str:
    assert answer.status_code == 200, answer.text
    return re.sub(r"<[^>]+>", "", "".join(re.findall(r'<p class="notice.*?</p>', answer.text, re.DOTALL)))


def is_open(dataset: Dataset) -> bool:
    with dataset.store.read() as transaction:
        return bool(jobs.open_jobs(transaction, "audit"))


# ------------------------------------------------------------------------------------------------------------- routes


def test_the_labels_are_told_of_worst_first(client: TestClient) -> None:
    answer = client.get("/segqc/audit").json()
    assert [label["scan"] for label in answer["labels"]] == ["scan_1", "scan_0", "scan_2"]
    assert (answer["bundle"], answer["total"], answer["not_judged"]) == (1, 3, 2)
    first = answer["labels"][0]
    assert first["estimated_dice"] == 0.42 and first["slices"] == [2, 0] and first["made_by"] == "folder"
    interval = first["structures"][0]["interval"]
    assert interval == {"low": pytest.approx(0.37), "high": pytest.approx(0.47), "level": 0.9}
    assert first["errors"][0]["structure"] == "liver" and first["message"].startswith("Look again at slice")
    assert [label["scan"] for label in client.get("/segqc/audit?start=1&limit=1").json()["labels"]] == ["scan_0"]
    assert client.get("/segqc/audit?view=not judged").json()["total"] == 2


def test_a_label_is_marked_and_the_mark_is_taken_back(client: TestClient, dataset: Dataset) -> None:
    version = final_of(dataset, "scan_1").id
    answer = client.post("/segqc/audit/scan_1?client_id=anna", json={"version": version})
    assert answer.status_code == 200 and answer.json()["right"]["by"] == "anna"
    assert [label["scan"] for label in client.get("/segqc/audit?view=right").json()["labels"]] == ["scan_1"]
    assert client.post("/segqc/audit/scan_1", json={"version": version, "right": False}).json()["right"] is None


@pytest.mark.parametrize(
    ("scan", "body", "status"),
    [
        ("scan_1", {"version": 999}, 409), ("scan_5", {"version": 1}, 409), ("nobody", {"version": 1}, 404),
        ("scan_1", {}, 400), ("scan_1", {"version": "x"}, 400), ("scan_1", {"version": 0}, 400),
    ],
)  # fmt: skip
def test_marks_that_cannot_be_are_refused(client: TestClient, scan: str, body: dict[str, object], status: int) -> None:
    assert client.post(f"/segqc/audit/{scan}", json=body).status_code == status


def test_the_judgement_is_a_job(client: TestClient, dataset: Dataset) -> None:
    assert client.get("/segqc/audit/job").status_code == 404
    put = client.post("/segqc/audit").json()
    assert put["status"] == "SUBMITTED" and is_open(dataset)
    assert client.post("/segqc/audit").json()["id"] == put["id"], "the open one is joined"
    assert client.post("/segqc/audit", json={"force": True}).json()["id"] != put["id"], "that is other work"
    assert client.get("/segqc/audit/job").json()["status"] == "SUBMITTED"


def test_without_a_network_for_people_s_masks_nothing_is_put(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data", scans=2, finals=1)
    with serving(path) as client:
        assert client.post("/segqc/audit").status_code == 409
        page = page_of(client)
        assert "Labels cannot be judged: an audit of labels needs a SegQC network" in page
        assert "Judge all labels" in page and "disabled>Judge all labels" in page
        assert "needs a SegQC network" in told(client.post("/audit", headers=HTML))


# ----------------------------------------------------------------------------------------------------------- the page


def test_the_page_shows_the_worst_label_first_with_what_seems_wrong(client: TestClient) -> None:
    page = page_of(client)
    assert names_of(page) == ["scan_1", "scan_0", "scan_2"]
    assert "3 of 5 final labels are judged by bundle 1, which serves" in page
    assert "0.37\N{EN DASH}0.47" in page and "liver, the worst structure" in page
    assert "Look again at slice" in page and 'href="/ohif/segqc?' in page
    assert "Nothing is judged by itself" in page
    assert names_of(page_of(client, "/audit?view=not judged")) == ["scan_3", "scan_4"]
    assert names_of(page_of(client, "/audit?view=all")) == ["scan_1", "scan_0", "scan_2", "scan_3", "scan_4"]
    assert "No label is marked right" in page_of(client, "/audit?view=right")
    assert page_of(client, "/audit?page=2")


@pytest.mark.parametrize("query", ["view=none", "page=0"])
def test_a_list_that_there_is_not_is_refused(client: TestClient, query: str) -> None:
    assert client.get(f"/audit?{query}", headers=HTML).status_code == 422


def test_pictures_show_contour_heat_and_boxes(client: TestClient, dataset: Dataset) -> None:
    version = final_of(dataset, "scan_1").id
    address = f"/audit/scan_1/picture?version={version}&bundle=1"
    answer = client.get(address)
    assert answer.headers["content-type"] == "image/webp" and "immutable" in answer.headers["cache-control"]
    drawn = np.asarray(Image.open(io.BytesIO(answer.content)), np.int32)
    error_maps.path_of(dataset, version, 1, "audit-maps").unlink()
    plain = client.get(address)
    assert "immutable" not in plain.headers["cache-control"], "its heat may come back"
    without = np.asarray(Image.open(io.BytesIO(plain.content)), np.int32)
    assert without.shape != drawn.shape or (drawn[..., 0] - without[..., 0]).mean() > 5, "the heat is red"
    assert client.get("/audit/scan_4/picture").status_code == 200, "a label that is not judged has a contour"
    assert client.get("/audit/scan_5/picture").status_code == 404
    assert client.get("/audit/nobody/picture").status_code == 404


def test_right_and_take_back_are_buttons(client: TestClient, dataset: Dataset) -> None:
    version = final_of(dataset, "scan_1").id
    form = {"version": version, "back": "/audit?view=all"}
    answer = client.post("/audit/scan_1", data=form, headers=HTML)
    assert answer.url.query == b"view=all" and "The label of scan_1 is marked right" in told(answer)
    assert names_of(page_of(client)) == ["scan_0", "scan_2"]
    assert "Take back" in page_of(client, "/audit?view=right")
    write_labels(draw_case(3)[1], dataset.folder / "labels" / "final" / "scan_1.nii.gz")
    dataset.sync()
    assert names_of(page_of(client, "/audit?view=right")) == [], "another version has no mark"
    answer = client.post("/audit/scan_1", data=form, headers=HTML)
    assert "by now, not" in told(answer), "what was looked at is no longer there"
    answer = client.post("/audit/scan_0", data={**form, "version": final_of(dataset, "scan_0").id, "back": "//evil"})
    assert answer.url.path == "/audit"


def test_the_button_puts_a_job_and_the_page_says_so(client: TestClient, dataset: Dataset) -> None:
    assert "a worker begins it" in told(client.post("/audit", headers=HTML))
    assert is_open(dataset)
    page = page_of(client)
    assert "The labels are being judged" in page and "disabled>Judge all labels" in page
    assert "data-goes-on" in page_of(client, "/audit/now")
    audit(dataset, NO_PROGRESS)
    with dataset.store.write() as transaction:
        jobs.stop(transaction, jobs.open_jobs(transaction, "audit")[0].id, final_of(dataset, "scan_0").actor)
    assert "data-reload-pictures" in page_of(client, "/audit/now")
    assert "5 of 5 final labels are judged" in page_of(client)


def test_the_list_is_a_table_to_download(client: TestClient) -> None:
    answer = client.get("/audit.csv?view=open")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["scan"] for row in rows] == ["scan_1", "scan_0", "scan_2"]
    assert rows[0]["slices"] == "2 0" and rows[0]["structure"] == "liver" and float(rows[0]["low"]) > 0.3
    assert len(list(csv.DictReader(io.StringIO(client.get("/audit.csv").text)))) == 5


def test_an_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    with serving(make_dataset(tmp_path / "data", scans=1, finals=0)) as client:
        assert "No final labels yet" in page_of(client)


def test_a_folder_that_is_not_judged_says_who_begins_it(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data", scans=2, finals=1)
    add_fold_models(path, SEEN)
    with serving(path) as client:
        page = page_of(client)
        assert "No label is judged yet" in page and 'class="primary">Judge all labels' in page


def test_roles(dataset: Dataset) -> None:
    add_users(dataset.store)
    seen: dict[str, tuple[int, bool, bool]] = {}
    with quick_hashes(), application(dataset.folder, sign_in=True) as app, TestClient(app, headers=HTML) as client:
        for name in ROLES:
            client.cookies.clear()
            client.post("/auth/sign-in", data={"username": name, "password": PASSWORD})
            answer = client.get("/audit")
            seen[name] = answer.status_code, ">Audit</a>" in client.get("/").text, "Judge all labels" in answer.text
    assert seen == {"anna": (403, False, False), "rita": (200, True, False), "otto": (200, True, True)}
