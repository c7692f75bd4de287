"""How long does an annotator wait in OHIF: for the next scan with its mask, and for the server to have a label?

    python benchmarks/ohif.py --work /tmp/ohif-benchmark

Serves smooth random scans with masks on loopback, and works on one after the other in Debian's Chromium, which draws in
software: from the folder and from an Orthanc (Debian's packages orthanc and orthanc-dicomweb), in the OHIF of MONAI
Label's wheel and in the one that ``segqc ohif`` has installed. Beside it, the same scans and masks on MONAI Label's own
server and panel with an Orthanc of its own; ``stock_app`` is its app, whose model answers with the mask that is there.

"First" is a new browser: from a click on "Take the next scan", or on MONAI Label's mode in the list of studies. "Next"
is a click on "Next scan", or on "Next Sample". Both end when the mask is drawn over the scan; all clicks in between are
made as soon as they can be. "Submit" ends when the panel says which version is kept; MONAI Label's panel has no such
button, and its time is that of the request alone.
"""

from __future__ import annotations

import argparse
import contextlib
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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import nrrd
import numpy as np
import requests
from rich.console import Console
from rich.table import Table
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from segqc.volumes import Volume, write_labels, write_scan
from tests.pacs_kit import PASSWORD, USER, Orthanc, running_orthanc, series, to_bytes

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

SHAPE: Final = (320, 320, 40)
AFFINE: Final = np.diag([0.9, 0.9, 3.0, 1.0])
NEW_BROWSERS: Final = 3
NEXT: Final = 5
SCANS: Final = NEW_BROWSERS + NEXT
START_SECONDS: Final = 300
WAIT_MS: Final = 300_000
SETTINGS: Final = """[structures]
liver = [1]

[annotation]
audit_share = 0.0
validation_share = 0.0
"""
ARGUMENTS: Final = ("--no-sandbox", "--disable-gpu", "--use-gl=angle", "--use-angle=swiftshader",
                    "--enable-unsafe-swiftshader", "--disable-background-networking", "--no-first-run")  # fmt: skip
Seconds = dict[str, list[float]]

# Whether a mask is drawn in some viewport: its colour is the only one in pictures of greys.
COLOURED: Final = """[...document.querySelectorAll('canvas.cornerstone-canvas')].some(canvas => {
    const copy = document.createElement('canvas');
    [copy.width, copy.height] = [96, 96];
    const context = copy.getContext('2d', { willReadFrequently: true });
    context.drawImage(canvas, 0, 0, 96, 96);
    const { data } = context.getImageData(0, 0, 96, 96);
    for (let i = 0; i < data.length; i += 4) {
        const rgb = [data[i], data[i + 1], data[i + 2]];
        if (Math.max(...rgb) - Math.min(...rgb) > 25) return true;
    }
    return false;
})"""
# The same of our panel, once it has a scan other than one.
READY: Final = f"""before => {{
    const session = document.querySelector('segqc-panel')?.session;
    return session?.phase === 'ready' && session.scan?.scan !== before && {COLOURED};
}}"""
# Of MONAI Label's panel: whether the page has a series, a label map to write into, and which series it is.
LOADED: Final = "window.services?.displaySetService.getActiveDisplaySets().length"
LABEL_MAP: Final = """['1'].some(id => {
    const { segmentationService } = window.services;
    return segmentationService.getSegmentation(id) && segmentationService.getLabelmapVolume(id);
})"""
SERIES: Final = "() => window.services.displaySetService.getActiveDisplaySets()[0].SeriesInstanceUID"
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


def draw(number: int) -> Volume:
    """A scan."""
    noise = np.random.default_rng(number).normal(size=SHAPE)
    smooth = gaussian_filter(noise, (6, 6, 2))
    return Volume((smooth / smooth.std() * 200 + 1000 + 20 * noise).astype(np.int16), AFFINE)


def segmented(scan: Volume) -> Volume:
    """The mask of a scan, whatever way its slices run."""
    mask = gaussian_filter(scan.array.astype(np.float32), 1) > 1100
    return Volume(mask.astype(np.uint8), scan.affine)


def fill(orthanc: Orthanc) -> list[str]:
    """Store the scans as series in a PACS; their UIDs."""
    uids = []
    for number in range(SCANS):
        items = series(draw(number), f"patient-{number}")
        orthanc.store(*map(to_bytes, items))
        uids.append(str(items[0].SeriesInstanceUID))
    return uids


@dataclass(frozen=True)
class Server:
    """A running server."""

    address: str
    process: subprocess.Popen[bytes]

    def wait_for(self, path: str) -> None:
        """Until it answers a request as it should."""
        started = time.monotonic()
        while self.process.poll() is None and time.monotonic() - started < START_SECONDS:
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{self.address}{path}", timeout=60).ok:
                    return
            time.sleep(0.5)
        raise SystemExit(f"{self.address}{path} is not answered; see the server's log")


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[Server]:
    """Run a server on a free port, whose number follows the command."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, str(port)], stdout=output, stderr=output, env={**os.environ, **environment}
        )
    try:
        yield Server(f"http://127.0.0.1:{port}", process)
    finally:
        process.terminate()
        process.wait(60)


# -------------------------------------------------------------------------------------------------------------- people


class Annotator(ABC):
    """A person at a new browser, with a stopwatch; ``seconds`` says how long each step took."""

    def __init__(self, browser: Browser, server: Server) -> None:
        self._context = browser.new_context(viewport={"width": 1440, "height": 900})
        self._context.set_default_timeout(WAIT_MS)
        self._page: Page = self._context.new_page()
        self._server = server

    @abstractmethod
    def first(self) -> float:
        """Begin to work; the seconds until a mask is drawn."""

    @abstractmethod
    def next(self) -> float:
        """Ask for the next scan; the seconds until its mask is drawn."""

    @abstractmethod
    def submit(self) -> float:
        """Submit the mask; the seconds until the server has it."""

    def leave(self) -> None:
        """Close the browser."""
        self._context.close()


class SegqcAnnotator(Annotator):
    """Works with our page and panel."""

    def first(self) -> float:
        self._page.goto(self._server.address)
        button = self._page.get_by_role("button", name="Take the next scan")
        button.wait_for()
        started = time.perf_counter()
        button.click()
        self._page.wait_for_function(READY, arg="", polling=50)
        return time.perf_counter() - started

    def next(self) -> float:
        button = self._panel("Next scan")
        before = self._page.evaluate("() => document.querySelector('segqc-panel').session.scan.scan")
        started = time.perf_counter()
        button.click()
        self._page.wait_for_function(READY, arg=before, polling=50)
        return time.perf_counter() - started

    def submit(self) -> float:
        """Change four slices of the mask, too; the clock starts after that."""
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

    def _panel(self, name: str) -> Locator:
        return self._page.locator("segqc-panel").get_by_role("button", name=name, exact=True)


class StockAnnotator(Annotator):
    """Works with MONAI Label's list of studies and panel, which has to be connected in each page that is loaded."""

    def __init__(self, browser: Browser, server: Server) -> None:
        super().__init__(browser, server)
        # where the panel finds its server: it would look at port 8000
        cookie = {"name": "MONAILABEL_SERVER_URL", "value": f"{server.address}/", "url": server.address}
        self._context.add_cookies([cookie])  # type: ignore[list-item]
        self._page.on("dialog", lambda dialog: dialog.accept())

    def first(self) -> float:
        self._page.goto(f"{self._server.address}/ohif/")
        self._page.get_by_text("patient-0", exact=True).first.click()
        button = self._page.get_by_role("button", name="MONAI Label")
        button.wait_for()
        started = time.perf_counter()
        button.click()
        self._segment()
        return time.perf_counter() - started

    def next(self) -> float:
        self._page.get_by_text("Active Learning", exact=True).click()
        button = self._page.get_by_role("button", name="Next Sample")
        button.wait_for()
        started = time.perf_counter()
        button.click()
        confirm = self._page.locator(".nextSampleForm").get_by_role("button", name="OK")
        with self._page.expect_navigation(wait_until="commit"):
            confirm.click()
        self._segment()
        return time.perf_counter() - started

    def submit(self) -> float:
        """What the panel's own client would send, if the panel had a button for it."""
        series = self._page.evaluate(SERIES)
        voxels = np.zeros(SHAPE, np.uint8)
        voxels[100:140, 100:140, 10:14] = 1
        started = time.perf_counter()
        requests.put(
            f"{self._server.address}/datastore/label",
            params={"image": series},
            data={"params": json.dumps({"label_info": [{"name": "liver"}]})},
            files={"label": ("label.bin", voxels.tobytes(order="F"))},
            timeout=WAIT_MS / 1000,
        ).raise_for_status()
        return time.perf_counter() - started

    def _segment(self) -> None:
        """Connect the panel once the images are there, and have the model make the mask."""
        self._page.wait_for_function(f"() => {LOADED}", polling=50)
        self._page.locator(".settingsTable button.actionButton").click()
        self._page.wait_for_function(f"() => {LABEL_MAP}", polling=50)
        self._page.get_by_role("button", name="Run").first.click()
        self._page.wait_for_function(f"() => {COLOURED}", polling=50)


# ------------------------------------------------------------------------------------------------------------- servers


@contextlib.contextmanager
def on_the_folder(work: Path, viewer: str) -> Iterator[Server]:
    """Serve a folder with the scans and their masks."""
    work.mkdir()
    (work / "segqc.toml").write_text(SETTINGS)
    for number in range(SCANS):
        scan = draw(number)
        write_scan(scan, work / f"scan_{number}.nii.gz")
        write_labels(segmented(scan), work / "labels" / "original" / f"scan_{number}.nii.gz")
    with serving(work, viewer) as server:
        server.wait_for(f"/segqc/dicomweb/scan_{SCANS - 1}")
        yield server


@contextlib.contextmanager
def on_orthanc(work: Path, viewer: str) -> Iterator[Server]:
    """Serve the same scans from an Orthanc, of which nothing was fetched yet; the masks are in the store."""
    from segqc.loop.dataset import Dataset
    from segqc.store.events import SERVER
    from segqc.store.labels import NewLabel
    from segqc.volumes import temporary_labels

    work.mkdir()
    with running_orthanc() as orthanc:
        fill(orthanc)
        (work / "segqc.toml").write_text(f'[pacs]\nurl = "{orthanc.url}"\nuser = "{USER}"\n\n{SETTINGS}')
        dataset = Dataset(work)
        dataset.sync()
        for entry in dataset.waiting():
            with temporary_labels(segmented(dataset.read_scan(entry))) as path:
                dataset.store.save_label(NewLabel(entry.id, "original", "import", SERVER), path)
        last = entry.id
        dataset.store.close()
        shutil.rmtree(work / "segqc" / "pacs")
        with serving(work, viewer) as server:
            server.wait_for(f"/segqc/dicomweb/{last}")
            yield server


def serving(folder: Path, viewer: str) -> contextlib.AbstractContextManager[Server]:
    """Serve a folder by a process of its own, this file."""
    command = [sys.executable, __file__, "--serve", str(folder), viewer]
    return running(command, folder.with_suffix(".log"), {})


def serve(folder: Path, viewer: str, port: int) -> None:
    """Serve a folder, with MONAI Label's OHIF or with the one that ``segqc ohif`` has installed."""
    from segqc.server.ohif import install
    from segqc.server.serve import serve

    if viewer == "bundled":
        install.viewer_folder = lambda: folder / "no viewer"
    serve(folder, port=port)


@contextlib.contextmanager
def stock(work: Path) -> Iterator[Server]:
    """Serve the same scans and masks by MONAI Label as it is, from an Orthanc."""
    masks = work / "masks"
    masks.mkdir(parents=True)
    with running_orthanc() as orthanc:
        for number, uid in enumerate(fill(orthanc)):
            nrrd.write(str(masks / f"{uid}.nrrd"), segmented(draw(number)).array, {"encoding": "raw"})
        environment = {
            "MONAI_LABEL_DICOMWEB_USERNAME": USER,
            "MONAI_LABEL_DICOMWEB_PASSWORD": PASSWORD,
            "MONAI_LABEL_DICOMWEB_SEARCH_FILTER": json.dumps({"Modality": "MR"}),
            "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(work / "cache"),
            "MONAI_LABEL_DICOMWEB_CACHE_EXPIRY": "0",
            "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
            "MONAI_LABEL_SESSION_PATH": str(work / "sessions"),
            # for dcmqi, which writes its SEGs
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        app = Path(__file__).parent / "stock_app"
        command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app)]
        command += ["--studies", orthanc.url, "--conf", "masks", str(masks), "--host", "127.0.0.1", "--port"]
        with running(command, work / "server.log", environment) as server:
            server.wait_for("/info/")
            yield server


ARMS: Final[Mapping[str, tuple[type[Annotator], Callable[[Path], contextlib.AbstractContextManager[Server]]]]] = {
    "MONAI Label on Orthanc": (StockAnnotator, stock),
    "folder, OHIF 3.10": (SegqcAnnotator, lambda work: on_the_folder(work, "bundled")),
    "folder, OHIF 3.13": (SegqcAnnotator, lambda work: on_the_folder(work, "installed")),
    "Orthanc, OHIF 3.10": (SegqcAnnotator, lambda work: on_orthanc(work, "bundled")),
    "Orthanc, OHIF 3.13": (SegqcAnnotator, lambda work: on_orthanc(work, "installed")),
}


def measure(arm: str, work: Path) -> Seconds:
    """Seconds of each step."""
    from playwright.sync_api import sync_playwright

    annotator_of, served = ARMS[arm]
    seconds: Seconds = {"first": [], "next": [], "submit": []}
    with served(work) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), headless=True, args=ARGUMENTS)
        for number in range(NEW_BROWSERS):
            annotator = annotator_of(browser, server)
            seconds["first"].append(annotator.first())
            if number < NEW_BROWSERS - 1:
                annotator.leave()
        for _ in range(NEXT):
            seconds["submit"].append(annotator.submit())
            seconds["next"].append(annotator.next())
        browser.close()
    return seconds


def main() -> None:
    """Measure, show and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a new folder for the scans")
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "ohif.json")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["SEGQC_PACS__PASSWORD"] = PASSWORD
    if arguments.serve:
        folder, viewer, port = arguments.serve
        serve(Path(folder), viewer, int(port))
        return
    arguments.work.mkdir(parents=True)
    arms: dict[str, object] = {}
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": "of one minute, before the arm",
        "nice": os.nice(0),
        "shape": list(SHAPE),
        "arms": arms,
    }
    table = Table("arm", "step", "median s", "longest s", "load")
    for number, arm in enumerate(ARMS):
        steps, load = {}, round(os.getloadavg()[0], 1)
        for step, values in measure(arm, arguments.work / str(number)).items():
            median, longest = statistics.median(values), max(values)
            steps[step] = {"median": round(median, 2), "longest": round(longest, 2), "count": len(values)}
            table.add_row(arm, step, f"{median:.2f}", f"{longest:.2f}", str(load))
        arms[arm] = {"load": load, "seconds": steps}
        arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
