"""Which free indices a task gets. Drawn at random, as in the paper, but seeded, disjoint, and in one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .delta import pattern_value
from .errors import AllocationError, UsageError
from .geometry import Geometry, Matrix
from .region import VARIANTS, Region, Variant, draw, own_axis
from .registry import DEFAULT_COMPOSITION, Indices, Ledger, Registry, TaskClaims, check_name

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
_AXES = ("rows", "columns")
_Taken = dict[tuple[str, int], Indices]  # (module, axis) -> claimed indices
_NONE: Indices = np.empty(0, np.uint32)


@dataclass(frozen=True)
class Allocation:
    """What `allocate` gave: the claims of every task asked for, in the order asked."""

    composition: str
    tasks: dict[str, TaskClaims]

    def to_json(self) -> dict[str, Any]:
        """`{"composition", "tasks": {task: {"variant", "rank", "regions": {module: sorted indices}}}}`."""
        return {
            "composition": self.composition,
            "tasks": {name: found.to_json() for name, found in self.tasks.items()},
        }


def allocate(
    registry: Registry,
    geometry: Geometry,
    tasks: Sequence[str],
    *,
    variant: Variant = "fa",
    rank: int = 64,
    composition: str = DEFAULT_COMPOSITION,
    target_modules: str | Sequence[str] = DEFAULT_TARGETS,
    seed: int = 0,
    rank_pattern: Mapping[str, int] | None = None,
    dry_run: bool = False,
) -> Allocation:
    """Claim indices for tasks: all of them or, on any error, none. Again with the same arguments gives the same claims.

    A task that is in another composition of the model already gets the indices it has there, so one adapter serves
    both. Where an fa column crosses an fb row of an earlier task, the earlier one keeps the cell (`Region.excluded`).

    Args:
        tasks: names; letters, digits, dot, dash, underscore.
        rank: indices a matrix, for every matrix that `rank_pattern` (PEFT's meaning) does not name.
        seed: of the random draw. The draw also depends on the geometry, composition, task and matrix, and on nothing
            else but which indices are free. A task that holds claims keeps them whatever the seed.
        dry_run: work out the same answer, write nothing.

    Raises:
        UsageError: a name, variant, rank or target that cannot mean anything.
        AllocationError: too few free indices, or a task that holds other claims already.
        RegistryError: the store cannot be used, or the model's name stands there for another geometry.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise UsageError("no task to allocate for: name at least one")
    for name in names:
        check_name(name)
    if len(set(names)) != len(names):
        raise UsageError(f"a task is named twice in {', '.join(names)}: name each once")
    check_name(composition, "composition")
    wanted = matrix_ranks(
        geometry, variant=variant, rank=rank, target_modules=target_modules, rank_pattern=rank_pattern
    )

    found: dict[str, TaskClaims] = {}
    with registry.transaction(dry_run=dry_run) as ledger:
        ledger.register(geometry)
        held = {name: ledger.memberships(geometry.model, name) for name in names}
        taken: _Taken = {}
        if any(composition not in claims for claims in held.values()):
            taken = ledger.taken(geometry.model, composition)
        for name in names:
            for other in held[name].values():
                _check_same(other, variant, rank, wanted)
            if composition in held[name]:
                found[name] = held[name][composition]
                continue
            if held[name]:
                elsewhere = next(iter(held[name].values()))
                new = _reuse(ledger, elsewhere, composition, taken)
            else:
                regions = {
                    matrix.module: _draw(matrix, ranked, variant, taken, (seed, geometry.digest, composition, name))
                    for matrix, ranked in wanted.items()
                }
                new = TaskClaims(geometry.model, geometry.digest, composition, name, variant, rank, regions)
            ledger.add(new)
            for module, region in new.regions.items():
                key = (module, own_axis(variant))
                taken[key] = np.concatenate([taken.get(key, _NONE), np.asarray(region.indices, np.uint32)])
            found[name] = new
    return Allocation(composition=composition, tasks=found)


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
                f"rank {ranks[matrix]} is above the {matrix.shape[axis]} {_AXES[axis]} of {matrix.module}: "
                f"lower it, or give that matrix its own with rank_pattern"
            )
    return ranks


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


def _draw(matrix: Matrix, rank: int, variant: Variant, taken: _Taken, key: tuple[object, ...]) -> Region:
    axis = own_axis(variant)
    size = matrix.shape[axis]
    mine = taken.get((matrix.module, axis), _NONE)
    if size - len(mine) < rank:
        other = "fb" if variant == "fa" else "fa"
        raise AllocationError(
            f"{matrix.module} has {size} {_AXES[axis]}, {len(mine)} are claimed; rank {rank} needs {rank}: "
            f"lower the rank, use {other}, or another composition"
        )
    crossed = np.sort(taken.get((matrix.module, 1 - axis), _NONE)).tolist()
    if len(crossed) == matrix.shape[1 - axis]:
        raise AllocationError(
            f"{matrix.module}: other tasks own all of its {len(crossed)} {_AXES[1 - axis]}, so {variant} {_AXES[axis]} "
            "would have no cell left: use the other variant, or another composition"
        )
    is_free = np.ones(size, bool)
    is_free[mine] = False
    free = np.flatnonzero(is_free)
    indices = np.sort(free[draw(len(free), rank, *key, matrix.module)]).tolist()
    return Region(variant, tuple(indices), tuple(crossed))


def _reuse(ledger: Ledger, held: TaskClaims, composition: str, taken: _Taken) -> TaskClaims:
    """The claims of a task in another composition, for this one as well: same regions, or an error."""
    axis = own_axis(held.variant)
    for module, region in held.regions.items():
        same = set(taken.get((module, axis), _NONE).tolist()).intersection(region.indices)
        crossed = set(taken.get((module, 1 - axis), _NONE).tolist()).difference(region.excluded)
        if same or crossed:
            there = ledger.claims(held.model, composition).values()
            owner = next(
                claims.task
                for claims in there
                if module in claims.regions
                and set(claims.regions[module].indices) & (same if claims.variant == held.variant else crossed)
            )
            raise AllocationError(
                f"task {held.task!r} has its indices from composition {held.composition!r}, and task {owner!r} of "
                f"{composition!r} owns some of their cells in {module}: release one of the two and allocate it again, "
                f"first where it meets the most tasks"
            )
    return replace(held, composition=composition)
