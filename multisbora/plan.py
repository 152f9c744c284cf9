"""What a task would cost and how many more would fit, before anything is written.

Letters. The paper uses k and d for the two sizes of a matrix and swaps them: in its text and in the columns "Trainable"
and "Gradient" of Table 1 the input has size k and the output d; in the column "Total" of the rows of SBoRA and
in all of Table 2 it is the other way round. Here a shape is always (out, in): W is out x in, h = x W^T, fa owns
columns (indices below `in`) and trains B (out x rank), fb owns rows (indices below `out`) and trains A (rank x in).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from .allocator import DEFAULT_TARGETS, matrix_ranks, way_out
from .errors import AllocationError, UsageError
from .geometry import Geometry, Matrix
from .region import Variant, own_axis
from .registry import DEFAULT_COMPOSITION, Registry

Method = Literal["fa", "fb", "lora"]
METHODS: tuple[Method, ...] = get_args(Method)

_ITEM_BYTES = 4  # values, their gradients and AdamW's two moments are fp32, indices int32
_HALF = 2  # bytes of an activation of a bf16 or fp16 model
_ALIGNMENT = 8  # safetensors pads its header with spaces


@dataclass(frozen=True, slots=True)
class Cost:
    """What one method adds to one matrix, or to several together.

    Attributes:
        trainable_parameters: Table 1, "Trainable Params".
        total_parameters: Table 1, "Total Params": the trained values and the vector of indices.
        multiplications, additions: a token, of the adapter alone (Table 2 without its first term, which is the frozen
            matrix's own); the addition to the frozen matrix's output is counted.
        saved_elements: activations that backward needs a token and the frozen model alone would not keep. fa keeps the
            gathered x[..., I], fb the whole x, LoRA x and x A^T. An x that several matrices share, as q, k and v do, is
            counted for each of them, so fb's and LoRA's sums are upper bounds.
    """

    trainable_parameters: int
    total_parameters: int
    multiplications: int
    additions: int
    saved_elements: int

    @property
    def gradient_bytes(self) -> int:
        """fp32, of all trainable parameters."""
        return _ITEM_BYTES * self.trainable_parameters

    @property
    def optimizer_bytes(self) -> int:
        """AdamW's two moments in fp32, without its step counter of 4 bytes a tensor."""
        return 2 * _ITEM_BYTES * self.trainable_parameters

    @property
    def activation_bytes_per_token(self) -> int:
        """`saved_elements` in a 16-bit model. PEFT's LoRA keeps them in fp32, the dtype of its factors: twice this."""
        return _HALF * self.saved_elements


def matrix_cost(method: Method, shape: tuple[int, int], rank: int) -> Cost:
    """Tables 1 and 2 of the paper for one matrix.

    Args:
        method: "fa", "fb", or "lora" of the same rank.
        shape: (out_features, in_features).

    Raises:
        UsageError: the method is unknown.
    """
    out, in_ = shape
    if method == "fa":
        values, additions, saved = out * rank, out * (rank - 1) + out, rank
    elif method == "fb":
        values, additions, saved = in_ * rank, rank * (in_ - 1) + rank, in_
    elif method == "lora":
        values, additions, saved = (out + in_) * rank, rank * (in_ - 1) + out * (rank - 1) + out, in_ + rank
    else:
        raise UsageError(f"method {method!r} is unknown: use {', '.join(METHODS)}")
    # Every trained value is multiplied once a token.
    return Cost(values, values if method == "lora" else rank + values, values, additions, saved)


@dataclass(frozen=True, slots=True)
class MatrixPlan:
    """One matrix of a plan.

    Attributes:
        rank: indices that each task gets.
        free: indices of the variant's axis that no task of the composition holds.
        other_free: likewise of the other axis, for tasks of the other variant.
    """

    matrix: Matrix
    variant: Variant
    rank: int
    free: int
    other_free: int

    @property
    def trainable_parameters(self) -> int:
        """Of one task: rank x out_features for fa, rank x in_features for fb."""
        return self.cost(self.variant).trainable_parameters

    @property
    def values_shape(self) -> tuple[int, int]:
        """Of the trained values: (out_features, rank) for fa, (rank, in_features) for fb."""
        out_features, in_features = self.matrix.shape
        return (out_features, self.rank) if self.variant == "fa" else (self.rank, in_features)

    @property
    def lora_parameters(self) -> int:
        """Of a LoRA of the same rank: rank x (in_features + out_features)."""
        return self.cost("lora").trainable_parameters

    def cost(self, method: Method) -> Cost:
        """By a method at this rank, whatever the plan's own variant is."""
        return matrix_cost(method, self.matrix.shape, self.rank)

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

    def cost(self, method: Method) -> Cost:
        """The sum over all matrices by a method at the plan's ranks, whatever its own variant is."""
        costs = [asdict(part.cost(method)) for part in self.matrices]
        return Cost(**{key: sum(cost[key] for cost in costs) for key in costs[0]})

    @property
    def adapter_bytes(self) -> int:
        """Size of the `adapter_model.safetensors` that training writes, header included.

        The names in its header are those of the live model. A stored name that lacks a leading part of them is
        completed for GPT-2 and its relatives ("h.0..." is "transformer.h.0..." live); elsewhere it counts as it is.
        """
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # safetensors writes wider and floating dtypes first, then sorts by name: all values, then all indices.
        for kind, dtype in (("values", "F32"), ("indices", "I32")):
            for part in sorted(self.matrices, key=lambda part: _live_name(part.matrix)):
                shape = part.values_shape if kind == "values" else (part.rank,)
                start, end = end, end + _ITEM_BYTES * math.prod(shape)
                name = f"base_model.model.{_live_name(part.matrix)}.sbora_{kind}"
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
        length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
        return 8 + -(-length // _ALIGNMENT) * _ALIGNMENT + end

    @property
    def ranks(self) -> dict[Matrix, int]:
        """Indices that a task gets of each matrix."""
        return {planned.matrix: planned.rank for planned in self.matrices}

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
        fits_other = all(self.tasks * matrix.rank <= matrix.other_free for matrix in self.matrices)
        raise AllocationError(
            f"{self.tasks} tasks of rank {tight.rank} need {self.tasks * tight.rank} {('rows', 'columns')[axis]} of "
            f"{tight.matrix.module}, {tight.free} of {tight.matrix.shape[axis]} are free: room for "
            f"{self.capacity_tasks}; {way_out(self.variant, fits_other)}"
        )

    def to_json(self) -> dict[str, Any]:
        """The keys of `plan --json` (design, section 6), then what training takes."""
        own = self.cost(self.variant)
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
            "gradient_bytes": own.gradient_bytes,
            "optimizer_bytes": own.optimizer_bytes,
            "activation_bytes_per_token": {m: self.cost(m).activation_bytes_per_token for m in METHODS},
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
            MatrixPlan(matrix, variant, ranked, _free(matrix, axis, claimed), _free(matrix, 1 - axis, claimed))
            for matrix, ranked in ranks.items()
        ),
    )


def _free(matrix: Matrix, axis: int, claimed: Mapping[tuple[str, int], int]) -> int:
    """Indices that a task may still get; none where the tasks of the other variant own every cell of the matrix."""
    if claimed.get((matrix.module, 1 - axis), 0) == matrix.shape[1 - axis]:
        return 0
    return matrix.shape[axis] - claimed.get((matrix.module, axis), 0)


def _live_name(matrix: Matrix) -> str:
    return f"transformer.{matrix.module}" if matrix.module.startswith("h.") else matrix.module
