"""DICOM segmentations as label maps, as other programs write them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from segqc.types import LabelArray
from segqc.volumes import Volume, VolumeError
from segqc.volumes.dicom_seg import open_segmentation, read_segmentation_header
from segqc.volumes.inputs import InputFile
from segqc.volumes.labelmaps import load_labels
from tests.pacs_kit import segmentation, series, to_bytes

NAMES = {1: "liver", 2: "spleen"}
VALUES = {"spleen": 4, "liver": 7}


def scan(*, oblique: bool = True) -> Volume:
    affine = np.diag([1.5, 1.5, 4.0, 1.0])
    if oblique:
        a, b = np.deg2rad(20), np.deg2rad(-35)
        turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
        tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
        affine[:3, :3] = turn @ tilt @ affine[:3, :3]
    affine[:3, 3] = [-40.25, 12.5, 31.125]
    return Volume(np.arange(12 * 10 * 7, dtype=np.float32).reshape(12, 10, 7), affine)


def drawn() -> LabelArray:
    """Two structures in slices with gaps between them: 1 and 2, as the SEGs number them."""
    labels = np.zeros((12, 10, 7), np.uint8)
    labels[2:5, 3:9, [1, 2, 5]] = 1
    labels[6:11, 1:3, 2] = 2
    return labels


def read(item: FileDataset, grid: Volume, folder: Path, names: dict[str, int] | None = VALUES) -> LabelArray:
    path = folder / "seg.dcm"
    path.write_bytes(to_bytes(item))
    file = InputFile(path, shown="the SEG")
    return np.asarray(load_labels(file, open_segmentation(file, grid), grid, None, names).volume.array)


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize(("flip", "turn"), [(False, False), (True, False), (False, True), (True, True)])
def test_frames_in_any_order_and_direction_are_read_onto_the_scan(
    tmp_path: Path, kind: str, oblique: bool, flip: bool, turn: bool
) -> None:
    grid, labels = scan(oblique=oblique), drawn()
    item = segmentation(labels, grid, series(grid, "p"), NAMES, kind=kind, flip=flip, turn=turn, seed=3)
    np.testing.assert_array_equal(read(item, grid, tmp_path), np.array([0, 7, 4], np.uint8)[labels])
    np.testing.assert_array_equal(read(item, grid, tmp_path, None), labels)


def test_one_slice_is_enough(tmp_path: Path) -> None:
    grid, labels = scan(), drawn()
    labels[:, :, [1, 2]] = 0
    item = segmentation(labels, grid, series(grid, "p"), NAMES)
    assert item.NumberOfFrames == 1
    np.testing.assert_array_equal(read(item, grid, tmp_path) == 7, labels == 1)


def test_a_header_says_of_which_series_it_is(tmp_path: Path) -> None:
    grid = scan()
    images = series(grid, "p")
    path = tmp_path / "seg.dcm"
    path.write_bytes(to_bytes(segmentation(drawn(), grid, images, NAMES, algorithm="AUTOMATIC")))
    header = read_segmentation_header(path)
    assert header.series == {images[0].SeriesInstanceUID}
    assert header.images == {image.SOPInstanceUID for image in images}
    assert header.is_automatic
    path.write_bytes(to_bytes(images[0]))
    with pytest.raises(VolumeError, match="is no DICOM segmentation"):
        read_segmentation_header(path)


def shifted(grid: Volume, millimetres: float) -> Volume:
    affine = grid.affine.copy()
    affine[:3, 3] += millimetres * grid.affine[:3, 2] / np.linalg.norm(grid.affine[:3, 2])
    return Volume(grid.array, affine)


def tilted(grid: Volume) -> Volume:
    affine = grid.affine.copy()
    affine[:3, [0, 2]] = affine[:3, [2, 0]]
    return Volume(grid.array, affine)


def test_what_holds_no_labels_of_the_scan_is_refused_in_a_sentence(tmp_path: Path) -> None:
    grid, labels = scan(), drawn()
    images = series(grid, "p")
    doubled = segmentation(labels, grid, images, NAMES)
    doubled.PerFrameFunctionalGroupsSequence[1] = doubled.PerFrameFunctionalGroupsSequence[0]
    nowhere = segmentation(labels, grid, images, NAMES)
    del nowhere.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence
    cut = segmentation(labels, grid, images, NAMES)
    cut.PixelData = cut.PixelData[:10]
    for item, said in (
        (segmentation(labels, grid, images, NAMES, kind="FRACTIONAL"), "type FRACTIONAL; labels are"),
        (segmentation(labels, grid, images, {1: "liver", 2: "kidney"}), "'kidney', which is none of the structures"),
        (segmentation(labels, shifted(grid, 1.5), images, NAMES), "resample"),
        (segmentation(labels, tilted(grid), images, NAMES), "resample"),
        (doubled, "two frames of one segment at the same place"),
        (nowhere, "does not say where it lies"),
        (cut, "truncated"),
    ):  # fmt: skip
        with pytest.raises(VolumeError, match=f"the SEG: .*{said}"):
            read(item, grid, tmp_path)


def _run_lengths(size: int) -> bytes:
    """A frame of one segment whose runs expand to so many bytes."""
    return np.array([1, 64, *[0] * 14], "<u4").tobytes() + b"\x81\0" * (size // 128)


def _picture(kind: str) -> bytes:
    written = io.BytesIO()
    Image.new("L", (3000, 2000)).save(written, kind)
    return written.getvalue()


@pytest.mark.parametrize(
    ("syntax", "image"),
    [
        (RLELossless, _run_lengths(1 << 20)),
        (JPEG2000Lossless, _picture("JPEG2000")),
        (JPEGBaseline8Bit, _picture("JPEG")),
    ],
)
@pytest.mark.parametrize("more", [0, 50])
def test_frames_that_expand_to_more_than_the_header_promises_are_not_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syntax: str, image: bytes, more: int
) -> None:
    grid = scan()
    item = segmentation(drawn(), grid, series(grid, "p"), NAMES, kind="LABELMAP")
    item.file_meta.TransferSyntaxUID = syntax
    item.PixelData = encapsulate([image] * (int(item.NumberOfFrames) + more))
    item["PixelData"].is_undefined_length = True
    monkeypatch.setattr(FileDataset, "pixel_array", None)
    with pytest.raises(VolumeError, match="compressed frames for" if more else "holds .*compressed"):
        read(item, grid, tmp_path)


def test_a_voxel_of_two_segments_is_refused(tmp_path: Path) -> None:
    grid, labels = scan(), drawn()
    item = segmentation(labels, grid, series(grid, "p"), NAMES)
    for group in item.PerFrameFunctionalGroupsSequence:
        number = group.SegmentIdentificationSequence[0]
        if number.ReferencedSegmentNumber == 1:
            group.PlanePositionSequence[0].ImagePositionPatient = [
                float(x) for x in (np.diag([-1, -1, 1]) @ (grid.affine @ [0, 0, 2, 1])[:3])
            ]
            item.PerFrameFunctionalGroupsSequence = [
                group,
                *(g for g in item.PerFrameFunctionalGroupsSequence
                  if g.SegmentIdentificationSequence[0].ReferencedSegmentNumber == 2),
            ]  # fmt: skip
            break
    item.NumberOfFrames = 2
    item.PixelData = np.packbits(np.ones(2 * 120, np.uint8), bitorder="little").tobytes()
    with pytest.raises(VolumeError, match="both 'liver' and 'spleen'"):
        read(item, grid, tmp_path)
