"""Trainings side by side: the same networks as one after the other, and nothing is lost where a process ends."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from segqc.progress import NO_PROGRESS, NoProgress, Progress
from segqc.training import side_by_side as beside
from segqc.training.assessor import train_assessor
from segqc.training.cases import CaseError
from segqc.training.side_by_side import side_by_side
from tests.test_training import QUICK, STRUCTURES, make_cases, placed

pytestmark = pytest.mark.server  # each process imports PyTorch


class Heard(NoProgress):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.steps: list[tuple[str, int]] = []

    def step(self, done: int, total: int, task: str, detail: str = "", *, unit: str = "scans") -> None:
        self.steps.append((task, done))

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def is_apart() -> bool:
    return multiprocessing.parent_process() is not None


def write(folder: Path, name: str, progress: Progress) -> tuple[str, bool]:
    """A training: keeps the process that did it in a file, and takes that over."""
    path = folder / name
    if not path.exists():
        progress.step(1, 2, name, unit="steps")
        progress.message(f"{name} goes on")
        logging.getLogger("segqc.somewhere").warning("%s warns", name)
        path.write_text(f"{os.getpid()} {torch.get_num_threads()}")
        progress.step(2, 2, name, unit="steps")
    return path.read_text(), is_apart()


def test_each_has_a_process_and_all_is_heard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heard = Heard()
    found = list(side_by_side([partial(write, tmp_path, name) for name in "abc"], QUICK, heard))
    assert not any(apart for _, apart in found)
    done_by = [done.split() for done, _ in found]
    assert len({process for process, _ in done_by} | {str(os.getpid())}) == 4
    assert {threads for _, threads in done_by} == {"1"}
    assert sorted(heard.steps) == [(name, done) for name in "abc" for done in (1, 2)]
    assert heard.messages[0] == "3 trainings go side by side, each with 1 thread."
    assert sorted(heard.messages[1:]) == ["a goes on", "b goes on", "c goes on"]
    assert sorted(record.getMessage() for record in caplog.records) == ["a warns", "b warns", "c warns"]


@pytest.mark.parametrize(
    ("threads", "settings", "count"),
    [(1, QUICK, 2), (2, replace(QUICK, side_by_side=False), 2), (2, QUICK, 1)],
    ids=["one thread", "not wanted", "one training"],
)
def test_otherwise_one_after_the_other(
    tmp_path: Path, threads: int, settings: beside.TrainingSettings, count: int
) -> None:
    torch.set_num_threads(threads)
    found = list(side_by_side([partial(write, tmp_path, name) for name in "ab"[:count]], settings, NO_PROGRESS))
    assert [done for done, _ in found] == [f"{os.getpid()} {threads}"] * count


def test_not_where_the_memory_would_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "_free_bytes", lambda: 3 << 29)
    heard = Heard()
    list(side_by_side([partial(write, tmp_path, name) for name in "ab"], QUICK, heard))
    assert heard.messages[0].startswith("2 trainings go one after the other, as 2 GiB of free memory may not hold")
    assert heard.messages[1:] == ["a goes on", "b goes on"]


def die_apart(folder: Path, name: str, progress: Progress) -> tuple[str, bool]:
    if is_apart():
        os.kill(os.getpid(), signal.SIGKILL)
    return write(folder, name, progress)


def sleep_apart(folder: Path, name: str, progress: Progress) -> tuple[str, bool]:
    if is_apart():
        (folder / f"{name} pid").write_text(str(os.getpid()))
        time.sleep(3600)
    return write(folder, name, progress)


def test_what_a_killed_process_leaves_is_done_here(tmp_path: Path) -> None:
    heard = Heard()
    found = list(side_by_side([partial(sleep_apart, tmp_path, "a"), partial(die_apart, tmp_path, "b")], QUICK, heard))
    assert [done.split()[0] for done, _ in found] == [str(os.getpid())] * 2
    assert heard.messages[1].startswith("The trainings go one after the other now: a process of one was killed by SIG")
    if (pid := tmp_path / "a pid").exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


def refuse(folder: Path, progress: Progress) -> tuple[str, bool]:
    raise CaseError(make_cases(folder, 1)[0], "it is too small")


def test_an_error_is_met_here_as_it_is(tmp_path: Path) -> None:
    heard = Heard()
    with pytest.raises(CaseError, match="cannot be used: it is too small") as met:
        list(side_by_side([partial(write, tmp_path, "a"), partial(refuse, tmp_path)], QUICK, heard))
    assert met.value.case
    assert any(message.endswith("a process of one was not able to do it.") for message in heard.messages)


def test_an_ensemble_is_the_same_side_by_side(tmp_path: Path) -> None:
    cases = make_cases(tmp_path / "data", 6)
    splits = placed(cases)
    settings = replace(QUICK, ensemble=True)
    together = train_assessor(cases, STRUCTURES, splits, settings, tmp_path / "together", NO_PROGRESS)
    torch.set_num_threads(1)
    alone = train_assessor(cases, STRUCTURES, splits, settings, tmp_path / "alone", NO_PROGRESS)
    assert together.version == alone.version


def test_processes_end_with_the_one_that_waits(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        from functools import partial
        from pathlib import Path
        import torch
        from segqc.progress import NO_PROGRESS
        from segqc.training.side_by_side import side_by_side
        from tests.test_side_by_side import QUICK, sleep_apart

        if __name__ == "__main__":
            torch.set_num_threads(2)
            side_by_side([partial(sleep_apart, Path({str(tmp_path)!r}), name) for name in "ab"], QUICK, NO_PROGRESS)
        """
    )
    (tmp_path / "waits.py").write_text(script)
    root = str(Path(__file__).parents[1])
    waiting = subprocess.Popen([sys.executable, tmp_path / "waits.py"], env={**os.environ, "PYTHONPATH": root})
    notes = [tmp_path / f"{name} pid" for name in "ab"]
    while not all(note.exists() and note.read_text() for note in notes):
        assert waiting.poll() is None
        time.sleep(0.1)
    waiting.kill()
    waiting.wait()
    for note in notes:
        while Path(f"/proc/{note.read_text()}/stat").exists():
            if Path(f"/proc/{note.read_text()}/stat").read_text().split()[2] == "Z":
                break
            time.sleep(0.1)
