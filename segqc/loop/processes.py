"""How processes end: with the one that started them, or by a signal. Imports nothing slow: comes first in a process."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_SHELL_OFFSET: Final = 128  # shells and containers report a death by signal n as exit status 128 + n

_USUAL_CAUSES: Final[Mapping[signal.Signals, str]] = {
    signal.SIGKILL: "usually the system ended it because memory ran out: set a smaller patch, batch or size in "
    "[training] of segqc.toml, or give the machine or container more memory",
    signal.SIGTERM: "somebody, or the system at its shutdown, asked it to end",
    signal.SIGINT: "somebody interrupted it",
    signal.SIGHUP: "its terminal or session was closed",
    signal.SIGSEGV: "a crash inside a library or driver: if it happens again, check the installation of PyTorch and of "
    "the GPU's driver",
    signal.SIGBUS: "memory or a file could not be reached: usually a full disk or too little shared memory",
    signal.SIGABRT: "a library gave up: the lines before say why",
    signal.SIGILL: "the processor lacks an instruction that a library was built for",
    signal.SIGFPE: "a library divided by zero",
    signal.SIGXCPU: "its limit of processor time was reached (ulimit -t)",
    signal.SIGXFSZ: "its limit of file size was reached (ulimit -f)",
}


def die_with_parent(sign: signal.Signals, parent: int) -> None:
    """Have the kernel send this process a signal when its parent has died, however it died (Linux).

    Args:
        sign: the signal.
        parent: the parent's process id; if it has died by now, the signal comes at once.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, int(sign))
        if os.getppid() != parent:
            os.kill(os.getpid(), sign)


def death_by_signal(returncode: int) -> str | None:
    """Which signal ended a process, and what that usually means; None where none did.

    Args:
        returncode: as `subprocess.Popen.returncode` has it: negative for a signal.
    """
    number = -returncode if returncode < 0 else returncode - _SHELL_OFFSET
    try:
        sign = signal.Signals(number)
    except ValueError:
        return f"killed by signal {number}" if returncode < 0 else None
    cause = _USUAL_CAUSES.get(sign)
    return f"killed by {sign.name}{f' ({cause})' if cause else ''}"
