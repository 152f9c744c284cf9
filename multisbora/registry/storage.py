"""What a store's rows rest on: tables, keys and checks, the guards, word for word, and the file beneath."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import sqlalchemy as sa

from .database import HEAD, VERSION_TABLE
from .migrations.guards import Guard, guards
from .schema import claims, metadata

_MOST = 20  # faults of the file that SQLite is asked for
_FEW = 3  # missing guards that are named
# Words of a check that only say how a database spells it: it is the same with and without.
_SPELLING = frozenset({"check", "in", "any", "array", "text", "character", "varying", "smallint", "integer"})
_Constraint = tuple[str, tuple[str, ...]]  # kind, and what tells it from others of its kind


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
    for name, table in metadata.tables.items():
        if name in present:
            for kind, parts in sorted(_wanted(table, connection.dialect.name) - _there(connection, inspector, name)):
                yield f"table {name} has lost a constraint or has another: {kind} ({', '.join(parts)})"
    yield from _guard_faults(connection)
    if connection.dialect.name == "sqlite":
        for (line,) in connection.exec_driver_sql(f"PRAGMA integrity_check({_MOST})"):
            if line != "ok":
                yield f"the file is damaged: {line}"
        loose = Counter(
            (table, parent) for table, _, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check")
        )
        for (table_name, parent), count in loose.items():
            yield f"table {table_name}: {count} rows point at rows of {parent} that are not there"


def _wanted(table: sa.Table, dialect: str) -> set[_Constraint]:
    found: set[_Constraint] = set()
    for constraint in table.constraints:
        if isinstance(constraint, sa.CheckConstraint):
            found.add(("check", _words(str(constraint.sqltext))))
        elif isinstance(constraint, sa.UniqueConstraint):
            found.add(("unique", tuple(constraint.columns.keys())))
        elif isinstance(constraint, sa.PrimaryKeyConstraint) and table is not claims:  # which is told of above
            found.add(("primary key", tuple(constraint.columns.keys())))
        elif isinstance(constraint, sa.ForeignKeyConstraint) and (dialect, table) != ("postgresql", claims):
            found.add(("foreign key", (*constraint.column_keys, constraint.referred_table.name)))
    return found


def _there(connection: sa.Connection, inspector: sa.Inspector, table: str) -> set[_Constraint]:
    """Constraints of a table as they are in force. A deferrable one, or one that is not enforced, is another."""
    if connection.dialect.name == "sqlite":
        return _there_on_sqlite(connection, inspector, table)
    query = sa.text(
        "SELECT k.contype::text, pg_get_constraintdef(k.oid), r.relname FROM pg_constraint k "
        "JOIN pg_class c ON c.oid = k.conrelid LEFT JOIN pg_class r ON r.oid = k.confrelid "
        "WHERE c.relname = :table AND pg_table_is_visible(c.oid)"
    )
    found: set[_Constraint] = set()
    for kind, text, referred in connection.execute(query, {"table": table}):
        columns = tuple(text.partition("(")[2].partition(")")[0].split(", "))
        if kind == "c":
            found.add(("check", _words(text)))
        elif kind in ("u", "p") and text.endswith(")"):
            found.add(("unique" if kind == "u" else "primary key", columns))
        elif kind == "f" and text.endswith(")"):
            found.add(("foreign key", (*columns, referred)))
    return found


def _there_on_sqlite(connection: sa.Connection, inspector: sa.Inspector, table: str) -> set[_Constraint]:
    text = connection.execute(
        sa.text("SELECT sql FROM sqlite_master WHERE type = 'table' AND name = :table"), {"table": table}
    ).scalar_one()
    found: set[_Constraint] = {("check", _words(check)) for check in _checks(text)}
    found.add(("primary key", tuple(inspector.get_pk_constraint(table)["constrained_columns"])))
    for key in inspector.get_foreign_keys(table):
        found.add(("foreign key", (*key["constrained_columns"], key["referred_table"])))
    # Not as the text says: an index that is in force.
    for _, index, unique, _, partial in connection.exec_driver_sql(f"PRAGMA index_list({table})").fetchall():
        if unique and not partial:
            columns = connection.exec_driver_sql(f"PRAGMA index_info('{index}')").fetchall()
            found.add(("unique", tuple(str(column[2]) for column in columns)))
    return found


def _checks(text: str) -> Iterator[str]:
    """What stands in the brackets of each CHECK of a table's statement."""
    for match in re.finditer(r"\bCHECK\s*\(", text, re.IGNORECASE):
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        yield text[match.end() : end - 1]


def _words(check: str) -> tuple[str, ...]:
    """Names, values and comparisons in the order of a check, which both databases' spellings of it share."""
    found = re.findall(r"'[^']*'|[<>]=?|<>|!=|\w+", check)
    return tuple(word for word in found if word.lower() not in _SPELLING)


def _guard_faults(connection: sa.Connection) -> Iterator[str]:
    wanted = guards(connection.dialect.name)
    found = _guards(connection)
    missing = sorted(name for name, guard in wanted.items() if (guard.table, name) not in found)
    if len(missing) > _FEW:
        first = missing[0]
        yield f"{len(missing)} of {len(wanted)} guards are missing, first {first} on table {wanted[first].table}"
    for name, guard in sorted(wanted.items()):
        where = f"the guard {name} on table {guard.table}"
        if name in missing:
            if len(missing) <= _FEW:
                yield f"{where} is missing"
            continue
        there, enabled = found[guard.table, name]
        if not enabled:
            yield f"{where} is switched off"
        elif _plain(there.trigger) != _plain(guard.trigger) or _plain(there.body) != _plain(guard.body):
            yield f"{where} is not what this multisbora made: what it refuses is not known"


def _guards(connection: sa.Connection) -> dict[tuple[str, str], tuple[Guard, bool]]:
    """(table, trigger) -> the guard, and whether it is switched on."""
    if connection.dialect.name == "sqlite":
        query = "SELECT tbl_name, name, sql FROM sqlite_master WHERE type = 'trigger'"
        return {
            (table, name): (Guard(table, str(text)), True) for table, name, text in connection.exec_driver_sql(query)
        }
    query = (
        "SELECT c.relname, t.tgname, t.tgenabled::text, pg_get_triggerdef(t.oid, true), p.prosrc "
        "FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_proc p ON p.oid = t.tgfoid "
        "WHERE NOT t.tgisinternal AND pg_table_is_visible(c.oid)"
    )
    return {
        (table, name): (Guard(table, trigger, body), enabled in ("O", "A"))
        for table, name, enabled, trigger, body in connection.exec_driver_sql(query)
    }


def _plain(text: str) -> str:
    return " ".join(text.split())
