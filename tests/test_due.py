"""Rounds that begin by themselves: when one is due, that it is put once, and the table of rounds."""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from typer.testing import CliRunner

from segqc.cli import main
from segqc.loop.dataset import Dataset
from segqc.loop.due import (
    DueRound,
    last_time_of_day,
    next_round_sentence,
    outlook_of,
    put_due_round,
    put_first_trainings,
    rounds_info,
    why_due,
)
from segqc.loop.requests import NETWORKS, TrainRequest, TrainResult, result_to_json
from segqc.loop.rounds import summaries
from segqc.loop.worker import Worker
from segqc.quality.stopping import outlook, outlook_sentence
from segqc.selection import segqc as worst_first
from segqc.settings import RoundSettings, Settings, load_settings
from segqc.store import bundles, corrections, jobs, labels, leases, rounds
from segqc.store.bundles import NewBundle
from segqc.store.events import SERVER
from segqc.store.labels import NewLabel
from segqc.store.leases import LeaseRules
from segqc.store.records import Actor, Change, JobRecord, LabelledSince, StructureChange
from segqc.store.store import LabelChange, Store
from segqc.types import MaskDice, Metrics
from tests.server_kit import make_assessment, make_dataset
from tests.store_kit import (
    ANNA,
    BERT,
    Clock,
    answer_lease,
    bundle,
    label_map,
    make_scans,
    save_final,
    save_mask,
    sync_scans,
    write_assessment,
)
from tests.test_stopping import FLAT

COUNT = 24
FIRST = [TrainRequest(model=network) for network in NETWORKS]
AFTER = Settings(round=RoundSettings(after_corrections=3), training={"min_cases": 1})
AUDIT = LeaseRules(audit_share=1.0, validation_share=0.0, repeat_seconds=0)
NOON = dt.datetime(2026, 1, 2, 12, tzinfo=dt.UTC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_scans(tmp_path / "studies", COUNT)
    return tmp_path / "studies"


@pytest.fixture
def store(folder: Path, url: str | None, clock: Clock) -> Iterator[Store]:
    opened = Store.open(folder, url, clock=clock)
    sync_scans(opened)
    yield opened
    opened.close()


def label(store: Store, clock: Clock, *scans: int) -> None:
    for i in scans:
        clock.pass_(seconds=1)
        save_final(store, store.dataset.parent, f"scan_{i}", i + 1)


def due(store: Store, settings: Settings = AFTER) -> str | None:
    put = put_due_round(store, settings).job
    return None if put is None else put.reason


def do_round(
    store: Store,
    clock: Clock,
    job: int,
    labelled: int,
    validation: tuple[MaskDice, ...] = (),
    *,
    bundle: int | None = None,
) -> int:
    """A round of a job, from its claim to its end."""
    clock.pass_(seconds=1)
    with store.write() as transaction:
        jobs.claim(transaction, "w1", ("round",))
        number, _ = jobs.begin_round(transaction, job, labelled)
    clock.pass_(minutes=3)
    trained = TrainResult(
        network="segmentation", scores={"dice": 0.8}, used=labelled, left_out={}, validation=validation
    )
    with store.write() as transaction:
        jobs.finish_step(transaction, number, "train segmentation", result_to_json(trained))
        if bundle is not None:
            jobs.finish_step(transaction, number, "publish", {"bundle": bundle}, bundle=bundle)
        jobs.finish_round(transaction, number)
        jobs.finish(transaction, job, "w1", "done")
    return number


def open_round(store: Store) -> JobRecord:
    with store.read() as transaction:
        (job,) = jobs.open_jobs(transaction, "round")
    return job


# ------------------------------------------------------------------------------------------------------------- when


@pytest.mark.parametrize(
    ("scans", "first_at", "settings", "reason"),
    [
        (20, NOON, RoundSettings(after_corrections=20), "20 corrections since round 3"),
        (19, NOON, RoundSettings(after_corrections=20), None),
        (500, NOON, RoundSettings(), None),
        (0, None, RoundSettings(after_corrections=1, at=dt.time(2)), None),
        (1, NOON - dt.timedelta(hours=11), RoundSettings(at=dt.time(2)), "02:00 o'clock, 1 correction since round 3"),
        (1, NOON - dt.timedelta(hours=9), RoundSettings(at=dt.time(2)), None),  # it came at 3: for the next night
        (1, NOON - dt.timedelta(days=3), RoundSettings(at=dt.time(13)), "13:00 o'clock, 1 correction since round 3"),
        (1, NOON + dt.timedelta(hours=1), RoundSettings(at=dt.time(13)), None),  # a clock that is a little ahead
        (1, NOON + dt.timedelta(days=9), RoundSettings(at=dt.time(13)), "13:00 o'clock, 1 correction since round 3"),
    ],
)
def test_a_round_is_due_after_corrections_or_at_a_time_of_day(
    scans: int, first_at: dt.datetime | None, settings: RoundSettings, reason: str | None
) -> None:
    assert why_due(LabelledSince(scans=scans, first_at=first_at), 3, settings, NOON, dt.UTC) == reason


@pytest.mark.parametrize(
    ("now", "at", "last"),
    [
        ("2026-01-02T12:00", "12:00", "2026-01-02T12:00"),
        ("2026-01-02T11:59", "12:00", "2026-01-01T12:00"),
        ("2026-01-02T00:30", "23:00", "2026-01-01T23:00"),
        ("2026-03-29T03:30", "02:00", "2026-03-29T03:00"),  # clocks went from 2 to 3
        ("2026-10-25T12:00", "04:00", "2026-10-25T04:00"),  # clocks went from 3 to 2
    ],
)
def test_the_time_of_day_is_the_local_one(now: str, at: str, last: str) -> None:
    zone = ZoneInfo("Europe/Berlin")
    found = last_time_of_day(
        dt.datetime.fromisoformat(now).replace(tzinfo=zone).astimezone(dt.UTC), dt.time.fromisoformat(at), zone
    )
    assert found == dt.datetime.fromisoformat(last).replace(tzinfo=zone).astimezone(dt.UTC)


def test_a_time_of_day_that_the_clocks_were_put_past_at_midnight_was_the_day_before() -> None:
    now = dt.datetime(2026, 3, 29, 1, 10, tzinfo=dt.UTC)  # ten past midnight; at 23:00 it became midnight
    found = last_time_of_day(now, dt.time(23, 30), ZoneInfo("America/Scoresbysund"))
    assert found == dt.datetime(2026, 3, 28, 1, 30, tzinfo=dt.UTC)


def test_a_due_round_is_put_with_who_and_why_and_never_beside_another_one(store: Store, clock: Clock) -> None:
    label(store, clock, 0, 1)
    assert due(store) is None
    label(store, clock, 2)
    assert due(store, Settings(training={"min_cases": 1})) is None, "off by default"
    assert due(store) == "by the settings: 3 corrections before the first round"
    assert (open_round(store).actor, open_round(store).request) == (SERVER, {})
    label(store, clock, 3, 4, 5)
    assert due(store) is None, "one is open"
    with store.write() as transaction:
        jobs.claim(transaction, "w1", ("round",))
    assert due(store) is None, "one runs"


def test_what_comes_while_a_round_runs_counts_for_the_next_one(store: Store, clock: Clock) -> None:
    label(store, clock, 0, 1, 2)
    assert due(store) is not None
    job = open_round(store).id
    label(store, clock, 3)  # before it begins: it trains on it
    clock.pass_(seconds=1)
    with store.write() as transaction:
        jobs.claim(transaction, "w1", ("round",))
        number, _ = jobs.begin_round(transaction, job, 4)
    label(store, clock, 4, 5)
    with store.write() as transaction:
        jobs.finish_round(transaction, number)
        jobs.finish(transaction, job, "w1", "done")
    label(store, clock, 5)  # the same scan once more
    assert due(store) is None
    label(store, clock, 6)
    assert due(store) == f"by the settings: 3 corrections since round {number}"


def served(store: Store, segmenter: int | None, assessor: int | None) -> None:
    """A bundle serves whose networks were trained with the labels up to these."""
    with store.write() as transaction:
        number = bundles.last_number(transaction) + 1
        new = NewBundle(
            id=number,
            segmenter_version=f"seg{number}",
            assessor_version=None if assessor is None else f"qc{number}",
            manifest_sha256="0" * 64,
            reason="a training",
            segmenter_newest_label=segmenter,
            assessor_newest_label=assessor,
        )
        bundles.add(transaction, new, SERVER)
        bundles.serve(transaction, number, SERVER)


def test_corrections_and_imported_labels_are_told_apart_and_both_count(
    store: Store, folder: Path, clock: Clock
) -> None:
    label(store, clock, 0)
    imported = NewLabel("scan_1", "final", "import", ANNA)
    store.save_label(imported, label_map(folder.parent / "incoming.nii.gz", 1))
    with store.read() as transaction:
        waiting, info = rounds.labelled_since(transaction, 0), rounds_info(transaction, AFTER.round)
    assert (waiting.scans, info.corrections, info.imported) == (2, 1, 1)
    assert "1 new correction, and 1 imported label" in next_round_sentence(info)
    settings = RoundSettings(after_corrections=2)
    assert why_due(waiting, None, settings, clock.now) == "1 correction and 1 imported label before the first round"


def test_labels_that_both_networks_of_a_bundle_were_trained_with_are_no_corrections(store: Store, clock: Clock) -> None:
    def waiting() -> int:
        with store.read() as transaction:
            return rounds_info(transaction, AFTER.round).corrections

    label(store, clock, 0, 1, 2, 3)
    served(store, 4, None)
    assert waiting() == 4, "SegQC-Net knows none of them"
    served(store, 4, 2)
    assert waiting() == 2
    served(store, 4, 4)
    assert due(store) is None, "as after the first start of a server, which has trained both"
    with store.write() as transaction:
        bundles.serve(transaction, 2, ANNA)
    assert due(store) is None, "after a rollback the same labels would be trained on once more"
    label(store, clock, 4, 5)
    assert due(store) is None
    label(store, clock, 6)
    assert due(store) == "by the settings: 3 corrections before the first round"


def test_no_round_is_put_while_a_training_is_open_that_may_know_the_labels(store: Store, clock: Clock) -> None:
    label(store, clock, 0, 1, 2)
    put_first_trainings(store, FIRST)
    assert due(store) is None, "it waits"
    with store.write() as transaction:
        job = jobs.claim(transaction, "w1", ("train",))
    assert job is not None
    assert due(store) is None, "it runs"
    with store.write() as transaction:
        jobs.finish(transaction, job.id, "w1", "failed")
        jobs.stop(transaction, jobs.open_jobs(transaction, "train")[0].id, ANNA)
    assert due(store) is not None, "nothing came of them"


@pytest.mark.parametrize("state", ["none", "by the settings", "by the settings, runs", "by hand"])
def test_the_first_networks_are_trained_once(store: Store, clock: Clock, state: str) -> None:
    label(store, clock, 0, 1, 2)
    if state == "by hand":
        with store.write() as transaction:
            jobs.enqueue(transaction, "round", {}, ANNA)
    elif state != "none":  # a worker was faster than the server's first look
        assert due(store) is not None
    if state.endswith("runs"):
        with store.write() as transaction:
            jobs.claim(transaction, "w1", ("round",))
    for _ in range(2):
        put_first_trainings(store, FIRST)
    with store.read() as transaction:
        trained = [job.request["model"] for job in jobs.open_jobs(transaction, "train")]
        is_open = bool(jobs.open_jobs(transaction, "round"))
    by_round = state in ("by hand", "by the settings, runs")
    assert trained == ([] if by_round else ["segmentation", "segqc"])
    assert is_open == by_round


def test_only_people_s_labels_that_stand_are_corrections(store: Store, folder: Path, clock: Clock) -> None:
    label(store, clock, 0, 1, 2)
    clock.pass_(seconds=1)
    store.review("scan_0", "rejected", BERT, "not good")
    store.remove_label("scan_1", "final", ANNA)
    network = Actor(kind="network", name="seg1", identified_by="program")
    pair = bundle(store)
    for i in (3, 4, 5):
        pseudo = NewLabel(f"scan_{i}", "final", "pseudo-label", network, bundle=pair.id)
        store.save_label(pseudo, label_map(folder.parent / "incoming.nii.gz", i))
    with store.read() as transaction:
        assert rounds.labelled_since(transaction, 0).scans == 1
    assert due(store) is None


@pytest.mark.parametrize("end", ["failed", "stopped", "stopped in the queue"])
def test_a_round_that_failed_or_was_stopped_is_not_put_again_at_once(store: Store, clock: Clock, end: str) -> None:
    label(store, clock, 0, 1, 2)
    assert due(store) is not None
    job = open_round(store).id
    with store.write() as transaction:
        if end == "stopped in the queue":
            jobs.stop(transaction, job, ANNA)
        else:
            jobs.claim(transaction, "w1", ("round",))
            jobs.finish(transaction, job, "w1", "failed" if end == "failed" else "stopped")
    assert due(store) is None
    label(store, clock, 3, 4, 5)
    assert due(store) == "by the settings: 3 corrections before the first round", "none has begun"


@pytest.mark.parametrize("hours", [-9000, -1, 1, 9000])
def test_a_clock_that_is_set_neither_stops_rounds_nor_repeats_them(store: Store, clock: Clock, hours: int) -> None:
    label(store, clock, 0, 1, 2)
    clock.pass_(hours=hours)
    assert due(store) is not None
    do_round(store, clock, open_round(store).id, 3)
    assert due(store) is None, "the labels of before are no news"
    clock.pass_(hours=hours)
    label(store, clock, 3, 4)
    assert due(store) is None
    label(store, clock, 5)
    assert due(store) == "by the settings: 3 corrections since round 1"


def test_a_round_that_no_training_could_do_is_not_put(store: Store, clock: Clock) -> None:
    label(store, clock, 0, 1, 2)
    settings = Settings(round=RoundSettings(after_corrections=1))
    assert due(store, settings) is None, "min_cases is 4"
    label(store, clock, 3)
    assert due(store, settings) is not None


def test_many_workers_put_one_round(store: Store, folder: Path, url: str | None, clock: Clock) -> None:
    label(store, clock, 0, 1, 2)
    stores = [Store.open(folder, url, clock=clock) for _ in range(6)]
    with ThreadPoolExecutor(len(stores)) as pool:
        put = list(pool.map(lambda one: put_due_round(one, AFTER).job, stores))
    for one in stores:
        one.close()
    assert [job for job in put if job is not None] == [open_round(store)]


# ---------------------------------------------------------------------------------------------------------- the worker


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    folder = make_dataset(tmp_path / "studies", scans=6, finals=5)
    with (folder / "segqc.toml").open("a") as file:
        file.write("\n[round]\nafter_corrections = 5\n")
    return Dataset(folder)


def command(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


DONE = "print('{\"result\": {}}')"


def test_a_worker_puts_and_does_what_is_due_and_one_that_comes_later_nothing(dataset: Dataset) -> None:
    Worker(dataset, command=lambda _: command(DONE)).serve(until_idle=True)
    Worker(dataset, command=lambda _: command(DONE)).serve(until_idle=True)
    with dataset.store.read() as transaction:
        (done,) = jobs.listing(transaction, "round")
    assert (done.state, done.reason) == ("done", "by the settings: 5 imported labels before the first round")


def test_an_interrupted_round_goes_on_after_a_restart_and_is_not_put_twice(dataset: Dataset) -> None:
    killed = command("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    first = Worker(dataset, command=lambda _: killed)
    first._retry = lambda *_: first.end()  # type: ignore[method-assign]  # it dies with its job
    first.serve(until_idle=True)
    with dataset.store.write() as transaction:
        (interrupted,) = jobs.listing(transaction, "round")
        jobs.give_back(transaction, first.name)
    assert interrupted.state == "running"
    Worker(Dataset(dataset.folder), command=lambda _: command(DONE)).serve(until_idle=True)
    with dataset.store.read() as transaction:
        (done,) = jobs.listing(transaction, "round")
    assert (done.id, done.state) == (interrupted.id, "done")


def test_a_worker_says_once_why_no_round_begins(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = iter([outlook((), FLAT, labels, enough_dice=0.95) for labels in (5, 6, 7)])
    monkeypatch.setattr("segqc.loop.worker.DUE_SECONDS", 0.0)
    monkeypatch.setattr("segqc.loop.worker.POLL_SECONDS", 0.0)
    worker = Worker(dataset)

    def put(*_: object) -> DueRound:
        stopped = next(found, None)
        if stopped is None:
            worker.end()
        return DueRound(stopped=stopped)

    monkeypatch.setattr("segqc.loop.worker.put_due_round", put)
    with caplog.at_level("INFO"):
        worker.serve()
    (line,) = [m for m in caplog.messages if m.startswith("no round begins by itself")]
    assert "before 20 new labels have come (5 have)" in line


def test_a_worker_reads_the_settings_of_rounds_anew_each_time(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("segqc.loop.worker.DUE_SECONDS", 0.0)
    monkeypatch.setattr("segqc.loop.worker.POLL_SECONDS", 0.0)
    file = dataset.folder / "segqc.toml"
    usable = file.read_text()
    states = iter([usable.replace("= 5", "= 6"), "[round]\nafter = 1", "[round]\nafter = 1", usable])

    def read() -> Settings:
        file.write_text(next(states))
        return load_settings(dataset.folder)

    worker = Worker(dataset, settings=read, command=lambda _: command(DONE))
    monkeypatch.setattr(worker, "_run", worker.end)
    worker.serve()
    with dataset.store.read() as transaction:
        (put,) = jobs.listing(transaction, "round")
    assert put.reason == "by the settings: 5 imported labels before the first round"
    (line,) = [m for m in caplog.messages if m.startswith("no round begins by itself")]
    assert "[round] has no setting 'after'" in line


@pytest.mark.parametrize("kinds", [("train",), ("scoring", "batch_infer")])
def test_a_worker_of_other_jobs_puts_no_round(dataset: Dataset, kinds: tuple[str, ...]) -> None:
    Worker(dataset, kinds, command=lambda _: command(DONE)).serve(until_idle=True)
    with dataset.store.read() as transaction:
        assert jobs.listing(transaction, "round") == []


def test_a_round_by_hand_puts_no_other_one(dataset: Dataset) -> None:
    with dataset.store.write() as transaction:
        job = jobs.enqueue(transaction, "round", {}, ANNA)
    Worker(dataset, ("round",), command=lambda _: command(DONE)).serve_until_ended(job.id)
    with dataset.store.read() as transaction:
        assert [(j.id, j.reason) for j in jobs.listing(transaction, "round")] == [(job.id, None)]


# ------------------------------------------------------------------------------------------------------------ stopping


def correct(store: Store, clock: Clock, dice: float, count: int, *, simulated: bool = False) -> None:
    """Take audit draws and correct them; their masks had this Dice."""
    parts = (("liver", Metrics(dice, dice / (2 - dice), 0.1, 0.0)), ("spleen", Metrics(1.0, 1.0, 0.0, 0.0)))
    change = Change(
        through_plane_axis=2,
        voxels_changed=3,
        slices_changed=1,
        structures=tuple(StructureChange(name=n, metrics=m, voxels_changed=3, slices=()) for n, m in parts),
    )
    for _ in range(count):
        clock.pass_(seconds=1)
        with store.write() as transaction:
            lease = leases.acquire(transaction, ANNA, "segqc", worst_first.order, AUDIT)
        assert lease is not None
        assert lease.draw == "audit"
        path = label_map(store.dataset.parent / "incoming.nii.gz", lease.id + 30)
        final = NewLabel(lease.scan, "final", "annotator", ANNA)
        with store.change_labels([LabelChange(final, path)]) as changing:
            answered = answer_lease(changing.transaction, lease.scan, ANNA)
            start = labels.get(changing.transaction, lease.label_version or 0)
            corrections.add(
                changing.transaction, start, changing.versions[0], change, ANNA, lease=answered, simulated=simulated
            )


def masked(store: Store, segmenter: str = "seg1") -> None:
    """Masks of all scans, with estimates of 0.9."""
    for i in range(COUNT):
        mask = save_mask(store, store.dataset.parent, f"scan_{i}", i + 1, segmenter)
        with store.write() as transaction:
            write_assessment(transaction, make_assessment(f"scan_{i}", 0.9), mask.id)


@pytest.mark.parametrize("simulated", [False, True])
def test_no_round_is_put_while_the_masks_that_serve_are_good_enough(
    store: Store, clock: Clock, simulated: bool
) -> None:
    masked(store)
    correct(store, clock, 0.97, 9, simulated=simulated)
    held = put_due_round(store, AFTER)
    assert held.job is None
    assert held.stopped is not None
    assert "9 patients drawn at random" in outlook_sentence(held.stopped)
    with store.read() as transaction:
        info = rounds_info(transaction, AFTER.round)
    assert (info.stopped, info.corrections, info.message) == ("good enough", 9, outlook_sentence(held.stopped))
    assert info.simulated == (9 if simulated else 0)
    correct(store, clock, 0.4, 2, simulated=simulated)
    count = "11 corrections (11 simulated)" if simulated else "11 corrections"
    assert due(store) == f"by the settings: {count} before the first round", "bad masks among them resume it"


def test_audits_of_masks_that_do_not_serve_any_more_say_nothing(store: Store, clock: Clock) -> None:
    masked(store)
    correct(store, clock, 0.97, 9)
    bundle(store, "seg2")
    with store.read() as transaction:
        assert outlook_of(transaction, AFTER.round).audited == 0
    assert due(store) is not None


def test_people_s_audits_are_not_mixed_with_simulated_ones(store: Store, clock: Clock) -> None:
    masked(store)
    correct(store, clock, 0.97, 9, simulated=True)
    correct(store, clock, 0.5, 1)
    with store.read() as transaction:
        assert outlook_of(transaction, AFTER.round).audited == 1


def test_rounds_within_noise_are_put_again_after_more_labels(store: Store, clock: Clock) -> None:
    same = tuple(MaskDice(patient=f"p{i}", scan=f"s{i}", dice=0.8) for i in range(10))
    for i in range(3):
        with store.write() as transaction:
            job = jobs.enqueue(transaction, "round", {}, ANNA).id
        do_round(store, clock, job, 10 + 2 * i, same)
    label(store, clock, 0, 1, 2)
    held = put_due_round(store, AFTER)
    assert held.stopped is not None
    assert "before 4 new labels have come (3 have)" in outlook_sentence(held.stopped)
    with store.write() as transaction:
        by_hand = jobs.enqueue(transaction, "round", {}, ANNA).id
        jobs.stop(transaction, by_hand, ANNA)  # whoever asks for one gets it
    clock.pass_(seconds=1)
    label(store, clock, 3, 4, 5, 6)
    assert due(store) == "by the settings: 4 corrections since round 3"


# ----------------------------------------------------------------------------------------------------------- the table


@pytest.fixture
def told(store: Store, clock: Clock) -> Store:
    """A folder with a round that published, one whose bundle is held, one that failed, and one that waits."""
    masked(store)
    label(store, clock, 0, 1, 2)
    assert due(store) is not None
    do_round(store, clock, open_round(store).id, 3, bundle=1)
    correct(store, clock, 0.8, 2)
    with store.write() as transaction:
        job = jobs.enqueue(transaction, "round", {}, ANNA).id
        new = NewBundle(
            id=2, segmenter_version="seg2", assessor_version="qc2", manifest_sha256="0" * 64, reason="round 2", parent=1
        )
        bundles.add(transaction, new, ANNA)
        bundles.hold(transaction, 2, "its masks are worse", ANNA)
    do_round(store, clock, job, 5, bundle=2)
    with store.write() as transaction:
        jobs.enqueue(transaction, "round", {}, BERT)
        failing = jobs.claim(transaction, "w1", ("round",))
        assert failing is not None
        jobs.begin_round(transaction, failing.id, 5)
        jobs.finish(transaction, failing.id, "w1", "failed", messages=["the disk is full"])
        jobs.enqueue(transaction, "round", {}, BERT)
    return store


def test_a_round_is_told_with_what_it_was_made_of_and_what_came_of_it(told: Store) -> None:
    with told.read() as transaction:
        first, second, third, waiting = summaries(transaction)
        assert summaries(transaction, simulated=True)[0].audited == 0
    assert (first.number, first.actor, first.reason) == (
        1,
        SERVER,
        "by the settings: 3 corrections before the first round",
    )
    assert (first.state, first.labelled, first.validation_dice, first.minutes) == ("done", 3, 0.8, 3.0)
    assert (first.bundle, first.bundle_state, first.audited) == (1, "serves", 2)
    assert first.audit_error == pytest.approx(0.1), "0.9 was estimated, 0.8 is true"
    assert (second.actor, second.reason, second.bundle_state) == (ANNA, None, "held")
    assert (second.held_because, second.audited, second.audit_error) == ("its masks are worse", 0, None)
    assert (third.number, third.state, third.problem, third.bundle) == (3, "failed", "the disk is full", None)
    assert (waiting.number, waiting.state, waiting.minutes, waiting.labelled) == (None, "queued", None, None)


def listed(folder: Path, *flags: str) -> str:
    result = CliRunner().invoke(main.app, ["rounds", str(folder), *flags])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("url", [None])
def test_the_command_prints_a_row_a_round_and_whether_more_are_worth_it(told: Store, url: None) -> None:
    table = listed(told.dataset)
    for words in ("by the settings: 3 corrections", "by anna", "2 held: its masks are worse", "disk is full"):
        assert words in table
    assert "No round begins by itself ([round] in segqc.toml); " in table
    assert "Nobody can tell yet whether more rounds are worth it" in table
    body = json.loads(listed(told.dataset, "--json"))
    assert [row["round"] for row in body["rounds"]] == [1, 2, 3, None]
    assert body["next"]["stopped"] is None
    rows = list(csv.DictReader(io.StringIO(listed(told.dataset, "--csv"))))
    assert [row["state"] for row in rows] == ["done", "done", "failed", "queued"]
    assert rows[0]["minutes"] == "3.0"


def test_a_folder_without_rounds_says_how_they_begin(tmp_path: Path) -> None:
    make_scans(tmp_path / "new", 1)
    (tmp_path / "new" / "segqc.toml").write_text('[round]\nafter_corrections = 20\nat = "2:00"\n')
    table = listed(tmp_path / "new")
    assert "No round was ever begun here" in table
    assert "The next round begins by itself after 20 corrections or at 02:00; 0 new corrections." in table
