"""What tasks should have written into a matrix, derived from their adapters while the matrix goes by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from .adapters import Task
from .cells import Impossible, Passing, Share, Window, Wrong
from .tensors import Source, Stored, as_bits, reading, values


class Updated(Passing, ABC):
    """A share while its matrix goes by. `wrong` are the cells of its undo file that are not the base's."""

    def __init__(self, share: Share, stack: ExitStack) -> None:
        super().__init__(share, None if share.undo is None else stack.enter_context(reading(share.undo)))
        self.wrong = Wrong()

    @abstractmethod
    def after(self, held: np.ndarray, dtype: str, window: Window) -> np.ndarray:
        """What cells must hold that held this in the base; bits in, bits out."""


class Values(Protocol):
    """Where the values of a task are, by module; an adapter, or what was merged instead."""

    def values(self, module: str) -> torch.Tensor: ...


@dataclass(eq=False)
class Update(Share):
    """What one task trained in its region. `factor` is lambda * s; None where lambda is 0, and the base's bits stay.

    Attributes:
        merged: what a corrected merge wrote instead of lambda * s * values; None in a plain one.
    """

    adapter: Task | None = None
    factor: float | None = None
    merged: Values | None = None

    def start(self, stack: ExitStack) -> Updated:
        """Take the values out of the adapter.

        Raises:
            Impossible: they do not fit the region.
        """
        assert self.adapter is not None
        if self.merged is None or self.factor is None:
            return _Region(self, self.adapter.values(self.module), self.factor, stack)
        return _Region(self, self.merged.values(self.module), 1.0, stack)


class _Region(Updated):
    def __init__(self, share: Update, trained: torch.Tensor, factor: float | None, stack: ExitStack) -> None:
        super().__init__(share, stack)
        self.factor = factor
        what = f"{share.task}: {share.matrix.cells_name}"
        try:
            self.values, clean = self.cells.arrange(trained, share.matrix)
        except ValueError as error:
            raise Impossible(f"{what}: {error}") from None
        if not clean:
            whose = "adapter's" if share.merged is None else "corrected"
            raise Impossible(f"{what}: the {whose} values are not zero in cells that an earlier task owns")

    def after(self, held: np.ndarray, dtype: str, window: Window) -> np.ndarray:
        """W0 + (lambda * s) * values in fp32, rounded once."""
        if self.factor is None:
            return held
        old = values(held, dtype)
        update = torch.tensor(self.factor, dtype=torch.float32) * self.values[window.first : window.last]
        return as_bits((old.to(torch.float32) + update).to(old.dtype))


@dataclass(eq=False)
class Replacement(Share):
    """What tasks make of a tensor that they trained whole.

    Attributes:
        keep: of one task, W0 + lambda * (W - W0); else of several, sum(lambda * W) / sum(lambda).
        weights: task -> lambda, in the order of their names; none is 0.
        sources: task -> its tensor, in its adapter.
    """

    keep: bool = True
    weights: dict[str, float] = field(default_factory=dict)
    sources: dict[str, Stored] = field(default_factory=dict)

    @property
    def whose(self) -> str:
        return f"trained whole by {', '.join(self.weights)}"

    def start(self, stack: ExitStack) -> Updated:
        """Open the adapters' files."""
        return _Whole(self, stack)


class _Whole(Updated):
    def __init__(self, share: Replacement, stack: ExitStack) -> None:
        super().__init__(share, stack)
        self.keep, self.weights = share.keep, share.weights
        self.sources: dict[str, tuple[Source, Stored]] = {
            task: (stack.enter_context(reading(stored)), stored) for task, stored in share.sources.items()
        }

    def after(self, held: np.ndarray, dtype: str, window: Window) -> np.ndarray:
        """In fp32, task after task, rounded once."""
        old = values(held, dtype)
        base, merged = old.to(torch.float32), torch.zeros(old.shape, dtype=torch.float32)
        for task, weight in self.weights.items():
            trained, factor = self._rows(task, window), torch.tensor(weight, dtype=torch.float32)
            if not self.keep:
                merged = merged + factor * trained
            else:
                merged = trained if weight == 1 else base + factor * (trained - base)
        if not self.keep:
            merged = merged / torch.tensor(sum(self.weights.values()), dtype=torch.float32)
        return as_bits(merged.to(old.dtype))

    def _rows(self, task: str, window: Window) -> torch.Tensor:
        source, stored = self.sources[task]
        width = len(window.columns)
        size = stored.rows.size
        raw = source.read(window.first * width * size, window.last * width * size).view(f"u{size}")
        return values(raw, stored.dtype).reshape(-1, width).to(torch.float32)
