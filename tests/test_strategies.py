from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from segqc.loop.studies import Studies
from segqc.server.actors import acting
from segqc.server.datastore import StoreDatastore
from segqc.server.errors import RequestError
from segqc.store import events, leases, scans
from segqc.store.database import StoreError
from segqc.store.scans import UnknownScan
from segqc.store.values import Who
from strategies import STRATEGIES, Sampling
from tests.server_kit import assess, make_studies

NO_DRAWS = "[annotation]\naudit_share = 0.0\nvalidation_share = 0.0\nrepeat_seconds = 0\n"
ANNA = Who("person", "anna", "client-id")


@pytest.fixture
def studies(tmp_path: Path) -> Studies:
    folder = make_studies(tmp_path / "studies", scans=4, finals=0)
    (folder / "segqc.toml").write_text((folder / "segqc.toml").read_text() + "validation_share = 0.0\n" + NO_DRAWS)
    return Studies(folder)


def ask(studies: Studies, name: str = "segqc", who: Who = ANNA, **params: object) -> dict[str, object]:
    with acting(who):
        return Sampling(name, studies)(params, StoreDatastore(studies)) or {}


def leases_of(studies: Studies, scan: str) -> list[tuple[str, str]]:
    with studies.store.read() as transaction:
        return [(lease.who.name, lease.state) for lease in leases.listing(transaction, scan=scan)]


def reasons(studies: Studies, scan: str) -> list[object]:
    with studies.store.read() as transaction:
        found = events.history(transaction, "scan", scans.get(transaction, scan).id)
    return [e.detail["reason"] for e in found if e.detail and "reason" in e.detail]


def test_worst_estimate_comes_first_with_what_is_known_of_it(studies: Studies) -> None:
    for name, dice in (("scan_0", 0.9), ("scan_1", 0.4), ("scan_2", 0.7), ("scan_3", 0.95)):
        assess(studies, name, dice, worst=3, half_width=0.25 if name == "scan_1" else None)
    answer = ask(studies)
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


def test_an_unscored_pool_is_drawn_and_says_so(studies: Studies) -> None:
    answer = ask(studies)
    assert answer["strategy"] == "uniform-random"
    assert answer["estimated_dice"] is None
    assert answer["estimated_dice_interval"] is None
    assert "uniformly at random" in str(answer["note"])


def test_tta_takes_the_lowest_score_of_its_own_method(studies: Studies) -> None:
    assess(studies, "scan_0", 0.1)
    for name, value in (("scan_0", 0.9), ("scan_1", 0.8), ("scan_2", 0.3), ("scan_3", 0.7)):
        studies.write_score("tta", name, value, "seg")
    assert ask(studies, "tta")["id"] == "scan_2"


def test_foreground_random_leaves_out_empty_masks(studies: Studies) -> None:
    for name, volume in (("scan_0", 0.0), ("scan_1", 1.0), ("scan_2", 2.0)):
        assess(studies, name, 0.5, volume_ml=volume)  # scan_3 has no mask at all
    people = [Who("person", name, "client-id") for name in "abc"]
    answers = [ask(studies, "foreground-random", who) for who in people]
    assert {a["id"] for a in answers[:2]} == {"scan_1", "scan_2"}
    assert answers[2]["id"] in ("scan_0", "scan_3")
    assert answers[2]["strategy"] == "uniform-random"


def test_sequential_counts_numbers_in_names_as_numbers(tmp_path: Path) -> None:
    folder = make_studies(tmp_path / "studies", scans=1, finals=0)
    for name in ("s_10", "s_9", "s_2b"):
        (folder / f"{name}.nii.gz").write_bytes((folder / "scan_0.nii.gz").read_bytes())
    (folder / "scan_0.nii.gz").unlink()
    (folder / "segqc.toml").write_text(NO_DRAWS)
    studies = Studies(folder)
    seen = [ask(studies, "sequential", Who("person", name, "client-id"))["id"] for name in "abc"]
    assert seen == ["s_2b", "s_9", "s_10"]


def test_nothing_is_left_to_suggest(studies: Studies) -> None:
    for i in range(4):
        studies.store.review(f"scan_{i}", "excluded", ANNA, "a test")
    assert [ask(studies, name) for name in STRATEGIES] == [{}] * len(STRATEGIES)


def test_a_repeated_request_says_what_it_skipped_and_the_scan_can_be_had_back(studies: Studies) -> None:
    for i, dice in enumerate((0.4, 0.5, 0.6, 0.7)):
        assess(studies, f"scan_{i}", dice)
    first = ask(studies)
    assert (first["id"], "note" in first, "skipped" in first) == ("scan_0", False, False)
    second = ask(studies)
    assert second["id"] == "scan_1"
    assert second["skipped"] == {"scan": "scan_0", "lease": first["lease"], "reason": None}
    assert "resume='scan_0'" in str(second["note"])
    assert "/segqc/leases/scan_0/skip" in str(second["note"])
    with studies.store.write() as transaction:
        leases.skip(transaction, "scan_0", ANNA, "blurred")
    assert reasons(studies, "scan_0") == ["blurred"]
    back = ask(studies, resume="scan_0")
    assert (back["id"], back["lease"], back["estimated_dice"]) == ("scan_0", first["lease"], first["estimated_dice"])
    assert leases_of(studies, "scan_0") == [("anna", "open")]
    assert leases_of(studies, "scan_1") == [("anna", "released")], "no skip of the one that is given back for it"
    assert ask(studies, resume="scan_0")["lease"] == first["lease"], "once more is the same"
    third = ask(studies, skip_reason="motion")
    assert (third["id"], third["skipped"]) == (
        "scan_1",
        {"scan": "scan_0", "lease": first["lease"], "reason": "motion"},
    )
    assert reasons(studies, "scan_0") == ["blurred", "motion"]


def test_a_reason_skips_at_once_and_the_last_scan_comes_again(studies: Studies) -> None:
    path = studies.folder / "segqc.toml"
    path.write_text(path.read_text().replace("repeat_seconds = 0", "repeat_seconds = 3600"))
    patient = Studies(studies.folder)
    assert ask(patient, "sequential")["id"] == ask(patient, "sequential")["id"] == "scan_0"
    assert ask(patient, "sequential", skip_reason="no contrast")["id"] == "scan_1"
    for i in (1, 2, 3):
        patient.store.review(f"scan_{i}", "excluded", ANNA, "a test")
    assert ask(patient, "sequential")["id"] == "scan_0"
    again = ask(patient, "sequential", skip_reason="really")
    assert again["id"] == "scan_0"
    assert "No other scan is left" in str(again["note"])


def test_what_cannot_be_had_back_is_refused_and_changes_nothing(studies: Studies) -> None:
    berta = Who("person", "berta", "client-id")
    for name in ("scan_0", "scan_1", "scan_2"):
        assert ask(studies, "sequential")["id"] == name
    assert ask(studies, "sequential", berta)["id"] == "scan_0"
    studies.store.review("scan_1", "excluded", ANNA, "a test")
    for scan, error, sentence in (
        ("scan_0", StoreError, "handed out to another"),
        ("scan_1", StoreError, "does not wait"),
        ("scan_3", StoreError, "never handed out"),
        ("scan_9", UnknownScan, "scan_9"),
        (7, RequestError, "resume"),
        ("x" * 501, RequestError, "resume"),
        ("\ud800", RequestError, "resume"),
    ):
        with pytest.raises(error, match=sentence):
            ask(studies, "sequential", resume=scan)
        assert leases_of(studies, "scan_2") == [("anna", "open")]
    with studies.store.write() as transaction:
        leases.submitted(transaction, "scan_2", ANNA)
    with pytest.raises(StoreError, match="was not skipped"), studies.store.write() as transaction:
        leases.skip(transaction, "scan_2", ANNA, "late")
    with pytest.raises(StoreError, match="was submitted"):
        ask(studies, "sequential", resume="scan_2")
