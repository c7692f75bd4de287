"""A dataset folder: train, score, continue."""

from __future__ import annotations

import copy
import os
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import delete, select
from typer.testing import CliRunner

from segqc.cli.main import app
from segqc.evaluation.methods.ensembles import EnsemblePairs
from segqc.evaluation.methods.estimates import AssessedMask
from segqc.loop import jobs as work
from segqc.loop.dataset import Dataset, DatasetError
from segqc.loop.due import checked
from segqc.loop.locks import hold
from segqc.loop.requests import NETWORKS, RoundResult, TrainResult
from segqc.loop.scoring import assess_scan, score
from segqc.loop.training import TrainingBusy, train
from segqc.networks.assessor import Assessor
from segqc.networks.bundle import FOLDS, NetworkBundle
from segqc.networks.card import NetworkName
from segqc.networks.model import ModelError, TrainedNetwork
from segqc.networks.segmenter import Segmenter
from segqc.progress import described
from segqc.quality.report_card import AT_RANDOM
from segqc.quality.witnesses import UNLIKENESS
from segqc.selection import strategies
from segqc.split import PatientSplit
from segqc.store import bundles, features, jobs, leases, rounds, scans
from segqc.store.database import Transaction
from segqc.store.events import SERVER
from segqc.store.leases import LeaseRules
from segqc.store.records import ScanRecord
from segqc.store.schema import FeatureRow
from segqc.training import NoProgress
from segqc.training.cases import Case, CaseError, TooFewCases, label_values, read_case
from segqc.types import Structure
from segqc.volumes import Volume, read_labels, read_scan, write_labels, write_scan
from tests.store_kit import ANNA
from tests.test_training import make_cases

SETTINGS = """
[structures]
ball = [1]
[boxes]
min_area_mm2 = 4.0
[inference]
backend = "pytorch"
[training]
epochs = 2
fold_epochs = 1
people_epochs = 1
steps_per_epoch = 2
folds = 2
gammas = []
average_flips = false
ensemble = false
mixed_precision = false
patch = [16, 16, 4]
"""
"""Small trainings, in training and after it by the backend that is ready at once."""


def make_dataset(folder: Path, labelled: int, unlabelled: int) -> Dataset:
    """A folder in MONAI Label's layout."""
    (folder / "labels" / "final").mkdir(parents=True)
    for i, case in enumerate(make_cases(folder, labelled + unlabelled)):
        target = folder / "labels" / "final" / f"{case.id}.nii.gz"
        shutil.move(case.labels, target) if i < labelled else case.labels.unlink()
    (folder / "segqc.toml").write_text(SETTINGS)
    return Dataset(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A folder with both networks, trained for seconds."""
    dataset = make_dataset(tmp_path_factory.mktemp("studies"), 5, 3)
    for network in ("segmentation", "segqc"):
        train(dataset, network, NoProgress())  # type: ignore[arg-type]
    return dataset


@pytest.fixture
def dataset(trained: Dataset, tmp_path: Path) -> Dataset:
    """A copy of it to write into."""
    shutil.copytree(trained.folder, tmp_path / "s")
    return Dataset(tmp_path / "s")


class Count(NoProgress):
    """Counts the scans that a scoring begins; may die at one."""

    def __init__(self, die_at: int | None = None) -> None:
        self.die_at = die_at

    def step(self, done: int, total: int, task: str, detail: str = "", *, unit: str = "scans") -> None:
        if done == self.die_at:
            raise KeyboardInterrupt


def test_scans_and_labels_are_found_by_name(trained: Dataset) -> None:
    entries = trained.scans()
    assert [e.id for e in entries] == [f"c{i}" for i in range(8)]
    assert [e.final is not None for e in entries] == [True] * 5 + [False] * 3
    with pytest.raises(DatasetError, match="no scan named nope"):
        trained.scan("nope")
    with pytest.raises(DatasetError, match="no such folder"):
        Dataset(trained.folder / "nope")


def test_a_training_publishes_model_curve_and_picture(trained: Dataset) -> None:
    for network in NETWORKS:
        path = trained.model_path(network)
        assert path is not None
        assert path.is_file()
        assert (trained.training_folder(network) / "curve.png").stat().st_size > 1000
    segmenter, assessor = trained.segmenter(), trained.assessor()
    assert segmenter is not None
    validating = {p for p, split in trained.patient_splits().items() if split.split == "validation"}
    measured = segmenter.card.validation
    assert {m.patient for m in measured} == validating & {c.patient for c in trained.cases()}
    assert segmenter.card.accuracy == pytest.approx(np.mean([m.dice for m in measured]), abs=1e-4)
    assert assessor is not None
    assert assessor.settings.boxes.min_area_mm2 == 4.0


def test_a_damaged_bundle_does_not_spoil_the_next_training(dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    bundle = dataset.bundle()
    assert bundle is not None
    for network in NETWORKS:
        damage(bundle, network)
    card = train(dataset, "segmentation", NoProgress()).card
    assert any("segqc.pt: is damaged" in message for message in caplog.messages)
    segmenter = dataset.segmenter()
    assert segmenter is not None
    assert segmenter.card == card
    assert dataset.assessor() is None, "what is damaged is not published again"


def test_all_scans_without_a_final_label_are_assessed(dataset: Dataset) -> None:
    summary = score(dataset, "segqc", NoProgress())
    assert (summary.scored, summary.skipped, summary.failed) == (3, 0, {})
    assert set(dataset.assessments()) == {"c5", "c6", "c7"}
    for entry in dataset.scans()[5:]:
        assert entry.original is not None
        assert read_labels(entry.original).shape == read_scan(entry.image).shape
    first = dataset.assessments()
    for assessment in first.values():
        assert assessment.mask_kind == "served"
        assert None not in (w := assessment.structures[0].witnesses, w.soft, w.entropy, w.size)
    score(dataset, "segqc", NoProgress(), force=True)  # of the masks that are stored now
    again = dataset.assessments()
    for scan, assessment in first.items():
        assert again[scan].mask_kind == "served"
        assert again[scan].structures[0].witnesses == assessment.structures[0].witnesses


# ----------------------------------------------------------------------------------------- what the estimates are worth


@pytest.fixture(scope="module")
def worthless(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A folder whose labels have nothing to do with their scans, and networks that nothing could be learnt of."""
    folder = tmp_path_factory.mktemp("studies")
    make_dataset(folder, 12, 5)
    finals = sorted((folder / "labels" / "final").iterdir())
    contents = [path.read_bytes() for path in finals]
    for path, content in zip(finals, [*contents[5:], *contents[:5]], strict=True):
        path.write_bytes(content)
    alone = SETTINGS.replace("people_epochs = 1", "people_epochs = 0")  # nothing here is of people's masks
    (folder / "segqc.toml").write_text(alone.replace("ensemble = false", "ensemble = true"))
    dataset = Dataset(folder)
    for network in NETWORKS:
        train(dataset, network, NoProgress())
    return dataset


def test_worthless_estimates_are_told_and_their_order_is_not_used(worthless: Dataset) -> None:
    card = worthless.report_card()
    assert card is not None
    assert card.worst.patients == 12, "each labelled patient is checked by networks that have not seen it"
    assert card.worst.order_verdict == "not better than chance"
    score(worthless, "segqc", NoProgress())
    listed = CliRunner().invoke(app, ["rank", str(worthless.folder)])
    assert listed.exit_code == 0, listed.output
    assert "the estimates' order is not better than chance on 12 patients" in listed.output
    assert card.ranked_by != AT_RANDOM
    by_unlikeness = card.ranked_by == UNLIKENESS
    assert ("most unlike the training scans first" in listed.output) == by_unlikeness
    assert set(worthless.scores("tta")) == ({f"c{i}" for i in range(12, 17)} if card.ranked_by == "tta" else set())


def test_each_scan_is_compared_with_those_that_calibrate_by_networks_that_have_not_seen_them(
    worthless: Dataset,
) -> None:
    assessor, card = worthless.assessor(), worthless.report_card()
    assert assessor is not None and card is not None
    reference, splits = assessor.card.unlikeness, dict(worthless.patient_splits())
    assert reference is not None and len(reference.networks) == assessor.card.members == 2
    labelled = {case.patient for case in worthless.cases()}
    for fold, network in enumerate(reference.networks):
        held_out = {held.patient for held in network.held_out}
        assert held_out == {p for p in labelled if splits[p].split == "validation" or splits[p].fold == fold}
    assert reference.patients == tuple(sorted(labelled)) and card.marked is not None
    score(worthless, "segqc", NoProgress())
    found = worthless.assessments()
    entry = worthless.scan(next(iter(found)))
    scan, mask = worthless.read_scan(entry), worthless.mask(entry.id)
    assert mask is not None
    features = assessor.scan_features(scan, read_labels(worthless.store.label_file(mask), scan=scan))
    assert features is not None and found[entry.id].unlikeness == reference.of(features)
    scores = {name: -a.unlikeness.score for name, a in found.items() if a.unlikeness is not None}
    assert worthless.scores(UNLIKENESS) == pytest.approx(scores) and len(scores) == 5
    marked = [name for name, a in found.items() if a.is_unlike]
    assert (
        score(worthless, "segqc", NoProgress()).marked == len(marked)
        and score(worthless, "tta", NoProgress()).marked is None
    )
    without = assessor.with_card(replace(assessor.card, unlikeness=None))
    assert without.version == assessor.version


def test_a_training_whose_estimates_are_worse_does_not_serve_unless_it_is_told_to(
    worthless: Dataset, tmp_path: Path
) -> None:
    shutil.copytree(worthless.folder, tmp_path / "s")
    dataset = Dataset(tmp_path / "s")
    assessor = dataset.assessor()
    assert assessor is not None and assessor.card.report is not None
    # as if the estimates of the same scans had been perfect before
    perfect = replace(
        assessor.card.report, scans=tuple(replace(s, estimated=s.true) for s in assessor.card.report.scans)
    )
    with dataset.bundles.publishing(
        {"segqc": saved(assessor.with_card(replace(assessor.card, report=perfect)), tmp_path)},
        SERVER, "a test", even_if_worse=True,
    ) as publication:  # fmt: skip
        before = publication.number
    held = train(dataset, "segqc", NoProgress())
    assert held.held_because is not None and "12 patients" in held.held_because
    assert held.bundle == before + 1
    bundle = dataset.bundle()
    assert bundle is not None and bundle.number == before
    told = train(dataset, "segqc", NoProgress(), serve=True)
    bundle = dataset.bundle()
    assert bundle is not None and bundle.number == told.bundle == before + 2
    assert told.held_because is None


def saved(model: TrainedNetwork, folder: Path) -> Path:
    model.save(folder / "model.pt")
    return folder / "model.pt"


def test_an_interrupted_scoring_goes_on_and_a_finished_one_does_nothing(dataset: Dataset) -> None:
    with pytest.raises(KeyboardInterrupt):
        score(dataset, "segqc", Count(die_at=2))
    assert len(dataset.assessments()) == 2
    summary = score(dataset, "segqc", NoProgress())
    assert (summary.scored, summary.skipped) == (1, 2)
    assert score(dataset, "segqc", NoProgress()).skipped == 3
    assert score(dataset, "segqc", NoProgress(), force=True).scored == 3


def test_a_mask_that_changed_is_assessed_again(dataset: Dataset) -> None:
    score(dataset, "segqc", NoProgress())
    entry = dataset.scan("c6")
    assert entry.original is not None
    labels = read_labels(entry.original)
    before = dataset.assessment("c6")
    changed = labels.array.copy()
    changed[2:9, 2:9, 1:3] ^= 1
    view = dataset.folder / "labels" / "original" / "c6.nii.gz"
    write_labels(type(labels)(changed, labels.affine), view)
    summary = score(dataset, "segqc", NoProgress())
    assert (summary.scored, summary.skipped) == (1, 2)
    after = dataset.assessment("c6")
    assert before is not None
    assert after is not None
    assert after.segmenter_version is None, "a person made it"
    assert (before.mask_kind, after.mask_kind) == ("served", "strange")
    assert after.structures[0].witnesses.soft is None, "the network says nothing of a person's mask"
    assert before.mask_sha256 != after.mask_sha256


def test_one_bad_scan_does_not_keep_the_others_from_being_scored(dataset: Dataset) -> None:
    (dataset.folder / "c5.nii.gz").write_bytes(b"broken")
    summary = score(dataset, "segqc", NoProgress())
    assert (summary.scored, summary.failed) == (2, {})
    assert [finding.file for finding in dataset.findings()] == ["c5.nii.gz"]


def test_the_baselines_score_every_scan_once(dataset: Dataset) -> None:
    assert score(dataset, "tta", NoProgress()).scored == 3
    for other in ("entropy", "class-stratified"):
        assert score(dataset, other, NoProgress()).skipped == 3, "one run of the group gives all"
    assert all(0 <= v <= 1 for v in dataset.scores("tta").values())
    assert all(np.isfinite(v) and v < 0 for v in dataset.scores("entropy").values())


def test_the_networks_of_the_folds_score_by_their_agreement(dataset: Dataset) -> None:
    bundle = dataset.bundle()
    assert bundle is not None
    networks = bundle.fold_networks()
    assert len(networks) == 2
    assert score(dataset, "ensemble", NoProgress()).scored == 3
    assert score(dataset, "ensemble", NoProgress()).skipped == 3
    pairs = EnsemblePairs(networks, against="members")
    for name, value in dataset.scores("ensemble").items():
        scan = read_scan(dataset.scan(name).image)
        mask = AssessedMask(scan, networks[0].predict(scan).labels, None)
        assert value == pytest.approx(min(e.metrics.dice for e in pairs.estimate(mask) if e.metrics.dice is not None))
    segmenter = bundle.segmenter()
    with dataset.bundles.workspace() as work:
        segmenter.save(work / "segmentation.pt")
        dataset.bundles.publish({"segmentation": work / "segmentation.pt"}, SERVER, "the same again")
    assert dataset.scores("ensemble") == {}, "scores of another bundle order nothing"
    assert score(dataset, "ensemble", NoProgress()).scored == 3
    with dataset.bundles.workspace() as work:
        bundle.assessor().save(work / "segqc.pt")
        dataset.bundles.publish({"segqc": work / "segqc.pt"}, SERVER, "without the folds")
    with pytest.raises(ModelError, match=r"holds no networks of the folds.*segqc train segqc"):
        score(dataset, "ensemble", NoProgress())


def test_a_scoring_notes_features_of_all_scans_by_the_network_that_serves(dataset: Dataset) -> None:
    segmenter = dataset.segmenter()
    assert segmenter is not None and dataset.feature_versions() == {}
    score(dataset, "segqc", NoProgress())
    assert dataset.feature_versions() == {f"c{i}": segmenter.version for i in range(8)}

    def stored(transaction: Transaction) -> list[bytes]:
        query = select(FeatureRow.numbers).where(FeatureRow.kind == "segmenter").order_by(FeatureRow.scan_id)
        return list(transaction.scalars(query))

    with dataset.store.write() as transaction:
        before = stored(transaction)
        transaction.execute(delete(FeatureRow).where(FeatureRow.kind == "segmenter"))
    assert score(dataset, "segqc", NoProgress()).skipped == 3
    with dataset.store.read() as transaction:
        assert stored(transaction) == before, "the same scans and masks give the same features"
    scan, mask = read_scan(dataset.scan("c6").image), dataset.mask("c6")
    assert mask is not None
    values = segmenter.features(scan, read_labels(dataset.store.label_file(mask), scan=scan).array == 1)
    assert values is not None
    assert features.unpacked([before[6]])[0] == pytest.approx(values.ravel(), rel=1e-3, abs=1e-3)
    train(dataset, "segmentation", NoProgress(), dataset.settings.training_settings("segmentation"), serve=True)
    newer = dataset.segmenter()
    assert newer is not None
    score(dataset, "segqc", NoProgress())
    assert set(dataset.feature_versions().values()) == {newer.version}


def test_a_scoring_gives_the_default_strategy_what_it_goes_by(dataset: Dataset) -> None:
    path = dataset.folder / "segqc.toml"
    path.write_text(path.read_text() + '[server]\nstrategy = "ensemble"\n')
    by_ensemble = Dataset(dataset.folder)
    assert score(by_ensemble, "segqc", NoProgress()).scored == 3
    assert set(by_ensemble.scores("ensemble")) == {"c5", "c6", "c7"} and by_ensemble.scores("tta") == {}


def test_without_networks_or_labels_the_error_says_what_to_do(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "s", 2, 1)
    with pytest.raises(ModelError, match="train one first"):
        score(dataset, "segqc", NoProgress())
    with pytest.raises(TooFewCases, match="at least 4 patients, found 2") as raised:
        train(dataset, "segqc", NoProgress())
    assert "not accepted" not in str(raised.value)
    (dataset.folder / "broken.nii.gz").write_bytes(b"broken")
    with pytest.raises(TooFewCases, match="1 file was not accepted, 'segqc scans FOLDER' says why"):
        train(Dataset(dataset.folder), "segqc", NoProgress())
    (tmp_path / "new").mkdir()
    with pytest.raises(DatasetError, match=r"write a table such as \[structures\]"):
        _ = Dataset(tmp_path / "new").structures


def test_scans_of_one_patient_share_fold_and_role(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "s", 6, 0)
    with (dataset.folder / "segqc.toml").open("a") as settings:
        settings.write('[patients]\nanna = ["c0", "c3"]\n')
    dataset = Dataset(dataset.folder)
    assert [c.patient for c in dataset.cases()] == ["anna", "c1", "c2", "anna", "c4", "c5"]
    assert set(dataset.patient_splits()) == {"anna", "c1", "c2", "c4", "c5"}


# ---- one training at a time, and rounds ----------------------------------------------------------------------------


class Lines(NoProgress):
    """Keeps what it is told; may die at a message."""

    def __init__(self, die_at: str = "\0") -> None:
        self.messages: list[str] = []
        self.die_at = die_at

    def step(self, done: int, total: int, task: str, detail: str = "", *, unit: str = "scans") -> None:
        message = described(task, detail)
        self.messages.append(message)
        if message.startswith(self.die_at):
            raise KeyboardInterrupt

    def message(self, text: str) -> None:
        self.messages.append(text)


def perturbed(network: TrainedNetwork | None) -> Any:
    """A network of other weights, and so of another version."""
    assert network is not None
    other = copy.deepcopy(network.network)
    for parameter in other.parameters():
        parameter.data.add_(1e-3)
    if isinstance(network, Assessor) and network.people is not None:
        return Assessor(network.card, other, people=network.people.network)
    return type(network)(network.card, other)


def damage(bundle: NetworkBundle, network: NetworkName) -> None:
    """Change a published model file."""
    path = bundle.path(network)
    assert path is not None
    content = path.read_bytes()
    path.unlink()  # it may be linked to from other bundles
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def models(dataset: Dataset) -> dict[NetworkName, bytes]:
    """The model files that serve."""
    paths = {network: dataset.model_path(network) for network in NETWORKS}
    return {network: path.read_bytes() for network, path in paths.items() if path is not None}


@pytest.fixture
def quick_trainings(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of the copied folder give a new version at once."""
    monkeypatch.setattr("segqc.loop.training.train_segmentation", lambda *_: perturbed(dataset.segmenter()))
    monkeypatch.setattr("segqc.loop.training.train_assessor", lambda *_: perturbed(dataset.assessor()))
    monkeypatch.setattr("segqc.loop.training.draw_curve", lambda *_: None)  # takes longer than all else


@pytest.mark.usefixtures("quick_trainings")
@pytest.mark.parametrize("network", ["segmentation", "segqc"])
def test_a_network_is_trained_by_one_process_at_a_time(dataset: Dataset, network: Any) -> None:
    other: Any = "segqc" if network == "segmentation" else "segmentation"
    lock = dataset.training_folder(network) / "training.lock"
    before = models(dataset)[network]
    with hold(lock, "segqc train"):
        with pytest.raises(TrainingBusy, match=rf"{network} .* segqc train \(process {os.getpid()} on .*, since"):
            train(dataset, network, NoProgress())
        assert models(dataset)[network] == before
        train(dataset, other, NoProgress())
    train(dataset, network, NoProgress())
    assert models(dataset)[network] != before


@pytest.mark.usefixtures("quick_trainings")
@pytest.mark.parametrize("folds", [2, 3])
def test_a_number_of_folds_that_came_too_late_is_named(
    dataset: Dataset, folds: int, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(dataset.settings.training_settings("segqc"), folds=folds)
    train(dataset, "segqc", NoProgress(), settings)
    assert ("the patients are in 2 folds, though the settings say folds = 3" in caplog.text) == (folds == 3)


@pytest.mark.usefixtures("quick_trainings")
@pytest.mark.parametrize(("network", "ensemble"), [("segmentation", True), ("segqc", False), ("segqc", True)])
def test_a_training_says_of_how_many_patients_its_scores_are(
    dataset: Dataset, network: NetworkName, ensemble: bool
) -> None:
    settings = replace(dataset.settings.training_settings(network), ensemble=ensemble)
    trained = train(dataset, network, NoProgress(), settings)
    labelled = {case.patient for case in dataset.cases()}
    validating = {p for p, split in dataset.patient_splits().items() if split.split == "validation"} & labelled
    measured = labelled if network == "segqc" and ensemble else validating
    assert (trained.patients, trained.measured) == (5, len(measured))
    assert 0 < len(validating) < 5


@pytest.mark.usefixtures("quick_trainings")
def test_a_job_waits_for_another_training_and_says_so(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines()
    with ExitStack() as held:
        held.enter_context(hold(dataset.training_folder("segqc") / "training.lock", "segqc train"))
        waits = iter(range(3))
        monkeypatch.setattr("time.sleep", lambda _: next(waits, None) is None and held.close())
        train(dataset, "segqc", lines, wait=True)
    (messages,) = lines.messages
    assert messages.startswith("waits for the training of segqc by segqc train (process")


@pytest.mark.usefixtures("quick_trainings")
@pytest.mark.parametrize(
    "die_at",
    ["round: train segmentation", "round: train segqc", "round: publish", "round: score", "scoring by segqc: c6"],
)
def test_a_round_that_is_interrupted_never_shows_estimates_of_two_bundles(dataset: Dataset, die_at: str) -> None:
    score(dataset, "segqc", NoProgress())
    with dataset.store.write() as transaction:
        job = jobs.enqueue(transaction, "round", {}, SERVER)

    def told() -> set[tuple[str | None, str]]:
        return {(a.segmenter_version, a.assessor_version) for a in dataset.assessments().values()}

    def in_use() -> tuple[str, str]:
        segmenter, assessor = dataset.segmenter(), dataset.assessor()
        assert segmenter is not None
        assert assessor is not None
        return segmenter.version, assessor.version

    before = in_use()
    assert told() == {before}
    with pytest.raises(KeyboardInterrupt):
        work.run(dataset, job, Lines(die_at))
    during = in_use()
    assert (during == before) is ("score" not in die_at and "scoring" not in die_at)
    assert during == before or not {*during} & {*before}, "both networks are replaced together"
    assert told() <= {during}, "no estimate of another bundle is told"
    ranked = {s.name for s in stored_scans(dataset) if s.ranking_dice is not None}
    assert ranked == set(dataset.assessments()), "ranked by what is told"
    lines = Lines()
    result = work.run(dataset, job, lines)
    assert isinstance(result, RoundResult)
    assert lines.messages[-1].startswith("Nobody can tell yet whether more rounds are worth it")
    with dataset.store.read() as transaction:
        (finished,) = checked(rounds.listing(transaction))
    segmenter = dataset.segmenter()
    assert segmenter is not None
    assert (finished.number, finished.labelled) == (result.round, 5)
    assert finished.validation == segmenter.card.validation, "what the next round is compared with"
    assert set(result.steps) == {"train segmentation", "train segqc", "publish", "score"}
    with dataset.store.read() as transaction:
        made = bundles.serving(transaction)
        assert made is not None
        assert jobs.bundle_of_round(transaction, job.id) == result.steps["publish"]["bundle"] == made.bundle.id
    assert told() == {in_use()}
    assert len(dataset.assessments()) == 3
    assert [path.name for path in (dataset.own / "models").iterdir() if path.name.startswith(".")] == []
    assert not list((dataset.own / "training" / "rounds").iterdir())
    numbers = [status.number for status in dataset.bundles.listing()]
    assert numbers == [1, 2, 3], "a round publishes once, however often it is continued"


def test_a_round_begins_with_what_came_into_the_folder_meanwhile(dataset: Dataset) -> None:
    dataset = Dataset(dataset.folder, patience_seconds=2)
    with dataset.store.write() as transaction:
        job = jobs.enqueue(transaction, "round", {}, SERVER)
    shutil.copy(dataset.folder / "c5.nii.gz", dataset.folder / "c9.nii.gz")
    with pytest.raises(KeyboardInterrupt):
        work.run(dataset, job, Lines("round: train segmentation"))
    assert "c9" in {scan.name for scan in stored_scans(dataset)}


@pytest.mark.usefixtures("quick_trainings")
def test_a_continued_round_trains_again_what_cannot_be_published_any_more(dataset: Dataset) -> None:
    bundle = dataset.bundle()
    assert bundle is not None
    folds = bundle.folds_path()
    assert folds is not None
    shutil.copy(folds, dataset.training_folder("segqc") / FOLDS)  # as the training leaves it
    with dataset.store.write() as transaction:
        job = jobs.enqueue(transaction, "round", {}, SERVER)
    with pytest.raises(KeyboardInterrupt):
        work.run(dataset, job, Lines("round: publish"))
    models = dataset.own / "training" / "rounds" / "1"
    assert (models / FOLDS).is_file(), "the networks of the folds wait for the publication, too"
    (models / "segmentation.pt").unlink()  # as after a restore
    lines = Lines("round: publish")
    with pytest.raises(KeyboardInterrupt):
        work.run(dataset, job, lines)
    assert [m for m in lines.messages if m.startswith("train")] == [
        "train segmentation: again, its model is gone or knows other structures"
    ]
    assert (models / "segmentation.pt").is_file()
    settings = dataset.folder / "segqc.toml"
    settings.write_text(settings.read_text().replace("ball = [1]", "sphere = [1]"))
    lines = Lines("round: train segmentation")
    with pytest.raises(KeyboardInterrupt):
        work.run(Dataset(dataset.folder), job, lines)
    assert [m.split(":")[0] for m in lines.messages if m.startswith("train")] == ["train segmentation", "train segqc"]


@pytest.mark.usefixtures("quick_trainings")
def test_a_labelled_scan_that_comes_while_a_round_trains_is_no_surprise(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = dataset.assessor()
    shutil.copy(dataset.folder / "c7.nii.gz", dataset.folder / "new.nii.gz")
    shutil.copy(next((dataset.folder / "labels/final").glob("*.nii.gz")), dataset.folder / "labels/final/new.nii.gz")

    def learn(cases: list[Case], _: object, splits: dict[str, PatientSplit], *__: object) -> Any:
        assert {case.patient for case in cases} <= splits.keys()
        assert "new" in splits
        return trained

    monkeypatch.setattr("segqc.loop.training.train_assessor", learn)
    train(dataset, "segqc", NoProgress())


def stored_scans(dataset: Dataset) -> list[ScanRecord]:
    with dataset.store.read() as transaction:
        return scans.listing(transaction)


def test_a_scoring_by_a_bundle_that_was_replaced_meanwhile_ranks_nothing(dataset: Dataset) -> None:
    score(dataset, "segqc", NoProgress())
    before = dataset.bundle()
    assert before is not None
    with dataset.bundles.workspace() as work:
        perturbed(dataset.assessor()).save(work / "segqc.pt")
        dataset.bundles.publish({"segqc": work / "segqc.pt"}, SERVER, "a test")
    assert dataset.assessments() == {}
    assess_scan(dataset, dataset.scan("c5"), before)
    assert all(scan.ranking_dice is None for scan in stored_scans(dataset))
    dataset.bundles.serve(before.number, SERVER)
    assert set(dataset.assessments()) == {"c5", "c6", "c7"}, "what it said counts again"
    assert sum(scan.ranking_dice is not None for scan in stored_scans(dataset)) == 3
    assert score(dataset, "segqc", NoProgress()).skipped == 3


def test_a_bundle_that_serves_again_gets_its_scores_again(dataset: Dataset) -> None:
    score(dataset, "segqc", NoProgress())
    before, known = dataset.bundle(), dataset.scores("expected-gain")
    assert before is not None
    with dataset.store.write() as transaction:  # one is shown to an annotator, and so stays whole
        lease = leases.acquire(transaction, ANNA, "segqc", strategies()["segqc"].order, LeaseRules())
    assert lease is not None
    with dataset.bundles.workspace() as work:
        perturbed(dataset.assessor()).save(work / "segqc.pt")
        dataset.bundles.publish({"segqc": work / "segqc.pt"}, SERVER, "a test")
    assert dataset.scores("expected-gain") == {}
    score(dataset, "segqc", NoProgress())
    assert dataset.scores("expected-gain").keys() == known.keys()
    dataset.bundles.serve(before.number, SERVER)
    assert dataset.scores("expected-gain") == {}
    score(dataset, "segqc", NoProgress())
    assert dataset.scores("expected-gain") == pytest.approx(known)
    assert score(dataset, "segqc", NoProgress()).skipped == len(known)


def test_scans_that_cannot_be_used_are_left_out_of_a_training_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = make_dataset(tmp_path / "s", 4, 0)
    by_id = {case.id: case for case in dataset.cases()}
    by_id["c1"].labels.chmod(0o644)
    by_id["c1"].labels.write_bytes(b"damaged")
    used: list[str] = []

    def learn(cases: list[Case], structures: tuple[Structure, ...], *_: object) -> None:
        if by_id["c3"] in cases:  # replaced by a scan of the same shape after the cases were listed
            shutil.copyfile(dataset.folder / "c0.nii.gz", dataset.folder / "c3.nii.gz")
        for case in cases:
            read_case(case, label_values(structures))
        used.extend(case.id for case in cases)
        raise TooFewCases("wanted more")

    monkeypatch.setattr("segqc.loop.training.train_segmentation", learn)
    with pytest.raises(TooFewCases) as raised:
        train(dataset, "segmentation", NoProgress())
    assert used == ["c0", "c2"]
    for name in ("c1", "c3"):
        assert f"the scan '{name}' ({name}.nii.gz, labels/final/{name}.nii.gz)" in str(raised.value)
        assert any("left out" in message and f"'{name}'" in message for message in caplog.messages)
    assert str(by_id["c1"].labels) not in str(raised.value)


def test_what_a_training_leaves_out_is_named_at_its_end(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "s", 5, 0)
    damaged = next(case for case in dataset.cases() if case.id == "c1")
    damaged.labels.chmod(0o644)
    damaged.labels.write_bytes(b"damaged")
    with dataset.store.write() as transaction:
        job = jobs.enqueue(transaction, "train", {"model": "segmentation"}, SERVER)
    result = work.run(dataset, job, NoProgress())
    assert isinstance(result, TrainResult)
    assert (result.used, list(result.left_out)) == (4, ["c1"])
    assert "labels/final/c1.nii.gz" in result.left_out["c1"]
    told = CliRunner().invoke(app, ["train", "segmentation", str(dataset.folder)])
    assert told.exit_code == 0, told.output
    assert "4 labelled scans used, 1 left out" in told.stdout
    assert result.left_out["c1"] in told.stdout


def test_a_training_reads_within_the_folder_s_limits(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "s", 4, 0).folder
    (folder / "segqc.toml").write_text(SETTINGS + "[intake]\nmax_voxels = 1024\n")
    case = Dataset(folder).cases()[0]
    assert read_case(case, (1,))[0].shape == (16, 16, 4)
    with pytest.raises(CaseError, match="the scan 'c0'"):
        read_case(replace(case, limits=replace(case.limits, max_voxels=1023)), (1,))


@pytest.mark.parametrize("at", ["masks by the network for masks, fold 2 of 2", "calibration"])
def test_a_scan_that_is_replaced_during_a_training_is_no_part_of_what_follows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, at: str
) -> None:
    dataset = make_dataset(tmp_path / "s", 5, 1)
    validating = {p for p, placement in dataset.patient_splits().items() if placement.split == "validation"}
    named = next(case.id for case in dataset.cases() if case.patient not in validating)

    class Replacing(NoProgress):
        done = False

        def step(self, done: int, total: int, task: str, detail: str = "", *, unit: str = "scans") -> None:
            message = described(task, detail)
            if message.startswith(at) and not self.done:
                self.done = True
                shutil.copyfile(dataset.folder / "c5.nii.gz", dataset.folder / f"{named}.nii.gz")

    replacing = Replacing()
    trained = train(dataset, "segqc", replacing)
    assert replacing.done
    assert (trained.used, list(trained.left_out)) == (len(dataset.cases()), [named])
    assert sum(f"left out of the training: the scan '{named}'" in message for message in caplog.messages) == 1
    assert set(trained.card.seen) == {case.patient for case in dataset.cases()}, "the new content has no label"


def test_a_scan_whose_file_is_written_again_as_it_was_stays_in_the_training(dataset: Dataset) -> None:
    cases = dataset.cases()
    path = cases[0].scan
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    scan, labels = read_case(cases[0], (1,))
    assert scan.shape == labels.shape


def test_a_scan_that_was_replaced_gets_a_mask_and_an_estimate_of_its_own(dataset: Dataset) -> None:
    score(dataset, "segqc", NoProgress())
    score(dataset, "tta", NoProgress())
    before = read_scan(dataset.folder / "c6.nii.gz")
    half = before.array[: before.shape[0] // 2]
    write_scan(Volume(half, before.affine), dataset.folder / "c6.nii.gz")
    assert "c6" not in dataset.assessments()
    assert "c6" not in dataset.scores("tta")
    summary = score(dataset, "segqc", NoProgress())
    assert (summary.scored, summary.skipped, summary.failed) == (1, 2, {})
    assert score(dataset, "tta", NoProgress()).scored == 1
    made = dataset.assessment("c6")
    assert made is not None
    assert made.shape == half.shape
    assert read_labels(dataset.folder / "labels" / "original" / "c6.nii.gz").shape == half.shape


def test_what_is_made_while_a_scan_is_replaced_is_not_the_new_ones(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = dataset.segmenter()
    assert segmenter is not None
    real = type(segmenter).predict

    def replacing(self: Segmenter, scan: Volume) -> object:
        if (dataset.folder / "c5.nii.gz").read_bytes() != (dataset.folder / "c0.nii.gz").read_bytes():
            shutil.copyfile(dataset.folder / "c0.nii.gz", dataset.folder / "c5.nii.gz")
            dataset.refresh()
        return real(self, scan)

    monkeypatch.setattr(Segmenter, "predict", replacing)
    summary = score(dataset, "segqc", NoProgress())
    assert (summary.scored, set(summary.failed)) == (2, {"c5"})
    assert dataset.mask("c5") is None
    assert set(dataset.assessments()) == {"c6", "c7"}
