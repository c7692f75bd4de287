"""NIfTI files lie where ITK sees them, or are refused; what contradicts itself is said."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (the field's habit)
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from segqc.volumes import Volume, VolumeError, read_labels, read_scan, write_labels
from segqc.volumes.intake import check_scan

SHAPE = (7, 6, 5)
SPACING = np.array([1.5, 1.25, 4.0])


@pytest.fixture(autouse=True)
def quiet_itk():
    sitk.ProcessObject.SetGlobalWarningDisplay(False)


def itk_affine(path: Path) -> np.ndarray:
    """The voxel-to-RAS affine that ITK reads, from its LPS."""
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1, -1, 1, 1]) @ affine


def assert_same_place(found: np.ndarray, expected: np.ndarray, atol: float = 2e-3) -> None:
    corners = np.array([(*c, 1) for c in itertools.product(*[(0, n - 1) for n in SHAPE])]).T
    np.testing.assert_allclose(found @ corners, expected @ corners, rtol=0, atol=atol)


def affine_of(rotation: np.ndarray, spacing=SPACING, origin=(-40.0, 30.0, 12.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.asarray(spacing)
    affine[:3, 3] = origin
    return affine


def turned(*degrees: float) -> np.ndarray:
    matrix = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    # ITK's singular value decomposition fails on numbers below the normal range of single precision
    return np.where(np.abs(matrix) < np.finfo(np.float32).tiny, 0.0, matrix)


def save(path: Path, qform: np.ndarray, q_code: int, sform: np.ndarray, s_code: int, **fields: object) -> Path:
    """A scan with both forms, whatever their codes, and header fields as given."""
    image = nib.Nifti1Image(np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE), None)
    image.set_qform(qform, max(q_code, 1), strip_shears=True)
    image.set_sform(sform, max(s_code, 1))
    content, header = image.to_bytes(), image.header
    header["qform_code"], header["sform_code"], header["vox_offset"] = q_code, s_code, 352
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock + content[len(header.binaryblock) :])
    return path


@st.composite
def rotations(draw: st.DrawFn) -> np.ndarray:
    """Any rotation, with those near half a turn, where quaternions are least precise, among the likely ones."""
    near = st.sampled_from((0.0, 90.0, 179.95, 180.0, -179.98)).flatmap(lambda a: st.floats(a - 0.1, a + 0.1))
    angles = [draw(st.one_of(near, st.floats(-180, 180))) for _ in range(3)]
    return turned(*angles) * [1, 1, draw(st.sampled_from((1, -1)))]


@st.composite
def headers(draw: st.DrawFn) -> dict[str, object]:
    """Forms that agree, differ or are sheared, codes, units, and a voxel size that may contradict them."""
    qform = affine_of(draw(rotations()))
    kind = draw(st.sampled_from(("same", "moved", "turned", "sheared", "unit", "nearly")))
    sform = qform.copy()
    if kind == "moved":
        sform[:3, 3] += [5, 3, 2]
    elif kind == "turned":
        sform = affine_of(draw(rotations()))
    elif kind == "sheared":
        sform[:3, 2] += [0.0, draw(st.floats(0.01, 2)), 0.0]
    elif kind == "unit":
        sform[:3, :3] /= SPACING
    elif kind == "nearly":
        sform[:3, :3] += draw(st.floats(-1e-4, 1e-4))
    pixdim = np.ones(8, np.float32)
    pixdim[0] = draw(st.sampled_from((1.0, -1.0, 0.0)))
    pixdim[1:4] = draw(st.sampled_from(((1.5, 1.25, 4.0), (1.0, 1.0, 1.0), (0.0, 1.25, 4.0), (2.0, -1.25, 4.0))))
    return {
        "qform": qform,
        "q_code": draw(st.sampled_from((0, 1, 2))),
        "sform": sform,
        "s_code": draw(st.sampled_from((0, 1, 2, 4))),
        "pixdim": pixdim,
        "xyzt_units": draw(st.sampled_from((0, 2, 2, 10, 3, 1))),
    }


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=headers())
def test_scan_lies_where_itk_has_it_and_so_does_its_mask(tmp_path, header):
    note(f"{header}")
    scan, mask = save(tmp_path / "scan.nii", **header), tmp_path / "mask.nii.gz"
    try:
        expected = itk_affine(scan)
    except RuntimeError:
        with pytest.raises(VolumeError):
            read_scan(scan)
        return
    try:
        volume = read_scan(scan)
    except VolumeError as error:
        # Micrometres and metres can't be meant with these numbers.
        # Of forms that are each other's mirror image ITK takes the one or the other, by rounding.
        if "direction of axes only" not in str(error):
            assert "cannot be meant" in str(error) and header["xyzt_units"] in (1, 3)
        return
    assert_same_place(volume.affine, expected)
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3, 2:4, 1:4] = 1
    write_labels(Volume(labels, volume.affine), mask)
    assert_same_place(itk_affine(mask), expected)


@pytest.mark.parametrize(("unit", "mm"), [("micron", 1e-3), ("meter", 1e3), ("mm", 1.0), ("unknown", 1.0)])
@pytest.mark.parametrize("keeps_unit", [True, False])
def test_label_that_nibabel_saves_may_leave_the_unit_behind(tmp_path, unit, mm, keeps_unit):
    image = nib.Nifti1Image(
        np.ones(SHAPE, np.float32), affine_of(turned(10, 20, 30), SPACING / mm, (-40 / mm, 3 / mm, 1))
    )
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "scan.nii")
    scan = read_scan(tmp_path / "scan.nii")
    assert_same_place(scan.affine, itk_affine(tmp_path / "scan.nii"))
    labels = np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.uint8)
    header = image.header if keeps_unit else None
    nib.save(nib.Nifti1Image(labels, image.affine, header, dtype=np.uint8), tmp_path / "labels.nii.gz")
    found = read_labels(tmp_path / "labels.nii.gz", scan=scan)
    np.testing.assert_array_equal(found.array, labels)
    np.testing.assert_array_equal(found.affine, scan.affine)


def shown(path: Path) -> str:
    with contextlib.suppress(VolumeError):
        return " ".join(check_scan(path).warnings)
    return "refused"


def test_user_is_told_which_geometry_is_used(tmp_path):
    straight, moved = affine_of(np.eye(3)), affine_of(np.eye(3), origin=(-35, 33, 14))
    path = tmp_path / "scan.nii"
    assert shown(save(path, straight, 1, straight, 1)) == ""
    assert shown(save(path, straight, 1, straight, 0)) == ""
    output = shown(save(path, straight, 1, moved, 2))
    assert "6.16 mm apart; the qform is used" in output
    assert "the sform is used" in shown(save(path, straight, 1, moved, 1))
    assert "orientation" in shown(save(path, straight, 0, straight, 0))
    assert "voxel size contradicts its sform; 1 x 1 x 2 mm" in shown(
        save(path, straight, 0, straight, 1, pixdim=[1, 1, 1, 2, 1, 1, 1, 1])
    )


def test_forms_that_differ_by_a_quaternions_rounding_do_not_disagree(tmp_path):
    """Near half a turn single precision costs a quaternion some 1e-4 rad."""
    for degrees in (0.005, 0.01, 0.02, 0.05, 0.1, 0.5):
        affine = affine_of(turned(0, 0, 180) @ turned(degrees, degrees / 2, 0))
        assert shown(save(tmp_path / "scan.nii", affine, 1, affine, 2)) == "", degrees


def test_sheared_sform_alone_is_refused_and_a_qform_beside_it_is_used(tmp_path):
    sheared = affine_of(np.eye(3))
    sheared[:3, 2] = [0, -0.7, 4]
    path = save(tmp_path / "scan.nii", affine_of(np.eye(3)), 0, sheared, 1)
    with pytest.raises(VolumeError, match=r"scan\.nii: has a sheared sform and no qform"):
        read_scan(path)
    save(path, sheared, 1, sheared, 1)
    assert_same_place(read_scan(path).affine, itk_affine(path))
    assert "the qform is used" in shown(path)


@pytest.mark.parametrize(
    ("qform", "q_code", "sform", "s_code"),
    [
        (affine_of(np.eye(3)), 1, affine_of(turned(10, 0, 0), origin=(-35, 33, 14)), 2),
        (affine_of(np.eye(3)), 1, affine_of(np.eye(3), spacing=(1, 1, 1)), 1),
        (affine_of(np.eye(3)), 1, affine_of(np.array([[1, 0, 0], [0, 1, -0.17], [0, 0, 1]])), 1),
        (affine_of(np.eye(3)), 0, affine_of(np.eye(3)), 0),
        (affine_of(turned(0, 0, 180) @ turned(0.05, 0.02, 0)), 1, np.eye(4), 0),
    ],
    ids=["coregistered", "unit sform", "gantry tilt", "no codes", "half a turn"],
)
def test_label_on_any_grid_that_the_scan_states_is_accepted(tmp_path, qform, q_code, sform, s_code):
    """A client of nibabel goes by another form than one of ITK."""
    path = save(tmp_path / "scan.nii", qform, q_code, sform, s_code)
    scan = read_scan(path)
    labels = np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.uint8)
    file = tmp_path / "labels.nii.gz"
    for affine in (nib.load(path).affine, itk_affine(path)):
        nib.save(nib.Nifti1Image(labels, affine), file)
        found = read_labels(file, scan=scan)
        np.testing.assert_array_equal(found.array, labels)
        np.testing.assert_array_equal(found.affine, scan.affine)
        step = np.eye(4)
        step[0, 3] = 1
        nib.save(nib.Nifti1Image(labels, affine @ step), file)
        with pytest.raises(VolumeError, match="mm away from the scan's"):
            read_labels(file, scan=scan)
    nib.save(nib.Nifti1Image(labels, nib.load(path).affine, nib.load(path).header), file)
    np.testing.assert_array_equal(read_labels(file, scan=scan).array, labels)
    image = sitk.GetImageFromArray(labels.T)
    image.CopyInformation(sitk.ReadImage(str(path)))
    sitk.WriteImage(image, str(tmp_path / "labels.nrrd"))
    np.testing.assert_array_equal(read_labels(tmp_path / "labels.nrrd", scan=scan).array, labels)


@pytest.mark.parametrize("offset", [-1.0, 1e30, float(1 << 25), np.nan, np.inf])
def test_offset_that_no_header_has_is_refused_at_once(tmp_path, offset):
    path = save(tmp_path / "scan.nii", np.eye(4), 1, np.eye(4), 1)
    content = bytearray(path.read_bytes())
    content[108:112] = np.float32(offset).tobytes()
    path.write_bytes(content)
    with pytest.raises(VolumeError, match="vox_offset"):
        read_scan(path)


@pytest.mark.parametrize("q_code", [0, 1])
def test_form_that_holds_nan_is_refused_whatever_the_other_says(tmp_path, q_code):
    path = save(tmp_path / "scan.nii", np.eye(4), q_code, np.eye(4), 2, srow_x=[np.nan, 0, 0, 0])
    with pytest.raises(VolumeError, match="NaN in its sform"):
        read_scan(path)


def test_file_named_as_compressed_need_not_be(tmp_path):
    path = save(tmp_path / "scan.nii", np.eye(4), 1, np.eye(4), 1)
    plain = path.rename(tmp_path / "scan.NII.GZ")
    np.testing.assert_array_equal(read_scan(plain).array.ravel(), np.arange(np.prod(SHAPE)))


@pytest.mark.parametrize("sizes", [(0,), (1, 0), (0, 0, -1), (1, 1, 1, 1)])
def test_further_axes_of_no_size_are_none(tmp_path, sizes):
    dim = [3 + len(sizes), *SHAPE, *sizes, *[1] * (4 - len(sizes))]
    path = save(tmp_path / "scan.nii", np.eye(4), 1, np.eye(4), 1, dim=dim)
    assert read_scan(path).shape == SHAPE == sitk.ReadImage(str(path)).GetSize()[:3]
