"""The tables and figures of the docs are those that the kept results give."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from statistics import fmean
from types import ModuleType

import pytest

from segqc.evaluation.report.document import UNDEFINED
from segqc.evaluation.report.formats import NUMBERS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def evaluation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_evaluation", ROOT / "benchmarks" / "evaluation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("data", "structure", "document"),
    [("hippocampus", "hippocampus", "docs/results.md"), ("sunnybrook", "cavity", "docs/measurements.md")],
)
def test_documents_show_the_tables_that_the_kept_results_give(
    evaluation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    data: str, structure: str, document: str,
) -> None:  # fmt: skip
    for kept in evaluation.RESULTS.glob(f"evaluation-{data}-*.json"):
        (tmp_path / kept.name).write_bytes(kept.read_bytes())
    monkeypatch.setattr(evaluation, "RESULTS", tmp_path)
    evaluation.draw(data, "stratified")
    printed = capsys.readouterr().out.split(f"**Estimated 3D Dice of {structure}**\n\n")[1].split("\n\n")[0]
    assert printed.count("\n") > 10
    assert printed in (ROOT / document).read_text()
    assert (tmp_path / f"evaluation-{data}.svg").read_text().rstrip().endswith("</svg>")


def test_seeds_are_kept_and_averaged(evaluation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "RESULTS", tmp_path / "results")
    with pytest.raises(SystemExit, match=r"tables\.json: is missing"):
        evaluation.keep(tmp_path, "data-0")
    with pytest.raises(SystemExit, match="keep"):
        evaluation.draw("data", "stratified")
    (tmp_path / "report").mkdir()
    for seed, mae in enumerate((0.02, 0.04)):
        table = {
            "name": "main-stratified-ball",
            "title": "Estimated 3D Dice of ball",
            "columns": ["method", "MAE", "95% interval", "Pearson", "Spearman", "SegQC is"],
            "rows": [
                ["SegQC", mae, f"{mae / 2:.3f} to {2 * mae:.3f}", 0.9, None, "itself"],
                *([m, 2 * mae, UNDEFINED, None, None, "better" if seed else "tie"] for m in evaluation.TO_BEAT),
            ],
        }
        columns = {goal.table: ["method"] for goal in evaluation.GOALS.values() if goal.table != "main"}
        for goal in evaluation.GOALS.values():
            columns.get(goal.table, []).append(goal.column)
        further = [
            {"name": f"{kind}-stratified-ball", "title": "", "columns": c, "rows": [["SegQC", *[mae] * (len(c) - 1)]]}
            for kind, c in columns.items()
        ]
        numbers = {"title": "t", "facts": {}, "tables": [table, *further]}
        (tmp_path / "report" / "tables.json").write_text(json.dumps(numbers))
        evaluation.keep(tmp_path, f"data-{seed}")
    seeds = [NUMBERS.validate_json((tmp_path / "results" / f"evaluation-data-{n}.json").read_bytes()) for n in (0, 1)]
    tables = evaluation.main_tables(seeds, "stratified")
    ours, *_, constant = evaluation.over_seeds(tables["ball"], "ball").rows
    assert ours[1] == pytest.approx(fmean((0.02, 0.04))) and constant[1] == pytest.approx(0.06)
    assert ours[2:] == ("0.020; 0.040", "0.010 to 0.080", 0.9, None, "itself")
    assert constant[3:] == (UNDEFINED, None, None, "tie; better")
    alone = evaluation.over_seeds(tables["ball"][1:], "ball")
    assert alone.columns[2] == "95% interval" and alone.rows[0][:3] == ("SegQC", 0.04, "0.020 to 0.080")
    wanted, figures = evaluation.figures_of_segqc(seeds, ["ball"], "stratified").rows
    assert (wanted[0], len(wanted)) == ("wanted", len(figures))
    assert figures[0] == "ball" and figures[2] == 0.9
    assert [*figures[1:2], *figures[3:11]] == pytest.approx([0.03] * 9)
    assert figures[11:] == (pytest.approx(0.5), "0 of 6; 6 of 6")
    evaluation.draw("data", "stratified")
