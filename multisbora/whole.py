"""Modules that tasks trained whole, beside their regions (PEFT's `modules_to_save`): a head, an embedding, a norm.

They have no region, so two tasks can have trained the same one, and what a merge then does with it has to be said:
refuse it, keep the one that there is, or average them with their lambdas as weights. The exactness of regions does not
hold for an average: it is taken of tasks that disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from .adapter import Adapter
from .cells import PATCHABLE, Cells
from .checkpoint import Checkpoint
from .errors import AdapterError, MergeError, UsageError
from .geometry import Matrix
from .undo import WHOLE
from .weights import TaskWeight

WholeModules = Literal["refuse", "keep", "average"]
WHOLE_MODULES: tuple[str, ...] = get_args(WholeModules)


@dataclass(frozen=True)
class Whole:
    """What tasks do to one stored tensor that they trained whole.

    Attributes:
        tensor: its name in the base.
        how: "keep", of one task, W0 + lambda * (W - W0); or "average", of any, sum(lambda * W) / sum(lambda).
        weights: task -> lambda, sorted; none is 0.
        trained: task -> its tensor, of the stored shape.
    """

    tensor: str
    how: str
    weights: dict[str, float]
    trained: dict[str, np.ndarray]
    rows: int
    columns: int

    task = WHOLE
    weight = 1.0

    @property
    def module(self) -> str:
        return self.tensor

    @cached_property
    def matrix(self) -> Matrix:
        return Matrix(self.tensor, self.tensor, self.rows, self.columns)

    @cached_property
    def cells(self) -> Cells:
        return Cells(None, None, (self.rows, self.columns), False, (None, None))

    def compose(self, before: np.ndarray, own: slice) -> np.ndarray:
        """Rows `own` of the merged tensor, where the base holds `before`: fp32, in the order of the tasks' names,
        rounded once.

        Raises:
            MergeError: a result is not finite.
        """
        rows = {task: self._rows(task)[own].astype(np.float32) for task in self.weights}
        with np.errstate(over="ignore", invalid="ignore"):
            if self.how == "keep":
                ((task, weight),) = self.weights.items()
                base = before.astype(np.float32)
                merged = rows[task] if weight == 1 else base + np.float32(weight) * (rows[task] - base)
            else:
                total = np.float32(sum(self.weights.values()))
                merged = np.zeros(before.shape, np.float32)
                for task, weight in self.weights.items():
                    merged += np.float32(weight) * rows[task]
                merged /= total
            after = merged.astype(before.dtype)
        if not np.isfinite(after).all():
            raise MergeError(f"{self.tensor} would hold a value that {before.dtype} cannot: lower the weights")
        return after

    def _rows(self, task: str) -> np.ndarray:
        return self.trained[task].reshape(self.rows, self.columns)


def whole_modules(
    loaded: Sequence[Adapter],
    weights: Mapping[str, TaskWeight],
    how: str | Mapping[str, str],
    checkpoint: Checkpoint,
) -> dict[str, Whole]:
    """What adapters do to the tensors that they trained whole: stored tensor -> Whole. Tasks at lambda 0 do nothing.

    Args:
        how: "refuse", "keep" or "average"; of all tasks, or of each, "refuse" for those that it leaves out.

    Raises:
        UsageError: `how` is something else.
        MergeError: a task has such tensors and they are refused; two tasks have one that is to be kept; or the lambdas
            of an average have no positive sum.
        AdapterError: the base stores no such tensor, or of another shape or dtype.
    """
    found: dict[str, Whole] = {}
    for adapter in loaded:
        chosen = how if isinstance(how, str) else how.get(adapter.task, "refuse")
        if chosen not in WHOLE_MODULES:
            raise UsageError(f"whole_modules {chosen!r} is unknown: use {', '.join(WHOLE_MODULES)}")
        for tensor in whole_of(adapter, weights[adapter.task]):
            values, weight = adapter.whole[tensor], weights[adapter.task].at(tensor.rpartition(".")[0])
            if chosen == "refuse":
                raise MergeError(
                    f"{adapter.task} trained {tensor} whole, which has no region of its own: merge with "
                    "--whole-modules keep, or average where several tasks did, or train it without modules_to_save"
                )
            other = found.get(tensor)
            if other is not None and "keep" in (chosen, other.how):
                raise MergeError(
                    f"{', '.join(other.weights)} and {adapter.task} trained {tensor} whole: only one can be kept; "
                    "merge with --whole-modules average, or one of them at weight 0"
                )
            rows, columns = _shape(adapter, tensor, values, checkpoint)
            before, trained = (other.weights, other.trained) if other else ({}, {})
            found[tensor] = Whole(
                tensor, chosen, before | {adapter.task: weight}, trained | {adapter.task: values}, rows, columns
            )
    for whole in found.values():
        if whole.how == "average" and sum(whole.weights.values()) <= 0:
            told = ", ".join(f"{task} {weight:g}" for task, weight in whole.weights.items())
            raise MergeError(f"{whole.tensor} is no average of lambdas {told}: their sum must be positive")
    return found


def whole_of(adapter: Adapter, weight: TaskWeight) -> list[str]:
    """The tensors that an adapter trained whole, less those of lambda 0."""
    return [tensor for tensor in adapter.whole if weight.at(tensor.rpartition(".")[0])]


def require_apart(whole: Mapping[str, Whole], shares: Mapping[str, object]) -> None:
    """Refuse a tensor that one task trained whole and in which another has a region.

    Raises:
        MergeError: there is one.
    """
    for tensor in sorted(whole.keys() & shares.keys()):
        raise MergeError(
            f"{', '.join(whole[tensor].weights)} trained {tensor} whole, in which another task has a region: merge one "
            "of them"
        )


def _shape(adapter: Adapter, tensor: str, values: np.ndarray, checkpoint: Checkpoint) -> tuple[int, int]:
    """(rows, columns) of the stored tensor.

    Raises:
        AdapterError: the base has none that fits.
    """
    if tensor not in checkpoint.where:
        raise AdapterError(
            f"{adapter.path} trained {tensor} whole, which {checkpoint.folder} does not store (a head that is tied to "
            "the embedding is not): merge it at weight 0, or into a base that has it apart"
        )
    info = checkpoint.info(tensor)
    if info.dtype not in PATCHABLE or info.shape != values.shape or not values.size:
        raise AdapterError(
            f"{adapter.path} trained {tensor} as {list(values.shape)}, {checkpoint.folder} has {info.dtype} "
            f"{list(info.shape)}: merge it into its own base"
        )
    return math.prod(info.shape[:-1]), info.shape[-1] if info.shape else 1
