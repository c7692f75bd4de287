from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console
from rich.progress import Progress as Bars

from segqc.cli.common import BarProgress, shown_progress
from segqc.progress import LineProgress, NoProgress, Progress, TimeLeft, WholeEstimate


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
    assert lines[0] == f"[{'.' * 20}] 0/{total} scans: scoring: by hand: scan_0"
    assert lines[-1] == f"[{'#' * 20}] {total}/{total} scans: scoring: by hand: scan_{total}"


def test_tasks_are_told_apart_by_their_whole_name(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "segqc")
    progress = LineProgress()
    for done in range(3):
        for task in ("fold: 0", "fold: 1"):
            progress.step(done, 200, task)
    assert [record.getMessage().split("] ")[1] for record in caplog.records] == [
        "0/200 scans: fold: 0",
        "0/200 scans: fold: 1",
        "2/200 scans: fold: 0",
        "2/200 scans: fold: 1",
    ]


def test_the_time_left_of_tasks_that_go_on_side_by_side() -> None:
    clock = Time()
    left = TimeLeft(clock)
    for done in range(11):
        found = [left.after(done, 20, "fold: 0"), left.after(done, 40, "fold: 1")]
        clock.now += 1.0
    assert found == ["10 s left", "30 s left"]
    assert left.after(0, 20, "fold: 0") == ""  # done again


def test_each_task_has_a_bar_of_its_own_whatever_its_details_hold() -> None:
    file = io.StringIO()
    with Bars(console=Console(file=file)) as bars:
        progress: Progress = BarProgress(bars)
        for done in range(4):
            progress.step(done, 3, "fold: 0", "[red]loss: 0.1[/]")
            progress.step(done, 5, "fold: 1", unit="steps")
        progress.message("[red]about 3 min[/]")
    assert "[red]about 3 min[/]" in file.getvalue()
    assert [(bar.completed, bar.total) for bar in bars.tasks] == [(3, 3), (3, 5)]
    assert [bar.fields["unit"] for bar in bars.tasks] == ["scans", "steps"]
    assert [bar.description for bar in bars.tasks] == ["fold: 0: [red]loss: 0.1[/]", "fold: 1"]


@pytest.mark.parametrize(("log_lines", "kind"), [(True, LineProgress), (False, NoProgress)])
def test_no_bar_is_drawn_into_a_file(log_lines: bool, kind: type[Progress], capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress(log_lines=log_lines) as progress:
        assert type(progress) is kind
    assert capsys.readouterr().err == ""


class Time:
    """A time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("resumed", [0, 40])
def test_a_line_says_how_long_its_task_still_takes(caplog: pytest.LogCaptureFixture, resumed: int) -> None:
    caplog.set_level(logging.INFO, "segqc")
    clock = Time()
    progress = LineProgress(clock)
    for done in range(resumed, 101):
        progress.step(done, 100, "training", unit="steps")
        clock.now += 2.0
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].endswith(f"{resumed}/100 steps: training")
    assert lines[2].endswith("/100 steps: training"), "too early to tell"
    assert lines[10].endswith(f"{resumed + 10}/100 steps, {round(2 * (90 - resumed) / 60)} min left: training")
    assert lines[-2].endswith("99/100 steps, 2 s left: training")
    assert lines[-1].endswith("100/100 steps: training")
    progress.step(0, 100, "the next one")
    assert caplog.records[-1].getMessage().endswith("0/100 scans: the next one"), "the first one's time is not its"


def test_the_whole_is_estimated_once_from_the_steps_that_were_done_now() -> None:
    messages: list[str] = []

    class Messages(NoProgress):
        def message(self, text: str) -> None:
            messages.append(text)

    clock = Time()
    progress = WholeEstimate(Messages(), 1000, "steps", clock)
    progress.step(300, 300, "fold 1", "done by an earlier run", unit="steps")
    clock.now += 100.0  # what is not measured in steps
    progress.step(1, 9, "masks")
    for done in range(101):
        progress.step(done, 300, "fold 2", unit="steps")
        clock.now += 3.0
    (message,) = messages
    assert "about 34 min more" in message, "690 steps of 3 s were left after the first ten"
