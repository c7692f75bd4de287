"""The application in this process: every kind of bad request, and that none of them writes anything."""

from __future__ import annotations

import errno
import hashlib
import html
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from fastapi.testclient import TestClient
from monailabel.config import settings
from monailabel.interfaces.utils.app import app_instance, clear_cache
from monailabel.utils.others.generic import file_checksum
from sqlalchemy import update

from segqc.loop.dataset import Dataset
from segqc.loop.requests import RoundRequest, enqueue
from segqc.networks.card import NetworkName
from segqc.networks.model import ModelError
from segqc.server.serve import default_app_dir
from segqc.store import bundles, corrections, events, jobs, labels, leases
from segqc.store.database import Database, StoreDamaged, StoreUnavailable, Transaction
from segqc.store.events import SERVER
from segqc.store.schema import Bundle
from segqc.types import Assessment, Structure
from segqc.volumes import Volume, read_labels, read_scan, write_labels, write_scan
from tests.report_kit import good_card, worthless_card
from tests.server_kit import CONFIG, add_models, assess, draw_case, make_dataset, save_models

pytestmark = pytest.mark.server

LIMIT_MB = 3.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    plain = "validation_share = 0.0\n[annotation]\naudit_share = 0.0\nvalidation_share = 0.0\n"
    folder = make_dataset(tmp_path_factory.mktemp("server") / "studies", scans=4, finals=1, config=CONFIG + plain)
    saved = settings.model_dump()
    settings.MONAI_LABEL_APP_DIR = str(default_app_dir())
    settings.MONAI_LABEL_STUDIES = str(folder)
    settings.MONAI_LABEL_AUTO_UPDATE_SCORING = False
    settings.MONAI_LABEL_SESSION_PATH = str(folder / "segqc" / "sessions")
    settings.MONAI_LABEL_APP_CONF = {"bootstrap": "false", "upload_limit_mb": str(LIMIT_MB), "sign_in": "false"}
    yield folder
    clear_cache()
    for name, value in saved.items():
        setattr(settings, name, value)


@pytest.fixture(scope="module")
def client(base: Path) -> Iterator[TestClient]:
    from segqc.server.app import create_app

    with TestClient(create_app(), raise_server_exceptions=False) as made:
        yield made


@pytest.fixture
def models(base: Path) -> Iterator[None]:
    add_models(base)
    yield
    forget_models(base)


def forget_models(base: Path) -> None:
    """Let no bundle serve, and remove the files of all."""
    with Dataset(base).store.write() as transaction:
        transaction.execute(update(Bundle).values(serving=False))
    shutil.rmtree(Dataset(base).own / "models")


def studies_of(client: TestClient) -> Dataset:
    dataset: Dataset = app_instance().context.dataset
    return dataset


def files_below(folder: Path) -> dict[str, bytes]:
    """Everything at and beside the dataset folder; the list of who was handed what may change."""
    kept = (p for p in folder.parent.rglob("*") if p.is_file() and "store.sqlite" not in p.name)
    return {str(p): p.read_bytes() for p in sorted(kept)}


def volume_bytes(folder: Path, volume: Volume, suffix: str = ".nii.gz") -> bytes:
    path = folder / f"made{suffix}"
    (write_labels if volume.array.dtype == np.uint8 else write_scan)(volume, path)
    return path.read_bytes()


BAD_REQUESTS = [
    # method, path, arguments, status
    ("POST", "/activelearning/unknown", {"json": {}}, 404),
    ("POST", "/activelearning/segqc", {"content": "{", "headers": {"content-type": "application/json"}}, 422),
    ("POST", "/activelearning/segqc", {"json": {"strategy": "sequential"}}, 400),
    ("POST", "/infer/unknown?image=scan_1", {}, 404),
    ("POST", "/infer/segmentation?image=unknown", {}, 404),
    ("POST", "/infer/segmentation?image=/etc/passwd", {}, 404),
    ("POST", "/infer/segmentation?image=../studies/scan_1.nii.gz", {}, 404),
    ("POST", "/infer/segmentation", {}, 400),
    ("POST", "/infer/segmentation?image=scan_1", {"data": {"params": "{bad"}}, 400),
    ("POST", "/infer/segmentation?image=scan_1", {"data": {"params": "[1]"}}, 400),
    ("POST", "/infer/segmentation?image=scan_1", {"data": {"params": '{"image": "/etc/passwd"}'}}, 400),
    ("POST", "/infer/segmentation?image=scan_1", {"data": {"params": '{"model": "segqc"}'}}, 400),
    ("POST", "/infer/segqc?image=scan_1", {"data": {"params": '{"label": "/etc/passwd"}'}}, 400),
    ("POST", "/infer/segqc?image=scan_1", {"data": {"params": '{"label_tag": "../x"}'}}, 400),
    ("POST", "/infer/segmentation?image=scan_1&output=dicom_seg", {}, 400),
    ("POST", "/infer/segmentation?session_id=../../x", {}, 404),
    ("POST", "/infer/segmentation", {"files": {"file": ("x.sh", b"echo")}}, 415),
    ("POST", "/infer/wsi/segmentation?image=scan_1", {}, 404),
    ("POST", "/train/unknown", {"json": {}}, 404),
    ("POST", "/train/segmentation", {"json": {}}, 409),
    ("POST", "/train/segmentation", {"json": {"epochs": "many"}}, 400),
    *[
        ("POST", "/train/segmentation", {"json": {name: value}}, 400)
        for name, value in (
            ("epochs", -1),
            ("epochs", 0),
            ("max_epochs", 100_001),
            ("epochs", 2**60),
            ("batch", 0),
            ("batch", 10**6),
            ("learning_rate", 0),
            ("learning_rate", 1.5),
            ("seed", -1),
            ("seed", 2**40),
            ("steps_per_epoch", 0),
            ("size", "huge"),
            ("epochs", None),
            ("epochs", [1]),
            ("epoch", 3),
            ("fold_epochs", 2),
        )
    ],
    ("POST", "/train/segmentation", {"json": {"epochs": 10**30}}, 400),
    ("POST", "/train/segmentation", {"json": {"epochs": 3, "max_epochs": 3}}, 400),
    ("POST", "/train/", {"json": {"segmentatoin": {}}}, 400),
    ("POST", "/segqc/round", {"json": {"segqc": {"learning_rat": 1}}}, 400),
    ("POST", "/train/segmentation", {"json": {"bundle_path": "/tmp"}}, 400),
    ("POST", "/train/segmentation?run_sync=true", {"json": {}}, 409),
    ("POST", "/train/", {"json": {"segmentation": 7}}, 400),
    ("GET", "/train/", {}, 404),
    ("GET", "/train/?check_if_running=true", {}, 404),
    ("POST", "/scoring/unknown", {"json": {}}, 404),
    ("POST", "/scoring/segqc", {"json": {}}, 409),
    ("GET", "/scoring/", {}, 404),
    ("POST", "/batch/infer/unknown", {"json": {}}, 404),
    ("POST", "/batch/infer/segmentation?images=some", {"json": {}}, 422),
    ("POST", "/batch/infer/segmentation", {"json": {"label_tag": "final"}}, 400),
    ("POST", "/batch/infer/segmentation", {"json": {"label_tag": "pseudo-label"}}, 400),
    ("POST", "/batch/infer/segmentation", {"json": {"label_tag": "../../x"}}, 400),
    ("PUT", "/datastore/label?image=scan_1", {}, 422),
    ("PUT", "/datastore/label?image=unknown", {"files": {"label": ("x.nii.gz", b"x")}}, 404),
    ("PUT", "/datastore/label?image=scan_1", {"files": {"label": ("x.sh", b"x")}}, 415),
    ("PUT", "/datastore/label?image=scan_1", {"files": {"label": ("x.nii.gz", b"x")}}, 422),
    ("PUT", "/datastore/label?image=scan_1&tag=../../..", {"files": {"label": ("x.nii.gz", b"x")}}, 400),
    ("PUT", "/datastore/label?image=scan_1&tag=%2Ftmp", {"files": {"label": ("x.nii.gz", b"x")}}, 400),
    ("PUT", "/datastore/label?image=scan_1", {"files": {"label": ("x.nii.gz", b"x")}, "data": {"params": "{"}}, 400),
    ("PUT", "/datastore/image?image=../out", {"files": {"file": ("x.nii.gz", b"x")}}, 400),
    ("PUT", "/datastore/image", {"files": {"file": ("x.py", b"x")}}, 415),
    ("PUT", "/datastore/image?image=new", {"files": {"file": ("x.nii.gz", b"x")}}, 422),
    ("PUT", "/datastore/image?image=scan_1", {"files": {"file": ("x.nii.gz", b"x")}}, 422),
    ("PUT", "/datastore/?image=../out", {"files": {"file": ("x.nii.gz", b"x")}}, 400),
    ("DELETE", "/datastore/image?id=unknown", {}, 404),
    ("DELETE", "/datastore/image?id=..", {}, 404),
    ("DELETE", "/datastore/label?id=scan_1&tag=final", {}, 404),
    ("GET", "/datastore/image?image=unknown", {}, 404),
    ("GET", "/datastore/image?image=../studies/segqc.toml", {}, 404),
    ("GET", "/datastore/image/info?image=unknown", {}, 404),
    ("PUT", "/datastore/image/info?image=unknown", {"data": {"info": "{}"}}, 404),
    ("PUT", "/datastore/image/info?image=scan_1", {"data": {"info": "{"}}, 400),
    ("GET", "/datastore/label?label=scan_1&tag=..", {}, 404),
    ("PUT", "/datastore/label/info?label=scan_1&tag=none", {"data": {"info": "{}"}}, 404),
    ("GET", "/datastore/?output=everything", {}, 422),
    ("PUT", "/session/?uncompress=true", {"files": {"files": ("x.zip", b"x")}}, 400),
    ("PUT", "/session/", {"files": {"files": ("x.nii.gz", b"x")}}, 422),
    ("GET", "/session/unknown", {}, 404),
    ("DELETE", "/session/%2e%2e", {}, 404),
    ("GET", "/model/info/segmentation", {}, 404),
    ("PUT", "/model/unknown", {"files": {"file": ("x.pt", b"x")}}, 404),
    ("PUT", "/model/segmentation", {"files": {"file": ("x.pt", b"x")}}, 422),
    ("GET", "/proxy/dicom/%2e%2e/system", {}, 404),
    ("GET", "/proxy/dicom/wado/studies", {}, 404),
    ("GET", "/logs/", {}, 404),
]


@pytest.mark.parametrize(("method", "path", "arguments", "status"), BAD_REQUESTS)
def test_a_bad_request_is_refused_in_one_sentence_and_writes_nothing(
    client: TestClient, base: Path, method: str, path: str, arguments: dict[str, object], status: int
) -> None:
    before = files_below(base)
    response = client.request(method, path, **arguments)  # type: ignore[arg-type]
    assert response.status_code == status, response.text
    detail = response.json()["detail"]
    assert isinstance(detail, str)
    assert 10 < len(detail) < 400
    assert "Traceback" not in detail
    assert files_below(base) == before


@pytest.mark.parametrize("network", ["segmentation", "segqc"])
def test_inference_without_a_model_says_what_to_do(client: TestClient, network: str) -> None:
    response = client.post(f"/infer/{network}?image=scan_1")
    assert response.status_code == 409
    assert f"POST /train/{network}" in response.json()["detail"]


def test_whose_turn_does_not_come_is_told_so_while_others_are_answered(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segqc.server.app import ANNOTATION_SLOTS

    monkeypatch.setattr("segqc.server.routers.dependencies.TURN_SECONDS", 0.01)
    slots, others = client.app.state.annotation_slots, [object() for _ in range(ANNOTATION_SLOTS)]  # type: ignore[attr-defined]
    for other in others:
        client.portal.call(slots.acquire_on_behalf_of_nowait, other)  # type: ignore[union-attr]
    try:
        answer = client.post("/activelearning/sequential", json={"client_id": "late"})
        assert answer.status_code == 503
        assert "too busy" in answer.json()["detail"]
        assert client.get("/info/").status_code == 200
    finally:
        for other in others:
            client.portal.call(slots.release_on_behalf_of, other)  # type: ignore[union-attr]
    assert client.post("/activelearning/unknown", json={"client_id": "late"}).status_code == 404, "its turn has come"


def test_info_names_labels_as_a_list_and_models_that_are_not_there_yet(client: TestClient) -> None:
    info = client.get("/info/").json()
    assert info["labels"] == ["liver", "spleen"]
    assert list(info["models"]) == ["segmentation", "segqc"]
    assert info["models"]["segmentation"]["labels"] == {"liver": 1, "spleen": 2}
    assert info["models"]["segqc"]["labels"] == {"likely error (scribbles)": 1}
    assert next(iter(info["strategies"])) == "segqc"
    others = {"expected-gain", "tta", "unlikeness", "foreground-random", "sequential", "uniform-random", "random"}
    assert others <= set(info["strategies"])
    assert list(info["trainers"]) == ["segmentation", "segqc"]
    assert set(info["scoring"]) == {"segqc", "tta", "entropy", "ensemble", "class-stratified"}
    assert (info["rounds"]["after_corrections"], info["rounds"]["at"], info["rounds"]["stopped"]) == (0, None, None)
    assert info["rounds"]["message"].startswith("Nobody can tell yet whether more rounds are worth it")


@pytest.mark.parametrize("worthless", [False, True])
def test_info_tells_what_the_estimates_are_worth(client: TestClient, base: Path, worthless: bool) -> None:
    assert client.get("/info/").json()["report_card"] is None
    add_models(base, report=worthless_card() if worthless else good_card())
    card = client.get("/info/").json()["report_card"]
    forget_models(base)
    assert (card["order"], card["worst"]["patients"]) == (
        "not better than chance" if worthless else "better than chance", 30,
    )  # fmt: skip
    assert ("Ordered at random" in card["messages"][1]) is worthless
    assert "scans" not in card, "no patient is named to clients"


def test_next_sample_keeps_the_strategys_words(client: TestClient, base: Path) -> None:
    first = client.post("/activelearning/segqc", json={"client_id": "first"}).json()
    assert first["strategy"] == "uniform-random"
    assert "uniformly at random" in first["note"]
    dataset = Dataset(base)
    for name, dice in (("scan_0", 0.1), ("scan_1", 0.8), ("scan_2", 0.4), ("scan_3", 0.6)):
        assess(dataset, name, dice, half_width=0.1 if name == "scan_2" else None)
    by_dice = [name for name in ("scan_2", "scan_3", "scan_1") if name != first["id"]]  # scan_0 has a final label
    for strategy, name in zip(("segqc", "random"), by_dice, strict=True):
        answer = client.post(f"/activelearning/{strategy}", json={"client_id": f"me, for {strategy}"}).json()
        assert (answer["id"], answer["strategy"], answer["requested_strategy"]) == (name, "segqc", strategy)
        assert answer["estimated_dice"] == pytest.approx({"scan_1": 0.8, "scan_2": 0.4, "scan_3": 0.6}[name])
        assert answer["worst_slices"][0] == 2
        assert {box["slice"] for box in answer["boxes"]} <= set(answer["worst_slices"])
        between = ", 0.30-0.50" if name == "scan_2" else ""
        assert answer["name"] == f"{name} (estimated Dice {answer['estimated_dice']:.2f}{between}).nii.gz"
        assert Path(answer["path"]).is_file()
    assert client.post("/activelearning/segqc", json={"client_id": "one too many"}).json() == {}
    assert {lease["to"] for lease in client.get("/segqc/leases").json()} == {"first", "me, for segqc", "me, for random"}
    events = client.get(f"/segqc/events/{by_dice[0]}").json()
    assert ("handed out", "me, for segqc") in [(e["verb"], e["actor"]["name"]) for e in events]


def test_a_browser_is_known_again_by_its_cookie(client: TestClient) -> None:
    with studies_of(client).store.write() as transaction:
        for i in range(4):
            leases.release(transaction, f"scan_{i}", SERVER)
    first = client.post("/activelearning/random")
    cookie = first.cookies["segqc_client"]
    assert cookie
    assert client.post("/activelearning/random").json()["id"] == first.json()["id"]
    (lease,) = [lease for lease in client.get("/segqc/leases").json() if lease["scan"] == first.json()["id"]]
    assert re.fullmatch("browser-[0-9a-f]{8}", lease["to"])
    shown = client.get("/segqc/leases").text + client.get(f"/segqc/events/{lease['scan']}").text + client.get("/").text
    assert lease["to"] in shown
    assert cookie[:8] not in shown, "who knows the cookie can pass for this browser"
    client.cookies.clear()
    assert client.post("/activelearning/random").json()["id"] != first.json()["id"]


@pytest.mark.parametrize("opened", [{"opened_slices": [99]}, {"opened_structures": ["kidney"]}])
def test_what_was_opened_is_checked_though_nothing_was_handed_out(
    client: TestClient, tmp_path: Path, opened: dict[str, object]
) -> None:
    content = volume_bytes(tmp_path, draw_case(0)[1])
    params = {"client_id": "somebody who was handed nothing", **opened}
    for tag in ("final", "draft"):
        answer = client.put(
            f"/datastore/label?image=scan_0&tag={tag}",
            data={"params": json.dumps(params)},
            files={"label": ("m.nii.gz", content)},
        )
        assert answer.status_code == 400
        assert "opened" in answer.json()["detail"]


def test_an_annotator_is_told_what_was_recorded_and_a_reviewer_sends_it_back(
    client: TestClient, base: Path, tmp_path: Path
) -> None:
    dataset = studies_of(client)
    with dataset.store.write() as transaction:
        for i in range(4):
            leases.release(transaction, f"scan_{i}", SERVER)
    for i in range(1, 4):
        assess(dataset, f"scan_{i}", 0.5)
    sample = client.post("/activelearning/segqc", json={"client_id": "anna"}).json()
    scan = sample["id"]
    content = volume_bytes(tmp_path, draw_case(int(scan[-1]))[1])

    def submit(**params: object) -> httpx.Response:
        return client.put(
            f"/datastore/label?image={scan}",
            data={"params": json.dumps({"client_id": "anna", **params})},
            files={"label": ("m.nii.gz", content)},
        )

    assert submit(opened_slices=["all"]).status_code == 400
    assert submit(opened_slices=[99]).status_code == 400
    assert submit(opened_structures=["kidney"]).status_code == 400
    told = submit(opened_slices=[2, 3]).json()
    with dataset.store.read() as transaction:
        (correction,) = corrections.listing(transaction, scan)
    assert told["correction"] == correction.id
    assert correction.lease is not None
    assert (correction.lease.id, correction.from_version) == (sample["lease"], sample["label_version"])
    assert correction.change.opened_slices == (2, 3)
    assert len(correction.change.structures[0].slices) == 2
    review = f"/segqc/review/{scan}"
    assert client.post(review, json={"decision": "shred"}).status_code == 400
    assert client.post(review, json={"decision": "reject"}).status_code == 409
    rejected = client.post(review, json={"decision": "reject", "reason": "a gap", "client_id": "berta"})
    assert rejected.json() == {"scan": scan, "state": "rejected", "reason": "a gap"}
    assert client.post(review, json={"decision": "approve"}).status_code == 409
    assert client.get(f"/datastore/label?label={scan}&tag=final").status_code == 404
    assert client.get(f"/datastore/label?label={scan}&tag=returned").content
    restored = client.post(f"/segqc/labels/{scan}/restore?version={told['version']}&client_id=berta").json()
    assert (restored["parent"], restored["tag"]) == (told["version"], "final")
    assert client.post(f"/segqc/labels/{scan}/restore?version=999").status_code == 404
    assert client.get("/segqc/labels/nobody").status_code == 404
    assert client.post(review, json={"decision": "approve", "client_id": "berta"}).json()["state"] == "approved"
    actor = {e["verb"]: e["actor"]["name"] for e in client.get(f"/segqc/events/{scan}").json()}
    assert (actor["corrected"], actor["rejected"], actor["approved"]) == ("anna", "berta", "berta")
    assert client.post(review, json={"decision": "reopen"}).json()["state"] == "unlabelled"
    for i in range(4):
        for tag in ("original", "returned"):
            client.delete(f"/datastore/label?id=scan_{i}&tag={tag}")


@pytest.mark.usefixtures("models")
def test_segmentation_answers_in_the_format_asked_for(client: TestClient, base: Path, tmp_path: Path) -> None:
    scan = read_scan(base / "scan_1.nii.gz")
    for suffix in (".nrrd", ".nii.gz", ".nii"):
        params = {"result_extension": suffix, "result_dtype": "uint8", "result_compress": False}
        response = client.post("/infer/segmentation?image=scan_1&output=image", data={"params": json.dumps(params)})
        assert response.status_code == 200, response.text
        path = tmp_path / f"answer{suffix}"
        path.write_bytes(response.content)
        assert read_labels(path, scan=scan, values=(1, 2)).shape == scan.shape
        if suffix == ".nrrd":
            assert b"encoding: raw" in response.content[:2000]
    response = client.post("/infer/segmentation?image=scan_1", data={"params": '{"result_extension": ".exe"}'})
    assert response.status_code == 400


@pytest.mark.usefixtures("models")
def test_a_full_gpu_is_told_and_is_no_fault_of_the_request(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("segqc.networks.backends.Backend.__call__", full)
    for network in ("segmentation", "segqc"):
        answer = client.post(f"/infer/{network}?image=scan_1", data={"params": "{}"})
        assert answer.status_code == 503
        assert "end other programs on it" in answer.json()["detail"]


@pytest.mark.usefixtures("models")
def test_segqc_assesses_the_label_with_the_tag_or_a_new_mask(client: TestClient, base: Path, tmp_path: Path) -> None:
    answer = client.post("/infer/segqc?image=scan_0&output=json", data={"params": '{"label_tag": "final"}'}).json()
    assert (answer["assessed"], answer["label_tag"]) == ("label", "final")
    stored = client.get("/segqc/labels/scan_0").json()
    assert answer["label_sha256"] == next(v["sha256"] for v in stored if v["id"] == answer["label_version"])
    current = client.post("/infer/segqc?image=scan_0&output=json").json()
    assert current["label_version"] == answer["label_version"], "the final label is the current one"
    missing = client.post("/infer/segqc?image=scan_0", data={"params": '{"label_tag": "reader-1"}'})
    assert (missing.status_code, "final" in missing.json()["detail"]) == (404, True)
    assessment = Assessment.from_json(json.dumps(answer["assessment"]))
    assert (assessment.scan, assessment.mask_kind) == ("scan_0", "strange")
    assert answer["unlike_training"] is None, "these networks compare with nothing"
    assert answer["estimated_dice_interval"] is None, "not enough data: these networks never met a validating patient"
    assert [q.name for q in assessment.structures] == ["liver", "spleen"]
    truth = read_labels(base / "labels" / "final" / "scan_0.nii.gz")
    volume_ml = (truth.array == 1).sum() * truth.voxel_volume_mm3 / 1000
    assert assessment.structures[0].mask_volume_ml == pytest.approx(volume_ml)
    answer = client.post("/infer/segqc?image=scan_1&output=json").json()
    assert (answer["assessed"], answer["label_tag"]) == ("segmentation", None)
    assert answer["assessment"]["mask_kind"] == "served"
    made_by = json.dumps({"label_made_by": answer["assessment"]["segmenter_version"]})
    uploaded = volume_bytes(tmp_path, draw_case(1)[1])
    for params in ("{}", made_by):  # a client cannot say so
        files = {"label": ("m.nii.gz", uploaded)}
        answer = client.post("/infer/segqc?image=scan_1&output=json", files=files, data={"params": params}).json()
        assert (answer["assessed"], answer["assessment"]["mask_kind"]) == ("label", "strange")
    image = client.post("/infer/segqc?image=scan_1&output=image").content
    (tmp_path / "errors.nii.gz").write_bytes(image)
    read_labels(tmp_path / "errors.nii.gz", scan=read_scan(base / "scan_1.nii.gz"), values=(1,))


@pytest.mark.usefixtures("models")
def test_likely_errors_never_take_the_masks_place(client: TestClient, base: Path) -> None:
    masks = base / "labels"
    saved = client.post("/infer/segmentation?image=scan_1&output=json", data={"params": '{"save_label": true}'})
    assert saved.status_code == 200
    mask = (masks / "original" / "scan_1.nii.gz").read_bytes()
    stored = client.post("/infer/segqc?image=scan_1&output=json").json()
    assert (stored["assessed"], stored["assessment"]["mask_kind"]) == ("label", "served"), "of the network, if stored"
    for params in ({"save_label": True}, {"save_label": True, "label_tag": "original"}):
        assert client.post("/infer/segqc?image=scan_1", data={"params": json.dumps(params)}).status_code == 200
    assert (masks / "original" / "scan_1.nii.gz").read_bytes() == mask
    assert (masks / "likely-errors" / "scan_1.nii.gz").is_file()
    for tag in ("final", "returned", "reader-1", "proposal", "pseudo-label", "likely-errors", "attention-check"):
        wanted = {"save_label": True, "label_tag": tag}
        assert client.post("/infer/segmentation?image=scan_1", data={"params": json.dumps(wanted)}).status_code == 400
        assert client.post("/batch/infer/segmentation", json={"label_tag": tag}).status_code == 400
    assert not (masks / "final" / "scan_1.nii.gz").exists()


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("network", ["segmentation", "segqc"])
def test_an_uploaded_model_is_a_bundle_that_serves_and_the_pool_is_scored_by_it(
    client: TestClient, base: Path, network: NetworkName
) -> None:
    context, store = app_instance().context, studies_of(client).store
    before, first = context.bundle(network), context.model(network)
    assert context.model(network) is first, "loaded once"
    with store.write() as transaction:
        for job in jobs.open_jobs(transaction, "scoring"):
            jobs.stop(transaction, job.id, SERVER)
    content = before.path(network).read_bytes()
    answer = client.put(f"/model/{network}?client_id=anna", files={"file": ("m.pt", content)})
    assert answer.status_code == 200
    after = context.bundle(network)
    assert after.number == before.number + 1 == answer.json()["bundle"]
    assert answer.json()["checksum"] == f"SHA256:{hashlib.sha256(content).hexdigest()}"
    assert context.model(network) is not first
    assert {n: e.version for n, e in after.manifest.networks.items()} == {
        n: e.version for n, e in before.manifest.networks.items()
    }
    with store.read() as transaction:
        published = bundles.serving(transaction)
        assert published is not None
        assert (published.bundle.id, published.parent, published.reason) == (after.number, before.number, "upload")
        assert published.actor.kind == "person"
        told = events.history(transaction, "bundle", after.number)
        assert [e.verb for e in told] == ["published", "served", "chosen"], "an upload is a choice by hand"
        assert {e.actor for e in told} == {published.actor}
        assert [job.request for job in jobs.open_jobs(transaction, "scoring")] == [{"method": "segqc"}]
    assert client.get(f"/model/{network}").content == content


@pytest.mark.usefixtures("models")
def test_a_model_of_another_kind_and_a_removal_are_refused(client: TestClient, base: Path) -> None:
    context = app_instance().context
    before = context.bundle("segqc")
    content = before.path("segmentation").read_bytes()
    answer = client.put("/model/segqc", files={"file": ("m.pt", content)})
    assert answer.status_code == 422
    assert "the uploaded file is no segqc model: is a segmentation model" in answer.json()["detail"]
    assert client.delete("/model/segqc").status_code == 409
    assert context.bundle("segqc") is before
    assert not list((context.dataset.own / "incoming").glob("model-*"))


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("network", ["segmentation", "segqc"])
def test_a_model_of_other_structures_is_refused_beside_the_one_that_serves(
    client: TestClient, base: Path, tmp_path: Path, network: NetworkName
) -> None:
    bundle = app_instance().context.bundle(network)
    content = save_models(tmp_path, (Structure("kidney", (2,)),))[network].read_bytes()
    answer = client.put(f"/model/{network}", files={"file": ("m.pt", content)})
    assert answer.status_code == 409
    assert f"{network} knows kidney [2]" in answer.json()["detail"]
    assert app_instance().context.bundle(network) is bundle


def _empty(path: Path) -> None:
    path.unlink()
    path.touch()


def _text(path: Path) -> None:
    path.unlink()
    path.write_text("to be trained")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1000])


def _pickle(path: Path) -> None:
    path.unlink()
    torch.save({"epoch": 3, "state_dict": {}}, path)


def _arbitrary_pickle(path: Path) -> None:
    path.unlink()
    path.write_bytes(pickle.dumps(SystemExit("run")))


def _dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.pt")


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _other_kind(path: Path) -> None:
    other = {"segmentation.pt": "segqc.pt", "segqc.pt": "segmentation.pt"}[path.name]
    path.unlink()
    path.write_bytes(path.with_name(other).read_bytes())


JUNK = {
    "empty": _empty,
    "text": _text,
    "folder": _folder,
    "truncated": _truncate,
    "another program's": _pickle,
    "any pickle": _arbitrary_pickle,
    "dangling link": _dangle,
    "link to itself": _loop,
    "pipe": _pipe,
    "other kind": _other_kind,
}


@pytest.mark.parametrize("network", ["segmentation", "segqc"])
@pytest.mark.parametrize("junk", list(JUNK))
def test_whatever_lies_in_the_place_of_a_model_is_named(
    client: TestClient, base: Path, network: NetworkName, junk: str
) -> None:
    add_models(base)
    path = Dataset(base).model_path(network)
    assert path is not None
    content = path.read_bytes()
    try:
        JUNK[junk](path)
        answer = client.get("/info/")
        assert answer.status_code == 200
        assert str(path) in answer.json()["train_stats"][network]["problem"]
        assert not answer.json()["models"][network]["trained"]
        answer = client.post(f"/infer/{network}?image=scan_1")
        assert answer.status_code == 409
        assert str(path) in answer.json()["detail"]
        dataset = Dataset(base)
        with pytest.raises(ModelError, match=re.escape(str(path))):
            dataset.segmenter() if network == "segmentation" else dataset.assessor()
        assert client.get(f"/model/{network}").status_code in (200, 404)
        assert client.put(f"/model/{network}", files={"file": ("m.pt", content)}).status_code == 200
        told = client.get("/info/").json()
        assert "problem" not in told["train_stats"][network], "an upload makes a new bundle"
        assert told["models"]["segmentation"]["trained"], "with the other network"
        assert told["models"]["segqc"]["trained"]
    finally:
        forget_models(base)


def _no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def _file_for_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"junk")


def _no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _junk_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_bytes(b"{")


def _other_bundle(folder: Path) -> None:
    """A folder of another dataset under this number."""
    manifest = folder / "manifest.json"
    content = manifest.read_bytes().replace(b"a test", b"another")
    manifest.unlink()
    manifest.write_bytes(content)


@pytest.mark.parametrize("spoil", [_no_folder, _file_for_folder, _no_manifest, _junk_manifest, _other_bundle])
def test_whatever_lies_in_the_place_of_a_bundle_is_named(
    client: TestClient, base: Path, spoil: Callable[[Path], None]
) -> None:
    folder = Dataset(base).own / "models" / str(add_models(base))
    try:
        spoil(folder)
        answer = client.get("/info/")
        assert answer.status_code == 200
        for network in ("segmentation", "segqc"):
            assert str(folder) in answer.json()["train_stats"][network]["problem"]
            inference = client.post(f"/infer/{network}?image=scan_1")
            assert inference.status_code == 409
            assert "segqc models serve" in inference.json()["detail"]
            assert client.get(f"/model/{network}").status_code == 404
    finally:
        forget_models(base)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), NotADirectoryError(20, "Not a directory")])
def test_a_model_that_cannot_be_seen_is_named(
    client: TestClient, base: Path, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Dataset(base).own / "models" / str(add_models(base))
    stat = Path.stat

    def refuse(self: Path, **options: Any) -> os.stat_result:
        if self.parent == folder:
            raise error
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    try:
        answer = client.get("/info/")
        assert answer.status_code == 200
        for stats in answer.json()["train_stats"].values():
            assert f"manifest.json: cannot be read ({str(error.strerror).lower()})" in stats["problem"]
        assert client.post("/infer/segqc?image=scan_1").status_code == 409
        with pytest.raises(ModelError, match="cannot be read"):
            Dataset(base).segmenter()
    finally:
        monkeypatch.undo()
        forget_models(base)


@pytest.mark.usefixtures("models")
def test_kept_content_that_is_gone_or_damaged_is_the_servers_fault(client: TestClient, base: Path) -> None:
    store = studies_of(client).store
    with store.read() as transaction:
        label = labels.current(transaction, "scan_0", "final")
    assert label is not None
    kept = store.label_file(label)
    content = kept.read_bytes()
    asked = [
        ("GET", "/datastore/label?label=scan_0&tag=final"),
        ("GET", "/datastore/dataset"),
        ("POST", "/infer/segqc?image=scan_0&label_tag=final"),
        ("GET", "/scans/scan_0"),
    ]
    kept.chmod(0o644)
    try:
        for damaged, paths in ((content[:-9], asked[2:]), (None, asked)):
            kept.unlink()
            if damaged is not None:
                kept.write_bytes(damaged)
            for method, path in paths:
                answer = client.request(method, path)
                assert answer.status_code == 500, (path, answer.text)
                assert f"label version {label.id} of the scan 'scan_0'" in html.unescape(answer.text)
                assert str(base) not in answer.text
    finally:
        kept.write_bytes(content)
    assert client.get(asked[0][1]).status_code == 200


@pytest.mark.parametrize("lost", [StoreUnavailable, StoreDamaged])
def test_info_is_told_without_the_database(
    client: TestClient, lost: type[StoreUnavailable], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = client.get("/info/").json()

    def refuse(*_: object) -> Transaction:
        raise lost("the database is away")

    with monkeypatch.context() as patched:
        patched.setattr(Database, "read", refuse)
        patched.setattr(Database, "write", refuse)
        answer = client.get("/info/")
        assert answer.status_code == 200
        told = answer.json()
        assert told.pop("problem").startswith("the database is away")
        assert told == before
        monkeypatch.setattr(app_instance(), "_last_info", {"name": "SegQC"})  # what the very first client would be told
        assert client.get("/info/").json()["name"] == "SegQC"
        assert client.get("/datastore/").status_code == 503
    assert "problem" not in client.get("/info/").json()


def test_a_submitted_label_is_final_and_checked(client: TestClient, base: Path, tmp_path: Path) -> None:
    labels = draw_case(2)[1]
    shown = np.where(labels.array == 1, 2, np.where(labels.array == 4, 3, 0)).astype(np.uint8)
    content = volume_bytes(tmp_path, Volume(shown, labels.affine), ".nrrd")
    params = {
        "label_info": [{"name": "likely error (scribbles)"}, {"name": "liver"}, {"name": "spleen"}],
        "client_id": "me",
    }
    response = client.put(
        "/datastore/label?image=scan_2", data={"params": json.dumps(params)}, files={"label": ("/x/y.nrrd", content)}
    )
    assert (response.json()["image"], response.json()["label"]) == ("scan_2", "scan_2")
    version = client.get("/segqc/labels/scan_2").json()[-1]
    assert (version["id"], version["actor"]["name"]) == (response.json()["version"], "me")
    stored = read_labels(base / "labels" / "final" / "scan_2.nii.gz")
    assert np.array_equal(stored.array, labels.array)
    assert client.get("/datastore/label/info?label=scan_2&tag=final").json()["client_id"] == "me"
    assert client.get("/info/").json()["datastore"]["completed"] == 2
    foreign = volume_bytes(tmp_path, Volume(np.full(labels.shape, 9, np.uint8), labels.affine))
    refused = client.put("/datastore/label?image=scan_2", files={"label": ("m.nii.gz", foreign)})
    assert refused.status_code == 422
    assert client.delete("/datastore/label?id=scan_2&tag=final").status_code == 200
    assert client.get("/info/").json()["datastore"]["completed"] == 1


@pytest.mark.parametrize(
    ("problem", "status", "messages"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 507, "disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), 503, "Read-only file system"),
        (StoreUnavailable("the database does not answer"), 503, "does not answer"),
    ],
)
def test_what_the_server_cannot_do_is_its_own_fault_and_changes_nothing(
    client: TestClient, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    problem: Exception, status: int, messages: str,
) -> None:  # fmt: skip
    before = files_below(base)

    def fail(*_: object, **__: object) -> None:
        raise problem

    monkeypatch.setattr(studies_of(client).store, "change_labels", fail)
    content = volume_bytes(tmp_path, draw_case(1)[1])
    response = client.put("/datastore/label?image=scan_1", files={"label": ("m.nii.gz", content)})
    assert response.status_code == status
    assert messages in response.json()["detail"]
    assert files_below(base) == before


def test_a_round_is_put_and_stands_in_the_queue(client: TestClient) -> None:
    assert client.get("/segqc/round").status_code == 404
    assert client.post("/segqc/round", json={"segmentation": {"epochs": -1}}).status_code == 400
    assert client.post("/segqc/round", json={}).status_code == 409, "one label is too few"
    with studies_of(client).store.write() as transaction:
        number = jobs.enqueue(transaction, "round", {}, SERVER, reason="by the settings: a test").id
    waiting = client.get("/segqc/round").json()
    assert (waiting["status"], waiting["reason"]) == ("SUBMITTED", "by the settings: a test")
    with studies_of(client).store.write() as transaction:
        jobs.stop(transaction, number, SERVER)
    assert client.get("/segqc/round").json()["status"] == "STOPPED"


def test_info_tells_what_runs_and_when_rounds_begin_by_the_settings_of_now(client: TestClient, base: Path) -> None:
    assert "round" not in [job["kind"] for job in client.get("/info/").json()["jobs"]]
    file = base / "segqc.toml"
    before = file.read_text()
    store = Dataset(base).store
    with store.write() as transaction:
        job = enqueue(transaction, RoundRequest(), SERVER, reason="by the settings: 3 corrections since round 1")
        jobs.claim(transaction, "w1", ["round"])
        jobs.heartbeat(transaction, job.id, "w1", messages=["round: train segqc"], steps=(1, 4))
    try:
        file.write_text(f"{before}\n[round]\nafter_corrections = 3\n")
        info = client.get("/info/").json()
        (running,) = [job for job in info["jobs"] if job["kind"] == "round"]
        assert (running["kind"], running["title"], running["status"]) == ("round", "the round", "RUNNING")
        assert (running["progress"], running["message"]) == ([1, 4], "round: train segqc")
        assert (running["id"], running["reason"]) == (job.public_id, "by the settings: 3 corrections since round 1")
        assert info["rounds"]["after_corrections"] == 3
        assert "problem" not in info
        file.write_text(f"{before}\n[round]\nafter_corrections = \n")
        info = client.get("/info/").json()
        assert info["problem"].startswith(f"{file}: not a TOML file")
        assert info["rounds"]["after_corrections"] == 0
    finally:
        file.write_text(before)
        with store.write() as transaction:
            jobs.finish(transaction, job.id, "w1", "done")


def test_a_skipped_scan_is_explained_and_had_back(client: TestClient) -> None:
    with studies_of(client).store.write() as transaction:
        for i in range(4):
            leases.release(transaction, f"scan_{i}", SERVER)
    actor = {"client_id": "carla"}
    first = client.post("/activelearning/sequential", json=actor).json()
    second = client.post("/activelearning/sequential", json={**actor, "skip_reason": "blurred"}).json()
    assert second["skipped"]["scan"] == first["id"] != second["id"]
    route = f"/segqc/leases/{first['id']}"
    assert client.post(f"{route}/skip", json=actor).status_code == 400
    assert client.post(f"{route}/skip", json={**actor, "reason": "motion"}).json()["state"] == "skipped"
    told = client.get(f"/segqc/events/{first['id']}").json()
    assert [e["detail"]["reason"] for e in told if "reason" in (e["detail"] or {})][-2:] == ["blurred", "motion"]
    back = client.post(f"{route}/resume", json=actor).json()
    assert (back["id"], back["lease"]) == (first["id"], first["lease"])
    assert client.post(f"{route}/resume", json={"client_id": "nobody"}).status_code == 409
    assert client.post("/segqc/leases/unknown/resume", json=actor).status_code == 404
    assert client.post("/activelearning/sequential", json={**actor, "resume": ["scan_1"]}).status_code == 400


@pytest.fixture
def four_labelled(client: TestClient) -> Iterator[None]:
    """Enough labels to train; afterwards all jobs are stopped."""
    dataset = studies_of(client)
    cases = dataset.cases()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "cases", lambda _: cases * 4)
        yield
    with dataset.store.write() as transaction:
        for kind in ("train", "scoring", "round"):
            for job in jobs.open_jobs(transaction, kind):
                jobs.stop(transaction, job.id, SERVER)


@pytest.mark.usefixtures("four_labelled")
def test_a_second_training_waits_for_the_first_and_the_same_one_is_joined(client: TestClient) -> None:
    first = client.post("/train/segmentation", json={"max_epochs": 7}).json()
    second = client.post("/train/segqc", json={}).json()
    assert second["id"] != first["id"]
    assert second["details"] == ["waits for the training of segmentation"]
    again = client.post("/train/segmentation", json={"max_epochs": 7, "client_id": "anna"}).json()
    assert (again["id"], "already" in again["note"]) == (first["id"], True)
    other = client.post("/train/segmentation", json={"max_epochs": 8})
    assert (other.status_code, first["id"] in other.json()["detail"]) == (429, True)
    assert client.post("/train/segmentation?enqueue=true", json={"max_epochs": 7}).json()["id"] != first["id"]
    everything = client.post("/train/", json={"segqc": {}, "segmentation": {"epochs": 7}}).json()
    assert everything["segqc"]["result"]["id"] == second["id"]
    a_round = client.post("/segqc/round", json={}).json()
    assert client.post("/segqc/round", json={}).json()["id"] == a_round["id"]


@pytest.mark.usefixtures("four_labelled")
def test_parameters_of_other_servers_are_ignored_with_a_note_and_unknown_ones_named(client: TestClient) -> None:
    monai_label = {
        "name": "train_01", "pretrained": True, "device": "cuda", "max_epochs": 5, "val_split": 0.2,
        "train_batch_size": 1, "multi_gpu": True, "dataset": "Dataset", "early_stop_patience": -1,
    }  # fmt: skip
    told = client.post("/train/segmentation", json=monai_label).json()
    assert told["request"] == {"model": "segmentation", "epochs": 5, "batch": 1}
    assert told["ignored"] == sorted(monai_label.keys() - {"max_epochs", "train_batch_size"})
    assert all(name in told["details"][0] for name in told["ignored"])
    refused = client.post("/train/segmentation", json={"max_epoch": 5}).json()["detail"]
    assert "'max_epoch'" in refused
    assert "max_epochs" in refused


def test_nothing_left_is_an_empty_answer(client: TestClient, base: Path, tmp_path: Path) -> None:
    names = ["scan_1", "scan_2", "scan_3"]
    for name in names:
        content = volume_bytes(tmp_path, draw_case(int(name[-1]))[1])
        client.put(f"/datastore/label?image={name}", files={"label": ("m.nii.gz", content)})
    for strategy in ("segqc", "random", "sequential", "uniform-random", "foreground-random", "tta"):
        response = client.post(f"/activelearning/{strategy}")
        assert (response.status_code, response.json()) == (200, {})
    for name in names:
        client.delete(f"/datastore/label?id={name}&tag=final")


def test_uploading_and_removing_a_scan(client: TestClient, base: Path, tmp_path: Path) -> None:
    content = volume_bytes(tmp_path, draw_case(9)[0])
    answer = client.put("/datastore/image", files={"file": ("scan.v1.2.nii.gz", content)}).json()
    assert answer == {"image": "scan.v1.2"}
    assert (base / "scan.v1.2.nii.gz").read_bytes() == content
    assert client.get("/datastore/image?image=scan.v1.2").content == content
    assert client.delete("/datastore/image?id=scan.v1.2").status_code == 200
    assert client.get("/datastore/image?image=scan.v1.2").status_code == 404
    assert (base / "scan.v1.2.nii.gz").read_bytes() == content, "excluded, not destroyed"


def test_too_large_a_body_is_refused_with_and_without_a_length(client: TestClient, base: Path) -> None:
    before = files_below(base)
    body = os.urandom(int(LIMIT_MB * 1.2e6))
    assert client.put("/datastore/image?image=new", files={"file": ("x.nii.gz", body)}).status_code == 413

    def chunks() -> Iterator[bytes]:
        source = io.BytesIO(
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.nii.gz"\r\n\r\n' + body + b"\r\n--b--\r\n"
        )
        while chunk := source.read(65536):
            yield chunk

    headers = {"content-type": "multipart/form-data; boundary=b"}
    response = client.put("/datastore/image?image=new", content=chunks(), headers=headers)
    assert response.status_code == 413
    assert files_below(base) == before


def test_pages_of_other_sites_are_refused(client: TestClient) -> None:
    foreign = client.get("/info/", headers={"origin": "http://evil.example"})
    assert foreign.status_code == 403
    assert "access-control-allow-origin" not in foreign.headers
    own = client.get("/info/", headers={"origin": "http://testserver"})
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers


def test_info_tells_what_was_not_taken_in(client: TestClient, base: Path) -> None:
    (base / "bad.nii").write_bytes(b"no scan")
    app_instance().datastore().refresh()
    (finding,) = client.get("/info/").json()["findings"]
    assert finding["file"] == "bad.nii"
    assert finding["message"].startswith("bad.nii: ")
    (base / "bad.nii").unlink()
    app_instance().datastore().refresh()
    assert client.get("/info/").json()["findings"] == []


def test_info_tells_of_copies_of_an_image(client: TestClient, base: Path) -> None:
    first = studies_of(client).scans()[0].image
    shutil.copy(first, base / "copy.nii.gz")
    app_instance().datastore().refresh()
    (remark,) = client.get("/info/").json()["remarks"]
    assert remark.startswith(f"copy.nii.gz, {first.name}: hold the same image")
    (base / "copy.nii.gz").unlink()
    app_instance().datastore().refresh()
    assert client.get("/info/").json()["remarks"] == []


@pytest.mark.parametrize("grid", ["the same", "another"])
def test_a_scan_that_is_replaced_while_it_is_handed_out(
    client: TestClient, base: Path, tmp_path: Path, grid: str
) -> None:
    write_scan(draw_case(5)[0], base / "turns.nii.gz")
    app_instance().datastore().refresh()
    seen = {}
    for _ in range(10):  # in the order of the names
        sample = client.post("/activelearning/sequential", json={"client_id": f"turn {len(seen)}"}).json()
        seen[sample.get("id", "")] = len(seen)
        if sample.get("id") in ("turns", None):
            break
    assert sample["id"] == "turns"
    assert sample["checksum"] == file_checksum(base / "turns.nii.gz")
    assert client.get("/datastore/image/info?image=turns").json()["checksum"] == sample["checksum"]
    other = draw_case(6)[0]
    write_scan(Volume(other.array[2:], other.affine) if grid == "another" else other, base / "turns.nii.gz")
    answer = client.put(
        "/datastore/label?image=turns",
        files={"label": ("l.nii.gz", volume_bytes(tmp_path, draw_case(5)[1]))},
        data={"params": json.dumps({"client_id": f"turn {seen['turns']}"})},
    )
    assert answer.status_code == 409
    told = answer.json()["detail"]
    assert re.search(
        r"'turns' was replaced by another one since it was handed out to you \(20..-..-.. ..:.. UTC\)", told
    )
    assert "drawn on the older one" in told and "ask for the scan again" in told
    again = client.post("/activelearning/sequential", json={"client_id": f"turn {seen['turns']}"}).json()
    assert again["id"] == "turns"
    assert again["checksum"] == file_checksum(base / "turns.nii.gz") != sample["checksum"]
    (base / "turns.nii.gz").unlink()
    app_instance().datastore().refresh()


@pytest.mark.parametrize("name", ["scan_1.nii.gz", "SCAN_1.NRRD", "scan_1.nii"])
def test_an_upload_never_takes_a_files_place(client: TestClient, base: Path, tmp_path: Path, name: str) -> None:
    suffix = name[len("scan_1") :].lower()
    before = files_below(base)
    content = volume_bytes(tmp_path, draw_case(6)[0], suffix)
    answer = client.put("/datastore/image", files={"file": (name, content)})
    assert answer.status_code == 409
    assert "'scan_1'" in answer.json()["detail"]
    assert files_below(base) == before


@pytest.mark.parametrize(
    ("method", "address", "fields"),
    [
        ("PUT", "/datastore/label?image=scan_1&image=scan_2", [("params", "{}")]),
        ("GET", "/datastore/label?label=scan_0&tag=final&tag=original", []),
        ("GET", "/scans/scan_0?slice=1&slice=2", []),
        ("PUT", "/datastore/label?image=scan_1", [("params", "{}"), ("params", '{"simulated": true}')]),
        ("POST", "/scans", [("scan", "scan_0"), ("scan", "scan_1"), ("decision", "approve"), ("decision", "exclude")]),
        ("PUT", "/datastore/label/info?label=scan_0&tag=final", [("info", "{}"), ("info", '{"a": 1}')]),
    ],
)
def test_a_field_with_two_values_is_no_guess(
    client: TestClient, method: str, address: str, fields: list[tuple[str, str]]
) -> None:
    parts: list[tuple[str, Any]] = [(name, (None, value)) for name, value in fields]
    if address.startswith("/datastore/label?image"):
        parts.append(("label", ("m.nii.gz", b"nobody reads it", "application/gzip")))
    answer = client.request(method, address, files=parts or None)
    assert (answer.status_code, "twice" in answer.json()["detail"]) == (400, True), answer.text


def test_a_field_that_is_said_twice_alike_is_one(client: TestClient) -> None:
    assert client.get("/datastore/label?label=scan_0&tag=final&tag=final").status_code == 200
