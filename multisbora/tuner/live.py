"""Updates of tasks written into a base weight, and taken out of it again bit for bit.

A weight that holds W0 + update at its owned cells needs one product a layer and no second path, in training and in use.
What makes it safe is kept here: the base's own cells, and the exact state of everything that was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..delta import delta
from ..errors import MergeError
from ..region import Region, Variant


@dataclass(frozen=True, slots=True)
class Part:
    """What one task adds to one weight, at one moment.

    Attributes:
        values: (out_features, r) for fa, (r, in_features) for fb, in logical orientation.
        indices: owned columns or rows, (r,).
        excluded: indices of the other axis whose cells belong to earlier claims, (e,) int64, or None.
        axis: of the stored weight, along which the task owns.
        transposed: whether the weight is stored (in, out), as Conv1D does.
    """

    name: str
    variant: Variant
    values: Tensor
    indices: Tensor
    excluded: Tensor | None
    scaling: float
    weight: float
    axis: int
    transposed: bool

    @property
    def stamp(self) -> tuple[object, ...]:
        """Equal for two parts only if they write the same, as far as torch can tell without looking at values: a write
        past autograd, through `.data`, leaves no trace."""
        values, indices = self.values, self.indices
        tensors = (values.untyped_storage()._cdata, values._version, indices.untyped_storage()._cdata, indices._version)
        return (*tensors, self.excluded is None, self.scaling, self.weight)

    def cells(self, base: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        """What the weight is to hold along `index`: the base's cells with the update, fp32, rounded once (paper eq. 8).

        Args:
            base: columns or rows along `index`, as they are without this task.
            weight: cells of earlier claims are taken from it as they are, since another task may be in them.
            index: `indices` as int64.
        """
        cells = torch.empty_like(base)
        if self.weight:  # a task at 0 is left out, as in a merge of files
            update = delta(self.values.detach().float(), self.scaling, self.weight)
            torch.add(base, update.t() if self.transposed else update, out=cells)
        else:
            cells.copy_(base)
        if self.excluded is not None:
            other = 1 - self.axis
            theirs = weight.data.index_select(other, self.excluded).index_select(self.axis, index)
            cells.index_copy_(other, self.excluded, theirs)
        return cells

    @property
    def region(self) -> Region:
        excluded = () if self.excluded is None else tuple(self.excluded.tolist())
        return Region(self.variant, tuple(self.indices.tolist()), excluded)


@dataclass(slots=True)
class _Entry:
    """One task that is in the weight: where, the base's cells, and what was written over them."""

    part: Part
    stamp: tuple[object, ...]
    index: Tensor  # (r,), int64: torch gathers and scatters faster by it
    base: Tensor
    stale: bool = False

    def is_in(self, weight: Tensor) -> bool:
        cells = self.part.cells(self.base, weight, self.index)
        return torch.equal(weight.data.index_select(self.part.axis, self.index), cells)


class LiveWeight:
    """The tasks that are written into one weight at present. Every write is `W0 + update`, from W0 as it was kept.

    The weight is written past autograd, without a new version: whoever differentiates through it has to see to it
    that it holds the same in backward as it held in forward (`SboraLayer` does).
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._weight: Tensor | None = None
        self._version = 0
        self._disjoint = True

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return any(entry.part.name == name for entry in self._entries)

    def index(self, name: str) -> Tensor:
        """int64 indices of a task that is in the weight."""
        return next(entry.index for entry in self._entries if entry.part.name == name)

    @torch.no_grad()
    def write(self, weight: Tensor, parts: Sequence[Part], *, renew: bool = False) -> None:
        """Make `weight` hold the base with exactly these tasks, in this order; nothing is done where it does already.

        Args:
            weight: (out_features, in_features), or transposed; a dense float tensor.
            renew: write also what seems to be there already.
        """
        self._follow(weight)
        if [entry.part.name for entry in self._entries] != [part.name for part in parts]:
            self.restore()
            for part in parts:
                self.append(weight, part)
            return
        stamps = [part.stamp for part in parts]
        old = [renew or entry.stale or entry.stamp != stamp for entry, stamp in zip(self._entries, stamps, strict=True)]
        if not any(old):
            return
        moved = any(entry.stamp[2:5] != stamp[2:5] for entry, stamp in zip(self._entries, stamps, strict=True))
        if moved or not self._disjoint:  # other cells than before, or cells that hold two tasks
            self.restore()
            for part in parts:
                self.append(weight, part)
            return
        for entry, part, stamp, is_old in zip(self._entries, parts, stamps, old, strict=True):
            if is_old:
                weight.data.index_copy_(part.axis, entry.index, part.cells(entry.base, weight, entry.index))
                entry.part, entry.stamp, entry.stale = part, stamp, False

    @torch.no_grad()
    def append(self, weight: Tensor, part: Part, *, finite: bool = False) -> None:
        """Write one more task over what is there.

        Args:
            finite: refuse a result with NaN or infinity before anything is written.

        Raises:
            MergeError: there is such a value.
        """
        self._follow(weight)
        index = part.indices.long()
        base = weight.data.index_select(part.axis, index)
        cells = part.cells(base, weight, index)
        if finite and not torch.isfinite(cells).all():
            raise MergeError(f"adapter {part.name!r} gives weights that are not finite: it seems to be broken")
        weight.data.index_copy_(part.axis, index, cells)
        if self._entries:
            region = part.region
            self._disjoint = self._disjoint and not any(entry.part.region.meets(region) for entry in self._entries)
        self._entries.append(_Entry(part, part.stamp, index, base))
        self._weight, self._version = weight, weight._version

    @torch.no_grad()
    def restore(self, weight: Tensor | None = None) -> None:
        """Put the base's cells back, bit for bit.

        Args:
            weight: a copy of the weight that was written to, if it is to be restored in place of the weight itself.
        """
        weight = self._weight if weight is None else weight
        while self._entries:
            entry = self._entries.pop()
            assert weight is not None  # `append` sets it with the first entry
            # The model may have moved to another device or dtype since.
            index, base = entry.index.to(weight.device), entry.base.to(weight)
            weight.data.index_copy_(entry.part.axis, index, base)
        self._weight, self._disjoint = None, True

    def copy(self) -> LiveWeight:
        """The same account of what is written, for a copy of the weight."""
        twin = LiveWeight()
        twin._entries, twin._disjoint = [replace(entry) for entry in self._entries], self._disjoint
        return twin

    def outdate(self, name: str) -> None:
        """The values of a task are about to change in a way that torch may not count: write them anew next time."""
        for entry in self._entries:
            if entry.part.name == name:
                entry.stale = True

    def outdate_all(self) -> None:
        for entry in self._entries:
            entry.stale = True

    def _follow(self, weight: Tensor) -> None:
        """Somebody else may have written to the weight, or put another in its place. Where our cells are still in it
        (a broadcast of equal weights, a copy), they are ours; where not, the new content is the base."""
        if not self._entries or (weight is self._weight and weight._version == self._version):
            return
        if all(entry.is_in(weight) for entry in (self._entries if self._disjoint else self._entries[-1:])):
            self._weight, self._version = weight, weight._version
            return
        self._entries.clear()
        self._weight, self._disjoint = None, True
