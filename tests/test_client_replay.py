"""Every method of MONAI Label's own client, against a server that listens: an answer or a 4xx with a sentence."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException

from segqc.loop.dataset import Dataset
from segqc.volumes import Volume, read_labels, write_labels, write_scan
from segqc.volumes.dicom import write_dicom
from tests.server_kit import add_models, draw_case, listening, make_dataset

pytestmark = pytest.mark.server

METHODS = {name for name, _ in inspect.getmembers(MONAILabelClient, inspect.isfunction) if not name.startswith("_")}


class Recorded(MONAILabelClient):
    """The client; it remembers which of its methods were called."""

    def __init__(self, url: str, folder: Path) -> None:
        self.called: set[str] = set()
        super().__init__(url, tmpdir=str(folder), client_id="user-1")

    def __getattribute__(self, name: str) -> object:
        if name in METHODS:
            self.called.add(name)
        return super().__getattribute__(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_dataset(tmp_path_factory.mktemp("replay") / "studies", scans=6, finals=4)
    add_models(made)
    return made


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with listening(folder) as made:
        yield made


def refused(call: Callable[[], object]) -> int:
    """The status of a call that is refused with a sentence."""
    with pytest.raises(MONAILabelClientException) as caught:
        call()
    found = re.fullmatch(r"Status: (4\d\d); Response: (.*)", caught.value.msg, re.DOTALL)
    assert found, caught.value.msg
    detail = json.loads(found[2])["detail"]
    assert isinstance(detail, str)
    assert 10 < len(detail) < 400
    return int(found[1])


def test_every_method_of_the_client_is_answered(url: str, folder: Path, tmp_path: Path) -> None:
    client = Recorded(url, tmp_path)
    assert client.get_server_url() == url
    client.set_server_url(f"{url}/")
    assert not client.auth_enabled()
    assert client.auth_valid_token()  # nobody has to sign in
    assert refused(lambda: client.auth_token("anna", "secret")) == 409
    assert {"segmentation", "segqc"} <= client.info()["models"].keys()

    handed = client.next_sample("segqc", {})
    assert handed["id"] in ("scan_4", "scan_5")
    scan, labels = draw_case(9)
    write_scan(scan, tmp_path / "new.nii.gz")
    write_labels(labels, tmp_path / "mask.nii.gz")
    assert client.upload_image(str(tmp_path / "new.nii.gz"), "new scan") == {"image": "new scan"}
    write_scan(draw_case(10)[0], tmp_path / "other.nii.gz")
    assert refused(lambda: client.upload_image(str(tmp_path / "other.nii.gz"), "new scan")) == 409

    session = client.create_session(str(tmp_path / "new.nii.gz"))["session_id"]
    assert client.get_session(session)["name"] == session
    for arguments in ({"image_id": "new scan"}, {"image_id": "", "session_id": session},
                      {"image_id": "", "file": str(tmp_path / "new.nii.gz")}):  # fmt: skip
        image, params = client.infer("segmentation", params={"result_extension": ".nrrd"}, **arguments)
        mask = read_labels(Path(image))
        assert mask.shape == scan.shape
        assert set(np.unique(mask.array).tolist()) - {0} <= set(params["label_names"].values())
    mask_file = str(tmp_path / "mask.nii.gz")
    _, params = client.infer("segqc", "new scan", {"label_names": {"liver": 1, "spleen": 4}}, label_in=mask_file)
    assert params["assessed"] == "label"
    assert client.remove_session(session)["name"] == session
    assert refused(lambda: client.get_session(session)) == 404
    assert refused(lambda: client.wsi_infer("segmentation", "new scan")) == 404

    names = {"label_names": {"liver": 1, "spleen": 4}}
    saved = client.save_label("new scan", mask_file, params=names)
    assert (saved["image"], saved["label"]) == ("new scan", "new scan")
    back = read_labels(Path(client.download_label("new scan", "final"))).array
    assert np.array_equal(back, np.select([labels.array == 1, labels.array == 4], [1, 2], 0))
    assert client.datastore()["objects"]["new scan"]["labels"]["final"]["info"]["client_id"] == "user-1"

    assert not client.train_status(check_if_running=True)
    assert refused(client.train_status) == 404
    started = client.train_start("segmentation", {"max_epochs": 2})
    assert client.train_status(check_if_running=True)
    assert client.train_status()["id"] == started["id"]
    assert refused(lambda: client.train_start("segmentation", {"max_epochs": 3})) == 429
    assert client.train_stop()["status"] == "STOPPED"
    assert client.train_start(None, {}).keys() == {"segmentation", "segqc"}
    while client.train_status(check_if_running=True):
        assert client.train_stop()["status"] == "STOPPED"
    assert client.train_stop() is None

    # last: with a token, the client sends the headers of one request along with the next ones, too
    client.update_auth({"token_type": "bearer", "access_token": "none is needed"})
    assert client.info()["name"] == "SegQC"
    assert client.called == METHODS, "a method of the client that is not replayed"


@pytest.mark.parametrize("client_id", [None, "user-2"])
def test_dicom_files_are_included_whether_or_not_the_client_has_a_name(
    url: str, folder: Path, tmp_path: Path, client_id: str | None
) -> None:
    name, patient = f"scan of {client_id}", f"patient of {client_id}"
    scan = draw_case(20 if client_id is None else 21)[0]
    write_scan(scan, tmp_path / "tmp1x.nii.gz")
    write_dicom(scan, tmp_path / "series", Path(patient))
    slice_ = next((tmp_path / "series").iterdir())
    assert MONAILabelClient(url, str(tmp_path), client_id).upload_image(str(tmp_path / "tmp1x.nii.gz"), name)
    # 3D Slicer makes a client for each request
    told = MONAILabelClient(url, str(tmp_path), client_id).upload_image(str(slice_), "IMG0001")
    assert told == {"image": name}
    assert Dataset(folder).verify_scan(name).patient == patient
    write_dicom(draw_case(22)[0], tmp_path / "another series", Path("another patient"))
    smaller = Volume(scan.array[:-2], scan.affine)
    write_dicom(smaller, tmp_path / "smaller", Path(patient))
    again = MONAILabelClient(url, str(tmp_path), client_id)
    for wrong in ("another series", "smaller"):
        sent = str(next((tmp_path / wrong).iterdir()))
        assert refused(functools.partial(again.upload_image, sent, "IMG0001")) == 409
    other = MONAILabelClient(url, str(tmp_path), "another")
    assert refused(lambda: other.upload_image(str(slice_), "IMG0001")) == 409


def test_what_the_client_cannot_have_is_a_4xx(url: str, tmp_path: Path) -> None:
    client = MONAILabelClient(url, tmpdir=str(tmp_path))
    damaged = tmp_path / "damaged.nii.gz"
    damaged.write_bytes(b"no volume")
    odd = "../ ?&é"
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "next_sample": (lambda: client.next_sample(odd, {}), 404),
        "create_session": (lambda: client.create_session(str(damaged)), 422),
        "get_session": (lambda: client.get_session("none"), 404),
        "remove_session": (lambda: client.remove_session("none"), 404),
        "upload_image": (lambda: client.upload_image(str(damaged), "damaged"), 422),
        "upload_image, id": (lambda: client.upload_image(str(damaged), odd), 400),
        "save_label": (lambda: client.save_label("scan_0", str(damaged), params={}), 422),
        "save_label, id": (lambda: client.save_label(odd, str(damaged), params={}), 404),
        "save_label, tag": (lambda: client.save_label("scan_0", str(damaged), odd, {}), 400),
        "download_label": (lambda: client.download_label("scan_0", odd), 404),
        "infer": (lambda: client.infer(odd, "scan_0", {}), 404),
        "infer, id": (lambda: client.infer("segmentation", odd, {}), 404),
        "infer, file": (lambda: client.infer("segmentation", "", {}, file=str(damaged)), 422),
        "infer, label": (lambda: client.infer("segqc", "scan_0", {}, label_in=str(damaged)), 422),
        "wsi_infer": (lambda: client.wsi_infer("segmentation", "scan_0", {"level": 0}), 404),
        "train_start": (lambda: client.train_start("unknown", {}), 404),
        "train_start, number": (lambda: client.train_start("segmentation", {"epochs": 10**12}), 400),
    }
    assert {name: refused(call) for name, (call, _) in calls.items()} == {name: s for name, (_, s) in calls.items()}
