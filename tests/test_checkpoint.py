"""Reading and copying model files."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch
from builders import tiny_gpt2, tiny_llama
from commands import refused
from safetensors.torch import load_file, save_file

from multisbora.cells import PATCHABLE, Place
from multisbora.checkpoint import Checkpoint, FileDigest, copy_file
from multisbora.errors import CheckpointError

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_tensor_reads_with_its_own_bits(tmp_path: Path, dtype: str) -> None:
    base = tiny_llama(tmp_path / "base", dtype=dtype, shards=2)
    stored = {name: t for path in base.glob("*.safetensors") for name, t in load_file(path).items()}
    checkpoint = Checkpoint.open(base)
    assert checkpoint.where.keys() == stored.keys()
    for name, tensor in stored.items():
        array = checkpoint.tensor(name)
        assert array.shape == tuple(tensor.shape)
        assert array.tobytes() == tensor.view(torch.uint8).numpy().tobytes()
    assert array.flags.writeable


def test_other_float_dtypes_are_refused(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    state = load_file(base / "model.safetensors")
    state[Q] = state[Q].to(torch.float64)
    state["eight"] = torch.zeros(3, 4).to(torch.float8_e4m3fn)
    save_file(state, base / "model.safetensors")
    for name, dtype in ((Q, "F64"), ("eight", "F8_E4M3")):
        with pytest.raises(CheckpointError, match=f"{name} is stored as {dtype}.*F32, F16, BF16"):
            Checkpoint.open(base).tensor(name)
    with pytest.raises(CheckpointError, match="holds no tensor lm_head"):
        Checkpoint.open(base).tensor("lm_head.weight")


def test_companions_are_the_model_and_nothing_else(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    for name in ("chat_template.jinja", "LICENSE", "vocab.txt", "modeling_own.py"):
        (base / name).write_text(name)
        wanted.add(name)
    refused = ["pytorch_model.bin", "x.pt", "x.pth", "x.ckpt", "x.gguf", "x.h5", "x.msgpack", "x.onnx", "X.BIN"]
    refused += [".hidden", "README.md", "multisbora_receipt.json", "multisbora_undo.safetensors", "stray.safetensors"]
    refused += ["model.safetensors.index.json", "pytorch_model.bin.index.json", "adapter_config.json", "weights.tar.gz"]
    for name in refused:
        (base / name).write_text(name)
    (base / "folder").mkdir()
    (base / "folder" / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(base)
    assert {path.name for path in checkpoint.companions()} == wanted
    sharded = Checkpoint.open(tiny_llama(tmp_path / "sharded", shards=2))
    assert "model.safetensors.index.json" in {path.name for path in sharded.companions()}
    assert sharded.size() == sum(path.stat().st_size for path in sharded.folder.iterdir())


def test_linked_files_are_copied_as_files(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("content")
    (tmp_path / "link").symlink_to(tmp_path / "blob")
    copy_file(tmp_path / "link", tmp_path / "copy")
    assert not (tmp_path / "copy").is_symlink()
    assert (tmp_path / "copy").read_text() == "content"


def test_a_place_is_rows_of_values(tmp_path: Path) -> None:
    base = tiny_gpt2(tmp_path / "base", dtype="float16")
    state = load_file(base / "model.safetensors")
    state["experts"] = torch.randn(3, 4, 5)
    state["scalar"] = torch.tensor(2.0)
    save_file(state, base / "model.safetensors")
    checkpoint, raw = Checkpoint.open(base), (base / "model.safetensors").read_bytes()
    for name, tensor in state.items():
        place = checkpoint.place(name)
        columns = tensor.shape[-1] if tensor.ndim else 1
        dtype = PATCHABLE["F32" if name in ("experts", "scalar") else "F16"]
        assert place == Place(place.offset, math.prod(tensor.shape[:-1]), columns, dtype)
        size = place.rows * place.row_bytes
        assert raw[place.offset : place.offset + size] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert checkpoint.tensor(name).shape == tuple(tensor.shape)


def test_a_file_is_copied_with_its_digest(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000
    (tmp_path / "a").write_bytes(data)
    assert copy_file(tmp_path / "a", tmp_path / "b") == FileDigest(hashlib.sha256(data).hexdigest(), len(data))
    assert (tmp_path / "b").read_bytes() == data
    with pytest.raises(FileExistsError):
        copy_file(tmp_path / "a", tmp_path / "b")
    refused(lambda: copy_file(tmp_path / "gone", tmp_path / "c"), CheckpointError, "gone cannot be read: No such file")


def test_chat_templates_belong_to_the_tokenizer(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    for name in ("tool.jinja", "notes.txt"):
        (base / "additional_chat_templates" / name).write_text(name)
    checkpoint = Checkpoint.open(base)
    names = [checkpoint.name(path) for path in checkpoint.companions()]
    assert "additional_chat_templates/tool.jinja" in names
    assert not any("notes" in name for name in names)
