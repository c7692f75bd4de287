"""The corrections experiment: masks that people corrected, of a dataset folder or two folders, and simulated ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from segqc.evaluation.data import mask_sources
from segqc.evaluation.data.cohort import CohortError
from segqc.evaluation.data.mask_sources import Manifest, check_masks, correction_masks
from segqc.evaluation.data.run import NETWORKS, Run
from segqc.evaluation.data.settings import EvaluationSettings
from segqc.evaluation.experiments.comparison import experiment_masks
from segqc.loop.dataset import Dataset
from segqc.loop.submission import submit_label
from segqc.store.leases import LeaseRules
from segqc.training import NoProgress
from segqc.volumes import Volume, read_labels, write_labels
from tests.server_kit import draw_case
from tests.test_evaluation import make_folders, write_dataset
from tests.test_recalibration import ANNA, AUDIT, WORST, correct
from tests.test_recalibration import dataset as dataset
from tests.test_recalibration import judged as judged


def corrected(run: Run) -> Manifest:
    manifest = correction_masks(run, NoProgress())
    check_masks(run, manifest)
    return manifest


@pytest.mark.parametrize(("rules", "selection"), [(WORST, "worst-first"), (AUDIT, "random")])
def test_corrections_of_people_are_found_and_how_they_were_chosen(
    dataset: Dataset, tmp_path: Path, rules: LeaseRules, selection: str
) -> None:
    done = correct(dataset, rules, 12)
    run = Run.open(tmp_path / "run", dataset.folder, {}, EvaluationSettings())
    tested = {c.id for c in run.cohort.test}
    manifest = corrected(run)
    assert (manifest.corrections, manifest.selection) == ("real", selection)
    assert {m.case for m in manifest.masks} == tested <= set(done)
    for known in experiment_masks(run, "corrections"):
        truth = draw_case(int(known.id.split("-")[0].removeprefix("scan_")))[1].array
        assert (known.truth.array == truth).all()
        assert (known.assessed.labels.array == np.roll(truth, 2, axis=0)).all(), "the mask that was handed out"
        assert known.assessed.source is None


def test_a_final_label_that_was_drawn_anew_since_is_no_correction(dataset: Dataset, tmp_path: Path) -> None:
    correct(dataset, AUDIT, 12)
    run = Run.open(tmp_path / "run", dataset.folder, {}, EvaluationSettings())
    first, *others = sorted(c.id for c in run.cohort.test)
    truth = draw_case(int(first.removeprefix("scan_")))[1]
    submit_label(dataset, first, Volume(np.roll(truth.array, 1, axis=1), truth.affine), "final", ANNA)
    manifest = corrected(Run.open(tmp_path / "other", dataset.folder, {}, EvaluationSettings()))
    assert {m.case for m in manifest.masks} == set(others)
    with pytest.raises(CohortError, match=f"the label of scan {first} has changed"):
        Run.open(tmp_path / "run", dataset.folder, {}, EvaluationSettings()).cohort  # noqa: B018 a property


def test_masks_of_another_folder_are_the_start_of_corrections(tmp_path: Path) -> None:
    data = write_dataset(make_folders(tmp_path / "data"), [f"s{i}" for i in range(10)])
    masks = tmp_path / "masks"
    masks.mkdir()
    run = Run.open(tmp_path / "run", data, {"ball": (1,)}, EvaluationSettings(), masks)
    with pytest.raises(CohortError, match="no label file is named as one of the 3 test scans"):
        corrected(run)
    case = run.cohort.test[0]
    truth = read_labels(case.labels)
    write_labels(Volume(np.roll(truth.array, 1, axis=0), truth.affine), masks / f"{case.id}.nii.gz")
    manifest = corrected(run)
    assert [m.case for m in manifest.masks] == [case.id]
    assert (manifest.corrections, manifest.selection, manifest.after_training) == ("real", "all", False)
    late = Run.open(tmp_path / "late", data, {"ball": (1,)}, EvaluationSettings(), masks)
    (late.folder / NETWORKS / "segqc" / "fold-0").mkdir(parents=True)
    assert corrected(late) == replace(manifest, after_training=True)
    write_labels(truth, mask_sources.test_mask_path(run, manifest.masks[0]))
    with pytest.raises(CohortError, match="is not the mask of the manifest"):
        check_masks(run, manifest)
