"""What clients are told of the check of a submission, by HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from fastapi.testclient import TestClient
from monailabel.client import MONAILabelClient

from segqc.loop.scoring import assess_scan
from segqc.server import checks as server_checks
from segqc.server.monailabel.facade import current_app
from segqc.store import labels
from segqc.store.labels import NewLabel
from segqc.store.records import Actor
from segqc.volumes import Volume, read_labels, temporary_labels, write_labels
from tests.server_kit import (
    CHECKED,
    add_models,
    draw_case,
    knowing_the_truth,
    listening,
    make_dataset,
    serving,
    without_liver,
)

pytestmark = pytest.mark.server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "scans", scans=3, finals=0, config=CHECKED)


@pytest.fixture
def client(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    add_models(folder, people=True)
    knowing_the_truth(monkeypatch)
    with serving(folder) as made:
        yield made


def put(client: TestClient, path: Path, label: Volume, **query: str) -> dict[str, Any]:
    write_labels(label, path)
    with path.open("rb") as file:
        params = {"image": "scan_0", "client_id": "anna", **query}
        answer = client.put("/datastore/label", params=params, files={"label": ("label.nii.gz", file)})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def until_done(client: TestClient, version: int) -> dict[str, Any]:
    while True:
        body: dict[str, Any] = client.get("/segqc/labels/scan_0/check", params={"version": version}).json()
        if body["state"] != "running":
            return body


def test_monai_labels_client_is_told_what_was_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_models(folder, people=True)
    knowing_the_truth(monkeypatch)
    monkeypatch.setattr(server_checks, "WAIT_SECONDS", 60.0)
    write_labels(without_liver(), tmp_path / "label.nii.gz")
    with listening(folder) as url:
        client = MONAILabelClient(url, tmpdir=str(tmp_path), client_id="anna")
        answer = client.save_label(
            "scan_0", str(tmp_path / "label.nii.gz"), params={"label_names": {"liver": 1, "spleen": 4}}
        )
    assert next(iter(answer)) == "check", "3D Slicer shows the beginning of the answer"
    check = answer["check"]
    assert check["sentence"] == "Look again at slices 4 and 5: part of the liver seems to be missing."
    assert check["errors"] == [{"structure": "liver", "kind": "part missing", "slices": [4, 5]}]
    assert {b["slice"] for b in check["boxes"]} == {4, 5}
    assert 0 < check["estimated_dice"] < 1
    assert check["estimated_dice_by_structure"].keys() == {"liver", "spleen"}
    assert check["estimated_dice_interval_by_structure"] == {"liver": None, "spleen": None}
    assert check["version"] == answer["version"]


def test_what_is_right_is_told_so(client: TestClient, tmp_path: Path) -> None:
    version = put(client, tmp_path / "label.nii.gz", draw_case(0)[1])["version"]
    assert until_done(client, version)["sentence"] == "Nothing found."


def test_a_check_that_takes_long_is_made_in_the_background(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going = threading.Event()
    check = server_checks.check_label
    monkeypatch.setattr(server_checks, "check_label", lambda *args: going.wait() and check(*args))
    monkeypatch.setattr(server_checks, "WAIT_SECONDS", 0.1)
    answer = put(client, tmp_path / "label.nii.gz", without_liver())
    assert answer["check"] == {"sentence": "The label is being checked.", "state": "running"}
    assert client.get("/segqc/labels/scan_0/check", params={"version": answer["version"]}).json()["state"] == "running"
    going.set()
    found = until_done(client, answer["version"])
    assert found["sentence"].startswith("Look again at slices 4 and 5")
    # it is kept: asked again, nothing is computed
    monkeypatch.setattr(server_checks, "check_label", None)
    assert until_done(client, answer["version"]) == found


def test_a_check_that_fails_lets_the_submission_be(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(server_checks, "check_label", fails)
    answer = put(client, tmp_path / "label.nii.gz", without_liver())
    assert answer["check"]["state"] == "none"
    assert answer["check"]["sentence"] == "Not checked: it failed; the server's log tells why."
    with current_app().context.dataset.store.read() as transaction:
        assert labels.get(transaction, answer["version"]).tag == "final"


@pytest.mark.parametrize(
    ("people", "config", "why"),
    [
        (None, "", "SegQC-Net is not trained yet"),
        (False, "", "was not trained to judge people's masks"),
        (True, "check_submissions = false\n", "the settings want no check"),
    ],
)
def test_why_nothing_is_checked(folder: Path, tmp_path: Path, people: bool | None, config: str, why: str) -> None:
    settings = folder / "segqc.toml"
    settings.write_text(settings.read_text() + config)
    if people is not None:
        add_models(folder, people=people)
    with serving(folder) as client:
        version = put(client, tmp_path / "label.nii.gz", without_liver())["version"]
        found = until_done(client, version)
    assert found["state"] == "none"
    assert found.keys() == {"state", "sentence"}
    assert why in found["sentence"]


def test_a_version_that_is_none_is_not_checked(client: TestClient, tmp_path: Path) -> None:
    version = put(client, tmp_path / "label.nii.gz", without_liver())["version"]
    for scan, number in (("scan_0", version + 1), ("scan_1", version)):
        answer = client.get(f"/segqc/labels/{scan}/check", params={"version": number})
        assert answer.status_code == 404
        assert "no label version" in answer.json()["detail"]


def test_a_network_s_mask_that_is_submitted_unchanged_is_estimated_as_before(
    client: TestClient, tmp_path: Path
) -> None:
    app = current_app()
    dataset, bundle = app.context.dataset, app.context.bundle("segqc")
    assess_scan(dataset, dataset.scan("scan_0"), bundle)
    sample = client.post("/activelearning/segqc", json={"client_id": "anna"}).json()
    assert sample["id"] == "scan_0"
    mask = dataset.mask("scan_0")
    assert mask is not None
    served = read_labels(dataset.store.label_file(mask))
    unchanged = put(client, tmp_path / "label.nii.gz", served)["version"]
    shown = client.post("/infer/segqc", params={"image": "scan_0", "label_tag": "original", "output": "json"}).json()
    check = until_done(client, unchanged)
    assert check["estimated_dice"] == pytest.approx(shown["estimated_dice"])
    # a second time nothing is handed out any more: it is made of the first one
    again = put(client, tmp_path / "again.nii.gz", without_liver())["version"]
    with dataset.store.read() as transaction:
        assert [labels.get(transaction, version).parent for version in (unchanged, again)] == [mask.id, unchanged]
    final = client.post("/infer/segqc", params={"image": "scan_0", "output": "json"}).json()
    assert final["label_version"] == again and final["assessment"]["mask_kind"] == "person"
    assert final["estimated_dice"] == pytest.approx(until_done(client, again)["estimated_dice"])


@pytest.mark.parametrize("source", ["person", "network"])
def test_a_stored_label_is_assessed_as_whoever_made_it_is(client: TestClient, tmp_path: Path, source: str) -> None:
    if source == "person":
        put(client, tmp_path / "label.nii.gz", without_liver())
    else:
        dataset = current_app().context.dataset
        network = Actor(kind="network", name="another", identified_by="program")
        with temporary_labels(without_liver()) as path:
            dataset.store.save_label(NewLabel("scan_0", "original", "import", network), path)
    answer = client.post("/infer/segqc", params={"image": "scan_0", "output": "json"})
    assert answer.json()["assessment"]["mask_kind"] == {"person": "person", "network": "strange"}[source]
