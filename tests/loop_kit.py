"""A real server on a copy of the sample scans, whose loop goes on by itself."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import requests
import tomlkit

from segqc.loop.dataset import Dataset
from segqc.store import bundles

ROOT: Final = Path(__file__).resolve().parents[1]
SAMPLES: Final = ROOT / "sample-datastore"
HOURS: Final = 2


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


@dataclass(frozen=True)
class Loop:
    """A running server on a folder; ``session`` is signed in where that is needed."""

    folder: Path
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    session: requests.Session = field(default_factory=requests.Session)

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
        found: list[dict[str, Any]] = self.session.get(f"{self.url}/info/", timeout=60).json()["jobs"]
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

    def answers(self) -> bool:
        """Whether the server answers, if only that somebody has to sign in."""
        try:
            return self.session.get(f"{self.url}/info/", timeout=60).status_code < 500
        except requests.ConnectionError:
            return False

    def serving(self) -> int | None:
        """The number of the bundle that serves, if it holds both networks."""
        with Dataset(self.folder).store.read() as transaction:
            found = bundles.serving(transaction)
        return found.bundle.id if found is not None and found.bundle.assessor_version is not None else None

    def is_in_a_round(self) -> bool:
        """Whether a round has begun."""
        return any(job["kind"] == "round" and job["status"] == "RUNNING" for job in self.jobs())

    def is_training(self) -> bool:
        """Whether the round that runs has chosen its pseudo-labels, and trains."""
        return any(job["kind"] == "round" and ": segmentation" in (job["message"] or "") for job in self.jobs())


def environment() -> dict[str, str]:
    """For processes of this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def running_loop(folder: Path, log: Path, *options: str) -> Iterator[Loop]:
    """Serve a folder by ``segqc serve`` with some options; what it prints goes to a file, and must be no traceback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as terminal:
        process = subprocess.Popen(
            [sys.executable, "-m", "segqc", "serve", str(folder), "--port", str(port), *options],
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
