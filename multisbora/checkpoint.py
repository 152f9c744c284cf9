"""Safetensors in and out: read one tensor, stream a file with some tensors patched, publish a folder by rename.

Nothing here knows of tasks. A model folder is read one tensor at a time, whatever its size, and only safetensors, JSON
and plain companion files are touched; pickles are neither read nor copied.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError

from .errors import CheckpointError
from .geometry import Geometry
from .header import INDEX_FILE, SINGLE_FILE, Header, TensorInfo, read_headers

RECEIPT_FILE = "multisbora_receipt.json"
UNDO_FILE = "multisbora_undo.safetensors"
CARD_FILE = "README.md"
PATCHABLE: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CHUNK = 4 << 20
_MARGIN = 16 << 20  # free bytes to leave beside an output: directory blocks, the receipt, the card
_WEIGHTS_AND_ARCHIVES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx"),
    *(".npz", ".ot", ".tflite", ".zip", ".tar", ".gz"),
)
# They speak of the base and not of what is made of it; an adapter_config.json would make loaders look for an adapter.
_NOT_CARRIED_OVER = frozenset({RECEIPT_FILE, UNDO_FILE, CARD_FILE, "adapter_config.json"})
_OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

Patch = Callable[[np.ndarray], None]


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

    def tensor(self, tensor: str) -> np.ndarray:
        """One stored tensor, in its stored dtype and shape, in memory of its own.

        Raises:
            CheckpointError: it is missing, cannot be read, or is no F32, F16 or BF16.
        """
        info = self.info(tensor)
        path = self.where[tensor]
        with _reading(path) as file:
            file.seek(self.headers[path].data_start + info.start)
            return as_array(_exactly(file, info.nbytes, path), info, tensor)

    def companions(self) -> tuple[Path, ...]:
        """The files that make the weights a model, sorted by name: config, tokenizer, templates, code, index, licence.

        Left out: other weights and archives, whatever their format; hidden files; folders; README.md and multisbora's
        own files, which speak of this checkpoint and not of one made from it; an index that the loader does not use.
        """
        used = {path.name for path in self.headers}
        found = []
        for path in sorted(self.folder.iterdir()):
            unused_index = path.name == INDEX_FILE and SINGLE_FILE in used
            foreign_index = path.name.endswith(".index.json") and path.name != INDEX_FILE
            skip = path.name.startswith(".") or path.name in _NOT_CARRIED_OVER or unused_index or foreign_index
            if not skip and not path.name.lower().endswith(_WEIGHTS_AND_ARCHIVES) and path.is_file():
                found.append(path)
        return tuple(found)

    def size(self) -> int:
        """Bytes of the weights and their companions."""
        return sum(path.stat().st_size for path in (*self.headers, *self.companions()))


def as_array(data: bytearray, info: TensorInfo, tensor: str) -> np.ndarray:
    """View the bytes of a stored tensor as a writable array of its dtype and shape.

    Raises:
        CheckpointError: the dtype is none that can be patched.
    """
    if info.dtype not in PATCHABLE:
        raise CheckpointError(
            f"{tensor} is stored as {info.dtype}, which cannot be adapted: use a checkpoint in {', '.join(PATCHABLE)}"
        )
    return np.frombuffer(data, dtype=PATCHABLE[info.dtype]).reshape(info.shape)


def fingerprint(folder: str | os.PathLike[str], geometry: Geometry) -> str:
    """sha256 (hex) of everything that can be adapted: name, dtype, shape and bytes of each matrix, in order of name.

    Reads every matrix once. Equal for the same weights in one file or in shards, and for different tokenizers.

    Raises:
        CheckpointError: a file is unreadable, or a matrix of the geometry is missing or has another shape.
    """
    checkpoint = Checkpoint.open(folder)
    digest = hashlib.sha256()
    for matrix in sorted(geometry.matrices, key=lambda matrix: matrix.tensor):
        info = checkpoint.info(matrix.tensor)
        if info.shape != matrix.stored_shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {matrix.tensor} has shape {list(info.shape)}, the geometry of {geometry.model} "
                f"says {list(matrix.stored_shape)}: it is another model"
            )
        path = checkpoint.where[matrix.tensor]
        content = hashlib.sha256()
        with _reading(path) as file:
            file.seek(checkpoint.headers[path].data_start + info.start)
            _pump(file, info.nbytes, path, content.update)
        row = [matrix.tensor, info.dtype, list(info.shape), content.hexdigest()]
        digest.update(json.dumps(row, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def copy_patched(source: Path, target: Path, header: Header, patches: Mapping[str, Patch]) -> FileDigest:
    """Write a safetensors file again, byte for byte but for the tensors in `patches`, in one pass.

    Args:
        header: of `source`.
        patches: tensor name -> function that changes the tensor's array in place; it keeps dtype and shape.

    Raises:
        CheckpointError: `source` ends early or cannot be read, or a patched tensor is no F32, F16 or BF16.
        OSError: `target` cannot be written.
    """
    digest = hashlib.sha256()
    with _reading(source) as reader, target.open("xb") as writer:

        def write(data: memoryview | bytearray) -> None:
            digest.update(data)
            writer.write(data)

        _pump(reader, header.data_start, source, write)
        for name, info in header.tensors.items():  # in the order of their bytes, without gaps: read_header checked it
            if name in patches:
                data = _exactly(reader, info.nbytes, source)
                patches[name](as_array(data, info, name))
                write(data)
            else:
                _pump(reader, info.nbytes, source, write)
        return FileDigest(digest.hexdigest(), writer.tell())


def copy_file(source: Path, target: Path) -> FileDigest:
    """Copy one file byte for byte, following links.

    Raises:
        CheckpointError: `source` cannot be read.
        OSError: `target` cannot be written.
    """
    digest = hashlib.sha256()
    with _reading(source) as reader, target.open("xb") as writer:
        for block in iter(lambda: reader.read(_CHUNK), b""):
            digest.update(block)
            writer.write(block)
        return FileDigest(digest.hexdigest(), writer.tell())


@contextlib.contextmanager
def publish(output: str | os.PathLike[str], needed: int = 0) -> Iterator[Path]:
    """A folder that appears whole or not at all: yields a temporary sibling, synced and renamed to `output` at the end.

    Whatever ends the block early removes the sibling. The sibling of a process that was killed stays, hidden, until the
    next `publish` to the same `output` sweeps it away; it never stands in the way.

    Args:
        output: folder to make; it may exist if it is empty.
        needed: bytes that will be written, checked against the free space before anything is.

    Raises:
        CheckpointError: `output` exists and is not an empty folder, there is too little disk space, or a write failed.
    """
    output = Path(os.path.abspath(output))
    check_output(output, needed)
    with _as_checkpoint_error(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        _sweep(output)
        partial, lock = _locked_sibling(output)
        try:
            yield partial
            _sync(partial)
            try:
                partial.rename(output)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise _taken(output) from None
                raise
            _sync_folder(output.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(lock)


def check_output(output: str | os.PathLike[str], needed: int = 0) -> None:
    """Refuse a place where `publish` could not put `needed` bytes, without writing anything.

    Raises:
        CheckpointError: it exists and is not an empty folder, or the disk has too little free space.
    """
    output = Path(os.path.abspath(output))
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise _taken(output)
    standing = next((path for path in output.parents if path.is_dir()), None)
    free = shutil.disk_usage(standing).free if standing else 0
    if needed and free < needed + _MARGIN:
        raise CheckpointError(
            f"out of disk space for {output}: it needs {_gigabytes(needed + _MARGIN)}, {_gigabytes(free)} are free; "
            "free some, or choose an output on another disk"
        )


def _taken(output: Path) -> CheckpointError:
    return CheckpointError(f"{output} exists and is not an empty folder: choose another output, or remove it first")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


@contextlib.contextmanager
def _as_checkpoint_error(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _OUT_OF_SPACE:
            raise CheckpointError(
                f"out of disk space while writing {output}: nothing was kept; free some space, or choose an output on "
                "another disk"
            ) from error
        raise CheckpointError(
            f"{output} was not written: {error.strerror or error}; check the path and its rights"
        ) from error
    except SafetensorError as error:  # its writer hides the system's error number in a text
        raise CheckpointError(
            f"{output} was not written, and nothing of it was kept: {error}; is there space on its disk?"
        ) from error


def _locked_sibling(output: Path) -> tuple[Path, int]:
    """A new temporary folder and a descriptor whose lock says, for as long as we live, that it is in use."""
    while True:
        partial = output.parent / f".{output.name}.{secrets.token_hex(6)}.partial"
        partial.mkdir()
        lock = os.open(partial, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks: then nothing is ever swept there either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if partial.is_dir():
            return partial, lock
        os.close(lock)  # another process swept it between mkdir and flock


def _sweep(output: Path) -> None:
    """Remove the temporary siblings of dead processes: those whose lock is free."""
    for path in output.parent.glob(f".{_literal(output.name)}.*.partial"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """Open for reading; a failure to open names the file, and is not taken for a failure to write."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    with file:
        yield file


def _exactly(file: BinaryIO, count: int, path: Path) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    done = 0
    while done < count:
        got = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise CheckpointError(f"{path} ended while it was read: it is truncated, or changes under our hands")
        done += got
    return data


def _pump(file: BinaryIO, count: int, path: Path, write: Callable[[memoryview], object]) -> None:
    buffer = memoryview(bytearray(min(count, _CHUNK)))
    while count:
        got = file.readinto(buffer[: min(count, _CHUNK)])  # type: ignore[attr-defined]
        if not got:
            raise CheckpointError(f"{path} ended while it was read: it is truncated, or changes under our hands")
        write(buffer[:got])
        count -= got
