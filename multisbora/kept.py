"""What a corrected checkpoint keeps beside its undo files, so that it can be solved again and proven: a file a task.

Each holds, for every matrix that the task owns cells in, what it trained there ("values/<cells>") and what was merged
instead ("corrected/<cells>", where its lambda is not 0); and where other tasks own cells of that matrix too, the second
moments of its rows at all their channels ("moments/<cells>": the upper triangle, row by row), and how much more it
asked for than its lambda ("excess/<cells>", one number, where that is not 0). All is fp32.

A file's name has the digest of its content. So an edit in place writes new files beside the old ones, and the receipt
says which of them count.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from .cells import as_bytes, write_all
from .checkpoint import reading
from .errors import CheckpointError
from .header import TensorInfo
from .layout import Target, new_target
from .moments import pack_triangle, unpack_triangle
from .publish import sync_folder
from .undo import CellsFile

FOLDER = "multisbora_corrected"
VALUES, CORRECTED, MOMENTS, EXCESS = "values", "corrected", "moments", "excess"
_CHUNK = 4 << 20
_F32 = np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class KeptTask:
    """What a receipt says of one task's file.

    Attributes:
        digest: blake3 (hex) of the file.
        size: its bytes.
        rows, tokens, source: of the moments, see `moments.Moments`.
    """

    digest: str
    size: int
    rows: int
    tokens: int
    source: str


@dataclass(frozen=True, slots=True)
class Correction:
    """What a receipt says of a corrected merge.

    Attributes:
        ridge: see `correct`.
        tasks: task -> its file.
    """

    ridge: float
    tasks: dict[str, KeptTask]

    @property
    def names(self) -> frozenset[str]:
        """The files in the folder."""
        return frozenset(kept_name(task, told.digest) for task, told in self.tasks.items())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Correction:
        """Read what `to_json` gave and `receipt_form` checked."""
        return cls(content["ridge"], {task: KeptTask(**told) for task, told in content["tasks"].items()})


def kept_name(task: str, digest: str) -> str:
    """What the file of a task is called."""
    return f"{task}-{digest[:16]}.safetensors"


@dataclass(frozen=True, eq=False)
class Contents:
    """The file of one task, in memory.

    Attributes:
        arrays: name -> (rows, columns) fp32.
    """

    task: str
    arrays: Mapping[str, np.ndarray]

    @cached_property
    def _target(self) -> Target:
        infos = {name: TensorInfo("F32", self.arrays[name].shape, 0, 0) for name in sorted(self.arrays)}
        return new_target("", infos, {"format": "pt", "multisbora": "corrected", "task": self.task})

    @property
    def name(self) -> str:
        """What the file is called."""
        return kept_name(self.task, self.digest)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._target.size

    @cached_property
    def digest(self) -> str:
        """blake3 (hex) of the file."""
        found = blake3(self._target.head)
        for name in self._target.offsets:
            found.update(as_bytes(np.ascontiguousarray(self.arrays[name], _F32)))
        return found.hexdigest()

    def write(self, folder: Path) -> None:
        """Write the file into a checkpoint and have it on the disk.

        Raises:
            OSError: the system refused.
        """
        (folder / FOLDER).mkdir(exist_ok=True)
        path = folder / FOLDER / self.name
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(file, self.size)
            write_all(file, memoryview(self._target.head), 0)
            for name, offset in self._target.offsets.items():
                write_all(file, as_bytes(np.ascontiguousarray(self.arrays[name], _F32)), offset)
            os.fsync(file)
        finally:
            os.close(file)
        sync_folder(folder / FOLDER)


@dataclass(frozen=True)
class KeptFile:
    """The file of one task on the disk, read one array at a time."""

    file: CellsFile

    @classmethod
    def open(cls, folder: Path, task: str, told: KeptTask) -> KeptFile:
        """Read its header, once its content has the digest that the receipt says.

        Raises:
            CheckpointError: it is missing, damaged or another one.
        """
        path = folder / FOLDER / kept_name(task, told.digest)
        found = blake3()
        with reading(path) as file:
            while block := file.read(_CHUNK):
                found.update(block)
        if found.hexdigest() != told.digest:
            raise CheckpointError(f"{path} was changed since it was written: merge again")
        return cls(CellsFile.open(path))

    def values(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        """What the task trained in a matrix, by the name of its cells.

        Raises:
            CheckpointError: that is not in the file, or of another shape.
        """
        return self.file.read(f"{VALUES}/{name}", shape, _F32)

    def corrected(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        """The same of what was merged instead."""
        return self.file.read(f"{CORRECTED}/{name}", shape, _F32)

    def excess(self, name: str) -> np.float32:
        """The same of how much more the task asked for than its lambda, see `correct`."""
        found: np.float32 = self.file.read(f"{EXCESS}/{name}", (1, 1), _F32)[0, 0]
        return found

    def moments(self, name: str, size: int) -> np.ndarray:
        """The same of the moments at the `size` channels of the matrix, (size, size)."""
        return square(self.file.read(f"{MOMENTS}/{name}", (1, size * (size + 1) // 2), _F32))


def triangle(block: np.ndarray) -> np.ndarray:
    """The upper triangle of a square, row by row, as a (1, n (n + 1) / 2) array."""
    return np.frombuffer(pack_triangle(block), _F32)[None]


def square(upper: np.ndarray) -> np.ndarray:
    """The symmetric (n, n) of an upper triangle."""
    size = (math.isqrt(8 * upper.size + 1) - 1) // 2
    return unpack_triangle(np.ascontiguousarray(upper, _F32).tobytes(), size)
