from __future__ import annotations

import hashlib
import subprocess
import tomllib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from segqc.phantom import BODY, BRAIN, PLACENTA, Phantom, draw_phantom, write_datastore
from segqc.volumes import read_labels, read_scan, through_plane_axis

SAMPLE = Path(__file__).parents[1] / "sample-datastore"
SEEDS = (11, 12)


@pytest.fixture(scope="module")
def easy() -> list[Phantom]:
    return [draw_phantom(seed, 0.0) for seed in SEEDS]


@pytest.fixture(scope="module")
def hard() -> list[Phantom]:
    return [draw_phantom(seed, 1.0) for seed in SEEDS]


def volume_ml(phantom: Phantom, value: int) -> float:
    return float((phantom.labels.array == value).sum()) * phantom.labels.voxel_volume_mm3 / 1000


def brain_centres_mm(phantom: Phantom) -> np.ndarray:
    """The in-plane centre of the brain in the slices that hold at least a tenth of its widest slice."""
    areas = (phantom.labels.array == BRAIN).sum(axis=(0, 1))
    slices = np.flatnonzero(areas > 0.1 * areas.max())
    centres = [ndimage.center_of_mass(phantom.labels.array[..., k] == BRAIN) for k in slices]
    return np.array(centres) * phantom.labels.spacing_mm[:2]


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_grid_is_thick_slices_slightly_oblique(easy: list[Phantom], hard: list[Phantom]) -> None:
    for phantom in easy + hard:
        assert phantom.scan.shape[:2] == (128, 128)
        assert 20 <= phantom.scan.shape[2] <= 24
        assert phantom.labels.shape == phantom.scan.shape
        assert np.array_equal(phantom.labels.affine, phantom.scan.affine)
        np.testing.assert_allclose(phantom.scan.spacing_mm, (1.2, 1.2, 4.0), rtol=1e-4)
        assert through_plane_axis(phantom.scan) == 2
        assert nib.aff2axcodes(phantom.scan.affine) == ("P", "S", "L")
        directions = np.abs(phantom.scan.affine[:3, :3] / phantom.scan.spacing_mm).max(axis=0)
        assert np.all(directions > np.cos(np.deg2rad(25)))
        assert directions.min() < 0.99999
        assert phantom.scan.array.dtype == np.int16
        assert phantom.scan.array.min() >= 0


def test_structures_have_plausible_volumes(easy: list[Phantom], hard: list[Phantom]) -> None:
    for phantom in easy + hard:
        assert set(np.unique(phantom.labels.array)) == {0, PLACENTA, BODY, BRAIN}
        assert 25 < volume_ml(phantom, PLACENTA) < 160
        assert 50 < volume_ml(phantom, BODY) < 150
        assert 15 < volume_ml(phantom, BRAIN) < 50


def test_brain_lies_inside_the_body_and_placenta_is_one_organ(easy: list[Phantom]) -> None:
    for phantom in easy:
        brain = phantom.labels.array == BRAIN
        rim = ndimage.binary_dilation(brain, ndimage.generate_binary_structure(3, 1) & [[[0, 1, 0]]]) & ~brain
        assert (phantom.labels.array[rim] == BODY).mean() > 0.8
        parts, count = ndimage.label(phantom.labels.array == PLACENTA)
        sizes = np.bincount(parts.ravel())[1:]
        assert sizes.max() / sizes.sum() > 0.95, count


def test_fluid_is_brighter_than_the_fetus_and_the_outside_is_dark(easy: list[Phantom]) -> None:
    for phantom in easy:
        image, labels = phantom.scan.array, phantom.labels.array
        fetus = labels >= BODY
        around = ndimage.binary_dilation(fetus, iterations=4) & (labels == 0)
        assert np.median(image[around]) > 1.2 * np.median(image[labels == BODY])
        assert np.median(image[0]) < 0.15 * np.median(image[around])


def test_same_numbers_give_the_same_phantom_and_others_another(easy: list[Phantom]) -> None:
    (first, other), again = easy, draw_phantom(SEEDS[0], 0.0)
    assert np.array_equal(first.scan.array, again.scan.array)
    assert np.array_equal(first.labels.array, again.labels.array)
    assert np.array_equal(first.scan.affine, again.scan.affine)
    assert not np.array_equal(first.scan.affine, other.scan.affine)
    assert first.labels.shape != other.labels.shape or not np.array_equal(first.labels.array, other.labels.array)


def test_hard_scans_have_a_fainter_thinner_placenta_and_lost_slices(easy: list[Phantom], hard: list[Phantom]) -> None:
    for good, bad in zip(easy, hard, strict=True):
        assert bad.placenta_contrast < 0.6 * good.placenta_contrast
        assert bad.placenta_thickness_mm < good.placenta_thickness_mm
        assert not good.dropout_slices
        assert len(bad.dropout_slices) >= 1
        assert not good.severity.reasons()
        assert len(bad.severity.reasons()) >= 2


def test_lost_slices_are_darker_than_the_others(hard: list[Phantom]) -> None:
    phantom = hard[1]
    lost = set(phantom.dropout_slices)
    means = phantom.scan.array.mean(axis=(0, 1))
    kept = [k for k in range(len(means)) if k not in lost]
    assert max(means[k] for k in lost) < 0.9 * np.median(means[kept])


def test_labels_follow_the_motion_between_slices(easy: list[Phantom], hard: list[Phantom]) -> None:
    def jumps_mm(phantom: Phantom) -> float:
        return float(np.abs(np.diff(brain_centres_mm(phantom), axis=0, n=2)).mean())

    def displacement_mm(phantom: Phantom) -> float:
        return float(np.sqrt(np.mean(np.sum(phantom.displacement_mm**2, axis=1))))

    for good, bad in zip(easy, hard, strict=True):
        assert displacement_mm(bad) > 1.8 * displacement_mm(good)
        assert jumps_mm(bad) > 1.3 * jumps_mm(good)


@pytest.mark.parametrize("difficulty", [-0.1, 1.1, float("nan")])
def test_difficulty_outside_its_range_is_refused(difficulty: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        draw_phantom(0, difficulty)


def test_datastore_is_the_same_twice_byte_for_byte(
    tmp_path: Path, easy: list[Phantom], monkeypatch: pytest.MonkeyPatch
) -> None:
    # drawing takes seconds; that the same numbers give the same phantom is tested above
    monkeypatch.setattr("segqc.phantom.draw_phantom", lambda *_: easy[0])
    for name in ("first", "again"):
        write_datastore(tmp_path / name, scans=1, labelled=1, seed=5)
    assert files(tmp_path / "first") == files(tmp_path / "again")
    assert not [path for path in tmp_path.rglob(".*")]


def test_datastore_labels_some_scans_and_keeps_the_truth_of_the_rest_apart(
    tmp_path: Path, easy: list[Phantom], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segqc.phantom.draw_phantom", lambda *_: easy[0])  # drawing takes a second
    write_datastore(tmp_path, scans=2, labelled=1, seed=5)
    scans = {path.name for path in tmp_path.glob("*.nii.gz")}
    final = {path.name for path in (tmp_path / "labels" / "final").iterdir()}
    truth = {path.name for path in (tmp_path / "truth").glob("*.nii.gz")}
    assert scans == {"fetus_001.nii.gz", "fetus_002.nii.gz"}
    assert len(final) == 1
    assert final | truth == scans
    assert not final & truth
    for name in scans:
        labels = (tmp_path / "labels/final" if name in final else tmp_path / "truth") / name
        read_labels(labels, scan=read_scan(tmp_path / name), values=(0, 1, 2, 3))


@pytest.mark.parametrize(("scans", "labelled"), [(0, 0), (2, 3), (2, -1)])
def test_impossible_numbers_of_scans_are_refused(tmp_path: Path, scans: int, labelled: int) -> None:
    with pytest.raises(ValueError, match="scan"):
        write_datastore(tmp_path, scans=scans, labelled=labelled)
    assert not list(tmp_path.iterdir())


def test_sample_datastore_is_complete_and_small() -> None:
    scans = {path.name for path in SAMPLE.glob("*.nii.gz")}
    final = {path.name for path in (SAMPLE / "labels" / "final").glob("*.nii.gz")}
    truth = {path.name for path in (SAMPLE / "truth").glob("*.nii.gz")}
    assert len(scans) == 24
    assert len(final) == 8
    assert final | truth == scans
    written = [*SAMPLE.glob("*.*"), *(SAMPLE / "labels" / "final").iterdir(), *(SAMPLE / "truth").iterdir()]
    assert sum(path.stat().st_size for path in written if path.is_file()) < 10_000_000
    assert (SAMPLE / "README.md").is_file()
    structures = tomllib.loads((SAMPLE / "segqc.toml").read_text())["structures"]
    assert structures == {"placenta": [PLACENTA], "body": [BODY], "brain": [BRAIN]}


def test_sample_datastore_mixes_easy_and_hard_in_its_final_labels() -> None:
    lines = (SAMPLE / "truth" / "phantoms.csv").read_text().splitlines()
    header = lines[0].split(",")
    rows = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
    final = [float(row["difficulty"]) for row in rows if row["label"] == "final"]
    rest = [float(row["difficulty"]) for row in rows if row["label"] == "truth"]
    assert min(final) < 0.15
    assert max(final) > 0.85
    assert abs(np.mean(final) - np.mean(rest)) < 0.1


def test_sample_scan_is_what_the_generator_draws() -> None:
    lines = (SAMPLE / "truth" / "phantoms.csv").read_text().splitlines()
    row = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    scans = len(lines) - 1
    rank = round(float(row["difficulty"]) * (scans - 1))
    phantom = draw_phantom(int(row["seed"]), float(np.linspace(0, 1, scans)[rank]))
    folder = SAMPLE / ("labels/final" if row["label"] == "final" else "truth")
    scan = read_scan(SAMPLE / f"{row['scan']}.nii.gz")
    labels = read_labels(folder / f"{row['scan']}.nii.gz", scan=scan)
    np.testing.assert_allclose(scan.affine, phantom.scan.affine, atol=1e-4)
    # Another processor may round a cosine differently: a voxel here and there, by one level.
    assert np.mean(labels.array != phantom.labels.array) < 1e-3
    assert np.mean(scan.array != phantom.scan.array) < 1e-2


def test_what_make_serve_keeps_is_no_part_of_the_checkout() -> None:
    root = SAMPLE.parent
    if not (root / ".git").exists():
        pytest.skip("the tests do not run in a checkout")
    told = subprocess.run(["make", "-n", "serve"], cwd=root, capture_output=True, text=True, check=True).stdout
    folder = told.split("segqc serve ")[1].split()[0]
    written = [f"{folder}/labels/final/new.nii.gz", f"{folder}/segqc/store.sqlite"]
    ignored = subprocess.run(["git", "check-ignore", *written], cwd=root, capture_output=True, text=True, check=False)
    assert ignored.stdout.split() == written
