"""Writes inside one transaction of a registry. Who may do what is decided here and in the tables' guards."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timezone

import numpy as np
import sqlalchemy as sa

from ..errors import RegistryError, UsageError
from ..geometry import Geometry
from ..moments import Moments
from ..region import Variant, own_axis
from . import measured
from .claims import TaskClaims
from .lines import LONGEST, detail_text, is_text, protection
from .reader import STORED, Reader, joined
from .schema import claims, compositions, events, matrices, memberships, models, regions, tasks, yields

LARGEST_AXIS = 2**24  # no model comes near, and what is sized by an axis stays small


class Ledger(Reader):
    """What `Registry.transaction` gives: what a reader can ask, and everything that can be written."""

    def register(self, geometry: Geometry) -> Geometry:
        """Make a model known; nothing to do if it is, with these matrices. Returns `named(geometry)`.

        Raises:
            RegistryError: the name stands for a model with other matrices.
            UsageError: a name that cannot travel in a file, or an axis longer than 2^24.
        """
        for text in (geometry.model, geometry.model_type, *(matrix.module for matrix in geometry.matrices)):
            if not is_text(text):
                raise UsageError(
                    f"{text[:60]!r} cannot name a model, its type or a module in a registry: use printable text of at "
                    f"most {LONGEST} characters (rename the model's folder, or correct its card)"
                )
        if self._connection.execute(sa.select(models.c.id).where(models.c.name == geometry.model)).first():
            return self.named(geometry)
        if wide := [matrix.module for matrix in geometry.matrices if max(matrix.shape) > LARGEST_AXIS]:
            raise UsageError(f"{wide[0]} has an axis longer than {LARGEST_AXIS}: correct the model's card or files")
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
        entered = [self._composition(model_id, name) for name in among]
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
                memberships.c.composition_id.in_(entered),
                tasks.c.variant != new.variant,
                regions.c.matrix_id.in_(sa.select(regions.c.matrix_id).where(regions.c.task_id == task_id)),
            )
        )
        keepers = [keeper for (keeper,) in self._connection.execute(crossed)]
        if keepers:
            self._connection.execute(yields.insert(), [{"task_id": task_id, "keeper_id": k} for k in sorted(keepers)])
        for composition_id in entered:
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
            .select_from(joined())
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
        measured.rename(self._connection, self._model(model), task, name)
        self.record("rename", model, task=task, detail={"to": name})

    def mark(self, claimed: TaskClaims, stage: str, detail: Mapping[str, object] | None = None) -> None:
        """Record that a task is being trained, or was.

        Raises:
            RegistryError: it no longer holds what `claimed` says.
            UsageError: a detail that is no JSON.
        """
        found = {**(detail or {}), "claim_digest": claimed.digest}
        detail_text(stage, found)
        now = self.memberships(claimed.model, claimed.task)
        if not now or next(iter(now.values())).digest != claimed.digest:
            raise RegistryError(
                f"task {claimed.task!r} holds other claims on {claimed.model} than it was trained on: somebody "
                "released or re-allocated it meanwhile (see multisbora registry history); train it anew"
            )
        task_id = self._task(claimed.model, claimed.task)
        self._connection.execute(tasks.update().where(tasks.c.id == task_id).values(stage=stage))
        self.record(stage, claimed.model, claimed.composition, claimed.task, found)

    def keep_moments(self, model: str, moments: Moments) -> None:
        """Put what was measured of a task's rows in the place of what there is. No history, and no claim is needed.

        Raises:
            RegistryError: the model is not registered, or has other matrices.
        """
        measured.keep(self._connection, model, moments)

    def forget_moments(self, model: str, task: str) -> None:
        """Delete what was measured of a task's rows. No history, and claims stay as they are.

        Raises:
            RegistryError: there is nothing of it.
        """
        measured.forget(self._connection, model, task)

    def protect(self, model: str, axis: int, channels: Mapping[str, Sequence[int]]) -> None:
        """Keep channels from ever being owned: module -> rows (axis 0) or columns (axis 1), in every composition.

        Raises:
            sqlalchemy.exc.IntegrityError: a task holds one of them, or crosses one (an AllocationError outside of the
                transaction's block).
        """
        model_id = self._model(model)
        variant: Variant = "fa" if axis else "fb"
        older = sa.select(tasks.c.id).where(
            tasks.c.model_id == model_id, tasks.c.role == "protected", tasks.c.variant != variant
        )
        keepers = self._connection.execute(older).scalars().all()
        rank = max(len(indices) for indices in channels.values())
        task_id = self.restore(model, "protected", None, variant, rank, "allocated", channels, keepers)
        in_model = sa.select(compositions.c.id).where(compositions.c.model_id == model_id)
        for composition_id in self._connection.execute(in_model).scalars().all():
            self._join(task_id, composition_id)
        self.record("protect", model, detail=protection(axis, channels))

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
            count += sum(len(indices) for _, _, indices in self._regions([task_id]))
            inside = sa.select(memberships.c.id, memberships.c.composition_id).where(memberships.c.task_id == task_id)
            for membership_id, composition_id in self._connection.execute(inside).all():
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
        """Add a line to the history.

        Raises:
            UsageError: a detail, or a name, that cannot be written down and read again; nothing is written.
        """
        if not is_text(action, 32) or not is_text(model):
            raise UsageError(
                f"action {action[:60]!r} of model {model[:60]!r}: both must be printable text, not too long"
            )
        row = {
            "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "actor": "".join(c if c.isprintable() else "?" for c in f"{_user()}@{socket.gethostname()}")[:LONGEST],
            "action": action,
            "model": model,
            "composition": composition,
            "task": task,
            "detail": detail_text(action, detail or {}),
        }
        self._connection.execute(events.insert().values(**row))

    def _hold(self, task_id: int, indices: Mapping[int, Sequence[int]]) -> None:
        rows = [
            {"task_id": task_id, "matrix_id": matrix_id, "indices": np.asarray(found, STORED).tobytes()}
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
            for channel in indices.tolist()
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

    def _insert(self, table: sa.Table, row: Mapping[str, object]) -> int:
        key = self._connection.execute(table.insert().values(**row)).inserted_primary_key
        return int(key[0])  # type: ignore[index]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return str(os.getuid())
