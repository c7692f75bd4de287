from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from segqc.loop.dataset import Dataset
from segqc.selection import strategies
from segqc.server.actors import acting
from segqc.server.monailabel.datastore import StoreDatastore
from segqc.server.monailabel.strategy import Sampling
from segqc.store import events, leases, scans
from segqc.store.database import StoreError
from segqc.store.records import Actor
from segqc.store.scans import UnknownScan
from tests.server_kit import assess, make_dataset
from tests.store_kit import answer_lease

NO_DRAWS = "[annotation]\naudit_share = 0.0\nvalidation_share = 0.0\nrepeat_seconds = 0\n"
ANNA = Actor(kind="person", name="anna", identified_by="client-id")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    folder = make_dataset(tmp_path / "studies", scans=4, finals=0)
    (folder / "segqc.toml").write_text((folder / "segqc.toml").read_text() + "validation_share = 0.0\n" + NO_DRAWS)
    return Dataset(folder)


def ask(dataset: Dataset, name: str = "segqc", actor: Actor = ANNA, **params: object) -> dict[str, object]:
    with acting(actor):
        return Sampling(name, dataset)(params, StoreDatastore(dataset)) or {}


def leases_of(dataset: Dataset, scan: str) -> list[tuple[str, str]]:
    with dataset.store.read() as transaction:
        return [(lease.actor.name, lease.state) for lease in leases.listing(transaction, scan=scan)]


def reasons(dataset: Dataset, scan: str) -> list[object]:
    with dataset.store.read() as transaction:
        found = events.history(transaction, "scan", scans.get(transaction, scan).id)
    return [e.detail["reason"] for e in found if e.detail and "reason" in e.detail]


def test_worst_estimate_comes_first_with_what_is_known_of_it(dataset: Dataset) -> None:
    for name, dice in (("scan_0", 0.9), ("scan_1", 0.4), ("scan_2", 0.7), ("scan_3", 0.95)):
        assess(dataset, name, dice, worst=3, half_width=0.25 if name == "scan_1" else None)
    answer = ask(dataset)
    interval = {"low": pytest.approx(0.15), "high": pytest.approx(0.65), "level": 0.9}
    assert answer["estimated_dice_interval"] == interval
    assert answer["estimated_dice_interval_by_structure"] == {"liver": interval}
    json.dumps(answer)
    assert (answer["id"], answer["strategy"]) == ("scan_1", "segqc")
    assert answer["estimated_dice"] == pytest.approx(0.4)
    assert answer["worst_slices"] == [3, 9, 8, 7, 6]
    boxes = answer["boxes"]
    assert isinstance(boxes, list)
    assert [(b["slice"], b["start"], b["stop"], b["structure"]) for b in boxes] == [(3, [3, 4], [9, 12], "liver")]
    assert "note" not in answer
    assert not {"draw", "probability", "audit"} & answer.keys(), "an annotator must not see which scans are tests"


def test_an_unscored_pool_is_drawn_and_says_so(dataset: Dataset) -> None:
    answer = ask(dataset)
    assert answer["strategy"] == "uniform-random"
    assert answer["estimated_dice"] is None
    assert answer["estimated_dice_interval"] is None
    assert "uniformly at random" in str(answer["note"])


def test_tta_takes_the_lowest_score_of_its_own_method(dataset: Dataset) -> None:
    assess(dataset, "scan_0", 0.1)
    for name, value in (("scan_0", 0.9), ("scan_1", 0.8), ("scan_2", 0.3), ("scan_3", 0.7)):
        dataset.write_score("tta", name, value, "seg")
    assert ask(dataset, "tta")["id"] == "scan_2"


def test_foreground_random_leaves_out_empty_masks(dataset: Dataset) -> None:
    for name, volume in (("scan_0", 0.0), ("scan_1", 1.0), ("scan_2", 2.0)):
        assess(dataset, name, 0.5, volume_ml=volume)  # scan_3 has no mask at all
    people = [Actor(kind="person", name=name, identified_by="client-id") for name in "abc"]
    answers = [ask(dataset, "foreground-random", actor) for actor in people]
    assert {a["id"] for a in answers[:2]} == {"scan_1", "scan_2"}
    assert answers[2]["id"] in ("scan_0", "scan_3")
    assert answers[2]["strategy"] == "uniform-random"


def test_sequential_counts_numbers_in_names_as_numbers(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "studies", scans=1, finals=0)
    for name in ("s_10", "s_9", "s_2b"):
        (folder / f"{name}.nii.gz").write_bytes((folder / "scan_0.nii.gz").read_bytes())
    (folder / "scan_0.nii.gz").unlink()
    (folder / "segqc.toml").write_text(NO_DRAWS)
    dataset = Dataset(folder)
    seen = [
        ask(dataset, "sequential", Actor(kind="person", name=name, identified_by="client-id"))["id"] for name in "abc"
    ]
    assert seen == ["s_2b", "s_9", "s_10"]


def test_nothing_is_left_to_suggest(dataset: Dataset) -> None:
    for i in range(4):
        dataset.store.review(f"scan_{i}", "excluded", ANNA, "a test")
    assert [ask(dataset, name) for name in strategies()] == [{}] * len(strategies())


def test_a_repeated_request_says_what_it_skipped_and_the_scan_can_be_had_back(dataset: Dataset) -> None:
    for i, dice in enumerate((0.4, 0.5, 0.6, 0.7)):
        assess(dataset, f"scan_{i}", dice)
    first = ask(dataset)
    assert (first["id"], "note" in first, "skipped" in first) == ("scan_0", False, False)
    second = ask(dataset)
    assert second["id"] == "scan_1"
    assert second["skipped"] == {"scan": "scan_0", "lease": first["lease"], "reason": None}
    assert "resume='scan_0'" in str(second["note"])
    assert "/segqc/leases/scan_0/skip" in str(second["note"])
    with dataset.store.write() as transaction:
        leases.skip(transaction, "scan_0", ANNA, "blurred")
    assert reasons(dataset, "scan_0") == ["blurred"]
    back = ask(dataset, resume="scan_0")
    assert (back["id"], back["lease"], back["estimated_dice"]) == ("scan_0", first["lease"], first["estimated_dice"])
    assert leases_of(dataset, "scan_0") == [("anna", "open")]
    assert leases_of(dataset, "scan_1") == [("anna", "released")], "no skip of the one that is given back for it"
    assert ask(dataset, resume="scan_0")["lease"] == first["lease"], "once more is the same"
    third = ask(dataset, skip_reason="motion")
    assert (third["id"], third["skipped"]) == (
        "scan_1",
        {"scan": "scan_0", "lease": first["lease"], "reason": "motion"},
    )
    assert reasons(dataset, "scan_0") == ["blurred", "motion"]


def test_a_reason_skips_at_once_and_the_last_scan_comes_again(dataset: Dataset) -> None:
    path = dataset.folder / "segqc.toml"
    path.write_text(path.read_text().replace("repeat_seconds = 0", "repeat_seconds = 3600"))
    patient = Dataset(dataset.folder)
    assert ask(patient, "sequential")["id"] == ask(patient, "sequential")["id"] == "scan_0"
    assert ask(patient, "sequential", skip_reason="no contrast")["id"] == "scan_1"
    for i in (1, 2, 3):
        patient.store.review(f"scan_{i}", "excluded", ANNA, "a test")
    assert ask(patient, "sequential")["id"] == "scan_0"
    again = ask(patient, "sequential", skip_reason="really")
    assert again["id"] == "scan_0"
    assert "No other scan is left" in str(again["note"])


def test_what_cannot_be_had_back_is_refused_and_changes_nothing(dataset: Dataset) -> None:
    berta = Actor(kind="person", name="berta", identified_by="client-id")
    for name in ("scan_0", "scan_1", "scan_2"):
        assert ask(dataset, "sequential")["id"] == name
    assert ask(dataset, "sequential", berta)["id"] == "scan_0"
    dataset.store.review("scan_1", "excluded", ANNA, "a test")
    for scan, error, sentence in (
        ("scan_0", StoreError, "handed out to another"),
        ("scan_1", StoreError, "does not wait"),
        ("scan_3", StoreError, "never handed out"),
        ("scan_9", UnknownScan, "scan_9"),
    ):
        with pytest.raises(error, match=sentence):
            ask(dataset, "sequential", resume=scan)
        assert leases_of(dataset, "scan_2") == [("anna", "open")]
    with dataset.store.write() as transaction:
        answer_lease(transaction, "scan_2", ANNA)
    with pytest.raises(StoreError, match="was not skipped"), dataset.store.write() as transaction:
        leases.skip(transaction, "scan_2", ANNA, "late")
    with pytest.raises(StoreError, match="was submitted"):
        ask(dataset, "sequential", resume="scan_2")
