"""A model folder: the headers of its safetensors files, where each stored tensor lies, and the files beside them.

Nothing here knows of tasks. Only safetensors, JSON and plain companion files are touched; pickles are neither read nor
copied.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .cells import PATCHABLE, Place, read_rows
from .errors import CheckpointError
from .header import INDEX_FILE, SINGLE_FILE, Header, TensorInfo, read_headers

RECEIPT_FILE = "multisbora_receipt.json"
UNDO_FOLDER = "multisbora_undo"
CARD_FILE = "README.md"
TEMPLATES_FOLDER = "additional_chat_templates"  # transformers' own, the one folder that belongs to a tokenizer
_CHUNK = 4 << 20
_WEIGHTS_AND_ARCHIVES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx"),
    *(".npz", ".ot", ".tflite", ".zip", ".tar", ".gz"),
)
# They speak of the base and not of what is made of it; an adapter_config.json would make loaders look for an adapter.
_NOT_CARRIED_OVER = frozenset({RECEIPT_FILE, CARD_FILE, "adapter_config.json"})


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What a written file is: sha256 as hex (None where nothing was written) and size in bytes."""

    sha256: str | None
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """A model folder and the headers of its safetensors files.

    Attributes:
        folder: the model folder.
        headers: header of every file with weights, in the order of their names.
        where: file of every stored tensor.
    """

    folder: Path
    headers: dict[Path, Header]
    where: dict[str, Path]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Checkpoint:
        """Read the headers of a model folder.

        Raises:
            CheckpointError: the folder or a file of weights is missing, truncated or corrupt.
        """
        headers = read_headers(folder)
        return cls(Path(folder), headers, {name: path for path, header in headers.items() for name in header.tensors})

    def info(self, tensor: str) -> TensorInfo:
        """dtype, shape and place of a stored tensor.

        Raises:
            CheckpointError: the checkpoint does not hold it.
        """
        if tensor not in self.where:
            raise CheckpointError(f"{self.folder} holds no tensor {tensor}: it is not the model of that geometry")
        return self.headers[self.where[tensor]].tensors[tensor]

    def place(self, tensor: str) -> Place:
        """Where a stored tensor of floats lies in its file, as rows.

        Raises:
            CheckpointError: the checkpoint does not hold it, or it is no F32, F16 or BF16.
        """
        info = self.info(tensor)
        if info.dtype not in PATCHABLE:
            raise CheckpointError(
                f"{tensor} is stored as {info.dtype}, which cannot be adapted: use a checkpoint in "
                f"{', '.join(PATCHABLE)}"
            )
        columns = info.shape[-1] if info.shape else 1
        offset = self.headers[self.where[tensor]].data_start + info.start
        return Place(offset, math.prod(info.shape[:-1]), columns, PATCHABLE[info.dtype])

    def tensor(self, tensor: str) -> np.ndarray:
        """One stored tensor, in its stored dtype and shape, in memory of its own.

        Raises:
            CheckpointError: as `place`, or it cannot be read.
        """
        place, path = self.place(tensor), self.where[tensor]
        with reading(path) as file:
            return read_rows(file.fileno(), place, 0, place.rows, path).reshape(self.info(tensor).shape)

    def companions(self) -> tuple[Path, ...]:
        """The files that make the weights a model, sorted by name: config, tokenizer, templates, code, index, licence.

        Left out: other weights and archives, whatever their format; hidden files; folders, but for that of further
        chat templates; README.md and multisbora's own files, which speak of this checkpoint and not of one made from
        it; an index that the loader does not use.
        """
        used = {path.name for path in self.headers}
        found = []
        for path in sorted((*self.folder.iterdir(), *self.folder.glob(f"{TEMPLATES_FOLDER}/*.jinja"))):
            unused_index = path.name == INDEX_FILE and SINGLE_FILE in used
            foreign_index = path.name.endswith(".index.json") and path.name != INDEX_FILE
            skip = path.name.startswith(".") or path.name in _NOT_CARRIED_OVER or unused_index or foreign_index
            if not skip and not path.name.lower().endswith(_WEIGHTS_AND_ARCHIVES) and path.is_file():
                found.append(path)
        return tuple(found)

    def name(self, path: Path) -> str:
        """What a file of this checkpoint is called in receipts: its path inside of the folder."""
        return path.relative_to(self.folder).as_posix()

    def size(self) -> int:
        """Bytes of the weights and their companions."""
        return sum(path.stat().st_size for path in (*self.headers, *self.companions()))


def copy_file(source: Path, target: Path) -> FileDigest:
    """Copy one file byte for byte, following links.

    Raises:
        CheckpointError: `source` cannot be read.
        OSError: `target` cannot be written.
    """
    digest = hashlib.sha256()
    with reading(source) as reader, target.open("xb") as writer:
        while True:
            try:
                block = reader.read(_CHUNK)
            except OSError as error:
                raise CheckpointError(f"{source} cannot be read: {error.strerror or error}") from None
            if not block:
                break
            digest.update(block)
            writer.write(block)
        return FileDigest(digest.hexdigest(), writer.tell())


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open for reading; a failure to open names the file, and is not taken for a failure to write."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    with file:
        yield file
