"""The strict safetensors header reader, and which file holds which tensor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from multisbora.errors import CheckpointError
from multisbora.header import MAX_HEADER_BYTES, locate_tensors, read_header, read_headers, shard_files


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_shards(folder: Path) -> Path:
    save_file({"a": np.zeros(2, np.float32)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": np.zeros(3, np.float32)}, folder / "model-00002-of-00002.safetensors")
    write_index(folder, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    return folder


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.arange(4, dtype=np.int32)}
    tensors["none"] = np.zeros((0, 5), np.float16)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert set(header.tensors) == set(tensors)
    raw = path.read_bytes()
    for name, tensor in tensors.items():
        info = header.tensors[name]
        assert info.shape == tensor.shape and info.nbytes == tensor.nbytes
        assert raw[header.data_start + info.start : header.data_start + info.end] == tensor.tobytes()
    starts = [info.start for info in header.tensors.values()]
    assert starts == sorted(starts)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    save_file({"x": np.arange(6, dtype=np.float32)}, whole)
    raw = whole.read_bytes()
    for length in range(len(raw)):
        (tmp_path / "cut").write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            read_header(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(raw + b"\0")
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        read_header(tmp_path / "cut")


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        (b"{not json", b"", "not JSON at line 1, column 2"),
        (b'{"\xff\xfe":1}', b"", "not UTF-8"),
        (b'{"a":' + b"[" * 100_000, b"", "nested deeper"),
        (b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", b"", "nested deeper"),
        (b' {"a":1}', b"", "not a JSON object"),
        (b"", b"", "not a JSON object"),
        (b'{"a":' + b"9" * 400 + b"}", b"", "more than 64 bits"),
        (b'{"a":NaN}', b"", "NaN"),
        (b'{"a":1e400}', b"", "not finite"),
        (b'{"\\ud800":1}', b"", "not UTF-8"),
        (b'{"a":[' + b"{}," * 2_000_000 + b"1]}", b"", "more than 2000000 values"),
        ({"a\nb": entry([1], 0, 4)}, b"\0" * 4, "no name of a tensor"),
        ({"a\0": entry([1], 0, 4)}, b"\0" * 4, "no name of a tensor"),
        ({"": entry([1], 0, 4)}, b"\0" * 4, "no name of a tensor"),
        ({"a" * 1_000_000: entry([1], 0, 4)}, b"\0" * 4, "no name of a tensor"),
        ({"layers." + "9" * 5000: entry([1], 0, 4)}, b"\0" * 4, "no name of a tensor"),
        ({"a": entry([0, 2**40, 2**40], 0, 0)}, b"", "cannot have 0 bytes"),
        ({"a": entry([0, 2**63], 0, 0)}, b"", "cannot have 0 bytes"),
        ({"a": entry([1] * 100, 0, 4)}, b"\0" * 4, "cannot have 4 bytes"),
        ({"a": entry([2**62] * 200_000, 0, 4)}, b"\0" * 4, "cannot have 4 bytes"),
        ([1], b"", "not a JSON object"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        ({"a": [1]}, b"", "no dtype"),
        ({"a": entry([1], 0, 4) | {"more": 1}}, b"\0" * 4, "no dtype"),
        ({"a": entry([1], 0, 4, "F31")}, b"\0" * 4, "unknown dtype 'F31'"),
        ({"a": entry([-1], 0, 4)}, b"\0" * 4, "impossible"),
        ({"a": entry([1], 4, 0)}, b"\0" * 4, "impossible"),
        ({"a": entry([True], 0, 4)}, b"\0" * 4, "impossible"),
        ({"a": entry([2], 0, 4)}, b"\0" * 4, "cannot have 4 bytes"),
        ({"a": entry([1], 4, 8)}, b"\0" * 8, "starts at byte 4"),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"\0" * 4, "starts at byte 0"),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12, "starts at byte 8"),
        ({"a": entry([100], 0, 400)}, b"\0" * 4, "need 400 bytes, it has 4"),
        ({"a": entry([1], 0, 4)}, b"\0" * 8, "need 4 bytes, it has 8"),
        (b'{"a":1,"a":1}', b"", "twice"),
    ],
)
def test_a_bad_header_is_refused_in_one_line(tmp_path: Path, header: Any, data: bytes, why: str) -> None:
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=why) as caught:
        read_header(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600 and str(path) in str(caught.value)


def test_a_giant_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "giant.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse
    with pytest.raises(CheckpointError, match="are the most that is read"):
        read_header(path)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_header(tmp_path / "none")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_header(tmp_path / name)


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"c": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    assert shard_files(tmp_path) == [tmp_path / "model.safetensors"]
    assert locate_tensors(tmp_path) == {"c": tmp_path / "model.safetensors"}


def test_shards_are_located(tmp_path: Path) -> None:
    write_shards(tmp_path)
    files = [tmp_path / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert shard_files(tmp_path) == files
    assert locate_tensors(tmp_path) == {"a": files[0], "b": files[1]}
    assert list(read_headers(tmp_path)) == files


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        shard_files(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        shard_files(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="pickled"):
        shard_files(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards, first model-00002"):
        shard_files(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_an_unreadable_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        shard_files(tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        *("../out.safetensors", "/etc/out.safetensors", "sub/x.safetensors", "x.bin", ".."),
        *("a\0.safetensors", "a\n.safetensors", "x" * 300 + ".safetensors", "\u00e9" * 127 + ".safetensors"),
    ],
)
def test_an_index_cannot_leave_its_folder(tmp_path: Path, file: str) -> None:
    write_index(tmp_path, {"a": file})
    with pytest.raises(CheckpointError, match=r"no \.safetensors file of this folder"):
        shard_files(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    write_shards(tmp_path)
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    write_index(tmp_path, {"a": second, "b": second, "c": first})
    with pytest.raises(CheckpointError, match="says that a is in model-00002"):
        locate_tensors(tmp_path)
    write_index(tmp_path, {"a": first, "b": second})
    save_file({"b": np.zeros(1, np.float32), "a": np.zeros(1, np.float32)}, tmp_path / second)
    with pytest.raises(CheckpointError, match="a lies in model-00001"):
        locate_tensors(tmp_path)
