"""Trainings that begin where the last one ended: only at weights that may be begun at, and resumed exactly."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from segqc.networks.plan import plan_network
from segqc.networks.segmenter import Segmenter
from segqc.split import PatientSplit
from segqc.training import NoProgress, TrainingSettings, engine
from segqc.training.assessor import train_assessor
from segqc.training.cases import Case
from segqc.training.crossfit import train_fold
from segqc.training.segmentation import PseudoCases, plan_for, train_segmentation
from segqc.training.warm_start import Lineage, NoStartError, Origin, Start, check_start
from segqc.types import Structure
from tests.test_training import QUICK, STRUCTURES, KillAt, KilledError, Recorded, make_cases

WARM = replace(QUICK, start="warm")
CONTINUES = "begins at the weights of the last training"
ANEW = "begins anew"


def spread(cases: Sequence[Case]) -> dict[str, PatientSplit]:
    """Two folds in turn; the last patient of each four validates."""
    return {c.patient: PatientSplit(i % 2, "validation" if i % 4 == 3 else "train") for i, c in enumerate(cases)}


def segmenter(
    cases: Sequence[Case],
    folder: Path,
    settings: TrainingSettings = WARM,
    progress: NoProgress | None = None,
    structures: Sequence[Structure] = STRUCTURES,
    pseudo: PseudoCases | None = None,
) -> Segmenter:
    return train_segmentation(
        cases, structures, spread(cases), settings, folder, progress or NoProgress(), pseudo or PseudoCases()
    )


def fold_network(
    fold: int,
    cases: Sequence[Case],
    folder: Path,
    settings: TrainingSettings = WARM,
    progress: NoProgress | None = None,
) -> list[Segmenter]:
    plan = plan_for(cases, settings, in_channels=1, out_channels=2)
    return train_fold(fold, cases, STRUCTURES, spread(cases), plan, settings, folder, progress or NoProgress())


def first_weights(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The weights that each training begins at, as they come."""
    begun = list[dict[str, torch.Tensor]]()
    create = engine._Training.__init__

    def noting(training: engine._Training, job: engine.Job, start: Start | None) -> None:
        create(training, job, start)
        begun.append({name: tensor.detach().clone() for name, tensor in training.network.state_dict().items()})

    monkeypatch.setattr(engine._Training, "__init__", noting)
    return begun


def trainings(monkeypatch: pytest.MonkeyPatch) -> list[engine._Training]:
    """The trainings that begin, as they come."""
    begun = list[engine._Training]()
    create = engine._begun

    def noting(job: engine.Job, checkpoint: object, progress: NoProgress) -> engine._Training:
        begun.append(create(job, checkpoint, progress))  # type: ignore[arg-type]
        return begun[-1]

    monkeypatch.setattr(engine, "_begun", noting)
    return begun


def is_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_it_begins_at_the_last_weights_and_has_seen_what_these_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = make_cases(tmp_path, 8)
    first = segmenter(cases[:4], tmp_path / "t", QUICK)
    begun, told = first_weights(monkeypatch), Recorded()
    second = segmenter(cases[2:], tmp_path / "t", WARM, told)
    assert is_same(begun[-1], first.network.state_dict())
    assert any(CONTINUES in message for message in told.messages)
    assert second.version != first.version
    assert set(second.card.seen) == {c.patient for c in cases}, "labels that are gone by now have been seen"
    assert set(segmenter(cases[2:], tmp_path / "other", QUICK).card.seen) == {c.patient for c in cases[2:]}


def test_by_default_each_training_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = make_cases(tmp_path, 6)
    segmenter(cases[:4], tmp_path / "t", QUICK)
    begun = first_weights(monkeypatch)
    again = segmenter(cases, tmp_path / "t", QUICK)
    segmenter(cases, tmp_path / "new", QUICK)
    assert is_same(*begun)
    assert set(again.card.seen) == {c.patient for c in cases}
    assert TrainingSettings().start == "scratch"


def test_without_an_earlier_training_it_begins_anew(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 4)
    warm, scratch = segmenter(cases, tmp_path / "warm"), segmenter(cases, tmp_path / "scratch", QUICK)
    assert warm.version == scratch.version


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_a_killed_training_resumes_exactly_wherever_it_began(tmp_path: Path, steps: int) -> None:
    cases = make_cases(tmp_path, 6)
    segmenter(cases[:4], tmp_path / "a", QUICK)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    straight = segmenter(cases, tmp_path / "a")
    with pytest.raises(KilledError):
        segmenter(cases, tmp_path / "b", WARM, KillAt(steps, "segmentation"))
    assert segmenter(cases, tmp_path / "b").version == straight.version
    # what ended is returned, and not trained once more from its own end
    assert segmenter(cases, tmp_path / "b", WARM, KillAt(2, "segmentation")).version == straight.version


def test_a_training_that_did_not_end_is_begun_at_by_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = make_cases(tmp_path, 8)
    first = segmenter(cases[:4], tmp_path / "t", QUICK)
    with pytest.raises(KilledError):
        segmenter(cases[:6], tmp_path / "t", WARM, KillAt(4, "segmentation"))
    begun = first_weights(monkeypatch)
    third = segmenter([*cases[:4], *cases[6:]], tmp_path / "t")
    assert is_same(begun[-1], first.network.state_dict()), "the last one that came to its end"
    assert set(third.card.seen) == {c.patient for c in (*cases[:4], *cases[6:])}
    with pytest.raises(KilledError):
        segmenter(cases[:6], tmp_path / "new", WARM, KillAt(4, "segmentation"))
    told = Recorded()
    segmenter(cases, tmp_path / "new", WARM, told)
    assert any("begins anew, as the last training did not come to its end" in message for message in told.messages)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"size": "medium"}, "the plan of the networks has changed"),
        ({"seed": 1}, "the seed or the length of the trainings has changed"),
    ],
)
def test_other_networks_are_begun_anew_with_a_message(tmp_path: Path, other: dict[str, object], reason: str) -> None:
    cases = make_cases(tmp_path, 4)
    segmenter(cases, tmp_path / "t", QUICK)
    told = Recorded()
    settings = replace(WARM, epochs=1, **other)  # type: ignore[arg-type]
    segmenter(cases, tmp_path / "t", settings, told)
    assert f"segmentation: {ANEW}, as {reason}." in told.messages


def test_other_structures_are_begun_anew(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 4)
    segmenter(cases, tmp_path / "t", QUICK)
    told = Recorded()
    segmenter(cases, tmp_path / "t", WARM, told, (Structure("ball", (1,)), Structure("other", (2,))))
    assert any(ANEW in message for message in told.messages)
    # a structure that is only called otherwise is the same
    segmenter(cases, tmp_path / "u", QUICK)
    named = Recorded()
    segmenter(cases[:3], tmp_path / "u", replace(WARM, min_cases=3), named, (Structure("sphere", (1,)),))
    assert any(CONTINUES in message for message in named.messages)


def test_a_damaged_checkpoint_is_no_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = make_cases(tmp_path, 4)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "checkpoint.pt").write_bytes(b"no checkpoint")
    assert segmenter(cases, tmp_path / "t").version == segmenter(cases, tmp_path / "u").version
    assert "unreadable checkpoint" in caplog.text


# ------------------------------------------------------------------------------------------------------------ leaks


def test_a_fold_network_begins_at_that_of_its_fold_only_and_never_saw_a_held_out_patient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = make_cases(tmp_path, 10)
    before = {fold: fold_network(fold, cases[:6], tmp_path / "t", QUICK) for fold in (0, 1)}
    begun, splits = first_weights(monkeypatch), spread(cases)
    for fold in (0, 1):
        told = Recorded()
        networks = fold_network(fold, cases, tmp_path / "t", WARM, told)
        assert any(CONTINUES in message for message in told.messages)
        assert is_same(begun[-1], before[fold][0].network.state_dict())
        assert not is_same(begun[-1], before[1 - fold][0].network.state_dict())
        held = {patient for patient, split in splits.items() if split.fold == fold or split.split == "validation"}
        for network in networks:
            assert not held & set(network.card.seen)


def test_weights_that_have_seen_a_held_out_patient_are_never_begun_at(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 8)
    fold_network(0, cases, tmp_path / "t", QUICK)
    # as if somebody had exchanged the folders of the folds
    shutil.copytree(tmp_path / "t" / "fold-0", tmp_path / "t" / "fold-1")
    told = Recorded()
    networks = fold_network(1, cases, tmp_path / "t", WARM, told)
    assert any("begins anew, as the last one has seen the patient 'p1'" in message for message in told.messages)
    anew = fold_network(1, cases, tmp_path / "new", WARM)
    assert [network.version for network in networks] == [network.version for network in anew]


def test_a_patient_stays_seen_through_several_trainings(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 8)
    for some in (cases[:4], cases[2:6], cases[4:]):
        last = segmenter(some, tmp_path / "t")
    assert set(last.card.seen) == {c.patient for c in cases}
    # what the makers of pseudo-labels have seen is passed on, too
    pseudo = PseudoCases((), ("somebody else",))
    segmenter(cases[:4], tmp_path / "p", QUICK, pseudo=pseudo)
    assert "somebody else" in segmenter(cases[:5], tmp_path / "p").card.seen


def test_masks_of_early_epochs_stay_those_of_the_first_training(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 8)
    first = fold_network(0, cases[:6], tmp_path / "t", QUICK)
    second = fold_network(0, cases, tmp_path / "t")
    assert len(first) == len(second) > 1
    for before, after in zip(first[1:], second[1:], strict=True):
        assert is_same(before.network.state_dict(), after.network.state_dict()), "later ones are too good to learn from"
    assert not is_same(first[0].network.state_dict(), second[0].network.state_dict())
    third = Recorded()
    fold_network(0, cases, tmp_path / "t", replace(WARM, fold_epochs=9), third)
    assert any("the seed or the length of the trainings has changed" in message for message in third.messages)


PLAN = plan_network((1.0, 1.0, 2.0), (64, 64, 24), in_channels=1, out_channels=2)
ORIGIN = Origin(plan=PLAN, outputs="classes [1]", seed=0, variant="", snapshots=(1,))
START = Start(weights={}, seen=("a", "b"), snapshots={})


@pytest.mark.parametrize(
    ("now", "unseen", "is_allowed"),
    [
        (ORIGIN, (), True),
        (ORIGIN, ("c",), True),
        (ORIGIN, ("b", "c"), False),
        (replace(ORIGIN, plan=replace(PLAN, patch=(32, 32, 8))), (), True),
        (replace(ORIGIN, plan=replace(PLAN, spacing_mm=(1.05, 1.05, 2.1))), (), True),
        (replace(ORIGIN, plan=replace(PLAN, spacing_mm=(1.0, 1.0, 3.0))), (), False),
        (replace(ORIGIN, plan=replace(PLAN, filters=(8, 16, 32))), (), False),
        (replace(ORIGIN, outputs="classes [1, 2]"), (), False),
        (replace(ORIGIN, variant="another network"), (), False),
        (replace(ORIGIN, snapshots=(1, 2)), (), False),
    ],
)
def test_where_a_training_may_begin(now: Origin, unseen: tuple[str, ...], is_allowed: bool) -> None:
    lineage = Lineage(outputs=now.outputs, seen=("d",), unseen=unseen)
    if is_allowed:
        check_start(ORIGIN, START, now, lineage)
        return
    with pytest.raises(NoStartError):
        check_start(ORIGIN, START, now, lineage)


# --------------------------------------------------------------------------------------------------------- SegQC-Net


def test_segqc_nets_begin_at_those_of_their_folds_and_resume_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = make_cases(tmp_path, 6)
    settings = replace(WARM, ensemble=True, epochs=2, people_epochs=1, scan_only_share=0.5)

    def train(some: Sequence[Case], folder: Path, progress: NoProgress) -> str:
        made = train_assessor(some, STRUCTURES, spread(cases), settings, folder, progress)
        assert {case.patient for case in some} <= set(made.card.seen)
        return made.version

    begun = trainings(monkeypatch)
    train(cases[:4], tmp_path / "a", NoProgress())
    assert [training.scan_only_epochs for training in begun[2:4]] == [1, 1], "those for people's masks come after"
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    told = Recorded()
    straight = train(cases, tmp_path / "a", told)
    assert [training.scan_only_epochs for training in begun[8:10]] == [0, 0], "they know the task"
    assert sum(CONTINUES in message for message in told.messages) == 4, "two folds' networks, two SegQC-Nets"
    for work, step in (("network for masks, fold 2", 3), ("SegQC-Net 1", 3), ("SegQC-Net 2", 1), ("calibration", 1)):
        with pytest.raises(KilledError):
            train(cases, tmp_path / "b", KillAt(step, work))
    assert train(cases, tmp_path / "b", NoProgress()) == straight
    # a SegQC-Net of another fold has seen whom this one calibrates on
    for name in ("checkpoint.pt", "curve.json"):
        shutil.copyfile(tmp_path / "a" / "member-0" / name, tmp_path / "a" / "member-1" / name)
    told = Recorded()
    train(cases[:5], tmp_path / "a", told)
    assert any("SegQC-Net 2 of 2: begins anew" in message for message in told.messages)
