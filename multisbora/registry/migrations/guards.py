"""Triggers that keep what a registry's tables decided: the one place that says them, for both databases.

The migrations make them (`install`), and `storage.faults` asks the store whether they are still these, word for word.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from ..schema import metadata

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
_OTHER_TASK = (
    "NEW.id <> OLD.id OR NEW.model_id <> OLD.model_id OR NEW.variant <> OLD.variant OR NEW.rank <> OLD.rank "
    "OR (NEW.role <> OLD.role AND (NEW.role <> 'released' "
    "OR EXISTS (SELECT 1 FROM memberships m WHERE m.task_id = OLD.id)))"
)
_APPEND_ONLY = "events is append-only"
_FIXED_TASK = "a task keeps its model, variant and rank, and its role while it is in a composition"
_MISPLACED = "a claim outside its matrix, its axis or its composition"
_JOINED = "a composition has this task"
_JOINED_ALREADY = "a composition has this task already"

# name, table, verb, condition on which it refuses ("" always), message
_ROW_GUARDS = [
    ("events_no_update", "events", "UPDATE", "", _APPEND_ONLY),
    ("events_no_delete", "events", "DELETE", "", _APPEND_ONLY),
    ("tasks_fixed", "tasks", "UPDATE", _OTHER_TASK, _FIXED_TASK),
    ("regions_fixed", "regions", "UPDATE", "", "regions never change"),
    ("regions_late", "regions", "INSERT", _IN_A_COMPOSITION.format(row="NEW"), _JOINED_ALREADY),
    ("regions_held", "regions", "DELETE", _IN_A_COMPOSITION.format(row="OLD"), _JOINED),
    ("yields_fixed", "yields", "UPDATE", "", "who keeps a crossing never changes"),
    ("yields_late", "yields", "INSERT", _IN_A_COMPOSITION.format(row="NEW"), _JOINED_ALREADY),
    ("yields_held", "yields", "DELETE", _IN_A_COMPOSITION.format(row="OLD"), _JOINED),
    ("memberships_fixed", "memberships", "UPDATE", "", "a membership never changes"),
    ("memberships_crossing", "memberships", "INSERT", _CROSSING, "two tasks would own the cells where they cross"),
    ("memberships_protected", "memberships", "INSERT", _UNPROTECTED, "the composition lacks the protected channels"),
    ("memberships_held", "memberships", "DELETE", _CLAIMED, "the task has claims in this composition"),
    ("claims_fixed", "claims", "UPDATE", "", "a claim never changes"),
]

# In SQLite, OR REPLACE deletes the row in its way past the triggers on deletion. An id that is yet to be given reads -1
# in these triggers, so no row may have that one. (Regions and yields that a composition has refuse any insertion.)
_REPLACEMENTS = [
    ("events_no_replace", "events", "INSERT", "EXISTS (SELECT 1 FROM events e WHERE e.id = NEW.id)", _APPEND_ONLY),
    (
        "tasks_no_replace",
        "tasks",
        "INSERT",
        "EXISTS (SELECT 1 FROM tasks t WHERE t.id = NEW.id OR (t.model_id = NEW.model_id AND t.name = NEW.name))",
        "there is a unique task of this id or name already",
    ),
    (
        "tasks_no_replacing_name",
        "tasks",
        "UPDATE",
        "EXISTS (SELECT 1 FROM tasks t WHERE t.id <> OLD.id AND t.model_id = NEW.model_id AND t.name = NEW.name)",
        "there is a unique task of this name already",
    ),
    (
        "memberships_no_replace",
        "memberships",
        "INSERT",
        "EXISTS (SELECT 1 FROM memberships m WHERE m.id = NEW.id "
        "OR (m.task_id = NEW.task_id AND m.composition_id = NEW.composition_id))",
        "the unique membership of this task is there already",
    ),
    (
        "claims_no_replace",
        "claims",
        "INSERT",
        "EXISTS (SELECT 1 FROM claims c WHERE c.composition_id = NEW.composition_id AND c.matrix_id = NEW.matrix_id "
        "AND c.axis = NEW.axis AND c.channel = NEW.channel)",
        "a task has this unique claim already",
    ),
]

# What PostgreSQL's guards do before they look. Whoever skips the lock that `Database.connect` takes is made to wait for
# others that change what the guard looks at, and only "read committed" then shows what those have written.
_ISOLATED = (
    "IF current_setting('transaction_isolation') <> 'read committed' THEN "
    "RAISE EXCEPTION 'write in isolation level read committed' "
    "USING ERRCODE = 'integrity_constraint_violation'; END IF; "
)
_LOCK_TASK = "PERFORM 1 FROM tasks t WHERE t.id = {row}.task_id FOR UPDATE; "
_LOCK_COMPOSITION = "PERFORM 1 FROM compositions c WHERE c.id = NEW.composition_id FOR UPDATE; "
_FIRST = {
    "tasks_fixed": _ISOLATED,  # the row itself is locked by then
    "regions_late": _ISOLATED + _LOCK_TASK.format(row="NEW"),
    "regions_held": _ISOLATED + _LOCK_TASK.format(row="OLD"),
    "yields_late": _ISOLATED + _LOCK_TASK.format(row="NEW"),
    "yields_held": _ISOLATED + _LOCK_TASK.format(row="OLD"),
    "memberships_crossing": _ISOLATED + _LOCK_TASK.format(row="NEW") + _LOCK_COMPOSITION,
    "memberships_protected": _ISOLATED,
    "memberships_held": _ISOLATED,
}


@dataclass(frozen=True)
class Guard:
    """One trigger.

    Attributes:
        table: where it lies.
        trigger: the statement that makes it, as the database itself repeats it when asked.
        body: PostgreSQL: text of the function that it calls, which has its name; SQLite: "".
    """

    table: str
    trigger: str
    body: str = ""


def guards(dialect: str) -> dict[str, Guard]:
    """Every guard of a store, by name, in the SQL of "sqlite" or "postgresql"."""
    if dialect == "sqlite":
        found = {name: _on_sqlite(name, *rest) for name, *rest in _ROW_GUARDS + _REPLACEMENTS}
        found["claims_placed"] = _on_sqlite("claims_placed", "claims", "INSERT", _PLACED_ROW, _MISPLACED)
        return found
    found = {name: _on_postgresql(name, *rest) for name, *rest in _ROW_GUARDS}
    for table in metadata.tables:
        name = f"{table}_no_truncate"
        trigger = f"CREATE TRIGGER {name} BEFORE TRUNCATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION {name}()"
        found[name] = Guard(table, trigger, _body("", "TRUE", f"{table} cannot be emptied at once", "NULL"))
    trigger = (
        "CREATE TRIGGER claims_placed AFTER INSERT ON claims REFERENCING NEW TABLE AS added "
        "FOR EACH STATEMENT EXECUTE FUNCTION claims_placed()"
    )
    found["claims_placed"] = Guard("claims", trigger, _body(_LOCK_MEMBERSHIPS, _PLACED_ROWS, _MISPLACED, "NULL"))
    return found


def install(connection: sa.Connection) -> None:
    """Make the guards of every table that is there yet; one that is there already is made anew."""
    present = set(sa.inspect(connection).get_table_names())
    for name, guard in guards(connection.dialect.name).items():
        if guard.table not in present:  # a later migration makes it
            continue
        if guard.body:
            # A function outlives the table that its trigger lay on.
            connection.exec_driver_sql(
                f"CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $${guard.body}$$"
            )
            connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS {name} ON {guard.table}")
        else:
            connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS {name}")
        connection.exec_driver_sql(guard.trigger)


# A claim is of a member of its composition, on the axis of its task's variant, and inside its matrix. PostgreSQL checks
# a foreign key row by row, which takes longer than everything else that allocating a task does. So there one query over
# all new rows takes the place of the two keys, and holds the memberships as the keys would.
_PLACED_ROW = (
    "NOT EXISTS (SELECT 1 FROM memberships m JOIN tasks t ON t.id = m.task_id JOIN matrices x ON x.id = NEW.matrix_id "
    "WHERE m.id = NEW.membership_id AND m.composition_id = NEW.composition_id AND x.model_id = t.model_id "
    "AND NEW.axis = (t.variant = 'fa') "
    "AND NEW.channel < CASE NEW.axis WHEN 0 THEN x.out_features ELSE x.in_features END)"
)
_LOCK_MEMBERSHIPS = _ISOLATED + (
    "PERFORM 1 FROM memberships m WHERE m.id IN (SELECT DISTINCT a.membership_id FROM added a) FOR SHARE; "
)
_PLACED_ROWS = (
    "EXISTS (SELECT 1 FROM added c "
    "LEFT JOIN memberships m ON m.id = c.membership_id AND m.composition_id = c.composition_id "
    "LEFT JOIN tasks t ON t.id = m.task_id "
    "LEFT JOIN matrices x ON x.id = c.matrix_id AND x.model_id = t.model_id "
    "WHERE x.id IS NULL OR c.axis <> (t.variant = 'fa')::int "
    "OR c.channel >= CASE c.axis WHEN 0 THEN x.out_features ELSE x.in_features END)"
)


def _on_sqlite(name: str, table: str, verb: str, condition: str, message: str) -> Guard:
    when = f"WHEN {condition} " if condition else ""
    text = f"CREATE TRIGGER {name} BEFORE {verb} ON {table} {when}BEGIN SELECT RAISE(ABORT, '{message}'); END"
    return Guard(table, text)


def _on_postgresql(name: str, table: str, verb: str, condition: str, message: str) -> Guard:
    trigger = f"CREATE TRIGGER {name} BEFORE {verb} ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()"
    row = "OLD" if verb == "DELETE" else "NEW"
    return Guard(table, trigger, _body(_FIRST.get(name, ""), condition or "TRUE", message, row))


def _body(first: str, condition: str, message: str, result: str) -> str:
    return (
        f" BEGIN {first}IF {condition} THEN "
        f"RAISE EXCEPTION '{message}' USING ERRCODE = 'integrity_constraint_violation'; END IF; RETURN {result}; END "
    )
