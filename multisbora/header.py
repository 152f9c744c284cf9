"""The header of a safetensors file, read strictly, and which file of a checkpoint holds which tensor.

A file is 8 bytes (little-endian length of the header), the header (JSON), then the tensors' bytes. Only the header is
read here, so a 100 GB checkpoint costs a few megabytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError
from .untrusted import MAX_JSON_BYTES, is_plain, open_file, parse_json, read_json, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The format allows 100 MB. No model has so many tensors in one file, and parsed it would take a gigabyte of memory.
MAX_HEADER_BYTES = MAX_JSON_BYTES
MAX_NAME = 512  # characters
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
_MAX_FILE_NAME = 255  # bytes, of every file system in use
_MAX_AXES = 32  # what every version of numpy can hold
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
    tensors fill the rest of the file from its first to its last byte without a gap. Names of tensors are printable and
    of at most `MAX_NAME` characters, so that whoever speaks of them later need not escape them.

    Raises:
        CheckpointError: the file is missing, truncated, or not a valid safetensors file.
    """
    path = Path(path)
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise _corrupt(path, f"it ends inside its header ({size} bytes)")
            if length > MAX_HEADER_BYTES:
                raise _corrupt(path, f"its header claims {length} bytes, {MAX_HEADER_BYTES} are the most that is read")
            raw = file.read(length)
            if len(raw) < length:
                raise _corrupt(path, f"it ends inside its header ({size} bytes)")
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
                raise CheckpointError(f"{folder}: {INDEX_FILE} says that {shown(name)} is in {file}, but it is not")
    return headers


def _weight_map(index: Path) -> dict[str, str]:
    try:
        pairs = list(read_json(index)["weight_map"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f" ({error})" if type(error) is ValueError else ""
        raise CheckpointError(f"{index} is not a readable safetensors index{why}: fetch it again") from None
    for name, file in pairs:
        # A shard named "../x" would let an index read and, in a merge, write outside its folder.
        inside = isinstance(file, str) and is_plain(file, _MAX_FILE_NAME) and Path(file).name == file
        if not inside or len(file.encode()) > _MAX_FILE_NAME or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: {shown(name)} is in {shown(file)!r}, which is no .safetensors file of this folder"
            )
    if not pairs:
        raise CheckpointError(f"{index} lists no tensors: fetch it again")
    return dict(pairs)


def _corrupt(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or corrupt: {why}; fetch or write it again")


def _parse(path: Path, raw: bytes, data_start: int, data_bytes: int) -> Header:
    if not raw.startswith(b"{"):  # the format allows no space before it
        raise _corrupt(path, "its header is not a JSON object")
    try:
        content = parse_json(raw)
    except ValueError as error:
        raise _corrupt(path, f"its header cannot be read, {error}") from None
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
    if not is_plain(name, MAX_NAME):
        raise _corrupt(
            path, f"{shown(name)!r} is no name of a tensor: one is printable and has 1 to {MAX_NAME} characters"
        )
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(path, f"{shown(name)} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _corrupt(path, f"{shown(name)} has the unknown dtype {shown(dtype)!r}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _corrupt(path, f"{shown(name)} has an impossible shape or impossible offsets")
    bits = _bits(shape, DTYPE_BITS[dtype])
    if bits != 8 * (offsets[1] - offsets[0]):
        size = offsets[1] - offsets[0]
        raise _corrupt(path, f"{shown(name)} of shape {shown(shape)} and dtype {dtype} cannot have {size} bytes")
    return TensorInfo(dtype=dtype, shape=tuple(shape), start=offsets[0], end=offsets[1])


def _counts(values: object) -> bool:
    return isinstance(values, list) and not {type(value) for value in values} - {int} and min(values, default=0) >= 0


def _bits(shape: list[int], each: int) -> int | None:
    """Bits of a tensor; None if no array can have its shape: too many axes, or too large ones, be it beside a 0."""
    if len(shape) > _MAX_AXES:
        return None
    bits = each
    for size in shape:
        bits *= max(size, 1)
    return None if bits >= 1 << 63 else 0 if 0 in shape else bits
