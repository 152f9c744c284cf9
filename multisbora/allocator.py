"""Which free indices a task gets, disjoint, and in one transaction: drawn at random, as in the paper, but seeded; or
chosen by what the rows of the tasks send through the model (`isolation`).

Two tasks need different indices only where a composition holds both. Tasks that never meet share blocks of indices, and
the conflict graph (`conflicts`) is coloured so that as few blocks as can be found serve them all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from .delta import pattern_value
from .errors import AllocationError, UsageError
from .geometry import Geometry, Matrix
from .isolation import Isolation, Newcomer
from .moments import Moments
from .names import check_name
from .region import VARIANTS, Region, Variant, draw, own_axis
from .registry import AXES, DEFAULT_COMPOSITION, Registry
from .registry.claims import TaskClaims
from .registry.ledger import Ledger
from .registry.reader import Holding
from .room import Room, held_on, is_crossed, room, taken_of

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
Strategy = Literal["random", "isolated"]


@dataclass(frozen=True)
class Allocation:
    """What `allocate` gave: the claims of every task asked for, in the order asked, and what still fits.

    Attributes:
        compositions: those that were asked for; how many more tasks of this variant, rank and targets fit into each.
        moved: tasks that were given other indices than they held.
    """

    tasks: dict[str, TaskClaims]
    compositions: dict[str, Room]
    moved: tuple[str, ...] = ()

    @property
    def composition(self) -> str | None:
        """The composition, if it was one."""
        return next(iter(self.compositions)) if len(self.compositions) == 1 else None

    def to_json(self) -> dict[str, Any]:
        """`{"composition", "tasks": {task: {"variant", "rank", "regions": {module: sorted indices}}}}`, and more."""
        return {
            "composition": self.composition,
            "tasks": {name: found.to_json() for name, found in self.tasks.items()},
            "compositions": {name: found.to_json() for name, found in self.compositions.items()},
            "moved": list(self.moved),
        }


def allocate(
    registry: Registry,
    geometry: Geometry,
    tasks: Sequence[str] = (),
    *,
    variant: Variant = "fa",
    rank: int = 64,
    composition: str | Mapping[str, Sequence[str]] = DEFAULT_COMPOSITION,
    target_modules: str | Sequence[str] = DEFAULT_TARGETS,
    seed: int = 0,
    rank_pattern: Mapping[str, int] | None = None,
    reallocate: bool = False,
    dry_run: bool = False,
    strategy: Strategy = "random",
    moments: Mapping[str, Moments] | None = None,
) -> Allocation:
    """Claim indices for tasks: all of them or, on any error, none. Again with the same arguments gives the same claims.

    A task has the same regions in each of its compositions, so one adapter serves all. A new task's indices differ from
    those of every task that it meets in any of them; tasks that never meet share indices as far as they can. Where an
    fa column crosses an fb row of an earlier task, the earlier one keeps the cell (`Region.excluded`).

    Args:
        tasks: names; letters, digits, dot, dash, underscore.
        rank: indices a matrix, for every matrix that `rank_pattern` (PEFT's meaning) does not name.
        composition: the one that all `tasks` join; or several at once, by name, each with its tasks (`tasks` may then
            be left out).
        seed: of the order in which a matrix's channels are taken, which also depends on geometry and matrix, and on
            nothing else. A task that holds claims keeps them whatever the seed.
        reallocate: where a task cannot join a composition with the indices that it has, give it new ones, or the tasks
            in its way, if they are not trained.
        dry_run: work out the same answer, write nothing.
        strategy: how a new task's indices are chosen: "random", or "isolated", by `moments`. Whether tasks fit, and
            what one holds already, does not depend on it.
        moments: for "isolated", task -> what its rows send through the base model: those of each new task, and of the
            tasks that it meets, on whose rows it shall be quiet. Tasks among them that hold no claims yet may come
            later, and count as met.

    Raises:
        UsageError: a name, variant, rank, target or strategy that cannot mean anything.
        DataError: moments are missing, or of another model or base.
        AllocationError: too few free indices, a task that holds other claims already, or tasks that would meet in cells
            both own.
        RegistryError: the store cannot be used, or the model's name stands there for another geometry.
    """
    if strategy not in get_args(Strategy):
        raise UsageError(f"strategy {strategy!r} is unknown: use random or isolated")
    if strategy == "random" and moments is not None:
        raise UsageError('random indices do not depend on moments: leave them out, or use strategy="isolated"')
    wanted_in = _wanted_compositions(tasks, composition)
    wanted = matrix_ranks(
        geometry, variant=variant, rank=rank, target_modules=target_modules, rank_pattern=rank_pattern
    )
    with registry.transaction(dry_run=dry_run) as ledger:
        geometry = ledger.register(geometry)
        wanted = {geometry.find(matrix.module): ranked for matrix, ranked in wanted.items()}
        held = {task: ledger.memberships(geometry.model, task) for task in wanted_in}
        for claims in held.values():
            for claim in claims.values():
                _check_same(claim, variant, rank, wanted)
        among = {name for names in wanted_in.values() for name in names} | {c for cs in held.values() for c in cs}
        # A task that is moved out of the way meets others in compositions that nobody asked about.
        holdings = ledger.holdings(geometry.model, None if reallocate else among)
        isolation = Isolation.of(moments or {}, geometry) if strategy == "isolated" else None
        plan = _Plan(ledger, geometry, seed, holdings, isolation)
        for task, names in wanted_in.items():
            if not held[task]:
                plan.new.append(_New(task, variant, rank, wanted, tuple(names)))
            else:
                plan.join(task, [name for name in names if name not in held[task]], reallocate)
        moved = tuple(new.task for new in plan.new if new.moved)
        written = plan.write()
        found = {
            task: replace(written.get(task) or next(iter(held[task].values())), composition=names[0])
            for task, names in wanted_in.items()
        }
        asked = dict.fromkeys(name for names in wanted_in.values() for name in names)
        rooms = {name: room(plan.holdings, name, wanted, variant) for name in asked}
    return Allocation(found, rooms, moved)


def matrix_ranks(
    geometry: Geometry,
    *,
    variant: Variant,
    rank: int,
    target_modules: str | Sequence[str],
    rank_pattern: Mapping[str, int] | None = None,
) -> dict[Matrix, int]:
    """The targeted matrices and how many indices a task gets of each.

    Raises:
        UsageError: unknown variant, nothing targeted, or a rank below 1 or above the matrix's axis.
    """
    if variant not in VARIANTS:
        raise UsageError(f"variant {variant!r} is unknown: use fa (columns) or fb (rows)")
    axis = own_axis(variant)
    for what, value in (
        ("rank", rank),
        *((f"rank_pattern {key!r}", value) for key, value in (rank_pattern or {}).items()),
    ):
        if type(value) is not int or value < 1:
            raise UsageError(f"{what} must be a whole number above 0, got {value!r}")
    ranks = {}
    for matrix in geometry.select(target_modules):
        ranks[matrix] = pattern_value(rank_pattern or {}, matrix.module, rank)
        if ranks[matrix] > matrix.shape[axis]:
            raise UsageError(
                f"rank {ranks[matrix]} is above the {matrix.shape[axis]} {AXES[axis]} of {matrix.module}: "
                "lower it, or leave that matrix out with --targets"
            )
    return ranks


def way_out(variant: Variant, fits_other: bool) -> str:
    """What to do where tasks do not fit. `fits_other`: whether they would as tasks of the other variant."""
    if not fits_other:
        return "lower the rank, or use another composition"
    return f"lower the rank, use {'fb' if variant == 'fa' else 'fa'}, or another composition"


@dataclass(frozen=True)
class _New:
    """A task that gets indices now: a new one, or one that gives up those it has."""

    task: str
    variant: Variant
    rank: int
    ranks: Mapping[Matrix, int]
    compositions: tuple[str, ...]
    moved: bool = False


@dataclass
class _Plan:
    """What one call of `allocate` is about to write. `holdings` is what is held already; `isolation`, if there is any,
    says which channels are good for whom."""

    ledger: Ledger
    geometry: Geometry
    seed: int
    holdings: list[Holding]
    isolation: Isolation | None = None
    new: list[_New] = field(default_factory=list)

    def join(self, task: str, names: Sequence[str], reallocate: bool) -> None:
        """Take a task that holds claims into more compositions, with the indices it has or, if it may, new ones."""
        if any(new.task == task for new in self.new):  # moved out of another task's way just now
            place, now = next((place, new) for place, new in enumerate(self.new) if new.task == task)
            self.new[place] = replace(now, compositions=tuple(dict.fromkeys((*now.compositions, *names))))
            return
        mine = self._holding(task)
        for name in names:
            in_the_way = self._meets(mine, name)
            if not in_the_way:
                self.ledger.join(self.geometry.model, task, name)
                mine = self._replace(replace(mine, compositions=mine.compositions | {name}))
                continue
            others = [self._holding(other) for other in in_the_way]
            if reallocate and mine.stage == "allocated":
                self._move(mine, (*mine.compositions, *names))
                return
            if not reallocate or any(other.stage != "allocated" for other in others):
                raise AllocationError(_conflict(mine, name, in_the_way, others, reallocate))
            for other in others:
                self._move(other, tuple(other.compositions))
            self.ledger.join(self.geometry.model, task, name)
            mine = self._replace(replace(mine, compositions=mine.compositions | {name}))

    def write(self) -> dict[str, TaskClaims]:
        """Draw for the new tasks, and write them; returns their claims. `holdings` has them from then on."""
        written: dict[str, TaskClaims] = {}
        order = self._order()
        others = self._others(self.isolation) if self.isolation is not None else {}
        drawn = self._draw(order)
        if self.isolation is not None:
            drawn = self._choose(self.isolation, order, others, drawn)
        # The order of writing is that of the members, as asked for; between variants it also says who yields.
        for new in order if len({new.variant for new in order}) > 1 else self.new:
            indices = drawn[new.task]
            claims = TaskClaims(
                model=self.geometry.model,
                geometry_digest=self.geometry.digest,
                composition=new.compositions[0],
                task=new.task,
                variant=new.variant,
                rank=new.rank,
                regions={matrix.module: Region(new.variant, indices[matrix]) for matrix in new.ranks},
            )
            written[new.task] = self.ledger.add(claims, new.compositions)
            if self.isolation is not None:
                detail = {"strategy": "isolated", **self.isolation.origin(new.task), "others": others[new.task]}
                self.ledger.record("choose", self.geometry.model, task=new.task, detail=detail)
            held = {module: np.asarray(region.indices, np.uint32) for module, region in claims.regions.items()}
            self.holdings.append(Holding(new.task, new.variant, "allocated", frozenset(new.compositions), held))
        return written

    def _order(self) -> list[_New]:
        """The new tasks, class by class of a colouring: first fit in this order needs no more blocks than classes."""
        if len(self.new) < 2:
            return self.new
        from .conflicts import colour

        classes = colour(_conflict_graph(self.new)).classes
        named = {new.task: new for new in self.new}
        return [named[task] for names in classes for task in names]

    def _draw(self, order: Sequence[_New]) -> dict[str, dict[Matrix, tuple[int, ...]]]:
        found: dict[str, dict[Matrix, tuple[int, ...]]] = {}
        drawn = list(self.holdings)
        for new in order:
            indices = found[new.task] = {}
            near = [h for h in drawn if h.task is None or not h.compositions.isdisjoint(new.compositions)]
            axis = own_axis(new.variant)
            own, other = held_on(near, axis), held_on(near, 1 - axis)
            for matrix, rank in new.ranks.items():
                taken = taken_of(own, matrix, axis)
                if is_crossed(other, matrix, 1 - axis):
                    raise AllocationError(
                        f"{matrix.module}: all of its {matrix.shape[1 - axis]} {AXES[1 - axis]} are other tasks' or "
                        f"protected, so {new.variant} {AXES[axis]} of task {new.task!r} would have no cell left: use "
                        "the other variant, or another composition"
                    )
                if np.count_nonzero(~taken) < rank:
                    raise AllocationError(self._full(new, matrix, rank, taken, order))
                indices[matrix] = draw(matrix.shape[axis], rank, *self._key(matrix), taken=taken)
            held = {matrix.module: np.asarray(got, np.uint32) for matrix, got in indices.items()}
            drawn.append(Holding(new.task, new.variant, "allocated", frozenset(new.compositions), held))
        return found

    def _others(self, isolation: Isolation) -> dict[str, list[str]]:
        """The tasks on whose rows each new one shall be quiet, sorted: whom it meets, and who may come yet.

        Raises:
            DataError: nobody measured one of them.
        """
        members = {name: set(tasks) for name, tasks in self.ledger.compositions(self.geometry.model).items()}
        for new in self.new:
            for name in new.compositions:
                members.setdefault(name, set()).add(new.task)
        to_come = isolation.moments.keys() - set().union(*members.values())
        found = {}
        for new in self.new:
            found[new.task] = sorted(to_come.union(*(members[name] for name in new.compositions)) - {new.task})
            isolation.require(new.task, found[new.task])
        return found

    def _choose(
        self,
        isolation: Isolation,
        order: Sequence[_New],
        others: Mapping[str, Sequence[str]],
        drawn: Mapping[str, Mapping[Matrix, tuple[int, ...]]],
    ) -> dict[str, dict[Matrix, tuple[int, ...]]]:
        """As many channels as were drawn, shared by the same tasks, but those that the tasks' moments speak for."""
        found: dict[str, dict[Matrix, tuple[int, ...]]] = {new.task: {} for new in order}
        near = {new.task: held_on(self._near(new), own_axis(new.variant)) for new in order}
        for axis in range(len(AXES)):
            mine = [new for new in order if own_axis(new.variant) == axis]
            for matrix in dict.fromkeys(matrix for new in mine for matrix in new.ranks):
                newcomers = {
                    new.task: Newcomer(
                        drawn[new.task][matrix], taken_of(near[new.task], matrix, axis), others[new.task]
                    )
                    for new in mine
                    if matrix in new.ranks
                }
                chosen = isolation.arrange(matrix, axis, newcomers, self._key(matrix))
                for task, indices in chosen.items():
                    found[task][matrix] = indices
        return found

    def _key(self, matrix: Matrix) -> tuple[object, ...]:
        """What the order of a matrix's channels depends on."""
        return self.seed, self.geometry.digest, matrix.module

    def _near(self, new: _New) -> list[Holding]:
        """Those whose channels a new task must not have."""
        return [h for h in self.holdings if h.task is None or not h.compositions.isdisjoint(new.compositions)]

    def _full(self, new: _New, matrix: Matrix, rank: int, taken: npt.NDArray[np.bool_], order: Sequence[_New]) -> str:
        """Why a task does not fit: the tasks that all meet and need more than there is, where that is the reason."""
        from .conflicts import clique

        axis = own_axis(new.variant)
        weights = {
            h.task: len(h.indices[matrix.module])
            for h in self.holdings
            if h.task is not None and own_axis(h.variant) == axis and matrix.module in h.indices
        }
        weights |= {n.task: n.ranks[matrix] for n in order if own_axis(n.variant) == axis and matrix in n.ranks}
        graph = _conflict_graph([*self.holdings, *order]).subgraph(weights)
        names = clique(graph, weights=weights, containing=new.task)
        need = sum(weights[name] for name in names)
        size, protected = (
            matrix.shape[axis],
            int(np.count_nonzero(taken_of(held_on(self._protections(), axis), matrix, axis))),
        )
        kept = f" ({protected} more are protected)" if protected else ""
        advice = way_out(new.variant, self._fits_other(new, order))
        if need > size - protected:
            shown = ", ".join(f"{name} {weights[name]}" for name in names[:6]) + (", ..." if len(names) > 6 else "")
            who = f"{len(names)} tasks that all meet each other need" if len(names) > 1 else "the task needs"
            given = f"{matrix.module} has {size - protected} {AXES[axis]} to give{kept}"
            return f"{given}, and {who} {need} ({shown}): {advice}"
        held = int(np.count_nonzero(taken))
        return (
            f"{matrix.module} has {size} {AXES[axis]}, {held} are claimed by tasks that {new.task!r} meets, and it "
            f"needs {rank}: no arrangement was found, though no more than {need} are needed by tasks that all meet: "
            f"release and allocate them together, or {advice}"
        )

    def _fits_other(self, new: _New, order: Sequence[_New]) -> bool:
        """Whether the other variant has room for a task and, as if all of them met, for those asked for with it."""
        axis = own_axis(new.variant)
        near = self._near(new)
        own, other = held_on(near, axis), held_on(near, 1 - axis)
        return all(
            sum(each.ranks.get(matrix, 0) for each in order)
            <= matrix.shape[1 - axis] - np.count_nonzero(taken_of(other, matrix, 1 - axis))
            and not is_crossed(own, matrix, axis)
            for matrix in new.ranks
        )

    def _protections(self) -> list[Holding]:
        return [holding for holding in self.holdings if holding.task is None]

    def _holding(self, task: str) -> Holding:
        return next(holding for holding in self.holdings if holding.task == task)

    def _replace(self, new: Holding) -> Holding:
        self.holdings = [new if holding.task == new.task else holding for holding in self.holdings]
        return new

    def _meets(self, mine: Holding, composition: str) -> dict[str, list[str]]:
        """Tasks of a composition whose cells `mine` owns as well: task -> modules."""
        unsettled = set(self.ledger.unsettled(self.geometry.model, str(mine.task), composition))
        found: dict[str, list[str]] = {}
        for other in self.holdings:
            if other.task in (None, mine.task) or composition not in other.compositions:
                continue
            shared = [module for module in mine.indices if module in other.indices]
            if other.variant == mine.variant:
                shared = [m for m in shared if np.intersect1d(mine.indices[m], other.indices[m]).size]
            elif other.task not in unsettled:
                continue
            if shared:
                found[str(other.task)] = shared
        return found

    def _move(self, holding: Holding, compositions: Collection[str]) -> None:
        task = str(holding.task)
        claims = next(iter(self.ledger.memberships(self.geometry.model, task).values()))
        self.ledger.release(self.geometry.model, task)
        self.holdings = [other for other in self.holdings if other.task != task]
        ranks = {self.geometry.find(module): region.rank for module, region in claims.regions.items()}
        names = tuple(dict.fromkeys(sorted(compositions)))
        self.new.append(_New(task, claims.variant, claims.rank, ranks, names, moved=True))


def _wanted_compositions(
    tasks: Sequence[str], composition: str | Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Task -> the compositions it shall be in, tasks in the order given."""
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    given = {composition: names} if isinstance(composition, str) else composition
    found: dict[str, tuple[str, ...]] = {name: () for name in names}
    for where, members in given.items():
        check_name(where, "composition")
        members = [members] if isinstance(members, str) else list(members)
        for task in members:
            check_name(task, new_task=True)
            found[task] = (*found.get(task, ()), where)
        if len(set(members)) != len(members):
            raise UsageError(f"composition {where} names a task twice ({', '.join(members)}): name each once")
    if not found:
        raise UsageError("no task to allocate for: name at least one")
    outside = [task for task, there in found.items() if not there]
    if outside:
        raise UsageError(f"task {outside[0]!r} is in none of the compositions: add it to one, or leave it out")
    return found


def _check_same(held: TaskClaims, variant: Variant, rank: int, wanted: Mapping[Matrix, int]) -> None:
    modules = {matrix.module: ranked for matrix, ranked in wanted.items()}
    theirs = {module: region.rank for module, region in held.regions.items()}
    if (held.variant, held.rank, theirs) == (variant, rank, modules):
        return
    kinds = ", ".join(sorted({module.rpartition(".")[2] for module in theirs}))
    raise AllocationError(
        f"task {held.task!r} already holds {held.variant} rank {held.rank} on {len(theirs)} matrices ({kinds}) in "
        f"composition {held.composition!r}, not what is asked for now ({variant} rank {rank} on {len(modules)}): "
        f"run multisbora release --task {held.task} first, or ask for the same"
    )


def _conflict_graph(holders: Iterable[Holding | _New]) -> Any:
    from .conflicts import conflict_graph

    members: dict[str, list[str]] = {}
    alone = []
    for holder in holders:
        if holder.task is None:
            continue
        alone.append(holder.task)
        for name in holder.compositions:
            members.setdefault(name, []).append(holder.task)
    return conflict_graph(members)


def _conflict(
    mine: Holding, composition: str, in_the_way: Mapping[str, list[str]], others: Sequence[Holding], reallocate: bool
) -> str:
    """The line that names both tasks, the matrices, and the way out."""
    other, modules = next(iter(in_the_way.items()))
    shown = ", ".join(modules[:3]) + (", ..." if len(modules) > 3 else "")
    more = f", and {len(in_the_way) - 1} more of its tasks are in the way" if len(in_the_way) > 1 else ""
    crosses = next(h for h in others if h.task == other).variant != mine.variant
    how = "crosses it, and neither yields," if crosses else "owns the same cells"
    problem = (
        f"task {mine.task!r} cannot join composition {composition!r} with its indices: task {other!r} there {how} "
        f"in {len(modules)} matrices ({shown}){more}"
    )
    trained = [str(h.task) for h in (mine, *others) if h.stage != "allocated"]
    movable = mine.stage == "allocated" or all(h.stage == "allocated" for h in others)
    if movable and not reallocate:
        who = f"{mine.task!r} is" if mine.stage == "allocated" else "those in its way are"
        return f"{problem}; {who} not trained yet: run it again with --reallocate for new indices"
    names = ", ".join(trained)
    return f"{problem}; {names} are trained or in training: leave them in separate compositions, or train anew"
