"""Databases that are damaged or no database at all: one sentence, whatever lies in their place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from segqc.store.database import StoreDamaged, StoreUnavailable
from segqc.store.store import Store


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
    [(_noise, StoreDamaged), (_truncated, StoreDamaged), (_overwritten, StoreDamaged), (_folder, StoreUnavailable)],
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
