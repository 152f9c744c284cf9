"""The durable store of models, tasks, compositions and claims: SQLite by default, PostgreSQL by URL.

What two tasks of one composition may never share is refused by the database itself (`schema`), whatever the code above
it does, from however many processes and hosts. `Registry` opens a store and asks; `Ledger` is one transaction of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

import sqlalchemy as sa

from ..errors import AllocationError, RegistryError, UsageError
from ..geometry import Geometry, Matrix
from ..moments import Moments
from ..names import check_name
from ..region import own_axis
from . import measured
from .claims import Event, TaskClaims
from .database import Database
from .ledger import Ledger
from .measured import Measured
from .reader import Holding, Reader
from .schema import models

DEFAULT_COMPOSITION = "default"
AXES = ("rows", "columns")


class Registry:
    """An open store. Use `Registry.open`, then close it, or use it in a `with`.

    Safe to open from many processes and, on PostgreSQL, hosts: writers wait for each other.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, url: str, *, create: bool = True) -> Registry:
        """Open a store, make it if it is not there, and bring an older one to the schema of today.

        Args:
            url: SQLAlchemy URL: "sqlite:///registry/registry.db" (relative to the working folder), "sqlite://" (in
                memory), or "postgresql+psycopg://user:password@host/database".
            create: False makes nothing where nothing is, for callers that must write nothing.

        Raises:
            MissingRegistryError: no such store, and `create` is False.
            RegistryError: wrong URL, a server that does not answer, a network file system, not a multisbora store, one
                of a newer schema, or not writable.
        """
        return cls(Database.open(url, create=create))

    @property
    def where(self) -> str:
        """The store's URL, without a password."""
        return self._database.where

    def close(self) -> None:
        self._database.close()

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
        with self._database.connect(write=True, keep=not dry_run) as connection:
            yield Ledger(connection)

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """One state of the store for several questions. Nothing can be written."""
        with self._database.connect() as connection:
            yield Reader(connection)

    def named(self, geometry: Geometry) -> Geometry:
        """A geometry with the modules called as claims call them, where the registry knows the model.

        Raises:
            RegistryError: the model's name stands there for other matrices.
        """
        with self.reading() as ledger:
            return ledger.named(geometry)

    def claims(self, model: str, composition: str = DEFAULT_COMPOSITION) -> dict[str, TaskClaims]:
        """Claims of every task of a composition, earliest first. Empty for a model or composition without any."""
        with self.reading() as ledger:
            return ledger.claims(model, composition)

    def task(self, model: str, task: str, composition: str = DEFAULT_COMPOSITION) -> TaskClaims:
        """Claims of one task.

        Raises:
            RegistryError: it has none in this composition.
        """
        found = self.memberships(model, task)
        if composition in found:
            return found[composition]
        advice = f"run multisbora allocate --tasks {task}"
        if found:
            known = ", ".join(found)
            advice = f"it has some in {known}: name one with --composition, or let it join, {advice}"
        raise RegistryError(f"task {task!r} has no claims on {model} in composition {composition!r}: {advice}")

    def memberships(self, model: str, task: str) -> dict[str, TaskClaims]:
        """Claims of one task by composition, earliest first. They differ in the composition alone."""
        with self.reading() as ledger:
            return ledger.memberships(model, task)

    def models(self) -> dict[str, str]:
        """Registered models, by name: their geometry digests."""
        with self._database.connect() as connection:
            rows = connection.execute(sa.select(models.c.name, models.c.geometry_digest).order_by(models.c.name))
            return {name: digest for name, digest in rows}

    def compositions(self, model: str) -> dict[str, tuple[str, ...]]:
        """Compositions of a model that have tasks, by name: their tasks, earliest member first."""
        with self.reading() as ledger:
            return ledger.compositions(model)

    def claimed(self, model: str, composition: str = DEFAULT_COMPOSITION) -> dict[tuple[str, int], int]:
        """How many indices are not free: (module, axis) -> count. Pairs without any are left out.

        Protected channels count as claimed, in every composition.
        """
        counts: dict[tuple[str, int], int] = {}
        with self.reading() as ledger:
            for holding in ledger.holdings(model, [composition]):
                for module, indices in holding.indices.items():
                    key = (module, own_axis(holding.variant))
                    counts[key] = counts.get(key, 0) + len(indices)
        return counts

    def protected(self, model: str) -> dict[tuple[str, int], tuple[int, ...]]:
        """The channels that no task may own: (module, axis) -> sorted rows (axis 0) or columns (axis 1)."""
        with self.reading() as ledger:
            holdings = ledger.holdings(model, [])
        return {
            (module, axis): tuple(sorted(indices))
            for axis in range(len(AXES))
            for module, indices in _protected(holdings, axis).items()
        }

    def moments(self, model: str, task: str, *, channels: bool = True) -> Moments | None:
        """What was measured of a task's rows, whether it holds claims or not; None where it was not measured.

        Args:
            channels: False leaves every block empty and reads none of its bytes: for allocation, which needs the
                energies alone.

        Raises:
            RegistryError: they are damaged.
        """
        with self.reading() as ledger:
            return measured.load(ledger.connection, model, task, channels)

    def measured(self, model: str) -> dict[str, Measured]:
        """Which tasks of a model were measured: their names, in alphabetical order, and what there is of each."""
        with self.reading() as ledger:
            return measured.measured(ledger.connection, model)

    def lacks_moments(self, model: str, task: str) -> bool:
        """Whether a task was not measured at all channels at which somebody may ask for its moments."""
        with self.reading() as ledger:
            wanted = measured.block_channels(ledger, model, task)
            there = measured.channels(ledger.connection, model, task)
        return any(not set(at) <= set(there.get(name, ())) for name, at in wanted.items())

    def events(self) -> list[Event]:
        """The history of the store, oldest first."""
        with self.reading() as ledger:
            return ledger.events()

    def release(
        self, model: str, task: str, composition: str | None = None, *, dry_run: bool = False
    ) -> tuple[str, ...]:
        """Give the claims of a task back, in one composition or in all. The history stays.

        Returns:
            The compositions in which it held claims.

        Raises:
            RegistryError: it holds none there.
        """
        with self.transaction(dry_run=dry_run) as ledger:
            return ledger.release(model, task, composition)

    def rename(self, model: str, task: str, name: str, *, dry_run: bool = False) -> None:
        """Give a task another name. Its regions, and the digest that its adapter carries, stay.

        Raises:
            UsageError: a name that no task can have.
            RegistryError: the task holds no claims, or the name is taken.
        """
        check_name(name, new_task=True)
        with self.transaction(dry_run=dry_run) as ledger:
            ledger.rename(model, task, name)

    def mark(self, claimed: TaskClaims, stage: str, detail: Mapping[str, object] | None = None) -> None:
        """Record for everybody that a task is being trained ("training"), or was ("trained").

        Raises:
            RegistryError: it no longer holds what `claimed` says.
        """
        with self.transaction() as ledger:
            ledger.mark(claimed, stage, detail)

    def record(
        self,
        action: str,
        model: str,
        composition: str | None = None,
        task: str | None = None,
        detail: Mapping[str, object] | None = None,
    ) -> None:
        """Add a line to the history, of something that was done with the claims elsewhere."""
        with self.transaction() as ledger:
            ledger.record(action, model, composition, task, detail)

    def protect(
        self,
        geometry: Geometry,
        *,
        rows: Mapping[str, Sequence[int]] | None = None,
        columns: Mapping[str, Sequence[int]] | None = None,
        dry_run: bool = False,
    ) -> dict[str, dict[str, tuple[int, ...]]]:
        """Keep channels of a model from ever being owned, in every composition.

        A task that comes later gets other indices; of a protected column an fb task's rows leave the cells out, of a
        protected row an fa task's columns. What is protected already stays so.

        Args:
            rows, columns: module -> output or input channels.

        Returns:
            What is newly protected, sorted: "rows" and "columns" -> module -> channels.

        Raises:
            GeometryError: the model has no such matrix.
            UsageError: an index outside its axis.
            AllocationError: tasks own such cells; names the first.
            RegistryError: the model's name stands for other matrices.
        """
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        with self.transaction(dry_run=dry_run) as ledger:
            geometry = ledger.register(geometry)
            for axis, given in enumerate((rows or {}, columns or {})):
                matrices: dict[Matrix, list[int]] = {}
                for module, indices in given.items():  # the same matrix may be there under two spellings
                    matrices.setdefault(geometry.find(module), []).extend(indices)
                for matrix, indices in matrices.items():
                    outside = [i for i in indices if type(i) is not int or not 0 <= i < matrix.shape[axis]]
                    if outside:
                        raise UsageError(
                            f"{matrix.module} has {matrix.shape[axis]} {AXES[axis]}, numbered from 0: "
                            f"{outside[0]!r} is none"
                        )
                holdings = ledger.holdings(geometry.model)
                before = _protected(holdings, axis)
                new = {
                    matrix.module: tuple(sorted(set(indices) - before.get(matrix.module, set())))
                    for matrix, indices in matrices.items()
                }
                found[AXES[axis]] = {module: indices for module, indices in new.items() if indices}
                _refuse_owned(holdings, axis, found[AXES[axis]])
                if found[AXES[axis]]:
                    ledger.protect(geometry.model, axis, found[AXES[axis]])
        return found

    def unprotect(self, model: str, *, dry_run: bool = False) -> int:
        """Give every protected channel of a model free; returns how many there were.

        Raises:
            RegistryError: none is protected.
        """
        with self.transaction(dry_run=dry_run) as ledger:
            return ledger.unprotect(model)


def _protected(holdings: Sequence[Holding], axis: int) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for holding in holdings:
        if holding.task is None and own_axis(holding.variant) == axis:
            for module, indices in holding.indices.items():
                found.setdefault(module, set()).update(indices.tolist())
    return found


def _refuse_owned(holdings: Sequence[Holding], axis: int, channels: Mapping[str, Sequence[int]]) -> None:
    owners: dict[str, list[str]] = {}
    for holding in holdings:
        if holding.task is None:
            continue
        crosses = own_axis(holding.variant) != axis
        for module in channels.keys() & holding.indices.keys():
            if crosses or not set(channels[module]).isdisjoint(holding.indices[module].tolist()):
                owners.setdefault(holding.task, []).append(module)
    if owners:
        task, modules = next(iter(owners.items()))
        raise AllocationError(
            f"these {AXES[axis]} are held or crossed by {', '.join(list(owners)[:5])}, first {task} in {min(modules)}: "
            "protect channels before allocating, or release those tasks first"
        )
