"""A merged checkpoint as a small file: what its tasks wrote, for those who have the base already.

Such a patch is a safetensors file. Its tensors are the cells as they are in the merged checkpoint, each task's in each
matrix in their own layout; its metadata has the receipt and the card. Nothing else is needed to make the same folder
again, byte for byte, and every byte that is read on the way has a digest in the receipt: the patch's own, the base's,
and those of the result.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from blake3 import blake3

from .cells import Cells, read_cells
from .checkpoint import CARD_FILE, RECEIPT_FILE, Checkpoint
from .checkpoint import reading as opened
from .errors import CheckpointError, GeometryError, MergeError, UsageError
from .geometry import Geometry, Matrix, Names, from_checkpoint
from .header import INDEX_FILE, TensorInfo, read_header
from .journal import reading
from .layout import Target, lay_out, new_target
from .locks import Say
from .merge import Original, write_merged
from .publish import check_output_file, publish_file
from .receipt import Receipt, WeightsFile
from .stream import Passed
from .undo import WHOLE, CellsFile, CellsWriter, digest, undo_path
from .whole import Whole

_KIND = "difference"
_AGAIN = "fetch it again, or make it again with `multisbora diff`"


@dataclass(frozen=True, slots=True)
class Difference:
    """What `diff` wrote, or would write.

    Attributes:
        path: the patch.
        size: its bytes.
        checkpoint_size: bytes of the merged checkpoint, with its undo files.
        cells: task -> how many of its cells are in the patch: all that it owns but those in matrices where its lambda
            is 0.
        whole: how many values of tensors that tasks trained whole are in it.
    """

    path: Path
    size: int
    checkpoint_size: int
    cells: dict[str, int]
    whole: int

    def to_json(self) -> dict[str, Any]:
        return {
            "patch": str(self.path),
            "bytes": self.size,
            "checkpoint_bytes": self.checkpoint_size,
            "tasks": {task: {"cells": count} for task, count in self.cells.items()},
            "whole": self.whole,
        }


@dataclass(frozen=True)
class Piece:
    """The cells of one task in one matrix, or a tensor that tasks trained whole, as a receipt tells of them.

    Attributes:
        module: name of the matrix in the receipt.
        weight: 0 where they are as in the base.
        mark: their digest.
        dtype: of the stored tensor, as safetensors calls it.
        after: what they hold, in their own layout; None where they are as in the base, or were not read.
    """

    task: str
    module: str
    matrix: Matrix
    cells: Cells
    weight: float
    mark: str | None
    dtype: str
    after: np.ndarray | None = None

    @property
    def name(self) -> str:
        """What they are called in a patch."""
        return f"{self.task}/{self.matrix.cells_name}"

    @property
    def told(self) -> str:
        """What people are told that they are."""
        tensor = self.matrix.cells_name
        return tensor if self.task == WHOLE else f"{tensor} in the cells of {self.task}"

    def compose(self, before: np.ndarray, own: slice) -> np.ndarray:
        """What rows `own` of the cells' layout hold with the task in them, see `merge.Written`."""
        return before if self.after is None else self.after[own]


def diff(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dry_run: bool = False,
    say: Say = lambda message: None,
) -> Difference:
    """Write what tasks changed in a merged checkpoint to one file, from which `apply` makes the checkpoint again.

    Only the tasks' cells are read, and each of them must be what the receipt says.

    Args:
        folder: the merged checkpoint.
        output: file to make; it appears whole or not at all.
        dry_run: read and check everything, write nothing.
        say: told of an interrupted edit of the checkpoint that is undone first.

    Raises:
        CheckpointError: the checkpoint is no merged one or was altered since, or `output` is taken or cannot be
            written.
        MergeError: it is a corrected merge.
    """
    folder = Path(folder)
    with reading(folder, say=say):
        return _diff(folder, Path(output), dry_run)


def _diff(folder: Path, output: Path, dry_run: bool) -> Difference:
    checkpoint = Checkpoint.open(folder)
    receipt, texts = _told(folder)
    if receipt.correction is not None:
        raise MergeError(
            f"{folder} is a corrected merge, which keeps more than cells, and a patch has nothing else: copy the folder"
        )
    for target in lay_out(checkpoint, None).targets:
        if receipt.weights.get(target.name) != _weights_file(target):
            raise _altered(folder, target.name)
    pieces = _pieces(receipt, from_checkpoint(folder, checkpoint.headers), checkpoint, folder / RECEIPT_FILE)
    pieces = [piece for piece in pieces if piece.weight]
    infos = {piece.name: TensorInfo(piece.dtype, piece.cells.shape, 0, 0) for piece in pieces}
    metadata = _metadata(infos, texts)
    size = _target(infos, metadata).size
    cells = {task: _count(task, pieces) for task in receipt.tasks}
    found = Difference(output, size, _size(folder, receipt), cells, _count(WHOLE, pieces))
    check_output_file(output, size)
    with ExitStack() as open_files:
        files = {path: open_files.enter_context(opened(path)) for path in checkpoint.headers}
        if dry_run:
            for piece in pieces:
                _read(checkpoint, files, piece)
            return found
        partial = open_files.enter_context(publish_file(output, size))
        shapes = {piece.name: (piece.cells.shape, checkpoint.place(piece.matrix.tensor).dtype) for piece in pieces}
        with CellsWriter(partial, shapes, metadata) as writer:
            for piece in pieces:
                writer.write(piece.name, _read(checkpoint, files, piece))
    return found


def apply(
    patch: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dry_run: bool = False,
) -> Receipt:
    """Make the merged checkpoint that a patch was taken from: the same files, byte for byte.

    Args:
        patch: file that `diff` wrote.
        base: folder of the base model that the checkpoint was merged on.
        output: folder to make; it appears whole or not at all.
        dry_run: check the patch, and read and check the base; write nothing.

    Returns:
        The receipt of the checkpoint.

    Raises:
        CheckpointError: the patch is damaged, `base` is another model or has other files, or `output` is taken or
            cannot be written.
        MergeError: the dequantised base came out otherwise here than where the checkpoint was merged.
    """
    patch, base = Path(patch), Path(base)
    receipt, card, file = _open(patch)
    if receipt.correction is not None:
        raise CheckpointError(f"{patch} is of a corrected merge, which no patch can make again: copy the merged folder")
    checkpoint = Checkpoint.open(base)
    _require_files(checkpoint, receipt, patch)
    geometry = replace(from_checkpoint(base, checkpoint.headers), model=receipt.base_model)
    shares: dict[str, list[Piece]] = {}
    for piece in _held(file, _pieces(receipt, geometry, checkpoint, patch), checkpoint):
        shares.setdefault(piece.matrix.tensor, []).append(piece)

    def check(base_print: str, passed: Mapping[str, Passed]) -> None:
        _require_base(receipt, base_print, passed, base, patch, turned=not dry_run)

    made = write_merged(
        checkpoint,
        geometry,
        shares,
        receipt.tasks,
        Path(output),
        receipt.quantization,
        receipt.max_shard_size,
        whole=receipt.whole,
        check=check,
        original=Original(receipt, card),
        dry_run=dry_run,
    )
    return receipt if dry_run else made


def _told(folder: Path) -> tuple[Receipt, dict[str, str]]:
    """The receipt of a merged checkpoint, and the texts that go into its patch."""
    receipt = Receipt.read(folder)
    with opened(folder / RECEIPT_FILE) as file:
        told = file.read()
    with opened(folder / CARD_FILE) as file:
        card = file.read()
    if told != receipt.to_bytes():
        raise _altered(folder, RECEIPT_FILE)
    if CARD_FILE not in receipt.files or hashlib.sha256(card).hexdigest() != receipt.files[CARD_FILE].sha256:
        raise _altered(folder, CARD_FILE)
    return receipt, {"receipt": told.decode(), "card": card.decode()}


def _altered(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} was altered since it was merged: {what} is not what its receipt says; merge again"
    )


def _pieces(receipt: Receipt, geometry: Geometry, checkpoint: Checkpoint, source: Path) -> list[Piece]:
    """What a receipt says of every task in every matrix, sorted by task and module, and of tensors trained whole.

    Raises:
        CheckpointError: it does not fit the checkpoint.
    """
    found: dict[str, Piece] = {}
    for task, merged_task in sorted(receipt.tasks.items()):
        for module, merged in sorted(merged_task.regions.items()):
            try:
                matrix = geometry.find(module)
                merged.region.check(matrix.shape, module)
            except (GeometryError, UsageError) as error:
                raise CheckpointError(f"{source} does not fit {checkpoint.folder}: {error}") from None
            checkpoint.place(matrix.tensor)
            cells, dtype = Cells.of(merged.region, matrix), checkpoint.info(matrix.tensor).dtype
            piece = Piece(task, module, matrix, cells, merged.weight, merged.digest, dtype)
            if piece.name in found:
                raise CheckpointError(f"{source} names {matrix.cells_name} of {task} twice: merge again")
            found[piece.name] = piece
    for tensor, told in sorted(receipt.whole.items()):
        place = checkpoint.place(tensor)
        whole = Whole(tensor, told.how, told.weights, {}, place.rows, place.columns)
        dtype = checkpoint.info(tensor).dtype
        piece = Piece(WHOLE, tensor, whole.matrix, whole.cells, whole.weight, told.digest, dtype)
        found[piece.name] = piece
    return list(found.values())


def _read(checkpoint: Checkpoint, files: Mapping[Path, BinaryIO], piece: Piece) -> np.ndarray:
    """The cells of a piece as they are in a merged checkpoint."""
    tensor = piece.matrix.tensor
    path = checkpoint.where[tensor]
    cells = read_cells(files[path].fileno(), checkpoint.place(tensor), piece.cells, path)
    if digest(cells) != piece.mark:
        raise _altered(checkpoint.folder, piece.told)
    return cells


def _metadata(infos: Mapping[str, TensorInfo], texts: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a patch, with a digest over them and over the names, dtypes and shapes of its tensors."""
    rows = [[name, info.dtype, list(info.shape)] for name, info in infos.items()]
    told = json.dumps([rows, texts["receipt"], texts["card"]], separators=(",", ":"))
    mark = blake3(told.encode()).hexdigest()
    return {"multisbora": _KIND, "digest": mark, "receipt": texts["receipt"], "card": texts["card"]}


def _target(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> Target:
    return new_target("", infos, {"format": "pt", **metadata})


def _open(path: Path) -> tuple[Receipt, bytes, CellsFile]:
    """A patch: receipt, card and cells, of which only the header was read. Not a bit of it may be another.

    Raises:
        CheckpointError: it is none, or damaged.
    """
    header = read_header(path)
    texts = header.metadata
    if texts.get("multisbora") != _KIND or not {"receipt", "card"} <= texts.keys():
        raise CheckpointError(f"{path} is no patch: give a file that `multisbora diff` wrote")
    head = _target(header.tensors, _metadata(header.tensors, texts)).head
    with opened(path) as file:
        if file.read(len(head)) != head:
            raise CheckpointError(f"{path} is damaged: its header does not have the digest that it says; {_AGAIN}")
    return Receipt.parse(texts["receipt"].encode(), path), texts["card"].encode(), CellsFile(path, header)


def _held(file: CellsFile, pieces: Sequence[Piece], checkpoint: Checkpoint) -> list[Piece]:
    """The pieces with their cells, each with the digest that the receipt has of it."""
    names = {piece.name for piece in pieces if piece.weight}
    if names != file.header.tensors.keys():
        odd = min(names ^ file.header.tensors.keys())
        raise CheckpointError(f"{file.path} is damaged: its receipt and its tensors do not agree on {odd}; {_AGAIN}")
    found = []
    for piece in pieces:
        if piece.weight:
            cells = file.read(piece.name, piece.cells.shape, checkpoint.place(piece.matrix.tensor).dtype)
            if digest(cells) != piece.mark:
                raise CheckpointError(f"{file.path} is damaged: {piece.told} is not what its receipt says; {_AGAIN}")
            piece = replace(piece, after=cells)
        found.append(piece)
    return found


def _require_files(checkpoint: Checkpoint, receipt: Receipt, patch: Path) -> None:
    """Refuse a base whose names, headers or companions are others, before its tensors are read.

    Raises:
        CheckpointError: they are.
    """
    odd = min(checkpoint.where.keys() ^ receipt.tensors.keys(), default=None)
    if odd is not None:
        has = "has a tensor" if odd in checkpoint.where else "lacks the tensor"
        raise _another(checkpoint.folder, patch, f"it {has} {odd}")
    layout = lay_out(checkpoint, receipt.max_shard_size)
    given = {target.name: _weights_file(target) for target in layout.targets}
    for name in sorted(given.keys() | receipt.weights.keys()):
        if given.get(name) != receipt.weights.get(name):
            raise _another(checkpoint.folder, patch, f"it has other dtypes, shapes or files of tensors ({name})")
    found = {checkpoint.name(path): path for path in layout.companions}
    for name, told in receipt.files.items():
        if name == CARD_FILE:
            continue
        if name == INDEX_FILE and layout.index is not None:
            mark: str | None = hashlib.sha256(layout.index).hexdigest()
        elif name in found:
            with opened(found[name]) as file:
                mark = hashlib.sha256(file.read()).hexdigest()
        else:
            mark = None
        if mark != told.sha256:
            raise _another(checkpoint.folder, patch, f"its {name} {'is missing' if mark is None else 'differs'}")


def _require_base(
    receipt: Receipt, base_print: str, passed: Mapping[str, Passed], base: Path, patch: Path, *, turned: bool
) -> None:
    """Refuse a base with other values, and name the first tensor that has some.

    Args:
        turned: whether quantised tensors went through as dequantised ones.

    Raises:
        CheckpointError: it is another base.
        MergeError: it is not, but was dequantised otherwise.
    """
    quantized = Names(() if receipt.quantization is None else receipt.quantization.modules)
    same = base_print == receipt.base_fingerprint
    for name in sorted(passed):
        if passed[name].base == receipt.tensors[name]:
            continue
        if not quantized.find(name.removesuffix(".weight")):
            raise _another(base, patch, f"{name} differs")
        if turned and same:
            raise MergeError(
                f"{name} dequantised here is not, bit for bit, what it was where {patch} was made: install the "
                "version of bitsandbytes that was used there"
            )
        if turned:
            raise _another(base, patch, f"{name} differs")
    if not same:
        raise _another(base, patch, "the matrices that can be adapted differ")


def _another(base: Path, patch: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{base} is not the base that {patch} was made with: {why}; give that base model, as it was fetched"
    )


def _weights_file(target: Target) -> WeightsFile:
    return WeightsFile(target.size, target.head_digest)


def _size(folder: Path, receipt: Receipt) -> int:
    """Bytes of all files of a merged checkpoint."""
    paths = [folder / name for name in (*receipt.weights, *receipt.files, RECEIPT_FILE)]
    paths += [undo_path(folder, task) for task in (*receipt.tasks, *([WHOLE] if receipt.whole else []))]
    try:
        return sum(path.stat().st_size for path in paths)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror or error}; merge again") from None


def _count(task: str, pieces: Sequence[Piece]) -> int:
    return sum(piece.cells.count for piece in pieces if piece.task == task)
