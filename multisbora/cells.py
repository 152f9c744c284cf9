"""The cells of one region in a stored tensor: where they lie in its rows, and what a task writes there.

A region is a rectangle of lines (`region.Region`), also in a tensor that is stored transposed and in one expert of a
fused 3-D tensor, whose experts' rows lie one below the other. So everything that works on files takes a tensor as rows
of values, and a region as some of these rows times some of the columns. The cells' own layout, which undo files,
digests and patches share, is that rectangle as a (rows, columns) array, row by row.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .delta import delta
from .errors import CheckpointError, MergeError
from .geometry import Matrix
from .region import Region

Lines = npt.NDArray[np.intp]
PATCHABLE: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_EXPONENTS = {"float32": 0x7F80_0000, "float16": 0x7C00, "bfloat16": 0x7F80}
_BLOCK = 1 << 20  # bytes: what a block of rows is cut to, so that it stays in a core's cache between its uses


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """The part of the cells that lies in a block of rows.

    Attributes:
        rows: those of the block that hold cells, as an index.
        columns: those of the tensor that do; None for all.
        own: the same rows in the cells' own layout.
    """

    rows: slice | Lines
    columns: Lines | None
    own: slice

    def get(self, block: np.ndarray) -> np.ndarray:
        """These cells out of the block, (rows, columns), contiguous and in memory of their own."""
        raw = bits(block)
        found = raw[self.rows]
        found = found.copy() if self.columns is None else found.take(self.columns, axis=1)
        return found.view(block.dtype)

    def put(self, block: np.ndarray, new: np.ndarray) -> None:
        """These cells into the block."""
        raw = bits(block)
        if self.columns is None:
            raw[self.rows] = bits(new)
        elif isinstance(self.rows, slice):
            raw[self.rows, self.columns] = bits(new)
        else:
            raw[np.ix_(self.rows, self.columns)] = bits(new)


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """The cells that one task owns in one stored tensor.

    Attributes:
        rows: the stored rows, sorted; None for all.
        columns: the stored columns, sorted; None for all.
        shape: (rows, columns) of their own layout.
        transposed: whether the tensor is stored (in, out).
        kept: the rows and columns of the values, as they are stored, that are cells of the region; None for all.
    """

    rows: Lines | None
    columns: Lines | None
    shape: tuple[int, int]
    transposed: bool
    kept: tuple[Lines | None, Lines | None]

    @classmethod
    def of(cls, region: Region, matrix: Matrix) -> Cells:
        """The cells of a region that lies in `matrix`, see `Region.check`."""
        height, width = matrix.stored_shape[-2:]
        other_size = matrix.shape[0] if region.variant == "fa" else matrix.shape[1]
        own = np.array(region.indices, dtype=np.intp)
        other = np.delete(np.arange(other_size, dtype=np.intp), region.excluded) if region.excluded else None
        transposed = matrix.orientation == "conv1d"
        owns_columns = (region.variant == "fa") != transposed
        rows, columns = (other, own) if owns_columns else (own, other)
        kept = (other, None) if owns_columns else (None, other)
        shape = (height if rows is None else len(rows), width if columns is None else len(columns))
        if matrix.part is not None:
            rows = (np.arange(height, dtype=np.intp) if rows is None else rows) + matrix.part * height
        return cls(rows, columns, shape, transposed, kept)

    @property
    def count(self) -> int:
        return self.shape[0] * self.shape[1]

    def arrange(self, values: np.ndarray, own: slice = slice(None)) -> np.ndarray:
        """Trained values of the region in the layout of its cells, of which rows `own`."""
        stored = values.T if self.transposed else values
        rows, columns = self.kept
        stored = stored[own] if rows is None else stored[rows[own]]
        return stored if columns is None else stored[:, columns]

    def window(self, start: int, stop: int) -> Window | None:
        """Where the cells are in the block of stored rows [start, stop); None if none of them is there."""
        if self.rows is None:
            return Window(slice(None), self.columns, slice(start, stop))
        first, last = (int(place) for place in np.searchsorted(self.rows, (start, stop)))
        if first == last:
            return None
        rows = self.rows[first:last] - start
        if rows[-1] - rows[0] == len(rows) - 1:
            return Window(slice(int(rows[0]), int(rows[-1]) + 1), self.columns, slice(first, last))
        return Window(rows, self.columns, slice(first, last))


def compose(before: np.ndarray, values: np.ndarray, scaling: float, weight: float, what: str) -> np.ndarray:
    """What cells hold with a task in them: W0 + lambda * s * values in fp32, rounded once (design, section 3).

    Args:
        before: W0, any shape, float32, float16 or bfloat16.
        values: fp32, of the same shape.
        weight: lambda; at 0 the cells stay as they are.
        what: what a message calls the cells.

    Raises:
        MergeError: a result is not finite in the dtype of `before`.
    """
    if not weight:
        return before
    with np.errstate(over="ignore", invalid="ignore"):
        after = (before.astype(np.float32) + delta(values, scaling, weight)).astype(before.dtype)
    if not finite(after):
        raise MergeError(
            f"{what} would hold a value that {before.dtype} cannot: lower its lambda, or check the base model for NaN"
        )
    return np.asarray(after)


def finite(cells: np.ndarray) -> bool:
    """Whether no cell is infinite or NaN: none has all bits of its exponent. For bfloat16 `np.isfinite` is slow."""
    exponent = _EXPONENTS[cells.dtype.name]
    return not cells.size or int((bits(cells) & exponent).max()) < exponent


def bits(cells: np.ndarray) -> np.ndarray:
    """The same cells as unsigned integers, by which -0.0 and 0.0 differ."""
    return cells.view(np.dtype(f"u{cells.dtype.itemsize}"))


def as_bytes(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array, byte by byte."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored tensor lies in a file, as rows of values.

    Attributes:
        offset: bytes from the start of the file to its first value.
        rows, columns: its shape as rows; of a 3-D tensor the rows of all experts.
    """

    offset: int
    rows: int
    columns: int
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize

    def blocks(self) -> Iterator[tuple[int, int]]:
        """The tensor in blocks of about a megabyte: (first row, row after the last)."""
        height = max(1, _BLOCK // max(1, self.row_bytes))
        for start in range(0, self.rows, height):
            yield start, min(start + height, self.rows)


def read_cells(file: int, place: Place, cells: Cells, path: Path) -> np.ndarray:
    """Read the cells of a region out of a file, (rows, columns) in their own layout.

    Args:
        file: a descriptor of `path`, open for reading.

    Raises:
        CheckpointError: the file ends early.
    """
    found = np.empty(cells.shape, place.dtype)
    for start, stop in _runs(place, cells):
        window = cells.window(start, stop)
        if window is not None:
            found[window.own] = window.get(read_rows(file, place, start, stop, path))
    return found


def write_cells(file: int, place: Place, cells: Cells, new: np.ndarray, path: Path) -> int:
    """Write the cells of a region into a file, and nothing else.

    Whole rows are written alone. Where the task owns columns, blocks of rows are read, changed and written back: the
    file system writes whole pages in any case, and columns lie in all of them.

    Args:
        file: a descriptor of `path`, open for reading and writing.
        new: in their own layout, of the place's dtype.

    Returns:
        Bytes that were written.
    """
    written = 0
    for start, stop in _runs(place, cells):
        window = cells.window(start, stop)
        if window is None:
            continue
        if cells.columns is None:
            block = np.ascontiguousarray(new[window.own])
        else:
            block = read_rows(file, place, start, stop, path)
            window.put(block, new[window.own])
        write_all(file, as_bytes(block), place.offset + start * place.row_bytes)
        written += block.nbytes
    return written


def read_rows(file: int, place: Place, start: int, stop: int, path: Path) -> np.ndarray:
    """Stored rows [start, stop) as a (rows, columns) array in memory of its own."""
    block = np.empty((stop - start, place.columns), place.dtype)
    read_into(file, as_bytes(block), place.offset + start * place.row_bytes, path)
    return block


def read_into(file: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill a buffer of bytes from a file at `offset`.

    Raises:
        CheckpointError: the file ends before it is full, or cannot be read.
    """
    done = 0
    while done < len(buffer):
        try:
            got = os.preadv(file, [buffer[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}; fetch it again") from None
        if not got:
            raise CheckpointError(f"{path} ended while it was read: it is truncated, or changes under our hands")
        done += got


def write_all(file: int, data: memoryview, offset: int) -> None:
    """Write bytes to a file at `offset`, all of them.

    Raises:
        OSError: the system refused.
    """
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)


def _runs(place: Place, cells: Cells) -> Iterator[tuple[int, int]]:
    """The blocks of rows in which cells can lie; where whole rows are owned, exactly those."""
    if cells.rows is None:
        yield from place.blocks()
        return
    height = max(1, _BLOCK // max(1, place.row_bytes))
    for _, run in itertools.groupby(enumerate(cells.rows.tolist()), lambda pair: pair[1] - pair[0]):
        rows = [row for _, row in run]
        for start in range(rows[0], rows[-1] + 1, height):
            yield start, min(start + height, rows[-1] + 1)
