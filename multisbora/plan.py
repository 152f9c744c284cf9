"""What a task would cost and how many more would fit, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .allocator import DEFAULT_TARGETS, matrix_ranks
from .errors import AllocationError
from .geometry import Geometry, Matrix
from .region import Variant, own_axis
from .registry import DEFAULT_COMPOSITION, Registry

_VALUE_BYTES = 4  # fp32
_INDEX_BYTES = 4  # int32


@dataclass(frozen=True, slots=True)
class MatrixPlan:
    """One matrix of a plan.

    Attributes:
        rank: indices that each task gets.
        free: indices of the variant's axis that no task of the composition holds.
    """

    matrix: Matrix
    variant: Variant
    rank: int
    free: int

    @property
    def trainable_parameters(self) -> int:
        """Of one task: rank x out_features for fa, rank x in_features for fb."""
        return self.rank * self.matrix.shape[1 - own_axis(self.variant)]

    @property
    def lora_parameters(self) -> int:
        """Of a LoRA of the same rank: rank x (in_features + out_features)."""
        return self.rank * sum(self.matrix.shape)

    @property
    def capacity_tasks(self) -> int:
        """How many more tasks of this rank fit."""
        return self.free // self.rank

    def to_json(self) -> dict[str, Any]:
        return {
            "module": self.matrix.module,
            "out_features": self.matrix.out_features,
            "in_features": self.matrix.in_features,
            "rank": self.rank,
            "trainable_parameters": self.trainable_parameters,
            "free": self.free,
            "capacity_tasks": self.capacity_tasks,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """Figures for tasks of one kind on one model. Parameters and bytes are those of ONE task."""

    model: str
    variant: Variant
    rank: int
    tasks: int
    matrices: tuple[MatrixPlan, ...]

    @property
    def trainable_parameters(self) -> int:
        return sum(matrix.trainable_parameters for matrix in self.matrices)

    @property
    def lora_parameters(self) -> int:
        """Trainable parameters of a LoRA of the same ranks on the same matrices."""
        return sum(matrix.lora_parameters for matrix in self.matrices)

    @property
    def adapter_bytes(self) -> int:
        """Tensor bytes of one adapter file: fp32 values and int32 indices, without the file's header."""
        indices = sum(matrix.rank for matrix in self.matrices)
        return _VALUE_BYTES * self.trainable_parameters + _INDEX_BYTES * indices

    @property
    def capacity_tasks(self) -> int:
        """How many more such tasks fit into the composition: its fullest matrix decides."""
        return min(matrix.capacity_tasks for matrix in self.matrices)

    def require_capacity(self) -> None:
        """Refuse a plan whose `tasks` do not fit.

        Raises:
            AllocationError: names the matrix that is too small.
        """
        if self.tasks <= self.capacity_tasks:
            return
        tight = min(self.matrices, key=lambda matrix: matrix.capacity_tasks)
        axis = own_axis(self.variant)
        raise AllocationError(
            f"{self.tasks} tasks of rank {tight.rank} need {self.tasks * tight.rank} {('rows', 'columns')[axis]} of "
            f"{tight.matrix.module}, {tight.free} of {tight.matrix.shape[axis]} are free: room for "
            f"{self.capacity_tasks}; lower the rank, use {'fb' if axis else 'fa'}, or another composition"
        )

    def to_json(self) -> dict[str, Any]:
        """The shape of `plan --json` (design, section 6)."""
        return {
            "model": self.model,
            "variant": self.variant,
            "rank": self.rank,
            "matrices": len(self.matrices),
            "trainable_parameters": self.trainable_parameters,
            "lora_parameters": self.lora_parameters,
            "adapter_bytes": self.adapter_bytes,
            "capacity_tasks": self.capacity_tasks,
            "matrices_detail": [matrix.to_json() for matrix in self.matrices],
        }


def plan(
    geometry: Geometry,
    *,
    variant: Variant = "fa",
    rank: int = 64,
    target_modules: str | Sequence[str] = DEFAULT_TARGETS,
    tasks: int = 1,
    rank_pattern: Mapping[str, int] | None = None,
    registry: Registry | None = None,
    composition: str = DEFAULT_COMPOSITION,
) -> Plan:
    """Work out parameters, bytes and capacity. Writes nothing.

    Args:
        tasks: how many new tasks are wanted; only `Plan.require_capacity` asks.
        registry: whose claims in `composition` are no longer free; None counts every index as free.

    Raises:
        UsageError: a variant, rank or target that cannot mean anything.
        RegistryError: the registry cannot be read.
    """
    ranks = matrix_ranks(geometry, variant=variant, rank=rank, target_modules=target_modules, rank_pattern=rank_pattern)
    claimed = registry.claimed(geometry.model, composition) if registry else {}
    axis = own_axis(variant)
    return Plan(
        model=geometry.model,
        variant=variant,
        rank=rank,
        tasks=tasks,
        matrices=tuple(
            MatrixPlan(matrix, variant, ranked, _free(matrix, axis, claimed)) for matrix, ranked in ranks.items()
        ),
    )


def _free(matrix: Matrix, axis: int, claimed: Mapping[tuple[str, int], int]) -> int:
    """Indices that a task may still get; none where the tasks of the other variant own every cell of the matrix."""
    if claimed.get((matrix.module, 1 - axis), 0) == matrix.shape[1 - axis]:
        return 0
    return matrix.shape[axis] - claimed.get((matrix.module, axis), 0)
