"""How long does each strategy take to hand out a scan of a large folder, in the transaction that leases it?

    python benchmarks/queries.py --work /tmp/queries-benchmark

On SQLite and on a PostgreSQL of its own, with a tenth and with six tenths of the scans labelled. Nothing in the folder
is read: the files are empty, and estimates, scores and features are drawn at random; the features are as many as those
of a small network.
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
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sqlalchemy import bindparam, select, text, update

from segqc.networks.plan import plan_network
from segqc.selection import strategies
from segqc.selection.class_stratified import CLASS_STRATIFIED
from segqc.split import SplitConfig
from segqc.store import assessments, bundles, events, features, leases
from segqc.store.bundles import NewBundle
from segqc.store.leases import LeaseRules
from segqc.store.records import Actor
from segqc.store.schema import Scan, UtcDateTime
from segqc.store.store import Store
from segqc.store.sync import sync
from segqc.volumes import scan_id
from segqc.volumes.appearance import APPEARANCE_VERSION

SCANS = 10_000
LABELLED = (0.1, 0.6)
REPETITIONS = 30
STRUCTURES = ("liver", "spleen")
SCORES = ("expected-gain", "tta", "entropy", "ensemble", "unlikeness", CLASS_STRATIFIED)
RULES = LeaseRules(audit_share=0.0, validation_share=0.0, repeat_seconds=0)
APPEARANCES = 18


def fill(store: Store, labelled: float) -> None:
    """Give every scan what the strategies go by, and label a part of the scans."""
    plan = plan_network((1.0, 1.0, 1.0), (40, 56, 40), in_channels=1, out_channels=3)
    rng = np.random.default_rng(0)
    with store.write() as transaction:
        new = NewBundle(
            id=1, segmenter_version="seg", assessor_version="qc", manifest_sha256="0" * 64, reason="a benchmark"
        )
        bundles.add(transaction, new, events.SERVER)
        bundles.serve(transaction, 1, events.SERVER)
        assessments.structure_ids(transaction, STRUCTURES)
        methods = [*SCORES, *(assessments.structure_score(CLASS_STRATIFIED, structure) for structure in STRUCTURES)]
        insert = text(
            "INSERT INTO score (scan_id, method, value, version, bundle_id, made_at) "
            "SELECT id, :method, -(id * 104729 % 100003) / 100003.0, 'seg', 1, :at FROM scan"
        ).bindparams(bindparam("at", type_=UtcDateTime()))
        for method in methods:
            transaction.execute(insert, {"method": method, "at": transaction.now})
        numbers = list(transaction.scalars(select(Scan.id)))
        size = 2 * sum(plan.filters)
        features.add(transaction, "segmenter", "seg", {i: rng.normal(size=size) for i in numbers})
        looks = {i: rng.normal(size=APPEARANCES) for i in numbers}
        features.add(transaction, "appearance", APPEARANCE_VERSION, looks)
        transaction.execute(text("UPDATE scan SET ranking_dice = (id * 7919 % 100003) / 100003.0, foreground = true"))
        done = update(Scan).where(Scan.id % 1000 < 1000 * labelled).values(state="submitted", queue=None)
        transaction.execute(done.execution_options(synchronize_session=False))


def hand_out(store: Store, name: str) -> list[float]:
    """Seconds of each hand-out; the first, which compiles the queries, is left out."""
    seconds = []
    for i in range(1 + REPETITIONS):
        actor = Actor(kind="person", name=f"annotator {i % 8}", identified_by="client-id")
        started = time.perf_counter()
        with store.write() as transaction:
            lease = leases.acquire(transaction, actor, name, strategies()[name].order, RULES)
        seconds.append(time.perf_counter() - started)
        if lease is None or lease.strategy != name:
            raise RuntimeError(f"{name} had nothing to go by")
    return seconds[1:]


@contextlib.contextmanager
def urls() -> Iterator[dict[str, str | None]]:
    """The databases to measure: SQLite, and PostgreSQL where there is one."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests are no installed package
    from tests.store_kit import new_database, running_postgresql

    with contextlib.ExitStack() as stack:
        found: dict[str, str | None] = {"SQLite": None}
        with contextlib.suppress(FileNotFoundError):
            found["PostgreSQL"] = new_database(stack.enter_context(running_postgresql()))
        yield found


def measure(folder: Path, scans: int, labelled: float) -> dict[str, dict[str, list[float]]]:
    """Seconds of each hand-out, by strategy and database."""
    times: dict[str, dict[str, list[float]]] = {}
    with urls() as databases:
        for database, url in databases.items():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for i in range(scans):
                (folder / f"scan_{i:06d}.nii.gz").touch()
            store = Store.open(folder, url)
            sync(store, scan_id, SplitConfig())
            fill(store, labelled)
            for name in strategies():
                times.setdefault(name, {})[database] = hand_out(store, name)
            store.close()
    return times


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the stores; emptied")
    parser.add_argument("--scans", type=int, default=SCANS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "queries.json")
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    rows = []
    for labelled in LABELLED:
        for name, by_database in measure(arguments.work / "scans", arguments.scans, labelled).items():
            own = {f"{d} median ms": round(1e3 * float(np.median(s)), 1) for d, s in by_database.items()}
            rows.append({"strategy": name, "scans": arguments.scans, "labelled": labelled, **own})
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=120).print(table)
    run = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores, "
        f"SQLite {sqlite3.sqlite_version}",
        "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
        "repetitions": REPETITIONS,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
