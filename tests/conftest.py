"""What several test modules share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store_kit import Clock, new_database, running_postgresql


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


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    try:
        with running_postgresql() as url:
            yield url
    except FileNotFoundError as error:
        if os.environ.get("SEGQC_TEST_POSTGRESQL") == "required":
            raise
        pytest.skip(f"no PostgreSQL to test with: {error}")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.server)])
def url(request: pytest.FixtureRequest) -> str | None:
    return None if request.param == "sqlite" else new_database(request.getfixturevalue("postgresql"))


@pytest.fixture
def clock() -> Clock:
    return Clock()
