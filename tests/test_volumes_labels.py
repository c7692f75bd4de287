"""Label maps mean what their file says: by segments' names or by values, rounded, in any voxel order."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (the field's habit)

from segqc.volumes import (
    ReadLimits,
    Volume,
    VolumeError,
    is_scan_path,
    label_id,
    label_suffix,
    read_grid,
    read_labels,
    read_scan,
    scan_id,
    scan_suffix,
    write_labels,
)
from segqc.volumes.inputs import InputFile
from segqc.volumes.intake import check_labels, check_scan, content_sha256
from segqc.volumes.labelmaps import load_labels
from segqc.volumes.volume import Segment, Source

SHAPE = (6, 5, 4)
AFFINE = np.array([[-1.5, 0, 0, 48], [0, 1.25, 0, -48], [0, 0, 4, -46], [0, 0, 0, 1.0]])
NAMES = {"placenta": 1, "body": 2, "brain": 3}
LABELS = np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.uint8)
SCAN = Volume(np.zeros(SHAPE, np.float32), AFFINE)


def write_seg(
    path: Path, layers: np.ndarray, segments: list[tuple[str, int, int]], start=(0, 0, 0), axis: int | None = None
) -> Path:
    """A file as 3D Slicer writes it: ``layers`` is one label map, or several along the axis."""
    affine = np.diag([-1, -1, 1, 1.0]) @ AFFINE
    directions = list(affine[:3, :3].T)
    kinds = ["domain"] * 3
    if axis is not None:
        directions.insert(axis, np.full(3, np.nan))
        kinds.insert(axis, "list")
    header: dict[str, object] = {
        "space": "left-posterior-superior",
        "kinds": kinds,
        "space directions": np.array(directions),
        "space origin": (affine @ [*start, 1])[:3],
        "Segmentation_ReferenceImageExtentOffset": " ".join(map(str, start)),
    }
    for number, (name, value, layer) in enumerate(segments):
        header |= {f"Segment{number}_ID": f"Segment_{number + 1}", f"Segment{number}_Name": name}
        header |= {f"Segment{number}_LabelValue": str(value), f"Segment{number}_Layer": str(layer)}
        header[f"Segment{number}_Extent"] = "0 5 0 4 0 3"
    nrrd.write(str(path), layers, header)
    return path


# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("order", list(itertools.permutations(("placenta", "body", "brain"))))
@pytest.mark.parametrize("values", [(1, 2, 3), (4, 2, 9), (3, 1, 255)])
@pytest.mark.parametrize("name", ["a.seg.nrrd", "a.nrrd", "A.SEG.NRRD"])
def test_segments_are_matched_by_name_whatever_their_order_and_values(tmp_path, order, values, name):
    table = np.zeros(4, np.uint8)
    for structure, value in zip(order, values, strict=True):
        table[NAMES[structure]] = value
    segments = [(f" {structure.upper()}", value, 0) for structure, value in zip(order, values, strict=True)]
    path = write_seg(tmp_path / name, table[LABELS], segments)
    found = read_labels(path, scan=SCAN, values=(1, 2, 3), names=NAMES)
    np.testing.assert_array_equal(found.array, LABELS)
    np.testing.assert_array_equal(read_labels(path, scan=SCAN).array, table[LABELS])


def test_segments_that_are_no_structures_are_dropped(tmp_path):
    shown = ("Background", "likely error", "foreground_scribbles", "background_scribbles")
    drawn = LABELS.astype(np.uint8) + 10
    segments = [(name, 20 + i, 0) for i, name in enumerate(shown)]
    drawn[LABELS == 0] = np.resize([20, 21, 22, 23], (LABELS == 0).sum())
    segments += [(name, value + 10, 0) for name, value in NAMES.items()]
    path = write_seg(tmp_path / "a.seg.nrrd", drawn, segments)
    np.testing.assert_array_equal(read_labels(path, names=NAMES).array, LABELS)


@pytest.mark.parametrize("axis", [0, 3])
def test_layers_are_read_and_overlaps_are_named(tmp_path, axis):
    masks = np.stack([LABELS == 1, LABELS == 2, LABELS == 3]).astype(np.uint8)
    segments = [("brain", 1, 2), ("placenta", 1, 0), ("body", 1, 1)]
    path = write_seg(tmp_path / "a.seg.nrrd", np.moveaxis(masks, 0, axis), segments, axis=axis)
    np.testing.assert_array_equal(read_labels(path, scan=SCAN, names=NAMES).array, LABELS)
    masks[1][LABELS == 3] = 1
    write_seg(path, np.moveaxis(masks, 0, axis), segments, axis=axis)
    with pytest.raises(VolumeError, match=r"a\.seg\.nrrd: has \d+ voxels that are both 'body' and 'brain'"):
        read_labels(path, scan=SCAN, names=NAMES)
    both_body = [("brain", 1, 2), ("placenta", 1, 0), ("Brain", 1, 1)]
    write_seg(path, np.moveaxis(masks, 0, axis), both_body, axis=axis)
    found = read_labels(path, scan=SCAN, names=NAMES)
    np.testing.assert_array_equal(found.array, np.where(LABELS == 2, 3, LABELS))


def test_old_segmentations_have_a_layer_a_segment(tmp_path):
    masks = np.stack([LABELS == 2, LABELS == 1, LABELS == 3]).astype(np.uint8)
    path = write_seg(tmp_path / "a.seg.nrrd", masks, [], axis=0)
    header = nrrd.read_header(str(path)) | {f"Segment{i}_Name": n for i, n in enumerate(("body", "placenta", "brain"))}
    nrrd.write(str(path), masks, header)
    np.testing.assert_array_equal(read_labels(path, scan=SCAN, names=NAMES).array, LABELS)


def test_cropped_segmentation_is_put_in_its_place(tmp_path):
    whole = np.zeros(SHAPE, np.uint8)
    inner = (slice(1, 4), slice(2, 5), slice(0, 3))
    whole[inner] = LABELS[inner]
    segments = [(name, value, 0) for name, value in NAMES.items()]
    path = write_seg(tmp_path / "a.seg.nrrd", LABELS[inner], segments, start=(1, 2, 0))
    found = check_labels(path, SCAN, (1, 2, 3), NAMES)
    np.testing.assert_array_equal(found.labels.array, whole)
    assert not found.is_plain
    for start in ((1.4, 2, 0), (4, 2, 0), (-1, 0, 0)):
        write_seg(path, LABELS[inner], segments, start=start)
        with pytest.raises(VolumeError, match="resample"):
            read_labels(path, scan=SCAN, names=NAMES)
    nrrd.write(str(tmp_path / "a.nrrd"), LABELS[inner], {"spacings": [1.5, 1.25, 4]})
    with pytest.raises(VolumeError, match=r"shape \(3, 3, 3\) and the scan"):
        read_labels(tmp_path / "a.nrrd", scan=SCAN)


def test_more_layers_than_segments_are_refused_before_they_are_read(tmp_path):
    masks = np.stack([LABELS == 1, LABELS == 2, LABELS == 0]).astype(np.uint8)
    path = write_seg(tmp_path / "a.seg.nrrd", masks, [("placenta", 1, 0), ("body", 1, 1)], axis=0)
    path.write_bytes(path.read_bytes().partition(b"\n\n")[0] + b"\n\n")
    with pytest.raises(VolumeError, match=r"a\.seg\.nrrd: has 3 layers for 2 segments"):
        read_labels(path, scan=SCAN, names=NAMES)


def test_each_segment_is_looked_at_in_its_own_layer_only(tmp_path):
    """A small file may name thousands of layers and segments."""
    looks = 0

    class Counted(Segment):
        def __getattribute__(self, name: str) -> object:
            nonlocal looks
            looks += name == "layer"
            return super().__getattribute__(name)

    count = 300
    layers = np.zeros((count, *SHAPE), np.uint8)
    layers[:, 0, 0, 0] = 1
    segments = tuple(Counted("body", 1, number) for number in range(count))
    source = Source(SHAPE, AFFINE, None, lambda: layers, segments=segments)
    found = load_labels(InputFile(tmp_path / "a.seg.nrrd"), source, SCAN, names=NAMES)
    assert found.volume.array.sum() == 2
    assert looks < 10 * count


@pytest.mark.parametrize("empty", ["Segment_4", "Segment_1", "lung", "Body", "likely error", "background"])
@pytest.mark.parametrize("value", [4, 255])
@pytest.mark.parametrize("position", [0, 3])
def test_segments_without_a_voxel_may_have_any_name(tmp_path, empty, value, position):
    segments = [(name, value, 0) for name, value in NAMES.items()]
    segments.insert(position, (empty, value, 0))
    path = write_seg(tmp_path / "a.seg.nrrd", LABELS, segments)
    found = check_labels(path, SCAN, (1, 2, 3), NAMES)
    np.testing.assert_array_equal(found.labels.array, LABELS)
    assert found.is_plain
    np.testing.assert_array_equal(read_labels(path, scan=SCAN).array, LABELS)


def test_empty_segments_of_layers_may_have_any_name(tmp_path):
    masks = np.stack([LABELS == 1, LABELS == 2, LABELS == 0, LABELS == 3]).astype(np.uint8)
    masks[2] = 0
    segments = [("placenta", 1, 0), ("body", 1, 1), ("Segment_3", 1, 2), ("Segment_4", 2, 0), ("brain", 1, 3)]
    path = write_seg(tmp_path / "a.seg.nrrd", masks, segments, axis=0)
    np.testing.assert_array_equal(read_labels(path, scan=SCAN, values=(1, 2, 3), names=NAMES).array, LABELS)


@pytest.mark.parametrize("segments", [[("Segment_1", 1, 0)], [("Segment_1", 1, 0), ("placenta", 2, 0)]])
@pytest.mark.parametrize("shape", [SHAPE, (1, 1, 1)])
def test_a_segmentation_without_a_voxel_is_an_empty_label_map(tmp_path, segments, shape):
    path = write_seg(tmp_path / "a.seg.nrrd", np.zeros(shape, np.uint8), segments)
    found = read_labels(path, scan=SCAN, values=(1, 2, 3), names=NAMES).array
    np.testing.assert_array_equal(found, np.zeros(SHAPE, np.uint8))


@pytest.mark.parametrize(
    ("segments", "finding"),
    [
        ([("placenta", 1, 0), ("body", 2, 0), ("lung", 3, 0)], "the segment 'lung', which is none of the structures"),
        ([("placenta", 1, 0), ("body", 2, 0)], "the value 3, which none of its segments has"),
        ([("placenta", 1, 0), ("body", 1, 0), ("brain", 3, 0)], "'placenta' and 'body' the same value 1"),
        ([("placenta", 1, 0), ("body", 2, 0), ("brain", 300, 0)], "'brain' the value 300"),
        ([("placenta", 1, 0), ("body", 2, 0), ("brain", 3, 1)], "layer 1"),
    ],
)
def test_segments_without_a_clear_meaning_are_refused(tmp_path, segments, finding):
    path = write_seg(tmp_path / "a.seg.nrrd", LABELS, segments)
    with pytest.raises(VolumeError, match=finding):
        read_labels(path, scan=SCAN, names=NAMES)


def test_segmentation_is_no_scan_whatever_its_name(tmp_path):
    segments = [(name, value, 0) for name, value in NAMES.items()]
    with pytest.raises(VolumeError, match="segmentation"):
        read_scan(write_seg(tmp_path / "a.nrrd", LABELS, segments))
    with pytest.raises(VolumeError, match="no known format"):
        read_scan(write_seg(tmp_path / "a.seg.nrrd", LABELS, segments))


# ------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "float32"])
@pytest.mark.parametrize("values", [(1,), (1, 2, 3), (1, 2, 4), (5, 250), tuple(range(1, 105))])
def test_masks_that_went_through_floats_are_label_maps(tmp_path, dtype, values):
    """nibabel stores a slope where floats are saved as whole numbers."""
    labels = np.resize([0, *values], (12, 12, 2)).astype(np.uint8)
    image = nib.Nifti1Image(labels.astype(float), AFFINE)
    image.set_data_dtype(dtype)
    nib.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_labels(tmp_path / "a.nii.gz", values=values).array, labels)


@pytest.mark.parametrize("error", [-1e-4, 1e-7, 5e-4, -0.0])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_rounding_of_floats_is_undone(tmp_path, error, suffix):
    image = sitk.GetImageFromArray((LABELS + error).astype(np.float32).T)
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
    np.testing.assert_array_equal(read_labels(tmp_path / f"a{suffix}").array, LABELS)


@pytest.mark.parametrize(
    "array",
    [LABELS / 3, LABELS + 0.01, np.where(LABELS == 1, np.nan, LABELS), np.where(LABELS == 1, np.inf, LABELS)],
    ids=["fractions", "offset", "NaN", "infinite"],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers_that_are_not_whole_are_refused(tmp_path, array, dtype):
    nib.save(nib.Nifti1Image(array.astype(dtype), AFFINE), tmp_path / "a.nii.gz")
    with pytest.raises(VolumeError, match="whole numbers"):
        read_labels(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("top", [0.9, 1.0, 300.5])
def test_scaled_maps_of_fractions_are_refused(tmp_path, top):
    image = nib.Nifti1Image(np.linspace(0, top, 120).reshape(SHAPE), AFFINE)
    image.set_data_dtype("int16")
    nib.save(image, tmp_path / "a.nii.gz")
    with pytest.raises(VolumeError, match="whole numbers"):
        read_labels(tmp_path / "a.nii.gz")


# -------------------------------------------------------------------------------------------------------- voxel order


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", list(itertools.product((1, -1), repeat=3)))
def test_label_in_another_voxel_order_is_brought_into_the_scans(tmp_path, order, flips):
    path = tmp_path / "a.nrrd"
    image = sitk.GetImageFromArray(LABELS.T)
    image.SetDirection(np.diag([1.0, -1, 1]).ravel())
    image.SetSpacing((1.5, 1.25, 4))
    image.SetOrigin((-48, 48, -46))
    turned = sitk.Flip(sitk.PermuteAxes(image, order), [flip < 0 for flip in flips])
    sitk.WriteImage(turned, str(path))
    found = check_labels(path, SCAN)
    np.testing.assert_array_equal(found.labels.array, LABELS)
    np.testing.assert_array_equal(found.labels.affine, AFFINE)
    assert found.is_plain == (order == (0, 1, 2) and flips == (1, 1, 1))


# ------------------------------------------------------------------------------------------------------ names, intake


@pytest.mark.parametrize(
    ("name", "scan", "label"),
    [
        ("a.nii.gz", ".nii.gz", ".nii.gz"),
        ("B.NII.GZ", ".nii.gz", ".nii.gz"),
        ("c.v1.2.Nii", ".nii", ".nii"),
        ("d.nrrd", ".nrrd", ".nrrd"),
        ("e.seg.nrrd", None, ".seg.nrrd"),
        ("F.Seg.NRRD", None, ".seg.nrrd"),
        ("g.mha", None, ".mha"),
        (".nii.gz", None, None),
        (".seg.nrrd", None, None),
        ("h.txt", None, None),
    ],
)
def test_suffixes_of_scans_and_labels(name, scan, label):
    assert (scan_suffix(name), label_suffix(name)) == (scan, label)
    assert scan_id(name) == name[: len(name) - len(scan or "")]
    assert label_id(name) == name[: len(name) - len(label or "")]
    assert is_scan_path(name) == (scan is not None and not name.startswith("."))


def test_intake_says_what_it_found_and_names_files_as_users_know_them(tmp_path):
    path = tmp_path / "upload-1.nii.gz"
    write_labels(Volume(LABELS, AFFINE), path)
    content = check_scan(path)
    assert content.shape == SHAPE and content.warnings == () and content.sha256 == content_sha256(path)
    found = check_labels(path, SCAN, (1, 2, 3), NAMES)
    assert found.is_plain and found.sha256 == content.sha256
    with pytest.raises(VolumeError, match=r"^the label of s0: holds the label value 3"):
        check_labels(path, SCAN, (1, 2), NAMES, shown="the label of s0")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(VolumeError, match=r"^s0\.nii\.gz: is truncated") as caught:
        check_scan(path, shown="s0.nii.gz")
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd"])
def test_what_itk_does_not_read_is_told_of_a_scan_and_no_plain_label(tmp_path, name):
    path = tmp_path / name
    if name == "a.nrrd":
        write_labels(Volume(LABELS, AFFINE), path)
        header = {**nrrd.read_header(str(path)), "encoding": "bzip2"}
        nrrd.write(str(path), LABELS, header)
    else:
        nib.save(nib.Nifti2Image(LABELS, AFFINE), path)
    with pytest.raises(RuntimeError):
        sitk.ReadImage(str(path))
    (warning,) = check_scan(path).warnings
    assert "3D Slicer does not read" in warning
    found = check_labels(path, SCAN, (1, 2, 3), NAMES)
    np.testing.assert_array_equal(found.labels.array, LABELS)
    assert not found.is_plain


def test_content_of_a_folder_is_that_of_its_visible_files(tmp_path):
    for name, content in (("b", b"2"), ("a", b"1"), (".hidden", b"3")):
        (tmp_path / name).write_bytes(content)
    before = content_sha256(tmp_path)
    (tmp_path / ".hidden").write_bytes(b"4")
    assert content_sha256(tmp_path) == before
    (tmp_path / "b").write_bytes(b"5")
    assert content_sha256(tmp_path) != before


def test_grid_is_read_without_voxels(tmp_path):
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(LABELS, AFFINE), path)
    path.write_bytes(path.read_bytes()[:400])
    grid = read_grid(path)
    assert grid.shape == SHAPE
    np.testing.assert_allclose(grid.affine, AFFINE)


@pytest.mark.parametrize(
    ("shape", "spacing", "unit", "finding"),
    [
        (SHAPE, (1.5, 1.5, 4), "meter", "voxels of 1500 x 1500 x 4000 mm"),
        (SHAPE, (1.5, 1.5, 4), "micron", "voxels of 0.0015"),
        ((50, 2, 2), (90, 1, 1), "mm", "covers 4500 x"),
        ((50, 50, 50), (40, 40, 40), "mm", "covers 2000 x"),
    ],
)
def test_grid_that_cannot_be_meant_is_refused(tmp_path, shape, spacing, unit, finding):
    image = nib.Nifti1Image(np.zeros(shape, np.uint8), np.diag([*spacing, 1.0]))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii.gz")
    with pytest.raises(VolumeError, match=finding):
        check_scan(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".seg.nrrd", ".mha"])
def test_reading_is_limited_in_size_and_time(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    image = sitk.GetImageFromArray(LABELS.T)
    sitk.WriteImage(image, str(path))
    for limits, finding in ((ReadLimits(max_voxels=119), "limit of 119"), (ReadLimits(max_seconds=-1), "takes longer")):
        with pytest.raises(VolumeError, match=finding):
            read_labels(path, limits=limits)
        if scan_suffix(path.name):
            with pytest.raises(VolumeError, match=finding):
                read_scan(path, limits=limits)


def test_running_out_of_memory_is_the_files_problem(tmp_path, monkeypatch):
    write_labels(Volume(LABELS, AFFINE), tmp_path / "a.nii.gz")

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "empty", no_memory)
    for reader in (read_scan, read_labels):
        with pytest.raises(VolumeError, match=r"a\.nii\.gz: is too large"):
            reader(tmp_path / "a.nii.gz")
