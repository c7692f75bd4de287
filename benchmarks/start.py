"""How long from an empty clone to a server with networks? Clones this repository, runs `make serve`, and watches.

    python benchmarks/start.py --work /tmp/start

The first start includes the installation (packages may be in the installer's cache), the second one does not.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
URL = "http://127.0.0.1:8000/info/"
LIMIT_SECONDS = 3000


def answers() -> bool:
    """Whether the server answers."""
    try:
        with urllib.request.urlopen(URL, timeout=10) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def is_published(models: Path, network: str) -> bool:
    """Whether a bundle holds the network."""
    return any(models.glob(f"[1-9]*/{network}.pt"))


def seconds_until(condition: Callable[[], bool], started: float, server: subprocess.Popen[bytes]) -> float:
    """Seconds from ``started`` until the condition holds."""
    while not condition():
        if server.poll() is not None or time.monotonic() - started > LIMIT_SECONDS:
            raise SystemExit("the server did not come up; see its log")
        time.sleep(0.25)
    return round(time.monotonic() - started, 1)


def main() -> None:
    """Measure both starts and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="new folder for the clone")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "start.json")
    arguments = parser.parse_args()
    if answers():
        raise SystemExit(f"something answers at {URL} already")
    clone = arguments.work / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS")}
    seconds: dict[str, float] = {}
    models = clone / "served" / "sample-datastore" / "segqc" / "models"
    for start in ("make serve from an empty clone", "second start"):
        with (arguments.work / "serve.log").open("ab") as log:
            started = time.monotonic()
            server = subprocess.Popen(
                ["make", "serve"], cwd=clone, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                seconds[f"{start}: first answer of /info/"] = seconds_until(answers, started, server)
                if "empty" in start:
                    for network in ("segmentation", "segqc"):
                        made = functools.partial(is_published, models, network)
                        seconds[f"{start}: {network} network"] = seconds_until(made, started, server)
            finally:
                os.killpg(server.pid, signal.SIGTERM)
                server.wait(timeout=60)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores",
        "load before": round(os.getloadavg()[2], 1),
        "seconds": seconds,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Console().print(result)


if __name__ == "__main__":
    main()
