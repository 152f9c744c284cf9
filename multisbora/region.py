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
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

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


def crossings(variant: Variant, earlier: Iterable[Region]) -> tuple[int, ...]:
    """`excluded` of a new region: every index of its other axis that an earlier claim of the other variant holds."""
    return tuple(sorted({index for region in earlier if region.variant != variant for index in region.indices}))


def draw(size: int, count: int, *key: object) -> list[int]:
    """`count` of range(`size`) at random and without repeats, in the order drawn, as the paper draws indices.

    The same size, count and key give the same answer on every machine and Python version, which `random.sample` does
    not promise: the first steps of a Fisher-Yates shuffle, 8 bytes of a SHAKE-256 stream each.

    Raises:
        ValueError: `count` is above `size`.
    """
    if count > size:
        raise ValueError(f"{count} indices out of {size}")
    stream = hashlib.shake_256(json.dumps(key).encode()).digest(8 * count)
    moved: dict[int, int] = {}
    chosen = []
    for step in range(count):
        number = int.from_bytes(stream[8 * step : 8 * step + 8], "little")
        place = step + (number * (size - step) >> 64)
        chosen.append(moved.get(place, place))
        moved[place] = moved.get(step, step)
    return chosen
