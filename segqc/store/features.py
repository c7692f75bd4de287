"""Features of scans: short vectors that tell how far scans are from each other.

Those of kind "appearance" are made when a scan's file is taken in, and need no network. Those of kind "segmenter" are
by the segmentation network of the version that they carry; the newest ones of a scan replace those before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
from sqlalchemy import (
    ColumnElement,
    Integer,
    Select,
    String,
    and_,
    bindparam,
    exists,
    insert,
    literal_column,
    select,
    union_all,
)

from segqc.store.database import Transaction
from segqc.store.records import FeatureKind
from segqc.store.schema import LABELLED_STATES, FeatureRow, LeaseRow, Patient, Scan
from segqc.types import FloatArray

_LARGEST: Final = float(np.finfo(np.float16).max)
_STORED: Final = np.dtype("<f2")
# written out and not bound: SQLite uses a partial index only where it can read its condition in the query
_OPEN: Final[ColumnElement[str]] = literal_column("'open'", String)

HAS_FEATURES: Final[ColumnElement[bool]] = and_(
    FeatureRow.scan_id == Scan.id, FeatureRow.kind == bindparam("kind"), FeatureRow.version == bindparam("version")
)
"""Joins scans with their features of the parameters "kind" and "version"."""
SUGGESTED: Final = bindparam("suggested", value=(), type_=Integer, expanding=True)
"""The parameter of scans that count as handed out though they are not: see `segqc.selection.preview`."""


def write(transaction: Transaction, scan_id: int, kind: FeatureKind, version: str, values: npt.ArrayLike) -> None:
    """Keep the features of a scan, in the place of those of this kind before.

    Args:
        transaction: one that writes.
        scan_id: the scan's number.
        kind: the kind of features.
        version: of what made them.
        values: (features,).
    """
    transaction.merge(FeatureRow(scan_id=scan_id, kind=kind, version=version, numbers=_packed(values)))


def add(transaction: Transaction, kind: FeatureKind, version: str, found: Mapping[int, npt.ArrayLike]) -> None:
    """Keep the features of scans, by their numbers, that have none of this kind yet."""
    if found:
        rows = [{"scan_id": i, "numbers": _packed(values)} for i, values in found.items()]
        transaction.execute(insert(FeatureRow).values(kind=kind, version=version), rows)


def versions(transaction: Transaction, kind: FeatureKind) -> dict[str, str]:
    """The version of the features of each scan that has some."""
    query = select(Scan.name, FeatureRow.version).join(FeatureRow, FeatureRow.scan_id == Scan.id)
    return {name: version for name, version in transaction.execute(query.where(FeatureRow.kind == kind))}


def covered() -> Select[bytes]:
    """A query for the features of scans that are labelled or handed out, of the parameters of `HAS_FEATURES`.

    Scans of validating patients do not count: no segmentation network learns from them.
    """
    trains = exists().where(Patient.id == Scan.patient_id, Patient.split == "train")
    of_scan = select(FeatureRow.numbers).join(Scan, HAS_FEATURES)
    labelled = of_scan.where(Scan.state.in_(LABELLED_STATES), Scan.missing_since.is_(None), trains)
    open_leases = select(LeaseRow.scan_id).where(LeaseRow.state == _OPEN)
    handed_out = of_scan.where(FeatureRow.scan_id.in_(open_leases), trains)
    suggested = of_scan.where(FeatureRow.scan_id.in_(SUGGESTED))
    every = union_all(labelled, handed_out, suggested).subquery()
    return select(every.c.numbers)


def unpacked(rows: Iterable[bytes]) -> FloatArray:
    """Features as they are stored, of one version, as (scans, features)."""
    vectors = list(rows)
    flat = np.frombuffer(b"".join(vectors), _STORED)
    return flat.reshape(len(vectors), -1).astype(np.float32) if vectors else np.zeros((0, 0), np.float32)


def is_packed(numbers: object) -> bool:
    """Whether these are features as they are stored."""
    if not isinstance(numbers, bytes) or not numbers or len(numbers) % _STORED.itemsize:
        return False
    return bool(np.isfinite(np.frombuffer(numbers, _STORED)).all())


def _packed(values: npt.ArrayLike) -> bytes:
    return np.clip(np.asarray(values, np.float64), -_LARGEST, _LARGEST).astype(_STORED).tobytes()
