"""The orders that compare scans with each other, the ensemble's, and the class-stratified one, on both databases."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from segqc.cli.main import app
from segqc.loop.dataset import Dataset
from segqc.networks.segmenter import TtaPrediction
from segqc.quality.report_card import AT_RANDOM
from segqc.quality.witnesses import ensemble_agreement
from segqc.selection import Strategy, strategies
from segqc.selection.class_stratified import least_certainty, structure_certainties
from segqc.selection.distances import nearest, standardised
from segqc.selection.preview import preview
from segqc.split import SplitConfig
from segqc.store import assessments, bundles, features, jobs, leases, scans
from segqc.store.bundles import NewBundle
from segqc.store.database import Transaction
from segqc.store.events import SERVER
from segqc.store.leases import LeaseRules
from segqc.store.records import Actor, LeaseRecord
from segqc.store.store import Store
from segqc.store.sync import sync
from segqc.types import Structure
from segqc.volumes import Volume, read_scan, scan_id, write_scan
from segqc.volumes.appearance import APPEARANCE_VERSION, appearance
from tests.server_kit import SHAPE, add_models, assess, draw_case, make_dataset
from tests.store_kit import ANNA, Clock, make_scans, serve_pair

COUNT = 30
PLAIN = LeaseRules(audit_share=0.0, validation_share=0.0, repeat_seconds=0)
NO_DRAWS = "[annotation]\naudit_share = 0.0\nvalidation_share = 0.0\nrepeat_seconds = 0\n"


@pytest.fixture
def store(tmp_path: Path, url: str | None, clock: Clock) -> Iterator[Store]:
    """Thirty waiting scans of training patients, and a bundle that serves."""
    make_scans(tmp_path / "studies", COUNT)
    opened = Store.open(tmp_path / "studies", url, clock=clock)
    sync(opened, scan_id, SplitConfig(folds=3, validation_share=0.0))
    with opened.write() as transaction:
        serve_pair(transaction, "seg1", "qc")
    yield opened
    opened.close()


def reader(number: int) -> Actor:
    return Actor(kind="person", name=f"reader {number}", identified_by="client-id")


def ask(store: Store, name: str, number: int = 0, seed: int = 0) -> LeaseRecord:
    """A scan for somebody who has none yet."""
    rules = LeaseRules(audit_share=0.0, validation_share=0.0, repeat_seconds=0, seed=seed)
    with store.write() as transaction:
        lease = leases.acquire(transaction, reader(number), name, strategies()[name].order, rules)
    assert lease is not None
    return lease


def ranked(store: Store, dice: Sequence[float]) -> None:
    """Estimates of the first scans."""
    with store.write() as transaction:
        for i, value in enumerate(dice):
            scans.rank(transaction, scans.number_of(transaction, f"scan_{i}"), value, True)


def scored(store: Store, method: str, values: Mapping[int, float]) -> None:
    with store.write() as transaction:
        for i, value in values.items():
            assessments.write_score(transaction, f"scan_{i}", method, value, "seg1")


def placed(store: Store, points: Mapping[int, float], kind: str = "segmenter", version: str = "seg1") -> None:
    """Features of scans: points on a line, in a space with a second axis along which all are alike."""
    with store.write() as transaction:
        for i, point in points.items():
            number = scans.number_of(transaction, f"scan_{i}")
            features.write(transaction, number, kind, version, [point, 1.0])  # type: ignore[arg-type]


def label(store: Store, *numbers: int) -> None:
    with store.write() as transaction:
        for i in numbers:
            scans.set_state(transaction, scans.get(transaction, f"scan_{i}"), "submitted", ANNA)


def finish_round(transaction: Transaction) -> None:
    job = jobs.enqueue(transaction, "round", {}, SERVER)
    number, _ = jobs.begin_round(transaction, job.id, 1)
    jobs.finish_round(transaction, number)


# ----------------------------------------------------------------------------------------------------------- diversity

BOTH = pytest.mark.parametrize("name", ["segqc-diverse", "expected-gain-diverse"])


def worst_first(store: Store, name: str, values: Sequence[float]) -> None:
    if name == "segqc-diverse":
        ranked(store, values)
    else:
        scored(store, "expected-gain", dict(enumerate(values)))


@BOTH
def test_near_identical_scans_do_not_come_in_a_row(store: Store, name: str) -> None:
    worst_first(store, name, [i / 100 for i in range(COUNT)])
    # the worst eight are nearly one scan
    placed(store, {i: i / 1000 if i < 8 else 10.0 * i for i in range(COUNT)})
    got = [ask(store, name, number) for number in range(3)]
    assert [lease.scan for lease in got] == ["scan_0", "scan_10", "scan_8"], "ten of the waiting are candidates"
    assert [lease.strategy for lease in got] == [name] * 3
    assert [lease.score for lease in got] == pytest.approx([0.0, 0.10, 0.08])
    plain = name.removesuffix("-diverse")
    assert ask(store, plain, 9).scan == "scan_1"


def test_a_scan_that_is_not_among_the_worst_is_no_candidate_however_far_it_is(store: Store) -> None:
    ranked(store, [i / 100 for i in range(COUNT)])
    placed(store, {i: 1e4 if i == 29 else float(i) for i in range(COUNT)})
    label(store, 0)
    assert ask(store, "segqc-diverse").scan == "scan_10"


def test_what_is_labelled_or_handed_out_is_what_scans_are_compared_with(store: Store) -> None:
    ranked(store, [i / 100 for i in range(5)])
    placed(store, {0: 0.0, 1: 1.0, 2: 5.0, 3: 9.0, 4: 10.0, 29: 10.0})
    label(store, 29)
    assert ask(store, "segqc-diverse", 0).scan == "scan_0"
    assert ask(store, "segqc-diverse", 1).scan == "scan_2"
    with store.write() as transaction:
        leases.release(transaction, "scan_2", ANNA)
    assert ask(store, "segqc-diverse", 2).scan == "scan_2", "it is not handed out any more"


def test_labels_of_validating_patients_cover_nothing(tmp_path: Path, url: str | None) -> None:
    make_scans(tmp_path / "s", 12)
    store = Store.open(tmp_path / "s", url)
    sync(store, scan_id, SplitConfig(folds=3, validation_share=0.5))
    with store.write() as transaction:
        serve_pair(transaction, "seg1", "qc")
    with store.read() as transaction:
        of_split = {s.name: s.split for s in scans.listing(transaction)}
    train, validation = (
        [int(name.removeprefix("scan_")) for name, split in of_split.items() if split == wanted]
        for wanted in ("train", "validation")
    )
    ranked(store, [i / 100 for i in range(12)])
    placed(store, {**{i: float(k) for k, i in enumerate(sorted(train))}, validation[0]: 0.0})
    label(store, validation[0])
    assert ask(store, "segqc-diverse").scan == f"scan_{min(train)}", "the worst: nothing that trains is labelled"
    store.close()


@BOTH
def test_features_of_another_network_do_not_count(store: Store, name: str) -> None:
    worst_first(store, name, [i / 100 for i in range(COUNT)])
    placed(store, {i: 1.0 * i for i in range(COUNT)}, version="seg0")
    lease = ask(store, name)
    assert (lease.scan, lease.strategy) == ("scan_0", name.removesuffix("-diverse"))


@BOTH
def test_where_the_estimates_order_is_noise_the_default_strategy_decides(store: Store, name: str) -> None:
    worst_first(store, name, [i / 100 for i in range(COUNT)])
    with store.write() as transaction:
        for number, ranked_by in ((2, AT_RANDOM), (3, "size")):
            new = NewBundle(
                id=number, segmenter_version="seg1", assessor_version="qc", manifest_sha256="0" * 64, reason="a test",
                ranked_by=ranked_by,
            )  # fmt: skip
            bundles.add(transaction, new, SERVER)
        bundles.serve(transaction, 2, SERVER)
    placed(store, {i: 1.0 * i for i in range(COUNT)})
    assert len({ask(store, name, seed, seed).scan for seed in range(6)}) > 2
    with store.write() as transaction:
        bundles.serve(transaction, 3, SERVER)
        assessments.write_score(transaction, "scan_17", "size", -9.0, "seg1", bundle=3)
    lease = ask(store, name, 99)
    assert (lease.scan, lease.strategy) == ("scan_17", "size")


def test_without_any_estimate_a_scan_is_drawn(store: Store) -> None:
    for name in ("segqc-diverse", "expected-gain-diverse", "ensemble", "class-stratified", "cold-start"):
        lease = ask(store, name, seed=1)
        assert (lease.strategy, lease.pool) == ("uniform-random", COUNT)
        with store.write() as transaction:
            leases.release(transaction, lease.scan, ANNA)


def test_distances_are_those_of_every_pair() -> None:
    rng = np.random.default_rng(0)
    points = np.asarray(rng.normal(3, 5, (1500, 7)), np.float32)
    scaled = standardised(points)
    assert np.abs(scaled.mean(axis=0)).max() < 1e-3 and np.abs(scaled.std(axis=0) - 1).max() < 0.02
    own, others = scaled[:40], scaled[40:]
    wanted = np.sqrt(((own[:, None] - others[None]) ** 2).mean(axis=2)).min(axis=1)
    assert nearest(own, others) == pytest.approx(wanted, abs=1e-3)
    with pytest.raises(ValueError, match="no scans"):
        nearest(own, others[:0])


# ---------------------------------------------------------------------------------------------------------- cold start


def test_a_cold_start_begins_in_the_middle_and_goes_to_what_is_farthest(store: Store) -> None:
    places = {0: -10.0, 1: 0.1, 2: 9.0, 3: 9.5, 4: 4.0}
    placed(store, places, "appearance", APPEARANCE_VERSION)
    got = [ask(store, "cold-start", number).scan for number in range(5)]
    assert got == ["scan_4", "scan_0", "scan_3", "scan_1", "scan_2"]
    assert ask(store, "cold-start", 9).strategy == "uniform-random", "the others were never looked at"


def test_a_cold_start_counts_labels_that_are_there(store: Store) -> None:
    placed(store, {0: -10.0, 1: 0.1, 2: 9.0}, "appearance", APPEARANCE_VERSION)
    label(store, 0)
    assert ask(store, "cold-start").scan == "scan_2"


def test_the_appearance_is_noted_when_a_scan_is_taken_in_and_belongs_to_its_content(tmp_path: Path) -> None:
    dataset = Dataset(make_dataset(tmp_path / "s", scans=3, finals=1))
    with dataset.store.read() as transaction:
        assert set(features.versions(transaction, "appearance")) == {"scan_0", "scan_1", "scan_2"}
    write_scan(Volume(np.random.default_rng(9).normal(size=SHAPE).astype(np.float32), np.eye(4)),
               dataset.folder / "scan_1.nii.gz")  # fmt: skip
    dataset.sync()
    with dataset.store.read() as transaction:
        noted = features.versions(transaction, "appearance")
    assert len(noted) == 4 and sum(name.startswith("scan_1@") for name in noted) == 1


def test_the_appearance_depends_on_what_the_scan_shows_and_not_on_how_it_is_stored() -> None:
    scan, _ = draw_case(3)
    known = appearance(scan)
    assert known.shape == (18,) and np.isfinite(known).all()
    assert np.array_equal(known, appearance(scan))
    turned = Volume(scan.array[::-1].transpose(2, 0, 1).copy(), np.diag([4.0, 1.5, 1.5, 1.0]))
    assert appearance(turned) == pytest.approx(known, abs=1e-4)
    brighter = Volume((scan.array * 37 + 1000).astype(np.float32), scan.affine)
    assert appearance(brighter) == pytest.approx(known, abs=1e-3)
    others = [appearance(draw_case(i)[0]) for i in range(4, 8)]
    coarse = appearance(Volume(scan.array[::2, ::2].copy(), np.diag([3.0, 3.0, 4.0, 1.0])))
    scaled = standardised(np.stack([known, *others, coarse]))
    assert nearest(scaled[-1:], scaled[:1])[0] > nearest(scaled[:1], scaled[1:-1])[0]


@pytest.mark.parametrize("shape", [(1, 1, 1), (300, 2, 70), (5, 1, 9)])
def test_the_appearance_of_an_odd_scan_is_finite(shape: tuple[int, int, int]) -> None:
    for array in (np.zeros(shape, np.float32), np.full(shape, -1e30, np.float32)):
        assert np.isfinite(appearance(Volume(array, np.eye(4)))).all()


# --------------------------------------------------------------------------------------------------- class-stratified


def test_every_structure_leads_as_often_and_draws_become_greedy_with_the_rounds(store: Store) -> None:
    with store.write() as transaction:
        assessments.structure_ids(transaction, ["liver", "spleen", "absent"])
    scored(store, "class-stratified: liver", {i: -0.1 - i / 100 for i in range(20)})
    scored(store, "class-stratified: spleen", {25: -0.01})
    order = strategies()["class-stratified"].order

    def drawn(count: int = 300) -> Counter[int]:
        rng = np.random.default_rng(5)
        with store.read() as transaction:
            known = {scans.number_of(transaction, f"scan_{i}"): i for i in range(COUNT)}
            one = Strategy(name="one", description="", order=order)
            return Counter(known[preview(transaction, one, rng, 1)[0].scan_id] for _ in range(count))

    first = drawn()
    assert 110 < first[25] < 190, "half of the draws, though its entropy is small and there is one of it"
    assert len(first) > 15, "many scans at first"
    assert first[19] < 40
    with store.write() as transaction:
        for _ in range(8):
            finish_round(transaction)
    later = drawn()
    assert set(later) <= {25, 19, 18} and later[19] > 10 * later[18]
    assert drawn() == later, "the same generator draws the same"
    assert ask(store, "class-stratified").scan in ("scan_19", "scan_25", "scan_18")


def test_a_structures_entropy_is_that_of_its_own_voxels() -> None:
    labels = np.zeros((4, 4, 2), np.uint8)
    labels[0], labels[1, 0, 0] = 1, 4
    p = np.zeros((3, 4, 4, 2), np.float32)
    p[0], p[1, 0], p[0, 0] = 1.0, 1.0, 0.0  # sure of background and liver
    p[:, 1, 0, 0] = [0.5, 0.0, 0.5]
    p[:, 3] = np.array([0.4, 0.3, 0.3])[:, None, None]  # unsure of background, which is no structure
    prediction = TtaPrediction(Volume(labels, np.eye(4)), (), p)
    structures = (Structure("liver", (1,)), Structure("spleen", (4,)), Structure("kidney", (9,)))
    found = structure_certainties(prediction, structures)
    assert found == pytest.approx({"liver": 0.0, "spleen": -np.log(2)}, abs=1e-3)
    assert least_certainty(prediction, structures) == pytest.approx(-np.log(2), abs=1e-3)
    empty = TtaPrediction(Volume(np.zeros_like(labels), np.eye(4)), (), p)
    assert (structure_certainties(empty, structures), least_certainty(empty, structures)) == ({}, 0.0)


# ------------------------------------------------------------------------------------------------------------ ensemble


def test_the_ensemble_agrees_as_far_as_its_worst_structure() -> None:
    rng = np.random.default_rng(0)
    members = [rng.integers(0, 3, (6, 5, 4)).astype(np.uint8) for _ in range(3)]
    structures = (Structure("a", (1,)), Structure("b", (2,)), Structure("none", (7,)))

    def dice(value: int) -> float:
        pairs = [(members[i] == value, members[j] == value) for i, j in ((0, 1), (0, 2), (1, 2))]
        return float(np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs]))

    assert ensemble_agreement(members, structures) == pytest.approx(min(dice(1), dice(2)))
    assert ensemble_agreement([members[0]] * 2, structures) == 1.0
    with pytest.raises(ValueError, match="two networks"):
        ensemble_agreement(members[:1], structures)


def test_the_lowest_agreement_of_the_ensemble_comes_first(store: Store) -> None:
    scored(store, "ensemble", {0: 0.9, 1: 0.2, 2: 0.5})
    assert [ask(store, "ensemble", number).scan for number in range(3)] == ["scan_1", "scan_2", "scan_0"]


# --------------------------------------------------------------------------------------------------- previews and HTTP


@pytest.mark.parametrize("name", ["segqc", "segqc-diverse", "expected-gain-diverse", "cold-start", "sequential"])
def test_a_preview_is_what_annotators_get_one_after_the_other(store: Store, name: str) -> None:
    ranked(store, [0.9 - i / 100 for i in range(20)])
    scored(store, "expected-gain", {i: -float(i % 7) for i in range(20)})
    for kind, version in (("segmenter", "seg1"), ("appearance", APPEARANCE_VERSION)):
        placed(store, {i: float((i * 7) % 23) for i in range(20)}, kind, version)
    label(store, 3)
    first = ask(store, name)
    with store.read() as transaction:
        choices = preview(transaction, strategies()[name], np.random.default_rng(0), 6)
        names = scans.names_of(transaction, [choice.scan_id for choice in choices])
    wanted = [names[choice.scan_id] for choice in choices]
    assert first.scan not in wanted
    assert wanted == [ask(store, name, 1 + number).scan for number in range(6)]


@pytest.fixture(scope="module")
def scored_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four assessed scans that wait, with features and scores of every kind."""
    folder = make_dataset(tmp_path_factory.mktemp("scored") / "studies", scans=4, finals=0)
    (folder / "segqc.toml").write_text((folder / "segqc.toml").read_text() + "validation_share = 0.0\n" + NO_DRAWS)
    number = add_models(folder)
    made = Dataset(folder)
    segmenter = made.segmenter()
    assert segmenter is not None
    for i, dice in enumerate((0.9, 0.4, 0.7, 0.95)):
        assess(made, f"scan_{i}", dice, number=number)
        made.write_features(f"scan_{i}", segmenter.version, np.array([[i, i * i, 1.0]]))
        for method in ("tta", "entropy", "ensemble", "class-stratified"):
            by_structure = {"liver": -0.3, "spleen": -0.2} if method == "class-stratified" else {}
            made.write_score(method, f"scan_{i}", -i / 10, segmenter.version, by_structure=by_structure)
    made.store.close()
    return folder


@pytest.fixture
def dataset(scored_folder: Path, tmp_path: Path) -> Dataset:
    """A copy of it to write into."""
    return Dataset(shutil.copytree(scored_folder, tmp_path / "studies"))


@pytest.mark.parametrize("name", sorted(strategies()))
def test_every_strategy_can_be_ranked_by_its_name(dataset: Dataset, name: str) -> None:
    listed = CliRunner().invoke(app, ["rank", str(dataset.folder), "--method", name, "--json"])
    assert listed.exit_code == 0, listed.output
    rows = json.loads(listed.output)["scans"]
    by = {row["ordered by"] for row in rows}
    assert by == {"uniform-random" if name == "unlikeness" else name}, "nobody knows how unlike these scans are"
    assert sorted(row["scan"] for row in rows) == [f"scan_{i}" for i in range(4)]
    table = CliRunner().invoke(app, ["rank", str(dataset.folder), "--method", name])
    assert table.exit_code == 0 and "scan_2" in table.output


def test_a_rank_of_what_has_no_score_lists_so_many_and_compares_nothing(dataset: Dataset) -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["rank", str(dataset.folder), "--method", "segqc-diverse", "--first", "2", "--json"])
    rows = json.loads(listed.output)["scans"]
    assert [row["scan"] for row in rows] == ["scan_1", "scan_3"] and rows[0]["estimated Dice"] == pytest.approx(0.4)
    refused = runner.invoke(app, ["rank", str(dataset.folder), "--method", "cold-start", "--all"])
    assert "for strategies with a score, and cold-start has none" in str(refused.exception)
    unknown = runner.invoke(app, ["rank", str(dataset.folder), "--method", "best"])
    assert unknown.exit_code == 2 and "there is no strategy 'best'" in " ".join(unknown.output.split())


def test_clients_get_a_scan_by_every_strategy(dataset: Dataset) -> None:
    pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")
    from tests.server_kit import serving

    with serving(dataset.folder) as client:
        told = client.get("/info/").json()
        assert set(strategies()) <= set(told["strategies"])
        assert {"segqc", "tta", "entropy", "ensemble", "class-stratified"} == set(told["scoring"])
        for number, name in enumerate(strategies()):
            answer = client.post(f"/activelearning/{name}", json={"client_id": f"reader {number}"}).json()
            assert answer["requested_strategy"] == name
            assert answer["strategy"] == ("uniform-random" if name == "unlikeness" else name)
            assert ("note" in answer) == (name == "unlikeness")
            with dataset.store.write() as transaction:
                leases.release(transaction, answer["id"], ANNA)
        assert client.post("/activelearning/best", json={}).status_code == 404


def test_a_new_scan_file_is_ready_for_a_cold_start_at_once(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "s", scans=5, finals=0)
    listed = CliRunner().invoke(app, ["rank", str(folder), "--method", "cold-start", "--json"])
    rows = json.loads(listed.output)["scans"]
    assert len(rows) >= 3 and {row["ordered by"] for row in rows} == {"cold-start"}
    assert rows[0]["score"] is None and rows[1]["score"] < 0
    assert read_scan(folder / f"{rows[0]['scan']}.nii.gz").shape == SHAPE
