"""How long does a viewer wait for the first slice of a scan that the server has not read yet?

    python benchmarks/dicomweb.py --work /tmp/dicomweb-benchmark

Serves a new folder of smooth random scans on loopback, and asks for each what OHIF asks for, in its order. The first
slice comes after its study, series and headers; for half of the scans its pixels are asked for at once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import requests
from rich.console import Console
from rich.table import Table
from scipy.ndimage import gaussian_filter

from segqc.volumes import Volume, write_scan

SHAPE = (256, 256, 48)
SCANS = 12
START_SECONDS = 300


def fill(folder: Path) -> None:
    """Write the scans."""
    for number in range(SCANS):
        noise = np.random.default_rng(number).normal(size=SHAPE)
        array = (gaussian_filter(noise, (3, 3, 1)) * 5000 + 500 + 20 * noise).astype(np.int16)
        write_scan(Volume(array, np.diag([0.9, 0.9, 3.0, 1.0])), folder / f"scan_{number}.nii.gz")


class Viewer:
    """Asks the server, and notes how long it takes."""

    def __init__(self, address: str) -> None:
        """Ask a server at an address."""
        self._address = address
        self._session = requests.Session()
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def ask(self, what: str, path: str) -> tuple[Any, float]:
        """Ask for something; the answer, decoded where it is JSON, and its seconds."""
        started = time.perf_counter()
        reply = self._session.get(f"{self._address}{path}", timeout=60)
        reply.raise_for_status()
        seconds = time.perf_counter() - started
        self.seconds[what].append(seconds)
        return reply.json() if "json" in reply.headers["content-type"] else reply.content, seconds

    def look(self, number: int) -> None:
        """Look at a scan for the first time."""
        names, _ = self.ask("identifiers", f"/segqc/dicomweb/scan_{number}")
        study = f"/dicomweb/studies/{names['study']}"
        series = f"{study}/series/{names['series']}"
        frames = [f"{series}/instances/{uid}/frames/1" for uid in names["instances"]]
        if number % 2:
            self.ask("pixels of one slice, at once", frames[0])
            return
        waited = [
            self.ask("study", f"/dicomweb/studies?limit=101&offset=0&StudyInstanceUID={names['study']}")[1],
            self.ask("series", f"{study}/series")[1],
            self.ask("headers of all slices, which reads the scan", f"{series}/metadata")[1],
            self.ask("pixels of one slice, then", frames[0])[1],
        ]
        self.seconds["the first slice, all of these together"].append(sum(waited))
        started = time.perf_counter()
        for frame in frames[1:]:
            self.ask("pixels of another slice", frame)
        self.seconds["all other slices, one after the other"].append(time.perf_counter() - started)
        self.ask("thumbnail", f"{series}/thumbnail")


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server has taken in the folder."""
    started = time.monotonic()
    while True:
        try:
            if len(requests.get(f"{address}/dicomweb/studies", timeout=10).json()) == SCANS:
                return
        except requests.RequestException:
            pass
        if server.poll() is not None or time.monotonic() - started > START_SECONDS:
            raise SystemExit("the server did not come up; see its log")
        time.sleep(0.5)


def main() -> None:
    """Measure, show and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="new folder for the scans")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dicomweb.json")
    arguments = parser.parse_args()
    folder = arguments.work / "scans"
    folder.mkdir(parents=True)
    fill(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "segqc", "serve", str(folder), "--port", str(port), "--no-bootstrap"]
    with (arguments.work / "serve.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(f"http://127.0.0.1:{port}", server)
            viewer = Viewer(f"http://127.0.0.1:{port}")
            for number in range(SCANS):
                viewer.look(number)
        finally:
            server.terminate()
            server.wait(timeout=60)
    table = Table("seconds", "times", "median", "longest")
    result = {}
    for what, seconds in viewer.seconds.items():
        result[what] = {"median": round(statistics.median(seconds), 4), "longest": round(max(seconds), 4)}
        table.add_row(what, str(len(seconds)), f"{statistics.median(seconds):.3f}", f"{max(seconds):.3f}")
    Console().print(table)
    kept = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}",
        "shape": SHAPE,
        "scans": SCANS,
        "seconds": result,
    }
    arguments.out.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
