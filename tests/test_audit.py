"""The label audit: who judges whose label, what is left out, and what the command prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from segqc.cli import main
from segqc.loop import error_maps
from segqc.loop.audit import audit
from segqc.loop.dataset import Dataset
from segqc.loop.jobs import run as run_job
from segqc.loop.requests import AuditRequest, AuditResult, enqueue
from segqc.networks.assessor import Assessor
from segqc.networks.model_file import ModelError
from segqc.networks.unet import MeanOfNetworks
from segqc.progress import NO_PROGRESS
from segqc.store import label_verdicts
from segqc.store.database import StoreError
from segqc.store.label_verdicts import AuditedLabel
from segqc.training.assessor_network import fit_assessor
from segqc.training.crossfit import MaskSet
from segqc.training.segmentation import plan_for
from segqc.training.spec import TrainingSettings
from segqc.volumes import write_labels
from tests.audit_kit import add_fold_models, fold_assessor
from tests.server_kit import STRUCTURES, draw_case, make_dataset
from tests.store_kit import ANNA, Steps

SEEN = (("scan_1", "scan_2"), ("scan_0", "scan_2"))


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[Dataset]:
    """Four final labels: one that the first network has not seen, one the second, one none, and one neither has."""
    path = make_dataset(tmp_path / "data", scans=5, finals=4)
    add_fold_models(path, SEEN)
    found = Dataset(path)
    yield found
    found.store.close()


def listed(dataset: Dataset) -> dict[str, AuditedLabel]:
    with dataset.store.read() as transaction:
        return {label.scan: label for label in label_verdicts.listing(transaction)}


# ------------------------------------------------------------------------------------------------- who has seen whom


def test_members_that_have_not_seen_a_patient_judge_as_one() -> None:
    assessor = fold_assessor((("a", "b"), ("b", "c"), ("a", "b")))
    members = assessor.network.members
    assert isinstance(assessor.network, MeanOfNetworks) and assessor.people is not None
    of_a, of_c = assessor.unseen_by("a"), assessor.unseen_by("c")
    assert of_a is not None and of_a.network is members[1] and of_a.card.members == 1
    assert of_a.people is not None and of_a.people.network is assessor.people.network.members[1]
    assert of_c is not None and [*of_c.network.members] == [members[0], members[2]] and of_c.card.seen == ("a", "b")
    assert of_c.card.members_seen == (("a", "b"), ("a", "b"))
    assert assessor.unseen_by("b") is None and assessor.unseen_by("d") is assessor
    assert of_a.version == assessor.version and of_a is assessor.unseen_by("a"), "it is made once"


def test_a_part_answers_as_its_networks_alone() -> None:
    scan, labels = draw_case(0)
    assessor = fold_assessor((("a",), ("b",)))
    part = assessor.unseen_by("b")
    assert part is not None and part.people is not None and assessor.people is not None
    alone = Assessor(replace(part.people.card), assessor.people.network.members[0])
    said = part.assess(scan, labels, scan_id="x", source="person")
    assert said.assessment.mask_kind == "person"
    np.testing.assert_array_equal(said.errors, alone.error_maps(scan, labels))


def test_without_a_record_every_member_has_seen_all() -> None:
    assessor = fold_assessor((("a",), ("b",)))
    forgetful = assessor.with_card(replace(assessor.card, members_seen=()))
    assert forgetful.unseen_by("a") is None and forgetful.unseen_by("c") is forgetful


def test_what_is_recorded_of_some_members_only_is_refused() -> None:
    card = fold_assessor((("a",), ("b",))).card
    with pytest.raises(ValueError, match="2 members, and what 1 of them have seen"):
        replace(card, members_seen=(("a",),))


def test_a_network_that_knows_its_people_s_part_has_seen_what_either_has() -> None:
    assessor = fold_assessor((("a",), ("b",)))
    people = assessor.card.people
    assert people is not None
    other = assessor.with_card(replace(assessor.card, people=replace(people, members_seen=(("c",), ("b",)))))
    assert other.unseen_by("c") is not None and other.unseen_by("c") is not other
    of_a = other.unseen_by("a")
    assert of_a is not None and of_a.card.members_seen == (("b",),), "a people's member began at SegQC-Net's"


def test_the_record_survives_a_file(tmp_path: Path) -> None:
    assessor = fold_assessor(SEEN)
    assessor.save(tmp_path / "segqc.pt")
    read = Assessor.load(tmp_path / "segqc.pt")
    assert read.card.members_seen == SEEN and read.version == assessor.version


def test_patients_that_choose_the_epoch_are_not_among_those_trained_from(dataset: Dataset, tmp_path: Path) -> None:
    cases = dataset.cases()[:3]
    settings = TrainingSettings(epochs=1, steps_per_epoch=1)
    sets = [MaskSet(case, np.asarray(draw_case(i)[1].array, np.uint8)[None], (1.0,)) for i, case in enumerate(cases)]
    plan = plan_for(cases, settings, in_channels=3, out_channels=2)
    made = fit_assessor("x", plan, sets[:2], sets[2:], STRUCTURES, settings, tmp_path / "work", NO_PROGRESS)
    trained = tuple(sorted(case.patient for case in cases[:2]))
    assert made.card.members_seen == (trained,) and set(made.card.seen) == {case.patient for case in cases}


# --------------------------------------------------------------------------------------------------------- the audit


def test_every_label_is_judged_by_networks_that_have_not_seen_its_patient(dataset: Dataset) -> None:
    steps = Steps()
    assert audit(dataset, steps) == AuditResult(judged=3, known=0, seen=1, failed={})
    found = listed(dataset)
    assert {scan: label.verdict and label.verdict.networks for scan, label in found.items()} == {
        "scan_0": 1, "scan_1": 1, "scan_3": 2, "scan_2": None,
    }  # fmt: skip
    assert found["scan_2"].message == "Not judged: every network has trained from this patient's labels."
    assert steps.seen[-1] == (4, 4, "judging labels")
    verdict = found["scan_0"].verdict
    assert verdict is not None and verdict.assessment.mask_kind == "person"
    kept = error_maps.read(dataset, found["scan_0"].label.id, 1, "audit-maps")
    assert kept is not None and kept.any()
    assert error_maps.read(dataset, found["scan_0"].label.id, 1) is None, "other maps are not by the same networks"


def test_a_single_network_says_what_would_judge(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data", scans=2, finals=1)
    add_fold_models(path, (("scan_0",),))
    dataset = Dataset(path)
    assert audit(dataset, NO_PROGRESS).seen == 1
    assert "with ensemble = true" in listed(dataset)["scan_0"].message


def test_it_goes_on_with_what_is_new(dataset: Dataset) -> None:
    audit(dataset, NO_PROGRESS)
    assert audit(dataset, NO_PROGRESS) == AuditResult(judged=0, known=3, seen=1, failed={})
    write_labels(draw_case(1)[1], dataset.folder / "labels" / "final" / "scan_0.nii.gz")
    write_labels(draw_case(4)[1], dataset.folder / "labels" / "final" / "scan_4.nii.gz")
    assert audit(dataset, NO_PROGRESS) == AuditResult(judged=2, known=2, seen=1, failed={})
    assert audit(dataset, NO_PROGRESS, force=True).judged == 4
    add_fold_models(dataset.folder, SEEN)
    assert audit(dataset, NO_PROGRESS).judged == 4, "another bundle judges all"


def test_a_scan_that_cannot_be_read_does_not_keep_the_others_from_it(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Dataset.read_scan

    def fails(self: Dataset, entry: object) -> object:
        if getattr(entry, "id", "") == "scan_1":
            raise OSError("the disk is gone")
        return read(self, entry)  # type: ignore[arg-type]

    monkeypatch.setattr(Dataset, "read_scan", fails)
    result = audit(dataset, NO_PROGRESS)
    assert (result.judged, result.failed) == (2, {"scan_1": "the disk is gone"})
    assert listed(dataset)["scan_1"].message == "Not judged: the disk is gone."
    monkeypatch.undo()
    assert audit(dataset, NO_PROGRESS).judged == 1


def test_it_is_a_job(dataset: Dataset) -> None:
    with dataset.store.write() as transaction:
        job = enqueue(transaction, AuditRequest(), ANNA)
    assert run_job(dataset, job, NO_PROGRESS) == AuditResult(judged=3, known=0, seen=1, failed={})


@pytest.mark.parametrize("has_models", [False, True])
def test_without_a_network_for_people_s_masks_it_says_what_to_do(tmp_path: Path, has_models: bool) -> None:
    path = make_dataset(tmp_path / "data", scans=1)
    if has_models:
        add_fold_models(path, (("a",),), people=False)
    with pytest.raises(ModelError, match=r"none for people's masks.*train it again" if has_models else "train one"):
        audit(Dataset(path), NO_PROGRESS)


# ------------------------------------------------------------------------------------------------------- the command


def run(*words: object) -> str:
    done = CliRunner().invoke(main.app, [str(w) for w in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_prints_the_table_and_marks(dataset: Dataset) -> None:
    folder = dataset.folder
    shown = run("audit", folder)
    assert "4 final labels, 0 marked right" in shown
    assert "every network has trained from this patient's labels" in shown and "not enough data" in shown
    assert (
        run("audit", folder, "--mark", "scan_0", "--mark", "scan_2") == "scan_0: marked right\nscan_2: marked right\n"
    )
    labels = json.loads(run("audit", folder, "--json"))["labels"]
    rows = {row["scan"]: row for row in labels}
    assert [rows[f"scan_{i}"]["marked right"] is not None for i in range(4)] == [True, False, True, False]
    assert rows["scan_3"]["networks"] == 2 and rows["scan_3"]["version"] > 0
    assert rows["scan_2"]["estimated Dice"] is None
    dice = [row["estimated Dice"] for row in labels][:3]
    assert dice == sorted(dice)
    assert run("audit", folder, "--csv").splitlines()[0].startswith("scan,structure,estimated Dice,estimated Dice low")
    assert run("audit", folder, "--unmark", "scan_0") == "scan_0: the mark is removed\n"
    mark = listed(dataset)["scan_2"].mark
    assert mark is not None and mark.actor.identified_by == "command" and listed(dataset)["scan_0"].mark is None


def test_a_mark_of_what_has_no_label_changes_nothing(dataset: Dataset) -> None:
    with pytest.raises(StoreError, match="'scan_4' has no final label that trains"):
        run("audit", dataset.folder, "--mark", "scan_0", "--mark", "scan_4")
    assert listed(dataset)["scan_0"].mark is None
