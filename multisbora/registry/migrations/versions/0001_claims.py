"""Models, compositions, tasks and claims: the first schema, kept in stores by a table `multisbora_schema`."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table("multisbora_schema", sa.Column("version", sa.Integer, primary_key=True))
    op.create_table(
        "models",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String, nullable=False, unique=True),
        sa.Column("model_type", sa.String, nullable=False),
        sa.Column("geometry_digest", sa.String(64), nullable=False),
    )
    op.create_table(
        "matrices",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("model_id", sa.Integer, sa.ForeignKey("models.id"), nullable=False),
        sa.Column("module", sa.String, nullable=False),
        sa.Column("out_features", sa.Integer, nullable=False),
        sa.Column("in_features", sa.Integer, nullable=False),
        sa.UniqueConstraint("model_id", "module"),
    )
    op.create_table(
        "compositions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("model_id", sa.Integer, sa.ForeignKey("models.id"), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.UniqueConstraint("model_id", "name"),
    )
    op.create_table(
        "tasks",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("model_id", sa.Integer, sa.ForeignKey("models.id"), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("variant", sa.String(2), nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.UniqueConstraint("model_id", "name"),
        sa.CheckConstraint("variant IN ('fa', 'fb')"),
        sa.CheckConstraint("rank > 0"),
    )
    op.create_table(
        "memberships",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("task_id", sa.Integer, sa.ForeignKey("tasks.id"), nullable=False),
        sa.Column("composition_id", sa.Integer, sa.ForeignKey("compositions.id"), nullable=False),
        sa.UniqueConstraint("task_id", "composition_id"),
        sa.UniqueConstraint("id", "composition_id"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "claims",
        sa.Column("composition_id", sa.Integer, primary_key=True),
        sa.Column("matrix_id", sa.Integer, sa.ForeignKey("matrices.id"), primary_key=True),
        sa.Column("axis", sa.SmallInteger, primary_key=True),
        sa.Column("channel", sa.Integer, primary_key=True),
        sa.Column("membership_id", sa.Integer, nullable=False, index=True),
        sa.ForeignKeyConstraint(["membership_id", "composition_id"], ["memberships.id", "memberships.composition_id"]),
        sa.CheckConstraint("axis IN (0, 1)"),
        sa.CheckConstraint("channel >= 0"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "regions",
        sa.Column("membership_id", sa.Integer, sa.ForeignKey("memberships.id"), primary_key=True),
        sa.Column("matrix_id", sa.Integer, sa.ForeignKey("matrices.id"), primary_key=True),
        sa.Column("indices", sa.LargeBinary, nullable=False),
        sa.Column("excluded", sa.LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "events",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("composition", sa.String(100)),
        sa.Column("task", sa.String(100)),
        sa.Column("detail", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER events_no_{verb.lower()} BEFORE {verb} ON events "
                "BEGIN SELECT RAISE(ABORT, 'events is append-only'); END"
            )
