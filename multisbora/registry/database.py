"""The database under a registry: SQLite files opened with care, PostgreSQL by URL, one schema on both.

Every transaction goes through `Database.connect`: readers see one state of the store throughout, writers come one after
the other, and what a driver says when it fails becomes one line.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus, unquote

import sqlalchemy as sa

from ..errors import AllocationError, MissingRegistryError, RegistryError
from .schema import metadata

HEAD = "0003"  # the newest revision in migrations/versions
VERSION_TABLE = "multisbora_schema_version"
_FIRST_VERSION_TABLE = "multisbora_schema"  # of stores made before there were migrations; their schema is revision 0001
BUSY_SECONDS = 60  # how long a writer waits for the writers before it
POLL_SECONDS = 0.005
MIGRATION_PATIENCE = 0.5  # seconds that one waits for the lock to make the tables before looking whether they are there
CONNECT_SECONDS = 10
_LOCK = 0x6D756C7469  # "multi": the advisory lock that PostgreSQL's writers take
_HIDDEN = "***"

# PostgreSQL's codes, appendix A of its manual.
_LOCK_TIMEOUT = "55P03"
_CROSSED_WRITERS = frozenset({"40001", "40P01"})  # serialization failure, deadlock
_NO_RIGHT = frozenset({"25006", "42501"})  # read-only transaction, no privilege
_DISK_FULL = "53100"
_NO_TABLE = "42P01"
_SHUT_DOWN = frozenset({"57P01", "57P02", "57P03"})

# SQLite's write-ahead log is shared memory between processes, which these do not share between hosts.
_NETWORK = frozenset(
    {
        *("afs", "autofs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "orangefs"),
        *("pvfs2", "smb2", "smb3", "smbfs", "webdav", "fuse.ceph", "fuse.gcsfuse", "fuse.glusterfs", "fuse.juicefs"),
        *("fuse.rclone", "fuse.s3fs", "fuse.sshfs"),
    }
)


class _BusyError(RegistryError):
    """The store stayed busy."""


class Database:
    """An open database with a registry's tables in it, in the newest schema.

    Attributes:
        where: its URL, without a password, for messages.
    """

    def __init__(self, engine: sa.Engine, where: str) -> None:
        self._engine = engine
        self.where = where

    @classmethod
    def open(cls, url: str, *, create: bool = True) -> Database:
        """Open a database, make the tables where there are none, and bring older ones to the newest schema.

        Args:
            create: False makes nothing where nothing is.

        Raises:
            MissingRegistryError: there is none, and `create` is False.
            RegistryError: wrong URL, a missing driver, a network file system, a server that does not answer, not a
                multisbora store, one of a newer schema, or not writable.
        """
        parsed = _parse(url)
        where = _shown(parsed)
        file = _file(parsed)
        options: dict[str, Any] = {}
        if parsed.get_backend_name() == "postgresql":
            timeout = {} if "connect_timeout" in parsed.query else {"connect_timeout": CONNECT_SECONDS}
            options = {"pool_pre_ping": True, "connect_args": timeout}
        elif file is None and not (parsed.database or "").startswith("file:"):
            options = {"poolclass": sa.StaticPool}
        try:
            engine = sa.create_engine(parsed, **options)
        except ImportError as error:
            raise RegistryError(
                f"registry {where}: its driver {error.name} is not installed: pip install 'multisbora[postgres]'"
            ) from None
        if engine.dialect.name == "sqlite":
            _prepare_sqlite(engine, where)
            if file is not None:
                _prepare_file(file, where, create and parsed.query.get("mode") not in ("ro", "rw"))
        else:
            _prepare_postgresql(engine)
        database = cls(engine, where)
        try:
            database._migrate(create)
        except BaseException:
            database.close()
            raise
        return database

    def close(self) -> None:
        self._engine.dispose()

    @property
    def dialect(self) -> str:
        """ "sqlite" or "postgresql"."""
        return self._engine.dialect.name

    @contextmanager
    def connect(
        self, *, write: bool = False, keep: bool = True, patience: float | None = None
    ) -> Iterator[sa.Connection]:
        """One transaction: committed at the block's end, or taken back on an exception, or if not `keep`.

        A writer waits for those before it, for `patience` seconds (None: BUSY_SECONDS). A reader sees the state at
        its first statement throughout.

        Raises:
            AllocationError: the database refused what the block wrote.
            RegistryError: the store cannot be used, or stayed busy.
        """
        seconds = BUSY_SECONDS if patience is None else patience
        outcome = "nothing was written"
        try:
            with self._engine.connect() as connection:
                options = {"multisbora_write": write, "multisbora_patience": seconds}
                transaction = connection.execution_options(**options).begin()
                yield connection
                if keep:
                    # A server that goes away now has committed or has not, and can no longer say which.
                    outcome = "what was to be written may be there or not, as one: run the same again"
                    transaction.commit()
                else:
                    transaction.rollback()
        except sa.exc.IntegrityError as error:
            raise AllocationError(
                f"registry {self.where} refused what its rules forbid, nothing was written ({_first_line(error)}): "
                "run multisbora registry check, then try again"
            ) from error
        except sa.exc.DBAPIError as error:
            text, state = _first_line(error), _sqlstate(error)
            if state == _LOCK_TIMEOUT or (self.dialect == "sqlite" and "locked" in text):
                raise _BusyError(
                    f"registry {self.where} stayed busy for {seconds:g} s: another process holds it; try again"
                ) from error
            if state in _CROSSED_WRITERS:
                raise _BusyError(
                    f"registry {self.where} was busy with another writer, nothing was written ({text}): run it again"
                ) from error
            explain = _explain_sqlite if self.dialect == "sqlite" else _explain_postgresql
            known = explain(error, text, outcome)
            fallback = f"failed, nothing was written ({text}): see multisbora registry check"
            raise RegistryError(f"registry {self.where} {known or fallback}") from error

    def _migrate(self, create: bool) -> None:
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                with self.connect() as connection:
                    version = self._version(connection)
                if version == HEAD:
                    return
                if version is None and not create:
                    raise MissingRegistryError(f"registry {self.where} is empty: run multisbora allocate first")
                with self.connect(write=True, patience=MIGRATION_PATIENCE) as connection:
                    version = self._version(connection)
                    if version != HEAD:
                        _upgrade(connection, version, self.where)
                    return
            except _BusyError:  # most likely another process is making the tables: look again
                if time.monotonic() > deadline:
                    raise

    def _version(self, connection: sa.Connection) -> str | None:
        """The revision of the tables that are there; None where there are none of ours."""
        present = set(sa.inspect(connection).get_table_names())
        if VERSION_TABLE in present:
            versions = self._numbers(connection, "version_num", VERSION_TABLE)
            if len(versions) == 1 and re.fullmatch("(?!0000)[0-9]{4}", str(versions[0])):
                return str(versions[0])
            raise self._damaged(VERSION_TABLE, versions)
        if _FIRST_VERSION_TABLE in present:
            numbers = self._numbers(connection, "version", _FIRST_VERSION_TABLE)
            if numbers == [1]:
                return "0001"
            raise self._damaged(_FIRST_VERSION_TABLE, numbers)
        # Beside tables of others PostgreSQL may hold a registry as well; a file is one or it is not.
        foreign = present if self.dialect == "sqlite" else present & set(metadata.tables)
        if foreign:
            raise RegistryError(
                f"registry {self.where} is a database of something else (table {min(foreign)}): give another one"
            )
        return None

    def _numbers(self, connection: sa.Connection, column: str, table: str) -> Sequence[object]:
        try:
            return connection.exec_driver_sql(f"SELECT {column} FROM {table}").scalars().all()
        except sa.exc.ProgrammingError as error:
            # PostgreSQL lets a reader wait for a migration that drops the table which the reader has seen.
            if _sqlstate(error) == _NO_TABLE:
                raise _BusyError(f"registry {self.where} is being migrated by another process: try again") from error
            raise

    def _damaged(self, table: str, versions: Sequence[object]) -> RegistryError:
        there = ", ".join(str(version)[:20] for version in versions[:3]) or "none"
        return RegistryError(
            f"registry {self.where} is damaged: restore it (its table {table} must hold one version and has {there})"
        )


def _upgrade(connection: sa.Connection, version: str | None, where: str) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", "multisbora.registry:migrations")
    config.attributes.update(connection=connection, version_table=VERSION_TABLE)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if version is not None and version not in known:
        raise RegistryError(f"registry {where} has schema {version}, this multisbora reads up to {HEAD}: upgrade it")
    if version is not None and not sa.inspect(connection).has_table(VERSION_TABLE):
        command.stamp(config, version)
    command.upgrade(config, "head")


def _parse(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        # What cannot be taken apart may have a password anywhere.
        scheme, colon, _ = url.partition(":")
        shown = f"{scheme}:..." if colon and ("@" in url or "?" in url) else url
        raise RegistryError(
            f"registry URL {shown!r} is not usable: write sqlite:///path/to/registry.db or "
            "postgresql+psycopg://user:password@host/database"
        ) from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    backend, _, driver = parsed.drivername.partition("+")
    hint = {
        "sqlite": "write sqlite:///path/to/registry.db",
        "postgresql": "write postgresql+psycopg://user:password@host/database",
    }.get(backend)
    if hint is None:
        raise RegistryError(f"registry URL {_shown(parsed)!r} is not usable: use sqlite:/// or postgresql+psycopg://")
    if driver not in (("", "pysqlite") if backend == "sqlite" else ("psycopg",)):
        raise RegistryError(f"registry URL {_shown(parsed)!r} names driver {driver!r}, which is not supported: {hint}")
    return parsed


def _shown(url: sa.URL) -> str:
    """The URL for messages: no password, neither before the host nor in the query; paths as they were written."""
    secret = {key: _HIDDEN for key in url.query if "pass" in key.lower() or "secret" in key.lower()}
    text = url.update_query_dict(secret).render_as_string(hide_password=True)
    text = text.replace(quote_plus(_HIDDEN), _HIDDEN)
    return unquote(text) if url.get_backend_name() == "sqlite" else text


def _file(url: sa.URL) -> Path | None:
    """The file that SQLite will open; None for a server, and for a store in memory."""
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        return None
    assert url.database is not None
    if not url.database.startswith("file:") or str(url.query.get("uri", "")).lower() not in ("1", "true", "yes", "on"):
        return Path(url.database)
    path = url.database.removeprefix("file:")
    if path.startswith("//"):  # an authority, empty or "localhost"
        path = "/" + path[2:].partition("/")[2]
    path = unquote(path)
    return None if path in ("", ":memory:") or url.query.get("mode") == "memory" else Path(path)


def _prepare_file(path: Path, where: str, create: bool) -> None:
    if path.is_dir():
        raise RegistryError(f"registry {where} is a folder: name a file in it, such as {path / 'registry.db'}")
    if not path.exists() and not create:
        raise MissingRegistryError(f"registry {where} does not exist: run multisbora allocate first")
    kind = _file_system(path)
    if kind in _NETWORK:
        raise RegistryError(
            f"registry {where} lies on a network file system ({kind}), where SQLite can lose claims: "
            "put it on a local disk, or share one by postgresql+psycopg://user:password@host/database"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RegistryError(f"registry {where}: its folder cannot be made: {error.strerror}") from None


def _file_system(path: Path) -> str:
    """Type of the file system that holds `path`, in lower case; "" where the system does not say."""
    import psutil

    place = path.absolute()
    while not place.exists():
        place = place.parent
    place = place.resolve()
    try:
        mounts = psutil.disk_partitions(all=True)
    except (OSError, RuntimeError):
        return ""
    around = [mount for mount in mounts if place.is_relative_to(mount.mountpoint)]
    # Of two mounts in one place the later lies on top.
    return max(reversed(around), key=lambda mount: len(mount.mountpoint)).fstype.lower() if around else ""


def _prepare_sqlite(engine: sa.Engine, where: str) -> None:
    @sa.event.listens_for(engine, "connect")
    def _(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # the module begins no transactions of its own; "begin" below does
        connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
        connection.execute("PRAGMA foreign_keys = ON")
        deadline = time.monotonic() + BUSY_SECONDS
        while connection.execute("PRAGMA journal_mode").fetchone()[0] not in ("wal", "memory"):
            try:
                (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
                if mode not in ("wal", "memory"):
                    raise RegistryError(
                        f"registry {where}: its file system or VFS has no write-ahead log (SQLite answers {mode!r}): "
                        "put it on a local disk, or use postgresql+psycopg://user:password@host/database"
                    )
            except sqlite3.OperationalError as error:
                # The busy timeout does not cover this switch, which the first few processes may all be making.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    @sa.event.listens_for(engine, "begin")
    def _(connection: sa.Connection) -> None:
        options = connection.get_execution_options()
        if not options.get("multisbora_write", False):
            connection.exec_driver_sql("BEGIN")
            return
        # IMMEDIATE: a writer waits here, not at its first write, where what it has read could be out of date.
        # SQLite's own wait backs off to 100 ms, in which whoever has just committed begins again: with many writers
        # some wait for nearly a minute. Asking often gives all of them a chance.
        raw = connection.connection.dbapi_connection
        assert raw is not None
        deadline = time.monotonic() + options["multisbora_patience"]
        raw.execute("PRAGMA busy_timeout = 0")
        try:
            while time.monotonic() < deadline:
                try:
                    raw.execute("BEGIN IMMEDIATE")
                    return
                except sqlite3.OperationalError as error:
                    if "locked" not in str(error):
                        break
                    time.sleep(POLL_SECONDS)
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        finally:
            raw.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")


def _prepare_postgresql(engine: sa.Engine) -> None:
    @sa.event.listens_for(engine, "begin")
    def _(connection: sa.Connection) -> None:
        options = connection.get_execution_options()
        if options.get("multisbora_write", False):
            # Whatever the role's default: what the writers before have written must be seen after the lock.
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{int(1000 * options['multisbora_patience'])}ms'")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
        else:
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")


def _first_line(error: sa.exc.DBAPIError) -> str:
    return (str(error.orig).strip() or type(error.orig).__name__).splitlines()[0]


def _sqlstate(error: sa.exc.DBAPIError) -> str:
    """PostgreSQL's code for what happened, which is the same in every language; "" where there is none."""
    return getattr(error.orig, "sqlstate", None) or ""


def _explain_sqlite(_error: sa.exc.DBAPIError, text: str, _outcome: str) -> str | None:
    if "not a database" in text or "malformed" in text:
        return "is no SQLite database, or a damaged one: restore it, or give another file"
    if "readonly" in text or "unable to open" in text:
        return f"cannot be opened for writing ({text}): check its folder and your rights there"
    if "disk is full" in text:
        return "cannot grow, its disk is full, nothing was written: free some space and try again"
    return None


def _explain_postgresql(error: sa.exc.DBAPIError, text: str, outcome: str) -> str | None:
    state = _sqlstate(error)
    if state in _NO_RIGHT:
        return f"cannot be written or read by you ({text}): ask for the right to write there"
    if state == _DISK_FULL:
        return "cannot grow, its disk is full, nothing was written: free some space and try again"
    # Without a code, it is the driver that says so: no connection was made, or it broke.
    gone = state.startswith("08") or state in _SHUT_DOWN or (not state and isinstance(error, sa.exc.OperationalError))
    if gone or error.connection_invalidated:
        return f"cannot be reached, {outcome} ({text}): check the server, then try again"
    return None
