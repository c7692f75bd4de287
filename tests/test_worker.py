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

from segqc.loop.dataset import Dataset
from segqc.loop.locks import hold
from segqc.loop.worker import Worker, run_job
from segqc.store import events, jobs
from segqc.store.database import StoreDamaged, StoreError, StoreUnavailable
from segqc.store.records import JobRecord
from tests.server_kit import make_dataset
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
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(make_dataset(tmp_path / "studies", scans=5, finals=4))


def test_a_worker_that_waits_does_without_pytorch() -> None:
    """It starts a job seconds sooner, and leaves hundreds of megabytes to the job's process."""
    code = "import sys, segqc.loop.worker; sys.exit(bool({'torch', 'monai'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def put(dataset: Dataset, kind: str = "train", **request: object) -> int:
    with dataset.store.write() as transaction:
        return jobs.enqueue(transaction, kind, dict(request), ANNA).id  # type: ignore[arg-type]


def state(dataset: Dataset, job: int) -> JobRecord:
    with dataset.store.read() as transaction:
        return jobs.get(transaction, job)


@contextlib.contextmanager
def working(dataset: Dataset) -> Iterator[Worker]:
    worker = Worker(dataset, ("train",), command=python, heartbeat_seconds=0.2)
    thread = threading.Thread(target=worker.serve)
    thread.start()
    try:
        yield worker
    finally:
        worker.end()
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_a_job_keeps_its_last_lines_progress_and_result(dataset: Dataset) -> None:
    messages = (
        "import json; print('\\n'.join(str(i) for i in range(30)));"
        "print(json.dumps({'done': 3, 'total': 4, 'message': 'work: here'}));"
        "print(json.dumps({'result': {'dice': 0.9}}))"
    )
    good, bad = put(dataset, code=messages), put(dataset, code="raise SystemExit('too few labelled scans')")
    Worker(dataset, command=python).serve(until_idle=True)
    done = state(dataset, good)
    assert (done.state, done.result, done.done_steps, done.all_steps) == ("done", {"dice": 0.9}, 3, 4)
    assert done.messages[-2:] == ("29", "[###############.....] 3/4 work: here")
    assert len(done.messages) == 20
    assert (state(dataset, bad).state, state(dataset, bad).messages) == ("failed", ("too few labelled scans",))


def test_stop_ends_the_process_and_its_children_and_goes_on_with_the_next(dataset: Dataset) -> None:
    code = (
        "import os, subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(p.pid, os.getpid()); time.sleep(60)"
    )
    job, following = put(dataset, code=code), put(dataset, code="print('next')")
    with working(dataset):
        wait_for(lambda: bool(state(dataset, job).messages))
        pids = [int(p) for p in state(dataset, job).messages[0].split()]
        with dataset.store.write() as transaction:
            jobs.stop(transaction, job, ANNA)
        wait_for(lambda: state(dataset, following).state == "done")
        assert state(dataset, job).state == "stopped"
        wait_for(lambda: not any(map(alive, pids)))


def test_a_worker_that_ends_gives_its_job_back(dataset: Dataset) -> None:
    job = put(dataset, code="import os, time; print(os.getpid()); time.sleep(60)")
    with working(dataset):
        wait_for(lambda: bool(state(dataset, job).messages))
    given = state(dataset, job)
    assert (given.state, given.worker, given.attempts) == ("queued", None, 0)
    assert not alive(int(given.messages[0]))


SLEEPER = """
import signal, sys
from pathlib import Path
from segqc.loop.dataset import Dataset
from segqc.processes import ending_signals
from segqc.loop.worker import Worker

code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
worker = Worker(Dataset(Path(sys.argv[1])), ("train",), command=lambda _: [sys.executable, "-c", code])
for sign in ending_signals():
    signal.signal(sign, worker.end)
worker.serve()
"""


@pytest.mark.usefixtures("hangups")
def test_a_worker_that_gets_several_signals_at_once_ends_and_gives_its_job_back(dataset: Dataset) -> None:
    job = put(dataset)
    worker = subprocess.Popen([sys.executable, "-c", SLEEPER, str(dataset.folder)], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: bool(state(dataset, job).messages), 120)
    pid = int(state(dataset, job).messages[0])
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) * 20:
        worker.send_signal(sign)
    said = worker.communicate()[1]
    assert (worker.returncode, said) == (0, "")
    assert not alive(pid)
    given = state(dataset, job)
    assert (given.state, given.worker, given.attempts) == ("queued", None, 0)
    assert not list((dataset.own / "workers").iterdir())


STEP = '{"done": 1, "total": 2, "message": "m"}'
SUICIDE = "import os, signal; print('epoch 1', flush=True); os.kill(os.getpid(), signal.{sign})"


@pytest.mark.parametrize(
    ("sign", "meaning"),
    [("SIGKILL", "memory ran out"), ("SIGSEGV", "crash inside a library"), ("SIGTERM", "asked it to end"),
     ("SIGBUS", "shared memory"), ("SIGUSR1", "")],
)  # fmt: skip
def test_a_job_that_is_killed_is_tried_again_and_then_fails_with_the_signal(
    dataset: Dataset, sign: str, meaning: str
) -> None:
    job, following = put(dataset, code=SUICIDE.format(sign=sign)), put(dataset, code="print('next')")
    Worker(dataset, ("train",), command=python).serve(until_idle=True)
    ended = state(dataset, job)
    assert (ended.state, ended.attempts) == ("failed", jobs.MAX_ATTEMPTS)
    assert [sign in line for line in ended.messages] == [False, True] * jobs.MAX_ATTEMPTS
    assert meaning in ended.messages[-1]
    assert state(dataset, following).state == "done"


def test_a_job_that_is_killed_once_goes_on(dataset: Dataset, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    code = (
        f"import os, pathlib, signal; begun = pathlib.Path({str(begun)!r})\n"
        "if not begun.exists(): begun.touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    job = put(dataset, code=code)
    Worker(dataset, ("train",), command=python).serve(until_idle=True)
    assert (state(dataset, job).state, state(dataset, job).attempts) == ("done", 2)


def test_a_job_that_is_killed_while_it_shall_stop_is_stopped(dataset: Dataset) -> None:
    job = put(dataset, code="")
    with dataset.store.write() as transaction:
        jobs.claim(transaction, "w", ("train",))
        jobs.stop(transaction, job, ANNA)
        jobs.retry(transaction, job, "w", "killed by SIGKILL")
    assert state(dataset, job).state == "stopped"


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
def test_the_last_line_of_a_failed_job_is_the_reason(dataset: Dataset, code: str, last: str) -> None:
    job = put(dataset, code=code)
    Worker(dataset, ("train",), command=python).serve(until_idle=True)
    assert state(dataset, job).state == "failed"
    assert last in state(dataset, job).messages[-1]


def test_a_worker_ends_where_the_database_is_damaged(dataset: Dataset) -> None:
    with dataset.store.write() as transaction:
        transaction.execute(text("DROP TABLE job"))
    with pytest.raises(StoreDamaged, match="segqc db restore"):
        Worker(dataset).serve()


@pytest.mark.parametrize(
    ("problem", "status", "last"),
    [
        (StoreError("the store is\nmoved"), 1, "the store is moved"),
        (MemoryError(), 1, "memory ran out"),
        (KeyError("scan"), 70, "unexpected KeyError: 'scan'"),
    ],
)
def test_a_job_s_process_ends_with_one_line(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    problem: Exception, status: int, last: str,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise problem

    monkeypatch.setattr("segqc.loop.jobs.run", fail)
    assert run_job(dataset.folder, put(dataset)) == status
    assert last in capsys.readouterr().out.splitlines()[-1]


def test_jobs_read_the_settings_file_that_their_worker_was_given(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is named by a relative path."""
    config = tmp_path / "other.toml"
    config.write_text("[server]\nstrategy = 'from the other file'\n")
    seen: list[str] = []
    monkeypatch.setattr("segqc.loop.jobs.run", lambda given, *_: seen.append(given.settings.server.strategy))
    number = put(dataset)
    run_job(dataset.folder, number, config)
    run_job(dataset.folder, number)
    assert seen == ["from the other file", dataset.settings.server.strategy]
    config.write_text("[server]\nno_setting = 1\n")
    monkeypatch.chdir(tmp_path)
    Worker(dataset, ("train",), config=Path("other.toml")).serve(until_idle=True)
    assert "no_setting" in "".join(state(dataset, number).messages)


def abandoned_worker(dataset: Dataset, *, host: str | None = None) -> str:
    """The name of a worker that took the next job and was killed, on this machine or another one."""
    code = (
        "import os, pathlib, signal, sys\n"
        "from segqc.loop.locks import hold\n"
        "with hold(pathlib.Path(sys.argv[1]), 'a worker'): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = dataset.own / "workers" / "dead.lock"
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    if host is not None:
        path.write_text(path.read_text().replace(socket.gethostname(), host))
    with dataset.store.write() as transaction:
        assert jobs.claim(transaction, "dead", ("train", "round")) is not None
    return "dead"


def test_the_job_of_a_worker_that_died_on_this_machine_is_taken_at_once(dataset: Dataset) -> None:
    job = put(dataset, code="print('again')")
    dead = abandoned_worker(dataset)
    Worker(dataset, ("train",), command=python).serve(until_idle=True)
    ended = state(dataset, job)
    assert (ended.state, ended.attempts, ended.messages[-1]) == ("done", 2, "again")
    assert "worker died" in ended.messages[0]
    assert not list((dataset.own / "workers").iterdir()), f"{dead} left nothing behind"


def test_a_worker_that_lives_or_is_on_another_machine_keeps_its_job_until_its_heartbeats_are_missing(
    dataset: Dataset,
) -> None:
    job = put(dataset, code="print('again')")
    abandoned_worker(dataset, host="elsewhere")
    Worker(dataset, ("train",), command=python).serve(until_idle=True)
    assert (state(dataset, job).state, state(dataset, job).worker) == ("running", "dead")
    with hold(dataset.own / "workers" / "dead.lock", "a worker"):
        Worker(dataset, ("train",), command=python).serve(until_idle=True)
        assert state(dataset, job).worker == "dead"
        real = dataset.store.database.clock
        dataset.store.database.clock = lambda: real() + dt.timedelta(seconds=jobs.DEAD_AFTER_SECONDS + 1)
        Worker(dataset, ("train",), command=python).serve(until_idle=True)
    assert state(dataset, job).state == "done"


def test_a_database_that_is_away_at_a_job_s_end_does_not_lose_the_result(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = put(dataset, code='print(\'{"result": {"dice": 0.5}}\')')
    finish, failures = jobs.finish, iter(range(2))

    def away(*arguments: object, **more: object) -> None:
        if next(failures, None) is not None:
            raise StoreUnavailable("away")
        finish(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("segqc.store.jobs.finish", away)
    monkeypatch.setattr("segqc.loop.worker.POLL_SECONDS", 0.05)
    Worker(dataset, ("train",), command=python).serve(until_idle=True)
    assert (state(dataset, job).state, state(dataset, job).result) == ("done", {"dice": 0.5})


@pytest.mark.parametrize(("failures", "left"), [(0, "queued"), (3, "queued"), (1000, "running")])
def test_a_worker_that_ends_gives_its_job_back_though_the_database_is_away_for_a_while(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, failures: int, left: str
) -> None:
    give_back, to_come = jobs.give_back, iter(range(failures))

    def away(*arguments: object) -> None:
        if next(to_come, None) is not None:
            raise StoreUnavailable("away")
        give_back(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("segqc.store.jobs.give_back", away)
    monkeypatch.setattr("segqc.loop.worker.POLL_SECONDS", 0.05)
    monkeypatch.setattr("segqc.loop.worker._GRACE_SECONDS", 0.5)
    job = put(dataset, code="import time; time.sleep(600)")
    with working(dataset):
        wait_for(lambda: state(dataset, job).state == "running")
    assert state(dataset, job).state == left
    assert state(dataset, job).attempts == (0 if left == "queued" else 1)


def test_a_round_that_another_process_does_is_waited_for_and_taken_over(dataset: Dataset) -> None:
    job = put(dataset, "round", code="print('again')")
    lock = dataset.own / "workers" / "dead.lock"
    with hold(lock, "a worker"):
        with dataset.store.write() as transaction:
            jobs.claim(transaction, "dead", ("round",))
        joined = Worker(dataset, ("round",), command=python)
        thread = threading.Thread(target=joined.serve_until_ended, args=(job,))
        thread.start()
        time.sleep(0.5)
        assert thread.is_alive()
        assert state(dataset, job).worker == "dead"
    thread.join(timeout=30)
    assert state(dataset, job).state == "done"


@pytest.mark.parametrize("wanted", [None, "ACTIVE"])
def test_a_job_gives_way_to_the_server_and_its_threads_do_not_spin(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, wanted: str | None
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
    job = put(dataset, code=code)
    Worker(dataset, ("train",), command=python).serve(until_idle=True)
    niceness, policy = state(dataset, job).messages[0].split()
    assert int(niceness) > 0
    assert policy == (wanted or "PASSIVE"), "who set it knows better"


@pytest.mark.server
def test_a_real_round_survives_the_kill_of_its_worker(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "studies", scans=7, finals=5)
    dataset = Dataset(folder)
    job = put(dataset, "round")
    command = [sys.executable, "-m", "segqc", "worker", str(folder), "--until-idle"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def trained() -> bool:
        with dataset.store.read() as transaction:
            return any(e.verb == "step finished" for e in events.history(transaction, "job", job))

    wait_for(trained, 240)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    (staged,) = (dataset.own / "training" / "rounds").glob("*/segmentation.pt")
    before = staged.read_bytes()
    assert dataset.bundle() is None, "both networks are published together"
    Worker(dataset).serve(until_idle=True)
    ended = state(dataset, job)
    assert (ended.state, ended.attempts) == ("done", 2), ended.messages
    assert ended.result is not None
    steps = ended.result["steps"]
    assert isinstance(steps, dict)
    assert set(steps) == {"train segmentation", "train segqc", "publish", "score"}
    path = dataset.model_path("segmentation")
    assert path is not None
    assert path.read_bytes() == before, "a finished step is not done twice"
    assert [(s.number, s.problem) for s in dataset.bundles.listing()] == [(1, None)]
    assert len(dataset.assessments()) == 2
