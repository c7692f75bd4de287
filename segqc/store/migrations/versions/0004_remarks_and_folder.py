"""What the intake remarked on scans, scans of one content, and whose folder a database is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column, the index and the table; scans of before have no remarks until their files change."""
    op.add_column("scan", sa.Column("remarks", sa.JSON(), nullable=True))
    op.create_index("ix_scan_sha256", "scan", ["sha256"])
    op.create_table(
        "folder",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_folder")),
    )
