"""Everything a store keeps as one folder of plain files, from any database and into any.

::

    <folder>/archive.json           revision of the tables, and rows and sha256 of each of their files
    <folder>/tables/<table>.jsonl   a row a line, in the order in which rows refer to each other
    <folder>/labels/                the content of every label version, as in a studies folder's own part

Scans, settings and networks are not part of it.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from pydantic import JsonValue, TypeAdapter
from sqlalchemy import LargeBinary, Table, func, insert, select, text

from segqc.exchange.dataset import ExchangeError, read_json, refuse_existing, write_json
from segqc.store import labels
from segqc.store.database import REVISION, Transaction
from segqc.store.files import LabelFiles, sha256_of
from segqc.store.schema import Base, LabelVersion, Scan, UtcDateTime
from segqc.store.store import Store
from segqc.store.upkeep import Report, copy_contents, rebuild_views, silent
from segqc.volumes import atomic_write

_FILE: Final = "archive.json"
_AT_ONCE: Final = 1000

Value: TypeAlias = "JsonValue | dt.datetime | bytes"


@dataclass(frozen=True, slots=True)
class _TableFile:
    rows: int
    sha256: str


@dataclass(frozen=True, slots=True)
class _Archive:
    revision: str
    tables: dict[str, _TableFile]


_ARCHIVE: Final = TypeAdapter(_Archive)


def export_archive(store: Store, folder: Path, report: Report = silent) -> dict[str, int]:
    """Write all rows, of one state, and the content of all label versions; others may go on working.

    Returns:
        The number of rows by table.

    Raises:
        ExchangeError: if the folder is not empty.
        StoreError: if a label content is missing or damaged.
    """
    refuse_existing(folder)
    with atomic_write(folder) as temporary:
        (temporary / "tables").mkdir(parents=True)
        tables = {}
        with store.read() as transaction:
            for table in Base.metadata.sorted_tables:
                path = temporary / "tables" / f"{table.name}.jsonl"
                rows = _write_rows(transaction, table, path)
                tables[table.name] = _TableFile(rows, sha256_of(path))
            contents = sorted(labels.contents(transaction))
        copy_contents(store.files, contents, _files(temporary), report)
        write_json(temporary / _FILE, _ARCHIVE, _Archive(REVISION, tables))
    return {name: file.rows for name, file in tables.items()}


def import_archive(folder: Path, store: Store, report: Report = silent) -> dict[str, int]:
    """Put an archive into a store that holds nothing yet: the same rows with the same ids, contents, and views.

    The scans have to be in the studies folder by themselves; one that is not counts as missing until it is.

    Returns:
        The number of rows by table.

    Raises:
        ExchangeError: if the archive is damaged or of another revision, or the store holds something already.
        StoreError: if a label content is missing or damaged.
    """
    archive = read_json(folder / _FILE, _ARCHIVE, "an archive of segqc")
    if archive.revision != REVISION:
        raise ExchangeError(
            f"{folder / _FILE}: its tables are of revision {archive.revision}, and this segqc has {REVISION}; import "
            "it with the version that wrote it, and upgrade the store then"
        )
    for table in Base.metadata.sorted_tables:
        path, said = _table_file(folder, table), archive.tables.get(table.name)
        if said is None or not path.is_file() or sha256_of(path) != said.sha256:
            raise ExchangeError(f"{path}: is missing or damaged; copy the archive again")
    if found := sorted(path for path in store.files.views.glob("[!.]*/[!.]*") if path.is_file()):
        raise ExchangeError(f"{found[0]}: labels lie in the folder already; move them away first")
    for row in _lines(_table_file(folder, Base.metadata.tables[Scan.__tablename__])):
        if row["file"] != os.path.basename(str(row["file"])):
            raise ExchangeError(
                f"{folder}: names the scan file {row['file']!r}, which lies outside of a studies folder; do not use it"
            )
    _refuse_rows(store)
    copy_contents(_files(folder), sorted(_contents(folder)), store.files, report)
    counts = {}
    with store.write() as transaction:
        for table in Base.metadata.sorted_tables:
            counts[table.name] = _read_rows(transaction, table, _table_file(folder, table))
        if not store.database.is_sqlite:
            _continue_numbers(transaction)
    rebuild_views(store, report=report)
    return counts


def _refuse_rows(store: Store) -> None:
    with store.read() as transaction:
        for table in Base.metadata.sorted_tables:
            if transaction.scalar(select(func.count()).select_from(table)):
                raise ExchangeError(
                    f"{store.database.shown}: the store holds rows already; import into an empty database, and a "
                    "studies folder that no other command has opened yet"
                )


def _files(folder: Path) -> LabelFiles:
    return LabelFiles(folder, folder)


def _table_file(folder: Path, table: Table) -> Path:
    return folder / "tables" / f"{table.name}.jsonl"


def _contents(folder: Path) -> set[tuple[str, str]]:
    rows = _lines(_table_file(folder, Base.metadata.tables[LabelVersion.__tablename__]))
    found = set()
    for row in rows:
        for address, end in (("sha256", "suffix"), ("source_sha256", "source_suffix")):
            sha256, suffix = row[address], row[end]
            if isinstance(sha256, str) and isinstance(suffix, str):
                found.add((sha256, suffix))
    return found


# -------------------------------------------------------------------------------------------------------------- rows


def _write_rows(transaction: Transaction, table: Table, path: Path) -> int:
    # by primary key: a label version comes after the one that it was made of
    query = select(table).order_by(*table.primary_key.columns).execution_options(yield_per=_AT_ONCE)
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in transaction.execute(query).mappings():
            line = {name: _encoded(value) for name, value in row.items()}
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
            count += 1
    return count


def _read_rows(transaction: Transaction, table: Table, path: Path) -> int:
    decode = _decoders(table)
    count = 0
    batch: list[dict[str, Value]] = []
    for row in _lines(path):
        batch.append({name: decode[name](value) if name in decode else value for name, value in row.items()})
        if len(batch) == _AT_ONCE:
            transaction.execute(insert(table), batch)
            count, batch = count + len(batch), []
    if batch:
        transaction.execute(insert(table), batch)
    return count + len(batch)


def _lines(path: Path) -> Iterator[dict[str, JsonValue]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _encoded(value: Value) -> JsonValue:
    if isinstance(value, dt.datetime):
        return value.isoformat()
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _decoders(table: Table) -> Mapping[str, Callable[[JsonValue], Value]]:
    found: dict[str, Callable[[JsonValue], Value]] = {}
    for column in table.columns:
        if isinstance(column.type, UtcDateTime):
            found[column.name] = _time
        elif isinstance(column.type, LargeBinary):
            found[column.name] = _bytes
    return found


def _time(value: JsonValue) -> dt.datetime | None:
    return None if value is None else dt.datetime.fromisoformat(str(value))


def _bytes(value: JsonValue) -> bytes | None:
    return None if value is None else base64.b64decode(str(value))


def _continue_numbers(transaction: Transaction) -> None:
    """Let PostgreSQL number new rows after those that came with their numbers."""
    for table in Base.metadata.sorted_tables:
        if "id" in table.columns:
            last = transaction.scalar(select(func.max(table.columns["id"])))
            if last is not None:
                sequence = {"table": table.name, "last": last}
                transaction.execute(text("SELECT setval(pg_get_serial_sequence(:table, 'id'), :last)"), sequence)
