"""Opening databases: what is made, what is migrated, and the one line that each broken one gives."""

from __future__ import annotations

import importlib
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import sqlalchemy as sa

from multisbora.allocator import allocate
from multisbora.errors import AllocationError, MissingRegistryError, RegistryError
from multisbora.geometry import Geometry, Matrix
from multisbora.registry import Registry, database
from multisbora.registry.audit import check
from multisbora.registry.database import HEAD, VERSION_TABLE, Database
from multisbora.registry.schema import metadata

GEOMETRY = Geometry(
    "tiny",
    "llama",
    tuple(
        Matrix(f"layers.{layer}.{name}", f"layers.{layer}.{name}.weight", *shape)
        for layer in range(2)
        for name, shape in {"q_proj": (8, 16), "down_proj": (12, 16)}.items()
    ),
)


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'registry.db'}"


@contextmanager
def raw(folder: Path) -> Iterator[sqlite3.Connection]:
    """A store's file as any other program opens it. Commits at the end."""
    with closing(sqlite3.connect(folder / "registry.db")) as connection:
        yield connection
        connection.commit()


def fill(where: str, *tasks: str) -> None:
    with Registry.open(where) as registry:
        allocate(registry, GEOMETRY, tasks or ("math",), rank=4, target_modules="all-linear")


def one_line(caught: pytest.ExceptionInfo[RegistryError]) -> str:
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_sqlite_is_opened_with_care(tmp_path: Path) -> None:
    fill(url(tmp_path))
    with raw(tmp_path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchall() == [(HEAD,)]


def test_a_store_in_memory() -> None:
    with Registry.open("sqlite://") as registry:
        allocate(registry, GEOMETRY, ["math"], rank=4, target_modules="all-linear")
        assert registry.compositions("tiny") == {"default": ("math",)}


def test_head_is_the_newest_migration() -> None:
    versions = Path(database.__file__).parent / "migrations" / "versions"
    assert sorted(path.name[:4] for path in versions.glob("*.py"))[-1] == HEAD


def test_opening_again_runs_no_migration(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store_url)

    def upgrade(*_: object) -> None:
        raise AssertionError("a store of today was migrated")

    monkeypatch.setattr(database, "_upgrade", upgrade)
    with Registry.open(store_url, create=False) as registry:
        assert registry.compositions("tiny") == {"default": ("math",)}


# Stores of the first schema.

FIRST = {
    "math": ("fa", {1: [0, 5], 2: [1, 2]}, {}),
    "code": ("fb", {1: [3], 2: [0, 7]}, {1: [0, 5], 2: [1, 2]}),
    # Of these rows, [4] belonged to a task that was released.
    "law": ("fa", {1: [1, 2]}, {1: [3, 4]}),
}


def first_store(where: str) -> None:
    """A store as multisbora made it before there were migrations, with three tasks."""
    from alembic import command
    from alembic.config import Config

    engine = sa.create_engine(where, poolclass=sa.NullPool)
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", "multisbora.registry:migrations")
        config.attributes.update(connection=connection, version_table=VERSION_TABLE)
        command.upgrade(config, "0001")
        run = connection.exec_driver_sql
        run(f"DROP TABLE {VERSION_TABLE}")
        run("INSERT INTO multisbora_schema VALUES (1)")
        run(f"INSERT INTO models (name, model_type, geometry_digest) VALUES ('tiny', 'llama', '{'0' * 64}')")
        for matrix in GEOMETRY.matrices:
            run(
                "INSERT INTO matrices (model_id, module, out_features, in_features) VALUES "
                f"(1, '{matrix.module}', {matrix.out_features}, {matrix.in_features})"
            )
        run("INSERT INTO compositions (model_id, name) VALUES (1, 'one'), (1, 'two')")
        for number, (task, (variant, indices, excluded)) in enumerate(FIRST.items(), 1):
            run(f"INSERT INTO tasks (model_id, name, variant, rank) VALUES (1, '{task}', '{variant}', 2)")
            for composition in (1, 2) if task == "math" else (1,):
                run(f"INSERT INTO memberships (task_id, composition_id) VALUES ({number}, {composition})")
                member = run("SELECT max(id) FROM memberships").scalar_one()
                for matrix_id, held in indices.items():
                    connection.execute(
                        sa.text("INSERT INTO regions VALUES (:member, :matrix, :indices, :excluded)"),
                        {"member": member, "matrix": matrix_id}
                        | {"indices": np.asarray(held, "<u4").tobytes()}
                        | {"excluded": np.asarray(excluded.get(matrix_id, []), "<u4").tobytes()},
                    )
                    for channel in held:
                        axis = int(variant == "fa")
                        run(f"INSERT INTO claims VALUES ({composition}, {matrix_id}, {axis}, {channel}, {member})")


def test_a_first_store_is_migrated_and_keeps_everything(store_url: str) -> None:
    first_store(store_url)
    modules = [matrix.module for matrix in GEOMETRY.matrices]
    with Registry.open(store_url, create=False) as registry:
        assert registry.compositions("tiny") == {"one": ("math", "code", "law"), "two": ("math",)}
        for task, (variant, indices, excluded) in FIRST.items():
            held = registry.task("tiny", task, "one")
            assert (held.variant, held.rank, held.stage) == (
                variant,
                2,
                "trained",
            )  # nobody knows, so none may be moved
            assert {name: list(region.indices) for name, region in held.regions.items()} == {
                modules[matrix_id - 1]: found for matrix_id, found in indices.items()
            }
            assert {name: list(region.excluded) for name, region in held.regions.items() if region.excluded} == {
                modules[matrix_id - 1]: found for matrix_id, found in excluded.items()
            }
        # It works on as if it had been made today.
        assert registry.models() == {"tiny": GEOMETRY.digest}
        allocate(registry, GEOMETRY, ["new"], rank=2, composition="one", target_modules="all-linear")
        assert registry.release("tiny", "law") == ("one",)
        assert registry.release("tiny", "code") == ("one",)
        assert registry.compositions("tiny") == {"one": ("math", "new"), "two": ("math",)}


def test_a_task_that_came_back_under_an_old_mask(store_url: str) -> None:
    """Its id is the lower one, and its mask has the other's indices: migrated, it yields still, as it was trained."""
    first_store(store_url)
    engine = sa.create_engine(store_url, poolclass=sa.NullPool)
    rows = np.asarray([3, 4], "<u4").tobytes()
    # law (3) yields to rows 3 and 4 of matrix 1: of code (2) no longer, but of "new", which has a higher id and was in
    # composition two before it.
    with engine.begin() as connection:
        run = connection.exec_driver_sql
        run("INSERT INTO tasks (model_id, name, variant, rank) VALUES (1, 'new', 'fb', 2)")
        for task, indices, axis, channels in (("new", rows, 0, (3, 4)), ("law", None, 1, (1, 2))):
            run(
                "INSERT INTO memberships (task_id, composition_id) SELECT t.id, c.id FROM tasks t, compositions c "
                f"WHERE t.name = '{task}' AND c.name = 'two'"
            )
            member = run("SELECT max(id) FROM memberships").scalar_one()
            if indices is None:
                run(
                    f"INSERT INTO regions SELECT {member}, r.matrix_id, r.indices, r.excluded FROM regions r "
                    "JOIN memberships m ON m.id = r.membership_id JOIN tasks t ON t.id = m.task_id "
                    f"WHERE t.name = 'law' AND m.id <> {member}"
                )
            else:
                values = {"member": member, "indices": indices, "none": b""}
                connection.execute(sa.text("INSERT INTO regions VALUES (:member, 1, :indices, :none)"), values)
            for channel in channels:
                run(f"INSERT INTO claims VALUES (2, 1, {axis}, {channel}, {member})")
        run("DELETE FROM claims WHERE composition_id = 2 AND membership_id = 2")  # math leaves
        run("DELETE FROM regions WHERE membership_id = 2")
        run("DELETE FROM memberships WHERE id = 2")
    with Registry.open(store_url) as registry:
        q_proj = GEOMETRY.matrices[0].module
        claims = registry.claims("tiny", "two")
        assert {task: held.regions[q_proj].excluded for task, held in claims.items()} == {"new": (), "law": (3, 4)}
        assert list(claims) == ["new", "law"]
        assert registry.compositions("tiny")["one"] == ("math", "code", "law")
        problems = [line for line in check(registry).problems if not re.search("history|never registered", line)]
        assert problems == []  # history is what this store has none of
    with engine.begin() as connection:
        ids = dict(connection.exec_driver_sql("SELECT name, id FROM tasks").all())
        yields = set(connection.exec_driver_sql("SELECT task_id, keeper_id FROM yields").all())
    assert ids["new"] < ids["law"] and (ids["law"], ids["new"]) in yields
    assert (ids["code"], ids["math"]) in yields  # as before


def test_masks_that_go_round_in_a_circle(tmp_path: Path) -> None:
    first_store(url(tmp_path))
    with raw(tmp_path) as connection:
        masks = {"one": "four", "two": "one", "three": "two", "four": "three"}
        for table in ("claims", "regions", "memberships", "tasks"):
            connection.execute(f"DELETE FROM {table}")
        for number, (task, keeper) in enumerate(masks.items(), 1):
            held = {name: np.asarray([place], "<u4").tobytes() for place, name in enumerate(masks)}
            connection.execute("INSERT INTO tasks VALUES (?, 1, ?, ?, 1)", (number, task, ("fa", "fb")[number % 2]))
            for composition in (number, number % 4 + 1):
                connection.execute(
                    "INSERT OR IGNORE INTO compositions VALUES (?, 1, ?)", (composition, f"c{composition}")
                )
                cursor = connection.execute("INSERT INTO memberships VALUES (NULL, ?, ?)", (number, composition))
                row = (cursor.lastrowid, held[task], held[keeper])
                connection.execute("INSERT INTO regions VALUES (?, 1, ?, ?)", row)
    before = dump(tmp_path)
    with pytest.raises(RegistryError, match="go round in a circle, nothing was written") as caught:
        Registry.open(url(tmp_path))
    one_line(caught)
    assert dump(tmp_path) == before


def test_the_migration_makes_the_digest_of_today() -> None:
    """A later geometry may have another: then this goes, for the migration stays as it is."""
    migration = importlib.import_module("multisbora.registry.migrations.versions.0002_tasks_hold_regions")
    twice = (Matrix("a.h.0.q", "a.h.0.q.weight", 4, 4), Matrix("b.h.0.q", "b.h.0.q.weight", 4, 4))
    for matrices in (GEOMETRY.matrices, twice, twice[:1]):
        rows = [(m.module, *m.shape) for m in matrices]
        assert migration._digest(rows, "linear") == Geometry("x", "llama", matrices).digest


def test_a_store_without_moments_is_migrated_and_keeps_everything(store_url: str) -> None:
    fill(store_url, "math", "code")
    with Registry.open(store_url) as registry:
        before = (registry.claims("tiny"), registry.events())
    with sa.create_engine(store_url, poolclass=sa.NullPool).begin() as connection:  # as schema 0002 was
        for table in ("moments", "measurements"):
            connection.exec_driver_sql(f"DROP TABLE {table}")
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql(f"DROP FUNCTION {table}_no_truncate()")
        connection.exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = '0002'")
    with Registry.open(store_url, create=False) as registry:
        assert (registry.claims("tiny"), registry.events()) == before
        assert registry.measured("tiny") == {} and registry.moments("tiny", "math") is None
        assert check(registry).problems == ()


def test_a_migration_that_fails_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    first_store(url(tmp_path))
    with raw(tmp_path) as connection:
        connection.execute("CREATE VIEW regions_of_memberships AS SELECT 1")  # in the way of a step in the middle
    before = dump(tmp_path)
    with pytest.raises(RegistryError, match="nothing was written"):
        Registry.open(url(tmp_path))
    assert dump(tmp_path) == before
    with raw(tmp_path) as connection:
        connection.execute("DROP VIEW regions_of_memberships")
    with Registry.open(url(tmp_path)) as registry:
        assert len(registry.claims("tiny", "one")) == 3


def dump(folder: Path) -> list[str]:
    with raw(folder) as connection:
        return list(connection.iterdump())


def test_many_that_open_a_first_store_at_once(store_url: str) -> None:
    first_store(store_url)
    problems: list[BaseException] = []

    def open_it() -> None:
        try:
            with Registry.open(store_url) as registry:
                assert len(registry.claims("tiny", "one")) == 3
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_a_reader_waits_for_a_migration_that_takes_its_table_away(postgresql_url: str) -> None:
    """It has seen the table of versions of the first schema, and waits to read it until it is gone."""
    first_store(postgresql_url)
    opened: list[object] = []

    def open_it() -> None:
        try:
            with Registry.open(postgresql_url) as registry:
                opened.append(len(registry.claims("tiny", "one")))
        except RegistryError as error:
            opened.append(error)

    engine = sa.create_engine(postgresql_url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(0x6D756C7469)")  # as the one who migrates
        connection.exec_driver_sql("LOCK TABLE multisbora_schema IN ACCESS EXCLUSIVE MODE")
        thread = threading.Thread(target=open_it)
        thread.start()
        thread.join(1)
        assert thread.is_alive()
        database._upgrade(connection, "0001", "it")
        connection.commit()
    thread.join()
    assert opened == [3]


@pytest.mark.parametrize("statement", [f"UPDATE {VERSION_TABLE} SET version_num = '9999'"])
def test_a_newer_schema_is_refused(store_url: str, statement: str) -> None:
    fill(store_url)
    engine = sa.create_engine(store_url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)
    with pytest.raises(RegistryError, match=f"has schema 9999, this multisbora reads up to {HEAD}: upgrade it"):
        Registry.open(store_url)


@pytest.mark.parametrize(
    "script",
    [
        f"DELETE FROM {VERSION_TABLE}",
        f"INSERT INTO {VERSION_TABLE} VALUES ('0001')",
        f"UPDATE {VERSION_TABLE} SET version_num = 'banana'",
        f"UPDATE {VERSION_TABLE} SET version_num = '0000'",
        f"DROP TABLE {VERSION_TABLE}; CREATE TABLE {VERSION_TABLE} (version_num)",
        f"DROP TABLE {VERSION_TABLE}; CREATE TABLE multisbora_schema (version)",
        f"DROP TABLE {VERSION_TABLE}; CREATE TABLE multisbora_schema (version); "
        "INSERT INTO multisbora_schema VALUES (2)",
        f"DROP TABLE {VERSION_TABLE}; CREATE TABLE multisbora_schema (version); "
        "INSERT INTO multisbora_schema VALUES (x'00')",
    ],
)
def test_a_damaged_version_is_refused(store_url: str, script: str) -> None:
    fill(store_url)
    engine = sa.create_engine(store_url, poolclass=sa.NullPool)
    if engine.dialect.name == "postgresql":
        script = script.replace("version_num)", "version_num text)").replace("(version)", "(version text)")
        script = script.replace("x'00'", "'x'")
    with engine.begin() as connection:
        for statement in script.split("; "):
            connection.exec_driver_sql(statement)
    for create in (True, False):
        with pytest.raises(RegistryError, match="is damaged: restore it") as caught:
            Registry.open(store_url, create=create)
        one_line(caught)


# Files that are no store.


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_bytes(b"my only copy of something else\n" * 100)
    with pytest.raises(RegistryError, match="is no SQLite database") as caught:
        Registry.open(url(tmp_path))
    one_line(caught)
    assert (tmp_path / "registry.db").read_bytes() == b"my only copy of something else\n" * 100


def test_a_damaged_database_is_refused(tmp_path: Path) -> None:
    fill(url(tmp_path))
    path = tmp_path / "registry.db"
    with raw(tmp_path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(path.read_bytes())
    content[100:4096] = bytes(3996)
    path.write_bytes(content)
    with pytest.raises(RegistryError, match=r"no SQLite database, or a damaged one") as caught:
        Registry.open(url(tmp_path))
    one_line(caught)


def test_a_database_of_something_else_is_refused(tmp_path: Path) -> None:
    with raw(tmp_path) as connection:
        connection.execute("CREATE TABLE bookmarks (id INTEGER)")
    with pytest.raises(RegistryError, match=r"database of something else \(table bookmarks\)"):
        Registry.open(url(tmp_path))


def test_a_server_that_holds_other_tables(postgresql_url: str) -> None:
    engine = sa.create_engine(postgresql_url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE bookmarks (id INTEGER)")
    fill(postgresql_url)  # beside it
    with engine.begin() as connection:
        for (table,) in connection.exec_driver_sql(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        ).fetchall():
            connection.exec_driver_sql(f"DROP TABLE {table} CASCADE")
        connection.exec_driver_sql("CREATE TABLE tasks (id INTEGER)")
    with pytest.raises(RegistryError, match=r"database of something else \(table tasks\)"):
        Registry.open(postgresql_url)


# URLs.


@pytest.mark.parametrize(
    "bad",
    ["", "registry.db", "nosuch://x", "sqlite:/x", "://", "postgresql+nosuch://x/y", "mysql://root@x/y", "\0"],
)
def test_a_wrong_url_is_refused(bad: str) -> None:
    with pytest.raises(RegistryError) as caught:
        Registry.open(bad)
    one_line(caught)


@pytest.mark.parametrize(
    ("bad", "hint"),
    [
        ("postgresql+psycopg2://u:p@x/y", r"write postgresql\+psycopg://"),
        ("postgresql+asyncpg://x/y", r"write postgresql\+psycopg://"),
        ("sqlite+aiosqlite:///x.db", "write sqlite:///"),
    ],
)
def test_a_driver_that_is_not_supported(bad: str, hint: str) -> None:
    with pytest.raises(RegistryError, match=hint) as caught:
        Registry.open(bad)
    one_line(caught)


def test_a_missing_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(RegistryError, match=r"psycopg is not installed: pip install 'multisbora\[postgres\]'"):
        Registry.open("postgresql://user:secret@host/x")


def test_no_message_has_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        bad = [
            f"postgresql+psycopg://user:secret@127.0.0.1:{port}/x",
            "nosuch://user:secret@host/x",
            "postgresql+psycopg://user:secret@host:port/x",
            "postgresql+psycopg://user@host:port/x?password=secret",
            f"postgresql+psycopg://127.0.0.1:{port}/x?user=u&password=secret",
            f"postgresql+psycopg://u@127.0.0.1:{port}/x?sslpassword=secret",
            "postgresql+psycopg2://host/x?password=secret",
        ]
        for where in bad:
            with pytest.raises(RegistryError) as caught:
                Registry.open(where)
            assert "secret" not in one_line(caught)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"cannot be reached, nothing was written .*check the server") as caught:
        Registry.open(f"postgresql+psycopg://postgres@/postgres?host={tmp_path}")
    one_line(caught)


def test_plain_postgresql_takes_psycopg(postgresql_url: str) -> None:
    fill(postgresql_url.replace("postgresql+psycopg", "postgresql"))
    with Registry.open(postgresql_url, create=False) as registry:
        assert registry.compositions("tiny") == {"default": ("math",)}


def test_a_missing_store_is_not_made_on_request(tmp_path: Path, store_url: str) -> None:
    for where in (store_url, url(tmp_path / "deep")):
        with pytest.raises(MissingRegistryError, match=r"(does not exist|is empty): run multisbora allocate first"):
            Registry.open(where, create=False)
    assert list(tmp_path.iterdir()) == []
    Registry.open(url(tmp_path / "deep")).close()
    assert (tmp_path / "deep" / "registry.db").is_file()


def test_a_missing_store_is_not_made_by_a_uri(tmp_path: Path) -> None:
    missing = tmp_path / "a b.db"
    for start in (f"file:{missing}", f"file://{missing}", f"file://localhost{missing}"):
        with pytest.raises(MissingRegistryError, match="does not exist: run multisbora allocate first") as caught:
            Registry.open(f"sqlite:///{start}?uri=true".replace(" ", "%2520"), create=False)
        assert f"sqlite:///{start.replace(' ', '%20')}?uri=true" in str(caught.value)
    with pytest.raises(MissingRegistryError, match="does not exist"):
        Registry.open(f"sqlite:///file:{tmp_path}/none.db?mode=rw&uri=true")
    assert list(tmp_path.iterdir()) == []
    Registry.open(f"sqlite:///file:{missing}?uri=true").close()
    assert missing.is_file()
    Registry.open("sqlite:///file::memory:?uri=true").close()


def test_sqlite_without_a_write_ahead_log(tmp_path: Path) -> None:
    """A VFS without shared memory has none, and SQLite then answers "delete", without an error."""
    with pytest.raises(
        RegistryError, match=r"no write-ahead log .*put it on a local disk, or use postgresql"
    ) as caught:
        Registry.open(f"sqlite:///file:{tmp_path}/registry.db?vfs=unix-dotfile&uri=true")
    one_line(caught)


def test_a_store_by_sqlites_own_uri(tmp_path: Path) -> None:
    fill(url(tmp_path))
    with Registry.open(f"sqlite:///file:{tmp_path}/registry.db?mode=ro&uri=true") as registry:
        assert registry.compositions("tiny") == {"default": ("math",)}
        with pytest.raises(RegistryError, match="cannot be opened for writing"):
            registry.release("tiny", "math")


# Places.


def test_places_where_no_store_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RegistryError, match="its folder cannot be made"):
        Registry.open(url(tmp_path / "file" / "below"))
    with pytest.raises(RegistryError, match="is a folder"):
        Registry.open(f"sqlite:///{tmp_path}")


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "CIFS", "lustre", "fuse.sshfs"])
def test_a_network_file_system_is_refused_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    mounts = [("/", "ext4"), (str(tmp_path.resolve().parent), kind), (str(tmp_path.resolve() / "local"), "xfs")]
    found = [SimpleNamespace(mountpoint=place, fstype=fstype) for place, fstype in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: found)
    with pytest.raises(
        RegistryError, match=rf"network file system \({kind.lower()}\).*local disk.*postgresql"
    ) as caught:
        Registry.open(url(tmp_path / "deep" / "er"))
    assert "lose claims" in str(caught.value) and list(tmp_path.iterdir()) == []
    (tmp_path / "local").mkdir()
    Registry.open(url(tmp_path / "local" / "deep")).close()
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [])  # a system that does not say
    Registry.open(url(tmp_path)).close()


def test_a_read_only_store_is_refused_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(url(tmp_path))
    # As SQLite answers in a read-only folder; by rights alone, root would still be let in.
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3.dbapi2, "connect", lambda name, **options: connect(f"file:{name}?mode=ro", uri=True, **options)
    )
    with Registry.open(url(tmp_path)) as registry:
        assert registry.compositions("tiny") == {"default": ("math",)}
        with pytest.raises(RegistryError, match="cannot be opened for writing"):
            registry.release("tiny", "math")
    with pytest.raises(RegistryError, match="cannot be opened for writing"):
        Registry.open(url(tmp_path / "other"))


# Trouble on the way.


def test_a_store_that_stays_busy_says_so(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store_url)
    monkeypatch.setattr(database, "BUSY_SECONDS", 1)
    with Registry.open(store_url) as first, Registry.open(store_url) as second, first.transaction():
        assert "math" in second.claims("tiny")  # readers go on
        with pytest.raises(RegistryError, match="stayed busy for 1 s: another process holds it") as caught:
            second.release("tiny", "math")
        one_line(caught)


def test_a_full_disk_takes_back_the_whole_call(tmp_path: Path) -> None:
    fill(url(tmp_path))
    with Registry.open(url(tmp_path)) as registry:
        before = registry.claims("tiny")
        with registry.transaction(dry_run=True) as ledger:
            pages = ledger._connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            ledger._connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(RegistryError, match="its disk is full, nothing was written: free some space") as caught:
            many = [f"t{n}" for n in range(300)]
            allocate(registry, GEOMETRY, many, rank=1, target_modules=["q_proj"], composition={t: [t] for t in many})
        one_line(caught)
    with Registry.open(url(tmp_path)) as registry:
        assert registry.claims("tiny") == before and len(registry.compositions("tiny")) == 1


def test_a_server_gone_in_mid_transaction(postgresql_url: str) -> None:
    fill(postgresql_url)
    engine = sa.create_engine(postgresql_url, poolclass=sa.NullPool)
    with Registry.open(postgresql_url) as registry:
        with (
            pytest.raises(RegistryError, match=r"cannot be reached, nothing was written .*check the server") as caught,
            registry.transaction() as ledger,
        ):
            ledger.release("tiny", "math")
            with engine.begin() as other:
                other.exec_driver_sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            ledger.claims("tiny", "default")
        one_line(caught)
        assert list(registry.claims("tiny")) == ["math"]  # the next question finds a new connection


def test_a_server_gone_while_it_commits(postgresql_url: str) -> None:
    """Nobody can say then whether it was written, and the message does not pretend to."""
    fill(postgresql_url)
    engine = sa.create_engine(postgresql_url, poolclass=sa.NullPool)
    opened = Database.open(postgresql_url)
    with (
        pytest.raises(
            RegistryError, match=r"may be there or not, as one: run the same again .*check the server"
        ) as caught,
        opened.connect(write=True) as connection,
    ):
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        connection.exec_driver_sql("UPDATE tasks SET stage = 'training'")
        with engine.begin() as other:
            other.exec_driver_sql(f"SELECT pg_terminate_backend({pid})")
    one_line(caught)
    opened.close()
    with Registry.open(postgresql_url) as registry:
        assert registry.task("tiny", "math").stage == "allocated"


def test_tables_that_somebody_dropped(tmp_path: Path) -> None:
    fill(url(tmp_path))
    with raw(tmp_path) as connection:
        connection.execute("DROP TABLE yields")
    with (
        Registry.open(url(tmp_path)) as registry,
        pytest.raises(RegistryError, match="no such table: yields") as caught,
    ):
        registry.claims("tiny")
    assert "see multisbora registry check" in one_line(caught)


@pytest.mark.parametrize("default", ["repeatable read", "serializable"])
def test_writers_see_what_those_before_them_wrote(postgresql_url: str, default: str) -> None:
    """Whatever isolation the role has by default."""
    engine = sa.create_engine(postgresql_url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        name = connection.exec_driver_sql("SELECT current_database()").scalar_one()
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_isolation = '{default}'")
    fill(postgresql_url)
    results: list[object] = []

    def go(task: str, variant: str) -> None:
        try:
            with Registry.open(postgresql_url) as registry:
                allocate(registry, GEOMETRY, [task], rank=2, variant=variant, target_modules="all-linear")  # type: ignore[arg-type]
        except RegistryError as error:
            results.append(error)

    threads = [threading.Thread(target=go, args=found) for found in (("x", "fa"), ("y", "fb"), ("z", "fa"))]
    with Registry.open(postgresql_url) as registry:
        with registry.transaction():  # all three wait behind this
            for thread in threads:
                thread.start()
            time.sleep(0.5)
        for thread in threads:
            thread.join()
        assert results == [] and check(registry).ok
        assert sorted(registry.claims("tiny")) == ["math", "x", "y", "z"]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("40001", "busy with another writer, nothing was written .*: run it again"),
        ("40P01", "busy with another writer, nothing was written .*: run it again"),
        ("55P03", "stayed busy for 60 s"),
        ("53100", "its disk is full, nothing was written"),
        ("25006", "ask for the right to write there"),
        ("42501", "ask for the right to write there"),
        ("57P01", "cannot be reached, nothing was written"),
        ("08006", "cannot be reached, nothing was written"),
        ("22012", "failed, nothing was written .* see multisbora registry check"),
    ],
)
def test_what_a_server_says_in_any_language(postgresql_url: str, state: str, words: str) -> None:
    opened = Database.open(postgresql_url)
    with pytest.raises(RegistryError, match=words) as caught, opened.connect(write=True) as connection:
        connection.exec_driver_sql(f"DO $$ BEGIN RAISE 'kaputt' USING ERRCODE = '{state}'; END $$")
    one_line(caught)
    opened.close()


def test_a_role_without_rights(postgresql_url: str) -> None:
    fill(postgresql_url)
    engine = sa.create_engine(postgresql_url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        name = connection.exec_driver_sql("SELECT current_database()").scalar_one()
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    with (
        Registry.open(postgresql_url) as registry,
        pytest.raises(RegistryError, match="ask for the right to write there"),
    ):
        registry.release("tiny", "math")


def test_a_store_whose_tables_were_dropped_is_made_anew(postgresql_url: str) -> None:
    """Functions of the guards outlive their tables."""
    fill(postgresql_url)
    engine = sa.create_engine(postgresql_url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP TABLE {', '.join((*metadata.tables, VERSION_TABLE))} CASCADE")
    fill(postgresql_url)
    with Registry.open(postgresql_url) as registry:
        assert check(registry).ok


def test_two_that_forgot_to_wait_for_each_other(postgresql_url: str) -> None:
    """Past the API and its lock, the guard of crossings makes the second writer wait, and then refuses it."""
    with Registry.open(postgresql_url) as registry:
        for task, variant in (("columns", "fa"), ("rows", "fb")):
            allocate(registry, GEOMETRY, [task], rank=2, variant=variant, composition=task, target_modules="all-linear")  # type: ignore[arg-type]
    engine = sa.create_engine(postgresql_url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO compositions (model_id, name) VALUES (1, 'both')")
    outcome: list[Any] = []

    def second() -> None:
        try:
            with engine.begin() as connection:
                connection.exec_driver_sql("INSERT INTO memberships (task_id, composition_id) VALUES (2, 3)")
        except sa.exc.IntegrityError as error:
            outcome.append(str(error.orig))

    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO memberships (task_id, composition_id) VALUES (1, 3)")
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
    thread.join()
    assert len(outcome) == 1 and "own the cells where they cross" in outcome[0]


def test_what_the_database_refuses_is_an_allocation_error(store_url: str) -> None:
    fill(store_url)
    opened = Database.open(store_url)
    with (
        pytest.raises(AllocationError, match=r"nothing was written .*run multisbora registry check") as caught,
        opened.connect(write=True) as connection,
    ):
        connection.exec_driver_sql("INSERT INTO claims SELECT * FROM claims")
    one_line(caught)
    opened.close()
