"""The cells of a region in the rows of a stored tensor, and what a task should have written there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from blake3 import blake3

from .names import Matrix
from .tensors import Source, Stored, flat, values

WHOLE = "whole"  # stands for a variant where there is no region


@dataclass(frozen=True, eq=False)
class Cells:
    """Some rows times some columns of a stored matrix, in the order in which files have them.

    Attributes:
        rows, columns: indices, each in order.
        owns_columns: whether the columns are the task's own, and the rows all but the excluded.
    """

    rows: np.ndarray
    columns: np.ndarray
    owns_columns: bool

    @classmethod
    def of(cls, variant: str, indices: Sequence[int], excluded: Sequence[int], matrix: Matrix) -> Cells:
        """The cells of a region; all of the matrix where the variant is WHOLE.

        Raises:
            ValueError: its indices are outside of the matrix, or not in order.
        """
        if variant == WHOLE:
            return cls(np.arange(matrix.rows), np.arange(matrix.columns), False)
        if variant not in ("fa", "fb"):
            raise ValueError(f"the variant {variant!r} is unknown")
        owns_columns = (variant == "fa") != matrix.transposed
        size, length = (matrix.columns, matrix.rows) if owns_columns else (matrix.rows, matrix.columns)
        own, without = (np.array(list(found), dtype=np.int64) for found in (indices, excluded))
        for found, end, what in ((own, size, "indices"), (without, length, "excluded indices")):
            if len(found) and (found[0] < 0 or found[-1] >= end or (np.diff(found) < 1).any()):
                raise ValueError(f"{what} are outside of the matrix, repeated or not in order")
        other = np.delete(np.arange(length), without)
        return cls(other, own, True) if owns_columns else cls(own, other, False)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)

    def arrange(self, trained: torch.Tensor, matrix: Matrix) -> tuple[torch.Tensor, bool]:
        """Values of a module at their cells, (rows, columns); and whether the values of excluded cells are all zero.

        Raises:
            ValueError: they are of another shape than the region.
        """
        stored = trained.T if matrix.transposed else trained
        fits = (matrix.rows, len(self.columns)) if self.owns_columns else (len(self.rows), matrix.columns)
        if stored.shape != fits:
            raise ValueError(f"values of shape {list(trained.shape)} do not fit the indices and the matrix")
        kept = stored[torch.from_numpy(self.rows)] if self.owns_columns else stored[:, torch.from_numpy(self.columns)]
        return kept.contiguous(), int(torch.count_nonzero(kept)) == int(torch.count_nonzero(stored))

    def within(self, start: int, stop: int) -> Window | None:
        """Those in a block of rows; None if there are none."""
        first, last = (int(place) for place in np.searchsorted(self.rows, (start, stop)))
        if first == last or not len(self.columns):
            return None
        return Window(self.rows[first:last] - start, self.columns, first, last)


@dataclass(frozen=True, eq=False, slots=True)
class Window:
    """Cells in a block of rows: their rows in it, their columns, and which rows of all the cells they are."""

    rows: np.ndarray
    columns: np.ndarray
    first: int
    last: int

    def get(self, block: np.ndarray) -> np.ndarray:
        """(rows, columns), contiguous."""
        height, width = block.shape
        some = block if len(self.rows) == height else block.take(self.rows, axis=0)
        return np.ascontiguousarray(some if len(self.columns) == width else some.take(self.columns, axis=1))

    def put(self, block: np.ndarray, new: np.ndarray | bool) -> None:
        height, width = block.shape
        if len(self.columns) == width:
            block[self.rows] = new
        elif len(self.rows) == height:
            block[:, self.columns] = new
        else:
            block[np.ix_(self.rows, self.columns)] = new


@dataclass(eq=False)
class Share:
    """One task's region of one matrix, and what a pass over the matrix told of it.

    Attributes:
        indices, excluded: as a receipt or an adapter has them.
        shape: (rows, columns) of its cells.
        undo: where its task's undo file has them; None if nowhere.
        changed: cells whose bits are not the base's.
        found, held: blake3 (hex) of the cells as they are, and as they were in the base; empty before the pass.
    """

    task: str
    module: str
    matrix: Matrix
    variant: str
    indices: Sequence[int]
    excluded: Sequence[int]
    shape: tuple[int, int] = (0, 0)
    undo: Stored | None = None
    changed: int = 0
    found: str = ""
    held: str = ""

    def __post_init__(self) -> None:
        """Refuse what is no region of the matrix.

        Raises:
            ValueError: its indices are outside, or not in order.
        """
        self.shape = self.cells().shape

    @property
    def whose(self) -> str:
        """What a message says of its cells."""
        return f"owned by {self.task}"

    @property
    def count(self) -> int:
        return self.shape[0] * self.shape[1]

    def cells(self) -> Cells:
        """Its cells, made anew: of all tasks at once they would take more memory than the adapters."""
        return Cells.of(self.variant, self.indices, self.excluded, self.matrix)


class Passing:
    """A share while its matrix goes by, row by row."""

    def __init__(self, share: Share, undo: Source | None) -> None:
        self.share, self.cells, self._undo = share, share.cells(), undo
        self._found, self._held = blake3(), blake3()

    def kept(self, window: Window, size: int) -> np.ndarray | None:
        """What the undo file has of these rows, as bits of `size` bytes; None if it has nothing."""
        if self._undo is None:
            return None
        width = len(window.columns)
        raw = self._undo.read(window.first * width * size, window.last * width * size)
        return raw.view(f"u{size}").reshape(-1, width)

    def note(self, held: np.ndarray, found: np.ndarray) -> None:
        """Take in the next rows: as they were in the base, and as they are."""
        self._held.update(flat(held))
        self._found.update(flat(found))
        self.share.changed += int(np.count_nonzero(held != found))

    def end(self) -> None:
        self.share.held, self.share.found = self._held.hexdigest(), self._found.hexdigest()

    def hold(self, row: int, column: int) -> bool:
        return bool((self.cells.rows == row).any() and (self.cells.columns == column).any())


def claim(taken: np.ndarray, window: Window, start: int, passing: Passing) -> None:
    """Mark the cells of a window as owned.

    Args:
        taken: which cells of a block tasks own already.
        start: row of the matrix that the block starts with.

    Raises:
        Impossible: one has an owner.
    """
    before = window.get(taken)
    if before.any():
        row, column = (int(i) for i in np.argwhere(before)[0])
        where = place((start + int(window.rows[row]), int(window.columns[column])))
        share = passing.share
        raise Impossible(f"{share.task}: {share.matrix.cells_name}: {where} is owned by another task too")
    window.put(taken, True)


class Impossible(Exception):
    """Tasks cannot have been merged so."""


@dataclass
class Wrong:
    """Cells that are not what they must be: how many, and the first of them in words."""

    count: int = 0
    first: str = ""

    def note(self, expected: np.ndarray, found: np.ndarray, dtype: str, name: Callable[[int, int], str]) -> None:
        """Compare the bits of two blocks.

        Args:
            name: what a message calls the cell in one row and column of them.
        """
        wrong = expected != found
        number = int(np.count_nonzero(wrong))
        if number and not self.count:
            row, column = (int(i) for i in np.unravel_index(int(np.argmax(wrong)), wrong.shape))
            two = (expected[row : row + 1, column], found[row : row + 1, column])
            shown = [repr(values(bits, dtype).item()) for bits in two]
            if shown[0] == shown[1]:
                shown = [f"{text} (bits {int(bits[0]):#x})" for text, bits in zip(shown, two, strict=True)]
            self.first = f"first at {name(row, column)}: expected {shown[0]}, found {shown[1]}"
        self.count += number

    def __str__(self) -> str:
        return f"{self.count} wrong cells, {self.first}"


def place(index: tuple[int, ...]) -> str:
    """An index of a tensor, for a message."""
    return f"row {index[0]}, column {index[1]}" if len(index) == 2 else f"index {list(index)}"
