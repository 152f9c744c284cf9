"""Updates of tasks written into a base weight, and taken out of it again bit for bit.

A weight that holds W0 + update at its owned cells needs one product a layer and no second path, in training and in use.
What makes it safe is kept here: the base's own cells, and an account of everything that was written.

This runs in every forward of every layer, so it works on `.data`, past autograd, with as few calls as it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..delta import delta
from ..errors import MergeError
from ..region import Region, Variant


@dataclass(eq=False, slots=True)
class Part:
    """What one task adds to one weight. Only the content of `values` may change; with anything else it is another part.

    Attributes:
        values: (out_features, r) for fa, (r, in_features) for fb, in logical orientation.
        index: owned columns or rows, (r,), int64: torch gathers and scatters faster by it than by int32.
        excluded: indices of the other axis whose cells belong to earlier claims, (e,), int64, or None.
        axis: of the stored weight, along which the task owns.
        transposed: whether the weight is stored (in, out), as Conv1D does.
    """

    name: str
    variant: Variant
    values: Tensor
    index: Tensor
    excluded: Tensor | None
    scaling: float
    weight: float
    axis: int
    transposed: bool

    def version(self) -> tuple[int, int]:
        """Another one when the values have changed, as far as torch can tell without looking at them: what is written
        through `.data` leaves no trace."""
        return self.values.untyped_storage()._cdata, self.values._version

    def cells(self, base: Tensor, weight: Tensor) -> Tensor:
        """What the weight is to hold along `index`: the base's cells with the update, fp32, rounded once (paper eq. 8).

        Args:
            base: columns or rows along `index`, as they are without this task.
            weight: cells of earlier claims are taken from it as they are, since another task may be in them.
        """
        if self.weight:
            update = delta(self.values.data.float(), self.scaling, self.weight)
            cells = torch.add(base, update.t() if self.transposed else update, out=torch.empty_like(base))
        else:  # a task at 0 is left out, as in a merge of files
            cells = base.clone()
        if self.excluded is not None:
            other = 1 - self.axis
            theirs = weight.index_select(other, self.excluded).index_select(self.axis, self.index)
            cells.index_copy_(other, self.excluded, theirs)
        return cells

    def region(self) -> Region:
        excluded = () if self.excluded is None else tuple(self.excluded.tolist())
        return Region(self.variant, tuple(self.index.tolist()), excluded)


@dataclass(eq=False, slots=True)
class _Entry:
    """A part that is in the weight: the base's cells, and which version of its values was written over them."""

    part: Part
    base: Tensor
    version: tuple[int, int]
    stale: bool = False

    def is_in(self, weight: Tensor) -> bool:
        cells = self.part.cells(self.base, weight)
        return torch.equal(weight.index_select(self.part.axis, self.part.index), cells)


class LiveWeight:
    """The tasks that are written into one weight at present. Every write is `W0 + update`, from W0 as it was kept.

    The weight is written without a new version for autograd: whoever differentiates through it has to see to it that it
    holds the same in backward as it held in forward (`kernels.through_weight` does).
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._weight: Tensor | None = None
        self._version = 0
        self._disjoint = True

    def __len__(self) -> int:
        return len(self._entries)

    def write(self, weight: Tensor, parts: Sequence[Part], *, renew: bool = False) -> None:
        """Make `weight` hold the base with exactly these tasks, in this order; nothing is done where it does already.

        Args:
            weight: (out_features, in_features), or transposed; a dense float tensor.
            renew: write also what seems to be there already.
        """
        self._follow(weight)
        entries = self._entries
        if len(entries) != len(parts) or any(e.part is not part for e, part in zip(entries, parts, strict=True)):
            self._write_all(weight, parts)
            return
        if not renew:
            for entry in entries:
                entry.stale = entry.stale or entry.version != entry.part.version()
        if not self._disjoint and (renew or any(entry.stale for entry in entries)):
            self._write_all(weight, parts)  # cells that hold two tasks come from both
            return
        for entry in entries:
            if renew or entry.stale:
                part = entry.part
                weight.data.index_copy_(part.axis, part.index, part.cells(entry.base, weight.data))
                entry.version, entry.stale = part.version(), False

    def _write_all(self, weight: Tensor, parts: Sequence[Part]) -> None:
        self.restore()
        for part in parts:
            self.append(weight, part)

    def append(self, weight: Tensor, part: Part, *, finite: bool = False) -> None:
        """Write one more task over what is there.

        Args:
            finite: refuse a result with NaN or infinity before anything is written.

        Raises:
            MergeError: there is such a value.
        """
        self._follow(weight)
        data = weight.data
        base = data.index_select(part.axis, part.index)
        cells = part.cells(base, data)
        if finite and not torch.isfinite(cells).all():
            raise MergeError(f"adapter {part.name!r} gives weights that are not finite: it seems to be broken")
        data.index_copy_(part.axis, part.index, cells)
        if self._entries:
            region = part.region()
            self._disjoint = self._disjoint and not any(entry.part.region().meets(region) for entry in self._entries)
        self._entries.append(_Entry(part, base, part.version()))
        self._weight, self._version = weight, weight._version

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
            index, base = entry.part.index.to(weight.device), entry.base.to(weight)
            weight.data.index_copy_(entry.part.axis, index, base)
        self._weight, self._disjoint = None, True

    def copy(self) -> LiveWeight:
        """The same account of what is written, for a copy of the weight."""
        twin = LiveWeight()
        twin._entries, twin._disjoint = [replace(entry) for entry in self._entries], self._disjoint
        return twin

    def outdate(self, *parts: Part) -> None:
        """The values of some tasks (none given: of all) change in a way that torch may not count: write them anew."""
        for entry in self._entries:
            entry.stale = entry.stale or not parts or entry.part in parts

    def _follow(self, weight: Tensor) -> None:
        """Somebody else may have written to the weight, or put another in its place. Where our cells are still in it
        (a broadcast of equal weights, a copy), they are ours; where not, the new content is the base."""
        if not self._entries or (weight is self._weight and weight._version == self._version):
            return
        data = weight.data
        if all(entry.is_in(data) for entry in (self._entries if self._disjoint else self._entries[-1:])):
            self._weight, self._version = weight, weight._version
            return
        self._entries.clear()
        self._weight, self._disjoint = None, True
