"""The database behind the store: SQLite in the dataset folder, or PostgreSQL by URL.

Both behave alike: a read sees one state, and one transaction writes at a time (SQLite by its own lock, PostgreSQL by an
advisory one). Writes take milliseconds, so that a queue of them is short; in return no operation has to think about two
writers, and the constraints of the schema are the second line of defence.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import json
import logging
import os
import re
import shutil
import sqlite3
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias, TypeVarTuple, cast

from alembic.config import Config
from sqlalchemy import (
    JSON,
    Connection,
    CursorResult,
    Engine,
    Insert,
    Select,
    Table,
    Update,
    create_engine,
    event,
    inspect,
    make_url,
    text,
)
from sqlalchemy.engine import URL
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DataError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    NotSupportedError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.pool import ConnectionPoolEntry, NullPool
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from segqc.errors import SegqcError

logger = logging.getLogger(__name__)

Clock: TypeAlias = Callable[[], dt.datetime]
Parameters: TypeAlias = Mapping[str, object]
Ts = TypeVarTuple("Ts")

DATABASE_FILE: Final = "store.sqlite"
REVISION: Final = "0001"
PATIENCE_SECONDS: Final = 60.0
_PAUSE_SECONDS: Final = 1.0  # between tries to reach a server that did not answer
_CONNECTIONS: Final = {"pool_size": 20, "max_overflow": 40}  # more than a server has threads
_OWN_TABLES: Final = frozenset({"scan", "label_version"})  # what tells our tables from those of other programs
_OWN_REVISION: Final = re.compile(r"\d{4}")
_ALEMBIC: Final = threading.Lock()  # what it works on is global to the process
_WRITER_LOCK: Final = 0x5E69C  # of PostgreSQL's advisory locks, any number of our own
_TAKE_WRITER_LOCK: Final = text("SELECT pg_advisory_xact_lock(:key)")


class StoreError(SegqcError):
    """The store can't be used or asked for that; says what is wrong and what to do."""


class StoreUnavailable(StoreError):  # noqa: N818 - the finding, not the exception, is what callers name
    """The database does not answer, or cannot write: not the caller's fault."""

    status = 503


class StoreDamaged(StoreUnavailable):
    """The database is no database, or not whole: only a backup helps."""


class StoreReadOnly(StoreError):  # noqa: N818 - the finding, not the exception, is what callers name
    """The database lies in a folder that cannot be written."""


class UnreadableCell(ValueError):  # noqa: N818 - the finding, not the exception, is what callers name
    """A cell that holds JSON or a time cannot be read."""


class Transaction(Session):
    """One transaction; everything in it happens at one time, ``now`` (UTC)."""

    now: dt.datetime
    core: Connection
    """The connection itself: `execute` costs three times as much, as it also makes objects of tables' rows."""

    def rows(self, query: Select[*Ts], parameters: Parameters = MappingProxyType({})) -> CursorResult[*Ts]:
        """Read columns."""
        self.flush()
        return self.core.execute(query, parameters)

    def change(self, statement: Update, parameters: Parameters = MappingProxyType({})) -> int:
        """Update rows at once and return how many; objects that were made of rows before are read again."""
        self.flush()
        changed = self.core.execute(statement, parameters).rowcount
        self.expire_all()
        return changed

    def insert(self, table: type[DeclarativeBase], **values: object) -> int:
        """Add a row at once and return its number; for what is added all the time a tenth of an object's cost."""
        made = self.core.execute(_insert(table), values)
        return 0 if made.inserted_primary_key is None else int(made.inserted_primary_key[0])


@functools.cache
def _insert(table: type[DeclarativeBase]) -> Insert:
    return cast(Table, table.__table__).insert()


class json_array(FunctionElement[list[str]]):  # noqa: N801 - called like SQL's own functions
    """All values of a text column as one JSON array, in no particular order; NULL or empty where there is none."""

    type = JSON()
    inherit_cache = True


@compiles(json_array)
def _json_array(element: json_array, compiler: SQLCompiler, **options: object) -> str:
    name = "json_group_array" if compiler.dialect.name == "sqlite" else "json_agg"
    return f"{name}({compiler.process(element.clauses, **options)})"


def utc_now() -> dt.datetime:
    """The time, with its zone."""
    return dt.datetime.now(dt.UTC)


class FairLock:
    """A lock that is given in the order in which it was asked for.

    SQLite's own waiting polls with growing pauses, so that under load some writers are never lucky.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._held = False

    def acquire(self, timeout: float) -> bool:
        """Wait for the lock, at most so many seconds; returns whether it is held now."""
        with self._mutex:
            if not self._held:
                self._held = True
                return True
            turn = threading.Event()
            self._waiting.append(turn)
        if turn.wait(timeout):
            return True
        with self._mutex:
            if turn.is_set():  # handed over in this very moment
                return True
            self._waiting.remove(turn)
            return False

    def release(self) -> None:
        """Hand the lock to whoever waits longest."""
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._held = False


class CircuitBreaker:
    """Spares callers the wait for a server that has just not answered: until it does, one at a time tries."""

    def __init__(self, pause_seconds: float, try_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Let everybody through.

        Args:
            pause_seconds: how long nobody tries after a failure.
            try_seconds: how long a try may take before the next one is let through.
            clock: gives the time, in seconds.
        """
        self._pause, self._try, self._clock = pause_seconds, try_seconds, clock
        self._mutex = threading.Lock()
        self._open_until: float | None = None

    def lets_through(self) -> bool:
        """Whether the caller may try; then it says how that went, by `trip` or `reset`."""
        with self._mutex:
            if self._open_until is None:
                return True
            if self._clock() < self._open_until:
                return False
            self._open_until = self._clock() + self._try
            return True

    def trip(self) -> None:
        """The server did not answer."""
        with self._mutex:
            self._open_until = self._clock() + self._pause

    def reset(self) -> None:
        """The server answered."""
        with self._mutex:
            self._open_until = None


class Database:
    """Connections to one store's database."""

    def __init__(
        self,
        url: str,
        clock: Clock = utc_now,
        patience_seconds: float = PATIENCE_SECONDS,
        *,
        shown: str | None = None,
    ) -> None:
        """Prepare connections; the first transaction opens one.

        Args:
            url: where the database is.
            clock: gives the time, in UTC.
            patience_seconds: how long to wait for a database that is locked or does not answer.
            shown: names it in messages in place of its address.

        Raises:
            StoreError: if the URL names no database that a store can be kept in.
        """
        self.url = _checked_url(url)
        self.clock = clock
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self._patience_seconds = patience_seconds
        self._shown = shown
        self._write_lock = FairLock()
        self._breaker = CircuitBreaker(_PAUSE_SECONDS, 2 * patience_seconds)
        self._inode: int | None = None  # of the SQLite file, since the first transaction
        self.is_writable = not self.is_sqlite or _is_writable(Path(str(self.url.database)))
        self.engine = _engine(self.url, patience_seconds) if self.is_writable else _read_only_engine(self.url)

    @contextlib.contextmanager
    def read(self) -> Iterator[Transaction]:
        """A transaction that reads one state and changes nothing."""
        with self._connection(write=False) as connection, self._session(connection) as transaction:
            yield transaction

    @contextlib.contextmanager
    def write(self) -> Iterator[Transaction]:
        """A transaction alone with the write lock: committed at the end, taken back on any error.

        Raises:
            StoreReadOnly: if the database's folder cannot be written.
        """
        with self._turn(), self._connection(write=True) as connection, self._session(connection) as transaction:
            yield transaction
            transaction.flush()
            connection.commit()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """The turn of this thread among the process's writers; who waits for it holds no connection."""
        if not self._write_lock.acquire(self._patience_seconds):
            raise StoreUnavailable(f"{self.shown}: the database is locked or too busy; try again")
        try:
            yield
        finally:
            self._write_lock.release()

    @contextlib.contextmanager
    def _connection(self, *, write: bool) -> Iterator[Connection]:
        if write and not self.is_writable:
            raise StoreReadOnly(
                f"{self.shown}: is read-only, and this has to write; make its folder writable, or copy it"
            )
        with self._as_store_errors(), self.engine.connect() as connection:
            self._breaker.reset()
            # the write lock first, and only then the time: times in the store are in the order of the commits
            self._begin(connection, write=write)
            yield connection

    def _begin(self, connection: Connection, *, write: bool) -> None:
        if self.is_sqlite:
            connection.begin()
            # a reader that turns writer can meet "database is locked" whatever the timeout: say at once who writes
            connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
            self._check_in_place()
        elif write:
            connection.execute(_TAKE_WRITER_LOCK, {"key": _WRITER_LOCK})
        else:
            # it shows each statement another state unless told otherwise; writers hold a lock and need the newest
            connection.execution_options(isolation_level="REPEATABLE READ")

    def _check_in_place(self) -> None:
        """Refuse to go on where the SQLite file that is open is not the one at its place any more.

        What is written into one that was removed or replaced (by a copy of a backup, say) would be lost with the
        process, and SQLite does not look with a write-ahead log.
        """
        if not self.is_writable:
            return
        try:
            inode = os.stat(str(self.url.database)).st_ino
        except FileNotFoundError:
            inode = None
        if self._inode is None:
            self._inode = inode
        elif inode != self._inode:
            raise StoreUnavailable(
                f"{self.shown}: the database is gone, or another file was put in its place while it was in use, and "
                "nothing is written; put it back, or stop segqc and start it again"
            )

    @contextlib.contextmanager
    def _as_store_errors(self) -> Iterator[None]:
        """Tell of the driver's errors as `StoreUnavailable`; at once where the server has just not answered."""
        if not self._breaker.lets_through():
            raise StoreUnavailable(f"{self.shown}: the database does not answer; try again")
        try:
            yield
        except PoolTimeoutError as error:
            raise StoreUnavailable(f"{self.shown}: the database is too busy; try again") from error
        except (IntegrityError, DataError, NotSupportedError):
            raise  # what was to be written is wrong, not the database
        except UnreadableCell as error:
            raise self._damaged(str(error)) from error
        except (DatabaseError, InterfaceError) as error:
            if getattr(error.orig, "sqlstate", None) == _REFUSED_BY_TRIGGER:
                raise  # as an IntegrityError, which it is on SQLite
            if not self.is_sqlite and getattr(error.orig, "sqlstate", None) is None:  # not the server says so
                self._breaker.trip()
            raise self._problem(error) from error

    def _problem(self, error: DBAPIError) -> StoreUnavailable:
        """What an error of the driver means, in one sentence."""
        reason = str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__
        if _is_damage(error):
            return self._damaged(reason)
        if self.is_sqlite and any(path.is_dir() for path in self._files()):
            return self._damaged("a folder lies at the place of its file or its log")
        return StoreUnavailable(f"{self.shown}: the database cannot be used ({reason})")

    def _damaged(self, reason: str) -> StoreDamaged:
        remedy = "restore a backup (segqc db restore BACKUP FOLDER)" if self.is_sqlite else "restore a dump of it"
        return StoreDamaged(f"{self.shown}: the database is damaged ({reason}); stop segqc and {remedy}")

    def _files(self) -> tuple[Path, Path]:
        path = Path(str(self.url.database)).absolute()
        return path, _log_of(path)

    @contextlib.contextmanager
    def _session(self, connection: Connection) -> Iterator[Transaction]:
        transaction = Transaction(bind=connection, expire_on_commit=False, join_transaction_mode="rollback_only")
        transaction.now, transaction.core = self.clock(), connection
        try:
            yield transaction
        finally:
            if transaction.in_transaction():  # most never make an object of a row
                transaction.close()

    @property
    def shown(self) -> str:
        """The database's address for messages, without a password."""
        if self._shown is not None:
            return self._shown
        return str(self.url.database) if self.is_sqlite else self.url.render_as_string(hide_password=True)

    def revision(self) -> str | None:
        """The schema's revision; None for an empty database, or none. Nothing is written.

        Raises:
            StoreError: if the database is another program's.
            StoreDamaged: if it is empty, but its write-ahead log is not.
        """
        engine = self.engine
        if self.is_sqlite:
            path = Path(str(self.url.database)).absolute()
            if not _is_file_with_content(path) and _is_file_with_content(_log_of(path)):
                raise StoreDamaged(  # SQLite would remove the log
                    f"{self.shown}: the database is missing or empty, but its log {_log_of(path).name} is not; "
                    "stop segqc and restore a backup (segqc db restore BACKUP FOLDER)"
                )
            if not path.exists():
                return None
            if self.is_writable:
                engine = _looking_engine(path, self._patience_seconds)
        with self._as_store_errors(), engine.connect() as connection:
            tables = set(inspect(connection).get_table_names())
            if "alembic_version" in tables and tables & _OWN_TABLES:
                found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
                if found is not None and _OWN_REVISION.fullmatch(found):
                    return found
            elif not tables:
                return None
        remedy = "move this file away, or restore a backup" if self.is_sqlite else "name an empty database"
        raise StoreError(f"{self.shown}: holds the tables of another program, not SegQC's; {remedy}")

    def upgrade(self) -> None:
        """Bring the schema to this program's revision; two processes may do so at once."""
        from alembic import command

        logging.getLogger("alembic").setLevel(logging.WARNING)  # each migration would be shown to the user
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with _ALEMBIC, self._connection(write=True) as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.commit()

    def backup(self, target: Path) -> None:
        """Copy an SQLite database to a new file while others work on it.

        Raises:
            StoreError: if the database is not SQLite's; PostgreSQL brings pg_dump.
        """
        if not self.is_sqlite:
            raise StoreError(
                f"{self.shown}: use pg_dump for a database on PostgreSQL, or 'segqc export archive' for rows and labels"
            )
        with self.engine.connect() as connection:
            source = connection.connection.driver_connection
            if not isinstance(source, sqlite3.Connection):
                raise TypeError("SQLite's own driver is wanted")
            with contextlib.closing(sqlite3.connect(target)) as copy:
                source.backup(copy)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def sqlite_url(path: Path) -> str:
    """The URL of an SQLite file."""
    return URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)


def _checked_url(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise StoreError(
            "the store's URL cannot be read; wanted sqlite:////path/store.sqlite or postgresql://user@host/name"
        ) from error
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and parsed.database:
        return parsed
    raise StoreError(f"a store is kept on SQLite or PostgreSQL, not on {parsed.render_as_string(hide_password=True)}")


def _engine(url: URL, patience_seconds: float) -> Engine:
    if url.get_backend_name() != "sqlite":
        try:
            from segqc.store.postgresql import postgresql_engine
        except ModuleNotFoundError as error:
            raise StoreError("PostgreSQL's driver is not installed; pip install 'segqc[postgresql]'") from error
        return postgresql_engine(url, patience_seconds, **_CONNECTIONS)
    engine = create_engine(
        url,
        connect_args={"timeout": patience_seconds, "check_same_thread": False},
        pool_timeout=patience_seconds,
        json_deserializer=_read_json,
        **_CONNECTIONS,
    )

    @event.listens_for(engine, "connect")
    def on_connect(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself: `Database` says how
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    return engine


def _read_json(content: str) -> object:
    try:
        return json.loads(content)
    except (ValueError, TypeError) as error:
        raise UnreadableCell("JSON in it cannot be read") from error


def _is_writable(path: Path) -> bool:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    return os.access(folder, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))


def _log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _is_file_with_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _looking_engine(path: Path, patience_seconds: float) -> Engine:
    """Connections that leave an SQLite file as it is, whosever it is; `_engine` would set its journal's mode."""
    mode = "mode=ro" if _log_of(path).exists() else "immutable=1"

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(f"{path.as_uri()}?{mode}", uri=True, timeout=patience_seconds, check_same_thread=False)

    return create_engine("sqlite://", creator=connect, poolclass=NullPool)


def _read_only_engine(url: URL) -> Engine:
    """Connections to an SQLite file beside which nothing can be written, not even the index of its write-ahead log."""
    path = Path(str(url.database)).absolute()

    def connect() -> sqlite3.Connection:
        wal = _log_of(path)
        if not _is_file_with_content(wal):
            return sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True, check_same_thread=False)
        # what was committed last is in the log only: it is read where SQLite can write its index
        with tempfile.TemporaryDirectory(prefix="segqc-") as folder:
            for source in (path, wal):
                shutil.copyfile(source, Path(folder) / source.name)
            connection = sqlite3.connect(":memory:", check_same_thread=False)
            with contextlib.closing(sqlite3.connect(Path(folder) / path.name)) as copy:
                copy.backup(connection)
        return connection

    engine = create_engine(url, creator=connect, json_deserializer=_read_json)

    @event.listens_for(engine, "connect")
    def on_connect(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA query_only=ON").close()

    return engine


_REFUSED_BY_TRIGGER: Final = "P0001"
_DAMAGE_SQLITE: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_DAMAGE_POSTGRESQL: Final = ("XX001", "XX002", "42P01", "42703")  # corrupted data or index; no such table or column


def _is_damage(error: DBAPIError) -> bool:
    if isinstance(error.orig, sqlite3.Error):
        code = getattr(error.orig, "sqlite_errorcode", None)
        missing = str(error.orig).startswith(("no such table", "no such column", "Could not decode"))
        return missing or (code is not None and code & 0xFF in _DAMAGE_SQLITE)
    return getattr(error.orig, "sqlstate", None) in _DAMAGE_POSTGRESQL
