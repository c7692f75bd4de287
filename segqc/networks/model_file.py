"""Model files as the file system knows them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from segqc.errors import SegqcError


class ModelError(SegqcError):
    """A model file, or the bundle that holds it, is missing, foreign or damaged."""


def model_status(
    path: Path, what: str = "a model file", remedy: str = "remove it and train the network again"
) -> os.stat_result | None:
    """What the file system knows of a model file, or of a file beside it; None where there is none.

    Args:
        path: the file.
        what: what belongs there.
        remedy: what to do where something else lies there.

    Raises:
        ModelError: if something else lies there, or nobody can see what.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise ModelError(f"{path}: is a link to a file that is not there; mend it, or {remedy}") from None
        return None
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise ModelError(f"{path}: cannot be read ({reason}); let SegQC read this file and its folder") from error
    if not stat.S_ISREG(status.st_mode):
        found = "a folder" if stat.S_ISDIR(status.st_mode) else "something else"
        raise ModelError(f"{path}: is {found}, not {what}; {remedy}")
    return status
