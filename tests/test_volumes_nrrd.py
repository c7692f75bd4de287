"""NRRD and MetaImage files lie where ITK sees them; what cannot be read faithfully is refused."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (the field's habit)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from segqc.volumes import VolumeError, read_labels, read_nrrd_header, read_scan

SHAPE = (6, 5, 4)
LABELS = np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.uint8)
HEAD = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 6 5 4\n"
SPACE = "space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,2)\nspace origin: (3,4,5)\n"
PAYLOAD = LABELS.tobytes(order="F")


def write(path: Path, text: str, payload: bytes = PAYLOAD) -> Path:
    path.write_bytes(text.encode() + b"\n" + payload)
    return path


def assert_read_as_by_itk(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    image = sitk.ReadImage(str(path))
    expected = np.eye(4)
    expected[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    expected[:3, 3] = image.GetOrigin()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, array)
    np.testing.assert_allclose(affine, np.diag([-1, -1, 1, 1]) @ expected, atol=1e-6)


@st.composite
def images(draw: st.DrawFn) -> sitk.Image:
    kinds = (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64)
    array = LABELS.T.astype(draw(st.sampled_from(kinds)))
    image = sitk.GetImageFromArray(array)
    angles = [draw(st.floats(-180, 180)) for _ in range(3)]
    flips = [draw(st.sampled_from((1, -1))) for _ in range(3)]
    image.SetDirection((Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * flips).ravel())
    image.SetSpacing([draw(st.floats(0.3, 8)) for _ in range(3)])
    image.SetOrigin([draw(st.floats(-500, 500)) for _ in range(3)])
    return image


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(image=images(), suffix=st.sampled_from((".nrrd", ".mha")), is_compressed=st.booleans())
def test_file_of_itk_is_read_as_itk_reads_it(tmp_path, image, suffix, is_compressed):
    path = tmp_path / f"labels{suffix}"
    sitk.WriteImage(image, str(path), is_compressed)
    found = read_labels(path)
    assert_read_as_by_itk(path, LABELS, found.affine)
    np.testing.assert_array_equal(found.array, LABELS)


def packed(content: bytes) -> bytes:
    """A gzip stream without the time: the names of tests hold it, and have to be the same in every process."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    "geometry",
    [
        SPACE,
        SPACE.replace("left-posterior-superior", "RAS"),
        SPACE.replace("left-posterior-superior", "left-anterior-superior"),
        SPACE.replace("space: left-posterior-superior", "space dimension: 3"),
        SPACE.replace("space origin: (3,4,5)\n", ""),
        SPACE + 'kinds: domain domain domain\nspace units: "mm" "mm" "mm"\nthicknesses: NaN NaN 3\n',
        "spacings: 1 1.5 2\n",
        SPACE.replace(",", ", ").replace("\n", "\r\n"),
    ],
)
def test_geometry_of_nrrd_is_that_of_itk(tmp_path, geometry):
    path = write(tmp_path / "labels.nrrd", HEAD + geometry + "encoding: raw\n")
    found = read_labels(path)
    np.testing.assert_array_equal(found.array, LABELS)
    assert_read_as_by_itk(path, LABELS, found.affine)


@pytest.mark.parametrize(
    ("text", "payload"),
    [
        ("encoding: raw\n", PAYLOAD),
        ("encoding: gzip\n", packed(PAYLOAD)),
        ("encoding: gz\n", packed(PAYLOAD[:50]) + packed(PAYLOAD[50:]) + bytes(9)),
        ("encoding: bzip2\n", bz2.compress(PAYLOAD[:50]) + bz2.compress(PAYLOAD[50:])),
        ("encoding: ascii\n", " ".join(map(str, PAYLOAD)).encode()),
        ("encoding: text\n", "\n".join(map(str, PAYLOAD)).encode() + b"\n"),
        ("encoding: raw\nline skip: 2\n", b"a\nbc\n" + PAYLOAD),
        ("encoding: raw\nbyte skip: 7\n", bytes(7) + PAYLOAD),
        ("encoding: raw\nbyte skip: -1\n", b"what comes before" + PAYLOAD),
        ("encoding: gzip\nlineskip: 1\nbyteskip: 5\n", b"text\n" + packed(bytes(5) + PAYLOAD)),
        ("encoding: gzip\nbyte skip: -1\n", packed(b"what comes before" + PAYLOAD)),
    ],
)
def test_every_encoding_and_skip_is_read(tmp_path, text, payload):
    path = write(tmp_path / "labels.nrrd", HEAD + SPACE + "# a comment\n" + text, payload)
    np.testing.assert_array_equal(read_labels(path).array, LABELS)


@pytest.mark.parametrize("skip", ["line", "byte"])
@pytest.mark.parametrize("count", [99_999_999_999, 10**30, 200, -2])
@pytest.mark.parametrize("encoding", ["raw", "gzip", "ascii"])
def test_skip_beyond_the_end_is_refused_at_once(tmp_path, skip, count, encoding):
    text = HEAD + SPACE + f"encoding: {encoding}\n{skip} skip: {count}\n"
    payload = gzip.compress(PAYLOAD) if encoding == "gzip" else PAYLOAD
    with pytest.raises(VolumeError, match=f"{skip} skip"):
        read_scan(write(tmp_path / "scan.nrrd", text, payload))


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ("type: uint8", "type: block", "type"),
        ("dimension: 3", "dimension: 4", "contradicts itself"),
        ("dimension: 3", "dimension: three", "contradicts itself"),
        ("sizes: 6 5 4", "sizes: 6 5 -4", "contradicts itself"),
        ("sizes: 6 5 4", "sizes: 60000 50000 40000", "more than the limit"),
        ("sizes: 6 5 4", f"sizes: 6 5 {'9' * 6000}", "contradicts itself"),
        ("(1,0,0)", "(1,0)", "contradicts itself"),
        ("(1,0,0)", "(1,0,0", "contradicts itself"),
        ("(1,0,0)", "(1e400,0,0)", "one 3-D volume"),
        ("(1,0,0)", "(0,1,0)", "singular"),
        ("space origin: (3,4,5)", "space origin: (3,4,inf)", "infinite"),
        ("space origin: (3,4,5)", "space origin: (inf,4,5)", "infinite"),
        ("space origin: (3,4,5)", "space origin: (nan,4,5)", "NaN"),
        ("space origin: (3,4,5)", "spacings: 1 1 1", "both spacings and a space"),
        ("space: left-posterior-superior", "space: scanner-xyz", "space 'scanner-xyz'"),
        ("encoding: raw", "encoding: zip", "encoding"),
        ("encoding: raw", "encoding: raw\nencoding: raw", "twice"),
        ("encoding: raw", "nonsense", "the line"),
        ("encoding: raw", 'encoding: raw\nspace units: "m" "m" "m"', "save it in mm"),
        ("encoding: raw", "encoding: raw\ndata file: LIST", "another file"),
        ("encoding: raw", "", "lacks the field 'encoding'"),
        ("type: uint8", "type: short", "lacks the field 'endian'"),
        ("type: uint8", "type: short\nendian: middle", r"contradicts itself \(endian middle"),
        ("NRRD0004", "NRRD", "no readable NRRD"),
    ],
)
def test_header_that_makes_no_sense_is_refused(tmp_path, old, new, finding):
    text = HEAD + SPACE + "encoding: raw\n"
    with pytest.raises(VolumeError, match=finding):
        read_scan(write(tmp_path / "scan.nrrd", text.replace(old, new)))


def test_key_value_pairs_of_a_header_are_read_as_text(tmp_path):
    path = write(tmp_path / "scan.nrrd", HEAD + SPACE + "encoding: raw\nPatientID:=Ä 7: a\n")
    assert read_nrrd_header(path)["PatientID"] == "Ä 7: a"


@pytest.mark.parametrize("name", ["left\\right", "two\nlines", "C:\\new", "\\\\n"])
def test_names_of_segments_are_read_as_they_were_given(tmp_path, name):
    escaped = name.replace("\\", r"\\").replace("\n", r"\n")
    segment = f"Segment0_Name:={escaped}\nSegment0_LabelValue:=1\nSegment0_Layer:=0\n"
    payload = (LABELS == 1).astype(np.uint8).tobytes(order="F")
    path = write(tmp_path / "a.seg.nrrd", HEAD + SPACE + "encoding: raw\n" + segment, payload)
    np.testing.assert_array_equal(read_labels(path, names={name: 7}).array, 7 * (LABELS == 1))


MHA = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
    "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 3 4 5\nElementSpacing = 1 1 2\nDimSize = 6 5 4\n"
    "ElementType = MET_UCHAR\nElementDataFile = LOCAL"
)


@pytest.mark.parametrize("local", ["LOCAL", "Local", "local"])
def test_metaimage_holds_its_voxels_itself_however_that_is_spelled(tmp_path, local):
    path = write(tmp_path / "labels.mha", MHA.replace("LOCAL", local))
    found = read_labels(path)
    assert_read_as_by_itk(path, found.array, found.affine)


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ("BinaryData = True", "BinaryData = False", "BinaryData"),
        ("ElementDataFile = LOCAL", "ElementDataFile = ../other.raw", "another file"),
        ("NDims = 3\n", "ElementNumberOfChannels = 3\n", "ElementNumberOfChannels"),
        ("DimSize = 6 5 4", "DimSize = 6 5", "2-D"),
        ("DimSize = 6 5 4", "DimSize = 6 5 nan", "contradicts itself"),
        ("DimSize = 6 5 4", "DimSize = 6 5 1e30", "more than the limit"),
        ("DimSize = 6 5 4", "DimSize = 6 5 5", "truncated"),
        ("ElementSpacing = 1 1 2", "ElementSpacing = 1 0 2", "length zero"),
        ("ElementSpacing = 1 1 2", "ElementSpacing = 1 x 2", "ElementSpacing"),
        ("MET_UCHAR", "MET_OTHER", "type"),
        ("CompressedData = False", "CompressedData = True", "truncated or damaged"),
        ("ElementDataFile = LOCAL", "", "no readable MetaImage"),
        ("ElementSpacing = 1 1 2\n", "", "lacks the field 'ElementSpacing'"),
    ],
)
def test_metaimage_that_makes_no_sense_is_refused(tmp_path, old, new, finding):
    path = write(tmp_path / "labels.mha", MHA)
    np.testing.assert_array_equal(read_labels(path).array, LABELS)
    with pytest.raises(VolumeError, match=finding):
        read_labels(write(path, MHA.replace(old, new)))
