"""Proof of every invariant of a store, derived anew from its rows; `multisbora registry check`.

Nothing that wrote or reads the store in daily use is trusted: not the tables' guards, not `Ledger`. What is wrong is
named, never raised, whatever somebody's script or a failing disk left behind.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from ..errors import MultisboraError, RegistryError
from ..names import check_name
from ..region import VARIANTS, own_axis
from . import measured
from .ledger import LARGEST_AXIS
from .lines import LONGEST, is_text
from .replay import disagreements
from .rows import Holder, Rows, Stored, geometry_digests, read, shown
from .schema import claims
from .storage import faults
from .store import AXES, Registry

# The worst first: what is found of one kind is told before anything of the next.
_KINDS = ("storage", "rows", "owners", "claims", "regions", "roles", "names", "history", "moments")
_MOST = 20  # problems that are told of one kind
_CLAIM = re.compile(r"[-0-9:,]*")
_Pairs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Audit:
    """What was counted, and what does not hold.

    Attributes:
        tasks: without protected channels and released tasks.
        claims: rows of the table that the database's uniqueness rests on.
        problems: one line each, the worst first.
    """

    models: int
    matrices: int
    compositions: int
    tasks: int
    claims: int
    events: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        counted = {name: getattr(self, name) for name in ("models", "matrices", "compositions", "tasks", "claims")}
        return {"ok": self.ok, **counted, "events": self.events, "problems": list(self.problems)}


class _Found:
    """Problems by kind."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {kind: [] for kind in _KINDS}

    def add(self, kind: str, line: str) -> None:
        # Names in it can be anything, and a line stays one.
        self._lines[kind].append("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))

    def lines(self) -> Iterator[str]:
        for kind, found in self._lines.items():
            yield from found[:_MOST]
            if len(found) > _MOST:
                yield f"{kind}: {len(found) - _MOST} more problems of this kind"


def check(registry: Registry) -> Audit:
    """Prove a store, in one reading transaction. A few seconds for two million claims.

    Raises:
        RegistryError: the store cannot be reached.
    """
    audit: Audit | None = None
    try:
        with registry.reading() as ledger:
            audit = check_in(ledger.connection)
    except RegistryError:
        if audit is None or audit.ok:
            raise
        # A damaged file cannot even end a transaction that read it, and that is told already.
    return audit


def check_in(connection: sa.Connection, *, storage: bool = True) -> Audit:
    """The same in a transaction that is open already, which sees its own writes.

    Args:
        storage: whether to look beneath the rows too, at files, keys and guards, and at moments, beside them.
    """
    found = _Found()
    rows = Rows({}, {}, {}, {}, {}, {}, {}, {})
    count = 0
    try:
        for problem in faults(connection) if storage else ():
            found.add("storage", problem)
        rows = read(connection)
        for problem in rows.problems:
            found.add("rows", problem)
        _check_models(rows, found)
        _check_regions(rows, found)
        count = _check_claims(connection, rows, found)
        _check_crossings(rows, found)
        _check_roles(rows, found)
        for problem in disagreements(rows):
            found.add("history", problem)
        for problem in measured.faults(connection) if storage else ():
            found.add("moments", problem)
    except sa.exc.DBAPIError as error:
        if error.connection_invalidated:
            raise
        first = (str(error.orig).strip() or type(error.orig).__name__).splitlines()[0]
        found.add("storage", f"the database cannot be read: {first}")
    return Audit(
        models=len(rows.models),
        matrices=len(rows.matrices),
        compositions=len(rows.compositions),
        tasks=sum(holder.role == "task" for holder in rows.holders.values()),
        claims=count,
        events=len(rows.events),
        problems=tuple(found.lines()),
    )


def _check_models(rows: Rows, found: _Found) -> None:
    for matrix in rows.matrices.values():
        if matrix.model_id not in rows.models:
            found.add("rows", f"matrix {shown(matrix.module)} is of model number {matrix.model_id}, which is not there")
        if not 1 <= min(matrix.out_features, matrix.in_features) <= max(matrix[-2:]) <= LARGEST_AXIS:
            found.add("rows", f"matrix {shown(matrix.module)} is {matrix.out_features} x {matrix.in_features}")
    for model in rows.models.values():
        if model.geometry_digest not in geometry_digests(rows, model):
            found.add("rows", f"the matrices of {model.name} are not those of its geometry digest")
    texts = [("model", text) for row in rows.models.values() for text in (row.name, row.model_type)]
    for what, text in (*texts, *(("matrix", row.module) for row in rows.matrices.values())):
        if not is_text(text):
            found.add(
                "names", f"{what} name or type {shown(text)} is not printable text of at most {LONGEST} characters"
            )
    for what, held in (
        ("model", [(None, model.name) for model in rows.models.values()]),
        ("composition", [(row.model_id, row.name) for row in rows.compositions.values()]),
        ("task", [(row.model_id, row.name) for row in rows.holders.values()]),
    ):
        for (_, name), times in Counter(held).items():
            if times > 1:
                found.add("names", f"{times} rows are called {what} {shown(name)}")
    for composition in rows.compositions.values():
        if composition.model_id not in rows.models:
            found.add("rows", f"composition {shown(composition.name)} is of a model that is not there")
        _check_name(composition.name, "composition", found)


def _check_regions(rows: Rows, found: _Found) -> None:
    for holder_id in rows.regions.keys() - rows.holders.keys():
        found.add("regions", f"{rows.holder(holder_id)} has regions but is not there")
    for holder in rows.holders.values():
        who = rows.holder(holder.id)
        if holder.model_id not in rows.models:
            found.add("rows", f"{who} is of a model that is not there")
        if holder.variant not in VARIANTS or holder.role not in ("task", "protected", "released"):
            found.add("rows", f"{who} is a {shown(holder.role)} of variant {shown(holder.variant)}, which do not exist")
            continue
        if holder.stage not in ("allocated", "training", "trained"):
            found.add("rows", f"{who} is in stage {shown(holder.stage)}, which does not exist")
        if holder.rank < 1:
            found.add("regions", f"{who} has rank {holder.rank}")
        if not rows.regions.get(holder.id):
            found.add("regions", f"{who} holds no region of any matrix")
        axis = own_axis(holder.variant)  # type: ignore[arg-type]
        faults = [
            f"{rows.matrix(matrix_id)} {fault}"
            for matrix_id, indices in rows.regions.get(holder.id, {}).items()
            if (fault := _region_fault(rows, holder, matrix_id, axis, indices))
        ]
        if faults:
            more = f" (and of {len(faults) - 1} more matrices)" if len(faults) > 1 else ""
            found.add("regions", f"{who}: its region of {faults[0]}{more}")


def _region_fault(rows: Rows, holder: Holder, matrix_id: int, axis: int, indices: Stored) -> str:
    matrix = rows.matrices.get(matrix_id)
    if matrix is None:
        return "is of a matrix that is not there"
    if matrix.model_id != holder.model_id:
        return f"is of a matrix of {rows.model(matrix.model_id)}"
    if not len(indices):
        return "has no index"
    unsorted = np.flatnonzero(indices[1:] <= indices[:-1])
    if len(unsorted):
        return f"is not sorted and without repeats: {indices[unsorted[0]]}, {indices[unsorted[0] + 1]}"
    size = (matrix.out_features, matrix.in_features)[axis]
    if indices[-1] >= size:
        return f"has index {indices[-1]}, outside of its {size} {AXES[axis]}"
    return ""


def _check_claims(connection: sa.Connection, rows: Rows, found: _Found) -> int:
    """Claims are regions times memberships, both ways, and no index has two owners. Returns the number of claims."""
    expected: dict[tuple[int, int, int], list[tuple[int, Stored]]] = defaultdict(list)
    for membership in rows.memberships.values():
        holder = rows.holders.get(membership.task_id)
        composition = rows.compositions.get(membership.composition_id)
        if holder is None or composition is None:
            found.add("claims", f"membership {membership.id} is of a task or composition that is not there")
            continue
        if holder.model_id != composition.model_id:
            found.add("claims", f"{rows.holder(holder.id)} is in {rows.composition(composition.id)}, of another model")
        axis = 1 if holder.variant == "fa" else 0
        for matrix_id, indices in rows.regions.get(holder.id, {}).items():
            expected[composition.id, matrix_id, axis].append((membership.id, indices))
    double: dict[tuple[int, int, int], list[str]] = {}  # composition and two memberships -> where
    lost: dict[tuple[int, int], list[str]] = {}  # composition and membership -> where
    extra: dict[tuple[int, int], list[str]] = {}
    count = 0
    for key, actual in _actual(connection, found):
        count += len(actual)
        _compare(rows, key, expected.pop(key, []), actual, double, lost, extra)
    for key, owners in expected.items():
        _compare(rows, key, owners, np.empty((0, 2), np.int64), double, lost, extra)

    def task(membership_id: int) -> str:
        membership = rows.memberships.get(membership_id)
        return rows.holder(membership.task_id) if membership else f"membership number {membership_id}"

    for (composition_id, one, other), places in double.items():
        found.add(
            "owners",
            f"{task(one)} and {task(other)} both own {places[0]} in {rows.composition(composition_id)} "
            f"({len(places)} such channels)",
        )
    for (composition_id, membership_id), places in lost.items():
        found.add(
            "claims",
            f"{task(membership_id)} has no claim on {places[0]} in {rows.composition(composition_id)}, although its "
            f"region has it ({len(places)} claims are lost)",
        )
    for (composition_id, membership_id), places in extra.items():
        found.add(
            "claims",
            f"{task(membership_id)} has a claim on {places[0]} in {rows.composition(composition_id)} that no region of "
            f"its memberships has ({len(places)} such claims)",
        )
    return count


def _actual(connection: sa.Connection, found: _Found) -> Iterator[tuple[tuple[int, int, int], _Pairs]]:
    """Claims as they are stored: (composition, matrix, axis) -> (claims, 2) channels and memberships, in any order."""
    # One row for each matrix, not for each claim: two million rows are slow to fetch, their text is not.
    pair = sa.cast(claims.c.channel, sa.Text).concat(":").concat(sa.cast(claims.c.membership_id, sa.Text))
    joined = sa.func.group_concat(pair) if connection.dialect.name == "sqlite" else sa.func.string_agg(pair, ",")
    columns = [claims.c.composition_id, claims.c.matrix_id, claims.c.axis]
    for *key, text in connection.execute(sa.select(*columns, joined).group_by(*columns)):
        try:
            if not _CLAIM.fullmatch(text):
                raise ValueError(text)
            numbers = np.array(list(map(int, text.replace(":", ",").split(","))), np.int64)
            pairs = numbers.reshape(-1, 2)
        except (TypeError, ValueError, OverflowError):
            composition_id, matrix_id, axis = key
            found.add(
                "claims",
                f"composition number {composition_id}, matrix number {matrix_id}, axis {axis}: a claim is no number",
            )
            continue
        yield tuple(key), pairs


def _compare(
    rows: Rows,
    key: tuple[int, int, int],
    owners: list[tuple[int, Stored]],
    actual: _Pairs,
    double: dict[tuple[int, int, int], list[str]],
    lost: dict[tuple[int, int], list[str]],
    extra: dict[tuple[int, int], list[str]],
) -> None:
    expected = np.empty((sum(len(indices) for _, indices in owners), 2), np.int64)
    start = 0
    for membership_id, indices in owners:
        expected[start : start + len(indices), 0] = indices
        expected[start : start + len(indices), 1] = membership_id
        start += len(indices)
    expected = expected[np.argsort(expected[:, 0], kind="stable")]
    repeated = bool((expected[1:, 0] == expected[:-1, 0]).any())
    if not repeated and np.array_equal(expected, actual[np.argsort(actual[:, 0], kind="stable")]):
        return
    composition_id, matrix_id, axis = key
    word = {0: "row", 1: "column"}.get(axis, f"axis {axis}, channel")

    def place(channel: int) -> str:
        return f"{word} {channel} of {rows.matrix(matrix_id)}"

    for (one, first), (other, second) in itertools.combinations(owners, 2):
        for channel in np.intersect1d(first, second).tolist():
            double.setdefault((composition_id, one, other), []).append(place(channel))
    there, wanted = Counter(map(tuple, actual.tolist())), Counter(map(tuple, expected.tolist()))
    for missing, where in ((wanted - there, lost), (there - wanted, extra)):
        for channel, membership_id in sorted(missing.elements()):
            where.setdefault((composition_id, membership_id), []).append(place(channel))


def _check_crossings(rows: Rows, found: _Found) -> None:
    """Of two holders of one composition that cross, exactly one yields to the other."""
    bits = {matrix_id: 1 << place for place, matrix_id in enumerate(rows.matrices)}
    masks = {holder_id: sum(bits.get(matrix_id, 0) for matrix_id in held) for holder_id, held in rows.regions.items()}
    members: dict[int, list[Holder]] = defaultdict(list)
    for membership in rows.memberships.values():
        if membership.task_id in rows.holders:
            members[membership.composition_id].append(rows.holders[membership.task_id])
    for composition_id, inside in members.items():
        columns = [holder for holder in inside if holder.variant == "fa"]
        for one, other in itertools.product(columns, [holder for holder in inside if holder.variant != "fa"]):
            shared = masks.get(one.id, 0) & masks.get(other.id, 0)
            yielding = (other.id in rows.yields.get(one.id, ())) + (one.id in rows.yields.get(other.id, ()))
            if not shared or yielding == 1:
                continue
            matrix_id = next(matrix_id for matrix_id, bit in bits.items() if shared & bit)
            column, row = rows.regions[one.id][matrix_id], rows.regions[other.id][matrix_id]
            where = f"row {row[0]}, column {column[0]} of {rows.matrix(matrix_id)}" if len(row) and len(column) else ""
            found.add(
                "owners",
                f"{rows.holder(one.id)} and {rows.holder(other.id)} cross in {rows.composition(composition_id)}, first "
                f"at {where or rows.matrix(matrix_id)}, and {'both yield' if yielding else 'neither yields'}",
            )


def _check_roles(rows: Rows, found: _Found) -> None:
    joined: dict[int, set[int]] = defaultdict(set)
    for membership in rows.memberships.values():
        if membership.composition_id in joined[membership.task_id]:
            found.add(
                "roles", f"{rows.holder(membership.task_id)} is in {rows.composition(membership.composition_id)} twice"
            )
        joined[membership.task_id].add(membership.composition_id)
    for task_id, keepers in rows.yields.items():
        for keeper_id in sorted(keepers):
            if fault := _yield_fault(rows, task_id, keeper_id):
                found.add("roles", f"{rows.holder(task_id)} yields to {rows.holder(keeper_id)}, {fault}")
    kept = {keeper for keepers in rows.yields.values() for keeper in keepers}
    for holder in rows.holders.values():
        who = rows.holder(holder.id)
        if holder.role == "task":
            _check_name(holder.name, "task", found)
            if not joined[holder.id]:
                found.add("roles", f"{who} is in no composition")
            continue
        if not holder.name.startswith("#"):
            found.add("names", f"{who} has a name that a task could have")
        if holder.role == "protected":
            for composition in rows.compositions.values():
                if composition.model_id == holder.model_id and composition.id not in joined[holder.id]:
                    found.add("roles", f"{who} is not in {rows.composition(composition.id)}, which owns its channels")
        elif joined[holder.id]:
            found.add("roles", f"{who} is in {rows.composition(min(joined[holder.id]))}")
        elif holder.id not in kept:
            found.add("roles", f"{who} is kept although nobody yields to it")


def _yield_fault(rows: Rows, task_id: int, keeper_id: int) -> str:
    one, other = rows.holders.get(task_id), rows.holders.get(keeper_id)
    if one is None or other is None:
        return "one of which is not there"
    if one.model_id != other.model_id:
        return "of another model"
    if one.variant == other.variant:
        return "of the same variant"
    if keeper_id >= task_id:
        return "which is not the earlier one"
    if one.role == "released" or (one.role == "protected" and other.role != "protected"):
        return f"which a {one.role} holder never does"
    return ""


def _check_name(name: str, what: str, found: _Found) -> None:
    try:
        check_name(name, what)
    except MultisboraError as error:
        found.add("names", str(error))
