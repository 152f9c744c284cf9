"""Questions to a registry inside one transaction. Nothing here writes."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from ..errors import GeometryError, RegistryError
from ..geometry import Geometry
from ..region import VARIANTS, Region, Variant
from .claims import Event, TaskClaims
from .schema import compositions, events, matrices, memberships, models, regions, tasks, yields

STORED = np.dtype("<u4")  # of the indices in `regions`
Indices = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True)
class Holding:
    """What one holder owns of the matrices of a model: a task, or (`task` is None) a set of protected channels.

    Attributes:
        indices: module -> claimed columns (fa) or rows (fb), sorted.
    """

    task: str | None
    variant: Variant
    stage: str
    compositions: frozenset[str]
    indices: dict[str, Indices]


class Reader:
    """What `Registry.reading` gives. Every method works on the one state that the transaction sees.

    Raises:
        RegistryError: by any method, of rows that cannot be: a region that is no sorted list of indices on its axis,
            an event whose detail is no JSON object.
    """

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    @property
    def connection(self) -> sa.Connection:
        """The transaction's own connection, for what is asked in SQL."""
        return self._connection

    def claims(self, model: str, composition: str) -> dict[str, TaskClaims]:
        """Claims of every task of a composition, earliest member first."""
        return {found.task: found for found in self._load(models.c.name == model, compositions.c.name == composition)}

    def memberships(self, model: str, task: str) -> dict[str, TaskClaims]:
        """Claims of one task in every composition that it is in, by composition, earliest first."""
        return {found.composition: found for found in self._load(models.c.name == model, tasks.c.name == task)}

    def compositions(self, model: str) -> dict[str, tuple[str, ...]]:
        """Compositions of a model that have tasks, by name: their tasks, earliest member first."""
        query = (
            sa.select(compositions.c.name, tasks.c.name)
            .select_from(joined())
            .where(models.c.name == model, tasks.c.role == "task")
            .order_by(compositions.c.name, memberships.c.id)
        )
        found: dict[str, tuple[str, ...]] = {}
        for composition, task in self._connection.execute(query):
            found[composition] = (*found.get(composition, ()), task)
        return found

    def holdings(self, model: str, among: Collection[str] | None = None) -> list[Holding]:
        """Everything held in the compositions `among` (None: in any), and the protected channels; earliest first."""
        query = (
            sa.select(tasks.c.id, tasks.c.name, tasks.c.variant, tasks.c.role, tasks.c.stage, compositions.c.name)
            .select_from(
                tasks.join(models, tasks.c.model_id == models.c.id)
                .outerjoin(memberships, memberships.c.task_id == tasks.c.id)
                .outerjoin(compositions, memberships.c.composition_id == compositions.c.id)
            )
            .where(models.c.name == model, tasks.c.role != "released")
            .order_by(tasks.c.id)
        )
        found: dict[int, Holding] = {}
        for task_id, name, variant, role, stage, composition in self._connection.execute(query):
            before = found.get(task_id)
            joined = (before.compositions if before else frozenset()) | ({composition} if composition else set())
            found[task_id] = Holding(None if role == "protected" else name, variant, stage, joined, {})
        if among is not None:
            found = {
                task_id: holding
                for task_id, holding in found.items()
                if holding.task is None or not holding.compositions.isdisjoint(among)
            }
        names = self._modules(model)
        for task_id, matrix_id, indices in self._regions(found):
            found[task_id].indices[names[matrix_id]] = indices
        return list(found.values())

    def shapes(self, model: str) -> dict[str, tuple[int, int]]:
        """Matrices of a registered model: module -> (out_features, in_features).

        Raises:
            RegistryError: the model is not registered.
        """
        query = sa.select(matrices.c.module, matrices.c.out_features, matrices.c.in_features)
        rows = self._connection.execute(query.where(matrices.c.model_id == self._model(model)).order_by(matrices.c.id))
        return {module: (out_features, in_features) for module, out_features, in_features in rows}

    def unsettled(self, model: str, task: str, composition: str) -> tuple[str, ...]:
        """Tasks of a composition that own cells which `task` also owns, since neither yields to the other.

        They are of the other variant, and share a matrix with it.
        """
        mine, other, first, second = tasks.alias(), tasks.alias(), regions.alias(), regions.alias()
        between = sa.or_(
            sa.and_(yields.c.task_id == mine.c.id, yields.c.keeper_id == other.c.id),
            sa.and_(yields.c.task_id == other.c.id, yields.c.keeper_id == mine.c.id),
        )
        query = (
            sa.select(other.c.id, other.c.name)
            .distinct()
            .select_from(
                mine.join(models, models.c.id == mine.c.model_id)
                .join(compositions, compositions.c.model_id == models.c.id)
                .join(memberships, memberships.c.composition_id == compositions.c.id)
                .join(other, sa.and_(other.c.id == memberships.c.task_id, other.c.variant != mine.c.variant))
                .join(first, first.c.task_id == mine.c.id)
                .join(second, sa.and_(second.c.task_id == other.c.id, second.c.matrix_id == first.c.matrix_id))
            )
            .where(
                models.c.name == model,
                mine.c.name == task,
                compositions.c.name == composition,
                ~sa.exists().where(between),
            )
            .order_by(other.c.id)
        )
        return tuple(name for _, name in self._connection.execute(query))

    def events(self) -> list[Event]:
        """The history of the store, oldest first."""
        rows = self._connection.execute(sa.select(events).order_by(events.c.id))
        return [
            Event(at, actor, action, model, composition, task, _detail(event_id, action, detail))
            for event_id, at, actor, action, model, composition, task, detail in rows
        ]

    def named(self, geometry: Geometry) -> Geometry:
        """A geometry with the modules called as the registry calls them, if it knows the model; else as it is.

        Of one model, copies differ in the leading parts of the names: "h.0.attn.c_attn", "transformer.h.0.attn.c_attn".

        Raises:
            RegistryError: the name stands for a model with other matrices.
        """
        query = sa.select(models.c.geometry_digest).where(models.c.name == geometry.model)
        known = self._connection.execute(query).scalar_one_or_none()
        if known is None:
            return geometry
        if known == geometry.digest:
            return _renamed(geometry, self.shapes(geometry.model))
        raise RegistryError(
            f"model {geometry.model!r} is registered with other matrices (geometry {known[:12]}, now "
            f"{geometry.digest[:12]}): give this one another name, or use another registry"
        )

    def _load(self, *where: sa.ColumnElement[bool]) -> list[TaskClaims]:
        heads = self._connection.execute(
            sa.select(
                tasks.c.id,
                models.c.name,
                models.c.geometry_digest,
                compositions.c.name,
                tasks.c.name,
                tasks.c.variant,
                tasks.c.rank,
                tasks.c.stage,
            )
            .select_from(joined())
            .where(tasks.c.role == "task", *where)
            .order_by(memberships.c.id)
        ).all()
        if not heads:
            return []
        model = heads[0][1]
        names = self._modules(model)
        variants: dict[int, Variant] = {head[0]: head[5] for head in heads}
        keepers: dict[int, list[int]] = {}
        pairs = sa.select(yields).where(yields.c.task_id.in_(list(variants))).order_by(yields.c.keeper_id)
        for task_id, keeper_id in self._connection.execute(pairs):
            keepers.setdefault(task_id, []).append(keeper_id)
        kept: dict[int, dict[int, Indices]] = {}
        for keeper_id, matrix_id, indices in self._regions({k for found in keepers.values() for k in found}):
            kept.setdefault(keeper_id, {})[matrix_id] = indices
        held: dict[int, dict[str, Region]] = {task_id: {} for task_id in variants}
        for task_id, matrix_id, indices in self._regions(variants):
            crossed = [kept[k][matrix_id] for k in keepers.get(task_id, ()) if matrix_id in kept.get(k, ())]
            excluded = tuple(np.unique(np.concatenate(crossed)).tolist()) if crossed else ()
            held[task_id][names[matrix_id]] = Region(variants[task_id], tuple(indices.tolist()), excluded)
        return [
            TaskClaims(model, digest, composition, task, variant, rank, held[task_id], stage)
            for task_id, model, digest, composition, task, variant, rank, stage in heads
        ]

    def _regions(self, holders: Collection[int]) -> list[tuple[int, int, Indices]]:
        """Rows of `regions`: (task id, matrix id, sorted indices), by task and matrix.

        Raises:
            RegistryError: one is damaged; names it.
        """
        if not holders:
            return []
        columns = (tasks.c.id, tasks.c.name, tasks.c.variant, tasks.c.model_id)
        query = sa.select(*columns).where(tasks.c.id.in_(list(holders)))
        owners = {task_id: (name, variant, model) for task_id, name, variant, model in self._connection.execute(query)}
        known = self._matrices({model_id for _, _, model_id in owners.values()})
        # Without SQLAlchemy's type, which makes bytes of a number, and so would hide it.
        stored = sa.type_coerce(regions.c.indices, sa.types.NullType())
        rows = sa.select(regions.c.task_id, regions.c.matrix_id, stored).where(regions.c.task_id.in_(list(owners)))
        found = self._connection.execute(rows.order_by(*regions.primary_key.columns)).all()
        sizes = []
        for task_id, matrix_id, _ in found:
            name, variant, model_id = owners[task_id]
            _, out_features, in_features, of_model = known.get(matrix_id, ("", 0, 0, None))
            if of_model != model_id:
                raise damaged(f"task {name!r} has a region of matrix number {matrix_id}, which its model does not have")
            if variant not in VARIANTS:
                raise damaged(f"task {name!r} is of variant {variant!r}, which does not exist")
            sizes.append(in_features if variant == "fa" else out_features)
        wrong = _unsorted([packed for _, _, packed in found], sizes)
        if wrong is not None:
            task_id, matrix_id, _ = found[wrong]
            raise damaged(
                f"the region of {known[matrix_id][0]} of task {owners[task_id][0]!r} is no sorted list of indices on "
                "its axis"
            )
        return [(task_id, matrix_id, np.frombuffer(packed, STORED)) for task_id, matrix_id, packed in found]

    def _matrices(self, among: Collection[int]) -> dict[int, tuple[str, int, int, int]]:
        """Matrices of models, by id: (module, out_features, in_features, id of the model)."""
        columns = (matrices.c.id, matrices.c.module, matrices.c.out_features, matrices.c.in_features)
        query = sa.select(*columns, matrices.c.model_id).where(matrices.c.model_id.in_(list(among)))
        return {row[0]: (row[1], row[2], row[3], row[4]) for row in self._connection.execute(query)}

    def _model(self, name: str) -> int:
        found = self._connection.execute(sa.select(models.c.id).where(models.c.name == name)).scalar_one_or_none()
        if found is None:
            raise RegistryError(f"model {name!r} is not in the registry: run multisbora allocate first")
        return int(found)

    def _task(self, model: str, name: str) -> int:
        query = sa.select(tasks.c.id).join(models, models.c.id == tasks.c.model_id)
        query = query.where(models.c.name == model, tasks.c.name == name, tasks.c.role == "task")
        found = self._connection.execute(query).scalar_one_or_none()
        if found is None:
            raise RegistryError(f"task {name!r} has no claims on {model}: run multisbora allocate --tasks {name}")
        return int(found)

    def _modules(self, model: str) -> dict[int, str]:
        query = sa.select(matrices.c.id, matrices.c.module).join(models).where(models.c.name == model)
        return {matrix_id: module for matrix_id, module in self._connection.execute(query)}

    def _find(self, table: sa.Table, model_id: int, name: str) -> int | None:
        query = sa.select(table.c.id).where(table.c.model_id == model_id, table.c.name == name)
        return self._connection.execute(query).scalar_one_or_none()


def joined() -> sa.Join:
    """Memberships with their task, composition and model."""
    return (
        memberships.join(tasks, memberships.c.task_id == tasks.c.id)
        .join(compositions, memberships.c.composition_id == compositions.c.id)
        .join(models, tasks.c.model_id == models.c.id)
    )


def damaged(what: str) -> RegistryError:
    """What is raised of a row that cannot be."""
    return RegistryError(f"the registry is damaged ({what}): run multisbora registry check")


def _unsorted(stored: Sequence[object], sizes: Sequence[int]) -> int | None:
    """Place of the first that is not sorted indices on an axis of its size, packed; None if there is none.

    All at once, since a large model has tens of thousands.
    """
    for place, one in enumerate(stored):
        if not isinstance(one, bytes) or not one or len(one) % STORED.itemsize:
            return place
    if not stored:
        return None
    packed = cast("Sequence[bytes]", stored)
    ends = np.cumsum([len(one) // STORED.itemsize for one in packed])
    flat = np.frombuffer(b"".join(packed), STORED)
    rises = np.append(flat[1:] > flat[:-1], True)
    rises[ends - 1] = flat[ends - 1] < np.asarray(sizes)
    wrong = np.flatnonzero(~rises)
    return int(np.searchsorted(ends, wrong[0], side="right")) if wrong.size else None


def _detail(event_id: int, action: str, stored: object) -> dict[str, Any]:
    """The detail of an event."""
    try:
        found = json.loads(stored) if isinstance(stored, str) else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise damaged(f"the detail of event {event_id}, {action!r}, is no JSON object")
    return found


def _renamed(geometry: Geometry, shapes: Mapping[str, tuple[int, int]]) -> Geometry:
    """A geometry with its modules called as a registered model of the same digest calls them.

    Neither order stands for anything: an imported model has its matrices in any, and two spellings sort differently.

    Raises:
        RegistryError: the registered modules are not these matrices, one by one.
    """
    own = {matrix.module: matrix.shape for matrix in geometry.matrices}
    if own == shapes:
        return geometry
    names: dict[str, str] = {}
    for module, shape in shapes.items():
        try:
            matrix = geometry.find(module)
        except GeometryError as error:
            raise damaged(f"registered matrix {module!r}: {error}") from None
        if matrix.shape != shape or matrix.module in names:
            what = f"is {shape[0]} x {shape[1]}" if matrix.shape != shape else "is registered twice, under two names"
            raise damaged(f"matrix {module!r} of {geometry.model} {what}")
        names[matrix.module] = module
    if missing := own.keys() - names.keys():
        raise damaged(f"matrix {min(missing)!r} of {geometry.model} is not registered")
    return replace(geometry, matrices=tuple(replace(m, module=names[m.module]) for m in geometry.matrices))
