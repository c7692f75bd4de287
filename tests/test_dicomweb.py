"""DICOMweb on a folder of scans: what searches find, and that other readers get every voxel at its place."""

from __future__ import annotations

import io
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import requests
import SimpleITK as sitk  # noqa: N813 (the field's habit)

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from dicomweb_client import DICOMwebClient
from fastapi.testclient import TestClient
from PIL import Image
from pydicom.dataset import Dataset as DicomDataset
from pydicom.pixel_data_handlers.util import apply_voi_lut
from requests.adapters import BaseAdapter

from segqc.loop.dataset import Dataset
from segqc.server.dicomweb import archive, routes
from segqc.server.dicomweb.archive import Archive
from segqc.server.dicomweb.cache import BoundedCache
from segqc.server.dicomweb.query import Query
from segqc.server.dicomweb.rendering import Window
from segqc.server.dicomweb.search import found_slices, found_studies
from segqc.server.dicomweb.series import DicomScan, ScanHeader, ScanImages, to_file
from segqc.server.errors import RequestError
from segqc.server.monailabel.facade import current_app
from segqc.store.events import FOLDER
from segqc.store.scans import assign_patient
from segqc.volumes import AffineArray, Array, Volume, read_scan, slice_layout, write_scan
from segqc.volumes.dicom_images import ImagePlanes, quantise
from tests.server_kit import listening, serving

NAMES = "chest", "flipped", "oblique", "coronal", "sagittal", "cube", "float", "high", "thin", "zoë"
CONFIG = """
[patients]
"Müller^Anna" = ["oblique", "coronal"]
"""


def rotation(*degrees: float) -> AffineArray:
    """A turn about each axis in turn."""
    turned = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        i, j = (a for a in range(3) if a != axis)
        turn = np.eye(3)
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        turned = turned @ turn
    return turned


def affine_of(directions: AffineArray, spacing: tuple[float, float, float]) -> AffineArray:
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = -31.7, 12.25, 104.5
    return affine


def scans() -> dict[str, Volume]:
    """Scans of all kinds of geometry and of intensities, by the names of their files."""
    rng = np.random.default_rng(1)
    lps = np.diag([-1.0, -1.0, 1.0])
    whole = rng.integers(-1000, 2000, (9, 7, 5)).astype(np.int16)
    real = rng.normal(0.5, 0.1, (9, 7, 5)).astype(np.float32)
    return {
        "chest.nii.gz": Volume(whole, affine_of(np.eye(3), (0.7, 0.7, 3.0))),
        "flipped.nrrd": Volume(whole, affine_of(lps[:, [1, 0, 2]] * [1, -1, -1], (0.7, 0.8, 3.0))),
        "oblique.nii.gz": Volume(whole, affine_of(rotation(20, -35, 11), (1.1, 0.9, 2.5))),
        "coronal.nii": Volume(whole, affine_of(np.eye(3), (0.7, 4.0, 0.7))),
        "sagittal.nrrd": Volume(whole, affine_of(rotation(5, 3, -8) * [-1, 1, 1], (4.0, 0.7, 0.8))),
        "cube.nrrd": Volume(whole, affine_of(rotation(170, 5, 95), (1.0, 1.0, 1.0))),
        "float.nii.gz": Volume(real, affine_of(rotation(0, 0, 30), (0.7, 0.7, 3.0))),
        "high.nrrd": Volume(whole.astype(np.int32) + 40000, affine_of(np.eye(3), (0.7, 0.7, 3.0))),
        "thin.nii.gz": Volume(whole[:, :, :1], affine_of(-np.eye(3), (0.7, 0.7, 8.0))),
        "zoë.nii.gz": Volume(np.full((4, 5, 3), 7, np.uint8), affine_of(np.eye(3), (1.0, 1.0, 2.0))),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("dicomweb") / "scans"
    made.mkdir()
    (made / "segqc.toml").write_text(CONFIG)
    (made / "chest.json").write_text(json.dumps({"Modality": "CT"}))
    for name, volume in scans().items():
        write_scan(volume, made / name)
    return made


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with serving(folder) as made:
        yield made


class InProcess(BaseAdapter):
    """Lets what is built on `requests` ask the application in this process."""

    def __init__(self, client: TestClient) -> None:
        super().__init__()
        self._client = client

    def send(self, request: requests.PreparedRequest, **_: Any) -> requests.Response:  # type: ignore[override]
        found = self._client.request(str(request.method), str(request.url), headers=dict(request.headers))
        answer = requests.Response()
        answer.status_code, answer.url, answer.request = found.status_code, str(request.url), request
        answer.headers.update(found.headers)
        answer._content = found.content
        return answer

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def web(client: TestClient) -> DICOMwebClient:
    session = requests.Session()
    session.mount("http://", InProcess(client))
    return DICOMwebClient("http://testserver/dicomweb", session=session)


@dataclass(frozen=True)
class Names:
    """A scan's identifiers, as our own route tells them."""

    study: str
    series: str
    instances: list[str]
    axes: Mapping[str, int]
    flipped: Mapping[str, bool]

    @property
    def path(self) -> str:
        return f"/dicomweb/studies/{self.study}/series/{self.series}"

    def slice(self, index: int) -> str:
        return f"{self.path}/instances/{self.instances[index]}"


def names_of(client: TestClient, scan: str) -> Names:
    told = client.get(f"/segqc/dicomweb/{scan}").json()
    return Names(told["study"], told["series"], told["instances"], told["axes"], told["flipped"])


def value(item: Mapping[str, Any], keyword: str) -> Any:
    """The first value of an attribute in the DICOM JSON model; None where it is empty."""
    tag = pydicom.datadict.tag_for_keyword(keyword)
    found = item[f"{tag:08X}"].get("Value", [None])[0]
    return found["Alphabetic"] if isinstance(found, dict) else found


def assert_same_voxels(expected: Volume, array: Array, affine: AffineArray, tolerance: float = 0.0) -> None:
    """Each voxel has its value at its place in the world, whatever the order of axes."""
    index = np.indices(expected.shape).reshape(3, -1)
    there = np.linalg.solve(
        affine[:3, :3], (expected.affine[:3, :3] @ index + expected.affine[:3, 3:]) - affine[:3, 3:]
    )
    assert np.abs(there - np.rint(there)).max() < 1e-4
    assert sorted(array.shape) == sorted(expected.shape)
    found = array[tuple(np.rint(there).astype(int))]
    np.testing.assert_allclose(found, expected.array.reshape(-1), rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------------- voxels and places


def read_by_itk(folder: Path) -> tuple[Array, AffineArray]:
    """A DICOM series as SimpleITK reads it, with its affine to RAS."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


@pytest.mark.parametrize("scan", NAMES)
def test_other_readers_find_every_voxel_at_its_place(
    client: TestClient, web: DICOMwebClient, folder: Path, tmp_path: Path, scan: str
) -> None:
    names = names_of(client, scan)
    for number, item in enumerate(web.retrieve_series(names.study, names.series)):
        item.save_as(tmp_path / f"{number}.dcm", write_like_original=False)
    (file,) = (name for name in scans() if name.startswith(f"{scan}."))
    expected = read_scan(folder / file)
    tolerance = 0.51 * np.ptp(expected.array) / 65535 if scan == "float" else 0.0
    if expected.shape[2] > 1:  # ITK takes the spacing of a single slice from elsewhere
        assert_same_voxels(expected, *read_by_itk(tmp_path), tolerance)
    own = read_scan(tmp_path)
    assert_same_voxels(expected, own.array, own.affine, tolerance)


@pytest.mark.parametrize("scan", NAMES)
def test_metadata_and_frames_hold_the_slices_in_the_order_of_the_file(
    client: TestClient, web: DICOMwebClient, folder: Path, scan: str
) -> None:
    names = names_of(client, scan)
    (file,) = (name for name in scans() if name.startswith(f"{scan}."))
    volume = read_scan(folder / file)
    layout = slice_layout(volume)
    assert names.axes == {"columns": layout.column_axis, "rows": layout.row_axis, "slices": layout.slice_axis}
    assert names.flipped == {"columns": layout.flip_columns, "rows": layout.flip_rows, "slices": False}
    by_uid = {value(item, "SOPInstanceUID"): item for item in web.retrieve_series_metadata(names.study, names.series)}
    assert list(by_uid) == names.instances
    images = np.empty(layout.to_images(volume.array).shape)
    for number, uid in enumerate(names.instances):
        item = DicomDataset.from_json(by_uid[uid], lambda *_: b"")
        (frame,) = web.retrieve_instance_frames(names.study, names.series, uid, [1])
        kind = "<i2" if item.PixelRepresentation else "<u2"
        stored = np.frombuffer(frame, kind).reshape(item.Rows, item.Columns)
        images[number] = stored * float(item.RescaleSlope) + float(item.RescaleIntercept)
        assert item.InstanceNumber == number + 1
        # the centre of the first pixel, and of one in the middle of the slice
        across, down = (np.array(item.ImageOrientationPatient[i : i + 3]) for i in (0, 3))
        first = np.array(item.ImagePositionPatient)
        row, column = item.Rows // 2, item.Columns // 3
        there = first + column * item.PixelSpacing[1] * across + row * item.PixelSpacing[0] * down
        voxel = np.zeros(3)
        voxel[layout.slice_axis] = number
        voxel[layout.row_axis] = item.Rows - 1 - row if layout.flip_rows else row
        voxel[layout.column_axis] = item.Columns - 1 - column if layout.flip_columns else column
        world = volume.affine[:3, :3] @ voxel + volume.affine[:3, 3]
        np.testing.assert_allclose(there * [-1, -1, 1], world, atol=1e-4)
    tolerance = 0.51 * np.ptp(volume.array) / 65535 if scan == "float" else 0.0
    np.testing.assert_allclose(layout.from_images(images), volume.array, rtol=0, atol=tolerance)


def test_slices_are_shown_as_radiologists_look_at_them(client: TestClient) -> None:
    wanted = {"chest": "LP", "flipped": "LP", "coronal": "LF", "sagittal": "PF"}
    for scan, directions in wanted.items():
        names = names_of(client, scan)
        item = client.get(f"{names.slice(0)}/metadata").json()[0]
        orientation = np.array(item["00200037"]["Value"]).reshape(2, 3)
        found = ""
        for direction in orientation:
            axis = int(np.abs(direction).argmax())
            found += ("LPH" if direction[axis] > 0 else "RAF")[axis]
        assert found == directions, scan


@pytest.mark.parametrize(
    ("axes", "signs"), list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))
)
def test_a_label_map_goes_to_images_and_back(axes: tuple[int, ...], signs: tuple[int, ...]) -> None:
    spacing = np.array([0.7, 0.8, 3.0])[np.argsort(axes)]
    affine = affine_of(np.eye(3)[:, axes] * signs, (spacing[0], spacing[1], spacing[2]))
    volume = Volume(np.arange(4 * 5 * 6).reshape(4, 5, 6), affine)
    layout = slice_layout(volume)
    images = layout.to_images(volume.array)
    np.testing.assert_array_equal(layout.from_images(images), volume.array)
    assert_same_voxels(volume, images.transpose(2, 1, 0), layout.affine_of_images(volume))


def test_axes_that_are_not_quite_orthogonal_are_noted_as_the_nearest_that_are() -> None:
    affine = affine_of(rotation(10, 20, 30) @ [[1, 4e-4, 0], [0, 1, 3e-4], [0, 0, 1]], (0.7, 0.8, 3.0))
    planes = ImagePlanes.from_ras((5, 200, 240), affine)
    item = DicomDataset()
    planes.describe(item)
    planes.place(item, 2)
    across, down = (np.array(item.ImageOrientationPatient[i : i + 3]) for i in (0, 3))
    np.testing.assert_allclose([across @ down, across @ across, down @ down], [0, 1, 1], atol=1e-9)
    corner = np.array(item.ImagePositionPatient) + 239 * 0.7 * across + 199 * 0.8 * down
    expected = (np.diag([-1, -1, 1, 1]) @ affine @ [239, 199, 2, 1])[:3]
    assert np.abs(corner - expected).max() < 0.05


@pytest.mark.usefixtures("client")
def test_a_series_of_dicom_files_is_served_by_its_voxels(tmp_path: Path) -> None:
    volume = scans()["oblique.nii.gz"]
    write_scan(volume, tmp_path / "series")
    read = read_scan(tmp_path / "series")
    scan = DicomScan(current_app().context.archive.named("oblique").record)
    header = ScanHeader.of(scan, read, None)
    images = ScanImages.of(read, header.layout)
    served = tmp_path / "served"
    served.mkdir()
    for index in range(header.count):
        (served / f"{index}.dcm").write_bytes(to_file(header, images, index))
    again = read_scan(served)
    assert_same_voxels(volume, again.array, again.affine)


@pytest.mark.parametrize(
    ("low", "high", "kind", "intercept"),
    [
        (-5, 9, "int16", 0),
        (0, 65535, "uint16", 0),
        (-20000, 45535, "uint16", -20000),
        (10**6, 10**6 + 9, "uint16", 10**6),
    ],
)
def test_whole_numbers_of_16_bits_are_kept_exactly(low: int, high: int, kind: str, intercept: int) -> None:
    images = np.linspace(low, high, 24).round().astype(np.float32).reshape(2, 3, 4)
    pixels = quantise(images)
    assert (pixels.stored.dtype, float(pixels.slope), float(pixels.intercept)) == (kind, 1, intercept)
    np.testing.assert_array_equal([pixels.values(0), pixels.values(1)], images)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1e12, 1e12), (3.25, 3.25), (1e-30, 3e-30), (0, 70000)])
def test_other_numbers_are_kept_to_a_share_of_their_range(low: float, high: float) -> None:
    images = np.linspace(low, high, 24).astype(np.float32).reshape(2, 3, 4)
    pixels = quantise(images)
    tolerance = 0.51 * float(images.max() - images.min()) / 65535
    np.testing.assert_allclose([pixels.values(0), pixels.values(1)], images, rtol=1e-7, atol=tolerance)


# -------------------------------------------------------------------------------------------------------- identifiers


def test_identifiers_are_the_same_again_and_of_a_form_that_dicom_allows(folder: Path, client: TestClient) -> None:
    names = names_of(client, "oblique")
    uids = [names.study, names.series, *names.instances]
    assert len({*uids}) == len(uids)
    assert all(pydicom.uid.UID(uid).is_valid and uid.startswith("2.25.") for uid in uids)
    again = Archive(Dataset(folder), 0)
    scan = again.named("oblique")
    assert (scan.study_uid, scan.series_uid, list(again.header(scan).instances)) == (
        names.study,
        names.series,
        names.instances,
    )


# ----------------------------------------------------------------------------------------------------------- searches


def found_names(answer: list[dict[str, Any]]) -> list[str]:
    return [value(item, "StudyDescription") for item in answer]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", NAMES),
        ("PatientID=chest", ["chest"]),
        ("00100020=chest", ["chest"]),
        ("PatientName=müller*", ["coronal", "oblique"]),
        ("PatientID=müller*", []),  # numbers and codes are told apart by case, names are not
        ("PatientID=*", NAMES),
        ("PatientID=", NAMES),
        ("StudyDescription=?hest", ["chest"]),
        ("StudyDescription=[c]hest", []),
        ("ModalitiesInStudy=CT", ["chest"]),
        ("ModalitiesInStudy=CT&PatientID=cube", []),
        ("NumberOfStudyRelatedInstances=1", ["thin"]),
        ("StudyDate=20200101-20210101", []),
        ("BodyPartExamined=HEAD", []),
        ("RequestAttributesSequence.ScheduledProcedureStepID=1", []),
        ("limit=2", NAMES),
        ("limit=2&offset=3", NAMES),
        ("offset=100", []),
        ("limit=0", []),
        ("limit=1&offset=1&ModalitiesInStudy=MR", NAMES),
    ],
)
def test_studies_are_found_by_their_attributes(client: TestClient, query: str, expected: list[str]) -> None:
    answer = client.get(f"/dicomweb/studies?includefield=StudyDescription&{query}")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/dicom+json"
    wanted = sorted(expected)
    if "ModalitiesInStudy=MR" in query:
        wanted.remove("chest")
    limits = dict(part.split("=") for part in query.split("&") if part.startswith(("limit", "offset")))
    start = int(limits.get("offset", 0))
    page = wanted[start : start + int(limits["limit"])] if "limit" in limits else wanted[start:]
    assert sorted(found_names(answer.json())) == page


def test_studies_tell_the_usual_and_what_is_asked_for(client: TestClient) -> None:
    (usual,) = client.get("/dicomweb/studies?PatientID=chest").json()
    assert value(usual, "PatientName") == "chest"
    assert value(usual, "ModalitiesInStudy") == "CT"
    assert value(usual, "NumberOfStudyRelatedInstances") == 5
    assert value(usual, "RetrieveURL") == f"http://testserver/dicomweb/studies/{value(usual, 'StudyInstanceUID')}"
    assert usual["00080020"] == {"vr": "DA"}
    assert "00081030" not in usual
    for field in ("00081030", "StudyDescription", "00100020,00081030", "all"):
        (found,) = client.get(f"/dicomweb/studies?PatientID=chest&includefield={field}").json()
        assert value(found, "StudyDescription") == "chest"
        assert found.items() >= usual.items()


def test_studies_are_found_by_several_identifiers(client: TestClient) -> None:
    one, other = (names_of(client, scan).study for scan in ("chest", "cube"))
    for separator in (",", "\\"):
        answer = client.get("/dicomweb/studies", params={"StudyInstanceUID": f"{one}{separator}{other}"})
        assert [value(item, "StudyInstanceUID") for item in answer.json()] == [one, other]


def test_series_and_instances_are_found(client: TestClient, web: DICOMwebClient) -> None:
    names = names_of(client, "sagittal")
    (series,) = web.search_for_series(names.study)
    assert value(series, "SeriesInstanceUID") == names.series
    assert (value(series, "Modality"), value(series, "NumberOfSeriesRelatedInstances")) == ("MR", 9)
    assert value(series, "SeriesDescription") == "sagittal"
    for found in (web.search_for_instances(names.study), web.search_for_instances(names.study, names.series)):
        assert [value(item, "SOPInstanceUID") for item in found] == names.instances
        assert (value(found[0], "Rows"), value(found[0], "Columns")) == (5, 7)
    assert web.search_for_series(names.study, search_filters={"Modality": "CT"}) == []
    (third,) = web.search_for_instances(
        names.study, search_filters={"InstanceNumber": 3}, fields=["ImagePositionPatient"]
    )
    assert value(third, "SOPInstanceUID") == names.instances[2]
    assert len(third["00200032"]["Value"]) == 3
    everything = web.search_for_series(fields=["StudyDescription"])
    assert len(everything) == len(NAMES)
    (page,) = client.get("/dicomweb/instances?limit=1&offset=6&StudyDescription=sagittal").json()
    assert value(page, "SOPInstanceUID") == names.instances[6]
    assert value(page, "PatientID") == "sagittal"


def test_names_that_sound_alike_are_not_looked_for_and_that_is_said(client: TestClient) -> None:
    answer = client.get("/dicomweb/studies?fuzzymatching=true&PatientName=Mueller*")
    assert answer.json() == []
    assert answer.headers["warning"].startswith("299 ")
    assert "warning" not in client.get("/dicomweb/studies?fuzzymatching=false").headers


def test_long_answers_are_cut_and_that_is_said(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MAX_RESULTS", 3)
    answer = client.get("/dicomweb/studies?fuzzymatching=true")
    assert len(answer.json()) == 3
    assert "additional results" in answer.headers["warning"]
    assert "fuzzymatching" in answer.headers["warning"]
    rest = client.get("/dicomweb/studies?offset=7")
    assert len(rest.json()) == 3
    assert "warning" not in rest.headers


def test_searching_reads_only_the_files_of_the_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(path: Path, **options: Any) -> Any:
        read.append(path.name)
        return read_grid(path, **options)

    read_grid = archive.read_grid
    monkeypatch.setattr(archive, "read_grid", counted)
    served = Archive(Dataset(folder), 0)
    query = Query.parse([("limit", "2"), ("offset", "1"), ("PatientName", "*"), ("StudyDescription", "*")])
    for _ in range(2):
        assert len(list(query.select(found_studies(served, served.scans(), "")))) == 2
    assert len(read) == 2


# ------------------------------------------------------------------------------------------------------------- answers


MULTIPART = 'multipart/related; type="application/octet-stream"'


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", "multipart/related"),
        (MULTIPART, "multipart/related"),
        ("multipart/related; type=application/octet-stream; transfer-syntax=*", "multipart/related"),
        (f'{MULTIPART}; transfer-syntax="1.2.840.10008.1.2.1"', "multipart/related"),
        ('multipart/related; type="image/jls", ' + MULTIPART, "multipart/related"),
        ("application/octet-stream", "application/octet-stream"),
        (f"{MULTIPART};q=0.1, application/octet-stream", "application/octet-stream"),
        (f"{MULTIPART};q=0, application/octet-stream;q=0.5", "application/octet-stream"),
        (f"{MULTIPART}; transfer-syntax=1.2.840.10008.1.2.4.90", None),
        ('multipart/related; type="image/jpeg"', None),
        ('multipart/related; type="application/dicom"', None),
        ("image/jpeg", None),
        ("application/octet-stream; transfer-syntax=1.2.840.10008.1.2", None),
    ],
)
def test_frames_are_sent_as_they_are_accepted(client: TestClient, accept: str, media_type: str | None) -> None:
    address = f"{names_of(client, 'chest').slice(2)}/frames/1"
    for answer in (
        client.get(address, headers={"accept": accept}),
        client.get(address, params={"accept": accept}, headers={"accept": "text/html"}),
    ):
        if media_type is None:
            assert answer.status_code == 406
            assert "octet-stream" in answer.json()["detail"]
        else:
            assert answer.headers["content-type"].split(";")[0] == media_type
            assert len(answer.content) >= 2 * 9 * 7


@pytest.mark.parametrize(
    ("path", "accept", "status"),
    [
        ("/dicomweb/studies", "application/json", 200),
        ("/dicomweb/studies", "application/dicom+json;q=0.9, */*;q=0.1", 200),
        ("/dicomweb/studies", 'multipart/related; type="application/dicom+xml"', 406),
        ("{series}/metadata", "application/dicom+json", 200),
        ("{series}/metadata", "text/html", 406),
        ("{slice}", "application/dicom", 200),
        ("{slice}", 'multipart/related; type="application/dicom"; transfer-syntax=*', 200),
        ("{slice}", "application/dicom; transfer-syntax=1.2.840.10008.1.2.4.70", 406),
        ("{series}", "application/dicom", 406),  # several files do not fit into one
        ("{series}/rendered", "image/gif", 406),
        ("{series}/rendered", "image/*", 200),
        ("{slice}/thumbnail", "image/png", 200),
        ("{slice}/frames/0", "*/*", 400),
        ("{slice}/frames/one", "*/*", 400),
        ("{slice}/frames/2", "*/*", 404),
        ("{slice}/frames/1,1", "application/octet-stream", 406),
        ("{slice}/rendered?window=40", "*/*", 400),
        ("{slice}/rendered?window=40,0,linear", "*/*", 400),
        ("{slice}/rendered?window=nan,10", "*/*", 400),
        ("{slice}/rendered?window=40,400,cubic", "*/*", 400),
        ("{slice}/rendered?viewport=0,10", "*/*", 400),
        ("{slice}/rendered?quality=101", "*/*", 400),
        ("/dicomweb/studies?limit=-1", "*/*", 400),
        ("/dicomweb/studies?offset=x", "*/*", 400),
        ("/dicomweb/studies?fuzzymatching=perhaps", "*/*", 400),
        ("/dicomweb/studies?includefield=NoSuchField", "*/*", 400),
        ("/dicomweb/studies?NoSuchField=1", "*/*", 400),
        ("/dicomweb/studies?0010002=1", "*/*", 400),
        ("/dicomweb/studies/1.2.3/series", "*/*", 404),
        ("/dicomweb/studies/1.2.3/metadata", "*/*", 404),
        ("/dicomweb/studies/{study}/series/1.2.3/metadata", "*/*", 404),
        ("/dicomweb/studies/{study}/series/1.2.3/instances", "*/*", 404),
        ("{series}/instances/1.2.3/frames/1", "*/*", 404),
        ("{series}/instances/{study}", "*/*", 404),
        ("/segqc/dicomweb/nobody", "*/*", 404),
    ],
)
def test_requests_are_answered_or_refused_in_one_sentence(
    client: TestClient, path: str, accept: str, status: int
) -> None:
    names = names_of(client, "chest")
    answer = client.get(
        path.format(study=names.study, series=names.path, slice=names.slice(1)), headers={"accept": accept}
    )
    assert answer.status_code == status
    if status >= 400:
        assert answer.json()["detail"].endswith(".")


def test_nothing_can_be_written(client: TestClient) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert client.request(method, "/dicomweb/studies").status_code == 405


@pytest.mark.parametrize(("accept", "kind"), [("*/*", "JPEG"), ("image/jpeg", "JPEG"), ("image/png", "PNG")])
@pytest.mark.parametrize("level", ["study", "series", "instance", "frame"])
def test_pictures_show_the_slice(client: TestClient, accept: str, kind: str, level: str) -> None:
    names = names_of(client, "chest")
    places = {
        "study": f"/dicomweb/studies/{names.study}",
        "series": names.path,
        "instance": names.slice(2),
        "frame": f"{names.slice(2)}/frames/1",
    }
    picture = Image.open(io.BytesIO(client.get(f"{places[level]}/rendered", headers={"accept": accept}).content))
    assert (picture.format, picture.size) == (kind, (9, 7))
    expected = slice_layout(scans()["chest.nii.gz"]).to_images(scans()["chest.nii.gz"].array)[2]
    correlation = np.corrcoef(np.asarray(picture, float).ravel(), expected.ravel())[0, 1]
    assert correlation > (0.99 if kind == "PNG" else 0.9)
    small = Image.open(io.BytesIO(client.get(f"{places[level]}/thumbnail", headers={"accept": accept}).content))
    assert small.size == (128, 100)


def test_pictures_have_square_pixels_and_the_window_that_is_asked_for(client: TestClient) -> None:
    def picture(query: str) -> Any:
        address = f"{names_of(client, 'coronal').slice(3)}/rendered?{query}"
        return Image.open(io.BytesIO(client.get(address, headers={"accept": "image/png"}).content))

    assert picture("").size == (9, 5)
    assert picture("viewport=90,90").size == (90, 50)
    white = np.asarray(picture("window=-5000,10,linear-exact"))
    assert (white == 255).all()
    flipped = names_of(client, "oblique").slice(0)  # 1.1 x 0.9 mm
    content = client.get(f"{flipped}/rendered", headers={"accept": "image/png"}).content
    assert Image.open(io.BytesIO(content)).size in ((11, 7), (9, 9))


def test_the_window_is_dicoms(client: TestClient) -> None:
    item = DicomDataset.from_json(
        client.get(f"{names_of(client, 'float').slice(0)}/metadata").json()[0], lambda *_: b""
    )

    window = Window(float(item.WindowCenter), float(item.WindowWidth))
    values = np.linspace(0, 1, 101)
    reference = DicomDataset()
    reference.update(item)
    reference.PixelRepresentation = 1
    shares = apply_voi_lut(values, reference)
    np.testing.assert_allclose(window.apply(values), (shares - shares.min()) / np.ptp(shares), atol=1e-6)
    volume = scans()["float.nii.gz"].array
    low, high = np.quantile(volume, [0.01, 0.99])
    middle = window.apply(np.array([low, (low + high) / 2, high]))
    np.testing.assert_allclose(middle, [0, 0.5, 1], atol=0.05)


# -------------------------------------------------------------------------------------------------- files that change


def test_a_file_that_is_replaced_or_gone_is_not_there_any_more(tmp_path: Path) -> None:
    for name in ("one.nrrd", "two.nrrd"):
        write_scan(scans()["chest.nii.gz"], tmp_path / name)
    with serving(tmp_path) as client:
        one, two = names_of(client, "one"), names_of(client, "two")
        assert one.study != two.study  # of the same content, but another scan
        assert client.get(f"{one.slice(0)}/frames/1").status_code == 200
        replaced = scans()["oblique.nii.gz"]
        write_scan(replaced, tmp_path / "one.nrrd")
        os.utime(tmp_path / "one.nrrd", ns=(1, 1))
        (tmp_path / "two.nrrd").unlink()
        for address in (f"{one.slice(0)}/frames/1", f"{two.path}/metadata", f"/dicomweb/studies/{two.study}/series"):
            answer = client.get(address)
            assert answer.status_code == 404
            assert "search again" in answer.json()["detail"]
        now = names_of(client, "one")
        assert now.study != one.study
        assert [value(item, "StudyInstanceUID") for item in client.get("/dicomweb/studies").json()] == [now.study]
        assert client.get(f"{now.slice(4)}/frames/1").status_code == 200


def test_a_file_that_vanishes_during_a_search_is_left_out(folder: Path, tmp_path: Path) -> None:
    for name in ("one.nrrd", "two.nrrd"):
        write_scan(scans()["chest.nii.gz"], tmp_path / name)
    served = Archive(Dataset(tmp_path), 0)
    known = served.scans()
    (tmp_path / "one.nrrd").unlink()
    for find, count in ((found_studies, 1), (found_slices, 5)):
        assert len(list(Query().select(find(served, known, "")))) == count
    with pytest.raises(RequestError, match="search again") as caught:
        served.images(known[0])
    assert caught.value.status == 404


def test_a_scan_is_of_the_patient_that_the_store_knows_now(tmp_path: Path) -> None:
    write_scan(scans()["chest.nii.gz"], tmp_path / "one.nrrd")
    (tmp_path / "one.json").write_text(json.dumps({"Modality": "Cardiac MRI"}))
    with serving(tmp_path) as client:
        names = names_of(client, "one")

        def told() -> list[tuple[str, str]]:
            answers = (client.get(path).json()[0] for path in ("/dicomweb/studies", f"{names.path}/metadata"))
            return [(value(item, "PatientID"), value(item, "PatientName")) for item in answers]

        assert told() == [("one", "one")] * 2
        assert value(client.get(f"{names.path}/metadata").json()[0], "Modality") == "MR"  # its own is no code
        dataset = current_app().context.dataset
        with dataset.store.write() as transaction:
            assign_patient(transaction, "one", "Doe\\Jane=J", dataset.settings.split_config(), FOLDER)
        assert told() == [("Doe/Jane=J", "Doe/Jane-J")] * 2


# --------------------------------------------------------------------------------------------------------------- cache


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    results: list[Any] = [None] * count

    def run(index: int) -> None:
        results[index] = work(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_scan_is_read_once_however_many_ask_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Archive(Dataset(folder), 1e6)
    scan = served.named("oblique")
    reads: list[str] = []
    begun = threading.Barrier(8)

    def counted(path: Path, **options: Any) -> Volume:
        reads.append(path.name)
        return read_scan(path, **options)

    def ask(_: int) -> ScanImages:
        begun.wait()
        return served.images(scan)

    monkeypatch.setattr(archive, "read_scan", counted)
    found = at_once(8, ask)
    assert reads == ["oblique.nii.gz"]
    assert all(images is found[0] for images in found)


def test_the_cache_keeps_to_its_size_and_forgets_the_oldest() -> None:
    cache: BoundedCache[str, int] = BoundedCache(10, lambda size: size)
    loaded: list[str] = []

    def get(key: str, size: int) -> int:
        def load() -> int:
            loaded.append(key)
            return size

        return cache.get(key, load)

    for key, size in (("a", 4), ("b", 4), ("a", 4), ("c", 4), ("a", 4), ("b", 4)):
        get(key, size)
    assert loaded == ["a", "b", "c", "b"]
    get("huge", 100)
    get("huge", 100)
    assert loaded[4:] == ["huge"]  # larger than all that is kept, but looked at now
    get("a", 4)
    get("huge", 100)
    assert loaded[5:] == ["a", "huge"]


def test_what_fails_is_asked_for_again() -> None:
    cache: BoundedCache[str, int] = BoundedCache(10)
    with pytest.raises(ValueError, match="once"):
        cache.get("a", lambda: int("once"))
    assert cache.get("a", lambda: 3) == 3


# ------------------------------------------------------------------------------------------------- over a connection


@pytest.mark.server
def test_a_client_reads_a_folder_over_a_connection(tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    volume = scans()["oblique.nii.gz"]
    write_scan(volume, folder / "oblique.nrrd")
    with listening(folder) as address:
        web = DICOMwebClient(f"{address}/dicomweb")
        (study,) = web.search_for_studies()
        (series,) = web.search_for_series(value(study, "StudyInstanceUID"))
        uids = value(study, "StudyInstanceUID"), value(series, "SeriesInstanceUID")
        assert value(series, "RetrieveURL").startswith(address)
        (tmp_path / "copy").mkdir()
        for number, item in enumerate(web.iter_series(*uids)):
            item.save_as(tmp_path / "copy" / f"{number}.dcm", write_like_original=False)
        first = web.retrieve_series_metadata(*uids)[0]
        pixels = next(iter(web.retrieve_bulkdata(first["7FE00010"]["BulkDataURI"])))
        assert len(pixels) == 2 * value(first, "Rows") * value(first, "Columns")
    read = read_scan(tmp_path / "copy")
    assert_same_voxels(volume, read.array, read.affine)
