"""How processes end by signals: quietly, cleaned up, and with the status that shells have for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server_kit import make_dataset

pytestmark = pytest.mark.usefixtures("hangups")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LISTEN = """
import sys, tempfile, time
from segqc.processes import exit_by_signals
exit_by_signals()
with tempfile.TemporaryDirectory():
    print("ready", flush=True)
    try:
        time.sleep(60)
    finally:
        time.sleep(0.2)  # what is removed at the end takes its time, and more signals come meanwhile
"""


@pytest.mark.parametrize("signs", [*[(sign,) for sign in SIGNALS], SIGNALS * 20], ids=lambda s: f"{len(s)} {s[0].name}")
def test_a_process_that_gets_signals_ends_quietly_and_leaves_nothing(
    signs: tuple[signal.Signals, ...], tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LISTEN], env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for sign in signs:
        process.send_signal(sign)
    assert process.communicate()[1] == ""
    assert process.returncode - 128 in signs
    assert list(tmp_path.iterdir()) == []


LOST = {
    "finalizer": "type('Freed', (), {'__del__': lambda self: interrupt()})()",
    "weak reference": "freed = set(); ref = weakref.ref(freed, lambda _: interrupt())",
    "garbage": "found = type('Freed', (), {'__del__': lambda self: interrupt()})(); found.me = found; del found; "
    "gc.collect()",
}


@pytest.mark.parametrize("place", LOST)
def test_a_signal_that_comes_where_no_exception_leaves_is_not_lost(place: str, tmp_path: Path) -> None:
    code = f"""
import gc, os, signal, tempfile, time, weakref
from segqc.processes import exit_by_signals
exit_by_signals()

def interrupt():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)

def happens():
    {LOST[place]}

with tempfile.TemporaryDirectory():
    happens()
    time.sleep(60)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")
    assert list(tmp_path.iterdir()) == []


def test_other_exceptions_that_leave_nothing_are_told_and_a_signal_at_the_end_is_not() -> None:
    code = """
import atexit, os, signal
from segqc.processes import exit_by_signals
exit_by_signals()

class Fails:
    def __del__(self):
        raise ValueError("a mistake")

Fails()
atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.count("Traceback") == 1 and "ValueError: a mistake" in done.stderr


def test_a_process_whose_work_is_done_is_not_killed_by_a_late_signal() -> None:
    code = """
import os, signal, sys
from segqc.processes import exit_by_signals, ignore_ending_signals
exit_by_signals()
ignore_ending_signals()

class Last:
    def __del__(self, kill=os.kill, own=os.getpid()):
        for sign in (1, 2, 15):
            kill(own, sign)

sys.last = Last()  # lives until Python has let go of all modules, and of the handlers of signals
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_signal_that_is_ignored_by_inheritance_stays_so() -> None:
    code = (
        "import os, signal; from segqc.processes import exit_by_signals, ending_signals\n"
        "exit_by_signals(); os.kill(os.getpid(), signal.SIGHUP); print(*(int(s) for s in ending_signals()))"
    )
    shell = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"]  # as nohup
    done = subprocess.run([*shell, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "15"]


@pytest.mark.parametrize("module", ["typer", "sqlalchemy", "segqc.loop.dataset"])
def test_an_interrupt_during_the_imports_of_a_command_shows_no_traceback(module: str, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "studies", scans=1, finals=0)
    code = f"""
import os, runpy, signal, sys

class Interrupts:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
sys.argv = ["segqc", "scans", {str(folder)!r}]
runpy.run_module("segqc", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
