"""Index sets on one axis of a matrix, and the cells they own. Pure integers: no torch, no files.

A matrix is `out_features` x `in_features`. `fa` owns columns (input channels) and trains B (out_features x rank);
`fb` owns rows (output channels) and trains A (rank x in_features). Where an fa column crosses an fb row of another
task, the earlier claim keeps the cell (design, section 3), so a region is a rectangle: its `indices` on its own axis,
times every index of the other axis but those `excluded`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from .errors import UsageError

Variant = Literal["fa", "fb"]
VARIANTS: tuple[str, ...] = get_args(Variant)


def own_axis(variant: Variant) -> int:
    """The axis of an (out_features, in_features) matrix that a variant claims: 0 (rows) for fb, 1 (columns) for fa."""
    return 1 if variant == "fa" else 0


@dataclass(frozen=True, slots=True)
class Region:
    """The cells of one matrix that one task may change.

    Attributes:
        variant: "fa" (columns) or "fb" (rows).
        indices: claimed columns or rows, sorted, without repeats.
        excluded: indices of the *other* axis whose cells earlier claims own, sorted, without repeats.

    Raises:
        UsageError: the variant is unknown, or an index list is unsorted, repeated or negative.
    """

    variant: Variant
    indices: tuple[int, ...]
    excluded: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise UsageError(f"variant {self.variant!r} is unknown: use fa (columns) or fb (rows)")
        for name, values in (("indices", self.indices), ("excluded", self.excluded)):
            if any(b <= a for a, b in itertools.pairwise(values)) or (values and values[0] < 0):
                raise UsageError(f"{name} must be sorted, not negative and without repeats, got {list(values)[:8]}...")
        if not self.indices:
            raise UsageError("a region needs at least one index")

    @property
    def rank(self) -> int:
        return len(self.indices)

    def check(self, shape: tuple[int, int], name: str) -> None:
        """Refuse a region that does not lie in a matrix of this (out_features, in_features) shape.

        Raises:
            UsageError: an index is outside its axis; `name` is the matrix in the message.
        """
        axis = own_axis(self.variant)
        for what, values, size in (("index", self.indices, shape[axis]), ("excluded", self.excluded, shape[1 - axis])):
            if values and values[-1] >= size:
                raise UsageError(f"{name}: {what} {values[-1]} is outside an axis of {size}; matrix is {shape}")

    def values_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the trained values: (out_features, rank) for fa, (rank, in_features) for fb."""
        return (shape[0], self.rank) if self.variant == "fa" else (self.rank, shape[1])

    def cells(self, shape: tuple[int, int]) -> int:
        """Number of cells that the region owns in a matrix of `shape`."""
        return self.rank * (shape[1 - own_axis(self.variant)] - len(self.excluded))

    def meets(self, other: Region) -> bool:
        """Whether two regions of one matrix share a cell. Symmetric."""
        if self.variant == other.variant:
            return not set(self.indices).isdisjoint(other.indices)
        mine_open = set(self.indices) - set(other.excluded)
        theirs_open = set(other.indices) - set(self.excluded)
        return bool(mine_open) and bool(theirs_open)


def priorities(size: int, *key: object) -> npt.NDArray[np.uint64]:
    """A random 64-bit number for each of range(`size`): the order in which allocation takes channels, lowest first.

    The same size and key give the same numbers on every machine and version of its libraries, which `random` and
    numpy's generators do not promise: SHA-256 of the key seeds a SplitMix64 sequence (Steele, Lea and Flood 2014).
    """
    seed = int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        x = np.uint64(seed) + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return found


def draw(size: int, count: int, *key: object, taken: npt.NDArray[np.bool_] | None = None) -> tuple[int, ...]:
    """`count` of range(`size`) at random and without repeats, as the paper draws indices; sorted.

    One key stands for one order of the whole range, of which the first that are not taken are drawn. So tasks that may
    share indices share as many as they can, and tasks that may not get what independent draws would give.

    Args:
        taken: (size,), True for those that must not be drawn.

    Raises:
        ValueError: fewer than `count` are free.
    """
    free = np.arange(size) if taken is None else np.flatnonzero(~taken)
    if count > len(free):
        raise ValueError(f"{count} indices out of {len(free)}")
    order = priorities(size, *key)[free]
    chosen = free[np.argpartition(order, count - 1)[:count]] if 0 < count < len(free) else free[:count]
    return tuple(np.sort(chosen).tolist())
