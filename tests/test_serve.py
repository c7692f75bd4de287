"""The command ``segqc serve`` as a process: it ends by every usual signal, whoever started it and whenever it comes."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

import psutil

from segqc.server.serve import _listen
from tests.server_kit import make_dataset

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("hangups")]


def test_small_answers_are_sent_at_once() -> None:
    async def answers_at_once() -> bool:
        connected: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
        with _listen("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(lambda _, writer: connected.set_result(writer), sock=listener):
                _, client = await asyncio.open_connection(*listener.getsockname())
                writer = await connected
                option = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                for end in (client, writer):
                    end.close()
                    await end.wait_closed()
        return bool(option)

    assert asyncio.run(answers_at_once())


# A shell without job control has the processes of its background ignore interrupts. A shell, not a `preexec_fn`: after
# a fork of a process with threads, Python's own code may wait for a lock that nobody holds any more.
_IN_BACKGROUND = ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")


def _start(folder: Path, temporary: Path) -> subprocess.Popen[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    temporary.mkdir()
    serve = [sys.executable, "-m", "segqc", "serve", str(folder), "--port", str(port), "--no-bootstrap"]
    return subprocess.Popen(
        [*_IN_BACKGROUND, *serve],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _read_until(server: subprocess.Popen[str], moment: str) -> str:
    assert server.stderr is not None
    said = ""
    for line in server.stderr:
        said += line
        if moment in line:
            break
    assert moment in said
    return said


def _assert_nothing_is_left(folder: Path, temporary: Path) -> None:
    assert not list(temporary.glob("segqc-server-*"))
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or ())]


@pytest.mark.parametrize(
    ("sign", "moment"),
    [
        *itertools.product((signal.SIGINT, signal.SIGTERM), ("starting ...", "SegQC answers", "takes jobs")),
        (signal.SIGHUP, "takes jobs"),
    ],
)
def test_a_server_in_the_background_of_a_script_ends_by(sign: signal.Signals, moment: str, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "studies", scans=2, finals=1)
    server = _start(folder, tmp_path / "temporary")
    said = _read_until(server, moment)
    server.send_signal(sign)
    said += server.communicate()[1]
    assert server.returncode == 0, said
    assert "SegQC has ended." in said
    if moment == "takes jobs":
        assert "SegQC is ending: the worker stops its job" in said
    assert "Traceback" not in said, said
    _assert_nothing_is_left(folder, tmp_path / "temporary")


@pytest.mark.parametrize("moment", ["starting ...", "SegQC answers", "takes jobs"])
def test_a_server_that_gets_many_signals_at_once_ends(moment: str, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "studies", scans=2, finals=1)
    server = _start(folder, tmp_path / "temporary")
    said = _read_until(server, moment)
    for _ in range(20):  # as Ctrl-C held down, and what `timeout` and a service manager send meanwhile
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            server.send_signal(sign)
    said += server.communicate()[1]
    assert server.returncode == 0, said
    assert "Traceback" not in said, said
    _assert_nothing_is_left(folder, tmp_path / "temporary")


def test_a_signal_that_interrupts_the_handler_of_another_one_cuts_nothing_off() -> None:
    command = [sys.executable, "-m", "tests.interrupted_handler"]
    ended = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "1 True" in ended.stdout.splitlines()
