"""The worker: jobs in processes of their own, and what happens when somebody dies."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from segqc.loop.locks import hold
from segqc.loop.studies import Studies
from segqc.loop.worker import Worker, run_job
from segqc.store import events, jobs
from segqc.store.database import StoreDamaged, StoreError, StoreUnavailable
from segqc.store.events import SERVER
from segqc.store.values import JobRecord
from tests.server_kit import make_studies
from tests.store_kit import ANNA

RESULT = '{"result": {}}'


def python(job: JobRecord) -> list[str]:
    code = str(job.request["code"])
    result = "" if "result" in code else f"\nprint({RESULT!r})"
    return [sys.executable, "-u", "-c", code + result]


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def studies(tmp_path: Path) -> Studies:
    return Studies(make_studies(tmp_path / "studies", scans=5, finals=4))


def put(studies: Studies, kind: str = "train", **request: object) -> int:
    with studies.store.write() as transaction:
        return jobs.put(transaction, kind, dict(request), ANNA).id  # type: ignore[arg-type]


def state(studies: Studies, job: int) -> JobRecord:
    with studies.store.read() as transaction:
        return jobs.get(transaction, job)


@contextlib.contextmanager
def working(studies: Studies) -> Iterator[Worker]:
    worker = Worker(studies, ("train",), command=python, heartbeat_seconds=0.2)
    thread = threading.Thread(target=worker.serve)
    thread.start()
    try:
        yield worker
    finally:
        worker.end()
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_a_job_keeps_its_last_lines_progress_and_result(studies: Studies) -> None:
    said = (
        "import json; print('\\n'.join(str(i) for i in range(30)));"
        "print(json.dumps({'done': 3, 'total': 4, 'message': 'work: here'}));"
        "print(json.dumps({'result': {'dice': 0.9}}))"
    )
    good, bad = put(studies, code=said), put(studies, code="raise SystemExit('too few labelled scans')")
    Worker(studies, command=python).serve(until_idle=True)
    done = state(studies, good)
    assert (done.state, done.result, done.done_steps, done.all_steps) == ("done", {"dice": 0.9}, 3, 4)
    assert done.said[-2:] == ("29", "[###############.....] 3/4 work: here")
    assert len(done.said) == 20
    assert (state(studies, bad).state, state(studies, bad).said) == ("failed", ("too few labelled scans",))


def test_stop_ends_the_process_and_its_children_and_goes_on_with_the_next(studies: Studies) -> None:
    code = (
        "import os, subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(p.pid, os.getpid()); time.sleep(60)"
    )
    job, following = put(studies, code=code), put(studies, code="print('next')")
    with working(studies):
        wait_for(lambda: bool(state(studies, job).said))
        pids = [int(p) for p in state(studies, job).said[0].split()]
        with studies.store.write() as transaction:
            jobs.stop(transaction, job, ANNA)
        wait_for(lambda: state(studies, following).state == "done")
        assert state(studies, job).state == "stopped"
        wait_for(lambda: not any(map(alive, pids)))


def test_a_worker_that_ends_gives_its_job_back(studies: Studies) -> None:
    job = put(studies, code="import os, time; print(os.getpid()); time.sleep(60)")
    with working(studies):
        wait_for(lambda: bool(state(studies, job).said))
    given = state(studies, job)
    assert (given.state, given.worker, given.attempts) == ("queued", None, 0)
    assert not alive(int(given.said[0]))


STEP = '{"done": 1, "total": 2, "message": "m"}'
SUICIDE = "import os, signal; print('epoch 1', flush=True); os.kill(os.getpid(), signal.{sign})"


@pytest.mark.parametrize(
    ("sign", "meaning"),
    [("SIGKILL", "memory ran out"), ("SIGSEGV", "crash inside a library"), ("SIGTERM", "asked it to end"),
     ("SIGBUS", "shared memory"), ("SIGUSR1", "")],
)  # fmt: skip
def test_a_job_that_is_killed_is_tried_again_and_then_fails_with_the_signal(
    studies: Studies, sign: str, meaning: str
) -> None:
    job, following = put(studies, code=SUICIDE.format(sign=sign)), put(studies, code="print('next')")
    Worker(studies, ("train",), command=python).serve(until_idle=True)
    ended = state(studies, job)
    assert (ended.state, ended.attempts) == ("failed", jobs.MOST_ATTEMPTS)
    assert [sign in line for line in ended.said] == [False, True] * jobs.MOST_ATTEMPTS
    assert meaning in ended.said[-1]
    assert state(studies, following).state == "done"


def test_a_job_that_is_killed_once_goes_on(studies: Studies, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    code = (
        f"import os, pathlib, signal; begun = pathlib.Path({str(begun)!r})\n"
        "if not begun.exists(): begun.touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    job = put(studies, code=code)
    Worker(studies, ("train",), command=python).serve(until_idle=True)
    assert (state(studies, job).state, state(studies, job).attempts) == ("done", 2)


def test_a_job_that_is_killed_while_it_shall_stop_is_stopped(studies: Studies) -> None:
    job = put(studies, code="")
    with studies.store.write() as transaction:
        jobs.take(transaction, "w", ("train",))
        jobs.stop(transaction, job, ANNA)
        jobs.retry(transaction, job, "w", "killed by SIGKILL")
    assert state(studies, job).state == "stopped"


@pytest.mark.parametrize(
    ("code", "last"),
    [
        ("import os; os._exit(3)", "exit status 3"),
        (f"import os; print({STEP!r}, flush=True); os._exit(1)", "exit status 1"),
        ("import os; print('disk quota', flush=True); os._exit(1)", "disk quota"),
        ("raise TypeError('of ours')", "TypeError: of ours"),
        ("import sys; sys.exit(137)", "killed by SIGKILL"),
        ("import os; print('half done', flush=True); os._exit(0)", "ended before its work was done"),
    ],
)  # fmt: skip
def test_the_last_line_of_a_failed_job_is_the_reason(studies: Studies, code: str, last: str) -> None:
    job = put(studies, code=code)
    Worker(studies, ("train",), command=python).serve(until_idle=True)
    assert state(studies, job).state == "failed"
    assert last in state(studies, job).said[-1]


def test_a_worker_ends_where_the_database_is_damaged(studies: Studies) -> None:
    with studies.store.write() as transaction:
        transaction.execute(text("DROP TABLE job"))
    with pytest.raises(StoreDamaged, match="segqc db restore"):
        Worker(studies).serve()


@pytest.mark.parametrize(
    ("problem", "status", "last"),
    [
        (StoreError("the store is\nmoved"), 1, "the store is moved"),
        (MemoryError(), 1, "memory ran out"),
        (KeyError("scan"), 70, "unexpected KeyError: 'scan'"),
    ],
)
def test_a_job_s_process_ends_with_one_line(
    studies: Studies, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    problem: Exception, status: int, last: str,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise problem

    monkeypatch.setattr("segqc.loop.jobs.run", fail)
    assert run_job(studies.folder, put(studies)) == status
    assert last in capsys.readouterr().out.splitlines()[-1]


def abandoned_worker(studies: Studies, *, host: str | None = None) -> str:
    """The name of a worker that took the next job and was killed, on this machine or another one."""
    code = (
        "import os, pathlib, signal, sys\n"
        "from segqc.loop.locks import hold\n"
        "with hold(pathlib.Path(sys.argv[1]), 'a worker'): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = studies.own / "workers" / "dead.lock"
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    if host is not None:
        path.write_text(path.read_text().replace(socket.gethostname(), host))
    with studies.store.write() as transaction:
        assert jobs.take(transaction, "dead", ("train", "round")) is not None
    return "dead"


def test_the_job_of_a_worker_that_died_on_this_machine_is_taken_at_once(studies: Studies) -> None:
    job = put(studies, code="print('again')")
    dead = abandoned_worker(studies)
    Worker(studies, ("train",), command=python).serve(until_idle=True)
    ended = state(studies, job)
    assert (ended.state, ended.attempts, ended.said[-1]) == ("done", 2, "again")
    assert "worker died" in ended.said[0]
    assert not list((studies.own / "workers").iterdir()), f"{dead} left nothing behind"


def test_a_worker_that_lives_or_is_on_another_machine_keeps_its_job_until_its_heartbeats_are_missing(
    studies: Studies,
) -> None:
    job = put(studies, code="print('again')")
    abandoned_worker(studies, host="elsewhere")
    Worker(studies, ("train",), command=python).serve(until_idle=True)
    assert (state(studies, job).state, state(studies, job).worker) == ("running", "dead")
    with hold(studies.own / "workers" / "dead.lock", "a worker"):
        Worker(studies, ("train",), command=python).serve(until_idle=True)
        assert state(studies, job).worker == "dead"
        real = studies.store.database.clock
        studies.store.database.clock = lambda: real() + dt.timedelta(seconds=jobs.DEAD_AFTER_SECONDS + 1)
        Worker(studies, ("train",), command=python).serve(until_idle=True)
    assert state(studies, job).state == "done"


def test_a_database_that_is_away_at_a_job_s_end_does_not_lose_the_result(
    studies: Studies, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = put(studies, code='print(\'{"result": {"dice": 0.5}}\')')
    finish, failures = jobs.finish, iter(range(2))

    def away(*arguments: object, **more: object) -> None:
        if next(failures, None) is not None:
            raise StoreUnavailable("away")
        finish(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("segqc.store.jobs.finish", away)
    monkeypatch.setattr("segqc.loop.worker.POLL_SECONDS", 0.05)
    Worker(studies, ("train",), command=python).serve(until_idle=True)
    assert (state(studies, job).state, state(studies, job).result) == ("done", {"dice": 0.5})


@pytest.mark.parametrize(("failures", "left"), [(0, "queued"), (3, "queued"), (1000, "running")])
def test_a_worker_that_ends_gives_its_job_back_though_the_database_is_away_for_a_while(
    studies: Studies, monkeypatch: pytest.MonkeyPatch, failures: int, left: str
) -> None:
    give_back, to_come = jobs.give_back, iter(range(failures))

    def away(*arguments: object) -> None:
        if next(to_come, None) is not None:
            raise StoreUnavailable("away")
        give_back(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("segqc.store.jobs.give_back", away)
    monkeypatch.setattr("segqc.loop.worker.POLL_SECONDS", 0.05)
    monkeypatch.setattr("segqc.loop.worker._GRACE_SECONDS", 0.5)
    job = put(studies, code="import time; time.sleep(600)")
    with working(studies):
        wait_for(lambda: state(studies, job).state == "running")
    assert state(studies, job).state == left
    assert state(studies, job).attempts == (0 if left == "queued" else 1)


def test_a_round_that_another_process_does_is_waited_for_and_taken_over(studies: Studies) -> None:
    job = put(studies, "round", code="print('again')")
    lock = studies.own / "workers" / "dead.lock"
    with hold(lock, "a worker"):
        with studies.store.write() as transaction:
            jobs.take(transaction, "dead", ("round",))
        joined = Worker(studies, ("round",), command=python)
        thread = threading.Thread(target=joined.serve_until_ended, args=(job,))
        thread.start()
        time.sleep(0.5)
        assert thread.is_alive()
        assert state(studies, job).worker == "dead"
    thread.join(timeout=30)
    assert state(studies, job).state == "done"


@pytest.mark.parametrize("wanted", [None, "ACTIVE"])
def test_a_job_gives_way_to_the_server_and_its_threads_do_not_spin(
    studies: Studies, monkeypatch: pytest.MonkeyPatch, wanted: str | None
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if wanted is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", wanted)
    # the worker lowers the priority of a process that runs already
    code = (
        "import os, time; end = time.monotonic() + 30\n"
        "while os.getpriority(os.PRIO_PROCESS, 0) <= 0 and time.monotonic() < end: time.sleep(0.01)\n"
        "print(os.getpriority(os.PRIO_PROCESS, 0), os.environ['OMP_WAIT_POLICY'])"
    )
    job = put(studies, code=code)
    Worker(studies, ("train",), command=python).serve(until_idle=True)
    niceness, policy = state(studies, job).said[0].split()
    assert int(niceness) > 0
    assert policy == (wanted or "PASSIVE"), "who set it knows better"


def test_after_the_last_training_the_pool_is_scored(studies: Studies) -> None:
    put(studies, code=""), put(studies, code="raise SystemExit(1)")
    third = put(studies, code="")
    worker = Worker(studies, ("train",), command=python)
    worker.serve(until_idle=True)
    assert state(studies, third).state == "done"
    with studies.store.read() as transaction:
        (scoring,) = jobs.listing(transaction, "scoring")
    assert (scoring.request, scoring.who) == ({"method": "segqc"}, SERVER)


@pytest.mark.server
def test_a_real_round_survives_the_kill_of_its_worker(tmp_path: Path) -> None:
    folder = make_studies(tmp_path / "studies", scans=7, finals=5)
    studies = Studies(folder)
    job = put(studies, "round")
    command = [sys.executable, "-m", "segqc.cli", "worker", str(folder), "--until-idle"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def trained() -> bool:
        with studies.store.read() as transaction:
            return any(e.verb == "step finished" for e in events.history(transaction, "job", job))

    wait_for(trained, 240)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = studies.staged_path("segmentation").stat().st_ino
    assert not studies.model_path("segmentation").exists(), "both networks are published together"
    Worker(studies).serve(until_idle=True)
    ended = state(studies, job)
    assert (ended.state, ended.attempts) == ("done", 2), ended.said
    assert ended.result is not None
    assert set(ended.result) == {"round", "train segmentation", "train segqc", "publish", "score"}
    assert studies.model_path("segmentation").stat().st_ino == before, "a finished step is not done twice"
    assert len(studies.assessments()) == 2
