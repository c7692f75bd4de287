"""The network for people's masks: what it learns from, and when there is none."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from segqc.networks.assessor import AssessmentSettings
from segqc.quality.boxes import BoxSettings
from segqc.quality.calibration import MapCalibration
from segqc.split import PatientSplit
from segqc.training import people
from segqc.training.assessor import train_assessor
from segqc.training.assessor_calibration import FOUND_IN_RIGHT, _Unseen, with_maps
from segqc.training.assessor_network import assessor_job, mask_examples
from segqc.training.cases import Case, EarlierLabel, read_case
from segqc.training.crossfit import MaskSet
from segqc.training.patches import PatchDataset, centred
from segqc.training.people import MASKS, people_sets
from segqc.training.segmentation import plan_for
from segqc.types import LabelArray
from segqc.volumes import Volume, write_labels
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


# ------------------------------------------------------------------------------------------- other labels of the scans


def truth_of(case: Case) -> LabelArray:
    return np.asarray(read_case(case, (1,))[1].array, np.uint8)


def written(case: Case, labels: LabelArray, name: str) -> Path:
    path = case.labels.with_name(f"{case.id}-{name}.nii.gz")
    write_labels(Volume(labels, read_case(case, (1,))[1].affine), path)
    return path


def narrower(case: Case) -> LabelArray:
    """The ball without a part of its rim."""
    truth = truth_of(case)
    return truth & np.roll(truth, 1, axis=0)


def read_by_another(case: Case) -> Case:
    return replace(case, observers=(written(case, narrower(case), "observer"),))


def test_what_an_observer_says_is_no_error_and_has_no_loss(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 2)
    alone, read = people_sets([cases[0], read_by_another(cases[1])], STRUCTURES, seed=0, count=8)
    truth, observer = truth_of(cases[1]), narrower(cases[1])
    differ = truth != observer
    assert not alone.observers and 0 < differ.sum() < truth.sum()
    np.testing.assert_array_equal(read.observers[0], observer)
    (chosen,) = people_sets([replace(cases[1], observers=(cases[1].labels,))], STRUCTURES, seed=0, count=1)
    assert not chosen.observers, "the reader whose label counts is no other one"
    (strict,) = people_sets(cases[1:], STRUCTURES, seed=0, count=8)
    np.testing.assert_array_equal(read.masks, strict.masks)
    assert all(a >= b for a, b in zip(read.dice, strict.dice, strict=True)) and read.dice != strict.dice

    plan = plan_for(cases, QUICK, in_channels=2, out_channels=1)
    plan = replace(plan, spacing_mm=(1.0, 1.0, 2.0))  # the scans' own: what is ignored is exactly this
    examples = mask_examples([alone, read], (1,), plan)
    assert all(example.ignored is None for example in examples[:8])
    for example in examples[8:]:
        assert example.ignored is not None
        np.testing.assert_array_equal(np.sort(example.ignored, axis=None), np.sort(differ, axis=None))
    assert mask_examples([replace(read, observers=(truth,))], (1,), plan)[0].ignored is None, "they agree"

    job = assessor_job("people", plan, examples[:8], examples[8:], STRUCTURES, QUICK)
    patch = torch.utils.data.default_collate([centred(examples[8], plan.patch, ignoring=True)])
    given, target = job.prepare(patch)
    predicted = torch.zeros_like(target, requires_grad=True)
    job.loss(predicted, target).backward()  # type: ignore[no-untyped-call]
    assert predicted.grad is not None
    np.testing.assert_array_equal(predicted.grad.numpy() == 0, patch["ignored"].numpy() > 0)
    batch = torch.utils.data.default_collate([PatchDataset(examples, plan, QUICK)[draw] for draw in range(12)])
    assert set(np.unique(batch["ignored"])) == {0, 1} and len(given) == 1


def test_masks_are_calibrated_against_what_some_observer_says(tmp_path: Path) -> None:
    (case,) = make_cases(tmp_path, 1)
    scan, truth = read_case(case, (1,))
    observer, mask = narrower(case), narrower(case)
    mask[np.nonzero(mask)[0][0], np.nonzero(mask)[1][0], np.nonzero(mask)[2][0]] = 0  # and one voxel that is nobody's
    judge: Any = SimpleNamespace(structures=STRUCTURES, map_metrics=lambda *_: [None])
    errors = np.ones((1, *mask.shape), np.float32)
    for observers, wrong in (((), int((mask != truth.array).sum())), ((observer,), 1)):
        look = _Unseen(judge, case, scan, truth, [None], observers)
        (known,), (counts,) = look.at(mask, errors), look.errors(mask, errors)
        dice = known.true.dice
        assert dice is not None
        assert sum(counts.false_positive.wrong) + sum(counts.false_negative.wrong) == wrong
        assert dice == pytest.approx(1 - wrong / (2 * mask.sum() + wrong))


def test_labels_that_somebody_corrected_train_where_a_person_drew_all_of_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (case,) = make_cases(tmp_path, 1)
    truth, drawn = truth_of(case), narrower(case)
    by_network, in_part = np.roll(truth, 2, axis=1), drawn.copy()
    in_part[..., 1] = by_network[..., 1]
    foreign = np.where(drawn > 0, 7, 0).astype(np.uint8)
    network = written(case, by_network, "network")
    kept = {
        "drawn": EarlierLabel(written(case, drawn, "drawn")),
        "all slices corrected": EarlierLabel(written(case, np.roll(truth, 1, axis=1), "all"), network),
    }
    others = {
        "a network's slice": EarlierLabel(written(case, in_part, "part"), network),
        "the truth": EarlierLabel(written(case, truth, "truth")),
        "something else": EarlierLabel(written(case, 1 - truth, "else")),
        "another structure": EarlierLabel(written(case, foreign, "foreign")),
        "gone": EarlierLabel(tmp_path / "gone.nii.gz"),
    }
    case = replace(case, earlier=(*others.values(), *kept.values()))
    with caplog.at_level(logging.WARNING):
        (made,) = people_sets([case], STRUCTURES, seed=0, count=8, corrected=8)
    assert sum("trains without one of its other labels" in line for line in caplog.messages) == 2
    (generated,) = people_sets([case], STRUCTURES, seed=0, count=8)
    np.testing.assert_array_equal(made.masks[:8], generated.masks)
    found = {mask.tobytes() for mask in made.masks[8:]}
    assert found == {drawn.tobytes(), np.roll(truth, 1, axis=1).tobytes()} and len(made.masks) == 10
    one = [people_sets([case], STRUCTURES, seed=seed, count=8, corrected=1)[0] for seed in (0, 0, 1, 2, 3, 4)]
    np.testing.assert_array_equal(one[0].masks, one[1].masks)
    assert all(len(made.masks) == 9 for made in one)
    assert {made.masks[8].tobytes() for made in one} == found, "which one is drawn"


def test_they_are_few_and_no_validating_patients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases, said, seen = make_cases(tmp_path, 6), Recorded(), list[tuple[Sequence[MaskSet], Sequence[MaskSet]]]()
    moved = [EarlierLabel(written(c, np.roll(truth_of(c), 1, axis=1), "earlier")) for c in cases]
    further = [replace(read_by_another(c), earlier=(moved[i],)) for i, c in enumerate(cases)]
    splits = in_folds(cases, 2) | {cases[i].patient: PatientSplit(i % 2, "validation") for i in (4, 5)}
    fit = people.fit_assessor

    def noting(name: str, plan: Any, train: Any, validation: Any, *rest: Any, **more: Any) -> Any:
        seen.append((train, validation))
        return fit(name, plan, train, validation, *rest, **more)

    monkeypatch.setattr(people, "fit_assessor", noting)
    given = [*further[:3], cases[3], further[4], cases[5]]  # of those that validate, one was read by another
    trained = train_assessor(given, STRUCTURES, splits, replace(QUICK, ensemble=True), tmp_path / "t", said)
    assert trained.people is not None and trained.people.card.members == 2
    (line,) = [text for text in said.messages if text.startswith("The network for people's masks")]
    assert "learns from 3 labels that somebody has corrected" in line and "people's labels of 4 scans differ" in line
    for train, validation in seen:
        assert {s.case.patient for s in validation} == {cases[4].patient, cases[5].patient}
        assert all(len(s.masks) == 8 + bool(s.case.earlier) for s in train)
        of_validating = [np.roll(truth_of(cases[i]), 1, axis=1) for i in (4, 5)]
        assert not any(np.array_equal(mask, m) for s in validation for mask in s.masks for m in of_validating)
