"""Everything a store keeps as one folder of plain files, from any database and into any.

::

    <folder>/archive.json           revision of the tables, and rows and sha256 of each of their files
    <folder>/tables/<table>.jsonl   a row a line, in the order in which rows refer to each other
    <folder>/labels/                the content of every label version, as in a dataset folder's own part

Scans, settings and networks are not part of it, nor is how the files below ``labels/`` were left: they are made anew.
An archive is trusted no more than any other file: every row is checked before the first one is written, and what names
files of the folder must name files in it.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from pydantic import JsonValue, TypeAdapter
from sqlalchemy import JSON, Column, LargeBinary, Table, func, insert, select, text
from sqlalchemy.exc import StatementError

from segqc.io.case_list import ExchangeError, read_json, refuse_existing, write_json
from segqc.progress import NO_PROGRESS, Progress
from segqc.store import labels
from segqc.store.database import REVISION, StoreError, Transaction
from segqc.store.features import is_packed
from segqc.store.files import LabelFiles, sha256_of
from segqc.store.maintenance import copy_contents, rebuild_views
from segqc.store.schema import (
    Base,
    FeatureRow,
    Folder,
    LabelVersion,
    LabelView,
    LeaseRow,
    Packed,
    Scan,
    SignInRow,
    UserRow,
    UtcDateTime,
)
from segqc.store.store import Store
from segqc.volumes import atomic_write

_FILE: Final = "archive.json"
_BATCH_SIZE: Final = 1000
_LONGEST_LINE: Final = 1 << 26  # bytes
_LARGEST_VALUE: Final = 1 << 26  # bytes of a compressed value, once expanded
_LARGEST_INTEGER: Final = 1 << 63  # of both databases
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
# of this folder: where its files lie, and who may sign in, with hashes of passwords
_OF_THE_FOLDER: Final = tuple(table.__tablename__ for table in (LabelView, Folder, UserRow, SignInRow))
_TABLES: Final = tuple(table for table in Base.metadata.sorted_tables if table.name not in _OF_THE_FOLDER)

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


def export_archive(store: Store, folder: Path, progress: Progress = NO_PROGRESS) -> dict[str, int]:
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
            for table in _TABLES:
                path = temporary / "tables" / f"{table.name}.jsonl"
                rows = _write_rows(transaction, table, path)
                tables[table.name] = _TableFile(rows, sha256_of(path))
            contents = sorted(labels.contents(transaction))
        copy_contents(store.files, contents, _files(temporary), progress)
        write_json(temporary / _FILE, _ARCHIVE, _Archive(REVISION, tables))
    return {name: file.rows for name, file in tables.items()}


def import_archive(folder: Path, store: Store, progress: Progress = NO_PROGRESS) -> dict[str, int]:
    """Put an archive into a store that holds nothing yet: the same rows with the same ids, contents, and label files.

    The scans have to be in the dataset folder by themselves; one that is not counts as missing until it is.

    Returns:
        The number of rows by table.

    Raises:
        ExchangeError: if the archive is damaged or of another revision, or the store holds something already. Nothing
            has changed then.
        StoreError: if a label content is missing or damaged. Nothing has changed then.
    """
    archive = read_json(folder / _FILE, _ARCHIVE, "an archive of segqc")
    if archive.revision != REVISION:
        raise ExchangeError(
            f"{folder / _FILE}: its tables are of revision {archive.revision}, and this segqc has {REVISION}; import "
            "it with the version that wrote it, and upgrade the store then"
        )
    contents: set[tuple[str, str]] = set()
    for table in _TABLES:
        path, said = _table_file(folder, table), archive.tables.get(table.name)
        if said is None or not path.is_file() or sha256_of(path) != said.sha256:
            raise ExchangeError(f"{path}: is missing or damaged; copy the archive again")
        count = 0
        for row in _rows(table, path):
            count += 1
            if table.name == LabelVersion.__tablename__:
                contents |= _contents(row)
        if count != said.rows:
            raise ExchangeError(f"{path}: holds {count} rows and not the {said.rows} told; export the archive again")
    if found := sorted(path for path in store.files.views.glob("[!.]*/[!.]*") if path.is_file()):
        raise ExchangeError(f"{found[0]}: labels lie in the folder already; move them away first")
    _refuse_rows(store)
    with _taken_back_on_error(store.files):
        copy_contents(_files(folder), sorted(contents), store.files, progress)
        try:
            with store.write() as transaction:
                for table in _TABLES:
                    _insert_rows(transaction, table, _table_file(folder, table))
                if not store.database.is_sqlite:
                    _continue_numbers(transaction)
        except StatementError as error:
            reason = str(error.orig).strip().splitlines()[0]
            raise ExchangeError(f"{folder}: its rows contradict each other ({reason}); export it again") from error
    try:
        rebuild_views(store, progress=progress)
    except (OSError, StoreError) as error:
        reason = error.clause if isinstance(error, StoreError) else str(error)
        raise ExchangeError(
            f"{store.dataset}: the archive is imported, but not all files below labels/ could be written ({reason}); "
            "'segqc db restore-views' writes the others"
        ) from error
    return {table.name: archive.tables[table.name].rows for table in _TABLES}


@contextlib.contextmanager
def _taken_back_on_error(files: LabelFiles) -> Iterator[None]:
    """Remove the label contents that were copied in a block which fails."""
    before = set(files.all_objects())
    try:
        yield
    except BaseException:
        for path in set(files.all_objects()) - before:
            path.unlink(missing_ok=True)
        raise


def _refuse_rows(store: Store) -> None:
    with store.read() as transaction:
        for table in _TABLES:
            if transaction.scalar(select(func.count()).select_from(table)):
                raise ExchangeError(
                    f"{store.database.shown}: the store holds rows already; import into an empty database, and a "
                    "dataset folder that no other command has opened yet"
                )


def _files(folder: Path) -> LabelFiles:
    return LabelFiles(folder, folder)


def _table_file(folder: Path, table: Table) -> Path:
    return folder / "tables" / f"{table.name}.jsonl"


def _contents(row: dict[str, Value]) -> set[tuple[str, str]]:
    """Address and suffix of the contents of a label version."""
    pairs = ((row["sha256"], row["suffix"]), (row["submitted_sha256"], row["submitted_suffix"]))
    return {(sha256, suffix) for sha256, suffix in pairs if isinstance(sha256, str) and isinstance(suffix, str)}


# -------------------------------------------------------------------------------------------------------------- rows


def _write_rows(transaction: Transaction, table: Table, path: Path) -> int:
    # by primary key: a label version comes after the one that it was made of
    query = select(table).order_by(*table.primary_key.columns).execution_options(yield_per=_BATCH_SIZE)
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in transaction.execute(query).mappings():
            line = {name: _encoded(value) for name, value in row.items()}
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
            count += 1
    return count


def _insert_rows(transaction: Transaction, table: Table, path: Path) -> None:
    batch: list[dict[str, Value]] = []
    for row in _rows(table, path):
        batch.append(row)
        if len(batch) == _BATCH_SIZE:
            transaction.execute(insert(table), batch)
            batch = []
    if batch:
        transaction.execute(insert(table), batch)


def _rows(table: Table, path: Path) -> Iterator[dict[str, Value]]:
    """The rows of a table's file.

    Raises:
        ExchangeError: if a line is none of them.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            try:
                yield _row(table, line)
            except (ValueError, RecursionError) as error:
                reason = "is nested too deep" if isinstance(error, RecursionError) else error
                raise ExchangeError(f"{path}: line {number}: {reason}; export the archive again") from error


def _row(table: Table, line: bytes) -> dict[str, Value]:
    """A line of a table's file as a row.

    Raises:
        ValueError: if it is none.
    """
    if len(line) > _LONGEST_LINE:
        raise ValueError(f"is longer than {_LONGEST_LINE} bytes")
    try:
        found = json.loads(line.decode("utf-8"), parse_constant=_no_number)
    except ValueError as error:
        raise ValueError("is no JSON") from error
    if not isinstance(found, dict) or found.keys() != set(table.columns.keys()):
        raise ValueError(f"does not hold the columns of {table.name}")
    row = {}
    for name, column in table.columns.items():
        try:
            row[name] = _decoded(column, found[name])
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error
    if table.name == Scan.__tablename__:
        _check_names(row, ("name", "file"))
    elif table.name == FeatureRow.__tablename__:
        if not is_packed(row["numbers"]):
            raise ValueError("numbers are no finite 16-bit floats")
    elif table.name == LabelVersion.__tablename__:
        _check_names(row, ("tag",))
        _check_names(
            {end: "x" + str(row[end] or "") for end in ("suffix", "submitted_suffix")}, ("suffix", "submitted_suffix")
        )
        for name in ("sha256", "submitted_sha256"):
            if row[name] is not None and not _SHA256.fullmatch(str(row[name])):
                raise ValueError(f"{name} is no SHA-256")
        if row["checked_slices"] != []:  # nobody has looked at one: of a rejected label
            _check_slices(row, "checked_slices")
    elif table.name == LeaseRow.__tablename__:
        _check_slices(row, "slices")
    return row


def _no_number(text: str) -> JsonValue:
    raise ValueError(f"{text} is no JSON")


def _check_names(row: Mapping[str, Value], columns: Sequence[str]) -> None:
    """Refuse what would name a file outside of its folder, or a hidden one."""
    for column in columns:
        name = str(row[column])
        if name != os.path.basename(name) or name.startswith(".") or not name or "\0" in name:
            raise ValueError(f"{column} {name!r} is no plain name of a file: it may lie outside of the dataset folder")


def _check_slices(row: Mapping[str, Value], column: str) -> None:
    """Refuse what is no set of slices, in ascending order."""
    slices = row[column]
    found = [n for n in slices if type(n) is int and n >= 0] if isinstance(slices, list) else []
    if slices is not None and (not found or found != slices or found != sorted(set(found))):
        raise ValueError(f"{column} is no list of slices in ascending order")


def _encoded(value: Value) -> JsonValue:
    if isinstance(value, dt.datetime):
        return value.isoformat()
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _decoded(column: Column[Any], value: JsonValue) -> Value:
    """The value of a column, of its type.

    Raises:
        ValueError: if it is of another one.
    """
    if value is None:
        if not column.nullable:
            raise ValueError("is missing")
        return None
    if isinstance(column.type, JSON):
        return value
    if isinstance(column.type, UtcDateTime):
        time = dt.datetime.fromisoformat(value) if isinstance(value, str) else None
        if time is None or time.tzinfo is None:
            raise ValueError("is no time with its zone")
        return time
    if isinstance(column.type, Packed):
        return _binary(value)
    if isinstance(column.type, LargeBinary):
        return _compressed(value)
    kind = column.type.python_type
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"is not of the type {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("is no finite number")
    if isinstance(value, int) and not -_LARGEST_INTEGER <= value < _LARGEST_INTEGER:
        raise ValueError("is too large")
    if isinstance(value, str):
        value.encode()
    return value


def _binary(value: JsonValue) -> bytes:
    if not isinstance(value, str):
        raise ValueError("is not base64")
    return base64.b64decode(value, validate=True)


def _compressed(value: JsonValue) -> bytes:
    content = _binary(value)
    expanding = zlib.decompressobj()
    try:
        expanding.decompress(content, _LARGEST_VALUE)
    except zlib.error as error:
        raise ValueError("is damaged") from error
    if not expanding.eof:
        raise ValueError(f"is truncated, or expands to more than {_LARGEST_VALUE} bytes")
    return content


def _continue_numbers(transaction: Transaction) -> None:
    """Let PostgreSQL number new rows after those that came with their numbers."""
    for table in _TABLES:
        if "id" in table.columns:
            last = transaction.scalar(select(func.max(table.columns["id"])))
            if last is not None:
                sequence = {"table": table.name, "last": last}
                transaction.execute(text("SELECT setval(pg_get_serial_sequence(:table, 'id'), :last)"), sequence)
