"""An Orthanc of our own, and series and segmentations to store in it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pydicom
from pydicom.dataset import Dataset as DicomDataset
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from segqc.pacs.multipart import message
from segqc.types import LabelArray
from segqc.volumes import Volume, write_scan
from segqc.volumes.dicom_seg import LABEL_MAP_SEGMENTATION, SEGMENTATION
from segqc.volumes.volume import LPS_TO_RAS

USER, PASSWORD = "segqc", "not easily guessed"
_PLUGINS = ("/usr/lib/orthanc", "/usr/share/orthanc/plugins", "/usr/local/share/orthanc/plugins")
_START_SECONDS = 30


@dataclass(frozen=True)
class Orthanc:
    """A running Orthanc."""

    rest: str

    @property
    def url(self) -> str:
        return f"{self.rest}/dicom-web"

    def ask(self, method: str, path: str, **arguments: object) -> httpx.Response:
        # a connection for each request, as Orthanc closes those that wait
        answer = httpx.request(method, f"{self.rest}{path}", auth=(USER, PASSWORD), timeout=60, **arguments)  # type: ignore[arg-type]
        return answer.raise_for_status()

    def store(self, *files: bytes) -> None:
        content, content_type = message(files)
        self.ask("POST", "/dicom-web/studies", content=content, headers={"Content-Type": content_type})

    def segmentations(self, study: str) -> list[DicomDataset]:
        """The SEGs of a study, in the order of their descriptions."""
        found = self.ask("GET", f"/dicom-web/studies/{study}/series", params={"Modality": "SEG"}).json()
        numbers = [self.number(item["0020000E"]["Value"][0]) for item in found]
        read = [
            pydicom.dcmread(io.BytesIO(self.ask("GET", f"/instances/{instance}/file").content))
            for number in numbers
            for instance in self.ask("GET", f"/series/{number}").json()["Instances"]
        ]
        return sorted(read, key=lambda item: str(item.SeriesDescription))

    def number(self, uid: str) -> str:
        """What Orthanc itself calls a series."""
        return str(self.ask("POST", "/tools/lookup", content=uid.encode()).json()[0]["ID"])

    def remove_series(self, uid: str) -> None:
        self.ask("DELETE", f"/series/{self.number(uid)}")


@contextlib.contextmanager
def running_orthanc() -> Iterator[Orthanc]:
    """Start an Orthanc of our own on this machine's own address, in a folder that goes with it."""
    program = shutil.which("Orthanc")
    plugin = next((p for folder in _PLUGINS for p in sorted(Path(folder).glob("libOrthancDicomWeb.so*"))), None)
    if program is None or plugin is None:
        raise FileNotFoundError("Orthanc, or its plugin for DICOMweb, is nowhere; install orthanc and orthanc-dicomweb")
    folder = Path(tempfile.mkdtemp(prefix="orthanc-", dir="/tmp"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "orthanc.json").write_text(
        json.dumps(
            {
                "StorageDirectory": str(folder / "db"),
                "IndexDirectory": str(folder / "db"),
                "HttpPort": port,
                "DicomServerEnabled": False,
                "RemoteAccessAllowed": False,
                "AuthenticationEnabled": True,
                "RegisteredUsers": {USER: PASSWORD},
                "Plugins": [str(plugin)],
                "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            }
        )
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, folder / "orthanc.json"], stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    orthanc = Orthanc(f"http://127.0.0.1:{port}")
    try:
        until = time.monotonic() + _START_SECONDS
        while True:
            try:
                orthanc.ask("GET", "/dicom-web/studies")
                break
            except httpx.HTTPError:
                if time.monotonic() > until or process.poll() is not None:
                    raise RuntimeError(f"Orthanc does not start: {(folder / 'log').read_text()[-2000:]}") from None
                time.sleep(0.1)
        yield orthanc
    finally:
        process.terminate()
        process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def series(
    volume: Volume,
    patient: str,
    description: str = "T2 stack",
    *,
    study: str | None = None,
    change: Callable[[int, FileDataset], None] = lambda index, item: None,
) -> list[FileDataset]:
    """A volume as the images of a series of a patient, each changed by a function.

    It is another series each time; a study that is not named is a new one, too.
    """
    study, uid, frame = study or generate_uid(), generate_uid(), generate_uid()
    with tempfile.TemporaryDirectory() as folder:
        write_scan(volume, Path(folder) / "series")
        items = [pydicom.dcmread(path) for path in sorted((Path(folder) / "series").iterdir())]
    for index, item in enumerate(items):
        item.SOPInstanceUID = item.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        item.StudyInstanceUID, item.SeriesInstanceUID, item.FrameOfReferenceUID = study, uid, frame
        item.PatientID, item.PatientName, item.SeriesDescription = patient, f"{patient}^Test", description
        change(index, item)
    return items


def to_bytes(item: FileDataset) -> bytes:
    file = io.BytesIO()
    item.save_as(file, write_like_original=False)
    return file.getvalue()


def segmentation(
    labels: LabelArray,
    grid: Volume,
    source: Sequence[DicomDataset],
    names: dict[int, str],
    *,
    kind: str = "BINARY",
    flip: bool = False,
    turn: bool = False,
    algorithm: str = "MANUAL",
    made_at: str = "20991231120000",
    seed: int = 0,
) -> FileDataset:
    """A SEG of a label map as another program might write it: only slices with voxels, in any order.

    Args:
        labels: on the grid.
        grid: of the scan.
        source: an image of its series, at least.
        names: of the segments, by number.
        kind: BINARY, LABELMAP or FRACTIONAL.
        flip: whether frames are mirrored, so that their normal points the other way.
        turn: whether rows are columns.
        algorithm: who made the segments.
        made_at: date and time.
        seed: of the frames' order.
    """
    array, affine = labels, LPS_TO_RAS @ grid.affine
    if flip:
        mirror = np.diag([-1.0, 1, 1, 1])
        mirror[0, 3] = array.shape[0] - 1
        array, affine = array[::-1], affine @ mirror
    if turn:
        array, affine = array.transpose(1, 0, 2), affine[:, [1, 0, 2, 3]]
    frames: list[tuple[int, int | None]] = []
    for k in range(array.shape[2]):
        if kind == "LABELMAP" and array[:, :, k].any():
            frames.append((k, None))
        elif kind != "LABELMAP":
            frames += [(k, number) for number in names if (array[:, :, k] == number).any()]
    order = np.random.default_rng(seed).permutation(len(frames))
    frames = [frames[int(i)] for i in order]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / spacing
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = LABEL_MAP_SEGMENTATION if kind == "LABELMAP" else SEGMENTATION
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    item.is_little_endian, item.is_implicit_VR = True, False
    item.SOPClassUID, item.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    first = source[0]
    for name in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID"):
        setattr(item, name, getattr(first, name))
    item.PatientBirthDate = item.PatientSex = item.StudyDate = item.StudyTime = item.StudyID = ""
    item.AccessionNumber = item.ReferringPhysicianName = ""
    item.SeriesInstanceUID, item.SeriesNumber, item.Modality = generate_uid(), 77, "SEG"
    item.SeriesDescription = "another program's"
    item.ContentDate, item.ContentTime = made_at[:8], made_at[8:]
    item.SegmentationType = kind
    item.Columns, item.Rows, item.NumberOfFrames = array.shape[0], array.shape[1], len(frames)
    item.SamplesPerPixel, item.PhotometricInterpretation, item.PixelRepresentation = 1, "MONOCHROME2", 0
    bits = 1 if kind == "BINARY" else 8
    item.BitsAllocated, item.BitsStored, item.HighBit = bits, bits, bits - 1
    if kind == "FRACTIONAL":
        item.SegmentationFractionalType, item.MaximumFractionalValue = "PROBABILITY", 255
    item.SegmentSequence = [_of(SegmentNumber=n, SegmentLabel=name, SegmentAlgorithmType=algorithm)
                            for n, name in names.items()]  # fmt: skip
    item.ReferencedSeriesSequence = [
        _of(
            SeriesInstanceUID=first.SeriesInstanceUID,
            ReferencedInstanceSequence=[
                _of(ReferencedSOPClassUID=s.SOPClassUID, ReferencedSOPInstanceUID=s.SOPInstanceUID) for s in source
            ],
        )
    ]
    item.SharedFunctionalGroupsSequence = [
        _of(
            PlaneOrientationSequence=[_of(ImageOrientationPatient=_decimals(directions[:, :2].T.ravel()))],
            PixelMeasuresSequence=[_of(PixelSpacing=_decimals([spacing[1], spacing[0]]))],
        )
    ]
    groups = []
    for k, number in frames:
        position = affine[:3, 3] + k * affine[:3, 2]
        group = _of(PlanePositionSequence=[_of(ImagePositionPatient=_decimals(position))])
        if number is not None:
            group.SegmentIdentificationSequence = [_of(ReferencedSegmentNumber=number)]
        groups.append(group)
    item.PerFrameFunctionalGroupsSequence = groups
    pixels = [array[:, :, k].T if number is None else (array[:, :, k] == number).T for k, number in frames]
    stacked = np.ascontiguousarray(pixels).astype(np.uint8)
    content = np.packbits(stacked.ravel(), bitorder="little").tobytes() if bits == 1 else stacked.tobytes()
    item.PixelData = content + b"\0" * (len(content) % 2)
    return item


def _of(**values: object) -> DicomDataset:
    item = DicomDataset()
    for name, value in values.items():
        setattr(item, name, value)
    return item


def _decimals(numbers: Sequence[float] | np.ndarray) -> list[str]:
    return [f"{float(number):.10g}"[:16] for number in numbers]
