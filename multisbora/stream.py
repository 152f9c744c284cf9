"""One pass over all tensors of a checkpoint: hashed as they are read, changed on the way, written to their places.

A tensor goes through in blocks of about a megabyte that stay in a core's cache while they are hashed, patched and
written, so memory holds one block a thread, whatever the model's size. Threads take tensors one after another: reading,
hashing, numpy's arithmetic and writing all run beside each other. One more thread has the disk write meanwhile what is
in the page cache, so that little is left to wait for at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from blake3 import blake3

from .cells import as_bytes, read_into, write_all
from .checkpoint import Checkpoint
from .errors import CheckpointError
from .geometry import Geometry
from .header import TensorInfo
from .layout import Target

Item = TypeVar("Item")
Result = TypeVar("Result")
PREFIX = "blake3:"  # of fingerprints, which once were something else
_CHUNK = 1 << 20
_LARGE = 128 << 20  # bytes: tensors from here on go first, so that none of them is alone at the end
_FICLONE = 0x40049409  # ioctl of Linux: let a file share another's blocks until one of them is written to


class Patch(Protocol):
    """What happens to one tensor on its way.

    Attributes:
        whole: whether it comes in one block. Otherwise in blocks of rows, from the first to the last.
    """

    @property
    def whole(self) -> bool: ...

    def turn(self, stored: np.ndarray) -> bool:
        """Make the stored rows those of another view of the base, in place; False if that is the same."""
        ...

    def apply(self, rows: np.ndarray, start: int) -> None:
        """Write tasks into the rows, (rows, columns), of which the first one is row `start` of the tensor."""
        ...


@dataclass(frozen=True, slots=True)
class Passed:
    """blake3 (hex) of a tensor that went through.

    Attributes:
        stored: of its bytes in the checkpoint.
        base: of its bytes before tasks were written into it: the same, unless a patch turned them.
    """

    stored: str
    base: str


def stream(
    checkpoint: Checkpoint,
    targets: Sequence[Target] = (),
    folder: Path | None = None,
    patches: Mapping[str, Patch] | None = None,
    threads: int | None = None,
) -> dict[str, Passed]:
    """Read every tensor once; with `targets`, write it too.

    Args:
        targets: files to make in `folder`; none to read and hash alone.
        patches: tensor -> what happens to it.
        threads: 1 where patches cannot run beside each other; as many as there are processors (at most 8) if None.

    Raises:
        CheckpointError: a file ends early or cannot be read.
        OSError: a file cannot be written.
    """
    with _Pass(checkpoint, targets, folder, patches or {}) as going:
        return going.run(threads or _threads())


def fingerprint(folder: str | os.PathLike[str], geometry: Geometry) -> str:
    """Digest of everything that can be adapted, over name, dtype, shape and bytes of each tensor, in order of name.

    Reads every tensor once. Equal for the same weights in one file or in shards, and for different tokenizers.

    Returns:
        "blake3:" and a blake3 in hex.

    Raises:
        CheckpointError: a file is unreadable, or a matrix of the geometry is missing or has another shape.
    """
    checkpoint = Checkpoint.open(folder)
    check_shapes(checkpoint, geometry)
    return fingerprint_of(checkpoint, geometry, stream(checkpoint))


def fingerprint_of(checkpoint: Checkpoint, geometry: Geometry, passed: Mapping[str, Passed]) -> str:
    """`fingerprint` of a checkpoint whose tensors went through `stream`."""
    digest = blake3()
    for tensor in sorted({matrix.tensor for matrix in geometry.matrices}):
        info = checkpoint.info(tensor)
        row = [tensor, info.dtype, list(info.shape), passed[tensor].stored]
        digest.update(json.dumps(row, separators=(",", ":")).encode() + b"\n")
    return PREFIX + digest.hexdigest()


def check_shapes(checkpoint: Checkpoint, geometry: Geometry) -> None:
    """Refuse a checkpoint that is not the model of a geometry.

    Raises:
        CheckpointError: a matrix is missing or has another shape.
    """
    for matrix in geometry.matrices:
        info = checkpoint.info(matrix.tensor)
        if info.shape != matrix.stored_shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {matrix.tensor} has shape {list(info.shape)}, the geometry of {geometry.model} "
                f"says {list(matrix.stored_shape)}: it is another model"
            )


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What `work` gives for each item, in their order, by as many threads as `stream` takes.

    Raises:
        What `work` raised for the first item for which it did; those that were not begun then are left out.
    """
    with ThreadPoolExecutor(_threads()) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _threads() -> int:
    return min(8, len(os.sched_getaffinity(0)))


class _Pass(contextlib.ExitStack):
    """The open files of one pass, and what its threads share."""

    def __init__(
        self, checkpoint: Checkpoint, targets: Sequence[Target], folder: Path | None, patches: Mapping[str, Patch]
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.patches = patches
        self.places: dict[str, tuple[int, int]] = {}  # tensor -> descriptor of its target, offset
        self.shared: set[str] = set()  # tensors that lie in their target already
        self.failed: BaseException | None = None
        self.outputs: list[int] = []
        try:
            self.sources = {path: self._open(path, os.O_RDONLY) for path in checkpoint.headers}
            for target in targets if folder is not None else ():
                assert folder is not None
                file = self._open(folder / target.name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                self.outputs.append(file)
                if target.source is not None and _clone(self.sources[target.source], file):
                    self.shared.update(target.offsets)
                else:
                    os.ftruncate(file, target.size)
                    write_all(file, memoryview(target.head), 0)
                self.places |= {tensor: (file, offset) for tensor, offset in target.offsets.items()}
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, flags: int) -> int:
        try:
            file = os.open(path, flags | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if flags == os.O_RDONLY:
                raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
            raise
        self.callback(os.close, file)
        return file

    def run(self, threads: int) -> dict[str, Passed]:
        order = sorted(
            self.checkpoint.where, key=lambda name: -size if (size := self.checkpoint.info(name).nbytes) > _LARGE else 0
        )
        with self._writing_back(), ThreadPoolExecutor(threads, "multisbora-stream") as pool:
            try:
                futures = {name: pool.submit(self._tensor, name) for name in order}
                return {name: futures[name].result() for name in self.checkpoint.where}
            except BaseException as error:
                self.failed = self.failed or error
                pool.shutdown(wait=True, cancel_futures=True)
                raise self.failed from None

    def _tensor(self, name: str) -> Passed:
        try:
            info, path = self.checkpoint.info(name), self.checkpoint.where[name]
            start = self.checkpoint.headers[path].data_start + info.start
            if name in self.patches:
                return self._patched(name, info, start, path)
            return self._copied(name, info, start, path)
        except BaseException as error:
            self.failed = self.failed or error
            raise

    def _copied(self, name: str, info: TensorInfo, start: int, path: Path) -> Passed:
        digest = blake3()
        buffer = memoryview(bytearray(min(info.nbytes, _CHUNK)))
        file, place = self.places.get(name, (None, 0))
        for done in range(0, info.nbytes, _CHUNK):
            self._go_on()
            block = buffer[: min(_CHUNK, info.nbytes - done)]
            read_into(self.sources[path], block, start + done, path)
            digest.update(block)
            if file is not None and name not in self.shared:
                write_all(file, block, place + done)
        found = digest.hexdigest()
        return Passed(found, found)

    def _patched(self, name: str, info: TensorInfo, start: int, path: Path) -> Passed:
        patch, place = self.patches[name], self.checkpoint.place(name)
        stored, base = blake3(), blake3()
        turned = False
        file, offset = self.places.get(name, (None, 0))
        blocks = [(0, place.rows)] if patch.whole else list(place.blocks())
        buffer = np.empty(max((stop - first for first, stop in blocks), default=0) * place.columns, place.dtype)
        for first, stop in blocks:
            self._go_on()
            rows = buffer[: (stop - first) * place.columns].reshape(stop - first, place.columns)
            data = as_bytes(rows)
            read_into(self.sources[path], data, start + first * place.row_bytes, path)
            stored.update(data)
            if patch.whole and patch.turn(rows):
                turned = True
                base.update(data)
            if file is not None:
                patch.apply(rows, first)
                write_all(file, data, offset + first * place.row_bytes)
        return Passed(stored.hexdigest(), base.hexdigest() if turned else stored.hexdigest())

    def _go_on(self) -> None:
        if self.failed is not None:
            raise self.failed

    @contextlib.contextmanager
    def _writing_back(self) -> Iterator[None]:
        """Have the disk write while the threads do, and all of it when they are done."""
        if not self.outputs:
            yield
            return
        done = threading.Event()
        refused: list[OSError] = []

        def flush() -> None:
            while not done.wait(0.05) and not refused:
                try:
                    for file in self.outputs:
                        os.fdatasync(file)
                except OSError as error:  # the system tells each of them only once
                    refused.append(error)

        thread = threading.Thread(target=flush, name="multisbora-writeback", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        if refused:
            raise refused[0]
        for file in self.outputs:
            os.fsync(file)


def _clone(source: int, target: int) -> bool:
    """Let a new file share all blocks of another one, where the file system can (XFS, Btrfs)."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True
