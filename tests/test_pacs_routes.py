"""A server whose scans are series of an Orthanc: what clients reach of it, and what they do not."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from dicomweb_client import DICOMwebClient
from fastapi.testclient import TestClient

from segqc.server.monailabel.facade import current_app
from segqc.store import labels
from segqc.volumes import read_labels, read_scan
from tests.pacs_kit import PASSWORD, USER, Orthanc, segmentation, series, to_bytes
from tests.server_kit import listening, serving
from tests.test_pacs import STRUCTURES, Hospital, drawn, keep, publish, read_independently, volume

pytestmark = pytest.mark.usefixtures("_password")


@pytest.fixture(scope="module")
def _password() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEGQC_PACS__PASSWORD", PASSWORD)
        yield


@pytest.fixture(autouse=True)
def _still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGQC_PACS__PASSWORD", PASSWORD)


@pytest.fixture(scope="module")
def hospital(orthanc: Orthanc, tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    found = Hospital(orthanc, tmp_path_factory.mktemp("served") / "work", f"P{generate_uid()[-12:]}-")
    found.folder.mkdir()
    found.write(description="axial*", modality=["MR"])
    return found


@pytest.fixture(scope="module")
def stored(hospital: Hospital) -> dict[str, list[FileDataset]]:
    """A scan, a series of its study that is none by the filters, and another patient's series."""
    study = generate_uid()
    own = hospital.add(0, "a", description="axial T2", study=study)
    beside = hospital.add(1, "a", description="coronal T2", study=study)
    other = series(volume(2), "somebody else", "axial T2")
    hospital.store(other)
    return {"own": own, "beside": beside, "other": other}


@pytest.fixture(scope="module")
def client(hospital: Hospital, stored: dict[str, list[FileDataset]], _password: None) -> Iterator[TestClient]:
    with serving(hospital.folder) as found:
        yield found


def path_of(items: list[FileDataset], instance: int | None = None) -> str:
    path = f"/studies/{items[0].StudyInstanceUID}/series/{items[0].SeriesInstanceUID}"
    return path if instance is None else f"{path}/instances/{items[instance].SOPInstanceUID}"


def test_ohifs_questions_are_answered_from_the_pacs(
    hospital: Hospital, client: TestClient, stored: dict[str, list[FileDataset]]
) -> None:
    own = stored["own"]
    studies = client.get("/dicomweb/studies", params={"limit": "101", "offset": "0", "includefield": "00081030"})
    assert [item["0020000D"]["Value"][0] for item in studies.json()] == [own[0].StudyInstanceUID]
    assert client.get("/dicomweb/studies", params={"offset": "1"}).json() == []
    named = {"PatientName": f"{hospital.patient}*"}
    assert len(client.get("/dicomweb/studies", params=named).json()) == 1
    assert client.get("/dicomweb/studies", params={"PatientName": "Nobody*"}).json() == []
    found = client.get(f"/dicomweb/studies/{own[0].StudyInstanceUID}/series").json()
    assert [item["0020000E"]["Value"][0] for item in found] == [own[0].SeriesInstanceUID]
    assert len(client.get("/dicomweb/series").json()) == 1
    assert len(client.get(f"/dicomweb{path_of(own)}/instances").json()) == len(own)
    assert len(client.get(f"/dicomweb/studies/{own[0].StudyInstanceUID}/instances").json()) == len(own)
    assert len(client.get(f"/dicomweb/studies/{own[0].StudyInstanceUID}/metadata").json()) == len(own)
    (header,) = client.get(f"/dicomweb{path_of(own, 2)}/metadata").json()
    assert header["7FE00010"]["BulkDataURI"].startswith(f"http://testserver/dicomweb{path_of(own, 2)}/bulk/")
    pixels = client.get(header["7FE00010"]["BulkDataURI"].removeprefix("http://testserver"))
    assert own[2].PixelData in pixels.content
    frame = client.get(f"/dicomweb{path_of(own, 2)}/frames/1", headers={"Accept": "multipart/related"})
    assert own[2].PixelData in frame.content
    picture = client.get(f"/dicomweb{path_of(own, 2)}/rendered", headers={"Accept": "image/png"})
    assert picture.headers["content-type"] == "image/png"


def test_a_client_of_dicomweb_reads_the_images(hospital: Hospital, stored: dict[str, list[FileDataset]]) -> None:
    own = stored["own"]
    with listening(hospital.folder) as url:
        client = DICOMwebClient(f"{url}/dicomweb")
        study, uid = str(own[0].StudyInstanceUID), str(own[0].SeriesInstanceUID)
        read = client.retrieve_series(study, uid)
        assert {str(item.SOPInstanceUID) for item in read} == {str(item.SOPInstanceUID) for item in own}
        plain = (("application/octet-stream", str(ExplicitVRLittleEndian)),)  # Orthanc knows no choice of several
        (frame,) = client.retrieve_instance_frames(study, uid, str(own[1].SOPInstanceUID), [1], plain)
        assert frame == own[1].PixelData


def test_the_voxels_of_a_scan_are_those_of_its_images(
    hospital: Hospital, client: TestClient, stored: dict[str, list[FileDataset]], tmp_path: Path
) -> None:
    own = stored["own"]
    uid = str(own[0].SeriesInstanceUID)
    hospital.wipe()
    told = client.get(f"/segqc/dicomweb/{uid}").json()
    assert (told["study"], told["series"]) == (own[0].StudyInstanceUID, uid)
    assert told["frame_of_reference"] == own[0].FrameOfReferenceUID
    hospital.wipe()
    answer = client.get("/datastore/image", params={"image": uid})
    (tmp_path / "scan.nii").write_bytes(answer.content)
    voxels = read_scan(tmp_path / "scan.nii").array
    by_uid = {str(item.SOPInstanceUID): item for item in own}
    assert told["axes"] == {"columns": 0, "rows": 1, "slices": 2}
    assert not any(told["flipped"].values())
    for k, instance in enumerate(told["instances"]):
        np.testing.assert_array_equal(voxels[:, :, k].T, by_uid[instance].pixel_array)


@pytest.mark.parametrize("rest", ["", "/metadata", "/instances", "/rendered", "/thumbnail"])
@pytest.mark.parametrize("which", ["beside", "other"])
def test_other_series_are_not_reached(
    client: TestClient, stored: dict[str, list[FileDataset]], which: str, rest: str
) -> None:
    assert client.get(f"/dicomweb{path_of(stored[which])}{rest}").status_code == 404


def test_a_study_tells_of_its_scans_only(
    hospital: Hospital, client: TestClient, stored: dict[str, list[FileDataset]]
) -> None:
    """Its other series and a SEG are in the PACS's own answers."""
    own = stored["own"]
    study = str(own[0].StudyInstanceUID)
    beside = hospital.store([segmentation(drawn(1), volume(), own, {1: "liver"})])
    theirs = hospital.orthanc.ask("GET", "/dicom-web/studies", params={"StudyInstanceUID": study}).json()[0]
    assert set(theirs["00080061"]["Value"]) == {"MR", "SEG"}
    for fields in ({}, {"includefield": "all"}, {"includefield": "00080061,SeriesDescription,00201208"}):
        (told,) = client.get("/dicomweb/studies", params={"StudyInstanceUID": study, **fields}).json()
        assert told["00080061"]["Value"] == ["MR"]
        assert told["00201206"]["Value"] == [1]
        assert told["00201208"]["Value"] == [len(own)]
        assert told["00100020"]["Value"] == [own[0].PatientID]
        assert "0008103E" not in told
        assert "SEG" not in json.dumps(told)
        for path in ("/series", f"/studies/{study}/series", f"{path_of(own)}/instances"):
            for item in client.get(f"/dicomweb{path}", params=fields).json():
                assert not item.keys() & {"00080061", "00080062", "00201206", "00201208", "00201204"}
    for wanted, count in (("MR", 1), ("CT,MR", 1), ("M*", 1), ("", 1), ("SEG", 0), ("CT\\SEG", 0)):
        for name in ("ModalitiesInStudy", "00080061"):
            found = client.get("/dicomweb/studies", params={"StudyInstanceUID": study, name: wanted}).json()
            assert len(found) == count, wanted
    for path, name in (("studies", "SeriesDescription"), ("studies", "00080060"), ("studies", "00201206"),
                       ("series", "ModalitiesInStudy"), (f"studies/{study}/instances", "00201208")):  # fmt: skip
        refused = client.get(f"/dicomweb/{path}", params={name: "coronal*"})
        assert (refused.status_code, name in refused.json()["detail"]) == (400, True), path
    hospital.orthanc.remove_series(beside)  # the tests share the study


def test_no_image_is_reached_by_another_series(client: TestClient, stored: dict[str, list[FileDataset]]) -> None:
    own, beside = stored["own"], stored["beside"]
    mixed = f"/dicomweb{path_of(own)}/instances/{beside[0].SOPInstanceUID}"
    for rest in ("", "/metadata", "/frames/1", "/rendered", "/bulk/7FE00010"):
        assert client.get(f"{mixed}{rest}").status_code == 404
    other = f"/dicomweb/studies/{stored['other'][0].StudyInstanceUID}/series/{own[0].SeriesInstanceUID}"
    assert client.get(f"{other}/metadata").status_code == 404
    for search in ("series", "instances", "studies"):
        params = {"StudyInstanceUID": str(stored["other"][0].StudyInstanceUID)}
        assert client.get(f"/dicomweb/{search}", params=params).json() == []


@pytest.mark.parametrize(
    "path",
    [
        "/dicomweb/../instances",
        "/dicomweb/%2e%2e/instances",
        "/dicomweb/studies/%2e%2e/%2e%2e/instances",
        "/dicomweb/studies/..%2f..%2finstances/series",
        "/dicomweb/studies/{study}/series/{series}/..%2f..%2f..%2f..%2f..%2fsystem",
        "/dicomweb/studies/{study}/series/{series}/instances/{instance}/frames/1%2f..%2f..%2f..",
        "/dicomweb/studies/{study}/series/{series}/instances/{instance}/bulk/../../../../../../system",
        "/dicomweb/studies/{study}/series/{series}/instances/{instance}/bulk/7fe00010%3fx",
        "/dicomweb/studies/{study}%3fx=/series",
        "/dicomweb/studies/{study}%23/series",
        "/dicomweb/studies/{study}%00/series",
        "/dicomweb//127.0.0.1/system",
        "/dicomweb/servers",
        "/proxy/dicom/studies",
    ],
)
def test_tricks_with_paths_lead_nowhere(
    hospital: Hospital, client: TestClient, stored: dict[str, list[FileDataset]], path: str
) -> None:
    own = stored["own"][0]
    asked = path.format(study=own.StudyInstanceUID, series=own.SeriesInstanceUID, instance=own.SOPInstanceUID)
    answer = client.get(asked)
    assert answer.status_code in (400, 404, 422), answer.text
    assert "Orthanc" not in answer.text
    assert hospital.orthanc.rest not in answer.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_is_changed_through_it(client: TestClient, stored: dict[str, list[FileDataset]], method: str) -> None:
    for path in ("/studies", path_of(stored["own"]), path_of(stored["own"], 0)):
        answer = client.request(method, f"/dicomweb{path}", content=to_bytes(stored["other"][0]))
        assert answer.status_code in (404, 405)


def test_nobody_sees_the_password_or_the_address(
    hospital: Hospital, client: TestClient, stored: dict[str, list[FileDataset]]
) -> None:
    own = stored["own"]
    for path in ("/studies", "/series", f"{path_of(own)}/metadata", path_of(own, 0), f"{path_of(own, 0)}/frames/1"):
        answer = client.get(f"/dicomweb{path}")
        shown = answer.text + str(answer.headers)
        assert answer.status_code == 200
        assert PASSWORD not in shown
        assert f"{USER}:" not in shown
        assert hospital.orthanc.rest not in shown
        assert "authorization" not in {name.lower() for name in answer.headers}


def test_a_pacs_that_is_away_is_a_503(
    orthanc: Orthanc, client: TestClient, hospital: Hospital, stored: dict[str, list[FileDataset]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("segqc.pacs.client._PAUSE_SECONDS", 0.0)
    from segqc.server.monailabel.facade import current_app

    source = current_app().context.dataset.pacs
    assert source is not None
    monkeypatch.setattr(source.client, "url", "http://127.0.0.1:9/dicom-web")
    hospital.wipe()
    uid = str(stored["own"][0].SeriesInstanceUID)
    for path in ("/dicomweb/studies", f"/dicomweb{path_of(stored['own'])}", f"/datastore/image?image={uid}",
                 f"/segqc/dicomweb/{uid}"):  # fmt: skip
        answer = client.get(path)
        assert answer.status_code == 503, answer.text
        assert answer.json()["detail"].startswith("the PACS at http://127.0.0.1:9/dicom-web does not answer")


def test_the_loop_goes_on_while_the_cache_is_removed(
    hospital: Hospital, client: TestClient, stored: dict[str, list[FileDataset]], tmp_path: Path
) -> None:
    uid = str(stored["own"][0].SeriesInstanceUID)
    hospital.wipe()
    sample = client.post("/activelearning/segqc", json={"client_id": "anna"}).json()
    assert sample["id"] == uid
    assert Path(sample["path"]).name == f"{uid}.nii"
    shutil.rmtree(hospital.folder / "segqc" / "pacs")
    from segqc.volumes import Volume, write_labels

    write_labels(Volume(drawn(1, 9), volume().affine), tmp_path / "label.nii.gz")
    with (tmp_path / "label.nii.gz").open("rb") as file:
        answer = client.put(
            "/datastore/label",
            params={"image": uid, "tag": "final"},
            data={"params": '{"client_id": "anna"}'},
            files={"label": file},
        )
    assert answer.status_code == 200, answer.text
    hospital.wipe()
    assert client.get("/segqc/pacs").json() == {"problem": None, "to_be_done": 1, "segmentations": []}
    dataset = hospital.open()
    assert publish(dataset) == 1
    told = client.get("/segqc/pacs").json()
    assert (told["to_be_done"], told["segmentations"][0]["state"]) == (0, "stored")
    (seg,) = hospital.orthanc.segmentations(str(stored["own"][0].StudyInstanceUID))
    assert [str(s.SegmentLabel) for s in seg.SegmentSequence] == ["liver", "spleen", "cord"]
    assert keep(dataset, uid, drawn(1, 9)).id


def test_new_series_are_looked_for_at_hand(hospital: Hospital, client: TestClient) -> None:
    def total() -> int:
        return int(client.get("/datastore/?output=stats").json()["total"])

    before = total()
    hospital.add(7, "new", description="axial T2")
    assert client.post("/segqc/pacs/sync").status_code == 200
    until = time.monotonic() + 60
    while total() == before:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert total() == before + 1


def test_what_the_routes_of_a_pacs_refuse_is_documented(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    own = {path: told for path, told in paths.items() if path.startswith(("/dicomweb", "/segqc/pacs"))}
    assert len(own) > 15
    for operations in own.values():
        assert operations.keys() <= {"get", "post"}
        for told in operations.values():
            assert told["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("/Refusal")
    assert [path for path, operations in own.items() if "post" in operations] == ["/segqc/pacs/sync"]


def test_our_panel_works_on_a_scan_of_the_pacs(
    hospital: Hospital, client: TestClient, stored: dict[str, list[FileDataset]]
) -> None:
    own = stored["own"]
    study, uid = str(own[0].StudyInstanceUID), str(own[0].SeriesInstanceUID)
    for name in (study, uid):
        hospital.wipe()
        shown = client.get(f"/segqc/viewer/scans/{name}")
        assert shown.status_code == 200, shown.text
        assert (shown.json()["scan"], shown.json()["series"]) == (uid, uid)
        assert set(shown.json()["instances"]) == {str(item.SOPInstanceUID) for item in own}
    assert client.get(f"/segqc/viewer/scans/{stored['beside'][0].SeriesInstanceUID}").status_code == 404
    # painted slices come by their images' identifiers, in whatever order
    painted = drawn(4, seed=5)
    order = shown.json()["instances"][::-1]
    by_uid = {str(item.SOPInstanceUID): k for k, item in enumerate(own)}
    images = np.stack([painted[:, :, by_uid[instance]].T for instance in order])
    label = shown.json()["label"]
    body = {"instances": order, "started_from": label and label["version"], "client_id": "ben"}
    hospital.wipe()
    kept = client.post(
        f"/segqc/viewer/scans/{uid}/label",
        data={"params": json.dumps(body)},
        files={"voxels": ("voxels", images.astype(np.uint8).tobytes(), "application/octet-stream")},
    )
    assert kept.status_code == 200, kept.text
    dataset = hospital.open()
    publish(dataset)
    seg = hospital.orthanc.segmentations(study)[-1]
    assert seg.SeriesDescription == f"SegQC label version {kept.json()['version']}"
    np.testing.assert_array_equal(read_independently(seg, dataset.read_scan(dataset.scan(uid)), STRUCTURES), painted)
    second = hospital.add(8, "a", description="axial T2 again", study=study)
    until = time.monotonic() + 60
    while client.get(f"/segqc/viewer/scans/{second[0].SeriesInstanceUID}").status_code != 200:
        assert time.monotonic() < until
        client.post("/segqc/pacs/sync")
    both = client.get(f"/segqc/viewer/scans/{study}")
    assert both.status_code == 409
    assert "holds 2 scans" in both.json()["detail"]
    assert client.get(f"/segqc/viewer/scans/{uid}").status_code == 200


def test_the_pages_of_a_pacs(
    orthanc: Orthanc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # one story, as each look at the PACS takes a while
    monkeypatch.setattr("segqc.pacs.client._PAUSE_SECONDS", 0.0)
    own = Hospital(orthanc, tmp_path / "work", f"P{generate_uid()[-12:]}-")
    own.folder.mkdir()
    own.write()
    first, second = own.add(3, "a", description="T2 sagittal"), own.add(4, "b", description="T2 <axial>")
    name, other = str(first[0].SeriesInstanceUID), str(second[0].SeriesInstanceUID)
    study = str(first[0].StudyInstanceUID)
    page = {"Accept": "text/html"}
    with serving(own.folder) as client:
        queue = client.get("/", headers=page).text
        assert f"{own.patient}a, T2 sagittal" in queue and "T2 &lt;axial&gt;" in queue and f'title="{name}"' in queue
        assert f"{own.patient}b" in client.get("/?search=axial", headers=page).text
        scan = client.get(f"/scans/{name}", headers=page).text
        assert f"/ohif/segqc?StudyInstanceUIDs={study}&amp;SeriesInstanceUIDs={name}" in scan
        assert f"Series {name}" in scan
        shown = client.get(f"/segqc/viewer/scans/{name}").json()
        assert shown["title"] == f"{own.patient}a, T2 sagittal"
        assert set(shown["instances"]) == {str(item.SOPInstanceUID) for item in first}, "after a look at the page, too"
        dataset = own.open()
        painted = drawn(1, 9, seed=2)
        version = keep(dataset, name, painted).id
        assert "1 label waits to be stored in the PACS" in client.get("/", headers=page).text
        assert "waits for the PACS" in client.get(f"/scans/{name}", headers=page).text
        sent = client.get(f"/scans/{name}/versions/{version}/label.dcm")
        publish(dataset)
        assert "in the PACS" in client.get(f"/scans/{name}", headers=page).text
        assert "waits to be stored" not in client.get("/", headers=page).text
        (stored,) = own.orthanc.segmentations(study)
        read = pydicom.dcmread(io.BytesIO(sent.content))
        assert (read.SOPInstanceUID, read.PixelData) == (stored.SOPInstanceUID, stored.PixelData)
        np.testing.assert_array_equal(
            read_independently(read, dataset.read_scan(dataset.scan(name)), STRUCTURES), painted
        )
        upload = {"file": ("seg.dcm", sent.content)}
        refused = client.post(f"/scans/{other}/label", files=upload, headers=page).text
        assert "names the images of the scan" in refused
        kept = client.post(f"/scans/{name}/label", files=upload, headers=page).text
        (again,) = re.findall(r"Version (\d+) kept as the final label", kept)
        with dataset.store.read() as transaction:
            label = labels.get(transaction, int(again))
        np.testing.assert_array_equal(read_labels(dataset.store.label_file(label)).array, painted)
        dataset.store.close()
        source = current_app().context.dataset.pacs
        assert source is not None
        monkeypatch.setattr(source.client, "url", "http://127.0.0.1:9/dicom-web")
        source.look_now()
        current_app().context.dataset.sync()
        queue = client.get("/?view=all", headers=page).text
        assert "The PACS is away: the PACS at http://127.0.0.1:9/dicom-web does not answer" in queue
        assert f"{own.patient}a, T2 sagittal" in queue
        own.wipe()
        answer = client.get(f"/scans/{name}/versions/{version}/label.dcm", headers=page)
        assert answer.status_code == 503 and "does not answer" in answer.text
        assert "The slices cannot be shown" in client.get(f"/scans/{name}", headers=page).text
