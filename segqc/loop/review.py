"""What a reviewer decides of a scan, by the words that commands and routes use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from segqc.store.records import ScanState

STATE_OF: Final[Mapping[str, ScanState]] = {
    "approve": "approved",
    "reject": "rejected",
    "exclude": "excluded",
    "reopen": "unlabelled",
}
