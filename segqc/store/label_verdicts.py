"""What bundles say of final labels, worst first, and which labels somebody has looked at and found right."""

from __future__ import annotations

import datetime as dt
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, TypeAlias, get_args

from sqlalchemy import ColumnElement, Row, Select, and_, delete, func, select
from sqlalchemy.orm import aliased

from segqc.quality.likely_errors import LikelyError, likely_errors, sentence
from segqc.store import events, labels, pacs, scans
from segqc.store.assessments import SERVING_BUNDLE
from segqc.store.database import StoreError, Transaction
from segqc.store.labels import FINAL_OF_SCAN
from segqc.store.records import Actor, JsonObject, LabelRecord, ScanState
from segqc.store.schema import (
    LABELLED_STATES,
    ActorRow,
    LabelMark,
    LabelVerdictRow,
    LabelVersion,
    Patient,
    Scan,
    SeriesRow,
)
from segqc.types import Assessment, StructureQuality

AuditView: TypeAlias = Literal["open", "right", "not judged", "all"]
AUDIT_VIEWS: Final[tuple[AuditView, ...]] = get_args(AuditView)
NOT_JUDGED: Final = "Not judged yet."


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelVerdict:
    """What networks that have not seen a label's patient say of it.

    Attributes:
        assessment: of the label.
        networks: how many networks have judged.
    """

    assessment: Assessment
    networks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RightMark:
    """Who has found a label right, and when."""

    actor: Actor
    made_at: dt.datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedLabel:
    """A final label that trains, and what is said of it.

    Attributes:
        scan, patient: whose it is.
        title: what people call the scan, see `pacs.title`.
        state: of the scan.
        label: the current final version.
        verdict: by the bundle that serves; None where it says nothing.
        problem: why it could not be judged; None where it was, or was not tried yet.
        mark: that it is right; None where nobody has said so.
    """

    scan: str
    title: str
    patient: str
    state: ScanState
    label: LabelRecord
    verdict: LabelVerdict | None
    problem: str | None
    mark: RightMark | None

    @property
    def worst(self) -> StructureQuality | None:
        """The structure with the lowest estimated Dice, of those that are there."""
        parts = self.verdict.assessment.structures if self.verdict is not None else ()
        known = [(q.estimated.dice, i) for i, q in enumerate(parts) if q.present and q.estimated.dice is not None]
        return parts[min(known)[1]] if known else None

    @property
    def errors(self) -> tuple[LikelyError, ...]:
        """What seems wrong in the slices that a person has looked at, the largest likely error first."""
        return () if self.verdict is None else likely_errors(self.verdict.assessment, self.label.checked_slices)

    @property
    def slices(self) -> tuple[int, ...]:
        """The slices with likely errors among them, the worst first."""
        marked = {index for error in self.errors for index in error.slices}
        return tuple(index for index in self._ordered if index in marked)

    @property
    def worst_slice(self) -> int | None:
        """The slice to look at first; None of a label that was not judged."""
        checked = self.label.checked_slices
        ordered = [index for index in self._ordered if checked is None or index in checked]
        return next(iter(self.slices or ordered), None)

    @property
    def _ordered(self) -> tuple[int, ...]:
        """All slices, the largest error sum first."""
        assessment = self.verdict.assessment if self.verdict is not None else None
        return () if assessment is None else assessment.worst_slices(assessment.shape[assessment.through_plane_axis])

    @property
    def message(self) -> str:
        """What seems wrong, or why nobody knows, in a sentence."""
        return (self.problem or NOT_JUDGED) if self.verdict is None else sentence(self.errors)


@dataclass(frozen=True, slots=True)
class AuditCounts:
    """How many labels each view lists."""

    by_view: Mapping[AuditView, int] = field(default_factory=dict)

    def __getitem__(self, view: AuditView) -> int:
        """The number of one view."""
        return self.by_view.get(view, 0)


def write(transaction: Transaction, label_version: int, bundle: int, verdict: LabelVerdict) -> None:
    """Keep what a bundle says of a final label; what was said of the scan before goes.

    Raises:
        StoreError: if there is no such version, or it is another scan's.
    """
    assessment = verdict.assessment
    label = labels.get(transaction, label_version)
    if label.scan != assessment.scan:
        raise StoreError(f"the label version {label_version} is of the scan {label.scan!r}, not {assessment.scan!r}")
    _replace(
        transaction,
        label,
        bundle,
        dice=assessment.dice,
        error_volume_ml=assessment.error_volume_ml,
        has_errors=bool(likely_errors(assessment, label.checked_slices)),
        networks=verdict.networks,
        detail=zlib.compress(assessment.to_json().encode()),
    )


def write_problem(transaction: Transaction, label_version: int, bundle: int, problem: str) -> None:
    """Keep why a bundle cannot judge a final label.

    Raises:
        StoreError: if there is no such version.
    """
    _replace(transaction, labels.get(transaction, label_version), bundle, networks=0, problem=problem)


def _replace(transaction: Transaction, label: LabelRecord, bundle: int, **values: object) -> None:
    scan_id = scans.number_of(transaction, label.scan)
    transaction.execute(delete(LabelVerdictRow).where(LabelVerdictRow.scan_id == scan_id))
    own = {"scan_id": scan_id, "label_version_id": label.id, "bundle_id": bundle, "made_at": transaction.now}
    transaction.insert(LabelVerdictRow, **own, **values)


def judged(transaction: Transaction, bundle: int) -> set[int]:
    """The label versions that a bundle has judged, by their numbers."""
    query = select(LabelVerdictRow.label_version_id)
    return set(
        transaction.scalars(query.where(LabelVerdictRow.bundle_id == bundle, LabelVerdictRow.detail.is_not(None)))
    )


def listing(
    transaction: Transaction, view: AuditView = "all", *, start: int = 0, limit: int | None = None
) -> list[AuditedLabel]:
    """The final labels that train: those with likely errors first, then the others, then those not judged.

    Of both the one that the serving bundle estimates worst comes first, by the Dice of the worst structure: it means
    the same in large and small structures. Where it is equal, the larger error volume comes first.

    Args:
        transaction: what to read in.
        view: "open" for those that were judged and not marked, "right" for those that were marked, "not judged".
        start: how many are left out at the beginning.
        limit: how many are listed at most; None for all.
    """
    found = LabelVerdictRow
    order = found.dice.is_(None), found.has_errors.desc(), found.dice, found.error_volume_ml.desc(), Scan.sort_key
    query = _rows().where(*_condition(view)).order_by(*order).offset(start)
    rows = transaction.execute(query if limit is None else query.limit(limit)).all()
    records = labels.get_all(transaction, [row.version for row in rows])
    return [_audited(row, records[row.version]) for row in rows]


def of_scan(transaction: Transaction, scan: str) -> AuditedLabel | None:
    """The final label of a scan, if it has one that trains.

    Raises:
        UnknownScan: if there is no such scan.
    """
    number = scans.number_of(transaction, scan)
    row = transaction.execute(_rows().where(*_condition("all"), Scan.id == number)).first()
    return None if row is None else _audited(row, labels.get(transaction, row.version))


def counts(transaction: Transaction) -> AuditCounts:
    """How many labels each view lists."""
    return AuditCounts(
        {
            view: transaction.scalar(select(func.count()).select_from(_rows().where(*_condition(view)).subquery())) or 0
            for view in AUDIT_VIEWS
        }
    )


def mark_right(transaction: Transaction, scan: str, actor: Actor, *, version: int | None = None) -> AuditedLabel:
    """Note that somebody has found a scan's final label right; a second mark leaves the first as it is.

    Args:
        transaction: one that writes.
        scan: the scan's name.
        actor: who has looked at it.
        version: the label version that was looked at; None for the current one.

    Raises:
        UnknownScan: if there is no such scan.
        StoreError: if it has no final label that trains, or another one by now.
    """
    found = _expect(transaction, scan, version)
    if found.mark is not None:
        return found
    made = {"actor_id": events.actor_id(transaction, actor), "made_at": transaction.now}
    transaction.insert(LabelMark, label_version_id=found.label.id, **made)
    events.record(transaction, actor, "label found right", "scan", _number(transaction, found), _of(found))
    return replace(found, mark=RightMark(actor=actor, made_at=transaction.now))


def remove_mark(transaction: Transaction, scan: str, actor: Actor, *, version: int | None = None) -> AuditedLabel:
    """Take back that a scan's final label was found right; arguments and errors as of `mark_right`."""
    found = _expect(transaction, scan, version)
    if found.mark is None:
        return found
    transaction.execute(delete(LabelMark).where(LabelMark.label_version_id == found.label.id))
    events.record(transaction, actor, "mark removed", "scan", _number(transaction, found), _of(found))
    return replace(found, mark=None)


def _number(transaction: Transaction, found: AuditedLabel) -> int:
    return scans.number_of(transaction, found.scan)


def _of(found: AuditedLabel) -> JsonObject:
    return {"version": found.label.id}


def _expect(transaction: Transaction, scan: str, version: int | None) -> AuditedLabel:
    found = of_scan(transaction, scan)
    if found is None:
        raise StoreError(f"the scan {scan!r} has no final label that trains, so that there is none to mark")
    if version is not None and found.label.id != version:
        raise StoreError(
            f"the final label of {scan!r} is version {found.label.id} by now, not {version}; look at it before it is "
            "marked"
        )
    return found


_final = aliased(LabelVersion)
_marker = aliased(ActorRow)


def _rows() -> Select[*tuple[Any, ...]]:
    """The final labels that train, with their verdict and mark."""
    found = LabelVerdictRow
    of_label = and_(
        found.scan_id == Scan.id,
        found.label_version_id == _final.id,
        found.bundle_id == SERVING_BUNDLE.scalar_subquery(),
    )
    return (
        select(
            Scan.name, Scan.state, Patient.name.label("patient"), _final.id.label("version"),
            SeriesRow.series_uid, SeriesRow.description, found.networks, found.detail, found.problem,
            LabelMark.made_at.label("marked_at"), _marker.kind, _marker.name.label("marker"), _marker.identified_by,
        )
        .join(Patient, Patient.id == Scan.patient_id)
        .join(_final, _final.id == FINAL_OF_SCAN)
        .outerjoin(SeriesRow, SeriesRow.file == Scan.file)
        .outerjoin(found, of_label)
        .outerjoin(LabelMark, LabelMark.label_version_id == _final.id)
        .outerjoin(_marker, _marker.id == LabelMark.actor_id)
        .where(Scan.state.in_(LABELLED_STATES), Scan.missing_since.is_(None), Scan.former_name.is_(None))
    )  # fmt: skip


def _condition(view: AuditView) -> Sequence[ColumnElement[bool]]:
    is_judged, is_marked = LabelVerdictRow.detail.is_not(None), LabelMark.label_version_id.is_not(None)
    match view:
        case "open":
            return (is_judged, ~is_marked)
        case "right":
            return (is_marked,)
        case "not judged":
            return (~is_judged,)
        case "all":
            return ()


def _audited(row: Row[*tuple[Any, ...]], label: LabelRecord) -> AuditedLabel:
    verdict = None
    if row.detail is not None:
        verdict = LabelVerdict(assessment=Assessment.from_json(zlib.decompress(row.detail)), networks=row.networks)
    mark = None
    if row.marked_at is not None:
        marker = Actor(kind=row.kind, name=row.marker, identified_by=row.identified_by)
        mark = RightMark(actor=marker, made_at=row.marked_at)
    return AuditedLabel(
        scan=row.name,
        title=pacs.title(row.name, row.patient, row.series_uid, row.description),
        patient=row.patient,
        state=row.state,
        label=label,
        verdict=verdict,
        problem=row.problem,
        mark=mark,
    )
