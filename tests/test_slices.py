"""Labels of which a part was checked: what a submission adds to that, and what trains, validates and calibrates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from segqc.cli.main import app
from segqc.evaluation.data.cohort import read_labelled
from segqc.loop.dataset import Dataset
from segqc.loop.readers import inter_rater, make_consensus
from segqc.loop.submission import LabelMovedOnError, Opened, submit_label
from segqc.loop.training import train
from segqc.networks.plan import plan_network
from segqc.selection import segqc as worst_first
from segqc.store import corrections, labels, leases
from segqc.store.database import StoreError
from segqc.store.leases import LeaseRules
from segqc.store.records import Actor, LabelRecord, LeaseRecord, ScanState
from segqc.training import NoProgress, TrainingSettings
from segqc.training.assessor import train_assessor
from segqc.training.assessor_network import assessor_job
from segqc.training.cases import Case, CaseError, load_example, load_masked_examples
from segqc.training.crossfit import masks_file, masks_of, train_mask_sources
from segqc.training.patches import PatchDataset
from segqc.training.segmentation import counted, plan_for, train_segmentation
from segqc.types import Structure
from segqc.volumes import (
    AffineArray,
    Volume,
    canonical_frame,
    read_labels,
    read_scan,
    through_plane_axis,
    to_native,
    write_labels,
    write_scan,
)
from segqc.volumes.slices import all_but, unchanged
from tests.server_kit import CONFIG, SHAPE, assess, draw_case, make_dataset
from tests.store_kit import ANNA, BERT
from tests.test_training import ALONE, QUICK, STRUCTURES, make_cases, placed

SLICES = LeaseRules(audit_share=0.0, validation_share=0.0, slices=3)
BALL = Structure("ball", (1,))


# ------------------------------------------------------------------------------------------------------- submissions


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Three scans with the empty mask of a network: every slice of a truth is another one."""
    made = Dataset(make_dataset(tmp_path / "studies", scans=3, finals=0, config=f"{CONFIG}validation_share = 0.0\n"))
    for i in range(3):
        assess(made, f"scan_{i}", 0.4 + i / 10, mask=Volume(np.zeros(SHAPE, np.uint8), draw_case(i)[1].affine))
    return made


def hand_out(dataset: Dataset, actor: Actor = ANNA, rules: LeaseRules = SLICES) -> LeaseRecord:
    with dataset.store.write() as transaction:
        lease = leases.acquire(transaction, actor, "segqc", worst_first.order, replace(rules, repeat_seconds=0))
    assert lease is not None
    return lease


def corrected(scan: str, slices: tuple[int, ...], start: Volume | None = None) -> Volume:
    """A label map with the truth in some slices."""
    truth = draw_case(int(scan.removeprefix("scan_")))[1]
    before = np.zeros_like(truth.array) if start is None else start.array
    return Volume(np.where(all_but(SHAPE, slices, 2) > 0, before, truth.array), truth.affine)


def final(dataset: Dataset, scan: str) -> LabelRecord:
    with dataset.store.read() as transaction:
        found = labels.current(transaction, scan, "final")
    assert found is not None
    return found


def reopen(dataset: Dataset, scan: str) -> Volume:
    dataset.store.review(scan, "unlabelled", BERT)
    with dataset.store.read() as transaction:
        start = labels.start_of(transaction, scan)
    assert start is not None
    return read_labels(dataset.store.label_file(start))


def test_what_was_asked_for_and_what_was_changed_counts_as_checked(dataset: Dataset) -> None:
    lease = hand_out(dataset)
    assert (lease.scan, lease.slices) == ("scan_0", (2, 8, 9)), "slice 2 is the worst, the others by their number"
    end = corrected("scan_0", (2, 5))
    done = submit_label(dataset, "scan_0", end, "final", ANNA)
    assert done.label.checked_slices == (2, 5, 8, 9)
    (case,) = dataset.cases()
    assert case.slices == (2, 5, 8, 9)
    assert not case.is_whole
    with dataset.store.read() as transaction:
        (correction,) = corrections.listing(transaction)
    assert correction.change.opened_slices == (2, 5, 8, 9)
    assert len(correction.change.structures[0].slices) == 4
    # the client missed the answer
    again = submit_label(dataset, "scan_0", end, "final", ANNA)
    assert (again.label.id, again.correction) == (done.label.id, None)
    # and has found another error
    more = submit_label(dataset, "scan_0", corrected("scan_0", (2, 4, 5)), "final", ANNA)
    assert more.label.checked_slices == (2, 4, 5, 8, 9)
    # somebody else sends a label of which nobody says that it is of a part
    assert submit_label(dataset, "scan_0", end, "final", BERT).label.checked_slices is None
    assert dataset.cases()[0].is_whole


def test_what_a_client_says_to_have_opened_counts(dataset: Dataset) -> None:
    hand_out(dataset)
    done = submit_label(dataset, "scan_0", corrected("scan_0", (2, 5)), "final", ANNA, opened=Opened((5, 1, 5)))
    assert done.label.checked_slices == (1, 5)
    all_slices = Opened(tuple(range(SHAPE[2])))
    whole = submit_label(dataset, "scan_0", corrected("scan_0", (2,)), "final", ANNA, opened=all_slices)
    assert whole.label.checked_slices is None


def test_without_a_lease_a_submission_adds_to_the_final_label(dataset: Dataset) -> None:
    for opened, checked in (((3,), (3,)), ((7, 1), (1, 3, 7)), ((3,), (1, 3, 7))):
        end = corrected("scan_1", checked)
        assert (
            submit_label(dataset, "scan_1", end, "final", BERT, opened=Opened(opened)).label.checked_slices == checked
        )
    assert submit_label(dataset, "scan_2", corrected("scan_2", (1,)), "final", BERT).label.checked_slices is None
    part = submit_label(dataset, "scan_2", corrected("scan_2", (1,)), "final", BERT, opened=Opened((1,)))
    assert part.label.checked_slices is None, "all of it was checked before"


def test_the_next_correction_of_a_reopened_label_adds_its_slices(dataset: Dataset) -> None:
    hand_out(dataset)
    submit_label(dataset, "scan_0", corrected("scan_0", (2, 8, 9)), "final", ANNA)
    start = reopen(dataset, "scan_0")
    lease = hand_out(dataset, BERT)
    while lease.scan != "scan_0":
        lease = hand_out(dataset, BERT)
    assert lease.slices is None, "all of it is asked for"
    end = corrected("scan_0", (5, 6), start)
    done = submit_label(dataset, "scan_0", end, "final", BERT, opened=Opened((5, 6, 7)))
    assert done.label.checked_slices == (2, 5, 6, 7, 8, 9)
    start = reopen(dataset, "scan_0")
    while hand_out(dataset, BERT).scan != "scan_0":
        pass
    assert submit_label(dataset, "scan_0", start, "final", BERT).label.checked_slices is None


@pytest.mark.parametrize("opened", [None, (2, 5)])
def test_slices_do_not_take_the_place_of_a_label_that_came_meanwhile(
    dataset: Dataset, opened: tuple[int, ...] | None
) -> None:
    """Somebody uploads a label, of the whole scan or of other slices, while another one has its slices."""
    assert hand_out(dataset).slices == (2, 8, 9)
    by_bert = submit_label(dataset, "scan_0", draw_case(0)[1], "final", BERT, opened=Opened(opened)).label
    with pytest.raises(LabelMovedOnError, match=f"version {by_bert.id} came after .* handed out, made by bert, who"):
        submit_label(dataset, "scan_0", corrected("scan_0", (2,)), "final", ANNA)
    assert final(dataset, "scan_0") == by_bert
    assert [case.slices for case in dataset.cases()] == [opened]
    with dataset.store.read() as transaction:
        assert corrections.listing(transaction) == []
    end = corrected("scan_0", (2,))
    assert submit_label(dataset, "scan_0", end, "version_1", ANNA).label.tag == "version_1"
    assert final(dataset, "scan_0") == by_bert
    every = Opened(tuple(range(SHAPE[2])))
    assert submit_label(dataset, "scan_0", end, "final", ANNA, opened=every).correction is not None


@pytest.mark.parametrize(("state", "checked"), [("rejected", (5,)), ("unlabelled", (2, 5, 8, 9))])
def test_what_was_checked_of_a_rejected_label_does_not_count_any_more(
    dataset: Dataset, state: ScanState, checked: tuple[int, ...]
) -> None:
    hand_out(dataset)
    submit_label(dataset, "scan_0", corrected("scan_0", (2, 8, 9)), "final", ANNA)
    dataset.store.review("scan_0", state, BERT, "the pole is missing")
    with dataset.store.read() as transaction:
        start = labels.start_of(transaction, "scan_0")
    assert start is not None
    lease = hand_out(dataset, BERT)
    while lease.scan != "scan_0":
        lease = hand_out(dataset, BERT)
    assert (lease.slices, lease.label_version) == (None, start.id)
    end = corrected("scan_0", (5,), read_labels(dataset.store.label_file(start)))
    assert submit_label(dataset, "scan_0", end, "final", BERT, opened=Opened((5,))).label.checked_slices == checked


def test_of_a_whole_label_that_was_rejected_only_what_is_opened_counts(dataset: Dataset) -> None:
    submit_label(dataset, "scan_0", draw_case(0)[1], "final", ANNA)
    dataset.store.review("scan_0", "rejected", BERT, "the pole is missing")
    while hand_out(dataset, BERT).scan != "scan_0":
        pass
    done = submit_label(dataset, "scan_0", draw_case(0)[1], "final", BERT, opened=Opened((5,)))
    assert done.label.checked_slices == (5,)
    assert [case.slices for case in dataset.cases()] == [(5,)]


def test_another_version_of_a_partly_checked_label_is_checked_where_it_was_changed(dataset: Dataset) -> None:
    hand_out(dataset)
    submit_label(dataset, "scan_0", corrected("scan_0", (2, 8, 9)), "final", ANNA)
    reviewed = submit_label(dataset, "scan_0", corrected("scan_0", (2, 4, 8, 9)), "version_1", BERT)
    assert reviewed.label.checked_slices == (2, 4, 8, 9)
    assert dataset.store.restore_label(reviewed.label.id, BERT, "final").checked_slices == (2, 4, 8, 9)
    assert submit_label(dataset, "scan_1", corrected("scan_1", (2,)), "version_1", BERT).label.checked_slices is None


def test_a_label_file_in_the_folder_is_a_whole_one(dataset: Dataset) -> None:
    hand_out(dataset)
    submit_label(dataset, "scan_0", corrected("scan_0", (2, 8, 9)), "final", ANNA)
    write_labels(draw_case(0)[1], dataset.folder / "labels" / "final" / "scan_0.nii.gz")
    assert [case.slices for case in dataset.cases()] == [None]


def test_readers_agree_and_make_a_consensus_on_what_both_have_checked(tmp_path: Path) -> None:
    two = f"{CONFIG}validation_share = 0.0\n[annotation]\nreaders = 2\n"
    dataset = Dataset(make_dataset(tmp_path / "studies", scans=1, finals=0, config=two))
    empty = Volume(np.zeros(SHAPE, np.uint8), draw_case(0)[1].affine)
    assess(dataset, "scan_0", 0.4, mask=empty)
    rules = replace(SLICES, readers=2)
    for actor, slices in ((ANNA, (2, 5)), (BERT, (2, 6))):
        assert hand_out(dataset, actor, rules).slices == (2, 8, 9)
        done = submit_label(dataset, "scan_0", corrected("scan_0", slices), "final", actor)
        assert done.label.checked_slices == tuple(sorted({2, 8, 9, *slices}))
    assert {pair.dice for pair in inter_rater(dataset, "scan_0")} <= {1.0, None}, "5 and 6 were seen by one only"
    assert make_consensus(dataset, "scan_0", "majority", ANNA).checked_slices == (2, 8, 9)
    assert make_consensus(dataset, "scan_0", "bert", ANNA).checked_slices == (2, 6, 8, 9)
    store = dataset.store
    for tag, checked in (("reader-1", (3,)), ("reader-2", (4,))):
        with store.read() as transaction:
            reading = labels.current(transaction, "scan_0", tag)
        assert reading is not None
        new = labels.NewLabel("scan_0", tag, "annotator", reading.actor, checked_slices=checked)
        store.save_label(new, store.label_file(reading))
    with pytest.raises(StoreError, match="no slice in common"):
        make_consensus(dataset, "scan_0", "staple", ANNA)


# ----------------------------------------------------------------------------------------------------------- clients


@pytest.mark.server
def test_clients_are_asked_for_slices_and_their_corrections_are_checked_there(tmp_path: Path) -> None:
    pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")
    from monailabel.client import MONAILabelClient

    from segqc.server.annotator import annotate
    from tests.server_kit import add_models, listening

    asking = f"{CONFIG}validation_share = 0.0\n[annotation]\naudit_share = 0.0\nslices = 3\n"
    folder = make_dataset(tmp_path / "studies", scans=4, finals=0, config=asking)
    number = add_models(folder)
    dataset = Dataset(folder)
    for i in range(3):
        mask = Volume(np.zeros(SHAPE, np.uint8), draw_case(i)[1].affine)
        assess(dataset, f"scan_{i}", 0.4 + i / 10, mask=mask, number=number)
    truth = tmp_path / "truth"
    for i in range(4):
        write_labels(draw_case(i)[1], truth / f"scan_{i}.nii.gz")
    with listening(folder) as url:
        client = MONAILabelClient(url, tmpdir=str(tmp_path), client_id="anna")
        sample = client.next_sample("segqc", {})
        assert (sample["id"], sample["slices"]) == ("scan_0", [2, 8, 9])
        assert sample["note"] == "Correct slices 2, 8 and 9 only."
        assert sample["name"] == "scan_0 (estimated Dice 0.40; correct slices 2, 8 and 9 only).nii.gz"
        assert {box["slice"] for box in sample["boxes"]} <= {2, *sample["worst_slices"]}
        (lease,) = httpx.get(f"{url}/segqc/leases").json()
        assert (lease["scan"], lease["slices"]) == ("scan_0", [2, 8, 9])
        write_labels(corrected("scan_0", (2, 5)), tmp_path / "corrected.nii.gz")
        names = {"label_names": {"liver": 1, "spleen": 4}}
        told = client.save_label("scan_0", str(tmp_path / "corrected.nii.gz"), params=names)
        assert told["checked_slices"] == [2, 5, 8, 9]
        told = client.save_label("scan_0", str(tmp_path / "corrected.nii.gz"), params={**names, "opened_slices": [3]})
        assert told["checked_slices"] == [2, 3, 5, 8, 9]
        dataset.store.review("scan_0", "unlabelled", BERT)
        bert = MONAILabelClient(url, tmpdir=str(tmp_path), client_id="bert")
        samples = [sample]
        while samples[-1]["id"] != "scan_0" or samples[-1] is sample:
            samples.append(bert.next_sample("sequential", {"skip_reason": "another one, please"}))
        assert (samples[-1]["slices"], samples[-1]["checked_slices"]) == (None, [2, 3, 5, 8, 9])
        assert "Of its label, slices 2, 3, 5, 8 and 9 were checked before." in samples[-1]["note"]
        start = bert.download_label("scan_0", "returned")
        assert (
            bert.save_label("scan_0", start, params={"label_names": {"liver": 1, "spleen": 2}})["checked_slices"]
            is None
        )
        # the others by a simulated annotator
        done = list(annotate(url, truth, dataset.structures, count=3))
    assert {(c.scan, c.slices) for c in done} == {("scan_1", (2, 8, 9)), ("scan_2", (2, 8, 9)), ("scan_3", None)}
    for name in ("scan_1", "scan_2"):
        label = final(dataset, name)
        assert label.checked_slices == (2, 8, 9)
        kept = read_labels(dataset.store.label_file(label))
        assert np.array_equal(kept.array, corrected(name, (2, 8, 9)).array)
    assert final(dataset, "scan_3").checked_slices is None, "without an estimate it is the whole scan"
    shown = CliRunner().invoke(app, ["scans", str(folder), "--json"])
    rows = {row["scan"]: row for row in json.loads(shown.output)["scans"]}
    assert (rows["scan_1"]["checked slices"], rows["scan_1"]["slices"]) == ("2 8 9", SHAPE[2])
    assert rows["scan_3"]["checked slices"] is None
    assert "3 of 10" in CliRunner().invoke(app, ["labels", str(folder), "scan_1"]).output
    handed_out = json.loads(CliRunner().invoke(app, ["leases", str(folder), "--all", "--json"]).output)["leases"]
    assert {row["scan"]: row["slices"] for row in handed_out}["scan_1"] == "2 8 9"


# ------------------------------------------------------------------------------------------------------------ frames


def geometry(axis: int, spacing_mm: float, *, oblique: bool, flipped: bool) -> AffineArray:
    """An affine with slices of a spacing along an axis."""
    scale = np.ones(3)
    scale[axis] = spacing_mm
    turned = np.eye(3)
    if oblique:
        angle = np.deg2rad(20)
        other = (axis + 1) % 3
        turned[np.ix_((axis, other), (axis, other))] = [
            [np.cos(angle), -np.sin(angle)],
            [np.sin(angle), np.cos(angle)],
        ]
    affine = np.eye(4)
    affine[:3, :3] = turned * scale * (-1 if flipped else 1)
    return affine


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("spacing_mm", [1.0, 3.0])
def test_what_is_ignored_lies_in_the_unchecked_slices(
    tmp_path: Path, axis: int, oblique: bool, flipped: bool, spacing_mm: float
) -> None:
    shape, checked = [12, 13, 14], (0, 2, 6)
    shape[axis] = 8
    affine = geometry(axis, spacing_mm, oblique=oblique, flipped=flipped)
    rng = np.random.default_rng(0)
    scan = Volume(
        rng.normal(size=shape).astype(np.float32), affine, axis
    )  # where the spacing does not say it, the file
    assert through_plane_axis(scan) == axis
    truth = Volume(rng.integers(0, 2, shape).astype(np.uint8), affine)
    case = Case("c", "p", tmp_path / "c.nii.gz", tmp_path / "l.nii.gz", slices=checked)
    write_scan(scan, case.scan)
    write_labels(truth, case.labels)
    plan = plan_network((1.0, 1.0, spacing_mm), (16, 16, 8), in_channels=1, out_channels=2)
    example = load_example(case, plan, (1,))
    assert example.ignored is not None
    frame = canonical_frame(read_scan(case.scan), spacing_mm=plan.spacing_mm)
    native = to_native(example.ignored, frame, order=0)
    in_plane = tuple(a for a in range(3) if a != axis)
    assert np.array_equal(native.any(axis=in_plane), ~np.isin(np.arange(8), checked))
    assert np.array_equal(native.all(axis=in_plane), native.any(axis=in_plane)), "whole slices"
    assert np.array_equal(to_native(example.truth, frame, order=0), truth.array), "as the truth beside it"


def test_slices_that_the_networks_spacing_skips_are_named(tmp_path: Path) -> None:
    (case,) = make_cases(tmp_path, 1)
    coarse = replace(plan_for([case], QUICK, in_channels=1, out_channels=2), spacing_mm=(1.0, 1.0, 8.0))
    with pytest.raises(CaseError, match=r"c0.*no voxel of the networks' spacing"):
        load_example(replace(case, slices=(0,)), coarse, (1,))
    masks = np.stack([read_labels(case.labels).array] * 2)
    part = replace(case, slices=(2,))
    one, two = load_masked_examples(
        part, masks, (0.5, 2.0), plan_for([case], QUICK, in_channels=2, out_channels=1), (1,)
    )
    assert one.ignored is two.ignored is not None
    assert one.image is two.image
    assert (one.weight, two.weight) == (0.5, 2.0)


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("settings", [QUICK, replace(QUICK, loss="dice", output_form="direct")])
def test_ignored_voxels_have_no_part_in_segqc_s_loss(tmp_path: Path, settings: TrainingSettings) -> None:
    case = replace(make_cases(tmp_path, 1)[0], slices=(1, 2))
    plan = plan_for([case], settings, in_channels=2, out_channels=1)
    masks = np.roll(read_labels(case.labels).array, 2, axis=0)[None]
    (example,) = load_masked_examples(case, masks, (1.0,), plan, (1,))
    job = assessor_job("s", plan, [example], [], STRUCTURES, settings)
    assert example.mask is not None and example.ignored is not None
    tensors = [
        torch.from_numpy(a.astype(np.float32))[None, None] for a in (example.truth, example.mask, example.ignored)
    ]
    truth, mask, ignored = tensors
    image = torch.from_numpy(example.image)[None, None]
    _, target = job.prepare({"image": image, "truth": truth, "mask": mask, "ignored": ignored})
    predicted = torch.randn(1, 1, *example.truth.shape, generator=torch.manual_seed(0), requires_grad=True)
    loss = job.loss(predicted, target)
    loss.backward()
    assert predicted.grad is not None
    assert not predicted.grad[ignored > 0].any()
    assert predicted.grad[ignored == 0].all(), "all others have a part"
    other = torch.where(ignored > 0, 1 - truth, truth)
    _, changed = job.prepare({"image": image, "truth": other, "mask": mask, "ignored": ignored})
    assert torch.equal(job.loss(predicted, changed), loss), "whatever the label is there"


def test_every_patch_shows_something_that_is_known(tmp_path: Path) -> None:
    part, whole = make_cases(tmp_path, 2)
    plan = replace(plan_for([whole], QUICK, in_channels=1, out_channels=2), patch=(8, 8, 1))
    known = PatchDataset([load_example(replace(part, slices=(3,)), plan, (1,))], plan, QUICK)
    unaugmented = replace(QUICK, flips=False)
    still = PatchDataset([load_example(replace(part, slices=(3,)), plan, (1,))], plan, unaugmented)
    for draw in range(40):
        assert (known[draw]["ignored"] == 0).any()
        assert set(still[draw].keys()) == {"image", "truth", "ignored"}
    examples = [load_example(case, plan, (1,)) for case in (part, whole)]
    both = PatchDataset([examples[0], load_example(replace(whole, slices=(1,)), plan, (1,))], plan, QUICK)
    assert torch.equal(PatchDataset(examples, plan, QUICK)[5]["image"], PatchDataset(examples, plan, QUICK)[5]["image"])
    assert all("ignored" in both[draw] for draw in range(4)), "whole ones, too: a batch is of one form"


def test_partly_checked_cases_train_and_neither_validate_nor_calibrate(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 8)
    where = placed(cases)
    train_ids = [c.id for c in cases if where[c.patient].split == "train"]
    validating = [c.id for c in cases if where[c.patient].split == "validation"]
    in_part = {*train_ids[:3], validating[0]}
    mixed = [replace(c, slices=(1, 2)) if c.id in in_part else c for c in cases]
    segmenter = train_segmentation(mixed, STRUCTURES, where, QUICK, tmp_path / "s", NoProgress())
    assert {m.scan for m in segmenter.card.validation} == set(validating[1:])
    settings = replace(ALONE, ensemble=True, epochs=2)
    model = train_assessor(mixed, STRUCTURES, where, settings, tmp_path / "q", NoProgress())
    whole = {c.patient for c in cases if c.id not in in_part}
    for kind in ("served", "strange"):
        intervals = model.card.calibration[0].kinds[kind].intervals  # type: ignore[index]
        assert intervals is not None
        assert len(intervals.dice.patients) == len(whole), kind
    assert model.card.report is not None
    assert {scan.patient for scan in model.card.report.scans} == whole
    patients = {c.id: c.patient for c in cases}
    assert {patients[name] for name in train_ids} <= set(model.card.seen)
    assert patients[validating[0]] not in model.card.seen, "it was not looked at"
    made = {p.name.split("-")[0] for p in (tmp_path / "q" / "masks").iterdir()}
    assert made == {c.id for c in cases} - {validating[0]}
    assert counted(mixed).startswith("8 labelled scans of 8 patients (4 of them checked in part")
    # the unchecked slices of a training case have no part in what is learned
    spoilt = mixed[cases.index(next(c for c in cases if c.id == train_ids[0]))]
    array = read_labels(spoilt.labels).array.copy()
    array[:, :, (0, 3)] = 1 - array[:, :, (0, 3)]
    other = replace(spoilt, labels=tmp_path / "other.nii.gz")
    write_labels(Volume(array, read_scan(spoilt.scan).affine), other.labels)
    one, two = (load_example(c, segmenter.card.plan, (1,)) for c in (spoilt, other))
    assert one.ignored is not None and two.ignored is not None
    assert np.array_equal(one.truth[one.ignored == 0], two.truth[two.ignored == 0])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        ("001110", "001110", (0, 1, 2, 3, 4, 5)),
        ("001110", "002110", (3, 4, 5)),  # the empty ones before belong to the changed slice
        ("001110", "001120", (0, 1, 2, 3)),
        ("001110", "011110", (2, 3, 4, 5)),  # the new one belongs to the person, and so does what is beyond
        ("001110", "002220", ()),
        ("100001", "200001", (3, 4, 5)),
        ("000000", "000000", (0, 1, 2, 3, 4, 5)),
        ("000000", "000200", ()),
    ],
)
def test_what_a_person_let_be_is_known_by_slice(before: str, after: str, wanted: tuple[int, ...], axis: int) -> None:
    maps = [np.zeros((6, 3, 4), np.uint8) for _ in range(2)]
    for array, values in zip(maps, (before, after), strict=True):
        array[:, 1, 2] = [int(value) for value in values]
    one, other = (np.moveaxis(array, 0, axis) for array in maps)
    assert unchanged(one, other, axis) == wanted


def test_the_dice_of_a_partly_checked_case_is_that_of_its_checked_slices(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 3)
    plan = plan_for(cases, QUICK, in_channels=1, out_channels=2)
    networks = train_mask_sources("n", cases[:2], STRUCTURES, plan, QUICK, tmp_path / "n", NoProgress())
    whole, part = (masks_of(networks, c, QUICK) for c in (cases[2], replace(cases[2], slices=(1,))))
    assert np.array_equal(whole.masks, part.masks)
    truth = read_labels(cases[2].labels).array
    for mask, dice in zip(part.masks, part.dice, strict=True):
        a, b = mask[:, :, 1] > 0, truth[:, :, 1] > 0
        assert dice == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    files = {masks_file(networks, c, QUICK, tmp_path) for c in (cases[2], replace(cases[2], slices=(1,)))}
    assert len(files) == 2, "kept masks come with their Dice"


def test_a_folder_s_training_says_what_a_partly_checked_label_is_not_used_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = Dataset(make_dataset(tmp_path / "studies", scans=6, finals=6, config=f"{CONFIG}validation_share = 0.3\n"))
    splits = dataset.patient_splits()
    by_split = {
        name: [c for c in dataset.cases() if splits[c.patient].split == name] for name in ("train", "validation")
    }
    for split in by_split:
        case = by_split[split][0]
        new = labels.NewLabel(case.id, "final", "annotator", ANNA, checked_slices=(4, 5))
        dataset.store.save_label(new, case.labels)
    settings = dataset.settings.training_settings("segmentation")
    trained = train(dataset, "segmentation", NoProgress(), replace(settings, patch=(16, 16, 4)))
    left_out = by_split["validation"][0].id
    assert trained.used == 5
    assert trained.left_out == {
        left_out: f"the scan {left_out!r} was checked in part, and its patient validates, which takes a whole label"
    }
    assert {m.scan for m in trained.card.validation} == {c.id for c in by_split["validation"][1:]}
    assert len(read_labelled(dataset.folder, {}).cases) == 4, "the laboratory takes whole truths only"
