"""The command ``segqc serve`` as a process: it ends by every usual signal, whoever started it and whenever it comes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

import psutil

from tests.server_kit import make_dataset

pytestmark = pytest.mark.server


def _ignore_interrupts() -> None:
    """What a shell without job control does with the processes of its background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize("moment", ["starting ...", "SegQC answers", "takes jobs"])
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_server_in_the_background_of_a_script_ends_by(sign: signal.Signals, moment: str, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "studies", scans=2, finals=1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "temporary").mkdir()
    server = subprocess.Popen(
        [sys.executable, "-m", "segqc.cli.main", "serve", str(folder), "--port", str(port), "--no-bootstrap"],
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_ignore_interrupts,
    )
    assert server.stderr is not None
    said = ""
    for line in server.stderr:
        said += line
        if moment in line:
            break
    assert moment in said
    server.send_signal(sign)
    said += server.communicate()[1]
    assert server.returncode == 0, said
    assert "SegQC has ended." in said
    assert "Traceback" not in said
    assert not list((tmp_path / "temporary").glob("segqc-server-*"))
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or ())]
