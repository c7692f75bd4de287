"""The evaluation of labels: whose masks are judged by which networks, what is said of them, and what is refused."""

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
from segqc.evaluation import labels as evaluated
from segqc.evaluation.data.cohort import CohortError
from segqc.evaluation.experiments.labels import (
    FOLDS,
    IMPLANTED,
    NOT_TOLD,
    SCAN_ONLY,
    SOFT,
    STRANGE,
    TOLD,
    TTA,
    BoxWorth,
    JudgedMask,
    Origin,
    half_corrected,
)
from segqc.evaluation.labels import LabelSettings, LabelsResult, evaluate_labels
from segqc.evaluation.report.labels import compose_labels
from segqc.evaluation.statistics import labels as statistics
from segqc.loop.dataset import Dataset
from segqc.loop.readers import add_reading
from segqc.networks.bundle import FOLDS as FOLDS_FILE
from segqc.networks.model_file import ModelError
from segqc.networks.segmenter import Segmenter
from segqc.networks.unet import build_network
from segqc.progress import NO_PROGRESS
from segqc.quality.estimation import lost_in_worst
from segqc.store.events import SERVER
from segqc.volumes import write_labels, write_scan
from tests.audit_kit import fold_assessor
from tests.server_kit import CHECKED, add_models, draw_case, knowing_the_truth, make_dataset, save_models, without_liver
from tests.store_kit import ANNA, BERT

SEEN = (("scan_0", "scan_2"), ("scan_1", "scan_2"))
SETTINGS = LabelSettings(min_error_mm2=20.0)


def add_networks(folder: Path, seen: Sequence[Sequence[str]] = SEEN) -> int:
    """Publish untrained networks: the segmentation network has seen scan_0 to scan_2, each fold's what is said."""
    dataset = Dataset(folder)
    with dataset.bundles.workspace() as work:
        files = save_models(work)
        served = Segmenter.load(files["segmentation"])
        card = replace(served.card, seen=("scan_0", "scan_1", "scan_2"))
        Segmenter(card, served.network).save(files["segmentation"])
        folds = [
            Segmenter(replace(card, seen=tuple(of)), build_network(card.plan, seed=k)) for k, of in enumerate(seen)
        ]
        Segmenter.save_members(folds, work / FOLDS_FILE)
        fold_assessor(seen).save(files["segqc"])
        return dataset.bundles.publish(files, SERVER, "a test")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_dataset(tmp_path_factory.mktemp("made") / "data", scans=5, finals=4, config=CHECKED)
    add_networks(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Four final labels: one of scans that the first network has not seen, one the second, one none, one neither."""
    return Path(shutil.copytree(made, tmp_path / "data"))


def of_scan(result: LabelsResult, scan: str) -> list[JudgedMask]:
    return [mask for mask in result.masks if mask.scan == scan]


# ------------------------------------------------------------------------------------------------------- who is judged


def test_each_scan_is_judged_by_networks_that_have_not_seen_it_and_an_interrupted_run_continues(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, judges = Dataset(folder), {}
    judge_scan = evaluated.judge_scan

    def noting(networks, scan, *rest, **more):  # type: ignore[no-untyped-def]
        judges[scan] = networks
        return judge_scan(networks, scan, *rest, **more)

    monkeypatch.setattr(evaluated, "judge_scan", noting)
    result = evaluate_labels(dataset, tmp_path / "out", NO_PROGRESS, settings=SETTINGS)
    assert set(judges) == {"scan_0", "scan_1", "scan_3"}
    assert any(remark.startswith("1 scan is left out, as every network has trained") for remark in result.remarks)
    for scan, networks in judges.items():
        cards = (networks.assessor.card, *(n.card for n in (networks.served, *networks.folds, *networks.strange)))
        assert all(scan not in card.seen for card in cards), scan
    assert judges["scan_3"].served.version == dataset.bundle().segmenter().version  # type: ignore[union-attr]
    assert len(judges["scan_3"].folds) == len(judges["scan_3"].strange) == 2 and not judges["scan_0"].strange
    origins = [mask.origin for mask in of_scan(result, "scan_3")]
    assert origins == [
        *("untouched", *["implanted"] * IMPLANTED, "half corrected", "unchanged", "served", *["strange"] * STRANGE)
    ]
    judges.clear()
    (path,) = (tmp_path / "out/labels/masks").glob("scan_1-*.json")
    path.unlink()
    assert evaluate_labels(dataset, tmp_path / "out", NO_PROGRESS, settings=SETTINGS) == result
    assert set(judges) == {"scan_1"}, "only what is missing is judged again"


def test_what_is_said_and_found_with_maps_that_know_the_truth(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knowing_the_truth(monkeypatch)
    result = evaluate_labels(Dataset(folder), tmp_path / "out", NO_PROGRESS, settings=SETTINGS)
    for mask in result.masks:
        said = mask.estimates
        assert said[FOLDS] is not None and said[SOFT] is not None and said[SCAN_ONLY] is None
        assert (said[TTA] is not None) == (mask.origin == "served")
        raw, extracted = mask.boxes["raw"], mask.boxes["extracted"]
        assert raw.accepted >= mask.dice - 1e-9 and extracted.accepted >= mask.dice - 1e-9
        if mask.origin == "untouched":
            assert (mask.dice, mask.errors, raw.boxes, raw.proposed) == (1, 0, 0, 1)
        if mask.origin == "implanted":
            assert said[TOLD] == pytest.approx(mask.dice, abs=0.1)
            assert mask.kinds and raw.boxes >= raw.found >= extracted.found and raw.proposed > mask.dice
    by_origin = {(m.scan, m.origin): m for m in result.masks}
    for scan in ("scan_0", "scan_1", "scan_3"):
        assert by_origin[scan, "unchanged"].estimates[TOLD] == by_origin[scan, "served"].estimates[TOLD]
    assert {m.origin for m in result.masks if m.estimates[TOLD] != m.estimates[NOT_TOLD]} <= {
        *("untouched", "implanted", "half corrected", "unchanged")
    }


def labelled_data(folder: Path, numbers: Sequence[int], splits: dict[str, list[str]] | None = None) -> Path:
    """A data set of `draw_case`'s scans with names of its own."""
    for i in numbers:
        scan, truth = draw_case(i)
        write_scan(scan, folder / "images" / f"case_{i}.nii.gz")
        write_labels(truth, folder / "labels" / f"case_{i}.nii.gz")
    if splits is not None:
        (folder / "splits.json").write_text(json.dumps(splits))
    return folder


def test_other_labelled_scans_are_judged_and_one_that_is_known_under_another_name_is_not(
    folder: Path, tmp_path: Path
) -> None:
    data = labelled_data(tmp_path / "d", [2, 5, 6])  # case_2 is scan_2, which every network has seen
    result = evaluate_labels(Dataset(folder), tmp_path / "out", NO_PROGRESS, on=data, settings=SETTINGS)
    assert {mask.scan for mask in result.masks} == {"case_5", "case_6"} and result.on == "d"
    assert any("left out" in remark for remark in result.remarks)
    split = labelled_data(tmp_path / "s", [5, 6], {"train": ["case_5"], "test": ["case_6"]})
    result = evaluate_labels(Dataset(folder), tmp_path / "other", NO_PROGRESS, on=split, settings=SETTINGS)
    assert {mask.scan for mask in result.masks} == {"case_6"}, "of a split, the test side"
    few = replace(SETTINGS, max_scans=1)
    drawn = evaluate_labels(Dataset(folder), tmp_path / "few", NO_PROGRESS, on=data, settings=few)
    assert len({mask.scan for mask in drawn.masks}) == 1


def test_a_second_observer_is_a_reader_of_the_store_or_a_folder(folder: Path, tmp_path: Path) -> None:
    dataset = Dataset(folder)
    for case, labels in ((0, without_liver(0)), (1, draw_case(1)[1])):  # the second is the final label itself
        write_labels(labels, tmp_path / "reading.nii.gz")
        add_reading(dataset, f"scan_{case}", tmp_path / "reading.nii.gz", ANNA)
        (tmp_path / "reading.nii.gz").unlink()
    write_labels(without_liver(3), tmp_path / "theirs" / "scan_3.nii.gz")
    result = evaluate_labels(dataset, tmp_path / "out", NO_PROGRESS, observers=tmp_path / "theirs", settings=SETTINGS)
    assert [m.scan for m in result.masks if m.origin == "second observer"] == ["scan_0", "scan_3"]
    assert not any("second observer" in remark for remark in result.remarks)
    assert all(m.dice < 1 and m.errors == 0 for m in result.masks if m.origin == "second observer"), "it is variability"
    alone = evaluate_labels(dataset, tmp_path / "alone", NO_PROGRESS, settings=SETTINGS)
    assert [m.scan for m in alone.masks if m.origin == "second observer"] == ["scan_0"]


def test_one_bad_label_does_not_keep_the_others_from_being_judged(folder: Path, tmp_path: Path) -> None:
    data = labelled_data(tmp_path / "d", [5, 6])
    foreign = draw_case(5)[1]
    foreign.array[0, 0, 0] = 9
    (data / "labels" / "case_5.nii.gz").unlink()
    write_labels(foreign, data / "labels" / "case_5.nii.gz")
    result = evaluate_labels(Dataset(folder), tmp_path / "out", NO_PROGRESS, on=data, settings=SETTINGS)
    assert {mask.scan for mask in result.masks} == {"case_6"}
    assert any(remark.startswith("case_5 is left out: ") and "9" in remark for remark in result.remarks)


# --------------------------------------------------------------------------------------------------------- bad inputs


def test_a_folder_without_the_networks_is_refused_with_a_sentence(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data", scans=2, finals=2)
    with pytest.raises(ModelError, match="train one first"):
        evaluate_labels(Dataset(folder), tmp_path / "out", NO_PROGRESS)
    add_models(folder)
    with pytest.raises(ModelError, match="none for people's masks"):
        evaluate_labels(Dataset(folder), tmp_path / "out", NO_PROGRESS)
    add_models(folder, people=True)
    with pytest.raises(ModelError, match="no networks of the folds"):
        evaluate_labels(Dataset(folder), tmp_path / "out", NO_PROGRESS)
    assert not (tmp_path / "out").exists()


def test_nothing_to_judge_and_another_evaluation_in_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    dataset, out = Dataset(folder), tmp_path / "out"
    data = labelled_data(tmp_path / "d", [2])
    with pytest.raises(CohortError, match="every network has trained from all labels there"):
        evaluate_labels(dataset, out, NO_PROGRESS, on=data)
    (tmp_path / "theirs").mkdir()
    with pytest.raises(CohortError, match="no label file is named as"):
        evaluate_labels(dataset, out, NO_PROGRESS, observers=tmp_path / "theirs")
    with pytest.raises(CohortError, match="is no data set"):
        evaluate_labels(dataset, out, NO_PROGRESS, on=tmp_path / "theirs")
    assert not out.exists() and not list((tmp_path / "theirs").iterdir())
    evaluate_labels(dataset, out, NO_PROGRESS, settings=SETTINGS)
    with pytest.raises(CohortError, match="holds an evaluation of other labels, networks or settings"):
        evaluate_labels(dataset, out, NO_PROGRESS, settings=replace(SETTINGS, seed=1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["labels", "DATA", "--length", "2"], "--length does not belong to labels"),
        (["labels", "DATA", "--structure", "liver=1"], "--structure does not belong to labels"),
        (["labels", "DATA", "--patch", "8", "8", "8"], "--patch does not belong to labels"),
        (["labels", "DATA", "--on", "NONE"], "no such data set or dataset folder"),
        (["labels", "DATA", "--observers", "NONE"], "no such folder of another observer's label files"),
        (["labels", "SET"], "name the dataset folder that has some"),
        (["stratified", "SET", "--on", "SET"], "--on belongs to labels"),
    ],
)
def test_the_command_refuses_in_one_sentence(made: Path, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "set" / "images").mkdir(parents=True)
    named = {"DATA": str(made), "SET": str(tmp_path / "set"), "NONE": str(tmp_path / "none")}
    arguments = ["evaluate", *(named.get(word, word) for word in words), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main.app, arguments)
    assert done.exit_code != 0 and message in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_report_and_prints_its_tables(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knowing_the_truth(monkeypatch)
    words = ["evaluate", "labels", str(folder), "--out", str(tmp_path / "out"), "--min-area", "20", "--workers", "1"]
    printed = CliRunner().invoke(main.app, words)
    assert printed.exit_code == 0, printed.output
    assert "an expert's, errors implanted" in printed.output and "report.html" in printed.output
    told = json.loads(CliRunner().invoke(main.app, [*words, "--json"]).stdout)
    assert set(told["tables"]) == {"estimates", "people", "comparisons", "coverage", "kinds", "bands", "proposals"}
    assert Path(told["report"]).is_file() and told["remarks"]
    assert (tmp_path / "out/labels/report/tables/estimates.csv").is_file()


# ---------------------------------------------------------------------------------------------------------- statistics


def judged(origin: Origin, patient: str, dice: float, told: float, *, covered: float | None = None) -> JudgedMask:
    worth = BoxWorth(boxes=2, found=1, proposed=dice, accepted=dice)
    estimates = {TOLD: told, NOT_TOLD: told - 0.1, SCAN_ONLY: None, FOLDS: 0.5 * dice + 0.1, SOFT: told, TTA: None}
    return JudgedMask(
        scan=patient,
        patient=patient,
        origin=origin,
        dice=dice,
        estimates=estimates,
        covered=covered,
        errors=2,
        boxes={"raw": worth},
    )


def test_a_line_of_its_own_mends_what_a_line_can_and_is_one_for_all_masks_of_people() -> None:
    rng = np.random.default_rng(0)
    masks = [judged("implanted", f"p{i % 8}", d := float(rng.uniform(0.5, 1)), d) for i in range(24)]
    masks += [judged("untouched", f"p{i}", 1.0, 0.95) for i in range(8)]
    numbers = {(n.origin, n.estimator): n for n in statistics.estimator_numbers(masks)}
    of_folds = numbers["implanted", FOLDS]
    assert of_folds.scores.mae is not None and of_folds.scores.mae > 0.2
    assert of_folds.mae_after_line == pytest.approx(0, abs=1e-9)
    assert numbers["untouched", FOLDS].mae_after_line == pytest.approx(0, abs=1e-9)
    not_told = numbers["untouched", NOT_TOLD].mae_after_line
    assert not_told is not None and 0.005 < not_told < 0.1, "the line is not fitted on untouched masks alone"
    assert ("untouched", TTA) not in numbers
    found = {(c.origin, c.other): c for c in statistics.comparisons(masks)}
    assert found["implanted", FOLDS].verdict.outcome == "better"
    assert found["implanted", f"{FOLDS}, after a line"].comparison.difference.value == pytest.approx(0, abs=1e-9)
    assert ("implanted", SOFT) not in found, "it says the same"


def test_shares_and_areas_are_those_of_pairs_and_undefined_without_any() -> None:
    wrong = [judged("implanted", f"p{i}", 0.8, told) for i, told in enumerate((0.5, 0.9, 0.7, 0.8))]
    right = [judged("untouched", f"p{i}", 1.0, told) for i, told in enumerate((0.9, 0.95))]
    area = statistics.auroc(wrong, right)
    assert area.value == pytest.approx((1 + 0.75 + 1 + 1) / 4)
    assert area.low is not None and area.low <= area.value <= (area.high or 0)
    by_evidence = statistics.auroc(
        [replace(mask, evidence=2.0 + i) for i, mask in enumerate(wrong)],
        [replace(mask, evidence=2.5) for mask in right],
        statistics.EVIDENCE,
    )
    assert by_evidence.value == pytest.approx(3 / 4)
    assert statistics.auroc(wrong, right, statistics.EVIDENCE).value is None, "of older results"
    assert statistics.auroc([], right).value is None and statistics.auroc(wrong, right, TTA).value is None
    assert statistics.found_errors(wrong, "raw").value == pytest.approx(0.5)
    assert statistics.mean(right, lambda m: m.covered).value is None
    whole, band = statistics.by_band([*wrong, *right])
    assert whole.masks == 4 and whole.auroc == band.auroc
    assert band.name == "0.80 to 0.90" and band.masks == 4 and set(band.found) == {"raw"}


def test_the_report_holds_what_is_known_and_leaves_out_what_is_not() -> None:
    masks = [judged("implanted", f"p{i}", 0.6 + i / 20, 0.65 + i / 20, covered=1.0) for i in range(6)]
    masks += [judged("untouched", f"p{i}", 1.0, 0.95) for i in range(6)]
    result = LabelsResult(
        date="2026-01-01", machine="m", dataset="d", on=None, bundle=2, settings=SETTINGS, remarks=("A remark.",),
        masks=tuple(masks),
    )  # fmt: skip
    report = compose_labels(result)
    tables = {table.name: table for table in report.tables}
    assert tables["coverage"].rows == (("an expert's, errors implanted", 6, 1.0, "1.000 to 1.000"),)
    assert {row[0] for row in tables["proposals"].rows} == {"raw"}
    assert not any("extracted" in str(row[0]) for row in tables["people"].rows)
    assert "A remark." in report.sections[0].text


def test_the_true_quality_lost_in_the_worst_tenth() -> None:
    true = [0.1 * i for i in range(10)]
    assert lost_in_worst(true, true) == 0
    assert lost_in_worst(true[::-1], true) == pytest.approx(0.9)
    assert lost_in_worst(true[::-1], true, share=1.0) == pytest.approx(0)
    assert lost_in_worst([], []) is None


def test_half_of_the_slices_that_hold_anything_are_corrected() -> None:
    mask, truth = np.zeros((4, 4, 9), np.uint8), np.zeros((4, 4, 9), np.uint8)
    mask[1:3, 1:3, 1:7] = 1
    truth[1:3, 1:4, 2:9] = 1
    made = half_corrected(mask, truth, 2, np.random.default_rng(0))
    corrected = [i for i in range(9) if (made[..., i] == truth[..., i]).all() and i]
    assert len(corrected) == 4 and all((made[..., i] == mask[..., i]).all() for i in range(9) if i not in corrected)


@pytest.mark.parametrize("what", ["gone", "damaged", "of other values"])
def test_a_reading_that_cannot_be_read_costs_itself_and_no_scan(folder: Path, tmp_path: Path, what: str) -> None:
    dataset = Dataset(folder)
    for actor, labels in ((ANNA, without_liver(0)), (BERT, draw_case(7)[1])):
        write_labels(labels, tmp_path / "reading.nii.gz")
        record = add_reading(dataset, "scan_0", tmp_path / "reading.nii.gz", actor)
        (tmp_path / "reading.nii.gz").unlink()
    file = dataset.store.label_file(record)
    content = file.read_bytes()
    file.unlink()
    if what == "damaged":
        file.write_bytes(content[:100])
    elif what == "of other values":
        foreign = draw_case(7)[1]
        foreign.array[0, 0, 0] = 9
        write_labels(foreign, file)
    result = evaluate_labels(dataset, tmp_path / "out", NO_PROGRESS, settings=SETTINGS)
    assert {mask.scan for mask in result.masks} == {"scan_0", "scan_1", "scan_3"}
    assert [m.scan for m in result.masks if m.origin == "second observer"] == ["scan_0"], "the other one's"
    (remark,) = [r for r in result.remarks if r.startswith("A second observer's label of scan_0 is left out: ")]
    assert remark in compose_labels(result).sections[0].text
    again = evaluate_labels(dataset, tmp_path / "out", NO_PROGRESS, settings=SETTINGS)
    assert again == result, "what is kept says so again"
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    whole = evaluate_labels(dataset, tmp_path / "out", NO_PROGRESS, settings=SETTINGS)
    assert [m.scan for m in whole.masks if m.origin == "second observer"] == ["scan_0", "scan_0"]
    assert remark not in whole.remarks
