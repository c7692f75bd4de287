"""Locks between processes: held as long as their holder lives, however it ends."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from segqc.errors import SegqcError

logger = logging.getLogger(__name__)

_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a lock, as it wrote itself into the lock's file.

    Attributes:
        purpose: what it does, such as "segqc train".
        pid: its process id.
        host: the machine that it runs on.
        since: when it took the lock.
    """

    purpose: str
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    since: dt.datetime = field(default_factory=lambda: dt.datetime.now(dt.UTC))

    def __str__(self) -> str:
        """For messages: what it does, its process, and since when."""
        since = self.since.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        return f"{self.purpose} (process {self.pid} on {self.host}, since {since})"


_HOLDER: Final = TypeAdapter(Holder)


class LockHeld(SegqcError):  # noqa: N818 - the finding, not the exception, is what callers name
    """Another process holds the lock.

    Attributes:
        holder: which one; None where it has not written so yet.
    """

    def __init__(self, path: Path, holder: Holder | None) -> None:
        super().__init__(f"{path}: held by {holder or 'another process'}")
        self.holder = holder


@contextlib.contextmanager
def hold(path: Path, purpose: str) -> Iterator[None]:
    """Hold a lock; the system releases it when this process ends.

    On a file system without locks nothing is locked, with a warning.

    Args:
        path: the lock's file, made where it is missing. It stays.
        purpose: what this process does, for the messages of others.

    Raises:
        LockHeld: if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockHeld(path, holder_of(path)) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning("%s: this file system has no locks (%s)", path, error.strerror)
        file.truncate(0)
        file.write(_HOLDER.dump_json(Holder(purpose)))
        file.flush()
        yield


def holder_of(path: Path) -> Holder | None:
    """Who holds, or held last, a lock; None where nobody wrote so."""
    try:
        return _HOLDER.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def is_abandoned(path: Path) -> bool:
    """Whether the holder of a lock is known to be dead: a process of this machine that does not hold it any more."""
    holder = holder_of(path)
    if holder is None or holder.host != socket.gethostname():
        return False
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
