"""How long after a submission is the final label in the PACS, and how long does a scan take that has to be fetched?

    python benchmarks/pacs.py --work /tmp/pacs-benchmark

Starts an Orthanc (Debian's packages orthanc and orthanc-dicomweb) and a server on loopback, stores generated series
there, and does for each what an annotator's client does: the next scan, its file, the submission. All that was fetched
is removed before each step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import requests
from rich.console import Console
from rich.table import Table
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from segqc.types import LabelArray
from segqc.volumes import Volume, read_scan, write_labels
from tests.pacs_kit import PASSWORD, USER, Orthanc, running_orthanc, series, to_bytes

SHAPE = (320, 320, 40)
SCANS = 8
START_SECONDS = 300
SEG_SECONDS = 120


def fill(orthanc: Orthanc) -> None:
    """Store the series."""
    for number in range(SCANS):
        noise = np.random.default_rng(number).normal(size=SHAPE)
        array = (gaussian_filter(noise, (3, 3, 1)) * 5000 + 500 + 20 * noise).clip(0, 2000).round()
        orthanc.store(*map(to_bytes, series(Volume(array, np.diag([0.9, 0.9, 3.0, 1.0])), f"patient-{number}")))


def draw(number: int) -> LabelArray:
    """An ellipsoid in most slices, and a second one beside it."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    shift = np.random.default_rng(number).uniform(-0.2, 0.2, 3)
    labels = np.zeros(SHAPE, np.uint8)
    for value, (centre, size) in enumerate((((0, 0, 0), 0.4), ((0.6, 0.6, 0), 0.15)), start=1):
        labels[((grid - (np.asarray(centre) + shift)[:, None, None, None]) ** 2).sum(axis=0) < size] = value
    return labels


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server has taken in the series."""
    started = time.monotonic()
    while True:
        try:
            if requests.get(f"{address}/datastore/?output=stats", timeout=10).json()["total"] == SCANS:
                return
        except requests.RequestException:
            pass
        if server.poll() is not None or time.monotonic() - started > START_SECONDS:
            raise SystemExit("the server did not come up; see its log")
        time.sleep(0.5)


def annotate(address: str, folder: Path, orthanc: Orthanc, number: int) -> dict[str, float]:
    """Do what a client does with one scan; the seconds that each step took."""
    seconds: dict[str, float] = {}

    def timed(what: str, method: str, path: str, **arguments: object) -> requests.Response:
        shutil.rmtree(folder / "segqc" / "pacs", ignore_errors=True)
        started = time.perf_counter()
        answer = requests.request(method, f"{address}{path}", timeout=120, **arguments)  # type: ignore[arg-type]
        answer.raise_for_status()
        seconds[what] = time.perf_counter() - started
        return answer

    client = {"client_id": f"annotator {number}"}
    scan = timed("next scan, fetched", "POST", "/activelearning/segqc", json=client).json()["id"]
    image = timed("the scan's file, fetched", "GET", "/datastore/image", params={"image": scan})
    (folder / "scan.nii").write_bytes(image.content)
    write_labels(Volume(draw(number), read_scan(folder / "scan.nii").affine), folder / "label.nii.gz")
    study = requests.get(f"{address}/segqc/dicomweb/{scan}", timeout=60).json()["study"]
    timed(
        "submission, its scan fetched",
        "PUT",
        "/datastore/label",
        params={"image": scan, "tag": "final"},
        data={"params": json.dumps(client)},
        files={"label": ("label.nii.gz", (folder / "label.nii.gz").read_bytes())},
    )
    started = time.perf_counter()
    query = {"Modality": "SEG"}
    while not orthanc.ask("GET", f"/dicom-web/studies/{study}/series", params=query).json():
        if time.perf_counter() - started > SEG_SECONDS:
            raise SystemExit("no SEG came; see the server's log")
        time.sleep(0.02)
    seconds["SEG in Orthanc, after the acknowledgement"] = time.perf_counter() - started
    return seconds


def main() -> None:
    """Measure, show and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="new folder for the server's data")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pacs.json")
    arguments = parser.parse_args()
    folder = arguments.work / "work"
    folder.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    seconds: dict[str, list[float]] = defaultdict(list)
    with running_orthanc() as orthanc, (arguments.work / "serve.log").open("wb") as log:
        fill(orthanc)
        (folder / "segqc.toml").write_text(f'[pacs]\nuser = "{USER}"\n[structures]\nliver = 1\nspleen = 2\n')
        command = [sys.executable, "-m", "segqc", "serve", orthanc.url, "--folder", str(folder), "--port", str(port)]
        environment = {**os.environ, "SEGQC_PACS__PASSWORD": PASSWORD}
        server = subprocess.Popen([*command, "--no-bootstrap"], stdout=log, stderr=log, env=environment)
        try:
            wait_for(address, server)
            time.sleep(20)  # the worker beside the server starts, too
            for number in range(SCANS):
                for what, taken in annotate(address, folder, orthanc, number).items():
                    seconds[what].append(taken)
        finally:
            server.terminate()
            server.wait(timeout=60)
    table = Table("seconds", "times", "median", "longest")
    result = {}
    for what, taken in seconds.items():
        result[what] = {"median": round(statistics.median(taken), 3), "longest": round(max(taken), 3)}
        table.add_row(what, str(len(taken)), f"{statistics.median(taken):.2f}", f"{max(taken):.2f}")
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
