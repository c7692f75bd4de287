"""Processes that end with the one that started them. Imports nothing slow: it has to come first in a process."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


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
