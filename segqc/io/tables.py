"""What the store knows as flat tables, CSV or Parquet: one row can be read without knowing the others.

Times are UTC. Unknown values are empty in CSV and null in Parquet. Lists and objects are JSON. CSV is UTF-8 without a
byte order mark, and text that a spreadsheet would run as a formula has an apostrophe in front.
"""

from __future__ import annotations

import contextlib
import csv
import datetime as dt
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from sqlalchemy import JSON, Boolean, Float, Integer, Label, Numeric, Select, and_, case, func, select
from sqlalchemy.types import TypeEngine

from segqc.io.case_list import ExchangeError
from segqc.store.database import Transaction
from segqc.store.schema import (
    ActorRow,
    AssessmentRow,
    AssessmentStructure,
    Bundle,
    Correction,
    CorrectionStructure,
    Event,
    LabelInfo,
    LabelVersion,
    LeaseRow,
    Patient,
    ProposalUse,
    PseudoLabelRow,
    Scan,
    StructureName,
    UtcDateTime,
)
from segqc.store.store import Store
from segqc.text import spreadsheet_cell
from segqc.types import UNLIKE_LEVEL
from segqc.volumes import atomic_write

Form: TypeAlias = Literal["csv", "parquet"]
NetworkName: TypeAlias = Literal["text", "whole number", "number", "flag", "time", "json"]
Value: TypeAlias = str | int | float | bool | dt.datetime | None
Query: TypeAlias = Select[*tuple[Any, ...]]
Rows: TypeAlias = Iterator[list[tuple[Value, ...]]]
_BATCH_SIZE: Final = 2000


def write_tables(store: Store, folder: Path, form: Form) -> dict[str, int]:
    """Write every table to a file of the folder, all of one state of the store; files that are there are replaced.

    Returns:
        The number of rows by table.

    Raises:
        ExchangeError: for Parquet, if pyarrow is not installed or cannot be used.
    """
    write = _writer(form)
    counts = {}
    with store.read() as transaction:
        for name, query in _tables().items():
            kinds = {column.name: _kind(column.type) for column in query.selected_columns}
            with atomic_write(folder / f"{name}.{form}") as temporary:
                counts[name] = write(temporary, kinds, _rows(transaction, query, kinds))
    return counts


def _rows(transaction: Transaction, query: Query, kinds: Mapping[str, NetworkName]) -> Rows:
    convert = [_as_json if kind == "json" else None for kind in kinds.values()]
    for part in transaction.execute(query.execution_options(yield_per=_BATCH_SIZE)).partitions():
        yield [tuple(c(v) if c else v for c, v in zip(convert, row, strict=True)) for row in part]


def _as_json(value: object) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _kind(column_type: TypeEngine[object]) -> NetworkName:
    kinds: list[tuple[tuple[type, ...], NetworkName]] = [
        ((Boolean,), "flag"),
        ((Integer,), "whole number"),
        ((Float, Numeric), "number"),
        ((UtcDateTime,), "time"),
        ((JSON,), "json"),
    ]
    return next((kind for types, kind in kinds if isinstance(column_type, types)), "text")


# ------------------------------------------------------------------------------------------------------------- forms


def _writer(form: Form) -> Callable[[Path, Mapping[str, NetworkName], Rows], int]:
    if form == "csv":
        return _write_csv
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ExchangeError(
            f"Parquet needs the package pyarrow, which cannot be imported ({error}); pip install 'segqc[server]', "
            "or choose csv"
        ) from error
    return _write_parquet


def _write_csv(path: Path, kinds: Mapping[str, NetworkName], rows: Rows) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(kinds)
        for part in rows:
            writer.writerows([_cell(value) for value in row] for row in part)
            count += len(part)
    return count


def _cell(value: Value) -> str | int | float | None:
    if isinstance(value, bool):
        return str(value).lower()
    return value.isoformat() if isinstance(value, dt.datetime) else spreadsheet_cell(value)


def _write_parquet(path: Path, kinds: Mapping[str, NetworkName], rows: Rows) -> int:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    types = {
        "text": pa.string(),
        "json": pa.string(),
        "whole number": pa.int64(),
        "number": pa.float64(),
        "flag": pa.bool_(),
        "time": pa.timestamp("us", tz="UTC"),
    }
    schema = pa.schema([(name, types[kind]) for name, kind in kinds.items()])
    count = 0
    with contextlib.closing(ParquetWriter(path, schema)) as writer:
        for part in rows:
            columns = [
                pa.array(column, field.type) for column, field in zip(zip(*part, strict=True), schema, strict=True)
            ]
            writer.write_table(pa.table(columns, schema=schema))
            count += len(part)
    return count


# ------------------------------------------------------------------------------------------------------------ tables


def _tables() -> dict[str, Query]:
    return {
        "assessments": _assessments(),
        "corrections": _corrections(),
        "leases": _leases(),
        "label_versions": _label_versions(),
        "pseudo_labels": _pseudo_labels(),
        "events": _events(),
    }


_SCAN: Final = (
    Scan.name.label("scan"),
    Patient.name.label("patient"),
    Patient.fold.label("fold"),
    Patient.split.label("split"),
)
_WHO: Final = (
    ActorRow.name.label("actor"),
    ActorRow.kind.label("actor_kind"),
    ActorRow.identified_by.label("identified_by"),
)
_PAIR: Final = (
    Bundle.id.label("bundle"),
    Bundle.segmenter_version.label("segmenter_version"),
    Bundle.assessor_version.label("assessor_version"),
)
_LEASE: Final = (
    LeaseRow.strategy.label("strategy"),
    LeaseRow.score.label("score"),
    LeaseRow.draw.label("draw"),
    LeaseRow.probability.label("probability"),
    LeaseRow.pool.label("pool"),
)

_IS_MARKED: Final = func.coalesce(AssessmentRow.unlikeness_p_value, 1.0) <= UNLIKE_LEVEL


def _estimated(prefix: str) -> tuple[Label[Any], ...]:
    part = AssessmentStructure
    metrics = (
        ("dice", part.dice, part.dice_low, part.dice_high),
        ("iou", part.iou, part.iou_low, part.iou_high),
        ("arvd", part.arvd, part.arvd_low, part.arvd_high),
        ("rvd", part.rvd, part.rvd_low, part.rvd_high),
    )
    return (
        *(column.label(f"{prefix}_{name}") for name, column, _, _ in metrics),
        *(
            end.label(f"{prefix}_{name}_{which}")
            for name, _, low, high in metrics
            for which, end in (("low", low), ("high", high))
        ),
        part.interval_level.label("interval_level"),
        case((part.interval_level.is_not(None), ~_IS_MARKED)).label("interval_applies"),
    )


def _assessments() -> Query:
    """A row for each assessment and structure."""
    return (
        select(
            AssessmentRow.id.label("assessment"),
            *_SCAN,
            LabelVersion.id.label("label_version"),
            LabelVersion.tag.label("tag"),
            LabelVersion.source.label("source"),
            LabelVersion.sha256.label("label_sha256"),
            *_PAIR,
            AssessmentRow.made_at.label("made_at"),
            AssessmentRow.mask_kind.label("mask_kind"),
            AssessmentRow.unlikeness.label("unlikeness"),
            AssessmentRow.unlikeness_p_value.label("unlikeness_p_value"),
            AssessmentRow.dice.label("scan_estimated_dice"),
            StructureName.name.label("structure"),
            AssessmentStructure.present.label("present"),
            AssessmentStructure.mask_volume_ml.label("mask_volume_ml"),
            *_estimated("estimated"),
        )
        .select_from(AssessmentRow)
        .join(AssessmentStructure, AssessmentStructure.assessment_id == AssessmentRow.id)
        .join(StructureName, StructureName.id == AssessmentStructure.structure_id)
        .join(Scan, Scan.id == AssessmentRow.scan_id)
        .join(Patient, Patient.id == Scan.patient_id)
        .join(LabelVersion, LabelVersion.id == AssessmentRow.label_version_id)
        .join(Bundle, Bundle.id == AssessmentRow.bundle_id)
        .order_by(AssessmentRow.id, AssessmentStructure.position)
    )


def _corrections() -> Query:
    """A row for each correction and structure: what was estimated at hand-out beside what turned out to be true."""
    true, shown = CorrectionStructure, AssessmentStructure
    return (
        select(
            Correction.id.label("correction"),
            *_SCAN,
            Correction.from_version_id.label("from_version"),
            Correction.to_version_id.label("to_version"),
            *_WHO,
            Correction.made_at.label("made_at"),
            Correction.seconds.label("seconds"),
            Correction.simulated.label("simulated"),
            LeaseRow.id.label("lease"),
            *_LEASE,
            Correction.opened_slices.label("opened_slices"),
            Correction.opened_structures.label("opened_structures"),
            Correction.through_plane_axis.label("through_plane_axis"),
            Correction.voxels_changed.label("voxels_changed"),
            Correction.slices_changed.label("slices_changed"),
            ProposalUse.boxes_offered.label("boxes_offered"),
            ProposalUse.boxes_taken.label("boxes_taken"),
            Correction.assessment_id.label("assessment"),
            *_PAIR,
            StructureName.name.label("structure"),
            true.voxels_changed.label("structure_voxels_changed"),
            *_estimated("estimated"),
            true.dice.label("true_dice"),
            true.iou.label("true_iou"),
            true.arvd.label("true_arvd"),
            true.rvd.label("true_rvd"),
        )
        .select_from(Correction)
        .join(Scan, Scan.id == Correction.scan_id)
        .join(Patient, Patient.id == Scan.patient_id)
        .join(ActorRow, ActorRow.id == Correction.actor_id)
        .outerjoin(ProposalUse, ProposalUse.label_version_id == Correction.to_version_id)
        .outerjoin(true, true.correction_id == Correction.id)
        .outerjoin(StructureName, StructureName.id == true.structure_id)
        .outerjoin(LeaseRow, LeaseRow.id == Correction.lease_id)
        .outerjoin(AssessmentRow, AssessmentRow.id == Correction.assessment_id)
        .outerjoin(Bundle, Bundle.id == AssessmentRow.bundle_id)
        .outerjoin(
            shown, and_(shown.assessment_id == Correction.assessment_id, shown.structure_id == true.structure_id)
        )
        .order_by(Correction.id, true.position)
    )


def _leases() -> Query:
    return (
        select(
            LeaseRow.id.label("lease"),
            *_SCAN,
            *_WHO,
            LeaseRow.slot.label("slot"),
            LeaseRow.state.label("state"),
            LeaseRow.handed_out_at.label("handed_out_at"),
            LeaseRow.expires_at.label("expires_at"),
            LeaseRow.closed_at.label("closed_at"),
            *_LEASE,
            LeaseRow.label_version_id.label("label_version"),
            LeaseRow.assessment_id.label("assessment"),
            LeaseRow.slices.label("slices"),
        )
        .select_from(LeaseRow)
        .join(Scan, Scan.id == LeaseRow.scan_id)
        .join(Patient, Patient.id == Scan.patient_id)
        .join(ActorRow, ActorRow.id == LeaseRow.actor_id)
        .order_by(LeaseRow.id)
    )


def _label_versions() -> Query:
    return (
        select(
            LabelVersion.id.label("label_version"),
            *_SCAN,
            LabelVersion.tag.label("tag"),
            LabelVersion.source.label("source"),
            LabelVersion.sha256.label("sha256"),
            LabelVersion.suffix.label("suffix"),
            LabelVersion.parent_id.label("parent"),
            *_PAIR,
            *_WHO,
            LabelVersion.made_at.label("made_at"),
            LabelVersion.checked_slices.label("checked_slices"),
            LabelInfo.info.label("info"),
        )
        .select_from(LabelVersion)
        .join(Scan, Scan.id == LabelVersion.scan_id)
        .join(Patient, Patient.id == Scan.patient_id)
        .join(ActorRow, ActorRow.id == LabelVersion.actor_id)
        .outerjoin(Bundle, Bundle.id == LabelVersion.bundle_id)
        .outerjoin(LabelInfo, LabelInfo.label_version_id == LabelVersion.id)
        .order_by(LabelVersion.id)
    )


def _pseudo_labels() -> Query:
    """A row for each mask that was accepted as a pseudo-label."""
    return (
        select(
            LabelVersion.id.label("label_version"),
            *_SCAN,
            LabelVersion.parent_id.label("mask"),
            *_PAIR,
            LabelVersion.made_at.label("made_at"),
            PseudoLabelRow.dice.label("estimated_dice"),
            PseudoLabelRow.low.label("estimated_dice_low"),
            PseudoLabelRow.level.label("interval_level"),
            PseudoLabelRow.rule.label("rule"),
            PseudoLabelRow.max_error.label("max_error"),
            PseudoLabelRow.is_audited.label("is_audited"),
            PseudoLabelRow.ended_at.label("ended_at"),
            PseudoLabelRow.ended_because.label("ended_because"),
        )
        .select_from(PseudoLabelRow)
        .join(LabelVersion, LabelVersion.id == PseudoLabelRow.label_version_id)
        .join(Scan, Scan.id == LabelVersion.scan_id)
        .join(Patient, Patient.id == Scan.patient_id)
        .outerjoin(Bundle, Bundle.id == LabelVersion.bundle_id)
        .order_by(LabelVersion.id)
    )


def _events() -> Query:
    return (
        select(
            Event.id.label("event"),
            Event.at.label("at"),
            *_WHO,
            Event.verb.label("verb"),
            Event.object_kind.label("object_kind"),
            Event.object_id.label("object_id"),
            Event.detail.label("detail"),
        )
        .select_from(Event)
        .join(ActorRow, ActorRow.id == Event.actor_id)
        .order_by(Event.id)
    )
