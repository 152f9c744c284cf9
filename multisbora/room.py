"""How many more tasks fit into a composition, and what decides it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .geometry import Matrix
from .region import Variant, own_axis
from .registry import AXES, Registry
from .registry.reader import Holding


@dataclass(frozen=True)
class Room:
    """How many more tasks of one kind fit into a composition, if they are in no other one.

    Attributes:
        tasks: its tasks.
        more_tasks: how many more fit; the matrix with the least room decides.
        module: that matrix.
        axis: "rows" or "columns", what the new tasks would claim of it.
        size: length of that axis.
        free: how many of them nobody holds.
        holders: task -> how many it holds there. All of them meet in this composition, so none can share.
        protected: how many no task may hold.
        crossed: the tasks of the other variant own every cell of the matrix, so nothing fits whatever is free.
    """

    composition: str
    tasks: tuple[str, ...]
    rank: int
    more_tasks: int
    module: str
    axis: str
    size: int
    free: int
    holders: dict[str, int]
    protected: int
    crossed: bool

    @property
    def line(self) -> str:
        """How many more tasks fit, and what decides it."""
        return f"{self.more_tasks or 'no'} more task{'s' if self.more_tasks != 1 else ''} like these fit: {self.reason}"

    @property
    def reason(self) -> str:
        """Why no more than `more_tasks` fit, in one line."""
        if self.crossed:
            return f"every cell of {self.module} is a task's of the other variant, or protected"
        if self.free == self.size:
            return f"{self.module} decides: all of its {self.size} {self.axis} are free"
        if len(self.holders) == 1:
            by = f"by task {next(iter(self.holders))}"
        else:
            by = f"by {len(self.holders)} tasks that all meet" if self.holders else "by no task"
        kept = f", {self.protected} are protected" if self.protected else ""
        held = self.size - self.free - self.protected
        return f"{self.module} decides: {held} of its {self.size} {self.axis} are held {by}{kept}; {self.free} are free"

    def to_json(self) -> dict[str, Any]:
        return {
            "tasks": list(self.tasks),
            "more_tasks": self.more_tasks,
            "line": self.line,
            "tightest": {
                "module": self.module,
                "axis": self.axis,
                "size": self.size,
                "free": self.free,
                "protected": self.protected,
                "crossed": self.crossed,
                "holders": self.holders,
            },
        }


def room(holdings: Sequence[Holding], composition: str, ranks: Mapping[Matrix, int], variant: Variant) -> Room:
    """How many more tasks of one variant fit into a composition.

    Args:
        holdings: at least those of the composition, and the protected channels.
        ranks: matrix -> indices a task claims there.
    """
    inside = [holding for holding in holdings if holding.task is None or composition in holding.compositions]
    axis = own_axis(variant)
    tightest: Room | None = None
    tasks = tuple(holding.task for holding in inside if holding.task is not None)
    own, other = held_on(inside, axis), held_on(inside, 1 - axis)
    for matrix, rank in ranks.items():
        free = matrix.shape[axis] - int(np.count_nonzero(taken_of(own, matrix, axis)))
        crossed = is_crossed(other, matrix, 1 - axis)
        more = 0 if crossed else free // rank
        if tightest is not None and tightest.more_tasks <= more:
            continue
        counts = [(h.task, len(h.indices.get(matrix.module, ()))) for h in own]
        tightest = Room(
            composition=composition,
            tasks=tasks,
            rank=rank,
            more_tasks=more,
            module=matrix.module,
            axis=AXES[axis],
            size=matrix.shape[axis],
            free=free,
            holders={task: count for task, count in counts if task is not None and count},
            protected=sum(count for task, count in counts if task is None),
            crossed=crossed,
        )
    assert tightest is not None  # Geometry.select refuses to select nothing
    return tightest


def find_rooms(
    registry: Registry, model: str, ranks: Mapping[Matrix, int], variant: Variant, also: Iterable[str] = ()
) -> dict[str, Room]:
    """`room` of every composition of a model that has tasks, and of those in `also`, which may have none.

    Args:
        ranks: matrices as the registry names them.
    """
    with registry.reading() as ledger:
        holdings, names = ledger.holdings(model), ledger.compositions(model)
    return {name: room(holdings, name, ranks, variant) for name in dict.fromkeys((*names, *also))}


def held_on(holdings: Iterable[Holding], axis: int) -> list[Holding]:
    """Those that claim on this axis."""
    return [holding for holding in holdings if own_axis(holding.variant) == axis]


def taken_of(holdings: Sequence[Holding], matrix: Matrix, axis: int) -> npt.NDArray[np.bool_]:
    """(size of the axis,): which indices one of them, all of them on this axis, holds."""
    taken = np.zeros(matrix.shape[axis], np.bool_)
    held = [holding.indices[matrix.module] for holding in holdings if matrix.module in holding.indices]
    if held:
        taken[np.concatenate(held)] = True
    return taken


def is_crossed(holdings: Sequence[Holding], matrix: Matrix, axis: int) -> bool:
    """Whether those that claim on this axis leave no cell of the matrix to the other one."""
    return bool(holdings) and bool(taken_of(holdings, matrix, axis).all())
