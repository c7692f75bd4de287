"""Where scans come from: the dataset folder itself, or something else that hands out its scans as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from segqc.errors import SegqcError
from segqc.split import SplitConfig

if TYPE_CHECKING:  # the store holds its source
    from segqc.store.findings import Finding
    from segqc.store.records import ScanRecord
    from segqc.store.store import Store


class SourceUnavailable(SegqcError):  # noqa: N818 - the finding, not the exception, is what callers name
    """What scans come from does not answer now: not the caller's fault, and nothing has changed."""

    status = 503


@dataclass(frozen=True, slots=True)
class ScanChanges:
    """What came of a look at all scans: how many are new, missing and replaced, and the names of all others now."""

    new: int = 0
    missing: int = 0
    replaced: int = 0
    changed: frozenset[str] = frozenset()


class ScanSource(Protocol):
    """What hands out scans as files. A store without one has its scans in its dataset folder."""

    def sync(
        self, store: Store, split_config: SplitConfig, noted: Mapping[str, Finding], stop: Callable[[], bool]
    ) -> ScanChanges:
        """Bring the store's scans in line with what is there now.

        Args:
            store: the store.
            split_config: how new patients get their fold and role.
            noted: what was not taken in before, by file.
            stop: asked from time to time whether to leave the rest for the next time.
        """

    def is_unchanged(self, store: Store, scan: ScanRecord, split_config: SplitConfig) -> bool:
        """Tell whether a scan is there with its content; what is there now is taken in where it is not.

        Raises:
            SourceUnavailable: if nobody can tell now.
        """

    def file(self, store: Store, scan: ScanRecord) -> Path:
        """The file of a scan, with the content that its record names; it may be gone again some minutes later.

        Raises:
            UnknownScan: if the scan is gone.
            ScanReplaced: if another content has taken its place.
            SourceUnavailable: if it is not to be had now.
        """
