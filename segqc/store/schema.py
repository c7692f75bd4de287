"""The tables. Rules that two processes could break are constraints here, not checks in the code.

Times are UTC. States and kinds are plain text with a CHECK, so that the database can be read without this code.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Final, get_args

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    MetaData,
    String,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from segqc.split import Split
from segqc.store.database import UnreadableCell
from segqc.store.records import (
    ActorKind,
    Draw,
    FeatureKind,
    FindingKind,
    Identification,
    JobState,
    JsonObject,
    LabelSource,
    LeaseState,
    Role,
    ScanState,
    SegmentationOrigin,
    SegmentationState,
    SignInKind,
)
from segqc.types import ComputeName, MaskKind

OPEN_STATES: Final = ("unlabelled", "rejected")
LABELLED_STATES: Final[tuple[ScanState, ...]] = ("submitted", "approved")

Json = JSON(none_as_null=True)


class _SqliteDateTime(sqlite.DATETIME):
    """A time as SQLite keeps it: as text, which may be damaged."""

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[str | None], dt.datetime | None]:
        """Read times, or tell of damage."""

        def read(value: str | None) -> dt.datetime | None:
            try:
                return None if value is None else dt.datetime.fromisoformat(value)
            except (ValueError, TypeError) as error:
                raise UnreadableCell("a time in it cannot be read") from error

        return read


class UtcDateTime(TypeDecorator[dt.datetime]):
    """An aware datetime in UTC; SQLite keeps it as text without a zone, and gives it back with one."""

    impl = DateTime(timezone=True).with_variant(_SqliteDateTime(), "sqlite")  # type: ignore[no-untyped-call]
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        """Refuse a time without a zone: nobody could tell what it means."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value}: wanted a time with its zone")
        value = value.astimezone(dt.UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        """Give the zone back."""
        return None if value is None else value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value


def _one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(v) for v in values)})"


class Base(DeclarativeBase):
    """What the tables share."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {dt.datetime: UtcDateTime(), str: String()}  # noqa: RUF012 - SQLAlchemy's own form


class ActorRow(Base):
    """Who does things, and how that was known."""

    __tablename__ = "actor"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[ActorKind] = mapped_column(String)
    name: Mapped[str]
    identified_by: Mapped[Identification] = mapped_column(String)
    added_at: Mapped[dt.datetime]
    __table_args__ = (
        UniqueConstraint("kind", "name", "identified_by"),
        CheckConstraint(_one_of("kind", get_args(ActorKind)), name="kind"),
        CheckConstraint(_one_of("identified_by", get_args(Identification)), name="identified_by"),
    )


class UserRow(Base):
    """Who may sign in, and as what.

    ``key`` is the name as it is compared, so that no two names differ by their case only. A user without a password is
    signed in elsewhere: by an OpenID provider, which knows them by ``provider_subject``, or by a proxy. A role that the
    provider gave counts only as long as it gives one.
    """

    __tablename__ = "user_account"  # "user" is a word of SQL
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    key: Mapped[str] = mapped_column(unique=True)
    role: Mapped[Role] = mapped_column(String)
    password_hash: Mapped[str | None]
    provider_subject: Mapped[str | None] = mapped_column(unique=True)
    is_role_provided: Mapped[bool]
    added_at: Mapped[dt.datetime]
    last_sign_in_at: Mapped[dt.datetime | None]
    __table_args__ = (
        CheckConstraint(_one_of("role", get_args(Role)), name="role"),
        CheckConstraint("password_hash IS NULL OR provider_subject IS NULL", name="one_place"),
        {"sqlite_autoincrement": True},  # events name users by number: none is given twice
    )


class SignInRow(Base):
    """A sign-in that was not ended: a browser's session, or a program's token; of its secret only the hash is kept."""

    __tablename__ = "sign_in"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("user_account.id", ondelete="CASCADE"), index=True)
    kind: Mapped[SignInKind] = mapped_column(String)
    sha256: Mapped[str] = mapped_column(unique=True)
    identified_by: Mapped[Identification] = mapped_column(String)
    made_at: Mapped[dt.datetime]
    expires_at: Mapped[dt.datetime] = mapped_column(index=True)
    __table_args__ = (
        CheckConstraint(_one_of("kind", get_args(SignInKind)), name="kind"),
        CheckConstraint(_one_of("identified_by", get_args(Identification)), name="identified_by"),
    )


class Patient(Base):
    """A patient with the fold and the role that all its scans have, given once."""

    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    fold: Mapped[int]
    split: Mapped[Split] = mapped_column(String)
    assigned_at: Mapped[dt.datetime]
    __table_args__ = (
        UniqueConstraint("id", "split"),  # what `scan.queue` refers to
        CheckConstraint(_one_of("split", get_args(Split)), name="split"),
        CheckConstraint("fold >= 0", name="fold"),
    )


class StructureName(Base):
    """A structure by name; what label values belong to it is in the settings."""

    __tablename__ = "structure"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class Scan(Base):
    """A scan of the folder.

    ``queue`` is the patient's role while the scan waits for a label and NULL otherwise, so that one index serves the
    choice of the next scan; its foreign key makes sure that it is this role. ``ranking_dice`` and ``foreground`` are
    those of the assessment of the mask that would be handed out, NULL where there is none. ``readings`` counts the
    annotators who have labelled it since it was opened at ``opened_at``, when ``newest_label`` was the newest label
    version: that tells what came later whatever became of the clock. ``sort_key`` orders names with their numbers as
    numbers.

    A row is one content, ``sha256`` (NULL until its file was read); ``signature`` tells quickly that the file still
    holds it. When another content takes its file's place, the row is retired: it gets another name, ``former_name`` is
    the one that it had, and it counts as missing until its content returns. ``remarks`` are the sentences of the intake
    about what was decided where the file contradicts itself.
    """

    __tablename__ = "scan"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    file: Mapped[str] = mapped_column(unique=True)
    sort_key: Mapped[str]
    patient_id: Mapped[int] = mapped_column(ForeignKey("patient.id"), index=True)
    state: Mapped[ScanState] = mapped_column(String)
    reason: Mapped[str | None]
    queue: Mapped[str | None]
    opened_at: Mapped[dt.datetime]
    newest_label: Mapped[int]
    readings: Mapped[int]
    ranking_dice: Mapped[float | None]
    foreground: Mapped[bool | None]
    info: Mapped[JsonObject] = mapped_column(Json)
    added_at: Mapped[dt.datetime]
    missing_since: Mapped[dt.datetime | None]
    sha256: Mapped[str | None] = mapped_column(index=True)
    signature: Mapped[str | None]
    former_name: Mapped[str | None] = mapped_column(index=True)
    remarks: Mapped[list[str] | None] = mapped_column(Json)
    __table_args__ = (
        ForeignKeyConstraint(["patient_id", "queue"], ["patient.id", "patient.split"], name="fk_scan_queue"),
        CheckConstraint(_one_of("state", get_args(ScanState)), name="state"),
        CheckConstraint(
            f"(queue IS NOT NULL) = ({_one_of('state', OPEN_STATES)} AND missing_since IS NULL)", name="queue"
        ),
        CheckConstraint("state NOT IN ('rejected', 'excluded') OR reason IS NOT NULL", name="reason"),
        Index("ix_scan_queue_ranking", "queue", "ranking_dice", "id"),
        Index("ix_scan_queue_name", "queue", "sort_key"),
        Index("ix_scan_queue_foreground", "queue", "foreground", "id"),
        Index("ix_scan_state", "state", "id"),
        {"sqlite_autoincrement": True},
    )


class Folder(Base):
    """The dataset folder that the database belongs to, in one row; a folder's own database needs none.

    ``id`` lies in a file of the folder, too; ``path`` is where the folder was when it was last opened.
    """

    __tablename__ = "folder"
    id: Mapped[str] = mapped_column(primary_key=True)
    path: Mapped[str]


class FindingRow(Base):
    """A file of the folder that was not taken in, and why.

    ``scan`` is the name of the scan that a label file would be of. ``signature`` and ``checks`` tell whether the file
    would be looked at in another way now: it changed, or the settings did.
    """

    __tablename__ = "finding"
    file: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[FindingKind] = mapped_column(String)
    scan: Mapped[str | None] = mapped_column(index=True)
    sentence: Mapped[str]
    signature: Mapped[str]
    checks: Mapped[str]
    found_at: Mapped[dt.datetime]
    __table_args__ = (CheckConstraint(_one_of("kind", get_args(FindingKind)), name="kind"),)


class Bundle(Base):
    """A segmentation network and the SegQC-Net that judges it, as published: an estimate belongs to the bundle.

    ``id`` is the number of its folder, ``segqc/models/<id>/``; ``manifest_sha256`` is the address of the manifest in
    it. At most one bundle serves. The row stays when the files are removed. ``ranked_by`` is the strategy whose order
    takes the place of the estimates' where that is known to be noise; ``held_because`` says why the bundle does not
    serve by itself. ``drift_*`` is the alarm that audit draws have raised against its estimates, NULL without one.
    ``newest_label`` is the newest label version when it was published, ``*_newest_label`` when the training of that
    network began, NULL where nobody knows.
    """

    __tablename__ = "bundle"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    segmenter_version: Mapped[str | None]
    assessor_version: Mapped[str | None]
    manifest_sha256: Mapped[str]
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("bundle.id"))
    reason: Mapped[str]
    actor_id: Mapped[int] = mapped_column(ForeignKey("actor.id"))
    published_at: Mapped[dt.datetime]
    newest_label: Mapped[int]
    serving: Mapped[bool]
    ranked_by: Mapped[str | None]
    held_because: Mapped[str | None]
    drift_since: Mapped[dt.datetime | None]
    drift_structures: Mapped[list[str] | None] = mapped_column(Json)
    drift_patients: Mapped[int | None]
    segmenter_newest_label: Mapped[int | None]
    assessor_newest_label: Mapped[int | None]
    __table_args__ = (
        Index("uq_bundle_serving", "serving", unique=True,
              sqlite_where=text("serving"), postgresql_where=text("serving")),
        CheckConstraint("segmenter_version IS NOT NULL OR assessor_version IS NOT NULL", name="networks"),
        CheckConstraint("parent_id < id", name="parent"),
        CheckConstraint("NOT serving OR held_because IS NULL", name="held"),
        CheckConstraint(
            "(drift_since IS NULL) = (drift_structures IS NULL) AND (drift_since IS NULL) = (drift_patients IS NULL)",
            name="drift",
        ),
    )  # fmt: skip


class LabelVersion(Base):
    """One version of a scan's label map under a tag; rows are never changed (a trigger sees to it).

    The current label under a tag is the last row; a removal is a row without content. ``sha256`` is the file's address.
    Where a person's file was read into another one (``.seg.nrrd``, ``.mha``, another voxel order), ``submitted_sha256``
    is the address of that file as it came, and ``submitted_suffix`` the end of its name. ``checked_slices`` are the
    slices across the through-plane axis that a person has looked at, in this version or in those that it was made of;
    NULL where that is all of them, and where no person made it.
    """

    __tablename__ = "label_version"
    id: Mapped[int] = mapped_column(primary_key=True)
    scan_id: Mapped[int] = mapped_column(ForeignKey("scan.id"))
    tag: Mapped[str]
    source: Mapped[LabelSource] = mapped_column(String)
    sha256: Mapped[str | None] = mapped_column(index=True)
    suffix: Mapped[str | None]
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("label_version.id"))
    bundle_id: Mapped[int | None] = mapped_column(ForeignKey("bundle.id"))
    actor_id: Mapped[int] = mapped_column(ForeignKey("actor.id"))
    made_at: Mapped[dt.datetime]
    submitted_sha256: Mapped[str | None] = mapped_column(index=True)
    submitted_suffix: Mapped[str | None]
    checked_slices: Mapped[list[int] | None] = mapped_column(Json)
    __table_args__ = (
        Index("ix_label_version_current", "scan_id", "tag", "id"),
        CheckConstraint(_one_of("source", get_args(LabelSource)), name="source"),
        CheckConstraint("(sha256 IS NULL) = (source = 'removal')", name="content"),
        CheckConstraint("(sha256 IS NULL) = (suffix IS NULL)", name="suffix"),
        CheckConstraint("source != 'network' OR bundle_id IS NOT NULL", name="bundle"),
        CheckConstraint(
            "checked_slices IS NULL OR source NOT IN ('network', 'pseudo-label', 'attention check', 'removal')",
            name="checked_slices",
        ),
        {"sqlite_autoincrement": True},
    )


class LabelView(Base):
    """The file ``labels/<tag>/<scan><suffix>`` as the store left it: what lies there otherwise is somebody's edit."""

    __tablename__ = "label_view"
    scan_id: Mapped[int] = mapped_column(ForeignKey("scan.id"), primary_key=True)
    tag: Mapped[str] = mapped_column(primary_key=True)
    label_version_id: Mapped[int] = mapped_column(ForeignKey("label_version.id"))
    file: Mapped[str] = mapped_column(unique=True)
    size: Mapped[int]
    modified_ns: Mapped[int] = mapped_column(BigInteger)


class SeriesRow(Base):
    """Of which series of a PACS a scan's file is made, by the file's name; a series may hold several volumes."""

    __tablename__ = "series"
    file: Mapped[str] = mapped_column(primary_key=True)
    study_uid: Mapped[str] = mapped_column(index=True)
    series_uid: Mapped[str] = mapped_column(index=True)
    description: Mapped[str]
    modality: Mapped[str]
    images: Mapped[int]


class SegmentationRow(Base):
    """A label version as a DICOM SEG in a PACS.

    ``origin`` says whether it was made of the version or the version of it. The row is there before the SEG is sent
    (``storing``), so that whoever is killed meanwhile leaves nothing there that nobody knows of. An ``empty`` version
    has no SEG. ``left`` is one that should be withdrawn and cannot be. ``next_try_at`` is when a step that failed is
    tried again.
    """

    __tablename__ = "segmentation"
    id: Mapped[int] = mapped_column(primary_key=True)
    label_version_id: Mapped[int] = mapped_column(ForeignKey("label_version.id"), unique=True)
    origin: Mapped[SegmentationOrigin] = mapped_column(String)
    state: Mapped[SegmentationState] = mapped_column(String)
    study_uid: Mapped[str]
    series_uid: Mapped[str] = mapped_column(index=True)
    attempts: Mapped[int]
    next_try_at: Mapped[dt.datetime | None]
    problem: Mapped[str | None]
    changed_at: Mapped[dt.datetime]
    __table_args__ = (
        CheckConstraint(_one_of("origin", get_args(SegmentationOrigin)), name="origin"),
        CheckConstraint(_one_of("state", get_args(SegmentationState)), name="state"),
        CheckConstraint("origin = 'own' OR state = 'stored'", name="found"),
        CheckConstraint("attempts >= 0", name="attempts"),
    )


class LabelInfo(Base):
    """What clients noted of a label version (MONAI Label's label info); the one thing about it that may change."""

    __tablename__ = "label_info"
    label_version_id: Mapped[int] = mapped_column(ForeignKey("label_version.id"), primary_key=True)
    info: Mapped[JsonObject] = mapped_column(Json)


class ProposalUse(Base):
    """What a person took of a proposal for a label: so many of the boxes that were offered."""

    __tablename__ = "proposal_use"
    label_version_id: Mapped[int] = mapped_column(ForeignKey("label_version.id"), primary_key=True)
    proposal_id: Mapped[int] = mapped_column(ForeignKey("label_version.id"), index=True)
    boxes_offered: Mapped[int]
    boxes_taken: Mapped[int]
    __table_args__ = (
        CheckConstraint("boxes_taken >= 0 AND boxes_taken <= boxes_offered", name="boxes"),
        CheckConstraint("label_version_id != proposal_id", name="edge"),
    )


class PseudoLabelRow(Base):
    """A label version that was accepted as a pseudo-label: the estimate and the rule that it was accepted by.

    ``low`` is the least lower end of the structures' intervals at ``level``. ``ignored_version_id`` is the label map of
    the voxels that are left out of the loss, as their error probability is above ``max_error``. It trains until
    ``ended_at``.
    """

    __tablename__ = "pseudo_label"
    label_version_id: Mapped[int] = mapped_column(ForeignKey("label_version.id"), primary_key=True)
    ignored_version_id: Mapped[int] = mapped_column(ForeignKey("label_version.id"))
    dice: Mapped[float]
    low: Mapped[float]
    level: Mapped[float]
    rule: Mapped[str]
    max_error: Mapped[float]
    is_audited: Mapped[bool]
    ended_at: Mapped[dt.datetime | None]
    ended_because: Mapped[str | None]
    __table_args__ = (
        Index("ix_pseudo_label_open", "label_version_id",
              sqlite_where=text("ended_at IS NULL"), postgresql_where=text("ended_at IS NULL")),
        CheckConstraint("(ended_at IS NULL) = (ended_because IS NULL)", name="ended"),
    )  # fmt: skip


class LabelVerdictRow(Base):
    """What the networks of a bundle that have not seen the patient say of a final label version.

    A scan has one: a later one takes its place, whatever version and bundle it is of. It is no `AssessmentRow`: those
    order the scans that wait. ``detail`` is the assessment; where the label could not be judged, ``problem`` says why.
    ``networks`` counts those that have judged; ``has_errors`` says whether they have found anything.
    """

    __tablename__ = "label_verdict"
    scan_id: Mapped[int] = mapped_column(ForeignKey("scan.id"), primary_key=True)
    label_version_id: Mapped[int] = mapped_column(ForeignKey("label_version.id"))
    bundle_id: Mapped[int] = mapped_column(ForeignKey("bundle.id"))
    dice: Mapped[float | None]
    error_volume_ml: Mapped[float | None]
    has_errors: Mapped[bool | None]
    networks: Mapped[int]
    detail: Mapped[bytes | None] = mapped_column(LargeBinary)
    problem: Mapped[str | None]
    made_at: Mapped[dt.datetime]
    __table_args__ = (
        CheckConstraint("(detail IS NULL) = (problem IS NOT NULL)", name="problem"),
        CheckConstraint(
            "(detail IS NULL) = (dice IS NULL) AND (detail IS NULL) = (error_volume_ml IS NULL) "
            "AND (detail IS NULL) = (has_errors IS NULL)",
            name="detail",
        ),
        CheckConstraint("networks >= 0", name="networks"),
        Index("ix_label_verdict_order", "bundle_id", "has_errors", "dice"),
    )


class LabelMark(Base):
    """A final label version that somebody has looked at and found right; another version of the label has no mark."""

    __tablename__ = "label_mark"
    label_version_id: Mapped[int] = mapped_column(ForeignKey("label_version.id"), primary_key=True)
    actor_id: Mapped[int] = mapped_column(ForeignKey("actor.id"))
    made_at: Mapped[dt.datetime]


class AssessmentRow(Base):
    """What a bundle says of a label version, over all structures.

    ``unlikeness`` is how unlike the training's scans the scan is, and ``unlikeness_p_value`` how rarely one of them is
    so; NULL where nobody knows.
    """

    __tablename__ = "assessment"
    id: Mapped[int] = mapped_column(primary_key=True)
    scan_id: Mapped[int] = mapped_column(ForeignKey("scan.id"))
    label_version_id: Mapped[int] = mapped_column(ForeignKey("label_version.id"))
    bundle_id: Mapped[int] = mapped_column(ForeignKey("bundle.id"))
    dice: Mapped[float]
    backend: Mapped[ComputeName] = mapped_column(String)
    mask_kind: Mapped[MaskKind] = mapped_column(String)
    unlikeness: Mapped[float | None]
    unlikeness_p_value: Mapped[float | None]
    geometry: Mapped[JsonObject] = mapped_column(Json)
    made_at: Mapped[dt.datetime]
    __table_args__ = (
        UniqueConstraint("label_version_id", "bundle_id"),
        CheckConstraint(_one_of("backend", get_args(ComputeName)), name="backend"),
        CheckConstraint(_one_of("mask_kind", get_args(MaskKind)), name="mask_kind"),
        Index("ix_assessment_scan", "scan_id", "id"),
        {"sqlite_autoincrement": True},
    )


class AssessmentStructure(Base):
    """The estimated metrics of one structure; slices and boxes of both views are one compressed value.

    ``detail`` is NULL where the assessment was thinned. ``*_low`` and ``*_high`` are the prediction interval of a
    metric at ``interval_level``, NULL where there were too few patients for one.
    """

    __tablename__ = "assessment_structure"
    assessment_id: Mapped[int] = mapped_column(ForeignKey("assessment.id", ondelete="CASCADE"), primary_key=True)
    structure_id: Mapped[int] = mapped_column(ForeignKey("structure.id"), primary_key=True)
    position: Mapped[int]
    present: Mapped[bool]
    mask_volume_ml: Mapped[float]
    dice: Mapped[float | None]
    iou: Mapped[float | None]
    arvd: Mapped[float | None]
    rvd: Mapped[float | None]
    detail: Mapped[bytes | None] = mapped_column(LargeBinary)
    interval_level: Mapped[float | None]
    dice_low: Mapped[float | None]
    dice_high: Mapped[float | None]
    iou_low: Mapped[float | None]
    iou_high: Mapped[float | None]
    arvd_low: Mapped[float | None]
    arvd_high: Mapped[float | None]
    rvd_low: Mapped[float | None]
    rvd_high: Mapped[float | None]
    __table_args__ = (UniqueConstraint("assessment_id", "position"),)


class Score(Base):
    """A score of a scan; the lowest is the worst.

    ``bundle_id`` is the bundle whose assessment of the scan's mask it comes with. It is NULL of a baseline's score,
    which the segmentation network of this ``version`` alone gives.
    """

    __tablename__ = "score"
    scan_id: Mapped[int] = mapped_column(ForeignKey("scan.id"), primary_key=True)
    method: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float]
    version: Mapped[str]
    bundle_id: Mapped[int | None] = mapped_column(ForeignKey("bundle.id"))
    made_at: Mapped[dt.datetime]
    __table_args__ = (Index("ix_score_order", "method", "value", "scan_id"),)


class Packed(LargeBinary):
    """Numbers one after the other, as they are: thousands are read at once. Other binary values are compressed."""


class FeatureRow(Base):
    """By which features a scan is compared with others: one vector for each kind of them.

    ``version`` is of what made them; only those of one version are compared. ``numbers`` are 16-bit floats, the lowest
    byte first.
    """

    __tablename__ = "feature"
    scan_id: Mapped[int] = mapped_column(ForeignKey("scan.id"), primary_key=True)
    kind: Mapped[FeatureKind] = mapped_column(String, primary_key=True)
    version: Mapped[str]
    numbers: Mapped[bytes] = mapped_column(Packed)
    __table_args__ = (
        CheckConstraint(_one_of("kind", get_args(FeatureKind)), name="kind"),
        Index("ix_feature_version", "kind", "version", "scan_id"),
    )


class LeaseRow(Base):
    """A scan handed out to an annotator: a lease.

    ``draw`` says how it came: by the strategy, as an audit draw (uniform at random among ``pool`` waiting scans, taken
    with ``probability`` at this suggestion) or as a validation scan (drawn likewise). ``slices`` are those that the
    annotator is asked for; NULL for the whole scan.
    """

    __tablename__ = "lease"
    id: Mapped[int] = mapped_column(primary_key=True)
    scan_id: Mapped[int] = mapped_column(ForeignKey("scan.id"))
    actor_id: Mapped[int] = mapped_column(ForeignKey("actor.id"))
    slot: Mapped[int]
    state: Mapped[LeaseState] = mapped_column(String)
    handed_out_at: Mapped[dt.datetime]
    expires_at: Mapped[dt.datetime]
    closed_at: Mapped[dt.datetime | None]
    strategy: Mapped[str]
    score: Mapped[float | None]
    draw: Mapped[Draw] = mapped_column(String)
    probability: Mapped[float | None]
    pool: Mapped[int | None]
    label_version_id: Mapped[int | None] = mapped_column(ForeignKey("label_version.id"))
    assessment_id: Mapped[int | None] = mapped_column(ForeignKey("assessment.id"), index=True)
    slices: Mapped[list[int] | None] = mapped_column(Json)
    __table_args__ = (
        Index("uq_lease_open_slot", "scan_id", "slot", unique=True,
              sqlite_where=text("state = 'open'"), postgresql_where=text("state = 'open'")),
        Index("uq_lease_open_actor", "actor_id", unique=True,
              sqlite_where=text("state = 'open'"), postgresql_where=text("state = 'open'")),
        Index("ix_lease_scan_actor", "scan_id", "actor_id", "state", "closed_at"),
        Index("ix_lease_actor_state", "actor_id", "state", "closed_at"),
        CheckConstraint(_one_of("state", get_args(LeaseState)), name="state"),
        CheckConstraint(_one_of("draw", get_args(Draw)), name="draw"),
        CheckConstraint("(state = 'open') = (closed_at IS NULL)", name="closed"),
        CheckConstraint("(draw IN ('strategy', 'rejected')) = (probability IS NULL)", name="probability"),
        CheckConstraint("slices IS NULL OR draw = 'strategy'", name="slices"),
        {"sqlite_autoincrement": True},
    )  # fmt: skip


class AttentionCheckRow(Base):
    """A lease whose annotator gets the mask with a planted error, ``label_version_id``, made of the lease's own.

    ``kind`` is that of the error. ``found`` is NULL until the lease is answered.
    """

    __tablename__ = "attention_check"
    lease_id: Mapped[int] = mapped_column(ForeignKey("lease.id"), primary_key=True)
    label_version_id: Mapped[int] = mapped_column(ForeignKey("label_version.id"), unique=True)
    kind: Mapped[str]
    found: Mapped[bool | None]


class Correction(Base):
    """An edge from the label version that a person started from to the one that this person made of it.

    ``seconds`` is the time between hand-out and submission. ``opened_slices`` and ``opened_structures`` are NULL where
    the whole scan was looked at, otherwise only they count. ``simulated`` corrections are never mixed with real ones.
    """

    __tablename__ = "correction"
    id: Mapped[int] = mapped_column(primary_key=True)
    scan_id: Mapped[int] = mapped_column(ForeignKey("scan.id"), index=True)
    from_version_id: Mapped[int] = mapped_column(ForeignKey("label_version.id"), index=True)
    to_version_id: Mapped[int] = mapped_column(ForeignKey("label_version.id"), unique=True)
    lease_id: Mapped[int | None] = mapped_column(ForeignKey("lease.id"), unique=True)
    assessment_id: Mapped[int | None] = mapped_column(ForeignKey("assessment.id"), index=True)
    actor_id: Mapped[int] = mapped_column(ForeignKey("actor.id"))
    made_at: Mapped[dt.datetime]
    seconds: Mapped[float | None]
    opened_slices: Mapped[list[int] | None] = mapped_column(Json)
    opened_structures: Mapped[list[str] | None] = mapped_column(Json)
    through_plane_axis: Mapped[int]
    voxels_changed: Mapped[int]
    slices_changed: Mapped[int]
    simulated: Mapped[bool]
    __table_args__ = (CheckConstraint("from_version_id != to_version_id", name="edge"),)


class CorrectionStructure(Base):
    """The true metrics of the start against the correction, of one structure: in 3D, and of each slice compressed."""

    __tablename__ = "correction_structure"
    correction_id: Mapped[int] = mapped_column(ForeignKey("correction.id"), primary_key=True)
    structure_id: Mapped[int] = mapped_column(ForeignKey("structure.id"), primary_key=True)
    position: Mapped[int]
    dice: Mapped[float | None]
    iou: Mapped[float | None]
    arvd: Mapped[float | None]
    rvd: Mapped[float | None]
    voxels_changed: Mapped[int]
    slices: Mapped[bytes] = mapped_column(LargeBinary)


class JobRow(Base):
    """Long work: put by anyone, taken by one worker, taken again when its heart stops.

    ``reason`` says why it was put where nobody asked for it. ``newest_label`` is the newest label version when it was
    put, first taken, or began its round; 0 without one. Labels that came later are told by it, and not by times: a
    clock may be set back.
    """

    __tablename__ = "job"
    id: Mapped[int] = mapped_column(primary_key=True)
    public_id: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[str]
    request: Mapped[JsonObject] = mapped_column(Json)
    state: Mapped[JobState] = mapped_column(String)
    attempts: Mapped[int]
    worker: Mapped[str | None]
    done_steps: Mapped[int]
    all_steps: Mapped[int]
    messages: Mapped[list[str]] = mapped_column(Json)
    result: Mapped[JsonObject | None] = mapped_column(Json)
    stop_wanted: Mapped[bool]
    reason: Mapped[str | None]
    newest_label: Mapped[int]
    actor_id: Mapped[int] = mapped_column(ForeignKey("actor.id"))
    enqueued_at: Mapped[dt.datetime]
    started_at: Mapped[dt.datetime | None]
    heartbeat_at: Mapped[dt.datetime | None]
    ended_at: Mapped[dt.datetime | None]
    __table_args__ = (
        Index("uq_job_running_kind", "kind", unique=True,
              sqlite_where=text("state = 'running'"), postgresql_where=text("state = 'running'")),
        Index("ix_job_state", "state", "id"),
        Index("ix_job_kind", "kind", "id"),
        CheckConstraint(_one_of("state", get_args(JobState)), name="state"),
        CheckConstraint("(state IN ('done', 'failed', 'stopped')) = (ended_at IS NOT NULL)", name="ended"),
        CheckConstraint("state != 'running' OR (worker IS NOT NULL AND heartbeat_at IS NOT NULL)", name="running"),
        {"sqlite_autoincrement": True},
    )  # fmt: skip


class RoundRow(Base):
    """One round of the loop: train, predict, assess. Its finished steps are kept, so that it can be continued."""

    __tablename__ = "round"
    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("job.id"), unique=True)
    bundle_id: Mapped[int | None] = mapped_column(ForeignKey("bundle.id"))
    labelled: Mapped[int]
    started_at: Mapped[dt.datetime]
    ended_at: Mapped[dt.datetime | None]


class RoundStep(Base):
    """A finished step of a round and what came of it."""

    __tablename__ = "round_step"
    round_id: Mapped[int] = mapped_column(ForeignKey("round.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    result: Mapped[JsonObject] = mapped_column(Json)
    ended_at: Mapped[dt.datetime]


class Event(Base):
    """What happened: rows are only ever added (a trigger sees to it)."""

    __tablename__ = "event"
    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[dt.datetime]
    actor_id: Mapped[int] = mapped_column(ForeignKey("actor.id"))
    verb: Mapped[str]
    object_kind: Mapped[str]
    object_id: Mapped[int]
    detail: Mapped[JsonObject | None] = mapped_column(Json)
    __table_args__ = (Index("ix_event_object", "object_kind", "object_id", "id"), {"sqlite_autoincrement": True})
