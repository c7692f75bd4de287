"""How long does an annotator wait in OHIF: for the next scan with its mask, and for the server to have a label?

    python benchmarks/ohif.py --work /tmp/ohif-benchmark

Serves smooth random scans with masks on loopback, and works on one after the other in Debian's Chromium, which draws in
software. "First" is a new browser that opens the viewer on a scan; "next" is a click on "Next scan". Both end when the
mask is drawn over the scan's slice. "Submit" ends when the panel says which version is kept.
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
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import requests
from rich.console import Console
from rich.table import Table
from scipy.ndimage import gaussian_filter

from segqc.volumes import Volume, write_labels, write_scan

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

SHAPE: Final = (320, 320, 40)
AFFINE: Final = np.diag([0.9, 0.9, 3.0, 1.0])
SCANS: Final = 8
START_SECONDS: Final = 300
WAIT_MS: Final = 300_000
SETTINGS: Final = "[structures]\nliver = [1]\n\n[annotation]\naudit_share = 0.0\nvalidation_share = 0.0\n"
ARGUMENTS: Final = ("--no-sandbox", "--disable-gpu", "--use-gl=angle", "--use-angle=swiftshader",
                    "--enable-unsafe-swiftshader", "--disable-background-networking", "--no-first-run")  # fmt: skip
VIEWERS: Final = ("bundled", "installed")

# Whether the mask of another scan than one is drawn: its colour is the only one in a picture of greys.
DRAWN: Final = """before => {
    const session = document.querySelector('segqc-panel')?.session;
    const canvas = document.querySelector('canvas.cornerstone-canvas');
    if (session?.phase !== 'ready' || session.scan?.scan === before || !canvas) return false;
    const copy = document.createElement('canvas');
    [copy.width, copy.height] = [96, 96];
    const context = copy.getContext('2d', { willReadFrequently: true });
    context.drawImage(canvas, 0, 0, 96, 96);
    const { data } = context.getImageData(0, 0, 96, 96);
    for (let i = 0; i < data.length; i += 4) {
        if (data[i + 2] - data[i] > 25) return true;
    }
    return false;
}"""
PAINT: Final = """() => {
    const { mask } = document.querySelector('segqc-panel').session;
    const { rows, columns } = mask.scan;
    const voxels = mask.voxels();
    for (let slice = 10; slice < 14; slice += 1) {
        for (let row = 100; row < 140; row += 1) {
            const start = (slice * rows + row) * columns + 100;
            voxels.fill(1, start, start + 40);
        }
    }
    mask.replace(voxels);
}"""


def fill(folder: Path) -> None:
    """Write scans with masks."""
    folder.mkdir(parents=True)
    (folder / "segqc.toml").write_text(SETTINGS)
    for number in range(SCANS):
        noise = np.random.default_rng(number).normal(size=SHAPE)
        smooth = gaussian_filter(noise, (6, 6, 2))
        array = (smooth / smooth.std() * 200 + 1000 + 20 * noise).astype(np.int16)
        write_scan(Volume(array, AFFINE), folder / f"scan_{number}.nii.gz")
        mask = (smooth > 0.5 * smooth.std()).astype(np.uint8)
        write_labels(Volume(mask, AFFINE), folder / "labels" / "original" / f"scan_{number}.nii.gz")


def serve(folder: Path, port: int, viewer: str) -> None:
    """Serve a folder, with MONAI Label's OHIF or with the one that ``segqc ohif`` has installed."""
    from segqc.server.ohif import install
    from segqc.server.serve import serve

    if viewer == "bundled":
        install.viewer_folder = lambda: folder / "no viewer"
    serve(folder, port=port)


class Annotator:
    """A person at a page, with a stopwatch."""

    def __init__(self, browser: Browser, address: str) -> None:
        """Sit down at a new browser."""
        self._context = browser.new_context(viewport={"width": 1440, "height": 900})
        self._context.set_default_timeout(WAIT_MS)
        self._page: Page = self._context.new_page()
        self._address = address

    def open(self, scan: str) -> float:
        """Open the viewer on a scan; the seconds until its mask is drawn."""
        study = requests.get(f"{self._address}/segqc/dicomweb/{scan}", timeout=60).json()["study"]
        started = time.perf_counter()
        self._page.goto(f"{self._address}/ohif/segqc?StudyInstanceUIDs={study}")
        self._page.wait_for_function(DRAWN, arg="", polling=50)
        return time.perf_counter() - started

    def next(self) -> float:
        """Ask for the next scan; the seconds until its mask is drawn."""
        button = self._panel("Next scan")
        before = self._page.evaluate("() => document.querySelector('segqc-panel').session.scan.scan")
        started = time.perf_counter()
        button.click()
        self._page.wait_for_function(DRAWN, arg=before, polling=50)
        return time.perf_counter() - started

    def submit(self) -> float:
        """Change four slices of the mask and submit it; the seconds until the panel says that the server has it."""
        self._page.evaluate(PAINT)
        self._panel("Submit …").click()
        button = self._panel("Submit")
        button.wait_for()
        started = time.perf_counter()
        button.click()
        self._page.locator("segqc-panel .notice.kept").wait_for()
        seconds = time.perf_counter() - started
        self._page.wait_for_function("() => !document.querySelector('segqc-panel').session.busy")
        return seconds

    def leave(self) -> None:
        """Close the browser."""
        self._context.close()

    def _panel(self, name: str) -> Locator:
        return self._page.locator("segqc-panel").get_by_role("button", name=name, exact=True)


def measure(work: Path, viewer: str) -> Mapping[str, list[float]]:
    """Seconds of each step with a viewer."""
    from playwright.sync_api import sync_playwright

    folder = work / viewer
    shutil.rmtree(folder, ignore_errors=True)
    fill(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, __file__, "--serve", str(folder), str(port), viewer]
    with (work / f"{viewer}.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    seconds: dict[str, list[float]] = {"first": [], "next": [], "submit": []}
    try:
        wait_for(address, server)
        with sync_playwright() as playwright:
            path = shutil.which("chromium")
            browser = playwright.chromium.launch(executable_path=path, headless=True, args=ARGUMENTS)
            for number in range(3):  # browsers that have kept nothing
                other = Annotator(browser, address)
                seconds["first"].append(other.open(f"scan_{SCANS - 1 - number}"))
                other.leave()
            annotator = Annotator(browser, address)
            annotator.open("scan_0")
            for _ in range(SCANS - 1):
                seconds["next"].append(annotator.next())
                seconds["submit"].append(annotator.submit())
            browser.close()
    finally:
        server.terminate()
        server.wait(60)
    return seconds


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    """Until the server answers and has taken the scans in."""
    started = time.monotonic()
    while server.poll() is None and time.monotonic() - started < START_SECONDS:
        try:
            if requests.get(f"{address}/segqc/dicomweb/scan_{SCANS - 1}", timeout=10).ok:
                return
        except requests.ConnectionError:
            pass
        time.sleep(0.5)
    raise SystemExit("the server did not come up; see its log")


def main() -> None:
    """Measure, show and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder for the scans")
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "ohif.json")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        folder, port, viewer = arguments.serve
        serve(Path(folder), int(port), viewer)
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    found = {viewer: measure(arguments.work, viewer) for viewer in VIEWERS}
    table = Table("viewer", "step", "median s", "longest s")
    steps = {
        viewer: {
            step: {
                "median": round(statistics.median(values), 2),
                "longest": round(max(values), 2),
                "count": len(values),
            }
            for step, values in seconds.items()
        }
        for viewer, seconds in found.items()
    }
    for viewer, own in steps.items():
        for step, numbers in own.items():
            table.add_row(viewer, step, f"{numbers['median']:.2f}", f"{numbers['longest']:.2f}")
    Console().print(table)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.0f} (5 minutes)",
        "shape": list(SHAPE),
        "seconds": steps,
    }
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
