"""How long does the server take for the queue's first page, and others, with many scans?

    python benchmarks/pages.py --work /tmp/pages-benchmark

Every scan is a small file that the intake reads, with a mask, an estimate of 40 slices and two structures with
intervals, and an error volume; a tenth has a final label, and some are handed out. Asked is a server in a thread of
this process, over a connection that stays open as a browser's does. Times are those of the HTML, without its pictures.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import sqlite3
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import requests
from rich.console import Console
from rich.table import Table
from sqlalchemy import bindparam, text, update

from segqc.loop.dataset import Dataset
from segqc.selection import segqc as worst_first
from segqc.selection.expected_gain import EXPECTED_GAIN
from segqc.store import assessments, bundles, events, labels, leases
from segqc.store.bundles import NewBundle
from segqc.store.leases import LeaseRules
from segqc.store.records import Actor
from segqc.store.schema import Scan, UtcDateTime
from segqc.types import (
    Assessment,
    ErrorBox,
    ErrorView,
    MetricIntervals,
    Metrics,
    PredictionInterval,
    SliceQuality,
    StructureQuality,
)
from segqc.volumes import Volume, write_scan

SCANS = 10_000
REPETITIONS = 50
SLICES = 40
LEASES = 8
STRUCTURES = ("liver", "spleen")
PAGES = {
    "the queue's first page": "/",
    "all scans": "/?view=all&sort=scan",
    "the last page": "/?view=all&sort=scan&page={last}",
    "by error volume": "/?sort=volume&descending=true",
    "by age": "/?sort=age&descending=true",
    "to review": "/?view=submitted&sort=age",
    "a search": "/?view=all&search=scan_0012",
    "a scan": "/scans/scan_000123",
    "the loop": "/loop",
    "the queue as CSV": "/queue.csv",
}


def make_folder(folder: Path, count: int) -> None:
    """Write scans of a few voxels, each with a content of its own."""
    folder.mkdir(parents=True)
    names = "\n".join(f"{name} = [{value}]" for value, name in enumerate(STRUCTURES, 1))
    (folder / "segqc.toml").write_text(f"[structures]\n{names}\n")
    array = np.random.default_rng(0).integers(0, 1000, (8, 8, SLICES)).astype(np.int16)
    for i in range(count):
        array.flat[0], array.flat[1] = i % 30_000, i // 30_000
        write_scan(Volume(array, np.diag([1.0, 1.0, 4.0, 1.0])), folder / f"scan_{i:06d}.nii")


def assessment_of(scan: str, rng: np.random.Generator) -> Assessment:
    """An assessment of two structures, with intervals and 20 boxes each."""

    def quality(name: str) -> StructureQuality:
        m = Metrics(*(float(x) for x in rng.random(4)))
        slices = tuple(SliceQuality(i, m, float(rng.random())) for i in range(SLICES))
        boxes = tuple(ErrorBox(i, (1, 1), (4, 5), 12.0, 0.6, 0.8) for i in range(SLICES // 2))
        view = ErrorView(m, slices, boxes)
        ends = PredictionInterval(max(0.0, (m.dice or 0) - 0.1), min(1.0, (m.dice or 0) + 0.1), 0.9)
        return StructureQuality(name, True, 5.0, m, view, view, MetricIntervals(dice=ends))

    both = tuple(map(quality, STRUCTURES))
    return Assessment(scan, "0" * 64, "seg", "qc", 2, (8, 8, SLICES), (1.0, 1.0, 4.0), both)


def fill(dataset: Dataset) -> None:
    """Give every scan a mask and an estimate, label a tenth, and hand some out."""
    rng, network = np.random.default_rng(0), Actor(kind="network", name="seg", identified_by="program")
    insert = text(
        "INSERT INTO label_version (scan_id, tag, source, sha256, suffix, bundle_id, actor_id, made_at) "
        "SELECT id, :tag, :source, :tag || id, '.nii.gz', 1, :actor, :at FROM scan WHERE id % :every = 0"
    ).bindparams(bindparam("at", type_=UtcDateTime()))
    with dataset.store.write() as transaction:
        new = NewBundle(
            id=1, segmenter_version="seg", assessor_version="qc", manifest_sha256="0" * 64, reason="a benchmark"
        )
        bundles.add(transaction, new, events.SERVER)
        bundles.serve(transaction, 1, events.SERVER)
        values = {"actor": events.actor_id(transaction, network), "at": transaction.now}
        transaction.execute(insert, {**values, "tag": labels.ORIGINAL, "source": "network", "every": 1})
        transaction.execute(insert, {**values, "tag": labels.FINAL, "source": "annotator", "every": 10})
        starts = labels.starts(transaction)
        for scan, version in starts.items():
            made = assessment_of(scan, rng)
            assessments.write(transaction, made, version, 1)
            assessments.write_score(transaction, scan, EXPECTED_GAIN, -made.error_volume_ml, "qc", bundle=1)
        done = update(Scan).where(Scan.id % 10 == 0).values(state="submitted", queue=None)
        transaction.execute(done.execution_options(synchronize_session=False))
        for i in range(LEASES):
            actor = Actor(kind="person", name=f"annotator {i}", identified_by="client-id")
            leases.acquire(transaction, actor, "segqc", worst_first.order, LeaseRules())


def measure(address: str, count: int) -> list[dict[str, object]]:
    """Milliseconds of each page: the median, and what one in twenty exceeds."""
    rows: list[dict[str, object]] = []
    with requests.Session() as session:
        session.headers["Accept"] = "text/html"
        for name, path in PAGES.items():
            seconds = []
            for _ in range(REPETITIONS + 1):
                started = time.perf_counter()
                answer = session.get(address + path.format(last=-(-count // 50)), timeout=60)
                seconds.append(time.perf_counter() - started)
                answer.raise_for_status()
            own = sorted(1e3 * s for s in seconds[1:])  # the first one compiles queries and templates
            rows.append(
                {
                    "page": name,
                    "median ms": round(statistics.median(own), 1),
                    "95% ms": round(own[int(0.95 * len(own))], 1),
                    "kB": round(len(answer.content) / 1e3),
                }
            )
    return rows


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the scans; emptied")
    parser.add_argument("--again", action="store_true", help="measure the folder of an earlier run once more")
    parser.add_argument("--scans", type=int, default=SCANS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pages.json")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests are no installed package
    from tests.server_kit import listening

    folder = arguments.work / "scans"
    if not arguments.again:
        shutil.rmtree(arguments.work, ignore_errors=True)
        make_folder(folder, arguments.scans)
        dataset = Dataset(folder)
        fill(dataset)
        dataset.store.close()
    load_before = os.getloadavg()[0]
    with listening(folder) as address:
        rows = measure(address, arguments.scans)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=120).print(table)
    run = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores, "
        f"SQLite {sqlite3.sqlite_version}",
        "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
        "scans": arguments.scans,
        "repetitions": REPETITIONS,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
