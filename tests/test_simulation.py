"""The learning-curve study: its file, its annotator, its curves, and units that the product itself runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from segqc.cli.main import app
from segqc.errors import SegqcError
from segqc.evaluation.simulation.annotator import correct, generator_of
from segqc.evaluation.simulation.curves import area, at, cost_of
from segqc.evaluation.simulation.results import result_of
from segqc.evaluation.simulation.study import AnnotatorSettings, Study, StudyError
from segqc.evaluation.simulation.unit import Accepted, Cost, Point, Unit, run_unit
from segqc.loop.dataset import Dataset
from segqc.store import bundles, jobs, labels, rounds, scans
from segqc.store.labels import FINAL
from segqc.training import NoProgress
from segqc.types import LabelArray
from segqc.volumes import Volume
from tests.test_training import make_cases

STUDY = """
start = 4
budgets = [0.5, 0.8, 1.0]
seeds = [0]
[structures]
ball = [1]
[settings.inference]
backend = "pytorch"
[settings.training]
epochs = 2
fold_epochs = 1
people_epochs = 0
steps_per_epoch = 2
folds = 2
gammas = []
ensemble = false
mixed_precision = false
patch = [16, 16, 4]
[arms.uniform]
strategy = "uniform-random"
assessed = false
[arms."worst first"]
strategy = "segqc"
"""


def read(folder: Path, text: str = STUDY) -> Study:
    path = folder / "study.toml"
    path.write_text(text)
    return Study.read(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of ten scans, two of them for the test."""
    made = tmp_path_factory.mktemp("made")
    cases = make_cases(made, 10)
    folder = tmp_path_factory.mktemp("data")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for case in cases:
        shutil.copy(case.scan, folder / "images" / f"{case.id}.nii.gz")
        shutil.copy(case.labels, folder / "labels" / f"{case.id}.nii.gz")
    ids = [case.id for case in cases]
    (folder / "splits.json").write_text(json.dumps({"train": ids[:8], "test": ids[8:]}))
    return folder


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("budgets = [0.5, 0.5]", "each above the one before"),
        ("budgets = [0.5, 1.5]", "less than or equal to 1"),
        ("start = -1", "greater than or equal to 0"),
        ("star = 4", "star"),
        ("start = ", "not a TOML file"),
        ("seeds = []", "at least 1 item"),
        ("seeds = [-1]", "greater than or equal to 0"),
        ("settings.training.epoch = 3", "the arm 'a': .*has no setting 'epoch'; did you mean 'epochs'"),
        ("arms.A.strategy = 'segqc'", "the arms 'A' and 'a' would have one folder"),
        ("arms.b.strategy = 'worst'", "the arm 'b': there is no strategy 'worst'; there are segqc"),
        (
            "arms.b = {strategy = 'ensemble', assessed = false}",
            "leave 'assessed = false' away, as the strategy 'ensemble' needs",
        ),
        (
            "settings.annotation.slices = 3\narms.b = {strategy = 'tta', assessed = false}",
            "the arm 'b': leave 'assessed = false' away, as 'annotation.slices' needs whole rounds",
        ),
    ],
)
def test_a_study_that_cannot_be_meant_is_refused_with_its_file(tmp_path: Path, wrong: str, said: str) -> None:
    with pytest.raises(StudyError, match=said) as raised:
        read(tmp_path, f"{wrong}\n[structures]\nball = [1]\n[arms.a]\nstrategy = 'segqc'\n")
    assert str(raised.value).startswith(str(tmp_path / "study.toml"))


def test_settings_of_an_arm_lie_over_those_of_the_study(tmp_path: Path) -> None:
    study = read(tmp_path, STUDY + "[arms.mine]\nstrategy = 'segqc'\nsettings.training.epochs = 7\n")
    settings = study.settings_of(tmp_path, study.arm("mine"), 3).training_settings("segmentation")
    assert (settings.epochs, settings.fold_epochs, settings.seed) == (7, 1, 3)
    with pytest.raises(StudyError, match="no arm 'yours'; there are 'uniform', 'worst first', 'mine'"):
        study.arm("yours")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"start": 9}, "starts with 9 labelled scans, but has 8 to annotate"),
        ({"start": 4, "max_scans": 3}, "starts with 4 labelled scans, but has 3 to annotate"),
        ({"test": "train"}, "is in 'train' and in 'train'; test scans must not train"),
        ({"test": "nobody"}, "no labelled scans in 'nobody'"),
        ({"structures": {"ball": (2,)}}, "holds the label value 1, and the structures' values are 2"),
    ],
)
def test_a_data_set_that_does_not_fit_the_study_is_refused_before_anything_is_made(
    data: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    shutil.copytree(data, tmp_path / "data")
    splits = json.loads((data / "splits.json").read_text())
    (tmp_path / "data" / "splits.json").write_text(json.dumps({**splits, "nobody": ["somebody"]}))
    study = read(tmp_path).model_copy(update=changes)
    with pytest.raises(SegqcError, match=said):
        run_unit(study, "uniform", 0, tmp_path / "data", tmp_path / "unit", NoProgress())
    assert not (tmp_path / "unit" / "dataset").exists()


def truth_and_mask() -> tuple[Volume, LabelArray]:
    array = np.zeros((20, 20, 6), np.uint8)
    array[5:15, 5:15, 1:5] = 1
    mask = np.zeros_like(array)
    mask[5:12, 5:15, 2:6] = 1
    mask[0:2, 0:2, 3] = 1  # an error by itself
    return Volume(array, np.diag([1.0, 1.0, 3.0, 1.0])), mask


def test_an_annotator_makes_the_opened_slices_true_and_leaves_all_others() -> None:
    truth, mask = truth_and_mask()
    whole = correct(mask, truth, AnnotatorSettings(), generator_of(0, "a"))
    np.testing.assert_array_equal(whole, truth.array)
    part = correct(mask, truth, AnnotatorSettings(), generator_of(0, "a"), (3, 5))
    np.testing.assert_array_equal(part[..., [3, 5]], np.asarray(truth.array)[..., [3, 5]])
    np.testing.assert_array_equal(part[..., [0, 1, 2, 4]], mask[..., [0, 1, 2, 4]])


def test_an_annotators_slips_are_drawn_for_each_scan_once_and_for_all() -> None:
    truth, mask = truth_and_mask()
    np.testing.assert_array_equal(correct(mask, truth, AnnotatorSettings(missed_share=1), generator_of(0, "a")), mask)
    settings = AnnotatorSettings(boundary_noise_mm=2, missed_share=0.5)
    first = correct(mask, truth, settings, generator_of(0, "a"))
    np.testing.assert_array_equal(first, correct(mask, truth, settings, generator_of(0, "a")))
    assert (first != correct(mask, truth, settings, generator_of(0, "b"))).any()
    assert (first != truth.array).any()
    noisy = correct(truth.array.astype(np.uint8), truth, AnnotatorSettings(boundary_noise_mm=2), generator_of(0, "a"))
    wrong = (noisy != truth.array).sum()
    assert 0 < wrong < 0.5 * np.asarray(truth.array).sum()


def point(share: float, dice: float, accepted: tuple[Accepted, ...] = ()) -> Point:
    cost = Cost(scans=1, slices=round(100 * share), changed_slices=0, voxels=0, minutes=1.0)
    return Point(cost=cost, share=share, test_dice=(dice,), labels_dice=dice, accepted=accepted, seconds=1.0)


def test_areas_costs_and_heights_are_of_straight_lines_between_points() -> None:
    points = [point(0.1, 0.5), point(0.3, 0.7), point(0.5, 0.8)]
    dice = np.array([p.mean_test_dice for p in points])
    assert area(points, dice, 0.1, 0.3) == pytest.approx(0.6)
    assert area(points, dice, 0.2, 0.4) == pytest.approx((0.65 + 0.725) / 2)
    assert area(points, dice, 0.1, 1.0) == pytest.approx((0.2 * 0.6 + 0.2 * 0.75 + 0.5 * 0.8) / 0.9)
    assert at(points, dice, 0.2) == pytest.approx(0.6)
    assert at(points, dice, 0.05) is None
    assert at(points, dice, 0.9) == pytest.approx(0.8)
    assert cost_of(points, dice, 0.6) == pytest.approx(0.2)
    assert cost_of(points, dice, 0.4) == pytest.approx(0.1)
    assert cost_of(points, dice, 0.9) is None


def test_a_result_sums_up_over_the_seeds(tmp_path: Path) -> None:
    study = read(tmp_path)
    bad = Accepted(scan="s", estimated=0.9, low=0.8, true=0.5)

    def unit(arm: str, seed: int, points: tuple[Point, ...]) -> Unit:
        return Unit(
            study=study, arm=arm, seed=seed, all_slices=100, test_scans=("t",), date="2026-01-01", machine="m",
            points=points,
        )  # fmt: skip

    units = [
        unit("uniform", 0, (point(0.1, 0.5), point(1.0, 0.8))),
        unit("uniform", 1, (point(0.1, 0.6), point(1.0, 0.8))),
        unit("worst first", 0, (point(0.1, 0.5, (replace(bad, true=0.9),)), point(0.2, 0.78, (bad,)))),
    ]
    result = result_of(units)
    rows = {row[0]: dict(zip(result.curves.columns, row, strict=True)) for row in result.curves.rows}
    assert rows["uniform"]["seeds"] == 2
    assert rows["uniform"]["area"] == pytest.approx((0.65 + 0.7) / 2)
    assert rows["uniform"]["sd"] == pytest.approx(np.std([0.65, 0.7], ddof=1))
    assert rows["worst first"]["sd"] is None
    assert rows["worst first"]["cost of 95%"] == pytest.approx(0.1 + 0.1 * (0.76 - 0.5) / 0.28)
    assert rows["worst first"]["cost of 98%"] is None
    assert result.pseudo_labels is not None
    assert result.pseudo_labels.rows == (("worst first", 1, 2, 1, 1, 0.5, 0.5),)
    assert [figure.name for figure in result.figures] == ["learning-curves", "labels"]


def test_curves_without_a_second_cost_have_no_area(tmp_path: Path) -> None:
    study = read(tmp_path).model_copy(update={"budgets": (1.0,)})
    whole = Unit(
        study=study, arm="uniform", seed=0, all_slices=100, test_scans=("t",), date="2026-01-01", machine="m",
        points=(point(1.0, 0.8),),
    )  # fmt: skip
    row = dict(zip((table := result_of([whole]).curves).columns, table.rows[0], strict=True))
    assert (row["area"], row["sd"], row["opened"]) == (None, None, 1.0)


class Interrupts(NoProgress):
    """Stops a unit at the nth step of a task."""

    def __init__(self, at: int, task: str = "annotating") -> None:
        self.left, self.task = at, task

    def step(self, done: int, total: int, task: str, detail: str = "", *, unit: str = "scans") -> None:
        if task == self.task:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt


def timeless(unit: Unit) -> Unit:
    return replace(unit, points=tuple(replace(p, seconds=0.0) for p in unit.points))


def test_a_unit_annotates_the_whole_pool_in_rounds_and_goes_on_after_an_interruption(
    data: Path, tmp_path: Path
) -> None:
    study = read(tmp_path).model_copy(update={"budgets": (0.5, 1.0)})
    unit = run_unit(study, "worst first", 0, data, tmp_path / "undisturbed", NoProgress())
    assert unit.is_done
    assert [p.share for p in unit.points] == sorted({p.share for p in unit.points})
    assert unit.points[0].cost.scans == 4
    last = unit.points[-1]
    assert (last.share, last.cost.scans, last.labels_dice) == (1.0, 8, 1.0)
    assert last.estimates is None
    first = unit.points[0].estimates
    assert first is not None
    assert first.scans == 4
    assert all(len(p.test_dice) == 2 for p in unit.points)
    with pytest.raises(KeyboardInterrupt):
        run_unit(study, "worst first", 0, data, tmp_path / "interrupted", Interrupts(at=2))
    left = run_unit(study, "worst first", 0, data, tmp_path / "interrupted", NoProgress())
    assert timeless(left) == timeless(unit)
    with pytest.raises(StudyError, match="another study"):
        run_unit(study.model_copy(update={"start": 3}), "worst first", 0, data, tmp_path / "undisturbed", NoProgress())


def test_a_budget_that_is_spent_already_has_no_round_of_its_own(data: Path, tmp_path: Path) -> None:
    study = read(tmp_path, STUDY.replace("[0.5, 0.8, 1.0]", "[0.1, 0.2, 0.3, 0.6]"))
    points = run_unit(study, "uniform", 0, data, tmp_path / "unit", NoProgress()).points
    assert [p.share for p in points] == [0.5, 0.5, 0.5, 0.625]
    assert [p.seconds > 0 for p in points] == [True, False, False, True]
    with Dataset(tmp_path / "unit" / "dataset").store.read() as transaction:
        assert len(bundles.listing(transaction)) == 2


def test_a_unit_that_was_interrupted_while_it_measured_does_not_train_again(data: Path, tmp_path: Path) -> None:
    study = read(tmp_path).model_copy(update={"budgets": (0.5, 0.6)})
    with pytest.raises(KeyboardInterrupt):
        run_unit(study, "worst first", 0, data, tmp_path / "unit", Interrupts(4, "measuring the test scans"))
    unit = run_unit(study, "worst first", 0, data, tmp_path / "unit", NoProgress())
    with Dataset(tmp_path / "unit" / "dataset").store.read() as transaction:
        assert len(rounds.listing(transaction)) == len(unit.points) == 2


def test_a_unit_goes_on_however_often_its_round_was_interrupted(data: Path, tmp_path: Path) -> None:
    study = read(tmp_path).model_copy(update={"budgets": (0.5,)})
    for _ in range(jobs.MAX_ATTEMPTS + 1):
        with pytest.raises(KeyboardInterrupt):
            run_unit(study, "worst first", 0, data, tmp_path / "interrupted", Interrupts(1, "round"))
    left = run_unit(study, "worst first", 0, data, tmp_path / "interrupted", NoProgress())
    assert timeless(left) == timeless(run_unit(study, "worst first", 0, data, tmp_path / "undisturbed", NoProgress()))


@pytest.mark.parametrize("arm", ["uniform", "worst first"])
def test_too_few_scans_for_the_first_round_are_an_error_that_says_what_helps(
    data: Path, tmp_path: Path, arm: str
) -> None:
    study = read(tmp_path, STUDY.replace("start = 4", "start = 2").replace("[0.5,", "[0.1,"))
    with pytest.raises(StudyError, match=r"at least 4 patients, found 2; .* a larger 'start' or first budget does"):
        run_unit(study, arm, 0, data, tmp_path / "unit", NoProgress())


def test_a_unit_that_has_not_annotated_yet_begins_anew_and_takes_over_nothing(data: Path, tmp_path: Path) -> None:
    study = read(tmp_path)
    run_unit(study.model_copy(update={"budgets": (0.5,)}), "uniform", 0, data, tmp_path / "unit", NoProgress())
    (tmp_path / "unit" / "unit.json").unlink()  # as if it had been ended while its folder was made
    unit = run_unit(
        study.model_copy(update={"start": 6, "budgets": (0.5,)}), "uniform", 0, data, tmp_path / "unit", NoProgress()
    )
    assert [p.cost.scans for p in unit.points] == [6]


def test_an_arm_of_worst_slices_opens_no_others(data: Path, tmp_path: Path) -> None:
    study = read(
        tmp_path,
        STUDY + "[arms.slices]\nstrategy = 'segqc'\n"
        "settings.annotation = {slices = 2, audit_share = 0.0, validation_share = 0.0}\n",
    )
    unit = run_unit(study, "slices", 0, data, tmp_path / "slices", NoProgress())
    assert unit.is_done
    last = unit.points[-1]
    dataset = Dataset(tmp_path / "slices" / "dataset")
    with dataset.store.read() as transaction:
        found = labels.current_of_all(transaction, FINAL)
        splits = {scan.name: scan.split for scan in scans.listing(transaction)}
    opened = {name: label.checked_slices for name, label in found.items()}
    asked = [slices for name, slices in opened.items() if slices is not None]
    assert asked
    assert all(len(slices) == 2 for slices in asked)
    assert all(splits[name] == "train" for name, slices in opened.items() if slices is not None)
    depth = unit.all_slices // 8
    assert last.cost.slices == sum(depth if slices is None else len(slices) for slices in opened.values())
    assert last.share < 1


def test_the_command_runs_a_study_and_writes_what_it_shows(data: Path, tmp_path: Path) -> None:
    read(tmp_path)
    out = tmp_path / "out"
    run = CliRunner().invoke(
        app, ["simulate", str(tmp_path / "study.toml"), str(data), "--out", str(out), "--arm", "uniform", "--json"]
    )
    assert run.exit_code == 0, run.output
    shown = json.loads(run.stdout)["arms"]
    assert [row["arm"] for row in shown] == ["uniform"]
    assert {path.name for path in out.iterdir()} == {
        "units", "learning-curves.json", "curves.csv", "curves.md", "learning-curves.svg", "labels.svg"
    }  # fmt: skip
    read(tmp_path, STUDY.replace("epochs = 2", "epochs = 3"))
    other = CliRunner().invoke(
        app, ["simulate", str(tmp_path / "study.toml"), str(data), "--out", str(out), "--arm", "uniform", "--seed", "1"]
    )
    assert "uniform-0: holds a unit of another study" in str(other.exception)
    unknown = CliRunner().invoke(app, ["simulate", str(tmp_path / "study.toml"), str(data), "--arm", "nobody"])
    assert "there is no arm 'nobody'" in str(unknown.exception)
