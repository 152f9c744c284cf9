"""Moments of tasks' rows: what they send through the matrices of the base model."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from multisbora.registry.migrations.guards import install

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "measurements",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("model_id", sa.Integer, sa.ForeignKey("models.id"), nullable=False),
        sa.Column("task", sa.String(100), nullable=False),
        sa.Column("base_fingerprint", sa.String(80), nullable=False),
        sa.Column("row_count", sa.Integer, nullable=False),
        sa.Column("token_count", sa.Integer, nullable=False),
        sa.Column("source", sa.String(16), nullable=False),
        sa.UniqueConstraint("model_id", "task"),
        sa.CheckConstraint("row_count > 0"),
        sa.CheckConstraint("token_count > 0"),
        sa.CheckConstraint("source IN ('task', 'text')"),
    )
    op.create_table(
        "moments",
        sa.Column("measurement_id", sa.Integer, sa.ForeignKey("measurements.id"), primary_key=True),
        sa.Column("matrix_id", sa.Integer, sa.ForeignKey("matrices.id"), primary_key=True),
        sa.Column("energy", sa.LargeBinary, nullable=False),
        sa.Column("response", sa.LargeBinary, nullable=False),
        sa.Column("channels", sa.LargeBinary, nullable=False),
        sa.Column("block", sa.LargeBinary, nullable=False),
    )
    install(op.get_bind())
