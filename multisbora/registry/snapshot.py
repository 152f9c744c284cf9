"""A registry to and from one JSON document: for review in git, for a move to another database."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import AllocationError, RegistryError
from ..geometry import Geometry, Matrix
from ..region import own_axis
from . import schema
from .audit import check_in
from .claims import Event
from .document import STAGES, Document, Holder, Model, content_name, parse, render
from .ledger import Ledger
from .lines import protection
from .reader import Reader
from .rows import Rows, read
from .store import AXES, Registry

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Imported:
    """What an import added; of what was there nothing changes but how far tasks are with their training.

    Attributes:
        models: names.
        tasks: (model, task).
        memberships: (model, composition, task), of new tasks and of those that were there.
        protected: number of channels that no task may own from now on.
        unchanged: number of tasks that were there already, with the same claims.
        events: number of lines of history that were taken over.
        advanced: (model, task), of those that were there, and that the file says are further in their training.
    """

    models: tuple[str, ...]
    tasks: tuple[tuple[str, str], ...]
    memberships: tuple[tuple[str, str, str], ...]
    protected: int
    unchanged: int
    events: int
    advanced: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def export(registry: Registry) -> dict[str, Any]:
    """Everything that a registry says, as `dumps` writes it: the same in every store with the same content.

    Compositions without a task are left out. So are moments, which are large, and can be measured again.

    Raises:
        RegistryError: the store does not hold what it should; `audit.check` tells all of it.
    """
    with registry.reading() as ledger:
        _check_sound(registry, ledger, "exported")
        return _document(read(ledger.connection)).to_json()


def dumps(content: Mapping[str, Any]) -> str:
    """The text of what `export` gives: one line a region, a membership and an event. ASCII, newline at the end."""
    return render(content)


def load(registry: Registry, content: str | Mapping[str, Any], *, dry_run: bool = False) -> Imported:
    """Add what an exported document holds and the store does not: all of it or, on any error, nothing.

    An empty store takes the history over too, and exports the same document again. In any other, what is new is
    recorded as of now. What is there already and identical is passed over; of a task that was trained, or began to be,
    in one of the two, the further stage stays.

    Args:
        content: the text of the document, or the document.
        dry_run: find out the same, write nothing.

    Raises:
        UsageError: the document is none, or says what cannot be.
        AllocationError: it has an index that a task in the store, or another in the document, holds as well.
        RegistryError: something in the store has the same name and differs; its history does not lead to its claims;
            or the store cannot be used.
    """
    document = parse(content)
    with registry.transaction(dry_run=dry_run) as ledger:
        _check_sound(registry, ledger, "imported")
        rows = read(ledger.connection)
        taking = bool(document.history) and not rows.events and not rows.models
        there = {model.name: model for model in _document(rows).models}
        imports = [_Import(ledger, model, there.get(model.name), rows, not taking) for model in document.models]
        for one in imports:
            one.write()
        if taking:
            ledger.connection.execute(schema.events.insert(), [_row(event) for event in document.history])
        problems = check_in(ledger.connection, storage=False).problems
        if problems:
            raise RegistryError(
                f"nothing was imported: with this file in it, registry {registry.where} would be broken ({problems[0]})"
            )
    return Imported(
        models=tuple(one.model.name for one in imports if one.there is None),
        tasks=tuple((one.model.name, held.name) for one in imports for held in one.new if held.role == "task"),
        memberships=tuple((one.model.name, *pair) for one in imports for pair in one.joined),
        protected=sum(_size(held) for one in imports for held in one.new if held.role == "protected"),
        unchanged=sum(one.unchanged for one in imports),
        events=len(document.history) if taking else 0,
        advanced=tuple((one.model.name, task) for one in imports for task in one.advanced),
    )


@dataclass
class _Import:
    """One model of the document on its way into the store.

    Attributes:
        there: what the store says of this model.
        record: whether to write down what is new; the history of the document does not.
    """

    ledger: Ledger
    model: Model
    there: Model | None
    rows: Rows
    record: bool
    new: list[Holder] = field(default_factory=list)
    joined: list[tuple[str, str]] = field(default_factory=list)
    advanced: list[str] = field(default_factory=list)
    unchanged: int = 0

    def write(self) -> None:
        if self.there is None:
            self._register()
        else:
            self._check_same(self.there)
        known = {held.name: held for held in self.there.holders} if self.there else {}
        self.new = [held for held in self.model.holders if held.name not in known]
        for held in self.model.holders:
            if held.name in known:
                self._check_same_holder(held, known[held.name])
        self.unchanged = sum(held.role == "task" and held.name in known for held in self.model.holders)
        self._place(known | {held.name: held for held in self.new})
        for held in self.model.holders:
            if held.name in known and STAGES.index(held.stage) > STAGES.index(known[held.name].stage):
                claims = next(iter(self.ledger.memberships(self.model.name, held.name).values()))
                self.ledger.mark(claims, held.stage, {"source": "import"})
                self.advanced.append(held.name)

    def _register(self) -> None:
        model, connection = self.model, self.ledger.connection
        row = {"name": model.name, "model_type": model.model_type, "geometry_digest": model.geometry_digest}
        key = connection.execute(schema.models.insert().values(**row)).inserted_primary_key
        shapes = [
            {"model_id": key[0], "module": module, "out_features": shape[0], "in_features": shape[1]}  # type: ignore[index]
            for module, shape in _ordered(model.name, model.matrices).items()
        ]
        connection.execute(schema.matrices.insert(), shapes)
        if self.record:
            self.ledger.record("register", model.name, detail={"geometry_digest": model.geometry_digest})

    def _check_same(self, there: Model) -> None:
        same = (there.model_type, there.geometry_digest, there.matrices)
        if same != (self.model.model_type, self.model.geometry_digest, self.model.matrices):
            raise RegistryError(
                f"model {there.name!r} is registered with other matrices (geometry {there.geometry_digest[:12]}, in "
                f"the file {self.model.geometry_digest[:12]}): import into another registry"
            )

    def _check_same_holder(self, new: Holder, there: Holder) -> None:
        # How far a task is with its training goes on while its claims stay.
        for what in ("role", "variant", "rank", *(("stage",) if new.role != "task" else ())):
            mine, theirs = getattr(new, what), getattr(there, what)
            if mine != theirs:
                raise self._differs(new, f"{what} {theirs}", str(mine))
        if sorted(new.yields) != sorted(there.yields):
            raise self._differs(
                new, f"yields to {', '.join(there.yields) or 'nobody'}", ", ".join(new.yields) or "nobody"
            )
        for module in dict.fromkeys((*there.regions, *new.regions)):
            mine, theirs = (list(held.regions.get(module, ())) for held in (new, there))
            if mine != theirs:
                raise self._differs(new, f"{_few(theirs)} of {module}", _few(mine))

    def _differs(self, held: Holder, theirs: str, mine: str) -> RegistryError:
        return RegistryError(
            f"task {held.name!r} of {self.model.name} is in the registry already and differs: {theirs}, in the file "
            f"{mine}; rename or release one of the two, then import again"
        )

    def _place(self, holders: Mapping[str, Holder]) -> None:
        """Write the new holders and memberships, in the document's order."""
        ids = {name: holder_id for holder_id, name in _names(self.rows, self.model.name).items()}
        for held in self.new:
            keepers = [ids[name] for name in held.yields]
            task = held.name if held.role == "task" else None
            ids[held.name] = self.ledger.restore(
                self.model.name, held.role, task, held.variant, held.rank, held.stage, held.regions, keepers
            )
        protected = [held for held in holders.values() if held.role == "protected"]
        places = _Places(self.model)
        model_id = next((row.id for row in self.rows.models.values() if row.name == self.model.name), None)
        existing = [row.name for row in self.rows.compositions.values() if row.model_id == model_id]
        members = self.there.memberships if self.there else ()
        for composition in existing:
            for held in protected:
                if held not in self.new:
                    places.enter(held, composition)
        for composition, task in members:
            places.enter(holders[task], composition)
        for composition in existing:
            for held in protected:
                if held in self.new:
                    places.enter(held, composition)
                    self.ledger.enter(self.model.name, ids[held.name], composition)
        for held in self.new:
            if held.role == "protected" and self.record:
                detail = protection(own_axis(held.variant), held.regions)
                self.ledger.record("import", self.model.name, detail=detail)
        for composition, task in self.model.memberships:
            if (composition, task) in members:
                continue
            if composition not in existing:
                existing.append(composition)
                for held in protected:
                    places.enter(held, composition)
            places.enter(holders[task], composition)
            self.ledger.enter(self.model.name, ids[task], composition)
            self.joined.append((composition, task))
            if self.record:
                self._record(holders[task], composition)

    def _record(self, held: Holder, composition: str) -> None:
        claims = self.ledger.memberships(self.model.name, held.name)[composition]
        detail = {"variant": held.variant, "rank": held.rank, "matrices": len(held.regions), "stage": held.stage}
        self.ledger.record("import", self.model.name, composition, held.name, {**detail, "claim_digest": claims.digest})


class _Places:
    """Who owns what in each composition of a model, to name the two that would own the same."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._members: dict[str, list[Holder]] = defaultdict(list)
        # Claimed indices, sorted, and the places of their owners among the members. Not sized by the axis, of which
        # a file says how long it is.
        self._owners: dict[tuple[str, str, int], tuple[_Ints, _Ints]] = {}

    def enter(self, held: Holder, composition: str) -> None:
        members = self._members[composition]
        axis = own_axis(held.variant)
        for module, indices in held.regions.items():
            key = (composition, module, axis)
            new = np.asarray(indices, np.int64)
            taken, owners = self._owners.get(key, (new[:0], new[:0]))
            every = np.concatenate((taken, new))
            order = np.argsort(every, kind="stable")
            every, owners = every[order], np.concatenate((owners, np.full(len(new), len(members))))[order]
            if len(twice := np.flatnonzero(every[1:] == every[:-1])):
                other = members[owners[twice[0]]]
                raise self._refused(held, other, composition, f"{AXES[axis][:-1]} {every[twice[0]]} of {module}")
            self._owners[key] = every, owners
        for other in members:
            if other.variant == held.variant or other.name in held.yields or held.name in other.yields:
                continue
            if shared := held.regions.keys() & other.regions.keys():
                module = min(shared)
                row, column = (other, held) if held.variant == "fa" else (held, other)
                cell = f"row {row.regions[module][0]}, column {column.regions[module][0]} of {module}"
                raise self._refused(held, other, composition, f"{cell}, where neither yields")
        members.append(held)

    def _refused(self, held: Holder, other: Holder, composition: str, what: str) -> AllocationError:
        return AllocationError(
            f"{held.name!r} and {other.name!r} of {self._model.name} would both own {what} in composition "
            f"{composition!r}: nothing was imported; import into another registry, or release one of the two"
        )


def _check_sound(registry: Registry, reader: Reader, what: str) -> None:
    problems = check_in(reader.connection, storage=False).problems
    if problems:
        raise RegistryError(
            f"registry {registry.where} is broken, nothing was {what} ({problems[0]}): run multisbora registry check"
        )


def _document(rows: Rows) -> Document:
    """What sound rows say."""
    models = []
    for model in sorted(rows.models.values(), key=lambda row: row.name):
        names = _names(rows, model.name)
        inside = [row for row in rows.matrices.values() if row.model_id == model.id]
        matrices = _ordered(model.name, {row.module: (row.out_features, row.in_features) for row in inside})
        ids = {row.module: row.id for row in inside}
        holders = []
        for holder_id, name in names.items():
            row = rows.holders[holder_id]
            keepers = tuple(names[keeper] for keeper in sorted(rows.yields.get(holder_id, ())))
            variant: Any = row.variant
            stored = rows.regions[holder_id]
            held = {module: tuple(stored[ids[module]].tolist()) for module in matrices if ids[module] in stored}
            holders.append(Holder(name, row.role, variant, row.rank, row.stage, keepers, held))
        models.append(
            Model(
                name=model.name,
                model_type=model.model_type,
                geometry_digest=model.geometry_digest,
                matrices=matrices,
                holders=tuple(holders),
                memberships=tuple(
                    (rows.compositions[row.composition_id].name, names[row.task_id])
                    for row in rows.memberships.values()
                    if row.task_id in names and rows.holders[row.task_id].role == "task"
                ),
            )
        )
    history = tuple(Event(*line[1:-1], _sorted(json.loads(line.detail))) for line in rows.events.values())
    return Document(tuple(models), history)


def _ordered(model: str, matrices: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Matrices in the order of the model's geometry, whatever the order of a file or of rows: module -> shape."""
    geometry = Geometry(model, "", tuple(Matrix(module, module, *shape) for module, shape in matrices.items()))
    return {matrix.module: matrix.shape for matrix in geometry.matrices}


def _sorted(detail: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(detail, sort_keys=True))
    return found


def _names(rows: Rows, model: str) -> dict[int, str]:
    """Holders of a model, by id -> the names that they have in a document."""
    used: Counter[str] = Counter()
    found = {}
    for row in rows.holders.values():
        if rows.models[row.model_id].name != model:
            continue
        held = {rows.matrices[matrix].module: tuple(kept.tolist()) for matrix, kept in rows.regions[row.id].items()}
        found[row.id] = row.name if row.role == "task" else content_name(row.variant, row.rank, held, used)
    return found


def _row(event: Event) -> dict[str, Any]:
    columns = ("at", "actor", "action", "model", "composition", "task")
    row = {key: getattr(event, key) for key in columns}
    return {**row, "detail": json.dumps(event.detail, sort_keys=True)}


def _size(held: Holder) -> int:
    return sum(len(indices) for indices in held.regions.values())


def _few(indices: list[int]) -> str:
    if not indices:
        return "nothing"
    return f"indices {', '.join(map(str, indices[:4]))}{', ...' if len(indices) > 4 else ''}"
