"""How long do annotators wait when many work at once? A real server, 60 clients, and one inference after the other.

    python benchmarks/load.py --work /tmp/load-benchmark

Each client asks for the next scan, submits a label for it, pauses, and asks again, over HTTP and from another
process, on the same machine. Meanwhile one more client runs one inference after the other. Printed are the times of
each request and the server's memory; the run fails if a scan was handed out twice, or if a submission that was
acknowledged is not in the store.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from segqc.loop.dataset import Dataset
from segqc.networks.assessor import Assessor
from segqc.networks.bundle import model_name
from segqc.networks.card import ModelCard, NetworkName
from segqc.networks.plan import plan_network
from segqc.networks.segmenter import Segmenter
from segqc.networks.unet import build_network
from segqc.store import assessments, labels
from segqc.store.events import SERVER
from segqc.store.labels import NewLabel
from segqc.store.records import Actor
from segqc.store.store import LabelChange
from segqc.types import Assessment, ErrorBox, ErrorView, Metrics, SliceQuality, Structure, StructureQuality
from segqc.volumes import Volume, temporary_labels, write_labels, write_scan

SHAPE = (64, 64, 24)
AFFINE = np.diag([1.5, 1.5, 4.0, 1.0])
STRUCTURES = (Structure("liver", (1,)), Structure("spleen", (2,)))
SETTINGS = "[structures]\nliver = [1]\nspleen = [2]\n"
BATCH = 100
RESULTS = Path(__file__).parent / "results" / "load.json"


@dataclass
class Measured:
    """Seconds of each request of a kind, and what went wrong."""

    next: list[float] = field(default_factory=list)
    save: list[float] = field(default_factory=list)
    infer: list[float] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------- the folder


def draw(index: int) -> tuple[Volume, Volume]:
    """A scan of two ellipsoids in noise, and its label map."""
    rng = np.random.default_rng(index)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    mask = np.zeros(SHAPE, np.uint8)
    for value, centre in ((1, (-0.4, 0.0, 0.0)), (2, (0.5, 0.2, 0.1))):
        mask[((grid - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(axis=0) < rng.uniform(0.1, 0.2)] = value
    return Volume((100 * mask + rng.normal(0, 10, SHAPE)).astype(np.int16), AFFINE), Volume(mask, AFFINE)


def assessment_of(scan: str, rng: np.random.Generator) -> Assessment:
    """An assessment with the numbers of every slice, and some boxes."""

    def quality(name: str) -> StructureQuality:
        slices = tuple(SliceQuality(i, Metrics(*map(float, rng.random(4))), float(rng.random())) for i in range(24))
        boxes = tuple(ErrorBox(i, (3, 4), (9, 12), *map(float, rng.random(3))) for i in range(12))
        view = ErrorView(Metrics(*map(float, rng.random(4))), slices, boxes)
        return StructureQuality(name, True, 5.0, view.metrics, view, view)

    return Assessment(
        scan, "0" * 64, "seg", "qc", 2, SHAPE, (1.5, 1.5, 4.0), tuple(quality(s.name) for s in STRUCTURES)
    )


def make_folder(folder: Path, count: int) -> None:
    """Scans with a mask and an estimate each, as after a scoring, and untrained networks."""
    folder.mkdir(parents=True)
    (folder / "segqc.toml").write_text(SETTINGS, encoding="utf-8")
    for i in range(count):
        write_scan(draw(i)[0], folder / f"scan_{i:05d}.nii.gz")
    dataset = Dataset(folder)
    store, rng = dataset.store, np.random.default_rng(0)
    bundle = publish_untrained(dataset)
    network = Actor(kind="network", name="seg", identified_by="program")
    with temporary_labels(draw(0)[1]) as mask:
        for start in range(0, count, BATCH):
            names = [f"scan_{i:05d}" for i in range(start, min(start + BATCH, count))]
            new = [LabelChange(NewLabel(n, "original", "network", network, bundle=bundle), mask) for n in names]
            with store.change_labels(new) as change:
                for label in change.versions:
                    assessments.write(change.transaction, assessment_of(label.scan, rng), label.id, bundle)
    store.close()


def publish_untrained(dataset: Dataset) -> int:
    """Publish networks that have learned nothing; the bundle's number."""
    kinds: tuple[tuple[NetworkName, int, int], ...] = (("segmentation", 1, 3), ("segqc", 3, 2))
    with dataset.bundles.workspace() as work:
        files = {kind: work / model_name(kind) for kind, _, _ in kinds}
        for kind, channels, outputs in kinds:
            plan = plan_network((1.5, 1.5, 4.0), SHAPE, in_channels=channels, out_channels=outputs)
            card = ModelCard(kind, plan, STRUCTURES, (1, 2), seen=("scan_00000",), scores={"dice": 0.5})
            built = build_network(plan, seed=1)
            (Segmenter(card, built) if kind == "segmentation" else Assessor(card, built)).save(files[kind])
        return dataset.bundles.publish(files, SERVER, "a benchmark")


# -------------------------------------------------------------------------------------------------------- the crowd


class Client:
    """One annotator's connection."""

    def __init__(self, port: int, name: str, measured: Measured, lock: threading.Lock) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self.name, self.measured, self.lock = name, measured, lock

    def ask(self, method: str, path: str, body: bytes, kind: str, times: list[float]) -> bytes | None:
        started = time.perf_counter()
        try:
            self.connection.request(method, path, body, {"Content-Type": kind})
            answer = self.connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()
            with self.lock:
                self.measured.failed.append(f"{path.split('?')[0]}: {error!r}")
            return None
        with self.lock:
            times.append(time.perf_counter() - started)
            if answer.status != 200:
                self.measured.failed.append(f"{path.split('?')[0]}: {answer.status} {content[:200]!r}")
                return None
        return content

    def annotate(self, until: float, label: bytes, think_seconds: float) -> None:
        draw_pause = random.Random(self.name)
        time.sleep(draw_pause.uniform(0, max(think_seconds, 0.5)))
        request = json.dumps({"client_id": self.name}).encode()
        while time.monotonic() < until:
            content = self.ask("POST", "/activelearning/segqc", request, "application/json", self.measured.next)
            scan = json.loads(content).get("id") if content is not None else None
            if scan is None:
                time.sleep(0.1)
                continue
            time.sleep(draw_pause.uniform(0, 2 * think_seconds))
            body, kind = submission(label, self.name)
            path = f"/datastore/label?image={urllib.parse.quote(scan)}&tag=final"
            if self.ask("PUT", path, body, kind, self.measured.save) is not None:
                with self.lock:
                    self.measured.saved.append(scan)
            time.sleep(draw_pause.uniform(0, 2 * think_seconds))

    def infer(self, until: float, count: int) -> None:
        number = 0
        while time.monotonic() < until:
            number = (number + 1) % count
            path = f"/infer/segmentation?image=scan_{number:05d}&output=image"
            kind = "application/x-www-form-urlencoded"
            self.ask("POST", path, b"params=%7B%7D", kind, self.measured.infer)


def submission(label: bytes, client: str) -> tuple[bytes, str]:
    """A multipart form as MONAI Label's client sends it."""
    mark = "segqc-load"
    info = json.dumps({"client_id": client, "label_info": [{"name": s.name} for s in STRUCTURES]})
    head = f'--{mark}\r\nContent-Disposition: form-data; name="params"\r\n\r\n{info}\r\n--{mark}\r\n'
    file = 'Content-Disposition: form-data; name="label"; filename="label.nii.gz"\r\n\r\n'
    body = head.encode() + file.encode() + label + f"\r\n--{mark}--\r\n".encode()
    return body, f"multipart/form-data; boundary={mark}"


def crowd(
    port: int, clients: int, seconds: float, think: float, label: bytes, count: int, results: multiprocessing.Queue
) -> None:
    """All clients, each a thread of this process."""
    measured, lock, until = Measured(), threading.Lock(), time.monotonic() + seconds
    threads = [
        threading.Thread(target=Client(port, f"annotator {i}", measured, lock).annotate, args=(until, label, think))
        for i in range(clients)
    ]
    threads.append(threading.Thread(target=Client(port, "inference", measured, lock).infer, args=(until, count)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put(measured)


# -------------------------------------------------------------------------------------------------------- the server


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(folder: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "segqc", "serve", str(folder), "--port", str(port)]
    log = (folder / "load.log").open("wb")
    process = subprocess.Popen([*command, "--no-bootstrap", "--no-worker"], stdout=log, stderr=subprocess.STDOUT)
    wait_for(lambda: answers(port), process)
    return process


def answers(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/info/")
        return connection.getresponse().status == 200
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError("the server does not answer; its log is load.log in the folder")
        time.sleep(0.2)


def measure(folder: Path, clients: int, seconds: float, think: float, count: int) -> dict[str, object]:
    label_file = folder.parent / "label.nii.gz"
    write_labels(draw(1)[1], label_file)
    port = free_port()
    process = start(folder, port)
    watched = psutil.Process(process.pid)
    try:
        before = watched.memory_info().rss
        results: multiprocessing.Queue[Measured] = multiprocessing.get_context("spawn").Queue()
        arguments = (port, clients, seconds, think, label_file.read_bytes(), count, results)
        generator = multiprocessing.get_context("spawn").Process(target=crowd, args=arguments)
        generator.start()
        memory = [before]
        while generator.is_alive() and results.empty():
            memory.append(watched.memory_info().rss)
            time.sleep(0.5)
        measured = results.get(timeout=60)
        generator.join()
        cpu = watched.cpu_times()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    check(folder, measured)
    return {
        "clients": clients, "seconds": seconds, "think seconds": think, "scans": count,
        **{name: summary(times) for name, times in
           (("next", measured.next), ("save", measured.save), ("infer", measured.infer))},
        "failed": Counter(measured.failed).most_common(5),
        "server CPU s": round(cpu.user + cpu.system, 1),
        "RSS MB": {"before": before >> 20, "max": max(memory) >> 20, "end": memory[-1] >> 20},
    }  # fmt: skip


def summary(times: list[float]) -> dict[str, float]:
    if not times:
        return {"count": 0}
    rounded = [round(t, 3) for t in (statistics.median(times), float(np.quantile(times, 0.99)), max(times))]
    return {"count": len(times), "median": rounded[0], "p99": rounded[1], "max": rounded[2]}


def check(folder: Path, measured: Measured) -> None:
    """Nothing double, nothing lost."""
    doubled = [scan for scan, times in Counter(measured.saved).items() if times > 1]
    if doubled:
        raise RuntimeError(f"handed out twice: {doubled[:5]}")
    dataset = Dataset(folder)
    with dataset.store.read() as transaction:
        finals = labels.current_of_all(transaction, "final")
    dataset.store.close()
    if lost := set(measured.saved) - set(finals):
        raise RuntimeError(f"acknowledged and not in the store: {sorted(lost)[:5]}")


def show(runs: list[dict[str, object]]) -> None:
    table = Table("think s", "request", "count", "median s", "p99 s", "max s", "CPU s", "RSS MB before, max, end")
    for run in runs:
        memory = run["RSS MB"]
        for kind in ("next", "save", "infer"):
            times = run[kind]
            assert isinstance(times, dict) and isinstance(memory, dict)
            cells = [str(times.get(name, "-")) for name in ("count", "median", "p99", "max")]
            shown = ", ".join(map(str, memory.values())) if kind == "next" else ""
            table.add_row(str(run["think seconds"]), kind, *cells, str(run["server CPU s"]), shown)
        if run["failed"]:
            table.add_row("", f"failed: {run['failed']}")
    Console(width=200).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the scans; kept for the next run")
    parser.add_argument("--scans", type=int, default=3000)
    parser.add_argument("--clients", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument(
        "--think", type=float, nargs="+", default=[1.0], help="mean pause before and after a submission"
    )
    parser.add_argument("--name", help="write the result under this name")
    arguments = parser.parse_args()
    template = arguments.work / f"template-{arguments.scans}"
    if not template.is_dir():
        make_folder(template, arguments.scans)
    runs = []
    for think in arguments.think:
        folder = arguments.work / "studies"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        Dataset(folder).store.close()  # the copies are new files: they are looked at before anybody waits
        runs.append(measure(folder, arguments.clients, arguments.seconds, think, arguments.scans))
    show(runs)
    if arguments.name:
        known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        known[arguments.name] = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "runs": runs,
        }
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
