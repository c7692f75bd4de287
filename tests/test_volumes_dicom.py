"""DICOM: which bits count, which files are one volume, and what damaged files may do."""

from __future__ import annotations

import io
import logging
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from segqc.volumes import (
    ReadLimits,
    Volume,
    VolumeError,
    check_dicom_image,
    dicom_headers,
    is_scan_path,
    read_scan,
    sort_into_volumes,
    write_scan,
)
from segqc.volumes.dicom import open_dicom
from segqc.volumes.inputs import InputFile
from segqc.volumes.tags import read_tag

SHAPE = (6, 5, 4)
Edit = Callable[[int, Dataset], object]


def stack(seed: int = 0, low: int = -500, high: int = 500) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, SHAPE).astype(np.int16)


def edit(folder: Path, change: Edit) -> Path:
    for index, file in enumerate(sorted(folder.iterdir())):
        item = pydicom.dcmread(file)
        change(index, item)
        item.save_as(file)
    return folder


def series(folder: Path, array: np.ndarray | None = None, change: Edit | None = None, uid: str = "1.2.3") -> Path:
    """A folder of one CT series, 1 x 1 x 3 mm."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_scan(Volume(stack() if array is None else array, np.diag([1.0, 1.0, 3.0, 1.0])), folder)

    def named(index: int, item: Dataset) -> None:
        item.SeriesInstanceUID, item.SOPInstanceUID = uid, f"{uid}.{index + 1}"
        item.file_meta.MediaStorageSOPInstanceUID = item.SOPInstanceUID
        item.PatientID, item.StudyInstanceUID = "P1", "1.2"
        if change is not None:
            change(index, item)

    return edit(folder, named)


def add(folder: Path, other: Path, prefix: str) -> Path:
    """Move the files of one folder into another."""
    for file in other.iterdir():
        shutil.move(file, folder / f"{prefix}{file.name}")
    other.rmdir()
    return folder


def titles(folder: Path) -> list[str]:
    return [volume.title for volume in sort_into_volumes(sorted(folder.rglob("*.*"))).volumes]


def reasons(folder: Path) -> list[str]:
    return [entry.reason for entry in sort_into_volumes(sorted(folder.rglob("*.*"))).left_out]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of values that it was given on purpose
        yield


# ------------------------------------------------------------------------------------------------------------ pixels

WORDS = [
    # bits allocated, bits stored, high bit
    (16, 12, 11),
    (16, 12, 15),
    (16, 10, 12),
    (16, 16, 15),
    (16, 1, 0),
    (8, 8, 7),
    (8, 6, 5),
    (8, 5, 7),
    (32, 20, 19),
    (32, 24, 31),
]


def store_words(allocated: int, stored: int, high: int, signed: bool, values: np.ndarray) -> Edit:
    """Store values in some bits of words; the others are random."""
    noise = np.random.default_rng(1)
    mask = ((1 << stored) - 1) << (high - stored + 1)

    def change(index: int, item: Dataset) -> None:
        item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = (
            allocated,
            stored,
            high,
            int(signed),
        )
        plane = values[:, :, index].T.astype(np.int64)
        words = ((plane & ((1 << stored) - 1)) << (high - stored + 1)) | (
            noise.integers(0, 1 << allocated, plane.shape) & ~mask
        )
        item.PixelData = words.astype(f"<u{allocated // 8}").tobytes()
        item["PixelData"].VR = "OW" if allocated > 8 else "OB"
        item.RescaleSlope, item.RescaleIntercept = 1, 0

    return change


@pytest.mark.parametrize(("allocated", "stored", "high"), WORDS)
@pytest.mark.parametrize("signed", [False, True])
def test_only_the_stored_bits_count_and_the_high_bit_is_the_sign(
    tmp_path: Path, allocated: int, stored: int, high: int, signed: bool
) -> None:
    low = -(1 << (stored - 1)) if signed else 0
    values = np.random.default_rng(0).integers(low, low + (1 << stored), SHAPE)
    values[0, 0, 0], values[1, 0, 0] = low, low + (1 << stored) - 1
    folder = series(tmp_path / "s", change=store_words(allocated, stored, high, signed, values))
    assert np.array_equal(read_scan(folder).array, values.astype(np.float32))
    # GDCM reads other high bits otherwise than the standard, and words of 8 and 32 bits only if all of them are stored
    if high == stored - 1 and (allocated == 16 or stored == allocated):
        for index, file in enumerate(sorted(folder.iterdir())):
            itk = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file), imageIO="GDCMImageIO"))[0].T
            assert np.array_equal(itk, values[:, :, index])


@pytest.mark.parametrize("signed", [False, True])
def test_unused_bits_are_ignored_in_run_length_encoding_too(tmp_path: Path, signed: bool) -> None:
    values = np.random.default_rng(0).integers(-2048 if signed else 0, 2047, SHAPE)
    change = store_words(16, 12, 11, signed, values)
    folder = series(tmp_path / "s", change=lambda i, item: (change(i, item), item.compress(RLELossless)))
    assert np.array_equal(read_scan(folder).array, values)


def test_an_old_overlay_in_unused_bits_is_ignored(tmp_path: Path) -> None:
    array = np.abs(stack())

    def overlay(index: int, item: Dataset) -> None:
        item.BitsStored, item.HighBit, item.PixelRepresentation = 12, 11, 0
        item.PixelData = (array[:, :, index].T.astype("<u2") | np.uint16(0x1000)).tobytes()
        item.add_new(0x60000100, "US", 16)
        item.add_new(0x60000102, "US", 12)

    assert np.array_equal(read_scan(series(tmp_path / "s", change=overlay)).array, array)


@pytest.mark.parametrize(("stored", "high"), [(17, 15), (12, 16), (12, 3), (0, 99)])
def test_bits_that_contradict_each_other_are_refused(tmp_path: Path, stored: int, high: int) -> None:
    folder = series(tmp_path / "s", change=lambda _, i: (setattr(i, "BitsStored", stored), setattr(i, "HighBit", high)))
    with pytest.raises(VolumeError, match="contradict each other"):
        read_scan(folder)


@pytest.mark.parametrize("name", ["RescaleSlope", "RescaleIntercept"])
@pytest.mark.parametrize("value", [None, "", "0"])
def test_a_rescale_that_says_nothing_changes_nothing(tmp_path: Path, name: str, value: str | None) -> None:
    folder = series(tmp_path / "s", change=lambda _, item: setattr(item, name, value))
    assert np.array_equal(read_scan(folder).array, stack())
    edit(folder, lambda _, item: item.pop(name))
    assert np.array_equal(read_scan(folder).array, stack())


@pytest.mark.parametrize("value", [b"abc ", b"1\\2 ", b"1e300 ", b"nan "])
def test_a_rescale_that_is_no_number_is_refused(tmp_path: Path, value: bytes) -> None:
    folder = series(tmp_path / "s")
    for file in folder.iterdir():  # slope and its two bytes are written by hand: pydicom would not write such values
        content = file.read_bytes()
        head = b"\x28\x00\x53\x10DS"
        start = content.index(head)
        file.write_bytes(content[:start] + head + len(value).to_bytes(2, "little") + value + content[start + 10 :])
    with pytest.raises(VolumeError, match=r"rescale|pixels of 00001\.dcm cannot be read"):
        read_scan(folder)


def test_padding_stays_as_it_is(tmp_path: Path) -> None:
    array = stack()
    array[0] = -2000
    folder = series(tmp_path / "s", array, change=lambda _, item: item.add_new(0x00280120, "SS", -2000))
    assert np.array_equal(read_scan(folder).array, array)


SAMPLES = Path(pydicom.data.__file__).parent / "test_files"


@pytest.mark.parametrize(
    "name",
    [
        "693_J2KI.dcm", "CT_small.dcm", "J2K_pixelrep_mismatch.dcm", "JPEG2000.dcm", "MR_small.dcm", "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_jp2klossless.dcm", "MR_small_padded.dcm",
    ],
)  # fmt: skip
def test_transfer_syntaxes_are_read_as_gdcm_reads_them(tmp_path: Path, name: str) -> None:
    shutil.copy(SAMPLES / name, tmp_path / "one.dcm")
    edit(tmp_path, lambda _, item: geometry(item))
    itk = SimpleITK.ReadImage(str(SAMPLES / name), imageIO="GDCMImageIO")
    assert np.array_equal(read_scan(tmp_path).array[:, :, 0].T, SimpleITK.GetArrayFromImage(itk)[0].astype(np.float32))


def geometry(item: FileDataset) -> None:
    item.ImagePositionPatient, item.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    item.PixelSpacing, item.SliceThickness, item.SeriesInstanceUID = [1, 1], 1, "1.2.3"


@pytest.mark.parametrize("name", ["MR_small_jpeg_ls_lossless.dcm", "JPGExtended.dcm"])
def test_pixels_that_cannot_be_decoded_are_named_with_the_way_out(tmp_path: Path, name: str) -> None:
    shutil.copy(SAMPLES / name, tmp_path / "one.dcm")
    edit(tmp_path, lambda _, item: geometry(item))
    with pytest.raises(VolumeError, match=r"one\.dcm cannot be decoded here \(JPEG.*decompress"):
        read_scan(tmp_path)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("suffix", ["", ".dcm", ".ima", ".1", ".xyz"])
def test_files_without_preamble_are_dicom_whatever_their_suffix(tmp_path: Path, syntax: str, suffix: str) -> None:
    folder = series(tmp_path / "s")
    for index, file in enumerate(sorted(folder.iterdir())):
        item = pydicom.dcmread(file)
        item.is_implicit_VR, item.is_little_endian = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
        if not item.is_little_endian:
            item.PixelData = np.frombuffer(item.PixelData, "<i2").astype(">i2").tobytes()
        item.file_meta, item.preamble = pydicom.dataset.FileMetaDataset(), None
        item.save_as(folder / f"IM{index:04d}{suffix}")
        file.unlink()
    assert not any(file.read_bytes()[128:132] == b"DICM" for file in folder.iterdir())
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 99)
    (folder / "readme.txt").write_text("no image", encoding="utf-8")
    (folder / "preview.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    assert is_scan_path(folder)
    assert np.array_equal(read_scan(folder).array, stack())
    assert read_tag(folder, "PatientID") == "P1"


@pytest.mark.parametrize("cut", [128, 132])
def test_files_that_begin_with_the_mark_or_after_it_are_dicom(tmp_path: Path, cut: int) -> None:
    folder = series(tmp_path / "s")
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[cut:])
    assert np.array_equal(read_scan(folder).array, stack())
    assert read_tag(folder, "PatientID") == "P1"


@pytest.mark.parametrize("content", [b"", b"x" * 5000, b"\x08\x00" * 400, b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 100" * 9])
def test_other_files_are_no_dicom(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "IM0001").write_bytes(content)
    assert not is_scan_path(tmp_path)
    with pytest.raises(VolumeError, match="no DICOM images"):
        read_scan(tmp_path)


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    folder = series(tmp_path / "s", change=lambda _, i: (setattr(i, "Rows", 60000), setattr(i, "Columns", 17000)))
    with pytest.raises(VolumeError, match="limit"):
        read_scan(folder)
    with pytest.raises(VolumeError, match=r"00001\.dcm is truncated, 60 of 2040000000 bytes"):
        open_dicom(InputFile(folder, ReadLimits(max_voxels=1 << 40))).voxels()


def test_run_lengths_that_cannot_expand_so_far_are_refused(tmp_path: Path) -> None:
    def change(_: int, item: Dataset) -> None:
        item.compress(RLELossless)
        item.Rows = item.Columns = 30000

    folder = series(tmp_path / "s", change=change)
    with pytest.raises(VolumeError, match="cannot expand"):
        open_dicom(InputFile(folder, ReadLimits(max_voxels=1 << 40))).voxels()


def test_run_lengths_that_expand_to_more_than_the_header_promises_are_not_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = b"\x81\0" * (1 << 12)
    content = struct.pack("<16L", 2, 64, 64 + len(segment), *[0] * 13) + 2 * segment

    def change(_: int, item: Dataset) -> None:
        item.file_meta.TransferSyntaxUID = RLELossless
        item.PixelData = encapsulate([content])
        item["PixelData"].is_undefined_length = True

    folder = series(tmp_path / "s", change=change)
    monkeypatch.setattr(FileDataset, "pixel_array", None)
    with pytest.raises(VolumeError, match=r"00001\.dcm holds 16448 compressed bytes for 60"):
        read_scan(folder)


@pytest.mark.parametrize("pixels", [b"", None])
def test_images_without_pixels_are_named(tmp_path: Path, pixels: bytes | None) -> None:
    folder = series(tmp_path / "s", change=lambda _, item: setattr(item, "PixelData", pixels))
    with pytest.raises(VolumeError, match=r"00001\.dcm holds no pixels"):
        read_scan(folder)


@pytest.mark.parametrize(("kind", "syntax"), [("JPEG", JPEGBaseline8Bit), ("JPEG2000", JPEG2000Lossless)])
@pytest.mark.parametrize("size", [(7, 5), (20000, 20000)])
def test_compressed_pixels_of_another_size_are_not_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, syntax: str, size: tuple[int, int]
) -> None:
    written = io.BytesIO()
    Image.new("L", (8, 8)).save(written, kind)
    content = written.getvalue()
    rows_at = content.index(b"\xff\xc0") + 5 if kind == "JPEG" else content.index(b"ihdr") + 4
    width = ">HH" if kind == "JPEG" else ">II"
    content = content[:rows_at] + struct.pack(width, *reversed(size)) + content[rows_at + struct.calcsize(width) :]

    def change(_: int, item: Dataset) -> None:
        item.file_meta.TransferSyntaxUID = syntax
        item.BitsAllocated, item.BitsStored, item.HighBit = 8, 8, 7
        item.PixelData = encapsulate([content])
        item["PixelData"].is_undefined_length = True

    folder = series(tmp_path / "s", change=change)
    monkeypatch.setattr(FileDataset, "pixel_array", None)
    with pytest.raises(VolumeError, match=r"00001\.dcm holds compressed pixels of another size"):
        read_scan(folder)
    with pytest.raises(VolumeError, match="compressed pixels of another size"):
        check_dicom_image(folder / "00001.dcm")


def test_more_pixels_than_the_header_says_are_refused(tmp_path: Path) -> None:
    folder = series(tmp_path / "s", change=lambda _, item: setattr(item, "PixelData", item.PixelData * 3))
    with pytest.raises(VolumeError, match="180 bytes of pixels for 60"):
        read_scan(folder)


def test_a_deflated_file_is_read_and_a_bomb_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_headers, "_MAX_INFLATED_BYTES", 1 << 20)
    folder = series(tmp_path / "s")
    edit(folder, lambda _, item: setattr(item.file_meta, "TransferSyntaxUID", DeflatedExplicitVRLittleEndian))
    assert np.array_equal(read_scan(folder).array, stack())
    file = sorted(folder.iterdir())[0]
    content = file.read_bytes()
    start = 144 + int(pydicom.filereader.read_file_meta_info(file).FileMetaInformationGroupLength)
    pack = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join(pack.compress(bytes(1 << 20)) for _ in range(3)) + pack.flush()
    file.write_bytes(content[:start] + bomb)
    with pytest.raises(VolumeError, match="expands to more than 1 MB"):
        read_scan(folder)


def test_a_read_that_takes_too_long_ends(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="takes longer than"):
        open_dicom(InputFile(series(tmp_path / "s"), ReadLimits(max_seconds=-1)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_bytes_it_is_a_volume_or_a_sentence(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "s"
    if not folder.exists():
        series(folder)
    shutil.rmtree(tmp_path / "x", ignore_errors=True)
    shutil.copytree(folder, tmp_path / "x")
    file = sorted((tmp_path / "x").iterdir())[data.draw(st.integers(0, SHAPE[2] - 1))]
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(content) - 1)))
        content[place : place + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    file.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content))
    try:
        assert read_scan(tmp_path / "x").array.ndim == 3
    except VolumeError as error:
        assert "\n" not in str(error)
        assert str(error).startswith(f"{tmp_path / 'x'}: ")


# ----------------------------------------------------------------------------------------------------------- volumes

NO_IMAGES = {
    "Basic Text SR": "1.2.840.10008.5.1.4.1.1.88.11",
    "Key Object Selection Document": "1.2.840.10008.5.1.4.1.1.88.59",
    "RT Structure Set": "1.2.840.10008.5.1.4.1.1.481.3",
    "RT Dose": "1.2.840.10008.5.1.4.1.1.481.2",
    "RT Plan": "1.2.840.10008.5.1.4.1.1.481.5",
    "Segmentation": "1.2.840.10008.5.1.4.1.1.66.4",
    "Grayscale Softcopy Presentation State": "1.2.840.10008.5.1.4.1.1.11.1",
    "Encapsulated PDF": "1.2.840.10008.5.1.4.1.1.104.1",
}


@pytest.mark.parametrize("name", NO_IMAGES)
@pytest.mark.parametrize("uid", ["1.2.3", "9.9"])
def test_objects_that_are_no_images_are_passed_over(
    tmp_path: Path, name: str, uid: str, caplog: pytest.LogCaptureFixture
) -> None:
    def no_image(_: int, item: Dataset) -> None:
        item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID = NO_IMAGES[name]
        item.SOPInstanceUID = "9.9.9"

    add(series(tmp_path / "s"), series(tmp_path / "o", stack()[:, :, :1], no_image, uid), "a")
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(read_scan(tmp_path / "s").array, stack())
    assert name in caplog.text


def test_a_folder_of_reports_holds_no_image(tmp_path: Path) -> None:
    folder = series(tmp_path / "s", change=lambda _, item: setattr(item, "SOPClassUID", NO_IMAGES["Basic Text SR"]))
    with pytest.raises(VolumeError, match=r"holds no image \(Basic Text SR\)"):
        read_scan(folder)


def test_several_series_of_a_folder_are_several_volumes(tmp_path: Path) -> None:
    add(series(tmp_path / "s"), series(tmp_path / "o", stack(1), uid="1.2.4"), "b")
    assert len(titles(tmp_path / "s")) == 2
    with pytest.raises(VolumeError, match="holds 2 volumes"):
        read_scan(tmp_path / "s")


def localizer(folder: Path, uid: str) -> Path:
    """Two images in two planes."""

    def turn(index: int, item: Dataset) -> None:
        item.ImageOrientationPatient = [[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1]][index]
        item.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        item.SOPInstanceUID = f"1.7.{index}"

    return series(folder, stack()[:, :, :2], turn, uid)


def test_a_colour_image_in_a_series_is_left_out(tmp_path: Path) -> None:
    def capture(_: int, item: Dataset) -> None:
        item.SamplesPerPixel, item.PhotometricInterpretation, item.PlanarConfiguration = 3, "RGB", 0
        item.SOPInstanceUID = "1.7"
        del item.ImagePositionPatient

    folder = add(series(tmp_path / "s"), series(tmp_path / "c", stack()[:, :, :1], capture), "a")
    assert np.array_equal(read_scan(folder).array, stack())
    assert reasons(folder) == ["holds a colour image in the same series."]


@pytest.mark.parametrize("suffix", [".zip", ".dcm.gz", ".TAR"])
def test_packed_files_are_named_once_a_folder(tmp_path: Path, suffix: str) -> None:
    folder = series(tmp_path / "s")
    for number in range(3):
        (folder / f"{number}{suffix}").write_bytes(b"packed")
    (found,) = sort_into_volumes(sorted(folder.iterdir())).left_out
    assert "is packed; unpack it" in found.reason
    assert len(found.files) == 3


@pytest.mark.parametrize("uid", ["1.2.3", "1.2.4"])
def test_a_localizer_beside_the_series_or_in_it_is_left_out(
    tmp_path: Path, uid: str, caplog: pytest.LogCaptureFixture
) -> None:
    add(series(tmp_path / "s", change=lambda i, item: setattr(item, "SOPInstanceUID", f"1.8.{i}")),
        localizer(tmp_path / "l", uid), "a")  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(read_scan(tmp_path / "s").array, stack())
    assert "localizer" in caplog.text


def relink(file: Path) -> None:
    """Make a file a link that leads nowhere, as git-annex and failed copies leave them."""
    file.unlink()
    file.symlink_to("nowhere")


def move_last(index: int, item: Dataset) -> None:
    if index == SHAPE[2] - 1:
        x, y, z = item.ImagePositionPatient
        item.ImagePositionPatient = [x, y, float(z) + 1]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: sorted(folder.iterdir())[1].unlink(), "unevenly spaced"),
        (lambda folder: edit(folder, move_last), "unevenly spaced"),
        (lambda folder: edit(folder, lambda i, item: setattr(item, "Rows", 5 + i)), "different numbers of rows"),
        (lambda folder: edit(folder, lambda i, item: setattr(item, "NumberOfFrames", 2)), "multi-frame"),
        (lambda folder: edit(folder, lambda i, item: item.pop("ImagePositionPatient")), "ImagePositionPatient"),
        (lambda folder: edit(folder, lambda i, item: setattr(item, "PhotometricInterpretation", "RGB")), "colour"),
        (lambda folder: edit(folder, lambda i, item: setattr(item, "PixelSpacing", [0, 1])), "PixelSpacing"),
        (lambda folder: edit(folder, lambda i, item: setattr(item, "ImageType", ["ORIGINAL", "MOSAIC"])), "mosaics"),
        (lambda folder: relink(folder / "00004.dcm"), "00004.dcm cannot be read"),
        (lambda folder: [relink(file) for file in folder.iterdir()], "cannot be read"),
        (lambda folder: (folder / "00002.dcm").write_bytes(b""), "00002.dcm is no DICOM file, or truncated"),
        (lambda folder: (folder / "00005.dcm").write_bytes(bytes(50)), "00005.dcm is no DICOM file, or truncated"),
    ],
)
def test_a_series_that_is_no_volume_is_left_out_with_the_reason(
    tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    series(tmp_path / "good")
    series(tmp_path / "bad", stack(1), uid="1.2.4")
    spoil(tmp_path / "bad")
    assert len(titles(tmp_path)) == 1
    (found,) = reasons(tmp_path)
    assert reason in found
    with pytest.raises(VolumeError, match=reason.replace("(", r"\(")):
        read_scan(tmp_path / "bad")


def test_a_damaged_file_spoils_only_the_series_between_whose_slices_it_lies(tmp_path: Path) -> None:
    folder = series(tmp_path / "s")
    for number, uid in ((1, "1.2.4"), (2, "1.2.5")):
        other = series(tmp_path / "o", stack(number), uid=uid)
        for file in other.iterdir():
            file.rename(folder / f"{int(file.stem) + 4 * number:05d}.dcm")
        other.rmdir()
    (folder / "00006.dcm").write_bytes(b"cut off")
    contents = sort_into_volumes(sorted(folder.iterdir()))
    assert [volume.key.series for volume in contents.volumes] == ["1.2.3", "1.2.5"]
    assert [entry.reason.split(";")[0] for entry in contents.left_out] == [
        "lacks a slice: 00006.dcm is no DICOM file, or truncated"
    ]


def test_copies_of_slices_are_dropped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = series(tmp_path / "s")
    shutil.copy(folder / "00001.dcm", folder / "again.dcm")
    item = pydicom.dcmread(folder / "00002.dcm")
    item.file_meta.ImplementationVersionName = "OTHER"  # the same object as another program wrote it
    item.save_as(folder / "twice.dcm")
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(read_scan(folder).array, stack())
    assert "2 files beside the series are not used, first again.dcm" in caplog.text


def test_two_images_with_one_number_are_refused(tmp_path: Path) -> None:
    folder = series(tmp_path / "s")
    item = pydicom.dcmread(folder / "00001.dcm")
    item.PixelData = bytes(len(item.PixelData))
    item.save_as(folder / "other.dcm")
    with pytest.raises(VolumeError, match=r"one SOPInstanceUID, 00001\.dcm and other\.dcm"):
        read_scan(folder)


def twice(folder: Path, first: dict[str, object], second: dict[str, object]) -> Path:
    """A series with two images at each position."""
    for name, values, seed in (("a", first, 0), ("b", second, 1)):

        def change(index: int, item: Dataset, values: dict[str, object] = values, seed: int = seed) -> None:
            item.SOPInstanceUID = f"1.9.{seed}.{index}"
            for tag, value in values.items():
                setattr(item, tag, value)

        series(folder.parent / name, stack(seed), change)
    folder.mkdir()
    return add(add(folder, folder.parent / "a", "a"), folder.parent / "b", "b")


@pytest.mark.parametrize(
    ("first", "second", "parts"),
    [
        ({"EchoTime": "30"}, {"EchoTime": "5"}, ["echo 1", "echo 2"]),
        ({"AcquisitionNumber": 1}, {"AcquisitionNumber": 2}, ["acquisition 1", "acquisition 2"]),
        ({"TemporalPositionIdentifier": 2}, {"TemporalPositionIdentifier": 10}, ["time 1", "time 2"]),
        ({"EchoTime": "5", "EchoNumbers": 1}, {"EchoTime": "30", "EchoNumbers": 2}, ["echo 1", "echo 2"]),
        ({"DiffusionBValue": 0.0}, {"DiffusionBValue": 800.0}, ["b-value 1", "b-value 2"]),
        (
            {"DiffusionGradientOrientation": [0, 1.0, 0]},
            {"DiffusionGradientOrientation": [1.0, 0, 0]},
            ["direction 1", "direction 2"],
        ),
        ({"NominalPercentageOfCardiacPhase": 5.0}, {"NominalPercentageOfCardiacPhase": 45.0}, ["phase 1", "phase 2"]),
        (
            {"ImageType": ["ORIGINAL", "PRIMARY", "M"]},
            {"ImageType": ["ORIGINAL", "PRIMARY", "P"]},
            ["type 1", "type 2"],
        ),
        ({"AcquisitionTime": "095959.5"}, {"AcquisitionTime": "100000"}, ["time 1", "time 2"]),
        ({"FrameReferenceTime": "500"}, {"FrameReferenceTime": "90000"}, ["time 1", "time 2"]),
        ({"InversionTime": "100"}, {"InversionTime": "2500"}, ["inversion 1", "inversion 2"]),
        ({"RepetitionTime": "500"}, {"RepetitionTime": "2500"}, ["repetition time 1", "repetition time 2"]),
        ({"FlipAngle": "3"}, {"FlipAngle": "15"}, ["flip angle 1", "flip angle 2"]),
    ],
)
def test_echoes_and_time_points_are_told_apart_by_one_tag(
    tmp_path: Path, first: dict[str, object], second: dict[str, object], parts: list[str]
) -> None:
    folder = twice(tmp_path / "s", first, second)
    volumes = sort_into_volumes(sorted(folder.iterdir())).volumes
    assert [volume.part for volume in volumes] == parts
    starts = ["b", "a"] if first == {"EchoTime": "30"} else ["a", "b"]
    assert [volume.files[0].name[0] for volume in volumes] == starts
    with pytest.raises(VolumeError, match="holds 2 volumes"):
        read_scan(folder)


@pytest.mark.parametrize(
    ("tag", "kind", "first", "second", "word"),
    [
        (0x0019100C, "IS", 0, 800, "b-value"),
        (0x00431039, "IS", [0, 8], [800, 8], "b-value"),
        (0x20011003, "FL", 0.0, 800.0, "b-value"),
        (0x0043102F, "SS", 0, 1, "type"),
    ],
)
def test_vendors_own_tags_tell_volumes_apart(
    tmp_path: Path, tag: int, kind: str, first: object, second: object, word: str
) -> None:
    folder = twice(tmp_path / "s", {}, {})
    edit(folder, lambda index, item: item.add_new(tag, kind, first if index < SHAPE[2] else second))
    volumes = sort_into_volumes(sorted(folder.iterdir())).volumes
    assert [volume.part for volume in volumes] == [f"{word} 1", f"{word} 2"]


def test_tags_that_tell_volumes_apart_together_need_not_be_all_that_vary(tmp_path: Path) -> None:
    folder = series(tmp_path / "s", change=lambda index, item: setattr(item, "TriggerTime", 100 * index))
    for echo, phase in ((5, 45.0), (30, 5.0), (30, 45.0)):

        def change(index: int, item: Dataset, echo: int = echo, phase: float = phase) -> None:
            item.SOPInstanceUID, item.TriggerTime = f"1.9.{echo}.{phase:g}.{index}", 100 * index
            item.EchoTime, item.NominalPercentageOfCardiacPhase = echo, phase

        add(folder, series(tmp_path / "o", stack(echo), change), f"{echo}-{phase}")
    volumes = sort_into_volumes(sorted(folder.iterdir())).volumes
    assert [volume.part for volume in volumes] == [f"volume {number}" for number in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: None,
        lambda folder: edit(folder, lambda i, item: setattr(item, "EchoTime", i)),
        lambda folder: edit(
            folder,
            lambda i, item: (setattr(item, "EchoTime", i // 4), setattr(item, "AcquisitionNumber", (i + i // 4) % 2)),
        ),
    ],
)
def test_images_at_one_place_that_no_tag_tells_apart_are_left_out(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    folder = twice(tmp_path / "s", {}, {})
    spoil(folder)
    assert titles(folder) == []
    with pytest.raises(VolumeError, match="same position"):
        read_scan(folder)


def test_a_series_spread_over_folders_is_one_volume_and_a_copy_is_none(tmp_path: Path) -> None:
    folder = series(tmp_path / "in" / "all")
    shutil.copytree(folder, tmp_path / "both" / "whole")
    for file in sorted(folder.iterdir())[2:]:
        (tmp_path / "in" / file.stem).mkdir()
        file.rename(tmp_path / "in" / file.stem / file.name)
    assert len(titles(tmp_path / "in")) == 1
    shutil.copytree(tmp_path / "in", tmp_path / "both" / "in")
    contents = sort_into_volumes(sorted((tmp_path / "both").rglob("*.dcm")))
    assert [len(volume.files) for volume in contents.volumes] == [4]
    assert [(len(entry.files), "copies" in entry.reason) for entry in contents.left_out] == [(4, True)]
    sorted((tmp_path / "in" / "00003").iterdir())[0].unlink()
    contents = sort_into_volumes(sorted((tmp_path / "in").rglob("*.dcm")))
    assert not contents.volumes
    assert "unevenly spaced" in contents.left_out[0].reason


def test_folders_that_share_the_number_of_a_series_are_volumes_of_their_own(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b", "c")):
        series(tmp_path / name, stack(number))
    (tmp_path / "b" / "00002.dcm").unlink()
    contents = sort_into_volumes(sorted(tmp_path.rglob("*.dcm")))
    assert [volume.files[0].parent.name for volume in contents.volumes] == ["a", "c"]
    assert [entry.files[0].parent.name for entry in contents.left_out] == ["b"]
