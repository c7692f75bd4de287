"""Whatever bytes a file holds: it is read, or refused with a VolumeError, in bounded memory and time."""

from __future__ import annotations

import bz2
import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (the field's habit)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segqc.volumes import ReadLimits, Volume, VolumeError, read_labels, read_scan
from segqc.volumes.intake import check_labels, check_scan

SHAPE = (6, 5, 4)
LABELS = np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.uint8)
AFFINE = np.diag([-1.5, -1.25, 4, 1])
SCAN = Volume(np.zeros(SHAPE, np.float32), AFFINE)
LIMITS = ReadLimits(max_voxels=100_000, max_seconds=20)
NAMES = {"placenta": 1, "body": 2, "brain": 3}
NRRD = (
    "NRRD0004\ntype: {kind}\ndimension: 3\nspace: left-posterior-superior\nsizes: 6 5 4\nendian: little\n"
    "space directions: (1.5,0,0) (0,1.25,0) (0,0,4)\nspace origin: (0,0,0)\nkinds: domain domain domain\n"
    "encoding: {encoding}\nline skip: 0\nbyte skip: 0\nSegment0_Name:=placenta\nSegment0_LabelValue:=1\n"
    "Segment0_Layer:=0\nSegment1_Name:=body\nSegment1_LabelValue:=2\nSegment2_Name:=brain\nSegment2_LabelValue:=3\n\n"
)
PLAIN = NRRD.replace("Segment", "Other")


def _nrrd(text: str, encoding: str, payload: bytes, kind: str = "uint8") -> bytes:
    return text.format(kind=kind, encoding=encoding).encode() + payload


def _itk(suffix: str, folder: Path, compress: bool) -> bytes:
    image = sitk.GetImageFromArray(LABELS.T)
    image.SetSpacing((1.5, 1.25, 4))
    sitk.WriteImage(image, str(folder / f"seed{suffix}"), compress)
    return (folder / f"seed{suffix}").read_bytes()


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bytes, Callable[[bytes], bytes]]]:
    """Valid files: the suffix, the bytes to change, and what packs them afterwards."""
    folder = tmp_path_factory.mktemp("seeds")
    raw = LABELS.tobytes(order="F")
    one, two = (kind(LABELS.astype(np.int16), AFFINE).to_bytes() for kind in (nib.Nifti1Image, nib.Nifti2Image))
    scaled = nib.Nifti1Image(LABELS.astype(float), AFFINE)
    scaled.set_data_dtype("int16")
    nib.save(scaled, folder / "scaled.nii")
    ascii_ = " ".join(map(str, raw)).encode()
    return [
        (".nii", one, bytes),
        (".nii", two, bytes),
        (".nii", (folder / "scaled.nii").read_bytes(), bytes),
        (".nii.gz", one, gzip.compress),
        (".nii.gz", gzip.compress(one), bytes),
        (".seg.nrrd", _nrrd(NRRD, "raw", raw), bytes),
        (".seg.nrrd", _nrrd(NRRD, "gzip", gzip.compress(raw)), bytes),
        (".nrrd", _nrrd(PLAIN, "bzip2", bz2.compress(raw)), bytes),
        (".nrrd", _nrrd(PLAIN, "ascii", ascii_), bytes),
        (".nrrd", _nrrd(PLAIN, "raw", LABELS.astype("<f4").tobytes(order="F"), "float"), bytes),
        (".mha", _itk(".mha", folder, False), bytes),
        (".mha", _itk(".mha", folder, True), bytes),
    ]


WORDS = (b"-1", b"0", b"nan", b"inf", b"1e400", b"99999999999999999999", b"none", b"(", b"\n", b"\xff", b"\0" * 4, b",")


@st.composite
def changes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A few bytes of a file, mostly of its header, replaced, put in or taken out; or its end cut off."""
    edits = [
        (
            draw(st.sampled_from(("byte", "word", "number", "insert", "delete", "cut", "append"))),
            draw(st.one_of(st.integers(0, 400), st.integers(0, 1200))),
            draw(st.one_of(st.sampled_from(WORDS), st.binary(min_size=1, max_size=9))),
        )
        for _ in range(draw(st.integers(1, 4)))
    ]

    def change(content: bytes) -> bytes:
        for kind, place, new in edits:
            at = place % (len(content) + 1)
            if kind == "byte":
                content = content[:at] + new[:1] + content[at + 1 :]
            elif kind == "word":
                content = content[:at] + new + content[at + len(new) :]
            elif kind == "number":  # the number in a text header that stands at the place, or after it
                end = next((i for i in range(at, len(content)) if content[i : i + 1].isdigit()), at)
                content = content[:end] + new + content[end + 1 :]
            elif kind == "insert":
                content = content[:at] + new + content[at:]
            elif kind == "delete":
                content = content[:at] + content[at + len(new) :]
            elif kind == "cut":
                content = content[:at]
            else:
                content += new * (place + 1)
        return content

    return change


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 11), change=changes())
def test_any_bytes_are_read_or_refused(tmp_path, seeds, number, change):
    suffix, content, pack = seeds[number]
    path = tmp_path / f"file{suffix}"
    path.write_bytes(pack(change(content)))
    readers: list[Callable[[], object]] = [
        lambda: check_labels(path, SCAN, (1, 2, 3), NAMES, LIMITS, shown="the file").labels,
        lambda: read_labels(path, limits=LIMITS),
    ]
    if suffix not in (".mha", ".seg.nrrd"):
        readers += [lambda: read_scan(path, limits=LIMITS), lambda: check_scan(path, LIMITS)]
    for reader in readers:
        try:
            found = reader()
        except VolumeError as error:
            assert len(str(error)) < 1000
        else:
            assert found is not None


ZEROS = bytes(1 << 20)
MEGABYTES = 150


def _bomb(head: bytes = b"") -> bytes:
    return gzip.compress(head) + gzip.compress(ZEROS) * MEGABYTES


def _offset(header: bytes, offset: float) -> bytes:
    return header[:108] + np.float32(offset).tobytes() + header[112:352]


@pytest.mark.parametrize("kind", ["offset", "rest", "nrrd", "skip", "last", "bzip2", "mha", "header"])
def test_expansion_stops_at_what_the_header_promises(tmp_path, kind):
    nifti = nib.Nifti1Image(LABELS, AFFINE).to_bytes()
    big = MEGABYTES << 20
    name, content = {
        "offset": ("a.nii.gz", _bomb(_offset(nifti, big))),
        "rest": ("a.nii.gz", _bomb(nifti)),
        "nrrd": ("a.nrrd", _nrrd(PLAIN, "gzip", _bomb())),
        "skip": ("a.nrrd", _nrrd(PLAIN.replace("byte skip: 0", f"byte skip: {big}"), "gzip", _bomb())),
        "last": ("a.nrrd", _nrrd(PLAIN.replace("byte skip: 0", "byte skip: -1"), "gzip", _bomb())),
        "bzip2": ("a.nrrd", _nrrd(PLAIN, "bzip2", bz2.compress(ZEROS) * MEGABYTES)),
        "mha": ("a.mha", _itk(".mha", tmp_path, False).split(b"LOCAL\n")[0].replace(
            b"CompressedData = False", b"CompressedData = True") + b"LOCAL\n" + _bomb()),
        "header": ("a.nrrd", b"NRRD0004\n" + b"# \n" * (big // 8)),
    }[kind]  # fmt: skip
    path = tmp_path / name
    path.write_bytes(content)
    del content
    tracemalloc.start()
    try:
        with pytest.raises(VolumeError):
            read_labels(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20
