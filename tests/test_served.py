"""The benchmark of served masks: its data sets are fixed and fair, and its numbers are what they say."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from segqc.quality.estimation import ConfidenceInterval
from segqc.quality.report_card import BesideConstant, Figures, StructureReport
from segqc.settings import load_settings
from segqc.types import Metrics
from segqc.volumes import Volume, read_labels, read_scan, write_labels, write_scan

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = ("hippocampus-4mm", "sunnybrook-groups", "phantoms-hard")
POOLS = ("development", "test")


@pytest.fixture(scope="module")
def harder_sets() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("harder_sets")


@pytest.fixture(scope="module")
def served(harder_sets: ModuleType) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("served")


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_no_patient_has_two_parts_and_only_what_is_seen_is_labelled(
    harder_sets: ModuleType, name: str, seed: int
) -> None:
    fixed = harder_sets.load(name)
    parts = [fixed.labelled(seed), *(fixed.pool(seed, pool) for pool in POOLS)]
    patients = [{scan.patient for scan in part} for part in parts]
    assert sum(map(len, patients)) == len(set.union(*patients))
    assert sum(map(len, parts)) == len(fixed.scans) == len({scan.id for scan in fixed.scans})
    assert 12 <= len(patients[0]) <= 16
    assert {scan.subset for scan in parts[0]} == {fixed.seen}
    assert {scan.split for scan in parts[0]} == {"train"}
    for pool in parts[1:]:
        assert {scan.subset for scan in pool} - {fixed.seen}
    for scan in fixed.scans:
        assert (scan.site is None) or (scan.subset != fixed.seen and not scan.labelled)


def test_the_manifests_are_what_was_drawn(harder_sets: ModuleType) -> None:
    if not os.environ.get("SEGQC_DATA"):
        pytest.skip("SEGQC_DATA names no folder of real data sets")
    for name, draw in harder_sets.DRAWN.items():
        assert draw(Path(os.environ["SEGQC_DATA"])) == harder_sets.load(name)


@pytest.mark.parametrize("slices", [8, 9, 11])
def test_thick_slices_are_averages_in_their_place(harder_sets: ModuleType, slices: int) -> None:
    rng = np.random.default_rng(slices)
    affine = np.array([[-1.0, 0.1, 0, 5], [0, 1.5, 0.2, -3], [0, 0, 2, 7], [0, 0, 0, 1]])
    image = Volume(rng.normal(size=(5, slices, 4)).astype(np.float32), affine)
    labels = Volume(rng.integers(0, 3, image.shape).astype(np.uint8), affine)
    thick, classes = harder_sets.thick_slices(image, labels, 4)
    assert thick.shape == classes.shape == (5, -(-slices // 4), 4)
    whole = slices // 4
    blocks = image.array[:, : 4 * whole].reshape(5, whole, 4, 4)
    np.testing.assert_allclose(thick.array[:, :whole], blocks.mean(axis=2), rtol=1e-5, atol=1e-6)
    centre = np.array([2, 1.5, 3, 1])
    np.testing.assert_allclose(thick.affine @ [2, 0, 3, 1], affine @ centre)
    shares = (labels.array[:, :4, :, None] == np.arange(3)).sum(axis=1)
    assert (
        np.take_along_axis(shares, classes.array[:, 0, :, None].astype(int), -1)[..., 0] == shares.max(axis=-1)
    ).all()


def test_another_site_changes_the_scan_alone_and_always_alike(harder_sets: ModuleType) -> None:
    image = Volume(np.random.default_rng(0).gamma(2, 100, (12, 10, 8)).astype(np.float32), np.diag([1, 2, 3, 1.0]))
    site = harder_sets.Site(gamma=0.5, bias=0.3, noise=0.08, seed=7)
    once, again = harder_sets.at_site(image, site), harder_sets.at_site(image, site)
    other = harder_sets.at_site(image, replace(site, seed=8))
    np.testing.assert_array_equal(once.array, again.array)
    np.testing.assert_array_equal(once.affine, image.affine)
    assert once.array.min() >= 0 and not np.allclose(once.array, other.array)
    assert np.corrcoef(once.array.ravel(), image.array.ravel())[0, 1] > 0.5


def test_a_folder_is_as_a_user_has_it_and_grows_by_the_test_pool(harder_sets: ModuleType, tmp_path: Path) -> None:
    data = tmp_path / "data" / "balls"
    scans = []
    for patient, split, labelled in (("a", "train", (0, 1)), ("b", "train", (1,)), ("c", "test", ())):
        for phase in ("1", "2"):
            name = f"{patient}_{phase}"
            ball = Volume(np.pad(np.ones((2, 4, 2), np.uint8), ((2, 2), (4, 0), (2, 2))), np.eye(4))
            write_scan(Volume(ball.array.astype(np.float32), ball.affine), data / "images" / f"{name}.nii.gz")
            write_labels(ball, data / "labels" / f"{name}.nii.gz")
            scans.append(harder_sets.HarderScan(name, patient, split, "seen", labelled))
    fixed = harder_sets.HarderSet("balls", "balls", {"ball": (1,)}, 4, "seen", tuple(scans))
    folder = tmp_path / "dataset"

    def files(part: str) -> set[str]:
        return {path.name.removesuffix(".nii.gz") for path in (folder / part).glob("*.nii.gz")}

    for pool, waiting in (("development", {"b_1", "b_2"}), ("test", {"b_1", "b_2", "c_1", "c_2"})):
        harder_sets.build(fixed, 0, pool, data.parent, folder)
        assert files("labels/final") == {"a_1", "a_2"}
        assert files("truth") == waiting
        assert files(".") == {"a_1", "a_2", *waiting}
    settings = load_settings(folder)
    assert settings.patients["a"] == ("a_1", "a_2")
    assert settings.training_settings("segqc").seed == settings.split_config().seed == 0
    harder_sets.build(fixed, 1, "development", data.parent, tmp_path / "other")
    assert load_settings(tmp_path / "other").training_settings("segmentation").seed == 1
    scan = read_scan(folder / "b_1.nii.gz")
    assert scan.spacing_mm == (1, 4, 1)
    assert read_labels(folder / "truth" / "b_1.nii.gz", scan=scan).array.sum() == 2 * 1 * 2


def result(served: ModuleType, seed: int = 0) -> object:
    """Masks of two structures in two subsets; the soft output knows the truth, the entropy's order is reversed."""
    rng = np.random.default_rng(seed)
    masks, found = [], []
    for number, true in enumerate(np.linspace(0.5, 0.9, 12).tolist()):
        shown = true + 0.05
        for structure in ("left", served.WORST):
            truth, estimate = Metrics(true, true, 1 - true, true - 0.7), Metrics(shown, shown, 1 - shown, 0.7 - true)
            said = {served.MAP: shown, served.SOFT: true, served.ENTROPY: -true, served.SIZE: float(rng.normal())}
            interval = (true - 0.1, true + 0.1) if number < 9 else (true + 0.1, true + 0.2)
            subset = "seen" if number % 3 else "unseen"
            name = f"scan {number}"
            masks.append(served.Measured(name, name, subset, structure, truth, estimate, interval, said))
    for subset in (served.ALL, "seen", "unseen"):
        found.append(served.Found(served.MAP, subset, "left", 0.4, 0.3, 0.2, 0.6, 0.5))
    pool = "development"
    return served.Result("2026-01-01", "a machine", "now", "balls", seed, pool, {}, tuple(masks), tuple(found))


def test_numbers_are_those_of_the_masks(served: ModuleType) -> None:
    measured = result(served)
    row = served.numbers(measured, "left", served.ALL)
    assert (row.n, row.mae, row.bias) == (12, pytest.approx(0.05), pytest.approx(0.05))
    assert row.spearman == pytest.approx(1) and row.regret == pytest.approx(0)
    assert row.constant == pytest.approx(np.abs(np.linspace(0.5, 0.9, 12) - 0.7).mean())
    assert row.covered == pytest.approx(0.75) and row.width == pytest.approx(0.175)
    assert row.size == pytest.approx(0) and row.rvd == pytest.approx(2 * row.constant)
    assert (row.missed_share, row.missed, row.included_half) == (0.4, 0.3, 0.5)
    assert served.numbers(measured, "left", "unseen").n == 4
    assert served.numbers(measured, served.WORST, served.ALL).missed is None
    masks = served.chosen(measured, "left", served.ALL)
    assert served.witness_scores(masks, served.SOFT).mae == 0
    assert served.regret(masks, served.ENTROPY) == pytest.approx(2)


def test_intervals_of_marked_masks_are_counted_apart(served: ModuleType) -> None:
    measured = result(served)
    before = served.numbers(measured, "left", served.ALL)
    assert (before.marked, before.marked_failed) == (None, None), "a result from before there were marks"
    unlike = {"scan 8", "scan 9", "scan 10"}
    marked = replace(measured, masks=tuple(replace(m, unlike=m.scan in unlike) for m in measured.masks))
    row = served.numbers(marked, "left", served.ALL)
    assert (row.marked, row.covered, row.marked_failed) == pytest.approx((3 / 12, 8 / 9, 2 / 3))
    assert row.mae == before.mae
    again = served.RESULT.validate_json(served.RESULT.dump_json(marked))
    assert again == marked


def test_seeds_are_averaged_where_all_have_a_number(served: ModuleType) -> None:
    one, other = (served.numbers(result(served, seed), "left", served.ALL) for seed in (0, 1))
    together = served.mean([one, replace(other, mae=0.15, missed=None)])
    assert together.mae == pytest.approx(0.1) and together.missed is None and together.n == 12


def test_tables_have_a_row_for_each_subset_and_each_witness(served: ModuleType) -> None:
    dice, others, *witnesses = served.tables([result(served, seed) for seed in (0, 1)])
    assert {row[:2] for row in dice.rows} == {
        (structure, subset) for structure in ("left", served.WORST) for subset in (served.ALL, "seen", "unseen")
    }
    assert {row[0] for row in others.rows} == {"left"}
    assert len(witnesses) == 2
    for table in witnesses:
        assert list(dict.fromkeys(row[0] for row in table.rows)) == [served.ALL, "unseen", "seen"]
        assert table.rows[-1][1] == "best constant"
        assert all(row[2] is None for row in table.rows if row[1] in served.ORDERS)


def test_the_report_card_and_strange_masks_stand_beside_the_pool(served: ModuleType) -> None:
    measured = result(served)
    ratio, order = (ConfidenceInterval(value, value - 0.2, value + 0.2, 0.9, 2000) for value in (0.8, 0.5))
    figures = Figures(
        true_dice=0.7,
        dice=BesideConstant(mae=0.04, constant_mae=0.05),
        ratio=ratio,
        spearman=order,
        regret=0.1,
        coverage=0.9,
    )
    report = StructureReport(structure="left", patients=15, scans=15, figures=figures)
    strange = served.Found(served.STRANGERS, served.ALL, "left", 0.4, 0.7, 0.2, 0.8, 0.5)
    measured = replace(measured, card=(report,), found=(*measured.found, strange))
    row = served.numbers(measured, "left", served.ALL)
    assert (row.missed, row.strange_missed, row.strange_included) == (0.3, 0.7, 0.8)
    (table,) = (t for t in served.tables([measured, result(served, 1)]) if t.name == "card")
    card, everything, *_ = table.rows
    assert card == (0, "left", "card", 15, 0.7, 0.8, pytest.approx(0.6), 1.0, 0.5, 0.3, 0.7)
    assert everything[2] == served.ALL and everything[5] == pytest.approx(row.mae / row.constant)
    assert served.RESULT.validate_json(served.RESULT.dump_json(measured)) == measured


@pytest.mark.parametrize("label", ["before", "error-logit"])
def test_the_docs_show_what_the_kept_results_give(served: ModuleType, label: str) -> None:
    shown = (BENCHMARKS.parent / "docs" / "measurements.md").read_text(encoding="utf-8")
    for results in served.kept(label, "development").values():
        dice, *_ = served.tables(results)
        assert served.to_markdown(dice).strip() in shown


def test_a_test_pool_is_measured_once_for_each_label(
    served: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "RESULTS", tmp_path)
    path = served.result_path("now", NAMES[0], 0, "test")
    path.write_bytes(served.RESULT.dump_json(replace(result(served), pool="test")))
    before = json.loads(path.read_bytes())
    with pytest.raises(SystemExit, match="new label"):
        served.run(NAMES[0], 0, "test", "now", tmp_path / "no data", tmp_path / "work")
    assert json.loads(path.read_bytes()) == before
    assert [r.pool for r in served.kept("now", "test")[NAMES[0]]] == ["test"]
    assert not served.kept("now", "development")
