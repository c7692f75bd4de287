"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


# Rows of these tables are never changed; label versions and events are what people answer with.
APPEND_ONLY = ("event", "label_version")
IDENTIFICATIONS = "'signed-in', 'oidc', 'trusted-header', 'client-id', 'cookie', 'command', 'folder', 'program'"


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "actor",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("identified_by", sa.String(), nullable=False),
        sa.Column("added_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            f"identified_by IN ({IDENTIFICATIONS})",
            name=op.f("ck_actor_identified_by"),
        ),
        sa.CheckConstraint("kind IN ('person', 'network', 'system')", name=op.f("ck_actor_kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_actor")),
        sa.UniqueConstraint("kind", "name", "identified_by", name=op.f("uq_actor_kind_name_identified_by")),
    )
    op.create_table(
        "user_account",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("password_hash", sa.String(), nullable=True),
        sa.Column("provider_subject", sa.String(), nullable=True),
        sa.Column("is_role_provided", sa.Boolean(), nullable=False),
        sa.Column("added_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_sign_in_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("role IN ('annotator', 'reviewer', 'operator')", name=op.f("ck_user_account_role")),
        sa.CheckConstraint("password_hash IS NULL OR provider_subject IS NULL", name=op.f("ck_user_account_one_place")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_user_account")),
        sa.UniqueConstraint("key", name=op.f("uq_user_account_key")),
        sa.UniqueConstraint("provider_subject", name=op.f("uq_user_account_provider_subject")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "sign_in",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("identified_by", sa.String(), nullable=False),
        sa.Column("made_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(f"identified_by IN ({IDENTIFICATIONS})", name=op.f("ck_sign_in_identified_by")),
        sa.CheckConstraint("kind IN ('session', 'token')", name=op.f("ck_sign_in_kind")),
        sa.ForeignKeyConstraint(["user_id"], ["user_account.id"], name=op.f("fk_sign_in_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sign_in")),
        sa.UniqueConstraint("sha256", name=op.f("uq_sign_in_sha256")),
    )
    op.create_index(op.f("ix_sign_in_expires_at"), "sign_in", ["expires_at"], unique=False)
    op.create_index(op.f("ix_sign_in_user_id"), "sign_in", ["user_id"], unique=False)
    op.create_table(
        "bundle",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("segmenter_version", sa.String(), nullable=True),
        sa.Column("assessor_version", sa.String(), nullable=True),
        sa.Column("manifest_sha256", sa.String(), nullable=False),
        sa.Column("parent_id", sa.Integer(), nullable=True),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("actor_id", sa.Integer(), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("newest_label", sa.Integer(), nullable=False),
        sa.Column("serving", sa.Boolean(), nullable=False),
        sa.Column("ranked_by", sa.String(), nullable=True),
        sa.Column("held_because", sa.String(), nullable=True),
        sa.Column("drift_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("drift_structures", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("drift_patients", sa.Integer(), nullable=True),
        sa.Column("segmenter_newest_label", sa.Integer(), nullable=True),
        sa.Column("assessor_newest_label", sa.Integer(), nullable=True),
        sa.CheckConstraint(
            "segmenter_version IS NOT NULL OR assessor_version IS NOT NULL", name=op.f("ck_bundle_networks")
        ),
        sa.CheckConstraint("parent_id < id", name=op.f("ck_bundle_parent")),
        sa.CheckConstraint("NOT serving OR held_because IS NULL", name=op.f("ck_bundle_held")),
        sa.CheckConstraint(
            "(drift_since IS NULL) = (drift_structures IS NULL) AND (drift_since IS NULL) = (drift_patients IS NULL)",
            name=op.f("ck_bundle_drift"),
        ),
        sa.ForeignKeyConstraint(["actor_id"], ["actor.id"], name=op.f("fk_bundle_actor_id")),
        sa.ForeignKeyConstraint(["parent_id"], ["bundle.id"], name=op.f("fk_bundle_parent_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_bundle")),
    )
    op.create_index(
        "uq_bundle_serving",
        "bundle",
        ["serving"],
        unique=True,
        sqlite_where=sa.text("serving"),
        postgresql_where=sa.text("serving"),
    )
    op.create_table(
        "finding",
        sa.Column("file", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("scan", sa.String(), nullable=True),
        sa.Column("sentence", sa.String(), nullable=False),
        sa.Column("signature", sa.String(), nullable=False),
        sa.Column("checks", sa.String(), nullable=False),
        sa.Column("found_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("kind IN ('scan', 'label', 'other')", name=op.f("ck_finding_kind")),
        sa.PrimaryKeyConstraint("file", name=op.f("pk_finding")),
    )
    op.create_index(op.f("ix_finding_scan"), "finding", ["scan"], unique=False)
    op.create_table(
        "folder",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_folder")),
    )
    op.create_table(
        "patient",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("fold", sa.Integer(), nullable=False),
        sa.Column("split", sa.String(), nullable=False),
        sa.Column("assigned_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("split IN ('train', 'validation')", name=op.f("ck_patient_split")),
        sa.CheckConstraint("fold >= 0", name=op.f("ck_patient_fold")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_patient")),
        sa.UniqueConstraint("id", "split", name=op.f("uq_patient_id_split")),
        sa.UniqueConstraint("name", name=op.f("uq_patient_name")),
    )
    op.create_table(
        "structure",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_structure")),
        sa.UniqueConstraint("name", name=op.f("uq_structure_name")),
    )
    op.create_table(
        "event",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor_id", sa.Integer(), nullable=False),
        sa.Column("verb", sa.String(), nullable=False),
        sa.Column("object_kind", sa.String(), nullable=False),
        sa.Column("object_id", sa.Integer(), nullable=False),
        sa.Column("detail", sa.JSON(none_as_null=True), nullable=True),
        sa.ForeignKeyConstraint(["actor_id"], ["actor.id"], name=op.f("fk_event_actor_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_event")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_event_object", "event", ["object_kind", "object_id", "id"], unique=False)
    op.create_table(
        "job",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("public_id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("request", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(), nullable=True),
        sa.Column("done_steps", sa.Integer(), nullable=False),
        sa.Column("all_steps", sa.Integer(), nullable=False),
        sa.Column("messages", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("result", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("stop_wanted", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("newest_label", sa.Integer(), nullable=False),
        sa.Column("actor_id", sa.Integer(), nullable=False),
        sa.Column("enqueued_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(state IN ('done', 'failed', 'stopped')) = (ended_at IS NOT NULL)", name=op.f("ck_job_ended")
        ),
        sa.CheckConstraint(
            "state != 'running' OR (worker IS NOT NULL AND heartbeat_at IS NOT NULL)", name=op.f("ck_job_running")
        ),
        sa.CheckConstraint("state IN ('queued', 'running', 'done', 'failed', 'stopped')", name=op.f("ck_job_state")),
        sa.ForeignKeyConstraint(["actor_id"], ["actor.id"], name=op.f("fk_job_actor_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job")),
        sa.UniqueConstraint("public_id", name=op.f("uq_job_public_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_job_kind", "job", ["kind", "id"], unique=False)
    op.create_index("ix_job_state", "job", ["state", "id"], unique=False)
    op.create_index(
        "uq_job_running_kind",
        "job",
        ["kind"],
        unique=True,
        sqlite_where=sa.text("state = 'running'"),
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_table(
        "scan",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("file", sa.String(), nullable=False),
        sa.Column("sort_key", sa.String(), nullable=False),
        sa.Column("patient_id", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("queue", sa.String(), nullable=True),
        sa.Column("opened_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("newest_label", sa.Integer(), nullable=False),
        sa.Column("readings", sa.Integer(), nullable=False),
        sa.Column("ranking_dice", sa.Double(), nullable=True),
        sa.Column("foreground", sa.Boolean(), nullable=True),
        sa.Column("info", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("added_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("missing_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("sha256", sa.String(), nullable=True),
        sa.Column("signature", sa.String(), nullable=True),
        sa.Column("former_name", sa.String(), nullable=True),
        sa.Column("remarks", sa.JSON(none_as_null=True), nullable=True),
        sa.CheckConstraint(
            "(queue IS NOT NULL) = (state IN ('unlabelled', 'rejected') AND missing_since IS NULL)",
            name=op.f("ck_scan_queue"),
        ),
        sa.CheckConstraint(
            "state IN ('unlabelled', 'rejected', 'submitted', 'approved', 'excluded')", name=op.f("ck_scan_state")
        ),
        sa.CheckConstraint("state NOT IN ('rejected', 'excluded') OR reason IS NOT NULL", name=op.f("ck_scan_reason")),
        sa.ForeignKeyConstraint(["patient_id", "queue"], ["patient.id", "patient.split"], name="fk_scan_queue"),
        sa.ForeignKeyConstraint(["patient_id"], ["patient.id"], name=op.f("fk_scan_patient_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_scan")),
        sa.UniqueConstraint("file", name=op.f("uq_scan_file")),
        sa.UniqueConstraint("name", name=op.f("uq_scan_name")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_scan_former_name"), "scan", ["former_name"], unique=False)
    op.create_index(op.f("ix_scan_patient_id"), "scan", ["patient_id"], unique=False)
    op.create_index("ix_scan_queue_foreground", "scan", ["queue", "foreground", "id"], unique=False)
    op.create_index("ix_scan_queue_name", "scan", ["queue", "sort_key"], unique=False)
    op.create_index("ix_scan_queue_ranking", "scan", ["queue", "ranking_dice", "id"], unique=False)
    op.create_index(op.f("ix_scan_sha256"), "scan", ["sha256"], unique=False)
    op.create_index("ix_scan_state", "scan", ["state", "id"], unique=False)
    op.create_table(
        "label_version",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("scan_id", sa.Integer(), nullable=False),
        sa.Column("tag", sa.String(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=True),
        sa.Column("suffix", sa.String(), nullable=True),
        sa.Column("parent_id", sa.Integer(), nullable=True),
        sa.Column("bundle_id", sa.Integer(), nullable=True),
        sa.Column("actor_id", sa.Integer(), nullable=False),
        sa.Column("made_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("submitted_sha256", sa.String(), nullable=True),
        sa.Column("submitted_suffix", sa.String(), nullable=True),
        sa.Column("checked_slices", sa.JSON(none_as_null=True), nullable=True),
        sa.CheckConstraint("(sha256 IS NULL) = (source = 'removal')", name=op.f("ck_label_version_content")),
        sa.CheckConstraint(
            "checked_slices IS NULL OR source NOT IN ('network', 'pseudo-label', 'attention check', 'removal')",
            name=op.f("ck_label_version_checked_slices"),
        ),
        sa.CheckConstraint("source != 'network' OR bundle_id IS NOT NULL", name=op.f("ck_label_version_bundle")),
        sa.CheckConstraint(
            "source IN ('network', 'annotator', 'pseudo-label', 'import', 'restored', 'consensus', "
            "'attention check', 'removal')",
            name=op.f("ck_label_version_source"),
        ),
        sa.CheckConstraint("(sha256 IS NULL) = (suffix IS NULL)", name=op.f("ck_label_version_suffix")),
        sa.ForeignKeyConstraint(["actor_id"], ["actor.id"], name=op.f("fk_label_version_actor_id")),
        sa.ForeignKeyConstraint(["bundle_id"], ["bundle.id"], name=op.f("fk_label_version_bundle_id")),
        sa.ForeignKeyConstraint(["parent_id"], ["label_version.id"], name=op.f("fk_label_version_parent_id")),
        sa.ForeignKeyConstraint(["scan_id"], ["scan.id"], name=op.f("fk_label_version_scan_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_label_version")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_label_version_current", "label_version", ["scan_id", "tag", "id"], unique=False)
    op.create_index(op.f("ix_label_version_sha256"), "label_version", ["sha256"], unique=False)
    op.create_index(op.f("ix_label_version_submitted_sha256"), "label_version", ["submitted_sha256"], unique=False)
    op.create_table(
        "round",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("bundle_id", sa.Integer(), nullable=True),
        sa.Column("labelled", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["bundle_id"], ["bundle.id"], name=op.f("fk_round_bundle_id")),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_round_job_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_round")),
        sa.UniqueConstraint("job_id", name=op.f("uq_round_job_id")),
    )
    op.create_table(
        "score",
        sa.Column("scan_id", sa.Integer(), nullable=False),
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("bundle_id", sa.Integer(), nullable=True),
        sa.Column("made_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["bundle_id"], ["bundle.id"], name=op.f("fk_score_bundle_id")),
        sa.ForeignKeyConstraint(["scan_id"], ["scan.id"], name=op.f("fk_score_scan_id")),
        sa.PrimaryKeyConstraint("scan_id", "method", name=op.f("pk_score")),
    )
    op.create_index("ix_score_order", "score", ["method", "value", "scan_id"], unique=False)
    op.create_table(
        "feature",
        sa.Column("scan_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("numbers", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint("kind IN ('appearance', 'segmenter')", name=op.f("ck_feature_kind")),
        sa.ForeignKeyConstraint(["scan_id"], ["scan.id"], name=op.f("fk_feature_scan_id")),
        sa.PrimaryKeyConstraint("scan_id", "kind", name=op.f("pk_feature")),
    )
    op.create_index("ix_feature_version", "feature", ["kind", "version", "scan_id"], unique=False)
    op.create_table(
        "assessment",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("scan_id", sa.Integer(), nullable=False),
        sa.Column("label_version_id", sa.Integer(), nullable=False),
        sa.Column("bundle_id", sa.Integer(), nullable=False),
        sa.Column("dice", sa.Double(), nullable=False),
        sa.Column("backend", sa.String(), nullable=False),
        sa.Column("mask_kind", sa.String(), nullable=False),
        sa.Column("unlikeness", sa.Double(), nullable=True),
        sa.Column("unlikeness_p_value", sa.Double(), nullable=True),
        sa.Column("geometry", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("made_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "backend IN ('pytorch', 'pytorch-bfloat16', 'openvino', 'openvino-bfloat16', 'compile')",
            name=op.f("ck_assessment_backend"),
        ),
        sa.CheckConstraint("mask_kind IN ('served', 'strange', 'person')", name=op.f("ck_assessment_mask_kind")),
        sa.ForeignKeyConstraint(["bundle_id"], ["bundle.id"], name=op.f("fk_assessment_bundle_id")),
        sa.ForeignKeyConstraint(
            ["label_version_id"], ["label_version.id"], name=op.f("fk_assessment_label_version_id")
        ),
        sa.ForeignKeyConstraint(["scan_id"], ["scan.id"], name=op.f("fk_assessment_scan_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_assessment")),
        sa.UniqueConstraint("label_version_id", "bundle_id", name=op.f("uq_assessment_label_version_id_bundle_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_assessment_scan", "assessment", ["scan_id", "id"], unique=False)
    op.create_table(
        "label_info",
        sa.Column("label_version_id", sa.Integer(), nullable=False),
        sa.Column("info", sa.JSON(none_as_null=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["label_version_id"], ["label_version.id"], name=op.f("fk_label_info_label_version_id")
        ),
        sa.PrimaryKeyConstraint("label_version_id", name=op.f("pk_label_info")),
    )
    op.create_table(
        "proposal_use",
        sa.Column("label_version_id", sa.Integer(), nullable=False),
        sa.Column("proposal_id", sa.Integer(), nullable=False),
        sa.Column("boxes_offered", sa.Integer(), nullable=False),
        sa.Column("boxes_taken", sa.Integer(), nullable=False),
        sa.CheckConstraint("boxes_taken >= 0 AND boxes_taken <= boxes_offered", name=op.f("ck_proposal_use_boxes")),
        sa.CheckConstraint("label_version_id != proposal_id", name=op.f("ck_proposal_use_edge")),
        sa.ForeignKeyConstraint(
            ["label_version_id"], ["label_version.id"], name=op.f("fk_proposal_use_label_version_id")
        ),
        sa.ForeignKeyConstraint(["proposal_id"], ["label_version.id"], name=op.f("fk_proposal_use_proposal_id")),
        sa.PrimaryKeyConstraint("label_version_id", name=op.f("pk_proposal_use")),
    )
    op.create_index(op.f("ix_proposal_use_proposal_id"), "proposal_use", ["proposal_id"], unique=False)
    op.create_table(
        "pseudo_label",
        sa.Column("label_version_id", sa.Integer(), nullable=False),
        sa.Column("ignored_version_id", sa.Integer(), nullable=False),
        sa.Column("dice", sa.Double(), nullable=False),
        sa.Column("low", sa.Double(), nullable=False),
        sa.Column("level", sa.Double(), nullable=False),
        sa.Column("rule", sa.String(), nullable=False),
        sa.Column("max_error", sa.Double(), nullable=False),
        sa.Column("is_audited", sa.Boolean(), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_because", sa.String(), nullable=True),
        sa.CheckConstraint("(ended_at IS NULL) = (ended_because IS NULL)", name=op.f("ck_pseudo_label_ended")),
        sa.ForeignKeyConstraint(
            ["ignored_version_id"], ["label_version.id"], name=op.f("fk_pseudo_label_ignored_version_id")
        ),
        sa.ForeignKeyConstraint(
            ["label_version_id"], ["label_version.id"], name=op.f("fk_pseudo_label_label_version_id")
        ),
        sa.PrimaryKeyConstraint("label_version_id", name=op.f("pk_pseudo_label")),
    )
    op.create_index(
        "ix_pseudo_label_open",
        "pseudo_label",
        ["label_version_id"],
        unique=False,
        sqlite_where=sa.text("ended_at IS NULL"),
        postgresql_where=sa.text("ended_at IS NULL"),
    )
    op.create_table(
        "label_verdict",
        sa.Column("scan_id", sa.Integer(), nullable=False),
        sa.Column("label_version_id", sa.Integer(), nullable=False),
        sa.Column("bundle_id", sa.Integer(), nullable=False),
        sa.Column("dice", sa.Double(), nullable=True),
        sa.Column("error_volume_ml", sa.Double(), nullable=True),
        sa.Column("has_errors", sa.Boolean(), nullable=True),
        sa.Column("networks", sa.Integer(), nullable=False),
        sa.Column("detail", sa.LargeBinary(), nullable=True),
        sa.Column("problem", sa.String(), nullable=True),
        sa.Column("made_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("(detail IS NULL) = (problem IS NOT NULL)", name=op.f("ck_label_verdict_problem")),
        sa.CheckConstraint(
            "(detail IS NULL) = (dice IS NULL) AND (detail IS NULL) = (error_volume_ml IS NULL) "
            "AND (detail IS NULL) = (has_errors IS NULL)",
            name=op.f("ck_label_verdict_detail"),
        ),
        sa.CheckConstraint("networks >= 0", name=op.f("ck_label_verdict_networks")),
        sa.ForeignKeyConstraint(["bundle_id"], ["bundle.id"], name=op.f("fk_label_verdict_bundle_id")),
        sa.ForeignKeyConstraint(
            ["label_version_id"], ["label_version.id"], name=op.f("fk_label_verdict_label_version_id")
        ),
        sa.ForeignKeyConstraint(["scan_id"], ["scan.id"], name=op.f("fk_label_verdict_scan_id")),
        sa.PrimaryKeyConstraint("scan_id", name=op.f("pk_label_verdict")),
    )
    op.create_index("ix_label_verdict_order", "label_verdict", ["bundle_id", "has_errors", "dice"], unique=False)
    op.create_table(
        "label_mark",
        sa.Column("label_version_id", sa.Integer(), nullable=False),
        sa.Column("actor_id", sa.Integer(), nullable=False),
        sa.Column("made_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["actor_id"], ["actor.id"], name=op.f("fk_label_mark_actor_id")),
        sa.ForeignKeyConstraint(
            ["label_version_id"], ["label_version.id"], name=op.f("fk_label_mark_label_version_id")
        ),
        sa.PrimaryKeyConstraint("label_version_id", name=op.f("pk_label_mark")),
    )
    op.create_table(
        "label_view",
        sa.Column("scan_id", sa.Integer(), nullable=False),
        sa.Column("tag", sa.String(), nullable=False),
        sa.Column("label_version_id", sa.Integer(), nullable=False),
        sa.Column("file", sa.String(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("modified_ns", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["label_version_id"], ["label_version.id"], name=op.f("fk_label_view_label_version_id")
        ),
        sa.ForeignKeyConstraint(["scan_id"], ["scan.id"], name=op.f("fk_label_view_scan_id")),
        sa.PrimaryKeyConstraint("scan_id", "tag", name=op.f("pk_label_view")),
        sa.UniqueConstraint("file", name=op.f("uq_label_view_file")),
    )
    op.create_table(
        "round_step",
        sa.Column("round_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("result", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["round_id"], ["round.id"], name=op.f("fk_round_step_round_id")),
        sa.PrimaryKeyConstraint("round_id", "name", name=op.f("pk_round_step")),
    )
    op.create_table(
        "assessment_structure",
        sa.Column("assessment_id", sa.Integer(), nullable=False),
        sa.Column("structure_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("present", sa.Boolean(), nullable=False),
        sa.Column("mask_volume_ml", sa.Double(), nullable=False),
        sa.Column("dice", sa.Double(), nullable=True),
        sa.Column("iou", sa.Double(), nullable=True),
        sa.Column("arvd", sa.Double(), nullable=True),
        sa.Column("rvd", sa.Double(), nullable=True),
        sa.Column("detail", sa.LargeBinary(), nullable=True),
        sa.Column("interval_level", sa.Double(), nullable=True),
        sa.Column("dice_low", sa.Double(), nullable=True),
        sa.Column("dice_high", sa.Double(), nullable=True),
        sa.Column("iou_low", sa.Double(), nullable=True),
        sa.Column("iou_high", sa.Double(), nullable=True),
        sa.Column("arvd_low", sa.Double(), nullable=True),
        sa.Column("arvd_high", sa.Double(), nullable=True),
        sa.Column("rvd_low", sa.Double(), nullable=True),
        sa.Column("rvd_high", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["assessment_id"], ["assessment.id"], name=op.f("fk_assessment_structure_assessment_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["structure_id"], ["structure.id"], name=op.f("fk_assessment_structure_structure_id")),
        sa.PrimaryKeyConstraint("assessment_id", "structure_id", name=op.f("pk_assessment_structure")),
        sa.UniqueConstraint("assessment_id", "position", name=op.f("uq_assessment_structure_assessment_id_position")),
    )
    op.create_table(
        "lease",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("scan_id", sa.Integer(), nullable=False),
        sa.Column("actor_id", sa.Integer(), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("handed_out_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("strategy", sa.String(), nullable=False),
        sa.Column("score", sa.Double(), nullable=True),
        sa.Column("draw", sa.String(), nullable=False),
        sa.Column("probability", sa.Double(), nullable=True),
        sa.Column("pool", sa.Integer(), nullable=True),
        sa.Column("label_version_id", sa.Integer(), nullable=True),
        sa.Column("assessment_id", sa.Integer(), nullable=True),
        sa.Column("slices", sa.JSON(none_as_null=True), nullable=True),
        sa.CheckConstraint(
            "(draw IN ('strategy', 'rejected')) = (probability IS NULL)", name=op.f("ck_lease_probability")
        ),
        sa.CheckConstraint("slices IS NULL OR draw = 'strategy'", name=op.f("ck_lease_slices")),
        sa.CheckConstraint("(state = 'open') = (closed_at IS NULL)", name=op.f("ck_lease_closed")),
        sa.CheckConstraint(
            "draw IN ('strategy', 'audit', 'validation', 'pseudo-audit', 'rejected')", name=op.f("ck_lease_draw")
        ),
        sa.CheckConstraint(
            "state IN ('open', 'submitted', 'skipped', 'expired', 'released')", name=op.f("ck_lease_state")
        ),
        sa.ForeignKeyConstraint(["actor_id"], ["actor.id"], name=op.f("fk_lease_actor_id")),
        sa.ForeignKeyConstraint(["assessment_id"], ["assessment.id"], name=op.f("fk_lease_assessment_id")),
        sa.ForeignKeyConstraint(["label_version_id"], ["label_version.id"], name=op.f("fk_lease_label_version_id")),
        sa.ForeignKeyConstraint(["scan_id"], ["scan.id"], name=op.f("fk_lease_scan_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_lease")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_lease_actor_state", "lease", ["actor_id", "state", "closed_at"], unique=False)
    op.create_index(op.f("ix_lease_assessment_id"), "lease", ["assessment_id"], unique=False)
    op.create_index("ix_lease_scan_actor", "lease", ["scan_id", "actor_id", "state", "closed_at"], unique=False)
    op.create_index(
        "uq_lease_open_actor",
        "lease",
        ["actor_id"],
        unique=True,
        sqlite_where=sa.text("state = 'open'"),
        postgresql_where=sa.text("state = 'open'"),
    )
    op.create_index(
        "uq_lease_open_slot",
        "lease",
        ["scan_id", "slot"],
        unique=True,
        sqlite_where=sa.text("state = 'open'"),
        postgresql_where=sa.text("state = 'open'"),
    )
    op.create_table(
        "attention_check",
        sa.Column("lease_id", sa.Integer(), nullable=False),
        sa.Column("label_version_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("found", sa.Boolean(), nullable=True),
        sa.ForeignKeyConstraint(
            ["label_version_id"], ["label_version.id"], name=op.f("fk_attention_check_label_version_id")
        ),
        sa.ForeignKeyConstraint(["lease_id"], ["lease.id"], name=op.f("fk_attention_check_lease_id")),
        sa.PrimaryKeyConstraint("lease_id", name=op.f("pk_attention_check")),
        sa.UniqueConstraint("label_version_id", name=op.f("uq_attention_check_label_version_id")),
    )
    op.create_table(
        "correction",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("scan_id", sa.Integer(), nullable=False),
        sa.Column("from_version_id", sa.Integer(), nullable=False),
        sa.Column("to_version_id", sa.Integer(), nullable=False),
        sa.Column("lease_id", sa.Integer(), nullable=True),
        sa.Column("assessment_id", sa.Integer(), nullable=True),
        sa.Column("actor_id", sa.Integer(), nullable=False),
        sa.Column("made_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=True),
        sa.Column("opened_slices", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("opened_structures", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("through_plane_axis", sa.Integer(), nullable=False),
        sa.Column("voxels_changed", sa.Integer(), nullable=False),
        sa.Column("slices_changed", sa.Integer(), nullable=False),
        sa.Column("simulated", sa.Boolean(), nullable=False),
        sa.CheckConstraint("from_version_id != to_version_id", name=op.f("ck_correction_edge")),
        sa.ForeignKeyConstraint(["actor_id"], ["actor.id"], name=op.f("fk_correction_actor_id")),
        sa.ForeignKeyConstraint(["assessment_id"], ["assessment.id"], name=op.f("fk_correction_assessment_id")),
        sa.ForeignKeyConstraint(["from_version_id"], ["label_version.id"], name=op.f("fk_correction_from_version_id")),
        sa.ForeignKeyConstraint(["lease_id"], ["lease.id"], name=op.f("fk_correction_lease_id")),
        sa.ForeignKeyConstraint(["scan_id"], ["scan.id"], name=op.f("fk_correction_scan_id")),
        sa.ForeignKeyConstraint(["to_version_id"], ["label_version.id"], name=op.f("fk_correction_to_version_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_correction")),
        sa.UniqueConstraint("lease_id", name=op.f("uq_correction_lease_id")),
        sa.UniqueConstraint("to_version_id", name=op.f("uq_correction_to_version_id")),
    )
    op.create_index(op.f("ix_correction_assessment_id"), "correction", ["assessment_id"], unique=False)
    op.create_index(op.f("ix_correction_from_version_id"), "correction", ["from_version_id"], unique=False)
    op.create_index(op.f("ix_correction_scan_id"), "correction", ["scan_id"], unique=False)
    op.create_table(
        "correction_structure",
        sa.Column("correction_id", sa.Integer(), nullable=False),
        sa.Column("structure_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("dice", sa.Double(), nullable=True),
        sa.Column("iou", sa.Double(), nullable=True),
        sa.Column("arvd", sa.Double(), nullable=True),
        sa.Column("rvd", sa.Double(), nullable=True),
        sa.Column("voxels_changed", sa.Integer(), nullable=False),
        sa.Column("slices", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["correction_id"], ["correction.id"], name=op.f("fk_correction_structure_correction_id")
        ),
        sa.ForeignKeyConstraint(["structure_id"], ["structure.id"], name=op.f("fk_correction_structure_structure_id")),
        sa.PrimaryKeyConstraint("correction_id", "structure_id", name=op.f("pk_correction_structure")),
    )
    op.create_table(
        "series",
        sa.Column("file", sa.String(), nullable=False),
        sa.Column("study_uid", sa.String(), nullable=False),
        sa.Column("series_uid", sa.String(), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("modality", sa.String(), nullable=False),
        sa.Column("images", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("file", name=op.f("pk_series")),
    )
    op.create_index(op.f("ix_series_series_uid"), "series", ["series_uid"], unique=False)
    op.create_index(op.f("ix_series_study_uid"), "series", ["study_uid"], unique=False)
    op.create_table(
        "segmentation",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("label_version_id", sa.Integer(), nullable=False),
        sa.Column("origin", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("study_uid", sa.String(), nullable=False),
        sa.Column("series_uid", sa.String(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_try_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("problem", sa.String(), nullable=True),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("origin IN ('own', 'found')", name=op.f("ck_segmentation_origin")),
        sa.CheckConstraint(
            "state IN ('empty', 'storing', 'stored', 'withdrawn', 'left')", name=op.f("ck_segmentation_state")
        ),
        sa.CheckConstraint("origin = 'own' OR state = 'stored'", name=op.f("ck_segmentation_found")),
        sa.CheckConstraint("attempts >= 0", name=op.f("ck_segmentation_attempts")),
        sa.ForeignKeyConstraint(
            ["label_version_id"], ["label_version.id"], name=op.f("fk_segmentation_label_version_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_segmentation")),
        sa.UniqueConstraint("label_version_id", name=op.f("uq_segmentation_label_version_id")),
    )
    op.create_index(op.f("ix_segmentation_series_uid"), "segmentation", ["series_uid"], unique=False)
    for table in APPEND_ONLY:
        _protect(table)


def _protect(table: str) -> None:
    """Refuse UPDATE and DELETE."""
    if op.get_bind().dialect.name == "sqlite":
        for action in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{action.lower()} BEFORE {action} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, 'rows of {table} are never changed'); END"
            )
        return
    op.execute(
        f"CREATE FUNCTION {table}_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION 'rows of {table} are never changed'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE ON {table} "
        f"FOR EACH ROW EXECUTE FUNCTION {table}_append_only()"
    )
