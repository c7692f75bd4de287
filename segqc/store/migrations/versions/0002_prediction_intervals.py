"""Prediction intervals beside the estimated metrics."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

COLUMNS = (
    "interval_level",
    *(f"{metric}_{end}" for metric in ("dice", "iou", "arvd", "rvd") for end in ("low", "high")),
)


def upgrade() -> None:
    """Add the columns; estimates of before have no intervals."""
    for name in COLUMNS:
        op.add_column("assessment_structure", sa.Column(name, sa.Double(), nullable=True))
