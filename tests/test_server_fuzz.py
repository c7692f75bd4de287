"""No request and no file is answered by a bare 500: generated ones, thrown at the application in this process.

The scans, labels, strategies and models that the requests name exist mostly, so that they get past the 404s.
SEGQC_FUZZ_SECONDS says for how long (20 by default); the same examples come in each run, in the same order.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")
pytest.importorskip("schemathesis", reason="schemathesis is not installed (the extra 'dev')")

import requests
import schemathesis
from fastapi.testclient import TestClient
from monailabel.config import settings as monailabel_settings
from monailabel.interfaces.utils.app import app_instance, clear_cache
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from schemathesis import GenerationMode
from starlette.types import ASGIApp, Message, Scope

from segqc.server.serve import default_app_dir
from segqc.store import scans
from segqc.store.events import SERVER
from segqc.volumes import write_labels, write_scan
from tests.server_kit import add_models, assess, draw_case, make_dataset

pytestmark = pytest.mark.server

SECONDS = float(os.environ.get("SEGQC_FUZZ_SECONDS", "20"))
SCANS = ("scan_0", "scan_1", "scan_2", "scan_3")
BOUNDARY = "fuzz-boundary"


# ------------------------------------------------------------------------------------------------------- application


@dataclass
class Sent:
    """A request as it goes over the wire."""

    method: str
    target: str
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""

    def scope(self) -> Scope:
        path, _, query = self.target.partition("?")
        headers = [("host", "127.0.0.1:8000"), ("content-length", str(len(self.body))), *self.headers]
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": unquote(path),
            "raw_path": path.encode("latin-1", "replace"),
            "root_path": "",
            "query_string": query.encode("latin-1", "replace"),
            "headers": [(n.lower().encode("latin-1", "replace"), v.encode("latin-1", "replace")) for n, v in headers],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 8000),
        }


@dataclass
class Received:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Server:
    """The application with a folder of scans, labels, estimates and (untrained) networks."""

    client: TestClient
    folder: Path
    temporary: Path

    @property
    def app(self) -> ASGIApp:
        return self.client.app

    def send(self, sent: Sent) -> Received:
        async def ask() -> list[Message]:
            messages: list[Message] = []
            left = [{"type": "http.request", "body": sent.body, "more_body": False}]

            async def receive() -> Message:
                return left.pop() if left else {"type": "http.disconnect"}

            async def send(message: Message) -> None:
                messages.append(message)

            await self.app(sent.scope(), receive, send)
            return messages

        assert self.client.portal is not None
        first, *rest = self.client.portal.call(ask)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in first["headers"]}
        return Received(first["status"], headers, b"".join(message.get("body", b"") for message in rest))

    def restore(self) -> None:
        """Bring back what requests were allowed to take away."""
        add_models(self.folder)
        dataset = app_instance().context.dataset
        with dataset.store.read() as transaction:
            gone = scans.names(transaction, states=("excluded",))
        for name in set(gone) & set(SCANS):
            dataset.store.review(name, "unlabelled", SERVER)

    def schema(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.send(Sent("GET", "/openapi.json")).body)
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("fuzz")
    folder = make_dataset(base / "studies", scans=len(SCANS), finals=2)
    temporary = base / "temporary"
    temporary.mkdir()
    add_models(folder)
    saved, saved_folder = monailabel_settings.model_dump(), tempfile.tempdir
    tempfile.tempdir = str(temporary)
    monailabel_settings.MONAI_LABEL_APP_DIR = str(default_app_dir())
    monailabel_settings.MONAI_LABEL_STUDIES = str(folder)
    monailabel_settings.MONAI_LABEL_AUTO_UPDATE_SCORING = False
    monailabel_settings.MONAI_LABEL_SESSION_PATH = str(folder / "segqc" / "sessions")
    log = base / "server.log"
    log.write_text("a line\n" * 1000)
    monailabel_settings.MONAI_LABEL_APP_CONF = {
        "bootstrap": "false",
        "log_file": str(log),
        "upload_limit_mb": "50",
        "sign_in": "false",
    }
    from segqc.server import waiting
    from segqc.server.app import create_app

    with pytest.MonkeyPatch.context() as patch, TestClient(create_app(), raise_server_exceptions=False) as client:
        patch.setattr(waiting, "NO_WORKER_SECONDS", 0.0)
        patch.setattr(waiting, "POLL_SECONDS", 0.0)
        dataset = app_instance().context.dataset
        for name in SCANS[1:3]:
            assess(dataset, name, 0.5)
        yield Server(client, folder, temporary)
    tempfile.tempdir = saved_folder
    clear_cache()
    for name, value in saved.items():
        setattr(monailabel_settings, name, value)


def check(server: Server, sent: Sent) -> Received:
    """Send a request and hold the answer to what all answers have in common."""
    answer = server.send(sent)
    assert answer.status < 500 or answer.status in (503, 507), (answer.status, answer.body[:500])
    text = answer.body.decode("utf-8", "replace")
    if answer.headers.get("content-type", "").startswith("application/json"):

        def no_constant(name: str) -> float:
            raise AssertionError(f"{name} is not JSON: {text[:500]}")

        told = json.loads(text, parse_constant=no_constant) if text else None
        if answer.status >= 400 and sent.method != "HEAD":
            assert isinstance(told, dict)
            assert isinstance(told["detail"], str)
            assert 5 < len(told["detail"]) < 2000
    else:
        # a range that a file does not have is answered by headers alone (RFC 9110, 15.5.17)
        assert answer.status < 400 or answer.status == 416 or sent.method == "HEAD", text[:500]
    if answer.status >= 400:
        assert str(server.temporary) not in text
        assert "Traceback" not in text
    return answer


def fuzz(server: Server, strategy: st.SearchStrategy[Sent], share: float) -> None:
    """Send generated requests for a share of the time."""
    end = time.monotonic() + SECONDS * share
    number = 0
    while time.monotonic() < end:
        server.restore()

        @seed(number)
        @settings(
            max_examples=20, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck), print_blob=False,
        )  # fmt: skip
        @given(strategy)
        def throw(sent: Sent) -> None:
            check(server, sent)

        throw()
        number += 1
    assert number > 0
    assert list(server.temporary.iterdir()) == [], "what was uploaded or made for an answer is removed"
    assert server.send(Sent("GET", "/info/")).status == 200
    assert {path.name for path in server.folder.parent.iterdir()} == {"studies", "temporary", "server.log"}


# ------------------------------------------------------------------------------------------------------------- values


NASTY_TEXT = st.sampled_from([
    "", " ", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "x" * 300, "\U0001f9e0" * 200, "\ud800", "a\0b", "a\nb",
    "%00", "%2e%2e", "e\u0301", "\u202e", "'; DROP TABLE scan; --", "=1+1", "{}", "null", "NaN", "1e999", "-1",
    "99999999999999999999", "9" * 5000, "true", "scan_0.nii.gz", "SCAN_0", "scan_0 ", "final",
])  # fmt: skip
NASTY_NUMBER = st.sampled_from([
    0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 1.5, -0.0, 1e308, math.nan, math.inf, -math.inf, True, 2**53 + 1,
])  # fmt: skip
SCALAR = st.one_of(NASTY_NUMBER, NASTY_TEXT, st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20))
JSON = st.recursive(
    SCALAR, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NASTY_TEXT, inner, max_size=3)),
    max_leaves=8,
)  # fmt: skip
KEYS = st.sampled_from([
    "epochs", "max_epochs", "fold_epochs", "steps_per_epoch", "batch", "train_batch_size", "learning_rate", "seed",
    "size", "max_batch_size", "label_tag", "save_label", "force", "labels", "client_id", "decision", "reason",
    "segmentation", "segqc", "label_info", "opened_slices", "opened_structures", "result_extension", "result_dtype",
    "result_compress", "image", "model", "segmentationMeta", "name", "lease", "label_version",
])  # fmt: skip
MEANT = st.sampled_from([
    1, 2, 0.001, "small", "paper", True, "original", "final", "anna", "approve", "reject", "exclude", "reopen", ".nii",
    ".nii.gz", ".nrrd", "uint8", [2, 3], ["liver"], {"epochs": 1}, [{"name": "liver"}, {"name": "spleen"}],
    [{"name": "spleen", "idx": 2}, {"name": "likely error", "idx": 1}], {"status": "approved", "level": "hard"},
])  # fmt: skip
PARAMS = st.dictionaries(st.one_of(KEYS, NASTY_TEXT), st.one_of(MEANT, JSON), max_size=5)
RAW_JSON = st.one_of(
    PARAMS.map(json.dumps),
    JSON.map(json.dumps),
    st.sampled_from(["", "{", "[" * 5000, '{"a":' * 2000, '{"a": 1, "a": 2}', "\ufeff{}", '"\\ud800"', "nul"]),
)
KNOWN = {
    "image": SCANS, "id": SCANS, "label": SCANS, "scan": SCANS,
    "tag": ("final", "original", "likely-errors", "returned"),
    "strategy": ("segqc", "random", "tta", "sequential"), "model": ("segmentation", "segqc"),
    "method": ("segqc", "tta", "entropy"), "output": ("image", "json", "all", "train", "stats"),
    "images": ("all", "labeled", "unlabeled"), "version": ("1", "2", "3"), "limit_cases": ("1", "2"),
    "lines": ("1", "100"), "expiry": ("0", "60"), "path": ("index.html", "x/y"),
    "check_sum": ("SHA256:00", "FOO:1", ":", "MD5"), "client_id": ("anna", "berta"),
    "session_id": ("0" * 8 + "-0000-0000-0000-" + "0" * 12,),
}  # fmt: skip


def value_of(name: str) -> st.SearchStrategy[str]:
    """A parameter's value: mostly one that exists."""
    wild = st.one_of(NASTY_TEXT, NASTY_NUMBER.map(str), st.text(max_size=10), st.sampled_from(["true", "false"]))
    if name not in KNOWN:
        return wild
    known = st.sampled_from(KNOWN[name])
    return st.one_of(known, known, known, wild)


def escaped(text: str) -> str:
    return quote(text.encode("utf-8", "surrogatepass"), safe="")


# -------------------------------------------------------------------------------------------------------------- files


def scan_bytes(suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_scan(draw_case(0)[0], Path(folder) / f"x{suffix}")
        return (Path(folder) / f"x{suffix}").read_bytes()


def label_bytes(suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_labels(draw_case(0)[1], Path(folder) / f"x{suffix}")
        return (Path(folder) / f"x{suffix}").read_bytes()


def dicom_slice(index: int) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, f"1.2.{index + 1}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    item.is_little_endian, item.is_implicit_VR = True, False
    item.SOPClassUID, item.SOPInstanceUID, item.SeriesInstanceUID = CTImageStorage, f"1.2.{index + 1}", "1.2.3"
    item.Rows = item.Columns = 8
    item.PixelSpacing, item.SliceThickness, item.InstanceNumber = [1.5, 1.5], 4, index + 1
    item.ImageOrientationPatient, item.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 4 * index]
    item.SamplesPerPixel, item.PhotometricInterpretation, item.PixelRepresentation = 1, "MONOCHROME2", 0
    item.BitsAllocated, item.BitsStored, item.HighBit = 16, 16, 15
    item.PixelData = np.arange(64, dtype="<u2").tobytes()
    file = io.BytesIO()
    pydicom.dcmwrite(file, item, write_like_original=False)
    return file.getvalue()


def segments(nrrd: bytes) -> bytes:
    """A label map as 3D Slicer writes it, with the names of its segments."""
    lines = b"".join(
        b"Segment%d_Name:=%s\nSegment%d_LabelValue:=%d\nSegment%d_Layer:=0\n" % (i, name, i, value, i)
        for i, (name, value) in enumerate([(b"liver", 1), (b"spleen", 4)])
    )
    return nrrd.replace(b"\n\n", b"\n" + lines + b"\n", 1)


def metaimage() -> bytes:
    labels = draw_case(0)[1]
    spacing = " ".join(map(str, np.diag(labels.affine)[:3]))
    head = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
        f"TransformMatrix = -1 0 0 0 -1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = {spacing}\n"
        f"DimSize = {' '.join(map(str, labels.shape))}\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
    )
    return head.encode() + labels.array.tobytes(order="F")


SLICES = [dicom_slice(i) for i in range(3)]
SCAN = {suffix: scan_bytes(suffix) for suffix in (".nii", ".nii.gz", ".nrrd")}
LABEL = {suffix: label_bytes(suffix) for suffix in (".nii", ".nii.gz", ".nrrd")}
NIFTI_FIELDS = [(name, *nib.Nifti1Header.template_dtype.fields[name]) for name in nib.Nifti1Header.template_dtype.names]
LABEL |= {".seg.nrrd": segments(LABEL[".nrrd"]), ".mha": metaimage()}
META_LINES = st.sampled_from([
    "NDims = 99999999", "NDims = -1", "DimSize = 99999 99999 99999", "DimSize = 0 0 0", "DimSize = nan 1", "DimSize =",
    "ElementType = MET_NONSENSE", "ElementType = MET_DOUBLE", "CompressedData = True", "CompressedDataSize = -1",
    "CompressedDataSize = 99999999999999999999", "HeaderSize = -1", "HeaderSize = 99999999999", "HeaderSize = x",
    "TransformMatrix = nan nan nan nan nan nan nan nan nan", "TransformMatrix = 1", "Offset = 1e999 x",
    "BinaryData = x",
    "ElementSpacing = 0 0 0", "ElementSpacing = -1 nan inf", "ElementNumberOfChannels = 99999999", "=", "x",
    "ElementDataFile = /etc/passwd", "ElementDataFile = LIST", "ElementDataFile = x%d.raw 1 99999999 1",
])  # fmt: skip
# where readers compute with what they find, more often than the rest
NIFTI_FIELDS += 6 * [found for found in NIFTI_FIELDS if found[0] in (
    "sizeof_hdr", "dim", "datatype", "bitpix", "pixdim", "vox_offset", "scl_slope", "scl_inter", "qform_code",
    "sform_code", "quatern_b", "srow_x", "magic", "xyzt_units",
)]  # fmt: skip
NRRD_LINES = st.sampled_from([
    "line skip: 99999999999", "line skip: -1", "byte skip: -1", "byte skip: 999999999999", "sizes: 99999 99999 99999",
    "sizes: 0 0 0", "sizes: -1 2 3", "sizes: a b c", "dimension: 0", "dimension: 4", "dimension: x", "type: double",
    "type: block", "type: nonsense", "encoding: bzip2", "encoding: hex", "encoding: text", "encoding: nonsense",
    "endian: big", "space directions: (nan,0,0) (0,1,0) (0,0,1)", "space directions: (0,0,0) (0,0,0) (0,0,0)",
    "space directions: none none none", "space directions: (1,0) (0,1)", "space origin: (1e308,inf,nan)",
    "space origin: x", "space: nonsense", "space: scanner-xyz", "kinds: list domain domain", "data file: /etc/passwd",
    "data file: LIST", "data file: x%d.raw 1 99999999 1", "datafile: ../x", "measurement frame: (1,0,0)", "min: nan",
    "Segment0_Name:=liver", "Segment0_LabelValue:=99999999999999999999", "Segment0_Layer:=-5", "Segment0_Extent:=0 x",
    "\ud7ff: \u0000", ":=", "units: \"m\" \"m\" \"m\"", "spacings: nan nan nan", "thicknesses: -1 -1 -1",
])  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, content: bytes, suffix: str) -> bytes:
    """A valid file with something wrong in it, in most cases where readers look."""
    plain = gzip.decompress(content) if suffix == ".nii.gz" else content
    data = bytearray(plain)
    kind = draw(st.sampled_from(["none", "field", "bytes", "cut", "longer", "field"]))
    if kind == "field" and suffix.startswith(".nii"):
        _, dtype, offset = draw(st.sampled_from(NIFTI_FIELDS))
        size, count = dtype.base.itemsize, dtype.itemsize // dtype.base.itemsize
        bits = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80", b"\x01"])) * size
        if dtype.base.kind == "f":
            bits = struct.pack("<f", draw(st.sampled_from([math.nan, math.inf, -1.0, 0.0, 1e38, 1e-38, 352.5])))
        for index in [draw(st.integers(0, count - 1))] if draw(st.booleans()) else range(count):
            data[offset + size * index : offset + size * (index + 1)] = bits
    elif kind == "field" and suffix != ".dcm":
        end, sign, nasty = (b"LOCAL\n", b"=", META_LINES) if suffix == ".mha" else (b"\n\n", b":", NRRD_LINES)
        head, _, rest = bytes(data).partition(end)
        line = draw(nasty).encode("utf-8", "replace")
        kept = [old for old in head.split(b"\n") if old.split(sign)[0].strip() != line.split(sign)[0].strip()]
        place = draw(st.integers(1, len(kept) - 1))
        data = bytearray(b"\n".join([*kept[:place], line, *kept[place:]]) + end + rest)
    elif kind == "field" and suffix == ".dcm":
        item = pydicom.dcmread(io.BytesIO(content))
        tag = draw(st.sampled_from(sorted(item.keys())))
        if draw(st.booleans()):
            del item[tag]
        else:
            item[tag]._value = draw(
                st.sampled_from(["x", "", -1, 0, 65535, None, [1], [0, 0, 0, 0, 0, 0], math.nan, b"\0"])
            )
        try:
            file = io.BytesIO()
            pydicom.dcmwrite(file, item)
            data = bytearray(file.getvalue())
        except Exception:  # pydicom does not write it
            pass
    elif kind == "bytes":
        reach = draw(st.sampled_from([len(data), min(len(data), 400)]))
        for _ in range(draw(st.integers(1, 8))):
            data[draw(st.integers(0, reach - 1))] = draw(st.integers(0, 255))
    elif kind == "cut":
        del data[draw(st.integers(0, len(data))) :]
    elif kind == "longer":
        data += bytes(draw(st.integers(1, 10_000)))
    if suffix == ".nii.gz":
        packed = bytearray(gzip.compress(bytes(data), mtime=0))
        if draw(st.integers(0, 5)) == 0 and packed:
            packed[draw(st.integers(0, len(packed) - 1))] ^= 0xFF
        return bytes(packed)
    return bytes(data)


FILE_NAMES = st.sampled_from([
    "", "x", ".nii", "x.nii.gz/../../y.py", "x\0.nii.gz", "x\n.nii.gz", "\ud800.nii", "../../x.nii.gz", "x.seg.nrrd",
    "x.NII.GZ", "\U0001f9e0" * 70 + ".nii", "x" * 300 + ".nii.gz", "2: AX T2.nii.gz", "x.mha", "CON.nii", "meta.info",
])  # fmt: skip


@st.composite
def uploads(draw: st.DrawFn, of: dict[str, bytes]) -> tuple[str, bytes]:
    suffix = draw(st.sampled_from([*of, *of, ".dcm"]))
    content = draw(changed(SLICES[0] if suffix == ".dcm" else of[suffix], suffix))
    name = draw(FILE_NAMES) if draw(st.integers(0, 5)) == 0 else f"x{suffix}"
    return name, content


def multipart(fields: Sequence[tuple[str, str]], files: Sequence[tuple[str, str, bytes]]) -> bytes:
    body = bytearray()
    for name, value in fields:
        body += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode()
        body += value.encode("utf-8", "surrogatepass") + b"\r\n"
    for name, file_name, content in files:
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="{file_name}"\r\n\r\n'
        body += head.encode("utf-8", "surrogatepass") + content + b"\r\n"
    return bytes(body) + f"--{BOUNDARY}--\r\n".encode()


# ----------------------------------------------------------------------------------------------------------- requests


@dataclass(frozen=True)
class Operation:
    method: str
    path: str
    query: tuple[str, ...]
    content: str | None


HIDDEN = [
    Operation("PUT", "/datastore/", ("image",), "multipart/form-data"),
    Operation("DELETE", "/datastore/", ("id",), None),
    Operation("PUT", "/datastore/updatelabelinfo", ("label", "tag"), "application/x-www-form-urlencoded"),
    Operation("GET", "/ohif/{path}", (), None),
    Operation("GET", "/proxy/{path}", (), None),
    Operation("POST", "/infer/wsi/{model}", (), None),
    Operation("GET", "/{path}", (), None),
]


def operations(schema: dict[str, Any]) -> list[Operation]:
    found = []
    for path, methods in schema["paths"].items():
        for method, told in methods.items():
            names = [p["name"] for p in told.get("parameters", []) if p["in"] == "query"]
            contents = list(told.get("requestBody", {}).get("content", {}))
            found.append(Operation(method.upper(), path, (*names, "client_id"), contents[0] if contents else None))
    return found + HIDDEN


HEADERS = st.sampled_from([
    ("origin", "http://127.0.0.1:8000"), ("cookie", "segqc_client=" + "0" * 32), ("cookie", "segqc_client=\xe9\x00"),
    ("cookie", ";;;="), ("range", "bytes=0-1,5-"), ("range", "bytes=99999999999-"), ("if-range", "x"),
    ("accept", "\xff"), ("authorization", "Bearer \xff"), ("content-encoding", "gzip"), ("expect", "100-continue"),
    ("accept-encoding", "gzip;q=nan"), ("x-forwarded-host", "evil.example"), ("if-modified-since", "x"),
])  # fmt: skip
CONTENT_TYPES = st.sampled_from([
    "application/json; charset=utf-16", "multipart/form-data", "multipart/form-data; boundary=", "text/plain", "\xff",
    f"multipart/form-data; boundary={BOUNDARY}; charset=idna", "application/json; charset=\xff", "multipart/mixed",
    f"multipart/form-data; boundary={BOUNDARY}; charset=unicode_escape", "application/x-www-form-urlencoded",
    f"multipart/form-data; boundary={BOUNDARY}; charset=zlib",
])  # fmt: skip
TEXT_FIELDS = ("params", "info")
FILE_FIELDS = ("file", "files", "label", "image")


@st.composite
def written(draw: st.DrawFn, found: list[Operation]) -> Sent:
    """A request to one of the operations, written by hand as clients that mean harm write it."""
    operation = draw(st.sampled_from(found))
    path = operation.path
    for name in KNOWN:
        path = path.replace(f"{{{name}}}", escaped(draw(value_of(name))))
    asked = (
        draw(st.lists(st.sampled_from(operation.query or ("x",)), unique=True))
        if draw(st.booleans())
        else operation.query
    )
    query = "&".join(f"{escaped(name)}={escaped(draw(value_of(name)))}" for name in asked)
    content, body, headers = operation.content, b"", []
    if content == "application/json":
        body = draw(RAW_JSON).encode("utf-8", "surrogatepass")
    elif content == "application/x-www-form-urlencoded":
        body = "&".join(f"{name}={escaped(draw(RAW_JSON))}" for name in TEXT_FIELDS).encode()
    elif content == "multipart/form-data":
        fields = [(name, draw(RAW_JSON)) for name in TEXT_FIELDS if draw(st.booleans())]
        files = []
        for name in FILE_FIELDS:
            for _ in range(draw(st.integers(0, 2)) if name == "files" else draw(st.integers(0, 1))):
                files.append((name, *draw(uploads(LABEL if name == "label" else SCAN))))
        body = multipart(fields, files)
        content = f"multipart/form-data; boundary={BOUNDARY}"
    if content is not None:
        headers.append(("content-type", draw(CONTENT_TYPES) if draw(st.integers(0, 9)) == 0 else content))
    if draw(st.integers(0, 3)) == 0:
        headers += draw(st.lists(HEADERS, max_size=3))
    return Sent(operation.method, f"{path}?{query}", headers, body)


@st.composite
def submitted(draw: st.DrawFn) -> Sent:
    """A scan or a label map with something wrong in the file, to every way in."""
    method, target, name, of = draw(st.sampled_from([
        ("PUT", "/datastore/label?image=scan_0&tag=final", "label", LABEL),
        ("PUT", "/datastore/image?image=new_{}", "file", SCAN),
        ("PUT", "/session/", "files", SCAN),
        ("POST", "/infer/segmentation?output=json", "file", SCAN),
        ("POST", "/infer/segqc?output=json&image=scan_1", "label", LABEL),
    ]))  # fmt: skip
    files = [(name, *draw(uploads(of)))]
    if name == "files" and draw(st.booleans()):
        files = [(name, f"{i}.dcm", draw(changed(content, ".dcm"))) for i, content in enumerate(SLICES)]
    body = multipart([("params", json.dumps(draw(PARAMS)) if draw(st.booleans()) else "{}")], files)
    headers = [("content-type", f"multipart/form-data; boundary={BOUNDARY}")]
    return Sent(method, target.format(draw(st.integers(0, 10**6))), headers, body)


def by_schema(schema: dict[str, Any]) -> st.SearchStrategy[Sent]:
    """What schemathesis makes of the application's own description: requests that fit it, and that do not."""
    loaded = schemathesis.openapi.from_dict(schema)
    cases = [
        result.ok().as_strategy(generation_mode=mode)
        for result in loaded.get_all_operations()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    ]

    @st.composite
    def made(draw: st.DrawFn) -> Sent:
        case = draw(st.one_of(cases))
        for values in (case.path_parameters, case.query):
            for name in list(values or {}):
                if name in KNOWN and draw(st.booleans()):
                    values[name] = draw(st.sampled_from(KNOWN[name]))
        prepared = requests.Request(**case.as_transport_kwargs(base_url="http://127.0.0.1:8000")).prepare()
        body = prepared.body or b""
        return Sent(
            str(prepared.method),
            prepared.path_url,
            [(n, str(v)) for n, v in prepared.headers.items() if n.lower() not in ("host", "content-length")],
            body if isinstance(body, bytes) else str(body).encode("utf-8", "surrogatepass"),
        )

    return made()


def test_requests_that_fit_the_description_or_do_not(server: Server) -> None:
    fuzz(server, by_schema(server.schema()), 0.25)


def test_requests_of_clients_that_mean_harm(server: Server) -> None:
    fuzz(server, written(operations(server.schema())), 0.4)


def test_files_with_something_wrong_in_them(server: Server) -> None:
    fuzz(server, submitted(), 0.35)
