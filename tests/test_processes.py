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
from segqc.loop.processes import exit_by_signals
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


def test_a_signal_that_is_ignored_by_inheritance_stays_so() -> None:
    code = (
        "import os, signal; from segqc.loop.processes import exit_by_signals, ending_signals\n"
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
