from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from segqc.cli.main import app
from segqc.loop.agreement import rank
from segqc.loop.dataset import Dataset
from segqc.loop.readers import make_consensus
from segqc.loop.submission import submit_label
from segqc.quality.report_card import ReportCard
from segqc.selection import strategies
from segqc.server.actors import acting
from segqc.server.monailabel.datastore import StoreDatastore
from segqc.server.monailabel.strategy import Sampling
from segqc.store import events, labels, leases, scans
from segqc.store.database import StoreError
from segqc.store.labels import FINAL, NewLabel
from segqc.store.records import Actor
from segqc.store.scans import UnknownScan
from segqc.types import NO_WITNESSES, Unlikeness, Witnesses
from tests.report_kit import good_card, worthless_card
from tests.server_kit import SHAPE, add_models, assess, draw_case, make_dataset
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


@pytest.mark.parametrize(
    ("reason", "title"),
    [
        ("the upper pole is missing", "the upper pole is missing"),
        ('left/right: "swapped"\n<see note>?', "left right swapped see note"),
        ("word " * 40, " ".join(["word"] * 15) + " …"),
    ],
)
def test_a_rejected_scan_comes_first_with_the_reviewer_s_reason(dataset: Dataset, reason: str, title: str) -> None:
    for name, dice in (("scan_0", 0.9), ("scan_1", 0.4)):
        assess(dataset, name, dice)
    with dataset.store.read() as transaction:
        mask = labels.start_of(transaction, "scan_0")
    assert mask is not None
    label = NewLabel("scan_0", "final", "annotator", ANNA, parent=mask.id)
    dataset.store.save_label(label, dataset.store.label_file(mask))
    dataset.store.review("scan_0", "rejected", ANNA, reason)
    answer = ask(dataset)
    assert (answer["id"], answer["state"], answer["reason"]) == ("scan_0", "rejected", reason.strip())
    assert answer["name"] == f"scan_0 (rejected: {title}).nii.gz"


def test_a_scan_that_is_unlike_the_training_s_comes_without_an_interval_and_says_so(dataset: Dataset) -> None:
    for name, dice in (("scan_0", 0.9), ("scan_1", 0.4)):
        unlikeness = Unlikeness(2.5, 0.05 if name == "scan_1" else 0.5)
        assess(dataset, name, dice, half_width=0.05, unlikeness=unlikeness)
    answer = ask(dataset)
    message = "unlike the training scans: interval does not apply"
    assert (answer["id"], answer["estimated_dice_interval"]) == ("scan_1", None)
    assert answer["estimated_dice_interval_by_structure"] == {"liver": None}
    assert answer["unlike_training"] == {"score": 2.5, "p_value": 0.05, "message": message}
    assert answer["name"] == "scan_1 (estimated Dice 0.40, unlike the training scans).nii.gz"
    assert f"This scan is {message}." in str(answer["note"])
    answer = ask(dataset, actor=Actor(kind="person", name="bert", identified_by="client-id"))
    assert (answer["id"], answer["unlike_training"]) == ("scan_0", {"score": 2.5, "p_value": 0.5, "message": None})
    assert answer["estimated_dice_interval"] is not None and "note" not in answer


def test_the_most_unlike_scan_comes_first_by_its_own_strategy_and_where_estimates_are_noise(dataset: Dataset) -> None:
    number = add_models(dataset.folder, report=worthless_card(unlikeness=Unlikeness(1.0, 0.5)))
    for name, score in (("scan_0", 1.0), ("scan_1", 1.5), ("scan_2", 4.0), ("scan_3", 2.0)):
        assess(dataset, name, 0.5, number=number, unlikeness=Unlikeness(score, 0.5))
    answer = ask(dataset)
    assert (answer["id"], answer["strategy"]) == ("scan_2", "unlikeness")
    assert "Ordered by how unlike the training scans they are" in str(answer["note"])
    bert = Actor(kind="person", name="bert", identified_by="client-id")
    assert ask(dataset, "unlikeness", bert)["id"] == "scan_3"
    carl = Actor(kind="person", name="carl", identified_by="client-id")
    told = str(ask(dataset, "sequential", carl)["reliability"])
    assert "Do not rely on the order of the estimates" in told and "Ordered by" not in told, "it asked for another one"
    ranking = rank(dataset)
    assert (ranking.by, [s.id for s in ranking.scans]) == ("unlikeness", ["scan_2", "scan_3", "scan_1", "scan_0"])


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


def test_the_largest_volume_of_likely_errors_comes_first_whatever_the_dice(dataset: Dataset) -> None:
    for name, dice, worst in (("scan_0", 0.2, 9), ("scan_1", 0.9, 0), ("scan_2", 0.5, 5)):
        assess(
            dataset, name, dice, worst
        )  # the error sum of the worst slice is 50, of the others a tenth of its number
    assert ask(dataset, "expected-gain")["id"] == "scan_1"
    bert = Actor(kind="person", name="bert", identified_by="client-id")
    assert ask(dataset, "expected-gain", bert)["id"] == "scan_2"
    sums = 50 + sum(i for i in range(SHAPE[2]) if i != 9) / 10
    assert dataset.scores("expected-gain")["scan_0"] == pytest.approx(-sums * 1.5 * 1.5 * 4 / 1000)


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


def test_a_scan_that_was_rejected_is_taken_up_again_by_whoever_submitted_it(dataset: Dataset) -> None:
    berta = Actor(kind="person", name="berta", identified_by="client-id")
    first = ask(dataset, "sequential")
    assert ask(dataset, "sequential")["id"] == "scan_1"
    submit_label(dataset, "scan_0", draw_case(0)[1], FINAL, ANNA)
    with pytest.raises(StoreError, match="was submitted by 'anna' already"):
        ask(dataset, "sequential", resume="scan_0")
    dataset.store.review("scan_0", "rejected", berta, "a gap")
    again = ask(dataset, "sequential", resume="scan_0")
    assert (again["id"], again["state"], again["reason"]) == ("scan_0", "rejected", "a gap")
    assert again["lease"] != first["lease"]
    assert leases_of(dataset, "scan_0") == [("anna", "submitted"), ("anna", "open")]
    assert leases_of(dataset, "scan_1") == [("anna", "released")]
    with dataset.store.read() as transaction:
        lease = leases.listing(transaction, state="open", scan="scan_0")[0]
        start = labels.current(transaction, "scan_0", "returned")
    assert start is not None and (lease.draw, lease.label_version) == ("rejected", start.id)
    assert ask(dataset, "sequential", resume="scan_0")["lease"] == again["lease"], "once more is the same"
    assert submit_label(dataset, "scan_0", draw_case(1)[1], FINAL, ANNA).correction is not None
    with pytest.raises(StoreError, match="was submitted by 'anna' already"):
        ask(dataset, "sequential", resume="scan_0")


@pytest.mark.parametrize("is_read_again", [True, False])
def test_one_of_several_readers_takes_up_a_rejected_scan_once(dataset: Dataset, is_read_again: bool) -> None:
    path = dataset.folder / "segqc.toml"
    path.write_text(path.read_text() + "readers = 2\n")
    several = Dataset(dataset.folder)
    readers = [ANNA, Actor(kind="person", name="berta", identified_by="client-id")]
    for reader in readers:
        assert ask(several, "sequential", reader)["id"] == "scan_0"
        submit_label(several, "scan_0", draw_case(0)[1], FINAL, reader)
    make_consensus(several, "scan_0", "majority", ANNA)
    several.store.review("scan_0", "rejected", ANNA, "a gap")
    assert ask(several, "sequential", resume="scan_0")["id"] == "scan_0"
    if is_read_again:
        submit_label(several, "scan_0", draw_case(1)[1], FINAL, ANNA)
        with pytest.raises(StoreError, match="was submitted by 'anna' already"):
            ask(several, "sequential", resume="scan_0")
    assert ask(several, "sequential", readers[1], resume="scan_0")["id"] == "scan_0"


# ---------------------------------------------------------------------------------------------- what the order is worth


def reported(
    folder: Path, card: ReportCard, config: str = NO_DRAWS, witnesses: Sequence[Witnesses] = (NO_WITNESSES,) * 4
) -> Dataset:
    """Four assessed scans, waiting, by a bundle with a report card."""
    make_dataset(folder, scans=4, finals=0)
    (folder / "segqc.toml").write_text((folder / "segqc.toml").read_text() + "validation_share = 0.0\n" + config)
    number = add_models(folder, report=card)
    dataset = Dataset(folder)
    for i, dice in enumerate((0.9, 0.4, 0.7, 0.95)):
        assess(dataset, f"scan_{i}", dice, number=number, witnesses=witnesses[i])
    return dataset


def people(count: int) -> list[Actor]:
    return [Actor(kind="person", name=f"a{i}", identified_by="client-id") for i in range(count)]


def test_a_good_order_is_used_and_said_to_be_good(tmp_path: Path) -> None:
    dataset = reported(tmp_path / "s", good_card())
    answer = ask(dataset)
    assert (answer["id"], answer["strategy"], "note" in answer) == ("scan_1", "segqc", False)
    assert answer["name"] == "scan_1 (estimated Dice 0.40).nii.gz"
    worth = answer["reliability"]
    assert isinstance(worth, dict)
    assert (worth["estimate"], worth["order"]) == ("better than the constant", "better than chance")
    assert "better than a constant: on masks of 30 patients, made by fold networks" in worth["messages"][0]


def test_an_order_that_is_noise_is_no_order(tmp_path: Path) -> None:
    firsts = set()
    for seed in range(6):
        dataset = reported(tmp_path / f"s{seed}", worthless_card(), f"{NO_DRAWS}seed = {seed}\n")
        answer = ask(dataset)
        firsts.add(answer["id"])
        assert answer["strategy"] == "uniform-random"
        note = str(answer["note"])
        assert "Ordered at random: the estimates' order is not better than chance on 30 patients" in note
        assert "Do not rely on the estimated Dice" in note
        assert ", unreliable)" in str(answer["name"])
        with dataset.store.read() as transaction:
            (lease,) = leases.listing(transaction, state="open")
        assert (lease.strategy, lease.draw, lease.score, lease.pool) == ("uniform-random", "strategy", None, 4)
    assert len(firsts) > 1


@pytest.mark.parametrize("name", ["segqc-diverse", "expected-gain-diverse"])
def test_diversity_among_noise_is_no_order_either(tmp_path: Path, name: str) -> None:
    dataset = reported(tmp_path / "s", worthless_card())
    first, second = people(2)
    answer = ask(dataset, name, first)
    assert answer["strategy"] == "uniform-random"
    assert "Ordered at random: the estimates' order is not better than chance on 30 patients" in str(answer["note"])
    assert "goes by yet" not in str(answer["note"])
    always = NO_DRAWS.replace("audit_share = 0.0", "audit_share = 1.0")
    test = ask(reported(tmp_path / "test", worthless_card(), always), name, second)
    assert [test[key] for key in ("strategy", "note")] == [answer[key] for key in ("strategy", "note")]


def test_the_best_witness_orders_where_it_has_scores(tmp_path: Path) -> None:
    dataset = reported(tmp_path / "s", worthless_card(witness_noise=0.01))
    first, second = people(2)
    assert ask(dataset, "segqc", first)["strategy"] == "uniform-random", "no scan has a score yet"
    segmenter = dataset.segmenter()
    assert segmenter is not None
    for name, value in (("scan_0", 0.9), ("scan_1", 0.8), ("scan_2", 0.3), ("scan_3", 0.31)):
        dataset.write_score("tta", name, value, segmenter.version)
    with dataset.store.read() as transaction:
        (lease,) = leases.listing(transaction, state="open")
    answer = ask(dataset, "segqc", second)
    assert (answer["id"], answer["strategy"]) == ("scan_3" if lease.scan == "scan_2" else "scan_2", "tta")
    assert "Ordered by how well the network's masks of a scan agree" in str(answer["note"])
    assert "the estimates' order is not better than chance" in str(answer["note"])


@pytest.mark.parametrize("witness", ["soft", "soft-entropy", "size"])
def test_a_witness_that_lies_with_the_assessments_orders_at_once(tmp_path: Path, witness: str) -> None:
    known = [Witnesses(soft=value, entropy=value, size=value) for value in (-0.3, -0.2, -0.9, -0.1)]
    dataset = reported(tmp_path / "s", worthless_card(witness_noise=0.01, witness=witness), witnesses=known)
    answer = ask(dataset)
    assert (answer["id"], answer["strategy"]) == ("scan_2", witness)
    assert dataset.scores(witness) == {f"scan_{i}": value for i, value in enumerate((-0.3, -0.2, -0.9, -0.1))}
    assert [scan.id for scan in rank(dataset).scans] == ["scan_2", "scan_0", "scan_1", "scan_3"]
    assert rank(dataset).by == witness
    listed = CliRunner().invoke(app, ["leases", str(dataset.folder), "--json"])
    (lease,) = json.loads(listed.output)["leases"]
    assert (lease["strategy"], lease["estimated Dice"]) == (witness, 0.7), "the estimate, and not what chose the scan"


def test_a_test_looks_like_any_other_scan_there_too(tmp_path: Path) -> None:
    always = NO_DRAWS.replace("audit_share = 0.0", "audit_share = 1.0")
    test = ask(reported(tmp_path / "test", worthless_card(), always))
    other = ask(reported(tmp_path / "other", worthless_card()))
    assert test.keys() == other.keys()
    assert [test[key] for key in ("strategy", "note")] == [other[key] for key in ("strategy", "note")]


def test_of_few_patients_nothing_is_said_against_the_order(tmp_path: Path) -> None:
    answer = ask(reported(tmp_path / "s", worthless_card(patients=5)))
    assert (answer["id"], answer["strategy"], "note" in answer) == ("scan_1", "segqc", False)
    assert isinstance(answer["reliability"], dict)
    assert answer["reliability"]["order"] == "too few patients"
    assert "unreliable" not in str(answer["name"])


def test_a_bundle_without_a_card_has_no_reliability(dataset: Dataset) -> None:
    assess(dataset, "scan_0", 0.5)
    assert ask(dataset)["reliability"] is None
