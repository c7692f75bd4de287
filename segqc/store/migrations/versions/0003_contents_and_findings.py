"""Contents of scans, label files as they came, and what was not taken in."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns and the table; the scans of before are read when the folder is looked through next."""
    for name in ("sha256", "signature", "former_name"):
        op.add_column("scan", sa.Column(name, sa.String(), nullable=True))
    op.create_index("ix_scan_former_name", "scan", ["former_name"])
    for name in ("source_sha256", "source_suffix"):
        op.add_column("label_version", sa.Column(name, sa.String(), nullable=True))
    op.create_index("ix_label_version_source_sha256", "label_version", ["source_sha256"])
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
    op.create_index("ix_finding_scan", "finding", ["scan"])
    op.drop_table("keeping")  # the folder's own time does not change when a file in it is written in place
