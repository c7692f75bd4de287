"""Attention checks towards clients: the viewer's panel, MONAI Label's own client, and the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from fastapi.testclient import TestClient
from monailabel.client import MONAILabelClient

from segqc.loop import planted_errors
from segqc.loop.dataset import Dataset
from segqc.server.monailabel.facade import current_app
from segqc.store import attention_checks, corrections, labels
from segqc.store.records import AttentionCheck
from segqc.volumes import Volume, read_labels, read_scan, slice_layout, write_labels
from tests.server_kit import (
    add_models,
    assess,
    draw_case,
    knowing_the_truth,
    listening,
    make_dataset,
    serving,
    without_liver,
)
from tests.test_attention_checks import kept_array, settings
from tests.test_proposals import keep
from tests.test_server_viewer import ANNA, BEN, next_scan, send, viewed

pytestmark = pytest.mark.server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = make_dataset(tmp_path / "scans", scans=2, finals=0, config=settings())
    dataset = Dataset(made)
    for scan in range(2):
        assess(dataset, f"scan_{scan}", 0.6 + scan / 10, mask=draw_case(scan)[1])
    return made


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    with serving(folder) as made:
        yield made


def planted(dataset: Dataset) -> AttentionCheck:
    with dataset.store.read() as transaction:
        found = attention_checks.of_lease(transaction, 1)
    assert found is not None
    return found


def test_the_panel_shows_the_error_as_the_networks_mask(client: TestClient) -> None:
    shown = next_scan(client)["scan"]
    dataset = current_app().context.dataset
    check = planted(dataset)
    version = check.served.id
    assert shown["label"]["version"] == shown["estimate"]["version"] == version
    assert [v["version"] for v in shown["history"]] == [version]
    assert client.get(f"/segqc/labels/{shown['scan']}").json()[0]["id"] == version
    assert len(client.get(f"/segqc/labels/{shown['scan']}").json()) == 1

    def voxels(who: dict[str, str]) -> tuple[np.ndarray, str]:
        path = f"/segqc/viewer/scans/{shown['study']}/labels/{version}"
        answer = client.get(path, params=who)
        array = np.frombuffer(answer.content, np.uint8)
        return array.reshape(len(shown["instances"]), shown["rows"], shown["columns"]).copy(), answer.headers[
            "cache-control"
        ]

    images, cached = voxels(ANNA)
    plain, also_cached = voxels(BEN)
    assert (images != plain).any()
    assert "no-store" in cached
    assert "no-store" in also_cached, "the same browser may get the error later"
    images[0, 0, 0] = 4
    told = send(client, shown, images, version, what="check").json()
    assert (told["voxels_changed"], told["conflict"]) == (1, None)
    done = send(client, shown, images, version)
    assert done.status_code == 200, done.text
    assert set(done.json()) == {"version", "tag", "correction", "check"}
    plain[0, 0, 0] = 4
    after = viewed(client, shown["study"])
    kept = client.get(f"/segqc/viewer/scans/{shown['study']}/labels/{after['label']['version']}")
    np.testing.assert_array_equal(np.frombuffer(kept.content, np.uint8), plain.ravel())
    assert [v["version"] for v in after["history"]] == [done.json()["version"], version]
    assert client.get(f"/segqc/viewer/scans/{shown['study']}/labels/{check.shown.id}").status_code == 404
    np.testing.assert_array_equal(voxels(ANNA)[0].ravel()[1:], plain.ravel()[1:])
    assert planted(dataset).found is False
    # a client that missed the answer sends it again
    assert send(client, shown, images, version).json()["version"] == done.json()["version"]


def test_the_page_says_what_was_found_when_it_is_over(client: TestClient) -> None:
    shown = next_scan(client)["scan"]
    check = planted(current_app().context.dataset)
    for page in (f"/scans/{shown['scan']}", "/loop"):
        text = client.get(page).text
        assert "lanted error" not in text
        assert "attention check" not in text
    truth = draw_case(0)[1]
    dataset = current_app().context.dataset
    path = dataset.folder / "truth.nii.gz"
    write_labels(truth, path)
    answer = client.put(
        f"/datastore/label?image={shown['scan']}&client_id=anna",
        files={"label": ("truth.nii.gz", path.read_bytes())},
    )
    assert answer.status_code == 200, answer.text
    text = client.get(f"/scans/{shown['scan']}").text
    assert "planted error corrected" in text
    assert "attention check" in text
    assert "1 of 1" in client.get("/loop").text
    table = client.get("/loop/annotators.csv").text.splitlines()
    assert table[0].split(",")[-3:-1] == ["planted errors", "planted errors found"]
    assert table[1].split(",")[-3:-1] == ["1", "1"]
    refused = client.post(f"/segqc/labels/{shown['scan']}/restore?version={check.shown.id}")
    assert refused.status_code in range(400, 500)
    assert "planted" in refused.json()["detail"]
    assert client.get(f"/segqc/labels/{shown['scan']}/check?version={check.shown.id}").json()["state"] == "none"


@pytest.mark.parametrize("is_found", [False, True])
def test_monai_labels_client_gets_it_and_never_keeps_it(folder: Path, tmp_path: Path, is_found: bool) -> None:
    """It names itself when it asks for a scan and when it submits, and not when it downloads."""
    with listening(folder) as url:
        client = MONAILabelClient(url, str(tmp_path), client_id="anna")
        scan = client.next_sample("sequential", {})["id"]
        assert scan == "scan_0"
        served = draw_case(0)[1]
        mask = read_labels(Path(client.download_label(scan, "original")))
        # clients count values from 1
        as_sent = np.select([served.array == 1, served.array == 4], [1, 2], 0)
        assert (mask.array != as_sent).any()
        assert client.datastore()["objects"]["scan_0"]["labels"].keys() == {"original"}
        drawn = as_sent.astype(np.uint8) if is_found else mask.array.copy()
        drawn[0, 0, 0] = 2
        write_labels(Volume(drawn, mask.affine), tmp_path / "drawn.nii.gz")
        names = [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}]
        answer = client.save_label(scan, str(tmp_path / "drawn.nii.gz"), "final", {"label_info": names})
        assert "planted" not in str(answer)
        dataset = Dataset(folder)
        check = planted(dataset)
        with dataset.store.read() as transaction:
            (correction,) = corrections.listing(transaction)
            kept = kept_array(dataset, labels.get(transaction, correction.to_version))
        assert check.found is is_found
        assert correction.change.voxels_changed == 1
        expected = served.array.copy()
        expected[0, 0, 0] = 4
        np.testing.assert_array_equal(kept, expected)
        assert np.array_equal(read_labels(Path(client.download_label(scan, "original"))).array, as_sent)


@pytest.fixture
def proposing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """The network's mask lacks the liver in two slices; the planted error lies in the box there, and beside it."""
    folder = make_dataset(tmp_path / "scans", scans=1, finals=0, config=f"{settings()}\n[boxes]\nmin_area_mm2 = 20\n")
    add_models(folder, people=True)
    knowing_the_truth(monkeypatch)
    keep(Dataset(folder), without_liver(), "original")
    missing = draw_case(0)[1].array != without_liver().array
    in_slice = tuple(slice(int(i.min()), int(i.max()) + 1) for i in np.nonzero(missing[..., 4]))

    def planted(dataset: Dataset, image: Volume, mask: Volume, *_: object) -> tuple[np.ndarray, str]:
        array = mask.array.copy()
        box = array[(*in_slice, 4)]
        box[draw_case(0)[1].array[(*in_slice, 4)] == 0] = 1
        array[:3, :3, 4:6] = 4
        return array, "leak"

    monkeypatch.setattr(planted_errors, "_planted", planted)
    with serving(folder) as made:
        yield made


def test_a_proposal_neither_outlines_nor_corrects_a_planted_error(proposing: TestClient, tmp_path: Path) -> None:
    client = proposing
    shown = next_scan(client)["scan"]
    dataset = current_app().context.dataset
    check = planted(dataset)
    served, error = (kept_array(dataset, label) for label in (check.served, check.shown))
    truth, version = draw_case(0)[1].array, check.served.id
    offer = client.get(f"/segqc/viewer/scans/{shown['study']}/proposals/{version}", params=ANNA).json()
    expected = np.where(truth != served, truth, error)
    assert (expected != truth)[..., 4].any() and (expected != truth)[..., 5].any() and len(offer["boxes"]) == 2

    def in_viewer(number: int, who: dict[str, str]) -> np.ndarray:
        path = f"/segqc/viewer/scans/{shown['study']}/labels/{number}"
        answer = client.get(path, params=who)
        assert "no-store" in answer.headers["cache-control"]
        size = len(shown["instances"]), shown["rows"], shown["columns"]
        return slice_layout(read_scan(dataset.folder / "scan_0.nii.gz")).from_images(
            np.frombuffer(answer.content, np.uint8).reshape(size)
        )

    def downloaded(path: str, **params: object) -> np.ndarray:
        answer = client.get(path, params=params)
        assert answer.status_code == 200, answer.text
        (tmp_path / "label.nii.gz").write_bytes(answer.content)
        array = read_labels(tmp_path / "label.nii.gz").array
        return np.where(array == 2, 4, array)  # clients count the structures from 1

    np.testing.assert_array_equal(in_viewer(version, ANNA), error)
    np.testing.assert_array_equal(in_viewer(offer["version"], ANNA), expected)
    np.testing.assert_array_equal(in_viewer(offer["version"], BEN), truth)
    by_tag, by_version = "/datastore/label", "/segqc/labels/scan_0/proposal"
    for who, proposed in ((ANNA, expected), ({}, expected), (BEN, truth)):
        np.testing.assert_array_equal(downloaded(by_tag, label="scan_0", tag="proposal", **who), proposed)
        np.testing.assert_array_equal(downloaded(by_version, version=version, **who), proposed)
    images = slice_layout(read_scan(dataset.folder / "scan_0.nii.gz")).to_images(expected)  # every box is taken
    done = send(client, shown, images, version, proposal={"version": offer["version"], "boxes": 2})
    assert done.status_code == 200, done.text
    assert planted(dataset).found is False, "who has taken the proposal has not found the error"
    with dataset.store.read() as transaction:
        kept = labels.get(transaction, done.json()["version"])
    np.testing.assert_array_equal(kept_array(dataset, kept), truth)
