"""What a store's rows rest on: tables, the key that refuses double claims, the guards, and the file beneath."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import sqlalchemy as sa

from .database import HEAD, VERSION_TABLE
from .schema import GUARDS, claims, metadata

_MOST = 20  # faults of the file that SQLite is asked for


def faults(connection: sa.Connection) -> Iterator[str]:
    """What is wrong, one line each.

    Raises:
        sqlalchemy.exc.DBAPIError: the database cannot be read.
    """
    inspector = sa.inspect(connection)
    present = set(inspector.get_table_names())
    for name, table in metadata.tables.items():
        if name not in present:
            yield f"table {name} is missing"
        elif missing := set(table.c.keys()) - {column["name"] for column in inspector.get_columns(name)}:
            yield f"table {name} has no column {min(missing)}"
    if VERSION_TABLE in present:
        versions = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalars().all()
        if versions != [HEAD]:
            yield f"the schema is {', '.join(map(str, versions))[:60] or 'not named'}, not {HEAD}"
    else:
        yield f"table {VERSION_TABLE} is missing"
    if "claims" in present:
        key, wanted = inspector.get_pk_constraint("claims")["constrained_columns"], claims.primary_key.columns.keys()
        if list(key) != wanted:
            yield f"the primary key of claims is ({', '.join(key)}), not ({', '.join(wanted)}): double claims can be"
    guards = _guards(connection)
    for name in sorted(GUARDS):
        table_name = name.partition("_")[0]
        if (table_name, name) not in guards:
            yield f"the guard {name} on table {table_name} is missing"
        elif guards[table_name, name]:
            yield f"the guard {name} on table {table_name} {guards[table_name, name]}"
    if connection.dialect.name == "sqlite":
        for (line,) in connection.exec_driver_sql(f"PRAGMA integrity_check({_MOST})"):
            if line != "ok":
                yield f"the file is damaged: {line}"
        loose = Counter(
            (table, parent) for table, _, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check")
        )
        for (table_name, parent), count in loose.items():
            yield f"table {table_name}: {count} rows point at rows of {parent} that are not there"


def _guards(connection: sa.Connection) -> dict[tuple[str, str], str]:
    """(table, trigger) -> what is wrong with it, "" if nothing is."""
    if connection.dialect.name == "sqlite":
        query = "SELECT tbl_name, name, sql FROM sqlite_master WHERE type = 'trigger'"
        return {
            (table, name): "" if "RAISE(ABORT" in str(text) else "refuses nothing"
            for table, name, text in connection.exec_driver_sql(query)
        }
    query = (
        "SELECT c.relname, t.tgname, t.tgenabled::text, p.prosrc FROM pg_trigger t "
        "JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_proc p ON p.oid = t.tgfoid "
        "WHERE NOT t.tgisinternal AND pg_table_is_visible(c.oid)"
    )
    found = {}
    for table, name, enabled, text in connection.exec_driver_sql(query):
        fault = "" if "RAISE EXCEPTION" in text else "refuses nothing"
        found[table, name] = fault if enabled in ("O", "A") else "is switched off"
    return found
