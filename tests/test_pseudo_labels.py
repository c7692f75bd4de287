"""Pseudo-labels: which masks are accepted, how they train, and what becomes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss
from monai.networks import one_hot
from scipy.stats import binom

from segqc.quality.pseudo_labels import (
    AuditBound,
    Candidate,
    PseudoLabelMode,
    PseudoLabelRules,
    audit_bound,
    choose_pseudo_labels,
)
from segqc.settings import SettingsError, load_settings
from segqc.training import NoProgress, TrainingSettings
from segqc.training.cases import Case, CaseError, Example, load_example
from segqc.training.patches import PatchDataset
from segqc.training.segmentation import NO_PSEUDO_CASES, PseudoCases, plan_for, segmentation_job, train_segmentation
from segqc.types import PredictionInterval
from segqc.volumes import Volume, read_labels, write_labels
from tests.test_training import QUICK, STRUCTURES, make_cases, placed

# ------------------------------------------------------------------------------------------------------------- choice


def candidate(scan: str, low: float, **others: object) -> Candidate:
    waiting = Candidate(scan, "train", dice=low + 0.05, interval=PredictionInterval(low, 1.0, 0.9))
    return replace(waiting, **others)  # type: ignore[arg-type]


def accepted(candidates: list[Candidate], supervised: int = 100, **rules: object) -> list[str]:
    chosen = choose_pseudo_labels(candidates, PseudoLabelRules(**rules), supervised=supervised)  # type: ignore[arg-type]
    names = [scan.scan for scan in chosen.accepted]
    assert rules["mode"] == "off" or {c.scan for c in candidates} == {*names, *chosen.refused}, "each has its answer"
    return names


FIVE = [candidate(name, low) for name, low in zip("abcde", (0.5, 0.9, 0.75, 0.74, 0.9), strict=True)]


@pytest.mark.parametrize(("mode", "names"), [("off", ""), ("threshold", "bec"), ("top", "be"), ("full", "becda")])
def test_the_best_come_first_and_ties_go_by_name(mode: PseudoLabelMode, names: str) -> None:
    assert accepted(FIVE[::-1], mode=mode) == [*names]


def test_masks_that_are_expected_to_be_bad_are_not_among_the_best() -> None:
    three = [candidate(name, low) for name, low in zip("abc", (0.1, 0.2, 0.9), strict=True)]
    three = [replace(scan, dice=dice) for scan, dice in zip(three, (0.2, 0.74, 0.95), strict=True)]
    assert accepted(three, mode="top", top_share=1.0) == ["c"]
    assert accepted(three, mode="top", top_share=1.0, min_dice=0.7) == ["c", "b"]
    assert accepted(three, mode="full") == ["c", "b", "a"]


def test_the_cap_is_relative_to_the_labelled_scans() -> None:
    assert accepted(FIVE, mode="full", supervised=2) == ["b", "e", "c"], "by default half as many again"
    assert accepted(FIVE, mode="full", cap=0.1, supervised=30) == ["b", "e", "c"], "without an error of rounding"
    assert accepted(FIVE, mode="full", supervised=0) == []


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({"split": "validation"}, "its patient validates"),
        ({"dice": None, "interval": None}, "it has no estimate by the serving bundle"),
        ({"is_served": False}, "its mask is not the serving network's"),
        ({"interval": None}, "its estimate has no interval"),
        ({"interval": PredictionInterval(0.9, 1.0, 0.9, applies=False)}, "it is unlike the training scans"),
    ],
)
@pytest.mark.parametrize("mode", ["threshold", "top", "full"])
def test_what_cannot_be_trusted_is_never_accepted(
    mode: PseudoLabelMode, others: dict[str, object], reason: str
) -> None:
    scans = [candidate("a", 0.9, **others), candidate("b", 0.8)]
    choice = choose_pseudo_labels(scans, PseudoLabelRules(mode=mode, top_share=1.0), supervised=10)
    assert [scan.scan for scan in choice.accepted] == ["b"]
    assert choice.refused == {"a": reason}


@pytest.mark.parametrize("bad", ["mode = 'on'", "min_dice = 2", "audit_share = -1", "cap = -1", "seed = -1", "mod = 1"])
def test_settings_that_cannot_be_meant_are_named(tmp_path: Path, bad: str) -> None:
    (tmp_path / "segqc.toml").write_text(f"[pseudo_labels]\n{bad}\n")
    with pytest.raises(SettingsError, match=r"segqc.toml: .*pseudo_labels"):
        load_settings(tmp_path)


def test_by_default_there_are_none(tmp_path: Path) -> None:
    assert load_settings(tmp_path).pseudo_labels == PseudoLabelRules()
    assert PseudoLabelRules().mode == "off"


def test_the_bound_of_the_audits_is_the_exact_one() -> None:
    for audited, bad in ((1, 0), (20, 0), (20, 1), (59, 0), (100, 7)):
        said = audit_bound([0.5] * bad + [0.9] * (audited - bad), 0.75)
        assert (said.audited, said.bad) == (audited, bad)
        assert binom.cdf(bad, audited, said.bound) == pytest.approx(0.05), "as few are bad in 5% of the draws"
    assert audit_bound([], 0.75) == AuditBound(0, 0, 1.0)
    assert audit_bound([0.1, 0.2], 0.75) == AuditBound(2, 2, 1.0)
    assert audit_bound([0.75], 0.75).bad == 0, "a mask at the threshold is good"


def test_each_scan_is_drawn_once_for_an_audit() -> None:
    rules = PseudoLabelRules(audit_share=0.2)
    drawn = [scan for scan in range(500) if rules.is_audited(scan)]
    assert drawn == [scan for scan in range(500) if rules.is_audited(scan)]
    assert 70 < len(drawn) < 130
    assert drawn != [scan for scan in range(500) if replace(rules, seed=1).is_audited(scan)]


# ----------------------------------------------------------------------------------------------------------- training


def with_ignored(case: Case, part: slice) -> tuple[Case, Volume]:
    """The case as a pseudo-label of a weight of 0.9, a part of which is left out of the loss."""
    labels = read_labels(case.labels)
    array = np.zeros(labels.array.shape, np.uint8)
    array[part] = 1
    path = case.labels.with_name(f"{case.id}-ignored.nii.gz")
    write_labels(Volume(array, labels.affine), path)
    return replace(case, weight=0.9, ignored=path), Volume(array, labels.affine)


def test_ignored_voxels_have_no_part_in_the_loss(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 2)
    pseudo, ignored = with_ignored(cases[1], slice(6, 9))
    plan = plan_for(cases, QUICK, in_channels=1, out_channels=2)
    examples = [load_example(case, plan, (1,)) for case in (cases[0], pseudo)]
    assert [example.weight for example in examples] == [1.0, 0.9]
    assert examples[1].ignored is not None
    assert examples[1].ignored.sum() == ignored.array.sum() > 0
    job = segmentation_job("s", plan, (1,), examples, [], QUICK, epochs=1)
    truths = torch.from_numpy(np.stack([e.truth for e in examples]).astype(np.float32))[:, None]
    left_out = torch.from_numpy(np.stack([np.zeros_like(examples[0].truth), examples[1].ignored]))[:, None].float()
    _, classes = job.prepare({"image": truths, "truth": truths, "ignored": left_out})
    predicted = torch.randn(2, 2, *examples[0].truth.shape, generator=torch.manual_seed(0), requires_grad=True)
    loss = job.loss(predicted, classes)
    loss.backward()
    assert predicted.grad is not None
    out = left_out.expand(-1, 2, -1, -1, -1) > 0
    assert not predicted.grad[out].any()
    assert predicted.grad[~out].all(), "all others have a part"
    # what the label is where it is ignored changes nothing
    other = torch.where(left_out > 0, 1 - truths, truths)
    _, changed = job.prepare({"image": truths, "truth": other, "ignored": left_out})
    assert torch.equal(job.loss(predicted, changed), loss)
    # and the loss is that of the voxels that are left: of their cross-entropy, with all voxels in the denominator
    soft, onehot = predicted.softmax(dim=1), one_hot(truths, 2)
    kept = (~out).float()
    entropy = -(onehot * predicted.log_softmax(dim=1) * kept).sum() / truths.numel()
    foreground, truth = (soft * kept)[:, 1], (onehot * kept)[:, 1]
    dice = (2 * (foreground * truth).sum() + 1e-5) / (foreground.sum() + truth.sum() + 1e-5)
    assert float(loss.detach()) == pytest.approx(float((1 - dice + entropy).detach()), abs=1e-5)


def test_without_ignored_voxels_the_loss_is_the_plain_one(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 1)
    plan = plan_for(cases, QUICK, in_channels=1, out_channels=2)
    examples = [load_example(cases[0], plan, (1,))]
    truths = torch.from_numpy(examples[0].truth.astype(np.float32))[None, None]
    predicted = torch.randn(1, 2, *examples[0].truth.shape, generator=torch.manual_seed(0))
    plain = DiceCELoss(softmax=True, include_background=False, batch=True)(predicted, one_hot(truths, 2))
    losses = []
    for ignored in (None, np.zeros_like(examples[0].truth)):
        job = segmentation_job("s", plan, (1,), [replace(examples[0], ignored=ignored)], [], QUICK, epochs=1)
        losses.append(job.loss(predicted, job.prepare({"image": truths, "truth": truths})[1]))
    assert torch.equal(losses[0], plain)
    assert torch.equal(losses[1], plain)


def test_ignored_voxels_move_with_the_patch() -> None:
    rng = np.random.default_rng(0)
    truth = np.zeros((16, 16, 4), np.uint8)
    truth[4:12, 4:12] = 1
    image = rng.normal(size=truth.shape).astype(np.float32)
    pseudo = Example("pseudo", image, truth, weight=0.5, ignored=truth)
    plan = plan_for_shape(truth.shape)
    patches = PatchDataset([Example("final", image, truth), pseudo], plan, replace(QUICK, flips=True))
    of_pseudo = 0
    for draw in range(60):
        patch = patches[draw]
        of_pseudo += bool(patch["ignored"].any())
        assert torch.equal(patch["ignored"], patch["truth"]) or not patch["ignored"].any()
    assert 10 <= of_pseudo <= 30, "half as often as a final label"
    assert "ignored" not in PatchDataset([Example("final", image, truth)], plan, QUICK)[0]


def plan_for_shape(shape: tuple[int, int, int]) -> object:
    from segqc.networks.plan import plan_network

    return plan_network((1.0, 1.0, 1.0), shape, in_channels=1, out_channels=2, patch=shape)


def test_pseudo_labels_train_and_their_patients_and_makers_count_as_seen(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 7)
    splits = placed(cases)
    labelled = cases[:5]
    waiting = next(c for c in cases[5:] if splits[c.patient].split == "train")
    pseudo, _ = with_ignored(waiting, slice(0, 4))
    settings: TrainingSettings = replace(QUICK, epochs=1)

    def trained(folder: str, with_pseudo: PseudoCases = NO_PSEUDO_CASES) -> tuple[str, tuple[str, ...], object]:
        made = train_segmentation(labelled, STRUCTURES, splits, settings, tmp_path / folder, NoProgress(), with_pseudo)
        return made.version, made.card.seen, made.card.plan

    alone, seen, plan = trained("a")
    together, seen_too, plan_too = trained("b", PseudoCases((pseudo,), ("p-of-the-maker",)))
    assert together != alone
    assert {*seen_too} - {*seen} == {pseudo.patient, "p-of-the-maker"}
    assert plan_too == plan
    assert trained("c", PseudoCases((pseudo,), ("p-of-the-maker",)))[0] == together, "the same every time"
    validating = next(c for c in cases if splits[c.patient].split == "validation")
    with pytest.raises(ValueError, match="validating patient"):
        trained("d", PseudoCases((validating,)))
    pseudo.ignored.write_bytes(b"")  # type: ignore[union-attr]
    with pytest.raises(CaseError, match=pseudo.id):
        trained("e", PseudoCases((pseudo,)))
