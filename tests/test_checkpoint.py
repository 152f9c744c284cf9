"""Reading, patching, copying and publishing model files."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from builders import tiny_gpt2, tiny_llama
from safetensors.torch import load_file, save_file

from multisbora import checkpoint as module
from multisbora.checkpoint import Checkpoint, copy_file, copy_patched, fingerprint, publish
from multisbora.errors import CheckpointError
from multisbora.geometry import from_checkpoint

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


def test_the_fingerprint_is_of_the_adaptable_tensors_alone(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    geometry = from_checkpoint(base)
    mark = fingerprint(base, geometry)
    assert len(mark) == 64
    assert fingerprint(tiny_llama(tmp_path / "sharded", shards=3), geometry) == mark
    assert fingerprint(tiny_llama(tmp_path / "seed", seed=1), geometry) != mark
    assert fingerprint(tiny_llama(tmp_path / "float", dtype="float16"), geometry) != mark
    (base / "tokenizer.json").write_text("{}")
    state = load_file(base / "model.safetensors")
    state["model.embed_tokens.weight"][0, 0] += 1
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(base, geometry) == mark
    state[Q][0, 0] += 1
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(base, geometry) != mark


def test_the_fingerprint_is_what_its_docstring_says(tmp_path: Path) -> None:
    base = tiny_gpt2(tmp_path / "base")
    geometry, state = from_checkpoint(base), load_file(base / "model.safetensors")
    whole = hashlib.sha256()
    for matrix in sorted(geometry.matrices, key=lambda m: m.tensor):
        inner = hashlib.sha256(state[matrix.tensor].numpy().tobytes()).hexdigest()
        rows, columns = matrix.in_features, matrix.out_features
        whole.update(f'["{matrix.tensor}","F32",[{rows},{columns}],"{inner}"]\n'.encode())
    assert fingerprint(base, geometry) == whole.hexdigest()


def test_a_fingerprint_of_another_model_is_refused(tmp_path: Path) -> None:
    geometry = from_checkpoint(tiny_llama(tmp_path / "base"))
    with pytest.raises(CheckpointError, match="another model"):
        fingerprint(tiny_llama(tmp_path / "wide", intermediate_size=64), geometry)
    with pytest.raises(CheckpointError, match="holds no tensor"):
        fingerprint(tiny_gpt2(tmp_path / "gpt2"), geometry)


def test_a_patched_copy_differs_in_the_patched_tensor_alone(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    source, target = base / "model.safetensors", tmp_path / "copy.safetensors"
    header = Checkpoint.open(base).headers[source]

    def patch(array: np.ndarray) -> None:
        assert array.dtype == ml_dtypes.bfloat16
        array[3, 5] = 7

    digest = copy_patched(source, target, header, {Q: patch})
    assert digest.sha256 == hashlib.sha256(target.read_bytes()).hexdigest()
    assert digest.size == source.stat().st_size
    old, new = source.read_bytes(), target.read_bytes()
    place = header.data_start + header.tensors[Q].start + 2 * (3 * 32 + 5)
    assert [i for i in range(len(old)) if old[i] != new[i]] == [i for i in (place, place + 1) if old[i] != new[i]]
    assert load_file(target)[Q][3, 5] == 7
    assert copy_patched(source, tmp_path / "same", header, {}) == copy_file(source, tmp_path / "same2")
    assert (tmp_path / "same").read_bytes() == old


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


def test_publish_shows_all_or_nothing(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "er" / "out"
    with publish(output) as partial:
        (partial / "a").write_text("a")
        assert not output.exists()
        assert partial.parent == output.parent
    assert (output / "a").read_text() == "a"
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    with pytest.raises(KeyboardInterrupt), publish(tmp_path / "other") as partial:
        (partial / "a").write_text("a")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_publish_has_the_rights_of_an_ordinary_folder(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    with publish(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_publish_takes_an_empty_folder_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with publish(tmp_path / "empty") as partial:
        (partial / "a").write_text("new")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "file", "link"):
        with pytest.raises(CheckpointError, match="exists and is not an empty folder"), publish(tmp_path / name):
            pytest.fail("the block must not run")
    assert (tmp_path / "empty" / "a").read_text() == "new"
    with pytest.raises(CheckpointError, match="exists and is not"), publish(tmp_path / "late"):
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "theirs").write_text("")
    assert [path.name for path in (tmp_path / "late").iterdir()] == ["theirs"]
    with pytest.raises(CheckpointError, match="was not written"), publish(tmp_path / "file" / "below"):
        pytest.fail("the block must not run")


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    message = r"out of disk space for .*it needs .* GB"
    with pytest.raises(CheckpointError, match=message), publish(tmp_path / "out", needed=1 << 60):
        pytest.fail("the block must not run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, number: int) -> None:
    message = r"out of disk space while writing .*out: nothing was kept"
    with pytest.raises(CheckpointError, match=message), publish(tmp_path / "out") as partial:
        (partial / "a").write_text("half")
        raise OSError(number, os.strerror(number))
    assert not list(tmp_path.iterdir())


def test_a_write_that_really_fails_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(100_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="out of disk space"), publish(tmp_path / "out") as partial:
            copy_file(source, partial / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_read_that_fails_is_not_called_a_write(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="gone cannot be read: No such file"),
        publish(tmp_path / "out") as partial,
    ):
        copy_file(tmp_path / "gone", partial / "copy")


def test_a_file_that_shrinks_while_it_is_copied_is_noticed(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    source = base / "model.safetensors"
    header = Checkpoint.open(base).headers[source]
    os.truncate(source, source.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="ended while it was read"):
        copy_patched(source, tmp_path / "copy", header, {})


def test_what_a_killed_process_left_is_swept_and_a_living_one_is_not(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom multisbora.checkpoint import publish\n"
        "with publish(sys.argv[1]) as partial:\n    (partial / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    [dead] = tmp_path.iterdir()
    assert dead.name.startswith(".out.")
    with publish(tmp_path / "out") as first:
        assert not dead.exists()
        with publish(tmp_path / "other"):
            assert first.exists()
        with pytest.raises(CheckpointError, match="exists"), publish(tmp_path / "out") as second:
            assert first.exists()
            (second / "a").write_text("")
            shutil.copytree(second, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
