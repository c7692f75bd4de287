"""Proposals in a folder and by HTTP: what is kept, when it goes, what can be taken, and what is told of it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from fastapi.testclient import TestClient
from monailabel.client import MONAILabelClient
from sqlalchemy import event
from typer.testing import CliRunner

from segqc.cli import main
from segqc.loop import error_maps, proposals
from segqc.loop.checking import check_label
from segqc.loop.dataset import Dataset
from segqc.loop.proposal_worth import proposal_worth, with_taken
from segqc.loop.proposals import NoProposalError, Proposal, proposal_of
from segqc.loop.scoring import assess_scan
from segqc.progress import NO_PROGRESS
from segqc.quality.metrics import true_metrics
from segqc.quality.proposal import ProposedBox
from segqc.server.monailabel.facade import current_app
from segqc.store import corrections, labels
from segqc.store.labels import PROPOSAL, NewLabel
from segqc.store.records import Actor, LabelRecord, TakenProposal
from segqc.types import LabelArray
from segqc.volumes import Volume, read_labels, read_scan, slice_layout, temporary_labels, write_labels
from tests.report_kit import good_card, worthless_card
from tests.server_kit import (
    CHECKED,
    SHAPE,
    STRUCTURES,
    add_models,
    draw_case,
    knowing_the_truth,
    listening,
    make_dataset,
    serving,
    without_liver,
)

pytestmark = pytest.mark.server

PERSON = Actor(kind="person", name="anna", identified_by="client-id")
NETWORK = Actor(kind="network", name="some", identified_by="program")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = make_dataset(tmp_path / "scans", scans=2, finals=0, config=CHECKED)
    add_models(path, people=True)
    knowing_the_truth(monkeypatch)
    return path


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    keep(Dataset(folder), without_liver(), "original")
    with serving(folder) as made:
        yield made


def keep(dataset: Dataset, label: Volume, tag: str = "final", source: str = "annotator") -> LabelRecord:
    actor = NETWORK if tag == "original" else PERSON
    bundle = dataset.bundle()
    number = bundle.number if bundle is not None and tag == "original" else None
    new = NewLabel("scan_0", tag, "network" if tag == "original" else source, actor, bundle=number)  # type: ignore[arg-type]
    with temporary_labels(label) as path:
        return dataset.store.save_label(new, path)


def propose(dataset: Dataset, label: LabelRecord) -> Proposal:
    bundle = dataset.bundle()
    assert bundle is not None
    return proposal_of(dataset, label, bundle)


def voxels(dataset: Dataset, label: LabelRecord) -> LabelArray:
    array: LabelArray = read_labels(dataset.store.label_file(label)).array
    return array


def current(dataset: Dataset, tag: str = PROPOSAL) -> LabelRecord | None:
    with dataset.store.read() as transaction:
        return labels.current(transaction, "scan_0", tag)


# ------------------------------------------------------------------------------------------------------- in a folder


@pytest.mark.parametrize("tag", ["original", "final"])
def test_a_proposal_is_a_label_version_made_of_another_by_a_bundle(folder: Path, tag: str) -> None:
    dataset = Dataset(folder)
    label = keep(dataset, without_liver(), tag)
    made = propose(dataset, label)
    np.testing.assert_array_equal(voxels(dataset, made.label), draw_case(0)[1].array)
    assert made.label.parent == label.id
    assert made.label.bundle is not None
    assert (made.label.tag, made.label.source, made.label.bundle.id) == (PROPOSAL, "network", 1)
    assert {(box.structure, box.slice_index) for box in made.boxes} == {("liver", 4), ("liver", 5)}
    missing = np.count_nonzero(draw_case(0)[1].array[..., 4:6] == 1)
    assert sum(box.voxels for box in made.boxes) == missing
    assert made.boxes[0].voxels >= made.boxes[1].voxels
    assert propose(dataset, label) == made, "it is made once"
    # nothing else has changed
    assert current(dataset, tag) == label
    with dataset.store.read() as transaction:
        assert len(labels.history(transaction, "scan_0")) == 2
        assert labels.checked_slices(made.label) == ()
    assert [case.id for case in dataset.cases()] == (["scan_0"] if tag == "final" else [])


@pytest.mark.parametrize("tag", ["original", "final"])
def test_what_was_judged_is_not_judged_again(folder: Path, tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset(folder)
    label, bundle = keep(dataset, without_liver(), tag), dataset.bundle()
    assert bundle is not None
    if tag == "final":
        check_label(dataset, label, bundle)
    else:
        assess_scan(dataset, dataset.scan("scan_0"), bundle)
    monkeypatch.setattr(proposals, "assess", None)
    made = propose(dataset, label)
    np.testing.assert_array_equal(voxels(dataset, made.label), draw_case(0)[1].array)
    keep(dataset, draw_case(0)[1], tag)
    keep(dataset, without_liver(), tag)
    assert error_maps.read(dataset, label.id, 1) is not None


@pytest.mark.parametrize("tag", ["original", "final", "returned", "reader-1"])
def test_a_proposal_goes_when_the_label_does(folder: Path, tag: str) -> None:
    dataset = Dataset(folder)
    first = keep(dataset, without_liver(), "original")
    propose(dataset, first)
    view = folder / "labels" / PROPOSAL / "scan_0.nii.gz"
    assert view.is_file()
    keep(dataset, draw_case(0)[1], "version_1")
    assert current(dataset) is not None, "a version beside the label changes nothing of it"
    kept = keep(dataset, draw_case(0)[1], tag)
    assert kept.tag == tag
    assert current(dataset) is None
    assert not view.exists()
    if tag != "reader-1":
        with pytest.raises(NoProposalError, match="another one counts by now"):
            propose(dataset, first)


@pytest.mark.parametrize("tag", ["original", "final"])
def test_nothing_is_proposed_where_estimates_of_peoples_masks_are_known_to_be_worth_nothing(
    folder: Path, tag: str
) -> None:
    dataset = Dataset(folder)
    for report, is_offered in ((good_card(), True), (worthless_card(), False)):
        add_models(folder, people=True, people_report=report)
        label = keep(dataset, without_liver(), tag)
        if is_offered:
            assert propose(dataset, label).boxes
            continue
        with pytest.raises(NoProposalError, match="Do not rely on the estimated Dice of people's masks; nothing is"):
            propose(dataset, label)


def test_a_proposal_that_comes_too_late_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset(folder)
    first = keep(dataset, without_liver(), "original")
    judged = proposals._judged

    def slowly(*args: Any) -> Any:
        keep(dataset, draw_case(0)[1])
        return judged(*args)

    monkeypatch.setattr(proposals, "_judged", slowly)
    with pytest.raises(NoProposalError):
        propose(dataset, first)
    assert current(dataset) is None


def test_without_a_network_for_peoples_masks_nothing_is_proposed_for_them(folder: Path) -> None:
    add_models(folder)
    dataset = Dataset(folder)
    with pytest.raises(NoProposalError, match="was not trained to judge people's masks"):
        propose(dataset, keep(dataset, without_liver()))


# ---------------------------------------------------------------------------------------------------------- by HTTP


def submit(client: TestClient, shown: dict[str, Any], array: LabelArray, **params: Any) -> Any:
    scan = read_scan(current_app().context.dataset.folder / "scan_0.nii.gz")
    content = gzip.compress(np.ascontiguousarray(slice_layout(scan).to_images(array)).tobytes())
    body = {"instances": shown["instances"], "started_from": shown["label"]["version"], "client_id": "anna", **params}
    return client.post(
        f"/segqc/viewer/scans/{shown['study']}/label",
        data={"params": json.dumps(body)},
        files={"voxels": ("voxels", content, "application/gzip")},
    )


def next_scan(client: TestClient) -> dict[str, Any]:
    answer = client.post("/segqc/viewer/next", json={"client_id": "anna"}).json()
    while answer["scan"]["scan"] != "scan_0":
        answer = client.post("/segqc/viewer/next", json={"client_id": "anna", "skip_reason": "another"}).json()
    found: dict[str, Any] = answer["scan"]
    return found


def proposal(client: TestClient, shown: dict[str, Any], version: int) -> Any:
    return client.get(f"/segqc/viewer/scans/{shown['study']}/proposals/{version}", params={"client_id": "anna"})


def test_the_viewer_gets_boxes_and_voxels_and_tells_what_was_taken(client: TestClient) -> None:
    shown = next_scan(client)
    version = shown["label"]["version"]
    found = proposal(client, shown, version).json()
    assert found["made_of"] == version
    size = len(shown["instances"]), shown["rows"], shown["columns"]
    before, after = (
        np.frombuffer(client.get(f"/segqc/viewer/scans/{shown['study']}/labels/{v}").content, np.uint8).reshape(size)
        for v in (version, found["version"])
    )
    assert {box["instance"] for box in found["boxes"]} == {shown["instances"][i] for i in (4, 5)}
    for box in found["boxes"]:
        where = (shown["instances"].index(box["instance"]), slice(*box["rows"]), slice(*box["columns"]))
        old, new = before[where], after[where]
        changes = (old != new) & (np.isin(old, box["values"]) | np.isin(new, box["values"]))
        assert np.count_nonzero(changes) == box["voxels"] > 0
    again = client.get(f"/segqc/viewer/scans/{shown['study']}", params={"client_id": "anna"}).json()
    assert [v["tag"] for v in again["history"]] == ["original"], "a proposal is no step of the label's way"

    for told, status, why in (
        ({"version": found["version"], "boxes": 3}, 422, "has 2 boxes"),
        ({"version": version, "boxes": 0}, 422, "is no proposal"),
        ({"version": found["version"], "boxes": -1}, 400, "boxes"),
    ):
        refused = submit(client, shown, draw_case(0)[1].array, proposal=told)
        assert refused.status_code == status
        assert why in refused.text
    kept = submit(client, shown, draw_case(0)[1].array, proposal={"version": found["version"], "boxes": 1}).json()
    expected = TakenProposal(proposal=found["version"], boxes_offered=2, boxes_taken=1)
    with current_app().context.dataset.store.read() as transaction:
        assert labels.taken_proposal(transaction, kept["version"]) == expected
        (correction,) = corrections.listing(transaction, "scan_0")
        (line,) = corrections.lines(transaction)
    assert correction.proposal == expected
    assert (line.boxes_offered, line.boxes_taken) == (2, 1)
    assert proposal(client, shown, version).status_code == 409


def test_monai_labels_client_gets_it_by_its_tag(folder: Path, tmp_path: Path) -> None:
    keep(Dataset(folder), without_liver(), "original")
    with listening(folder) as url:
        client = MONAILabelClient(url, tmpdir=str(tmp_path), client_id="anna")
        path = client.download_label("scan_0", PROPOSAL)
        info = client.label_info("scan_0", PROPOSAL) if hasattr(client, "label_info") else None
        assert PROPOSAL in client.datastore()["objects"]["scan_0"]["labels"]
    expected = draw_case(0)[1].array
    # clients count the structures from 1
    np.testing.assert_array_equal(read_labels(Path(path)).array, np.where(expected == 4, 2, expected))
    assert info is None or len(info["boxes"]) == 2


def test_the_proposal_of_a_version_as_a_file(client: TestClient, tmp_path: Path) -> None:
    dataset = current_app().context.dataset
    label = current(dataset, "original")
    assert label is not None
    answer = client.get("/segqc/labels/scan_0/proposal", params={"version": label.id})
    assert answer.status_code == 200, answer.text
    (tmp_path / "proposal.nii.gz").write_bytes(answer.content)
    assert np.count_nonzero(read_labels(tmp_path / "proposal.nii.gz").array) == np.count_nonzero(draw_case(0)[1].array)
    for scan, version, status in (("scan_1", label.id, 404), ("nothing", 1, 404), ("scan_0", 999, 404)):
        refused = client.get(f"/segqc/labels/{scan}/proposal", params={"version": version})
        assert (refused.status_code, bool(refused.json()["detail"])) == (status, True)
    assert client.get("/datastore/label", params={"label": "scan_1", "tag": PROPOSAL}).status_code == 404
    write_labels(Volume(np.zeros(SHAPE, np.uint8), draw_case(0)[1].affine), tmp_path / "label.nii.gz")
    content = (tmp_path / "label.nii.gz").read_bytes()
    before = client.get("/segqc/labels/scan_0").json()
    own = (PROPOSAL, "original", "returned", "reader-1", "reader-anna", "likely-errors", "pseudo-label")
    for tag in (*own, "pseudo-label-ignored", "attention-check"):
        query = {"image": "scan_0", "tag": tag}
        refused = client.put("/datastore/label", params=query, files={"label": ("label.nii.gz", content)})
        assert refused.status_code == 400
        assert f"nobody submits a label under the tag {tag!r}" in refused.json()["detail"]
    assert client.get("/segqc/labels/scan_0").json() == before


def test_nobody_changes_what_is_noted_of_a_proposal(client: TestClient) -> None:
    """Its boxes are noted there: the panel reads them, and corrections count them."""
    where = {"label": "scan_0", "tag": PROPOSAL}
    assert client.get("/datastore/label", params=where).status_code == 200
    noted = client.get("/datastore/label/info", params=where).json()["boxes"]
    for path, field in (("/datastore/label/info", "info"), ("/datastore/updatelabelinfo", "params")):
        answer = client.put(path, params=where, data={field: json.dumps({"boxes": "none"})})
        assert (answer.status_code, "boxes" in answer.json()["detail"]) == (400, True), answer.text
    assert client.get("/datastore/label/info", params=where).json()["boxes"] == noted


def test_before_the_networks_are_trained_a_sentence_says_so(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "new", scans=1, finals=1, config=CHECKED)
    with serving(path) as client:
        answer = client.get("/datastore/label", params={"label": "scan_0", "tag": PROPOSAL})
    assert answer.status_code == 409
    assert "is not trained yet" in answer.json()["detail"]


# -------------------------------------------------------------------------------------------------------------- worth


@pytest.mark.parametrize(("taken", "after"), [(2, 1.0), (1, None), (0, None)])
def test_costs_say_what_the_boxes_taken_have_changed(folder: Path, taken: int, after: float | None) -> None:
    dataset = Dataset(folder)
    start = keep(dataset, without_liver(), "original")
    made = propose(dataset, start)
    submitted = without_liver(slices=(5,)) if taken == 1 else draw_case(0)[1]
    final = keep(dataset, submitted)
    truth = draw_case(0)[1]
    with dataset.store.write() as transaction:
        told = TakenProposal(proposal=made.label.id, boxes_offered=2, boxes_taken=taken)
        labels.note_proposal(transaction, final.id, told)
    counted = keep(dataset, truth) if taken == 1 else final  # somebody has corrected the rest since
    (worth,) = proposal_worth(dataset, NO_PROGRESS)
    assert (worth.submissions, worth.boxes_offered, worth.boxes_taken) == (1, 2, taken)
    assert worth.measured == (taken > 0)
    if taken:
        expected = [true_dice(voxels(dataset, label), voxels(dataset, counted)) for label in (start, final)]
        assert worth.dice_before == pytest.approx(expected[0]) and worth.dice_after == pytest.approx(expected[1])
        assert after is None or worth.dice_after == after
    printed = CliRunner().invoke(main.app, ["costs", str(folder)])
    assert f"{taken} of 2 proposed boxes taken" in printed.output
    rows = json.loads(CliRunner().invoke(main.app, ["costs", str(folder), "--json"]).output)["proposals"]
    assert rows[0]["boxes taken"] == taken and rows[0]["Dice before"] == worth.dice_before


def test_what_proposals_were_worth_is_asked_in_as_many_queries_for_one_as_for_many(folder: Path) -> None:
    dataset = Dataset(folder)
    assert dataset.structures

    def queries() -> int:
        asked: list[str] = []

        def note(connection: object, cursor: object, statement: str, *_: object) -> None:
            asked.append(statement)

        engine = dataset.store.database.engine
        event.listen(engine, "before_cursor_execute", note)
        try:
            proposal_worth(dataset, NO_PROGRESS)
        finally:
            event.remove(engine, "before_cursor_execute", note)
        return len(asked)

    counts = []
    for number in range(4):
        start = keep(dataset, without_liver(slices=(4, 5, number)), "original")
        with dataset.store.read() as transaction:
            is_labelled = labels.current(transaction, "scan_0", "final") is not None
        if is_labelled:
            dataset.store.remove_label("scan_0", "final", PERSON)
        made = propose(dataset, start)
        final = keep(dataset, without_liver(slices=(number,)))
        with dataset.store.write() as transaction:
            told = TakenProposal(proposal=made.label.id, boxes_offered=len(made.boxes), boxes_taken=1)
            labels.note_proposal(transaction, final.id, told)
        counts.append(queries())
    (worth,) = proposal_worth(dataset, NO_PROGRESS)
    assert (worth.submissions, worth.measured) == (4, 4)
    assert len(set(counts)) == 1, counts


def true_dice(mask: LabelArray, truth: LabelArray) -> float:
    found = [true_metrics(s.mask(mask), s.mask(truth)).dice for s in STRUCTURES]
    return float(np.mean([dice for dice in found if dice is not None]))


def test_only_boxes_that_were_taken_count_and_those_that_agree_best() -> None:
    start, proposed = np.zeros((6, 6, 2), np.uint8), np.zeros((6, 6, 2), np.uint8)
    proposed[1:4, 1:4] = 1
    submitted = start.copy()
    submitted[1:4, 1:4, 1] = 1
    boxes = [ProposedBox("liver", index, (1, 1), (4, 4), 9) for index in (0, 1)]
    for taken, slices in ((1, [1]), (2, [1]), (0, [])):
        made = with_taken(start, proposed, submitted, STRUCTURES, boxes, taken, 2)
        assert np.flatnonzero(made.any(axis=(0, 1))).tolist() == slices
