"""What several test modules share."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from sqlalchemy import Connection, Engine, event
from sqlalchemy.util import LRUCache

from segqc.store.store import Store
from tests.pacs_kit import Orthanc, running_orthanc
from tests.store_kit import Clock, new_database, running_postgresql

# Two runs draw the same; new examples are looked for by the tests that throw requests for a given time.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings in the environment of whoever runs the tests must not change what is tested."""
    for name in list(os.environ):
        if name.startswith("SEGQC_") and name != "SEGQC_DATA":
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True, scope="session")
def _temporary_files_go_with_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes that tests let die cannot clean up after themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        yield


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite database, made by the migrations."""
    store = Store.open(tmp_path_factory.mktemp("migrated"))
    store.close()
    return Path(str(store.database.url.database))


@pytest.fixture(autouse=True)
def _stores_begin_as_copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new store on SQLite is a copy of one that was migrated: hundreds of tests make one."""
    if request.node.get_closest_marker("migrates"):
        return
    template: Path = request.getfixturevalue("migrated")
    check = Store._check_revision

    def copied_first(store: Store) -> None:
        if store.database.is_sqlite and store.is_writable:
            target = Path(str(store.database.url.database))
            if not target.exists():
                shutil.copyfile(template, target)
        check(store)

    monkeypatch.setattr(Store, "_check_revision", copied_first)


class _Statements(LRUCache[tuple[object, ...], object]):
    """Compiled statements of all engines of one kind of database: SQLAlchemy itself keeps each engine's apart."""

    @staticmethod
    def _of_kind(key: tuple[object, ...]) -> tuple[object, ...]:
        dialect, *statement = key
        return type(dialect), getattr(dialect, "_json_deserializer", None), *statement

    def get(self, key: tuple[object, ...], default: object = None) -> object:
        return super().get(self._of_kind(key), default)

    def __setitem__(self, key: tuple[object, ...], compiled: object) -> None:
        super().__setitem__(self._of_kind(key), compiled)


@pytest.fixture(autouse=True, scope="session")
def _statements_are_compiled_once() -> Iterator[None]:
    """Each test has an engine of its own, and to compile its statements takes longer than to run them."""
    statements = _Statements(2000)

    def share(connection: Connection) -> None:
        connection.execution_options(compiled_cache=statements)

    event.listen(Engine, "engine_connect", share)
    yield
    event.remove(Engine, "engine_connect", share)


@pytest.fixture
def hangups() -> Iterator[None]:
    """What is started gets hangups and interrupts, also where the tests ignore them (nohup, a script's background)."""
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGHUP, hangup)
    signal.signal(signal.SIGINT, interrupt)


@pytest.fixture(autouse=True)
def _nothing_waits_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes die in the tests, and the machine does not: what was written is there without it."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


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


@pytest.fixture(scope="session")
def orthanc() -> Iterator[Orthanc]:
    try:
        with running_orthanc() as found:
            yield found
    except FileNotFoundError as error:
        if os.environ.get("SEGQC_TEST_ORTHANC") == "required":
            raise
        pytest.skip(f"no Orthanc to test with: {error}")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.server)])
def url(request: pytest.FixtureRequest) -> str | None:
    return None if request.param == "sqlite" else new_database(request.getfixturevalue("postgresql"))


@pytest.fixture
def clock() -> Clock:
    return Clock()
