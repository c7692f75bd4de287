"""From predictions to results to a report: what a reader finds in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from segqc.evaluation.data.manifest import MANIFESTS, Manifest, TestMask
from segqc.evaluation.data.predictions import KnownMask, find_truths, load_predictions, load_truths, predict, save
from segqc.evaluation.data.run import Run
from segqc.evaluation.data.settings import EvaluationSettings
from segqc.evaluation.data.storage import as_json
from segqc.evaluation.experiments.comparison import (
    RESULTS,
    ExperimentResult,
    experiment_masks,
    predictions_path,
    structure_result,
    truth_path,
)
from segqc.evaluation.methods.estimates import AssessedMask, Estimate, estimate_from_error_map
from segqc.evaluation.methods.registry import CROSS_FITTED, SCAN_ONLY, SEGQC, TTA, calibrated_on
from segqc.evaluation.report.compose import compose, write
from segqc.evaluation.report.document import Report
from segqc.evaluation.report.formats import NUMBERS
from segqc.networks.assessor import mask_sha256
from segqc.quality.metrics import METRIC_NAMES, EmptyRule
from segqc.training.cases import read_case
from segqc.types import Structure
from segqc.volumes import Volume, write_labels
from tests.test_evaluation import make_folders, write_dataset

pytestmark = pytest.mark.server

BALL = Structure("ball", (1,))
# how far from the true error map each method's is
NOISE = {SEGQC: 0.0, SCAN_ONLY: 0.0, CROSS_FITTED: 0.2, TTA: 0.45}


class Noisy:
    """The true error map, drawn towards 0.3, unlike from scan to scan: no line mends that."""

    def __init__(self, name: str, run: Run) -> None:
        self.name, self.share = name, NOISE[name]
        self.truth = {c.id: read_case(c, (1,))[1] for c in (*run.cohort.train, *run.cohort.test)}
        self.case = ""

    def estimate(self, mask: AssessedMask) -> tuple[Estimate, ...]:
        wrong = BALL.mask(mask.labels.array) != BALL.mask(self.truth[self.case].array)
        share = self.share * (1 + 0.2 * (int(self.case.removeprefix("s")) % 4 - 1.5))
        error = (wrong * (1 - share) + share * 0.3).astype(np.float32)
        return (estimate_from_error_map(BALL.mask(mask.labels.array), error, 2, EmptyRule(0.0, 1.0)),)


def spoilt(labels: np.ndarray, i: int) -> np.ndarray:
    """The label map with a part of it cut off."""
    mask = labels.copy()
    mask[3 : 4 + i % 5] = 0
    return mask


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, ExperimentResult]:
    """A run of four methods whose networks nobody had to train."""
    folder = tmp_path_factory.mktemp("run")
    data = write_dataset(make_folders(folder / "data"), [f"s{i:02}" for i in range(24)])
    run = Run.open(folder / "run", data, {"ball": (1,)}, EvaluationSettings(folds=2, test_share=0.5, draws=200))
    masks = []
    for i, case in enumerate(run.cohort.test):
        scan, truth = read_case(case, (1,))
        labels = Volume(spoilt(truth.array, i), scan.affine, scan.acquisition_axis)
        path = run.folder / "test-masks" / f"{case.id}-served.nii.gz"
        path.parent.mkdir(exist_ok=True)
        write_labels(labels, path)
        masks.append(TestMask(f"{case.id}-served", case.id, case.patient, "", 0.5, mask_sha256(labels)))
    manifest = Manifest(0, (0.0, 1.01), len(masks), ("",), tuple(masks))
    (run.folder / "test-masks" / "served.json").write_bytes(MANIFESTS.dump_json(manifest))

    def calibrating(fold: int) -> Iterator[KnownMask]:
        for i, case in enumerate(run.cohort.held(fold)):
            scan, truth = read_case(case, (1,))
            labels = Volume(spoilt(truth.array, i), scan.affine, scan.acquisition_axis)
            yield KnownMask(case.id, case.patient, AssessedMask(scan, labels, None), truth)

    def named(known: Iterator[KnownMask], method: Noisy) -> Iterator[KnownMask]:
        for one in known:
            method.case = one.id.removesuffix("-served")
            yield one

    for fold in range(2):
        save(truth_path(run, f"calibration-{fold}"), find_truths(calibrating(fold), [BALL], run.settings))
    save(truth_path(run, "served"), find_truths(experiment_masks(run, "served"), [BALL], run.settings))
    for name in NOISE:
        method = Noisy(name, run)
        for fold in range(2):
            predicted = predict(
                named(calibrating(fold), method), method, [BALL], run.settings, {}, maps="extracted boxes"
            )
            save(predictions_path(run, f"calibration-{fold}", name), predicted)
        predicted = predict(named(experiment_masks(run, "served"), method), method, [BALL], run.settings, {})
        save(predictions_path(run, "served", name), predicted)
    return run, structure_result(run, "served", list(NOISE), 0)


@pytest.fixture(scope="module")
def report(finished: tuple[Run, ExperimentResult]) -> Report:
    """The report of that run."""
    run, result = finished
    return compose(run, [result])


def test_results_say_what_is_true_of_the_methods(finished: tuple[Run, ExperimentResult]) -> None:
    _, result = finished
    assert RESULTS.validate_json(RESULTS.dump_json(result)) == result
    dice = {r.method: r for r in result.rows if r.metric == "dice" and r.dimension == "3D"}
    assert dice[SEGQC].raw.mae == pytest.approx(0.0, abs=1e-6)
    assert dice[TTA].raw.mae is not None and dice[TTA].raw.mae > 0.05
    family = next(c for c in result.compared if (c.metric, c.dimension, c.statistic) == ("dice", "3D", "mae"))
    verdicts = {o: v.outcome for o, v in zip(family.others, family.verdicts, strict=True)}
    assert verdicts[SCAN_ONLY] == "tie"
    assert verdicts[TTA] == "better"
    captured = {o.name: o.captured.value for o in result.ordered[0].comparison.orders}
    assert captured[SEGQC] == pytest.approx(1.0)
    assert {(c.kind, c.metric) for c in result.covered} == {
        (kind, metric) for kind in ("resplit", "test") for metric in METRIC_NAMES
    }
    assert [s.method for s in result.shared] == list(NOISE)
    found = next(d for d in result.detected if (d.method, d.predicted, d.true) == (SEGQC, "raw", "raw"))
    assert all(b.precision.value in (1.0, None) for b in found.boxes)
    assert found.chosen is None
    extracted = next(d for d in result.detected if (d.method, d.predicted, d.true) == (SEGQC, *["extracted"] * 2))
    assert extracted.chosen == 0.1, "the errors of these masks are smaller than a box"


def test_a_report_says_where_masks_were_fixed_after_the_trainings(
    finished: tuple[Run, ExperimentResult], report: Report
) -> None:
    run, result = finished

    def text_of(report: Report) -> str:
        return " ".join([*report.sections[1].text, *(p.title for p in report.sections[-1].points)])

    assert "before any method was trained." in text_of(report) and "fixed late" not in text_of(report)
    path = run.folder / "test-masks" / "served.json"
    before = path.read_bytes()
    path.write_bytes(MANIFESTS.dump_json(replace(MANIFESTS.validate_json(before), after_training=True)))
    late = text_of(compose(run, [result]))
    path.write_bytes(before)
    assert "but for those of experiments that were asked for later." in late and "Some masks were fixed late" in late


def test_a_report_calls_ties_ties_and_keeps_its_numbers(finished: tuple[Run, ExperimentResult], report: Report) -> None:
    run, result = finished
    summary = " ".join(item for point in report.sections[0].points for item in point.items)
    assert "can't be told apart from scan only" in summary
    assert "more exact than" in summary and TTA in summary
    assert "What looking at the mask adds is not shown: scan only never sees it." in summary
    assert any("not to conclude" in section.title for section in report.sections)
    assert {"scatter-served-ball", "risk-served-ball", "mae-served", "curves-3d-served-ball", "boxes-served-ball"} <= {
        figure.name for figure in report.figures
    }
    run.cached("results/served.json", as_json(RESULTS), lambda: result)
    path = write(run)
    kept = NUMBERS.validate_json((path.parent / "tables.json").read_bytes())
    main = next(t for t in kept.tables if t.name == "main-served-ball")
    assert [row[0] for row in main.rows] == list(NOISE)
    assert "ball" in path.read_text()


def test_a_report_says_where_looking_at_the_mask_does_harm(
    finished: tuple[Run, ExperimentResult], report: Report
) -> None:
    run, result = finished
    compared = tuple(
        replace(c, verdicts=tuple(
            replace(v, outcome="worse") if other == SCAN_ONLY else v
            for other, v in zip(c.others, c.verdicts, strict=True)
        ))
        for c in result.compared
    )  # fmt: skip
    harm = "does harm"
    texts = [
        " ".join(item for point in composed.sections[0].points for item in point.items)
        for composed in (report, compose(run, [replace(result, compared=compared)]))
    ]
    assert harm not in texts[0]
    assert "More exact than SegQC: scan only." in texts[1] and harm in texts[1]


def test_coverage_of_the_dice_is_told_in_strata_and_of_the_other_metrics_over_all(report: Report) -> None:
    tables = {table.name: table for table in report.tables}
    assert len({row[2] for row in tables["coverage-served"].rows}) > 1
    others = tables["coverage-metrics-served"].rows
    assert [row[1:4] for row in others] == [
        (metric, tested, "all")
        for metric in ("IoU", "ARVD", "RVD")
        for tested in ("random splits", "on this experiment's masks")
    ]


def test_tables_are_drawn_again_from_the_results_alone(
    finished: tuple[Run, ExperimentResult], report: Report, tmp_path: Path
) -> None:
    run, result = finished
    bare = compose(Run(tmp_path / "bare", replace(run.description, dataset=str(tmp_path / "gone"))), [result])
    full = {table.name: table.rows for table in report.tables}
    again = {table.name: table.rows for table in bare.tables}
    assert set(full) - set(again) == {"masks"}
    drawn_alike = set(again) - {"setup", "evaluated-sets"}  # these two tell of the data set and the manifest as well
    assert all(again[name] == full[name] for name in drawn_alike)
    assert not [figure.name for figure in bare.figures if figure.name.startswith(("scatter", "risk", "example"))]


def test_what_a_method_does_not_say_is_left_out(finished: tuple[Run, ExperimentResult]) -> None:
    run, result = finished
    silent = replace(result, rows=tuple(r for r in result.rows if r.method != TTA), covered=())
    report = compose(run, [silent])
    assert TTA not in {row[0] for table in report.tables if table.name == "main-served-ball" for row in table.rows}
    assert "Prediction intervals" not in {section.title for section in report.sections}
    with pytest.raises(ValueError, match="at least one experiment with estimates"):
        compose(run, [replace(result, rows=())])


def test_variants_have_a_table_of_their_own(finished: tuple[Run, ExperimentResult]) -> None:
    run, result = finished
    variant = tuple(replace(r, method="Dice loss") for r in result.rows if r.method == CROSS_FITTED)
    report = compose(run, [result, replace(result, rows=result.rows + variant)])
    methods = {table.name: {row[0] for row in table.rows} for table in report.tables}
    assert "Dice loss" in methods["ablations-served-ball"]
    assert not any("Dice loss" in names for name, names in methods.items() if not name.startswith("ablations"))


def test_a_changed_mask_is_noticed(finished: tuple[Run, ExperimentResult], tmp_path: Path) -> None:
    from segqc.evaluation.data.cohort import CohortError
    from segqc.evaluation.data.mask_sources import check_masks

    run, _ = finished
    manifest = MANIFESTS.validate_json((run.folder / "test-masks" / "served.json").read_bytes())
    check_masks(run, manifest)
    wrong = Manifest(0, manifest.bins, 1, ("",), (TestMask("s00-x", "s00", "s00", "", 0.5, "0" * 64),))
    one = run.folder / "test-masks" / f"{manifest.masks[0].id}.nii.gz"
    (run.folder / "test-masks" / "s00-x.nii.gz").write_bytes(one.read_bytes())
    with pytest.raises(CohortError, match=r"s00-x.nii.gz: is not the mask of the manifest"):
        check_masks(run, wrong)


def test_all_methods_are_scored_on_the_slices_that_all_of_them_speak_of(
    finished: tuple[Run, ExperimentResult], tmp_path: Path
) -> None:
    run, before = finished
    shutil.copytree(run.folder, tmp_path / "run")
    again = replace(run, folder=tmp_path / "run")
    predicted = load_predictions(predictions_path(again, "served", TTA))
    arvd = METRIC_NAMES.index("arvd")
    in_mask = load_truths(truth_path(again, "served")).voxels[:, 0, 0] > 0
    spoken = np.flatnonzero(np.isfinite(predicted.slices[:, 0, arvd]) & in_mask)
    silent = predicted.slices.copy()
    silent[spoken[:3], 0, arvd] = np.nan
    save(predictions_path(again, "served", TTA), replace(predicted, slices=silent))
    result = structure_result(again, "served", list(NOISE), 0)

    def counts(of: ExperimentResult, slices: str) -> dict[str, int]:
        wanted = ("2D", slices, "arvd")
        return {r.method: r.calibrated.n for r in of.rows if (r.dimension, r.slices, r.metric) == wanted}

    assert len(set(counts(before, "mask").values())) == 1
    assert counts(result, "mask") == {m: n - 3 for m, n in counts(before, "mask").items()}
    assert counts(result, "all") == {m: n - 3 * (m == TTA) for m, n in counts(before, "all").items()}


def test_what_the_mask_adds_is_tested_on_bad_and_on_good_masks_apart(
    finished: tuple[Run, ExperimentResult], report: Report
) -> None:
    _, result = finished
    families = {(c.family, c.others): c for c in result.compared if (c.dimension, c.metric) == ("3D", "dice")}
    compared = {family for family, _ in families}
    assert compared == {"methods", "bad masks", "good masks"}, "no variants, no family of them"
    true = [r.calibrated.n for r in result.rows if (r.dimension, r.metric, r.method) == ("3D", "dice", SEGQC)]
    bad, good = (families[name, (SCAN_ONLY, CROSS_FITTED)] for name in ("bad masks", "good masks"))
    assert [b.n + g.n for b, g in zip(bad.comparisons, good.comparisons, strict=True)] == true * 2
    table = next(t for t in report.tables if t.name == "bad-masks-served-ball")
    assert {row[1] for row in table.rows} == {SCAN_ONLY, CROSS_FITTED}


def test_what_has_learnt_from_one_networks_masks_is_calibrated_on_such() -> None:
    early = np.array([False, True, True, False])
    assert calibrated_on(SEGQC, early).all()
    assert calibrated_on("SegQC-TR", early).tolist() == [True, False, False, True]
    assert calibrated_on("median masks only", early).tolist() == [True, False, False, True]
