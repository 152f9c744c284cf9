"""Tensors as they lie in files, read block by block; safetensors' own reader says first that a file is sound."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..untrusted import MAX_JSON_BYTES, open_file, parse_json, read_json, shown

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK = 1 << 20  # bytes
UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError),
    SafetensorError,
)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: its dtype as safetensors names it, its shape, and where its bytes are."""

    path: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def like(self) -> tuple[str, list[int]]:
        """dtype and shape, for comparison and for messages."""
        return self.dtype, list(self.shape)

    @property
    def rows(self) -> Rows:
        """The tensor as rows of values."""
        count = math.prod(self.shape)
        if not count or self.nbytes % count or self.nbytes // count not in (1, 2, 4, 8):
            return Rows(1, self.nbytes, 1, 1, (self.nbytes,))  # values of less than a byte
        size = self.nbytes // count
        parts = self.shape[0] if len(self.shape) == 3 else 1
        columns = self.shape[-1] if self.shape else 1
        return Rows(parts, count // columns // parts, columns, size, self.shape)


@dataclass(frozen=True, slots=True)
class Rows:
    """A tensor as `parts` matrices of `rows` x `columns` values of `size` bytes; only 3-D ones have several."""

    parts: int
    rows: int
    columns: int
    size: int
    shape: tuple[int, ...]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """The rows of one part in blocks of about a megabyte: (first row, row after the last)."""
        height = max(1, BLOCK // (self.columns * self.size))
        for start in range(0, self.rows, height):
            yield start, min(start + height, self.rows)

    def as_one(self) -> Rows:
        """The same with the rows of all parts one below the other."""
        return replace(self, parts=1, rows=self.parts * self.rows)

    def index(self, part: int, row: int, column: int) -> tuple[int, ...]:
        """Index of a value in the tensor itself."""
        flat = (part * self.rows + row) * self.columns + column
        return tuple(int(i) for i in np.unravel_index(flat, self.shape))


class Source(Protocol):
    """The bytes of one tensor."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop), uint8, in memory of their own or not to be written to."""
        ...


@contextlib.contextmanager
def reading(stored: Stored) -> Iterator[Source]:
    """The bytes of a stored tensor, read as they are asked for."""
    file = os.open(stored.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield _Open(file, stored)
    finally:
        os.close(file)


@dataclass(frozen=True, slots=True)
class _Open:
    file: int
    stored: Stored

    def read(self, start: int, stop: int) -> np.ndarray:
        found = np.empty(stop - start, np.uint8)
        view, done = memoryview(found), 0  # type: ignore[arg-type]
        while done < len(view):
            got = os.preadv(self.file, [view[done:]], self.stored.offset + start + done)
            if not got:
                raise ValueError(f"{self.stored.path.name} ended while it was read")
            done += got
        return found


@dataclass(frozen=True, slots=True)
class InMemory:
    """The bytes of a tensor that was derived."""

    content: np.ndarray

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.content[start:stop]


def load(stored: Stored) -> torch.Tensor:
    """All of a tensor."""
    with reading(stored) as source:
        data = torch.from_numpy(source.read(0, stored.nbytes))
    return data.view(_DTYPES[stored.dtype]).reshape(stored.shape)


def values(bits: np.ndarray, dtype: str) -> torch.Tensor:
    """Values whose bits are given as integers of their size; of a dtype that torch cannot show, the integers."""
    raw = torch.from_numpy(np.ascontiguousarray(bits).view(f"i{bits.itemsize}" if bits.itemsize > 1 else "u1"))
    wanted = _DTYPES.get(dtype)
    return raw if wanted is None or wanted.itemsize != bits.itemsize else raw.view(wanted)


def flat(bits: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, for hashing."""
    return memoryview(bits.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def as_bits(found: torch.Tensor) -> np.ndarray:
    """The bits of values as unsigned integers of the same size, so that -0.0 and NaN compare as what they are."""
    size = found.element_size()
    signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    array: np.ndarray = found.contiguous().view(signed).numpy()
    return array.view(f"u{size}")


@dataclass(frozen=True)
class File:
    """A safetensors file.

    Attributes:
        head: its first bytes, up to those of the first tensor.
        metadata: text to text, as the file has it.
        tensors: name -> place.
    """

    path: Path
    size: int
    head: bytes
    metadata: dict[str, str] | None
    tensors: dict[str, Stored]

    @classmethod
    def open(cls, path: Path) -> File:
        """Read the head of a file.

        Raises:
            One of UNREADABLE: it is no sound safetensors file.
        """
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        head = read_head(path)
        content = parse_json(head[8:])  # before safetensors' own reader, which has no bounds of memory
        content.pop("__metadata__", None)
        try:
            with safe_open(path, framework="pt") as file:
                names, metadata = set(file.keys()), file.metadata()
        except MemoryError:
            raise OSError(f"{path.name} is larger than this process may map") from None
        tensors = {}
        for name, entry in content.items():
            start, stop = entry["data_offsets"]
            tensors[name] = Stored(path, len(head) + start, stop - start, entry["dtype"], tuple(entry["shape"]))
        if set(tensors) != names:
            raise ValueError(f"{path.name} names its tensors in two ways")
        return cls(path, path.stat().st_size, head, metadata, tensors)


class Weights:
    """The tensors of a model folder, and which file holds which."""

    def __init__(self, folder: Path) -> None:
        """Read the heads of the files.

        Raises:
            One of UNREADABLE: one is missing or not sound, or the index says other than the files.
        """
        mapped: dict[str, str] | None = None
        names = [SINGLE]
        if not (folder / SINGLE).is_file():
            mapped = dict(read_json(folder / INDEX)["weight_map"])
            names = sorted(set(mapped.values()))
            if any("/" in name or name.startswith(".") for name in names):
                raise ValueError(f"{INDEX} names files outside of the folder")
        self.files = {name: File.open(folder / name) for name in names}
        self.tensors: dict[str, Stored] = {}
        where: dict[str, str] = {}
        for name, file in self.files.items():
            for tensor, stored in file.tensors.items():
                if tensor in where:
                    raise ValueError(f"{tensor} lies in {where[tensor]} and in {name}")
                where[tensor], self.tensors[tensor] = name, stored
        if mapped is not None and where != mapped:
            wrong = next(tensor for tensor in sorted({*where, *mapped}) if where.get(tensor) != mapped.get(tensor))
            raise ValueError(f"{INDEX} does not say where the tensors are: {wrong} is {_place(where, wrong)}")


def _place(where: dict[str, str], tensor: str) -> str:
    return f"in {where[tensor]}" if tensor in where else "in no file"


def read_head(path: Path) -> bytes:
    """The first bytes of a safetensors file: the length of its header, and the header.

    Raises:
        OSError: it cannot be read.
    """
    with open_file(path) as file:
        length = file.read(8)
        size = int.from_bytes(length, "little")
        if size > min(os.fstat(file.fileno()).st_size, MAX_JSON_BYTES):
            raise ValueError("its header is larger than the file, or than any model's")
        return length + file.read(size)


def sha256(path: Path) -> str:
    """sha256 (hex) of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(4 << 20):
            digest.update(block)
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    """An error of any library, for a message."""
    return shown(" ".join(f"{type(error).__name__} {error}".split()), 300)
