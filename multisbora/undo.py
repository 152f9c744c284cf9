"""What the cells of a merged checkpoint held before: a file a task, so that each can be taken out without the base.

The files lie in a folder of their own: where weights are one file, servers read every safetensors file beside it, and
would find tensors in ours that the model does not have.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from .cells import PATCHABLE, Place, as_bytes, read_rows, write_all
from .checkpoint import UNDO_FOLDER, reading
from .errors import CheckpointError
from .header import Header, TensorInfo, read_header
from .layout import new_target

WHOLE = "+whole"  # what the owner of tensors is called that tasks trained whole; no task can be called so
_DTYPE_NAMES = {dtype: name for name, dtype in PATCHABLE.items()}
Shapes = Mapping[str, tuple[tuple[int, int], np.dtype[Any]]]  # name of the cells -> (rows, columns), dtype


def digest(cells: np.ndarray) -> str:
    """blake3 (hex) of cells in their own layout."""
    return blake3(as_bytes(np.ascontiguousarray(cells))).hexdigest()


def undo_path(folder: str | os.PathLike[str], task: str) -> Path:
    """Where a checkpoint keeps what one task's cells held before."""
    return Path(folder) / UNDO_FOLDER / f"{task}.safetensors"


class CellsWriter(contextlib.ExitStack):
    """A safetensors file of cells, written row by row in any order and from any thread."""

    def __init__(self, path: Path, shapes: Shapes, metadata: Mapping[str, str]) -> None:
        """Make the file.

        Raises:
            OSError: it cannot be written.
        """
        super().__init__()
        infos = {name: TensorInfo(_DTYPE_NAMES[dtype], shape, 0, 0) for name, (shape, dtype) in shapes.items()}
        target = new_target(path.name, infos, {"format": "pt", **metadata})
        path.parent.mkdir(exist_ok=True)
        self._offsets, self.size = target.offsets, target.size
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self.callback(os.close, self._file)
        try:
            os.ftruncate(self._file, target.size)
            write_all(self._file, memoryview(target.head), 0)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, rows: np.ndarray, start: int = 0) -> None:
        """Write rows of one array of cells, of which the first is row `start`."""
        rows = np.ascontiguousarray(rows)
        row_bytes = rows.shape[1] * rows.dtype.itemsize
        write_all(self._file, as_bytes(rows), self._offsets[name] + start * row_bytes)

    def sync(self) -> None:
        os.fsync(self._file)


@dataclass(frozen=True)
class CellsFile:
    """A safetensors file of cells, read one array at a time."""

    path: Path
    header: Header

    @classmethod
    def open(cls, path: Path) -> CellsFile:
        """Read its header.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        return cls(path, read_header(path))

    def read(self, name: str, shape: tuple[int, int], dtype: np.dtype[Any]) -> np.ndarray:
        """The cells of one region, (rows, columns).

        Raises:
            CheckpointError: they are not there, or are of another shape or dtype.
        """
        info = self.header.tensors.get(name)
        if info is None or info.shape != shape or info.dtype != _DTYPE_NAMES[dtype]:
            found = "nothing" if info is None else f"{info.dtype} {list(info.shape)}"
            raise CheckpointError(
                f"{self.path}: of {name} it holds {found}, not {_DTYPE_NAMES[dtype]} {list(shape)}: fetch it again"
            )
        place = Place(self.header.data_start + info.start, *shape, dtype)
        with reading(self.path) as file:
            return read_rows(file.fileno(), place, 0, shape[0], self.path)
