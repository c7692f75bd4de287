"""What several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings in the environment of whoever runs the tests must not change what is tested."""
    for name in list(os.environ):
        if name.startswith("SEGQC_") and name != "SEGQC_DATA":
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets that SEGQC_DATA names."""
    folder = os.environ.get("SEGQC_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("SEGQC_DATA names no folder of real data sets")
    return Path(folder)
