"""What a verification found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_PROBLEM = 1000  # characters of a problem, which can quote names that a stranger chose
Weight = float | dict[str, float]  # lambda; or {"default": lambda, pattern of modules: lambda}


@dataclass(frozen=True, slots=True)
class TaskProof:
    """One task in a merged checkpoint: cells it owns, cells whose bits differ from the base's, its lambda."""

    cells: int
    cells_changed: int
    weight: Weight


@dataclass(frozen=True, slots=True)
class Proof:
    """What `verify` found.

    Attributes:
        ok: everything that was checked holds.
        quick: whether it was checked by the checkpoint's own digests alone, without base and adapters.
        tensors: number of tensors compared bit by bit, or hashed in a quick check.
        cells_changed: cells whose bits differ between base and merged checkpoint, owned or not; in a quick check the
            owned ones.
        cells_outside_regions: those of them that no task owns; None where a quick check found that there are some,
            which it cannot count.
        tasks: task name -> its part.
        problem: the first thing that does not hold; a wrong cell with its stored tensor, row, column, owner,
            and the values expected and found.
    """

    ok: bool
    quick: bool
    tensors: int
    cells_changed: int
    cells_outside_regions: int | None
    tasks: dict[str, TaskProof]
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "quick": self.quick,
            "tensors": self.tensors,
            "cells_changed": self.cells_changed,
            "cells_outside_regions": self.cells_outside_regions,
            "tasks": {
                name: {"cells": task.cells, "cells_changed": task.cells_changed, "weight": task.weight}
                for name, task in self.tasks.items()
            },
            "problem": self.problem,
        }
