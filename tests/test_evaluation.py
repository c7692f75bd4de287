"""The evaluation's steps: splits without leaks, fixed masks, numbers that agree with their definition."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from segqc.cli import main
from segqc.evaluation.data import predictions
from segqc.evaluation.data.cohort import CohortError, read_labelled, split
from segqc.evaluation.data.mask_sources import calibrating_sources, simulated_correction, with_other_pooling
from segqc.evaluation.data.predictions import KnownMask, boxes_of, find_truths, map_counts, predict
from segqc.evaluation.data.run import Run
from segqc.evaluation.data.settings import EvaluationSettings
from segqc.evaluation.evaluate import MAKE_MASKS, evaluate, observer_experiment
from segqc.evaluation.experiments.comparison import RESULTS, error_scores_of_scans, error_scores_of_slices, manifest_of
from segqc.evaluation.experiments.observers import ObserverSettings
from segqc.evaluation.methods.estimates import AssessedMask, Estimate, estimate_from_error_map
from segqc.evaluation.methods.registry import SCAN_ONLY, SEGQC, TTA, methods, trainings
from segqc.loop.dataset import DatasetError
from segqc.networks.plan import plan_network
from segqc.networks.unet import build_network
from segqc.quality.boxes import BoxSettings
from segqc.quality.error_maps import ExtractionSettings, difference, extract_errors
from segqc.quality.metrics import METRIC_NAMES, EmptyRule, true_metrics
from segqc.text import slug
from segqc.training import NoProgress
from segqc.types import Structure
from segqc.volumes import Volume, read_labels, write_labels, write_scan
from tests.test_observers import write_readings

BALL = (Structure("ball", (1,)),)
NO_BAND = ExtractionSettings(band_mm=0.0, min_component_mm2=0.0)
SETTINGS = EvaluationSettings(extraction=NO_BAND, boxes=BoxSettings(min_area_mm2=0.0, min_distance_voxels=0.0))


def write_dataset(folder: Path, patients: Sequence[str], split: dict[str, list[str]] | None = None) -> Path:
    for i, name in enumerate(patients):
        rng = np.random.default_rng(i)
        labels = np.zeros((12, 12, 4), np.uint8)
        labels[3:9, 3:9, 1:3] = 1
        write_scan(
            Volume(rng.normal(size=labels.shape).astype(np.float32), np.eye(4)), folder / f"images/{name}.nii.gz"
        )
        write_labels(Volume(labels, np.eye(4)), folder / f"labels/{name}.nii.gz")
    if split is not None:
        (folder / "splits.json").write_text(json.dumps(split))
    return folder


def make_folders(folder: Path) -> Path:
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    return folder


def test_a_cohort_keeps_the_patients_apart_and_is_a_function_of_the_seed(tmp_path: Path) -> None:
    scans = [f"p{i}_{phase}" for i in range(12) for phase in ("a", "b")]
    train, test = [f"p{i}" for i in range(8)], [f"p{i}" for i in range(8, 12)]
    data = write_dataset(make_folders(tmp_path), scans, {"train_patients": train, "test_patients": test})
    cohort = split(read_labelled(data, {"ball": (1,)}), folds=3, seed=4, test_share=0.3)
    assert {c.patient for c in cohort.train} == set(train)
    assert {c.patient for c in cohort.test} == set(test)
    for fold in range(3):
        held, trained = ({c.patient for c in side(fold)} for side in (cohort.held, cohort.trained))
        assert held and not held & trained and held | trained == set(train)
    assert cohort == split(read_labelled(data, {"ball": (1,)}), folds=3, seed=4, test_share=0.3)
    assert cohort.fold != split(read_labelled(data, {"ball": (1,)}), folds=3, seed=5, test_share=0.3).fold


def test_a_cohort_without_a_split_is_split_by_patient_and_finds_its_structures(tmp_path: Path) -> None:
    data = write_dataset(make_folders(tmp_path), [f"s{i}" for i in range(10)])
    cohort = split(read_labelled(data, {}), folds=2, seed=0, test_share=0.3)
    assert len(cohort.test) == 3
    assert not {c.patient for c in cohort.test} & {c.patient for c in cohort.train}
    assert cohort.structures == (Structure("label 1", (1,)),)
    fewer = split(read_labelled(data, {}), folds=2, seed=0, test_share=0.3, max_cases=6)
    assert {c.id for c in fewer.train} < {c.id for c in cohort.train}


def test_too_few_patients_or_one_on_both_sides_are_refused(tmp_path: Path) -> None:
    few = write_dataset(make_folders(tmp_path / "few"), ["a", "b", "c", "d"])
    with pytest.raises(CohortError, match=r"at least 6 patients to train on and of 2 to test with, found 2 and 2"):
        split(read_labelled(few, {}), folds=2, seed=0, test_share=0.5)
    names = [f"s{i}" for i in range(8)]
    both = write_dataset(make_folders(tmp_path / "both"), names, {"train": names, "test": names[:2]})
    with pytest.raises(DatasetError, match="patient s0 is in train and in test"):
        split(read_labelled(both, {}), folds=2, seed=0, test_share=0.5)


def test_a_run_folder_keeps_to_its_settings(tmp_path: Path) -> None:
    data = write_dataset(make_folders(tmp_path / "data"), [f"s{i}" for i in range(10)])
    run = Run.open(tmp_path / "run", data, {}, EvaluationSettings())
    assert Run.open(tmp_path / "run", data, {}, EvaluationSettings(workers=7)).cohort == run.cohort
    with pytest.raises(CohortError, match="other data or settings"):
        Run.open(tmp_path / "run", data, {}, EvaluationSettings(seed=1))


def test_a_run_that_is_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    names = [f"s{i}" for i in range(10)]
    data = write_dataset(make_folders(tmp_path / "data"), names)
    both = write_dataset(make_folders(tmp_path / "both"), names, {"train": names, "test": names[:2]})
    few = write_dataset(make_folders(tmp_path / "few"), names[:3])
    (tmp_path / "empty").mkdir()
    for folder, structures, settings, masks in (
        (both, {}, EvaluationSettings(), None),
        (few, {}, EvaluationSettings(), None),
        (tmp_path / "empty", {}, EvaluationSettings(), None),
        (tmp_path / "missing", {}, EvaluationSettings(), None),
        (data, {"ball": (1,), "cube": (7,)}, EvaluationSettings(), None),
        (data, {"cube": (7,)}, EvaluationSettings(), None),
        (data, {}, EvaluationSettings(folds=9), None),
        (data, {}, EvaluationSettings(group_pattern="("), None),
        (data, {}, EvaluationSettings(), tmp_path / "missing"),
    ):
        with pytest.raises((CohortError, DatasetError)):
            Run.open(tmp_path / "run" / "deep", folder, structures, settings, masks)
        assert not (tmp_path / "run").exists()
    Run.open(tmp_path / "run" / "deep", data, {"ball": (1,)}, EvaluationSettings())
    assert {path.name for path in (tmp_path / "run" / "deep").iterdir()} == {"run.json", "split.json"}


def test_a_run_is_held_to_the_labels_that_it_began_with(tmp_path: Path) -> None:
    data = write_dataset(make_folders(tmp_path / "data"), [f"s{i}" for i in range(10)])
    begun = Run.open(tmp_path / "run", data, {}, EvaluationSettings()).cohort
    write_dataset(data, [*(f"s{i}" for i in range(10)), "s_late"])
    again = Run.open(tmp_path / "run", data, {}, EvaluationSettings()).cohort
    assert again == begun, "a scan that was labelled later changes nothing"
    label = next(c.labels for c in begun.train)
    content = read_labels(label)
    write_labels(Volume(np.roll(content.array, 1, axis=0), content.affine), label)
    with pytest.raises(CohortError, match="has changed since this evaluation began; restore it"):
        Run.open(tmp_path / "run", data, {}, EvaluationSettings()).cohort  # noqa: B018 a property
    label.unlink()
    with pytest.raises(CohortError, match="is gone since"):
        Run.open(tmp_path / "run", data, {}, EvaluationSettings()).cohort  # noqa: B018


def test_a_scan_belongs_to_the_longest_name_of_the_split_and_to_one_side_only(tmp_path: Path) -> None:
    train = [f"p{i}" for i in range(1, 7)] + ["p2_b"]
    split_file = {"train": train, "test": ["p1_late", "p8", "p9"]}
    scans = [*(f"p{i}" for i in range(1, 10)), "p1_late", "p1_late_2", "p1_early", "p2_b", "p2_b_2", "p10"]
    data = write_dataset(make_folders(tmp_path / "data"), scans, split_file)
    cohort = split(read_labelled(data, {}), folds=3, seed=0, test_share=0.3)
    of = {side: {c.id: c.patient for c in cases} for side, cases in (("train", cohort.train), ("test", cohort.test))}
    assert of["test"] == {"p1_late": "p1_late", "p1_late_2": "p1_late", "p8": "p8", "p9": "p9"}
    assert of["train"]["p1_early"] == "p1" and of["train"]["p2_b_2"] == "p2_b"
    assert set(of["train"]) == {*(f"p{i}" for i in range(1, 7)), "p1_early", "p2_b", "p2_b_2"}
    assert len(cohort.train) == len(of["train"]), "no scan twice"


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.0, 6.0)])
def test_the_other_pooling_is_another_network_that_runs(spacing: tuple[float, float, float]) -> None:
    import torch

    plan = plan_network(spacing, (32, 32, 10), in_channels=1, out_channels=2)
    other = with_other_pooling(plan)
    assert other.strides != plan.strides
    x = torch.zeros(1, 1, *other.patch)
    assert build_network(other)(x).shape == (1, 2, *other.patch)


def test_a_simulated_annotator_corrects_errors_and_leaves_the_contour_alone() -> None:
    truth = np.zeros((40, 40, 6), np.uint8)
    truth[10:30, 10:30, 1:5] = 1
    mask = truth.copy()
    mask[29, 10:30, 1:5] = 0  # a voxel of the contour
    mask[:, :, 2] = 0  # a missing slice
    scan = Volume(np.zeros(truth.shape, np.float32), np.diag([1.0, 1.0, 4.0, 1.0]))
    settings = ExtractionSettings(band_mm=2.0, min_component_mm2=20.0)
    corrected = simulated_correction(mask, truth, scan, settings)
    assert (corrected[:, :, 2] == truth[:, :, 2]).all()
    assert not corrected[29, :, 1].any()
    # what is left is what extraction calls variability
    left = difference(corrected == 1, truth == 1)
    assert not (left & extract_errors(difference(mask == 1, truth == 1), mask == 1, 2, (1, 1, 4), settings)).any()


class Oracle:
    """Knows the truth."""

    name = "oracle"

    def __init__(self, truth: dict[int, np.ndarray]) -> None:
        self.truth = truth

    def estimate(self, mask: AssessedMask) -> tuple[Estimate, ...]:
        wrong = (BALL[0].mask(mask.labels.array) != BALL[0].mask(self.truth[id(mask.scan)])).astype(np.float32)
        empty = EmptyRule(0.0, 1.0)
        return (estimate_from_error_map(BALL[0].mask(mask.labels.array), wrong, 2, empty),)


def known_masks() -> list[KnownMask]:
    masks = []
    for i in range(3):
        truth, mask = np.zeros((2, 14, 14, 4 + i), np.uint8)
        truth[3:9, 3:9, 1:3] = 1
        mask[3 + i : 9, 3:9, 1:3] = 1
        # thick slices: the third axis is the through-plane axis
        affine = np.diag([1.0, 1.0, 5.0, 1.0])
        scan = Volume(np.zeros(truth.shape, np.float32), affine)
        known = AssessedMask(scan, Volume(mask, affine), None)
        masks.append(KnownMask(f"m{i}", f"p{i}", known, Volume(truth, affine)))
    return masks


def test_an_oracle_is_judged_perfect_in_every_number(tmp_path: Path) -> None:
    masks = known_masks()
    oracle = Oracle({id(m.assessed.scan): m.truth.array for m in masks})
    truths = find_truths(masks, BALL, SETTINGS)
    predicted = predict(masks, oracle, BALL, replace(SETTINGS, box_thresholds=(0.5,)), {})
    for column in ("metrics", "slices"):
        np.testing.assert_allclose(getattr(predicted, column), getattr(truths, column), atol=1e-9)
    assert truths.mask_of.tolist() == [0] * 4 + [1] * 5 + [2] * 6
    assert truths.slice_patients[4] == "p1"
    expected = true_metrics(BALL[0].mask(masks[2].assessed.labels.array), BALL[0].mask(masks[2].truth.array))
    assert truths.metrics[2, 0].tolist() == [getattr(expected, name) for name in METRIC_NAMES]
    # boxes: two slices of the two masks that are wrong
    for kind in (predictions.RAW, predictions.EXTRACTED):
        found, true = (boxes_of(x.boxes, 3, 0, kind) for x in (predicted, truths))
        assert found == true
        assert [len(boxes) for boxes in true] == [0, 2, 2]
    assert [c.both.dice(0.5) for c in map_counts(predicted.counts, 0)][1:] == [1.0, 1.0]
    np.testing.assert_allclose(
        predicted.slice_error_score[:, 0], (truths.voxels[:, 0, :2].sum(axis=1) - 2 * truths.voxels[:, 0, 2])
    )
    predictions.save(tmp_path / "predictions.npz", predicted)
    predictions.save(tmp_path / "truths.npz", truths)
    again, truths_again = (
        predictions.load_predictions(tmp_path / "predictions.npz"),
        predictions.load_truths(tmp_path / "truths.npz"),
    )
    assert all(
        np.array_equal(getattr(predicted, f), getattr(again, f), equal_nan=True) for f in predicted.__dataclass_fields__
    )
    assert truths_again.masks == truths.masks and truths_again.patients == truths.patients


def test_slices_are_ordered_by_shares_of_their_scan_and_scans_by_their_dice() -> None:
    masks = known_masks()
    truths = find_truths(masks, BALL, SETTINGS)
    oracle = predict(masks, Oracle({id(m.assessed.scan): m.truth.array for m in masks}), BALL, SETTINGS, {})
    # without a map and an estimated truth, as softmax entropy is
    blind = replace(oracle, slice_truth=np.full_like(oracle.slice_truth, np.nan), counts=oracle.counts[:0])
    predicted = {SEGQC: oracle, SCAN_ONLY: oracle, TTA: blind}
    scans, slices = error_scores_of_scans(predicted, 0), error_scores_of_slices(predicted, truths, 0)
    assert set(scans) == {SEGQC, f"{SEGQC}, error sum", SCAN_ONLY, f"{SCAN_ONLY}, error sum", TTA, f"{TTA} entropy"}
    assert set(slices) == {*scans, f"{SCAN_ONLY}-EE"}
    np.testing.assert_allclose(scans[SEGQC], -truths.metrics[:, 0, 0])
    errors = oracle.slice_error_score[:, 0]
    in_mask, in_truth, _ = truths.voxels[:, 0].T
    whole = np.array([np.sum((in_mask + in_truth)[truths.mask_of == m]) for m in truths.mask_of])
    mask_twice = np.array([2 * np.sum(in_mask[truths.mask_of == m]) for m in truths.mask_of])
    assert len(set(whole)) == 3 and not np.array_equal(whole, mask_twice)
    np.testing.assert_allclose(slices[SEGQC], errors / whole)
    np.testing.assert_allclose(slices[TTA], errors / mask_twice)
    np.testing.assert_allclose(slices[f"{SCAN_ONLY}-EE"], oracle.slice_error_score_extracted[:, 0] / whole)
    for plain in (f"{SEGQC}, error sum", f"{TTA} entropy"):
        np.testing.assert_array_equal(slices[plain], errors)


def tiny(workers: int = 1) -> EvaluationSettings:
    """Networks that have hardly trained, masks by one training: every step of an evaluation, in seconds."""
    quick = EvaluationSettings().quick()
    short = replace(quick.segmenter, epochs=2, fold_epochs=2, steps_per_epoch=1, batch=1, patch=(16, 16, 8))
    assessor = replace(short, scan_only_share=0.5, average_flips=True, hide_mask=True)
    return replace(
        quick, test_sources=1, source_epochs=2, segmenter=short, assessor=assessor, per_bin=2, draws=50, workers=workers
    )


def evaluate_tiny(data: Path, folder: Path, workers: int) -> None:
    evaluate(Run.open(folder, data, {}, tiny(workers)), tuple(MAKE_MASKS), NoProgress(), ablations=True)


@pytest.mark.server
def test_a_killed_evaluation_goes_on_where_it_was_and_ends_with_the_same_numbers(tmp_path: Path) -> None:
    data = write_dataset(make_folders(tmp_path / "data"), [f"s{i}" for i in range(10)])
    evaluate_tiny(data, tmp_path / "straight", 1)
    killed = tmp_path / "killed"
    process = get_context("spawn").Process(target=evaluate_tiny, args=(data, killed, 2))
    process.start()
    reached = killed / "networks" / "segqc" / "fold-1.pt"
    while not reached.is_file() and process.is_alive():
        time.sleep(0.05)
    workers = [int(pid) for pid in children_of(process.pid)]
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it was killed in mid-work"
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.05)
    assert not list((killed / "results").glob("*")), "nothing is called a result"
    first = reached.stat().st_mtime_ns
    evaluate_tiny(data, killed, 1)
    assert reached.stat().st_mtime_ns == first, "what was done is not done again"
    one, other = (
        RESULTS.validate_json((f / "results" / "stratified-ablations.json").read_bytes())
        for f in (tmp_path / "straight", killed)
    )
    assert replace(one, seconds={}) == replace(other, seconds={})
    assert set(one.seconds) == set(methods(ablations=True))
    assert not any(
        manifest_of(Run.open(killed, data, {}, tiny()), experiment).after_training for experiment in MAKE_MASKS
    )


def children_of(pid: int | None) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.parametrize(("sources", "masks"), [(2, 2), (3, 3), (6, 3)])
def test_calibrating_masks_are_of_all_epochs_in_turn(sources: int, masks: int) -> None:
    chosen = [calibrating_sources(sources, number) for number in range(2 * (sources - 1))]
    assert all(c[0] == 0 and len(set(c)) == masks for c in chosen)
    counts = np.bincount([m for c in chosen for m in c[1:]], minlength=sources)
    assert counts[0] == 0 and len(set(counts[1:].tolist())) == 1


def test_all_networks_can_look_through_a_smaller_window() -> None:
    usual = EvaluationSettings()
    cropped = usual.with_patch((64, 80, 10))
    assert cropped.segmenter.patch == cropped.assessor.patch == (64, 80, 10)
    assert cropped.segmenter.patch != usual.segmenter.patch
    assert cropped.quick().segmenter.patch == cropped.with_length(0.5).assessor.patch == (64, 80, 10)


def test_a_senseless_window_is_refused_and_nothing_is_begun(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["evaluate", "stratified", str(tmp_path), "--patch", "64", "0", "10", "--out", str(out)]
    done = CliRunner().invoke(main.app, words)
    assert done.exit_code != 0
    assert "three numbers of voxels, at least 1 each, got (64, 0, 10)" in done.output + str(done.exception)
    assert not out.exists()


def test_all_trainings_can_be_shorter_and_none_becomes_nothing() -> None:
    whole, half, least = (
        EvaluationSettings(),
        EvaluationSettings().with_length(0.5),
        EvaluationSettings().with_length(0.01),
    )
    assert whole.with_length(1.0) == whole
    assert half.assessor.epochs == whole.assessor.epochs // 2 and half.segmenter.epochs == whole.segmenter.epochs // 2
    assert half.source_epochs == whole.source_epochs // 2
    assert least.segmenter.fold_epochs == least.source_epochs == 2


def test_two_experts_are_studied_once_and_kept(tmp_path: Path) -> None:
    data = write_dataset(make_folders(tmp_path / "data"), [f"s{i}" for i in range(10)])
    run = Run.open(tmp_path / "run", data, {}, EvaluationSettings())
    experts = tmp_path / "experts"
    with pytest.raises(CohortError, match="no such folder"):
        observer_experiment(run, experts, NoProgress())
    experts.mkdir()
    with pytest.raises(CohortError, match="of two experts"):
        observer_experiment(run, experts, NoProgress())
    write_readings(experts, 4)
    (experts / "labels.txt").write_text("1 ball\n")
    experiment = observer_experiment(run, experts, NoProgress())
    for path in experts.iterdir():
        path.unlink()
    assert observer_experiment(run, experts, NoProgress()) == experiment
    assert experiment.settings == ObserverSettings() and len(experiment.held) == 2


def test_method_names_make_different_files_and_every_learnt_method_has_a_training_per_fold(tmp_path: Path) -> None:
    names = methods(ablations=True)
    assert len({slug(name) for name in names}) == len(names)
    data = write_dataset(make_folders(tmp_path / "data"), [f"s{i}" for i in range(10)])
    run = Run.open(tmp_path / "run", data, {}, EvaluationSettings(folds=2))
    assert {t.fold for t in trainings(run, ablations=False)} == {0, 1}
    assert {t.method for t in trainings(run, ablations=True)} <= set(names)
