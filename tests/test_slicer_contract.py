"""What 3D Slicer's module, its Reviewer and MONAI Label's OHIF panel send and read, call by call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import nrrd
import numpy as np
import pydicom
import pytest
import SimpleITK

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from fastapi.testclient import TestClient

from segqc.loop.dataset import Dataset
from segqc.server.uploads import MAX_REMEMBERED, REMEMBERED_SECONDS, Uploads
from segqc.types import Structure
from segqc.volumes import Volume, read_labels, read_scan, write_labels, write_scan
from segqc.volumes.dicom import write_dicom
from tests.server_kit import AFFINE, CONFIG, add_models, draw_case, make_dataset, serving

pytestmark = pytest.mark.server

GAPS = CONFIG.replace("liver = [1]", "liver = [2]").replace("spleen = [4]", "spleen = [7]")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = make_dataset(tmp_path / "studies", scans=2, finals=0, config=GAPS)
    labels = draw_case(0)[1]
    array = np.select([labels.array == 1, labels.array == 4], [2, 7], 0).astype(np.uint8)
    write_labels(Volume(array, labels.affine), folder / "labels" / "final" / "scan_0.nii.gz")
    return folder


@pytest.fixture
def client(base: Path) -> Iterator[TestClient]:
    with serving(base) as made:
        yield made


def save(client: TestClient, content: bytes, params: dict[str, object], tag: str) -> None:
    answer = client.put(
        f"/datastore/label?image=scan_0&tag={tag}",
        data={"params": json.dumps(params)},
        files={"label": ("scan_0.nrrd", content)},
    )
    assert answer.status_code == 200, answer.text


def test_the_reviewer_saves_versions_and_its_decisions_count(client: TestClient, base: Path, tmp_path: Path) -> None:
    truth = read_labels(base / "labels" / "final" / "scan_0.nii.gz").array
    path = tmp_path / "opened.nii.gz"
    path.write_bytes(client.get("/datastore/label?label=scan_0&tag=final").content)
    opened = read_labels(path)
    assert np.array_equal(opened.array, np.select([truth == 2, truth == 7], [1, 2], 0))
    write_labels(opened, tmp_path / "saved.nrrd")
    content = (tmp_path / "saved.nrrd").read_bytes()
    for number in range(1, 12):
        stored = client.get("/datastore/?output=all").json()["objects"]["scan_0"]
        info = stored["labels"]["final"]["info"]
        assert stored["image"]["info"]["name"] == info["name"] == "scan_0.nii.gz"
        assert {"ts", "client_id"} <= info.keys()
        last = list(stored["labels"])[-1]
        assert (0 if last == "final" else int(last.split("_")[1])) + 1 == number
        save(client, content, {"label_info": info["label_info"]}, f"version_{number}")
        kept = client.get(f"/datastore/label?label=scan_0&tag=version_{number}")
        path.write_bytes(kept.content)
        assert np.array_equal(read_labels(path).array, opened.array)
    meta = {"status": "approved", "level": "easy", "approvedBy": "rita", "comment": "", "editTime": 1}
    for _ in range(2):
        answer = client.put(
            "/datastore/updatelabelinfo?label=scan_0&tag=version_11",
            data={"params": json.dumps({"segmentationMeta": meta})},
        )
        assert answer.status_code == 200, answer.text
    assert client.get("/datastore/image/info?image=scan_0").json()["state"] == "approved"
    told = client.get("/datastore/label/info?label=scan_0&tag=version_11").json()
    assert told["segmentationMeta"] == meta
    flagged = json.dumps({"segmentationMeta": {"status": "flagged", "comment": "spleen cut off"}})
    assert client.put("/datastore/updatelabelinfo?label=scan_0&tag=final", data={"params": flagged}).status_code == 200
    scan = client.get("/datastore/image/info?image=scan_0").json()
    assert (scan["state"], scan["reason"]) == ("rejected", "spleen cut off")
    assert np.array_equal(read_labels(next((base / "labels" / "returned").iterdir())).array, truth)


def test_the_answer_to_submit_begins_with_the_check(client: TestClient, base: Path, tmp_path: Path) -> None:
    """Slicer's module shows nothing of the answer but its text, under "Show Details", from the beginning."""
    add_models(base, (Structure("liver", (2,)), Structure("spleen", (7,))), people=True)
    info = [{"name": name, "idx": value} for value, name in ((1, "liver"), (2, "spleen"))]
    array = draw_case(1)[1].array.copy()
    array[array == 4] = 2
    write_labels(Volume(array, draw_case(1)[1].affine), tmp_path / "label.nrrd")
    answer = client.put(
        "/datastore/label?image=scan_1",
        data={"params": json.dumps({"label_info": info, "model": "segmentation"})},
        files={"label": ("label.nrrd", (tmp_path / "label.nrrd").read_bytes())},
    )
    shown = json.dumps(answer.json(), indent=2).splitlines()
    assert shown[1] == '  "check": {'
    assert shown[2].startswith('    "sentence": "')


def test_models_are_listed_and_a_waiting_training_is_shown_as_running(client: TestClient, base: Path) -> None:
    models = client.get("/info/").json()["models"]
    assert {name: model["type"] for name, model in models.items()} == dict.fromkeys(models, "segmentation")
    assert client.get("/train/?check_if_running=true").status_code == 404
    from segqc.loop.requests import TrainRequest, enqueue
    from segqc.store.events import SERVER

    with Dataset(base).store.write() as transaction:
        enqueue(transaction, TrainRequest(model="segqc"), SERVER)
    for query in ("", "?check_if_running=true"):
        told = client.get(f"/train/{query}").json()
        assert (told["status"], told["model"]) == ("RUNNING", "segqc")
        assert told["details"]
        assert {"epoch", "total_epochs"} <= told.keys()


@pytest.mark.parametrize("network", ["segmentation", "segqc"])
def test_the_trained_network_comes_first_in_the_statistics(client: TestClient, base: Path, network: str) -> None:
    from segqc.loop.requests import TrainRequest, enqueue
    from segqc.store.events import SERVER

    dataset = Dataset(base)
    with dataset.store.write() as transaction:
        enqueue(transaction, TrainRequest(model=network, settings={"epochs": 7}), SERVER)
    stats = client.get("/info/").json()["train_stats"]
    assert next(iter(stats)) == network
    assert {(name == network, told["epoch"], told["total_epochs"]) for name, told in stats.items()} == {
        (True, 0, 7),
        (False, 0, 2),
    }
    curve = dataset.training_folder(network) / "curve.json"
    curve.parent.mkdir(parents=True, exist_ok=True)
    curve.write_text("{damaged")
    told = client.get("/info/").json()["train_stats"][network]
    assert (told["epoch"], told["total_epochs"]) == (0, 7)
    assert "curve.json" in told["problem"]


def test_the_same_volume_may_be_sent_again(client: TestClient, base: Path) -> None:
    content = (base / "scan_1.nii.gz").read_bytes()
    for _ in range(2):
        answer = client.put("/datastore/?image=scan_1", files={"file": ("tmp1x.nii.gz", content)})
        assert (answer.status_code, answer.json()) == (200, {"image": "scan_1"})
    other = (base / "scan_0.nii.gz").read_bytes()
    assert client.put("/datastore/?image=scan_1", files={"file": ("tmp1x.nii.gz", other)}).status_code == 409


def test_the_same_volume_in_another_format_is_the_same_scan(client: TestClient, base: Path, tmp_path: Path) -> None:
    scan = draw_case(1)[0]
    for suffix in (".nrrd", ".nii"):
        write_scan(scan, tmp_path / f"again{suffix}")
        sent = (f"again{suffix}", (tmp_path / f"again{suffix}").read_bytes())
        answer = client.put("/datastore/?image=scan_1", files={"file": sent})
        assert (answer.status_code, answer.json()) == (200, {"image": "scan_1"})
    changed = scan.array.copy()
    changed[0, 0, 0] += 1
    write_scan(Volume(changed, scan.affine), tmp_path / "other.nii")
    other = ("other.nii", (tmp_path / "other.nii").read_bytes())
    assert client.put("/datastore/?image=scan_1", files={"file": other}).status_code == 409
    client.delete("/datastore/?id=scan_1")
    assert client.put("/datastore/?image=scan_1", files={"file": sent}).status_code == 409


def test_a_volume_may_come_by_the_suffix_that_is_set_for_segmentations(
    client: TestClient, base: Path, tmp_path: Path
) -> None:
    """The extension's setting "File Extension" is for scans and label maps alike."""
    scan, labels = draw_case(5)
    write_scan(scan, tmp_path / "volume.nrrd")
    sent = ("tmp1x.seg.nrrd", (tmp_path / "volume.nrrd").read_bytes())
    answer = client.put("/datastore/?image=MRHead", files={"file": sent})
    assert (answer.status_code, answer.json()) == (200, {"image": "MRHead"})
    assert np.array_equal(read_scan(base / "MRHead.nrrd").array, scan.array)
    session = client.put("/session/", files={"files": sent})
    assert session.status_code == 200, session.text
    add_models(base, (Structure("liver", (2,)), Structure("spleen", (7,))))
    data = {"params": json.dumps({"result_extension": ".nrrd", "result_dtype": "uint8"})}
    answer = client.post(f"/infer/segmentation?session_id={session.json()['session_id']}&output=image", data=data)
    assert answer.status_code == 200, answer.text
    write_segmentation(tmp_path / "a.seg.nrrd", (labels.array == 1)[None].astype(np.uint8), [("liver", 0, 1)], AFFINE)
    segmentation = ("tmp2x.seg.nrrd", (tmp_path / "a.seg.nrrd").read_bytes())
    for answer in (
        client.put("/datastore/?image=other", files={"file": segmentation}),
        client.put("/session/", files={"files": segmentation}),
    ):
        assert answer.status_code == 422 and "is a segmentation by its header, and no scan" in answer.text


@pytest.mark.parametrize("suffix", [".mha", ".seg.nrrd", ".NRRD", ".nii"])
def test_label_maps_are_received_under_their_own_suffix(client: TestClient, suffix: str) -> None:
    damaged = (f"mask{suffix}", b"damaged")
    for answer in (
        client.put("/datastore/label?image=scan_0", files={"label": damaged}),
        client.post("/infer/segqc?image=scan_0", files={"label": damaged}),
    ):
        assert answer.status_code == 422, answer.text
    assert (client.put("/datastore/?image=x", files={"file": damaged}).status_code == 415) == (suffix == ".mha")


@pytest.fixture
def dicom_slice(tmp_path: Path) -> Path:
    write_dicom(draw_case(1)[0], tmp_path / "series", Path("P7"))
    return sorted((tmp_path / "series").iterdir())[0]


def upload(client: TestClient, name: str, file: Path, actor: str = "user-1") -> httpx.Response:
    """As MONAI Label's client uploads: the file's whole path is its name."""
    return client.put(
        "/datastore/",
        params={"image": name},
        data={"params": json.dumps({"client_id": actor})},
        files={"file": (str(file), file.read_bytes())},
    )


def edited(slice_: Path, name: str, **values: str | None) -> Path:
    item = pydicom.dcmread(slice_)
    for keyword, value in values.items():
        if value is None:
            delattr(item, keyword)
        else:
            setattr(item, keyword, value)
    path = slice_.with_name(name)
    item.save_as(path)
    return path


def test_a_slice_after_its_volume_tells_the_patient(client: TestClient, base: Path, dicom_slice: Path) -> None:
    assert upload(client, "IMG0001", dicom_slice).status_code == 409
    assert upload(client, "scan_1", base / "scan_1.nii.gz").status_code == 200
    assert upload(client, "IMG0001", dicom_slice, "user-2").status_code == 409
    before = Dataset(base).verify_scan("scan_1")
    assert before.patient == "scan_1"
    for _ in range(2):
        answer = upload(client, "IMG0001", dicom_slice)
        assert (answer.status_code, answer.json()) == (200, {"image": "scan_1"})
    series = str(pydicom.dcmread(dicom_slice).SeriesInstanceUID)
    assert json.loads((base / "scan_1.json").read_text()) == {"PatientID": "P7", "SeriesInstanceUID": series}
    assert Dataset(base).verify_scan("scan_1").patient == "P7"
    assert upload(client, "IMG0002", edited(dicom_slice, "later.dcm", PatientID="P8")).status_code == 200
    assert Dataset(base).verify_scan("scan_1").patient == "P7", "what the first slice said stays"
    assert not list(base.rglob("*.dcm"))
    assert [e["verb"] for e in client.get("/segqc/events/scan_1").json()].count("patient assigned") == 1


def test_a_slice_that_is_none_is_refused_and_changes_nothing(client: TestClient, base: Path, dicom_slice: Path) -> None:
    upload(client, "scan_1", base / "scan_1.nii.gz")
    content = dicom_slice.read_bytes()
    report = edited(dicom_slice, "report.dcm", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", Modality="SR")
    wrong = [b"", b"damaged", content[:100], content[:300], content[:-100], content[:132] + b"\xff" * 500,
             report.read_bytes(), edited(dicom_slice, "lone.dcm", SeriesInstanceUID=None).read_bytes(),
             edited(dicom_slice, "bare.dcm", PixelData=None).read_bytes(),
             edited(dicom_slice, "long.dcm", PatientID="P" * 300).read_bytes(),
             (base / "scan_1.nii.gz").read_bytes()]  # fmt: skip
    for number, damaged in enumerate(wrong):
        file = dicom_slice.with_name("wrong.dcm")
        file.write_bytes(damaged)
        answer = upload(client, "IMG0001", file)
        assert answer.status_code == 422, (number, answer.text)
        assert answer.json()["detail"].startswith("the DICOM file "), answer.text
        assert "/" not in answer.json()["detail"]
    assert not (base / "scan_1.json").exists()
    assert Dataset(base).verify_scan("scan_1").patient == "scan_1"


@pytest.mark.parametrize(
    ("config", "patient"),
    [
        ('patient_tag = "StudyID"\n', "S9"),
        ('patient_tag = "0020,0010"\n', "S9"),
        ('patients = {"Anna" = ["scan_1"]}\n', "Anna"),
        ("patient_pattern = 's.a'\n", "sca"),
    ],
)
def test_the_settings_say_by_what_a_slice_tells_the_patient(
    base: Path, dicom_slice: Path, config: str, patient: str
) -> None:
    (base / "segqc.toml").write_text(config + GAPS)
    with serving(base) as client:
        upload(client, "scan_1", base / "scan_1.nii.gz")
        assert upload(client, "IMG0001", edited(dicom_slice, "s9.dcm", StudyID="S9")).status_code == 200
    assert Dataset(base).verify_scan("scan_1").patient == patient


def test_the_patient_of_a_scan_that_was_worked_on_stays(client: TestClient, base: Path, dicom_slice: Path) -> None:
    assert upload(client, "scan_0", base / "scan_0.nii.gz").status_code == 200
    assert upload(client, "IMG0001", dicom_slice).status_code == 200
    assert Dataset(base).verify_scan("scan_0").patient == "scan_0"


def test_the_memory_of_uploads_is_bounded() -> None:
    now = [0.0]
    uploads = Uploads(lambda: now[0])
    for number in range(MAX_REMEMBERED + 5):
        uploads.note(f"client {number}", f"scan {number}")
    assert [uploads.last(f"client {number}") for number in (4, 5)] == [None, "scan 5"]
    uploads.note("client 5", "another scan")
    now[0] = REMEMBERED_SECONDS - 1
    assert uploads.last("client 5") == "another scan"
    now[0] = REMEMBERED_SECONDS + 1
    assert uploads.last("client 5") is None


def test_names_that_become_one_id_are_still_two_scans(client: TestClient, base: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.nii.gz" for number in (0, 1)]
    for number, file in enumerate(files):
        write_scan(draw_case(5 + number)[0], file)
    told = {"image": "2_ AX"}
    for name in ("2: AX", "2_ AX", "2/ AX".replace("/", "|")):
        answer = upload(client, name, files[0])
        assert (answer.status_code, answer.json()) == (200, told), "the same content is the same scan"
        answer = upload(client, name, files[1])
        assert (answer.status_code, answer.json()["image"]) == (409, told["image"])
        assert "'2_ AX'" in answer.json()["detail"]
    answer = upload(client, "2_ ax", files[1])
    assert (answer.status_code, answer.json()["image"]) == (409, told["image"]), "one name on some file systems"
    assert np.array_equal(read_scan(base / "2_ AX.nii.gz").array, read_scan(files[0]).array)
    assert len(list(base.glob("2*"))) == 1


def write_segmentation(
    path: Path, layers: np.ndarray, segments: list[tuple[str, int, int]], affine: np.ndarray
) -> None:
    """A ``.seg.nrrd``: layers first, and name, layer and value of each segment."""
    header = {
        "space": "left-posterior-superior",
        "space directions": np.vstack([np.full(3, np.nan), (np.diag([-1, -1, 1]) @ affine[:3, :3]).T]),
        "space origin": np.diag([-1, -1, 1]) @ affine[:3, 3],
        "kinds": ["list", "domain", "domain", "domain"],
    }
    for number, (name, layer, value) in enumerate(segments):
        own = {"ID": f"Segment_{number}", "Name": name, "Layer": layer, "LabelValue": value}
        header |= {f"Segment{number}_{key}": str(told) for key, told in own.items()}
    nrrd.write(str(path), layers, header, index_order="F")


@pytest.mark.parametrize("suffix", [".mha", ".nii", ".nii.gz", ".nrrd", ".seg.nrrd"])
def test_a_label_map_of_each_format_is_stored_by_its_names(
    client: TestClient, base: Path, tmp_path: Path, suffix: str
) -> None:
    labels = draw_case(1)[1]
    spleen, liver = labels.array == 4, labels.array == 1
    path = tmp_path / f"sent{suffix}"
    params: dict[str, object] = {"client_id": "user-1"}
    if suffix == ".seg.nrrd":
        layers = np.stack([spleen, np.where(liver, 9, 0)]).astype(np.uint8)
        write_segmentation(path, layers, [("Spleen", 0, 1), ("liver", 1, 9)], labels.affine)
    else:
        image = SimpleITK.GetImageFromArray(np.select([spleen, liver], [1, 2], 0).astype(np.uint8).T)
        lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ labels.affine
        spacing = np.linalg.norm(lps[:3, :3], axis=0)
        image.SetSpacing(spacing.tolist())
        image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
        image.SetOrigin(lps[:3, 3].tolist())
        SimpleITK.WriteImage(image, str(path), suffix != ".nii")
        params["label_info"] = [{"name": "spleen", "idx": 1}, {"name": "liver", "idx": 2}]
    answer = client.put(
        "/datastore/label?image=scan_1",
        data={"params": json.dumps(params)},
        files={"label": (str(path), path.read_bytes())},
    )
    assert answer.status_code == 200, answer.text
    stored = read_labels(base / "labels" / "final" / "scan_1.nii.gz").array
    assert np.array_equal(stored, np.select([liver, spleen], [2, 7], 0))


def test_what_a_network_answers_may_be_sent_back_as_it_is(client: TestClient, base: Path, tmp_path: Path) -> None:
    add_models(base, (Structure("liver", (2,)), Structure("spleen", (7,))))
    data = {"params": json.dumps({"result_extension": ".nrrd", "result_dtype": "uint8"})}
    names = client.post("/infer/segmentation?image=scan_1&output=json", data=data).json()["label_names"]
    assert names == {"liver": 1, "spleen": 2}
    answer = client.post("/infer/segmentation?image=scan_1&output=image", data=data)
    (tmp_path / "answer.nrrd").write_bytes(answer.content)
    mask = read_labels(tmp_path / "answer.nrrd").array
    assert set(np.unique(mask).tolist()) == {0, 1, 2}
    info = [{"name": name, "idx": value} for name, value in names.items()]
    for params in ({"label_info": info}, {"label_names": names}):
        save(client, answer.content, params, "again")
        stored = read_labels(base / "labels" / "again" / "scan_0.nii.gz").array
        assert np.array_equal(stored, np.select([mask == 1, mask == 2], [2, 7], 0))
        told = client.get("/datastore/label/info?label=scan_0&tag=again").json()
        assert told["label_info"] == info
        assert told["params"]["label_names"] == names
    volumes = []
    for order in (info, info[::-1]):
        values = {entry["name"]: value for value, entry in enumerate(order, 1)}
        sent = np.select([mask == 1, mask == 2], [values["liver"], values["spleen"]], 0).astype(np.uint8)
        write_labels(Volume(sent, draw_case(1)[1].affine), tmp_path / "sent.nii.gz")
        told = client.post(
            "/infer/segqc?image=scan_1&output=json",
            data={"params": json.dumps({"label_info": order})},
            files={"label": ("sent.nii.gz", (tmp_path / "sent.nii.gz").read_bytes())},
        ).json()
        volumes.append([(s["name"], s["mask_volume_ml"]) for s in told["assessment"]["structures"]])
    assert volumes[0] == volumes[1]
    assert volumes[0][0][1] != volumes[0][1][1]


def test_a_volumes_name_in_slicer_is_accepted_after_its_upload(client: TestClient, base: Path, tmp_path: Path) -> None:
    name, (scan, labels) = "2: AX T2", draw_case(5)
    write_scan(scan, tmp_path / "new.nii.gz")
    content = (tmp_path / "new.nii.gz").read_bytes()
    for _ in range(2):
        answer = client.put("/datastore/", params={"image": name}, files={"file": ("tmp1x.nii.gz", content)})
        assert (answer.status_code, answer.json()) == (200, {"image": "2_ AX T2"})
    write_labels(Volume(np.where(labels.array == 4, 1, 0).astype(np.uint8), labels.affine), tmp_path / "mask.nrrd")
    params = json.dumps({"label_info": [{"name": "spleen", "idx": 2}], "client_id": "user-xyz"})
    mask = ("mask.nrrd", (tmp_path / "mask.nrrd").read_bytes())
    saved = client.put("/datastore/label", params={"image": name}, data={"params": params}, files={"label": mask})
    assert saved.status_code == 200, saved.text
    stored = read_labels(base / "labels" / "final" / "2_ AX T2.nii.gz").array
    assert np.array_equal(stored == 7, labels.array == 4)
    for query in ("/datastore/image", "/datastore/image/info"):
        assert client.get(query, params={"image": name}).status_code == 200
    for query in ("/datastore/label", "/datastore/label/info"):
        assert client.get(query, params={"label": name, "tag": "final"}).status_code == 200
