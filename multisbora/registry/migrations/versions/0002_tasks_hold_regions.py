"""Regions belong to tasks, crossings have a keeper, tasks a role and a stage; guards keep all of it.

A region's excluded indices become the indices of the tasks it yields to. A store of the first schema has, of tasks that
were released since, only those indices, so each task that had any gets one holder, of role "released", for them.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from multisbora.cards import Orientation
from multisbora.geometry import CONV1D_MODEL_TYPES, Geometry, Matrix

revision = "0002"
down_revision = "0001"

_IN_A_COMPOSITION = "EXISTS (SELECT 1 FROM memberships m WHERE m.task_id = {row}.task_id)"
_CROSSING = """EXISTS (
    SELECT 1 FROM tasks mine
    JOIN memberships m ON m.composition_id = NEW.composition_id
    JOIN tasks other ON other.id = m.task_id AND other.variant <> mine.variant
    JOIN regions r ON r.task_id = mine.id
    JOIN regions s ON s.task_id = other.id AND s.matrix_id = r.matrix_id
    WHERE mine.id = NEW.task_id AND NOT EXISTS (
        SELECT 1 FROM yields y
        WHERE (y.task_id = mine.id AND y.keeper_id = other.id) OR (y.task_id = other.id AND y.keeper_id = mine.id)
    )
)"""
_UNPROTECTED = """EXISTS (
    SELECT 1 FROM tasks mine
    JOIN tasks p ON p.model_id = mine.model_id AND p.role = 'protected'
    WHERE mine.id = NEW.task_id AND mine.role <> 'protected' AND NOT EXISTS (
        SELECT 1 FROM memberships m WHERE m.task_id = p.id AND m.composition_id = NEW.composition_id
    )
)"""
_CLAIMED = "EXISTS (SELECT 1 FROM claims c WHERE c.composition_id = OLD.composition_id AND c.membership_id = OLD.id)"
_OTHER_TASK = "NEW.id <> OLD.id OR NEW.model_id <> OLD.model_id OR NEW.variant <> OLD.variant OR NEW.rank <> OLD.rank"
# In PostgreSQL two transactions that add members at once must see each other, so the second waits here for the first.
_WAIT = "PERFORM 1 FROM compositions c WHERE c.id = NEW.composition_id FOR UPDATE;"

_GUARDS = [
    ("events_no_update", "events", "UPDATE", "", "events is append-only"),
    ("events_no_delete", "events", "DELETE", "", "events is append-only"),
    ("tasks_fixed", "tasks", "UPDATE", _OTHER_TASK, "a task keeps its model, variant and rank"),
    ("regions_fixed", "regions", "UPDATE", "", "regions never change"),
    ("regions_late", "regions", "INSERT", _IN_A_COMPOSITION.format(row="NEW"), "a composition has this task already"),
    ("regions_held", "regions", "DELETE", _IN_A_COMPOSITION.format(row="OLD"), "a composition has this task"),
    ("yields_fixed", "yields", "UPDATE", "", "who keeps a crossing never changes"),
    ("yields_late", "yields", "INSERT", _IN_A_COMPOSITION.format(row="NEW"), "a composition has this task already"),
    ("yields_held", "yields", "DELETE", _IN_A_COMPOSITION.format(row="OLD"), "a composition has this task"),
    ("memberships_fixed", "memberships", "UPDATE", "", "a membership never changes"),
    ("memberships_crossing", "memberships", "INSERT", _CROSSING, "two tasks would own the cells where they cross"),
    ("memberships_protected", "memberships", "INSERT", _UNPROTECTED, "the composition lacks the protected channels"),
    ("memberships_held", "memberships", "DELETE", _CLAIMED, "the task has claims in this composition"),
    ("claims_fixed", "claims", "UPDATE", "", "a claim never changes"),
]


def upgrade() -> None:
    bind = op.get_bind()
    # Not by op.add_column: that leaves checks out in SQLite.
    op.execute(
        "ALTER TABLE tasks ADD COLUMN role VARCHAR(16) NOT NULL DEFAULT 'task' "
        "CHECK (role IN ('task', 'protected', 'released'))"
    )
    op.execute(
        "ALTER TABLE tasks ADD COLUMN stage VARCHAR(16) NOT NULL DEFAULT 'allocated' "
        "CHECK (stage IN ('allocated', 'training', 'trained'))"
    )
    op.create_table(
        "yields",
        sa.Column("task_id", sa.Integer, sa.ForeignKey("tasks.id"), primary_key=True),
        sa.Column("keeper_id", sa.Integer, sa.ForeignKey("tasks.id"), primary_key=True, index=True),
        sa.CheckConstraint("keeper_id < task_id"),
        sqlite_with_rowid=False,
    )
    op.rename_table("regions", "regions_of_memberships")
    op.create_table(
        "regions",
        sa.Column("task_id", sa.Integer, sa.ForeignKey("tasks.id"), primary_key=True),
        sa.Column("matrix_id", sa.Integer, sa.ForeignKey("matrices.id"), primary_key=True),
        sa.Column("indices", sa.LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )
    bind.exec_driver_sql(
        "INSERT INTO regions SELECT m.task_id, r.matrix_id, r.indices FROM regions_of_memberships r "
        "JOIN memberships m ON m.id = r.membership_id "
        "WHERE m.id = (SELECT min(first.id) FROM memberships first WHERE first.task_id = m.task_id)"
    )
    _keep_excluded(bind)
    _renew_digests(bind)
    op.drop_table("regions_of_memberships")
    op.drop_index("ix_claims_membership_id", "claims")
    op.drop_table("multisbora_schema")
    for guard in _GUARDS:
        _guard(bind, *guard)
    _guard_claims(bind)


def _keep_excluded(bind: sa.Connection) -> None:
    # Negative ids: the holders are older than every task.
    bind.exec_driver_sql(
        "INSERT INTO tasks (id, model_id, name, variant, rank, role) "
        "SELECT -t.id, t.model_id, '#-' || t.id, CASE t.variant WHEN 'fa' THEN 'fb' ELSE 'fa' END, t.rank, 'released' "
        "FROM tasks t WHERE EXISTS (SELECT 1 FROM memberships m JOIN regions_of_memberships r "
        "ON r.membership_id = m.id WHERE m.task_id = t.id AND length(r.excluded) > 0)"
    )
    bind.exec_driver_sql(
        "INSERT INTO regions SELECT -m.task_id, r.matrix_id, r.excluded FROM regions_of_memberships r "
        "JOIN memberships m ON m.id = r.membership_id WHERE length(r.excluded) > 0 "
        "AND m.id = (SELECT min(first.id) FROM memberships first WHERE first.task_id = m.task_id)"
    )
    bind.exec_driver_sql("INSERT INTO yields SELECT -t.id, t.id FROM tasks t WHERE t.id < 0")
    # Of two that are both still there, the later yields.
    bind.exec_driver_sql(
        "INSERT INTO yields SELECT DISTINCT late.id, early.id FROM memberships a "
        "JOIN memberships b ON b.composition_id = a.composition_id "
        "JOIN tasks late ON late.id = a.task_id JOIN tasks early ON early.id = b.task_id "
        "JOIN regions r ON r.task_id = late.id JOIN regions s ON s.task_id = early.id AND s.matrix_id = r.matrix_id "
        "WHERE early.id < late.id AND early.variant <> late.variant"
    )


def _renew_digests(bind: sa.Connection) -> None:
    # Of the first schema's time is a digest in which the spelling of a model's names counts.
    for model_id, name, model_type in bind.exec_driver_sql("SELECT id, name, model_type FROM models").fetchall():
        rows = bind.exec_driver_sql(
            f"SELECT module, out_features, in_features FROM matrices WHERE model_id = {int(model_id)} ORDER BY id"
        ).fetchall()
        orientation: Orientation = "conv1d" if model_type in CONV1D_MODEL_TYPES else "linear"
        matrices = tuple(Matrix(module, f"{module}.weight", out, in_, orientation) for module, out, in_ in rows)
        digest = Geometry(name, model_type, matrices).digest
        bind.exec_driver_sql(f"UPDATE models SET geometry_digest = '{digest}' WHERE id = {int(model_id)}")


def _guard(bind: sa.Connection, name: str, table: str, verb: str, condition: str, message: str) -> None:
    """A trigger that refuses a change of `table` where `condition` holds ("" always), in the bind's dialect."""
    if bind.dialect.name == "sqlite":
        when = f"WHEN {condition} " if condition else ""
        op.execute(f"DROP TRIGGER IF EXISTS {name}")
        op.execute(f"CREATE TRIGGER {name} BEFORE {verb} ON {table} {when}BEGIN SELECT RAISE(ABORT, '{message}'); END")
        return
    first = _WAIT if name == "memberships_crossing" else ""
    row = "OLD" if verb == "DELETE" else "NEW"
    op.execute(
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {first} "
        f"IF {condition or 'TRUE'} THEN "
        f"RAISE EXCEPTION '{message}' USING ERRCODE = 'integrity_constraint_violation'; END IF; "
        f"RETURN {row}; END $$"
    )
    op.execute(f"CREATE TRIGGER {name} BEFORE {verb} ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()")


def _guard_claims(bind: sa.Connection) -> None:
    """A claim is of a member of its composition, on the axis of its task's variant, and inside its matrix.

    PostgreSQL checks a foreign key row by row, which takes longer than everything else that allocating a task does. So
    there one query over all new rows takes the place of the two keys.
    """
    message = "a claim outside its matrix, its axis or its composition"
    if bind.dialect.name == "sqlite":
        op.execute(
            "CREATE TRIGGER claims_placed BEFORE INSERT ON claims WHEN NOT EXISTS ("
            "SELECT 1 FROM memberships m JOIN tasks t ON t.id = m.task_id JOIN matrices x ON x.id = NEW.matrix_id "
            "WHERE m.id = NEW.membership_id AND m.composition_id = NEW.composition_id AND x.model_id = t.model_id "
            "AND NEW.axis = (t.variant = 'fa') "
            "AND NEW.channel < CASE NEW.axis WHEN 0 THEN x.out_features ELSE x.in_features END"
            f") BEGIN SELECT RAISE(ABORT, '{message}'); END"
        )
        return
    for constraint in sa.inspect(bind).get_foreign_keys("claims"):
        op.execute(f"ALTER TABLE claims DROP CONSTRAINT {constraint['name']}")
    op.execute(
        "CREATE FUNCTION claims_placed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF EXISTS (SELECT 1 FROM added c "
        "LEFT JOIN memberships m ON m.id = c.membership_id AND m.composition_id = c.composition_id "
        "LEFT JOIN tasks t ON t.id = m.task_id "
        "LEFT JOIN matrices x ON x.id = c.matrix_id AND x.model_id = t.model_id "
        "WHERE x.id IS NULL OR c.axis <> (t.variant = 'fa')::int "
        "OR c.channel >= CASE c.axis WHEN 0 THEN x.out_features ELSE x.in_features END) THEN "
        f"RAISE EXCEPTION '{message}' USING ERRCODE = 'integrity_constraint_violation'; END IF; RETURN NULL; END $$"
    )
    op.execute(
        "CREATE TRIGGER claims_placed AFTER INSERT ON claims REFERENCING NEW TABLE AS added "
        "FOR EACH STATEMENT EXECUTE FUNCTION claims_placed()"
    )
