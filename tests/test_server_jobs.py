from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from segqc.server.jobs import Job, Jobs


def python(job: Job) -> list[str]:
    return [sys.executable, "-u", "-c", str(job.request["code"])]


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not (status.is_file() and "State:\tZ" in status.read_text())


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    made = Jobs(command=python)
    yield made
    made.close()


def test_a_job_keeps_its_last_lines_and_status(jobs: Jobs) -> None:
    job = jobs.submit("train", {"code": "print('\\n'.join(str(i) for i in range(30)))"})
    assert job.to_json()["status"] in ("SUBMITTED", "RUNNING")
    wait_for(lambda: job.end_ts is not None)
    told = job.to_json()
    assert told["status"] == "DONE"
    assert told["details"] == [str(i) for i in range(10, 30)]
    failed = jobs.submit("train", {"code": "raise SystemExit('too few labelled scans')"})
    wait_for(lambda: failed.end_ts is not None)
    assert failed.status == "ERROR"
    assert list(failed.details) == ["too few labelled scans"]


def test_one_at_a_time_in_order_and_waiting_counts_as_open(jobs: Jobs, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import time; f = open({0!r}, 'a'); f.write('{1} '); f.flush(); time.sleep(.3); f.write('/{1} ')"
    first, second = (jobs.submit("train", {"code": code.format(str(log), name)}) for name in "ab")
    assert jobs.open("train") == [first, second]
    wait_for(lambda: not jobs.open("train"))
    assert log.read_text() == "a /a b /b "


def test_stop_ends_the_process_and_its_children_and_goes_on_with_the_next(jobs: Jobs) -> None:
    code = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(p.pid); time.sleep(60)"
    )
    job = jobs.submit("train", {"code": code})
    following = jobs.submit("train", {"code": "print('next')"})
    wait_for(lambda: len(job.details) == 1)
    assert job.process is not None
    pids = [job.process.pid, int(job.details[0])]
    assert jobs.stop("train") is job
    assert job.status == "STOPPED"
    assert job.end_ts is not None
    wait_for(lambda: not any(map(alive, pids)))
    wait_for(lambda: following.status == "DONE")
    assert jobs.stop("train") is None


def test_closing_ends_all_and_takes_no_more() -> None:
    jobs = Jobs(command=python)
    running = [jobs.submit(kind, {"code": "import time; print(1); time.sleep(60)"}) for kind in ("train", "scoring")]
    waiting = jobs.submit("train", {"code": "print('never')"})
    wait_for(lambda: all(job.details for job in running))
    jobs.close()
    assert not any(alive(job.process.pid) for job in running if job.process)
    assert waiting.process is None
    assert {job.status for job in (*running, waiting)} == {"STOPPED"}
    with pytest.raises(RuntimeError):
        jobs.submit("train", {"code": ""})


def test_what_follows_a_job_runs_after_success_only() -> None:
    followed: list[str] = []
    done = threading.Event()

    def follow(job: Job) -> None:
        followed.append(str(job.request["name"]))
        if job.request["name"] == "good":
            raise ValueError("must not end the queue")
        done.set()

    jobs = Jobs(command=python, on_done=follow)
    for name, code in (("good", ""), ("bad", "raise SystemExit(1)"), ("last", "")):
        jobs.submit("train", {"name": name, "code": code})
    assert done.wait(20)
    jobs.close()
    assert followed == ["good", "last"]
