"""A signal in the midst of another one's handler, at each line of it; a program of its own, as it traces itself."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from segqc.server.serve import server_of

LINES = 8


async def nothing(*_: object) -> None:
    """An application that answers nothing."""


def interrupt(at: int) -> tuple[bool, bool, int, bool]:
    """Send SIGINT, and SIGTERM at a line of its handler.

    Returns:
        Whether the server is to exit, whether at once, how often its ending was begun, whether there was such a line.
    """
    begun: list[None] = []
    server = server_of(uvicorn.Config(nothing), lambda: begun.append(None))
    lines = 0

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., object] | None:
        nonlocal lines
        lines += event == "line"
        if lines == at:
            sys.settrace(None)
            signal.raise_signal(signal.SIGTERM)
        return trace

    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, server.handle_exit)
    sys.settrace(trace)
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        sys.settrace(None)
    return server.should_exit, server.force_exit, len(begun), lines >= at


if __name__ == "__main__":
    for at in range(1, LINES + 1):
        exits, at_once, begun, was_interrupted = interrupt(at)
        assert (exits, at_once) == (True, False)
        assert begun == (2 if was_interrupted else 1), "each signal is a wish"
        sys.stdout.write(f"{at} {was_interrupted}\n")
