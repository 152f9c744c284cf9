"""The durable store of models, tasks, compositions and claims: SQLAlchemy over SQLite, or another database by URL.

The primary key of `claims` is (composition, matrix, axis, channel). Therefore the database itself refuses that two
tasks of one composition hold the same column or the same row (design, section 7.1), whatever the code above it does.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from .errors import AllocationError, RegistryError, UsageError
from .geometry import Geometry
from .region import Region, Variant, own_axis

SCHEMA_VERSION = 1
DEFAULT_COMPOSITION = "default"
BUSY_SECONDS = 60  # how long a writer waits for the writers before it
MAX_NAME = 100
_STORED = np.dtype("<u4")

Indices = npt.NDArray[np.unsignedinteger[Any]]

metadata = sa.MetaData()

schema = sa.Table("multisbora_schema", metadata, sa.Column("version", sa.Integer, primary_key=True))

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

tasks = sa.Table(
    "tasks",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("model_id", sa.ForeignKey("models.id"), nullable=False),
    sa.Column("name", sa.String(MAX_NAME), nullable=False),
    sa.Column("variant", sa.String(2), nullable=False),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.UniqueConstraint("model_id", "name"),
    sa.CheckConstraint("variant IN ('fa', 'fb')"),
    sa.CheckConstraint("rank > 0"),
)

# A task in a composition. Its id grows with time, so it also says which of two claims came first.
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

claims = sa.Table(
    "claims",
    metadata,
    sa.Column("composition_id", sa.Integer, primary_key=True),
    sa.Column("matrix_id", sa.ForeignKey("matrices.id"), primary_key=True),
    sa.Column("axis", sa.SmallInteger, primary_key=True),  # 0 rows (fb), 1 columns (fa)
    sa.Column("channel", sa.Integer, primary_key=True),  # the claimed row or column
    sa.Column("membership_id", sa.Integer, nullable=False, index=True),
    sa.ForeignKeyConstraint(["membership_id", "composition_id"], ["memberships.id", "memberships.composition_id"]),
    sa.CheckConstraint("axis IN (0, 1)"),
    sa.CheckConstraint("channel >= 0"),
    sqlite_with_rowid=False,
)

# The same claims, one row a matrix, for reading: of 50 tasks of a large model `claims` has millions of rows. Also holds
# Region.excluded, which must stay what it was when the task it yields to is released. Both columns: sorted "<u4".
regions = sa.Table(
    "regions",
    metadata,
    sa.Column("membership_id", sa.ForeignKey("memberships.id"), primary_key=True),
    sa.Column("matrix_id", sa.ForeignKey("matrices.id"), primary_key=True),
    sa.Column("indices", sa.LargeBinary, nullable=False),
    sa.Column("excluded", sa.LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

events_table = sa.Table(
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
for _verb in ("UPDATE", "DELETE"):
    _trigger = sa.DDL(
        f"CREATE TRIGGER events_no_{_verb.lower()} BEFORE {_verb} ON events "
        "BEGIN SELECT RAISE(ABORT, 'events is append-only'); END"
    )
    sa.event.listen(events_table, "after_create", _trigger.execute_if(dialect="sqlite"))


@dataclass(frozen=True)
class TaskClaims:
    """What one task holds in one composition of one model.

    Attributes:
        rank: the rank asked for; a `rank_pattern` may give single regions another.
        regions: module name -> region.
    """

    model: str
    geometry_digest: str
    composition: str
    task: str
    variant: Variant
    rank: int
    regions: dict[str, Region]

    @property
    def digest(self) -> str:
        """sha256 (hex) of all of it but the composition: a task holds the same regions in each of its compositions.

        An adapter carries this, so that claims which changed since training show.
        """
        content = {
            "model": self.model,
            "geometry_digest": self.geometry_digest,
            "task": self.task,
            "variant": self.variant,
            "rank": self.rank,
            "regions": {name: [list(r.indices), list(r.excluded)] for name, r in self.regions.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """`{"variant", "rank", "regions": {module: sorted indices}}`, as in design section 6."""
        regions = {name: list(region.indices) for name, region in self.regions.items()}
        return {"variant": self.variant, "rank": self.rank, "regions": regions}


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the store's history: who did what, when (ISO 8601, UTC)."""

    at: str
    actor: str
    action: str
    model: str
    composition: str | None
    task: str | None
    detail: dict[str, Any]


def check_name(name: str, what: str = "task") -> str:
    """Return `name` if it can stand for a task or composition in a folder name, a URL and a command line.

    Raises:
        UsageError: it is empty, longer than 100 characters, or has others than letters, digits, dot, dash, underscore.
    """
    if isinstance(name, str) and len(name) <= MAX_NAME and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        return name
    shown = repr(name) if len(repr(name)) <= 60 else repr(name)[:60] + "..."
    raise UsageError(
        f"{what} name {shown} is not usable: at most {MAX_NAME} letters, digits, '.', '-' or '_', "
        "and neither dot nor dash first"
    )


class Registry:
    """An open store. Use `Registry.open`, then close it, or use it in a `with`.

    Safe to open from many processes: writers wait for each other (SQLite: BEGIN IMMEDIATE).
    """

    def __init__(self, engine: sa.Engine, where: str) -> None:
        self._engine = engine
        self._where = where

    @classmethod
    def open(cls, url: str, *, create: bool = True) -> Registry:
        """Open a store, and make it if it is not there.

        Args:
            url: SQLAlchemy URL, "sqlite:///registry/registry.db" (relative to the working folder) or "sqlite://"
                (in memory).
            create: False refuses an SQLite file that does not exist, for callers that must write nothing.

        Raises:
            RegistryError: wrong URL, no such store, not a multisbora store, one of a newer schema, or not writable.
        """
        try:
            parsed = sa.make_url(url)
            where = parsed.render_as_string(hide_password=True)
            memory = parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:")
            engine = sa.create_engine(parsed, **({"poolclass": sa.StaticPool} if memory else {}))
        except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ValueError):
            shown = url.rpartition("@")[2]  # no password
            raise RegistryError(f"registry URL {shown!r} is not usable: write sqlite:///path/to/registry.db") from None
        except ImportError as error:
            raise RegistryError(f"registry {where}: its driver {error.name} is not installed: pip install it") from None
        if engine.dialect.name == "sqlite":
            _prepare_sqlite(engine)
            if parsed.database and not memory and not parsed.database.startswith("file:"):
                _prepare_file(Path(parsed.database), where, create)
        registry = cls(engine, where)
        try:
            registry._ensure_schema()
        except BaseException:
            registry.close()
            raise
        return registry

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Registry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def transaction(self, *, dry_run: bool = False) -> Iterator[Ledger]:
        """All writes of the block, or none: committed at its end, taken back on an exception, or by `dry_run`.

        Other writers wait until it ends, so what the block read stays true while it writes.

        Raises:
            RegistryError: the store cannot be written, or stayed busy for a minute.
            AllocationError: the database refused a double claim.
        """
        with self._connection(write=True, keep=not dry_run) as connection:
            connection.execute(sa.select(schema.c.version).with_for_update())  # serialises writers beyond SQLite
            yield Ledger(connection)

    def claims(self, model: str, composition: str = DEFAULT_COMPOSITION) -> dict[str, TaskClaims]:
        """Claims of every task of a composition, earliest first. Empty for a model or composition without any."""
        with self._connection() as connection:
            return Ledger(connection).claims(model, composition)

    def task(self, model: str, task: str, composition: str = DEFAULT_COMPOSITION) -> TaskClaims:
        """Claims of one task.

        Raises:
            RegistryError: it has none in this composition.
        """
        with self._connection() as connection:
            found = Ledger(connection).memberships(model, task)
        if composition not in found:
            there = f" (it has some in {', '.join(found)})" if found else ""
            raise RegistryError(
                f"task {task!r} has no claims on {model} in composition {composition!r}{there}: "
                f"run multisbora allocate --tasks {task}"
            )
        return found[composition]

    def models(self) -> dict[str, str]:
        """Registered models, by name: their geometry digests."""
        with self._connection() as connection:
            rows = connection.execute(sa.select(models.c.name, models.c.geometry_digest).order_by(models.c.name))
            return {name: digest for name, digest in rows}

    def compositions(self, model: str) -> dict[str, tuple[str, ...]]:
        """Compositions of a model that have tasks, by name: their tasks, earliest claim first."""
        query = (
            sa.select(compositions.c.name, tasks.c.name)
            .select_from(memberships.join(tasks).join(compositions, memberships.c.composition_id == compositions.c.id))
            .where(tasks.c.model_id.in_(sa.select(models.c.id).where(models.c.name == model)))
            .order_by(compositions.c.name, memberships.c.id)
        )
        found: dict[str, tuple[str, ...]] = {}
        with self._connection() as connection:
            for composition, task in connection.execute(query):
                found[composition] = (*found.get(composition, ()), task)
        return found

    def claimed(self, model: str, composition: str = DEFAULT_COMPOSITION) -> dict[tuple[str, int], int]:
        """How many indices are held: (module, axis) -> count. Pairs without claims are left out."""
        with self._connection() as connection:
            return {key: len(indices) for key, indices in Ledger(connection).taken(model, composition).items()}

    def release(self, model: str, task: str, composition: str | None = None) -> tuple[str, ...]:
        """Give the claims of a task back, in one composition or in all. The history stays.

        Returns:
            The compositions in which it held claims.

        Raises:
            RegistryError: it holds none there.
        """
        with self.transaction() as ledger:
            return ledger.release(model, task, composition)

    def events(self) -> list[Event]:
        """The history of the store, oldest first."""
        columns = [column for column in events_table.c if column.name != "id"]
        with self._connection() as connection:
            rows = connection.execute(sa.select(*columns).order_by(events_table.c.id)).all()
        return [
            Event(at, actor, action, model, composition, task, json.loads(detail))
            for at, actor, action, model, composition, task, detail in rows
        ]

    @contextmanager
    def _connection(self, *, write: bool = False, keep: bool = True) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect() as connection:
                transaction = connection.execution_options(multisbora_write=write).begin()
                yield connection
                if keep:
                    transaction.commit()
                else:
                    transaction.rollback()
        except sa.exc.IntegrityError as error:
            raise AllocationError(
                f"registry {self._where} refused claims that others hold, nothing was written ({error.orig}): try again"
            ) from error
        except sa.exc.DBAPIError as error:
            raise RegistryError(_explain(self._where, error)) from error

    def _ensure_schema(self) -> None:
        with self._connection() as connection:
            if self._is_ready(connection):
                return
        with self._connection(write=True) as connection:
            if not self._is_ready(connection):  # another process may have been quicker
                metadata.create_all(connection)
                connection.execute(schema.insert().values(version=SCHEMA_VERSION))

    def _is_ready(self, connection: sa.Connection) -> bool:
        """Whether the tables are there, in the version that this code reads; False means that they can be made."""
        present = sa.inspect(connection).get_table_names()
        if schema.name not in present:
            if present and connection.dialect.name == "sqlite":
                raise RegistryError(f"registry {self._where} is a database of something else: give another file")
            return False
        version = connection.execute(sa.select(sa.func.max(schema.c.version))).scalar_one_or_none()
        if version is not None and version > SCHEMA_VERSION:
            raise RegistryError(
                f"registry {self._where} has schema {version}, this multisbora reads up to {SCHEMA_VERSION}: upgrade it"
            )
        return version is not None


class Ledger:
    """Reads and writes inside one transaction of a registry: what `Registry.transaction` gives."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def register(self, geometry: Geometry) -> None:
        """Make a model known; nothing to do if it is, with these matrices.

        Raises:
            RegistryError: the name stands for a model with other matrices.
        """
        query = sa.select(models.c.geometry_digest).where(models.c.name == geometry.model)
        known = self._connection.execute(query).scalar_one_or_none()
        if known == geometry.digest:
            return
        if known is not None:
            raise RegistryError(
                f"model {geometry.model!r} is registered with other matrices (geometry {known[:12]}, now "
                f"{geometry.digest[:12]}): give this one another name, or use another registry"
            )
        row = {"name": geometry.model, "model_type": geometry.model_type, "geometry_digest": geometry.digest}
        model_id = self._insert(models, row)
        self._connection.execute(
            matrices.insert(),
            [
                {
                    "model_id": model_id,
                    "module": matrix.module,
                    "out_features": matrix.out_features,
                    "in_features": matrix.in_features,
                }
                for matrix in geometry.matrices
            ],
        )
        self._record("register", geometry.model, detail={"geometry_digest": geometry.digest})

    def claims(self, model: str, composition: str) -> dict[str, TaskClaims]:
        """Claims of every task of a composition, earliest first."""
        return {found.task: found for found in self._load(models.c.name == model, compositions.c.name == composition)}

    def memberships(self, model: str, task: str) -> dict[str, TaskClaims]:
        """Claims of one task in every composition that it is in, by composition, earliest first."""
        return {found.composition: found for found in self._load(models.c.name == model, tasks.c.name == task)}

    def taken(self, model: str, composition: str) -> dict[tuple[str, int], Indices]:
        """The indices that are held: (module, axis) -> indices, in no order. Pairs without claims are left out."""
        names = self._modules(model)
        rows = self._connection.execute(
            sa.select(regions.c.matrix_id, tasks.c.variant, regions.c.indices)
            .select_from(_joined().join(regions, regions.c.membership_id == memberships.c.id))
            .where(models.c.name == model, compositions.c.name == composition)
        )
        parts: dict[tuple[int, Variant], list[bytes]] = {}
        for matrix_id, variant, indices in rows:
            parts.setdefault((matrix_id, variant), []).append(indices)
        return {
            (names[matrix_id], own_axis(variant)): np.frombuffer(b"".join(found), _STORED)
            for (matrix_id, variant), found in parts.items()
        }

    def add(self, new: TaskClaims) -> None:
        """Write the claims of a task that holds none in this composition. Its model must be registered.

        Raises:
            sqlalchemy.exc.IntegrityError: another task holds one of the indices (an AllocationError outside of the
                transaction's block).
        """
        model_id = self._connection.execute(sa.select(models.c.id).where(models.c.name == new.model)).scalar_one()
        ids = {module: matrix_id for matrix_id, module in self._modules(new.model).items()}
        row = {"model_id": model_id, "name": new.task, "variant": new.variant, "rank": new.rank}
        task_id = self._find(tasks, model_id, new.task) or self._insert(tasks, row)
        composition_id = self._find(compositions, model_id, new.composition) or self._insert(
            compositions, {"model_id": model_id, "name": new.composition}
        )
        membership_id = self._insert(memberships, {"task_id": task_id, "composition_id": composition_id})
        axis = own_axis(new.variant)
        self._insert_many(
            claims,
            ("composition_id", "matrix_id", "axis", "channel", "membership_id"),
            [
                (composition_id, ids[module], axis, channel, membership_id)
                for module, region in new.regions.items()
                for channel in region.indices
            ],
        )
        self._insert_many(
            regions,
            ("membership_id", "matrix_id", "indices", "excluded"),
            [
                (membership_id, ids[module], _pack(region.indices), _pack(region.excluded))
                for module, region in new.regions.items()
            ],
        )
        detail = {"variant": new.variant, "rank": new.rank, "matrices": len(new.regions), "claim_digest": new.digest}
        self._record("allocate", new.model, new.composition, new.task, detail)

    def release(self, model: str, task: str, composition: str | None = None) -> tuple[str, ...]:
        """Give the claims of a task back, in one composition or in all; returns the compositions.

        Raises:
            RegistryError: it holds none there.
        """
        query = (
            sa.select(memberships.c.id, compositions.c.name, tasks.c.id)
            .select_from(_joined())
            .where(models.c.name == model, tasks.c.name == task)
            .order_by(memberships.c.id)
        )
        held = self._connection.execute(query).all()
        leaving = [row for row in held if composition in (None, row[1])]
        if not leaving:
            where = f"in composition {composition!r}" if composition else "in any composition"
            raise RegistryError(f"task {task!r} has no claims on {model} {where}: nothing to release")
        for membership_id, name, _ in leaving:
            for table in (claims, regions):
                self._connection.execute(table.delete().where(table.c.membership_id == membership_id))
            self._connection.execute(memberships.delete().where(memberships.c.id == membership_id))
            self._record("release", model, name, task)
        if len(leaving) == len(held):
            self._connection.execute(tasks.delete().where(tasks.c.id == held[0][2]))
        return tuple(name for _, name, _ in leaving)

    def _load(self, *where: sa.ColumnElement[bool]) -> list[TaskClaims]:
        heads = self._connection.execute(
            sa.select(
                memberships.c.id,
                models.c.name,
                models.c.geometry_digest,
                compositions.c.name,
                tasks.c.name,
                tasks.c.variant,
                tasks.c.rank,
            )
            .select_from(_joined())
            .where(*where)
            .order_by(memberships.c.id)
        ).all()
        if not heads:
            return []
        names = self._modules(heads[0][1])
        variants = {head[0]: head[5] for head in heads}
        held: dict[int, dict[str, Region]] = {head[0]: {} for head in heads}
        rows = self._connection.execute(
            sa.select(regions)
            .where(regions.c.membership_id.in_(list(held)))
            .order_by(regions.c.membership_id, regions.c.matrix_id)
        )
        for membership_id, matrix_id, indices, excluded in rows:
            region = Region(variants[membership_id], _unpack(indices), _unpack(excluded))
            held[membership_id][names[matrix_id]] = region
        return [
            TaskClaims(model, digest, composition, task, variant, rank, held[membership_id])
            for membership_id, model, digest, composition, task, variant, rank in heads
        ]

    def _modules(self, model: str) -> dict[int, str]:
        query = sa.select(matrices.c.id, matrices.c.module).join(models).where(models.c.name == model)
        return {matrix_id: module for matrix_id, module in self._connection.execute(query)}

    def _find(self, table: sa.Table, model_id: int, name: str) -> int | None:
        query = sa.select(table.c.id).where(table.c.model_id == model_id, table.c.name == name)
        return self._connection.execute(query).scalar_one_or_none()

    def _insert(self, table: sa.Table, row: Mapping[str, object]) -> int:
        key = self._connection.execute(table.insert().values(**row)).inserted_primary_key
        return int(key[0])  # type: ignore[index]

    def _insert_many(self, table: sa.Table, names: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
        """Insert many rows by the driver's own call, which takes a third of the time of SQLAlchemy's."""
        insert = table.insert().compile(dialect=self._connection.dialect, column_keys=names)
        order = getattr(insert, "positiontup", None)
        if order is None:
            self._connection.exec_driver_sql(str(insert), [dict(zip(names, row, strict=True)) for row in rows])
            return
        places = [names.index(name) for name in order]
        self._connection.exec_driver_sql(str(insert), [tuple(row[place] for place in places) for row in rows])

    def _record(
        self,
        action: str,
        model: str,
        composition: str | None = None,
        task: str | None = None,
        detail: Mapping[str, object] | None = None,
    ) -> None:
        row = {
            "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "actor": f"{_user()}@{socket.gethostname()}",
            "action": action,
            "model": model,
            "composition": composition,
            "task": task,
            "detail": json.dumps(dict(detail or {}), sort_keys=True),
        }
        self._connection.execute(events_table.insert().values(**row))


def _joined() -> sa.Join:
    return (
        memberships.join(tasks, memberships.c.task_id == tasks.c.id)
        .join(compositions, memberships.c.composition_id == compositions.c.id)
        .join(models, tasks.c.model_id == models.c.id)
    )


def _pack(values: tuple[int, ...]) -> bytes:
    return np.asarray(values, _STORED).tobytes()


def _unpack(stored: bytes) -> tuple[int, ...]:
    return tuple(np.frombuffer(stored, _STORED).tolist())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return str(os.getuid())


def _prepare_file(path: Path, where: str, create: bool) -> None:
    if path.is_dir():
        raise RegistryError(f"registry {where} is a folder: name a file in it, such as {path / 'registry.db'}")
    if path.exists():
        return
    if not create:
        raise RegistryError(f"registry {where} does not exist: run multisbora allocate first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RegistryError(f"registry {where}: its folder cannot be made: {error.strerror}") from None


def _prepare_sqlite(engine: sa.Engine) -> None:
    @sa.event.listens_for(engine, "connect")
    def _(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # the module begins no transactions of its own; "begin" below does
        connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
        connection.execute("PRAGMA foreign_keys = ON")
        deadline = time.monotonic() + BUSY_SECONDS
        while connection.execute("PRAGMA journal_mode").fetchone()[0] not in ("wal", "memory"):
            try:
                connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                # The busy timeout does not cover this switch, which the first few processes may all be making.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    @sa.event.listens_for(engine, "begin")
    def _(connection: sa.Connection) -> None:
        write = connection.get_execution_options().get("multisbora_write", False)
        # IMMEDIATE: a writer waits here, not at its first write, where what it has read could be out of date.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _explain(where: str, error: sa.exc.DBAPIError) -> str:
    text = (str(error.orig).strip() or type(error).__name__).splitlines()[0]
    if "not a database" in text or "malformed" in text:
        return f"registry {where} is no SQLite database, or a damaged one: restore it, or give another file"
    if "readonly" in text or "unable to open" in text:
        return f"registry {where} cannot be opened for writing ({text}): check its folder and your rights there"
    if "locked" in text:
        return f"registry {where} stayed busy for {BUSY_SECONDS} s: another process holds it; try again"
    return f"registry {where} failed: {text}"
