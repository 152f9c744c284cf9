"""Which tensor goes into which file of a checkpoint that is written: as in the base, or sharded anew."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, reading
from .errors import CheckpointError, UsageError
from .header import DTYPE_BITS, INDEX_FILE, SINGLE_FILE, TensorInfo
from .untrusted import read_json

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(|[KMGT]i?)B?\s*", re.IGNORECASE)
_ALIGNMENT = 8  # bytes: what safetensors pads its headers to


@dataclass(frozen=True, slots=True)
class Target:
    """One file of tensors to write.

    Attributes:
        name: of the file.
        head: its first bytes, up to the first tensor's.
        offsets: tensor -> bytes from the start of the file, in the order of their bytes.
        size: of the file, in bytes.
        source: the file with the same layout, byte for byte; None if it is laid out anew.
    """

    name: str
    head: bytes
    offsets: dict[str, int]
    size: int
    source: Path | None = None

    @property
    def head_digest(self) -> str:
        """sha256 (hex) of `head`: the names, dtypes, shapes and places of all tensors, and the metadata."""
        return hashlib.sha256(self.head).hexdigest()


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a checkpoint to write.

    Attributes:
        targets: the files of tensors.
        index: content of the index, where tensors are laid out anew in more than one file; else None.
        companions: the files of the base that are copied.
    """

    targets: list[Target]
    index: bytes | None
    companions: tuple[Path, ...]


def lay_out(checkpoint: Checkpoint, max_shard_size: int | None) -> Layout:
    """The files of a checkpoint that is made from this one.

    Args:
        max_shard_size: see `sharded`; None keeps the files of tensors as they are.

    Raises:
        CheckpointError: a file cannot be read.
        UsageError: as `sharded`.
    """
    if max_shard_size is None:
        return Layout(same_layout(checkpoint), None, checkpoint.companions())
    targets, index = sharded(checkpoint, max_shard_size)
    return Layout(targets, index, tuple(path for path in checkpoint.companions() if path.name != INDEX_FILE))


def same_layout(checkpoint: Checkpoint) -> list[Target]:
    """The files of a checkpoint as they are.

    Raises:
        CheckpointError: one cannot be read.
    """
    targets = []
    for path, header in checkpoint.headers.items():
        with reading(path) as file:
            head = file.read(header.data_start)
        offsets = {tensor: header.data_start + info.start for tensor, info in header.tensors.items()}
        targets.append(Target(path.name, head, offsets, path.stat().st_size, path))
    return targets


def sharded(checkpoint: Checkpoint, max_shard_size: int) -> tuple[list[Target], bytes | None]:
    """The tensors of a checkpoint in their order, in files of at most `max_shard_size` bytes of tensors.

    A tensor that is larger than that has a file of its own. Names are those that transformers gives.

    Returns:
        The files, and the content of their index; None for a single file, which needs none.

    Raises:
        UsageError: `max_shard_size` is no positive whole number.
    """
    if type(max_shard_size) is not int or max_shard_size < 1:
        raise UsageError(f"max_shard_size {max_shard_size!r} is no number of bytes: use a positive whole number")
    shards: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for header in checkpoint.headers.values():
        for tensor, info in header.tensors.items():
            if shards[-1] and filled + info.nbytes > max_shard_size:
                shards.append({})
                filled = 0
            shards[-1][tensor] = info
            filled += info.nbytes
    metadata: dict[str, str] = {}
    for header in checkpoint.headers.values():
        metadata |= header.metadata
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE_FILE]
    targets = [new_target(name, shard, metadata) for name, shard in zip(names, shards, strict=True)]
    if len(shards) == 1:
        return targets, None
    content = {
        "metadata": _index_metadata(checkpoint)
        | {"total_size": sum(info.nbytes for shard in shards for info in shard.values())},
        "weight_map": {tensor: target.name for target in targets for tensor in target.offsets},
    }
    return targets, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def new_target(name: str, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> Target:
    """A safetensors file of these tensors; of each `TensorInfo` only dtype and shape count.

    They lie in this order, but those with wide values first, as safetensors' own writer has it: then each is aligned.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -DTYPE_BITS[item[1].dtype]))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, position = {}, 0
    for tensor, info in tensors.items():
        size = math.prod(info.shape) * DTYPE_BITS[info.dtype] // 8
        entries[tensor] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, position + size]}
        starts[tensor] = position
        position += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return Target(name, head, {tensor: len(head) + start for tensor, start in starts.items()}, len(head) + position)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB" (powers of 1000), "2GiB" (of 1024) or a plain number.

    Raises:
        UsageError: it is something else, or nothing.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"the size {text!r} is none: write a number with a unit, for example 5GB or 500MB")
    unit = match[2].lower()
    power = "kmgt".index(unit[0]) + 1 if unit else 0
    number = float(match[1]) * (1024 if unit.endswith("i") else 1000) ** power
    size = int(number) if math.isfinite(number) else 0
    if size < 1:
        raise UsageError(f"the size {text!r:.60} is nothing that files can have: write for example 5GB or 500MB")
    return size


def _index_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        content = read_json(checkpoint.folder / INDEX_FILE)
        return dict(content.get("metadata") or {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{checkpoint.folder / INDEX_FILE} is not a readable index: fetch it again") from None
