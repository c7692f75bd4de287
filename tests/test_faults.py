"""What the store survives: kills at any instant, many writers, a full disk, a folder that cannot be written.

``SEGQC_KILLS`` sets how often a process on the store is killed (20 by default; a tenth as often the whole server), and
``SEGQC_CROWD_SECONDS`` how long 16 clients crowd it (10 by default). ``make test-faults`` runs the full counts.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from segqc.selection import segqc as worst_first
from segqc.store import corrections, labels, leases, scans
from segqc.store.events import SERVER
from segqc.store.files import sha256_of
from segqc.store.labels import NewLabel
from segqc.store.leases import LeaseRules
from segqc.store.maintenance import check
from segqc.store.records import Actor, Change, LabelRecord, StructureChange
from segqc.store.store import LabelChange, Store
from segqc.types import Metrics
from segqc.volumes import Volume, write_labels
from tests.server_kit import make_assessment
from tests.store_kit import ANNA, answer_lease, bundle, fork, make_scans, save_final, sync_scans, write_assessment

KILLS = int(os.environ.get("SEGQC_KILLS", "20"))
CROWD_SECONDS = float(os.environ.get("SEGQC_CROWD_SECONDS", "10"))
CLIENTS = 16
SCANS = 40
RULES = LeaseRules(repeat_seconds=0, skip_hours=0, lease_minutes=60)

pytestmark = pytest.mark.server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_scans(tmp_path / "studies", SCANS)
    return tmp_path / "studies"


def content(path: Path, seed: int) -> Path:
    """A label map that no other seed makes."""
    array = np.random.default_rng(seed).integers(0, 2, (16, 16, 8)).astype(np.uint8)
    write_labels(Volume(array, np.eye(4)), path)
    return path


def in_child(work: Callable[[], None]) -> int:
    """Run work in a forked process; it exits with 0, or 1 and a traceback."""
    child = fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def take(store: Store, actor: Actor) -> str:
    with store.write() as transaction:
        lease = leases.acquire(transaction, actor, "segqc", worst_first.order, RULES)
    assert lease is not None
    return lease.scan


def submit(store: Store, scan: str, source: Path, actor: Actor, tag: str = "final") -> LabelRecord:
    """What a submission does: version, lease and correction in one transaction."""
    with store.change_labels([LabelChange(NewLabel(scan, tag, "annotator", actor), source)]) as changing:
        transaction = changing.transaction
        lease = answer_lease(transaction, scan, actor)
        if lease is not None and lease.label_version is not None:
            none = Metrics(None, None, None, None)
            change = Change(
                through_plane_axis=2,
                voxels_changed=1,
                slices_changed=1,
                structures=(StructureChange(name="liver", metrics=none, voxels_changed=1, slices=(none,)),),
            )
            start = labels.get(transaction, lease.label_version)
            corrections.add(transaction, start, changing.versions[0], change, actor, lease=lease)
        return changing.versions[0]


def score(store: Store, scan: str, source: Path, pair: int) -> None:
    """What scoring does with a scan: a mask, then its assessment."""
    network = Actor(kind="network", name="seg1", identified_by="program")
    mask = store.save_label(NewLabel(scan, "original", "network", network, bundle=pair), source)
    with store.write() as transaction:
        write_assessment(
            transaction, replace(make_assessment(scan, random.random()), segmenter_version="seg1"), mask.id
        )


# -------------------------------------------------------------------------------------------------------------- kills


def test_a_kill_at_any_instant_loses_nothing_that_was_acknowledged(
    folder: Path, url: str | None, tmp_path: Path
) -> None:
    store = Store.open(folder, url)
    sync_scans(store)
    pair = bundle(store).id
    store.close()
    chance = random.Random(0)
    told = tmp_path / "acknowledged"
    told.touch()

    def work(start: int) -> None:
        own = Store.open(folder, url)
        rng = random.Random(start)
        with told.open("a") as acknowledged:
            for i in range(10_000):
                actor, seed = (
                    Actor(kind="person", name=f"annotator {start}", identified_by="client-id"),
                    start * 10_000 + i,
                )
                score(own, f"scan_{rng.randrange(SCANS)}", content(tmp_path / "mask.nii.gz", -seed % 2**31), pair)
                scan = take(own, actor) if i % 2 else f"scan_{rng.randrange(SCANS)}"
                source = content(tmp_path / "label.nii.gz", seed)
                version = submit(own, scan, source, actor, tag=f"kept-{start}-{i}")
                acknowledged.write(f"{version.id} {scan} {sha256_of(source)}\n")
                acknowledged.flush()

    for kill in range(KILLS):
        size = told.stat().st_size
        child = in_child(lambda start=kill: work(start))  # type: ignore[misc]
        deadline = time.monotonic() + 60
        while told.stat().st_size == size and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        again = Store.open(folder, url)
        sync_scans(again)
        assert check(again) == [], f"after kill {kill}"
        with again.read() as transaction:
            for line in told.read_text()[size:].splitlines():
                version, scan, sha256 = line.split()
                label = labels.get(transaction, int(version))
                assert (label.scan, label.sha256) == (scan, sha256)
                assert sha256_of(again.label_file(label)) == sha256
        with again.write() as transaction:  # the dead hold their scans for an hour, and there are not that many
            for lease in leases.listing(transaction, state="open"):
                leases.release(transaction, lease.scan, SERVER)
        again.close()
    assert len(told.read_text().splitlines()) >= KILLS


def started(folder: Path, log_file: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server of a folder that answers, and its address."""
    import requests

    from tests.e2e.test_server import free_port

    port = free_port()
    command = [sys.executable, "-m", "segqc", "serve", str(folder), "--port", str(port), "--no-bootstrap"]
    with log_file.open("ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while True:
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(f"{url}/info/", timeout=30).ok:
                return server, url
        assert time.monotonic() < deadline, log_file.read_text()[-3000:]
        time.sleep(0.2)


def test_a_server_that_is_killed_keeps_every_acknowledged_submission(tmp_path: Path) -> None:
    pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")
    import psutil
    import requests

    from segqc.loop.dataset import Dataset
    from segqc.volumes import temporary_labels
    from tests.server_kit import draw_case, make_dataset

    folder = make_dataset(tmp_path / "studies", scans=6, finals=0)
    (folder / "segqc.toml").write_text((folder / "segqc.toml").read_text() + "[annotation]\nrepeat_seconds = 0\n")
    chance = random.Random(1)
    acknowledged: dict[int, tuple[str, np.ndarray]] = {}
    for kill in range(max(1, KILLS // 20)):
        server, url = started(folder, tmp_path / "log")
        children = psutil.Process(server.pid).children(recursive=True)
        threading.Timer(chance.uniform(0.5, 3), server.kill).start()
        with contextlib.suppress(requests.RequestException):
            for i in range(1000):
                client = f"client {kill} {i}"
                sample = requests.post(f"{url}/activelearning/segqc", json={"client_id": client}, timeout=30).json()
                scan = sample.get("id", "scan_0")
                truth = draw_case(i % 4)[1]
                array = np.roll(truth.array, kill * 7 + i, axis=0)
                with temporary_labels(Volume(array, truth.affine)) as path:
                    answer = requests.put(
                        f"{url}/datastore/label?image={scan}&tag=final",
                        data={"params": f'{{"client_id": "{client}"}}'},
                        files={"label": ("l.nii.gz", path.read_bytes())},
                        timeout=30,
                    )
                assert answer.status_code == 200, answer.text
                acknowledged[answer.json()["version"]] = (scan, array)
                requests.post(f"{url}/segqc/review/{scan}", json={"decision": "reject", "reason": "again"}, timeout=30)
        assert server.wait(timeout=30) == -signal.SIGKILL
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive, "the worker ends with its server"
        dataset = Dataset(folder)
        assert check(dataset.store) == []
        from segqc.volumes import read_labels

        with dataset.store.read() as transaction:
            for version, (scan, array) in acknowledged.items():
                label = labels.get(transaction, version)
                assert label.scan == scan
                assert np.array_equal(read_labels(dataset.store.label_file(label)).array, array)
        dataset.store.close()
    assert acknowledged


def test_a_backup_made_under_load_is_brought_back_after_a_kill_under_load(tmp_path: Path) -> None:
    pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")
    import psutil
    import requests

    from segqc.volumes import temporary_labels
    from tests.server_kit import draw_case, make_dataset

    folder, backup = make_dataset(tmp_path / "studies", scans=4, finals=0), tmp_path / "backup"
    contents = []
    for case in range(2):
        with temporary_labels(draw_case(case)[1]) as path:
            contents.append(path.read_bytes())
    server, url = started(folder, tmp_path / "log")

    def load(client: int) -> None:
        with contextlib.suppress(requests.RequestException):  # until the server is killed
            for label in itertools.cycle(contents):  # the same once more would be no new version
                answer = requests.put(
                    f"{url}/datastore/label?image=scan_{client}&tag=load",
                    data={"params": f'{{"client_id": "{client}"}}'},
                    files={"label": ("l.nii.gz", label)},
                    timeout=30,
                )
                assert answer.status_code == 200, answer.text

    def segqc(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "segqc", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def count(dataset: Path) -> int:
        with contextlib.closing(sqlite3.connect(dataset / "segqc" / "store.sqlite")) as connection:
            found: int = connection.execute("SELECT count(*) FROM label_version").fetchone()[0]
            return found

    children = psutil.Process(server.pid).children(recursive=True)
    crowd = [threading.Thread(target=load, args=(client,)) for client in range(4)]
    for thread in crowd:
        thread.start()
    made = segqc("db", "backup", folder, backup)
    assert made.returncode == 0, made.stderr
    live = segqc("db", "restore", backup, folder)
    assert live.returncode == 1
    assert "end the server" in live.stderr
    kept = count(backup)
    while count(folder) <= kept + 4:
        assert any(thread.is_alive() for thread in crowd)
        time.sleep(0.1)
    server.kill()
    for thread in crowd:
        thread.join()
    assert server.wait(timeout=30) == -signal.SIGKILL
    psutil.wait_procs(children, timeout=30)

    make_dataset(tmp_path / "empty", scans=4, finals=0)
    for target in (folder, folder, tmp_path / "empty"):  # as the kill left it, as a restore did, and without a store
        done = segqc("db", "restore", backup, target)
        assert done.returncode == 0, done.stderr
        assert "restored from" in done.stdout
        assert not (target / "segqc" / "store.sqlite-wal").exists()
        assert count(target) == kept
        assert "nothing is wrong" in segqc("db", "check", target).stdout
    server, url = started(folder, tmp_path / "log")
    assert requests.get(f"{url}/datastore/", timeout=30).json()["total"] == 4
    server.terminate()
    server.wait(timeout=60)


# -------------------------------------------------------------------------------------------------------------- crowd


def test_a_crowd_loses_no_update_and_gets_no_scan_twice(folder: Path, url: str | None, tmp_path: Path) -> None:
    store = Store.open(folder, url)
    sync_scans(store)
    pair = bundle(store).id
    store.close()
    until = time.monotonic() + CROWD_SECONDS

    def annotate(number: int) -> None:
        own = Store.open(folder, url)
        actor = Actor(kind="person", name=f"annotator {number}", identified_by="client-id")
        done = 0
        while time.monotonic() < until:
            scan = take(own, actor)
            submit(own, scan, content(tmp_path / f"{number}.nii.gz", number * 100_000 + done), actor)
            with own.write() as transaction:
                scans.update_info(transaction, scan, {f"by_{number}_{done}": True})
            own.review(scan, "unlabelled", actor)
            done += 1
        (tmp_path / f"done_{number}").write_text(str(done))

    def assess() -> None:
        own = Store.open(folder, url)
        i = 0
        while time.monotonic() < until:
            score(own, f"scan_{i % SCANS}", content(tmp_path / "score.nii.gz", i), pair)
            i += 1
        (tmp_path / "done_scoring").write_text(str(i))

    children = [in_child(lambda n=n: annotate(n)) for n in range(CLIENTS)] + [in_child(assess)]  # type: ignore[misc]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * len(children)
    again = Store.open(folder, url)
    assert check(again) == []
    with again.read() as transaction:
        made = leases.listing(transaction)
        for number in range(CLIENTS):
            done = int((tmp_path / f"done_{number}").read_text())
            own = [lease for lease in made if lease.actor.name == f"annotator {number}"]
            assert Counter(lease.state for lease in own)["submitted"] == done
        noted = {key for s in scans.listing(transaction) for key in s.info}
        assert len(noted) == sum(int((tmp_path / f"done_{n}").read_text()) for n in range(CLIENTS))
        by_scan: dict[str, list[tuple[object, object]]] = {}
        for lease in made:
            by_scan.setdefault(lease.scan, []).append((lease.handed_out_at, lease.closed_at))
    assert int((tmp_path / "done_scoring").read_text()) > 0
    for spans in by_scan.values():
        ordered = sorted(spans, key=lambda span: str(span[0]))
        for (_, closed), (handed_out, _) in itertools.pairwise(ordered):
            assert closed is not None
            assert str(closed) <= str(handed_out), "two annotators held one scan at the same time"
    again.close()


# ------------------------------------------------------------------------------------------------ disks and permissions


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mounted)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield mounted
    subprocess.run(["umount", "-l", str(mounted)], check=True)


def test_a_full_disk_changes_nothing_and_service_goes_on_after_it(small_disk: Path, tmp_path: Path) -> None:
    folder = small_disk / "studies"
    make_scans(folder, 3)
    store = Store.open(folder)
    sync_scans(store)
    kept = save_final(store, tmp_path, "scan_0", 3)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    big = tmp_path / "big.nii.gz"
    big.write_bytes(os.urandom(200_000))
    with pytest.raises(OSError, match="No space") as raised:
        store.save_label(NewLabel("scan_0", "final", "annotator", ANNA), big)
    assert raised.value.errno == errno.ENOSPC
    with store.read() as transaction:
        assert labels.current(transaction, "scan_0", "final") == kept
    filler.unlink()
    assert check(store) == []
    now = store.save_label(NewLabel("scan_0", "final", "annotator", ANNA), big)
    assert store.view_file(now).read_bytes() == big.read_bytes()
    assert check(store) == []
    store.close()


def test_a_label_folder_that_cannot_be_written_is_an_error_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    store = Store.open(folder)
    sync_scans(store)
    kept = save_final(store, tmp_path, "scan_0", 3)
    place = folder / "labels" / "final"
    done = subprocess.run(["mount", "--bind", "-o", "ro", str(place), str(place)], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("no read-only folder can be mounted here")
    try:
        with pytest.raises(OSError, match=r"(?i)read-only|cross-device|busy"):
            save_final(store, tmp_path, "scan_0", 4)
        with store.read() as transaction:
            assert labels.current(transaction, "scan_0", "final") == kept
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
    store.recover()
    assert check(store) == []
    now = save_final(store, tmp_path, "scan_0", 4)
    assert store.view_file(now).read_bytes() == store.label_file(now).read_bytes()
    store.close()
