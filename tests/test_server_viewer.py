"""The routes of the viewer's panel: every voxel at its place both ways, conflicts, and what is shown of a scan."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from fastapi.testclient import TestClient

from segqc.loop.dataset import Dataset
from segqc.server.monailabel.facade import current_app
from segqc.store import corrections, labels, leases
from segqc.store.labels import NewLabel
from segqc.store.records import Actor
from segqc.types import LabelArray, Unlikeness
from segqc.volumes import Volume, read_labels, read_scan, slice_layout, temporary_labels, write_scan
from tests.server_kit import CONFIG, SHAPE, add_models, assess, draw_case, make_dataset, serving

pytestmark = pytest.mark.server

PLAIN = CONFIG + "\n[annotation]\naudit_share = 0.0\nvalidation_share = 0.0\n"
ANNA, BEN = {"client_id": "anna"}, {"client_id": "ben"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "scans", scans=3, finals=0, config=PLAIN)


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    with serving(folder) as made:
        yield made


def store_of(client: TestClient) -> Dataset:
    return current_app().context.dataset


def next_scan(client: TestClient, who: dict[str, str] = ANNA, **params: str) -> dict[str, Any]:
    answer = client.post("/segqc/viewer/next", json={**who, **params})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def viewed(client: TestClient, study: str, who: dict[str, str] = ANNA) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/segqc/viewer/scans/{study}", params=who).json()
    return found


def voxels_of(client: TestClient, shown: dict[str, Any], version: int) -> np.ndarray:
    content = client.get(f"/segqc/viewer/scans/{shown['study']}/labels/{version}").content
    return np.frombuffer(content, np.uint8).reshape(len(shown["instances"]), shown["rows"], shown["columns"]).copy()


def send(
    client: TestClient,
    shown: dict[str, Any],
    images: np.ndarray,
    started_from: int | None,
    *,
    order: list[int] | None = None,
    what: str = "label",
    packed: bool = True,
    **params: Any,
) -> httpx.Response:
    """Submit images in an order of the client's own."""
    order = list(range(len(images))) if order is None else order
    body = {
        "instances": [shown["instances"][i] for i in order],
        "started_from": started_from,
        **{"client_id": "anna", **params},
    }
    content = images[order].tobytes()
    file = (
        ("voxels", gzip.compress(content), "application/gzip") if packed else ("v", content, "application/octet-stream")
    )
    path = f"/segqc/viewer/scans/{shown['study']}/{what}"
    return client.post(path, data={"params": json.dumps(body)}, files={"voxels": file})


def kept(dataset: Dataset, version: int) -> LabelArray:
    with dataset.store.read() as transaction:
        label = labels.get(transaction, version)
    array: LabelArray = read_labels(dataset.store.label_file(label)).array
    return array


def keep_mask(dataset: Dataset, scan: str, case: int) -> int:
    """A mask of a scan that no network made."""
    person = Actor(kind="person", name="carl", identified_by="client-id")
    with temporary_labels(draw_case(case)[1]) as path:
        return dataset.store.save_label(NewLabel(scan, "original", "annotator", person), path).id


def test_the_next_scan_comes_with_its_mask_estimate_and_boxes(client: TestClient) -> None:
    dataset = store_of(client)
    assess(dataset, "scan_1", 0.6, worst=3, half_width=0.1)
    assess(dataset, "scan_0", 0.9)
    shown = next_scan(client)["scan"]
    assert shown["scan"] == "scan_1"
    assert [s["name"] for s in shown["segments"]] == ["liver", "spleen"]
    assert [s["value"] for s in shown["segments"]] == [1, 4]
    assert shown["lease"]["is_own"]
    estimate = shown["estimate"]
    assert estimate["dice"] == pytest.approx(0.6)
    assert estimate["interval"]["low"] == pytest.approx(0.5)
    assert estimate["version"] == shown["label"]["version"]
    assert estimate["worst_slices"][0] == shown["instances"][3]
    by_slice = {s["instance"]: s["error_ml"] for s in estimate["slices"]}
    assert by_slice[shown["instances"][3]] == pytest.approx(50 * 1.5 * 1.5 * 4 / 1000)
    box = estimate["boxes"][0]
    # columns run to the patient's left and rows to the back: both against this file's voxels
    assert box["instance"] == shown["instances"][3]
    assert box["columns"] == [SHAPE[0] - 9, SHAPE[0] - 3]
    assert box["rows"] == [SHAPE[1] - 12, SHAPE[1] - 4]
    images = voxels_of(client, shown, shown["label"]["version"])
    scan = read_scan(dataset.folder / "scan_1.nii.gz")
    np.testing.assert_array_equal(slice_layout(scan).from_images(images), draw_case(0)[1].array)


def test_the_scan_that_an_annotator_has_comes_again_until_it_is_submitted_or_skipped(client: TestClient) -> None:
    first = next_scan(client)["scan"]
    assert next_scan(client)["scan"]["scan"] == first["scan"]
    other = next_scan(client, BEN)["scan"]
    assert other["scan"] != first["scan"]
    answer = next_scan(client, skip_reason="too noisy")
    assert answer["scan"]["scan"] not in (first["scan"], other["scan"])
    with store_of(client).store.read() as transaction:
        assert list(leases.skip_reasons(transaction).values()) == ["too noisy"]
    empty = np.zeros((SHAPE[2], SHAPE[1], SHAPE[0]), np.uint8)
    assert send(client, answer["scan"], empty, None).status_code == 200
    assert next_scan(client)["scan"]["scan"] == first["scan"]  # nothing else is left


def test_nothing_is_left(client: TestClient) -> None:
    empty = np.zeros((SHAPE[2], SHAPE[1], SHAPE[0]), np.uint8)
    for _ in range(3):
        shown = next_scan(client)["scan"]
        assert shown["label"] is None
        assert shown["estimate"] is None
        assert not shown["has_networks"]
        assert send(client, shown, empty, None).status_code == 200
    note = "No scan is left for you: all are labelled, or others work on them."
    assert next_scan(client) == {"scan": None, "note": note}


def test_a_browser_is_one_annotator_by_its_cookie(folder: Path) -> None:
    with serving(folder) as client:
        shown = client.post("/segqc/viewer/next", json={}).json()["scan"]
        assert shown["lease"]["is_own"]
        again = client.get(f"/segqc/viewer/scans/{shown['study']}").json()
        assert again["lease"]["is_own"]
        assert again["lease"]["to"] is None
        client.cookies.clear()
        assert not client.get(f"/segqc/viewer/scans/{shown['study']}").json()["lease"]["is_own"]


@pytest.mark.parametrize(
    ("name", "dtype", "axes", "signs", "turn"),
    [
        ("a.nii.gz", np.int16, (0, 1, 2), (1, 1, 1), 0.0),
        ("a.nii", np.float32, (1, 0, 2), (-1, 1, -1), 0.3),
        ("a.nrrd", np.uint8, (2, 0, 1), (1, -1, 1), 0.5),
        ("a.nrrd", np.int32, (1, 2, 0), (-1, -1, -1), 0.2),
        ("a.nii.gz", np.uint16, (0, 2, 1), (1, 1, -1), 0.4),
    ],
)
def test_every_voxel_comes_and_goes_exactly(
    tmp_path: Path, name: str, dtype: type, axes: tuple[int, ...], signs: tuple[int, ...], turn: float
) -> None:
    """Oblique, flipped and permuted scans of all formats and types that the intake lets in."""
    folder = make_dataset(tmp_path / "scans", scans=0, finals=0, config=PLAIN)
    rng = np.random.default_rng(5)
    spacing = np.array([0.7, 0.8, 3.0])[np.argsort(axes)]
    cos, sin = np.cos(turn), np.sin(turn)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ np.eye(3)[:, axes] * signs * spacing
    affine[:3, 3] = -20, 30, 11
    shape = tuple(int(n) for n in np.array([9, 7, 5])[np.argsort(axes)])
    write_scan(Volume(rng.integers(0, 200, shape).astype(dtype), affine), folder / name)
    with serving(folder) as client:
        dataset = store_of(client)
        shown = next_scan(client)["scan"]
        file = dataset.folder / dataset.verify_scan(shown["scan"]).file
        mask = rng.choice(np.array([0, 1, 4], np.uint8), read_scan(file).shape)
        grid = read_scan(file)
        layout = slice_layout(grid)
        images = np.ascontiguousarray(layout.to_images(mask))
        order = rng.permutation(len(images)).tolist()
        answer = send(client, shown, images, None, order=order, packed=bool(len(name) % 2))
        assert answer.status_code == 200, answer.text
        version = answer.json()["version"]
        np.testing.assert_array_equal(kept(dataset, version), mask)
        np.testing.assert_array_equal(voxels_of(client, shown, version), images)
        with dataset.store.read() as transaction:
            label = labels.get(transaction, version)
        np.testing.assert_allclose(read_labels(dataset.store.label_file(label)).affine, grid.affine, atol=1e-4)


@pytest.mark.parametrize(
    ("axes", "signs"), list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))
)
def test_a_box_of_voxels_is_the_same_box_of_pixels(axes: tuple[int, ...], signs: tuple[int, ...]) -> None:
    spacing = np.array([0.7, 0.8, 3.0])[np.argsort(axes)]
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, axes] * signs * spacing
    volume = Volume(np.zeros((6, 7, 8), np.uint8), affine)
    layout = slice_layout(volume)
    first, second = sorted((layout.column_axis, layout.row_axis))
    chosen = [slice(None)] * 3
    chosen[first], chosen[second] = slice(1, 3), slice(2, 6)
    volume.array[tuple(chosen)] = 1
    columns, rows = layout.to_image_rectangle((1, 2), (3, 6), volume.shape)
    drawn = np.zeros_like(layout.to_images(volume.array))
    drawn[:, rows[0] : rows[1], columns[0] : columns[1]] = 1
    np.testing.assert_array_equal(drawn, layout.to_images(volume.array))


def test_a_submission_is_a_correction_of_what_was_handed_out(client: TestClient) -> None:
    dataset = store_of(client)
    assess(dataset, "scan_0", 0.6)
    shown = next_scan(client)["scan"]
    start = shown["label"]["version"]
    images = voxels_of(client, shown, start)
    images[4, 5:9, 6:11] = 4
    done = send(client, shown, images, start).json()
    assert done["tag"] == "final"
    with dataset.store.read() as transaction:
        (found,) = corrections.listing(transaction)
    assert (found.id, found.from_version, found.to_version) == (done["correction"], start, done["version"])
    assert found.change.slices_changed == 1
    again = viewed(client, shown["study"])
    assert again["state"] == "submitted"
    assert again["label"]["version"] == done["version"]
    assert again["label"]["is_own"]
    assert again["lease"] is None
    assert [v["version"] for v in again["history"]] == [done["version"], start]
    assert again["history"][0]["made_of"] == start
    # a client that missed the answer sends it again
    assert send(client, shown, images, start).json() == {**done, "correction": None}
    # and it can go on from its own version
    images[5] = 0
    further = send(client, shown, images, done["version"])
    assert further.status_code == 200
    assert further.json()["version"] > done["version"]


def test_what_a_reviewer_has_rejected_is_corrected_with_and_without_a_lease(client: TestClient) -> None:
    dataset = store_of(client)
    assess(dataset, "scan_0", 0.6)
    shown = next_scan(client)["scan"]
    start = shown["label"]["version"]
    images = voxels_of(client, shown, start)
    for handed_out in (False, True):
        images[4, 5:9] = 4 - images[4, 5]
        send(client, shown, images, viewed(client, shown["study"])["label"]["version"])
        answer = client.post(
            "/segqc/review/scan_0", json={"decision": "reject", "reason": "a gap", "client_id": "rita"}
        )
        assert answer.status_code == 200
        again = next_scan(client)["scan"] if handed_out else viewed(client, shown["study"])
        assert (again["scan"], again["state"], again["reason"]) == ("scan_0", "rejected", "a gap")
        assert (again["lease"] is not None) == handed_out
        returned = again["label"]["version"]
        np.testing.assert_array_equal(voxels_of(client, again, returned), images)
        images[5, 5:9] = 4 - images[5, 5]
        done = send(client, shown, images, returned).json()
        with dataset.store.read() as transaction:
            found = corrections.listing(transaction)[-1]
        assert (found.id, found.from_version, found.to_version) == (done["correction"], returned, done["version"])
        assert (found.change.slices_changed, found.lease is not None) == (1, handed_out)
        assert send(client, shown, images, returned).json() == {**done, "correction": None}, "sent again"


def test_two_tabs_on_one_scan_conflict_and_no_label_is_lost(client: TestClient) -> None:
    dataset = store_of(client)
    assess(dataset, "scan_0", 0.6)
    shown = next_scan(client)["scan"]
    start = shown["label"]["version"]
    one, other = voxels_of(client, shown, start), voxels_of(client, shown, start)
    one[2], other[3] = 1, 4
    first = send(client, shown, one, start).json()
    refused = send(client, shown, other, start)
    assert refused.status_code == 409
    assert f"version {first['version']} counts by now, made by you, perhaps in another tab" in refused.json()["detail"]
    assert send(client, shown, other, start, what="check").json()["conflict"] == refused.json()["detail"]
    beside = send(client, shown, other, start, beside=True).json()
    assert beside["tag"] == "version_1"
    np.testing.assert_array_equal(
        slice_layout(read_scan(dataset.folder / "scan_0.nii.gz")).to_images(kept(dataset, beside["version"])), other
    )
    again = viewed(client, shown["study"])
    assert again["label"]["version"] == first["version"]
    assert again["history"][0]["made_of"] == start
    assert send(client, shown, other, start, beside=True).json()["tag"] == "version_2"


@pytest.mark.parametrize("shape", [SHAPE, (SHAPE[0] - 2, *SHAPE[1:])])
@pytest.mark.parametrize("is_seen", [True, False], ids=["seen by the server", "not yet"])
def test_a_label_of_a_scan_that_was_replaced_meanwhile_is_refused_in_plain_words(
    client: TestClient, folder: Path, shape: tuple[int, ...], is_seen: bool
) -> None:
    shown = next_scan(client)["scan"]
    images = np.zeros((SHAPE[2], SHAPE[1], SHAPE[0]), np.uint8)
    other = draw_case(8)[0]
    write_scan(Volume(other.array[: shape[0]], other.affine), folder / f"{shown['scan']}.nii.gz")
    if is_seen:
        current_app().datastore.refresh()
    for what, who, since in (
        ("check", "anna", "it was handed out to you (20"),
        ("label", "anna", "it was handed out to you (20"),
        ("label", "ben", "you opened it"),
    ):
        refused = send(client, shown, images, None, what=what, client_id=who)
        assert refused.status_code == 404
        told = refused.json()["detail"]
        assert f"the scan {shown['scan']!r} was replaced by another one since {since}" in told
        assert "ask for the scan again" in told
    assert client.get(f"/segqc/viewer/scans/{shown['study']}").status_code == 404
    again = next_scan(client)["scan"]
    assert (again["scan"], again["study"] == shown["study"]) == (shown["scan"], False)
    assert send(client, again, np.zeros((SHAPE[2], SHAPE[1], shape[0]), np.uint8), None).status_code == 200


def test_a_scan_that_another_annotator_has_by_now_is_refused(client: TestClient) -> None:
    dataset = store_of(client)
    assess(dataset, "scan_0", 0.6)
    shown = next_scan(client)["scan"]
    start = shown["label"]["version"]
    images = voxels_of(client, shown, start)
    images[1] = 1
    next_scan(client, skip_reason="later")
    assert send(client, shown, images, start, what="check").json()["conflict"] is None  # nobody else has it
    assert next_scan(client, BEN)["scan"]["scan"] == "scan_0"
    refused = send(client, shown, images, start)
    assert refused.status_code == 409
    assert "is handed out to ben by now" in refused.json()["detail"]
    assert viewed(client, shown["study"])["lease"] | {"until": None} == {
        "is_own": False, "to": "ben", "until": None, "slices": None,
    }  # fmt: skip
    assert send(client, shown, images, start, beside=True).status_code == 200
    assert send(client, shown, images, start, client_id="ben").status_code == 200


def test_a_mask_that_was_made_anew_since_the_hand_out_is_no_conflict(client: TestClient) -> None:
    dataset = store_of(client)
    assess(dataset, "scan_0", 0.6)
    shown = next_scan(client)["scan"]
    start = shown["label"]["version"]
    keep_mask(dataset, "scan_0", 2)
    assert viewed(client, shown["study"])["label"]["version"] == start
    assert send(client, shown, voxels_of(client, shown, start), start).status_code == 200


def test_each_of_several_readers_has_a_label_of_their_own(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "scans", scans=1, finals=0, config=PLAIN + "readers = 2\n")
    with serving(folder) as client:
        shown = next_scan(client)["scan"]
        assert next_scan(client, BEN)["scan"]["scan"] == shown["scan"]
        images = np.zeros((SHAPE[2], SHAPE[1], SHAPE[0]), np.uint8)
        images[2] = 1
        assert send(client, shown, images, None).json()["tag"] == "reader-1"
        images[3] = 1
        assert send(client, shown, images, None, client_id="ben").json()["tag"] == "reader-2"
        own = viewed(client, shown["study"])["label"]
        refused = send(client, shown, images, own["version"])
        assert refused.status_code == 409
        assert "your reading of 'scan_0' is kept already" in refused.json()["detail"]


def test_the_check_says_what_would_change_and_keeps_nothing(client: TestClient) -> None:
    dataset = store_of(client)
    assess(dataset, "scan_0", 0.6)
    shown = next_scan(client)["scan"]
    start = shown["label"]["version"]
    images = voxels_of(client, shown, start)
    assert send(client, shown, images, start, what="check").json()["warnings"] == ["Nothing was changed."]
    count = int((images == 4).sum())
    images[images == 4] = 0
    told = send(client, shown, images, start, what="check").json()
    assert told["voxels_changed"] == count
    assert told["warnings"] == ["spleen is empty now, and was not before."]
    by_name = {s["name"]: s for s in told["structures"]}
    assert by_name["spleen"]["voxels_changed"] == count
    assert by_name["liver"]["voxels_changed"] == 0
    assert by_name["liver"]["dice"] == 1.0
    told = send(client, shown, images * 0, start, what="check").json()
    assert told["warnings"] == ["The label map is empty: no structure has a voxel."]
    assert len(viewed(client, shown["study"])["history"]) == 1


def test_a_label_map_that_cannot_be_is_refused_and_nothing_is_kept(client: TestClient) -> None:
    shown = next_scan(client)["scan"]
    images = np.zeros((SHAPE[2], SHAPE[1], SHAPE[0]), np.uint8)
    foreign = images.copy()
    foreign[0, 0, 0] = 7
    assert "holds the value 7" in send(client, shown, foreign, None).json()["detail"]
    short = send(client, shown, images, None, order=list(range(SHAPE[2] - 1)))
    twice = send(client, shown, images, None, order=[0, *range(SHAPE[2] - 1)])
    small = send(client, shown, images[:, 1:], None)
    large = send(client, shown, np.zeros((SHAPE[2], 4000, 4000), np.uint8), None)  # small as it is sent
    strange = send(client, {**shown, "instances": ["1.2.3"] * SHAPE[2]}, images, None)
    for answer in (short, twice, small, large, strange):
        assert answer.status_code == 422, answer.text
    assert "fewer" in small.json()["detail"]
    assert "more" in large.json()["detail"]
    path = f"/segqc/viewer/scans/{shown['study']}/label"
    params = {"instances": shown["instances"], "started_from": None}
    file = {"voxels": ("voxels", b"\x1f\x8b no gzip", "application/gzip")}
    assert "damaged" in client.post(path, data={"params": json.dumps(params)}, files=file).json()["detail"]
    for wrong in ({"instances": 3, "started_from": None}, {"instances": []}, {**params, "started_from": "a"}):
        assert client.post(path, data={"params": json.dumps(wrong)}, files=file).status_code in (400, 422)
    assert send(client, shown, images, 99).status_code == 404
    assert client.get("/segqc/viewer/scans/2.25.1").status_code == 404
    assert client.get(f"/segqc/viewer/scans/{shown['study']}/labels/99").status_code == 404
    assert viewed(client, shown["study"])["history"] == []


def test_an_earlier_version_is_restored(client: TestClient) -> None:
    shown = next_scan(client)["scan"]
    images = np.zeros((SHAPE[2], SHAPE[1], SHAPE[0]), np.uint8)
    images[1] = 1
    first = send(client, shown, images, None).json()["version"]
    second = send(client, shown, images * 4, first).json()["version"]
    restored = client.post(f"/segqc/labels/{shown['scan']}/restore", params={"version": first, **ANNA}).json()["id"]
    again = viewed(client, shown["study"])
    assert again["label"]["version"] == restored
    assert [(v["version"], v["source"], v["is_current"]) for v in again["history"]] == [
        (restored, "restored", True),
        (second, "annotator", False),
        (first, "annotator", False),
    ]
    np.testing.assert_array_equal(voxels_of(client, again, restored), images)
    assert send(client, shown, images * 4, second).status_code == 409


def test_voxels_are_compressed_where_that_is_accepted(client: TestClient) -> None:
    assess(store_of(client), "scan_0", 0.6)
    shown = next_scan(client)["scan"]
    path = f"/segqc/viewer/scans/{shown['study']}/labels/{shown['label']['version']}"
    plain, packed = (client.get(path, headers={"Accept-Encoding": coding}) for coding in ("identity", "gzip"))
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) < len(plain.content) / 5
    assert packed.content == plain.content
    assert "immutable" in plain.headers["cache-control"]


def test_the_error_map_lies_where_the_scan_lies(folder: Path) -> None:
    add_models(folder)
    with serving(folder) as client:
        dataset = store_of(client)
        label = keep_mask(dataset, "scan_0", 0)
        study = client.get("/segqc/dicomweb/scan_0").json()["study"]
        shown = viewed(client, study)
        assert shown["has_networks"]
        answer = client.get(f"/segqc/viewer/scans/{study}/errors/{label}")
        assert "no-store" in answer.headers["cache-control"], "another bundle has another map of the same version"
        content = answer.content
        images = np.frombuffer(content, np.uint8).reshape(SHAPE[2], SHAPE[1], SHAPE[0])
        bundle = dataset.bundle()
        assert bundle is not None
        scan = read_scan(dataset.folder / "scan_0.nii.gz")
        expected = bundle.assessor().error_maps(scan, draw_case(0)[1]).max(axis=0)
        found = slice_layout(scan).from_images(images).astype(float) / 255
        np.testing.assert_allclose(found, expected, atol=0.5 / 255 + 1e-3)


def test_without_networks_there_is_no_error_map(client: TestClient) -> None:
    keep_mask(store_of(client), "scan_0", 0)
    study = client.get("/segqc/dicomweb/scan_0").json()["study"]
    shown = viewed(client, study)
    answer = client.get(f"/segqc/viewer/scans/{study}/errors/{shown['label']['version']}")
    assert answer.status_code == 409
    assert "not trained yet" in answer.json()["detail"]


def test_a_scan_that_is_unlike_the_training_says_so(client: TestClient) -> None:
    assess(store_of(client), "scan_0", 0.6, half_width=0.1, unlikeness=Unlikeness(4.0, 0.02))
    shown = next_scan(client)["scan"]
    assert shown["estimate"]["interval"] is None
    assert shown["warnings"] == ["This scan is unlike the training scans: interval does not apply."]


def test_only_some_slices_are_asked_for(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "scans", scans=1, finals=0, config=PLAIN + "slices = 2\n")
    with serving(folder) as client:
        assess(store_of(client), "scan_0", 0.6, worst=3)
        shown = next_scan(client)["scan"]
        assert shown["lease"]["slices"] == [shown["instances"][3], shown["instances"][9]]
