"""Files keep their geometry and values, what cannot be read faithfully is refused, and the canonical frame inverts."""

from __future__ import annotations

import errno
import gzip
import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 (the field's habit)
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from skimage.transform import resize

from segqc import volumes
from segqc.volumes import (
    Volume,
    VolumeError,
    atomic_write,
    canonical_frame,
    is_scan_path,
    read_labels,
    read_scan,
    scan_id,
    through_plane_axis,
    to_canonical,
    to_native,
    write_labels,
    write_scan,
)

SHAPE = (6, 5, 4)
SPACING = (1.25, 0.9, 3.3)
FILES = ("scan.nii", "scan.nii.gz", "scan.nrrd")
SIGNED_PERMUTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


def signed_permutation(order: tuple[int, ...], signs: tuple[int, ...]) -> np.ndarray:
    matrix = np.zeros((3, 3))
    matrix[list(order), range(3)] = signs
    return matrix


def make_affine(directions: np.ndarray, origin=(-101.234567, 87.6, 512.75), spacing=SPACING) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = directions * np.asarray(spacing)
    affine[:3, 3] = origin
    return affine


def oblique(*degrees: float) -> np.ndarray:
    return Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()


def make_scan(affine: np.ndarray | None = None, shape=SHAPE, seed: int = 0) -> Volume:
    array = np.random.default_rng(seed).integers(0, 4000, shape).astype(np.float32)
    return Volume(array, make_affine(np.eye(3)) if affine is None else affine)


def itk_affine(image: sitk.Image) -> np.ndarray:
    """The voxel-to-RAS affine of a SimpleITK image (which is in LPS)."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1, -1, 1, 1]) @ affine


def itk_read(path: Path) -> sitk.Image:
    if not path.is_dir():
        return sitk.ReadImage(str(path))
    return sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path)))


def assert_same_geometry(affine: np.ndarray, expected: np.ndarray, shape=SHAPE, atol: float = 1e-4) -> None:
    """Every corner of the grid lies within the tolerance, in mm."""
    corners = np.array([(*c, 1) for c in itertools.product(*[(0, n - 1) for n in shape])]).T
    np.testing.assert_allclose(affine @ corners, expected @ corners, rtol=0, atol=atol)


def assert_same_in_the_world(found: Volume, expected: Volume) -> None:
    """Each voxel of `found` lies on the voxel of `expected` that has its value, whatever the axes' order."""
    index = np.indices(found.shape).reshape(3, -1)
    world = found.affine[:3, :3] @ index + found.affine[:3, 3:]
    other = np.linalg.solve(expected.affine[:3, :3], world - expected.affine[:3, 3:])
    np.testing.assert_allclose(other, np.rint(other), atol=1e-4)
    np.testing.assert_array_equal(found.array.ravel(), expected.array[tuple(np.rint(other).astype(int))])


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(("order", "signs"), SIGNED_PERMUTATIONS)
@pytest.mark.parametrize("name", FILES)
def test_file_keeps_voxels_and_geometry_for_every_axis_order_and_flip(tmp_path, name, order, signs):
    scan = make_scan(make_affine(signed_permutation(order, signs)))
    write_scan(scan, tmp_path / name)
    found = read_scan(tmp_path / name)
    assert found.array.dtype == np.float32
    np.testing.assert_array_equal(found.array, scan.array)
    assert_same_geometry(found.affine, scan.affine)
    image = itk_read(tmp_path / name)
    assert_same_geometry(itk_affine(image), scan.affine)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, scan.array)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(FILES),
    degrees=st.tuples(*[st.floats(-180, 180)] * 3),
    signs=st.tuples(*[st.sampled_from((1, -1))] * 3),
    spacing=st.tuples(*[st.floats(0.3, 8)] * 3),
    origin=st.tuples(*[st.floats(-600, 600)] * 3),
)
def test_file_keeps_oblique_geometry(tmp_path_factory, name, degrees, signs, spacing, origin):
    scan = make_scan(make_affine(oblique(*degrees) * signs, origin, spacing))
    path = tmp_path_factory.mktemp("oblique") / name
    write_scan(scan, path)
    found = read_scan(path)
    assert_same_geometry(found.affine, scan.affine)
    np.testing.assert_allclose(found.spacing_mm, spacing, atol=1e-4)
    np.testing.assert_array_equal(found.array, scan.array)


@pytest.mark.parametrize(
    "directions", [np.eye(3), oblique(20, -35, 70), oblique(170, 5, 95)], ids=["straight", "oblique", "turned"]
)
@pytest.mark.parametrize(("order", "signs"), SIGNED_PERMUTATIONS[::5])
def test_dicom_series_keeps_every_voxel_in_its_place(tmp_path, directions, order, signs):
    scan = make_scan(make_affine(directions @ signed_permutation(order, signs)))
    write_scan(scan, tmp_path / "series")
    found = read_scan(tmp_path / "series")
    assert_same_in_the_world(found, scan)
    right_handed_in_lps = np.linalg.det(scan.affine[:3, :3]) > 0
    if right_handed_in_lps:
        np.testing.assert_array_equal(found.array, scan.array)
        assert_same_geometry(found.affine, scan.affine)
    image = itk_read(tmp_path / "series")
    assert_same_geometry(itk_affine(image), found.affine)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, found.array)


@pytest.mark.parametrize("name", FILES)
def test_sheared_grid_is_refused(tmp_path, name):
    affine = make_affine(np.array([[1, 0.2, 0], [0, 0.98, 0], [0, 0, 1]]))
    scan = make_scan(affine)
    assert scan.voxel_volume_mm3 == pytest.approx(np.prod(SPACING) * 0.98)
    if name.endswith(".nrrd"):
        write_scan(scan, tmp_path / name)
    else:
        with pytest.raises(VolumeError, match="sheared") as caught:
            write_scan(scan, tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: "), "and no temporary path"
        save_nifti(tmp_path / name, scan.array, affine)
    refused(tmp_path / name, "sheared")
    with pytest.raises(VolumeError, match="sheared") as caught:
        write_scan(scan, tmp_path / "series")
    assert str(caught.value).startswith(f"{tmp_path / 'series'}: "), "and no temporary path"
    assert names_in(tmp_path) == [name]


@pytest.mark.parametrize(
    ("array", "tolerance"),
    [
        (np.arange(-60, 60).reshape(SHAPE), 0),
        (np.arange(120).reshape(SHAPE) * 400 + 10000, 0),
        (np.arange(120).reshape(SHAPE) / 7 - 3, 119 / 7 / 65535),
        (np.arange(120).reshape(SHAPE) * 1e6 + 0.5, 119e6 / 65535),
        (np.full(SHAPE, 0.37), 1e-6),
        (np.zeros(SHAPE), 0),
    ],
    ids=["signed", "unsigned", "fractions", "wide", "constant", "zero"],
)
def test_dicom_pixels_keep_their_values(tmp_path, array, tolerance):
    scan = Volume(array.astype(np.float32), make_affine(np.diag([-1, -1, 1])))
    write_scan(scan, tmp_path / "series")
    np.testing.assert_allclose(read_scan(tmp_path / "series").array, scan.array, rtol=1e-6, atol=tolerance)


def test_dicom_series_is_the_same_however_often_it_is_written(tmp_path):
    for folder in ("a", "b"):
        write_scan(make_scan(), tmp_path / folder / "series")
    for file in sorted((tmp_path / "a" / "series").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / "series" / file.name).read_bytes()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64, np.int64, bool])
@pytest.mark.parametrize("name", FILES)
def test_scan_of_any_number_type_can_be_written(tmp_path, name, dtype):
    array = np.random.default_rng(0).integers(0, 2, SHAPE).astype(dtype)
    write_scan(Volume(array, make_affine(np.eye(3))), tmp_path / name)
    np.testing.assert_array_equal(read_scan(tmp_path / name).array, array.astype(np.float32))


@pytest.mark.parametrize("name", ["labels.nii", "labels.nii.gz", "labels.nrrd"])
def test_labels_come_back_as_uint8_on_the_scans_grid(tmp_path, name):
    scan = make_scan(make_affine(oblique(12, 3, 50)))
    array = np.random.default_rng(1).integers(0, 3, SHAPE)
    write_labels(Volume(array, scan.affine), tmp_path / name)
    found = read_labels(tmp_path / name, scan=scan, values=(1, 2))
    assert found.array.dtype == np.uint8
    np.testing.assert_array_equal(found.array, array)
    np.testing.assert_array_equal(found.affine, scan.affine)
    assert itk_read(tmp_path / name).GetPixelID() == sitk.sitkUInt8


# ------------------------------------------------------------------------------------------ what other programs write


def test_nifti_scaling_is_applied(tmp_path):
    raw = np.arange(120, dtype=np.int16).reshape(SHAPE)
    image = nib.Nifti1Image(raw, make_affine(np.eye(3)))
    image.header.set_slope_inter(0.5, -10)
    nib.save(image, tmp_path / "scaled.nii.gz")
    with gzip.open(tmp_path / "scaled.nii.gz") as stream:
        assert np.frombuffer(stream.read()[112:120], "<f4").tolist() == [0.5, -10]  # scl_slope, scl_inter
    np.testing.assert_array_equal(read_scan(tmp_path / "scaled.nii.gz").array, raw * 0.5 - 10)


def test_nifti_qform_is_used_without_an_sform(tmp_path):
    affine = make_affine(oblique(10, 20, 30))
    image = nib.Nifti1Image(make_scan().array, None)
    image.set_qform(affine, code=1)
    image.set_sform(None, code=0)
    nib.save(image, tmp_path / "q.nii")
    assert_same_geometry(read_scan(tmp_path / "q.nii").affine, affine, atol=1e-3)


def test_nifti_variants_are_read(tmp_path):
    """Header extensions, NIfTI-2, big-endian integers, a trailing axis of length one, micrometres."""
    array = np.random.default_rng(0).integers(0, 4000, SHAPE).astype(">i2")
    affine = make_affine(np.eye(3))
    plain = nib.Nifti1Image(array, affine)
    plain.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 100))
    micrometres = nib.Nifti1Image(array, np.diag([1e3, 1e3, 1e3, 1]) @ affine)
    micrometres.header.set_xyzt_units("micron")
    variants = {
        "extension.nii": plain,
        "extension.nii.gz": plain,
        "second.nii": nib.Nifti2Image(array, affine),
        "big.nii": nib.Nifti1Image(array, affine, nib.Nifti1Header(endianness=">")),
        "trailing.nii.gz": nib.Nifti1Image(array[..., None], affine),
        "micrometres.nii": micrometres,
    }
    for name, image in variants.items():
        nib.save(image, tmp_path / name)
        found = read_scan(tmp_path / name)
        np.testing.assert_array_equal(found.array, array, err_msg=name)
        assert_same_geometry(found.affine, affine, atol=1e-3)


@pytest.mark.parametrize(
    ("space", "to_ras"),
    [
        ("left-posterior-superior", (-1, -1)),
        ("LPS", (-1, -1)),
        ("right-anterior-superior", (1, 1)),
        ("RAS", (1, 1)),
        ("left-anterior-superior", (-1, 1)),
        ("LAS", (-1, 1)),
    ],
)
def test_nrrd_spaces_are_converted(tmp_path, space, to_ras):
    affine = make_affine(oblique(10, 20, 30))
    stored = np.diag([*to_ras, 1, 1]) @ affine
    header = {"space": space, "space directions": stored[:3, :3].T, "space origin": stored[:3, 3]}
    nrrd.write(str(tmp_path / "s.nrrd"), make_scan().array, header)
    assert_same_geometry(read_scan(tmp_path / "s.nrrd").affine, affine)


def test_nrrd_with_a_list_axis_of_one_value_is_a_volume(tmp_path):
    scan = make_scan()
    directions = np.vstack([np.full(3, np.nan), np.diag(SPACING)])
    header = {"space": "RAS", "kinds": ["list", "domain", "domain", "domain"], "space directions": directions}
    nrrd.write(str(tmp_path / "one.nrrd"), scan.array[None], header)
    np.testing.assert_array_equal(read_scan(tmp_path / "one.nrrd").array, scan.array)
    nrrd.write(str(tmp_path / "two.nrrd"), np.stack([scan.array] * 2), dict(header))
    with pytest.raises(VolumeError, match=r"two\.nrrd: .*one 3-D volume"):
        read_scan(tmp_path / "two.nrrd")


def test_nrrd_and_nifti_of_simpleitk_are_read(tmp_path):
    scan = make_scan(make_affine(oblique(-15, 40, 110)))
    write_scan(scan, tmp_path / "own.nii")
    for name in FILES[1:]:
        sitk.WriteImage(itk_read(tmp_path / "own.nii"), str(tmp_path / name))
        found = read_scan(tmp_path / name)
        np.testing.assert_array_equal(found.array, scan.array)
        assert_same_geometry(found.affine, scan.affine)


def edit_series(folder: Path, edit: Any) -> None:
    for index, file in enumerate(sorted(folder.iterdir())):
        item = pydicom.dcmread(file)
        edit(index, item)
        item.save_as(file)


def test_dicom_slices_are_sorted_by_position_not_by_name_or_number(tmp_path):
    scan = make_scan(make_affine(oblique(20, 30, 40)))
    write_scan(scan, tmp_path / "series")
    edit_series(tmp_path / "series", lambda index, item: setattr(item, "InstanceNumber", 9 - index))
    for index, file in enumerate(sorted((tmp_path / "series").iterdir(), reverse=True)):
        file.rename(tmp_path / "series" / f"IM{index}")
    (tmp_path / "series" / "README.txt").write_text("no image")
    found = read_scan(tmp_path / "series")
    np.testing.assert_array_equal(found.array, scan.array)
    assert_same_geometry(found.affine, scan.affine)


def test_dicom_spacing_is_that_of_the_positions_not_of_the_thickness(tmp_path):
    write_scan(make_scan(), tmp_path / "series")

    def mislead(_index: int, item: Any) -> None:
        item.SliceThickness, item.SpacingBetweenSlices = "1", "2"

    edit_series(tmp_path / "series", mislead)
    assert read_scan(tmp_path / "series").spacing_mm == pytest.approx(SPACING)


def test_dicom_rescale_may_differ_between_slices(tmp_path):
    scan = make_scan()
    write_scan(scan, tmp_path / "series")
    edit_series(tmp_path / "series", lambda index, item: setattr(item, "RescaleSlope", str(index + 1)))
    np.testing.assert_array_equal(read_scan(tmp_path / "series").array, scan.array * [1, 2, 3, 4])


# ----------------------------------------------------------------------------------------------------------- errors


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, make_affine(np.eye(3)) if affine is None else affine), path)
    return path


def refused(path: Path, match: str, **labels: Any) -> None:
    """Reading fails with a VolumeError that names the file and the finding."""
    with pytest.raises(VolumeError, match=match) as caught:
        read_labels(path, **labels) if labels else read_scan(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_unknown_format_are_refused(tmp_path):
    refused(tmp_path / "absent.nii.gz", "no such file")
    (tmp_path / "scan.mha").write_bytes(b"x")
    refused(tmp_path / "scan.mha", "no known format")
    with pytest.raises(VolumeError, match="no known format"):
        write_scan(make_scan(), tmp_path / "out.txt")


def test_more_than_three_dimensions_are_refused(tmp_path):
    refused(save_nifti(tmp_path / "time.nii.gz", np.zeros((3, 4, 5, 2), np.int16)), "4-D")
    refused(save_nifti(tmp_path / "flat.nii.gz", np.zeros((3, 4), np.int16)), "2-D")
    nrrd.write(str(tmp_path / "time.nrrd"), np.zeros((3, 4, 5, 2)), {"spacings": [1.0, 1, 1, 1]})
    refused(tmp_path / "time.nrrd", "one 3-D volume")


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_refused(tmp_path, name):
    write_scan(make_scan(), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for length in [*range(0, len(whole), 23), len(whole) - 9, len(whole) - 1]:
        # NRRD's decompressor does not miss the stream's trailer: the voxels are all there then.
        if name.endswith(".nrrd") and length >= len(whole) - 9:
            continue
        (tmp_path / name).write_bytes(whole[:length])
        refused(tmp_path / name, "truncated|damaged|header")


def test_damaged_compressed_file_is_refused(tmp_path):
    write_scan(make_scan(), tmp_path / "scan.nii.gz")
    content = bytearray((tmp_path / "scan.nii.gz").read_bytes())
    content[-6] ^= 0xFF  # the checksum: voxels that decompress may still be wrong
    (tmp_path / "scan.nii.gz").write_bytes(content)
    refused(tmp_path / "scan.nii.gz", "damaged")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", FILES)
def test_voxels_that_are_no_numbers_are_refused(tmp_path, name, value):
    array = np.ones(SHAPE, np.float32)
    array[1, 2, 3] = value
    if name.endswith(".nrrd"):
        nrrd.write(str(tmp_path / name), array, {"spacings": [1.0, 1.0, 1.0]})
    else:
        save_nifti(tmp_path / name, array)
    refused(tmp_path / name, "1 of 120 voxels are NaN or infinite")
    refused(tmp_path / name, "whole numbers", values=(1,))
    with pytest.raises(VolumeError, match="NaN or infinite"):
        write_scan(Volume(array, np.eye(4)), tmp_path / "out.nii.gz")


def test_number_beyond_float32_is_refused(tmp_path):
    refused(save_nifti(tmp_path / "huge.nii", np.full(SHAPE, 1e300)), "NaN or infinite")


@pytest.mark.parametrize("padding", [np.finfo(np.float32).min, 1e13])
def test_intensities_that_cannot_be_meant_are_refused(tmp_path, padding):
    # finite, but their squares are not: one such scan would end a training, or the scoring of all others
    array = np.ones(SHAPE, np.float32)
    array[0] = padding
    refused(save_nifti(tmp_path / "padded.nii", array), "intensities from .* cannot be meant")
    array[0] = 1e9  # as of PET, in becquerels per millilitre
    assert read_scan(save_nifti(tmp_path / "pet.nii", array)).array.max() == np.float32(1e9)


@pytest.mark.parametrize(
    ("matrix", "finding"),
    [
        (np.zeros((4, 4)), "length zero"),
        (np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "singular"),
        (np.diag([1, 1, np.nan, 1]), "NaN"),
    ],
)
def test_useless_affine_is_refused(tmp_path, matrix, finding):
    path = save_nifti(tmp_path / "bad.nii", make_scan().array)
    content = bytearray(path.read_bytes())
    content[280:328] = np.asarray(matrix[:3], dtype="<f4").tobytes()  # srow_x, srow_y, srow_z
    path.write_bytes(content)
    refused(path, finding)
    header = {"space": "RAS", "space directions": matrix[:3, :3].T, "space origin": np.zeros(3)}
    if finding != "NaN":  # NRRD's way to say "not a spatial axis"
        nrrd.write(str(tmp_path / "bad.nrrd"), make_scan().array, header)
        refused(tmp_path / "bad.nrrd", finding)
    with pytest.raises(VolumeError, match=finding):
        Volume(make_scan().array, matrix)


def test_volume_refuses_other_than_three_axes():
    for shape in ((4, 4), (2, 3, 4, 5), (3, 0, 4)):
        with pytest.raises(VolumeError, match="three non-empty axes"):
            Volume(np.zeros(shape), np.eye(4))
    with pytest.raises(VolumeError, match="shape"):
        Volume(np.zeros((2, 2, 2)), np.eye(3))


def test_colour_is_refused(tmp_path):
    colour = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    refused(save_nifti(tmp_path / "colour.nii", colour), "colour")


def test_nrrd_that_points_to_another_file_is_refused(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(120))
    (tmp_path / "scan.nrrd").write_text(
        f"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 6 5 4\nspacings: 1 1 1\nencoding: raw\ndata file: {secret}\n"
    )
    refused(tmp_path / "scan.nrrd", "another file")


@pytest.mark.parametrize(
    ("header", "finding"),
    [
        ({}, "spacing"),
        ({"space": "scanner-xyz", "space directions": np.eye(3)}, "space 'scanner-xyz'"),
        ({"space": "RAS", "space directions": np.eye(3), "space units": ["m", "m", "m"]}, "save it in mm"),
        ({"space": "RAS", "space directions": np.eye(3)[:, :2]}, "contradicts itself"),
    ],
)
def test_nrrd_without_usable_geometry_is_refused(tmp_path, header, finding):
    nrrd.write(str(tmp_path / "scan.nrrd"), make_scan().array, header)
    refused(tmp_path / "scan.nrrd", finding)


def test_label_problems_are_refused_one_by_one(tmp_path):
    scan = make_scan()
    path = tmp_path / "labels.nii.gz"
    save_nifti(path, np.full(SHAPE, 0.5, np.float32))
    refused(path, "not whole numbers", scan=scan)
    save_nifti(path, np.full(SHAPE, 256, np.int16))
    refused(path, "from 256 to 256", scan=scan)
    save_nifti(path, np.full(SHAPE, -1, np.int16))
    refused(path, "from -1 to -1", scan=scan)
    save_nifti(path, np.full(SHAPE, 7, np.uint8))
    refused(path, "label value 7, and the structures' values are 1, 2", scan=scan, values=(1, 2))
    assert read_labels(path, scan=scan, values=(7,)).array.max() == 7
    save_nifti(path, np.zeros(SHAPE, np.float64))
    assert not read_labels(path, scan=scan, values=(1, 2)).array.any()
    save_nifti(path, np.zeros((6, 5, 5), np.uint8))
    refused(path, r"shape \(6, 5, 5\) and the scan \(6, 5, 4\)", scan=scan)
    refused(tmp_path, "is a folder", scan=scan)
    for array in (np.full(SHAPE, 0.5), np.full(SHAPE, 256), np.full(SHAPE, np.nan)):
        with pytest.raises(VolumeError, match="whole numbers"):
            write_labels(Volume(array, scan.affine), path)
    with pytest.raises(VolumeError, match="suffixes"):
        write_labels(Volume(np.zeros(SHAPE, np.uint8), scan.affine), tmp_path / "folder")


@pytest.mark.parametrize(
    "move",
    [
        make_affine(np.eye(3), origin=(-101.2, 87.6, 512.75)),
        make_affine(np.diag([-1, 1, 1])),
        make_affine(oblique(0, 0, 1)),
        make_affine(np.eye(3), spacing=(1.25, 0.91, 3.3)),
        make_affine(np.eye(3)[:, [1, 0, 2]]),
    ],
    ids=["origin", "flip", "turn", "spacing", "axes"],
)
def test_labels_off_the_scans_grid_are_refused(tmp_path, move):
    path = save_nifti(tmp_path / "labels.nii.gz", np.zeros(SHAPE, np.uint8), move)
    refused(path, "mm away from the scan's", scan=make_scan())
    assert read_labels(path).shape == SHAPE


def test_labels_may_differ_from_the_scans_grid_by_rounding(tmp_path):
    affine = make_affine(np.eye(3), origin=(-101.234, 87.6, 512.75))
    path = save_nifti(tmp_path / "labels.nii.gz", np.zeros(SHAPE, np.uint8), affine)
    assert read_labels(path, scan=make_scan()).shape == SHAPE


def test_wrong_grid_is_refused_before_voxels_are_read(tmp_path):
    """A label file that claims to be enormous costs nothing."""
    path = save_nifti(tmp_path / "labels.nii", np.zeros(SHAPE, np.uint8))
    content = bytearray(path.read_bytes())
    content[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()  # dim[1..3]
    path.write_bytes(content)
    refused(path, "more than the limit", scan=make_scan())
    content[42:48] = np.array([300, 300, 300], "<i2").tobytes()
    path.write_bytes(content)
    refused(path, "resample", scan=make_scan())
    refused(path, "truncated|damaged")


# ------------------------------------------------------------------------------------------------------ DICOM errors


@pytest.fixture
def series(tmp_path):
    folder = tmp_path / "series"
    write_scan(make_scan(make_affine(oblique(20, 30, 40)), shape=(6, 5, 7)), folder)
    return folder


def test_dicom_folder_without_images_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no DICOM images")
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    refused(tmp_path / "empty", "no DICOM images")


def test_dicom_of_several_series_is_refused(series):
    write_scan(make_scan(seed=1), series.parent / "other")
    for file in (series.parent / "other").iterdir():
        shutil.move(file, series / f"other-{file.name}")
    refused(series, "holds 2 volumes")


@pytest.mark.parametrize("index", [1, 3, 5])
def test_dicom_with_a_missing_slice_is_refused(series, index):
    sorted(series.iterdir())[index].unlink()
    refused(series, "unevenly spaced")


def test_dicom_with_uneven_gaps_is_refused(series):
    def move(index: int, item: Any) -> None:
        if index > 3:
            item.ImagePositionPatient = [float(x) + 0.2 for x in item.ImagePositionPatient]

    edit_series(series, move)
    refused(series, "unevenly spaced")


def test_dicom_with_two_slices_at_one_place_is_refused(series):
    shutil.copy(sorted(series.iterdir())[0], series / "other.dcm")
    edit_series(series, lambda index, item: setattr(item, "SOPInstanceUID", f"1.2.{index}"))
    refused(series, "same position")


@pytest.mark.parametrize(
    ("name", "value", "finding"),
    [
        ("ImageOrientationPatient", [1, 0, 0, 0, 1, 0], "differ in orientation"),
        ("PixelSpacing", [2, 2], "differ in pixel spacing"),
        ("ImagePositionPatient", None, "no usable ImagePositionPatient"),
        ("ImagePositionPatient", [0, 0], "no usable ImagePositionPatient"),
        ("Rows", 4, "different numbers of rows"),
        ("NumberOfFrames", 2, "multi-frame"),
        ("SamplesPerPixel", 3, "colour"),
    ],
)
def test_dicom_slice_unlike_the_others_is_refused(series, name, value, finding):
    edit_series(series, lambda index, item: setattr(item, name, value) if index == 2 else None)
    refused(series, finding)


def test_dicom_without_usable_directions_is_refused(series):
    edit_series(series, lambda _, item: setattr(item, "ImageOrientationPatient", [1, 0, 0, 1, 0, 0]))
    refused(series, "orthogonal")


def test_truncated_dicom_is_refused(series):
    file = sorted(series.iterdir())[2]
    whole = file.read_bytes()
    for length in (0, 100, 200, 500, len(whole) // 2, len(whole) - 40, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused(series, "truncated|damaged|cannot be read|no SeriesInstanceUID|no usable|different")


def test_dicom_of_one_slice_takes_its_thickness(series):
    for file in sorted(series.iterdir())[1:]:
        file.unlink()
    assert read_scan(series).spacing_mm == pytest.approx(SPACING)
    edit_series(series, lambda _, item: (item.pop("SliceThickness"), item.pop("SpacingBetweenSlices")))
    refused(series, "unknown thickness")


def test_dicom_is_not_written_over_a_folder_with_files(series):
    before = {file.name: file.read_bytes() for file in series.iterdir()}
    with pytest.raises(VolumeError, match="exists already"):
        write_scan(make_scan(), series)
    assert {file.name: file.read_bytes() for file in series.iterdir()} == before


# ---------------------------------------------------------------------------------------------------- names, writing


def test_scan_id_takes_off_the_suffix_only(tmp_path):
    assert scan_id("scan.v1.2.nii.gz") == "scan.v1.2"
    assert scan_id(tmp_path / "a.nii") == "a"
    assert scan_id("a.b.nrrd") == "a.b"
    assert scan_id("a.NII.GZ") == "a"
    (tmp_path / "1.2.840.nii").mkdir()
    assert scan_id(tmp_path / "1.2.840.nii") == "1.2.840.nii"


def test_is_scan_path(series):
    for name in FILES:
        assert is_scan_path(name)
    for name in (".hidden.nii.gz", ".nii.gz", "a.json", "a.nii.txt", "a"):
        assert not is_scan_path(name)
    assert is_scan_path(series)
    assert not is_scan_path(series.parent)


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_atomic_write_replaces_on_success(tmp_path):
    target = tmp_path / "new" / "a.b.nii.gz"
    for content in (b"first", b"second"):
        with atomic_write(target) as temporary:
            assert temporary.name.endswith(".b.nii.gz")
            assert temporary.parent.parent == target.parent
            temporary.write_bytes(content)
            assert not any(is_scan_path(p) for p in target.parent.iterdir() if p != target)
        assert target.read_bytes() == content
    assert names_in(target.parent) == ["a.b.nii.gz"]
    plain = tmp_path / "plain"
    plain.touch()
    assert target.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_write_leaves_nothing_behind_on_failure(tmp_path, error):
    target = tmp_path / "a.nii.gz"
    for before in ([], ["a.nii.gz"]):
        with pytest.raises(error), atomic_write(target) as temporary:
            temporary.write_bytes(b"half")
            raise error
        assert names_in(tmp_path) == before
        target.write_bytes(b"old")
    assert target.read_bytes() == b"old"
    with pytest.raises(error), atomic_write(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "slice").touch()
        raise error
    assert names_in(tmp_path) == ["a.nii.gz"]


def test_atomic_write_names_the_wanted_file_in_errors(tmp_path, monkeypatch):
    for work in (Path.read_bytes, Path.rmdir):  # as met by whoever writes
        with pytest.raises(FileNotFoundError) as met, atomic_write(tmp_path / "a.txt") as temporary:
            work(temporary)
        assert met.value.filename == str(tmp_path / "a.txt")

    def refuse(prefix: str, dir: Path) -> str:
        raise OSError(errno.EACCES, "Permission denied", f"{dir}/{prefix}1")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(PermissionError) as met, atomic_write(tmp_path / "a.txt"):
        raise AssertionError("nothing can be written there")
    assert met.value.filename == str(tmp_path / "a.txt")


def test_atomic_write_reports_that_nothing_was_written(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a.txt"):
        pass
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", [*FILES, "series"])
def test_failed_write_keeps_the_old_file(tmp_path, name, monkeypatch):
    def half(*arguments: Any) -> None:
        path = next(a for a in arguments if isinstance(a, Path))
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    for writer in ("write_nifti", "write_nrrd", "write_dicom"):
        monkeypatch.setattr(volumes.files, writer, half)
    before = []
    if name != "series":
        (tmp_path / name).write_bytes(b"old")
        before = [name]
    with pytest.raises(OSError, match="No space"):
        write_scan(make_scan(), tmp_path / name)
    assert names_in(tmp_path) == before
    if before:
        assert (tmp_path / name).read_bytes() == b"old"


# -------------------------------------------------------------------------------------------------- canonical frame


@pytest.mark.parametrize(
    ("spacing", "acquired", "axis"),
    [
        ((4, 1, 1), None, 0),
        ((1, 1.3, 1), 0, 1),
        ((1, 1.15, 1), 0, 0),
        ((1, 1, 1), 1, 1),
        ((1, 1, 1), None, 2),
        ((4, 4, 1), None, 2),
        ((4, 3.5, 1), 1, 1),
    ],
)
def test_through_plane_axis(spacing, acquired, axis):
    volume = Volume(make_scan().array, make_affine(oblique(10, 20, 30), spacing=spacing), acquired)
    assert through_plane_axis(volume) == axis
    assert canonical_frame(volume).through_plane_axis == axis


def test_acquisition_axis_is_kept_in_nifti_and_known_of_dicom(tmp_path):
    for axis in (None, 0, 1, 2):
        write_scan(Volume(make_scan().array, np.eye(4), axis), tmp_path / "a.nii.gz")
        assert read_scan(tmp_path / "a.nii.gz").acquisition_axis == axis
    write_scan(make_scan(), tmp_path / "series")
    assert read_scan(tmp_path / "series").acquisition_axis == 2


@settings(max_examples=100, deadline=None)
@given(
    case=st.sampled_from(SIGNED_PERMUTATIONS),
    degrees=st.tuples(*[st.floats(-20, 20)] * 3),
    through=st.sampled_from((None, 0, 1, 2)),
    order=st.sampled_from((0, 1)),
    leading=st.sampled_from(((), (2,), (2, 3))),
)
def test_canonical_frame_is_nearest_ras_with_the_through_plane_axis_last(case, degrees, through, order, leading):
    scan = make_scan(make_affine(oblique(*degrees) @ signed_permutation(*case)))
    frame = canonical_frame(scan, through_plane_axis=through)
    canonical = to_canonical(scan.array, frame, order=order)

    # nibabel's own closest canonical image, with the through-plane axis moved last
    image = nib.as_closest_canonical(nib.Nifti1Image(scan.array, scan.affine))
    native = 2 if through is None else through
    world_axis = case[0][native]
    expected = np.moveaxis(np.asarray(image.dataobj), world_axis, -1)
    np.testing.assert_array_equal(canonical, expected)
    zooms = list(image.header.get_zooms())
    zooms.append(zooms.pop(world_axis))
    np.testing.assert_allclose(frame.canonical_spacing_mm, zooms, rtol=1e-5)
    assert frame.canonical_shape == canonical.shape
    assert frame.permutation[-1] == frame.through_plane_axis == native

    stack = np.random.default_rng(0).normal(size=(*leading, *SHAPE)).astype(np.float32)
    there = to_canonical(stack, frame, order=order)
    assert there.shape == (*leading, *frame.canonical_shape)
    assert there.flags.c_contiguous and not np.shares_memory(there, stack)
    back = to_native(there, frame, order=order)
    assert back.flags.c_contiguous and not np.shares_memory(back, there)
    np.testing.assert_array_equal(back, stack)


def test_canonical_shape_and_spacing_cover_the_same_field_of_view():
    scan = make_scan(shape=(31, 20, 7))
    frame = canonical_frame(scan, spacing_mm=(2.0, None, 100.0))
    assert frame.canonical_shape == (round(31 * 1.25 / 2), 20, 1)
    np.testing.assert_allclose(
        np.multiply(frame.canonical_shape, frame.canonical_spacing_mm), np.multiply(scan.shape, scan.spacing_mm)
    )
    array = to_canonical(scan.array, frame, order=1)
    assert array.shape == frame.canonical_shape
    assert to_native(array, frame, order=0).shape == scan.shape


def resample(array: np.ndarray, shape: tuple[int, int, int], order: int) -> np.ndarray:
    """Resample through a frame whose axes need no reordering."""
    volume = Volume(array, np.eye(4))
    frame = canonical_frame(volume, spacing_mm=[n / m for n, m in zip(array.shape, shape, strict=True)])
    assert frame.canonical_shape == shape
    return to_canonical(array, frame, order=order)


@pytest.mark.parametrize("shape", [(12, 10, 8), (9, 5, 4), (5, 7, 3), (6, 5, 1), (4, 4, 4), (30, 1, 11)])
def test_resampling_agrees_with_torch(shape):
    """Linear without smoothing, and nearest, on corner-aligned grids, as torch's interpolate defines them."""
    array = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    tensor = torch.from_numpy(array)[None, None]
    nearest = torch.nn.functional.interpolate(tensor, size=shape, mode="nearest-exact")[0, 0].numpy()
    np.testing.assert_array_equal(resample(array, shape, 0), nearest)
    if all(n / m <= volumes.SMOOTHING_RATIO for n, m in zip(array.shape, shape, strict=True)):
        linear = torch.nn.functional.interpolate(tensor, size=shape, mode="trilinear", align_corners=False)
        np.testing.assert_allclose(resample(array, shape, 1), linear[0, 0].numpy(), atol=1e-5)


def test_downsampling_smooths_as_scikit_image_does():
    array = np.random.default_rng(0).normal(size=(24, 30, 10)).astype(np.float32)
    expected = resize(array, (12, 10, 10), order=1, mode="edge", anti_aliasing=True)
    np.testing.assert_allclose(resample(array, (12, 10, 10), 1), expected, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(old=st.integers(2, 40), new=st.integers(1, 60))
def test_resampling_neither_shifts_nor_scales(old, new):
    """A ramp over world coordinates stays that ramp inside, and a constant stays itself everywhere."""
    ramp = np.broadcast_to((np.arange(old) + 0.5)[:, None, None], (old, 2, 2)).astype(np.float32)
    volume = Volume(ramp, np.eye(4))
    frame = canonical_frame(volume, spacing_mm=(old / new, None, None))
    found = to_canonical(ramp, frame, order=1)[:, 0, 0]
    expected = (np.arange(new) + 0.5) * old / new
    margin = 0.5 + 4 * (old / new) * (old / new > 1)  # where the edge's clamping reaches to
    inside = (expected >= margin) & (expected <= old - margin)
    np.testing.assert_allclose(found[inside], expected[inside], rtol=1e-5)
    assert np.mean(found) == pytest.approx(old / 2, rel=1e-3)
    np.testing.assert_allclose(to_canonical(np.full_like(ramp, 3), frame, order=1), 3, rtol=1e-6)
    labels = (ramp > old / 3).astype(np.uint8)
    assert to_canonical(labels, frame, order=0).dtype == np.uint8
    if new >= old:
        np.testing.assert_array_equal(to_native(to_canonical(labels, frame, order=0), frame, order=0), labels)


def test_frame_refuses_what_does_not_fit():
    scan = make_scan()
    frame = canonical_frame(scan)
    with pytest.raises(ValueError, match="last three axes"):
        to_canonical(np.zeros((5, 6, 4)), frame, order=1)
    with pytest.raises(ValueError, match="last three axes"):
        to_native(np.zeros((6, 5)), frame, order=1)
    with pytest.raises(ValueError, match="order"):
        to_canonical(scan.array, frame, order=3)
    for spacing in ((1, 1), (0, None, None), (-1, 1, 1), (np.nan, 1, 1)):
        with pytest.raises(ValueError, match="target spacing"):
            canonical_frame(scan, spacing_mm=spacing)
    with pytest.raises(ValueError, match="through-plane axis"):
        canonical_frame(scan, through_plane_axis=3)
    with pytest.raises(VolumeError, match="voxels of the networks' spacing"):
        canonical_frame(scan, spacing_mm=(0.001, 0.001, 0.001))


# --------------------------------------------------------------------------------------------------------- real scans


def fetal_stacks() -> list[Path]:
    root = os.environ.get("SEGQC_DATA")
    return sorted(Path(root, "fetal-brain-stacks", "images").glob("*.nii.gz")) if root else []


@pytest.mark.skipif(not fetal_stacks(), reason="SEGQC_DATA names no folder with fetal-brain-stacks")
@pytest.mark.parametrize("run", range(len(fetal_stacks())))
def test_oblique_fetal_stack_keeps_its_geometry(tmp_path, run):
    path = fetal_stacks()[run]
    scan = read_scan(path)
    image = itk_read(path)
    assert_same_geometry(itk_affine(image), scan.affine, scan.shape, atol=2e-3)  # ITK reads the rounded quaternion
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, scan.array)
    assert through_plane_axis(scan) == 2

    labels = read_labels(path.parent.parent / "labels" / path.name, scan=scan)
    assert labels.array.any()

    for name in ("scan.nii", "scan.nrrd", "series"):
        write_scan(scan, tmp_path / name)
        found = read_scan(tmp_path / name)
        if np.linalg.det(scan.affine[:3, :3]) < 0 and name == "series":
            # DICOM sorts slices along the normal: the stack comes back with its last axis reversed.
            found = Volume(found.array[:, :, ::-1], found.affine @ reversal(scan.shape[2]))
        assert_same_geometry(found.affine, scan.affine, scan.shape)
        np.testing.assert_array_equal(found.array, scan.array)
        assert_same_geometry(itk_affine(itk_read(tmp_path / name)), read_scan(tmp_path / name).affine, scan.shape)

    frame = canonical_frame(scan)
    np.testing.assert_array_equal(to_native(to_canonical(scan.array, frame, order=1), frame, order=1), scan.array)


def reversal(size: int) -> np.ndarray:
    matrix = np.diag([1.0, 1, -1, 1])
    matrix[2, 3] = size - 1
    return matrix
