"""What can be wrong with a dataset folder and what is asked of it."""

from __future__ import annotations

from segqc.errors import SegqcError


class DatasetError(SegqcError):
    """A dataset folder can't be used; says what is missing and what to do."""
