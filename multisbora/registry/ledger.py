"""Reads and writes inside one transaction of a registry. Who may do what is decided here and in the tables' guards."""

from __future__ import annotations

import getpass
import json
import os
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from ..errors import RegistryError
from ..geometry import Geometry
from ..region import Region, Variant, own_axis
from .claims import Event, TaskClaims
from .schema import claims, compositions, events, matrices, memberships, models, regions, tasks, yields

_STORED = np.dtype("<u4")
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


class Ledger:
    """What `Registry.transaction` gives. Every method works on the state that the transaction sees."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    @property
    def connection(self) -> sa.Connection:
        """The transaction itself, for those that must not rely on these methods since they prove what they wrote."""
        return self._connection

    # Reading.

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
            .select_from(_joined())
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
            found[task_id].indices[names[matrix_id]] = np.frombuffer(indices, _STORED)
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
        columns = [column for column in events.c if column.name != "id"]
        rows = self._connection.execute(sa.select(*columns).order_by(events.c.id))
        return [
            Event(at, actor, action, model, composition, task, json.loads(detail))
            for at, actor, action, model, composition, task, detail in rows
        ]

    # Writing.

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
            # The digest has the matrices in this order, so that the two lists match one by one.
            modules = self.shapes(geometry.model)
            if list(modules) == [matrix.module for matrix in geometry.matrices]:
                return geometry
            pairs = zip(geometry.matrices, modules, strict=True)
            return replace(geometry, matrices=tuple(replace(matrix, module=module) for matrix, module in pairs))
        raise RegistryError(
            f"model {geometry.model!r} is registered with other matrices (geometry {known[:12]}, now "
            f"{geometry.digest[:12]}): give this one another name, or use another registry"
        )

    def register(self, geometry: Geometry) -> Geometry:
        """Make a model known; nothing to do if it is, with these matrices. Returns `named(geometry)`.

        Raises:
            RegistryError: the name stands for a model with other matrices.
        """
        if self._connection.execute(sa.select(models.c.id).where(models.c.name == geometry.model)).first():
            return self.named(geometry)
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
        self.record("register", geometry.model, detail={"geometry_digest": geometry.digest})
        return geometry

    def add(self, new: TaskClaims, among: Sequence[str]) -> TaskClaims:
        """Write a task that holds nothing yet, in the compositions `among`. Its model must be registered.

        Args:
            new: its regions' indices; who keeps the cells at crossings is decided here: those who are there already.

        Returns:
            The claims as they now are, with `Region.excluded` filled in.

        Raises:
            sqlalchemy.exc.IntegrityError: another task holds one of the indices (an AllocationError outside of the
                transaction's block).
        """
        model_id = self._model(new.model)
        joined = [self._composition(model_id, name) for name in among]
        ids = {module: matrix_id for matrix_id, module in self._modules(new.model).items()}
        row = {"model_id": model_id, "name": new.task, "variant": new.variant, "rank": new.rank}
        task_id = self._insert(tasks, row)
        self._hold(task_id, {ids[module]: region.indices for module, region in new.regions.items()})
        crossed = (
            sa.select(tasks.c.id)
            .distinct()
            .join(memberships, memberships.c.task_id == tasks.c.id)
            .join(regions, regions.c.task_id == tasks.c.id)
            .where(
                memberships.c.composition_id.in_(joined),
                tasks.c.variant != new.variant,
                regions.c.matrix_id.in_(sa.select(regions.c.matrix_id).where(regions.c.task_id == task_id)),
            )
        )
        keepers = [keeper for (keeper,) in self._connection.execute(crossed)]
        if keepers:
            self._connection.execute(yields.insert(), [{"task_id": task_id, "keeper_id": k} for k in sorted(keepers)])
        for composition_id in joined:
            self._join(task_id, composition_id)
        (written, *_) = self._load(tasks.c.id == task_id)
        for name in among:
            detail = {"variant": new.variant, "rank": new.rank, "matrices": len(new.regions)}
            self.record("allocate", new.model, name, new.task, {**detail, "claim_digest": written.digest})
        return written

    def join(self, model: str, task: str, composition: str) -> TaskClaims:
        """Take a task that holds claims into one more composition, with the same regions.

        Raises:
            sqlalchemy.exc.IntegrityError: it would own cells of another task there (an AllocationError outside of the
                transaction's block). `unsettled`, and the indices in `holdings`, say beforehand whom.
        """
        model_id = self._model(model)
        self._join(self._task(model, task), self._composition(model_id, composition))
        written = self.memberships(model, task)[composition]
        self.record("join", model, composition, task, {"claim_digest": written.digest})
        return written

    def release(self, model: str, task: str, composition: str | None = None) -> tuple[str, ...]:
        """Give the claims of a task back, in one composition or in all; returns the compositions.

        Raises:
            RegistryError: it holds none there.
        """
        query = (
            sa.select(memberships.c.id, compositions.c.name, compositions.c.id, tasks.c.id)
            .select_from(_joined())
            .where(models.c.name == model, tasks.c.name == task, tasks.c.role == "task")
            .order_by(memberships.c.id)
        )
        held = self._connection.execute(query).all()
        leaving = [row for row in held if composition in (None, row[1])]
        if not leaving:
            where = f"in composition {composition!r}" if composition else "in any composition"
            raise RegistryError(f"task {task!r} has no claims on {model} {where}: nothing to release")
        for membership_id, name, composition_id, _ in leaving:
            self._leave(membership_id, composition_id)
            self.record("release", model, name, task)
        if len(leaving) == len(held):
            self._retire(held[0][3])
        return tuple(row[1] for row in leaving)

    def rename(self, model: str, task: str, name: str) -> None:
        """Give a task another name; what it holds stays.

        Raises:
            RegistryError: it holds no claims, or the name is taken.
        """
        task_id = self._task(model, task)
        if self._find(tasks, self._model(model), name) is not None:
            raise RegistryError(f"task {name!r} holds claims on {model} already: choose another name for {task!r}")
        self._connection.execute(tasks.update().where(tasks.c.id == task_id).values(name=name))
        self.record("rename", model, task=task, detail={"to": name})

    def mark(self, claimed: TaskClaims, stage: str, detail: Mapping[str, object] | None = None) -> None:
        """Record that a task is being trained, or was.

        Raises:
            RegistryError: it no longer holds what `claimed` says.
        """
        now = self.memberships(claimed.model, claimed.task)
        if not now or next(iter(now.values())).digest != claimed.digest:
            raise RegistryError(
                f"task {claimed.task!r} holds other claims on {claimed.model} than it was trained on: somebody "
                "released or re-allocated it meanwhile (see multisbora registry history); train it anew"
            )
        task_id = self._task(claimed.model, claimed.task)
        self._connection.execute(tasks.update().where(tasks.c.id == task_id).values(stage=stage))
        found = {"claim_digest": claimed.digest, **(detail or {})}
        self.record(stage, claimed.model, claimed.composition, claimed.task, found)

    def protect(self, model: str, axis: int, channels: Mapping[str, Sequence[int]]) -> None:
        """Keep channels from ever being owned: module -> rows (axis 0) or columns (axis 1), in every composition.

        Raises:
            sqlalchemy.exc.IntegrityError: a task holds one of them, or crosses one (an AllocationError outside of the
                transaction's block).
        """
        model_id = self._model(model)
        ids = {module: matrix_id for matrix_id, module in self._modules(model).items()}
        rank = max(len(indices) for indices in channels.values())
        row = {"model_id": model_id, "name": "#", "variant": ("fb", "fa")[axis], "rank": rank, "role": "protected"}
        task_id = self._insert(tasks, row)
        self._connection.execute(tasks.update().where(tasks.c.id == task_id).values(name=f"#{task_id}"))
        self._hold(task_id, {ids[module]: sorted(indices) for module, indices in channels.items()})
        older = self._connection.execute(
            sa.select(tasks.c.id).where(
                tasks.c.model_id == model_id, tasks.c.role == "protected", tasks.c.variant != row["variant"]
            )
        ).scalars()
        if rows := [{"task_id": task_id, "keeper_id": keeper} for keeper in older]:
            self._connection.execute(yields.insert(), rows)
        in_model = sa.select(compositions.c.id).where(compositions.c.model_id == model_id)
        for composition_id in self._connection.execute(in_model).scalars().all():
            self._join(task_id, composition_id)
        self.record("protect", model, detail={"axis": ("rows", "columns")[axis], "channels": _counts(channels)})

    def unprotect(self, model: str) -> int:
        """Give every protected channel of a model free; returns how many there were. Masks of trained tasks stay.

        Raises:
            RegistryError: none is protected.
        """
        query = (
            sa.select(tasks.c.id)
            .join(models, models.c.id == tasks.c.model_id)
            .where(models.c.name == model, tasks.c.role == "protected")
            .order_by(tasks.c.id.desc())
        )
        holders = self._connection.execute(query).scalars().all()
        if not holders:
            raise RegistryError(f"no channel of {model} is protected: nothing to give free")
        count = 0
        for task_id in holders:
            count += sum(len(indices) // _STORED.itemsize for _, _, indices in self._regions([task_id]))
            joined = sa.select(memberships.c.id, memberships.c.composition_id).where(memberships.c.task_id == task_id)
            for membership_id, composition_id in self._connection.execute(joined).all():
                self._leave(membership_id, composition_id)
            self._retire(task_id)
        self.record("unprotect", model, detail={"channels": count})
        return count

    def restore(
        self,
        model: str,
        role: str,
        task: str | None,
        variant: Variant,
        rank: int,
        stage: str,
        channels: Mapping[str, Sequence[int]],
        keepers: Collection[int] = (),
    ) -> int:
        """Write a holder as another store has it; returns its id. It is in no composition yet.

        Args:
            task: its name; None for protected channels and what is left of a released task.
            channels: module -> indices, sorted.
            keepers: ids of those it yields to.

        Raises:
            sqlalchemy.exc.IntegrityError: the name is taken (an AllocationError outside of the transaction's block).
        """
        ids = {module: matrix_id for matrix_id, module in self._modules(model).items()}
        row = {"model_id": self._model(model), "name": task or "#", "variant": variant, "rank": rank}
        task_id = self._insert(tasks, {**row, "role": role, "stage": stage})
        if task is None:
            self._connection.execute(tasks.update().where(tasks.c.id == task_id).values(name=f"#{task_id}"))
        self._hold(task_id, {ids[module]: indices for module, indices in channels.items()})
        if rows := [{"task_id": task_id, "keeper_id": keeper} for keeper in sorted(keepers)]:
            self._connection.execute(yields.insert(), rows)
        return task_id

    def enter(self, model: str, holder: int, composition: str) -> None:
        """Take a restored holder into a composition. Nothing is recorded.

        Raises:
            sqlalchemy.exc.IntegrityError: it would own cells of another there (an AllocationError outside of the
                transaction's block).
        """
        self._join(holder, self._composition(self._model(model), composition))

    def record(
        self,
        action: str,
        model: str,
        composition: str | None = None,
        task: str | None = None,
        detail: Mapping[str, object] | None = None,
    ) -> None:
        """Add a line to the history."""
        row = {
            "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "actor": f"{_user()}@{socket.gethostname()}",
            "action": action,
            "model": model,
            "composition": composition,
            "task": task,
            "detail": json.dumps(dict(detail or {}), sort_keys=True),
        }
        self._connection.execute(events.insert().values(**row))

    # The rows beneath.

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
            .select_from(_joined())
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
        kept: dict[int, dict[int, bytes]] = {}
        for keeper_id, matrix_id, indices in self._regions({k for found in keepers.values() for k in found}):
            kept.setdefault(keeper_id, {})[matrix_id] = indices
        held: dict[int, dict[str, Region]] = {task_id: {} for task_id in variants}
        for task_id, matrix_id, indices in self._regions(variants):
            crossed = b"".join(kept[k].get(matrix_id, b"") for k in keepers.get(task_id, ()) if k in kept)
            excluded = tuple(np.unique(np.frombuffer(crossed, _STORED)).tolist()) if crossed else ()
            held[task_id][names[matrix_id]] = Region(variants[task_id], _unpack(indices), excluded)
        return [
            TaskClaims(model, digest, composition, task, variant, rank, held[task_id], stage)
            for task_id, model, digest, composition, task, variant, rank, stage in heads
        ]

    def _regions(self, holders: Collection[int]) -> list[tuple[int, int, bytes]]:
        """Rows of `regions`: (task id, matrix id, packed indices)."""
        query = sa.select(regions).where(regions.c.task_id.in_(list(holders)))
        rows = self._connection.execute(query.order_by(regions.c.task_id, regions.c.matrix_id)).all()
        return cast("list[tuple[int, int, bytes]]", rows)

    def _hold(self, task_id: int, indices: Mapping[int, Sequence[int]]) -> None:
        rows = [
            {"task_id": task_id, "matrix_id": matrix_id, "indices": np.asarray(found, _STORED).tobytes()}
            for matrix_id, found in indices.items()
        ]
        self._connection.execute(regions.insert(), rows)

    def _join(self, task_id: int, composition_id: int) -> None:
        membership_id = self._insert(memberships, {"task_id": task_id, "composition_id": composition_id})
        variant = self._connection.execute(sa.select(tasks.c.variant).where(tasks.c.id == task_id)).scalar_one()
        axis = own_axis(variant)
        names = "composition_id, matrix_id, axis, channel, membership_id"
        if self._connection.dialect.name == "postgresql":  # unpacks them itself, which saves sending millions of rows
            channel = " | ".join(f"(get_byte(indices, 4 * n + {byte}) << {8 * byte})" for byte in range(4))
            self._connection.exec_driver_sql(
                f"INSERT INTO claims ({names}) SELECT %s::int, matrix_id, %s::smallint, {channel}, %s::int "
                "FROM regions CROSS JOIN LATERAL generate_series(0, length(indices) / 4 - 1) AS n WHERE task_id = %s",
                (composition_id, axis, membership_id, task_id),
            )
            return
        rows = [
            (composition_id, matrix_id, axis, channel, membership_id)
            for _, matrix_id, indices in self._regions([task_id])
            for channel in _unpack(indices)
        ]
        self._connection.exec_driver_sql(f"INSERT INTO claims ({names}) VALUES (?, ?, ?, ?, ?)", rows)

    def _leave(self, membership_id: int, composition_id: int) -> None:
        mine = sa.and_(claims.c.composition_id == composition_id, claims.c.membership_id == membership_id)
        self._connection.execute(claims.delete().where(mine))
        self._connection.execute(memberships.delete().where(memberships.c.id == membership_id))

    def _retire(self, task_id: int) -> None:
        """Delete a holder that is in no composition; if others yield to it, what they yield stays, without a name."""
        self._connection.execute(
            tasks.update().where(tasks.c.id == task_id).values(name=f"#{task_id}", role="released", stage="allocated")
        )
        self._connection.execute(yields.delete().where(yields.c.task_id == task_id))
        idle = sa.select(tasks.c.id).where(
            tasks.c.role == "released", tasks.c.id.not_in(sa.select(yields.c.keeper_id).distinct())
        )
        gone = self._connection.execute(idle).scalars().all()
        self._connection.execute(regions.delete().where(regions.c.task_id.in_(gone)))
        self._connection.execute(tasks.delete().where(tasks.c.id.in_(gone)))

    def _composition(self, model_id: int, name: str) -> int:
        """Id of a composition; a new one starts with the protected channels."""
        known = self._find(compositions, model_id, name)
        if known is not None:
            return known
        composition_id = self._insert(compositions, {"model_id": model_id, "name": name})
        protected = sa.select(tasks.c.id).where(tasks.c.model_id == model_id, tasks.c.role == "protected")
        for task_id in self._connection.execute(protected.order_by(tasks.c.id)).scalars().all():
            self._join(task_id, composition_id)
        return composition_id

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

    def _insert(self, table: sa.Table, row: Mapping[str, object]) -> int:
        key = self._connection.execute(table.insert().values(**row)).inserted_primary_key
        return int(key[0])  # type: ignore[index]


def _joined() -> sa.Join:
    return (
        memberships.join(tasks, memberships.c.task_id == tasks.c.id)
        .join(compositions, memberships.c.composition_id == compositions.c.id)
        .join(models, tasks.c.model_id == models.c.id)
    )


def _counts(channels: Mapping[str, Sequence[int]]) -> dict[str, int]:
    return {module: len(indices) for module, indices in channels.items()}


def _unpack(stored: bytes) -> tuple[int, ...]:
    return tuple(np.frombuffer(stored, _STORED).tolist())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return str(os.getuid())
