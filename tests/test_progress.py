from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console
from rich.progress import Progress as Bars

from segqc.cli.common import BarProgress, shown_progress
from segqc.progress import LineProgress, NoProgress, Progress


@pytest.mark.parametrize("total", [1, 3, 100, 101, 1000])
def test_a_task_writes_a_line_per_percent_at_most_and_always_its_last(
    caplog: pytest.LogCaptureFixture, total: int
) -> None:
    caplog.set_level(logging.INFO, "segqc")
    progress = LineProgress()
    for done in range(total + 1):
        progress.step(done, total, "scoring: by hand", f"scan_{done}")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == min(total, 100) + 1
    assert lines[0] == f"[{'.' * 20}] 0/{total} scoring: by hand: scan_0"
    assert lines[-1] == f"[{'#' * 20}] {total}/{total} scoring: by hand: scan_{total}"


def test_tasks_are_told_apart_by_their_whole_name(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "segqc")
    progress = LineProgress()
    for task in ("fold: 0", "fold: 1", "fold: 1", "fold: 0"):
        progress.step(0, 0, task)
    assert [record.getMessage().split("] ")[1] for record in caplog.records] == [
        "0/0 fold: 0",
        "0/0 fold: 1",
        "0/0 fold: 0",
    ]


def test_each_task_has_a_bar_of_its_own_whatever_its_details_hold() -> None:
    with Bars(console=Console(file=io.StringIO())) as bars:
        progress: Progress = BarProgress(bars)
        for done in range(4):
            progress.step(done, 3, "fold: 0", "[red]loss: 0.1[/]")
            progress.step(done, 5, "fold: 1")
    assert [(bar.completed, bar.total) for bar in bars.tasks] == [(3, 3), (3, 5)]
    assert [bar.description for bar in bars.tasks] == ["fold: 0: [red]loss: 0.1[/]", "fold: 1"]


@pytest.mark.parametrize(("log_lines", "kind"), [(True, LineProgress), (False, NoProgress)])
def test_no_bar_is_drawn_into_a_file(log_lines: bool, kind: type[Progress], capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress(log_lines=log_lines) as progress:
        assert type(progress) is kind
    assert capsys.readouterr().err == ""
