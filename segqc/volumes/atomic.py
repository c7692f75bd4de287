"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write a file or a folder to; it becomes `path` on success, and nothing on failure.

    The temporary path has the same name, in a hidden folder beside `path`, so that whoever lists the folder never
    sees a half-written file. Missing parent folders are made. An existing file is replaced; an existing folder only
    if it is empty (OSError otherwise).

    Raises:
        OSError: if it cannot be written; names `path`, not the temporary one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        hidden = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
    except OSError as error:
        raise _naming(path, error) from error
    try:
        temporary = hidden / path.name
        yield temporary
        if temporary.is_file():
            sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if Path(str(error.filename)).is_relative_to(hidden):
            raise _naming(path, error) from error
        raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def sync(path: Path) -> None:
    """Let a file's content, or the names in a folder, outlast a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, as far as that can be; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _naming(path: Path, error: OSError) -> OSError:
    return OSError(error.errno, error.strerror, str(path))
