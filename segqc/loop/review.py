"""What a reviewer decides of a scan, by the words that commands and routes use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from segqc.store.records import ScanState

Decision: TypeAlias = Literal["approve", "reject", "exclude", "reopen"]

STATE_OF: Final[Mapping[Decision, ScanState]] = {
    "approve": "approved",
    "reject": "rejected",
    "exclude": "excluded",
    "reopen": "unlabelled",
}
