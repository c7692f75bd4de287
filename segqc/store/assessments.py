"""Assessments: a row per label version and bundle, a row per structure, slices and boxes as one compressed value."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from pydantic import TypeAdapter
from sqlalchemy import ColumnElement, Row, Select, and_, bindparam, delete, exists, func, or_, select, update
from sqlalchemy.orm import aliased

from segqc.store import labels, scans
from segqc.store.database import StoreError, Transaction
from segqc.store.schema import (
    AssessmentRow,
    AssessmentStructure,
    Bundle,
    Correction,
    LabelVersion,
    LeaseRow,
    Scan,
    Score,
    StructureName,
)
from segqc.types import (
    UNLIKE_LEVEL,
    Assessment,
    ErrorView,
    MetricIntervals,
    Metrics,
    PredictionInterval,
    StructureQuality,
    Unlikeness,
    Witnesses,
)


@dataclass(frozen=True, slots=True)
class _Geometry:
    mask_sha256: str
    through_plane_axis: int
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class _Detail:
    raw: ErrorView
    extracted: ErrorView
    witnesses: Witnesses


_GEOMETRY: Final = TypeAdapter(_Geometry)
_DETAIL: Final = TypeAdapter(_Detail)
_BATCH_SIZE: Final = 10_000  # of SQLite's 32,766 values in one statement
_QUICK: Final = 1  # zlib's level: ten times faster than its default, and a fifth larger


SERVING_BUNDLE: Final = select(Bundle.id).where(Bundle.serving)
_COUNTS: Final = AssessmentRow.bundle_id == SERVING_BUNDLE.scalar_subquery()
SERVING_SEGMENTER: Final = select(Bundle.segmenter_version).where(Bundle.serving)
SCORE_COUNTS: Final = or_(
    Score.bundle_id == SERVING_BUNDLE.scalar_subquery(),
    and_(Score.bundle_id.is_(None), Score.version == SERVING_SEGMENTER.scalar_subquery()),
)
"""Whether a score is one of the serving bundle: those of others order no scans, as their assessments do not."""


def rank_anew(transaction: Transaction) -> None:
    """Rank scans by the serving bundle's estimates alone; a scan that it has not assessed has none."""
    transaction.flush()
    transaction.execute(
        update(Scan)
        .where(Scan.ranking_dice.is_not(None))
        .values(ranking_dice=None)
        .execution_options(synchronize_session=False)
    )
    last = _ranking(transaction)  # of a bundle that has served before
    if last:
        transaction.execute(update(Scan), [{"id": scan, "ranking_dice": dice} for scan, (_, dice) in last.items()])
    transaction.expire_all()  # what was read before is not what these rows hold now


def write(transaction: Transaction, assessment: Assessment, label_version: int, bundle: int) -> int:
    """Keep what a bundle says of a label version; an earlier word of the same bundle is replaced.

    If the version is what an annotator would start from, and the bundle serves, the scan is ranked by it. Older
    bundles' assessments of the scan are thinned: those that an annotator was shown stay whole, the others lose slices
    and boxes, but not metrics. Of people's masks all stay whole, and none thins another.

    Raises:
        StoreError: if there is no such version, or it is another scan's.
    """
    label = labels.get(transaction, label_version)
    if label.scan != assessment.scan:
        raise StoreError(f"the label version {label_version} is of the scan {label.scan!r}, not {assessment.scan!r}")
    scan_id = scans.number_of(transaction, assessment.scan)
    geometry = _Geometry(assessment.mask_sha256, assessment.through_plane_axis, assessment.shape, assessment.spacing_mm)
    row = transaction.scalar(
        select(AssessmentRow).where(AssessmentRow.label_version_id == label_version, AssessmentRow.bundle_id == bundle)
    )
    if row is None:
        row = AssessmentRow(scan_id=scan_id, label_version_id=label_version, bundle_id=bundle)
        transaction.add(row)
    else:
        transaction.execute(delete(AssessmentStructure).where(AssessmentStructure.assessment_id == row.id))
    row.dice, row.backend, row.made_at = assessment.dice, assessment.backend, transaction.now
    row.mask_kind = assessment.mask_kind
    unlike = assessment.unlikeness
    row.unlikeness, row.unlikeness_p_value = (None, None) if unlike is None else (unlike.score, unlike.p_value)
    row.geometry = _GEOMETRY.dump_python(geometry, mode="json")
    transaction.flush()
    number = row.id
    ids = structure_ids(transaction, [q.name for q in assessment.structures])
    transaction.add_all(_structure(number, ids[q.name], i, q) for i, q in enumerate(assessment.structures))
    if is_shown(transaction, assessment.scan, label_version, bundle):
        foreground = any(q.mask_volume_ml > 0 for q in assessment.structures)
        scans.rank(transaction, scan_id, assessment.dice, foreground)
    transaction.flush()
    if assessment.mask_kind != "person":
        _thin(transaction, scan_id, number)
    return number


def is_shown(transaction: Transaction, scan: str, label_version: int, bundle: int) -> bool:
    """Whether what a bundle says of a label version is what an annotator is shown: it serves, and they start there."""
    start = labels.start_of(transaction, scan)
    return start is not None and start.id == label_version and transaction.rows(SERVING_BUNDLE).scalar() == bundle


def _structure(assessment_id: int, structure_id: int, position: int, quality: StructureQuality) -> AssessmentStructure:
    estimated = quality.estimated
    return AssessmentStructure(
        assessment_id=assessment_id,
        structure_id=structure_id,
        position=position,
        present=quality.present,
        mask_volume_ml=quality.mask_volume_ml,
        dice=estimated.dice,
        iou=estimated.iou,
        arvd=estimated.arvd,
        rvd=estimated.rvd,
        detail=zlib.compress(_DETAIL.dump_json(_Detail(quality.raw, quality.extracted, quality.witnesses)), _QUICK),
        **_ends(quality.intervals),
    )


def _shown() -> ColumnElement[bool]:
    return or_(
        AssessmentRow.mask_kind == "person",
        exists().where(LeaseRow.assessment_id == AssessmentRow.id),
        exists().where(Correction.assessment_id == AssessmentRow.id),
    )


def _ends(intervals: MetricIntervals) -> dict[str, float]:
    """The columns of a structure's intervals; undefined ones stay NULL."""
    columns: dict[str, float] = {}
    for metric in fields(intervals):
        interval: PredictionInterval | None = getattr(intervals, metric.name)
        if interval is not None:
            columns["interval_level"] = interval.level
            columns[f"{metric.name}_low"], columns[f"{metric.name}_high"] = interval.low, interval.high
    return columns


def intervals_of(part: AssessmentStructure | Row[*tuple[Any, ...]], unlikeness: Unlikeness | None) -> MetricIntervals:
    """The prediction intervals in a structure's row, of a scan that is as unlike the training's."""
    level = part.interval_level
    return MetricIntervals(
        dice=_interval(part.dice_low, part.dice_high, level),
        iou=_interval(part.iou_low, part.iou_high, level),
        arvd=_interval(part.arvd_low, part.arvd_high, level),
        rvd=_interval(part.rvd_low, part.rvd_high, level),
    ).of_scan(unlikeness)


def _interval(low: float | None, high: float | None, level: float | None) -> PredictionInterval | None:
    if low is None or high is None or level is None:
        return None
    return PredictionInterval(low, high, level)


def unlikeness_of(score: float | None, p_value: float | None) -> Unlikeness | None:
    """What the columns of an assessment say of its scan."""
    return None if score is None else Unlikeness(score, p_value)


def structure_score(method: str, structure: str) -> str:
    """The name under which a method's score of one structure is kept."""
    return f"{method}: {structure}"


def structure_ids(transaction: Transaction, wanted: Sequence[str]) -> dict[str, int]:
    """Rows of structures by name, added where they are new."""
    known = {name: i for name, i in transaction.rows(_STRUCTURES)}
    for name in wanted:
        if name not in known:
            row = StructureName(name=name)
            transaction.add(row)
            transaction.flush()
            known[name] = row.id
    return known


def _thin(transaction: Transaction, scan_id: int, but: int) -> None:
    """Drop slices and boxes of a scan's older assessments that nobody was shown."""
    older = select(AssessmentRow.id).where(AssessmentRow.scan_id == scan_id, AssessmentRow.id < but, ~_shown())
    transaction.execute(
        update(AssessmentStructure)
        .where(AssessmentStructure.assessment_id.in_(older), AssessmentStructure.detail.is_not(None))
        .values(detail=None)
        .execution_options(synchronize_session=False)
    )


def read(transaction: Transaction, assessment_id: int) -> Assessment | None:
    """An assessment as it was written; None if it has been thinned since.

    Raises:
        StoreError: if there is none of this number.
    """
    head = transaction.rows(_HEAD, {"assessment": assessment_id}).first()
    if head is None:
        raise StoreError(f"there is no assessment {assessment_id}")
    return _assessment(head, transaction.rows(_PARTS, {"assessment": assessment_id}).all())


def _heads() -> Select[*tuple[Any, ...]]:
    """Assessments with the scan's name, the version of the network that made the mask, and SegQC-Net's."""
    source = aliased(Bundle)
    return (
        select(
            AssessmentRow.id, AssessmentRow.label_version_id, AssessmentRow.geometry,
            AssessmentRow.backend, AssessmentRow.mask_kind,
            AssessmentRow.unlikeness, AssessmentRow.unlikeness_p_value,
            Scan.name.label("scan"),
            source.segmenter_version, Bundle.assessor_version,
        )
        .join(Scan, AssessmentRow.scan_id == Scan.id)
        .join(Bundle, AssessmentRow.bundle_id == Bundle.id)
        .join(LabelVersion, AssessmentRow.label_version_id == LabelVersion.id)
        .outerjoin(source, LabelVersion.bundle_id == source.id)
    )  # fmt: skip


def _parts() -> Select[*tuple[Any, ...]]:
    """The columns of structures' rows, and the structures' names."""
    return (
        select(*AssessmentStructure.__table__.columns, StructureName.name)
        .join(StructureName, AssessmentStructure.structure_id == StructureName.id)
        .order_by(AssessmentStructure.position)
    )


def latest_number(label_version: ColumnElement[int | None]) -> Select[int]:
    """A query for the number of the serving bundle's last assessment of a label version."""
    return (
        select(AssessmentRow.id)
        .where(AssessmentRow.label_version_id == label_version, _COUNTS)
        .order_by(AssessmentRow.made_at.desc(), AssessmentRow.id.desc())
        .limit(1)
    )


# built once: building a query takes longer than running it
_HEAD: Final = _heads().where(AssessmentRow.id == bindparam("assessment"))
_LATEST_ID: Final = latest_number(bindparam("label_version"))
_STRUCTURES: Final = select(StructureName.name, StructureName.id)  # there are few
STRUCTURE_NAMES: Final = select(StructureName.name)
_PARTS: Final = _parts().where(AssessmentStructure.assessment_id == bindparam("assessment"))


def _assessment(head: Row[*tuple[Any, ...]], parts: Sequence[Row[*tuple[Any, ...]]]) -> Assessment | None:
    geometry = _GEOMETRY.validate_python(head.geometry)
    unlikeness = unlikeness_of(head.unlikeness, head.unlikeness_p_value)
    qualities = []
    for part in parts:
        if part.detail is None:
            return None
        detail = _DETAIL.validate_json(zlib.decompress(part.detail))
        estimated = Metrics(part.dice, part.iou, part.arvd, part.rvd)
        qualities.append(
            StructureQuality(
                part.name,
                part.present,
                part.mask_volume_ml,
                estimated,
                detail.raw,
                detail.extracted,
                intervals_of(part, unlikeness),
                detail.witnesses,
            )
        )
    return Assessment(
        scan=head.scan,
        mask_sha256=geometry.mask_sha256,
        segmenter_version=head.segmenter_version,
        assessor_version=head.assessor_version or "",
        through_plane_axis=geometry.through_plane_axis,
        shape=geometry.shape,
        spacing_mm=geometry.spacing_mm,
        structures=tuple(qualities),
        backend=head.backend,
        mask_kind=head.mask_kind,
        unlikeness=unlikeness,
    )


def latest(transaction: Transaction, scan: str) -> tuple[int, Assessment] | None:
    """The serving bundle's last assessment of the label that an annotator would start from, with its number."""
    start = labels.start_of(transaction, scan)
    return None if start is None else latest_of(transaction, start.id)


def latest_of_all(transaction: Transaction) -> dict[str, Assessment]:
    """The serving bundle's last assessment of the label that an annotator would start from, of all scans with one."""
    starts = labels.starts(transaction)
    candidates = AssessmentRow.label_version_id.in_(labels.current_versions((labels.RETURNED, labels.ORIGINAL)))
    rows = transaction.execute(_heads().where(candidates, _COUNTS).order_by(AssessmentRow.made_at, AssessmentRow.id))
    heads = {row.scan: row for row in rows if starts[row.scan] == row.label_version_id}
    parts: dict[int, list[Row[*tuple[Any, ...]]]] = {}
    found = transaction.execute(
        _parts().join(AssessmentRow, AssessmentStructure.assessment_id == AssessmentRow.id).where(candidates)
    )
    for part in found:
        parts.setdefault(part.assessment_id, []).append(part)
    made = {scan: _assessment(head, parts.get(head.id, [])) for scan, head in heads.items()}
    return {scan: assessment for scan, assessment in made.items() if assessment is not None}


def latest_of(transaction: Transaction, label_version: int) -> tuple[int, Assessment] | None:
    """The serving bundle's last assessment of a label version, with its number."""
    found = latest_id(transaction, label_version)
    assessment = read(transaction, found) if found is not None else None
    return None if found is None or assessment is None else (found, assessment)


def of_bundle(transaction: Transaction, label_version: int, bundle: int) -> Assessment | None:
    """What a bundle, serving or not, says of a label version; None where it says nothing, or it was thinned."""
    found = transaction.scalar(
        select(AssessmentRow.id).where(
            AssessmentRow.label_version_id == label_version, AssessmentRow.bundle_id == bundle
        )
    )
    return read(transaction, found) if found is not None else None


def of_people(transaction: Transaction, scan: str) -> dict[int, tuple[int, Assessment]]:
    """The last assessment of each label version of a scan that a network for people's masks has judged.

    Returns:
        The bundle's number and what it says, by the version's number.
    """
    wanted = Scan.name == scan, AssessmentRow.mask_kind == "person"
    query = _heads().add_columns(AssessmentRow.bundle_id).where(*wanted)
    found: dict[int, tuple[int, Assessment]] = {}
    for head in transaction.execute(query.order_by(AssessmentRow.made_at, AssessmentRow.id)):
        assessment = _assessment(head, transaction.rows(_PARTS, {"assessment": head.id}).all())
        if assessment is not None:
            found[head.label_version_id] = head.bundle_id, assessment
    return found


def latest_id(transaction: Transaction, label_version: int) -> int | None:
    """The number of the serving bundle's last assessment of a label version."""
    return transaction.rows(_LATEST_ID, {"label_version": label_version}).scalar()


def dice(transaction: Transaction, chosen: Sequence[int]) -> dict[int, float]:
    """The estimated Dice of each of these assessments: the worst present structure's."""
    query = select(AssessmentRow.id, AssessmentRow.dice)
    return {
        number: value
        for start in range(0, len(chosen), _BATCH_SIZE)
        for number, value in transaction.execute(query.where(AssessmentRow.id.in_(chosen[start : start + _BATCH_SIZE])))
    }


def dice_intervals(transaction: Transaction, chosen: Sequence[int]) -> dict[int, PredictionInterval | None]:
    """The interval of each of these assessments' Dice: the worst present structure's, as the Dice itself."""
    part = AssessmentStructure
    query = (
        select(
            AssessmentRow.id, AssessmentRow.unlikeness, AssessmentRow.unlikeness_p_value,
            part.dice_low, part.dice_high, part.interval_level,
        )
        .join(part, and_(part.assessment_id == AssessmentRow.id, part.present, part.dice.is_not(None)))
        .order_by(AssessmentRow.id, part.dice.desc(), part.position.desc())  # the last one counts
    )  # fmt: skip
    found: dict[int, PredictionInterval | None] = {}
    for start in range(0, len(chosen), _BATCH_SIZE):
        rows = transaction.execute(query.where(AssessmentRow.id.in_(chosen[start : start + _BATCH_SIZE])))
        for number, score, p_value, low, high, level in rows:
            of_dice = MetricIntervals(dice=_interval(low, high, level))
            found[number] = of_dice.of_scan(unlikeness_of(score, p_value)).dice
    return found


def ranking_intervals(transaction: Transaction) -> dict[str, PredictionInterval | None]:
    """The interval of the estimated Dice that each scan is ranked by."""
    ranking = _ranking(transaction)
    found = dice_intervals(transaction, [number for number, _ in ranking.values()])
    query = select(Scan.id, Scan.name).where(Scan.ranking_dice.is_not(None))
    return {name: found.get(ranking[scan][0]) for scan, name in transaction.execute(query) if scan in ranking}


def ranking_estimates(transaction: Transaction, most: int) -> list[tuple[float, PredictionInterval]]:
    """The estimated Dice that scans are ranked by, each with its interval; those without one are left out.

    Args:
        transaction: what to read in.
        most: about how many scans are looked at, evenly chosen, where there are more.
    """
    ranked = Scan.ranking_dice.is_not(None)
    count = transaction.scalar(select(func.count()).select_from(Scan).where(ranked)) or 0
    shown = latest_number(labels.START_OF_SCAN).correlate(Scan).scalar_subquery()
    query = select(shown, Scan.ranking_dice).where(ranked, Scan.id % max(1, -(-count // most)) == 0)
    ranking = {number: dice for number, dice in transaction.execute(query) if number is not None and dice is not None}
    found = dice_intervals(transaction, list(ranking))
    return [(ranking[number], interval) for number, interval in found.items() if interval is not None]


def marked(transaction: Transaction) -> set[str]:
    """The scans that the serving bundle marks as unlike the training's."""
    last = {number for number, _ in _ranking(transaction).values()}
    query = select(AssessmentRow.id, Scan.name).join(Scan, AssessmentRow.scan_id == Scan.id)
    rows = transaction.execute(query.where(_COUNTS, AssessmentRow.unlikeness_p_value <= UNLIKE_LEVEL))
    return {name for number, name in rows if number in last}


def _ranking(transaction: Transaction) -> dict[int, tuple[int, float]]:
    """The assessment that each scan is ranked by, and its Dice, by the scan's number.

    It is the last one that counts, of the version that an annotator starts from.
    """
    known = select(AssessmentRow.scan_id, AssessmentRow.label_version_id, AssessmentRow.id, AssessmentRow.dice)
    known = known.where(_COUNTS).order_by(AssessmentRow.made_at, AssessmentRow.id)
    rows = transaction.execute(known).all()
    starts = set(labels.starts(transaction).values()) if rows else set()
    return {scan: (number, dice) for scan, version, number, dice in rows if version in starts}


def write_score(
    transaction: Transaction, scan: str, method: str, value: float, version: str, *, bundle: int | None = None
) -> None:
    """Keep a score of a scan; the lowest is the worst.

    Args:
        transaction: one that writes.
        scan: the scan's name.
        method: what the score is called.
        value: the score.
        version: of the network that it speaks of.
        bundle: the one whose assessment of the scan's mask it comes with, and ends with; None for a baseline's, which
            counts while the segmentation network of this version serves.
    """
    scan_id = scans.number_of(transaction, scan)
    transaction.merge(
        Score(scan_id=scan_id, method=method, value=value, version=version, bundle_id=bundle, made_at=transaction.now)
    )


def scores(transaction: Transaction, method: str) -> Mapping[str, tuple[float, str]]:
    """The serving bundle's scores of all scans that have one, with the network's version that they speak of."""
    query = select(Scan.name, Score.value, Score.version).join(Scan, Score.scan_id == Scan.id)
    rows = transaction.execute(query.where(Score.method == method, SCORE_COUNTS))
    return {name: (value, version) for name, value, version in rows}


def has_score(transaction: Transaction, scan: str, method: str) -> bool:
    """Whether a scan has a score of the serving bundle."""
    scan_id = scans.number_of(transaction, scan)
    query = select(Score.scan_id).where(Score.scan_id == scan_id, Score.method == method, SCORE_COUNTS)
    return transaction.scalar(query) is not None
