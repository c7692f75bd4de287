"""Connections to PostgreSQL that do not wait for ever.

A server that hangs, or a network that drops what is sent, keeps a connection open and says nothing.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any, TypeVar

import psycopg
from sqlalchemy import Dialect, Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.pool import ConnectionPoolEntry

T = TypeVar("T")

_PING_SECONDS = 2.0
_GRACE_SECONDS = 2.0  # after its own limit for locks, a server that works has time to say so


class PatientConnection(psycopg.Connection[Any]):
    """A connection that is closed when the server has not said a word for a while."""

    limit_seconds = 60.0

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **options: Any) -> T:
        """Wait for what the driver does on the connection.

        Raises:
            psycopg.OperationalError: if the server does not answer.
        """
        # only the pool's question whether the server is there is asked outside of a transaction
        limit = min(_PING_SECONDS, self.limit_seconds) if self.autocommit else self.limit_seconds
        return super().wait(self._limited(gen, limit), *args, **options)

    def _limited(self, gen: Generator[Any, Any, T], limit: float) -> Generator[Any, Any, T]:
        # psycopg says every tenth of a second or so that nothing came
        last_seen = time.monotonic()
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if ready:
                    last_seen = time.monotonic()
                elif time.monotonic() - last_seen > limit:
                    gen.close()
                    self.pgconn.finish()
                    raise psycopg.OperationalError("the server does not answer")
                wanted = gen.send(ready)
        except StopIteration as done:
            result: T = done.value
            return result


def postgresql_engine(url: URL, patience_seconds: float, **options: Any) -> Engine:
    """Connections to a PostgreSQL server.

    Args:
        url: the database.
        patience_seconds: how long to wait for a connection, and for a lock.
        options: for SQLAlchemy's engine.
    """
    waits = {
        "connect_timeout": max(2, int(patience_seconds)),
        "options": f"-c lock_timeout={int(patience_seconds * 1000)}",
    }
    engine = create_engine(url, pool_pre_ping=True, connect_args=waits, pool_timeout=patience_seconds, **options)

    @event.listens_for(engine, "do_connect")
    def connect(_: Dialect, __: ConnectionPoolEntry, arguments: list[Any], named: dict[str, Any]) -> PatientConnection:
        connection = PatientConnection.connect(*arguments, **named)
        connection.limit_seconds = patience_seconds + _GRACE_SECONDS
        return connection

    return engine
