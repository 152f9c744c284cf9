"""Every row of a store as it stands, read without trust: what cannot be a row is named and left out.

`Ledger` reads as the commands need it, and believes the database. Here nothing is believed, so that `audit` can prove a
store and `snapshot` can write one down.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from ..errors import GeometryError
from ..geometry import Geometry
from ..geometry import Matrix as GeometryMatrix
from . import schema

_STORED = np.dtype("<u4")
Stored = npt.NDArray[np.uint32]


class Model(NamedTuple):
    id: int
    name: str
    model_type: str
    geometry_digest: str


class Matrix(NamedTuple):
    id: int
    model_id: int
    module: str
    out_features: int
    in_features: int


class Composition(NamedTuple):
    id: int
    model_id: int
    name: str


class Holder(NamedTuple):
    """Whoever holds regions: a task, protected channels, or what is left of a released task."""

    id: int
    model_id: int
    name: str
    variant: str
    rank: int
    role: str
    stage: str


class Membership(NamedTuple):
    id: int
    task_id: int
    composition_id: int


class Line(NamedTuple):
    """One line of the history; `detail` is JSON, not read yet."""

    id: int
    at: str
    actor: str
    action: str
    model: str
    composition: str | None
    task: str | None
    detail: str


class _Region(NamedTuple):
    task_id: int
    matrix_id: int
    indices: bytes


class _Yield(NamedTuple):
    task_id: int
    keeper_id: int


Row = TypeVar("Row", Model, Matrix, Composition, Holder, Membership, Line, _Region, _Yield)


@dataclass(frozen=True)
class Rows:
    """The rows of a store but its claims, by id, in the order of ids.

    Attributes:
        regions: holder -> matrix -> indices, as they are stored: perhaps unsorted, empty or outside of the axis.
        yields: holder -> those it yields to.
        problems: one line for each row that is none, naming table, row and column.
    """

    models: dict[int, Model]
    matrices: dict[int, Matrix]
    compositions: dict[int, Composition]
    holders: dict[int, Holder]
    memberships: dict[int, Membership]
    regions: dict[int, dict[int, Stored]]
    yields: dict[int, set[int]]
    events: dict[int, Line]
    problems: list[str] = field(default_factory=list)

    def model(self, model_id: int) -> str:
        """A model's name for a message."""
        return self.models[model_id].name if model_id in self.models else f"model number {model_id}"

    def composition(self, composition_id: int) -> str:
        """ "composition 'default' of tiny"."""
        found = self.compositions.get(composition_id)
        if found is None:
            return f"composition number {composition_id}"
        return f"composition {found.name!r} of {self.model(found.model_id)}"

    def holder(self, holder_id: int) -> str:
        """ "task 'math' of tiny"; "protected holder '#3' of tiny"."""
        found = self.holders.get(holder_id)
        if found is None:
            return f"task number {holder_id}"
        kind = "task" if found.role == "task" else f"{found.role} holder"
        return f"{kind} {found.name!r} of {self.model(found.model_id)}"

    def matrix(self, matrix_id: int) -> str:
        return self.matrices[matrix_id].module if matrix_id in self.matrices else f"matrix number {matrix_id}"


def read(connection: sa.Connection) -> Rows:
    """All rows but the claims, in the transaction of `connection`.

    Raises:
        sqlalchemy.exc.DBAPIError: a table or column is missing, or the database cannot be read.
    """
    problems: list[str] = []

    def table(kind: type[Row], of: sa.Table) -> list[Row]:
        return _table(connection, kind, of, problems)

    models = {row.id: row for row in table(Model, schema.models)}
    matrices = {row.id: row for row in table(Matrix, schema.matrices)}
    compositions = {row.id: row for row in table(Composition, schema.compositions)}
    holders = {row.id: row for row in table(Holder, schema.tasks)}
    memberships = {row.id: row for row in table(Membership, schema.memberships)}
    yields: dict[int, set[int]] = defaultdict(set)
    for task_id, keeper_id in table(_Yield, schema.yields):
        yields[task_id].add(keeper_id)
    regions: dict[int, dict[int, Stored]] = defaultdict(dict)
    found = Rows(models, matrices, compositions, holders, memberships, regions, yields, {}, problems)
    for task_id, matrix_id, stored in table(_Region, schema.regions):
        if len(stored) % _STORED.itemsize:
            problems.append(
                f"{found.holder(task_id)}: its region of {found.matrix(matrix_id)} is {len(stored)} bytes long, "
                f"which are no whole indices of {_STORED.itemsize}"
            )
            continue
        regions[task_id][matrix_id] = np.frombuffer(stored, _STORED)
    found.events.update({row.id: row for row in table(Line, schema.events)})
    return found


def geometry_digests(rows: Rows, model: Model) -> set[str]:
    """The digests that a geometry with a model's matrices can have. None if no geometry has such.

    A store does not say whether the matrices lie transposed on disk, which is part of the digest. Before schema 0002
    geometries had another digest, over the stored tensors in the geometry's order. That of the rows stands for nothing.
    """
    inside = [row for row in rows.matrices.values() if row.model_id == model.id]
    orientations: tuple[Literal["linear", "conv1d"], ...] = ("linear", "conv1d")
    digests = set()
    for orientation in orientations:
        matrices = (
            GeometryMatrix(row.module, f"{row.module}.weight", row.out_features, row.in_features, orientation)
            for row in inside
        )
        try:
            geometry = Geometry(model.name, model.model_type, tuple(matrices))
        except GeometryError:  # none, or one twice
            return set()
        tensors = [[m.tensor, m.out_features, m.in_features, m.orientation] for m in geometry.matrices]
        digests |= {geometry.digest, hashlib.sha256(json.dumps(tensors, separators=(",", ":")).encode()).hexdigest()}
    return digests


def events_of(connection: sa.Connection, model: str) -> list[Line]:
    """The events of one model, oldest first, less those that are no rows."""
    return _table(connection, Line, schema.events, [], schema.events.c.model == model)


def _table(
    connection: sa.Connection, kind: type[Row], table: sa.Table, problems: list[str], *where: sa.ColumnElement[bool]
) -> list[Row]:
    columns = [table.c[name] for name in kind._fields]
    # Without SQLAlchemy's types, which would make bytes of a number and so hide it.
    raw = sa.select(*(sa.type_coerce(column, sa.types.NullType()) for column in columns))
    kinds = [column.type.python_type for column in columns]
    found = []
    for row in connection.execute(raw.where(*where).order_by(*table.primary_key.columns)):
        values: tuple[Any, ...] = tuple(row)
        if tuple(map(type, values)) == tuple(kinds):
            found.append(kind(*values))
            continue
        wrong = [
            (column, value)
            for column, wanted, value in zip(columns, kinds, values, strict=True)
            if type(value) is not wanted and not (value is None and column.nullable)
        ]
        if not wrong:
            found.append(kind(*values))
            continue
        column, value = wrong[0]
        problems.append(
            f"table {table.name}, {table_key(table)} {shown(values[0])}: {column.name} is {shown(value)}, "
            f"not {_WORDS[column.type.python_type]}"
        )
    return found


_WORDS = {int: "a whole number", str: "text", bytes: "bytes"}


def table_key(table: sa.Table) -> str:
    """Name of the first column of a table's primary key."""
    return next(iter(table.primary_key.columns)).name


def shown(value: object, most: int = 60) -> str:
    """A value in a message, on one line and not endless."""
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."
