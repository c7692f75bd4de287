"""The network for people's masks: what it learns from, and when there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from segqc.networks.assessor import AssessmentSettings
from segqc.quality.boxes import BoxSettings
from segqc.quality.calibration import MapCalibration
from segqc.split import PatientSplit
from segqc.training.assessor import train_assessor
from segqc.training.assessor_calibration import FOUND_IN_RIGHT, with_maps
from segqc.training.cases import Case, read_case
from segqc.training.people import MASKS, people_sets
from tests.test_training import QUICK, STRUCTURES, NoProgress, Recorded, make_cases


def in_folds(cases: Sequence[Case], folds: int) -> dict[str, PatientSplit]:
    return {c.patient: PatientSplit(i % folds, "train") for i, c in enumerate(cases)}


def test_masks_are_a_function_of_case_and_seed_and_some_are_the_truth(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 3)
    whole = [cases[0], replace(cases[1], slices=(0,)), cases[2]]
    sets = people_sets(whole, STRUCTURES, seed=0)
    assert [s.case.id for s in sets] == [cases[0].id, cases[2].id], "of a part nobody knows what is right"
    (alone,) = people_sets(cases[2:], STRUCTURES, seed=0)
    np.testing.assert_array_equal(alone.masks, sets[1].masks)
    (other,) = people_sets(cases[2:], STRUCTURES, seed=1)
    assert not np.array_equal(other.masks, alone.masks) and len(alone.masks) == MASKS
    truth = read_case(cases[2], (1,))[1].array
    assert 0 < sum(np.array_equal(mask, truth) for mask in alone.masks) < MASKS
    assert [dice == 1 for dice in alone.dice] == [np.array_equal(mask, truth) for mask in alone.masks]


@pytest.mark.parametrize("ensemble", [False, True])
def test_each_member_has_seen_whom_segqc_s_has_seen(tmp_path: Path, ensemble: bool) -> None:
    cases = make_cases(tmp_path, 6)
    trained = train_assessor(
        cases, STRUCTURES, in_folds(cases, 2), replace(QUICK, ensemble=ensemble), tmp_path / "t", NoProgress()
    )
    assert trained.people is not None and trained.people.card.plan.mask_skip
    assert trained.people.card.members == trained.card.members == (2 if ensemble else 1)
    assert trained.people.card.members_seen == trained.card.members_seen
    report = trained.people.card.report
    if ensemble:  # the patients of each fold calibrate
        calibration = trained.people.card.calibration[0]
        assert set(calibration.kinds) == {"person"}
        least = calibration.of("person").least_evidence
        assert least is not None
        settings = AssessmentSettings(boxes=BoxSettings(min_area_mm2=0.0))
        right = 0
        for case in cases:
            scan, truth = read_case(case, (1,))
            judge = trained.unseen_by(case.patient)
            assert judge is not None
            told = judge.with_settings(settings).assess(scan, truth, scan_id=case.id, source="person")
            right += not told.assessment.structures[0].raw.boxes
        assert len(cases) - right <= FOUND_IN_RIGHT * len(cases), "of right masks"
        assert report is not None and report.worst.patients == len(cases) < report.worst.scans
    else:  # nobody validates
        assert report is None


def test_without_epochs_for_it_there_is_none_and_maps_may_be_calibrated_anew_beside_one(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 4)
    splits = in_folds(cases, 2)
    without = train_assessor(cases, STRUCTURES, splits, replace(QUICK, people_epochs=0), tmp_path / "t", NoProgress())
    assert without.people is None and without.judge_of("person") is without
    trained = train_assessor(cases, STRUCTURES, splits, QUICK, tmp_path / "u", NoProgress())
    again = with_maps(trained, (MapCalibration(scale=2.0),))
    assert again.card.map_calibration[0].scale == 2.0
    assert again.people is not None and again.card.people == trained.card.people


def test_without_whole_cases_in_a_fold_there_is_one_or_a_sentence(tmp_path: Path) -> None:
    cases, said = make_cases(tmp_path, 6), Recorded()
    splits = in_folds(cases, 2)
    in_part = [replace(c, slices=(0, 1, 2)) if splits[c.patient].fold == 1 else c for c in cases]
    settings = replace(QUICK, ensemble=True)
    trained = train_assessor(in_part, STRUCTURES, splits, settings, tmp_path / "t", said)
    assert trained.people is None and trained.card.members == 2
    assert any(text.startswith("No network for people's masks") for text in said.messages)
    in_part[1] = cases[1]
    again = train_assessor(in_part, STRUCTURES, splits, settings, tmp_path / "u", NoProgress())
    assert again.people is not None and again.people.card.members == 2
