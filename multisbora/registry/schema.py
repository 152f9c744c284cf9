"""The tables of a registry, and what the database itself refuses. `migrations/` makes them; this is how they are now.

`claims` has the primary key (composition, matrix, axis, channel): two tasks of one composition cannot hold the same
column or the same row. `yields` says who keeps the cells where a column of one task crosses a row of another; guards
(triggers) refuse two such tasks in one composition without that, and keep what was decided from being changed. So the
database alone keeps every cell from having two owners (design, section 7.1), whatever the code above it does.
"""

from __future__ import annotations

import sqlalchemy as sa

from ..names import MAX_NAME

metadata = sa.MetaData()

models = sa.Table(
    "models",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String, nullable=False, unique=True),
    sa.Column("model_type", sa.String, nullable=False),
    sa.Column("geometry_digest", sa.String(64), nullable=False),
)

matrices = sa.Table(
    "matrices",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("model_id", sa.ForeignKey("models.id"), nullable=False),
    sa.Column("module", sa.String, nullable=False),
    sa.Column("out_features", sa.Integer, nullable=False),
    sa.Column("in_features", sa.Integer, nullable=False),
    sa.UniqueConstraint("model_id", "module"),
)

compositions = sa.Table(
    "compositions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("model_id", sa.ForeignKey("models.id"), nullable=False),
    sa.Column("name", sa.String(MAX_NAME), nullable=False),
    sa.UniqueConstraint("model_id", "name"),
)

# Whoever holds regions. Roles: "task"; "protected", channels that no task may own, a member of every composition of its
# model; "released", a task that gave its claims back but which others still yield to. The latter two have names that
# no task can have. Of two that cross, the keeper has the lower id: a new holder's id is above those of all that are
# there. (SQLite may give the highest id again once its holder is gone, but nobody yields to one that is gone.)
tasks = sa.Table(
    "tasks",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("model_id", sa.ForeignKey("models.id"), nullable=False),
    sa.Column("name", sa.String(MAX_NAME), nullable=False),
    sa.Column("variant", sa.String(2), nullable=False),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("role", sa.String(16), nullable=False, server_default="task"),
    sa.Column("stage", sa.String(16), nullable=False, server_default="allocated"),
    sa.UniqueConstraint("model_id", "name"),
    sa.CheckConstraint("variant IN ('fa', 'fb')"),
    sa.CheckConstraint("rank > 0"),
    sa.CheckConstraint("role IN ('task', 'protected', 'released')"),
    sa.CheckConstraint("stage IN ('allocated', 'training', 'trained')"),
)

# What a task holds, the same in each of its compositions: one row a matrix, sorted "<u4" (`claims` has millions of rows
# where a large model has many tasks, so it is not what readers read).
regions = sa.Table(
    "regions",
    metadata,
    sa.Column("task_id", sa.ForeignKey("tasks.id"), primary_key=True),
    sa.Column("matrix_id", sa.ForeignKey("matrices.id"), primary_key=True),
    sa.Column("indices", sa.LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

# Where the two cross, `keeper` keeps the cells and `task` trains with them masked: Region.excluded is the indices of
# all keepers. Written before the task joins its first composition, and fixed from then on.
yields = sa.Table(
    "yields",
    metadata,
    sa.Column("task_id", sa.ForeignKey("tasks.id"), primary_key=True),
    sa.Column("keeper_id", sa.ForeignKey("tasks.id"), primary_key=True, index=True),
    sa.CheckConstraint("keeper_id < task_id"),  # the earlier claim keeps the cell
    sqlite_with_rowid=False,
)

# A task in a composition.
memberships = sa.Table(
    "memberships",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("task_id", sa.ForeignKey("tasks.id"), nullable=False),
    sa.Column("composition_id", sa.ForeignKey("compositions.id"), nullable=False),
    sa.UniqueConstraint("task_id", "composition_id"),
    sa.UniqueConstraint("id", "composition_id"),
    sqlite_autoincrement=True,
)

# A guard checks both references in PostgreSQL, which has no foreign keys here: it would check them row by row.
claims = sa.Table(
    "claims",
    metadata,
    sa.Column("composition_id", sa.Integer, primary_key=True),
    sa.Column("matrix_id", sa.ForeignKey("matrices.id"), primary_key=True),
    sa.Column("axis", sa.SmallInteger, primary_key=True),  # 0 rows (fb), 1 columns (fa)
    sa.Column("channel", sa.Integer, primary_key=True),  # the claimed row or column
    sa.Column("membership_id", sa.Integer, nullable=False),
    sa.ForeignKeyConstraint(["membership_id", "composition_id"], ["memberships.id", "memberships.composition_id"]),
    sa.CheckConstraint("axis IN (0, 1)"),
    sa.CheckConstraint("channel >= 0"),
    sqlite_with_rowid=False,
)

# What was measured of a task's rows on the base model (`moments`). By name: a task is measured before it holds claims,
# and what its rows say stays true once it gave them back. Nothing of this is history, or leads to a claim.
measurements = sa.Table(
    "measurements",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("model_id", sa.ForeignKey("models.id"), nullable=False),
    sa.Column("task", sa.String(MAX_NAME), nullable=False),
    sa.Column("base_fingerprint", sa.String(80), nullable=False),
    sa.Column("row_count", sa.Integer, nullable=False),
    sa.Column("token_count", sa.Integer, nullable=False),
    sa.Column("source", sa.String(16), nullable=False),
    sa.UniqueConstraint("model_id", "task"),
    sa.CheckConstraint("row_count > 0"),
    sa.CheckConstraint("token_count > 0"),
    sa.CheckConstraint("source IN ('task', 'text')"),
)

# One row a matrix: "<f4" and "<i4" as they are in `moments.Site`; of the block, which is symmetric, the upper triangle.
# It stands last, so that who reads energies alone need not pass through it.
moments = sa.Table(
    "moments",
    metadata,
    sa.Column("measurement_id", sa.ForeignKey("measurements.id"), primary_key=True),
    sa.Column("matrix_id", sa.ForeignKey("matrices.id"), primary_key=True),
    sa.Column("energy", sa.LargeBinary, nullable=False),
    sa.Column("response", sa.LargeBinary, nullable=False),
    sa.Column("channels", sa.LargeBinary, nullable=False),
    sa.Column("block", sa.LargeBinary, nullable=False),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", sa.String(32), nullable=False),  # ISO 8601, UTC
    sa.Column("actor", sa.String, nullable=False),
    sa.Column("action", sa.String(32), nullable=False),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("composition", sa.String(MAX_NAME)),
    sa.Column("task", sa.String(MAX_NAME)),
    sa.Column("detail", sa.Text, nullable=False),  # JSON object
    sqlite_autoincrement=True,
)
