"""How processes end: with the one that started them, or by a signal. Imports nothing slow: comes first in a process."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import Final

_ONE_WISH_SECONDS: Final = 2.0
_AGAIN_SECONDS: Final = 0.01
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


def ending_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a process to end: Ctrl-C, a service manager's, and that of a closed terminal.

    Interrupts also where they are ignored by inheritance, as in a script's background; a closed terminal only where
    that is not ignored, as by ``nohup``.
    """
    asked = (signal.SIGINT, signal.SIGTERM)
    return asked if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (*asked, signal.SIGHUP)


def exit_by_signals() -> None:
    """Let the signals that end this process raise `SystemExit`: no traceback, and what is temporary is removed.

    The exit status is 128 plus the signal's number. A signal that is ignored by inheritance stays so.
    """
    last = -math.inf
    status = 0

    def leave(number: int, _: FrameType | None) -> None:
        nonlocal last, status
        now = time.monotonic()
        # several at once, as `timeout` and an impatient user send them, must not cut the clean-up short
        if now - last > _ONE_WISH_SECONDS:
            last, status = now, _SHELL_OFFSET + number
            sys.exit(status)

    def leave_now(*_: int | FrameType | None) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        sys.exit(status)

    def lost(found: sys.UnraisableHookArgs) -> None:
        # a signal may come in a finalizer or a weak reference's callback, of which imports call many: no exception
        # leaves these, and Python would print this one and go on
        if not isinstance(found.exc_value, SystemExit):
            sys.__unraisablehook__(found)
        elif not _is_at_exit(found):
            signal.signal(signal.SIGALRM, leave_now)
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)

    sys.unraisablehook = lost
    for sign in ending_signals():
        if signal.getsignal(sign) is not signal.SIG_IGN:
            signal.signal(sign, leave)


def _is_at_exit(found: sys.UnraisableHookArgs) -> bool:
    """Whether an exception was met when the process was about to end anyway."""
    return found.object is sys.modules.get("threading") or "atexit" in (found.err_msg or "")


def ignore_ending_signals() -> None:
    """Let no signal end this process any more: its work is done, and its exit status is to say so.

    At its very end Python would give the signals back to the system, whose default is to kill.
    """
    for sign in ending_signals():
        signal.signal(sign, signal.SIG_IGN)


def die_with_parent(sign: signal.Signals, parent: int) -> None:
    """Have the kernel send this process a signal when its parent has died, however it died (Linux).

    Args:
        sign: the signal.
        parent: the parent's process id; if it has died by now, the signal comes at once.
    """
    import ctypes  # here: a process's first imports are those that it cannot leave quietly yet

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
