"""Databases that are damaged or no database at all: one sentence, whatever lies in their place."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import Result
from sqlalchemy import create_engine, inspect, text
from typer.testing import CliRunner

from segqc.cli import main
from segqc.loop.dataset import Dataset
from segqc.store import jobs, labels, maintenance, scans
from segqc.store.database import (
    REVISION,
    CircuitBreaker,
    FairLock,
    StoreDamaged,
    StoreError,
    StoreReadOnly,
    StoreUnavailable,
)
from segqc.store.store import Store
from tests.server_kit import make_dataset
from tests.store_kit import ANNA, hanging, make_scans, new_database, save_final, sync_scans


def _noise(path: Path) -> None:
    path.write_bytes(b"no database " * 800)


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def _overwritten(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "error"),
    [(_noise, StoreDamaged), (_truncated, StoreDamaged), (_overwritten, StoreDamaged), (_folder, StoreDamaged)],
)
def test_a_damaged_database_is_named(
    tmp_path: Path, damage: Callable[[Path], None], error: type[StoreUnavailable]
) -> None:
    Store.open(tmp_path).close()
    path = tmp_path / "segqc" / "store.sqlite"
    damage(path)
    with pytest.raises(error, match=r"store\.sqlite: the database"):
        opened = Store.open(tmp_path)
        with opened.read() as transaction:
            transaction.execute(text("SELECT * FROM scan")).all()


def test_a_missing_table_is_damage(tmp_path: Path) -> None:
    opened = Store.open(tmp_path)
    with opened.write() as transaction:
        transaction.execute(text("DROP TABLE job"))
    with pytest.raises(StoreDamaged, match="no such table"), opened.read() as transaction:
        transaction.execute(text("SELECT * FROM job"))
    opened.close()


def test_a_locked_database_is_given_up_after_the_patience(tmp_path: Path) -> None:
    holder, waiting = Store.open(tmp_path), Store.open(tmp_path, patience_seconds=0.1)
    with holder.write(), pytest.raises(StoreUnavailable, match="locked"), waiting.write():
        raise AssertionError("two may not write at once")
    with waiting.write():
        pass  # it can be had again
    holder.close()
    waiting.close()


def _other_tables(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE bookmark (url TEXT)")


def _other_migrations(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
    connection.execute("INSERT INTO alembic_version VALUES ('0001')")
    _other_tables(connection)


def _other_scans(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
    connection.execute("INSERT INTO alembic_version VALUES ('3f2a99c0de11')")
    connection.execute("CREATE TABLE scan (id INTEGER)")


def _no_migration(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
    connection.execute("CREATE TABLE scan (id INTEGER)")


def _contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder; the index of a write-ahead log is nobody's data."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("-shm"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "store.lock"}


@pytest.mark.parametrize("fill", [_other_tables, _other_migrations, _other_scans, _no_migration])
@pytest.mark.parametrize("journal", ["delete", "wal"])
@pytest.mark.parametrize("is_open", [False, True])
def test_the_database_of_another_program_is_left_as_it_is(
    tmp_path: Path, fill: Callable[[sqlite3.Connection], None], journal: str, is_open: bool
) -> None:
    path = tmp_path / "segqc" / "store.sqlite"
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode={journal}")
        fill(connection)
        connection.commit()
        if not is_open:
            connection.close()
        before = _contents(tmp_path)
        with pytest.raises(StoreError, match=r"store\.sqlite: holds the tables of another program.*move this file"):
            Store.open(tmp_path)
        with pytest.raises(StoreError, match="another program"):
            maintenance.upgrade(Store(tmp_path))
        assert _contents(tmp_path) == before


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Store]:
    """An open store with a scan and its final label."""
    opened = Store.open(tmp_path)
    make_scans(tmp_path, 1)
    sync_scans(opened)
    save_final(opened, tmp_path, "scan_0", 3)
    yield opened
    opened.close()


def _lose(opened: Store, is_there: bool) -> Path:
    """Close a store and lose its database, or all that is in it."""
    opened.close()
    path = opened.own / "store.sqlite"
    path.unlink()
    if is_there:
        path.touch()
    return path


@pytest.mark.migrates
@pytest.mark.parametrize("is_there", [False, True])
def test_a_log_without_its_database_is_kept(filled: Store, is_there: bool) -> None:
    log = (filled.own / "store.sqlite-wal").read_bytes()
    path = _lose(filled, is_there)
    path.with_name("store.sqlite-wal").write_bytes(log)
    before = _contents(filled.dataset)
    with pytest.raises(StoreDamaged, match=r"its log store\.sqlite-wal is not; .*segqc db restore"):
        Store.open(filled.dataset)
    assert _contents(filled.dataset) == before


@pytest.mark.migrates
@pytest.mark.parametrize("is_there", [False, True])
def test_a_lost_database_is_not_made_anew(filled: Store, is_there: bool) -> None:
    _lose(filled, is_there)
    before = _contents(filled.dataset)
    for way_in in (Store.open, lambda folder: maintenance.upgrade(Store(folder))):
        with pytest.raises(StoreDamaged, match=r"store\.sqlite: the database is missing .*segqc db restore"):
            way_in(filled.dataset)
    assert _contents(filled.dataset) == before


@pytest.mark.parametrize("is_replaced", [False, True])
def test_nothing_is_written_into_a_database_that_is_not_at_its_place(tmp_path: Path, is_replaced: bool) -> None:
    folder = tmp_path / "studies"
    make_scans(folder, 2)
    store = Store.open(folder)
    sync_scans(store)
    path, aside = folder / "segqc" / "store.sqlite", tmp_path / "aside.sqlite"
    path.rename(aside)
    if is_replaced:
        shutil.copyfile(aside, path)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="put in its place"):
            save_final(store, tmp_path, "scan_0", 3)
        with pytest.raises(StoreUnavailable, match="put in its place"), store.read() as transaction:
            scans.names(transaction)
    assert not (folder / "labels").exists()
    aside.replace(path)
    save_final(store, tmp_path, "scan_0", 3)
    store.close()
    with Store.open(folder).read() as transaction:
        assert len(labels.history(transaction, "scan_0")) == 1


def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    (tmp_path / "segqc").mkdir()
    (tmp_path / "segqc" / "store.sqlite").touch()
    opened = Store.open(tmp_path)
    assert opened.revision() == REVISION
    opened.close()


@pytest.mark.server
def test_a_postgresql_database_of_another_program_is_left_as_it_is(tmp_path: Path, postgresql: str) -> None:
    url = new_database(postgresql)
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE bookmark (url TEXT)"))
    with pytest.raises(StoreError, match=r"another program.*name an empty database"):
        Store.open(tmp_path, url)
    assert inspect(engine).get_table_names() == ["bookmark"]
    engine.dispose()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.server)])
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database outside of the dataset folder."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/elsewhere.sqlite"
    return new_database(request.getfixturevalue("postgresql"))


def test_a_database_is_of_one_folder_only(tmp_path: Path, elsewhere: str) -> None:
    for name in ("one", "other"):
        make_scans(tmp_path / name, 2)
        (tmp_path / name / "segqc.toml").write_text(f'[store]\nurl = "{elsewhere}"\n')
    for _ in range(2):
        opened = Store.open(tmp_path / "one", elsewhere)
        sync_scans(opened)
        opened.close()
    refused = r"is the database of the dataset folder /.*/one; name another one for /.*/{}"
    with pytest.raises(StoreError, match=refused.format("other")) as caught:
        Store.open(tmp_path / "other", elsewhere)
    assert "\n" not in str(caught.value)
    for command in (["scans"], ["db", "check"], ["export", "tables"]):
        target = [str(tmp_path / "tables")] if command[0] == "export" else []
        result = CliRunner().invoke(main.app, [*command, str(tmp_path / "other"), *target])
        assert isinstance(result.exception, StoreError)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    with pytest.raises(StoreError, match=refused.format("copy")):
        Store.open(tmp_path / "copy", elsewhere)
    (tmp_path / "one").rename(tmp_path / "moved")
    moved = Store.open(tmp_path / "moved", elsewhere)
    with moved.read() as transaction:
        assert [scan.missing_since for scan in scans.listing(transaction)] == [None, None]
    moved.close()
    with pytest.raises(StoreError, match=r"folder /.*/moved; "):
        Store.open(tmp_path / "copy", elsewhere)


def test_a_circuit_breaker_lets_one_try_at_a_time() -> None:
    now = 0.0
    breaker = CircuitBreaker(1.0, 5.0, lambda: now)
    assert breaker.lets_through()
    assert breaker.lets_through()
    breaker.trip()
    assert not breaker.lets_through()
    now = 1.0
    assert [breaker.lets_through() for _ in range(3)] == [True, False, False]
    now = 6.0  # the one that tries says nothing
    assert [breaker.lets_through() for _ in range(3)] == [True, False, False]
    breaker.trip()
    now = 7.0
    assert breaker.lets_through()
    breaker.reset()
    assert breaker.lets_through()
    assert breaker.lets_through()


@pytest.mark.server
@pytest.mark.parametrize("write", [False, True])
def test_a_postgresql_that_hangs_is_given_up_and_comes_back(tmp_path: Path, postgresql: str, write: bool) -> None:
    opened = Store.open(tmp_path, new_database(postgresql), patience_seconds=0.1)
    way_in = opened.write if write else opened.read

    def ask() -> str | None:
        """What a request is told; None if it is answered."""
        try:
            with way_in() as transaction:
                transaction.execute(text("SELECT count(*) FROM scan"))
        except StoreUnavailable as error:
            return str(error)
        return None

    def ask_until_answered() -> None:
        # a writer that waits for its turn among eight may lose patience on a busy machine: asks again
        while ask() is not None:
            time.sleep(0.05)

    with ThreadPoolExecutor(8) as pool:
        for found in [pool.submit(ask_until_answered) for _ in range(8)]:
            found.result()
        with hanging(postgresql):
            assert all(found.result() for found in [pool.submit(ask) for _ in range(40)])
            with pytest.raises(StoreUnavailable), way_in():
                raise AssertionError("nobody is let through")
        for found in [pool.submit(ask_until_answered) for _ in range(8)]:
            found.result()
    opened.close()


@pytest.mark.server
def test_a_postgresql_that_hangs_within_a_transaction(tmp_path: Path, postgresql: str) -> None:
    opened = Store.open(tmp_path, new_database(postgresql), patience_seconds=0.1)
    make_scans(tmp_path, 1)
    with pytest.raises(StoreUnavailable, match="does not answer"), opened.write() as transaction, hanging(postgresql):
        transaction.execute(text("SELECT count(*) FROM scan"))
    opened.close()
    again = Store.open(tmp_path, opened.database.url.render_as_string(hide_password=False))
    sync_scans(again)  # the write lock was given back
    again.close()


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that says it cannot be written; the rights of files would not keep root from it."""

    def access(path: str | Path, mode: int) -> bool:
        return not (mode & os.W_OK and Path(path).is_relative_to(tmp_path)) and Path(path).exists()

    monkeypatch.setattr(os, "access", access)
    return tmp_path


@pytest.mark.parametrize("is_open", [False, True])
def test_a_read_only_folder_is_read_and_left_as_it_is(
    tmp_path: Path, is_open: bool, request: pytest.FixtureRequest
) -> None:
    writer = Store.open(tmp_path)
    make_scans(tmp_path, 2)
    sync_scans(writer)
    if not is_open:
        writer.close()  # else its last changes are in the write-ahead log only
    before = {path.name: path.read_bytes() for path in (tmp_path / "segqc").iterdir() if path.is_file()}
    request.getfixturevalue("read_only")
    make_scans(tmp_path, 3)
    reader = Store.open(tmp_path)
    sync_scans(reader)
    with reader.read() as transaction:
        assert [scan.name for scan in scans.listing(transaction)] == ["scan_0", "scan_1"]
    with pytest.raises(StoreReadOnly, match="is read-only"), reader.write():
        raise AssertionError("nothing may be written")
    reader.close()
    assert {path.name: path.read_bytes() for path in (tmp_path / "segqc").iterdir() if path.is_file()} == before
    writer.close()


def test_commands_on_a_read_only_folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> None:
    folder, out = make_dataset(tmp_path / "studies", scans=3, finals=2), tmp_path_factory.mktemp("out")
    opened = Dataset(folder).store
    with opened.read() as transaction:
        version = str(labels.history(transaction, "scan_0")[0].id)
    opened.close()
    before = _contents(folder)
    request.getfixturevalue("read_only")

    def run(*arguments: str | Path) -> Result:
        return CliRunner().invoke(main.app, [*map(str, arguments)])

    for command in (
        ("scans", folder), ("labels", folder, "scan_0"),
        ("labels", folder, "scan_0", "--export", version, "-o", out / "label.nii.gz"),
        ("leases", folder), ("costs", folder), ("db", "check", folder), ("db", "backup", folder, out / "backup"),
        *(("export", form, folder, out / form) for form in ("archive", "local", "decathlon", "nnunet", "tables")),
    ):  # fmt: skip
        done = run(*command)
        assert done.exit_code == 0, (command, done.output, done.exception)
    for command in (
        ("review", folder, "scan_0", "approve"), ("db", "restore-views", folder), ("db", "upgrade", folder),
        ("db", "check", folder, "--repair"), ("db", "restore", out / "backup", folder),
        ("labels", folder, "scan_0", "--restore", version),
    ):  # fmt: skip
        refused = run(*command)
        assert isinstance(refused.exception, StoreReadOnly), (command, refused.output, refused.exception)
        assert "is read-only" in str(refused.exception)
    assert _contents(folder) == before


def test_a_read_only_folder_without_a_store_is_named(read_only: Path) -> None:
    with pytest.raises(StoreReadOnly, match="has no store yet"):
        Store.open(read_only)
    assert list(read_only.iterdir()) == []


def test_the_lock_is_given_in_the_order_of_asking() -> None:
    lock, order = FairLock(), list[int]()
    assert lock.acquire(0)
    assert not lock.acquire(0)

    def take(number: int) -> None:
        assert lock.acquire(60)
        order.append(number)
        lock.release()

    threads = [threading.Thread(target=take, args=(number,)) for number in range(10)]
    for asked, thread in enumerate(threads, 1):
        thread.start()
        while len(lock._waiting) < asked:
            threading.Event().wait(0.001)
    lock.release()
    for thread in threads:
        thread.join()
    assert order == list(range(10))
    assert lock.acquire(0)  # nobody holds it any more


@pytest.mark.parametrize(
    ("cell", "damage"), [("request = '{\"model\":'", "JSON"), ("enqueued_at = '2026-13-01'", "a time")]
)
def test_a_cell_that_cannot_be_read_is_damage(tmp_path: Path, cell: str, damage: str) -> None:
    opened = Store.open(tmp_path)
    with opened.write() as transaction:
        jobs.enqueue(transaction, "train", {"model": "segqc"}, ANNA)
        transaction.connection().exec_driver_sql(f"UPDATE job SET {cell}")
    with (
        pytest.raises(StoreDamaged, match=rf"{damage} in it cannot be read.*segqc db restore"),
        opened.read() as transaction,
    ):
        jobs.open_jobs(transaction, "train")
    opened.close()


@pytest.mark.parametrize("name", ["store.sqlite", "store.sqlite-wal"])
def test_a_folder_in_the_place_of_the_database_is_named(tmp_path: Path, name: str) -> None:
    Store.open(tmp_path).close()
    path = tmp_path / "segqc" / name
    path.unlink(missing_ok=True)
    path.mkdir()
    with pytest.raises(StoreDamaged, match=r"a folder lies at the place.*segqc db restore"):
        Store.open(tmp_path)
