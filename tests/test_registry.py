"""The store of claims: what the database itself refuses, what survives, and what a broken store says."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from multisbora import registry as store
from multisbora.allocator import allocate
from multisbora.errors import AllocationError, RegistryError, UsageError
from multisbora.geometry import Geometry, Matrix
from multisbora.region import Region
from multisbora.registry import Registry, TaskClaims, check_name

GEOMETRY = Geometry(
    "tiny",
    "llama",
    tuple(
        Matrix(f"model.layers.{layer}.{name}", f"model.layers.{layer}.{name}.weight", *shape)
        for layer in range(2)
        for name, shape in {"q_proj": (8, 16), "down_proj": (12, 16)}.items()
    ),
)
Q0 = "model.layers.0.q_proj"


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'registry.db'}"


@contextmanager
def raw(folder: Path) -> Iterator[sqlite3.Connection]:
    """The store past the API, as any other program would open it. Commits at the end."""
    with closing(sqlite3.connect(folder / "registry.db")) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        yield connection
        connection.commit()


def filled(folder: Path) -> TaskClaims:
    with Registry.open(url(folder)) as registry:
        return allocate(registry, GEOMETRY, ["math", "code"], rank=4, target_modules="all-linear").tasks["math"]


def test_claims_survive_reopening(tmp_path: Path) -> None:
    math = filled(tmp_path)
    with Registry.open(url(tmp_path), create=False) as registry:
        assert registry.models() == {"tiny": GEOMETRY.digest}
        assert registry.compositions("tiny") == {"default": ("math", "code")}
        assert registry.compositions("other") == {} and registry.claims("other") == {}
        assert list(registry.claims("tiny")) == ["math", "code"]
        assert registry.task("tiny", "math") == math == registry.claims("tiny")["math"]
        assert registry.task("tiny", "math").digest == math.digest
        assert list(math.regions) == [matrix.module for matrix in GEOMETRY.matrices]
        assert registry.claimed("tiny") == {(matrix.module, 1): 8 for matrix in GEOMETRY.matrices}


def test_the_row_a_claim_and_the_row_a_matrix_agree(tmp_path: Path) -> None:
    math = filled(tmp_path)
    with raw(tmp_path) as connection:
        rows = connection.execute(
            "SELECT module, axis, channel FROM claims JOIN matrices ON matrices.id = matrix_id "
            "JOIN memberships ON memberships.id = membership_id JOIN tasks ON tasks.id = task_id WHERE name = 'math'"
        ).fetchall()
    expected = [(module, 1, index) for module, region in math.regions.items() for index in region.indices]
    assert sorted(rows) == sorted(expected)


def test_the_database_refuses_a_double_claim(tmp_path: Path) -> None:
    filled(tmp_path)
    insert = "INSERT INTO claims VALUES (?, ?, ?, ?, ?)"
    with raw(tmp_path) as connection:
        columns = "composition_id, matrix_id, axis, channel, membership_id"
        theirs = connection.execute(f"SELECT {columns} FROM claims").fetchone()
        other = connection.execute("SELECT id FROM memberships WHERE id != ?", theirs[-1:]).fetchone()
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE constraint failed: claims"):
            connection.execute(insert, (*theirs[:-1], *other))
        connection.execute(insert, (*theirs[:2], 0, *theirs[3:]))  # the other axis is nobody's


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ((1, 1, 0, 0, 99), "FOREIGN KEY"),
        ((2, 1, 0, 0, 1), "FOREIGN KEY"),
        ((1, 99, 0, 0, 1), "FOREIGN KEY"),
        ((1, 1, 2, 0, 1), "CHECK"),
        ((1, 1, 0, -1, 1), "CHECK"),
    ],
)
def test_the_database_refuses_claims_of_nobody_and_nothing(tmp_path: Path, row: tuple[int, ...], why: str) -> None:
    filled(tmp_path)
    with raw(tmp_path) as connection, pytest.raises(sqlite3.IntegrityError, match=why):
        connection.execute("INSERT INTO claims VALUES (?, ?, ?, ?, ?)", row)


def test_a_double_claim_through_the_ledger_writes_nothing(tmp_path: Path) -> None:
    math = filled(tmp_path)
    thief = TaskClaims("tiny", GEOMETRY.digest, "default", "thief", "fa", 4, math.regions)
    with Registry.open(url(tmp_path)) as registry:
        with (
            pytest.raises(AllocationError, match="claims that others hold, nothing was written"),
            registry.transaction() as ledger,
        ):
            ledger.add(thief)
        assert registry.compositions("tiny") == {"default": ("math", "code")}
        assert len(registry.events()) == 3
        with registry.transaction() as ledger:  # another composition is another matter
            ledger.add(TaskClaims("tiny", GEOMETRY.digest, "apart", "thief", "fa", 4, math.regions))
        assert registry.compositions("tiny") == {"apart": ("thief",), "default": ("math", "code")}


def test_an_exception_takes_everything_back(tmp_path: Path) -> None:
    with Registry.open(url(tmp_path)) as registry:
        with pytest.raises(ZeroDivisionError), registry.transaction() as ledger:
            ledger.register(GEOMETRY)
            raise ZeroDivisionError
        assert registry.models() == {} and registry.events() == []


def test_the_schema_keeps_the_constraint_on_every_database() -> None:
    from sqlalchemy.dialects import postgresql, sqlite

    for dialect in (postgresql.dialect(), sqlite.dialect()):
        made = str(sa.schema.CreateTable(store.claims).compile(dialect=dialect))
        assert "PRIMARY KEY (composition_id, matrix_id, axis, channel)" in made
        assert ("WITHOUT ROWID" in made) == (dialect.name == "sqlite")


def test_sqlite_is_opened_with_care(tmp_path: Path) -> None:
    filled(tmp_path)
    with raw(tmp_path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("SELECT version FROM multisbora_schema").fetchall() == [(store.SCHEMA_VERSION,)]


def test_a_store_in_memory() -> None:
    with Registry.open("sqlite://") as registry:
        allocate(registry, GEOMETRY, ["math"], rank=4, target_modules="all-linear")
        assert registry.compositions("tiny") == {"default": ("math",)}


def test_an_unknown_task_says_what_to_run(tmp_path: Path) -> None:
    filled(tmp_path)
    with Registry.open(url(tmp_path)) as registry:
        with pytest.raises(RegistryError, match="run multisbora allocate --tasks law"):
            registry.task("tiny", "law")
        with pytest.raises(RegistryError, match=r"in composition 'other' \(it has some in default\)"):
            registry.task("tiny", "math", "other")


def test_release_gives_back_and_history_stays(tmp_path: Path) -> None:
    math = filled(tmp_path)
    with Registry.open(url(tmp_path)) as registry:
        allocate(registry, GEOMETRY, ["math"], rank=4, target_modules="all-linear", composition="b")
        with pytest.raises(RegistryError, match="in composition 'c': nothing to release"):
            registry.release("tiny", "math", "c")
        assert registry.release("tiny", "math", "b") == ("b",)
        assert registry.task("tiny", "math") == math
        assert registry.release("tiny", "math") == ("default",)
        assert registry.compositions("tiny") == {"default": ("code",)}
        assert registry.claimed("tiny") == {(matrix.module, 1): 4 for matrix in GEOMETRY.matrices}
        with pytest.raises(RegistryError, match="in any composition: nothing to release"):
            registry.release("tiny", "math")
        again = allocate(registry, GEOMETRY, ["math"], rank=2, target_modules="all-linear").tasks["math"]
        assert again.rank == 2
        history = [(event.action, event.task, event.composition) for event in registry.events()]
    assert history == [
        ("register", None, None),
        ("allocate", "math", "default"),
        ("allocate", "code", "default"),
        ("allocate", "math", "b"),
        ("release", "math", "b"),
        ("release", "math", "default"),
        ("allocate", "math", "default"),
    ]
    with raw(tmp_path) as connection:
        for table in ("claims", "regions"):
            orphans = f"SELECT count(*) FROM {table} WHERE membership_id NOT IN (SELECT id FROM memberships)"
            assert connection.execute(orphans).fetchone() == (0,)


def test_events_say_who_did_what_when(tmp_path: Path) -> None:
    math = filled(tmp_path)
    with Registry.open(url(tmp_path)) as registry:
        event = registry.events()[1]
    assert event.at.endswith("+00:00") and "@" in event.actor and event.model == "tiny"
    assert event.detail == {"variant": "fa", "rank": 4, "matrices": 4, "claim_digest": math.digest}


def test_events_are_append_only(tmp_path: Path) -> None:
    filled(tmp_path)
    with raw(tmp_path) as connection:
        for statement in ("DELETE FROM events", "UPDATE events SET actor = 'nobody'"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                connection.execute(statement)


def test_the_digest_covers_every_part_but_the_composition() -> None:
    base = TaskClaims("m", "g", "c", "t", "fa", 2, {"x.0.q": Region("fa", (1, 2))})
    others = [
        TaskClaims("m2", "g", "c", "t", "fa", 2, base.regions),
        TaskClaims("m", "g2", "c", "t", "fa", 2, base.regions),
        TaskClaims("m", "g", "c", "t2", "fa", 2, base.regions),
        TaskClaims("m", "g", "c", "t", "fb", 2, base.regions),
        TaskClaims("m", "g", "c", "t", "fa", 3, base.regions),
        TaskClaims("m", "g", "c", "t", "fa", 2, {"x.1.q": Region("fa", (1, 2))}),
        TaskClaims("m", "g", "c", "t", "fa", 2, {"x.0.q": Region("fa", (1, 3))}),
        TaskClaims("m", "g", "c", "t", "fa", 2, {"x.0.q": Region("fa", (1, 2), (0,))}),
    ]
    assert len({claims.digest for claims in (base, *others)}) == 1 + len(others)
    # A task has the same regions, and one adapter, in all of its compositions.
    assert TaskClaims("m", "g", "other", "t", "fa", 2, base.regions).digest == base.digest
    two = {"x.0.q": Region("fa", (1, 2)), "x.1.q": Region("fa", (3, 4))}
    forward = TaskClaims("m", "g", "c", "t", "fa", 2, two)
    assert forward.digest == TaskClaims("m", "g", "c", "t", "fa", 2, dict(reversed(two.items()))).digest
    assert base.to_json() == {"variant": "fa", "rank": 2, "regions": {"x.0.q": [1, 2]}}


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    with raw(tmp_path) as connection:
        connection.execute("UPDATE multisbora_schema SET version = 99")
    with pytest.raises(RegistryError, match="has schema 99, this multisbora reads up to 1: upgrade"):
        Registry.open(url(tmp_path))


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_bytes(b"my only copy of something else\n" * 100)
    with pytest.raises(RegistryError, match="is no SQLite database") as caught:
        Registry.open(url(tmp_path))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "registry.db").read_bytes() == b"my only copy of something else\n" * 100


def test_a_damaged_database_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    path = tmp_path / "registry.db"
    with raw(tmp_path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(path.read_bytes())
    content[100:4096] = bytes(3996)
    path.write_bytes(content)
    with pytest.raises(RegistryError, match=r"no SQLite database, or a damaged one"), Registry.open(url(tmp_path)):
        pass


def test_a_database_of_something_else_is_refused(tmp_path: Path) -> None:
    with raw(tmp_path) as connection:
        connection.execute("CREATE TABLE bookmarks (id INTEGER)")
    with pytest.raises(RegistryError, match="database of something else"):
        Registry.open(url(tmp_path))


@pytest.mark.parametrize("bad", ["", "registry.db", "nosuch://x", "sqlite:/x", "://", "postgresql+nosuch://x/y"])
def test_a_wrong_url_is_refused(bad: str) -> None:
    with pytest.raises(RegistryError) as caught:
        Registry.open(bad)
    assert "\n" not in str(caught.value)


def test_a_missing_store_is_not_made_on_request(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="does not exist: run multisbora allocate first"):
        Registry.open(url(tmp_path / "deep"), create=False)
    assert list(tmp_path.iterdir()) == []
    Registry.open(url(tmp_path / "deep")).close()
    assert (tmp_path / "deep" / "registry.db").is_file()


def test_a_store_by_sqlites_own_uri(tmp_path: Path) -> None:
    filled(tmp_path)
    with Registry.open(f"sqlite:///file:{tmp_path}/registry.db?mode=ro&uri=true") as registry:
        assert registry.compositions("tiny") == {"default": ("math", "code")}
        with pytest.raises(RegistryError, match="cannot be opened for writing"):
            registry.release("tiny", "math")


def test_places_where_no_store_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RegistryError, match="its folder cannot be made"):
        Registry.open(url(tmp_path / "file" / "below"))
    with pytest.raises(RegistryError, match="is a folder"):
        Registry.open(f"sqlite:///{tmp_path}")


def test_a_read_only_store_is_refused_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    # As SQLite answers in a read-only folder; by rights alone, root would still be let in.
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3.dbapi2, "connect", lambda name, **options: connect(f"file:{name}?mode=ro", uri=True, **options)
    )
    with Registry.open(url(tmp_path)) as registry:
        assert registry.compositions("tiny") == {"default": ("math", "code")}
        with pytest.raises(RegistryError, match="cannot be opened for writing"):
            registry.release("tiny", "math")
    with pytest.raises(RegistryError, match="cannot be opened for writing"):
        Registry.open(url(tmp_path / "other"))


def test_a_store_that_stays_busy_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    monkeypatch.setattr(store, "BUSY_SECONDS", 0)
    with raw(tmp_path) as blocker, Registry.open(url(tmp_path)) as registry:
        blocker.execute("BEGIN IMMEDIATE")
        assert "math" in registry.claims("tiny")  # readers go on
        with pytest.raises(RegistryError, match="stayed busy"):
            registry.release("tiny", "math")


@pytest.mark.parametrize(
    "bad",
    [
        "",
        " ",
        ".",
        "..",
        ".hidden",
        "-x",
        "a b",
        "a/b",
        "../a",
        "a\\b",
        "a\n",
        "a\0",
        "ä",
        "x" * 101,
        "y" * 10_000,
        None,
        3,
    ],
)
def test_hostile_names_are_refused_in_one_short_line(bad: str) -> None:
    with pytest.raises(UsageError, match="composition name") as caught:
        check_name(bad, "composition")
    message = str(caught.value)
    assert len(message) < 250 and message.isprintable()


@given(st.text())
def test_names_that_pass_are_safe(name: str) -> None:
    try:
        check_name(name)
    except UsageError:
        return
    assert name.isascii() and "/" not in name and name[0] not in ".-" and 0 < len(name) <= 100


def test_ordinary_names_pass() -> None:
    for name in ("math", "commonsense_170k", "gsm8k-v1.2", "7", "x" * 100):
        assert check_name(name) == name
