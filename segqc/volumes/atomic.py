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
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if Path(str(error.filename)).is_relative_to(hidden):
            raise _naming(path, error) from error
        raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _naming(path: Path, error: OSError) -> OSError:
    return OSError(error.errno, error.strerror, str(path))
