"""The pages: what they show of a folder, what their buttons do, and what they refuse."""

from __future__ import annotations

import csv
import datetime as dt
import html
import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

import highdicom as hd
import pydicom
from fastapi.testclient import TestClient
from PIL import Image

from segqc.io.dicom import make_dataset as import_dicom
from segqc.loop import error_maps
from segqc.loop.dataset import Dataset
from segqc.server import checks as server_checks
from segqc.server.dicomweb.series import DicomScan, ScanHeader, ScanImages
from segqc.server.pages import charts, pictures, words
from segqc.server.pages.pictures import Layers
from segqc.store import assessments, jobs, labels, scans
from segqc.store.labels import NewLabel
from segqc.store.records import Actor, ScanRecord
from segqc.types import PredictionInterval, Unlikeness
from segqc.volumes import Volume, read_labels, temporary_labels, write_labels, write_scan
from tests.auth_kit import PASSWORD, ROLES, add_users, quick_hashes
from tests.pacs_kit import segmentation, series, to_bytes
from tests.server_kit import (
    CHECKED,
    CONFIG,
    SHAPE,
    add_models,
    application,
    assess,
    draw_case,
    knowing_the_truth,
    make_dataset,
    serving,
    without_liver,
)

if TYPE_CHECKING:
    from httpx import Response

HTML = {"Accept": "text/html,application/xhtml+xml"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six scans: one labelled by the folder, three with estimates, two with none."""
    path = make_dataset(tmp_path_factory.mktemp("pages") / "data", scans=6)
    dataset = Dataset(path)
    number = add_models(path)
    assess(dataset, "scan_1", 0.61, half_width=0.1, number=number, volume_ml=3)
    assess(dataset, "scan_2", 0.92, half_width=0.05, number=number, volume_ml=3)
    assess(dataset, "scan_3", 0.35, half_width=0.2, number=number, unlikeness=Unlikeness(9.0, 0.01))
    dataset.store.close()
    return path


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with serving(folder) as found:
        found.headers.update(HTML)
        yield found


@pytest.fixture
def dataset(folder: Path) -> Iterator[Dataset]:
    found = Dataset(folder, watched=True)
    yield found
    found.store.close()


def names_of(page: str) -> list[str]:
    return re.findall(r"data-row>([^<]+)</a>", page)


def table(answer: Response) -> list[dict[str, str]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/csv")
    return list(csv.DictReader(io.StringIO(answer.text)))


def state_of(dataset: Dataset, scan: str) -> str:
    with dataset.store.read() as transaction:
        return scans.get(transaction, scan).state


# -------------------------------------------------------------------------------------------------------------- queue


def test_the_queue_shows_the_worst_mask_first(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert names_of(page.text)[:3] == ["scan_3", "scan_1", "scan_2"]
    assert "scan_0" not in names_of(page.text)
    assert "0.51\N{EN DASH}0.71" in page.text
    assert "unlike the training scans" in page.text


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("view=all&sort=scan", [f"scan_{i}" for i in range(6)]),
        ("view=all&sort=scan&descending=true", [f"scan_{i}" for i in range(5, -1, -1)]),
        ("view=submitted", ["scan_0"]),
        ("sort=dice&descending=true&search=_", ["scan_2", "scan_1", "scan_3", "scan_4", "scan_5"]),
        ("search=SCAN_4", ["scan_4"]),
        ("search=%25", []),
        ("search=nobody", []),
        ("view=excluded", []),
        ("sort=volume&descending=true&search=scan_1", ["scan_1"]),
        ("sort=age&search=scan_2", ["scan_2"]),
        ("page=9", []),
    ],
)
def test_the_queue_is_filtered_sorted_and_searched(client: TestClient, query: str, wanted: list[str]) -> None:
    page = client.get(f"/?{query}")
    assert page.status_code == 200
    assert names_of(page.text) == wanted


@pytest.mark.parametrize("query", ["view=none", "sort=size", "page=0", "page=x"])
def test_a_queue_that_there_is_not_is_refused_on_a_page(client: TestClient, query: str) -> None:
    answer = client.get(f"/?{query}")
    assert answer.status_code == 422
    assert "<h1>" in answer.text and "could not be done" in answer.text


def test_the_queue_as_a_table_has_the_numbers_of_the_page(client: TestClient) -> None:
    rows = table(client.get("/queue.csv?view=all&sort=scan"))
    assert [row["scan"] for row in rows] == [f"scan_{i}" for i in range(6)]
    assert (rows[1]["estimated Dice"], rows[1]["low"], rows[1]["level"]) == ("0.61", "0.51", "0.9")
    assert rows[3]["remark"] == "unlike the training scans: interval does not apply" and rows[3]["low"] == ""
    assert float(rows[1]["error volume in ml"]) > 0


def test_every_page_keeps_to_itself(client: TestClient) -> None:
    for path in ("/", "/scans/scan_1", "/loop", "/docs", "/nowhere"):
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=", answer.text), path
        assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", answer.text), path


def test_assets_are_kept_for_ever_and_nothing_else_is_served(client: TestClient) -> None:
    for address in re.findall(r'(?:src|href)="(/pages/assets/[^"]+)"', client.get("/docs").text):
        answer = client.get(address)
        assert answer.status_code == 200 and "immutable" in answer.headers["cache-control"]
        again = client.get(address, headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304
    assert client.get("/pages/assets/x/pages.css").headers["cache-control"] == "no-cache"
    for name in ("nothing.css", "..%2Fpage.py", "__init__.py"):
        assert client.get(f"/pages/assets/x/{name}").status_code == 404


def test_programs_get_json_where_people_get_a_page(client: TestClient) -> None:
    assert "<html" in client.get("/scans/nobody").text
    answer = client.get("/scans/nobody", headers={"Accept": "application/json"})
    assert (answer.status_code, answer.json()) == (404, {"detail": "there is no scan 'nobody'."})


def test_forms_of_other_sites_are_refused(client: TestClient, dataset: Dataset) -> None:
    answer = client.post(
        "/scans/scan_4/review",
        data={"decision": "exclude", "reason": "x"},
        headers={"Origin": "http://elsewhere.example"},
    )
    assert answer.status_code == 403
    assert state_of(dataset, "scan_4") == "unlabelled"


def test_many_scans_are_excluded_approved_and_reopened_at_once(client: TestClient, dataset: Dataset) -> None:
    chosen = {"scan": ["scan_4", "scan_5"], "back": "/?view=all"}
    page = client.post("/scans", data={**chosen, "decision": "exclude", "reason": "blurred"})
    assert page.url.path == "/" and page.url.query == b"view=all"
    assert "2 scans excluded." in page.text
    assert "2 scans excluded." not in client.get("/").text, "a notice is shown once"
    assert state_of(dataset, "scan_4") == "excluded"
    page = client.post("/scans", data={**chosen, "decision": "approve"})
    assert "0 scans approved. 2 could not be approved: " in page.text
    page = client.post("/scans", data={**chosen, "decision": "reopen", "back": "https://elsewhere.example"})
    assert page.url.host == "testserver" and state_of(dataset, "scan_5") == "unlabelled"
    assert "No scan was chosen." in client.post("/scans", data={"decision": "approve"}).text


def test_excluding_without_a_reason_says_what_is_missing(client: TestClient, dataset: Dataset) -> None:
    page = client.post("/scans", data={"scan": ["scan_4"], "decision": "exclude", "reason": "  "})
    assert "a reason is wanted" in page.text
    assert state_of(dataset, "scan_4") == "unlabelled"


def test_the_next_scan_is_leased_and_opened_in_the_viewer(client: TestClient, dataset: Dataset) -> None:
    answer = client.post("/next", follow_redirects=False)
    assert answer.status_code == 303
    address = answer.headers["location"]
    page = client.get("/?view=in progress").text
    (held,) = names_of(page)
    found = client.get(f"/segqc/dicomweb/{held}").json()
    assert address == f"/ohif/segqc?StudyInstanceUIDs={found['study']}&SeriesInstanceUIDs={found['series']}"
    assert "until 20" in page


# --------------------------------------------------------------------------------------------------------------- scan


def test_a_scan_shows_its_estimates_slices_and_history(client: TestClient) -> None:
    page = client.get("/scans/scan_1").text
    assert "0.61" in page and "0.51\N{EN DASH}0.71" in page and "3.0 ml" in page
    assert len(re.findall("data-index=", page)) == SHAPE[2]
    assert 'data-index="2"' in page and re.search(r'data-index="2"[^>]*aria-current="true"', page), "the worst slice"
    assert "original" in page and "Draw the difference" not in page
    assert "slicer://viewer/?studyUID=2.25." in page


@pytest.mark.parametrize("scan", ["scan_0", "scan_1", "scan_4"])
def test_all_slices_are_drawn(client: TestClient, scan: str) -> None:
    page = client.get(f"/scans/{scan}").text
    for address in set(re.findall(r'(?:src|data-view)="(/scans/[^"]+)"', page)):
        answer = client.get(address.replace("&amp;", "&"))
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp"), address
        assert max(Image.open(io.BytesIO(answer.content)).size) in (144, 720)
    worst = client.get(f"/scans/{scan}/worst")
    assert worst.status_code == 200 and worst.headers["cache-control"] == "private, no-cache"


@pytest.mark.parametrize("path", ["slices/10", "slices/-1", "slices/1?version=999", "slices/1?edge=9999", "slices/x"])
def test_slices_that_there_are_not_are_refused(client: TestClient, path: str) -> None:
    assert client.get(f"/scans/scan_1/{path}").status_code in (404, 422)


def test_layers_are_what_the_address_says(client: TestClient) -> None:
    page = client.get("/scans/scan_1?drawn=1&mask=1&whole=1").text
    picture = re.search(r'data-slice src="([^"]+)"', page)
    assert picture is not None and "mask=1" in picture[1] and "whole=1" in picture[1] and "heat" not in picture[1]
    checked = re.findall(r'name="(mask|heat|boxes|whole)" value="1"( checked)?', page)
    assert checked == [("mask", " checked"), ("heat", ""), ("boxes", ""), ("whole", " checked")]


def test_a_kept_error_map_is_drawn_as_heat(client: TestClient, dataset: Dataset) -> None:
    with dataset.store.read() as transaction:
        start = labels.start_of(transaction, "scan_2")
        assert start is not None
        assessment = assessments.latest_id(transaction, start.id)
    bundle = dataset.bundle()
    assert bundle is not None
    # without a look at its page, which would have the map computed
    address = f"/scans/scan_2/slices/2?edge=720&version={start.id}&assessment={assessment}&mask=1&heat=1&boxes=1"
    assert client.get(address).headers["cache-control"] == "private, no-cache", "without heat it is not the last word"
    errors = np.zeros((2, *SHAPE), np.uint8)
    errors[0, 8:20, 8:20, :] = 255
    error_maps.write(dataset, start.id, bundle.number, errors)
    answer = client.get(address)
    assert "immutable" in answer.headers["cache-control"]
    colours = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB")).astype(int)
    assert (colours[..., 0] - colours[..., 2] > 150).mean() > 0.1, "a part of the slice is orange"
    assert "is being computed" not in client.get("/scans/scan_2/heat").text


def test_numbers_of_slices_come_as_a_table(client: TestClient) -> None:
    rows = table(client.get("/scans/scan_1/slices.csv"))
    assert len(rows) == SHAPE[2]
    assert max(rows, key=lambda row: float(row["error sum"]))["slice"] == "2"
    assert {row["structure"] for row in rows} == {"liver"}
    assert table(client.get("/scans/scan_4/slices.csv")) == []


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_versions_are_downloaded_as_they_are(client: TestClient, dataset: Dataset, tmp_path: Path, suffix: str) -> None:
    with dataset.store.read() as transaction:
        final = labels.current(transaction, "scan_0", "final")
    assert final is not None
    answer = client.get(f"/scans/scan_0/versions/{final.id}/scan_0{suffix}")
    assert answer.status_code == 200
    path = tmp_path / f"got{suffix}"
    path.write_bytes(answer.content)
    np.testing.assert_array_equal(read_labels(path).array, draw_case(0)[1].array)
    assert client.get(f"/scans/scan_0/versions/{final.id}/scan_0.exe").status_code == 404
    assert client.get(f"/scans/scan_1/versions/{final.id}/scan_1{suffix}").status_code == 404, "another scan's"


def test_a_label_is_uploaded_compared_rejected_and_restored(
    client: TestClient, dataset: Dataset, tmp_path: Path
) -> None:
    truth = draw_case(5)[1]
    path = tmp_path / "mine.nii.gz"
    write_labels(truth, path)
    page = client.post("/scans/scan_5/label", files={"file": ("mine.nii.gz", path.read_bytes())}).text
    first = int(re.findall(r"Version (\d+) kept as the final label", page)[0])
    assert state_of(dataset, "scan_5") == "submitted"
    with dataset.store.read() as transaction:
        kept = labels.get(transaction, first)
    np.testing.assert_array_equal(read_labels(dataset.store.label_file(kept)).array, truth.array)
    changed = truth.array.copy()
    changed[10:14, 10:14, 3] = 1
    write_labels(Volume(changed, truth.affine), path)
    page = client.post("/scans/scan_5/label", files={"file": ("mine.nii.gz", path.read_bytes())}).text
    second = int(re.findall(r"Version (\d+) kept as the final label", page)[0])
    differing = int((changed != truth.array).sum())
    page = client.get(f"/scans/scan_5?version={second}&other={first}").text
    assert f"{differing} voxels differ" in page and re.search(r'data-index="3"[^>]*aria-current="true"', page)
    rows = table(client.get(f"/scans/scan_5/difference.csv?version={second}&other={first}"))
    assert [row["voxels changed"] for row in rows] == ["0"] * 3 + [str(differing)] + ["0"] * 6
    review = "/scans/scan_5/review"
    refused = f"has a newer final label, version {second} by"
    assert refused in client.post(review, data={"decision": "approve", "seen": first}).text
    page = client.post("/scans", data={"decision": "approve", "scan": "scan_5", "seen": first}).text
    assert refused in page and state_of(dataset, "scan_5") == "submitted"
    by_route = client.post("/segqc/review/scan_5", json={"decision": "approve", "seen": first})
    assert by_route.status_code == 409 and refused in by_route.text
    assert f'name="seen" value="{second}"' in client.get("/?view=all").text
    assert f'name="seen" value="{second}"' in client.get("/scans/scan_5").text
    assert "Approved." in client.post(review, data={"decision": "approve", "seen": second}).text
    page = client.post("/scans/scan_5/review", data={"decision": "reject", "reason": "a leak"}).text
    assert "Rejected" in page and "a leak" in page and state_of(dataset, "scan_5") == "rejected"
    page = client.post("/scans/scan_5/restore", data={"version": first}).text
    assert "is the current label &#39;final&#39; again" in page
    assert client.post("/scans/scan_5/restore", data={"version": 1}).url.path == "/scans/scan_5"
    versions = table(client.get("/scans/scan_5/versions.csv"))
    assert [v["tag"] for v in versions][:2] == ["final", "final"] and versions[-1]["as"] == "restored"


def test_an_uploaded_label_is_checked_and_the_page_shows_where_to_look_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_dataset(tmp_path / "data", scans=2, finals=0, config=CHECKED)
    number = add_models(folder, people=True)
    knowing_the_truth(monkeypatch)
    monkeypatch.setattr(server_checks, "WAIT_SECONDS", 60.0)
    write_labels(without_liver(), tmp_path / "mine.nii.gz")
    file = {"file": ("mine.nii.gz", (tmp_path / "mine.nii.gz").read_bytes())}
    sentence = "Look again at slices 4 and 5: part of the liver seems to be missing."
    with serving(folder) as client:
        client.headers.update(HTML)
        page = client.post("/scans/scan_0/label", files=file).text
        assert f"kept as the final label. {sentence}" in page
        assert re.search(rf"data-check>.*{sentence}", page)
        assert "The final label was not checked" not in page
        pages = [client.get(f"/scans/scan_0?slice=4&drawn=1{more}").text for more in ("", "&boxes=1")]
        plain, boxed = (client.get(html.unescape(re.findall(r'data-slice src="([^"]+)"', page)[0])) for page in pages)
        assert plain.content != boxed.content
        (row,) = table(client.get("/scans/scan_0/versions.csv"))
        assert row["check"] == sentence and row["by bundle"] == str(number) and 0 < float(row["estimated Dice"]) < 1
        assert client.get("/scans/scan_1").text.count("data-check>") == 0


def test_a_check_that_takes_long_is_awaited_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_dataset(tmp_path / "data", scans=1, finals=0, config=CHECKED)
    add_models(folder, people=True)
    knowing_the_truth(monkeypatch)
    going, check = threading.Event(), server_checks.check_label
    monkeypatch.setattr(server_checks, "check_label", lambda *args: going.wait() and check(*args))
    monkeypatch.setattr(server_checks, "WAIT_SECONDS", 0.1)
    write_labels(draw_case(0)[1], tmp_path / "mine.nii.gz")
    file = {"file": ("mine.nii.gz", (tmp_path / "mine.nii.gz").read_bytes())}
    with serving(folder) as client:
        client.headers.update(HTML)
        page = client.post("/scans/scan_0/label", files=file).text
        assert "The final label is being checked." in page
        assert "data-goes-on" in client.get("/scans/scan_0/check").text
        going.set()
        while "data-goes-on" in client.get("/scans/scan_0/check").text:
            pass
        assert "data-reload-pictures" in client.get("/scans/scan_0/check").text
        page = client.get("/scans/scan_0").text
        assert re.search(r"data-check>.*Nothing found\.", page) and "being checked" not in page


OBLIQUE = np.array([[1.2, 0.3, 0.5, -20], [-0.4, 1.3, 0.9, 11], [-0.2, -0.4, 3.1, 7], [0, 0, 0, 1.0]])


def grid(kind: str) -> np.ndarray:
    """A grid as scanners make them: straight, mirrored, with other axes first, or oblique."""
    straight = np.diag([1.5, 1.5, 4.0, 1.0])
    if kind == "flipped":
        return straight @ np.diag([-1.0, 1.0, -1.0, 1.0])
    if kind == "sagittal":
        return straight[[2, 0, 1, 3]]
    if kind == "oblique":
        turned, _ = np.linalg.qr(OBLIQUE[:3, :3])
        straight[:3, :3] = turned @ straight[:3, :3]
        straight[:3, 3] = OBLIQUE[:3, 3]
    return straight


@pytest.mark.parametrize("kind", ["straight", "flipped", "sagittal", "oblique"])
@pytest.mark.parametrize(("source", "named"), [(".nii.gz", True), (".nii.gz", False), (".nrrd", True), ("DICOM", True)])
def test_a_segmentation_goes_out_and_comes_back_voxel_by_voxel(
    tmp_path: Path, kind: str, source: str, named: bool
) -> None:
    path = make_dataset(tmp_path / "data", scans=0, config=CONFIG if named else "")
    scan, truth = (Volume(volume.array, grid(kind)) for volume in draw_case(0))
    write_scan(scan, tmp_path / "scan_0" if source == "DICOM" else path / f"scan_0{source}")
    if source == "DICOM":
        import_dicom(tmp_path / "scan_0", tmp_path / "imported")
        (tmp_path / "imported" / "scan_0.nii.gz").rename(path / "scan_0.nii.gz")
    write_labels(truth, path / "labels" / "final" / "scan_0.nii.gz")
    with serving(path) as client:
        client.headers.update(HTML)
        (address,) = re.findall(r'<a href="(/scans/scan_0/versions/[^"]+[.]dcm)">SEG', client.get("/scans/scan_0").text)
        sent = client.get(address)
        assert sent.status_code == 200 and sent.headers["content-disposition"].endswith("scan_0_final_1.dcm")
        answer = client.post("/scans/scan_0/label", files={"file": ("whatever", sent.content)})
        (kept,) = re.findall(r"Version (\d+) kept as the final label", answer.text)
        for version in ("1", kept):
            content = client.get(f"/scans/scan_0/versions/{version}/x.nii.gz").content
            (tmp_path / f"{version}.nii.gz").write_bytes(content)
        instances = client.get("/segqc/dicomweb/scan_0").json()["instances"]
    before, after = (read_labels(tmp_path / f"{version}.nii.gz").array for version in ("1", kept))
    np.testing.assert_array_equal(after, before)
    assert np.array_equal(before, truth.array) or source == "DICOM"
    item = hd.seg.segread(io.BytesIO(sent.content))
    assert [s.SegmentLabel for s in item.SegmentSequence] == (["liver", "spleen"] if named else ["label 1", "label 4"])
    (series,) = item.ReferencedSeriesSequence
    assert {str(image.ReferencedSOPInstanceUID) for image in series.ReferencedInstanceSequence} <= set(instances)


def test_segmentations_of_networks_and_of_nothing_say_so(client: TestClient, dataset: Dataset) -> None:
    with dataset.store.read() as transaction:
        start = labels.start_of(transaction, "scan_2")
    assert start is not None
    item = hd.seg.segread(io.BytesIO(client.get(f"/scans/scan_2/versions/{start.id}/scan_2.dcm").content))
    assert {s.SegmentAlgorithmType for s in item.SegmentSequence} == {"AUTOMATIC"}
    empty = empty_label(dataset, "scan_2")
    item = hd.seg.segread(io.BytesIO(client.get(f"/scans/scan_2/versions/{empty}/scan_2.dcm").content))
    assert not item.pixel_array.any() and {s.SegmentAlgorithmType for s in item.SegmentSequence} == {"MANUAL"}


def empty_label(dataset: Dataset, scan: str) -> int:
    """A label version beside the final one that has no voxel."""
    actor = Actor(kind="person", name="anna", identified_by="client-id")
    with temporary_labels(Volume(np.zeros(SHAPE, np.uint8), draw_case(0)[0].affine)) as path:
        return dataset.store.save_label(NewLabel(scan, "version_1", "annotator", actor), path).id


def test_an_empty_label_is_asked_about_before_it_is_kept(client: TestClient, dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "mine.nii.gz"
    scan = draw_case(4)[0]
    write_labels(Volume(np.zeros(SHAPE, np.uint8), scan.affine), path)
    answer = client.post("/scans/scan_4/label", files={"file": ("mine.nii.gz", path.read_bytes())})
    assert "Keep an empty label?" in answer.text and state_of(dataset, "scan_4") == "unlabelled"
    assert "kept as the final label" in client.post("/scans/scan_4/label", data={"empty": "true"}).text
    with dataset.store.read() as transaction:
        kept = labels.current(transaction, "scan_4", "final")
    assert kept is not None
    found = read_labels(dataset.store.label_file(kept))
    assert found.shape == SHAPE and not found.array.any()
    client.post("/scans/scan_4/review", data={"decision": "reopen"})


@pytest.mark.parametrize("what", ["another scan's", "another structure's", "another grid's", "fractional", "an image"])
def test_segmentations_that_are_none_of_the_scan_are_refused_in_a_sentence(client: TestClient, what: str) -> None:
    scan, truth = draw_case(2)
    images, names, kind = series(scan, "p"), {1: "liver", 4: "spleen"}, "BINARY"
    if what == "another scan's":
        item = pydicom.dcmread(io.BytesIO(client.get("/scans/scan_0/versions/1/scan_0.dcm").content))
        said = "names the images of the scan &#39;scan_0&#39;; upload it there."
    elif what == "an image":
        item, said = images[0], "is no DICOM segmentation."
    else:
        names, said = ({1: "liver", 4: "heart"}, "none of the structures") if "structure" in what else (names, "")
        kind, said = ("FRACTIONAL", "labels are BINARY or LABELMAP") if what == "fractional" else (kind, said)
        if what == "another grid's":
            shift = np.zeros((4, 4))
            shift[2, 3] = 1.3
            scan, said = Volume(scan.array, scan.affine + shift), "resample"
        item = segmentation(truth.array, scan, images, names, kind=kind)
    page = client.post("/scans/scan_2/label", files={"file": ("x.dcm", to_bytes(item))})
    assert 'class="notice problem"' in page.text and said in page.text, page.text[:3000]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.nii.gz", b"no image", "could not|cannot|is no|not a"),
        ("x.exe", b"", "suffix|name"),
        ("", b"", "Choose a file|file"),
    ],
)
def test_what_is_no_label_is_refused_in_a_sentence(
    client: TestClient, name: str, content: bytes, sentence: str
) -> None:
    page = client.post("/scans/scan_1/label", files={"file": (name, content)})
    assert re.search(sentence, page.text), page.text[:2000]
    assert "Traceback" not in page.text


def test_a_scan_whose_file_is_gone_still_has_a_page(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data", scans=2)
    with serving(path) as client:
        (path / "scan_1.nii.gz").unlink()
        answer = client.get("/scans/scan_1", headers=HTML)
    assert answer.status_code == 200 and "The slices cannot be shown" in answer.text


def test_names_are_text_and_no_markup(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data", scans=1, finals=0)
    (path / "scan_0.nii.gz").rename(path / "a &<b> #1 100%.nii.gz")
    with serving(path) as client:
        page = client.get("/", headers=HTML)
        (address,) = re.findall(r'<a href="(/scans/[^"]+)" data-row>', page.text)
        assert "a &amp;&lt;b&gt; #1 100%" in page.text
        assert "<b>" not in client.get(address, headers=HTML).text.split("<main")[1].split("</h1>")[0]


def test_a_segmentation_names_patient_and_structures_in_any_script(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data", scans=1, config=CONFIG.replace("liver", '"печень"'))
    for folder in (path, path / "labels" / "final"):
        (folder / "scan_0.nii.gz").rename(folder / "Иванов 1.nii.gz")
    with serving(path) as client:
        content = client.get("/scans/Иванов 1/versions/1/x.dcm").content
        item = pydicom.dcmread(io.BytesIO(content))
        assert (item.PatientID, str(item.PatientName)) == ("Иванов 1", "Иванов 1")
        assert [str(segment.SegmentLabel) for segment in item.SegmentSequence] == ["печень", "spleen"]
        answer = client.post("/scans/Иванов 1/label", files={"file": ("x.dcm", content)})
        assert "kept as the final label" in answer.text, answer.text[:3000]


def test_an_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    with serving(make_dataset(tmp_path / "data", scans=0)) as client:
        page = client.get("/", headers=HTML).text
        assert "No scans yet" in page and f"<code>{tmp_path / 'data'}</code>" in page
        assert "There are no scans yet: put some" in client.post("/next", headers=HTML).text
        assert "There are no scans yet: put some" in client.post("/segqc/viewer/next", json={}).json()["note"]
        page = client.get("/loop", headers=HTML).text
        assert "No network was trained yet" in page and "Nothing runs" in page


# --------------------------------------------------------------------------------------------------------------- loop


def test_the_loop_tells_of_bundles_and_of_what_the_next_round_waits_for(client: TestClient) -> None:
    page = client.get("/loop").text
    assert "serves" in page and "No round begins by itself" in page
    assert "A round needs final labels of" in page
    assert re.search(r'id="start-round"[^>]*disabled', page)
    assert "corrections" in page


def test_a_job_is_shown_live_and_stopped(client: TestClient, dataset: Dataset) -> None:
    with dataset.store.write() as transaction:
        actor = Actor(kind="person", name="anna", identified_by="client-id")
        job = jobs.enqueue(transaction, "scoring", {"method": "segqc", "force": False}, actor)
    part = client.get("/loop/now").text
    assert "The scoring by segqc" in part and "waits for a worker" in part and "asked for by anna" in part
    assert "the scoring by segqc waits" in client.get("/pages/status").text
    page = client.post(f"/loop/jobs/{job.public_id}/stop")
    assert "was stopped before it began" in page.text and job.public_id not in page.text
    assert client.post(f"/loop/jobs/{job.public_id}/stop").status_code == 404


def test_a_round_without_labels_is_refused_for_the_reason_that_the_page_shows(
    client: TestClient, dataset: Dataset
) -> None:
    page = client.post("/loop/round")
    (reason,) = re.findall(r"A round needs final labels of \d+ patients; there are \d+[.]", page.text)
    assert page.status_code == 409 and reason in client.get("/loop").text
    answer = client.post("/loop/round", headers={"Accept": "application/json"})
    assert (answer.status_code, answer.json()) == (409, {"detail": reason})
    with dataset.store.read() as transaction:
        assert not jobs.open_jobs(transaction, "round")


@pytest.mark.parametrize("name", ["rounds", "bundles", "estimates", "annotators", "corrections", "costs"])
def test_each_table_of_the_loop_can_be_downloaded(client: TestClient, name: str) -> None:
    table(client.get(f"/loop/{name}.csv"))


@pytest.mark.parametrize(
    ("path", "heading"),
    [
        ("/queue.csv?search=nobody", "scan,title,patient"),
        ("/loop/rounds.csv", "round,put,began"),
        ("/loop/corrections.csv", "scan,seconds"),
        ("/loop/annotators.csv", "annotator,known by"),
        ("/scans/scan_4/slices.csv", "scan,slice,structure"),
        ("/scans/scan_4/versions.csv", "version,tag,current"),
    ],
)
def test_tables_without_rows_have_their_headings(tmp_path: Path, path: str, heading: str) -> None:
    with serving(make_dataset(tmp_path / "data", scans=5)) as client:
        lines = client.get(path).text.splitlines()
    assert len(lines) == 1 and lines[0].startswith(heading)


def test_a_scan_without_estimate_opens_in_the_middle_of_its_mask(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data", scans=1, finals=0)
    scan = draw_case(0)[0]
    marked = np.zeros(SHAPE, np.uint8)
    marked[4:9, 4:9, 6:9] = 1
    write_labels(Volume(marked, scan.affine), path / "labels" / "final" / "scan_0.nii.gz")
    with serving(path) as client:
        assert re.search(r'data-index="7"[^>]*aria-current="true"', client.get("/scans/scan_0", headers=HTML).text)
        client.post("/scans/scan_0/review", data={"decision": "reject", "reason": "a leak"}, headers=HTML)
        page = client.get("/scans/scan_0", headers=HTML).text
        assert "a leak" in page and re.search(r'data-index="7"[^>]*aria-current="true"', page)


def test_long_names_are_cut_in_the_middle_and_told_in_full(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data", scans=1, finals=0)
    name = "a_scan_with_a_name_that_goes_on_and_on_and_ends_with_7"
    (path / "scan_0.nii.gz").rename(path / f"{name}.nii.gz")
    with serving(path) as client:
        page = client.get("/", headers=HTML).text
    assert f'title="{name}"' in page and f'<span class="unseen">{name}</span>' in page
    assert f"{name[:18]}\N{HORIZONTAL ELLIPSIS}{name[-12:]}</span>" in page


def test_labels_that_were_imported_are_no_corrections(client: TestClient) -> None:
    page = client.get("/loop").text
    (told,) = re.findall(r"No round begins by itself[^<]*", page)
    assert re.search(r"\d+ new corrections?, and 1 imported label[.]", told)


def test_the_api_page_needs_no_other_host(client: TestClient) -> None:
    page = client.get("/docs").text
    assert 'data-schema="/openapi.json"' in page and "swagger-ui-bundle.js" in page
    assert client.get("/openapi.json", headers={"Accept": "application/json"}).json()["info"]["title"] == "SegQC"


# ---------------------------------------------------------------------------------------------------- pictures, charts


@pytest.mark.parametrize("affine", [np.diag([1.5, 1.5, 4.0, 1.0]), np.diag([-1.5, 1.5, 4.0, 1.0])])
def test_boxes_and_masks_lie_where_the_scan_has_them(tmp_path: Path, affine: np.ndarray) -> None:
    """A mask of one bright block, and a picture that is turned as viewers turn it: the contour is around the block."""
    array = np.zeros(SHAPE, np.float32)
    array[20:26, 4:10, 5] = 100
    scan = Volume(array, affine)
    header = header_of(scan)
    labels_of_it = (array > 0).astype(np.uint8)
    part = pictures.part_of(header, [labels_of_it], None)
    shown = pictures.ShownSlices(header, ScanImages.of(scan, header.layout), (), part, labels=labels_of_it)
    picture = np.asarray(Image.open(io.BytesIO(pictures.draw(shown, 5, Layers(whole=True), 320))).convert("L"))
    bright = np.argwhere(picture > 128)
    row, column = bright.mean(axis=0) / picture.shape
    flips = header.layout
    wanted_column = (22.5 + 0.5) / SHAPE[0] if not flips.flip_columns else 1 - (22.5 + 0.5) / SHAPE[0]
    wanted_row = (6.5 + 0.5) / SHAPE[1] if not flips.flip_rows else 1 - (6.5 + 0.5) / SHAPE[1]
    assert abs(column - wanted_column) < 0.03 and abs(row - wanted_row) < 0.03


def header_of(scan: Volume) -> ScanHeader:
    record = ScanRecord(
        id=1, name="a", file="a.nii.gz", patient="a", fold=0, split="train", state="unlabelled", reason=None,
        ranking_dice=None, info={}, added_at=dt.datetime.now(dt.UTC), missing_since=None, sha256="0", signature=None,
        former_name=None,
    )  # fmt: skip
    return ScanHeader.of(DicomScan(record), scan, "MR")


def test_a_chart_holds_its_points_and_its_band() -> None:
    interval = PredictionInterval(0.6, 0.9, 0.9)
    points = [
        charts.EstimatePoint(scan="a", structure="s", kind="audit", estimated=0.8, true=0.7, interval=interval),
        charts.EstimatePoint(scan="b", structure="s", kind="check", estimated=0.5, true=1.0),
    ]
    known = [(0.5 + 0.01 * i, PredictionInterval(0.3 + 0.01 * i, 0.7 + 0.01 * i, 0.9)) for i in range(40)]
    chart = charts.scatter(points, known)
    for mark in chart.marks:
        assert chart.left <= mark.x <= chart.right and chart.top <= mark.y <= chart.bottom
    assert points[0].is_held is True and points[1].is_held is None
    assert len(chart.band) >= 4
    assert charts.scatter([], []).band == ()


@pytest.mark.parametrize("values", [[("1", 0.5)], [("1", 0.0), ("2", 1.0)], [("1", 0.83), ("2", 0.83)]])
def test_a_line_stays_within_its_axes(values: list[tuple[str, float]]) -> None:
    line = charts.line(values)
    assert all(line.left <= p.x <= line.right and 0 <= p.y <= line.bottom for p in line.points)


def test_words_for_numbers_that_are_not_there() -> None:
    assert words.number(None) == words.count(None) == words.share(None) == words.duration(None) == words.NOTHING
    assert words.number(-0.5) == "\N{MINUS SIGN}0.50"


# -------------------------------------------------------------------------------------------------------------- roles


def test_people_see_the_buttons_of_their_role(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data", scans=2)
    dataset = Dataset(path)
    add_users(dataset.store)
    dataset.store.close()
    seen: dict[str, set[str]] = {}
    with quick_hashes(), application(path, sign_in=True) as app, TestClient(app, headers=HTML) as client:
        assert client.get("/").url.path == "/auth/sign-in"
        for name in ROLES:
            client.cookies.clear()
            client.post("/auth/sign-in", data={"username": name, "password": PASSWORD})
            pages = "".join(client.get(address).text for address in ("/", "/scans/scan_0", "/loop"))
            assert f">{name}</span>" in pages and "Sign out" in pages
            buttons = {"Take the next scan", "Upload as the final label", "Approve", "Reject", "Start a round"}
            seen[name] = {button for button in buttons if f"{button}<" in pages or f"{button}…<" in pages}
        client.post("/auth/sign-out")
        assert client.get("/loop").url.path == "/auth/sign-in"
    assert seen["anna"] == {"Take the next scan", "Upload as the final label"}
    assert seen["rita"] == {*seen["anna"], "Approve", "Reject"}
    assert seen["otto"] == {*seen["rita"], "Start a round"}


def test_who_may_not_is_told_by_a_page_in_a_browser(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data", scans=1)
    dataset = Dataset(path)
    add_users(dataset.store)
    dataset.store.close()
    with quick_hashes(), application(path, sign_in=True) as app, TestClient(app) as client:
        client.post("/auth/sign-in", data={"username": "anna", "password": PASSWORD})
        review = {"decision": "exclude", "reason": "x"}
        page = client.post("/scans/scan_0/review", data=review, headers=HTML)
        assert page.status_code == 403 and "This is not allowed" in page.text
        assert "This needs the role &#39;reviewer&#39;, and yours is &#39;annotator&#39;." in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]
        answer = client.post("/scans/scan_0/review", data=review)
        assert answer.json() == {"detail": "this needs the role 'reviewer', and yours is 'annotator'."}
        foreign = {**HTML, "Origin": "http://elsewhere.example"}
        assert "This is not allowed" in client.post("/scans/scan_0/review", data=review, headers=foreign).text
        unknown = client.get("/", headers={**HTML, "Host": "elsewhere.example"})
        assert unknown.status_code == 421 and unknown.headers["content-type"] == "application/json"
