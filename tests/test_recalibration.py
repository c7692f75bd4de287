"""Intervals from audit draws: only random draws of the current networks count, and what was shown stays shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from segqc.cli import main
from segqc.loop.dataset import Dataset
from segqc.loop.recalibration import audit, use
from segqc.loop.scoring import keep_mask
from segqc.loop.submission import Opened, submit_label
from segqc.networks.assessor import Assessor
from segqc.networks.bundle import FOLDS
from segqc.networks.model import ModelError
from segqc.networks.segmenter import Segmenter
from segqc.quality.calibration import MaskCalibration, StructureCalibration
from segqc.quality.intervals import StructureIntervals, split_conformal
from segqc.quality.stacking import ChosenEstimate, EstimateModel
from segqc.selection import segqc as worst_first
from segqc.store import assessments, bundles, corrections, leases
from segqc.store.events import SERVER
from segqc.store.leases import LeaseRules
from segqc.store.records import Actor
from segqc.types import MetricIntervals, Metrics, PredictionInterval
from segqc.volumes import Volume
from tests.server_kit import add_models, draw_case, make_assessment, make_dataset

ANNA = Actor(kind="person", name="anna", identified_by="client-id")
LINE = EstimateModel("identity", 0.1, {"map": 0.8})
AUDIT, WORST = LeaseRules(audit_share=1.0, validation_share=0.0), LeaseRules(audit_share=0.0, validation_share=0.0)
WIDE = MetricIntervals(dice=PredictionInterval(0.0, 1.0, 0.9))


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of scans that all have a mask and an assessment."""
    folder = make_dataset(tmp_path_factory.mktemp("judged"), scans=12, finals=0)
    add_models(folder)
    made = Dataset(folder)
    assessor = made.assessor()
    assert assessor is not None
    served = MaskCalibration(dice=ChosenEstimate(LINE, "line"))
    known = StructureCalibration({"served": served, "strange": MaskCalibration()})
    card = replace(assessor.card, calibration=(known, known), seen=())
    with made.bundles.workspace() as work:
        Assessor(card, assessor.network).save(work / "segqc.pt")
        segmenter = made.segmenter()
        assert segmenter is not None
        Segmenter.save_members([segmenter, segmenter], work / FOLDS)
        made.bundles.publish({"segqc": work / "segqc.pt"}, SERVER, "a test")
    for i in range(12):
        judge(made, f"scan_{i}", 0.5 + i / 50)
    made.store.close()
    return folder


@pytest.fixture
def dataset(judged: Path, tmp_path: Path) -> Dataset:
    """A copy of it to write into."""
    return Dataset(shutil.copytree(judged, tmp_path / "s"))


def judge(dataset: Dataset, scan: str, dice: float) -> None:
    """A mask of the segmentation network, and an assessment of it that SegQC-Net might have made."""
    bundle = dataset.bundle()
    assert bundle is not None
    truth = draw_case(int(scan.removeprefix("scan_")))[1]
    mask = keep_mask(dataset, scan, Volume(np.roll(truth.array, 2, axis=0), truth.affine), bundle)
    made = make_assessment(scan, dice)
    raw = Metrics((dice - 0.1) / 0.8, 0.5, 0.1, 0.0)
    quality = replace(made.structures[0], raw=replace(made.structures[0].raw, metrics=raw), intervals=WIDE)
    made = replace(made, structures=(quality, replace(quality, name="spleen")), mask_kind="served")
    dataset.write_assessment(made, mask, bundle.number)


def correct(dataset: Dataset, rules: LeaseRules, count: int, opened: Opened | None = None) -> list[str]:
    """Take scans and submit their truths."""
    done = []
    for _ in range(count):
        with dataset.store.write() as transaction:
            lease = leases.acquire(transaction, ANNA, "segqc", worst_first.order, rules)
        assert lease is not None
        truth = draw_case(int(lease.scan.removeprefix("scan_")))[1]
        submit_label(dataset, lease.scan, truth, "final", ANNA, opened=opened or Opened())
        done.append(lease.scan)
    return done


def model(dataset: Dataset) -> Assessor:
    found = dataset.assessor()
    assert found is not None
    return found


def estimates(dataset: Dataset, scans: Sequence[str]) -> list[float]:
    return [0.5 + int(scan.removeprefix("scan_")) / 50 for scan in scans]


def test_residuals_are_of_audit_draws_and_of_the_estimate_that_was_shown(dataset: Dataset) -> None:
    worst = correct(dataset, WORST, 2)
    audited = correct(dataset, AUDIT, 9)
    assert len({*worst, *audited}) == 11
    liver, spleen = audit(dataset, model(dataset))
    assert (liver.structure, liver.patients, liver.estimates) == ("liver", 9, 9)
    assert (spleen.patients, spleen.with_interval, spleen.covered) == (9, 9, 9)
    with dataset.store.read() as transaction:
        truths = {c.scan: c.change.structures[0].metrics.dice for c in corrections.listing(transaction)}
    said = estimates(dataset, audited)
    true = [truths[scan] for scan in audited]
    assert liver.mean_error == pytest.approx(np.mean([abs(e - t) for e, t in zip(said, true, strict=True)]))  # type: ignore[operator]
    wanted = split_conformal(said, true, audited, "dice", LINE)
    assert liver.intervals is not None
    assert liver.intervals.drawn == "audit"
    assert sorted(liver.intervals.dice.patients, key=str) == sorted(wanted.patients, key=str)


def test_what_says_nothing_of_the_current_estimates_is_left_out(dataset: Dataset) -> None:
    first = correct(dataset, AUDIT, 5)
    correct(dataset, AUDIT, 1, Opened((3, 4)))  # a part of a scan only
    dataset.store.review(first[0], "rejected", ANNA, "not good")
    dataset.store.review(first[1], "excluded", ANNA, "moved")
    assert audit(dataset, model(dataset))[0].patients == 3
    assert audit(dataset, model(dataset), simulated=True)[0].patients == 0
    known = model(dataset)
    trained = Assessor(replace(known.card, seen=(first[2],)), known.network)
    assert audit(dataset, trained)[0].patients == 0, "another network's estimates"
    trained.version = known.version
    assert audit(dataset, trained)[0].patients == 2, "its patient has trained the network"


def test_with_too_few_audited_patients_the_training_s_intervals_stay(dataset: Dataset) -> None:
    correct(dataset, AUDIT, 8)
    found = audit(dataset, model(dataset))
    assert [(a.patients, a.intervals) for a in found] == [(8, None)] * 2
    before = dataset.bundle()
    with pytest.raises(ModelError, match="enough patients"):
        use(dataset, model(dataset), found, ANNA)
    assert dataset.bundle() is before


def test_new_intervals_reach_the_model_and_the_waiting_scans_but_not_what_was_shown(dataset: Dataset) -> None:
    audited = correct(dataset, AUDIT, 9)
    with dataset.store.write() as transaction:
        held = leases.acquire(transaction, ANNA, "segqc", worst_first.order, WORST)
    assert held is not None
    with dataset.store.read() as transaction:
        shown = assessments.read(transaction, held.assessment or 0)
    old = model(dataset)
    assert use(dataset, old, audit(dataset, old), ANNA) == 3
    new = model(dataset)
    assert new.version == old.version
    bundle = dataset.bundle()
    assert bundle is not None and len(bundle.fold_networks()) == 2, "they go on with their SegQC-Net"
    made = new.card.calibration[0].of("served").intervals
    assert isinstance(made, StructureIntervals)
    assert new.card.calibration[0].of("strange").intervals is None, "no strange mask was audited"
    with dataset.store.read() as transaction:
        assert assessments.read(transaction, held.assessment or 0) == shown, "what was shown stays"
        with_interval = [assessments.latest(transaction, f"scan_{i}") for i in range(12) if f"scan_{i}" not in audited]
        published = bundles.listing(transaction)
    assert [(b.actor, b.reason, b.is_serving) for b in published][-1] == (ANNA, "intervals of audit draws", True)
    assert len(with_interval) == 3
    for found in with_interval:
        assert found is not None
        quality = found[1].structures[0]
        raw, estimated = quality.raw.metrics.dice, quality.estimated.dice
        assert raw is not None
        assert quality.intervals.dice == made.dice.interval(raw, shown=estimated)
        assert quality.intervals.dice is not None
        assert quality.intervals.dice.low <= quality.estimated.dice <= quality.intervals.dice.high  # type: ignore[operator]


def test_the_command(dataset: Dataset) -> None:
    def run(*flags: str) -> str:
        result = CliRunner().invoke(main.app, ["intervals", str(dataset.folder), *flags])
        assert result.exit_code == 0, result.output
        return result.output

    correct(dataset, AUDIT, 4)
    assert "not enough data" in run()
    correct(dataset, AUDIT, 5)
    shown = json.loads(run("--json"))["structures"][0]
    assert {k: shown[k] for k in ("audited patients", "wanted", "with interval", "covered", "new intervals")} == {
        "audited patients": 9, "wanted": 9, "with interval": 9, "covered": 9, "new intervals": "ready",
    }  # fmt: skip
    assert "3 waiting scans" in run("--use")
    assert model(dataset).card.calibration[0].of("served").intervals is not None
