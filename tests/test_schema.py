"""What the databases refuse by themselves, whatever program writes: each rule broken past the API, on both."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from multisbora.allocator import allocate
from multisbora.geometry import Geometry, Matrix
from multisbora.registry import Registry, schema
from multisbora.registry.database import VERSION_TABLE
from multisbora.registry.migrations.guards import guards

GEOMETRY = Geometry(
    "tiny",
    "llama",
    tuple(
        Matrix(f"layers.{layer}.{name}", f"layers.{layer}.{name}.weight", *shape)
        for layer in range(2)
        for name, shape in {"q_proj": (8, 16), "down_proj": (12, 16)}.items()
    ),
)


@contextmanager
def past_the_api(url: str) -> Iterator[sa.Connection]:
    """A connection as any other program has it, in one transaction that is committed at the end."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", lambda raw, _: raw.execute("PRAGMA foreign_keys = ON"))
    with engine.begin() as connection:
        yield connection


@pytest.fixture
def filled(store_url: str) -> str:
    """Two tasks of columns and one of rows in composition one, another of columns in two; ids 1 to 4."""
    with Registry.open(store_url) as registry:
        give(registry)
    return store_url


def give(registry: Registry) -> None:
    options = {"rank": 4, "target_modules": "all-linear"}
    allocate(registry, GEOMETRY, ["math", "code"], composition="one", **options)  # type: ignore[arg-type]
    allocate(registry, GEOMETRY, ["rows"], variant="fb", composition="one", **options)  # type: ignore[arg-type]
    allocate(registry, GEOMETRY, ["law"], composition="two", **options)  # type: ignore[arg-type]


def refused(url: str, *statements: str) -> str:
    """The database's own words on refusing the last of the statements."""
    with pytest.raises(sa.exc.IntegrityError) as caught, past_the_api(url) as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    return str(caught.value.orig)


def test_a_double_claim(filled: str) -> None:
    with past_the_api(filled) as connection:
        theirs = connection.exec_driver_sql(
            "SELECT c.composition_id, matrix_id, axis, channel, c.membership_id, m.id FROM claims c JOIN memberships m "
            "ON m.composition_id = c.composition_id AND m.id <> c.membership_id JOIN tasks t ON t.id = m.task_id "
            "WHERE t.name = 'math' AND c.axis = 1"
        ).first()
    assert theirs is not None
    composition, matrix, axis, channel, _, thief = theirs
    words = refused(filled, f"INSERT INTO claims VALUES ({composition}, {matrix}, {axis}, {channel}, {thief})")
    assert "has this unique claim already" in words or 'unique constraint "claims_pkey"' in words


@pytest.mark.parametrize(
    "row",
    [
        "1, 1, 1, 0, 99",  # no such membership
        "2, 1, 1, 0, 1",  # a membership of another composition
        "1, 99, 1, 0, 1",  # no such matrix
        "1, 1, 0, 0, 1",  # rows, for a task of columns
        "1, 1, 1, 16, 1",  # outside of the matrix
        "1, 1, 2, 0, 1",  # no axis
        "1, 1, 1, -1, 1",  # no channel
    ],
)
def test_claims_of_nobody_and_nothing(filled: str, row: str) -> None:
    with past_the_api(filled) as connection:
        connection.exec_driver_sql("DELETE FROM claims")  # so that nothing is refused for being taken
    words = refused(filled, f"INSERT INTO claims VALUES ({row})")
    assert any(text in words for text in ("outside its matrix", "CHECK constraint", "check constraint"))


def test_two_owners_of_a_crossing(filled: str) -> None:
    """law's columns and the rows of composition one would both own the cells where they cross."""
    assert "own the cells where they cross" in refused(
        filled, "INSERT INTO memberships (task_id, composition_id) VALUES (4, 1)"
    )
    with past_the_api(filled) as connection:  # code and rows have settled theirs
        assert connection.exec_driver_sql("SELECT task_id, keeper_id FROM yields ORDER BY 2").all() == [(3, 1), (3, 2)]
    assert "own the cells where they cross" in refused(
        filled,
        "INSERT INTO tasks (model_id, name, variant, rank) VALUES (1, 'late', 'fb', 1)",
        "INSERT INTO regions SELECT max(t.id), 1, r.indices FROM tasks t, regions r WHERE r.task_id = 3 "
        "AND r.matrix_id = 1 GROUP BY r.indices",
        "INSERT INTO memberships (task_id, composition_id) SELECT max(id), 2 FROM tasks",
    )


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE events SET actor = 'nobody'", "append-only"),
        ("DELETE FROM events", "append-only"),
        ("UPDATE tasks SET variant = 'fb' WHERE id = 1", "keeps its model"),
        ("UPDATE tasks SET rank = 1 WHERE id = 1", "keeps its model"),
        ("UPDATE tasks SET stage = 'nonsense'", "constraint"),
        ("INSERT INTO tasks (model_id, name, variant, rank, role) VALUES (1, 'x', 'fa', 1, 'nonsense')", "constraint"),
        ("UPDATE tasks SET role = 'nonsense' WHERE id = 1", "its role"),
        ("UPDATE tasks SET role = 'protected' WHERE id = 1", "its role"),
        ("UPDATE tasks SET role = 'released' WHERE id = 1", "its role"),
        ("UPDATE tasks SET name = 'code' WHERE id = 1", "unique"),
        ("UPDATE regions SET task_id = 2 WHERE task_id = 1", "regions never change"),
        ("DELETE FROM regions WHERE task_id = 1", "a composition has this task"),
        ("INSERT INTO regions SELECT 1, matrix_id, indices FROM regions WHERE task_id = 2", "has this task already"),
        ("UPDATE yields SET keeper_id = 2 WHERE keeper_id = 1", "never changes"),
        ("DELETE FROM yields WHERE task_id = 3", "a composition has this task"),
        ("INSERT INTO yields VALUES (4, 3)", "has this task already"),
        ("UPDATE memberships SET composition_id = 2 WHERE id = 1", "a membership never changes"),
        ("DELETE FROM memberships WHERE id = 1", "has claims in this composition"),
        ("UPDATE claims SET channel = 15 WHERE channel = 1", "a claim never changes"),
        ("INSERT INTO memberships (task_id, composition_id) VALUES (1, 1)", "unique"),
        ("DELETE FROM tasks WHERE id = 1", "foreign"),
        ("INSERT INTO tasks (model_id, name, variant, rank) VALUES (1, 'x', 'fc', 1)", "constraint"),
        ("INSERT INTO tasks (model_id, name, variant, rank) VALUES (1, 'x', 'fa', 0)", "constraint"),
        ("INSERT INTO tasks (model_id, name, variant, rank) VALUES (9, 'x', 'fa', 1)", "foreign"),
    ],
)
def test_what_was_decided_stays(filled: str, statement: str, words: str) -> None:
    assert words in refused(filled, statement).lower()


def test_the_earlier_claim_keeps_the_cell(filled: str) -> None:
    """A task cannot be written to yield to a later one, not even before it joins anything."""
    words = refused(
        filled,
        "INSERT INTO tasks (id, model_id, name, variant, rank) VALUES (-7, 1, 'x', 'fb', 1)",
        "INSERT INTO yields VALUES (-7, 1)",
    )
    assert "constraint" in words


def test_a_composition_without_the_protected_channels(filled: str) -> None:
    with Registry.open(filled) as registry:
        registry.release("tiny", "rows")
        free = {7} - set(registry.task("tiny", "law", "two").regions["layers.0.q_proj"].indices)
        registry.release("tiny", "math")
        registry.release("tiny", "code")
        registry.release("tiny", "law")
        registry.protect(GEOMETRY, columns={"layers.0.q_proj": sorted(free | {3})})
        allocate(registry, GEOMETRY, ["new"], composition="one", rank=4, target_modules="all-linear")
    assert "lacks the protected channels" in refused(
        filled,
        "INSERT INTO compositions (model_id, name) VALUES (1, 'three')",
        "INSERT INTO memberships (task_id, composition_id) SELECT t.id, c.id FROM tasks t, compositions c "
        "WHERE t.name = 'new' AND c.name = 'three'",
    )


def test_migrations_lead_to_the_tables_of_the_code(filled: str) -> None:
    with past_the_api(filled) as connection:
        options = {"compare_type": True, "include_object": _ours}
        context = MigrationContext.configure(connection, opts=options)
        differences = compare_metadata(context, schema.metadata)
        # PostgreSQL has a guard in place of these two: see the schema.
        differences = [d for d in differences if not (d[0] == "add_fk" and d[1].parent.name == "claims")]
        assert differences == []
        query = {
            "sqlite": "SELECT name FROM sqlite_master WHERE type = 'trigger'",
            "postgresql": "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal",
        }[connection.dialect.name]
        assert set(connection.exec_driver_sql(query).scalars()) == set(guards(connection.dialect.name))


def _ours(_object: object, name: str | None, *_rest: object) -> bool:
    return name != VERSION_TABLE


ROW = "INSERT OR REPLACE INTO {0} SELECT {1} FROM {0}"


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (ROW.format("events", "id, at, 'forged', action, model, composition, task, detail"), "append-only"),
        (ROW.format("tasks", "id, model_id, name, 'fb', rank, role, stage"), "unique"),
        ("REPLACE INTO tasks (model_id, name, variant, rank) VALUES (1, 'math', 'fb', 1)", "unique"),
        ("UPDATE OR REPLACE tasks SET name = 'code' WHERE id = 1", "unique"),
        (ROW.format("regions", "task_id, matrix_id, x'01000000'"), "has this task already"),
        ("REPLACE INTO yields VALUES (3, 1)", "has this task already"),
        (ROW.format("memberships", "id, task_id, 2"), "unique"),
        ("REPLACE INTO memberships (task_id, composition_id) VALUES (1, 1)", "unique"),
        (
            "REPLACE INTO claims SELECT composition_id, matrix_id, axis, channel, 2 FROM claims c "
            "WHERE composition_id = 1 AND axis = 1",
            "unique",
        ),
    ],
)
def test_no_replacing_in_sqlite(tmp_path: Path, statement: str, words: str) -> None:
    """OR REPLACE deletes the row in its way without asking the triggers on deletion."""
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    with Registry.open(url) as registry:
        give(registry)
    engine = sa.create_engine(url, poolclass=sa.NullPool)  # without foreign keys
    before = contents(engine)
    with pytest.raises(sa.exc.IntegrityError, match=words), engine.begin() as connection:
        connection.exec_driver_sql(statement)
    assert contents(engine) == before


def contents(engine: sa.Engine) -> dict[str, list[tuple[object, ...]]]:
    with engine.connect() as connection:
        return {name: sorted(map(tuple, connection.execute(t.select()))) for name, t in schema.metadata.tables.items()}


@pytest.mark.parametrize("table", list(schema.metadata.tables))
def test_no_table_of_a_server_is_emptied_at_once(postgresql_url: str, table: str) -> None:
    with Registry.open(postgresql_url) as registry:
        give(registry)
    assert "cannot be emptied at once" in refused(postgresql_url, f"TRUNCATE {table} CASCADE")


def test_a_holder_is_retired_once_it_is_in_no_composition(filled: str) -> None:
    leave = ["DELETE FROM claims WHERE membership_id = 4", "DELETE FROM memberships WHERE task_id = 4"]
    assert "its role" in refused(filled, *leave, "UPDATE tasks SET role = 'protected' WHERE id = 4")
    with past_the_api(filled) as connection:
        for statement in (*leave, "UPDATE tasks SET role = 'released' WHERE id = 4"):
            connection.exec_driver_sql(statement)
    assert "its role" in refused(filled, "UPDATE tasks SET role = 'task' WHERE id = 4")


# Writers that skip the lock of `Database.connect`.

GUARDED = [
    "INSERT INTO regions SELECT 5, 1, indices FROM regions WHERE task_id = 1 AND matrix_id = 1",
    "INSERT INTO yields VALUES (5, 1)",
    "INSERT INTO memberships (task_id, composition_id) VALUES (5, 1)",
    "DELETE FROM memberships WHERE task_id = 4",
    "INSERT INTO claims VALUES (1, 1, 1, 5, 1)",
]


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("statement", GUARDED)
def test_guards_look_at_what_others_have_committed(postgresql_url: str, level: str, statement: str) -> None:
    with Registry.open(postgresql_url) as registry:
        give(registry)
    with past_the_api(postgresql_url) as connection:
        connection.exec_driver_sql("INSERT INTO tasks (model_id, name, variant, rank) VALUES (1, 'late', 'fb', 1)")
        connection.exec_driver_sql("DELETE FROM claims")
    assert "isolation level" in refused(postgresql_url, f"SET TRANSACTION ISOLATION LEVEL {level}", statement)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (GUARDED[2], GUARDED[0], "has this task already"),
        (GUARDED[2], GUARDED[1], "has this task already"),
        (GUARDED[0], GUARDED[2], "own the cells where they cross"),
        (GUARDED[4], "DELETE FROM memberships WHERE id = 1", "has claims in this composition"),
        ("DELETE FROM memberships WHERE id = 1", GUARDED[4], "outside its matrix"),
    ],
)
def test_guards_make_each_other_wait(postgresql_url: str, first: str, second: str, words: str) -> None:
    """Two transactions that break a rule together, where neither sees what the other has not committed yet."""
    with Registry.open(postgresql_url) as registry:
        give(registry)
    with past_the_api(postgresql_url) as connection:
        connection.exec_driver_sql("INSERT INTO tasks (model_id, name, variant, rank) VALUES (1, 'late', 'fb', 1)")
        connection.exec_driver_sql("DELETE FROM claims")
    outcome: list[str] = []

    def other() -> None:
        try:
            with past_the_api(postgresql_url) as connection:
                connection.exec_driver_sql(second)
        except sa.exc.IntegrityError as error:
            outcome.append(str(error.orig))

    thread = threading.Thread(target=other)
    with past_the_api(postgresql_url) as connection:
        connection.exec_driver_sql(first)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
    thread.join()
    assert len(outcome) == 1 and words in outcome[0]
