"""Updates of tasks written into a base weight, and taken out of it again bit for bit.

A weight that holds W0 + update at its owned cells needs one product a layer and no second path, in training and in use.
What makes it safe is kept here: the base's own cells, and an account of everything that was written.

This runs in every forward of every layer, so it works on `.data`, past autograd, with as few calls as it can. An entry
is filed before the weight is written and dropped after it is restored, so that an interrupt loses nothing.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..delta import delta
from ..errors import MergeError, UsageError
from ..region import Region, Variant

# torch lets other threads run while it writes. One lock for all weights: only who has something to write takes it.
_LOCK = threading.RLock()


class Version:
    """A tensor's content at a moment, as far as torch can tell without looking at it: writes through `.data` leave no
    trace. It keeps the memory alive that it speaks of, whose address could be another tensor's otherwise."""

    __slots__ = ("number", "storage")

    def __init__(self, tensor: Tensor) -> None:
        self.storage: Any = tensor.untyped_storage()
        self.number = tensor._version

    def __reduce__(self) -> tuple[Any, ...]:
        return Version, (torch.empty(0),)  # a copy says nothing, and does not copy the memory

    def is_of(self, tensor: Tensor) -> bool:
        return bool(self.number == tensor._version and self.storage._cdata == tensor.untyped_storage()._cdata)


@dataclass(eq=False, slots=True)
class Part:
    """What one task adds to one weight. Only the content of `values` may change; with anything else it is another part.

    Attributes:
        values: (out_features, r) for fa, (r, in_features) for fb, in logical orientation.
        index: owned columns or rows, (r,), int64: torch gathers and scatters faster by it than by int32.
        excluded: indices of the other axis whose cells belong to earlier claims, (e,), int64, or None.
        axis: of the stored weight, along which the task owns.
        transposed: whether the weight is stored (in, out), as Conv1D does.

    Parts of one layer with the same `index` object are of the same cells.
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
    _region: Region | None = None

    def weighted(self, values: Tensor, scaling: float, weight: float) -> Part:
        """The same cells with other values or another lambda."""
        return replace(self, values=values, scaling=scaling, weight=weight)

    def version(self) -> Version:
        return Version(self.values)

    def cells(self, base: Tensor, weight: Tensor) -> Tensor:
        """What the weight is to hold along `index`: the base's cells with the update, fp32, rounded once (paper eq. 8).

        Args:
            base: columns or rows along `index`, as they are without this task.
            weight: see `spare`.
        """
        if self.weight:
            update = delta(self.values.data.float(), self.scaling, self.weight)
            cells = torch.add(base, update.t() if self.transposed else update, out=torch.empty_like(base))
        else:  # a task at 0 is left out, as in a merge of files
            cells = base.clone()
        return self.spare(cells, weight)

    def spare(self, cells: Tensor, weight: Tensor) -> Tensor:
        """`cells` along `index`, with those of earlier claims set, in place, to what the weight holds: another task may
        be in them."""
        if self.excluded is not None:
            other = 1 - self.axis
            theirs = weight.index_select(other, self.excluded).index_select(self.axis, self.index)
            cells.index_copy_(other, self.excluded, theirs)
        return cells

    def region(self) -> Region:
        if self._region is None:
            excluded = () if self.excluded is None else tuple(self.excluded.tolist())
            self._region = Region(self.variant, tuple(self.index.tolist()), excluded)
        return self._region


@dataclass(eq=False, slots=True)
class _Entry:
    """A part that is in the weight: the base's cells, and which version of its values was written over them.

    What `base` holds in the cells of earlier claims means nothing.
    """

    part: Part
    base: Tensor
    version: Version
    stale: bool = True

    def is_old(self) -> bool:
        return self.stale or not self.version.is_of(self.part.values)

    def is_in(self, weight: Tensor) -> bool:
        cells = self.part.cells(self.base, weight)
        return torch.equal(weight.index_select(self.part.axis, self.part.index), cells)


class LiveWeight:
    """The tasks that are written into one weight at present. Every write is `W0 + update`, from W0 as it was kept.

    Where no two tasks share a cell, a change of tasks or lambdas costs the cells of those that change, and no others.
    Where some do, all are taken out and written anew, in order.

    The weight is written without a new version for autograd: whoever differentiates through it has to see to it that it
    holds the same in backward as it held in forward (`kernels.through_weight` does). Several threads may use a weight
    with the same tasks in it; with different ones they would take it from each other.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._weight: Tensor | None = None
        self._version: Version | None = None
        self._disjoint = True
        self._sealed = ""

    def __len__(self) -> int:
        return len(self._entries)

    def seal(self, reason: str) -> None:
        """Restore the weight, and have it left alone from now on: `write` refuses, with this reason. "" opens it."""
        self.restore()
        self._sealed = reason

    def write(self, weight: Tensor, parts: Sequence[Part], *, renew: bool = False) -> None:
        """Make `weight` hold the base with exactly these tasks, in this order; nothing is done where it does already.

        Args:
            weight: (out_features, in_features), or transposed; a dense float tensor.
            renew: write also what seems to be there already.

        Raises:
            UsageError: it is sealed, or somebody else wrote to the weight while tasks were in it.
        """
        if renew or not self._is_there(weight, parts):
            with _LOCK:
                self._write(weight, parts, renew)

    def _is_there(self, weight: Tensor, parts: Sequence[Part]) -> bool:
        entries = self._entries
        return (
            len(entries) == len(parts)
            and self._holds(weight)
            and all(
                entry.part is part and not entry.stale and entry.version.is_of(part.values)
                for entry, part in zip(entries, parts, strict=True)
            )
        )

    def _write(self, weight: Tensor, parts: Sequence[Part], renew: bool) -> None:
        if self._sealed:
            raise UsageError(self._sealed)
        self._check(weight)
        entries = self._entries
        if len(entries) == len(parts) and all(e.part is p for e, p in zip(entries, parts, strict=True)):
            old = [entry for entry in entries if renew or entry.is_old()]
            if self._disjoint or not old:
                for entry in old:
                    self._put(weight, entry)
                return
        elif self._exchange(weight, parts, renew):
            return
        self.restore()  # cells that hold two tasks come from both
        for part in parts:
            self.append(weight, part)

    def _exchange(self, weight: Tensor, parts: Sequence[Part], renew: bool) -> bool:
        """Take out, renew and add what differs. Does nothing where two parts share cells, and says False then."""
        wanted = {id(part.index): part for part in parts}
        present = {id(entry.part.index) for entry in self._entries}
        fresh = [part for part in parts if id(part.index) not in present]
        kept = [part for part in parts if id(part.index) in present]
        pairs = itertools.chain(itertools.combinations(fresh, 2), itertools.product(fresh, kept))
        if (
            not self._disjoint
            or len(wanted) != len(parts)
            or any(one.region().meets(other.region()) for one, other in pairs)
        ):
            return False
        for entry in list(self._entries):
            part = wanted.get(id(entry.part.index))
            if part is None:
                self._take_out(weight, entry)
            elif part is not entry.part or renew or entry.is_old():
                entry.stale, entry.part = True, part
                self._put(weight, entry)
        for part in fresh:
            self.append(weight, part)
        order = {id(part.index): number for number, part in enumerate(parts)}
        self._entries = sorted(self._entries, key=lambda entry: order[id(entry.part.index)])
        return True

    def append(self, weight: Tensor, part: Part, *, finite: bool = False) -> None:
        """Write one more task over what is there.

        Args:
            finite: refuse a result with NaN or infinity before anything is written.

        Raises:
            MergeError: there is such a value.
            UsageError: somebody else wrote to the weight while tasks were in it.
        """
        with _LOCK:
            self._check(weight)
            base = weight.data.index_select(part.axis, part.index)
            if finite and not torch.isfinite(part.cells(base, weight.data)).all():
                raise MergeError(f"adapter {part.name!r} gives weights that are not finite: it seems to be broken")
            if self._entries:
                region = part.region()
                meets = any(entry.part.region().meets(region) for entry in self._entries)
                self._disjoint = self._disjoint and not meets
            self._weight, self._version = weight, Version(weight)
            self._entries.append(_Entry(part, base, part.version()))
            self._put(weight, self._entries[-1])

    def _put(self, weight: Tensor, entry: _Entry) -> None:
        part = entry.part
        entry.stale, entry.version = True, part.version()
        weight.data.index_copy_(part.axis, part.index, part.cells(entry.base, weight.data))
        entry.stale = False

    def _take_out(self, weight: Tensor, entry: _Entry) -> None:
        part = entry.part
        cells = entry.base if part.excluded is None else part.spare(entry.base.clone(), weight.data)
        entry.stale = True
        weight.data.index_copy_(part.axis, part.index, cells)
        self._entries.remove(entry)

    def restore(self, weight: Tensor | None = None) -> None:
        """Put the base's cells back, bit for bit.

        Args:
            weight: a copy of the weight that was written to, if it is to be restored in place of the weight itself.

        Raises:
            UsageError: somebody else wrote to the weight while tasks were in it.
        """
        if not self._entries:
            return
        with _LOCK:
            if weight is None:
                weight = self._weight
                assert weight is not None  # `append` sets it with the first entry
                self._check(weight)
            while self._entries:
                self._take_out(weight, self._entries[-1])
            self._weight = self._version = None
            self._disjoint = True

    def moved(self, weight: Tensor) -> None:
        """The weight was converted to another dtype or device, with all that is in it."""
        for entry in self._entries:
            part = entry.part
            entry.base, part.index = entry.base.to(weight), part.index.to(weight.device)
            part.excluded = None if part.excluded is None else part.excluded.to(weight.device)
        if self._entries:
            self._weight, self._version = weight, Version(weight)

    def copy(self) -> LiveWeight:
        """The same account of what is written, for a copy of the weight."""
        twin = LiveWeight()
        twin._entries, twin._disjoint = [replace(entry) for entry in self._entries], self._disjoint
        return twin

    def outdate(self, *parts: Part) -> None:
        """The values of some tasks (none given: of all) change in a way that torch may not count: write them anew."""
        for entry in self._entries:
            entry.stale = entry.stale or not parts or entry.part in parts

    def _holds(self, weight: Tensor) -> bool:
        """Whether nobody has written to the weight or put another in its place, as far as torch can tell."""
        return weight is self._weight and self._version is not None and self._version.is_of(weight)

    def _check(self, weight: Tensor) -> None:
        """Refuse a weight in which W0 and the updates cannot be told apart any more. The same content once more, as
        DistributedDataParallel broadcasts it or a copy has it, is fine."""
        if not self._entries or self._holds(weight):
            return
        checked = self._entries if self._disjoint else self._entries[-1:]
        if not all(entry.is_in(weight.data) for entry in checked):
            names = ", ".join(entry.part.name for entry in self._entries)
            raise UsageError(
                f"a base weight was changed while the updates of {names} were in it: call restore() on the PEFT "
                "model's base_model (or unmerge) before base weights are written"
            )
        self._weight, self._version = weight, Version(weight)
