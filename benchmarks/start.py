"""How long from an empty clone to a server with networks and scores? Clones this repository and watches `make serve`.

    python benchmarks/start.py --work /tmp/start
    python benchmarks/start.py --work /tmp/start --before 97569ab    # beside an earlier commit, in one run

The first start includes the installation (packages may be in the installer's cache), the second one does not.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import platform
import signal
import sqlite3
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
URL = "http://127.0.0.1:8000/info/"
LIMIT_SECONDS = 3000
NETWORKS = ("segmentation", "segqc")


def answers() -> bool:
    """Whether the server answers."""
    try:
        with urllib.request.urlopen(URL, timeout=10) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def is_published(folders: Sequence[Path], network: str) -> bool:
    """Whether the network is published in one of the folders: early commits know no bundles."""
    return any(next(folder.glob(f"models/**/{network}.pt"), None) for folder in folders)


def seconds_until(condition: Callable[[], bool], started: float, server: subprocess.Popen[bytes]) -> float:
    """Seconds from ``started`` until the condition holds."""
    while not condition():
        if server.poll() is not None or time.monotonic() - started > LIMIT_SECONDS:
            raise SystemExit("the server did not come up; see its log")
        time.sleep(0.25)
    return round(time.monotonic() - started, 1)


def is_scored(folders: Sequence[Path]) -> bool:
    """Whether the scans that wait have their scores, by the store in one of the folders."""
    query = "SELECT count(*) FROM job WHERE kind = 'scoring' AND state = 'done'"
    for store in (folder / "store.sqlite" for folder in folders):
        if store.is_file():
            with contextlib.closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as database:
                return bool(database.execute(query).fetchone()[0])
    return False


def measure(commit: str, clone: Path, log: Path) -> dict[str, float]:
    """The seconds of two starts of a commit, in a new clone."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    subprocess.run(["git", "-C", str(clone), "checkout", "--quiet", commit], check=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS")}
    own = [
        clone / name / "segqc" for name in ("served/sample-datastore", "sample-datastore")
    ]  # in place, in early ones
    watched: dict[str, Callable[[], bool]] = {"first answer": answers}
    watched |= {f"{name} network": functools.partial(is_published, own, name) for name in NETWORKS}
    watched["all scores"] = functools.partial(is_scored, own)
    seconds: dict[str, float] = {}
    for start in ("empty clone", "second start"):
        with log.open("ab") as lines:
            started = time.monotonic()
            server = subprocess.Popen(
                ["make", "serve"], cwd=clone, env=environment, stdout=lines, stderr=lines, start_new_session=True
            )
            try:
                for what in watched if start == "empty clone" else ("first answer",):
                    seconds[f"{start}: {what}"] = seconds_until(watched[what], started, server)
            finally:
                os.killpg(server.pid, signal.SIGTERM)
                server.wait(timeout=60)
    return seconds


def main() -> None:
    """Measure both starts, of one commit or two, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="new folder for the clones")
    parser.add_argument("--before", help="an earlier commit to measure first")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "start.json")
    arguments = parser.parse_args()
    if answers():
        raise SystemExit(f"something answers at {URL} already")
    arguments.work.mkdir(parents=True, exist_ok=True)
    load = round(os.getloadavg()[2], 1)
    log = arguments.work / "serve.log"
    before = None if arguments.before is None else measure(arguments.before, arguments.work / "before", log)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores",
        "load before": load,
        "seconds": measure("HEAD", arguments.work / "now", log),
        "commit before": arguments.before,
        "seconds before": before,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Console().print(result)


if __name__ == "__main__":
    main()
