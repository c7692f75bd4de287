"""A store to test with: on SQLite or on a PostgreSQL of the tests' own, with a clock that stands still."""

from __future__ import annotations

import contextlib
import datetime as dt
import gc
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sqlalchemy import create_engine, text

from segqc.progress import NoProgress
from segqc.split import SplitConfig
from segqc.store import assessments, bundles, labels, leases
from segqc.store.bundles import NewBundle
from segqc.store.database import Transaction
from segqc.store.events import SERVER
from segqc.store.labels import NewLabel
from segqc.store.records import Actor, BundleRecord, LabelRecord, LeaseRecord
from segqc.store.store import Store
from segqc.store.sync import sync
from segqc.types import Assessment
from segqc.volumes import Volume, scan_id, write_labels

ANNA = Actor(kind="person", name="anna", identified_by="client-id")
BERT = Actor(kind="person", name="bert", identified_by="client-id")
PLACING = SplitConfig(folds=3, validation_share=0.25)


class Steps(NoProgress):
    """Progress that remembers its steps."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, str]] = []

    def step(self, done: int, total: int, task: str, detail: str = "", *, unit: str = "scans") -> None:
        self.seen.append((done, total, task))


class Clock:
    """A time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC)

    def __call__(self) -> dt.datetime:
        return self.now

    def pass_(self, **span: float) -> None:
        self.now += dt.timedelta(**span)


def fork() -> int:
    """`os.fork`; the child never collects the parent's garbage, and the system ends a child that hangs.

    What the parent's earlier tests left behind may be a network of OpenVINO, whose end waits for its threads: a child
    has no threads but the one that forked it, and would wait forever.
    """
    gc.freeze()
    child = os.fork()
    if child == 0:
        signal.alarm(600)
    else:
        gc.unfreeze()
    return child


@contextlib.contextmanager
def running_postgresql() -> Iterator[str]:
    """Start a PostgreSQL of our own, on a socket only; gives the URL of its server, without a database."""
    # Debian keeps them off the PATH
    found = shutil.which("initdb") or next(map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
    if found is None:
        raise FileNotFoundError("initdb is nowhere; install PostgreSQL's server")
    tools = Path(found).resolve().parent
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # the path of a socket must be short
    as_user: dict[str, object] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = pwd.getpwnam("postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
        as_user = {"user": user.pw_uid, "group": user.pw_gid}
    data, run = folder / "data", {"check": True, "cwd": "/", "capture_output": True, **as_user}
    subprocess.run([tools / "initdb", "-D", data, "-U", "segqc", "-A", "trust", "-E", "UTF8"], **run)  # type: ignore[call-overload]
    options = f"-k {folder} -c listen_addresses='' -c max_connections=100"
    subprocess.run([tools / "pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start"], **run)  # type: ignore[call-overload]
    try:
        yield f"postgresql+psycopg://segqc@/{{}}?host={folder}"
    finally:
        subprocess.run([tools / "pg_ctl", "-D", data, "-m", "immediate", "stop"], **run)  # type: ignore[call-overload]
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def hanging(server: str) -> Iterator[None]:
    """Stop all processes of a PostgreSQL of `running_postgresql`: connections stay open, and nothing is answered."""
    folder = Path(server.partition("host=")[2])
    main = int((folder / "data" / "postmaster.pid").read_text().split()[0])
    stopped = [main]
    os.kill(main, signal.SIGSTOP)  # first, so that it starts no others
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(status.read_text().rpartition(")")[2].split()[1]) == main:
                stopped.append(int(status.parent.name))
                os.kill(stopped[-1], signal.SIGSTOP)
    try:
        yield
    finally:
        for process in reversed(stopped):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


def new_database(server: str) -> str:
    """The URL of a new, empty database on a server."""
    name = f"test_{uuid.uuid4().hex}"
    engine = create_engine(server.format("postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return server.format(name)


def make_scans(folder: Path, count: int) -> None:
    """Empty files named like scans: the store itself reads none."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"scan_{i}.nii.gz").touch()


def label_map(path: Path, value: int) -> Path:
    """A label map; another value is another content."""
    array = np.zeros((4, 4, 3), np.uint8)
    array.flat[: value % 48] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    write_labels(Volume(array, np.eye(4)), path)
    return path


def sync_scans(store: Store) -> None:
    sync(store, scan_id, PLACING)


def serve_pair(transaction: Transaction, segmenter: str | None, assessor: str | None) -> BundleRecord:
    """Let a bundle of these networks, without files, serve; published now where there is none."""
    found = next(
        (
            published.bundle
            for published in bundles.listing(transaction)
            if (published.bundle.segmenter_version, published.bundle.assessor_version) == (segmenter, assessor)
        ),
        None,
    )
    if found is None:
        number = bundles.last_number(transaction) + 1
        new = NewBundle(
            id=number,
            segmenter_version=segmenter,
            assessor_version=assessor,
            manifest_sha256="0" * 64,
            reason="a test",
        )
        found = bundles.add(transaction, new, SERVER).bundle
    bundles.serve(transaction, found.id, SERVER)
    return found


def bundle(store: Store, segmenter: str | None = "seg1", assessor: str | None = "qc") -> BundleRecord:
    """The serving bundle of these networks."""
    with store.write() as transaction:
        return serve_pair(transaction, segmenter, assessor)


def write_assessment(transaction: Transaction, assessment: Assessment, label_version: int) -> int:
    """Keep an assessment as one of the serving bundle, which is one of its networks."""
    source = labels.get(transaction, label_version).bundle
    segmenter = source.segmenter_version if source is not None else "seg1"
    pair = serve_pair(transaction, segmenter, assessment.assessor_version)
    return assessments.write(transaction, assessment, label_version, pair.id)


def save_mask(store: Store, folder: Path, scan: str, value: int, segmenter: str = "seg1") -> LabelRecord:
    """A network's mask of a scan."""
    pair = bundle(store, segmenter)
    network = Actor(kind="network", name=segmenter, identified_by="program")
    label = NewLabel(scan, "original", "network", network, bundle=pair.id)
    return store.save_label(label, label_map(folder / "incoming.nii.gz", value))


def save_final(store: Store, folder: Path, scan: str, value: int, actor: Actor = ANNA) -> LabelRecord:
    """A person's label of a scan."""
    label = NewLabel(scan, "final", "annotator", actor)
    return store.save_label(label, label_map(folder / "incoming.nii.gz", value))


def answer_lease(transaction: Transaction, scan: str, actor: Actor) -> LeaseRecord | None:
    """What a submission does with the last lease of a scan to an annotator."""
    last = leases.last_of(transaction, scan, actor)
    return None if last is None else leases.submitted(transaction, last)
