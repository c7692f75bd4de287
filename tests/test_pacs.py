"""The series of a PACS as scans, and final labels as DICOM SEG there: on an Orthanc of our own."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import json
import os
import pickle
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydantic import SecretStr
from pydicom.dataset import FileDataset
from pydicom.uid import generate_uid
from typer.testing import CliRunner

from segqc.cli.main import app
from segqc.loop.dataset import Dataset, DatasetError
from segqc.loop.review import review
from segqc.loop.scoring import BY_A_NETWORK, assess, current_mask
from segqc.pacs.client import PacsClient
from segqc.pacs.errors import PacsRefused, PacsUnavailable
from segqc.settings import PacsSettings, SettingsError, load_settings, remember_pacs
from segqc.store import events, labels, pacs, scans
from segqc.store.labels import FINAL, NewLabel
from segqc.store.records import Actor, LabelRecord, ScanRecord, SegmentationState
from segqc.store.scans import ScanReplaced, UnknownScan
from segqc.store.sources import SourceUnavailable
from segqc.types import LabelArray, Structure
from segqc.volumes import Volume, read_labels, read_scan, temporary_labels
from tests.pacs_kit import PASSWORD, USER, Orthanc, segmentation, series, to_bytes
from tests.server_kit import add_models

ANNA = Actor(kind="person", name="anna", identified_by="client-id")
STRUCTURES = {"liver": 1, "spleen": 4, "cord": 9}
SHAPE = (24, 20, 8)


@pytest.fixture(autouse=True)
def _password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGQC_PACS__PASSWORD", PASSWORD)


def volume(seed: int = 0, *, oblique: bool = True) -> Volume:
    affine = np.diag([1.25, 1.25, 3.3, 1.0])
    if oblique:
        angle = np.deg2rad(25)
        affine[:3, :3] = (
            np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
            @ affine[:3, :3]
        )
    affine[:3, 3] = [-10.5, 20.25, 5]
    array = np.random.default_rng(seed).integers(0, 900, SHAPE).astype(np.float32)
    return Volume(array, affine)


@dataclass
class Hospital:
    """An Orthanc, and a dataset folder whose scans are the series of one patient or several there."""

    orthanc: Orthanc
    folder: Path
    patient: str

    def write(self, **pacs_settings: object) -> None:
        lines = {"url": self.orthanc.url, "user": USER, "patient": f"{self.patient}*", **pacs_settings}
        shown = "\n".join(f"{name} = {_toml(value)}" for name, value in lines.items())
        structures = "\n".join(f"{name} = [{value}]" for name, value in STRUCTURES.items())
        (self.folder / "segqc.toml").write_text(f"[pacs]\n{shown}\n[structures]\n{structures}\n")

    def store(self, items: list[FileDataset]) -> str:
        """Store a series; its UID."""
        self.orthanc.store(*map(to_bytes, items))
        return str(items[0].SeriesInstanceUID)

    def add(self, seed: int = 0, suffix: str = "", **arguments: object) -> list[FileDataset]:
        items = series(volume(seed), f"{self.patient}{suffix}", **arguments)  # type: ignore[arg-type]
        self.store(items)
        return items

    def open(self) -> Dataset:
        dataset = Dataset(self.folder)
        dataset.sync()
        return dataset

    def wipe(self) -> None:
        shutil.rmtree(self.folder / "segqc" / "pacs", ignore_errors=True)


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.fixture
def hospital(orthanc: Orthanc, tmp_path: Path) -> Hospital:
    found = Hospital(orthanc, tmp_path / "work", f"P{generate_uid()[-12:]}-")
    found.folder.mkdir()
    found.write()
    return found


def look(dataset: Dataset) -> None:
    assert dataset.pacs is not None
    dataset.pacs.look_now()
    dataset.sync()


def record(dataset: Dataset, name: str) -> ScanRecord:
    with dataset.store.read() as transaction:
        return scans.get(transaction, name)


def keep(dataset: Dataset, scan: str, array: LabelArray, tag: str = FINAL) -> LabelRecord:
    affine = dataset.read_scan(dataset.scan(scan)).affine
    with temporary_labels(Volume(array, affine)) as path:
        return dataset.store.save_label(NewLabel(scan, tag, "annotator", ANNA), path)


def drawn(*values: int, seed: int = 0) -> LabelArray:
    array = np.zeros(SHAPE, np.uint8)
    rng = np.random.default_rng(seed)
    for i, value in enumerate(values):
        at = tuple(slice(int(n), int(n) + 3) for n in rng.integers(0, [20, 16, 5]))
        array[at] = value
        array[2 * i, 3, 7] = value
    return array


def publish(dataset: Dataset) -> int:
    assert dataset.publisher is not None
    return dataset.publisher.publish()


def states(dataset: Dataset) -> list[SegmentationState]:
    with dataset.store.read() as transaction:
        return [found.state for found in pacs.segmentations(transaction)]


def read_independently(item: pydicom.Dataset, grid: Volume, values: dict[str, int]) -> LabelArray:
    """A SEG on a scan's grid by pydicom-seg, voxel by voxel through the world."""
    pydicom_seg = pytest.importorskip("pydicom_seg")
    read = pydicom_seg.SegmentReader().read(item)
    found = np.zeros(grid.shape, np.uint8)
    to_index = np.linalg.inv(np.diag([-1.0, -1, 1, 1]) @ grid.affine)
    for number in read.available_segments:
        image = read.segment_image(number)
        name = read.segment_infos[number].SegmentLabel
        array = read.segment_data(number)
        for k, j, i in np.argwhere(array):
            world = image.TransformIndexToPhysicalPoint((int(i), int(j), int(k)))
            index = to_index @ [*world, 1]
            assert np.abs(index - np.rint(index)).max() < 1e-2
            found[tuple(np.rint(index[:3]).astype(int))] = values[name]
    return found


# ---------------------------------------------------------------------------------------------------------------- scans


def test_series_are_scans_with_the_patients_of_the_pacs(hospital: Hospital) -> None:
    stacks = [hospital.add(0, "a"), hospital.add(1, "a"), hospital.add(2, "b")]
    dataset = hospital.open()
    found = {entry.id: dataset.read_scan(entry) for entry in dataset.scans()}
    assert set(found) == {str(items[0].SeriesInstanceUID) for items in stacks}
    for seed, items in enumerate(stacks):
        read, expected = found[str(items[0].SeriesInstanceUID)], volume(seed)
        np.testing.assert_array_equal(read.array, expected.array)
        np.testing.assert_allclose(read.affine, expected.affine, atol=1e-4)
    patients = [record(dataset, str(items[0].SeriesInstanceUID)).patient for items in stacks]
    assert patients == [f"{hospital.patient}{end}" for end in "aab"]
    assert not dataset.findings()


def test_filters_hold_whatever_the_pacs_answers(hospital: Hospital) -> None:
    wanted = str(hospital.add(0, "a", description="axial T2")[0].SeriesInstanceUID)
    hospital.add(1, "a", description="coronal T1")
    hospital.store(series(volume(2), "elsewhere", "axial T2"))
    hospital.write(description="AXIAL*", modality=["MR"])
    assert [entry.id for entry in hospital.open().scans()] == [wanted]
    hospital.write(modality=["CT"])
    assert hospital.open().scans() == []


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("gap", "unevenly spaced"),
        ("turned", "differ in orientation"),
        ("frames", "frames of reference"),
        ("colour", "colour"),
        ("place", "no usable ImagePositionPatient"),
    ],
)
def test_a_series_that_is_no_volume_is_one_sentence(hospital: Hospital, fault: str, said: str) -> None:
    def spoil(index: int, item: FileDataset) -> None:
        if fault == "turned" and index == 3:
            item.ImageOrientationPatient = [0, 1, 0, 1, 0, 0]
        elif fault == "frames" and index == 2:
            item.FrameOfReferenceUID = generate_uid()
        elif fault == "place" and index == 2:
            del item.ImagePositionPatient
        elif fault == "colour":
            item.SamplesPerPixel, item.PhotometricInterpretation, item.PlanarConfiguration = 3, "RGB", 0

    items = series(volume(), f"{hospital.patient}a", change=spoil)
    if fault == "gap":
        del items[3]
    hospital.store(items)
    good = str(hospital.add(1, "b")[0].SeriesInstanceUID)
    dataset = hospital.open()
    assert [entry.id for entry in dataset.scans()] == [good]
    (finding,) = dataset.findings()
    assert said in finding.sentence
    assert f"series {items[0].SeriesInstanceUID} ('T2 stack') of patient {hospital.patient}a" in finding.sentence
    hospital.orthanc.remove_series(str(items[0].SeriesInstanceUID))
    look(dataset)
    assert not dataset.findings()


def test_a_series_that_is_not_sent_keeps_no_others_out(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = (str(hospital.add(seed, end)[0].SeriesInstanceUID) for seed, end in enumerate("ab"))
    fetch = PacsClient.fetch_series

    def fails(client: PacsClient, study: str, uid: str, folder: Path, limit: int) -> int:
        if uid == bad:
            raise PacsRefused("the PACS answers 500", 500)
        return fetch(client, study, uid, folder, limit)

    with monkeypatch.context() as patch:
        patch.setattr(PacsClient, "fetch_series", fails)
        dataset = hospital.open()
    assert [entry.id for entry in dataset.scans()] == [good]
    (finding,) = dataset.findings()
    assert finding.sentence.endswith("is not taken in: the PACS answers 500.")
    look(dataset)
    assert {entry.id for entry in dataset.scans()} == {bad, good}
    assert not dataset.findings()


def test_slices_in_any_order_and_echoes_become_volumes(hospital: Hospital) -> None:
    uid = generate_uid()
    study = generate_uid()
    first, second = (series(volume(seed), f"{hospital.patient}a", study=study) for seed in (0, 1))
    for echo, items in enumerate((first, second), 1):
        for item in items:
            item.SeriesInstanceUID, item.EchoTime = uid, 10 * echo
            item.FrameOfReferenceUID = first[0].FrameOfReferenceUID
    both = [*first, *second]
    np.random.default_rng(0).shuffle(both)  # type: ignore[arg-type]
    hospital.store(both)
    dataset = hospital.open()
    names = [entry.id for entry in dataset.scans()]
    assert names == [f"{uid}_echo-1", f"{uid}_echo-2"]
    for seed, entry in enumerate(dataset.scans()):
        hospital.wipe()
        np.testing.assert_array_equal(dataset.read_scan(entry).array, volume(seed).array)
    array = drawn(1, 4)
    keep(dataset, names[1], array)
    assert publish(dataset) == 1
    (seg,) = hospital.orthanc.segmentations(study)
    used = {str(s.ReferencedSOPInstanceUID) for s in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert used <= {str(item.SOPInstanceUID) for item in second}


def test_what_was_fetched_may_be_removed_at_any_time(hospital: Hospital) -> None:
    hospital.add(0, "a")
    dataset = hospital.open()
    (entry,) = dataset.scans()
    for _ in range(2):
        hospital.wipe()
        np.testing.assert_array_equal(dataset.read_scan(entry).array, volume().array)
    hospital.wipe()
    assert dataset.verify_scan(entry.id).sha256 == entry.sha256
    assert read_scan(dataset.image_file(entry)).shape == SHAPE
    hospital.wipe()
    keep(dataset, entry.id, drawn(1))
    hospital.wipe()
    (case,) = dataset.cases()
    case = pickle.loads(pickle.dumps(case))  # as it goes to a training in a process of its own
    from segqc.training.cases import read_case

    assert read_case(case, (1,))[0].shape == SHAPE


def test_the_cache_is_bounded(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segqc.pacs.cache.IN_USE_SECONDS", 0.0)
    for seed in range(4):
        hospital.add(seed, f"{seed}")
    size = np.prod(SHAPE) * 2 + 1600
    hospital.write(cache_mb=float(2.5 * size / 1e6))
    dataset = hospital.open()
    for entry in dataset.scans():
        dataset.read_scan(entry)
    kept = list((hospital.folder / "segqc" / "pacs").rglob("*.nii"))
    assert 1 <= len(kept) <= 2


def test_a_series_with_other_images_is_another_scan(hospital: Hospital) -> None:
    items = hospital.add(0, "a")
    uid = str(items[0].SeriesInstanceUID)
    dataset = hospital.open()
    before = dataset.scan(uid)
    label = keep(dataset, uid, drawn(1))
    assert publish(dataset) == 1
    hospital.orthanc.remove_series(uid)
    other = series(volume(5), f"{hospital.patient}a", study=str(items[0].StudyInstanceUID))
    for item in other:
        item.SeriesInstanceUID = uid
    hospital.store(other)
    hospital.wipe()  # whoever asks for the scan now finds another one, before the next look
    with pytest.raises(ScanReplaced, match="other images"):
        dataset.read_scan(before)
    now = dataset.scan(uid)
    assert now.sha256 != before.sha256
    assert now.final is None
    np.testing.assert_array_equal(dataset.read_scan(now).array, volume(5).array)
    with dataset.store.read() as transaction:
        assert labels.get(transaction, label.id).scan.startswith(f"{uid}@")
    assert publish(dataset) == 1, "the SEG of the images that are gone is withdrawn"
    # the first images return, and with them their label
    hospital.orthanc.remove_series(uid)
    hospital.store(items)
    hospital.wipe()
    look(dataset)
    assert dataset.scan(uid).sha256 in (before.sha256, now.sha256)
    hospital.wipe()
    assert dataset.verify_scan(uid).sha256 == before.sha256
    assert dataset.scan(uid).final is not None


def test_a_series_that_is_gone_is_missing_until_it_returns(hospital: Hospital) -> None:
    items = hospital.add(0, "a")
    uid = str(items[0].SeriesInstanceUID)
    dataset = hospital.open()
    hospital.orthanc.remove_series(uid)
    hospital.wipe()
    with pytest.raises(UnknownScan, match="is gone"):
        dataset.verify_scan(uid)
    assert dataset.scans() == []
    hospital.store(items)
    look(dataset)
    assert [entry.id for entry in dataset.scans()] == [uid]


def test_the_split_follows_a_patient_who_is_merged(hospital: Hospital) -> None:
    items = hospital.add(0, "a")
    uid = str(items[0].SeriesInstanceUID)
    dataset = hospital.open()
    number = hospital.orthanc.number(uid)
    hospital.orthanc.ask("DELETE", f"/series/{number}")
    for item in items:
        item.PatientID = f"{hospital.patient}b"
    hospital.store(items)
    look(dataset)
    assert record(dataset, uid).patient == f"{hospital.patient}b"


def test_a_pacs_that_does_not_answer_is_one_sentence_and_changes_nothing(hospital: Hospital) -> None:
    hospital.add(0, "a")
    dataset = hospital.open()
    (entry,) = dataset.scans()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    hospital.write(url=f"http://127.0.0.1:{port}/dicom-web")
    hospital.wipe()
    away = Dataset(hospital.folder)
    assert [e.id for e in away.scans()] == [entry.id]
    assert any("does not answer" in remark for remark in away.remarks())
    with pytest.raises(PacsUnavailable, match="does not answer") as caught:
        away.read_scan(entry)
    assert caught.value.status == 503
    with pytest.raises(SourceUnavailable):
        away.verify_scan(entry.id)
    assert record(away, entry.id).missing_since is None
    assert not list((hospital.folder / "segqc" / "pacs").glob("[!.]*"))


@pytest.mark.parametrize("kind", ["closed", "half", "no JSON", "slow"])
def test_a_server_that_answers_wrongly_is_one_sentence(kind: str) -> None:
    answers = {
        "closed": b"",
        "half": b"HTTP/1.1 200 OK\r\nContent-Type: application/dicom+json\r\nContent-Length: 500\r\n\r\n[",
        "no JSON": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 4\r\nConnection: close\r\n\r\n<p/>",
        "slow": b"HTTP/1.1 200 OK\r\n",
    }
    with answering(answers[kind], hold=kind == "slow") as url:
        client = PacsClient(PacsSettings(url=url, timeout_seconds=0.3))
        with pytest.raises(SourceUnavailable, match=f"^the PACS at {url} [^\n]*[.?]$") as caught:
            client.scan_series()
    assert caught.value.status == (502 if kind == "no JSON" else 503)


def answering(content: bytes, *, hold: bool) -> contextlib.AbstractContextManager[str]:
    """A server that answers every request alike."""

    @contextlib.contextmanager
    def run() -> Iterator[str]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            held: list[socket.socket] = []

            def work() -> None:
                while True:
                    try:
                        connection = listener.accept()[0]
                    except OSError:
                        return
                    connection.recv(65536)
                    connection.sendall(content)
                    if hold:
                        held.append(connection)
                    else:
                        connection.close()

            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                listener.shutdown(socket.SHUT_RDWR)
                thread.join()
                for connection in held:
                    connection.close()

    return run()


def test_a_wrong_password_is_said(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGQC_PACS__PASSWORD", "wrong")
    dataset = hospital.open()
    (remark,) = dataset.remarks()
    assert "does not let this program in (401)" in remark
    assert "wrong" not in remark
    with pytest.raises(PacsRefused):
        PacsClient(dataset.settings.pacs).scan_series()


def test_a_pacs_that_cannot_be_used_is_told_from_one_that_is_away(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    PacsClient(load_settings(hospital.folder).pacs).check()
    wrong = f"{hospital.orthanc.rest}/dicom"
    with pytest.raises(PacsRefused, match=r"answers 404 .*; is this the address of its DICOMweb\?$"):
        PacsClient(PacsSettings(url=wrong, user=USER, password=SecretStr(PASSWORD))).check()
    with pytest.raises(PacsRefused, match="is this the address of its DICOMweb"):
        PacsClient(PacsSettings(url=hospital.orthanc.rest, user=USER, password=SecretStr(PASSWORD))).check()
    with pytest.raises(PacsRefused, match=r"\(401\); check .* SEGQC_PACS__PASSWORD"):
        PacsClient(PacsSettings(url=hospital.orthanc.url)).check()
    busy = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    for answer in (busy, b""):
        with answering(answer, hold=False) as url, pytest.raises(PacsUnavailable):
            PacsClient(PacsSettings(url=url)).check()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def serving(*arguments: object) -> subprocess.Popen[str]:
    pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")
    command = [sys.executable, "-m", "segqc", "serve", *arguments, "--port", free_port(), "--no-worker"]
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)


@pytest.mark.server
def test_a_pacs_that_cannot_be_used_is_not_served(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGQC_PACS__USER", USER)
    monkeypatch.setenv("SEGQC_PACS__PASSWORD", "wrong")
    new = hospital.folder.with_name("new")
    refused = (
        f"the PACS at {hospital.orthanc.url} does not let this program in (401); check [pacs] user (or "
        "SEGQC_PACS__USER) and the environment variable SEGQC_PACS__PASSWORD, or SEGQC_PACS__TOKEN.\n"
    )
    for arguments in ((hospital.orthanc.url, "--folder", new), (hospital.folder,)):
        with serving(*arguments) as process:
            said = process.communicate(timeout=120)[1]
        assert process.returncode == 1
        assert said.endswith(refused)
        assert len(said.splitlines()) == 1
    assert not new.exists(), "an address that does not work is not remembered"
    hospital.write(url=f"http://127.0.0.1:{free_port()}/dicom-web")
    with serving(hospital.folder) as process:
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 1, "nothing is known of it that could be served"
    assert "does not answer" in said


@pytest.mark.server
def test_what_is_known_of_a_pacs_that_is_away_is_served(hospital: Hospital) -> None:
    hospital.add(0, "a")
    hospital.open().store.close()
    hospital.write(url=f"http://127.0.0.1:{free_port()}/dicom-web")
    with serving(hospital.folder) as process:
        assert process.stderr is not None
        lines = list(itertools.takewhile(lambda line: "SegQC answers at" not in line, process.stderr))
        process.terminate()
        process.communicate(timeout=120)
    assert process.returncode == 0
    assert any("does not answer" in line and "is served meanwhile (1 scan(s))" in line for line in lines), lines


def test_scans_are_not_put_into_the_folder(hospital: Hospital, tmp_path: Path) -> None:
    dataset = hospital.open()
    with pytest.raises(DatasetError, match="store the series there"):
        dataset.add_scan(tmp_path / "a.nii.gz", "a")


# --------------------------------------------------------------------------------------------------------- final labels


@pytest.mark.parametrize("values", [(1,), (4,), (9,), (1, 9), (4, 9), (1, 4, 9)])
def test_any_subset_of_structures_keeps_names_numbers_colours_and_place(
    hospital: Hospital, values: tuple[int, ...]
) -> None:
    items = hospital.add(0, "a")
    dataset = hospital.open()
    (entry,) = dataset.scans()
    array = drawn(*values)
    label = keep(dataset, entry.id, array)
    hospital.wipe()
    assert publish(dataset) == 1
    assert publish(dataset) == 0
    (seg,) = hospital.orthanc.segmentations(str(items[0].StudyInstanceUID))
    described = [(int(s.SegmentNumber), str(s.SegmentLabel), str(s.SegmentDescription)) for s in seg.SegmentSequence]
    assert described == [
        (1, "liver", "label value 1"), (2, "spleen", "label value 4"), (3, "cord", "label value 9")
    ]  # fmt: skip
    assert len({tuple(s.RecommendedDisplayCIELabValue) for s in seg.SegmentSequence}) == 3
    assert seg.FrameOfReferenceUID == items[0].FrameOfReferenceUID
    assert (seg.PatientID, seg.StudyInstanceUID) == (items[0].PatientID, items[0].StudyInstanceUID)
    assert seg.SeriesDescription == f"SegQC label version {label.id}"
    assert seg.NumberOfFrames == sum(int((array == v).any(axis=(0, 1)).sum()) for v in values)
    grid = dataset.read_scan(entry)
    np.testing.assert_array_equal(read_independently(seg, grid, STRUCTURES), array)


@pytest.mark.parametrize(
    ("characters", "name"), [("ISO_IR 100", "Müller^José"), (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎")]
)
def test_the_patients_name_is_that_of_the_images_in_any_script(
    hospital: Hospital, characters: str | list[str], name: str
) -> None:
    def named(_: int, item: FileDataset) -> None:
        item.SpecificCharacterSet, item.PatientName = characters, name

    items = hospital.add(0, "a", change=named)
    dataset = hospital.open()
    keep(dataset, dataset.scans()[0].id, drawn(4))
    assert publish(dataset) == 1
    (seg,) = hospital.orthanc.segmentations(str(items[0].StudyInstanceUID))
    assert (str(seg.PatientName), seg.SpecificCharacterSet) == (name, "ISO_IR 192")


def test_the_one_before_is_withdrawn_after_the_new_one_is_stored(hospital: Hospital) -> None:
    hospital.write(orthanc_url=hospital.orthanc.rest)
    items = hospital.add(0, "a")
    dataset = hospital.open()
    (entry,) = dataset.scans()
    first = keep(dataset, entry.id, drawn(1))
    assert publish(dataset) == 1
    second = keep(dataset, entry.id, drawn(1, 4))
    assert publish(dataset) == 2
    (seg,) = hospital.orthanc.segmentations(str(items[0].StudyInstanceUID))
    assert seg.SeriesDescription == f"SegQC label version {second.id}"
    assert states(dataset) == ["withdrawn", "stored"]
    with dataset.store.read() as transaction:
        told = [e for e in events.history(transaction, "scan", record(dataset, entry.id).id) if e.actor.name == "PACS"]
    assert [e.verb for e in told] == ["found", "segmentation stored", "segmentation stored", "segmentation withdrawn"]
    assert told[-1].detail is not None
    assert told[-1].detail["version"] == first.id


def test_an_empty_mask_has_no_seg_and_withdraws_the_one_before(hospital: Hospital) -> None:
    hospital.write(orthanc_url=hospital.orthanc.rest)
    items = hospital.add(0, "a")
    dataset = hospital.open()
    (entry,) = dataset.scans()
    keep(dataset, entry.id, drawn(1))
    publish(dataset)
    keep(dataset, entry.id, np.zeros(SHAPE, np.uint8))
    assert publish(dataset) == 2
    assert hospital.orthanc.segmentations(str(items[0].StudyInstanceUID)) == []
    assert states(dataset) == ["withdrawn", "empty"]
    assert publish(dataset) == 0


def test_a_rejected_label_is_withdrawn(hospital: Hospital) -> None:
    hospital.write(orthanc_url=hospital.orthanc.rest)
    items = hospital.add(0, "a")
    dataset = hospital.open()
    (entry,) = dataset.scans()
    keep(dataset, entry.id, drawn(1))
    publish(dataset)
    review(dataset, entry.id, "rejected", ANNA, "too small")
    assert publish(dataset) == 1
    assert hospital.orthanc.segmentations(str(items[0].StudyInstanceUID)) == []


def test_a_seg_that_cannot_be_withdrawn_is_left_and_said(hospital: Hospital) -> None:
    items = hospital.add(0, "a")
    dataset = hospital.open()
    (entry,) = dataset.scans()
    first = keep(dataset, entry.id, drawn(1))
    publish(dataset)
    keep(dataset, entry.id, drawn(4))
    assert publish(dataset) == 2
    assert states(dataset) == ["left", "stored"]
    assert len(hospital.orthanc.segmentations(str(items[0].StudyInstanceUID))) == 2
    (remark,) = dataset.remarks()
    assert f"the SEG of label version {first.id}" in remark
    assert publish(dataset) == 0


@pytest.mark.parametrize("where", ["before", "after"])
def test_whoever_is_killed_while_storing_leaves_one_seg(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    hospital.write(orthanc_url=hospital.orthanc.rest)
    items = hospital.add(0, "a")
    dataset = hospital.open()
    (entry,) = dataset.scans()
    keep(dataset, entry.id, drawn(1))
    store = PacsClient.store

    class Killed(BaseException):
        pass

    def killed(client: PacsClient, file: bytes) -> None:
        if where == "after":
            store(client, file)
        raise Killed

    monkeypatch.setattr(PacsClient, "store", killed)
    with pytest.raises(Killed):
        publish(dataset)
    monkeypatch.undo()
    monkeypatch.setenv("SEGQC_PACS__PASSWORD", PASSWORD)
    assert states(dataset) == ["storing"]
    again = hospital.open()
    assert publish(again) == 1
    assert states(again) == ["stored"]
    assert len(hospital.orthanc.segmentations(str(items[0].StudyInstanceUID))) == 1
    # killed with a newer version in the queue: the one before goes, whether or not it had arrived
    keep(again, entry.id, drawn(4))
    monkeypatch.setattr(PacsClient, "store", killed)
    with pytest.raises(Killed):
        publish(again)
    monkeypatch.undo()
    last = keep(again, entry.id, drawn(9))
    publish(again)
    (seg,) = hospital.orthanc.segmentations(str(items[0].StudyInstanceUID))
    assert seg.SeriesDescription == f"SegQC label version {last.id}"


KILLED = """
import os, signal, sys
from pathlib import Path
from segqc.loop.dataset import Dataset
from segqc.pacs.client import PacsClient
own = getattr(PacsClient, sys.argv[2])
def done_and_killed(*arguments):
    own(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(PacsClient, sys.argv[2], done_and_killed)
Dataset(Path(sys.argv[1])).publisher.publish()
"""


def test_a_process_that_is_killed_is_followed_by_another_one(hospital: Hospital) -> None:
    hospital.write(orthanc_url=hospital.orthanc.rest)
    items = hospital.add(0, "a")
    dataset = hospital.open()
    (entry,) = dataset.scans()
    study = str(items[0].StudyInstanceUID)
    for step, values, seen in (("store", (1,), ["storing"]), ("remove_series", (1, 4), ["stored", "stored"])):
        array = drawn(*values)
        label = keep(dataset, entry.id, array)
        command = [sys.executable, "-c", KILLED, str(hospital.folder), step]
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
        assert states(dataset) == seen
        assert publish(dataset) == 1
        (seg,) = hospital.orthanc.segmentations(study)
        assert seg.SeriesDescription == f"SegQC label version {label.id}"
        np.testing.assert_array_equal(read_independently(seg, dataset.read_scan(entry), STRUCTURES), array)


def test_what_fails_is_noted_and_tried_again(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    hospital.add(0, "a")
    dataset = hospital.open()
    (entry,) = dataset.scans()
    label = keep(dataset, entry.id, drawn(1))
    refused = PacsRefused("the PACS is full", 507)

    def fails(client: PacsClient, file: bytes) -> None:
        raise refused

    with monkeypatch.context() as patch:
        patch.setattr(PacsClient, "store", fails)
        assert publish(dataset) == 0
        assert publish(dataset) == 0, "not at once"
    with dataset.store.read() as transaction:
        found = pacs.segmentation_of(transaction, label.id)
        assert (pacs.to_store(transaction), pacs.to_be_done(transaction)) == ([], 1)
    assert found is not None
    assert (found.state, found.attempts, found.problem) == ("storing", 1, "the PACS is full.")
    later = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=1)
    monkeypatch.setattr(dataset.store.database, "clock", lambda: later)
    assert publish(dataset) == 1


def test_the_command_says_what_lies_there(hospital: Hospital) -> None:
    hospital.add(0, "a")
    dataset = hospital.open()
    keep(dataset, dataset.scans()[0].id, drawn(1))
    told = CliRunner().invoke(app, ["pacs", str(hospital.folder), "--store", "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert (found["to_be_done"], found["segmentations"][0]["state"]) == (0, "stored")
    checked = CliRunner().invoke(app, ["db", "check", str(hospital.folder)])
    assert checked.exit_code == 0, checked.output


def test_labels_are_kept_here_where_the_settings_say_so(hospital: Hospital) -> None:
    hospital.write(store_labels=False)
    assert hospital.open().publisher is None


# ------------------------------------------------------------------------------------------------------------- reports


def test_estimates_and_error_maps_are_exported_on_request(hospital: Hospital, tmp_path: Path) -> None:
    items = hospital.add(0, "a")
    add_models(hospital.folder, tuple(Structure(name, (value,)) for name, value in STRUCTURES.items()))
    dataset = hospital.open()
    (entry,) = dataset.scans()
    command = ["export", "dicom", str(hospital.folder), str(tmp_path / "out"), "--store"]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0, told.output
    assert "1 reports, 1 error maps and in the PACS" in told.stdout
    maps = pydicom.dcmread(tmp_path / "out" / f"{entry.id}_errors.dcm")
    assert maps.FrameOfReferenceUID == items[0].FrameOfReferenceUID
    assert [str(s.SegmentLabel) for s in maps.SegmentSequence] == [f"errors of {name}" for name in STRUCTURES]
    bundle = dataset.bundle()
    assert bundle is not None
    scan = dataset.read_scan(entry)
    _, mask, prediction = current_mask(dataset, dataset.scan(entry.id), scan, bundle)
    errors = assess(bundle, scan, mask, prediction, scan_id=entry.id, origin=BY_A_NETWORK).errors
    order = [str(item.SOPInstanceUID) for item in items]
    for groups, frame in zip(maps.PerFrameFunctionalGroupsSequence, maps.pixel_array, strict=True):
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        source = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        expected = errors[number - 1, :, :, order.index(str(source))].T
        np.testing.assert_allclose(frame / 255, expected, atol=0.5 / 255 + 1e-6)
    report = hd.sr.MeasurementReport.from_sequence([pydicom.dcmread(tmp_path / "out" / f"{entry.id}_estimates.dcm")])
    groups = report.get_image_measurement_groups()
    assert [group.tracking_identifier for group in groups] == list(STRUCTURES)
    assert all("Volume of the mask" in {m.name.meaning for m in group.get_measurements()} for group in groups)
    study = str(items[0].StudyInstanceUID)
    assert len(hospital.orthanc.segmentations(study)) == 1
    look(dataset)
    assert dataset.scan(entry.id).final is None, "a map is no label"
    assert not dataset.findings()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert len(hospital.orthanc.segmentations(study)) == 1, "the same mask has the same map"


# ------------------------------------------------------------------------------------------------- SEGs that were found


def found_seg(
    dataset: Dataset, scan: str, items: list[FileDataset], array: LabelArray, **arguments: object
) -> FileDataset:
    grid = dataset.read_scan(dataset.scan(scan))
    return segmentation(array, grid, items, {1: "Liver", 2: "spleen", 3: "cord"}, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
def test_a_seg_of_another_program_becomes_a_label(hospital: Hospital, kind: str) -> None:
    items = hospital.add(0, "a")
    dataset = hospital.open()
    (entry,) = dataset.scans()
    array = np.zeros(SHAPE, np.uint8)
    array[3:9, 4:11, [1, 2, 6]] = 1
    array[12:15, 4:11, 2] = 2
    hospital.orthanc.store(to_bytes(found_seg(dataset, entry.id, items, array, kind=kind, flip=True)))
    look(dataset)
    if kind == "FRACTIONAL":
        (finding,) = dataset.findings()
        assert "type FRACTIONAL" in finding.sentence
        assert finding.kind == "label"
        return
    final = dataset.scan(entry.id).final
    assert final is not None
    np.testing.assert_array_equal(read_labels(final).array, np.array([0, 1, 4], np.uint8)[array])
    assert publish(dataset) == 0, "it lies there already"
    with dataset.store.read() as transaction:
        first = labels.current(transaction, entry.id, FINAL)
    look(dataset)
    with dataset.store.read() as transaction:
        assert labels.current(transaction, entry.id, FINAL) == first, "it is taken in once"
    hospital.write(orthanc_url=hospital.orthanc.rest)
    dataset = hospital.open()
    keep(dataset, entry.id, drawn(1))
    assert publish(dataset) == 1, "another's SEG is not withdrawn"
    assert len(hospital.orthanc.segmentations(str(items[0].StudyInstanceUID))) == 2


def test_a_seg_of_a_program_alone_is_a_mask_to_start_from(hospital: Hospital) -> None:
    items = hospital.add(0, "a")
    dataset = hospital.open()
    (entry,) = dataset.scans()
    array = (drawn(1) > 0).astype(np.uint8)
    hospital.orthanc.store(to_bytes(found_seg(dataset, entry.id, items, array, algorithm="AUTOMATIC")))
    look(dataset)
    now = dataset.scan(entry.id)
    assert now.final is None
    assert now.original is not None
    np.testing.assert_array_equal(read_labels(now.original).array, array)


def test_an_older_seg_does_not_take_a_labels_place(hospital: Hospital) -> None:
    items = hospital.add(0, "a")
    dataset = hospital.open()
    (entry,) = dataset.scans()
    kept = keep(dataset, entry.id, drawn(4))
    seg = found_seg(dataset, entry.id, items, (drawn(1) > 0).astype(np.uint8), made_at="20200101120000")
    hospital.orthanc.store(to_bytes(seg))
    look(dataset)
    with dataset.store.read() as transaction:
        assert labels.current(transaction, entry.id, FINAL) == kept


def test_own_segs_are_read_again_by_a_new_folder(hospital: Hospital) -> None:
    hospital.add(0, "a")
    dataset = hospital.open()
    (entry,) = dataset.scans()
    array = drawn(4, 9)
    keep(dataset, entry.id, array)
    publish(dataset)
    look(dataset)
    shutil.rmtree(hospital.folder / "segqc")
    shutil.rmtree(hospital.folder / "labels")
    again = hospital.open()
    final = again.scan(entry.id).final
    assert final is not None
    np.testing.assert_array_equal(read_labels(final).array, array)


# ------------------------------------------------------------------------------------------------------------- settings


def test_a_folder_remembers_its_pacs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEGQC_PACS__PASSWORD")
    folder = tmp_path / "work"
    remembered: list[str | None] = []

    def check(settings: PacsSettings) -> None:
        remembered.append(settings.url)

    def refuse(settings: PacsSettings) -> None:
        raise PacsRefused("it lets nobody in")

    with pytest.raises(PacsRefused):
        remember_pacs(folder, "https://pacs.example.org/dicom-web/", refuse)
    assert not folder.exists()
    remember_pacs(folder, "https://pacs.example.org/dicom-web/", check)
    assert load_settings(folder).pacs.url == "https://pacs.example.org/dicom-web"
    text = (folder / "segqc.toml").read_text()
    remember_pacs(folder, "https://pacs.example.org/dicom-web", check)
    assert (folder / "segqc.toml").read_text() == text
    with pytest.raises(SettingsError, match="name another folder"):
        remember_pacs(folder, "https://other.example.org/dicom-web", check)
    with pytest.raises(SettingsError, match="no address"):
        remember_pacs(tmp_path / "new", "https://", check)
    assert remembered == ["https://pacs.example.org/dicom-web"], "asked once, when it is new"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('password = "x"', "SEGQC_PACS__PASSWORD"),
        ('token = "x"', "SEGQC_PACS__TOKEN"),
        ('url = "https://me:pw@pacs.example.org"', "holds a user's name or password"),
        ('url = "ftp://pacs.example.org"', "no address"),
        ('url = "https://pacs.example.org"\nclient_key = "key.pem"', "client_certificate"),
        ('url = "https://pacs.example.org"\nuser = "me"', "belong together"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, said: str
) -> None:
    monkeypatch.delenv("SEGQC_PACS__PASSWORD")
    (tmp_path / "segqc.toml").write_text(f"[pacs]\n{lines}\n")
    with pytest.raises(SettingsError, match=said):
        load_settings(tmp_path)


def test_a_password_is_shown_nowhere(tmp_path: Path) -> None:
    (tmp_path / "segqc.toml").write_text('[pacs]\nurl = "https://pacs.example.org"\nuser = "me"\n')
    settings = load_settings(tmp_path)
    assert PASSWORD not in repr(settings)
    assert PASSWORD not in str(settings.model_dump())


def test_certificates_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("none")
    client = PacsClient(PacsSettings(url="https://127.0.0.1:1", ca_file=tmp_path / "ca.pem"))
    with pytest.raises(PacsUnavailable, match=r"ca\.pem: is no certificate"):
        client.scan_series()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a server's certificate and key for 127.0.0.1, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes certificates, is nowhere")
    folder = tmp_path_factory.mktemp("tls")
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("wants_client", [False, True])
def test_certificates_are_checked(certificates: Path, wants_client: bool) -> None:
    cert, key = certificates / "cert.pem", certificates / "key.pem"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    if wants_client:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cert)

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Nothing)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"https://127.0.0.1:{server.server_port}"
    own = {"client_certificate": cert, "client_key": key}
    try:
        assert PacsClient(PacsSettings(url=url, ca_file=cert, **own)).scan_series() == []
        assert PacsClient(PacsSettings(url=url, verify=False, **own)).scan_series() == []
        refused = [PacsSettings(url=url, **own)]
        if wants_client:
            refused += [PacsSettings(url=url, ca_file=cert), PacsSettings(url=url, verify=False)]
        for settings in refused:
            with pytest.raises(PacsUnavailable, match="does not answer"):
                PacsClient(settings).scan_series()
    finally:
        server.shutdown()
        server.server_close()
