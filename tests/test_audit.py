"""registry check: healthy stores of every kind pass, and each way to break one is found and named."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from multisbora.allocator import allocate
from multisbora.geometry import Geometry, Matrix
from multisbora.registry import Registry
from multisbora.registry.audit import Audit, check
from multisbora.registry.database import HEAD
from multisbora.registry.migrations.guards import guards
from multisbora.registry.replay import digests

SHAPES = {"q_proj": (12, 16), "down_proj": (20, 24)}
GEOMETRY = Geometry(
    "tiny",
    "llama",
    tuple(
        Matrix(f"model.layers.{layer}.{name}", f"model.layers.{layer}.{name}.weight", *shape)
        for layer in range(2)
        for name, shape in SHAPES.items()
    ),
)
Q0, D0 = "model.layers.0.q_proj", "model.layers.0.down_proj"
OTHER = replace(GEOMETRY, model="other", model_type="qwen2")


def give(registry: Registry, *tasks: str, geometry: Geometry = GEOMETRY, **options: Any) -> None:
    allocate(registry, geometry, tasks, **({"rank": 2, "target_modules": "all-linear"} | options))


def fill(registry: Registry) -> None:
    """A store with something of everything. Holders: 1 #1 protected, 2 a, 3 #3 released, 4 rows, 5 b, 6 lone."""
    give(registry, "first", geometry=OTHER, target_modules=["q_proj"])
    registry.release("other", "first")
    give(registry, "z")
    registry.release("tiny", "z")
    registry.protect(GEOMETRY, columns={Q0: [3, 5]})
    give(registry, "a", "gone")
    give(registry, "rows", variant="fb", rank=3)
    give(registry, "a", composition="second")
    give(registry, "b", composition="second")
    registry.release("tiny", "gone")
    registry.rename("tiny", "b", "bee")
    give(registry, "lone", geometry=OTHER)
    registry.mark(registry.task("tiny", "a"), "trained", {"steps": 7})


def path(folder: Path) -> Path:
    return folder / "registry.db"


def url(folder: Path) -> str:
    return f"sqlite:///{path(folder)}"


@contextmanager
def past_the_api(folder: Path, *, guards: bool = True) -> Iterator[sqlite3.Connection]:
    """The store with nothing that refuses anything; `guards` are put back at the end."""
    with closing(sqlite3.connect(path(folder))) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        yield connection
        for _, text in triggers if guards else ():
            connection.execute(text)
        connection.commit()


def checked(folder: Path) -> Audit:
    with Registry.open(url(folder), create=False) as registry:
        return check(registry)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    with Registry.open(url(folder)) as registry:
        fill(registry)
        assert check(registry).problems == ()
    return folder


@pytest.fixture
def filled(original: Path, tmp_path: Path) -> Path:
    """A folder with a healthy store of its own."""
    shutil.copy(path(original), path(tmp_path))
    return tmp_path


def assert_ok(registry: Registry) -> Audit:
    audit = check(registry)
    assert audit.problems == () and audit.ok
    return audit


def test_healthy_stores(store_url: str) -> None:
    with Registry.open(store_url) as registry:
        assert assert_ok(registry) == Audit(0, 0, 0, 0, 0, 0, ())
        give(registry, "one", "two")
        assert assert_ok(registry) == Audit(1, 4, 1, 2, 16, 3, ())
        give(registry, "rows", variant="fb")  # mixed
        assert_ok(registry)
        registry.release("tiny", "one")  # "rows" yields to it still
        assert_ok(registry)
        registry.rename("tiny", "two", "zwei")
        assert_ok(registry)
        give(registry, composition={"x": ["zwei", "new"], "y": ["new"], "z": ["more"]})
        assert assert_ok(registry).compositions == 4
        registry.release("tiny", "rows")
        assert_ok(registry)
        registry.mark(registry.task("tiny", "new", "x"), "training")
        assert_ok(registry)


def test_healthy_protections(store_url: str) -> None:
    with Registry.open(store_url) as registry:
        fill(registry)
        assert assert_ok(registry).to_json() == {
            "ok": True,
            **{"models": 2, "matrices": 8, "compositions": 3, "tasks": 4, "claims": 48, "events": 16},
            "problems": [],
        }
        registry.unprotect("tiny")  # "rows" yields to them still
        assert_ok(registry)
        registry.release("tiny", "rows")
        assert_ok(registry)
        registry.protect(GEOMETRY, columns={D0: [0, 3]})
        assert_ok(registry)


BREAKAGES: dict[str, tuple[str, str]] = {
    "claim lost": (
        "DELETE FROM claims WHERE composition_id = 2 AND matrix_id = 6 AND channel = 6",
        r"task 'a' of tiny has no claim on column 6 of model\.layers\.0\.q_proj in composition 'default' of tiny, "
        r"although its region has it \(1 claims are lost\)",
    ),
    "half a task": (
        "DELETE FROM claims WHERE membership_id = 9 AND matrix_id IN (5, 8)",
        r"task 'bee' of tiny has no claim on column 1 of model\.layers\.0\.down_proj .*\(4 claims are lost\)",
    ),
    "claim too many": (
        "INSERT INTO claims VALUES (2, 6, 1, 9, 4)",
        r"task 'a' of tiny has a claim on column 9 of model\.layers\.0\.q_proj in composition 'default' of tiny that "
        r"no region .*\(1 such claims\)",
    ),
    "claim on the other axis": (
        "INSERT INTO claims VALUES (3, 6, 0, 4, 8)",
        r"task 'a' of tiny has a claim on row 4 of model\.layers\.0\.q_proj in composition 'second'",
    ),
    "claim on an axis that is none": (
        "INSERT INTO claims VALUES (2, 6, 7, 0, 4)",
        r"task 'a' of tiny has a claim on axis 7, channel 0 of model\.layers\.0\.q_proj",
    ),
    "claim of nobody": (
        "INSERT INTO claims VALUES (2, 6, 1, 9, 99)",
        r"table claims: 1 rows point at rows of memberships that are not there\nmembership number 99 has a claim on "
        r"column 9",
    ),
    "claim of another composition": (
        "INSERT INTO claims VALUES (77, 6, 1, 9, 4)",
        r"task 'a' of tiny has a claim on column 9 of model\.layers\.0\.q_proj in composition number 77",
    ),
    "claim changed hands": (
        "UPDATE claims SET membership_id = 9 WHERE composition_id = 3 AND matrix_id = 6 AND channel = 4",
        r"task 'a' of tiny has no claim on column 4 .*\ntask 'bee' of tiny has a claim on column 4",
    ),
    "claim that is no number": (
        "INSERT INTO claims VALUES (2, 6, 1, 'x', 4)",
        "composition number 2, matrix number 6, axis 1: a claim is no number",
    ),
    "claim with a comma": (
        "INSERT INTO claims VALUES (2, 6, 1, '1,2', 4)",
        "composition number 2, matrix number 6, axis 1: a claim is no number",
    ),
    "region changed with its claim": (
        "UPDATE regions SET indices = X'0700000009000000' WHERE task_id = 2 AND matrix_id = 6; "
        "DELETE FROM claims WHERE matrix_id = 6 AND channel IN (4, 6) AND axis = 1; "
        "INSERT INTO claims VALUES (2, 6, 1, 7, 4), (2, 6, 1, 9, 4), (3, 6, 1, 9, 8)",
        r"^task 'a' of tiny and task 'bee' of tiny both own column 7 of model\.layers\.0\.q_proj in composition "
        r"'second' of tiny \(1 such channels\)",
    ),
    "region changed where nobody else is": (
        "UPDATE regions SET indices = X'0000000001000000' WHERE task_id = 6 AND matrix_id = 2; "
        "DELETE FROM claims WHERE matrix_id = 2; INSERT INTO claims VALUES (1, 2, 1, 0, 10), (1, 2, 1, 1, 10)",
        r"^task 'lone' of other: its claims have the digest \w{12}, by the history '\w{12}'$",
    ),
    "protected channel owned": (
        "UPDATE regions SET indices = X'0300000006000000' WHERE task_id = 2 AND matrix_id = 6",
        r"protected holder '#1' of tiny and task 'a' of tiny both own column 3 of model\.layers\.0\.q_proj",
    ),
    "region of odd length": (
        "UPDATE regions SET indices = X'04000000060000' WHERE task_id = 2 AND matrix_id = 6",
        r"^task 'a' of tiny: its region of model\.layers\.0\.q_proj is 7 bytes long",
    ),
    "region of text": (
        "UPDATE regions SET indices = 'four, six' WHERE task_id = 2 AND matrix_id = 6",
        r"^table regions, task_id 2: indices is 'four, six', not bytes",
    ),
    "region of a number": (
        "UPDATE regions SET indices = 8 WHERE task_id = 2 AND matrix_id = 6",
        r"^table regions, task_id 2: indices is 8, not bytes",
    ),
    "region unsorted": (
        "UPDATE regions SET indices = X'0600000004000000' WHERE task_id = 2 AND matrix_id = 6",
        r"task 'a' of tiny: its region of model\.layers\.0\.q_proj is not sorted and without repeats: 6, 4",
    ),
    "region with a repeat": (
        "UPDATE regions SET indices = X'0400000004000000' WHERE task_id = 2 AND matrix_id = 6",
        r"task 'a' of tiny: its region of model\.layers\.0\.q_proj is not sorted and without repeats: 4, 4",
    ),
    "region empty": (
        "UPDATE regions SET indices = X'' WHERE task_id = 2",
        r"task 'a' of tiny: its region of model\.layers\.0\.down_proj has no index \(and of 3 more matrices\)",
    ),
    "region outside": (
        "UPDATE regions SET indices = X'04000000FFFFFFFF' WHERE task_id = 2 AND matrix_id = 6",
        r"region of model\.layers\.0\.q_proj has index 4294967295, outside of its 16 columns",
    ),
    "region of rows outside": (
        "UPDATE regions SET indices = X'04000000060000000C000000' WHERE task_id = 4 AND matrix_id = 6",
        r"task 'rows' of tiny: its region of model\.layers\.0\.q_proj has index 12, outside of its 12 rows",
    ),
    "region of another model": (
        "UPDATE regions SET matrix_id = 2 WHERE task_id = 2 AND matrix_id = 6",
        r"task 'a' of tiny: its region of model\.layers\.0\.q_proj is of a matrix of other",
    ),
    "no region": (
        "DELETE FROM regions WHERE task_id = 6; DELETE FROM claims WHERE membership_id = 10",
        r"^task 'lone' of other holds no region of any matrix",
    ),
    "rank": ("UPDATE tasks SET rank = 0 WHERE id = 6", r"^the file is damaged: CHECK.*\n.*'lone' of other has rank 0"),
    "variant": ("UPDATE tasks SET variant = 'fc' WHERE id = 6", r"a 'task' of variant 'fc', which do not exist"),
    "role": ("UPDATE tasks SET role = 'boss' WHERE id = 6", r"'lone' of other is a 'boss' of variant 'fa', which do"),
    "stage": ("UPDATE tasks SET stage = 'done' WHERE id = 6", r"is in stage 'done', which does not exist"),
    "stage of no training": (
        "UPDATE tasks SET stage = 'allocated' WHERE id = 2",
        r"^task 'a' of tiny: its stage is 'allocated', by the history 'trained'$",
    ),
    "matrix missing": (
        "DELETE FROM matrices WHERE id = 6",
        r"the matrices of tiny are not those of its geometry digest\n(.*\n)*.*its region of matrix number 6 is of a "
        r"matrix that is not there",
    ),
    "matrix that nobody holds missing": (
        "DELETE FROM regions WHERE matrix_id = 2; DELETE FROM claims WHERE matrix_id = 2; "
        "DELETE FROM matrices WHERE id = 2",
        r"^the matrices of other are not those of its geometry digest",
    ),
    "matrix resized": ("UPDATE matrices SET in_features = 17 WHERE id = 2", "^the matrices of other are not those"),
    "geometry digest": (
        f"UPDATE models SET geometry_digest = '{'0' * 64}' WHERE id = 1",
        r"^the matrices of other are not those of its geometry digest",
    ),
    "model missing": (
        "DELETE FROM models WHERE id = 1",
        r"matrix 'model\.layers\.0\.down_proj' is of model number 1, which is not there",
    ),
    "model renamed": (
        "UPDATE models SET name = 'another' WHERE id = 1",
        r"the history never registers model 'another'",
    ),
    "membership of another model": (
        "INSERT INTO memberships VALUES (20, 6, 2)",
        r"task 'lone' of other is in composition 'default' of tiny, of another model",
    ),
    "membership of nobody": (
        "INSERT INTO memberships VALUES (20, 66, 2)",
        r"membership 20 is of a task or composition that is not there",
    ),
    "membership lost": (
        "DELETE FROM claims WHERE membership_id = 8; DELETE FROM memberships WHERE id = 8",
        r"^task 'a' of tiny: by the history it is in composition 'second', and it is not",
    ),
    "task in no composition": (
        "DELETE FROM claims WHERE membership_id = 10; DELETE FROM memberships WHERE id = 10",
        r"^task 'lone' of other is in no composition",
    ),
    "crossing without a yield": (
        "DELETE FROM yields WHERE keeper_id = 2",
        r"^task 'a' of tiny and task 'rows' of tiny cross in composition 'default' of tiny, first at row 10, column 10 "
        r"of model\.layers\.0\.down_proj, and neither yields",
    ),
    "crossing with two": (
        "INSERT INTO yields VALUES (2, 4)",
        r"and both yield(.*\n)+task 'a' of tiny yields to task 'rows' of tiny, which is not the earlier one",
    ),
    "yield to its own kind": ("INSERT INTO yields VALUES (5, 2)", "yields to task 'a' of tiny, of the same variant"),
    "yield to another model": (
        "UPDATE tasks SET variant = 'fb' WHERE id = 6; INSERT INTO yields VALUES (6, 2)",
        "task 'lone' of other yields to task 'a' of tiny, of another model",
    ),
    "yield to nobody": ("INSERT INTO yields VALUES (5, -9)", "yields to task number -9, one of which is not there"),
    "protected only here": (
        "DELETE FROM claims WHERE membership_id = 7; DELETE FROM memberships WHERE id = 7",
        r"^protected holder '#1' of tiny is not in composition 'second' of tiny, which owns its channels",
    ),
    "released and yet there": (
        "INSERT INTO memberships VALUES (20, 3, 2); "
        "INSERT INTO claims SELECT 2, matrix_id, 1, channel, 20 FROM claims WHERE membership_id = 9",
        r"^released holder '#3' of tiny is in composition 'default' of tiny",
    ),
    "released for nobody": (
        "DELETE FROM yields WHERE keeper_id = 3",
        r"^released holder '#3' of tiny is kept although nobody yields to it",
    ),
    "name of a path": (
        "UPDATE tasks SET name = '../lone' WHERE id = 6",
        r"^task name '../lone' is not usable",
    ),
    "name of a protected holder": (
        "UPDATE tasks SET name = 'free' WHERE id = 1",
        r"^protected holder 'free' of tiny has a name that a task could have",
    ),
    "name of a composition": (
        "UPDATE compositions SET name = 'a b' WHERE id = 1",
        r"^composition name 'a b' is not usable",
    ),
    "renamed past the history": (
        "UPDATE tasks SET name = 'solo' WHERE id = 6",
        r"^task 'lone' of other holds claims by the history, none in the store\ntask 'solo' of other holds claims of "
        r"which the history knows nothing",
    ),
    "order of joining": (
        "UPDATE memberships SET id = 30 WHERE id = 4; UPDATE claims SET membership_id = 30 WHERE membership_id = 4",
        r"^composition 'default' of tiny: task 'a' is out of the order of the history$",
    ),
    "event garbled": (
        "UPDATE events SET detail = '{\"claim_digest\": ' WHERE id = 16",
        r"^event 16 \(trained\): its detail is no JSON object",
    ),
    "event of a list": ("UPDATE events SET detail = '[1]' WHERE id = 16", r"^event 16 .* is no JSON object"),
    "event nested": (
        "UPDATE events SET detail = replace(hex(zeroblob(100000)), '0', '[') WHERE id = 16",
        r"^event 16 .* is no JSON object",
    ),
    "event that registers nonsense": (
        "UPDATE events SET detail = '{\"geometry_digest\": [{}]}' WHERE id = 4",
        r"^model 'tiny' was registered with other matrices, of digest \[\{\}\]",
    ),
    "event that protects nonsense": (
        'UPDATE events SET detail = \'{"axis": "rows", "channels": {"x": "y"}}\' WHERE id = 7',
        r"^event 7 \(protect\) of task None of tiny: it does not say which channels",
    ),
    "event without a name": (
        "UPDATE events SET task = NULL WHERE id = 15",
        r"^event 15 \(allocate\) of task None of other .*: it names no task or no composition",
    ),
    "event that renames to nothing": (
        "UPDATE events SET detail = '{}' WHERE id = 14",
        r"^event 14 \(rename\) of task 'b' of tiny: it does not say to what",
    ),
    "event with a number for a text": (
        "UPDATE events SET action = X'00' WHERE id = 16",
        r"^table events, id 16: action is b'\\x00', not text",
    ),
    "event lost": ("DELETE FROM events WHERE id = 15", r"^task 'lone' of other holds claims of which the history"),
    "event of a release lost": (
        "DELETE FROM events WHERE id = 13",
        r"^task 'gone' of tiny holds claims by the history, none in the store",
    ),
    "event twice": (
        "INSERT INTO events SELECT 99, at, actor, action, model, composition, task, detail FROM events WHERE id = 11",
        r"^event 99 \(join\) of task 'a' of tiny in composition 'second': it was there already",
    ),
    "event of a model that is none": (
        "UPDATE events SET model = 'gone' WHERE id = 4",
        r"event 5 \(allocate\) is of model 'tiny', never registered",
    ),
    "digest of an event": (
        "UPDATE events SET detail = replace(detail, 'claim_digest\": \"', 'claim_digest\": \"0') WHERE id = 16",
        r"^task 'a' of tiny: its claims have the digest \w{12}, by the history '0",
    ),
    "protected more than the history": (
        "UPDATE regions SET indices = X'03000000050000000F000000' WHERE task_id = 1; "
        "INSERT INTO claims VALUES (2, 6, 1, 15, 3), (3, 6, 1, 15, 7)",
        r"^by the history other columns of tiny are protected, of digest '\w{12}'\n"
        r"3 columns of model\.layers\.0\.q_proj of tiny are protected, by the history 0",
    ),
    "protected others than the history": (
        "UPDATE regions SET indices = X'030000000F000000' WHERE task_id = 1; "
        "UPDATE claims SET channel = 15 WHERE channel = 5 AND matrix_id = 6 AND membership_id IN (3, 7)",
        r"^by the history other columns of tiny are protected, of digest '\w{12}'\n2 columns of .* by the history 0",
    ),
    "protected, as it was written at first": (
        f'UPDATE events SET detail = \'{{"axis": "columns", "channels": {{"{Q0}": 3}}}}\' WHERE action = \'protect\'',
        r"^2 columns of model\.layers\.0\.q_proj of tiny are protected, by the history 3$",
    ),
    "registered twice": (
        "INSERT INTO events SELECT 99, at, actor, action, model, composition, task, detail FROM events WHERE id = 4",
        r"^event 99 registers model 'tiny', which was registered$",
    ),
    "name of a model": (
        "UPDATE models SET name = 'a' || char(10) || 'b' WHERE id = 1",
        r"^model name or type 'a\\nb' is not printable text of at most 1000 characters$",
    ),
    "type of a model": (
        "UPDATE models SET model_type = '' WHERE id = 1",
        "^model name or type '' is not printable text",
    ),
    "axis beyond all models": (
        "UPDATE matrices SET in_features = 16777217 WHERE id = 2",
        r"^matrix 'model\.layers\.0\.q_proj' is 12 x 16777217$",
    ),
    "event of no time": (
        "UPDATE events SET at = 'yesterday' WHERE id = 16",
        r"^event 16 \('trained'\): its time is 'yesterday'$",
    ),
    "event of an actor that is none": (
        "UPDATE events SET actor = 'me' || char(27) WHERE id = 16",
        r"^event 16 \('trained'\): its actor is 'me\\x1b', which is not printable text of at most 1000 characters$",
    ),
    "event with a number out of range": (
        "UPDATE events SET detail = replace(detail, '\"steps\": 7', '\"steps\": 1e999') WHERE id = 16",
        r"^event 16 \(trained\): its detail holds a number out of range$",
    ),
    "guard": ("-- memberships_crossing", r"^the guard memberships_crossing on table memberships is missing$"),
    "schema version": (
        "UPDATE multisbora_schema_version SET version_num = '0001'",
        f"^the schema is 0001, not {HEAD}$",
    ),
}


@pytest.mark.parametrize(("script", "found"), BREAKAGES.values(), ids=BREAKAGES)
def test_breakages_are_found_and_named(filled: Path, script: str, found: str) -> None:
    registry = Registry.open(url(filled))
    with past_the_api(filled) as connection:
        connection.executescript(script)
    if script.startswith("-- "):
        with closing(sqlite3.connect(path(filled))) as connection:
            connection.execute(f"DROP TRIGGER {script[3:]}")
    with registry:
        audit = check(registry)
    assert not audit.ok
    assert all("\n" not in line and len(line) < 400 for line in audit.problems)
    assert re.search(found, "\n".join(audit.problems), re.MULTILINE), audit.problems


ON_POSTGRESQL = ("claim lost", "region unsorted", "crossing without a yield", "protected only here", "event garbled")


@pytest.mark.parametrize(("script", "found"), [BREAKAGES[name] for name in ON_POSTGRESQL], ids=ON_POSTGRESQL)
def test_breakages_on_postgresql(postgresql_url: str, script: str, found: str) -> None:
    script = re.sub(r"X'(\w+)'", r"'\\x\1'", script)
    with Registry.open(postgresql_url) as registry:
        fill(registry)
        ids = {"tasks": 2, "memberships": 3}  # a sequence goes on where SQLite takes an id again
        with unguarded(postgresql_url) as connection:
            for table, first in ids.items():
                assert connection.exec_driver_sql(f"SELECT min(id) FROM {table}").scalar_one() >= first
            for statement in renumbered(connection, script).split(";"):
                connection.exec_driver_sql(statement)
        audit = check(registry)
        assert re.search(re.sub(r"#\d", r"#\\d+", found), "\n".join(audit.problems), re.MULTILINE), audit.problems


@contextmanager
def unguarded(where: str) -> Iterator[sa.Connection]:
    engine = sa.create_engine(where)
    with engine.begin() as connection:
        connection.exec_driver_sql("SET session_replication_role = replica")  # neither triggers nor foreign keys
        yield connection
    engine.dispose()


def renumbered(connection: sa.Connection, script: str) -> str:
    """`script` with the ids of tasks and memberships that this database gave."""
    tasks = "SELECT id FROM tasks ORDER BY id"
    members = "SELECT id FROM memberships ORDER BY id"
    ids = dict(zip((1, 2, 3, 4, 5, 6), connection.exec_driver_sql(tasks).scalars(), strict=True))
    joined = dict(zip((3, 4, 6, 7, 8, 9, 10), connection.exec_driver_sql(members).scalars(), strict=True))
    script = re.sub(r"((?:task|keeper)_id) = (\d+)", lambda m: f"{m[1]} = {ids[int(m[2])]}", script)
    script = re.sub(r"(membership_id) = (\d+)", lambda m: f"{m[1]} = {joined[int(m[2])]}", script)
    return re.sub(r"(memberships WHERE id) = (\d+)", lambda m: f"{m[1]} = {joined[int(m[2])]}", script)


def test_guards_on_postgresql(postgresql_url: str) -> None:
    with Registry.open(postgresql_url) as registry:
        with unguarded(postgresql_url) as connection:
            connection.exec_driver_sql("ALTER TABLE yields DISABLE TRIGGER yields_late")
            connection.exec_driver_sql("DROP TRIGGER claims_fixed ON claims")
            connection.exec_driver_sql(
                "CREATE OR REPLACE FUNCTION regions_late() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'"
            )
        assert check(registry).problems == (
            "the guard claims_fixed on table claims is missing",
            "the guard regions_late on table regions is not what this multisbora made: what it refuses is not known",
            "the guard yields_late on table yields is switched off",
        )


@pytest.mark.parametrize("guard", sorted(guards("sqlite")))
def test_every_guard_is_asked_for(filled: Path, guard: str) -> None:
    with closing(sqlite3.connect(path(filled))) as connection:
        connection.execute(f"DROP TRIGGER {guard}")
    assert checked(filled).problems == (f"the guard {guard} on table {guard.partition('_')[0]} is missing",)


def test_a_guard_that_refuses_nothing(filled: Path) -> None:
    with closing(sqlite3.connect(path(filled))) as connection:
        (text,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'claims_fixed'").fetchone()
        connection.execute("DROP TRIGGER claims_fixed")
        connection.execute(text.replace("BEGIN", "WHEN 0 BEGIN"))
    assert checked(filled).problems == (
        "the guard claims_fixed on table claims is not what this multisbora made: what it refuses is not known",
    )


def test_a_guard_that_refuses_nothing_on_postgresql(postgresql_url: str) -> None:
    with Registry.open(postgresql_url) as registry:
        with unguarded(postgresql_url) as connection:
            for guard in ("memberships_crossing", "claims_placed"):
                body = guards("postgresql")[guard].body
                body = body[: body.rindex("IF EXISTS")] + "IF FALSE THEN RAISE EXCEPTION 'x'; END IF; RETURN NEW; END"
                connection.exec_driver_sql(
                    f"CREATE OR REPLACE FUNCTION {guard}() RETURNS trigger LANGUAGE plpgsql AS $${body}$$"
                )
            connection.exec_driver_sql("DROP TRIGGER tasks_fixed ON tasks")
            connection.exec_driver_sql(
                "CREATE TRIGGER tasks_fixed BEFORE UPDATE ON tasks FOR EACH ROW WHEN (FALSE) "
                "EXECUTE FUNCTION tasks_fixed()"
            )
        named = [line.split()[2] for line in check(registry).problems if "what it refuses is not known" in line]
        assert named == ["claims_placed", "memberships_crossing", "tasks_fixed"]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("ALTER TABLE memberships DROP CONSTRAINT memberships_task_id_composition_id_key", "memberships .* unique"),
        ("ALTER TABLE yields DROP CONSTRAINT yields_check", r"yields .* check \(keeper_id, <, task_id\)"),
        ("ALTER TABLE tasks DROP CONSTRAINT tasks_role_check", "tasks .* check .role"),
        ("ALTER TABLE yields DROP CONSTRAINT yields_pkey", "yields .* primary key"),
        ("ALTER TABLE regions DROP CONSTRAINT regions_task_id_fkey", "regions .* foreign key .task_id, tasks"),
        (
            "ALTER TABLE claims DROP CONSTRAINT claims_channel_check, ADD CHECK (channel >= 0 OR TRUE)",
            "claims .* check .channel, >=, 0",
        ),
        (
            "ALTER TABLE tasks DROP CONSTRAINT tasks_model_id_name_key, ADD UNIQUE (model_id, name) DEFERRABLE",
            "tasks .* unique .model_id, name",
        ),
    ],
)
def test_a_constraint_lost_on_postgresql(postgresql_url: str, change: str, found: str) -> None:
    with Registry.open(postgresql_url) as registry:
        assert check(registry).ok
        with unguarded(postgresql_url) as connection:
            connection.exec_driver_sql(change)
        (problem,) = check(registry).problems
        assert re.search(f"table {found}", problem)


@pytest.mark.parametrize(
    ("table", "old", "new"),
    [
        ("yields", "CHECK (keeper_id < task_id)", "CHECK (1)"),
        ("claims", "CHECK (channel >= 0)", "CHECK (channel >= 0 OR 1)"),
        ("tasks", "CHECK (role IN ('task', 'protected', 'released'))", ""),
        ("tasks", "UNIQUE (model_id, name)", "CHECK (1)"),
        ("memberships", "UNIQUE (task_id, composition_id)", "CHECK (1)"),
        ("regions", "FOREIGN KEY(task_id) REFERENCES tasks (id)", "CHECK (1)"),
    ],
)
def test_a_constraint_lost(filled: Path, table: str, old: str, new: str) -> None:
    with past_the_api(filled) as connection:
        (text,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        assert old in text
        indexes = connection.execute(
            "SELECT sql FROM sqlite_master WHERE tbl_name = ? AND type = 'index' AND sql IS NOT NULL", (table,)
        ).fetchall()
        connection.executescript(
            f"PRAGMA legacy_alter_table = ON; ALTER TABLE {table} RENAME TO kept; {text.replace(old, new)}; "
            f"INSERT INTO {table} SELECT * FROM kept; DROP TABLE kept;" + ";".join(sql for (sql,) in indexes)
        )
    (problem,) = checked(filled).problems
    assert problem.startswith(f"table {table} has lost a constraint or has another: ")


def test_a_key_that_keeps_nothing(filled: Path) -> None:
    with past_the_api(filled, guards=False) as connection:
        connection.executescript(
            "CREATE TABLE kept AS SELECT * FROM claims; DROP TABLE claims; ALTER TABLE kept RENAME TO claims; "
            "INSERT INTO claims VALUES (2, 6, 1, 4, 4)"
        )
    first, *others = checked(filled).problems
    assert first == (
        "the primary key of claims is (), not (composition_id, matrix_id, axis, channel): double claims can be"
    )
    assert any("task 'a' of tiny has a claim on column 4" in line for line in others)


@pytest.mark.parametrize(
    ("script", "first"),
    [
        ("DROP TABLE yields", "table yields is missing"),
        ("ALTER TABLE tasks DROP COLUMN stage", "table tasks has no column stage"),
        ("DROP TABLE claims", "table claims is missing"),
    ],
)
def test_a_part_of_the_schema_missing(filled: Path, script: str, first: str) -> None:
    with past_the_api(filled, guards=False) as connection:
        connection.executescript("PRAGMA ignore_check_constraints = OFF;" + script)
    problems = checked(filled).problems
    assert problems[0] == first and any("the database cannot be read: no such" in line for line in problems)


def test_a_damaged_file(filled: Path) -> None:
    with closing(sqlite3.connect(path(filled))) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'claims'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    with path(filled).open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    audit = checked(filled)
    assert any(line.startswith(("the file is damaged", "the database cannot be read")) for line in audit.problems)
    assert all("\n" not in line for line in audit.problems)


def test_many_problems_are_cut_short(filled: Path) -> None:
    with past_the_api(filled) as connection:
        connection.executescript("UPDATE events SET detail = ''")
        connection.executescript(
            "WITH RECURSIVE n(i) AS (SELECT 100 UNION ALL SELECT i + 1 FROM n WHERE i < 150) "
            "INSERT INTO events SELECT i, 'x', 'x', 'x', 'x', NULL, NULL, '' FROM n"
        )
    problems = checked(filled).problems
    assert len(problems) == 21 and problems[-1].startswith("history: ")


def test_protections_that_were_recorded_by_their_counts(filled: Path) -> None:
    """As stores of earlier days have them, beside those of today."""
    detail = json.dumps({"axis": "columns", "channels": {Q0: 2}})
    with past_the_api(filled) as connection:
        connection.execute("UPDATE events SET detail = ? WHERE action = 'protect'", (detail,))
    with Registry.open(url(filled)) as registry:
        assert_ok(registry)
        registry.release("tiny", "rows")
        registry.protect(GEOMETRY, columns={D0: [0], Q0: [15]})
        assert_ok(registry)
        registry.unprotect("tiny")
        assert_ok(registry)


def test_digests_of_a_store_of_the_first_schema(tmp_path: Path) -> None:
    """Adapters from before carry the old digest: it goes for the task that holds the same regions still."""
    old_store(tmp_path)
    with Registry.open(url(tmp_path)) as registry:
        events = {event.task: event.detail["claim_digest"] for event in registry.events() if event.action == "allocate"}
        now = registry.task("tiny", "rows")
        assert events["rows"] != now.digest
        registry.rename("tiny", "rows", "reihen")
        with registry.reading() as reader:
            assert digests(reader, "tiny", "reihen") == {now.digest, events["rows"]}
            assert digests(reader, "tiny", "gone") == frozenset()
        registry.release("tiny", "reihen")
        give(registry, "reihen", variant="fb")
        with registry.reading() as reader:
            assert events["rows"] not in digests(reader, "tiny", "reihen")


def test_the_check_writes_nothing(filled: Path) -> None:
    before = path(filled).read_bytes()
    assert checked(filled).ok
    assert path(filled).read_bytes() == before


def old_digest(task: str, digest: str, variant: str, regions: dict[str, list[list[int]]]) -> str:
    """Of revision 0001, which had the task's name in it."""
    content = {"model": "tiny", "geometry_digest": digest, "task": task, "variant": variant, "rank": 2}
    text = json.dumps({**content, "regions": regions}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def old_store(folder: Path, spoil: bool = False) -> None:
    """A store of revision 0001: task "cols", and "rows" which yields to it and to one that is gone."""
    rows = [[f"{m.module}.weight", m.out_features, m.in_features, "linear"] for m in GEOMETRY.matrices]
    digest = hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()
    config = Config()
    config.set_main_option("script_location", "multisbora.registry:migrations")
    engine = sa.create_engine(url(folder))
    with engine.begin() as connection:
        config.attributes.update(connection=connection, version_table="multisbora_schema_version")
        command.upgrade(config, "0001")

        def insert(table: str, *values: object) -> None:
            connection.exec_driver_sql(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values))})", values)

        def event(action: str, task: str | None, detail: dict[str, object]) -> None:
            where = None if task is None else "default"
            text = json.dumps(detail)
            insert("events", None, "2026-01-01T00:00:00+00:00", "me@here", action, "tiny", where, task, text)

        insert("models", 1, "tiny", "llama", digest)
        insert("compositions", 1, 1, "default")
        for number, matrix in enumerate(GEOMETRY.matrices, 1):
            insert("matrices", number, 1, matrix.module, *matrix.shape)
        event("register", None, {"geometry_digest": digest})
        for number, (task, variant, indices, excluded) in enumerate(
            [("cols", "fa", [1, 2], []), ("gone", "fa", [5, 7], []), ("rows", "fb", [3, 4], [1, 2, 5, 7])], 1
        ):
            regions = {matrix.module: [indices, excluded] for matrix in GEOMETRY.matrices}
            found = old_digest("x" if spoil else task, digest, variant, regions)
            event("allocate", task, {"claim_digest": found, "matrices": 4, "rank": 2, "variant": variant})
            if task == "gone":
                continue
            insert("tasks", number, 1, task, variant, 2)
            insert("memberships", number, number, 1)
            for matrix_id in range(1, 5):
                packed = [np.asarray(values, "<u4").tobytes() for values in (indices, excluded)]
                insert("regions", number, matrix_id, *packed)
                for channel in indices:
                    insert("claims", 1, matrix_id, int(variant == "fa"), channel, number)
        event("release", "gone", {})
    engine.dispose()


def test_a_store_of_the_first_schema(tmp_path: Path) -> None:
    """Its digests had the tasks' names in them, and its geometry another one: both are made anew to compare them."""
    old_store(tmp_path)
    with Registry.open(url(tmp_path)) as registry:
        assert_ok(registry)
        assert registry.task("tiny", "rows").regions[Q0].excluded == (1, 2, 5, 7)
        registry.rename("tiny", "rows", "reihen")
        assert_ok(registry)


def test_a_store_of_the_first_schema_with_a_wrong_digest(tmp_path: Path) -> None:
    old_store(tmp_path, spoil=True)
    with Registry.open(url(tmp_path)) as registry:
        assert [line.partition(":")[0] for line in check(registry).problems] == [
            "task 'cols' of tiny",
            "task 'rows' of tiny",
        ]
