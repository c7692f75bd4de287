"""How does the store's cost grow with the number of scans, beside MONAI Label's LocalDatastore? All in one run.

    python benchmarks/store.py --work /tmp/store-benchmark

The store is measured on SQLite and on a PostgreSQL of its own, started for the run as the tests start theirs. The
folders hold empty files named like scans: no store reads them. LocalDatastore rewrites one JSON file at each change, so
that few repetitions have to do for it at 100,000 scans. The plans of all queries of the hot operations are printed; the
benchmark ends with status 1 if one of them scans a table. The result file keeps one run for each choice of stores.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import sqlite3
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from monailabel.datastore.local import LocalDatastore
from monailabel.tasks.activelearning.random import Random
from rich.console import Console
from rich.table import Table
from sqlalchemy import bindparam, event, text

from segqc.selection import segqc as worst_first
from segqc.split import SplitConfig
from segqc.store import assessments, bundles, events, labels, leases, scans
from segqc.store.bundles import NewBundle
from segqc.store.database import DATABASE_FILE
from segqc.store.labels import NewLabel
from segqc.store.leases import LeaseRules
from segqc.store.records import Actor
from segqc.store.schema import UtcDateTime
from segqc.store.store import Store
from segqc.store.sync import sync
from segqc.types import Assessment, ErrorBox, ErrorView, Metrics, SliceQuality, StructureQuality
from segqc.volumes import scan_id

SIZES = (1_000, 10_000, 100_000)
REPETITIONS = 300
BUNDLE = 1
SLICES = 40
LABEL_BYTES = 50_000
RULES = LeaseRules(repeat_seconds=0)

Times = list[float]


def assessment_of(scan: str, rng: np.random.Generator) -> Assessment:
    """An assessment of 40 slices with 20 boxes."""
    m = Metrics(*(float(x) for x in rng.random(4)))
    slices = tuple(SliceQuality(i, Metrics(*map(float, rng.random(4))), float(rng.random())) for i in range(SLICES))
    boxes = tuple(ErrorBox(i, (3, 4), (9, 12), *map(float, rng.random(3))) for i in range(SLICES // 2))
    view = ErrorView(m, slices, boxes)
    quality = StructureQuality("structure", True, 5.0, m, view, view)
    return Assessment(scan, "0" * 64, "seg", "qc", 2, (256, 256, SLICES), (1.0, 1.0, 4.0), (quality,))


def timed(repetitions: int, operation: Callable[[int], object]) -> Times:
    """Seconds of each call."""
    seconds = []
    for i in range(repetitions):
        started = time.perf_counter()
        operation(i)
        seconds.append(time.perf_counter() - started)
    return seconds


def make_folder(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"scan_{i:06d}.nii.gz").touch()


def fill(store: Store) -> None:
    """Give every scan a mask and an estimate, as after a scoring."""
    with store.write() as transaction:
        new = NewBundle(
            id=BUNDLE, segmenter_version="seg", assessor_version="qc", manifest_sha256="0" * 64, reason="a benchmark"
        )
        bundles.add(transaction, new, events.SERVER)
        bundles.serve(transaction, BUNDLE, events.SERVER)
        values = {
            "bundle": BUNDLE,
            "actor": events.actor_id(transaction, Actor(kind="network", name="seg", identified_by="program")),
            "at": transaction.now,
        }
        transaction.execute(
            text(
                "INSERT INTO label_version (scan_id, tag, source, sha256, suffix, bundle_id, actor_id, made_at) "
                "SELECT id, 'original', 'network', 'content ' || id, '.nii.gz', :bundle, :actor, :at FROM scan"
            ).bindparams(bindparam("at", type_=UtcDateTime())),
            values,
        )
        transaction.execute(text("UPDATE scan SET ranking_dice = (id * 7919 % 100003) / 100003.0, foreground = true"))


class Ours:
    """The operations on the store."""

    def __init__(self, folder: Path, count: int, work: Path, url: str | None = None) -> None:
        self.folder, self.count, self.work, self.url = folder, count, work, url
        self.rng = np.random.default_rng(0)
        self.store = self.open()

    def open(self) -> Store:
        store = Store.open(self.folder, self.url)
        sync(store, scan_id, SplitConfig())
        return store

    def any_scan(self) -> str:
        return f"scan_{int(self.rng.integers(self.count)):06d}"

    def next_sample(self, i: int) -> None:
        actor = Actor(kind="person", name=f"annotator {i % 8}", identified_by="client-id")
        with self.store.write() as transaction:
            leases.acquire(transaction, actor, "segqc", worst_first.order, RULES)

    def save_label(self, i: int) -> None:
        source = new_label(self.work, i)
        label = NewLabel(
            self.any_scan(), "final", "annotator", Actor(kind="person", name="annotator", identified_by="client-id")
        )
        self.store.save_label(label, source)

    def write_assessment(self, i: int) -> None:
        made = assessment_of(self.any_scan(), self.rng)
        with self.store.write() as transaction:
            mask = labels.current(transaction, made.scan, "original")
            if mask is None:
                raise RuntimeError(f"{made.scan} has no mask")
            assessments.write(transaction, made, mask.id, BUNDLE)

    def update_info(self, i: int) -> None:
        with self.store.write() as transaction:
            scans.update_info(transaction, self.any_scan(), {"note": i})

    def list_unlabelled(self, i: int) -> None:
        with self.store.read() as transaction:
            scans.names(transaction, states=("unlabelled", "rejected"))


class Local:
    """The same on MONAI Label's LocalDatastore; an assessment is one number there."""

    def __init__(self, folder: Path, count: int, work: Path) -> None:
        self.folder, self.count, self.work = folder, count, work
        self.rng = np.random.default_rng(0)
        objects = {
            f"scan_{i:06d}": {
                "image": {"info": {"ts": 0, "name": f"scan_{i:06d}.nii.gz"}, "ext": ".nii.gz"},
                "labels": {},
            }
            for i in range(count)
        }
        (folder / "datastore_v2.json").write_text(
            json.dumps({"name": "new-dataset", "description": "New Dataset", "images_dir": ".", "labels_dir": "labels",
                        "objects": objects}),
            encoding="utf-8",
        )  # fmt: skip
        self.store = self.open()
        self.random = Random()

    def open(self) -> LocalDatastore:
        return LocalDatastore(str(self.folder), extensions=["*.nii.gz"], auto_reload=False)

    any_scan = Ours.any_scan

    def next_sample(self, i: int) -> None:
        chosen = self.random({"strategy": "random"}, self.store)["id"]
        self.store.update_image_info(chosen, {"strategy": {"random": {"ts": i, "client_id": f"annotator {i % 8}"}}})

    def save_label(self, i: int) -> None:
        self.store.save_label(self.any_scan(), str(new_label(self.work, i)), "final", {})

    def write_assessment(self, i: int) -> None:
        self.store.update_image_info(self.any_scan(), {"dice": float(self.rng.random())})

    def update_info(self, i: int) -> None:
        self.store.update_image_info(self.any_scan(), {"note": i})

    def list_unlabelled(self, i: int) -> None:
        self.store.get_unlabeled_images()


def new_label(work: Path, i: int) -> Path:
    path = work / "label.nii.gz"
    path.write_bytes(i.to_bytes(8, "little") + os.urandom(LABEL_BYTES))
    return path


OPERATIONS = ("next_sample", "save_label", "write_assessment", "update_info", "list_unlabelled")


def measure(make: Callable[[], Ours | Local], count: int, most: float) -> dict[str, Times]:
    """Seconds of all operations on one store; an operation is repeated for ``most`` seconds at the longest."""
    started = time.perf_counter()
    made = make()
    first_start = time.perf_counter() - started
    if isinstance(made, Ours):
        fill(made.store)
    result: dict[str, Times] = {}
    for name in OPERATIONS:
        operation: Callable[[int], None] = getattr(made, name)
        first = timed(1, operation)
        repetitions = max(2, min(REPETITIONS, int(most / max(first[0], 1e-4))))
        result[name] = timed(repetitions, operation)
    if isinstance(made, Local) and count > 10_000:
        result["start"] = [first_start]  # minutes, and its file listed all scans before
        return result
    if isinstance(made, Ours):
        made.store.close()
    time.sleep(0.1)  # a folder that changed within the clock's tick is looked through once more
    made.open()
    result["start"] = timed(3, lambda _: made.open())
    return result


@contextlib.contextmanager
def postgresql(console: Console) -> Iterator[Callable[[], str] | None]:
    """A PostgreSQL server of our own, as what makes a new database and says its URL; None where there is none."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests are no installed package
    from tests.store_kit import new_database, running_postgresql

    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(running_postgresql())
        except FileNotFoundError as error:
            console.print(f"PostgreSQL is not measured: {error}")
            yield None
        else:
            yield lambda: new_database(server)


def plans(folder: Path, count: int, work: Path) -> dict[str, dict[str, list[str]]]:
    """The plan of every query that the hot operations make on SQLite."""
    made = Ours(folder, count, work)
    found: dict[str, dict[str, list[str]]] = {}
    seen: list[tuple[str, tuple[object, ...]]] = []

    @event.listens_for(made.store.database.engine, "before_cursor_execute")
    def note(_: object, __: object, statement: str, parameters: tuple[object, ...], *___: object) -> None:
        if statement.split()[0] in ("SELECT", "UPDATE", "DELETE"):
            seen.append((statement, parameters))

    for name in ("next_sample", "save_label", "write_assessment", "update_info"):
        seen.clear()
        for i in range(30):  # audit and validation draws are among them
            getattr(made, name)(i)
        statements = dict(seen)
        with sqlite3.connect(folder / "segqc" / DATABASE_FILE) as connection:
            found[name] = {
                " ".join(statement.split()): [
                    row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
                ]
                for statement, parameters in statements.items()
            }
    made.store.close()
    return found


def scanning(plan: list[str]) -> bool:
    """Whether a plan reads a whole table; sub-queries' results and whole indexes that are counted are none."""
    return any(step.startswith("SCAN ") and "INDEX" not in step and "(" not in step for step in plan)


STORES = ("SQLite", "PostgreSQL", "LocalDatastore")


def measure_all(
    stores: Sequence[str], work: Path, count: int, most: float, new_url: Callable[[], str] | None
) -> dict[str, dict[str, Times]]:
    """Seconds of all operations on some stores, by the stores' names."""
    times = {}
    for store in stores:
        folder = work / f"{store.lower()}-{count}"
        make_folder(folder, count)
        makers: dict[str, Callable[[], Ours | Local]] = {
            "SQLite": lambda folder=folder: Ours(folder, count, work),
            "PostgreSQL": lambda folder=folder: Ours(folder, count, work, new_url() if new_url else None),
            "LocalDatastore": lambda folder=folder: Local(folder, count, work),
        }
        times[store] = measure(makers[store], count, most)
        if store != "SQLite":
            shutil.rmtree(folder)
    return times


def figures(times: dict[str, Times]) -> dict[str, object]:
    """What is written down of one operation."""
    found: dict[str, object] = {}
    for store, seconds in times.items():
        found[f"{store} median ms"] = milliseconds(seconds, 0.5)
        found[f"{store} 99th percentile ms"] = milliseconds(seconds, 0.99)
    if times.keys() >= {"LocalDatastore", "SQLite"}:
        ratio = statistics.median(times["LocalDatastore"]) / statistics.median(times["SQLite"])
        found["LocalDatastore / SQLite"] = round(ratio, 1)
    return {**found, "repetitions": {store: len(seconds) for store, seconds in times.items()}}


def milliseconds(times: Times, quantile: float) -> float:
    return round(1e3 * float(np.quantile(times, quantile)), 2)


def scanned_tables(console: Console, folder: Path, count: int, work: Path) -> list[str]:
    """Print the plans of the hot queries on SQLite; returns the queries that scan a table."""
    bad = []
    for name, by_statement in plans(folder, count, work).items():
        for statement, plan in by_statement.items():
            console.print(f"[bold]{name}[/bold] {statement[:110]}", highlight=False)
            for step in plan:
                console.print(f"    {step}", highlight=False, markup=False)
            if scanning(plan):
                bad.append(f"{name}: {statement[:200]}: {plan}")
    return bad


def keep(path: Path, run: dict[str, object]) -> None:
    """Write a run down; an earlier one of the same stores is replaced."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    runs = [other for other in runs if other["stores"] != run["stores"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": [*runs, run]}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the stores; emptied")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--stores", nargs="+", choices=STORES[1:], default=STORES[1:], help="beside the one on SQLite")
    parser.add_argument("--most", type=float, default=15.0, help="seconds at most of one operation on one store")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "store.json")
    arguments = parser.parse_args()
    work: Path = arguments.work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    console = Console(width=160)
    load_before = os.getloadavg()[0]
    rows = []
    with postgresql(console) as new_url:
        stores = [s for s in STORES if s == "SQLite" or s in arguments.stores]
        if new_url is None and "PostgreSQL" in stores:
            stores.remove("PostgreSQL")
        for count in arguments.sizes:
            times = measure_all(stores, work, count, arguments.most, new_url)
            for name in (*OPERATIONS, "start"):
                own = figures({store: times[store][name] for store in stores})
                rows.append({"scans": count, "operation": name, **own})
    table = Table(*(name for name in rows[0] if name != "repetitions"))
    for row in rows:
        table.add_row(*(str(value) for name, value in row.items() if name != "repetitions"))
    console.print(table)
    largest = max(arguments.sizes)
    bad = scanned_tables(console, work / f"sqlite-{largest}", largest, work)
    machine = f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores, SQLite {sqlite3.sqlite_version}"
    run = {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
        "stores": stores,
        "rows": rows,
        "queries that scan a table": bad,
    }
    keep(arguments.out, run)
    if bad:
        sys.exit("\n".join(["these queries scan a table:", *bad]))


if __name__ == "__main__":
    main()
