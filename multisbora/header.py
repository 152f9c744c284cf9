"""The header of a safetensors file, read strictly, and which file of a checkpoint holds which tensor.

A file is 8 bytes (little-endian length of the header), the header (JSON), then the tensors' bytes. Only the header is
read here, so a 100 GB checkpoint costs a few megabytes.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors format itself sets
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: `start` and `end` are bytes counted from the header's `data_start`, end exclusive."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file holds.

    Attributes:
        tensors: name -> info, in the order of their bytes in the file.
        metadata: the file's `__metadata__`, text to text.
        data_start: bytes from the start of the file to the first tensor's bytes.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of one safetensors file.

    Checked: the header's length, unique names, known dtypes, each tensor's bytes against its shape, and that the
    tensors fill the rest of the file from its first to its last byte without a gap.

    Raises:
        CheckpointError: the file is missing, truncated, or not a valid safetensors file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise _corrupt(path, f"it ends inside its header ({size} bytes)")
            if length > MAX_HEADER_BYTES:
                raise _corrupt(path, f"its header claims {length} bytes, above the format's {MAX_HEADER_BYTES}")
            raw = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: check the path, or fetch the model again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    return _parse(path, raw, data_start=8 + length, data_bytes=size - 8 - length)


def shard_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name: `model.safetensors`, or the shards its index lists.

    Raises:
        CheckpointError: no such folder, no safetensors weights in it, an unreadable index, or a shard that is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the folder that holds {SINGLE_FILE} and config.json")
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        pickled = next((name for name in _PICKLED if (folder / name).exists()), None)
        if pickled:
            raise CheckpointError(
                f"{folder} holds pickled weights ({pickled}), which are never read: "
                "load the model in transformers and save_pretrained it as safetensors"
            )
        raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: is it a model folder?")
    files = sorted({folder / name for name in _weight_map(index).values()})
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(files)} shards, first {missing[0]}: fetch again")
    return files


def locate_tensors(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Which file holds each stored tensor of a checkpoint: tensor name -> path, shard by shard.

    Raises:
        CheckpointError: as `shard_files` and `read_header`; a tensor lies in two shards, or not where the index says.
    """
    return {name: path for path, header in read_headers(folder).items() for name in header.tensors}


def read_headers(folder: str | os.PathLike[str]) -> dict[Path, Header]:
    """The headers of all files of a checkpoint, in the order of `shard_files`, checked against the index.

    Raises:
        CheckpointError: as `locate_tensors`.
    """
    folder = Path(folder)
    headers = {path: read_header(path) for path in shard_files(folder)}
    where: dict[str, Path] = {}
    for path, header in headers.items():
        for name in header.tensors:
            if name in where:
                raise CheckpointError(f"{folder}: {name} lies in {where[name].name} and in {path.name}: fetch it again")
            where[name] = path
    if folder / SINGLE_FILE not in headers:
        for name, file in _weight_map(folder / INDEX_FILE).items():
            if where.get(name) != folder / file:
                raise CheckpointError(f"{folder}: {INDEX_FILE} says that {name} is in {file}, but it is not")
    return headers


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_bytes())
        weight_map = content["weight_map"]
        pairs = list(weight_map.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index} is not a readable safetensors index: fetch it again") from None
    for name, file in pairs:
        # A shard named "../x" would let an index read and, in a merge, write outside its folder.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name} is in {file!r}, which is no .safetensors file of this folder")
    if not pairs:
        raise CheckpointError(f"{index} lists no tensors: fetch it again")
    return dict(pairs)


def _corrupt(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or corrupt: {why}; fetch or write it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return found


def _parse(path: Path, raw: bytes, data_start: int, data_bytes: int) -> Header:
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        why = str(error) if "twice" in str(error) else "its header is not JSON"
        raise _corrupt(path, why) from None
    if not isinstance(content, dict):
        raise _corrupt(path, "its header is not a JSON object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(path, "its __metadata__ is not text to text")
    tensors = {name: _tensor(path, name, entry) for name, entry in content.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    position = 0
    for name, info in ordered.items():
        if info.start != position:
            raise _corrupt(path, f"{name} starts at byte {info.start} of the data, not at {position}")
        position = info.end
    if position != data_bytes:
        raise _corrupt(path, f"its tensors need {position} bytes, it has {data_bytes}")
    return Header(tensors=ordered, metadata=metadata, data_start=data_start)


def _tensor(path: Path, name: str, entry: object) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(path, f"{name} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _corrupt(path, f"{name} has the unknown dtype {str(dtype)[:40]!r}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _corrupt(path, f"{name} has an impossible shape or impossible offsets")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _corrupt(path, f"{name} of shape {shape} and dtype {dtype} cannot have {offsets[1] - offsets[0]} bytes")
    return TensorInfo(dtype=dtype, shape=tuple(shape), start=offsets[0], end=offsets[1])


def _counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
