"""The loop by itself: a server on the sample scans, a simulated annotator, and three rounds that nobody begins.

It takes some minutes and prints what happens: ``pytest -m slow -s tests/e2e/test_automatic_rounds.py``.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomlkit

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

import psutil
import requests

from segqc.loop.dataset import Dataset
from segqc.server.annotator import Correction, annotate
from segqc.store import bundles

pytestmark = [pytest.mark.server, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "sample-datastore"
NOT_COPIED = shutil.ignore_patterns("segqc", "original", "returned", "likely-errors", "pseudo-label*")
CORRECTIONS = 2
HOURS = 2
SETTINGS: Mapping[str, Mapping[str, object]] = {
    # every labelled patient calibrates: with the first corrections there are enough of them for intervals
    "training": {"ensemble": True, "patch": [64, 64, 16]},
    "training.segmentation": {"epochs": 30},
    "training.segqc": {"epochs": 5, "fold_epochs": 5},
    "round": {"after_corrections": CORRECTIONS},
    "pseudo_labels": {"mode": "top", "top_share": 0.5, "min_dice": 0.0},
    "annotation": {"audit_share": 0.2, "validation_share": 0.0},
}


def write_settings(folder: Path, changes: Mapping[str, Mapping[str, object]]) -> None:
    """Change values in the folder's settings, as somebody does in an editor."""
    path = folder / "segqc.toml"
    document = tomlkit.parse(path.read_text(encoding="utf-8"))
    for name, values in changes.items():
        table: Any = document
        for part in name.split("."):
            table = table.setdefault(part, tomlkit.table())
        table.update(values)
    path.write_text(tomlkit.dumps(document), encoding="utf-8")


def make_folder(folder: Path) -> Path:
    """A copy of the sample scans with short trainings and rounds that begin by themselves."""
    shutil.copytree(SAMPLES, folder, ignore=NOT_COPIED)
    write_settings(folder, SETTINGS)
    return folder


@dataclass(frozen=True)
class Loop:
    """A running server on a folder."""

    folder: Path
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def command(self, *arguments: str) -> str:
        """What a command of segqc prints of the folder."""
        command = [sys.executable, "-m", "segqc", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
        assert done.returncode == 0, done.stderr
        return done.stdout

    def show(self, *arguments: str) -> None:
        """Print a command as it is typed, and what it prints."""
        shown = [argument.replace(str(self.folder), self.folder.name) for argument in arguments]
        print(f"\n$ segqc {' '.join(shown)}\n{self.command(*arguments).replace(str(self.folder), self.folder.name)}")

    def table(self, *arguments: str) -> Any:
        """The same for programs."""
        return json.loads(self.command(*arguments, str(self.folder), "--json"))

    def jobs(self) -> list[dict[str, Any]]:
        """The jobs that run or wait, as clients see them."""
        found: list[dict[str, Any]] = requests.get(f"{self.url}/info/", timeout=60).json()["jobs"]
        return found

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait until something is so; nothing may fail meanwhile."""
        started = time.monotonic()
        while not condition():
            log = self.log.read_text(encoding="utf-8")
            assert self.process.poll() is None, log
            assert "ended: failed" not in log and "Traceback" not in log, log[-4000:]
            assert time.monotonic() - started < HOURS * 3600, log[-4000:]
            time.sleep(2)
        print(f"{what} ({time.monotonic() - started:.0f} s)", flush=True)

    def serving(self) -> int | None:
        """The number of the bundle that serves, if it holds both networks."""
        with Dataset(self.folder).store.read() as transaction:
            found = bundles.serving(transaction)
        return found.bundle.id if found is not None and found.bundle.assessor_version is not None else None

    def correct(self) -> list[Correction]:
        """Let the simulated annotator correct what the server suggests; a round is due then."""
        done = list(annotate(self.url, self.folder / "truth", Dataset(self.folder).structures, count=CORRECTIONS))
        for one in done:
            estimate = "no estimate" if one.estimated_dice is None else f"estimated Dice {one.estimated_dice:.2f}"
            print(
                f"  {one.scan}, chosen by {one.strategy}: {estimate}, true {one.true_dice:.2f}; corrected", flush=True
            )
        assert len(done) == CORRECTIONS
        return done

    def wait_for_round(self, number: int) -> dict[str, Any]:
        """Wait for the end of a round that has begun by itself, and of the scoring after it."""
        self.wait(f"round {number} has ended, and all waiting scans are scored", lambda: self.jobs() == [])
        found: list[dict[str, Any]] = self.table("rounds")["rounds"]
        assert [row["round"] for row in found] == list(range(1, number + 1))
        assert found[-1]["state"] == "done"
        assert found[-1]["by"] == "server"
        assert found[-1]["reason"].startswith(f"by the settings: {CORRECTIONS} corrections ({CORRECTIONS} simulated)")
        return found[-1]

    def is_in_a_round(self) -> bool:
        """Whether a round has begun."""
        return any(job["kind"] == "round" and job["status"] == "RUNNING" for job in self.jobs())

    def is_training(self) -> bool:
        """Whether the round that runs has chosen its pseudo-labels, and trains."""
        return any(job["kind"] == "round" and ": segmentation" in (job["message"] or "") for job in self.jobs())


def environment() -> dict[str, str]:
    """For processes of this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def answers(url: str) -> bool:
    """Whether a server answers."""
    try:
        return requests.get(f"{url}/info/", timeout=60).status_code == 200
    except requests.ConnectionError:
        return False


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    folder = make_folder(tmp_path / "sample-datastore")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "terminal.log"
    with log.open("wb") as terminal:
        process = subprocess.Popen(
            [sys.executable, "-m", "segqc", "serve", str(folder), "--port", str(port)],
            stdout=terminal, stderr=subprocess.STDOUT, env=environment(),
        )  # fmt: skip
    children: list[psutil.Process] = []
    try:
        yield Loop(folder, f"http://127.0.0.1:{port}", process, log)
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(60)
        assert "Traceback" not in log.read_text(encoding="utf-8")
    finally:
        process.kill()
        for child in children:
            if child.is_running():
                child.kill()


def test_three_rounds_begin_by_themselves(loop: Loop) -> None:
    loop.wait("the server answers", lambda: answers(loop.url))
    loop.wait("the first networks are trained", lambda: loop.serving() is not None)
    loop.wait("all waiting scans are scored", lambda: loop.jobs() == [])
    first = loop.serving()
    assert first is not None
    assert loop.table("rounds")["next"]["corrections"] == 0, "the first networks know the labels of now"

    print("\nThe first round: suggestions, corrections, and what trains without a person")
    suggested = loop.correct()
    assert any(one.estimated_dice is not None for one in suggested)
    loop.wait("a round has begun by itself", loop.is_in_a_round)
    one = loop.wait_for_round(1)
    assert one["bundle state"] == "serves"
    assert loop.table("pseudo-labels")["pseudo_labels"], "masks are accepted"
    loop.show("pseudo-labels", str(loop.folder))

    print("\nThe second round: while it runs, somebody lets the first networks serve again")
    loop.correct()
    loop.wait("a round has begun by itself", loop.is_in_a_round)
    loop.wait("it trains", loop.is_training)
    loop.show("models", "serve", str(loop.folder), str(first))
    two = loop.wait_for_round(2)
    assert two["pseudo-labels"] > 0, "they have trained, too"
    assert two["bundle state"] == "held"
    assert f"bundle {first} was chosen by hand" in two["held because"]
    assert loop.serving() == first
    loop.show("rounds", "--simulated", str(loop.folder))
    loop.show("models", "serve", str(loop.folder), str(two["bundle"]))
    loop.wait("all waiting scans are scored", lambda: loop.jobs() == [])

    print("\nThe third round")
    loop.correct()
    loop.wait("a round has begun by itself", loop.is_in_a_round)
    three = loop.wait_for_round(3)
    assert three["labels"] == two["labels"] + CORRECTIONS
    assert loop.serving() == (three["bundle"] if three["bundle state"] == "serves" else two["bundle"])

    loop.show("rounds", "--simulated", str(loop.folder))
    loop.show("models", "list", str(loop.folder))
    loop.show("pseudo-labels", "--ended", str(loop.folder))
    loop.show("rank", str(loop.folder))
